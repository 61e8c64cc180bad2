//! Attention against f64. The bits of a row depend only on its query and the keys it attends to.

use crate::support::attention;
use crate::support::kernel;

use crate::support::test_gpu::TestGpu;
use attention::*;
use dflash::Error;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::attention::{Attention, Layer, Prefill, split_of, split_start};
use kernel::*;

#[test]
fn every_head_group_and_size_equals_f64() {
    on_gpu(|device| {
        let mut random = Random::new(1);
        for head_dim in [64, 128] {
            // Groups of 1 to 8 query heads per KV head, 12, 16, and the most.
            let groups =
                [(2, 2), (4, 2), (9, 3), (8, 2), (5, 1), (6, 1), (14, 2), (8, 1), (12, 1), (32, 2), (32, 1)];
            for (heads, kv_heads) in groups {
                for (mask, rows) in
                    [(MaskMode::Chain, 1), (MaskMode::Chain, 3), (MaskMode::Block, 9), (MaskMode::Tree, 17)]
                {
                    let shape = shape(mask, head_dim, heads, kv_heads, 0);
                    let context = CONTEXTS[random.below(CONTEXTS.len())];
                    check(device, &shape, rows, &[Sequence::new(&shape, context, rows, &mut random)]);
                }
            }
        }
        // The groups of published models with heads of 256.
        for (i, (heads, kv_heads)) in [(2, 1), (6, 1), (8, 2), (8, 1)].into_iter().enumerate() {
            for (mask, rows) in [(MaskMode::Chain, 1), (MaskMode::Chain, 7), (MaskMode::Tree, 17)] {
                let shape = shape(mask, 256, heads, kv_heads, [0, 70][i % 2]);
                let context = CONTEXTS[random.below(CONTEXTS.len())];
                check(device, &shape, rows, &[Sequence::new(&shape, context, rows, &mut random)]);
            }
        }
    });
}

/// Outputs of one split and of several, and of prompts, times the sigmoid of the gates.
#[test]
fn gates_multiply_the_output() {
    let mut random = Random::new(20);
    for (turn, (mask, head_dim, context)) in [
        (MaskMode::Chain, 256, 300),
        (MaskMode::Tree, 256, 70),
        (MaskMode::Chain, 64, 20),
        (MaskMode::Tree, 128, 200),
    ]
    .into_iter()
    .enumerate()
    {
        let (shape, rows) = (shape(mask, head_dim, 2, 1, 0), 5);
        let s = Sequence::new(&shape, context, rows, &mut random);
        let gates = random.bf16(s.q.len(), 3.0);
        let expected: Vec<f32> = s
            .reference(&shape)
            .iter()
            .zip(from_bf16(&gates))
            .map(|(x, gate)| x / (1.0 + (-gate).exp()))
            .collect();
        set_schedule(turn % 5);
        on_gpu(|device| {
            let capacity = context + rows;
            let batch = batch(device, &shape, rows, capacity.div_ceil(PAGE), std::slice::from_ref(&s));
            let gates = upload(device, &gates);
            let paged = dflash::gpu::kernels::attention::Paged { gates: Some(&gates), ..batch.paged() };
            let attention = Attention { layer: batch.layer, sequences: 1, block: rows, capacity };
            let partials = partials(device, &attention).unwrap();
            let kind = match mask {
                MaskMode::Tree => dflash::gpu::kernels::attention::Mask::Tree(&batch.masks),
                _ => dflash::gpu::kernels::attention::Mask::Chain,
            };
            attention.launch(device, &batch.out, &batch.q, paged, kind, &partials).unwrap();
            let error = relative_error(&from_bf16(&download(device, &batch.out)), &expected);
            assert!(error < BOUND, "{shape:?}, context {context}: {error:.1e}");
            if mask == MaskMode::Chain {
                let out = poisoned::<u16>(device, s.q.len());
                Prefill { layer: batch.layer, rows }.launch(device, &out, &batch.q, paged).unwrap();
                let error = relative_error(&from_bf16(&download(device, &out)), &expected);
                assert!(error < BOUND, "prompt of {shape:?}: {error:.1e}");
            }
        });
    }
}

