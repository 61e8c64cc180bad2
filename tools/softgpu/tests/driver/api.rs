//! The driver library, opened and called as cudarc does, and a process of its own for each test.

use libloading::Library;
use std::ffi::{CStr, CString, c_void};
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::ptr::{null, null_mut};

pub const SUCCESS: i32 = 0;
pub const INVALID_VALUE: i32 = 1;
pub const OUT_OF_MEMORY: i32 = 2;
pub const NOT_INITIALIZED: i32 = 3;
pub const NO_DEVICE: i32 = 100;
pub const INVALID_DEVICE: i32 = 101;
pub const INVALID_CONTEXT: i32 = 201;
pub const NO_BINARY_FOR_GPU: i32 = 209;
pub const INVALID_PTX: i32 = 218;
pub const UNSUPPORTED_PTX_VERSION: i32 = 222;
pub const INVALID_HANDLE: i32 = 400;
pub const ILLEGAL_STATE: i32 = 401;
pub const NOT_FOUND: i32 = 500;
pub const NOT_READY: i32 = 600;
pub const ILLEGAL_ADDRESS: i32 = 700;
pub const CONTEXT_IS_DESTROYED: i32 = 709;
pub const MISALIGNED_ADDRESS: i32 = 716;
pub const LAUNCH_FAILED: i32 = 719;
pub const NOT_SUPPORTED: i32 = 801;
pub const CAPTURE_UNSUPPORTED: i32 = 900;
pub const CAPTURE_INVALIDATED: i32 = 901;
pub const CAPTURED_EVENT: i32 = 907;
pub const CAPTURE_WRONG_THREAD: i32 = 908;

pub const GLOBAL: u32 = 0;
pub const THREAD_LOCAL: u32 = 1;
pub const RELAXED: u32 = 2;
/// Attribute of a function: dynamic shared memory of a block at most.
pub const MAX_DYNAMIC_SHARED: i32 = 8;

/// `CUlaunchAttribute`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Attribute {
    pub id: u32,
    pub padding: u32,
    pub value: [u32; 16],
}

/// `CUlaunchConfig`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub shared: u32,
    pub stream: usize,
    pub attributes: *const Attribute,
    pub attribute_count: u32,
}

impl Config {
    /// Blocks of threads in a row.
    pub fn new(blocks: u32, threads: u32, stream: usize) -> Config {
        let attributes = null();
        Config {
            grid: [blocks, 1, 1],
            block: [threads, 1, 1],
            shared: 0,
            stream,
            attributes,
            attribute_count: 0,
        }
    }
}

macro_rules! functions {
    ($($name:ident($($argument:ident: $type:ty),*);)*) => {
        /// The functions of the driver. They are not `unsafe`, so that tests read well.
        #[allow(non_snake_case)]
        impl Cuda {
            $(pub fn $name(&self, $($argument: $type),*) -> i32 {
                // SAFETY: the signature is the driver's, and each test passes pointers that are null or
                // valid.
                unsafe {
                    let name = stringify!($name);
                    let function = self.0.get::<unsafe extern "C" fn($($type),*) -> i32>(name.as_bytes());
                    function.expect(name)($($argument),*)
                }
            })*
        }

        /// The names of all functions.
        pub const NAMES: &[&str] = &[$(stringify!($name)),*];
    };
}

/// The driver library.
pub struct Cuda(Library);

