//! What the config of an EAGLE-3 drafter (arXiv 2503.01840) says beyond that of its layer. `docs/drafters.md`
//! describes the layouts.

use crate::checkpoint::config::{Attention, MAX_BLOCK, Stack};
use crate::checkpoint::identify::Layout;
use crate::checkpoint::json::{Field, Fields};
use crate::checkpoint::safetensors::Checkpoint;
use crate::{Error, Result};

/// A drafter that drafts token by token with one causal layer. The layer runs over pairs: the feature of a
/// position and the token after it. The output for a pair predicts the token after that, and is the feature
/// of the next pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chain {
    /// The residual stream begins with the normed feature; else with the feature.
    pub norm_before_residual: bool,
    /// A norm over the taps of a position together, before `fc`.
    pub norm_before_fc: bool,
    /// A norm of each tap before `fc`, after the other one.
    pub norm_taps: bool,
    /// The feature of the next pair is the layer's output after the final norm; else before.
    pub norm_output: bool,
}

/// Most rows of a round, the anchor and the drafts. A chain can be of any length; with more rows,
/// verification costs more than a step without drafts.
pub const MAX_CHAIN: usize = 16;
/// Rows of a round where neither config nor user says a number.
const CHAIN: usize = 8;

impl Chain {
    /// Reads the flags, which in EAGLE's layout may also be in `eagle_config`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] and [`Error::Model`] for a flag that engines read in different ways.
    pub(super) fn read(config: &Fields, layout: Layout) -> Result<Chain> {
        let nested = match config.get("eagle_config") {
            Some(field) => Some(field.object("eagle_config.")?),
            None => None,
        };
        let find = |name: &str| nested.as_ref().and_then(|nested| nested.get(name)).or(config.get(name));
        let flag = |name: &str| find(name).map_or(Ok(false), |field| field.boolean());
        if layout == Layout::Flat {
            if let Some(field) = find("norm_output").filter(|field| !field.is_neutral("")) {
                return Err(Error::Unsupported(format!(
                    "{}: {} is {}, which SGLang and SpecForge read in different ways: remove the field if the \
                     final norm is only for the head",
                    field.file,
                    field.name,
                    field.found()
                )));
            }
            if config.get("tie_word_embeddings").is_some_and(|field| !field.is_neutral("")) {
                return Err(config.unsupported("tie_word_embeddings", "true", "false in an EAGLE-3 drafter"));
            }
        }
        if layout == Layout::Speculators && config.get("norm_before_residual").is_none() {
            return Err(Error::Model(format!(
                "{}: norm_before_residual is absent, expected true or false: engines differ in its default",
                config.file
            )));
        }
        Ok(Chain {
            norm_before_residual: flag("norm_before_residual")?,
            norm_before_fc: flag("norm_before_fc")?,
            norm_taps: flag("fc_norm")?,
            norm_output: flag("norm_output")?,
        })
    }

    /// Name and shape of its tensors, without embedding and head. The layer reads the token's embedding and
    /// the feature side by side, so its q, k and v have twice as many columns.
    pub(super) fn tensors(&self, stack: &Stack, taps: usize, list: &mut Vec<(String, Vec<usize>)>) {
        let hidden = stack.hidden;
        let first = list.len();
        stack.tensors("", list);
        for (name, shape) in &mut list[first..] {
            if [".q_proj.", ".k_proj.", ".v_proj."].iter().any(|part| name.contains(part)) {
                shape[1] = 2 * hidden;
            }
        }
        list.push(("layers.0.hidden_norm.weight".into(), vec![hidden]));
        if self.norm_before_fc {
            list.push(("input_norm.weight".into(), vec![taps * hidden]));
        }
        if self.norm_taps {
            list.extend((0..taps).map(|tap| (format!("fc_norm.{tap}.weight"), vec![hidden])));
        }
    }
}

/// Gives the tensors of EAGLE's layout the names of the others.
pub(super) fn rename_tensors(file: &mut Checkpoint) {
    file.rename_prefix("midlayer.", "layers.0.");
    for (tap, old) in ["aux_norm_low", "aux_norm_mid", "aux_norm_high"].into_iter().enumerate() {
        file.rename(&format!("{old}.weight"), &format!("fc_norm.{tap}.weight"));
    }
}

