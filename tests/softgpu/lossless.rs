//! DFlash equals AR decoding bit for bit for all images, whatever the order of threads, blocks and
//! overlapping launches, the order in which tensor cores add, and the errors of approximate instructions.

use crate::support::software_gpu::{in_parallel, run};
use crate::support::{self, exhaustive, program};

use std::path::Path;

/// A way to run kernels: card, schedule, order of sums, perturbed results, vector instructions of the host.
#[derive(Debug, Clone, Copy)]
struct Machine {
    card: &'static str,
    schedule: usize,
    sums: &'static str,
    perturb: bool,
    vectors: &'static str,
}

impl Machine {
    /// `compute_80` and `compute_90` (with 227 and with 99 KiB of shared memory), five schedules, three
    /// orders of sums, exact and perturbed.
    fn all() -> Vec<Machine> {
        let mut all = Vec::new();
        for schedule in 0..5 {
            for sums in ["ascending", "pairwise", "aligned"] {
                for perturb in [false, true] {
                    let cards = ["h200", "a100", "rtx5090"];
                    all.extend(cards.map(|card| Machine {
                        card,
                        schedule,
                        sums,
                        perturb,
                        vectors: "avx512",
                    }));
                }
            }
        }
        all
    }

    /// Runs `dflash-gen`; fails unless it succeeds. Returns what it printed.
    fn run(&self, args: &[&str]) -> String {
        let schedule = self.schedule.to_string();
        let settings = [
            ("SOFTGPU_CARD", self.card),
            ("SOFTGPU_SCHEDULE", schedule.as_str()),
            ("SOFTGPU_SUMS", self.sums),
            ("SOFTGPU_PERTURB", if self.perturb { "1" } else { "0" }),
            ("SOFTGPU_VECTORS", self.vectors),
        ];
        let run = run(&settings, args);
        assert_eq!(run.code, 0, "{args:?} on {self:?}:\n{}\n{}", run.out, run.err);
        run.out
    }
}

/// Every `step`th element, from one on that differs from case to case; all if [`exhaustive`].
fn some<T: Copy>(all: &[T], case: usize, step: usize) -> Vec<T> {
    let step = if exhaustive() { 1 } else { step };
    all.iter().skip(case * 7 % step).step_by(step).copied().collect()
}

/// The first prompts of tests/data/prompts.jsonl, shortened so that they run quickly.
fn prompts(folder: &Path, count: usize) -> String {
    let all = include_str!("../data/prompts.jsonl").lines().take(count).enumerate();
    let lines = all.map(|(n, line)| {
        let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
        let prompt: String = line["prompt"].as_str().unwrap().chars().take(20 + n * 6).collect();
        line["prompt"] = prompt.into();
        format!("{line}\n")
    });
    program::write(folder, &format!("{count}.jsonl"), lines.collect::<String>())
}

/// A random pair with what the demo pair does not have: sums over K in three slices, and groups of two heads.
fn narrow() -> support::Pair {
    let (heads, kv_heads, head_dim) = (2, 1, 64);
    let target = support::Target {
        intermediate: 768,
        layers: 2,
        heads,
        kv_heads,
        head_dim,
        vocab: 300,
        seed: 21,
        ..Default::default()
    };
    let drafter = support::Drafter {
        intermediate: 32,
        heads,
        kv_heads,
        head_dim,
        taps: vec![0],
        block: 16,
        ..Default::default()
    };
    support::write_pair(&target, &drafter)
}

/// A pair with this trained drafter, and one of its prompts, as flags.
fn trained(folder: &Path, drafter: &str) -> String {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/drafters");
    let oracle = std::fs::read(data.join(drafter).join("oracle.json")).unwrap();
    let oracle: serde_json::Value = serde_json::from_slice(&oracle).unwrap();
    let prompt = serde_json::json!({ "prompt_tokens": oracle["prompts"][0]["prompt"] });
    let file = program::write(folder, &format!("{drafter}.jsonl"), format!("{prompt}\n"));
    let data = data.display();
    format!("--target {data}/target --draft {data}/{drafter} --prompts {file}")
}

