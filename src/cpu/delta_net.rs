//! Gated DeltaNet (arXiv 2412.06464), the linear attention of hybrid targets, in plain f32. In place of keys
//! and values of all positions, a layer keeps a state of fixed size per sequence. Each row decays the state,
//! then corrects the value that the state has for the row's key:
//!
//! ```text
//! u           = y Wqkv^T;  z, b, a likewise        channels of q, k and v; gates; b and a per value head
//! [q, k, v]   = silu(sum of w[m] u[t - 3 + m])     causal convolution along positions, per channel
//! q, k        = q / |q| / sqrt(key_dim), k / |k|   per key head
//! S           = decay S                            decay = exp(-exp(A_log) softplus(a + dt_bias))
//! delta       = sigmoid(b) (v - S^T k)
//! S           = S + k delta^T                      S [key_dim][value_dim], zero at the start of a sequence
//! o           = S^T q
//! out         = concat(RMSNorm(o) silu(z)) Wout^T
//! ```
//!
//! A state cannot be cropped as keys and values can. So a pass leaves the state as it was before its rows,
//! with a record of each row, and the next pass first repeats the rows that were accepted. Repeating takes
//! the same two rounded operations per element as the recurrence (a product, then a fused multiply-add) on
//! the same values, so the state has the bits of decoding token by token.

use crate::Result;
use crate::checkpoint::config::Stack;
use crate::checkpoint::delta_net::{CONVOLUTION, DeltaNet as Shape};
use crate::checkpoint::safetensors::{Checkpoint, Tensor};
use crate::cpu::kv_cache::zeros;
use crate::cpu::layer::Probe;
use crate::cpu::ops::{self, Matrix, WORK_PER_TASK};
use crate::cpu::simd::{Job, LANES, Simd, run};
use crate::spec::tree::Tree;
use rayon::prelude::*;

/// Added to the sum of squares of a query or a key before the root.
const L2_EPS: f32 = 1e-6;

/// The weights of one layer.
pub(super) struct DeltaNet {
    shape: Shape,
    eps: f32,
    qkv: Matrix,           // [channels][hidden]
    z: Matrix,             // [values][hidden]
    b: Matrix,             // [value_heads][hidden]
    a: Matrix,             // [value_heads][hidden]
    convolution: Vec<f32>, // [channels][4], the last tap for the row itself
    a_log: Vec<f32>,       // [value_heads]
    dt_bias: Vec<f32>,     // [value_heads]
    norm: Vec<f32>,        // [value_dim], the same for all heads
    out: Matrix,           // [hidden][values]
}

/// What a layer keeps of one sequence: the state before the rows of the last pass, and records of these rows.
#[derive(Clone)]
pub(super) struct State {
    shape: Shape,
    /// `[value_heads][key_dim][value_dim]`
    state: Vec<f32>,
    /// The last inputs of the convolution before these rows, oldest first, `[3][channels]`; zeros before the
    /// sequence.
    window: Vec<f32>,
    inputs: Vec<f32>, // [rows][channels]: inputs of the convolution
    keys: Vec<f32>,   // [rows][key_heads][key_dim]: normalised
    deltas: Vec<f32>, // [value_heads][rows][value_dim]
    decays: Vec<f32>, // [rows][value_heads]
}

impl State {
    /// The state of an empty sequence.
    ///
    /// # Errors
    /// [`crate::Error::Memory`] with the number of bytes needed.
    pub(super) fn new(shape: &Shape) -> Result<State> {
        let bytes = shape.state() * size_of::<f32>();
        let what = || format!("the state of each Gated DeltaNet layer needs {bytes} bytes");
        let state = zeros(shape.state(), what)?;
        let window = vec![0.0; (CONVOLUTION - 1) * shape.channels()];
        let (inputs, keys, deltas, decays) = (vec![], vec![], vec![], vec![]);
        Ok(State { shape: shape.clone(), state, window, inputs, keys, deltas, decays })
    }

    /// Makes it the state of an empty sequence.
    pub(super) fn reset(&mut self) {
        self.state.fill(0.0);
        self.window.fill(0.0);
    }

    /// The state and the window, for tests.
    pub(super) fn parts(&self) -> [&[f32]; 2] {
        [&self.state, &self.window]
    }

    /// Fills state and window with `noise(i)`, for measurements.
    pub(super) fn fill(&mut self, noise: impl Fn(usize) -> f32) {
        for part in [&mut self.state, &mut self.window] {
            part.iter_mut().enumerate().for_each(|(i, x)| *x = noise(i));
        }
    }

