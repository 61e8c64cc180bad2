//! `dflash-bench generate` as a user runs it, on the CPU and on the software GPU.

use crate::support;
use crate::support::bench;
use crate::support::program;

use bench::{bench, record, refused, row};
use dflash::engine::stats;
use dflash::perf::statistics::Summary;
use program::{finish, run, write};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

/// The demo pair in titles.
const DEMO: &str = "the built-in demo target with the built-in demo drafter";
const PROMPTS: &str = "tests/data/prompts.jsonl";

/// The command line of `generate` with these prompts and flags.
fn args<'a>(prompts: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["generate", "--prompts", prompts], more].concat()
}

/// A file of the first held-out prompts, with these categories.
fn categorised(dir: &Path, categories: &[Value]) -> String {
    let file = std::fs::read_to_string(PROMPTS).unwrap();
    let line = |(line, category): (&str, &Value)| {
        let mut prompt: Value = serde_json::from_str(line).unwrap();
        if !category.is_null() {
            prompt["category"] = category.clone();
        }
        format!("{prompt}\n")
    };
    write(dir, "prompts.jsonl", file.lines().zip(categories).map(line).collect::<String>())
}

/// Tokens per round of each prompt, as `dflash-gen` reports them.
fn accepted(prompts: &str, more: &[&str]) -> Vec<Vec<usize>> {
    let records = run([&["--prompts", prompts, "--json", "-q"], more].concat()).json();
    let list = |record: &Value| serde_json::from_value(record["accepted"].clone()).unwrap();
    records.iter().map(list).collect()
}

