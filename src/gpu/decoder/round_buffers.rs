//! The device memory through which the kernels of a round pass results to each other.

use super::models::{Dependence, Models};
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::chain::ChainBuffers;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::kernels::chains::CLASSES_BYTES;
use crate::gpu::kernels::compact::Compact;
use crate::gpu::kernels::rejection::{DISTRIBUTION_BYTES, Rows};
use crate::gpu::kernels::round::Sequence;
use crate::gpu::kernels::sample::{self, Sample, SamplerInputs};
use crate::gpu::kernels::siblings::SampledTrees;
use crate::gpu::markov::WalkBuffers;
use crate::gpu::model::{KvCache, Row};
use crate::gpu::selector::SelectorBuffers;
use crate::spec::tree;
use crate::{Error, Result};

/// Buffers of every round. In the shapes below `draft_rows` = sequences x block and `rows` = sequences x
/// [`BatchConfig::max_verify_rows`].
pub(super) struct RoundBuffers {
    pub states: Buffer,       // [sequences] Sequence
    pub draft_states: Buffer, // [sequences] Sequence: sampling parameters of the drafts
    pub round_header: Buffer, // [3] u32: round number, active sequences, columns of `path`
    pub num_active: Buffer,   // the second word of round_header
    pub draft_tokens: Buffer, // [draft_rows] u32
    pub draft_rows: Buffer,   // [2][draft_rows] Row: pending features, then the block
    pub pending: Buffer,      // [draft_rows] u32: row of `features` of each pending feature
    pub draft_spans: Buffer,  // [sequences] Span
    pub verify_rows: Buffer,  // [rows] Row
    pub verify_spans: Buffer, // [sequences] Span
    pub drafts: Buffer,       // [draft_rows] u32
    pub tokens: Buffer,       // [rows] u32: anchor and drafts
    pub choices: Buffer,      // [rows] u32: the target's token after each row
    pub features: Buffer,     // [rows][taps][hidden] bf16
    pub best: Buffer,         // [rows][blocks of the LM head] u64
    pub logits: Buffer,       // [rows][vocab] f32
    pub draft_logits: Buffer, // [draft_rows][vocab] f32: the drafter's, or the scores of its candidates
    pub tables: Buffer,       // sample::tables
    pub partial: Buffer,      // Sample::workspace
    pub counters: Buffer,     // [rows] u32, of the sampler
    pub accepted: Buffer,     // [sequences] u32: number of accepted drafts
    pub next: Buffer,         // [sequences] u32: the token after the accepted drafts
    pub path: Buffer,         // [rows] u32: accepted rows, anchor first
    pub walk: Option<WalkBuffers>,
    pub selector: Option<SelectorBuffers>,
    pub chain: Option<ChainBuffers>,
    pub lookup: Option<LookupBuffers>,
    pub trees: Option<TreeBuffers>,
    pub verify: Option<VerifyBuffers>,
}

/// Buffers that only drafts without a drafter use.
pub(super) struct LookupBuffers {
    pub history: Buffer, // [sequences][positions] u32: the tokens of each sequence, the anchor last
    pub kept: Buffer,    // [sequences] u32: as in WalkBuffers
}

/// Buffers that only rounds with trees use.
pub(super) struct TreeBuffers {
    pub choices: Buffer, // [draft_rows][tree_choices] (token, cost) u32
    pub counts: Buffer,  // [draft_rows] u32
    pub typical: Buffer, // [tree_choices] u32: tree::typical_cost of each place among siblings
    pub parents: Buffer, // [rows] u32
    pub masks: Buffer,   // [rows] u64
    pub caches: Buffer,  // [layers][2] u64: addresses of the target's keys and values
}

/// Buffers that only the verification methods `rejection` and `block` use.
pub(super) struct VerifyBuffers {
    pub logits: Buffer,   // [draft_rows][vocab] f32: the drafter's
    pub drafter: Buffer,  // [draft_rows] of DISTRIBUTION_BYTES
    pub target: Buffer,   // [rows] of DISTRIBUTION_BYTES
    pub partial: Buffer,  // [draft_rows] u64
    pub counters: Buffer, // [sequences] u32
    pub classes: Buffer,  // [rows] of CLASSES_BYTES; only with trees
}

