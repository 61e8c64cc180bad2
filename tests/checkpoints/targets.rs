//! Files of hybrid and MoE targets: configs that are read and refused, and tensors that are missing, unknown,
//! of another type or shape, or there in both layouts of experts.

use crate::invalid_checkpoints::change;
use crate::support;

use dflash::Result;
use dflash::checkpoint::config::{Family, TargetConfig};
use dflash::checkpoint::pair::Pair;
use dflash::cpu::model::{Cache, Target};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize_to_file};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use support::disk;

/// All folders of `tests/data/targets`.
const FOLDERS: [&str; 7] = [
    "qwen3_5",
    "qwen3_5/published",
    "qwen3_moe",
    "qwen3_moe/stacked",
    "qwen3_5_moe",
    "qwen3_5_moe/published",
    "qwen3_next",
];

fn folder(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/data/targets").join(name)
}

fn config(name: &str) -> Value {
    serde_json::from_slice(&fs::read(folder(name).join("config.json")).unwrap()).unwrap()
}

// ---- configs ----

/// Reads the config of a folder after `edits`, changes as in the tables of `invalid_checkpoints`.
fn edited(name: &str, edits: &str) -> Result<TargetConfig> {
    let (dir, mut config) = (tempfile::tempdir().unwrap(), config(name));
    edits.split("; ").filter(|edit| !edit.is_empty()).for_each(|edit| change(&mut config, edit));
    support::write_json(dir.path(), "config.json", &config);
    TargetConfig::open(&disk(dir.path())).map_err(|e| match e.to_string().split_once("config.json") {
        Some((_, rest)) if e.exit_code() == 4 => dflash::Error::Unsupported(format!("T{rest}")),
        Some((_, rest)) => dflash::Error::Model(format!("T{rest}")),
        None => e,
    })
}

#[test]
fn configs_describe_mixers_and_mlps() {
    let read = |name| edited(name, "").unwrap();
    let hybrid = read("qwen3_5");
    let shape = hybrid.stack.delta_net.as_ref().unwrap();
    assert_eq!((hybrid.family, hybrid.tied, hybrid.stack.rope.rotary_dims), (Family::Qwen3_5, true, 64));
    assert_eq!((shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim), (2, 4, 128, 128));
    assert_eq!(shape.layers, [true, true, true, false]);
    assert!(hybrid.stack.output_gate && hybrid.stack.norm_offset && hybrid.stack.moe.is_none());
    assert_eq!(read("qwen3_5/published"), hybrid);
    assert_eq!(read("qwen3_moe"), read("qwen3_moe/stacked"));
    assert_eq!(read("qwen3_5_moe"), read("qwen3_5_moe/published"));

    let moe = read("qwen3_moe").stack;
    let experts = moe.moe.as_ref().unwrap();
    assert_eq!((experts.experts, experts.chosen, experts.intermediate, experts.shared), (16, 4, 32, 0));
    assert!(experts.renormalise && !moe.output_gate && !moe.norm_offset && moe.delta_net.is_none());
    let both = read("qwen3_5_moe").stack;
    assert_eq!((both.moe.as_ref().unwrap().shared, both.intermediate), (32, 0));
    assert_eq!(both.delta_net.unwrap().layers, [true, true, false, true]);
    assert!(read("qwen3_next").stack.delta_net.unwrap().grouped);
    for name in FOLDERS {
        assert!(read(name).notes.is_empty(), "{name}");
    }
}

