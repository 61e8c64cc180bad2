//! The state of sequences over hundreds of rounds against a plain model of it, as fresh launches and as one replayed
//! graph.

use crate::support::kernel;

use dflash::Error;
use dflash::gpu::device::{Buffer, Device, Graph};
use dflash::gpu::emulator::{Emulator, Schedule};
use dflash::gpu::kernels::round::{Finish, Form, Record, Ring, Round, STOP_IDS, Sequence, Tables};
use dflash::gpu::kernels::verify::{Verify, VerifyOutput};
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::SamplingParams;
use dflash::spec::verify::match_tree;
use kernel::*;

const NONE: u32 = u32::MAX;
const MASK: u32 = 99;
const PLACES: usize = 3;

/// Rounds of several sizes that share what they work on.
#[derive(Clone, Copy)]
struct Sizes {
    sequences: usize,
    block: usize,
    /// Rows that a round verifies of a sequence: of rounds with drafts, in turn.
    wide: [usize; 2],
    trees: bool,
}

impl Sizes {
    fn of(sequences: usize, block: usize, trees: bool) -> Sizes {
        Sizes { sequences, block, wide: [block; 2], trees }
    }

    fn most(&self) -> usize {
        self.wide[0].max(self.wide[1])
    }

    /// The round of that kind, and whether it drafts.
    fn kind(&self, kind: usize) -> (Round, bool) {
        let Sizes { sequences, block, wide, .. } = *self;
        let (wide, drafts) = if kind < 2 { (wide[kind], true) } else { (1, false) };
        (Round { sequences, block, max_verify_rows: wide }, drafts)
    }
}

