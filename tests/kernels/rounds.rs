//! The state of sequences over hundreds of rounds against a reference on the host, both with fresh launches
//! and with replayed graphs.

use crate::support::kernel;

use crate::support::test_gpu::TestGpu;
use dflash::Error;
use dflash::gpu::device::{Buffer, Device, Graph};
use dflash::gpu::kernels::round::{DraftShape, Finish, Record, Ring, Round, STOP_IDS, Sequence, Tables};
use dflash::gpu::kernels::verify::{Verify, VerifyOutput};
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::SamplingParams;
use dflash::spec::verify::match_tree;
use kernel::*;

const NONE: u32 = u32::MAX;
const MASK: u32 = 99;
const RING_ROUNDS: usize = 3;

/// The sizes of a batch's rounds, which share their buffers.
#[derive(Clone, Copy)]
struct Sizes {
    sequences: usize,
    block: usize,
    /// Rows per sequence that the two kinds of rounds with drafts verify.
    verify_rows: [usize; 2],
    trees: bool,
    /// The row of a block that holds the anchor: 0, or 1.
    anchor_row: usize,
}

impl Sizes {
    fn of(sequences: usize, block: usize, trees: bool) -> Sizes {
        Sizes { sequences, block, verify_rows: [block; 2], trees, anchor_row: 0 }
    }

    fn max_rows(&self) -> usize {
        self.verify_rows[0].max(self.verify_rows[1])
    }

    /// The round of a kind, and whether it drafts: 0 and 1 do, 2 is an AR step.
    fn kind(&self, kind: usize) -> (Round, bool) {
        let Sizes { sequences, block, verify_rows, .. } = *self;
        let (max_verify_rows, drafts) = if kind < 2 { (verify_rows[kind], true) } else { (1, false) };
        (Round { sequences, block, max_verify_rows }, drafts)
    }
}

/// All buffers of rounds except those of the models.
struct RoundBuffers {
    sizes: Sizes,
    sequences: Buffer,
    draft_tokens: Buffer,
    draft_rows: Buffer,
    features: Buffer,
    draft_spans: Buffer,
    verify_rows: Buffer,
    verify_spans: Buffer,
    round_header: Buffer,
    drafts: Buffer,
    choices: Buffer,
    tokens: Buffer,
    parents: Option<Buffer>,
    accepted: Buffer,
    next: Buffer,
    path: Buffer,
    ring: Ring,
}

impl RoundBuffers {
    fn new(device: &dyn Device, sizes: Sizes) -> RoundBuffers {
        let Sizes { sequences, block, trees, .. } = sizes;
        let words = |count: usize| poisoned::<u32>(device, count);
        let (drafted, rows) = (sequences * block, sequences * sizes.max_rows());
        RoundBuffers {
            sizes,
            sequences: upload(device, &vec![0u8; sequences * Sequence::BYTES]),
            draft_tokens: words(drafted),
            draft_rows: words(2 * drafted * 4),
            features: words(drafted),
            draft_spans: words(sequences * 2),
            verify_rows: words(rows * 4),
            verify_spans: words(sequences * 2),
            round_header: upload(device, &[0u32; 3]),
            drafts: words(drafted),
            choices: words(rows),
            tokens: words(rows),
            parents: trees.then(|| words(rows)),
            accepted: words(sequences),
            next: words(sequences),
            path: words(rows),
            ring: Ring::new(
                device,
                Round { max_verify_rows: sizes.max_rows(), ..sizes.kind(0).0 },
                RING_ROUNDS,
            )
            .unwrap(),
        }
    }

