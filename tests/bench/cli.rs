//! `dflash-bench` as a user runs it. Every record it prints is checked against `benches/schema.json`.

use crate::support;
use crate::support::bench;
use crate::support::program;

use bench::{bench, record, refused, row, schema_violation};
use program::{finish, write};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

/// A change that makes a record invalid.
type Edit = fn(&mut Value);

#[test]
fn the_schema_refuses_invalid_records() {
    let whole = record(0, &["roofline"]);
    let cases: [(&str, Edit); 10] = [
        ("/schema", |r| r["schema"] = json!("dflash-bench/2")),
        ("", |r| drop(r.as_object_mut().unwrap().remove("machine"))),
        ("", |r| r["more"] = json!(1)),
        ("/machine/before", |r| r["machine"]["before"] = json!({})),
        ("/machine/capability", |r| r["machine"]["capability"] = json!(9.0)),
        ("/rows/0/kind", |r| r["rows"][0]["kind"] = json!("guessed")),
        ("/rows/0/parameters/context", |r| r["rows"][0]["parameters"]["context"] = json!(null)),
        ("/rows/0/samples/1", |r| r["rows"][0]["samples"] = json!([1, 0])),
        ("/rows/0/samples", |r| r["rows"][0]["samples"] = json!([])),
        ("/rows/0/numbers/GB", |r| r["rows"][0]["numbers"]["GB"] = json!("1")),
    ];
    for (place, edit) in cases {
        let mut invalid = whole.clone();
        edit(&mut invalid);
        let wrong = schema_violation(&invalid);
        assert!(wrong.as_ref().is_some_and(|w| w.starts_with(&format!("{place}: "))), "{place}: {wrong:?}");
    }
}

// ---- roofline ----

#[test]
fn roofline_predicts_qwen3_8b_on_an_h200() {
    let found = record(0, &["roofline", "--context", "0", "--acceptance", "4,6.5"]);
    assert_eq!(found["machine"]["card"], "H200");
    assert_eq!(found["model"], json!({ "target": "qwen3-8b", "drafter": "qwen3-8b-dflash" }));
    let near = |row: &Value, expected: f64| {
        let median = row["median"].as_f64().unwrap();
        assert!((median / expected - 1.0).abs() < 0.005, "{row}, expected {expected}");
    };
    let at = |more: Value| {
        let mut all = json!({ "context": 0, "batch": 1 });
        all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        all
    };
    let tree = || at(json!({ "tree": 16 }));
    near(row(&found, "target: down of a layer", json!({})), 100.7);
    near(row(&found, "drafter: weights of a pass", json!({})), 3.34);
    near(row(&found, "AR step", at(json!({}))), 3.15);
    near(row(&found, "autoregressive decoding", at(json!({}))), 317.0);
    near(row(&found, "round", tree()), 3.85);
    near(row(&found, "acceptance length to break even", tree()), 1.222);
    let synthetic = row(&found, "DFlash, synthetic acceptance", at(json!({ "tree": 16, "acceptance": 4 })));
    near(synthetic, 1039.0);
    assert_eq!(synthetic["kind"], "predicted");
    assert!((synthetic["numbers"]["speed-up"].as_f64().unwrap() - 3.27).abs() < 0.02);
    row(&found, "DFlash, synthetic acceptance", at(json!({ "tree": 16, "acceptance": 6.5 })));
    // 16.38 GB of the target's weights, 2.1 GB of the drafter's, and the reserve.
    near(row(&found, "memory", at(json!({}))), 19.38);
}

