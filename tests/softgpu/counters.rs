//! What the software GPU counts does not depend on the schedule, as far as its README says.

use crate::support::exhaustive;
use crate::support::software_gpu::{in_parallel, run};

use serde_json::Value;
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
