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

/// Runs `f` on the thread pool that the other functions here split their work over: this number of threads, or
/// `RAYON_NUM_THREADS`, or one per core that this process may use (`taskset` limits them). Wrap whole programs,
/// not operations: entering the pool costs some microseconds.
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
const WORK_PER_TASK: usize = 1 << 14;

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
mod tests {
    use super::*;
    use crate::checkpoint::folder::Folder;
    use crate::checkpoint::safetensors::Checkpoint;
    use crate::cpu::simd::Plain;
    #[cfg(target_arch = "x86_64")]
    use crate::cpu::simd::x86;

    /// The output of a job with each instruction set of this CPU, the plain one first.
    macro_rules! on_each_set {
        ($len:expr, |$out:ident| $job:expr) => {{
            let mut results: Vec<Vec<f32>> = Vec::new();
            let mut $out = vec![0.0f32; $len];
            // SAFETY: plain Rust.
            unsafe { $job.go::<Plain>() };
            results.push($out);
            #[cfg(target_arch = "x86_64")]
            {
                if x86::has_avx2() {
                    let mut $out = vec![0.0f32; $len];
                    // SAFETY: the CPU has the instructions.
                    unsafe { x86::Avx2::call($job) };
                    results.push($out);
                }
                if x86::has_avx512() {
                    let mut $out = vec![0.0f32; $len];
                    // SAFETY: the CPU has the instructions.
                    unsafe { x86::Avx512::call($job) };
                    results.push($out);
                }
            }
            results
        }};
    }

    /// The instruction sets with fused multiply-add agree bit for bit. The plain one may round twice, and
    /// agrees to 1e-5 of the largest value.
    fn assert_agree(results: &[Vec<f32>], what: &str) {
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        assert!(results[0].iter().all(|v| v.is_finite()));
        let size = results[0].iter().fold(0f32, |m, v| m.max(v.abs()));
        for other in results.iter().skip(1) {
            assert_eq!(bits(other), bits(&results[1]), "{what}");
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= 1e-5 * size;
            assert!(results[0].iter().zip(other).all(close), "{what}");
        }
    }

    /// Values in [-1, 1) that look random.
    fn values(seed: u32, count: usize) -> Vec<f32> {
        let one = |i: usize| {
            let x = (i as u32 ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(0x85eb_ca6b);
            let x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
            (x ^ (x >> 16)) as i32 as f32 / (1u32 << 31) as f32
        };
        (0..count).map(one).collect()
    }

    fn matrix(dtype: Dtype, rows: usize, cols: usize) -> Matrix {
        let values = values(rows as u32, rows * cols);
        let (name, data): (&str, Vec<u8>) = match dtype {
            Dtype::Bf16 => {
                ("BF16", values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect())
            }
            Dtype::F16 => {
                ("F16", values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect())
            }
            Dtype::F32 => ("F32", values.iter().flat_map(|v| v.to_le_bytes()).collect()),
        };
        let header = format!(
            r#"{{"w":{{"dtype":"{name}","shape":[{rows},{cols}],"data_offsets":[0,{}]}}}}"#,
            data.len()
        );
        let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
        let files = Box::leak(Box::new([("model.safetensors", &*file.leak())]));
        let checkpoint = Checkpoint::open(&Folder::Embedded { name: "test", files }).unwrap();
        Matrix::new(checkpoint.tensor("w", &[rows, cols]).unwrap())
    }

    #[test]
    fn instruction_sets_agree_on_linear() {
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            for (features, cols) in [(1, 5), (2, 16), (15, 33), (16, 48), (17, 64), (37, 100), (40, 31)] {
                let w = matrix(dtype, features, cols);
                for rows in [1, 2, 3, 7, 8, 9, 16, 19] {
                    let x = values(7, rows * cols);
                    let results = on_each_set!(rows * features, |y| Linear {
                        x: &x,
                        rows,
                        w: &w,
                        y: Shared::new(&mut y),
                        features: 0..features
                    });
                    assert_agree(
                        &results,
                        &format!("{dtype:?}, {rows} rows, {features} features, {cols} inputs"),
                    );
                }
            }
        }
    }

