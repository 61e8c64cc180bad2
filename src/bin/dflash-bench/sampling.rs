//! How long something takes on a GPU, and what it does on the emulator, where times say nothing.

use crate::machine::Instruments;
use dflash::Result;
use dflash::device::{Counts, Device};

/// What running something took.
#[derive(Debug, Clone, PartialEq)]
pub enum Cost {
    /// On a GPU.
    Times(Times),
    /// On the emulator: once.
    Counts(Counts),
}

/// Milliseconds by the device's own clock.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Times {
    pub samples: Vec<f64>,
    /// How many of them each round took.
    pub rounds: Vec<usize>,
    /// The rounds in which the card held its clocks back; None: no instruments.
    pub throttled: Option<Vec<usize>>,
}

/// What `run` takes: on a GPU `rounds` rounds of `samples` samples, after as many that do not count; on the emulator what
/// one run does. `prepare` comes before every run and is no part of it; `run` must only enqueue.
pub fn cost(
    device: &dyn Device,
    instruments: &Instruments,
    rounds: usize,
    samples: usize,
    prepare: &mut dyn FnMut() -> Result<()>,
    run: &mut dyn FnMut() -> Result<()>,
) -> Result<Cost> {
    if let Some(before) = device.tally() {
        prepare()?;
        let prepared = device.tally().unwrap_or(before);
        run()?;
        let after = device.tally().unwrap_or(prepared);
        return Ok(Cost::Counts(after - prepared));
    }
    let mut times = Times::default();
    for round in 0..=rounds {
        let mut taken = Vec::with_capacity(samples);
        let mut throttled = None;
        for sample in 1..=samples {
            prepare()?;
            let from = device.record()?;
            run()?;
            let to = device.record()?;
            // While it works: a card that waits is not held back.
            if sample == samples {
                throttled = instruments.is_throttled();
            }
            taken.push(f64::from(device.elapsed(&from, &to)?));
        }
        // The first round warms caches and clocks.
        let Some(round) = round.checked_sub(1) else { continue };
        times.samples.extend(&taken);
        times.rounds.push(taken.len());
        match (throttled, &mut times.throttled) {
            (Some(true), Some(list)) => list.push(round),
            (Some(throttled), none) => *none = Some(if throttled { vec![round] } else { vec![] }),
            (None, _) => (),
        }
    }
    Ok(Cost::Times(times))
}
