//! CPU arithmetic: values against f64, and the property that makes decoding lossless: a row's bits depend
//! neither on the rows computed with it nor on the number of threads.

use crate::support;

use dflash::checkpoint::folder::Folder;
use dflash::checkpoint::safetensors::{Checkpoint, Dtype};
use dflash::cpu::ops::{self, Kv, Matrix};
use std::ops::Range;
use support::{Random, Raw};

fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..count).map(|_| random.signed()).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// Matrices `[rows][cols]` from one file. Those with the same number of columns have the same first rows.
fn matrices(shapes: &[[usize; 2]], dtype: Dtype) -> Vec<Matrix> {
    let raw = |[rows, cols]: &[usize; 2]| Raw {
        name: format!("w{rows}x{cols}"),
        shape: vec![*rows, *cols],
        values: random(*cols as u64, rows * cols),
    };
    let folder = tempfile::tempdir().unwrap();
    support::write_tensors(folder.path(), &shapes.iter().map(raw).collect::<Vec<Raw>>(), dtype, 1);
    let file = Checkpoint::open(&Folder::Disk(folder.path().into())).unwrap();
    shapes.iter().map(|s| Matrix::new(file.tensor(&format!("w{}x{}", s[0], s[1]), s).unwrap())).collect()
}

fn linear(w: &Matrix, x: &[f32]) -> Vec<f32> {
    let mut y = vec![f32::NAN; 3];
    ops::linear(x, x.len() / w.cols, [(w, &mut y)]);
    y
}

#[test]
fn linear_is_the_f64_product() {
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        for cols in [1, 2, 15, 16, 17, 31, 33, 64, 100, 384] {
            let w = &matrices(&[[40, cols]], dtype)[0];
            let x = random(1, 19 * cols);
            let mut row = vec![0.0; cols];
            for (at, got) in linear(w, &x).iter().enumerate() {
                w.row(at % 40, 1.0, &mut row);
                let terms = || row.iter().zip(&x[at / 40 * cols..]).map(|(w, x)| *w as f64 * *x as f64);
                let size: f64 = terms().map(f64::abs).sum();
                // A lane adds cols / 16 terms, then four folds add the lanes; each addition rounds by at most
                // half a unit.
                let bound = (cols / 16 + 5) as f64 * size * f32::EPSILON as f64 / 2.0;
                assert!((*got as f64 - terms().sum::<f64>()).abs() <= bound, "{dtype:?}, {cols} inputs");
            }
        }
    }
}

#[test]
fn weight_rows_are_read_in_their_dtype() {
    for (dtype, digits) in [(Dtype::Bf16, 8), (Dtype::F16, 11), (Dtype::F32, 24)] {
        let w = &matrices(&[[40, 33]], dtype)[0];
        let stored = random(33, 40 * 33);
        let mut row = vec![0.0; 33];
        for r in 0..40 {
            w.row(r, 2.0, &mut row);
            for (got, v) in row.iter().zip(&stored[r * 33..]) {
                assert!(
                    (got - 2.0 * v).abs() <= 2.0 * v.abs() * 0.5f32.powi(digits) + 1e-7,
                    "{dtype:?}: {got}, {v}"
                );
            }
        }
    }
}

