//! The driver, errors, devices and contexts.

use crate::driver::code::{Code, describe};
use crate::driver::context::{Driver, Handle, current, set_current};
use crate::driver::report;
use crate::driver::{Out, call, put, put_text};
use std::ffi::{c_char, c_int, c_uint};
use std::ptr::null;

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: c_uint) -> Code {
    call(|| {
        if flags != 0 {
            return Err(Code::InvalidValue);
        }
        let driver = Driver::get()?;
        if driver.initialize()? && driver.settings.report.is_some() {
            report::write_at_exit();
        }
        Ok(())
    })
}

/// Works before `cuInit`.
#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: Out<c_int>) -> Code {
    call(|| put(version, Driver::get()?.settings.driver_version))
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(error: c_int, name: Out<*const c_char>) -> Code {
    call(|| put_words(name, describe(error).map(|(name, _)| name.as_ptr())))
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorString(error: c_int, words: Out<*const c_char>) -> Code {
    call(|| put_words(words, describe(error).map(|(_, words)| words.as_ptr())))
}

/// Writes null for an unknown error, which is an error itself.
fn put_words(to: Out<*const c_char>, words: Option<*const c_char>) -> Result<(), Code> {
    put(to, words.unwrap_or(null()))?;
    words.map(|_| ()).ok_or(Code::InvalidValue)
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: Out<c_int>) -> Code {
    call(|| put(count, Driver::initialized()?.devices()))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: Out<c_int>, ordinal: c_int) -> Code {
    call(|| {
        Driver::device(ordinal)?;
        put(device, ordinal)
    })
}

/// The name says that this is no GPU, so that no record can pass for a GPU's.
#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, bytes: c_int, device: c_int) -> Code {
    call(|| {
        let driver = Driver::device(device)?;
        if name.is_null() || bytes <= 0 {
            return Err(Code::InvalidValue);
        }
        // SAFETY: the caller says that the buffer has this many bytes.
        unsafe {
            put_text(name.cast(), bytes as usize, &format!("software GPU ({})", driver.settings.card.name))
        };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: c_int) -> Code {
    call(|| put(bytes, Driver::device(device)?.settings.card.memory as usize))
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetPCIBusId(id: *mut c_char, bytes: c_int, device: c_int) -> Code {
    call(|| {
        Driver::device(device)?;
        let name = format!("0000:00:{device:02x}.0");
        if id.is_null() || bytes <= name.len() as c_int {
            return Err(Code::InvalidValue);
        }
        // SAFETY: the caller says that the buffer has this many bytes.
        unsafe { put_text(id.cast(), bytes as usize, &name) };
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetAttribute(value: Out<c_int>, attribute: c_int, device: c_int) -> Code {
    call(|| {
        let card = &Driver::device(device)?.settings.card;
        // The numbers of `CUdevice_attribute`.
        let answer = match attribute {
            1 => card.threads_per_block,
            // The sizes of a block, and of a grid.
            2 | 3 => card.threads_per_block,
            4 => MAX_BLOCK_Z,
            5 => MAX_GRID_X,
            6 | 7 => MAX_GRID_YZ,
            8 => card.shared_per_block,
            // Constant memory.
            9 => 64 << 10,
            // Threads of a warp.
            10 => 32,
            12 | 82 => card.registers,
            16 => card.multiprocessors,
            // Not integrated, and page-locked memory can be mapped.
            18 => 0,
            19 => 1,
            // Kernels can run concurrently.
            31 => 1,
            // PCI bus, device and domain.
            33 | 34 | 50 => 0,
            38 => card.l2 as u32,
            39 => card.threads_per_multiprocessor,
            // Host and device share one address space.
            41 => 1,
            75 => card.capability.0,
            76 => card.capability.1,
            81 => card.shared_per_multiprocessor,
            // No managed memory, no cooperative launch.
            83 | 95 => 0,
            97 => card.shared_per_block_optin,
            106 => card.blocks_per_multiprocessor,
            111 => card.shared_reserved,
            // No memory pools, no clusters.
            115 | 120 => 0,
            _ if (1..=LAST_ATTRIBUTE).contains(&attribute) => return Err(Code::NotSupported),
            _ => return Err(Code::InvalidValue),
        };
        put(value, answer as c_int)
    })
}

/// The largest number of `CUdevice_attribute`.
const LAST_ATTRIBUTE: c_int = 162;
/// The largest z of a block.
pub const MAX_BLOCK_Z: u32 = 64;
/// The largest x of a grid.
pub const MAX_GRID_X: u32 = i32::MAX as u32;
/// The largest y and z of a grid.
pub const MAX_GRID_YZ: u32 = 65535;

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: Out<Handle>, device: c_int) -> Code {
    call(|| {
        let driver = Driver::device(device)?;
        let context = context.ok_or(Code::InvalidValue)?;
        context.write(driver.retain(device));
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Code {
    call(|| Driver::device(device)?.release(device))
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: Handle) -> Code {
    call(|| set_current(context))
}

#[unsafe(no_mangle)]
extern "C" fn cuProfilerStart() -> Code {
    call(|| current().map(|_| ()))
}

#[unsafe(no_mangle)]
extern "C" fn cuProfilerStop() -> Code {
    call(|| current().map(|_| ()))
}
