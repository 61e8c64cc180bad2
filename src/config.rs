//! `config.json` of target and drafter: read, checked, and refused by name where this engine cannot run it.
//! Everything the models need comes from here, nothing from folder names. Field meanings: dflash.md section 1
//! (arXiv 2602.06036 and the published checkpoints) and Hugging Face's Qwen3 and Llama configurations.

use crate::Result;
use crate::weights::Folder;

/// Which keys one layer's queries see, beside the rule that committed context is always `k < anchor`.
/// With `p` the query's position and `k` the key's: causal: `k <= p`; window `W`: `p - k < W`, and, if not causal,
/// `k - p < W` too (dflash.md 3.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    pub causal: bool,
    pub window: Option<usize>,
}

/// How inverse frequencies are scaled, with Hugging Face's formulas (`modeling_rope_utils`).
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    Default,
    Linear {
        factor: f64,
    },
    Llama3 {
        factor: f64,
        low_freq_factor: f64,
        high_freq_factor: f64,
        original_max_positions: usize,
    },
    Yarn {
        factor: f64,
        beta_fast: f64,
        beta_slow: f64,
        original_max_positions: usize,
        /// magnitude of cos and sin, resolved from `attention_factor`, `mscale`, `mscale_all_dim` or the default
        attention_factor: f64,
        truncate: bool,
    },
}

/// Rotary embedding, half-split layout: dims `d` and `d + rotary_dims/2` form a pair (dflash.md 3.5).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    pub theta: f64,
    /// Leading dims of a head that are rotated; `head_dim` unless `partial_rotary_factor` says less.
    pub rotary_dims: usize,
    pub scaling: RopeScaling,
}

/// The shape of a pre-norm decoder stack, shared by target and drafter.
#[derive(Debug, Clone, PartialEq)]
pub struct Stack {
    pub hidden: usize,
    pub intermediate: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub eps: f32,
    pub rope: Rope,
    /// RMSNorm over each head of q and k before RoPE (Qwen3 yes, Llama no).
    pub qk_norm: bool,
    /// One per layer; its length is the number of layers.
    pub attention: Vec<Attention>,
    pub max_positions: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    Qwen3,
    Llama,
}

/// A target: `config.json` of a Qwen3 or Llama causal language model.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetConfig {
    pub family: Family,
    pub stack: Stack,
    pub vocab: usize,
    /// The output head is the embedding table.
    pub tied: bool,
    /// Stop ids: `generation_config.json` if it names any, else `config.json`. May be empty.
    pub eos: Vec<u32>,
}

/// A drafter: `config.json` in the z-lab layout (dflash.md section 1).
#[derive(Debug, Clone, PartialEq)]
pub struct DrafterConfig {
    pub stack: Stack,
    pub vocab: usize,
    pub num_target_layers: usize,
    /// Target layers whose *output* is read, in list order (dflash.md 3.1).
    pub taps: Vec<usize>,
    pub mask_token: u32,
    /// Rows of a trained block, anchor included.
    pub block: usize,
    pub embedding_scale: f32,
    pub output_multiplier: f32,
    /// `logits = cap * tanh(logits / cap)` after the multiplier.
    pub softcap: Option<f32>,
}

impl TargetConfig {
    /// Reads `config.json` and, if there, `generation_config.json`.
    pub fn open(_folder: &Folder) -> Result<Self> {
        unimplemented!()
    }
}

impl DrafterConfig {
    pub fn open(_folder: &Folder) -> Result<Self> {
        unimplemented!()
    }
}

/// Refuses a drafter that was not made for this target: hidden size of the taps, vocabulary, layer count, layer
/// ids, mask id. Names both files.
pub fn check_pair(
    _target: &TargetConfig,
    _target_folder: &Folder,
    _drafter: &DrafterConfig,
    _drafter_folder: &Folder,
) -> Result<()> {
    unimplemented!()
}