#[test]
fn roofline_takes_lists_models_and_cards() {
    let lists =
        ["roofline", "--context", "512-2048*2", "--batch", "1,4", "--tree", "16-48+16", "--acceptance", "2"];
    let found = record(0, &lists);
    let rounds = found["rows"].as_array().unwrap().iter().filter(|row| row["name"] == "round");
    assert_eq!(rounds.count(), 3 * 2 * 3);
    // While memory is the bound, a larger tree only adds keys and values; --acceptance is still limited by
    // the block.
    let round = |tree: usize| {
        let at = json!({ "context": 512, "batch": 1, "tree": tree });
        row(&found, "round", at)["median"].as_f64().unwrap()
    };
    assert!(round(48) > round(16) && round(48) < 1.01 * round(16));
    refused(
        bench(["roofline", "--tree", "48", "--acceptance", "17"]),
        2,
        "--acceptance has 17, expected 1 to 16",
    );

    for model in ["qwen3-4b", "llama-3.1-8b", "demo"] {
        let found = record(0, &["roofline", "--model", model, "--card", "rtx4090", "--context", "128"]);
        assert_eq!(found["machine"]["card"], "RTX-4090");
    }
    let bare = record(0, &["roofline", "--bandwidth", "4100", "--flops", "900", "--context", "0"]);
    assert_eq!(bare["machine"]["card"], Value::Null);
    let step = row(&bare, "AR step", json!({ "context": 0, "batch": 1 }));
    assert!((step["median"].as_f64().unwrap() - 3.692).abs() < 0.01, "{step}");

    // Folders with only a config. No kernel supports heads of 24, so there is no memory plan.
    let dir = tempfile::tempdir().unwrap();
    let (target, drafter) = (support::Target::default(), support::Drafter::default());
    let place = |name: &str, config: Value| {
        let folder = dir.path().join(name);
        std::fs::create_dir_all(&folder).unwrap();
        support::write_json(&folder, "config.json", &config);
        folder.display().to_string()
    };
    let target_dir = place("target", support::target_config(&target));
    let drafter_dir = place("drafter", support::drafter_config(&target, &drafter));
    let run = bench(["roofline", "--model", &target_dir, "--draft", &drafter_dir, "--context", "100"]);
    assert!(run.err.starts_with("no memory plan: the kernels cannot run ") && run.err.lines().count() == 1);
    assert!(run.out.contains("round") && !run.out.contains("memory"), "{}", run.out);
    let alone = record(0, &["roofline", "--model", &target_dir, "--context", "100"]);
    assert_eq!(alone["model"]["drafter"], Value::Null);
    assert!(alone["rows"].as_array().unwrap().iter().all(|row| row["name"] != "round"));
    refused(
        bench(["roofline", "--model", &target_dir, "--context", "9", "--tree", "4"]),
        2,
        "need a drafter: --draft DIR",
    );
    refused(
        bench(["roofline", "--model", &target_dir, "--context", "9", "--curve", "1"]),
        2,
        "need a drafter",
    );
    refused(bench(["roofline", "--model", &drafter_dir]), 2, "describes a drafter");
}

#[test]
fn roofline_finds_the_cheapest_chain_of_a_curve() {
    let cheapest = |more: &[&str]| {
        let found = record(0, &[&["roofline", "--context", "64"][..], more].concat());
        row(&found, "DFlash, cheapest chain of the curve", json!({ "context": 64, "batch": 1 })).clone()
    };
    // Drafts behind one that is never accepted are not verified.
    let short = cheapest(&["--curve", "0.5,0.5,0,1"]);
    assert_eq!((&short["kind"], &short["unit"]), (&json!("predicted"), &json!("tok/s")));
    assert_eq!((&short["numbers"]["drafts"], &short["numbers"]["tokens"]), (&json!(2), &json!(1.75)));
    assert_eq!(cheapest(&["--curve", "0"])["numbers"]["drafts"], 0);
    // If all drafts are accepted, the cheapest chain is a whole block.
    let whole = cheapest(&["--curve", &["1"; 15].join(",")]);
    let at = json!({ "context": 64, "batch": 1, "tree": 16 });
    let roofline = record(0, &["roofline", "--context", "64", "--acceptance", "16"]);
    assert_eq!(whole["numbers"]["ms"], row(&roofline, "round", at)["median"]);
    let at = json!({ "context": 64, "batch": 1, "tree": 16, "acceptance": 16 });
    let synthetic = row(&roofline, "DFlash, synthetic acceptance", at);
    for (found, expected) in [
        (&whole["median"], &synthetic["median"]),
        (&whole["numbers"]["speed-up"], &synthetic["numbers"]["speed-up"]),
    ] {
        assert!((found.as_f64().unwrap() / expected.as_f64().unwrap() - 1.0).abs() < 1e-9, "{whole}");
    }
    // Where operations are the bound, each row costs time, and unlikely drafts do not pay.
    let slow = cheapest(&["--bandwidth", "4800", "--flops", "1", "--curve", &["0.5"; 15].join(",")]);
    assert_eq!(slow["numbers"]["drafts"], 1);
}

#[test]
fn roofline_refuses_invalid_flags_with_one_error_line() {
    for (args, part) in [
        (&["--card", "H300"][..], "--card is \"H300\", expected H200, H100-SXM"),
        (&["--bandwidth", "100"], "--flops"),
        (&["--bandwidth", "0", "--flops", "1"], "expected a number above 0"),
        (&["--card", "L4", "--bandwidth", "1", "--flops", "1"], "cannot be used with"),
        (&["--model", "qwen9"], "--model is \"qwen9\", expected qwen3-4b, qwen3-8b, llama-3.1-8b, demo or"),
        (&["--context", "40960"], "--context has 40960, expected less than 40960"),
        (&["--context", "8-1"], "\"8-1\" has no end"),
        (&["--batch", "0"], "--batch has 0, expected 1 to 1024"),
        (&["--tree", "1"], "--tree has 1, expected 2 to 1024"),
        (&["--acceptance", "0.5"], "--acceptance has 0.5, expected 1 to 16"),
        (&["--curve", "0.5,1.5"], "--curve has 1.5, expected probabilities, 0 to 1"),
        (&["--curve", "1-16"], "--curve has 16, expected at most 15 probabilities, one for each draft"),
        (
            &["--curve", "0.5", "--batch", "1,2"],
            "--batch has 2, expected 1 with --curve, which is of one sequence",
        ),
        (&["--json", "--csv"], "cannot be used with"),
    ] {
        refused(bench(["roofline"].iter().chain(args)), 2, part);
    }
    assert!(bench(["--help"]).done().contains("7 compare found a row that is SLOWER"));
}

