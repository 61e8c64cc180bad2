//! `dflash-bench kernels` on the software GPU: the list of kernels, their counters, and refused flags.

use crate::support;
use crate::support::bench;

use bench::{bench, record, refused, row};
use dflash::perf::roofline::{CARDS, Card};
use serde_json::{Value, json};
use std::collections::BTreeSet;

fn counted<'a>(more: impl IntoIterator<Item = &'a str>) -> Value {
    let args: Vec<&str> = ["kernels", "--device", "cuda"].into_iter().chain(more).collect();
    record(0, &args)
}

fn number(row: &Value, name: &str) -> f64 {
    row["numbers"][name].as_f64().unwrap_or_else(|| panic!("no {name} in {row}"))
}

/// The names of a model's kernels, from the error for an unknown name.
fn names(model: &str) -> Vec<String> {
    let run = bench(["kernels", "--device", "cuda", "--model", model, "--context", "0", "--only", "none"]);
    assert_eq!((run.code, run.err.lines().count()), (2, 1), "{run:?}");
    let list = run.err.trim_end().split_once("expected some of ").unwrap().1;
    list.split(", ").map(String::from).collect()
}

#[test]
fn every_kernel_of_the_demo_pair_is_counted() {
    let found = counted(["--rows", "1,16,32,16", "--context", "100"]);
    assert_eq!((&found["machine"]["device"], &found["command"]), (&json!("softgpu"), &json!("kernels")));
    assert_eq!(found["model"], json!({ "target": "demo/target", "drafter": "demo/drafter" }));
    let rows = found["rows"].as_array().unwrap();
    let present: BTreeSet<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
    let expected: BTreeSet<String> = names("demo").into_iter().chain(["read ceiling".to_string()]).collect();
    assert_eq!(present, expected.iter().map(String::as_str).collect());
    assert_eq!(rows[0]["name"], "read ceiling");
    assert_eq!(number(&rows[0], "streamed"), f64::from(1 << 20));
    for row in rows {
        assert_eq!(
            (&row["kind"], &row["unit"], &row["samples"]),
            (&json!("counted"), &json!("bytes"), &Value::Null)
        );
        // Chains are verified in two launches. Splits are merged by a second one, here only those of a tree whose last
        // rows are beyond position 128.
        let splits = row["name"] == "attention of a tree" && row["parameters"]["rows"] == 32;
        let launches = if row["name"] == "verify_chains" || splits { 2.0 } else { 1.0 };
        assert_eq!(number(row, "launches"), launches, "{row}");
        let bytes = number(row, "streamed") + number(row, "read") + number(row, "written");
        assert_eq!(row["median"], bytes, "{row}");
        // A launch moves at least what it must move. Kernels of decoding must move something.
        let needed = number(row, "MB") * 1e6;
        let prompt = row["name"].as_str().unwrap().contains("prompt");
        assert!(needed <= bytes * 1.001 && (prompt || needed > 0.0), "{row}");
    }

    // Hidden size 128, 4 and 2 heads of 64, 384 neurons, 2048 tokens, 3 taps.
    let weights = [
        ("target: qkv", 128 * 512),
        ("target: o", 128 * 256),
        ("target: gate_up", 128 * 768),
        ("target: down", 128 * 384),
        ("target: lm_head", 128 * 2048),
        ("target: lm_head with logits", 128 * 2048),
        ("drafter: fc", 3 * 128 * 128),
    ];
    for (name, elements) in weights {
        for rows in [1, 16, 32] {
            let row = row(&found, name, json!({ "rows": rows }));
            let streamed = number(row, "streamed");
            assert_eq!(streamed, f64::from(elements) * 2.0, "{row}");
            assert_eq!(number(row, "GFLOP"), f64::from(elements) * 2.0 * f64::from(rows) / 1e9, "{row}");
            // Two mma operations per KiB of weights and eight rows; no bank conflicts.
            let tiles = f64::from(i32::max(rows / 8, 1));
            assert_eq!(
                (number(row, "mma"), number(row, "conflicts")),
                (streamed / 512.0 * tiles, 0.0),
                "{row}"
            );
            // For one row, the weights are almost all of the bytes that must be moved.
            let needed = number(row, "MB") * 1e6;
            assert!(needed > streamed && (rows > 1 || needed < 1.07 * streamed), "{row}");
        }
    }
    // Kernels of a prompt have 512 rows, whatever --rows says, and their weights count once.
    let prompt = row(&found, "target prompt: down", json!({ "rows": 512 }));
    let activations = 512.0 * (384.0 * 2.0 + 128.0 * 10.0 + 4.0);
    assert_eq!((number(prompt, "MB") * 1e6).round(), 128.0 * 384.0 * 2.0 + activations);
    // Both kernels for prompts are listed. The wgmma kernel has half as many blocks, each with twice the
    // tokens.
    for name in ["target prompt", "drafter prompt"] {
        let mma = rows.iter().filter(|row| row["name"].as_str().unwrap().starts_with(&format!("{name}: ")));
        for mma in mma {
            let other = mma["name"].as_str().unwrap().replace("prompt: ", "prompt wgmma: ");
            let other = row(&found, &other, json!({ "rows": 512 }));
            for what in ["MB", "GFLOP", "mma", "written", "conflicts"] {
                assert_eq!(number(mma, what), number(other, what), "{what} of {other}");
            }
            assert_eq!(number(mma, "blocks"), number(other, "blocks") * 2.0, "{other}");
        }
    }
    let keys = row(&found, "drafter prompt: keys and values", json!({ "rows": 512 }));
    assert_eq!(number(keys, "GFLOP"), 2.0 * 512.0 * 128.0 * 256.0 / 1e9);

    // As blocks of 16, and as AR steps.
    for (rows, batches) in [(1, vec![1]), (16, vec![1, 16]), (32, vec![2, 32])] {
        for batch in batches {
            let seen = (100 + rows / batch) * batch;
            let at = json!({ "rows": rows, "context": 100, "batch": batch });
            let needed = f64::from(2 * 2 * 64 * (rows * 4 + seen * 2));
            assert_eq!((number(row(&found, "attention", at.clone()), "MB") * 1e6).round(), needed);
            let drafts = rows == 1 || batch * 16 == rows;
            let drafter = found["rows"].as_array().unwrap().iter();
            let listed =
                drafter.clone().any(|row| row["name"] == "drafter attention" && row["parameters"] == at);
            assert_eq!(listed, drafts, "{at}");
            row(&found, "round_finish", json!({ "rows": rows, "batch": batch }));
        }
    }
    // The rows of a chain of 16 attend to 101, 102, ... positions; each row of a block attends to 116.
    let at = || json!({ "rows": 16, "context": 100, "batch": 1 });
    let flops = |name: &str| (number(row(&found, name, at()), "GFLOP") * 1e9).round();
    assert_eq!(flops("attention"), f64::from(4 * 4 * 64 * (16 * 100 + 136)));
    assert_eq!(flops("drafter attention"), f64::from(4 * 4 * 64 * 16 * 116));
}

