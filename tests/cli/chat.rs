//! `dflash-gen --chat` as a user at a pipe has it: answers, commands, what is kept between turns, Ctrl-C.

use crate::support;
use crate::support::program;

#[cfg(target_os = "linux")]
use program::{Live, interrupt};
use program::{Run, flags, run, with_stdin, write};
use serde_json::{Value, json};
#[cfg(target_os = "linux")]
use std::io::{Read, Write};
#[cfg(target_os = "linux")]
use std::process::Stdio;
#[cfg(target_os = "linux")]
use std::time::Duration;

/// A random pair, a token a character: printable ASCII only, so that what is said is tokenised as it was generated.
fn ascii_pair() -> support::Pair {
    support::write_pair(&support::Target { eos: vec![], ..Default::default() }, &Default::default())
}

/// A pair and the flags that its conversations run with.
struct Setting {
    flags: Vec<String>,
    dir: tempfile::TempDir,
}

impl Setting {
    fn new(pair: Option<&support::Pair>, args: &[&str]) -> Setting {
        let pair = pair.map_or(vec![], |pair| flags(pair).to_vec());
        let args = args.iter().map(|arg| arg.to_string());
        Setting { flags: pair.into_iter().chain(args).collect(), dir: tempfile::tempdir().unwrap() }
    }

    /// The demo pair, with the template that `--chat` gives it.
    fn demo(args: &[&str]) -> Setting {
        let template = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/chat.jinja");
        Setting::new(None, &[&["--chat-template", template], args].concat())
    }

    fn chat(&self, input: &str) -> Run {
        let args: Vec<&str> = ["--chat"].into_iter().chain(self.flags.iter().map(String::as_str)).collect();
        with_stdin(&args, input.as_bytes())
    }

    /// The record of a fresh run of the whole conversation.
    fn record(&self, messages: &[Value], more: &[&str]) -> Value {
        let file = write(self.dir.path(), "p.jsonl", json!({ "messages": messages }).to_string());
        let args = self.flags.iter().map(String::as_str).chain(["--json", "--prompts", &file]);
        run(args.chain(more.iter().copied())).json().remove(0)
    }

    /// What a conversation prints, each answer that of a fresh run of all before it.
    fn answers(&self, said: &[&str], more: &[&str]) -> String {
        let (mut messages, mut out) = (vec![], String::new());
        for text in said {
            messages.push(json!({"role": "user", "content": text}));
            let record = self.record(&messages, more);
            out += &line(text_of(&record));
            messages.push(json!({"role": "assistant", "content": text_of(&record)}));
        }
        out
    }
}

fn text_of(record: &Value) -> &str {
    record["text"].as_str().unwrap()
}

/// As answers are printed: on lines of their own.
fn line(text: &str) -> String {
    format!("{text}{}", if text.ends_with('\n') { "" } else { "\n" })
}

/// The number before `word`, of the last line of `/stats` that has it.
fn stat(err: &str, word: &str) -> usize {
    let line = err.lines().rev().find(|line| line.contains(word)).expect(err);
    let before = line.split(word).next().unwrap().trim_end();
    before.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap().parse().expect(line)
}

// ---- turns ----

#[test]
fn every_turn_is_answered_as_a_fresh_run_of_the_conversation() {
    let bytes = support::Target { vocab: 258, eos: vec![], max_positions: 1024, ..Default::default() };
    let bytes = support::write_pair(&bytes, &Default::default());
    let ascii = ascii_pair();
    let sampled = ["-n", "30", "--temperature", "0.9", "--top-p", "0.95", "--seed", "4"];
    let said = ["def first(a, b):", "import os", "x ="];
    for pair in [None, Some(&bytes), Some(&ascii)] {
        for args in [&["-n", "30"][..], &sampled] {
            for block in [&[][..], &["--block", "1"]] {
                let args = [args, block].concat();
                let setting = if pair.is_some() { Setting::new(pair, &args) } else { Setting::demo(&args) };
                let got = setting.chat(&said.join("\n"));
                assert_eq!((got.code, got.err.as_str()), (0, ""), "{args:?}");
                assert_eq!(got.out, setting.answers(&said, &[]), "{args:?}");
            }
        }
    }
}