#[test]
fn a_product_row_has_the_same_bits_beside_any_other_rows() {
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
        for cols in [1, 15, 16, 33, 64, 100] {
            let shapes: Vec<[usize; 2]> = (1..=40).map(|features| [features, cols]).collect();
            let matrices = matrices(&shapes, dtype);
            let x = random(2, 19 * cols);
            let alone: Vec<Vec<f32>> = x.chunks(cols).map(|x| linear(&matrices[39], x)).collect();
            for w in &matrices {
                for rows in 1..=19 {
                    // The first rows and the last rows: the same row at another index.
                    for first in [0, 19 - rows] {
                        let y = linear(w, &x[first * cols..(first + rows) * cols]);
                        for (r, y) in y.chunks(w.rows).enumerate() {
                            let expected = &alone[first + r][..w.rows];
                            assert_eq!(
                                bits(y),
                                bits(expected),
                                "{dtype:?}, {rows} rows, {} x {cols}",
                                w.rows
                            );
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn matrices_multiplied_together_have_the_bits_of_each_alone() {
    let all = matrices(&[[33, 72], [5, 72], [16, 72], [130, 72]], Dtype::Bf16);
    for rows in [1, 3, 16] {
        let x = random(3, rows * 72);
        let mut y: [Vec<f32>; 4] = Default::default();
        let [a, b, c, d] = &mut y;
        ops::linear(&x, rows, [(&all[0], a), (&all[1], b), (&all[2], c), (&all[3], d)]);
        for (w, y) in all.iter().zip(&y) {
            assert_eq!(bits(y), bits(&linear(w, &x)));
        }
    }
}

#[test]
fn the_thread_count_changes_no_bits() {
    let w = &matrices(&[[517, 160]], Dtype::Bf16)[0];
    let (heads, kv_heads, dims, positions) = (8, 2, 64, 200);
    let mut kv = Kv::new(kv_heads, dims, positions).unwrap();
    kv.write(0, &random(4, positions * kv_heads * dims), &random(5, positions * kv_heads * dims));
    for rows in [1, 5, 16] {
        let (x, q) = (random(6, rows * 160), random(7, rows * heads * dims));
        let run = |threads: usize| {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| {
                let mut out = vec![];
                ops::attention(&q, heads, &kv, &|row| 0..positions - 16 + row, &mut out);
                (bits(&linear(w, &x)), bits(&out))
            })
        };
        let one = run(1);
        for threads in [2, 3, 7] {
            assert_eq!(run(threads), one, "{rows} rows on {threads} threads");
        }
    }
}

// ---- attention ----

/// Queries, and the keys and values of a cache.
struct Case {
    heads: usize,
    kv_heads: usize,
    dims: usize,
    positions: usize,
    q: Vec<f32>, // [rows][heads * dims]
    k: Vec<f32>, // [positions][kv_heads * dims]
    v: Vec<f32>, // [positions][kv_heads * dims]
}

impl Case {
    fn new(heads: usize, kv_heads: usize, dims: usize, rows: usize) -> Case {
        let positions = 75;
        Case {
            heads,
            kv_heads,
            dims,
            positions,
            q: random(1, rows * heads * dims).iter().map(|v| v * 4.0).collect(),
            k: random(2, positions * kv_heads * dims),
            v: random(3, positions * kv_heads * dims),
        }
    }

    fn cache(&self) -> Kv {
        let mut kv = Kv::new(self.kv_heads, self.dims, self.positions).unwrap();
        // Written in pieces, as a sequence writes it.
        let width = self.kv_heads * self.dims;
        for at in (0..self.positions).step_by(7) {
            let end = (at + 7).min(self.positions) * width;
            kv.write(at, &self.k[at * width..end], &self.v[at * width..end]);
        }
        kv
    }

    /// The output of rows `rows` of q.
    fn attend(&self, kv: &Kv, rows: Range<usize>, visible: &[Range<usize>]) -> Vec<f32> {
        let width = self.heads * self.dims;
        let mut out = vec![];
        let first = rows.start;
        let q = &self.q[rows.start * width..rows.end * width];
        ops::attention(q, self.heads, kv, &|row| visible[first + row].clone(), &mut out);
        out
    }

    fn exact(&self, row: usize, head: usize, visible: Range<usize>) -> Vec<f64> {
        let d = self.dims;
        let at = |position: usize| (position * self.kv_heads + head / (self.heads / self.kv_heads)) * d;
        let q = &self.q[(row * self.heads + head) * d..][..d];
        let score = |p: usize| {
            let products = q.iter().zip(&self.k[at(p)..]).map(|(q, k)| *q as f64 * *k as f64);
            products.sum::<f64>() / (d as f64).sqrt()
        };
        let scores: Vec<f64> = visible.clone().map(score).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        let dim = |i: usize| {
            visible.clone().zip(&weights).map(|(p, w)| w * self.v[at(p) + i] as f64).sum::<f64>() / total
        };
        (0..d).map(dim).collect()
    }
}

/// Causal rows, windows, and ranges that begin or end at the borders of tiles of 16 keys.
fn ranges() -> Vec<Range<usize>> {
    let causal = (0..5).map(|row| 0..58 + row);
    let window = (0..5).map(|row| 40 + row..45 + row);
    let borders =
        [0..1, 15..16, 16..17, 15..17, 0..16, 16..32, 17..48, 31..33, 63..64, 64..75, 0..75, 74..75];
    causal.chain(window).chain(borders).collect()
}

const SHAPES: [(usize, usize); 6] = [(1, 1), (2, 1), (4, 1), (8, 1), (6, 2), (4, 4)];

#[test]
fn attention_is_the_f64_softmax() {
    let visible = ranges();
    for (heads, kv_heads) in SHAPES {
        for dims in [2, 16, 24, 64, 80, 128] {
            let case = Case::new(heads, kv_heads, dims, visible.len());
            let out = case.attend(&case.cache(), 0..visible.len(), &visible);
            for (at, got) in out.chunks(dims).enumerate() {
                let (row, head) = (at / heads, at % heads);
                for (got, exact) in got.iter().zip(case.exact(row, head, visible[row].clone())) {
                    let what = format!("{heads}/{kv_heads} heads of {dims}, row {row}");
                    assert!((*got as f64 - exact).abs() < 2e-6, "{what}: {got}, not {exact}");
                }
            }
        }
    }
}

#[test]
fn a_query_has_the_same_bits_beside_any_other_queries() {
    let visible = ranges();
    for (heads, kv_heads) in SHAPES {
        for dims in [2, 16, 24, 80, 128] {
            let case = Case::new(heads, kv_heads, dims, visible.len());
            let kv = case.cache();
            let width = heads * dims;
            let alone: Vec<f32> =
                (0..visible.len()).flat_map(|r| case.attend(&kv, r..r + 1, &visible)).collect();
            for rows in [2, 3, 4, 5, visible.len()] {
                for first in 0..=visible.len() - rows {
                    let out = case.attend(&kv, first..first + rows, &visible);
                    assert_eq!(bits(&out), bits(&alone[first * width..(first + rows) * width]));
                }
            }
        }
    }
}

#[test]
fn masked_keys_and_values_do_not_affect_a_query() {
    let visible = ranges();
    for (heads, kv_heads) in SHAPES {
        for dims in [16, 24, 80] {
            let case = Case::new(heads, kv_heads, dims, visible.len());
            let (width, per_key) = (heads * dims, kv_heads * dims);
            let whole = case.attend(&case.cache(), 0..visible.len(), &visible);
            for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
                for (row, seen) in visible.iter().enumerate() {
                    let mut kv = case.cache();
                    for position in (0..case.positions).filter(|p| !seen.contains(p)) {
                        kv.write(position, &vec![poison; per_key], &vec![poison; per_key]);
                    }
                    let out = case.attend(&kv, 0..visible.len(), &visible);
                    let part = row * width..(row + 1) * width;
                    assert_eq!(bits(&out[part.clone()]), bits(&whole[part]), "{poison} beyond {seen:?}");
                }
            }
        }
    }
}

#[test]
fn softmax_handles_extreme_scores_and_propagates_nan() {
    let run = |keys: &[f32]| {
        let dims = 16;
        let mut kv = Kv::new(1, dims, keys.len()).unwrap();
        let k: Vec<f32> = keys.iter().flat_map(|k| vec![*k; dims]).collect();
        let v: Vec<f32> = (0..keys.len()).flat_map(|p| vec![p as f32; dims]).collect();
        kv.write(0, &k, &v);
        let mut out = vec![];
        // A key of k scores 4 k.
        ops::attention(&vec![1.0; dims], 1, &kv, &|_| 0..keys.len(), &mut out);
        out[0]
    };
    assert_eq!(run(&[0.0, 1e30, 0.0]), 1.0);
    assert_eq!(run(&[-1e30, -1e30, -1e30]), 1.0);
    assert_eq!(run(&[-1e37, 1e37]), 1.0);
    assert_eq!(run(&[1e5, 1e5 - 100.0, 1e5, 0.0]), 1.0);
    assert_eq!(run(&[7.0]), 0.0);
    // 20 keys, the largest in the second tile
    let mut keys = vec![-50.0; 20];
    keys[18] = 60.0;
    assert_eq!(run(&keys), 18.0);
    for bad in [f32::NAN, f32::INFINITY] {
        for at in [0, 3, 15, 16, 19] {
            keys[at] = bad;
            assert!(run(&keys).is_nan(), "{bad} at {at}");
            keys[at] = 0.0;
        }
    }
}

#[test]
fn a_cache_that_does_not_fit_in_memory_is_an_error() {
    let error = Kv::new(1 << 10, 1 << 10, 1 << 40).err().unwrap();
    assert_eq!(error.exit_code(), 5);
}

// ---- norm, RoPE, SwiGLU ----

#[test]
fn rms_norm_is_the_f64_formula() {
    for width in (1..=70).chain([128, 1000]) {
        let (x, weight) = (random(1, 3 * width), random(2, width));
        for (scale, eps) in [(1.0, 1e-6), (1e-3, 1e-5), (1e4, 1e-6)] {
            let x: Vec<f32> = x.iter().map(|x| x * scale).collect();
            let mut out = vec![9.0; 2];
            ops::rms_norm(&x, &weight, eps, &mut out);
            for (row, got) in x.chunks(width).zip(out.chunks(width)) {
                let squares: f64 = row.iter().map(|x| (*x as f64).powi(2)).sum();
                let size = (squares / width as f64 + eps as f64).sqrt();
                for ((x, w), got) in row.iter().zip(&weight).zip(got) {
                    let exact = *x as f64 / size * *w as f64;
                    assert!((*got as f64 - exact).abs() <= 1e-6 * exact.abs(), "{width}: {got}, not {exact}");
                }
            }
        }
    }
    let mut zeros = vec![0.0; 20];
    ops::rms_norm_in_place(&mut zeros, &[1.0; 20], 1e-6);
    assert_eq!(zeros, [0.0; 20]);
}

#[test]
fn rope_rotates_pairs_half_the_rotary_width_apart() {
    for (heads, dims, rotary) in [(1, 2, 2), (3, 24, 24), (2, 80, 40), (2, 16, 2)] {
        let rows = 4;
        let x = random(1, rows * heads * dims);
        let angles: Vec<f64> = random(2, rows * rotary / 2).iter().map(|a| *a as f64 * 50.0).collect();
        let table: Vec<f32> = angles
            .chunks(rotary / 2)
            .flat_map(|row| {
                row.iter().map(|a| a.cos()).chain(row.iter().map(|a| a.sin())).collect::<Vec<f64>>()
            })
            .map(|v| v as f32)
            .collect();
        let mut got = x.clone();
        ops::rope(&mut got, heads, dims, &table, rotary);
        for (at, got) in got.iter().enumerate() {
            let (row, d) = (at / (heads * dims), at % dims);
            let base = at - d;
            let exact = if d >= rotary {
                x[at] as f64
            } else {
                // As a complex number: (a + ib) e^(i angle).
                let pair = d % (rotary / 2);
                let (a, b) = (x[base + pair] as f64, x[base + pair + rotary / 2] as f64);
                let (sin, cos) = angles[row * rotary / 2 + pair].sin_cos();
                if d < rotary / 2 { a * cos - b * sin } else { a * sin + b * cos }
            };
            assert!(
                (*got as f64 - exact).abs() < 3e-7,
                "{heads} x {dims}, {rotary} rotated: {got}, not {exact}"
            );
        }
    }
}

#[test]
fn swiglu_is_the_f64_formula_over_the_whole_range() {
    let mut gate: Vec<f32> = (-4000..=4000).map(|i| i as f32 * 0.05).collect();
    gate.extend([-1e4, 1e4, 1e30, -0.0, 1e-30, -1e-30, 1e-45]);
    let up = random(1, gate.len());
    let mut got = gate.clone();
    ops::swiglu(&mut got, &up);
    for ((g, u), got) in gate.iter().zip(&up).zip(got) {
        let (g, u) = (*g as f64, *u as f64);
        let exact = g / (1.0 + (-g).exp()) * u;
        // Below -88 the exponential is clamped, which loses about 1e-36.
        assert!((got as f64 - exact).abs() <= 4e-7 * exact.abs() + 1e-34, "{g}, {u}: {got}, not {exact}");
    }
    let mut odd = [f32::NAN, 1.0];
    ops::swiglu(&mut odd, &[1.0, f32::NAN]);
    assert!(odd.iter().all(|v| v.is_nan()));
}
