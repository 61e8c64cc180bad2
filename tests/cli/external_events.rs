//! External events during a run of `dflash-gen`: Ctrl-C, closed pipes, and truncated model files.
#![cfg(target_os = "linux")]

use crate::support;
use crate::support::program;

use dflash::checkpoint::folder::DEMO_TARGET;
use dflash::text::tokenizer::Text;
use program::{Interactive, command, flags, interrupt, run, write};
use serde_json::{Value, json};
use std::fs;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};

const PROMPT: &str = "import os\nimport sys\n\ndef main(";

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

/// Writes a file of `count` prompts and returns its path.
fn prompts(dir: &Path, count: usize) -> String {
    write(dir, &format!("{count}.jsonl"), format!("{}\n", json!({"prompt": PROMPT})).repeat(count))
}

// ---- Ctrl-C ----

#[test]
fn ctrl_c_keeps_the_text_so_far() {
    let args = [PROMPT, "-n", "3000", "--ignore-eos"];
    let mut child =
        command(args).stdout(Stdio::piped()).stderr(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut bytes = vec![0; 40];
    out.read_exact(&mut bytes).unwrap();
    interrupt(&child);
    out.read_to_end(&mut bytes).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let got = String::from_utf8(bytes).unwrap();
    let mut err = String::new();
    child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
    assert_eq!(err.lines().count(), 1, "{err}");
    // A run that is limited to the number of tokens in the statistics gives the same text.
    let (tokens, _) = err.split_once(" tokens in ").expect(&err);
    assert!(tokens.parse::<usize>().unwrap() < 3000);
    assert_eq!(got, run([PROMPT, "--ignore-eos", "-n", tokens]).done());
}

#[test]
fn ctrl_c_writes_complete_records() {
    let dir = tempfile::tempdir().unwrap();
    let file = prompts(dir.path(), 2);
    for form in ["--json", "--stream-json"] {
        let child = command([form, "-q", "-n", "3000", "--ignore-eos", "--prompts", &file])
            .stdout(Stdio::piped())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        interrupt(&child);
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130));
        let lines = String::from_utf8(output.stdout).unwrap();
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let (record, events) = lines.split_last().unwrap();
        assert_eq!(record["finish_reason"], "interrupted");
        assert_eq!(
            record["text"].as_str().unwrap(),
            Text::open(&DEMO_TARGET, None).unwrap().decode(&ids(&record["tokens"])).unwrap()
        );
        assert!(form == "--stream-json" || events.is_empty(), "the second prompt was started");
        let tokens: Vec<u32> = events.iter().flat_map(|e| ids(&e["tokens"])).collect();
        assert!(form == "--json" || tokens == ids(&record["tokens"]));
    }
}

// ---- closed pipes ----

/// Reads `bytes` of stdout and closes it. Returns the exit code and stderr. The watchdog kills a run that
/// does not end.
fn close_stdout_after(mut run: Interactive, bytes: usize) -> (Option<i32>, String) {
    run.out.read_exact(&mut vec![0; bytes]).unwrap();
    let Interactive { mut child, input, out, mut err, _watchdog } = run;
    drop(out);
    let code = child.wait().unwrap().code();
    drop(input);
    let mut messages = String::new();
    err.read_to_string(&mut messages).unwrap();
    (code, messages)
}

/// A pair and the flags for an answer of a million tokens, which takes longer than the watchdog allows.
fn long_pair() -> (support::Pair, Vec<String>) {
    let target = support::Target { eos: vec![], max_positions: 1 << 20, ..Default::default() };
    let pair =
        support::write_pair(&target, &support::Drafter { max_positions: 1 << 20, ..Default::default() });
    let args = flags(&pair).into_iter().chain(["-n", "1000000"].map(String::from)).collect();
    (pair, args)
}

#[test]
fn closing_stdout_ends_the_run_quietly() {
    let quiet = (Some(0), String::new());
    let (_pair, args) = long_pair();
    for bytes in [0, 10] {
        for form in [&["hello"][..], &["hello", "--stream-json"]] {
            let args = args.iter().map(String::as_str).chain(form.iter().copied());
            assert_eq!(close_stdout_after(Interactive::new(args), bytes), quiet, "{form:?} {bytes}");
        }
    }
    for args in
        [&["--json", "-n", "20", PROMPT][..], &["--plan"], &["--plan", "--json"], &["--help"], &["--version"]]
    {
        assert_eq!(close_stdout_after(Interactive::new(args), 0), quiet, "{args:?}");
    }
}

#[test]
fn closing_stdout_skips_the_remaining_prompts() {
    let dir = tempfile::tempdir().unwrap();
    // Running all of them would take hours.
    let many = prompts(dir.path(), 2000);
    let few = prompts(dir.path(), 2);
    // --color=never has no effect on a pipe, so these cases print plain text.
    let text = [("--color=never", 0), ("--color=never", 10), ("--color=never", 1500)];
    let records = [("--json", 0), ("--json", 10), ("--stream-json", 10)];
    let tables = [("--compare", 0), ("--compare", 10), ("--compare", 100)];
    for (form, bytes) in [text, records, tables].concat() {
        let run = Interactive::new(["--prompts", &many, "-n", "500", "--ignore-eos", "-q", form]);
        assert_eq!(close_stdout_after(run, bytes), (Some(0), String::new()), "{form} {bytes}");
    }
    let run = Interactive::new(["--prompts", &few, "-n", "20", "--compare", "--json"]);
    assert_eq!(close_stdout_after(run, 0), (Some(0), String::new()));
}