/// `text` on one line, with single spaces.
fn flat(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn value(record: &Value, name: &str, parameters: Value) -> f64 {
    row(record, name, parameters)["median"].as_f64().unwrap()
}

/// Checks all rows about acceptance against the rounds of `accepted`.
#[track_caller]
fn check_acceptance(record: &Value, accepted: &[Vec<usize>], block: usize) {
    let rounds = accepted.concat();
    let share = |count: usize| count as f64 / rounds.len() as f64;
    for tokens in 1..=block {
        let count = rounds.iter().filter(|n| **n == tokens).count();
        assert_eq!(value(record, "rounds", json!({ "accepted": tokens })), count as f64, "{tokens}");
    }
    for position in 1..block {
        let count = rounds.iter().filter(|n| **n > position).count();
        let found = value(record, "accepted at position", json!({ "position": position }));
        assert_eq!(found, share(count), "{position}");
    }
    let rows = record["rows"].as_array().unwrap();
    let count = |name: &str| rows.iter().filter(|row| row["name"] == name).count();
    assert_eq!((count("rounds"), count("accepted at position")), (block, block - 1));
    check_lengths(record, accepted, None);
}

/// Checks the acceptance lengths of all prompts, or of one category, against the rounds of `accepted`.
#[track_caller]
fn check_lengths(record: &Value, accepted: &[Vec<usize>], category: Option<&str>) {
    let found = |mean: &str| {
        let mut parameters = json!({ "mean": mean });
        if let Some(category) = category {
            parameters["category"] = category.into();
        }
        value(record, "acceptance length", parameters)
    };
    assert_eq!(found("tokens/rounds"), stats::tau(&accepted.concat()).unwrap());
    let each: Vec<f64> = accepted.iter().filter_map(|rounds| stats::tau(rounds)).collect();
    assert_eq!(found("of prompts"), Summary::of(&each).unwrap().mean);
}

#[test]
fn the_cpu_measures_times_and_acceptance_equals_dflash_gen() {
    let dir = tempfile::tempdir().unwrap();
    let categories =
        [json!("tests"), json!(null), json!("a, \"b\""), json!("tests"), json!(null), json!("tests")];
    let prompts = categorised(dir.path(), &categories);
    let sampled = ["-n", "20", "--temperature", "0.8", "--top-p", "0.9", "--seed", "7"];
    let found = record(
        0,
        &args(&prompts, &[&sampled[..], &["--device", "cpu", "--repeat", "2", "--threads", "3"]].concat()),
    );
    assert_eq!((&found["command"], &found["machine"]["device"]), (&json!("generate"), &json!("cpu")));
    assert_eq!(found["machine"]["threads"], 3);
    assert_eq!(found["model"], json!({ "target": "demo/target", "drafter": "demo/drafter" }));
    let accepted = accepted(&prompts, &sampled);
    check_acceptance(&found, &accepted, 16);
    let tests = [0, 3, 5].map(|i| accepted[i].clone());
    check_lengths(&found, &tests, Some("tests"));
    check_lengths(&found, &accepted[2..3], Some("a, \"b\""));

    let identical = row(&found, "identical", json!({}));
    assert_eq!(identical["median"], 1.0);
    assert_eq!(identical["numbers"], json!({ "compared": 12 }));
    assert_eq!(value(&found, "tokens of answers", json!({})), 120.0);
    for name in ["TTFT", "TPOT", "tokens per second"] {
        for mode in ["plain", "dflash"] {
            for (category, prompts) in [(None, 6), (Some("tests"), 3), (Some("a, \"b\""), 1)] {
                let mut parameters = json!({ "decoding": mode });
                if let Some(category) = category {
                    parameters["category"] = category.into();
                }
                let row = row(&found, name, parameters);
                assert_eq!(row["samples"].as_array().unwrap().len(), 2 * prompts);
                assert_eq!((&row["rounds"], &row["kind"]), (&json!([prompts, prompts]), &json!("measured")));
                let samples: Vec<f64> = serde_json::from_value(row["samples"].clone()).unwrap();
                let summary = Summary::of(&samples).unwrap();
                assert_eq!(row["numbers"], json!({ "mean": summary.mean, "p99": summary.p99 }));
            }
        }
    }
    // TTFT, TPOT and rate of a request are consistent.
    let samples = |name: &str| -> Vec<f64> {
        let row = row(&found, name, json!({ "decoding": "plain" }));
        serde_json::from_value(row["samples"].clone()).unwrap()
    };
    for ((ttft, tpot), rate) in samples("TTFT").iter().zip(samples("TPOT")).zip(samples("tokens per second"))
    {
        let ms = 20.0 / rate * 1e3;
        assert!((ttft + 19.0 * tpot - ms).abs() < 1e-9 * ms, "{ttft} {tpot} {rate}");
    }
    for name in ["speed-up", "speed-up of decoding"] {
        let row = row(&found, name, json!({}));
        let [low, high] = ["low", "high"].map(|key| row["numbers"][key].as_f64().unwrap());
        let ratio = row["median"].as_f64().unwrap();
        assert!(low <= ratio && ratio <= high && row["unit"] == "x", "{row}");
        // Three prompts of a category are too few for an interval.
        let few = self::row(&found, name, json!({ "category": "tests" }));
        assert_eq!(few["numbers"], json!({ "low": null, "high": null }));
    }

    // compare reads the record.
    let file = write(dir.path(), "A.json", found.to_string());
    let compared = record(0, &["compare", &file, &file]);
    assert!(compared["rows"].as_array().unwrap().len() == found["rows"].as_array().unwrap().len());
}

#[test]
fn the_software_gpu_counts_instead_of_measuring() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = ("{\"prompt\": \"import os\"}\n", "{\"prompt\": \"def f(\"}\n");
    let [one, two] = [("one", one.into()), ("two", [one, two].concat())]
        .map(|(name, text): (&str, String)| write(dir.path(), name, text));
    let flags = ["-n", "4", "--block", "6", "--device", "cuda"];
    let found = record(0, &args(&two, &flags));
    assert_eq!(found["machine"]["device"], "softgpu");
    assert!(found["rows"].as_array().unwrap().iter().all(|row| row["kind"] == "counted"), "{found}");
    check_acceptance(&found, &accepted(&two, &flags), 6);
    for mode in ["plain", "dflash"] {
        let of = || json!({ "decoding": mode });
        let all = row(&found, "all answers", of());
        let number = |key: &str| all["numbers"][key].as_f64().unwrap();
        let bytes = number("streamed") + number("read") + number("written");
        assert_eq!(all["median"], bytes);
        assert_eq!(value(&found, "bytes per token", of()), bytes / 8.0);
        assert_eq!(value(&found, "launches per token", of()), number("launches") / 8.0);
        assert_eq!(value(&found, "mma per token", of()), number("mma") / 8.0);
    }
    // The rest with a small pair. Counters are the same in every repeat; sums are over all repeats.
    let (target, drafter) = support::odd();
    let pair = support::write_pair(&target, &drafter);
    let pair_flags = program::flags(&pair);
    let small = |more: &[&str]| {
        let flags =
            pair_flags.iter().map(String::as_str).chain(["--device", "cuda", "--ignore-eos", "--block", "4"]);
        record(0, &args(&one, &flags.chain(more.iter().copied()).collect::<Vec<_>>()))
    };
    let (found_once, twice) = (small(&["-n", "4"]), small(&["-n", "4", "--repeat", "2"]));
    let launches = |record: &Value| value(record, "launches per token", json!({ "decoding": "dflash" }));
    let all = |record: &Value| value(record, "all answers", json!({ "decoding": "dflash" }));
    assert_eq!((launches(&twice), all(&twice)), (launches(&found_once), 2.0 * all(&found_once)));
    // Launches grow with the steps of AR decoding, one per token after the first, and with the rounds of
    // DFlash.
    let longer = [("4", found_once), ("6", small(&["-n", "6"])), ("9", small(&["-n", "9"]))];
    let longer = longer.map(|(n, found)| {
        let launches = |mode: &str| {
            row(&found, "all answers", json!({ "decoding": mode }))["numbers"]["launches"].as_u64().unwrap()
        };
        let length = row(&found, "acceptance length", json!({ "mean": "tokens/rounds" }));
        let rounds = length["numbers"]["rounds"].as_u64().unwrap();
        [(launches("plain"), n.parse().unwrap()), (launches("dflash"), rounds)]
    });
    for mode in [0, 1] {
        let [first, second, third] = longer.map(|both| both[mode]);
        let more = |a: (u64, u64), b: (u64, u64)| (b.0 - a.0, b.1 - a.1);
        let ((some, few), (all, many)) = (more(first, second), more(first, third));
        assert!(few > 0 && many > few && some * many == all * few && all % many == 0, "{longer:?}");
    }
    let table = flat(&bench(["show", &write(dir.path(), "found.json", found.to_string())]).done());
    assert!(table.contains("on software GPU (h200): counters, no times"), "{table}");
}

