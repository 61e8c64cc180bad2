//! Races in global memory, between blocks and between launches that overlap.
//!
//! Every warp of a chain of launches has a number, and its accesses have the time of its block's shared memory. An access is
//! ordered before another one if barriers order them (same block), if a fence after the first, an atomic operation on
//! the same address by both sides and a fence before the second order them (other blocks), or if the second one's launch has
//! waited for the first one's. The shadow holds the last write and one read of each unit; numbers keep growing from chain to
//! chain, so that records of an earlier chain are recognised by their number.

use super::Launch;
use super::block::Core;
use super::exec::Result;
use super::fault::Trouble;
use super::lanes::LANES;
use super::shared::{Access, Who};
use crate::ptx::Kernel;
use crate::ptx::program::flag;
use std::collections::HashMap;
use std::sync::Arc;

/// Bytes of a page of the shadow.
const PAGE: u64 = 4096;
/// Pages that are found without a search.
const RECENT: usize = 64;
/// Bytes for which one read of `ld.global.nc` is recorded.
const GRANULE: u64 = 16;
/// Set in the instruction of a record if the access was atomic or volatile.
const STRONG: u32 = 1 << 31;

/// An access to a unit.
#[derive(Clone, Copy, Default)]
#[repr(align(16))]
struct Record {
    warp: u32,
    time: u32,
    pc: u32,
}

struct Page {
    /// Log2 of the bytes of a unit.
    shift: u32,
    /// [unit]: the last write, and a read.
    writes: Vec<Record>,
    reads: Vec<Record>,
    /// The highest warps that have written and read there.
    written_by: u32,
    read_by: u32,
    /// [granule]: the last read through the read-only path, and the last warp that read so.
    streamed: Vec<Record>,
    streamed_by: u32,
}

impl Page {
    fn new() -> Page {
        let shift = 4;
        let records = vec![Record::default(); PAGE as usize >> shift];
        Page {
            shift,
            writes: records.clone(),
            reads: records,
            written_by: 0,
            read_by: 0,
            streamed: Vec::new(),
            streamed_by: 0,
        }
    }

    /// Makes the units no larger than `bytes`.
    #[inline(never)]
    fn split(&mut self, bytes: u32) {
        let shift = bytes.trailing_zeros();
        let copies = 1 << (self.shift - shift);
        for records in [&mut self.writes, &mut self.reads] {
            *records = records.iter().flat_map(|record| std::iter::repeat_n(*record, copies)).collect();
        }
        self.shift = shift;
    }

    /// Records reads of constants, most likely, from byte `first` to byte `last` of the page.
    #[inline(always)]
    fn stream(&mut self, first: u32, last: u32, record: Record) {
        if self.streamed.is_empty() {
            self.streamed = vec![Record::default(); (PAGE / GRANULE) as usize];
        }
        self.streamed[first as usize / GRANULE as usize..=last as usize / GRANULE as usize].fill(record);
        self.streamed_by = record.warp;
    }
}

/// Times of other warps, sorted by warp: what they did up to then is known.
#[derive(Clone, Default)]
struct Clock(Vec<(u32, u32)>);

impl Clock {
    fn raise(&mut self, warp: u32, time: u32) {
        match self.0.binary_search_by_key(&warp, |entry| entry.0) {
            Ok(at) => self.0[at].1 = self.0[at].1.max(time),
            Err(at) => self.0.insert(at, (warp, time)),
        }
    }

    fn join(&mut self, other: &Clock) {
        for (warp, time) in &other.0 {
            self.raise(*warp, *time);
        }
    }

    fn get(&self, warp: u32) -> u32 {
        self.0.binary_search_by_key(&warp, |entry| entry.0).map_or(0, |at| self.0[at].1)
    }
}

/// What a warp knows of others, and what others may know by it.
#[derive(Clone, Default)]
struct Knowledge {
    /// Ordered before the warp's next access.
    known: Clock,
    /// Ordered before the warp's last fence.
    released: Clock,
    /// Released to atomics that the warp has executed since its last fence.
    seen: Clock,
    /// [address / 8]: the atomics on it that came before the warp's own.
    observed: HashMap<u64, Clock>,
}

/// The atomics on an address.
#[derive(Default)]
struct Meeting {
    /// What they have released.
    released: Clock,
    /// The operations themselves.
    done: Clock,
}

/// One launch of the chain.
struct Known {
    kernel: Arc<Kernel>,
    grid: [u32; 3],
    block: [u32; 3],
    first_warp: u32,
    dependent: bool,
    done: bool,
}

