//! Draft trees on the device against `src/spec/tree.rs`: the drafter's choices, the trees built from them,
//! and the moves of keys and values on accepted paths.

use crate::support::kernel;

use crate::support::test_gpu::TestGpu;
use dflash::Error;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::PAGE;
use dflash::gpu::kernels::choices::Choices;
use dflash::gpu::kernels::compact::Compact;
use dflash::gpu::kernels::round::{DraftShape, Finish, Record, Ring, Round, Sequence, Tables};
use dflash::gpu::kernels::sample::{SamplerInputs, tables};
use dflash::gpu::kernels::tree::{TreeBuild, Trees};
use dflash::gpu::kernels::verify::{Verify, VerifyOutput};
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::SamplingParams;
use dflash::spec::tree::{Choice, Tree, chains, choices, compaction_moves, shape, typical_cost};
use dflash::spec::verify::match_tree;
use kernel::*;

const NONE: u32 = u32::MAX;

// ---- choices ----

/// Rows of logits, and whether each belongs to a sequence.
struct Rows {
    vocab: usize,
    per_row: usize,
    logits: Vec<f32>,
    valid: Vec<bool>,
}

impl Rows {
    fn random(random: &mut Random, rows: usize, vocab: usize, per_row: usize) -> Rows {
        let valid = (0..rows).map(|_| random.below(10) > 0).collect();
        Rows { vocab, per_row, logits: (0..rows).flat_map(|_| logits(random, vocab)).collect(), valid }
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.logits[row * self.vocab..][..self.vocab]
    }

    /// The counts, then the choices, of the reference.
    fn expected(&self) -> Vec<u32> {
        let (mut counts, mut all) = (vec![], vec![]);
        for (row, valid) in self.valid.iter().enumerate() {
            let found = if *valid { choices(self.row(row), self.per_row) } else { Some(vec![]) };
            counts.push(found.as_ref().map_or(NONE, |found| found.len() as u32));
            let mut list: Vec<u32> =
                found.iter().flatten().flat_map(|choice| [choice.token, choice.cost]).collect();
            list.resize(self.per_row * 2, NONE);
            all.extend(list);
        }
        [counts, all].concat()
    }

    fn best(&self) -> Vec<u64> {
        (0..self.valid.len()).flat_map(|row| best_keys(self.row(row))).collect()
    }

    fn run(&self, device: &dyn Device, best: &[u64]) -> Vec<u32> {
        let rows = self.valid.len();
        let (vocab, per_row) = (self.vocab, self.per_row);
        let kernel = Choices { rows, vocab, blocks: vocab.div_ceil(128), reduced: false, per_row };
        let (counts, list) =
            (poisoned::<u32>(device, rows), poisoned::<u32>(device, rows * self.per_row * 2));
        let table: Vec<u32> =
            self.valid.iter().flat_map(|valid| [if *valid { 0 } else { NONE }, 7, NONE, NONE]).collect();
        let (keys, logits) = (upload(device, best), upload(device, &self.logits));
        let (table, tables) = (upload(device, &table), constant(device, &tables()));
        let (partial, counters) =
            (poisoned::<u64>(device, rows * vocab.div_ceil(8192)), upload(device, &vec![0u32; rows]));
        let inputs = SamplerInputs {
            logits: &logits,
            sequences: &table,
            tables: &tables,
            partial: &partial,
            counters: &counters,
        };
        kernel.launch(device, &list, &counts, &keys, &table, inputs).unwrap();
        let found = [download::<u32>(device, &counts), download(device, &list)].concat();
        // Once more, because a replayed graph does not clear the counters.
        let scattered: Vec<u64> =
            (0..rows).flat_map(|row| best_keys_of_scattered_ids(self.row(row))).collect();
        let kernel = Choices { reduced: true, ..kernel };
        kernel.launch(device, &list, &counts, &upload(device, &scattered), &table, inputs).unwrap();
        let again = [download::<u32>(device, &counts), download(device, &list)].concat();
        if best == self.best() {
            assert_eq!(found, again, "blocks of other ids");
        }
        found
    }

    #[track_caller]
    fn check(&self, device: &dyn Device, what: &str) {
        let (got, expected) = (self.run(device, &self.best()), self.expected());
        let rows = self.valid.len();
        for row in 0..rows {
            let of = |words: &[u32]| {
                (words[row], words[rows + row * self.per_row * 2..][..self.per_row * 2].to_vec())
            };
            assert_eq!(
                of(&got),
                of(&expected),
                "{what}, vocabulary {}, {} best, row {row}",
                self.vocab,
                self.per_row
            );
        }
    }
}