    /// Moves the state past the rows in `path` of the last pass, in this order.
    pub(super) fn commit(&mut self, path: &[usize]) {
        let State { shape, state, window, inputs, keys, deltas, decays } = self;
        let (rows, each) = (decays.len() / shape.value_heads, shape.value_heads / shape.key_heads);
        let heads =
            state.par_chunks_mut(shape.key_dim * shape.value_dim).with_min_len(heads_per_task(shape, rows));
        heads.enumerate().for_each(|(head, state)| {
            for &row in path {
                let key = &keys[(row * shape.key_heads + head / each) * shape.key_dim..][..shape.key_dim];
                let delta = &deltas[(head * rows + row) * shape.value_dim..][..shape.value_dim];
                run(Replay { state, key, delta, decay: decays[row * shape.value_heads + head] });
            }
        });
        let channels = shape.channels();
        for &row in path {
            window.copy_within(channels.., 0);
            let last = window.len() - channels;
            window[last..].copy_from_slice(&inputs[row * channels..][..channels]);
        }
    }
}

/// Heads that one task takes, so that it has enough work.
fn heads_per_task(shape: &Shape, rows: usize) -> usize {
    (WORK_PER_TASK / (4 * shape.key_dim * shape.value_dim * rows.max(1))).max(1)
}

impl DeltaNet {
    /// Reads the tensors whose names begin with `prefix`.
    ///
    /// # Errors
    /// As [`Checkpoint::tensor`]; [`crate::Error::Memory`] if there is no memory for reordered rows.
    pub(super) fn load(file: &Checkpoint, prefix: &str, shape: &Shape, stack: &Stack) -> Result<DeltaNet> {
        let tensors = shape.tensors(stack.hidden);
        let tensor = |name: &str| {
            let found = tensors.iter().find(|(known, _)| *known == name);
            file.tensor(&format!("{prefix}.{name}"), found.map_or(&[], |(_, shape)| shape))
        };
        let matrix = |name: &str| tensor(name).map(Matrix::new);
        let vector = |name: &str| tensor(name).map(|tensor| ops::to_f32(&tensor));
        let [qkv, z, b, a] = match shape.grouped {
            false => {
                let matrix = |part: &str| matrix(&format!("in_proj_{part}.weight"));
                [matrix("qkv")?, matrix("z")?, matrix("b")?, matrix("a")?]
            }
            true => {
                let (qkvz, ba) = (tensor("in_proj_qkvz.weight")?, tensor("in_proj_ba.weight")?);
                let [qkv, z, b, a] = shape.grouped_rows();
                let rows = |tensor: &Tensor, rows: &[usize]| tensor.rows(rows).map(Matrix::new);
                [rows(&qkvz, &qkv)?, rows(&qkvz, &z)?, rows(&ba, &b)?, rows(&ba, &a)?]
            }
        };
        Ok(DeltaNet {
            shape: shape.clone(),
            eps: stack.eps,
            qkv,
            z,
            b,
            a,
            convolution: vector("conv1d.weight")?,
            a_log: vector("A_log")?,
            dt_bias: vector("dt_bias")?,
            norm: vector("norm.weight")?,
            out: matrix("out_proj.weight")?,
        })
    }

    /// Writes the layer's output `[rows][hidden]` to `z`, from the normed rows `y` `[rows][hidden]`, which
    /// follow the sequence of `state`. The state stays; the records become those of these rows. Each row of a
    /// tree follows the rows of its path.
    pub(super) fn forward(
        &self,
        y: &[f32],
        rows: usize,
        tree: Option<&Tree>,
        state: &mut State,
        z: &mut Vec<f32>,
        probe: Probe,
    ) {
        let shape = &self.shape;
        let keys = shape.keys();
        let (mut gates, mut b, mut a) = (Vec::new(), Vec::new(), Vec::new());
        let jobs =
            [(&self.qkv, &mut state.inputs), (&self.z, &mut gates), (&self.b, &mut b), (&self.a, &mut a)];
        ops::linear(y, rows, jobs);

        let convolved = self.convolve(state, rows, tree);
        let part = |start: usize, len: usize| -> Vec<f32> {
            convolved.chunks(shape.channels()).flat_map(|row| &row[start..start + len]).copied().collect()
        };
        let (mut q, v) = (part(0, keys), part(2 * keys, shape.values()));
        state.keys = part(keys, keys);
        probe("q", &q);
        probe("k", &state.keys);
        probe("v", &v);
        // x / sqrt(sum + eps) as an RMSNorm: mean = sum / key_dim, so its gain is 1 / sqrt(key_dim). That of q
        // includes the scale 1 / sqrt(key_dim).
        let dim = shape.key_dim as f32;
        ops::rms_norm_in_place(&mut q, &vec![1.0 / dim; shape.key_dim], L2_EPS / dim);
        ops::rms_norm_in_place(&mut state.keys, &vec![1.0 / dim.sqrt(); shape.key_dim], L2_EPS / dim);

        b.iter_mut().for_each(|b| *b = sigmoid(*b));
        a.iter_mut().enumerate().for_each(|(i, a)| *a = self.log_decay(*a, i % shape.value_heads));
        probe("beta", &b);
        probe("log decay", &a);
        state.decays = a.iter().map(|log| f64::from(*log).exp() as f32).collect();

        let mut o = recurrence(state, rows, tree, &q, &v, &b);
        probe("core", &o);
        ops::rms_norm_in_place(&mut o, &self.norm, self.eps);
        ops::swiglu(&mut gates, &o);
        ops::linear(&gates, rows, [(&self.out, z)]);
    }

