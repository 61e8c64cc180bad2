//! Linear layers for tests: weights in packed order (packed by an implementation independent of the
//! kernel's), inputs, f64 references and launches.

use crate::support::kernel::*;
use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::convolve::Convolve;
use dflash::gpu::kernels::head::{Head, TargetIds};
use dflash::gpu::kernels::inject::Inject;
use dflash::gpu::kernels::linear::{Input, PrefillKernel, Shape, Workspace};
use dflash::gpu::kernels::plain::Plain;
use dflash::gpu::kernels::project::{Project, ProjectBuffers};
use dflash::gpu::kernels::qkv::{Qkv, QkvBuffers};
use dflash::gpu::kernels::swiglu::Swiglu;

pub const EPS: f32 = 1e-5;
pub const NONE: u32 = u32::MAX;

/// Packs `w` `[n][k]`: row `r` becomes packed row `packed_row(r)`; all other packed rows are zero.
pub fn pack_rows(w: &[u16], shape: Shape, packed_row: impl Fn(usize) -> usize) -> Vec<u16> {
    let Shape { k, .. } = shape;
    let mut packed = vec![0; shape.weight_bytes() / 2];
    for (r, row) in w.chunks(k).enumerate() {
        let p = packed_row(r);
        for (c, &value) in row.iter().enumerate() {
            // W[tile][group of 32][half][block of 8][row in half][column in block]
            let index = [p / 16, c / 32, p / 8 % 2, c / 8 % 4, p % 8, c % 8];
            let sizes = [shape.packed_rows() / 16, k / 32, 2, 4, 8, 8];
            let at = index.iter().zip(sizes).fold(0, |at, (i, size)| at * size + i);
            packed[at] = value;
        }
    }
    packed
}

/// A linear layer in device memory, with the workspace of a launch.
pub struct Layer {
    pub weights: Buffer,
    pub x: Buffer,
    pub sumsq: Buffer,
    pub num_active: Buffer,
    pub prefill_kernel: Option<PrefillKernel>,
    pub workspace: Workspace,
}

/// A linear layer on the host.
#[derive(Clone)]
pub struct Data {
    pub shape: Shape,
    pub w: Vec<u16>,
    pub x: Vec<u16>,
    pub sumsq: Vec<f32>,
    /// Number of active sequences; 0: the launch does nothing.
    pub num_active: u32,
    /// The prefill kernels to use, if any.
    pub prefill_kernel: Option<PrefillKernel>,
}

impl Data {
    pub fn new(seed: u64, rows: usize, shape: Shape) -> Data {
        let mut random = Random::new(seed);
        let parts = shape.k.div_ceil(128);
        Data {
            shape,
            w: random.bf16(shape.n * shape.k, (shape.k as f32).sqrt().recip()),
            x: random.bf16(rows * shape.k, 1.0),
            sumsq: (0..rows * parts).map(|_| 50.0 + 200.0 * random.unit()).collect(),
            num_active: 1,
            prefill_kernel: None,
        }
    }

    /// Like [`Data::new`], with integers so small that every sum is exact in any order of addition.
    pub fn integers(seed: u64, rows: usize, shape: Shape) -> Data {
        let mut random = Random::new(seed);
        let mut small = |count: usize| -> Vec<u16> {
            let numbers: Vec<f32> = (0..count).map(|_| random.below(9) as f32 - 4.0).collect();
            to_bf16(&numbers)
        };
        Data { w: small(shape.n * shape.k), x: small(rows * shape.k), ..Data::new(seed, rows, shape) }
    }

    pub fn rows(&self) -> usize {
        self.x.len() / self.shape.k
    }

    pub fn upload(&self, device: &dyn Device, packed_row: impl Fn(usize) -> usize) -> Layer {
        Layer {
            weights: constant(device, &pack_rows(&self.w, self.shape, packed_row)),
            x: upload(device, &self.x),
            sumsq: upload(device, &self.sumsq),
            num_active: upload(device, &[self.num_active]),
            prefill_kernel: self.prefill_kernel,
            workspace: Workspace::new(device, &[(self.shape, self.rows())]).unwrap(),
        }
    }

