//! What a run reports about itself: acceptance length, histogram, rates, and the record of a request in JSON.

use crate::engine::request::Outcome;
use crate::spec::config::{ExactDrafts, SpecConfig};
use crate::spec::draft_length::DraftLengthPolicy;
use serde::{Deserialize, Serialize};

/// Acceptance length: mean tokens per round, bonus token included, without the token of the prefill. The last
/// round counts whole even if a stop or the budget cut it (docs/dflash.md 5.3). `None` without rounds.
pub fn tau(accepted: &[usize]) -> Option<f64> {
    match accepted.len() {
        0 => None,
        rounds => Some(accepted.iter().sum::<usize>() as f64 / rounds as f64),
    }
}

/// A histogram of rounds by the tokens they produced: one bar per count `1..=block`, the tallest eight
/// eighths high.
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

/// Times of the parts of a run, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Seconds {
    /// Opening and loading the models.
    pub load: f64,
    /// From the start of the request to its first token.
    pub prefill: f64,
    /// From the first token to the last.
    pub decode: f64,
}

/// The result of one request, as one line of JSON. The schema only ever grows.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// Number of tokens of the prompt.
    pub prompt_tokens: usize,
    /// Token ids of the answer, a stop id included.
    pub tokens: Vec<u32>,
    /// Text of the answer, without special tokens and stop strings.
    pub text: String,
    /// "stop", "length", "context" or "interrupted"
    pub finish_reason: &'static str,
    /// Target passes after the prefill.
    pub rounds: usize,
    /// Tokens per round, bonus token included; the last round is not cut by a stop or the budget.
    pub accepted: Vec<usize>,
    /// Drafts that each round verified; all nodes of a tree.
    pub drafted: Vec<usize>,
    /// Acceptance length ([`tau`]).
    pub tau: Option<f64>,
    /// The request's seed.
    pub seed: u64,
    /// Index of the prompt in the run, from 0; seed and stream together key the noise.
    pub stream: u32,
    /// Name of the device.
    pub device: &'static str,
    /// Folder of the target.
    pub target: String,
    /// Folder of the drafter; null in autoregressive decoding.
    pub draft: Option<String>,
    /// How drafts were made and verified.
    #[serde(flatten)]
    pub drafts: SpecRecord,
    /// How long loading, the prompt and decoding took.
    pub seconds: Seconds,
}

/// How drafts were made and verified, for records. All fields are null in autoregressive decoding.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SpecRecord {
    /// Name of the verification method.
    pub verify: Option<String>,
    /// Maximum rows of a round's tree, the anchor included; null for chains.
    pub tree: Option<usize>,
    /// Whether rounds had a draft length of their own.
    pub adaptive: Option<bool>,
    /// Adaptive rounds verified the drafts accepted with at least this probability; null where the cost model
    /// chose.
    pub threshold: Option<f64>,
    /// Whether drafts were sampled with the noise of the target's tokens.
    pub coupled: Option<bool>,
    /// Temperature that drafts were sampled at; null if they were the drafter's best tokens.
    pub draft_temperature: Option<f64>,
}

impl SpecRecord {
    /// The record of requests with this configuration.
    pub fn new(spec: &SpecConfig) -> SpecRecord {
        let length = spec.draft_length();
        // Through text, since an f32 such as 0.3 is another number in 64 bits.
        let typed = |temperature: f32| temperature.to_string().parse().ok();
        SpecRecord {
            verify: Some(spec.method().name().into()),
            tree: spec.tree_rows(),
            adaptive: Some(length != DraftLengthPolicy::Full),
            threshold: match length {
                DraftLengthPolicy::Threshold(p) => Some(p),
                _ => None,
            },
            coupled: Some(matches!(spec, SpecConfig::Exact { drafts: ExactDrafts::CoupledChain(_), .. })),
            draft_temperature: spec.draft_sampling().and_then(|sampling| typed(sampling.temperature)),
        }
    }
}

/// Tokens per second over prefill and decode together, the time that a reader waits; 0 if no time passed.
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
