//! Measures device work: milliseconds on a GPU, counters on the emulator, whose times say nothing about a
//! GPU.

use crate::machine::Instruments;
pub use crate::times::Times;
use dflash::Result;
use dflash::gpu::device::{Counts, Device};

/// The cost of some device work.
#[derive(Debug, Clone, PartialEq)]
pub enum Cost {
    /// On a GPU.
    Times(Times),
    /// On the emulator, of one run.
    Counts(Counts),
}

/// Measures `run`. On a GPU: `rounds` rounds of `samples` samples, after one round that does not count. On
/// the emulator: the counters of one run. `prepare` precedes every run and is not measured. `run` must only
/// enqueue.
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
) -> Result<Cost> {
    if let Some(before) = device.counters() {
        prepare()?;
        let prepared = device.counters().unwrap_or(before);
        run()?;
        let after = device.counters().unwrap_or(prepared);
        return Ok(Cost::Counts(after - prepared));
    }
    let times = together(device, instruments, rounds, samples, prepare, 1, &mut |_| run())?;
    Ok(Cost::Times(times.into_iter().next().unwrap_or_default()))
}

/// Measures `count` runs on a GPU in turn, so that clocks and other processes affect all of them alike.
/// `run(i)` enqueues run number `i`. Otherwise as [`cost`].
///
/// # Errors
/// As [`cost`].
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
