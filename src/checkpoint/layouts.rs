//! Tells model layouts apart: targets, the DFlash drafters that this engine runs, and drafters of other
//! families, which are refused by their family's name.

use crate::checkpoint::json::{Document, Field, Fields};
use crate::error::excerpt;
use crate::{Error, Result};
use serde_json::Value;

/// Architectures of targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `Qwen3ForCausalLM`
    Qwen3,
    /// `LlamaForCausalLM`
    Llama,
}

/// Names of the architecture of DFlash drafters: z-lab's, and NeMo's for the same layout with a `model.`
/// prefix on tensors.
const ARCHITECTURES: [&str; 2] = ["DFlashDraftModel", "Qwen3DFlashDraftModel"];
/// The layout that this engine runs, for sentences.
const EXPECTED: &str = "this engine runs standard DFlash drafters";

/// Fields of a DFlash drafter's `config.json` that this engine does not support (`docs/dflash.md` A): (field,
/// family of drafters that has it, neutral value). A field may be null, false, 0, empty, or have its neutral
/// value: each of these means the same as its absence.
const VARIANTS: [(&str, &str, &str); 22] = [
    ("conv_kernel_size", "a DFlash2 drafter", ""),
    ("conv_group_size", "a DFlash2 drafter", ""),
    ("selector_rank", "a DFlash2 drafter", ""),
    ("selector_top_k", "a DFlash2 drafter", ""),
    ("markov_rank", "a DSpark drafter", ""),
    ("markov_head_type", "a DSpark drafter", ""),
    ("sample_from_anchor", "an anchor-first drafter", ""),
    ("enable_confidence_head", "a DSpark drafter", ""),
    ("projector_type", "a drafter with another projector", "dflash"),
    ("shift_label", "a Domino drafter", ""),
    ("gru_hidden_dim", "a Domino drafter", ""),
    ("pure_draft_prefix_len", "a Domino drafter", ""),
    ("aux_hidden_state_layer_ids", "a drafter in the speculators layout", ""),
    ("fc_layernorm", "a drafter with a norm per tap", ""),
    ("attention_mode", "a drafter with another attention", "gqa"),
    ("attention_modes", "a drafter with another attention", ""),
    ("use_swa", "a MiMo-style drafter", ""),
    ("attention_sink_bias", "a MiMo-style drafter", ""),
    ("add_swa_attention_sink_bias", "a MiMo-style drafter", ""),
    ("attention_value_scale", "a MiMo-style drafter", "1"),
    ("attn_output_gate", "a drafter with gated attention", ""),
    ("eagle_config", "an EAGLE-3 drafter", ""),
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

/// Parts of tensor names that only drafters of other families have.
const TENSORS: [(&str, &str); 14] = [
    ("candidate_selector", "a DFlash2 drafter"),
    ("attention_conv", "a DFlash2 drafter"),
    ("mlp_conv", "a DFlash2 drafter"),
    ("markov_head", "a DSpark drafter"),
    ("confidence_head", "a DSpark drafter"),
    ("prefix_gru", "a Domino drafter"),
    ("embed_proj", "a Domino drafter"),
    ("midlayer", "an EAGLE-3 drafter"),
    ("mask_hidden", "a P-EAGLE drafter"),
    ("embed_tokens", OWN_VOCABULARY),
    ("lm_head", OWN_VOCABULARY),
    ("d2t", OWN_VOCABULARY),
    ("t2d", OWN_VOCABULARY),
    ("verifier_lm_head", OWN_VOCABULARY),
];
const OWN_VOCABULARY: &str = "a drafter with an embedding, head or vocabulary of its own";

/// The family of targets that a config belongs to.
///
/// # Errors
/// [`Error::Option`] if it is a drafter's; [`Error::Unsupported`] for another architecture.
pub(crate) fn target_architecture(document: &Document, config: &Fields) -> Result<Family> {
    let architecture = config.architecture()?;
    match architecture {
        "Qwen3ForCausalLM" => Ok(Family::Qwen3),
        "LlamaForCausalLM" => Ok(Family::Llama),
        _ if ARCHITECTURES.contains(&architecture)
            || config.get("dflash_config").is_some()
            || other_family(config, &Fields { map: &serde_json::Map::new(), ..*config })?.is_some() =>
        {
            let (file, found) = (&document.file, excerpt(architecture));
            Err(Error::option(
                "target",
                format!("is given {file}, which describes a drafter ({found}): expected a target"),
            ))
        }
        _ => {
            let expected = "Qwen3ForCausalLM or LlamaForCausalLM";
            Err(config.unsupported("architectures", architecture, expected))
        }
    }
}

/// The family of a drafter's tensor that a standard DFlash drafter does not have.
pub(crate) fn family_of_tensor(name: &str) -> Option<&'static str> {
    let has = |part: &str| name.split('.').any(|word| word == part);
    TENSORS.iter().find(|(part, _)| has(part)).map(|(_, family)| *family)
}

