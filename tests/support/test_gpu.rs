//! The GPU of tests: the software GPU in this process, or with `DFLASH_TEST_GPU=1` the GPU of the machine.

use dflash::gpu::cuda::{Allocated, Cuda};
use dflash::gpu::device::{Arg, Buffer, Counts, Device, Event, Graph, Kernel, Pinned, Properties};
use dflash::{Error, Result};
use libloading::Library;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

/// The environment variable that makes tests run on the machine's GPU.
const REAL: &str = "DFLASH_TEST_GPU";

/// A device with a stream, memory and counters of its own.
pub struct TestGpu {
    pub cuda: Cuda,
    /// The most bytes of its allocations.
    limit: u64,
    /// The counters at the last [`TestGpu::reset_counts`].
    before: Mutex<BTreeMap<String, Counts>>,
}

/// GPUs of the software driver.
const GPUS: u32 = 16;

/// Whether tests run on the machine's GPU.
pub fn is_real() -> bool {
    std::env::var_os(REAL).is_some_and(|value| value == "1")
}

/// Opens the device of tests. The software driver has several GPUs, which are taken in turn: tests that run at the same
/// time would wait for each other's work when they free memory of the same one.
pub fn open() -> Cuda {
    static OPENED: AtomicU32 = AtomicU32::new(0);
    load_software_gpu();
    let gpu = if is_real() { 0 } else { OPENED.fetch_add(1, Ordering::Relaxed) % GPUS };
    let cuda = Cuda::open(gpu).unwrap_or_else(|e| panic!("{e} (kernel tests need nvcc: tools/get-nvcc.sh)"));
    assert_eq!(
        cuda.properties().software,
        !is_real(),
        "the driver is that of {}: expected the machine's with {REAL}=1, else the software GPU's",
        cuda.properties().name
    );
    // tools/gpu-check.sh looks for this line.
    println!("on {}", cuda.properties().name);
    cuda
}

/// Loads the software GPU's driver, except with [`REAL`]. Its SONAME is `libcuda.so.1`. The engine asks for `libcuda.so`
/// first, which a machine with a GPU has: an empty library of that SONAME that needs the driver comes before it.
pub fn load_software_gpu() {
    static DRIVER: OnceLock<[Library; 2]> = OnceLock::new();
    if is_real() {
        return;
    }
    DRIVER.get_or_init(|| {
        let driver = softgpu::driver_folder().expect("cargo builds the software GPU with its tests");
        let driver = driver.join("libcuda.so.1");
        let folder = tempfile::tempdir().unwrap();
        let alias = folder.path().join("libcuda.so");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-Wl,-soname,libcuda.so", "-Wl,--no-as-needed"])
            .arg(&driver)
            .arg("-o")
            .arg(&alias);
        assert!(cc.status().unwrap().success(), "cc makes no library");
        // SAFETY: the libraries start nothing when they are loaded.
        let loaded = [driver, alias].map(|path| unsafe { Library::new(path) }.unwrap());
        set_option(&loaded[0], c"devices", GPUS);
        loaded
    });
}

/// Makes the software GPU take a schedule from the next launch on, in all threads: 0 in order, 1 reversed, others
/// random with this seed. Does nothing on a GPU.
pub fn set_schedule(schedule: usize) {
    load_software_gpu();
    // SAFETY: the driver is loaded.
    set_option(&unsafe { Library::new("libcuda.so.1") }.unwrap(), c"schedule", schedule);
}

/// Sets an option of the driver if it is the software GPU's.
fn set_option(driver: &Library, name: &CStr, value: impl ToString) {
    type SetOption = unsafe extern "C" fn(*const c_char, *const c_char) -> i32;
    let value = CString::new(value.to_string()).unwrap();
    // SAFETY: a function of this name has these types.
    unsafe {
        if let Ok(set) = driver.get::<SetOption>(b"softgpuSetOption") {
            assert_eq!(set(name.as_ptr(), value.as_ptr()), 0);
        }
    }
}

impl TestGpu {
    pub fn new() -> TestGpu {
        TestGpu::with_memory(u64::MAX)
    }

    /// A device with counters; `None` on the machine's GPU, which has none.
    pub fn counting() -> Option<TestGpu> {
        Some(TestGpu::new()).filter(|gpu| gpu.properties().software)
    }

    /// A device on which an allocation fails that would exceed `bytes` bytes in all.
    pub fn with_memory(bytes: u64) -> TestGpu {
        TestGpu { cuda: open(), limit: bytes, before: Mutex::default() }
    }

    pub fn allocated(&self) -> Allocated {
        self.cuda.allocated()
    }

    /// The counters of each kernel since the last [`TestGpu::reset_counts`].
    pub fn counts(&self) -> BTreeMap<String, Counts> {
        let mut counts = self.counters_by_kernel().expect("only the software GPU counts");
        for (kernel, before) in &*self.before.lock().unwrap() {
            *counts.get_mut(kernel).unwrap() = counts[kernel] - *before;
        }
        counts.retain(|_, counts| counts.launches > 0);
        counts
    }

    pub fn reset_counts(&self) {
        *self.before.lock().unwrap() = self.counters_by_kernel().expect("only the software GPU counts");
    }
}

impl Device for TestGpu {
    fn properties(&self) -> &Properties {
        self.cuda.properties()
    }
    fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer> {
        let used = self.allocated().bytes as u64;
        if used + bytes as u64 > self.limit {
            let free = self.limit - used;
            let limit = self.limit;
            let sentence =
                format!("not enough GPU memory for {what}: {bytes} bytes needed, {free} free of {limit}");
            return Err(Error::Memory(sentence));
        }
        self.cuda.allocate(bytes, what)
    }
    fn load(&self, kernels: &[&'static Kernel], loaded: &(dyn Fn(&'static Kernel) + Sync)) -> Result<()> {
        self.cuda.load(kernels, loaded)
    }
    fn pinned(&self, bytes: usize, what: &str) -> Result<Pinned> {
        self.cuda.pinned(bytes, what)
    }
    fn memory(&self) -> Result<(u64, u64)> {
        let (free, total) = self.cuda.memory()?;
        let left = self.limit - self.allocated().bytes as u64;
        Ok((free.min(left), total.min(self.limit)))
    }
    fn upload(&self, to: &Buffer, bytes: &[u8]) -> Result<()> {
        self.cuda.upload(to, bytes)
    }
    fn download(&self, from: &Buffer, bytes: &mut [u8]) -> Result<()> {
        self.cuda.download(from, bytes)
    }
    fn copy(&self, to: &Buffer, from: &Buffer) -> Result<()> {
        self.cuda.copy(to, from)
    }
    fn fill(&self, to: &Buffer, byte: u8) -> Result<()> {
        self.cuda.fill(to, byte)
    }
    fn seal(&self, constant: &Buffer) {
        self.cuda.seal(constant);
    }
    fn launch(&self, kernel: &'static Kernel, grid: [u32; 3], shared: u32, args: &[Arg]) -> Result<()> {
        self.cuda.launch(kernel, grid, shared, args)
    }
    fn capture(&self, record: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        self.cuda.capture(record)
    }
    fn replay(&self, graph: &Graph) -> Result<()> {
        self.cuda.replay(graph)
    }
    fn record(&self) -> Result<Event> {
        self.cuda.record()
    }
    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32> {
        self.cuda.elapsed(from, to)
    }
    fn synchronize(&self) -> Result<()> {
        self.cuda.synchronize()
    }
    fn counters_by_kernel(&self) -> Option<BTreeMap<String, Counts>> {
        self.cuda.counters_by_kernel()
    }
}
