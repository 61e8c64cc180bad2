//! Reads and checks `config.json` of target and drafter. If this engine cannot run a model, the error names
//! the field that shows it. All properties of a model come from these files, none from folder names. The
//! meanings of the fields are in `docs/dflash.md` section 1 (arXiv 2602.06036 and the published checkpoints)
//! and in Hugging Face's configurations of the targets.

use crate::checkpoint::delta_net::{CONVOLUTION, DeltaNet};
pub use crate::checkpoint::drafter::{DrafterConfig, Overrides, Slots};
use crate::checkpoint::folder::Folder;
pub use crate::checkpoint::identify::{DrafterFamily, Family, Identity, Layout};
use crate::checkpoint::identify::{check_nested_type, refuse_quantised, target_architecture};
use crate::checkpoint::json::{Document, Field, Fields};
use crate::checkpoint::moe::Moe;
use crate::checkpoint::rope::{self, MAX_POSITIONS};
pub use crate::checkpoint::rope::{Rope, RopeScaling};
use crate::checkpoint::stop_ids::StopIds;
use crate::error::excerpt;
use crate::{Error, Result};

// Bounds on sizes: far above every published model, and small enough that no product of sizes overflows a
// u64.
pub(super) const MAX_LAYERS: usize = 1 << 10;
const MAX_HIDDEN: usize = 1 << 16;
pub(super) const MAX_INTERMEDIATE: usize = 1 << 20;
pub(super) const MAX_HEADS: usize = 1 << 10;
pub(super) const MAX_HEAD_DIM: usize = 1 << 10;
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
    /// Width of the MLP; 0 with [`Stack::moe`].
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
    /// Mask of each layer, `[layers]`. That of a Gated DeltaNet layer has no meaning.
    pub attention: Vec<Attention>,
    /// Whether attention has an output gate per head and dimension, whose projection is part of `q_proj`.
    pub output_gate: bool,
    /// Whether the weights of all norms but those of Gated DeltaNet's outputs are w of a gain 1 + w.
    pub norm_offset: bool,
    /// Gated DeltaNet, in place of attention in some layers.
    pub delta_net: Option<DeltaNet>,
    /// A mixture of experts in place of the dense MLP, in every layer.
    pub moe: Option<Moe>,
    /// Maximum positions of a sequence (`max_position_embeddings`).
    pub max_positions: usize,
}