/// What absent fields mean, and fields that mean nothing here.
#[test]
fn absent_fields_have_the_defaults_of_their_family() {
    let layers = |name, edits: &str| edited(name, edits).unwrap().stack.delta_net.unwrap().layers;
    assert_eq!(layers("qwen3_5", "layer_types absent"), [true, true, true, false]);
    assert_eq!(
        layers("qwen3_5", "layer_types absent; full_attention_interval = 2"),
        [true, false, true, false]
    );
    let moe = |name, edits: &str| edited(name, edits).unwrap().stack.moe.unwrap();
    assert!(!moe("qwen3_moe", "norm_topk_prob absent").renormalise);
    assert!(moe("qwen3_next", "norm_topk_prob absent").renormalise);
    assert!(moe("qwen3_5_moe", "").renormalise);
    assert_eq!(moe("qwen3_moe", "shared_expert_intermediate_size = 0").shared, 0);
    assert_eq!(moe("qwen3_moe", "num_local_experts absent; num_experts = 16").experts, 16);
    assert_eq!(moe("qwen3_moe", "num_experts = 16").experts, 16);
    assert_eq!(moe("qwen3_next", "shared_expert_intermediate_size = 0").shared, 0);

    let rotated = |edits: &str| edited("qwen3_5", edits).unwrap().stack.rope.rotary_dims;
    assert_eq!(rotated("rope_parameters.partial_rotary_factor absent"), 64);
    assert_eq!(
        rotated("rope_parameters.partial_rotary_factor = 0.5; rope_parameters.mrope_section absent"),
        128
    );
    let tied = |name, edits: &str| edited(name, edits).unwrap().tied;
    assert!(tied("qwen3_5/published", "text_config.tie_word_embeddings absent"));
    assert!(!tied("qwen3_5/published", "text_config.tie_word_embeddings = false"));
    assert!(!tied("qwen3_5", "tie_word_embeddings absent"));
    for neutral in [
        "mamba_ssm_dtype = \"bfloat16\"; mtp_num_hidden_layers = 1; output_gate_type = \"silu\"",
        "attn_output_gate = true; use_sliding_window = false; sliding_window = 4096; max_window_layers = 2",
        "ple_size = 0; indexer_heads = null",
    ] {
        assert_eq!(edited("qwen3_5", neutral), edited("qwen3_5", ""), "{neutral}");
    }
    let eos = |edits: &str| edited("qwen3_5/published", edits).unwrap().eos.ids();
    assert_eq!(eos("eos_token_id = 7"), [0, 7]);
    assert_eq!(eos("eos_token_id = [0, 9]; text_config.eos_token_id = null"), [0, 9]);
}

#[test]
fn configs_of_other_variants_are_refused_by_field() {
    for row in REFUSED.lines().filter(|row| !row.is_empty()) {
        let [name, code, edits, sentence] = row.splitn(4, " | ").collect::<Vec<_>>().try_into().expect(row);
        let error = edited(name, edits).expect_err(row);
        assert_eq!(
            (error.exit_code().to_string().as_str(), error.to_string().as_str()),
            (code, sentence),
            "{row}"
        );
    }
}

