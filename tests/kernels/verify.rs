//! Exact verification of chains and trees on a device, against `match_chain` and `match_tree` of
//! `src/spec/verify.rs`.

use crate::support::kernel;

use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::verify::{Verify, VerifyOutput};
use dflash::spec::verify::{match_chain, match_tree};
use kernel::*;

const NONE: u32 = u32::MAX;

/// A batch of blocks to verify: `[sequences]` rows, `[sequences][block]` of the rest.
struct Blocks {
    block: usize,
    rows: Vec<u32>,
    choices: Vec<u32>,
    tokens: Vec<u32>,
    parents: Option<Vec<u32>>,
}

impl Blocks {
    /// Per sequence: number of accepted drafts, next token, path padded with NONE.
    fn run(&self, device: &dyn Device) -> Vec<(u32, u32, Vec<u32>)> {
        let (sequences, block) = (self.rows.len(), self.block);
        let spans: Vec<u32> = self.rows.iter().flat_map(|&rows| [7, rows]).collect();
        let [accepted, next, path] =
            [sequences, sequences, sequences * block].map(|count| poisoned::<u32>(device, count));
        let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
        let parents = self.parents.as_ref().map(|p| upload(device, p));
        let [choices, tokens, spans] = [&self.choices, &self.tokens, &spans].map(|data| upload(device, data));
        Verify { sequences, block }
            .launch(device, output, &choices, &tokens, parents.as_ref(), &spans)
            .unwrap();
        let words = |buffer: &Buffer| download::<u32>(device, buffer);
        let paths = words(&path).chunks(block).map(<[u32]>::to_vec).collect::<Vec<_>>();
        words(&accepted).into_iter().zip(words(&next)).zip(paths).map(|((a, n), p)| (a, n, p)).collect()
    }

    fn expected(&self, sequence: usize) -> (u32, u32, Vec<u32>) {
        let block = self.block;
        let rows = (self.rows[sequence] as usize).min(block);
        let of = |all: &[u32]| all[sequence * block..][..rows].to_vec();
        let (choices, tokens) = (of(&self.choices), of(&self.tokens));
        let parents = match &self.parents {
            Some(parents) => of(parents),
            None => (0..rows as u32).map(|row| row.wrapping_sub(1)).collect(),
        };
        let mut path = vec![NONE; block];
        let mut visited = Vec::new();
        let target = |row: usize| {
            visited.push(row as u32);
            Some(choices[row]).filter(|&c| c != NONE)
        };
        let (accepted, next) = match rows {
            0 => (0, NONE),
            _ => match match_tree(&tokens, &parents, target) {
                Some((rows, next)) => (rows.len() as u32 - 1, next),
                None => (visited.len() as u32 - 1, NONE),
            },
        };
        path[..visited.len()].copy_from_slice(&visited);
        (accepted, next, path)
    }

    fn check(&self, device: &dyn Device) {
        for (sequence, got) in self.run(device).into_iter().enumerate() {
            assert_eq!(got, self.expected(sequence), "sequence {sequence} of blocks of {}", self.block);
            if self.parents.is_none() && self.rows[sequence] > 0 {
                // For chains, `match_chain` gives the same.
                let rows = (self.rows[sequence] as usize).min(self.block);
                let drafts = &self.tokens[sequence * self.block..][1..rows];
                let target = |row| Some(self.choices[sequence * self.block + row]).filter(|&c| c != NONE);
                let expected = match_chain(drafts, target).map(|(accepted, next)| (accepted as u32, next));
                assert_eq!(expected, Some((got.0, got.1)).filter(|&(_, next)| next != NONE));
            }
        }
    }
}

