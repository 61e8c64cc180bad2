//! Checkpoint folders: what is read from them, and the sentence and exit code for each way they can be wrong.

mod support;

use dflash::config::{Attention, DrafterConfig, Family, Rope, RopeScaling, TargetConfig};
use dflash::weights::{Checkpoint, DEMO_DRAFTER, DEMO_TARGET, Dtype};
use dflash::{Error, Result};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use support::{Drafter, Pair, Raw, Target, disk, edit_json, open_all, open_pair, small, write_pair};

fn small_pair() -> Pair {
    let (target, drafter) = small();
    write_pair(&target, &drafter)
}

/// Values of a tensor as f32, whatever it is stored in.
fn values(weights: &Checkpoint, name: &str, shape: &[usize]) -> Vec<f32> {
    let tensor = weights.tensor(name, shape).unwrap();
    let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    match tensor.dtype {
        Dtype::Bf16 => tensor.bytes().chunks(2).map(|b| half::bf16::from_bits(half(b)).to_f32()).collect(),
        Dtype::F16 => tensor.bytes().chunks(2).map(|b| half::f16::from_bits(half(b)).to_f32()).collect(),
        Dtype::F32 => tensor.bytes().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
    }
}

// ---- what is read ----

#[test]
fn the_demo_pair_opens_and_its_configs_are_read() {
    let (target, drafter, weights, _) = open_all(&DEMO_TARGET, &DEMO_DRAFTER).unwrap();
    assert_eq!(target.family, Family::Qwen3);
    assert!(target.tied && target.stack.qk_norm);
    assert_eq!((target.vocab, target.eos.as_slice()), (2048, [0].as_slice()));
    assert_eq!(target.stack.attention, [Attention { causal: true, window: None }; 6]);
    assert_eq!(target.stack.rope, Rope { theta: 1e6, rotary_dims: 64, scaling: RopeScaling::Default });
    assert_eq!((drafter.taps.as_slice(), drafter.block, drafter.mask_token), ([1, 2, 3].as_slice(), 16, 1));
    assert_eq!(drafter.stack.attention, [Attention { causal: false, window: None }; 3]);
    assert_eq!((drafter.embedding_scale, drafter.output_multiplier, drafter.softcap), (1.0, 1.0, None));
    let (name, file, dtype, shape) = weights.list()[0];
    assert_eq!((name, file), ("model.embed_tokens.weight", "demo/target/model.safetensors"));
    assert_eq!((dtype, shape), (Dtype::Bf16, [2048, 128].as_slice()));
}

#[test]
fn tensors_come_back_as_they_were_written_in_every_dtype_and_sharding() {
    for (dtype, shards) in [(Dtype::Bf16, 1), (Dtype::F16, 3), (Dtype::F32, 5)] {
        let (target, drafter) = small();
        let target = Target { dtype, shards, tied: false, ..target };
        let pair = write_pair(&target, &Drafter { dtype, shards, ..drafter });
        let (config, _, weights, _) = open_pair(&pair).unwrap();
        assert_eq!(weights.list().len(), config.tensors().len());
        for Raw { name, shape, values: written } in support::target_tensors(&target) {
            let read = values(&weights, &name, &shape);
            let step = match dtype {
                Dtype::Bf16 => 1.0 / 256.0,
                Dtype::F16 => 1.0 / 2048.0,
                Dtype::F32 => 0.0,
            };
            assert!(
                read.iter().zip(&written).all(|(r, w)| (r - w).abs() <= step * w.abs().max(1e-3)),
                "{name}"
            );
        }
    }
}

#[test]
fn a_header_of_any_length_leaves_unaligned_tensors_readable() {
    let dir = tempfile::tempdir().unwrap();
    for padding in 0..9 {
        let header = json!({ "x": { "dtype": "F32", "shape": [2], "data_offsets": [0, 8] } }).to_string();
        let header = header + &" ".repeat(padding);
        let data: Vec<u8> = [1.5f32, -2.0].iter().flat_map(|x| x.to_le_bytes()).collect();
        fs::write(dir.path().join("model.safetensors"), support::safetensors_raw(&header, &data)).unwrap();
        let weights = Checkpoint::open(&disk(dir.path())).unwrap();
        assert_eq!(values(&weights, "x", &[2]), [1.5, -2.0]);
    }
}

#[test]
fn drafter_tensors_are_found_under_every_known_spelling() {
    let (target, drafter) = small();
    let pair = write_pair(&target, &drafter);
    let plain = support::drafter_tensors(&target, &drafter);
    let rename = |to: &dyn Fn(&str) -> String| -> Vec<Raw> {
        plain.iter().map(|t| Raw { name: to(&t.name), ..t.clone() }).collect()
    };
    let encoder = |name: &str| match name {
        "fc.weight" => "encoder.fc.weight".to_string(),
        "hidden_norm.weight" => "encoder.output_norm_enc.weight".to_string(),
        name => name.to_string(),
    };
    for spelling in
        [rename(&|n| format!("model.{n}")), rename(&encoder), rename(&|n| format!("model.{}", encoder(n)))]
    {
        support::write_tensors(&pair.drafter, &spelling, Dtype::F32, 1);
        let (config, _, _, weights) = open_pair(&pair).map(|(_, d, t, w)| (d, 0, t, w)).unwrap();
        for (name, shape) in config.tensors() {
            let written = plain.iter().find(|t| t.name == name).unwrap();
            assert_eq!(values(&weights, &name, &shape), written.values, "{name}");
        }
    }
}