#[test]
fn contexts_and_windows_equal_f64_in_a_ragged_batch() {
    on_gpu(|device| {
        let mut random = Random::new(2);
        for mask in [MaskMode::Chain, MaskMode::Tree, MaskMode::Block] {
            for window in [0, 1, 7, 64, 100] {
                for (head_dim, block) in [(64, 16), (128, 8)] {
                    let shape = shape(mask, head_dim, 2, 1, window);
                    let sequences: Vec<Sequence> = CONTEXTS
                        .iter()
                        .map(|&context| Sequence::new(&shape, context, random.below(block + 1), &mut random))
                        .collect();
                    check(device, &shape, block, &sequences);
                }
            }
        }
    });
}

#[test]
fn random_shapes_equal_f64() {
    on_gpu(|device| {
        let mut random = Random::new(16);
        for _ in 0..150 {
            let mask = [MaskMode::Chain, MaskMode::Tree, MaskMode::Block][random.below(3)];
            let (group, kv_heads) = (1 + random.below(8), 1 + random.below(2));
            let window = if random.below(2) == 0 { 0 } else { 1 + random.below(200) };
            let shape = shape(mask, [64, 128][random.below(2)], group * kv_heads, kv_heads, window);
            let block = 1 + random.below(if group > 4 { 12 } else { 24 });
            let mut sequence = || {
                let (context, rows) = (random.below(400), random.below(block + 1));
                Sequence::new(&shape, context, rows, &mut random)
            };
            let sequences = [sequence(), sequence()];
            check(device, &shape, block, &sequences);
        }
    });
}

#[test]
fn trees_and_blocks_of_64_rows_equal_f64() {
    on_gpu(|device| {
        let mut random = Random::new(3);
        for (mask, window) in
            [(MaskMode::Tree, 0), (MaskMode::Tree, 9), (MaskMode::Block, 20), (MaskMode::Chain, 30)]
        {
            // Eight tiles of 64 packed rows; seven tiles, some of which hold heads of two rows.
            for (heads, head_dim) in [(8, 64), (7, 128)] {
                let shape = shape(mask, head_dim, heads, 1, window);
                check(device, &shape, 64, &[Sequence::new(&shape, 100, 64, &mut random)]);
            }
        }
    });
}

#[test]
fn schedules_give_equal_bits() {
    let mut random = Random::new(4);
    for (mask, head_dim, (heads, kv_heads), window) in [
        (MaskMode::Chain, 64, (9, 3), 0),
        (MaskMode::Tree, 128, (8, 2), 100),
        (MaskMode::Tree, 64, (16, 1), 0),
        (MaskMode::Block, 64, (32, 1), 40),
        (MaskMode::Chain, 256, (6, 1), 0),
        (MaskMode::Tree, 256, (2, 1), 100),
    ] {
        let shape = shape(mask, head_dim, heads, kv_heads, window);
        let sequences: Vec<Sequence> =
            [(300, 16), (0, 0), (250, 13)].map(|(c, r)| Sequence::new(&shape, c, r, &mut random)).into();
        let test = |device: &dyn Device| to_bytes(&check(device, &shape, 16, &sequences).concat());
        assert_written(&same_bits(test), "out");
    }
}

/// The block that merges the splits of a KV head must find all partial results of the others.
#[test]
fn merging_waits_for_all_warps_of_the_other_blocks() {
    let shape = shape(MaskMode::Chain, 64, 32, 8, 0);
    let mut random = Random::new(17);
    let sequences: Vec<Sequence> = (0..4).map(|_| Sequence::new(&shape, 192, 16, &mut random)).collect();
    let device = TestGpu::new();
    let expected = run(&device, &shape, 16, &sequences);
    for schedule in 0..15 {
        set_schedule(schedule);
        assert!(run(&device, &shape, 16, &sequences) == expected, "schedule {schedule}");
    }
}

