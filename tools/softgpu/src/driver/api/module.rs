//! Modules, functions and launches.

use super::device::{MAX_BLOCK_Z, MAX_GRID_X, MAX_GRID_YZ};
use crate::driver::code::Code;
use crate::driver::context::{Context, Function, Handle, LoadedModule, current};
use crate::driver::stream::{Work, lock};
use crate::driver::{Out, call, put, put_text};
use crate::machine::Launch;
use crate::ptx;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::mem::MaybeUninit;
use std::slice;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};

/// The first bytes of a compiled kernel image (ELF), and of a container of several images.
const CUBIN: [u8; 4] = *b"\x7fELF";
const FATBIN: [u8; 4] = 0xba55_ed50_u32.to_le_bytes();

/// The options of `cuModuleLoadDataEx` that this driver reads. It accepts and ignores the others, which are
/// about code generation.
const JIT_ERROR_LOG: c_int = 5;
const JIT_ERROR_LOG_BYTES: c_int = 6;
/// The number of the last option.
const JIT_LAST: c_int = 33;

/// The numbers of `CUfunction_attribute` that can be set.
const MAX_DYNAMIC_SHARED: c_int = 8;
const CARVEOUT: c_int = 9;

/// The numbers of `CUlaunchAttributeID` that this driver knows.
const ATTRIBUTE_IGNORE: c_uint = 0;
const ATTRIBUTE_COOPERATIVE: c_uint = 2;
const ATTRIBUTE_DEPENDENT: c_uint = 6;
const ATTRIBUTE_PRIORITY: c_uint = 8;

/// The entries of `extra`: parameters as one buffer.
const EXTRA_END: usize = 0;
const EXTRA_BUFFER: usize = 1;
const EXTRA_BYTES: usize = 2;

/// A `CUlaunchConfig`.
#[repr(C)]
struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    /// Dynamic shared memory of a block, in bytes.
    shared: c_uint,
    stream: Handle,
    attributes: *const LaunchAttribute,
    attribute_count: c_uint,
}

/// A `CUlaunchAttribute`. The value is a union of 64 bytes, and starts with an `int` for all that this driver
/// knows.
#[repr(C)]
struct LaunchAttribute {
    id: c_uint,
    padding: [u8; 4],
    value: c_int,
    rest: MaybeUninit<[u8; 60]>,
}

/// Images are PTX with a terminating zero. What is wrong with one goes to the error log and to stderr.
#[unsafe(no_mangle)]
extern "C" fn cuModuleLoadDataEx(
    module: Out<Handle>,
    image: *const c_void,
    count: c_uint,
    options: *const c_int,
    values: *mut *mut c_void,
) -> Code {
    call(|| {
        let context = current()?;
        let to = module.ok_or(Code::InvalidValue)?;
        if image.is_null() || (count > 0 && (options.is_null() || values.is_null())) {
            return Err(Code::InvalidValue);
        }
        let count = count as usize;
        // SAFETY: the caller says that both arrays have this many entries; without any they are not read.
        let options = if count == 0 { &[] } else { unsafe { slice::from_raw_parts(options, count) } };
        if options.iter().any(|option| !(0..=JIT_LAST).contains(option)) {
            return Err(Code::InvalidValue);
        }
        context.forbid_unsafe_call()?;
        // SAFETY: the image is not null, and the caller says that it is one.
        let loaded = unsafe { load(&context, image) };
        if let Err((_, sentence)) = &loaded {
            eprintln!("softgpu: {sentence}");
        }
        let sentence = loaded.as_ref().err().map_or("", |(_, sentence)| sentence);
        let place = |wanted| options.iter().position(|option| *option == wanted);
        if let (Some(log), Some(bytes)) = (place(JIT_ERROR_LOG), place(JIT_ERROR_LOG_BYTES)) {
            // SAFETY: the array has this many entries; the log has as many bytes as its size says, which is a
            // number in place of a pointer and becomes the number of bytes written.
            unsafe {
                let (log, bytes) = (*values.add(log), values.add(bytes));
                let room = *bytes as usize as c_uint as usize;
                if !log.is_null() {
                    put_text(log.cast(), room, sentence);
                    *bytes = sentence.len().min(room) as *mut c_void;
                }
            }
        }
        to.write(context.modules.insert(loaded.map_err(|(code, _)| code)?));
        Ok(())
    })
}