#[test]
fn targets_may_carry_buffers_and_a_stored_copy_of_a_tied_head() {
    let (target, drafter) = small();
    let pair = write_pair(&target, &drafter);
    let mut tensors = support::target_tensors(&target);
    let head = Raw { name: "lm_head.weight".into(), ..tensors[0].clone() };
    let buffer = |name: &str| Raw { name: name.into(), shape: vec![2], values: vec![1.0; 2] };
    tensors.extend([head, buffer("model.layers.0.self_attn.rotary_emb.inv_freq")]);
    support::write_tensors(&pair.target, &tensors, Dtype::F32, 1);
    open_pair(&pair).unwrap();

    // An I64 buffer: four f32 zeros relabelled as two I64.
    tensors.push(Raw { name: "model.position_ids".into(), shape: vec![4], values: vec![0.0; 4] });
    let file = support::safetensors_file(&tensors, Dtype::F32);
    let header_end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..header_end]).unwrap();
    header["model.position_ids"]["dtype"] = "I64".into();
    header["model.position_ids"]["shape"] = json!([2]);
    let file = support::safetensors_raw(&header.to_string(), &file[header_end..]);
    fs::write(pair.target.join("model.safetensors"), file).unwrap();
    let (.., weights, _) = open_pair(&pair).unwrap();
    assert!(weights.list().iter().all(|(name, ..)| *name != "model.position_ids"));
    let error = weights.tensor("model.position_ids", &[2]).err().unwrap();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
}

#[test]
fn stop_ids_come_from_the_generation_config_first() {
    let pair = small_pair();
    let target = disk(&pair.target);
    let eos = || TargetConfig::open(&target).unwrap().eos;
    let set = |file: &str, value: Value| edit_json(&pair.target, file, |c| c["eos_token_id"] = value);
    set("config.json", json!(5));
    set("generation_config.json", json!([7, 3]));
    assert_eq!(eos(), [7, 3]);
    set("generation_config.json", json!(8));
    assert_eq!(eos(), [8]);
    set("generation_config.json", Value::Null);
    assert_eq!(eos(), [5]);
    fs::remove_file(pair.target.join("generation_config.json")).unwrap();
    set("config.json", json!([5, 6]));
    assert_eq!(eos(), [5, 6]);
    set("config.json", Value::Null);
    assert_eq!(eos(), [0u32; 0]);
}

/// A drafter config with the sizes of a published checkpoint (dflash.md section 1).
fn published(h: usize, ff: usize, layers: usize, heads: usize, kv: usize, taps: usize) -> Value {
    json!({
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "hidden_size": h, "intermediate_size": ff,
        "num_hidden_layers": layers, "num_target_layers": 64, "num_attention_heads": heads,
        "num_key_value_heads": kv, "head_dim": 128, "rope_theta": 1e6, "max_position_embeddings": 40960,
        "vocab_size": 151936,
        "dflash_config": { "mask_token_id": 151669, "target_layer_ids": (0..taps).collect::<Vec<_>>() }
    })
}

fn drafter_from(config: &Value) -> Result<DrafterConfig> {
    let dir = tempfile::tempdir().unwrap();
    support::write_json(dir.path(), "config.json", config);
    DrafterConfig::open(&disk(dir.path()))
}

fn target_from(config: &Value) -> Result<TargetConfig> {
    let dir = tempfile::tempdir().unwrap();
    support::write_json(dir.path(), "config.json", config);
    TargetConfig::open(&disk(dir.path()))
}

#[test]
fn parameter_counts_are_those_of_the_published_drafters() {
    let count = |c: Value| support::parameters(&drafter_from(&c).unwrap().tensors());
    assert_eq!(count(published(2560, 9728, 5, 32, 8, 5)), 537_427_200);
    assert_eq!(count(published(4096, 12288, 5, 32, 8, 5)), 1_048_626_432);
    assert_eq!(count(published(2560, 9216, 6, 32, 8, 8)), 634_425_856);
    assert_eq!(count(published(2048, 6144, 6, 32, 8, 8)), 385_906_176);
    // The formula of section 2 for the two drafters without a published count.
    let formula = |l: u64, h: u64, ff: u64, nh: u64, nkv: u64, n: u64| {
        let hd = 128;
        l * (2 * h * nh * hd + 2 * h * nkv * hd + 2 * hd + 3 * h * ff + 2 * h) + n * h * h + 2 * h
    };
    assert_eq!(count(published(1024, 3072, 5, 16, 8, 5)), formula(5, 1024, 3072, 16, 8, 5));
    assert_eq!(count(published(2048, 6144, 5, 16, 8, 5)), formula(5, 2048, 6144, 16, 8, 5));
    let millions = |n: u64| format!("{:.1} M", n as f64 / 1e6);
    assert_eq!(millions(formula(5, 1024, 3072, 16, 8, 5)), "83.9 M");
    assert_eq!(millions(formula(5, 2048, 6144, 16, 8, 5)), "272.7 M");

    let drafter = drafter_from(&published(4096, 12288, 5, 32, 8, 5)).unwrap();
    assert_eq!(drafter.tensors().len(), 58);
    assert_eq!(drafter.stack.kv_bytes_per_token(2), 20_480);
    let drafter = drafter_from(&published(2560, 9216, 6, 32, 8, 8)).unwrap();
    assert_eq!(drafter.tensors().len(), 69);
}

#[test]
fn a_target_counts_its_head_once() {
    // Qwen3-0.6B as published: 596,049,920 weights, tied.
    let mut config = support::target_config(&Target {
        hidden: 1024,
        intermediate: 3072,
        layers: 28,
        heads: 16,
        kv_heads: 8,
        head_dim: 128,
        vocab: 151_936,
        ..Target::default()
    });
    let count = |c: &Value| support::parameters(&target_from(c).unwrap().tensors());
    assert_eq!(count(&config), 596_049_920);
    config["tie_word_embeddings"] = false.into();
    assert_eq!(count(&config), 596_049_920 + 151_936 * 1024);
    config.as_object_mut().unwrap().remove("tie_word_embeddings");
    assert!(!target_from(&config).unwrap().tied);
}