/// Trees have up to 64 rows, blocks 16. A pass of one row has no drafts and so neither of them.
#[test]
fn tree_and_rejection_kernels_are_counted_if_there_are_drafts() {
    let only = "choices,tree_build,compact,row_distribution,sample_drafts,verify_drafts by rejection,verify_drafts by block,attention of a tree";
    // 66 rows are two trees of 33 and six blocks of 11; the largest tree has 64.
    let cases = [(16, 1, 1), (66, 2, 6), (64, 1, 4), (128, 2, 8)];
    let cases = if support::exhaustive() { &cases[..] } else { &cases[..2] };
    let list = [1].into_iter().chain(cases.iter().map(|case| case.0)).map(|rows| rows.to_string());
    let list = list.collect::<Vec<_>>().join(",");
    let found = counted(["--rows", &list, "--context", "100", "--only", only]);
    let rows = found["rows"].as_array().unwrap();
    // The read ceiling; `choices` for each number of rows; for those above 1 also 3 kernels of trees and 4 of blocks.
    assert_eq!(rows.len(), 1 + 1 + 8 * cases.len(), "{found}");
    for row in &rows[1..] {
        let (needed, bytes) = (number(row, "MB") * 1e6, row["median"].as_f64().unwrap());
        assert!(needed > 0.0 && needed <= bytes, "{row}");
        assert_eq!(number(row, "GFLOP") > 0.0, row["name"] == "attention of a tree", "{row}");
    }
    let needed = |name: &str, at: Value| (number(row(&found, name, at), "MB") * 1e6).round();
    for &(rows, trees, blocks) in cases {
        let drafts = rows / blocks - 1;
        let of_trees = || json!({ "rows": rows, "batch": trees });
        let of_blocks = || json!({ "rows": rows, "batch": blocks });
        // Keys and values of 6 layers with 2 heads of 64: at least one row moves, and at most one per draft.
        let moved = needed("compact", of_trees()) / f64::from(6 * 2 * 64 * 8);
        assert!(moved.fract() == 0.0 && (1.0..f64::from(rows)).contains(&moved), "{moved}");
        row(&found, "tree_build", of_trees());
        // Rows of logits that must be read, of 2048 tokens each: `choices` reads each row once, and twice the
        // blocks with its best tokens, here all; `row_distribution` reads each row twice, `sample_drafts` the
        // row of each draft once. `verify_drafts` reads two rows for rejection; for block verification both
        // rows of each draft but the first, and the last row.
        let whole = 2048 * 4;
        let logits = |name: &str, at: Value| (needed(name, at) / f64::from(whole)).floor();
        let check_rows_read = |found: f64, expected: i32| {
            let expected = f64::from(expected);
            assert!(expected <= found && found <= expected * 4.5, "{found}, expected {expected}");
        };
        check_rows_read(logits("choices", json!({ "rows": rows })), 3 * rows);
        check_rows_read(logits("row_distribution", of_blocks()), 2 * rows);
        check_rows_read(logits("sample_drafts", of_blocks()), drafts * blocks);
        let rows_read = |name: &str| (needed(name, of_blocks()) / f64::from(whole * blocks)).floor();
        assert_eq!(
            (rows_read("verify_drafts by rejection"), rows_read("verify_drafts by block")),
            (2.0, f64::from(2 * drafts - 1))
        );
        let tree =
            row(&found, "attention of a tree", json!({ "rows": rows, "context": 100, "batch": trees }));
        let each = rows / trees;
        let keys = (100 + each) * trees * 2 + rows * 4;
        assert_eq!((number(tree, "MB") * 1e6).round(), f64::from(2 * 2 * 64 * keys + rows * 8));
        // A row attends to the context and its path, which has fewer rows than a chain would have.
        let seen = number(tree, "GFLOP") * 1e9 / f64::from(4 * 4 * 64 * trees);
        let (least, most) = (f64::from(each * 102 - 1), f64::from(each * 100 + each * (each + 1) / 2));
        assert!((least..most).contains(&seen), "{seen}, expected {least} to {most}");
    }
}

