//! Batches of trees that are drawn and judged by kernels, siblings without replacement or several chains, held against the
//! rules' definitions.

use crate::support::kernel::*;
use dflash::gpu::device::Device;
use dflash::gpu::emulator::Emulator;
use dflash::gpu::kernels::chains::{CLASSES_BYTES, Chains, Workspace};
use dflash::gpu::kernels::rejection::{DISTRIBUTION_BYTES, RejectionSampler, Rows};
use dflash::gpu::kernels::round::{Finish, Form, Sequence};
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

/// What was there before, where a kernel is to leave it.
const OLD: u32 = 0x0bad_cafe;

/// A sequence of a batch, and its tree.
#[derive(Clone)]
pub struct Request {
    pub rule: VerifyMethod,
    pub length: u32,
    pub rounds: u32,
    pub sampling: SamplingParams,
    pub drafting: SamplingParams,
    /// As many as the tree has rows.
    pub parents: Vec<u32>,
}

impl Request {
    pub fn state(&self, form: Form, sampling: &SamplingParams) -> Vec<u8> {
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
            verify_method: self.rule,
        };
        state.to_bytes().unwrap()
    }

    pub fn dice(&self) -> PhiloxStream {
        let SamplingParams { seed, stream, .. } = self.sampling;
        PhiloxStream { seed, stream, round: self.rounds + 1, anchor: self.length }
    }

    pub fn depth(&self, row: usize) -> usize {
        self.way(row, &vec![0; self.parents.len()]).len()
    }

    /// Of `tokens` those on the way to a row, backwards.
    fn way(&self, mut row: usize, tokens: &[u32]) -> Vec<u32> {
        let mut way = vec![];
        while row > 0 {
            way.push(tokens[row]);
            row = self.parents[row] as usize;
        }
        way
    }
}

/// Logits of `[sequences][wide]` rows of the target and of `[sequences][block]` of the drafter.
#[derive(Clone)]
pub struct Batch {
    /// Whose kernels run: those of siblings under `rejection`, those of chains under `block`. Other sequences take no part.
    pub kind: VerifyMethod,
    pub vocab: usize,
    pub block: usize,
    pub wide: usize,
    pub requests: Vec<Request>,
    pub target: Vec<f32>,
    pub drafter: Vec<f32>,
    /// `[sequences][wide]`, in place of what was drawn; `None` there: what was.
    pub tokens: Vec<Option<u32>>,
}

/// What the kernels make of a batch.
#[derive(Debug, PartialEq)]
pub struct Outcome {
    pub drafts: Vec<u32>,
    pub tokens: Vec<u32>,
    /// The target's logits as they were judged.
    target: Vec<f32>,
    pub accepted: Vec<u32>,
    pub next: Vec<u32>,
    pub path: Vec<u32>,
    /// `[sequences][block]`, of chains: what a row's distribution and its draft's share, where that was asked for.
    shared: Vec<u64>,
}

impl Batch {
    pub fn kernels(&self) -> Siblings {
        let Batch { vocab, block, wide, .. } = *self;
        Siblings { sequences: self.requests.len(), block, max_verify_rows: wide, vocab }
    }

    /// The distributions of rows, `of_each` of a sequence.
    pub fn distributions(
        &self,
        device: &dyn Device,
        logits: &[f32],
        of_each: usize,
        settings: fn(&Request) -> &SamplingParams,
    ) -> (dflash::gpu::device::Buffer, dflash::gpu::device::Buffer) {
        let (sequences, vocab) = (self.requests.len(), self.vocab);
        let kernels = RejectionSampler { sequences, block: of_each, vocab, blocks: vocab.div_ceil(128) };
        let states: Vec<u8> =
            self.requests.iter().flat_map(|r| r.state(Form::SampledTree, settings(r))).collect();
        let best: Vec<u64> = logits.chunks(vocab).flat_map(best_keys).collect();
        let table: Vec<u32> =
            (0..sequences * of_each).flat_map(|row| [(row / of_each) as u32, 0, NONE, NONE]).collect();
        let rows = (upload(device, logits), poisoned::<u8>(device, sequences * of_each * DISTRIBUTION_BYTES));
        let [states, table] = [upload(device, &states), upload(device, &table)];
        let (best, tables) = (upload(device, &best), constant(device, &tables()));
        let both = Rows { logits: &rows.0, distributions: &rows.1 };
        kernels.distributions(device, both, &best, &table, &states, &tables).unwrap();
        rows
    }