#[test]
fn absent_layer_ids_follow_the_rule() {
    // The checked values of dflash.md section 1.
    let cases: [(usize, &[usize]); 10] = [
        (36, &[1, 9, 17, 25, 33]),
        (32, &[1, 8, 15, 22, 29]),
        (32, &[1, 5, 9, 13, 17, 21, 25, 29]),
        (24, &[1, 6, 11, 16, 21]),
        (28, &[1, 7, 13, 19, 25]),
        (48, &[1, 12, 23, 34, 45]),
        (64, &[1, 16, 31, 46, 61]),
        (60, &[1, 12, 23, 35, 46, 57]),
        (40, &[1, 6, 11, 16, 22, 27, 32, 37]),
        (52, &[1, 13, 25, 37, 49]),
    ];
    let taps = |target_layers: usize, layers: usize| {
        let mut config = published(64, 64, layers, 4, 2, 0);
        config["num_target_layers"] = target_layers.into();
        config["dflash_config"].as_object_mut().unwrap().remove("target_layer_ids");
        drafter_from(&config).unwrap().taps
    };
    for (target_layers, expected) in cases {
        assert_eq!(taps(target_layers, expected.len()), expected, "{target_layers} layers");
    }
    assert_eq!(taps(36, 1), [18]);
    // 10.5 and 29.5 go to the even neighbour, as Python rounds.
    assert_eq!(taps(42, 5), [1, 10, 20, 30, 39]);
}

#[test]
fn drafter_fields_are_read_from_both_places_and_the_inner_one_wins() {
    let mut config = published(64, 64, 2, 4, 2, 3);
    let block = |config: &Value| drafter_from(config).unwrap().block;
    assert_eq!(block(&config), 16);
    config["block_size"] = 10.into();
    assert_eq!(block(&config), 10);
    config["dflash_config"]["block_size"] = 8.into();
    assert_eq!(block(&config), 8);

    config["input_embedding_scale"] = json!(2.5);
    config["output_multiplier"] = json!(0.25);
    config["final_logit_softcapping"] = json!(20);
    config["dflash_config"]["output_multiplier"] = json!(0.5);
    let drafter = drafter_from(&config).unwrap();
    assert_eq!((drafter.embedding_scale, drafter.output_multiplier, drafter.softcap), (2.5, 0.5, Some(20.0)));
    config["dflash_config"]["final_logit_softcapping"] = json!(0.0);
    assert_eq!(drafter_from(&config).unwrap().softcap, None);

    // All of it at top level, and `dflash_config` absent.
    let flat = config["dflash_config"].take();
    config.as_object_mut().unwrap().extend(flat.as_object().unwrap().clone());
    let drafter = drafter_from(&config).unwrap();
    assert_eq!(
        (drafter.taps.as_slice(), drafter.mask_token, drafter.block),
        ([0, 1, 2].as_slice(), 151_669, 8)
    );
}

#[test]
fn causality_and_windows_resolve_as_the_reference_does() {
    let mut config = published(64, 64, 3, 4, 2, 2);
    let seen = |config: &Value| drafter_from(config).unwrap().stack.attention;
    let of = |causal, window| Attention { causal, window };
    assert_eq!(seen(&config), [of(false, None); 3]);
    config["layer_types"] = json!(["sliding_attention", "sliding_attention", "full_attention"]);
    config["sliding_window"] = 2048.into();
    let mixed = [of(true, Some(2048)), of(true, Some(2048)), of(false, None)];
    assert_eq!(seen(&config), mixed);
    config["use_sliding_window"] = true.into();
    assert_eq!(seen(&config), mixed);
    config["dflash_config"]["causal"] = true.into();
    assert_eq!(seen(&config), [of(true, Some(2048)), of(true, Some(2048)), of(true, None)]);
    config["is_causal"] = false.into();
    assert_eq!(seen(&config), [of(false, Some(2048)), of(false, Some(2048)), of(false, None)]);
    // The window counts only where `layer_types` says sliding.
    config["layer_types"] = json!(["full_attention", "full_attention", "full_attention"]);
    assert_eq!(seen(&config), [of(false, None); 3]);
}

#[test]
fn sliding_layers_of_a_target_are_those_that_hugging_face_makes() {
    let mut config = support::target_config(&Target::default());
    config["sliding_window"] = 32.into();
    config["max_window_layers"] = 3.into();
    let windows = |config: &Value| {
        let attention = target_from(config).unwrap().stack.attention;
        assert!(attention.iter().all(|a| a.causal));
        attention.iter().map(|a| a.window).collect::<Vec<_>>()
    };
    assert_eq!(windows(&config), [None; 4]);
    config["use_sliding_window"] = true.into();
    assert_eq!(windows(&config), [None, None, None, Some(32)]);
    config["layer_types"] =
        json!(["sliding_attention", "full_attention", "sliding_attention", "full_attention"]);
    assert_eq!(windows(&config), [Some(32), None, Some(32), None]);
}

#[test]
fn head_sizes_default_as_in_hugging_face() {
    let mut config = support::target_config(&Target { llama: true, ..Target::default() });
    config.as_object_mut().unwrap().remove("head_dim");
    config.as_object_mut().unwrap().remove("num_key_value_heads");
    let stack = target_from(&config).unwrap().stack;
    assert_eq!((stack.head_dim, stack.kv_heads, stack.qk_norm), (64 / 4, 4, false));
    let mut config = support::target_config(&Target::default());
    config["head_dim"] = Value::Null;
    assert_eq!(target_from(&config).unwrap().stack.head_dim, 128);
}

// ---- RoPE ----