#[test]
fn floor_is_an_alias_of_roofline() {
    let [old, new] = ["floor", "roofline"].map(|name| record(0, &[name, "--context", "0"]));
    assert_eq!((&old["command"], &old["rows"]), (&json!("roofline"), &new["rows"]));
}

#[test]
fn records_of_earlier_versions_show_and_compare() {
    let dir = tempfile::tempdir().unwrap();
    let new = record(0, &["roofline", "--context", "0"]);
    let mut old = new.clone();
    old["command"] = json!("floor");
    for row in old["rows"].as_array_mut().unwrap() {
        let name = row["name"].as_str().unwrap();
        row["name"] = json!(name.replace("AR step", "plain step").replace("autoregressive", "plain"));
    }
    assert_eq!(schema_violation(&old), None);
    assert!(old.to_string().contains("plain step") && old.to_string().contains("plain decoding"));
    let [a, b] = files(dir.path(), &old, &new);
    let compared = record(0, &["compare", &a, &b]);
    let rows = compared["rows"].as_array().unwrap();
    assert_eq!(rows.len(), new["rows"].as_array().unwrap().len());
    assert!(rows.iter().all(|row| row["verdict"] == "SAME"), "{compared}");
    let shown = |file: &str| bench(["show", file, "--csv"]).done();
    assert_eq!(shown(&a), shown(&b));
    assert!(bench(["show", &a]).done().starts_with("roofline of qwen3-8b with qwen3-8b-dflash on H200"));
}

// ---- tables ----

/// Runs `dflash-bench` with `columns` as the width of the terminal.
fn table_of_width(columns: usize, args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dflash-bench"));
    command.args(args).env("COLUMNS", columns.to_string());
    finish(command).done()
}

/// The number of lines whose first column is `name`, perhaps followed by a parenthesis.
fn lines_of(table: &str, name: &str) -> usize {
    let is = |line: &&str| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with("  ") || rest.starts_with(" ("))
    };
    table.lines().filter(is).count()
}

#[test]
fn every_row_is_in_the_table_at_any_width() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["roofline", "--context", "0,1024", "--batch", "1,4"][..],
        &["round", "--device", "cuda", "--context", "4,8", "--block", "4", "--acceptance", "2,4"],
        &[
            "kernels",
            "--device",
            "cuda",
            "--rows",
            "1,16",
            "--context",
            "9",
            "--only",
            "target: o,attention,choices",
        ],
    ] {
        let found = record(0, args);
        let file = write(dir.path(), "found.json", found.to_string());
        for columns in [80, 100, 200] {
            let table = table_of_width(columns, &["show", &file]);
            for row in found["rows"].as_array().unwrap() {
                let name = row["name"].as_str().unwrap();
                let rows = found["rows"].as_array().unwrap().iter().filter(|other| other["name"] == name);
                assert_eq!(lines_of(&table, name), rows.count(), "{name} of {args:?} in {columns}: {table}");
            }
            let widest = table.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(widest <= columns, "{widest} characters of {columns}: {table}");
            assert!(columns < 100 || args[0] == "kernels" || !table.contains("too wide"), "{table}");
        }
    }
}

#[test]
fn the_same_rows_as_markdown_and_csv() {
    let rows = record(0, &["roofline"])["rows"].as_array().unwrap().len();
    let table = bench(["roofline"]).done();
    let flat = table.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        flat.starts_with("qwen3-8b with qwen3-8b-dflash on the default card H200")
            && flat.contains("not measured")
    );
    let markdown = bench(["roofline", "--markdown"]).done();
    let lines: Vec<&str> = markdown.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(lines.len(), rows + 2);
    assert!(
        lines.iter().all(|line| line.matches('|').count() == lines[0].matches('|').count()),
        "{markdown}"
    );
    let csv = bench(["roofline", "--csv"]).done();
    let head: Vec<&str> = csv.lines().next().unwrap().split(',').collect();
    assert_eq!(csv.lines().count(), rows + 1);
    assert_eq!(head[..6], ["name", "context", "batch", "tree", "acceptance", "median"]);
    let synthetic = csv.lines().find(|line| line.contains("synthetic")).unwrap();
    assert!(synthetic.starts_with("\"DFlash, synthetic acceptance\",1024,1,16,2,"), "{synthetic}");
    // Synthetic rows have a comma in their name.
    assert!(
        csv.lines()
            .skip(1)
            .all(|l| l.matches(',').count() == head.len() - 1 + usize::from(l.starts_with('"')))
    );
}