#[test]
fn a_turn_runs_only_what_is_new() {
    let pair = ascii_pair();
    for (block, seed) in [("1", "1"), ("8", "1"), ("8", "2")] {
        let args = ["-n", "20", "--block", block, "--temperature", "1", "--seed", seed];
        let setting = Setting::new(Some(&pair), &args);
        let err = setting.chat("hello\n/stats\nand you?\n/stats\n").err;
        let [first, all, second, _]: [&str; 4] = err.lines().collect::<Vec<_>>().try_into().unwrap();
        assert!(first.starts_with("last answer: 20 tokens in ") && !first.contains("kept"), "{err}");
        assert!(all.starts_with("in all: 20 tokens in "), "{err}");
        // "user: hello assistant: ", the answer, and " user: and you? assistant: "
        let prompt = "user: hello assistant: ".len();
        assert_eq!(stat(first, " tokens, "), prompt);
        let record = setting.record(&[json!({"role": "user", "content": "hello"})], &[]);
        let answer = text_of(&record).len();
        assert_eq!(stat(second, " tokens, "), prompt + answer + " user: and you? assistant: ".len());
        // Special tokens have no text, and what stands in their place is new.
        let ids = record["tokens"].as_array().unwrap();
        let same = ids.iter().position(|id| id.as_u64().unwrap() < 2).unwrap_or(ids.len() - 1);
        let kept = stat(second, " kept, ");
        assert!(kept == prompt + same || kept == prompt + same + 1, "{same} tokens of the answer: {err}");
        assert_eq!(stat(&err, " of 256 positions in use"), stat(second, " tokens, ") + 20);
    }
}

/// Through the kernels.
#[test]
fn a_conversation_on_the_emulator_is_kept_and_is_the_same_with_and_without_drafts() {
    let setting = Setting::demo(&["-n", "9", "--temperature", "0.7", "--seed", "2", "--device", "emulator"]);
    let got = setting.chat("def read(name):\nimport os\n/stats\nx = 3\n");
    assert_eq!((got.code, got.out.lines().count() >= 3), (0, true), "{got:?}");
    let (kept, prompt) = (stat(&got.err, " kept, "), stat(&got.err, " tokens, "));
    assert!(kept + 12 > prompt && kept < prompt, "{}", got.err);
    for other in [
        "/draft off\ndef read(name):\nimport os\nx = 3\n",
        "def read(name):\n/draft off\nimport os\n/set block 5\n/draft on\nx = 3\n",
    ] {
        assert_eq!(setting.chat(other).out, got.out, "{other:?}");
    }
}

#[test]
fn a_conversation_on_the_emulator_takes_every_block_that_the_drafter_has() {
    let setting = |block: &str| Setting::demo(&["-n", "6", "-q", "--device", "emulator", "--block", block]);
    let expected = setting("16").chat("def f(x):\ndef g(x):\n").done();
    for block in ["1", "4"] {
        let run = setting(block).chat("def f(x):\n/set block 16\ndef g(x):\n");
        assert_eq!((run.code, run.out.as_str()), (0, expected.as_str()), "from {block}: {}", run.err);
    }
}

#[test]
fn a_conversation_has_all_positions_of_the_model_on_the_cpu_and_8192_on_a_device() {
    let target = support::Target { heads: 1, kv_heads: 1, head_dim: 64, ..Default::default() };
    let target = support::Target { hidden: 64, intermediate: 32, max_positions: 20_000, ..target };
    let drafter = support::Drafter { heads: 1, kv_heads: 1, head_dim: 64, ..Default::default() };
    let pair = support::write_pair(&target, &support::Drafter { intermediate: 32, ..drafter });
    for (device, positions) in [("cpu", 20_000), ("emulator", 8192)] {
        let setting = Setting::new(Some(&pair), &["-n", "2", "--device", device]);
        let err = setting.chat("a\n/stats\n").err;
        assert!(err.ends_with(&format!(" of {positions} positions in use\n")), "{device}: {err}");
    }
}

