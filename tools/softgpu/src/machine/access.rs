//! Loads, stores, atomics and asynchronous copies, with their checks: bounds, alignment, bytes that were never written,
//! races.

use super::atomic;
use super::block::{Core, Env, RANGES, Range};
use super::exec::Result;
use super::fault::{Cause, Trouble};
use super::lanes::{ALL, LANES, Rows, lanes, vectorized};
use super::shared::{Access, Who};
use super::warp::{Copy, Warp};
use crate::memory::DEVICE_MEMORY;
use crate::ptx::program::{Instr, LOCAL_WINDOW, NONE, Op, SHARED_WINDOW, Space, Ty, flag};

/// The addresses of an instruction's lanes.
#[inline(always)]
pub(super) fn addresses(rows: &Rows, i: &Instr) -> [u64; LANES] {
    let offset = i64::from(i.x as i32) as u64;
    let mut out = [0; LANES];
    // SAFETY: the operand is the instruction's, of the width that the flag says.
    unsafe {
        if i.has(flag::NARROW) {
            let base = &*rows.get::<u32>(i.a);
            for lane in 0..LANES {
                // 32-bit addresses wrap at 32 bits.
                out[lane] = u64::from(base[lane].wrapping_add(offset as u32));
            }
        } else {
            let base = &*rows.get::<u64>(i.a);
            for lane in 0..LANES {
                out[lane] = base[lane].wrapping_add(offset);
            }
        }
    }
    out
}

/// A state space and the address in it, for an address that may be generic.
#[inline(always)]
pub(super) fn resolve(space: Space, address: u64) -> (Space, u64) {
    match space {
        Space::Generic if address >= LOCAL_WINDOW => (Space::Local, address - LOCAL_WINDOW),
        Space::Generic if address >= SHARED_WINDOW => (Space::Shared, address - SHARED_WINDOW),
        Space::Generic | Space::Const => (Space::Global, address),
        other => (other, address),
    }
}

/// What the lanes of an instruction access: addresses with their state space resolved, and the first byte of each in the
/// host's memory once it is checked.
struct Lanes {
    addresses: [u64; LANES],
    data: [*mut u8; LANES],
}

vectorized! {
/// Executes a load, store, atomic operation, ldmatrix, prefetch or asynchronous copy.
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
        Op::Prefetch => return prefetch(env, rows, i, pc, mask),
        Op::Atomic => return atomic::execute(env, core, warp, rows, i, pc, mask),
        _ => {}
    }
    let mut all = Lanes { addresses: addresses(rows, i), data: [std::ptr::null_mut(); LANES] };
    let (bytes, mut mask, kind) = match i.op {
        Op::CpAsync => (u32::from(i.n), mask, Access::Async),
        Op::Ldmatrix => (16, u32::MAX >> (32 - u32::from(i.n) * 8), Access::Read),
        Op::St => (i.ty.bytes() * u32::from(i.n), mask, Access::Write),
        _ => (i.ty.bytes() * u32::from(i.n), mask, Access::Read),
    };
    if matches!(i.op, Op::CpAsync | Op::Ldmatrix) || i.space == Space::Shared {
        env.counts.shared(pc, &all.addresses, mask, bytes);
    } else if matches!(i.space, Space::Global | Space::Generic | Space::Const) {
        env.counts.global(pc, &all.addresses, mask, bytes);
    }
    let mut sources = [std::ptr::null_mut(); LANES];
    if i.op == Op::CpAsync {
        sources = copy_sources(env, core, warp, rows, i, pc, mask)?;
    }
    if i.op == Op::Ld && i.has(flag::TRACKED) {
        mask &= !skip_unwritten(env, core, warp, i, &all.addresses, bytes, pc, mask);
    }
    let (mut shared, mut global) = (mask, 0);
    if !matches!(i.op, Op::CpAsync | Op::Ldmatrix) && i.space != Space::Shared {
        (shared, global) = (0, 0);
        for lane in 0..LANES {
            let (space, address) = resolve(i.space, all.addresses[lane]);
            all.addresses[lane] = address;
            shared |= u32::from(space == Space::Shared) << lane;
            global |= u32::from(space == Space::Global) << lane;
        }
        (shared, global) = (shared & mask, global & mask);
    }
    if shared != 0 {
        core.shared.access_lanes(&all.addresses, shared, bytes, kind, warp.index, pc)?;
        let first = core.shared.data(0);
        for lane in 0..LANES {
            all.data[lane] = first.wrapping_add(all.addresses[lane] as usize);
        }
    }
    if global != 0 {
        access_global(env, core, warp, &mut all, global, bytes, kind, i.flags, pc)?;
    }
    for lane in lanes(mask & !(shared | global)) {
        let address = all.addresses[lane];
        all.data[lane] = match i.space {
            Space::Param => parameter(env, address, bytes)?,
            _ => local(env, warp, lane, address, bytes, i.op == Op::St)?,
        };
    }
    match i.op {
        Op::CpAsync => return start_copies(env, core, warp, rows, i, pc, mask, &all, &sources),
        Op::Ldmatrix => return distribute(env, rows, i, &all),
        _ => {}
    }
    let mut to = [std::ptr::null_mut::<u32>(); 4];
    for (at, row) in env.kernel.lists[i.d as usize..i.d as usize + i.n as usize].iter().enumerate() {
        // SAFETY: the operand is the instruction's.
        to[at] = unsafe { rows.get::<u32>(*row).cast_mut().cast() };
    }
    // Page-locked memory, which the host sees.
    let mut host = 0;
    for lane in 0..LANES {
        host |= u32::from(all.addresses[lane] < DEVICE_MEMORY) << lane;
    }
    let host = host & global;
    if host != 0 {
        if i.op == Op::St {
            store_on_host(env, core, warp, i, &all, host, &to, pc);
        } else {
            // The block sees its own stores.
            core.host.publish(env.options.schedule);
        }
    }
    // SAFETY: the checks above cover the bytes of the lanes, and the rows are the instruction's.
    unsafe {
        if i.op == Op::St {
            store(i, &all.data, &to, mask & !host);
        } else {
            load(i, &all.data, &to, mask);
        }
    }
    env.counts.changed |= i.op == Op::St;
    if i.has(flag::STRONG) {
        for lane in lanes(global) {
            env.global.atomic(all.addresses[lane], i.flags, env.launch_index, core, warp.index);
        }
    }
    Ok(())
}
}