    /// The convolution of `state.inputs`, and silu: `[rows][channels]`.
    fn convolve(&self, state: &State, rows: usize, tree: Option<&Tree>) -> Vec<f32> {
        let channels = self.shape.channels();
        let mut out = Vec::with_capacity(rows * channels);
        for row in 0..rows {
            // The row's input last; before it those of its predecessors, then those of the window.
            let (mut next, mut window) = (Some(row), state.window.chunks(channels).rev());
            let mut taps: [&[f32]; CONVOLUTION] = [&[]; CONVOLUTION];
            for tap in taps.iter_mut().rev() {
                *tap = match next {
                    Some(row) => &state.inputs[row * channels..][..channels],
                    None => window.next().unwrap_or(&[]),
                };
                next = next.and_then(|row| parent(tree, row));
            }
            out.extend((0..channels).map(|channel| {
                let weights = &self.convolution[channel * CONVOLUTION..][..CONVOLUTION];
                weights.iter().zip(taps).map(|(weight, tap)| weight * tap[channel]).sum::<f32>()
            }));
        }
        ops::silu(&mut out);
        out
    }

    /// The logarithm of the decay of value head `head`.
    fn log_decay(&self, a: f32, head: usize) -> f32 {
        let x = f64::from(a + self.dt_bias[head]);
        let softplus = if x > 20.0 { x } else { x.exp().ln_1p() };
        (-f64::from(self.a_log[head]).exp() * softplus) as f32
    }
}

/// `1 / (1 + e^-x)`
pub(super) fn sigmoid(x: f32) -> f32 {
    (1.0 / (1.0 + f64::from(-x).exp())) as f32
}

/// The row that `row` of a pass follows; `None` for the first.
fn parent(tree: Option<&Tree>, row: usize) -> Option<usize> {
    row.checked_sub(1).map(|before| tree.map_or(before, |tree| tree.parents[row] as usize))
}

/// Runs the recurrence over rows of `q` `[rows][key_heads][key_dim]` and `v`
/// `[rows][value_heads][value_dim]`, with `betas` `[rows][value_heads]` and the keys and decays in `state`.
/// Writes `state.deltas` and returns the outputs `[rows][value_heads][value_dim]`.
fn recurrence(
    state: &mut State,
    rows: usize,
    tree: Option<&Tree>,
    q: &[f32],
    v: &[f32],
    betas: &[f32],
) -> Vec<f32> {
    let State { shape, state, keys, deltas, decays, .. } = state;
    let (dim, width, heads) = (shape.key_dim, shape.value_dim, shape.value_heads);
    let each = heads / shape.key_heads;
    deltas.resize(heads * rows * width, 0.0);
    let mut outputs = vec![0.0; heads * rows * width]; // [value_heads][rows][value_dim]
    let all = state.par_chunks(dim * width).zip(deltas.par_chunks_mut(rows * width));
    let all = all.zip(outputs.par_chunks_mut(rows * width)).with_min_len(heads_per_task(shape, rows));
    all.enumerate().for_each(|(head, ((committed, deltas), outputs))| {
        let key_at = |x, row: usize| -> &[f32] {
            let x: &[f32] = x;
            &x[(row * shape.key_heads + head / each) * dim..][..dim]
        };
        let mut state = committed.to_vec();
        for row in 0..rows {
            // The state of the row before is there. For another parent, its path is repeated.
            let parent = parent(tree, row);
            if parent.is_some_and(|parent| parent + 1 != row) {
                state.copy_from_slice(committed);
                for ancestor in tree.iter().zip(parent).flat_map(|(tree, parent)| tree.path(parent)) {
                    let delta = &deltas[ancestor * width..][..width];
                    let decay = decays[ancestor * heads + head];
                    run(Replay { state: &mut state, key: key_at(keys, ancestor), delta, decay });
                }
            }
            run(Step {
                state: &mut state,
                key: key_at(keys, row),
                query: key_at(q, row),
                value: &v[(row * heads + head) * width..][..width],
                beta: betas[row * heads + head],
                decay: decays[row * heads + head],
                delta: &mut deltas[row * width..][..width],
                output: &mut outputs[row * width..][..width],
            });
        }
    });
    let of_row =
        |row| (0..heads).flat_map(move |head| (head * rows + row) * width..(head * rows + row + 1) * width);
    (0..rows).flat_map(of_row).map(|i| outputs[i]).collect()
}

