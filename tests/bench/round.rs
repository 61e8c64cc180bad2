//! `dflash-bench round`: counters on the software GPU, times on the CPU.

use crate::support;
use crate::support::bench;
use crate::support::library;
use crate::support::program;

use bench::{bench, record, refused, row};
use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::memory::{MemoryPlan, Overhead};
use library::library;
use program::finish;
use serde_json::{Value, json};
use std::process::Command;

const PARTS: [&str; 5] = ["begin", "inject", "draft", "verify", "accept"];
const COUNTS: [&str; 7] = ["launches", "blocks", "streamed", "read", "written", "mma", "conflicts"];

fn round(args: &[&str]) -> Value {
    record(0, &[&["round", "--device", "cuda"], args].concat())
}

/// The value and the counters of the row with these parameters.
fn counts(found: &Value, name: &str, parameters: Value) -> Vec<u64> {
    let row = row(found, name, parameters);
    assert_eq!(
        (&row["kind"], &row["unit"], &row["samples"]),
        (&json!("counted"), &json!("bytes"), &json!(null))
    );
    let value = row["median"].as_f64().unwrap();
    let numbers = COUNTS.map(|key| row["numbers"][key].as_u64().unwrap());
    assert_eq!(value, (numbers[2] + numbers[3] + numbers[4]) as f64);
    [&[value as u64][..], &numbers].concat()
}

/// Launches of a round of the demo pair in blocks of 16, from `dflash-gen --plan`.
fn planned(batch: usize, temperature: &str, ctx: &str) -> u64 {
    let batch = batch.to_string();
    let flags =
        ["--plan", "--launches", "--json", "--batch", &batch, "--temperature", temperature, "--ctx", ctx];
    let run = program::run(flags);
    serde_json::from_str::<Value>(&run.done()).unwrap()["launches"].as_u64().unwrap()
}

/// Checks that the parts add up to the round, and returns the round's counters.
fn checked_round(found: &Value, at: &Value) -> Vec<u64> {
    let parts = PARTS.map(|part| counts(found, part, at.clone()));
    let all = counts(found, "round", at.clone());
    let sum: Vec<u64> = (0..all.len()).map(|i| parts.iter().map(|part| part[i]).sum()).collect();
    assert_eq!(sum, all);
    assert!(parts.iter().all(|part| part[0] > 0));
    all
}

#[test]
fn the_parts_of_every_round_add_up() {
    let found = round(&["--model", "demo", "--batch", "1,2", "--context", "8,72"]);
    assert_eq!((&found["command"], &found["machine"]["device"]), (&json!("round"), &json!("softgpu")));
    assert_eq!(found["machine"]["card"], "software GPU (h200)");
    assert_eq!(found["model"], json!({ "target": "demo/target", "drafter": "demo/drafter" }));
    // An AR step, the round and its five parts.
    assert_eq!(found["rows"].as_array().unwrap().len(), 4 * 7);
    let mut grid = vec![];
    for batch in [1, 2] {
        for context in [8, 72] {
            let at = json!({ "context": context, "batch": batch, "block": 16 });
            let all = checked_round(&found, &at);
            assert_eq!(all[1], planned(batch, "0", "256"));
            let step = counts(&found, "AR step", json!({ "context": context, "batch": batch }));
            assert!(step[1] < all[1] && step[0] < all[0]);
            grid.push((all, step));
        }
    }
    assert_eq!(grid[0].0[1], 67);
    // A longer context reads the keys and values of 64 more positions at least once.
    let roofline = record(0, &["roofline", "--model", "demo"]);
    let position =
        row(&roofline, "target: keys and values of a position", json!({}))["median"].as_f64().unwrap();
    for (short, sequences) in [(0, 1), (2, 2)] {
        let more = |counts: [&Vec<u64>; 2]| counts[1][4] - counts[0][4];
        let least = sequences * 64 * position as u64;
        let step = more([&grid[short].1, &grid[short + 1].1]);
        assert!((least..least * 5 / 4).contains(&step), "{step}, expected about {least}");
        assert!(more([&grid[short].0, &grid[short + 1].0]) > step);
    }
    // Two sequences read the packed weights once.
    assert!(grid[2].0[3] < grid[0].0[3] * 101 / 100);
}

#[test]
fn sampled_rounds_and_short_blocks_match_the_plan() {
    let found = round(&["--context", "0,1", "--temperature", "0.8", "--block", "5"]);
    for context in [0, 1] {
        let all = checked_round(&found, &json!({ "context": context, "batch": 1, "block": 5 }));
        assert_eq!(all[1], planned(1, "0.8", "64"));
        // Only kernels that sample have bank conflicts.
        let step = counts(&found, "AR step", json!({ "context": context, "batch": 1 }));
        assert!(step[7] > 0 && all[7] > step[7], "{step:?}, {all:?}");
    }
}

