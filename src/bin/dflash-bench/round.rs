//! `round`: an AR step and a DFlash round of a pair with random weights, and the parts of the round. The
//! weights are loaded once for all batches and contexts.

mod cpu;
mod device;
mod point;

use crate::args::{self, Numbers};
use crate::machine::{Instruments, Settled, settle};
use crate::model;
use crate::record::{Machine, Model, Record, Row};
use dflash::checkpoint::pair::Pair;
use dflash::cli::device::{Choice, DeviceHandle};
use dflash::cli::{interrupt, terminal};
use dflash::cpu::ops;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::kernels::attention::MAX_SLOTS;
use dflash::gpu::memory::{MemoryPlan, size};
use dflash::perf::roofline::Card;
use dflash::spec::sampling::SamplingParams;
use dflash::{Error, Result};
use point::Point;

/// Rounds of the engine's loop before the measured ones, and the measured ones, in each round of samples.
const LEAD: usize = 3;
const LOOP: usize = 10;
/// The maximum number of rounds of a sequence before it restarts: the engine runs up to two ahead of its
/// results.
const MOST_ROUNDS: usize = LEAD + LOOP + 3;

/// The defaults of `--samples` on a GPU and on the CPU.
const SAMPLES: [usize; 2] = [20, 5];

/// A title and the record.
///
/// # Errors [`Error::Usage`] for wrong flags, [`Error::Memory`] where the pair does not fit; otherwise those
/// of the device.
pub fn run(flags: &args::Round) -> Result<(String, Record)> {
    let (temperature, seed) = (flags.temperature, 1);
    let sampling = SamplingParams { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed, stream: 0 };
    sampling.check()?;
    // Opening a device takes time: wrong flags are reported first.
    let Settled { device, software: counting, no_gpu } = settle(flags.device, flags.gpu)?;
    let usual = if device == Choice::Cuda && !counting { "qwen3-8b" } else { "demo" };
    let pair = model::pair(flags.model.as_deref().unwrap_or(usual), flags.draft.clone(), &flags.drafter)?;
    let block = block(flags, &pair)?;
    check(flags, &pair, block, device != Choice::Cpu)?;
    let acceptance = acceptance(flags, block, counting)?;
    if let Some(reason) = no_gpu {
        terminal::note(&format!("device: cpu: {}", reason.to_string().trim_start_matches("device cuda: ")));
    }
    let grid = Grid { flags, pair: &pair, block, sampling, acceptance };
    let (rows, machine, on) = match device {
        Choice::Cpu => {
            let (rows, machine) = ops::on_threads(flags.threads, || (grid.on_cpu(), Machine::cpu()));
            (rows?, machine, "the CPU".into())
        }
        _ => grid.on_device(&DeviceHandle::for_kernels(device, flags.gpu.unwrap_or(0))?)?,
    };

    let what = if counting { "counters, not times" } else { "measured" };
    let title = format!(
        "{}, random weights, on {on}: {what}; synthetic acceptance is assumed, not measured",
        model::title(&pair)
    );
    let mut record = Record::new("round", machine, Model::of(&pair));
    record.settings = model::drafter_settings(&flags.drafter);
    record.settings.insert("temperature".into(), flags.temperature.into());
    record.incomplete = interrupt::is_interrupted();
    record.rows = rows;
    Ok((title, record))
}

/// All batches and contexts of a run.
struct Grid<'a> {
    flags: &'a args::Round,
    pair: &'a Pair,
    /// Rows of a block; 1 without a drafter.
    block: usize,
    sampling: SamplingParams,
    /// Synthetic acceptance lengths.
    acceptance: Vec<f64>,
}

