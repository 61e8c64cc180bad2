//! The kernels of the methods `rejection` and `block` for chains: distributions of rows, drafts sampled from
//! them, and verification.

use super::round::{LENGTH, Logits, NONE, Outcome, SEED, at_temperature, case, sequence};
use super::values::{BenchFixtures, ends, equal, words_of};
use super::{Case, Ready, blocks};
use dflash::checkpoint::pair::Pair;
use dflash::gpu::device::Buffer;
use dflash::gpu::kernels::RowStep;
use dflash::gpu::kernels::linear::Shape;
use dflash::gpu::kernels::rejection::{DISTRIBUTION_BYTES, RejectionSampler, Rows, VerifyInputs};
use dflash::gpu::kernels::round::{DraftShape, Sequence};
use dflash::gpu::kernels::sample;
use dflash::spec::config::VerifyMethod;
use dflash::spec::distribution::Distribution;
use dflash::spec::rng::{PhiloxStream, TABLES};
use dflash::spec::sampling::SamplingParams;
use dflash::spec::tree;
use dflash::spec::verify;
use dflash::{Error, Result};
use serde_json::{Value, json};

/// For each of `rows`, as blocks that have drafts: distributions of all rows, a draft from each, verification
/// by both methods.
pub fn cases(pair: &Pair, rows: &[usize]) -> Vec<Case> {
    let target = &pair.target.config;
    let (vocab, head_blocks) = (target.vocab, Shape { n: target.vocab, k: target.stack.hidden }.blocks());
    let mut all = vec![];
    for (sequences, block) in rows.iter().map(|rows| blocks(pair, *rows)).filter(|(_, block)| *block > 1) {
        let kernels = RejectionSampler { sequences, block, vocab, blocks: head_blocks, reduced: false };
        all.push(row_distribution(kernels));
        all.push(sample_drafts(kernels));
        all.push(verify_drafts("verify_drafts by rejection", kernels, VerifyMethod::Rejection));
        all.push(verify_drafts("verify_drafts by block", kernels, VerifyMethod::Block));
    }
    all
}

pub fn parameters(kernels: RejectionSampler) -> Value {
    json!({ "rows": kernels.sequences * kernels.block, "batch": kernels.sequences })
}

/// The states of `count` sequences with these sampling parameters, each with its own stream.
pub fn states(
    count: usize,
    block: usize,
    sampling: &SamplingParams,
    verify_method: VerifyMethod,
    (form, rows): (DraftShape, usize),
) -> Result<Vec<u8>> {
    let state = |own: usize| {
        let sampling = SamplingParams { stream: own as u32, ..sampling.clone() };
        Sequence { verify_method, form, rows: rows as u32, ..sequence(block, sampling) }.to_bytes()
    };
    Ok((0..count).map(state).collect::<Result<Vec<_>>>()?.concat())
}

fn chain_states(
    kernels: RejectionSampler,
    sampling: &SamplingParams,
    method: VerifyMethod,
) -> Result<Vec<u8>> {
    let RejectionSampler { sequences, block, .. } = kernels;
    states(sequences, block, sampling, method, (DraftShape::Chain, block))
}

/// The random draws of a sequence of [`states`].
pub fn random_stream(own: usize) -> PhiloxStream {
    PhiloxStream { seed: SEED, stream: own as u32, round: 1, anchor: LENGTH }
}

/// What all these kernels read: the row table, and the sampler's tables.
pub struct Common {
    row_table: Buffer,
    pub tables: Buffer,
}

impl Common {
    pub fn new(fixtures: &BenchFixtures, kernels: RejectionSampler) -> Result<Common> {
        let RejectionSampler { sequences, block, .. } = kernels;
        let row = |i: usize| [(i / block) as u32, LENGTH + (i % block) as u32, NONE, NONE];
        let tables = fixtures.bytes(&sample::tables())?;
        fixtures.device.seal(&tables);
        Ok(Common { row_table: fixtures.words((0..sequences * block).flat_map(row))?, tables })
    }

    /// The distributions of these logits, computed by the kernel.
    pub fn distributions(
        &self,
        fixtures: &BenchFixtures,
        kernels: RejectionSampler,
        logits: &Buffer,
        best: &[Vec<u8>],
        sampling: &SamplingParams,
    ) -> Result<Buffer> {
        let distributions = fixtures.output(kernels.sequences * kernels.block * DISTRIBUTION_BYTES)?;
        let best = fixtures.bytes(&best.concat())?;
        let states = fixtures.bytes(&chain_states(kernels, sampling, VerifyMethod::Match)?)?;
        let rows = Rows { logits, distributions: &distributions };
        kernels.distributions(
            fixtures.device,
            RowStep::ALL,
            rows,
            &best,
            &self.row_table,
            &states,
            &self.tables,
        )?;
        Ok(distributions)
    }
}