/// With every verification method, with trees and with adaptive rounds, the acceptance equals that of
/// dflash-gen, and the record has the settings.
#[test]
fn every_speculation_setting_is_measured_and_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let two = categorised(dir.path(), &[json!(null), json!(null)]);
    let hot = ["-n", "14", "--temperature", "1", "--seed", "3", "--device", "cpu"];
    let report = dir.path().join("page.html").display().to_string();
    let drafts = |verify: &str, tree: Value, adaptive: bool, coupled: bool, temperature: Value| {
        json!({
            "verify": verify, "tree": tree, "adaptive": adaptive, "threshold": null, "confidence": null,
            "coupled": coupled, "draft_temperature": temperature,
        })
    };
    let mut with_threshold = drafts("match", Value::Null, true, false, Value::Null);
    with_threshold["threshold"] = json!(0.3);
    let null = || Value::Null;
    for (flags, expected, title) in [
        (&[][..], drafts("match", null(), false, false, null()), "seed 3; AR and DFlash in turn"),
        (
            &["--tree", "9"],
            drafts("match", json!(9), false, false, null()),
            "seed 3, trees of 9; AR and DFlash in turn",
        ),
        (
            &["--adaptive"],
            drafts("match", null(), true, false, null()),
            "seed 3, adaptive; AR and DFlash in turn",
        ),
        (&["--adaptive=0.3"], with_threshold, "seed 3, adaptive at 0.3; AR and DFlash in turn"),
        (
            &["--coupled", "--draft-temperature", "0.3"],
            drafts("match", null(), false, true, json!(0.3)),
            "seed 3, coupled drafts, drafts at temperature 0.3; AR and DFlash in turn",
        ),
        (
            &["--verify", "rejection"],
            drafts("rejection", null(), false, false, json!(1.0)),
            "seed 3, --verify rejection; AR and DFlash in turn",
        ),
        (
            &["--verify", "block", "--draft-temperature", "0.5"],
            drafts("block", null(), false, false, json!(0.5)),
            "seed 3, --verify block, drafts at temperature 0.5; AR and DFlash in turn",
        ),
    ] {
        let all = [&hot[..], flags].concat();
        let page = ["--repeat", "2", "--report", &report];
        let found = record(0, &args(&two, &[&all[..], &page].concat()));
        assert_eq!(found["drafts"], expected);
        let records = run([&["--prompts", &two, "--json", "-q"], &all[..]].concat()).json();
        let lists = |field: &str| -> Vec<Vec<usize>> {
            records.iter().map(|one| serde_json::from_value(one[field].clone()).unwrap()).collect()
        };
        let (accepted, drafted) = (lists("accepted"), lists("drafted"));
        check_acceptance(&found, &accepted, 16);
        let sum = |lists: Vec<Vec<usize>>| lists.concat().iter().sum::<usize>() as f64;
        assert_eq!(value(&found, "drafts per token", json!({})), sum(drafted) / sum(accepted));

        let sampled = expected["verify"] != "match";
        let rows = found["rows"].as_array().unwrap();
        let identical = rows.iter().filter(|row| row["name"] == "identical").collect::<Vec<_>>();
        let (to, compared) = if sampled { (json!({ "to": "repeat 1" }), 2) } else { (json!({}), 4) };
        assert_eq!(identical.len(), 1);
        assert_eq!((&identical[0]["parameters"], &identical[0]["median"]), (&to, &json!(1.0)), "{flags:?}");
        assert_eq!(identical[0]["numbers"], json!({ "compared": compared }));
        // The page has the title of the table.
        let page = std::fs::read_to_string(&report).unwrap();
        assert!(page.contains(title), "{title}: {page}");
        let distribution = "the tokens are not those of AR and are not compared with them";
        assert_eq!(page.contains(distribution), sampled, "{title}: {page}");
    }
    // At temperature 0 the distribution has one token, so the tokens are those of AR decoding.
    let greedy = ["-n", "20", "--device", "cpu", "--repeat", "1", "--verify", "block"];
    let found = record(0, &args(&two, &greedy));
    assert_eq!(row(&found, "identical", json!({}))["numbers"], json!({ "compared": 2 }));
    assert_eq!(found["drafts"]["draft_temperature"], 0.0);
}

