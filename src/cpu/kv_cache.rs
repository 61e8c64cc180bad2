//! Keys and values of a sequence on the CPU, one layer at a time, laid out for
//! [`crate::cpu::ops::attention`].

use crate::cpu::simd::LANES;
use crate::{Error, Result};

/// Keys and values of one layer, positions `0..capacity`.
pub struct Kv {
    /// `[kv_heads][tiles][head_dim][16]`: lane = position modulo 16, so that one vector holds the scores of
    /// 16 keys.
    pub(crate) keys: Vec<f32>,
    /// `[kv_heads][16 * tiles][head_dim rounded up to 16]`
    pub(crate) values: Vec<f32>,
    /// Allocated tiles, of 16 positions each.
    pub(crate) tiles: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
}

impl Kv {
    /// An empty cache with a capacity of `positions` positions.
    ///
    /// # Errors
    /// [`Error::Memory`] with the number of bytes needed.
    pub fn new(kv_heads: usize, head_dim: usize, positions: usize) -> Result<Kv> {
        let tiles = positions.div_ceil(LANES);
        let padded_dim = head_dim.next_multiple_of(LANES);
        let (keys, values) = (kv_heads * tiles * head_dim * LANES, kv_heads * tiles * LANES * padded_dim);
        let bytes = (keys + values) * size_of::<f32>();
        let what = || {
            format!(
                "the KV cache of each layer needs {bytes} bytes for {positions} positions (prompt and max_tokens)"
            )
        };
        Ok(Kv { keys: zeros(keys, what)?, values: zeros(values, what)?, tiles, kv_heads, head_dim })
    }

    /// Grows the capacity to `positions` positions in total and keeps the first `used`.
    ///
    /// # Errors
    /// As [`Kv::new`].
    pub fn grow(&mut self, positions: usize, used: usize) -> Result<()> {
        if positions <= self.tiles * LANES {
            return Ok(());
        }
        let mut grown = Kv::new(self.kv_heads, self.head_dim, positions)?;
        let tiles = used.div_ceil(LANES);
        for (new, old, width) in [
            (&mut grown.keys, &self.keys, self.head_dim * LANES),
            (&mut grown.values, &self.values, self.head_dim.next_multiple_of(LANES) * LANES),
        ] {
            for h in 0..self.kv_heads {
                let old = &old[h * self.tiles * width..][..tiles * width];
                new[h * grown.tiles * width..][..tiles * width].copy_from_slice(old);
            }
        }
        *self = grown;
        Ok(())
    }

    /// Writes `k`, `v` `[rows][kv_heads * head_dim]` at positions `at..`.
    pub fn write(&mut self, at: usize, k: &[f32], v: &[f32]) {
        let (head_dim, padded_dim) = (self.head_dim, self.head_dim.next_multiple_of(LANES));
        let width = self.kv_heads * head_dim;
        for (r, (k, v)) in k.chunks(width).zip(v.chunks(width)).enumerate() {
            let (tile, lane) = ((at + r) / LANES, (at + r) % LANES);
            for h in 0..self.kv_heads {
                let keys = &mut self.keys[(h * self.tiles + tile) * head_dim * LANES..][..head_dim * LANES];
                for (d, x) in k[h * head_dim..][..head_dim].iter().enumerate() {
                    keys[d * LANES + lane] = *x;
                }
                let at = (h * self.tiles * LANES + at + r) * padded_dim;
                self.values[at..at + head_dim].copy_from_slice(&v[h * head_dim..][..head_dim]);
            }
        }
    }

    /// Copies position `from` to position `to`.
    pub fn copy(&mut self, from: usize, to: usize) {
        let (head_dim, padded_dim) = (self.head_dim, self.head_dim.next_multiple_of(LANES));
        for h in 0..self.kv_heads {
            let key = |at: usize| (h * self.tiles + at / LANES) * head_dim * LANES + at % LANES;
            for d in 0..head_dim {
                self.keys[key(to) + d * LANES] = self.keys[key(from) + d * LANES];
            }
            let value = |at: usize| (h * self.tiles * LANES + at) * padded_dim;
            self.values.copy_within(value(from)..value(from) + head_dim, value(to));
        }
    }
}

/// `n` zeros. The operating system allocates their pages only when they are written, so unused capacity costs
/// no memory.
///
/// # Errors
/// [`Error::Memory`] with `what` needs how many bytes.
pub(super) fn zeros(n: usize, what: impl Fn() -> String) -> Result<Vec<f32>> {
    // Try to reserve first, because `vec!` aborts if there is no memory.
    let mut probe = Vec::<f32>::new();
    probe.try_reserve_exact(n).map_err(|_| Error::Memory(format!("not enough memory: {}", what())))?;
    // The compiler may remove an unused allocation, and with it the error.
    drop(std::hint::black_box(probe));
    Ok(vec![0.0; n])
}
