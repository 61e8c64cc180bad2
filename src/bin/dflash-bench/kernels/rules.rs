//! Drafts drawn at random and the verdicts on them: the kernels of the rules `rejection` and `block`.

use super::round::{LENGTH, Logits, NONE, case, sequence};
use super::values::{BenchFixtures, ends, equal, words_of};
use super::{Case, Ready, blocks};
use dflash::checkpoint::pair::Pair;
use dflash::gpu::device::Buffer;
use dflash::gpu::kernels::linear::Shape;
use dflash::gpu::kernels::round::Sequence;
use dflash::gpu::kernels::rules::{DISTRIBUTION_BYTES, Rows, Rules, VerifyInputs};
use dflash::gpu::kernels::sample;
use dflash::gpu::kernels::verify::Verdict;
use dflash::spec::config::VerifyMethod;
use dflash::spec::distribution::Distribution;
use dflash::spec::rng::{PhiloxStream, TABLES};
use dflash::spec::sampling::SamplingParams;
use dflash::spec::tree;
use dflash::spec::verify;
use dflash::{Error, Result};
use serde_json::{Value, json};

const SEED: u64 = 7;

/// For each of `rows`, where they are blocks that have drafts: the distributions of all rows, a draft from each, the verdicts.
pub fn cases(pair: &Pair, rows: &[usize]) -> Vec<Case> {
    let target = &pair.target.config;
    let (vocab, of_head) = (target.vocab, Shape { n: target.vocab, k: target.stack.hidden }.blocks());
    let mut all = vec![];
    for (sequences, block) in rows.iter().map(|rows| blocks(pair, *rows)).filter(|(_, block)| *block > 1) {
        let kernels = Rules { sequences, block, vocab, blocks: of_head };
        all.push(distribution(kernels));
        all.push(draw(kernels));
        all.push(judge("judge by rejection", kernels, VerifyMethod::Rejection));
        all.push(judge("judge by blocks", kernels, VerifyMethod::Block));
    }
    all
}

pub fn of(kernels: Rules) -> Value {
    json!({ "rows": kernels.sequences * kernels.block, "batch": kernels.sequences })
}

pub fn at_temperature(temperature: f32) -> SamplingParams {
    SamplingParams { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: SEED, stream: 0 }
}

/// Sequences that sample so, each with a stream of its own.
fn states(kernels: Rules, sampling: &SamplingParams, rule: VerifyMethod) -> Result<Vec<u8>> {
    let state = |own: usize| {
        let sampling = SamplingParams { stream: own as u32, ..sampling.clone() };
        Sequence { rule, ..sequence(kernels.block, sampling) }.to_bytes()
    };
    Ok((0..kernels.sequences).map(state).collect::<Result<Vec<_>>>()?.concat())
}

/// The chances of a sequence of [`states`].
pub fn dice(own: usize) -> PhiloxStream {
    PhiloxStream { seed: SEED, stream: own as u32, round: 1, anchor: LENGTH }
}

/// What all these kernels read.
pub struct Common {
    table: Buffer,
    pub tables: Buffer,
}

impl Common {
    pub fn new(desk: &BenchFixtures, kernels: Rules) -> Result<Common> {
        let Rules { sequences, block, .. } = kernels;
        let row = |i: usize| [(i / block) as u32, LENGTH + (i % block) as u32, NONE, NONE];
        let tables = desk.bytes(&sample::tables())?;
        desk.device.seal(&tables);
        Ok(Common { table: desk.words((0..sequences * block).flat_map(row))?, tables })
    }

    /// Distributions as the kernel makes them of those logits.
    pub fn distributions(
        &self,
        desk: &BenchFixtures,
        kernels: Rules,
        logits: &Buffer,
        best: &[Vec<u8>],
        sampling: &SamplingParams,
    ) -> Result<Buffer> {
        let distributions = desk.output(kernels.sequences * kernels.block * DISTRIBUTION_BYTES)?;
        let (best, states) =
            (desk.bytes(&best.concat())?, desk.bytes(&states(kernels, sampling, VerifyMethod::Match)?)?);
        let rows = Rows { logits, distributions: &distributions };
        kernels.distribution(desk.device, rows, &best, &self.table, &states, &self.tables)?;
        Ok(distributions)
    }
}

