//! Rotary position embedding: its parameters and inverse frequencies.

use std::f64::consts::TAU;

/// How inverse frequencies are scaled. Field meanings and formulas are those of Hugging Face's
/// `modeling_rope_utils`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
    Default,
    /// All frequencies are divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// Low frequencies are divided by `factor`, high ones are kept, and those between are blended (Llama
    /// 3.1).
    Llama3 {
        /// At least 1.
        factor: f64,
        /// A frequency with at most this many rotations within the original context counts as low.
        low_freq_factor: f64,
        /// A frequency with at least this many rotations within the original context counts as high.
        high_freq_factor: f64,
        /// The context, in positions, that the model was trained with before scaling.
        original_max_positions: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// At least 1.
        factor: f64,
        /// A frequency with at least this many rotations within the original context is kept.
        beta_fast: f64,
        /// A frequency with at most this many rotations is divided by `factor`.
        beta_slow: f64,
        /// The context, in positions, that the model was trained with before scaling.
        original_max_positions: usize,
        /// Factor on cos and sin, resolved from `attention_factor`, `mscale`, `mscale_all_dim` or the
        /// default.
        attention_factor: f64,
        /// Whether the bounds of the blended range are rounded outwards to whole pairs of dimensions.
        truncate: bool,
    },
}

/// Rotary embedding, half-split layout: dimensions `d` and `d + rotary_dims/2` of a head form a pair
/// (`docs/dflash.md` 3.5).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Number of leading dimensions of a head that are rotated: `head_dim`, or fewer with
    /// `partial_rotary_factor`.
    pub rotary_dims: usize,
    /// How frequencies are scaled for long contexts.
    pub scaling: RopeScaling,
}

impl Rope {
    /// Inverse frequencies `[rotary_dims / 2]` and the factor on cos and sin, by Hugging Face's formulas
    /// (`modeling_rope_utils`). YaRN is arXiv 2309.00071; `llama3` is the scheme of Meta's Llama 3.1 release.
    pub fn frequencies(&self) -> (Vec<f64>, f64) {
        let dim = self.rotary_dims as f64;
        let pairs = self.rotary_dims / 2;
        let unscaled = (0..pairs).map(|i| self.theta.powf(-2.0 * i as f64 / dim));
        match self.scaling {
            RopeScaling::Default => (unscaled.collect(), 1.0),
            RopeScaling::Linear { factor } => (unscaled.map(|f| f / factor).collect(), 1.0),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
                // Between the two bounds, the scaled and the unscaled frequency are blended.
                let scaled = unscaled.map(|f| {
                    let rotations = original_max_positions as f64 * f / TAU;
                    let weight = (rotations - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    blend(f / factor, f, weight)
                });
                (scaled.collect(), 1.0)
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_positions,
                attention_factor,
                truncate,
            } => {
                // The pair index whose frequency has this many rotations within the original context.
                let pair_of = |rotations: f64| {
                    dim * (original_max_positions as f64 / (rotations * TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair_of(beta_fast), pair_of(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let low = low.max(0.0);
                let high = high.min(dim - 1.0);
                let high = if low == high { high + 0.001 } else { high };
                let scaled = unscaled.enumerate().map(|(i, f)| {
                    let ramp = (i as f64 - low) / (high - low);
                    blend(f, f / factor, ramp)
                });
                (scaled.collect(), attention_factor)
            }
        }
    }
}

/// `from` at weight 0 and below, `to` at weight 1 and above, linear between.
fn blend(from: f64, to: f64, weight: f64) -> f64 {
    let weight = weight.clamp(0.0, 1.0);
    from * (1.0 - weight) + to * weight
}
