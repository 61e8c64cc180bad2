//! The plan of a drafter: everything that the decoders need to know about it, read from its config and
//! completed from its files. The decoders read the plan, never the family's name. `docs/drafters.md`
//! describes the layouts.

use crate::checkpoint::config::{
    Attention, Family, MAX_BLOCK, MAX_LAYERS, MAX_VOCAB, Stack, TargetConfig, stack,
};
use crate::checkpoint::eagle3::{self, Chain};
use crate::checkpoint::folder::Folder;
use crate::checkpoint::identify::{DrafterFamily, Identity, Layout, identify, refuse_others};
use crate::checkpoint::json::{Document, Field, Fields};
use crate::checkpoint::rope::MAX_POSITIONS;
use crate::checkpoint::safetensors::Checkpoint;
use crate::{Error, Result};
use serde_json::Map;
use std::fmt;
use std::sync::Arc;

/// Which row of a block predicts which position, with the anchor at position `s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Slots {
    /// Row `r` predicts position `s + r`; row 0, the anchor's, predicts nothing.
    FillIn,
    /// Row `r` predicts position `s + r + 1`; the anchor's row predicts the first draft.
    AnchorFirst,
}

impl fmt::Display for Slots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Slots::FillIn => "fill-in",
            Slots::AnchorFirst => "anchor-first",
        })
    }
}

/// What the user says about a drafter, in place of its config or where nothing else says it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    /// The target's layers whose outputs the drafter reads, in its order.
    pub taps: Option<Vec<usize>>,
    /// Which position a row of the block predicts.
    pub slots: Option<Slots>,
}

/// The heads of a DSpark drafter, which walk over the rows of a block: each row's logits are corrected by the
/// token drafted before it (`docs/drafters.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Markov {
    /// What is computed from the token before.
    pub kind: MarkovKind,
    /// Width of the embedding of the token before.
    pub rank: usize,
    /// The confidence head, if there is one; true: it also reads that embedding.
    pub confidence: Option<bool>,
}

impl Markov {
    /// The layer that joins the embedding of the token before with the row `[hidden]`: its name, outputs and
    /// inputs. It has a bias.
    pub(crate) fn joint(&self, hidden: usize) -> Option<(&'static str, usize, usize)> {
        let rank = self.rank;
        match self.kind {
            MarkovKind::Vanilla => None,
            MarkovKind::Gated => Some(("markov_head.gate_proj", rank, hidden + rank)),
            MarkovKind::Rnn => Some(("markov_head.joint_proj", 3 * rank, 2 * rank + hidden)),
        }
    }

    /// As [`Markov::joint`], for the confidence head.
    pub(crate) fn confidence(&self, hidden: usize) -> Option<(&'static str, usize, usize)> {
        let previous = self.confidence?;
        Some(("confidence_head.proj", 1, hidden + if previous { self.rank } else { 0 }))
    }
}

/// Kinds of Markov heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkovKind {
    /// The embedding itself.
    Vanilla,
    /// The embedding, gated by the row.
    Gated,
    /// The state of an rnn over embeddings and rows.
    Rnn,
}

/// The convolutions of a DFlash2 drafter, along the rows of a block, before and after attention and MLP of
/// each layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Convolution {
    /// Rows that a row reads: itself and those before it.
    pub taps: usize,
    /// Channels that share the part of a kernel that depends on the row.
    pub group: usize,
}

impl Convolution {
    /// Name and shape of the tensors whose names begin with `prefix`: the constant part of the kernels before
    /// and after a sublayer, and the projection to the part that depends on the row.
    pub(crate) fn tensors(&self, prefix: &str, hidden: usize) -> [(String, Vec<usize>); 2] {
        let Convolution { taps, group } = *self;
        [
            (format!("{prefix}.base_kernel"), vec![2, taps, hidden]),
            (format!("{prefix}.kernel_projection.weight"), vec![2 * taps * (hidden / group), hidden]),
        ]
    }
}