/// Values of `modeling_rope_utils` of transformers 4.57.6 (its functions run in f64 on numpy): the settings, head_dim,
/// factor on cos and sin, and some inverse frequencies.
#[test]
fn rope_frequencies_are_those_of_hugging_face() {
    type Case = (Value, f64, usize, f64, &'static [(usize, f64)]);
    let cases: [Case; 8] = [
        (
            // Llama 3.1
            json!({ "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192 }),
            5e5,
            128,
            1.0,
            &[
                (0, 1.0),
                (16, 0.03760603093086393),
                (28, 0.0032114459947525913),
                (29, 0.002166570763503359),
                (34, 0.00017850781276799638),
                (35, 9.556212353964683e-05),
                (63, 3.068925988914511e-07),
            ],
        ),
        (
            // gpt-oss
            json!({ "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
                    "original_max_position_embeddings": 4096, "truncate": false }),
            150_000.0,
            64,
            1.3465735902799727,
            &[
                (8, 0.050813274815461475),
                (9, 0.03170569618466377),
                (12, 0.006794959489732219),
                (17, 0.00012931870124506317),
                (18, 3.8308812373753384e-05),
                (31, 3.0235114281192144e-07),
            ],
        ),
        (
            json!({ "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096 }),
            150_000.0,
            64,
            1.3465735902799727,
            &[(9, 0.031620752275346484), (12, 0.007015713910504388), (17, 0.0002279477957951252)],
        ),
        (
            // Qwen3's recipe for long context; the old spelling of the type
            json!({ "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768 }),
            1e6,
            128,
            1.138629436111989,
            &[
                (23, 0.006978305848598663),
                (24, 0.005375321490790102),
                (39, 6.490394320837029e-05),
                (40, 4.445698525097307e-05),
                (63, 3.102344401879299e-07),
            ],
        ),
        (
            json!({ "rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5,
                    "original_max_position_embeddings": 4096 }),
            1e4,
            64,
            1.1557219901962608,
            &[(12, 0.026879360111431223), (31, 3.33380358040831e-06)],
        ),
        (
            // without an original length it is max_position_embeddings, 163840 here
            json!({ "rope_type": "yarn", "factor": 40.0, "attention_factor": 1.25 }),
            1e4,
            64,
            1.25,
            &[(12, 0.03162277660168379), (31, 5.334085728653295e-05)],
        ),
        (
            json!({ "type": "linear", "factor": 4.0 }),
            1e4,
            64,
            1.0,
            &[(0, 0.25), (12, 0.007905694150420948), (31, 3.33380358040831e-05)],
        ),
        (Value::Null, 1e4, 64, 1.0, &[(12, 0.03162277660168379), (31, 0.0001333521432163324)]),
    ];
    for (scaling, theta, head_dim, factor, expected) in cases {
        let older = support::target_config(&Target {
            head_dim,
            rope_theta: theta,
            rope_scaling: scaling.clone(),
            max_positions: 163_840,
            ..Target::default()
        });
        // The newer spelling of the same.
        let mut newer = older.clone();
        let fields = newer.as_object_mut().unwrap();
        fields.remove("rope_theta");
        fields.remove("rope_scaling");
        let mut parameters = if scaling.is_null() { json!({ "rope_type": "default" }) } else { scaling };
        parameters["rope_theta"] = theta.into();
        fields.insert("rope_parameters".into(), parameters);
        for config in [older, newer] {
            let (frequencies, magnitude) = target_from(&config).unwrap().stack.rope.frequencies();
            assert_eq!(frequencies.len(), head_dim / 2);
            assert!((magnitude - factor).abs() < 1e-12, "{config}: {magnitude}");
            for &(i, value) in expected {
                let error = (frequencies[i] / value - 1.0).abs();
                assert!(error < 1e-11, "{config}: pair {i} is {}, expected {value}", frequencies[i]);
            }
        }
    }
}

#[test]
fn partial_rotary_factor_rotates_the_leading_dims() {
    let mut config = published(64, 64, 2, 4, 2, 2);
    config["dflash_config"]["partial_rotary_factor"] = json!(0.5);
    config["rope_theta"] = json!(1e4);
    let rope = drafter_from(&config).unwrap().stack.rope;
    assert_eq!(rope.rotary_dims, 64);
    let (frequencies, _) = rope.frequencies();
    // As in the table above: half of a head of 128 is a head of 64.
    assert!((frequencies[12] / 0.03162277660168379 - 1.0).abs() < 1e-11);
}

// ---- what is refused ----

/// Spoils a small pair and returns the exit code and sentence of opening it, with the two folders written `T` and `D`.
fn refusal(spoil: impl FnOnce(&Path, &Path)) -> (u8, String) {
    let pair = small_pair();
    spoil(&pair.target, &pair.drafter);
    let error = match open_pair(&pair) {
        Ok(_) => return (0, "opened".into()),
        Err(error) => error,
    };
    let sentence = error.to_string().replace(pair.target.to_str().unwrap(), "T");
    (error.exit_code(), sentence.replace(pair.drafter.to_str().unwrap(), "D"))
}

/// One case per line: exit code | changes to a config, `field = JSON` or `field absent` | sentence.
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

fn change(config: &mut Value, edit: &str) {
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
fn target_configs_are_refused_by_field() {
    check_config_rows(TARGET_CONFIGS, true);
}

const TARGET_CONFIGS: &str = r#"
4 | architectures = ["MistralForCausalLM"] | T/config.json: architectures is MistralForCausalLM, which this engine does not run: expected Qwen3ForCausalLM or LlamaForCausalLM
3 | architectures = "Qwen3ForCausalLM" | T/config.json: architectures is "Qwen3ForCausalLM", expected a list of one name
3 | architectures absent | T/config.json: architectures is absent
4 | model_type = "qwen3_moe" | T/config.json: model_type is qwen3_moe, which this engine does not run: expected qwen3
2 | architectures = ["DFlashDraftModel"] | T/config.json is a drafter's (DFlashDraftModel): expected a target here, drafters go to --draft
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
3 | rope_scaling = { "type": "linear", "factor": 2.0 }; rope_parameters = { "rope_type": "default" } | T/config.json: rope_scaling and rope_parameters differ, expected one of them or twice the same
0 | rope_scaling = { "type": "linear", "factor": 2.0 }; rope_parameters = { "type": "linear", "factor": 2.0, "rope_theta": 1e4 } | opened
4 | rope_parameters = { "full_attention": { "rope_theta": 1e4 } } | T/config.json: rope_parameters.full_attention is a set of RoPE settings for some layers, expected one for all
4 | rope_scaling = { "rope_type": "dynamic", "factor": 2.0 } | T/config.json: rope_scaling.rope_type is dynamic, which this engine does not run: expected default, linear, llama3 or yarn
4 | rope_scaling = { "type": "longrope", "factor": 2.0 } | T/config.json: rope_scaling.rope_type is longrope, which this engine does not run: expected default, linear, llama3 or yarn
3 | rope_scaling = { "factor": 2.0 } | T/config.json: rope_scaling.rope_type is absent
3 | rope_scaling = { "type": "linear" } | T/config.json: rope_scaling.factor is absent
3 | rope_scaling = { "type": "linear", "factor": 0 } | T/config.json: rope_scaling.factor is 0, expected a number from 1
3 | rope_scaling = [] | T/config.json: rope_scaling is [], expected an object
3 | rope_scaling = { "rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, "original_max_position_embeddings": 8192 } | T/config.json: rope_scaling.high_freq_factor is 4, expected a number above low_freq_factor
4 | rope_scaling = { "type": "default", "mrope_section": [8, 8, 8] } | T/config.json: rope_scaling.mrope_section is unknown for rope_type default, which this engine runs without it
4 | rope_scaling = { "type": "linear", "factor": 2.0, "beta_fast": 32 } | T/config.json: rope_scaling.beta_fast is unknown for rope_type linear, which this engine runs without it
4 | rope_parameters = { "rope_theta": 1e4, "factor": 2.0, "rope_type": "default" } | T/config.json: rope_parameters.factor is unknown for rope_type default, which this engine runs without it
4 | rope_scaling = { "type": "yarn", "factor": 2.0, "low_freq_factor": 1 } | T/config.json: rope_scaling.low_freq_factor is unknown for rope_type yarn, which this engine runs without it
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
fn drafter_configs_are_refused_by_field() {
    check_config_rows(DRAFTER_CONFIGS, false);
}

const DRAFTER_CONFIGS: &str = r#"
4 | architectures = ["DFlash2DraftModel"] | D/config.json: architectures is DFlash2DraftModel, which this engine does not run: expected DFlashDraftModel
4 | dflash_config.selector_rank = 256 | D/config.json: dflash_config.selector_rank is 256, which makes it a DFlash2 drafter: this engine runs plain DFlash drafters
4 | conv_kernel_size = 2 | D/config.json: conv_kernel_size is 2, which makes it a DFlash2 drafter: this engine runs plain DFlash drafters
4 | dflash_config.markov_rank = 256 | D/config.json: dflash_config.markov_rank is 256, which makes it a DSpark (DeepSpec) drafter: this engine runs plain DFlash drafters
4 | sample_from_anchor = true | D/config.json: sample_from_anchor is true, which makes it a DSpark (DeepSpec) drafter: this engine runs plain DFlash drafters
4 | dflash_config.shift_label = true | D/config.json: dflash_config.shift_label is true, which makes it a Domino drafter: this engine runs plain DFlash drafters
4 | dflash_config.projector_type = "domino" | D/config.json: dflash_config.projector_type is "domino", which makes it a Domino or DSpark drafter: this engine runs plain DFlash drafters
4 | fc_layernorm = true | D/config.json: fc_layernorm is true, which makes it a per-tap norm drafter: this engine runs plain DFlash drafters
4 | dflash_config.use_swa = true | D/config.json: dflash_config.use_swa is true, which makes it a MiMo-style drafter: this engine runs plain DFlash drafters
4 | attention_sink_bias = true | D/config.json: attention_sink_bias is true, which makes it a MiMo-style drafter: this engine runs plain DFlash drafters
4 | attention_value_scale = 0.612 | D/config.json: attention_value_scale is 0.612, which makes it a MiMo-style drafter: this engine runs plain DFlash drafters
4 | dflash_config.tree_width = 4 | D/config.json: dflash_config.tree_width is unknown: this engine runs plain DFlash drafters
4 | speculators_model_type = "dflash" | D/config.json: speculators_model_type makes it a drafter in the speculators layout: this engine runs the z-lab layout (DFlashDraftModel)
4 | draft_vocab_size = 32000 | D/config.json: draft_vocab_size makes it a drafter in the speculators layout: this engine runs the z-lab layout (DFlashDraftModel)
4 | architectures = ["LlamaForCausalLMEagle3"] | D/config.json: architectures is LlamaForCausalLMEagle3, which this engine does not run: expected DFlashDraftModel
4 | model_type = "llama" | D/config.json: model_type is llama, which this engine does not run: expected qwen3
4 | quantization_config = { "bits": 4 } | D/config.json: quantization_config is there without a quant_method, which this engine does not run: expected an unquantised checkpoint
4 | attention_bias = true | D/config.json: attention_bias is true, which this engine does not run: expected false
2 | dflash_config absent; architectures = ["Qwen3ForCausalLM"] | D/config.json is a target's (Qwen3ForCausalLM): expected a DFlash drafter here, targets go to --target
3 | dflash_config = [1] | D/config.json: dflash_config is [1], expected an object
3 | dflash_config.mask_token_id absent | D/config.json: mask_token_id is absent
3 | dflash_config.mask_token_id = 40 | D/config.json: dflash_config.mask_token_id is 40, expected a whole number from 0 to 39
3 | num_target_layers absent | D/config.json: num_target_layers is absent
3 | dflash_config.target_layer_ids = [] | D/config.json: dflash_config.target_layer_ids is empty, expected at least one layer
3 | dflash_config.target_layer_ids = [0, 4] | D/config.json: dflash_config.target_layer_ids holds 4, expected layers from 0 to 3 (num_target_layers is 4)
3 | dflash_config.target_layer_ids = [0, -1] | D/config.json: dflash_config.target_layer_ids[1] is -1, expected a whole number from 0 to 1024
4 | dflash_config.target_layer_ids = [0, 3] | D/config.json: dflash_config.target_layer_ids holds 3, the target's last layer, of which engines differ on whether the final norm is applied
3 | dflash_config.target_layer_ids = [2, 2] | D/config.json: dflash_config.target_layer_ids holds 2 twice
3 | dflash_config.target_layer_ids = [0, 1, 2] | D/model.safetensors: tensor fc.weight has shape [16, 32], expected [16, 48] from config.json
3 | block_size = 1 | D/config.json: block_size is 1, expected a whole number from 2 to 1024
3 | dflash_config.input_embedding_scale = 0 | D/config.json: dflash_config.input_embedding_scale is 0, expected a number above 0, in the range of f32
3 | dflash_config.output_multiplier = 1e300 | D/config.json: dflash_config.output_multiplier is 1e+300, expected a number above 0, in the range of f32
3 | is_causal = "no" | D/config.json: is_causal is "no", expected true or false
3 | layer_types = ["full_attention", "sliding_attention"]; sliding_window = 4; use_sliding_window = false | D/config.json: layer_types[1] is sliding_attention, but sliding_window is not set or use_sliding_window is false
3 | partial_rotary_factor = 0.2 | D/config.json: partial_rotary_factor = 0.2 of head_dim 8 rotates 1 dims, expected an even number from 2
3 | hidden_size = 32 | D/config.json was not made for T/config.json: its hidden size is 32, the target's is 16
3 | vocab_size = 41 | D/config.json was not made for T/config.json: its vocabulary size is 41, the target's is 40
3 | num_target_layers = 5 | D/config.json was not made for T/config.json: its number of target layers is 5, the target's is 4
3 | num_hidden_layers = 1 | D/model.safetensors: tensor layers.1.input_layernorm.weight is of a layer beyond the 1 of config.json
"#;

/// Rewrites the header of a model's only file; `edit` sees it as JSON.
fn edit_header(dir: &Path, edit: impl FnOnce(&mut Value)) {
    let path = dir.join("model.safetensors");
    let file = fs::read(&path).unwrap();
    let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&file[8..end]).unwrap();
    edit(&mut header);
    fs::write(&path, support::safetensors_raw(&header.to_string(), &file[end..])).unwrap();
}

/// Eight tensors of nearly an eighth of the address space each: only with the header's length prefix do they overflow it.
fn overflowing() -> Vec<u8> {
    let size = (1u64 << 61) - 1;
    let mut header = json!({});
    for i in 0..8 {
        header[i.to_string()] =
            json!({ "dtype": "U8", "shape": [size], "data_offsets": [i * size, (i + 1) * size] });
    }
    support::safetensors_raw(&header.to_string(), &[])
}

/// Writes a model's tensors anew, as f32 and in one file.
fn edit_tensors(dir: &Path, tensors: Vec<Raw>, edit: impl FnOnce(&mut Vec<Raw>)) {
    let mut tensors = tensors;
    edit(&mut tensors);
    support::write_tensors(dir, &tensors, Dtype::F32, 1);
}

fn named(name: &str) -> Raw {
    Raw { name: name.into(), shape: vec![1], values: vec![0.0] }
}

#[test]
#[rustfmt::skip] // a table: a case, then what it must give
fn broken_safetensors_files_are_refused_by_what_is_wrong() {
    let target = || support::target_tensors(&small().0);
    let drafter = || support::drafter_tensors(&small().0, &small().1);
    type Spoil = Box<dyn Fn(&Path, &Path)>;
    let write = |bytes: Vec<u8>| -> Spoil {
        Box::new(move |t, _| fs::write(t.join("model.safetensors"), &bytes).unwrap())
    };
    let cut = |keep: fn(usize) -> usize| -> Spoil {
        Box::new(move |t, _| {
            let path = t.join("model.safetensors");
            let file = fs::read(&path).unwrap();
            fs::write(&path, &file[..keep(file.len())]).unwrap();
        })
    };
    let header = |edit: fn(&mut Value)| -> Spoil { Box::new(move |t, _| edit_header(t, edit)) };
    let offsets = "model.norm.weight";
    let rows: Vec<(Spoil, u8, &str)> = vec![
        (write(vec![]),
            3, "T/model.safetensors is not a whole safetensors file: it has 0 bytes, and 8 of header length come first"),
        (write(vec![1, 2, 3]),
            3, "T/model.safetensors is not a whole safetensors file: it has 3 bytes, and 8 of header length come first"),
        (write(support::safetensors_raw("{}", &[])),
            3, "T/model.safetensors has no tensor model.embed_tokens.weight"),
        (write(support::safetensors_raw("{\"a\":", &[])),
            3, "T/model.safetensors is not a whole safetensors file: its header: EOF while parsing a value at line 1 column 5"),
        (write(support::safetensors_raw("[]", &[])),
            3, "T/model.safetensors is not a whole safetensors file: its header: invalid type: sequence, expected struct HashMetadata at line 1 column 0"),
        (write(support::safetensors_raw("\u{1b}[31m", &[])),
            3, "T/model.safetensors is not a whole safetensors file: its header: expected value at line 1 column 1"),
        (write([u64::MAX.to_le_bytes().as_slice(), b"{}"].concat()),
            3, "T/model.safetensors is not a whole safetensors file: its header is to be 18446744073709551615 bytes long, and 2 follow"),
        (write(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n".to_vec()),
            3, "T/model.safetensors is not a whole safetensors file: it is a Git LFS pointer, the weights were not fetched"),
        (cut(|_| 100),
            3, "T/model.safetensors is not a whole safetensors file: its header is to be 4586 bytes long, and 92 follow"),
        (cut(|len| len - 1),
            3, "T/model.safetensors is not a whole safetensors file: its header describes 21664 bytes of tensors, and 21663 follow it"),
        (header(|h| h["model.norm.weight"]["shape"] = json!([u64::MAX, u64::MAX])),
            3, "T/model.safetensors is not a whole safetensors file: its header: overflow computing buffer size from shape and/or element type"),
        (header(|h| h["model.norm.weight"]["shape"] = json!([-1])),
            3, "T/model.safetensors is not a whole safetensors file: its header: invalid value: integer `-1`, expected usize at line 1 column 4586"),
        (header(|h| h["model.norm.weight"]["shape"] = json!([17])),
            3, "T/model.safetensors is not a whole safetensors file: its header: invalid shape, data type, or offset for tensor"),
        (header(|h| h["model.norm.weight"]["dtype"] = json!("Q4_0")),
            3, "T/model.safetensors is not a whole safetensors file: its header: unknown variant `Q4_0`, expected one of `BOOL`, `F4`, `F6_E2M3`, `F6_E3M2`, `U8`, `I8`, `F8_E5M2`, `..."),
        (header(|h| h["model.norm.weight"]["dtype"] = json!("I16")),
            4, "T/model.safetensors: tensor model.norm.weight is I16, which this engine does not run: expected BF16, F16 or F32"),
        (header(|h| h["model.norm.weight"]["data_offsets"] = json!([0, 32])),
            3, "T/model.safetensors is not a whole safetensors file: its header: invalid offset for tensor `model.embed_tokens.weight`"),
        (header(|h| h["model.norm.weight"]["data_offsets"] = json!([32, 0])),
            3, "T/model.safetensors is not a whole safetensors file: its header: invalid offset for tensor `model.norm.weight`"),
        (write(overflowing()),
            3, "T/model.safetensors is not a whole safetensors file: its header describes 18446744073709551608 bytes of tensors, and 0 follow it"),
        (Box::new(move |t, _| edit_tensors(t, target(), |all| all.retain(|x| x.name != offsets))),
            3, "T/model.safetensors has no tensor model.norm.weight"),
        (Box::new(move |t, _| { edit_tensors(t, target(), |all| all.push(named("model.layers.0.self_attn.q_proj.bias"))) }),
            4, "T/model.safetensors: tensor model.layers.0.self_attn.q_proj.bias is not one that this kind of target has"),
        (Box::new(move |t, _| { edit_tensors(t, target(), |all| all.push(named("model.layers.4.mlp.up_proj.weight"))) }),
            3, "T/model.safetensors: tensor model.layers.4.mlp.up_proj.weight is of a layer beyond the 4 of config.json"),
        (Box::new(move |t, _| { edit_tensors(t, target(), |all| all.push(named("model.layers.0.mlp.up_proj.weight_scale"))) }),
            4, "T/model.safetensors: tensor model.layers.0.mlp.up_proj.weight_scale is of a quantised checkpoint, which this engine does not run: expected BF16, F16 or F32 weights"),
        (Box::new(move |t, _| { edit_tensors(t, target(), |all| all.push(named("model.layers.0.mlp.up_proj.qweight"))) }),
            4, "T/model.safetensors: tensor model.layers.0.mlp.up_proj.qweight is of a quantised checkpoint, which this engine does not run: expected BF16, F16 or F32 weights"),
        (Box::new(move |_, d| { edit_tensors(d, drafter(), |all| all.push(named("candidate_selector.predecessor_codebook"))) }),
            4, "D/model.safetensors: tensor candidate_selector.predecessor_codebook belongs to a DFlash2 drafter: this engine runs plain DFlash drafters"),
        (Box::new(move |_, d| { edit_tensors(d, drafter(), |all| all.push(named("layers.0.attention_conv.base_kernel"))) }),
            4, "D/model.safetensors: tensor layers.0.attention_conv.base_kernel belongs to a DFlash2 drafter: this engine runs plain DFlash drafters"),
        (Box::new(move |_, d| { edit_tensors(d, drafter(), |all| all.push(named("model.embed_tokens.weight"))) }),
            4, "D/model.safetensors: tensor model.embed_tokens.weight belongs to a drafter with an embedding, head or vocabulary of its own: this engine runs plain DFlash drafters"),
        (Box::new(move |_, d| edit_tensors(d, drafter(), |all| all.push(named("d2t")))),
            4, "D/model.safetensors: tensor d2t belongs to a drafter with an embedding, head or vocabulary of its own: this engine runs plain DFlash drafters"),
        (Box::new(move |_, d| edit_tensors(d, drafter(), |all| all.push(named("markov_w1")))),
            4, "D/model.safetensors: tensor markov_w1 is not one that a DFlash drafter has"),
        (Box::new(move |_, d| edit_tensors(d, drafter(), |all| all.push(named("model.fc.weight")))),
            4, "D/model.safetensors: tensor model.fc.weight is not one that a DFlash drafter has"),
        (Box::new(move |_, d| edit_tensors(d, drafter(), |all| all.retain(|x| x.name != "fc.weight"))),
            3, "D/model.safetensors has no tensor fc.weight"),
        (Box::new(|t, d| { fs::rename(d.join("model.safetensors"), t.join("model.safetensors")).unwrap(); }),
            4, "T/model.safetensors: tensor fc.weight is not one that this kind of target has"),
    ];
    for (spoil, code, sentence) in rows {
        let found = refusal(|t, d| spoil(t, d));
        assert_eq!((found.0, found.1.as_str()), (code, sentence));
    }
}

#[test]
#[rustfmt::skip] // a table: a case, then what it must give
fn folders_and_indexes_are_refused_by_what_they_hold() {
    type Spoil = fn(&Path, &Path);
    fn only(dir: &Path, file: &str) {
        fs::rename(dir.join("model.safetensors"), dir.join(file)).unwrap();
    }
    fn shards(dir: &Path, edit: impl FnOnce(&mut Value)) {
        fs::remove_file(dir.join("model.safetensors")).unwrap();
        support::write_tensors(dir, &support::target_tensors(&small().0), Dtype::F32, 2);
        edit_json(dir, "model.safetensors.index.json", edit);
    }
    fn first(index: &mut Value, file: &str) {
        index["weight_map"]["model.embed_tokens.weight"] = file.into();
    }
    let rows: &[(Spoil, u8, &str)] = &[
        (|t, _| fs::remove_dir_all(t).unwrap(),
            3, "T does not exist: expected a Hugging Face model folder"),
        (|t, _| { fs::remove_dir_all(t).unwrap(); fs::write(t, "GGUF").unwrap(); },
            3, "T is a file: expected a Hugging Face model folder"),
        (|t, _| fs::remove_file(t.join("config.json")).unwrap(),
            3, "T has no config.json, it holds model.safetensors: expected a Hugging Face model folder"),
        (|t, _| fs::remove_file(t.join("model.safetensors")).unwrap(),
            3, "T has no model.safetensors: expected safetensors, in one file or in shards with model.safetensors.index.json"),
        (|t, _| only(t, "pytorch_model.bin"),
            3, "T has no model.safetensors, it holds pytorch_model.bin: expected safetensors, in one file or in shards with model.safetensors.index.json"),
        (|t, _| only(t, "qwen3-q4.gguf"),
            3, "T has no model.safetensors, it holds qwen3-q4.gguf: expected safetensors, in one file or in shards with model.safetensors.index.json"),
        (|t, _| { fs::remove_file(t.join("model.safetensors")).unwrap(); fs::create_dir(t.join("model.safetensors")).unwrap(); },
            3, "T/model.safetensors is not a regular file"),
        (|t, _| fs::write(t.join("config.json"), "").unwrap(),
            3, "T/config.json is not valid JSON: EOF while parsing a value at line 1 column 0"),
        (|t, _| fs::write(t.join("config.json"), "[1]").unwrap(),
            3, "T/config.json is not a JSON object"),
        (|t, _| fs::write(t.join("config.json"), "{\"rms_norm_eps\": -Infinity}").unwrap(),
            3, "T/config.json is not valid JSON: invalid number at line 1 column 19 (NaN and Infinity are Python's, not JSON's)"),
        (|t, _| fs::write(t.join("config.json"), "{\"rope_theta\": NaN}").unwrap(),
            3, "T/config.json is not valid JSON: expected value at line 1 column 16 (NaN and Infinity are Python's, not JSON's)"),
        (|t, _| fs::write(t.join("config.json"), [b'{', 0xff]).unwrap(),
            3, "T/config.json is not valid JSON: key must be a string at line 1 column 2"),
        (|t, _| fs::write(t.join("config.json"), "[".repeat(100_000)).unwrap(),
            3, "T/config.json is not valid JSON: recursion limit exceeded at line 1 column 128"),
        (|t, _| fs::write(t.join("config.json"), " ".repeat(5 << 20)).unwrap(),
            3, "T/config.json has 5242880 bytes, expected a configuration of at most 4194304"),
        (|t, _| edit_json(t, "generation_config.json", |c| c["eos_token_id"] = json!([0, 40])),
            3, "T/generation_config.json: eos_token_id[1] is 40, expected a whole number from 0 to 39"),
        (|t, _| shards(t, |_| ()),
            0, "opened"),
        (|t, _| shards(t, |i| i["weight_map"] = json!(3)),
            3, "T/model.safetensors.index.json is not an index of shards: invalid type: integer `3`, expected a map at line 5 column 17"),
        (|t, _| shards(t, |i| i["weight_map"] = json!({})),
            3, "T/model.safetensors.index.json has no tensor model.embed_tokens.weight"),
        (|t, _| shards(t, |i| *i = json!({})),
            3, "T/model.safetensors.index.json is not an index of shards: missing field `weight_map` at line 1 column 2"),
        (|t, _| shards(t, |i| first(i, "../drafter/model.safetensors")),
            3, "T/model.safetensors.index.json lists the shard \"../drafter/model.safetensors\": expected the plain name of a file in the same folder"),
        (|t, _| shards(t, |i| first(i, "/etc/passwd")),
            3, "T/model.safetensors.index.json lists the shard \"/etc/passwd\": expected the plain name of a file in the same folder"),
        (|t, _| shards(t, |i| first(i, "..")),
            3, "T/model.safetensors.index.json lists the shard \"..\": expected the plain name of a file in the same folder"),
        (|t, _| shards(t, |i| first(i, "..\\x")),
            3, "T/model.safetensors.index.json lists the shard \"..\\x\": expected the plain name of a file in the same folder"),
        (|t, _| shards(t, |i| first(i, "")),
            3, "T/model.safetensors.index.json lists the shard \"\": expected the plain name of a file in the same folder"),
        (|t, _| shards(t, |i| first(i, "model-00003-of-00002.safetensors")),
            3, "T/model.safetensors.index.json lists the shard model-00003-of-00002.safetensors, which is not in the folder"),
        (|t, _| shards(t, |i| first(i, "model-00002-of-00002.safetensors")),
            3, "T/model.safetensors.index.json says that T/model-00002-of-00002.safetensors holds the tensor model.embed_tokens.weight, which it does not"),
        (|t, _| shards(t, |i| i["weight_map"]["ghost"] = json!("model-00002-of-00002.safetensors")),
            3, "T/model.safetensors.index.json says that T/model-00002-of-00002.safetensors holds the tensor ghost, which it does not"),
        (|t, _| { shards(t, |_| ()); let copy = support::safetensors_file(&support::target_tensors(&small().0)[..1], Dtype::F32); fs::write(t.join("model-00002-of-00002.safetensors"), copy).unwrap(); },
            3, "tensor model.embed_tokens.weight is in both T/model-00001-of-00002.safetensors and T/model-00002-of-00002.safetensors"),
        (|t, _| { shards(t, |_| ()); fs::remove_file(t.join("model-00002-of-00002.safetensors")).unwrap(); },
            3, "T/model.safetensors.index.json lists the shard model-00002-of-00002.safetensors, which is not in the folder"),
    ];
    for (spoil, code, sentence) in rows {
        let found = refusal(spoil);
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

#[test]
fn the_other_targets_drafter_is_refused() {
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