#[test]
fn illegal_combinations_are_refused_as_by_dflash_gen() {
    let dir = tempfile::tempdir().unwrap();
    let one = write(dir.path(), "one.jsonl", "{\"prompt\": \"a\"}\n");
    for flags in [
        &["--coupled", "--verify", "block"][..],
        &["--draft-temperature", "1"],
        &["--verify", "block", "--draft-temperature", "-1"],
        &["--verify", "typical"],
        &["--coupled", "--block", "1"],
        &["--tree", "1"],
        &["--tree", "65"],
        &["--tree", "x"],
        &["--tree", "9", "--coupled"],
        &["--adaptive", "--tree", "9", "--verify", "rejection"],
        &["--adaptive=0"],
        &["--adaptive", "--block", "1"],
    ] {
        let theirs = run([&["--prompts", &one], flags].concat());
        let sentence = theirs.err.strip_prefix("dflash-gen: ").unwrap();
        assert!(theirs.code == 2, "{theirs:?}");
        refused(bench(args(&one, flags)), 2, sentence);
    }
}

#[test]
fn a_batch_accepts_what_its_prompts_accept_alone() {
    let flags = ["--count", "3", "-n", "8", "--device", "cpu", "--repeat", "5"];
    let [alone, together] =
        [&[][..], &["--batch", "2"]].map(|more| record(0, &args(PROMPTS, &[&flags, more].concat())));
    let counted_rows = |record: &Value| -> Vec<Value> {
        let rows = record["rows"].as_array().unwrap().iter();
        rows.filter(|row| row["kind"] == "counted").cloned().collect()
    };
    assert_eq!(counted_rows(&alone), counted_rows(&together));
    assert_eq!(counted_rows(&alone).iter().filter(|row| row["name"] == "rounds").count(), 16);
    for mode in ["plain", "dflash"] {
        let row = row(&together, "tokens per second, all", json!({ "decoding": mode }));
        assert_eq!((row["samples"].as_array().unwrap().len(), &row["rounds"]), (5, &Value::Null));
    }
    // Five repeats are enough for an interval.
    assert!(row(&together, "speed-up, all", json!({}))["numbers"]["low"].is_number());
    let rows = alone["rows"].as_array().unwrap();
    assert!(rows.iter().all(|row| !row["name"].as_str().unwrap().ends_with(", all")));
}

