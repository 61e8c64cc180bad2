//! `--device`: its words, and opening what runs the kernels.

use crate::checkpoint::pair::Pair;
use crate::cli::terminal;
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::cuda::Cuda;
use crate::gpu::device::Device;
use crate::gpu::memory::{MemoryPlan, Overhead};
use crate::{Error, Result};

/// Where to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Choice {
    /// A GPU if one can run the pair, else the CPU
    Auto,
    /// Plain f32, the reference
    Cpu,
    /// The kernels on a GPU
    Cuda,
    /// The kernels on the CPU, slowly, for tests; builds with the feature emulator have it
    Emulator,
}

/// What runs the kernels.
pub struct DeviceHandle {
    /// The word in `--device` and in records.
    pub name: &'static str,
    pub device: Box<dyn Device>,
    /// What an allocation costs there beyond its bytes.
    pub overhead: Overhead,
}

impl DeviceHandle {
    /// GPU number `number`, as the driver counts.
    ///
    /// # Errors
    /// As [`Cuda::open`].
    pub fn gpu(number: u32) -> Result<DeviceHandle> {
        Ok(DeviceHandle { name: "cuda", device: Box::new(Cuda::open(number)?), overhead: Overhead::GPU })
    }

    /// The emulator, on all cores.
    ///
    /// # Errors
    /// [`Error::Unsupported`] in a build without it.
    #[cfg(feature = "emulator")]
    pub fn emulator() -> Result<DeviceHandle> {
        let device = crate::gpu::emulator::Emulator::new();
        device.set_threads(std::thread::available_parallelism().map_or(1, usize::from));
        Ok(DeviceHandle { name: "emulator", device: Box::new(device), overhead: Overhead::NONE })
    }

    /// The emulator, which this build does not have.
    ///
    /// # Errors
    /// [`Error::Unsupported`], always.
    #[cfg(not(feature = "emulator"))]
    pub fn emulator() -> Result<DeviceHandle> {
        Err(Error::Unsupported(
            "--device emulator is not in this build: expected one with `cargo build --release --features emulator`"
                .into(),
        ))
    }

    /// Where a pair with that room runs; None: on the CPU. Left to itself: on the GPU if the kernels run the pair there.
    /// A sentence on stderr then says which and why, unless `quiet`.
    ///
    /// # Errors
    /// As [`DeviceHandle::gpu`] and [`DeviceHandle::emulator`], where one of them was asked for.
    pub fn of_pair(
        choice: Choice,
        number: u32,
        pair: &Pair,
        room: BatchConfig,
        quiet: bool,
    ) -> Result<Option<DeviceHandle>> {
        let say = |line: &str| {
            if !quiet {
                terminal::note(line);
            }
        };
        match choice {
            Choice::Cpu => Ok(None),
            Choice::Cuda => DeviceHandle::gpu(number).map(Some),
            Choice::Emulator => DeviceHandle::emulator().map(Some),
            Choice::Auto => {
                match DeviceHandle::gpu(number).and_then(|gpu| MemoryPlan::new(pair, room).map(|_| gpu)) {
                    Ok(gpu) => {
                        say(&format!("device: cuda, {}", gpu.device.properties().name));
                        Ok(Some(gpu))
                    }
                    Err(reason) => {
                        let reason = reason.to_string();
                        say(&format!("device: cpu: {}", reason.trim_start_matches("device cuda: ")));
                        Ok(None)
                    }
                }
            }
        }
    }

    /// Whether a pair with that room fits into the memory that is free now. What it takes is said on stderr, unless
    /// `quiet` and it fits.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`] and [`MemoryPlan::check`].
    pub fn has_memory(&self, pair: &Pair, room: BatchConfig, quiet: bool) -> Result<()> {
        let plan = MemoryPlan::new(pair, room)?;
        let (free, _) = self.device.memory()?;
        let fits = plan.check(pair, usize::try_from(free).unwrap_or(usize::MAX), self.overhead);
        if !quiet || fits.is_err() {
            terminal::note(&plan.to_string());
        }
        fits
    }

    /// What runs kernels where `choice` says; on their own, a GPU, else the emulator.
    ///
    /// # Errors
    /// [`Error::Usage`] for the CPU, which has none; [`Error::Unsupported`] where neither opens.
    pub fn of_kernels(choice: Choice, number: u32) -> Result<DeviceHandle> {
        match choice {
            Choice::Cuda => DeviceHandle::gpu(number),
            Choice::Emulator => DeviceHandle::emulator(),
            Choice::Auto => {
                DeviceHandle::gpu(number).or_else(|reason| DeviceHandle::emulator().map_err(|_| reason))
            }
            Choice::Cpu => {
                Err(Error::Usage("--device is cpu, which has no kernels: expected cuda or emulator".into()))
            }
        }
    }
}
