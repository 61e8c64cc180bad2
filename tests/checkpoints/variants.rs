//! Model files that differ from their config or from the usual layout, and that run all the same: a tied config
//! with a head of its own, resized vocabularies, RoPE fields without effect, taps by hand, NeMo's drafters.

use crate::support;
use crate::support::program::{Run, run_pair};

use dflash::checkpoint::config::{Overrides, TargetConfig};
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::Dtype;
use dflash::cpu::model::{Drafter, Target};
use dflash::{Error, Result};
use serde_json::{Value, json};
use std::fs;
use support::{Raw, disk, edit_json};

fn written() -> support::Pair {
    let (target, drafter) = support::odd();
    support::write_pair(&target, &drafter)
}

fn open(pair: &support::Pair) -> Result<Pair> {
    Pair::open(disk(&pair.target), Some(disk(&pair.drafter)))
}

/// A run of 24 tokens on this device, of 10 on a GPU.
fn answer(pair: &support::Pair, device: &str, more: &[&str]) -> Run {
    let max = if device == "cpu" { "24" } else { "10" };
    let args = ["--raw", "def f", "-n", max, "--ignore-eos", "--json", "--device", device, "--ctx", "128"];
    run_pair(pair, &[&args, more].concat())
}

fn tokens(run: Run) -> Vec<u64> {
    let record = run.json().remove(0);
    record["tokens"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect()
}

/// The error's exit code and sentence, with `T` and `D` in place of the folders.
fn refusal(pair: &support::Pair, error: Error) -> (u8, String) {
    let sentence = error.to_string().replace(pair.target.to_str().unwrap(), "T");
    (error.exit_code(), sentence.replace(pair.drafter.to_str().unwrap(), "D"))
}

// ---- the head ----

#[test]
fn a_tied_config_with_another_head_uses_that_head() {
    let pair = written();
    let untied = ["cpu", "cuda"].map(|device| tokens(answer(&pair, device, &[])));
    edit_json(&pair.target, "config.json", |config| config["tie_word_embeddings"] = true.into());
    let opened = open(&pair).unwrap();
    assert!(!opened.target.config.tied);
    let note = "config.json: tie_word_embeddings is true, but lm_head.weight differs from \
                model.embed_tokens.weight: the head is used, as it is stored";
    assert!(opened.notes.len() == 1 && opened.notes[0].ends_with(note), "{:?}", opened.notes);
    for (device, expected) in ["cpu", "cuda"].iter().zip(untied) {
        let run = answer(&pair, device, &[]);
        assert_eq!(run.err.matches(note).count(), 1, "{}", run.err);
        assert_eq!(tokens(run), expected, "{device}");
    }
    assert!(!answer(&pair, "cpu", &["-q"]).err.contains("tie_word_embeddings"));
}

/// A difference in the last of many bytes counts, and a head of another type is another head.
#[test]
fn a_stored_head_is_compared_to_its_last_byte() {
    let (target, drafter) = support::odd();
    // More than a megabyte, the size of a piece.
    let target = support::Target { vocab: 4000, tied: true, ..target };
    let pair = support::write_pair(&target, &drafter);
    let write = |edit: &dyn Fn(&mut Raw)| {
        let mut tensors = support::target_tensors(&target);
        let mut head = Raw { name: "lm_head.weight".into(), ..tensors[0].clone() };
        edit(&mut head);
        tensors.push(head);
        support::write_tensors(&pair.target, &tensors, Dtype::Bf16, 1);
    };
    write(&|_| ());
    let equal = open(&pair).unwrap();
    assert!(equal.target.config.tied && equal.notes.is_empty());
    write(&|head| *head.values.last_mut().unwrap() += 1.0);
    assert!(!open(&pair).unwrap().target.config.tied);

    write(&|head| {
        head.shape[0] -= 1;
        head.values.truncate(3999 * 192);
    });
    let sentence = "T/model.safetensors: tensor lm_head.weight has shape [3999, 192], expected [4000, 192] from config.json";
    assert_eq!(refusal(&pair, open(&pair).err().unwrap()), (3, sentence.into()));
    write(&|_| ());
    let path = pair.target.join("model.safetensors");
    let file = fs::read(&path).unwrap();
    let end = 8 + u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&file[8..end]).unwrap();
    header["lm_head.weight"]["dtype"] = "I16".into();
    fs::write(&path, support::safetensors_raw(&header.to_string(), &file[end..])).unwrap();
    let sentence = "T/model.safetensors: tensor lm_head.weight is I16, which this engine does not run: expected BF16, F16 or F32";
    assert_eq!(refusal(&pair, open(&pair).err().unwrap()), (4, sentence.into()));
}

