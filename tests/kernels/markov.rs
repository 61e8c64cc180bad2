//! The kernels of a Markov head against f64: the input of its layers with the confidence, its latent, and the bias
//! that is added to one row of each sequence.

use crate::support::kernel;
use crate::support::layer::pack_rows;

use dflash::checkpoint::drafter::MarkovKind;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::RowStep;
use dflash::gpu::kernels::head::{Head, TargetIds};
use dflash::gpu::kernels::linear::{Input, Shape, Workspace};
use dflash::gpu::kernels::markov::{Confidence, DraftedRows, Markov};
use dflash::gpu::kernels::round::{DraftShape, Finish, Sequence};
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::SamplingParams;
use kernel::*;

const EPS: f32 = 1e-6;
/// The least confidence of all sequences, and the rows that they keep before a launch.
const MIN_CONFIDENCE: f32 = 0.5;
const KEPT: [u32; 3] = [5, 2, 5];

fn bf16(x: u16) -> f64 {
    f64::from(f32::from_bits(u32::from(x) << 16))
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// A running sequence of nine positions.
pub fn sequence(anchor: u32, form: DraftShape) -> Sequence {
    Sequence {
        active: true,
        length: 9,
        anchor,
        pending: 0,
        budget: 9,
        end: 99,
        draft_end: 99,
        block: 5,
        rows: 5,
        form,
        sampling: SamplingParams::default(),
        stop_ids: vec![],
        finish: Finish::Running,
        rounds: 0,
        drafted: 0,
        accepted: 0,
        min_confidence: MIN_CONFIDENCE,
        verify_method: VerifyMethod::Match,
    }
}

/// Three sequences: a chain, a tree, and one whose drafts are no tokens.
const FORMS: [DraftShape; 3] = [DraftShape::Chain, DraftShape::BestFirst, DraftShape::Chain];

struct Data {
    markov: Markov,
    table: Vec<u16>,
    y: Vec<u16>,
    sumsq: Vec<f32>,
    state: Vec<f32>,
    weights: Vec<f32>,
}

impl Data {
    fn new(kind: MarkovKind, rank: usize, hidden: usize, confidence: usize) -> Data {
        let markov = Markov { kind, rank, hidden, vocab: 300, sequences: 3, block: 5, blocks: 3 };
        let mut random = Random::new((rank + hidden + confidence) as u64);
        let mut of = |count, scale| random.normals(count, scale);
        let (rows, parts) = (15, hidden.div_ceil(128));
        Data {
            markov,
            table: to_bf16(&of(300 * rank, 1.0)),
            y: to_bf16(&of(rows * hidden, 2.0)),
            sumsq: of(rows * parts, 1.0).iter().map(|x| 100.0 + x.abs() * 50.0).collect(),
            state: of(3 * rank, 0.5),
            weights: of(confidence, 0.05),
        }
    }

    /// The token before the draft of `depth`: anchors are 7, 8 and 9, drafts 11 and so on, the best tokens 21 and so
    /// on; the drafts of the last sequence are out of range.
    fn token(&self, sequence: usize, depth: usize) -> Option<usize> {
        match (depth, sequence) {
            (1, _) => Some(7 + sequence),
            (_, 0) => Some(10 + depth - 1),
            (_, 1) => Some(20 + depth - 1),
            _ => None,
        }
    }

    fn run(&self, device: &dyn Device, depth: usize) -> (Vec<u16>, Vec<f32>, Vec<u32>) {
        let Markov { sequences, block, blocks, .. } = self.markov;
        let drafts: Vec<u32> = (0..sequences * block)
            .map(|i| if i / block == 2 { u32::MAX - i as u32 } else { (10 + i % block) as u32 })
            .collect();
        // The second block of outputs has the best logit, 1.0.
        let key = |i: usize| match i % blocks {
            1 => 0xbf80_0000 << 32 | u64::from(!(20 + (i / blocks % block) as u32)),
            other => 0x8000_0000 << 32 | u64::from(!(other as u32)),
        };
        let best: Vec<u64> = (0..sequences * block * blocks).map(key).collect();
        let states: Vec<u8> =
            (0..3).flat_map(|i| sequence(7 + i as u32, FORMS[i]).to_bytes().unwrap()).collect();
        let input = poisoned::<u16>(device, sequences * self.markov.inputs());
        let out = poisoned::<f32>(device, sequences * block);
        let (y, sumsq, drafts) =
            (upload(device, &self.y), upload(device, &self.sumsq), upload(device, &drafts));
        let (best, states, state) =
            (upload(device, &best), upload(device, &states), upload(device, &self.state));
        let (table, bias) = (constant(device, &self.table), constant(device, &[0.25f32]));
        let weights = (!self.weights.is_empty()).then(|| constant(device, &self.weights));
        let rows = DraftedRows { y: &y, sumsq: &sumsq, eps: EPS, drafts: &drafts, best: &best };
        let kept = upload(device, &KEPT);
        let confidence =
            weights.as_ref().map(|weights| Confidence { weights, bias: &bias, out: &out, kept: &kept });
        self.markov.input(device, depth, &input, &table, &state, rows, &states, confidence).unwrap();
        (download(device, &input), download(device, &out), download(device, &kept))
    }

    /// H and e of a sequence.
    fn row(&self, sequence: usize, depth: usize) -> [Vec<f64>; 2] {
        let Markov { rank, hidden, block, .. } = self.markov;
        let (row, parts) = (sequence * block + depth, hidden.div_ceil(128));
        let sum: f64 = self.sumsq[row * parts..][..parts].iter().map(|x| f64::from(*x)).sum();
        let scale = 1.0 / (sum / hidden as f64 + f64::from(EPS)).sqrt();
        let h = self.y[row * hidden..][..hidden].iter().map(|y| bf16(*y) * scale).collect();
        let of = |token: usize| self.table[token * rank..][..rank].iter().map(|e| bf16(*e)).collect();
        [h, self.token(sequence, depth).map_or(vec![0.0; rank], of)]
    }
}

#[test]
fn input_joins_the_row_with_the_embedding_of_the_token_before() {
    let cases = [
        (MarkovKind::Vanilla, 32, 64, 0),
        (MarkovKind::Gated, 64, 160, 160),
        (MarkovKind::Rnn, 96, 1056, 1152),
    ];
    for (kind, rank, hidden, confidence) in cases {
        let data = Data::new(kind, rank, hidden, confidence);
        let (inputs, block) = (data.markov.inputs(), data.markov.block);
        for depth in 1..block {
            let bytes = same_bits(|device| {
                let (input, out, kept) = data.run(device, depth);
                [to_bytes(&input), to_bytes(&out), to_bytes(&kept)].concat()
            });
            let (input, rest) = bytes.split_at(3 * inputs * 2);
            let (out, kept) = rest.split_at(3 * block * 4);
            let (input, out, kept) =
                (from_bytes::<u16>(input), from_bytes::<f32>(out), from_bytes::<u32>(kept));
            for sequence in 0..3 {
                let [h, e] = data.row(sequence, depth);
                let own: Vec<f64> =
                    data.state[sequence * rank..][..rank].iter().map(|s| f64::from(*s)).collect();
                let own = if depth == 1 { vec![0.0; rank] } else { own };
                let expected = match kind {
                    MarkovKind::Vanilla => e.clone(),
                    MarkovKind::Gated => [h.clone(), e.clone()].concat(),
                    MarkovKind::Rnn => [own, e.clone(), h.clone()].concat(),
                };
                let got = &input[sequence * inputs..][..inputs];
                for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    let bound = expected.abs() * 0.0041;
                    assert!((bf16(*got) - expected).abs() <= bound, "{kind:?}: input {i} at depth {depth}");
                }
                let sum: f64 =
                    data.weights.iter().zip(h.iter().chain(&e)).map(|(w, x)| f64::from(*w) * x).sum();
                let before = if depth > 1 { KEPT[sequence] } else { block as u32 };
                let low = sigmoid(sum + 0.25) < f64::from(MIN_CONFIDENCE);
                let expected = match confidence {
                    0 => KEPT[sequence],
                    _ if low => before.min(depth as u32),
                    _ => before,
                };
                assert_eq!(kept[sequence], expected, "{kind:?}: rows kept at depth {depth}");
                for (row, got) in out[sequence * block..][..block].iter().enumerate() {
                    match row == depth && confidence > 0 {
                        true => {
                            assert!((f64::from(*got) - sigmoid(sum + 0.25)).abs() < 1e-5, "{kind:?}: {got}")
                        }
                        false => assert_written_is(false, *got),
                    }
                }
            }
        }
    }
}