#[test]
fn choices_equal_the_host_on_random_rows() {
    let mut random = Random::new(31);
    for (vocab, batches) in [(1, 5), (2, 10), (3, 10), (17, 20), (63, 10), (130, 40), (2048, 30), (9001, 10)]
    {
        for i in 0..cases(1 + batches / 2, batches) {
            let per_row = [1, 63, 7, 1 + random.below(63)][i % 4];
            let rows = Rows::random(&mut random, 16, vocab, per_row);
            on_gpu_in_turn(i, |device| rows.check(device, &format!("batch {i}")));
        }
    }
}

#[test]
fn choices_are_the_same_under_every_schedule() {
    for (vocab, per_row) in [(2, 5), (17, 63), (2047, 63), (20000, 31)] {
        let rows = Rows::random(&mut Random::new(vocab as u64), 8, vocab, per_row);
        let bytes = same_bits(|device| to_bytes(&rows.run(device, &rows.best())));
        assert_eq!(from_bytes::<u32>(&bytes), rows.expected());
    }
}

#[test]
fn choices_of_a_vocabulary_of_151936_equal_the_host() {
    let vocab = 151936;
    let logits = Random::new(5).normals(3 * vocab, 3.0);
    let rows = Rows { vocab, per_row: 63, logits, valid: vec![true; 3] };
    on_gpu(|device| rows.check(device, "Qwen3"));
}

#[test]
fn choices_cut_ties_as_the_host_does() {
    on_gpu(|device| {
        let mut random = Random::new(8);
        let vocab = 301;
        let near = |random: &mut Random| f32::from_bits(20f32.to_bits() - random.below(5) as u32);
        for per_row in [1, 2, 20, 62, 63] {
            let flat = vec![-1.5; vocab];
            let near: Vec<f32> = (0..vocab).map(|_| near(&mut random)).collect();
            let steps: Vec<f32> = (0..vocab).map(|id| -((id % 7) as f32)).collect();
            // Most tokens have weight 0; those of the tail that remain have weight 1.
            let few: Vec<f32> = (0..vocab).map(|id| if id % 9 == 0 { -22.1 } else { -23.0 }).collect();
            let few = [&few[1..], &[0.0]].concat();
            let logits = [flat, near, steps, few].concat();
            Rows { vocab, per_row, logits, valid: vec![true; 4] }.check(device, "ties");
        }
        // Ids that differ only in their upper digits.
        let vocab = 70000;
        let mut row = vec![-50.0; vocab];
        (0..vocab).step_by(3001).for_each(|id| row[id] = 2.0);
        for per_row in [1, 5, 23, 24, 40] {
            Rows { vocab, per_row, logits: row.clone(), valid: vec![true] }.check(device, "spread");
        }
    });
}

#[test]
fn garbage_in_keys_and_logits_stays_in_bounds() {
    on_gpu(|device| {
        let mut random = Random::new(12);
        for i in 0..30 {
            let per_row = 1 + random.below(63);
            let mut rows = Rows::random(&mut random, 4, [1, 7, 300, 5000][i % 4], per_row);
            if i % 2 == 0 {
                rows.logits.iter_mut().for_each(|l| *l = f32::from_bits(random.next() as u32));
            }
            let best: Vec<u64> = rows
                .best()
                .iter()
                .map(|key| if i % 3 == 0 { *key } else { key ^ random.next() >> 20 })
                .collect();
            let counts = rows.run(device, &best);
            assert!(counts[..4].iter().all(|&count| count == NONE || count as usize <= rows.per_row));
        }
    });
}

// ---- trees ----

/// A sequence at `length` whose drafter may draft `levels` positions.
fn sequence(active: bool, length: u32, anchor: u32, levels: u32) -> Sequence {
    let sampling = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 };
    Sequence {
        active,
        length,
        anchor,
        pending: 0,
        budget: 100,
        end: 1 << 20,
        draft_end: length + levels + 1,
        block: 64,
        rows: 64,
        form: DraftShape::BestFirst,
        sampling,
        stop_ids: vec![],
        finish: Finish::Running,
        rounds: 0,
        drafted: 0,
        accepted: 0,
        min_confidence: 0.0,
        verify_method: VerifyMethod::Match,
    }
}

