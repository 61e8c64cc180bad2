//! `CUresult`: what every driver function returns.

use std::ffi::CStr;

macro_rules! codes {
    ($($variant:ident $number:literal $name:literal $words:literal)*) => {
        /// The results that this driver returns, with the numbers of `CUresult`.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(i32)]
        pub enum Code {
            $($variant = $number,)*
        }

        /// The name and the description of a result.
        pub fn describe(number: i32) -> Option<(&'static CStr, &'static CStr)> {
            match number {
                $($number => Some(($name, $words)),)*
                _ => None,
            }
        }
    };
}

codes! {
    Success 0 c"CUDA_SUCCESS" c"no error"
    InvalidValue 1 c"CUDA_ERROR_INVALID_VALUE" c"invalid argument"
    OutOfMemory 2 c"CUDA_ERROR_OUT_OF_MEMORY" c"out of memory"
    NotInitialized 3 c"CUDA_ERROR_NOT_INITIALIZED" c"initialization error"
    NoDevice 100 c"CUDA_ERROR_NO_DEVICE" c"no CUDA-capable device is detected"
    InvalidDevice 101 c"CUDA_ERROR_INVALID_DEVICE" c"invalid device ordinal"
    InvalidContext 201 c"CUDA_ERROR_INVALID_CONTEXT" c"invalid device context"
    NoBinaryForGpu 209 c"CUDA_ERROR_NO_BINARY_FOR_GPU"
        c"no kernel image is available for execution on the device"
    InvalidPtx 218 c"CUDA_ERROR_INVALID_PTX" c"a PTX JIT compilation failed"
    UnsupportedPtxVersion 222 c"CUDA_ERROR_UNSUPPORTED_PTX_VERSION"
        c"the provided PTX was compiled with an unsupported toolchain."
    InvalidHandle 400 c"CUDA_ERROR_INVALID_HANDLE" c"invalid resource handle"
    IllegalState 401 c"CUDA_ERROR_ILLEGAL_STATE" c"the operation cannot be performed in the present state"
    NotFound 500 c"CUDA_ERROR_NOT_FOUND" c"named symbol not found"
    NotReady 600 c"CUDA_ERROR_NOT_READY" c"device not ready"
    IllegalAddress 700 c"CUDA_ERROR_ILLEGAL_ADDRESS" c"an illegal memory access was encountered"
    ContextIsDestroyed 709 c"CUDA_ERROR_CONTEXT_IS_DESTROYED" c"context is destroyed"
    MisalignedAddress 716 c"CUDA_ERROR_MISALIGNED_ADDRESS" c"misaligned address"
    LaunchFailed 719 c"CUDA_ERROR_LAUNCH_FAILED" c"unspecified launch failure"
    NotSupported 801 c"CUDA_ERROR_NOT_SUPPORTED" c"operation not supported"
    CaptureUnsupported 900 c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
        c"operation not permitted when stream is capturing"
    CaptureInvalidated 901 c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"
        c"operation failed due to a previous error during capture"
    CapturedEvent 907 c"CUDA_ERROR_CAPTURED_EVENT"
        c"operation not permitted on an event last recorded in a capturing stream"
    CaptureWrongThread 908 c"CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD"
        c"attempt to terminate a thread-local capture sequence from another thread"
    Unknown 999 c"CUDA_ERROR_UNKNOWN" c"unknown error"
}
