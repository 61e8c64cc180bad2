//! The interface to a device: memory, kernel launches, graphs, events. [`crate::gpu::cuda`] and
//! [`crate::gpu::dry_run`] implement it; neither knows what a model is.
//!
//! A device has one stream: it runs everything in the order of the calls. [`Device::launch`] is safe because
//! a kernel's arguments are only numbers and buffers, and a launch or a graph keeps its buffers alive. The
//! launchers in [`crate::gpu::kernels`] guarantee that a kernel stays inside its buffers; the software GPU, on
//! which tests run the kernels, checks every access.

use crate::{Error, Result};
use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::{AddAssign, Sub};
use std::sync::Arc;

/// A kernel: one `static` for each entry point in `cuda/**/*.cu`.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Source file without path and extension: `embedding` for `cuda/model/embedding.cu`.
    pub file: &'static str,
    /// Name of the entry point.
    pub name: &'static str,
    /// Threads per block, as in the kernel's `KERNEL(...)` line.
    pub threads: u32,
    /// The most dynamic shared memory of any launch, in bytes.
    pub max_shared: u32,
}

impl Kernel {
    /// Refuses a device on which a block has too little shared memory for the kernel.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn check_shared(&self, properties: &Properties) -> Result<()> {
        let Properties { name, shared_per_block, .. } = properties;
        if self.max_shared <= *shared_per_block {
            return Ok(());
        }
        Err(Error::Unsupported(format!(
            "device cuda: kernel {} needs {} bytes of shared memory per block, {name} has {shared_per_block}",
            self.name, self.max_shared
        )))
    }
}

/// One kernel argument. A pointer is a [`Buffer`], so its memory lives as long as the launch or its graph.
#[derive(Debug, Clone, PartialEq)]
pub enum Arg {
    /// A pointer to device memory.
    Buffer(Buffer),
    /// A null pointer, if the kernel allows one.
    Null,
    /// A `u32`.
    U32(u32),
    /// An `i32`.
    I32(i32),
    /// A `u64`.
    U64(u64),
    /// An `f32`.
    F32(f32),
}

impl Arg {
    /// The parameter type of this argument as one letter: `p` pointer, `u` u32, `i` i32, `U` u64, `f` f32.
    pub fn letter(&self) -> char {
        match self {
            Arg::Buffer(_) | Arg::Null => 'p',
            Arg::U32(_) => 'u',
            Arg::I32(_) => 'i',
            Arg::U64(_) => 'U',
            Arg::F32(_) => 'f',
        }
    }

    /// The argument's bytes as a little-endian word; 4-byte arguments are in its low half.
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

/// An allocation on a device. Dropping it frees the memory.
pub(crate) trait Memory: Send + Sync {}

/// A range of device memory. Clones and slices share the allocation, which is freed with the last of them.
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

    /// The `bytes` bytes from byte `offset` on.
    ///
    /// # Errors
    /// [`Error::Internal`] if this range is not inside the buffer.
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

/// Buffers are equal if their addresses and sizes are equal.
impl PartialEq for Buffer {
    fn eq(&self, other: &Buffer) -> bool {
        (self.address, self.bytes) == (other.address, other.bytes)
    }
}

/// One kernel launch. The block size is the kernel's ([`Kernel::threads`]).
#[derive(Debug, Clone, PartialEq)]
pub struct Launch {
    /// The kernel.
    pub kernel: &'static Kernel,
    /// Blocks in x, y and z.
    pub grid: [u32; 3],
    /// Dynamic shared memory in bytes.
    pub shared: u32,
    /// The kernel's parameters in order.
    pub args: Vec<Arg>,
}

impl Launch {
    /// The `u32` parameters in order.
    pub fn numbers(&self) -> Vec<usize> {
        let number = |arg: &Arg| if let Arg::U32(x) = arg { Some(*x as usize) } else { None };
        self.args.iter().filter_map(number).collect()
    }
}

/// One step of a captured graph.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    /// A kernel launch.
    Launch(Launch),
    /// A copy between two buffers of the same size.
    Copy {
        /// Destination.
        to: Buffer,
        /// Source.
        from: Buffer,
    },
    /// Every byte of a buffer set to one value.
    Fill {
        /// Destination.
        to: Buffer,
        /// The value.
        byte: u8,
    },
}