// ---- compare ----

/// A record of measured rows: name, unit, samples, rounds.
fn measured(rows: &[(&str, &str, Option<&[f64]>, Value)]) -> Value {
    let rows: Vec<Value> = rows
        .iter()
        .map(|(name, unit, samples, rounds)| {
            let median = samples.map_or(Some(5.0), |samples| dflash::perf::statistics::quantile(samples, 0.5));
            json!({
                "name": name, "parameters": { "rows": 16 }, "kind": "measured", "unit": unit,
                "better": if *unit == "tok/s" { "higher" } else { "lower" }, "samples": samples, "rounds": rounds,
                "median": median, "p10": null, "p90": null, "numbers": {}, "verdict": null,
            })
        })
        .collect();
    let found = json!({
        "schema": "dflash-bench/1", "command": "floor", "arguments": [],
        "build": { "version": "0", "commit": null, "features": [], "ptx": [] },
        "machine": {
            "device": "cuda", "card": "H200", "driver": "580", "gigabytes_per_s": null, "tflops": null,
            "memory_gigabytes": null,
        },
        "model": { "target": "qwen3-8b", "drafter": null }, "rows": rows,
    });
    assert_eq!(schema_violation(&found), None);
    found
}

/// `count` samples around `median`, off by at most `noise * median`.
fn samples(seed: u64, count: usize, median: f64, noise: f64) -> Vec<f64> {
    let mut random = support::Random::new(seed);
    (0..count).map(|_| median * (1.0 + noise * (2.0 * f64::from(random.unit()) - 1.0))).collect()
}

fn files(dir: &Path, before: &Value, after: &Value) -> [String; 2] {
    [("A.json", before), ("B.json", after)].map(|(name, record)| write(dir, name, record.to_string()))
}

/// The verdict for one row with these samples.
fn verdict(unit: &str, before: &[f64], after: &[f64], rounds: Value) -> String {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = [before, after].map(|samples| measured(&[("x", unit, Some(samples), rounds.clone())]));
    let [a, b] = files(dir.path(), &a, &b);
    let run = bench(["compare", &a, &b, "--json"]);
    let found: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(schema_violation(&found), None);
    let verdict = found["rows"][0]["verdict"].as_str().unwrap().to_string();
    assert_eq!(run.code, if verdict == "SLOWER" { 7 } else { 0 });
    verdict
}

#[test]
fn compare_separates_shifts_from_noise() {
    let null = || Value::Null;
    let base = samples(1, 40, 10.0, 0.005);
    assert_eq!(verdict("ms", &base, &samples(2, 40, 10.0, 0.005), null()), "SAME");
    assert_eq!(verdict("ms", &base, &samples(3, 40, 10.5, 0.005), null()), "SLOWER");
    assert_eq!(verdict("ms", &base, &samples(3, 40, 9.5, 0.005), null()), "FASTER");
    assert_eq!(verdict("tok/s", &base, &samples(3, 40, 10.5, 0.005), null()), "FASTER");
    assert_eq!(verdict("tok/s", &base, &samples(3, 40, 9.5, 0.005), null()), "SLOWER");
    // A shift of 2 % in 30 % of noise. Then a clear shift with too few samples.
    assert_eq!(verdict("ms", &samples(4, 20, 10.0, 0.3), &samples(5, 20, 10.2, 0.3), null()), "UNCLEAR");
    assert_eq!(verdict("ms", &samples(6, 4, 10.0, 0.001), &samples(7, 40, 12.0, 0.001), null()), "UNCLEAR");
    // A hundred samples in rounds with different clocks count as five.
    let drifting = |seed, clocks: [f64; 5]| -> Vec<f64> {
        clocks.iter().zip(seed..).flat_map(|(clock, seed)| samples(seed, 20, *clock, 0.001)).collect()
    };
    let (before, after) =
        (drifting(10, [9.6, 9.8, 10.0, 10.3, 10.6]), drifting(20, [9.9, 10.0, 10.3, 10.5, 10.9]));
    assert_eq!(verdict("ms", &before, &after, null()), "SLOWER");
    assert_eq!(verdict("ms", &before, &after, json!([20, 20, 20, 20, 20])), "UNCLEAR");
    // The same clocks in fewer than 5 rounds.
    let after: Vec<f64> = before.iter().map(|x| x * 1.5).collect();
    assert_eq!(verdict("ms", &before, &after, json!([20, 20, 20, 40])), "UNCLEAR");
}

