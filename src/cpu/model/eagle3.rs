//! EAGLE-3 drafters (arXiv 2503.01840): one causal layer over pairs, each the feature of a position and the
//! token after it. The pair of position `i` is at position `i` of the cache and predicts position `i + 2`.

use super::{Cache, Dependence, Drafter, LayerCache, Target, embed};
use crate::Result;
use crate::checkpoint::eagle3::Chain;
use crate::checkpoint::safetensors::Checkpoint;
use crate::cpu::layer::{Beam, Mixer, Span};
use crate::cpu::ops;
use crate::spec::tree::{self, Choice, Tree};

/// The flags of a chain, and the norms of a position's taps before `fc`.
pub(super) struct ChainNorms {
    plan: Chain,
    all: Option<Vec<f32>>, // [taps * hidden]
    each: Vec<Vec<f32>>,   // [taps][hidden]; empty without
}

impl ChainNorms {
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub(super) fn load(file: &Checkpoint, plan: Chain, hidden: usize, taps: usize) -> Result<ChainNorms> {
        let vector = |name: &str, len| Ok(ops::to_f32(&file.tensor(name, &[len])?));
        Ok(ChainNorms {
            plan,
            all: match plan.norm_before_fc {
                true => Some(vector("input_norm.weight", taps * hidden)?),
                false => None,
            },
            each: (0..if plan.norm_taps { taps } else { 0 })
                .map(|tap| vector(&format!("fc_norm.{tap}.weight"), hidden))
                .collect::<Result<_>>()?,
        })
    }
}

/// The chain of a round: drafts are predicted one after the other.
pub struct ChainDraft<'a> {
    drafter: &'a Drafter,
    plan: Chain,
    target: &'a Target,
    cache: &'a mut Cache,
    feature: Vec<f32>, // [hidden]: of the next pair
}

/// A draft that a tree may have.
struct Candidate {
    choice: Choice, // with the cost of the whole path
    parent: Option<usize>,
}

impl ChainDraft<'_> {
    /// The best candidates of a row of a beam search, as EAGLE's.
    const WIDTH: usize = 10;

    /// Positions that a tree needs in the cache beyond those of its longest path.
    pub const TREE_ROOM: usize = Beam::LEVELS + Beam::LEVELS * Self::WIDTH;

    /// Runs the pair of the last feature and the token `previous` after it. Writes the logits of the next
    /// draft, `[vocab]`, to `logits`.
    pub fn step(&mut self, previous: u32, logits: &mut Vec<f32>) {
        let span = Span::chain(self.cache.len);
        let feature = std::mem::take(&mut self.feature);
        let normed;
        (self.feature, normed) = self.run_pairs(&feature, &[previous], span);
        self.cache.len += 1;
        self.drafter.logits(self.target, &normed, logits);
    }

    /// The dynamic tree of EAGLE-2 (arXiv 2406.16858, section 4) with up to `rows` rows and `depth` drafts on
    /// a path: a beam search with the `width` most probable paths of each level, of whose candidates the most
    /// probable ones are kept. Rows are in the order of their costs, parents before children. The cache must
    /// have [`ChainDraft::TREE_ROOM`] more positions. `rows` is at least 2, `depth` at least 1. `None` if logits
    /// are not finite.
    pub fn tree(mut self, anchor: u32, rows: usize, depth: usize, width: Option<usize>) -> Option<Tree> {
        let width = width.unwrap_or(Self::WIDTH.min(rows - 1)).clamp(1, Self::WIDTH);
        let (vocab, hidden) = (self.target.config.vocab, self.drafter.config.stack.hidden);
        let mut logits = Vec::new();
        self.step(anchor, &mut logits);
        let mut all: Vec<Candidate> = tree::choices(&logits, width)?
            .into_iter()
            .map(|choice| Candidate { choice, parent: None })
            .collect();
        // The candidates that the rows of the next level follow, with the slots of their ancestors.
        let mut beam: Vec<(usize, Vec<usize>)> = (0..all.len()).map(|i| (i, vec![])).collect();
        let mut features = self.feature.repeat(beam.len());
        let (at, mut first) = (self.cache.len, 0);
        for level in 0..(depth - 1).min(Beam::LEVELS - 1) {
            let tokens: Vec<u32> = beam.iter().map(|(i, _)| all[*i].choice.token).collect();
            let paths = beam.iter().map(|(_, path)| path.clone()).collect();
            let rows = Beam { depth: level, paths, first };
            let span = Span { beam: Some(&rows), ..Span::chain(at) };
            let (outputs, normed) = self.run_pairs(&features, &tokens, span);
            self.drafter.logits(self.target, &normed, &mut logits);
            let start = all.len();
            let mut rows_of = Vec::new();
            for (row, logits) in logits.chunks(vocab).enumerate() {
                let parent = beam[row].0;
                for Choice { token, cost } in tree::choices(logits, width)? {
                    let choice = Choice { token, cost: all[parent].choice.cost + cost };
                    all.push(Candidate { choice, parent: Some(parent) });
                    rows_of.push(row);
                }
            }
            let mut next: Vec<usize> = (start..all.len()).collect();
            next.sort_by_key(|i| (all[*i].choice.cost, *i));
            next.truncate(width);
            let row_of = |i: usize| rows_of[i - start];
            features = next.iter().flat_map(|i| &outputs[row_of(*i) * hidden..][..hidden]).copied().collect();
            let path = |i: usize| [&beam[row_of(i)].1[..], &[first + row_of(i)]].concat();
            (first, beam) = (first + beam.len(), next.into_iter().map(|i| (i, path(i))).collect());
        }
        let mut best: Vec<usize> = (0..all.len()).collect();
        // A path costs at least as much as its beginning, which is earlier in the list.
        best.sort_by_key(|i| (all[*i].choice.cost, *i));
        let (mut tree, mut row_of) = (Tree::new(anchor), vec![0; all.len()]);
        for i in best.into_iter().take(rows - 1) {
            let Candidate { choice, parent } = all[i];
            row_of[i] = tree.push(parent.map_or(0, |parent| row_of[parent]), choice.token, choice.cost);
        }
        Some(tree)
    }

    /// Runs pairs of features `[rows][hidden]` and tokens where `span` says. Returns the features of the next
    /// pairs and the rows for the head, both `[rows][hidden]`.
    fn run_pairs(&mut self, features: &[f32], tokens: &[u32], span: Span) -> (Vec<f32>, Vec<f32>) {
        let (drafter, s) = (self.drafter, &self.drafter.config.stack);
        let (y, normed) = drafter.join(self.target, features, tokens);
        let mut x = if self.plan.norm_before_residual { normed } else { features.to_vec() };
        self.cache.scratch.y = y;
        self.cache.extend_rope(span.at + span.beam.map_or(tokens.len(), |beam| beam.depth + 1));
        drafter.layers[0].forward_normed(s, self.cache, 0, span, &mut x, &mut |_, _| ());
        let mut last = Vec::new();
        ops::rms_norm(&x, &drafter.norm, s.eps, &mut last);
        (if self.plan.norm_output { last.clone() } else { x }, last)
    }
}