functions! {
    cuInit(flags: u32);
    cuDriverGetVersion(version: *mut i32);
    cuGetErrorName(error: i32, name: *mut *const i8);
    cuGetErrorString(error: i32, words: *mut *const i8);
    cuDeviceGetCount(count: *mut i32);
    cuDeviceGet(device: *mut i32, ordinal: i32);
    cuDeviceGetName(name: *mut u8, bytes: i32, device: i32);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: i32);
    cuDeviceGetPCIBusId(id: *mut u8, bytes: i32, device: i32);
    cuDeviceGetAttribute(value: *mut i32, attribute: i32, device: i32);
    cuDevicePrimaryCtxRetain(context: *mut usize, device: i32);
    cuDevicePrimaryCtxRelease_v2(device: i32);
    cuCtxSetCurrent(context: usize);
    cuProfilerStart();
    cuProfilerStop();
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuMemAlloc_v2(address: *mut u64, bytes: usize);
    cuMemFree_v2(address: u64);
    cuMemHostAlloc(pointer: *mut *mut c_void, bytes: usize, flags: u32);
    cuMemFreeHost(pointer: *mut c_void);
    cuMemHostGetDevicePointer_v2(address: *mut u64, pointer: *mut c_void, flags: u32);
    cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: usize);
    cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: usize);
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize);
    cuMemsetD8Async(to: u64, byte: u8, bytes: usize, stream: usize);
    cuModuleLoadDataEx(
        module: *mut usize,
        image: *const c_void,
        count: u32,
        options: *const i32,
        values: *mut usize
    );
    cuModuleUnload(module: usize);
    cuModuleGetFunction(function: *mut usize, module: usize, name: *const i8);
    cuFuncLoad(function: usize);
    cuFuncGetAttribute(value: *mut i32, attribute: i32, function: usize);
    cuFuncSetAttribute(function: usize, attribute: i32, value: i32);
    cuFuncGetParamInfo(function: usize, index: usize, offset: *mut usize, bytes: *mut usize);
    cuLaunchKernelEx(
        config: *const Config,
        function: usize,
        parameters: *const *const c_void,
        extra: *const *const c_void
    );
    cuStreamCreate(stream: *mut usize, flags: u32);
    cuStreamDestroy_v2(stream: usize);
    cuStreamSynchronize(stream: usize);
    cuStreamBeginCapture_v2(stream: usize, mode: u32);
    cuStreamEndCapture(stream: usize, graph: *mut usize);
    cuGraphInstantiateWithFlags(executable: *mut usize, graph: usize, flags: u64);
    cuGraphUpload(executable: usize, stream: usize);
    cuGraphLaunch(executable: usize, stream: usize);
    cuGraphDestroy(graph: usize);
    cuGraphExecDestroy(executable: usize);
    cuEventCreate(event: *mut usize, flags: u32);
    cuEventRecord(event: usize, stream: usize);
    cuEventSynchronize(event: usize);
    cuEventElapsedTime_v2(milliseconds: *mut f32, start: usize, end: usize);
    cuEventDestroy_v2(event: usize);
    softgpuCountersJson(to: *mut u8, bytes: usize, needed: *mut usize);
    softgpuStreamCountersJson(stream: usize, to: *mut u8, bytes: usize, needed: *mut usize);
    softgpuCountersReset();
    softgpuFaultReport(to: *mut u8, bytes: usize, needed: *mut usize);
    softgpuSetOption(name: *const i8, value: *const i8);
}

/// Runs `body` in a process of its own under the launcher with these variables, and returns what the process
/// printed. In that process this does not return. `test` is the name of the calling test.
pub fn isolated(test: &str, variables: &[(&str, &str)], body: fn(&Cuda)) -> String {
    if std::env::var_os("DRIVER_TEST").is_some_and(|name| name == test) {
        // SAFETY: the library of this crate, which has no constructors.
        let library = unsafe { Library::new("libcuda.so.1") }.expect("the launcher provides the driver");
        body(&Cuda(library));
        std::process::exit(0);
    }
    let program = std::env::current_exe().unwrap();
    let arguments = ["run", "--", program.to_str().unwrap(), "--exact", test, "--nocapture"];
    let variables = variables.iter().copied().chain([("DRIVER_TEST", test)]);
    let output = launcher().args(arguments).envs(variables).output().unwrap();
    let printed = text(&output);
    assert!(output.status.success(), "{test}: {}\n{printed}", output.status);
    printed
}

pub fn launcher() -> Command {
    Command::new(env!("CARGO_BIN_EXE_softgpu"))
}

/// What a process printed, errors first.
pub fn text(output: &Output) -> String {
    [&output.stderr[..], &output.stdout[..]].map(String::from_utf8_lossy).concat()
}

/// A file of this test in the build folder.
pub fn scratch(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(&folder).unwrap();
    folder.join(format!("{}-{name}", std::process::id()))
}

