//! How long something takes on a GPU, and what it does on the emulator, where times say nothing.

use crate::machine::Instruments;
use dflash::Result;
use dflash::gpu::device::{Counts, Device};
use dflash::perf::statistics::quantile;

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
    let times = together(device, instruments, rounds, samples, prepare, 1, &mut |_| run())?;
    Ok(Cost::Times(times.into_iter().next().unwrap_or_default()))
}

/// What `count` runs take on a GPU, of which `run` enqueues the one with that number: `rounds` rounds of `samples` samples
/// of each in turn, so that all of them meet the same clocks and neighbours; after one round that does not count. Else as
/// [`cost`].
pub fn together(
    device: &dyn Device,
    instruments: &Instruments,
    rounds: usize,
    samples: usize,
    prepare: &mut dyn FnMut() -> Result<()>,
    count: usize,
    run: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Times>> {
    let mut all = vec![Times::default(); count];
    for round in 0..=rounds {
        // The first round warms caches and clocks.
        let counted = round.checked_sub(1);
        let mut throttled = None;
        for sample in 1..=samples {
            for (i, times) in all.iter_mut().enumerate() {
                prepare()?;
                let from = device.record()?;
                run(i)?;
                let to = device.record()?;
                // While it works: a card that waits is not held back.
                if (sample, i + 1) == (samples, count) {
                    throttled = instruments.is_throttled();
                }
                let taken = device.elapsed(&from, &to)?;
                if counted.is_some() {
                    times.samples.push(f64::from(taken));
                }
            }
        }
        let Some(round) = counted else { continue };
        all.iter_mut().for_each(|times| times.end_round(round, samples, throttled));
    }
    Ok(all)
}

impl Times {
    /// Round number `round`, from 0, took the last `samples` samples.
    pub fn end_round(&mut self, round: usize, samples: usize, throttled: Option<bool>) {
        self.rounds.push(samples);
        if let Some(throttled) = throttled {
            self.throttled.get_or_insert_default().extend(throttled.then_some(round));
        }
    }

    /// The median of each round.
    pub fn medians(&self) -> Vec<f64> {
        let mut rest = self.samples.as_slice();
        let median = |count: &usize| {
            let (round, after) = rest.split_at(*count);
            rest = after;
            quantile(round, 0.5).unwrap_or(f64::NAN)
        };
        self.rounds.iter().map(median).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_kept_apart_and_throttled_ones_told() {
        let mut times = Times { samples: vec![1.0, 9.0, 2.0], ..Times::default() };
        times.end_round(0, 3, None);
        assert_eq!(times.throttled, None);
        times.samples.extend([4.0, 6.0]);
        times.end_round(1, 2, Some(true));
        times.samples.push(7.0);
        times.end_round(2, 1, Some(false));
        assert_eq!((times.medians(), times.throttled), (vec![2.0, 5.0, 7.0], Some(vec![1])));
    }
}