    fn tables(&self) -> Tables<'_> {
        Tables {
            draft_tokens: &self.draft_tokens,
            draft_rows: &self.draft_rows,
            features: &self.features,
            draft_spans: &self.draft_spans,
            verify_rows: &self.verify_rows,
            verify_spans: &self.verify_spans,
            round_header: &self.round_header,
        }
    }

    /// The launches of a round of this kind, without the passes of the models.
    fn launch(&self, device: &dyn Device, kind: usize) -> dflash::Result<()> {
        let (round, drafts) = self.sizes.kind(kind);
        let Round { sequences, max_verify_rows, .. } = round;
        let output = VerifyOutput { accepted: &self.accepted, next: &self.next, path: &self.path };
        round.begin(
            device,
            self.tables(),
            &self.sequences,
            &self.path,
            drafts,
            MASK,
            self.sizes.anchor_row,
        )?;
        let (table, spans) = (&self.verify_rows, &self.verify_spans);
        round.tokens(device, &self.tokens, &self.drafts, table, spans, &self.sequences, None)?;
        Verify { sequences, block: max_verify_rows }.launch(
            device,
            output,
            &self.choices,
            &self.tokens,
            self.parents.as_ref(),
            &self.verify_spans,
        )?;
        self.finish(device, kind, output)
    }

    fn finish(&self, device: &dyn Device, kind: usize, output: VerifyOutput) -> dflash::Result<()> {
        let (round, spans) = (self.sizes.kind(kind).0, &self.verify_spans);
        let (ring, header) = (&self.ring, &self.round_header);
        round.finish(device, &self.sequences, ring, header, output, &self.tokens, spans, None)
    }

    fn capture(&self, device: &dyn Device, kind: usize) -> Graph {
        device.capture(&mut || self.launch(device, kind)).unwrap()
    }

    fn admit(&self, device: &dyn Device, slot: usize, sequence: &Sequence) {
        let at = self.sequences.slice(slot * Sequence::BYTES, Sequence::BYTES).unwrap();
        device.upload(&at, &sequence.to_bytes().unwrap()).unwrap();
    }

    /// Uploads what the models and the tree builder would write for a round.
    fn upload_inputs(&self, device: &dyn Device, inputs: &Inputs) {
        let put = |to: &Buffer, words: &[u32]| {
            device.upload(&to.slice(0, words.len() * 4).unwrap(), &to_bytes(words)).unwrap();
        };
        put(&self.drafts, &inputs.drafts);
        put(&self.choices, &inputs.choices);
        if let Some(parents) = &self.parents {
            put(parents, &inputs.parents);
        }
    }

    /// Everything that a round writes.
    fn bytes(&self, device: &dyn Device) -> Vec<u8> {
        let buffers = [
            &self.sequences,
            &self.draft_tokens,
            &self.draft_rows,
            &self.features,
            &self.draft_spans,
            &self.verify_rows,
            &self.verify_spans,
            &self.round_header,
            &self.tokens,
            &self.accepted,
            &self.next,
            &self.path,
            &self.ring.memory.buffer,
        ];
        buffers.iter().flat_map(|buffer| bytes_of(device, buffer)).collect()
    }
}

/// Drafts `[sequences][block]`; the target's choices and the parents of trees `[sequences][max_verify_rows]`.
struct Inputs {
    drafts: Vec<u32>,
    choices: Vec<u32>,
    parents: Vec<u32>,
}

impl Inputs {
    fn new(random: &mut Random, sizes: Sizes, max_verify_rows: usize) -> Inputs {
        let Sizes { sequences, block, trees, .. } = sizes;
        let mut word = || match random.below(150) {
            0 => NONE,
            i => (i % 2 + i / 149) as u32,
        };
        let mut words = |count: usize| (0..count).map(|_| word()).collect();
        let (drafts, choices) = (words(sequences * block), words(sequences * max_verify_rows));
        let parent = |row: usize| match row {
            0 => 0,
            _ if trees => random.below(row) as u32,
            _ => row as u32 - 1,
        };
        let parents = (0..sequences * max_verify_rows).map(|i| i % max_verify_rows).map(parent).collect();
        Inputs { drafts, choices, parents }
    }
}

