//! Drafts drawn and judged on a device, decision for decision against their one definition, `src/spec/verify.rs`.

use crate::support::kernel;

use dflash::gpu::device::Device;
use dflash::gpu::emulator::Emulator;
use dflash::gpu::kernels::rejection::{DISTRIBUTION_BYTES, RejectionSampler, Rows, VerifyInputs};
use dflash::gpu::kernels::round::{Finish, Form, Sequence};
use dflash::gpu::kernels::sample::tables;
use dflash::gpu::kernels::verify::VerifyOutput;
use dflash::spec::config::VerifyMethod;
use dflash::spec::distribution::{Distribution, ONE};
use dflash::spec::rng::{self, PhiloxStream, TABLES};
use dflash::spec::sampling::{SamplingParams, argmax};
use dflash::spec::verify;
use kernel::*;

const NONE: u32 = u32::MAX;

/// What was there before, where a kernel is to leave it.
const OLD: u32 = 0x0bad_cafe;

/// A sequence of a batch: how many rows take part, how it samples, how its drafts were drawn.
#[derive(Clone)]
struct Request {
    rule: VerifyMethod,
    rows: usize,
    length: u32,
    rounds: u32,
    sampling: SamplingParams,
    drafting: SamplingParams,
}

impl Request {
    fn state(&self, sampling: &SamplingParams) -> Vec<u8> {
        let state = Sequence {
            active: true,
            length: self.length,
            anchor: 0,
            pending: 0,
            budget: 0,
            end: 0,
            draft_end: 0,
            block: 0,
            rows: 64,
            form: Form::Chain,
            sampling: sampling.clone(),
            stop_ids: vec![],
            finish: Finish::Running,
            rounds: self.rounds,
            drafted: 0,
            accepted: 0,
            verify_method: self.rule,
        };
        state.to_bytes().unwrap()
    }

    fn dice(&self) -> PhiloxStream {
        let SamplingParams { seed, stream, .. } = self.sampling;
        PhiloxStream { seed, stream, round: self.rounds + 1, anchor: self.length }
    }
}

/// Blocks of rows: `[sequences][block]` of everything.
#[derive(Clone)]
struct Batch {
    vocab: usize,
    block: usize,
    requests: Vec<Request>,
    target: Vec<f32>,
    drafter: Vec<f32>,
    /// In place of what was drawn; `None` there: what was.
    tokens: Vec<Option<u32>>,
}

/// What the kernels make of a batch.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// Of the target's rows, then of the drafter's.
    distributions: [Vec<u8>; 2],
    drafts: Vec<u32>,
    tokens: Vec<u32>,
    accepted: Vec<u32>,
    next: Vec<u32>,
    path: Vec<u32>,
}

impl Batch {
    fn kernels(&self) -> RejectionSampler {
        let Batch { vocab, block, .. } = *self;
        RejectionSampler { sequences: self.requests.len(), block, vocab, blocks: vocab.div_ceil(128) }
    }

