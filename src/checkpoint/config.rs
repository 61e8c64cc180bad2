//! Reads and checks `config.json` of target and drafter. If this engine cannot run a model, the error names
//! the field that shows it. All properties of a model come from these files, none from folder names. The
//! meanings of the fields are in `docs/dflash.md` section 1 (arXiv 2602.06036 and the published checkpoints)
//! and in Hugging Face's Qwen3 and Llama configurations.

use crate::checkpoint::folder::Folder;
use crate::checkpoint::json::{Document, Field, Fields};
pub use crate::checkpoint::rope::{Rope, RopeScaling};
use crate::checkpoint::stop_ids::StopIds;
use crate::error::excerpt;
use crate::{Error, Result};
use serde_json::{Map, Value};

// Bounds on sizes: far above every published model, and small enough that no product of sizes overflows a
// u64.
const MAX_LAYERS: usize = 1 << 10;
const MAX_HIDDEN: usize = 1 << 16;
const MAX_INTERMEDIATE: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 10;
const MAX_HEAD_DIM: usize = 1 << 10;
const MAX_VOCAB: usize = 1 << 24;
const MAX_POSITIONS: usize = 1 << 24;
const MAX_BLOCK: usize = 1 << 10;

/// The attention mask of one layer. Let `p` be the query's position and `k` the key's. Causal means `k <= p`.
/// A window `W` means `p - k < W` and, if not causal, also `k - p < W` (`docs/dflash.md` 3.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attention {
    /// Whether queries attend to earlier positions only.
    pub causal: bool,
    /// Width of the sliding window in positions; `None` for full attention.
    pub window: Option<usize>,
}

/// The shape of a pre-norm decoder stack, shared by target and drafter.
#[derive(Debug, Clone, PartialEq)]
pub struct Stack {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Dimensions of a head, an even number.
    pub head_dim: usize,
    /// Epsilon of every RMSNorm.
    pub eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Whether q and k have an RMSNorm per head before RoPE (Qwen3 yes, Llama no).
    pub qk_norm: bool,
    /// Mask of each layer, `[layers]`.
    pub attention: Vec<Attention>,
    /// Maximum positions of a sequence (`max_position_embeddings`).
    pub max_positions: usize,
}

/// Architectures of targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `Qwen3ForCausalLM`
    Qwen3,
    /// `LlamaForCausalLM`
    Llama,
}

/// A target: `config.json` of a Qwen3 or Llama causal language model.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetConfig {
    /// Its architecture.
    pub family: Family,
    /// Its layers.
    pub stack: Stack,
    /// Rows of the embedding table; token ids are below this.
    pub vocab: usize,
    /// Whether the output head is the embedding table.
    pub tied: bool,
    /// The `eos_token_id` of `generation_config.json` and of `config.json`. May be empty. The tokenizer's
    /// files can name more ([`crate::text::tokenizer::Text::stop_ids`]).
    pub eos: StopIds,
}

/// A drafter: `config.json` in the z-lab layout (`docs/dflash.md` section 1).
#[derive(Debug, Clone, PartialEq)]
pub struct DrafterConfig {
    /// Its layers.
    pub stack: Stack,
    /// The target's vocabulary size.
    pub vocab: usize,
    /// The target's number of layers.
    pub num_target_layers: usize,
    /// Target layers whose *output* the drafter reads, in list order (`docs/dflash.md` 3.1).
    pub taps: Vec<usize>,
    /// Token id of the masked rows of a block.
    pub mask_token: u32,
    /// Rows of a trained block, anchor included.
    pub block: usize,
    /// Factor on the embeddings of a block's rows.
    pub embedding_scale: f32,
    /// Factor on the logits.
    pub output_multiplier: f32,
    /// `logits = cap * tanh(logits / cap)` after the multiplier.
    pub softcap: Option<f32>,
}

