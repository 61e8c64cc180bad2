//! The scripts in tools/: `gpu-report.sh` and `gpu-check.sh`, `records.py`, and `acceptance.py`. Shell
//! scripts that succeed, fail or hang replace the programs, so no GPU is needed.
#![cfg(target_os = "linux")]

use crate::support::bench;
use crate::support::program;
use crate::support::software_gpu;

use bench::schema_violation;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;

/// A `dflash-bench` whose commands all succeed.
const BENCH: &str = r#"case $1 in
show) shift; printf '| shown |\n'
    for arg; do [ "$before" != --report ] || echo '<html>' >"$arg"; before=$arg; printf '| %s |\n' "${arg##*/}"; done ;;
*) echo '{"schema":"dflash-bench/1"}' ;;
esac"#;
/// A `dflash-gen` that succeeds.
const GEN: &str = r#"echo '{"tokens":32,"rounds":10,"compared":30,"prompts":[{"tokens":7}]}'"#;

fn tool(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools").join(name)
}

/// Writes an executable shell script.
fn script(dir: &Path, name: &str, text: &str) {
    let path = dir.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A test program that passes on a GPU.
const PASSES: &str =
    "echo 'opened in 0.10 s: Properties'; echo 'test result: ok. 3 passed; 0 failed; 0 ignored'";

/// A folder like that of tools/gpu-pack.sh, with the script `bench` as dflash-bench and tests that pass.
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
    script(dir.path(), "kernels", PASSES);
    dir
}

/// The gpu-report.sh of `pack`, with the folder `path` first on PATH.
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

/// The result and the reason in the summary's row for a step.
#[track_caller]
fn step<'a>(summary: &'a str, name: &str) -> (&'a str, &'a str) {
    let start = format!("| {name} | ");
    let rows: Vec<&str> = summary.lines().filter(|line| line.starts_with(&start)).collect();
    assert_eq!(rows.len(), 1, "{name} in {summary}");
    let cells: Vec<&str> = rows[0].split('|').map(str::trim).collect();
    assert_eq!(cells.len(), 6, "{}", rows[0]);
    (cells[2], cells[4])
}