/// The lanes of a load whose shared memory was never written, if the load may come before its condition: their registers
/// then count as not written either.
#[inline(never)]
#[allow(clippy::too_many_arguments, reason = "what an instruction sees")]
fn skip_unwritten(
    env: &Env,
    core: &Core,
    warp: &mut Warp,
    i: &Instr,
    addresses: &[u64; LANES],
    bytes: u32,
    pc: usize,
    mask: u32,
) -> u32 {
    let Some(row) = env.kernel.accesses[pc].iter().find(|a| a.write && a.early) else { return 0 };
    if i.space != Space::Shared {
        return 0;
    }
    let unwritten = |lane: &usize| core.shared.is_unwritten(addresses[*lane], bytes);
    let missing = lanes(mask).filter(unwritten).fold(0, |all, lane| all | 1 << lane);
    warp.written[row.row as usize] &= !missing;
    missing
}

/// Stores to page-locked memory, which the host may see at any time if they are plain.
#[inline(never)]
#[allow(clippy::too_many_arguments, reason = "what an instruction sees")]
fn store_on_host(
    env: &mut Env,
    core: &mut Core,
    warp: &Warp,
    i: &Instr,
    all: &Lanes,
    mask: u32,
    from: &[*mut u32; 4],
    pc: usize,
) {
    let schedule = env.options.schedule;
    let bytes = (i.ty.bytes() * u32::from(i.n)) as usize;
    for lane in lanes(mask) {
        let found = env.snapshot.find(all.addresses[lane], 1);
        let allocation = found.map_or(0, |allocation| allocation.start);
        let to = all.data[lane];
        let who = Who { warp: warp.index, lane, pc };
        let release = i.has(flag::STRONG) && i.has(flag::RELEASE) && i.has(flag::SYSTEM);
        if release {
            core.host.publish(schedule);
            // Orders what was stored so far before the store.
            std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        }
        if i.has(flag::STRONG) {
            // SAFETY: the caller has checked the lane.
            unsafe { put(i, to, from, lane) };
        } else {
            let mut value = [0u8; 16];
            // SAFETY: a store has at most 16 bytes; the rows are the instruction's.
            unsafe { put(i, value.as_mut_ptr(), from, lane) };
            core.host.store(to, &value[..bytes], allocation, who, core.shared.now());
        }
        if release {
            let shared = &core.shared;
            core.host.release(allocation, schedule, |by, time| shared.orders(time, by, who));
        }
    }
}

