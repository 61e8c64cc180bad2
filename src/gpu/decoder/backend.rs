//! A pair on a device as a [`Backend`] of the engine.

use super::{Batch, Models};
use crate::checkpoint::pair::Pair;
use crate::engine::generate::{Backend, Decoder};
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::device::Device;
use crate::{Error, Result};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

/// What of a pair is loaded so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loading {
    /// Bytes of the weights' files, and all of them.
    Weights(usize, usize),
    /// Number of kernels, and of all of them, and the name of the last one. The driver compiles them while
    /// weights are read, so that they are told of when all weights are there.
    Kernels(usize, usize, &'static str),
}

/// A backend on a device: a device, a pair's weights on it, and the capacity of its decoders.
pub struct DeviceBackend {
    name: &'static str,
    device: Box<dyn Device>,
    models: Models,
    config: BatchConfig,
}

impl DeviceBackend {
    /// Loads the pair. `name` is the backend's name, `cuda` or `softgpu`. Calls `progress` after each piece.
    ///
    /// # Errors
    /// As [`Models::load_with`].
    pub fn load(
        name: &'static str,
        device: Box<dyn Device>,
        pair: &Pair,
        config: BatchConfig,
        progress: &mut dyn FnMut(Loading),
    ) -> Result<DeviceBackend> {
        // The driver compiles the kernels while the weights are read.
        let kernels = Batch::kernels(pair, config)?;
        let (tell, told) = channel();
        let compile = || {
            device.load(&kernels, &|kernel| {
                let _ = tell.send(kernel.name);
            })
        };
        let models = thread::scope(|scope| {
            let compiling = thread::Builder::new().spawn_scoped(scope, compile);
            let weights = &mut |done, total| progress(Loading::Weights(done, total));
            let models = Models::load_with(&*device, pair, config.positions, weights)?;
            let Ok(compiling) = compiling else {
                compile()?;
                return Ok(models);
            };
            let mut done = 0;
            while done < kernels.len() {
                match told.recv_timeout(Duration::from_millis(50)) {
                    Ok(name) => {
                        done += 1;
                        progress(Loading::Kernels(done, kernels.len(), name));
                    }
                    Err(_) if compiling.is_finished() => break,
                    Err(_) => {}
                }
            }
            let panicked = |_| Err(Error::Internal("the thread that loads kernels has panicked".to_string()));
            compiling.join().unwrap_or_else(panicked)?;
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