/// Waits up to 10 s for the process whose id is in `file` to end, and fails if it does not.
#[track_caller]
fn assert_ended(file: &Path) {
    let stat = format!("/proc/{}/stat", fs::read_to_string(file).unwrap().trim());
    let ended = || fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "));
    let tries = (0..500).take_while(|_| !ended()).map(|_| std::thread::sleep(Duration::from_millis(20)));
    assert!(tries.count() < 500, "{stat} still exists");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn a_report_of_successful_steps_is_complete() {
    let dir = pack(BENCH);
    script(
        dir.path(),
        "nvidia-smi",
        "[ \"$3\" = -q ] || { echo \"NVIDIA H200, 580.95\"; exit; }; echo all of it",
    );
    let done = report(dir.path(), &["--limit", "60"], Some(dir.path()));
    let summary = text(&done.stdout);
    assert_eq!(done.status.code(), Some(0), "{summary}{}", text(&done.stderr));
    // The folder's name has the card, the day and the commit.
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
    assert!(
        summary.contains("    ok  kernels/cuda  0 s  3 passed; 0 failed\n    ok  kernels/pack  0 s"),
        "{summary}"
    );
    assert!(
        summary.contains("Lossless, sampled: 32 tokens of 10 rounds identical, with all logits of 30 rows.")
    );
    let records = ["kernels-qwen3-8b", "round-qwen3-4b", "round-qwen3-8b", "generate-demo"];
    let shown = records.map(|name| format!("| {name}.json |\n")).concat();
    assert!(summary.contains(&format!("| shown |\n{shown}")), "{summary}");
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
    // A second report on the same day and commit does not overwrite the first.
    let done = report(dir.path(), &["--limit", "60"], Some(dir.path()));
    assert!(text(&done.stderr).trim().ends_with("-0123456789ab-2"), "{}", text(&done.stderr));
}

#[test]
fn a_report_in_a_checkout_runs_the_newest_test_programs() {
    let packed = pack(BENCH);
    let root = tempfile::tempdir().unwrap();
    let [tools, data, deps] = ["tools", "tests/data", "target/release/deps"].map(|dir| root.path().join(dir));
    for dir in [&tools, &data, &deps] {
        fs::create_dir_all(dir).unwrap();
    }
    let moved = [
        ("gpu-report.sh", tools.join("gpu-report.sh")),
        ("gpu-check.sh", tools.join("gpu-check.sh")),
        ("prompts.jsonl", data.join("prompts.jsonl")),
        ("dflash-gen", deps.with_file_name("dflash-gen")),
        ("dflash-bench", deps.with_file_name("dflash-bench")),
        ("kernels", deps.join("kernels-0123456789abcdef")),
    ];
    for (name, to) in moved {
        fs::rename(packed.path().join(name), to).unwrap();
    }
    script(root.path(), "nvidia-smi", "echo \"NVIDIA H200, 580.95\"");
    let out = root.path().join("out").display().to_string();
    let done = report(&tools, &["--limit", "60", &out], Some(root.path()));
    let summary = text(&done.stdout);
    assert_eq!(done.status.code(), Some(0), "{summary}{}", text(&done.stderr));
    assert_eq!(step(&summary, "tests"), ("ok", ""));
}

#[test]
fn a_failed_step_is_reported_and_the_others_run() {
    let bench = format!(
        "case $1 in\nkernels) echo 'dflash-bench: too little | memory' >&2; exit 5 ;;\n\
         round) printf '{{'; exit 6 ;;\ngenerate) exit 0 ;;\nesac\n{BENCH}"
    );
    let dir = pack(&bench);
    // nvidia-smi hangs, and HOME is not writable.
    script(dir.path(), "nvidia-smi", "sleep 100");
    script(dir.path(), "dflash-gen", &format!("echo \"cache $CUDA_CACHE_PATH\" >&2\n{GEN}"));
    let fails = "echo 'test norm::a_norm_is_right ... FAILED'; echo 'on cuda'; exit 101";
    script(dir.path(), "kernels", &format!("case \"$*\" in *norm*) {fails} ;; esac\n{PASSES}"));
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
    assert!(summary.contains("    FAILED 101  kernels/norm  "), "{summary}");
    assert_eq!(step(&summary, "lossless-greedy").0, "ok");
    assert_eq!(step(&summary, "kernels-qwen3-8b"), ("FAILED 5", "dflash-bench: too little / memory"));
    assert_eq!(step(&summary, "round-qwen3-8b").0, "FAILED 6");
    assert_eq!(step(&summary, "generate-demo"), ("FAILED 0", "printed nothing"));
    assert!(summary.contains("\nNOT all steps went well, ") && !summary.contains("shown"), "{summary}");
    // The output of a failed step is not a record.
    assert!(!out.join("round-qwen3-4b.json").exists() && out.join("logs/round-qwen3-4b.out").is_file());
    let log = fs::read_to_string(out.join("logs/lossless-greedy.log")).unwrap();
    let cache = fs::canonicalize(&out).unwrap().join(".scratch/cache");
    assert!(log.contains(&format!("cache {}", cache.display())), "{log}");
}

/// Both wait for limits most of the time.
#[test]
fn a_limit_of_time_ends_steps() {
    std::thread::scope(|scope| {
        scope.spawn(a_hanging_step_is_killed_with_its_children);
        scope.spawn(steps_without_time_are_left_out);
    });
}

fn a_hanging_step_is_killed_with_its_children() {
    // The step and its child ignore SIGTERM.
    let hangs = "trap '' TERM; printf '{'; (while :; do sleep 0.2; done) & echo $! >\"$0.child\"; wait";
    let dir = pack(&format!("[ $1 != kernels ] || {{ {hangs}; }}\n{BENCH}"));
    let out = dir.path().join("out").display().to_string();
    let done = report(dir.path(), &["--device", "softgpu", "--limit", "12", &out], None);
    let summary = text(&done.stdout);
    assert_eq!(done.status.code(), Some(1), "{summary}");
    let (word, why) = step(&summary, "kernels-demo");
    assert!(word == "TOO LONG" && why.starts_with("ended after "), "{summary}");
    assert!(!Path::new(&out).join("kernels-demo.json").exists(), "an incomplete record was kept");
    assert!(step(&summary, "generate-demo").0 == "ok" && summary.contains("| shown |"), "{summary}");
    assert_ended(&dir.path().join("dflash-bench.child"));
}

fn steps_without_time_are_left_out() {
    let hangs = "trap '' TERM; while :; do sleep 0.2; done";
    let dir = pack(hangs);
    script(dir.path(), "dflash-gen", hangs);
    let out = dir.path().join("out").display().to_string();
    let done = report(dir.path(), &["--device", "softgpu", "--limit", "10", &out], None);
    let summary = text(&done.stdout);
    assert_eq!((done.status.code(), step(&summary, "lossless-greedy").0), (Some(1), "TOO LONG"), "{summary}");
    assert_eq!(step(&summary, "generate-demo"), ("LEFT OUT", "no time left"));
    assert_eq!(step(&summary, "tests"), ("not here", "cargo test runs them"));
    assert!(summary.contains("On the software GPU: counters, no times."));
}

#[test]
fn a_report_names_unshown_records_and_missing_tests() {
    let dir = pack("[ $1 != show ] || { echo 'dflash-bench: a.json is damaged' >&2; exit 2; }; echo '{}'");
    fs::remove_file(dir.path().join("kernels")).unwrap();
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
fn invalid_flags_are_refused_with_one_error_line() {
    let dir = pack(BENCH);
    let full = dir.path().join("full");
    fs::create_dir(&full).unwrap();
    fs::write(full.join("mine"), "").unwrap();
    let (full, none) = (full.display().to_string(), dir.path().join("none").display().to_string());
    for (args, part) in [
        (&["--device", "cpu"][..], "--device is cpu, expected cuda or softgpu"),
        (&["--device"], "--device has no value"),
        (&["--limit", "9"], "--limit is 9, expected 10 to 99999 seconds"),
        (&["--limit", "1e3"], "--limit is 1e3"),
        (&["--bin", &none], "which is not a folder"),
        (&["--bin", &full], "has no dflash-gen"),
        (&["--gpu", "1"], "there is no flag --gpu"),
        (&["a", "b"], "OUT is given twice, a and b"),
        (&["--device", "softgpu", &full], "has files in it, expected a new or an empty folder"),
        (&["--device", "softgpu", "/proc/none"], "/proc/none cannot be created"),
    ] {
        let done = report(dir.path(), args, None);
        let err = text(&done.stderr);
        assert!(done.status.code() == Some(2) && done.stdout.is_empty(), "{args:?}: {done:?}");
        assert!(
            err.starts_with("gpu-report.sh: ") && err.lines().count() == 1 && err.contains(part),
            "{err}"
        );
    }
    assert!(fs::read_dir(&full).unwrap().count() == 1, "a refused folder was changed");
    let help = report(dir.path(), &["--help"], None);
    assert!(
        help.status.success()
            && text(&help.stdout).contains("--limit SECONDS")
            && !text(&help.stdout).contains('#')
    );
}

#[test]
fn gpu_check_with_a_time_limit_runs_only_the_tests() {
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
        summary.contains("ok  kernels/norm")
            && summary.contains("all passed")
            && !summary.contains("dflash-gen"),
        "{summary}"
    );
    for wrong in [&[][..], &[&out, "0"], &[&out, "x"], &[&out, "1", "2"]] {
        assert_eq!(check(wrong).status.code(), Some(2));
    }
}

/// A filter that matches no test would make its sanitizer check nothing.
#[test]
fn tests_named_by_gpu_check_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let check = fs::read_to_string(root.join("tools/gpu-check.sh")).unwrap();
    let source = |test: &str| fs::read_to_string(root.join(format!("tests/{test}.rs"))).unwrap();
    let loops = check.lines().find_map(|line| line.strip_prefix("for test in ")?.strip_suffix("; do"));
    assert!(loops.unwrap().split(' ').all(|test| source(test).contains("#[test]")));
    let mut tools = BTreeMap::new();
    for call in check.lines().filter_map(|line| line.trim().strip_prefix("checker ")) {
        let [tool, module, filters @ ..] = &call.split(' ').collect::<Vec<_>>()[..] else { panic!("{call}") };
        let source = source(&format!("kernels/{module}"));
        let named =
            |filter: &&str| source.lines().any(|line| line.starts_with("fn ") && line.contains(*filter));
        assert!(!filters.is_empty() && filters.iter().all(named), "{call}");
        *tools.entry(*tool).or_insert(0) += 1;
    }
    assert_eq!(tools.into_keys().collect::<Vec<_>>(), ["initcheck", "memcheck", "racecheck", "synccheck"]);
}