/// A round of one sequence on the host: updates `sequence` as the device must, and returns its record.
fn reference_round(
    sequence: &mut Sequence,
    (round, drafting): (Round, bool),
    drafts: &[u32],
    choices: &[u32],
    parents: &[u32],
) -> Record {
    let idle =
        |s: &Sequence| Record { tokens: vec![], acceptance_length: 0, finish: s.finish, drafted: 0, path: 0 };
    if !sequence.active {
        return idle(sequence);
    }
    let rows = rows(sequence, round, drafting).1;
    sequence.rounds += 1;
    let tokens = [&[sequence.anchor], &drafts[1..rows]].concat();
    let end = |sequence: &mut Sequence, finish| {
        sequence.finish = finish;
        sequence.active = false;
    };
    if tokens[1..].contains(&NONE) {
        end(sequence, Finish::InvalidDrafter);
        return idle(sequence);
    }
    let Some((path, next)) =
        match_tree(&tokens, &parents[..rows], |row| Some(choices[row]).filter(|&c| c != NONE))
    else {
        end(sequence, Finish::InvalidTarget);
        return idle(sequence);
    };
    sequence.drafted += rows as u32 - 1;
    sequence.accepted += path.len() as u32 - 1;
    let verified: Vec<u32> = path[1..].iter().map(|&row| tokens[row]).chain([next]).collect();
    let mut kept = Vec::new();
    let start = sequence.length;
    for &token in &verified {
        // The anchor's features exist now; the new token becomes the anchor.
        kept.push(token);
        sequence.length += 1;
        sequence.anchor = token;
        sequence.budget -= 1;
        if sequence.stop_ids.contains(&token) {
            end(sequence, Finish::Stop);
        } else if sequence.budget == 0 {
            end(sequence, Finish::Length);
        } else if sequence.length + 1 == sequence.end {
            end(sequence, Finish::Context);
        }
        if !sequence.active {
            break;
        }
    }
    sequence.pending = if sequence.draft_end > start { kept.len() as u32 } else { 0 };
    let path_bits = path.iter().map(|row| 1 << row).sum();
    let (acceptance_length, finish) = (verified.len() as u32, sequence.finish);
    Record { tokens: kept, acceptance_length, finish, drafted: rows as u32 - 1, path: path_bits }
}

/// Rows of a block, and how many of them are verified.
fn rows(sequence: &Sequence, round: Round, drafts: bool) -> (usize, usize) {
    let by_drafter = (sequence.draft_end as usize).saturating_sub(sequence.length as usize).max(1);
    let by_context = (sequence.end - 1 - sequence.length) as usize;
    let block = (sequence.block as usize).min(round.block).min(by_drafter).min(by_context).max(1);
    let block = if drafts { block } else { 1 };
    (block, block.min(sequence.rows as usize).min(round.max_verify_rows))
}

/// The tables that `round_begin` and `round_tokens` must write for the states before a round: draft tokens,
/// draft rows, draft spans, verify rows, verify spans, verify tokens, rows of pending features. `path` is
/// that of the round before, with `columns` columns.
fn reference_tables(
    all: &[Sequence],
    (round, drafting): (Round, bool),
    inputs: &Inputs,
    (path, columns): (&[u32], usize),
    anchor_row: usize,
) -> [Vec<u32>; 7] {
    let Round { block, max_verify_rows, .. } = round;
    let padding = [NONE, 0, NONE, NONE];
    let mut tables: [Vec<u32>; 7] = Default::default();
    let mut block_rows = Vec::new();
    for (slot, s) in all.iter().enumerate() {
        let (of_block, rows) = if s.active { rows(s, round, drafting) } else { (0, 0) };
        let (drafted, seq) = (if of_block > 1 { of_block } else { 0 }, slot as u32);
        for row in 0..block {
            let at = slot * block + row;
            let (j, query) = (row as u32, at as u32);
            tables[0].push(if row >= drafted {
                NONE
            } else if row == anchor_row {
                s.anchor
            } else {
                MASK
            });
            let feature = s.active && j < s.pending && s.length - s.pending + j < s.draft_end;
            let position = s.length.wrapping_sub(s.pending).wrapping_add(j);
            let of_path = path.get(slot * columns + row).filter(|&&of| row < columns && of < columns as u32);
            let of_path = of_path.map(|of| (slot * columns) as u32 + of);
            tables[6].push(if feature { of_path.unwrap_or(NONE) } else { NONE });
            tables[1].extend(if feature { [seq, position, position, NONE] } else { padding });
            let position = s.length.wrapping_add(j).wrapping_sub(anchor_row as u32);
            let stored = if row < anchor_row { NONE } else { position };
            block_rows.extend(if row < drafted { [seq, position, stored, query] } else { padding });
        }
        for row in 0..max_verify_rows {
            let (j, query) = (row as u32, (slot * max_verify_rows + row) as u32);
            tables[3].extend(if row < rows { [seq, s.length + j, s.length + j, query] } else { padding });
            tables[5].push(if row >= rows {
                NONE
            } else if row == 0 {
                s.anchor
            } else {
                inputs.drafts[slot * block + row]
            });
        }
        let span = |first: usize, rows: usize| match rows {
            0 => [0, 0],
            _ => [s.length - first as u32, rows as u32],
        };
        tables[2].extend(span(anchor_row, drafted));
        tables[4].extend(span(0, rows));
    }
    tables[1].extend(block_rows);
    tables
}

