//! [`Device`] on a GPU, through the CUDA driver API. The driver library is loaded when the first device is
//! opened. No other part of CUDA is needed at run time.
//!
//! The binary holds the kernels as PTX for two targets: compute_90 for GPUs from Hopper on, compute_80 for
//! those from Ampere on. Kernels with wgmma, which only Hopper has, are compiled for compute_90a. Kernels may
//! overlap their predecessor unless they are compiled for compute_80, where `grid_wait` is empty. All work is
//! on one stream; graphs are captured from it.

use crate::gpu::device::{
    Arg, Buffer, Counts, Device, Event, Graph, Kernel, Launch, Memory, Node, Pinned, Properties, check_copy,
    check_launch,
};
use crate::gpu::ptx::{self, MODULES, Module};
use crate::gpu::software::SoftwareGpu;
use crate::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;
use std::any::Any;
use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString, c_void};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

/// The oldest CUDA version whose driver accepts the PTX of the pinned nvcc and has every function that this
/// file calls.
const MIN_DRIVER: u32 = 13000;

/// Dynamic shared memory per block, in bytes, that a kernel can use without raising its limit.
const DEFAULT_SHARED: u32 = 48 << 10;

/// A device's primary context and the stream. Every allocation, graph and event holds it, so it is freed
/// last.
struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Held while the stream is captured. Waiting for the stream during a capture is an error.
    capturing: Mutex<()>,
    allocated: Mutex<Allocated>,
}

// SAFETY: contexts and streams are handles that any thread may use, and every use binds the context first.
unsafe impl Send for Context {}
// SAFETY: as for Send; the driver synchronizes concurrent calls.
unsafe impl Sync for Context {}

impl Context {
    /// Makes the context current on this thread, which nearly every driver call needs.
    fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained until `self` is dropped.
        check("binding the context", unsafe { result::ctx::set_current(self.context) })
    }

    /// Waits until no enqueued work uses the memory or graph, then calls `free`. Failures are ignored,
    /// because this runs in destructors.
    fn free(&self, free: impl FnOnce() -> std::result::Result<(), DriverError>) {
        let _capturing = lock(&self.capturing);
        if self.bind().is_ok() {
            // SAFETY: the stream is valid, and not captured while the lock is held.
            let _ = unsafe { result::stream::synchronize(self.stream) };
            let _ = free();
        }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: `Cuda::with` retained the context and created the stream, and both are released once.
        // Failures are ignored, because a destructor cannot handle them.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::synchronize(self.stream);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// Device memory in use by one [`Cuda`], without page-locked memory and what the driver needs itself.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Allocated {
    /// Number of buffers.
    pub buffers: usize,
    /// Bytes of all buffers.
    pub bytes: usize,
    /// The maximum of `bytes` so far.
    pub peak: usize,
}

/// One allocation on the device.
struct DeviceMemory {
    address: sys::CUdeviceptr,
    bytes: usize,
    context: Arc<Context>,
}

impl Memory for DeviceMemory {}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // SAFETY: allocated with `malloc_sync`, freed once, and `free` has waited for all work.
        self.context.free(|| unsafe { result::free_sync(self.address) });
        let mut allocated = lock(&self.context.allocated);
        allocated.buffers -= 1;
        allocated.bytes -= self.bytes;
    }
}

/// One page-locked allocation on the host.
struct HostMemory {
    host: *mut c_void,
    context: Arc<Context>,
}

// SAFETY: the pointer is used only to free the memory.
unsafe impl Send for HostMemory {}
// SAFETY: as for Send; no method uses the pointer.
unsafe impl Sync for HostMemory {}

impl Memory for HostMemory {}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated with `malloc_host`, freed once, and `free` has waited for all work.
        self.context.free(|| unsafe { result::free_host(self.host) });
    }
}

struct CudaEvent {
    event: sys::CUevent,
    context: Arc<Context>,
}

// SAFETY: an event is a handle that any thread may use.
unsafe impl Send for CudaEvent {}
// SAFETY: as for Send; the driver synchronizes concurrent calls.
unsafe impl Sync for CudaEvent {}

