//! For measuring, where shapes matter and text does not: sequences whose context is noise, so that none has to be run,
//! and rounds that begin at one and the same state however often.

use super::{Batch, Phase, Shape};
use crate::device::{Buffer, Graph};
use crate::engine::{Decoder, Request};
use crate::kernels::round::Sequence;
use crate::model::PAGE;
use crate::weights::draw;
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
    pub fn pretend(&mut self, slot: usize, context: usize, request: &Request) -> Result<()> {
        // No prompt begins with such a token, so that nobody resumes here.
        let request = Request { prompt: vec![u32::MAX; context], ..request.clone() };
        if self.join(slot, &request, false)?.is_none() {
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
            let features = self.work.features.bytes() / self.room.sequences;
            self.fill(&self.work.features.slice(slot * features, features)?, &noise)?;
            let path: Vec<u8> = (0..block as u32).flat_map(u32::to_le_bytes).collect();
            self.device.upload(&self.work.path.slice(slot * path.len(), path.len())?, &path)?;
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
    pub fn still(self) -> Result<Still<'a>> {
        let keep = |buffer: &Buffer| {
            let kept = self.device.allocate(buffer.bytes(), "the state of sequences to return to")?;
            self.device.copy(&kept, buffer)?;
            Ok::<_, Error>(kept)
        };
        let (states, path) = (keep(&self.work.states)?, keep(&self.work.path)?);
        Ok(Still { batch: self, states, path })
    }
}

/// A batch that stands still: its rounds are replayed by whoever measures them, and what they do to its sequences is taken
/// back. Its host side no longer follows what happens, and so it is no decoder any more.
pub struct Still<'a> {
    batch: Batch<'a>,
    states: Buffer,
    path: Buffer,
}

impl Still<'_> {
    /// Enqueues that the next round begins where the first did: two small copies. Keys and values that rounds have written
    /// since lie behind the sequences' ends; the features are the last round's.
    ///
    /// # Errors
    /// What the device says.
    pub fn reset(&self) -> Result<()> {
        let (device, work) = (self.batch.device, &self.batch.work);
        device.copy(&work.states, &self.states)?;
        device.copy(&work.path, &self.path)
    }

    /// The round of all slots: a plain step, or with drafts; greedy or with the sampler's races.
    ///
    /// # Errors
    /// [`Error::Internal`] where there is none: with drafts, but without a drafter.
    pub fn graph(&self, drafting: bool, sampled: bool) -> Result<&Graph> {
        let wanted = Shape { sequences: self.batch.room.sequences, drafting, sampled };
        let found = self.batch.graphs.iter().find(|(shape, _)| *shape == wanted);
        found.map(|(_, graph)| graph).ok_or_else(|| Error::Internal(format!("no {wanted:?} was captured")))
    }
}