/// A batch of trees to build. `choices[sequence][level]`; `None`: an invalid row. Sequences that draft chains
/// use `drafts` `[sequences][block]` instead.
struct TreeBatch {
    build: TreeBuild,
    sequences: Vec<Sequence>,
    choices: Vec<Vec<Option<Vec<Choice>>>>,
    drafts: Vec<u32>,
}

/// Number of rows of the sequence's block.
fn block_rows(s: &Sequence, block: usize) -> usize {
    let left = |end: u32| (end as usize).saturating_sub(s.length as usize);
    (s.block as usize).min(block).min(left(s.draft_end)).min(left(s.end).saturating_sub(1)).max(1)
}

/// The outputs of a launch.
#[derive(Debug, PartialEq)]
struct Built {
    tokens: Vec<u32>,
    parents: Vec<u32>,
    masks: Vec<u64>,
    table: Vec<u32>,
    spans: Vec<u32>,
}

impl TreeBatch {
    fn random(random: &mut Random, block: usize, max_verify_rows: usize, per_row: usize) -> TreeBatch {
        let count = 1 + random.below(6);
        let (mut sequences, mut all) = (vec![], vec![]);
        for _ in 0..count {
            let levels = [block - 1, random.below(block)][random.below(2)];
            let (length, anchor) = (1 + random.below(4000) as u32, random.below(9) as u32);
            let mut state = sequence(random.below(8) > 0, length, anchor, levels as u32);
            state.rows = [64, 1 + random.below(64) as u32][random.below(2)];
            state.form =
                [DraftShape::Chain, DraftShape::SampledTree, DraftShape::BestFirst, DraftShape::BestFirst]
                    [random.below(4)];
            state.verify_method = [VerifyMethod::Rejection, VerifyMethod::Block][random.below(2)];
            sequences.push(state);
            // Few different costs give many ties, a large range few.
            let spread = [1, 2, 4, 40, 1 << 20][random.below(5)];
            let invalid = random.below(12) == 0;
            let mut level = || {
                let count = [per_row, random.below(per_row + 1)][usize::from(random.below(4) == 0)];
                let mut costs: Vec<u32> = (0..count).map(|_| random.below(spread) as u32).collect();
                costs.sort_unstable();
                let first = random.below(1000) as u32;
                (0u32..).zip(costs).map(|(i, cost)| Choice { token: first + i * 7 % 64, cost }).collect()
            };
            let mut levels: Vec<Option<Vec<Choice>>> = (0..block - 1).map(|_| Some(level())).collect();
            if invalid && block > 1 {
                levels[random.below(block - 1)] = None;
            }
            all.push(levels);
        }
        let drafts =
            (0..count * block).map(|_| [random.below(9) as u32, NONE][usize::from(random.below(40) == 0)]);
        let (build, drafts) =
            (TreeBuild { sequences: count, block, max_verify_rows, per_row }, drafts.collect());
        TreeBatch { build, sequences, choices: all, drafts }
    }

    fn run(&self, device: &dyn Device) -> Built {
        let (list, counts) = self.inputs();
        let states: Vec<u8> = self.sequences.iter().flat_map(|s| s.to_bytes().unwrap()).collect();
        self.launch(device, &list, &counts, &states)
    }

    /// Choices and counts in the kernel's layout.
    fn inputs(&self) -> (Vec<u32>, Vec<u32>) {
        let TreeBuild { sequences, block, per_row, .. } = self.build;
        let mut list = vec![0xabcd_ef01u32; sequences * block * per_row * 2];
        let mut counts = vec![NONE; sequences * block];
        for (seq, levels) in self.choices.iter().enumerate() {
            for (level, choices) in levels.iter().enumerate() {
                let row = seq * block + level + 1;
                counts[row] = choices.as_ref().map_or(NONE, |choices| choices.len() as u32);
                for (rank, choice) in choices.iter().flatten().enumerate() {
                    list[(row * per_row + rank) * 2..][..2].copy_from_slice(&[choice.token, choice.cost]);
                }
            }
        }
        (list, counts)
    }

