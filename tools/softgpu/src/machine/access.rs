//! Loads, stores, atomics and asynchronous copies, with their checks: bounds, alignment, bytes that were never written,
//! races.

use super::block::{Core, Env, RANGES, Range};
use super::exec::Result;
use super::fault::{Cause, Trouble};
use super::lanes::{LANES, Rows, lanes};
use super::shared::{Access, Run, Who};
use super::warp::{Copy, Warp};
use crate::memory::DEVICE_MEMORY;
use crate::ptx::program::{Atom, Instr, LOCAL_WINDOW, NONE, Op, SHARED_WINDOW, Space, Ty, flag};

/// The addresses of an instruction's lanes.
fn addresses(rows: &Rows, i: &Instr) -> [u64; LANES] {
    let offset = i64::from(i.x as i32) as u64;
    // SAFETY: the operand is the instruction's, of the width that the flag says.
    unsafe {
        if i.has(flag::NARROW) {
            // 32-bit addresses wrap at 32 bits.
            (*rows.get::<u32>(i.a)).map(|x| u64::from(x.wrapping_add(offset as u32)))
        } else {
            (*rows.get::<u64>(i.a)).map(|x| x.wrapping_add(offset))
        }
    }
}

/// A state space and the address in it, for an address that may be generic.
fn resolve(space: Space, address: u64) -> (Space, u64) {
    match space {
        Space::Generic if address >= LOCAL_WINDOW => (Space::Local, address - LOCAL_WINDOW),
        Space::Generic if address >= SHARED_WINDOW => (Space::Shared, address - SHARED_WINDOW),
        Space::Generic | Space::Const => (Space::Global, address),
        other => (other, address),
    }
}

/// The runs of an instruction's lanes, by lane.
#[inline(always)]
fn runs(addresses: &[u64; LANES], mut mask: u32, bytes: u32) -> impl Iterator<Item = Run> + '_ {
    // Bit n: lane n accesses the bytes after those of the lane before it.
    let mut follows = 0;
    for lane in 1..LANES {
        follows |= u32::from(addresses[lane] == addresses[lane - 1].wrapping_add(u64::from(bytes))) << lane;
    }
    std::iter::from_fn(move || {
        if mask == 0 {
            return None;
        }
        let lane = mask.trailing_zeros();
        // The lanes that follow without a gap.
        let more = ((mask & follows) >> lane >> 1).trailing_ones();
        let lanes = 1 + more;
        mask &= !((((1u64 << lanes) - 1) as u32) << lane);
        Some(Run { address: addresses[lane as usize], lane: lane as usize, lanes, bytes })
    })
}