/// A target: `config.json` of a causal language model, or of a multimodal model whose text model it is.
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
        let top = document.fields();
        let family = target_architecture(&document, &top)?;
        // Multimodal classes nest the text model.
        let config = match top.get("text_config").filter(|_| family.is_hybrid()) {
            Some(field) => field.object("text_config.")?,
            None => top,
        };
        check_nested_type(&config, family)?;
        refuse_quantised(&top)?;
        refuse_quantised(&config)?;
        refuse_variants(&config, family)?;
        let (stack, windows, mut notes) = stack(&config, family, &config)?;
        if stack.rope.rotary_dims != stack.head_dim && !family.is_hybrid() {
            let found = format!("{} of {} dims", stack.rope.rotary_dims, stack.head_dim);
            return Err(config.unsupported("partial_rotary_factor", &found, "all"));
        }
        let vocab = config.need("vocab_size")?.integer(1, MAX_VOCAB)?;
        let tied = config.get("tie_word_embeddings").or_else(|| top.get("tie_word_embeddings"));
        let tied = tied.map_or(Ok(false), |f| f.boolean())?;
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
        add_eos(&mut eos, &top, "config.json", vocab)?;
        Ok(TargetConfig { family, stack: Stack { attention, ..stack }, vocab, tied, eos, notes })
    }

    /// Name and shape of every tensor the checkpoint must hold, `[out, in]` for linear layers. Stacked
    /// experts are listed one by one ([`crate::checkpoint::moe`]).
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
    /// The shape of layer `i`, if it is Gated DeltaNet.
    pub fn delta_net(&self, i: usize) -> Option<&DeltaNet> {
        self.delta_net.as_ref().filter(|shape| shape.layers[i])
    }

    /// Number of layers that are Gated DeltaNet.
    pub fn delta_net_layers(&self) -> usize {
        self.delta_net.as_ref().map_or(0, |shape| shape.layers.iter().filter(|layer| **layer).count())
    }

    /// KV cache bytes per token in all layers, with elements of `element` bytes.
    pub fn kv_bytes_per_token(&self, element: usize) -> usize {
        2 * (self.attention.len() - self.delta_net_layers()) * self.kv_heads * self.head_dim * element
    }

    /// Bytes of all recurrent states of a sequence on the CPU, in f32, with the last inputs of their
    /// convolutions.
    pub fn state_bytes(&self) -> usize {
        let each = |shape: &DeltaNet| shape.state() + (CONVOLUTION - 1) * shape.channels();
        self.delta_net_layers() * self.delta_net.as_ref().map_or(0, each) * size_of::<f32>()
    }

    /// Bytes of the records of one row of a pass in all layers, on the CPU.
    pub fn record_bytes(&self) -> usize {
        self.delta_net_layers() * self.delta_net.as_ref().map_or(0, DeltaNet::record) * size_of::<f32>()
    }

    /// Rows of `q_proj`: queries, and gates if there are any.
    pub(crate) fn query_rows(&self) -> usize {
        self.heads * self.head_dim * if self.output_gate { 2 } else { 1 }
    }

    pub(super) fn tensors(&self, prefix: &str, list: &mut Vec<(String, Vec<usize>)>) {
        let (h, ff) = (self.hidden, self.intermediate);
        let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        for i in 0..self.attention.len() {
            let at = format!("{prefix}layers.{i}");
            let mut push = |part: &str, shape: &[usize]| {
                list.push((format!("{at}.{part}.weight"), shape.to_vec()));
            };
            push("input_layernorm", &[h]);
            if self.delta_net(i).is_none() {
                push("self_attn.q_proj", &[self.query_rows(), h]);
                push("self_attn.k_proj", &[kv, h]);
                push("self_attn.v_proj", &[kv, h]);
                push("self_attn.o_proj", &[h, q]);
                if self.qk_norm {
                    push("self_attn.q_norm", &[self.head_dim]);
                    push("self_attn.k_norm", &[self.head_dim]);
                }
            }
            push("post_attention_layernorm", &[h]);
            if self.moe.is_none() {
                push("mlp.gate_proj", &[ff, h]);
                push("mlp.up_proj", &[ff, h]);
                push("mlp.down_proj", &[h, ff]);
            }
            if let Some(shape) = self.delta_net(i) {
                let named = |(name, shape)| (format!("{at}.linear_attn.{name}"), shape);
                list.extend(shape.tensors(h).into_iter().map(named));
            }
            if let Some(moe) = &self.moe {
                let named = |(name, shape)| (format!("{at}.mlp.{name}"), shape);
                list.extend(moe.tensors(h).into_iter().map(named));
            }
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

/// Fields of Qwen3.8-Flash-Next and its relatives, which are another architecture in the classes of hybrids.
const OTHER_HYBRIDS: [&str; 4] = ["hc_", "indexer_", "ple_", "ngram_"];

/// Refuses variants of MoE and hybrid targets that this engine does not run.
fn refuse_variants(config: &Fields, family: Family) -> Result<()> {
    if family.is_moe() || family.is_hybrid() {
        if config.get("use_sliding_window").is_some_and(|field| !field.is_neutral("")) {
            return Err(config.unsupported("use_sliding_window", "true", "false"));
        }
        config.need("num_key_value_heads")?;
        config.need("head_dim")?;
    }
    if !family.is_hybrid() {
        return Ok(());
    }
    if !config.get("attn_output_gate").map_or(Ok(true), |field| field.boolean())? {
        return Err(config.unsupported("attn_output_gate", "false", "true"));
    }
    if let Some(gate) = config.map.get("output_gate_type")
        && !["swish", "silu"].iter().any(|known| gate == known)
    {
        return Err(config.unsupported("output_gate_type", &gate.to_string(), "swish or silu"));
    }
    let other = |name: &&String| OTHER_HYBRIDS.iter().any(|prefix| name.starts_with(prefix));
    match config.map.keys().filter(other).find_map(|name| config.get(name)) {
        Some(field) if !field.is_neutral("") => Err(Error::Unsupported(format!(
            "{}: {} is {}, which belongs to another architecture than {family}",
            field.file,
            excerpt(&field.name),
            field.found()
        ))),
        _ => Ok(()),
    }
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
    let layers = config.need("num_hidden_layers")?.integer(1, MAX_LAYERS)?;
    let moe = family.is_moe().then(|| Moe::read(config, family, layers)).transpose()?;
    let intermediate = match moe {
        None => config.need("intermediate_size")?.integer(1, MAX_INTERMEDIATE)?,
        Some(_) => 0,
    };
    let grouped = family == Family::Qwen3Next;
    let delta_net = family.is_hybrid().then(|| DeltaNet::read(config, layers, grouped)).transpose()?;
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
    let rope::Found { rope, max_positions, notes } =
        rope::read(config, extra, family.is_hybrid(), head_dim, max_positions)?;
    let windows = match delta_net {
        None => windows(config, family, layers)?,
        Some(_) => vec![None; layers],
    };
    let stack = Stack {
        hidden,
        intermediate,
        heads,
        kv_heads,
        head_dim,
        eps,
        rope,
        qk_norm: family != Family::Llama,
        attention: vec![],
        output_gate: family.is_hybrid(),
        norm_offset: family.is_hybrid(),
        delta_net,
        moe,
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
