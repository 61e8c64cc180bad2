//! Shared memory of a block, with a shadow that knows who wrote and read each unit last. It finds reads of bytes that were
//! never written, accesses without a barrier between them, and accesses to bytes of an unfinished asynchronous copy.
//!
//! Time is a counter that grows at every barrier of the block or of a warp. An access is ordered before another one if
//! the warp of the later one has passed a barrier with the warp of the earlier one since. The counter keeps growing from
//! block to block, so that what an earlier block left in the shadow is older than the current block's start.

use super::fault::Trouble;
use super::lanes::{LANES, lanes};
use crate::ptx::program::{Kernel, SHARED_START, SharedVariable};
use std::sync::Arc;

/// Set in [`Cell::write_info`] while an asynchronous copy to the unit is in flight.
const ASYNC: u32 = 1 << 31;
/// Set in [`Cell::write_info`] if the last write was atomic.
const ATOMIC: u32 = 1 << 30;
/// Set in [`Cell::read_info`] if several lanes of a warp have read since the last barrier.
const SEVERAL: u32 = 1 << 31;
/// An instruction and a thread in one word: 20 bits and 10 bits.
const THREAD_BITS: u32 = 10;

/// The last accesses to one unit.
#[derive(Clone, Copy)]
struct Cell {
    write_time: u32,
    write_info: u32,
    read_time: u32,
    read_info: u32,
    /// Warps that have read since `read_time`'s barrier.
    read_warps: u32,
}

/// The [`Cell`]s of all units, field by field, for loops over neighbouring units.
#[derive(Default)]
struct Cells {
    write_time: Vec<u32>,
    write_info: Vec<u32>,
    read_time: Vec<u32>,
    read_info: Vec<u32>,
    read_warps: Vec<u32>,
}

impl Cells {
    fn fields(&mut self) -> [&mut Vec<u32>; 5] {
        let Cells { write_time, write_info, read_time, read_info, read_warps } = self;
        [write_time, write_info, read_time, read_info, read_warps]
    }

    fn get(&self, unit: u32) -> Cell {
        let at = unit as usize;
        Cell {
            write_time: self.write_time[at],
            write_info: self.write_info[at],
            read_time: self.read_time[at],
            read_info: self.read_info[at],
            read_warps: self.read_warps[at],
        }
    }
}

/// `N` neighbouring values of a field for each lane.
///
/// # Safety
/// All the units exist.
#[inline(always)]
unsafe fn load<const N: usize>(field: &[u32], units: &[u32; LANES]) -> [[u32; N]; LANES] {
    let mut out = [[0; N]; LANES];
    for lane in 0..LANES {
        // SAFETY: the caller vouches for the units.
        out[lane] = unsafe { field.as_ptr().add(units[lane] as usize).cast::<[u32; N]>().read() };
    }
    out
}

/// Stores what [`load`] loads.
///
/// # Safety
/// As for [`load`].
#[inline(always)]
unsafe fn store<const N: usize>(field: &mut [u32], units: &[u32; LANES], values: &[[u32; N]; LANES]) {
    for lane in 0..LANES {
        // SAFETY: the caller vouches for the units.
        unsafe { field.as_mut_ptr().add(units[lane] as usize).cast::<[u32; N]>().write(values[lane]) };
    }
}

/// The lanes whose values another lane has overwritten in [`store`].
///
/// # Safety
/// As for [`load`].
#[inline(always)]
unsafe fn differ<const N: usize>(field: &[u32], units: &[u32; LANES], values: &[[u32; N]; LANES]) -> u32 {
    let mut mask = 0;
    for lane in 0..LANES {
        // SAFETY: the caller vouches for the units.
        let first = unsafe { field.as_ptr().add(units[lane] as usize).read() };
        mask |= u32::from(first != values[lane][0]) << lane;
    }
    mask
}

/// Who accesses: a thread at an instruction.
#[derive(Clone, Copy)]
pub(super) struct Who {
    pub warp: usize,
    pub lane: usize,
    pub pc: usize,
}

impl Who {
    fn info(self) -> u32 {
        ((self.pc as u32) << THREAD_BITS | (self.warp * 32 + self.lane) as u32) & !(ASYNC | ATOMIC)
    }
}

fn thread(info: u32) -> u32 {
    info & ((1 << THREAD_BITS) - 1)
}

fn instruction(info: u32) -> usize {
    ((info & !(ASYNC | ATOMIC)) >> THREAD_BITS) as usize
}

