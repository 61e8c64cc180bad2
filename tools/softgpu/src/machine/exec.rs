//! Runs a warp: the loop over instructions, and control flow between lanes.
//!
//! The loop exists once for each instruction set of the host, so that its loops over 32 lanes use the widest vectors.

use super::block::{Core, Env};
use super::fault::Trouble;
use super::lanes::{ALL, LANES, Rows, lanes, narrow, vectorized};
use super::math;
use super::shared::Who;
use super::warp::{State, Warp};
use super::{access, tensor, values};
use crate::ptx::program::{ALWAYS, Atom, Constant, Instr, NONE, Op, Special, Ty, flag};

pub(super) type Result<T> = std::result::Result<T, Box<Trouble>>;

vectorized! {
/// Runs a warp until it waits, ends or has used up `budget` instructions.
///
/// # Errors
/// [`Trouble`]; `warp.at` is the instruction.
pub(super) fn run(env: &mut Env, core: &mut Core, warp: &mut Warp, budget: &mut u64) -> Result<()> {
    // SAFETY: the kernel was decoded with its registers in range.
    unsafe { interpret(env, core, warp, budget) }
}
}

/// # Safety
/// The registers and constants are those of the kernel.
#[inline(always)]
unsafe fn interpret(env: &mut Env, core: &mut Core, warp: &mut Warp, budget: &mut u64) -> Result<()> {
    let kernel = env.kernel;
    let (code, executed) = (kernel.code.as_ptr(), env.counts.executed.as_mut_ptr());
    let rows =
        Rows { registers: warp.registers.as_mut_ptr().cast(), constants: env.constants.as_ptr().cast() };
    loop {
        // Of the lanes that can run, those at the lowest instruction go on until they branch apart or meet others.
        let ready = warp.alive & !warp.waiting;
        if ready == 0 {
            stuck(env, warp)?;
            continue;
        }
        let Some(start) = warp.lowest(warp.favour, ready).or_else(|| warp.lowest(0, ready)) else {
            return Ok(());
        };
        let mut set = warp.lanes_at(start, ready);
        let mut limit = warp.lowest(start + 1, ready & !set).unwrap_or(u32::MAX);
        let mut pc = start as usize;
        loop {
            if *budget == 0 {
                warp.go(set, pc as u32);
                // The others come first next time.
                warp.favour = if warp.favour == 0 && limit != u32::MAX { limit } else { 0 };
                return Ok(());
            }
            *budget -= 1;
            // SAFETY: branches have targets in the code, and control does not pass its last instruction. There is a count for
            // each instruction.
            let i = unsafe {
                *executed.add(pc) += 1;
                &*code.add(pc)
            };
            let mask =
                if i.guard == ALWAYS { set } else { set & predicate(&warp.predicates, u32::from(i.guard)) };
            if mask == 0 {
                pc += 1;
                if pc as u32 >= limit {
                    break;
                }
                continue;
            }
            if i.flags & flag::TRACKED != 0 {
                warp.at = pc;
                check_registers(env, warp, i, pc, mask)?;
            }
            match i.op {
                Op::Bra => {
                    if mask == set {
                        pc = i.x as usize;
                        // Meets others: they go on together.
                        if pc as u32 >= limit {
                            break;
                        }
                        continue;
                    }
                    env.counts.divergent += 1;
                    warp.go(mask, i.x);
                    warp.go(set & !mask, pc as u32 + 1);
                    set = 0;
                    break;
                }
                Op::Ret => {
                    warp.alive &= !mask;
                    warp.go(set & !mask, pc as u32 + 1);
                    set = 0;
                    if warp.alive == 0 {
                        warp.state = State::Done;
                        return Ok(());
                    }
                    break;
                }
                Op::Trap => {
                    warp.at = pc;
                    let lane = mask.trailing_zeros() as usize;
                    return Err(Trouble::new("the kernel executed trap").lane(lane));
                }
                Op::Shfl
                | Op::Vote
                | Op::Redux
                | Op::BarWarp
                | Op::Bar
                | Op::Mma
                | Op::Ldmatrix
                | Op::WgmmaFence
                | Op::WgmmaCommit
                | Op::WgmmaWait
                | Op::Wgmma => {
                    warp.at = pc;
                    if mask == ALL && warp.alive == ALL && i.op != Op::Bar && for_all_lanes(&rows, i) {
                        // SAFETY: the operands are this instruction's.
                        unsafe { together(env, core, warp, &rows, i, pc, ALL)? };
                        pc += 1;
                        continue;
                    }
                    // Lanes whose guard is false do not take part.
                    warp.go(set & !mask, pc as u32 + 1);
                    warp.go(mask, pc as u32);
                    let present = gather(&kernel.code, &rows, warp, i, pc, mask)?;
                    set = 0;
                    if present == 0 {
                        // Counted when the others arrive.
                        env.counts.executed[pc] -= 1;
                        break;
                    }
                    if i.op == Op::Bar {
                        return arrive(&rows, warp, i, present);
                    }
                    // SAFETY: the operands are this instruction's.
                    unsafe { together(env, core, warp, &rows, i, pc, present)? };
                    for lane in 0..LANES {
                        warp.pcs[lane] += present >> lane & 1;
                    }
                    warp.waiting &= !present;
                    // The common case: all lanes go on together.
                    if present == warp.alive && warp.lanes_at(pc as u32 + 1, present) == present {
                        set = present;
                        limit = u32::MAX;
                        pc += 1;
                        continue;
                    }
                    break;
                }
                Op::Ld | Op::St | Op::Atomic | Op::CpAsync | Op::Prefetch => {
                    warp.at = pc;
                    access::access(env, core, warp, &rows, i, pc, mask)?;
                }
                Op::CpAsyncCommit => {
                    for lane in lanes(mask) {
                        warp.groups[lane] += 1;
                    }
                }
                Op::CpAsyncWait => access::wait_for_copies(core, warp, mask, i.x),
                Op::Fence => {
                    env.global.fence(env.launch_index, core, warp.index, i.has(flag::DEVICE));
                    if i.has(flag::SYSTEM) {
                        let (shared, warp, pc) = (&core.shared, warp.index, pc);
                        let ordered = |by, time| {
                            lanes(mask).any(|lane| shared.orders(time, by, Who { warp, lane, pc }))
                        };
                        core.host.fence(env.options.schedule, ordered);
                    }
                }
                Op::FenceProxy => core.shared.fence_proxy(warp.index),
                Op::DependentsLaunch => warp.launched |= mask,
                Op::DependentsWait => {
                    if !env.predecessors_done {
                        // Counted when it returns.
                        env.counts.executed[pc] -= 1;
                        warp.go(set & !mask, pc as u32 + 1);
                        warp.go(mask, pc as u32);
                        warp.state = State::Dependents;
                        return Ok(());
                    }
                    warp.waited = true;
                }
                Op::Special => special(env, core, warp, &rows, i, mask),
                Op::Activemask => {
                    // SAFETY: the operand is this instruction's.
                    unsafe { rows.put(mask, i.d, &[mask; LANES]) };
                }
                _ => {
                    // SAFETY: the operands are this instruction's.
                    unsafe {
                        values::execute(env.options.perturb, &rows, &mut warp.predicates, kernel, i, mask)
                    }
                }
            }
            pc += 1;
            if pc as u32 >= limit {
                break;
            }
        }
        warp.go(set, pc as u32);
    }
}

