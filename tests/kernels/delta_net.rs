//! Gated DeltaNet against f64, and its state: after any number of accepted rows, of chains and trees, it has the bits of
//! as many single rows.

use crate::support::kernel;

use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::delta_net::{DeltaNet, HEAD_DIM, LayerState, PassRows, StateHeader, Weights};
use kernel::*;

const EPS: f32 = 1e-6;
/// Bound of the relative error of a head's outputs, each rounded to bf16: at most 2^-8. The largest seen is 3.0e-3.
const BOUND: f64 = 1.0 / 256.0;
/// Most rows of a round in these tests.
const RECORDS: usize = 7;

/// Weights of a layer and the rows of sequences, the same for the kernel and the reference.
struct Data {
    key_heads: usize,
    value_heads: usize,
    convolution: Vec<f32>,
    a_log: Vec<f32>,
    dt_bias: Vec<f32>,
    norm: Vec<f32>,
}

impl Data {
    fn new(key_heads: usize, value_heads: usize, random: &mut Random) -> Data {
        let channels = (2 * key_heads + value_heads) * HEAD_DIM;
        Data {
            key_heads,
            value_heads,
            convolution: random.normals(channels * 4, 0.5),
            a_log: random.normals(value_heads, 1.0),
            dt_bias: random.normals(value_heads, 1.0),
            norm: random.normals(HEAD_DIM, 1.0),
        }
    }

    fn kernel(&self, sequences: usize) -> DeltaNet {
        let &Data { key_heads, value_heads, .. } = self;
        let kernel = DeltaNet { key_heads, value_heads, sequences, records: RECORDS, pitch: 0, eps: EPS };
        DeltaNet { pitch: kernel.columns().next_multiple_of(4), ..kernel }
    }

    /// Random rows of a sequence, without the columns from `columns` to the pitch. The decay of some rows is almost
    /// 1 and that of others almost 0; the softplus of some is linear.
    fn rows(&self, count: usize, random: &mut Random) -> Vec<Vec<f32>> {
        let columns = self.kernel(1).columns();
        let row = |random: &mut Random| {
            let mut row = random.normals(columns, 1.0);
            row[columns - self.value_heads..].iter_mut().for_each(|a| *a *= 8.0);
            row
        };
        (0..count).map(|_| row(random)).collect()
    }

    /// The outputs of a sequence of rows, `[rows][value_heads][128]`, and the state after them
    /// `[value_heads][key dim][value dim]`, in f64.
    fn reference(&self, rows: &[Vec<f32>]) -> (Vec<f32>, Vec<f64>) {
        let &Data { key_heads, value_heads, .. } = self;
        let channels = (2 * key_heads + value_heads) * HEAD_DIM;
        let (group, dim) = (value_heads / key_heads, HEAD_DIM);
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let mut state = vec![0.0; value_heads * dim * dim];
        let mut out = vec![];
        for t in 0..rows.len() {
            let rounded = |t: usize, c: usize| f64::from(half::bf16::from_f32(rows[t][c]).to_f32());
            let convolved: Vec<f64> = (0..channels)
                .map(|c| {
                    let taps = (0..4).filter(|m| t + m >= 3);
                    silu(taps.map(|m| f64::from(self.convolution[c * 4 + m]) * rounded(t + m - 3, c)).sum())
                })
                .collect();
            let unit = |first: usize| -> Vec<f64> {
                let x = &convolved[first..][..dim];
                let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
                x.iter().map(|x| x / length).collect()
            };
            for head in 0..value_heads {
                let key_head = head / group;
                let (q, k) = (unit(key_head * dim), unit((key_heads + key_head) * dim));
                let v = &convolved[(2 * key_heads + head) * dim..][..dim];
                let at = |i: usize| f64::from(rows[t][channels + i]);
                let (z, values) = (head * dim, value_heads * dim);
                let beta = 1.0 / (1.0 + (-at(values + head)).exp());
                let a = at(values + value_heads + head) + f64::from(self.dt_bias[head]);
                let decay = (-f64::from(self.a_log[head]).exp() * a.exp().ln_1p()).exp();
                let s = &mut state[head * dim * dim..][..dim * dim];
                s.iter_mut().for_each(|x| *x *= decay);
                let delta: Vec<f64> = (0..dim)
                    .map(|e| beta * (v[e] - (0..dim).map(|d| s[d * dim + e] * k[d]).sum::<f64>()))
                    .collect();
                (0..dim * dim).for_each(|i| s[i] += k[i / dim] * delta[i % dim]);
                let o: Vec<f64> = (0..dim)
                    .map(|e| (0..dim).map(|d| s[d * dim + e] * q[d]).sum::<f64>() / (dim as f64).sqrt())
                    .collect();
                let mean = o.iter().map(|x| x * x).sum::<f64>() / dim as f64;
                let rms = (mean + f64::from(EPS)).sqrt();
                out.extend((0..dim).map(|e| (o[e] / rms * f64::from(self.norm[e]) * silu(at(z + e))) as f32));
            }
        }
        (out, state)
    }
}

