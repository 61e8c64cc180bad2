//! The sampler and the verdict on drafts, decision for decision against their one definition, `src/spec/sampling.rs`.

use crate::support::kernel;

use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::emulator::Emulator;
use dflash::gpu::kernels::round::{Finish, Form, Sequence};
use dflash::gpu::kernels::sample::{Sample, SamplerInputs, tables};
use dflash::gpu::kernels::verify::{Verify, VerifyOutput};
use dflash::spec::config::VerifyMethod;
use dflash::spec::rng::{TABLES, philox};
use dflash::spec::sampling::SamplingParams;
use dflash::spec::verify::{match_chain, match_tree};
use kernel::*;

const NONE: u32 = u32::MAX;

fn greedy() -> SamplingParams {
    SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 }
}

fn sequence(sampling: SamplingParams) -> Sequence {
    Sequence {
        active: true,
        length: 0,
        anchor: 0,
        pending: 0,
        budget: 0,
        end: 0,
        draft_end: 0,
        block: 0,
        rows: 1,
        form: Form::Chain,
        sampling,
        stop_ids: vec![],
        finish: Finish::Running,
        rounds: 0,
        drafted: 0,
        accepted: 0,
        verify_method: VerifyMethod::Match,
    }
}

/// A batch of rows: logits, each row's sequence (`NONE`: padding) and position, each sequence's settings.
struct Batch {
    vocab: usize,
    logits: Vec<f32>,
    rows: Vec<(u32, u32)>,
    settings: Vec<SamplingParams>,
}

impl Batch {
    fn row(&self, row: usize) -> &[f32] {
        &self.logits[row * self.vocab..][..self.vocab]
    }

    /// What the definition chooses.
    fn expected(&self) -> Vec<u32> {
        let choose = |(row, &(sequence, position)): (usize, &(u32, u32))| {
            let settings = self.settings.get(sequence as usize)?;
            settings.choose(self.row(row), position.wrapping_add(1))
        };
        self.rows.iter().enumerate().map(|row| choose(row).unwrap_or(NONE)).collect()
    }

    /// What the LM head leaves of each row, per 128 ids.
    fn best(&self) -> Vec<u64> {
        (0..self.rows.len()).flat_map(|row| best_keys(self.row(row))).collect()
    }

    fn sample(&self) -> Sample {
        let (rows, vocab) = (self.rows.len(), self.vocab);
        Sample { rows, vocab, blocks: vocab.div_ceil(128), sequences: self.settings.len() }
    }

    fn table(&self) -> Vec<u32> {
        self.rows.iter().flat_map(|&(sequence, position)| [sequence, position, NONE, NONE]).collect()
    }

    fn states(&self) -> Vec<u8> {
        self.settings.iter().flat_map(|s| sequence(s.clone()).to_bytes().unwrap()).collect()
    }

    /// What the kernel chooses; its counters must be zero again.
    fn run(&self, device: &dyn Device) -> Vec<u32> {
        let sample = self.sample();
        let choice = poisoned::<u32>(device, sample.rows);
        let [logits, sequences] = [to_bytes(&self.logits), self.states()].map(|bytes| upload(device, &bytes));
        let (best, table) = (upload(device, &self.best()), upload(device, &self.table()));
        let (tables, counters) = (constant(device, &tables()), upload(device, &vec![0u32; sample.rows]));
        let partial = poisoned::<u8>(device, sample.workspace());
        let races = SamplerInputs {
            logits: &logits,
            sequences: &sequences,
            tables: &tables,
            partial: &partial,
            counters: &counters,
        };
        // Twice: a graph is replayed without anybody clearing the counters.
        for _ in 0..2 {
            sample.launch(device, &choice, &best, &table, Some(races)).unwrap();
            assert!(bytes_of(device, &counters).iter().all(|&b| b == 0), "counters are left at zero");
        }
        download(device, &choice)
    }

    fn check(&self, device: &dyn Device, what: &str) {
        let (got, expected) = (self.run(device), self.expected());
        for (row, (got, expected)) in got.iter().zip(&expected).enumerate() {
            let settings = self.settings.get(self.rows[row].0 as usize);
            assert_eq!(
                got, expected,
                "{what}, vocabulary {}, row {row}: {:?}, {settings:?}",
                self.vocab, self.rows[row]
            );
        }
    }
}

