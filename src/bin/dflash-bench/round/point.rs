//! One point of the grid, and the rows of its measurements.

use crate::format::{merged, whole_or_not};
use crate::measure::Times;
use crate::record::{Better, Kind, Row};
use dflash::checkpoint::pair::Pair;
use dflash::cli::terminal;
use dflash::perf::roofline::{Card, Pass, draft_pass, fc_bytes, target_pass};
use dflash::perf::statistics::quantile;
use dflash::spec::sampling::SamplingParams;
use serde_json::{Map, Value, json};

/// Names of rows that other modules look up.
pub const AR: &str = "autoregressive decoding";
pub const SYNTHETIC: &str = "DFlash, synthetic acceptance";

/// A context and a batch of a pair.
pub struct Point<'a> {
    pub pair: &'a Pair,
    /// None: its nominal figures are unknown.
    pub card: Option<Card>,
    pub context: usize,
    pub batch: usize,
    /// Rows of a block; 1 without a drafter.
    pub block: usize,
    pub sampling: SamplingParams,
    /// Synthetic acceptance lengths, tokens per round.
    pub acceptance: &'a [f64],
}

impl Point<'_> {
    /// The parameters of a row that has no block.
    pub fn parameters(&self, more: Value) -> Value {
        merged(json!({ "context": self.context, "batch": self.batch }), more)
    }

    /// The parameters of a round and its parts.
    pub fn of_rounds(&self) -> Value {
        self.parameters(json!({ "block": self.block }))
    }

    /// The parameters of a round with a synthetic acceptance length.
    pub fn with_acceptance(&self, length: f64) -> Value {
        self.parameters(json!({ "block": self.block, "acceptance": whole_or_not(length) }))
    }

    /// The least bytes and operations of a part of the round, or of the AR step. None: next to nothing.
    pub fn pass_of(&self, part: &str) -> Option<Pass> {
        let target = &self.pair.target.config;
        if part == "AR step" {
            return Some(target_pass(target, self.context, self.batch, 1));
        }
        let drafter = &self.pair.drafter()?.config;
        let fc = fc_bytes(drafter);
        // Two operations for each weight of two bytes and row.
        let inject = Pass { bytes: fc, flops: fc * (self.batch * self.block) as f64 };
        let drafting = draft_pass(target, drafter, self.context, self.batch, self.block);
        let verify = target_pass(target, self.context, self.batch, self.block);
        let sum = |a: Pass, b: Pass, sign: f64| Pass {
            bytes: a.bytes + sign * b.bytes,
            flops: a.flops + sign * b.flops,
        };
        match part {
            "inject" => Some(inject),
            "draft" => Some(sum(drafting, inject, -1.0)),
            "verify" => Some(verify),
            "round" => Some(sum(drafting, verify, 1.0)),
            _ => None,
        }
    }

    /// A row in milliseconds. `launches`: kernels of the part; 0 leaves the number out.
    pub fn timed(&self, name: &str, parameters: Value, times: &Times, launches: usize) -> Row {
        let mut numbers = Map::new();
        if launches > 0 {
            numbers.insert("launches".into(), json!(launches));
        }
        let pass = self.pass_of(name);
        if let Some(pass) = pass {
            numbers.insert("GB".into(), json!(pass.bytes / 1e9));
        }
        let median = quantile(&times.samples, 0.5).unwrap_or(0.0);
        if let (Some(pass), Some(card)) = (pass, &self.card) {
            let least = pass.ms(card);
            numbers.insert("floor ms".into(), json!(least));
            if median > 0.0 {
                numbers.insert("share of floor".into(), json!(least / median));
            }
        }
        let numbers = Value::Object(numbers);
        if times.samples.iter().all(|ms| *ms > 0.0) {
            return Row::times(name, parameters, times, ("ms", 1.0), numbers);
        }
        terminal::note(&format!(
            "{name} of {parameters} is within noise: {median:.6} ms, and not above 0 in every round"
        ));
        Row::value(name, parameters, Kind::Measured, median, "ms", Better::Lower, numbers)
    }

    /// A row of tokens per second, if each sequence gets `tokens` tokens in each of these times.
    fn rate(&self, name: &str, parameters: Value, tokens: f64, times: &Times, numbers: Value) -> Row {
        let samples = times.samples.iter().map(|ms| self.batch as f64 * tokens / ms * 1e3).collect();
        let rounds = Some(times.rounds.clone());
        let row = Row::samples(name, parameters, samples, rounds, "tok/s", Better::Higher, numbers);
        Row { throttled: times.throttled.clone(), ..row }
    }

    /// The row of AR decoding's tokens per second.
    pub fn ar_rate(&self, step: &Times) -> Row {
        self.rate(AR, self.parameters(json!({})), 1.0, step, json!({}))
    }

    /// Rows of tokens per second, one for each synthetic acceptance length.
    pub fn synthetic_rates<'a>(
        &'a self,
        step: &'a Times,
        round: &'a Times,
    ) -> impl Iterator<Item = Row> + 'a {
        let median = |times: &Times| quantile(&times.samples, 0.5).unwrap_or(f64::NAN);
        let ratio = median(step) / median(round);
        self.acceptance.iter().map(move |&length| {
            let numbers = json!({ "speed-up": length * ratio });
            self.rate(SYNTHETIC, self.with_acceptance(length), length, round, numbers)
        })
    }
}