fn distribution(kernels: Rules) -> Case {
    case("distribution", of(kernels), kernels.distribution_bytes(), move |desk| {
        let (device, sampling) = (desk.device, at_temperature(1.0));
        let common = Common::new(desk, kernels)?;
        let rows = kernels.sequences * kernels.block;
        let logits = Logits::new(desk, rows, kernels.vocab)?;
        let best = desk.bytes(&logits.best(kernels.blocks).concat())?;
        let states = desk.bytes(&states(kernels, &sampling, VerifyMethod::Match)?)?;
        let distributions = desk.output(rows * DISTRIBUTION_BYTES)?;
        let (from, to) = (logits.buffer(), distributions.clone());
        let launch = move |_| {
            let rows = Rows { logits: &from, distributions: &to };
            kernels.distribution(device, rows, &best, &common.table, &states, &common.tables)
        };
        let check = move || {
            let found = words_of(device, &distributions)?;
            for row in logits.looked_at() {
                let (own, logits) =
                    (&found[row * DISTRIBUTION_BYTES / 4..][..DISTRIBUTION_BYTES / 4], logits.row(row));
                let expected = probabilities(&sampling, &logits)?;
                equal("probability", &told(own, &logits), expected.tokens())?;
            }
            Ok(())
        };
        Ok(Ready::new(1, launch, check))
    })
}

pub fn probabilities(sampling: &SamplingParams, logits: &[f32]) -> Result<Distribution> {
    sampling.probabilities(logits).ok_or_else(|| Error::Internal("logits without a distribution".into()))
}

/// The tokens and their probabilities that a distribution's words make of a row: `probability` of cuda/spec/rules.cu. None where they
/// are no distribution.
fn told(distribution: &[u32], logits: &[f32]) -> Vec<(u32, u64)> {
    let long = |i: usize| u64::from(distribution[i + 1]) << 32 | u64::from(distribution[i]);
    let (max, c, rounding_token) =
        (f32::from_bits(distribution[0]), f32::from_bits(distribution[1]), distribution[7]);
    let probability = |(id, logit): (u32, &f32)| {
        let weight = TABLES.weight(max, *logit, c);
        let kept = weight >= u64::from(distribution[2]) && distribution[4..7] == [NONE; 3];
        let shifted = if kept { weight << (distribution[3] & 63) } else { 0 };
        let share = ((u128::from(shifted) * u128::from(long(8))) >> 64) as u64;
        let left = if id == rounding_token { long(10) } else { 0 };
        Some((id, share.wrapping_add(left))).filter(|(_, p)| *p > 0)
    };
    if rounding_token == NONE {
        return vec![];
    }
    (0..).zip(logits).filter_map(probability).collect()
}

fn draw(kernels: Rules) -> Case {
    let Rules { sequences, block, vocab, blocks } = kernels;
    case("draw", of(kernels), kernels.draw_bytes(), move |desk| {
        let (device, sampling) = (desk.device, at_temperature(1.0));
        let common = Common::new(desk, kernels)?;
        let logits = Logits::new(desk, sequences * block, vocab)?;
        let distributions =
            common.distributions(desk, kernels, &logits.buffer(), &logits.best(blocks), &sampling)?;
        let states = desk.bytes(&states(kernels, &sampling, VerifyMethod::Block)?)?;
        let drafts = desk.output(sequences * block * 4)?;
        let (from, to) = (logits.buffer(), drafts.clone());
        let launch = move |_| {
            let rows = Rows { logits: &from, distributions: &distributions };
            kernels.draw(device, &to, rows, &common.table, &states, &common.tables)
        };
        let check = move || {
            let found = words_of(device, &drafts)?;
            for own in ends(sequences) {
                let distribution = |row: usize| probabilities(&sampling, &logits.row(own * block + row));
                let distributions = (1..block).map(distribution).collect::<Result<Vec<_>>>()?;
                let expected = verify::sample_chain(&distributions, &mut dice(own)).unwrap_or_default();
                equal("draft", &found[own * block + 1..][..block - 1], &expected)?;
            }
            Ok(())
        };
        Ok(Ready::new(1, launch, check))
    })
}

