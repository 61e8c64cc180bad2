//! What ends an answer: the stop ids of the target's files, `--stop-id`, special tokens as `--stop`, and the
//! line of `--verbose`.

use crate::support;
use crate::support::program;

use program::{command, finish, run, run_pair, write};
use serde_json::{Value, json};
use std::fs;
use support::Pair;

const ANSWER: [&str; 9] = ["--json", "--raw", "-n", "40", "--temperature", "1", "--seed", "3", "hello"];

/// A pair without any stop id, and the 40 tokens of its answer.
fn endless() -> (Pair, Vec<u32>) {
    let target = support::Target { vocab: 258, eos: vec![], ..Default::default() };
    let pair = support::write_pair(&target, &Default::default());
    let whole = answer(&pair, &[]);
    assert_eq!((whole.0.len(), whole.1.as_str()), (40, "length"));
    (pair, whole.0)
}

/// The tokens of the answer, and why it ended.
fn answer(pair: &Pair, more: &[&str]) -> (Vec<u32>, String) {
    let record = run_pair(pair, &[&ANSWER[..], more].concat()).json().remove(0);
    let finish = record["finish_reason"].as_str().unwrap().to_string();
    (serde_json::from_value(record["tokens"].clone()).unwrap(), finish)
}

/// The answer cut after the first `id`.
fn cut(whole: &[u32], id: u32) -> (Vec<u32>, String) {
    let end = whole.iter().position(|token| *token == id).unwrap();
    (whole[..=end].to_vec(), "stop".into())
}

/// The spelling of a token in `tokenizer.json`.
fn spelling(pair: &Pair, id: u32) -> String {
    let file = fs::read(pair.target.join("tokenizer.json")).unwrap();
    let tokenizer: Value = serde_json::from_slice(&file).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    vocab.iter().find(|(_, value)| **value == json!(id)).unwrap().0.clone()
}

/// Removes every stop id from the pair and writes one file.
fn set(pair: &Pair, file: &str, value: Value) {
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let _ = fs::remove_file(pair.target.join(name));
    }
    for name in ["config.json", "generation_config.json"] {
        support::edit_json(&pair.target, name, |config| config["eos_token_id"] = Value::Null);
    }
    match file {
        "config.json" | "generation_config.json" => {
            support::edit_json(&pair.target, file, |config| config["eos_token_id"] = value)
        }
        _ => drop(write(&pair.target, file, value.to_string())),
    }
}

#[test]
fn an_answer_ends_at_an_eos_of_any_file() {
    let (pair, whole) = endless();
    let id = whole[20];
    let token = spelling(&pair, id);
    let end = cut(&whole, id);
    for (file, value) in [
        ("generation_config.json", json!(id)),
        ("generation_config.json", json!([1, id])),
        ("config.json", json!([id, 1])),
        ("tokenizer_config.json", json!({"eos_token": token})),
        ("tokenizer_config.json", json!({"eos_token": {"content": token, "special": true}})),
        ("special_tokens_map.json", json!({"eos_token": token})),
        ("special_tokens_map.json", json!({"eos_token": {"content": token, "lstrip": false}})),
    ] {
        set(&pair, file, value.clone());
        for block in ["1", "8"] {
            assert_eq!(answer(&pair, &["--block", block]), end, "{file}: {value}, block {block}");
        }
        assert_eq!(answer(&pair, &["--ignore-eos"]).0, whole, "{file}: {value}");
    }
    // The map does not hide the config, and neither hides the others.
    set(&pair, "special_tokens_map.json", json!({"eos_token": "<|mask|>"}));
    write(&pair.target, "tokenizer_config.json", json!({"eos_token": token}).to_string());
    support::edit_json(&pair.target, "generation_config.json", |config| config["eos_token_id"] = json!(0));
    assert_eq!(answer(&pair, &[]), end);
}

