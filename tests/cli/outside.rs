//! What meets a run of `dflash-gen` from outside: Ctrl-C, readers who leave, model files that lose their bytes.
#![cfg(target_os = "linux")]

use crate::support;
use crate::support::program;

use dflash::checkpoint::safetensors::DEMO_TARGET;
use dflash::text::tokenizer::Text;
use program::{Live, command, flags, interrupt, run, write};
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

/// A file of `count` prompts.
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
    // The statistics say how many tokens came; the same number asked for gives the same text.
    let (tokens, _) = err.split_once(" tokens in ").expect(&err);
    assert!(tokens.parse::<usize>().unwrap() < 3000);
    assert_eq!(got, run([PROMPT, "--ignore-eos", "-n", tokens]).done());
}

#[test]
fn ctrl_c_leaves_whole_records() {
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
        assert!(form == "--stream-json" || events.is_empty(), "the second prompt was begun");
        let tokens: Vec<u32> = events.iter().flat_map(|e| ids(&e["tokens"])).collect();
        assert!(form == "--json" || tokens == ids(&record["tokens"]));
    }
}

// ---- readers and writers who leave ----

/// The exit code and stderr of a run whose reader leaves after `bytes` of stdout. A run that ignores that is killed.
fn left_after(mut run: Live, bytes: usize) -> (Option<i32>, String) {
    run.out.read_exact(&mut vec![0; bytes]).unwrap();
    let Live { mut child, input, out, mut err, _over } = run;
    drop(out);
    let code = child.wait().unwrap().code();
    drop(input);
    let mut said = String::new();
    err.read_to_string(&mut said).unwrap();
    (code, said)
}

/// A pair that can go on for longer than any test waits, a million tokens.
fn endless() -> (support::Pair, Vec<String>) {
    let target = support::Target { eos: vec![], max_positions: 1 << 20, ..Default::default() };
    let pair =
        support::write_pair(&target, &support::Drafter { max_positions: 1 << 20, ..Default::default() });
    let args = flags(&pair).into_iter().chain(["-n", "1000000"].map(String::from)).collect();
    (pair, args)
}

#[test]
fn a_reader_who_leaves_ends_the_run_quietly() {
    let quiet = (Some(0), String::new());
    let (_pair, args) = endless();
    for bytes in [0, 10] {
        for form in [&["hello"][..], &["hello", "--stream-json"]] {
            let args = args.iter().map(String::as_str).chain(form.iter().copied());
            assert_eq!(left_after(Live::new(args), bytes), quiet, "{form:?} {bytes}");
        }
    }
    for args in
        [&["--json", "-n", "20", PROMPT][..], &["--plan"], &["--plan", "--json"], &["--help"], &["--version"]]
    {
        assert_eq!(left_after(Live::new(args), 0), quiet, "{args:?}");
    }
}

#[test]
fn a_reader_who_leaves_ends_the_prompts_that_are_left() {
    let dir = tempfile::tempdir().unwrap();
    // Hours of them, were they all run.
    let many = prompts(dir.path(), 2000);
    let few = prompts(dir.path(), 2);
    // --color is a form that changes nothing.
    let text = [("--color=never", 0), ("--color=never", 10), ("--color=never", 1500)];
    let records = [("--json", 0), ("--json", 10), ("--stream-json", 10)];
    let tables = [("--compare", 0), ("--compare", 10), ("--compare", 100)];
    for (form, bytes) in [text, records, tables].concat() {
        let run = Live::new(["--prompts", &many, "-n", "500", "--ignore-eos", "-q", form]);
        assert_eq!(left_after(run, bytes), (Some(0), String::new()), "{form} {bytes}");
    }
    let run = Live::new(["--prompts", &few, "-n", "20", "--compare", "--json"]);
    assert_eq!(left_after(run, 0), (Some(0), String::new()));
}

#[test]
fn a_reader_who_leaves_ends_the_conversation_quietly() {
    let (_pair, args) = endless();
    for (before, during) in [("", 0), ("", 40), ("hello", 0), ("hello", 40)] {
        let mut run = Live::new(args.iter().map(String::as_str).chain(["--chat"]));
        // An answer that was read, and then the one that nobody reads to its end.
        if !before.is_empty() {
            run.say("/set max-tokens 10");
            run.say(before);
            run.say("/stats");
            run.error_line();
            run.error_line();
            run.say("/set max-tokens 1000000");
        }
        run.say("and you?");
        assert_eq!(left_after(run, during), (Some(0), String::new()), "{before:?} {during}");
    }
}

