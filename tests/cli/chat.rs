//! `dflash-gen --chat` through pipes: answers, commands, the cache between turns, errors and Ctrl-C.

use crate::support;
use crate::support::program;

#[cfg(target_os = "linux")]
use program::{Interactive, interrupt};
use program::{Run, flags, run, with_stdin, write};
use serde_json::{Value, json};
#[cfg(target_os = "linux")]
use std::io::{Read, Write};
#[cfg(target_os = "linux")]
use std::process::Stdio;
#[cfg(target_os = "linux")]
use std::time::Duration;

/// A random pair with one token per printable ASCII character, so that tokenizing the text of an answer gives
/// the generated tokens.
fn ascii_pair() -> support::Pair {
    support::write_pair(&support::Target { eos: vec![], ..Default::default() }, &Default::default())
}

/// The flags of a conversation, models included, and a folder for prompt files.
struct Fixture {
    flags: Vec<String>,
    dir: tempfile::TempDir,
}

impl Fixture {
    fn new(pair: Option<&support::Pair>, args: &[&str]) -> Fixture {
        let pair = pair.map_or(vec![], |pair| flags(pair).to_vec());
        let args = args.iter().map(|arg| arg.to_string());
        Fixture { flags: pair.into_iter().chain(args).collect(), dir: tempfile::tempdir().unwrap() }
    }

    /// The demo pair, with the template that `--chat` uses for it.
    fn demo(args: &[&str]) -> Fixture {
        let template = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/chat.jinja");
        Fixture::new(None, &[&["--chat-template", template], args].concat())
    }

    /// Runs `--chat` with this stdin. The line about drafts that are not accepted, as a random drafter's, is left out.
    fn chat(&self, input: &str) -> Run {
        let args: Vec<&str> = ["--chat"].into_iter().chain(self.flags.iter().map(String::as_str)).collect();
        let mut run = with_stdin(&args, input.as_bytes());
        let kept = run.err.split_inclusive('\n').filter(|line| !line.contains("drafts are not accepted"));
        run.err = kept.collect();
        run
    }

    /// The record of a new run without `--chat` whose prompt is this conversation.
    fn record(&self, messages: &[Value], more: &[&str]) -> Value {
        let file = write(self.dir.path(), "p.jsonl", json!({ "messages": messages }).to_string());
        let args = self.flags.iter().map(String::as_str).chain(["--json", "--prompts", &file]);
        run(args.chain(more.iter().copied())).json().remove(0)
    }

    /// The stdout of a conversation with these messages from the user, where each answer comes from a new run
    /// of the conversation before it.
    fn answers(&self, messages: &[&str], more: &[&str]) -> String {
        let (mut conversation, mut out) = (vec![], String::new());
        for text in messages {
            conversation.push(json!({"role": "user", "content": text}));
            let record = self.record(&conversation, more);
            out += &line(answer_of(&record));
            conversation.push(json!({"role": "assistant", "content": answer_of(&record)}));
        }
        out
    }
}

fn answer_of(record: &Value) -> &str {
    record["text"].as_str().unwrap()
}

/// The text as `--chat` prints an answer: with a newline at the end.
fn line(text: &str) -> String {
    format!("{text}{}", if text.ends_with('\n') { "" } else { "\n" })
}

/// The number before `word` in the last line that contains it, from the output of `/stats`.
fn number_before(err: &str, word: &str) -> usize {
    let line = err.lines().rev().find(|line| line.contains(word)).expect(err);
    let before = line.split(word).next().unwrap().trim_end();
    before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap().parse().expect(line)
}

// ---- turns ----

#[test]
fn every_turn_equals_a_new_run_of_the_conversation() {
    let bytes = support::Target { vocab: 258, eos: vec![], max_positions: 1024, ..Default::default() };
    let bytes = support::write_pair(&bytes, &Default::default());
    let ascii = ascii_pair();
    let sampled = ["-n", "30", "--temperature", "0.9", "--top-p", "0.95", "--seed", "4"];
    let messages = ["def first(a, b):", "import os", "x ="];
    for pair in [None, Some(&bytes), Some(&ascii)] {
        for args in [&["-n", "30"][..], &sampled] {
            for block in [&[][..], &["--block", "1"]] {
                let args = [args, block].concat();
                let fixture = if pair.is_some() { Fixture::new(pair, &args) } else { Fixture::demo(&args) };
                let got = fixture.chat(&messages.join("\n"));
                assert_eq!((got.code, got.err.as_str()), (0, ""), "{args:?}");
                assert_eq!(got.out, fixture.answers(&messages, &[]), "{args:?}");
            }
        }
    }
}