/// Fields of a drafter's `config.json` that this engine does not support (`docs/dflash.md` A): (field, kind
/// of drafter that has it, neutral value). A field may be null, false, 0, empty, or have its neutral value:
/// each of these means the same as its absence.
const VARIANTS: [(&str, &str, &str); 20] = [
    ("conv_kernel_size", "DFlash2", ""),
    ("conv_group_size", "DFlash2", ""),
    ("selector_rank", "DFlash2", ""),
    ("selector_top_k", "DFlash2", ""),
    ("markov_rank", "DSpark (DeepSpec)", ""),
    ("sample_from_anchor", "DSpark (DeepSpec)", ""),
    ("enable_confidence_head", "DSpark (DeepSpec)", ""),
    ("projector_type", "Domino or DSpark", "dflash"),
    ("shift_label", "Domino", ""),
    ("gru_hidden_dim", "Domino", ""),
    ("pure_draft_prefix_len", "Domino", ""),
    ("fc_layernorm", "per-tap norm", ""),
    ("attention_mode", "other-attention", "gqa"),
    ("attention_modes", "other-attention", ""),
    ("use_swa", "MiMo-style", ""),
    ("attention_sink_bias", "MiMo-style", ""),
    ("add_swa_attention_sink_bias", "MiMo-style", ""),
    ("attention_value_scale", "MiMo-style", "1"),
    ("attn_output_gate", "gated-attention", ""),
    ("eagle_config", "EAGLE", ""),
];
/// Fields that only the speculators layout has.
const SPECULATORS: [&str; 5] = [
    "speculators_model_type",
    "speculators_config",
    "transformer_layer_config",
    "draft_vocab_size",
    "aux_hidden_state_layer_ids",
];
/// The fields of `dflash_config` that are supported. Any other must be one of [`VARIANTS`] with a neutral
/// value.
const DFLASH: [&str; 10] = [
    "target_layer_ids",
    "mask_token_id",
    "block_size",
    "num_target_layers",
    "input_embedding_scale",
    "output_multiplier",
    "final_logit_softcapping",
    "causal",
    "partial_rotary_factor",
    "swa_window_size",
];
/// Fields of RoPE settings that are allowed for every type. Hugging Face writes the original length even if
/// no formula uses it.
const ROPE: [&str; 5] =
    ["rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"];
/// Further fields of YaRN's settings.
const YARN: [&str; 7] =
    ["factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"];

impl TargetConfig {
    /// Reads `config.json` and, if it exists, `generation_config.json`.
    ///
    /// # Errors
    /// [`Error::Model`] for a missing or malformed file or field; [`Error::Unsupported`] for an architecture
    /// or a variant that this engine does not support; [`Error::Option`] if the folder has a drafter.
    pub fn open(folder: &Folder) -> Result<Self> {
        let document = Document::need(folder, "config.json")?;
        let config = document.fields();
        let architecture = config.architecture()?;
        let family = match architecture {
            "Qwen3ForCausalLM" => Family::Qwen3,
            "LlamaForCausalLM" => Family::Llama,
            _ if architecture.starts_with("DFlash") || config.get("dflash_config").is_some() => {
                return Err(Error::option(
                    "target",
                    format!(
                        "is given {}, which describes a drafter ({}): expected a target",
                        document.file,
                        excerpt(architecture)
                    ),
                ));
            }
            _ => {
                return Err(config.unsupported(
                    "architectures",
                    architecture,
                    "Qwen3ForCausalLM or LlamaForCausalLM",
                ));
            }
        };
        let model_type = if family == Family::Qwen3 { "qwen3" } else { "llama" };
        config.only("model_type", model_type)?;
        refuse_quantised(&config)?;
        let (stack, windows) = stack(&config, family, &config)?;
        if stack.rope.rotary_dims != stack.head_dim {
            let found = format!("{} of {} dims", stack.rope.rotary_dims, stack.head_dim);
            return Err(config.unsupported("partial_rotary_factor", &found, "all"));
        }
        let vocab = config.need("vocab_size")?.integer(1, MAX_VOCAB)?;
        let tied = config.get("tie_word_embeddings").map_or(Ok(false), |f| f.boolean())?;
        let attention = windows.into_iter().map(|window| Attention { causal: true, window }).collect();
        let generation = Document::open(folder, "generation_config.json")?;
        let mut eos = StopIds::default();
        if let Some(generation) = &generation {
            add_eos(&mut eos, &generation.fields(), "generation_config.json", vocab)?;
        }
        add_eos(&mut eos, &config, "config.json", vocab)?;
        Ok(TargetConfig { family, stack: Stack { attention, ..stack }, vocab, tied, eos })
    }

