//! What the engine needs of a device: memory, kernel launches, graphs, events. [`crate::gpu::cuda`] and `crate::gpu::emulator`
//! implement it; neither knows what a model is.
//!
//! Work is ordered: a device runs everything in the order it was asked for. Launching is a safe call because a kernel's
//! arguments can only be buffers that num_active on (a launch and a graph keep theirs alive) and plain numbers; that a kernel
//! stays inside its buffers is the promise of the kernel's launcher in [`crate::gpu::kernels`], tested under the emulator.

use crate::{Error, Result};
use std::any::Any;
use std::fmt;
use std::ops::{AddAssign, Sub};
use std::sync::Arc;

/// A kernel as the engine knows it; one `static` per entry point in `cuda/*.cu`.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Source file without path and extension: `embedding` for `cuda/model/embedding.cu`.
    pub file: &'static str,
    /// Name of the entry point.
    pub name: &'static str,
    /// Threads per block, as in the kernel's `KERNEL(...)` line.
    pub threads: u32,
    /// The most dynamic shared memory any launch asks for, bytes.
    pub max_shared: u32,
}

/// One kernel argument. Pointers are buffers, so that they stay alive as long as the launch or its graph.
#[derive(Debug, Clone, PartialEq)]
pub enum Arg {
    Buffer(Buffer),
    /// A null pointer, where a kernel allows one.
    Null,
    U32(u32),
    I32(i32),
    U64(u64),
    F32(f32),
}

impl Arg {
    /// The letter of the parameter type that takes this argument: pointer, u32, i32, u64 or f32.
    pub fn letter(&self) -> char {
        match self {
            Arg::Buffer(_) | Arg::Null => 'p',
            Arg::U32(_) => 'u',
            Arg::I32(_) => 'i',
            Arg::U64(_) => 'U',
            Arg::F32(_) => 'f',
        }
    }

    /// The argument's bytes as a kernel parameter, from the lowest up; short ones in the first four.
    pub(crate) fn word(&self) -> u64 {
        match self {
            Arg::Buffer(buffer) => buffer.address,
            Arg::Null => 0,
            Arg::U32(x) => u64::from(*x),
            Arg::I32(x) => u64::from(x.cast_unsigned()),
            Arg::U64(x) => *x,
            Arg::F32(x) => u64::from(x.to_bits()),
        }
    }
}

impl From<&Buffer> for Arg {
    fn from(buffer: &Buffer) -> Arg {
        Arg::Buffer(buffer.clone())
    }
}
impl From<u32> for Arg {
    fn from(x: u32) -> Arg {
        Arg::U32(x)
    }
}
impl From<i32> for Arg {
    fn from(x: i32) -> Arg {
        Arg::I32(x)
    }
}
impl From<u64> for Arg {
    fn from(x: u64) -> Arg {
        Arg::U64(x)
    }
}
impl From<f32> for Arg {
    fn from(x: f32) -> Arg {
        Arg::F32(x)
    }
}

/// Device memory that is given back when its last [`Buffer`] goes.
pub(crate) trait Memory: Send + Sync {}

/// Device memory, or a part of it: clones and slices share the allocation.
#[derive(Clone)]
pub struct Buffer {
    address: u64,
    bytes: usize,
    memory: Arc<dyn Memory>,
}

impl Buffer {
    pub(crate) fn new(address: u64, bytes: usize, memory: Arc<dyn Memory>) -> Buffer {
        Buffer { address, bytes, memory }
    }

    /// Device address of the first byte.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The part of `bytes` bytes from byte `offset` on.
    ///
    /// # Errors
    /// [`Error::Internal`] where that is not inside the buffer.
    pub fn slice(&self, offset: usize, bytes: usize) -> Result<Buffer> {
        match offset.checked_add(bytes) {
            Some(end) if end <= self.bytes => {
                Ok(Buffer { address: self.address + offset as u64, bytes, memory: self.memory.clone() })
            }
            _ => Err(Error::Internal(format!(
                "a slice of {bytes} bytes at {offset} does not fit a device buffer of {} bytes",
                self.bytes
            ))),
        }
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{}", self.address, self.bytes)
    }
}

/// The same memory: address and size.
impl PartialEq for Buffer {
    fn eq(&self, other: &Buffer) -> bool {
        (self.address, self.bytes) == (other.address, other.bytes)
    }
}

/// One launch with everything that decides what it does.
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    pub kernel: &'static Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Dynamic shared memory, bytes.
    pub shared: u32,
    pub args: Vec<Arg>,
}

/// One step of a captured graph.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    Launch(Launch),
    Copy { to: Buffer, from: Buffer },
    Fill { to: Buffer, byte: u8 },
}