#[test]
fn a_turn_prefills_only_new_tokens() {
    let pair = ascii_pair();
    for (block, seed) in [("1", "1"), ("8", "1"), ("8", "2")] {
        let args = ["-n", "20", "--block", block, "--temperature", "1", "--seed", seed, "--ignore-eos"];
        let fixture = Fixture::new(Some(&pair), &args);
        let err = fixture.chat("hello\n/stats\nand you?\n/stats\n").err;
        let [first, all, second, _]: [&str; 4] = err.lines().collect::<Vec<_>>().try_into().unwrap();
        assert!(first.starts_with("last answer: 20 tokens in ") && !first.contains("kept"), "{err}");
        assert!(all.starts_with("in all: 20 tokens in "), "{err}");
        // "user: hello assistant: ", the answer, and " user: and you? assistant: "
        let prompt = "user: hello assistant: ".len();
        assert_eq!(number_before(first, " tokens, "), prompt);
        let record = fixture.record(&[json!({"role": "user", "content": "hello"})], &[]);
        let answer = answer_of(&record).len();
        assert_eq!(number_before(second, " tokens, "), prompt + answer + " user: and you? assistant: ".len());
        // Special tokens have no text, so the next prompt differs from the cache at the first one.
        let ids = record["tokens"].as_array().unwrap();
        let same = ids.iter().position(|id| id.as_u64().unwrap() < 2).unwrap_or(ids.len() - 1);
        let kept = number_before(second, " kept, ");
        assert!(kept == prompt + same || kept == prompt + same + 1, "{same} tokens of the answer: {err}");
        assert_eq!(number_before(&err, " of 256 positions in use"), number_before(second, " tokens, ") + 20);
    }
}

#[test]
fn device_conversations_reuse_the_cache_at_any_draft_setting() {
    let fixture = Fixture::demo(&["-n", "9", "--temperature", "0.7", "--seed", "2", "--device", "cuda"]);
    let got = fixture.chat("def read(name):\nimport os\n/stats\nx = 3\n");
    assert_eq!((got.code, got.out.lines().count() >= 3), (0, true), "{got:?}");
    let (kept, prompt) = (number_before(&got.err, " kept, "), number_before(&got.err, " tokens, "));
    assert!(kept + 12 > prompt && kept < prompt, "{}", got.err);
    for other in [
        "/draft off\ndef read(name):\nimport os\nx = 3\n",
        "def read(name):\n/draft off\nimport os\n/set block 5\n/draft on\nx = 3\n",
    ] {
        assert_eq!(fixture.chat(other).out, got.out, "{other:?}");
    }
}

#[test]
fn device_conversations_accept_every_block_size() {
    let fixture = |block: &str| Fixture::demo(&["-n", "6", "-q", "--device", "cuda", "--block", block]);
    let expected = fixture("16").chat("def f(x):\ndef g(x):\n").done();
    for block in ["1", "4"] {
        let run = fixture(block).chat("def f(x):\n/set block 16\ndef g(x):\n");
        assert_eq!((run.code, run.out.as_str()), (0, expected.as_str()), "from {block}: {}", run.err);
    }
}

#[test]
fn a_conversation_has_8192_positions_on_a_device() {
    let target = support::Target { heads: 1, kv_heads: 1, head_dim: 64, ..Default::default() };
    let target = support::Target { hidden: 64, intermediate: 32, max_positions: 20_000, ..target };
    let drafter = support::Drafter { heads: 1, kv_heads: 1, head_dim: 64, ..Default::default() };
    let pair = support::write_pair(&target, &support::Drafter { intermediate: 32, ..drafter });
    for (device, positions) in [("cpu", 20_000), ("cuda", 8192)] {
        let fixture = Fixture::new(Some(&pair), &["-n", "2", "--device", device]);
        let err = fixture.chat("a\n/stats\n").err;
        assert!(err.ends_with(&format!(" of {positions} positions in use\n")), "{device}: {err}");
    }
}