#[test]
fn ar_steps_equal_one_block_bit_for_bit() {
    on_gpu(|device| {
        let mut random = Random::new(5);
        // Borders of tiles (64), splits (128) and wider splits (1024, 4096).
        let far = [505, 1012, 1023, 2040, 4085];
        let near = [0, 48, 63, 64, 112, 120, 127, 128, 250, 300];
        for (i, &context) in near.iter().chain(&far).enumerate() {
            for window in if context > 300 { vec![0, 300] } else { vec![0, 7, 100] } {
                let head_dim = [64, 128, 256][i % 3];
                let shape = shape(MaskMode::Chain, head_dim, 4, 1, window);
                let s = Sequence::new(&shape, context, 16, &mut random);
                let block = check(device, &shape, 16, std::slice::from_ref(&s)).concat();
                assert!(steps(device, &shape, &s) == block, "context {context}, window {window}");
                // The same keys and rows in blocks of 2 or of 7; exhaustive: both.
                for size in [2, 7].into_iter().filter(|size| exhaustive() || size % 2 == i / 2 % 2) {
                    let mut again = Vec::new();
                    for first in (0..16).step_by(size) {
                        let width = shape.heads * head_dim;
                        let last = s.step(&shape, (first + size).min(16) - 1);
                        let rows = last.context + 1 - context - first;
                        let q = s.q[first * width..(first + rows) * width].to_vec();
                        let part = Sequence {
                            context: context + first,
                            rows,
                            masks: s.masks[..rows].to_vec(),
                            q,
                            ..last
                        };
                        again.extend(run(device, &shape, size, &[part]).concat());
                    }
                    assert!(again == block, "blocks of {size}: context {context}, window {window}");
                }
            }
        }
    });
}

/// A window over several groups of splits: the first visible split moves with the row, the group of a split
/// does not.
#[test]
fn window_bits_do_not_depend_on_the_first_visible_split() {
    let shape = shape(MaskMode::Chain, 64, 8, 1, 1200);
    // Splits begin at multiples of 256 here. The first visible positions of the eight rows lie on both sides
    // of such a border.
    for context in [2475, 2731, 2987] {
        let s = Sequence::new(&shape, context, 8, &mut Random::new(context as u64));
        assert_ne!(split_of(context - 1199), split_of(context + 7 - 1199));
        on_gpu(|device| {
            let block = run(device, &shape, 8, std::slice::from_ref(&s)).concat();
            assert!(steps(device, &shape, &s) == block, "context {context}");
        });
    }
}

/// An output that underflows is +0, both in one split and in a block with two splits.
#[test]
fn zero_has_the_same_sign_in_one_split_and_in_two() {
    on_gpu(|device| {
        let shape = shape(MaskMode::Chain, 64, 1, 1, 0);
        let mut s = Sequence::new(&shape, 120, 16, &mut Random::new(18));
        s.q = to_bf16(&vec![4.0; 16 * 64]);
        // The first tile gives about -1e-38, which the factor 2^-92 turns into -0; the second tile adds only
        // -0.
        s.k = to_bf16(&[vec![0.0; 64 * 64], vec![2.0; 72 * 64]].concat());
        s.v = to_bf16(&[vec![-1e-40; 64 * 64], vec![-0.0; 72 * 64]].concat());
        let block = run(device, &shape, 16, std::slice::from_ref(&s)).concat();
        assert!(block.iter().all(|&x| x == 0));
        assert!(steps(device, &shape, &s) == block);
    });
}

#[test]
fn bits_do_not_depend_on_batch_slot_block_or_capacity() {
    on_gpu(|device| {
        let mut random = Random::new(7);
        for (mask, rows) in [(MaskMode::Chain, 5), (MaskMode::Tree, 5), (MaskMode::Block, 5)] {
            let shape = shape(mask, 64, 3, 1, 0);
            let s = Sequence::new(&shape, 130, rows, &mut random);
            let other = |context, random: &mut Random| Sequence::new(&shape, context, rows, random);
            let alone = run(device, &shape, rows, std::slice::from_ref(&s)).concat();
            for (block, slot, capacity) in [(5, 0, 310), (6, 1, 500), (16, 2, 5000), (64, 1, 400)] {
                let mut sequences = vec![other(7, &mut random), other(300, &mut random)];
                sequences.insert(slot, s.clone());
                let out = run_with(device, &shape, block, capacity, &sequences);
                assert!(out[slot] == alone, "{mask:?} in blocks of {block}, slot {slot}");
            }
        }
    });
}