/// Folder | exit code | changes | sentence.
const REFUSED: &str = r#"
qwen3_5 | 4 | model_type = "qwen4_exp" | T: model_type is qwen4_exp, which this engine does not run: expected qwen3_5_text
qwen3_5/published | 4 | model_type = "qwen3_vl" | T: model_type is qwen3_vl, which this engine does not run: expected qwen3_5
qwen3_5/published | 4 | text_config.model_type = "qwen4_exp_text" | T: text_config.model_type is qwen4_exp_text, which this engine does not run: expected qwen3_5_text
qwen3_5 | 4 | hc_count = 4 | T: hc_count is 4, which belongs to another architecture than Qwen3.5
qwen3_5 | 4 | indexer_heads = 4 | T: indexer_heads is 4, which belongs to another architecture than Qwen3.5
qwen3_5/published | 4 | text_config.ngram_size = 2 | T: text_config.ngram_size is 2, which belongs to another architecture than Qwen3.5
qwen3_5 | 4 | output_gate_type = "sigmoid" | T: output_gate_type is "sigmoid", which this engine does not run: expected swish or silu
qwen3_5 | 4 | output_gate_type = null | T: output_gate_type is null, which this engine does not run: expected swish or silu
qwen3_5 | 4 | output_gate_type = "" | T: output_gate_type is "", which this engine does not run: expected swish or silu
qwen3_5 | 4 | attn_output_gate = false | T: attn_output_gate is false, which this engine does not run: expected true
qwen3_5 | 3 | attn_output_gate = 1 | T: attn_output_gate is 1, expected true or false
qwen3_5 | 4 | hidden_act = "gelu" | T: hidden_act is gelu, which this engine does not run: expected silu
qwen3_5 | 4 | attention_bias = true | T: attention_bias is true, which this engine does not run: expected false
qwen3_5 | 4 | use_sliding_window = true | T: use_sliding_window is true, which this engine does not run: expected false
qwen3_5 | 4 | quantization_config = { "quant_method": "fp8" } | T: quantization_config is fp8, which this engine does not run: expected an unquantised checkpoint
qwen3_5/published | 4 | quantization_config = { "quant_method": "fp8" } | T: quantization_config is fp8, which this engine does not run: expected an unquantised checkpoint
qwen3_5/published | 4 | text_config.quantization_config = { "quant_method": "awq" } | T: text_config.quantization_config is awq, which this engine does not run: expected an unquantised checkpoint
qwen3_5 | 3 | head_dim absent | T: head_dim is absent
qwen3_5/published | 3 | text_config.head_dim absent | T: text_config.head_dim is absent
qwen3_5/published | 3 | text_config = 7 | T: text_config is 7, expected an object
qwen3_5 | 3 | num_key_value_heads absent | T: num_key_value_heads is absent
qwen3_5 | 3 | hidden_size absent | T: hidden_size is absent
qwen3_5 | 3 | intermediate_size absent | T: intermediate_size is absent
qwen3_5 | 3 | rope_parameters absent | T: rope_theta is absent
qwen3_5 | 3 | rope_parameters.rope_theta absent | T: rope_theta is absent
qwen3_5 | 3 | rope_parameters.mrope_section = [11, 11, 11] | T: rope_parameters.mrope_section is [11,11,11], expected sections that add up to 32, the pairs of rotated dims
qwen3_5 | 3 | rope_parameters.partial_rotary_factor = 0.004 | T: rope_parameters.partial_rotary_factor = 0.004 of head_dim 256 rotates 1 dims, expected an even number from 2
qwen3_5 | 3 | linear_num_key_heads absent | T: linear_num_key_heads is absent
qwen3_5 | 3 | linear_num_value_heads absent | T: linear_num_value_heads is absent
qwen3_5 | 3 | linear_key_head_dim absent | T: linear_key_head_dim is absent
qwen3_5 | 3 | linear_value_head_dim absent | T: linear_value_head_dim is absent
qwen3_5 | 3 | linear_conv_kernel_dim absent | T: linear_conv_kernel_dim is absent
qwen3_5 | 3 | linear_num_value_heads = 3 | T: linear_num_value_heads is 3, expected a multiple of linear_num_key_heads, which is 2
qwen3_5 | 3 | linear_num_key_heads = 0 | T: linear_num_key_heads is 0, expected a whole number from 1 to 1024
qwen3_5 | 3 | linear_num_value_heads = 18446744073709551615 | T: linear_num_value_heads is 18446744073709551615, expected a whole number from 1 to 1024
qwen3_5 | 4 | linear_value_head_dim = 100 | T: linear_value_head_dim is 100, which this engine does not run: expected a multiple of 16
qwen3_5 | 4 | linear_conv_kernel_dim = 3 | T: linear_conv_kernel_dim is 3, which this engine does not run: expected 4
qwen3_5 | 3 | layer_types = ["linear_attention"] | T: layer_types has 1 entries, expected 4 (num_hidden_layers)
qwen3_5 | 4 | layer_types = ["linear_attention", "sliding_attention", "full_attention", "full_attention"] | T: layer_types[1] is sliding_attention, which this engine does not run: expected linear_attention or full_attention
qwen3_5 | 3 | layer_types absent; full_attention_interval = 0 | T: full_attention_interval is 0, expected a whole number from 1 to 1024
qwen3_moe | 3 | num_local_experts absent | T: num_experts is absent
qwen3_moe | 3 | num_experts = 8 | T: num_experts is 8 and num_local_experts is 16, expected one value
qwen3_moe | 3 | num_local_experts = 100000 | T: num_local_experts is 100000, expected a whole number from 1 to 4096
qwen3_moe | 3 | num_local_experts = 4096; num_hidden_layers = 1000 | T: num_local_experts is 4096, expected at most 131072 in all of the 1000 layers
qwen3_moe | 3 | num_experts_per_tok absent | T: num_experts_per_tok is absent
qwen3_moe | 3 | num_experts_per_tok = 17 | T: num_experts_per_tok is 17, expected a whole number from 1 to 16
qwen3_moe | 3 | num_experts_per_tok = 0 | T: num_experts_per_tok is 0, expected a whole number from 1 to 16
qwen3_moe | 3 | moe_intermediate_size absent | T: moe_intermediate_size is absent
qwen3_moe | 4 | shared_expert_intermediate_size = 32 | T: shared_expert_intermediate_size is 32, which this engine does not run: expected 0
qwen3_moe | 4 | mlp_only_layers = [1] | T: mlp_only_layers is [1], which this engine does not run: expected an empty list
qwen3_moe | 4 | decoder_sparse_step = 2 | T: decoder_sparse_step is 2, which this engine does not run: expected 1
qwen3_moe | 4 | use_sliding_window = true | T: use_sliding_window is true, which this engine does not run: expected false
qwen3_moe | 4 | layer_types = ["full_attention", "sliding_attention", "full_attention", "full_attention"] | T: layer_types[1] is sliding_attention, which this engine does not run: expected full_attention or (Qwen3) sliding_attention
qwen3_moe | 4 | rope_parameters.partial_rotary_factor = 0.5 | T: partial_rotary_factor is 32 of 64 dims, which this engine does not run: expected all
qwen3_5_moe | 3 | shared_expert_intermediate_size absent | T: shared_expert_intermediate_size is absent
qwen3_5_moe | 4 | norm_topk_prob = false | T: norm_topk_prob is false, which this engine does not run: expected true
qwen3_next | 4 | mlp_only_layers = [0, 1] | T: mlp_only_layers is [0,1], which this engine does not run: expected an empty list
qwen3_next | 3 | shared_expert_intermediate_size absent | T: shared_expert_intermediate_size is absent
"#;