/// A hybrid target, a random drafter for it, and a prompt, as flags.
fn hybrid(folder: &Path) -> String {
    let of = support::Target { hidden: 64, vocab: 512, layers: 4, ..Default::default() };
    let drafter = support::Drafter {
        intermediate: 32,
        heads: 2,
        kv_heads: 1,
        head_dim: 64,
        taps: vec![0, 2],
        block: 16,
        ..Default::default()
    };
    support::write_drafter(&folder.join("drafter"), &of, &drafter);
    let file = program::write(folder, "hybrid.jsonl", "{\"prompt_tokens\": [7, 300, 21, 90, 5]}\n");
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/targets/qwen3_5");
    format!("--target {} --draft {} --prompts {file}", target.display(), folder.join("drafter").display())
}

#[test]
fn tokens_and_logits_equal_those_of_ar_decoding_on_every_machine() {
    let flags = [
        "",
        "--block 4",
        "--tree 8",
        "--tree 64",
        "--temperature 0.8 --seed 1",
        "--tree 20 --temperature 0.8 --top-p 0.95 --seed 2",
        "--coupled --temperature 1 --seed 3",
        "--adaptive=0.5 --temperature 0.7 --top-k 20 --min-p 0.01 --seed 4",
    ];
    let (machines, narrow, folder) = (Machine::all(), narrow(), tempfile::tempdir().unwrap());
    let narrow = program::flags(&narrow).join(" ");
    // A drafter with convolutions and a candidate selector, and one that drafts one token after the other.
    let trained = ["dflash2-zlab", "eagle3-speculators"].map(|name| trained(folder.path(), name));
    let hybrid = hybrid(folder.path());
    // Heads of 256 need more shared memory than an RTX 5090 has.
    let large: Vec<Machine> = machines.iter().copied().filter(|machine| machine.card != "rtx5090").collect();
    let mut runs = Vec::new();
    for (case, flags) in flags.into_iter().enumerate() {
        let pairs = ["", narrow.as_str()];
        for (n, machine) in some(&machines, case, 90).into_iter().enumerate() {
            runs.push((machine, format!("-q -n 5 --check-lossless {flags} {} x=1", pairs[(case + n) % 2])));
        }
        // Each with every third case; exhaustive: all.
        let able = |n: usize| n != 1 || !flags.contains("--tree");
        let chosen = |n: usize| exhaustive() || case % 3 == n;
        for (n, pair) in trained.iter().enumerate().filter(|(n, _)| able(*n) && chosen(*n)) {
            for machine in some(&machines, case + 4 + 5 * n, 90) {
                runs.push((machine, format!("-q -n 12 --check-lossless {flags} {pair}")));
            }
        }
        if case % 3 == 0 || exhaustive() {
            for machine in some(&large, case, 60) {
                runs.push((machine, format!("-q -n 6 --check-lossless {flags} {hybrid}")));
            }
        }
    }
    in_parallel(runs.len(), |n| {
        let (machine, line) = &runs[n];
        let printed = machine.run(&line.split_whitespace().collect::<Vec<_>>());
        assert!(printed.trim_end().ends_with("yes"), "{line} on {machine:?}:\n{printed}");
    });
}

fn tokens(machine: Machine, line: &str) -> Vec<serde_json::Value> {
    let printed = machine.run(&line.split_whitespace().collect::<Vec<_>>());
    let answers = printed.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let tokens: Vec<_> = answers.map(|answer| answer["tokens"].clone()).collect();
    assert!(tokens.iter().all(|tokens| tokens.as_array().is_some_and(|all| !all.is_empty())), "{printed}");
    tokens
}

