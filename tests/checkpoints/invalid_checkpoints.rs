//! Invalid checkpoint folders, opened through the library: error message and exit code of each kind.

use crate::support;

use dflash::Error;
use dflash::checkpoint::safetensors::Dtype;
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use support::{Raw, Target, disk, edit_json, open_pair, small, small_pair, write_pair};

/// Writes a small pair, applies `corrupt` to its folders, and opens it. Returns the exit code and the error
/// message, with `T` and `D` in place of the two folders.
fn refusal(corrupt: impl FnOnce(&Path, &Path)) -> (u8, String) {
    let pair = small_pair();
    corrupt(&pair.target, &pair.drafter);
    let error = match open_pair(&pair) {
        Ok(_) => return (0, "opened".into()),
        Err(error) => error,
    };
    let sentence = error.to_string().replace(pair.target.to_str().unwrap(), "T");
    (error.exit_code(), sentence.replace(pair.drafter.to_str().unwrap(), "D"))
}

/// Checks a table with one case per line: exit code | changes to a config, `field = JSON` or `field absent` |
/// error message.
fn check_config_rows(table: &str, of_target: bool) {
    for row in table.lines().filter(|row| !row.is_empty()) {
        let [code, edits, sentence] = row.splitn(3, " | ").collect::<Vec<_>>().try_into().expect(row);
        let found = refusal(|target, drafter| {
            edit_json(if of_target { target } else { drafter }, "config.json", |config| {
                edits.split("; ").for_each(|edit| change(config, edit));
            });
        });
        assert_eq!((found.0.to_string().as_str(), found.1.as_str()), (code, sentence), "{row}");
    }
}

/// Applies one change of a table to a config.
pub fn change(config: &mut Value, edit: &str) {
    let (path, value) = match edit.split_once(" = ") {
        Some((path, value)) => (path, Some(serde_json::from_str(value).expect(edit))),
        None => (edit.strip_suffix(" absent").expect(edit), None),
    };
    let (table, field) = match path.split_once('.') {
        Some((table, field)) => (&mut config[table], field),
        None => (config, path),
    };
    let table = table.as_object_mut().unwrap();
    match value {
        Some(value) => table.insert(field.into(), value),
        None => table.remove(field),
    };
}

#[test]
fn invalid_target_configs_are_refused_by_field() {
    check_config_rows(TARGET_CONFIGS, true);
}

