//! What a bug report needs to know: version, commit, kernels, device, driver.

use crate::gpu::cuda;
use serde_json::{Value, json};

/// The commit of the build: `DFLASH_COMMIT` in its environment, else what git named; none outside a checkout.
pub const COMMIT: Option<&str> = option_env!("DFLASH_COMMIT");

/// Facts about this build and this machine, for `--version --json`. `cuda_driver` is the newest CUDA version
/// that the driver supports, as "13.0"; `device` is the name of GPU number `gpu`, or null with the reason in
/// `no_device`.
pub fn facts(program: &str, gpu: u32) -> Value {
    let (device, no_device) = match cuda::Cuda::probe(gpu) {
        Ok(properties) => (json!(properties.name), Value::Null),
        Err(error) => (Value::Null, json!(error.to_string())),
    };
    let driver = cuda::driver_version().ok().flatten();
    json!({
        "program": program,
        "version": env!("CARGO_PKG_VERSION"),
        "commit": COMMIT,
        "cuda_targets": cuda::targets(),
        "emulator": cfg!(feature = "emulator"),
        "device": device,
        "no_device": no_device,
        "cuda_driver": driver.map(|version| format!("{}.{}", version / 1000, version % 1000 / 10)),
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "cores": std::thread::available_parallelism().map_or(1, usize::from),
    })
}
