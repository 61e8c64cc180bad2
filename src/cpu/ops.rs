//! The reference model's arithmetic on the CPU: matrix products with weights in their stored type (bf16, f16
//! or f32), attention over a KV cache, norms, RoPE, SwiGLU. It shares no code with `cuda/`.
//!
//! Every sum has a fixed order that depends only on shapes and absolute positions. Linear layers, norms and
//! softmax sums add element i in lane i modulo 16, then add lanes 8, 4, 2 and 1 apart. Attention scores use
//! four accumulators, and weighted values are added in order of position. A row's bits therefore depend
//! neither on the rows computed with it nor on the number of threads. They are the same with AVX-512, AVX2
//! and NEON (x86 without FMA rounds twice and differs in the last bits). This is why speculative decoding
//! equals autoregressive decoding bit for bit.

// Tile sizes are small constants. The compiler unrolls loops that index several arrays with one counter into
// registers.
#![allow(clippy::needless_range_loop)]

use crate::checkpoint::safetensors::{Dtype, Tensor};
pub use crate::cpu::kv_cache::Kv;
use crate::cpu::simd::{Bf16, Element, F16, F32, Job, LANES, Simd, run, widen, widen_as};

/// A weight matrix `[rows][cols]` in the bytes of its checkpoint. `y = x W^T` reads row `n` for output `n`.
pub struct Matrix {
    tensor: Tensor,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
}

impl Matrix {
    /// Takes a two-dimensional tensor.
    pub fn new(tensor: Tensor) -> Matrix {
        let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
        assert_eq!(tensor.bytes().len(), rows * cols * tensor.dtype.size());
        Matrix { tensor, rows, cols }
    }

    /// Writes row `row` times `scale` to `out` `[cols]`.
    pub fn row(&self, row: usize, scale: f32, out: &mut [f32]) {
        let size = self.cols * self.tensor.dtype.size();
        widen(&self.tensor.bytes()[row * size..][..size], self.tensor.dtype, out);
        out.iter_mut().for_each(|v| *v *= scale);
    }
}

/// Converts a whole tensor to f32; for small ones (norm weights).
pub fn to_f32(tensor: &Tensor) -> Vec<f32> {
    let mut out = vec![0.0; tensor.shape.iter().product()];
    widen(tensor.bytes(), tensor.dtype, &mut out);
    out
}

// ---- threads ----

/// Runs `f` on the thread pool that the other functions here split their work over: this number of threads,
/// or `RAYON_NUM_THREADS`, or one per core that this process may use (`taskset` limits them). Wrap whole
/// programs, not operations: entering the pool costs some microseconds.
pub fn on_threads<R: Send>(threads: Option<usize>, f: impl FnOnce() -> R + Send) -> R {
    // 0 is rayon's default.
    match rayon::ThreadPoolBuilder::new().num_threads(threads.unwrap_or(0)).build() {
        Ok(pool) => pool.install(f),
        Err(_) => {
            // No threads are available, so this one does all the work. It must belong to a pool, or rayon
            // would try to start its global pool.
            let _alone = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build();
            f()
        }
    }
}

/// Minimum multiply-adds per task. For fewer, handing a task to another thread (about 1 us) costs more than
/// it saves.
pub(crate) const WORK_PER_TASK: usize = 1 << 14;

/// Runs `f` over `0..units`, divided among the pool's threads into ranges that begin at multiples of `grain`.
/// `work`: multiply-adds in total.
fn split(units: usize, grain: usize, work: usize, f: &(impl Fn(std::ops::Range<usize>) + Sync)) {
    fn fork(lo: usize, hi: usize, tasks: usize, grain: usize, f: &(impl Fn(std::ops::Range<usize>) + Sync)) {
        let mid = lo + (hi - lo).div_ceil(grain) / 2 * grain;
        if tasks < 2 || mid == lo {
            return f(lo..hi);
        }
        rayon::join(|| fork(lo, mid, tasks / 2, grain, f), || fork(mid, hi, tasks - tasks / 2, grain, f));
    }
    let threads = if work < 2 * WORK_PER_TASK { 1 } else { rayon::current_num_threads() };
    fork(0, units, threads.min(work / WORK_PER_TASK), grain, f);
}

