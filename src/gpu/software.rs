//! The functions that the software GPU (`tools/softgpu`) has beyond the CUDA driver API: counters of what kernels do.

use crate::gpu::device::Counts;
use cudarc::driver::sys;
use std::collections::BTreeMap;
use std::ffi::c_char;

type StreamCounters = unsafe extern "C" fn(sys::CUstream, *mut c_char, usize, *mut usize) -> sys::CUresult;

/// The functions, if the loaded driver is the software GPU.
pub(super) struct SoftwareGpu(StreamCounters);

impl SoftwareGpu {
    /// Looks for the functions in the driver, which must be loaded.
    pub(super) fn find() -> Option<SoftwareGpu> {
        // SAFETY: the driver is loaded, it stays loaded, and only the software GPU has this function.
        unsafe { sys::culib().get(b"softgpuStreamCountersJson\0").ok().map(|f| SoftwareGpu(*f)) }
    }

    /// The counters of the launches in a stream, by kernel, after waiting for them. `None` if the driver does not
    /// answer.
    pub(super) fn counters(&self, stream: sys::CUstream) -> Option<BTreeMap<String, Counts>> {
        let mut needed = 0;
        // SAFETY: a null buffer of 0 bytes is allowed, and `needed` is a local.
        unsafe { (self.0)(stream, std::ptr::null_mut(), 0, &mut needed) }.result().ok()?;
        let mut text = vec![0u8; needed];
        // SAFETY: the buffer has the stated size, and `needed` is a local.
        unsafe { (self.0)(stream, text.as_mut_ptr().cast(), text.len(), &mut needed) }.result().ok()?;
        text.truncate(text.iter().position(|&byte| byte == 0)?);
        let report: serde_json::Value = serde_json::from_slice(&text).ok()?;
        let kernels = report["kernels"].as_object()?;
        Some(kernels.iter().map(|(name, sums)| (name.clone(), counts(sums))).collect())
    }
}

/// The counters of one kernel from its entry in the report.
fn counts(sums: &serde_json::Value) -> Counts {
    let number = |name: &str| sums[name].as_u64().unwrap_or(0);
    let by_line = sums["conflicts"].as_object().into_iter().flatten();
    Counts {
        launches: number("launches"),
        blocks: number("blocks"),
        streamed: number("bytes_streamed"),
        read: number("bytes_read") - number("bytes_streamed"),
        written: number("bytes_written"),
        mma: number("mma"),
        shared: number("shared"),
        conflicts: by_line.filter_map(|(_, count)| count.as_u64()).sum(),
        instructions: number("instructions"),
        slow: number("slow"),
        barriers: number("barriers"),
        fences: number("fences"),
    }
}
