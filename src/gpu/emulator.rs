//! [`Device`] on the CPU: it runs the host build of `cuda/**/*.cu`, to find bugs without a GPU.
//!
//! Every launch runs to its end before the call returns. Each buffer is one heap allocation filled with
//! poison. Guard bytes around it are checked after every launch (with the feature `sanitize` AddressSanitizer
//! checks instead). Results must not depend on the [`Schedule`]. The work of launches is counted per kernel.

use crate::gpu::device::{
    Arg, Buffer, Counts, Device, Event, Graph, Kernel, Launch, Memory, Node, Pinned, Properties, check_copy,
    check_launch,
};
use crate::{Error, Result};
use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, c_char, c_void};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};
use std::time::Instant;

/// The order in which the threads of a block and the blocks of a launch run. `InOrder` alone finds few
/// missing barriers. The two greedy schedules find those between warps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Schedule {
    /// Threads and blocks in ascending order.
    InOrder,
    /// Threads and blocks in descending order.
    Reversed,
    /// Random order, with this seed: each step runs a random thread that can run.
    Shuffled(u64),
    /// One warp until it waits for others, then the lowest warp that can run.
    GreedyUp,
    /// One warp until it waits for others, then the highest warp that can run.
    GreedyDown,
}

impl Schedule {
    /// One schedule of each kind.
    pub const ALL: [Schedule; 5] = [
        Schedule::InOrder,
        Schedule::Reversed,
        Schedule::Shuffled(1),
        Schedule::GreedyUp,
        Schedule::GreedyDown,
    ];
}

/// The structures of `emu.h`, field for field.
mod ffi {
    use super::{c_char, c_void};

    #[repr(C)]
    pub struct Kernel {
        pub name: *const c_char,
        pub file: *const c_char,
        pub threads: u32,
        pub call: *const c_void,
        pub parameters: *const c_char,
        pub next: *const Kernel,
    }

    #[repr(C)]
    #[derive(Default)]
    pub struct Counts {
        pub blocks: u64,
        pub streamed: u64,
        pub read: u64,
        pub written: u64,
        pub mma: u64,
        pub shared: u64,
        pub conflicts: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy)]
    pub struct Range {
        pub begin: usize,
        pub end: usize,
    }

    #[repr(C)]
    pub struct Launch {
        pub kernel: *const Kernel,
        pub arguments: *mut *mut c_void,
        pub grid: [u32; 3],
        pub shared: u32,
        pub schedule: u32,
        pub conflicts: u32,
        pub overlap: u32,
        pub seed: u64,
        pub sealed: *const Range,
        pub sealed_count: usize,
    }

    unsafe extern "C" {
        /// Calls `add` with `context` and each kernel of the host build.
        ///
        /// # Safety
        /// `add` must accept `context`.
        pub fn dflash_emu_kernels(add: extern "C" fn(*mut c_void, *const Kernel), context: *mut c_void);
        /// Runs blocks `blocks[..count]` of a launch and adds their work to `counts`. Returns 0; after a
        /// failure it returns another number and writes a sentence to `message`.
        ///
        /// # Safety
        /// Every pointer in `launch` and every argument is valid for its use by the kernel, `blocks` has
        /// `count` elements, and `message` has `message_size` bytes.
        pub fn dflash_emu_run(
            launch: *const Launch,
            blocks: *const u64,
            count: usize,
            counts: *mut Counts,
            message: *mut c_char,
            message_size: usize,
        ) -> i32;
    }
}

/// A kernel of the host build.
#[derive(Clone)]
struct Entry {
    kernel: *const ffi::Kernel,
    threads: u32,
    /// Source file without path and extension.
    file: String,
    /// One letter per parameter, as [`Arg::letter`].
    parameters: String,
}

// SAFETY: the pointer is to a C++ object with static lifetime that is never changed.
unsafe impl Send for Entry {}
// SAFETY: as for Send.
unsafe impl Sync for Entry {}

/// Guard bytes on each side of a buffer; also its alignment.
const GUARD: usize = 256;
/// The value of every guard byte.
const GUARD_BYTE: u8 = 0xc5;
/// The poison of `emu.h`: a NaN as bf16 and as f32, and as an integer far outside any index range.
const POISON: [u8; 2] = 0xffa5u16.to_le_bytes();

/// One heap allocation: `GUARD` bytes, the buffer, `GUARD` bytes. With AddressSanitizer only the buffer.
struct Block {
    start: *mut u8,
    layout: Layout,
    bytes: usize,
    allocations: Arc<Mutex<Allocations>>,
}