#[test]
fn an_interrupted_report_says_so_and_ends_its_processes() {
    let dir = pack(BENCH);
    script(dir.path(), "dflash-gen", "echo $$ >\"$0.child\"; exec sleep 1000");
    let (out, child) = (dir.path().join("out"), dir.path().join("dflash-gen.child"));
    let mut command = command(dir.path(), &["--device", "softgpu", &out.display().to_string()], None);
    let mut report = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    // Wait until the child has started and written its id.
    while fs::read_to_string(&child).unwrap_or_default().is_empty() {
        assert!(report.try_wait().unwrap().is_none(), "the report ended before the signal");
        std::thread::yield_now();
    }
    assert!(Command::new("kill").args(["-TERM", &report.id().to_string()]).status().unwrap().success());
    assert_eq!(report.wait().unwrap().code(), Some(130));
    assert_ended(&child);
    assert!(fs::read_to_string(out.join("summary.md")).unwrap().ends_with("\ninterrupted\n"));
    assert!(!out.join(".scratch").exists());
}

// ---- records of tools in Python ----

/// Evaluates a Python expression with tools/records.py imported and `input` as `given`. Returns its value, or
/// the last line of the error.
fn try_python(code: &str, input: &Value) -> Result<Value, String> {
    let all =
        "import json, sys; from records import *; given = json.loads(sys.argv[1]); print(json.dumps(CODE))";
    let mut command = Command::new("python3");
    command.args(["-B", "-c", &all.replace("CODE", code), &input.to_string()]).env("PYTHONPATH", tool(""));
    let done = command.output().unwrap();
    match done.status.success() {
        true => Ok(serde_json::from_slice(&done.stdout).unwrap()),
        false => Err(text(&done.stderr).lines().last().unwrap_or_default().to_string()),
    }
}