#[test]
fn sampled_tree_kernels_are_counted() {
    let only = "sample_siblings,verify_tree,sample_chains,verify_chains";
    // 16 rows hold three chains of five drafts, 33 rows five of six, 64 rows seven of nine.
    let cases = [(16, 1, 3, 5), (66, 2, 5, 6), (64, 1, 7, 9), (128, 2, 7, 9)];
    let cases = if support::exhaustive() { &cases[..] } else { &cases[..2] };
    let list = cases.iter().map(|case| case.0.to_string()).collect::<Vec<_>>().join(",");
    let found = counted(["--rows", &format!("1,{list}"), "--only", only]);
    // The read ceiling, and four kernels for each number of rows above 1.
    assert_eq!(found["rows"].as_array().unwrap().len(), 1 + 4 * cases.len(), "{found}");
    for &(rows, trees, chains, each) in cases {
        let of = |name: &str| row(&found, name, json!({ "rows": rows, "batch": trees }));
        let of_logits = |name: &str| number(of(name), "MB") * 1e6 / f64::from(2048 * 4 * trees);
        for name in only.split(',') {
            let moved = of(name)["median"].as_f64().unwrap();
            assert!(number(of(name), "MB") * 1e6 <= moved, "{name}: {moved}");
        }
        assert_eq!(of_logits("sample_chains").floor(), f64::from(each));
        assert!((1.0..15.0).contains(&of_logits("sample_siblings")));
        // `verify_tree` reads at least two rows. `verify_chains` reads the target's rows that a draft follows
        // and the drafter's rows, and two more to sample the next token.
        let classes = 1 + chains * (each - 1) + each;
        let rows_read = (of_logits("verify_tree"), of_logits("verify_chains"));
        assert_eq!(rows_read, (2.0, f64::from(classes + 2)));
    }
}

