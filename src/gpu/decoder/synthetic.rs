//! Synthetic batches for measurements that depend on shapes and not on text. The context of the sequences is
//! noise, so no prompt has to run. Rounds can be replayed from the same state any number of times.

use super::round_buffers::fill_with;
use super::{Batch, DrafterMode, Phase, RoundShape};
use crate::checkpoint::random_weights::random_bytes;
use crate::engine::generate::{Decoder, Request};
use crate::gpu::device::{Buffer, Graph};
use crate::gpu::kernels::PAGE;
use crate::gpu::kernels::delta_net::StateHeader;
use crate::gpu::kernels::round::Sequence;
use crate::{Error, Result};

/// Bytes of noise; longer buffers repeat them.
const NOISE: usize = 1 << 20;

impl<'a> Batch<'a> {
    /// Admits a request whose prompt has `context` tokens (0 is allowed, but not with drafts of a chain, whose first
    /// pair has the position before the anchor) and does not run it. The keys and
    /// values of these positions are noise, the same in every layer. Zeros would not do, because a GPU
    /// processes them at higher clocks.
    ///
    /// The features of the last `block` positions are noise too, and pending, as after a round that accepted
    /// all its drafts. Rounds continue from there as from any other state. The prompt in `request` is
    /// ignored, and the slot's next sequence reuses nothing.
    ///
    /// # Errors
    /// [`Error::Memory`] if there are too few pages; otherwise as [`Decoder::admit`].
    pub fn fill_synthetic_context(&mut self, slot: usize, context: usize, request: &Request) -> Result<()> {
        if context == 0 && request.block > 1 && self.ctx.chain().is_some() {
            let problem = "an EAGLE-3 drafter drafts after at least one position, the context has none";
            return Err(Error::Unsupported(problem.into()));
        }
        // No real prompt contains this token, so no later prompt shares a prefix with this one.
        let request = Request { prompt: vec![u32::MAX; context], ..request.clone() };
        if self.admit(slot, &request, false)?.is_none() {
            let free = self.free_pages();
            return Err(Error::Memory(format!("too few pages for {context} positions: {free} are free")));
        }
        let Some(mut state) = self.slots[slot].state.clone() else {
            return Err(Error::Internal(format!("slot {slot} has no state")));
        };
        let drafts = state.draft_end as usize > context;
        let pending = if drafts { request.block.min(context) } else { 0 };
        self.fill_noise(slot, context, pending)?;
        (state.anchor, state.pending) = (slot as u32 % self.vocab() as u32, pending as u32);
        let states = self.ctx.buffers.states.slice(slot * Sequence::BYTES, Sequence::BYTES)?;
        self.ctx.device.upload(&states, &state.to_bytes()?)?;
        let entry = &mut self.slots[slot];
        entry.tokens.push(state.anchor);
        (entry.held, entry.drafted) = (context, if drafts { context - pending } else { 0 });
        (entry.state, entry.phase) = (Some(state), Phase::Running { first: self.enqueued + 1 });
        Ok(())
    }

    /// Fills the slot's pages of the first `context` positions, its recurrent states before the last `pending` of them
    /// with their records, and its rows of features with noise. Sets its last accepted path to rows 0 to `block - 1`.
    fn fill_noise(&self, slot: usize, context: usize, pending: usize) -> Result<()> {
        let (ctx, buffers) = (&self.ctx, &self.ctx.buffers);
        let mut noise = vec![0; NOISE];
        random_bytes(3, 0, &mut noise);
        let pages = &self.pages.of(slot)[..context.div_ceil(PAGE)];
        for cache in ctx.caches() {
            for buffer in cache.keys.iter().chain(&cache.values) {
                let page = buffer.bytes() / cache.pages;
                // Consecutive pages are filled together.
                for run in pages.chunk_by(|a, b| a + 1 == *b) {
                    fill_with(ctx.device, &buffer.slice(run[0] as usize * page, run.len() * page)?, &noise)?;
                }
            }
        }
        if let Some(states) = &ctx.cache.states {
            for layer in &states.layers {
                let of_sets = [&layer.windows, &layer.inputs, &layer.keys, &layer.deltas, &layer.decays];
                for (buffer, sets) in of_sets.map(|buffer| (buffer, 2)).into_iter().chain([(&layer.state, 1)])
                {
                    let each = buffer.bytes() / sets / ctx.config.sequences;
                    // Set 0.
                    fill_with(ctx.device, &buffer.slice(slot * each, each)?, &noise)?;
                }
            }
            let mut header = [0; StateHeader::BYTES];
            header[..4].copy_from_slice(&((context - pending) as u32).to_le_bytes());
            let rows = header[16..].iter_mut().enumerate();
            rows.for_each(|(row, to)| *to = row as u8);
            let to = states.headers.slice(slot * StateHeader::BYTES, StateHeader::BYTES)?;
            ctx.device.upload(&to, &header)?;
        }
        if ctx.draft.is_some() {
            let block = ctx.config.block;
            let row = buffers.features.bytes() / ctx.config.sequences / ctx.config.max_verify_rows();
            let features = row * block;
            fill_with(ctx.device, &buffers.features.slice(slot * features, features)?, &noise)?;
            let path: Vec<u8> = (0..block as u32).flat_map(u32::to_le_bytes).collect();
            ctx.device.upload(&buffers.path.slice(slot * path.len(), path.len())?, &path)?;
            let columns = buffers.round_header.slice(8, 4)?;
            ctx.device.upload(&columns, &(block as u32).to_le_bytes())?;
        }
        Ok(())
    }