// ---- tensors ----

/// A tensor of a file: type, shape, bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

fn stored(name: &str) -> BTreeMap<String, Stored> {
    let bytes = fs::read(folder(name).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let of = |tensor: TensorView| (tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec());
    file.tensors().into_iter().map(|(name, tensor)| (name, of(tensor))).collect()
}

fn write(dir: &Path, name: &str, tensors: &BTreeMap<String, Stored>) {
    fs::copy(folder(name).join("config.json"), dir.join("config.json")).unwrap();
    let view = |(dtype, shape, bytes): &Stored| {
        TensorView::new(*dtype, shape.clone(), &bytes.clone().leak()[..]).unwrap()
    };
    let views = tensors.iter().map(|(name, tensor)| (name, view(tensor)));
    serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

/// The exit code and the sentence of the error for these tensors, with `T` in place of the folder.
fn refusal(name: &str, tensors: &BTreeMap<String, Stored>) -> (u8, String) {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), name, tensors);
    match Pair::open(disk(dir.path()), None) {
        Ok(_) => (0, "opened".into()),
        Err(e) => (e.exit_code(), e.to_string().replace(dir.path().to_str().unwrap(), "T")),
    }
}

/// The bits of the logits of a few tokens.
fn logits(dir: &Path) -> Vec<u32> {
    let target = Target::load(&Pair::open(disk(dir), None).unwrap().target).unwrap();
    let mut cache = Cache::new(&target.config.stack, 16).unwrap();
    let mut logits = Vec::new();
    target.logits(&target.forward(&[5, 99, 7, 300], &mut cache, &[], &mut vec![], 4), &mut logits);
    logits.iter().map(|logit| logit.to_bits()).collect()
}

/// Tensors that differ only in the numbers in their names, the first of each.
fn kinds(tensors: &BTreeMap<String, Stored>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let pattern = |name: &str| -> String { name.chars().filter(|c| !c.is_ascii_digit()).collect() };
    tensors.keys().filter(|name| seen.insert(pattern(name))).cloned().collect()
}

fn is_ignored(name: &str) -> bool {
    name.starts_with("mtp.") || name.starts_with("model.visual.")
}

/// The error names the first part of a stacked tensor that is missing.
fn first_part(name: &str) -> String {
    let name = name.replace("model.language_model.", "model.");
    match name.strip_suffix("experts.gate_up_proj") {
        Some(at) => format!("{at}experts.0.gate_proj.weight"),
        None => match name.strip_suffix("experts.down_proj") {
            Some(at) => format!("{at}experts.0.down_proj.weight"),
            None => name,
        },
    }
}

#[test]
fn every_tensor_must_be_there_with_its_shape() {
    for name in FOLDERS {
        let all = stored(name);
        for tensor in kinds(&all) {
            let mut fewer = all.clone();
            let (dtype, shape, bytes) = fewer.remove(&tensor).unwrap();
            let found = refusal(name, &fewer);
            if is_ignored(&tensor) {
                assert_eq!(found, (0, "opened".into()), "{name} without {tensor}");
                continue;
            }
            let missing = format!("T/model.safetensors has no tensor {}", first_part(&tensor));
            assert_eq!(found, (3, missing), "{name}");

            let flat = vec![shape.iter().product::<usize>(), 1];
            fewer.insert(tensor.clone(), (dtype, flat.clone(), bytes));
            let sentence = format!(
                "T/model.safetensors: tensor {tensor} has shape {flat:?}, expected {shape:?} from config.json"
            );
            assert_eq!(refusal(name, &fewer), (3, sentence), "{name}");
        }
    }
}

