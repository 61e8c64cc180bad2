//! Reads and checks `config.json` of target and drafter. If this engine cannot run a model, the error names
//! the field that shows it. All properties of a model come from these files, none from folder names. The
//! meanings of the fields are in `docs/dflash.md` section 1 (arXiv 2602.06036 and the published checkpoints)
//! and in Hugging Face's Qwen3 and Llama configurations.

pub use crate::checkpoint::drafter::{DrafterConfig, Overrides, Slots};
use crate::checkpoint::folder::Folder;
pub use crate::checkpoint::identify::{DrafterFamily, Family, Identity, Layout};
use crate::checkpoint::identify::{refuse_quantised, target_architecture};
use crate::checkpoint::json::{Document, Field, Fields};
use crate::checkpoint::rope::{self, MAX_POSITIONS};
pub use crate::checkpoint::rope::{Rope, RopeScaling};
use crate::checkpoint::stop_ids::StopIds;
use crate::{Error, Result};

// Bounds on sizes: far above every published model, and small enough that no product of sizes overflows a
// u64.
pub(super) const MAX_LAYERS: usize = 1 << 10;
const MAX_HIDDEN: usize = 1 << 16;
const MAX_INTERMEDIATE: usize = 1 << 20;
const MAX_HEADS: usize = 1 << 10;
const MAX_HEAD_DIM: usize = 1 << 10;
pub(super) const MAX_VOCAB: usize = 1 << 24;
pub(super) const MAX_BLOCK: usize = 1 << 10;
const MAX_EOS: usize = 1 << 10;

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

impl Stack {
    /// KV cache bytes per token in all layers, with elements of `element` bytes.
    pub fn kv_bytes_per_token(&self, element: usize) -> usize {
        2 * self.attention.len() * self.kv_heads * self.head_dim * element
    }

    pub(super) fn tensors(&self, prefix: &str, list: &mut Vec<(String, Vec<usize>)>) {
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
    same("number of target layers", drafter.num_target_layers.unwrap_or(layers), layers)?;
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

/// Adds the `eos_token_id` of `file`: one id, a list, or nothing.
fn add_eos(eos: &mut StopIds, config: &Fields, file: &str, vocab: usize) -> Result<()> {
    let Some(field) = config.get("eos_token_id") else { return Ok(()) };
    let ids = if field.value.is_array() { field.array()? } else { vec![field] };
    if ids.len() > MAX_EOS {
        return Err(Error::Model(format!(
            "{}: eos_token_id has {} ids, expected at most {MAX_EOS}",
            config.file,
            ids.len()
        )));
    }
    ids.iter().try_for_each(|id| {
        eos.add(id.integer(0, vocab - 1)? as u32, file);
        Ok(())
    })
}

/// Reads the fields that target and drafter share, the window of each layer, and notes for the user. The
/// caller fills in `Stack::attention`. `extra` is searched first for `partial_rotary_factor`. Defaults are
/// those of Hugging Face's Qwen3 and Llama configurations.
pub(super) fn stack(
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