/// The mask of a predicate operand.
#[inline(always)]
pub(super) fn predicate(predicates: &[u32], operand: u32) -> u32 {
    predicates[(operand >> 1) as usize] ^ 0u32.wrapping_sub(operand & 1)
}

/// Sets a predicate in the lanes of `mask`.
#[inline(always)]
pub(super) fn set_predicate(predicates: &mut [u32], index: u32, mask: u32, value: u32) {
    if index != NONE {
        let to = &mut predicates[index as usize];
        *to = *to & !mask | value & mask;
    }
}

/// The slow check of instructions whose registers may be unwritten, or in use by a product in flight.
#[inline(never)]
fn check_registers(env: &Env, warp: &mut Warp, i: &Instr, pc: usize, mask: u32) -> Result<()> {
    let accesses = &env.kernel.accesses[pc];
    let adds = i.op == Op::Wgmma && predicate(&warp.predicates, i.c) != 0;
    let chosen = if i.op == Op::Selp { predicate(&warp.predicates, i.c) } else { 0 };
    let mut defined = mask;
    for access in accesses.iter().filter(|a| a.early && (!a.write || adds)) {
        let missing = mask & !warp.written[access.row as usize];
        // Copies of a value that was never written are harmless until it is used, and so is a value that is not selected.
        let used = match i.op {
            Op::Mov => 0,
            Op::Selp if access.row == i.a && access.row == i.b => missing,
            Op::Selp => missing & if access.row == i.a { chosen } else { !chosen },
            _ => missing,
        };
        if used != 0 {
            let lane = used.trailing_zeros() as usize;
            return Err(Trouble::new("a register is read that was never written").lane(lane));
        }
        if i.op == Op::Mov {
            defined &= !missing;
        }
    }
    for access in accesses.iter().filter(|a| a.early && a.write) {
        let to = &mut warp.written[access.row as usize];
        *to = *to & !mask | defined;
    }
    if env.kernel.uses_wgmma && i.op != Op::Wgmma {
        warp.products.check(accesses)?;
    }
    Ok(())
}