/// Loads an image. The error is a code and a sentence.
///
/// # Safety
/// `image` is a compiled image, or ends with a zero.
unsafe fn load(context: &Context, image: *const c_void) -> Result<LoadedModule, (Code, String)> {
    let wrong = |code, sentence: &str| Err((code, sentence.to_string()));
    // A text may be shorter than four bytes, so look at one byte after the other.
    // SAFETY: no byte is read past one that differs from the magic number, as the zero of a text does.
    let starts_with = |magic: [u8; 4]| (0..4).all(|at| unsafe { *image.cast::<u8>().add(at) } == magic[at]);
    if starts_with(CUBIN) || starts_with(FATBIN) {
        return wrong(
            Code::NoBinaryForGpu,
            "the image is machine code of a GPU (cubin or fatbin), expected PTX",
        );
    }
    // SAFETY: the caller says that the text ends with a zero.
    let Ok(text) = unsafe { CStr::from_ptr(image.cast()) }.to_str() else {
        return wrong(Code::InvalidPtx, "the PTX is not UTF-8");
    };
    let settings = &context.driver.settings;
    let text = &settings.replaced(text).map_err(|sentence| (Code::InvalidPtx, sentence))?;
    check_version(text, settings.driver_version)?;
    let mut module = ptx::load(text, &settings.card).map_err(|e| (Code::InvalidPtx, e.to_string()))?;
    if module.place(&context.memory).is_err() {
        free_variables(context, &module);
        return wrong(Code::OutOfMemory, "no memory for the module's variables");
    }
    Ok(LoadedModule { module, unloaded: AtomicBool::new(false), functions: Mutex::default() })
}

/// Checks that a driver of this CUDA version knows the version of the PTX. A text without one is left to the
/// parser.
///
/// # Errors
/// [`Code::UnsupportedPtxVersion`] and a sentence.
fn check_version(text: &str, driver: i32) -> Result<(), (Code, String)> {
    let version = text.lines().find_map(|line| line.trim_start().strip_prefix(".version"));
    let numbers = version.and_then(|version| version.trim().split_once('.'));
    let Some((Ok(major), Ok(minor))) =
        numbers.map(|(major, minor)| (major.parse::<i32>(), minor.parse::<i32>()))
    else {
        return Ok(());
    };
    // CUDA 11.0 came with PTX 7.0, and each release with the next, but 12.6 with the one of 12.5.
    let (newest, release) = (driver / 1000 - 4, driver % 1000 / 10);
    let release = release - i32::from(newest == 8 && release >= 6);
    if (major, minor) <= (newest, release) {
        return Ok(());
    }
    let sentence =
        format!("the PTX has version {major}.{minor}, this driver knows versions up to {newest}.{release}");
    Err((Code::UnsupportedPtxVersion, sentence))
}

fn free_variables(context: &Context, module: &ptx::Module) {
    for address in module.addresses() {
        // Only `place` allocates them, and only here they are freed.
        let _ = context.memory.free(*address);
    }
}

/// Waits for all work, as it may use the module.
#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: Handle) -> Code {
    call(|| {
        let context = current()?;
        context.forbid_unsafe_call()?;
        let module = context.modules.remove(module, Code::InvalidHandle)?;
        context.finish();
        module.unloaded.store(true, Ordering::Release);
        for (_, function) in lock(&module.functions).drain() {
            let _ = context.functions.remove(function, Code::InvalidHandle);
        }
        free_variables(&context, &module.module);
        context.check()
    })
}

