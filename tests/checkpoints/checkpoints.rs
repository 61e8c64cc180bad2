//! Reading checkpoint folders: configs, tensors and RoPE frequencies.

use crate::support;

use dflash::checkpoint::config::{Attention, DrafterConfig, Family, Rope, RopeScaling, TargetConfig};
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::safetensors::{Checkpoint, Dtype};
use dflash::{Error, Result};
use serde_json::{Value, json};
use std::fs;
use support::{Drafter, Raw, Target, disk, edit_json, open_all, open_pair, small, small_pair, write_pair};

/// The values of a tensor, converted to f32 from the stored dtype.
fn values(weights: &Checkpoint, name: &str, shape: &[usize]) -> Vec<f32> {
    let tensor = weights.tensor(name, shape).unwrap();
    let half = |b: &[u8]| u16::from_le_bytes([b[0], b[1]]);
    match tensor.dtype {
        Dtype::Bf16 => tensor.bytes().chunks(2).map(|b| half::bf16::from_bits(half(b)).to_f32()).collect(),
        Dtype::F16 => tensor.bytes().chunks(2).map(|b| half::f16::from_bits(half(b)).to_f32()).collect(),
        Dtype::F32 => tensor.bytes().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
    }
}

// ---- configs and tensors ----

#[test]
fn the_demo_pair_opens_with_its_configs() {
    let (target, drafter, weights, _) = open_all(&DEMO_TARGET, &DEMO_DRAFTER).unwrap();
    assert_eq!(target.family, Family::Qwen3);
    assert!(target.tied && target.stack.qk_norm);
    assert_eq!((target.vocab, target.eos.ids()), (2048, vec![0]));
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
fn tensors_are_read_back_in_every_dtype_and_sharding() {
    for (dtype, shards) in [(Dtype::Bf16, 1), (Dtype::F16, 3), (Dtype::F32, 5)] {
        let (target, drafter) = small();
        let target = Target { dtype, shards, tied: false, ..target };
        let pair = write_pair(&target, &Drafter { dtype, shards, ..drafter });
        let (config, _, weights, _) = open_pair(&pair).unwrap();
        assert_eq!(weights.list().len(), config.tensors().len());
        for Raw { name, shape, values: written } in support::target_tensors(&target) {
            let read = values(&weights, &name, &shape);
            let rounding = match dtype {
                Dtype::Bf16 => 1.0 / 256.0,
                Dtype::F16 => 1.0 / 2048.0,
                Dtype::F32 => 0.0,
            };
            assert!(
                read.iter().zip(&written).all(|(r, w)| (r - w).abs() <= rounding * w.abs().max(1e-3)),
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
fn drafter_tensors_are_found_under_every_known_naming_scheme() {
    let (target, drafter) = small();
    let pair = write_pair(&target, &drafter);
    let tensors = support::drafter_tensors(&target, &drafter);
    let rename = |to: &dyn Fn(&str) -> String| -> Vec<Raw> {
        tensors.iter().map(|t| Raw { name: to(&t.name), ..t.clone() }).collect()
    };
    let encoder = |name: &str| match name {
        "fc.weight" => "encoder.fc.weight".to_string(),
        "hidden_norm.weight" => "encoder.output_norm_enc.weight".to_string(),
        name => name.to_string(),
    };
    for renamed in
        [rename(&|n| format!("model.{n}")), rename(&encoder), rename(&|n| format!("model.{}", encoder(n)))]
    {
        support::write_tensors(&pair.drafter, &renamed, Dtype::F32, 1);
        let (config, _, _, weights) = open_pair(&pair).map(|(_, d, t, w)| (d, 0, t, w)).unwrap();
        for (name, shape) in config.tensors() {
            let written = tensors.iter().find(|t| t.name == name).unwrap();
            assert_eq!(values(&weights, &name, &shape), written.values, "{name}");
        }
    }
}

#[test]
fn targets_may_store_buffers_and_either_or_both_of_two_tied_tensors() {
    let (target, drafter) = small();
    let pair = write_pair(&target, &drafter);
    let mut tensors = support::target_tensors(&target);
    let head = Raw { name: "lm_head.weight".into(), ..tensors[0].clone() };
    let buffer = |name: &str| Raw { name: name.into(), shape: vec![2], values: vec![1.0; 2] };
    tensors.extend([head, buffer("model.layers.0.self_attn.rotary_emb.inv_freq")]);
    support::write_tensors(&pair.target, &tensors, Dtype::F32, 1);
    open_pair(&pair).unwrap();
    support::write_tensors(&pair.target, &tensors[1..], Dtype::F32, 1);
    let (target, _, weights, _) = open_pair(&pair).unwrap();
    let (name, shape) = &target.tensors()[0];
    assert_eq!((name, values(&weights, name, shape)), (&tensors[0].name, tensors[0].values.clone()));

    // An I64 buffer of two elements: four f32 zeros are written, and the header calls them two I64.
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
fn eos_ids_are_those_of_both_configs() {
    let pair = small_pair();
    let target = disk(&pair.target);
    let eos = || TargetConfig::open(&target).unwrap().eos.to_string();
    let set = |file: &str, value: Value| edit_json(&pair.target, file, |c| c["eos_token_id"] = value);
    set("config.json", json!(5));
    set("generation_config.json", json!([7, 5, 7]));
    assert_eq!(eos(), "7 (generation_config.json), 5 (generation_config.json, config.json)");
    set("generation_config.json", json!(8));
    assert_eq!(eos(), "8 (generation_config.json), 5 (config.json)");
    set("generation_config.json", Value::Null);
    assert_eq!(eos(), "5 (config.json)");
    fs::remove_file(pair.target.join("generation_config.json")).unwrap();
    set("config.json", json!([5, 6]));
    assert_eq!(eos(), "5 (config.json), 6 (config.json)");
    set("config.json", Value::Null);
    assert_eq!(eos(), "none");
}

/// A drafter config with the sizes of a published checkpoint (docs/dflash.md, section 1).
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
fn parameter_counts_match_the_published_drafters() {
    let count = |c: Value| support::parameters(&drafter_from(&c).unwrap().tensors());
    assert_eq!(count(published(2560, 9728, 5, 32, 8, 5)), 537_427_200);
    assert_eq!(count(published(4096, 12288, 5, 32, 8, 5)), 1_048_626_432);
    assert_eq!(count(published(2560, 9216, 6, 32, 8, 8)), 634_425_856);
    assert_eq!(count(published(2048, 6144, 6, 32, 8, 8)), 385_906_176);
    // The formula of docs/dflash.md, section 2, for sizes without a published count.
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
fn parameter_count_of_a_target_counts_a_tied_head_once() {
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
fn dflash_config_fields_override_top_level_fields() {
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

    // All fields at top level, without `dflash_config`.
    let flat = config["dflash_config"].take();
    config.as_object_mut().unwrap().extend(flat.as_object().unwrap().clone());
    let drafter = drafter_from(&config).unwrap();
    assert_eq!(
        (drafter.taps.as_slice(), drafter.mask_token, drafter.block),
        ([0, 1, 2].as_slice(), 151_669, 8)
    );
}

#[test]
fn causality_and_windows_match_the_reference() {
    let mut config = published(64, 64, 3, 4, 2, 2);
    let attention_of = |config: &Value| drafter_from(config).unwrap().stack.attention;
    let layer = |causal, window| Attention { causal, window };
    assert_eq!(attention_of(&config), [layer(false, None); 3]);
    config["layer_types"] = json!(["sliding_attention", "sliding_attention", "full_attention"]);
    config["sliding_window"] = 2048.into();
    let mixed = [layer(true, Some(2048)), layer(true, Some(2048)), layer(false, None)];
    assert_eq!(attention_of(&config), mixed);
    config["use_sliding_window"] = true.into();
    assert_eq!(attention_of(&config), mixed);
    config["dflash_config"]["causal"] = true.into();
    assert_eq!(attention_of(&config), [layer(true, Some(2048)), layer(true, Some(2048)), layer(true, None)]);
    config["is_causal"] = false.into();
    assert_eq!(
        attention_of(&config),
        [layer(false, Some(2048)), layer(false, Some(2048)), layer(false, None)]
    );
    // The window applies only to layers that `layer_types` calls sliding.
    config["layer_types"] = json!(["full_attention", "full_attention", "full_attention"]);
    assert_eq!(attention_of(&config), [layer(false, None); 3]);
}

#[test]
fn sliding_layers_of_a_target_match_hugging_face() {
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
fn default_head_sizes_match_hugging_face() {
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

/// Expected values come from `modeling_rope_utils` of transformers 4.57.6, with its functions run in f64 on
/// numpy. A case is the settings, theta, head_dim, the factor on cos and sin, and some inverse frequencies by
/// index.
#[test]
fn rope_frequencies_match_hugging_face() {
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
            // Qwen3's settings for long context, with the old name of the type's field
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
            // the original length defaults to max_position_embeddings, which is 163840 here
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
        // The same settings in the newer format.
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
    // Half of a head of 128 has the frequencies of a head of 64, as in the table above.
    assert!((frequencies[12] / 0.03162277660168379 - 1.0).abs() < 1e-11);
}
