//! `dflash-bench predict`: its rows against the launches of the round, and the costs that it predicts from
//! against fresh counts on the software GPU.

use crate::support::bench::{bench, record, refused, row};
use crate::support::costs::{self, Round, Sizes, cases, dflash2_cases};
use crate::support::test_gpu::TestGpu;
use dflash::checkpoint::folder::PUBLISHED;
use dflash::checkpoint::pair::Pair;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::Models;
use dflash::gpu::device::Node;
use dflash::gpu::graph_listing::of_round;
use dflash::gpu::prediction;
use dflash::gpu::prediction::costs::{COUNTERS, counters};
use dflash::spec::config::{ExactDrafts, SpecConfig};
use dflash::spec::draft_length::DraftLengthPolicy;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

fn numbers<'a>(rows: &'a [&Value], key: &'a str) -> impl Iterator<Item = f64> + 'a {
    rows.iter().map(move |row| row["numbers"][key].as_f64().unwrap())
}

/// Each launch of the engine's round is in exactly one row, and rows and parts add up to the round.
#[test]
fn predicted_rows_are_the_launches_of_the_round() {
    for (model, tree, flags) in [
        ("qwen3-8b", None, &[][..]),
        ("qwen3-4b", Some(64), &["--tree", "64", "--temperature", "0.7", "--top-k", "20", "--top-p", "0.95"]),
        ("llama-3.1-8b", None, &["--batch", "8", "--card", "A100-80GB", "--context", "4096"]),
    ] {
        let found = record(0, &[&["predict", "--model", model], flags].concat());
        let rows: Vec<&Value> = found["rows"].as_array().unwrap().iter().collect();
        assert!(rows.iter().all(|row| row["kind"] == "predicted"));
        let of_unit = |unit: &str| rows.iter().copied().filter(|row| row["unit"] == unit).collect::<Vec<_>>();
        let kernels = of_unit("us");

        let (_, target, drafter) = PUBLISHED.into_iter().find(|pair| pair.0 == model).unwrap();
        let pair = Pair::with_random_weights(target, Some(drafter)).unwrap();
        let sequences = if flags.contains(&"--batch") { 8 } else { 1 };
        let block = pair.block(None).unwrap();
        let drafts = tree.map_or(ExactDrafts::Chain, |rows| ExactDrafts::BestFirstTree { rows });
        let spec = SpecConfig::Exact { drafts, length: DraftLengthPolicy::Full };
        let config = BatchConfig::for_pair(&pair, sequences, block, None, 0).unwrap().for_spec(&spec);
        let nodes = of_round(&pair, config, flags.contains(&"--temperature")).unwrap();
        let mut expected: BTreeMap<String, f64> = BTreeMap::new();
        for node in &nodes {
            let Node::Launch(launch) = node else { panic!("{node:?}") };
            *expected.entry(launch.kernel.name.into()).or_default() += 1.0;
        }
        let mut listed: BTreeMap<String, f64> = BTreeMap::new();
        for (row, launches) in kernels.iter().zip(numbers(&kernels, "times")) {
            let (_, kernel) = row["name"].as_str().unwrap().split_once(": ").unwrap();
            *listed.entry(kernel.into()).or_default() += launches;
            assert!(row["bound"].is_string() && row["median"].as_f64().unwrap() > 0.0, "{row}");
        }
        assert_eq!(listed, expected, "{model}");

        let median = |row: &Value| row["median"].as_f64().unwrap();
        let totals = of_unit("ms");
        assert_eq!(totals[..2].iter().map(|row| &row["name"]).collect::<Vec<_>>(), ["AR step", "round"]);
        let (round, parts) = (totals[1], &totals[2..]);
        assert_eq!(parts.len(), 5, "{parts:?}");
        let ms = kernels.iter().map(|row| median(row)).sum::<f64>() / 1e3;
        assert!((ms / median(round) - 1.0).abs() < 1e-9, "{model}: {ms}, {round}");
        let ms: f64 = parts.iter().map(|row| median(row)).sum();
        assert!((ms / median(round) - 1.0).abs() < 1e-9, "{model}: {ms}, {round}");
        for of_parts in
            [numbers(parts, "launches").sum::<f64>(), round["numbers"]["launches"].as_f64().unwrap()]
        {
            assert_eq!(of_parts, nodes.len() as f64, "{model}");
        }
        // No round is faster than the roofline at the same bandwidth.
        assert!(
            numbers(&totals[..2], "share of floor").all(|share| share > 0.3 && share < 1.0),
            "{totals:?}"
        );
    }
}

