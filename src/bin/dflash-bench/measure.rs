//! Measures device work: milliseconds on a GPU, counters on the software GPU, which has no times.

use crate::machine::Instruments;
use dflash::Result;
use dflash::cli::interrupt::is_interrupted;
use dflash::gpu::device::{Counts, Device};
use dflash::perf::statistics::quantile;

/// Milliseconds, by the clock of a device or of the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Times {
    pub samples: Vec<f64>,
    /// Samples in each round.
    pub rounds: Vec<usize>,
    /// The rounds in which the card was throttled. None: unknown, there are no instruments.
    pub throttled: Option<Vec<usize>>,
}

impl Times {
    /// Ends round number `round`, from 0: its samples are the last `samples`.
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

/// The cost of some device work.
#[derive(Debug, Clone, PartialEq)]
pub enum Cost {
    /// On a GPU.
    Times(Times),
    /// On the software GPU, of one run.
    Counts(Counts),
}

/// Measures `run`. On a GPU: `rounds` rounds of `samples` samples, after one round that does not count. On
/// the software GPU: the counters of one run. `prepare` precedes every run and is not measured. `run` must only
/// enqueue. None: interrupted before the end of a round.
///
/// # Errors
/// Those of `prepare`, `run` and the device.
pub fn cost(
    device: &dyn Device,
    instruments: &Instruments,
    rounds: usize,
    samples: usize,
    prepare: &mut dyn FnMut() -> Result<()>,
    run: &mut dyn FnMut() -> Result<()>,
) -> Result<Option<Cost>> {
    if let Some(before) = device.counters() {
        prepare()?;
        let prepared = device.counters().unwrap_or(before);
        run()?;
        let after = device.counters().unwrap_or(prepared);
        return Ok(Some(Cost::Counts(after - prepared)));
    }
    let times = times_in_turn(device, instruments, rounds, samples, prepare, 1, &mut |_| run())?;
    Ok(times.into_iter().next().filter(|times| !times.rounds.is_empty()).map(Cost::Times))
}

/// Measures `count` runs on a GPU in turn, so that clocks and other processes affect all of them alike.
/// `run(i)` enqueues run number `i`. Otherwise as [`cost`]; interrupted, all have the rounds until then.
///
/// # Errors
/// As [`cost`].
pub fn times_in_turn(
    device: &dyn Device,
    instruments: &Instruments,
    rounds: usize,
    samples: usize,
    prepare: &mut dyn FnMut() -> Result<()>,
    count: usize,
    run: &mut dyn FnMut(usize) -> Result<()>,
) -> Result<Vec<Times>> {
    let mut all = vec![Times::default(); count];
    for round in (0..=rounds).take_while(|_| !is_interrupted()) {
        // The first round warms caches and clocks.
        let counted = round.checked_sub(1);
        let mut throttled = None;
        for sample in 1..=samples {
            for (i, times) in all.iter_mut().enumerate() {
                prepare()?;
                let from = device.record()?;
                run(i)?;
                let to = device.record()?;
                // Read while the card works: an idle card is not throttled.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_kept_apart_and_throttled_ones_named() {
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