/// What an instruction is executed with: see [`access`].
pub(super) type Execute = unsafe fn(&mut Env, &mut Core, &mut Warp, &Rows, &Instr, usize, u32) -> Result<()>;

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
pub(super) unsafe fn avx512(
    env: &mut Env,
    core: &mut Core,
    warp: &mut Warp,
    rows: &Rows,
    i: &Instr,
    pc: usize,
    mask: u32,
) -> Result<()> {
    access(env, core, warp, rows, i, pc, mask)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
pub(super) unsafe fn avx2(
    env: &mut Env,
    core: &mut Core,
    warp: &mut Warp,
    rows: &Rows,
    i: &Instr,
    pc: usize,
    mask: u32,
) -> Result<()> {
    access(env, core, warp, rows, i, pc, mask)
}

/// Executes a load, store, atomic operation, ldmatrix or asynchronous copy. It exists once for each instruction set of the
/// host, as the loop that calls it.
#[inline(always)]
pub(super) fn access(
    env: &mut Env,
    core: &mut Core,
    warp: &mut Warp,
    rows: &Rows,
    i: &Instr,
    pc: usize,
    mask: u32,
) -> Result<()> {
    match i.op {
        Op::CpAsync => return copy(env, core, warp, rows, i, pc, mask),
        Op::Prefetch => return prefetch(env, rows, i, pc, mask),
        Op::Atomic => return atomic(env, core, warp, rows, i, pc, mask),
        Op::Ldmatrix => return ldmatrix(env, core, warp, rows, i, pc),
        _ => {}
    }
    let all = addresses(rows, i);
    let bytes = i.ty.bytes() * u32::from(i.n);
    let store = i.op == Op::St;
    let kind = if store { Access::Write } else { Access::Read };
    if i.space == Space::Shared {
        env.counts.shared(pc, &all, mask, bytes);
    } else if matches!(i.space, Space::Global | Space::Generic | Space::Const) {
        env.counts.global(pc, &all, mask, bytes);
    }
    let mut to = [std::ptr::null_mut::<u32>(); 4];
    for (at, row) in env.kernel.lists[i.d as usize..i.d as usize + i.n as usize].iter().enumerate() {
        // SAFETY: the operand is the instruction's.
        to[at] = unsafe { rows.get::<u32>(*row).cast_mut().cast() };
    }
    if !store
        && i.space == Space::Param
        && lanes(mask).all(|lane| all[lane] == all[mask.trailing_zeros() as usize])
    {
        return load_parameter(env, rows, i, all[mask.trailing_zeros() as usize], mask);
    }
    let mut mask = mask;
    if i.op == Op::Ld
        && i.has(flag::TRACKED)
        && let Some(row) = env.kernel.accesses[pc].iter().find(|a| a.write && a.early)
    {
        // The load may come before its condition: a value that was never written stays so.
        let unwritten =
            |lane: &usize| i.space == Space::Shared && core.shared.is_unwritten(all[*lane], bytes);
        let missing = lanes(mask).filter(unwritten).fold(0, |all, lane| all | 1 << lane);
        warp.written[row.row as usize] &= !missing;
        mask &= !missing;
    }
    for run in runs(&all, mask, bytes) {
        let (space, address) = resolve(i.space, run.address);
        let run = Run { address, ..run };
        let from: *mut u8 = match space {
            Space::Shared => shared_run(core, run, kind, warp.index, pc)?,
            Space::Global if run.address < DEVICE_MEMORY => {
                let from = global_run(env, core, warp, run, kind, i.flags, pc)?;
                if store {
                    store_on_host(env, core, warp, i, run, from, &to, pc);
                    continue;
                }
                // The block sees its own stores.
                core.host.publish(env.options.schedule);
                from
            }
            Space::Global => global_run(env, core, warp, run, kind, i.flags, pc)?,
            _ => {
                for lane in lanes(lanes_of(run)) {
                    let address = resolve(i.space, all[lane]).1;
                    let at = match space {
                        Space::Param => parameter(env, address, bytes)?,
                        _ => local(env, warp, lane, address, bytes, store)?,
                    };
                    // SAFETY: the checks above cover `bytes` bytes.
                    unsafe { if store { put(i, at, &to, lane) } else { get(i, at, &to, lane) } };
                }
                continue;
            }
        };
        // SAFETY: the checks above cover the bytes of the run.
        unsafe {
            if store {
                for n in 0..run.lanes as usize {
                    put(i, from.add(n * bytes as usize), &to, run.lane + n);
                }
            } else if i.ty.bytes() == 4 && !i.has(flag::WIDE) {
                // The common case, one register after the other.
                for (at, row) in to[..i.n as usize].iter().enumerate() {
                    for n in 0..run.lanes as usize {
                        let word = from.cast::<u32>().add(n * i.n as usize + at).read_unaligned();
                        row.add(run.lane + n).write(word);
                    }
                }
            } else {
                for n in 0..run.lanes as usize {
                    get(i, from.add(n * bytes as usize), &to, run.lane + n);
                }
            }
        }
    }
    env.counts.changed |= store;
    if i.has(flag::STRONG) {
        for lane in lanes(mask).filter(|lane| resolve(i.space, all[*lane]).0 == Space::Global) {
            env.global.atomic(all[lane], i.flags, env.launch_index, core, warp.index);
        }
    }
    Ok(())
}

/// Loads a parameter: the same for all lanes.
fn load_parameter(env: &Env, rows: &Rows, i: &Instr, address: u64, mask: u32) -> Result<()> {
    let from = parameter(env, address, i.ty.bytes() * u32::from(i.n))?;
    for n in 0..i.n as usize {
        let (mut value, part) = ([0u64; 1], Instr { n: 1, ..*i });
        // SAFETY: `parameter` has checked the bytes; the row is the instruction's, of the width that `get` writes.
        unsafe {
            let row = env.kernel.lists[i.d as usize + n];
            get(&part, from.add(n * i.ty.bytes() as usize), &[value.as_mut_ptr().cast(); 4], 0);
            if i.ty.bytes() == 8 || i.has(flag::WIDE) {
                rows.put(mask, row, &[value[0]; LANES]);
            } else {
                rows.put(mask, row, &[value[0] as u32; LANES]);
            }
        }
    }
    Ok(())
}

/// Stores to page-locked memory, which the host may see at any time if they are plain.
#[inline(never)]
#[allow(clippy::too_many_arguments, reason = "what an instruction sees")]
fn store_on_host(
    env: &Env,
    core: &mut Core,
    warp: &Warp,
    i: &Instr,
    run: Run,
    to: *mut u8,
    from: &[*mut u32; 4],
    pc: usize,
) {
    let allocation = env.ranges[pc % RANGES].start;
    let (schedule, bytes) = (env.options.schedule, run.bytes as usize);
    if i.has(flag::STRONG) {
        let release = i.has(flag::RELEASE) && i.has(flag::SYSTEM);
        if release {
            core.host.publish(schedule);
            // Orders what was stored so far before the store.
            std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        }
        for n in 0..run.lanes as usize {
            // SAFETY: the caller has checked the run.
            unsafe { put(i, to.add(n * bytes), from, run.lane + n) };
        }
        if release {
            core.host.release(allocation, schedule);
        }
        return;
    }
    for n in 0..run.lanes as usize {
        let mut value = [0u8; 16];
        // SAFETY: a store has at most 16 bytes; the rows are the instruction's, and the caller has checked the run.
        let to = unsafe {
            put(i, value.as_mut_ptr(), from, run.lane + n);
            to.add(n * bytes)
        };
        core.host.store(to, &value[..bytes], allocation, Who { warp: warp.index, lane: run.lane + n, pc });
    }
}

/// The mask of a run's lanes.
fn lanes_of(run: Run) -> u32 {
    (((1u64 << run.lanes) - 1) as u32) << run.lane
}

/// Checks and records the accesses of a run to shared memory. Returns the first byte.
#[inline(always)]
fn shared_run(core: &mut Core, run: Run, access: Access, warp: usize, pc: usize) -> Result<*mut u8> {
    let end = Run { address: run.address + u64::from(run.total() - run.bytes), ..run };
    let inside = core.shared.check(run.address, run.bytes).is_ok()
        && core.shared.check(end.address, run.bytes).is_ok();
    if !inside || !core.shared.touch_run(run, access, warp, pc) {
        each_in_shared(core, run, access, warp, pc)?;
    }
    Ok(core.shared.data(run.address as u32))
}

/// The accesses of a run to shared memory one after the other.
#[inline(never)]
fn each_in_shared(core: &mut Core, run: Run, access: Access, warp: usize, pc: usize) -> Result<()> {
    for n in 0..run.lanes {
        let who = Who { warp, lane: run.lane + n as usize, pc };
        let address = run.address + u64::from(n * run.bytes);
        core.shared.access(address, run.bytes, access, who).map_err(|t| t.lane(who.lane))?;
    }
    Ok(())
}

/// Checks and records the accesses of a run to global memory. Returns the first byte.
#[inline(always)]
fn global_run(
    env: &mut Env,
    core: &mut Core,
    warp: &Warp,
    run: Run,
    access: Access,
    flags: u16,
    pc: usize,
) -> Result<*mut u8> {
    let held = env.ranges[pc % RANGES];
    let offset = run.address.wrapping_sub(held.start);
    let aligned = run.address & u64::from(run.bytes - 1) == 0;
    let range = if aligned && offset < held.bytes && held.bytes - offset >= u64::from(run.total()) {
        held
    } else {
        // Of several lanes the first that is outside is reported.
        let mut range = held;
        for n in 0..run.lanes {
            let at = run.address.wrapping_add(u64::from(n * run.bytes));
            range = global(env, at, run.bytes, pc).map_err(|t| t.lane(run.lane + n as usize))?;
        }
        range
    };
    let offset = (run.address - range.start) as usize;
    // A loop that waits for the host does not hang.
    env.counts.changed |= range.start < DEVICE_MEMORY;
    // SAFETY: the range has been checked.
    unsafe {
        let (shadow, total) = (range.initialised.add(offset), run.total() as usize);
        if access == Access::Write {
            shadow.write_bytes(1, total);
        } else if !(0..total).fold(true, |all, at| all & (shadow.add(at).read() == 1)) {
            let missing = (0..total).find(|at| shadow.add(*at).read() != 1).unwrap_or(0) as u32 / run.bytes;
            let lane = run.lane + missing as usize;
            return Err(unwritten(env, run.address + u64::from(missing * run.bytes), run.bytes).lane(lane));
        }
    }
    if env.options.checks.races {
        let index = env.launch_index;
        if !env.global.touch_run(run, access, flags, index, core, warp.index, pc, warp.waited) {
            each_in_global(env, core, warp, run, access, flags, pc)?;
        }
    }
    // SAFETY: as above.
    Ok(unsafe { range.data.add(offset) })
}

/// The accesses of a run to global memory one after the other.
#[inline(never)]
fn each_in_global(
    env: &mut Env,
    core: &mut Core,
    warp: &Warp,
    run: Run,
    access: Access,
    flags: u16,
    pc: usize,
) -> Result<()> {
    for n in 0..run.lanes {
        let who = Who { warp: warp.index, lane: run.lane + n as usize, pc };
        let at = run.address + u64::from(n * run.bytes);
        env.global
            .touch(at, run.bytes, access, flags, env.launch_index, core, who, warp.waited)
            .map_err(|t| t.lane(who.lane).at(at))?;
    }
    Ok(())
}

/// Reads the registers of one lane from memory.
///
/// # Safety
/// The bytes of the access are readable, and the rows are the instruction's.
#[inline(always)]
unsafe fn get(i: &Instr, at: *const u8, to: &[*mut u32; 4], lane: usize) {
    // SAFETY: the caller vouches for the pointers.
    unsafe {
        for (n, row) in to[..i.n as usize].iter().enumerate() {
            let bits: u64 = match i.ty {
                Ty::B32 | Ty::U32 | Ty::F32 => u64::from(at.cast::<u32>().add(n).read_unaligned()),
                Ty::S32 => i64::from(at.cast::<i32>().add(n).read_unaligned()) as u64,
                Ty::B64 | Ty::U64 | Ty::S64 | Ty::F64 => at.cast::<u64>().add(n).read_unaligned(),
                Ty::S16 => i64::from(at.cast::<i16>().add(n).read_unaligned()) as u64,
                Ty::S8 => i64::from(at.cast::<i8>().add(n).read()) as u64,
                Ty::B8 | Ty::U8 => u64::from(at.add(n).read()),
                _ => u64::from(at.cast::<u16>().add(n).read_unaligned()),
            };
            if i.ty.bytes() == 8 || i.has(flag::WIDE) {
                row.cast::<u64>().add(lane).write(bits);
            } else {
                row.add(lane).write(bits as u32);
            }
        }
    }
}

/// Writes the registers of one lane to memory.
///
/// # Safety
/// The bytes of the access are writable, and the rows are the instruction's.
#[inline(always)]
unsafe fn put(i: &Instr, at: *mut u8, from: &[*mut u32; 4], lane: usize) {
    // SAFETY: the caller vouches for the pointers.
    unsafe {
        for (n, row) in from[..i.n as usize].iter().enumerate() {
            let bits = if i.ty.bytes() == 8 || i.has(flag::WIDE) {
                row.cast::<u64>().add(lane).read()
            } else {
                u64::from(row.add(lane).read())
            };
            match i.ty.bytes() {
                // Volatile: the host may wait for the bytes of page-locked memory.
                4 => at.cast::<u32>().add(n).write_volatile(bits as u32),
                8 => at.cast::<u64>().add(n).write_volatile(bits),
                2 => at.cast::<u16>().add(n).write_volatile(bits as u16),
                _ => at.add(n).write_volatile(bits as u8),
            }
        }
    }
}

/// The allocation of an access to global memory, after the checks of bounds and alignment.
#[inline(always)]
fn global(env: &mut Env, address: u64, bytes: u32, pc: usize) -> Result<Range> {
    if address & u64::from(bytes - 1) != 0 {
        return Err(Trouble::new(format!("a misaligned access: {bytes} bytes at {address:#x}"))
            .cause(Cause::Misaligned)
            .at(address)
            .note(format!("the address is {}", env.snapshot.describe(address))));
    }
    let range = env.ranges[pc % RANGES];
    let offset = address.wrapping_sub(range.start);
    if offset < range.bytes && range.bytes - offset >= u64::from(bytes) {
        return Ok(range);
    }
    let Some(found) = env.snapshot.find(address, u64::from(bytes)) else {
        return Err(Trouble::new(format!("{bytes} bytes at {address:#x} are out of bounds"))
            .cause(Cause::OutOfBounds)
            .at(address)
            .note(format!("the address is {}", env.snapshot.describe(address))));
    };
    let range = Range {
        start: found.start,
        bytes: found.bytes as u64,
        data: found.data(),
        initialised: found.initialised(),
    };
    env.ranges[pc % RANGES] = range;
    Ok(range)
}

/// Checks a prefetch into L2, which changes nothing: all of it must be in one allocation.
fn prefetch(env: &mut Env, rows: &Rows, i: &Instr, pc: usize, mask: u32) -> Result<()> {
    let from = addresses(rows, i);
    // SAFETY: the operand is the instruction's.
    let sizes = unsafe { *rows.get::<u32>(i.b) };
    for lane in lanes(mask) {
        let (first, size) = (from[lane], sizes[lane]);
        if size % 16 != 0 {
            return Err(Trouble::new(format!("a prefetch of {size} bytes, not a multiple of 16")).lane(lane));
        }
        for address in (first..first + u64::from(size)).step_by(16) {
            global(env, address, 16, pc).map_err(|t| t.lane(lane).at(address))?;
        }
    }
    Ok(())
}

/// Whether all bytes of a shadow are set.
///
/// # Safety
/// `shadow` is valid for reads of `bytes` bytes.
#[inline(always)]
unsafe fn written(shadow: *const u8, bytes: u32) -> bool {
    // SAFETY: the caller vouches for the bytes.
    unsafe {
        match bytes {
            1 => shadow.read() == 1,
            2 => shadow.cast::<u16>().read_unaligned() == 0x0101,
            4 => shadow.cast::<u32>().read_unaligned() == 0x0101_0101,
            8 => shadow.cast::<u64>().read_unaligned() == 0x0101_0101_0101_0101,
            _ => (0..bytes as usize / 8)
                .all(|at| shadow.cast::<u64>().add(at).read_unaligned() == 0x0101_0101_0101_0101),
        }
    }
}

#[cold]
fn unwritten(env: &Env, address: u64, bytes: u32) -> Box<Trouble> {
    Trouble::new(format!("a read of {bytes} bytes at {address:#x} that were never all written"))
        .at(address)
        .note(format!("the address is {}", env.snapshot.describe(address)))
}

fn parameter(env: &Env, address: u64, bytes: u32) -> Result<*mut u8> {
    let params = &env.launch.params;
    if address + u64::from(bytes) > params.len() as u64 || !address.is_multiple_of(u64::from(bytes)) {
        return Err(Trouble::new(format!(
            "{bytes} bytes at offset {address} of {} parameter bytes",
            params.len()
        )));
    }
    Ok(params[address as usize..].as_ptr().cast_mut())
}

fn local(env: &Env, warp: &mut Warp, lane: usize, address: u64, bytes: u32, store: bool) -> Result<*mut u8> {
    let size = env.kernel.local as usize;
    let (start, length) = (address as usize, bytes as usize);
    if address + u64::from(bytes) > size as u64 || !start.is_multiple_of(length) {
        return Err(
            Trouble::new(format!("{bytes} bytes at {address:#x} of {size} bytes of local memory")).lane(lane)
        );
    }
    let at = lane * size + start;
    let shadow = &mut warp.local_written[at..at + length];
    if store {
        shadow.fill(true);
    } else if shadow.contains(&false) {
        return Err(
            Trouble::new(format!("a read of local memory at {address:#x} that was never written")).lane(lane)
        );
    }
    Ok(warp.local[at..].as_mut_ptr())
}

// ---- atomics ----

#[allow(clippy::too_many_arguments, reason = "what an instruction sees")]
fn atomic(
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
                let range = global(env, address, bytes, pc).map_err(|t| t.lane(lane))?;
                let offset = (address - range.start) as usize;
                // SAFETY: `global` has checked the range.
                if !unsafe { written(range.initialised.add(offset), bytes) } {
                    return Err(unwritten(env, address, bytes).lane(lane));
                }
                if env.options.checks.races {
                    env.global
                        .touch(
                            address,
                            bytes,
                            Access::Atomic,
                            i.flags,
                            env.launch_index,
                            core,
                            who,
                            warp.waited,
                        )
                        .map_err(|t| t.lane(lane).at(address))?;
                }
                // SAFETY: as above.
                unsafe { range.data.add(offset) }
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
            u64::from(super::math::canonical(sum).to_bits())
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

// ---- asynchronous copies ----

fn copy(
    env: &mut Env,
    core: &mut Core,
    warp: &mut Warp,
    rows: &Rows,
    i: &Instr,
    pc: usize,
    mask: u32,
) -> Result<()> {
    let to = addresses(rows, i);
    let bytes = u32::from(i.n);
    // SAFETY: the operands are the instruction's.
    let (from, reads) = unsafe { (*rows.get::<u64>(i.c), *rows.get::<u32>(i.b)) };
    let from = from.map(|x| x.wrapping_add(i64::from(i.e as i32) as u64));
    env.counts.shared(pc, &to, mask, bytes);
    let reading = lanes(mask).filter(|lane| reads[*lane] > 0).fold(0, |all, lane| all | 1 << lane);
    env.counts.global(pc, &from, reading, bytes);
    let whole = lanes(mask).filter(|lane| reads[*lane] == bytes).fold(0, |all, lane| all | 1 << lane);
    let mut sources = [std::ptr::null::<u8>(); LANES];
    for run in runs(&from, whole, bytes) {
        let first = global_run(env, core, warp, run, Access::Read, 0, pc)?;
        for n in 0..run.lanes as usize {
            // SAFETY: `global_run` has checked the run.
            sources[run.lane + n] = unsafe { first.add(n * bytes as usize) };
        }
    }
    for lane in lanes(reading & !whole) {
        let read = reads[lane];
        if read > bytes {
            return Err(Trouble::new(format!("a copy of {read} bytes to {bytes}")).lane(lane));
        }
        let range = global(env, from[lane], bytes, pc).map_err(|t| t.lane(lane))?;
        let offset = (from[lane] - range.start) as usize;
        // SAFETY: `global` has checked the range.
        unsafe {
            if !(0..read as usize).all(|at| range.initialised.add(offset + at).read() == 1) {
                return Err(unwritten(env, from[lane], read).lane(lane));
            }
            sources[lane] = range.data.add(offset).cast_const();
        }
        if env.options.checks.races {
            let run = Run { address: from[lane], lane, lanes: 1, bytes };
            each_in_global(env, core, warp, run, Access::Read, 0, pc)?;
        }
    }
    for run in runs(&to, mask, bytes) {
        shared_run(core, run, Access::Async, warp.index, pc)?;
    }
    for lane in lanes(mask) {
        let entry = Copy {
            pc: pc as u32,
            lane: lane as u8,
            bytes: i.n,
            read: reads[lane] as u8,
            to: to[lane] as u32,
            from: sources[lane],
            group: warp.groups[lane],
        };
        // The source may be read at any time before the wait: half of the schedules read it now.
        if env.options.schedule.is_multiple_of(2) {
            perform(core, entry);
            warp.copies.push(Copy { from: std::ptr::null(), read: u8::MAX, ..entry });
        } else {
            warp.copies.push(entry);
        }
    }
    Ok(())
}

/// Copies the bytes.
fn perform(core: &mut Core, copy: Copy) {
    let to = core.shared.data(copy.to);
    // SAFETY: both ends were checked when the copy started.
    unsafe {
        to.write_bytes(0, copy.bytes as usize);
        if copy.read > 0 {
            to.copy_from_nonoverlapping(copy.from, copy.read as usize);
        }
    }
}

/// Ends the lanes' copies of all but the newest `keep` groups, or of all if it is [`NONE`].
pub(super) fn wait_for_copies(core: &mut Core, warp: &mut Warp, mask: u32, keep: u32) {
    let Warp { copies, groups, index, .. } = warp;
    copies.retain(|copy| {
        let lane = copy.lane as usize;
        let done = mask >> lane & 1 == 1 && (keep == NONE || copy.group + keep < groups[lane]);
        if done {
            if copy.read != u8::MAX {
                perform(core, *copy);
            }
            let who = Who { warp: *index, lane, pc: copy.pc as usize };
            core.shared.finish_copy(copy.to, u32::from(copy.bytes), who);
        }
        !done
    });
}

// ---- ldmatrix ----

/// Loads `n` matrices of 8 rows of 16 bytes; lane 8 m + r has the address of row r of matrix m.
#[inline(always)]
fn ldmatrix(
    env: &mut Env,
    core: &mut Core,
    warp: &mut Warp,
    rows: &Rows,
    i: &Instr,
    pc: usize,
) -> Result<()> {
    let all = addresses(rows, i);
    let lists = &env.kernel.lists[i.d as usize..i.d as usize + i.n as usize];
    env.counts.shared(pc, &all, u32::MAX >> (32 - u32::from(i.n) * 8), 16);
    let mut elements = [[0u16; 8]; LANES];
    for run in runs(&all, u32::MAX >> (32 - u32::from(i.n) * 8), 16) {
        let from = shared_run(core, run, Access::Read, warp.index, pc)?;
        for n in 0..run.lanes as usize {
            // SAFETY: `shared_run` has checked the run.
            elements[run.lane + n] = unsafe { from.cast::<[u16; 8]>().add(n).read_unaligned() };
        }
    }
    for (elements, to) in elements.chunks_exact(8).zip(lists) {
        let mut out = [0u32; LANES];
        for (lane, out) in out.iter_mut().enumerate() {
            let (g, t) = (lane / 4, lane % 4 * 2);
            let (low, high) = if i.has(flag::TRANS) {
                (elements[t][g], elements[t + 1][g])
            } else {
                (elements[g][t], elements[g][t + 1])
            };
            *out = u32::from(low) | u32::from(high) << 16;
        }
        // SAFETY: the operand is the instruction's.
        unsafe { *rows.at::<u32>(*to) = out };
    }
    Ok(())
}