// ---- vocabularies ----

/// Target and drafter of other vocabulary sizes. The target prefers ids that the drafter does not have. On a
/// GPU, half of the runs are with a smaller vocabulary and half with a larger one; exhaustive: all with both.
#[test]
fn resized_vocabularies_keep_the_targets_tokens() {
    let pair = written();
    let mut tensors = support::target_tensors(&support::odd().0);
    let head = tensors.iter_mut().find(|tensor| tensor.name == "lm_head.weight").unwrap();
    head.values[280 * 192..].iter_mut().for_each(|weight| *weight *= 2.0);
    support::write_tensors(&pair.target, &tensors, Dtype::Bf16, 1);
    let devices = ["cpu", "cuda"].map(|device| (device, tokens(answer(&pair, device, &["--block", "1"]))));
    for (_, expected) in &devices {
        assert!(expected.iter().any(|&id| id >= 280) && expected.iter().any(|&id| id < 280));
    }
    for (vocab, common) in [(280, 280), (320, 301)] {
        edit_json(&pair.drafter, "config.json", |config| config["vocab_size"] = vocab.into());
        let note =
            format!("vocab_size is {vocab}, the target's is 301: drafts are among the first {common} ids");
        for (device, expected) in &devices {
            let runs =
                |i: usize| *device == "cpu" || support::exhaustive() || i.is_multiple_of(2) == (vocab == 280);
            let exact = [&[][..], &["--tree", "20"], &["--adaptive"]];
            for (_, more) in exact.into_iter().enumerate().filter(|(i, _)| runs(*i)) {
                let run = answer(&pair, device, more);
                assert_eq!(run.err.matches(&note).count(), 1, "{}", run.err);
                assert_eq!(tokens(run), *expected, "{device} {more:?}");
            }
            let (chain, tree) = (&[][..], &["--tree", "20"][..]);
            let methods = [("rejection", chain), ("block", chain), ("block", tree), ("rejection", tree)];
            for (_, (verify, tree)) in methods.into_iter().enumerate().filter(|(i, _)| runs(*i)) {
                let flags = [&["--verify", verify, "--temperature", "1", "--seed", "3"], tree].concat();
                let sampled = tokens(answer(&pair, device, &flags));
                assert_eq!(sampled.len(), expected.len());
                assert!(sampled.iter().any(|&id| id >= 280), "{device} {flags:?}: {sampled:?}");
            }
        }
    }
}

#[test]
fn ids_that_the_drafter_does_not_have_are_never_drafted() {
    let pair = written();
    let logits = |vocab: usize| {
        edit_json(&pair.drafter, "config.json", |config| config["vocab_size"] = vocab.into());
        let opened = open(&pair).unwrap();
        let target = Target::load(&opened.target).unwrap();
        let drafter = Drafter::load(opened.drafter().unwrap()).unwrap();
        let mut logits = Vec::new();
        drafter.logits(&target, &[0.5; 2 * 192], &mut logits);
        logits
    };
    let (all, some) = (logits(301), logits(280));
    assert_eq!(logits(400), all);
    for (all, some) in all.chunks(301).zip(some.chunks(301)) {
        assert_eq!(all[..280], some[..280]);
        assert!(some[280..].iter().all(|&logit| logit == f32::NEG_INFINITY));
    }
}