/// The candidate selector of a DFlash2 drafter: each draft is chosen among the best tokens of its row, by
/// scores that depend on the token before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selector {
    /// Columns of the codebooks.
    pub rank: usize,
    /// Tokens of a row that may be drafted.
    pub candidates: usize,
}

impl Selector {
    /// Name and shape of its tensors: the projection of the row, and the codebooks of the token before and of
    /// the candidate.
    pub(crate) fn tensors(&self, hidden: usize, vocab: usize) -> [(String, Vec<usize>); 3] {
        let [predecessor, successor] = CODEBOOKS.map(|name| (name.to_string(), vec![vocab, self.rank]));
        let projection = "candidate_selector.hidden_projection.weight".to_string();
        [(projection, vec![self.rank, hidden]), predecessor, successor]
    }
}

/// The codebooks of a selector. Their names may also end in `.weight`.
const CODEBOOKS: [&str; 2] =
    ["candidate_selector.predecessor_codebook", "candidate_selector.successor_codebook"];

/// How the drafts of a round depend on each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dependence {
    /// They do not: each row of a block drafts on its own.
    Independent,
    /// A walk over the rows of a block corrects the logits of each row.
    Walk(Markov),
    /// A selector chooses among the best tokens of each row of a block.
    Select(Selector),
    /// There is no block: drafts are predicted one after the other.
    Chain(Chain),
}

/// The plan of a drafter.
#[derive(Debug, Clone, PartialEq)]
pub struct DrafterConfig {
    /// Family and layout, for the user. The decoders do not read them.
    pub identity: Identity,
    /// Its layers.
    pub stack: Stack,
    /// The vocabulary size of the target that it was trained with. It drafts only ids below this.
    pub vocab: usize,
    /// The target's number of layers, if the config says it.
    pub num_target_layers: Option<usize>,
    /// Target layers whose *output* the drafter reads, in list order (`docs/dflash.md` 3.1).
    pub taps: Vec<usize>,
    /// Token id of the masked rows of a block; 0 for a chain, which has none.
    pub mask_token: u32,
    /// Rows of a round, the anchor and the drafts: one more than the drafts. The most that were trained or,
    /// for a chain, the default.
    pub block: usize,
    /// Which position a row of the block predicts.
    pub slots: Slots,
    /// Whether the drafter has an embedding table of its own, `[vocab][hidden]`. Else it uses the target's.
    pub own_embedding: bool,
    /// Rows of the drafter's own head; `None`: it uses the target's.
    pub own_head: Option<usize>,
    /// `[own_head]`: the target's id of each row of the head, ascending. `None`: the same ids.
    pub ids: Option<Arc<[u32]>>,
    /// How the drafts of a round depend on each other.
    pub dependence: Dependence,
    /// The convolutions of its layers, if they have any.
    pub convolution: Option<Convolution>,
    /// Factor on the embeddings of a block's rows.
    pub embedding_scale: f32,
    /// Factor on the logits.
    pub output_multiplier: f32,
    /// `logits = cap * tanh(logits / cap)` after the multiplier.
    pub softcap: Option<f32>,
    /// What the user should know about the config: one sentence each.
    pub notes: Vec<String>,
}

/// Most columns of a Markov head.
const MAX_RANK: usize = 1 << 12;
/// Names of the architecture of DFlash drafters in z-lab's layout: z-lab's, and NeMo's for the same layout
/// with a `model.` prefix on tensors.
const ZLAB: [&str; 2] = ["DFlashDraftModel", "Qwen3DFlashDraftModel"];

impl DrafterConfig {
    /// Reads `config.json`.
    ///
    /// # Errors
    /// As [`TargetConfig::open`], but [`Error::Option`] if the folder has a target. The
    /// [`Error::Unsupported`] for a drafter of another kind names its kind and the field that identifies it.
    pub fn open(folder: &Folder) -> Result<Self> {
        DrafterConfig::open_for(folder, &Overrides::default(), None)
    }

