//! `--device`: where to run, and what is to be known before anything is loaded there.

use crate::args::Args;
use dflash::Result;
use dflash::checkpoint::pair::Pair;
use dflash::cli::device;
use dflash::cli::terminal;
use dflash::engine::generate::Backend;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::DeviceBackend;

/// Room for `--batch` sequences of `--ctx` positions, in blocks of up to `block` rows; `needed`: by the longest request.
pub fn room(args: &Args, pair: &Pair, block: usize, needed: usize) -> Result<BatchConfig> {
    Ok(args.drafts.room(BatchConfig::of(pair, args.batch, block, args.ctx, needed)?))
}

/// The pair, loaded where `--device` says.
pub fn load(args: &Args, pair: &Pair, room: BatchConfig) -> Result<Box<dyn Backend>> {
    let Some(place) = device::for_pair(args.device, args.gpu.unwrap_or(0), pair, room, args.quiet)? else {
        // Its caches grow with the requests, so that only `--ctx` limits them.
        return Ok(Box::new(args.drafts.cpu(pair, room.sequences, args.context(pair)?)?));
    };
    device::check_memory(&place, pair, room, args.quiet)?;
    let (bar, mut progress) = terminal::weights(args.quiet);
    let backend = DeviceBackend::load(place.name, place.device, pair, room, &mut progress);
    bar.finish_and_clear();
    Ok(Box::new(backend?))
}
