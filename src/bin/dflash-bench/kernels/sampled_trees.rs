//! Trees of sampled drafts and their verification: siblings sampled without replacement, by the method
//! `rejection`, and several chains, by `block`.

use super::rejection::{Common, distribution_of, parameters, random_stream, states};
use super::round::{ANCHOR, LENGTH, Logits, Outcome, at_temperature, case};
use super::values::{BenchFixtures, ends, equal, words_of};
use super::{Case, Ready, trees};
use dflash::Result;
use dflash::checkpoint::pair::Pair;
use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::chains::{CLASSES_BYTES, Chains, Workspace};
use dflash::gpu::kernels::linear::Shape;
use dflash::gpu::kernels::rejection::{DISTRIBUTION_BYTES, RejectionSampler, Rows};
use dflash::gpu::kernels::round::DraftShape;
use dflash::gpu::kernels::siblings::{SampledTrees, Siblings};
use dflash::spec::config::VerifyMethod;
use dflash::spec::distribution::Distribution;
use dflash::spec::sampling::SamplingParams;
use dflash::spec::tree;
use dflash::spec::verify;
use std::rc::Rc;

/// For trees of each of `rows`: sampling and verification of siblings and of chains. None without a drafter.
pub fn cases(pair: &Pair, rows: &[usize]) -> Vec<Case> {
    let target = &pair.target.config;
    let blocks = Shape { n: target.vocab, k: target.stack.hidden }.blocks();
    let mut all = vec![];
    for (sequences, max_verify_rows) in rows.iter().filter_map(|rows| trees::shape(pair, *rows)) {
        let block = trees::levels(pair).unwrap_or(0) + 1;
        let kernels = Siblings { sequences, block, max_verify_rows, vocab: target.vocab };
        for method in [VerifyMethod::Rejection, VerifyMethod::Block] {
            all.push(sample(Trees { kernels, blocks, method }));
            all.push(verify(Trees { kernels, blocks, method }));
        }
    }
    all
}

/// Trees of one shape, one per sequence.
#[derive(Clone, Copy)]
struct Trees {
    kernels: Siblings,
    /// Blocks of ids of the LM head.
    blocks: usize,
    method: VerifyMethod,
}

impl Trees {
    /// Number of chains, and drafts in each.
    fn chains(&self) -> (usize, usize) {
        tree::chains(self.kernels.max_verify_rows, self.kernels.block - 1)
    }

    /// The row that each row follows, the anchor's first.
    fn parents(&self) -> Vec<u32> {
        let (count, each) = self.chains();
        let parent = |i: usize| if i.is_multiple_of(each) { 0 } else { i as u32 };
        match self.method {
            VerifyMethod::Block => [0].into_iter().chain((0..count * each).map(parent)).collect(),
            _ => tree::shape(self.kernels.max_verify_rows, self.kernels.block - 1).parents,
        }
    }

    /// Drafts before each row.
    fn depths(&self) -> Vec<usize> {
        let mut depths = vec![0];
        for parent in &self.parents()[1..] {
            depths.push(depths[*parent as usize] + 1);
        }
        depths
    }

    /// Number of rows of logits that the drafts are sampled from.
    fn levels(&self) -> usize {
        self.depths().into_iter().max().unwrap_or(0)
    }

    fn sample_bytes(&self) -> u64 {
        let Siblings { sequences, max_verify_rows, vocab, .. } = self.kernels;
        (sequences * (self.levels() * (vocab * 4 + DISTRIBUTION_BYTES) + max_verify_rows * 4)) as u64
    }

    /// Siblings: two rows of logits, if verification ends at the anchor. Chains: the classes of all rows with
    /// a draft after them, the drafter's rows, and two rows to pick the next token from.
    fn verify_bytes(&self) -> u64 {
        let (Siblings { sequences, vocab, .. }, (count, each)) = (self.kernels, self.chains());
        let rows = match self.method {
            VerifyMethod::Block => 1 + count * (each - 1) + each + 2,
            _ => 2,
        };
        (sequences * rows * vocab * 4) as u64
    }

