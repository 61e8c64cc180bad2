//! What the software GPU counts does not depend on the schedule, as far as its README says. Which kernels are
//! loaded.

use crate::support::exhaustive;
use crate::support::software_gpu::{in_parallel, path, run};

use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::Batch;
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;

/// What is counted per lane, or once where all lanes of a warp meet.
const ALWAYS_EQUAL: [&str; 10] = [
    "launches",
    "blocks",
    "tensor",
    "mma",
    "barriers",
    "fences",
    "atomics",
    "bytes_read",
    "bytes_written",
    "bytes_streamed",
];

/// The counters of a short generation, by kernel.
fn counters(card: &str, schedule: usize) -> Value {
    let folder = tempfile::tempdir().unwrap();
    let (report, schedule) = (folder.path().join("report"), schedule.to_string());
    let settings = [
        ("SOFTGPU_CARD", card),
        ("SOFTGPU_SCHEDULE", &schedule),
        ("SOFTGPU_REPORT", report.to_str().unwrap()),
    ];
    run(&settings, ["-q", "-n", "6", "--temperature", "1", "--seed", "1", "def f(x):"]).done();
    let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
    report["kernels"].clone()
}

#[test]
fn schedules_count_the_same() {
    let random = if exhaustive() { vec![2, 3, 4, 5, 6, 7] } else { vec![2] };
    in_parallel(2, |n| {
        let card = ["h200", "a100"][n];
        let expected = counters(card, 0);
        let kernels = expected.as_object().unwrap();
        assert!(kernels.len() > 10, "{kernels:?}");
        assert_eq!(counters(card, 1), expected, "{card}");
        for schedule in &random {
            let other = counters(card, *schedule);
            for (kernel, counts) in kernels {
                for name in ALWAYS_EQUAL {
                    let (found, expected) = (&other[kernel][name], &counts[name]);
                    assert_eq!(found, expected, "{name} of {kernel}, {card}, schedule {schedule}");
                }
            }
        }
    });
}

/// Of more than 80 kernels the driver compiles only those of the pair's prompts and rounds, and the one that
/// packs weights.
#[test]
fn only_the_kernels_of_a_pair_are_loaded() {
    let pair = Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap();
    let config = BatchConfig::for_pair(&pair, 1, 16, None, 0).unwrap();
    let cases = [(&["--tree", "8"][..], config.with_trees(8)), (&[], config)];
    let launched = cases.map(|(flags, config)| {
        // The software GPU writes what it loads to an empty folder.
        let (folder, ptx) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let report = folder.path().join("report");
        let settings = [("SOFTGPU_PTX", path(&ptx)), ("SOFTGPU_REPORT", report.to_str().unwrap())];
        run(&settings, [&["-q", "-n", "6", "--temperature", "1", "def f(x):"], flags].concat()).done();
        let files = fs::read_dir(&ptx).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
        let loaded: BTreeSet<String> = files.map(|file| file.replace(".ptx", "")).collect();
        let kernels = Batch::kernels(&pair, config).unwrap();
        let expected = kernels.iter().map(|kernel| kernel.name).chain(["pack"]).map(String::from).collect();
        assert_eq!(loaded, expected, "{flags:?}");
        let report: Value = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
        let launched: BTreeSet<String> = report["kernels"].as_object().unwrap().keys().cloned().collect();
        assert!(launched.is_subset(&loaded) && launched.len() > 12, "{launched:?}");
        assert!(loaded.len() < 40 && !loaded.iter().any(|name| name.contains("128x")), "{loaded:?}");
        launched
    });
    assert!(launched[0].contains("tree_build") && !launched[1].contains("tree_build"), "{launched:?}");
}
