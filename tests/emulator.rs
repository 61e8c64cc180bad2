//! The emulator itself: its operations against plain arithmetic, and that it reports what broken kernels do.

#[path = "support/kernel.rs"]
mod kernel;

use dflash::device::{Arg, Device, Kernel};
use dflash::emulator::Emulator;
use dflash::kernels::embedding::Embedding;
use kernel::*;

static MMA: Kernel = Kernel { file: "toys", name: "toy_mma", threads: 64, max_shared: 0 };

#[test]
fn embedding_gathers_rows_and_zeros_unknown_tokens() {
    let (hidden, vocab) = (72, 11);
    let table = Random::new(1).bf16(vocab * hidden, 1.0);
    let tokens = [3u32, 0, 10, 11, u32::MAX, 3];
    let bytes = five_schedules(|device| {
        let out = poisoned::<f32>(device, tokens.len() * hidden);
        let (table, tokens) = (constant(device, &table), upload(device, &tokens));
        let embedding = Embedding { rows: 6, hidden, vocab };
        embedding.launch(device, &out, &table, &tokens).unwrap();
        bytes_of(device, &out)
    });
    let out: Vec<f32> = from_bytes(&bytes);
    for (row, &token) in tokens.iter().enumerate() {
        let expected = match token as usize {
            t if t < vocab => from_bf16(&table[t * hidden..(t + 1) * hidden]),
            _ => vec![0.0; hidden],
        };
        assert_eq!(out[row * hidden..(row + 1) * hidden], expected, "row {row}");
    }
}

#[test]
fn mma_multiplies_matrices() {
    let mut random = Random::new(2);
    let (a, b) = (random.bf16(256, 1.0), random.bf16(128, 1.0));
    let bytes = five_schedules(|device| {
        let out = poisoned::<f32>(device, 256);
        let args = [(&out).into(), (&upload(device, &a)).into(), (&upload(device, &b)).into(), Arg::U32(1)];
        device.launch(&MMA, [1, 1, 1], 0, &args).unwrap();
        assert_eq!(device.counts()["toy_mma"].mma, 2);
        bytes_of(device, &out)
    });
    let (a, b, out) = (from_bf16(&a), from_bf16(&b), from_bytes::<f32>(&bytes));
    let product: Vec<f32> = (0..256)
        .map(|i| {
            (0..16).map(|k| f64::from(a[i / 8 % 16 * 16 + k]) * f64::from(b[k * 8 + i % 8])).sum::<f64>()
                as f32
        })
        .collect();
    assert!(relative_error(&out, &product) < 1e-6);
}

#[test]
#[ignore]
fn mma_speed() {
    let device = Emulator::new();
    let (a, b) = (upload(&device, &[0u16; 256]), upload(&device, &[0u16; 128]));
    let out = poisoned::<f32>(&device, 256);
    for schedule in dflash::emulator::Schedule::ALL {
        device.set_schedule(schedule);
        let t = std::time::Instant::now();
        device
            .launch(&MMA, [1, 1, 1], 0, &[(&out).into(), (&a).into(), (&b).into(), Arg::U32(50000)])
            .unwrap();
        println!("{schedule:?}: {:.0} ns per mma", t.elapsed().as_secs_f64() * 1e9 / 100000.0);
    }
}
