//! What users see when the driver, the GPU or a kernel cannot do what is asked: exit codes and sentences.

use crate::support::program::Run;
use crate::support::software_gpu::{Settings, changed, in_parallel, modules, path, run};

const PROMPT: [&str; 4] = ["-q", "-n", "3", "def f(x):"];

/// Runs with these settings; checks the exit code and that stderr ends with one line that has these words.
#[track_caller]
fn refused(settings: Settings, code: i32, words: &str) {
    check(&run(settings, PROMPT), code, words);
}

#[track_caller]
fn check(run: &Run, code: i32, words: &str) {
    let last = run.err.lines().last().unwrap_or_default();
    assert_eq!(run.code, code, "{run:?}");
    assert!(last.starts_with("dflash-gen: ") && last.contains(words), "expected {words:?}: {run:?}");
}

#[test]
fn drivers_and_gpus_that_cannot_run_the_kernels_are_refused() {
    let cases: [(Settings, i32, &str); 5] = [
        (&[("SOFTGPU_DEVICES", "0")], 4, "device cuda: the driver sees no GPU"),
        (
            &[("SOFTGPU_DRIVER_VERSION", "12040")],
            4,
            "device cuda: the NVIDIA driver supports CUDA 12.4, expected 13.0 or newer (driver 580 or newer)",
        ),
        (
            &[("SOFTGPU_CARD", "t4")],
            4,
            "device cuda: software GPU (t4) has compute capability 7.5, expected 8.0 or newer",
        ),
        // The variable has no meaning: the driver itself fails.
        (&[("SOFTGPU_CARD", "none")], 1, "CUDA: asking for the driver's version failed: "),
        (
            &[("SOFTGPU_MEMORY", "1000000")],
            5,
            "not enough memory on the device for 1 sequence of 4096 positions",
        ),
    ];
    for (settings, code, words) in cases {
        refused(settings, code, words);
    }
    check(&run(&[], ["--gpu", "1", "x"]), 4, "device cuda: no GPU number 1, the driver sees 1");
}

/// Whichever allocation fails, the program says for what memory is missing, frees the rest and ends.
#[test]
fn every_allocation_may_fail() {
    let outcome = |n: usize| run(&[("SOFTGPU_FAIL_ALLOCATION", &n.to_string())], PROMPT);
    // How many allocations a run makes: the first number with which it succeeds.
    let (mut fails, mut succeeds) = (0, 1 << 12);
    while succeeds - fails > 1 {
        let middle = (fails + succeeds) / 2;
        let run = outcome(middle);
        if run.code == 0 { succeeds = middle } else { fails = middle }
    }
    assert!(fails > 20, "{fails} allocations");
    let step = if crate::support::exhaustive() { 1 } else { 37 };
    in_parallel(fails.div_ceil(step), |n| {
        let run = outcome(1 + n * step);
        let pinned = run.err.contains("page-locked memory");
        check(
            &run,
            if pinned { 1 } else { 5 },
            if pinned { "CUDA: allocating " } else { "not enough GPU memory for " },
        );
    });
}

/// Changes the address of the kernel's first load.
fn first_load(text: &str, address: &str) -> String {
    let (before, after) = text.split_once("ld.global.u32").unwrap();
    format!("{before}ld.global.u32{}", after.replacen(']', address, 1))
}

#[test]
fn kernels_that_the_driver_refuses_are_named() {
    type Change = fn(&str) -> String;
    let failed = "failed: unspecified launch failure (CUDA_ERROR_LAUNCH_FAILED)";
    let illegal = "failed: an illegal memory access was encountered (CUDA_ERROR_ILLEGAL_ADDRESS)";
    let cases: [(Change, i32, &str); 8] = [
        (
            |text| text.replace("griddepcontrol.wait;", "griddepcontrol.hope;"),
            1,
            "CUDA module embedding: the driver refused it: a PTX JIT compilation failed (CUDA_ERROR_INVALID_PTX): ",
        ),
        (
            |text| text.replace(".version ", ".version 9"),
            4,
            "device cuda: the NVIDIA driver (CUDA 13.0) is too old for this binary's kernels, which a newer nvcc built",
        ),
        (|text| text.replace("embedding(", "embedded("), 1, "CUDA: finding kernel embedding failed: "),
        (
            |text| text.replace(".maxntid 256", ".maxntid 64"),
            1,
            "kernel embedding: 256 threads per block, but it can have at most 64",
        ),
        (
            |text| text.replacen(".param .u32", ".param .u64", 1),
            1,
            "kernel embedding: arguments of [8, 8, 8, 4, 4, 4, 4] bytes, but its parameters have [8, 8, 8, 8, 4, 4, 4]",
        ),
        (|text| text.replace("griddepcontrol.wait;", "trap;"), 1, failed),
        (|text| first_load(text, "+1073741824]"), 1, illegal),
        (|text| first_load(text, "+1]"), 1, "failed: misaligned address (CUDA_ERROR_MISALIGNED_ADDRESS)"),
    ];
    let shipped = modules("h200");
    in_parallel(cases.len(), |n| {
        let (change, code, words) = cases[n];
        let folder = changed(&shipped, "embedding", change);
        refused(&[("SOFTGPU_PTX", path(&folder))], code, words);
    });
    // Static shared memory that leaves too little for what the kernel asks for.
    let more =
        |text: &str| text.replace("griddepcontrol.wait;", ".shared .b8 more[200000]; griddepcontrol.wait;");
    let folder = changed(&shipped, "qkv_8", more);
    let words = "CUDA: launching kernel qkv_8 failed: invalid argument (CUDA_ERROR_INVALID_VALUE)";
    refused(&[("SOFTGPU_PTX", path(&folder))], 1, words);
}
