//! `cuda/spec/compact.cu`: moves the keys and values of an accepted path to consecutive slots, as
//! [`crate::spec::tree::compaction_moves`] defines it.

use super::check::{Check, args};
use super::verify::VerifyOutput;
use super::{PAGE, SPAN_BYTES};
use crate::Result;
use crate::gpu::device::{Buffer, Device, Kernel};

static COMPACT: Kernel = Kernel { file: "compact", name: "compact", threads: 256, max_shared: 0 };

/// A model's KV cache, and the trees whose accepted paths are moved in it.
#[derive(Debug, Clone, Copy)]
pub struct Compact {
    /// Sequences, 1 to 1024.
    pub sequences: usize,
    /// Rows per tree, 1 to 64.
    pub rows: usize,
    /// Layers, 1 to 65535.
    pub layers: usize,
    /// Key/value heads, 1 to 65535.
    pub kv_heads: usize,
    /// 64 or 128.
    pub head_dim: usize,
    /// Pages in each layer's key buffer and value buffer.
    pub pages: usize,
    /// Pages per sequence: columns of the page table.
    pub sequence_pages: usize,
}

impl Compact {
    /// Bytes a launch must move if `moved` rows, of all sequences together, change their slot.
    pub fn bytes(&self, moved: usize) -> u64 {
        (self.layers * self.kv_heads * moved * self.head_dim * 8) as u64
    }

    /// The bytes of a table for [`Compact::launch`] with the addresses of the cache's buffers, `[layers][2]`
    /// u64: keys, values. `keys` and `values` per layer `[pages][kv_heads][PAGE][head_dim]` bf16. They must
    /// outlive the launches that use the table.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if there is not one buffer per layer, or a buffer is too small.
    pub fn cache_addresses(&self, keys: &[Buffer], values: &[Buffer]) -> Result<Vec<u8>> {
        let check = Check("compact");
        check.that(
            keys.len() == self.layers && values.len() == self.layers,
            format_args!("{} key buffers and {} value buffers", keys.len(), values.len()),
            format_args!("one of each for {} layers", self.layers),
        )?;
        let bytes = self.pages * self.kv_heads * PAGE * self.head_dim * 2;
        let mut addresses = Vec::new();
        for (keys, values) in keys.iter().zip(values) {
            check.aligned("keys", keys, bytes)?;
            check.aligned("values", values, bytes)?;
            addresses.extend([keys, values].map(|cache| cache.address().to_le_bytes()).concat());
        }
        Ok(addresses)
    }

    /// Moves the keys and values. `caches`: the table of [`Compact::cache_addresses`]. `page_table`
    /// `[sequences][sequence_pages]` u32. `output`: the result of the verification. `spans` `[sequences]`
    /// `Span` of the verification pass.
    ///
    /// # Errors
    /// [`crate::Error::Internal`] if a buffer is too small or a size is out of range; device errors.
    pub fn launch(
        &self,
        device: &dyn Device,
        caches: &Buffer,
        page_table: &Buffer,
        output: VerifyOutput<'_>,
        spans: &Buffer,
    ) -> Result<()> {
        let Compact { sequences, rows, layers, kv_heads, head_dim, pages, sequence_pages } = *self;
        let check = Check("compact");
        check.blocks(sequences, rows)?;
        let limits = 1..=65535;
        check.that(
            [64, 128, 256].contains(&head_dim) && limits.contains(&layers) && limits.contains(&kv_heads),
            format_args!("{layers} layers of {kv_heads} heads of {head_dim}"),
            "1 to 65535 layers of 1 to 65535 heads of 64, 128 or 256",
        )?;
        check.aligned("caches", caches, layers * 16)?;
        check.at_least("page_table", page_table, sequences * sequence_pages * 4)?;
        output.check(&check, sequences, rows)?;
        check.aligned("spans", spans, sequences * SPAN_BYTES)?;
        let buffers = [caches, page_table, output.accepted, output.path, spans];
        let args = args(buffers, [rows, head_dim, pages, sequence_pages]);
        device.launch(&COMPACT, [kv_heads as u32, sequences as u32, layers as u32], 0, &args)
    }
}