/// The shadow of global memory.
#[derive(Default)]
pub(super) struct Global {
    pages: HashMap<u64, Box<Page>>,
    /// By the last bits of a page's number, 0 for none: the page that was used last.
    recent: Vec<(u64, *mut Page)>,
    launches: Vec<Known>,
    /// All launches before this one are done.
    done: usize,
    /// The first warp of the chain, and the next to be given out.
    base: u32,
    next: u32,
    warps: HashMap<u32, Knowledge>,
    /// [address / 8]
    atomics: HashMap<u64, Meeting>,
}

impl Global {
    /// Starts a chain of launches; numbers their warps.
    pub fn begin(&mut self, chain: &[Launch]) {
        // No warp has number 0, so that empty records are older than all others.
        if self.next > u32::MAX / 2 || self.pages.len() > 1 << 15 {
            self.pages.clear();
            self.next = 0;
        }
        self.next = self.next.max(1);
        self.base = self.next;
        (self.launches, self.done) = (Vec::new(), 0);
        self.recent.clear();
        self.recent.resize(RECENT, (0, std::ptr::null_mut()));
        self.warps.clear();
        self.atomics.clear();
        for launch in chain {
            let blocks = launch.grid.iter().product::<u32>();
            let warps = launch.block.iter().product::<u32>().div_ceil(32);
            self.launches.push(Known {
                kernel: launch.kernel.clone(),
                grid: launch.grid,
                block: launch.block,
                first_warp: self.next,
                dependent: launch.dependent,
                done: false,
            });
            self.next = self.next.wrapping_add(blocks.wrapping_mul(warps));
        }
    }

    /// The number of the first warp of a block.
    pub fn first_warp(&self, launch: usize, block: u32) -> u32 {
        let launch = &self.launches[launch];
        launch.first_warp + block * launch.block.iter().product::<u32>().div_ceil(32)
    }

    /// Every block of a launch has ended.
    pub fn done(&mut self, launch: usize) {
        self.launches[launch].done = true;
        self.done = self.launches.iter().position(|launch| !launch.done).unwrap_or(self.launches.len());
        // What a complete launch did is ordered for all that wait for it.
        let first = self.launches[launch].first_warp;
        let end = self.launches.get(launch + 1).map_or(self.next, |next| next.first_warp);
        let mine = first..end;
        self.warps.retain(|warp, _| !mine.contains(warp));
        self.atomics.retain(|_, meeting| {
            meeting.released.0.retain(|(warp, _)| !mine.contains(warp));
            meeting.done.0.retain(|(warp, _)| !mine.contains(warp));
            !meeting.done.0.is_empty()
        });
    }

    fn launch_of(&self, warp: u32) -> usize {
        self.launches.partition_point(|launch| launch.first_warp <= warp) - 1
    }

    // ---- fences, atomics, barriers ----

    /// A fence of a warp; at the scope of a block it orders nothing that barriers do not.
    pub fn fence(&mut self, _launch: usize, core: &mut Core, warp: usize, device: bool) {
        if !device {
            return;
        }
        let own = core.first_warp + warp as u32;
        let knowledge = self.warps.entry(own).or_default();
        let seen = std::mem::take(&mut knowledge.seen);
        knowledge.known.join(&seen);
        knowledge.released = knowledge.known.clone();
        for other in 0..core.shared.warps() {
            knowledge.released.raise(core.first_warp + other as u32, core.shared.seen(warp, other));
        }
        // Later accesses have a later time than the fence.
        core.shared.advance();
    }

    /// An atomic or volatile access of a warp.
    pub fn atomic(&mut self, address: u64, flags: u16, launch: usize, core: &mut Core, warp: usize) {
        if flags & flag::RELEASE != 0 {
            self.fence(launch, core, warp, true);
        }
        let knowledge = self.warps.entry(core.first_warp + warp as u32).or_default();
        let here = self.atomics.entry(address / 8).or_default();
        knowledge.seen.join(&here.released);
        here.released.join(&knowledge.released);
        here.done.raise(core.first_warp + warp as u32, core.shared.now());
        knowledge.observed.insert(address / 8, here.done.clone());
        if flags & flag::ACQUIRE != 0 {
            let seen = std::mem::take(&mut knowledge.seen);
            knowledge.known.join(&seen);
        }
    }

    /// Warps of a block have waited for each other: each knows what the others knew.
    pub fn barrier(&mut self, core: &Core, warps: &[usize]) {
        let numbers = warps.iter().map(|warp| core.first_warp + *warp as u32);
        if self.warps.is_empty() || !numbers.clone().any(|n| self.warps.contains_key(&n)) {
            return;
        }
        let mut all = Knowledge::default();
        for number in numbers.clone() {
            if let Some(knowledge) = self.warps.get(&number) {
                all.known.join(&knowledge.known);
                all.released.join(&knowledge.released);
                all.seen.join(&knowledge.seen);
                for (address, clock) in &knowledge.observed {
                    all.observed.entry(*address).or_default().join(clock);
                }
            }
        }
        for number in numbers {
            self.warps.insert(number, all.clone());
        }
    }