/// A buffer that several tasks write, each in its own places.
#[derive(Clone, Copy)]
struct Shared(*mut f32, usize);

// SAFETY: only `block` uses the pointer, and no two tasks write the same element: each output feature of
// `linear` and each query of `attention` belongs to one task.
unsafe impl Sync for Shared {}
unsafe impl Send for Shared {}

impl Shared {
    fn new(buffer: &mut [f32]) -> Shared {
        Shared(buffer.as_mut_ptr(), buffer.len())
    }

    /// Pointer to `len` elements from `at` on.
    fn block(&self, at: usize, len: usize) -> *mut f32 {
        assert!(at + len <= self.1);
        // SAFETY: in bounds.
        unsafe { self.0.add(at) }
    }
}

// ---- operations ----

/// `y = x W^T` for several matrices at once: `x [rows][cols]`, each `y [rows][W.rows]`.
pub fn linear<const N: usize>(x: &[f32], rows: usize, jobs: [(&Matrix, &mut Vec<f32>); N]) {
    let cols = jobs[0].0.cols;
    assert!(rows > 0 && x.len() == rows * cols && jobs.iter().all(|(w, _)| w.cols == cols));
    let mut ends = [0; N];
    let mut total = 0;
    let jobs = jobs.map(|(w, y)| {
        y.resize(rows * w.rows, 0.0);
        (w, Shared::new(y))
    });
    for (end, (w, _)) in ends.iter_mut().zip(&jobs) {
        total += w.rows;
        *end = total;
    }
    // Units are the output features of all matrices, numbered consecutively. A task computes a range of them
    // for every row of x.
    split(total, LANES, total * cols * rows, &|units| {
        for ((w, y), end) in jobs.iter().zip(ends) {
            let first = end - w.rows;
            let (lo, hi) = (units.start.max(first), units.end.min(end));
            if lo < hi {
                run(Linear { x, rows, w, y: *y, features: lo - first..hi - first });
            }
        }
    });
}

/// `out = softmax(q K^T / sqrt(head_dim)) V` for `q [rows][heads * head_dim]`. Row `r` attends to positions
/// `visible(r)` (not empty). Query head `j` reads KV head `j / (heads / kv_heads)`.
pub fn attention(
    q: &[f32],
    heads: usize,
    kv: &Kv,
    visible: &(impl Fn(usize) -> std::ops::Range<usize> + Sync),
    out: &mut Vec<f32>,
) {
    let rows = q.len() / (heads * kv.head_dim);
    let group = heads / kv.kv_heads;
    out.resize(q.len(), 0.0);
    let out = Shared::new(out);
    let work = heads * 2 * kv.head_dim * (0..rows).map(|r| visible(r).len()).sum::<usize>();
    // A unit is four queries that share a KV head. The queries of a KV head are numbered row by row.
    let queries = rows * group;
    let units = queries.div_ceil(4);
    split(kv.kv_heads * units, 1, work, &|range| {
        let mut scores = Vec::new();
        for unit in range {
            let (kv_head, first) = (unit / units, unit % units * 4);
            let query = |i: usize| {
                let (row, head) = ((first + i) / group, kv_head * group + (first + i) % group);
                Query { at: (row * heads + head) * kv.head_dim, visible: visible(row) }
            };
            match queries - first {
                1 => run(Attend { q, kv, kv_head, queries: [query(0)], scores: &mut scores, out }),
                2 => run(Attend { q, kv, kv_head, queries: [0, 1].map(query), scores: &mut scores, out }),
                3 => run(Attend { q, kv, kv_head, queries: [0, 1, 2].map(query), scores: &mut scores, out }),
                _ => {
                    run(Attend { q, kv, kv_head, queries: [0, 1, 2, 3].map(query), scores: &mut scores, out })
                }
            }
        }
    });
}