fn random_sequence(random: &mut Random, block: usize) -> Sequence {
    let length = 1 + random.below(200) as u32;
    let end = length + 2 + random.below(60) as u32;
    let budget = 1 + random.below(40) as u32;
    let draft_end = match random.below(6) {
        0 => 0,
        1 => length + random.below(20) as u32,
        2 => length.saturating_sub(1 + random.below(3) as u32).max(1),
        _ => 100_000,
    };
    let stops = random.below(4);
    Sequence {
        active: true,
        length,
        anchor: random.below(2) as u32,
        pending: if draft_end == 0 { 0 } else { random.below(block + 1).min(length as usize) as u32 },
        budget,
        end,
        draft_end,
        block: 1 + random.below(block + 2).min(63) as u32,
        rows: if random.below(2) == 0 { 64 } else { 1 + random.below(block + 2).min(63) as u32 },
        form: DraftShape::Chain,
        sampling: SamplingParams {
            temperature: 0.8,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            seed: random.next(),
            stream: 7,
        },
        stop_ids: [2, 40, 41][..stops.min(3)].to_vec(),
        finish: Finish::Running,
        rounds: 0,
        drafted: 0,
        accepted: 0,
        min_confidence: 0.0,
        verify_method: VerifyMethod::Match,
    }
}

/// An empty slot.
fn empty() -> Sequence {
    Sequence { active: false, budget: 0, ..random_sequence(&mut Random::new(0), 1) }
}