#[test]
fn verbose_names_every_stop_id_and_its_sources() {
    let (pair, _) = endless();
    set(&pair, "special_tokens_map.json", json!({"eos_token": "<|endoftext|>"}));
    write(&pair.target, "tokenizer_config.json", json!({"eos_token": "<|mask|>"}).to_string());
    support::edit_json(&pair.target, "config.json", |config| config["eos_token_id"] = json!([7, 0]));
    support::edit_json(&pair.target, "generation_config.json", |config| config["eos_token_id"] = json!(7));
    let files = "7 (generation_config.json, config.json), 0 (config.json, special_tokens_map.json), \
                 1 (tokenizer_config.json)";
    for (flags, expected) in [
        (&["-v"][..], files.to_string()),
        (&["--verbose", "--stop-id", "9", "--stop-id", "7"], {
            files.replace("config.json), 0", "config.json, --stop-id), 0") + ", 9 (--stop-id)"
        }),
        (&["-v", "--ignore-eos"], "none".into()),
        (
            &["-v", "--ignore-eos", "--stop-id", "5", "--stop", "<|mask|>", "--stop", "x"],
            "5 (--stop-id), 1 (--stop)".into(),
        ),
    ] {
        let done = run_pair(&pair, &[&["--raw", "-n", "1", "hello"], flags].concat());
        let lines: Vec<&str> = done.err.lines().filter(|line| line.starts_with("stop ids")).collect();
        assert_eq!(lines, [format!("stop ids: {expected}")], "{done:?}");
    }
    // A line of its own stop, and stop strings that do not count.
    let line = json!({"prompt": "a", "stop": ["<|mask|>", "x"]}).to_string();
    let file = write(pair.root.path(), "lines.jsonl", line);
    let strings = json!(["x"]);
    support::edit_json(&pair.target, "generation_config.json", |config| config["stop_strings"] = strings);
    let done = run_pair(&pair, &["--raw", "-n", "1", "-v", "--ignore-eos", "--prompts", &file]);
    let stops = format!("{file} line 1: stop ids: 1 (--stop); stop strings: [\"<|mask|>\", \"x\"]");
    assert!(done.err.lines().any(|line| line == stops), "{done:?}");
    let note =
        "generation_config.json: stop_strings is [\"x\"]: only stop strings that are given end an answer";
    assert!(done.err.lines().any(|line| line.ends_with(note)), "{done:?}");
    let quiet = run_pair(&pair, &["--raw", "-n", "1", "hello"]).err;
    assert!(!quiet.contains("stop ids"), "{quiet}");
}

#[test]
fn stop_id_and_special_stop_strings_end_an_answer() {
    let (pair, whole) = endless();
    let (first, second) = (whole[25], whole[20]);
    let (first_flag, second_flag) = (first.to_string(), second.to_string());
    let earlier = |a: u32, b: u32| std::cmp::min_by_key(cut(&whole, a), cut(&whole, b), |end| end.0.len());
    assert_eq!(answer(&pair, &["--stop-id", &first_flag]), cut(&whole, first));
    for more in [&[][..], &["--ignore-eos"]] {
        let flags = [&["--stop-id", &first_flag, "--stop-id", &second_flag][..], more].concat();
        assert_eq!(answer(&pair, &flags), earlier(first, second));
    }
    // A special token that no file names as eos.
    let mut tokenizer: Value =
        serde_json::from_slice(&fs::read(pair.target.join("tokenizer.json")).unwrap()).unwrap();
    let token = spelling(&pair, second);
    tokenizer["added_tokens"].as_array_mut().unwrap().push(json!({
        "id": second, "content": token, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false,
    }));
    write(&pair.target, "tokenizer.json", tokenizer.to_string());
    for flags in [&["--block", "1"][..], &["--block", "8"], &["--ignore-eos"]] {
        assert_eq!(answer(&pair, &[&["--stop", &token], flags].concat()), cut(&whole, second));
    }
    for (flags, sentence) in [
        (["--stop-id", "258"], "--stop-id is 258, expected a token id of the target, from 0 to 257"),
        (
            ["--stop", "<|mask|>!"],
            "--stop is \"<|mask|>!\", which holds the special token \"<|mask|>\" and other text: special tokens have \
             no text, so expected the token alone",
        ),
    ] {
        let refused = run_pair(&pair, &[&["--raw", "hello"][..], &flags].concat());
        assert_eq!((refused.code, refused.err), (2, format!("dflash-gen: {sentence}\n")));
    }
}

#[test]
fn a_conversation_ends_its_answers_at_a_stop_id() {
    let mut chat = command(["--chat", "-n", "20", "--stop-id", "198", "-v"]);
    chat.stdin(std::process::Stdio::null());
    let done = finish(chat);
    assert!(
        done.err.contains("0 (generation_config.json, config.json, tokenizer_config.json), 198 (--stop-id)")
    );
    assert_eq!(done.code, 0);
    let refused = run(["--chat", "--stop-id", "2048"]);
    assert_eq!(refused.code, 2, "{refused:?}");
}

#[test]
fn a_decoder_that_cannot_be_streamed_has_exit_code_4() {
    let (pair, _) = endless();
    support::edit_json(&pair.target, "tokenizer.json", |tokenizer| {
        tokenizer["decoder"] = json!({"type": "WordPiece", "prefix": "##", "cleanup": true});
    });
    let refused = run_pair(&pair, &["hello"]);
    assert_eq!(refused.code, 4, "{refused:?}");
    assert!(refused.err.contains("decoder WordPiece cannot be streamed"), "{}", refused.err);
}
