//! Samples of one measured thing, in rounds.

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