#[test]
fn statistics_without_a_reader_harm_nothing() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = command([PROMPT, "-n", "20"]);
    let output = command.stdin(Stdio::null()).stderr(writer).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), run([PROMPT, "-n", "20"]).done());
}

#[test]
fn stdout_that_cannot_be_written_is_a_failure() {
    let mut command = command([PROMPT, "-n", "5"]);
    let output = command.stdout(fs::File::create("/dev/full").unwrap()).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "dflash-gen: stdout cannot be written: No space left on device (os error 28)\n"
    );
}

// ---- model files that lose their bytes ----

/// The demo pair in files of its own, in a folder whose name has two lines.
fn demo_files() -> support::Pair {
    let root = tempfile::tempdir().unwrap();
    let [target, drafter] = ["target", "drafter"].map(|part| {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("demo").join(part);
        let to = root.path().join("two\nlines").join(part);
        fs::create_dir_all(&to).unwrap();
        for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
        to
    });
    support::Pair { root, target, drafter }
}

/// A conversation that has had its first answer, so that all weights are mapped and have been used.
fn conversation(pair: &support::Pair) -> Live {
    let template = concat!(env!("CARGO_MANIFEST_DIR"), "/demo/chat.jinja");
    let chat = ["--chat", "--chat-template", template, "-n", "20"].map(String::from);
    let mut run = Live::new(flags(pair).into_iter().chain(chat));
    run.say("import os");
    run.say("/stats");
    run.error_line();
    run.error_line();
    run
}

/// Leaves `1 / part` of the file's bytes.
fn cut(file: &Path, part: u64) {
    let file = fs::File::options().write(true).open(file).unwrap();
    file.set_len(file.metadata().unwrap().len() / part).unwrap();
}

/// The exit code and what was said on stderr, once input has ended.
fn over(mut run: Live) -> (Option<i32>, String) {
    let code = run.end();
    let mut err = String::new();
    run.err.read_to_string(&mut err).unwrap();
    (code, err)
}

fn sentence(file: &Path) -> String {
    let file = file.to_str().unwrap().replace('\n', " ");
    let what = "has lost bytes: the file became shorter after it was opened, or cannot be read";
    format!("dflash-gen: {file} {what}\n")
}

#[test]
fn a_checkpoint_that_shrinks_while_it_is_used_is_one_sentence() {
    for part in [2, u64::MAX] {
        for of_target in [true, false] {
            let pair = demo_files();
            let file = if of_target { &pair.target } else { &pair.drafter }.join("model.safetensors");
            let mut run = conversation(&pair);
            cut(&file, part);
            run.say("import sys");
            assert_eq!(over(run), (Some(3), sentence(&file)), "{part} {of_target}");
        }
    }
}

#[test]
fn the_shard_that_shrinks_is_named() {
    let target = support::Target { shards: 3, vocab: 258, eos: vec![], ..Default::default() };
    for shard in 1..=3 {
        let pair = support::write_pair(&target, &Default::default());
        let file = pair.target.join(format!("model-{shard:05}-of-00003.safetensors"));
        let mut run = conversation(&pair);
        cut(&file, u64::MAX);
        run.say("import sys");
        assert_eq!(over(run), (Some(3), sentence(&file)));
    }
}

/// Weights are opened before the prompt is read from stdin, and looked at after.
#[test]
fn a_checkpoint_that_shrinks_before_it_is_used_is_one_sentence() {
    let pair = demo_files();
    let file = pair.target.join("model.safetensors");
    let mut run = Live::new(flags(&pair));
    // The drafter's is opened last, and read from only after the prompt.
    let mapped = |run: &Live| {
        let maps = fs::read_to_string(format!("/proc/{}/maps", run.child.id())).unwrap();
        maps.contains("/drafter/model.safetensors")
    };
    while !mapped(&run) {
        std::thread::yield_now();
    }
    cut(&file, u64::MAX);
    run.say(PROMPT);
    assert_eq!(over(run), (Some(3), sentence(&file)));
}

#[test]
fn a_bus_error_that_is_no_files_ends_the_program_as_ever() {
    let mut run = conversation(&demo_files());
    assert!(Command::new("kill").args(["-BUS", &run.child.id().to_string()]).status().unwrap().success());
    assert_eq!(run.child.wait().unwrap().signal(), Some(7));
    assert_eq!(over(run).1, "");
}