/// What most tests begin with. Each panics unless it succeeds.
impl Cuda {
    /// Initializes the driver and makes the primary context current.
    pub fn open(&self) -> usize {
        assert_eq!(self.cuInit(0), SUCCESS);
        self.retain()
    }

    pub fn retain(&self) -> usize {
        let mut context = 0;
        assert_eq!(self.cuDevicePrimaryCtxRetain(&mut context, 0), SUCCESS);
        assert_eq!(self.cuCtxSetCurrent(context), SUCCESS);
        context
    }

    pub fn stream(&self) -> usize {
        let mut stream = 0;
        assert_eq!(self.cuStreamCreate(&mut stream, 1), SUCCESS);
        stream
    }

    pub fn alloc(&self, bytes: usize) -> u64 {
        let mut address = 0;
        assert_eq!(self.cuMemAlloc_v2(&mut address, bytes), SUCCESS);
        address
    }

    /// Page-locked host memory of zeros.
    pub fn host(&self, words: usize) -> *mut u32 {
        let mut pointer = null_mut();
        assert_eq!(self.cuMemHostAlloc(&mut pointer, 4 * words, 3), SUCCESS);
        // SAFETY: just allocated.
        unsafe { pointer.cast::<u8>().write_bytes(0, 4 * words) };
        pointer.cast()
    }

    /// The module of `kernels.ptx`.
    pub fn module(&self) -> usize {
        let (code, module, log) = self.load(include_str!("kernels.ptx"));
        assert_eq!(code, SUCCESS, "{log}");
        module
    }

    /// Loads an image that ends with a zero. Returns the result, the handle and the error log.
    pub fn load(&self, image: impl Into<Vec<u8>>) -> (i32, usize, String) {
        let image = CString::new(image).unwrap();
        let mut log = [0u8; 1024];
        let mut module = 0;
        let mut values = [log.as_mut_ptr() as usize, log.len()];
        let code = self.cuModuleLoadDataEx(
            &mut module,
            image.as_ptr().cast(),
            2,
            [5, 6].as_ptr(),
            values.as_mut_ptr(),
        );
        let log = CStr::from_bytes_until_nul(&log).unwrap().to_str().unwrap().to_string();
        assert_eq!(values[1], log.len());
        (code, module, log)
    }

    pub fn function(&self, module: usize, name: &CStr) -> usize {
        let mut function = 0;
        assert_eq!(self.cuModuleGetFunction(&mut function, module, name.as_ptr()), SUCCESS);
        function
    }

    /// Launches with an address and numbers as parameters. Returns the result.
    pub fn launch(&self, config: Config, function: usize, address: u64, numbers: &[u32]) -> i32 {
        let mut parameters: Vec<*const c_void> = vec![(&raw const address).cast()];
        parameters.extend(numbers.iter().map(|number| (number as *const u32).cast::<c_void>()));
        self.cuLaunchKernelEx(&config, function, parameters.as_ptr(), null())
    }

    /// Writes device memory and waits.
    pub fn write(&self, to: u64, words: &[u32], stream: usize) {
        assert_eq!(self.cuMemcpyHtoDAsync_v2(to, words.as_ptr().cast(), 4 * words.len(), stream), SUCCESS);
        assert_eq!(self.cuStreamSynchronize(stream), SUCCESS);
    }

    /// Waits and reads device memory.
    pub fn read<const N: usize>(&self, from: u64, stream: usize) -> [u32; N] {
        let mut words = [0; N];
        assert_eq!(self.cuMemcpyDtoHAsync_v2(words.as_mut_ptr().cast(), from, 4 * N, stream), SUCCESS);
        assert_eq!(self.cuStreamSynchronize(stream), SUCCESS);
        words
    }

    /// What an extension function answers with.
    pub fn answer(&self, ask: impl Fn(*mut u8, usize, *mut usize) -> i32) -> String {
        let mut needed = 0;
        assert_eq!(ask(null_mut(), 0, &mut needed), SUCCESS);
        let mut text = vec![0; needed];
        assert_eq!(ask(text.as_mut_ptr(), needed, &mut needed), SUCCESS);
        CString::from_vec_with_nul(text).unwrap().into_string().unwrap()
    }
}
