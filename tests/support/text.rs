//! Tokenizer folders written from strings, and helpers that encode, render, decode and stream with them.

use dflash::Result;
use dflash::checkpoint::folder::{DEMO_TARGET, Folder};
use dflash::text::message::Message;
use dflash::text::tokenizer::{Stream, Text};
use serde_json::{Value, json};
use std::sync::LazyLock;

pub const TOKENIZER: &str = include_str!("../../demo/target/tokenizer.json");
pub static DEMO: LazyLock<Text> = LazyLock::new(|| Text::open(&DEMO_TARGET, None).unwrap());

/// Writes these files to a temporary folder and opens it.
pub fn open(files: &[(&str, &str)]) -> Result<Text> {
    open_with(files, None)
}

/// [`open`] with a chat template given by name and source.
pub fn open_with(files: &[(&str, &str)], template: Option<(&str, &str)>) -> Result<Text> {
    let dir = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        std::fs::write(dir.path().join(name), contents).unwrap();
    }
    Text::open(&Folder::Disk(dir.path().into()), template.map(|(name, source)| (name, source.to_string())))
}

/// The demo pair's tokenizer.
pub fn tokenizer_json() -> Value {
    serde_json::from_str(TOKENIZER).unwrap()
}

/// A small tokenizer in Llama 2's layout: `▁` for spaces, and byte tokens for characters without a token.
pub fn sentencepiece() -> Value {
    let mut pieces: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).into();
    pieces.extend((0..256).map(|byte| format!("<0x{byte:02X}>")));
    pieces.extend(
        ["▁", "a", "b", "t", "h", "e", "é", "▁a", "▁t", "he", "▁the", "▁▁", ".", "\n"].map(String::from),
    );
    let vocab: serde_json::Map<String, Value> =
        pieces.into_iter().enumerate().map(|(id, piece)| (piece, json!(id))).collect();
    let special = |id: u32, content: &str| {
        json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false, "special": true})
    };
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
            "merges": [["▁", "t"], ["h", "e"], ["▁t", "he"], ["▁", "a"], ["▁", "▁"]]},
    })
}

/// Pushes all ids. Returns the result of each push, and the text that `finish` returns.
pub fn streamed(mut stream: Stream, ids: &[u32]) -> (Vec<(String, bool)>, String) {
    let pushes = ids.iter().map(|id| stream.push(*id).unwrap()).collect();
    (pushes, stream.finish())
}

/// Opens the files and encodes, renders, decodes and streams with them. Checks that each error is one short
/// sentence.
pub fn exercise(files: &[(&str, &[u8])], template: Option<&str>) {
    let dir = tempfile::tempdir().unwrap();
    for (name, contents) in files {
        std::fs::write(dir.path().join(name), contents).unwrap();
    }
    let template = template.map(|source| ("t", source.to_string()));
    let Some(text) = or_sentence(Text::open(&Folder::Disk(dir.path().into()), template)) else { return };
    for prompt in ["", "the the  é日本\u{0}👩‍💻 <s>\n", " a"] {
        let ids = or_sentence(text.encode(prompt)).unwrap_or_default();
        let user = Message::new("user", prompt);
        for tools in [None, Some(json!([{}]))] {
            or_sentence(text.encode_chat(std::slice::from_ref(&user), tools.as_ref(), &[]));
        }
        text.decode(&ids).unwrap();
    }
    let (_, _) =
        streamed(text.stream(&["\n".into()]).unwrap(), &(0..300).chain([u32::MAX]).collect::<Vec<_>>());
}

/// The value, or none after a check that the error is one short sentence without control characters.
pub fn or_sentence<T>(result: Result<T>) -> Option<T> {
    result
        .map_err(|error| {
            let sentence = error.to_string();
            assert!(sentence.len() < 1000, "{} bytes: {:.200}", sentence.len(), sentence);
            assert!(!sentence.contains(char::is_control), "{sentence:?}");
        })
        .ok()
}