/// [`try_python`] for an expression that must succeed.
fn python(code: &str, input: &Value) -> Value {
    try_python(code, input).unwrap()
}

#[test]
fn python_rows_fit_the_schema() {
    let samples = [3.0, 1.0, 2.0, 10.0, 4.0, 2.5];
    let code = "[row('AR step', {'context': 64, 'batch': 2}, given, [3, 3], numbers={'GB': 1.5}), \
                row('round', {'context': 64, 'batch': 2, 'block': 16}, given, [3, 3])]";
    let rows = python(&format!("[*{code}, *rates({code}, [4, 6.5])]"), &json!(samples));
    let mut record: Value = serde_json::from_str(&bench::bench(["roofline", "--json"]).done()).unwrap();
    record["rows"] = rows;
    assert_eq!(schema_violation(&record), None);
    let row = bench::row(&record, "AR step", json!({ "context": 64, "batch": 2 }));
    for (name, q) in [("median", 0.5), ("p10", 0.1), ("p90", 0.9)] {
        assert_eq!(row[name].as_f64(), dflash::perf::statistics::quantile(&samples, q), "{name}");
    }
    let ar = bench::row(&record, "autoregressive decoding", json!({ "context": 64, "batch": 2 }));
    assert_eq!(ar["samples"][3], 200.0);
    assert_eq!((&ar["unit"], &ar["better"]), (&json!("tok/s"), &json!("higher")));
    let at = json!({ "context": 64, "batch": 2, "block": 16, "acceptance": 6.5 });
    assert_eq!(bench::row(&record, "DFlash, synthetic acceptance", at)["samples"][3], 1300.0);
    assert_eq!(record["rows"].as_array().unwrap().len(), 5);
}