/// The operand that holds the mask of a `.sync` instruction, or [`NONE`] if it is for the whole warp.
#[inline(always)]
fn members_operand(i: &Instr) -> u32 {
    match i.op {
        Op::Shfl => i.x,
        Op::Vote | Op::Redux => i.b,
        Op::BarWarp => i.a,
        _ => NONE,
    }
}

/// Whether all lanes name all lanes as members: the common case.
#[inline(always)]
fn for_all_lanes(rows: &Rows, i: &Instr) -> bool {
    let operand = members_operand(i);
    // SAFETY: the operand is this instruction's.
    operand == NONE || unsafe { *rows.get::<u32>(operand) } == [ALL; LANES]
}

/// The lanes that execute a `.sync` instruction now, or 0 if some are missing: then those at hand wait.
fn gather(code: &[Instr], rows: &Rows, warp: &mut Warp, i: &Instr, pc: usize, mask: u32) -> Result<u32> {
    let operand = members_operand(i);
    let first = mask.trailing_zeros() as usize;
    let lowest = warp.alive.trailing_zeros() as usize;
    if operand == NONE {
        // `.aligned`: the whole warp.
        let present = mask | warp.lanes_at(pc as u32, warp.waiting);
        if present != warp.alive {
            warp.waiting |= mask;
            return Ok(0);
        }
        if i.op != Op::Bar && present != ALL {
            let lane = (!present).trailing_zeros();
            return Err(Trouble::new(format!(
                "{:?} without lane {lane}, which has returned or does not exist",
                i.op
            ))
            .lane(lowest));
        }
        return Ok(present);
    }
    // SAFETY: the operand is this instruction's.
    let members = unsafe { *rows.get::<u32>(operand) };
    for lane in lanes(mask) {
        if members[lane] >> lane & 1 == 0 {
            return Err(
                Trouble::new(format!("the lane is not in its own mask {:#010x}", members[lane])).lane(lane)
            );
        }
        if members[lane] != members[first] {
            return Err(Trouble::new("lanes of one instruction have different masks").lane(lane));
        }
    }
    let needed = members[first] & warp.alive;
    let waiting = if i.op == Op::BarWarp {
        // Its lanes may be at different instructions.
        let at_one = |lane: &usize| code[warp.pcs[*lane] as usize].op == Op::BarWarp;
        lanes(warp.waiting).filter(at_one).fold(0, |all, lane| all | 1 << lane)
    } else {
        warp.lanes_at(pc as u32, warp.waiting)
    };
    let present = (mask | waiting) & needed;
    if present != needed {
        warp.waiting |= mask;
        return Ok(0);
    }
    Ok(present)
}

/// No lane can go on: perhaps the lanes that others waited for have returned.
#[inline(never)]
fn stuck(env: &Env, warp: &mut Warp) -> Result<()> {
    let mut places: Vec<u32> = lanes(warp.waiting & warp.alive).map(|lane| warp.pcs[lane]).collect();
    places.sort_unstable();
    places.dedup();
    let rows =
        Rows { registers: warp.registers.as_mut_ptr().cast(), constants: env.constants.as_ptr().cast() };
    for pc in &places {
        let at = warp.lanes_at(*pc, warp.waiting);
        let i = &env.kernel.code[*pc as usize];
        warp.at = *pc as usize;
        if gather(&env.kernel.code, &rows, warp, i, *pc as usize, at)? != 0 {
            // They run again, and now find everybody there.
            warp.waiting &= !at;
            return Ok(());
        }
    }
    let mut trouble = Trouble::new("lanes of a warp wait for each other at different places")
        .lane(warp.waiting.trailing_zeros() as usize);
    for pc in places {
        let at = warp.lanes_at(pc, warp.waiting);
        trouble = trouble.note(format!("lanes {at:#010x} wait at {}", env.kernel.place(pc as usize)));
    }
    Err(trouble)
}