    /// Name and shape of every tensor the checkpoint must hold, `[out, in]` for linear layers.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.stack.hidden;
        let mut list = vec![("model.embed_tokens.weight".into(), vec![self.vocab, hidden])];
        self.stack.tensors("model.", &mut list);
        list.push(("model.norm.weight".into(), vec![hidden]));
        if !self.tied {
            list.push(("lm_head.weight".into(), vec![self.vocab, hidden]));
        }
        list
    }
}

impl DrafterConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// As [`TargetConfig::open`], but [`Error::Option`] if the folder has a target. The
    /// [`Error::Unsupported`] for a drafter of another kind names the field that identifies it.
    pub fn open(folder: &Folder) -> Result<Self> {
        let document = Document::need(folder, "config.json")?;
        let config = document.fields();
        let nothing = Map::new();
        let nested = match config.get("dflash_config") {
            Some(field) => field.object("dflash_config.")?,
            None => Fields { map: &nothing, ..config },
        };
        refuse_other_drafters(&config, &nested)?;
        // Every field of `dflash_config` may also be at top level; the inner one wins (docs/dflash.md section
        // 1).
        let either = |name: &str| nested.get(name).or_else(|| config.get(name));
        let need = |name: &str| either(name).ok_or_else(|| config.absent(name));

        let (stack, windows) = stack(&config, Family::Qwen3, &nested)?;
        let layers = windows.len();
        let causal = match config.get("is_causal").or_else(|| either("causal")) {
            Some(field) => Some(field.boolean()?),
            None => None,
        };
        // Sliding layers are causal unless the config says otherwise (docs/dflash.md 3.6).
        let attention = windows
            .into_iter()
            .map(|window| Attention { causal: causal.unwrap_or(window.is_some()), window })
            .collect();

        let vocab = config.need("vocab_size")?.integer(1, MAX_VOCAB)?;
        let num_target_layers = need("num_target_layers")?.integer(1, MAX_LAYERS)?;
        let taps = match either("target_layer_ids") {
            Some(field) => {
                let ids =
                    field.array()?.iter().map(|id| id.integer(0, MAX_LAYERS)).collect::<Result<Vec<_>>>()?;
                check_taps(&ids, num_target_layers, &config, &field.name)?;
                ids
            }
            None => {
                let ids = default_taps(num_target_layers, layers);
                check_taps(&ids, num_target_layers, &config, "target_layer_ids (absent, so the default)")?;
                ids
            }
        };
        let positive = |name: &str, default: f32| {
            either(name).map_or(Ok(default), |field| {
                field.number_f32("a number above 0, in the range of f32", |x| x > 0.0)
            })
        };
        let softcap = match either("final_logit_softcapping") {
            Some(field) => {
                Some(field.number_f32("a number in the range of f32", |_| true)?).filter(|&cap| cap > 0.0)
            }
            None => None,
        };
        Ok(DrafterConfig {
            stack: Stack { attention, ..stack },
            vocab,
            num_target_layers,
            taps,
            mask_token: need("mask_token_id")?.integer(0, vocab - 1)? as u32,
            block: either("block_size").map_or(Ok(16), |field| field.integer(2, MAX_BLOCK))?,
            embedding_scale: positive("input_embedding_scale", 1.0)?,
            output_multiplier: positive("output_multiplier", 1.0)?,
            softcap,
        })
    }

    /// Name and shape of every tensor the checkpoint must hold (`docs/dflash.md` section 2), `[out, in]` for
    /// linear layers.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.stack.hidden;
        let mut list = vec![
            ("fc.weight".into(), vec![hidden, self.taps.len() * hidden]),
            ("hidden_norm.weight".into(), vec![hidden]),
        ];
        self.stack.tensors("", &mut list);
        list.push(("norm.weight".into(), vec![hidden]));
        list
    }
}

impl Stack {
    /// KV cache bytes per token in all layers, with elements of `element` bytes.
    pub fn kv_bytes_per_token(&self, element: usize) -> usize {
        2 * self.attention.len() * self.kv_heads * self.head_dim * element
    }