impl Drop for CudaEvent {
    fn drop(&mut self) {
        if self.context.bind().is_ok() {
            // SAFETY: created in `record`, destroyed once; the driver defers this until the stream has passed
            // the event.
            let _ = unsafe { result::event::destroy(self.event) };
        }
    }
}

/// An executable graph. The nodes of its [`Graph`] keep the buffers alive.
struct CudaGraph {
    executable: sys::CUgraphExec,
    context: Arc<Context>,
}

// SAFETY: a graph is a handle that any thread may use, one at a time, and launches hold the device's lock.
unsafe impl Send for CudaGraph {}
// SAFETY: as for Send.
unsafe impl Sync for CudaGraph {}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        // SAFETY: instantiated in `instantiate`, destroyed once, and `free` has waited for all work.
        self.context.free(|| unsafe { result::graph::exec_destroy(self.executable) });
    }
}

/// An entry point of a loaded module, and the bytes of each of its parameters.
#[derive(Clone)]
struct Function {
    handle: sys::CUfunction,
    sizes: Arc<[usize]>,
}

/// The device's mutable state. Its lock serializes the calls of several threads.
#[derive(Default)]
struct State {
    /// Loaded kernels, by file and entry point.
    functions: BTreeMap<(&'static str, &'static str), Function>,
    /// The steps of each thread that captures a graph.
    recording: HashMap<ThreadId, Vec<Node>>,
}

// SAFETY: function handles are valid on every thread while their module is loaded.
unsafe impl Send for State {}

/// A GPU as a [`Device`].
pub struct Cuda {
    properties: Properties,
    state: Mutex<State>,
    modules: &'static [Module],
    context: Arc<Context>,
}

/// Turns a driver error into a sentence with the failed operation and the driver's reason.
fn check<T>(what: &str, result: std::result::Result<T, DriverError>) -> Result<T> {
    result.map_err(|e| Error::Internal(format!("CUDA: {what} failed: {}", reason(e))))
}