#[test]
fn answers_of_one_token_have_no_rounds() {
    // Every token is a stop token here; --ignore-eos continues after them.
    let (target, drafter) = (
        support::Target { eos: (0..301).collect(), vocab: 301, ..support::Target::default() },
        support::Drafter::default(),
    );
    let pair = support::write_pair(&target, &drafter);
    let dir = tempfile::tempdir().unwrap();
    let prompts = write(dir.path(), "p.jsonl", "{\"prompt\": \"abc\"}\n\n{\"prompt\": \"b\"}\n");
    let flags = program::flags(&pair);
    let flags: Vec<&str> = flags.iter().map(String::as_str).chain(["--device", "cpu", "-n", "4"]).collect();
    let found = record(0, &args(&prompts, &flags));
    let rows =
        |name: &str| found["rows"].as_array().unwrap().iter().filter(|row| row["name"] == name).count();
    assert_eq!(value(&found, "tokens of answers", json!({})), 2.0);
    assert_eq!((rows("TTFT"), rows("TPOT"), rows("speed-up"), rows("speed-up of decoding")), (2, 0, 1, 0));
    assert_eq!((rows("acceptance length"), rows("accepted at position")), (0, 0));
    let all = record(0, &args(&prompts, &[&flags[..], &["--ignore-eos"]].concat()));
    assert_eq!(value(&all, "tokens of answers", json!({})), 8.0);
    // --stop-id still ends them, and --verbose says so.
    let ids: Vec<String> = (0..301).flat_map(|id| ["--stop-id".into(), id.to_string()]).collect();
    let ids = ids.iter().map(String::as_str).chain(["--ignore-eos", "-v", "--json"]);
    let done = bench(args(&prompts, &flags).into_iter().chain(ids));
    assert!(done.err.starts_with("stop ids: 0 (--stop-id), 1 (--stop-id), "), "{}", done.err);
    assert_eq!(value(&done.json()[0], "tokens of answers", json!({})), 2.0);
}