/// A layer and its states on a device. Memory that no pass has written is NaN.
struct Rig<'a> {
    device: &'a dyn Device,
    kernel: DeltaNet,
    layer: LayerState,
    headers: Buffer,
    weights: [Buffer; 4],
}

/// What a sequence does in a pass: its context, its rows, and after a round the accepted ones.
#[derive(Clone, Default)]
struct Part {
    context: usize,
    rows: Vec<Vec<f32>>,
    accepted: Vec<u32>,
}

impl<'a> Rig<'a> {
    fn new(device: &'a dyn Device, data: &Data, sequences: usize) -> Rig<'a> {
        let kernel = data.kernel(sequences);
        let layer = kernel.allocate(device).unwrap();
        let LayerState { state, windows, inputs, keys, deltas, decays } = &layer;
        let headers = device.allocate(sequences * StateHeader::BYTES, "headers").unwrap();
        for buffer in [state, windows, inputs, keys, deltas, decays, &headers] {
            let poison: Vec<u8> = (0..buffer.bytes()).map(|i| POISON.to_le_bytes()[i % 2]).collect();
            device.upload(buffer, &poison).unwrap();
        }
        let weights = [&data.convolution, &data.a_log, &data.dt_bias, &data.norm];
        Rig { device, kernel, layer, headers, weights: weights.map(|weight| upload(device, weight)) }
    }

    /// Runs a pass. Returns the outputs of each sequence `[rows][value_heads][128]`. `block`: rows of each sequence in
    /// the buffers.
    fn pass(
        &self,
        parts: &[Part],
        block: usize,
        masks: Option<&[u64]>,
        prompt: Option<usize>,
    ) -> Vec<Vec<u16>> {
        let (device, width) = (self.device, self.kernel.value_heads * HEAD_DIM);
        let mut input = vec![f32::NAN; parts.len() * block * self.kernel.pitch];
        let mut path = vec![u32::MAX; parts.len() * block];
        for (i, part) in parts.iter().enumerate() {
            for (r, row) in part.rows.iter().enumerate() {
                input[(i * block + r) * self.kernel.pitch..][..row.len()].copy_from_slice(row);
            }
            path[i * block..][..part.accepted.len()].copy_from_slice(&part.accepted);
        }
        let spans: Vec<u32> =
            parts.iter().flat_map(|part| [part.context as u32, part.rows.len() as u32]).collect();
        let spans = upload(device, &spans);
        let masks = masks.map(|masks| upload(device, masks));
        let pass = PassRows { sequences: parts.len(), block, spans: &spans, masks: masks.as_ref(), prompt };
        let out = poisoned::<u16>(device, parts.len() * block * width);
        let [convolution, a_log, dt_bias, norm] = &self.weights;
        let weights = Weights { convolution, a_log, dt_bias, norm };
        let input = upload(device, &input);
        self.kernel.launch(device, &out, &input, &self.layer, &self.headers, &weights, &pass).unwrap();
        let path = prompt.is_none().then(|| upload(device, &path));
        self.kernel.advance(device, &self.headers, &pass, path.as_ref()).unwrap();
        let out = download::<u16>(device, &out);
        let of = |(part, out): (&Part, &[u16])| {
            let (rows, rest) = out.split_at(part.rows.len() * width);
            assert!(rest.iter().all(|x| *x == POISON), "a row after the span was written");
            rows.to_vec()
        };
        parts.iter().zip(out.chunks(block * width)).map(of).collect()
    }

    /// A prompt chunk of the only sequence.
    fn prompt(&self, context: usize, rows: &[Vec<f32>]) -> Vec<u16> {
        self.pass(&[Part { context, rows: rows.to_vec(), accepted: vec![] }], rows.len(), None, Some(0))
            .concat()
    }

    /// A round of the only sequence that accepts its first `accepted` rows.
    fn round(&self, context: usize, rows: &[Vec<f32>], accepted: usize) -> Vec<u16> {
        let part = Part { context, rows: rows.to_vec(), accepted: (0..accepted as u32).collect() };
        self.pass(&[part], rows.len(), None, None).concat()
    }

    /// One row at a time.
    fn steps(&self, context: usize, rows: &[Vec<f32>]) -> Vec<u16> {
        let step = |(i, row): (usize, &Vec<f32>)| self.round(context + i, std::slice::from_ref(row), 1);
        rows.iter().enumerate().flat_map(step).collect()
    }

    /// The stored state of a sequence, `[value_heads][key dim][value dim]`.
    fn state(&self, sequence: usize) -> Vec<f32> {
        let all = download::<f32>(self.device, &self.layer.state);
        let of = &all[sequence * self.kernel.value_heads * HEAD_DIM * HEAD_DIM..];
        let element = |i: usize| {
            let (head, d, column) = (i / HEAD_DIM / HEAD_DIM, i / HEAD_DIM % HEAD_DIM, i % HEAD_DIM);
            of[((head * 8 + d / 16) * 512 + column * 4 + d / 4 % 4) * 4 + d % 4]
        };
        (0..self.kernel.value_heads * HEAD_DIM * HEAD_DIM).map(element).collect()
    }
}

fn nan_rows(rows: &[Vec<f32>]) -> Vec<Vec<f32>> {
    rows.iter().map(|row| vec![f32::NAN; row.len()]).collect()
}

/// A prompt, then rounds of one row and of seven with 1 to 7 accepted rows. Rejected rows are NaN.
#[test]
fn prompts_and_rounds_equal_f64() {
    for (turn, (key_heads, value_heads)) in [(1, 1), (1, 3), (2, 4)].into_iter().enumerate() {
        let mut random = Random::new(turn as u64);
        let data = Data::new(key_heads, value_heads, &mut random);
        let rows = data.rows(40, &mut random);
        let run = |device: &dyn Device| {
            let rig = Rig::new(device, &data, 1);
            let mut out = rig.prompt(0, &rows[..2]);
            out.extend(rig.prompt(2, &rows[2..19]));
            for accepted in [3, 1, 7, 2, 1, 6] {
                let at = out.len() / value_heads / HEAD_DIM;
                let block = match accepted {
                    1 => rows[at..at + 1].to_vec(),
                    _ => {
                        let rejected = nan_rows(&rows[at + accepted..(at + RECORDS).max(at + accepted)]);
                        [rows[at..at + accepted].to_vec(), rejected].concat()
                    }
                };
                let all = rig.round(at, &block, accepted);
                out.extend(&all[..accepted * value_heads * HEAD_DIM]);
            }
            // The state of a prompt follows all of its rows.
            let at = out.len() / value_heads / HEAD_DIM;
            assert_eq!(at, 39);
            out.extend(rig.prompt(at, &rows[at..]));
            [to_bytes(&out), to_bytes(&rig.state(0))].concat()
        };
        let bytes = same_bits(run);
        let (out, state) = bytes.split_at(rows.len() * value_heads * HEAD_DIM * 2);
        let (expected, expected_state) = data.reference(&rows);
        let found = from_bf16(&from_bytes(out));
        for (r, (found, expected)) in found.chunks(HEAD_DIM).zip(expected.chunks(HEAD_DIM)).enumerate() {
            let error = relative_error(found, expected);
            assert!(error < BOUND, "{value_heads} heads, row {}: {error:.1e}", r / value_heads);
        }
        let expected_state: Vec<f32> = expected_state.iter().map(|x| *x as f32).collect();
        let error = relative_error(&from_bytes(state), &expected_state);
        // The largest seen is 1.3e-7.
        assert!(error < 1e-6, "{value_heads} heads, state: {error:.1e}");
    }
}

/// For every number of accepted rows of a block: the next rows and the stored state are those of single rows.
#[test]
fn the_state_after_n_accepted_rows_is_that_of_n_steps_bit_for_bit() {
    let mut random = Random::new(7);
    let data = Data::new(1, 2, &mut random);
    let rows = data.rows(9 + RECORDS + 5, &mut random);
    let wrong = data.rows(RECORDS, &mut random);
    on_gpu(|device| {
        for n in 1..=RECORDS {
            set_schedule(n % 5);
            let (after, next) = (9 + n, &rows[9 + n..9 + n + 4]);
            let block = [&rows[9..after], &wrong[n..]].concat();
            let rounds = Rig::new(device, &data, 1);
            rounds.prompt(0, &rows[..9]);
            rounds.round(9, &block, n);
            let found =
                [rounds.round(after, next, 4), rounds.round(after + 4, &rows[after + 4..after + 5], 1)];
            let steps = Rig::new(device, &data, 1);
            for (at, row) in rows[..9].iter().enumerate() {
                steps.prompt(at, std::slice::from_ref(row));
            }
            steps.steps(9, &rows[9..after]);
            assert!(steps.steps(after, &rows[after..after + 5]) == found.concat(), "{n} rows: outputs");
            assert!(to_bytes(&steps.state(0)) == to_bytes(&rounds.state(0)), "{n} rows: state");
        }
    });
}

/// A row of a tree has the bits of the chain of its path, whatever is beside it, and so has the pass after the path
/// was accepted.
#[test]
fn rows_of_a_tree_equal_chains_bit_for_bit() {
    let mut random = Random::new(8);
    let data = Data::new(1, 2, &mut random);
    let (before, rows) = (data.rows(5, &mut random), data.rows(RECORDS, &mut random));
    let next = data.rows(2, &mut random);
    let width = data.value_heads * HEAD_DIM;
    on_gpu(|device| {
        // Branches before and after their siblings' children, and a path of every other row.
        for (turn, parents) in [[0, 0, 1, 1, 0, 4, 5], [0, 0, 0, 1, 2, 3, 5]].iter().enumerate() {
            set_schedule(turn + 1);
            let mut masks = vec![1u64];
            (1..RECORDS).for_each(|row| masks.push(masks[parents[row]] | 1 << row));
            let path = |row: usize| (0..RECORDS).filter(move |i| masks_of(parents, row) >> i & 1 == 1);
            for last in [0, 3, 6] {
                let accepted: Vec<u32> = path(last).map(|row| row as u32).collect();
                let chain: Vec<_> = path(last).map(|row| rows[row].clone()).collect();
                let tree = Rig::new(device, &data, 1);
                tree.prompt(0, &before);
                let part = Part { context: 5, rows: rows.clone(), accepted };
                let found = tree.pass(&[part], RECORDS, Some(&masks), None).concat();
                let steps = Rig::new(device, &data, 1);
                steps.prompt(0, &before);
                let expected = steps.steps(5, &chain);
                let on_path: Vec<u16> =
                    path(last).flat_map(|row| found[row * width..][..width].to_vec()).collect();
                assert!(on_path == expected, "tree {turn}, row {last}");
                let after = 5 + chain.len();
                assert!(
                    tree.round(after, &next, 2) == steps.steps(after, &next),
                    "tree {turn}, after {last}"
                );
            }
        }
    });
}

/// The rows of a tree that are ancestors of `row` or the row itself.
fn masks_of(parents: &[usize; RECORDS], row: usize) -> u64 {
    if row == 0 { 1 } else { masks_of(parents, parents[row]) | 1 << row }
}

/// Sequences of a batch have the bits that they have alone. One takes no part in a round and keeps its state; one
/// starts where another sequence has left its state; one has a prompt between the rounds of the others.
#[test]
fn sequences_of_a_batch_are_independent() {
    let mut random = Random::new(9);
    let data = Data::new(2, 2, &mut random);
    let rows: Vec<_> = (0..3).map(|_| data.rows(20, &mut random)).collect();
    let other = data.rows(6, &mut random);
    on_gpu(|device| {
        let batch = Rig::new(device, &data, 3);
        // Slot 1 first holds another sequence.
        batch.pass(&[Part { context: 0, rows: other.clone(), accepted: vec![] }], 6, None, Some(1));
        let mut found = vec![vec![]; 3];
        let prompt = |slot: usize, count: usize| {
            let part = Part { context: 0, rows: rows[slot][..count].to_vec(), accepted: vec![] };
            batch.pass(&[part], count, None, Some(slot)).concat()
        };
        found[0].extend(prompt(0, 4));
        found[2].extend(prompt(2, 3));
        let mut at = [4, 0, 3];
        let round = |found: &mut Vec<Vec<u16>>, at: &mut [usize; 3], takes: [usize; 3], block: usize| {
            let part = |slot: usize| match takes[slot] {
                0 => Part::default(),
                n => Part {
                    context: at[slot],
                    rows: [&rows[slot][at[slot]..at[slot] + n], &other[..block - n]].concat(),
                    accepted: (0..n as u32).collect(),
                },
            };
            let outputs = batch.pass(&[part(0), part(1), part(2)], block, None, None);
            for slot in 0..3 {
                found[slot].extend(&outputs[slot][..takes[slot] * 2 * HEAD_DIM]);
                at[slot] += takes[slot];
            }
        };
        round(&mut found, &mut at, [2, 0, 1], 4);
        round(&mut found, &mut at, [0, 0, 4], 4);
        found[1].extend(prompt(1, 5));
        at[1] = 5;
        round(&mut found, &mut at, [3, 2, 1], 5);
        round(&mut found, &mut at, [1, 1, 1], 1);
        for slot in 0..3 {
            let alone = Rig::new(device, &data, 1);
            assert!(found[slot] == alone.prompt(0, &rows[slot][..at[slot]]), "sequence {slot}");
        }
    });
}

#[test]
fn launches_refuse_wrong_sizes() {
    on_gpu(|device| {
        let data = Data::new(2, 4, &mut Random::new(1));
        let kernel = data.kernel(1);
        for (kernel, part) in [
            (DeltaNet { value_heads: 3, ..kernel }, "3 value heads on 2 key heads"),
            (DeltaNet { pitch: kernel.pitch - 4, ..kernel }, "expected a multiple of 4, at least 1544"),
            (DeltaNet { records: 65, ..kernel }, "blocks of 65 rows"),
        ] {
            let error = kernel.allocate(device).err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
        let rig = Rig::new(device, &data, 1);
        let spans = upload(device, &[0u32, 1]);
        for (sequences, block, prompt) in
            [(1, RECORDS + 1, None), (2, 1, None), (1, 1, Some(1)), (1, 0, Some(0))]
        {
            let pass = PassRows { sequences, block, spans: &spans, masks: None, prompt };
            let error = rig.kernel.advance(device, &rig.headers, &pass, None).unwrap_err().to_string();
            assert!(error.contains("expected 1 sequences of up to 7 rows"), "{error}");
        }
    });
}