#[test]
fn compare_lists_unmatched_rows_and_handles_single_values() {
    let dir = tempfile::tempdir().unwrap();
    let base = samples(1, 20, 10.0, 0.002);
    let a = measured(&[
        ("both", "ms", Some(&base), json!(null)),
        ("old", "ms", None, json!(null)),
        ("counted", "GB", None, json!(null)),
    ]);
    let mut b = measured(&[
        ("new", "ms", None, json!(null)),
        ("counted", "GB", None, json!(null)),
        ("both", "ms", Some(&base), json!(null)),
    ]);
    let [a_file, b_file] = files(dir.path(), &a, &b);
    let verdicts = |found: &Value| -> Vec<String> {
        let rows = found["rows"].as_array().unwrap();
        rows.iter().map(|row| format!("{} {}", row["name"], row["verdict"]).replace('"', "")).collect()
    };
    let found = record(0, &["compare", &a_file, &b_file]);
    assert_eq!(verdicts(&found), ["both SAME", "old ONLY IN A", "counted SAME", "new ONLY IN B"]);
    assert_eq!(found["rows"][0]["median"], 1.0);
    let table = bench(["compare", &a_file, &b_file]).done();
    let flat = table.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(flat.contains("threshold 1%: 2 SAME, 1 ONLY IN A, 1 ONLY IN B"), "{table}");
    b["rows"][1]["median"] = json!(4.0);
    let [_, b_file] = files(dir.path(), &a, &b);
    let found = record(0, &["compare", &a_file, &b_file]);
    assert_eq!(verdicts(&found)[2], "counted UNCLEAR");
    assert_eq!(row(&found, "counted", json!({ "rows": 16 }))["median"], 1.25);
    // Exact values need no samples.
    let mut a = a;
    for (kind, before, after, code, verdict) in [
        ("counted", 5.0, 4.0, 0, "FASTER"),
        ("counted", 4.0, 5.0, 7, "SLOWER"),
        ("predicted", 4.0, 5.0, 7, "SLOWER"),
        ("counted", 1000.0, 1009.0, 0, "SAME"),
        ("counted", 0.0, 1.0, 7, "SLOWER"),
        ("counted", 1.0, 0.0, 0, "FASTER"),
        ("measured", 4.0, 5.0, 0, "UNCLEAR"),
    ] {
        (a["rows"][2]["kind"], a["rows"][2]["median"]) = (json!(kind), json!(before));
        (b["rows"][1]["kind"], b["rows"][1]["median"]) = (json!(kind), json!(after));
        let [a_file, b_file] = files(dir.path(), &a, &b);
        let found = record(code, &["compare", &a_file, &b_file]);
        assert_eq!(verdicts(&found)[2], format!("counted {verdict}"), "{kind}, {before}, {after}");
    }
    // A shift of 0.5 % is SAME at 1 % and SLOWER at 0.2 %.
    let shifted: Vec<f64> = base.iter().map(|x| x * 1.005).collect();
    let [a, b] = [&base, &shifted].map(|s| measured(&[("x", "ms", Some(s), json!(null))]));
    let [a_file, b_file] = files(dir.path(), &a, &b);
    assert_eq!(verdicts(&record(0, &["compare", &a_file, &b_file])), ["x SAME"]);
    assert_eq!(verdicts(&record(7, &["compare", &a_file, &b_file, "--threshold", "0.2%"])), ["x SLOWER"]);
}