/// Requests that run together, of which some end early, each get what AR decoding gives it alone.
#[test]
fn batches_equal_ar_decoding_on_every_machine() {
    let cases = [(2, "--tree 8"), (3, "--temperature 1 --seed 5"), (5, "--tree 4"), (4, "--block 8")];
    let (folder, machines, narrow) = (tempfile::tempdir().unwrap(), Machine::all(), narrow());
    let pairs = ["", &program::flags(&narrow).join(" ")];
    let mut runs = Vec::new();
    for (case, (batch, flags)) in cases.into_iter().enumerate() {
        // One more than fit, so that one joins later.
        let file = prompts(folder.path(), batch + 1);
        for (n, machine) in some(&machines, case, 90).into_iter().enumerate() {
            let line = format!("-q -n 4 --json --prompts {file} {}", pairs[(case + n) % 2]);
            let sampling = if flags.contains("--seed") { flags } else { "" };
            runs.push((
                machine,
                format!("{line} --batch {batch} {flags}"),
                format!("{line} --block 1 {sampling}"),
                batch + 1,
            ));
        }
    }
    in_parallel(runs.len(), |n| {
        let (machine, together, alone, count) = &runs[n];
        let expected = tokens(*machine, alone);
        assert_eq!(expected.len(), *count);
        assert_eq!(tokens(*machine, together), expected, "{together} on {machine:?}");
    });
}

/// What these methods emit depends on the rounding of logits, so that only schedules must agree, with any vector
/// instructions of the host.
#[test]
fn rejection_and_block_verification_do_not_depend_on_schedule_and_vectors() {
    let cases =
        ["--verify rejection", "--verify rejection --tree 8", "--verify block", "--verify block --tree 8"];
    let machines = Machine::all();
    let folder = tempfile::tempdir().unwrap();
    let file = prompts(folder.path(), 2);
    let mut runs = Vec::new();
    for (case, flags) in cases.into_iter().enumerate() {
        let first: Vec<Machine> = machines.iter().copied().filter(|machine| machine.schedule == 0).collect();
        for machine in some(&first, case, 18) {
            let line = format!(
                "-q -n 5 --json --temperature 0.8 --seed 6 --prompts {file} --batch {} {flags}",
                1 + case % 2
            );
            runs.push((machine, line, case));
        }
    }
    in_parallel(runs.len(), |n| {
        let (machine, line, case) = &runs[n];
        let expected = tokens(*machine, line);
        assert_eq!(expected.len(), 2);
        for schedule in some(&[1, 2, 3, 4], *case, 4) {
            let other = Machine { schedule, vectors: ["base", "avx2"][schedule % 2], ..*machine };
            assert_eq!(tokens(other, line), expected, "{line}, {other:?}");
        }
    });
}

/// Requests of many lengths, some sampled, join and leave while the host reads the results of earlier rounds. Each
/// gets what it gets alone.
#[test]
fn requests_that_join_and_leave_do_not_disturb_each_other() {
    let (folder, narrow) = (tempfile::tempdir().unwrap(), narrow());
    let count = if exhaustive() { 100 } else { 10 };
    let lines = (0..count).map(|n| {
        let mut line =
            serde_json::json!({ "prompt": "x = y + 1\n".repeat(1 + n % 5), "max_tokens": 1 + n * 7 % 23 });
        if n % 3 == 0 {
            line["temperature"] = 0.9.into();
            line["seed"] = n.into();
        }
        format!("{line}\n")
    });
    let file = program::write(folder.path(), "requests", lines.collect::<String>());
    let line = format!("-q --json --block 4 --prompts {file} {}", program::flags(&narrow).join(" "));
    let first = Machine::all()[0];
    let schedule = |schedule| Machine { schedule, ..first };
    let alone = tokens(schedule(0), &line);
    assert_eq!(alone.len(), count);
    in_parallel(2, |n| {
        assert_eq!(
            tokens(schedule(1 + n), &format!("{line} --batch {}", 3 + n)),
            alone,
            "schedule {}",
            1 + n
        );
    });
}