    pub fn run(&self, device: &dyn Device) -> Outcome {
        let Batch { block, wide, .. } = *self;
        let (kernels, sequences) = (self.kernels(), self.requests.len());
        let drafter = self.distributions(device, &self.drafter, block, |r| &r.drafting);
        let drafter = Rows { logits: &drafter.0, distributions: &drafter.1 };
        let states: Vec<u8> =
            self.requests.iter().flat_map(|r| r.state(Form::SampledTree, &r.sampling)).collect();
        let (states, tables) = (upload(device, &states), constant(device, &tables()));
        // Rows behind the tree's follow anything.
        let parents = |r: &Request| [&r.parents[..], &vec![0; wide - r.parents.len()]].concat();
        let parents: Vec<u32> = self.requests.iter().flat_map(parents).collect();
        let spans: Vec<u32> = self.requests.iter().flat_map(|r| [r.length, r.parents.len() as u32]).collect();
        let (parents, spans) = (upload(device, &parents), upload(device, &spans));
        let drafts = upload(device, &vec![OLD; sequences * wide]);
        let trees = SampledTrees { tokens: &drafts, parents: &parents, spans: &spans };
        match self.kind {
            VerifyMethod::Block => Chains(kernels).sample(device, trees, drafter, &states, &tables).unwrap(),
            _ => kernels.sample(device, trees, drafter, &states, &tables).unwrap(),
        }
        let drafts: Vec<u32> = download(device, &drafts);

        let token = |(row, given): (usize, &Option<u32>)| given.unwrap_or(drafts[row]);
        let tokens: Vec<u32> = self.tokens.iter().enumerate().map(token).collect();
        let on_device = upload(device, &tokens);
        let target = self.judged(&tokens);
        let on_target = self.distributions(device, &target, wide, |r| &r.sampling);
        let rows = Rows { logits: &on_target.0, distributions: &on_target.1 };
        let [accepted, next] = [(); 2].map(|()| upload(device, &vec![OLD; sequences]));
        let path = upload(device, &vec![OLD; sequences * wide]);
        let verdict = VerifyOutput { accepted: &accepted, next: &next, path: &path };
        let trees = SampledTrees { tokens: &on_device, parents: &parents, spans: &spans };
        let shared = poisoned::<u64>(device, sequences * block);
        if self.kind == VerifyMethod::Block {
            let classes = poisoned::<u8>(device, sequences * wide * CLASSES_BYTES);
            let counters = upload(device, &vec![0u32; sequences]);
            let work = Workspace { classes: &classes, partial: &shared, counters: &counters };
            let chains = Chains(kernels);
            chains.verify(device, verdict, trees, rows, drafter, &states, &tables, work).unwrap();
            assert_eq!(download::<u32>(device, &counters), vec![0; sequences]);
        } else {
            kernels.verify(device, verdict, trees, rows, drafter, &states, &tables).unwrap();
        }
        let [accepted, next, path] = [&accepted, &next, &path].map(|b| download::<u32>(device, b));
        Outcome { drafts, tokens, target, accepted, next, path, shared: download(device, &shared) }
    }

    /// The target's logits after these drafts: rows of chains that have had the same ones have the same.
    fn judged(&self, tokens: &[u32]) -> Vec<f32> {
        let mut target = self.target.clone();
        for (own, request) in self.requests.iter().enumerate().filter(|_| self.kind == VerifyMethod::Block) {
            let mut seen = HashMap::new();
            for row in 0..request.parents.len() {
                let at = own * self.wide;
                let like = *seen.entry(request.way(row, &tokens[at..])).or_insert(row);
                let from = (at + like) * self.vocab;
                target.copy_within(from..from + self.vocab, (at + row) * self.vocab);
            }
        }
        target
    }

    /// The distributions of depths 1, 2, .. as the definition has them.
    pub fn drafts_laws(&self, own: usize) -> Vec<Option<Distribution>> {
        let rows = self.drafter[own * self.block * self.vocab..].chunks(self.vocab).take(self.block).skip(1);
        rows.map(|row| self.requests[own].drafting.probabilities(row)).collect()
    }