#[test]
fn a_mask_token_without_an_embedding_is_refused() {
    let pair = written();
    edit_json(&pair.drafter, "config.json", |config| {
        config["vocab_size"] = 310.into();
        config["dflash_config"]["mask_token_id"] = 301.into();
    });
    let sentence = "D/config.json does not fit T/config.json: its mask token is 301, and the target's embedding has only 301 rows";
    assert_eq!(refusal(&pair, open(&pair).err().unwrap()), (3, sentence.into()));
}

// ---- RoPE ----

fn with_rope(rope_scaling: Value, max_positions: usize) -> TargetConfig {
    let dir = tempfile::tempdir().unwrap();
    let spec = support::Target { rope_scaling, max_positions, ..Default::default() };
    support::write_json(dir.path(), "config.json", &support::target_config(&spec));
    let mut config = TargetConfig::open(&disk(dir.path())).unwrap();
    let path = format!("{}/", dir.path().display());
    config.notes.iter_mut().for_each(|note| *note = note.replace(&path, ""));
    config
}

/// DeepSeek-R1-0528-Qwen3-8B as published. Hugging Face ignores `attn_factor`, so the factor of YaRN is
/// 0.1 ln 4 + 1.
#[test]
fn rope_fields_without_effect_are_ignored_with_a_note() {
    let published = json!({
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768,
        "attn_factor": 0.8782488562869419
    });
    let config = with_rope(published, 131_072);
    assert_eq!(config.stack.max_positions, 131_072);
    assert!((config.stack.rope.frequencies().1 - 1.138_629_436_111_989).abs() < 1e-12);
    let ignored = |fields: &str, kind: &str, it: &str, is: &str| {
        format!(
            "config.json: rope_scaling.{fields} {is} ignored, because no formula of rope_type {kind} uses {it}"
        )
    };
    assert_eq!(config.notes, [ignored("attn_factor", "yarn", "it", "is")]);

    let plain = with_rope(json!({ "type": "linear", "factor": 2.0 }), 256);
    assert!(plain.notes.is_empty());
    let extra =
        json!({ "type": "linear", "factor": 2.0, "finetuned": true, "mrope_section": [1, 2], "alpha": 1.0 });
    let config = with_rope(extra, 256);
    assert_eq!(config.stack.rope, plain.stack.rope);
    assert_eq!(config.notes, [ignored("finetuned, mrope_section", "linear", "them", "are")]);
}