    fn tensors(&self, prefix: &str, list: &mut Vec<(String, Vec<usize>)>) {
        let (h, ff) = (self.hidden, self.intermediate);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        for i in 0..self.attention.len() {
            let mut push = |part: &str, shape: &[usize]| {
                list.push((format!("{prefix}layers.{i}.{part}.weight"), shape.to_vec()));
            };
            push("input_layernorm", &[h]);
            push("self_attn.q_proj", &[q, h]);
            push("self_attn.k_proj", &[kv, h]);
            push("self_attn.v_proj", &[kv, h]);
            push("self_attn.o_proj", &[h, q]);
            if self.qk_norm {
                push("self_attn.q_norm", &[self.head_dim]);
                push("self_attn.k_norm", &[self.head_dim]);
            }
            push("post_attention_layernorm", &[h]);
            push("mlp.gate_proj", &[ff, h]);
            push("mlp.up_proj", &[ff, h]);
            push("mlp.down_proj", &[h, ff]);
        }
    }
}

/// Checks that a drafter was made for this target: hidden size, vocabulary size, number of target layers,
/// taps, mask token. Context lengths may differ: beyond the drafter's, the target decodes autoregressively.
///
/// # Errors
/// [`Error::Model`], naming both files, for a drafter of another target.
pub fn check_pair(
    target: &TargetConfig,
    target_folder: &Folder,
    drafter: &DrafterConfig,
    drafter_folder: &Folder,
) -> Result<()> {
    let (ours, theirs) =
        (target_folder.described_file("config.json"), drafter_folder.described_file("config.json"));
    let same = |what: &str, drafters: usize, targets: usize| match drafters == targets {
        true => Ok(()),
        false => Err(Error::Model(format!(
            "{theirs} was not made for {ours}: its {what} is {drafters}, the target's is {targets}"
        ))),
    };
    let layers = target.stack.attention.len();
    same("hidden size", drafter.stack.hidden, target.stack.hidden)?;
    same("vocabulary size", drafter.vocab, target.vocab)?;
    same("number of target layers", drafter.num_target_layers, layers)?;
    if let Some(tap) = drafter.taps.iter().find(|&&tap| tap >= layers) {
        return Err(Error::Model(format!(
            "{theirs} was not made for {ours}: it reads layer {tap}, and the target's last is {}",
            layers.saturating_sub(1)
        )));
    }
    if drafter.mask_token as usize >= target.vocab {
        return Err(Error::Model(format!(
            "{theirs} was not made for {ours}: its mask token is {}, and the target's vocabulary has {} rows",
            drafter.mask_token, target.vocab
        )));
    }
    Ok(())
}

/// Returns an error if `config` belongs to a target or to a drafter of another kind. The error names the
/// field or architecture that identifies it. `nested` is `dflash_config`, or empty.
fn refuse_other_drafters(config: &Fields, nested: &Fields) -> Result<()> {
    let architecture = config.architecture();
    if let Ok(name @ ("Qwen3ForCausalLM" | "LlamaForCausalLM")) = architecture
        && nested.map.is_empty()
    {
        return Err(Error::option(
            "draft",
            format!("is given {}, which describes a target ({name}): expected a DFlash drafter", config.file),
        ));
    }
    for name in SPECULATORS {
        if let Some(field) = config.get(name) {
            return Err(Error::Unsupported(format!(
                "{}: {name} makes it a drafter in the speculators layout: this engine runs the z-lab layout (DFlashDraftModel)",
                field.file
            )));
        }
    }
    if let Ok("DFlash2DraftModel") = architecture {
        return Err(config.unsupported("architectures", "DFlash2DraftModel", "DFlashDraftModel"));
    }
    for table in [nested, config] {
        for (name, kind, neutral) in VARIANTS {
            if let Some(field) = table.get(name).filter(|f| !f.is_neutral(neutral)) {
                return Err(Error::Unsupported(format!(
                    "{}: {} is {}, which makes it a {kind} drafter: this engine runs standard DFlash drafters",
                    field.file,
                    field.name,
                    field.found()
                )));
            }
        }
    }
    let known = |name: &str| DFLASH.contains(&name) || VARIANTS.iter().any(|(v, ..)| *v == name);
    if let Some((name, _)) = nested.map.iter().find(|(name, value)| !value.is_null() && !known(name)) {
        return Err(Error::Unsupported(format!(
            "{}: dflash_config.{} is unknown: this engine runs standard DFlash drafters",
            config.file,
            excerpt(name)
        )));
    }
    let architecture = architecture?;
    if architecture != "DFlashDraftModel" {
        return Err(config.unsupported("architectures", architecture, "DFlashDraftModel"));
    }
    config.only("model_type", "qwen3")?;
    refuse_quantised(config)
}

