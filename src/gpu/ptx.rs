//! The kernels' PTX in the binary, and the modules that a driver makes of it.

use crate::gpu::cuda::reason;
use crate::{Error, Result};
use cudarc::driver::result::DriverError;
use cudarc::driver::sys;
use std::ffi::{CStr, CString, c_void};
use std::mem::MaybeUninit;

/// One source file of `cuda/`, compiled for compute_80 and for compute_90a.
pub(super) struct Module {
    pub(super) file: &'static str,
    pub(super) ptx: [&'static str; 2],
}

/// All modules; empty in a binary built without nvcc.
pub(super) static MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

/// The virtual architectures that this binary's kernels are compiled for; empty in a binary built without
/// nvcc.
pub fn targets() -> &'static [&'static str] {
    if MODULES.is_empty() { &[] } else { &["compute_80", "compute_90a"] }
}

/// A module, which stays loaded until the context is released.
pub(super) struct LoadedModule(pub(super) sys::CUmodule);

// SAFETY: a module is a handle that any thread may use.
unsafe impl Send for LoadedModule {}
// SAFETY: as for Send; the driver synchronizes concurrent calls.
unsafe impl Sync for LoadedModule {}

/// Loads a module from image 0 (compute_80) or 1 (compute_90a).
pub(super) fn load(module: &Module, image: usize, driver: u32) -> Result<LoadedModule> {
    let wrong = |what: String| Error::Internal(format!("CUDA module {}: {what}", module.file));
    let ptx = CString::new(module.ptx[image]).map_err(|_| wrong("its PTX holds a zero byte".to_string()))?;
    let mut log = vec![0u8; 8192];
    let mut options = [
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
        sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
        sys::CUjit_option::CU_JIT_GENERATE_LINE_INFO,
    ];
    // The interface passes numbers as pointers. Line information is for sanitizers and profilers.
    let number = std::ptr::without_provenance_mut;
    let mut values = [log.as_mut_ptr().cast::<c_void>(), number(log.len() - 1), number(1)];
    let mut loaded = MaybeUninit::uninit();
    // SAFETY: the image is a C string, the log is longer than its stated size, and there are as many values
    // as options.
    let result = unsafe {
        sys::cuModuleLoadDataEx(
            loaded.as_mut_ptr(),
            ptx.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    match result.result() {
        // SAFETY: the driver wrote the handle, because the call succeeded.
        Ok(()) => Ok(LoadedModule(unsafe { loaded.assume_init() })),
        Err(DriverError(sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION)) => {
            Err(Error::Unsupported(format!(
                "device cuda: the NVIDIA driver (CUDA {}.{}) is too old for this binary's kernels, which a newer nvcc built",
                driver / 1000,
                driver % 1000 / 10
            )))
        }
        Err(e) => {
            let log = CStr::from_bytes_until_nul(&log).map(CStr::to_string_lossy).unwrap_or_default();
            let log = log.split_whitespace().collect::<Vec<_>>().join(" ");
            let words = reason(e);
            let colon = if log.is_empty() { "" } else { ": " };
            Err(Error::Internal(format!("CUDA: loading module {} failed: {words}{colon}{log}", module.file)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use softgpu::card::Card;
    use std::collections::BTreeSet;

    /// Profilers and sanitizers need line information to name source lines.
    #[test]
    fn both_images_of_every_kernel_have_line_information() {
        for module in MODULES {
            for (ptx, target) in module.ptx.iter().zip(targets()) {
                let names_source = |line: &str| {
                    line.starts_with("\t.file") && line.contains(&format!("{}.cu\"", module.file))
                };
                assert!(ptx.lines().any(names_source), "{} for {target} names no source", module.file);
                // The text of an entry point ends where the next one begins.
                let entries = ptx.split(".visible .entry ").skip(1);
                let without_lines: Vec<&str> = entries
                    .filter(|entry| !entry.lines().any(|line| line.starts_with("\t.loc\t")))
                    .map(|entry| entry.split('(').next().unwrap())
                    .collect();
                assert_eq!(without_lines, [""; 0], "{} for {target}", module.file);
            }
        }
    }
    /// The software GPU knows every instruction of both images, and they have the kernels of cuda/expected.txt.
    #[test]
    fn both_images_load_and_have_the_listed_kernels() {
        assert!(!MODULES.is_empty(), "kernel tests need nvcc: tools/get-nvcc.sh");
        let names = |image: usize, card: &str| -> BTreeSet<String> {
            let card = Card::find(card).unwrap();
            let load = |module: &Module| {
                let loaded = softgpu::ptx::load(module.ptx[image], card);
                loaded.unwrap_or_else(|e| panic!("{} for {}: {e}", module.file, targets()[image]))
            };
            let kernels =
                |module| load(module).kernels().map(|kernel| kernel.name.clone()).collect::<Vec<_>>();
            MODULES.iter().flat_map(kernels).collect()
        };
        for (image, card) in ["a100", "h200"].into_iter().enumerate() {
            let lines = include_str!("../../cuda/expected.txt").lines().filter(|line| !line.starts_with('#'));
            let rows = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
            let listed =
                rows.filter(|row| row.len() > 2 && row[1 + image] != "-").map(|row| row[0].to_string());
            assert_eq!(names(image, card), listed.collect(), "{}", targets()[image]);
        }
    }
}