    fn launch(&self, device: &dyn Device, list: &[u32], counts: &[u32], states: &[u8]) -> Built {
        let TreeBuild { sequences, max_verify_rows: rows, .. } = self.build;
        let words = |count: usize| poisoned::<u32>(device, sequences * count);
        let (tokens, parents, masks) = (words(rows), words(rows), words(rows * 2));
        let (table, spans) = (words(rows * 4), words(2));
        let trees = Trees { tokens: &tokens, parents: &parents, masks: &masks, table: &table, spans: &spans };
        let (list, counts, states) = (upload(device, list), upload(device, counts), upload(device, states));
        let drafts = upload(device, &self.drafts);
        let typical = upload(device, &(0..63).map(typical_cost).collect::<Vec<u32>>());
        self.build.launch(device, trees, &list, &counts, &drafts, &typical, &states, None).unwrap();
        Built {
            tokens: download(device, &tokens),
            parents: download(device, &parents),
            masks: download(device, &masks),
            table: download(device, &table),
            spans: download(device, &spans),
        }
    }

    fn expected(&self) -> Built {
        let TreeBuild { block, max_verify_rows, .. } = self.build;
        let (mut tokens, mut parents, mut masks) = (vec![], vec![], vec![]);
        let (mut table, mut spans) = (vec![], vec![]);
        for (seq, (state, choices)) in self.sequences.iter().zip(&self.choices).enumerate() {
            let (levels, rows) = (block_rows(state, block) - 1, max_verify_rows.min(state.rows as usize));
            let valid: Option<Vec<Vec<Choice>>> = choices[..levels].iter().cloned().collect();
            let mut tree = Tree::best_first(state.anchor, valid.as_deref().unwrap_or_default(), rows);
            if valid.is_none() && rows > 1 {
                let invalid = [vec![Choice { token: NONE, cost: 0 }]];
                tree = Tree::best_first(state.anchor, &invalid, 2);
            }
            if state.form == DraftShape::Chain {
                let draft = |token: &u32| vec![Choice { token: *token, cost: 0 }];
                let drafts: Vec<_> = self.drafts[seq * block + 1..][..levels].iter().map(draft).collect();
                tree = Tree::best_first(state.anchor, &drafts, rows);
            }
            if state.form == DraftShape::SampledTree && state.verify_method == VerifyMethod::Block {
                let (count, deep) = if levels > 0 { chains(rows, levels) } else { (0, 1) };
                let parents: Vec<u32> = (0..=count * deep)
                    .map(|row| if row == 0 || (row - 1) % deep == 0 { 0 } else { row as u32 - 1 })
                    .collect();
                tree = Tree::sampled(&[&[state.anchor], &vec![NONE; count * deep][..]].concat(), &parents);
            } else if state.form == DraftShape::SampledTree {
                let sibling = |rank| Choice { token: NONE, cost: typical_cost(rank as u32) };
                let siblings: Vec<Choice> = (0..self.build.per_row).map(sibling).collect();
                tree = Tree::best_first(state.anchor, &vec![siblings; levels], rows);
                if self.build.per_row + 1 >= rows {
                    assert_eq!(tree.parents, shape(rows, levels).parents);
                }
            }
            let count = if state.active { tree.rows() } else { 0 };
            let at = tokens.len();
            for row in 0..count {
                tokens.push(tree.tokens[row]);
                parents.push(tree.parents[row]);
                masks.push(tree.masks[row]);
                let (position, slot) = (state.length + tree.depths[row], state.length + row as u32);
                table.extend([seq as u32, position, slot, (at + row) as u32]);
            }
            spans.extend(if count > 0 { [state.length, count as u32] } else { [0, 0] });
            tokens.resize(at + max_verify_rows, NONE);
            parents.resize(at + max_verify_rows, 0);
            masks.resize(at + max_verify_rows, 0);
            (count..max_verify_rows).for_each(|_| table.extend([NONE, 0, NONE, NONE]));
        }
        Built { tokens, parents, masks, table, spans }
    }
}

/// (block, rows, choices per row) at the sizes of warps and at the limits.
const SHAPES: [(usize, usize, usize); 9] = [
    (1, 1, 1),
    (2, 64, 63),
    (16, 64, 63),
    (16, 16, 15),
    (16, 33, 32),
    (8, 32, 5),
    (64, 64, 63),
    (64, 64, 2),
    (10, 2, 1),
];

#[test]
fn trees_equal_the_host_with_ties() {
    let mut random = Random::new(41);
    for i in 0..cases(100, 100) {
        for (block, rows, per_row) in SHAPES {
            let batch = TreeBatch::random(&mut random, block, rows, per_row);
            on_gpu_in_turn(i, |device| {
                let (got, expected) = (batch.run(device), batch.expected());
                assert_eq!(got.parents, expected.parents, "turn {i}, {:?}", batch.build);
                assert_eq!(got, expected, "turn {i}, {:?}", batch.build);
            });
        }
    }
}