#[test]
fn compare_refuses_what_cannot_be_compared() {
    let dir = tempfile::tempdir().unwrap();
    let base = samples(1, 20, 10.0, 0.002);
    let a = measured(&[("x", "ms", Some(&base), json!([10, 10]))]);
    let cases: [(&str, Edit); 18] = [
        ("different card: \"H200\" in", |r| r["machine"]["card"] = json!("L4")),
        ("different device: \"cuda\" in", |r| r["machine"]["device"] = json!(null)),
        ("different target: \"qwen3-8b\" in", |r| r["model"]["target"] = json!("qwen3-4b")),
        ("B.json: expected records of the same work, or --force", |r| r["model"]["drafter"] = json!("z")),
        ("has the schema \"dflash-bench/2\", expected \"dflash-bench/1\"", |r| {
            r["schema"] = json!("dflash-bench/2")
        }),
        ("has the schema null", |r| *r = json!([1])),
        ("a list stands in the place of an object", |r| r["model"] = json!(["a", "b"])),
        ("is not a whole record: missing field `rows`", |r| drop(r.as_object_mut().unwrap().remove("rows"))),
        ("unknown variant `guessed`", |r| r["rows"][0]["kind"] = json!("guessed")),
        ("row 1 (x) has the sample 0", |r| r["rows"][0]["samples"][3] = json!(0.0)),
        ("row 1 (x) has the median 9", |r| r["rows"][0]["median"] = json!(9.0)),
        ("row 1 (x) has rounds of [10, 11] samples, and 20 samples", |r| {
            r["rows"][0]["rounds"] = json!([10, 11])
        }),
        ("row 1 (x) has the throttled place 2, beyond its samples", |r| {
            r["rows"][0]["throttled"] = json!([1, 2])
        }),
        ("row 1 (x) has [1] as batch, expected a number or a text", |r| {
            r["rows"][0]["parameters"]["batch"] = json!([1])
        }),
        ("row 1 (x) has \"y\" as GB, expected a number or null", |r| {
            r["rows"][0]["numbers"]["GB"] = json!("y")
        }),
        ("rows 1 and 2 are both x", |r| {
            let first = r["rows"][0].clone();
            r["rows"].as_array_mut().unwrap().push(first);
        }),
        ("row x is in ms, lower is better in", |r| r["rows"][0]["unit"] = json!("us")),
        ("have no row in common", |r| r["rows"][0]["name"] = json!("y")),
    ];
    for (part, edit) in cases {
        let mut b = a.clone();
        edit(&mut b);
        let [a_file, b_file] = files(dir.path(), &a, &b);
        refused(bench(["compare", &a_file, &b_file]), 2, part);
        if part.starts_with("different") {
            assert_eq!(bench(["compare", &a_file, &b_file, "--force"]).code, 0, "{part}");
        }
    }
    let whole = write(dir.path(), "A.json", a.to_string());
    let cut = write(dir.path(), "cut.json", &a.to_string()[..200]);
    refused(bench(["compare", &whole, &cut]), 2, "cut.json is not a record in JSON");
    let bytes = write(dir.path(), "bytes.json", [0xff, 0xfe]);
    refused(bench(["compare", &bytes, &whole]), 2, "bytes.json is UTF-16, expected UTF-8");
    let none = dir.path().join("none.json").display().to_string();
    refused(bench(["compare", &whole, &none]), 2, "none.json cannot be read");
    refused(bench(["compare", &whole, &whole, "--threshold", "1"]), 2, "expected a percentage");
    refused(bench(["compare", &whole]), 2, "B.json");
}

/// A record of one row, from this command and with these settings.
fn of_settings(command: &str, settings: Value) -> Value {
    let base = samples(1, 20, 10.0, 0.002);
    let mut one = measured(&[("x", "ms", Some(&base), json!(null))]);
    (one["command"], one["settings"]) = (json!(command), settings);
    one
}

/// A histogram and the lengths of prompts say what ran. Records of earlier versions call more of it better.
#[test]
fn rows_without_a_direction_have_no_verdict() {
    let dir = tempfile::tempdir().unwrap();
    let counts = |one: f64, more: f64, tau: f64, better: &str| {
        let mut record = measured(&[]);
        let row = |name: &str, parameters: Value, value: f64, better: &str| {
            json!({
                "name": name, "parameters": parameters, "kind": "counted", "unit": "u", "better": better,
                "samples": null, "rounds": null, "median": value, "p10": null, "p90": null, "numbers": {},
                "verdict": null,
            })
        };
        record["rows"] = json!([
            row("rounds", json!({ "accepted": 1 }), one, better),
            row("rounds", json!({ "accepted": 2 }), more, better),
            row("tokens of prompts", json!({}), 512.0, better),
            row("tokens of answers", json!({}), 1000.0 * tau, better),
            row("drafts per token", json!({}), 20.0 / tau, better),
            row("acceptance length", json!({ "mean": "of prompts" }), tau, "higher"),
        ]);
        record
    };
    for before in ["higher", "neither"] {
        // Fewer rounds of one token, more acceptance: nothing is slower.
        let [a, b] = files(dir.path(), &counts(40.0, 0.0, 2.0, before), &counts(10.0, 9.0, 3.0, "neither"));
        let found = record(0, &["compare", &a, &b]);
        let verdicts: Vec<&Value> =
            found["rows"].as_array().unwrap().iter().map(|row| &row["verdict"]).collect();
        assert_eq!(verdicts, [&Value::Null; 5].into_iter().chain([&json!("FASTER")]).collect::<Vec<_>>());
        assert_eq!((&found["rows"][0]["median"], &found["rows"][1]["median"]), (&json!(0.25), &Value::Null));
        let numbers = json!({ "A": 40.0, "B": 10.0 });
        assert_eq!(found["rows"][0]["numbers"], numbers);
        let table = table_of_width(200, &["compare", &a, &b]);
        assert!(table.contains("1 FASTER, 5 without a verdict"), "{table}");
        // Less acceptance is.
        record(7, &["compare", &b, &a]);
    }
    let new = write(dir.path(), "new.jsonl", "{\"prompt\": \"import os\"}\n");
    let run = ["generate", "--prompts", &new, "--device", "cpu", "-n", "4", "--repeat", "1"];
    let found = record(0, &run);
    let neither = found["rows"].as_array().unwrap().iter().filter(|row| row["better"] == "neither");
    assert_eq!(neither.count(), 16 + 3, "a histogram of blocks of 16, and three rows: {found}");
}

