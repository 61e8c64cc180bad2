//! The kernels of a round other than linear layers and attention. Their launches are small, and the kernel
//! before has just written their inputs, so they are timed with warm caches.

use super::values::{BenchFixtures, RandomArray, below, close, equal, floats_of, halves_of, spots, words_of};
use super::{Case, Ready, groups};
use dflash::checkpoint::pair::Pair;
use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::RowStep;
use dflash::gpu::kernels::embedding::Embedding;
use dflash::gpu::kernels::linear::Shape;
use dflash::gpu::kernels::norm::{Norm, PART};
use dflash::gpu::kernels::round::{DraftShape, Finish, Record, Ring, Round, Sequence, Tables};
use dflash::gpu::kernels::sample::{self, Sample, SamplerInputs};
use dflash::gpu::kernels::verify::{Verify, VerifyOutput};
use dflash::gpu::model::Row;
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::SamplingParams;
use dflash::spec::verify;
use dflash::{Error, Result};
use serde_json::json;
use std::rc::Rc;

pub const NONE: u32 = u32::MAX;
pub const SEED: u64 = 7;
/// Largest number of rows of logits whose results are checked: the host's definitions are slow.
const CHECKED_ROWS: usize = 4;

/// Positions of every sequence. The cost of these kernels does not depend on it.
pub const LENGTH: u32 = 100;
/// The token at position [`LENGTH`].
pub const ANCHOR: u32 = 17;

/// For each of `rows`: embedding, norm, sampling; for blocks and for AR steps: verification by `match` and
/// the round's own kernels.
pub fn cases(pair: &Pair, rows: &[usize]) -> Vec<Case> {
    let target = &pair.target.config;
    let (hidden, vocab) = (target.stack.hidden, target.vocab);
    let mask = pair.drafter().map_or(0, |drafter| drafter.config.mask_token);
    let mut all = vec![];
    for &rows in rows {
        all.push(embedding(Embedding { rows, hidden, vocab, packed: target.tied, scale: 1.0 }));
        all.push(norm(Norm { rows, hidden }));
        let blocks = Shape { n: vocab, k: hidden }.blocks();
        let sample = Sample { rows, vocab, blocks, reduced: false, sequences: 1 };
        all.push(choice("sample", sample, 0.0));
        all.push(choice("sample with temperature", sample, 1.0));
        for (batch, block) in groups(pair, rows) {
            let round = Round { sequences: batch, block, max_verify_rows: block };
            all.push(verify(round, vocab));
            all.push(begin(round, mask));
            all.push(tokens(round, vocab));
            all.push(finish(round, vocab));
        }
    }
    all
}

pub fn case(
    name: &str,
    parameters: serde_json::Value,
    bytes: u64,
    make: impl for<'d> Fn(&BenchFixtures<'d>) -> Result<Ready<'d>> + 'static,
) -> Case {
    Case { name: name.into(), parameters, bytes, flops: 0.0, make: Box::new(make) }
}

fn embedding(kernel: Embedding) -> Case {
    let Embedding { rows, hidden, vocab, packed, .. } = kernel;
    case("embedding", json!({ "rows": rows }), kernel.bytes(), move |fixtures| {
        let device = fixtures.device;
        let table_rows = if packed { vocab.next_multiple_of(16) } else { vocab };
        let table = fixtures.halves(table_rows * hidden, 1.0, "the embedding table")?;
        let ids: Vec<usize> = (0..rows).map(|row| below(row, vocab)).collect();
        let tokens = fixtures.words(ids.iter().map(|id| *id as u32))?;
        let out = fixtures.output(rows * hidden * 4)?;
        let (from, to) = (table.buffer.clone(), out.clone());
        let launch = move |_| kernel.launch(device, &to, &from, &tokens);
        let check = move || {
            let found = floats_of(device, &out)?;
            let spots = spots(rows, hidden);
            let element = |&(row, c): &(usize, usize)| {
                let id = ids[row];
                // [vocab / 16][hidden / 32][half 2][kblock 4][row 8][8]
                let group = id / 16 * (hidden / 32) + c / 32;
                let packed_at = group * 512 + id / 8 % 2 * 256 + c / 8 % 4 * 64 + id % 8 * 8 + c % 8;
                table.at(if packed { packed_at } else { id * hidden + c })
            };
            let got: Vec<f32> = spots.iter().map(|(row, c)| found[row * hidden + c]).collect();
            equal("element", &got, &spots.iter().map(element).collect::<Vec<f32>>())
        };
        Ok(Ready::new(1, launch, check))
    })
}

