//! Reads and checks `config.json` of target and drafter. If this engine cannot run a model, the error names
//! the field that shows it. All properties of a model come from these files, none from folder names. The
//! meanings of the fields are in `docs/dflash.md` section 1 (arXiv 2602.06036 and the published checkpoints)
//! and in Hugging Face's Qwen3 and Llama configurations.

use crate::checkpoint::folder::Folder;
use crate::checkpoint::json::{Document, Field, Fields};
pub use crate::checkpoint::layouts::Family;
use crate::checkpoint::layouts::{refuse_other_drafters, refuse_quantised, target_architecture};
use crate::checkpoint::rope::{self, MAX_POSITIONS};
pub use crate::checkpoint::rope::{Rope, RopeScaling};
use crate::checkpoint::stop_ids::StopIds;
use crate::{Error, Result};
use serde_json::Map;

// Bounds on sizes: far above every published model, and small enough that no product of sizes overflows a
// u64.
const MAX_LAYERS: usize = 1 << 10;
const MAX_HIDDEN: usize = 1 << 16;
const MAX_INTERMEDIATE: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 10;
const MAX_HEAD_DIM: usize = 1 << 10;
const MAX_VOCAB: usize = 1 << 24;
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

/// A target: `config.json` of a Qwen3 or Llama causal language model.
#[derive(Debug, Clone, PartialEq)]
pub struct TargetConfig {
    /// Its architecture.
    pub family: Family,
    /// Its layers.
    pub stack: Stack,
    /// Rows of the embedding table; token ids are below this.
    pub vocab: usize,
    /// Whether the output head is the embedding table. [`Pair::open`](crate::checkpoint::pair::Pair::open)
    /// clears it if the files hold another head.
    pub tied: bool,
    /// The `eos_token_id` of `generation_config.json` and of `config.json`. May be empty. The tokenizer's
    /// files can name more ([`crate::text::tokenizer::stop_ids`]).
    pub eos: StopIds,
    /// What the user should know about the config: one sentence each.
    pub notes: Vec<String>,
}

/// A drafter: `config.json` in the z-lab layout (`docs/dflash.md` section 1).
#[derive(Debug, Clone, PartialEq)]
pub struct DrafterConfig {
    /// Its layers.
    pub stack: Stack,
    /// The vocabulary size of the target that it was trained with. It drafts only ids below this.
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
    /// What the user should know about the config: one sentence each.
    pub notes: Vec<String>,
}

impl TargetConfig {
    /// Reads `config.json` and, if it exists, `generation_config.json`.
    ///
    /// # Errors
    /// [`Error::Model`] for a missing or malformed file or field; [`Error::Unsupported`] for an architecture
    /// or a variant that this engine does not support; [`Error::Option`] if the folder has a drafter.
    pub fn open(folder: &Folder) -> Result<Self> {
        let document = Document::need(folder, "config.json")?;
        let config = document.fields();
        let family = target_architecture(&document, &config)?;
        let model_type = if family == Family::Qwen3 { "qwen3" } else { "llama" };
        config.only("model_type", model_type)?;
        refuse_quantised(&config)?;
        let (stack, windows, mut notes) = stack(&config, family, &config)?;
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
            if let Some(field) = generation.fields().get("stop_strings").filter(|f| !f.is_neutral("")) {
                let (file, found) = (field.file, field.found());
                notes.push(format!(
                    "{file}: stop_strings is {found}: only stop strings that are given end an answer"
                ));
            }
        }
        add_eos(&mut eos, &config, "config.json", vocab)?;
        Ok(TargetConfig { family, stack: Stack { attention, ..stack }, vocab, tied, eos, notes })
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
    /// [`Error::Unsupported`] for a drafter of another kind names its kind and the field that identifies it.
    pub fn open(folder: &Folder) -> Result<Self> {
        DrafterConfig::open_with_taps(folder, None)
    }