#[test]
fn synthetic_acceptance_gives_bytes_per_token() {
    let args = ["--context", "5", "--batch", "2"];
    let value = |found: &Value, name: &str, more: Value| {
        let mut at = json!({ "context": 5, "batch": 2 });
        at.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let row = row(found, name, at);
        assert_eq!(row["kind"], "counted");
        (row["median"].as_f64().unwrap(), row["unit"].as_str().unwrap().to_string())
    };
    let near = |found: (f64, String), expected: f64| {
        assert!((found.0 / expected - 1.0).abs() < 1e-9 && found.1 == "bytes/tok", "{found:?}, {expected}");
    };
    let synthetic = "DFlash, synthetic acceptance";
    let found = round(&[&args[..], &["--acceptance", "1,6.5", "--block", "7"]].concat());
    let bytes = value(&found, "round", json!({ "block": 7 })).0;
    for (length, key) in [(1.0, json!(1)), (6.5, json!(6.5))] {
        near(value(&found, synthetic, json!({ "block": 7, "acceptance": key })), bytes / 2.0 / length);
    }
    near(value(&found, "autoregressive decoding", json!({})), value(&found, "AR step", json!({})).0 / 2.0);
    // 1 + 0.5 + 0.5 x 0.25 = 1.625, of rounds in blocks of 3.
    let found = round(&[&args[..], &["--curve", "0.5,0.25", "--block", "3"]].concat());
    let bytes = value(&found, "round", json!({ "block": 3 })).0;
    near(value(&found, synthetic, json!({ "block": 3, "acceptance": 1.625 })), bytes / 2.0 / 1.625);
}

#[test]
fn the_title_names_pair_device_and_kind() {
    let table =
        bench(["round", "--device", "cuda", "--context", "1", "--block", "4", "--acceptance", "4"]).done();
    let title = table.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in [
        "the built-in demo target with the built-in demo drafter, random weights",
        "on software GPU (h200): counters, not times",
    ] {
        assert!(title.contains(part), "{title}");
    }
    assert!(title.contains("synthetic acceptance is assumed, not measured"), "{title}");
    assert!(!table.contains(" ms ") && !table.contains("ms,"), "{table}");
    let help = bench(["round", "--help"]).done();
    assert!(help.contains("assumed, not measured") && help.contains("5 out of memory"), "{help}");
}

#[test]
fn profilers_get_ranges_of_rounds_parts_and_layers() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("ranges");
    let nvtx = library(folder.path(), "nvtx.so", include_str!("../data/profile/nvtx.c"), &[]);
    let args = ["round", "--device", "cuda", "--context", "1", "--block", "2", "--json"];
    let mut command = bench::command(args);
    command.args(["--profile", "2"]).env("NVTX_INJECTION64_PATH", nvtx).env("RANGES", &log);
    let run = finish(command);
    // The rows are those of a run without --profile.
    let rows = |text: &str| serde_json::from_str::<Value>(text).unwrap()["rows"].clone();
    assert_eq!(rows(&run.done()), rows(&bench(args).done()));
    let layers = |count| (0..count).map(|i| format!("    layer {i}\n    end\n")).collect::<String>();
    let part = |name: &str, layers: String| format!("  {name}\n{layers}  end\n");
    let parts = [("begin", 0), ("inject", 0), ("draft", 3), ("verify", 6), ("accept", 0)];
    let parts = parts.map(|(name, count)| part(name, layers(count))).concat();
    assert_eq!(std::fs::read_to_string(log).unwrap(), format!("round\n{parts}end\n").repeat(2));
}

#[test]
fn a_target_alone_has_ar_steps() {
    let dir = tempfile::tempdir().unwrap();
    let target = support::Target {
        heads: 3,
        kv_heads: 1,
        head_dim: 64,
        hidden: 192,
        intermediate: 160,
        ..Default::default()
    };
    support::write_json(dir.path(), "config.json", &support::target_config(&target));
    let folder = dir.path().display().to_string();
    let found = round(&["--model", &folder, "--context", "9"]);
    assert_eq!(found["model"]["drafter"], Value::Null);
    assert_eq!(found["rows"].as_array().unwrap().len(), 1);
    assert!(counts(&found, "AR step", json!({ "context": 9, "batch": 1 }))[1] > 10);
    let edit = |config: &mut Value| config["max_position_embeddings"] = json!(16);
    support::edit_json(dir.path(), "config.json", edit);
    let run = bench(["round", "--device", "cuda", "--model", &folder, "--context", "0"]);
    refused(run, 4, "the models have 16 positions, but rounds in blocks of 1 need 17");
    for flag in [["--block", "4"], ["--acceptance", "2"], ["--curve", "0.5"]] {
        let run = bench(["round", "--device", "cuda", "--model", &folder].iter().chain(&flag));
        refused(run, 2, "--block, --acceptance and --curve need a drafter: --draft DIR");
    }
}

