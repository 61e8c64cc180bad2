//! Attention under tree masks: every row has the bits of its path as a chain.

use crate::support::attention;
use crate::support::kernel;

use crate::support::test_gpu::TestGpu;
use attention::*;
use dflash::gpu::device::Device;
use kernel::*;

#[test]
fn ar_steps_equal_a_tree_that_is_a_chain_of_64_rows() {
    on_gpu(|device| {
        let mut random = Random::new(6);
        for (context, heads, window) in [(100, 4, 0), (40, 3, 50)] {
            let chain = shape(MaskMode::Chain, 64, heads, 1, window);
            let s = Sequence::new(&chain, context, 64, &mut random);
            let tree = Shape { mask: MaskMode::Tree, ..chain };
            let block = check(device, &tree, 64, std::slice::from_ref(&s));
            assert!(steps(device, &chain, &s) == block[0]);
            assert!(run(device, &chain, 64, &[s]) == block);
        }
    });
}

/// Parents of a random tree of `rows` rows, of five kinds: a chain with few branches; any tree; many short
/// paths; many short paths and a long one whose keys lie farther apart with depth; two chains that start at
/// the context.
fn parents(kind: usize, rows: usize, random: &mut Random) -> Vec<usize> {
    let parent = |row: usize, random: &mut Random| match kind % 5 {
        0 if random.below(8) > 0 => row - 1,
        0 | 1 => random.below(row),
        2 => random.below(row.min(4)),
        3 if row.is_multiple_of(3) => row - 3,
        3 => row / 3 * 3,
        _ if row < 3 => NONE,
        _ => row - 2,
    };
    (1..rows).map(|row| parent(row, random)).collect()
}

/// The outputs of a tree's paths as chains: one chain per leaf, all in one launch. Every row of the tree must
/// equal its row in them.
fn as_chains(device: &dyn Device, shape: &Shape, s: &Sequence) -> Vec<u16> {
    let width = shape.heads * shape.head_dim;
    let is_leaf = |row: &usize| s.masks[row + 1..].iter().all(|mask| mask >> row & 1 == 0);
    let leaves: Vec<Vec<usize>> = (0..s.rows).filter(is_leaf).map(|leaf| s.path(leaf)).collect();
    let chains: Vec<Sequence> = leaves.iter().map(|path| s.chain(shape, path)).collect();
    let block = leaves.iter().map(Vec::len).max().unwrap_or(1);
    let found = run(device, &Shape { mask: MaskMode::Chain, ..*shape }, block, &chains);
    let mut out = vec![POISON; s.rows * width];
    for (path, found) in leaves.iter().zip(&found) {
        for (row, found) in path.iter().zip(found.chunks(width)) {
            out[row * width..][..width].copy_from_slice(found);
        }
    }
    assert_written(&to_bytes(&out), "a row on no path");
    out
}

/// Runs a batch of trees and asserts that each row has the bits of its path as a chain.
fn trees_equal_chains(device: &dyn Device, shape: &Shape, block: usize, trees: &[Sequence]) {
    let found = check(device, shape, block, trees);
    for (s, found) in trees.iter().zip(&found).filter(|(s, _)| s.rows > 0) {
        let (expected, width) = (as_chains(device, shape, s), shape.heads * shape.head_dim);
        for (row, (found, expected)) in found.chunks(width).zip(expected.chunks(width)).enumerate() {
            let what = format!("{shape:?}, {} rows after {}: row {row}", s.rows, s.context);
            assert!(found == expected, "{what}, path {:?}, has other bits", s.path(row));
        }
    }
}

/// Borders of tiles and splits before, between and after the rows of trees, and trees on a single page.
#[test]
fn every_tree_row_equals_its_path_as_a_chain_bit_for_bit() {
    on_gpu(|device| {
        let mut random = Random::new(20);
        let contexts: Vec<usize> =
            [0, 1, 47].into_iter().chain(55..66).chain(112..130).chain([191, 250]).collect();
        let turns = 3 * contexts.len();
        for turn in 0..turns {
            let group = [1, 2, 4, 8, 3, 5][turn % 6];
            let kv_heads = 1 + random.below(2);
            let window = [0, 0, 1 + random.below(8), 1 + random.below(150)][random.below(4)];
            let shape = shape(MaskMode::Tree, [64, 128][turn / 6 % 2], group * kv_heads, kv_heads, window);
            let rows = if turn % 4 == 0 { 64 } else { 2 + random.below(24) };
            let context = contexts[turn * 5 % contexts.len()];
            let parents = parents(turn, rows, &mut random);
            trees_equal_chains(
                device,
                &shape,
                rows,
                &[Sequence::tree(&shape, context, &parents, &mut random)],
            );
        }
    });
}