/// Runs 300 rounds, 120 unless [`exhaustive`], with sequences that start and end, and calls `before` with the
/// number of each round.
/// Returns how often sequences ended with each `Finish`.
fn simulate(device: &dyn Device, sizes: Sizes, before: impl Fn(usize)) -> [usize; 6] {
    let Sizes { sequences, block, .. } = sizes;
    let mut random = Random::new((sequences * 100 + block) as u64);
    let (fresh, replayed) = (RoundBuffers::new(device, sizes), RoundBuffers::new(device, sizes));
    let graphs = [0, 1, 2].map(|kind| replayed.capture(device, kind));
    let mut columns = 0;
    let mut all: Vec<Sequence> = vec![empty(); sequences];
    let mut ends = [0; 6];
    for (slot, sequence) in all.iter().enumerate() {
        [&fresh, &replayed].iter().for_each(|to| to.admit(device, slot, sequence));
    }
    for round in 1..=cases(120, 300) as u32 {
        for (slot, sequence) in all.iter_mut().enumerate() {
            // Ended sequences stay for some rounds, which must not change them.
            if !sequence.active && random.below(3) == 0 {
                *sequence = random_sequence(&mut random, block);
                [&fresh, &replayed].iter().for_each(|to| to.admit(device, slot, sequence));
            }
        }
        let kind = random.below(7) / 3;
        let (shape, max_verify_rows) = (sizes.kind(kind), sizes.kind(kind).0.max_verify_rows);
        let inputs = Inputs::new(&mut random, sizes, max_verify_rows);
        [&fresh, &replayed].iter().for_each(|to| to.upload_inputs(device, &inputs));
        before(round as usize);
        let path: Vec<u32> = download(device, &fresh.path);
        fresh.launch(device, kind).unwrap();
        device.replay(&graphs[kind]).unwrap();
        assert!(
            fresh.bytes(device) == replayed.bytes(device),
            "round {round}: a replay differs from fresh launches"
        );

        let words = |buffer: &Buffer| download::<u32>(device, buffer);
        let active = all.iter().filter(|s| s.active).count() as u32;
        assert_eq!(words(&fresh.round_header), [round, active, max_verify_rows as u32]);
        let got = [
            &fresh.draft_tokens,
            &fresh.draft_rows,
            &fresh.draft_spans,
            &fresh.verify_rows,
            &fresh.verify_spans,
            &fresh.tokens,
            &fresh.features,
        ];
        let names = [
            "draft tokens",
            "draft rows",
            "draft spans",
            "verify rows",
            "verify spans",
            "tokens",
            "features",
        ];
        let tables = reference_tables(&all, shape, &inputs, (&path, columns), sizes.anchor_row);
        for ((name, got), expected) in names.iter().zip(got).zip(tables) {
            assert_eq!(words(got)[..expected.len()], expected, "round {round}: {name}");
        }
        columns = max_verify_rows;
        let states = bytes_of(device, &fresh.sequences);
        for (slot, sequence) in all.iter_mut().enumerate() {
            let of = |words: &[u32], width| words[slot * width..][..width].to_vec();
            let (drafts, choices) = (of(&inputs.drafts, block), of(&inputs.choices, max_verify_rows));
            let took_part = sequence.active;
            let record =
                reference_round(sequence, shape, &drafts, &choices, &of(&inputs.parents, max_verify_rows));
            let state = &states[slot * Sequence::BYTES..][..Sequence::BYTES];
            assert_eq!(sequence.updated(state).unwrap(), *sequence, "round {round}, sequence {slot}");
            assert_eq!(state, sequence.to_bytes().unwrap(), "round {round}, sequence {slot}");
            assert_eq!(fresh.ring.read(round, slot).unwrap(), Some(record), "round {round}, sequence {slot}");
            assert_eq!(fresh.ring.read(round + 1, slot).unwrap(), None);
            if took_part {
                ends[sequence.finish as usize] += 1;
            }
            if round > RING_ROUNDS as u32 {
                assert!(matches!(fresh.ring.read(round - RING_ROUNDS as u32, slot), Err(Error::Internal(_))));
            }
        }
    }
    ends
}

#[test]
fn rounds_equal_the_host_reference_and_a_replayed_graph() {
    let mut ends = [0; 6];
    for (sequences, block, verify_rows, trees) in [
        (1, 1, [1, 1], false),
        (5, 7, [7, 7], false),
        (16, 16, [16, 4], false),
        (3, 64, [64, 32], true),
        (6, 9, [9, 24], true),
        (70, 2, [2, 3], false),
    ] {
        let sizes = Sizes { sequences, block, verify_rows, trees, anchor_row: sequences % 2 };
        let found = simulate(gpu(), sizes, |round| set_schedule(round % 5));
        ends.iter_mut().zip(found).for_each(|(all, more)| *all += more);
    }
    // Every `Finish` occurred often.
    assert!(ends.iter().all(|&n| n >= 10), "{ends:?}");
}