/// `out = x / sqrt(mean(x^2) + eps) * weight` for each row of `x`; a row is as long as `weight`.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut Vec<f32>) {
    out.clear();
    out.extend_from_slice(x);
    rms_norm_in_place(out, weight, eps);
}

/// [`rms_norm`] in place.
pub fn rms_norm_in_place(x: &mut [f32], weight: &[f32], eps: f32) {
    for row in x.chunks_mut(weight.len()) {
        run(Norm { row, weight, eps });
    }
}

/// Half-split RoPE in place: `x [rows][heads * head_dim]`, `table [rows][rotary_dims]`, the cosines of a row
/// before its sines.
pub fn rope(x: &mut [f32], heads: usize, head_dim: usize, table: &[f32], rotary_dims: usize) {
    let half = rotary_dims / 2;
    for (x, table) in x.chunks_mut(heads * head_dim).zip(table.chunks(rotary_dims)) {
        let (cos, sin) = table.split_at(half);
        for head in x.chunks_mut(head_dim) {
            let (a, b) = head[..rotary_dims].split_at_mut(half);
            for i in 0..half {
                (a[i], b[i]) = (a[i] * cos[i] - b[i] * sin[i], b[i] * cos[i] + a[i] * sin[i]);
            }
        }
    }
}

/// `gate = silu(gate) * up`, in place.
pub fn swiglu(gate: &mut [f32], up: &[f32]) {
    run(Swiglu { gate, up });
}

/// `x = silu(x)`, in place.
pub fn silu(x: &mut [f32]) {
    run(Gate { x, gate: None });
}

/// `x = x sigmoid(gate)`, in place.
pub fn sigmoid_gate(x: &mut [f32], gate: &[f32]) {
    run(Gate { x, gate: Some(gate) });
}

/// `x += y`
pub fn add(x: &mut [f32], y: &[f32]) {
    x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
}

// ---- the same operations, generic over the instruction set ----

struct Linear<'a> {
    x: &'a [f32],
    rows: usize,
    w: &'a Matrix,
    y: Shared,
    features: std::ops::Range<usize>,
}

impl Job for Linear<'_> {
    #[inline(always)]
    unsafe fn go<S: Simd>(self) {
        unsafe {
            match self.w.tensor.dtype {
                Dtype::Bf16 => self.typed::<S, Bf16>(),
                Dtype::F16 => self.typed::<S, F16>(),
                Dtype::F32 => self.typed::<S, F32>(),
            }
        }
    }
}

impl Linear<'_> {
    /// Divides the product into strips of equal tiles. With one row a tile has many features, with more rows
    /// it has two. The sums are the same.
    #[inline(always)]
    unsafe fn typed<S: Simd, E: Element>(&self) {
        unsafe {
            let (rows, mut features) = (self.rows, self.features.clone());
            if rows == 1 {
                let whole = features.start + features.len() / S::TILE * S::TILE;
                match S::TILE {
                    16 => S::call(Strip::<E, 1, 16>::new(self, 0..1, features.start..whole)),
                    _ => S::call(Strip::<E, 1, 4>::new(self, 0..1, features.start..whole)),
                }
                features.start = whole;
            }
            let pairs = features.start + features.len() / 2 * 2;
            let (eights, twos) = (if S::TILE == 16 { rows / 8 * 8 } else { 0 }, rows / 2 * 2);
            S::call(Strip::<E, 8, 2>::new(self, 0..eights, features.start..pairs));
            S::call(Strip::<E, 2, 2>::new(self, eights..twos, features.start..pairs));
            S::call(Strip::<E, 1, 2>::new(self, twos..rows, features.start..pairs));
            S::call(Strip::<E, 1, 1>::new(self, 0..rows, pairs..features.end));
        }
    }
}

