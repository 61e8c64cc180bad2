//! Tells model layouts apart: the architectures of targets, and the family and layout of a drafter, from its
//! config and from the names of its tensors. Drafters that this engine does not run are refused by the name
//! of their family. Which fields and tensors belong to which family is in `docs/drafters.md`.

use crate::checkpoint::json::{Document, Field, Fields};
use crate::error::excerpt;
use crate::{Error, Result};
use Test::{Architecture, Both, Has, Is, Set};
use serde_json::Value;
use std::fmt;

/// Architectures of targets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `Qwen3ForCausalLM`
    Qwen3,
    /// `LlamaForCausalLM`
    Llama,
    /// `Qwen3MoeForCausalLM`: Qwen3 with MoE MLPs.
    Qwen3Moe,
    /// `Qwen3_5ForConditionalGeneration` (its text model) and `Qwen3_5ForCausalLM`, of Qwen3.5, 3.6 and
    /// 3.8-27B: Gated DeltaNet and gated attention.
    Qwen3_5,
    /// `Qwen3_5MoeForConditionalGeneration` and `Qwen3_5MoeForCausalLM`: as [`Family::Qwen3_5`], with MoE
    /// MLPs and a shared expert.
    Qwen3_5Moe,
    /// `Qwen3NextForCausalLM`: as [`Family::Qwen3_5Moe`], with other projections in its files.
    Qwen3Next,
}

/// Architectures, their families, and the values of `model_type` that go with them.
const TARGETS: [(&str, Family, &[&str]); 8] = [
    ("Qwen3ForCausalLM", Family::Qwen3, &["qwen3"]),
    ("LlamaForCausalLM", Family::Llama, &["llama"]),
    ("Qwen3MoeForCausalLM", Family::Qwen3Moe, &["qwen3_moe"]),
    ("Qwen3_5ForConditionalGeneration", Family::Qwen3_5, &["qwen3_5", "qwen3_5_text"]),
    ("Qwen3_5ForCausalLM", Family::Qwen3_5, &["qwen3_5_text", "qwen3_5"]),
    ("Qwen3_5MoeForConditionalGeneration", Family::Qwen3_5Moe, &["qwen3_5_moe", "qwen3_5_moe_text"]),
    ("Qwen3_5MoeForCausalLM", Family::Qwen3_5Moe, &["qwen3_5_moe_text", "qwen3_5_moe"]),
    ("Qwen3NextForCausalLM", Family::Qwen3Next, &["qwen3_next"]),
];

impl Family {
    /// Whether its mixers are Gated DeltaNet and gated attention. Its norms then store w of a gain 1 + w.
    pub fn is_hybrid(self) -> bool {
        matches!(self, Family::Qwen3_5 | Family::Qwen3_5Moe | Family::Qwen3Next)
    }

    /// Whether its MLPs are mixtures of experts.
    pub fn is_moe(self) -> bool {
        matches!(self, Family::Qwen3Moe | Family::Qwen3_5Moe | Family::Qwen3Next)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Family::Qwen3 => "Qwen3",
            Family::Llama => "Llama",
            Family::Qwen3Moe => "Qwen3-MoE",
            Family::Qwen3_5 => "Qwen3.5",
            Family::Qwen3_5Moe => "Qwen3.5-MoE",
            Family::Qwen3Next => "Qwen3-Next",
        })
    }
}

/// What a drafter computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DrafterFamily {
    /// A block of masked rows whose drafts do not depend on each other.
    DFlash,
    /// DFlash with convolutions and a candidate selector.
    DFlash2,
    /// DFlash with a Markov head and a confidence head.
    DSpark,
    /// One causal layer that drafts token by token.
    Eagle3,
}

/// Where a drafter's files keep its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// z-lab's: fields in `dflash_config`.
    ZLab,
    /// Of the library speculators: fields at top level, the layers in `transformer_layer_config`.
    Speculators,
    /// DeepSpec's: all fields at top level.
    DeepSpec,
    /// SpecForge's: fields in `dflash_config`, as `projector_type` says.
    SpecForge,
    /// EAGLE's: all fields at top level, some in `eagle_config`.
    Flat,
}