/// Completes the layer's shape from its tensors, which published configs contradict: the size of a head, and
/// whether q and k have norms. Returns a note if the config says another size.
pub(super) fn complete(stack: &mut Stack, file: &Checkpoint) -> Option<String> {
    stack.qk_norm = file.shape("layers.0.self_attn.q_norm.weight").is_some();
    let rows = *file.shape("layers.0.self_attn.q_proj.weight")?.first()?;
    let size = rows / stack.heads;
    if rows != size * stack.heads || size == stack.head_dim || size < 2 || !size.is_multiple_of(2) {
        // The check of the tensors' shapes names what does not fit.
        return None;
    }
    let said = std::mem::replace(&mut stack.head_dim, size);
    stack.rope.rotary_dims = size;
    Some(format!("{}: heads have {size} dims, where config.json says {said}", file.source()))
}

/// The mask of the only layer.
pub(super) fn mask(config: &Fields, windows: &[Option<usize>]) -> Result<Vec<Attention>> {
    if windows.len() != 1 {
        return Err(config.unsupported(
            "num_hidden_layers",
            &windows.len().to_string(),
            "1 in an EAGLE-3 drafter",
        ));
    }
    if windows[0].is_some() {
        return Err(config.unsupported("layer_types", "sliding_attention", "full_attention"));
    }
    Ok(vec![Attention { causal: true, window: None }])
}

/// Rows of a round, the anchor and the drafts, by the number of drafts that the config names.
pub(super) fn block(config: &Fields) -> Result<usize> {
    let proposals = match config.get("speculators_config") {
        Some(field) => field.object("speculators_config.")?.get("proposal_methods").map(|list| list.array()),
        None => None,
    };
    let drafts = match proposals.transpose()?.and_then(|list| list.into_iter().next()) {
        Some(first) => {
            first.object("speculators_config.proposal_methods[0].")?.get("speculative_tokens").map(count)
        }
        None => config.get("ttt_length").map(count),
    };
    Ok(drafts.transpose()?.map_or(CHAIN, |drafts| (drafts + 1).min(MAX_CHAIN)))
}

fn count(field: Field) -> Result<usize> {
    field.integer(1, MAX_BLOCK)
}

/// The field that lists the taps, and whether it holds boundaries (`b` is the output of layer `b - 1`)
/// instead of outputs of layers. The field of EAGLE's layout does not say which: by convention, lists of
/// outputs begin with 1 and lists of boundaries with 2.
///
/// # Errors
/// [`Error::Model`] for another list in EAGLE's layout, and for a list in the field of another layout.
pub(super) fn taps_field<'a>(config: &Fields<'a>, layout: Layout) -> Result<Option<(Field<'a>, bool)>> {
    let name = "eagle_aux_hidden_state_layer_ids";
    let nested = match config.get("eagle_config") {
        Some(nested) => nested.object("eagle_config.")?.get(name),
        None => None,
    };
    let fields = [
        (Layout::Speculators, config.get(name)),
        (Layout::DeepSpec, config.get("target_layer_ids")),
        (Layout::Flat, nested),
    ];
    let mut listed = None;
    for (owner, field) in fields {
        let Some(field) = field else { continue };
        if owner == layout {
            listed = Some(field);
        } else if !field.is_neutral("") {
            return Err(Error::Model(format!(
                "{}: {} is {}, which belongs to a drafter {owner}: give `taps`, the layers whose outputs the \
                 drafter reads",
                field.file,
                field.name,
                field.found()
            )));
        }
    }
    let Some(field) = listed else { return Ok(None) };
    if layout != Layout::Flat {
        return Ok(Some((field, layout == Layout::Speculators)));
    }
    match field.array()?.first().and_then(|first| first.value.as_u64()) {
        Some(first @ 1..=2) => Ok(Some((field, first == 2))),
        _ => Err(Error::Model(format!(
            "{}: {} is {}, which some engines read as outputs of layers and others as their inputs: give `taps`, \
             the layers whose outputs the drafter reads",
            field.file,
            field.name,
            field.found()
        ))),
    }
}