/// Tiles of `MB` rows of x by `NB` features; both ranges are whole numbers of tiles.
struct Strip<'a, E, const MB: usize, const NB: usize> {
    linear: &'a Linear<'a>,
    rows: std::ops::Range<usize>,
    features: std::ops::Range<usize>,
    element: std::marker::PhantomData<E>,
}

impl<'a, E, const MB: usize, const NB: usize> Strip<'a, E, MB, NB> {
    fn new(linear: &'a Linear<'a>, rows: std::ops::Range<usize>, features: std::ops::Range<usize>) -> Self {
        assert!(rows.end <= linear.rows && rows.len().is_multiple_of(MB));
        assert!(features.end <= linear.w.rows && features.len().is_multiple_of(NB));
        Strip { linear, rows, features, element: std::marker::PhantomData }
    }
}

impl<E: Element, const MB: usize, const NB: usize> Job for Strip<'_, E, MB, NB> {
    #[inline(always)]
    unsafe fn go<S: Simd>(self) {
        unsafe {
            if self.rows.is_empty() || self.features.is_empty() {
                return;
            }
            // `new` has checked the ranges and `block` checks the output's. From here on only pointers
            // advance.
            let Linear { x, w, y, .. } = self.linear;
            let (cols, stride) = (w.cols, w.rows);
            let last = (self.rows.end - 1) * stride + self.features.end;
            let first = self.rows.start * stride + self.features.start;
            let y = y.block(first, last - first);
            let x = x.as_ptr().add(self.rows.start * cols);
            let mut w = w.tensor.bytes().as_ptr().add(self.features.start * cols * E::SIZE);
            for n in (0..self.features.len()).step_by(NB) {
                let (mut x, mut y) = (x, y.add(n));
                for _ in (0..self.rows.len()).step_by(MB) {
                    tile::<S, E, MB, NB>(x, w, y, cols, stride);
                    x = x.add(MB.wrapping_mul(cols));
                    y = y.add(MB.wrapping_mul(stride));
                }
                w = w.add((NB * E::SIZE).wrapping_mul(cols));
            }
        }
    }
}

/// `MB` rows of x times `NB` features: `x [MB][cols]`, `w [NB][cols]`, `y [MB][stride]`, where the first `NB`
/// columns of `y` are written.
///
/// # Safety
/// As [`Simd`], for all of these.
#[inline(always)]
unsafe fn tile<S: Simd, E: Element, const MB: usize, const NB: usize>(
    x: *const f32,
    w: *const u8,
    y: *mut f32,
    cols: usize,
    stride: usize,
) {
    unsafe {
        let (whole, rest) = (cols / LANES, cols % LANES);
        let row_bytes = cols.wrapping_mul(E::SIZE);
        let mut acc = [[S::splat(0.0); NB]; MB];
        let (mut px, mut pw) = (x, w);
        // Plain loops, because a closure that is not inlined is compiled without the instruction set.
        for _ in 0..whole {
            let mut wide = [S::splat(0.0); NB];
            for j in 0..NB {
                wide[j] = E::load::<S>(pw.add(j.wrapping_mul(row_bytes)));
            }
            for i in 0..MB {
                let x = S::load(px.add(i.wrapping_mul(cols)));
                for j in 0..NB {
                    acc[i][j] = S::fma(x, wide[j], acc[i][j]);
                }
            }
            px = px.add(LANES);
            pw = pw.add(LANES * E::SIZE);
        }
        if rest > 0 {
            // The last, partial step is padded with zeros, which add nothing.
            for j in 0..NB {
                let wide = S::load(padded::<E>(pw.add(j.wrapping_mul(row_bytes)), rest).as_ptr());
                for i in 0..MB {
                    let x = S::load(padded::<F32>(px.add(i.wrapping_mul(cols)).cast(), rest).as_ptr());
                    acc[i][j] = S::fma(x, wide, acc[i][j]);
                }
            }
        }
        if MB * NB == LANES {
            let sums = S::sum16(std::mem::transmute_copy(&acc));
            for i in 0..MB {
                y.add(i.wrapping_mul(stride)).copy_from_nonoverlapping(sums.as_ptr().add(i * NB), NB);
            }
        } else {
            for i in 0..MB {
                for j in 0..NB {
                    *y.add(i.wrapping_mul(stride) + j) = S::sum(acc[i][j]);
                }
            }
        }
    }
}