pub(super) fn reason(error: DriverError) -> String {
    let text = |s: std::result::Result<&CStr, DriverError>| s.map(|s| s.to_string_lossy().into_owned());
    match (text(error.error_string()), text(error.error_name())) {
        (Ok(words), Ok(name)) => format!("{words} ({name})"),
        _ => format!("error {}", error.0 as u32),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The newest CUDA version that the driver supports: 13000 for 13.0. `None` without a driver.
///
/// # Errors
/// [`Error::Internal`] if the driver does not report it.
pub fn driver_version() -> Result<Option<u32>> {
    // SAFETY: this only tries to load the driver library. Without this check the first driver call would
    // panic.
    if !unsafe { sys::is_culib_present() } {
        return Ok(None);
    }
    let mut version = 0;
    // SAFETY: writes one int, and works before the driver is initialized.
    check("asking for the driver's version", unsafe { sys::cuDriverGetVersion(&mut version) }.result())?;
    Ok(Some(u32::try_from(version).unwrap_or(0)))
}

impl Cuda {
    /// Opens GPU number `ordinal`. A kernel is loaded by [`Device::load`], or before its first launch or
    /// capture; the driver compiles its PTX in the first run and caches the result for later runs.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the binary has no CUDA kernels, or the machine has no driver, no such GPU, a
    /// driver too old for the kernels, or a GPU older than sm_80. [`Error::Internal`] if the driver refuses the
    /// first module.
    pub fn open(ordinal: u32) -> Result<Cuda> {
        Cuda::with(MODULES, ordinal)
    }

    /// The properties of GPU number `ordinal`, without loading kernels.
    ///
    /// # Errors
    /// [`Error::Unsupported`] as [`Cuda::open`] for the machine, the driver and the GPU.
    pub fn probe(ordinal: u32) -> Result<Properties> {
        Ok(Cuda::find(ordinal)?.1)
    }

    /// Checks the driver and the GPU.
    fn find(ordinal: u32) -> Result<(sys::CUdevice, Properties)> {
        let unsupported = |what: String| Err(Error::Unsupported(what));
        let Some(driver) = driver_version()? else {
            return unsupported(
                "device cuda: no NVIDIA driver on this machine (libcuda.so.1 was not found)".to_string(),
            );
        };
        if driver < MIN_DRIVER {
            return unsupported(format!(
                "device cuda: the NVIDIA driver supports CUDA {}.{}, expected {}.{} or newer (driver 580 or newer)",
                driver / 1000,
                driver % 1000 / 10,
                MIN_DRIVER / 1000,
                MIN_DRIVER % 1000 / 10
            ));
        }
        if let Err(e) = result::init() {
            return unsupported(match e.0 {
                sys::CUresult::CUDA_ERROR_NO_DEVICE => "device cuda: the driver sees no GPU".to_string(),
                _ => format!("device cuda: the driver does not start: {}", reason(e)),
            });
        }
        let count = check("counting GPUs", result::device::get_count())?;
        let number = match i32::try_from(ordinal) {
            Ok(number) if number < count => number,
            _ => {
                return unsupported(format!("device cuda: no GPU number {ordinal}, the driver sees {count}"));
            }
        };
        let device = check("opening the GPU", result::device::get(number))?;
        let properties = properties(device, driver)?;
        let (major, minor) = properties.capability;
        if major < 8 {
            return unsupported(format!(
                "device cuda: {} has compute capability {major}.{minor}, expected 8.0 or newer",
                properties.name
            ));
        }
        Ok((device, properties))
    }

    fn with(from: &'static [Module], ordinal: u32) -> Result<Cuda> {
        if from.is_empty() {
            return Err(Error::Unsupported(
                "device cuda: this binary was built without nvcc and has no CUDA kernels".to_string(),
            ));
        }
        let (device, properties) = Cuda::find(ordinal)?;
        // SAFETY: `device` came from the driver; `Context` releases the context when it drops.
        let context = check("creating a context", unsafe { result::primary_ctx::retain(device) })?;
        // SAFETY: the context was just retained.
        let bound = unsafe { result::ctx::set_current(context) };
        let stream = bound.and_then(|()| result::stream::create(result::stream::StreamKind::NonBlocking));
        let stream = match stream {
            Ok(stream) => stream,
            Err(e) => {
                // SAFETY: retained above, and not yet owned by a `Context`.
                let _ = unsafe { result::primary_ctx::release(device) };
                return check("creating a stream", Err(e));
            }
        };
        let context = Arc::new(Context {
            device,
            context,
            stream,
            capturing: Mutex::default(),
            allocated: Mutex::default(),
        });
        // A driver that takes the smallest kernels takes the others.
        let smallest = from.iter().min_by_key(|module| module.images[0].1.len());
        for (module, kernel) in
            smallest.into_iter().flat_map(|m| m.kernels(properties.capability).map(move |k| (m, k)))
        {
            ptx::load(module, kernel, properties.capability, properties.driver)?;
        }
        Ok(Cuda { properties, state: Mutex::default(), modules: from, context })
    }

    /// The memory in use.
    pub fn allocated(&self) -> Allocated {
        *lock(&self.context.allocated)
    }

    /// A loaded kernel. The first call loads it.
    fn function(&self, state: &mut State, kernel: &'static Kernel) -> Result<Function> {
        let key = (kernel.file, kernel.name);
        if let Some(function) = state.functions.get(&key) {
            return Ok(function.clone());
        }
        let function = self.load_kernel(kernel)?;
        state.functions.insert(key, function.clone());
        Ok(function)
    }

    /// Loads a kernel and checks it against its declaration. The context must be bound.
    fn load_kernel(&self, kernel: &'static Kernel) -> Result<Function> {
        let wrong = |what: String| Error::Internal(format!("kernel {}: {what}", kernel.name));
        let Some(module) = self.modules.iter().find(|module| module.file == kernel.file) else {
            return Err(wrong(format!("this binary has no CUDA module {}", kernel.file)));
        };
        let module = ptx::load(module, kernel.name, self.properties.capability, self.properties.driver)?;
        let name = CString::new(kernel.name).map_err(|_| wrong("a name with a zero byte".to_string()))?;
        let what = format!("finding kernel {}", kernel.name);
        // SAFETY: the module stays loaded as long as the context.
        let handle = check(&what, unsafe { result::module::get_function(module, name) })?;
        // SAFETY: the handle is valid. The function is loaded here, because otherwise its first launch would
        // load it, possibly during a capture.
        check(&what, unsafe { sys::cuFuncLoad(handle) }.result())?;
        let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK;
        // SAFETY: the handle is valid.
        let threads = check(&what, unsafe { result::function::get_function_attribute(handle, limit) })?;
        // The launch bounds are the block size. The software GPU reports them, so tests find code for another one; a
        // GPU may allow more.
        let threads = u32::try_from(threads).unwrap_or(0);
        if threads < kernel.threads || self.properties.software && threads != kernel.threads {
            return Err(wrong(format!(
                "compiled for {threads} threads per block, but launched with {}",
                kernel.threads
            )));
        }
        kernel.check_shared(&self.properties)?;
        if kernel.max_shared > DEFAULT_SHARED {
            let size = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            let what =
                format!("asking for {} bytes of shared memory for kernel {}", kernel.max_shared, kernel.name);
            // SAFETY: the handle is valid; the value is at most `shared_per_block`, which fits an int.
            check(&what, unsafe {
                result::function::set_function_attribute(handle, size, kernel.max_shared as i32)
            })?;
        }
        // All kernels ask for the same division of an SM's memory into L1 cache and shared memory, the largest
        // shared memory. An SM must be empty to change it, so a kernel that asked for another one could not
        // start beside its predecessor.
        let carveout = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
        // SAFETY: the handle is valid; the value is a percentage.
        check(&what, unsafe { result::function::set_function_attribute(handle, carveout, 100) })?;
        let mut sizes = Vec::new();
        let (mut offset, mut size) = (0, 0);
        // SAFETY: the handle is valid, and the driver refuses an index that is out of range, which ends the
        // loop.
        while unsafe { sys::cuFuncGetParamInfo(handle, sizes.len(), &mut offset, &mut size) }.result().is_ok()
        {
            sizes.push(size);
        }
        Ok(Function { handle, sizes: sizes.into() })
    }

    /// Enqueues a launch on the stream, or adds it to the graph that is captured from the stream.
    fn issue(&self, state: &mut State, launch: &Launch) -> Result<()> {
        let Launch { kernel, grid, shared, args } = launch;
        let function = self.function(state, kernel)?;
        let short = |arg: &Arg| matches!(arg, Arg::U32(_) | Arg::I32(_) | Arg::F32(_));
        let given: Vec<usize> = args.iter().map(|arg| if short(arg) { 4 } else { 8 }).collect();
        if *given != *function.sizes {
            return Err(Error::Internal(format!(
                "kernel {}: arguments of {given:?} bytes, but its parameters have {:?}",
                kernel.name, function.sizes
            )));
        }
        let mut words: Vec<u64> = args.iter().map(Arg::word).collect();
        let mut pointers: Vec<*mut c_void> = words.iter_mut().map(|w| (w as *mut u64).cast()).collect();
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: kernel.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: *shared,
            hStream: self.context.stream,
            attrs: &mut overlap,
            // `overlap` is not set with compute_80 kernels, because `grid_wait` is empty in them.
            numAttrs: u32::from(self.properties.overlap),
        };
        let what = format!("launching kernel {}", kernel.name);
        // SAFETY: there are as many arguments as parameters and each has its size (checked above); a 4-byte
        // argument is in the first bytes of its little-endian word. The driver copies arguments and
        // attributes before it returns. Buffers outlive the kernel: dropping one waits for the stream, and a
        // graph's nodes hold theirs.
        check(&what, unsafe {
            sys::cuLaunchKernelEx(&config, function.handle, pointers.as_mut_ptr(), std::ptr::null_mut())
                .result()
        })
    }

    fn issue_copy(&self, to: &Buffer, from: &Buffer) -> Result<()> {
        if to.bytes() == 0 {
            return Ok(());
        }
        // SAFETY: both buffers are allocated and have this many bytes; freeing one waits for the stream.
        check("a copy on the device", unsafe {
            result::memcpy_dtod_async(to.address(), from.address(), to.bytes(), self.context.stream)
        })
    }

    fn issue_fill(&self, to: &Buffer, byte: u8) -> Result<()> {
        if to.bytes() == 0 {
            return Ok(());
        }
        // SAFETY: the buffer is allocated and has this many bytes; freeing it waits for the stream.
        check("filling device memory", unsafe {
            result::memset_d8_async(to.address(), byte, to.bytes(), self.context.stream)
        })
    }

    fn issue_node(&self, state: &mut State, node: &Node) -> Result<()> {
        match node {
            Node::Launch(launch) => self.issue(state, launch),
            Node::Copy { to, from } => self.issue_copy(to, from),
            Node::Fill { to, byte } => self.issue_fill(to, *byte),
        }
    }

    /// Records the step if this thread captures a graph, otherwise enqueues it.
    fn run_or_record(&self, node: Node) -> Result<()> {
        let mut state = lock(&self.state);
        if let Some(nodes) = state.recording.get_mut(&thread::current().id()) {
            nodes.push(node);
            return Ok(());
        }
        self.context.bind()?;
        self.issue_node(&mut state, &node)
    }

    /// Takes the device's lock and binds the context for `what`, an operation that cannot be part of a graph.
    /// It is an error while this thread captures one.
    fn immediate(&self, what: &str) -> Result<MutexGuard<'_, State>> {
        let state = lock(&self.state);
        if state.recording.contains_key(&thread::current().id()) {
            return Err(Error::Internal(format!("{what} while a graph is captured")));
        }
        self.context.bind()?;
        Ok(state)
    }

    /// Captures the steps from the stream into an executable graph.
    fn instantiate(&self, state: &mut State, nodes: &[Node]) -> Result<CudaGraph> {
        for node in nodes {
            if let Node::Launch(launch) = node {
                self.function(state, launch.kernel)?;
            }
        }
        let stream = self.context.stream;
        let capturing = lock(&self.context.capturing);
        // SAFETY: the stream is valid and not capturing, because `capturing` was free.
        check("starting a capture", unsafe {
            result::stream::begin_capture(stream, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED)
        })?;
        let issued = nodes.iter().try_for_each(|node| self.issue_node(state, node));
        // SAFETY: the stream is capturing; the capture ends whether its steps succeeded or not.
        let graph = check("ending a capture", unsafe { result::stream::end_capture(stream) });
        drop(capturing);
        if let (Err(_), Ok(graph)) = (&issued, &graph) {
            // SAFETY: the graph is valid and not used again.
            let _ = unsafe { result::graph::destroy(*graph) };
        }
        let graph = issued.and(graph)?;
        // SAFETY: the graph is valid and destroyed once; its executable form does not need it.
        let executable = unsafe {
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            let _ = result::graph::destroy(graph);
            check("instantiating a graph", executable)?
        };
        let graph = CudaGraph { executable, context: self.context.clone() };
        // SAFETY: executable and stream are valid.
        check("uploading a graph", unsafe { result::graph::upload(graph.executable, stream) })?;
        Ok(graph)
    }
}