#[test]
fn lines_are_messages() {
    let pair = ascii_pair();
    let setting = Setting::new(Some(&pair), &["-n", "8"]);
    let expected = setting.answers(&["one", "two"], &[]);
    for input in ["one\ntwo\n", "one\r\ntwo\r\n", "\n\none\n  \ntwo", "one\ntwo\n/exit\nthree\n"] {
        assert_eq!(setting.chat(input).done(), expected, "{input:?}");
    }
    assert_eq!(setting.chat("").done(), "");
    let many = Setting::demo(&["-n", "8"]);
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
fn clear_and_system_change_what_the_model_sees() {
    let pair = ascii_pair();
    let setting = Setting::new(Some(&pair), &["-n", "10"]);
    let system = |text: &str| json!({"role": "system", "content": text});
    let user = json!({"role": "user", "content": "hello"});
    let plain = line(text_of(&setting.record(std::slice::from_ref(&user), &[])));
    let kind = line(text_of(&setting.record(&[system("Be kind."), user.clone()], &[])));
    let brief = line(text_of(&setting.record(&[system("Be brief."), user], &[])));
    assert!(plain != kind && kind != brief);
    let input = "hello\n/clear\nhello\n/system Be kind.\n/clear\nhello\n/clear\n/system  Be brief. \nhello\n\
                 /system\n/clear\nhello\n";
    let expected = [&plain, &plain, &kind, &brief, &plain].map(String::as_str).concat();
    let got = setting.chat(input);
    assert_eq!((got.code, got.out, got.err.as_str()), (0, expected, ""));

    // The flag is the first system message, and a conversation goes on when it changes.
    let flagged = Setting::new(Some(&pair), &["-n", "10", "--system", "Be kind."]);
    assert_eq!(flagged.chat("hello\n").done(), kind);
    let two = flagged.chat("hello\n/system Be brief.\nhello\n").done();
    let answer = json!({"role": "assistant", "content": kind.trim_end_matches('\n')});
    let hello = json!({"role": "user", "content": "hello"});
    let second = setting.record(&[system("Be brief."), hello.clone(), answer, hello], &[]);
    assert_eq!(two, kind + &line(text_of(&second)));
}

#[test]
fn set_does_what_the_flag_does() {
    let hot = ["-n", "40", "--temperature", "1.5", "--seed", "1"];
    let setting = Setting::demo(&hot);
    let said = ["import os\n"];
    let usual = setting.answers(&said, &[]);
    for (name, value) in [
        ("temperature", "0"),
        ("temperature", "0.4"),
        ("top-p", "0.5"),
        ("top-k", "3"),
        ("min-p", "0.3"),
        ("seed", "7"),
        ("max-tokens", "9"),
    ] {
        // Later flags of the same name would be refused, so without those of the setting.
        let at =
            hot.iter().position(|arg| *arg == format!("--{name}") || name == "max-tokens" && *arg == "-n");
        let mut flags = hot.to_vec();
        at.map(|at| flags.drain(at..at + 2).count());
        let flag = format!("--{name}");
        let expected = Setting::demo(&[&flags[..], &[&flag, value]].concat()).answers(&said, &[]);
        let got = setting.chat(&format!("/set {name}   {value} \nimport os\\\n\n"));
        assert_eq!((got.code, got.out, got.err.as_str()), (0, expected.clone(), ""), "/set {name} {value}");
        assert_ne!(expected, usual, "/set {name} {value} changes nothing");
    }
    let got = setting.chat("/set block 3\n/set\nimport os\\\n\n/stats\n");
    assert_eq!(got.out, usual);
    let settings = "temperature 1.5, top-p 1, top-k 0, min-p 0, seed 1, max-tokens 40, block 3";
    assert_eq!(got.err.lines().next(), Some(settings));
    let bars = got.err.split_once("[1").and_then(|(_, rest)| rest.split_once("3]")).expect(&got.err).0;
    assert_eq!(bars.chars().count(), 3);
}

#[test]
fn drafts_come_and_go_and_the_text_stays() {
    let setting = Setting::demo(&["-n", "40"]);
    let said = ["def f(x):", "def g(x):", "def h(x):", "def i(x):"];
    let expected = setting.answers(&said, &[]);
    let input = "def f(x):\n/draft off\ndef g(x):\n/stats\ndef h(x):\n/draft on\ndef i(x):\n/stats\n";
    let got = setting.chat(input);
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
    let setting = Setting::demo(&[]);
    let got = setting.chat("/help\n");
    assert_eq!((got.code, got.out.as_str()), (0, ""));
    for command in ["/help", "/exit", "/clear", "/system", "/set", "/stats", "/draft"] {
        assert!(got.err.lines().any(|line| line.starts_with(command)), "{}", got.err);
    }
    assert_eq!(setting.chat("/stats\n").err, "no answer yet\n");
}

/// Lines of `input | sentence`.
const WRONG: &str = r#"
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
fn a_wrong_command_is_one_sentence_and_changes_nothing() {
    let setting = Setting::demo(&["-n", "8", "--temperature", "0.9", "--seed", "2"]);
    let cases = WRONG.lines().filter_map(|line| line.split_once(" | "));
    let (input, sentences): (Vec<&str>, Vec<String>) =
        cases.map(|(input, sentence)| (input, format!("dflash-gen: {sentence}"))).unzip();
    let got = setting.chat(&format!("/set\n{}\n/set\nimport os\n", input.join("\n")));
    let lines: Vec<&str> = got.err.lines().collect();
    assert_eq!(lines[1..lines.len() - 1], sentences);
    assert_eq!(lines[0], lines[lines.len() - 1]);
    assert_eq!((got.code, got.out), (0, setting.answers(&["import os"], &[])));

    let plain = Setting::new(None, &["--draft", "none"]);
    let got = plain.chat("/draft on\n/draft off\n/set block 2\n");
    let sentences = "dflash-gen: /draft on needs a drafter, but --draft is none\n\
                     dflash-gen: --block is 2 without a drafter, expected 1 (autoregressive decoding)\n";
    assert_eq!((got.code, got.err.as_str()), (0, sentences));
}

// ---- what can go wrong ----

#[test]
fn a_line_that_is_not_utf8_is_one_sentence() {
    let expected = Setting::demo(&["-n", "8"]).answers(&["import os"], &[]);
    let got = with_stdin(&["--chat", "-n", "8"], b"caf\xe9\nimport os\n");
    assert_eq!((got.code, got.out), (0, expected));
    assert_eq!(got.err, "dflash-gen: the message is not UTF-8: byte 3 is not part of a character\n");
}

#[test]
fn a_full_context_is_said_and_cleared() {
    let pair = ascii_pair();
    let setting = Setting::new(Some(&pair), &["-n", "300"]);
    // "user: ", the message, " assistant: "
    let around = "user:  assistant: ".len();
    let fits = "a".repeat(256 - around - 30);
    let got = setting
        .chat(&format!("{fits}\n/stats\nand?\n{fits}aaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\n/clear\n{fits}\n"));
    let answer = setting.answers(&[&fits], &[]);
    assert_eq!(got.out, answer.repeat(2));
    let full = "the context of 256 tokens is full and ends the answer; /clear begins a new conversation";
    let lines: Vec<&str> = got.err.lines().collect();
    assert_eq!(lines.len(), 6, "{}", got.err);
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
    // What was dropped is not part of the conversation: a shorter message goes on from before.
    let setting = Setting::new(Some(&pair), &["-n", "5"]);
    let got = setting.chat(&format!("hi\n{fits}{fits}\nhi\n"));
    assert_eq!(got.out, setting.answers(&["hi", "hi"], &[]));
}

#[test]
fn a_conversation_that_the_template_refuses_goes_on_without_the_message() {
    let pair = ascii_pair();
    let template = "{% for m in messages %}{% if 'no' in m.content %}{{ raise_exception('not so') }}{% endif %}\
                    {{ m.content }}{% endfor %}";
    let file = write(pair.root.path(), "t.jinja", template);
    let setting = Setting::new(Some(&pair), &["-n", "8", "--chat-template", &file]);
    let got = setting.chat("yes\nno\nyes\n");
    assert_eq!((got.code, got.out), (0, setting.answers(&["yes", "yes"], &[])));
    assert_eq!(got.err, format!("dflash-gen: {file} refuses this conversation: not so\n"));
}

/// Caches grow with what is asked for; where there is no room the answer is not begun, and the next may be shorter.
#[cfg(target_os = "linux")]
#[test]
fn too_little_memory_is_one_sentence() {
    let target = support::Target { eos: vec![], max_positions: 16_000_000, ..Default::default() };
    let pair = support::write_pair(&target, &Default::default());
    let setting = Setting::new(Some(&pair), &["-n", "8"]);
    let args =
        ["-c", "ulimit -v 3145728 && exec \"$0\" \"$@\"", program::BINARY, "--chat", "--device", "cpu"]
            .map(String::from);
    let mut sh = std::process::Command::new("sh");
    sh.args(args).args(&setting.flags).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = sh.spawn().unwrap();
    let lines = b"hi\n/set max-tokens 15000000\nall\n/set max-tokens 8\nhi\n";
    child.stdin.take().unwrap().write_all(lines).unwrap();
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(err.starts_with("dflash-gen: not enough memory: the KV cache of each layer needs "), "{err}");
    assert_eq!((output.status.code(), err.lines().count()), (Some(0), 1));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), setting.answers(&["hi", "hi"], &[]));
}