/// Settings of every mix.
fn settings(random: &mut Random, vocab: usize) -> SamplingParams {
    let temperature = match random.below(10) {
        0 => 0.0,
        1 => 1e-4,
        2 => 1e4,
        3 => 50.0,
        _ => 0.1 + random.unit() * 1.9,
    };
    let top_k = match random.below(6) {
        0 => 1,
        1 => vocab,
        2 => vocab + 7,
        3 => 1 + random.below(vocab),
        4 => 1 + random.below(vocab.min(50)),
        _ => 0,
    };
    let top_p = match random.below(6) {
        0 => 1e-12,
        1 => 1.0 - 1e-12,
        2 => f64::from(random.unit()).max(1e-3),
        3 => 0.9,
        _ => 1.0,
    };
    let min_p = match random.below(6) {
        0 => 1.0 - 1e-12,
        1 => 0.05,
        2 => f64::from(random.unit()),
        _ => 0.0,
    };
    let settings = SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        seed: random.next(),
        stream: random.next() as u32,
    };
    settings.check().unwrap();
    settings
}

/// Rows of all kinds under all mixes, padding between them.
fn batch(random: &mut Random, rows: usize, vocab: usize) -> Batch {
    let sequences = 1 + rows / 2;
    let settings = (0..sequences).map(|_| settings(random, vocab)).collect();
    let mut places = Vec::new();
    for _ in 0..rows {
        let sequence = match random.below(12) {
            0 => NONE,
            1 => sequences as u32,
            _ => random.below(sequences) as u32,
        };
        places.push((sequence, random.next() as u32 >> random.below(32)));
    }
    Batch { vocab, logits: (0..rows).flat_map(|_| logits(random, vocab)).collect(), rows: places, settings }
}

#[test]
fn sampler_is_choose_on_thousands_of_rows() {
    let mut random = Random::new(1);
    let shrink = if cfg!(feature = "sanitize") { 20 } else { 1 };
    for (vocab, batches) in
        [(1, 10), (2, 30), (3, 20), (17, 60), (130, 60), (2048, 40), (9001, 10), (32768, 5)]
    {
        for i in 0..(batches / shrink).max(1) {
            let batch = batch(&mut random, 24, vocab);
            every_device_in_turn(i, |device| batch.check(device, &format!("batch {i}")));
        }
    }
}

#[test]
fn sampler_is_the_same_under_every_schedule() {
    for vocab in [2, 17, 2047, 20000] {
        let batch = batch(&mut Random::new(vocab as u64), 12, vocab);
        let bytes = same_bits(|device| to_bytes(&batch.run(device)));
        assert_eq!(from_bytes::<u32>(&bytes), batch.expected());
        let parallel = Emulator::new();
        parallel.set_threads(2);
        batch.check(&parallel, "two threads");
    }
}

#[test]
fn sampler_is_choose_on_a_real_vocabulary() {
    let mut random = Random::new(5);
    let vocab = if cfg!(feature = "sanitize") { 20011 } else { 151936 };
    let of = |temperature, top_k, top_p, min_p| SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        seed: 77,
        stream: 3,
    };
    let settings = vec![
        of(0.0, 0, 1.0, 0.0),
        of(1.0, 0, 1.0, 0.0),
        of(0.7, 20, 0.8, 0.0),
        of(1.0, 0, 0.95, 0.01),
        of(2.0, 50, 1.0, 0.1),
    ];
    let rows: Vec<(u32, u32)> = (0..settings.len()).map(|i| (i as u32, 1000 + i as u32)).collect();
    let logits = random.normals(rows.len() * vocab, 3.0);
    let batch = Batch { vocab, logits, rows, settings };
    every_device(|device| batch.check(device, "Qwen3"));
}

#[test]
fn cuts_fall_among_ties_as_the_definition_says() {
    every_device(|device| {
        let mut random = Random::new(8);
        // Equal logits beyond one bin of ids, equal weights of unequal logits, cuts at every place around them.
        let vocab = 300;
        let flat = vec![1.5; vocab];
        let near: Vec<f32> =
            (0..vocab).map(|_| f32::from_bits(20f32.to_bits() - random.below(5) as u32)).collect();
        let steps: Vec<f32> = (0..vocab).map(|id| -((id % 7) as f32)).collect();
        for (kind, row) in [("flat", flat), ("near", near), ("steps", steps)] {
            let mut settings = Vec::new();
            for i in 0..40 {
                let top_k = if i % 3 == 0 { 0 } else { 1 + random.below(vocab) };
                let top_p = if i % 3 == 1 { 1.0 } else { f64::from(random.unit()).max(0.001) };
                settings.push(SamplingParams {
                    temperature: 1.0,
                    top_k,
                    top_p,
                    min_p: 0.0,
                    seed: random.next(),
                    stream: i,
                });
            }
            let rows = (0..40).flat_map(|i| [(i, 5), (i, 6)]).collect();
            let logits = row.repeat(80);
            Batch { vocab, logits, rows, settings }.check(device, kind);
        }
        // Ids that differ in their upper digits only.
        let vocab = 70000;
        let mut row = vec![-50.0; vocab];
        (0..vocab).step_by(3001).for_each(|id| row[id] = 2.0);
        let settings: Vec<SamplingParams> = (1..=16)
            .map(|top_k| SamplingParams {
                temperature: 1.0,
                top_k,
                top_p: 1.0,
                min_p: 0.0,
                seed: top_k as u64,
                stream: 0,
            })
            .collect();
        let rows = (0..16).map(|i| (i, i)).collect();
        Batch { vocab, logits: row.repeat(16), rows, settings }.check(device, "spread");
    });
}