/// The taps if `target_layer_ids` is absent (`docs/dflash.md` section 1). [`check_taps`] may refuse them.
fn default_taps(target_layers: usize, layers: usize) -> Vec<usize> {
    if layers == 1 {
        return vec![target_layers / 2];
    }
    let span = target_layers as f64 - 4.0;
    let id = |i: usize| (1.0 + i as f64 * span / (layers as f64 - 1.0)).round_ties_even();
    (0..layers).map(|i| id(i).max(0.0) as usize).collect()
}

fn check_taps(taps: &[usize], target_layers: usize, config: &Fields, name: &str) -> Result<()> {
    let file = config.file;
    if taps.is_empty() {
        return Err(Error::Model(format!("{file}: {name} is empty, expected at least one layer")));
    }
    for (i, &tap) in taps.iter().enumerate() {
        if tap >= target_layers {
            return Err(Error::Model(format!(
                "{file}: {name} holds {tap}, expected layers from 0 to {} (num_target_layers is {target_layers})",
                target_layers - 1
            )));
        }
        if tap == target_layers - 1 {
            return Err(Error::Unsupported(format!(
                "{file}: {name} holds {tap}, the target's last layer: engines differ on whether the final norm applies to it"
            )));
        }
        if taps[..i].contains(&tap) {
            return Err(Error::Model(format!("{file}: {name} holds {tap} twice")));
        }
    }
    Ok(())
}

/// Adds the `eos_token_id` of `file`: one id, a list, or nothing.
fn add_eos(eos: &mut StopIds, config: &Fields, file: &str, vocab: usize) -> Result<()> {
    let Some(field) = config.get("eos_token_id") else { return Ok(()) };
    let ids = if field.value.is_array() { field.array()? } else { vec![field] };
    ids.iter().try_for_each(|id| {
        eos.add(id.integer(0, vocab - 1)? as u32, file);
        Ok(())
    })
}

/// Reads the fields that target and drafter share, and the window of each layer. The caller fills in
/// `Stack::attention`. `extra` is searched first for `partial_rotary_factor`. Defaults are those of Hugging
/// Face's Qwen3 and Llama configurations.
fn stack(config: &Fields, family: Family, extra: &Fields) -> Result<(Stack, Vec<Option<usize>>)> {
    config.only("hidden_act", "silu")?;
    for name in ["attention_bias", "mlp_bias"] {
        if config.get(name).is_some_and(|f| !f.is_neutral("")) {
            return Err(config.unsupported(name, "true", "false"));
        }
    }
    let hidden = config.need("hidden_size")?.integer(1, MAX_HIDDEN)?;
    let intermediate = config.need("intermediate_size")?.integer(1, MAX_INTERMEDIATE)?;
    let layers = config.need("num_hidden_layers")?.integer(1, MAX_LAYERS)?;
    let heads = config.need("num_attention_heads")?.integer(1, MAX_HEADS)?;
    let kv_heads = config.get("num_key_value_heads").map_or(Ok(heads), |f| f.integer(1, MAX_HEADS))?;
    if !heads.is_multiple_of(kv_heads) {
        return Err(Error::Model(format!(
            "{}: num_attention_heads is {heads}, expected a multiple of num_key_value_heads, which is {kv_heads}",
            config.file
        )));
    }
    let head_dim = match config.get("head_dim") {
        Some(field) => field.integer(2, MAX_HEAD_DIM)?,
        None if family == Family::Qwen3 => 128,
        None => hidden / heads,
    };
    if !head_dim.is_multiple_of(2) || head_dim == 0 || head_dim > MAX_HEAD_DIM {
        return Err(Error::Model(format!(
            "{}: head_dim is {head_dim}, expected an even number from 2 to {MAX_HEAD_DIM}",
            config.file
        )));
    }
    let eps = config
        .get("rms_norm_eps")
        .map_or(Ok(1e-6), |f| f.number_f32("a number above 0 and at most 1", |x| x > 0.0 && x <= 1.0))?;
    let max_positions = config.need("max_position_embeddings")?.integer(1, MAX_POSITIONS)?;
    let rope = rope(config, extra, head_dim, max_positions)?;
    let windows = windows(config, family, layers)?;
    let stack = Stack {
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim,
        eps,
        rope,
        qk_norm: family == Family::Qwen3,
        attention: vec![],
        max_positions,
    };
    Ok((stack, windows))
}