    pub fn check(&self, device: &dyn Device, what: &str) -> Seen {
        let (got, wide) = (self.run(device), self.wide);
        let mut seen = Seen::default();
        for (own, request) in self.requests.iter().enumerate() {
            let at = own * wide;
            let parents = &request.parents;
            let context = format!("{what}, vocabulary {}, sequence {own}, {parents:?}", self.vocab);
            let drawn = &got.drafts[at..][..wide];
            let (accepted, next) = (got.accepted[own], got.next[own]);
            let path = &got.path[at..][..wide];
            if request.rule != self.kind || request.parents.len() < 2 {
                assert!(drawn.iter().chain(path).all(|&word| word == OLD), "{context}");
                assert_eq!((accepted, next), (OLD, OLD), "{context}");
                continue;
            }
            let rows = parents.len();
            assert!(drawn[rows..].iter().all(|&token| token == NONE), "{context}: padding");
            let distributions = self.drafts_laws(own);
            let deepest = (0..rows).map(|row| request.depth(row)).max().unwrap();
            // What a damaged depth has, the others are as they would be: any distribution stands in for it.
            let any = distributions.iter().flatten().next().cloned();
            let Some(any) = any else { continue };
            let whole: Vec<Distribution> = distributions
                .iter()
                .map(|distribution| distribution.clone().unwrap_or(any.clone()))
                .collect();
            let mut dice = request.dice();
            let expected = match self.kind {
                VerifyMethod::Block => {
                    let drawn =
                        verify::sample_chains(7, (rows - 1) / deepest, &whole[..deepest], &mut dice).unwrap();
                    assert_eq!(&drawn.1, parents, "{context}");
                    drawn.0
                }
                _ => verify::sample_tree(7, parents, &whole, verify::Siblings::Distinct, &mut dice).unwrap(),
            };
            for row in 0..rows {
                let depth = request.depth(row);
                let damaged = depth > 0 && distributions[depth - 1].is_none();
                assert_eq!(drawn[row], if damaged { NONE } else { expected[row] }, "{context}, row {row}");
                let before = (1..row).filter(|&other| parents[other] == parents[row]);
                seen.repeats +=
                    usize::from(before.into_iter().any(|other| drawn[other] == drawn[row]) && !damaged);
            }
            // A draft that has no distribution ends its round; what is said of it does not matter.
            if distributions[..deepest].iter().any(Option::is_none) {
                seen.damaged += 1;
                continue;
            }
            let tokens = &got.tokens[at..][..rows];
            let rows_of = |row| &got.target[(at + row) * self.vocab..][..self.vocab];
            let target = |row: usize| request.sampling.probabilities(rows_of(row));
            let mut heard = Heard(request.dice(), vec![]);
            let judged = match self.kind {
                VerifyMethod::Block => {
                    verify::multi_draft_block_verify(tokens, &whole[..deepest], target, &mut heard)
                }
                _ => verify::recursive_rejection(
                    tokens,
                    parents,
                    &whole,
                    verify::Siblings::Distinct,
                    target,
                    &mut heard,
                ),
            };
            let Some((stood, token)) = judged else {
                assert_eq!(next, NONE, "{context}: damaged");
                seen.damaged += 1;
                continue;
            };
            assert_eq!((accepted as usize, next), (stood.len() - 1, token), "{context}, drafts {tokens:?}");
            let mut way: Vec<u32> = stood.iter().map(|&row| row as u32).collect();
            way.resize(wide, NONE);
            assert_eq!(path, way, "{context}");
            // To the last unit.
            for &(row, n) in heard
                .1
                .iter()
                .filter(|&&(row, n)| self.kind == VerifyMethod::Block && row < deepest && n < ONE)
            {
                assert_eq!(got.shared[own * self.block + row], ONE - n, "{context}, row {row}");
                seen.sums += 1;
            }
            seen.stood[(stood.len() - 1).min(3)] += 1;
            for &row in &stood[1..] {
                let place = (1..row).filter(|&other| parents[other] == parents[row]).count();
                seen.places[place.min(3)] += 1;
            }
            let last = *stood.last().unwrap();
            seen.none_of += usize::from(parents[1..].iter().filter(|&&p| p as usize == last).count() > 2);
        }
        seen
    }
}

/// PhiloxStream, and of each test the row and what it was out of.
struct Heard(PhiloxStream, Vec<(usize, u64)>);

impl RandomSource for Heard {
    fn accept(&mut self, word: DrawKey, s: u64, n: u64) -> bool {
        self.1.push((word.row, n));
        self.0.accept(word, s, n)
    }

    fn pick(&mut self, word: DrawKey, weights: &[(u32, u64)]) -> Option<u32> {
        self.0.pick(word, weights)
    }
}

/// How verdicts were spread.
#[derive(Default, Debug, PartialEq)]
pub struct Seen {
    /// Drafts that stood, up to three.
    pub stood: [usize; 4],
    /// Of those, the siblings before each.
    pub places: [usize; 4],
    /// Rows of which three children or more fell.
    pub none_of: usize,
    pub repeats: usize,
    pub damaged: usize,
    /// Of chains: sums that were compared.
    pub sums: usize,
}

