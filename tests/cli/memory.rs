//! Memory that `dflash-gen` needs on the CPU: peak resident memory, and runs with a limited address space.
#![cfg(target_os = "linux")]

use crate::support;
use crate::support::program;

use dflash::checkpoint::config::TargetConfig;
use program::{BINARY, Run, command, finish, flags, run, status};
use serde_json::{Value, json};
use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

const PROMPT: &str = "import os\nimport sys\n\ndef main(";

/// Runs `dflash-gen` with a limit on its address space, in KiB.
fn limited<A: AsRef<std::ffi::OsStr>>(kib: u64, args: impl IntoIterator<Item = A>) -> Run {
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(format!("ulimit -v {kib} && exec \"$0\" \"$@\""))
        .arg(BINARY)
        .args(["--device", "cpu"])
        .args(args);
    finish(command)
}

/// Reads up to `max_bytes` of stdout, waits for the end, and returns the peak resident memory in KiB.
fn peak_kib(mut command: Command, max_bytes: usize) -> u64 {
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::null()).stdin(Stdio::null()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let (mut peak, mut bytes, mut samples) = (0, 0, 0);
    let mut buffer = [0; 256];
    while bytes < max_bytes {
        match out.read(&mut buffer).unwrap() {
            0 => break,
            n => bytes += n,
        }
        if let Some(kib) = status(&child, "VmHWM") {
            peak = kib.trim_end_matches(" kB").parse().unwrap();
            samples += 1;
        }
    }
    drop(out);
    assert!(child.wait().unwrap().success());
    assert!(samples > 3, "memory was sampled only {samples} times");
    peak
}

#[test]
fn plan_reads_headers_only() {
    // 8 GB of weights in sparse files. The address space is large enough to map them once, but not to copy
    // them.
    let target = support::Target { vocab: 16_000_000, hidden: 256, layers: 40, ..Default::default() };
    let dir = tempfile::tempdir().unwrap();
    support::write_json(dir.path(), "config.json", &support::target_config(&target));
    let tensors = TargetConfig::open(&support::disk(dir.path())).unwrap().tensors();
    let (mut all, mut map) = (0, serde_json::Map::new());
    for (i, (name, shape)) in tensors.into_iter().enumerate() {
        let bytes = shape.iter().product::<usize>() * 2;
        let header = json!({&name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, bytes]}});
        let head = support::safetensors_raw(&header.to_string(), &[]);
        // With long names the plan is larger than a pipe, so the process still runs while its memory is
        // sampled.
        let shard = format!("{}-{i}.safetensors", "shard".repeat(40));
        let file = fs::File::create(dir.path().join(&shard)).unwrap();
        (&file).write_all(&head).unwrap();
        file.set_len((head.len() + bytes) as u64).unwrap();
        map.insert(name, shard.into());
        all += bytes;
    }
    support::write_json(dir.path(), "model.safetensors.index.json", &json!({"weight_map": map}));
    let args = ["--plan", "--json", "--draft", "none", "--target", dir.path().to_str().unwrap()];
    let plan = limited(12 << 20, args).json().remove(0);
    assert_eq!(plan["weight_bytes"], all);
    assert!(all > 8_000_000_000);
    assert_eq!(plan["drafter"], Value::Null);
    let kib = peak_kib(command(args), usize::MAX);
    assert!(kib <= 64 << 10, "{kib} KiB");
}

#[test]
fn the_demo_pair_runs_in_64_mib() {
    let kib = peak_kib(command([PROMPT, "-n", "1000", "--ignore-eos"]), usize::MAX);
    assert!(kib <= 64 << 10, "{kib} KiB");
}

#[test]
fn demo_pair_needs_less_address_space_than_the_largest_stack() {
    let expected = run([PROMPT, "-n", "20"]).done();
    assert_eq!(limited(440_000, [PROMPT, "-n", "20"]).done(), expected);
}

/// At every limit the run gives an answer or one line that says that memory is lacking, not an error about
/// the tokenizer file.
#[test]
fn too_little_address_space_for_the_tokenizer_is_a_memory_error() {
    for mib in (60..800).step_by(20) {
        let run = limited(mib << 10, [PROMPT, "-n", "2", "-q"]);
        let refused = run.code == 5 && run.err.starts_with("dflash-gen: not enough memory: ");
        assert!(run.code == 0 || refused && run.err.lines().count() == 1, "{mib} MiB: {run:?}");
    }
}

#[test]
fn kv_cache_of_a_long_answer_uses_memory_only_as_it_fills() {
    let target = support::Target { vocab: 258, eos: vec![], max_positions: 1 << 20, ..Default::default() };
    let drafter = support::Drafter { max_positions: 1 << 20, ..Default::default() };
    let pair = support::write_pair(&target, &drafter);
    // All positions together take over 2 GiB of keys and values.
    let mut command = command(flags(&pair));
    command.args(["hello", "--raw", "-n", "1000000"]);
    let kib = peak_kib(command, 3000);
    assert!(kib <= 64 << 10, "{kib} KiB");
}

#[test]
fn out_of_memory_for_the_kv_cache_gives_one_error_line() {
    let target = support::Target { max_positions: 16_000_000, ..Default::default() };
    let pair = support::write_pair(&target, &Default::default());
    let args = flags(&pair).into_iter().chain(["hello", "--raw", "-n", "15000000"].map(String::from));
    let run = limited(3 << 20, args);
    // 5 prompt tokens, 15000000 new ones and a block of 8, in tiles of 16 positions: 2 heads, each with 24
    // floats of keys and 32 of values per position.
    let (positions, tiles) = (15_000_013, 15_000_016usize);
    let bytes = 2 * tiles * (24 + 32) * 4;
    let sentence = format!(
        "dflash-gen: not enough memory: the KV cache of each layer needs {bytes} bytes for {positions} positions \
         (prompt and max_tokens)\n"
    );
    assert_eq!((run.code, run.out.as_str(), run.err), (5, "", sentence));
}