fn norm(kernel: Norm) -> Case {
    let Norm { rows, hidden } = kernel;
    case("norm", json!({ "rows": rows }), kernel.bytes(false), move |fixtures| {
        let device = fixtures.device;
        let x = fixtures.floats(rows * hidden, 0.0, 1.0, "the residual stream")?;
        let gain = fixtures.floats(hidden, 1.0, 0.1, "gains")?;
        let (y, sumsq) = (fixtures.output(rows * hidden * 2)?, fixtures.output(rows * kernel.parts() * 4)?);
        let (stream, gains, to, sums) = (x.buffer.clone(), gain.buffer.clone(), y.clone(), sumsq.clone());
        let launch = move |_| kernel.launch(device, &to, &sums, &stream, None, &gains);
        let check = move || {
            let (ys, sums) = (halves_of(device, &y)?, floats_of(device, &sumsq)?);
            let element = |(row, c): (usize, usize)| {
                (ys[row * hidden + c], f64::from(gain.at(c)) * f64::from(x.at(row * hidden + c)))
            };
            close("y", &spots(rows, hidden).into_iter().map(element).collect::<Vec<_>>(), 3e-3)?;
            let sum = |(row, part): (usize, usize)| {
                let columns = part * PART..hidden.min((part + 1) * PART);
                let squares = columns.map(|c| f64::from(x.at(row * hidden + c)).powi(2)).sum();
                (sums[row * kernel.parts() + part], squares)
            };
            close(
                "sums of squares",
                &spots(rows, kernel.parts()).into_iter().map(sum).collect::<Vec<_>>(),
                1e-6,
            )
        };
        Ok(Ready::new(1, launch, check))
    })
}

/// Rows of random logits.
pub struct Logits {
    values: RandomArray,
    rows: usize,
    vocab: usize,
}

impl Logits {
    pub fn new(fixtures: &BenchFixtures, rows: usize, vocab: usize) -> Result<Logits> {
        Ok(Logits { values: fixtures.floats(rows * vocab, 0.0, 3.0, "logits")?, rows, vocab })
    }

    /// `[rows][vocab]` f32
    pub fn buffer(&self) -> Buffer {
        self.values.buffer.clone()
    }

    pub fn row(&self, row: usize) -> Vec<f32> {
        (0..self.vocab).map(|id| self.values.at(row * self.vocab + id)).collect()
    }

    /// The rows to check.
    pub fn checked_rows(&self) -> Vec<usize> {
        (0..self.rows).step_by(self.rows.div_ceil(CHECKED_ROWS)).collect()
    }

    /// The LM head's output for each row: the best logit of every 128 ids, `blocks` entries.
    pub fn best(&self, blocks: usize) -> Vec<Vec<u8>> {
        let number = |(id, logit): (usize, &f32)| {
            let bits = logit.to_bits();
            let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
            u64::from(ascending) << 32 | u64::from(!(id as u32))
        };
        let of_row = |row: usize| {
            let numbers: Vec<u64> = self.row(row).iter().enumerate().map(number).collect();
            let best = |block: &[u64]| block.iter().copied().max().unwrap_or(0);
            let chunks = numbers.chunks(self.vocab.div_ceil(blocks).max(PART));
            chunks.flat_map(|block| best(block).to_le_bytes()).collect()
        };
        (0..self.rows).map(of_row).collect()
    }
}