impl Node {
    /// Enqueues this step on `device`, or records it if this thread captures a graph.
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

/// A captured graph: its steps, and the device's own executable form of them.
pub struct Graph {
    /// The steps in order.
    pub nodes: Vec<Node>,
    pub(crate) replayable: Box<dyn Any + Send + Sync>,
}

/// A point in the device's stream, for timing.
pub struct Event(pub(crate) Box<dyn Any + Send + Sync>);

/// Page-locked host memory that kernels can write, for results that the host polls.
pub struct Pinned {
    pub(crate) host: *mut u8,
    /// The same bytes in the device's address space.
    pub buffer: Buffer,
}

// SAFETY: `host` is only read, through atomic loads, and its memory lives as long as `buffer`.
unsafe impl Send for Pinned {}
// SAFETY: as for Send; concurrent atomic loads do not race.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Reads the u32 at a byte offset with acquire ordering: later reads see everything that the device wrote
    /// before it.
    ///
    /// # Errors
    /// [`Error::Internal`] if the offset is not a multiple of 4 inside the buffer.
    pub fn read_u32(&self, offset: usize) -> Result<u32> {
        if !offset.is_multiple_of(4) || offset.checked_add(4).is_none_or(|end| end > self.buffer.bytes) {
            return Err(Error::Internal(format!(
                "a read at byte {offset} of {} pinned bytes",
                self.buffer.bytes
            )));
        }
        // SAFETY: the word is inside the allocation and aligned, because allocations are page- or 256-byte
        // aligned; any bits are a valid u32. The host never writes it, and the device's store of an aligned
        // word is atomic.
        let word = unsafe { std::sync::atomic::AtomicU32::from_ptr(self.host.add(offset).cast()) };
        Ok(word.load(std::sync::atomic::Ordering::Acquire))
    }
}

/// Counters of kernel launches on the software GPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Kernel launches.
    pub launches: u64,
    /// Thread blocks run.
    pub blocks: u64,
    /// Bytes of loads through the read-only path (`ld.global.nc`): weights and other constants.
    pub streamed: u64,
    /// Bytes of all other global loads, `cp.async` included.
    pub read: u64,
    /// Bytes of global stores and atomics.
    pub written: u64,
    /// Warp-wide `mma.m16n8k16` instructions; a wgmma counts as the equivalent number.
    pub mma: u64,
    /// Warp-wide accesses to shared memory.
    pub shared: u64,
    /// Extra shared-memory passes that bank conflicts caused.
    pub conflicts: u64,
    /// Warp instructions of all kinds.
    pub instructions: u64,
    /// Warp instructions that divide, convert, or take roots or exponentials.
    pub slow: u64,
    /// Barriers of blocks and warps, once a warp.
    pub barriers: u64,
    /// Fences, once a warp.
    pub fences: u64,
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
        self.instructions += other.instructions;
        self.slow += other.slow;
        self.barriers += other.barriers;
        self.fences += other.fences;
    }
}

/// The difference between two readings of the counters.
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
            instructions: self.instructions - before.instructions,
            slow: self.slow - before.slow,
            barriers: self.barriers - before.barriers,
            fences: self.fences - before.fences,
        }
    }
}

/// Properties of a device.
#[derive(Debug, Clone)]
pub struct Properties {
    /// The driver's name for a card, such as `NVIDIA H200` or `software GPU (h200)`; else `dry run`.
    pub name: String,
    /// Compute capability: (9, 0) for H100 and H200.
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Global memory in bytes.
    pub memory: u64,
    /// L2 cache in bytes.
    pub l2: u64,
    /// The most dynamic shared memory that a block may request, in bytes.
    pub shared_per_block: u32,
    /// Highest CUDA version that the driver supports: 13000 for 13.0; 0 without a driver.
    pub driver: u32,
    /// PCI bus id, such as `0000:65:00.0`; `None` for a device that is not a GPU.
    pub pci: Option<String>,
    /// A kernel may start before its predecessor ends and run up to its `grid_wait` (programmatic dependent
    /// launch, `griddepcontrol.wait`).
    pub overlap: bool,
    /// Whether this is the software GPU, which counts launches and has no times.
    pub software: bool,
}

/// A device and its stream. Errors name the kernel or the allocation.
pub trait Device: Send + Sync {
    /// Name, sizes and features.
    fn properties(&self) -> &Properties;

    /// Allocates `bytes` bytes, 256-byte aligned, with undefined contents. `what` names the
    /// allocation in errors.
    ///
    /// # Errors
    /// [`Error::Memory`] says how much was requested, for what, and how much is free.
    fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer>;

