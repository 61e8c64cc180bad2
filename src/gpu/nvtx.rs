//! What a profiler is told: named ranges, and the window that it shall record. Without one nothing is told, and nothing is
//! needed: no library, no CUDA.
//!
//! Ranges are NVTX, version 3, whose other end is whatever library `NVTX_INJECTION64_PATH` names: Nsight Systems, Nsight
//! Compute and CUPTI set it in the programs that they start. There is nothing to link against: the protocol is that
//! library's one entry point and a table of functions that it fills in.

use crate::Result;
use crate::gpu::device::Device;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::marker::PhantomData;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// The profiler's table of functions, module by module: how many each has, the unused first one included.
const SIZES: [usize; 7] = [0, 16, 9, 15, 7, 16, 7];
/// The module of ranges without a domain, and two of its functions.
const CORE: usize = 1;
const RANGE_PUSH_A: usize = 9;
const RANGE_POP: usize = 11;

/// Room for the largest module, and for the null that ends it.
type Module = [AtomicPtr<c_void>; 17];

/// The functions: null where the profiler has none.
static FUNCTIONS: [Module; 7] = [const { [const { AtomicPtr::new(null_mut()) }; 17] }; 7];
/// Where each of them is: what the profiler asks for.
static PLACES: [Module; 7] = [const { [const { AtomicPtr::new(null_mut()) }; 17] }; 7];

/// The table of [`module`], as a profiler reads it.
#[repr(C)]
struct Callbacks {
    bytes: usize,
    module: unsafe extern "C" fn(c_uint, *mut *mut c_void, *mut c_uint) -> c_int,
}

/// What a profiler may learn of this end of the protocol, and tell.
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

/// Gives a profiler the places of a module's functions and their number; 0 where there is no such module.
unsafe extern "C" fn module(number: c_uint, places: *mut *mut c_void, count: *mut c_uint) -> c_int {
    let known = usize::try_from(number).ok().filter(|number| (1..SIZES.len()).contains(number));
    let Some(number) = known else { return 0 };
    // SAFETY: the profiler passes null or a place for the answer; the table is static.
    unsafe {
        if let Some(places) = places.as_mut() {
            *places = PLACES[number].as_ptr().cast_mut().cast();
        }
        if let Some(count) = count.as_mut() {
            *count = SIZES[number] as c_uint;
        }
    }
    1
}

unsafe extern "C" fn ignore_version(_version: u32) {}

/// The tables by their numbers, null for others.
unsafe extern "C" fn export(table: u32) -> *const c_void {
    match table {
        1 => (&raw const CALLBACKS).cast(),
        3 => (&raw const VERSIONS).cast(),
        _ => null_mut(),
    }
}

/// Whether a profiler took the table. The first call asks it.
fn attached() -> bool {
    static ATTACHED: OnceLock<bool> = OnceLock::new();
    *ATTACHED.get_or_init(|| {
        let Some(path) = std::env::var_os("NVTX_INJECTION64_PATH") else { return false };
        for (number, size) in SIZES.into_iter().enumerate() {
            for i in 1..size {
                PLACES[number][i].store(FUNCTIONS[number][i].as_ptr().cast(), Ordering::Relaxed);
            }
        }
        type Initialize = unsafe extern "C" fn(unsafe extern "C" fn(u32) -> *const c_void) -> c_int;
        // SAFETY: whoever started this program asks for the library; its entry point has this type by the protocol.
        unsafe {
            let Ok(library) = libloading::Library::new(path) else { return false };
            let Ok(initialize) = library.get::<Initialize>(b"InitializeInjectionNvtx2\0") else {
                return false;
            };
            let took = initialize(export) != 0;
            // Its functions are called until the end.
            std::mem::forget(library);
            took
        }
    })
}

fn function(number: usize) -> *mut c_void {
    FUNCTIONS[CORE][number].load(Ordering::Relaxed)
}

/// A named stretch of this thread's work, which ends when it is dropped. Ranges nest.
#[must_use = "a range ends when it is dropped"]
pub struct Range {
    told: bool,
    /// A range ends on the thread that it began on.
    _thread: PhantomData<*const ()>,
}

/// Begins a range, if a profiler listens.
pub fn range(name: &str) -> Range {
    let push = if attached() { function(RANGE_PUSH_A) } else { null_mut() };
    let told = !push.is_null();
    if told {
        // A name with a zero byte has no form there.
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the profiler put a function of this type there; it copies the name.
        unsafe {
            let push: unsafe extern "C" fn(*const c_char) -> c_int = std::mem::transmute(push);
            push(name.as_ptr());
        }
    }
    Range { told, _thread: PhantomData }
}

impl Drop for Range {
    fn drop(&mut self) {
        let pop = function(RANGE_POP);
        if self.told && !pop.is_null() {
            // SAFETY: as in `range`.
            unsafe {
                let pop: unsafe extern "C" fn() -> c_int = std::mem::transmute(pop);
                pop();
            }
        }
    }
}

/// What a profiler that waits for `cudaProfilerStart` records, until it is dropped.
#[must_use = "a window ends when it is dropped"]
pub struct Window<'a>(&'a dyn Device);

/// Begins the window. Work that was asked for before is done by then, and work in the window before it ends; devices that no
/// profiler knows only wait.
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
        // What went wrong shows at the next call.
        let _ = self.0.synchronize();
        let _ = self.0.profile(false);
    }
}
