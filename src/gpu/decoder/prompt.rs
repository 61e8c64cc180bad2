//! Prefill: runs one chunk of a prompt through both models.

use super::round_graph::RoundContext;
use crate::Result;
use crate::gpu::device::{Buffer, Device};
use crate::gpu::model::{Pass, Row};
use std::ops::Range;

/// Maximum tokens of a prefill chunk.
pub(super) const CHUNK: usize = 512;

/// The input tables of a chunk, and the features that it leaves for the drafter.
pub(super) struct PromptBuffers {
    tokens: Buffer,       // [CHUNK + 1] u32: those of the chunk and the one after it
    pub rows: Buffer,     // [CHUNK] Row
    span: Buffer,         // Span: (context, rows) u32
    pub features: Buffer, // [CHUNK][taps][hidden] bf16
    gather: Buffer,       // [CHUNK] u32: 0, 1, 2...
}

/// A part of a prompt.
pub(super) struct Chunk<'a> {
    pub slot: usize,
    /// Position of the first token.
    pub first: usize,
    pub tokens: &'a [u32],
    /// The token after them, if it is of the prompt.
    pub next: Option<u32>,
    /// The target's cache already holds the positions before this one. They run only for their features, and
    /// their keys and values are not written again.
    pub held: usize,
    /// The drafter's positions are `0..draft_end`; 0: it does not take part.
    pub draft_end: usize,
}

impl PromptBuffers {
    pub fn new(device: &dyn Device, taps: usize, hidden: usize) -> Result<PromptBuffers> {
        let get = |bytes: usize, what| device.allocate(bytes.max(16), what);
        let numbers: Vec<u8> = (0..CHUNK as u32).flat_map(u32::to_le_bytes).collect();
        let buffers = PromptBuffers {
            tokens: get((CHUNK + 1) * 4, "a prompt's tables")?,
            rows: get(CHUNK * Row::BYTES, "a prompt's tables")?,
            span: get(8, "a prompt's tables")?.slice(0, 8)?,
            features: get(CHUNK * taps * hidden * 2, "features")?,
            gather: get(CHUNK * 4, "a prompt's tables")?,
        };
        device.fill(&buffers.features, 0)?;
        device.upload(&buffers.gather, &numbers)?;
        Ok(buffers)
    }

    /// Runs the chunk through the target and injects its features into the drafter's cache.
    pub fn run(&self, ctx: &RoundContext, chunk: Chunk) -> Result<()> {
        let (device, models, count) = (ctx.device, ctx.models, chunk.tokens.len());
        let put = |to: &Buffer, bytes: &[u8]| device.upload(&to.slice(0, bytes.len())?, bytes);
        let tokens = chunk.tokens.iter().copied().chain(chunk.next);
        put(&self.tokens, &tokens.flat_map(u32::to_le_bytes).collect::<Vec<u8>>())?;
        put(&self.rows, &chunk.rows(true, chunk.held..usize::MAX))?;
        put(&self.span, &[(chunk.first as u32).to_le_bytes(), (count as u32).to_le_bytes()].concat())?;
        models.vocabulary.embedding.embed(device, &ctx.scratch, &self.tokens, count, 1.0)?;
        let drafter = ctx.drafter().filter(|_| chunk.draft_end > 0);
        let pass = Pass {
            sequences: 1,
            block: count,
            injected: 0,
            table: &self.rows,
            spans: &self.span,
            masks: None,
            prompt: Some(chunk.slot),
            num_active: None,
            taps: (chunk.draft_end > 0).then_some((models.taps(), &self.features)),
        };
        models.target.run(device, &ctx.scratch, &ctx.cache, &pass)?;
        models.target.advance(device, &ctx.cache, &pass, None)?;
        if let Some((drafter, cache, s)) = drafter {
            // The last position's pair waits for the token after the prompt.
            let (chain, last) = (ctx.chain(), usize::from(chunk.next.is_none()));
            let count = count - if chain.is_some() { last } else { 0 };
            if count == 0 {
                return Ok(());
            }
            if let Some((chain, of, _)) = &chain {
                chain.normalize(device, of, count, &self.features, &self.gather)?;
            }
            drafter.projection.run(device, s, count, &self.features, &self.gather, true, None)?;
            if let Some((chain, of, _)) = &chain {
                chain.prompt(device, of, count, &self.tokens)?;
            }
            put(&self.rows, &chunk.rows(false, 0..chunk.draft_end))?;
            drafter.layers.write_context_kv(device, s, cache, &self.rows, count, true, None)?;
            // The sampler of the token after the prompt reads the target's rows.
            put(&self.rows, &chunk.rows(true, chunk.held..usize::MAX))?;
        }
        Ok(())
    }
}

impl Chunk<'_> {
    /// The chunk's table of [`Row`]s. Rows have queries if `query`. Positions in `stored` write keys and
    /// values.
    fn rows(&self, query: bool, stored: Range<usize>) -> Vec<u8> {
        let row = |i: usize| {
            let position = self.first + i;
            let writes = stored.contains(&position);
            Row {
                sequence: if query || writes { self.slot as u32 } else { Row::NONE },
                position: position as u32,
                slot: if writes { position as u32 } else { Row::NONE },
                query: if query { i as u32 } else { Row::NONE },
            }
        };
        (0..self.tokens.len()).flat_map(|i| row(i).to_bytes()).collect()
    }
}