    fn row<'a>(&self, logits: &'a [f32], row: usize) -> &'a [f32] {
        &logits[row * self.vocab..][..self.vocab]
    }

    /// What the LM head leaves of each row, per 128 ids.
    fn best(&self, logits: &[f32]) -> Vec<u64> {
        let key = |(id, &logit): (usize, &f32)| {
            if logit.is_nan() || logit == f32::INFINITY {
                return u64::MAX;
            }
            let bits = i64::from((logit + 0.0).to_bits().cast_signed());
            let ascending = if bits < 0 { -1 - (bits & 0x7fff_ffff) } else { bits } + (1 << 31);
            ((ascending as u64) << 32) | u64::from(!(id as u32))
        };
        let mut best = Vec::new();
        for row in logits.chunks(self.vocab) {
            let keys: Vec<u64> = row.iter().enumerate().map(key).collect();
            best.extend(keys.chunks(128).map(|keys| keys.iter().copied().max().unwrap()));
        }
        best
    }

    /// `[sequences][block][each]` as `[sequences][wide][each]`.
    fn widened<T: Copy>(&self, all: &[T], each: usize, wide: usize, filling: T) -> Vec<T> {
        let widen = |one: &[T]| {
            let mut one = one.to_vec();
            one.resize(wide * each, filling);
            one
        };
        all.chunks(self.block * each).flat_map(widen).collect()
    }

    /// Rows that take part have a sequence.
    fn table(&self) -> Vec<u32> {
        let row = |(own, request): (usize, &Request)| {
            let block = self.block;
            let request = request.clone();
            (0..block).flat_map(move |row| {
                let there = row < request.rows;
                [if there { own as u32 } else { NONE }, request.length + row as u32, NONE, NONE]
            })
        };
        self.requests.iter().enumerate().flat_map(row).collect()
    }

    fn run(&self, device: &dyn Device) -> Outcome {
        let kernels = self.kernels();
        let (sequences, rows) = (self.requests.len(), self.requests.len() * self.block);
        let states = |of: fn(&Request) -> &SamplingParams| {
            upload(device, &self.requests.iter().flat_map(|r| r.state(of(r))).collect::<Vec<u8>>())
        };
        let (own, draft) = (states(|r| &r.sampling), states(|r| &r.drafting));
        // A verification may have room for more rows than a block has.
        let wide = (self.block + self.vocab % 3).min(64);
        let widen = RejectionSampler { block: wide, ..kernels };
        let tables = constant(device, &tables());
        let target_logits = upload(device, &self.widened(&self.target, self.vocab, wide, 7.0));
        let draft_logits = upload(device, &self.drafter);
        let target_laws = poisoned::<u8>(device, sequences * wide * DISTRIBUTION_BYTES);
        let draft_laws = poisoned::<u8>(device, rows * DISTRIBUTION_BYTES);
        let target = Rows { logits: &target_logits, distributions: &target_laws };
        let drafter = Rows { logits: &draft_logits, distributions: &draft_laws };
        let best = self.best(&self.target);
        let best = upload(device, &self.widened(&best, best.len() / rows, wide, 5));
        let wide_table = upload(device, &self.widened(&self.table(), 4, wide, NONE));
        widen.distributions(device, target, &best, &wide_table, &own, &tables).unwrap();
        let (best, table) = (upload(device, &self.best(&self.drafter)), upload(device, &self.table()));
        kernels.distributions(device, drafter, &best, &table, &draft, &tables).unwrap();
        let drafts = upload(device, &vec![OLD; rows]);
        kernels.sample(device, &drafts, drafter, &table, &own, &tables).unwrap();
        let drafts: Vec<u32> = download(device, &drafts);

        let token = |(row, given): (usize, &Option<u32>)| given.unwrap_or(drafts[row]);
        let tokens: Vec<u32> = self.tokens.iter().enumerate().map(token).collect();
        let spans: Vec<u32> = self.requests.iter().flat_map(|r| [r.length, r.rows as u32]).collect();
        let [accepted, next] = [(); 2].map(|()| upload(device, &vec![OLD; sequences]));
        let path = upload(device, &vec![OLD; sequences * wide]);
        let verdict = VerifyOutput { accepted: &accepted, next: &next, path: &path };
        let (spans, on_device) = (upload(device, &spans), upload(device, &self.widened(&tokens, 1, wide, 3)));
        let (partial, counters) = (poisoned::<u64>(device, rows), upload(device, &vec![0u32; sequences]));
        let judged = VerifyInputs {
            max_verify_rows: wide,
            tokens: &on_device,
            spans: &spans,
            partial: &partial,
            counters: &counters,
        };
        // Twice: a graph is replayed without anybody clearing the counters.
        for _ in 0..2 {
            kernels.verify(device, verdict, target, drafter, judged, &own, &tables).unwrap();
            assert!(bytes_of(device, &counters).iter().all(|&b| b == 0), "counters are left at zero");
        }
        let [accepted, next, path] = [&accepted, &next, &path].map(|b| download::<u32>(device, b));
        // What lies behind the blocks is left out again: no distribution, and no way.
        let narrow = |all: &[u8], each: usize| {
            let of = |one: &[u8]| one[..self.block * each].to_vec();
            all.chunks(wide * each).flat_map(of).collect::<Vec<u8>>()
        };
        let kept =
            path.chunks(wide).all(|way| way[self.block..].iter().all(|&row| [OLD, NONE].contains(&row)));
        assert!(kept, "{path:?}");
        let path = from_bytes(&narrow(&to_bytes(&path), 4));
        let distributions =
            [narrow(&bytes_of(device, &target_laws), DISTRIBUTION_BYTES), bytes_of(device, &draft_laws)];
        Outcome { distributions, drafts, tokens, accepted, next, path }
    }

    /// The distribution of a target's or a drafter's row, as the definition has it.
    fn distribution(&self, drafter: bool, own: usize, row: usize) -> Option<Distribution> {
        let request = &self.requests[own];
        let (logits, how) = match drafter {
            true => (&self.drafter, &request.drafting),
            false => (&self.target, &request.sampling),
        };
        how.probabilities(self.row(logits, own * self.block + row))
    }

    fn check(&self, device: &dyn Device, what: &str) -> Seen {
        let got = self.run(device);
        let mut seen = Seen::default();
        for (own, request) in self.requests.iter().enumerate() {
            let at = own * self.block;
            let context = format!("{what}, vocabulary {}, sequence {own}, {:?}", self.vocab, request.rule);
            let distributions: Vec<Option<Distribution>> =
                (1..request.rows).map(|row| self.distribution(true, own, row)).collect();
            for row in 0..self.block {
                for drafter in [false, true] {
                    let expected = self.distribution(drafter, own, row).filter(|_| row < request.rows);
                    let (distributions, logits) = match drafter {
                        false => (&got.distributions[0], &self.target),
                        true => (&got.distributions[1], &self.drafter),
                    };
                    let distribution =
                        &distributions[(at + row) * DISTRIBUTION_BYTES..][..DISTRIBUTION_BYTES];
                    let read = probabilities(distribution, self.row(logits, at + row));
                    let expected = expected.map(|distribution| distribution.tokens().to_vec());
                    assert_eq!(read, expected, "{context}, row {row}, drafter {drafter}");
                }
            }
            let drawn = &got.drafts[at..][..self.block];
            for (row, &token) in drawn.iter().enumerate() {
                let expected = match row {
                    0 => OLD,
                    row if row >= request.rows || request.rule == VerifyMethod::Match => OLD,
                    // One distribution at a time, so that damaged ones leave the others alone: rows count from the chain's begin.
                    row => distributions[row - 1]
                        .as_ref()
                        .map_or(NONE, |distribution| draw_one(distribution, row, request.dice())),
                };
                assert_eq!(token, expected, "{context}, draft {row}");
            }
            if distributions.iter().all(Option::is_some)
                && request.rule != VerifyMethod::Match
                && request.rows > 0
            {
                let distributions: Vec<Distribution> = distributions.iter().flatten().cloned().collect();
                let chain = verify::sample_chain(&distributions, &mut request.dice()).unwrap();
                assert_eq!(drawn[1..request.rows], chain, "{context}");
            }

            let (accepted, next) = (got.accepted[own], got.next[own]);
            let path = &got.path[at..][..self.block];
            if request.rule == VerifyMethod::Match || request.rows < 2 {
                assert_eq!((accepted, next), (OLD, OLD), "{context}");
                assert!(path.iter().all(|&row| row == OLD), "{context}");
                continue;
            }
            // A draft that has no distribution ends its round; what is said of it does not matter.
            let Some(distributions) = distributions.into_iter().collect::<Option<Vec<Distribution>>>() else {
                continue;
            };
            let drafts = &got.tokens[at + 1..at + request.rows];
            let target = |row| self.distribution(false, own, row);
            let expected = match request.rule {
                VerifyMethod::Block => {
                    verify::block_verify(drafts, &distributions, target, &mut request.dice())
                }
                _ => verify::rejection(drafts, &distributions, target, &mut request.dice()),
            };
            let Some((stood, token)) = expected else {
                assert_eq!(next, NONE, "{context}: damaged");
                seen.damaged += 1;
                continue;
            };
            assert_eq!((accepted as usize, next), (stood, token), "{context}, drafts {drafts:?}");
            let rows = (0..self.block).map(|row| if row <= stood { row as u32 } else { NONE });
            assert_eq!(path, rows.collect::<Vec<u32>>(), "{context}");
            seen.stood[stood.min(3)] += 1;
            seen.whole += usize::from(stood == drafts.len());
        }
        seen
    }
}