/// As dflash-gen: a target without --draft, and --draft none, decode without drafts.
#[test]
fn without_a_drafter_only_ar_decoding_is_measured() {
    let pair = support::write_pair(
        &support::Target { vocab: 301, ..support::Target::default() },
        &support::Drafter::default(),
    );
    let target = pair.target.display().to_string();
    let dir = tempfile::tempdir().unwrap();
    let prompts = write(dir.path(), "p.jsonl", "{\"prompt\": \"abc\"}\n{\"prompt\": \"b\"}\n");
    let alone = ["--target", &target, "--device", "cpu", "-n", "4", "--repeat", "2", "--ignore-eos"];
    let run = bench(args(&prompts, &alone));
    assert!(run.err.starts_with("no --draft, so autoregressive decoding: "), "{run:?}");
    let title =
        format!("{target} on cpu: 2 prompts, up to 4 tokens each, greedy; AR decoding alone, 2 times");
    assert!(flat(&run.out).starts_with(&title), "{title}: {}", run.out);
    assert!(!run.out.contains("DFlash") && !run.out.contains("tau"), "{}", run.out);
    for more in [&[][..], &["--draft", "none"], &["--draft", "none", "--batch", "2"]] {
        let found = record(0, &args(&prompts, &[&alone[..], more].concat()));
        assert_eq!((&found["model"]["drafter"], &found["drafts"]), (&Value::Null, &Value::Null));
        let rows = found["rows"].as_array().unwrap();
        let names: Vec<&str> = rows.iter().map(|row| row["name"].as_str().unwrap()).collect();
        let mut expected =
            vec!["tokens of prompts", "tokens of answers", "TTFT", "TPOT", "tokens per second"];
        expected.extend((more.len() > 2).then_some("tokens per second, all"));
        assert_eq!(names, expected);
        assert!(rows[2..].iter().all(|row| row["parameters"] == json!({ "decoding": "plain" })), "{found}");
        assert_eq!(value(&found, "tokens of answers", json!({})), 8.0);
    }
    let none = bench(args(&prompts, &[&alone[..], &["--draft", "none"]].concat()));
    assert_eq!((none.code, none.err.as_str()), (0, ""), "--draft none was asked for");
    // The demo target without its drafter, counted.
    let one = write(dir.path(), "one.jsonl", "{\"prompt\": \"def\"}\n");
    let counted = record(0, &args(&one, &["--draft", "none", "--device", "cuda", "-n", "2"]));
    assert_eq!(counted["model"], json!({ "target": "demo/target", "drafter": null }));
    assert!(value(&counted, "launches per token", json!({ "decoding": "plain" })) > 1.0);
    assert_eq!(counted["rows"].as_array().unwrap().len(), 2 + 4);
}

/// Several drafters answer the same prompts: each has the rows that it has alone.
#[test]
fn several_drafters_are_compared_in_one_run() {
    let flags = ["-n", "24", "--device", "cpu", "--repeat", "1", "--count", "2"];
    let drafts = ["--draft", "lookup", "--draft", "none", "--draft", "suffix", "--block", "6"];
    let all = [&flags[..], &drafts].concat();
    let found = record(0, &args(PROMPTS, &all));
    assert_eq!(found["model"]["drafter"], "lookup, none, suffix");
    assert_eq!(found["settings"]["block"], "6,1,6");
    let rows = |of: &Value, name: &str| -> Vec<Value> {
        let rows = of["rows"].as_array().unwrap().iter().filter(|row| row["parameters"]["draft"] == name);
        rows.cloned().collect()
    };
    for draft in ["lookup", "suffix"] {
        let own = record(0, &args(PROMPTS, &[&flags[..], &["--draft", draft, "--block", "6"]].concat()));
        let own = own["rows"].as_array().unwrap();
        let together = rows(&found, draft);
        assert_eq!(together.len(), own.len());
        for (row, own) in together.into_iter().zip(own) {
            let mut parameters = own["parameters"].clone();
            parameters["draft"] = draft.into();
            assert_eq!((&row["name"], &row["parameters"]), (&own["name"], &parameters));
            assert!(row["kind"] == "measured" || row["median"] == own["median"], "{row} {own}");
        }
    }
    assert!(
        rows(&found, "none").iter().all(|row| row["parameters"].get("decoding") != Some(&json!("dflash")))
    );
    // A line for each, with the acceptance length, and one with the acceptance of each draft.
    let table = bench(args(PROMPTS, &all)).done();
    let tau = value(&found, "acceptance length", json!({ "draft": "lookup", "mean": "tokens/rounds" }));
    let first = value(&found, "accepted at position", json!({ "draft": "lookup", "position": 1 }));
    let lines: Vec<Vec<&str>> = table.lines().map(|line| line.split_whitespace().collect()).collect();
    let of = |name: &str| lines.iter().filter(|line| line.first() == Some(&name)).collect::<Vec<_>>();
    assert_eq!((of("lookup").len(), of("none").len(), of("suffix").len()), (2, 2, 2), "{table}");
    assert_eq!(of("lookup")[0][1].parse::<f64>().unwrap(), (tau * 1e3).round() / 1e3, "{table}");
    assert_eq!(of("lookup")[1][1], format!("{:.1}", first * 100.0), "{table}");
    assert!(flat(&table).contains("with lookup, none, suffix on cpu: 2 prompts"), "{table}");
    let twice = bench(args(PROMPTS, &["--draft", "lookup", "--draft", "lookup", "--device", "cpu"]));
    refused(twice, 2, "--draft lookup is given twice");
    let tree = ["--draft", "lookup", "--draft", "suffix", "--tree", "9", "--device", "cpu"];
    refused(bench(args(PROMPTS, &tree)), 2, "--tree needs a drafter, but drafts are those of lookup");
}

