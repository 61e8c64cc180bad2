//! Batches of trees that kernels sample and verify, with siblings sampled without replacement or with several
//! chains, and their comparison with `src/spec/verify.rs`.

use crate::support::kernel::*;
use crate::support::test_gpu::TestGpu;
use dflash::gpu::device::Device;
use dflash::gpu::kernels::RowStep;
use dflash::gpu::kernels::chains::{CLASSES_BYTES, Chains, Workspace};
use dflash::gpu::kernels::rejection::{DISTRIBUTION_BYTES, RejectionSampler, Rows};
use dflash::gpu::kernels::round::{DraftShape, Finish, Sequence};
use dflash::gpu::kernels::sample::tables;
use dflash::gpu::kernels::siblings::{SampledTrees, Siblings};
use dflash::gpu::kernels::verify::VerifyOutput;
use dflash::spec::config::VerifyMethod;
use dflash::spec::distribution::{Distribution, ONE};
use dflash::spec::rng::{DrawKey, PhiloxStream, RandomSource};
use dflash::spec::sampling::SamplingParams;
use dflash::spec::tree::{chains, shape};
use dflash::spec::verify;
use std::collections::HashMap;

pub const NONE: u32 = u32::MAX;

/// Fills outputs before a launch: a kernel must not overwrite it for a sequence that takes no part.
const OLD: u32 = 0x0bad_cafe;

/// A sequence of a batch and its tree.
#[derive(Clone)]
pub struct Request {
    /// How its drafts are verified.
    pub method: VerifyMethod,
    pub length: u32,
    pub rounds: u32,
    pub sampling: SamplingParams,
    /// How its drafts are sampled.
    pub draft_sampling: SamplingParams,
    /// `[rows of the tree]`.
    pub parents: Vec<u32>,
}

impl Request {
    /// The device's state of the sequence, with these sampling parameters.
    pub fn state(&self, form: DraftShape, sampling: &SamplingParams) -> Vec<u8> {
        let state = Sequence {
            active: true,
            length: self.length,
            anchor: 7,
            pending: 0,
            budget: 0,
            end: 0,
            draft_end: 0,
            block: 0,
            rows: 64,
            form,
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

    /// The random numbers of the sequence's round.
    pub fn random_stream(&self) -> PhiloxStream {
        let SamplingParams { seed, stream, .. } = self.sampling;
        PhiloxStream { seed, stream, round: self.rounds + 1, anchor: self.length }
    }

    /// Depth of a row; 0 is the anchor.
    pub fn depth(&self, row: usize) -> usize {
        self.path_tokens(row, &vec![0; self.parents.len()]).len()
    }

    /// The tokens on the path to a row, from the row to depth 1.
    fn path_tokens(&self, mut row: usize, tokens: &[u32]) -> Vec<u32> {
        let mut path = vec![];
        while row > 0 {
            path.push(tokens[row]);
            row = self.parents[row] as usize;
        }
        path
    }
}

/// Sequences, and logits of `[sequences][max_verify_rows]` rows of the target and `[sequences][block]` of the
/// drafter.
#[derive(Clone)]
pub struct Batch {
    /// Selects the kernels: `Siblings` for `rejection`, `Chains` for `block`. Sequences with another method
    /// take no part.
    pub method: VerifyMethod,
    pub vocab: usize,
    pub block: usize,
    pub max_verify_rows: usize,
    pub requests: Vec<Request>,
    pub target: Vec<f32>,
    pub drafter: Vec<f32>,
    /// `[sequences][max_verify_rows]`: tokens to verify instead of the sampled ones; `None`: the sampled one.
    pub tokens: Vec<Option<u32>>,
}

/// The results of the kernels for a batch.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub drafts: Vec<u32>,
    pub tokens: Vec<u32>,
    /// The target's logits that were verified.
    target: Vec<f32>,
    pub accepted: Vec<u32>,
    pub next: Vec<u32>,
    pub path: Vec<u32>,
    /// `[sequences][block]`, for chains: the overlap of the target's distribution at a row and the
    /// distribution of its draft, where the kernel computes it.
    overlaps: Vec<u64>,
}

impl Batch {
    pub fn kernels(&self) -> Siblings {
        let Batch { vocab, block, max_verify_rows, .. } = *self;
        Siblings { sequences: self.requests.len(), block, max_verify_rows, vocab }
    }

