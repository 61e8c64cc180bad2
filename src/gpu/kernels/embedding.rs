//! `cuda/model/embedding.cu`: embedding rows of a pass's tokens.

use super::{aligned, at_least};
use crate::gpu::device::{Buffer, Device, Kernel};
use crate::{Error, Result};

static EMBEDDING: Kernel = Kernel { file: "embedding", name: "embedding", threads: 256, max_shared: 0 };

/// `out[r] = scale * f32(table[tokens[r]])`; a token outside the vocabulary gives zeros.
#[derive(Debug, Clone, Copy)]
pub struct Embedding {
    pub rows: usize,
    pub hidden: usize,
    pub vocab: usize,
    /// The table is a linear layer's packed weights (see [`super::pack`]), shared with the LM head.
    pub packed: bool,
    /// 1 leaves rows as they are.
    pub scale: f32,
}

impl Embedding {
    /// Bytes a launch must move: the rows read as bf16 and written as f32, and the tokens.
    pub fn bytes(&self) -> u64 {
        (self.rows * (self.hidden * 6 + 4)) as u64
    }

    /// `out` `[rows][hidden]` f32, `table` `[vocab][hidden]` bf16 or its packed form, sealed, `tokens` `[rows]` u32.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or `hidden` is no multiple of 8, of 32 where the table is packed; else
    /// what the device says.
    pub fn launch(&self, device: &dyn Device, out: &Buffer, table: &Buffer, tokens: &Buffer) -> Result<()> {
        let Embedding { rows, hidden, vocab, packed, scale } = *self;
        let unit = if packed { 32 } else { 8 };
        if !hidden.is_multiple_of(unit) || vocab == 0 {
            return Err(Error::Internal(format!(
                "kernel embedding: hidden size {hidden} and vocabulary {vocab}, needed are a multiple of {unit} and at \
                 least 1"
            )));
        }
        aligned("embedding", "out", out, rows * hidden * 4)?;
        aligned(
            "embedding",
            "table",
            table,
            if packed { vocab.next_multiple_of(16) } else { vocab } * hidden * 2,
        )?;
        at_least("embedding", "tokens", tokens, rows * 4)?;
        let args = [
            out.into(),
            table.into(),
            tokens.into(),
            (hidden as u32).into(),
            (vocab as u32).into(),
            u32::from(packed).into(),
            scale.into(),
        ];
        device.launch(&EMBEDDING, [rows as u32, 1, 1], 0, &args)
    }
}
