//! Trees of drafts that are drawn, and the verdicts on them: siblings without replacement, under the rule `rejection`, and
//! several chains, under `block`.

use super::round::{ANCHOR, LENGTH, Logits, NONE, case, sequence};
use super::rules::{Common, at_temperature, dice, of, probabilities};
use super::values::{BenchFixtures, ends, equal, words_of};
use super::{Case, Ready, trees};
use dflash::checkpoint::pair::Pair;
use dflash::gpu::device::{Buffer, Device};
use dflash::gpu::kernels::chains::{CLASSES_BYTES, Chains, Workspace};
use dflash::gpu::kernels::linear::Shape;
use dflash::gpu::kernels::round::{Form, Sequence};
use dflash::gpu::kernels::rules::{DISTRIBUTION_BYTES, Rows, Rules};
use dflash::gpu::kernels::siblings::{Drawn, Siblings};
use dflash::gpu::kernels::verify::Verdict;
use dflash::spec::config::VerifyMethod;
use dflash::spec::distribution::Distribution;
use dflash::spec::sampling::SamplingParams;
use dflash::spec::tree;
use dflash::spec::verify;
use dflash::{Error, Result};
use std::rc::Rc;

/// For trees of each of `rows`: the draws and the verdicts, of siblings and of chains. None without a drafter.
pub fn cases(pair: &Pair, rows: &[usize]) -> Vec<Case> {
    let target = &pair.target.config;
    let blocks = Shape { n: target.vocab, k: target.stack.hidden }.blocks();
    let mut all = vec![];
    for (sequences, wide) in rows.iter().filter_map(|rows| trees::shape(pair, *rows)) {
        let block = trees::levels(pair).unwrap_or(0) + 1;
        let kernels = Siblings { sequences, block, wide, vocab: target.vocab };
        for rule in [VerifyMethod::Rejection, VerifyMethod::Block] {
            all.push(draw(Trees { kernels, blocks, rule }));
            all.push(judge(Trees { kernels, blocks, rule }));
        }
    }
    all
}

/// Trees of one shape, one a sequence.
#[derive(Clone, Copy)]
struct Trees {
    kernels: Siblings,
    /// Of the head.
    blocks: usize,
    rule: VerifyMethod,
}

impl Trees {
    fn name(&self, what: &str) -> String {
        format!("{what} {}", if self.rule == VerifyMethod::Block { "chains" } else { "siblings" })
    }

    /// Chains, and drafts of each.
    fn chains(&self) -> (usize, usize) {
        tree::chains(self.kernels.wide, self.kernels.block - 1)
    }

