//! docs/models.md against `dflash-gen --plan` for the shapes of published hybrid and MoE targets, in sparse
//! files.

use crate::published::{number, plan, table_of};
use crate::support;
use crate::support::program;

use dflash::checkpoint::config::TargetConfig;
use dflash::perf::roofline::{target_bytes, target_pass};
use serde_json::{Value, json};
use std::path::Path;
use support::disk;

/// The fields of all of these targets: hidden, layers, heads, key/value heads, head size, vocabulary.
fn base(sizes: [usize; 6], tied: bool, rope: Value) -> Value {
    let [hidden, layers, heads, kv_heads, head_dim, vocab] = sizes;
    json!({
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "max_position_embeddings": 262_144, "tie_word_embeddings": tied,
        "rope_parameters": rope,
    })
}

fn extend(mut config: Value, more: Value) -> Value {
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    config
}

/// Qwen3-MoE: hidden, layers, heads, key/value heads; experts and the width of one.
fn qwen3_moe(sizes: [usize; 4], experts: usize, width: usize) -> Value {
    let [hidden, layers, heads, kv_heads] = sizes;
    let rope = json!({ "rope_theta": 1e6, "rope_type": "default" });
    let more = json!({
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts,
        "num_experts_per_tok": 8, "moe_intermediate_size": width, "norm_topk_prob": true,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "intermediate_size": 6144,
    });
    extend(base([hidden, layers, heads, kv_heads, 128, 151_936], false, rope), more)
}

/// The fields of hybrids: hidden, layers, heads, key/value heads, key and value heads of Gated DeltaNet.
fn hybrid(sizes: [usize; 6], vocab: usize, tied: bool) -> Value {
    let [hidden, layers, heads, kv_heads, keys, values] = sizes;
    let rope = json!({ "rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.25 });
    let more = json!({
        "full_attention_interval": 4, "linear_num_key_heads": keys, "linear_num_value_heads": values,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    });
    extend(base([hidden, layers, heads, kv_heads, 256, vocab], tied, rope), more)
}

/// A multimodal config around a text model.
fn multimodal(class: &str, model_type: &str, text: Value) -> Value {
    json!({ "architectures": [class], "model_type": model_type, "text_config": text, "vision_config": {} })
}

fn qwen3_5(sizes: [usize; 6], width: usize, tied: bool) -> Value {
    let text = extend(hybrid(sizes, 248_320, tied), json!({ "intermediate_size": width }));
    multimodal("Qwen3_5ForConditionalGeneration", "qwen3_5", text)
}

/// Experts, chosen ones, width of an expert and of the shared expert.
fn experts([experts, chosen, width, shared]: [usize; 4]) -> Value {
    json!({
        "num_experts": experts, "num_experts_per_tok": chosen, "moe_intermediate_size": width,
        "shared_expert_intermediate_size": shared,
    })
}

fn qwen3_5_moe(sizes: [usize; 6], moe: [usize; 4]) -> Value {
    let text = extend(hybrid(sizes, 248_320, false), experts(moe));
    multimodal("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", text)
}

/// Published targets, and their billions of parameters where a source says them.
fn targets() -> Vec<(&'static str, Value, Option<f64>)> {
    let next = extend(hybrid([2048, 48, 16, 2, 16, 32], 151_936, false), experts([512, 10, 512, 512]));
    let next = extend(next, json!({ "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next" }));
    vec![
        ("Qwen/Qwen3-30B-A3B", qwen3_moe([2048, 48, 32, 4], 128, 768), Some(30.532)),
        ("Qwen/Qwen3-235B-A22B", qwen3_moe([4096, 94, 64, 4], 128, 1536), None),
        ("Qwen/Qwen3-Coder-480B-A35B-Instruct", qwen3_moe([6144, 62, 96, 8], 160, 2560), None),
        ("Qwen/Qwen3.5-0.8B", qwen3_5([1024, 24, 8, 2, 16, 16], 3584, true), None),
        ("Qwen/Qwen3.5-2B", qwen3_5([2048, 24, 8, 2, 16, 16], 6144, true), None),
        ("Qwen/Qwen3.5-4B", qwen3_5([2560, 32, 16, 4, 16, 32], 9216, true), Some(4.206)),
        ("Qwen/Qwen3.5-9B", qwen3_5([4096, 32, 16, 4, 16, 32], 12_288, false), Some(8.954)),
        ("Qwen/Qwen3.5-27B", qwen3_5([5120, 64, 24, 4, 16, 48], 17_408, false), Some(26.895)),
        ("Qwen/Qwen3.5-35B-A3B", qwen3_5_moe([2048, 40, 16, 2, 16, 32], [256, 8, 512, 512]), Some(34.660)),
        (
            "Qwen/Qwen3.5-122B-A10B",
            qwen3_5_moe([3072, 48, 32, 2, 16, 64], [256, 8, 1024, 1024]),
            Some(122.111),
        ),
        ("Qwen/Qwen3.5-397B-A17B", qwen3_5_moe([4096, 60, 32, 2, 16, 64], [512, 10, 1024, 1024]), None),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", next, Some(79.674)),
    ]
}

fn write(dir: &Path, config: &Value) {
    support::write_sparse(dir, config, || TargetConfig::open(&disk(dir)).unwrap().tensors());
}

#[test]
fn plans_of_hybrid_and_moe_targets_say_what_the_page_says() {
    let rows = table_of(include_str!("../../docs/models.md"), "Published targets");
    assert_eq!(rows.len(), targets().len());
    for ((name, config, billions), row) in targets().into_iter().zip(&rows) {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), &config);
        let record = plan(&[dir.path()], &["--device", "cpu", "--json"]).json().remove(0);
        let parameters = record["weight_bytes"].as_f64().unwrap() / 2.0;
        if let Some(billions) = billions {
            assert!((parameters / 1e9 - billions).abs() < 1.1e-3, "{name}: {parameters} parameters");
        }
        let target = &record["target"];
        let bytes = |field: &str| target[field].as_f64().unwrap();
        let found =
            [parameters, bytes("kv_bytes_per_token"), bytes("state_bytes"), bytes("record_bytes_per_row")];
        let cells: Vec<f64> = row[1..].iter().map(|cell| number(cell)).collect();
        assert_eq!((row[0].as_str(), &cells[..]), (name, &found[..]));
    }
}