#[test]
fn each_line_is_a_message() {
    let pair = ascii_pair();
    let fixture = Fixture::new(Some(&pair), &["-n", "8"]);
    let expected = fixture.answers(&["one", "two"], &[]);
    for input in ["one\ntwo\n", "one\r\ntwo\r\n", "\n\none\n  \ntwo", "one\ntwo\n/exit\nthree\n"] {
        assert_eq!(fixture.chat(input).done(), expected, "{input:?}");
    }
    assert_eq!(fixture.chat("").done(), "");
    let many = Fixture::demo(&["-n", "8"]);
    for (input, message) in [
        ("class A:\\\n    def f(self):\\\n\n", "class A:\n    def f(self):\n"),
        ("class A:\\\r\n    def f(self):\r\n", "class A:\n    def f(self):"),
        ("class A:\\\n    def f(self):\\\n", "class A:\n    def f(self):"),
        ("class A:\\", "class A:"),
    ] {
        assert_eq!(many.chat(input).done(), many.answers(&[message], &[]), "{input:?}");
    }
    assert_eq!(many.chat("//usr/bin/env\n").done(), many.answers(&["/usr/bin/env"], &[]));
}

// ---- commands ----

#[test]
fn clear_and_system_change_the_prompt() {
    let pair = ascii_pair();
    let fixture = Fixture::new(Some(&pair), &["-n", "10"]);
    let system = |text: &str| json!({"role": "system", "content": text});
    let user = json!({"role": "user", "content": "hello"});
    let no_system = line(answer_of(&fixture.record(std::slice::from_ref(&user), &[])));
    let kind = line(answer_of(&fixture.record(&[system("Be kind."), user.clone()], &[])));
    let brief = line(answer_of(&fixture.record(&[system("Be brief."), user], &[])));
    assert!(no_system != kind && kind != brief);
    let input = "hello\n/clear\nhello\n/system Be kind.\n/clear\nhello\n/clear\n/system  Be brief. \nhello\n\
                 /system\n/clear\nhello\n";
    let expected = [&no_system, &no_system, &kind, &brief, &no_system].map(String::as_str).concat();
    let got = fixture.chat(input);
    assert_eq!((got.code, got.out, got.err.as_str()), (0, expected, ""));

    // --system is the first system message. Changing it continues the conversation.
    let flagged = Fixture::new(Some(&pair), &["-n", "10", "--system", "Be kind."]);
    assert_eq!(flagged.chat("hello\n").done(), kind);
    let two = flagged.chat("hello\n/system Be brief.\nhello\n").done();
    let answer = json!({"role": "assistant", "content": kind.trim_end_matches('\n')});
    let hello = json!({"role": "user", "content": "hello"});
    let second = fixture.record(&[system("Be brief."), hello.clone(), answer, hello], &[]);
    assert_eq!(two, kind + &line(answer_of(&second)));
}

#[test]
fn set_has_the_effect_of_the_flag() {
    let hot = ["-n", "40", "--temperature", "1.5", "--seed", "1"];
    let fixture = Fixture::demo(&hot);
    let messages = ["import os\n"];
    let usual = fixture.answers(&messages, &[]);
    for (name, value) in [
        ("temperature", "0"),
        ("temperature", "0.4"),
        ("top-p", "0.5"),
        ("top-k", "3"),
        ("min-p", "0.3"),
        ("seed", "7"),
        ("max-tokens", "9"),
    ] {
        // A flag given twice is refused, so the fixture's own is removed.
        let at =
            hot.iter().position(|arg| *arg == format!("--{name}") || name == "max-tokens" && *arg == "-n");
        let mut flags = hot.to_vec();
        at.map(|at| flags.drain(at..at + 2).count());
        let flag = format!("--{name}");
        let expected = Fixture::demo(&[&flags[..], &[&flag, value]].concat()).answers(&messages, &[]);
        let got = fixture.chat(&format!("/set {name}   {value} \nimport os\\\n\n"));
        assert_eq!((got.code, got.out, got.err.as_str()), (0, expected.clone(), ""), "/set {name} {value}");
        assert_ne!(expected, usual, "/set {name} {value} has no effect");
    }
    let got = fixture.chat("/set block 3\n/set\nimport os\\\n\n/stats\n");
    assert_eq!(got.out, usual);
    let settings = "temperature 1.5, top-p 1, top-k 0, min-p 0, seed 1, max-tokens 40, block 3";
    assert_eq!(got.err.lines().next(), Some(settings));
    let bars = got.err.split_once("[1").and_then(|(_, rest)| rest.split_once("3]")).expect(&got.err).0;
    assert_eq!(bars.chars().count(), 3);
}