/// Checks and records accesses of lanes to global memory, and finds their bytes.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "what an access is made of")]
fn access_global(
    env: &mut Env,
    core: &mut Core,
    warp: &Warp,
    all: &mut Lanes,
    mask: u32,
    bytes: u32,
    access: Access,
    flags: u16,
    pc: usize,
) -> Result<()> {
    let range = env.ranges[pc % RANGES];
    let room = range.bytes.wrapping_sub(u64::from(bytes));
    let mut outside = u64::from(range.bytes < u64::from(bytes));
    for lane in 0..LANES {
        let (address, on) = (all.addresses[lane], mask >> lane & 1 == 1);
        let offset = address.wrapping_sub(range.start);
        let wrong = address & u64::from(bytes - 1) | u64::from(offset > room);
        outside |= if on { wrong } else { 0 };
        all.data[lane] = range.data.wrapping_add(offset as usize);
    }
    if outside != 0 {
        return access_each(env, core, warp, all, mask, bytes, access, flags, pc);
    }
    // A loop that waits for the host does not hang.
    env.counts.changed |= range.start < DEVICE_MEMORY;
    let mut shadow = [std::ptr::null_mut::<u8>(); LANES];
    for lane in 0..LANES {
        shadow[lane] = range.initialised.wrapping_add(all.addresses[lane].wrapping_sub(range.start) as usize);
    }
    if access == Access::Read {
        let mut whole = true;
        for lane in lanes(mask) {
            // SAFETY: the lanes are inside the range.
            whole &= unsafe { written(shadow[lane], bytes) };
        }
        if !whole {
            return access_each(env, core, warp, all, mask, bytes, access, flags, pc);
        }
    }
    let (launch, index) = (env.launch_index, warp.index);
    if env.options.checks.races
        && !env.global.touch_lanes(
            &all.addresses,
            mask,
            bytes,
            access,
            flags,
            launch,
            core,
            index,
            pc,
            warp.waited,
        )
    {
        return access_each(env, core, warp, all, mask, bytes, access, flags, pc);
    }
    if access == Access::Write {
        for lane in lanes(mask) {
            // SAFETY: the lanes are inside the range.
            unsafe { mark_written(shadow[lane], bytes) };
        }
    }
    Ok(())
}

/// The accesses of lanes to global memory one after the other.
#[inline(never)]
#[allow(clippy::too_many_arguments, reason = "what an access is made of")]
fn access_each(
    env: &mut Env,
    core: &mut Core,
    warp: &Warp,
    all: &mut Lanes,
    mask: u32,
    bytes: u32,
    access: Access,
    flags: u16,
    pc: usize,
) -> Result<()> {
    for lane in lanes(mask) {
        let address = all.addresses[lane];
        all.data[lane] = access_one(env, core, address, bytes, bytes, access, flags, warp, lane, pc)
            .map_err(|t| t.lane(lane))?;
    }
    Ok(())
}

/// Checks and records a lane's access to `used` of `bytes` bytes of global memory. Returns the first byte.
#[allow(clippy::too_many_arguments, reason = "what an access is made of")]
pub(super) fn access_one(
    env: &mut Env,
    core: &mut Core,
    address: u64,
    bytes: u32,
    used: u32,
    access: Access,
    flags: u16,
    warp: &Warp,
    lane: usize,
    pc: usize,
) -> Result<*mut u8> {
    let range = global(env, address, bytes, pc)?;
    env.counts.changed |= range.start < DEVICE_MEMORY;
    let offset = (address - range.start) as usize;
    // SAFETY: `global` has checked the range.
    unsafe {
        let shadow = range.initialised.add(offset);
        if access == Access::Write {
            shadow.write_bytes(1, bytes as usize);
        } else if !(0..used as usize).all(|at| shadow.add(at).read() == 1) {
            return Err(unwritten(env, address, used));
        }
    }
    if env.options.checks.races {
        let who = Who { warp: warp.index, lane, pc };
        env.global
            .touch(address, bytes, access, flags, env.launch_index, core, who, warp.waited)
            .map_err(|t| t.at(address))?;
    }
    // SAFETY: as above.
    Ok(unsafe { range.data.add(offset) })
}

/// Reads registers of lanes from memory.
///
/// # Safety
/// The bytes of the lanes are readable, and the rows are the instruction's.
#[inline(always)]
unsafe fn load(i: &Instr, data: &[*mut u8; LANES], to: &[*mut u32; 4], mask: u32) {
    // SAFETY: the caller vouches for the pointers.
    unsafe {
        if i.ty.bytes() != 4 || i.has(flag::WIDE) {
            for lane in lanes(mask) {
                get(i, data[lane], to, lane);
            }
        } else if mask == ALL {
            // The common case, one register after the other.
            for (at, row) in to[..i.n as usize].iter().enumerate() {
                for lane in 0..LANES {
                    row.add(lane).write(data[lane].cast::<u32>().add(at).read_unaligned());
                }
            }
        } else {
            for lane in lanes(mask) {
                for (at, row) in to[..i.n as usize].iter().enumerate() {
                    row.add(lane).write(data[lane].cast::<u32>().add(at).read_unaligned());
                }
            }
        }
    }
}

