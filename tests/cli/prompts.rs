//! Prompts from files and stdin: their forms, their own settings, and files that are something else.

use crate::support;
use crate::support::program;

use dflash::text::message::Message;
use program::{Run, flags, run, run_pair, with_stdin, write};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;

const PROMPT: &str = "def read_config(";

/// Writes objects as JSON lines and returns the path.
fn lines(dir: &Path, name: &str, objects: &[Value]) -> String {
    write(dir, name, objects.iter().map(|object| format!("{object}\n")).collect::<String>())
}

/// The demo pair's records of these lines.
fn records(objects: &[Value], more: &[&str]) -> Vec<Value> {
    let dir = tempfile::tempdir().unwrap();
    let file = lines(dir.path(), "p.jsonl", objects);
    run([&["--json", "-q", "--prompts", &file], more].concat()).json()
}

/// A pair with one token per byte, in which `rendered` is the prompt that the template makes.
struct Bytes {
    pair: support::Pair,
}

impl Bytes {
    fn new(template: &str) -> Bytes {
        let target = support::Target { vocab: 258, eos: vec![], ..Default::default() };
        let pair = support::write_pair(&target, &Default::default());
        support::write_tokenizer(&pair.target, 258);
        fs::write(pair.target.join("chat_template.jinja"), template).unwrap();
        Bytes { pair }
    }

    fn records(&self, objects: &[Value], more: &[&str]) -> Vec<Value> {
        let file = lines(self.pair.root.path(), "p.jsonl", objects);
        run_pair(&self.pair, &[&["--json", "-q", "-n", "8", "--prompts", &file], more].concat()).json()
    }

    /// The record of a text as it is.
    fn raw(&self, text: &str) -> Value {
        run_pair(&self.pair, &["--json", "-q", "-n", "8", "--raw", text]).json().remove(0)
    }

    fn assert_rendered(&self, object: Value, more: &[&str], rendered: &str) {
        let (got, expected) = (&self.records(&[object], more)[0], self.raw(rendered));
        let fields = ["prompt_tokens", "tokens"].map(|field| (&got[field], &expected[field]));
        assert!(fields.iter().all(|(got, expected)| got == expected), "{rendered}: {fields:?}");
    }
}

#[test]
fn a_line_has_settings_of_its_own() {
    let settings = [
        ("max_tokens", json!(5), vec!["-n", "5"]),
        ("temperature", json!(0.8), vec!["--temperature", "0.8"]),
        ("top_k", json!(4), vec!["--top-k", "4"]),
        ("top_p", json!(0.7), vec!["--top-p", "0.7"]),
        ("min_p", json!(0.2), vec!["--min-p", "0.2"]),
        ("seed", json!(77), vec!["--seed", "77"]),
        ("stop", json!(" "), vec!["--stop", " "]),
        ("stop", json!(["(", "\n"]), vec!["--stop", "(", "--stop", "\n"]),
    ];
    let run_flags = ["-n", "24", "--temperature", "1.5", "--seed", "3"];
    for (field, value, flags) in settings {
        let line = json!({"prompt": PROMPT, field: value, "id": {"n": 1}, "category": "code"});
        let got = records(&[line], &run_flags).remove(0);
        // The flag replaces that of the run.
        let other = run_flags.chunks(2).filter(|flag| flag[0] != flags[0]).flatten();
        let args = other.copied().chain(flags.iter().copied()).chain(["--json", "-q", PROMPT]);
        let expected = run(args).json().remove(0);
        for same in ["tokens", "text", "finish_reason", "seed", "stream"] {
            assert_eq!(got[same], expected[same], "{field}: {same}");
        }
        assert_eq!(
            (&got["id"], &got["category"], &got["turn"]),
            (&json!({"n": 1}), &json!("code"), &Value::Null)
        );
    }
}

