//! EAGLE-3 drafters (arXiv 2503.01840): one causal layer over pairs, each the feature of a position and the token
//! after it. The pair of position `i` is at position `i` of the cache and predicts position `i + 2`.

use super::{Cache, Drafter, LayerCache, Target, embed};
use crate::Result;
use crate::checkpoint::eagle3::Chain;
use crate::checkpoint::safetensors::Checkpoint;
use crate::cpu::layer::{Mixer, Span};
use crate::cpu::ops;

/// The norms of a position's taps before `fc`.
pub(super) struct ChainNorms {
    all: Option<Vec<f32>>, // [taps * hidden]
    each: Vec<Vec<f32>>,   // [taps][hidden]; empty without
}

impl ChainNorms {
    /// # Errors
    /// As [`Checkpoint::tensor`].
    pub(super) fn load(file: &Checkpoint, plan: Chain, hidden: usize, taps: usize) -> Result<ChainNorms> {
        let vector = |name: &str, len| Ok(ops::to_f32(&file.tensor(name, &[len])?));
        Ok(ChainNorms {
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
    target: &'a Target,
    cache: &'a mut Cache,
    feature: Vec<f32>, // [hidden]: of the next pair
}

impl ChainDraft<'_> {
    /// Runs the pair of the last feature and the token `previous` after it. Writes the logits of the next draft,
    /// `[vocab]`, to `logits`.
    pub fn step(&mut self, previous: u32, logits: &mut Vec<f32>) {
        let normed;
        (self.feature, normed) = self.drafter.run_pair(self.target, &self.feature, previous, self.cache);
        self.drafter.logits(self.target, &normed, logits);
    }
}

impl Drafter {
    /// Adds the features `[rows][taps * hidden]` of positions `cache.len()..` to the drafter's context, and
    /// removes from `features` those that were added. `tokens` are those of positions 0 up to the last feature's. A
    /// chain's last feature waits for the token after it.
    pub fn absorb(&self, target: &Target, tokens: &[u32], features: &mut Vec<f32>, cache: &mut Cache) {
        let Some(chain) = &self.chain else {
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
            attention.write_kv(&self.config.stack, kv, rope, Span { at, tree: None }, scratch);
        }
        cache.len = at + pairs;
    }

    /// The chain of a round whose anchor is the token after `feature` `[taps * hidden]`, the only one that
    /// [`Drafter::absorb`] left; `None` if the drafter drafts blocks. The chain's pairs stay in the cache. Of these,
    /// only the first holds for the next round.
    pub fn chain<'a>(
        &'a self,
        target: &'a Target,
        feature: &[f32],
        cache: &'a mut Cache,
    ) -> Option<ChainDraft<'a>> {
        let chain = self.chain.as_ref()?;
        Some(ChainDraft { drafter: self, target, feature: self.project(chain, feature), cache })
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

    /// The layer's input for pairs of features `[rows][hidden]` and tokens: the normed embedding of the token, then
    /// the normed feature, `[rows][2 * hidden]`. Also returns the normed features.
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

    /// Runs one pair at position `cache.len()`. Returns the feature of the next pair and the row for the head, both
    /// `[hidden]`.
    fn run_pair(
        &self,
        target: &Target,
        feature: &[f32],
        token: u32,
        cache: &mut Cache,
    ) -> (Vec<f32>, Vec<f32>) {
        let (s, at) = (&self.config.stack, cache.len);
        let plan = self.config.chain.as_ref();
        let (y, normed) = self.join(target, feature, &[token]);
        let normed_residual = plan.is_some_and(|plan| plan.norm_before_residual);
        let mut x = if normed_residual { normed } else { feature.to_vec() };
        cache.scratch.y = y;
        cache.extend_rope(at + 1);
        self.layers[0].forward_normed(s, cache, 0, Span { at, tree: None }, &mut x, &mut |_, _| ());
        cache.len = at + 1;
        let mut last = Vec::new();
        ops::rms_norm(&x, &self.norm, s.eps, &mut last);
        (if plan.is_some_and(|plan| plan.norm_output) { last.clone() } else { x }, last)
    }
}
