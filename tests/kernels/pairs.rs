//! The inputs of an EAGLE-3 drafter's layer against f64: pairs of pending features, of a prompt and of the steps after
//! them, with their tables; norms of taps. Relative bounds: 2^-8 for bf16, 1e-6 for the residual stream.

use crate::markov::sequence;
use crate::support::kernel;
use crate::support::layer::pack_rows;

use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::linear::Shape;
use dflash::gpu::kernels::pairs::{Drafted, NormalizeTaps, PairOutput, Pairs};
use dflash::gpu::kernels::round::DraftShape;
use kernel::*;

const NONE: u32 = u32::MAX;
const EPS: f32 = 1e-6;
const VOCAB: usize = 300;
const BLOCK: usize = 4;
const SEQUENCES: usize = 4;
const ROWS: usize = SEQUENCES * BLOCK;
/// Pending features of each sequence, from position 5 on. The last sequence takes no part.
const PENDING: [usize; SEQUENCES] = [1, 3, 4, 0];
/// Rows of each sequence's block, the anchor's included; the second one drafts nothing.
const DRAFTING: [usize; SEQUENCES] = [4, 0, 3, 0];

struct Data {
    hidden: usize,
    packed: bool,
    norm_before_residual: bool,
    table: Vec<u16>,
    gains: [Vec<f32>; 3], // of the token, of the feature, of the output
    features: Vec<u16>,   // [ROWS][hidden]
    tokens: Vec<u32>,     // [ROWS]
    gather: Vec<u32>,     // [ROWS]
    x: Vec<f32>,          // [SEQUENCES][hidden]
}

fn data(seed: u64, hidden: usize, packed: bool, norm_before_residual: bool) -> Data {
    let mut random = Random::new(seed);
    let gather = (0..ROWS).map(|at| {
        let (sequence, row) = (at / BLOCK, at % BLOCK);
        // Accepted rows need not be the first; with the third sequence one is out of range.
        let path =
            if sequence == 2 && row == 2 { NONE } else { (sequence * BLOCK + (row * 3) % BLOCK) as u32 };
        if row < PENDING[sequence] { path } else { NONE }
    });
    Data {
        hidden,
        packed,
        norm_before_residual,
        gather: gather.collect(),
        table: random.bf16(VOCAB * hidden, 1.0),
        gains: [1, 2, 3].map(|_| random.normals(hidden, 1.0)),
        features: random.bf16(ROWS * hidden, 2.0),
        tokens: (0..ROWS).map(|i| if i == 5 { VOCAB as u32 } else { (i * 17) as u32 }).collect(),
        x: random.normals(SEQUENCES * hidden, 3.0),
    }
}

/// `[2][ROWS]` Row as round_begin writes them: pending features, then the block with row 0 at the last of them.
fn rows() -> Vec<u32> {
    let row = |sequence: usize, exists: bool, position: usize, stored: bool| match exists {
        true => [sequence as u32, position as u32, if stored { position as u32 } else { NONE }, NONE],
        false => [NONE, 0, NONE, NONE],
    };
    let of = |i: usize| (i / BLOCK, i % BLOCK);
    let pending = (0..ROWS).map(of).map(|(s, r)| row(s, r < PENDING[s], 5 + r, true));
    let block = (0..ROWS).map(of).map(|(s, r)| row(s, r < DRAFTING[s], 4 + PENDING[s] + r, r > 0));
    pending.chain(block).flatten().collect()
}

struct Output {
    pairs: Buffer,
    table: Buffer,
    spans: Buffer,
    x: Buffer,
}

impl Data {
    fn output(&self, device: &dyn Device, rows: usize) -> Output {
        Output {
            pairs: poisoned::<u16>(device, rows * self.hidden * 2),
            table: poisoned::<u32>(device, rows * 4),
            spans: poisoned::<u32>(device, SEQUENCES * 2),
            x: poisoned::<f32>(device, SEQUENCES * self.hidden),
        }
    }

    fn with<T>(&self, device: &dyn Device, run: impl FnOnce(&Pairs) -> T) -> T {
        let shape = Shape { n: VOCAB, k: self.hidden };
        let packed = self.packed.then(|| pack_rows(&self.table, shape, |row| row));
        let embeddings = constant(device, packed.as_ref().unwrap_or(&self.table));
        let [token_gain, feature_gain] = [0, 1].map(|i| constant(device, &self.gains[i]));
        run(&Pairs {
            hidden: self.hidden,
            vocab: VOCAB,
            packed: self.packed,
            norm_before_residual: self.norm_before_residual,
            scale: 0.5,
            eps: EPS,
            embeddings: &embeddings,
            token_gain: &token_gain,
            feature_gain: &feature_gain,
        })
    }

    /// The pair and its residual.
    fn expected(&self, token: u32, feature: &[f64]) -> (Vec<f32>, Vec<f32>) {
        let embedding: Vec<f64> = match token as usize {
            token if token < VOCAB => from_bf16(&self.table[token * self.hidden..][..self.hidden])
                .iter()
                .map(|x| f64::from(*x) * 0.5)
                .collect(),
            _ => vec![0.0; self.hidden],
        };
        let m = normed(feature, &self.gains[1]);
        let pair = normed(&embedding, &self.gains[0]).iter().chain(&m).map(|x| *x as f32).collect();
        let residual = if self.norm_before_residual { &m } else { feature };
        (pair, residual.iter().map(|x| *x as f32).collect())
    }
}