/// The same kernel has the same handle every time.
#[unsafe(no_mangle)]
extern "C" fn cuModuleGetFunction(function: Out<Handle>, module: Handle, name: *const c_char) -> Code {
    call(|| {
        let context = current()?;
        let to = function.ok_or(Code::InvalidValue)?;
        if name.is_null() {
            return Err(Code::InvalidValue);
        }
        let module = context.modules.get(module, Code::InvalidHandle)?;
        // SAFETY: the caller says that the name is a C string.
        let name = unsafe { CStr::from_ptr(name) }.to_str().map_err(|_| Code::NotFound)?;
        let kernel = module.module.kernel(name).ok_or(Code::NotFound)?;
        let mut functions = lock(&module.functions);
        let handle = functions.entry(name.to_string()).or_insert_with(|| {
            let dynamic = context.driver.settings.card.shared_per_block.saturating_sub(kernel.shared);
            context.functions.insert(Function {
                kernel,
                module: module.clone(),
                max_dynamic_shared: AtomicU32::new(dynamic),
                carveout: AtomicI32::new(-1),
            })
        });
        to.write(*handle);
        Ok(())
    })
}

/// Kernels are loaded with their module.
#[unsafe(no_mangle)]
extern "C" fn cuFuncLoad(function: Handle) -> Code {
    call(|| current()?.functions.get(function, Code::InvalidHandle).map(|_| ()))
}