// SAFETY: the memory is accessed only in `Device` calls, which the emulator orders.
unsafe impl Send for Block {}
// SAFETY: as for Send.
unsafe impl Sync for Block {}

impl Memory for Block {}

impl Drop for Block {
    fn drop(&mut self) {
        let address = self.start as usize + guard();
        let mut allocations = lock(&self.allocations);
        allocations.buffers.remove(&address);
        allocations.sums.buffers -= 1;
        allocations.sums.bytes -= self.bytes;
        allocations
            .sealed
            .retain(|range| range.begin < address || range.begin >= address + self.bytes.max(1));
        // SAFETY: allocated with this layout in `allocate`, freed once.
        unsafe { dealloc(self.start, self.layout) };
    }
}

/// The device memory in use.
#[derive(Default)]
struct Allocations {
    /// Size of every buffer, by address.
    buffers: BTreeMap<usize, usize>,
    /// Constant ranges, in ascending order.
    sealed: Vec<ffi::Range>,
    sums: Allocated,
}

/// Device memory in use on an emulator.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allocated {
    /// Number of buffers.
    pub buffers: usize,
    /// Bytes of all buffers, without guards.
    pub bytes: usize,
    /// The maximum of `bytes` so far.
    pub peak: usize,
}

struct State {
    schedule: Schedule,
    /// Counts the bank conflicts of every access, not only of `ldmatrix`.
    conflicts: bool,
    /// OS threads per launch.
    threads: usize,
    counts: BTreeMap<&'static str, Counts>,
    /// The steps of each thread that captures a graph.
    recording: HashMap<ThreadId, Vec<Node>>,
}

/// The emulator as a [`Device`].
pub struct Emulator {
    properties: Properties,
    kernels: BTreeMap<String, Entry>,
    allocations: Arc<Mutex<Allocations>>,
    state: Mutex<State>,
    /// Held while a launch runs.
    running: Mutex<()>,
}