/// The `count < 16` elements at `p` as f32, followed by zeros.
///
/// # Safety
/// `count` elements are readable at `p`.
#[inline(never)]
unsafe fn padded<E: Element>(p: *const u8, count: usize) -> [f32; LANES] {
    let mut wide = [0.0; LANES];
    widen_as::<E>(unsafe { std::slice::from_raw_parts(p, count * E::SIZE) }, &mut wide);
    wide
}

struct Query {
    /// Offset of the query in `q` and of its result in `out`.
    at: usize,
    visible: std::ops::Range<usize>,
}

/// `N` queries of one KV head together, so that each key and value is loaded once for all of them.
struct Attend<'a, const N: usize> {
    q: &'a [f32],
    kv: &'a Kv,
    kv_head: usize,
    queries: [Query; N],
    scores: &'a mut Vec<f32>,
    out: Shared,
}

impl<const N: usize> Job for Attend<'_, N> {
    #[inline(always)]
    unsafe fn go<S: Simd>(self) {
        unsafe {
            let (dims, padded_dims) = (self.kv.head_dim, self.kv.head_dim.next_multiple_of(LANES));
            let lo = self.queries.iter().map(|q| q.visible.start).min().unwrap_or(0);
            let hi = self.queries.iter().map(|q| q.visible.end).max().unwrap_or(0);
            assert!(
                hi <= self.kv.tiles * LANES && self.queries.iter().all(|q| q.visible.start < q.visible.end)
            );
            // Tiles are aligned to absolute positions, so a key always has the same lane and the same place
            // in every sum.
            let (first, tiles) = (lo / LANES, hi.div_ceil(LANES) - lo / LANES);
            let width = tiles * LANES;
            self.scores.resize(N * width, 0.0);
            let scores: [*mut f32; N] = std::array::from_fn(|i| self.scores.as_mut_ptr().add(i * width));
            let q: [*const f32; N] = std::array::from_fn(|i| self.q[self.queries[i].at..][..dims].as_ptr());

            let scale = S::splat(1.0 / (dims as f32).sqrt());
            let keys = self.kv.keys[(self.kv_head * self.kv.tiles + first) * dims * LANES..][..width * dims]
                .as_ptr();
            for t in 0..tiles {
                let keys = keys.add(t * dims * LANES);
                let mut acc = [[S::splat(0.0); 4]; N];
                let mut d = 0;
                while d + 4 <= dims {
                    for j in 0..4 {
                        let key = S::load(keys.add((d + j) * LANES));
                        for i in 0..N {
                            acc[i][j] = S::fma(S::splat(*q[i].add(d + j)), key, acc[i][j]);
                        }
                    }
                    d += 4;
                }
                while d < dims {
                    let key = S::load(keys.add(d * LANES));
                    for i in 0..N {
                        acc[i][0] = S::fma(S::splat(*q[i].add(d)), key, acc[i][0]);
                    }
                    d += 1;
                }
                for i in 0..N {
                    let sum = S::add(S::add(acc[i][0], acc[i][1]), S::add(acc[i][2], acc[i][3]));
                    S::store(scores[i].add(t * LANES), S::mul(sum, scale));
                }
            }

            let mut inverse = [0.0; N];
            for i in 0..N {
                let visible = &self.queries[i].visible;
                let hide = |value: f32| {
                    let scores = std::slice::from_raw_parts_mut(scores[i], width);
                    scores[..visible.start - first * LANES].fill(value);
                    scores[visible.end - first * LANES..].fill(value);
                };
                hide(f32::NEG_INFINITY);
                let mut max = S::splat(f32::NEG_INFINITY);
                for t in 0..tiles {
                    max = S::max(max, S::load(scores[i].add(t * LANES)));
                }
                let max = S::splat(S::lanes(max).into_iter().fold(f32::NEG_INFINITY, f32::max));
                for t in 0..tiles {
                    let at = scores[i].add(t * LANES);
                    S::store(at, exp::<S>(S::sub(S::load(at), max)));
                }
                hide(0.0);
                let mut total = S::splat(0.0);
                for t in 0..tiles {
                    total = S::add(total, S::load(scores[i].add(t * LANES)));
                }
                inverse[i] = 1.0 / S::sum(total);
            }

            let relative = |q: &Query| q.visible.start - first * LANES..q.visible.end - first * LANES;
            let visible = self.queries.each_ref().map(relative);
            let values = self.kv.values[(self.kv_head * self.kv.tiles + first) * LANES * padded_dims..]
                [..width * padded_dims]
                .as_ptr();
            let mut d = 0;
            while d < padded_dims {
                let vectors = if padded_dims - d >= 4 * LANES { 4 } else { 1 };
                let sums = match vectors {
                    4 => weighted_sums::<S, N, 4>(scores, values.add(d), &visible, padded_dims),
                    _ => weighted_sums::<S, N, 1>(scores, values.add(d), &visible, padded_dims),
                };
                for i in 0..N {
                    for (v, sum) in sums[i][..vectors].iter().enumerate() {
                        let at = d + v * LANES;
                        let len = LANES.min(dims - at);
                        let lanes = S::lanes(S::mul(*sum, S::splat(inverse[i])));
                        let out = self.out.block(self.queries[i].at + at, len);
                        out.copy_from_nonoverlapping(lanes.as_ptr(), len);
                    }
                }
                d += vectors * LANES;
            }
        }
    }
}

