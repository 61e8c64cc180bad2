//! What a run reports about itself: acceptance length, histogram, rates, and the record that `--json` prints.

use crate::engine::generate::Outcome;
use serde::{Deserialize, Serialize};

/// Acceptance length: mean tokens per round, bonus included, the prefill's token not counted; the last round counts as
/// judged, even if a stop or the budget cut it (dflash.md 5.3). None without rounds.
pub fn tau(accepted: &[usize]) -> Option<f64> {
    match accepted.len() {
        0 => None,
        rounds => Some(accepted.iter().sum::<usize>() as f64 / rounds as f64),
    }
}

/// Rounds by tokens produced: one bar per count `1..=block`, the tallest eight eighths high.
pub fn histogram(accepted: &[usize], block: usize) -> String {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let mut counts = vec![0; block.max(1)];
    for a in accepted {
        counts[(a - 1).min(block.max(1) - 1)] += 1;
    }
    let tallest = counts.iter().copied().max().unwrap_or(0).max(1);
    // Rounded up, so that a single round still shows.
    counts.iter().map(|c| BARS[usize::div_ceil(c * 8, tallest)]).collect()
}

/// Seconds of each part of a run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Seconds {
    pub load: f64,
    pub prefill: f64,
    pub decode: f64,
}

/// One prompt's result, as `--json` prints it on one line. The schema only ever grows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// How many tokens the prompt has.
    pub prompt_tokens: usize,
    /// The answer's ids, a stop id included.
    pub tokens: Vec<u32>,
    /// The answer, special tokens and stop strings left out.
    pub text: String,
    /// "stop", "length", "context" or "interrupted"
    pub finish_reason: &'static str,
    /// Target passes after the prefill.
    pub rounds: usize,
    /// Tokens per round, bonus included, as judged: the last one is not cut by a stop or the budget.
    pub accepted: Vec<usize>,
    /// Drafts that each round ran; of a tree, all its nodes.
    pub drafted: Vec<usize>,
    pub tau: Option<f64>,
    pub seed: u64,
    /// The prompt's place in `--prompts`, from 0: with the seed it keys the noise.
    pub stream: u32,
    pub device: &'static str,
    pub target: String,
    pub draft: Option<String>,
    /// How its drafts were made and judged.
    #[serde(flatten)]
    pub drafts: SpecRecord,
    pub seconds: Seconds,
}

/// Tokens per second of prefill and decoding together, the time a reader waits; 0 where no time passed.
pub fn rate(outcome: &Outcome) -> f64 {
    let seconds = (outcome.prefill + outcome.decode).as_secs_f64();
    if seconds > 0.0 { outcome.tokens.len() as f64 / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tau_is_the_mean_of_tokens_per_round() {
        assert_eq!(tau(&[]), None);
        assert_eq!(tau(&[1, 4, 4]), Some(3.0));
    }

    #[test]
    fn histogram_has_a_bar_per_count_and_shows_every_round() {
        assert_eq!(histogram(&[1; 100], 4), "█   ");
        let mut rounds = vec![1; 100];
        rounds.push(4);
        assert_eq!(histogram(&rounds, 4), "█  ▁");
        assert_eq!(histogram(&[], 2), "  ");
    }
}

/// How drafts were made and judged, as records say it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SpecRecord {
    /// The acceptance rule; null in autoregressive decoding, as all of these.
    pub verify: Option<String>,
    /// Rows of a round's tree at most, the anchor counted; null: chains.
    pub tree: Option<usize>,
    /// Whether rounds drafted as much as paid, or what stood often enough.
    pub adaptive: Option<bool>,
    /// Adaptive rounds verified the drafts that stood with at least this probability; null: those that paid.
    pub threshold: Option<f64>,
    /// Whether drafts were drawn by the noise of the target's tokens.
    pub coupled: Option<bool>,
    /// What drafts were drawn at; null: they were the drafter's best tokens.
    pub draft_temperature: Option<f64>,
}