#[test]
fn a_matrix_of_qwen3_8b_moves_its_bytes_and_little_else() {
    let found = counted(["--model", "qwen3-8b", "--rows", "1", "--only", "target: o"]);
    assert_eq!(found["rows"].as_array().unwrap().len(), 2);
    let row = row(&found, "target: o", json!({ "rows": 1 }));
    assert_eq!(number(row, "streamed"), 4096.0 * 4096.0 * 2.0);
    let needed = number(row, "MB") * 1e6;
    assert!((1.0..1.01).contains(&(needed / number(row, "streamed"))), "{row}");
    // The rest is partial sums of eight slices, and the input row once per block.
    let moved = row["median"].as_f64().unwrap();
    assert!((1.0..1.08).contains(&(moved / needed)), "{row}");
}

#[test]
fn drafter_layers_are_listed_where_they_differ_from_the_targets() {
    let of = |model: &str| {
        names(model).into_iter().filter(|name| name.starts_with("drafter: ")).collect::<Vec<_>>()
    };
    assert_eq!(of("qwen3-8b"), ["drafter: fc"]);
    // Llama 3.1's drafter has norms of q and k and a smaller MLP, unlike its target.
    assert_eq!(of("llama-3.1-8b"), ["drafter: fc", "drafter: qkv", "drafter: gate_up", "drafter: down"]);
    // Its blocks have up to 10 rows: 16 rows are two blocks of 8, 7 rows are one block, 11 rows are AR steps.
    let only = ["--only", "drafter attention,verify"];
    let found =
        counted(["--model", "llama-3.1-8b", "--rows", "7,11,16", "--context", "64"].into_iter().chain(only));
    for (rows, batches) in [(7, vec![1, 7]), (11, vec![11]), (16, vec![2, 16])] {
        row(&found, "drafter attention", json!({ "rows": rows, "context": 64, "batch": batches[0] }));
        for batch in batches {
            row(&found, "verify", json!({ "rows": rows, "batch": batch }));
        }
    }
    assert_eq!(found["rows"].as_array().unwrap().len(), 1 + 3 + 5);
}