#[test]
fn trees_are_the_same_under_every_schedule() {
    for (block, rows, per_row) in SHAPES {
        let batch = TreeBatch::random(&mut Random::new(43), block, rows, per_row);
        let bytes = same_bits(|device| {
            let Built { tokens, parents, masks, table, spans } = batch.run(device);
            [to_bytes(&tokens), to_bytes(&parents), to_bytes(&masks), to_bytes(&table), to_bytes(&spans)]
                .concat()
        });
        assert_written(&bytes, "trees");
    }
}

#[test]
fn trees_of_choices_from_logits_equal_the_host() {
    let (block, rows, per_row, vocab) = (16, 64, 63, 1009);
    let mut random = Random::new(44);
    for turn in 0..cases(40, 40) {
        let scale = [0.5, 3.0, 8.0][turn % 3];
        let level = |random: &mut Random| choices(&random.normals(vocab, scale), per_row);
        let levels = (1..block).map(|_| level(&mut random)).collect();
        let batch = TreeBatch {
            drafts: vec![0; block],
            build: TreeBuild { sequences: 1, block, max_verify_rows: rows, per_row },
            sequences: vec![sequence(true, 100, 3, 15)],
            choices: vec![levels],
        };
        let expected = batch.expected();
        assert_eq!(expected.spans, [100, 64]);
        on_gpu_in_turn(turn, |device| assert_eq!(batch.run(device), expected));
    }
}

#[test]
fn garbage_in_choices_and_states_still_builds_valid_trees() {
    on_gpu(|device| {
        let mut random = Random::new(45);
        for turn in 0..cases(200, 200) {
            let (block, rows, per_row) = SHAPES[turn % SHAPES.len()];
            let batch = TreeBatch::random(&mut random, block, rows, per_row);
            let mut words = |count: usize| (0..count).map(|_| random.next() as u32).collect::<Vec<u32>>();
            let sequences = batch.build.sequences;
            let (list, mut counts) = (words(sequences * block * per_row * 2), words(sequences * block));
            if turn % 2 == 0 {
                counts.fill(per_row as u32 + 9);
            }
            let states = if turn % 3 == 0 {
                to_bytes(&words(sequences * Sequence::BYTES / 4))
            } else {
                batch.sequences.iter().flat_map(|s| s.to_bytes().unwrap()).collect()
            };
            let built = batch.launch(device, &list, &counts, &states);
            for seq in 0..sequences {
                let count = built.spans[seq * 2 + 1] as usize;
                assert!(count <= rows);
                for row in 1..count {
                    let parent = built.parents[seq * rows + row] as usize;
                    assert!(parent < row);
                    let mask = |row: usize| built.masks[seq * rows + row];
                    assert_eq!(mask(row), mask(parent) | 1 << row);
                }
            }
        }
    });
}

// ---- paths ----

/// A paged KV cache and accepted paths in it.
struct Paths {
    compact: Compact,
    table: Vec<u32>,
    accepted: Vec<u32>,
    path: Vec<u32>,
    spans: Vec<u32>,
    /// `[layers]`.
    keys: Vec<Vec<u16>>,
    values: Vec<Vec<u16>>,
}

impl Paths {
    fn random(random: &mut Random, turn: usize) -> Paths {
        let (rows, sequence_pages) = ([1, 2, 16, 33, 64][turn % 5], 3);
        let sequences = 1 + random.below(3);
        let pages = sequences * sequence_pages + 2;
        let (layers, kv_heads) = (1 + random.below(3), 1 + random.below(3));
        let head_dim = [64, 128, 256][turn % 3];
        let compact = Compact { sequences, rows, layers, kv_heads, head_dim, pages, sequence_pages };
        let mut table: Vec<u32> = (0..pages as u32).collect();
        for i in (1..pages).rev() {
            table.swap(i, random.below(i + 1));
        }
        table.truncate(sequences * sequence_pages);
        let (mut accepted, mut path, mut spans) = (vec![], vec![], vec![]);
        for _ in 0..sequences {
            let count = [rows, random.below(rows + 1)][random.below(2)];
            // Often across the border of a page.
            let context = [random.below(3 * PAGE - rows + 1), PAGE - 1 - random.below(9)][random.below(2)];
            spans.extend([context as u32, count as u32]);
            let skip = 1 + random.below(4);
            let mut seq: Vec<u32> = (1..count as u32).filter(|_| random.below(skip) == 0).collect();
            seq.insert(0, 0);
            accepted.push(seq.len() as u32 - 1);
            seq.resize(rows, NONE);
            path.extend(seq);
        }
        let words = pages * kv_heads * PAGE * head_dim;
        let mut side = || (0..layers).map(|_| (0..words).map(|_| random.next() as u16).collect()).collect();
        let (keys, values) = (side(), side());
        Paths { compact, table, accepted, path, spans, keys, values }
    }