#[test]
fn races_that_end_in_a_tie_go_to_the_lower_id() {
    every_device(|device| {
        // In a flat row all weights are equal; at these positions two of the least times are too, within one slice of
        // 8192 ids and across slices.
        for (vocab, ties) in [
            (12288, [(128478, 956, 9504), (141346, 4356, 7704), (171054, 2195, 10573)]),
            (24576, [(8127, 17039, 18779), (59963, 7973, 14235), (63891, 12305, 14975)]),
        ] {
            for top_k in [0, vocab - 1] {
                let settings =
                    SamplingParams { temperature: 1.0, top_k, top_p: 1.0, min_p: 0.0, seed: 1, stream: 0 };
                for (position, winner, second) in ties {
                    let time = |id: u32| {
                        let words = philox([position, (5 << 24) | (id / 4), 0, 0], [1, 0]);
                        TABLES.time(words[id as usize % 4])
                    };
                    assert_eq!(time(winner), time(second));
                    let (logits, rows) = (vec![3.0; vocab], vec![(0, position - 1)]);
                    let batch = Batch { vocab, logits, rows, settings: vec![settings.clone()] };
                    assert_eq!(batch.expected(), [winner]);
                    batch.check(device, "tie");
                }
            }
        }
    });
}

#[test]
fn top_p_rounds_its_goal_up() {
    every_device(|device| {
        // The share of the mass asked for is a little more than the best token has, by less than one unit of weight.
        let mut found = 0;
        for logit in (1..20).map(|i| -0.25 * i as f32) {
            let all =
                SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 3, stream: 1 };
            let row = vec![0.0, logit];
            let weights = all.survivors(&row).unwrap();
            let (best, total) = (1u128 << 32, (1u128 << 32) + u128::from(weights[1].1));
            let share = (best << 32).div_ceil(total);
            if (total * share) >> 32 != best || total * share == best << 32 {
                continue;
            }
            found += 1;
            let settings = SamplingParams { top_p: share as f64 / best as f64, ..all };
            assert_eq!(settings.survivors(&row).unwrap().len(), 2);
            let rows = (0..200).map(|position| (0, position)).collect();
            let batch = Batch { vocab: 2, logits: row.repeat(200), rows, settings: vec![settings] };
            assert!(batch.expected().contains(&1));
            batch.check(device, "two tokens");
        }
        assert!(found > 3, "{found}");
    });
}

#[test]
fn min_p_keeps_what_weighs_just_enough() {
    every_device(|device| {
        let all = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 5, stream: 1 };
        let row = vec![0.0, -1.0];
        let weight = all.survivors(&row).unwrap()[1].1;
        for (more, kept) in [(0, 2), (1, 1)] {
            let settings =
                SamplingParams { min_p: (weight + more) as f64 / (1u64 << 32) as f64, ..all.clone() };
            assert_eq!(settings.survivors(&row).unwrap().len(), kept);
            let rows = (0..200).map(|position| (0, position)).collect();
            let batch = Batch { vocab: 2, logits: row.repeat(200), rows, settings: vec![settings] };
            assert_eq!(batch.expected().contains(&1), kept == 2);
            batch.check(device, "two tokens");
        }
    });
}

