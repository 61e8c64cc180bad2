//! The device: what it must have capacity for, and loading the pair there.

use crate::job::Job;
use dflash::Result;
use dflash::checkpoint::pair::Pair;
use dflash::cli::device;
use dflash::cli::terminal;
use dflash::cpu::decoder::Cpu;
use dflash::engine::decoder::Backend;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{DeviceBackend, Loading};

/// The capacity for the job's sequences, in blocks of up to `block` rows; `needed`: positions of the longest
/// request.
pub fn capacity(job: &Job, pair: &Pair, block: usize, needed: usize) -> Result<BatchConfig> {
    Ok(BatchConfig::for_pair(pair, job.batch, block, job.ctx, needed)?.for_spec(&job.spec))
}

/// Loads the pair where the job says.
pub fn load(job: &Job, pair: &Pair, capacity: BatchConfig) -> Result<Box<dyn Backend>> {
    let Some(handle) = device::for_pair(job.device, job.gpu, pair, capacity, job.quiet)? else {
        // The CPU's caches grow with the requests, so only the context limits them.
        return Ok(Box::new(Cpu::load(pair, capacity.sequences, job.context(pair)?)?));
    };
    device::check_memory(&handle, pair, capacity, job.quiet)?;
    let (bar, mut weights) = terminal::weights(job.quiet);
    let kernels = terminal::progress("kernels {bar:40} {pos} of {len}, {msg}", job.quiet);
    let mut progress = |loading| match loading {
        Loading::Weights(done, total) => weights(done, total),
        Loading::Kernels(done, total, name) => {
            bar.finish_and_clear();
            kernels.set_length(total as u64);
            kernels.set_position(done as u64);
            kernels.set_message(name);
        }
    };
    let backend = DeviceBackend::load(handle.name, handle.device, pair, capacity, &mut progress);
    bar.finish_and_clear();
    kernels.finish_and_clear();
    Ok(Box::new(backend?))
}