    /// Index of element `dim` of a slot in a cache. The chunks of a token are permuted.
    fn at(&self, seq: usize, head: usize, slot: usize, dim: usize) -> usize {
        let Compact { kv_heads, head_dim, sequence_pages, .. } = self.compact;
        let page = self.table[seq * sequence_pages + slot / PAGE] as usize;
        let token = slot % PAGE;
        ((page * kv_heads + head) * PAGE + token) * head_dim + ((dim / 8) ^ (token & 7)) * 8 + dim % 8
    }

    /// The caches after the moves of [`compaction_moves`], one row after another.
    fn expected(&self) -> Vec<Vec<u16>> {
        let Compact { sequences, rows, kv_heads, head_dim, .. } = self.compact;
        let mut caches: Vec<Vec<u16>> = self.keys.iter().chain(&self.values).cloned().collect();
        for seq in 0..sequences {
            let [context, count] = [0, 1].map(|i| self.spans[seq * 2 + i] as usize);
            if count == 0 {
                continue;
            }
            let path = &self.path[seq * rows..][..self.accepted[seq] as usize + 1];
            let path: Vec<usize> = path.iter().map(|&row| row as usize).collect();
            for (from, to) in compaction_moves(&path) {
                for head in 0..kv_heads {
                    for dim in 0..head_dim {
                        let [from, to] = [from, to].map(|row| self.at(seq, head, context + row, dim));
                        caches.iter_mut().for_each(|cache| cache[to] = cache[from]);
                    }
                }
            }
        }
        caches
    }

    fn run(&self, device: &dyn Device) -> Vec<Vec<u16>> {
        let [keys, values] =
            [&self.keys, &self.values].map(|side| side.iter().map(|c| upload(device, c)).collect::<Vec<_>>());
        let caches = upload(device, &self.compact.cache_addresses(&keys, &values).unwrap());
        let [table, accepted, path, spans] =
            [&self.table, &self.accepted, &self.path, &self.spans].map(|words| upload(device, words));
        let next = poisoned::<u32>(device, self.compact.sequences);
        let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
        self.compact.launch(device, &caches, &table, output, &spans).unwrap();
        keys.iter().chain(&values).map(|cache| download(device, cache)).collect()
    }
}

#[test]
fn accepted_rows_move_in_order() {
    let mut random = Random::new(51);
    let mut moved = 0;
    for turn in 0..cases(60, 60) {
        let paths = Paths::random(&mut random, turn);
        let expected = paths.expected();
        moved += usize::from(expected[0] != paths.keys[0]);
        on_gpu_in_turn(turn, |device| {
            assert!(paths.run(device) == expected, "turn {turn}, {:?}, path {:?}", paths.compact, paths.path);
        });
    }
    assert!(moved > 0, "no row moved");
}

#[test]
fn accepted_rows_move_the_same_under_every_schedule() {
    // Every accepted row but the first moves to the slot of the row before it.
    let mut paths = Paths::random(&mut Random::new(52), 4);
    let Compact { sequences, rows, .. } = paths.compact;
    let path: Vec<u32> = [0].into_iter().chain(2..rows as u32).chain([NONE]).collect();
    paths.path = path.repeat(sequences);
    paths.accepted = vec![rows as u32 - 2; sequences];
    paths.spans = [40, rows as u32].repeat(sequences);
    let bytes = same_bits(|device| to_bytes(&paths.run(device).concat()));
    assert!(from_bytes::<u16>(&bytes) == paths.expected().concat());
}

#[test]
fn garbage_in_paths_stays_in_the_cache() {
    on_gpu(|device| {
        let mut random = Random::new(53);
        for turn in 0..cases(40, 40) {
            let mut paths = Paths::random(&mut random, turn);
            // Two thirds of the words stay valid: with garbage everywhere the kernel's first check would fail.
            for words in [&mut paths.table, &mut paths.accepted, &mut paths.path, &mut paths.spans] {
                for word in words {
                    if random.below(3) == 0 {
                        *word = random.next() as u32 >> random.below(32);
                    }
                }
            }
            paths.run(device);
        }
    });
}