impl Seen {
    pub fn add(&mut self, other: Seen) {
        (0..4).for_each(|i| self.stood[i] += other.stood[i]);
        (0..4).for_each(|i| self.places[i] += other.places[i]);
        self.none_of += other.none_of;
        self.repeats += other.repeats;
        self.damaged += other.damaged;
        self.sums += other.sums;
    }
}

/// Parents of a tree of so many rows: a shape of the engine's, a star, or anything; of several chains, up to so many.
fn parents(random: &mut Random, kind: VerifyMethod, rows: usize, depth: usize) -> Vec<u32> {
    if rows == 0 || depth == 0 {
        return vec![0; rows.min(1)];
    }
    if kind == VerifyMethod::Block {
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

/// A row of logits that is sound.
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

/// The target's rows are often like those their drafts were drawn from; sometimes nothing like them.
pub fn batch(
    random: &mut Random,
    kind: VerifyMethod,
    (vocab, block, wide): (usize, usize, usize),
    sequences: usize,
) -> Batch {
    let (mut requests, mut target, mut drafter, mut tokens) = (vec![], vec![], vec![], vec![]);
    for _ in 0..sequences {
        let rule = match random.below(10) {
            0 => VerifyMethod::Match,
            1 if kind == VerifyMethod::Block => VerifyMethod::Rejection,
            1 => VerifyMethod::Block,
            _ => kind,
        };
        // Both distributions broad and nothing alike: it takes some siblings until one stands.
        let broad = random.below(3) == 0;
        let plain = |own: SamplingParams| SamplingParams {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            ..own
        };
        let sampling = match broad {
            true => plain(settings(random, vocab)),
            false => settings(random, vocab),
        };
        let drafting = match random.below(if broad { 1 } else { 2 }) {
            0 => sampling.clone(),
            _ => SamplingParams { seed: sampling.seed, stream: sampling.stream, ..settings(random, vocab) },
        };
        let rows = match random.below(8) {
            0 => random.below(3).min(wide),
            1 => random.below(wide + 1),
            _ => wide,
        };
        let request = Request {
            rule,
            length: random.next() as u32 >> (1 + random.below(31)),
            rounds: random.below(1000) as u32,
            sampling,
            drafting,
            parents: parents(random, kind, rows, block - 1),
        };
        let draft = |_| if broad { random.normals(vocab, 1.5) } else { row(random, vocab) };
        let drafts: Vec<Vec<f32>> = (0..block).map(draft).collect();
        for at in 0..wide {
            let depth = if at < request.parents.len() { request.depth(at) } else { 0 };
            let like = &drafts[(depth + 1).min(block - 1)];
            target.extend(match random.below(6) {
                _ if broad => random.normals(vocab, 1.5),
                0 => like.clone(),
                1 => row(random, vocab),
                // Nothing in common, where there are two tokens.
                2 => {
                    let other = |x: f32| if x == f32::NEG_INFINITY { random.normal(2.0) } else { -9e3 };
                    like.iter().copied().map(other).collect()
                }
                3 => like.iter().map(|x| x + random.normal(0.3)).collect(),
                _ => like.iter().map(|x| x + random.normal(2.0)).collect::<Vec<f32>>(),
            });
        }
        drafter.extend(drafts.concat());
        // Damage, seldom.
        let (end, own) = (drafter.len(), target.len());
        match random.below(24) {
            0 => target[own - 1 - random.below(wide * vocab)] = f32::NAN,
            1 => drafter[end - 1 - random.below(block * vocab)] = f32::INFINITY,
            2 => target[own - wide * vocab..][..vocab].fill(f32::NEG_INFINITY),
            _ => {}
        }
        // Mostly what was drawn; else anything, also what the distribution cannot draw and what no vocabulary has.
        tokens.extend((0..wide).map(|_| match random.below(25) {
            0 => Some(random.below(vocab) as u32),
            1 if random.below(8) == 0 => Some(vocab as u32 + random.below(3) as u32),
            2 if random.below(8) == 0 => Some(NONE),
            _ => None,
        }));
        requests.push(request);
    }
    Batch { kind, vocab, block, wide, requests, target, drafter, tokens }
}

/// Draws and verdicts of that rule's kernels.
pub fn same_under_every_schedule(kind: VerifyMethod) {
    for sizes in [(3, 4, 64), (17, 5, 9), (257, 8, 16), (2047, 4, 8)] {
        let batch = batch(&mut Random::new(sizes.0 as u64), kind, sizes, 5);
        same_bits(|device| {
            let Outcome { drafts, tokens, accepted, next, path, .. } = batch.run(device);
            to_bytes(&[drafts, tokens, accepted, next, path].concat())
        });
        let parallel = Emulator::new();
        parallel.set_threads(2);
        batch.check(&parallel, "two threads");
    }
}