fn blocks(random: &mut Random, block: usize, trees: bool) -> Blocks {
    let sequences = 1 + random.below(16);
    // Few different tokens, so that drafts are accepted and siblings repeat; NONE is an invalid row.
    let tokens = 1 + random.below(3);
    let word = |random: &mut Random| if random.below(40) == 0 { NONE } else { random.below(tokens) as u32 };
    let all = |random: &mut Random| (0..sequences * block).map(|_| word(random)).collect::<Vec<u32>>();
    let (choices, drafts) = (all(random), all(random));
    let parent = |random: &mut Random, row: usize| match random.below(20) {
        0 => random.next() as u32,
        1 => row as u32,
        2 => 64 + random.below(8) as u32,
        // Also a later row: the child of a later row is unreachable.
        3 => random.below(block) as u32,
        _ => random.below(row.max(1)) as u32,
    };
    let parents = trees.then(|| (0..sequences * block).map(|i| parent(random, i % block)).collect());
    let rows = (0..sequences)
        .map(|_| match random.below(6) {
            0 => 0,
            1 => random.below(block + 1) as u32,
            2 => random.next() as u32,
            _ => block as u32,
        })
        .collect();
    Blocks { block, rows, choices, tokens: drafts, parents }
}

#[test]
fn output_equals_match_chain_and_match_tree() {
    let mut random = Random::new(21);
    let batches = 30;
    for i in 0..batches {
        for block in [1, 2, 7, 16, 31, 32, 33, 63, 64] {
            for trees in [false, true] {
                let blocks = blocks(&mut random, block, trees);
                on_gpu_in_turn(i, |device| blocks.check(device));
            }
        }
    }
}

#[test]
fn whole_blocks_and_deep_trees_equal_the_reference() {
    on_gpu(|device| {
        for block in [1usize, 16, 33, 64] {
            // Every draft is accepted; none is; one in the middle is rejected.
            for wrong in [None, Some(1), Some(block / 2)] {
                let drafts: Vec<u32> = (0..block as u32).collect();
                let mut choices: Vec<u32> = (1..=block as u32).collect();
                if let Some(row) = wrong.filter(|&row| row > 0) {
                    choices[row - 1] = 1000;
                }
                let chain = (0..block as u32).map(|row| row.wrapping_sub(1)).collect();
                for parents in [None, Some(chain)] {
                    let blocks = Blocks {
                        block,
                        rows: vec![block as u32],
                        choices: choices.clone(),
                        tokens: drafts.clone(),
                        parents,
                    };
                    blocks.check(device);
                    let accepted =
                        wrong.filter(|&row| row > 0 && row < block).map_or(block - 1, |row| row - 1);
                    assert_eq!(blocks.run(device)[0].0, accepted as u32);
                }
            }
        }
    });
}

#[test]
fn output_is_the_same_under_every_schedule() {
    let blocks = blocks(&mut Random::new(23), 64, true);
    let bytes = same_bits(|device| {
        let all = blocks.run(device);
        all.into_iter().flat_map(|(a, n, p)| to_bytes(&[&[a, n][..], &p].concat())).collect()
    });
    assert!(!bytes.is_empty());
    assert_written(&bytes, "the output");
}

#[test]
fn match_tree_takes_the_lowest_of_equal_siblings() {
    // Row (token): 1 (5), 2 (5) and 3 (6) follow 0; 4 (7) follows 2; 5 (8) follows 1; 6 (5) names itself as
    // its parent and is unreachable.
    let (tokens, parents) = ([9, 5, 5, 6, 7, 8, 5], [0, 0, 0, 0, 2, 1, 6]);
    let verify = |choices: [u32; 7]| match_tree(&tokens, &parents, move |row| Some(choices[row]));
    assert_eq!(verify([5, 8, 7, 0, 0, 3, 0]), Some((vec![0, 1, 5], 3)));
    assert_eq!(verify([5, 7, 7, 0, 0, 3, 0]), Some((vec![0, 1], 7)));
    assert_eq!(verify([6, 0, 0, 5, 0, 0, 0]), Some((vec![0, 3], 5)));
    assert_eq!(verify([4, 0, 0, 0, 0, 0, 0]), Some((vec![0], 4)));
    assert_eq!(match_tree(&tokens, &parents, |row| (row == 0).then_some(5)), None);
    assert_eq!(match_tree(&[9], &[0], |_| Some(2)), Some((vec![0], 2)));
}