#[test]
fn closing_stdout_ends_the_conversation_quietly() {
    let (_pair, args) = long_pair();
    for (before, during) in [("", 0), ("", 40), ("hello", 0), ("hello", 40)] {
        let mut run = Interactive::new(args.iter().map(String::as_str).chain(["--chat"]));
        // A complete answer first, then the answer during which stdout is closed.
        if !before.is_empty() {
            run.send("/set max-tokens 10");
            run.send(before);
            run.send("/stats");
            run.stderr_line();
            run.stderr_line();
            run.send("/set max-tokens 1000000");
        }
        run.send("and you?");
        assert_eq!(close_stdout_after(run, during), (Some(0), String::new()), "{before:?} {during}");
    }
}

#[test]
fn closed_stderr_does_not_affect_the_answer() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = command([PROMPT, "-n", "20"]);
    let output = command.stdin(Stdio::null()).stderr(writer).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), run([PROMPT, "-n", "20"]).done());
}

#[test]
fn a_write_error_on_stdout_is_a_failure() {
    for args in [&[PROMPT, "-n", "5"][..], &["--help"], &["--version"], &["--plan"]] {
        let output = command(args).stdout(fs::File::create("/dev/full").unwrap()).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert_eq!(
            String::from_utf8(output.stderr).unwrap(),
            "dflash-gen: stdout cannot be written: No space left on device (os error 28)\n",
            "{args:?}"
        );
    }
}

// ---- truncated model files ----

/// A copy of the demo pair in a folder whose name contains a newline.
fn demo_files() -> support::Pair {
    let root = tempfile::tempdir().unwrap();
    let [target, drafter] = ["target", "drafter"].map(|role| {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo").join(role);
        let to = root.path().join("two\nlines").join(role);
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
        to
    });
    support::Pair { root, target, drafter }
}

/// Starts a conversation and waits for its first answer, so that all weights are mapped and have been read.
fn conversation(pair: &support::Pair) -> Interactive {
    let template = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/chat.jinja");
    let chat = ["--chat", "--chat-template", template, "-n", "20"].map(String::from);
    let mut run = Interactive::new(flags(pair).into_iter().chain(chat));
    run.send("import os");
    run.send("/stats");
    run.stderr_line();
    run.stderr_line();
    run
}

/// Truncates the file to `1 / fraction` of its length.
fn truncate(file: &Path, fraction: u64) {
    let file = fs::File::options().write(true).open(file).unwrap();
    file.set_len(file.metadata().unwrap().len() / fraction).unwrap();
}

/// Closes stdin and returns the exit code and stderr.
fn finish(mut run: Interactive) -> (Option<i32>, String) {
    let code = run.close_stdin();
    let mut err = String::new();
    run.err.read_to_string(&mut err).unwrap();
    (code, err)
}

/// The error for a truncated file, on one line.
fn truncated_error(file: &Path) -> String {
    let file = file.to_str().unwrap().replace('\n', " ");
    let what = "has lost bytes: the file became shorter after it was opened, or cannot be read";
    format!("dflash-gen: {file} {what}\n")
}

#[test]
fn a_checkpoint_truncated_during_use_gives_one_error_line() {
    for fraction in [2, u64::MAX] {
        for of_target in [true, false] {
            let pair = demo_files();
            let file = if of_target { &pair.target } else { &pair.drafter }.join("model.safetensors");
            let mut run = conversation(&pair);
            truncate(&file, fraction);
            run.send("import sys");
            assert_eq!(finish(run), (Some(3), truncated_error(&file)), "{fraction} {of_target}");
        }
    }
}

#[test]
fn the_truncated_shard_is_named() {
    let target = support::Target { shards: 3, vocab: 258, eos: vec![], ..Default::default() };
    for shard in 1..=3 {
        let pair = support::write_pair(&target, &Default::default());
        let file = pair.target.join(format!("model-{shard:05}-of-00003.safetensors"));
        let mut run = conversation(&pair);
        truncate(&file, u64::MAX);
        run.send("import sys");
        assert_eq!(finish(run), (Some(3), truncated_error(&file)));
    }
}

/// The program maps the weights, then reads the prompt from stdin, and only then reads the weights.
#[test]
fn a_checkpoint_truncated_before_use_gives_one_error_line() {
    let pair = demo_files();
    let file = pair.target.join("model.safetensors");
    let mut run = Interactive::new(flags(&pair));
    // The drafter's weights are mapped last.
    let mapped = |run: &Interactive| {
        let maps = fs::read_to_string(format!("/proc/{}/maps", run.child.id())).unwrap();
        maps.contains("/drafter/model.safetensors")
    };
    while !mapped(&run) {
        std::thread::yield_now();
    }
    truncate(&file, u64::MAX);
    run.send(PROMPT);
    assert_eq!(finish(run), (Some(3), truncated_error(&file)));
}

#[test]
fn a_bus_error_outside_mapped_files_ends_the_program_by_signal() {
    let mut run = conversation(&demo_files());
    assert!(Command::new("kill").args(["-BUS", &run.child.id().to_string()]).status().unwrap().success());
    assert_eq!(run.child.wait().unwrap().signal(), Some(7));
    assert_eq!(finish(run).1, "");
}
