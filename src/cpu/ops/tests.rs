//! The instruction sets against each other, and `exp` against f64.

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
        Dtype::Bf16 => ("BF16", values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect()),
        Dtype::F16 => ("F16", values.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect()),
        Dtype::F32 => ("F32", values.iter().flat_map(|v| v.to_le_bytes()).collect()),
    };
    let header =
        format!(r#"{{"w":{{"dtype":"{name}","shape":[{rows},{cols}],"data_offsets":[0,{}]}}}}"#, data.len());
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
        for own in [false, true] {
            let gate: Vec<f32> = x.iter().map(|v| v * 20.0).collect();
            let results = on_each_set!(width, |y| {
                y.copy_from_slice(if own { &gate } else { &weight });
                Gate { x: &mut y, gate: (!own).then_some(&gate) }
            });
            assert_agree(&results, "gate");
            let exact = |i: usize| {
                let x = if own { gate[i] } else { weight[i] } as f64;
                x / (1.0 + (-gate[i] as f64).exp())
            };
            let close = |(i, y): (usize, &f32)| (*y as f64 - exact(i)).abs() < 1e-5;
            assert!(results[0].iter().enumerate().all(close));
        }
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