impl Grid<'_> {
    fn largest(&self) -> BatchConfig {
        let largest = |list: &[usize]| list.iter().copied().max().unwrap_or(0);
        let positions = largest(&self.flags.context.0) + spare(self.block);
        BatchConfig::new(largest(&self.flags.batch.0), self.block, positions)
    }

    /// Runs `measure` at every point of the grid.
    fn each(&self, card: Option<Card>, mut measure: impl FnMut(&Point) -> Result<()>) -> Result<()> {
        let bar = terminal::progress("{pos} of {len} measured: {msg}", false);
        bar.set_length((self.flags.context.0.len() * self.flags.batch.0.len()) as u64);
        interrupt::catch()?;
        for &context in &self.flags.context.0 {
            for &batch in self.flags.batch.0.iter().take_while(|_| !interrupt::is_interrupted()) {
                bar.set_message(format!("now context {context}, batch {batch}"));
                let (pair, block, acceptance) = (self.pair, self.block, self.acceptance.as_slice());
                let sampling = self.sampling.clone();
                measure(&Point { pair, card, context, batch, block, sampling, acceptance })?;
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// The rows, the machine and its name.
    fn on_device(&self, handle: &DeviceHandle) -> Result<(Vec<Row>, Machine, String)> {
        let device = &*handle.device;
        let counting = device.properties().software;
        fits(self.pair, handle, self.largest())?;
        let instruments = Instruments::open(handle);
        let models = device::load(self.pair, device, self.largest().positions)?;
        let card = Card::of_driver(&device.properties().name).filter(|_| !counting);
        let (rounds, samples) = (self.flags.rounds, self.flags.samples.unwrap_or(SAMPLES[0]));
        let effort = device::Effort { instruments: &instruments, rounds, samples };
        let mut rows = vec![];
        self.each(card, |point| {
            let run = device::Run { point, device, models: &models };
            match counting {
                true => run.count(&mut rows)?,
                false => run.measure(&effort, &mut rows)?,
            }
            self.flags.profile.map_or(Ok(()), |rounds| run.profile(rounds))
        })?;
        let mut machine = instruments.machine(handle);
        machine.gigabytes_per_s = card.map(|card| card.bandwidth);
        machine.tflops = card.map(|card| card.tflops);
        Ok((rows, machine, device.properties().name.clone()))
    }

    fn on_cpu(&self) -> Result<Vec<Row>> {
        let models = cpu::load(self.pair, &self.largest())?;
        let samples = self.flags.samples.unwrap_or(SAMPLES[1]);
        let mut rows = vec![];
        self.each(None, |point| models.measure(point, self.flags.rounds, samples, &mut rows))?;
        Ok(rows)
    }
}

/// Positions beyond the context that rounds need.
fn spare(block: usize) -> usize {
    (MOST_ROUNDS + 1) * block
}

fn block(flags: &args::Round, pair: &Pair) -> Result<usize> {
    let Some(drafter) = pair.drafter() else {
        let given = flags.block.is_some() || flags.acceptance.is_some() || flags.curve.is_some();
        return match given {
            true => Err(Error::Usage("--block, --acceptance and --curve need a drafter: --draft DIR".into())),
            false => Ok(1),
        };
    };
    let trained = drafter.config.block;
    match flags.block {
        Some(n) if !(2..=trained).contains(&n) => {
            let name = drafter.folder.described();
            Err(Error::Usage(format!("--block is {n}, expected 2 to {trained}, the block length of {name}")))
        }
        block => Ok(block.unwrap_or(trained)),
    }
}

/// `kernels`: a device with a limit of its own runs the rounds.
fn check(flags: &args::Round, pair: &Pair, block: usize, kernels: bool) -> Result<()> {
    if flags.profile.is_some() && !kernels {
        return Err(Error::Usage("--profile needs --device cuda, which launches kernels".into()));
    }
    let target = pair.target.config.stack.max_positions.min(MAX_SLOTS);
    let positions = pair.drafter().map_or(target, |d| target.min(d.config.stack.max_positions));
    let taken = spare(block);
    let Some(largest) = positions.checked_sub(taken) else {
        return Err(Error::Unsupported(format!(
            "the models have {positions} positions, but rounds in blocks of {block} need {taken}"
        )));
    };
    for (flag, list, range, why) in [
        ("batch", &flags.batch.0, 1..=1024, String::new()),
        (
            "context",
            &flags.context.0,
            0..=largest,
            format!(": {positions} positions less {taken} for rounds"),
        ),
    ] {
        if let Some(found) = list.iter().find(|n| !range.contains(n)) {
            let (low, high) = range.into_inner();
            return Err(Error::Usage(format!("--{flag} has {found}, expected {low} to {high}{why}")));
        }
        distinct(flag, list)?;
    }
    match flags.batch.0.len() * flags.context.0.len() {
        points @ 2.. if flags.profile.is_some() => Err(Error::Usage(format!(
            "--profile needs one batch and one context, found {points} combinations"
        ))),
        _ => Ok(()),
    }
}

/// Refuses a number that occurs twice: rows of a record are distinct.
fn distinct<T: PartialEq + std::fmt::Display>(flag: &str, list: &[T]) -> Result<()> {
    let found = list.iter().enumerate().find(|(i, n)| list[..*i].contains(n));
    found.map_or(Ok(()), |(_, n)| Err(Error::Usage(format!("--{flag} has {n} twice, expected it once"))))
}

/// The synthetic acceptance lengths, each from 1 to the block's length.
fn acceptance(flags: &args::Round, block: usize, counting: bool) -> Result<Vec<f64>> {
    if let Some(Numbers(curve)) = &flags.curve {
        if let Some(found) = curve.iter().find(|p| !(0.0..=1.0).contains(*p)) {
            return Err(Error::Usage(format!("--curve has {found}, expected probabilities, 0 to 1")));
        }
        let (found, drafts) = (curve.len(), block - 1);
        if found > drafts {
            return Err(Error::Usage(format!(
                "--curve has {found} probabilities, expected at most {drafts}, the drafts of a block of {block}"
            )));
        }
        return Ok(vec![tokens(curve)]);
    }
    let Some(Numbers(list)) = &flags.acceptance else {
        let usual = [2.0, 4.0, 6.0, 8.0].into_iter().filter(|length| !counting && *length <= block as f64);
        return Ok(usual.collect());
    };
    if let Some(found) = list.iter().find(|n| !(1.0..=block as f64).contains(*n)) {
        return Err(Error::Usage(format!(
            "--acceptance has {found}, expected 1 to {block}, the tokens of a round"
        )));
    }
    distinct("acceptance", list)?;
    Ok(list.clone())
}

/// Tokens of a round whose drafts are accepted with these probabilities, each given that those before it are.
fn tokens(curve: &[f64]) -> f64 {
    let mut all_accepted = 1.0;
    1.0 + curve
        .iter()
        .map(|p| {
            all_accepted *= p;
            all_accepted
        })
        .sum::<f64>()
}

/// Checks that the largest point of the grid fits the device, before anything is loaded.
fn fits(pair: &Pair, handle: &DeviceHandle, config: BatchConfig) -> Result<()> {
    let needed = MemoryPlan::new(pair, config)?.needed(handle.overhead);
    let free = usize::try_from(handle.device.memory()?.0).unwrap_or(usize::MAX);
    if needed <= free {
        return Ok(());
    }
    let largest = MemoryPlan::largest_context(pair, config, free, handle.overhead)?;
    let advice = match largest.checked_sub(spare(config.block)) {
        Some(largest) => format!("the largest --context that fits is {largest}"),
        None => "no --context fits".into(),
    };
    Err(Error::Memory(format!(
        "not enough memory on the device for {config}: {} are needed, {} are free; {advice}",
        size(needed),
        size(free)
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_curve_of_probabilities_is_an_acceptance_length() {
        assert_eq!(tokens(&[]), 1.0);
        assert_eq!(tokens(&[0.5]), 1.5);
        // 1 + 0.5 + 0.5 x 0.5 + 0.5 x 0.5 x 0
        assert_eq!(tokens(&[0.5, 0.5, 0.0, 1.0]), 1.75);
        assert_eq!(tokens(&[1.0; 15]), 16.0);
    }
}
