//! The linear kernels for prefill against the skinny kernels and against f64. The mma kernels give the same
//! bits as the skinny ones if those do not split K. The wgmma kernels add in another order and give the same
//! bits if every sum is exact.

use crate::support::kernel;
use crate::support::layer;

use crate::support::test_gpu::TestGpu;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::inject::Inject;
use dflash::gpu::kernels::linear::{PrefillKernel, Shape};
use dflash::gpu::kernels::qkv::Qkv;
use dflash::gpu::kernels::swiglu::Swiglu;
use kernel::*;
use layer::*;

const PROMPT_KINDS: [Kind; 5] = [Kind::Project, Kind::Swiglu, Kind::Qkv, Kind::Inject, Kind::Plain];

fn with_kernel(prompt: PrefillKernel, data: &Data) -> Data {
    Data { prefill_kernel: Some(prompt), ..data.clone() }
}

/// The kinds of prefill kernels that the device has.
fn prefill_kernels(device: &dyn Device) -> impl Iterator<Item = PrefillKernel> {
    PrefillKernel::ALL.into_iter().filter(|prompt| prompt.runs_on(device))
}

fn prefill_kernels_and_kinds() -> impl Iterator<Item = (PrefillKernel, Kind)> {
    PrefillKernel::ALL.into_iter().flat_map(|prompt| PROMPT_KINDS.map(|kind| (prompt, kind)))
}

#[test]
fn mma_prefill_equals_skinny_kernels_if_k_is_not_split() {
    on_gpu(|device| {
        let rows = &[1, 5, 127, 128, 129, 300][..];
        for kind in PROMPT_KINDS {
            // Less than a stage, one, one and a half, several stages.
            for k in [32, 64, 96, 160, 480] {
                let shape = Shape { n: kind.outputs(), k };
                assert_eq!(shape.slices().1, 1);
                for &rows in rows {
                    let data = Data::new(rows as u64, rows, shape);
                    let skinny = kind.run(device, &data);
                    let prefill = kind.run(device, &with_kernel(PrefillKernel::Mma, &data));
                    assert!(skinny == prefill, "{kind:?}, {rows} rows, K {k}");
                    assert_written(&prefill.concat(), "the result");
                }
            }
        }
    });
}

#[test]
fn wgmma_prefill_equals_skinny_kernels_if_sums_are_exact() {
    on_gpu(|device| {
        if !PrefillKernel::Wgmma.runs_on(device) {
            return;
        }
        // Less than a stage, one, one and a half, as many as the ring holds, more; blocks of tokens that are
        // full or nearly full.
        let all = [(32, 1), (64, 257), (96, 255), (160, 5), (224, 127), (256, 256), (320, 300), (1056, 513)];
        for kind in PROMPT_KINDS {
            for (k, rows) in all {
                let data = Data::integers(rows as u64, rows, Shape { n: kind.outputs(), k });
                let skinny = kind.run(device, &data);
                let prefill = kind.run(device, &with_kernel(PrefillKernel::Wgmma, &data));
                assert!(skinny == prefill, "{kind:?}, {rows} rows, K {k}");
                assert_written(&prefill.concat(), "the result");
            }
        }
    });
}

#[test]
fn every_head_layout_equals_skinny_kernels_bit_for_bit() {
    on_gpu(|device| {
        for (heads, kv_heads, head_dim) in HEADS {
            for keys_only in [false, true] {
                let (rows, k) = (20, 96);
                let mut to = cache(3, rows, heads, kv_heads, head_dim, true);
                to.qkv = Qkv { k, keys_only, ..to.qkv };
                let data = Data::integers(4, rows, to.qkv.shape());
                let skinny = qkv(device, &data, &to);
                for prompt in prefill_kernels(device) {
                    let prefill = qkv(device, &with_kernel(prompt, &data), &to);
                    assert!(
                        skinny == prefill,
                        "{prompt:?}, {heads} heads of {head_dim}, {kv_heads} KV heads, keys only {keys_only}"
                    );
                }
            }
        }
    });
}