/// How verdicts were spread.
#[derive(Default, Debug, PartialEq)]
struct Seen {
    stood: [usize; 4],
    whole: usize,
    damaged: usize,
}

impl Seen {
    fn add(&mut self, other: Seen) {
        (0..4).for_each(|i| self.stood[i] += other.stood[i]);
        self.whole += other.whole;
        self.damaged += other.damaged;
    }
}

/// The token of row `row` from its own distribution.
fn draw_one(distribution: &Distribution, row: usize, dice: PhiloxStream) -> u32 {
    let word = rng::DrawKey { purpose: rng::Purpose::Draft, depth: row, row };
    rng::RandomSource::pick(&mut dice.clone(), word, distribution.tokens()).unwrap()
}

/// The probabilities that 48 bytes of a distribution make of a row's logits; `None` where it is none.
fn probabilities(distribution: &[u8], logits: &[f32]) -> Option<Vec<(u32, u64)>> {
    let words: Vec<u32> = from_bytes(distribution);
    let (max, c) = (f32::from_bits(words[0]), f32::from_bits(words[1]));
    let limit = (words[4], words[5], words[6]);
    let (inverse, left) =
        (u64::from(words[9]) << 32 | u64::from(words[8]), u64::from(words[11]) << 32 | u64::from(words[10]));
    if words[7] == NONE {
        return None;
    }
    let mut found = Vec::new();
    for (id, &logit) in (0u32..).zip(logits) {
        let t = ((max - logit) * c).round_ties_even().min((40 << 16) as f32) as u32;
        let bits = (logit + 0.0).to_bits();
        let backwards = if bits >> 31 == 1 { bits } else { !(bits | (1 << 31)) };
        let mut p = match TABLES.weight(max, logit, c) {
            w if w < u64::from(words[2]) || (t, backwards, id) > limit => 0,
            w => ((u128::from(w << words[3]) * u128::from(inverse)) >> 64) as u64,
        };
        if id == words[7] {
            assert_eq!(argmax(logits), Some(id));
            p += left;
        }
        if p > 0 {
            found.push((id, p));
        }
    }
    assert_eq!(found.iter().map(|&(_, p)| p).sum::<u64>(), ONE);
    Some(found)
}

