//! Statistics of a request: acceptance length, histogram, tokens per second, and its record in JSON.

use crate::engine::request::Outcome;
use crate::spec::config::{ExactDrafts, SpecConfig};
use crate::spec::draft_length::DraftLengthPolicy;
use serde::{Deserialize, Serialize};

/// Acceptance length: mean tokens per round, bonus token included, without the token of the prefill. The last
/// round counts in full, even if a stop or the budget cuts it (docs/dflash.md 5.1, 5.3). `None` without
/// rounds.
pub fn tau(accepted: &[usize]) -> Option<f64> {
    match accepted.len() {
        0 => None,
        rounds => Some(accepted.iter().sum::<usize>() as f64 / rounds as f64),
    }
}

/// A histogram of rounds by the number of tokens they produced: one bar character per number `1..=block`,
/// from a space to a full block.
pub fn histogram(accepted: &[usize], block: usize) -> String {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let mut counts = vec![0; block.max(1)];
    for a in accepted {
        counts[(a - 1).min(block.max(1) - 1)] += 1;
    }
    let tallest = counts.iter().copied().max().unwrap_or(0).max(1);
    // Rounded up, so that a single round is still visible.
    counts.iter().map(|c| BARS[usize::div_ceil(c * 8, tallest)]).collect()
}

/// Notices, over all answers of a run, a drafter whose drafts are not accepted.
#[derive(Debug, Clone, Default)]
pub struct AcceptanceWatch {
    rounds: usize,
    tokens: usize,
    found: bool,
}

impl AcceptanceWatch {
    /// Rounds with drafts before anything is said.
    const ROUNDS: usize = 30;
    /// Acceptance lengths below this mean that drafts are not accepted.
    const TAU: f64 = 1.1;

    /// Adds the rounds of an answer: tokens and drafts of each. Returns a sentence for the user the first time
    /// that the acceptance length of all rounds with drafts is too small.
    pub fn add(&mut self, accepted: &[usize], drafted: &[usize]) -> Option<String> {
        let drafting = || accepted.iter().zip(drafted).filter(|(_, drafts)| **drafts > 0);
        self.add_rounds(drafting().count(), drafting().map(|(tokens, _)| tokens).sum())
    }

    /// As [`AcceptanceWatch::add`], for `rounds` rounds with drafts that gave `tokens` tokens.
    pub fn add_rounds(&mut self, rounds: usize, tokens: usize) -> Option<String> {
        self.rounds += rounds;
        self.tokens += tokens;
        let tau = self.tokens as f64 / self.rounds.max(1) as f64;
        if self.found || self.rounds < Self::ROUNDS || tau >= Self::TAU {
            return None;
        }
        self.found = true;
        Some(format!(
            "the drafter's drafts are not accepted (acceptance length {tau:.2} over {} rounds): it may belong to another \
             target, the prompts may ask for thinking that it was not trained with, or its taps (target_layer_ids) may be \
             wrong",
            self.rounds
        ))
    }
}

/// Times of the phases of a run, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Seconds {
    /// Opening and loading the models.
    pub load: f64,
    /// From the start of the request to its first token.
    pub prefill: f64,
    /// From the first token to the end.
    pub decode: f64,
}

/// The result of one request, as one line of JSON. Later versions may add fields, but keep these.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Record {
    /// Number of tokens of the prompt.
    pub prompt_tokens: usize,
    /// Token ids of the answer, including a stop id that ended it.
    pub tokens: Vec<u32>,
    /// Text of the answer, without special tokens and stop strings; null without a tokenizer.
    pub text: Option<String>,
    /// Why the answer ended: "stop", "length", "context" or "interrupted".
    pub finish_reason: &'static str,
    /// Number of target passes after the prefill.
    pub rounds: usize,
    /// Tokens per round, bonus token included. The last round counts in full, even if a stop or the budget
    /// cuts it.
    pub accepted: Vec<usize>,
    /// Number of drafts that each round verified, on all branches of a tree.
    pub drafted: Vec<usize>,
    /// Acceptance length ([`tau`]).
    pub tau: Option<f64>,
    /// The request's seed.
    pub seed: u64,
    /// Index of the prompt in the run, from 0. Seed and stream together select the random numbers.
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
    /// Times of loading, prefill and decoding.
    pub seconds: Seconds,
}

/// How drafts were made and verified, for records. All fields are null in autoregressive decoding.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct SpecRecord {
    /// Name of the verification method.
    pub verify: Option<String>,
    /// Maximum rows of a round's tree, the anchor included; null for chains.
    pub tree: Option<usize>,
    /// Whether the number of drafts was chosen per round.
    pub adaptive: Option<bool>,
    /// Least acceptance probability of the drafts that adaptive rounds verified; null if the cost model chose
    /// their number.
    pub threshold: Option<f64>,
    /// Least confidence of the drafts that were verified; null if all were.
    pub confidence: Option<f64>,
    /// Whether drafts were sampled with the noise that the target's tokens use.
    pub coupled: Option<bool>,
    /// Temperature that drafts were sampled at; null if they were the drafter's best tokens.
    pub draft_temperature: Option<f64>,
}

impl SpecRecord {
    /// The record of requests with this configuration.
    pub fn new(spec: &SpecConfig) -> SpecRecord {
        let length = spec.draft_length();
        // Converted as text, so that an f32 of 0.3 is written as 0.3 and not as 0.30000001192092896.
        let as_f64 = |number: f32| number.to_string().parse().ok();
        SpecRecord {
            verify: Some(spec.method().name().into()),
            tree: spec.tree_rows(),
            adaptive: Some(length.adapts()),
            threshold: match length {
                DraftLengthPolicy::Threshold(p) => Some(p),
                _ => None,
            },
            confidence: length.min_confidence().and_then(as_f64),
            coupled: Some(matches!(spec, SpecConfig::Exact { drafts: ExactDrafts::CoupledChain(_), .. })),
            draft_temperature: spec.draft_sampling().and_then(|sampling| as_f64(sampling.temperature)),
        }
    }
}

/// Tokens of the answer per second of prefill and decoding together; 0 if no time passed.
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
    fn drafts_that_are_not_accepted_are_noticed_once() {
        let mut watch = AcceptanceWatch::default();
        // Rounds without drafts do not count.
        assert_eq!(watch.add(&[1; 100], &[0; 100]), None);
        assert_eq!(watch.add(&[1; 29], &[7; 29]), None);
        let line = watch.add(&[3], &[7]).unwrap();
        assert!(line.contains("acceptance length 1.07 over 30 rounds"), "{line}");
        assert_eq!(watch.add(&[1; 50], &[7; 50]), None);
        let mut accepted = vec![1; 27];
        accepted.extend([2; 3]);
        assert_eq!(AcceptanceWatch::default().add(&accepted, &[7; 30]), None);
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
