//! `tools/gpu-report.sh` with programs that fail, hang and print nothing: what its summary says, and that it ends. No GPU
//! is needed: the programs are scripts of these tests.
#![cfg(target_os = "linux")]

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use tempfile::TempDir;

/// `dflash-bench` where nothing goes wrong.
const BENCH: &str = r#"case $1 in
show) shift; printf '| shown |\n'
    for arg; do [ "$before" != --report ] || echo '<html>' >"$arg"; before=$arg; printf '| %s |\n' "${arg##*/}"; done ;;
*) echo '{"schema":"dflash-bench/1"}' ;;
esac"#;
const GEN: &str = r#"echo '{"tokens":32,"rounds":10,"compared":30,"prompts":[{"tokens":7}]}'"#;

fn tool(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools").join(name)
}

fn script(dir: &Path, name: &str, text: &str) {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A folder as tools/gpu-pack.sh packs it, with `bench` as dflash-bench, and tests that pass.
fn pack(bench: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in ["gpu-report.sh", "gpu-check.sh"] {
        symlink(tool(name), dir.path().join(name)).unwrap();
    }
    fs::write(
        dir.path().join("prompts.jsonl"),
        "{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}\n{\"prompt\":\"c\"}\n",
    )
    .unwrap();
    fs::write(dir.path().join("commit"), "0123456789abcdef0123\n").unwrap();
    script(dir.path(), "dflash-bench", &format!("echo \"$@\" >>\"$0.calls\"\n{bench}"));
    script(dir.path(), "dflash-gen", &format!("echo \"$@\" >>\"$0.calls\"\n{GEN}"));
    let passes = "echo 'opened in 0.10 s: Properties'; echo 'on cuda'; echo 'test result: ok. 3 passed; 0 failed; 0 ignored'";
    script(dir.path(), "cuda", passes);
    script(dir.path(), "norm", passes);
    dir
}

/// The script of `pack`, with a folder `path` first on PATH.
fn command(pack: &Path, args: &[&str], path: Option<&Path>) -> Command {
    let mut command = Command::new(pack.join("gpu-report.sh"));
    command.args(args).stdin(Stdio::null()).env_remove("CUDA_VISIBLE_DEVICES").env_remove("CUDA_CACHE_PATH");
    command.env("HOME", pack);
    if let Some(path) = path {
        command.env("PATH", format!("{}:{}", path.display(), std::env::var("PATH").unwrap()));
    }
    command
}

fn report(pack: &Path, args: &[&str], path: Option<&Path>) -> Output {
    command(pack, args, path).output().unwrap()
}

/// The cells of the summary's row of a step: result, reason.
#[track_caller]
fn step<'a>(summary: &'a str, name: &str) -> (&'a str, &'a str) {
    let start = format!("| {name} | ");
    let rows: Vec<&str> = summary.lines().filter(|line| line.starts_with(&start)).collect();
    assert_eq!(rows.len(), 1, "{name} in {summary}");
    let cells: Vec<&str> = rows[0].split('|').map(str::trim).collect();
    assert_eq!(cells.len(), 6, "{}", rows[0]);
    (cells[2], cells[4])
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_report_of_steps_that_go_well() {
    let dir = pack(BENCH);
    script(
        dir.path(),
        "nvidia-smi",
        "[ \"$3\" = -q ] || { echo \"NVIDIA H200, 580.95\"; exit; }; echo all of it",
    );
    let done = report(dir.path(), &["--limit", "60"], Some(dir.path()));
    let summary = text(&done.stdout);
    assert_eq!(done.status.code(), Some(0), "{summary}{}", text(&done.stderr));
    // Where it is: the card, the day, the commit.
    let out = PathBuf::from(text(&done.stderr).trim());
    let name = out.file_name().unwrap().to_str().unwrap();
    assert!(name.starts_with("H200-20") && name.ends_with("-0123456789ab"), "{name}");
    assert_eq!(out.parent().unwrap(), fs::canonicalize(dir.path()).unwrap().join("results"));
    assert_eq!(fs::read_to_string(out.join("summary.md")).unwrap(), summary);
    assert!(summary.starts_with("# NVIDIA H200, 20") && summary.contains("\nDriver 580.95; "), "{summary}");
    for name in [
        "tests",
        "lossless-greedy",
        "lossless-sampled",
        "kernels-qwen3-8b",
        "round-qwen3-4b",
        "round-qwen3-8b",
    ] {
        assert_eq!(step(&summary, name), ("ok", ""));
    }
    assert!(summary.contains("    ok  cuda  0 s  3 passed; 0 failed\n    ok  norm  0 s"), "{summary}");
    assert!(
        summary.contains("Lossless, sampled: 32 tokens of 10 rounds identical, with all logits of 30 rows.")
    );
    assert!(summary.contains("| shown |\n| kernels-qwen3-8b.json |\n| round-qwen3-4b.json |\n| round-qwen3-8b.json |\n| generate-demo.json |"));
    assert!(summary.contains("\nAll steps went well, "), "{summary}");
    for name in [
        "report.html",
        "generate-demo.json",
        "logs/nvidia-smi-before.log",
        "logs/nvidia-smi-after.log",
        "tests/tests.log",
    ] {
        assert!(out.join(name).is_file(), "{name}");
    }
    assert!(!out.join(".scratch").exists());
    let calls = fs::read_to_string(dir.path().join("dflash-bench.calls")).unwrap();
    let calls: Vec<&str> = calls.lines().collect();
    assert_eq!(calls[0], "kernels --model qwen3-8b --rows 1,16,64,128 --context 1024 --device cuda --json");
    assert_eq!(
        calls[2],
        "round --model qwen3-8b --batch 1-8*2 --context 1024 --acceptance 4,6 --device cuda --json"
    );
    let calls = fs::read_to_string(dir.path().join("dflash-gen.calls")).unwrap();
    assert!(
        calls
            .lines()
            .all(|c| c.starts_with("--device cuda --prompts ")
                && c.contains(" -n 128 --check-lossless --json"))
    );
    // Another one of the same day and commit takes no place of the first.
    let done = report(dir.path(), &["--limit", "60"], Some(dir.path()));
    assert!(text(&done.stderr).trim().ends_with("-0123456789ab-2"), "{}", text(&done.stderr));
}

#[test]
fn what_fails_is_told_with_its_reason_and_the_rest_goes_on() {
    let bench = format!(
        "case $1 in\nkernels) echo 'dflash-bench: too little | memory' >&2; exit 5 ;;\n\
         round) printf '{{'; exit 6 ;;\ngenerate) exit 0 ;;\nesac\n{BENCH}"
    );
    let dir = pack(&bench);
    // A driver's tool that hangs, too, and no home to write to.
    script(dir.path(), "nvidia-smi", "sleep 100");
    script(dir.path(), "dflash-gen", &format!("echo \"cache $CUDA_CACHE_PATH\" >&2\n{GEN}"));
    script(dir.path(), "norm", "echo 'test a_norm_is_right ... FAILED'; echo 'on cuda'; exit 101");
    let out = dir.path().join("out");
    let mut command = command(dir.path(), &["--limit", "60", &out.display().to_string()], Some(dir.path()));
    let done = command.env("HOME", "/proc/none").output().unwrap();
    let summary = text(&done.stdout);
    assert_eq!(done.status.code(), Some(1), "{summary}");
    assert!(
        summary.starts_with("# unknown card, ")
            && summary.contains("Driver unknown, nvidia-smi does not say")
    );
    assert_eq!(step(&summary, "tests").0, "FAILED 1");
    assert!(summary.contains("    FAILED 101  norm  0 s"), "{summary}");
    assert_eq!(step(&summary, "lossless-greedy").0, "ok");
    assert_eq!(step(&summary, "kernels-qwen3-8b"), ("FAILED 5", "dflash-bench: too little / memory"));
    assert_eq!(step(&summary, "round-qwen3-8b").0, "FAILED 6");
    assert_eq!(step(&summary, "generate-demo"), ("FAILED 0", "printed nothing"));
    assert!(summary.contains("\nNOT all steps went well, ") && !summary.contains("shown"), "{summary}");
    // What a failed step printed is no record.
    assert!(!out.join("round-qwen3-4b.json").exists() && out.join("logs/round-qwen3-4b.out").is_file());
    let log = fs::read_to_string(out.join("logs/lossless-greedy.log")).unwrap();
    let cache = fs::canonicalize(&out).unwrap().join(".scratch/cache");
    assert!(log.contains(&format!("cache {}", cache.display())), "{log}");
}

#[test]
fn what_hangs_is_ended_with_its_children_and_leaves_time_for_the_rest() {
    // Deaf to the first signal, as its child.
    let hangs = "trap '' TERM; printf '{'; (while :; do sleep 0.2; done) & echo $! >\"$0.child\"; while :; do sleep 0.2; done";
    let dir = pack(&format!("[ $1 != kernels ] || {{ {hangs}; }}\n{BENCH}"));
    let out = dir.path().join("out").display().to_string();
    let done = report(dir.path(), &["--device", "emulator", "--limit", "12", &out], None);
    let summary = text(&done.stdout);
    assert_eq!(done.status.code(), Some(1), "{summary}");
    let (word, why) = step(&summary, "kernels-demo");
    assert!(word == "TOO LONG" && why.starts_with("ended after "), "{summary}");
    assert!(!Path::new(&out).join("kernels-demo.json").exists(), "half a record is none");
    assert!(summary.contains("| shown |"), "{summary}");
    let child = fs::read_to_string(dir.path().join("dflash-bench.child")).unwrap();
    let running = fs::read_to_string(format!("/proc/{}/stat", child.trim())).unwrap_or_default();
    assert!(running.is_empty() || running.contains(") Z "), "{running}");
}

#[test]
fn where_everything_hangs_steps_are_left_out() {
    let hangs = "trap '' TERM; while :; do sleep 0.2; done";
    let dir = pack(hangs);
    script(dir.path(), "dflash-gen", hangs);
    let out = dir.path().join("out").display().to_string();
    let done = report(dir.path(), &["--device", "emulator", "--limit", "10", &out], None);
    let summary = text(&done.stdout);
    assert_eq!((done.status.code(), step(&summary, "lossless-greedy").0), (Some(1), "TOO LONG"), "{summary}");
    assert_eq!(step(&summary, "generate-demo"), ("LEFT OUT", "no time left"));
    assert_eq!(step(&summary, "tests"), ("not here", "cargo test runs them on the emulator"));
    assert!(summary.contains("On the emulator: counters, no times."));
}

#[test]
fn records_that_cannot_be_shown_and_tests_that_are_not_there() {
    let dir = pack("[ $1 != show ] || { echo 'dflash-bench: a.json is damaged' >&2; exit 2; }; echo '{}'");
    fs::remove_file(dir.path().join("cuda")).unwrap();
    let done = report(dir.path(), &["--limit", "60", &dir.path().join("out").display().to_string()], None);
    let summary = text(&done.stdout);
    assert_eq!(done.status.code(), Some(1), "{summary}");
    assert_eq!(step(&summary, "tests").0, "LEFT OUT");
    assert_eq!(step(&summary, "generate-demo").0, "ok");
    assert!(
        summary.contains("The records could not be shown: dflash-bench: a.json is damaged\n"),
        "{summary}"
    );
}

#[test]
fn flags_are_refused_in_a_sentence() {
    let dir = pack(BENCH);
    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("mine"), "").unwrap();
    let (full, none) = (full.display().to_string(), dir.path().join("none").display().to_string());
    for (args, part) in [
        (&["--device", "cpu"][..], "--device is cpu, expected cuda or emulator"),
        (&["--device"], "--device has no value"),
        (&["--limit", "9"], "--limit is 9, expected 10 to 99999 seconds"),
        (&["--limit", "1e3"], "--limit is 1e3"),
        (&["--bin", &none], "which is no folder"),
        (&["--bin", &full], "has no dflash-gen"),
        (&["--gpu", "1"], "there is no flag --gpu"),
        (&["a", "b"], "OUT is given twice, a and b"),
        (&["--device", "emulator", &full], "has files in it, expected a new or an empty folder"),
        (&["--device", "emulator", "/proc/none"], "/proc/none cannot be made"),
    ] {
        let done = report(dir.path(), args, None);
        let err = text(&done.stderr);
        assert!(done.status.code() == Some(2) && done.stdout.is_empty(), "{args:?}: {done:?}");
        assert!(
            err.starts_with("gpu-report.sh: ") && err.lines().count() == 1 && err.contains(part),
            "{err}"
        );
    }
    assert!(fs::read_dir(&full).unwrap().count() == 1, "what is refused is not touched");
    let help = report(dir.path(), &["--help"], None);
    assert!(
        help.status.success()
            && text(&help.stdout).contains("--limit SECONDS")
            && !text(&help.stdout).contains('#')
    );
}

#[test]
fn a_check_of_the_tests_alone_ends_with_them() {
    let dir = pack(BENCH);
    let check = |args: &[&str]| {
        let mut command = Command::new(dir.path().join("gpu-check.sh"));
        command.args(args).stdin(Stdio::null()).output().unwrap()
    };
    let out = dir.path().join("checked").display().to_string();
    let done = check(&[&out, "60"]);
    let summary = text(&done.stdout);
    assert_eq!(done.status.code(), Some(0), "{summary}");
    assert!(
        summary.contains("ok  norm") && summary.contains("all passed") && !summary.contains("dflash-gen"),
        "{summary}"
    );
    for wrong in [&[][..], &[&out, "0"], &[&out, "x"], &[&out, "1", "2"]] {
        assert_eq!(check(wrong).status.code(), Some(2));
    }
}