    /// x W^T `[rows][n]`, times 1 / rms if `normed`.
    pub fn product(&self, normed: bool) -> Vec<f64> {
        let Shape { n, k } = self.shape;
        let to_f64 = |v: &[u16]| -> Vec<f64> { from_bf16(v).into_iter().map(f64::from).collect() };
        let (w, x) = (to_f64(&self.w), to_f64(&self.x));
        let mut out = Vec::with_capacity(self.rows() * n);
        for (row, sums) in x.chunks(k).zip(self.sumsq.chunks(k.div_ceil(128))) {
            let mean = sums.iter().map(|&s| f64::from(s)).sum::<f64>() / k as f64;
            let scale = if normed { (mean + f64::from(EPS)).sqrt().recip() } else { 1.0 };
            for row_of_w in w.chunks(k) {
                out.push(scale * row.iter().zip(row_of_w).map(|(a, b)| a * b).sum::<f64>());
            }
        }
        out
    }
}

impl Layer {
    pub fn input(&self, normed: bool) -> Input<'_> {
        Input {
            weights: &self.weights,
            x: &self.x,
            sumsq: normed.then_some(&self.sumsq),
            eps: EPS,
            prefill_kernel: self.prefill_kernel,
            num_active: Some(&self.num_active),
            workspace: &self.workspace,
        }
    }
}

/// A paged KV cache for tests of the qkv kernel, and the rows to store in it.
pub struct Cache {
    pub qkv: Qkv,
    pub rows: Vec<u32>,
    pub table: Vec<u32>,
    pub rope: Vec<f32>,
    pub gains: Option<[Vec<f32>; 2]>,
}

/// Runs the qkv kernel; returns the bytes of queries, keys and values.
pub fn qkv(device: &dyn Device, data: &Data, cache: &Cache) -> Vec<u8> {
    let Qkv { heads, kv_heads, head_dim, query_rows, pages, .. } = cache.qkv;
    let layer = data.upload(device, |r| r);
    let queries = poisoned::<u16>(device, query_rows * heads * head_dim);
    let [keys, values] = [(); 2].map(|()| poisoned::<u16>(device, pages * kv_heads * 64 * head_dim));
    let gains = cache.gains.as_ref().map(|g| g.each_ref().map(|g| upload(device, g)));
    let buffers = QkvBuffers {
        rows: &upload(device, &cache.rows),
        queries: &queries,
        keys: &keys,
        values: &values,
        table: &upload(device, &cache.table),
        q_gain: gains.as_ref().map(|g| &g[0]),
        k_gain: gains.as_ref().map(|g| &g[1]),
        rope: &upload(device, &cache.rope),
    };
    cache.qkv.launch(device, &layer.input(true), &buffers).unwrap();
    [queries, keys, values].iter().flat_map(|b| bytes_of(device, b)).collect()
}

/// Rows of three sequences at increasing slots, with pages in random order.
pub fn cache(seed: u64, rows: usize, heads: usize, kv_heads: usize, head_dim: usize, normed: bool) -> Cache {
    let mut random = Random::new(seed);
    let (sequences, sequence_pages) = (3, 1 + (rows.div_ceil(3) + 70) / 64);
    let pages = sequences * sequence_pages + 2;
    let mut numbers: Vec<u32> = (0..pages as u32).collect();
    for i in (1..pages).rev() {
        numbers.swap(i, random.below(i + 1));
    }
    let table = numbers[..sequences * sequence_pages].to_vec();
    let positions = 200;
    let mut rope = Vec::new();
    for position in 0..positions {
        let angles =
            (0..head_dim / 2).map(|d| position as f64 / 1e4f64.powf(2.0 * d as f64 / head_dim as f64));
        let angles: Vec<f64> = angles.collect();
        rope.extend(angles.iter().map(|a| a.cos() as f32));
        rope.extend(angles.iter().map(|a| a.sin() as f32));
    }
    let start = [random.below(70), random.below(70), random.below(70)];
    let mut kv_rows = Vec::new();
    for row in 0..rows {
        let slot = (start[row % 3] + row / 3) as u32;
        kv_rows.extend([row as u32 % 3, slot + 7, slot, row as u32]);
    }
    let gains = normed.then(|| [random.normals(head_dim, 1.0), random.normals(head_dim, 1.0)]);
    let qkv = Qkv {
        rows,
        k: 0,
        heads,
        kv_heads,
        head_dim,
        query_rows: rows,
        pages,
        sequences,
        sequence_pages,
        positions,
        keys_only: false,
    };
    Cache { qkv, rows: kv_rows, table, rope, gains }
}