#[test]
fn a_target_without_a_template_is_refused_by_name() {
    let pair = ascii_pair();
    support::edit_json(&pair.target, "tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().shift_remove("chat_template");
    });
    let got = Setting::new(Some(&pair), &[]).chat("hello\n");
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
    let got = Setting::new(Some(&pair), &[]).chat("hello\nhello\n");
    assert_eq!((got.code, got.out.as_str(), got.err.lines().count()), (3, "", 1), "{got:?}");
}

#[test]
fn the_demo_pair_needs_no_template_of_the_users() {
    let got = with_stdin(&["--chat", "-n", "20"], b"def f(x):\nimport os\n");
    let expected = Setting::demo(&["-n", "20"]).answers(&["def f(x):", "import os"], &[]);
    assert_eq!((got.code, got.out, got.err.as_str()), (0, expected, ""));
}

// ---- Ctrl-C ----

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_ends_the_answer_and_keeps_what_was_said() {
    let mut num_active = Live::new(["--chat", "-n", "3000", "--ignore-eos"]);
    num_active.say("def main(");
    let mut said = vec![0; 40];
    num_active.out.read_exact(&mut said).unwrap();
    interrupt(&num_active.child);
    num_active.say("/stats");
    let line = num_active.error_line();
    assert!(line.ends_with(", interrupted\n"), "{line}");
    let tokens = stat(&line, " tokens in ");
    assert!(tokens < 3000, "{line}");
    num_active.error_line();
    num_active.say("/set max-tokens 10");
    num_active.say("import os");
    num_active.say("/stats");
    let line = num_active.error_line();
    let kept = stat(&line, " kept, ");
    assert!(kept > tokens / 2, "{kept} kept of an answer of {tokens} tokens");
    assert_eq!(num_active.end(), Some(0));
    num_active.out.read_to_end(&mut said).unwrap();
    // The same, had it been asked for no more.
    let setting = Setting::demo(&["--ignore-eos"]);
    let user = |text: &str| json!({"role": "user", "content": text});
    let first = setting.record(&[user("def main(")], &["-n", &tokens.to_string()]);
    let answer = json!({"role": "assistant", "content": text_of(&first)});
    let second = setting.record(&[user("def main("), answer, user("import os")], &["-n", "10"]);
    let expected = line_of(&first) + &line_of(&second);
    assert_eq!(String::from_utf8(said).unwrap(), expected);
}

