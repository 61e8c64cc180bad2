//! Rotary position embedding: its fields in `config.json`, its parameters and inverse frequencies.

use crate::checkpoint::json::{Field, Fields};
use crate::error::excerpt;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::f64::consts::TAU;

pub(super) const MAX_POSITIONS: usize = 1 << 24;

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

// ---- config.json ----

/// Fields of RoPE settings that every type may have. Hugging Face writes the original length even if no
/// formula uses it.
const COMMON: [&str; 5] =
    ["rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"];
/// Fields that assign frequencies to the three position axes of multimodal models.
const SECTIONS: [&str; 2] = ["mrope_section", "mrope_interleaved"];
/// Parameters of YaRN's formula.
const YARN: [&str; 7] =
    ["factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"];
/// Parameters of Llama 3.1's formula.
const LLAMA3: [&str; 3] = ["factor", "low_freq_factor", "high_freq_factor"];
/// Parameters of formulas that this engine does not have, with the value that leaves a formula unchanged.
const OTHERS: [(&str, &str); 7] = [
    ("short_factor", ""),
    ("long_factor", ""),
    ("short_mscale", "1"),
    ("long_mscale", "1"),
    ("alpha", "1"),
    ("extrapolation_factor", "1"),
    ("llama_4_scaling_beta", ""),
];

/// The rotary embedding of a config.
pub(crate) struct Found {
    pub(crate) rope: Rope,
    /// The context that YaRN gives, if it is longer than `max_position_embeddings`.
    pub(crate) max_positions: usize,
    /// Sentences for the user.
    pub(crate) notes: Vec<String>,
}

/// Reads RoPE settings: `rope_theta` and `rope_scaling` (older configs) or `rope_parameters` (newer ones).
/// `extra` is searched first for `partial_rotary_factor`. Configs of hybrids must have `rope_theta`, and
/// rotate a quarter of a head by default.
pub(crate) fn read(
    config: &Fields,
    extra: &Fields,
    hybrid: bool,
    head_dim: usize,
    max_positions: usize,
) -> Result<Found> {
    let (older, newer) = (config.get("rope_scaling"), config.get("rope_parameters"));
    if let (Some(a), Some(b)) = (&older, &newer) {
        let scaling = |f: &Field| -> Result<Map<String, Value>> {
            let map = f.object("")?.map.iter().filter(|(name, _)| *name != "rope_theta");
            Ok(map.map(|(name, value)| (name.clone(), value.clone())).collect())
        };
        if scaling(a)? != scaling(b)? {
            return Err(Error::Model(format!(
                "{}: rope_scaling and rope_parameters differ, expected only one, or equal values",
                config.file
            )));
        }
    }
    let nothing = Map::new();
    let table = match (older, newer) {
        (_, Some(field)) => field.object("rope_parameters.")?,
        (Some(field), None) => field.object("rope_scaling.")?,
        (None, None) => Fields { map: &nothing, ..*config },
    };
    if let Some((layer_type, _)) = table.map.iter().find(|(_, value)| value.is_object()) {
        return Err(Error::Unsupported(format!(
            "{}: {}{} holds RoPE settings for some layers, expected the same settings for all",
            config.file,
            table.prefix,
            excerpt(layer_type)
        )));
    }
    let above_one = |field: Field| field.number("a number above 1", |x| x > 1.0);
    let inner = table.get("rope_theta").map(above_one).transpose()?;
    let outer = config.get("rope_theta").map(above_one).transpose()?;
    if let (Some(a), Some(b)) = (inner, outer)
        && a != b
    {
        return Err(Error::Model(format!(
            "{}: {}rope_theta is {a} and rope_theta is {b}, expected one value",
            config.file, table.prefix
        )));
    }
    let theta = match inner.or(outer) {
        None if hybrid => return Err(config.absent("rope_theta")),
        theta => theta.unwrap_or(10_000.0),
    };

    let partial = [extra, &table, config].into_iter().find_map(|t| t.get("partial_rotary_factor"));
    let (fraction, name) = match partial {
        None => (if hybrid { 0.25 } else { 1.0 }, "partial_rotary_factor".to_string()),
        Some(field) => (field.number("a number above 0 and at most 1", |x| x > 0.0 && x <= 1.0)?, field.name),
    };
    // Truncated, as in Hugging Face.
    let rotary_dims = (head_dim as f64 * fraction) as usize;
    if rotary_dims < 2 || !rotary_dims.is_multiple_of(2) {
        return Err(Error::Model(format!(
            "{}: {name} = {fraction} of head_dim {head_dim} rotates {rotary_dims} dims, expected an even number from 2",
            config.file
        )));
    }

    let at_least_one = |name: &str| table.need(name)?.number("a number from 1", |x| x >= 1.0);
    let positive = |name: &str| match table.get(name) {
        Some(field) => Some(field.number("a number above 0", |x| x > 0.0)).transpose(),
        None => Ok(None),
    };
    let original = |field: Field| field.integer(1, MAX_POSITIONS);
    let kind = match table.get("rope_type").or_else(|| table.get("type")) {
        Some(field) => field.string()?.to_string(),
        None if table.get("factor").is_some() => return Err(table.absent("rope_type")),
        None => "default".into(),
    };
    let scaling = match kind.as_str() {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear { factor: at_least_one("factor")? },
        "llama3" => {
            let low = table.need("low_freq_factor")?.number("a number above 0", |x| x > 0.0)?;
            let high = table.need("high_freq_factor")?;
            RopeScaling::Llama3 {
                factor: at_least_one("factor")?,
                low_freq_factor: low,
                high_freq_factor: high.number("a number above low_freq_factor", |x| x > low)?,
                original_max_positions: original(table.need("original_max_position_embeddings")?)?,
            }
        }
        "yarn" => {
            let factor = at_least_one("factor")?;
            let magnitude = |scale: f64| 0.1 * scale * factor.ln() + 1.0;
            // Hugging Face treats 0 as absent in these four.
            let given = |name: &str| match table.get(name) {
                Some(field) => {
                    field.number("a number from 0", |x| x >= 0.0).map(|x| Some(x).filter(|x| *x > 0.0))
                }
                None => Ok(None),
            };
            let attention_factor =
                match (positive("attention_factor")?, given("mscale")?, given("mscale_all_dim")?) {
                    (Some(factor), ..) => factor,
                    (None, Some(scale), Some(all_dim)) => magnitude(scale) / magnitude(all_dim),
                    _ => magnitude(1.0),
                };
            let beta_slow = given("beta_slow")?.unwrap_or(1.0);
            let beta_fast = given("beta_fast")?.unwrap_or(32.0);
            if beta_fast < beta_slow {
                return Err(Error::Model(format!(
                    "{}: {}beta_fast is {beta_fast}, expected at least beta_slow, which is {beta_slow}",
                    config.file, table.prefix
                )));
            }
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                original_max_positions: table
                    .get("original_max_position_embeddings")
                    .map_or(Ok(max_positions), original)?,
                attention_factor,
                truncate: table.get("truncate").map_or(Ok(true), |f| f.boolean())?,
            }
        }
        other => {
            return Err(table.unsupported("rope_type", other, "default, linear, llama3 or yarn"));
        }
    };
    let mut notes = unused_fields(&table, &kind, hybrid)?;
    if hybrid {
        check_sections(&table, rotary_dims)?;
    }
    let max_positions = match scaling {
        RopeScaling::Yarn { factor, original_max_positions, .. }
            if table.get("original_max_position_embeddings").is_some() =>
        {
            let scaled = factor * original_max_positions as f64;
            if scaled > MAX_POSITIONS as f64 {
                return Err(Error::Model(format!(
                    "{}: {}factor x original_max_position_embeddings is {scaled} positions, expected at most {MAX_POSITIONS}",
                    config.file, table.prefix
                )));
            }
            if scaled as usize > max_positions {
                notes.push(format!(
                    "{}: YaRN raises the context from {max_positions} to {} positions ({}factor {factor} x \
                     original_max_position_embeddings {original_max_positions})",
                    config.file, scaled as usize, table.prefix
                ));
            }
            max_positions.max(scaled as usize)
        }
        _ => max_positions,
    };
    Ok(Found { rope: Rope { theta, rotary_dims, scaling }, max_positions, notes })
}

