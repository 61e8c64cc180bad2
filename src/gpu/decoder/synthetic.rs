//! For measuring, where shapes matter and text does not: sequences whose context is noise, so that none has to be run,
//! and rounds that begin at one and the same state however often.

use super::{Batch, DrafterMode, Phase, Shape};
use crate::checkpoint::safetensors::draw;
use crate::engine::generate::{Decoder, Request};
use crate::gpu::device::{Buffer, Graph};
use crate::gpu::kernels::round::Sequence;
use crate::gpu::model::PAGE;
use crate::{Error, Result};

/// Bytes of noise before it repeats.
const NOISE: usize = 1 << 20;

impl<'a> Batch<'a> {
    /// As [`Decoder::join`] and the whole prompt, `context` tokens (0 too) of which none is run: keys and values of these
    /// positions are noise, and so are the features that the drafter has not seen, of as many positions as a block whose
    /// drafts all stood leaves. Noise, because a card runs zeros at higher clocks; the same in every layer. Rounds go on
    /// from there as from any other state. Of `request` the prompt is not looked at. Who comes next into the slot keeps
    /// nothing of it.
    ///
    /// # Errors
    /// [`Error::Memory`] where there are too few pages; else as [`Decoder::join`].
    pub fn fill_synthetic_context(&mut self, slot: usize, context: usize, request: &Request) -> Result<()> {
        // No prompt begins with such a token, so that nobody resumes here.
        let request = Request { prompt: vec![u32::MAX; context], ..request.clone() };
        if self.admit(slot, &request, false)?.is_none() {
            let free = self.free_pages();
            return Err(Error::Memory(format!("too few pages for {context} positions: {free} are free")));
        }
        let Some(mut state) = self.slots[slot].state.clone() else {
            return Err(Error::Internal(format!("slot {slot} has no state")));
        };
        self.make_noise(slot, context)?;
        let drafts = state.draft_end as usize > context;
        let pending = if drafts { request.block.min(context) } else { 0 };
        (state.anchor, state.pending) = (slot as u32 % self.vocab() as u32, pending as u32);
        let states = self.work.states.slice(slot * Sequence::BYTES, Sequence::BYTES)?;
        self.device.upload(&states, &state.to_bytes()?)?;
        let own = &mut self.slots[slot];
        own.tokens.push(state.anchor);
        (own.held, own.drafted) = (context, if drafts { context - pending } else { 0 });
        (own.state, own.phase) = (Some(state), Phase::Running { first: self.enqueued + 1 });
        Ok(())
    }

    /// Fills the slot's pages of its first `context` positions, and its rows of features, of a path that is its block.
    fn make_noise(&self, slot: usize, context: usize) -> Result<()> {
        let mut noise = vec![0; NOISE];
        draw(3, 0, &mut noise);
        let pages = &self.slots[slot].pages[..context.div_ceil(PAGE)];
        for cache in [Some(&self.cache), self.draft.as_ref().map(|(cache, _)| cache)].into_iter().flatten() {
            for buffer in cache.keys.iter().chain(&cache.values) {
                let page = buffer.bytes() / cache.pages;
                // Pages that follow each other are filled together.
                for run in pages.chunk_by(|a, b| a + 1 == *b) {
                    self.fill(&buffer.slice(run[0] as usize * page, run.len() * page)?, &noise)?;
                }
            }
        }
        if self.draft.is_some() {
            let block = self.room.block;
            let features =
                self.work.features.bytes() / self.room.sequences / self.room.max_verify_rows() * block;
            self.fill(&self.work.features.slice(slot * features, features)?, &noise)?;
            let path: Vec<u8> = (0..block as u32).flat_map(u32::to_le_bytes).collect();
            self.device.upload(&self.work.path.slice(slot * path.len(), path.len())?, &path)?;
            let columns = self.work.round_header.slice(8, 4)?;
            self.device.upload(&columns, &(block as u32).to_le_bytes())?;
        }
        Ok(())
    }

    /// Uploads `noise` once and copies it on, twice as much every time.
    fn fill(&self, to: &Buffer, noise: &[u8]) -> Result<()> {
        let mut done = to.bytes().min(noise.len());
        self.device.upload(&to.slice(0, done)?, &noise[..done])?;
        while done < to.bytes() {
            let more = done.min(to.bytes() - done);
            self.device.copy(&to.slice(done, more)?, &to.slice(0, more)?)?;
            done += more;
        }
        Ok(())
    }