fn row_distribution(kernels: RejectionSampler) -> Case {
    case("row_distribution", parameters(kernels), kernels.distribution_bytes(), move |fixtures| {
        let (device, sampling) = (fixtures.device, at_temperature(1.0));
        let common = Common::new(fixtures, kernels)?;
        let rows = kernels.sequences * kernels.block;
        let logits = Logits::new(fixtures, rows, kernels.vocab)?;
        let best = fixtures.bytes(&logits.best(kernels.blocks).concat())?;
        let states = fixtures.bytes(&chain_states(kernels, &sampling, VerifyMethod::Match)?)?;
        let distributions = fixtures.output(rows * DISTRIBUTION_BYTES)?;
        let (from, to) = (logits.buffer(), distributions.clone());
        let launch = move |_| {
            let rows = Rows { logits: &from, distributions: &to };
            kernels.distributions(
                device,
                RowStep::ALL,
                rows,
                &best,
                &common.row_table,
                &states,
                &common.tables,
            )
        };
        let check = move || {
            let found = words_of(device, &distributions)?;
            for row in logits.checked_rows() {
                let words = &found[row * DISTRIBUTION_BYTES / 4..][..DISTRIBUTION_BYTES / 4];
                let logits = logits.row(row);
                let expected = distribution_of(&sampling, &logits)?;
                equal("probability", &probabilities(words, &logits), expected.tokens())?;
            }
            Ok(())
        };
        Ok(Ready::new(1, launch, check))
    })
}

pub fn distribution_of(sampling: &SamplingParams, logits: &[f32]) -> Result<Distribution> {
    sampling.probabilities(logits).ok_or_else(|| Error::Internal("logits without a distribution".into()))
}

/// The tokens of positive probability of a row, from the words of its distribution: as cuda/spec/rejection.cu
/// computes them. Empty if the words are not a distribution.
fn probabilities(distribution: &[u32], logits: &[f32]) -> Vec<(u32, u64)> {
    let long = |i: usize| u64::from(distribution[i + 1]) << 32 | u64::from(distribution[i]);
    let (max, c) = (f32::from_bits(distribution[0]), f32::from_bits(distribution[1]));
    let rounding_token = distribution[7];
    let probability = |(id, logit): (u32, &f32)| {
        let weight = TABLES.weight(max, *logit, c);
        let kept = weight >= u64::from(distribution[2]) && distribution[4..7] == [NONE; 3];
        let shifted = if kept { weight << (distribution[3] & 63) } else { 0 };
        let scaled = ((u128::from(shifted) * u128::from(long(8))) >> 64) as u64;
        let remainder = if id == rounding_token { long(10) } else { 0 };
        Some((id, scaled.wrapping_add(remainder))).filter(|(_, p)| *p > 0)
    };
    if rounding_token == NONE {
        return vec![];
    }
    (0..).zip(logits).filter_map(probability).collect()
}

fn sample_drafts(kernels: RejectionSampler) -> Case {
    let RejectionSampler { sequences, block, vocab, blocks, .. } = kernels;
    case("sample_drafts", parameters(kernels), kernels.sample_bytes(), move |fixtures| {
        let (device, sampling) = (fixtures.device, at_temperature(1.0));
        let common = Common::new(fixtures, kernels)?;
        let logits = Logits::new(fixtures, sequences * block, vocab)?;
        let best = logits.best(blocks);
        let distributions = common.distributions(fixtures, kernels, &logits.buffer(), &best, &sampling)?;
        let states = fixtures.bytes(&chain_states(kernels, &sampling, VerifyMethod::Block)?)?;
        let drafts = fixtures.output(sequences * block * 4)?;
        let (from, to) = (logits.buffer(), drafts.clone());
        let launch = move |_| {
            let rows = Rows { logits: &from, distributions: &distributions };
            kernels.sample(device, RowStep::ALL, &to, rows, &common.row_table, &states, &common.tables)
        };
        let check = move || {
            let found = words_of(device, &drafts)?;
            for own in ends(sequences) {
                let distribution = |row: usize| distribution_of(&sampling, &logits.row(own * block + row));
                let distributions = (1..block).map(distribution).collect::<Result<Vec<_>>>()?;
                let expected =
                    verify::sample_chain(&distributions, &mut random_stream(own)).unwrap_or_default();
                equal("draft", &found[own * block + 1..][..block - 1], &expected)?;
            }
            Ok(())
        };
        Ok(Ready::new(1, launch, check))
    })
}

