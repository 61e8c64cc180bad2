//! Runs the `dflash-gen` binary: flags, output streams, records and exit codes.

use crate::support;
use crate::support::program;

use dflash::checkpoint::folder::DEMO_TARGET;
use dflash::checkpoint::safetensors::Dtype;
use dflash::text::tokenizer::Text;
use program::{BINARY, command, finish, flags, run, run_pair, with_stdin, write};
use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

const PROMPT: &str = "import os\nimport sys\n\ndef main(";

/// The record of a run with one prompt.
fn record(args: &[&str]) -> Value {
    run(["--json"].iter().chain(args)).json().remove(0)
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn text(record: &Value) -> &str {
    record["text"].as_str().unwrap()
}

fn demo_text() -> Text {
    Text::open(&DEMO_TARGET, None).unwrap()
}

/// A random pair whose tokenizer has a token for every byte.
fn byte_pair() -> support::Pair {
    let target = support::Target { vocab: 258, eos: vec![], ..Default::default() };
    support::write_pair(&target, &Default::default())
}

// ---- prompts ----

#[test]
fn argument_file_and_stdin_give_the_same_answer() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "prompt.txt", PROMPT);
    let argument = run([PROMPT, "-n", "40"]).done();
    assert_eq!(run(["-f", &file, "-n", "40"]).done(), argument);
    assert_eq!(run(["--file", &file, "--max-tokens", "40"]).done(), argument);
    assert_eq!(with_stdin(&["-n", "40"], PROMPT.as_bytes()).done(), argument);
}

#[test]
fn a_byte_order_mark_is_not_part_of_a_prompt() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "prompt.txt", format!("\u{feff}{PROMPT}"));
    let lines = write(dir.path(), "p.jsonl", format!("\u{feff}{}\n", json!({"prompt": PROMPT})));
    let expected = record(&[PROMPT, "-n", "8"]);
    for args in [["-f", &file], ["--prompts", &lines]] {
        let got = record(&[&args[..], &["-n", "8"]].concat());
        let fields = ["prompt_tokens", "tokens"];
        assert!(fields.iter().all(|field| got[field] == expected[field]), "{args:?}: {got}");
    }
}

#[test]
fn answers_keep_the_order_of_the_prompts_file() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = ["import os", "class A:\n", "import os", "def f(x):\n    return"];
    let lines: Vec<String> = prompts.iter().map(|p| json!({"prompt": p, "id": 3}).to_string()).collect();
    // Blank lines are skipped.
    let file = write(dir.path(), "p.jsonl", lines.join("\r\n\n"));
    let records = run(["--prompts", &file, "-n", "24", "--json"]).json();
    let alone: Vec<Value> = prompts.iter().map(|p| record(&[p, "-n", "24"])).collect();
    let tokens = |records: &[Value]| records.iter().map(|r| ids(&r["tokens"])).collect::<Vec<_>>();
    assert_eq!(tokens(&records), tokens(&alone));
    let as_text = run(["--prompts", &file, "-n", "24"]);
    // One line of statistics for each prompt, and one for all together.
    let stats: Vec<&str> = as_text.err.lines().collect();
    assert_eq!(stats.len(), prompts.len() + 1, "{}", as_text.err);
    assert!(
        stats[0].starts_with("1: 24 tokens in ") && stats[4].starts_with("all: 96 tokens in "),
        "{}",
        as_text.err
    );
    let texts: String = records.iter().map(|r| format!("{}\n", text(r).trim_end_matches('\n'))).collect();
    let squeeze = |text: &str| text.split('\n').filter(|l| !l.is_empty()).collect::<Vec<_>>().join("\n");
    assert_eq!(squeeze(&as_text.out), squeeze(&texts));
}

// ---- records ----

