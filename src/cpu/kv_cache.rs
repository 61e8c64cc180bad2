//! Keys and values of a sequence on the CPU, one layer at a time, laid out for
//! [`crate::cpu::ops::attention`].

use crate::cpu::simd::LANES;
use crate::{Error, Result};

/// Keys and values of one layer, positions `0..capacity`.
pub struct Kv {
    /// `[kv_heads][tiles][head_dim][16]`: lane = position modulo 16, so scores of 16 keys come out of one
    /// vector.
    pub(crate) keys: Vec<f32>,
    /// `[kv_heads][16 * tiles][dims rounded up to 16]`
    pub(crate) values: Vec<f32>,
    /// Allocated tiles, of 16 positions each.
    pub(crate) tiles: usize,
    pub(crate) heads: usize,
    pub(crate) dims: usize,
}

impl Kv {
    /// An empty cache with a capacity of `positions`.
    ///
    /// # Errors
    /// [`Error::Memory`] with the bytes that it needs.
    pub fn new(kv_heads: usize, head_dim: usize, positions: usize) -> Result<Kv> {
        let tiles = positions.div_ceil(LANES);
        let wide = head_dim.next_multiple_of(LANES);
        let (keys, values) = (kv_heads * tiles * head_dim * LANES, kv_heads * tiles * LANES * wide);
        let zeros = |n: usize| {
            // Reserved first, because `vec!` aborts where there is no memory. The system makes zeroed pages
            // only when they are written, so the capacity for a long answer costs nothing until the answer is
            // long.
            let mut probe = Vec::<f32>::new();
            probe.try_reserve_exact(n).map_err(|_| {
                Error::Memory(format!(
                    "not enough memory: the KV cache of each layer needs {} bytes for {positions} positions (prompt \
                     and max_tokens)",
                    (keys + values) * size_of::<f32>()
                ))
            })?;
            // The compiler may remove an unused allocation, and with it the error.
            drop(std::hint::black_box(probe));
            Ok::<_, Error>(vec![0.0; n])
        };
        Ok(Kv { keys: zeros(keys)?, values: zeros(values)?, tiles, heads: kv_heads, dims: head_dim })
    }

    /// Grows the capacity to `positions` in all and keeps the first `used`.
    ///
    /// # Errors
    /// As [`Kv::new`].
    pub fn grow(&mut self, positions: usize, used: usize) -> Result<()> {
        if positions <= self.tiles * LANES {
            return Ok(());
        }
        let mut grown = Kv::new(self.heads, self.dims, positions)?;
        let tiles = used.div_ceil(LANES);
        for (new, old, width) in [
            (&mut grown.keys, &self.keys, self.dims * LANES),
            (&mut grown.values, &self.values, self.dims.next_multiple_of(LANES) * LANES),
        ] {
            for h in 0..self.heads {
                let old = &old[h * self.tiles * width..][..tiles * width];
                new[h * grown.tiles * width..][..tiles * width].copy_from_slice(old);
            }
        }
        *self = grown;
        Ok(())
    }

    /// Writes `k`, `v` `[rows][kv_heads * head_dim]` at positions `at..`.
    pub fn write(&mut self, at: usize, k: &[f32], v: &[f32]) {
        let (dims, wide) = (self.dims, self.dims.next_multiple_of(LANES));
        for (r, (k, v)) in k.chunks(self.heads * dims).zip(v.chunks(self.heads * dims)).enumerate() {
            let (tile, lane) = ((at + r) / LANES, (at + r) % LANES);
            for h in 0..self.heads {
                let keys = &mut self.keys[(h * self.tiles + tile) * dims * LANES..][..dims * LANES];
                for (d, x) in k[h * dims..][..dims].iter().enumerate() {
                    keys[d * LANES + lane] = *x;
                }
                let at = (h * self.tiles * LANES + at + r) * wide;
                self.values[at..at + dims].copy_from_slice(&v[h * dims..][..dims]);
            }
        }
    }

    /// Copies position `from` to position `to`.
    pub fn copy(&mut self, from: usize, to: usize) {
        let (dims, wide) = (self.dims, self.dims.next_multiple_of(LANES));
        for h in 0..self.heads {
            let key = |at: usize| (h * self.tiles + at / LANES) * dims * LANES + at % LANES;
            for d in 0..dims {
                self.keys[key(to) + d * LANES] = self.keys[key(from) + d * LANES];
            }
            let value = |at: usize| (h * self.tiles * LANES + at) * wide;
            self.values.copy_within(value(from)..value(from) + dims, value(to));
        }
    }
}