#[test]
fn trees_in_a_ragged_batch_equal_chains_bit_for_bit() {
    on_gpu(|device| {
        let mut random = Random::new(21);
        for (head_dim, heads, window) in [(64, 4, 0), (128, 3, 0), (64, 1, 70), (128, 8, 5)] {
            let shape = shape(MaskMode::Tree, head_dim, heads, 1, window);
            let mut trees: Vec<Sequence> = [(63, 20), (0, 1), (120, 24), (64, 7), (190, 23)]
                .iter()
                .enumerate()
                .map(|(i, &(context, rows))| {
                    Sequence::tree(&shape, context, &parents(i, rows, &mut random), &mut random)
                })
                .collect();
            trees.insert(2, Sequence::new(&shape, 300, 0, &mut random));
            trees_equal_chains(device, &shape, 24, &trees);
        }
    });
}

/// Trees across the borders between splits of 128, 256 and 512 slots. The path to its deepest row is compared
/// with AR steps: the first two rows, every fourth and the last, or every row with `DFLASH_EXHAUSTIVE=1`.
#[test]
fn a_tree_across_wider_splits_equals_ar_steps() {
    on_gpu(|device| {
        let mut random = Random::new(22);
        let contexts: &[usize] = &[1010, 4060, 4095, 4600];
        for (turn, &context) in contexts.iter().enumerate() {
            let shape = shape(MaskMode::Tree, [64, 128][turn % 2], 4, 1, [0, 0, 300][turn % 3]);
            let s = Sequence::tree(&shape, context, &parents(4, 64, &mut random), &mut random);
            let found = run(device, &shape, 64, std::slice::from_ref(&s)).concat();
            let row = (0..64).max_by_key(|&row| s.masks[row].count_ones()).unwrap();
            let path = s.path(row);
            let width = shape.heads * shape.head_dim;
            let (chain, step_shape) = (s.chain(&shape, &path), Shape { mask: MaskMode::Chain, ..shape });
            // A step over so long a context is slow.
            let last = path.len() - 1;
            let compared = |i: &usize| exhaustive() || *i < 2 || i.is_multiple_of(4) || *i == last;
            for i in (0..=last).filter(compared) {
                let step = run(device, &step_shape, 1, &[chain.step(&step_shape, i)]).concat();
                let row = path[i];
                assert!(found[row * width..][..width] == step, "row {row} after {context}");
            }
        }
    });
}

/// A NaN in a key or value, in one slot of the tree or of the page before it at a time. Rows that do not
/// attend to the slot keep their bits; the others equal a chain with the same NaN.
#[test]
fn nan_on_another_path_reaches_no_row() {
    on_gpu(|device| {
        let mut random = Random::new(23);
        for (turn, (context, window)) in [(60, 0), (100, 0), (127, 30), (64, 0)].into_iter().enumerate() {
            let shape = shape(MaskMode::Tree, [64, 128][turn % 2], 2, 1, window);
            let s = Sequence::tree(&shape, context, &parents(turn, 12, &mut random), &mut random);
            let clean = run(device, &shape, 12, std::slice::from_ref(&s)).concat();
            let slots = context.saturating_sub(3)..context + 12;
            for (slot, in_key) in slots.flat_map(|slot| [(slot, true), (slot, false)]) {
                let mut bad = s.clone();
                let x = if in_key { &mut bad.k } else { &mut bad.v };
                x[slot * shape.head_dim + 5] = 0x7fc0;
                let found = run(device, &shape, 12, std::slice::from_ref(&bad)).concat();
                assert!(found == as_chains(device, &shape, &bad), "slot {slot} after {context}, {in_key}");
                let width = 2 * shape.head_dim;
                for (row, (found, clean)) in found.chunks(width).zip(clean.chunks(width)).enumerate() {
                    let reached = from_bf16(found).iter().any(|x| x.is_nan());
                    assert_eq!(
                        reached,
                        s.attends(&shape, row, slot),
                        "slot {slot} after {context}, row {row}"
                    );
                    assert!(reached || found == clean, "slot {slot} after {context}, row {row}");
                }
            }
        }
    });
}