/// Whether a poisoned f32 was overwritten.
fn assert_written_is(written: bool, value: f32) {
    let poison = (u32::from(POISON) << 16) | u32::from(POISON);
    assert_eq!(value.to_bits() != poison, written);
}

#[test]
fn latent_gates_the_embedding_or_continues_the_state() {
    for (kind, rank, hidden) in [(MarkovKind::Gated, 64, 96), (MarkovKind::Rnn, 544, 64)] {
        let data = Data::new(kind, rank, hidden, 0);
        let outputs = if kind == MarkovKind::Rnn { 3 * rank } else { rank };
        let mut random = Random::new(5);
        let (joint, bias) = (random.normals(3 * outputs, 2.0), random.normals(outputs, 1.0));
        let input = to_bf16(&random.normals(3 * data.markov.inputs(), 1.0));
        for depth in [1, 3] {
            let bytes = same_bits(|device| {
                let (latent, state) = (poisoned::<u16>(device, 3 * rank), upload(device, &data.state));
                let (from, z, bias) =
                    (upload(device, &input), upload(device, &joint), constant(device, &bias));
                data.markov.latent(device, depth, &latent, &state, &from, &z, &bias).unwrap();
                [bytes_of(device, &latent), bytes_of(device, &state)].concat()
            });
            let (latent, state) = bytes.split_at(3 * rank * 2);
            let (latent, state) = (from_bytes::<u16>(latent), from_bytes::<f32>(state));
            for (at, (latent, state)) in latent.iter().zip(&state).enumerate() {
                let (sequence, i) = (at / rank, at % rank);
                let z = |third: usize| {
                    let i = third * rank + i;
                    f64::from(joint[sequence * outputs + i]) + f64::from(bias[i])
                };
                let old = if depth > 1 { f64::from(data.state[at]) } else { 0.0 };
                let (expected, next) = match kind {
                    MarkovKind::Rnn => {
                        let keep = sigmoid(z(0));
                        (z(2).tanh(), keep * old + (1.0 - keep) * z(1).tanh())
                    }
                    _ => {
                        let e = input[sequence * (hidden + rank) + hidden + i];
                        (sigmoid(z(0)) * bf16(e), f64::from(data.state[at]))
                    }
                };
                let got = bf16(*latent);
                assert!(
                    (got - expected).abs() <= expected.abs() * 0.0041 + 1e-6,
                    "{kind:?}: {got}, not {expected}"
                );
                assert!((f64::from(*state) - next).abs() < 1e-5, "{kind:?}: state {state}, not {next}");
            }
        }
    }
}

