//! The CUDA driver API: the C functions of `libcuda.so.1` that a program needs to load PTX, launch kernels,
//! and capture and launch graphs.
//!
//! Every function checks its arguments and returns a `CUresult`. A handle that is null, stale or of another
//! kind is an error. As in C, a pointer must be null or valid for what the function's documentation says, and
//! is checked for null only.

mod api;
mod code;
mod context;
mod graph;
mod report;
mod stream;

use code::Code;
use context::Driver;
use std::any::type_name;
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// A pointer to which a function writes a result.
type Out<'a, T> = Option<&'a mut MaybeUninit<T>>;

/// Writes a result.
///
/// # Errors
/// [`Code::InvalidValue`] if the pointer is null.
fn put<T>(to: Out<T>, value: T) -> Result<(), Code> {
    to.map(|to| to.write(value)).map(|_| ()).ok_or(Code::InvalidValue)
}

/// Runs the body of a C function, a closure in that function, unless the settings let this call fail. A panic
/// becomes [`Code::Unknown`].
fn call<F: FnOnce() -> Result<(), Code>>(body: F) -> Code {
    // The type of the closure is named `MODULE::FUNCTION::{{closure}}`.
    let function = type_name::<F>().rsplit("::").nth(1).unwrap_or_default();
    if Driver::get().is_ok_and(|driver| driver.fails(function)) {
        return Code::OutOfMemory;
    }
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => Code::Success,
        Ok(Err(code)) => code,
        Err(_) => Code::Unknown,
    }
}

/// Copies text and a terminating zero to a buffer, cut to its size.
///
/// # Safety
/// `to` is valid for writes of `bytes` bytes.
unsafe fn put_text(to: *mut u8, bytes: usize, text: &str) {
    if let Some(room) = bytes.checked_sub(1) {
        let text = &text.as_bytes()[..text.len().min(room)];
        // SAFETY: the text and its zero fit.
        unsafe {
            to.copy_from_nonoverlapping(text.as_ptr(), text.len());
            to.add(text.len()).write(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_unknown_error() {
        assert_eq!(call(|| panic!("not across the C boundary")), Code::Unknown);
        assert_eq!(call(|| Err(Code::NotFound)), Code::NotFound);
        assert_eq!(call(|| Ok(())), Code::Success);
    }

    #[test]
    fn text_is_cut_to_its_buffer() {
        let mut buffer = [7u8; 4];
        for (bytes, expected) in [(0, [7, 7, 7, 7]), (1, [0, 7, 7, 7]), (3, *b"ab\0\x07"), (4, *b"abc\0")] {
            // SAFETY: the buffer has at least this many bytes.
            unsafe { put_text(buffer.as_mut_ptr(), bytes, "abc") };
            assert_eq!(buffer, expected);
        }
    }

    #[test]
    fn every_code_has_a_name() {
        for code in [Code::Success, Code::IllegalAddress, Code::CaptureWrongThread, Code::Unknown] {
            let (name, words) = code::describe(code as i32).unwrap();
            assert!(name.to_str().unwrap().starts_with("CUDA_") && !words.is_empty());
        }
        assert_eq!(code::describe(12345), None);
    }
}
