//! Counters of all launches, by kernel, and the functions by which a program asks for them. They are no part
//! of CUDA.

use crate::driver::code::Code;
use crate::driver::context::{Driver, Handle, current};
use crate::driver::stream::lock;
use crate::driver::{Out, call, put, put_text};
use crate::machine::Counters;
use crate::settings::{device_count, set_option};
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int};
use std::fmt::Display;

/// What is counted, by name. The README explains the names.
fn fields(counters: &Counters) -> [(&'static str, u64); 17] {
    [
        ("blocks", counters.blocks),
        ("instructions", counters.instructions),
        ("tensor", counters.tensor),
        ("mma", counters.mma),
        ("shared", counters.shared),
        ("global", counters.global),
        ("float", counters.float),
        ("slow", counters.slow),
        ("branches", counters.branches),
        ("divergent", counters.divergent),
        ("barriers", counters.barriers),
        ("fences", counters.fences),
        ("atomics", counters.atomics),
        ("bytes_read", counters.bytes_read),
        ("bytes_written", counters.bytes_written),
        ("bytes_streamed", counters.bytes_streamed),
        ("sectors", counters.sectors),
    ]
}

/// The sums of a kernel's launches.
#[derive(Default)]
struct Sums {
    launches: u64,
    fields: BTreeMap<&'static str, u64>,
    /// Bank conflicts by line of the PTX.
    conflicts: BTreeMap<u32, u64>,
}

/// What was counted, by kernel.
#[derive(Default)]
pub struct Report(BTreeMap<String, Sums>);

impl Report {
    /// Adds the counters of some launches.
    pub fn add(&mut self, launches: &[Counters]) {
        for counters in launches {
            let sums = self.0.entry(counters.kernel.clone()).or_default();
            sums.launches += 1;
            for (name, count) in fields(counters) {
                *sums.fields.entry(name).or_default() += count;
            }
            for (line, count) in &counters.conflicts {
                *sums.conflicts.entry(*line).or_default() += count;
            }
        }
    }

    /// `{"card": .., "unreleased": {object: ..}, "kernels": {name: {"launches": .., counter: .., "conflicts":
    /// {line: ..}}}}`.
    pub fn json(&self, driver: &Driver) -> String {
        // Names of kernels and counters need no escapes.
        fn list<K: Display, C: Display>(counts: impl IntoIterator<Item = (K, C)>) -> String {
            let entry = |(key, count)| format!("\"{key}\": {count}");
            counts.into_iter().map(entry).collect::<Vec<_>>().join(", ")
        }
        let kernel = |(name, sums): (&String, &Sums)| {
            let (fields, conflicts) = (list(&sums.fields), list(&sums.conflicts));
            format!(
                "\"{name}\": {{\"launches\": {}, {fields}, \"conflicts\": {{{conflicts}}}}}",
                sums.launches
            )
        };
        let kernels = self.0.iter().map(kernel).collect::<Vec<_>>().join(",\n  ");
        let (card, unreleased) = (driver.settings.card.name, list(driver.unreleased()));
        format!(
            "{{\"card\": \"{card}\", \"unreleased\": {{{unreleased}}}, \"kernels\": {{\n  {kernels}\n}}}}\n"
        )
    }
}

fn json(driver: &Driver) -> String {
    lock(&driver.report).json(driver)
}

/// Writes the counters to the file of the settings when the process exits.
pub fn write_at_exit() {
    unsafe extern "C" {
        safe fn atexit(function: extern "C" fn()) -> c_int;
    }
    extern "C" fn write() {
        let Ok(driver) = Driver::get() else { return };
        let Some(file) = &driver.settings.report else { return };
        if let Err(e) = std::fs::write(file, json(driver)) {
            eprintln!("softgpu: cannot write {}: {e}", file.display());
        }
    }
    if atexit(write) != 0 {
        eprintln!("softgpu: the counters will not be written");
    }
}

/// Copies a text to the caller's buffer, cut to its size, and tells the size that the whole text needs, with
/// its zero.
fn answer(to: *mut c_char, bytes: usize, needed: Out<usize>, text: &str) -> Result<(), Code> {
    if to.is_null() && bytes > 0 {
        return Err(Code::InvalidValue);
    }
    // SAFETY: the caller says that the buffer has this many bytes; without any it is not written.
    unsafe { put_text(to.cast(), bytes, text) };
    put(needed, text.len() + 1)
}

/// Writes the counters of all launches that are done, as JSON, and the bytes that the text needs. The buffer
/// may be null if `bytes` is 0.
#[unsafe(no_mangle)]
extern "C" fn softgpuCountersJson(to: *mut c_char, bytes: usize, needed: Out<usize>) -> Code {
    call(|| answer(to, bytes, needed, &json(Driver::get()?)))
}

/// As [`softgpuCountersJson`], of the launches in one stream since it exists, after waiting for them.
#[unsafe(no_mangle)]
extern "C" fn softgpuStreamCountersJson(
    stream: Handle,
    to: *mut c_char,
    bytes: usize,
    needed: Out<usize>,
) -> Code {
    call(|| {
        let context = current()?;
        let stream = context.stream(stream)?;
        stream.worker.finish();
        let text = lock(&stream.worker.report).json(context.driver);
        answer(to, bytes, needed, &text)
    })
}

/// Starts counting from zero, but not for streams.
#[unsafe(no_mangle)]
extern "C" fn softgpuCountersReset() -> Code {
    call(|| {
        *lock(&Driver::get()?.report) = Report::default();
        Ok(())
    })
}

/// Writes the report of the fault that a context has, empty if there was none, as [`softgpuCountersJson`]
/// does.
#[unsafe(no_mangle)]
extern "C" fn softgpuFaultReport(to: *mut c_char, bytes: usize, needed: Out<usize>) -> Code {
    call(|| {
        let report = lock(&Driver::get()?.fault).clone();
        answer(to, bytes, needed, &report)
    })
}

/// Sets an option for launches from now on: `schedule`, `sums`, `perturb`, `races` or `vectors`, or `devices`, the
/// number of GPUs, to what its environment variable could say.
#[unsafe(no_mangle)]
extern "C" fn softgpuSetOption(name: *const c_char, value: *const c_char) -> Code {
    call(|| {
        if name.is_null() || value.is_null() {
            return Err(Code::InvalidValue);
        }
        // SAFETY: the caller says that both are C strings.
        let (name, value) = unsafe { (CStr::from_ptr(name), CStr::from_ptr(value)) };
        let (driver, value) = (Driver::get()?, value.to_string_lossy());
        let done = if name == c"devices" {
            device_count(&value).map(|devices| driver.set_devices(devices))
        } else {
            set_option(&mut lock(&driver.options), &name.to_string_lossy(), &value)
        };
        done.map_err(|sentence| {
            eprintln!("softgpu: {sentence}");
            Code::InvalidValue
        })
    })
}