impl RoundBuffers {
    /// Allocates the buffers. `cache` is the target's.
    pub fn new(
        device: &dyn Device,
        models: &Models,
        config: BatchConfig,
        cache: &KvCache,
    ) -> Result<RoundBuffers> {
        let BatchConfig { sequences, block, .. } = config;
        let (hidden, taps) = (models.target.config.hidden, models.taps().len());
        let (vocab, blocks) = (models.vocabulary.vocab, models.vocabulary.shape().blocks());
        let (draft_rows, rows) = (sequences * block, sequences * config.max_verify_rows());
        let zeros = |bytes: usize, what| {
            let buffer = device.allocate(bytes.max(16), what)?;
            device.fill(&buffer, 0)?;
            Ok::<_, Error>(buffer)
        };
        let get = |bytes: usize| device.allocate(bytes.max(16), "a round's tables");
        let round_header = zeros(12, "the round's number")?;
        // A sequence that is admitted before the first round finds its path in rows of one column.
        device.upload(&round_header.slice(8, 4)?, &1u32.to_le_bytes())?;
        let tables = get(sample::tables().len())?;
        device.upload(&tables, &sample::tables())?;
        device.seal(&tables);
        let trees = (config.tree > 0).then(|| TreeBuffers::new(device, models, config, cache));
        let logits = device.allocate(rows * vocab * 4, "logits")?;
        // `rejection` and `block` read the drafter's logits after the target's pass. A reduced vocabulary needs
        // -inf at the ids that its head does not write, a selector at all but its candidates. Otherwise both
        // models use the same buffer.
        let dependence = models.drafter().map(|drafter| &drafter.dependence).filter(|_| block > 1);
        let reduced = block > 1
            && (models.draft_head().is_reduced() || matches!(dependence, Some(Dependence::Select(_))));
        let certain = models.draft.lookup().is_some();
        let draft_logits = match (config.draft_probs && !certain) || reduced {
            true => device.allocate(draft_rows * vocab * 4, "the drafter's logits")?,
            false => logits.clone(),
        };
        if reduced {
            fill_with(device, &draft_logits, &f32::NEG_INFINITY.to_le_bytes().repeat(vocab.min(4096)))?;
        }
        if certain && config.draft_probs {
            // The kernels read the logits of drafts that are certain, but the values do not matter.
            device.fill(&logits, 0)?;
        }
        let verify = config.draft_probs.then(|| {
            Ok::<_, Error>(VerifyBuffers {
                logits: draft_logits.clone(),
                // Below the last depth a tree's verification reads row 0, which a walk never writes.
                drafter: zeros(draft_rows * DISTRIBUTION_BYTES, "distributions of drafts")?,
                target: get(rows * DISTRIBUTION_BYTES)?,
                partial: get(draft_rows * 8)?,
                counters: zeros(sequences * 4, "counters of verification")?,
                classes: get(if config.tree > 0 { rows * CLASSES_BYTES } else { 0 })?,
            })
        });
        let (mut walk, mut selector, mut chain) = (None, None, None);
        match dependence {
            None | Some(Dependence::Independent) => {}
            Some(Dependence::Walk(head)) => {
                walk = Some(head.buffers(device, models.draft_head(), sequences, block)?);
            }
            Some(Dependence::Chain(own)) => chain = Some(own.buffers(device, sequences, block)?),
            Some(Dependence::Select(own)) => selector = Some(own.buffers(device, sequences, block)?),
        }
        let lookup = models.draft.lookup().filter(|_| block > 1).map(|_| {
            let history = device.allocate(sequences * config.positions * 4, "the tokens of sequences")?;
            Ok::<_, Error>(LookupBuffers { history, kept: get(sequences * 4)? })
        });
        let (best, tokens) = (device.allocate(rows * blocks * 8, "the best logits")?, get(rows * 4)?);
        if chain.is_some() {
            // The sampler reads row 0 of a block, which a chain never writes. A synthetic context has no tokens.
            device.fill(&best, 0)?;
            device.fill(&tokens, 0)?;
        }
        let sample = Sample { rows, vocab, blocks, reduced: false, sequences };
        Ok(RoundBuffers {
            states: zeros(sequences * Sequence::BYTES, "the state of sequences")?,
            draft_states: zeros(sequences * Sequence::BYTES, "the settings of drafts")?,
            num_active: round_header.slice(4, 4)?,
            round_header,
            draft_tokens: get(draft_rows * 4)?,
            draft_rows: get(2 * draft_rows * Row::BYTES)?,
            pending: get(draft_rows * 4)?,
            draft_spans: get(sequences * 8)?,
            verify_rows: get(rows * Row::BYTES)?,
            verify_spans: get(sequences * 8)?,
            drafts: zeros(draft_rows * 4, "drafts")?,
            tokens,
            choices: get(rows * 4)?,
            features: zeros(rows * taps * hidden * 2, "features")?,
            best,
            logits,
            draft_logits,
            tables,
            partial: device.allocate(sample.workspace(), "partial results of sampling")?,
            counters: zeros(rows * 4, "counters of sampling")?,
            accepted: get(sequences * 4)?,
            next: get(sequences * 4)?,
            path: zeros(rows * 4, "paths")?,
            walk,
            selector,
            chain,
            lookup: lookup.transpose()?,
            trees: trees.transpose()?,
            verify: verify.transpose()?,
        })
    }