#[test]
fn a_config_is_enough_and_unsupported_shapes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let place = |name: &str, config: Value| {
        let folder = dir.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        support::write_json(&folder, "config.json", &config);
        folder.display().to_string()
    };
    let target = support::Target { head_dim: 64, hidden: 64, intermediate: 96, ..support::Target::default() };
    let folder = place("target", support::target_config(&target));
    let only = ["--only", "norm,attention,target: o"];
    let found = counted(["--model", &folder, "--rows", "1,3", "--context", "0,3"].into_iter().chain(only));
    assert_eq!(found["model"], json!({ "target": folder, "drafter": null }));
    // Without a drafter there are only AR steps.
    row(&found, "attention", json!({ "rows": 3, "context": 0, "batch": 3 }));
    let of_drafts = ["drafter", "tree", "choices", "compact", "distribution", "draft", "siblings", "chains"];
    let listed = names(&folder);
    assert!(listed.iter().all(|name| of_drafts.iter().all(|part| !name.contains(part))), "{listed:?}");

    let other = place("other", support::target_config(&support::Target { head_dim: 24, ..target }));
    let run = |more: &[&str]| bench(["kernels", "--device", "cuda"].iter().chain(more));
    refused(run(&["--model", &other]), 4, "head_dim is 24, expected 64 or 128");
    refused(run(&["--model", &dir.path().display().to_string()]), 3, "has no config.json");
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let run = |more: &[&str]| bench(["kernels", "--device", "cuda"].iter().chain(more));
    refused(run(&["--model", "qwen4"]), 2, "--model is \"qwen4\", expected qwen3-4b");
    refused(run(&["--only", "norm,nrom"]), 2, "--only has \"nrom\", expected some of target: qkv, ");
    refused(run(&["--only", ""]), 2, "--only has \"\"");
    refused(run(&["--rows", "8,0"]), 2, "--rows has 0, expected 1 to 1024");
    refused(run(&["--rows", "1025"]), 2, "--rows has 1025, expected 1 to 1024");
    refused(run(&["--rows", "1.5"]), 2, "1.5 is not a whole number");
    refused(run(&["--rows", "-1"]), 2, "is not a number");
    refused(run(&["--context", "4096"]), 2, "--context has 4096, expected less than 4096");
    refused(bench(["kernels", "--device", "cpu", "--gpu", "0"]), 2, "--gpu needs --device cuda or auto");
    refused(run(&["--draft", "nowhere"]), 3, "nowhere");
    for (flag, value) in [("--rounds", "0"), ("--samples", "1001"), ("--rounds", "-1"), ("--samples", "x")] {
        refused(run(&[flag, value]), 2, "expected a whole number from 1 to 1000");
    }
    refused(bench(["kernels", "--device", "cpu"]), 2, "--device is cpu, which has no kernels");
    // The keys and values of these rows do not fit the memory.
    let much = ["--model", "llama-3.1-8b", "--only", "attention", "--rows", "1024", "--context", "130000"];
    // This row is left out; the rows measured before are printed.
    let part = run(&much);
    assert_eq!((part.code, part.out.lines().count()), (5, 4), "{part:?}");
    assert!(part.out.lines().last().unwrap().starts_with("read ceiling"), "{part:?}");
    let last = part.err.lines().last().unwrap();
    assert!(last.starts_with("dflash-bench: attention {\"rows\":1024"), "{part:?}");
    assert!(last.contains("not enough GPU memory for keys"), "{part:?}");
}

#[test]
fn a_table_says_that_counters_are_not_times() {
    let run = bench(["kernels", "--device", "cuda", "--rows", "1", "--only", "norm"]);
    let title = "the built-in demo target with the built-in demo drafter on software GPU (h200): \
                 counters of one launch each, no times";
    assert_eq!((run.code, run.err.as_str()), (0, ""));
    assert!(run.out.replace('\n', " ").starts_with(title), "{}", run.out);
    assert!(!run.out.contains("GB/s") && !run.out.contains(" us"), "{}", run.out);
}

#[test]
fn cards_are_known_by_the_drivers_names() {
    let named = |name: &str| Card::of_driver(name).map(|card| card.name);
    let known = [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100-SXM"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100-40GB"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 5090", "RTX-5090"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA GeForce RTX 3090", "RTX-3090"),
    ];
    for (name, card) in known {
        assert_eq!(named(name), Some(card), "{name}");
    }
    assert_eq!(CARDS.len(), known.iter().map(|known| known.1).collect::<BTreeSet<_>>().len());
    let others = [
        "NVIDIA A100 80GB PCIe",
        "cuda",
        "",
        "NVIDIA",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 144G HBM3e",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "Tesla V100-SXM2-16GB",
    ];
    for name in others {
        assert_eq!(named(name), None, "{name}");
    }
}