/// Mask bits of rows that do not exist, or whose slot is after the capacity, select no key.
#[test]
fn mask_bits_of_missing_rows_are_ignored() {
    on_gpu(|device| {
        let mut random = Random::new(26);
        for (head_dim, context) in [(64, 70), (128, 50)] {
            let shape = shape(MaskMode::Tree, head_dim, 3, 1, 0);
            let s = Sequence::tree(&shape, context, &parents(1, 12, &mut random), &mut random);
            let clean = run(device, &shape, 12, std::slice::from_ref(&s)).concat();
            let mut more = s.clone();
            more.masks.iter_mut().for_each(|mask| *mask |= !low(12));
            assert!(run(device, &shape, 12, &[more]).concat() == clean, "head dimension {head_dim}");
            let mut fewer = s.clone();
            fewer.masks.iter_mut().for_each(|mask| *mask &= low(7));
            let found = run_with(device, &shape, 12, context + 7, &[s]).concat();
            assert!(
                found[..7 * 3 * head_dim] == clean[..7 * 3 * head_dim],
                "head dimension {head_dim}, capacity for 7 rows"
            );
            assert!(
                found == run(device, &shape, 12, &[fewer]).concat(),
                "head dimension {head_dim}, rows after these"
            );
        }
    });
}

#[test]
fn trees_give_equal_bits_in_every_schedule() {
    let mut random = Random::new(24);
    for (head_dim, heads, window) in [(128, 2, 0), (64, 8, 40)] {
        let shape = shape(MaskMode::Tree, head_dim, heads, 1, window);
        let mut trees = vec![Sequence::new(&shape, 10, 0, &mut random)];
        for (i, (context, rows)) in [(121, 30), (63, 16), (250, 9)].into_iter().enumerate() {
            trees.push(Sequence::tree(&shape, context, &parents(i + 1, rows, &mut random), &mut random));
        }
        let expected: Vec<u16> =
            trees.iter().filter(|s| s.rows > 0).flat_map(|s| as_chains(gpu(), &shape, s)).collect();
        let test = |device: &dyn Device| to_bytes(&run(device, &shape, 30, &trees).concat());
        assert!(same_bits(test) == to_bytes(&expected));
    }
}

/// A row multiplies only the keys on its own path, and both pages of a tree are read once.
#[test]
fn trees_load_only_keys_that_their_rows_attend_to() {
    if TestGpu::counting().is_none() {
        return;
    }
    let shape = shape(MaskMode::Tree, 64, 4, 1, 0);
    // Four rows that follow the context, at the start of a page and within one; a chain of 20 rows, where four
    // rows attend to the 17th position. Then the tiles of 16 packed rows, and the pairs of a row and 16 keys of
    // its path.
    let cases = [(256, vec![NONE; 3], 1, 4), (300, vec![NONE; 3], 1, 4), (256, (0..19).collect(), 8, 24)];
    for (context, parents, packed_tiles, path_tiles) in cases {
        let rows = parents.len() + 1;
        let s = Sequence::tree(&shape, context, &parents, &mut Random::new(25));
        let count = |shape: &Shape| {
            let device = TestGpu::new();
            run(&device, shape, rows, std::slice::from_ref(&s));
            device.counts().into_values().next().unwrap()
        };
        let (tree, chain) = (count(&shape), count(&Shape { mask: MaskMode::Chain, ..shape }));
        // Per 16 packed rows and 16 keys: 8 products of queries and keys, 8 of weights and values, and the row sums
        // in each warp that shares the rows.
        let products = if rows == 4 { 20 } else { 17 } * (context / 16 * packed_tiles + path_tiles);
        assert_eq!(tree.mma as usize, products, "{rows} rows after {context}");
        // Masks come on top: every thread reads two, 32 threads read one per row, and one is read per packed
        // row.
        let masks = tree.blocks as usize * (128 * 16 + rows * 32 * 8 + 64 * 8);
        assert!((tree.read as usize) < chain.read as usize + masks, "{} against {}", tree.read, chain.read);
    }
}