    // ---- accesses ----

    #[inline(always)]
    fn page(&mut self, address: u64) -> &mut Page {
        let number = address / PAGE;
        let recent = &mut self.recent[number as usize % RECENT];
        if recent.0 != number || recent.1.is_null() {
            let page = self.pages.entry(number).or_insert_with(|| Box::new(Page::new()));
            *recent = (number, &raw mut **page);
        }
        // SAFETY: pages are boxed and stay until the next chain begins, which forgets this one.
        unsafe { &mut *recent.1 }
    }

    /// Whether a recorded access is ordered before an access of `who` now.
    fn ordered(&self, record: Record, launch: usize, core: &Core, who: Who, waited: bool) -> bool {
        let own = core.first_warp + who.warp as u32;
        if record.warp == own {
            return true;
        }
        let other = record.warp.wrapping_sub(core.first_warp) as usize;
        if other < core.shared.warps() {
            return core.shared.seen(who.warp, other) >= record.time;
        }
        let from = self.launch_of(record.warp);
        if from == launch {
            return self.warps.get(&own).is_some_and(|k| k.known.get(record.warp) >= record.time);
        }
        from < launch && self.launches[from].done && (waited || !self.launches[launch].dependent)
    }

    /// Records the accesses of a warp instruction: each lane of `mask` accesses `bytes` bytes. Returns false if a lane's
    /// access needs the closer look of [`Global::touch`], which may then repeat what was recorded.
    #[inline(always)]
    #[allow(clippy::too_many_arguments, reason = "what an access is made of")]
    pub fn touch_lanes(
        &mut self,
        addresses: &[u64; LANES],
        mask: u32,
        bytes: u32,
        access: Access,
        flags: u16,
        launch: usize,
        core: &Core,
        warp: usize,
        pc: usize,
        waited: bool,
    ) -> bool {
        if access == Access::Atomic || flags & flag::STRONG != 0 {
            return false;
        }
        let read = access == Access::Read;
        let streamed = read && flags & flag::NC != 0;
        let own = core.first_warp + warp as u32;
        let record = Record { warp: own, time: core.shared.now(), pc: pc as u32 };
        // Warps below this one belong to launches that are done and waited for, or to earlier chains.
        let done = if waited || !self.launches[launch].dependent { self.done.min(launch) } else { 0 };
        let settled = self.launches[done].first_warp;
        // A warp may read what it wrote itself, but not through the read-only path.
        let also = if streamed { 0 } else { own };
        let fine = |records: &[Record]| {
            records.iter().fold(true, |fine, r| fine & ((r.warp < settled) | (r.warp == also)))
        };
        let base = self.base;
        // Bit n: lane n accesses the bytes after those of the lane before it, in the same page.
        let mut follows = 0;
        for lane in 1..LANES {
            let next = addresses[lane] == addresses[lane - 1].wrapping_add(u64::from(bytes));
            follows |= u32::from(next & !addresses[lane].is_multiple_of(PAGE)) << lane;
        }
        let mut left = mask;
        while left != 0 {
            let lane = left.trailing_zeros();
            let count = 1 + ((left & follows) >> lane >> 1).trailing_ones();
            left &= !((((1u64 << count) - 1) as u32) << lane);
            let address = addresses[lane as usize];
            let page = self.page(address);
            let first = (address % PAGE) as usize;
            let end = first + (count * bytes) as usize;
            if streamed {
                page.stream(first as u32, end as u32 - 1, record);
                if page.written_by < base {
                    continue;
                }
            }
            if bytes < 1 << page.shift {
                page.split(bytes);
            }
            let units = first >> page.shift..end >> page.shift;
            if page.written_by >= settled && !fine(&page.writes[units.clone()]) {
                return false;
            }
            if read {
                page.read_by = page.read_by.max(own);
                page.reads[units].fill(record);
            } else {
                if page.streamed_by >= base || page.read_by >= settled && !fine(&page.reads[units.clone()]) {
                    return false;
                }
                page.written_by = page.written_by.max(own);
                page.writes[units].fill(record);
            }
        }
        true
    }