fn settings(random: &mut Random, vocab: usize) -> SamplingParams {
    let temperature = match random.below(8) {
        0 => 0.0,
        1 => 1e4,
        2 => 1e-4,
        _ => 0.3 + random.unit() * 1.5,
    };
    let top_k = match random.below(5) {
        0 => 1,
        1 => 1 + random.below(vocab),
        2 => 1 + random.below(vocab.min(20)),
        _ => 0,
    };
    let top_p = match random.below(5) {
        0 => 1e-12,
        1 => f64::from(random.unit()).max(1e-3),
        2 => 0.9,
        _ => 1.0,
    };
    let min_p = if random.below(4) == 0 { f64::from(random.unit()) } else { 0.0 };
    SamplingParams { temperature, top_k, top_p, min_p, seed: random.next(), stream: random.next() as u32 }
}

/// Sequences of all rules and lengths. The drafter's row `j` is often like the target's row `j - 1`, which it stands
/// for; sometimes nothing like it.
fn batch(random: &mut Random, vocab: usize, block: usize, sequences: usize) -> Batch {
    let (mut requests, mut target, mut drafter, mut tokens) = (vec![], vec![], vec![], vec![]);
    for _ in 0..sequences {
        let rule = [
            VerifyMethod::Match,
            VerifyMethod::Rejection,
            VerifyMethod::Rejection,
            VerifyMethod::Block,
            VerifyMethod::Block,
        ][random.below(5)];
        let rows = match random.below(6) {
            0 => 0,
            1 => 1,
            2 => 1 + random.below(block),
            _ => block,
        };
        let sampling = settings(random, vocab);
        let drafting = match random.below(2) {
            0 => sampling.clone(),
            _ => SamplingParams { seed: sampling.seed, stream: sampling.stream, ..settings(random, vocab) },
        };
        let length = random.next() as u32 >> (1 + random.below(31));
        requests.push(Request { rule, rows, length, rounds: random.below(1000) as u32, sampling, drafting });
        let mut own: Vec<Vec<f32>> = (0..block).map(|_| sound_logits(random, vocab)).collect();
        let mut drafts = vec![random.normals(vocab, 1.0)];
        for row in own.iter_mut().take(block - 1) {
            drafts.push(match random.below(6) {
                0 => row.clone(),
                1 => sound_logits(random, vocab),
                // Nothing in common: each token is one's or the other's.
                2 => {
                    let of_drafter = |id: usize| id % 2 == 1;
                    let some = random.normals(vocab, 1.0);
                    let mask = |keep: bool, (id, &x): (usize, &f32)| {
                        if of_drafter(id) == keep { x } else { f32::NEG_INFINITY }
                    };
                    let half: Vec<f32> = some.iter().enumerate().map(|x| mask(false, x)).collect();
                    let other = some.iter().enumerate().map(|x| mask(true, x)).collect();
                    if vocab > 1 {
                        *row = half;
                        other
                    } else {
                        some
                    }
                }
                _ => row.iter().map(|x| x + random.normal(0.3)).collect(),
            });
        }
        // Damage, seldom.
        match random.below(20) {
            0 => own[random.below(block)][random.below(vocab)] = f32::NAN,
            1 => drafts[random.below(block)][random.below(vocab)] = f32::INFINITY,
            2 => own[random.below(block)].fill(f32::NEG_INFINITY),
            _ => {}
        }
        target.extend(own.concat());
        drafter.extend(drafts.concat());
        // Mostly what was drawn; else anything, also what the distribution cannot draw and what no vocabulary has.
        tokens.extend((0..block).map(|_| match random.below(25) {
            0 => Some(random.below(vocab) as u32),
            1 if random.below(8) == 0 => Some(vocab as u32 + random.below(3) as u32),
            _ => None,
        }));
    }
    Batch { vocab, block, requests, target, drafter, tokens }
}

