//! Traffic of attention in a layer of Qwen3-8B. `linear_bits.rs` counts that of the linear kernels.

use crate::support::kernel;

use crate::support::test_gpu::TestGpu;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::attention::{Attention, Layer, Mask, Paged};
use kernel::*;

/// Bytes of the layer's weights.
const WEIGHTS: u64 = 385_875_968;

/// 16 rows after a context of 1008: 32 query heads of 128 on 8 KV heads.
#[test]
fn qwen3_8b_attention_keeps_traffic_below_a_quarter_of_weights() {
    let (context, rows) = (1008, 16);
    let layer = Layer {
        heads: 32,
        kv_heads: 8,
        head_dim: 128,
        pages: 16,
        pages_per_sequence: 16,
        window: 0,
        scale: 128f32.sqrt().recip(),
    };
    let attention = Attention { layer, sequences: 1, block: rows, capacity: 1024 };
    let Some(device) = TestGpu::counting() else { return };
    let mut random = Random::new(1);
    let pages = 16 * 8 * 64 * 128;
    let (k, v) = (upload(&device, &random.bf16(pages, 1.0)), upload(&device, &random.bf16(pages, 1.0)));
    let q = upload(&device, &random.bf16(rows * 32 * 128, 1.0));
    let out = poisoned::<u16>(&device, rows * 32 * 128);
    let numbers: Vec<u32> = (0..16).collect();
    let paged = Paged {
        k: &k,
        v: &v,
        table: &upload(&device, &numbers),
        spans: &upload(&device, &[context as u32, rows as u32]),
        gates: None,
    };
    let partials = device.allocate(attention.partial_bytes().unwrap(), "partials").unwrap();
    attention.launch(&device, &out, &q, paged, Mask::Chain, &partials).unwrap();
    assert_written(&bytes_of(&device, &out), "attention's output");

    let [split, merge] = ["attention_128x64", "attention_merge_128"].map(|name| device.counts()[name]);
    let (read, written) = (split.read + merge.read, split.written + merge.written);
    let least = attention.bytes(&[(context, rows)]);
    assert_eq!(least, 2 * 2 * 128 * (16 * 32 + 1024 * 8) as u64);
    assert!(split.read >= least - 2 * 16 * 32 * 128, "keys, values and queries are read");
    // The results of the splits are 2,129,920 bytes: 8 splits x 8 heads x 64 rows x 130 numbers of 4 bytes. The
    // merge reads the maxima twice, and a span in each of 16,384 threads.
    assert_eq!((split.read, split.written), (5_373_952, 2_129_920));
    assert_eq!((merge.read, merge.written), (2_129_920 + 16_384 + 131_072, 131_072));
    // Together with the 61,508,288 bytes of the linear kernels this is 18.5 % of the weights.
    assert!((61_508_288 + read + written) * 4 <= WEIGHTS);
}
