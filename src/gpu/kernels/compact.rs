//! `cuda/spec/compact.cu`: keys and values of an accepted path to the slots behind each other, as [`crate::spec::tree::moves`] has
//! it.

use super::round::check_shape;
use super::verify::Verdict;
use super::{PAGE, aligned, at_least};
use crate::gpu::device::{Buffer, Device, Kernel};
use crate::{Error, Result};

static COMPACT: Kernel = Kernel { file: "compact", name: "compact", threads: 256, max_shared: 0 };

/// A model's cache, and the trees whose paths are moved in it: `sequences` (at most 1024) of `rows` rows (at most 64).
#[derive(Debug, Clone, Copy)]
pub struct Compact {
    pub sequences: usize,
    pub rows: usize,
    pub layers: usize,
    pub kv_heads: usize,
    /// 64 or 128.
    pub head_dim: usize,
    pub pages: usize,
    /// Columns of the page table.
    pub sequence_pages: usize,
}

impl Compact {
    /// Bytes a launch must move where `moved` rows of all sequences together do not stand right.
    pub fn bytes(&self, moved: usize) -> u64 {
        (self.layers * self.kv_heads * moved * self.head_dim * 8) as u64
    }

    /// What a launch knows the caches by, `[layers][2]` u64: where keys and values are. `keys` and `values` per layer
    /// `[pages][kv_heads][PAGE][head_dim]` bf16; they must num_active as long as launches use this.
    ///
    /// # Errors
    /// [`Error::Internal`] where there are not as many as layers, or one is too small.
    pub fn caches(&self, keys: &[Buffer], values: &[Buffer]) -> Result<Vec<u8>> {
        if keys.len() != self.layers || values.len() != self.layers {
            let (keys, values) = (keys.len(), values.len());
            return Err(Error::Internal(format!(
                "kernel compact: {keys} caches of keys and {values} of values for {} layers",
                self.layers
            )));
        }
        let bytes = self.pages * self.kv_heads * PAGE * self.head_dim * 2;
        let mut addresses = Vec::new();
        for (keys, values) in keys.iter().zip(values) {
            aligned("compact", "keys", keys, bytes)?;
            aligned("compact", "values", values, bytes)?;
            addresses.extend([keys, values].map(|cache| cache.address().to_le_bytes()).concat());
        }
        Ok(addresses)
    }

    /// `caches`: what [`Compact::caches`] makes, uploaded. `page_table` `[sequences][sequence_pages]` u32; `verdict` and
    /// `spans` `[sequences]` `Span` (cuda/common/rows.cuh) of the pass that ran the trees.
    ///
    /// # Errors
    /// [`Error::Internal`] where a buffer is too small or a size outside the limits above; else what the device says.
    pub fn launch(
        &self,
        device: &dyn Device,
        caches: &Buffer,
        page_table: &Buffer,
        verdict: Verdict<'_>,
        spans: &Buffer,
    ) -> Result<()> {
        const NAME: &str = "compact";
        let Compact { sequences, rows, layers, kv_heads, head_dim, pages, sequence_pages } = *self;
        check_shape(NAME, sequences, rows)?;
        let most = 1..=65535;
        if ![64, 128].contains(&head_dim) || !most.contains(&layers) || !most.contains(&kv_heads) {
            return Err(Error::Internal(format!(
                "kernel {NAME}: {layers} layers of {kv_heads} heads of {head_dim}; possible are heads of 64 or 128"
            )));
        }
        aligned(NAME, "caches", caches, layers * 16)?;
        at_least(NAME, "page_table", page_table, sequences * sequence_pages * 4)?;
        verdict.check(NAME, sequences, rows)?;
        aligned(NAME, "spans", spans, sequences * 8)?;
        let args = [
            caches.into(),
            page_table.into(),
            verdict.accepted.into(),
            verdict.path.into(),
            spans.into(),
            (rows as u32).into(),
            (head_dim as u32).into(),
            (pages as u32).into(),
            (sequence_pages as u32).into(),
        ];
        device.launch(&COMPACT, [kv_heads as u32, sequences as u32, layers as u32], 0, &args)
    }
}