#[test]
fn nan_in_a_masked_key_or_value_reaches_no_row() {
    on_gpu(|device| {
        let mut random = Random::new(8);
        for (mask, window) in [
            (MaskMode::Chain, 0),
            (MaskMode::Chain, 20),
            (MaskMode::Tree, 0),
            (MaskMode::Tree, 4),
            (MaskMode::Block, 3),
        ] {
            for head_dim in [64, 128] {
                let shape = shape(mask, head_dim, 4, 2, window);
                let s = Sequence::new(&shape, 125, 8, &mut random);
                let clean = run(device, &shape, 8, std::slice::from_ref(&s)).concat();
                // One element or a whole value is NaN or infinite. Rows that do not attend to it keep their
                // bits.
                for slot in [110, 124, 125, 127, 128, 130, 132] {
                    for (in_key, elements, bits) in
                        [(true, 1, 0x7fc0), (false, 1, 0x7fc0), (false, head_dim, 0xff80), (false, 1, 0x7f80)]
                    {
                        let mut bad = s.clone();
                        let at = (slot * 2 + 1) * head_dim + 3 * (head_dim - elements) / 4;
                        let x = if in_key { &mut bad.k } else { &mut bad.v };
                        x[at..at + elements].fill(bits);
                        let out = run(device, &shape, 8, &[bad]).concat();
                        for (i, (out, clean)) in out.chunks(head_dim).zip(clean.chunks(head_dim)).enumerate()
                        {
                            let (row, head) = (i / 4, i % 4);
                            let what = format!(
                                "{shape:?}, slot {slot}, row {row}, head {head}, in key {in_key}, {bits:x}"
                            );
                            if head >= 2 && s.attends(&shape, row, slot) {
                                assert!(
                                    from_bf16(out).iter().any(|x| !x.is_finite()),
                                    "{what}: the output is finite"
                                );
                            } else {
                                assert!(out == clean, "{what}: other bits");
                            }
                        }
                    }
                }
                // A NaN in a query affects only its own row and head.
                let mut bad = s.clone();
                bad.q[(3 * 4 + 1) * head_dim] = 0x7fc0;
                let out = run(device, &shape, 8, &[bad]).concat();
                for (i, (out, clean)) in out.chunks(head_dim).zip(clean.chunks(head_dim)).enumerate() {
                    assert!(if i == 13 { from_bf16(out).iter().all(|x| x.is_nan()) } else { out == clean });
                }
            }
        }
    });
}

#[test]
fn garbage_lengths_pages_and_masks_stay_in_bounds() {
    on_gpu(|device| {
        let mut random = Random::new(9);
        let odd = [0, 1, 63, 64, 200, 319, 320, 321, 1 << 31, (1 << 31) - 1, u32::MAX - 1, u32::MAX];
        for turn in 0..60 {
            let mask = [MaskMode::Chain, MaskMode::Tree, MaskMode::Block][turn % 3];
            let shape = shape(mask, [64, 128][turn % 2], 3, 1, [0, 1, 70, 1 << 31][turn % 4]);
            let sequences: Vec<Sequence> =
                (0..3).map(|_| Sequence::new(&shape, 50, 5, &mut random)).collect();
            let batch = batch(device, &shape, 5, 5, &sequences);
            let mut pick =
                || if random.below(3) == 0 { random.next() as u32 } else { odd[random.below(odd.len())] };
            let words = |n: usize, pick: &mut dyn FnMut() -> u32| {
                (0..n).flat_map(|_| pick().to_le_bytes()).collect::<Vec<u8>>()
            };
            device.upload(&batch.spans, &words(6, &mut pick)).unwrap();
            if turn < 6 {
                // context + rows overflows to 0.
                let spans = [u32::MAX, 1, u32::MAX - 1, 2, u32::MAX - 4, 5];
                device.upload(&batch.spans, &to_bytes(&spans)).unwrap();
            }
            device.upload(&batch.masks, &words(30, &mut pick)).unwrap();
            if turn % 5 > 0 {
                device.upload(&batch.table, &words(15, &mut pick)).unwrap();
            }
            // A capacity that is not a multiple of a page or a tile.
            let attention = Attention { layer: batch.layer, sequences: 3, block: 5, capacity: 311 };
            let partials = partials(device, &attention).unwrap();
            launch(device, &batch, &attention, mask, &partials).unwrap();
            let prefill = Prefill { layer: batch.layer, rows: 15 };
            prefill.launch(device, &batch.out, &batch.q, batch.paged()).unwrap();
        }
    });
}