    /// As [`DrafterConfig::open`], with overrides. `target_layers`: the target's number of layers, from
    /// which a speculators config without taps gets the default ones.
    ///
    /// # Errors
    /// As [`DrafterConfig::open`]; [`Error::Option`] for taps that the target does not have.
    pub fn open_for(folder: &Folder, overrides: &Overrides, target_layers: Option<usize>) -> Result<Self> {
        let document = Document::need(folder, "config.json")?;
        let config = document.fields();
        let (identity, decided) = identify(&config)?;
        refuse_others(&config, identity, &decided)?;
        let nothing = Map::new();
        let nested = match config.get("dflash_config") {
            Some(field) => field.object("dflash_config.")?,
            None => Fields { map: &nothing, ..config },
        };
        // Every field of `dflash_config` may also be at top level; the inner one wins (docs/dflash.md section
        // 1).
        let either = |name: &str| nested.get(name).or_else(|| config.get(name));
        let need = |name: &str| either(name).ok_or_else(|| config.absent(name));
        let flag = |name: &str| either(name).map(|field| field.boolean()).transpose();

        let body = layers_config(&config, identity)?;
        let eagle = identity.family == DrafterFamily::Eagle3;
        let llama = eagle && body.get("model_type").is_some_and(|f| f.value.as_str() == Some("llama"));
        let family = if llama { Family::Llama } else { Family::Qwen3 };
        let (mut stack, windows, mut notes) = stack(&body, family, &nested)?;
        let chain = if eagle { Some(Chain::read(&config, identity.layout)?) } else { None };
        if chain.is_some() {
            // Published files name the length of the training's texts, and are served beyond it.
            stack.max_positions = MAX_POSITIONS;
        }
        let hidden = stack.hidden;
        if let Some(field) =
            config.get("target_hidden_size").filter(|f| f.value.as_u64() != Some(hidden as u64))
        {
            let expected = format!("{hidden}, the drafter's hidden size");
            return Err(config.unsupported("target_hidden_size", &field.found(), &expected));
        }

        let attention = match chain {
            Some(_) => eagle3::mask(&body, &windows)?,
            None => masks(identity.layout, windows, &config, flag)?,
        };

        let vocab = body.need("vocab_size")?.integer(1, MAX_VOCAB)?;
        let head = match config.get("draft_vocab_size") {
            Some(field) => Some(field.integer(1, vocab)?).filter(|&rows| rows < vocab),
            None => None,
        };
        if let (Some(rows), Layout::ZLab) = (head, identity.layout) {
            let expected = "the whole vocabulary in z-lab's layout";
            return Err(config.unsupported("draft_vocab_size", &rows.to_string(), expected));
        }
        let slots = match (chain, overrides.slots) {
            (Some(_), Some(slots)) => {
                let problem = format!("is {slots}, but {} has {identity}, which has no block", config.file);
                return Err(Error::option("slots", problem));
            }
            (Some(_), None) => Slots::AnchorFirst,
            (None, given) => slots(&config, identity, flag("sample_from_anchor")?, given, &mut notes)?,
        };
        let size =
            |name: &str, default: usize| either(name).map_or(Ok(default), |field| field.integer(1, MAX_RANK));
        let (convolution, dependence) = match (chain, identity.family) {
            (Some(chain), _) => (None, Dependence::Chain(chain)),
            (None, DrafterFamily::DSpark) => (None, markov(&config)?),
            (None, DrafterFamily::DFlash2) => {
                if let Some(rows) = head {
                    let expected = "the whole vocabulary in a DFlash2 drafter";
                    return Err(config.unsupported("draft_vocab_size", &rows.to_string(), expected));
                }
                if slots == Slots::AnchorFirst {
                    return Err(Error::Unsupported(format!(
                        "{}: slots are anchor-first, expected fill-in in a DFlash2 drafter",
                        config.file
                    )));
                }
                let convolution =
                    Convolution { taps: size("conv_kernel_size", 2)?, group: size("conv_group_size", 16)? };
                if !hidden.is_multiple_of(convolution.group) {
                    let expected = format!("a divisor of the hidden size {hidden}");
                    let found = convolution.group.to_string();
                    return Err(config.unsupported("conv_group_size", &found, &expected));
                }
                let selector =
                    Selector { rank: size("selector_rank", 256)?, candidates: size("selector_top_k", 16)? };
                (Some(convolution), Dependence::Select(selector))
            }
            (None, _) => (None, Dependence::Independent),
        };
        let rows = match (either("block_size"), identity.layout) {
            _ if chain.is_some() => eagle3::block(&config)?,
            (Some(field), _) => field.integer(2, MAX_BLOCK)?,
            (None, Layout::Speculators) => 8,
            (None, Layout::DeepSpec) => return Err(config.absent("block_size")),
            (None, _) => 16,
        };

        let num_target_layers = match identity.layout {
            Layout::ZLab => Some(need("num_target_layers")?),
            _ => config.get("num_target_layers"),
        };
        let num_target_layers = num_target_layers.map(|field| field.integer(1, MAX_LAYERS)).transpose()?;
        let target_layers = num_target_layers.or(target_layers);
        let listed = match chain {
            // Taps that are given settle what a list means.
            Some(_) if overrides.taps.is_some() => None,
            Some(_) => eagle3::taps_field(&config, identity.layout)?,
            None if identity.layout == Layout::Speculators => {
                either("aux_hidden_state_layer_ids").map(|field| (field, true))
            }
            None => either("target_layer_ids").map(|field| (field, false)),
        };
        let listed = listed_taps(identity.layout, listed, target_layers)?;
        let taps = match (&overrides.taps, listed) {
            (Some(taps), listed) => {
                if let Some((_, problem)) = wrong_taps(taps, target_layers) {
                    return Err(Error::option("taps", problem));
                }
                if let Some((ids, name)) = listed.filter(|(ids, _)| ids != taps) {
                    notes.push(format!("{}: taps {taps:?} replace {name}, which is {ids:?}", config.file));
                }
                taps.clone()
            }
            (None, Some((ids, name))) => {
                if let Some((error, problem)) = wrong_taps(&ids, target_layers) {
                    return Err(error(format!("{}: {name} {problem}", config.file)));
                }
                ids
            }
            (None, None) => {
                let object = if identity.layout == Layout::ZLab { "dflash_config." } else { "" };
                return Err(Error::Model(format!(
                    "{}: {object}target_layer_ids is absent, expected the layers of the target that the drafter \
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
            identity,
            stack: Stack { attention, ..stack },
            vocab,
            num_target_layers,
            taps,
            mask_token: match chain {
                Some(_) => 0,
                None => need("mask_token_id")?.integer(0, vocab - 1)? as u32,
            },
            block: rows + usize::from(slots == Slots::AnchorFirst && chain.is_none()),
            slots,
            own_embedding: false,
            own_head: head,
            ids: None,
            dependence,
            convolution,
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
        let mut list = vec![("fc.weight".into(), vec![hidden, self.taps.len() * hidden])];
        match self.chain() {
            Some(chain) => chain.tensors(&self.stack, self.taps.len(), &mut list),
            None => {
                list.push(("hidden_norm.weight".into(), vec![hidden]));
                self.stack.tensors("", &mut list);
            }
        }
        list.push(("norm.weight".into(), vec![hidden]));
        if self.own_embedding {
            list.push(("embed_tokens.weight".into(), vec![self.vocab, hidden]));
        }
        list.extend(self.own_head.map(|rows| ("lm_head.weight".into(), vec![rows, hidden])));
        if let Some(convolution) = self.convolution {
            for i in 0..self.stack.attention.len() {
                for name in ["attention_conv", "mlp_conv"] {
                    list.extend(convolution.tensors(&format!("layers.{i}.{name}"), hidden));
                }
            }
        }
        list.extend(self.selector().iter().flat_map(|selector| selector.tensors(hidden, self.vocab)));
        if let Some(walk) = self.walk() {
            let rank = walk.rank;
            let mut add = |name: &str, shape: Vec<usize>| list.push((name.into(), shape));
            add("markov_head.markov_w1.weight", vec![self.vocab, rank]);
            add("markov_head.markov_w2.weight", vec![self.own_head.unwrap_or(self.vocab), rank]);
            for (name, rows, columns) in walk.joint(hidden).into_iter().chain(walk.confidence(hidden)) {
                add(&format!("{name}.weight"), vec![rows, columns]);
                add(&format!("{name}.bias"), vec![rows]);
            }
        }
        list
    }

    /// Gives tensors that have several spellings the names of [`DrafterConfig::tensors`].
    pub(crate) fn rename_tensors(&self, file: &mut Checkpoint) {
        if self.chain().is_some() {
            eagle3::rename_tensors(file);
        }
        for name in CODEBOOKS.into_iter().filter(|_| self.selector().is_some()) {
            if file.shape(name).is_none() {
                file.rename(&format!("{name}.weight"), name);
            }
        }
    }

    /// The heads of a walk, if there is one.
    pub fn walk(&self) -> Option<Markov> {
        if let Dependence::Walk(walk) = self.dependence { Some(walk) } else { None }
    }

    /// The candidate selector, if there is one.
    pub fn selector(&self) -> Option<Selector> {
        if let Dependence::Select(selector) = self.dependence { Some(selector) } else { None }
    }

    /// The chain of a drafter that drafts token by token.
    pub fn chain(&self) -> Option<Chain> {
        if let Dependence::Chain(chain) = self.dependence { Some(chain) } else { None }
    }

    /// Number of rows of a block before the first that predicts a draft.
    pub fn first_row(&self) -> usize {
        usize::from(self.slots == Slots::FillIn)
    }

    /// Completes the plan from the drafter's files: whether its embedding and its head differ from the
    /// target's, and the ids of a reduced vocabulary. Tensors of other families are refused.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for such a tensor; [`Error::Model`] for a vocabulary that contradicts the
    /// config or the target.
    pub(crate) fn complete(
        &mut self,
        weights: &Checkpoint,
        target: &TargetConfig,
        target_weights: &Checkpoint,
    ) -> Result<()> {
        weights.refuse_other_families(self.identity)?;
        if self.chain().is_some() {
            self.notes.extend(eagle3::complete(&mut self.stack, weights));
        }
        let own = |name: &str, of_target: &str| {
            let shape = [self.vocab, self.stack.hidden];
            if weights.shape(name).is_none() {
                return Ok(false);
            }
            let ours = weights.tensor(name, &shape)?;
            match self.vocab == target.vocab {
                true => Ok(!ours.equals(&target_weights.tensor(of_target, &shape)?)?),
                false => Ok::<_, Error>(true),
            }
        };
        let table = "model.embed_tokens.weight";
        self.own_embedding = own("embed_tokens.weight", table)?;
        if self.own_head.is_none()
            && own("lm_head.weight", if target.tied { table } else { "lm_head.weight" })?
        {
            self.own_head = Some(self.vocab);
        }
        if (self.own_embedding && self.vocab < target.vocab)
            || (matches!(self.dependence, Dependence::Walk(_) | Dependence::Select(_))
                && self.vocab != target.vocab)
        {
            return Err(Error::Model(format!(
                "{}: the drafter has embeddings of {} tokens, but the target's vocabulary has {}",
                weights.source(),
                self.vocab,
                target.vocab
            )));
        }
        let Some(rows) = self.own_head else { return weights.refuse_integers("d2t", "draft_vocab_size") };
        if rows < self.vocab {
            self.ids = Some(weights.draft_ids(rows, self.vocab)?.into());
        } else if rows != target.vocab {
            self.ids = Some((0..rows as u32).collect());
        }
        match self.ids.as_ref().and_then(|ids| ids.last()) {
            Some(&last) if last as usize >= target.vocab => Err(Error::Model(format!(
                "{}: the drafter has a token {last}, but the target's vocabulary has only {}",
                weights.source(),
                target.vocab
            ))),
            _ => Ok(()),
        }
    }

    /// Completes the plan of a drafter with random weights: the ids of a reduced vocabulary are spread
    /// evenly.
    pub(crate) fn complete_randomly(&mut self, target_vocab: usize) {
        let id = |i: usize, rows: usize| (i * target_vocab / rows) as u32;
        self.ids = self.own_head.map(|rows| (0..rows).map(|i| id(i, rows)).collect());
    }
}

/// The config of the layers. Their type is Qwen3's, also where a speculators config says llama.
fn layers_config<'a>(config: &Fields<'a>, identity: Identity) -> Result<Fields<'a>> {
    if identity.layout == Layout::Speculators {
        return config.need("transformer_layer_config")?.object("transformer_layer_config.");
    }
    let architecture = config.architecture()?;
    let expected = if identity.family == DrafterFamily::DFlash2 { &["DFlash2DraftModel"][..] } else { &ZLAB };
    if identity.layout == Layout::ZLab && !expected.contains(&architecture) {
        return Err(config.unsupported("architectures", architecture, &expected.join(" or ")));
    }
    if identity.family == DrafterFamily::Eagle3 {
        return match config.get("model_type") {
            Some(field) if !["llama", "qwen3"].contains(&field.string()?) => {
                Err(config.unsupported("model_type", field.string()?, "llama or qwen3"))
            }
            _ => Ok(*config),
        };
    }
    config.only("model_type", "qwen3")?;
    Ok(*config)
}

/// Which position a row predicts: as `given`, or else by the layout and `sample_from_anchor`.
fn slots(
    config: &Fields,
    identity: Identity,
    sample_from_anchor: Option<bool>,
    given: Option<Slots>,
    notes: &mut Vec<String>,
) -> Result<Slots> {
    let of_file = match (identity.layout, sample_from_anchor) {
        (Layout::DeepSpec, _) | (Layout::Speculators, Some(true)) => Some(Slots::AnchorFirst),
        (Layout::Speculators, None) if identity.family == DrafterFamily::DSpark => None,
        _ => Some(Slots::FillIn),
    };
    let slots = given.or(of_file).ok_or_else(|| {
        Error::Model(format!(
            "{}: sample_from_anchor is absent, and releases of speculators differ in its default: give `slots` \
             fill-in (files from before July 2026) or anchor-first",
            config.file
        ))
    })?;
    if let Some(replaced) = of_file.filter(|of_file| *of_file != slots) {
        notes.push(format!("{}: slots {slots} replace {replaced}", config.file));
    }
    Ok(slots)
}

/// The mask of each layer (docs/dflash.md 3.6). Full layers of other layouts than z-lab's see the whole
/// block.
fn masks(
    layout: Layout,
    windows: Vec<Option<usize>>,
    config: &Fields,
    flag: impl Fn(&str) -> Result<Option<bool>>,
) -> Result<Vec<Attention>> {
    // Whether layers of each kind are causal: (full, sliding).
    let (full, sliding) = match layout {
        Layout::Speculators => (false, flag("sliding_window_non_causal")? == Some(false)),
        Layout::DeepSpec if windows.iter().any(Option::is_some) => {
            return Err(config.unsupported("layer_types", "sliding_attention", "full_attention"));
        }
        Layout::DeepSpec => (false, false),
        _ => {
            let causal = match config.get("is_causal") {
                Some(field) => Some(field.boolean()?),
                None => flag("causal")?,
            };
            (causal.unwrap_or(false), causal.unwrap_or(true))
        }
    };
    let mask = |window: Option<usize>| Attention { causal: window.map_or(full, |_| sliding), window };
    Ok(windows.into_iter().map(mask).collect())
}

/// The walk of a DSpark config. Without a rank of its Markov head rows are independent.
fn markov(config: &Fields) -> Result<Dependence> {
    let Some(rank) = config.get("markov_rank").filter(|rank| !rank.is_neutral("")) else {
        return Ok(Dependence::Independent);
    };
    let flag = |name: &str| config.get(name).map_or(Ok(false), |field| field.boolean());
    let kind = match config.get("markov_head_type").map_or(Ok("vanilla"), |field| field.string())? {
        "vanilla" => MarkovKind::Vanilla,
        "gated" => MarkovKind::Gated,
        "rnn" => MarkovKind::Rnn,
        other => return Err(config.unsupported("markov_head_type", other, "vanilla, gated or rnn")),
    };
    let confidence = match flag("enable_confidence_head")? {
        true => Some(flag("confidence_head_with_markov")?),
        false => None,
    };
    Ok(Dependence::Walk(Markov { kind, rank: rank.integer(1, MAX_RANK)?, confidence }))
}

/// The taps that a field lists, converted to outputs, with the field's name; `None` if nothing says which
/// they are. `listed` also says whether the field holds boundaries: boundary `b` is the output of layer `b -
/// 1`.
fn listed_taps(
    layout: Layout,
    listed: Option<(Field, bool)>,
    target_layers: Option<usize>,
) -> Result<Option<(Vec<usize>, String)>> {
    let Some((field, boundaries)) = listed else {
        let default = |layers: usize| {
            let boundaries = [2, layers / 2, layers.saturating_sub(3)];
            (boundaries.map(|b| b.saturating_sub(1)).to_vec(), "the default taps".to_string())
        };
        let has_default = matches!(layout, Layout::Speculators | Layout::Flat);
        return Ok(target_layers.filter(|_| has_default).map(default));
    };
    let ids = field.array()?;
    if layout == Layout::ZLab {
        let outputs = ids.iter().map(|id| id.integer(0, MAX_LAYERS)).collect::<Result<_>>()?;
        return Ok(Some((outputs, field.name)));
    }
    let embedding = if boundaries { 0 } else { -1 };
    if let Some(id) = ids.iter().find(|id| id.value.as_i64() == Some(embedding)) {
        return Err(Error::Unsupported(format!(
            "{}: {} is {embedding}, the output of the embedding: expected outputs of layers",
            id.file, id.name
        )));
    }
    let first = usize::from(boundaries);
    let outputs =
        ids.iter().map(|id| Ok(id.integer(first, MAX_LAYERS)? - first)).collect::<Result<Vec<_>>>()?;
    if !outputs.is_sorted() {
        return Err(field.wrong("ascending layers"));
    }
    let name = if boundaries { format!("{}, as outputs of layers,", field.name) } else { field.name };
    Ok(Some((outputs, name)))
}

/// Makes an error of one kind from its sentence.
type ErrorKind = fn(String) -> Error;

/// What is wrong with taps of a target with this many layers, if the number is known: the kind of error, and
/// a sentence without its subject.
fn wrong_taps(taps: &[usize], target_layers: Option<usize>) -> Option<(ErrorKind, String)> {
    if taps.is_empty() {
        return Some((Error::Model, "is empty, expected at least one layer".into()));
    }
    taps.iter().enumerate().find_map(|(i, &tap)| match target_layers {
        Some(layers) if tap >= layers => Some((
            Error::Model as ErrorKind,
            format!("holds {tap}, expected layers from 0 to {} (its target has {layers} layers)", layers - 1),
        )),
        Some(layers) if tap == layers - 1 => Some((
            Error::Unsupported,
            format!(
                "holds {tap}, the target's last layer: engines differ on whether the final norm applies to it"
            ),
        )),
        _ if taps[..i].contains(&tap) => Some((Error::Model, format!("holds {tap} twice"))),
        _ => None,
    })
}