#[test]
fn generate_refuses_invalid_input_with_one_error_line() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| write(dir.path(), name, text);
    let two = file("two.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\": \"b\", \"category\": \"x\"}\n");
    for (flags, part) in [
        (&["-n", "1"][..], "--max-tokens is 1, which leaves no round to measure: expected at least 2"),
        (&["-n", "x"], "invalid value 'x' for '--max-tokens <N>'"),
        (&["--repeat", "0"], "--repeat is 0, which measures nothing: expected at least 1"),
        (&["--count", "0"], "--count is 0, which leaves no prompt: expected at least 1"),
        (&["--count", "3"], "--count is 3, but"),
        (&["--batch", "3"], "--batch is 3, expected 1 to 2, the number of prompts"),
        (&["--batch", "0"], "--batch is 0, expected 1 to 2, the number of prompts"),
        (&["--block", "1"], "--block is 1, which is AR decoding: expected at least 2"),
        (&["--block", "17"], "--block is 17, expected 1 to 16"),
        (&["--ctx", "1"], "--ctx is 1, expected 2 to 4096"),
        (&["--temperature", "-1"], "--temperature is -1, expected 0 (greedy)"),
        (&["--gpu", "0"], "--gpu needs --device cuda or auto"),
        (&["--target", "x", "--tree", "4"], "--tree needs a drafter, but --draft is none"),
        (&["--draft", "none", "--taps", "1"], "--taps needs a drafter, but --draft is none"),
    ] {
        refused(bench(args(&two, &[flags, &["--device", "cpu"]].concat())), 2, part);
    }
    refused(bench(["generate", "--count", "99"]), 2, "--count is 99, but the built-in list holds 8 prompts");
    refused(bench(["generate", "--batch", "9"]), 2, "--batch is 9, expected 1 to 8, the number of prompts");
    refused(bench(args(&two, &["--target", "nowhere", "--draft", "nowhere"])), 3, "nowhere does not exist");
    for (name, text, part) in [
        ("empty.jsonl", "\n", "is empty, expected JSON lines"),
        ("own.jsonl", "{\"prompt\": \"a\", \"seed\": 1}", "line 1 has settings of its own, but all prompts"),
        ("turns.jsonl", "{\"turns\": [\"a\", \"b\"]}", "line 1 has several turns, expected one prompt"),
        ("field.jsonl", "{\"prompt\": \"a\", \"top\": 1}", "line 1: top is not a known field"),
        (
            "ids.jsonl",
            "{\"prompt_tokens\": [2048]}",
            "line 1 holds token id 2048, expected ids from 0 to 2047",
        ),
        ("cut.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\"", "cut.jsonl line 2: EOF while parsing"),
        ("neither.jsonl", "{}", "line 1 has neither prompt nor messages"),
        (
            "number.jsonl",
            "{\"prompt\": \"a\", \"category\": 5}",
            "line 1 has the category 5, expected a text",
        ),
        (
            "lines.jsonl",
            "{\"prompt\": \"a\", \"category\": \"a\\nb\"}",
            "has the category \"a\\nb\", expected",
        ),
        (
            "chat.jsonl",
            "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}",
            "has no chat template: expected",
        ),
        ("none.jsonl", "{\"prompt\": \"\"}", "line 1 is empty, expected at least one token"),
        ("long.jsonl", &format!("{{\"prompt\": \"{}\"}}", "a b ".repeat(4096)), "but the context holds 4096"),
    ] {
        refused(bench(args(&file(name, text), &["--device", "cpu"])), 2, part);
    }
    refused(bench(args("nowhere.jsonl", &[])), 2, "nowhere.jsonl cannot be read");
    // dflash-gen takes any category.
    run(["--prompts", &dir.path().join("number.jsonl").display().to_string(), "-n", "1"]).done();
    let mut command = Command::new(env!("CARGO_BIN_EXE_dflash-bench"));
    command.args(["generate", "--help"]);
    assert!(finish(command).done().contains("6 an answer of DFlash differs"));
}