/// The outputs of a prefill of `s` in chunks of these sizes.
fn prefill(device: &dyn Device, shape: &Shape, chunks: &[usize], s: &Sequence) -> Vec<u16> {
    let (mut out, mut at, width) = (Vec::new(), 0, shape.heads * shape.head_dim);
    for &rows in chunks {
        let whole = s.step(shape, at + rows - 1);
        let q = s.q[at * width..(at + rows) * width].to_vec();
        let part = Sequence { context: s.context + at, rows, masks: vec![0; rows], q, ..whole };
        let capacity = rows + 3;
        let batch = batch(device, shape, capacity, (part.context + rows).div_ceil(PAGE) + 1, &[part]);
        let prefill = Prefill { layer: batch.layer, rows: capacity };
        prefill.launch(device, &batch.out, &batch.q, batch.paged()).unwrap();
        let got = download::<u16>(device, &batch.out);
        assert!(got[rows * width..].iter().all(|&x| x == POISON), "a row after the span was written");
        out.extend(&got[..rows * width]);
        at += rows;
    }
    out
}

#[test]
fn prefill_equals_f64_and_its_bits_do_not_depend_on_chunks() {
    let mut random = Random::new(10);
    for (head_dim, heads, kv_heads, window, context) in [
        (64, 4, 1, 0, 0),
        (128, 3, 1, 0, 70),
        (64, 1, 1, 50, 0),
        (128, 32, 1, 64, 200),
        (64, 9, 3, 1, 63),
        (256, 2, 1, 0, 0),
    ] {
        let shape = shape(MaskMode::Chain, head_dim, heads, kv_heads, window);
        let s = Sequence::new(&shape, context, 150, &mut random);
        same_bits(|device| to_bytes(&prefill(device, &shape, &[150], &s)));
        on_gpu(|device| {
            let whole = prefill(device, &shape, &[150], &s);
            let error = relative_error(&from_bf16(&whole), &s.reference(&shape));
            assert!(error < BOUND, "error {error:.1e}: {shape:?}");
            assert!(prefill(device, &shape, &[1, 64, 17, 68], &s) == whole, "{shape:?}");
            // If all keys are in one split, AR steps give the same bits.
            if context == 0 {
                let few = Sequence { rows: 128, ..s.clone() };
                let rows = few.rows * heads * head_dim;
                assert!(steps(device, &shape, &few) == whole[..rows], "{shape:?}");
            }
        });
    }
}

#[test]
fn prefill_takes_chunks_of_512_rows() {
    on_gpu(|device| {
        let rows = 512;
        let shape = shape(MaskMode::Chain, 64, 4, 1, 100);
        let s = Sequence::new(&shape, 10, rows, &mut Random::new(11));
        let out = prefill(device, &shape, &[rows], &s);
        assert!(relative_error(&from_bf16(&out), &s.reference(&shape)) < BOUND);
    });
}

#[test]
fn splits_cover_all_slots_in_order() {
    let mut slot = 0;
    for split in 0..200 {
        assert_eq!(split_start(split), slot);
        let next = split_start(split + 1);
        assert_eq!((split_of(slot), split_of(next - 1)), (split, split));
        slot = next;
    }
    assert_eq!([1024, 4096, 32768, 131_072].map(split_of), [8, 20, 76, 124]);
}

/// Contexts of more than 128k positions. The page table repeats five pages, and so does the reference.
#[test]
fn contexts_beyond_128k_equal_f64() {
    let device = TestGpu::new();
    contexts_beyond_128k(&device, || Some(device.counters_by_kernel()?["attention_64x16"].read as usize));
}

/// `read`: bytes read since the device was opened, if the device counts them.
fn contexts_beyond_128k(device: &dyn Device, read: impl Fn() -> Option<usize>) {
    let mut before = 0;
    let context = 131_100;
    let shape = shape(MaskMode::Chain, 64, 1, 1, 0);
    let mut random = Random::new(12);
    let few = Sequence::new(&shape, 5 * PAGE, 0, &mut random);
    let repeat = |x: &[u16]| x.iter().copied().cycle().take((context + 2) * 64).collect::<Vec<u16>>();
    let s = Sequence {
        context,
        rows: 2,
        masks: vec![1, 3],
        q: random.bf16(2 * 64, 1.0),
        k: repeat(&few.k),
        v: repeat(&few.v),
    };
    let per_sequence = (context + 2).div_ceil(PAGE);
    let mut b = batch(device, &shape, 2, per_sequence, std::slice::from_ref(&few));
    let table: Vec<u32> = download(device, &b.table);
    b.table = upload(device, &(0..per_sequence).map(|i| table[i % 5]).collect::<Vec<u32>>());
    b.spans = upload(device, &[context as u32, 2]);
    b.q = upload(device, &s.q);
    for (window, blocks) in [(0, split_of(context + 1) + 1), (1000, 2)] {
        b.layer.window = window;
        let attention = Attention { layer: b.layer, sequences: 1, block: 2, capacity: per_sequence * PAGE };
        let partials = partials(device, &attention).unwrap();
        launch(device, &b, &attention, MaskMode::Chain, &partials).unwrap();
        let expected = s.reference(&Shape { window, ..shape });
        let error = relative_error(&from_bf16(&download(device, &b.out)), &expected);
        assert!(error < BOUND, "window {window}: error {error:.1e}");
        // Keys and values, a page number per thread and tile, and partial results. Splits outside the window
        // only read the span.
        if let Some(read) = read() {
            let (bytes, visible) = (read - before, if window == 0 { context + 2 } else { window + 1 });
            let limit = visible * (256 + 9) + blocks * 4096 + 140 * 1024;
            assert!(bytes < limit, "{bytes} bytes read, window {window}, expected below {limit}");
            before = read;
        }
    }
}