#[test]
fn settings_of_a_line_end_with_it_and_its_seed_fixes_its_text() {
    let plain = json!({"prompt": PROMPT});
    let own = json!({"prompt": PROMPT, "temperature": 1.0, "seed": 7, "max_tokens": 9, "stop": null});
    let all = records(&[plain.clone(), own.clone(), plain.clone(), own], &["-n", "12", "--batch", "3"]);
    let alone = records(&[plain], &["-n", "12"]);
    for at in [0, 2] {
        assert_eq!(all[at]["tokens"], alone[0]["tokens"]);
    }
    assert_eq!(all[1]["tokens"], all[3]["tokens"]);
    let flagged = ["-n", "9", "--temperature", "1", "--seed", "7", "--json", "-q", PROMPT];
    assert_eq!(all[1]["tokens"], run(flagged).json()[0]["tokens"]);
}

#[test]
fn comparisons_obey_the_settings_of_a_line_and_name_it() {
    for flag in ["--compare", "--check-lossless"] {
        let line = json!({"prompt": PROMPT, "max_tokens": 6, "question_id": 81, "category": "code"});
        let all = &records(&[line], &[flag])[0];
        let row = &all["prompts"][0];
        assert_eq!((&row["tokens"], &row["id"], &row["category"]), (&json!(6), &json!(81), &json!("code")));
    }
}

