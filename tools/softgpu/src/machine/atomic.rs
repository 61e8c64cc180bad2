//! Atomic operations.

use super::access::{access_one, addresses, resolve};
use super::block::{Core, Env};
use super::exec::Result;
use super::fault::Trouble;
use super::lanes::{Rows, lanes};
use super::math::canonical;
use super::shared::{Access, Who};
use super::warp::Warp;
use crate::ptx::program::{Atom, Instr, Space, Ty};

/// Executes an atomic operation, lane by lane.
#[allow(clippy::too_many_arguments, reason = "what an instruction sees")]
pub(super) fn execute(
    env: &mut Env,
    core: &mut Core,
    warp: &mut Warp,
    rows: &Rows,
    i: &Instr,
    pc: usize,
    mask: u32,
) -> Result<()> {
    let all = addresses(rows, i);
    let bytes = i.ty.bytes();
    env.counts.atomics += u64::from(mask.count_ones());
    if i.space != Space::Shared {
        env.counts.global(pc, &all, mask, bytes);
    }
    for lane in lanes(mask) {
        let (space, address) = resolve(i.space, all[lane]);
        let who = Who { warp: warp.index, lane, pc };
        let at = match space {
            Space::Shared => {
                core.shared.access(address, bytes, Access::Atomic, who).map_err(|t| t.lane(lane))?
            }
            Space::Global => {
                access_one(env, core, address, bytes, bytes, Access::Atomic, i.flags, warp, lane, pc)
                    .map_err(|t| t.lane(lane))?
            }
            _ => return Err(Trouble::new("an atomic operation on memory of one thread").lane(lane)),
        };
        // SAFETY: the checks above cover the bytes; the rows are the instruction's.
        unsafe {
            if bytes == 8 {
                let to = at.cast::<u64>();
                let (b, c) = ((*rows.get::<u64>(i.b))[lane], (*rows.get::<u64>(i.c))[lane]);
                let old = to.read();
                let new = updated(i, old, b, c);
                env.counts.changed |= new != old;
                to.write_volatile(new);
                (*rows.at::<u64>(i.d))[lane] = old;
            } else {
                let to = at.cast::<u32>();
                let old = to.read();
                let (b, c) = (u64::from(rows.lane(i.b, lane)), u64::from(rows.lane(i.c, lane)));
                let new = updated(i, u64::from(old), b, c) as u32;
                env.counts.changed |= new != old;
                to.write_volatile(new);
                (*rows.at::<u32>(i.d))[lane] = old;
            }
        }
    }
    // An operation on the same address by several lanes is one of the warp.
    let mut last = None;
    for lane in lanes(mask) {
        if last != Some(all[lane]) && resolve(i.space, all[lane]).0 == Space::Global {
            env.global.atomic(all[lane], i.flags, env.launch_index, core, warp.index);
            last = Some(all[lane]);
        }
    }
    Ok(())
}

/// The new value of an atomic operation.
fn updated(i: &Instr, old: u64, b: u64, c: u64) -> u64 {
    let signed = |x: u64| if i.ty == Ty::S32 { i64::from(x as i32) } else { x as i64 };
    match i.atom {
        Atom::Add if i.ty == Ty::F32 => {
            let sum = f32::from_bits(old as u32) + f32::from_bits(b as u32);
            u64::from(canonical(sum).to_bits())
        }
        Atom::Add => old.wrapping_add(b),
        Atom::Min if i.ty.is_signed() => signed(old).min(signed(b)) as u64,
        Atom::Max if i.ty.is_signed() => signed(old).max(signed(b)) as u64,
        Atom::Min => old.min(b),
        Atom::Max => old.max(b),
        Atom::And => old & b,
        Atom::Or => old | b,
        Atom::Xor => old ^ b,
        Atom::Inc => {
            if old >= b {
                0
            } else {
                old + 1
            }
        }
        Atom::Dec => {
            if old == 0 || old > b {
                b
            } else {
                old - 1
            }
        }
        Atom::Exch => b,
        Atom::Cas => {
            if old == b {
                c
            } else {
                old
            }
        }
    }
}