#[test]
fn fully_accepted_blocks_of_64_end_at_the_first_stop() {
    on_gpu(|device| {
        let block = 64;
        for stop in [None, Some(0), Some(31), Some(32), Some(45), Some(63)] {
            let sizes = Sizes::of(1, block, false);
            let buffers = RoundBuffers::new(device, sizes);
            let mut sequence = Sequence {
                pending: 0,
                budget: 100,
                end: 1000,
                draft_end: 100_000,
                block: 64,
                rows: 64,
                stop_ids: vec![7],
                ..random_sequence(&mut Random::new(61), block)
            };
            buffers.admit(device, 0, &sequence);
            // The target chooses the draft of the next row at every row, and 100 + 63 at the last.
            let mut choices: Vec<u32> = (0..64).map(|row| 100 + row).collect();
            if let Some(row) = stop {
                (choices[row], choices[63]) = (7, 7);
            }
            let drafts = [&[NONE], &choices[..63]].concat();
            let inputs = Inputs { drafts, choices, parents: (0..64).map(|r: u32| r.max(1) - 1).collect() };
            buffers.upload_inputs(device, &inputs);
            buffers.launch(device, 0).unwrap();
            device.synchronize().unwrap();
            let record = reference_round(
                &mut sequence,
                sizes.kind(0),
                &inputs.drafts,
                &inputs.choices,
                &inputs.parents,
            );
            assert_eq!(record.tokens.len(), stop.map_or(64, |row| row + 1));
            assert_eq!(buffers.ring.read(1, 0).unwrap(), Some(record), "stop at {stop:?}");
            assert_eq!(
                bytes_of(device, &buffers.sequences),
                sequence.to_bytes().unwrap(),
                "stop at {stop:?}"
            );
        }
    });
}

#[test]
fn no_argument_changes_between_rounds() {
    on_gpu(|device| {
        let sizes = Sizes::of(4, 8, false);
        let buffers = RoundBuffers::new(device, sizes);
        let first = buffers.capture(device, 0);
        for i in 0..4 {
            buffers.admit(device, i, &random_sequence(&mut Random::new(i as u64), 8));
        }
        let mut random = Random::new(5);
        for _ in 0..5 {
            buffers.upload_inputs(device, &Inputs::new(&mut random, sizes, 8));
            device.replay(&first).unwrap();
        }
        assert_eq!(buffers.capture(device, 0).nodes, first.nodes);
        assert_eq!(first.nodes.len(), 4);
    });
}

#[test]
fn rounds_are_the_same_under_every_schedule() {
    let bytes = same_bits(|device| {
        let sizes = Sizes::of(6, 40, true);
        let buffers = RoundBuffers::new(device, sizes);
        let mut random = Random::new(31);
        let mut bytes = Vec::new();
        for i in 0..6 {
            buffers.admit(device, i, &random_sequence(&mut random, 40));
        }
        for _ in 0..8 {
            buffers.upload_inputs(device, &Inputs::new(&mut random, sizes, 40));
            buffers.launch(device, 0).unwrap();
            bytes.extend(buffers.bytes(device));
        }
        bytes
    });
    assert_written(&bytes, "a round");
}

#[test]
fn a_round_without_active_sequences_writes_only_its_number() {
    on_gpu(|device| {
        let (sequences, block) = (3, 8);
        let sizes = Sizes::of(sequences, block, false);
        let buffers = RoundBuffers::new(device, sizes);
        let mut random = Random::new(41);
        for i in 0..sequences {
            let last = Sequence { budget: 1, stop_ids: vec![], ..random_sequence(&mut random, block) };
            buffers.admit(device, i, &last);
        }
        let inputs = |random: &mut Random| loop {
            let inputs = Inputs::new(random, sizes, block);
            if ![&inputs.drafts, &inputs.choices].iter().any(|words| words.contains(&NONE)) {
                return inputs;
            }
        };
        buffers.upload_inputs(device, &inputs(&mut random));
        buffers.launch(device, 0).unwrap();
        let state = bytes_of(device, &buffers.sequences);
        let record = |round: u32| {
            (0..sequences).map(|s| buffers.ring.read(round, s).unwrap().unwrap()).collect::<Vec<_>>()
        };
        assert!(record(1).iter().all(|r| r.tokens.len() == 1 && r.finish == Finish::Length));
        let words = bytes_of(device, &buffers.ring.memory.buffer);
        for round in 2..=2 * RING_ROUNDS as u32 {
            buffers.upload_inputs(device, &inputs(&mut random));
            buffers.launch(device, 0).unwrap();
            device.synchronize().unwrap();
            assert!(
                record(round)
                    .iter()
                    .all(|r| r.tokens.is_empty() && r.acceptance_length == 0 && r.finish == Finish::Length)
            );
            assert_eq!(bytes_of(device, &buffers.sequences), state);
            assert_eq!(download::<u32>(device, &buffers.round_header), [round, 0, block as u32]);
            assert!(bytes_of(device, &buffers.verify_rows).chunks(16).all(|row| row[..4] == [255; 4]));
        }
        // The tokens of the first round are unchanged.
        let after = bytes_of(device, &buffers.ring.memory.buffer);
        let tokens =
            |bytes: &[u8]| bytes.chunks(64).flat_map(|record| record[32..].to_vec()).collect::<Vec<u8>>();
        assert_eq!(tokens(&after), tokens(&words));
    });
}

