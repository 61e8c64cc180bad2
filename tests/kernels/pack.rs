//! Packing of weights against `pack_rows` of `support/layer.rs`, and embedding from packed weights.

use crate::support::kernel;
use crate::support::layer;

use crate::support::test_gpu::TestGpu;
use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::embedding::Embedding;
use dflash::gpu::kernels::linear::Shape;
use dflash::gpu::kernels::pack::{Pack, RowMap};
use dflash::gpu::kernels::swiglu::Swiglu;
use kernel::*;
use layer::*;

/// Packs the matrices one after another into one layer.
fn packed(device: &dyn Device, shape: Shape, matrices: &[(&[u16], RowMap)]) -> Vec<u8> {
    let out = poisoned::<u16>(device, shape.weight_bytes() / 2);
    for (matrix, packed_row) in matrices {
        let pack = Pack { rows: matrix.len() / shape.k, layer: shape };
        pack.launch(device, &out, &upload(device, matrix), packed_row).unwrap();
    }
    bytes_of(device, &out)
}

#[test]
fn rows_are_packed_and_the_last_tile_is_zero_filled() {
    for (n, k) in [(1, 32), (16, 96), (17, 64), (100, 2080)] {
        let shape = Shape { n, k };
        let w = Random::new(n as u64).bf16(n * k, 1.0);
        let bytes = same_bits(|device| packed(device, shape, &[(&w, RowMap::From(0))]));
        assert_eq!(from_bytes::<u16>(&bytes), pack_rows(&w, shape, |r| r), "{shape:?}");
    }
}

#[test]
fn a_layer_of_several_matrices_is_packed_in_any_order() {
    let shape = Shape { n: 90, k: 64 };
    let w = Random::new(1).bf16(90 * 64, 1.0);
    let (first, second) = w.split_at(37 * 64);
    let pack =
        |device: &dyn Device| packed(device, shape, &[(second, RowMap::From(37)), (first, RowMap::From(0))]);
    assert_eq!(from_bytes::<u16>(&same_bits(pack)), pack_rows(&w, shape, |r| r));

    let inner = 64;
    let shape = Shape { n: inner * 2, k: 96 };
    let w = Random::new(2).bf16(shape.n * shape.k, 1.0);
    let (gates, ups) = w.split_at(inner * shape.k);
    let packed_rows: (Vec<u32>, Vec<u32>) =
        (0..inner).map(Swiglu::gate_up_rows).map(|(gate, up)| (gate as u32, up as u32)).unzip();
    let bytes = same_bits(|device| {
        let [gate, up] = [upload(device, &packed_rows.0), upload(device, &packed_rows.1)];
        packed(device, shape, &[(gates, RowMap::At(&gate)), (ups, RowMap::At(&up))])
    });
    let packed_row = |r: usize| if r < inner { r / 8 * 16 + r % 8 } else { (r - inner) / 8 * 16 + 8 + r % 8 };
    assert_eq!(from_bytes::<u16>(&bytes), pack_rows(&w, shape, packed_row));
}

#[test]
fn rows_mapped_out_of_range_are_skipped() {
    let shape = Shape { n: 20, k: 32 };
    let w = Random::new(3).bf16(8 * 32, 1.0);
    let packed_rows = [3u32, 20, 31, 32, u32::MAX, 19, 1 << 31, 0];
    let bytes = same_bits(|device| {
        let packed_row = upload(device, &packed_rows);
        packed(device, shape, &[(&w, RowMap::At(&packed_row))])
    });
    let kept: Vec<usize> = (0..8).filter(|&r| packed_rows[r] < 20).collect();
    let rows: Vec<u16> = kept.iter().flat_map(|&r| w[r * 32..(r + 1) * 32].to_vec()).collect();
    let mut expected = pack_rows(&vec![POISON; 20 * 32], shape, |r| r);
    let mask = pack_rows(&vec![1; kept.len() * 32], shape, |i| packed_rows[kept[i]] as usize);
    let values = pack_rows(&rows, shape, |i| packed_rows[kept[i]] as usize);
    expected.iter_mut().zip(&mask).zip(&values).for_each(|((e, &m), &v)| *e = if m == 1 { v } else { *e });
    assert_eq!(from_bytes::<u16>(&bytes), expected);
}

#[test]
fn launches_refuse_wrong_sizes() {
    let device = TestGpu::new();
    let (small, matrix) = (device.allocate(64, "too little").unwrap(), upload(&device, &[0u16; 64 * 32]));
    let refused = |pack: Pack, out: &Buffer, packed_row: &RowMap, part: &str| {
        let error = pack.launch(&device, out, &matrix, packed_row).unwrap_err().to_string();
        assert!(error.contains(part), "{error}: {part}");
    };
    let layer = Shape { n: 64, k: 32 };
    refused(Pack { rows: 33, layer }, &matrix, &RowMap::From(32), "33 rows from 32 on of 64");
    refused(Pack { rows: 2, layer }, &matrix, &RowMap::From(usize::MAX), "2 rows from");
    refused(Pack { rows: 0, layer }, &matrix, &RowMap::From(0), "0 rows");
    refused(Pack { rows: 8, layer: Shape { n: 64, k: 40 } }, &matrix, &RowMap::From(0), "40 columns");
    refused(Pack { rows: 8, layer }, &small, &RowMap::From(0), "out has 64 bytes, needs 4096");
    refused(Pack { rows: 64, layer }, &matrix, &RowMap::At(&small), "map has 64 bytes, needs 256");
    let out = poisoned::<u16>(&device, 64 * 32);
    Pack { rows: 64, layer }.launch(&device, &out, &matrix, &RowMap::From(0)).unwrap();
}

#[test]
fn embedding_reads_packed_weights_and_scales_rows() {
    let (hidden, vocab) = (2080, 19);
    let table = Random::new(4).bf16(vocab * hidden, 1.0);
    let tokens = [18u32, 0, 7, 19, 31, u32::MAX, 8];
    let rows = tokens.len();
    for scale in [1.0, 12.5] {
        let [unpacked, packed] = [false, true].map(|packed| {
            let run = |device: &dyn Device| {
                let shape = Shape { n: vocab, k: hidden };
                let table = if packed { pack_rows(&table, shape, |r| r) } else { table.clone() };
                let (table, tokens) = (constant(device, &table), upload(device, &tokens));
                let out = poisoned::<f32>(device, rows * hidden);
                let kernel = Embedding { rows, hidden, vocab, packed, scale };
                kernel.launch(device, &out, &table, &tokens).unwrap();
                bytes_of(device, &out)
            };
            if let Some(device) = TestGpu::counting() {
                run(&device);
                assert_eq!(device.counts()["embedding"].streamed, 4 * hidden as u64 * 2);
            }
            same_bits(run)
        });
        assert!(unpacked == packed, "scale {scale}");
        let table = from_bf16(&table);
        let expected = |&token: &u32| match token as usize {
            t if t < vocab => table[t * hidden..(t + 1) * hidden].iter().map(|x| x * scale).collect(),
            _ => vec![0.0; hidden],
        };
        assert_eq!(from_bytes::<f32>(&unpacked), tokens.iter().flat_map(expected).collect::<Vec<f32>>());
    }
}