/// Guard bytes on each side of a buffer in this build.
fn guard() -> usize {
    if cfg!(feature = "sanitize") { 0 } else { GUARD }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Emulator {
    /// A device with 16 GiB of memory and the in-order schedule. A launch runs on one OS thread. Only the
    /// bank conflicts of `ldmatrix` are counted.
    pub fn new() -> Emulator {
        extern "C" fn add(context: *mut c_void, kernel: *const ffi::Kernel) {
            // SAFETY: `dflash_emu_kernels` below calls this with the map and a static kernel entry, whose
            // strings are C strings with static lifetime.
            unsafe {
                let kernels = &mut *context.cast::<BTreeMap<String, Entry>>();
                let text = |p: *const c_char| CStr::from_ptr(p).to_string_lossy().into_owned();
                let path = text((*kernel).file);
                let file = Path::new(&path).file_stem().unwrap_or_default().to_string_lossy().into_owned();
                let entry = Entry {
                    kernel,
                    threads: (*kernel).threads,
                    file,
                    parameters: text((*kernel).parameters),
                };
                kernels.insert(text((*kernel).name), entry);
            }
        }
        let mut kernels: BTreeMap<String, Entry> = BTreeMap::new();
        // SAFETY: `add` is called only during this call, with the pointer to the map.
        unsafe { ffi::dflash_emu_kernels(add, (&raw mut kernels).cast()) };
        Emulator {
            properties: Properties {
                name: "emulator".to_string(),
                capability: (8, 0),
                multiprocessors: 1,
                memory: 16 << 30,
                l2: 50 << 20,
                shared_per_block: 227 << 10,
                driver: 0,
                pci: None,
                overlap: true,
            },
            kernels,
            allocations: Arc::default(),
            state: Mutex::new(State {
                schedule: Schedule::InOrder,
                conflicts: false,
                threads: 1,
                counts: BTreeMap::new(),
                recording: HashMap::new(),
            }),
            running: Mutex::new(()),
        }
    }

    /// A device with `bytes` bytes of memory, otherwise as [`Emulator::new`].
    pub fn with_memory(bytes: u64) -> Emulator {
        let mut emulator = Emulator::new();
        emulator.properties.memory = bytes;
        emulator
    }

    /// The memory in use.
    pub fn allocated(&self) -> Allocated {
        lock(&self.allocations).sums
    }

    /// Sets the schedule of later launches.
    pub fn set_schedule(&self, schedule: Schedule) {
        lock(&self.state).schedule = schedule;
    }

    /// Makes later launches count the bank conflicts of every access through a wrapper, which is slow, or of
    /// `ldmatrix` only.
    pub fn count_conflicts(&self, on: bool) {
        lock(&self.state).conflicts = on;
    }

    /// Sets the number of OS threads that run the blocks of later launches. Blocks run in the order of the
    /// schedule only with one thread.
    pub fn set_threads(&self, threads: usize) {
        lock(&self.state).threads = threads.max(1);
    }

    /// The counters of each kernel since the last [`Emulator::reset_counts`], by kernel name.
    pub fn counts(&self) -> BTreeMap<&'static str, Counts> {
        lock(&self.state).counts.clone()
    }

    /// Sets all counters to zero.
    pub fn reset_counts(&self) {
        lock(&self.state).counts.clear();
    }

    /// The names of all kernels in the host build.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.kernels.keys().map(String::as_str)
    }

    /// Appends a step to the graph that this thread captures; false if it captures none.
    fn recorded(&self, node: impl FnOnce() -> Node) -> bool {
        match lock(&self.state).recording.get_mut(&thread::current().id()) {
            Some(nodes) => {
                nodes.push(node());
                true
            }
            None => false,
        }
    }

    fn not_capturing(&self, what: &str) -> Result<()> {
        match lock(&self.state).recording.contains_key(&thread::current().id()) {
            true => Err(Error::Internal(format!("{what} while a graph is captured"))),
            false => Ok(()),
        }
    }

    /// Checks a launch against the kernel's declaration in C++.
    fn check(&self, kernel: &Kernel, grid: [u32; 3], shared: u32, args: &[Arg]) -> Result<&Entry> {
        check_launch(kernel, grid, shared)?;
        let wrong = |what: String| Error::Internal(format!("kernel {}: {what}", kernel.name));
        let Some(entry) = self.kernels.get(kernel.name) else {
            return Err(wrong(format!("not in the host build of {}.cu", kernel.file)));
        };
        if entry.file != kernel.file {
            return Err(wrong(format!("in {}.cu, but declared in {}.cu", entry.file, kernel.file)));
        }
        if entry.threads != kernel.threads {
            return Err(wrong(format!(
                "{} threads per block, but {} are declared",
                entry.threads, kernel.threads
            )));
        }
        let letters: String = args.iter().map(Arg::letter).collect();
        if letters != entry.parameters {
            return Err(wrong(format!(
                "arguments {letters:?}, expected {:?} (p pointer, u u32, i i32, U u64, f f32)",
                entry.parameters
            )));
        }
        let limit = self.properties.shared_per_block;
        if kernel.max_shared > limit {
            return Err(wrong(format!(
                "{} bytes of dynamic shared memory, but a block has at most {limit}",
                kernel.max_shared
            )));
        }
        Ok(entry)
    }

    fn run(&self, launch: &Launch) -> Result<()> {
        let Launch { kernel, grid, shared, args } = launch;
        let entry = self.check(kernel, *grid, *shared, args)?;
        let _running = lock(&self.running);
        let (schedule, conflicts, threads) = {
            let state = lock(&self.state);
            (state.schedule, state.conflicts, state.threads)
        };
        let mut words: Vec<u64> = args.iter().map(Arg::word).collect();
        let mut pointers: Vec<*mut c_void> = words.iter_mut().map(|w| (w as *mut u64).cast()).collect();
        let sealed = lock(&self.allocations).sealed.clone();
        let (number, seed) = match schedule {
            Schedule::InOrder => (0, 0),
            Schedule::Reversed => (1, 0),
            Schedule::Shuffled(seed) => (2, seed),
            Schedule::GreedyUp => (3, 0),
            Schedule::GreedyDown => (4, 0),
        };
        let call = SharedLaunch(ffi::Launch {
            kernel: entry.kernel,
            arguments: pointers.as_mut_ptr(),
            grid: *grid,
            shared: *shared,
            schedule: number,
            conflicts: u32::from(conflicts),
            overlap: 1,
            seed,
            sealed: sealed.as_ptr(),
            sealed_count: sealed.len(),
        });
        let blocks = block_order(grid.iter().map(|&n| u64::from(n)).product(), schedule);
        let mut counts = call.run_all(&blocks, threads)?;
        counts.launches = 1;
        *lock(&self.state).counts.entry(kernel.name).or_default() += counts;
        self.check_guards(kernel)
    }

    /// Checks the guard bytes around every buffer.
    fn check_guards(&self, kernel: &Kernel) -> Result<()> {
        if guard() == 0 {
            return Ok(());
        }
        for (&address, &bytes) in &lock(&self.allocations).buffers {
            let start = address - GUARD;
            // SAFETY: the allocation extends from GUARD bytes before the buffer to GUARD bytes after it, and
            // the map has only buffers that are allocated.
            let (before, after) = unsafe {
                (
                    std::slice::from_raw_parts(start as *const u8, GUARD),
                    std::slice::from_raw_parts((address + bytes) as *const u8, GUARD),
                )
            };
            if before.iter().chain(after).any(|&b| b != GUARD_BYTE) {
                return Err(Error::Internal(format!(
                    "kernel {}: wrote outside a buffer of {bytes} bytes at {address:#x}",
                    kernel.name
                )));
            }
        }
        Ok(())
    }
}