/// Threads of a block of this kernel at most.
fn max_threads(context: &Context, function: &Function) -> u32 {
    context.driver.settings.card.threads_per_block.min(function.kernel.max_threads)
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncGetAttribute(value: Out<c_int>, attribute: c_int, function: Handle) -> Code {
    call(|| {
        let context = current()?;
        let function = context.functions.get(function, Code::InvalidHandle)?;
        let (major, minor) = context.driver.settings.card.capability;
        let answer = match attribute {
            0 => max_threads(&context, &function) as c_int,
            1 => function.kernel.shared as c_int,
            3 => function.kernel.local as c_int,
            4 => function.kernel.registers as c_int,
            // The architecture of the machine code.
            6 => (major * 10 + minor) as c_int,
            MAX_DYNAMIC_SHARED => function.max_dynamic_shared.load(Ordering::Relaxed) as c_int,
            CARVEOUT => function.carveout.load(Ordering::Relaxed),
            2 | 5 | 7 | 10..=15 => return Err(Code::NotSupported),
            _ => return Err(Code::InvalidValue),
        };
        put(value, answer)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) -> Code {
    call(|| {
        let context = current()?;
        let function = context.functions.get(function, Code::InvalidHandle)?;
        let most = context.driver.settings.card.shared_per_block_optin.saturating_sub(function.kernel.shared);
        match attribute {
            MAX_DYNAMIC_SHARED => match u32::try_from(value) {
                Ok(bytes) if bytes <= most => function.max_dynamic_shared.store(bytes, Ordering::Relaxed),
                _ => return Err(Code::InvalidValue),
            },
            // Percent of the shared memory, or -1 for no preference.
            CARVEOUT if (-1..=100).contains(&value) => function.carveout.store(value, Ordering::Relaxed),
            _ => return Err(Code::InvalidValue),
        }
        Ok(())
    })
}

/// An index past the last parameter is an error, by which a caller finds their number.
#[unsafe(no_mangle)]
extern "C" fn cuFuncGetParamInfo(
    function: Handle,
    index: usize,
    offset: Out<usize>,
    bytes: Out<usize>,
) -> Code {
    call(|| {
        let function = current()?.functions.get(function, Code::InvalidHandle)?;
        let parameter = function.kernel.params.get(index).ok_or(Code::InvalidValue)?;
        put(offset, parameter.offset as usize)?;
        // The size may be left out.
        bytes.map(|to| to.write(parameter.size as usize));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernelEx(
    config: Option<&LaunchConfig>,
    function: Handle,
    parameters: *const *const c_void,
    extra: *const *const c_void,
) -> Code {
    call(|| {
        let context = current()?;
        let config = config.ok_or(Code::InvalidValue)?;
        let function = context.functions.get(function, Code::InvalidHandle)?;
        let stream = context.stream(config.stream)?;
        check_shape(&context, &function, config)?;
        // SAFETY: the caller says that the configuration has as many attributes as it says.
        let attributes = match config.attribute_count {
            0 => &[],
            _ if config.attributes.is_null() => return Err(Code::InvalidValue),
            count => unsafe { slice::from_raw_parts(config.attributes, count as usize) },
        };
        let mut dependent = false;
        for attribute in attributes {
            match attribute.id {
                ATTRIBUTE_IGNORE | ATTRIBUTE_PRIORITY => {}
                ATTRIBUTE_COOPERATIVE if attribute.value == 0 => {}
                ATTRIBUTE_DEPENDENT => dependent = attribute.value != 0,
                _ => return Err(Code::NotSupported),
            }
        }
        // SAFETY: the caller says that there are as many parameters as the kernel has, each with its size.
        let params = unsafe { collect(&function.kernel, parameters, extra)? };
        let launch = Launch {
            kernel: function.kernel.clone(),
            grid: config.grid,
            block: config.block,
            shared: config.shared,
            params,
            dependent: dependent && context.driver.settings.card.has_dependent_launch(),
        };
        stream.enqueue([Work::Launch { launch, module: function.module.clone() }])
    })
}

/// Checks grid, block and shared memory against the limits of the GPU and the kernel.
fn check_shape(context: &Context, function: &Function, config: &LaunchConfig) -> Result<(), Code> {
    let ([x, y, z], [columns, rows, layers]) = (config.grid, config.block);
    let is_grid = (1..=MAX_GRID_X).contains(&x) && [y, z].iter().all(|size| (1..=MAX_GRID_YZ).contains(size));
    let threads = [columns, rows, layers].iter().map(|size| u64::from(*size)).fold(1, u64::saturating_mul);
    let is_block =
        threads > 0 && layers <= MAX_BLOCK_Z && threads <= u64::from(max_threads(context, function));
    let is_shared = config.shared <= function.max_dynamic_shared.load(Ordering::Relaxed);
    if is_grid && is_block && is_shared { Ok(()) } else { Err(Code::InvalidValue) }
}

/// Copies the parameters of a launch to one buffer.
///
/// # Safety
/// `parameters` is null or has a pointer to each parameter of the kernel. `extra` is null or a list that
/// `EXTRA_END` ends.
unsafe fn collect(
    kernel: &ptx::Kernel,
    parameters: *const *const c_void,
    extra: *const *const c_void,
) -> Result<Vec<u8>, Code> {
    let mut buffer = vec![0u8; kernel.param_bytes() as usize];
    if !extra.is_null() {
        let (mut from, mut bytes) = (None, None);
        let mut at = 0;
        // SAFETY: the list goes on until its end is found. The size is behind a pointer.
        unsafe {
            loop {
                match *extra.add(at) as usize {
                    EXTRA_END => break,
                    EXTRA_BUFFER => from = Some(*extra.add(at + 1)),
                    EXTRA_BYTES => bytes = (*extra.add(at + 1)).cast::<usize>().as_ref().copied(),
                    _ => return Err(Code::InvalidValue),
                }
                at += 2;
            }
        }
        let from = from.filter(|from| !from.is_null()).ok_or(Code::InvalidValue)?;
        if !parameters.is_null() || bytes != Some(buffer.len()) {
            return Err(Code::InvalidValue);
        }
        // SAFETY: the caller says that the buffer has this many bytes.
        unsafe { buffer.as_mut_ptr().copy_from(from.cast(), buffer.len()) };
        return Ok(buffer);
    }
    if parameters.is_null() && !kernel.params.is_empty() {
        return Err(Code::InvalidValue);
    }
    for (index, parameter) in kernel.params.iter().enumerate() {
        // SAFETY: there is a pointer for each parameter.
        let from = unsafe { *parameters.add(index) }.cast::<u8>();
        if from.is_null() {
            return Err(Code::InvalidValue);
        }
        let to = &mut buffer[parameter.offset as usize..][..parameter.size as usize];
        // SAFETY: each parameter has its size.
        unsafe { to.as_mut_ptr().copy_from(from, to.len()) };
    }
    Ok(buffer)
}