#[test]
fn a_record_has_exactly_these_fields() {
    let fields = [
        "prompt_tokens",
        "tokens",
        "text",
        "finish_reason",
        "rounds",
        "accepted",
        "drafted",
        "tau",
        "seed",
        "stream",
        "device",
        "target",
        "draft",
        "verify",
        "tree",
        "adaptive",
        "threshold",
        "confidence",
        "coupled",
        "draft_temperature",
        "seconds",
        "id",
        "category",
        "turn",
    ];
    let dflash = record(&[PROMPT, "-n", "60", "--seed", "5"]);
    let ar = record(&[PROMPT, "-n", "60", "--draft", "none", "--seed", "5"]);
    for record in [&dflash, &ar] {
        assert_eq!(record.as_object().unwrap().keys().collect::<Vec<_>>(), fields);
        let tokens = ids(&record["tokens"]);
        assert_eq!(tokens.len(), 60);
        assert_eq!(record["finish_reason"], "length");
        assert_eq!(record["prompt_tokens"], demo_text().encode(PROMPT).unwrap().len());
        assert_eq!(record["device"], "cpu");
        assert_eq!(record["target"], "demo/target");
        assert_eq!(record["seed"], 5);
        let accepted = ids(&record["accepted"]);
        assert_eq!(record["rounds"], accepted.len());
        // The prefill gives the first token. The last round may produce more tokens than were asked for.
        let produced = 1 + accepted.iter().sum::<u32>();
        assert!(produced >= 60 && produced - accepted.last().unwrap() < 60, "{accepted:?}");
        let tau = f64::from(accepted.iter().sum::<u32>()) / accepted.len() as f64;
        assert!((record["tau"].as_f64().unwrap() - tau).abs() < 1e-9);
        let seconds = record["seconds"].as_object().unwrap();
        assert_eq!(seconds.keys().collect::<Vec<_>>(), ["load", "prefill", "decode"]);
        assert!(seconds.values().all(|s| s.as_f64().unwrap() > 0.0));
    }
    assert_eq!((&dflash["draft"], &dflash["verify"]), (&json!("demo/drafter"), &json!("match")));
    assert_eq!((&ar["draft"], &ar["verify"]), (&Value::Null, &Value::Null));
    assert!(ids(&dflash["accepted"]).iter().any(|a| *a > 1), "no draft was accepted: {dflash}");
    assert_eq!(ids(&ar["accepted"]), vec![1; 59]);
    assert_eq!(ids(&ar["drafted"]), vec![0; 59]);
    assert_eq!(ids(&dflash["drafted"]), vec![15; ids(&dflash["accepted"]).len()]);
    assert_eq!(dflash["tokens"], ar["tokens"]);
}

#[test]
fn records_name_the_speculative_settings() {
    let hot = ["--temperature", "0.7", "--seed", "5", "-n", "12"];
    let none = || [(); 6].map(|()| Value::Null);
    let drafts = |verify: &str, tree: Value, adaptive: bool, coupled: bool, temperature: Value| {
        [json!(verify), tree, json!(adaptive), Value::Null, json!(coupled), temperature]
    };
    let with_threshold = |mut drafts: [Value; 6], threshold: f64| {
        drafts[3] = json!(threshold);
        drafts
    };
    // Temperatures are recorded as typed, not as the nearest f32.
    let cases: [(&[&str], [Value; 6]); 11] = [
        (&[], drafts("match", Value::Null, false, false, Value::Null)),
        (&["--draft", "none"], none()),
        (&["--block", "1"], none()),
        (&["--coupled"], drafts("match", Value::Null, false, true, json!(0.7))),
        (&["--coupled", "--draft-temperature", "0"], drafts("match", Value::Null, false, true, json!(0.0))),
        (&["--verify", "block"], drafts("block", Value::Null, false, false, json!(0.7))),
        (
            &["--verify", "rejection", "--draft-temperature", "0.3"],
            drafts("rejection", Value::Null, false, false, json!(0.3)),
        ),
        (&["--tree", "9", "--adaptive"], drafts("match", json!(9), true, false, Value::Null)),
        (
            &["--tree", "9", "--adaptive=0.1"],
            with_threshold(drafts("match", json!(9), true, false, Value::Null), 0.1),
        ),
        (
            &["--coupled", "--adaptive=1"],
            with_threshold(drafts("match", Value::Null, true, true, json!(0.7)), 1.0),
        ),
        (&["--verify", "rejection", "--adaptive"], drafts("rejection", Value::Null, true, false, json!(0.7))),
    ];
    for (flags, expected) in cases {
        let args = [&[PROMPT][..], &hot, flags].concat();
        let settings = |record: &Value| {
            ["verify", "tree", "adaptive", "threshold", "coupled", "draft_temperature"]
                .map(|field| record[field].clone())
        };
        assert_eq!(settings(&record(&args)), expected, "{flags:?}");
        let events = run([&args[..], &["--stream-json"]].concat()).json();
        assert_eq!(settings(events.last().unwrap()), expected, "{flags:?}");
        if expected[0] == "match" {
            for both in ["--compare", "--check-lossless"] {
                let report = run([&args[..], &[both, "--json"]].concat()).json().remove(0);
                assert_eq!(settings(&report), expected, "{both} {flags:?}");
            }
        }
    }
}