    /// As [`DrafterConfig::open`], with `taps` in place of `target_layer_ids`.
    ///
    /// # Errors
    /// As [`DrafterConfig::open`]; [`Error::Option`] for taps that the target does not have.
    pub fn open_with_taps(folder: &Folder, taps: Option<&[usize]>) -> Result<Self> {
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

        let (stack, windows, mut notes) = stack(&config, Family::Qwen3, &nested)?;
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
        let listed = match either("target_layer_ids") {
            Some(field) => {
                let ids = field.array()?.iter().map(|id| id.integer(0, MAX_LAYERS)).collect::<Result<_>>()?;
                Some((ids, field.name))
            }
            None => None,
        };
        let taps = match (taps, listed) {
            (Some(taps), listed) => {
                if let Some((_, problem)) = wrong_taps(taps, num_target_layers) {
                    return Err(Error::option("taps", problem));
                }
                if let Some((ids, name)) = listed.filter(|(ids, _): &(Vec<usize>, _)| ids != taps) {
                    notes.push(format!("{}: taps {taps:?} replace {name}, which is {ids:?}", config.file));
                }
                taps.to_vec()
            }
            (None, Some((ids, name))) => {
                if let Some((error, problem)) = wrong_taps(&ids, num_target_layers) {
                    return Err(error(format!("{}: {name} {problem}", config.file)));
                }
                ids
            }
            (None, None) => {
                return Err(Error::Model(format!(
                    "{}: dflash_config.target_layer_ids is absent, expected the layers of the target that the drafter \
                     reads: give them as `taps` 1,9,...",
                    config.file
                )));
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
            notes,
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

/// Checks that a drafter was made for this target: hidden size, number of target layers, taps, mask token.
/// Vocabulary sizes may differ, because the drafter has no tensor of that size: it drafts the ids that both
/// have. Context lengths may differ: beyond the drafter's, the target decodes autoregressively.
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
    same("number of target layers", drafter.num_target_layers, layers)?;
    if let Some(tap) = drafter.taps.iter().find(|&&tap| tap >= layers) {
        return Err(Error::Model(format!(
            "{theirs} was not made for {ours}: it reads layer {tap}, and the target's last is {}",
            layers.saturating_sub(1)
        )));
    }
    if drafter.mask_token as usize >= target.vocab {
        return Err(Error::Model(format!(
            "{theirs} does not fit {ours}: its mask token is {}, and the target's embedding has only {} rows",
            drafter.mask_token, target.vocab
        )));
    }
    Ok(())
}

/// Makes an error of one kind from its sentence.
type ErrorKind = fn(String) -> Error;

/// What is wrong with taps of a target with this many layers: the kind of error, and a sentence without its
/// subject.
fn wrong_taps(taps: &[usize], target_layers: usize) -> Option<(ErrorKind, String)> {
    if taps.is_empty() {
        return Some((Error::Model, "is empty, expected at least one layer".into()));
    }
    let last = target_layers - 1;
    taps.iter().enumerate().find_map(|(i, &tap)| match tap {
        _ if tap > last => Some((
            Error::Model as ErrorKind,
            format!("holds {tap}, expected layers from 0 to {last} (num_target_layers is {target_layers})"),
        )),
        _ if tap == last => Some((
            Error::Unsupported,
            format!(
                "holds {tap}, the target's last layer: engines differ on whether the final norm applies to it"
            ),
        )),
        _ if taps[..i].contains(&tap) => Some((Error::Model, format!("holds {tap} twice"))),
        _ => None,
    })
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

/// Reads the fields that target and drafter share, the window of each layer, and notes for the user. The
/// caller fills in `Stack::attention`. `extra` is searched first for `partial_rotary_factor`. Defaults are
/// those of Hugging Face's Qwen3 and Llama configurations.
fn stack(
    config: &Fields,
    family: Family,
    extra: &Fields,
) -> Result<(Stack, Vec<Option<usize>>, Vec<String>)> {
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
    let rope::Found { rope, max_positions, notes } = rope::read(config, extra, head_dim, max_positions)?;
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
    Ok((stack, windows, notes))
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