/// `16 * D` dimensions of the attention output of `N` queries, before division by the softmax sum: for each
/// query the sum of weight times value over its `visible` keys, in ascending order. Masked values are skipped
/// instead of weighted with zero, because a nonfinite value times zero is NaN.
///
/// # Safety
/// As [`Simd`]. `weights` and `values` (rows `stride` apart) cover all visible keys.
#[inline(always)]
unsafe fn weighted_sums<S: Simd, const N: usize, const D: usize>(
    weights: [*mut f32; N],
    values: *const f32,
    visible: &[std::ops::Range<usize>; N],
    stride: usize,
) -> [[S::V; 4]; N] {
    unsafe {
        let starts = visible.iter().map(|keys| keys.start);
        let ends = visible.iter().map(|keys| keys.end);
        let (lo, hi) = (starts.clone().min().unwrap_or(0), ends.clone().max().unwrap_or(0));
        // Every query attends to all keys in from..to.
        let from = starts.max().unwrap_or(lo).min(hi);
        let to = ends.min().unwrap_or(hi).max(from);
        let mut acc = [[S::splat(0.0); 4]; N];
        for (keys, all) in [(lo..from, false), (from..to, true), (to..hi, false)] {
            for key in keys {
                let mut value = [S::splat(0.0); D];
                for v in 0..D {
                    value[v] = S::load(values.add(key * stride + v * LANES));
                }
                for i in 0..N {
                    if all || visible[i].contains(&key) {
                        let weight = S::splat(*weights[i].add(key));
                        for v in 0..D {
                            acc[i][v] = S::fma(weight, value[v], acc[i][v]);
                        }
                    }
                }
            }
        }
        acc
    }
}

struct Norm<'a> {
    row: &'a mut [f32],
    weight: &'a [f32],
    eps: f32,
}