impl Default for Emulator {
    fn default() -> Emulator {
        Emulator::new()
    }
}

/// A launch, shared by the OS threads that run its blocks.
struct SharedLaunch(ffi::Launch);

// SAFETY: the memory behind its pointers is only read while the blocks run.
unsafe impl Sync for SharedLaunch {}

impl SharedLaunch {
    /// Runs the blocks in order on one OS thread, or in any order on several.
    fn run_all(&self, blocks: &[u64], threads: usize) -> Result<Counts> {
        if threads <= 1 || blocks.len() <= 1 {
            return self.run_some(blocks);
        }
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let total = Mutex::new(Ok(Counts::default()));
        rayon::scope(|scope| {
            for _ in 0..threads.min(blocks.len()) {
                scope.spawn(|_| {
                    while !stop.load(Ordering::Relaxed) {
                        let Some(block) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                        let result = self.run_some(std::slice::from_ref(block));
                        let mut total = lock(&total);
                        match (&mut *total, result) {
                            (Ok(total), Ok(counts)) => *total += counts,
                            (Ok(_), Err(e)) => {
                                stop.store(true, Ordering::Relaxed);
                                *total = Err(e);
                            }
                            (Err(_), _) => {}
                        }
                    }
                });
            }
        });
        total.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    fn run_some(&self, blocks: &[u64]) -> Result<Counts> {
        let mut counts = ffi::Counts::default();
        let mut message = [0u8; 1600];
        // SAFETY: the launch points to a static kernel entry, to as many arguments of the right sizes as it
        // has parameters (`check`), and to the sealed ranges, all of which outlive the call; the other
        // pointers are to locals of the given sizes.
        let failed = unsafe {
            ffi::dflash_emu_run(
                &self.0,
                blocks.as_ptr(),
                blocks.len(),
                &mut counts,
                message.as_mut_ptr().cast(),
                message.len(),
            )
        };
        if failed != 0 {
            let text = CStr::from_bytes_until_nul(&message).map(CStr::to_string_lossy).unwrap_or_default();
            return Err(Error::Internal(text.into_owned()));
        }
        let ffi::Counts { blocks, streamed, read, written, mma, shared, conflicts } = counts;
        Ok(Counts { launches: 0, blocks, streamed, read, written, mma, shared, conflicts })
    }
}

/// Linear block indices in the order of the schedule.
fn block_order(count: u64, schedule: Schedule) -> Vec<u64> {
    let mut order: Vec<u64> = (0..count).collect();
    match schedule {
        Schedule::InOrder | Schedule::GreedyUp => {}
        Schedule::Reversed | Schedule::GreedyDown => order.reverse(),
        Schedule::Shuffled(seed) => {
            let mut state = seed;
            for i in (1..order.len()).rev() {
                state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                order.swap(i, (state >> 33) as usize % (i + 1));
            }
        }
    }
    order
}

impl Device for Emulator {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer> {
        self.not_capturing("an allocation")?;
        let refused =
            || Error::Memory(format!("no host memory for {what}: the emulator needs {bytes} bytes"));
        let whole = bytes.max(1).checked_add(2 * guard()).ok_or_else(refused)?;
        let layout = Layout::from_size_align(whole, GUARD).map_err(|_| refused())?;
        let (free, total) = self.memory()?;
        if bytes as u64 > free {
            return Err(Error::Memory(format!(
                "not enough memory of the emulator for {what}: {bytes} bytes needed, {free} free of {total}"
            )));
        }
        // SAFETY: the layout is not empty, the pointer is checked, and all writes are inside the allocation.
        let start = unsafe {
            let start = alloc(layout);
            if start.is_null() {
                return Err(refused());
            }
            start.write_bytes(GUARD_BYTE, whole);
            let inside = std::slice::from_raw_parts_mut(start.add(guard()), bytes);
            for (i, byte) in inside.iter_mut().enumerate() {
                *byte = POISON[i & 1];
            }
            start
        };
        let address = start as usize + guard();
        let mut allocations = lock(&self.allocations);
        allocations.buffers.insert(address, bytes);
        let sums = &mut allocations.sums;
        sums.buffers += 1;
        sums.bytes += bytes;
        sums.peak = sums.peak.max(sums.bytes);
        drop(allocations);
        let block = Block { start, layout, bytes, allocations: self.allocations.clone() };
        Ok(Buffer::new(address as u64, bytes, Arc::new(block)))
    }