#[test]
fn keys_and_values_are_read_once_without_bank_conflicts() {
    for (head_dim, rows) in [(64, 1), (128, 1), (64, 16), (128, 16)] {
        let Some(device) = TestGpu::counting() else { return };
        let shape = shape(MaskMode::Chain, head_dim, 4, 1, 0);
        let s = Sequence::new(&shape, 255 - rows, rows, &mut Random::new(13));
        run(&device, &shape, rows, std::slice::from_ref(&s));
        let counts = device.counts();
        let [(name, count), (_, merge)] = counts.iter().collect::<Vec<_>>()[..] else { panic!("{counts:?}") };
        assert_eq!(count.conflicts, 0, "{name}");
        let (keys, queries) = (255 * 2 * head_dim * 2, 2 * rows * 4 * head_dim * 2);
        let batch = batch(&device, &shape, rows, 4, std::slice::from_ref(&s));
        let attention = Attention { layer: batch.layer, sequences: 1, block: rows, capacity: 255 };
        assert_eq!(attention.bytes(&[(255 - rows, rows)]), (keys + queries) as u64);
        // Two splits: both read the queries. The 128 threads of each read 16 bytes of span and page table.
        let (packed, tables) = (rows * 4, 2 * 128 * 16);
        assert_eq!(count.read as usize - tables, keys + queries, "{name}");
        // A warp reads the span and the partial results of a row: the outputs and the sum of each split once, its
        // maximum twice.
        assert_eq!(merge.read as usize, packed * (32 * 8 + 2 * (4 * head_dim + 12)), "{name}");
        assert_eq!(merge.written as usize, packed * head_dim * 2, "{name}");
        // Scores, outputs, and the row sums in each warp that shares the rows.
        let (tiles, warps) = if rows == 1 { (1, 4) } else { (4, 1) };
        let products = tiles * 4 * 4 * (head_dim / 16 * 2 + 4 * head_dim / 32 + warps);
        assert_eq!(count.mma as usize, products, "{name}: tiles of 64 keys");
    }
}

/// Unless `DFLASH_EXHAUSTIVE=1`, longer contexts only have full tiles of 64 rows, the longest one and longer prompts only
/// one head.
#[test]
fn no_bank_conflicts_under_any_mask() {
    let counted = |what: &str, run: &dyn Fn(&TestGpu)| {
        let Some(device) = TestGpu::counting() else { return };
        run(&device);
        for (name, count) in device.counts() {
            assert!(count.shared > 0 || name.contains("merge"), "{name}");
            assert_eq!(count.conflicts, 0, "{name}: {what}, {} accesses", count.shared);
        }
    };
    let mut random = Random::new(17);
    for (head_dim, heads) in [(64, 3), (64, 1), (64, 8), (128, 1), (128, 4), (128, 5)] {
        for (context, window) in [(70, 0), (255, 100), (1300, 0)] {
            let whole = context == 70 || exhaustive();
            if heads > 1 && context == 1300 && !whole {
                continue;
            }
            for mask in [MaskMode::Chain, MaskMode::Tree, MaskMode::Block] {
                let shape = shape(mask, head_dim, heads, 1, window);
                for rows in [1, 7, 64].into_iter().filter(|&rows| whole || rows == 64) {
                    let mut s = Sequence::new(&shape, context, rows, &mut random);
                    // Trees are chains here: keys of a path that are not neighbours can share banks.
                    s.masks = (1..=rows).map(low).collect();
                    let what = format!("{shape:?}, {rows} rows after {context}");
                    counted(&what, &|device| drop(run(device, &shape, rows, std::slice::from_ref(&s))));
                }
            }
            if heads > 1 && !whole {
                continue;
            }
            let shape = shape(MaskMode::Chain, head_dim, heads, 1, window);
            let s = Sequence::new(&shape, context, 130, &mut random);
            let what = format!("a prompt, {shape:?} after {context}");
            counted(&what, &|device| drop(prefill(device, &shape, &[1, 64, 65], &s)));
        }
    }
}