#[test]
fn damaged_rows_choose_nothing_and_spoil_no_other_row() {
    every_device(|device| {
        let vocab = 1000;
        let mut random = Random::new(11);
        let sound = random.normals(vocab, 3.0);
        let distribution = |temperature, top_k| SamplingParams {
            temperature,
            top_k,
            top_p: 1.0,
            min_p: 0.0,
            seed: 4,
            stream: 9,
        };
        let settings = vec![greedy(), distribution(1.0, 0), distribution(0.8, 40)];
        for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
            let (mut rows, mut logits) = (Vec::new(), Vec::new());
            for i in 0..9 {
                rows.push((i % 3, 40 + i));
                let mut row = sound.clone();
                if (3..6).contains(&i) {
                    row[random.below(vocab)] = bad;
                }
                logits.extend(row);
            }
            let batch = Batch { vocab, logits, rows, settings: settings.clone() };
            assert!(batch.expected().iter().enumerate().all(|(i, &c)| (c == NONE) == (3..6).contains(&i)));
            batch.check(device, "damaged");
        }
    });
}

#[test]
fn garbage_in_settings_and_keys_stays_inside_the_buffers() {
    every_device(|device| {
        let mut random = Random::new(12);
        for i in 0..40 {
            let mut batch = batch(&mut random, 6, [1, 7, 300, 9000][i % 4]);
            let sample = batch.sample();
            let mut states = batch.states();
            states.iter_mut().for_each(|b| *b = random.next() as u8);
            if i % 2 == 0 {
                // Signs and exponents that a scale has.
                states.chunks_mut(128).for_each(|s| s[35] = [0x40, 0xc0, 0x7f, 0xff][random.below(4)]);
            }
            if i % 3 == 0 {
                batch.logits.iter_mut().for_each(|l| *l = f32::from_bits(random.next() as u32));
            }
            let best: Vec<u64> = match i % 3 {
                0 => batch.best(),
                1 => batch.best().iter().map(|&key| key ^ random.next() >> 20).collect(),
                _ => (0..sample.rows * sample.blocks).map(|_| random.next()).collect(),
            };
            let choice = poisoned::<u32>(device, sample.rows);
            let (logits, sequences) = (upload(device, &batch.logits), upload(device, &states));
            let (tables, counters) = (constant(device, &tables()), upload(device, &vec![0u32; sample.rows]));
            let partial = poisoned::<u8>(device, sample.workspace());
            let races = SamplerInputs {
                logits: &logits,
                sequences: &sequences,
                tables: &tables,
                partial: &partial,
                counters: &counters,
            };
            let (best, table) = (upload(device, &best), upload(device, &batch.table()));
            sample.launch(device, &choice, &best, &table, Some(races)).unwrap();
            let choices: Vec<u32> = download(device, &choice);
            assert!(choices.iter().all(|&c| c == NONE || (c as usize) < batch.vocab), "{choices:?}");
        }
    });
}

#[test]
fn greedy_launch_reads_the_best_keys_alone() {
    let mut random = Random::new(13);
    let mut batch = batch(&mut random, 40, 5000);
    batch.settings.fill(greedy());
    let sample = batch.sample();
    let run = |device: &dyn Device| {
        let choice = poisoned::<u32>(device, sample.rows);
        let (best, table) = (upload(device, &batch.best()), upload(device, &batch.table()));
        sample.launch(device, &choice, &best, &table, None).unwrap();
        bytes_of(device, &choice)
    };
    let device = Emulator::new();
    run(&device);
    let counts = device.counts()["sample"];
    // Every thread reads its row's entry.
    assert_eq!(counts.read, (sample.rows * (sample.blocks * 8 + 512 * 16)) as u64);
    assert_eq!((counts.written, counts.streamed, counts.blocks), (sample.rows as u64 * 4, 0, 40));
    let bytes = same_bits(run);
    assert_eq!(from_bytes::<u32>(&bytes), batch.expected());
}

/// A batch of blocks to be judged.
struct Blocks {
    block: usize,
    rows: Vec<u32>,
    choices: Vec<u32>,
    tokens: Vec<u32>,
    parents: Option<Vec<u32>>,
}

impl Blocks {
    /// Per sequence: accepted, next, path padded with NONE.
    fn run(&self, device: &dyn Device) -> Vec<(u32, u32, Vec<u32>)> {
        let (sequences, block) = (self.rows.len(), self.block);
        let spans: Vec<u32> = self.rows.iter().flat_map(|&rows| [7, rows]).collect();
        let [accepted, next, path] =
            [sequences, sequences, sequences * block].map(|count| poisoned::<u32>(device, count));
        let verdict = VerifyOutput { accepted: &accepted, next: &next, path: &path };
        let parents = self.parents.as_ref().map(|p| upload(device, p));
        let [choices, tokens, spans] = [&self.choices, &self.tokens, &spans].map(|data| upload(device, data));
        Verify { sequences, block }
            .launch(device, verdict, &choices, &tokens, parents.as_ref(), &spans)
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
        let mut seen = Vec::new();
        let target = |row: usize| {
            seen.push(row as u32);
            Some(choices[row]).filter(|&c| c != NONE)
        };
        let (accepted, next) = match rows {
            0 => (0, NONE),
            _ => match match_tree(&tokens, &parents, target) {
                Some((rows, next)) => (rows.len() as u32 - 1, next),
                None => (seen.len() as u32 - 1, NONE),
            },
        };
        path[..seen.len()].copy_from_slice(&seen);
        (accepted, next, path)
    }