#[test]
fn a_record_of_zero_tokens_is_complete() {
    let record = record(&[PROMPT, "-n", "0"]);
    assert_eq!((&record["tokens"], &record["text"], &record["tau"]), (&json!([]), &json!(""), &Value::Null));
    assert_eq!(record["finish_reason"], "length");
    assert_eq!(run([PROMPT, "-n", "0"]).done(), "\n");
}

#[test]
fn record_text_is_the_decoded_tokens() {
    for n in ["1", "50"] {
        let record = record(&[PROMPT, "-n", n, "--temperature", "1", "--seed", "3"]);
        assert_eq!(text(&record), demo_text().decode(&ids(&record["tokens"])).unwrap());
    }
}

#[test]
fn a_full_context_ends_the_answer() {
    let pair =
        support::write_pair(&support::Target { eos: vec![], ..Default::default() }, &Default::default());
    let record = run_pair(&pair, &["hello", "--json", "--raw", "-n", "1000"]).json().remove(0);
    assert_eq!(record["finish_reason"], "context");
    assert_eq!(record["prompt_tokens"], 5);
    assert_eq!(ids(&record["tokens"]).len(), 256 - 5);
}

#[test]
fn stream_events_add_up_to_the_record() {
    let held = {
        // A stop string that begins with the last characters of the answer, which are therefore held back
        // until the end.
        let answer = record(&[PROMPT, "-n", "50"]);
        let end: Vec<char> = text(&answer).chars().rev().take(3).collect();
        format!("{}\u{a7}", end.into_iter().rev().collect::<String>())
    };
    let stop = {
        let answer = record(&[PROMPT, "-n", "50"]);
        text(&answer).chars().skip(20).take(4).collect::<String>()
    };
    for extra in [&["--block", "16"][..], &["--draft", "none"], &["--stop", &held], &["--stop", &stop]] {
        let args: Vec<&str> = [PROMPT, "-n", "50"].iter().chain(extra).copied().collect();
        let expected = record(&args);
        let mut events = run(["--stream-json"].iter().chain(&args)).json();
        let mut done = events.pop().unwrap();
        for (field, value) in [("event", json!("done")), ("index", json!(0))] {
            assert_eq!(done.as_object_mut().unwrap().shift_remove(field), Some(value));
        }
        for field in ["tokens", "text", "finish_reason", "accepted", "rounds", "draft"] {
            assert_eq!(done[field], expected[field], "{field} with {extra:?}");
        }
        let rounds: Vec<&Value> = events.iter().filter(|e| e["event"] == "round").collect();
        assert_eq!(rounds.len(), expected["rounds"]);
        assert!((1..).zip(&rounds).all(|(i, round)| round["round"] == i));
        let accepted: Vec<&Value> = rounds.iter().map(|round| &round["accepted"]).collect();
        assert_eq!(json!(accepted), expected["accepted"]);
        assert_eq!((&events[0]["event"], &events[0]["round"]), (&json!("prefill"), &json!(0)));
        let tokens: Vec<u32> = events.iter().flat_map(|e| ids(&e["tokens"])).collect();
        assert_eq!(tokens, ids(&expected["tokens"]));
        assert_eq!(events.iter().map(text).collect::<String>(), text(&expected), "{extra:?}");
        assert_eq!(events.last().unwrap()["event"] == "rest", extra.contains(&held.as_str()), "{extra:?}");
        for event in &events {
            let fields: Vec<_> = event.as_object().unwrap().keys().collect();
            assert_eq!(fields, ["event", "index", "round", "tokens", "text", "accepted"]);
        }
    }
}

// ---- sampling ----

