//! A pair on a device as a [`Backend`] of the engine.

use super::{Batch, Models};
use crate::Result;
use crate::checkpoint::pair::Pair;
use crate::engine::generate::{Backend, Decoder};
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::device::Device;

/// A backend on a device: a device, a pair's weights on it, and the capacity of its decoders.
pub struct DeviceBackend {
    name: &'static str,
    device: Box<dyn Device>,
    models: Models,
    config: BatchConfig,
}

impl DeviceBackend {
    /// Loads the pair. `name` is the backend's name, `cuda` or `softgpu`. Calls `progress` with the bytes
    /// loaded so far and the total.
    ///
    /// # Errors
    /// As [`Models::load_with`].
    pub fn load(
        name: &'static str,
        device: Box<dyn Device>,
        pair: &Pair,
        config: BatchConfig,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<DeviceBackend> {
        let models = Models::load_with(&*device, pair, config.positions, progress)?;
        Ok(DeviceBackend { name, device, models, config })
    }
}

impl Backend for DeviceBackend {
    fn name(&self) -> &'static str {
        self.name
    }

    fn decoder(&self) -> Result<Box<dyn Decoder + '_>> {
        Ok(Box::new(Batch::new(&*self.device, &self.models, self.config)?))
    }
}