    /// Saves the state of the sequences, so that rounds can be replayed from it any number of times.
    ///
    /// # Errors
    /// [`Error::Memory`] if the device has too little memory; a few hundred bytes per sequence are needed.
    pub fn freeze(self) -> Result<FrozenBatch<'a>> {
        let (device, buffers) = (self.ctx.device, &self.ctx.buffers);
        let save = |buffer: &Buffer| {
            let saved = device.allocate(buffer.bytes(), "the state of sequences to return to")?;
            device.copy(&saved, buffer)?;
            Ok::<_, Error>(saved)
        };
        let (states, path) = (save(&buffers.states)?, save(&buffers.path)?);
        let columns = save(&buffers.round_header.slice(8, 4)?)?;
        let recurrent = self.ctx.cache.states.as_ref().map(|states| save(&states.headers)).transpose()?;
        Ok(FrozenBatch { batch: self, states, path, columns, recurrent })
    }
}

/// A batch whose rounds are replayed for measurement and then undone with [`FrozenBatch::reset`]. It is not a
/// decoder, because the host does not read the results of the rounds.
pub struct FrozenBatch<'a> {
    batch: Batch<'a>,
    states: Buffer,
    path: Buffer,
    /// Columns of `path`: the third word of the round header.
    columns: Buffer,
    /// The headers of recurrent states, if there are any.
    recurrent: Option<Buffer>,
}