/// The window of each layer, as Hugging Face's Qwen3 resolves it: by `layer_types` or, without them, for
/// every layer from `max_window_layers` on if `use_sliding_window` is set.
fn windows(config: &Fields, family: Family, layers: usize) -> Result<Vec<Option<usize>>> {
    let used = config.get("use_sliding_window").map(|f| f.boolean()).transpose()?;
    let window = config.get("sliding_window").map(|f| f.integer(1, MAX_POSITIONS)).transpose()?;
    let Some(types) = config.get("layer_types") else {
        if used != Some(true) || family == Family::Llama {
            return Ok(vec![None; layers]);
        }
        let first = config.get("max_window_layers").map_or(Ok(28), |f| f.integer(0, MAX_LAYERS))?;
        return Ok((0..layers).map(|i| window.filter(|_| i >= first)).collect());
    };
    let list = types.array()?;
    if list.len() != layers {
        return Err(Error::Model(format!(
            "{}: layer_types has {} entries, expected {layers} (num_hidden_layers)",
            config.file,
            list.len()
        )));
    }
    let window_of = |field: &Field| match field.string()? {
        "full_attention" => Ok(None),
        "sliding_attention" if family == Family::Qwen3 => {
            let window = window.filter(|_| used != Some(false)).ok_or_else(|| {
                Error::Model(format!(
                    "{}: {} is sliding_attention, but sliding_window is not set or use_sliding_window is false",
                    config.file, field.name
                ))
            })?;
            Ok(Some(window))
        }
        other => Err(config.unsupported(&field.name, other, "full_attention or (Qwen3) sliding_attention")),
    };
    list.iter().map(window_of).collect()
}

/// Reads RoPE settings: `rope_theta` and `rope_scaling` (older configs) or `rope_parameters` (newer ones).
fn rope(config: &Fields, extra: &Fields, head_dim: usize, max_positions: usize) -> Result<Rope> {
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
    let theta = inner.or(outer).unwrap_or(10_000.0);

    let partial = [extra, &table, config].into_iter().find_map(|t| t.get("partial_rotary_factor"));
    let rotary_dims = match partial {
        None => head_dim,
        Some(field) => {
            let fraction = field.number("a number above 0 and at most 1", |x| x > 0.0 && x <= 1.0)?;
            // Truncated, as in Hugging Face.
            let dims = (head_dim as f64 * fraction) as usize;
            if dims < 2 || !dims.is_multiple_of(2) {
                return Err(Error::Model(format!(
                    "{}: {} = {fraction} of head_dim {head_dim} rotates {dims} dims, expected an even number from 2",
                    field.file, field.name
                )));
            }
            dims
        }
    };

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
    let known: &[&str] = match kind.as_str() {
        "linear" => &["factor"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor"],
        "yarn" => &YARN,
        _ => &[],
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
    let known = |name: &str| ROPE.contains(&name) || known.contains(&name);
    if let Some((name, _)) = table.map.iter().find(|(name, value)| !value.is_null() && !known(name)) {
        return Err(Error::Unsupported(format!(
            "{}: {}{} is unknown: this engine runs rope_type {kind} without it",
            config.file,
            table.prefix,
            excerpt(name)
        )));
    }
    Ok(Rope { theta, rotary_dims, scaling })
}

fn refuse_quantised(config: &Fields) -> Result<()> {
    for name in ["quantization_config", "quantization", "compression_config"] {
        if let Some(field) = config.get(name) {
            let method = field
                .value
                .get("quant_method")
                .and_then(Value::as_str)
                .unwrap_or("present without a quant_method");
            return Err(config.unsupported(name, method, "an unquantised checkpoint"));
        }
    }
    Ok(())
}
