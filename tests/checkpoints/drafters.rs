//! Drafters in the speculators layout: what their configs and files say, and what is refused.

use crate::support;

use dflash::checkpoint::config::{Overrides, Slots};
use dflash::checkpoint::pair::Pair;
use serde_json::{Value, json};
use std::fs;
use support::{disk, edit_json, small, write_pair};

/// A small pair whose drafter has a head for 9 of the 40 tokens.
fn written() -> support::Pair {
    let (target, drafter) = small();
    let pair = write_pair(&target, &drafter);
    support::reduce_vocabulary(&pair, &target, &drafter, &[0, 3, 4, 9, 20, 21, 22, 38, 39], false);
    pair
}

fn open(pair: &support::Pair) -> dflash::Result<Pair> {
    Pair::open(disk(&pair.target), Some(disk(&pair.drafter)))
}

/// The error's exit code and sentence, with `D` in place of the drafter's folder.
fn refusal(pair: &support::Pair) -> (u8, String) {
    let error = open(pair).err().expect("refused");
    (error.exit_code(), error.to_string().replace(pair.drafter.to_str().unwrap(), "D"))
}

fn with_config(edit: impl FnOnce(&mut Value)) -> support::Pair {
    let pair = written();
    edit_json(&pair.drafter, "config.json", edit);
    pair
}

/// A pair with the bytes of an integer tensor replaced.
fn with_integers(name: &str, edit: impl FnOnce(&mut [u8])) -> support::Pair {
    let pair = written();
    let path = pair.drafter.join("model.safetensors");
    let mut file = fs::read(&path).unwrap();
    let range = {
        let (size, header) = safetensors::SafeTensors::read_metadata(&file).unwrap();
        let (begin, end) = header.tensors()[name].data_offsets;
        8 + size + begin..8 + size + end
    };
    edit(&mut file[range]);
    fs::write(&path, file).unwrap();
    pair
}

#[test]
fn a_speculators_config_gives_taps_as_outputs_and_its_own_vocabulary() {
    let plan = open(&written()).unwrap().drafter().unwrap().config.clone();
    assert_eq!((&plan.taps[..], plan.slots, plan.block), (&[0, 2][..], Slots::FillIn, 8));
    assert_eq!((plan.own_head, plan.ids.as_deref()), (Some(9), Some(&[0, 3, 4, 9, 20, 21, 22, 38, 39][..])));

    let anchor_first = open(&with_config(|config| config["sample_from_anchor"] = true.into())).unwrap();
    let plan = anchor_first.drafter().unwrap().config.clone();
    assert_eq!((plan.slots, plan.block, plan.first_row()), (Slots::AnchorFirst, 9, 0));
}

/// Releases of speculators differ in its default for DSpark.
#[test]
fn slots_that_nothing_says_are_refused() {
    let pair = with_config(|config| {
        config["speculators_model_type"] = "dspark".into();
        config["sample_from_anchor"] = Value::Null;
    });
    let sentence = "D/config.json: sample_from_anchor is absent, and releases of speculators differ in its default: give \
                    `slots` fill-in (files from before July 2026) or anchor-first";
    assert_eq!(refusal(&pair), (3, sentence.into()));
    for (name, slots, block) in [("fill-in", Slots::FillIn, 8), ("anchor-first", Slots::AnchorFirst, 9)] {
        let overrides = Overrides { taps: None, slots: Some(slots) };
        let opened = Pair::open_with(disk(&pair.target), Some(disk(&pair.drafter)), &overrides).unwrap();
        let plan = opened.drafter().unwrap().config.clone();
        assert_eq!((plan.slots, plan.block, opened.notes.len()), (slots, block, 0));
        let [target, drafter] = [&pair.target, &pair.drafter].map(|dir| dir.to_str().unwrap());
        let args = ["--target", target, "--draft", drafter, "--slots", name, "--plan", "--json"];
        let run = support::program::run(args);
        assert_eq!(run.json()[0]["drafter"]["plan"]["slots"], name);
    }
    // An override of what the file says is noted.
    let overrides = Overrides { taps: None, slots: Some(Slots::AnchorFirst) };
    let decided = written();
    let opened = Pair::open_with(disk(&decided.target), Some(disk(&decided.drafter)), &overrides).unwrap();
    assert!(
        opened.notes[0].ends_with("config.json: slots anchor-first replace fill-in"),
        "{:?}",
        opened.notes
    );
}

/// An anchor beyond the drafter's own table would have no embedding.
#[test]
fn an_own_embedding_must_have_every_token_of_the_target() {
    let (target, drafter) = small();
    let pair = write_pair(&target, &drafter);
    let mut tensors = support::drafter_tensors(&target, &drafter);
    let embedding = support::target_tensors(&target).remove(0);
    let rows = 39;
    let values = embedding.values[..rows * target.hidden].to_vec();
    tensors.push(support::Raw {
        name: "embed_tokens.weight".into(),
        shape: vec![rows, target.hidden],
        values,
    });
    support::write_tensors(&pair.drafter, &tensors, drafter.dtype, 1);
    edit_json(&pair.drafter, "config.json", |config| {
        config["dflash_config"] = Value::Null;
        config["num_anchors"] = 512.into();
        config["target_layer_ids"] = json!(drafter.taps);
        config["mask_token_id"] = drafter.mask_token.into();
        config["vocab_size"] = rows.into();
    });
    let sentence =
        "D/model.safetensors: the drafter has embeddings of 39 tokens, but the target's vocabulary has 40";
    assert_eq!(refusal(&pair), (3, sentence.into()));
}