/// The warp arrives at a barrier of its block.
fn arrive(rows: &Rows, warp: &mut Warp, i: &Instr, present: u32) -> Result<()> {
    let first = present.trailing_zeros() as usize;
    // SAFETY: the operands are this instruction's.
    let (id, threads) = unsafe {
        let threads = if i.b == NONE { None } else { Some(rows.lane(i.b, first)) };
        (rows.lane(i.a, first), threads)
    };
    if id > 15 || threads.is_some_and(|n| n == 0 || n % 32 != 0) {
        return Err(Trouble::new(format!("barrier {id} with {threads:?} threads does not exist")).lane(first));
    }
    warp.waiting = present;
    warp.state = State::Barrier { id, threads };
    Ok(())
}

/// Executes an instruction that lanes execute together.
///
/// # Safety
/// The operands are the kernel's.
#[inline(always)]
unsafe fn together(
    env: &mut Env,
    core: &mut Core,
    warp: &mut Warp,
    rows: &Rows,
    i: &Instr,
    pc: usize,
    present: u32,
) -> Result<()> {
    // SAFETY: the caller vouches for the operands.
    unsafe {
        match i.op {
            // These three let lanes wait for each other, but order none of their accesses to memory.
            Op::Shfl => shuffle(warp, rows, i, present)?,
            Op::Vote => {
                let yes = predicate(&warp.predicates, i.a) & present;
                if i.flags & flag::MODE == 3 {
                    rows.put(present, i.d, &[yes; LANES]);
                } else {
                    let result = match i.flags & flag::MODE {
                        0 => yes == present,
                        1 => yes != 0,
                        _ => yes == 0 || yes == present,
                    };
                    set_predicate(&mut warp.predicates, i.d, present, if result { ALL } else { 0 });
                }
            }
            Op::Redux => {
                let a = *rows.get::<u32>(i.a);
                let first = a[present.trailing_zeros() as usize];
                let all = lanes(present).skip(1).fold(first, |x, lane| {
                    let y = a[lane];
                    match (i.atom, i.ty) {
                        (Atom::Add, _) => x.wrapping_add(y),
                        (Atom::Min, Ty::S32) => (x as i32).min(y as i32) as u32,
                        (Atom::Max, Ty::S32) => (x as i32).max(y as i32) as u32,
                        (Atom::Min, _) => x.min(y),
                        (Atom::Max, _) => x.max(y),
                        (Atom::And, _) => x & y,
                        (Atom::Or, _) => x | y,
                        _ => x ^ y,
                    }
                });
                rows.put(present, i.d, &[all; LANES]);
            }
            Op::BarWarp => core.shared.sync_warp(warp.index),
            Op::Mma => {
                let list = &env.kernel.lists[i.d as usize..i.d as usize + 14];
                let bits = |at: usize| &*rows.get::<u32>(list[at]);
                let floats = |at: usize| &*rows.get::<f32>(list[at]);
                let d = tensor::mma(
                    [bits(4), bits(5), bits(6), bits(7)],
                    [bits(8), bits(9)],
                    [floats(10), floats(11), floats(12), floats(13)],
                    env.options.sums,
                );
                for (at, row) in d.iter().enumerate() {
                    *rows.at::<f32>(list[at]) = *row;
                }
            }
            Op::Ldmatrix => {
                access::access(env, core, warp, rows, i, pc, ALL)?;
                // All its reads come before what any lane does next.
                core.shared.sync_warp(warp.index);
            }
            _ => tensor::wgmma(env, core, warp, rows, i, pc)?,
        }
    }
    Ok(())
}

/// # Safety
/// The operands are the kernel's.
#[inline(always)]
unsafe fn shuffle(warp: &mut Warp, rows: &Rows, i: &Instr, present: u32) -> Result<()> {
    // SAFETY: the caller vouches for the operands.
    let (a, b, c) = unsafe { (*rows.get::<u32>(i.a), *rows.get::<u32>(i.b), *rows.get::<u32>(i.c)) };
    let mode = i.flags & flag::MODE;
    let (mut values, mut sources) = ([0; LANES], [0; LANES]);
    let (mut inside, mut missing) = (0, 0);
    for lane in 0..LANES {
        let (clamp, segment) = (c[lane] & 31, c[lane] >> 8 & 31);
        let own = lane as u32;
        let highest = own & segment | clamp & !segment;
        let distance = b[lane] & 31;
        let from = match mode {
            0 => own.wrapping_sub(distance),
            1 => own + distance,
            2 => own ^ distance,
            _ => own & segment | distance & !segment,
        };
        let valid = if mode == 0 { from as i32 >= highest as i32 } else { from <= highest };
        sources[lane] = if valid { from } else { own };
        values[lane] = a[sources[lane] as usize % LANES];
        inside |= u32::from(valid) << lane;
        missing |= (present >> sources[lane] & 1 ^ 1) << lane;
    }
    if missing & present != 0 {
        let lane = (missing & present).trailing_zeros() as usize;
        let sentence = format!("a shuffle reads lane {}, which does not take part", sources[lane]);
        return Err(Trouble::new(sentence).lane(lane));
    }
    // SAFETY: the caller vouches for the operands.
    unsafe { rows.put(present, i.d, &values) };
    set_predicate(&mut warp.predicates, i.e, present, inside);
    Ok(())
}