#[test]
fn records_of_one_command_are_merged_in_order() {
    let run = |samples: [f64; 2], throttled: Value, speed: Value| {
        json!({
            "machine": { "after": samples[0] },
            "rows": [
                { "name": "counted", "parameters": {}, "samples": null, "rounds": null, "median": 7, "numbers": { "a": 1 } },
                {
                    "name": "x", "parameters": { "batch": 1 }, "samples": samples, "rounds": [2],
                    "throttled": throttled, "median": 0, "numbers": { "GB/s": speed, "GB": 3 },
                },
                { "name": "x", "parameters": { "batch": 2 }, "samples": samples, "rounds": null, "numbers": {} },
            ],
        })
    };
    let runs = [
        run([1.0, 2.0], json!([0]), json!(5)),
        run([4.0, 8.0], json!([]), json!(9)),
        run([3.0, 5.0], json!([0]), json!(6)),
    ];
    let whole = python("merged(given)", &json!(runs));
    let rows = whole["rows"].as_array().unwrap();
    assert_eq!((rows.len(), &rows[0]["median"], &rows[0]["samples"]), (3, &json!(7), &json!(null)));
    assert_eq!(rows[1]["samples"], json!([1.0, 2.0, 4.0, 8.0, 3.0, 5.0]));
    assert_eq!((&rows[1]["rounds"], &rows[1]["throttled"]), (&json!([2, 2, 2]), &json!([0, 2])));
    assert_eq!((&rows[1]["median"], &rows[1]["p90"]), (&json!(3.5), &json!(6.5)));
    assert_eq!(rows[1]["numbers"], json!({ "GB/s": 6.0, "GB": 3.0 }));
    assert_eq!((&rows[2]["rounds"], &rows[2]["throttled"]), (&json!(null), &json!(null)));
    assert_eq!(whole["machine"]["after"], 3.0);
    // A number that is unknown in one run is unknown in the merged record.
    let unknown = python("merged(given)", &json!([run([1.0, 2.0], json!(null), json!(null)), runs[1]]));
    assert_eq!(unknown["rows"][1]["numbers"], json!({ "GB/s": null, "GB": 3.0 }));
}

#[test]
fn python_parses_number_lists_like_dflash_bench() {
    let lists = ["4", "1-4,16", "1-16+5", "1-15+5", "512-32768*2", "5-100*3,7-7", "1.5,2-3+0.25"];
    let read = python("[numbers(text) for text in given]", &json!(lists));
    assert_eq!(read[1], json!([1, 2, 3, 4, 16]));
    assert_eq!((&read[2], &read[3]), (&json!([1, 6, 11, 16]), &json!([1, 6, 11])));
    assert_eq!(read[4], json!([512, 1024, 2048, 4096, 8192, 16384, 32768]));
    assert_eq!((&read[5], &read[6]), (&json!([5, 15, 45, 7]), &json!([1.5, 2, 2.25, 2.5, 2.75, 3])));
    for wrong in [
        "", "1,", "x", "-4", "1-", "4-1", "1-4+0", "1-8*1", "0-8*2", "0", "1e3", "1-9-2", "1-2+3*4", "inf",
        "1-2000", "1_0",
    ] {
        let error = try_python("numbers(given)", &json!(wrong)).unwrap_err();
        assert!(error.contains("ArgumentTypeError: "), "{wrong:?}: {error}");
    }
    assert_eq!(python("wholes(given)", &json!("2,3")), json!([2, 3]));
    assert!(try_python("wholes(given)", &json!("2.5")).unwrap_err().contains("expected whole numbers"));
}

#[test]
fn a_report_on_the_software_gpu_runs_the_real_programs() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let bin = Path::new(env!("CARGO_BIN_EXE_dflash-bench")).parent().unwrap();
    let mut command = Command::new(tool("gpu-report.sh"));
    command.args(["--device", "softgpu", "--bin"]).arg(bin).arg(&out).stdin(Stdio::null());
    software_gpu::install(&mut command);
    let done = command.output().unwrap();
    assert_eq!(done.status.code(), Some(0), "{}{}", text(&done.stdout), text(&done.stderr));
    for name in ["kernels-demo", "round-demo", "generate-demo"] {
        let record: Value =
            serde_json::from_slice(&fs::read(out.join(name).with_extension("json")).unwrap()).unwrap();
        assert_eq!((schema_violation(&record), &record["machine"]["device"]), (None, &json!("softgpu")));
    }
    assert!(out.join("report.html").is_file());
}

