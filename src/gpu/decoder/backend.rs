//! A pair on a device as a [`Backend`] of the engine.

use super::{Batch, Models};
use crate::checkpoint::pair::Pair;
use crate::engine::generate::{Backend, Decoder};
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::device::Device;
use crate::{Error, Result};
use std::thread;

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
        // The driver compiles the kernels while the weights are read.
        let kernels = Batch::kernels(pair, config)?;
        let compile = || device.load(&kernels);
        let models = thread::scope(|scope| {
            let compiling = thread::Builder::new().spawn_scoped(scope, compile);
            let models = Models::load_with(&*device, pair, config.positions, progress)?;
            let panicked = |_| Err(Error::Internal("the thread that loads kernels has panicked".to_string()));
            compiling.map_or_else(|_| compile(), |thread| thread.join().unwrap_or_else(panicked))?;
            Ok::<_, Error>(models)
        })?;
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