/// The target's row after some drafts has the logits that the next one was drawn from, at another temperature.
fn judge(name: &str, kernels: Rules, rule: VerifyMethod) -> Case {
    let Rules { sequences, block, vocab, blocks } = kernels;
    let rows = sequences * block;
    // So that it is known what has to be read: rejection meets a last draft that the target's filter takes, all before
    // it are likelier than they were when drawn; block meets none but drafts that were likelier then.
    let (kept, temperature) = match rule {
        VerifyMethod::Block => (0, 0.9),
        _ => ((vocab / 2).clamp(1, 20), 1.1),
    };
    let target = SamplingParams { top_k: kept, ..at_temperature(1.0) };
    let drafter = at_temperature(temperature);
    case(name, of(kernels), kernels.judge_bytes(rule), move |desk| {
        let device = desk.device;
        let common = Common::new(desk, kernels)?;
        let logits = Logits::new(desk, rows, vocab)?;
        let (draft_logits, row) = (logits.buffer(), vocab * 4);
        let target_logits = desk.output(rows * row)?;
        let put = |to: usize, from: usize, rows: usize| {
            device.copy(&target_logits.slice(to, rows * row)?, &draft_logits.slice(from, rows * row)?)
        };
        put(0, row, rows - 1)?;
        put((rows - 1) * row, 0, 1)?;
        let mut best = logits.best(blocks);
        let draft_laws = common.distributions(desk, kernels, &draft_logits, &best, &drafter)?;
        best.rotate_left(1);
        let target_laws = common.distributions(desk, kernels, &target_logits, &best, &target)?;
        let draft = |i: usize| {
            let choices = tree::choices(&logits.row(i), kept + 1).unwrap_or_default();
            let fallen = rule == VerifyMethod::Rejection && i % block == block - 1;
            let choice = if fallen { choices.last() } else { choices.first() };
            choice.map_or(NONE, |choice| choice.token)
        };
        let tokens: Vec<u32> = (0..rows).map(draft).collect();
        let (drafted, spans) =
            (desk.words(tokens.iter().copied())?, desk.words([LENGTH, block as u32].repeat(sequences))?);
        let (partial, counters) = (desk.output(rows * 8)?, desk.words((0..sequences).map(|_| 0))?);
        let states = desk.bytes(&states(kernels, &target, rule)?)?;
        let [accepted, next, path] = [sequences * 4, sequences * 4, rows * 4].map(|bytes| desk.output(bytes));
        let to = [accepted?, next?, path?];
        let written = to.clone();
        let launch = move |_| {
            let [accepted, next, path] = &to;
            let verdict = Verdict { accepted, next, path };
            let target = Rows { logits: &target_logits, distributions: &target_laws };
            let drafter = Rows { logits: &draft_logits, distributions: &draft_laws };
            let judged = VerifyInputs {
                wide: block,
                tokens: &drafted,
                spans: &spans,
                partial: &partial,
                counters: &counters,
            };
            kernels.judge(device, verdict, target, drafter, judged, &states, &common.tables)
        };
        let (target, drafter) = (target.clone(), drafter.clone());
        let check = move || {
            let [accepted, next, path] = written.each_ref().map(|buffer| words_of(device, buffer));
            let (accepted, next, path) = (accepted?, next?, path?);
            for own in ends(sequences) {
                let at = own * block;
                let distribution = |row: usize| probabilities(&drafter, &logits.row(at + row));
                let distributions = (1..block).map(distribution).collect::<Result<Vec<_>>>()?;
                let of_target = |row: usize| target.probabilities(&logits.row((at + row + 1) % rows));
                let (drafts, mut coin) = (&tokens[at + 1..at + block], dice(own));
                let verdict = match rule {
                    VerifyMethod::Block => verify::block_verify(drafts, &distributions, of_target, &mut coin),
                    _ => verify::rejection(drafts, &distributions, of_target, &mut coin),
                };
                let (stood, token) = verdict.ok_or_else(|| Error::Internal("no verdict".into()))?;
                equal("accepted", &accepted[own..=own], &[stood as u32])?;
                equal("next", &next[own..=own], &[token])?;
                let way: Vec<u32> =
                    (0..block).map(|row| if row <= stood { row as u32 } else { NONE }).collect();
                equal("path", &path[at..][..block], &way)?;
            }
            Ok(())
        };
        Ok(Ready::new(1, launch, check))
    })
}