/// All that rounds work on, but the models.
struct Place {
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

impl Place {
    fn new(device: &dyn Device, sizes: Sizes) -> Place {
        let Sizes { sequences, block, trees, .. } = sizes;
        let words = |count: usize| poisoned::<u32>(device, count);
        let (drafted, rows) = (sequences * block, sequences * sizes.most());
        Place {
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
            ring: Ring::new(device, Round { max_verify_rows: sizes.most(), ..sizes.kind(0).0 }, PLACES)
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

    /// The launches of a round of that kind, the passes of the models left out.
    fn launch(&self, device: &dyn Device, kind: usize) -> dflash::Result<()> {
        let (round, drafts) = self.sizes.kind(kind);
        let Round { sequences, max_verify_rows: wide, .. } = round;
        let verdict = VerifyOutput { accepted: &self.accepted, next: &self.next, path: &self.path };
        round.begin(device, self.tables(), &self.sequences, &self.path, drafts, MASK)?;
        round.tokens(device, &self.tokens, &self.drafts, &self.sequences, &self.verify_spans)?;
        Verify { sequences, block: wide }.launch(
            device,
            verdict,
            &self.choices,
            &self.tokens,
            self.parents.as_ref(),
            &self.verify_spans,
        )?;
        self.finish(device, kind, verdict)
    }

    fn finish(&self, device: &dyn Device, kind: usize, verdict: VerifyOutput) -> dflash::Result<()> {
        let (round, spans) = (self.sizes.kind(kind).0, &self.verify_spans);
        round.finish(device, &self.sequences, &self.ring, &self.round_header, verdict, &self.tokens, spans)
    }

    fn capture(&self, device: &dyn Device, kind: usize) -> Graph {
        device.capture(&mut || self.launch(device, kind)).unwrap()
    }

    fn join(&self, device: &dyn Device, place: usize, sequence: &Sequence) {
        let at = self.sequences.slice(place * Sequence::BYTES, Sequence::BYTES).unwrap();
        device.upload(&at, &sequence.to_bytes().unwrap()).unwrap();
    }

    /// What the models and the tree's builder leave for a round.
    fn feed(&self, device: &dyn Device, inputs: &Inputs) {
        let put = |to: &Buffer, words: &[u32]| {
            device.upload(&to.slice(0, words.len() * 4).unwrap(), &to_bytes(words)).unwrap();
        };
        put(&self.drafts, &inputs.drafts);
        put(&self.choices, &inputs.choices);
        if let Some(parents) = &self.parents {
            put(parents, &inputs.parents);
        }
    }

    /// Everything a round wrote.
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

/// Drafts [sequences][block]; the target's choices, and trees, [sequences][wide].
struct Inputs {
    drafts: Vec<u32>,
    choices: Vec<u32>,
    parents: Vec<u32>,
}

impl Inputs {
    fn new(random: &mut Random, sizes: Sizes, wide: usize) -> Inputs {
        let Sizes { sequences, block, trees, .. } = sizes;
        let mut word = || match random.below(150) {
            0 => NONE,
            i => (i % 2 + i / 149) as u32,
        };
        let mut words = |count: usize| (0..count).map(|_| word()).collect();
        let (drafts, choices) = (words(sequences * block), words(sequences * wide));
        let parent = |row: usize| match row {
            0 => 0,
            _ if trees => random.below(row) as u32,
            _ => row as u32 - 1,
        };
        let parents = (0..sequences * wide).map(|i| i % wide).map(parent).collect();
        Inputs { drafts, choices, parents }
    }
}

/// A sequence as a program without devices would keep it; `sequence` is what the device's must be.
fn model_round(
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
        end(sequence, Finish::DamagedDrafter);
        return idle(sequence);
    }
    let Some((path, next)) =
        match_tree(&tokens, &parents[..rows], |row| Some(choices[row]).filter(|&c| c != NONE))
    else {
        end(sequence, Finish::DamagedTarget);
        return idle(sequence);
    };
    sequence.drafted += rows as u32 - 1;
    sequence.accepted += path.len() as u32 - 1;
    let judged: Vec<u32> = path[1..].iter().map(|&row| tokens[row]).chain([next]).collect();
    let mut kept = Vec::new();
    let start = sequence.length;
    for &token in &judged {
        // The anchor's features are there now; the new token is the anchor.
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
    let stood = path.iter().map(|row| 1 << row).sum();
    let (judged, finish) = (judged.len() as u32, sequence.finish);
    Record { tokens: kept, acceptance_length: judged, finish, drafted: rows as u32 - 1, path: stood }
}

/// Rows of a block, and those of them that are verified.
fn rows(sequence: &Sequence, round: Round, drafts: bool) -> (usize, usize) {
    let by_drafter = (sequence.draft_end as usize).saturating_sub(sequence.length as usize).max(1);
    let by_context = (sequence.end - 1 - sequence.length) as usize;
    let block = (sequence.block as usize).min(round.block).min(by_drafter).min(by_context).max(1);
    let block = if drafts { block } else { 1 };
    (block, block.min(sequence.rows as usize).min(round.max_verify_rows))
}

/// What `round_begin` and `round_tokens` must make of the state before a round: draft tokens, draft rows, draft spans,
/// verify rows, verify spans, verify tokens, rows of pending features. `path` as the round before left it, with so many
/// `columns`.
fn model_tables(
    all: &[Sequence],
    (round, drafting): (Round, bool),
    inputs: &Inputs,
    (path, columns): (&[u32], usize),
) -> [Vec<u32>; 7] {
    let Round { block, max_verify_rows: wide, .. } = round;
    let padding = [NONE, 0, NONE, NONE];
    let mut tables: [Vec<u32>; 7] = Default::default();
    let mut block_rows = Vec::new();
    for (place, s) in all.iter().enumerate() {
        let (of_block, rows) = if s.active { rows(s, round, drafting) } else { (0, 0) };
        let (drafted, own) = (if of_block > 1 { of_block } else { 0 }, place as u32);
        for row in 0..block {
            let at = place * block + row;
            let (j, query) = (row as u32, at as u32);
            tables[0].push(if row >= drafted {
                NONE
            } else if row == 0 {
                s.anchor
            } else {
                MASK
            });
            let feature = s.active && j < s.pending && s.length - s.pending + j < s.draft_end;
            let position = s.length.wrapping_sub(s.pending).wrapping_add(j);
            let of_path = path.get(place * columns + row).filter(|&&of| row < columns && of < columns as u32);
            let of_path = of_path.map(|of| (place * columns) as u32 + of);
            tables[6].push(if feature { of_path.unwrap_or(NONE) } else { NONE });
            tables[1].extend(if feature { [own, position, position, NONE] } else { padding });
            block_rows.extend(if row < drafted { [own, s.length + j, s.length + j, query] } else { padding });
        }
        for row in 0..wide {
            let (j, query) = (row as u32, (place * wide + row) as u32);
            tables[3].extend(if row < rows { [own, s.length + j, s.length + j, query] } else { padding });
            tables[5].push(if row >= rows {
                NONE
            } else if row == 0 {
                s.anchor
            } else {
                inputs.drafts[place * block + row]
            });
        }
        let span = |rows: usize| if rows > 0 { [s.length, rows as u32] } else { [0, 0] };
        tables[2].extend(span(drafted));
        tables[4].extend(span(rows));
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
        form: Form::Chain,
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
        verify_method: VerifyMethod::Match,
    }
}

/// An empty place.
fn empty() -> Sequence {
    Sequence { active: false, budget: 0, ..random_sequence(&mut Random::new(0), 1) }
}

/// Runs 300 rounds with sequences that come and go, `before` each with its number; returns how often each end was met.
fn simulate(device: &dyn Device, sizes: Sizes, before: impl Fn(usize)) -> [usize; 6] {
    let Sizes { sequences, block, .. } = sizes;
    let mut random = Random::new((sequences * 100 + block) as u64);
    let (fresh, replayed) = (Place::new(device, sizes), Place::new(device, sizes));
    let graphs = [0, 1, 2].map(|kind| replayed.capture(device, kind));
    let mut columns = 0;
    let mut all: Vec<Sequence> = vec![empty(); sequences];
    let mut ends = [0; 6];
    for (place, sequence) in all.iter().enumerate() {
        [&fresh, &replayed].iter().for_each(|to| to.join(device, place, sequence));
    }
    for round in 1..=300 {
        for (place, sequence) in all.iter_mut().enumerate() {
            // Ended ones stay for some rounds, in which nothing may happen to them.
            if !sequence.active && random.below(3) == 0 {
                *sequence = random_sequence(&mut random, block);
                [&fresh, &replayed].iter().for_each(|to| to.join(device, place, sequence));
            }
        }
        let kind = random.below(7) / 3;
        let (shape, wide) = (sizes.kind(kind), sizes.kind(kind).0.max_verify_rows);
        let inputs = Inputs::new(&mut random, sizes, wide);
        [&fresh, &replayed].iter().for_each(|to| to.feed(device, &inputs));
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
        assert_eq!(words(&fresh.round_header), [round, active, wide as u32]);
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
        let tables = model_tables(&all, shape, &inputs, (&path, columns));
        for ((name, got), expected) in names.iter().zip(got).zip(tables) {
            assert_eq!(words(got)[..expected.len()], expected, "round {round}: {name}");
        }
        columns = wide;
        let states = bytes_of(device, &fresh.sequences);
        for (place, sequence) in all.iter_mut().enumerate() {
            let of = |words: &[u32], width| words[place * width..][..width].to_vec();
            let (drafts, choices) = (of(&inputs.drafts, block), of(&inputs.choices, wide));
            let took_part = sequence.active;
            let record = model_round(sequence, shape, &drafts, &choices, &of(&inputs.parents, wide));
            let state = &states[place * Sequence::BYTES..][..Sequence::BYTES];
            assert_eq!(sequence.updated(state).unwrap(), *sequence, "round {round}, sequence {place}");
            assert_eq!(state, sequence.to_bytes().unwrap(), "round {round}, sequence {place}");
            assert_eq!(
                fresh.ring.read(round, place).unwrap(),
                Some(record),
                "round {round}, sequence {place}"
            );
            assert_eq!(fresh.ring.read(round + 1, place).unwrap(), None);
            if took_part {
                ends[sequence.finish as usize] += 1;
            }
            if round > PLACES as u32 {
                assert!(matches!(fresh.ring.read(round - PLACES as u32, place), Err(Error::Internal(_))));
            }
        }
    }
    ends
}

#[test]
fn rounds_are_the_plain_models_and_a_replayed_graphs() {
    let mut ends = [0; 6];
    for (sequences, block, wide, trees) in [
        (1, 1, [1, 1], false),
        (5, 7, [7, 7], false),
        (16, 16, [16, 4], false),
        (3, 64, [64, 32], true),
        (6, 9, [9, 24], true),
        (70, 2, [2, 3], false),
    ] {
        let sizes = Sizes { sequences, block, wide, trees };
        let device = Emulator::new();
        let met = simulate(&device, sizes, |round| device.set_schedule(Schedule::ALL[round % 5]));
        ends.iter_mut().zip(met).for_each(|(all, more)| *all += more);
        if let Some(gpu) = gpu() {
            assert_eq!(simulate(gpu, sizes, |_| ()), met);
        }
    }
    // Every way to end was met, often.
    assert!(ends.iter().all(|&n| n >= 10), "{ends:?}");
}

#[test]
fn blocks_of_64_that_stand_whole_end_at_the_first_stop() {
    every_device(|device| {
        let block = 64;
        for stop in [None, Some(0), Some(31), Some(32), Some(45), Some(63)] {
            let sizes = Sizes::of(1, block, false);
            let place = Place::new(device, sizes);
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
            place.join(device, 0, &sequence);
            // The target chooses the next row's draft everywhere; at the last row 100 + 63.
            let mut choices: Vec<u32> = (0..64).map(|row| 100 + row).collect();
            if let Some(place) = stop {
                (choices[place], choices[63]) = (7, 7);
            }
            let drafts = [&[NONE], &choices[..63]].concat();
            let inputs = Inputs { drafts, choices, parents: (0..64).map(|r: u32| r.max(1) - 1).collect() };
            place.feed(device, &inputs);
            place.launch(device, 0).unwrap();
            let record =
                model_round(&mut sequence, sizes.kind(0), &inputs.drafts, &inputs.choices, &inputs.parents);
            assert_eq!(record.tokens.len(), stop.map_or(64, |place| place + 1));
            assert_eq!(place.ring.read(1, 0).unwrap(), Some(record), "stop at {stop:?}");
            assert_eq!(bytes_of(device, &place.sequences), sequence.to_bytes().unwrap(), "stop at {stop:?}");
        }
    });
}

#[test]
fn no_argument_changes_between_rounds() {
    every_device(|device| {
        let sizes = Sizes::of(4, 8, false);
        let place = Place::new(device, sizes);
        let first = place.capture(device, 0);
        for i in 0..4 {
            place.join(device, i, &random_sequence(&mut Random::new(i as u64), 8));
        }
        let mut random = Random::new(5);
        for _ in 0..5 {
            place.feed(device, &Inputs::new(&mut random, sizes, 8));
            device.replay(&first).unwrap();
        }
        assert_eq!(place.capture(device, 0).nodes, first.nodes);
        assert_eq!(first.nodes.len(), 4);
    });
}

#[test]
fn rounds_are_the_same_under_every_schedule() {
    let bytes = same_bits(|device| {
        let sizes = Sizes::of(6, 40, true);
        let place = Place::new(device, sizes);
        let mut random = Random::new(31);
        let mut bytes = Vec::new();
        for i in 0..6 {
            place.join(device, i, &random_sequence(&mut random, 40));
        }
        for _ in 0..8 {
            place.feed(device, &Inputs::new(&mut random, sizes, 40));
            place.launch(device, 0).unwrap();
            bytes.extend(place.bytes(device));
        }
        bytes
    });
    assert_written(&bytes, "a round");
}

#[test]
fn a_round_past_the_end_writes_its_number_and_no_token() {
    every_device(|device| {
        let (sequences, block) = (3, 8);
        let sizes = Sizes::of(sequences, block, false);
        let place = Place::new(device, sizes);
        let mut random = Random::new(41);
        for i in 0..sequences {
            let last = Sequence { budget: 1, stop_ids: vec![], ..random_sequence(&mut random, block) };
            place.join(device, i, &last);
        }
        let inputs = |random: &mut Random| loop {
            let inputs = Inputs::new(random, sizes, block);
            if ![&inputs.drafts, &inputs.choices].iter().any(|words| words.contains(&NONE)) {
                return inputs;
            }
        };
        place.feed(device, &inputs(&mut random));
        place.launch(device, 0).unwrap();
        let state = bytes_of(device, &place.sequences);
        let record = |round: u32| {
            (0..sequences).map(|s| place.ring.read(round, s).unwrap().unwrap()).collect::<Vec<_>>()
        };
        assert!(record(1).iter().all(|r| r.tokens.len() == 1 && r.finish == Finish::Length));
        let words = bytes_of(device, &place.ring.memory.buffer);
        for round in 2..=2 * PLACES as u32 {
            place.feed(device, &inputs(&mut random));
            place.launch(device, 0).unwrap();
            device.synchronize().unwrap();
            assert!(
                record(round)
                    .iter()
                    .all(|r| r.tokens.is_empty() && r.acceptance_length == 0 && r.finish == Finish::Length)
            );
            assert_eq!(bytes_of(device, &place.sequences), state);
            assert_eq!(download::<u32>(device, &place.round_header), [round, 0, block as u32]);
            assert!(bytes_of(device, &place.verify_rows).chunks(16).all(|row| row[..4] == [255; 4]));
        }
        // Tokens of the first round are where they were.
        let after = bytes_of(device, &place.ring.memory.buffer);
        let tokens =
            |bytes: &[u8]| bytes.chunks(64).flat_map(|record| record[32..].to_vec()).collect::<Vec<u8>>();
        assert_eq!(tokens(&after), tokens(&words));
    });
}

#[test]
fn garbage_in_states_and_verdicts_stays_inside_the_buffers() {
    every_device(|device| {
        let mut random = Random::new(51);
        for i in 0..60 {
            let (sequences, block) = (1 + random.below(5), 1 + random.below(64));
            let wide = [1 + random.below(64), 1 + random.below(64)];
            let sizes = Sizes { sequences, block, wide, trees: i % 2 == 0 };
            let place = Place::new(device, sizes);
            let mut garbage = |buffer: &Buffer| {
                let words: Vec<u32> =
                    (0..buffer.bytes() / 4).map(|_| random.next() as u32 >> random.below(32)).collect();
                device.upload(buffer, &to_bytes(&words)).unwrap();
            };
            for buffer in [&place.sequences, &place.drafts, &place.choices, &place.round_header] {
                garbage(buffer);
            }
            place.parents.iter().for_each(&mut garbage);
            place.launch(device, 0).unwrap();
            // The verdict too: of another round, say.
            for buffer in [&place.accepted, &place.next, &place.path, &place.tokens, &place.verify_spans] {
                garbage(buffer);
            }
            let verdict = VerifyOutput { accepted: &place.accepted, next: &place.next, path: &place.path };
            place.finish(device, 0, verdict).unwrap();
            for row in download::<u32>(device, &place.verify_rows).chunks(4).take(sequences * wide[0]) {
                assert!(
                    row[0] == NONE || (row[0] < sequences as u32 && row[3] < (sequences * wide[0]) as u32)
                );
            }
            let records: Vec<u32> = download(device, &place.ring.memory.buffer);
            let words = records.len() / PLACES / sequences;
            assert!(records.chunks(words).all(|record| record[1] <= wide[0] as u32));
        }
    });
}

#[test]
fn states_and_rings_refuse_what_they_cannot_hold() {
    let device = Emulator::new();
    let many = Sequence { stop_ids: vec![1; STOP_IDS + 1], ..empty() };
    assert!(many.to_bytes().unwrap_err().to_string().contains("13 stop ids"));
    assert!(empty().updated(&[0; 12]).unwrap_err().to_string().contains("12 bytes"));
    let mut bytes = empty().to_bytes().unwrap();
    bytes[60] = 6;
    assert!(empty().updated(&bytes).unwrap_err().to_string().contains("code 6"));
    for (sequences, block, places) in [(0, 1, 1), (1025, 1, 1), (1, 0, 1), (1, 65, 1), (1, 1, 0)] {
        assert!(Ring::new(&device, Round { sequences, block, max_verify_rows: block }, places).is_err());
    }
    let ring = Ring::new(&device, Round { sequences: 2, block: 4, max_verify_rows: 4 }, 2).unwrap();
    assert_eq!(ring.read(1, 1).unwrap(), None);
    assert!(ring.read(1, 2).is_err());
}