/// Qwen's recipe leaves `max_position_embeddings` as it is.
#[test]
fn yarn_raises_the_context_to_factor_times_original() {
    let recipe = |factor: f64, original: Value| json!({ "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original });
    let config = with_rope(recipe(4.0, 32768.into()), 40960);
    assert_eq!(config.stack.max_positions, 131_072);
    let note = "config.json: YaRN raises the context from 40960 to 131072 positions (rope_scaling.factor 4 x \
                original_max_position_embeddings 32768)";
    assert_eq!(config.notes, [note]);
    for (factor, original, max, expected) in [
        (2.5, json!(100), 200, 250),
        (2.0, json!(100), 200, 200),
        (2.0, json!(50), 200, 200),
        (2.0, Value::Null, 200, 200),
    ] {
        let config = with_rope(recipe(factor, original), max);
        assert_eq!((config.stack.max_positions, config.notes.len()), (expected, usize::from(expected > max)));
    }
}

// ---- drafters ----

#[test]
fn taps_are_never_guessed_and_can_be_given() {
    let pair = written();
    let expected = tokens(answer(&pair, "cpu", &[]));
    edit_json(&pair.drafter, "config.json", |config| {
        config["dflash_config"].as_object_mut().unwrap().remove("target_layer_ids");
    });
    let run = answer(&pair, "cpu", &[]);
    let sentence = "dflash_config.target_layer_ids is absent, expected the layers of the target that the drafter \
                    reads: give them as --taps 1,9,...\n";
    assert!(run.code == 3 && run.err.ends_with(sentence), "{run:?}");
    let given = answer(&pair, "cpu", &["--taps", "1,0"]);
    assert!(!given.err.contains("replace"), "{}", given.err);
    assert_eq!(tokens(given), expected);
    for (taps, sentence) in [
        ("1", "--taps holds 1 layers, expected 2, as fc.weight of the drafter takes"),
        ("1,1", "--taps holds 1 twice"),
        ("0,3", "--taps holds 3, expected layers from 0 to 2 (its target has 3 layers)"),
        (
            "0,2",
            "--taps holds 2, the target's last layer: engines differ on whether the final norm applies to it",
        ),
        (
            "1,",
            "invalid value '' for '--taps <1,9,...>': expected a whole number from 0 to 18446744073709551615",
        ),
    ] {
        let run = answer(&pair, "cpu", &["--taps", taps]);
        assert_eq!((run.code, run.err), (2, format!("dflash-gen: {sentence}\n")));
    }
    let target = pair.target.to_str().unwrap();
    let run = support::program::run(["--target", target, "--taps", "1", "x"]);
    assert_eq!(
        (run.code, run.err.as_str()),
        (2, "dflash-gen: --taps needs a drafter, but --draft is none\n")
    );
}

#[test]
fn taps_that_replace_those_of_the_config_are_noted() {
    let pair = written();
    let reopened = |taps: &[usize]| {
        let overrides = Overrides { taps: Some(taps.to_vec()), slots: None };
        Pair::open_with(disk(&pair.target), Some(disk(&pair.drafter)), &overrides).unwrap()
    };
    assert!(reopened(&[1, 0]).notes.is_empty());
    let other = reopened(&[0, 1]);
    assert_eq!(other.drafter().unwrap().config.taps, [0, 1]);
    let note = "config.json: taps [0, 1] replace dflash_config.target_layer_ids, which is [1, 0]";
    assert!(other.notes.len() == 1 && other.notes[0].ends_with(note), "{:?}", other.notes);
}

#[test]
fn drafters_of_nemo_load_with_their_names() {
    let pair = written();
    let expected = tokens(answer(&pair, "cpu", &[]));
    let (target, drafter) = support::odd();
    let mut tensors = support::drafter_tensors(&target, &drafter);
    tensors.iter_mut().for_each(|tensor| tensor.name = format!("model.{}", tensor.name));
    support::write_tensors(&pair.drafter, &tensors, drafter.dtype, 1);
    edit_json(&pair.drafter, "config.json", |c| c["architectures"] = json!(["Qwen3DFlashDraftModel"]));
    assert_eq!(tokens(answer(&pair, "cpu", &[])), expected);
}

#[test]
fn a_drafter_that_accepts_nothing_is_noticed_once() {
    // A random drafter of a random target.
    let pair = written();
    let line = "the drafter's drafts are not accepted (acceptance length 1.0";
    let noticed = |tokens: &str, more: &[&str]| {
        let args = ["--raw", "def f", "--ignore-eos", "--json", "-n", tokens];
        let run = run_pair(&pair, &[&args, more].concat());
        assert_eq!(run.code, 0, "{}", run.err);
        run.err.matches(line).count()
    };
    assert_eq!(noticed("100", &[]), 1);
    assert_eq!(noticed("20", &[]), 0);
    assert_eq!(noticed("100", &["-q"]), 0);
    // The two ways to compare say it, too.
    let args = ["--raw", "def f", "--ignore-eos", "--check-lossless", "-n", "60"];
    let run = run_pair(&pair, &args);
    assert_eq!((run.code, run.err.matches(line).count()), (0, 1), "{}", run.err);
    assert_eq!(noticed("100", &["--block", "1"]), 0);
}