/// Query heads, KV heads, head dimension: groups of 1 to 8, and blocks of 128 rows that hold heads of two
/// kinds.
pub const HEADS: [(usize, usize, usize); 7] =
    [(1, 1, 64), (2, 1, 128), (3, 3, 64), (5, 1, 64), (8, 1, 128), (6, 2, 128), (9, 3, 64)];

/// Runs the projection; returns the bytes of x, y, sums of squares and features.
pub fn project(device: &dyn Device, data: &Data, x: &[f32], gain: &[f32], pitch: usize) -> Vec<u8> {
    let (rows, Shape { n, k }) = (data.rows(), data.shape);
    let layer = data.upload(device, |r| r);
    let (x, y) = (upload(device, x), poisoned::<u16>(device, rows * n));
    let sumsq = poisoned::<f32>(device, rows * n.div_ceil(128));
    let (gain, features) = (upload(device, gain), poisoned::<u16>(device, rows * pitch));
    let out = ProjectBuffers {
        x: &x,
        y: &y,
        sumsq: &sumsq,
        gain: &gain,
        features: (pitch > 0).then_some((&features, pitch)),
    };
    Project { rows, n, k }.launch(device, &layer.input(false), &out).unwrap();
    [x, y, sumsq, features].iter().flat_map(|b| bytes_of(device, b)).collect()
}

/// Runs the LM head; returns the bytes of the best keys and of the logits, which are written only if `keep`.
pub fn head(device: &dyn Device, head: Head, data: &Data, keep: bool) -> (Vec<u8>, Vec<u8>) {
    let logits = poisoned::<f32>(device, head.rows * head.vocab);
    let best = run_head(device, head, data, keep.then_some(&logits), None);
    (best, bytes_of(device, &logits))
}

/// As [`head`], with the ids of the outputs, ascending below `vocab`.
pub fn reduced_head(
    device: &dyn Device,
    head: Head,
    data: &Data,
    ids: &[u32],
    vocab: usize,
) -> (Vec<u8>, Vec<u8>) {
    let (logits, ids) = (poisoned::<f32>(device, head.rows * vocab), upload(device, ids));
    let best = run_head(device, head, data, Some(&logits), Some(TargetIds { ids: &ids, vocab }));
    (best, bytes_of(device, &logits))
}

fn run_head(
    device: &dyn Device,
    head: Head,
    data: &Data,
    logits: Option<&Buffer>,
    ids: Option<TargetIds>,
) -> Vec<u8> {
    let layer = data.upload(device, |r| r);
    let best = poisoned::<u64>(device, head.rows * head.vocab.div_ceil(128));
    head.launch(device, &layer.input(true), &best, logits, ids).unwrap();
    bytes_of(device, &best)
}

/// The linear kernels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    Project,
    Swiglu,
    Qkv,
    Head,
    Inject,
    /// With blocks of one row.
    ProjectConvolved,
    Plain,
}

pub const KINDS: [Kind; 7] =
    [Kind::Project, Kind::Swiglu, Kind::Qkv, Kind::Head, Kind::Inject, Kind::ProjectConvolved, Kind::Plain];

impl Kind {
    /// N in the tests.
    pub fn outputs(self) -> usize {
        match self {
            Kind::Project | Kind::ProjectConvolved => 192,
            Kind::Swiglu => 192,
            Kind::Qkv => 256,
            Kind::Head => 261,
            Kind::Inject => 128,
            Kind::Plain => 197,
        }
    }