/// The kind of an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    Atomic,
    /// The start of an asynchronous copy.
    Async,
}

/// Shared memory of the block that runs.
#[derive(Default)]
pub(super) struct Shared {
    data: Vec<u8>,
    cells: Cells,
    /// Four units that belong to no address.
    sink: u32,
    /// Log2 of the bytes of a unit.
    shift: u32,
    bytes: u32,
    variables: Arc<[SharedVariable]>,
    dynamic_start: u32,
    warps: usize,
    /// Time: see the head of this file.
    now: u32,
    start: u32,
    /// Everything up to this time is ordered before all later accesses.
    safe: u32,
    /// [warp][other warp]: accesses of the other warp up to this time are ordered before the warp's next.
    seen: Vec<u32>,
    /// [warp]: the warp's own accesses up to this time are ordered among its lanes.
    synced: Vec<u32>,
    /// [16-byte chunk]: products in flight that read it.
    reading: Vec<u8>,
    in_flight: usize,
    /// [warp]: the warp's writes up to this time are visible to the asynchronous proxy.
    proxy: Vec<u32>,
    races: bool,
}

impl Shared {
    /// Prepares for a block of a kernel.
    pub fn begin(&mut self, kernel: &Kernel, dynamic: u32, warps: usize, races: bool) {
        let bytes = kernel.dynamic_start + dynamic;
        self.shift = kernel.shared_unit.trailing_zeros();
        self.bytes = bytes;
        self.races = races;
        if self.data.len() < bytes as usize {
            self.data.resize(bytes.next_multiple_of(16) as usize, 0);
        }
        // More than there are units, for lanes that access nothing.
        let cells = (bytes >> self.shift) as usize + 8;
        if self.cells.write_time.len() < cells {
            self.cells.fields().into_iter().for_each(|field| field.resize(cells, 0));
        }
        self.sink = self.cells.write_time.len() as u32 - 4;
        self.variables = kernel.shared_variables.clone();
        self.dynamic_start = kernel.dynamic_start;
        self.warps = warps;
        // Two steps apart from what was there before; the shadow is cleared when the counter nears its end.
        if self.now > u32::MAX / 2 {
            self.cells.fields().into_iter().for_each(|field| field.fill(0));
            self.now = 0;
        }
        self.now += 2;
        self.start = self.now;
        self.safe = self.now - 1;
        self.seen.clear();
        self.seen.resize(warps * warps, self.safe);
        self.synced.clear();
        self.synced.resize(warps, self.safe);
        self.proxy.clear();
        self.proxy.resize(warps, self.safe);
        self.in_flight = 0;
        if kernel.uses_wgmma {
            self.reading.clear();
            self.reading.resize(bytes as usize / 16 + 1, 0);
        }
    }

    pub fn now(&self) -> u32 {
        self.now
    }

    pub fn warps(&self) -> usize {
        self.warps
    }

    /// Makes later accesses distinguishable from earlier ones.
    pub fn advance(&mut self) {
        self.now += 1;
    }

    /// The accesses of another warp that are ordered before the next of `warp`: all up to this time.
    pub fn seen(&self, warp: usize, other: usize) -> u32 {
        if warp == other { self.now } else { self.seen[warp * self.warps + other].max(self.safe) }
    }

    /// The lanes of a warp have waited for each other.
    pub fn sync_warp(&mut self, warp: usize) {
        self.synced[warp] = self.now;
        self.now += 1;
    }

    /// The warps have waited for each other; `all` if these are all warps that still run.
    pub fn sync(&mut self, warps: &[usize], all: bool) {
        if all {
            self.safe = self.now;
        } else {
            for row in warps {
                for column in 0..self.warps {
                    let most = warps.iter().map(|w| self.seen[w * self.warps + column]).max().unwrap_or(0);
                    let own = warps.contains(&column);
                    self.seen[row * self.warps + column] = if own { self.now } else { most };
                }
            }
        }
        for warp in warps {
            self.synced[*warp] = self.now;
        }
        self.now += 1;
    }

    /// `fence.proxy.async` of a warp.
    pub fn fence_proxy(&mut self, warp: usize) {
        self.proxy[warp] = self.now;
        self.now += 1;
    }