/// Checks that the sections of the position axes, if there are any, cover all frequencies.
fn check_sections(table: &Fields, rotary_dims: usize) -> Result<()> {
    let Some(sections) = table.get("mrope_section") else { return Ok(()) };
    let sizes = sections.array()?;
    let sizes: Vec<usize> = sizes.iter().map(|size| size.integer(0, MAX_POSITIONS)).collect::<Result<_>>()?;
    let pairs = rotary_dims / 2;
    match sizes.iter().sum::<usize>() == pairs {
        true => Ok(()),
        false => Err(sections.wrong(&format!("sections that add up to {pairs}, the pairs of rotated dims"))),
    }
}

/// Looks at the fields that the formula of `kind` does not use. Fields that no formula uses are notes, as in
/// Hugging Face. Parameters of another formula are an error, unless their value leaves a formula unchanged.
fn unused_fields(table: &Fields, kind: &str, hybrid: bool) -> Result<Vec<String>> {
    // A text token has the same position on all axes of a multimodal model, whatever the sections.
    let axes = |name: &str| hybrid && SECTIONS.contains(&name);
    let used: &[&str] = match kind {
        "linear" => &["factor"],
        "llama3" => &LLAMA3,
        "yarn" => &YARN,
        _ => &[],
    };
    let mut unused = Vec::new();
    for name in table.map.keys().map(String::as_str) {
        let unknown = !COMMON.contains(&name) && !used.contains(&name) && !axes(name);
        let Some(field) = table.get(name).filter(|_| unknown) else { continue };
        let known = YARN.iter().chain(&LLAMA3).find(|known| **known == name).map(|_| "1");
        let neutral = known.or(OTHERS.iter().find(|(other, _)| *other == name).map(|(_, neutral)| *neutral));
        match neutral {
            None => unused.push(excerpt(name)),
            Some(neutral) if field.is_neutral(neutral) => {}
            Some(_) => {
                return Err(Error::Unsupported(format!(
                    "{}: {} is {}, which rope_type {kind} does not use: this engine would compute other positions",
                    table.file,
                    field.name,
                    field.found()
                )));
            }
        }
    }
    Ok(match unused.is_empty() {
        true => vec![],
        false => vec![format!(
            "{}: {}{} {} ignored, because no formula of rope_type {kind} uses {}",
            table.file,
            table.prefix,
            excerpt(&unused.join(", ")),
            if unused.len() == 1 { "is" } else { "are" },
            if unused.len() == 1 { "it" } else { "them" }
        )],
    })
}