const REFUSED: [(&str, &str); 32] = [
    (
        r#"{"prompt": "a", "top_q": 1}"#,
        "line 1: top_q is not a known field, expected prompt, id, question_id, task_id, tools, max_tokens, temperature, top_k, top_p, min_p, seed, stop, category",
    ),
    (
        r#"{"prompt": "a", "temperature": -1}"#,
        "line 1: temperature is -1, expected 0 (greedy) or 0.0001 to 10000",
    ),
    (r#"{"prompt": "a", "temperature": "1"}"#, "line 1: temperature is \"1\", expected a number"),
    (r#"{"prompt": "a", "top_p": 0}"#, "line 1: top_p is 0, expected more than 0 and at most 1"),
    (
        r#"{"prompt": "a", "top_k": -1}"#,
        "line 1: top_k is -1, expected a whole number from 0 to 18446744073709551615",
    ),
    (r#"{"prompt": "a", "min_p": 1}"#, "line 1: min_p is 1, expected at least 0 and less than 1"),
    (
        r#"{"prompt": "a", "max_tokens": 1.5}"#,
        "line 1: max_tokens is 1.5, expected a whole number from 0 to 18446744073709551615",
    ),
    (
        r#"{"prompt": "a", "seed": true}"#,
        "line 1: seed is true, expected a whole number from 0 to 18446744073709551615",
    ),
    (
        r#"{"prompt": "a", "stop": ["b", ""]}"#,
        "line 1: stop is [\"b\",\"\"], expected texts of at least one character",
    ),
    (r#"{"prompt": "a", "stop": 3}"#, "line 1: stop is 3, expected a list"),
    (r#"{"prompt": "a", "tools": {}}"#, "line 1: tools is {}, expected a list"),
    (
        r#"{"prompt": "a", "id": 1, "question_id": 2}"#,
        "line 1 has both id and question_id: expected {\"prompt\": TEXT}, {\"messages\": [...]}, {\"prompt_tokens\": [...]} or {\"turns\": [...]}",
    ),
    (
        r#"{"prompt": "a", "prompt": "b"}"#,
        "line 1: duplicate field `prompt` at column 30: expected {\"prompt\": TEXT}, {\"messages\": [...]}, {\"prompt_tokens\": [...]} or {\"turns\": [...]}",
    ),
    (
        r#"["a"]"#,
        "invalid type: string \"a\", expected an object at line 1 column 4: expected {\"prompt\": TEXT}, {\"messages\": [...]}, {\"prompt_tokens\": [...]} or {\"turns\": [...]}",
    ),
    (
        r#"[["a"]]"#,
        "invalid type: sequence, expected an object at line 1 column 1: expected {\"prompt\": TEXT}, {\"messages\": [...]}, {\"prompt_tokens\": [...]} or {\"turns\": [...]}",
    ),
    (
        r#""a""#,
        "line 1: invalid type: string \"a\", expected an object at column 3: expected {\"prompt\": TEXT}, {\"messages\": [...]}, {\"prompt_tokens\": [...]} or {\"turns\": [...]}",
    ),
    ("[]", "has no prompts"),
    (r#"{"messages": {}}"#, "line 1: messages is {}, expected a list"),
    (r#"{"messages": []}"#, "line 1: messages is [], expected at least one message to answer"),
    (
        r#"{"conversations": [{"from": "gpt", "value": "a"}]}"#,
        "line 1: conversations is [{\"from\":\"gpt\",\"value\":\"a\"}], expected at least one message to answer",
    ),
    (r#"{"messages": [["user", "a"]]}"#, "line 1: messages[0] is [\"user\",\"a\"], expected an object"),
    (r#"{"messages": [{"content": "a"}]}"#, "line 1: messages[0].role is absent"),
    (r#"{"messages": [{"role": "user"}]}"#, "line 1: messages[0].content is absent"),
    (
        r#"{"messages": [{"role": "user", "content": 3}]}"#,
        "line 1: messages[0].content is 3, expected a text or a list of text parts",
    ),
    (
        r#"{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}"#,
        "line 1: messages[0].content[0].type is \"image_url\", expected \"text\": this engine reads no other content",
    ),
    (
        r#"{"messages": [{"role": "user", "content": "a", "weight": 1}]}"#,
        "line 1: messages[0].weight is not a known field, expected role, content, tool_calls, name, tool_call_id, reasoning_content, thinking, reasoning",
    ),
    (
        r#"{"prompt_tokens": [5, -1]}"#,
        "line 1: prompt_tokens[1] is -1, expected a whole number from 0 to 4294967295",
    ),
    (
        r#"{"prompt_tokens": [5, 2048]}"#,
        "line 1 holds token id 2048, expected ids from 0 to 2047, which the target has",
    ),
    (r#"{"prompt_tokens": []}"#, "line 1 gives no tokens, expected at least one"),
    (r#"{"turns": []}"#, "line 1: turns is [], expected at least one turn"),
    (r#"{"turns": ["a", {}]}"#, "line 1: turns[1] is {}, expected a text"),
    (
        r#"{"conversations": [{"from": "narrator", "value": "a"}]}"#,
        "line 1: conversations[0].from is \"narrator\", expected human, gpt, system or tool",
    ),
];

#[test]
fn what_a_line_cannot_hold_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = String::new();
    for (line, sentence) in REFUSED {
        let file = write(dir.path(), "p.jsonl", line);
        let got = run(["--prompts", &file, "-n", "1"]);
        let separator = if sentence.starts_with("line") || sentence.starts_with("has") { " " } else { ": " };
        let expected = format!("dflash-gen: {file}{separator}{sentence}\n");
        if (got.code, got.out.as_str(), got.err.as_str()) != (2, "", expected.as_str()) {
            wrong += &format!("{line}\n  expected {expected}  got {}: {}", got.code, got.err);
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
}

// ---- token ids ----

#[test]
fn a_target_without_a_tokenizer_runs_token_ids() {
    let pair = support::write_pair(&Default::default(), &Default::default());
    let ids = json!({"prompt_tokens": [40, 41, 42], "id": "x"});
    let file = lines(pair.root.path(), "p.jsonl", &[ids.clone(), json!({"prompt_tokens": [7]})]);
    let args = ["--prompts", &file, "-n", "6", "-q", "--ignore-eos"];
    let with = run_pair(&pair, &[&args[..], &["--json"]].concat()).json();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::remove_file(pair.target.join(name)).unwrap();
    }
    let without = run_pair(&pair, &[&args[..], &["--json"]].concat()).json();
    let mut text = String::new();
    for (with, without) in with.iter().zip(&without) {
        assert_eq!((&with["tokens"], &without["text"]), (&without["tokens"], &Value::Null));
        assert!(with["text"].is_string());
        let ids: Vec<String> = with["tokens"].as_array().unwrap().iter().map(Value::to_string).collect();
        text += &format!("{}\n", ids.join(" "));
    }
    assert_eq!(without[0]["prompt_tokens"], 3);
    assert_eq!(run_pair(&pair, &args).done(), text);
    let events = run_pair(&pair, &[&args[..], &["--stream-json"]].concat()).json();
    assert!(events.iter().all(|event| event["text"].is_null()), "{events:?}");
    for more in [&["--compare"][..], &["--check-lossless"], &["--batch", "2"]] {
        run_pair(&pair, &[&args[..], more].concat()).done();
    }

    let folder = pair.target.display();
    let missing = format!(
        "dflash-gen: {folder}/tokenizer.json is missing: expected the tokenizer in the target's folder, or prompts of token ids\n"
    );
    for more in [&["x"][..], &["--chat"]] {
        let got = run_pair(&pair, more);
        assert_eq!((got.code, got.err.as_str()), (3, missing.as_str()));
    }
    let got = run_pair(&pair, &[&args[..], &["--stop", "x"]].concat());
    let sentence = format!("dflash-gen: --stop needs a tokenizer, but {folder} has no tokenizer.json\n");
    assert_eq!((got.code, got.err), (2, sentence));
    let own = lines(pair.root.path(), "own.jsonl", &[json!({"prompt_tokens": [7], "stop": ["x"]})]);
    let got = run_pair(&pair, &["--prompts", &own]);
    let sentence = "stop needs a tokenizer, but";
    assert!(got.code == 2 && got.err.contains(&format!("{own} line 1: {sentence} {folder} has")), "{got:?}");
    let got = run_pair(&pair, &[&args[..], &["--system", "x"]].concat());
    let why = "which are used as they are, without a chat template";
    assert_eq!(
        (got.code, got.err),
        (2, format!("dflash-gen: --system is set, but {file} line 1 has token ids, {why}\n"))
    );
}

// ---- conversations ----

const ROLES: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>";

#[test]
fn turns_run_as_a_conversation() {
    let bytes = Bytes::new(ROLES);
    let user = |text: &str| json!({"role": "user", "content": text});
    let more = ["--temperature", "1", "--seed", "4"];
    let line = json!({"question_id": 81, "category": "writing", "turns": ["One?", "Two?", "Three?"], "reference": []});
    let found = bytes.records(&[line.clone(), json!({"prompt": "Last"})], &more);
    let mut messages = vec![];
    for (at, turn) in ["One?", "Two?", "Three?"].into_iter().enumerate() {
        messages.push(user(turn));
        let alone = bytes.records(&[json!({"messages": messages})], &more).remove(0);
        let record = &found[at];
        assert_eq!((&record["turn"], &record["id"]), (&json!(at + 1), &json!(81)));
        for field in ["tokens", "text", "prompt_tokens"] {
            assert_eq!(record[field], alone[field], "turn {at}: {field}");
        }
        messages.push(json!({"role": "assistant", "content": record["text"]}));
    }
    assert_eq!((found.len(), &found[3]["turn"], &found[3]["stream"]), (4, &Value::Null, &json!(1)));

    // One turn is a prompt, and comparisons go on with the same answers.
    let one = bytes.records(&[json!({"turns": ["Last"]})], &[]).remove(0);
    assert_eq!(one["tokens"], bytes.records(&[json!({"prompt": "Last"})], &[])[0]["tokens"]);
    for flag in ["--compare", "--check-lossless"] {
        let all = bytes.records(std::slice::from_ref(&line), &[flag]).remove(0);
        let turns: Vec<&Value> = all["prompts"].as_array().unwrap().iter().map(|row| &row["turn"]).collect();
        assert_eq!(turns, [1, 2, 3], "{flag}");
    }
    let file = lines(bytes.pair.root.path(), "t.jsonl", &[line]);
    let got = run_pair(&bytes.pair, &["--prompts", &file, "--batch", "2"]);
    let sentence = format!("{file} line 1 has turns, which run one after another: expected 1");
    assert_eq!(
        (got.code, got.err.lines().last().unwrap()),
        (2, &*format!("dflash-gen: --batch is 2, but {sentence}"))
    );
    let got = run_pair(&bytes.pair, &["--prompts", &file, "-n", "2"]);
    let notes: Vec<&str> = got.err.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!((got.code, notes), (0, vec![&*format!("{file}:"), "1.1:", "1.2:", "1.3:", "all:"]));
}

#[test]
fn openai_histories_reach_the_template() {
    let bytes = Bytes::new(
        "{% for m in messages %}<{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}>\
         {% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}\
         {% if m.thinking %}({{ m.thinking }}){% endif %}\
         {{ m.content | default('absent') }}{{ 'empty' if m.tool_calls == [] }}\
         {% for c in m.tool_calls %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]{% endfor %}{% endfor %}",
    );
    let call =
        json!({"id": "c1", "type": "function", "function": {"name": "sum", "arguments": "{\"a\": 1}"}});
    let messages = json!([
        {"role": "developer", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
        {"role": "user", "content": "add", "name": "ann"},
        {"role": "assistant", "content": null, "tool_calls": [call], "reasoning_content": "hm", "refusal": null,
         "annotations": [], "function_call": null},
        {"role": "assistant", "content": "b", "tool_calls": [], "reasoning": "so", "thinking": "ah"},
        {"role": "tool", "tool_call_id": "c1", "name": "sum", "content": "1"},
        {"role": "assistant", "tool_calls": [call], "content": ""},
    ]);
    let rendered = "<developer>A\nB<user ann>add<assistant>(hm)(hm)absent[sum {\"a\": 1}]\
                    <assistant>(ah)(ah)bempty<tool sum>1<assistant>[sum {\"a\": 1}]";
    bytes.assert_rendered(json!({"messages": messages}), &[], rendered);
    let message = Message::from_json("m", &messages[1]).unwrap();
    assert_eq!((message.role(), json!(message)), ("user", messages[1].clone()));
}

#[test]
fn tools_of_a_line_reach_the_template() {
    let bytes = Bytes::new("{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}");
    let tools = json!([{"type": "function", "function": {"name": "sum", "parameters": {}}}]);
    // As Python's json.dumps writes it.
    let rendered = r#"[{"type": "function", "function": {"name": "sum", "parameters": {}}}]a"#;
    bytes.assert_rendered(json!({"prompt": "a", "tools": tools}), &[], rendered);
    bytes.assert_rendered(json!({"prompt": "a", "tools": []}), &[], "a");
    bytes.assert_rendered(json!({"prompt": "a", "tools": null}), &[], "a");
}

#[test]
fn data_sets_load_by_the_key_of_their_prompt() {
    let bytes = Bytes::new(ROLES);
    let sharegpt = json!([
        {"from": "system", "value": "S"}, {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"},
        {"from": "human", "value": "c"}, {"from": "gpt", "value": "the answer"},
    ]);
    let rendered = "<system>S<user>a<assistant>b<user>c<assistant>";
    bytes.assert_rendered(json!({"id": "x_0", "conversations": sharegpt}), &[], rendered);
    // The system message and the tools beside a conversation.
    let beside = json!({"conversations": sharegpt.as_array().unwrap()[1..], "system": "S", "tools": ""});
    bytes.assert_rendered(beside, &[], rendered);
    for (key, value, rendered) in [
        ("conversations", sharegpt.clone(), rendered),
        ("question", json!("a?"), "<user>a?<assistant>"),
        ("text", json!(["a"]), "<user>a<assistant>"),
        ("dialog", json!([{"role": "user", "content": "a"}]), "<user>a<assistant>"),
        ("ids", json!([2, 3]), " !"),
    ] {
        bytes.assert_rendered(json!({"answer": "4", key: value}), &["--prompt-key", key], rendered);
    }
    // A file may be one list. Fields that are not used are named once.
    let mut list = json!([{"question": "a", "answer": 1}, {"question": "b", "answer": 2, "level": 3}]);
    for i in 0..30 {
        list[1][format!("x{i}")] = i.into();
    }
    let file = write(bytes.pair.root.path(), "list.json", format!("{list:#}"));
    let got = run_pair(&bytes.pair, &["--prompts", &file, "--prompt-key", "question", "-n", "1"]);
    let more: String = (0..18).map(|i| format!("x{i}, ")).collect();
    let note = format!("{file}: these fields are not used: answer, level, {more}...");
    assert_eq!(got.err.lines().filter(|line| **line == note).count(), 1, "{}", got.err);
    let got = run_pair(&bytes.pair, &["--prompts", &file, "--prompt-key", "q"]);
    let sentence = format!("dflash-gen: --prompt-key is \"q\", which {file} item 1 does not have\n");
    assert_eq!((got.code, got.err), (2, sentence));
}

#[test]
fn an_empty_system_message_is_none() {
    let bytes = Bytes::new(ROLES);
    let line = json!({"prompt": "a"});
    bytes.assert_rendered(line.clone(), &["--system", ""], "<user>a<assistant>");
    bytes.assert_rendered(line.clone(), &["--system", " "], "<user>a<assistant>");
    bytes.assert_rendered(line, &["--system", "S"], "<system>S<user>a<assistant>");
    // One in a conversation stays: it replaces the default of a template.
    let own = json!({"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "a"}]});
    bytes.assert_rendered(own, &["--system", ""], "<system><user>a<assistant>");
    let chat = |args: &[&str], input: &str| {
        let flags = flags(&bytes.pair);
        let args: Vec<&str> = flags.iter().map(String::as_str).chain(args.iter().copied()).collect();
        with_stdin(&[&args[..], &["--chat", "-n", "8"]].concat(), input.as_bytes()).done()
    };
    assert_eq!(chat(&["--system", ""], "a\n"), chat(&["--system", "S"], "/system\na\n"));
}

// ---- stdin and byte order marks ----

#[test]
fn a_dash_is_stdin() {
    let line = format!("{}\n", json!({"prompt": PROMPT}));
    let expected = run([PROMPT, "-n", "8", "-q"]).done();
    assert_eq!(with_stdin(&["-f", "-", "-n", "8", "-q"], PROMPT.as_bytes()).done(), expected);
    assert_eq!(with_stdin(&["--prompts", "-", "-n", "8", "-q"], line.as_bytes()).done(), expected);
    let wrong = with_stdin(&["--prompts", "-"], b"{}");
    assert_eq!(
        (wrong.code, wrong.err.starts_with("dflash-gen: stdin line 1 has neither")),
        (2, true),
        "{wrong:?}"
    );
}

#[test]
fn byte_order_marks_are_dropped_everywhere() {
    let marked = |text: &str| format!("\u{feff}{text}").into_bytes();
    let expected = run([PROMPT, "-n", "8", "-q"]).done();
    assert_eq!(with_stdin(&["-n", "8", "-q"], &marked(PROMPT)).done(), expected);
    let chat = |input: &[u8]| with_stdin(&["--chat", "-n", "8"], input).done();
    assert_eq!(chat(&marked(&format!("{PROMPT}\n"))), chat(format!("{PROMPT}\n").as_bytes()));
    let utf16: Vec<u8> = "\u{feff}a".encode_utf16().flat_map(u16::to_le_bytes).collect();
    let got = with_stdin(&[], &utf16);
    assert_eq!((got.code, got.err.as_str()), (2, "dflash-gen: stdin is UTF-16, expected UTF-8\n"));
    let got = with_stdin(&[], b"\x1f\x8b\x08\0");
    assert_eq!(
        (got.code, got.err.as_str()),
        (2, "dflash-gen: stdin is compressed by gzip, expected UTF-8\n")
    );

    let pair = support::write_pair(&Default::default(), &Default::default());
    let answer = || run_pair(&pair, &["--raw", "hello", "-n", "8", "-q"]).done();
    let expected = answer();
    for dir in [&pair.target, &pair.drafter] {
        for file in fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if file.extension().is_some_and(|ending| ending == "json") {
                fs::write(&file, marked(&fs::read_to_string(&file).unwrap())).unwrap();
            }
        }
    }
    assert_eq!(answer(), expected);
}

// ---- files that are something else ----

#[test]
fn json_files_that_are_something_else_are_described() {
    let pair = support::write_pair(&support::Target { shards: 2, ..Default::default() }, &Default::default());
    let kinds: [(&[u8], &str); 8] = [
        (b"", "is empty, expected JSON"),
        (b"\xef\xbb\xbf \n", "is empty, expected JSON"),
        (b"<!DOCTYPE html>\n<html></html>", "is an HTML or XML page, expected JSON"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 2\n",
            "is a Git LFS pointer, the file itself was not fetched, expected JSON",
        ),
        (b"\xff\xfe{\0}\0", "is UTF-16, expected JSON"),
        (b"\x1f\x8b\x08", "is compressed by gzip, expected JSON"),
        (b"[1, 2]", "is not a JSON object"),
        (b"{\"a\": [1, ", "is cut off: EOF while parsing a value at line 1 column 10"),
    ];
    let files = [
        pair.target.join("config.json"),
        pair.target.join("generation_config.json"),
        pair.target.join("model.safetensors.index.json"),
        pair.target.join("tokenizer.json"),
        pair.target.join("tokenizer_config.json"),
        pair.drafter.join("config.json"),
    ];
    let mut wrong = String::new();
    for file in files {
        let good = fs::read(&file).ok();
        for (bytes, what) in kinds {
            fs::write(&file, bytes).unwrap();
            let got = run_pair(&pair, &["x"]);
            let expected = format!("dflash-gen: {} {what}\n", file.display());
            if (got.code, &got.err) != (3, &expected) {
                wrong += &format!("expected {expected}got {}: {}", got.code, got.err);
            }
        }
        match good {
            Some(good) => fs::write(&file, good).unwrap(),
            None => fs::remove_file(&file).unwrap(),
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    let template = pair.target.join("chat_template.jinja");
    fs::write(&template, kinds[3].0).unwrap();
    let (got, what) = (run_pair(&pair, &["x"]), "is a Git LFS pointer, the file itself was not fetched");
    assert_eq!((got.code, got.err), (3, format!("dflash-gen: {} {what}\n", template.display())));
}

#[test]
fn files_of_prompts_that_are_something_else_are_described() {
    for (input, what) in [
        ("<html>", "stdin is an HTML or XML page, expected JSON lines"),
        (
            "version https://git-lfs.github.com/spec/v1\n",
            "stdin is a Git LFS pointer, the file itself was not fetched, expected JSON lines",
        ),
        (" \n\n", "stdin is empty, expected JSON lines"),
    ] {
        let Run { code, err, .. } = with_stdin(&["--prompts", "-"], input.as_bytes());
        assert_eq!((code, err), (2, format!("dflash-gen: {what}\n")));
    }
}

// ---- size ----

#[test]
fn a_text_that_cannot_fit_is_refused_before_it_is_tokenised() {
    let text = "x = 1\n".repeat(64 << 17);
    let got = with_stdin(&[], text.as_bytes());
    // The sentence of the check by bytes; after tokenising it would have the number of tokens.
    let sentence =
        "a text of 50331648 bytes has more tokens than the context, which holds 4096, the answer included";
    assert_eq!((got.code, got.err), (2, format!("dflash-gen: stdin: {sentence}\n")));
    let got = with_stdin(&["--chat"], text.replace('\n', " ").as_bytes());
    assert_eq!(got.code, 2);
    assert!(got.err.contains("has more tokens than the context"), "{}", got.err);
}