fn choice(name: &str, kernel: Sample, temperature: f32) -> Case {
    let Sample { rows, vocab, blocks, .. } = kernel;
    let bytes = if temperature > 0.0 { kernel.sampled_bytes() } else { kernel.bytes() };
    case(name, json!({ "rows": rows }), bytes, move |fixtures| {
        let device = fixtures.device;
        let logits = Logits::new(fixtures, rows, vocab)?;
        let best = fixtures.bytes(&logits.best(blocks).concat())?;
        let position = |row: usize| 100 + row as u32;
        let table = fixtures.words((0..rows).flat_map(|row| [0, position(row), NONE, NONE]))?;
        let sampling = at_temperature(temperature);
        let state = fixtures.bytes(&sequence(1, sampling.clone()).to_bytes()?)?;
        let tables = fixtures.bytes(&sample::tables())?;
        device.seal(&tables);
        let (partial, choice) = (fixtures.output(kernel.workspace())?, fixtures.output(rows * 4)?);
        let counters = fixtures.zeros(rows)?;
        let (greedy, to, from) = (temperature == 0.0, choice.clone(), logits.buffer());
        let launch = move |_| {
            let inputs = SamplerInputs {
                logits: &from,
                sequences: &state,
                tables: &tables,
                partial: &partial,
                counters: &counters,
            };
            kernel.launch(device, RowStep::ALL, &to, &best, &table, (!greedy).then_some(inputs))
        };
        let check = move || {
            let found = words_of(device, &choice)?;
            let checked = logits.checked_rows();
            let choose = |&row: &usize| sampling.choose(&logits.row(row), position(row) + 1).unwrap_or(NONE);
            let got: Vec<u32> = checked.iter().map(|row| found[*row]).collect();
            equal("choice", &got, &checked.iter().map(choose).collect::<Vec<u32>>())
        };
        Ok(Ready::new(1, launch, check))
    })
}

/// A sequence that does not reach a limit while it is measured.
pub fn sequence(block: usize, sampling: SamplingParams) -> Sequence {
    Sequence {
        active: true,
        length: LENGTH,
        anchor: ANCHOR,
        pending: (block as u32).min(3),
        budget: 1 << 30,
        end: 1 << 30,
        draft_end: 1 << 30,
        block: block as u32,
        rows: block as u32,
        form: DraftShape::Chain,
        sampling,
        stop_ids: vec![],
        finish: Finish::Running,
        rounds: 0,
        drafted: 0,
        accepted: 0,
        min_confidence: 0.0,
        verify_method: VerifyMethod::Match,
    }
}

pub fn at_temperature(temperature: f32) -> SamplingParams {
    SamplingParams { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: SEED, stream: 0 }
}

pub fn greedy() -> SamplingParams {
    at_temperature(0.0)
}

/// The result of a verification, `[sequences][rows]`, on the device.
#[derive(Clone)]
pub struct Outcome {
    accepted: Buffer,
    next: Buffer,
    path: Buffer,
    rows: usize,
}

impl Outcome {
    pub fn new(fixtures: &BenchFixtures, sequences: usize, rows: usize) -> Result<Outcome> {
        let (accepted, next) = (fixtures.output(sequences * 4)?, fixtures.output(sequences * 4)?);
        Ok(Outcome { accepted, next, path: fixtures.output(sequences * rows * 4)?, rows })
    }

    pub fn buffers(&self) -> VerifyOutput<'_> {
        VerifyOutput { accepted: &self.accepted, next: &self.next, path: &self.path }
    }

    /// Compares the results of some sequences with the definition's: the rows from the anchor to the last
    /// accepted draft, and the token after it.
    pub fn check(
        &self,
        device: &dyn Device,
        sequences: impl IntoIterator<Item = usize>,
        expected: impl Fn(usize) -> Result<Option<(Vec<usize>, u32)>>,
    ) -> Result<()> {
        let [accepted, next, path] =
            [&self.accepted, &self.next, &self.path].map(|buffer| words_of(device, buffer));
        let (accepted, next, path) = (accepted?, next?, path?);
        for own in sequences {
            let result = expected(own)?;
            let (rows, token) =
                result.ok_or_else(|| Error::Internal("no result of a verification".into()))?;
            equal("accepted", &accepted[own..=own], &[rows.len() as u32 - 1])?;
            equal("next", &next[own..=own], &[token])?;
            let row = |i: usize| rows.get(i).map_or(NONE, |row| *row as u32);
            let rows: Vec<u32> = (0..self.rows).map(row).collect();
            equal("path", &path[own * self.rows..][..self.rows], &rows)?;
        }
        Ok(())
    }
}