    /// Whether an access at `time` by a thread is ordered before an access of `who`.
    #[inline(always)]
    fn ordered(&self, time: u32, by: u32, who: Who) -> bool {
        if time <= self.safe {
            return true;
        }
        let (warp, lane) = (by as usize / 32, by as usize % 32);
        if warp == who.warp {
            lane == who.lane || time <= self.synced[warp]
        } else {
            time <= self.seen[who.warp * self.warps + warp]
        }
    }

    /// Whether an access of a thread at `time`, to any memory, is ordered before an access of `who`.
    pub fn orders(&self, time: u32, by: Who, who: Who) -> bool {
        self.ordered(time, (by.warp * 32 + by.lane) as u32, who)
    }

    /// Checks that an access of 1, 2, 4, 8 or 16 bytes is inside a variable or dynamic memory, and aligned.
    #[inline(always)]
    pub fn check(&self, address: u64, bytes: u32) -> Result<(), Box<Trouble>> {
        if address & u64::from(bytes - 1) != 0 {
            return Err(Trouble::new(format!(
                "a misaligned access: {bytes} bytes at shared address {address:#x}"
            )));
        }
        if address < u64::from(SHARED_START) || address + u64::from(bytes) > u64::from(self.bytes) {
            return Err(self.outside(address, bytes));
        }
        Ok(())
    }

    #[cold]
    fn outside(&self, address: u64, bytes: u32) -> Box<Trouble> {
        let end = self.bytes;
        let place = if address >= u64::from(end) {
            format!("{} bytes past the end of the block's shared memory", address - u64::from(end))
        } else if address < u64::from(SHARED_START) {
            "before the block's shared memory".to_string()
        } else {
            let before = self.variables.iter().rev().find(|v| u64::from(v.offset) <= address);
            before.map_or("before the first variable".to_string(), |v| {
                format!("{} bytes past the end of {}", address - u64::from(v.offset + v.bytes), v.name)
            })
        };
        Trouble::new(format!("{bytes} bytes at shared address {address:#x} are out of bounds: {place}"))
    }

    /// Whether a unit belongs to no variable.
    #[cold]
    fn in_gap(&self, address: u32) -> bool {
        let inside = |v: &SharedVariable| (v.offset..v.offset + v.bytes).contains(&address);
        address < self.dynamic_start && !self.variables.iter().any(inside)
    }

    /// Whether an access is inside shared memory, in units that the block has not all written.
    pub fn is_unwritten(&self, address: u64, bytes: u32) -> bool {
        self.check(address, bytes).is_ok() && {
            let units =
                address as usize >> self.shift..=(address as usize + bytes as usize - 1) >> self.shift;
            self.cells.write_time[units].iter().any(|time| *time < self.start)
        }
    }

    /// Records an access to `bytes` bytes, already checked by [`Shared::check`].
    #[inline(always)]
    pub fn touch(&mut self, address: u32, bytes: u32, access: Access, who: Who) -> Result<(), Box<Trouble>> {
        let first = address >> self.shift;
        let last = (address + bytes - 1) >> self.shift;
        for unit in first..=last {
            self.touch_unit(unit, access, who)?;
        }
        if self.in_flight > 0 && access != Access::Read {
            self.check_products(address, bytes)?;
        }
        Ok(())
    }

    /// Checks and records the accesses of a warp instruction: each lane of `mask` accesses `bytes` bytes.
    #[inline(always)]
    pub fn access_lanes(
        &mut self,
        addresses: &[u64; LANES],
        mask: u32,
        bytes: u32,
        access: Access,
        warp: usize,
        pc: usize,
    ) -> Result<(), Box<Trouble>> {
        if self.touch_lanes(addresses, mask, bytes, access, warp, pc) {
            return Ok(());
        }
        self.access_each(addresses, mask, bytes, access, warp, pc)
    }

    /// The accesses of a warp instruction one after the other.
    #[inline(never)]
    fn access_each(
        &mut self,
        addresses: &[u64; LANES],
        mask: u32,
        bytes: u32,
        access: Access,
        warp: usize,
        pc: usize,
    ) -> Result<(), Box<Trouble>> {
        for lane in lanes(mask) {
            self.access(addresses[lane], bytes, access, Who { warp, lane, pc }).map_err(|t| t.lane(lane))?;
        }
        Ok(())
    }