#[test]
fn records_of_different_work_are_refused_or_named() {
    let dir = tempfile::tempdir().unwrap();
    let settings = || json!({ "prompts": "8 of digest 1", "temperature": 0.0, "max_tokens": 64 });
    let whole = of_settings("generate", settings());
    let title = |a: &str, b: &str, more: &[&str]| {
        let table = bench(["compare", a, b].iter().chain(more)).done();
        table.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let cases: [(&str, Edit); 5] = [
        ("different prompts: \"8 of digest 1\" in", |r| r["settings"]["prompts"] = json!("8 of digest 2")),
        ("different temperature: 0.0 in", |r| r["settings"]["temperature"] = json!(0.5)),
        ("different max_tokens: 64 in", |r| {
            drop(r["settings"].as_object_mut().unwrap().remove("max_tokens"))
        }),
        ("different taps: unknown in", |r| r["settings"]["taps"] = json!("1,2")),
        ("B.json was interrupted", |r| r["incomplete"] = json!(true)),
    ];
    for (part, edit) in cases {
        let mut other = whole.clone();
        edit(&mut other);
        assert_eq!(schema_violation(&other), None);
        let [a, b] = files(dir.path(), &whole, &other);
        refused(bench(["compare", &a, &b]), 2, part);
        refused(bench(["compare", &a, &b]), 2, ": expected records of the same work, or --force");
        assert!(title(&a, &b, &["--force"]).contains(part), "{part}");
    }
    // Predictions for other figures of a card without a name.
    let [a, b] = ["4000", "4100"].map(|bandwidth| {
        let record = record(0, &["roofline", "--bandwidth", bandwidth, "--flops", "900"]);
        write(dir.path(), &format!("{bandwidth}.json"), record.to_string())
    });
    refused(bench(["compare", &a, &b]), 2, "different nominal GB/s and TFLOP/s: [4000.0,900.0] in");
    // Ways to draft are what one compares: they are named.
    let drafts = |tree: Value| {
        json!({ "verify": "match", "tree": tree, "adaptive": false, "threshold": null, "coupled": false,
                "draft_temperature": null })
    };
    let (mut a, mut b) = (whole.clone(), whole.clone());
    (a["drafts"], b["drafts"]) = (drafts(json!(9)), drafts(Value::Null));
    (a["settings"]["block"], b["settings"]["block"]) = (json!(16), json!(8));
    let [a, b] = files(dir.path(), &a, &b);
    let said = "1 SAME; different drafts: tree 9 in A, null in B; different drafts: block 16 in A, 8 in B";
    assert!(title(&a, &b, &[]).contains(said), "{}", title(&a, &b, &[]));
    // Records of earlier versions have no settings: different amounts of text are found, the rest is said.
    let old = of_settings("generate", json!({}));
    let [a, b] = files(dir.path(), &old, &whole);
    assert!(title(&a, &b, &[]).contains("; A does not say its settings"));
    let prompts = |tokens: f64| {
        let mut old = old.clone();
        let mut row = old["rows"][0].clone();
        (row["name"], row["median"], row["samples"], row["kind"]) =
            (json!("tokens of prompts"), json!(tokens), json!(null), json!("counted"));
        old["rows"].as_array_mut().unwrap().push(row);
        old
    };
    let [a, b] = files(dir.path(), &prompts(512.0), &prompts(640.0));
    refused(bench(["compare", &a, &b]), 2, "different number of prompt tokens: 512.0 in");
}

/// The settings of a run: equal for equal work, whatever the file's name.
#[test]
fn settings_tell_prompts_and_sampling_apart() {
    let dir = tempfile::tempdir().unwrap();
    let [one, same, other] =
        [("one", "import os"), ("same", "import os"), ("other", "import re")].map(|(name, text)| {
            write(dir.path(), &format!("{name}.jsonl"), format!("{{\"prompt\": \"{text}\"}}\n"))
        });
    let settings = |file: &str, more: &[&str]| {
        let args = ["generate", "--prompts", file, "--device", "cpu", "-n", "2", "--repeat", "1"];
        record(0, &[&args[..], more].concat())["settings"].clone()
    };
    let usual = settings(&one, &[]);
    assert_eq!(
        (&usual["max_tokens"], &usual["block"], &usual["seed"]),
        (&json!(2), &json!(16), &Value::Null)
    );
    assert_eq!(usual, settings(&same, &["--seed", "5"]), "greedy decoding does not read the seed");
    assert_eq!(usual, settings(&one, &["--tree", "4"]), "drafts are not settings");
    assert_ne!(usual["prompts"], settings(&other, &[])["prompts"]);
    let hot = settings(&one, &["--temperature", "1", "--seed", "5"]);
    assert_eq!((&hot["seed"], &hot["prompts"]), (&json!(5), &usual["prompts"]));
    assert_ne!(usual["stop_ids"], settings(&one, &["--stop-id", "7"])["stop_ids"]);
}

#[test]
fn version_is_one_line_and_with_json_the_facts_of_dflash_gen() {
    assert_eq!(bench(["--version"]).done(), format!("dflash-bench {}\n", env!("CARGO_PKG_VERSION")));
    let mut facts = bench(["--version", "--json"]).json().remove(0);
    facts["program"] = json!("dflash-gen");
    assert_eq!(facts, program::run(["--version", "--json"]).json().remove(0));
}

/// Keeps a run busy until Ctrl-C, which it must answer with a record of what it has.
#[cfg(target_os = "linux")]
#[test]
fn ctrl_c_keeps_what_was_measured() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = write(dir.path(), "p.jsonl", "{\"prompt\": \"import os\"}\n{\"prompt\": \"def\"}\n");
    let generate = ["generate", "--prompts", &prompts, "--device", "cpu", "-n", "8", "--repeat", "100000"];
    let round = [
        "round",
        "--device",
        "cpu",
        "--context",
        "8",
        "--batch",
        "1-64",
        "--rounds",
        "1000",
        "--samples",
        "1",
    ];
    let kernels = ["kernels", "--device", "cuda", "--rows", "1-512", "--only", "norm,target: o"];
    for (args, name) in [(&generate[..], "TTFT"), (&round, "AR step"), (&kernels, "read ceiling")] {
        let mut command = bench::command(args);
        let page = dir.path().join("page.html");
        command.arg("--json").arg("--report").arg(&page);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        program::wait_for_handler(&child);
        // Long enough to measure something, short of the end.
        std::thread::sleep(Duration::from_millis(700));
        program::interrupt(&child);
        let output = child.wait_with_output().unwrap();
        let out = String::from_utf8(output.stdout).unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), out.lines().count()), (Some(130), 1), "{name}: {error}");
        let found: Value = serde_json::from_str(&out).unwrap();
        assert_eq!((schema_violation(&found), &found["incomplete"]), (None, &json!(true)));
        assert!(found["rows"].as_array().unwrap().iter().any(|row| row["name"] == name), "{found}");
        let file = write(dir.path(), "part.json", &out);
        let marked = "interrupted, so incomplete";
        assert!(std::fs::read_to_string(&page).unwrap().contains(marked));
        assert!(table_of_width(200, &["show", &file]).contains(marked));
    }
}