#[test]
fn switching_drafts_does_not_change_the_text() {
    let fixture = Fixture::demo(&["-n", "40"]);
    let messages = ["def f(x):", "def g(x):", "def h(x):", "def i(x):"];
    let expected = fixture.answers(&messages, &[]);
    let input = "def f(x):\n/draft off\ndef g(x):\n/stats\ndef h(x):\n/draft on\ndef i(x):\n/stats\n";
    let got = fixture.chat(input);
    assert_eq!((got.code, got.out), (0, expected));
    let lines: Vec<&str> = got.err.lines().collect();
    assert_eq!(lines.len(), 4, "{}", got.err);
    assert!(lines[0].contains(" 39 rounds, cut") && !lines[0].contains("acceptance length"), "{}", lines[0]);
    assert!(
        [lines[1], lines[2], lines[3]].iter().all(|line| line.contains("acceptance length")),
        "{}",
        got.err
    );
}

#[test]
fn help_lists_every_command() {
    let fixture = Fixture::demo(&[]);
    let got = fixture.chat("/help\n");
    assert_eq!((got.code, got.out.as_str()), (0, ""));
    for command in ["/help", "/exit", "/clear", "/system", "/set", "/stats", "/draft"] {
        assert!(got.err.lines().any(|line| line.starts_with(command)), "{}", got.err);
    }
    assert_eq!(fixture.chat("/stats\n").err, "no answer yet\n");
}

/// Lines of `input | error message`.
const INVALID: &str = r#"
/ | there is no command /: /help lists them
/quit | there is no command /quit: /help lists them
/Clear | there is no command /Clear: /help lists them
/clear all | /clear takes no value, found "all"
/exit now | /exit takes no value, found "now"
/draft | /draft is "", expected on or off
/draft maybe | /draft is "maybe", expected on or off
/set tau 4 | /set is "tau", expected temperature, top-p, top-k, min-p, seed, max-tokens, block
/set json | /set is "json", expected temperature, top-p, top-k, min-p, seed, max-tokens, block
/set temperature | invalid value '' for '--temperature <T>': expected a number
/set temperature hot | invalid value 'hot' for '--temperature <T>': expected a number
/set temperature -1 | --temperature is -1, expected 0 (greedy) or 0.0001 to 10000
/set top-p 2 | --top-p is 2, expected more than 0 and at most 1
/set top-k 3 4 | invalid value '3 4' for '--top-k <K>': expected a whole number from 0 to 18446744073709551615
/set min-p 1 | --min-p is 1, expected at least 0 and less than 1
/set seed -5 | invalid value '-5' for '--seed <N>': expected a whole number from 0 to 18446744073709551615
/set max-tokens 0 | --max-tokens is 0, which leaves --chat nothing to say
/set block 17 | --block is 17, expected 1 to 16, the block that config.json of the built-in demo drafter was trained with
"#;

#[test]
fn an_invalid_command_gives_one_error_line_and_no_effect() {
    let fixture = Fixture::demo(&["-n", "8", "--temperature", "0.9", "--seed", "2"]);
    let cases = INVALID.lines().filter_map(|line| line.split_once(" | "));
    let (input, sentences): (Vec<&str>, Vec<String>) =
        cases.map(|(input, sentence)| (input, format!("dflash-gen: {sentence}"))).unzip();
    let got = fixture.chat(&format!("/set\n{}\n/set\nimport os\n", input.join("\n")));
    let lines: Vec<&str> = got.err.lines().collect();
    assert_eq!(lines[1..lines.len() - 1], sentences);
    assert_eq!(lines[0], lines[lines.len() - 1]);
    assert_eq!((got.code, got.out), (0, fixture.answers(&["import os"], &[])));

    let no_drafter = Fixture::new(None, &["--draft", "none"]);
    let got = no_drafter.chat("/draft on\n/draft off\n/set block 2\n");
    let sentences = "dflash-gen: /draft on needs a drafter, but --draft is none\n\
                     dflash-gen: --block is 2 without a drafter, expected 1 (autoregressive decoding)\n";
    assert_eq!((got.code, got.err.as_str()), (0, sentences));
}

// ---- errors ----

#[test]
fn a_line_that_is_not_utf8_gives_one_error_line() {
    let expected = Fixture::demo(&["-n", "8"]).answers(&["import os"], &[]);
    let got = with_stdin(&["--chat", "-n", "8"], b"caf\xe9\nimport os\n");
    // A message that failed decides the exit code, though the conversation goes on.
    assert_eq!((got.code, got.out), (2, expected));
    assert_eq!(got.err, "dflash-gen: the message is not UTF-8: byte 3 is not part of a character\n");
}