// ---- without prompts, without a subcommand ----

#[test]
fn generate_answers_built_in_prompts_by_default() {
    let flags = ["generate", "--device", "cpu", "-n", "4", "--repeat", "1"];
    let found = record(0, &flags);
    assert_eq!(row(&found, "identical", json!({}))["numbers"], json!({ "compared": 8 }));
    assert_eq!(value(&found, "tokens of answers", json!({})), 32.0);
    let few = record(0, &[&flags[..], &["--count", "3"]].concat());
    assert_eq!(value(&few, "tokens of answers", json!({})), 12.0);
    let table = flat(&bench(flags).done());
    assert!(table.contains(&format!("{DEMO} on cpu: 8 built-in prompts")), "{table}");
}

#[test]
fn without_a_subcommand_it_prints_a_short_table() {
    let table = bench([] as [&str; 0]).done();
    for part in [
        "built-in prompts",
        "AR",
        "DFlash",
        "tokens per second",
        "tokens per round (tau)",
        "answers equal to AR's",
        "16 of 16",
    ] {
        assert!(table.contains(part), "{part}: {table}");
    }
    assert!(table.contains('█') && table.lines().count() < 50, "{table}");
    assert!(table.lines().all(|line| line.chars().count() <= 100), "{table}");
    let found = record(0, &[]);
    assert_eq!((&found["command"], &found["arguments"]), (&json!("generate"), &json!(["--json"])));
}

/// One line per number of tokens, with its count, its fraction and a bar in proportion.
#[test]
fn the_histogram_has_a_bar_for_each_number_of_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["generate", "--device", "cpu", "-n", "32", "--repeat", "1", "--count", "4", "--block", "6"];
    let found = record(0, &flags);
    let counts = [1, 2, 3, 4, 5, 6].map(|k| value(&found, "rounds", json!({ "accepted": k })));
    let (sum, tallest) = (counts.iter().sum::<f64>(), counts.iter().copied().fold(0.0, f64::max));
    let table = bench(["show", &write(dir.path(), "a.json", found.to_string())]).done();
    let lines: Vec<&str> =
        table.lines().skip_while(|line| !line.starts_with("tokens  rounds")).skip(1).collect();
    assert_eq!(lines.len(), 6, "{table}");
    for (i, (line, count)) in lines.iter().zip(counts).enumerate() {
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[..2], [(i + 1).to_string(), count.to_string()], "{line}");
        assert_eq!(words[2], format!("{:.1}", count / sum * 100.0), "{line}");
        let bar = line.chars().filter(|c| ('█'..='▏').contains(c)).count();
        assert_eq!(bar, (count / tallest * 30.0).ceil() as usize, "{line}");
        if i < 5 {
            let share = value(&found, "accepted at position", json!({ "position": i + 1 }));
            assert!(line.contains(&format!("{:.1} %", share * 100.0)), "{line}");
        }
    }
    // AR and DFlash are columns of one table.
    assert!(table.contains("TTFT") && !table.contains("plain"), "{table}");
    assert_eq!(table.lines().filter(|line| line.starts_with("TTFT")).count(), 1, "{table}");
}