// ---- tools/acceptance.py ----

/// Runs tools/acceptance.py with the programs in `bin`.
fn acceptance(bin: &Path, args: &[&str]) -> Output {
    let mut command = Command::new("python3");
    command.arg("-B").arg(tool("acceptance.py")).arg("--bin").arg(bin).args(args).stdin(Stdio::null());
    command.output().unwrap()
}

/// The cells of all tables by row and column, without the headings.
fn tables(out: &str) -> Vec<Vec<Vec<&str>>> {
    out.split("\n\n")
        .map(|table| {
            let rows = table.lines().skip(2);
            rows.map(|row| row.trim_matches('|').split('|').map(str::trim).collect()).collect()
        })
        .collect()
}

/// The sum of a field over all rounds of all records, and the number of rounds.
fn sum(records: &[Value], field: &str) -> (f64, f64) {
    let all = records.iter().flat_map(|record| record[field].as_array().unwrap());
    all.fold((0.0, 0.0), |(sum, count), n| (sum + n.as_f64().unwrap(), count + 1.0))
}

#[test]
fn acceptance_tables_match_the_programs() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = program::write(
        dir.path(),
        "prompts.jsonl",
        "{\"prompt\":\"import os\\n\"}\n{\"prompt\":\"def main(\"}\n",
    );
    let bin = Path::new(env!("CARGO_BIN_EXE_dflash-gen")).parent().unwrap();
    let common = ["--prompts", &prompts, "-n", "24"];
    let more = ["--tree", "4,8", "--temperature", "0,1", "--seed", "1-2", "--context", "64"];
    let done = acceptance(bin, &[&common[..], &more].concat());
    let (out, err) = (text(&done.stdout), text(&done.stderr));
    assert_eq!(done.status.code(), Some(0), "{err}");
    let all = tables(&out);
    let roofline = bench::record(0, &["roofline", "--context", "64", "--tree", "4,8,16,64,128,256"]);
    let ms = |rows: u32| {
        let at = json!({ "context": 64, "batch": 1, "tree": rows });
        bench::row(&roofline, "round", at)["median"].as_f64().unwrap()
    };
    let ar_ms =
        bench::row(&roofline, "AR step", json!({ "context": 64, "batch": 1 }))["median"].as_f64().unwrap();
    let rate = |tau: f64, rows: u32| {
        [format!("{:.0}", 1e3 * tau / ms(rows)), format!("{:.2}", tau * ar_ms / ms(rows))]
    };

    // Compare each row of the first table with runs of dflash-gen.
    let mut rows = all[0].iter();
    let mut tree_rates: Vec<(f64, u32)> = vec![];
    for (temperature, seeds) in [("0", &["1"][..]), ("1", &["1", "2"])] {
        let answers = |seed: &str, flags: &[&str]| {
            let at = ["--json", "-q", "--temperature", temperature, "--seed", seed];
            program::run([&common[..], &at, flags].concat())
        };
        let ar: Vec<_> = seeds.iter().flat_map(|seed| answers(seed, &["--draft", "none"]).json()).collect();
        for (method, trees, flags) in [
            ("match", true, &[][..]),
            ("match, coupled", false, &["--coupled"]),
            ("match, coupled, drafts at T/2", false, &["--coupled", "--draft-temperature", "0.5"]),
            ("rejection", true, &["--verify", "rejection"]),
            ("rejection, drafts at T/2", false, &["--verify", "rejection", "--draft-temperature", "0.5"]),
            ("block", true, &["--verify", "block"]),
        ] {
            if temperature == "0" && method != "match" {
                continue;
            }
            for tree in if trees { &[None, Some("4"), Some("8")][..] } else { &[None] } {
                let tree_flags = tree.map_or(vec![], |tree| vec!["--tree", tree]);
                let runs: Vec<_> =
                    seeds.iter().map(|seed| answers(seed, &[flags, &tree_flags].concat())).collect();
                let shape = tree.map_or("chain of 16".to_string(), |tree| format!("tree of {tree}"));
                if let 2 | 4 = runs[0].code {
                    assert!(err.contains(&format!("left out: {method}, {shape}: dflash-gen: ")), "{err}");
                    continue;
                }
                let runs: Vec<_> = runs.into_iter().map(program::Run::json).collect();
                let row = rows.next().unwrap();
                assert_eq!(row[..3], [temperature, &shape, method]);
                let taus: Vec<f64> =
                    runs.iter().map(|records| sum(records, "accepted")).map(|(n, of)| n / of).collect();
                let tau = taus.iter().sum::<f64>() / taus.len() as f64;
                // The standard error of two numbers is half their difference.
                let expected = match taus[..] {
                    [_] => format!("{tau:.3}"),
                    _ => format!("{tau:.3} ± {:.3}", (taus[0] - taus[1]).abs() / 2.0),
                };
                assert_eq!(row[3], expected, "{row:?}");
                let records = runs.concat();
                let drafts = sum(&records, "drafted").0 / sum(&records, "accepted").0;
                assert_eq!(row[4], format!("{drafts:.1}"), "{row:?}");
                let num_identical =
                    records.iter().zip(&ar).filter(|(own, ar)| own["tokens"] == ar["tokens"]).count();
                let identical = format!("{num_identical} of {}", ar.len());
                assert_eq!(row[5], if method.starts_with("match") { &identical } else { "" }, "{row:?}");
                let rows = tree.map_or(16, |tree| tree.parse().unwrap());
                assert_eq!(row[6..], rate(tau, rows), "{row:?}");
                if (method, tree.is_some()) == ("match", true) {
                    tree_rates.push((tau / ms(rows), rows));
                }
                if (method, *tree) == ("match", None) {
                    let row = all[1].iter().find(|row| row[0] == temperature).unwrap();
                    let accepted: Vec<u64> = records
                        .iter()
                        .flat_map(|record| record["accepted"].as_array().unwrap())
                        .map(|n| n.as_u64().unwrap())
                        .collect();
                    let rounds_beyond = |n: u64| accepted.iter().filter(|a| **a > n).count() as f64;
                    let reached: Vec<f64> = (0..15)
                        .take_while(|n| rounds_beyond(*n) > 0.0)
                        .map(|n| rounds_beyond(n + 1) / rounds_beyond(n))
                        .collect();
                    let expected_rates: Vec<_> = reached.iter().map(|p| format!("{p:.2}")).collect();
                    assert_eq!(row[1], expected_rates.join(" "));
                    let curve: Vec<_> = reached.iter().map(|p| format!("{p:.6}")).collect();
                    let model =
                        bench::record(0, &["roofline", "--context", "64", "--curve", &curve.join(",")]);
                    let at = json!({ "context": 64, "batch": 1 });
                    let model = bench::row(&model, "DFlash, cheapest chain of the curve", at);
                    let number = |name: &str| model["numbers"][name].as_f64().unwrap();
                    let (tokens, speed) = (number("tokens"), number("speed-up"));
                    let best = format!("{:.0}", model["median"].as_f64().unwrap());
                    assert_eq!(
                        row[2..6],
                        [
                            format!("{}", number("drafts")),
                            format!("{tokens:.3}"),
                            best,
                            format!("{speed:.2}")
                        ]
                    );
                }
            }
        }
    }
    assert!(rows.next().is_none(), "{out}");
    for (row, trees) in all[1].iter().zip(tree_rates.chunks(2)) {
        let (best, rows) = if trees[0].0 > trees[1].0 { trees[0] } else { trees[1] };
        assert_eq!(row[6..], [rows.to_string(), format!("{:.0}", 1e3 * best)]);
    }

    for (set, temperature, tau, published, tree_tau, tree_published) in [
        ("MATH-500", "0", 7.79, "7.79, 5.56", 10.73, "10.73, 7.52"),
        ("MT-Bench", "1", 3.77, "3.77, 2.30", 6.02, "6.02, 3.75"),
    ] {
        let row = all[2].iter().find(|row| row[..2] == [set, temperature]).unwrap();
        assert_eq!((row[2], row[4], row[6]), (published, "15", tree_published));
        let probability: f64 = row[3].parse().unwrap();
        let tokens = |p: f64| (0..16).map(|i| p.powi(i)).sum::<f64>();
        assert!(tokens(probability - 0.005) < tau && tau < tokens(probability + 0.005), "{row:?}");
        assert_eq!(row[5], rate(tau, 16).join(", "));
        for (cell, rows) in row[7..].iter().zip([64, 128, 256]) {
            assert_eq!(*cell, rate(tree_tau, rows).join(", "));
        }
    }
}