impl FrozenBatch<'_> {
    /// Enqueues three or four small copies that return the sequences to the frozen state. Keys and values that the
    /// rounds wrote stay after the ends of the sequences, and recurrent states repeat the same records again. The features
    /// stay those of the last round.
    ///
    /// # Errors
    /// The device's error.
    pub fn reset(&self) -> Result<()> {
        let (device, buffers) = (self.batch.ctx.device, &self.batch.ctx.buffers);
        device.copy(&buffers.states, &self.states)?;
        device.copy(&buffers.path, &self.path)?;
        if let (Some(states), Some(saved)) = (&self.batch.ctx.cache.states, &self.recurrent) {
            device.copy(&states.headers, saved)?;
        }
        device.copy(&buffers.round_header.slice(8, 4)?, &self.columns)
    }

    /// The round of all slots: of full size with drafts if `drafting`, otherwise an AR step; sampled or
    /// greedy.
    ///
    /// # Errors
    /// [`Error::Internal`] if `drafting` without a drafter.
    pub fn graph(&self, drafting: bool, sampled: bool) -> Result<&Graph> {
        let config = self.batch.ctx.config;
        let (rows, drafter) =
            if drafting { (config.max_verify_rows(), DrafterMode::Draft) } else { (1, DrafterMode::Idle) };
        let wanted =
            RoundShape { sequences: config.sequences, rows, drafter, sampled, sampled_drafts: false };
        let found = self.batch.graphs.iter().find(|(shape, _)| *shape == wanted);
        found.map(|(_, graph)| graph).ok_or_else(|| Error::Internal(format!("no {wanted:?} was captured")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET, Folder};
    use crate::checkpoint::pair::Pair;
    use crate::engine::generate::{Emitted, Flow, TokenSink, generate, resume};
    use crate::gpu::batch_config::BatchConfig;
    use crate::gpu::decoder::Models;
    use crate::gpu::device::Device;
    use crate::gpu::model::KvCache;
    use crate::spec::sampling::SamplingParams;
    use crate::test_gpu::TestGpu;
    use half::bf16;
    use std::path::Path;

    const BLOCK: usize = 16;
    /// No page, a partly filled page, whole pages.
    const CONTEXTS: [usize; 3] = [0, 70, 128];

    struct Silent;

    impl TokenSink for Silent {
        fn token(&mut self, _: u32, _: bool) -> Result<Flow> {
            Ok(Flow::Continue)
        }
    }

    fn request(prompt: Vec<u32>, block: usize, temperature: f32) -> Request {
        let sampling = SamplingParams { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, stream: 0 };
        Request { prompt, max_tokens: 40, sampling, stop_ids: vec![], block, spec: Default::default() }
    }

    fn pair() -> Pair {
        Pair::with_random_weights(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()
    }

    fn bytes(batch: &Batch, of: &Buffer) -> Vec<u8> {
        let mut bytes = vec![0; of.bytes()];
        batch.ctx.device.download(of, &mut bytes).unwrap();
        bytes
    }

    /// The state of the slot's sequence on the device.
    fn state(batch: &Batch, slot: usize) -> Sequence {
        let all = bytes(batch, &batch.ctx.buffers.states);
        let state = batch.slots[slot].state.clone().unwrap();
        state.updated(&all[slot * Sequence::BYTES..][..Sequence::BYTES]).unwrap()
    }

    /// Keys and values of one position and layer, of the target or the drafter.
    fn held(batch: &Batch, cache: &KvCache, slot: usize, position: usize) -> Vec<u16> {
        let mut words = vec![];
        for buffer in cache.keys.iter().chain(&cache.values) {
            let all = bytes(batch, buffer);
            let page = &all[batch.pages.of(slot)[position / PAGE] as usize * (all.len() / cache.pages)..];
            let heads = all.len() / cache.pages / PAGE / 128;
            for head in 0..heads {
                let row = &page[(head * PAGE + position % PAGE) * 128..][..128];
                words.extend(row.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])));
            }
        }
        words
    }

    #[test]
    fn rounds_continue_from_a_synthetic_context() {
        let (device, pair) = (TestGpu::new(), pair());
        assert_eq!(pair.target.config.stack.head_dim * 2, 128);
        let models = Models::load(&device, &pair, 256).unwrap();
        for (block, temperature) in [(BLOCK, 0.0), (7, 0.8), (1, 0.0)] {
            let mut batch = Batch::new(&device, &models, BatchConfig::new(3, BLOCK, 256)).unwrap();
            for (slot, context) in CONTEXTS.into_iter().enumerate() {
                batch.fill_synthetic_context(slot, context, &request(vec![], block, temperature)).unwrap();
            }
            for (slot, context) in CONTEXTS.into_iter().enumerate() {
                let pending = if block > 1 { block.min(context) } else { 0 };
                let now = state(&batch, slot);
                assert_eq!((now.active, now.length as usize, now.pending as usize), (true, context, pending));
                for position in
                    [0, context / 2, context.saturating_sub(1)].into_iter().filter(|p| *p < context)
                {
                    for cache in batch.ctx.caches() {
                        let words = held(&batch, cache, slot, position);
                        let usual = |w: &&u16| {
                            (2f32.powi(-6)..2f32.powi(-5)).contains(&bf16::from_bits(**w).to_f32().abs())
                        };
                        assert_eq!(
                            words.iter().filter(usual).count(),
                            words.len(),
                            "slot {slot}, {position}"
                        );
                        assert!(words.iter().any(|w| *w != words[0]));
                    }
                }
            }
            // A NaN in the logits would be an error here.
            let mut emitted = vec![Emitted::default(); 3];
            let mut emitted_tokens = [0; 3];
            for _ in 0..3 {
                batch.round(&mut emitted).unwrap();
                for (slot, emitted) in emitted.iter().enumerate() {
                    assert!((1..=block).contains(&emitted.tokens.len()), "{emitted:?}");
                    emitted_tokens[slot] += emitted.tokens.len();
                }
            }
            // One enqueued round has not been read, so the device's length is ahead of the host's.
            batch.round(&mut emitted).unwrap();
            for (slot, context) in CONTEXTS.into_iter().enumerate() {
                let least = context + emitted_tokens[slot] + emitted[slot].tokens.len();
                let length = state(&batch, slot).length as usize;
                assert!((least + 1..=least + block).contains(&length), "slot {slot}: {length}, {least}");
            }
        }
    }

    /// The last verification of a synthetic context has no tokens, but a chain needs them for its pairs. An empty
    /// context has no pair to draft from.
    #[test]
    fn a_chain_continues_from_a_synthetic_context() {
        let drafters = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/drafters");
        let folder = |name: &str| Folder::Disk(drafters.join(name));
        let pair = Pair::with_random_weights(folder("target"), Some(folder("eagle3-speculators"))).unwrap();
        let device = TestGpu::new();
        let models = Models::load(&device, &pair, 256).unwrap();
        let mut batch = Batch::new(&device, &models, BatchConfig::new(3, 6, 256)).unwrap();
        let empty = batch.fill_synthetic_context(0, 0, &request(vec![], 6, 0.8)).unwrap_err();
        assert!(empty.to_string().ends_with("after at least one position, the context has none"), "{empty}");
        for (slot, context) in [1, 70, 128].into_iter().enumerate() {
            batch.fill_synthetic_context(slot, context, &request(vec![], 6, 0.8)).unwrap();
        }
        let mut emitted = vec![Emitted::default(); 3];
        for _ in 0..3 {
            batch.round(&mut emitted).unwrap();
            assert!(
                emitted.iter().all(|of| of.drafted == 5 && (1..=6).contains(&of.tokens.len())),
                "{emitted:?}"
            );
        }
    }

    /// The next request in the slot may keep a common prefix, but there is none.
    #[test]
    fn a_request_after_a_synthetic_one_reuses_nothing() {
        let (device, pair) = (TestGpu::new(), Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
        let models = Models::load(&device, &pair, 256).unwrap();
        let fresh = || Batch::new(&device, &models, BatchConfig::new(1, BLOCK, 256)).unwrap();
        let wanted = request((0..70).collect(), BLOCK, 0.0);
        let answer = generate(&mut fresh(), &wanted, &mut Silent).unwrap();
        let mut batch = fresh();
        batch.fill_synthetic_context(0, 90, &request(vec![], BLOCK, 0.0)).unwrap();
        let mut emitted = vec![Emitted::default()];
        batch.round(&mut emitted).unwrap();
        batch.release(0, 1).unwrap();
        let again = resume(&mut batch, &wanted, &mut Silent).unwrap();
        assert_eq!((again.kept, &again.tokens, &again.accepted), (0, &answer.tokens, &answer.accepted));
    }

    #[test]
    fn a_frozen_batch_returns_to_its_state_after_every_round() {
        let (device, pair) = (TestGpu::new(), pair());
        let models = Models::load(&device, &pair, 256).unwrap();
        let mut batch = Batch::new(&device, &models, BatchConfig::new(3, BLOCK, 256)).unwrap();
        for (slot, context) in CONTEXTS.into_iter().enumerate() {
            batch.fill_synthetic_context(slot, context, &request(vec![], BLOCK, 0.0)).unwrap();
        }
        let frozen = batch.freeze().unwrap();
        let (states, path) = (bytes(&frozen.batch, &frozen.states), bytes(&frozen.batch, &frozen.path));
        let identity: Vec<u8> = (0..3).flat_map(|_| (0..BLOCK as u32).flat_map(u32::to_le_bytes)).collect();
        assert_eq!(path, identity);
        for drafting in [true, false, true] {
            device.replay(frozen.graph(drafting, false).unwrap()).unwrap();
            let lengths = |slot| state(&frozen.batch, slot).length as usize;
            assert!((0..3).all(|slot| lengths(slot) > CONTEXTS[slot]));
            assert_ne!(bytes(&frozen.batch, &frozen.batch.ctx.buffers.path), path);
            frozen.reset().unwrap();
            assert_eq!(bytes(&frozen.batch, &frozen.batch.ctx.buffers.states), states);
            assert_eq!(bytes(&frozen.batch, &frozen.batch.ctx.buffers.path), path);
        }
        for (_, graph) in &frozen.batch.graphs {
            assert!(graph.nodes.len() > 30);
        }
        let all = frozen.graph(true, true).unwrap().nodes.len();
        assert!(all > frozen.graph(false, true).unwrap().nodes.len());
    }

    #[test]
    fn a_synthetic_context_that_does_not_fit_is_refused() {
        let (device, pair) = (TestGpu::new(), pair());
        let models = Models::load(&device, &pair, 256).unwrap();
        let mut batch =
            Batch::new(&device, &models, BatchConfig { pages: 3, ..BatchConfig::new(2, BLOCK, 256) })
                .unwrap();
        let wanted = request(vec![], BLOCK, 0.0);
        let whole = batch.fill_synthetic_context(0, 200, &wanted).unwrap_err();
        assert!(whole.to_string().contains("needs 4 pages"), "{whole}");
        batch.fill_synthetic_context(0, 70, &wanted).unwrap();
        assert!(
            batch
                .fill_synthetic_context(0, 70, &wanted)
                .unwrap_err()
                .to_string()
                .contains("slot 0 of 2 is not free")
        );
        let refused = batch.fill_synthetic_context(1, 70, &wanted).unwrap_err();
        assert_eq!(refused, Error::Memory("too few pages for 70 positions: 1 are free".into()));
    }
}