// ---- rounds ----

/// Runs rounds of trees: tables, verification and the state after it must equal those of the host.
fn rounds_of_trees(device: &dyn Device, turn: usize) {
    let (block, rows, per_row, count) = [(16, 64, 63, 3), (8, 20, 5, 2), (16, 9, 8, 4)][turn % 3];
    let mut random = Random::new(60 + turn as u64);
    let round = Round { sequences: count, block, max_verify_rows: rows };
    let words = |each: usize| poisoned::<u32>(device, count * each);
    let [draft_tokens, features, draft_rows, draft_spans] = [block, block, block * 8, 2].map(words);
    let [tokens, parents, masks, table, spans] = [rows, rows, rows * 2, rows.max(block) * 4, 2].map(words);
    let [accepted, next, path] = [1, 1, rows].map(words);
    let (round_header, ring) = (upload(device, &[0u32; 3]), Ring::new(device, round, 2).unwrap());
    let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
    let mut all: Vec<Sequence> =
        (0..count).map(|i| sequence(true, 100 + i as u32, 1, 15 + random.below(3000) as u32)).collect();
    let states: Vec<u8> = all.iter().flat_map(|s| s.to_bytes().unwrap()).collect();
    let states = upload(device, &states);
    let (mut accepted_drafts, mut paths) = (0, vec![vec![]; count]);
    for number in 1..=12 {
        let tables = Tables {
            draft_tokens: &draft_tokens,
            draft_rows: &draft_rows,
            features: &features,
            draft_spans: &draft_spans,
            verify_rows: &table,
            verify_spans: &spans,
            round_header: &round_header,
        };
        round.begin(device, tables, &states, &path, true, 99, 0).unwrap();
        // The features for the drafter: rows of the last pass, in the order of the path.
        let found: Vec<u32> = download(device, &features);
        for (seq, path) in paths.iter().enumerate() {
            let mut expected: Vec<u32> = path.iter().map(|&row| (seq * rows + row) as u32).collect();
            expected.resize(block, NONE);
            assert_eq!(found[seq * block..][..block], expected, "round {number}, sequence {seq}");
        }

        let mut batch = TreeBatch::random(&mut random, block, rows, per_row);
        batch.build.sequences = count;
        batch.choices.resize(count, batch.choices[0].clone());
        if number < 12 {
            batch
                .choices
                .iter_mut()
                .flatten()
                .for_each(|level| *level = Some(level.take().unwrap_or_default()));
        }
        batch.drafts = (0..count * block).map(|_| random.below(9) as u32).collect();
        batch.sequences = all.clone();
        let expected = batch.expected();
        let (list, counts) = batch.inputs();
        let (list, counts) = (upload(device, &list), upload(device, &counts));
        let to = Trees { tokens: &tokens, parents: &parents, masks: &masks, table: &table, spans: &spans };
        let drafts = upload(device, &batch.drafts);
        let none = upload(device, &[0u32; 63]);
        batch.build.launch(device, to, &list, &counts, &drafts, &none, &states, None).unwrap();
        // Most rows choose the token of one of their children.
        let child = |i: usize, row: usize| {
            let children = (1..rows).filter(|&child| expected.parents[i - row + child] as usize == row);
            children.map(|child| expected.tokens[i - row + child]).rfind(|&token| token != NONE)
        };
        let choices: Vec<u32> = (0..count * rows)
            .map(|i| child(i, i % rows).filter(|_| random.below(8) > 0).unwrap_or(5))
            .collect();
        let chosen = upload(device, &choices);
        Verify { sequences: count, block: rows }
            .launch(device, output, &chosen, &tokens, Some(&parents), &spans)
            .unwrap();
        round.finish(device, &states, &ring, &round_header, output, &tokens, &spans, None).unwrap();

        let bytes = bytes_of(device, &states);
        for (seq, state) in all.iter_mut().enumerate() {
            let (at, count) = (seq * rows, expected.spans[seq * 2 + 1] as usize);
            let (tokens, parents) = (&expected.tokens[at..][..count], &expected.parents[at..][..count]);
            let mut record =
                Record { tokens: vec![], acceptance_length: 0, finish: state.finish, drafted: 0, path: 0 };
            paths[seq].clear();
            if count > 0 && tokens[1..].contains(&NONE) {
                (record.finish, state.finish, state.active) =
                    (Finish::InvalidDrafter, Finish::InvalidDrafter, false);
                state.rounds += 1;
            } else if count > 0 {
                let (found_path, next) = match_tree(tokens, parents, |row| Some(choices[at + row])).unwrap();
                record.tokens = found_path[1..].iter().map(|&row| tokens[row]).chain([next]).collect();
                record.acceptance_length = found_path.len() as u32;
                record.drafted = count as u32 - 1;
                record.path = found_path.iter().map(|row| 1 << row).sum();
                record.tokens.truncate(state.budget as usize);
                let kept = record.tokens.len();
                state.length += kept as u32;
                state.budget -= kept as u32;
                state.anchor = record.tokens[kept - 1];
                state.rounds += 1;
                state.drafted += count as u32 - 1;
                state.accepted += found_path.len() as u32 - 1;
                state.pending = kept as u32;
                if state.budget == 0 {
                    (record.finish, state.finish, state.active) = (Finish::Length, Finish::Length, false);
                } else {
                    paths[seq] = found_path;
                }
                accepted_drafts += kept - 1;
            }
            let found = &bytes[seq * Sequence::BYTES..][..Sequence::BYTES];
            assert_eq!(found, state.to_bytes().unwrap(), "round {number}, sequence {seq}");
            assert_eq!(ring.read(number, seq).unwrap(), Some(record), "round {number}, sequence {seq}");
            // Moves the end of the drafter's positions, so that the sequence keeps drafting.
            if state.draft_end < state.length + block as u32 {
                state.draft_end += 1000;
            }
        }
        let states_now: Vec<u8> = all.iter().flat_map(|s| s.to_bytes().unwrap()).collect();
        device.upload(&states, &states_now).unwrap();
    }
    assert!(accepted_drafts > 10, "{accepted_drafts} accepted drafts");
}