/// The product is added to the given rows, other rows stay, and best keys are those of the sums.
#[test]
fn head_adds_to_one_row_of_each_sequence() {
    for (outputs, vocab) in [(260, 260), (130, 301)] {
        let (sequences, block, k) = (9, 4, 32);
        let mut random = Random::new(12);
        let ids: Vec<u32> = (0..outputs).map(|i| ((i * vocab + vocab - 1) / outputs) as u32).collect();
        let shape = Shape { n: outputs, k };
        let (w, x) =
            (to_bf16(&random.normals(outputs * k, 1.0)), to_bf16(&random.normals(sequences * k, 1.0)));
        let mut logits = random.normals(sequences * block * vocab, 2.0);
        let kernel =
            Head { rows: sequences, vocab: outputs, k, multiplier: 1.0, softcap: None, ids: outputs };
        let blocks = shape.blocks();
        let bytes = same_bits(|device| {
            let (weights, x) = (constant(device, &pack_rows(&w, shape, |row| row)), upload(device, &x));
            let workspace = Workspace::new(device, &[(shape, sequences)]).unwrap();
            let input = Input {
                weights: &weights,
                x: &x,
                sumsq: None,
                eps: 0.0,
                prefill_kernel: None,
                num_active: None,
                workspace: &workspace,
            };
            let (best, sums) = (poisoned::<u64>(device, sequences * block * blocks), upload(device, &logits));
            let table = constant(device, &ids);
            let reduced = (vocab > outputs).then_some(TargetIds { ids: &table, vocab });
            kernel.add(device, &input, &best, &sums, reduced, RowStep { first: 2, step: block }).unwrap();
            [bytes_of(device, &sums), bytes_of(device, &best)].concat()
        });
        let (sums, best) = bytes.split_at(logits.len() * 4);
        let (sums, best) = (from_bytes::<f32>(sums), from_bytes::<u64>(best));
        for (row, logits) in logits.chunks_mut(vocab).enumerate().filter(|(row, _)| row % block == 2) {
            for (output, &id) in ids.iter().enumerate() {
                let product = |i: usize| bf16(w[output * k + i]) * bf16(x[row / block * k + i]);
                let expected = f64::from(logits[id as usize]) + (0..k).map(product).sum::<f64>();
                let got = sums[row * vocab + id as usize];
                assert!((f64::from(got) - expected).abs() < 1e-4, "row {row}: {got}, not {expected}");
                logits[id as usize] = got;
            }
        }
        assert!(sums == logits, "other rows and columns changed");
        for (i, keys) in best.chunks(blocks).enumerate() {
            let of_block = |block: &[u32]| {
                let key = |id: &u32| {
                    let bits = (sums[i * vocab + *id as usize] + 0.0).to_bits();
                    let ascending = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
                    u64::from(ascending) << 32 | u64::from(!id)
                };
                block.iter().map(key).max().unwrap()
            };
            let expected: Vec<u64> = ids.chunks(128).map(of_block).collect();
            match i % block {
                2 => assert_eq!(keys, expected, "row {i}"),
                _ => assert!(keys.iter().all(|key| *key as u16 == POISON), "row {i}"),
            }
        }
    }
}