/// GB of weights and of states that a step reads and writes, and of weights that 16 rows read, if each
/// chooses its experts at random.
#[test]
fn rooflines_count_states_and_distinct_experts() {
    let all = targets();
    for (name, [step, states, rows]) in [
        ("Qwen/Qwen3.5-4B", [8.41, 0.10, 8.41]),
        ("Qwen/Qwen3.5-9B", [15.87, 0.10, 15.87]),
        ("Qwen/Qwen3.5-27B", [51.25, 0.30, 51.25]),
        ("Qwen/Qwen3-30B-A3B", [6.08, 0.0, 39.8]),
        ("Qwen/Qwen3.5-35B-A3B", [5.89, 0.13, 29.5]),
        ("Qwen/Qwen3-Next-80B-A3B-Instruct", [7.13, 0.15, 46.0]),
        ("Qwen/Qwen3.5-122B-A10B", [18.02, 0.30, 103.0]),
    ] {
        let (_, config, _) = all.iter().find(|(known, ..)| *known == name).unwrap();
        let dir = tempfile::tempdir().unwrap();
        support::write_json(dir.path(), "config.json", config);
        let config = TargetConfig::open(&disk(dir.path())).unwrap();
        let moved = target_pass(&config, 0, 1, 1).bytes - target_bytes(&config, 1);
        let found = [target_bytes(&config, 1), moved, target_bytes(&config, 16)].map(|bytes| bytes / 1e9);
        let near = |(found, expected): (&f64, f64)| (found - expected).abs() < 0.006 + expected * 0.003;
        assert!(found.iter().zip([step, states, rows]).all(near), "{name}: {found:?}");
    }
}

/// Of each of 48 layers: a state of 48 heads in f32, two windows of three rows of 10240 channels in bf16, and two records
/// of a row; and one header.
#[test]
fn plans_for_a_gpu_count_recurrent_states() {
    let dir = tempfile::tempdir().unwrap();
    let (_, config, _) = targets().into_iter().find(|(name, ..)| *name == "Qwen/Qwen3.5-27B").unwrap();
    write(dir.path(), &config);
    let text = plan(&[dir.path()], &["--device", "cuda"]).done();
    let record = 10240 * 2 + (16 + 48) * 128 * 4 + 48 * 4;
    let bytes = 48 * (48 * 128 * 128 * 4 + 2 * (3 * 10240 * 2 + record)) + 80;
    let line = text.lines().find(|line| line.trim_start().starts_with("recurrent states"));
    assert!(line.is_some_and(|line| line.contains(&format!(" {bytes} bytes"))), "{bytes}: {text}");
}

#[test]
fn plans_name_the_family_and_the_device_that_does_not_run_it() {
    let dir = tempfile::tempdir().unwrap();
    let (_, config, _) = targets().remove(8);
    write(dir.path(), &config);
    let text = plan(&[dir.path()], &["--device", "cpu"]).done();
    let line = "  Qwen3.5-MoE: 10 layers of attention, 30 of Gated DeltaNet, 8 of 256 experts a row and a shared one";
    assert!(text.lines().any(|found| found == line), "no {line:?} in:\n{text}");
    let line = "  a sequence has 65863680 bytes of state, and 1724160 bytes of records for each row of its last pass";
    assert!(text.lines().any(|found| found == line), "no {line:?} in:\n{text}");
    let refused = plan(&[dir.path()], &["--device", "cuda"]);
    let sentence = "config.json: the kernels do not run Qwen3.5-MoE yet";
    assert_eq!((refused.code, refused.err.lines().count()), (4, 1));
    assert!(refused.err.contains(sentence), "{}", refused.err);
    let automatic = plan(&[dir.path()], &["--json"]);
    assert_eq!(automatic.json()[0]["memory"], Value::Null);
}

/// The whole command on every family, with a random drafter: tokens and logits are those of AR decoding.
#[test]
fn every_family_passes_the_lossless_check() {
    let root = tempfile::tempdir().unwrap();
    let prompts = root.path().join("prompts.jsonl");
    program::write(root.path(), "prompts.jsonl", r#"{"prompt_tokens": [7, 300, 21, 90, 5]}"#);
    for (name, layers) in
        [("qwen3_5/published", 4), ("qwen3_moe", 4), ("qwen3_5_moe/published", 4), ("qwen3_next", 3)]
    {
        let target = format!("{}/tests/data/targets/{name}", env!("CARGO_MANIFEST_DIR"));
        let drafter = root.path().join(name);
        let of = support::Target { hidden: 64, vocab: 512, layers, ..support::Target::default() };
        support::write_drafter(
            &drafter,
            &of,
            &support::Drafter { taps: vec![0, 1], ..support::Drafter::default() },
        );
        let models = ["--target", &target, "--draft", drafter.to_str().unwrap(), "--device", "cpu"];
        let more = ["--prompts", prompts.to_str().unwrap(), "-n", "30", "--check-lossless"];
        let text = program::run(models.into_iter().chain(more)).done();
        let last: Vec<&str> = text.lines().last().unwrap().split_whitespace().collect();
        assert_eq!((last[0], last[1], last[3], last[4]), ("all", "30", "29", "yes"), "{name}: {text}");
    }
}