#[test]
fn a_message_without_an_end_is_refused() {
    let got = with_stdin(&["--chat"], &vec![b'a'; (128 << 20) + 1]);
    let limit = "dflash-gen: the message has more than 134217728 bytes, expected at most that\n";
    assert_eq!((got.code, got.out.as_str(), got.err.as_str()), (2, "", limit));
}

#[test]
fn a_full_context_is_reported_and_can_be_cleared() {
    let pair = ascii_pair();
    let fixture = Fixture::new(Some(&pair), &["-n", "300"]);
    // "user: ", the message, " assistant: "
    let around = "user:  assistant: ".len();
    let fits = "a".repeat(256 - around - 30);
    let got = fixture
        .chat(&format!("{fits}\n/stats\nand?\n{fits}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n/clear\n{fits}\n"));
    let answer = fixture.answers(&[&fits], &[]);
    assert_eq!(got.out, answer.repeat(2));
    let full = "the context of 256 tokens is full and ends the answer; /clear begins a new conversation";
    let lines: Vec<&str> = got.err.lines().collect();
    assert_eq!((got.code, lines.len()), (2, 6), "{}", got.err);
    assert_eq!((lines[0], lines[5]), (full, full));
    assert!(lines[1].ends_with(", cut at the end of the context"), "{}", lines[1]);
    assert!(lines[2].ends_with("; 256 of 256 positions in use"), "{}", lines[2]);
    for line in [lines[3], lines[4]] {
        assert!(
            line.starts_with("dflash-gen: the context is full: with this message, which is dropped, "),
            "{line}"
        );
        assert!(
            line.ends_with("the context holds 256, the answer included; /clear begins a new one"),
            "{line}"
        );
    }
    // A dropped message is not part of the conversation, which continues with a shorter one.
    let fixture = Fixture::new(Some(&pair), &["-n", "5"]);
    let got = fixture.chat(&format!("hi\n{fits}{fits}\nhi\n"));
    assert_eq!(got.out, fixture.answers(&["hi", "hi"], &[]));
}

#[test]
fn a_message_that_the_template_refuses_is_dropped() {
    let pair = ascii_pair();
    let template = "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('not so') }}{% endif %}\
                    {{ m.content }}{% endfor %}";
    let file = write(pair.root.path(), "t.jinja", template);
    let fixture = Fixture::new(Some(&pair), &["-n", "8", "--chat-template", &file]);
    let got = fixture.chat("yes\nno\nyes\n");
    assert_eq!((got.code, got.out), (2, fixture.answers(&["yes", "yes"], &[])));
    assert_eq!(got.err, format!("dflash-gen: {file} refuses this conversation: not so\n"));
}

/// The caches grow with --max-tokens. If memory does not suffice, there is no answer, and the conversation
/// continues.
#[cfg(target_os = "linux")]
#[test]
fn out_of_memory_gives_one_error_line() {
    let target = support::Target { eos: vec![], max_positions: 16_000_000, ..Default::default() };
    let pair = support::write_pair(&target, &Default::default());
    let fixture = Fixture::new(Some(&pair), &["-n", "8"]);
    let args =
        ["-c", "ulimit -v 3145728 && exec \"$0\" \"$@\"", program::BINARY, "--chat", "--device", "cpu"]
            .map(String::from);
    let mut sh = std::process::Command::new("sh");
    sh.args(args).args(&fixture.flags).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = sh.spawn().unwrap();
    let lines = b"hi\n/set max-tokens 15000000\nall\n/set max-tokens 8\nhi\n";
    child.stdin.take().unwrap().write_all(lines).unwrap();
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(err.starts_with("dflash-gen: not enough memory: the KV cache of each layer needs "), "{err}");
    assert_eq!((output.status.code(), err.lines().count()), (Some(5), 1));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), fixture.answers(&["hi", "hi"], &[]));
}

#[test]
fn a_target_without_a_template_is_refused_by_name() {
    let pair = ascii_pair();
    support::edit_json(&pair.target, "tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().shift_remove("chat_template");
    });
    let got = Fixture::new(Some(&pair), &[]).chat("hello\n");
    let sentence = format!(
        "dflash-gen: --chat-template is absent and {} has none, but --chat needs one\n",
        pair.target.display()
    );
    assert_eq!((got.code, got.out.as_str(), got.err), (2, "", sentence));
}