impl Drafter {
    /// Adds the features `[rows][taps * hidden]` of positions `cache.len()..` to the drafter's context, and
    /// removes from `features` those that were added. `tokens` are those of positions 0 up to the last
    /// feature's. A chain's last feature waits for the token after it.
    pub fn absorb(&self, target: &Target, tokens: &[u32], features: &mut Vec<f32>, cache: &mut Cache) {
        let Dependence::Chain(chain) = &self.dependence else {
            self.inject(features, cache);
            features.clear();
            return;
        };
        let next = tokens.get(cache.len + 1..).unwrap_or_default();
        let pairs = (features.len() / self.feature_len()).min(next.len());
        if pairs == 0 {
            return;
        }
        let taken: Vec<f32> = features.drain(..pairs * self.feature_len()).collect();
        let projected = self.project(chain, &taken);
        let y = self.join(target, &projected, &next[..pairs]).0;
        let at = cache.len;
        cache.extend_rope(at + pairs);
        let Cache { layers, rope, scratch, .. } = &mut *cache;
        if let (Mixer::Attention(attention), LayerCache::Kv(kv)) = (&self.layers[0].mixer, &mut layers[0]) {
            ops::linear(&y, pairs, [(&attention.k, &mut scratch.k), (&attention.v, &mut scratch.v)]);
            attention.write_kv(&self.config.stack, kv, rope, Span::chain(at), scratch);
        }
        cache.len = at + pairs;
    }

    /// The chain of a round whose anchor is the token after `feature` `[taps * hidden]`, the only one that
    /// [`Drafter::absorb`] left; `None` if the drafter drafts blocks. The chain's pairs stay in the cache. Of
    /// these, only the first holds for the next round.
    pub fn chain<'a>(
        &'a self,
        target: &'a Target,
        feature: &[f32],
        cache: &'a mut Cache,
    ) -> Option<ChainDraft<'a>> {
        let Dependence::Chain(chain) = &self.dependence else { return None };
        let feature = self.project(chain, feature);
        Some(ChainDraft { drafter: self, plan: chain.plan, target, cache, feature })
    }

    /// The features `[rows][hidden]` of pairs, from the taps `[rows][taps * hidden]`.
    fn project(&self, norms: &ChainNorms, taps: &[f32]) -> Vec<f32> {
        let (s, mut taps) = (&self.config.stack, taps.to_vec());
        if let Some(all) = &norms.all {
            ops::rms_norm_in_place(&mut taps, all, s.eps);
        }
        for (tap, x) in taps.chunks_mut(s.hidden).enumerate().filter(|_| !norms.each.is_empty()) {
            ops::rms_norm_in_place(x, &norms.each[tap % norms.each.len()], s.eps);
        }
        let mut projected = Vec::new();
        ops::linear(&taps, taps.len() / self.fc.cols, [(&self.fc, &mut projected)]);
        projected
    }

    /// The layer's input for pairs of features `[rows][hidden]` and tokens: the normed embedding of the
    /// token, then the normed feature, `[rows][2 * hidden]`. Also returns the normed features.
    fn join(&self, target: &Target, features: &[f32], tokens: &[u32]) -> (Vec<f32>, Vec<f32>) {
        let s = &self.config.stack;
        let table = self.embedding.as_ref().unwrap_or(&target.embedding);
        let mut embedded = embed(table, tokens, self.config.embedding_scale);
        ops::rms_norm_in_place(&mut embedded, &self.layers[0].input_norm, s.eps);
        let mut normed = Vec::new();
        ops::rms_norm(features, &self.hidden_norm, s.eps, &mut normed);
        let rows = embedded.chunks(s.hidden).zip(normed.chunks(s.hidden));
        (rows.flat_map(|(token, feature)| [token, feature].concat()).collect(), normed)
    }
}