    fn check(&self, device: &dyn Device) {
        for (sequence, got) in self.run(device).into_iter().enumerate() {
            assert_eq!(got, self.expected(sequence), "sequence {sequence} of blocks of {}", self.block);
            if self.parents.is_none() && self.rows[sequence] > 0 {
                // The chain's own definition.
                let rows = (self.rows[sequence] as usize).min(self.block);
                let drafts = &self.tokens[sequence * self.block..][1..rows];
                let target = |row| Some(self.choices[sequence * self.block + row]).filter(|&c| c != NONE);
                let verdict = match_chain(drafts, target).map(|(accepted, next)| (accepted as u32, next));
                assert_eq!(verdict, Some((got.0, got.1)).filter(|&(_, next)| next != NONE));
            }
        }
    }
}

fn blocks(random: &mut Random, block: usize, trees: bool) -> Blocks {
    let sequences = 1 + random.below(16);
    // Few different tokens, so that drafts stand and siblings repeat; sometimes damaged rows.
    let tokens = 1 + random.below(3);
    let word = |random: &mut Random| if random.below(40) == 0 { NONE } else { random.below(tokens) as u32 };
    let all = |random: &mut Random| (0..sequences * block).map(|_| word(random)).collect::<Vec<u32>>();
    let (choices, drafts) = (all(random), all(random));
    let parent = |random: &mut Random, row: usize| match random.below(20) {
        0 => random.next() as u32,
        1 => row as u32,
        2 => 64 + random.below(8) as u32,
        // Later rows too, which nothing can follow.
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
fn verdict_is_judge_and_walk() {
    let mut random = Random::new(21);
    let rounds = if cfg!(feature = "sanitize") { 3 } else { 30 };
    for i in 0..rounds {
        for block in [1, 2, 7, 16, 31, 32, 33, 63, 64] {
            for trees in [false, true] {
                let blocks = blocks(&mut random, block, trees);
                every_device_in_turn(i, |device| blocks.check(device));
            }
        }
    }
}

#[test]
fn verdict_on_whole_blocks_and_deep_trees() {
    every_device(|device| {
        for block in [1usize, 16, 33, 64] {
            // Every draft stands; none does; one in the middle does not.
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
                    let stood = wrong.filter(|&row| row > 0 && row < block).map_or(block - 1, |row| row - 1);
                    assert_eq!(blocks.run(device)[0].0, stood as u32);
                }
            }
        }
    });
}

#[test]
fn verdict_is_the_same_under_every_schedule() {
    let blocks = blocks(&mut Random::new(23), 64, true);
    let bytes = same_bits(|device| {
        let all = blocks.run(device);
        all.into_iter().flat_map(|(a, n, p)| to_bytes(&[&[a, n][..], &p].concat())).collect()
    });
    assert!(!bytes.is_empty());
    assert_written(&bytes, "the verdict");
}

#[test]
fn walk_takes_the_lowest_of_equal_siblings_and_needs_earlier_parents() {
    //  0 -> 1 (5), 2 (5), 3 (6); 4 (7) follows 2, 5 (8) follows 1; 6 (5) names a later row and is unreachable.
    let (tokens, parents) = ([9, 5, 5, 6, 7, 8, 5], [0, 0, 0, 0, 2, 1, 6]);
    let distribution = |choices: [u32; 7]| match_tree(&tokens, &parents, move |row| Some(choices[row]));
    assert_eq!(distribution([5, 8, 7, 0, 0, 3, 0]), Some((vec![0, 1, 5], 3)));
    assert_eq!(distribution([5, 7, 7, 0, 0, 3, 0]), Some((vec![0, 1], 7)));
    assert_eq!(distribution([6, 0, 0, 5, 0, 0, 0]), Some((vec![0, 3], 5)));
    assert_eq!(distribution([4, 0, 0, 0, 0, 0, 0]), Some((vec![0], 4)));
    assert_eq!(match_tree(&tokens, &parents, |row| (row == 0).then_some(5)), None);
    assert_eq!(match_tree(&[9], &[0], |_| Some(2)), Some((vec![0], 2)));
}
