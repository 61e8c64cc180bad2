//! The sampler on a device. It must choose the same tokens as `SamplingParams::choose` of
//! `src/spec/sampling.rs`.

use crate::support::kernel;

use crate::support::test_gpu::TestGpu;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::RowStep;
use dflash::gpu::kernels::round::{DraftShape, Finish, Sequence};
use dflash::gpu::kernels::sample::{Sample, SamplerInputs, tables};
use dflash::spec::config::VerifyMethod;
use dflash::spec::rng::{TABLES, philox};
use dflash::spec::sampling::SamplingParams;
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
        form: DraftShape::Chain,
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

/// A batch of rows: logits `[rows][vocab]`, sequence (`NONE`: padding) and position of each row, sampling
/// parameters of each sequence.
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

    /// The tokens that the reference chooses.
    fn expected(&self) -> Vec<u32> {
        let choose = |(row, &(sequence, position)): (usize, &(u32, u32))| {
            let settings = self.settings.get(sequence as usize)?;
            settings.choose(self.row(row), position.wrapping_add(1))
        };
        self.rows.iter().enumerate().map(|row| choose(row).unwrap_or(NONE)).collect()
    }

    /// The LM head's keys of each row, per 128 ids.
    fn best(&self) -> Vec<u64> {
        (0..self.rows.len()).flat_map(|row| best_keys(self.row(row))).collect()
    }

    fn sample(&self) -> Sample {
        let (rows, vocab) = (self.rows.len(), self.vocab);
        Sample { rows, vocab, blocks: vocab.div_ceil(128), reduced: false, sequences: self.settings.len() }
    }

    fn table(&self) -> Vec<u32> {
        self.rows.iter().flat_map(|&(sequence, position)| [sequence, position, NONE, NONE]).collect()
    }

    fn states(&self) -> Vec<u8> {
        self.settings.iter().flat_map(|s| sequence(s.clone()).to_bytes().unwrap()).collect()
    }

    /// The tokens that the kernel selects. Asserts that its counters are zero again.
    fn run(&self, device: &dyn Device) -> Vec<u32> {
        let sample = self.sample();
        let choice = poisoned::<u32>(device, sample.rows);
        let [logits, sequences] = [to_bytes(&self.logits), self.states()].map(|bytes| upload(device, &bytes));
        let table = upload(device, &self.table());
        let (tables, counters) = (constant(device, &tables()), upload(device, &vec![0u32; sample.rows]));
        let partial = poisoned::<u8>(device, sample.workspace());
        let inputs = SamplerInputs {
            logits: &logits,
            sequences: &sequences,
            tables: &tables,
            partial: &partial,
            counters: &counters,
        };
        // Twice, because a replayed graph does not clear the counters.
        let [all, scattered] = [false, true].map(|reduced| {
            let keys = if reduced { best_keys_of_scattered_ids } else { best_keys };
            let best: Vec<u64> = (0..sample.rows).flat_map(|row| keys(self.row(row))).collect();
            let sample = Sample { reduced, ..sample };
            let best = upload(device, &best);
            sample.launch(device, RowStep::ALL, &choice, &best, &table, Some(inputs)).unwrap();
            assert!(bytes_of(device, &counters).iter().all(|&b| b == 0), "counters are zero after a launch");
            download(device, &choice)
        });
        assert_eq!(all, scattered, "blocks of other ids");
        all
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

/// Random sampling parameters, in all combinations.
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

/// Random rows of logits with random sampling parameters, and padding between them.
fn batch(random: &mut Random, rows: usize, vocab: usize) -> Batch {
    let sequences = 1 + rows / 2;
    let settings = (0..sequences).map(|_| settings(random, vocab)).collect();
    let mut table = Vec::new();
    for _ in 0..rows {
        let sequence = match random.below(12) {
            0 => NONE,
            1 => sequences as u32,
            _ => random.below(sequences) as u32,
        };
        table.push((sequence, random.next() as u32 >> random.below(32)));
    }
    Batch { vocab, logits: (0..rows).flat_map(|_| logits(random, vocab)).collect(), rows: table, settings }
}

/// Most of the random batches run only with `DFLASH_EXHAUSTIVE=1`.
#[test]
fn sampler_equals_choose_on_random_rows() {
    let mut random = Random::new(1);
    let mut turn = 0;
    for (vocab, few, all) in [
        (1, 3, 10),
        (2, 10, 30),
        (3, 7, 20),
        (17, 20, 60),
        (130, 16, 60),
        (2048, 6, 40),
        (9001, 4, 10),
        (32768, 2, 5),
    ] {
        // Launches cost by vocabulary.
        let rows = if vocab < 5000 || exhaustive() { 24 } else { 8 };
        for i in 0..cases(few, all) {
            let batch = batch(&mut random, rows, vocab);
            on_gpu_in_turn(turn, |device| batch.check(device, &format!("batch {i}")));
            turn += 1;
        }
    }
}

#[test]
fn sampler_is_the_same_under_every_schedule() {
    for vocab in [2, 17, 2047, 20000] {
        let batch = batch(&mut Random::new(vocab as u64), 12, vocab);
        let bytes = same_bits(|device| to_bytes(&batch.run(device)));
        assert_eq!(from_bytes::<u32>(&bytes), batch.expected());
    }
}

#[test]
fn sampler_equals_choose_on_a_vocabulary_of_151936() {
    let mut random = Random::new(5);
    let vocab = 151936;
    let params = |temperature, top_k, top_p, min_p| SamplingParams {
        temperature,
        top_k,
        top_p,
        min_p,
        seed: 77,
        stream: 3,
    };
    let settings = vec![
        params(0.0, 0, 1.0, 0.0),
        params(1.0, 0, 1.0, 0.0),
        params(0.7, 20, 0.8, 0.0),
        params(1.0, 0, 0.95, 0.01),
        params(2.0, 50, 1.0, 0.1),
        params(0.2, 0, 0.9, 0.0),
    ];
    let rows: Vec<(u32, u32)> = (0..settings.len()).map(|i| (i as u32, 1000 + i as u32)).collect();
    let logits = random.normals(rows.len() * vocab, 3.0);
    let batch = Batch { vocab, logits, rows, settings };
    on_gpu(|device| batch.check(device, "Qwen3"));
}

#[test]
fn top_k_and_top_p_cut_ties_as_choose_does() {
    on_gpu(|device| {
        let mut random = Random::new(8);
        // Equal logits in several bins of ids, unequal logits of equal weight, and cuts within and around them.
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
        // Ids that differ only in their upper digits.
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
fn equal_race_times_select_the_lower_id() {
    on_gpu(|device| {
        // In a flat row all weights are equal. At these positions the two smallest race times are equal too,
        // within one slice of 8192 ids and across slices.
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

/// Rows of sequence 0: up to 12 of the first 1000 positions at which `settings` select `token`, and 4 others.
fn rows_that_select(settings: &SamplingParams, row: &[f32], token: u32) -> Vec<(u32, u32)> {
    let (with, without): (Vec<u32>, Vec<u32>) =
        (0..1000).partition(|position| settings.choose(row, position + 1) == Some(token));
    assert!(!with.is_empty() && !without.is_empty());
    with.iter().take(12).chain(without.iter().take(4)).map(|&position| (0, position)).collect()
}

#[test]
fn top_p_rounds_its_mass_up() {
    on_gpu(|device| {
        // top_p asks for more mass than the best token has, by less than one unit of weight.
        let mut found = 0;
        for logit in (1..20).map(|i| -0.25 * i as f32) {
            let all =
                SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 3, stream: 1 };
            let row = vec![0.0, logit];
            let weights = all.survivors(&row).unwrap();
            let (best, total) = (1u128 << 32, (1u128 << 32) + u128::from(weights[1].1));
            let top_p = (best << 32).div_ceil(total);
            if (total * top_p) >> 32 != best || total * top_p == best << 32 {
                continue;
            }
            found += 1;
            let settings = SamplingParams { top_p: top_p as f64 / best as f64, ..all.clone() };
            assert_eq!(settings.survivors(&row).unwrap().len(), 2);
            let rows = rows_that_select(&all, &row, 1);
            let batch = Batch { vocab: 2, logits: row.repeat(rows.len()), rows, settings: vec![settings] };
            assert!(batch.expected().contains(&1));
            batch.check(device, "two tokens");
        }
        assert!(found > 3, "{found}");
    });
}

#[test]
fn min_p_keeps_a_weight_equal_to_its_threshold() {
    on_gpu(|device| {
        let all = SamplingParams { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 5, stream: 1 };
        let row = vec![0.0, -1.0];
        let weight = all.survivors(&row).unwrap()[1].1;
        for (more, kept) in [(0, 2), (1, 1)] {
            let settings =
                SamplingParams { min_p: (weight + more) as f64 / (1u64 << 32) as f64, ..all.clone() };
            assert_eq!(settings.survivors(&row).unwrap().len(), kept);
            let rows = rows_that_select(&all, &row, 1);
            let batch = Batch { vocab: 2, logits: row.repeat(rows.len()), rows, settings: vec![settings] };
            assert_eq!(batch.expected().contains(&1), kept == 2);
            batch.check(device, "two tokens");
        }
    });
}

#[test]
fn invalid_rows_select_nothing_and_change_no_other_row() {
    on_gpu(|device| {
        let vocab = 1000;
        let mut random = Random::new(11);
        let sound = random.normals(vocab, 3.0);
        let params = |temperature, top_k| SamplingParams {
            temperature,
            top_k,
            top_p: 1.0,
            min_p: 0.0,
            seed: 4,
            stream: 9,
        };
        let settings = vec![greedy(), params(1.0, 0), params(0.8, 40)];
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
            batch.check(device, "invalid");
        }
    });
}

#[test]
fn garbage_in_settings_and_keys_stays_in_bounds() {
    on_gpu(|device| {
        let mut random = Random::new(12);
        for i in 0..40 {
            let mut batch = batch(&mut random, 6, [1, 7, 300, 9000][i % 4]);
            let sample = batch.sample();
            let mut states = batch.states();
            states.iter_mut().for_each(|b| *b = random.next() as u8);
            if i % 2 == 0 {
                // Signs and exponents of a valid temperature scale.
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
            let inputs = SamplerInputs {
                logits: &logits,
                sequences: &sequences,
                tables: &tables,
                partial: &partial,
                counters: &counters,
            };
            let (best, table) = (upload(device, &best), upload(device, &batch.table()));
            sample.launch(device, RowStep::ALL, &choice, &best, &table, Some(inputs)).unwrap();
            let choices: Vec<u32> = download(device, &choice);
            assert!(choices.iter().all(|&c| c == NONE || (c as usize) < batch.vocab), "{choices:?}");
        }
    });
}

#[test]
fn greedy_launch_reads_only_the_best_keys() {
    let mut random = Random::new(13);
    let mut batch = batch(&mut random, 40, 5000);
    batch.settings.fill(greedy());
    let sample = batch.sample();
    let run = |device: &dyn Device| {
        let choice = poisoned::<u32>(device, sample.rows);
        let (best, table) = (upload(device, &batch.best()), upload(device, &batch.table()));
        sample.launch(device, RowStep::ALL, &choice, &best, &table, None).unwrap();
        bytes_of(device, &choice)
    };
    let Some(device) = TestGpu::counting() else { return };
    run(&device);
    let counts = device.counts()["sample"];
    // Every thread reads the table's entry of its row; a row without a sequence reads nothing else.
    let used = batch.rows.iter().filter(|(sequence, _)| (*sequence as usize) < batch.settings.len()).count();
    assert!(used < sample.rows);
    assert_eq!(counts.read, (used * sample.blocks * 8 + sample.rows * 512 * 16) as u64);
    assert_eq!((counts.written, counts.streamed, counts.blocks), (sample.rows as u64 * 4, 0, 40));
    let bytes = same_bits(run);
    assert_eq!(from_bytes::<u32>(&bytes), batch.expected());
}

/// Without the keys of the blocks the kernel reads the row five times for top-k and top-p, and three times
/// for one.
#[test]
fn top_k_and_top_p_read_only_the_blocks_of_the_best_keys() {
    let vocab = 151936;
    let logits = Random::new(14).normals(vocab, 3.0);
    let Some(device) = TestGpu::counting() else { return };
    let read = |temperature, top_k, top_p, reduced| {
        let settings = vec![SamplingParams { temperature, top_k, top_p, min_p: 0.0, seed: 1, stream: 0 }];
        let batch = Batch { vocab, logits: logits.clone(), rows: vec![(0, 1)], settings };
        let sample = Sample { reduced, ..batch.sample() };
        let choice = poisoned::<u32>(&device, 1);
        let [logits, sequences] =
            [to_bytes(&batch.logits), batch.states()].map(|bytes| upload(&device, &bytes));
        let inputs = SamplerInputs {
            logits: &logits,
            sequences: &sequences,
            tables: &constant(&device, &tables()),
            partial: &poisoned::<u8>(&device, sample.workspace()),
            counters: &upload(&device, &[0u32]),
        };
        let (best, table) = (upload(&device, &batch.best()), upload(&device, &batch.table()));
        device.reset_counts();
        sample.launch(&device, RowStep::ALL, &choice, &best, &table, Some(inputs)).unwrap();
        assert_eq!(download::<u32>(&device, &choice), batch.expected());
        device.counts()["sample"].read
    };
    // Every thread also reads the row's sequence and its settings.
    let (row, others) = (vocab as u64 * 4, 700_000);
    for (temperature, top_k, top_p, blocks, passes) in [
        // Three passes over 20 blocks of 128 logits and more.
        (0.7, 20, 0.8, 5 * 20 * 512, 5),
        (0.7, 20, 1.0, 3 * 20 * 512, 3),
        // One pass over the row, three over the 256 best blocks.
        (0.2, 0, 0.9, row + 3 * 256 * 512, 3),
    ] {
        let [with, without] = [false, true].map(|reduced| read(temperature, top_k, top_p, reduced));
        println!("top-k {top_k}, top-p {top_p}: {with} bytes, {without} without the keys");
        assert!(with < blocks + others && without > passes * row, "{with}, {without}");
    }
}