#[inline(never)]
fn special(env: &mut Env, core: &Core, warp: &Warp, rows: &Rows, i: &Instr, mask: u32) {
    let special = env.kernel.specials[i.x as usize];
    let shape = env.launch.block;
    let value = |lane: usize| {
        let thread = (warp.index * 32 + lane) as u32;
        let bit = 1u32 << lane;
        match special {
            Special::Tid(axis) if shape[1] == 1 && shape[2] == 1 => {
                u64::from(if axis == 0 { thread } else { 0 })
            }
            Special::Tid(0) => u64::from(thread % shape[0]),
            Special::Tid(1) => u64::from(thread / shape[0] % shape[1]),
            Special::Tid(_) => u64::from(thread / shape[0] / shape[1]),
            Special::Ntid(axis) => u64::from(shape[axis as usize]),
            Special::Ctaid(axis) => u64::from(core.index[axis as usize]),
            Special::Nctaid(axis) => u64::from(env.launch.grid[axis as usize]),
            Special::LaneId => lane as u64,
            Special::WarpId => warp.index as u64,
            Special::NWarpId => u64::from(env.card.threads_per_multiprocessor / 32),
            Special::SmId => u64::from(core.linear % env.card.multiprocessors),
            Special::NSmId => u64::from(env.card.multiprocessors),
            Special::GridId => env.launch_index as u64,
            Special::LanemaskEq => u64::from(bit),
            Special::LanemaskLt => u64::from(bit - 1),
            Special::LanemaskLe => u64::from((bit - 1) | bit),
            Special::LanemaskGt => u64::from(!((bit - 1) | bit)),
            Special::LanemaskGe => u64::from(!(bit - 1)),
            // Time is the number of instructions executed, so that runs repeat.
            Special::Clock => u64::from(env.counts.total() as u32),
            Special::Clock64 | Special::GlobalTimer => env.counts.total(),
            Special::DynamicSharedSize => u64::from(env.launch.shared),
            Special::TotalSharedSize => u64::from(env.kernel.shared + env.launch.shared),
        }
    };
    let mut values = [value(0); LANES];
    let differs = matches!(
        special,
        Special::Tid(_)
            | Special::LaneId
            | Special::LanemaskEq
            | Special::LanemaskLt
            | Special::LanemaskLe
            | Special::LanemaskGt
            | Special::LanemaskGe
    );
    if differs {
        for lane in 1..LANES {
            values[lane] = value(lane);
        }
    }
    // SAFETY: the operand is this instruction's.
    unsafe {
        if i.ty.bytes() == 8 {
            rows.put(mask, i.d, &values);
        } else {
            rows.put(mask, i.d, &narrow(&values));
        }
    }
}

/// The constants of a kernel as rows.
pub(super) fn constant_rows(kernel: &crate::ptx::Kernel, params: &[u8]) -> Vec<super::warp::Line> {
    let rows: u32 = kernel.constants.iter().map(|(_, wide)| 1 + u32::from(*wide)).sum();
    let mut lines = super::warp::lines(rows + 1, 0);
    let mut at: *mut u32 = lines.as_mut_ptr().cast();
    for (value, (constant, wide)) in kernel.values.iter().zip(&kernel.constants) {
        let value = match *constant {
            Constant::Param(offset) => {
                let (mut bytes, count) = ([0; 8], if *wide { 8 } else { 4 });
                bytes[..count].copy_from_slice(&params[offset as usize..][..count]);
                u64::from_le_bytes(bytes)
            }
            _ => *value,
        };
        // SAFETY: the rows were counted above.
        unsafe {
            if *wide {
                *at.cast::<[u64; LANES]>() = [value; LANES];
                at = at.add(2 * LANES);
            } else {
                *at.cast::<[u32; LANES]>() = [value as u32; LANES];
                at = at.add(LANES);
            }
        }
    }
    lines
}

/// 2^x and friends, perturbed if the options ask for it.
#[inline(always)]
pub(super) fn approximate(perturb: bool, x: f32, result: f32, most: u32) -> f32 {
    if perturb { math::perturb(x.to_bits(), result, most) } else { result }
}
