//! Chains of drafts sampled on a device and verified by `rejection` and `block`. Every decision must equal
//! that of `src/spec/verify.rs`.

use crate::support::kernel;

use crate::support::test_gpu::TestGpu;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::RowStep;
use dflash::gpu::kernels::rejection::{DISTRIBUTION_BYTES, RejectionSampler, Rows, VerifyInputs};
use dflash::gpu::kernels::round::{DraftShape, Finish, Sequence};
use dflash::gpu::kernels::sample::tables;
use dflash::gpu::kernels::verify::VerifyOutput;
use dflash::spec::config::VerifyMethod;
use dflash::spec::distribution::{Distribution, ONE};
use dflash::spec::rng::{self, PhiloxStream, TABLES};
use dflash::spec::sampling::{SamplingParams, argmax};
use dflash::spec::verify;
use kernel::*;

const NONE: u32 = u32::MAX;

/// Fills outputs before a launch. A kernel must not overwrite it for rows and sequences that take no part.
const OLD: u32 = 0x0bad_cafe;

/// A sequence of a batch: its method, the number of its rows, how it samples and how its drafts are sampled.
#[derive(Clone)]
struct Request {
    method: VerifyMethod,
    rows: usize,
    length: u32,
    rounds: u32,
    sampling: SamplingParams,
    draft_sampling: SamplingParams,
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
            form: DraftShape::Chain,
            sampling: sampling.clone(),
            stop_ids: vec![],
            finish: Finish::Running,
            rounds: self.rounds,
            drafted: 0,
            accepted: 0,
            min_confidence: 0.0,
            verify_method: self.method,
        };
        state.to_bytes().unwrap()
    }

    fn random_stream(&self) -> PhiloxStream {
        let SamplingParams { seed, stream, .. } = self.sampling;
        PhiloxStream { seed, stream, round: self.rounds + 1, anchor: self.length }
    }
}

/// Blocks of rows: all vectors are `[sequences][block]`, of logits `[sequences][block][vocab]`.
#[derive(Clone)]
struct Batch {
    vocab: usize,
    block: usize,
    requests: Vec<Request>,
    target: Vec<f32>,
    drafter: Vec<f32>,
    /// Tokens to verify instead of the sampled ones; `None`: the sampled one.
    tokens: Vec<Option<u32>>,
}