    /// Runs the kernel on the rows of `data`. The residual and the position of a row are made from its first
    /// sum of squares. Returns the bytes that the kernel writes for each row.
    pub fn run(self, device: &dyn Device, data: &Data) -> Vec<Vec<u8>> {
        let (rows, Shape { n, k }) = (data.rows(), data.shape);
        let layer = data.upload(device, |r| r);
        let first_sums: Vec<f32> = data.sumsq.chunks(k.div_ceil(128)).map(|sums| sums[0]).collect();
        let y = poisoned::<u16>(device, rows * n);
        let sumsq = poisoned::<f32>(device, rows * n.div_ceil(128));
        let gain = upload(device, &vec![0.75f32; 2 * n.max(128)]);
        match self {
            Kind::Project | Kind::ProjectConvolved => {
                let x: Vec<f32> = (0..rows * n).map(|i| first_sums[i / n] + (i % n) as f32).collect();
                let x = upload(device, &x);
                let out = ProjectBuffers { x: &x, y: &y, sumsq: &sumsq, gain: &gain, features: None };
                let (project, input) = (Project { rows, n, k }, layer.input(false));
                if self == Kind::Project {
                    project.launch(device, &input, &out).unwrap();
                } else {
                    let convolve = Convolve { rows, hidden: n, taps: 2, group: 16, block: 1 };
                    let dynamic = upload(device, &vec![0.5f32; rows * 2 * n / 16]);
                    project.launch_convolved(device, &input, &out, convolve, &dynamic, &gain).unwrap();
                }
                by_row(device, rows, &[&x, &y, &sumsq])
            }
            Kind::Swiglu => {
                let kernel = Swiglu { rows, inner: n / 2, k };
                let out = poisoned::<u16>(device, rows * n / 2);
                kernel.launch(device, &layer.input(true), &out).unwrap();
                by_row(device, rows, &[&out])
            }
            Kind::Plain => {
                let plain = Plain { rows, shape: data.shape };
                let out = poisoned::<f32>(device, rows * Plain::pitch(data.shape));
                plain.launch(device, &layer.input(true), &out).unwrap();
                by_row(device, rows, &[&out])
            }
            Kind::Head => {
                let logits = poisoned::<f32>(device, rows * n);
                let best = poisoned::<u64>(device, rows * n.div_ceil(128));
                let kernel = Head { rows, vocab: n, k, multiplier: 0.5, softcap: Some(30.0), ids: n };
                kernel.launch(device, &layer.input(true), &best, Some(&logits), None).unwrap();
                by_row(device, rows, &[&best, &logits])
            }
            Kind::Inject => {
                let gather: Vec<u32> = (0..rows as u32).rev().collect();
                let kernel = Inject { rows, n, k, feature_rows: rows };
                let gather = upload(device, &gather);
                kernel.launch(device, &layer.input(false), &gather, &y, &sumsq, &gain).unwrap();
                let mut by_row = by_row(device, rows, &[&y, &sumsq]);
                by_row.reverse();
                by_row
            }
            Kind::Qkv => {
                let kv_rows: Vec<u32> =
                    (0..rows).flat_map(|r| [0, first_sums[r].to_bits() % 200, r as u32, r as u32]).collect();
                let pages = rows.div_ceil(64);
                let mut cache = cache(1, rows, 2, 1, 64, true);
                cache.rows = kv_rows;
                cache.table = (0..pages as u32).collect();
                cache.qkv = Qkv { k, pages, sequences: 1, sequence_pages: pages, ..cache.qkv };
                let bytes = qkv(device, data, &cache);
                let (queries, pages) = bytes.split_at(rows * 256);
                let (keys, values) = pages.split_at(pages.len() / 2);
                let row = |r: usize| {
                    let chunk = |c: usize| r * 128 + (c ^ (r % 8)) * 16;
                    let mut bytes = queries[r * 256..(r + 1) * 256].to_vec();
                    for c in 0..8 {
                        bytes.extend(&keys[chunk(c)..chunk(c) + 16]);
                        bytes.extend(&values[chunk(c)..chunk(c) + 16]);
                    }
                    bytes
                };
                (0..rows).map(row).collect()
            }
        }
    }
}

/// The bytes of each row in buffers of shape `[rows][...]`.
fn by_row(device: &dyn Device, rows: usize, buffers: &[&Buffer]) -> Vec<Vec<u8>> {
    let bytes: Vec<Vec<u8>> = buffers.iter().map(|b| bytes_of(device, b)).collect();
    let row = |r: usize| {
        let part = |b: &Vec<u8>| b[b.len() / rows * r..b.len() / rows * (r + 1)].to_vec();
        bytes.iter().flat_map(part).collect()
    };
    (0..rows).map(row).collect()
}