fn states(round: Round) -> Result<Vec<u8>> {
    Ok(sequence(round.block, greedy()).to_bytes()?.repeat(round.sequences))
}

fn parameters(round: Round) -> serde_json::Value {
    json!({ "rows": round.sequences * round.block, "batch": round.sequences })
}

/// Random tokens of a verification: anchors and drafts.
fn verify_tokens(round: Round, vocab: usize) -> Vec<u32> {
    (0..round.sequences * round.block).map(|i| below(i, vocab) as u32).collect()
}

/// How many drafts of a sequence are accepted: from sequence to sequence all possible numbers in turn.
fn accepted_drafts(sequence: usize, block: usize) -> usize {
    (block - 1 + sequence) % block
}

fn verify(round: Round, vocab: usize) -> Case {
    let Round { sequences, block, .. } = round;
    let kernel = Verify { sequences, block };
    case("verify", parameters(round), kernel.bytes(), move |fixtures| {
        let device = fixtures.device;
        let drafts = verify_tokens(round, vocab);
        let choice = |i: usize| match (i / block, i % block) {
            (own, row) if row < accepted_drafts(own, block) => drafts[i + 1],
            // Not equal to any draft.
            _ => vocab as u32,
        };
        let choices: Vec<u32> = (0..drafts.len()).map(choice).collect();
        let [tokens, chosen] = [&drafts, &choices].map(|words| fixtures.words(words.iter().copied()));
        let (tokens, chosen) = (tokens?, chosen?);
        let spans = fixtures.words((0..sequences).flat_map(|_| [0, block as u32]))?;
        let outcome = Outcome::new(fixtures, sequences, block)?;
        let written = outcome.clone();
        let launch = move |_| kernel.launch(device, outcome.buffers(), &chosen, &tokens, None, &spans);
        let check = move || {
            let expected = |own: usize| {
                let at = own * block;
                let result = verify::match_chain(&drafts[at + 1..at + block], |row| Some(choices[at + row]));
                Ok(result.map(|(accepted, next)| ((0..=accepted).collect(), next)))
            };
            written.check(device, 0..sequences, expected)
        };
        Ok(Ready::new(1, launch, check))
    })
}

fn begin(round: Round, mask: u32) -> Case {
    let Round { sequences, block, .. } = round;
    let rows = sequences * block;
    case("round_begin", parameters(round), round.begin_bytes(), move |fixtures| {
        let device = fixtures.device;
        let states = fixtures.bytes(&states(round)?)?;
        let path = fixtures.words((0..rows).map(|i| (i % block) as u32))?;
        let [draft_tokens, features] = [fixtures.output(rows * 4)?, fixtures.output(rows * 4)?];
        let [draft_rows, verify_rows] =
            [fixtures.output(2 * rows * Row::BYTES)?, fixtures.output(rows * Row::BYTES)?];
        let [draft_spans, verify_spans] = [fixtures.output(sequences * 8)?, fixtures.output(sequences * 8)?];
        let round_header = fixtures.words([0, 0, block as u32])?;
        let all = [draft_tokens, draft_rows, features, draft_spans, verify_rows, verify_spans, round_header];
        let written = all.clone();
        let launch = move |_| {
            let [draft_tokens, draft_rows, features, draft_spans, verify_rows, verify_spans, round_header] =
                &all;
            let tables = Tables {
                draft_tokens,
                draft_rows,
                features,
                draft_spans,
                verify_rows,
                verify_spans,
                round_header,
            };
            round.begin(device, tables, &states, &path, block > 1, mask, 0)
        };
        let check = move || {
            let [draft_tokens, draft_rows, features, draft_spans, verify_rows, verify_spans, round_header] =
                written.each_ref().map(|buffer| words_of(device, buffer));
            let state = sequence(block, greedy());
            let (length, pending) = (state.length, state.pending);
            let drafts = if block > 1 { block as u32 } else { 0 };
            let mut expected: [Vec<u32>; 3] = Default::default();
            let mut pending_rows = vec![];
            let mut draft = vec![];
            for i in 0..rows as u32 {
                let (own, row) = (i / block as u32, i % block as u32);
                expected[0].push(if row >= drafts {
                    NONE
                } else if row == 0 {
                    state.anchor
                } else {
                    mask
                });
                let position = length - pending + row;
                let feature = row < pending;
                expected[1].push(if feature { i } else { NONE });
                pending_rows.extend(if feature {
                    [own, position, position, NONE]
                } else {
                    [NONE, 0, NONE, NONE]
                });
                draft.extend(if row < drafts {
                    [own, length + row, length + row, i]
                } else {
                    [NONE, 0, NONE, NONE]
                });
                expected[2].extend([own, length + row, length + row, i]);
            }
            let span = |rows: u32| [if rows > 0 { length } else { 0 }, rows].repeat(sequences);
            equal("draft token", &draft_tokens?, &expected[0])?;
            equal("feature", &features?, &expected[1])?;
            equal("draft row", &draft_rows?, &[pending_rows, draft].concat())?;
            equal("verify row", &verify_rows?, &expected[2])?;
            equal("draft span", &draft_spans?, &span(drafts))?;
            equal("verify span", &verify_spans?, &span(block as u32))?;
            equal("round header", &round_header?, &[1, sequences as u32, block as u32])
        };
        Ok(Ready::new(1, launch, check))
    })
}