impl Node {
    /// Asks for this step: done now, or recorded where this thread captures a graph.
    ///
    /// # Errors
    /// As [`Device::launch`].
    pub fn enqueue(&self, device: &dyn Device) -> Result<()> {
        match self {
            Node::Launch(Launch { kernel, grid, shared, args }) => {
                device.launch(kernel, *grid, *shared, args)
            }
            Node::Copy { to, from } => device.copy(to, from),
            Node::Fill { to, byte } => device.fill(to, *byte),
        }
    }
}

/// What [`Device::capture`] recorded: the steps in order, to be looked at, and the device's own form of them.
pub struct Graph {
    pub nodes: Vec<Node>,
    pub(crate) replayable: Box<dyn Any + Send + Sync>,
}

/// A moment in the device's order of work.
pub struct Event(pub(crate) Box<dyn Any + Send + Sync>);

/// Host memory the device can write, for results the host reads without waiting for the device.
pub struct Pinned {
    pub(crate) host: *mut u8,
    /// The same bytes as the device sees them.
    pub buffer: Buffer,
}

// SAFETY: the host side is read through volatile or atomic loads only, and the memory lives as long as `buffer`.
unsafe impl Send for Pinned {}
// SAFETY: as above.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// The u32 at a byte offset, as it is now; later reads see what the device had written before it.
    ///
    /// # Errors
    /// [`Error::Internal`] where the offset is not a multiple of 4 inside the buffer.
    pub fn read_u32(&self, offset: usize) -> Result<u32> {
        if !offset.is_multiple_of(4) || offset.checked_add(4).is_none_or(|end| end > self.buffer.bytes) {
            return Err(Error::Internal(format!("a read at {offset} of {} pinned bytes", self.buffer.bytes)));
        }
        // SAFETY: inside the allocation, aligned (allocations are page- or 256-byte aligned), and valid for any bits.
        let word = unsafe { std::sync::atomic::AtomicU32::from_ptr(self.host.add(offset).cast()) };
        Ok(word.load(std::sync::atomic::Ordering::Acquire))
    }
}

/// What a kernel's launches did, as far as it went through the wrappers of `ptx.cuh`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub launches: u64,
    pub blocks: u64,
    /// Bytes of streaming loads (`ld_stream`): weights.
    pub streamed: u64,
    /// Bytes of all other global loads, `cp.async` included.
    pub read: u64,
    /// Bytes of global stores and atomics.
    pub written: u64,
    /// Warp-wide `mma.m16n8k16`.
    pub mma: u64,
    /// Warp-wide shared-memory accesses looked at for bank conflicts: `ldmatrix` always, others on request.
    pub shared: u64,
    /// Extra passes those needed.
    pub conflicts: u64,
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.launches += other.launches;
        self.blocks += other.blocks;
        self.streamed += other.streamed;
        self.read += other.read;
        self.written += other.written;
        self.mma += other.mma;
        self.shared += other.shared;
        self.conflicts += other.conflicts;
    }
}

/// What was done between two tallies.
impl Sub for Counts {
    type Output = Counts;
    fn sub(self, before: Counts) -> Counts {
        Counts {
            launches: self.launches - before.launches,
            blocks: self.blocks - before.blocks,
            streamed: self.streamed - before.streamed,
            read: self.read - before.read,
            written: self.written - before.written,
            mma: self.mma - before.mma,
            shared: self.shared - before.shared,
            conflicts: self.conflicts - before.conflicts,
        }
    }
}

/// What is known about a device.
#[derive(Debug, Clone)]
pub struct Properties {
    pub name: String,
    /// Compute capability: (9, 0) for H100 and H200.
    pub capability: (u32, u32),
    pub multiprocessors: u32,
    /// Global memory, bytes.
    pub memory: u64,
    /// Second-level cache, bytes.
    pub l2: u64,
    /// The most dynamic shared memory a block may ask for, bytes.
    pub shared_per_block: u32,
    /// Highest CUDA version the driver supports: 13000 for 13.0.
    pub driver: u32,
    /// Where the card is on the PCI bus: `0000:65:00.0`. None for what is no card.
    pub pci: Option<String>,
    /// Consecutive kernels may overlap up to their `grid_wait` (programmatic dependent launch).
    pub overlap: bool,
}

/// A device and its one queue of work. Errors name the kernel or the allocation.
pub trait Device: Send + Sync {
    fn properties(&self) -> &Properties;

    /// Memory of `bytes` bytes, 256-byte aligned, contents undefined (poison in the emulator). `what` names it in errors.
    ///
    /// # Errors
    /// [`Error::Memory`] says how much was asked for, for what, and how much is free.
    fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer>;