/// The results of the kernels for a batch.
#[derive(Debug, PartialEq)]
struct Outcome {
    /// Distributions of the target's rows, then of the drafter's.
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
        RejectionSampler {
            sequences: self.requests.len(),
            block,
            vocab,
            blocks: vocab.div_ceil(128),
            reduced: false,
        }
    }

    fn row<'a>(&self, logits: &'a [f32], row: usize) -> &'a [f32] {
        &logits[row * self.vocab..][..self.vocab]
    }

    /// The LM head's keys of each row, per 128 ids.
    fn best(&self, logits: &[f32]) -> Vec<u64> {
        logits.chunks(self.vocab).flat_map(best_keys).collect()
    }

    /// Pads `[sequences][block][each]` to `[sequences][rows][each]`.
    fn padded<T: Copy>(&self, all: &[T], each: usize, rows: usize, padding: T) -> Vec<T> {
        let pad = |one: &[T]| {
            let mut one = one.to_vec();
            one.resize(rows * each, padding);
            one
        };
        all.chunks(self.block * each).flat_map(pad).collect()
    }

    /// The row table; rows that take no part have no sequence.
    fn table(&self) -> Vec<u32> {
        let row = |(seq, request): (usize, &Request)| {
            let block = self.block;
            let request = request.clone();
            (0..block).flat_map(move |row| {
                let valid = row < request.rows;
                [if valid { seq as u32 } else { NONE }, request.length + row as u32, NONE, NONE]
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
        let (target_states, draft_states) = (states(|r| &r.sampling), states(|r| &r.draft_sampling));
        // A verification may have more rows than a block.
        let max_verify_rows = (self.block + self.vocab % 3).min(64);
        let verify_kernels = RejectionSampler { block: max_verify_rows, ..kernels };
        let tables = constant(device, &tables());
        let target_logits = upload(device, &self.padded(&self.target, self.vocab, max_verify_rows, 7.0));
        let draft_logits = upload(device, &self.drafter);
        let target_distributions = poisoned::<u8>(device, sequences * max_verify_rows * DISTRIBUTION_BYTES);
        let draft_distributions = poisoned::<u8>(device, rows * DISTRIBUTION_BYTES);
        let target = Rows { logits: &target_logits, distributions: &target_distributions };
        let drafter = Rows { logits: &draft_logits, distributions: &draft_distributions };
        let best = self.best(&self.target);
        let best = upload(device, &self.padded(&best, best.len() / rows, max_verify_rows, 5));
        let verify_table = upload(device, &self.padded(&self.table(), 4, max_verify_rows, NONE));
        verify_kernels
            .distributions(device, RowStep::ALL, target, &best, &verify_table, &target_states, &tables)
            .unwrap();
        // The drafter's as those of a reduced vocabulary, which are of other ids.
        let best: Vec<u64> = self.drafter.chunks(self.vocab).flat_map(best_keys_of_scattered_ids).collect();
        let (best, table) = (upload(device, &best), upload(device, &self.table()));
        let reduced = RejectionSampler { reduced: true, ..kernels };
        reduced.distributions(device, RowStep::ALL, drafter, &best, &table, &draft_states, &tables).unwrap();
        let drafts = upload(device, &vec![OLD; rows]);
        kernels.sample(device, RowStep::ALL, &drafts, drafter, &table, &target_states, &tables).unwrap();
        let drafts: Vec<u32> = download(device, &drafts);

        let token = |(row, given): (usize, &Option<u32>)| given.unwrap_or(drafts[row]);
        let tokens: Vec<u32> = self.tokens.iter().enumerate().map(token).collect();
        let spans: Vec<u32> = self.requests.iter().flat_map(|r| [r.length, r.rows as u32]).collect();
        let [accepted, next] = [(); 2].map(|()| upload(device, &vec![OLD; sequences]));
        let path = upload(device, &vec![OLD; sequences * max_verify_rows]);
        let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
        let (spans, on_device) =
            (upload(device, &spans), upload(device, &self.padded(&tokens, 1, max_verify_rows, 3)));
        let (partial, counters) = (poisoned::<u64>(device, rows), upload(device, &vec![0u32; sequences]));
        let inputs = VerifyInputs {
            max_verify_rows,
            tokens: &on_device,
            spans: &spans,
            partial: &partial,
            counters: &counters,
        };
        // Twice, because a replayed graph does not clear the counters.
        for _ in 0..2 {
            kernels.verify(device, output, target, drafter, inputs, &target_states, &tables).unwrap();
            assert!(bytes_of(device, &counters).iter().all(|&b| b == 0), "counters are zero after a launch");
        }
        let [accepted, next, path] = [&accepted, &next, &path].map(|b| download::<u32>(device, b));
        // Drop the rows after the blocks. They have no distribution and are on no path.
        let narrow = |all: &[u8], each: usize| {
            let of = |one: &[u8]| one[..self.block * each].to_vec();
            all.chunks(max_verify_rows * each).flat_map(of).collect::<Vec<u8>>()
        };
        let unused = path
            .chunks(max_verify_rows)
            .all(|path| path[self.block..].iter().all(|&row| [OLD, NONE].contains(&row)));
        assert!(unused, "{path:?}");
        let path = from_bytes(&narrow(&to_bytes(&path), 4));
        let distributions = [
            narrow(&bytes_of(device, &target_distributions), DISTRIBUTION_BYTES),
            bytes_of(device, &draft_distributions),
        ];
        Outcome { distributions, drafts, tokens, accepted, next, path }
    }

    /// The reference's distribution of a row of the drafter or the target.
    fn distribution(&self, drafter: bool, seq: usize, row: usize) -> Option<Distribution> {
        let request = &self.requests[seq];
        let (logits, sampling) = match drafter {
            true => (&self.drafter, &request.draft_sampling),
            false => (&self.target, &request.sampling),
        };
        sampling.probabilities(self.row(logits, seq * self.block + row))
    }

    /// Runs the batch and compares distributions, drafts and verification with the reference.
    fn check(&self, device: &dyn Device, what: &str) -> Coverage {
        let got = self.run(device);
        let mut coverage = Coverage::default();
        for (seq, request) in self.requests.iter().enumerate() {
            let at = seq * self.block;
            let context = format!("{what}, vocabulary {}, sequence {seq}, {:?}", self.vocab, request.method);
            let distributions: Vec<Option<Distribution>> =
                (1..request.rows).map(|row| self.distribution(true, seq, row)).collect();
            for row in 0..self.block {
                for drafter in [false, true] {
                    let expected = self.distribution(drafter, seq, row).filter(|_| row < request.rows);
                    let (distributions, logits) = match drafter {
                        false => (&got.distributions[0], &self.target),
                        true => (&got.distributions[1], &self.drafter),
                    };
                    let distribution =
                        &distributions[(at + row) * DISTRIBUTION_BYTES..][..DISTRIBUTION_BYTES];
                    let found = probabilities(distribution, self.row(logits, at + row));
                    let expected = expected.map(|distribution| distribution.tokens().to_vec());
                    assert_eq!(found, expected, "{context}, row {row}, drafter {drafter}");
                }
            }
            let sampled = &got.drafts[at..][..self.block];
            for (row, &token) in sampled.iter().enumerate() {
                let expected = match row {
                    0 => OLD,
                    row if row >= request.rows || request.method == VerifyMethod::Match => OLD,
                    // One row at a time, so that an invalid distribution does not change the other drafts.
                    row => distributions[row - 1]
                        .as_ref()
                        .map_or(NONE, |distribution| sample_row(distribution, row, request.random_stream())),
                };
                assert_eq!(token, expected, "{context}, draft {row}");
            }
            if distributions.iter().all(Option::is_some)
                && request.method != VerifyMethod::Match
                && request.rows > 0
            {
                let distributions: Vec<Distribution> = distributions.iter().flatten().cloned().collect();
                let chain = verify::sample_chain(&distributions, &mut request.random_stream()).unwrap();
                assert_eq!(sampled[1..request.rows], chain, "{context}");
            }

            let (accepted, next) = (got.accepted[seq], got.next[seq]);
            let path = &got.path[at..][..self.block];
            if request.method == VerifyMethod::Match || request.rows < 2 {
                assert_eq!((accepted, next), (OLD, OLD), "{context}");
                assert!(path.iter().all(|&row| row == OLD), "{context}");
                continue;
            }
            // A draft without a distribution ends the round, and its verification is not used.
            let Some(distributions) = distributions.into_iter().collect::<Option<Vec<Distribution>>>() else {
                continue;
            };
            let drafts = &got.tokens[at + 1..at + request.rows];
            let target = |row| self.distribution(false, seq, row);
            let expected = match request.method {
                VerifyMethod::Block => {
                    verify::block_verify(drafts, &distributions, target, &mut request.random_stream())
                }
                _ => verify::rejection(drafts, &distributions, target, &mut request.random_stream()),
            };
            let Some((num_accepted, token)) = expected else {
                assert_eq!(next, NONE, "{context}: invalid");
                coverage.invalid += 1;
                continue;
            };
            assert_eq!((accepted as usize, next), (num_accepted, token), "{context}, drafts {drafts:?}");
            let rows = (0..self.block).map(|row| if row <= num_accepted { row as u32 } else { NONE });
            assert_eq!(path, rows.collect::<Vec<u32>>(), "{context}");
            coverage.accepted[num_accepted.min(3)] += 1;
            coverage.whole += usize::from(num_accepted == drafts.len());
        }
        coverage
    }
}

/// Counts the kinds of verifications, so that tests can require that each kind occurred.
#[derive(Default, Debug, PartialEq)]
struct Coverage {
    /// Verifications with 0, 1, 2, and 3 or more accepted drafts.
    accepted: [usize; 4],
    /// Verifications that accepted every draft.
    whole: usize,
    invalid: usize,
}

impl Coverage {
    fn add(&mut self, other: Coverage) {
        (0..4).for_each(|i| self.accepted[i] += other.accepted[i]);
        self.whole += other.whole;
        self.invalid += other.invalid;
    }
}

/// The token that row `row` samples from its distribution.
fn sample_row(distribution: &Distribution, row: usize, stream: PhiloxStream) -> u32 {
    let key = rng::DrawKey { purpose: rng::Purpose::Draft, depth: row, row };
    rng::RandomSource::pick(&mut stream.clone(), key, distribution.tokens()).unwrap()
}

/// The probabilities of a row's logits under the 48 bytes of its distribution on the device; `None` if the
/// row has no distribution.
fn probabilities(distribution: &[u8], logits: &[f32]) -> Option<Vec<(u32, u64)>> {
    let words: Vec<u32> = from_bytes(distribution);
    let (max, c) = (f32::from_bits(words[0]), f32::from_bits(words[1]));
    let limit = (words[4], words[5], words[6]);
    let (inverse, remainder) =
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
            p += remainder;
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

/// Sequences of all methods and lengths. The drafter's row `j` is often like the target's row `j - 1`, which
/// it predicts, and sometimes disjoint.
fn batch(random: &mut Random, vocab: usize, block: usize, sequences: usize) -> Batch {
    let (mut requests, mut target, mut drafter, mut tokens) = (vec![], vec![], vec![], vec![]);
    for _ in 0..sequences {
        let method = [
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
        let draft_sampling = match random.below(2) {
            0 => sampling.clone(),
            _ => SamplingParams { seed: sampling.seed, stream: sampling.stream, ..settings(random, vocab) },
        };
        let length = random.next() as u32 >> (1 + random.below(31));
        requests.push(Request {
            method,
            rows,
            length,
            rounds: random.below(1000) as u32,
            sampling,
            draft_sampling,
        });
        let mut target_rows: Vec<Vec<f32>> = (0..block).map(|_| valid_logits(random, vocab)).collect();
        let mut drafts = vec![random.normals(vocab, 1.0)];
        for row in target_rows.iter_mut().take(block - 1) {
            drafts.push(match random.below(6) {
                0 => row.clone(),
                1 => valid_logits(random, vocab),
                // Disjoint: each token has a probability in only one of the two.
                2 => {
                    let of_drafter = |id: usize| id % 2 == 1;
                    let row_of_both = random.normals(vocab, 1.0);
                    let mask = |keep: bool, (id, &x): (usize, &f32)| {
                        if of_drafter(id) == keep { x } else { f32::NEG_INFINITY }
                    };
                    let half: Vec<f32> = row_of_both.iter().enumerate().map(|x| mask(false, x)).collect();
                    let other = row_of_both.iter().enumerate().map(|x| mask(true, x)).collect();
                    if vocab > 1 {
                        *row = half;
                        other
                    } else {
                        row_of_both
                    }
                }
                _ => row.iter().map(|x| x + random.normal(0.3)).collect(),
            });
        }
        // Rarely, an invalid row.
        match random.below(20) {
            0 => target_rows[random.below(block)][random.below(vocab)] = f32::NAN,
            1 => drafts[random.below(block)][random.below(vocab)] = f32::INFINITY,
            2 => target_rows[random.below(block)].fill(f32::NEG_INFINITY),
            _ => {}
        }
        target.extend(target_rows.concat());
        drafter.extend(drafts.concat());
        // Mostly the sampled token; else any token, also one of probability 0 or outside the vocabulary.
        tokens.extend((0..block).map(|_| match random.below(25) {
            0 => Some(random.below(vocab) as u32),
            1 if random.below(8) == 0 => Some(vocab as u32 + random.below(3) as u32),
            _ => None,
        }));
    }
    Batch { vocab, block, requests, target, drafter, tokens }
}

/// Most of the random batches run only with `DFLASH_EXHAUSTIVE=1`.
#[test]
fn sampled_and_verified_drafts_equal_the_reference() {
    let mut random = Random::new(1);
    let (mut turn, mut coverage) = (0, Coverage::default());
    for (vocab, block, few, all) in [
        (1, 4, 2, 10),
        (2, 5, 7, 40),
        (3, 16, 10, 60),
        (17, 6, 10, 60),
        (130, 8, 4, 40),
        (257, 16, 2, 20),
        (2048, 16, 1, 10),
        (9001, 5, 1, 4),
        (32000, 4, 1, 3),
    ] {
        // Launches cost by logits.
        let sequences = if vocab * block < 2000 || exhaustive() { 8 } else { 3 };
        for i in 0..cases(few, all) {
            let batch = batch(&mut random, vocab, block, sequences);
            on_gpu_in_turn(turn, |device| coverage.add(batch.check(device, &format!("batch {i}"))));
            turn += 1;
        }
    }
    println!("{coverage:?}");
    let part = if exhaustive() { 1 } else { 6 };
    let Coverage { accepted: [none, one, two, more], whole, invalid } = coverage;
    assert!(none > 100 / part && one > 50 / part && two > 20 / part && more > 100 / part);
    assert!(whole > 50 / part && invalid > 5 / part);
}

#[test]
fn drafts_are_the_same_under_every_schedule() {
    for (vocab, block) in [(3, 64), (17, 5), (257, 16), (2047, 4)] {
        let sequences = if block < 64 || exhaustive() { 6 } else { 2 };
        let batch = batch(&mut Random::new(vocab as u64), vocab, block, sequences);
        same_bits(|device| {
            let Outcome { distributions, drafts, tokens, accepted, next, path } = batch.run(device);
            let [a, b] = distributions;
            [a, b, to_bytes(&[drafts, tokens, accepted, next, path].concat())].concat()
        });
    }
}

fn params(temperature: f32, top_k: usize, top_p: f64) -> SamplingParams {
    SamplingParams { temperature, top_k, top_p, min_p: 0.0, seed: 11, stream: 5 }
}

/// One sequence of two rows with the single draft `draft`.
fn pair(method: VerifyMethod, target: Vec<f32>, drafter: Vec<f32>, draft: u32, rounds: u32) -> Batch {
    let sampling = params(1.0, 0, 1.0);
    let vocab = target.len();
    Batch {
        vocab,
        block: 2,
        requests: vec![Request {
            method,
            rows: 2,
            length: 9,
            rounds,
            sampling: sampling.clone(),
            draft_sampling: sampling,
        }],
        target: target.repeat(2),
        drafter: [vec![0.0; vocab], drafter].concat(),
        tokens: vec![None, Some(draft)],
    }
}

#[test]
fn every_unit_of_the_residual_is_sampled() {
    // Weights 1, 2^32, 1, 0 of the target and 0, 2^32, 0, 2 of the drafter. In the residual after the
    // rejection of draft 3, token 1 has a single unit, between those of tokens 0 and 2.
    let (one, two) = (-32.0 * 2f32.ln(), -31.0 * 2f32.ln());
    let none = f32::NEG_INFINITY;
    let (target, drafter) = (vec![one, 0.0, one, none], vec![none, 0.0, none, two]);
    let how = params(1.0, 0, 1.0);
    let (p, q) = (how.probabilities(&target).unwrap(), how.probabilities(&drafter).unwrap());
    let (low, over) = (p.probability(0), p.probability(1) - q.probability(1));
    assert_eq!((p.probability(2), p.probability(3), over), (low, 0, 1));
    assert!(low < 1 << 17 && q.probability(3) < 1 << 18, "{p:?} {q:?}");
    let high = |bits: u64, n: u64| ((u128::from(bits) * u128::from(n)) >> 64) as u64;
    let bits = |rounds: u32, purpose| {
        let stream = PhiloxStream { seed: how.seed, stream: how.stream, round: rounds + 1, anchor: 9 };
        stream.bits(rng::DrawKey { purpose, depth: 1, row: (purpose == rng::Purpose::Accept) as usize })
    };
    let rest = 2 * low + over;
    let find = |wanted: &dyn Fn(u32) -> bool| (0..1 << 22).find(|&rounds| wanted(rounds)).unwrap();
    // The unit of token 1 and those next to it; and random bits of 0 for a draft of probability 0 in the
    // target.
    let at = |unit: u64| find(&|rounds| high(bits(rounds, rng::Purpose::Residual), rest) == unit);
    let zero = find(&|rounds| high(bits(rounds, rng::Purpose::Accept), q.probability(3)) == 0);
    let units = [(at(low - 1), Some(0)), (at(low), Some(1)), (at(low + 1), Some(2)), (zero, None)];
    on_gpu(|device| {
        // The tokens in one lane, in lanes of one warp, and in warps of their own.
        for stride in [1, 4, 700] {
            let apart = |row: &[f32]| {
                let mut all = vec![none; 3 * stride + 1];
                row.iter().enumerate().for_each(|(i, &logit)| all[i * stride] = logit);
                all
            };
            for (method, (rounds, next)) in
                [VerifyMethod::Rejection, VerifyMethod::Block].into_iter().flat_map(|r| units.map(|u| (r, u)))
            {
                let batch = pair(method, apart(&target), apart(&drafter), 3 * stride as u32, rounds);
                batch.check(device, "units");
                let got = batch.run(device);
                assert_eq!(got.accepted, [0]);
                assert!(next.is_none_or(|next| got.next == [next * stride as u32]), "{got:?}");
            }
        }
    });
}

/// After one accepted draft, whose prefix has the weight 1/2, the residual p / 2 - q has only token 0. Without
/// the weight, token 1 would have 18 % of it.
#[test]
fn the_residual_of_a_block_has_the_weight_of_its_prefix() {
    let logits = |row: [f32; 3]| row.map(f32::ln);
    let target = [[0.4, 0.6, 0.0], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5]].map(logits).concat();
    let drafter = [[0.2, 0.3, 0.5], [0.8, 0.2, 0.0], [0.05, 0.3, 0.65]].map(logits).concat();
    let (sampling, count) = (params(1.0, 0, 1.0), 64);
    let request = |rounds| Request {
        method: VerifyMethod::Block,
        rows: 3,
        length: 9,
        rounds,
        sampling: sampling.clone(),
        draft_sampling: sampling.clone(),
    };
    let batch = Batch {
        vocab: 3,
        block: 3,
        requests: (0..count as u32).map(request).collect(),
        target: target.repeat(count),
        drafter: drafter.repeat(count),
        tokens: [None, Some(0), Some(2)].repeat(count),
    };
    on_gpu(|device| {
        let Coverage { accepted: [none, one, two, _], .. } = batch.check(device, "weights");
        assert!(none > 5 && one > 10 && two > 0, "{none} {one} {two}");
    });
}

#[test]
fn equal_distributions_accept_every_draft() {
    on_gpu(|device| {
        let mut random = Random::new(4);
        for (how, kind) in [
            (params(1.0, 0, 1.0), 9),
            (params(0.0, 0, 1.0), 9),
            (params(1.0, 3, 1e-12), 9),
            (params(0.9, 0, 0.5), 0),
        ] {
            let (vocab, block) = (257, 16);
            let row = if kind == 0 { vec![2.0; vocab] } else { random.normals(vocab, 2.0) };
            let request = |method| Request {
                method,
                rows: block,
                length: 70,
                rounds: 3,
                sampling: how.clone(),
                draft_sampling: how.clone(),
            };
            let batch = Batch {
                vocab,
                block,
                requests: [VerifyMethod::Rejection, VerifyMethod::Block].map(request).to_vec(),
                target: row.repeat(2 * block),
                drafter: row.repeat(2 * block),
                tokens: vec![None; 2 * block],
            };
            assert_eq!(batch.check(device, "equal").whole, 2);
        }
    });
}

#[test]
fn garbage_stays_in_bounds() {
    on_gpu(|device| {
        let mut random = Random::new(12);
        for i in 0..30 {
            let (vocab, block, sequences) = ([1, 7, 300, 3001][i % 4], [1, 4, 16][i % 3], 3);
            let kernels =
                RejectionSampler { sequences, block, vocab, blocks: vocab.div_ceil(128), reduced: false };
            let rows = sequences * block;
            let mut noise = |bytes: usize| {
                // Half of the words are small, so that they can be valid ids, methods and counts.
                let word =
                    |_| random.next() as u32 >> if random.below(2) == 0 { 0 } else { 20 + random.below(12) };
                (0..bytes / 4).map(word).collect::<Vec<u32>>()
            };
            let mut states = noise(sequences * 128);
            // The method is the last word of a state, and the form the upper half of the eighth. With these,
            // all sequences take part; in every second batch all but the first.
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
            let inputs = VerifyInputs {
                max_verify_rows: block,
                tokens: &tokens,
                spans: &spans,
                partial: &partial,
                counters: &counters,
            };
            let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
            kernels.sample(device, RowStep::ALL, &drafts, drafter, &table, &states, &tables).unwrap();
            kernels.verify(device, output, target, drafter, inputs, &states, &tables).unwrap();
            assert!(bytes_of(device, &counters).iter().all(|&b| b == 0), "counters are zero after a launch");
            kernels.distributions(device, RowStep::ALL, target, &best, &table, &states, &tables).unwrap();
        }
    });
}

#[test]
fn launches_refuse_wrong_sizes() {
    let device = TestGpu::new();
    let batch = batch(&mut Random::new(3), 40, 4, 2);
    let kernels = batch.kernels();
    let get = |bytes: usize| device.allocate(bytes, "test").unwrap();
    let (logits, distributions) = (get(8 * 160), get(8 * DISTRIBUTION_BYTES));
    let rows = Rows { logits: &logits, distributions: &distributions };
    let (best, table, states, tables) = (get(64), get(128), get(256), get(2048));
    let distribution = |kernels: RejectionSampler, rows, best| {
        kernels
            .distributions(&device, RowStep::ALL, rows, best, &table, &states, &tables)
            .unwrap_err()
            .to_string()
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
    let message = kernels
        .sample(&device, RowStep::ALL, &drafts, rows, &table, &states, &tables)
        .unwrap_err()
        .to_string();
    assert!(message.contains("kernel sample_drafts: drafts has 28 bytes, needs 32"), "{message}");
}