/// Writes registers of lanes to memory.
///
/// # Safety
/// The bytes of the lanes are writable, and the rows are the instruction's.
#[inline(always)]
unsafe fn store(i: &Instr, data: &[*mut u8; LANES], from: &[*mut u32; 4], mask: u32) {
    // SAFETY: the caller vouches for the pointers.
    unsafe {
        if i.ty.bytes() != 4 || i.has(flag::WIDE) {
            for lane in lanes(mask) {
                put(i, data[lane], from, lane);
            }
        } else {
            for lane in lanes(mask) {
                for (at, row) in from[..i.n as usize].iter().enumerate() {
                    data[lane].cast::<u32>().add(at).write_unaligned(row.add(lane).read());
                }
            }
        }
    }
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

/// Sets all bytes of a shadow.
///
/// # Safety
/// `shadow` is valid for writes of `bytes` bytes.
#[inline(always)]
unsafe fn mark_written(shadow: *mut u8, bytes: u32) {
    // SAFETY: the caller vouches for the bytes.
    unsafe {
        match bytes {
            4 => shadow.cast::<[u8; 4]>().write([1; 4]),
            8 => shadow.cast::<[u8; 8]>().write([1; 8]),
            16 => shadow.cast::<[u8; 16]>().write([1; 16]),
            _ => shadow.write_bytes(1, bytes as usize),
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

// ---- asynchronous copies ----

/// Checks and records the reads of asynchronous copies. Returns the source of each lane that reads something.
#[inline(always)]
fn copy_sources(
    env: &mut Env,
    core: &mut Core,
    warp: &Warp,
    rows: &Rows,
    i: &Instr,
    pc: usize,
    mask: u32,
) -> Result<[*mut u8; LANES]> {
    let bytes = u32::from(i.n);
    // SAFETY: the operands are the instruction's.
    let (mut from, reads) = unsafe { (*rows.get::<u64>(i.c), &*rows.get::<u32>(i.b)) };
    let (mut reading, mut whole) = (0, 0);
    for lane in 0..LANES {
        from[lane] = from[lane].wrapping_add(i64::from(i.e as i32) as u64);
        reading |= u32::from(reads[lane] > 0) << lane;
        whole |= u32::from(reads[lane] == bytes) << lane;
    }
    let (reading, whole) = (reading & mask, whole & mask);
    env.counts.global(pc, &from, reading, bytes);
    let mut sources = Lanes { addresses: from, data: [std::ptr::null_mut(); LANES] };
    if whole != 0 {
        access_global(env, core, warp, &mut sources, whole, bytes, Access::Read, 0, pc)?;
    }
    for lane in lanes(reading & !whole) {
        let read = reads[lane];
        if read > bytes {
            return Err(Trouble::new(format!("a copy of {read} bytes to {bytes}")).lane(lane));
        }
        sources.data[lane] = access_one(env, core, from[lane], bytes, read, Access::Read, 0, warp, lane, pc)
            .map_err(|t| t.lane(lane))?;
    }
    Ok(sources.data)
}

/// Starts asynchronous copies whose ends are checked.
#[inline(never)]
#[allow(clippy::too_many_arguments, reason = "what an instruction sees")]
fn start_copies(
    env: &Env,
    core: &mut Core,
    warp: &mut Warp,
    rows: &Rows,
    i: &Instr,
    pc: usize,
    mask: u32,
    all: &Lanes,
    sources: &[*mut u8; LANES],
) -> Result<()> {
    // SAFETY: the operand is the instruction's.
    let reads = unsafe { &*rows.get::<u32>(i.b) };
    for lane in lanes(mask) {
        let entry = Copy {
            pc: pc as u32,
            lane: lane as u8,
            bytes: i.n,
            read: reads[lane] as u8,
            to: all.addresses[lane] as u32,
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

/// Distributes the elements of `n` matrices of 8 rows of 16 bytes, of which lane 8 m + r has row r of matrix m.
#[inline(always)]
fn distribute(env: &Env, rows: &Rows, i: &Instr, all: &Lanes) -> Result<()> {
    let lists = &env.kernel.lists[i.d as usize..i.d as usize + i.n as usize];
    for (matrix, to) in lists.iter().enumerate() {
        let mut elements = [[0u16; 8]; 8];
        for row in 0..8 {
            // SAFETY: the caller has checked the lane's 16 bytes.
            elements[row] = unsafe { all.data[matrix * 8 + row].cast::<[u16; 8]>().read_unaligned() };
        }
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