    /// [`Shared::access_lanes`] for the common cases, in numbers without short cuts, so that its loops become vector code.
    /// Returns false if a lane's access needs the closer look of [`Shared::access`], which may repeat what was recorded.
    #[inline(always)]
    fn touch_lanes(
        &mut self,
        addresses: &[u64; LANES],
        mask: u32,
        bytes: u32,
        access: Access,
        warp: usize,
        pc: usize,
    ) -> bool {
        let read = access == Access::Read;
        let start = u64::from(SHARED_START);
        let Some(room) = u64::from(self.bytes).checked_sub(start + u64::from(bytes)) else { return false };
        if !self.races || access == Access::Atomic || self.in_flight > 0 && !read || mask == 0 {
            return false;
        }
        // The first unit of each lane.
        let mut units = [0; LANES];
        let (mut outside, mut low, mut high) = (0, u64::MAX, 0);
        for lane in 0..LANES {
            let (address, on) = (addresses[lane], mask >> lane & 1 == 1);
            let wrong = address & u64::from(bytes - 1) | u64::from(address.wrapping_sub(start) > room);
            outside |= if on { wrong } else { 0 };
            low = low.min(if on { address } else { u64::MAX });
            high = high.max(if on { address } else { 0 });
            units[lane] = if on { address as u32 >> self.shift } else { self.sink };
        }
        if outside != 0 {
            return false;
        }
        let inside = |v: &SharedVariable| {
            u64::from(v.offset) <= low && high + u64::from(bytes) <= u64::from(v.offset + v.bytes)
        };
        // Whether no access can be to bytes between variables.
        let whole = read || low >= u64::from(self.dynamic_start) || self.variables.iter().any(inside);
        // SAFETY: the units are inside shared memory, or those of the sink.
        unsafe {
            match bytes >> self.shift {
                1 => self.touch_units::<1>(&units, mask, access, whole, warp, pc),
                2 => self.touch_units::<2>(&units, mask, access, whole, warp, pc),
                count => {
                    for _ in 0..count / 4 {
                        if !self.touch_units::<4>(&units, mask, access, whole, warp, pc) {
                            return false;
                        }
                        for lane in 0..LANES {
                            units[lane] += (mask >> lane & 1) * 4;
                        }
                    }
                    true
                }
            }
        }
    }

    /// Records accesses of lanes to `N` units each. Returns false if one of them needs a closer look.
    ///
    /// # Safety
    /// All the units exist.
    #[inline(always)]
    unsafe fn touch_units<const N: usize>(
        &mut self,
        units: &[u32; LANES],
        mask: u32,
        access: Access,
        whole: bool,
        warp: usize,
        pc: usize,
    ) -> bool {
        let Shared { safe, start, now, .. } = *self;
        let (synced, me) = (self.synced[warp], warp as u32);
        // Reads from this time on are not ordered before a write.
        let unordered = safe.max(start - 1);
        let info = ((pc as u32) << THREAD_BITS) & !(ASYNC | ATOMIC);
        let reader = |k: usize| me * 32 + (k / N) as u32;
        let cells = &mut self.cells;
        // SAFETY: the caller vouches for the units.
        let (written, by, read) = unsafe {
            (
                load::<N>(&cells.write_time, units),
                load::<N>(&cells.write_info, units),
                load::<N>(&cells.read_time, units),
            )
        };
        let (times, infos, reads) = (written.as_flattened(), by.as_flattened(), read.as_flattened());
        let (mut fresh, mut bad) = (0, 0);
        for k in 0..LANES * N {
            let (time, by) = (times[k], infos[k]);
            let own = u32::from(thread(by) == reader(k))
                | (u32::from(thread(by) / 32 == me) & u32::from(time <= synced));
            let disordered = (u32::from(time > safe) & (own ^ 1)) | (by / ASYNC);
            let unwritten = u32::from(time < start);
            let on = mask >> (k / N) & 1;
            fresh |= unwritten & on;
            bad |= disordered & (unwritten ^ 1) & on;
        }
        if access == Access::Read {
            if bad | fresh != 0 {
                return false;
            }
            // SAFETY: as above.
            let (mut readers, mut warps) =
                unsafe { (load::<N>(&cells.read_info, units), load::<N>(&cells.read_warps, units)) };
            let (info_of, warps_of) = (readers.as_flattened_mut(), warps.as_flattened_mut());
            for k in 0..LANES * N {
                let (time, before) = (reads[k], info_of[k]);
                let again = time > unordered;
                let same_warp = again & (thread(before) / 32 == me) & (time > synced);
                let several = same_warp & ((thread(before) != reader(k)) | (before & SEVERAL != 0));
                info_of[k] = info | reader(k) | if several { SEVERAL } else { 0 };
                warps_of[k] = if again { warps_of[k] } else { 0 } | 1 << (me % 32);
            }
            // SAFETY: as above.
            let overwritten = unsafe {
                store(&mut cells.read_info, units, &readers);
                store(&mut cells.read_warps, units, &warps);
                store(&mut cells.read_time, units, &[[now; N]; LANES]);
                differ(&cells.read_info, units, &readers)
            };
            for lane in lanes(overwritten & mask) {
                let unit = units[lane] as usize;
                cells.read_info[unit..unit + N].iter_mut().for_each(|info| *info |= SEVERAL);
            }
            return true;
        }
        for k in 0..LANES * N {
            bad |= u32::from(reads[k] > unordered) & mask >> (k / N);
        }
        if bad & 1 != 0 || fresh != 0 && !whole {
            return false;
        }
        let kind = if access == Access::Async { ASYNC } else { 0 };
        let mut writers = [[0; N]; LANES];
        for (k, writer) in writers.as_flattened_mut().iter_mut().enumerate() {
            *writer = info | reader(k) | kind;
        }
        // SAFETY: as above.
        unsafe {
            store(&mut cells.write_info, units, &writers);
            if differ(&cells.write_info, units, &writers) & mask != 0 {
                store(&mut cells.write_info, units, &by);
                return false;
            }
            store(&mut cells.write_time, units, &[[now; N]; LANES]);
            store(&mut cells.read_time, units, &[[0; N]; LANES]);
        }
        true
    }