#[test]
fn drafts_are_drawn_and_judged_as_the_rules_say() {
    let mut random = Random::new(1);
    let shrink = if cfg!(feature = "sanitize") { 20 } else { 1 };
    let mut seen = Seen::default();
    for (vocab, block, batches) in [
        (1, 4, 10),
        (2, 5, 40),
        (3, 16, 60),
        (17, 6, 60),
        (130, 8, 40),
        (257, 16, 20),
        (2048, 16, 10),
        (9001, 5, 4),
        (32000, 4, 3),
    ] {
        for i in 0..(batches / shrink).max(1) {
            let batch = batch(&mut random, vocab, block, 8);
            every_device_in_turn(i, |device| seen.add(batch.check(device, &format!("batch {i}"))));
        }
    }
    if shrink == 1 {
        let Seen { stood: [none, one, two, more], whole, damaged } = seen;
        assert!(none > 100 && one > 50 && two > 20 && more > 100, "{seen:?}");
        assert!(whole > 50 && damaged > 5, "{seen:?}");
    }
}

#[test]
fn verdicts_are_the_same_under_every_schedule() {
    for (vocab, block) in [(3, 64), (17, 5), (257, 16), (2047, 4)] {
        let batch = batch(&mut Random::new(vocab as u64), vocab, block, 6);
        same_bits(|device| {
            let Outcome { distributions, drafts, tokens, accepted, next, path } = batch.run(device);
            let [a, b] = distributions;
            [a, b, to_bytes(&[drafts, tokens, accepted, next, path].concat())].concat()
        });
        let parallel = Emulator::new();
        parallel.set_threads(2);
        batch.check(&parallel, "two threads");
    }
}

fn of(temperature: f32, top_k: usize, top_p: f64) -> SamplingParams {
    SamplingParams { temperature, top_k, top_p, min_p: 0.0, seed: 11, stream: 5 }
}

/// One sequence of two rows, whose only draft is `draft`.
fn pair(rule: VerifyMethod, target: Vec<f32>, drafter: Vec<f32>, draft: u32, rounds: u32) -> Batch {
    let how = of(1.0, 0, 1.0);
    let vocab = target.len();
    Batch {
        vocab,
        block: 2,
        requests: vec![Request { rule, rows: 2, length: 9, rounds, sampling: how.clone(), drafting: how }],
        target: target.repeat(2),
        drafter: [vec![0.0; vocab], drafter].concat(),
        tokens: vec![None, Some(draft)],
    }
}

