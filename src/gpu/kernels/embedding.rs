//! `cuda/model/embedding.cu`: looks up the embeddings of a pass's tokens.

use super::check::{Check, args};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static EMBEDDING: Kernel = Kernel { file: "embedding", name: "embedding", threads: 256, max_shared: 0 };

/// `out[r] = scale * f32(table[tokens[r]])`; a token outside the vocabulary gives zeros.
#[derive(Debug, Clone, Copy)]
pub struct Embedding {
    /// Rows of the pass.
    pub rows: usize,
    /// Hidden size, a multiple of 8, or of 32 if the table is packed.
    pub hidden: usize,
    /// Rows of the table, at least 1.
    pub vocab: usize,
    /// The table is the packed weights of the LM head (see [`super::pack`]).
    pub packed: bool,
    /// Factor of the embeddings; 1 leaves them unchanged.
    pub scale: f32,
}

impl Embedding {
    /// Bytes a launch must move: the rows read as bf16 and written as f32, and the tokens.
    pub fn bytes(&self) -> u64 {
        (self.rows * (self.hidden * 6 + 4)) as u64
    }

    /// `out` `[rows][hidden]` f32; `table` `[vocab][hidden]` bf16 or its packed form, sealed; `tokens`
    /// `[rows]` u32.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(&self, device: &dyn Device, out: &Buffer, table: &Buffer, tokens: &Buffer) -> Result<()> {
        let Embedding { rows, hidden, vocab, packed, scale } = *self;
        let check = Check("embedding");
        let (unit, table_rows) = if packed { (32, vocab.next_multiple_of(16)) } else { (8, vocab) };
        check.that(
            hidden.is_multiple_of(unit) && vocab > 0,
            format_args!("hidden size {hidden} and vocabulary {vocab}"),
            format_args!("a multiple of {unit} and at least 1"),
        )?;
        check.aligned("out", out, rows * hidden * 4)?;
        check.aligned("table", table, table_rows * hidden * 2)?;
        check.at_least("tokens", tokens, rows * 4)?;
        let mut args = args([out, table, tokens], [hidden, vocab]);
        args.extend([u32::from(packed).into(), scale.into()]);
        device.launch(&EMBEDDING, [rows as u32, 1, 1], 0, &args)
    }
}
