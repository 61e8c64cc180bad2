//! Memory: allocation, copies and fills.

use crate::driver::code::Code;
use crate::driver::context::{Context, Handle, Stream, current};
use crate::driver::stream::Work;
use crate::driver::{Out, call, put};
use crate::memory::Kind;
use std::ffi::{c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The flags of `cuMemHostAlloc`: portable, mapped, write-combined. All host memory is portable and mapped
/// here.
const HOST_FLAGS: c_uint = 7;

fn allocate(bytes: usize, kind: Kind, function: &str) -> Result<u64, Code> {
    let context = current()?;
    if bytes == 0 {
        return Err(Code::InvalidValue);
    }
    context.forbid_unsafe_call()?;
    let number = context.allocations.fetch_add(1, Ordering::Relaxed) + 1;
    let name = format!("allocation {number} ({bytes} bytes, {function})");
    context.memory.allocate(bytes, kind, &name).map_err(|_| Code::OutOfMemory)
}

/// Waits for all work, as a GPU's driver does, and frees an allocation of this kind.
fn free(address: u64, kind: Kind) -> Result<(), Code> {
    let context = current()?;
    context.forbid_unsafe_call()?;
    let snapshot = context.memory.snapshot();
    if snapshot
        .find(address, 1)
        .is_none_or(|allocation| allocation.start != address || allocation.kind != kind)
    {
        return Err(Code::InvalidValue);
    }
    context.finish();
    context.memory.free(address).map_err(|_| Code::InvalidValue)?;
    context.check()
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) -> Code {
    call(|| {
        let (left, all) = current()?.memory.info();
        put(free, left as usize)?;
        put(total, all as usize)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: Out<u64>, bytes: usize) -> Code {
    call(|| {
        let to = address.ok_or(Code::InvalidValue)?;
        to.write(allocate(bytes, Kind::Device, "cuMemAlloc")?);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> Code {
    call(|| free(address, Kind::Device))
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(pointer: Out<*mut c_void>, bytes: usize, flags: c_uint) -> Code {
    call(|| {
        let to = pointer.ok_or(Code::InvalidValue)?;
        if flags & !HOST_FLAGS != 0 {
            return Err(Code::InvalidValue);
        }
        to.write(allocate(bytes, Kind::Host, "cuMemHostAlloc")? as *mut c_void);
        Ok(())
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(pointer: *mut c_void) -> Code {
    call(|| free(pointer as u64, Kind::Host))
}

/// Page-locked host memory has the same address on the device.
#[unsafe(no_mangle)]
extern "C" fn cuMemHostGetDevicePointer_v2(address: Out<u64>, pointer: *mut c_void, flags: c_uint) -> Code {
    call(|| {
        let context = current()?;
        if flags != 0 || !is_page_locked(&context, pointer as usize, 1) {
            return Err(Code::InvalidValue);
        }
        put(address, pointer as u64)
    })
}

fn is_page_locked(context: &Context, pointer: usize, bytes: usize) -> bool {
    context.memory.range(pointer as u64, bytes as u64).is_ok_and(|allocation| allocation.kind == Kind::Host)
}

/// Checks that a range is inside one allocation.
fn check_range(context: &Context, address: u64, bytes: usize) -> Result<(), Code> {
    context.memory.range(address, bytes as u64).map(|_| ()).map_err(|_| Code::InvalidValue)
}

/// Runs the body of a copy or fill with its stream, unless it is of 0 bytes.
fn transfer(
    stream: Handle,
    bytes: usize,
    body: impl FnOnce(&Context, &Stream) -> Result<(), Code>,
) -> Result<(), Code> {
    let context = current()?;
    let stream = context.stream(stream)?;
    if bytes == 0 { Ok(()) } else { body(&context, &stream) }
}

/// The source of a copy is read at once, except page-locked memory and the source of a graph's node, which
/// are read when the copy executes.
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: *const c_void, bytes: usize, stream: Handle) -> Code {
    call(|| {
        transfer(stream, bytes, |context, stream| {
            check_range(context, to, bytes)?;
            if from.is_null() {
                return Err(Code::InvalidValue);
            }
            if stream.is_capturing() || is_page_locked(context, from as usize, bytes) {
                return stream.enqueue([Work::CopyIn { to, from: from as usize, bytes }]);
            }
            // SAFETY: the caller says that the source has this many bytes.
            let from: Arc<[u8]> = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes) }.into();
            stream.enqueue([Work::CopyBytesIn { to, from }])
        })
    })
}

/// The call returns when the copy is done, except for page-locked memory and in a capture.
#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(to: *mut c_void, from: u64, bytes: usize, stream: Handle) -> Code {
    call(|| {
        transfer(stream, bytes, |context, stream| {
            check_range(context, from, bytes)?;
            if to.is_null() {
                return Err(Code::InvalidValue);
            }
            stream.enqueue([Work::CopyOut { to: to as usize, from, bytes }])?;
            if !stream.is_capturing() && !is_page_locked(context, to as usize, bytes) {
                stream.worker.finish();
                context.check()?;
            }
            Ok(())
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: Handle) -> Code {
    call(|| {
        transfer(stream, bytes, |context, stream| {
            check_range(context, to, bytes)?;
            check_range(context, from, bytes)?;
            stream.enqueue([Work::Copy { to, from, bytes }])
        })
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemsetD8Async(to: u64, byte: u8, bytes: usize, stream: Handle) -> Code {
    call(|| {
        transfer(stream, bytes, |context, stream| {
            check_range(context, to, bytes)?;
            stream.enqueue([Work::Set { to, byte, bytes }])
        })
    })
}