/// Refuses a config that belongs to a target or to a drafter of another family. The error names the family,
/// and the field that identifies it. `nested` is `dflash_config`, or empty.
pub(crate) fn refuse_other_drafters(config: &Fields, nested: &Fields) -> Result<()> {
    let wrong = |field: &str, found: &str, family: &str| {
        let file = config.file;
        Err(Error::Unsupported(format!("{file}: {field} is {found}, which makes it {family}: {EXPECTED}")))
    };
    if let Some((field, found, family)) = other_family(config, nested)? {
        return wrong(&field, &found, &family);
    }
    let architecture = config.architecture();
    if let Ok(name @ ("Qwen3ForCausalLM" | "LlamaForCausalLM")) = architecture
        && nested.map.is_empty()
    {
        return Err(Error::option(
            "draft",
            format!("is given {}, which describes a target ({name}): expected a DFlash drafter", config.file),
        ));
    }
    for table in [nested, config] {
        for (name, family, neutral) in VARIANTS {
            if let Some(field) = table.get(name).filter(|field| !field.is_neutral(neutral)) {
                return wrong(&field.name, &field.found(), family);
            }
        }
    }
    // A draft vocabulary of the whole vocabulary is no restriction.
    if let Some(field) =
        config.get("draft_vocab_size").filter(|f| Some(f.value) != config.map.get("vocab_size"))
    {
        return wrong(&field.name, &field.found(), "a drafter with a vocabulary of its own");
    }
    let known = |name: &str| DFLASH.contains(&name) || VARIANTS.iter().any(|(v, ..)| *v == name);
    if let Some((name, _)) = nested.map.iter().find(|(name, value)| !value.is_null() && !known(name)) {
        let (file, name) = (config.file, excerpt(name));
        return Err(Error::Unsupported(format!("{file}: dflash_config.{name} is unknown: {EXPECTED}")));
    }
    let architecture = architecture?;
    if !ARCHITECTURES.contains(&architecture) {
        return Err(config.unsupported("architectures", architecture, &ARCHITECTURES.join(" or ")));
    }
    config.only("model_type", "qwen3")?;
    refuse_quantised(config)
}

/// Kinds of drafters by a part of their architecture's name. The first that fits decides.
const KINDS: [(&str, &str); 10] = [
    ("Domino", "a Domino drafter"),
    ("DFlash2", "a DFlash2 drafter"),
    ("Qwen3Eagle3Model", "an EAGLE-3 drafter (DeepSpec)"),
    ("PEagle", "a P-EAGLE drafter"),
    ("Peagle", "a P-EAGLE drafter"),
    ("Eagle3", "an EAGLE-3 drafter"),
    ("Eagle", "an EAGLE drafter"),
    ("DSpark", "a DSpark drafter"),
    ("Medusa", "a Medusa drafter"),
    ("MLPSpeculator", "an MLP speculator"),
];

/// The kind of drafter that a config of speculators or of Open Spec Config names.
fn kind_of_method(method: &str) -> String {
    match method {
        "dflash" => "a DFlash drafter".into(),
        "dflash2" => "a DFlash2 drafter".into(),
        "dspark" => "a DSpark drafter".into(),
        "eagle3" => "an EAGLE-3 drafter".into(),
        "peagle" => "a P-EAGLE drafter".into(),
        other => format!("a drafter of the kind {}", excerpt(other)),
    }
}

/// The family of a drafter that is not DFlash in z-lab's layout: (field, what it is, family). The first test
/// that holds decides, because several families share architecture names and fields.
fn other_family(config: &Fields, nested: &Fields) -> Result<Option<(String, String, String)>> {
    let is = |field: &Field, family: String| Ok(Some((field.name.clone(), field.found(), family)));
    if let Some(field) = config.get("open_spec_config_version") {
        let method = config.get("speculative_config").and_then(|inner| inner.value.get("method"));
        let kind = kind_of_method(method.and_then(Value::as_str).unwrap_or("unknown"));
        return is(&field, format!("{kind} in the layout of Open Spec Config"));
    }
    if let Some(field) = config.get("speculators_model_type") {
        return is(&field, format!("{} in the speculators layout", kind_of_method(field.string()?)));
    }
    for name in ["speculators_config", "transformer_layer_config"] {
        if let Some(field) = config.get(name) {
            let family = "a drafter in the speculators layout".into();
            return Ok(Some((field.name, "present".into(), family)));
        }
    }
    for field in [nested, config].into_iter().filter_map(|table| table.get("projector_type")) {
        match field.value.as_str() {
            Some("domino") => return is(&field, "a Domino drafter".into()),
            Some("dspark") => return is(&field, "a DSpark drafter".into()),
            _ => {}
        }
    }
    let architecture =
        config.get("architectures").and_then(|_| config.architecture().ok()).unwrap_or_default();
    let markov = config.get("markov_rank").is_some_and(|rank| !rank.is_neutral(""));
    let deepspec =
        if markov { "a DSpark drafter (DeepSpec)" } else { "an anchor-first DFlash drafter (DeepSpec)" };
    let kind = match architecture {
        "Qwen3DSparkModel" => Some(deepspec),
        _ => KINDS.iter().find(|(part, _)| architecture.contains(part)).map(|(_, kind)| *kind),
    };
    if let Some(kind) = kind {
        return Ok(Some(("architectures".into(), excerpt(architecture), kind.into())));
    }
    if let (Some(field), true) = (config.get("ttt_length"), config.get("target_layer_ids").is_some()) {
        return is(&field, "an EAGLE-3 drafter (DeepSpec)".into());
    }
    if let Some(field) = config.get("num_anchors") {
        return is(&field, deepspec.into());
    }
    if nested.map.is_empty() && !ARCHITECTURES.contains(&architecture) {
        let eagle = ["eagle_config", "draft_vocab_size"].into_iter().find_map(|name| config.get(name));
        return eagle.map_or(Ok(None), |field| is(&field, "an EAGLE-3 drafter".into()));
    }
    Ok(None)
}

/// Refuses a config of quantised weights.
pub(super) fn refuse_quantised(config: &Fields) -> Result<()> {
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