/// Boundaries 2, L / 2 and L - 3 of a target of L layers.
#[test]
fn absent_taps_of_a_speculators_config_are_the_default_ones() {
    let target = support::Target { layers: 12, ..small().0 };
    let drafter = support::Drafter { taps: vec![1, 5, 8], ..small().1 };
    let pair = write_pair(&target, &drafter);
    support::reduce_vocabulary(&pair, &target, &drafter, &[1, 2], false);
    edit_json(&pair.drafter, "config.json", |config| config["aux_hidden_state_layer_ids"] = Value::Null);
    assert_eq!(open(&pair).unwrap().drafter().unwrap().config.clone().taps, [1, 5, 8]);
}

/// Sliding layers see both ways unless the flag is there and false. Full layers always do.
#[test]
fn masks_of_a_speculators_config_follow_its_flag() {
    let causal = |flag: Value| {
        let pair = with_config(|config| {
            let layers = &mut config["transformer_layer_config"];
            layers["layer_types"] = json!(["full_attention", "sliding_attention"]);
            layers["sliding_window"] = 5.into();
            layers["use_sliding_window"] = true.into();
            config["sliding_window_non_causal"] = flag;
        });
        let plan = open(&pair).unwrap().drafter().unwrap().config.clone();
        plan.stack.attention.iter().map(|layer| (layer.causal, layer.window)).collect::<Vec<_>>()
    };
    for (flag, expected) in [(json!(false), true), (json!(true), false), (Value::Null, false)] {
        assert_eq!(causal(flag), [(false, None), (expected, Some(5))]);
    }
}

#[test]
fn contradictions_between_config_vocabulary_and_target_are_refused() {
    let of_config = |edit: fn(&mut Value)| refusal(&with_config(edit));
    let d2t = |index: usize, offset: i64| {
        refusal(&with_integers("d2t", |bytes| bytes[index * 8..][..8].copy_from_slice(&offset.to_le_bytes())))
    };
    let file = "D/model.safetensors";
    for (found, code, sentence) in [
        (
            of_config(|config| config["draft_vocab_size"] = 8.into()),
            3,
            format!("{file}: tensor d2t is I64 [9], expected I64 [8]"),
        ),
        (
            of_config(|config| config["draft_vocab_size"] = Value::Null),
            3,
            format!("{file}: tensor lm_head.weight has shape [9, 16], expected [40, 16] from config.json"),
        ),
        (
            of_config(|config| config["draft_vocab_size"] = 41.into()),
            3,
            "D/config.json: draft_vocab_size is 41, expected a whole number from 1 to 40".into(),
        ),
        (
            of_config(|config| config["target_hidden_size"] = 32.into()),
            4,
            "D/config.json: target_hidden_size is 32, which this engine does not run: expected 16, the drafter's \
             hidden size"
                .into(),
        ),
        (
            of_config(|config| config["aux_hidden_state_layer_ids"] = json!([0, 2])),
            4,
            "D/config.json: aux_hidden_state_layer_ids[0] is 0, the output of the embedding: expected outputs of layers"
                .into(),
        ),
        (
            of_config(|config| config["aux_hidden_state_layer_ids"] = json!([3, 1])),
            3,
            "D/config.json: aux_hidden_state_layer_ids is [3,1], expected ascending layers".into(),
        ),
        (
            of_config(|config| config["aux_hidden_state_layer_ids"] = json!([1, 4])),
            4,
            "D/config.json: aux_hidden_state_layer_ids, as outputs of layers, holds 3, the target's last layer: engines \
             differ on whether the final norm applies to it"
                .into(),
        ),
        (d2t(8, 32), 3, format!("{file}: d2t[8] is 32, which gives no token of the vocabulary of 40")),
        (d2t(0, -1), 3, format!("{file}: d2t[0] is -1, which gives no token of the vocabulary of 40")),
        (d2t(2, 1), 3, format!("{file}: d2t[2] gives token 3, expected ascending tokens")),
        (d2t(3, 7), 3, format!("{file}: t2d marks other tokens than d2t gives")),
        (
            refusal(&with_integers("t2d", |marks| marks[5] = 1)),
            3,
            format!("{file}: t2d marks other tokens than d2t gives"),
        ),
    ] {
        assert_eq!(found, (code, sentence));
    }
}

#[test]
fn the_plan_says_what_a_drafter_was_taken_for() {
    let pair = written();
    let (target, drafter) = (pair.target.to_str().unwrap(), pair.drafter.to_str().unwrap());
    let run = support::program::run(["--target", target, "--draft", drafter, "--plan"]);
    let line = "  a DFlash drafter in the speculators layout, fill-in: 7 drafts a round, outputs of layers 0 2, head of \
                its own for 9 of 40 tokens\n";
    assert!(run.code == 0 && run.out.contains(line), "{run:?}");
    let run = support::program::run(["--target", target, "--draft", drafter, "--plan", "--json"]);
    let plan = &run.json()[0]["drafter"]["plan"];
    let expected = json!({
        "family": "dflash", "layout": "speculators", "slots": "fill-in", "walk": null, "drafts": 7, "taps": [0, 2],
        "own_embedding": false, "own_head": 9, "vocab": 40, "reduced": true
    });
    assert_eq!(*plan, expected);
}