#[test]
fn unknown_tensors_are_refused() {
    let one = || (Dtype::BF16, vec![1], vec![0, 0]);
    for (name, tensor, expected) in [
        ("qwen3_5", "model.layers.0.linear_attn.conv1d.bias", Some("is not part of this kind of target")),
        ("qwen3_5", "model.layers.0.self_attn.q_proj.weight", Some("is not part of this kind of target")),
        (
            "qwen3_5",
            "model.layers.4.mlp.up_proj.weight",
            Some("belongs to a layer beyond the 4 of config.json"),
        ),
        ("qwen3_5", "mtp.anything", None),
        ("qwen3_5", "model.visual.anything", None),
        ("qwen3_5", "model.visually", Some("is not part of this kind of target")),
        ("qwen3_moe", "mtp.norm.weight", Some("is not part of this kind of target")),
        ("qwen3_moe", "model.visual.anything", Some("is not part of this kind of target")),
        (
            "qwen3_moe",
            "model.layers.0.mlp.experts.16.up_proj.weight",
            Some("is not part of this kind of target"),
        ),
        (
            "qwen3_moe",
            "model.layers.0.mlp.shared_expert_gate.weight",
            Some("is not part of this kind of target"),
        ),
        (
            "qwen3_moe",
            "model.layers.0.mlp.gate.e_score_correction_bias",
            Some("is not part of this kind of target"),
        ),
        (
            "qwen3_next",
            "model.layers.0.linear_attn.in_proj_z.weight",
            Some("is not part of this kind of target"),
        ),
    ] {
        let mut tensors = stored(name);
        tensors.insert(tensor.into(), one());
        let sentence = expected.map(|what| format!("T/model.safetensors: tensor {tensor} {what}"));
        let (_, found) = refusal(name, &tensors);
        assert_eq!(found, sentence.unwrap_or("opened".into()), "{name}: {tensor}");
    }
}

/// A layer may have its experts one by one or stacked, but not both, and not transposed.
#[test]
fn experts_in_both_layouts_are_refused() {
    let (mut both, single) = (stored("qwen3_moe/stacked"), stored("qwen3_moe"));
    let part = "model.layers.2.mlp.experts.3.up_proj.weight";
    both.insert(part.into(), single[part].clone());
    let sentence = "T/model.safetensors: tensor model.layers.2.mlp.experts.gate_up_proj is there together with its part \
                    model.layers.2.mlp.experts.3.up_proj.weight";
    assert_eq!(refusal("qwen3_moe/stacked", &both), (3, sentence.into()));

    let mut mixed = stored("qwen3_moe/stacked");
    let of_layer = |name: &&String| name.starts_with("model.layers.2.mlp.experts");
    let stacked: Vec<String> = mixed.keys().filter(of_layer).cloned().collect();
    stacked.iter().for_each(|name| drop(mixed.remove(name)));
    mixed.extend(
        single.iter().filter(|(name, _)| of_layer(name)).map(|(name, tensor)| (name.clone(), tensor.clone())),
    );
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "qwen3_moe/stacked", &mixed);
    assert!(logits(dir.path()) == logits(&folder("qwen3_moe")), "a layer of each layout");

    let mut transposed = stored("qwen3_5_moe/published");
    let name = "model.language_model.layers.0.mlp.experts.down_proj";
    transposed.get_mut(name).unwrap().1 = vec![12, 32, 64];
    let sentence = format!(
        "T/model.safetensors: tensor {name} has shape [12, 32, 64], expected [12, 64, 32] from config.json"
    );
    assert_eq!(refusal("qwen3_5_moe/published", &transposed), (3, sentence));
}

/// Each tensor has a type of its own. f32 copies of bf16 weights are the same numbers.
#[test]
fn every_tensor_may_have_another_type() {
    let f32_of = |bytes: &[u8]| -> Vec<u8> {
        bytes.as_chunks::<2>().0.iter().flat_map(|two| [0, 0, two[0], two[1]]).collect()
    };
    for name in FOLDERS {
        let all = stored(name);
        for turn in 0..2 {
            let mut mixed = all.clone();
            for (i, (dtype, _, bytes)) in mixed.values_mut().enumerate() {
                if *dtype == Dtype::BF16 && i % 2 == turn {
                    (*dtype, *bytes) = (Dtype::F32, f32_of(bytes));
                }
            }
            let dir = tempfile::tempdir().unwrap();
            write(dir.path(), name, &mixed);
            assert!(logits(dir.path()) == logits(&folder(name)), "{name}");
        }
        let (tensor, (_, shape, bytes)) = all.iter().find(|(name, _)| !is_ignored(name)).unwrap();
        for (dtype, size) in [(Dtype::F16, 2), (Dtype::F8_E4M3, 1)] {
            let mut other = all.clone();
            let len = shape.iter().product::<usize>() * size;
            other.insert(tensor.clone(), (dtype, shape.clone(), bytes[..len].to_vec()));
            let found = refusal(name, &other);
            let sentence = format!(
                "T/model.safetensors: tensor {tensor} is F8_E4M3, which this engine does not run: expected BF16, F16 or F32"
            );
            assert_eq!(found, if size == 2 { (0, "opened".into()) } else { (4, sentence) }, "{name}");
        }
    }
}