/// The target's row j has the logits that draft j + 1 is sampled from, at another temperature.
fn verify_drafts(name: &str, kernels: RejectionSampler, method: VerifyMethod) -> Case {
    let RejectionSampler { sequences, block, vocab, blocks, .. } = kernels;
    let rows = sequences * block;
    // The bytes to read depend on the result, so it is fixed in advance. By `rejection` the target's top-k
    // removes the last draft, and all drafts before it are more probable to the target than to the drafter:
    // only the last is rejected. By `block` all drafts are more probable to the drafter.
    let (kept, temperature) = match method {
        VerifyMethod::Block => (0, 0.9),
        _ => ((vocab / 2).clamp(1, 20), 1.1),
    };
    let target = SamplingParams { top_k: kept, ..at_temperature(1.0) };
    let drafter = at_temperature(temperature);
    case(name, parameters(kernels), kernels.verify_bytes(method), move |fixtures| {
        let device = fixtures.device;
        let common = Common::new(fixtures, kernels)?;
        let logits = Logits::new(fixtures, rows, vocab)?;
        let (draft_logits, row) = (logits.buffer(), vocab * 4);
        let target_logits = fixtures.output(rows * row)?;
        let copy = |to: usize, from: usize, rows: usize| {
            device.copy(&target_logits.slice(to, rows * row)?, &draft_logits.slice(from, rows * row)?)
        };
        copy(0, row, rows - 1)?;
        copy((rows - 1) * row, 0, 1)?;
        let mut best = logits.best(blocks);
        let draft_rows = common.distributions(fixtures, kernels, &draft_logits, &best, &drafter)?;
        best.rotate_left(1);
        let target_rows = common.distributions(fixtures, kernels, &target_logits, &best, &target)?;
        let draft = |i: usize| {
            let choices = tree::choices(&logits.row(i), kept + 1).unwrap_or_default();
            let rejected = method == VerifyMethod::Rejection && i % block == block - 1;
            let choice = if rejected { choices.last() } else { choices.first() };
            choice.map_or(NONE, |choice| choice.token)
        };
        let tokens: Vec<u32> = (0..rows).map(draft).collect();
        let tokens_buffer = fixtures.words(tokens.iter().copied())?;
        let spans = fixtures.words([LENGTH, block as u32].repeat(sequences))?;
        let (partial, counters) = (fixtures.output(rows * 8)?, fixtures.zeros(sequences)?);
        let states = fixtures.bytes(&chain_states(kernels, &target, method)?)?;
        let outcome = Outcome::new(fixtures, sequences, block)?;
        let written = outcome.clone();
        let launch = move |_| {
            let target = Rows { logits: &target_logits, distributions: &target_rows };
            let drafter = Rows { logits: &draft_logits, distributions: &draft_rows };
            let inputs = VerifyInputs {
                max_verify_rows: block,
                tokens: &tokens_buffer,
                spans: &spans,
                partial: &partial,
                counters: &counters,
            };
            kernels.verify(device, outcome.buffers(), target, drafter, inputs, &states, &common.tables)
        };
        let (target, drafter) = (target.clone(), drafter.clone());
        let check = move || {
            let expected = |own: usize| {
                let at = own * block;
                let distribution = |row: usize| distribution_of(&drafter, &logits.row(at + row));
                let distributions = (1..block).map(distribution).collect::<Result<Vec<_>>>()?;
                let target_at = |row: usize| target.probabilities(&logits.row((at + row + 1) % rows));
                let (drafts, mut random) = (&tokens[at + 1..at + block], random_stream(own));
                let result = match method {
                    VerifyMethod::Block => {
                        verify::block_verify(drafts, &distributions, target_at, &mut random)
                    }
                    _ => verify::rejection(drafts, &distributions, target_at, &mut random),
                };
                Ok(result.map(|(accepted, next)| ((0..=accepted).collect(), next)))
            };
            written.check(device, ends(sequences), expected)
        };
        Ok(Ready::new(1, launch, check))
    })
}