impl Job for Norm<'_> {
    #[inline(always)]
    unsafe fn go<S: Simd>(self) {
        unsafe {
            let mut acc = S::splat(0.0);
            let mut chunks = self.row.chunks_exact(LANES);
            for chunk in &mut chunks {
                let x = S::load(chunk.as_ptr());
                acc = S::fma(x, x, acc);
            }
            let mut tail = [0.0; LANES];
            tail[..chunks.remainder().len()].copy_from_slice(chunks.remainder());
            let x = S::load(tail.as_ptr());
            let sum = S::sum(S::fma(x, x, acc));
            let scale = 1.0 / (sum / self.row.len() as f32 + self.eps).sqrt();
            for (x, w) in self.row.iter_mut().zip(self.weight) {
                *x = *x * scale * w;
            }
        }
    }
}

/// `x` times the sigmoid of `gate`, or of itself.
struct Gate<'a> {
    x: &'a mut [f32],
    gate: Option<&'a [f32]>,
}

impl Job for Gate<'_> {
    #[inline(always)]
    unsafe fn go<S: Simd>(self) {
        unsafe {
            for (i, x) in self.x.chunks_mut(LANES).enumerate() {
                let (mut value, mut gate) = ([0.0; LANES], [0.0; LANES]);
                value[..x.len()].copy_from_slice(x);
                gate[..x.len()].copy_from_slice(self.gate.map_or(&*x, |gate| &gate[i * LANES..][..x.len()]));
                let minus = S::sub(S::splat(0.0), S::load(gate.as_ptr()));
                let inverse = S::add(S::splat(1.0), exp::<S>(minus));
                let gated = S::div(S::load(value.as_ptr()), inverse);
                x.copy_from_slice(&S::lanes(gated)[..x.len()]);
            }
        }
    }
}

struct Swiglu<'a> {
    gate: &'a mut [f32],
    up: &'a [f32],
}

impl Job for Swiglu<'_> {
    #[inline(always)]
    unsafe fn go<S: Simd>(self) {
        unsafe {
            for (gate, up) in self.gate.chunks_mut(LANES).zip(self.up.chunks(LANES)) {
                let (mut g, mut u) = ([0.0; LANES], [0.0; LANES]);
                g[..gate.len()].copy_from_slice(gate);
                u[..up.len()].copy_from_slice(up);
                let g = S::load(g.as_ptr());
                let one = S::splat(1.0);
                let silu = S::div(g, S::add(one, exp::<S>(S::sub(S::splat(0.0), g))));
                gate.copy_from_slice(&S::lanes(S::mul(silu, S::load(u.as_ptr())))[..gate.len()]);
            }
        }
    }
}

/// `e^x`, within 2 ulp for `-87 < x < 88`. `x` is clamped to -87.3 and 88. NaN stays NaN.
///
/// # Safety
/// As [`Simd`].
#[inline(always)]
unsafe fn exp<S: Simd>(x: S::V) -> S::V {
    unsafe {
        // The operand order keeps NaN: `min` and `max` return the second operand if either is NaN.
        let x = S::min(S::splat(88.0), S::max(S::splat(-87.3), x));
        // n = round(x / ln 2) by adding 1.5 * 2^23, whose low bits then hold n; r = x - n ln 2 in two steps.
        let magic = S::splat(12_582_912.0);
        let shifted = S::fma(x, S::splat(std::f32::consts::LOG2_E), magic);
        let n = S::sub(shifted, magic);
        let r = S::fma(n, S::splat(-0.693_145_75), x);
        let r = S::fma(n, S::splat(-1.428_606_8e-6), r);
        // The Taylor series to r^7. |r| <= 0.347, so the remainder is below 6e-9.
        let mut p = S::splat(1.0 / 5040.0);
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = S::fma(p, r, S::splat(c));
        }
        S::mul(p, S::pow2(shifted))
    }
}

#[cfg(test)]
mod tests;