/// Family and layout of a drafter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// What it computes.
    pub family: DrafterFamily,
    /// Where its settings are.
    pub layout: Layout,
}

impl fmt::Display for DrafterFamily {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DrafterFamily::DFlash => "a DFlash drafter",
            DrafterFamily::DFlash2 => "a DFlash2 drafter",
            DrafterFamily::DSpark => "a DSpark drafter",
            DrafterFamily::Eagle3 => "an EAGLE-3 drafter",
        })
    }
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layout::ZLab => "in z-lab's layout",
            Layout::Speculators => "in the speculators layout",
            Layout::DeepSpec => "in DeepSpec's layout",
            Layout::SpecForge => "in SpecForge's layout",
            Layout::Flat => "in EAGLE's layout",
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.family, self.layout)
    }
}

/// The end of refusals.
const REFUSED: &str = "this engine does not run it";

// ---- the decision ----

/// A test on a config. Paths are `field` or `object.field`.
enum Test {
    /// The field exists and is not null.
    Has(&'static str),
    /// The field exists and is not null, false, 0 or empty.
    Set(&'static str),
    /// The field is this text.
    Is(&'static str, &'static str),
    /// The name of the architecture contains this.
    Architecture(&'static str),
    /// Both tests hold.
    Both(&'static Test, &'static Test),
}

enum Kind {
    Known(DrafterFamily, Layout),
    Refused(&'static str),
}

const fn known(family: DrafterFamily, layout: Layout) -> Kind {
    Kind::Known(family, layout)
}

use DrafterFamily::{DFlash, DFlash2, DSpark, Eagle3};
use Layout::{DeepSpec, Flat, SpecForge, Speculators, ZLab};

/// The decision table. The first row of which one test holds decides, because several families share names of
/// architectures and fields.
const TABLE: &[(&[Test], Kind)] = &[
    (&[Has("open_spec_config_version")], Kind::Refused("a drafter in the layout of Open Spec Config")),
    (&[Is("speculators_model_type", "dflash")], known(DFlash, Speculators)),
    (&[Is("speculators_model_type", "dflash2")], known(DFlash2, Speculators)),
    (&[Is("speculators_model_type", "dspark")], known(DSpark, Speculators)),
    (&[Is("speculators_model_type", "eagle3")], known(Eagle3, Speculators)),
    (&[Is("speculators_model_type", "peagle")], Kind::Refused("a P-EAGLE drafter")),
    (&[Has("speculators_model_type")], Kind::Refused("a drafter of another kind in the speculators layout")),
    (
        &[Has("speculators_config"), Has("transformer_layer_config")],
        Kind::Refused("a drafter in the speculators layout without a speculators_model_type"),
    ),
    (
        &[
            Is("dflash_config.projector_type", "domino"),
            Is("projector_type", "domino"),
            Architecture("Domino"),
        ],
        Kind::Refused("a Domino drafter"),
    ),
    (
        &[Is("dflash_config.projector_type", "dspark"), Is("projector_type", "dspark")],
        known(DSpark, SpecForge),
    ),
    (
        &[Architecture("Qwen3Eagle3Model"), Both(&Has("ttt_length"), &Has("target_layer_ids"))],
        known(Eagle3, DeepSpec),
    ),
    (
        &[
            Both(&Architecture("Qwen3DSparkModel"), &Set("markov_rank")),
            Both(&Has("num_anchors"), &Set("markov_rank")),
        ],
        known(DSpark, DeepSpec),
    ),
    (&[Architecture("Qwen3DSparkModel"), Has("num_anchors")], known(DFlash, DeepSpec)),
    (&[Architecture("DSpark")], known(DSpark, SpecForge)),
    (
        &[Architecture("DFlash2"), Set("dflash_config.selector_rank"), Set("selector_rank")],
        known(DFlash2, ZLab),
    ),
    (&[Architecture("PEagle"), Architecture("Peagle")], Kind::Refused("a P-EAGLE drafter")),
    (&[Architecture("Eagle3")], known(Eagle3, Flat)),
    (&[Architecture("Eagle")], Kind::Refused("an EAGLE drafter")),
    (&[Architecture("Medusa")], Kind::Refused("a Medusa drafter")),
    (&[Architecture("MLPSpeculator")], Kind::Refused("an MLP speculator")),
    (&[Set("dflash_config"), Architecture("DFlashDraftModel")], known(DFlash, ZLab)),
    (&[Has("eagle_config"), Has("draft_vocab_size")], known(Eagle3, Flat)),
];

/// The field at `path`, `field` or `object.field`.
fn field<'a>(config: &Fields<'a>, path: &'static str) -> Option<Field<'a>> {
    match path.split_once('.') {
        None => config.get(path),
        Some((object, name)) => config.get(object)?.object(&path[..=object.len()]).ok()?.get(name),
    }
}

impl Test {
    /// The field that the test looked at and its value, if the test holds.
    fn found(&self, config: &Fields) -> Option<(String, String)> {
        match *self {
            Has(path) => field(config, path).map(described),
            Set(path) => field(config, path).filter(|field| !field.is_neutral("")).map(described),
            Is(path, text) => {
                field(config, path).filter(|field| field.value.as_str() == Some(text)).map(described)
            }
            Architecture(part) => {
                config.get("architectures")?;
                let name = config.architecture().ok().filter(|name| name.contains(part))?;
                Some(("architectures".into(), excerpt(name)))
            }
            Both(first, second) => second.found(config).and(first.found(config)),
        }
    }
}

/// A field's name and its value, for sentences.
fn described(field: Field) -> (String, String) {
    let found = if field.value.is_object() { "present".into() } else { field.found() };
    (field.name, found)
}

/// The first row of the table that fits: the field that decides, its value, and the kind. `None` if the
/// config is not a drafter's.
fn decide(config: &Fields) -> Option<(String, String, &'static Kind)> {
    let row = |(tests, kind): &'static (&[Test], Kind)| {
        let (field, found) = tests.iter().find_map(|test| test.found(config))?;
        Some((field, found, kind))
    };
    TABLE.iter().find_map(row)
}

/// The drafter that a config describes, and the sentence that says which field decided. A field that only
/// drafters of another family or layout have is a contradiction.
///
/// # Errors
/// [`Error::Unsupported`] for an unknown kind of drafter and for a contradiction; [`Error::Option`] for a
/// target.
pub(crate) fn identify(config: &Fields) -> Result<(Identity, String)> {
    let Some((field, found, kind)) = decide(config) else {
        let architecture = config.architecture()?;
        if TARGETS.iter().any(|(name, ..)| *name == architecture) {
            let sentence = format!("is given {}, which describes a target ({architecture})", config.file);
            return Err(Error::option("draft", format!("{sentence}: expected a DFlash drafter")));
        }
        let expected = "a drafter: DFlashDraftModel, dflash_config, speculators_model_type or num_anchors";
        return Err(config.unsupported("architectures", architecture, expected));
    };
    let decided = |kind: &str| format!("{}: {field} is {found}, which makes it {kind}", config.file);
    let identity = match *kind {
        Kind::Known(family, layout) => Identity { family, layout },
        Kind::Refused(kind) => return Err(Error::Unsupported(format!("{}: {REFUSED}", decided(kind)))),
    };
    let nested = match config.get("dflash_config") {
        Some(field) => Some(field.object("dflash_config.")?),
        None => None,
    };
    for table in nested.iter().chain([config]) {
        for (name, neutral, owner) in FIELDS {
            if let Some(other) = table.get(name).filter(|f| !f.is_neutral(neutral) && !owner.is(identity)) {
                let (other, value) = described(other);
                let decided = decided(&identity.to_string());
                return Err(Error::Unsupported(format!(
                    "{decided}, but {other} is {value}, which belongs to {owner}"
                )));
            }
        }
    }
    Ok((identity, decided(&identity.to_string())))
}

/// Refuses families that this engine does not run, unknown fields of `dflash_config`, and quantised weights.
/// `decided` is the sentence of [`identify`].
pub(crate) fn refuse_others(config: &Fields, identity: Identity, decided: &str) -> Result<()> {
    let runs = match identity.family {
        DFlash | DFlash2 => true,
        DSpark => identity.layout != SpecForge,
        Eagle3 => true,
    };
    if !runs {
        return Err(Error::Unsupported(format!("{decided}: {REFUSED}")));
    }
    let known = |name: &str| DFLASH_CONFIG.contains(&name) || FIELDS.iter().any(|(field, ..)| *field == name);
    if let Some(nested) = config.get("dflash_config") {
        let mut fields = nested.object("dflash_config.")?.map.iter();
        if let Some((name, _)) = fields.find(|(name, value)| !value.is_null() && !known(name)) {
            let (file, name) = (config.file, excerpt(name));
            return Err(Error::Unsupported(format!("{file}: dflash_config.{name} is unknown: {REFUSED}")));
        }
    }
    refuse_quantised(config)
}

// ---- what belongs to whom ----

/// The drafters that have a field or a tensor.
enum Owner {
    Family(DrafterFamily),
    Layouts(&'static [Layout]),
    /// Drafters that this engine does not run.
    Other(&'static str),
}

impl Owner {
    fn is(&self, identity: Identity) -> bool {
        match *self {
            Owner::Family(family) => identity.family == family,
            Owner::Layouts(layouts) => layouts.contains(&identity.layout),
            Owner::Other(_) => false,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Family(family) => family.fmt(f),
            Owner::Layouts(layouts) => write!(f, "a drafter {}", layouts[0]),
            Owner::Other(name) => f.write_str(name),
        }
    }
}

/// Fields that only some drafters have: (field, neutral value, drafters). A field may be null, false, 0,
/// empty, or have its neutral value: each of these means the same as its absence.
const FIELDS: [(&str, &str, Owner); 30] = [
    ("dflash_config", "", Owner::Layouts(&[ZLab, SpecForge])),
    ("conv_kernel_size", "", Owner::Family(DFlash2)),
    ("conv_group_size", "", Owner::Family(DFlash2)),
    ("selector_rank", "", Owner::Family(DFlash2)),
    ("selector_top_k", "", Owner::Family(DFlash2)),
    ("markov_rank", "", Owner::Family(DSpark)),
    ("markov_head_type", "vanilla", Owner::Family(DSpark)),
    ("enable_confidence_head", "", Owner::Family(DSpark)),
    ("projector_type", "dflash", Owner::Layouts(&[SpecForge])),
    ("sample_from_anchor", "", Owner::Layouts(&[Speculators])),
    ("aux_hidden_state_layer_ids", "", Owner::Layouts(&[Speculators])),
    ("num_anchors", "", Owner::Layouts(&[DeepSpec])),
    ("ttt_length", "", Owner::Family(Eagle3)),
    ("eagle_config", "", Owner::Family(Eagle3)),
    ("eagle_aux_hidden_state_layer_ids", "", Owner::Family(Eagle3)),
    ("norm_before_residual", "", Owner::Family(Eagle3)),
    ("norm_before_fc", "", Owner::Family(Eagle3)),
    ("fc_norm", "", Owner::Family(Eagle3)),
    ("norm_output", "", Owner::Family(Eagle3)),
    ("shift_label", "", Owner::Other("a Domino drafter")),
    ("gru_hidden_dim", "", Owner::Other("a Domino drafter")),
    ("pure_draft_prefix_len", "", Owner::Other("a Domino drafter")),
    ("fc_layernorm", "", Owner::Other("a drafter with a norm per tap")),
    ("attention_mode", "gqa", Owner::Other("a drafter with another attention")),
    ("attention_modes", "", Owner::Other("a drafter with another attention")),
    ("use_swa", "", Owner::Other("a MiMo-style drafter")),
    ("attention_sink_bias", "", Owner::Other("a MiMo-style drafter")),
    ("add_swa_attention_sink_bias", "", Owner::Other("a MiMo-style drafter")),
    ("attention_value_scale", "1", Owner::Other("a MiMo-style drafter")),
    ("attn_output_gate", "", Owner::Other("a drafter with gated attention")),
];

/// The fields of `dflash_config` that this engine reads. Any other must be one of [`FIELDS`].
const DFLASH_CONFIG: [&str; 10] = [
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

/// Parts of tensor names that only some drafters have. z-lab's drafters have no vocabulary of their own.
const TENSORS: [(&str, Owner); 10] = [
    ("candidate_selector", Owner::Family(DFlash2)),
    ("attention_conv", Owner::Family(DFlash2)),
    ("mlp_conv", Owner::Family(DFlash2)),
    ("markov_head", Owner::Family(DSpark)),
    ("confidence_head", Owner::Family(DSpark)),
    ("midlayer", Owner::Family(Eagle3)),
    ("prefix_gru", Owner::Other("a Domino drafter")),
    ("embed_proj", Owner::Other("a Domino drafter")),
    ("mask_hidden", Owner::Other("a P-EAGLE drafter")),
    ("verifier_lm_head", Owner::Other(OWN_VOCABULARY)),
];
const OWN_VOCABULARY: &str = "a drafter with an embedding, head or vocabulary of its own";
/// Tensors of a drafter's own vocabulary.
const VOCABULARY: [&str; 4] = ["embed_tokens", "lm_head", "d2t", "t2d"];

/// The drafters that a tensor belongs to, if not to drafters of this identity.
pub(crate) fn foreign_tensor(identity: Identity, name: &str) -> Option<String> {
    let has = |part: &str| name.split('.').any(|word| word == part);
    // A DFlash drafter has one `hidden_norm`, EAGLE-3 has one per layer.
    if identity.family != Eagle3 && has("layers") && has("hidden_norm") {
        return Some(Eagle3.to_string());
    }
    if identity.layout == ZLab && VOCABULARY.into_iter().any(has) {
        return Some(OWN_VOCABULARY.into());
    }
    let foreign = |(part, owner): &&(&str, Owner)| has(part) && !owner.is(identity);
    TENSORS.iter().find(foreign).map(|(_, owner)| owner.to_string())
}

// ---- targets ----

/// The family of targets that a config belongs to, by `architectures`, with which `model_type` must agree.
///
/// # Errors
/// [`Error::Option`] if it is a drafter's; [`Error::Unsupported`] for another architecture or type.
pub(crate) fn target_architecture(document: &Document, config: &Fields) -> Result<Family> {
    let architecture = config.architecture()?;
    if let Some((_, family, types)) = TARGETS.iter().find(|(name, ..)| *name == architecture) {
        check_type(config, types)?;
        return Ok(*family);
    }
    if decide(config).is_some() {
        let (file, found) = (&document.file, excerpt(architecture));
        return Err(Error::option(
            "target",
            format!("is given {file}, which describes a drafter ({found}): expected a target"),
        ));
    }
    let expected = "the text model of a Qwen3, Qwen3-MoE, Qwen3.5, Qwen3-Next or Llama checkpoint";
    Err(config.unsupported("architectures", architecture, expected))
}

/// Checks the `model_type` of the text model that a config of this family nests.
pub(super) fn check_nested_type(config: &Fields, family: Family) -> Result<()> {
    let text = TARGETS.iter().rfind(|(_, of, _)| *of == family);
    text.map_or(Ok(()), |(_, _, types)| check_type(config, types))
}

fn check_type(config: &Fields, types: &[&str]) -> Result<()> {
    match config.get("model_type").map(|field| field.string()).transpose()? {
        Some(found) if !types.contains(&found) => Err(config.unsupported("model_type", found, types[0])),
        _ => Ok(()),
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn decision(config: &Value) -> Result<Identity> {
        let config = config.as_object().unwrap();
        let fields = Fields { file: "config.json", prefix: "", map: config };
        Ok(identify(&fields)?.0)
    }

    /// Configs and tensor names of ten drafters in published layouts.
    #[test]
    fn published_layouts_are_identified_by_config_and_by_tensors() {
        let layouts: Value =
            serde_json::from_str(include_str!("../../tests/data/drafters/layouts.json")).unwrap();
        let expected = [
            ("dflash-deepspec", DFlash, DeepSpec),
            ("dflash-speculators", DFlash, Speculators),
            ("dflash2-speculators", DFlash2, Speculators),
            ("dflash2-zlab", DFlash2, ZLab),
            ("dspark-deepspec", DSpark, DeepSpec),
            ("dspark-deepspec-rnn", DSpark, DeepSpec),
            ("dspark-speculators", DSpark, Speculators),
            ("eagle3-deepspec", Eagle3, DeepSpec),
            ("eagle3-flat", Eagle3, Flat),
            ("eagle3-speculators", Eagle3, Speculators),
        ];
        assert_eq!(layouts.as_object().unwrap().len(), expected.len());
        for (name, family, layout) in expected {
            let identity = decision(&layouts[name]["config"]).unwrap();
            assert_eq!(identity, Identity { family, layout }, "{name}");
            let tensors = layouts[name]["tensors"].as_array().unwrap();
            let foreign =
                |identity| tensors.iter().find_map(|t| foreign_tensor(identity, t.as_str().unwrap()));
            assert_eq!(foreign(identity), None, "{name}");
            // A DFlash drafter of the same layout has none of the tensors that make another family.
            let plain = Identity { family: DFlash, layout };
            assert_eq!(foreign(plain), (family != DFlash).then(|| family.to_string()), "{name}");
        }
    }

    #[test]
    fn the_first_row_of_the_table_that_fits_decides() {
        for (config, expected) in [
            (
                json!({ "speculators_model_type": "dflash", "num_anchors": null }),
                "a DFlash drafter in the speculators layout",
            ),
            (
                json!({ "speculators_model_type": "dspark", "draft_vocab_size": 9 }),
                "a DSpark drafter in the speculators layout",
            ),
            (
                json!({ "dflash_config": { "projector_type": "dspark", "markov_rank": 8 } }),
                "a DSpark drafter in SpecForge's layout",
            ),
            (json!({ "ttt_length": 7, "target_layer_ids": [1] }), "an EAGLE-3 drafter in DeepSpec's layout"),
            (json!({ "num_anchors": 512, "markov_rank": 0 }), "a DFlash drafter in DeepSpec's layout"),
            (json!({ "num_anchors": 512, "markov_rank": 8 }), "a DSpark drafter in DeepSpec's layout"),
            (json!({ "dflash_config": { "selector_rank": 8 } }), "a DFlash2 drafter in z-lab's layout"),
            (json!({ "architectures": ["DFlashDraftModel"] }), "a DFlash drafter in z-lab's layout"),
            (json!({ "architectures": ["LlamaForCausalLMEagle3"] }), "an EAGLE-3 drafter in EAGLE's layout"),
            (
                json!({ "architectures": ["LlamaForCausalLM"], "draft_vocab_size": 9 }),
                "an EAGLE-3 drafter in EAGLE's layout",
            ),
        ] {
            assert_eq!(
                decision(&config).map(|identity| identity.to_string()),
                Ok(expected.into()),
                "{config}"
            );
        }
    }

    #[test]
    fn contradictions_name_both_fields() {
        for (config, expected) in [
            (
                json!({ "speculators_model_type": "dflash", "selector_rank": 8 }),
                "speculators_model_type is \"dflash\", which makes it a DFlash drafter in the speculators layout, but \
                 selector_rank is 8, which belongs to a DFlash2 drafter",
            ),
            (
                json!({ "num_anchors": 512, "dflash_config": { "block_size": 16 } }),
                "num_anchors is 512, which makes it a DFlash drafter in DeepSpec's layout, but dflash_config is \
                 present, which belongs to a drafter in z-lab's layout",
            ),
            (
                json!({ "dflash_config": { "block_size": 16 }, "sample_from_anchor": true }),
                "dflash_config is present, which makes it a DFlash drafter in z-lab's layout, but sample_from_anchor \
                 is true, which belongs to a drafter in the speculators layout",
            ),
        ] {
            let found = decision(&config).unwrap_err().to_string();
            assert_eq!(found, format!("config.json: {expected}"));
        }
    }
}
