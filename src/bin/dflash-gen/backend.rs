//! `--device`: where to run, and what is to be known before anything is loaded there.

use crate::args::Args;
use crate::note;
use dflash::Result;
use dflash::control::Costs;
use dflash::engine::Backend;
use dflash::floor::Card;
use dflash::memory::{MemoryPlan, Room};
use dflash::pair::Pair;
use dflash::place::{Choice, Place};
use dflash::reference::Cpu;
use dflash::rounds::OnDevice;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;

/// What --adaptive takes a CPU for, whichever it is, so that a run's rounds can be had again: some cores of a server.
const CORES: Card = Card { name: "cpu", bandwidth: 20.0, tflops: 0.1, memory: f64::INFINITY };

/// Positions per sequence where neither `--ctx` nor a prompt asks for others.
const CONTEXT: usize = 8192;

/// Room for `--batch` sequences of `--ctx` positions, in blocks of up to `block` rows; `needed`: by the longest request.
pub fn room(args: &Args, pair: &Pair, block: usize, needed: usize) -> Result<Room> {
    let most = args.context(pair)?;
    let positions = if args.ctx.is_some() { most } else { most.min(needed.max(CONTEXT)) };
    Ok(Room::new(args.batch, block, positions))
}

/// The pair, loaded where `--device` says.
pub fn load(args: &Args, pair: &Pair, room: Room) -> Result<Box<dyn Backend>> {
    match args.device {
        Choice::Cpu => cpu(pair, args, room),
        Choice::Cuda => on(Place::gpu(args.gpu.unwrap_or(0))?, args, pair, room),
        Choice::Emulator => on(Place::emulator()?, args, pair, room),
        Choice::Auto if args.tree.is_some() || args.adaptive => {
            let flag = if args.tree.is_some() { "--tree" } else { "--adaptive" };
            say(args, &format!("device: cpu: {flag} runs there only"));
            cpu(pair, args, room)
        }
        Choice::Auto => {
            let gpu =
                Place::gpu(args.gpu.unwrap_or(0)).and_then(|gpu| MemoryPlan::new(pair, room).map(|_| gpu));
            match gpu {
                Ok(gpu) => {
                    say(args, &format!("device: cuda, {}", gpu.device.properties().name));
                    on(gpu, args, pair, room)
                }
                Err(reason) => {
                    let reason = reason.to_string();
                    say(args, &format!("device: cpu: {}", reason.trim_start_matches("device cuda: ")));
                    cpu(pair, args, room)
                }
            }
        }
    }
}

fn say(args: &Args, line: &str) {
    if !args.quiet {
        note(line);
    }
}

/// Its caches grow with the requests, so that only `--ctx` limits them.
fn cpu(pair: &Pair, args: &Args, room: Room) -> Result<Box<dyn Backend>> {
    let costs = pair.drafter.as_ref().filter(|_| args.adaptive).map(|drafter| {
        let (target, drafter) = (&pair.target.config, &drafter.config);
        Costs::modelled(&CORES, target, drafter, 0, drafter.block)
    });
    let cpu = Cpu::load(pair, room.sequences, args.context(pair)?)?;
    Ok(Box::new(cpu.with_trees(args.tree).adaptive(costs)))
}

fn on(place: Place, args: &Args, pair: &Pair, room: Room) -> Result<Box<dyn Backend>> {
    let Place { name, device, overhead } = place;
    let plan = MemoryPlan::new(pair, room)?;
    let (free, _) = device.memory()?;
    let fits = plan.check(pair, usize::try_from(free).unwrap_or(usize::MAX), overhead);
    if !args.quiet || fits.is_err() {
        note(&plan.to_string());
    }
    fits?;
    let shown = !args.quiet && std::io::stderr().is_terminal();
    let bar = if shown { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template("weights {bar:40} {bytes} of {total_bytes}, {bytes_per_sec}");
    let bar = style.map(|style| bar.clone().with_style(style)).unwrap_or(bar);
    let mut progress = |done: usize, total: usize| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    };
    let backend = OnDevice::load(name, device, pair, room, &mut progress);
    bar.finish_and_clear();
    Ok(Box::new(backend?))
}