#[test]
fn a_damaged_model_ends_the_conversation() {
    let pair = ascii_pair();
    let mut tensors = support::target_tensors(&support::Target { eos: vec![], ..Default::default() });
    tensors.last_mut().unwrap().values[3] = f32::NAN;
    support::write_tensors(&pair.target, &tensors, dflash::checkpoint::safetensors::Dtype::Bf16, 1);
    let got = Fixture::new(Some(&pair), &[]).chat("hello\nhello\n");
    assert_eq!((got.code, got.out.as_str(), got.err.lines().count()), (3, "", 1), "{got:?}");
}

#[test]
fn the_demo_pair_has_a_built_in_template() {
    let got = with_stdin(&["--chat", "-n", "20"], b"def f(x):\nimport os\n");
    let expected = Fixture::demo(&["-n", "20"]).answers(&["def f(x):", "import os"], &[]);
    assert_eq!((got.code, got.out, got.err.as_str()), (0, expected, ""));
}

// ---- Ctrl-C ----

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_ends_the_answer_and_keeps_its_text() {
    let mut conversation = Interactive::new(["--chat", "-n", "3000", "--ignore-eos"]);
    conversation.send("def main(");
    let mut out = vec![0; 40];
    conversation.out.read_exact(&mut out).unwrap();
    interrupt(&conversation.child);
    conversation.send("/stats");
    let line = conversation.stderr_line();
    assert!(line.ends_with(", interrupted\n"), "{line}");
    let tokens = number_before(&line, " tokens in ");
    assert!(tokens < 3000, "{line}");
    conversation.stderr_line();
    conversation.send("/set max-tokens 10");
    conversation.send("import os");
    conversation.send("/stats");
    let line = conversation.stderr_line();
    let kept = number_before(&line, " kept, ");
    assert!(kept > tokens / 2, "{kept} kept of an answer of {tokens} tokens");
    assert_eq!(conversation.close_stdin(), Some(0));
    conversation.out.read_to_end(&mut out).unwrap();
    // The same answers come from runs that are limited to this number of tokens.
    let fixture = Fixture::demo(&["--ignore-eos"]);
    let user = |text: &str| json!({"role": "user", "content": text});
    let first = fixture.record(&[user("def main(")], &["-n", &tokens.to_string()]);
    let answer = json!({"role": "assistant", "content": answer_of(&first)});
    let second = fixture.record(&[user("def main("), answer, user("import os")], &["-n", "10"]);
    let expected = answer_line(&first) + &answer_line(&second);
    assert_eq!(String::from_utf8(out).unwrap(), expected);
}

#[cfg(target_os = "linux")]
fn answer_line(record: &Value) -> String {
    line(answer_of(record))
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_twice_ends_the_program() {
    let mut conversation = Interactive::new(["--chat", "-n", "3000", "--ignore-eos"]);
    conversation.send("def main(");
    conversation.out.read_exact(&mut [0; 40]).unwrap();
    interrupt(&conversation.child);
    interrupt(&conversation.child);
    // Two pending signals of one kind are delivered once, so the second may have been lost.
    std::thread::sleep(Duration::from_millis(300));
    interrupt(&conversation.child);
    assert_eq!(conversation.exit_code(), Some(130));
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_between_answers_ends_the_program() {
    for line in ["/set", "/help", "import os"] {
        let mut conversation = Interactive::new(["--chat", "-n", "5"]);
        conversation.send(line);
        conversation.send("/stats");
        while !conversation.stderr_line().starts_with(if line == "import os" {
            "in all"
        } else {
            "no answer"
        }) {}
        // The program prints this line just before it waits for input.
        std::thread::sleep(Duration::from_millis(300));
        interrupt(&conversation.child);
        assert_eq!(conversation.exit_code(), Some(130), "after {line:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_before_the_answer_drops_the_message() {
    let target = support::Target { eos: vec![], max_positions: 1 << 17, ..Default::default() };
    let drafter = support::Drafter { max_positions: 1 << 17, ..Default::default() };
    let pair = support::write_pair(&target, &drafter);
    let mut conversation =
        Interactive::new(flags(&pair).iter().map(String::as_str).chain(["--chat", "-n", "8"]));
    // The prefill of this prompt takes half a minute.
    conversation.send(&"long ".repeat(20_000));
    std::thread::sleep(Duration::from_millis(300));
    interrupt(&conversation.child);
    assert_eq!(conversation.stderr_line(), "interrupted before the answer began: the message is dropped\n");
    conversation.send("hello");
    assert_eq!(conversation.close_stdin(), Some(0));
    let mut out = String::new();
    conversation.out.read_to_string(&mut out).unwrap();
    assert_eq!(out, Fixture::new(Some(&pair), &["-n", "8"]).answers(&["hello"], &[]));
}