#[test]
fn long_sums_equal_f64() {
    // The skinny kernel would split these sums in four and in eight.
    for (k, prompt) in [1056, 2048].into_iter().flat_map(|k| PrefillKernel::ALL.map(|prompt| (k, prompt))) {
        let (rows, n) = (150, 128);
        let data = with_kernel(prompt, &Data::new(1, rows, Shape { n, k }));
        let (x, gain) = (vec![0.0; rows * n], vec![1.0; n]);
        let expected: Vec<f32> = data.product(false).into_iter().map(|v| v as f32).collect();
        if !prompt.runs_on(gpu()) {
            continue;
        }
        let bytes = same_bits(|device| project(device, &data, &x, &gain, 0));
        let (error, bound) =
            (relative_error(&from_bytes(&bytes[..rows * n * 4]), &expected), f32_bound(1e-6));
        assert!(error < bound, "{prompt:?}, K {k}: error {error:.2e}, expected below {bound:.0e}");
    }
}

#[test]
fn row_bits_do_not_depend_on_other_rows() {
    on_gpu(|device| {
        for (prompt, kind) in
            prefill_kernels(device).flat_map(|prompt| PROMPT_KINDS.map(|kind| (prompt, kind)))
        {
            let (k, rows) = (1056, 140);
            let shape = Shape { n: kind.outputs(), k };
            let parts = k.div_ceil(128);
            let single = with_kernel(prompt, &Data::new(1, 1, shape));
            let alone = kind.run(device, &single).remove(0);
            for index in [0, 77, 127, 128, rows - 1] {
                let mut data =
                    with_kernel(prompt, &Data { w: single.w.clone(), ..Data::new(2, rows, shape) });
                data.x.fill(0x7fc1);
                data.sumsq.fill(f32::NAN);
                data.x[index * k..(index + 1) * k].copy_from_slice(&single.x);
                data.sumsq[index * parts..(index + 1) * parts].copy_from_slice(&single.sumsq);
                let bits = kind.run(device, &data).remove(index);
                assert!(bits == alone, "{prompt:?}, {kind:?}: row {index} of {rows}");
            }
        }
    });
}

#[test]
fn an_inactive_launch_writes_nothing() {
    for (prompt, kind) in prefill_kernels_and_kinds() {
        let Some(device) = TestGpu::counting() else { return };
        if !prompt.runs_on(&device) {
            continue;
        }
        let data = with_kernel(prompt, &Data::new(7, 4, Shape { n: kind.outputs(), k: 96 }));
        kind.run(&device, &Data { num_active: 0, ..data });
        let counts = device.counts();
        let (name, counts) = counts.iter().find(|(name, _)| name.starts_with("prefill_")).unwrap();
        assert_eq!((counts.written, counts.mma), (0, 0), "{name}");
    }
}

#[test]
fn missing_features_are_zeros() {
    on_gpu(|device| {
        let (rows, feature_rows, n, k) = (140, 21, 128, 96);
        let data = Data::integers(9, feature_rows, Shape { n, k });
        let gather: Vec<u32> = (0..rows as u32)
            .map(|row| match row % 4 {
                1 => 20 + row,
                3 => u32::MAX / row,
                _ => row % 21,
            })
            .collect();
        let run = |data: &Data| {
            let layer = data.upload(device, |r| r);
            let (y, sumsq) = (poisoned::<u16>(device, rows * n), poisoned::<f32>(device, rows));
            let (gather, gain) = (upload(device, &gather), upload(device, &vec![0.5f32; n]));
            let kernel = Inject { rows, n, k, feature_rows };
            kernel.launch(device, &layer.input(false), &gather, &y, &sumsq, &gain).unwrap();
            [bytes_of(device, &y), bytes_of(device, &sumsq)].concat()
        };
        let skinny = run(&data);
        for prompt in prefill_kernels(device) {
            assert!(skinny == run(&with_kernel(prompt, &data)), "{prompt:?}");
        }
        assert!(skinny[n * 2..n * 4].iter().all(|&b| b == 0), "row 1 is the first missing row");
    });
}