#[test]
fn acceptance_fails_if_a_text_differs() {
    let dir = tempfile::tempdir().unwrap();
    symlink(env!("CARGO_BIN_EXE_dflash-bench"), dir.path().join("dflash-bench")).unwrap();
    let acceptance_with_tree = |tree: &str| {
        let text = format!(
            "case \"$*\" in\n\
             *'--draft none'*) echo '{{\"tokens\":[1,2,3],\"accepted\":[1,1],\"drafted\":[0,0]}}' ;;\n\
             *--tree*) {tree} ;;\n\
             *'--verify block'*) echo 'dflash-gen: not here' >&2; exit 4 ;;\n\
             *'--seed 2'*) echo '{{\"tokens\":[1,2,3],\"accepted\":[3,1],\"drafted\":[15,9]}}' ;;\n\
             *) echo '{{\"tokens\":[1,2,3],\"accepted\":[2,1],\"drafted\":[15,15]}}' ;;\nesac"
        );
        script(dir.path(), "dflash-gen", &text);
        let small = ["--model", "demo", "--context", "64"];
        acceptance(
            dir.path(),
            &[&["--tree", "8", "--temperature", "1", "--seed", "1,2"], &small[..]].concat(),
        )
    };
    let done = acceptance_with_tree("echo '{\"tokens\":[1,2,4],\"accepted\":[2],\"drafted\":[7]}'");
    let (out, err) = (text(&done.stdout), text(&done.stderr));
    assert_eq!(done.status.code(), Some(1), "{out}{err}");
    let rows = &tables(&out)[0];
    assert_eq!(rows[0][..6], ["1", "chain of 16", "match", "1.750 ± 0.250", "7.7", "2 of 2"]);
    assert_eq!(rows[1][..6], ["1", "tree of 8", "match", "2.000 ± 0.000", "3.5", "0 of 2"]);
    // `rejection` does not give the text of AR decoding, so the two are not compared.
    assert_eq!((rows[5][..3].join(" "), rows[5][5]), ("1 tree of 8 rejection".into(), ""));
    assert!(rows.iter().all(|row| row[1..3] != ["chain of 16", "block"]), "{out}");
    assert!(err.contains("left out: block: dflash-gen: not here\n"), "{err}");
    assert_eq!(tables(&out)[1][0][1], "0.50 0.50 0.00");
    // The demo model is so small that each row of the tree changes the roofline.
    let roofline = bench::record(0, &["roofline", "--model", "demo", "--context", "64", "--tree", "8"]);
    let round = bench::row(&roofline, "round", json!({ "context": 64, "batch": 1, "tree": 8 }));
    let rate = format!("{:.0}", 2e3 / round["median"].as_f64().unwrap());
    assert_eq!((rows[1][6], tables(&out)[1][0][7]), (rate.as_str(), rate.as_str()));
    assert_eq!(tables(&out).len(), 2, "published numbers are shown for a model that they do not belong to");

    // Any error other than a refusal ends the script with its exit code and sentence.
    let done = acceptance_with_tree("echo 'dflash-gen: too little memory' >&2; exit 5");
    assert_eq!((done.status.code(), text(&done.stderr)), (Some(5), "dflash-gen: too little memory\n".into()));
    assert!(done.stdout.is_empty());
    let done = acceptance(&dir.path().join("none"), &[]);
    assert_eq!((done.status.code(), done.stdout.len()), (Some(2), 0));
    assert!(text(&done.stderr).starts_with("--bin has no dflash-bench: "), "{}", text(&done.stderr));
}