#[test]
fn garbage_in_states_and_outputs_stays_in_bounds() {
    on_gpu(|device| {
        let mut random = Random::new(51);
        for i in 0..60 {
            let (sequences, block) = (1 + random.below(5), 1 + random.below(64));
            let verify_rows = [1 + random.below(64), 1 + random.below(64)];
            let sizes = Sizes { sequences, block, verify_rows, trees: i % 2 == 0, anchor_row: 0 };
            let buffers = RoundBuffers::new(device, sizes);
            let mut garbage = |buffer: &Buffer| {
                let words: Vec<u32> =
                    (0..buffer.bytes() / 4).map(|_| random.next() as u32 >> random.below(32)).collect();
                device.upload(buffer, &to_bytes(&words)).unwrap();
            };
            for buffer in [&buffers.sequences, &buffers.drafts, &buffers.choices, &buffers.round_header] {
                garbage(buffer);
            }
            buffers.parents.iter().for_each(&mut garbage);
            buffers.launch(device, 0).unwrap();
            // Garbage in the verification output too.
            for buffer in
                [&buffers.accepted, &buffers.next, &buffers.path, &buffers.tokens, &buffers.verify_spans]
            {
                garbage(buffer);
            }
            let output =
                VerifyOutput { accepted: &buffers.accepted, next: &buffers.next, path: &buffers.path };
            buffers.finish(device, 0, output).unwrap();
            for row in
                download::<u32>(device, &buffers.verify_rows).chunks(4).take(sequences * verify_rows[0])
            {
                assert!(
                    row[0] == NONE
                        || (row[0] < sequences as u32 && row[3] < (sequences * verify_rows[0]) as u32)
                );
            }
            let records: Vec<u32> = download(device, &buffers.ring.memory.buffer);
            let words = records.len() / RING_ROUNDS / sequences;
            assert!(records.chunks(words).all(|record| record[1] <= verify_rows[0] as u32));
        }
    });
}

#[test]
fn states_and_rings_refuse_wrong_sizes() {
    let device = TestGpu::new();
    let many = Sequence { stop_ids: vec![1; STOP_IDS + 1], ..empty() };
    assert!(many.to_bytes().unwrap_err().to_string().contains("12 stop ids"));
    assert!(empty().updated(&[0; 12]).unwrap_err().to_string().contains("12 bytes"));
    let mut bytes = empty().to_bytes().unwrap();
    bytes[60] = 6;
    assert!(empty().updated(&bytes).unwrap_err().to_string().contains("code 6"));
    for (sequences, block, rounds) in [(0, 1, 1), (1025, 1, 1), (1, 0, 1), (1, 65, 1), (1, 1, 0)] {
        assert!(Ring::new(&device, Round { sequences, block, max_verify_rows: block }, rounds).is_err());
    }
    let ring = Ring::new(&device, Round { sequences: 2, block: 4, max_verify_rows: 4 }, 2).unwrap();
    assert_eq!(ring.read(1, 1).unwrap(), None);
    assert!(ring.read(1, 2).is_err());
}