#[test]
fn rounds_of_trees_equal_the_host() {
    for turn in 0..cases(30, 30).max(3) {
        on_gpu_in_turn(turn, |device| rounds_of_trees(device, turn));
    }
}

#[test]
fn launches_refuse_wrong_sizes() {
    let device = &TestGpu::new();
    let short = upload(device, &[0u32; 4]);
    let refused = |what: &str, result: dflash::Result<()>| match result {
        Err(Error::Internal(message)) => assert!(message.contains(what), "{message}"),
        other => panic!("{other:?}"),
    };
    let inputs = SamplerInputs {
        logits: &short,
        sequences: &short,
        tables: &short,
        partial: &short,
        counters: &short,
    };
    for (per_row, rows, what) in
        [(0, 1, "1 to 63"), (64, 1, "1 to 63"), (63, 0, "rows"), (63, 1, "choices has")]
    {
        let kernel = Choices { rows, vocab: 300, blocks: 3, reduced: false, per_row };
        refused(what, kernel.launch(device, &short, &short, &short, &short, inputs));
    }
    let trees = Trees { tokens: &short, parents: &short, masks: &short, table: &short, spans: &short };
    for (rows, per_row, what) in
        [(0, 1, "1 to 64"), (65, 1, "1 to 64"), (64, 64, "1 to 63"), (64, 63, "tokens")]
    {
        let kernel = TreeBuild { sequences: 1, block: 16, max_verify_rows: rows, per_row };
        refused(what, kernel.launch(device, trees, &short, &short, &short, &short, &short, None));
    }
    let shape =
        Compact { sequences: 1, rows: 4, layers: 1, kv_heads: 1, head_dim: 64, pages: 1, sequence_pages: 1 };
    let output = VerifyOutput { accepted: &short, next: &short, path: &short };
    for (shape, what) in [
        (Compact { head_dim: 96, ..shape }, "64, 128 or 256"),
        (Compact { layers: 0, ..shape }, "layers"),
        (Compact { rows: 65, ..shape }, "rows"),
        (Compact { rows: 5, ..shape }, "path"),
        (Compact { sequence_pages: 5, ..shape }, "page_table"),
    ] {
        refused(what, shape.launch(device, &short, &short, output, &short));
    }
    refused(
        "keys",
        shape.cache_addresses(std::slice::from_ref(&short), std::slice::from_ref(&short)).map(|_| ()),
    );
    refused("0 key buffers", shape.cache_addresses(&[], &[]).map(|_| ()));
}