#[test]
fn the_first_damaged_row_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let count = if support::exhaustive() { 20_000 } else { 2_000 };
    let mut whole = measured(&[("x", "ms", None, json!(null))]);
    let one = whole["rows"][0].clone();
    let at = |i: usize| {
        let mut row = one.clone();
        row["parameters"] = json!({ "rows": i, "context": 1024, "of": "x" });
        row
    };
    whole["rows"] = (0..count).map(at).collect();
    let show = |record: &Value| bench(["show", &write(dir.path(), "many.json", record.to_string())]);
    assert_eq!(show(&whole).done().lines().filter(|line| line.starts_with("x ")).count(), count);
    // Rows are equal whatever the order of their parameters; other values, parameters or names make them
    // different.
    let first = json!({ "of": "x", "context": 1024, "rows": 7 });
    let mut twice = whole.clone();
    for (i, other) in [
        (count - 4, json!({ "rows": "7", "context": 1024, "of": "x" })),
        (count - 3, json!({ "rows": 7.5, "context": 1024, "of": "x" })),
        (count - 2, json!({ "rows": 7, "context": 1024 })),
    ] {
        twice["rows"][i]["parameters"] = other;
    }
    (twice["rows"][count - 5]["name"], twice["rows"][count - 5]["parameters"]) = (json!("y"), first.clone());
    assert_eq!(show(&twice).code, 0);
    twice["rows"][count - 1]["parameters"] = first.clone();
    let last = format!("is damaged: rows 8 and {count} are both x with equal parameters");
    refused(show(&twice), 2, &last);
    // Of three equal rows, the first two are named. Of several damaged rows, the first is.
    twice["rows"][count / 2]["parameters"] = first;
    refused(show(&twice), 2, &format!("rows 8 and {} are both x", count / 2 + 1));
    let mut damaged = twice.clone();
    damaged["rows"][count / 2 + 1]["samples"] = json!([]);
    refused(show(&damaged), 2, &format!("rows 8 and {} are both x", count / 2 + 1));
    damaged["rows"][count / 2 - 1]["samples"] = json!([]);
    refused(show(&damaged), 2, &format!("row {} (x) has an empty list of samples", count / 2));
    // Damage comes before equality.
    twice["rows"][count / 2]["samples"] = json!([]);
    refused(show(&twice), 2, &format!("row {} (x) has an empty list of samples", count / 2 + 1));
}