    fn attend<const N: usize>(dims: usize) {
        let positions = 61;
        let mut kv = Kv::new(2, dims, positions).unwrap();
        kv.write(0, &values(1, positions * 2 * dims), &values(2, positions * 2 * dims));
        let q: Vec<f32> = values(3, N * dims).iter().map(|v| v * 9.0).collect();
        let queries = || std::array::from_fn(|i| Query { at: i * dims, visible: 3 * i..positions - 7 * i });
        let results = on_each_set!(N * dims, |out| Attend::<N> {
            q: &q,
            kv: &kv,
            kv_head: 1,
            queries: queries(),
            scores: &mut Vec::new(),
            out: Shared::new(&mut out)
        });
        assert_agree(&results, &format!("{N} queries of {dims}"));
    }

    #[test]
    fn instruction_sets_agree_on_attention() {
        for dims in [2, 16, 24, 64, 80, 128] {
            attend::<1>(dims);
            attend::<2>(dims);
            attend::<3>(dims);
            attend::<4>(dims);
        }
    }

    #[test]
    fn instruction_sets_agree_on_norm_and_swiglu() {
        for width in [1, 15, 16, 17, 64, 100] {
            let (x, weight) = (values(1, width), values(2, width));
            let results = on_each_set!(width, |row| {
                row.copy_from_slice(&x);
                Norm { row: &mut row, weight: &weight, eps: 1e-6 }
            });
            assert_agree(&results, "norm");
            let results = on_each_set!(width, |gate| {
                gate.copy_from_slice(&x.iter().map(|v| v * 20.0).collect::<Vec<f32>>());
                Swiglu { gate: &mut gate, up: &weight }
            });
            assert_agree(&results, "swiglu");
        }
    }

    struct Exp<'a>(&'a mut [f32]);

    impl Job for Exp<'_> {
        #[inline(always)]
        unsafe fn go<S: Simd>(self) {
            for x in self.0.chunks_exact_mut(LANES) {
                // SAFETY: the chunk has 16 elements, and the caller guarantees the instructions.
                unsafe { S::store(x.as_mut_ptr(), exp::<S>(S::load(x.as_ptr()))) };
            }
        }
    }

    #[test]
    fn exp_is_within_two_ulp() {
        // Every 997th float from 0 to 88 and from 0 to -87.
        let up_to = |end: f32| (0..end.to_bits()).step_by(997).map(f32::from_bits);
        let mut x: Vec<f32> = up_to(88.0).chain(up_to(87.0).map(|x| -x)).collect();
        x.resize(x.len().next_multiple_of(LANES), 1.0);
        let results = on_each_set!(x.len(), |y| {
            y.copy_from_slice(&x);
            Exp(&mut y)
        });
        for result in &results {
            let mut worst: f64 = 0.0;
            for (x, y) in x.iter().zip(result) {
                let exact = (*x as f64).exp();
                let rounded = exact as f32;
                let ulp = (f32::from_bits(rounded.to_bits() + 1) - rounded) as f64;
                worst = worst.max((*y as f64 - exact).abs() / ulp);
            }
            assert!(worst < 2.0, "{worst} ulp");
        }
        let special = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30, 0.0, -0.0, 89.0];
        let results = on_each_set!(LANES, |y| {
            y[..8].copy_from_slice(&special);
            Exp(&mut y)
        });
        for y in results {
            assert!(y[0].is_nan());
            assert!(y[1].is_finite() && y[1] > 1e38 && y[3] == y[1] && y[7] == y[1]);
            assert!(y[2] >= 0.0 && y[2] < 2e-38 && y[4] == y[2]);
            assert_eq!((y[5], y[6]), (1.0, 1.0));
        }
    }
}