const TARGET_CONFIGS: &str = r#"
4 | architectures = ["MistralForCausalLM"] | T/config.json: architectures is MistralForCausalLM, which this engine does not run: expected the text model of a Qwen3, Qwen3-MoE, Qwen3.5, Qwen3-Next or Llama checkpoint
4 | architectures = ["GptOssForCausalLM"] | T/config.json: architectures is GptOssForCausalLM, which this engine does not run: expected the text model of a Qwen3, Qwen3-MoE, Qwen3.5, Qwen3-Next or Llama checkpoint
3 | architectures = "Qwen3ForCausalLM" | T/config.json: architectures is "Qwen3ForCausalLM", expected a list of one name
3 | architectures absent | T/config.json: architectures is absent
4 | model_type = "qwen3_moe" | T/config.json: model_type is qwen3_moe, which this engine does not run: expected qwen3
2 | architectures = ["DFlashDraftModel"] | target is given T/config.json, which describes a drafter (DFlashDraftModel): expected a target
2 | architectures = ["LlamaForCausalLMEagle3"] | target is given T/config.json, which describes a drafter (LlamaForCausalLMEagle3): expected a target
4 | hidden_act = "gelu" | T/config.json: hidden_act is gelu, which this engine does not run: expected silu
4 | attention_bias = true | T/config.json: attention_bias is true, which this engine does not run: expected false
4 | mlp_bias = true | T/config.json: mlp_bias is true, which this engine does not run: expected false
4 | quantization_config = { "quant_method": "fp8" } | T/config.json: quantization_config is fp8, which this engine does not run: expected an unquantised checkpoint
4 | partial_rotary_factor = 0.5 | T/config.json: partial_rotary_factor is 4 of 8 dims, which this engine does not run: expected all
3 | hidden_size absent | T/config.json: hidden_size is absent
3 | hidden_size = 0 | T/config.json: hidden_size is 0, expected a whole number from 1 to 65536
3 | hidden_size = -64 | T/config.json: hidden_size is -64, expected a whole number from 1 to 65536
3 | hidden_size = 64.0 | T/config.json: hidden_size is 64.0, expected a whole number from 1 to 65536
3 | hidden_size = "64" | T/config.json: hidden_size is "64", expected a whole number from 1 to 65536
3 | hidden_size = 18446744073709551615 | T/config.json: hidden_size is 18446744073709551615, expected a whole number from 1 to 65536
3 | num_hidden_layers = 1000000000 | T/config.json: num_hidden_layers is 1000000000, expected a whole number from 1 to 1024
3 | num_key_value_heads = 3 | T/config.json: num_attention_heads is 4, expected a multiple of num_key_value_heads, which is 3
3 | head_dim = 7 | T/config.json: head_dim is 7, expected an even number from 2 to 1024
3 | rms_norm_eps = 0 | T/config.json: rms_norm_eps is 0, expected a number above 0 and at most 1
3 | rms_norm_eps = 1e-60 | T/config.json: rms_norm_eps is 1e-60, expected a number above 0 and at most 1
3 | rope_theta = -1e4 | T/config.json: rope_theta is -10000.0, expected a number above 1
3 | rope_parameters = { "rope_theta": 5e5 } | T/config.json: rope_parameters.rope_theta is 500000 and rope_theta is 10000, expected one value
3 | rope_scaling = { "type": "linear", "factor": 2.0 }; rope_parameters = { "rope_type": "default" } | T/config.json: rope_scaling and rope_parameters differ, expected only one, or equal values
0 | rope_scaling = { "type": "linear", "factor": 2.0 }; rope_parameters = { "type": "linear", "factor": 2.0, "rope_theta": 1e4 } | opened
4 | rope_parameters = { "full_attention": { "rope_theta": 1e4 } } | T/config.json: rope_parameters.full_attention holds RoPE settings for some layers, expected the same settings for all
4 | rope_scaling = { "rope_type": "dynamic", "factor": 2.0 } | T/config.json: rope_scaling.rope_type is dynamic, which this engine does not run: expected default, linear, llama3 or yarn
4 | rope_scaling = { "type": "longrope", "factor": 2.0 } | T/config.json: rope_scaling.rope_type is longrope, which this engine does not run: expected default, linear, llama3 or yarn
3 | rope_scaling = { "factor": 2.0 } | T/config.json: rope_scaling.rope_type is absent
3 | rope_scaling = { "type": "linear" } | T/config.json: rope_scaling.factor is absent
3 | rope_scaling = { "type": "linear", "factor": 0 } | T/config.json: rope_scaling.factor is 0, expected a number from 1
3 | rope_scaling = [] | T/config.json: rope_scaling is [], expected an object
3 | rope_scaling = { "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_position_embeddings": 8192 } | T/config.json: rope_scaling.high_freq_factor is 4, expected a number above low_freq_factor
0 | rope_scaling = { "type": "default", "mrope_section": [8, 8, 8] } | opened
4 | rope_scaling = { "type": "linear", "factor": 2.0, "beta_fast": 32 } | T/config.json: rope_scaling.beta_fast is 32, which rope_type linear does not use: this engine would compute other positions
4 | rope_parameters = { "rope_theta": 1e4, "factor": 2.0, "rope_type": "default" } | T/config.json: rope_parameters.factor is 2.0, which rope_type default does not use: this engine would compute other positions
4 | rope_scaling = { "type": "yarn", "factor": 2.0, "low_freq_factor": 2 } | T/config.json: rope_scaling.low_freq_factor is 2, which rope_type yarn does not use: this engine would compute other positions
4 | rope_scaling = { "type": "yarn", "factor": 2.0, "long_factor": [1, 2] } | T/config.json: rope_scaling.long_factor is [1,2], which rope_type yarn does not use: this engine would compute other positions
4 | rope_scaling = { "type": "yarn", "factor": 2.0, "extrapolation_factor": 0.5 } | T/config.json: rope_scaling.extrapolation_factor is 0.5, which rope_type yarn does not use: this engine would compute other positions
3 | rope_scaling = { "type": "yarn", "factor": 1e30, "original_max_position_embeddings": 64 } | T/config.json: rope_scaling.factor x original_max_position_embeddings is 64000000000000000000000000000000 positions, expected at most 16777216
0 | rope_scaling = { "type": "default", "factor": 1.0 } | opened
0 | rope_scaling = { "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1, "mrope_section": null } | opened
0 | rope_scaling = { "rope_type": "linear", "type": "linear", "factor": 2.0, "original_max_position_embeddings": 64 } | opened
0 | rope_scaling = { "rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192 } | opened
0 | rope_scaling = { "rope_type": "yarn", "factor": 4, "attention_factor": 1, "beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0, "truncate": false, "original_max_position_embeddings": 64 } | opened
3 | layer_types = ["full_attention"] | T/config.json: layer_types has 1 entries, expected 4 (num_hidden_layers)
3 | layer_types = ["sliding_attention", "sliding_attention", "sliding_attention", "sliding_attention"] | T/config.json: layer_types[0] is sliding_attention, but sliding_window is not set or use_sliding_window is false
4 | layer_types = ["linear_attention", "linear_attention", "linear_attention", "linear_attention"] | T/config.json: layer_types[0] is linear_attention, which this engine does not run: expected full_attention or (Qwen3) sliding_attention
3 | vocab_size = -1 | T/config.json: vocab_size is -1, expected a whole number from 1 to 16777216
3 | tie_word_embeddings = "yes" | T/config.json: tie_word_embeddings is "yes", expected true or false
0 | max_position_embeddings = 8 | opened
3 | tie_word_embeddings = false | T/model.safetensors has no tensor lm_head.weight
3 | intermediate_size = 22 | T/model.safetensors: tensor model.layers.0.mlp.gate_proj.weight has shape [20, 16], expected [22, 16] from config.json
3 | num_hidden_layers = 3 | D/config.json was not made for T/config.json: its number of target layers is 4, the target's is 3
"#;

#[test]
fn invalid_drafter_configs_are_refused_by_field() {
    check_config_rows(DRAFTER_CONFIGS, false);
}

const DRAFTER_CONFIGS: &str = r#"
4 | architectures = ["DFlash2DraftModel"]; dflash_config.conv_group_size = 7 | D/config.json: conv_group_size is 7, which this engine does not run: expected a divisor of the hidden size 16
4 | dflash_config.selector_rank = 256 | D/config.json: architectures is DFlashDraftModel, which this engine does not run: expected DFlash2DraftModel
4 | conv_kernel_size = 2 | D/config.json: dflash_config is present, which makes it a DFlash drafter in z-lab's layout, but conv_kernel_size is 2, which belongs to a DFlash2 drafter
4 | dflash_config.markov_rank = 256 | D/config.json: dflash_config is present, which makes it a DFlash drafter in z-lab's layout, but dflash_config.markov_rank is 256, which belongs to a DSpark drafter
4 | sample_from_anchor = true | D/config.json: dflash_config is present, which makes it a DFlash drafter in z-lab's layout, but sample_from_anchor is true, which belongs to a drafter in the speculators layout
4 | dflash_config.shift_label = true | D/config.json: dflash_config is present, which makes it a DFlash drafter in z-lab's layout, but dflash_config.shift_label is true, which belongs to a Domino drafter
4 | dflash_config.projector_type = "domino" | D/config.json: dflash_config.projector_type is "domino", which makes it a Domino drafter: this engine does not run it
4 | fc_layernorm = true | D/config.json: dflash_config is present, which makes it a DFlash drafter in z-lab's layout, but fc_layernorm is true, which belongs to a drafter with a norm per tap
4 | dflash_config.use_swa = true | D/config.json: dflash_config is present, which makes it a DFlash drafter in z-lab's layout, but dflash_config.use_swa is true, which belongs to a MiMo-style drafter
4 | attention_sink_bias = true | D/config.json: dflash_config is present, which makes it a DFlash drafter in z-lab's layout, but attention_sink_bias is true, which belongs to a MiMo-style drafter
4 | attention_value_scale = 0.612 | D/config.json: dflash_config is present, which makes it a DFlash drafter in z-lab's layout, but attention_value_scale is 0.612, which belongs to a MiMo-style drafter
4 | dflash_config.tree_width = 4 | D/config.json: dflash_config.tree_width is unknown: this engine does not run it
4 | speculators_model_type = "dflash" | D/config.json: speculators_model_type is "dflash", which makes it a DFlash drafter in the speculators layout, but dflash_config is present, which belongs to a drafter in z-lab's layout
4 | dflash_config absent; speculators_model_type = "dspark"; ttt_length = 5 | D/config.json: speculators_model_type is "dspark", which makes it a DSpark drafter in the speculators layout, but ttt_length is 5, which belongs to an EAGLE-3 drafter
3 | dflash_config absent; speculators_model_type = "eagle3"; draft_vocab_size = 256 | D/config.json: transformer_layer_config is absent
4 | dflash_config absent; speculators_model_type = "eagle3"; markov_rank = 8 | D/config.json: speculators_model_type is "eagle3", which makes it an EAGLE-3 drafter in the speculators layout, but markov_rank is 8, which belongs to a DSpark drafter
4 | speculators_model_type = "mtp" | D/config.json: speculators_model_type is "mtp", which makes it a drafter of another kind in the speculators layout: this engine does not run it
4 | open_spec_config_version = "0.0.0"; architectures = ["DflashDraftModel"]; speculative_config = { "method": "dflash" } | D/config.json: open_spec_config_version is "0.0.0", which makes it a drafter in the layout of Open Spec Config: this engine does not run it
4 | architectures = ["MedusaModel"] | D/config.json: architectures is MedusaModel, which makes it a Medusa drafter: this engine does not run it
4 | architectures = ["PeagleDraftModel"]; dflash_config absent | D/config.json: architectures is PeagleDraftModel, which makes it a P-EAGLE drafter: this engine does not run it
4 | architectures = ["MLPSpeculatorPreTrainedModel"] | D/config.json: architectures is MLPSpeculatorPreTrainedModel, which makes it an MLP speculator: this engine does not run it
4 | transformer_layer_config = {} | D/config.json: transformer_layer_config is present, which makes it a drafter in the speculators layout without a speculators_model_type: this engine does not run it
3 | dflash_config absent; num_anchors = 512; markov_rank = 0; architectures = ["Qwen3DSparkModel"] | D/config.json: target_layer_ids is absent, expected the layers of the target that the drafter reads: give them as `taps` 1,9,...
4 | dflash_config absent; architectures = ["Qwen3Eagle3Model"]; target_layer_ids = [1]; ttt_length = 5 | D/config.json: num_hidden_layers is 2, which this engine does not run: expected 1 in an EAGLE-3 drafter
4 | dflash_config absent; architectures = ["LlamaForCausalLMEagle3"]; norm_output = true | D/config.json: norm_output is true, which SGLang and SpecForge read in different ways: remove the field if the final norm is only for the head
3 | dflash_config absent; architectures = ["LlamaForCausalLMEagle3"]; num_hidden_layers = 1; target_layer_ids = [0, 1] | D/config.json: target_layer_ids is [0,1], which belongs to a drafter in DeepSpec's layout: give `taps`, the layers whose outputs the drafter reads
4 | dflash_config absent; architectures = ["LlamaForCausalLMEagle3"]; model_type = "gpt2" | D/config.json: model_type is gpt2, which this engine does not run: expected llama or qwen3
4 | dflash_config absent; architectures = ["LlamaForCausalLMEagle3"]; tie_word_embeddings = true | D/config.json: tie_word_embeddings is true, which this engine does not run: expected false in an EAGLE-3 drafter
3 | dflash_config absent; architectures = ["LlamaForCausalLMEagle3"]; num_hidden_layers = 1; eagle_config = { "eagle_aux_hidden_state_layer_ids": [0, 1] } | D/config.json: eagle_config.eagle_aux_hidden_state_layer_ids is [0,1], which some engines read as outputs of layers and others as their inputs: give `taps`, the layers whose outputs the drafter reads
3 | dflash_config absent; architectures = ["LlamaForCausalLMEagle3"]; num_hidden_layers = 1; eagle_config = { "norm_before_fc": 1 } | D/config.json: eagle_config.norm_before_fc is 1, expected true or false
4 | architectures = ["DSparkDraftModel"] | D/config.json: architectures is DSparkDraftModel, which makes it a DSpark drafter in SpecForge's layout: this engine does not run it
4 | architectures = ["DominoDraftModel"] | D/config.json: architectures is DominoDraftModel, which makes it a Domino drafter: this engine does not run it
4 | dflash_config.projector_type = "dspark" | D/config.json: dflash_config.projector_type is "dspark", which makes it a DSpark drafter in SpecForge's layout: this engine does not run it
4 | dflash_config absent; architectures = ["LlamaForCausalLM"]; draft_vocab_size = 32000 | D/config.json: num_hidden_layers is 2, which this engine does not run: expected 1 in an EAGLE-3 drafter
4 | draft_vocab_size = 32 | D/config.json: draft_vocab_size is 32, which this engine does not run: expected the whole vocabulary in z-lab's layout
0 | draft_vocab_size = 40 | opened
4 | architectures = ["LlamaForCausalLMEagle3"] | D/config.json: architectures is LlamaForCausalLMEagle3, which makes it an EAGLE-3 drafter in EAGLE's layout, but dflash_config is present, which belongs to a drafter in z-lab's layout
4 | architectures = ["OtherDraftModel"] | D/config.json: architectures is OtherDraftModel, which this engine does not run: expected DFlashDraftModel or Qwen3DFlashDraftModel
4 | model_type = "llama" | D/config.json: model_type is llama, which this engine does not run: expected qwen3
4 | quantization_config = { "bits": 4 } | D/config.json: quantization_config is present without a quant_method, which this engine does not run: expected an unquantised checkpoint
4 | attention_bias = true | D/config.json: attention_bias is true, which this engine does not run: expected false
2 | dflash_config absent; architectures = ["Qwen3ForCausalLM"] | draft is given D/config.json, which describes a target (Qwen3ForCausalLM): expected a DFlash drafter
3 | dflash_config = [1] | D/config.json: dflash_config is [1], expected an object
3 | dflash_config.mask_token_id absent | D/config.json: mask_token_id is absent
3 | dflash_config.mask_token_id = 40 | D/config.json: dflash_config.mask_token_id is 40, expected a whole number from 0 to 39
3 | num_target_layers absent | D/config.json: num_target_layers is absent
3 | dflash_config.target_layer_ids absent | D/config.json: dflash_config.target_layer_ids is absent, expected the layers of the target that the drafter reads: give them as `taps` 1,9,...
3 | dflash_config.target_layer_ids = [] | D/config.json: dflash_config.target_layer_ids is empty, expected at least one layer
3 | dflash_config.target_layer_ids = [0, 4] | D/config.json: dflash_config.target_layer_ids holds 4, expected layers from 0 to 3 (its target has 4 layers)
3 | dflash_config.target_layer_ids = [0, -1] | D/config.json: dflash_config.target_layer_ids[1] is -1, expected a whole number from 0 to 1024
4 | dflash_config.target_layer_ids = [0, 3] | D/config.json: dflash_config.target_layer_ids holds 3, the target's last layer: engines differ on whether the final norm applies to it
3 | dflash_config.target_layer_ids = [2, 2] | D/config.json: dflash_config.target_layer_ids holds 2 twice
3 | dflash_config.target_layer_ids = [0, 1, 2] | D/model.safetensors: tensor fc.weight has shape [16, 32], expected [16, 48] from config.json
3 | block_size = 1 | D/config.json: block_size is 1, expected a whole number from 2 to 1024
3 | dflash_config.input_embedding_scale = 0 | D/config.json: dflash_config.input_embedding_scale is 0, expected a number above 0, in the range of f32
3 | dflash_config.output_multiplier = 1e300 | D/config.json: dflash_config.output_multiplier is 1e+300, expected a number above 0, in the range of f32
3 | is_causal = "no" | D/config.json: is_causal is "no", expected true or false
3 | layer_types = ["full_attention", "sliding_attention"]; sliding_window = 4; use_sliding_window = false | D/config.json: layer_types[1] is sliding_attention, but sliding_window is not set or use_sliding_window is false
3 | partial_rotary_factor = 0.2 | D/config.json: partial_rotary_factor = 0.2 of head_dim 8 rotates 1 dims, expected an even number from 2
3 | hidden_size = 32 | D/config.json was not made for T/config.json: its hidden size is 32, the target's is 16
0 | vocab_size = 41 | opened
0 | vocab_size = 39 | opened
3 | num_target_layers = 5 | D/config.json was not made for T/config.json: its number of target layers is 5, the target's is 4
3 | num_hidden_layers = 1 | D/model.safetensors: tensor layers.1.input_layernorm.weight belongs to a layer beyond the 1 of config.json
"#;

/// Applies `edit` to the header, parsed as JSON, of a model with one weights file.
fn edit_header(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("model.safetensors");
    let file = fs::read(&path).unwrap();
    let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&file[8..end]).unwrap();
    edit(&mut header);
    fs::write(&path, support::safetensors_raw(&header.to_string(), &file[end..])).unwrap();
}

/// A file of eight tensors, each of nearly an eighth of 2^64 bytes: their sum fits 64 bits, but not together
/// with the header's length.
fn header_whose_sizes_overflow() -> Vec<u8> {
    let size = (1u64 << 61) - 1;
    let mut header = json!({});
    for i in 0..8 {
        header[i.to_string()] =
            json!({ "dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size] });
    }
    support::safetensors_raw(&header.to_string(), &[])
}

/// Applies `edit` to a model's tensors and writes them as f32 to one file.
fn edit_tensors(dir: &Path, tensors: Vec<Raw>, edit: impl FnOnce(&mut Vec<Raw>)) {
    let mut tensors = tensors;
    edit(&mut tensors);
    support::write_tensors(dir, &tensors, Dtype::F32, 1);
}

/// A tensor with this name and one element.
fn one_element(name: &str) -> Raw {
    Raw { name: name.into(), shape: vec![1], values: vec![0.0] }
}

#[test]
#[rustfmt::skip] // a table: each case, then the expected exit code and message
fn invalid_safetensors_files_are_refused_with_the_reason() {
    let target = || support::target_tensors(&small().0);
    let drafter = || support::drafter_tensors(&small().0, &small().1);
    type Corrupt = Box<dyn Fn(&Path, &Path)>;
    let write = |bytes: Vec<u8>| -> Corrupt {
        Box::new(move |t, _| fs::write(t.join("model.safetensors"), &bytes).unwrap())
    };
    let cut = |keep: fn(usize) -> usize| -> Corrupt {
        Box::new(move |t, _| {
            let path = t.join("model.safetensors");
            let file = fs::read(&path).unwrap();
            fs::write(&path, &file[..keep(file.len())]).unwrap();
        })
    };
    let header = |edit: fn(&mut Value)| -> Corrupt { Box::new(move |t, _| edit_header(t, edit)) };
    let norm = "model.norm.weight";
    let rows: Vec<(Corrupt, u8, &str)> = vec![
        (write(vec![]),
            3, "T/model.safetensors is empty, expected a safetensors file"),
        (write(vec![1, 2, 3]),
            3, "T/model.safetensors is not a complete safetensors file: it has 3 bytes, expected at least 8 for the header's length"),
        (write(support::safetensors_raw("{}", &[])),
            3, "T/model.safetensors has no tensor model.embed_tokens.weight"),
        (write(support::safetensors_raw("{\"a\":", &[])),
            3, "T/model.safetensors is not a complete safetensors file: its header: EOF while parsing a value at line 1 column 5"),
        (write(support::safetensors_raw("[]", &[])),
            3, "T/model.safetensors is not a complete safetensors file: its header: invalid type: sequence, expected struct HashMetadata at line 1 column 0"),
        (write(support::safetensors_raw("\u{1b}[31m", &[])),
            3, "T/model.safetensors is not a complete safetensors file: its header: expected value at line 1 column 1"),
        (write([u64::MAX.to_le_bytes().as_slice(), b"{}"].concat()),
            3, "T/model.safetensors is not a complete safetensors file: its header's length is given as 18446744073709551615 bytes, but only 2 follow"),
        (write(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n".to_vec()),
            3, "T/model.safetensors is a Git LFS pointer, the file itself was not fetched, expected a safetensors file"),
        (write(b"<!DOCTYPE html><title>Sign in</title>".to_vec()),
            3, "T/model.safetensors is an HTML or XML page, expected a safetensors file"),
        (write(b"PK\x03\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\x01archive/data.pkl".to_vec()),
            3, "T/model.safetensors is a zip archive, expected a safetensors file"),
        // A header of 60 bytes begins as HTML does.
        (write(support::safetensors_raw(&format!("{{}}{}", " ".repeat(58)), &[])),
            3, "T/model.safetensors has no tensor model.embed_tokens.weight"),
        (cut(|_| 100),
            3, "T/model.safetensors is not a complete safetensors file: its header's length is given as 4586 bytes, but only 92 follow"),
        (cut(|len| len - 1),
            3, "T/model.safetensors is not a complete safetensors file: its header describes 21664 bytes of tensors, but 21663 follow it"),
        (header(|h| h["model.norm.weight"]["shape"] = json!([u64::MAX, u64::MAX])),
            3, "T/model.safetensors is not a complete safetensors file: its header: overflow computing buffer size from shape and/or element type"),
        (header(|h| h["model.norm.weight"]["shape"] = json!([-1])),
            3, "T/model.safetensors is not a complete safetensors file: its header: invalid value: integer `-1`, expected usize at line 1 column 4586"),
        (header(|h| h["model.norm.weight"]["shape"] = json!([17])),
            3, "T/model.safetensors is not a complete safetensors file: its header: invalid shape, data type, or offset for tensor"),
        (header(|h| h["model.norm.weight"]["dtype"] = json!("Q4_0")),
            3, "T/model.safetensors is not a complete safetensors file: its header: unknown variant `Q4_0`, expected one of `BOOL`, `F4`, `F6_E2M3`, `F6_E3M2`, `U8`, `I8`, `F8_E5M2`, `..."),
        (header(|h| h["model.norm.weight"]["dtype"] = json!("I16")),
            4, "T/model.safetensors: tensor model.norm.weight is I16, which this engine does not run: expected BF16, F16 or F32"),
        (header(|h| h["model.norm.weight"]["data_offsets"] = json!([0, 32])),
            3, "T/model.safetensors is not a complete safetensors file: its header: invalid offset for tensor `model.embed_tokens.weight`"),
        (header(|h| h["model.norm.weight"]["data_offsets"] = json!([32, 0])),
            3, "T/model.safetensors is not a complete safetensors file: its header: invalid offset for tensor `model.norm.weight`"),
        (write(header_whose_sizes_overflow()),
            3, "T/model.safetensors is not a complete safetensors file: its header describes 18446744073709551608 bytes of tensors, but 0 follow it"),
        (Box::new(move |t, _| edit_tensors(t, target(), |all| all.retain(|x| x.name != norm))),
            3, "T/model.safetensors has no tensor model.norm.weight"),
        (Box::new(move |t, _| { edit_tensors(t, target(), |all| all.push(one_element("model.layers.0.self_attn.q_proj.bias"))) }),
            4, "T/model.safetensors: tensor model.layers.0.self_attn.q_proj.bias is not part of this kind of target"),
        (Box::new(move |t, _| { edit_tensors(t, target(), |all| all.push(one_element("model.layers.4.mlp.up_proj.weight"))) }),
            3, "T/model.safetensors: tensor model.layers.4.mlp.up_proj.weight belongs to a layer beyond the 4 of config.json"),
        (Box::new(move |t, _| { edit_tensors(t, target(), |all| all.push(one_element("model.layers.0.mlp.up_proj.weight_scale"))) }),
            4, "T/model.safetensors: tensor model.layers.0.mlp.up_proj.weight_scale belongs to a quantised checkpoint, which this engine does not run: expected BF16, F16 or F32 weights"),
        (Box::new(move |t, _| { edit_tensors(t, target(), |all| all.push(one_element("model.layers.0.mlp.up_proj.qweight"))) }),
            4, "T/model.safetensors: tensor model.layers.0.mlp.up_proj.qweight belongs to a quantised checkpoint, which this engine does not run: expected BF16, F16 or F32 weights"),
        (Box::new(move |_, d| { edit_tensors(d, drafter(), |all| all.push(one_element("candidate_selector.predecessor_codebook"))) }),
            4, "D/model.safetensors: tensor candidate_selector.predecessor_codebook belongs to a DFlash2 drafter, but config.json describes a DFlash drafter in z-lab's layout"),
        (Box::new(move |_, d| { edit_tensors(d, drafter(), |all| all.push(one_element("layers.0.attention_conv.base_kernel"))) }),
            4, "D/model.safetensors: tensor layers.0.attention_conv.base_kernel belongs to a DFlash2 drafter, but config.json describes a DFlash drafter in z-lab's layout"),
        (Box::new(move |_, d| { edit_tensors(d, drafter(), |all| all.push(one_element("model.embed_tokens.weight"))) }),
            4, "D/model.safetensors: tensor model.embed_tokens.weight belongs to a drafter with an embedding, head or vocabulary of its own, but config.json describes a DFlash drafter in z-lab's layout"),
        (Box::new(move |_, d| edit_tensors(d, drafter(), |all| all.push(one_element("d2t")))),
            4, "D/model.safetensors: tensor d2t belongs to a drafter with an embedding, head or vocabulary of its own, but config.json describes a DFlash drafter in z-lab's layout"),
        (Box::new(move |_, d| edit_tensors(d, drafter(), |all| all.push(one_element("markov_head.markov_w1.weight")))),
            4, "D/model.safetensors: tensor markov_head.markov_w1.weight belongs to a DSpark drafter, but config.json describes a DFlash drafter in z-lab's layout"),
        (Box::new(move |_, d| edit_tensors(d, drafter(), |all| all.push(one_element("midlayer.hidden_norm.weight")))),
            4, "D/model.safetensors: tensor midlayer.hidden_norm.weight belongs to an EAGLE-3 drafter, but config.json describes a DFlash drafter in z-lab's layout"),
        (Box::new(move |_, d| edit_tensors(d, drafter(), |all| all.push(one_element("model.prefix_gru.weight")))),
            4, "D/model.safetensors: tensor model.prefix_gru.weight belongs to a Domino drafter, but config.json describes a DFlash drafter in z-lab's layout"),
        (Box::new(move |_, d| edit_tensors(d, drafter(), |all| all.push(one_element("markov_w1")))),
            4, "D/model.safetensors: tensor markov_w1 is not part of this kind of drafter"),
        (Box::new(move |_, d| edit_tensors(d, drafter(), |all| all.push(one_element("model.fc.weight")))),
            4, "D/model.safetensors: tensor model.fc.weight is not part of this kind of drafter"),
        (Box::new(move |_, d| edit_tensors(d, drafter(), |all| all.retain(|x| x.name != "fc.weight"))),
            3, "D/model.safetensors has no tensor fc.weight"),
        (Box::new(|t, d| { fs::rename(d.join("model.safetensors"), t.join("model.safetensors")).unwrap(); }),
            4, "T/model.safetensors: tensor fc.weight is not part of this kind of target"),
    ];
    for (corrupt, code, sentence) in rows {
        let found = refusal(|t, d| corrupt(t, d));
        assert_eq!((found.0, found.1.as_str()), (code, sentence));
    }
}

#[test]
#[rustfmt::skip] // a table: each case, then the expected exit code and message
fn invalid_folders_and_shard_indexes_are_refused() {
    type Corrupt = fn(&Path, &Path);
    fn rename_weights(dir: &Path, file: &str) {
        fs::rename(dir.join("model.safetensors"), dir.join(file)).unwrap();
    }
    fn edit_index(dir: &Path, edit: impl FnOnce(&mut Value)) {
        fs::remove_file(dir.join("model.safetensors")).unwrap();
        support::write_tensors(dir, &support::target_tensors(&small().0), Dtype::F32, 2);
        edit_json(dir, "model.safetensors.index.json", edit);
    }
    fn set_first_shard(index: &mut Value, file: &str) {
        index["weight_map"]["model.embed_tokens.weight"] = file.into();
    }
    let rows: &[(Corrupt, u8, &str)] = &[
        (|t, _| fs::remove_dir_all(t).unwrap(),
            3, "T does not exist: expected a Hugging Face model folder"),
        (|t, _| { fs::remove_dir_all(t).unwrap(); fs::write(t, "GGUF").unwrap(); },
            3, "T is a file: expected a Hugging Face model folder"),
        (|t, _| fs::remove_file(t.join("config.json")).unwrap(),
            3, "T has no config.json, it holds model.safetensors: expected a Hugging Face model folder"),
        (|t, _| fs::remove_file(t.join("model.safetensors")).unwrap(),
            3, "T has no model.safetensors: expected safetensors, in one file or in shards with model.safetensors.index.json"),
        (|t, _| rename_weights(t, "pytorch_model.bin"),
            3, "T has no model.safetensors, it holds pytorch_model.bin: expected safetensors, in one file or in shards with model.safetensors.index.json"),
        (|t, _| rename_weights(t, "qwen3-q4.gguf"),
            3, "T has no model.safetensors, it holds qwen3-q4.gguf: expected safetensors, in one file or in shards with model.safetensors.index.json"),
        (|t, _| { fs::remove_file(t.join("model.safetensors")).unwrap(); fs::create_dir(t.join("model.safetensors")).unwrap(); },
            3, "T/model.safetensors is not a regular file"),
        (|t, _| fs::write(t.join("config.json"), "").unwrap(),
            3, "T/config.json is empty, expected JSON"),
        (|t, _| fs::write(t.join("config.json"), "[1]").unwrap(),
            3, "T/config.json is not a JSON object"),
        (|t, _| fs::write(t.join("config.json"), "{\"rms_norm_eps\": -Infinity}").unwrap(),
            3, "T/config.json is not valid JSON: invalid number at line 1 column 19 (NaN and Infinity are not valid JSON)"),
        (|t, _| fs::write(t.join("config.json"), "{\"rope_theta\": NaN}").unwrap(),
            3, "T/config.json is not valid JSON: expected value at line 1 column 16 (NaN and Infinity are not valid JSON)"),
        (|t, _| fs::write(t.join("config.json"), [b'{', 0xff]).unwrap(),
            3, "T/config.json is not valid JSON: key must be a string at line 1 column 2"),
        (|t, _| fs::write(t.join("config.json"), "[".repeat(100_000)).unwrap(),
            3, "T/config.json is not a JSON object"),
        (|t, _| fs::write(t.join("config.json"), " ".repeat(5 << 20)).unwrap(),
            3, "T/config.json has 5242880 bytes, expected a configuration of at most 4194304"),
        (|t, _| edit_json(t, "generation_config.json", |c| c["eos_token_id"] = vec![1; 1025].into()),
            3, "T/generation_config.json: eos_token_id has 1025 ids, expected at most 1024"),
        (|t, _| edit_json(t, "generation_config.json", |c| c["eos_token_id"] = json!([0, 40])),
            3, "T/generation_config.json: eos_token_id[1] is 40, expected a whole number from 0 to 39"),
        (|t, _| edit_index(t, |_| ()),
            0, "opened"),
        (|t, _| edit_index(t, |i| i["weight_map"] = json!(3)),
            3, "T/model.safetensors.index.json is malformed: invalid type: integer `3`, expected a map at line 5 column 17"),
        (|t, _| edit_index(t, |i| i["weight_map"] = json!({})),
            3, "T/model.safetensors.index.json has no tensor model.embed_tokens.weight"),
        (|t, _| edit_index(t, |i| *i = json!({})),
            3, "T/model.safetensors.index.json is malformed: missing field `weight_map` at line 1 column 2"),
        (|t, _| edit_index(t, |i| set_first_shard(i, "../drafter/model.safetensors")),
            3, "T/model.safetensors.index.json lists the shard \"../drafter/model.safetensors\": expected the plain name of a file in the same folder"),
        (|t, _| edit_index(t, |i| set_first_shard(i, "/etc/passwd")),
            3, "T/model.safetensors.index.json lists the shard \"/etc/passwd\": expected the plain name of a file in the same folder"),
        (|t, _| edit_index(t, |i| set_first_shard(i, "..")),
            3, "T/model.safetensors.index.json lists the shard \"..\": expected the plain name of a file in the same folder"),
        (|t, _| edit_index(t, |i| set_first_shard(i, "..\\x")),
            3, "T/model.safetensors.index.json lists the shard \"..\\x\": expected the plain name of a file in the same folder"),
        (|t, _| edit_index(t, |i| set_first_shard(i, "")),
            3, "T/model.safetensors.index.json lists the shard \"\": expected the plain name of a file in the same folder"),
        (|t, _| edit_index(t, |i| set_first_shard(i, &"a".repeat(256))),
            3, concat!("T/model.safetensors.index.json lists the shard \"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa...\"",
                ": expected the plain name of a file in the same folder")),
        (|t, _| edit_index(t, |i| set_first_shard(i, "model-00003-of-00002.safetensors")),
            3, "T/model.safetensors.index.json lists the shard model-00003-of-00002.safetensors, which is not in the folder"),
        (|t, _| edit_index(t, |i| set_first_shard(i, "model-00002-of-00002.safetensors")),
            3, "T/model.safetensors.index.json lists the tensor model.embed_tokens.weight in T/model-00002-of-00002.safetensors, which does not contain it"),
        (|t, _| edit_index(t, |i| i["weight_map"]["ghost"] = json!("model-00002-of-00002.safetensors")),
            3, "T/model.safetensors.index.json lists the tensor ghost in T/model-00002-of-00002.safetensors, which does not contain it"),
        (|t, _| { edit_index(t, |_| ()); let copy = support::safetensors_file(&support::target_tensors(&small().0)[..1], Dtype::F32); fs::write(t.join("model-00002-of-00002.safetensors"), copy).unwrap(); },
            3, "tensor model.embed_tokens.weight is in both T/model-00001-of-00002.safetensors and T/model-00002-of-00002.safetensors"),
        (|t, _| { edit_index(t, |_| ()); fs::remove_file(t.join("model-00002-of-00002.safetensors")).unwrap(); },
            3, "T/model.safetensors.index.json lists the shard model-00002-of-00002.safetensors, which is not in the folder"),
    ];
    for (corrupt, code, sentence) in rows {
        let found = refusal(corrupt);
        assert_eq!((found.0, found.1.as_str()), (*code, *sentence));
    }
}

#[test]
fn an_unreadable_file_is_named() {
    use std::os::unix::fs::symlink;
    let (code, sentence) = refusal(|t, _| {
        fs::remove_file(t.join("config.json")).unwrap();
        symlink("config.json", t.join("config.json")).unwrap();
    });
    assert_eq!(code, 3);
    assert!(sentence.starts_with("T/config.json cannot be read: "), "{sentence}");
}

/// Text files are read, not mapped, so later changes to them have no effect.
#[test]
fn a_text_file_that_shrinks_after_reading_is_still_complete() {
    let pair = small_pair();
    let folder = disk(&pair.target);
    let read = folder.file("config.json").unwrap().unwrap();
    let path = pair.target.join("config.json");
    let expected = fs::read(&path).unwrap();
    fs::File::options().write(true).open(path).unwrap().set_len(0).unwrap();
    assert_eq!(*read, expected);
    assert!(folder.need("config.json").unwrap().is_empty());
}

#[test]
fn an_oversized_text_file_is_refused_before_reading() {
    let file = "tokenizer.json";
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(file);
    let sparse = fs::File::create(&path).unwrap();
    sparse.set_len(100_000_001).unwrap();
    let error = disk(dir.path()).file(file).unwrap_err();
    let expected = format!("{} has 100000001 bytes, expected at most 100000000", path.display());
    assert_eq!(error, Error::Model(expected));
    sparse.set_len(100_000_000).unwrap();
    assert_eq!(disk(dir.path()).file(file).unwrap().unwrap().len(), 100_000_000);
}

#[test]
fn a_drafter_of_another_target_is_refused() {
    let (target, drafter) = small();
    let pair = write_pair(&target, &drafter);
    let other = Target { hidden: 32, ..target };
    support::write_drafter(&pair.drafter, &other, &drafter);
    let error = open_pair(&pair).err().unwrap();
    let (ours, theirs) = (pair.target.join("config.json"), pair.drafter.join("config.json"));
    let expected = format!(
        "{} was not made for {}: its hidden size is 32, the target's is 16",
        theirs.display(),
        ours.display()
    );
    assert_eq!(error, Error::Model(expected));
}