    /// Host memory that kernels can write, zeroed.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    fn pinned(&self, bytes: usize, what: &str) -> Result<Pinned>;

    /// Free and total bytes of memory.
    ///
    /// # Errors
    /// [`Error::Internal`] with the driver's reason.
    fn memory(&self) -> Result<(u64, u64)>;

    /// Copies host bytes into a buffer of the same size; `bytes` may be reused on return.
    ///
    /// # Errors
    /// [`Error::Internal`] where sizes differ, while capturing, or from an earlier failure.
    fn upload(&self, to: &Buffer, bytes: &[u8]) -> Result<()>;

    /// Waits for everything asked for so far and copies a buffer into host bytes of the same size.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn download(&self, from: &Buffer, bytes: &mut [u8]) -> Result<()>;

    /// Copies one buffer into another of the same size.
    ///
    /// # Errors
    /// As [`Device::upload`], but allowed while capturing.
    fn copy(&self, to: &Buffer, from: &Buffer) -> Result<()>;

    /// Sets every byte of a buffer.
    ///
    /// # Errors
    /// As [`Device::copy`].
    fn fill(&self, to: &Buffer, byte: u8) -> Result<()>;

    /// Promises that no kernel launched from now on writes this memory, so that kernels may read it before their
    /// `grid_wait`; waits for those launched before. The emulator holds kernels to it.
    fn seal(&self, constant: &Buffer);

    /// Runs a kernel on `grid` blocks with `shared` bytes of dynamic shared memory.
    ///
    /// # Errors
    /// [`Error::Internal`] where the kernel does not exist, its arguments or sizes do not fit, or, in the emulator, it went
    /// wrong. A GPU reports a kernel's own failure at a later call.
    fn launch(&self, kernel: &'static Kernel, grid: [u32; 3], shared: u32, args: &[Arg]) -> Result<()>;

    /// Records what `record` asks for on this thread instead of running it; what other threads ask for runs. Nothing in it
    /// may allocate, upload, download or wait.
    ///
    /// # Errors
    /// What `record` returned, or the driver's reason.
    fn capture(&self, record: &mut dyn FnMut() -> Result<()>) -> Result<Graph>;

    /// Runs a captured graph once.
    ///
    /// # Errors
    /// As [`Device::launch`].
    fn replay(&self, graph: &Graph) -> Result<()>;

    /// Marks this moment of the order of work.
    ///
    /// # Errors
    /// [`Error::Internal`] with the driver's reason.
    fn record(&self) -> Result<Event>;

    /// Milliseconds between two events; waits for the later one.
    ///
    /// # Errors
    /// [`Error::Internal`] with the driver's reason.
    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32>;

    /// Waits for everything asked for so far.
    ///
    /// # Errors
    /// What a kernel launched earlier did wrong.
    fn synchronize(&self) -> Result<()>;

    /// What all kernels have done so far, on a device that counts it and whose times say nothing: the emulator. None on a
    /// GPU.
    fn tally(&self) -> Option<Counts> {
        None
    }

    /// Tells the device's profiler to record from now on, or no more. Nothing where there is none.
    ///
    /// # Errors
    /// [`Error::Internal`] with the driver's reason.
    fn profile(&self, _on: bool) -> Result<()> {
        Ok(())
    }

    /// Where [`Device::tally`] counts: bank conflicts of every access from now on, or of `ldmatrix` alone. Costs time.
    fn tally_conflicts(&self, _all: bool) {}
}

/// Checks shared by the implementations: a launch that no device could take.
pub(crate) fn check_launch(kernel: &Kernel, grid: [u32; 3], shared: u32) -> Result<()> {
    let wrong = |what: String| Err(Error::Internal(format!("kernel {}: {what}", kernel.name)));
    if grid.contains(&0) || grid[0] > i32::MAX as u32 || grid[1] > 65535 || grid[2] > 65535 {
        return wrong(format!(
            "a grid of {grid:?} blocks: 1 to 2147483647 in x, 1 to 65535 in y and z are possible"
        ));
    }
    if shared > kernel.max_shared {
        return wrong(format!(
            "{shared} bytes of dynamic shared memory, declared are at most {}",
            kernel.max_shared
        ));
    }
    Ok(())
}

/// The sizes of a copy's two sides, which must agree.
pub(crate) fn check_copy(to: usize, from: usize) -> Result<()> {
    if to == from {
        return Ok(());
    }
    Err(Error::Internal(format!("a copy of {from} bytes into a device buffer of {to}")))
}