fn properties(device: sys::CUdevice, driver: u32) -> Result<Properties> {
    use sys::CUdevice_attribute as A;
    let ask = |attribute| -> Result<u32> {
        // SAFETY: `device` came from the driver.
        let value = check("asking for the GPU's properties", unsafe {
            result::device::get_attribute(device, attribute)
        })?;
        Ok(u32::try_from(value).unwrap_or(0))
    };
    let capability = (
        ask(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        ask(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    Ok(Properties {
        name: check("asking for the GPU's name", result::device::get_name(device))?,
        capability,
        multiprocessors: ask(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        // SAFETY: `device` came from the driver.
        memory: check("asking for the GPU's memory", unsafe { result::device::total_mem(device) })? as u64,
        l2: u64::from(ask(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?),
        shared_per_block: ask(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        driver,
        pci: pci(device),
        overlap: capability >= (9, 0),
        software: SoftwareGpu::find().is_some(),
    })
}

/// The GPU's PCI bus id; `None` if the driver does not report it.
fn pci(device: sys::CUdevice) -> Option<String> {
    let mut text = [0u8; 32];
    // SAFETY: the driver writes at most `text.len()` bytes, the terminating zero included.
    let result = unsafe { sys::cuDeviceGetPCIBusId(text.as_mut_ptr().cast(), text.len() as i32, device) };
    let text = result.result().ok().and_then(|()| CStr::from_bytes_until_nul(&text).ok())?;
    text.to_str().ok().map(String::from)
}

impl Device for Cuda {
    fn properties(&self) -> &Properties {
        &self.properties
    }

    fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer> {
        let _state = self.immediate("an allocation")?;
        // SAFETY: the memory is undefined, as the trait says, and the context is bound.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(address) => {
                let mut allocated = lock(&self.context.allocated);
                allocated.buffers += 1;
                allocated.bytes += bytes;
                allocated.peak = allocated.peak.max(allocated.bytes);
                drop(allocated);
                let memory = DeviceMemory { address, bytes, context: self.context.clone() };
                Ok(Buffer::new(address, bytes, Arc::new(memory)))
            }
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => {
                let (free, total) = check("asking for free memory", result::mem_get_info())?;
                Err(Error::Memory(format!(
                    "not enough GPU memory for {what}: {} needed, {} free of {}",
                    gib(bytes),
                    gib(free),
                    gib(total)
                )))
            }
            Err(e) => check(&format!("allocating {bytes} bytes for {what}"), Err(e)),
        }
    }

    fn pinned(&self, bytes: usize, what: &str) -> Result<Pinned> {
        let _state = self.immediate("an allocation")?;
        let what = format!("allocating {bytes} bytes of page-locked memory for {what}");
        let flags = sys::CU_MEMHOSTALLOC_DEVICEMAP | sys::CU_MEMHOSTALLOC_PORTABLE;
        // SAFETY: the memory is written below before it is read, and the context is bound.
        let host = check(&what, unsafe { result::malloc_host(bytes.max(1), flags) })?;
        let memory = HostMemory { host, context: self.context.clone() };
        let mut address = 0;
        // SAFETY: `host` was just allocated with this size and mapped for the device.
        unsafe {
            host.cast::<u8>().write_bytes(0, bytes);
            check(&what, sys::cuMemHostGetDevicePointer_v2(&mut address, host, 0).result())?;
        }
        Ok(Pinned { host: host.cast(), buffer: Buffer::new(address, bytes, Arc::new(memory)) })
    }

    fn memory(&self) -> Result<(u64, u64)> {
        self.context.bind()?;
        let (free, total) = check("asking for free memory", result::mem_get_info())?;
        Ok((free as u64, total as u64))
    }

    fn upload(&self, to: &Buffer, bytes: &[u8]) -> Result<()> {
        check_copy(to.bytes(), bytes.len())?;
        let _state = self.immediate("an upload")?;
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the sizes agree, and the borrowed source outlives the copy, because this waits for it.
        check("copying to the GPU", unsafe {
            result::memcpy_htod_async(to.address(), bytes, self.context.stream)
                .and_then(|()| result::stream::synchronize(self.context.stream))
        })
    }

    fn download(&self, from: &Buffer, bytes: &mut [u8]) -> Result<()> {
        check_copy(bytes.len(), from.bytes())?;
        let _state = self.immediate("a download")?;
        if bytes.is_empty() {
            return Ok(());
        }
        // SAFETY: the sizes agree, and the borrowed destination outlives the copy, because this waits for it.
        check("copying from the GPU", unsafe {
            result::memcpy_dtoh_async(bytes, from.address(), self.context.stream)
                .and_then(|()| result::stream::synchronize(self.context.stream))
        })
    }

    fn copy(&self, to: &Buffer, from: &Buffer) -> Result<()> {
        check_copy(to.bytes(), from.bytes())?;
        self.run_or_record(Node::Copy { to: to.clone(), from: from.clone() })
    }

    fn fill(&self, to: &Buffer, byte: u8) -> Result<()> {
        self.run_or_record(Node::Fill { to: to.clone(), byte })
    }

    /// Waits for the kernels that wrote the memory, because a kernel that reads it before its `grid_wait`
    /// does not wait for them. The next call reports a failure.
    fn seal(&self, _constant: &Buffer) {
        let _ = self.synchronize();
    }

    fn load(&self, kernels: &[&'static Kernel], loaded: &(dyn Fn(&'static Kernel) + Sync)) -> Result<()> {
        let next = AtomicUsize::new(0);
        let work = || -> Result<()> {
            self.context.bind()?;
            while let Some(kernel) = kernels.get(next.fetch_add(1, Ordering::Relaxed)) {
                // The lock is not held while the driver compiles.
                let key = (kernel.file, kernel.name);
                if !lock(&self.state).functions.contains_key(&key) {
                    let function = self.load_kernel(kernel)?;
                    lock(&self.state).functions.insert(key, function);
                }
                loaded(kernel);
            }
            Ok(())
        };
        thread::scope(|scope| {
            let others = 1..thread::available_parallelism().map_or(1, usize::from).min(kernels.len());
            // This thread works too, so the kernels are loaded even if no other thread can be started.
            let others: Vec<_> =
                others.filter_map(|_| thread::Builder::new().spawn_scoped(scope, work).ok()).collect();
            let panicked = |_| Err(Error::Internal("a thread that loads kernels has panicked".to_string()));
            let own = work();
            others.into_iter().map(|other| other.join().unwrap_or_else(panicked)).fold(own, Result::and)
        })
    }

    fn launch(&self, kernel: &'static Kernel, grid: [u32; 3], shared: u32, args: &[Arg]) -> Result<()> {
        check_launch(kernel, grid, shared)?;
        self.run_or_record(Node::Launch(Launch { kernel, grid, shared, args: args.to_vec() }))
    }

    fn capture(&self, record: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        // The steps are first recorded and then captured together. So an error in `record` leaves no capture
        // open, and every kernel is loaded before the capture starts.
        let thread = thread::current().id();
        self.immediate("a capture")?.recording.insert(thread, Vec::new());
        let result = record();
        let mut state = lock(&self.state);
        let nodes = state.recording.remove(&thread).unwrap_or_default();
        result?;
        self.context.bind()?;
        let graph = self.instantiate(&mut state, &nodes)?;
        Ok(Graph { nodes, replayable: Box::new(graph) })
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        let _state = self.immediate("a replay")?;
        let graph = graph.replayable.downcast_ref::<CudaGraph>();
        let Some(graph) = graph.filter(|graph| Arc::ptr_eq(&graph.context, &self.context)) else {
            return Err(Error::Internal("a graph of another device".to_string()));
        };
        // SAFETY: the executable graph is valid, and the lock orders its launches.
        check("launching a graph", unsafe { result::graph::launch(graph.executable, self.context.stream) })
    }

    fn record(&self) -> Result<Event> {
        let _state = self.immediate("an event")?;
        let event = check("creating an event", result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT))?;
        let event = CudaEvent { event, context: self.context.clone() };
        // SAFETY: the event and the stream are valid.
        check("recording an event", unsafe { result::event::record(event.event, self.context.stream) })?;
        Ok(Event(Box::new(event)))
    }

    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32> {
        self.context.bind()?;
        let own = |event: &Event| -> Result<sys::CUevent> {
            let event: &dyn Any = event.0.as_ref();
            let event = event.downcast_ref::<CudaEvent>().map(|e| e.event);
            event.ok_or_else(|| Error::Internal("an event of another device".to_string()))
        };
        let (from, to) = (own(from)?, own(to)?);
        // SAFETY: both events are valid and were recorded on the same stream.
        check("timing", unsafe {
            result::event::synchronize(to).and_then(|()| result::event::elapsed(from, to))
        })
    }

    fn synchronize(&self) -> Result<()> {
        let _state = self.immediate("a wait")?;
        // SAFETY: the stream is valid.
        check("waiting for the GPU", unsafe { result::stream::synchronize(self.context.stream) })
    }

    fn counters_by_kernel(&self) -> Option<BTreeMap<String, Counts>> {
        let _state = self.immediate("reading counters").ok()?;
        SoftwareGpu::find()?.counters(self.context.stream)
    }

    fn profile(&self, on: bool) -> Result<()> {
        self.context.bind()?;
        // SAFETY: both calls only need a bound context.
        let result = unsafe { if on { sys::cuProfilerStart() } else { sys::cuProfilerStop() } };
        check("controlling the profiler", result.result())
    }
}

fn gib(bytes: usize) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1u32 << 30))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opening_a_gpu_without_kernels_is_an_error() {
        let error = Cuda::with(&[], 0).err();
        let sentence = "device cuda: this binary was built without nvcc and has no CUDA kernels";
        assert_eq!(error, Some(Error::Unsupported(sentence.into())));
    }
}