    /// Loads kernels, several at the same time. A kernel that is not loaded here is loaded by its first
    /// launch. Calls `loaded` after each, on any thread.
    ///
    /// # Errors
    /// [`Error::Internal`] with the driver's reason; [`Error::Unsupported`] if the device cannot run a kernel.
    fn load(&self, _kernels: &[&'static Kernel], _loaded: &(dyn Fn(&'static Kernel) + Sync)) -> Result<()> {
        Ok(())
    }

    /// Allocates page-locked host memory that kernels can write, zeroed.
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
    /// [`Error::Internal`] if the sizes differ, this thread captures a graph, or earlier work failed.
    fn upload(&self, to: &Buffer, bytes: &[u8]) -> Result<()>;

    /// Waits for all work enqueued so far and copies a buffer into host bytes of the same size.
    ///
    /// # Errors
    /// As [`Device::upload`].
    fn download(&self, from: &Buffer, bytes: &mut [u8]) -> Result<()>;

    /// Copies one buffer into another of the same size.
    ///
    /// # Errors
    /// As [`Device::upload`], but allowed while capturing.
    fn copy(&self, to: &Buffer, from: &Buffer) -> Result<()>;

    /// Sets every byte of a buffer to `byte`.
    ///
    /// # Errors
    /// As [`Device::copy`].
    fn fill(&self, to: &Buffer, byte: u8) -> Result<()>;

    /// Declares memory constant: the caller promises that no kernel launched from now on writes it, so
    /// kernels may read it before their `grid_wait`. Waits for the kernels launched so far.
    fn seal(&self, constant: &Buffer);

    /// Runs a kernel on `grid` blocks with `shared` bytes of dynamic shared memory.
    ///
    /// # Errors
    /// [`Error::Internal`] if the kernel does not exist, if the arguments or sizes do not fit its
    /// declaration. The failure of a kernel is reported at a later call.
    fn launch(&self, kernel: &'static Kernel, grid: [u32; 3], shared: u32, args: &[Arg]) -> Result<()>;

    /// Runs `record` and records its launches, copies and fills instead of running them. Only the calls of
    /// this thread are recorded. `record` may not allocate, upload, download or wait.
    ///
    /// # Errors
    /// The error of `record`, or the driver's.
    fn capture(&self, record: &mut dyn FnMut() -> Result<()>) -> Result<Graph>;

    /// Runs a captured graph once.
    ///
    /// # Errors
    /// As [`Device::launch`].
    fn replay(&self, graph: &Graph) -> Result<()>;

    /// Records an event after all work enqueued so far.
    ///
    /// # Errors
    /// [`Error::Internal`] with the driver's reason.
    fn record(&self) -> Result<Event>;

    /// Milliseconds between two events; waits for the later one.
    ///
    /// # Errors
    /// [`Error::Internal`] with the driver's reason.
    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32>;

    /// Waits for all work enqueued so far.
    ///
    /// # Errors
    /// [`Error::Internal`] if an earlier kernel failed.
    fn synchronize(&self) -> Result<()>;

    /// The counters of all launches so far, by kernel, after waiting for them. Only the software GPU counts; its
    /// times mean nothing. `None` on other devices.
    fn counters_by_kernel(&self) -> Option<BTreeMap<String, Counts>> {
        None
    }

    /// The sum of [`Device::counters_by_kernel`].
    fn counters(&self) -> Option<Counts> {
        let mut sum = Counts::default();
        self.counters_by_kernel()?.into_values().for_each(|counts| sum += counts);
        Some(sum)
    }

    /// Starts or stops recording by the device's profiler; does nothing on a device without one.
    ///
    /// # Errors
    /// [`Error::Internal`] with the driver's reason.
    fn profile(&self, _on: bool) -> Result<()> {
        Ok(())
    }
}

/// Refuses a launch that exceeds the limits of all devices or the kernel's declared shared memory.
pub(crate) fn check_launch(kernel: &Kernel, grid: [u32; 3], shared: u32) -> Result<()> {
    let wrong = |what: String| Err(Error::Internal(format!("kernel {}: {what}", kernel.name)));
    if grid.contains(&0) || grid[0] > i32::MAX as u32 || grid[1] > 65535 || grid[2] > 65535 {
        return wrong(format!(
            "a grid of {grid:?} blocks, expected 1 to 2147483647 in x and 1 to 65535 in y and z"
        ));
    }
    if shared > kernel.max_shared {
        return wrong(format!(
            "{shared} bytes of dynamic shared memory, but it declares at most {}",
            kernel.max_shared
        ));
    }
    Ok(())
}

/// Refuses a copy whose two sides, in bytes, have different sizes.
pub(crate) fn check_copy(to: usize, from: usize) -> Result<()> {
    if to == from {
        return Ok(());
    }
    Err(Error::Internal(format!("a copy of {from} bytes into a device buffer of {to}")))
}