#[test]
fn same_seed_gives_the_same_text_at_every_block_size() {
    let sampled = ["-n", "60", "--temperature", "0.9", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.02"];
    let answer = |extra: &[&str]| {
        let args: Vec<&str> = [PROMPT].iter().chain(&sampled).chain(extra).copied().collect();
        run(args).done()
    };
    let expected = answer(&["--seed", "11", "--draft", "none"]);
    for block in ["1", "2", "7", "16"] {
        assert_eq!(answer(&["--seed", "11", "--block", block]), expected, "--block {block}");
    }
    assert_ne!(answer(&["--seed", "12"]), expected);
}

#[test]
fn each_sampling_filter_can_reduce_to_greedy() {
    let greedy = run([PROMPT, "-n", "40"]).done();
    let hot = |filter: &[&str]| {
        let args = [PROMPT, "-n", "40", "--temperature", "1.5", "--seed", "1"];
        run(args.iter().chain(filter)).done()
    };
    assert_ne!(hot(&[]), greedy);
    for filter in [["--top-k", "1"], ["--top-p", "0.000001"], ["--min-p", "0.9999999"]] {
        assert_eq!(hot(&filter), greedy, "{filter:?}");
    }
}

#[test]
fn a_random_seed_is_printed_and_reproduces_the_text() {
    let args = [PROMPT, "-n", "30", "--temperature", "1"];
    let (a, b) = (run(args), run(args));
    assert_ne!(a.out, b.out, "two random seeds gave the same text");
    for run_ in [a, b] {
        let (_, seed) = run_.err.trim_end().rsplit_once(", seed ").expect("a seed on stderr");
        assert_eq!(run(args.iter().chain(&["--seed", seed])).done(), run_.out);
    }
    let record = record(&args);
    let again = run(args.iter().copied().chain(["--seed", &record["seed"].to_string(), "-q"])).done();
    assert_eq!(again.strip_suffix('\n').unwrap_or(&again), text(&record).trim_end_matches('\n'));
}

#[test]
fn each_prompt_of_a_file_has_its_own_random_stream() {
    let dir = tempfile::tempdir().unwrap();
    let line = json!({"prompt": PROMPT}).to_string();
    let file = write(dir.path(), "p.jsonl", format!("{line}\n{line}\n"));
    let args = ["-n", "30", "--temperature", "1", "--seed", "8"];
    let twice = run(["--prompts", &file, "--json"].iter().chain(&args)).json();
    assert_ne!(twice[0]["tokens"], twice[1]["tokens"]);
    assert_eq!(twice[0]["tokens"], record(&[&[PROMPT], &args[..]].concat())["tokens"]);
    let again = run(["--prompts", &file, "--json", "--block", "3"].iter().chain(&args)).json();
    assert_eq!(again[1]["tokens"], twice[1]["tokens"]);
}

// ---- where answers end ----

#[test]
fn a_stop_string_ends_the_answer_even_across_tokens() {
    let whole = record(&[PROMPT, "-n", "60"]);
    let pieces: Vec<String> =
        ids(&whole["tokens"]).iter().map(|id| demo_text().decode(&[*id]).unwrap()).collect();
    // The last character of one token and the first of the next, at a pair of tokens well inside the answer.
    let at = (20..50).find(|i| pieces[*i].len() > 1 && pieces[i + 1].len() > 1).expect("two long tokens");
    let stop: String =
        [pieces[at].chars().last().unwrap(), pieces[at + 1].chars().next().unwrap()].iter().collect();
    let end = text(&whole).find(&stop).unwrap();
    for block in ["1", "16"] {
        let args = [PROMPT, "-n", "60", "--block", block, "--stop", "never seen", "--stop", &stop];
        let cut = record(&args);
        assert_eq!(text(&cut), &text(&whole)[..end]);
        assert_eq!(cut["finish_reason"], "stop");
        let tokens = ids(&cut["tokens"]);
        assert_eq!(tokens, ids(&whole["tokens"])[..tokens.len()]);
        let printed = run(args).done();
        assert_eq!(printed.strip_suffix('\n').unwrap(), text(&cut).trim_end_matches('\n'));
    }
}

#[test]
fn ignore_eos_continues_past_eos_tokens() {
    // Every second id is a stop token.
    let target = support::Target { eos: (0..97).step_by(2).collect(), ..Default::default() };
    let pair = support::write_pair(&target, &Default::default());
    let args = ["--json", "--raw", "-n", "40", "hello"];
    let stopped = run_pair(&pair, &args).json().remove(0);
    let whole = run_pair(&pair, &[&args[..], &["--ignore-eos"]].concat()).json().remove(0);
    let (short, long) = (ids(&stopped["tokens"]), ids(&whole["tokens"]));
    assert_eq!((&stopped["finish_reason"], &whole["finish_reason"]), (&json!("stop"), &json!("length")));
    assert_eq!(long.len(), 40);
    let end = long.iter().position(|id| id % 2 == 0).unwrap();
    assert_eq!(short, long[..=end]);
}

// ---- streams ----

#[test]
fn stdout_is_only_the_text() {
    let expected = record(&[PROMPT, "-n", "50"]);
    let expected = text(&expected);
    let newline = if expected.ends_with('\n') { "" } else { "\n" };
    assert_eq!(run([PROMPT, "-n", "50"]).done(), format!("{expected}{newline}"));
}

#[test]
fn stats_are_one_line_in_this_format() {
    /// Replaces each run of digits by `#`.
    fn shape(line: &str) -> String {
        let mut shape = String::new();
        for c in line.chars() {
            match (c.is_ascii_digit(), shape.ends_with('#')) {
                (true, true) => {}
                (true, false) => shape.push('#'),
                (false, _) => shape.push(c),
            }
        }
        shape
    }
    let start = "# tokens in #.# s, # tok/s (prompt: # tokens, # ms), # rounds";
    let ar = run([PROMPT, "-n", "30", "--draft", "none"]).err;
    assert_eq!(shape(&ar), format!("{start}\n"));
    let dflash = run([PROMPT, "-n", "30", "--temperature", "0.5", "--seed", "6"]).err;
    let bars = dflash.split_once("[1").and_then(|(_, rest)| rest.split_once("16]")).expect(&dflash).0;
    assert_eq!(bars.chars().count(), 16);
    assert!(bars.chars().all(|c| " ▁▂▃▄▅▆▇█".contains(c)) && bars.contains('█'), "{dflash}");
    assert_eq!(shape(&dflash.replace(bars, "")), format!("{start}, acceptance length #.# [#], seed #\n"));
    assert!(dflash.starts_with("30 tokens in ") && dflash.ends_with(", seed 6\n"), "{dflash}");
}

#[test]
fn quiet_leaves_stderr_empty() {
    for extra in [&[][..], &["--json"], &["--stream-json"], &["--compare"], &["--temperature", "1"]] {
        let run = run([PROMPT, "-n", "20", "--quiet"].iter().chain(extra));
        assert_eq!((run.code, run.err.as_str()), (0, ""), "{extra:?}");
    }
}

#[test]
fn color_marks_exactly_the_drafted_tokens() {
    let args = [PROMPT, "-n", "60"];
    let text = demo_text();
    let mut stream = text.stream(&[]).unwrap();
    let mut expected = String::new();
    let mut drafted = 0;
    for event in run(["--stream-json"].iter().chain(&args)).json().iter().filter(|e| e["event"] != "done") {
        let tokens = ids(&event["tokens"]);
        for (i, id) in tokens.iter().enumerate() {
            let piece = stream.push(*id).unwrap().0;
            // The last token of a round is the target's own, unless the answer was cut before it.
            let own = event["accepted"].as_u64().is_none_or(|a| i as u64 + 1 == a);
            drafted += u32::from(!own);
            expected += &if own || piece.is_empty() { piece } else { format!("\x1b[32m{piece}\x1b[0m") };
        }
    }
    assert!(drafted > 5, "only {drafted} drafted tokens: too few for this test");
    let shown = run(args.iter().chain(&["--show-accept", "--color", "always"])).done();
    assert_eq!(shown.trim_end_matches('\n'), expected.trim_end_matches('\n'));
    let unmarked = run(args).done();
    assert_eq!(shown.replace("\x1b[32m", "").replace("\x1b[0m", ""), unmarked);
    // A pipe is not a terminal.
    for extra in [&["--show-accept"][..], &["--show-accept", "--color", "never"]] {
        assert_eq!(run(args.iter().chain(extra)).done(), unmarked, "{extra:?}");
    }
}

#[test]
fn stdout_is_utf8_after_every_write() {
    // The answer is random bytes: incomplete characters, and bytes that are never part of a character.
    let pair = byte_pair();
    let args = ["hello", "--raw", "-n", "200", "--temperature", "1", "--seed", "4"];
    let expected = run_pair(&pair, &[&args[..], &["--json"]].concat()).json().remove(0);
    assert!(text(&expected).contains('\u{fffd}') && !text(&expected).is_ascii());
    let mut child = command(flags(&pair)).args(args).arg("-q").stdout(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let (mut all, mut buffer) = (String::new(), [0; 1 << 16]);
    loop {
        // The buffer is as large as the pipe, so one read returns whole writes.
        match out.read(&mut buffer).unwrap() {
            0 => break,
            n => all += std::str::from_utf8(&buffer[..n]).expect("a write ended inside a character"),
        }
    }
    assert!(child.wait().unwrap().success());
    assert_eq!(all.strip_suffix('\n').unwrap(), text(&expected).trim_end_matches('\n'));
}

// ---- the program itself ----

#[test]
fn the_binary_runs_without_other_files() {
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("dflash-gen");
    // Not fs::copy: a process that another test starts meanwhile would inherit the open copy, which then cannot run.
    assert!(Command::new("cp").args([BINARY.as_ref(), copy.as_path()]).status().unwrap().success());
    let empty = dir.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let mut command = Command::new(&copy);
    command.args([PROMPT, "-n", "40"]).current_dir(&empty).env_clear();
    assert_eq!(finish(command).done(), run([PROMPT, "-n", "40"]).done());
    assert_eq!(fs::read_dir(&empty).unwrap().count(), 0);
}

#[test]
fn help_says_what_a_new_user_needs() {
    let help = run(["--help"]).done();
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for phrase in
        ["demo pair", "enable_thinking=true", "lose more than half of their acceptance", "130 interrupted"]
    {
        assert!(words.contains(phrase), "--help lacks {phrase:?}");
    }
    assert!(run(["-h"]).done().lines().count() < help.lines().count());
}

#[test]
fn version_is_one_line_and_with_json_one_object() {
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(run(["--version"]).done(), format!("dflash-gen {version}\n"));
    let objects = run(["--version", "--json"]).json();
    assert_eq!(objects.len(), 1);
    let facts = objects[0].as_object().unwrap();
    let keys = [
        "program",
        "version",
        "commit",
        "cuda_targets",
        "device",
        "no_device",
        "driver",
        "cuda_driver_api",
        "cuda_driver",
        "os",
        "arch",
        "cores",
    ];
    assert_eq!(facts.keys().collect::<Vec<_>>(), keys);
    assert_eq!((&facts["program"], &facts["version"]), (&json!("dflash-gen"), &json!(version)));
    assert!(facts["cuda_targets"].is_array(), "{facts:?}");
    assert_eq!(facts["cuda_driver"], facts["cuda_driver_api"], "the earlier name stays");
    // Either the name of the GPU or the reason why there is none.
    assert!(facts["device"].is_string() != facts["no_device"].is_string(), "{facts:?}");
    let built_for = (json!(std::env::consts::OS), json!(std::env::consts::ARCH));
    assert_eq!((&facts["os"], &facts["arch"]), (&built_for.0, &built_for.1));
    assert!(facts["cores"].as_u64().unwrap() >= 1, "{facts:?}");
}

#[test]
fn a_target_without_draft_decodes_autoregressively_with_a_note() {
    let pair = byte_pair();
    let target = pair.target.display().to_string();
    let with = |more: &[&str]| run([&["--target", &*target, "--raw", "-n", "8", "hello"], more].concat());
    let note = "no --draft, so autoregressive decoding: ";
    let noted = with(&[]);
    assert!(noted.code == 0 && noted.err.contains(note), "{noted:?}");
    let quiet = with(&["-q"]);
    assert_eq!((quiet.code, quiet.err.as_str()), (0, ""));
    let draft_none = with(&["--draft", "none"]);
    assert!(draft_none.code == 0 && !draft_none.err.contains("no --draft"), "{draft_none:?}");
    assert!(noted.out == quiet.out && noted.out == draft_none.out, "{noted:?} {quiet:?} {draft_none:?}");
    let record = with(&["--json"]).json().remove(0);
    assert_eq!(record["draft"], Value::Null);
    assert_eq!((ids(&record["accepted"]), ids(&record["drafted"])), (vec![1; 7], vec![0; 7]));
}

#[test]
fn compare_reports_rates_and_identity() {
    let dir = tempfile::tempdir().unwrap();
    let lines = ["import os", "class A:\n"].map(|p| json!({"prompt": p}).to_string()).join("\n");
    let file = write(dir.path(), "p.jsonl", lines);
    for sampling in [&[][..], &["--temperature", "0.8", "--seed", "3"]] {
        let args: Vec<&str> =
            ["--compare", "--prompts", &file, "-n", "30"].iter().chain(sampling).copied().collect();
        let table = run(&args).done();
        let rows: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(rows[0].join(" "), "prompt tokens AR tok/s dflash tok/s ratio tau identical");
        assert_eq!(rows.iter().skip(1).map(|r| r[0]).collect::<Vec<_>>(), ["1", "2", "all"]);
        assert_eq!(rows.iter().skip(1).map(|r| r[1]).collect::<Vec<_>>(), ["30", "30", "60"]);
        assert!(rows.iter().skip(1).all(|r| r.len() == 7 && r[6] == "yes"), "{table}");

        let report = run(args.iter().chain(&["--json"])).json().remove(0);
        assert_eq!((&report["identical"], &report["tokens"]), (&json!(true), &json!(60)));
        let (ar, dflash) =
            (report["plain_tokens_per_s"].as_f64().unwrap(), report["dflash_tokens_per_s"].as_f64().unwrap());
        assert!((report["ratio"].as_f64().unwrap() - dflash / ar).abs() < 1e-6 * dflash / ar);
        let records = run(["--json", "--prompts", &file, "-n", "30"].iter().chain(sampling)).json();
        for (row, record) in report["prompts"].as_array().unwrap().iter().zip(&records) {
            assert_eq!((&row["identical"], &row["tau"]), (&json!(true), &record["tau"]));
        }
        let fields = [
            "tokens",
            "plain_tokens_per_s",
            "dflash_tokens_per_s",
            "ratio",
            "tau",
            "identical",
            "prompts",
            "seed",
            "device",
            "target",
            "draft",
            "verify",
            "tree",
            "adaptive",
            "threshold",
            "confidence",
            "coupled",
            "draft_temperature",
        ];
        assert_eq!(report.as_object().unwrap().keys().collect::<Vec<_>>(), fields);
    }
    assert!(run(["--compare", PROMPT, "-n", "9", "--temperature", "1"]).err.starts_with("seed "));
}

// ---- --plan ----

#[test]
fn plan_of_the_demo_pair_adds_up() {
    let plan = run(["--plan", "--json"]).json().remove(0);
    // 2 * layers * kv_heads * head_dim * 4 bytes
    for (role, kv) in [("target", 2 * 6 * 2 * 64 * 4), ("drafter", 2 * 3 * 2 * 64 * 4)] {
        let part = &plan[role];
        let file = format!("{}/demo/{role}/model.safetensors", env!("CARGO_MANIFEST_DIR"));
        let bytes = fs::read(&file).unwrap();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(part["weight_bytes"], bytes.len() - 8 - header);
        assert_eq!(
            part["files"],
            json!([{"file": format!("demo/{role}/model.safetensors"), "bytes": bytes.len()}])
        );
        assert_eq!((&part["kv_bytes_per_token"], &part["max_positions"]), (&json!(kv), &json!(4096)));
    }
    let sum =
        |field: &str| ["target", "drafter"].iter().map(|r| plan[*r][field].as_u64().unwrap()).sum::<u64>();
    assert_eq!(plan["weight_bytes"], sum("weight_bytes"));
    assert_eq!(plan["kv_bytes_per_token"], sum("kv_bytes_per_token"));
    let text = run(["--plan"]).done();
    for line in [
        "target demo/target: 3478272 bytes (3.3 MiB) of weights, 6144 bytes of KV per token, 4096 positions",
        "  6 x model.layers.*.self_attn.q_proj.weight           [256, 128]       bf16       393216 bytes",
        "in all: 5053952 bytes (4.8 MiB) of weights, used where the files have them, and 9216 bytes of KV per token",
    ] {
        assert!(
            text.lines().any(|l| l == line || l.trim_start() == line.trim_start()),
            "no {line:?} in:\n{text}"
        );
    }
}

#[test]
fn plan_of_a_sharded_pair_adds_up_and_needs_no_tokenizer() {
    let target = support::Target { shards: 3, tied: false, ..Default::default() };
    let drafter = support::Drafter { shards: 2, dtype: Dtype::F32, ..Default::default() };
    let pair = support::write_pair(&target, &drafter);
    fs::remove_file(pair.target.join("tokenizer.json")).unwrap();
    let plan = run_pair(&pair, &["--plan", "--json"]).json().remove(0);
    let parts = [
        ("target", &pair.target, support::target_tensors(&target), 2, 3),
        ("drafter", &pair.drafter, support::drafter_tensors(&target, &drafter), 4, 2),
    ];
    for (role, dir, tensors, element, shards) in parts {
        let part = &plan[role];
        let bytes: usize = tensors.iter().map(|t| t.values.len() * element).sum();
        assert_eq!(part["weight_bytes"], bytes);
        let files = part["files"].as_array().unwrap();
        assert_eq!(files.len(), shards);
        for file in files {
            let path = Path::new(file["file"].as_str().unwrap());
            assert_eq!(path.parent().unwrap(), dir);
            assert_eq!(file["bytes"], fs::metadata(path).unwrap().len());
        }
        let groups = part["tensors"].as_array().unwrap();
        let count: u64 = groups.iter().map(|g| g["count"].as_u64().unwrap()).sum();
        assert_eq!(count, tensors.len() as u64);
        for group in groups {
            let elements: u64 = ids(&group["shape"]).iter().map(|n| u64::from(*n)).product();
            assert_eq!(group["bytes"], group["count"].as_u64().unwrap() * elements * element as u64);
        }
        assert_eq!(groups.iter().map(|g| g["bytes"].as_u64().unwrap()).sum::<u64>(), bytes as u64);
    }
}

// ---- conversations ----

/// A random pair without a chat template, and a template file that prints every message and all variables.
fn chat() -> (support::Pair, String) {
    let pair = byte_pair();
    support::edit_json(&pair.target, "tokenizer_config.json", |config| {
        config.as_object_mut().unwrap().shift_remove("chat_template");
    });
    let template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
                    {% if add_generation_prompt %}<assistant>{% endif %}\
                    {% if enable_thinking %}<think>{% endif %}{{ mood }}";
    let file = write(pair.root.path(), "chat.jinja", template);
    (pair, file)
}

#[test]
fn conversations_are_rendered_by_the_chat_template() {
    let (pair, template) = chat();
    let line = json!({"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "This."}, {"role": "user", "content": "Why?"},
    ]});
    let prompts = write(pair.root.path(), "p.jsonl", format!("{line}\n{{\"prompt\": \"So?\"}}\n"));
    let with = |args: &[&str]| {
        let args = [&["--json", "-n", "12", "--chat-template", &template], args].concat();
        run_pair(&pair, &args).json()
    };
    let raw = |text: &str| run_pair(&pair, &["--json", "-n", "12", "--raw", text]).json().remove(0);
    // Each byte is a token, so the rendered text and the conversation must have equal prompt lengths and
    // answers.
    let same = |record: &Value, rendered: &str| {
        assert_eq!(record["prompt_tokens"], rendered.len(), "{rendered}");
        assert_eq!(record["tokens"], raw(rendered)["tokens"], "{rendered}");
    };
    same(&with(&["Hello"])[0], "<user>Hello<assistant>");
    same(&with(&["Hello", "--system", "Be kind."])[0], "<system>Be kind.<user>Hello<assistant>");
    let records = with(&["--prompts", &prompts]);
    same(&records[0], "<system>Be brief.<user>What?<assistant>This.<user>Why?<assistant>");
    same(&records[1], "<user>So?<assistant>");
    let thinking = ["Hello", "--template-arg", "enable_thinking=true", "--template-arg", "mood=well = good"];
    same(&with(&thinking)[0], "<user>Hello<assistant><think>well = good");
    same(&with(&["Hello", "--template-arg", "enable_thinking=false"])[0], "<user>Hello<assistant>");

    // The template in the model's folder has the same effect, and --raw ignores it.
    fs::copy(&template, pair.target.join("chat_template.jinja")).unwrap();
    let own = run_pair(&pair, &["--json", "-n", "12", "Hello"]).json().remove(0);
    assert_eq!(own["tokens"], with(&["Hello"])[0]["tokens"]);
    assert_eq!(raw("Hello")["prompt_tokens"], 5);
}

/// The flag comes before the variable, which is rayon's. A value of the variable that is no number does not
/// count.
#[test]
fn threads_come_from_the_flag_or_the_variable() {
    let cores = std::thread::available_parallelism().unwrap().to_string();
    let mut texts = vec![];
    for (flag, variable, expected) in [
        (&["--threads", "3"][..], None, "3"),
        (&["--threads", "1"], Some("2"), "1"),
        (&[], Some("5"), "5"),
        (&[], Some("many"), &cores),
        (&[], None, &cores),
    ] {
        let mut command = program::command([&["-v", "-n", "8", "def f(x):"], flag].concat());
        command.env_remove("RAYON_NUM_THREADS");
        command.envs(variable.map(|threads| ("RAYON_NUM_THREADS", threads)));
        let run = program::finish(command);
        let line = run.err.lines().find_map(|line| line.strip_prefix("threads: "));
        assert_eq!(line, Some(expected), "{flag:?}, {variable:?}: {run:?}");
        texts.push(run.out);
    }
    assert!(!texts[0].is_empty() && texts.iter().all(|text| *text == texts[0]), "{texts:?}");
}