fn tokens(round: Round, vocab: usize) -> Case {
    let Round { sequences, block, .. } = round;
    case("round_tokens", parameters(round), round.tokens_bytes(), move |fixtures| {
        let device = fixtures.device;
        let states = fixtures.bytes(&states(round)?)?;
        let mut expected = verify_tokens(round, vocab);
        let drafts = fixtures.words(expected.iter().copied())?;
        (0..sequences).for_each(|own| expected[own * block] = ANCHOR);
        let out = fixtures.output(expected.len() * 4)?;
        let to = out.clone();
        let spans = fixtures.words((0..sequences).flat_map(|_| [0, block as u32]))?;
        let table = fixtures.output(expected.len() * 16)?;
        let launch = move |_| round.tokens(device, &to, &drafts, &table, &spans, &states, None);
        Ok(Ready::new(1, launch, move || equal("token", &words_of(device, &out)?, &expected)))
    })
}

fn finish(round: Round, vocab: usize) -> Case {
    let Round { sequences, block, .. } = round;
    case("round_finish", parameters(round), round.finish_bytes(), move |fixtures| {
        let device = fixtures.device;
        let before = states(round)?;
        let states = fixtures.bytes(&before)?;
        let tokens = verify_tokens(round, vocab);
        let drafts = fixtures.words(tokens.iter().copied())?;
        let accepted = fixtures.words((0..sequences).map(|own| accepted_drafts(own, block) as u32))?;
        let next = fixtures.words((0..sequences).map(|own| own as u32))?;
        let path = fixtures.words((0..tokens.len()).map(|i| (i % block) as u32))?;
        let round_header = fixtures.words([1, sequences as u32, block as u32])?;
        let spans = fixtures.words((0..sequences).flat_map(|_| [0, block as u32]))?;
        let ring = Rc::new(Ring::new(device, round, 1)?);
        let (own_ring, own_states) = (ring.clone(), states.clone());
        let launch = move |_| {
            let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
            round.finish(device, &own_states, &own_ring, &round_header, output, &drafts, &spans, None)
        };
        // A launch changes the states.
        let to = states.clone();
        let prepare = move || device.upload(&to, &before);
        let check = move || {
            device.synchronize()?;
            for own in 0..sequences {
                let accepted = accepted_drafts(own, block);
                let mut emitted = tokens[own * block + 1..own * block + 1 + accepted].to_vec();
                emitted.push(own as u32);
                let expected = Record {
                    acceptance_length: emitted.len() as u32,
                    tokens: emitted,
                    finish: Finish::Running,
                    drafted: block as u32 - 1,
                    path: u64::MAX >> (63 - accepted),
                };
                equal("record", &[ring.read(1, own)?], &[Some(expected)])?;
            }
            let length =
                |own: usize| words_of(device, &states).map(|words| words[own * Sequence::BYTES / 4 + 1]);
            let own = sequences - 1;
            equal("length", &[length(own)?], &[LENGTH + accepted_drafts(own, block) as u32 + 1])
        };
        Ok(Ready { prepare: Box::new(prepare), ..Ready::new(1, launch, check) })
    })
}