#[test]
fn schedules_give_the_same_bits() {
    for (prompt, kind) in prefill_kernels_and_kinds() {
        let data = with_kernel(prompt, &Data::new(5, 20, Shape { n: kind.outputs(), k: 288 }));
        if prompt.runs_on(gpu()) {
            same_bits(|device| kind.run(device, &data).concat());
        }
    }
}

#[test]
fn weights_are_read_once_per_block_without_bank_conflicts() {
    for (prompt, kind) in prefill_kernels_and_kinds() {
        let (rows, k) = (260, 160);
        let Some(device) = TestGpu::counting() else { return };
        if !prompt.runs_on(&device) {
            continue;
        }
        let data = with_kernel(prompt, &Data::new(8, rows, Shape { n: kind.outputs(), k }));
        kind.run(&device, &data);
        let counts = device.counts();
        let (name, counts) = counts.iter().find(|(name, _)| name.starts_with("prefill_")).unwrap();
        assert_eq!(counts.conflicts, 0, "{name}");
        // Blocks of tokens, and tokens per block. Products are rounded up to whole stages and blocks: 3 stages
        // of 4 x 16 k, and 8 tiles of weights per tile of 8 tokens.
        let (token_blocks, tokens) = match prompt {
            PrefillKernel::Mma => (3, 128),
            PrefillKernel::Wgmma => (2, 256),
        };
        let blocks = data.shape.n.div_ceil(128) * token_blocks;
        assert_eq!(counts.blocks, blocks as u64, "{name}");
        assert_eq!(counts.mma, (blocks * 3 * 4 * 8 * tokens / 8) as u64, "{name}");
        let least = data.shape.weight_bytes() * token_blocks + rows * k * 2 * data.shape.n.div_ceil(128);
        let read = counts.read as usize;
        assert!(read >= least, "{name}: {read} bytes read, at least {least}");
        // Among the epilogues that of inject reads least, only its gains.
        assert!(kind != Kind::Inject || read < least * 11 / 10, "{name}: {read} bytes read, least {least}");
    }
}

#[test]
fn the_head_has_no_prefill_kernel() {
    let device = TestGpu::new();
    let (vocab, k) = (261, 96);
    let layer =
        with_kernel(PrefillKernel::Mma, &Data::new(1, 3, Shape { n: vocab, k })).upload(&device, |r| r);
    let best = poisoned::<u64>(&device, 9);
    let head =
        dflash::gpu::kernels::head::Head { rows: 3, vocab, k, multiplier: 1.0, softcap: None, ids: vocab };
    let refusal = head.launch(&device, &layer.input(true), &best, None, None).unwrap_err();
    assert_eq!(refusal.to_string(), "kernel head_8: has no counterpart for prompts");
}

#[test]
fn a_device_without_wgmma_uses_the_mma_kernels() {
    // Like a GPU older than Hopper.
    let dry_run = dflash::gpu::dry_run::DryRunDevice::new();
    assert_eq!(prefill_kernels(&dry_run).collect::<Vec<_>>(), [PrefillKernel::Mma]);
    assert_eq!(PrefillKernel::of(&dry_run), PrefillKernel::Mma);
    let kernel = Swiglu { rows: 3, inner: 96, k: 64 };
    let layer = with_kernel(PrefillKernel::Wgmma, &Data::new(1, 3, kernel.shape())).upload(&dry_run, |r| r);
    let refusal =
        kernel.launch(&dry_run, &layer.input(true), &poisoned::<u16>(&dry_run, 3 * 96)).unwrap_err();
    assert_eq!(refusal.to_string(), "kernel prefill_swiglu_wgmma: dry run has no wgmma");
    // H100 and H200 have both.
    assert_eq!(prefill_kernels(gpu()).count(), 1 + usize::from(gpu().properties().capability == (9, 0)));
}