/// Repeats one recorded row on the state of one value head: `S = k delta^T + decay S`.
struct Replay<'a> {
    state: &'a mut [f32], // [key_dim][value_dim]
    key: &'a [f32],       // [key_dim]
    delta: &'a [f32],     // [value_dim], a multiple of 16
    decay: f32,
}

impl Job for Replay<'_> {
    #[inline(always)]
    unsafe fn go<S: Simd>(self) {
        let width = self.delta.len();
        assert!(width.is_multiple_of(LANES) && self.state.len() == self.key.len() * width);
        for (row, key) in self.state.chunks_exact_mut(width).zip(self.key) {
            for (state, delta) in row.chunks_exact_mut(LANES).zip(self.delta.chunks_exact(LANES)) {
                // SAFETY: both have 16 elements, and the caller guarantees the instructions.
                unsafe {
                    let decayed = S::mul(S::splat(self.decay), S::load(state.as_ptr()));
                    let updated = S::fma(S::splat(*key), S::load(delta.as_ptr()), decayed);
                    S::store(state.as_mut_ptr(), updated);
                }
            }
        }
    }
}

/// One row of the recurrence on one value head. Sums over the key's dimensions are in ascending order.
struct Step<'a> {
    state: &'a mut [f32],  // [key_dim][value_dim]
    key: &'a [f32],        // [key_dim]
    query: &'a [f32],      // [key_dim]
    value: &'a [f32],      // [value_dim], a multiple of 16
    delta: &'a mut [f32],  // [value_dim], written
    output: &'a mut [f32], // [value_dim], written
    beta: f32,
    decay: f32,
}

impl Job for Step<'_> {
    #[inline(always)]
    unsafe fn go<S: Simd>(self) {
        let Step { state, key, query, value, delta, output, beta, decay } = self;
        let width = value.len();
        assert!(width.is_multiple_of(LANES) && delta.len() == width && output.len() == width);
        assert!(state.len() == key.len() * width && query.len() == key.len());
        delta.fill(0.0);
        output.fill(0.0);
        // SAFETY: chunks have 16 elements, and the caller guarantees the instructions.
        unsafe {
            for (row, key) in state.chunks_exact_mut(width).zip(key) {
                for (state, sum) in row.chunks_exact_mut(LANES).zip(delta.chunks_exact_mut(LANES)) {
                    let decayed = S::mul(S::splat(decay), S::load(state.as_ptr()));
                    S::store(state.as_mut_ptr(), decayed);
                    let p = S::fma(decayed, S::splat(*key), S::load(sum.as_ptr()));
                    S::store(sum.as_mut_ptr(), p);
                }
            }
            for (delta, value) in delta.chunks_exact_mut(LANES).zip(value.chunks_exact(LANES)) {
                let error = S::sub(S::load(value.as_ptr()), S::load(delta.as_ptr()));
                S::store(delta.as_mut_ptr(), S::mul(S::splat(beta), error));
            }
            for ((row, key), query) in state.chunks_exact_mut(width).zip(key).zip(query) {
                let parts = row.chunks_exact_mut(LANES).zip(delta.chunks_exact(LANES));
                for ((state, delta), sum) in parts.zip(output.chunks_exact_mut(LANES)) {
                    let updated = S::fma(S::splat(*key), S::load(delta.as_ptr()), S::load(state.as_ptr()));
                    S::store(state.as_mut_ptr(), updated);
                    let o = S::fma(updated, S::splat(*query), S::load(sum.as_ptr()));
                    S::store(sum.as_mut_ptr(), o);
                }
            }
        }
    }
}