    #[inline(always)]
    fn touch_unit(&mut self, unit: u32, access: Access, who: Who) -> Result<(), Box<Trouble>> {
        let cell = self.cells.get(unit);
        let written = cell.write_time >= self.start;
        let mine = thread(cell.write_info) == (who.warp * 32 + who.lane) as u32;
        if access == Access::Read || access == Access::Atomic {
            if !written {
                return Err(self.unwritten(unit, access));
            }
            let both = access == Access::Atomic && cell.write_info & ATOMIC != 0;
            let atomic = cell.write_info & ATOMIC != 0;
            if cell.write_info & ASYNC != 0 && !atomic {
                return Err(self.unfinished(unit, access, cell, mine));
            }
            if self.races && !both && !self.ordered(cell.write_time, thread(cell.write_info), who) {
                return Err(self.race(unit, access, "written", cell.write_info));
            }
        } else {
            if !written && self.in_gap(unit << self.shift) {
                return Err(self.outside(u64::from(unit << self.shift), 1 << self.shift));
            }
            if written && self.races {
                if cell.write_info & ASYNC != 0 && cell.write_info & ATOMIC == 0 {
                    return Err(self.unfinished(unit, access, cell, mine));
                }
                if !self.ordered(cell.write_time, thread(cell.write_info), who) {
                    return Err(self.race(unit, access, "written", cell.write_info));
                }
            }
        }
        let now = self.now;
        let read_now = cell.read_time > self.safe && cell.read_time >= self.start;
        if access == Access::Read {
            let reader = (who.warp * 32 + who.lane) as u32;
            let mut info = who.info();
            let mut warps = 1 << (who.warp % 32);
            if read_now {
                let before = thread(cell.read_info);
                let same_warp = before / 32 == who.warp as u32 && cell.read_time > self.synced[who.warp];
                if same_warp && (before != reader || cell.read_info & SEVERAL != 0) {
                    info |= SEVERAL;
                }
                warps |= cell.read_warps;
            }
            let (to, at) = (&mut self.cells, unit as usize);
            (to.read_time[at], to.read_info[at], to.read_warps[at]) = (now, info, warps);
        } else {
            if self.races && read_now && self.read_by_others(cell, who) {
                return Err(self.race(unit, access, "read", cell.read_info));
            }
            let (to, at) = (&mut self.cells, unit as usize);
            to.write_time[at] = now;
            to.write_info[at] = who.info()
                | match access {
                    Access::Atomic => ATOMIC,
                    Access::Async => ASYNC,
                    _ => 0,
                };
            to.read_time[at] = 0;
        }
        Ok(())
    }

    /// Whether another thread has read a unit without a barrier since.
    fn read_by_others(&self, cell: Cell, who: Who) -> bool {
        for warp in 0..self.warps {
            if cell.read_warps >> (warp % 32) & 1 == 0 {
                continue;
            }
            if warp == who.warp {
                let alone = thread(cell.read_info) == (who.warp * 32 + who.lane) as u32
                    && cell.read_info & SEVERAL == 0;
                let last = thread(cell.read_info) as usize / 32 == who.warp;
                if last && !alone && cell.read_time > self.synced[warp] {
                    return true;
                }
            } else if cell.read_time > self.seen[who.warp * self.warps + warp] {
                return true;
            }
        }
        false
    }