#[test]
fn predictions_follow_the_bandwidth_and_the_grid_of_points() {
    let median = |record: &Value, name: &str, context: usize, batch: usize| {
        let row = row(record, name, json!({ "context": context, "batch": batch }));
        row["median"].as_f64().unwrap()
    };
    let grid = record(0, &["predict", "--context", "512-2048*2", "--batch", "1,2"]);
    let rows = grid["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 6 * 7);
    // The grid of attention has room for 8192 positions: of 224 blocks in each of 41 layers 72 have work.
    let kernels = record(0, &["predict"]);
    let idle = |row: &Value| Some(row["numbers"]["times"].as_f64()? * row["numbers"]["idle"].as_f64()?);
    let idle: f64 = kernels["rows"].as_array().unwrap().iter().filter_map(idle).sum();
    assert_eq!(idle, 41.0 * 152.0);
    assert!(median(&grid, "round", 2048, 2) > median(&grid, "round", 512, 1));
    let slow = record(0, &["predict", "--context", "512", "--ceiling", "2400"]);
    let ratio = median(&slow, "AR step", 512, 1) / median(&grid, "AR step", 512, 1);
    assert!((1.5..2.0).contains(&ratio), "{ratio}");
    let alone = record(0, &["predict", "--block", "1"]);
    assert!(
        alone["rows"].as_array().unwrap().iter().all(|row| row["unit"] == "us" || row["name"] == "AR step")
    );
}

#[test]
fn predict_refuses_what_it_cannot_predict() {
    let cases: [(&[&str], i32, &str); 9] = [
        (&["--card", "H300"], 2, "--card is \"H300\", expected H200, "),
        (&["--context", "40960"], 2, "--context has 40960, expected at most 40944, "),
        (&["--batch", "0"], 2, "--batch has 0, expected 1 to 1024"),
        (&["--tree", "65"], 2, "tree is 65, expected 2 to 64"),
        (&["--block", "1", "--tree", "8"], 2, "--tree needs a drafter and a block of at least 2 rows"),
        (&["--temperature", "1", "--top-k", "300"], 2, "--top-k has 300, expected at most 256"),
        (&["--temperature", "1", "--top-p", "0.9"], 2, "--top-p needs --top-k: "),
        (&["--top-p", "0"], 2, "top-p is 0, expected more than 0 and at most 1"),
        (
            &[
                "--model",
                "tests/data/drafters/target",
                "--draft",
                "tests/data/drafters/dspark-deepspec",
                "--context",
                "64",
            ],
            4,
            "kernel_costs.txt has none of ",
        ),
    ];
    for (flags, code, part) in cases {
        refused(bench([&["predict"], flags].concat()), code, part);
    }
}

/// For each of [`COUNTERS`] what a block may have more or less than its costs say: tails of loops, and what depends
/// on the data.
const MARGINS: [f64; COUNTERS.len()] = [100.0, 60.0, 8.0, 0.0, 8.0, 0.0, 1200.0];

/// A launch's counters are those that its costs give, within eight percent and the margins of a block. Most are
/// within one percent; the samplers' depend on the logits.
#[test]
fn kernel_costs_equal_fresh_counts() {
    costs_equal_fresh_counts(cases(), false, 20);
}

#[test]
fn kernel_costs_of_dflash2_equal_fresh_counts() {
    costs_equal_fresh_counts(dflash2_cases(), true, 2);
}

/// Of the kernels that only DFlash2 has, or of all of the pair. `least`: more kernels than these are counted.
fn costs_equal_fresh_counts(mut cases: Vec<(Sizes, Vec<Round>)>, dflash2: bool, least: usize) {
    let Some(device) = TestGpu::counting() else { return };
    let chosen = |round: &&Round| matches!(round, Round([_, 1 | 16, 0 | 64, 112], _));
    let (mut seen, mut wrong) = (BTreeSet::new(), BTreeSet::new());
    let (sizes, rounds) = cases.swap_remove(0);
    let pair = costs::pair(sizes, dflash2).unwrap();
    let models = Models::load(&device, &pair, 2048).unwrap();
    for round in rounds.iter().filter(chosen) {
        for (work, found) in costs::count(&device, &models, *round).unwrap() {
            if dflash2 && !costs::is_of_dflash2(&work) {
                continue;
            }
            let costs = prediction::costs::costs(&work.variant).unwrap();
            // The blocks of the launch; for the work after a hand-over those whose results are merged.
            let blocks = if work.blocks() > 0.0 { work.blocks() } else { work.quantities[3] };
            for (i, expected) in counters(costs, &work.quantities).into_iter().enumerate() {
                if (found[i] - expected).abs() > 0.08 * found[i] + MARGINS[i] * blocks {
                    let each = [found[i], expected].map(|n| (n / blocks).round());
                    wrong.insert(format!("{} of {}, {round:?}: {each:?}", COUNTERS[i], work.variant));
                }
            }
            seen.insert(work.variant);
        }
    }
    assert!(
        wrong.is_empty(),
        "counters of a block, found and expected from src/gpu/prediction/kernel_costs.txt:\n{}\nIf the change \
         is intended: cargo bench --bench counters -- --write",
        wrong.into_iter().collect::<Vec<_>>().join("\n")
    );
    assert!(seen.len() > least, "{seen:?}");
}