    /// The kernels for `rows` rows of each sequence.
    fn rows(&self, rows: usize) -> RejectionSampler {
        let Siblings { sequences, vocab, .. } = self.kernels;
        RejectionSampler { sequences, block: rows, vocab, blocks: self.blocks, reduced: false }
    }

    fn drafter(&self) -> SamplingParams {
        at_temperature(0.9)
    }

    /// The distributions that the drafts of a sequence are sampled from, by depth.
    fn distributions(&self, logits: &Logits, own: usize) -> Result<Vec<Distribution>> {
        let row = |depth: usize| logits.row(own * self.kernels.block + depth);
        (1..=self.levels()).map(|depth| distribution_of(&self.drafter(), &row(depth))).collect()
    }
}

/// Trees on the device, and what they are sampled from.
struct Sampled {
    common: Common,
    logits: Logits,
    /// Of the drafter's rows.
    distributions: Buffer,
    states: Buffer,
    tokens: Buffer,
    parents: Buffer,
    spans: Buffer,
}

impl Sampled {
    fn new(fixtures: &BenchFixtures, trees: Trees) -> Result<Sampled> {
        let Siblings { sequences, block, max_verify_rows: rows, vocab } = trees.kernels;
        let (kernels, form) = (trees.rows(block), (DraftShape::SampledTree, rows));
        let common = Common::new(fixtures, kernels)?;
        let logits = Logits::new(fixtures, sequences * block, vocab)?;
        let best = logits.best(trees.blocks);
        let distributions =
            common.distributions(fixtures, kernels, &logits.buffer(), &best, &trees.drafter())?;
        let states = states(sequences, block, &at_temperature(1.0), trees.method, form)?;
        let mut parents = trees.parents();
        let spans = fixtures.words([LENGTH, parents.len() as u32].repeat(sequences))?;
        parents.resize(rows, 0);
        let parents = fixtures.words(parents.repeat(sequences))?;
        let tokens = fixtures.output(sequences * rows * 4)?;
        let states = fixtures.bytes(&states)?;
        Ok(Sampled { common, logits, distributions, states, tokens, parents, spans })
    }

    fn trees(&self) -> SampledTrees<'_> {
        SampledTrees { tokens: &self.tokens, parents: &self.parents, spans: &self.spans }
    }

    fn sample(&self, device: &dyn Device, trees: Trees) -> Result<()> {
        let (kernels, logits, tables) = (trees.kernels, self.logits.buffer(), &self.common.tables);
        let drafter = Rows { logits: &logits, distributions: &self.distributions };
        match trees.method {
            VerifyMethod::Block => {
                Chains(kernels).sample(device, self.trees(), drafter, &self.states, tables)
            }
            _ => kernels.sample(device, self.trees(), drafter, &self.states, tables),
        }
    }
}

fn sample(trees: Trees) -> Case {
    let Siblings { sequences, max_verify_rows: rows, .. } = trees.kernels;
    let name = if trees.method == VerifyMethod::Block { "sample_chains" } else { "sample_siblings" };
    case(name, parameters(trees.rows(rows)), trees.sample_bytes(), move |fixtures| {
        let sampled = Rc::new(Sampled::new(fixtures, trees)?);
        let (device, own_sampled) = (fixtures.device, sampled.clone());
        let launch = move |_| own_sampled.sample(device, trees);
        let check = move || {
            let (found, parents) = (words_of(device, &sampled.tokens)?, trees.parents());
            for own in ends(sequences) {
                let distributions = trees.distributions(&sampled.logits, own)?;
                let (mut random, distinct) = (random_stream(own), verify::Siblings::Distinct);
                let expected = match trees.method {
                    VerifyMethod::Block => {
                        let (count, _) = trees.chains();
                        verify::sample_chains(ANCHOR, count, &distributions, &mut random).map(|drawn| drawn.0)
                    }
                    _ => verify::sample_tree(ANCHOR, &parents, &distributions, distinct, &mut random),
                };
                let got = &found[own * rows..][..parents.len()];
                equal("draft", got, &expected.unwrap_or_default())?;
            }
            Ok(())
        };
        Ok(Ready::new(1, launch, check))
    })
}

