//! Fills caches with noise, so that a pass at any context length can be measured without a prompt.

use super::{Cache, LayerCache};

impl Cache {
    /// Fills positions `0..positions` of an empty cache with noise: keys, values and states between -1/2 and
    /// 1/2. The cache must have capacity for them.
    pub fn fill_synthetic(&mut self, positions: usize) {
        // A multiplicative hash of the index, in 24 bits.
        let noise = |i: usize| {
            let hash = (i as u32).wrapping_mul(0x9e37_79b1) >> 8;
            hash as f32 / (1 << 24) as f32 - 0.5
        };
        self.states().for_each(|state| state.fill(noise));
        for layer in &mut self.layers {
            let LayerCache::Kv(kv) = layer else { continue };
            let width = kv.kv_heads * kv.head_dim;
            for at in 0..positions {
                let row: Vec<f32> = (at * width..(at + 1) * width).map(noise).collect();
                kv.write(at, &row, &row);
            }
        }
        self.extend_rope(positions);
        (self.len, self.committed) = (positions, positions);
    }
}