    /// The row each follows, the anchor's first.
    fn parents(&self) -> Vec<u32> {
        let (count, each) = self.chains();
        let after = |i: usize| if i.is_multiple_of(each) { 0 } else { i as u32 };
        match self.rule {
            VerifyMethod::Block => [0].into_iter().chain((0..count * each).map(after)).collect(),
            _ => tree::shape(self.kernels.wide, self.kernels.block - 1).parents,
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

    /// Rows of logits that the drafts are drawn from.
    fn levels(&self) -> usize {
        self.depths().into_iter().max().unwrap_or(0)
    }

    fn draw_bytes(&self) -> u64 {
        let Siblings { sequences, wide, vocab, .. } = self.kernels;
        (sequences * (self.levels() * (vocab * 4 + DISTRIBUTION_BYTES) + wide * 4)) as u64
    }

    /// Of siblings two rows of logits are looked at, if it ends at the anchor; of chains the classes of all rows with a draft
    /// behind them besides.
    fn judge_bytes(&self) -> u64 {
        let (Siblings { sequences, vocab, .. }, (count, each)) = (self.kernels, self.chains());
        let rows = match self.rule {
            VerifyMethod::Block => 1 + count * (each - 1) + each + 2,
            _ => 2,
        };
        (sequences * rows * vocab * 4) as u64
    }

    fn rows(&self, of_each: usize) -> Rules {
        let Siblings { sequences, vocab, .. } = self.kernels;
        Rules { sequences, block: of_each, vocab, blocks: self.blocks }
    }

    fn drafter(&self) -> SamplingParams {
        at_temperature(0.9)
    }

    /// What the drafts of a sequence are drawn from.
    fn distributions(&self, logits: &Logits, own: usize) -> Result<Vec<Distribution>> {
        let distribution =
            |depth| probabilities(&self.drafter(), &logits.row(own * self.kernels.block + depth));
        (1..=self.levels()).map(distribution).collect()
    }
}

/// Trees that are drawn, on the device.
struct Ground {
    common: Common,
    logits: Logits,
    /// Of the drafter's rows.
    distributions: Buffer,
    states: Buffer,
    tokens: Buffer,
    parents: Buffer,
    spans: Buffer,
}

impl Ground {
    fn new(desk: &BenchFixtures, trees: Trees) -> Result<Ground> {
        let Siblings { sequences, block, wide, vocab } = trees.kernels;
        let common = Common::new(desk, trees.rows(block))?;
        let logits = Logits::new(desk, sequences * block, vocab)?;
        let best = logits.best(trees.blocks);
        let distributions =
            common.distributions(desk, trees.rows(block), &logits.buffer(), &best, &trees.drafter())?;
        let state = |own: usize| {
            let sampling = SamplingParams { stream: own as u32, ..at_temperature(1.0) };
            let Trees { rule, .. } = trees;
            Sequence { rule, rows: wide as u32, form: Form::Drawn, ..sequence(block, sampling) }.to_bytes()
        };
        let states = desk.bytes(&(0..sequences).map(state).collect::<Result<Vec<_>>>()?.concat())?;
        let mut parents = trees.parents();
        let spans = desk.words([LENGTH, parents.len() as u32].repeat(sequences))?;
        parents.resize(wide, 0);
        let parents = desk.words(parents.repeat(sequences))?;
        let tokens = desk.output(sequences * wide * 4)?;
        Ok(Ground { common, logits, distributions, states, tokens, parents, spans })
    }

    fn draw(&self, device: &dyn Device, trees: Trees) -> Result<()> {
        let Ground { common, logits, distributions, states, tokens, parents, spans } = self;
        let (drawn, logits) = (Drawn { tokens, parents, spans }, logits.buffer());
        let drafter = Rows { logits: &logits, distributions };
        match trees.rule {
            VerifyMethod::Block => Chains(trees.kernels).draw(device, drawn, drafter, states, &common.tables),
            _ => trees.kernels.draw(device, drawn, drafter, states, &common.tables),
        }
    }
}

fn draw(trees: Trees) -> Case {
    let Siblings { sequences, wide, .. } = trees.kernels;
    let parameters = of(trees.rows(wide));
    case(&trees.name("draw"), parameters, trees.draw_bytes(), move |desk| {
        let ground = Rc::new(Ground::new(desk, trees)?);
        let drawn = ground.clone();
        let device = desk.device;
        let launch = move |_| drawn.draw(device, trees);
        let check = move || {
            let (found, parents) = (words_of(device, &ground.tokens)?, trees.parents());
            for own in ends(sequences) {
                let (distributions, mut coin) = (trees.distributions(&ground.logits, own)?, dice(own));
                let expected = match trees.rule {
                    VerifyMethod::Block => {
                        let (count, _) = trees.chains();
                        verify::sample_chains(ANCHOR, count, &distributions, &mut coin)
                            .map(|(tokens, _)| tokens)
                    }
                    _ => verify::sample_tree(
                        ANCHOR,
                        &parents,
                        &distributions,
                        verify::Siblings::Distinct,
                        &mut coin,
                    ),
                };
                let got = &found[own * wide..][..parents.len()];
                equal("draft", got, &expected.unwrap_or_default())?;
            }
            Ok(())
        };
        Ok(Ready::new(1, launch, check))
    })
}

/// The target's rows have the logits that the next drafts were drawn from, at another temperature: of one depth the same.
fn judge(trees: Trees) -> Case {
    let Siblings { sequences, block, wide, vocab } = trees.kernels;
    let parameters = of(trees.rows(wide));
    case(&trees.name("judge"), parameters, trees.judge_bytes(), move |desk| {
        let (device, target) = (desk.device, at_temperature(1.0));
        let ground = Rc::new(Ground::new(desk, trees)?);
        ground.draw(device, trees)?;
        let mut depths = trees.depths();
        let parents = trees.parents();
        depths.resize(wide, 0);
        // Of the drafter's rows, the one whose logits row i of all trees has.
        let like = move |i: usize| i / wide * block + (depths[i % wide] + 1) % block;
        let (from, row) = (ground.logits.buffer(), vocab * 4);
        let logits = desk.output(sequences * wide * row)?;
        for i in 0..sequences * wide {
            device.copy(&logits.slice(i * row, row)?, &from.slice(like(i) * row, row)?)?;
        }
        let of_drafter = ground.logits.best(trees.blocks);
        let best: Vec<Vec<u8>> = (0..sequences * wide).map(|i| of_drafter[like(i)].clone()).collect();
        let of_target = Common::new(desk, trees.rows(wide))?;
        let distributions = of_target.distributions(desk, trees.rows(wide), &logits, &best, &target)?;
        let classes = desk.output(sequences * wide * CLASSES_BYTES)?;
        let partial = desk.output(sequences * block * 8)?;
        let counters = desk.words((0..sequences).map(|_| 0))?;
        let [accepted, next] = [(); 2].map(|()| desk.output(sequences * 4));
        let to = [accepted?, next?, desk.output(sequences * wide * 4)?];
        let (written, judged) = (to.clone(), ground.clone());
        let launch = move |_| {
            let [accepted, next, path] = &to;
            let verdict = Verdict { accepted, next, path };
            let Ground { common, states, tokens, parents, spans, .. } = &*judged;
            let (drawn, of_drafter) = (Drawn { tokens, parents, spans }, judged.logits.buffer());
            let target = Rows { logits: &logits, distributions: &distributions };
            let drafter = Rows { logits: &of_drafter, distributions: &judged.distributions };
            if trees.rule == VerifyMethod::Block {
                let work = Workspace { classes: &classes, partial: &partial, counters: &counters };
                let chains = Chains(trees.kernels);
                return chains.judge(device, verdict, drawn, target, drafter, states, &common.tables, work);
            }
            trees.kernels.judge(device, verdict, drawn, target, drafter, states, &common.tables)
        };
        let check = move || {
            let [accepted, next, path] = written.each_ref().map(|buffer| words_of(device, buffer));
            let (accepted, next, path) = (accepted?, next?, path?);
            let tokens = words_of(device, &ground.tokens)?;
            for own in ends(sequences) {
                let (distributions, mut coin) = (trees.distributions(&ground.logits, own)?, dice(own));
                let of_target = |row: usize| target.probabilities(&ground.logits.row(like(own * wide + row)));
                let drafts = &tokens[own * wide..][..parents.len()];
                let verdict = match trees.rule {
                    VerifyMethod::Block => {
                        verify::multi_draft_block_verify(drafts, &distributions, of_target, &mut coin)
                    }
                    _ => {
                        let distinct = verify::Siblings::Distinct;
                        verify::recursive_rejection(
                            drafts,
                            &parents,
                            &distributions,
                            distinct,
                            of_target,
                            &mut coin,
                        )
                    }
                };
                let (way, token) = verdict.ok_or_else(|| Error::Internal("no verdict".into()))?;
                equal("accepted", &accepted[own..=own], &[way.len() as u32 - 1])?;
                equal("next", &next[own..=own], &[token])?;
                let row = |i: usize| way.get(i).map_or(NONE, |row| *row as u32);
                equal("path", &path[own * wide..][..wide], &(0..wide).map(row).collect::<Vec<u32>>())?;
            }
            Ok(())
        };
        Ok(Ready::new(1, launch, check))
    })
}