#[test]
fn round_refuses_invalid_flags_with_one_error_line() {
    // The device has 16 GiB. Rounds need 272 positions beyond --context.
    let pair = Pair::with_random_weights(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap();
    let largest =
        MemoryPlan::largest_context(&pair, BatchConfig::new(1000, 16, 1), 16 << 30, Overhead::GPU).unwrap();
    let fits = largest - 272;
    assert!(largest < 4096 && fits > 1000);
    for (args, code, part) in [
        (&["--batch", "0"][..], 2, "--batch has 0, expected 1 to 1024"),
        (&["--batch", "2,1-2"], 2, "--batch has 2 twice"),
        (
            &["--context", "3825"],
            2,
            "--context has 3825, expected 0 to 3824: 4096 positions less 272 for rounds",
        ),
        (&["--context", "64,64"], 2, "--context has 64 twice"),
        (&["--context", "4-1"], 2, "has no end"),
        (
            &["--block", "1"],
            2,
            "--block is 1, expected 2 to 16, the block length of the built-in demo drafter",
        ),
        (&["--block", "17"], 2, "--block is 17, expected 2 to 16"),
        (&["--block", "-3"], 2, "--block"),
        (&["--acceptance", "0.5"], 2, "--acceptance has 0.5, expected 1 to 16"),
        (&["--acceptance", "5", "--block", "4"], 2, "--acceptance has 5, expected 1 to 4"),
        (&["--acceptance", "2,2"], 2, "--acceptance has 2 twice"),
        (&["--acceptance", "2", "--curve", "0.5"], 2, "cannot be used with"),
        (&["--curve", "1.5"], 2, "--curve has 1.5, expected probabilities, 0 to 1"),
        (&["--curve", "-0.5"], 2, "--curve"),
        (&["--curve", "0.9,0.9,0.9", "--block", "3"], 2, "--curve has 3 probabilities, expected at most 2"),
        (&["--curve", ""], 2, "--curve"),
        (&["--temperature", "-1"], 2, "--temperature is -1"),
        (&["--temperature", "NaN"], 2, "--temperature is NaN"),
        (&["--samples", "0"], 2, "expected a whole number from 1 to 1000"),
        (&["--rounds", "1001"], 2, "expected a whole number from 1 to 1000"),
        (&["--profile", "0"], 2, "expected a whole number from 1 to 1000"),
        (
            &["--profile", "1", "--batch", "1-3"],
            2,
            "--profile needs one batch and one context, found 3 combinations",
        ),
        (&["--model", "qwen9"], 2, "--model is \"qwen9\""),
        (
            &["--batch", "1000", "--context", "3824"],
            5,
            &*format!("; the largest --context that fits is {fits}\n"),
        ),
        (&["--model", "qwen3-8b", "--batch", "1024"], 5, " bytes (254.9 GiB) are needed, "),
    ] {
        let run = bench(["round", "--device", "cuda"].iter().chain(args));
        refused(run, code, part);
    }
    for (args, part) in [
        (&["--profile", "1"][..], "--profile needs --device cuda, which"),
        (&["--context", "3825"], "--context has 3825, expected 0 to 3824"),
        (&["--block", "17"], "--block is 17, expected 2 to 16"),
        (&["--gpu", "0"], "--gpu needs --device cuda or auto"),
    ] {
        refused(bench(["round", "--device", "cpu"].iter().chain(args)), 2, part);
    }
    refused(bench(["round", "--model", "demo", "--device", "cuda", "--gpu", "99"]), 4, "device cuda");
    // Wrong flags are found before a device is opened, whose number is wrong too.
    let cuda = ["--device", "cuda", "--gpu", "99"];
    for (args, part) in [
        (["round", "--block", "17"], "--block is 17, expected 2 to 16"),
        (["round", "--context", "40960"], "--context has 40960, expected 0 to "),
        (["round", "--curve", "2"], "--curve has 2, expected probabilities"),
        (["kernels", "--only", "none"], "--only has \"none\", expected some of target: qkv, "),
        (["kernels", "--rows", "0"], "--rows has 0, expected 1 to 1024"),
    ] {
        refused(bench(args.iter().chain(&cuda)), 2, part);
    }
}

// ---- the CPU ----

#[test]
fn the_cpu_measures_a_round_and_its_parts() {
    let args = [
        "round",
        "--device",
        "cpu",
        "--context",
        "24,0",
        "--batch",
        "1,2",
        "--samples",
        "2",
        "--rounds",
        "3",
        "--threads",
        "3",
    ];
    let found = record(0, &args);
    assert_eq!((&found["machine"]["device"], &found["machine"]["threads"]), (&json!("cpu"), &json!(3)));
    assert_eq!(found["model"], json!({ "target": "demo/target", "drafter": "demo/drafter" }));
    // AR: a step and its rate. DFlash: a round, its three parts, and rates for 2, 4, 6 and 8 tokens.
    assert_eq!(found["rows"].as_array().unwrap().len(), 4 * (2 + 1 + 3 + 4));
    let samples = |name: &str, at: &Value| -> Vec<f64> {
        let row = row(&found, name, at.clone());
        assert_eq!(
            (&row["kind"], &row["unit"], &row["rounds"]),
            (&json!("measured"), &json!("ms"), &json!([2, 2, 2]))
        );
        serde_json::from_value(row["samples"].clone()).unwrap()
    };
    for batch in [1, 2] {
        let at = json!({ "context": 24, "batch": batch, "block": 16 });
        let parts = ["inject", "draft", "verify"].map(|name| samples(name, &at));
        for (i, round) in samples("round", &at).iter().enumerate() {
            let sum: f64 = parts.iter().map(|part| part[i]).sum();
            assert!((sum / round - 1.0).abs() < 1e-9, "{sum} and {round}");
        }
    }
    let table =
        bench(["round", "--device", "cpu", "--context", "8", "--rounds", "1", "--samples", "1"]).done();
    let flat = table.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        flat.starts_with(
            "the built-in demo target with the built-in demo drafter, random weights, on the CPU: measured;"
        ),
        "{table}"
    );
    // A sampled round, and a target without a drafter.
    let sampled = record(
        0,
        &[&args[..3], &["--context", "8", "--temperature", "1", "--rounds", "1", "--samples", "1"]].concat(),
    );
    row(&sampled, "round", json!({ "context": 8, "batch": 1, "block": 16 }));
    let dir = tempfile::tempdir().unwrap();
    support::write_json(dir.path(), "config.json", &support::target_config(&support::Target::default()));
    let folder = dir.path().display().to_string();
    let alone = record(
        0,
        &[&args[..3], &["--model", &folder, "--context", "8", "--rounds", "1", "--samples", "1"]].concat(),
    );
    let names: Vec<&Value> = alone["rows"].as_array().unwrap().iter().map(|row| &row["name"]).collect();
    assert_eq!(names, ["AR step", "autoregressive decoding"]);
    assert_eq!(alone["model"], json!({ "target": folder, "drafter": null }));
}

