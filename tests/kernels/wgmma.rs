//! The emulator's wgmma: products against f64 in every matrix layout that the kernels use, and reports of
//! broken rules.

use crate::support::kernel;

use dflash::Result;
use dflash::gpu::device::{Arg, Device, Kernel};
use dflash::gpu::emulator::{Emulator, Schedule};
use kernel::*;

const M: usize = 64;
const N: usize = 256;
static WGMMA: Kernel = Kernel { file: "toys", name: "toy_wgmma", threads: 128, max_shared: 200 << 10 };
static BROKEN: Kernel = Kernel { file: "broken", name: "broken_wgmma", threads: 128, max_shared: STAGED };
/// Shared memory for twice 16 k of 64 and 256 rows, in bytes.
const STAGED: u32 = 2 * 320 * 32;

/// `c + a b^T` for `a [M][k]`, `b [N][k]`.
fn product(a: &[u16], b: &[u16], c: Option<&[f32]>, k: usize) -> Vec<f32> {
    let (a, b) = (from_bf16(a), from_bf16(b));
    let sum = |i: usize| {
        let pairs = a[i / N * k..][..k].iter().zip(&b[i % N * k..][..k]);
        pairs.map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>() + c.map_or(0.0, |c| f64::from(c[i]))
    };
    (0..M * N).map(|i| sum(i) as f32).collect()
}

#[test]
fn wgmma_multiplies_matrices_in_every_layout() {
    let mut random = Random::new(1);
    // Core matrices contiguous along k; along the rows; with gaps; swizzled.
    let layouts = [(16, 0, 128, 256), (48, 0, 128, 768), (48, 0, 4096, 128), (32, 0, 4112, 128)];
    for (k, swizzle, leading, stride) in layouts.into_iter().chain([16, 32, 64].map(|k| (k, 1, 0, 1024))) {
        let (a, b, c) = (random.bf16(M * k, 1.0), random.bf16(N * k, 1.0), random.normals(M * N, 3.0));
        let counted = k / 16;
        for c in [None, Some(&c)] {
            let bytes = five_schedules(|device| {
                let out = poisoned::<f32>(device, M * N);
                let [a, b] = [&a, &b].map(|m| upload(device, m));
                let c = c.map_or(Arg::Null, |c| (&upload(device, c)).into());
                let [k, leading, stride] = [k, leading, stride].map(|n| Arg::U32(n as u32));
                let args =
                    [(&out).into(), (&a).into(), (&b).into(), c, k, Arg::U32(swizzle), leading, stride];
                device.launch(&WGMMA, [1, 1, 1], WGMMA.max_shared, &args).unwrap();
                // m64n256k16 is 128 times m16n8k16.
                assert_eq!(device.counts()["toy_wgmma"].mma, 128 * counted as u64);
                bytes_of(device, &out)
            });
            let expected = product(&a, &b, c.map(Vec::as_slice), k);
            let error = relative_error(&from_bytes(&bytes), &expected);
            assert!(error < 1e-6, "{k} k, layout {swizzle} {leading} {stride}: error {error:.1e}");
        }
    }
}

/// The result or error of the kernel with a bug, under each schedule: absolute differences from the product.
fn broken(bug: u32) -> Vec<Result<Vec<f32>>> {
    let mut random = Random::new(2);
    let (a, b) = (random.bf16(M * 32, 1.0), random.bf16(N * 32, 1.0));
    let expected = product(&a, &b, None, 32);
    let on = |schedule| {
        let device = Emulator::new();
        device.set_schedule(schedule);
        let out = poisoned::<f32>(&device, M * N);
        let args = [(&out).into(), (&upload(&device, &a)).into(), (&upload(&device, &b)).into(), bug.into()];
        device.launch(&BROKEN, [1, 1, 1], STAGED, &args)?;
        let found: Vec<f32> = download(&device, &out);
        Ok(found.iter().zip(&expected).map(|(f, e)| (f - e).abs()).collect())
    };
    Schedule::ALL.into_iter().map(on).collect()
}

fn right(outcome: &Result<Vec<f32>>) -> bool {
    outcome.as_ref().is_ok_and(|differences| differences.iter().all(|d| *d < 1e-4))
}

#[test]
fn broken_wgmma_rules_are_reported() {
    assert!(broken(0).iter().all(right));
    let all = [
        (1, "without a later fence.proxy.async"),
        (2, "without a later fence.proxy.async"),
        (4, "executed 0 of its warpgroup's 2 wgmma.mma_async"),
        (5, "without a wgmma.fence since"),
        (6, "matrix descriptors differ from those of the rest of the warpgroup"),
        (7, "8 rows must start at a multiple of 1024"),
        (8, "of 20480 bytes of dynamic shared memory"),
        (11, "sums of a wgmma were written to before this wait"),
        (14, "without a wgmma.fence since"),
    ];
    for (bug, text) in all {
        for (schedule, outcome) in Schedule::ALL.iter().zip(broken(bug)) {
            let message = outcome.err().map(|e| e.to_string()).unwrap_or_default();
            assert!(
                message.contains("broken_wgmma") && message.contains(text),
                "{bug}, {schedule:?}: {message:?}"
            );
        }
    }
}

#[test]
fn operands_and_sums_in_flight_are_undefined() {
    // Operands overwritten before the wait: the wait, or a later product, reports it.
    let overwritten = broken(10);
    assert!(overwritten.iter().all(Result::is_err));
    let text = "changed before this wait";
    assert!(overwritten.iter().any(|r| r.as_ref().is_err_and(|e| e.to_string().contains(text))));
    for outcome in broken(15) {
        assert!(outcome.is_err_and(|e| e.to_string().contains(text)));
    }
    assert!(broken(16).iter().all(right), "operands may be overwritten after the wait for their group");
    // No commit, a wait that leaves one group too many pending, no wait: the sums are still poison.
    for bug in [9, 12, 13] {
        for outcome in broken(bug) {
            assert!(outcome.unwrap().iter().all(|d| d.is_nan()), "bug {bug}");
        }
    }
    // No barrier between the copies and the products.
    assert!(broken(3).iter().any(|outcome| !right(outcome)));
}