    /// Uploads `rows_each` rows of logits per sequence and computes their distributions.
    pub fn distributions(
        &self,
        device: &dyn Device,
        logits: &[f32],
        rows_each: usize,
        settings: fn(&Request) -> &SamplingParams,
    ) -> (dflash::gpu::device::Buffer, dflash::gpu::device::Buffer) {
        let (sequences, vocab) = (self.requests.len(), self.vocab);
        let kernels = RejectionSampler {
            sequences,
            block: rows_each,
            vocab,
            blocks: vocab.div_ceil(128),
            reduced: false,
        };
        let states: Vec<u8> =
            self.requests.iter().flat_map(|r| r.state(DraftShape::SampledTree, settings(r))).collect();
        let best: Vec<u64> = logits.chunks(vocab).flat_map(best_keys).collect();
        let table: Vec<u32> =
            (0..sequences * rows_each).flat_map(|row| [(row / rows_each) as u32, 0, NONE, NONE]).collect();
        let rows =
            (upload(device, logits), poisoned::<u8>(device, sequences * rows_each * DISTRIBUTION_BYTES));
        let [states, table] = [upload(device, &states), upload(device, &table)];
        let (best, tables) = (upload(device, &best), constant(device, &tables()));
        let both = Rows { logits: &rows.0, distributions: &rows.1 };
        kernels.distributions(device, RowStep::ALL, both, &best, &table, &states, &tables).unwrap();
        rows
    }

    pub fn run(&self, device: &dyn Device) -> Outcome {
        let Batch { block, max_verify_rows, .. } = *self;
        let (kernels, sequences) = (self.kernels(), self.requests.len());
        let drafter = self.distributions(device, &self.drafter, block, |r| &r.draft_sampling);
        let drafter = Rows { logits: &drafter.0, distributions: &drafter.1 };
        let states: Vec<u8> =
            self.requests.iter().flat_map(|r| r.state(DraftShape::SampledTree, &r.sampling)).collect();
        let (states, tables) = (upload(device, &states), constant(device, &tables()));
        // Rows after the tree have parent 0; the kernels ignore them.
        let parents = |r: &Request| [&r.parents[..], &vec![0; max_verify_rows - r.parents.len()]].concat();
        let parents: Vec<u32> = self.requests.iter().flat_map(parents).collect();
        let spans: Vec<u32> = self.requests.iter().flat_map(|r| [r.length, r.parents.len() as u32]).collect();
        let (parents, spans) = (upload(device, &parents), upload(device, &spans));
        let drafts = upload(device, &vec![OLD; sequences * max_verify_rows]);
        let trees = SampledTrees { tokens: &drafts, parents: &parents, spans: &spans };
        match self.method {
            VerifyMethod::Block => Chains(kernels).sample(device, trees, drafter, &states, &tables).unwrap(),
            _ => kernels.sample(device, trees, drafter, &states, &tables).unwrap(),
        }
        let drafts: Vec<u32> = download(device, &drafts);

        let token = |(row, given): (usize, &Option<u32>)| given.unwrap_or(drafts[row]);
        let tokens: Vec<u32> = self.tokens.iter().enumerate().map(token).collect();
        let on_device = upload(device, &tokens);
        let target = self.target_logits(&tokens);
        let on_target = self.distributions(device, &target, max_verify_rows, |r| &r.sampling);
        let rows = Rows { logits: &on_target.0, distributions: &on_target.1 };
        let [accepted, next] = [(); 2].map(|()| upload(device, &vec![OLD; sequences]));
        let path = upload(device, &vec![OLD; sequences * max_verify_rows]);
        let output = VerifyOutput { accepted: &accepted, next: &next, path: &path };
        let trees = SampledTrees { tokens: &on_device, parents: &parents, spans: &spans };
        let overlaps = poisoned::<u64>(device, sequences * block);
        if self.method == VerifyMethod::Block {
            let classes = poisoned::<u8>(device, sequences * max_verify_rows * CLASSES_BYTES);
            let counters = upload(device, &vec![0u32; sequences]);
            let work = Workspace { classes: &classes, partial: &overlaps, counters: &counters };
            let chains = Chains(kernels);
            chains.verify(device, output, trees, rows, drafter, &states, &tables, work).unwrap();
            assert_eq!(download::<u32>(device, &counters), vec![0; sequences]);
        } else {
            kernels.verify(device, output, trees, rows, drafter, &states, &tables).unwrap();
        }
        let [accepted, next, path] = [&accepted, &next, &path].map(|b| download::<u32>(device, b));
        Outcome { drafts, tokens, target, accepted, next, path, overlaps: download(device, &overlaps) }
    }

