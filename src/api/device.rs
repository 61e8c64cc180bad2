//! Choosing and opening the device that runs a pair.

use crate::checkpoint::pair::Pair;
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::cuda::Cuda;
use crate::gpu::decoder::Batch;
use crate::gpu::device::Device;
use crate::gpu::memory::{MemoryPlan, Overhead};
use crate::{Error, Result};

/// Where to run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// A GPU if one can run the pair, else the CPU.
    #[default]
    Auto,
    /// The CPU reference in f32.
    Cpu,
    /// The CUDA kernels on a GPU.
    Cuda,
}

/// An open device that runs the kernels.
pub struct DeviceHandle {
    /// The device's name in records: `cuda`, or `softgpu` for a GPU in software, which counts and has no times.
    pub name: &'static str,
    /// The device.
    pub device: Box<dyn Device>,
    /// What an allocation on it costs beyond its bytes.
    pub overhead: Overhead,
}

/// Where a pair runs.
pub enum Placement {
    /// On a device that runs the kernels.
    Device(DeviceHandle),
    /// On the CPU.
    Cpu {
        /// Why it does not run on a GPU, if the choice was [`DeviceChoice::Auto`].
        fallback: Option<Error>,
    },
}

impl DeviceHandle {
    /// GPU number `number` in the driver's order, from 0.
    ///
    /// # Errors
    /// As [`Cuda::open`].
    pub fn gpu(number: u32) -> Result<DeviceHandle> {
        Ok(DeviceHandle::of(Box::new(Cuda::open(number)?)))
    }

    /// An open device.
    pub fn of(device: Box<dyn Device>) -> DeviceHandle {
        let name = if device.properties().software { "softgpu" } else { "cuda" };
        DeviceHandle { name, device, overhead: Overhead::GPU }
    }

    /// Chooses where a pair with these capacities runs, and opens the device. [`DeviceChoice::Auto`] takes
    /// GPU `number` if it opens and the kernels support the pair; else it takes the CPU and returns the
    /// reason.
    ///
    /// # Errors
    /// As [`DeviceHandle::gpu`] for an explicit choice.
    pub fn for_pair(
        choice: DeviceChoice,
        number: u32,
        pair: &Pair,
        capacity: BatchConfig,
    ) -> Result<Placement> {
        match choice {
            DeviceChoice::Cpu => Ok(Placement::Cpu { fallback: None }),
            DeviceChoice::Cuda => DeviceHandle::gpu(number).map(Placement::Device),
            DeviceChoice::Auto => {
                let runs = |gpu: DeviceHandle| {
                    let kernels = Batch::kernels(pair, capacity)?;
                    kernels.iter().try_for_each(|kernel| kernel.check_shared(gpu.device.properties()))?;
                    Ok(gpu)
                };
                match DeviceHandle::gpu(number).and_then(runs) {
                    Ok(gpu) => Ok(Placement::Device(gpu)),
                    Err(reason) => Ok(Placement::Cpu { fallback: Some(reason) }),
                }
            }
        }
    }

    /// Opens GPU `number`, to run kernels without a pair.
    ///
    /// # Errors
    /// [`Error::Option`] for the CPU, which runs no kernels; else as [`DeviceHandle::gpu`].
    pub fn for_kernels(choice: DeviceChoice, number: u32) -> Result<DeviceHandle> {
        match choice {
            DeviceChoice::Cuda | DeviceChoice::Auto => DeviceHandle::gpu(number),
            DeviceChoice::Cpu => Err(Error::option("device", "is cpu, which has no kernels: expected cuda")),
        }
    }

    /// The memory plan of a pair with these capacities, and whether it fits into the memory that is free.
    ///
    /// # Errors
    /// As [`MemoryPlan::new`]. Too little memory is [`Error::Memory`] in the second value.
    pub fn memory_plan(&self, pair: &Pair, capacity: BatchConfig) -> Result<(MemoryPlan, Result<()>)> {
        let plan = MemoryPlan::new(pair, capacity)?;
        let (free, _) = self.device.memory()?;
        let fits = plan.check(pair, usize::try_from(free).unwrap_or(usize::MAX), self.overhead);
        Ok((plan, fits))
    }
}
