//! The kernels' PTX in the binary, and the modules that a driver makes of it.

use crate::gpu::cuda::reason;
use crate::{Error, Result};
use cudarc::driver::result::DriverError;
use cudarc::driver::sys;
use std::ffi::{CStr, CString, c_void};
use std::mem::MaybeUninit;

/// One source file of `cuda/`.
pub(super) struct Module {
    pub(super) file: &'static str,
    /// The virtual architectures it is compiled for, the newest last, each with its PTX.
    pub(super) images: &'static [(&'static str, &'static str)],
}

impl Module {
    /// The PTX of the newest architecture that a GPU of this compute capability runs.
    fn image(&self, capability: (u32, u32)) -> Option<&'static str> {
        let runs = |target: &str| match target {
            "compute_90a" => capability == (9, 0),
            "compute_90" => capability >= (9, 0),
            _ => true,
        };
        self.images.iter().rev().find(|(target, _)| runs(target)).map(|(_, ptx)| *ptx)
    }

    /// The names of its kernels for a GPU of this compute capability.
    pub(super) fn kernels(&self, capability: (u32, u32)) -> impl Iterator<Item = &'static str> {
        let entries = self.image(capability).into_iter().flat_map(|ptx| ptx.split(ENTRY).skip(1));
        entries.filter_map(|entry| entry.split('(').next())
    }

    /// The PTX of one of its kernels: what is before the first kernel, the kernel, and what is after the last
    /// one. So a driver compiles only the kernels that are launched, and several at the same time.
    fn kernel(&self, name: &str, capability: (u32, u32)) -> Option<String> {
        let ptx = self.image(capability)?;
        let (first, end) = (ptx.find(ENTRY)?, ptx.find(FILES).unwrap_or(ptx.len()));
        let start = ptx.find(&format!("{ENTRY}{name}("))?;
        let next = ptx[start + 1..].find(ENTRY).map_or(end, |length| start + 1 + length);
        Some([&ptx[..first], &ptx[start..next], &ptx[end..]].concat())
    }
}

/// Begins a kernel in PTX.
const ENTRY: &str = "\n.visible .entry ";
/// Begins the part after the last kernel: names of source files and functions.
const FILES: &str = "\n\t.file\t";

/// The PTX of every kernel of this binary for a GPU of this compute capability, with the kernel's name and
/// that of its source file in `cuda/`.
pub fn kernels(capability: (u32, u32)) -> impl Iterator<Item = (&'static str, &'static str, String)> {
    MODULES.iter().flat_map(move |module| {
        let names = module.kernels(capability);
        names.filter_map(move |name| Some((module.file, name, module.kernel(name, capability)?)))
    })
}

/// All modules; empty in a binary built without nvcc.
pub(super) static MODULES: &[Module] = include!(concat!(env!("OUT_DIR"), "/ptx.rs"));

/// The virtual architectures that this binary's kernels are compiled for; empty in a binary built without
/// nvcc.
pub fn targets() -> &'static [&'static str] {
    if MODULES.is_empty() { &[] } else { &["compute_80", "compute_90", "compute_90a"] }
}

/// Compiles and loads a kernel of a module for a GPU of this compute capability, alone. `driver` is the
/// driver's CUDA version. The driver's module stays loaded until the context is released.
pub(super) fn load(
    module: &Module,
    kernel: &str,
    capability: (u32, u32),
    driver: u32,
) -> Result<sys::CUmodule> {
    let wrong = |what: &str| Error::Internal(format!("kernel {kernel}: {what}"));
    let ptx = module.kernel(kernel, capability).ok_or_else(|| wrong("it is not compiled for this GPU"))?;
    let ptx = CString::new(ptx).map_err(|_| wrong("its PTX holds a zero byte"))?;
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
        Ok(()) => Ok(unsafe { loaded.assume_init() }),
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
            Err(Error::Internal(format!("CUDA: loading kernel {kernel} failed: {words}{colon}{log}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use softgpu::card::Card;
    use std::collections::BTreeSet;

    #[test]
    fn a_gpu_gets_the_newest_image_that_it_runs() {
        let most = Module { file: "", images: &[("compute_80", "80"), ("compute_90", "90")] };
        let wgmma = Module { file: "", images: &[("compute_90a", "90a")] };
        for (capability, expected) in [
            ((8, 0), [Some("80"), None]),
            ((8, 9), [Some("80"), None]),
            ((9, 0), [Some("90"), Some("90a")]),
            ((10, 0), [Some("90"), None]),
            ((12, 0), [Some("90"), None]),
        ] {
            assert_eq!([&most, &wgmma].map(|module| module.image(capability)), expected, "{capability:?}");
        }
    }

    /// Profilers and sanitizers need line information to name source lines.
    #[test]
    fn every_kernel_names_its_source_alone() {
        for capability in [(8, 0), (9, 0)] {
            for (file, name, ptx) in kernels(capability) {
                let one = ptx.matches(".entry ").count() == 1 && ptx.contains(&format!(".entry {name}("));
                assert!(one && ptx.starts_with("//\n") && ptx.ends_with('\n'), "{name}, {capability:?}");
                let names_source =
                    |line: &str| line.starts_with("\t.file") && line.contains(&format!("{file}.cu\""));
                assert!(ptx.lines().any(names_source), "{name}, {capability:?}");
                assert!(ptx.lines().any(|line| line.starts_with("\t.loc\t")), "{name}, {capability:?}");
            }
        }
    }

    /// The software GPU knows every instruction of all images, and they have the kernels of cuda/expected.txt. ptxas
    /// may not join a product and a sum to an `fma`.
    #[test]
    fn all_images_load_and_have_the_listed_kernels() {
        assert!(!MODULES.is_empty(), "kernel tests need nvcc: tools/get-nvcc.sh");
        let names = |cards: &[(&str, &str)]| -> BTreeSet<String> {
            let images =
                MODULES.iter().flat_map(|module| module.images.iter().map(move |i| (module.file, i)));
            let mut names = BTreeSet::new();
            for (file, (target, ptx)) in images {
                if let Some((_, card)) = cards.iter().find(|(of, _)| of == target) {
                    let loaded = softgpu::ptx::load(ptx, Card::find(card).unwrap());
                    let loaded = loaded.unwrap_or_else(|e| panic!("{file} for {target}: {e}"));
                    for kernel in loaded.kernels() {
                        assert_eq!(kernel.contractible(), [0; 0], "{file} for {target}: lines of products");
                        names.insert(kernel.name.clone());
                    }
                }
            }
            names
        };
        let images: [&[_]; 2] =
            [&[("compute_80", "a100")], &[("compute_90", "rtx5090"), ("compute_90a", "h200")]];
        for (column, cards) in images.into_iter().enumerate() {
            let lines = include_str!("../../cuda/expected.txt").lines().filter(|line| !line.starts_with('#'));
            let rows = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
            let listed =
                rows.filter(|row| row.len() > 2 && row[1 + column] != "-").map(|row| row[0].to_string());
            assert_eq!(names(cards), listed.collect(), "{cards:?}");
        }
    }
}