    /// The target's logits for these drafts. Rows of chains that follow the same drafts get the same logits.
    fn target_logits(&self, tokens: &[u32]) -> Vec<f32> {
        let mut target = self.target.clone();
        for (seq, request) in self.requests.iter().enumerate().filter(|_| self.method == VerifyMethod::Block)
        {
            let mut first_rows = HashMap::new();
            for row in 0..request.parents.len() {
                let at = seq * self.max_verify_rows;
                let same = *first_rows.entry(request.path_tokens(row, &tokens[at..])).or_insert(row);
                let from = (at + same) * self.vocab;
                target.copy_within(from..from + self.vocab, (at + row) * self.vocab);
            }
        }
        target
    }

    /// The distributions of depths 1, 2, ... of a sequence, by the definition.
    pub fn draft_distributions(&self, seq: usize) -> Vec<Option<Distribution>> {
        let rows = self.drafter[seq * self.block * self.vocab..].chunks(self.vocab).take(self.block).skip(1);
        rows.map(|row| self.requests[seq].draft_sampling.probabilities(row)).collect()
    }

    /// Runs the batch and compares drafts and verification with the definition.
    pub fn check(&self, device: &dyn Device, what: &str) -> Coverage {
        let (got, max_verify_rows) = (self.run(device), self.max_verify_rows);
        let mut coverage = Coverage::default();
        for (seq, request) in self.requests.iter().enumerate() {
            let at = seq * max_verify_rows;
            let parents = &request.parents;
            let context = format!("{what}, vocabulary {}, sequence {seq}, {parents:?}", self.vocab);
            let sampled = &got.drafts[at..][..max_verify_rows];
            let (accepted, next) = (got.accepted[seq], got.next[seq]);
            let path = &got.path[at..][..max_verify_rows];
            if request.method != self.method || request.parents.len() < 2 {
                assert!(sampled.iter().chain(path).all(|&value| value == OLD), "{context}");
                assert_eq!((accepted, next), (OLD, OLD), "{context}");
                continue;
            }
            let rows = parents.len();
            assert!(sampled[rows..].iter().all(|&token| token == NONE), "{context}: padding after the tree");
            let distributions = self.draft_distributions(seq);
            let deepest = (0..rows).map(|row| request.depth(row)).max().unwrap();
            // A depth with invalid logits does not change the drafts of other depths, so any distribution can
            // replace its own here.
            let any = distributions.iter().flatten().next().cloned();
            let Some(any) = any else { continue };
            let whole: Vec<Distribution> = distributions
                .iter()
                .map(|distribution| distribution.clone().unwrap_or(any.clone()))
                .collect();
            let mut random = request.random_stream();
            let expected = match self.method {
                VerifyMethod::Block => {
                    let expected =
                        verify::sample_chains(7, (rows - 1) / deepest, &whole[..deepest], &mut random)
                            .unwrap();
                    assert_eq!(&expected.1, parents, "{context}");
                    expected.0
                }
                _ => {
                    verify::sample_tree(7, parents, &whole, verify::Siblings::Distinct, &mut random).unwrap()
                }
            };
            for row in 0..rows {
                let depth = request.depth(row);
                let invalid = depth > 0 && distributions[depth - 1].is_none();
                assert_eq!(sampled[row], if invalid { NONE } else { expected[row] }, "{context}, row {row}");
                let before = (1..row).filter(|&other| parents[other] == parents[row]);
                coverage.repeats +=
                    usize::from(before.into_iter().any(|other| sampled[other] == sampled[row]) && !invalid);
            }
            // A draft without a distribution ends the round, and its verification is not used.
            if distributions[..deepest].iter().any(Option::is_none) {
                coverage.invalid += 1;
                continue;
            }
            let tokens = &got.tokens[at..][..rows];
            let rows_of = |row| &got.target[(at + row) * self.vocab..][..self.vocab];
            let target = |row: usize| request.sampling.probabilities(rows_of(row));
            let mut recorder = Recorder(request.random_stream(), vec![]);
            let verified = match self.method {
                VerifyMethod::Block => {
                    verify::multi_draft_block_verify(tokens, &whole[..deepest], target, &mut recorder)
                }
                _ => verify::recursive_rejection(
                    tokens,
                    parents,
                    &whole,
                    verify::Siblings::Distinct,
                    target,
                    &mut recorder,
                ),
            };
            let Some((accepted_path, token)) = verified else {
                assert_eq!(next, NONE, "{context}: invalid");
                coverage.invalid += 1;
                continue;
            };
            assert_eq!(
                (accepted as usize, next),
                (accepted_path.len() - 1, token),
                "{context}, drafts {tokens:?}"
            );
            let mut expected: Vec<u32> = accepted_path.iter().map(|&row| row as u32).collect();
            expected.resize(max_verify_rows, NONE);
            assert_eq!(path, expected, "{context}");
            // The kernel's overlaps equal the definition's exactly.
            for &(row, n) in recorder
                .1
                .iter()
                .filter(|&&(row, n)| self.method == VerifyMethod::Block && row < deepest && n < ONE)
            {
                assert_eq!(got.overlaps[seq * self.block + row], ONE - n, "{context}, row {row}");
                coverage.overlaps += 1;
            }
            coverage.accepted[(accepted_path.len() - 1).min(3)] += 1;
            for &row in &accepted_path[1..] {
                let earlier = (1..row).filter(|&other| parents[other] == parents[row]).count();
                coverage.siblings_before[earlier.min(3)] += 1;
            }
            let last = *accepted_path.last().unwrap();
            coverage.all_rejected +=
                usize::from(parents[1..].iter().filter(|&&p| p as usize == last).count() > 2);
        }
        coverage
    }
}

/// A [`PhiloxStream`] that records the row and the denominator of each acceptance test.
struct Recorder(PhiloxStream, Vec<(usize, u64)>);

impl RandomSource for Recorder {
    fn accept(&mut self, key: DrawKey, s: u64, n: u64) -> bool {
        self.1.push((key.row, n));
        self.0.accept(key, s, n)
    }