fn normed(x: &[f64], gain: &[f32]) -> Vec<f64> {
    let rms = (x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64 + f64::from(EPS)).sqrt();
    x.iter().zip(gain).map(|(x, gain)| x / rms * f64::from(*gain)).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn near(found: &[f32], expected: &[f32], bound: f64, what: &str) {
    match expected.iter().all(|x| *x == 0.0) {
        true => assert!(found.iter().all(|x| *x == 0.0), "{what}: not zero"),
        false => assert!(relative_error(found, expected) < bound, "{what}"),
    }
}

const SHAPES: [(usize, bool, bool); 3] = [(32, false, false), (160, true, true), (2560, false, true)];

#[test]
fn pairs_of_pending_features_have_the_token_after_each() {
    for (seed, (hidden, packed, normed)) in SHAPES.into_iter().enumerate() {
        let data = data(seed as u64, hidden, packed, normed);
        let bytes = same_bits(|device| {
            let out = data.output(device, ROWS);
            let states: Vec<u8> = (0..SEQUENCES)
                .flat_map(|s| sequence(200 + s as u32, DraftShape::Chain).to_bytes().unwrap())
                .collect();
            let [features, states] = [to_bytes(&data.features), states].map(|bytes| upload(device, &bytes));
            let [tokens, gather, rows] =
                [&data.tokens, &data.gather, &rows()].map(|words| upload(device, words));
            let Output { pairs, table, spans, x } = &out;
            let to = PairOutput { pairs, table, spans, x };
            data.with(device, |kernel| {
                kernel.extend(device, SEQUENCES, BLOCK, to, &features, &tokens, &gather, &rows, &states)
            })
            .unwrap();
            [pairs, table, spans, x].map(|buffer| bytes_of(device, buffer)).concat()
        });
        let (pairs, rest) = bytes.split_at(ROWS * hidden * 4);
        let (table, rest) = rest.split_at(ROWS * 16);
        let (spans, x) = rest.split_at(SEQUENCES * 8);
        let (pairs, x) = (from_bf16(&from_bytes(pairs)), from_bytes::<f32>(x));
        let (mut table_expected, mut spans_expected) = (vec![], vec![[0, 0]; SEQUENCES]);
        for at in 0..ROWS {
            let (s, row) = (at / BLOCK, at % BLOCK);
            let (exists, last) = (row < PENDING[s], row + 1 == PENDING[s]);
            let found = &pairs[at * hidden * 2..][..hidden * 2];
            let what = format!("hidden size {hidden}, row {at}");
            let position = 5 + row as u32;
            let query = if last && DRAFTING[s] > 0 { s as u32 } else { NONE };
            if query != NONE {
                spans_expected[s] = [position, 1];
            }
            table_expected.extend(match exists {
                true => [s as u32, position, position, query],
                false => [NONE, 0, NONE, NONE],
            });
            if !exists {
                near(found, &vec![0.0; hidden * 2], 0.0, &what);
                continue;
            }
            let token = match data.gather.get(at + 1) {
                _ if last => 200 + s as u32,
                Some(&NONE) | None => NONE,
                Some(&row) => data.tokens[row as usize],
            };
            let feature = wide(&from_bf16(&data.features[at * hidden..][..hidden]));
            let (pair, residual) = data.expected(token, &feature);
            near(&found[..hidden], &pair[..hidden], 1.0 / 256.0, &what);
            near(&found[hidden..], &pair[hidden..], 1.0 / 256.0, &what);
            if last {
                near(&x[s * hidden..][..hidden], &residual, 1e-6, &what);
            }
        }
        assert_eq!(from_bytes::<u32>(table), table_expected);
        assert_eq!(from_bytes::<u32>(spans), spans_expected.concat());
        near(&x[3 * hidden..], &vec![0.0; hidden], 0.0, "no pending features");
    }
}

#[test]
fn pairs_of_a_prompt_have_the_token_after_each() {
    let data = data(9, 160, true, true);
    let bytes = same_bits(|device| {
        let (features, tokens) = (upload(device, &data.features), upload(device, &data.tokens));
        let pairs = poisoned::<u16>(device, 7 * data.hidden * 2);
        data.with(device, |kernel| kernel.prompt(device, 7, &pairs, &features, &tokens)).unwrap();
        bytes_of(device, &pairs)
    });
    let pairs = from_bf16(&from_bytes(&bytes));
    for (row, found) in pairs.chunks(data.hidden * 2).enumerate() {
        let feature = wide(&from_bf16(&data.features[row * data.hidden..][..data.hidden]));
        near(found, &data.expected(data.tokens[row + 1], &feature).0, 1.0 / 256.0, &format!("row {row}"));
    }
}

#[test]
fn pairs_of_a_step_follow_the_draft_before() {
    for (i, (hidden, packed, residual)) in SHAPES.into_iter().enumerate() {
        // Every second case takes the best tokens instead of sampled drafts, and norms the output.
        let (sampled, norm_output, depth) = (i % 2 == 0, i % 2 == 1, 2 + i % 2);
        let data = data(20 + i as u64, hidden, packed, residual && i != 1);
        let logits: Vec<f32> = Random::new(3).normals(ROWS * VOCAB, 1.0);
        let best_of = |at: usize| {
            let row = &logits[at * VOCAB..][..VOCAB];
            (0..VOCAB).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as u32
        };
        let bytes = same_bits(|device| {
            let out = data.output(device, SEQUENCES);
            let x = upload(device, &data.x);
            let gain = constant(device, &data.gains[2]);
            let drafts = upload(device, &data.tokens);
            let best = upload(device, &logits.chunks(VOCAB).flat_map(best_keys).collect::<Vec<u64>>());
            let drafted =
                if sampled { Drafted::Tokens(&drafts) } else { Drafted::Best(&best, VOCAB.div_ceil(128)) };
            let block = upload(device, &rows()[ROWS * 4..]);
            let Output { pairs, table, spans, .. } = &out;
            let to = PairOutput { pairs, table, spans, x: &x };
            let gain = norm_output.then_some(&gain);
            data.with(device, |kernel| {
                kernel.step(device, SEQUENCES, BLOCK, depth, to, gain, drafted, &block)
            })
            .unwrap();
            [pairs, table, spans, &x].map(|buffer| bytes_of(device, buffer)).concat()
        });
        let (pairs, rest) = bytes.split_at(SEQUENCES * hidden * 4);
        let (table, rest) = rest.split_at(SEQUENCES * 16);
        let (spans, x) = rest.split_at(SEQUENCES * 8);
        let (pairs, x) = (from_bf16(&from_bytes(pairs)), from_bytes::<f32>(x));
        let (table, spans) = (from_bytes::<u32>(table), from_bytes::<u32>(spans));
        for (s, drafting) in DRAFTING.into_iter().enumerate() {
            let what = format!("hidden size {hidden}, sequence {s}");
            let found = &pairs[s * hidden * 2..][..hidden * 2];
            let before = &data.x[s * hidden..][..hidden];
            if depth >= drafting {
                near(found, &vec![0.0; hidden * 2], 0.0, &what);
                assert_eq!(
                    (&table[s * 4..][..4], &spans[s * 2..][..2]),
                    (&[NONE, 0, NONE, NONE][..], &[0, 0][..])
                );
                assert_eq!(&x[s * hidden..][..hidden], before, "{what}");
                continue;
            }
            let position = (3 + PENDING[s] + depth) as u32;
            assert_eq!(table[s * 4..][..4], [s as u32, position, position, s as u32], "{what}");
            assert_eq!(spans[s * 2..][..2], [position, 1], "{what}");
            let at = s * BLOCK + depth - 1;
            let token = if sampled { data.tokens[at] } else { best_of(at) };
            let feature = if norm_output { normed(&wide(before), &data.gains[2]) } else { wide(before) };
            let (pair, residual) = data.expected(token, &feature);
            near(found, &pair, 1.0 / 256.0, &what);
            near(&x[s * hidden..][..hidden], &residual, 1e-6, &what);
        }
    }
}

/// The norm over all taps comes before those over each. Rows that are not gathered stay as they are.
#[test]
fn taps_are_normed_together_and_each() {
    let (taps, hidden, feature_rows) = (3, 160, 5);
    let gather = [3, NONE, 0, 5, 4];
    let mut random = Random::new(4);
    let features = random.bf16(feature_rows * taps * hidden, 3.0);
    let gains = [0, 1].map(|_| random.normals(taps * hidden, 1.0));
    for [together, single] in [[true, false], [false, true], [true, true]] {
        let bytes = same_bits(|device| {
            let (buffer, rows) = (upload(device, &features), upload(device, &gather));
            let both = gains.each_ref().map(|gain| constant(device, gain));
            let (all, each) = (together.then_some(&both[0]), single.then_some(&both[1]));
            let kernel = NormalizeTaps { taps, hidden, all, each, eps: EPS };
            kernel.launch(device, gather.len(), &buffer, &rows).unwrap();
            bytes_of(device, &buffer)
        });
        let found = from_bytes::<u16>(&bytes);
        for row in 0..feature_rows {
            let [before, after] = [&features, &found].map(|all| &all[row * taps * hidden..][..taps * hidden]);
            if !gather.contains(&(row as u32)) {
                assert_eq!(before, after, "row {row}");
                continue;
            }
            let mut expected = wide(&from_bf16(before));
            if together {
                expected = normed(&expected, &gains[0]);
            }
            if single {
                let each = expected.chunks(hidden).zip(gains[1].chunks(hidden));
                expected = each.flat_map(|(tap, gain)| normed(tap, gain)).collect();
            }
            let expected: Vec<f32> = expected.into_iter().map(|x| x as f32).collect();
            near(&from_bf16(after), &expected, 1.0 / 256.0, &format!("row {row}"));
        }
    }
}