    /// Records an access to global memory.
    ///
    /// # Errors
    /// It conflicts with another one that is not ordered before it.
    #[allow(clippy::too_many_arguments, reason = "what an access is made of")]
    pub fn touch(
        &mut self,
        address: u64,
        bytes: u32,
        access: Access,
        flags: u16,
        launch: usize,
        core: &Core,
        who: Who,
        waited: bool,
    ) -> Result<()> {
        let base = self.base;
        let own = core.first_warp + who.warp as u32;
        let strong = access == Access::Atomic || flags & flag::STRONG != 0;
        let pc = who.pc as u32 | if strong { STRONG } else { 0 };
        let record = Record { warp: own, time: core.shared.now(), pc };
        let page = self.page(address);
        let read = access == Access::Read;
        if read && flags & flag::NC != 0 {
            let first = (address % PAGE) as u32;
            page.stream(first, first + bytes - 1, record);
            // Constants, most likely.
            if page.written_by < base {
                return Ok(());
            }
        }
        if bytes < 1 << page.shift {
            page.split(bytes);
        }
        let shift = page.shift;
        let first = (address % PAGE) as u32 >> shift;
        let last = ((address % PAGE) as u32 + bytes - 1) >> shift;
        if !read {
            page.written_by = page.written_by.max(own);
            if page.streamed_by >= base {
                for at in (address..address + u64::from(bytes)).step_by(GRANULE as usize) {
                    let before = self.page(at).streamed[(at % PAGE / GRANULE) as usize];
                    self.check_streamed(before, launch, core, who, waited, at)?;
                }
            }
        }
        for unit in first..=last {
            let page = self.page(address);
            let (write, before) = (page.writes[unit as usize], page.reads[unit as usize]);
            let at = (address & !(PAGE - 1)) | u64::from(unit << shift);
            // Atomics do not race with each other, nor does an access that follows the warp's own atomic race with those
            // on the same address before it.
            let exempt = |before: Record| {
                let knowledge = self.warps.get(&own).and_then(|k| k.observed.get(&(at / 8)));
                before.pc & STRONG != 0
                    && (strong || knowledge.is_some_and(|clock| clock.get(before.warp) >= before.time))
            };
            let streamed = read && flags & flag::NC != 0;
            if streamed && write.warp >= base && self.launch_of(write.warp) == launch {
                let sentence = "ld.global.nc of bytes that this launch writes";
                return Err(self.report(write, sentence, "write", at));
            }
            let foreign = write.warp >= base && write.warp != own;
            if foreign && !exempt(write) && !self.ordered(write, launch, core, who, waited) {
                return Err(self.conflict(access, write, true, launch, at));
            }
            let foreign = !read && before.warp >= base && before.warp != own;
            if foreign && !exempt(before) && !self.ordered(before, launch, core, who, waited) {
                return Err(self.conflict(access, before, false, launch, at));
            }
            let page = self.page(address);
            if read {
                page.read_by = page.read_by.max(own);
                page.reads[unit as usize] = record;
            } else {
                page.writes[unit as usize] = record;
            }
        }
        Ok(())
    }

    /// A write to a granule that was read through the read-only path.
    fn check_streamed(
        &self,
        before: Record,
        launch: usize,
        core: &Core,
        who: Who,
        waited: bool,
        at: u64,
    ) -> Result<()> {
        if before.warp < self.base {
            return Ok(());
        }
        let same = self.launch_of(before.warp) == launch;
        if same || !self.ordered(before, launch, core, who, waited) {
            let sentence = "a write of bytes that a launch in flight reads with ld.global.nc";
            return Err(self.report(before, sentence, "read", at));
        }
        Ok(())
    }

    #[cold]
    fn conflict(&self, access: Access, before: Record, write: bool, launch: usize, at: u64) -> Box<Trouble> {
        let from = self.launch_of(before.warp);
        let did = if write { "written" } else { "read" };
        let why = if from < launch {
            format!("{did} by an earlier launch that this one has not waited for (griddepcontrol.wait)")
        } else if from > launch {
            format!("{did} by a later launch that did not wait for this one (griddepcontrol.wait)")
        } else {
            format!("{did} by another warp, and nothing orders the two")
        };
        let sentence = format!("a race in global memory: {access:?} at {at:#x}, {why}");
        self.report(before, &sentence, if write { "write" } else { "read" }, at)
    }

    fn report(&self, before: Record, sentence: &str, what: &str, at: u64) -> Box<Trouble> {
        let launch = &self.launches[self.launch_of(before.warp)];
        let warps = launch.block.iter().product::<u32>().div_ceil(32);
        let number = before.warp - launch.first_warp;
        let (block, warp) = (number / warps, number % warps);
        let (x, y) = (block % launch.grid[0], block / launch.grid[0] % launch.grid[1]);
        let z = block / launch.grid[0] / launch.grid[1];
        let place = launch.kernel.place((before.pc & !STRONG) as usize);
        Trouble::new(sentence).at(at).note(format!(
            "the other {what}: {place}, {}, block ({x}, {y}, {z}), warp {warp}",
            launch.kernel.name
        ))
    }
}