#[test]
fn the_last_units_of_a_chance_count() {
    // Weights 1, 2^32, 1, 0 against 0, 2^32, 0, 2: of what draft 3 leaves behind, token 1 has a single unit, between
    // the shares of 0 and 2.
    let (one, two) = (-32.0 * 2f32.ln(), -31.0 * 2f32.ln());
    let none = f32::NEG_INFINITY;
    let (target, drafter) = (vec![one, 0.0, one, none], vec![none, 0.0, none, two]);
    let how = of(1.0, 0, 1.0);
    let (p, q) = (how.probabilities(&target).unwrap(), how.probabilities(&drafter).unwrap());
    let (share, over) = (p.probability(0), p.probability(1) - q.probability(1));
    assert_eq!((p.probability(2), p.probability(3), over), (share, 0, 1));
    assert!(share < 1 << 17 && q.probability(3) < 1 << 18, "{p:?} {q:?}");
    let high = |bits: u64, n: u64| ((u128::from(bits) * u128::from(n)) >> 64) as u64;
    let bits = |rounds: u32, purpose| {
        let dice = PhiloxStream { seed: how.seed, stream: how.stream, round: rounds + 1, anchor: 9 };
        dice.bits(rng::DrawKey { purpose, depth: 1, row: (purpose == rng::Purpose::Accept) as usize })
    };
    let rest = 2 * share + over;
    let find = |wanted: &dyn Fn(u32) -> bool| (0..1 << 22).find(|&rounds| wanted(rounds)).unwrap();
    // Units on both sides of token 1's, and its own; and a draft that the target never emits, at chance 0.
    let at = |unit: u64| find(&|rounds| high(bits(rounds, rng::Purpose::Residual), rest) == unit);
    let zero = find(&|rounds| high(bits(rounds, rng::Purpose::Accept), q.probability(3)) == 0);
    let units = [(at(share - 1), Some(0)), (at(share), Some(1)), (at(share + 1), Some(2)), (zero, None)];
    every_device(|device| {
        // The tokens in one lane, in lanes of one warp, and in warps of their own.
        for stride in [1, 4, 700] {
            let apart = |row: &[f32]| {
                let mut all = vec![none; 3 * stride + 1];
                row.iter().enumerate().for_each(|(i, &logit)| all[i * stride] = logit);
                all
            };
            for (rule, (rounds, next)) in
                [VerifyMethod::Rejection, VerifyMethod::Block].into_iter().flat_map(|r| units.map(|u| (r, u)))
            {
                let batch = pair(rule, apart(&target), apart(&drafter), 3 * stride as u32, rounds);
                batch.check(device, "units");
                let got = batch.run(device);
                assert_eq!(got.accepted, [0]);
                assert!(next.is_none_or(|next| got.next == [next * stride as u32]), "{got:?}");
            }
        }
    });
}

#[test]
fn laws_that_are_alike_let_every_draft_stand() {
    every_device(|device| {
        let mut random = Random::new(4);
        for (how, kind) in
            [(of(1.0, 0, 1.0), 9), (of(0.0, 0, 1.0), 9), (of(1.0, 3, 1e-12), 9), (of(0.9, 0, 0.5), 0)]
        {
            let (vocab, block) = (257, 16);
            let row = if kind == 0 { vec![2.0; vocab] } else { random.normals(vocab, 2.0) };
            let request = |rule| Request {
                rule,
                rows: block,
                length: 70,
                rounds: 3,
                sampling: how.clone(),
                drafting: how.clone(),
            };
            let batch = Batch {
                vocab,
                block,
                requests: [VerifyMethod::Rejection, VerifyMethod::Block].map(request).to_vec(),
                target: row.repeat(2 * block),
                drafter: row.repeat(2 * block),
                tokens: vec![None; 2 * block],
            };
            assert_eq!(batch.check(device, "alike").whole, 2);
        }
    });
}