    /// The sequences as they are now, whose rounds are to be replayed from here any number of times.
    ///
    /// # Errors
    /// [`Error::Memory`] where there is too little, a few hundred bytes a sequence.
    pub fn freeze(self) -> Result<FrozenBatch<'a>> {
        let keep = |buffer: &Buffer| {
            let kept = self.device.allocate(buffer.bytes(), "the state of sequences to return to")?;
            self.device.copy(&kept, buffer)?;
            Ok::<_, Error>(kept)
        };
        let (states, path) = (keep(&self.work.states)?, keep(&self.work.path)?);
        let columns = keep(&self.work.round_header.slice(8, 4)?)?;
        Ok(FrozenBatch { batch: self, states, path, columns })
    }
}

/// A batch that stands still: its rounds are replayed by whoever measures them, and what they do to its sequences is taken
/// back. Its host side no longer follows what happens, and so it is no decoder any more.
pub struct FrozenBatch<'a> {
    batch: Batch<'a>,
    states: Buffer,
    path: Buffer,
    /// Of the path.
    columns: Buffer,
}

impl FrozenBatch<'_> {
    /// Enqueues that the next round begins where the first did: three small copies. Keys and values that rounds have written
    /// since lie behind the sequences' ends; the features are the last round's.
    ///
    /// # Errors
    /// What the device says.
    pub fn reset(&self) -> Result<()> {
        let (device, work) = (self.batch.device, &self.batch.work);
        device.copy(&work.states, &self.states)?;
        device.copy(&work.path, &self.path)?;
        device.copy(&work.round_header.slice(8, 4)?, &self.columns)
    }

    /// The round of all slots: a AR step, or with drafts; greedy or with the sampler's races.
    ///
    /// # Errors
    /// [`Error::Internal`] where there is none: with drafts, but without a drafter.
    pub fn graph(&self, drafting: bool, sampled: bool) -> Result<&Graph> {
        let room = self.batch.room;
        let (rows, drafter) =
            if drafting { (room.max_verify_rows(), DrafterMode::Draft) } else { (1, DrafterMode::Idle) };
        let wanted = Shape { sequences: room.sequences, rows, drafter, sampled, drawn: false };
        let found = self.batch.graphs.iter().find(|(shape, _)| *shape == wanted);
        found.map(|(_, graph)| graph).ok_or_else(|| Error::Internal(format!("no {wanted:?} was captured")))
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::checkpoint::pair::Pair;
    use crate::checkpoint::safetensors::{DEMO_DRAFTER, DEMO_TARGET};
    use crate::engine::generate::{Emitted, Flow, TokenSink, generate, resume};
    use crate::gpu::decoder::Models;
    use crate::gpu::device::Device;
    use crate::gpu::emulator::Emulator;
    use crate::gpu::memory::BatchConfig;
    use crate::spec::sampling::SamplingParams;
    use half::bf16;

    const BLOCK: usize = 16;
    /// None, pages in part, whole pages.
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
        Pair::drawn(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()
    }

    fn bytes(batch: &Batch, of: &Buffer) -> Vec<u8> {
        let mut bytes = vec![0; of.bytes()];
        batch.device.download(of, &mut bytes).unwrap();
        bytes
    }

    /// The slot's sequence as the device has it.
    fn state(batch: &Batch, slot: usize) -> Sequence {
        let all = bytes(batch, &batch.work.states);
        let state = batch.slots[slot].state.clone().unwrap();
        state.updated(&all[slot * Sequence::BYTES..][..Sequence::BYTES]).unwrap()
    }

    /// Keys and values of one position and layer, of the target or the drafter.
    fn held(batch: &Batch, cache: &super::super::Cache, slot: usize, position: usize) -> Vec<u16> {
        let mut words = vec![];
        for buffer in cache.keys.iter().chain(&cache.values) {
            let all = bytes(batch, buffer);
            let page = &all[batch.slots[slot].pages[position / PAGE] as usize * (all.len() / cache.pages)..];
            let heads = all.len() / cache.pages / PAGE / 128;
            for head in 0..heads {
                let row = &page[(head * PAGE + position % PAGE) * 128..][..128];
                words.extend(row.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])));
            }
        }
        words
    }

    #[test]
    fn a_context_of_noise_is_there_and_rounds_go_on_from_it() {
        let (device, pair) = (Emulator::new(), pair());
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
                    for cache in [&batch.cache, &batch.draft.as_ref().unwrap().0] {
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
            // The device's record of a NaN would be an error.
            let mut emitted = vec![Emitted::default(); 3];
            let mut brought = [0; 3];
            for _ in 0..3 {
                batch.round(&mut emitted).unwrap();
                for (slot, emitted) in emitted.iter().enumerate() {
                    assert!((1..=block).contains(&emitted.tokens.len()), "{emitted:?}");
                    brought[slot] += emitted.tokens.len();
                }
            }
            // One round more is enqueued than was read.
            batch.round(&mut emitted).unwrap();
            for (slot, context) in CONTEXTS.into_iter().enumerate() {
                let least = context + brought[slot] + emitted[slot].tokens.len();
                let length = state(&batch, slot).length as usize;
                assert!((least + 1..=least + block).contains(&length), "slot {slot}: {length}, {least}");
            }
        }
    }

    /// With the first slot's context full of noise and rounds of it run, its next request is answered as on a new device,
    /// also where it may keep what was there; its neighbour's answer too.
    #[test]
    fn who_comes_after_noise_is_answered_as_if_it_had_not_been() {
        let (device, pair) = (Emulator::new(), Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
        let models = Models::load(&device, &pair, 256).unwrap();
        let fresh = || Batch::new(&device, &models, BatchConfig::new(1, BLOCK, 256)).unwrap();
        let asked = request((0..70).collect(), BLOCK, 0.0);
        let answer = generate(&mut fresh(), &asked, &mut Silent).unwrap();
        let mut batch = fresh();
        batch.fill_synthetic_context(0, 90, &request(vec![], BLOCK, 0.0)).unwrap();
        let mut emitted = vec![Emitted::default()];
        batch.round(&mut emitted).unwrap();
        batch.release(0, 1).unwrap();
        let again = resume(&mut batch, &asked, &mut Silent).unwrap();
        assert_eq!((again.kept, &again.tokens, &again.accepted), (0, &answer.tokens, &answer.accepted));
    }

    #[test]
    fn a_batch_that_stands_still_does_the_same_again_and_again() {
        let (device, pair) = (Emulator::new(), pair());
        let models = Models::load(&device, &pair, 256).unwrap();
        let mut batch = Batch::new(&device, &models, BatchConfig::new(3, BLOCK, 256)).unwrap();
        for (slot, context) in CONTEXTS.into_iter().enumerate() {
            batch.fill_synthetic_context(slot, context, &request(vec![], BLOCK, 0.0)).unwrap();
        }
        let still = batch.freeze().unwrap();
        let (states, path) = (bytes(&still.batch, &still.states), bytes(&still.batch, &still.path));
        let identity: Vec<u8> = (0..3).flat_map(|_| (0..BLOCK as u32).flat_map(u32::to_le_bytes)).collect();
        assert_eq!(path, identity);
        for drafting in [true, false, true] {
            device.replay(still.graph(drafting, false).unwrap()).unwrap();
            let lengths = |slot| state(&still.batch, slot).length as usize;
            assert!((0..3).all(|slot| lengths(slot) > CONTEXTS[slot]));
            assert_ne!(bytes(&still.batch, &still.batch.work.path), path);
            still.reset().unwrap();
            assert_eq!(bytes(&still.batch, &still.batch.work.states), states);
            assert_eq!(bytes(&still.batch, &still.batch.work.path), path);
        }
        for (_, graph) in &still.batch.graphs {
            assert!(graph.nodes.len() > 30);
        }
        let all = still.graph(true, true).unwrap().nodes.len();
        assert!(all > still.graph(false, true).unwrap().nodes.len());
    }

    #[test]
    fn noise_that_does_not_fit_is_refused() {
        let (device, pair) = (Emulator::new(), pair());
        let models = Models::load(&device, &pair, 256).unwrap();
        let mut batch =
            Batch::new(&device, &models, BatchConfig { pages: 3, ..BatchConfig::new(2, BLOCK, 256) })
                .unwrap();
        let asked = request(vec![], BLOCK, 0.0);
        let whole = batch.fill_synthetic_context(0, 200, &asked).unwrap_err();
        assert!(whole.to_string().contains("needs 4 pages"), "{whole}");
        batch.fill_synthetic_context(0, 70, &asked).unwrap();
        assert!(
            batch
                .fill_synthetic_context(0, 70, &asked)
                .unwrap_err()
                .to_string()
                .contains("slot 0 of 2 is not free")
        );
        let refused = batch.fill_synthetic_context(1, 70, &asked).unwrap_err();
        assert_eq!(refused, Error::Memory("too few pages for 70 positions: 1 are free".into()));
    }
}