/// The target's rows have the logits that the next drafts were sampled from, at another temperature; rows of
/// one depth have the same logits.
fn verify(trees: Trees) -> Case {
    let Siblings { sequences, block, max_verify_rows: rows, vocab } = trees.kernels;
    let name = if trees.method == VerifyMethod::Block { "verify_chains" } else { "verify_tree" };
    case(name, parameters(trees.rows(rows)), trees.verify_bytes(), move |fixtures| {
        let (device, target) = (fixtures.device, at_temperature(1.0));
        let sampled = Rc::new(Sampled::new(fixtures, trees)?);
        sampled.sample(device, trees)?;
        let mut depths = trees.depths();
        let parents = trees.parents();
        depths.resize(rows, 0);
        // The drafter's row whose logits row i of all trees has.
        let drafter_row = move |i: usize| i / rows * block + (depths[i % rows] + 1) % block;
        let (from, bytes) = (sampled.logits.buffer(), vocab * 4);
        let logits = fixtures.output(sequences * rows * bytes)?;
        for i in 0..sequences * rows {
            device.copy(&logits.slice(i * bytes, bytes)?, &from.slice(drafter_row(i) * bytes, bytes)?)?;
        }
        let drafter_best = sampled.logits.best(trees.blocks);
        let best: Vec<Vec<u8>> =
            (0..sequences * rows).map(|i| drafter_best[drafter_row(i)].clone()).collect();
        let common = Common::new(fixtures, trees.rows(rows))?;
        let distributions = common.distributions(fixtures, trees.rows(rows), &logits, &best, &target)?;
        let classes = fixtures.output(sequences * rows * CLASSES_BYTES)?;
        let partial = fixtures.output(sequences * block * 8)?;
        let counters = fixtures.zeros(sequences)?;
        let outcome = Outcome::new(fixtures, sequences, rows)?;
        let (written, own_sampled) = (outcome.clone(), sampled.clone());
        let launch = move |_| {
            let Sampled { common, states, distributions: draft_rows, .. } = &*own_sampled;
            let (trees_on_device, draft_logits) = (own_sampled.trees(), own_sampled.logits.buffer());
            let (output, tables) = (outcome.buffers(), &common.tables);
            let target = Rows { logits: &logits, distributions: &distributions };
            let drafter = Rows { logits: &draft_logits, distributions: draft_rows };
            match trees.method {
                VerifyMethod::Block => {
                    let work = Workspace { classes: &classes, partial: &partial, counters: &counters };
                    let chains = Chains(trees.kernels);
                    chains.verify(device, output, trees_on_device, target, drafter, states, tables, work)
                }
                _ => trees.kernels.verify(device, output, trees_on_device, target, drafter, states, tables),
            }
        };
        let check = move || {
            let tokens = words_of(device, &sampled.tokens)?;
            let expected = |own: usize| {
                let distributions = trees.distributions(&sampled.logits, own)?;
                let (mut random, distinct) = (random_stream(own), verify::Siblings::Distinct);
                let logits = |row: usize| sampled.logits.row(drafter_row(own * rows + row));
                let target_at = |row: usize| target.probabilities(&logits(row));
                let drafts = &tokens[own * rows..][..parents.len()];
                Ok(match trees.method {
                    VerifyMethod::Block => {
                        verify::multi_draft_block_verify(drafts, &distributions, target_at, &mut random)
                    }
                    _ => verify::recursive_rejection(
                        drafts,
                        &parents,
                        &distributions,
                        distinct,
                        target_at,
                        &mut random,
                    ),
                })
            };
            written.check(device, ends(sequences), expected)
        };
        Ok(Ready::new(1, launch, check))
    })
}