    fn pinned(&self, bytes: usize, what: &str) -> Result<Pinned> {
        let buffer = self.allocate(bytes, what)?;
        self.fill(&buffer, 0)?;
        Ok(Pinned { host: buffer.address() as *mut u8, buffer })
    }

    fn memory(&self) -> Result<(u64, u64)> {
        let used = self.allocated().bytes as u64;
        Ok((self.properties.memory.saturating_sub(used), self.properties.memory))
    }

    fn upload(&self, to: &Buffer, bytes: &[u8]) -> Result<()> {
        self.not_capturing("an upload")?;
        check_copy(to.bytes(), bytes.len())?;
        let _running = lock(&self.running);
        // SAFETY: a buffer's address and size describe allocated memory, and no kernel runs while the lock is
        // held.
        unsafe { std::ptr::copy(bytes.as_ptr(), to.address() as *mut u8, bytes.len()) };
        Ok(())
    }

    fn download(&self, from: &Buffer, bytes: &mut [u8]) -> Result<()> {
        self.not_capturing("a download")?;
        check_copy(bytes.len(), from.bytes())?;
        let _running = lock(&self.running);
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy(from.address() as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn copy(&self, to: &Buffer, from: &Buffer) -> Result<()> {
        check_copy(to.bytes(), from.bytes())?;
        if !self.recorded(|| Node::Copy { to: to.clone(), from: from.clone() }) {
            let _running = lock(&self.running);
            // SAFETY: as in `upload`; the two may overlap.
            unsafe { std::ptr::copy(from.address() as *const u8, to.address() as *mut u8, to.bytes()) };
        }
        Ok(())
    }

    fn fill(&self, to: &Buffer, byte: u8) -> Result<()> {
        if !self.recorded(|| Node::Fill { to: to.clone(), byte }) {
            let _running = lock(&self.running);
            // SAFETY: as in `upload`.
            unsafe { (to.address() as *mut u8).write_bytes(byte, to.bytes()) };
        }
        Ok(())
    }

    fn seal(&self, constant: &Buffer) {
        let mut allocations = lock(&self.allocations);
        let begin = constant.address() as usize;
        allocations.sealed.push(ffi::Range { begin, end: begin + constant.bytes() });
        allocations.sealed.sort_by_key(|range| range.begin);
    }

    fn launch(&self, kernel: &'static Kernel, grid: [u32; 3], shared: u32, args: &[Arg]) -> Result<()> {
        self.check(kernel, grid, shared, args)?;
        let launch = Launch { kernel, grid, shared, args: args.to_vec() };
        if self.recorded(|| Node::Launch(launch.clone())) {
            return Ok(());
        }
        self.run(&launch)
    }

    fn capture(&self, record: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        self.not_capturing("a capture")?;
        let thread = thread::current().id();
        lock(&self.state).recording.insert(thread, Vec::new());
        let result = record();
        let nodes = lock(&self.state).recording.remove(&thread).unwrap_or_default();
        result.map(|()| Graph { nodes, replayable: Box::new(()) })
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        self.not_capturing("a replay")?;
        for node in &graph.nodes {
            match node {
                Node::Launch(launch) => self.run(launch)?,
                Node::Copy { to, from } => self.copy(to, from)?,
                Node::Fill { to, byte } => self.fill(to, *byte)?,
            }
        }
        Ok(())
    }

    fn record(&self) -> Result<Event> {
        Ok(Event(Box::new(Instant::now())))
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32> {
        match (from.0.downcast_ref::<Instant>(), to.0.downcast_ref::<Instant>()) {
            (Some(from), Some(to)) => Ok(to.duration_since(*from).as_secs_f32() * 1e3),
            _ => Err(Error::Internal("an event of another device".to_string())),
        }
    }

    fn synchronize(&self) -> Result<()> {
        self.not_capturing("a wait")
    }

    fn counters(&self) -> Option<Counts> {
        let mut sum = Counts::default();
        self.counts().into_values().for_each(|counts| sum += counts);
        Some(sum)
    }

    fn count_all_conflicts(&self, all: bool) {
        self.count_conflicts(all);
    }
}