    #[cold]
    fn unwritten(&self, unit: u32, access: Access) -> Box<Trouble> {
        let address = unit << self.shift;
        if self.in_gap(address) {
            return self.outside(u64::from(address), 1 << self.shift);
        }
        Trouble::new(format!(
            "{access:?} of shared memory that was never written, at shared address {address:#x}"
        ))
    }

    #[cold]
    fn unfinished(&self, unit: u32, access: Access, cell: Cell, mine: bool) -> Box<Trouble> {
        let address = unit << self.shift;
        let whose = if mine { "this thread" } else { "another thread" };
        Trouble::new(format!(
            "{access:?} at shared address {address:#x}, where a cp.async of {whose} is not waited for"
        ))
        .other("the copy", instruction(cell.write_info), thread(cell.write_info))
    }

    #[cold]
    fn race(&self, unit: u32, access: Access, how: &str, info: u32) -> Box<Trouble> {
        let address = unit << self.shift;
        Trouble::new(format!(
            "a race in shared memory: {access:?} at shared address {address:#x}, {how} by another thread without a \
             barrier in between"
        ))
        .other("the other access", instruction(info & !SEVERAL), thread(info))
    }

    /// Ends an asynchronous copy to bytes that [`Access::Async`] claimed.
    pub fn finish_copy(&mut self, address: u32, bytes: u32, who: Who) {
        for unit in address >> self.shift..=(address + bytes - 1) >> self.shift {
            let at = unit as usize;
            let info = &mut self.cells.write_info[at];
            if *info & ASYNC != 0 && thread(*info) == (who.warp * 32 + who.lane) as u32 {
                *info &= !ASYNC;
                self.cells.write_time[at] = self.now;
            }
        }
    }

    /// The bytes from an address on that was checked.
    #[inline(always)]
    pub fn data(&mut self, address: u32) -> *mut u8 {
        // SAFETY: every caller has checked the address against `bytes`, which `data` covers.
        unsafe { self.data.as_mut_ptr().add(address as usize) }
    }

    /// Checks and records an access as [`Shared::check`] and [`Shared::touch`] do. Returns the bytes.
    #[inline(always)]
    pub fn access(
        &mut self,
        address: u64,
        bytes: u32,
        access: Access,
        who: Who,
    ) -> Result<*mut u8, Box<Trouble>> {
        self.check(address, bytes)?;
        self.touch(address as u32, bytes, access, who)?;
        Ok(self.data(address as u32))
    }

    // ---- asynchronous products ----

    /// A product in flight reads a 16-byte chunk. Checks that it is written, ordered and visible to the product.
    pub fn read_by_product(&mut self, address: u32, who: Who) -> Result<(), Box<Trouble>> {
        if address < SHARED_START || address + 16 > self.bytes {
            return Err(self.outside(u64::from(address), 16));
        }
        for unit in address >> self.shift..(address + 16) >> self.shift {
            let cell = self.cells.get(unit);
            let by = thread(cell.write_info);
            // Products are read at the pace of the warpgroup: the barrier must order the write before each of its warps.
            self.touch_unit(unit, Access::Read, who)?;
            if cell.write_time > self.proxy[by as usize / 32] {
                return Err(Trouble::new(format!(
                    "wgmma reads shared address {:#x}, written without a fence.proxy.async afterwards",
                    unit << self.shift
                ))
                .other("the write", instruction(cell.write_info), by));
            }
        }
        self.reading[address as usize / 16] += 1;
        self.in_flight += 1;
        Ok(())
    }

    /// A product that read a chunk is finished.
    pub fn product_done(&mut self, address: u32) {
        self.reading[address as usize / 16] -= 1;
        self.in_flight -= 1;
    }

    #[cold]
    fn check_products(&self, address: u32, bytes: u32) -> Result<(), Box<Trouble>> {
        for chunk in address / 16..=(address + bytes - 1) / 16 {
            if self.reading[chunk as usize] > 0 {
                return Err(Trouble::new(format!(
                    "a write to shared address {address:#x}, which a wgmma reads that is not waited for"
                )));
            }
        }
        Ok(())
    }
}