#[test]
fn attention_graph_can_be_replayed() {
    on_gpu(|device| {
        let mut random = Random::new(14);
        let shape = shape(MaskMode::Chain, 64, 4, 2, 0);
        let s = [Sequence::new(&shape, 1200, 4, &mut random), Sequence::new(&shape, 200, 3, &mut random)];
        let batch = batch(device, &shape, 4, 19, &s);
        let attention = Attention { layer: batch.layer, sequences: 2, block: 4, capacity: 19 * PAGE };
        let partials = partials(device, &attention).unwrap();
        let graph =
            device.capture(&mut || launch(device, &batch, &attention, shape.mask, &partials)).unwrap();
        let mut first = None;
        for contexts in [[1200u32, 200], [100, 3], [1200, 200]] {
            device.fill(&batch.out, 0).unwrap();
            device.upload(&batch.spans, &to_bytes(&[contexts[0], 4, contexts[1], 3])).unwrap();
            device.replay(&graph).unwrap();
            let out = bytes_of(device, &batch.out);
            assert!(contexts[0] != 1200 || first.get_or_insert_with(|| out.clone()) == &out);
        }
    });
}

#[test]
fn unsupported_shapes_are_refused() {
    let device = TestGpu::new();
    let shape = shape(MaskMode::Tree, 64, 4, 2, 0);
    let s = [Sequence::new(&shape, 10, 2, &mut Random::new(15))];
    let batch = batch(&device, &shape, 2, 1, &s);
    let good = Attention { layer: batch.layer, sequences: 1, block: 2, capacity: 64 };
    let partials = partials(&device, &good).unwrap();
    launch(&device, &batch, &good, shape.mask, &partials).unwrap();
    let refused = |attention: Attention, part: &str| {
        let error = launch(&device, &batch, &attention, shape.mask, &partials).unwrap_err();
        assert!(matches!(&error, Error::Internal(text) if text.contains(part)), "{error}: {part}");
    };
    let layer = |layer: Layer| Attention { layer, ..good };
    refused(layer(Layer { heads: 66, ..good.layer }), "66 heads of 64 on 2 key/value heads");
    refused(layer(Layer { heads: 5, ..good.layer }), "5 heads of 64 on 2");
    refused(layer(Layer { kv_heads: 0, ..good.layer }), "on 0 key/value heads");
    refused(layer(Layer { head_dim: 96, ..good.layer }), "heads of 96");
    refused(layer(Layer { head_dim: 128, ..good.layer }), "out has 1024 bytes, needs 2048");
    refused(layer(Layer { pages: 4, ..good.layer }), "k has 49152 bytes, needs 65536");
    refused(Attention { block: 65, ..good }, "1 to 64 rows");
    refused(Attention { block: 3, ..good }, "needs");
    refused(Attention { capacity: 65, ..good }, "1 to 64 slots");
    refused(Attention { sequences: 2, ..good }, "needs");
    let prefill = |layer: Layer, rows: usize| {
        let refused = Prefill { layer, rows }.launch(&device, &batch.out, &batch.q, batch.paged());
        refused.unwrap_err().to_string()
    };
    assert!(prefill(good.layer, 3).contains("kernel attention_prefill: out has 1024 bytes, needs 1536"));
    assert!(prefill(good.layer, 0).contains("0 rows"));
    assert!(prefill(Layer { head_dim: 80, ..good.layer }, 2).contains("heads of 80"));
    let vast = Layer { pages_per_sequence: 1 << 20, ..good.layer };
    refused(Attention { layer: vast, capacity: 1 << 26, ..good }, "67108864 slots; expected at most 901120");
}
