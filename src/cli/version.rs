//! What a bug report needs to know: version, commit, kernels, device, driver.

use crate::Result;
use crate::cli::terminal;
use crate::gpu::{cuda, ptx};
use nvml_wrapper::Nvml;
use serde_json::{Value, json};

/// The commit of the build: `DFLASH_COMMIT` in its environment, else what git named; none outside a checkout.
pub const COMMIT: Option<&str> = option_env!("DFLASH_COMMIT");

/// Prints the version of `program`, or with `json` its [`facts`].
///
/// # Errors
/// As [`terminal::print`].
pub fn print(program: &str, json: bool, gpu: u32) -> Result<()> {
    let text = match json {
        true => facts(program, gpu).to_string(),
        false => format!("{program} {}", env!("CARGO_PKG_VERSION")),
    };
    terminal::print(&(text + "\n")).map(drop)
}

/// Facts about this build and this machine, for `--version --json`. `driver` is the version of the NVIDIA
/// driver, as "580.95.05"; `cuda_driver_api` the newest CUDA version that it supports, as "13.0", and
/// `cuda_driver` the earlier name of that; `device` the name of GPU number `gpu`, or null with the reason in
/// `no_device`.
pub fn facts(program: &str, gpu: u32) -> Value {
    let (device, no_device) = match cuda::Cuda::probe(gpu) {
        Ok(properties) => (json!(properties.name), Value::Null),
        Err(error) => (Value::Null, json!(error.to_string())),
    };
    let driver = Nvml::init().and_then(|nvml| nvml.sys_driver_version()).ok();
    let api = cuda::driver_version().ok().flatten();
    let api = api.map(|version| format!("{}.{}", version / 1000, version % 1000 / 10));
    json!({
        "program": program,
        "version": env!("CARGO_PKG_VERSION"),
        "commit": COMMIT,
        "cuda_targets": ptx::targets(),
        "device": device,
        "no_device": no_device,
        "driver": driver,
        "cuda_driver_api": api,
        "cuda_driver": api,
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
    })
}