    fn pick(&mut self, key: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        self.0.pick(key, weights)
    }
}

/// Counts the kinds of verifications, so that tests can require that each kind occurred.
#[derive(Default, Debug, PartialEq)]
pub struct Coverage {
    /// Verifications with 0, 1, 2, and 3 or more accepted drafts.
    pub accepted: [usize; 4],
    /// Accepted drafts with 0, 1, 2, and 3 or more earlier siblings.
    pub siblings_before: [usize; 4],
    /// Last rows of a path with three or more children, all rejected.
    pub all_rejected: usize,
    /// Drafts that repeat an earlier sibling.
    pub repeats: usize,
    /// Sequences with invalid logits.
    pub invalid: usize,
    /// Overlaps that were compared, for chains.
    pub overlaps: usize,
}

impl Coverage {
    pub fn add(&mut self, other: Coverage) {
        (0..4).for_each(|i| self.accepted[i] += other.accepted[i]);
        (0..4).for_each(|i| self.siblings_before[i] += other.siblings_before[i]);
        self.all_rejected += other.all_rejected;
        self.repeats += other.repeats;
        self.invalid += other.invalid;
        self.overlaps += other.overlaps;
    }
}

/// Parents of a random tree of `rows` rows: the shape that the engine uses, a star, or any tree. For `block`:
/// several chains of at most `rows` rows together.
fn parents(random: &mut Random, method: VerifyMethod, rows: usize, depth: usize) -> Vec<u32> {
    if rows == 0 || depth == 0 {
        return vec![0; rows.min(1)];
    }
    if method == VerifyMethod::Block {
        let (count, each) = match random.below(3) {
            0 => chains(rows, depth),
            _ => {
                let each = 1 + random.below(depth.min((rows - 1).max(1)));
                ((rows - 1) / each, each)
            }
        };
        let parent = |i: usize| if i.is_multiple_of(each) { 0 } else { i as u32 };
        return [0].into_iter().chain((0..count * each).map(parent)).collect();
    }
    let mut tree = vec![0u32];
    match random.below(4) {
        0 => return shape(rows, depth).parents,
        1 => return vec![0; rows],
        _ => {}
    }
    let mut depths = vec![0];
    while tree.len() < rows {
        let parent = random.below(tree.len());
        if depths[parent] < depth {
            tree.push(parent as u32);
            depths.push(depths[parent] + 1);
        }
    }
    tree
}

/// A random row of valid logits.
pub fn row(random: &mut Random, vocab: usize) -> Vec<f32> {
    let mut row = match random.below(11) {
        0 => vec![random.normal(5.0); vocab],
        1 => (0..vocab).map(|_| (random.normal(2.0) * 2.0).round() / 2.0).collect(),
        2 => (0..vocab)
            .map(|_| if random.below(3) == 0 { f32::NEG_INFINITY } else { random.normal(4.0) })
            .collect(),
        3 => {
            let mut row = random.normals(vocab, 1.0);
            row[random.below(vocab)] = 60.0;
            row
        }
        4 => (0..vocab).map(|_| f32::from_bits(20f32.to_bits() - random.below(40) as u32)).collect(),
        5 => (0..vocab).map(|id| -(id as f32) / 16.0).collect(),
        6 => random.normals(vocab, 3.0),
        _ => random.normals(vocab, 0.7),
    };
    if row.iter().all(|&logit| logit == f32::NEG_INFINITY) {
        row[random.below(vocab)] = 1.0;
    }
    row
}

/// Random sampling parameters.
pub fn settings(random: &mut Random, vocab: usize) -> SamplingParams {
    let temperature = [0.0, 1e4, 1e-4, 0.7, 1.0, 1.0, 1.0, 2.0][random.below(8)];
    let top_k = match random.below(6) {
        0 => 1 + random.below(vocab.min(4)),
        1 => 1 + random.below(vocab),
        _ => 0,
    };
    let top_p = [1.0, 1.0, 1.0, 1.0, 0.9, 1e-12][random.below(6)];
    let min_p = if random.below(4) == 0 { f64::from(random.unit()) } else { 0.0 };
    SamplingParams { temperature, top_k, top_p, min_p, seed: random.next(), stream: random.next() as u32 }
}

/// A random batch for the kernels of `method`. The target's rows are often like those that their drafts are
/// sampled from, and sometimes disjoint.
pub fn batch(
    random: &mut Random,
    method: VerifyMethod,
    (vocab, block, max_verify_rows): (usize, usize, usize),
    sequences: usize,
) -> Batch {
    let (mut requests, mut target, mut drafter, mut tokens) = (vec![], vec![], vec![], vec![]);
    for _ in 0..sequences {
        let method_of_request = match random.below(10) {
            0 => VerifyMethod::Match,
            1 if method == VerifyMethod::Block => VerifyMethod::Rejection,
            1 => VerifyMethod::Block,
            _ => method,
        };
        // Two broad, unrelated distributions: some siblings are rejected before one is accepted.
        let broad = random.below(3) == 0;
        let full = |base: SamplingParams| SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            ..base
        };
        let sampling = match broad {
            true => full(settings(random, vocab)),
            false => settings(random, vocab),
        };
        let draft_sampling = match random.below(if broad { 1 } else { 2 }) {
            0 => sampling.clone(),
            _ => SamplingParams { seed: sampling.seed, stream: sampling.stream, ..settings(random, vocab) },
        };
        let rows = match random.below(8) {
            0 => random.below(3).min(max_verify_rows),
            1 => random.below(max_verify_rows + 1),
            _ => max_verify_rows,
        };
        let request = Request {
            method: method_of_request,
            length: random.next() as u32 >> (1 + random.below(31)),
            rounds: random.below(1000) as u32,
            sampling,
            draft_sampling,
            parents: parents(random, method, rows, block - 1),
        };
        let draft = |_| if broad { random.normals(vocab, 1.5) } else { row(random, vocab) };
        let drafts: Vec<Vec<f32>> = (0..block).map(draft).collect();
        for at in 0..max_verify_rows {
            let depth = if at < request.parents.len() { request.depth(at) } else { 0 };
            let similar = &drafts[(depth + 1).min(block - 1)];
            target.extend(match random.below(6) {
                _ if broad => random.normals(vocab, 1.5),
                0 => similar.clone(),
                1 => row(random, vocab),
                // Disjoint from the draft's, if there are two tokens.
                2 => {
                    let other = |x: f32| if x == f32::NEG_INFINITY { random.normal(2.0) } else { -9e3 };
                    similar.iter().copied().map(other).collect()
                }
                3 => similar.iter().map(|x| x + random.normal(0.3)).collect(),
                _ => similar.iter().map(|x| x + random.normal(2.0)).collect::<Vec<f32>>(),
            });
        }
        drafter.extend(drafts.concat());
        // Rarely, invalid logits.
        let (draft_end, target_end) = (drafter.len(), target.len());
        match random.below(24) {
            0 => target[target_end - 1 - random.below(max_verify_rows * vocab)] = f32::NAN,
            1 => drafter[draft_end - 1 - random.below(block * vocab)] = f32::INFINITY,
            2 => target[target_end - max_verify_rows * vocab..][..vocab].fill(f32::NEG_INFINITY),
            _ => {}
        }
        // Mostly the sampled token; otherwise any token, also one with probability 0 or outside the
        // vocabulary.
        tokens.extend((0..max_verify_rows).map(|_| match random.below(25) {
            0 => Some(random.below(vocab) as u32),
            1 if random.below(8) == 0 => Some(vocab as u32 + random.below(3) as u32),
            2 if random.below(8) == 0 => Some(NONE),
            _ => None,
        }));
        requests.push(request);
    }
    Batch { method, vocab, block, max_verify_rows, requests, target, drafter, tokens }
}

/// Asserts that the kernels of `method` sample and verify alike under every schedule and on two threads.
pub fn same_under_every_schedule(method: VerifyMethod) {
    for sizes in [(3, 4, 64), (17, 5, 9), (257, 8, 16), (2047, 4, 8)] {
        let batch = batch(&mut Random::new(sizes.0 as u64), method, sizes, 5);
        same_bits(|device| {
            let Outcome { drafts, tokens, accepted, next, path, .. } = batch.run(device);
            to_bytes(&[drafts, tokens, accepted, next, path].concat())
        });
    }
}