#[cfg(target_os = "linux")]
fn line_of(record: &Value) -> String {
    line(text_of(record))
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_twice_ends_the_program() {
    let mut num_active = Live::new(["--chat", "-n", "3000", "--ignore-eos"]);
    num_active.say("def main(");
    num_active.out.read_exact(&mut [0; 40]).unwrap();
    interrupt(&num_active.child);
    interrupt(&num_active.child);
    // Pending signals of one kind are one: the second may have been lost in the first.
    std::thread::sleep(Duration::from_millis(300));
    interrupt(&num_active.child);
    assert_eq!(num_active.code(), Some(130));
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_between_answers_ends_the_program() {
    for said in ["/set", "/help", "import os"] {
        let mut num_active = Live::new(["--chat", "-n", "5"]);
        num_active.say(said);
        num_active.say("/stats");
        while !num_active.error_line().starts_with(if said == "import os" { "in all" } else { "no answer" }) {
        }
        // The line comes just before the wait for the next.
        std::thread::sleep(Duration::from_millis(300));
        interrupt(&num_active.child);
        assert_eq!(num_active.code(), Some(130), "after {said:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_before_the_answer_drops_the_message() {
    let target = support::Target { eos: vec![], max_positions: 1 << 17, ..Default::default() };
    let drafter = support::Drafter { max_positions: 1 << 17, ..Default::default() };
    let pair = support::write_pair(&target, &drafter);
    let mut num_active = Live::new(flags(&pair).iter().map(String::as_str).chain(["--chat", "-n", "8"]));
    // Half a minute of prompt.
    num_active.say(&"long ".repeat(20_000));
    std::thread::sleep(Duration::from_millis(300));
    interrupt(&num_active.child);
    assert_eq!(num_active.error_line(), "interrupted before the answer began: the message is dropped\n");
    num_active.say("hello");
    assert_eq!(num_active.end(), Some(0));
    let mut out = String::new();
    num_active.out.read_to_string(&mut out).unwrap();
    assert_eq!(out, Setting::new(Some(&pair), &["-n", "8"]).answers(&["hello"], &[]));
}
