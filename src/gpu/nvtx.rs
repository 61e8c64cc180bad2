//! Annotations for profilers: named ranges, and the window to record. Without a profiler, ranges do nothing
//! and need neither a library nor CUDA.
//!
//! Ranges are NVTX version 3. The profiler's library is the one that `NVTX_INJECTION64_PATH` names; Nsight
//! Systems, Nsight Compute and CUPTI set it in the programs that they start. Nothing is linked: the protocol
//! is one entry point of that library and a table of functions that it fills in.

use crate::Result;
use crate::gpu::device::Device;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// Number of functions in each module of the protocol, including the unused index 0.
const SIZES: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
/// The module of ranges without a domain.
const CORE: usize = 1;
/// Index of `nvtxRangePushA` in [`CORE`].
const RANGE_PUSH_A: usize = 9;
/// Index of `nvtxRangePop` in [`CORE`].
const RANGE_POP: usize = 11;

/// Function pointers of a module: room for the largest module and a terminating null.
type Module = [AtomicPtr<c_void>; 17];

/// The functions. The profiler fills them in; null if it does not implement one.
static FUNCTIONS: [Module; 7] = [const { [const { AtomicPtr::new(null_mut()) }; 17] }; 7];
/// The address of each entry of [`FUNCTIONS`], as the protocol requires.
static ADDRESSES: [Module; 7] = [const { [const { AtomicPtr::new(null_mut()) }; 17] }; 7];

/// The export table with [`module`], in the protocol's layout.
#[repr(C)]
struct Callbacks {
    bytes: usize,
    module: unsafe extern "C" fn(c_uint, *mut *mut c_void, *mut c_uint) -> c_int,
}

/// The export table with the protocol version of this program.
#[repr(C)]
struct Versions {
    bytes: usize,
    version: u32,
    reserved: u32,
    set: unsafe extern "C" fn(u32),
}

static CALLBACKS: Callbacks = Callbacks { bytes: size_of::<Callbacks>(), module };
static VERSIONS: Versions =
    Versions { bytes: size_of::<Versions>(), version: 3, reserved: 0, set: ignore_version };

/// Returns the addresses of a module's functions and their number to the profiler. Its result is 1, or 0 for
/// an unknown module.
///
/// # Safety
/// `addresses` and `count` are null or valid for a write.
unsafe extern "C" fn module(number: c_uint, addresses: *mut *mut c_void, count: *mut c_uint) -> c_int {
    let known = usize::try_from(number).ok().filter(|number| (1..SIZES.len()).contains(number));
    let Some(number) = known else { return 0 };
    // SAFETY: the profiler passes null or valid pointers; the table is static.
    unsafe {
        if let Some(addresses) = addresses.as_mut() {
            *addresses = ADDRESSES[number].as_ptr().cast_mut().cast();
        }
        if let Some(count) = count.as_mut() {
            *count = SIZES[number] as c_uint;
        }
    }
    1
}

/// Called with the profiler's protocol version, which is not needed.
///
/// # Safety
/// None is needed; the type is the protocol's.
unsafe extern "C" fn ignore_version(_version: u32) {}

/// Returns export table 1 ([`Callbacks`]) or 3 ([`Versions`]), null for any other number.
///
/// # Safety
/// None is needed; the type is the protocol's.
unsafe extern "C" fn export(table: u32) -> *const c_void {
    match table {
        1 => (&raw const CALLBACKS).cast(),
        3 => (&raw const VERSIONS).cast(),
        _ => null_mut(),
    }
}

/// Whether a profiler is attached. The first call loads its library and initializes it.
fn attached() -> bool {
    static ATTACHED: OnceLock<bool> = OnceLock::new();
    *ATTACHED.get_or_init(|| {
        let Some(path) = std::env::var_os("NVTX_INJECTION64_PATH") else { return false };
        for (number, size) in SIZES.into_iter().enumerate() {
            for i in 1..size {
                ADDRESSES[number][i].store(FUNCTIONS[number][i].as_ptr().cast(), Ordering::Relaxed);
            }
        }
        type Initialize = unsafe extern "C" fn(unsafe extern "C" fn(u32) -> *const c_void) -> c_int;
        // SAFETY: the environment of this process names the library, and its entry point has this type by the
        // protocol.
        unsafe {
            let Ok(library) = libloading::Library::new(path) else { return false };
            let Ok(initialize) = library.get::<Initialize>(b"InitializeInjectionNvtx2\0") else {
                return false;
            };
            let attached = initialize(export) != 0;
            // The library must stay loaded, because its functions are called until the process ends.
            std::mem::forget(library);
            attached
        }
    })
}

/// A function of [`CORE`], or null.
fn function(number: usize) -> *mut c_void {
    FUNCTIONS[CORE][number].load(Ordering::Relaxed)
}

/// A named range of this thread's work. It ends when it is dropped. Ranges nest.
#[must_use = "a range ends when it is dropped"]
pub struct Range {
    /// The profiler has received the start of the range.
    pushed: bool,
    /// Not `Send`: a range ends on the thread that it began on.
    _thread: PhantomData<*const ()>,
}

/// Begins a range, which does nothing without a profiler.
pub fn range(name: &str) -> Range {
    let push = if attached() { function(RANGE_PUSH_A) } else { null_mut() };
    let pushed = !push.is_null();
    if pushed {
        // A name with a zero byte cannot be a C string and becomes empty.
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the profiler put a function of this type there, and it copies the name.
        unsafe {
            let push: unsafe extern "C" fn(*const c_char) -> c_int = std::mem::transmute(push);
            push(name.as_ptr());
        }
    }
    Range { pushed, _thread: PhantomData }
}

impl Drop for Range {
    fn drop(&mut self) {
        let pop = function(RANGE_POP);
        if self.pushed && !pop.is_null() {
            // SAFETY: the profiler put a function of this type there.
            unsafe {
                let pop: unsafe extern "C" fn() -> c_int = std::mem::transmute(pop);
                pop();
            }
        }
    }
}

/// The window that a profiler records if it waits for `cudaProfilerStart`. It ends when it is dropped.
#[must_use = "a window ends when it is dropped"]
pub struct Window<'a>(&'a dyn Device);

/// Begins the window after all earlier work has finished. Its end waits for the work in it. On a device
/// without a profiler both ends only wait.
///
/// # Errors
/// As [`Device::synchronize`] and [`Device::profile`].
pub fn window(device: &dyn Device) -> Result<Window<'_>> {
    device.synchronize()?;
    device.profile(true)?;
    Ok(Window(device))
}

impl Drop for Window<'_> {
    fn drop(&mut self) {
        // The next call reports a failure.
        let _ = self.0.synchronize();
        let _ = self.0.profile(false);
    }
}
