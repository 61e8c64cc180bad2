//! `--device`: where to run, and what is to be known before anything is loaded there.

use crate::args::Args;
use dflash::control::Costs;
use dflash::engine::Backend;
use dflash::floor::Card;
use dflash::memory::Room;
use dflash::pair::Pair;
use dflash::place::{Choice, Place};
use dflash::rounds::OnDevice;
use dflash::sequences::Cpu;
use dflash::terminal::note;
use dflash::{Result, terminal};

/// What --adaptive takes a CPU for, whichever it is, so that a run's rounds can be had again: some cores of a server.
const CORES: Card = Card { name: "cpu", bandwidth: 20.0, tflops: 0.1, memory: f64::INFINITY };

/// Room for `--batch` sequences of `--ctx` positions, in blocks of up to `block` rows; `needed`: by the longest request.
pub fn room(args: &Args, pair: &Pair, block: usize, needed: usize) -> Result<Room> {
    Room::of(pair, args.batch, block, args.ctx, needed)
}

/// The pair, loaded where `--device` says.
pub fn load(args: &Args, pair: &Pair, room: Room) -> Result<Box<dyn Backend>> {
    let choice = match (args.device, args.cpu_only()) {
        (Choice::Auto, Some(flag)) => {
            if !args.quiet {
                note(&format!("device: cpu: {flag} runs there only"));
            }
            Choice::Cpu
        }
        (choice, _) => choice,
    };
    let Some(place) = Place::of_pair(choice, args.gpu.unwrap_or(0), pair, room, args.quiet)? else {
        return cpu(args, pair, room);
    };
    place.has_memory(pair, room, args.quiet)?;
    let (bar, mut progress) = terminal::weights(args.quiet);
    let backend = OnDevice::load(place.name, place.device, pair, room, &mut progress);
    bar.finish_and_clear();
    Ok(Box::new(backend?))
}

/// Its caches grow with the requests, so that only `--ctx` limits them.
fn cpu(args: &Args, pair: &Pair, room: Room) -> Result<Box<dyn Backend>> {
    let costs = pair.drafter.as_ref().filter(|_| args.adaptive).map(|drafter| {
        let (target, drafter) = (&pair.target.config, &drafter.config);
        Costs::modelled(&CORES, target, drafter, 0, drafter.block)
    });
    let cpu = Cpu::load(pair, room.sequences, args.context(pair)?)?;
    Ok(Box::new(cpu.adaptive(costs)))
}