#[test]
fn a_model_that_does_not_fit_the_cpu_is_refused() {
    // 1024 sequences of 8192 positions need terabytes of keys and values.
    let args = ["round", "--device", "cpu", "--model", "qwen3-8b", "--batch", "1024", "--context", "8192"];
    let run = bench(args);
    assert!(run.err.contains("1024 sequences of 8464 positions"), "{run:?}");
    refused(run, 5, "expected a smaller --model, --batch or --context");
}

/// Progress is for people: on a terminal, and not in a pipe.
#[cfg(target_os = "linux")]
#[test]
fn progress_is_shown_on_a_terminal_only() {
    use std::io::Read;
    use std::os::fd::{FromRawFd, OwnedFd};
    let (mut terminal, mut end) = (0, 0);
    // SAFETY: openpty writes two descriptors and reads nothing else.
    let opened = unsafe {
        libc::openpty(&mut terminal, &mut end, std::ptr::null_mut(), std::ptr::null(), std::ptr::null())
    };
    assert_eq!(opened, 0);
    // SAFETY: openpty returned them, and nothing else owns them.
    let [terminal, end] = [terminal, end].map(|fd| unsafe { OwnedFd::from_raw_fd(fd) });
    let args = ["round", "--device", "cpu", "--context", "8,9", "--rounds", "1", "--samples", "1", "--json"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_dflash-bench"));
    let child = command.args(args).stdout(std::process::Stdio::piped()).stderr(end).spawn().unwrap();
    drop(command);
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let mut shown = vec![];
    // Linux ends it with an error once the program has closed its end.
    let _ = std::fs::File::from(terminal).read_to_end(&mut shown);
    let shown = String::from_utf8(shown).unwrap();
    assert!(shown.contains("of 2 measured: now context"), "{shown:?}");
    assert_eq!(bench(args).err, "");
}