    /// The rows of each block that are verified at most, in a round that `drafts`; `None`: all.
    pub fn kept(&self, drafts: bool) -> Option<&Buffer> {
        let lookup = self.lookup.as_ref().map(|lookup| &lookup.kept);
        self.walk.as_ref().and_then(|walk| walk.kept.as_ref()).or(lookup).filter(|_| drafts)
    }

    /// The sampler's inputs and scratch memory for the target's tokens.
    pub fn sampler_inputs(&self) -> SamplerInputs<'_> {
        SamplerInputs {
            logits: &self.logits,
            sequences: &self.states,
            tables: &self.tables,
            partial: &self.partial,
            counters: &self.counters,
        }
    }
}

impl TreeBuffers {
    fn new(
        device: &dyn Device,
        models: &Models,
        config: BatchConfig,
        cache: &KvCache,
    ) -> Result<TreeBuffers> {
        let (sequences, choices) = (config.sequences, tree_choices(config));
        let (draft_rows, rows) = (sequences * config.block, sequences * config.max_verify_rows());
        let get = |bytes: usize| device.allocate(bytes.max(16), "a round's tables");
        let compact = compact(models, cache, sequences, config.max_verify_rows());
        let addresses = compact.cache_addresses(&cache.keys, &cache.values)?;
        let caches = get(addresses.len())?;
        device.upload(&caches.slice(0, addresses.len())?, &addresses)?;
        let costs: Vec<u8> = (0..choices as u32).flat_map(|i| tree::typical_cost(i).to_le_bytes()).collect();
        let typical = get(costs.len())?;
        device.upload(&typical.slice(0, costs.len())?, &costs)?;
        Ok(TreeBuffers {
            choices: device.allocate(draft_rows * choices * 8, "the drafter's choices")?,
            counts: get(draft_rows * 4)?,
            typical,
            parents: get(rows * 4)?,
            masks: get(rows * 8)?,
            caches,
        })
    }

    /// The trees whose tokens are sampled.
    pub fn sampled<'a>(&'a self, buffers: &'a RoundBuffers) -> SampledTrees<'a> {
        SampledTrees { tokens: &buffers.tokens, parents: &self.parents, spans: &buffers.verify_spans }
    }
}

impl VerifyBuffers {
    /// The drafter's logits and distributions for the rows of its blocks.
    pub fn drafter(&self) -> Rows<'_> {
        Rows { logits: &self.logits, distributions: &self.drafter }
    }
}

/// Fills a buffer with repetitions of `bytes`: uploads them once, then each copy on the device doubles the
/// filled part.
pub(super) fn fill_with(device: &dyn Device, to: &Buffer, bytes: &[u8]) -> Result<()> {
    let mut done = to.bytes().min(bytes.len());
    device.upload(&to.slice(0, done)?, &bytes[..done])?;
    while done < to.bytes() {
        let more = done.min(to.bytes() - done);
        device.copy(&to.slice(done, more)?, &to.slice(0, more)?)?;
        done += more;
    }
    Ok(())
}

/// Maximum choices per drafter row that a tree can use: its number of drafts.
pub(super) fn tree_choices(config: BatchConfig) -> usize {
    config.tree.saturating_sub(1).max(1)
}

/// The launcher that compacts the target's cache after the verification of `sequences` trees of `rows` rows.
pub(super) fn compact(models: &Models, cache: &KvCache, sequences: usize, rows: usize) -> Compact {
    let c = &models.target.config;
    let KvCache { pages, sequence_pages, .. } = *cache;
    let (layers, kv_heads, head_dim) = (cache.keys.len(), c.kv_heads, c.head_dim);
    Compact { sequences, rows, layers, kv_heads, head_dim, pages, sequence_pages }
}
