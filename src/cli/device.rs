//! `--device`: its values, and the lines on stderr that say where a pair runs and what memory it takes.

pub use crate::api::device::{DeviceChoice as Choice, DeviceHandle};

use crate::api::device::Placement;
use crate::checkpoint::pair::Pair;
use crate::cli::terminal::{message, note};
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::ptx;
use crate::{Error, Result};
use clap::builder::PossibleValue;

impl clap::ValueEnum for Choice {
    fn value_variants<'a>() -> &'a [Choice] {
        &[Choice::Auto, Choice::Cpu, Choice::Cuda]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let (name, help) = match self {
            Choice::Auto => ("auto", "A GPU if one can run the pair, else the CPU"),
            Choice::Cpu => ("cpu", "The CPU reference in f32"),
            Choice::Cuda => ("cuda", "The kernels on a GPU"),
        };
        Some(PossibleValue::new(name).help(help))
    }
}

/// The most threads that `--threads` takes.
const MAX_THREADS: usize = 1024;

/// Parses `--threads`; for clap's `value_parser`. The error says what is expected.
pub fn threads(text: &str) -> std::result::Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=MAX_THREADS).contains(number));
    number.ok_or_else(|| format!("expected a whole number from 1 to {MAX_THREADS}"))
}

/// How to get a binary with kernels.
const KERNELS_HINT: &str = "; for an NVIDIA GPU: tools/get-nvcc.sh && cargo build --release";

/// The device that runs a pair with these capacities; `None` for the CPU. For `auto`, prints a line on stderr
/// that says which device it is and why, unless `quiet`.
///
/// # Errors
/// As [`DeviceHandle::for_pair`].
pub fn for_pair(
    choice: Choice,
    number: u32,
    pair: &Pair,
    capacity: BatchConfig,
    quiet: bool,
) -> Result<Option<DeviceHandle>> {
    let say = |line: &str| {
        if !quiet {
            note(line);
        }
    };
    let hint = if ptx::targets().is_empty() { KERNELS_HINT } else { "" };
    let found = DeviceHandle::for_pair(choice, number, pair, capacity);
    let found = found.map_err(|error| match error {
        Error::Unsupported(what) if choice == Choice::Cuda => Error::Unsupported(what + hint),
        other => other,
    });
    Ok(match found? {
        Placement::Device(gpu) => {
            if choice == Choice::Auto {
                say(&format!("device: cuda, {}", gpu.device.properties().name));
            }
            Some(gpu)
        }
        Placement::Cpu { fallback } => {
            if let Some(reason) = fallback {
                let reason = message(&reason);
                say(&format!("device: cpu: {}{hint}", reason.trim_start_matches("device cuda: ")));
            }
            None
        }
    })
}

/// Checks that a pair with these capacities fits into the memory that is free now. Prints the memory plan on
/// stderr, unless `quiet` and it fits.
///
/// # Errors
/// As [`DeviceHandle::memory_plan`]; [`Error::Memory`] if it does not fit.
pub fn check_memory(device: &DeviceHandle, pair: &Pair, capacity: BatchConfig, quiet: bool) -> Result<()> {
    let (plan, fits) = device.memory_plan(pair, capacity)?;
    if !quiet || fits.is_err() {
        note(&plan.to_string());
    }
    fits
}