#[test]
fn garbage_stays_inside_the_buffers() {
    every_device(|device| {
        let mut random = Random::new(12);
        for i in 0..30 {
            let (vocab, block, sequences) = ([1, 7, 300, 3001][i % 4], [1, 4, 16][i % 3], 3);
            let kernels = RejectionSampler { sequences, block, vocab, blocks: vocab.div_ceil(128) };
            let rows = sequences * block;
            let mut noise = |bytes: usize| {
                // Small words too, which pass for ids, rules and counts.
                let word =
                    |_| random.next() as u32 >> if random.below(2) == 0 { 0 } else { 20 + random.below(12) };
                (0..bytes / 4).map(word).collect::<Vec<u32>>()
            };
            let mut states = noise(sequences * 128);
            // Its rule is the last word, its form the upper half of the eighth; let some be those that take part.
            for words in states.chunks_mut(32).skip(i % 2) {
                (words[31], words[7]) =
                    ([VerifyMethod::Rejection, VerifyMethod::Block][i / 2 % 2] as u32, words[7] & 0xffff);
            }
            let states = upload(device, &states);
            let mut noise = |bytes: usize| upload(device, &noise(bytes));
            let [drafts, path, tokens] = [(); 3].map(|()| noise(rows * 4));
            let [accepted, next] = [(); 2].map(|()| noise(sequences * 4));
            let (table, spans) = (noise(rows * 16), noise(sequences * 8));
            let [a, b] = [(); 2].map(|()| (noise(rows * vocab * 4), noise(rows * DISTRIBUTION_BYTES)));
            let (target, drafter) =
                (Rows { logits: &a.0, distributions: &a.1 }, Rows { logits: &b.0, distributions: &b.1 });
            let (partial, best) = (noise(rows * 8), noise(rows * kernels.blocks * 8));
            let counters = upload(device, &vec![0u32; sequences]);
            let tables = constant(device, &tables());
            let judged = VerifyInputs {
                max_verify_rows: block,
                tokens: &tokens,
                spans: &spans,
                partial: &partial,
                counters: &counters,
            };
            let verdict = VerifyOutput { accepted: &accepted, next: &next, path: &path };
            kernels.sample(device, &drafts, drafter, &table, &states, &tables).unwrap();
            kernels.verify(device, verdict, target, drafter, judged, &states, &tables).unwrap();
            assert!(bytes_of(device, &counters).iter().all(|&b| b == 0), "counters are left at zero");
            kernels.distributions(device, target, &best, &table, &states, &tables).unwrap();
        }
    });
}

#[test]
fn launches_refuse_what_does_not_fit() {
    let device = Emulator::new();
    let batch = batch(&mut Random::new(3), 40, 4, 2);
    let kernels = batch.kernels();
    let get = |bytes: usize| device.allocate(bytes, "test").unwrap();
    let (logits, distributions) = (get(8 * 160), get(8 * DISTRIBUTION_BYTES));
    let rows = Rows { logits: &logits, distributions: &distributions };
    let (best, table, states, tables) = (get(64), get(128), get(256), get(2048));
    let distribution = |kernels: RejectionSampler, rows, best| {
        kernels.distributions(&device, rows, best, &table, &states, &tables).unwrap_err().to_string()
    };
    let small = get(8 * DISTRIBUTION_BYTES - 16);
    let message = distribution(kernels, Rows { distributions: &small, ..rows }, &best);
    assert!(
        message.contains("kernel row_distribution: the rows' distributions has 368 bytes, needs 384"),
        "{message}"
    );
    let message = distribution(RejectionSampler { block: 65, ..kernels }, rows, &best);
    assert!(message.contains("2 sequences in blocks of 65 rows"), "{message}");
    let message = distribution(RejectionSampler { vocab: (1 << 26) + 1, ..kernels }, rows, &best);
    assert!(message.contains("67108865 tokens; expected 1 to 2^26"), "{message}");
    let message = distribution(kernels, rows, &best.slice(8, 56).unwrap());
    assert!(message.contains("best"), "{message}");
    let drafts = get(28);
    let message = kernels.sample(&device, &drafts, rows, &table, &states, &tables).unwrap_err().to_string();
    assert!(message.contains("kernel sample_drafts: drafts has 28 bytes, needs 32"), "{message}");
}
