//! What users see when the driver, the GPU or a kernel cannot do what is asked: exit codes and sentences.

use crate::support::program::{self, Run};
use crate::support::software_gpu::{Settings, changed, in_parallel, path, run, run_any};

use std::fs;

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

/// Files of the driver's names that are no libraries, first on the loader's path: this machine may have a
/// driver.
#[test]
fn a_machine_without_a_driver_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["libcuda.so", "libcuda.so.1", "libnvcuda.so", "libnvcuda.so.1"] {
        program::write(folder.path(), name, "no library");
    }
    let mut command = program::command(["--device", "cuda", "x"]);
    command.env("LD_LIBRARY_PATH", folder.path());
    let words = "device cuda: no NVIDIA driver on this machine (libcuda.so.1 was not found)";
    check(&program::finish(command), 4, words);
}

/// What a run prints whose call `n` of a driver function and all later ones fail, and what it did not
/// release.
fn with_failure(function: &str, n: usize) -> (Run, serde_json::Value) {
    let folder = tempfile::tempdir().unwrap();
    let report = folder.path().join("report");
    let fails = format!("{function}:{n}");
    let run = run(&[("SOFTGPU_FAIL", &fails), ("SOFTGPU_REPORT", report.to_str().unwrap())], PROMPT);
    // There is no report if the driver does not start.
    let report =
        fs::read(report).map_or(serde_json::Value::Null, |text| serde_json::from_slice(&text).unwrap());
    (run, report["unreleased"].clone())
}

#[track_caller]
fn all_released(function: &str, unreleased: &serde_json::Value) {
    let counts = unreleased.as_object().into_iter().flatten();
    let left: Vec<_> = counts.filter(|(_, count)| **count != 0).collect();
    assert!(left.is_empty(), "a failure of {function} leaves {left:?}");
}

/// Whichever driver function fails, the program says what it was doing, releases everything and ends.
#[test]
fn every_driver_function_may_fail() {
    let cases = [
        ("cuDriverGetVersion", 1, "CUDA: asking for the driver's version failed: "),
        ("cuInit", 4, "device cuda: the driver does not start: "),
        ("cuDeviceGetCount", 1, "CUDA: counting GPUs failed: "),
        ("cuDeviceGet", 1, "CUDA: opening the GPU failed: "),
        ("cuDeviceGetName", 1, "CUDA: asking for the GPU's name failed: "),
        ("cuDeviceGetAttribute", 1, "CUDA: asking for the GPU's properties failed: "),
        ("cuDeviceTotalMem_v2", 1, "CUDA: asking for the GPU's memory failed: "),
        ("cuDevicePrimaryCtxRetain", 1, "CUDA: creating a context failed: "),
        ("cuStreamCreate", 1, "CUDA: creating a stream failed: "),
        ("cuMemGetInfo_v2", 1, "CUDA: asking for free memory failed: "),
        ("cuMemHostAlloc", 1, "of page-locked memory for "),
        ("cuMemHostGetDevicePointer_v2", 1, "of page-locked memory for "),
        ("cuMemcpyHtoDAsync_v2", 1, "CUDA: copying to the GPU failed: "),
        ("cuMemsetD8Async", 1, "CUDA: filling device memory failed: "),
        ("cuStreamSynchronize", 1, "CUDA: copying to the GPU failed: "),
        ("cuModuleLoadDataEx", 1, "CUDA: loading kernel "),
        ("cuModuleGetFunction", 1, "CUDA: finding kernel "),
        ("cuFuncLoad", 1, "CUDA: finding kernel "),
        ("cuFuncGetAttribute", 1, "CUDA: finding kernel "),
        ("cuFuncSetAttribute", 1, "CUDA: finding kernel "),
        ("cuFuncGetParamInfo", 1, "bytes, but its parameters have []"),
        ("cuLaunchKernelEx", 1, "CUDA: launching kernel "),
        ("cuStreamBeginCapture_v2", 1, "CUDA: starting a capture failed: "),
        ("cuStreamEndCapture", 1, "CUDA: ending a capture failed: "),
        ("cuGraphInstantiateWithFlags", 1, "CUDA: instantiating a graph failed: "),
        ("cuGraphUpload", 1, "CUDA: uploading a graph failed: "),
        ("cuGraphLaunch", 1, "CUDA: launching a graph failed: "),
    ];
    in_parallel(cases.len(), |n| {
        let (function, code, words) = cases[n];
        let (run, unreleased) = with_failure(function, 1);
        check(&run, code, words);
        all_released(function, &unreleased);
    });
    // An address of the bus that is not known, and what cannot be released, stop nothing.
    let expected = run(&[], PROMPT).done();
    let ignored = [
        "cuDeviceGetPCIBusId",
        "cuMemFree_v2",
        "cuMemFreeHost",
        "cuGraphDestroy",
        "cuGraphExecDestroy",
        "cuStreamDestroy_v2",
        "cuDevicePrimaryCtxRelease_v2",
    ];
    in_parallel(ignored.len(), |n| {
        let (run, unreleased) = with_failure(ignored[n], 1);
        assert_eq!(run.done(), expected, "{}", ignored[n]);
        let left = unreleased.as_object().unwrap().values().any(|count| *count != 0);
        assert_eq!(left, n > 0, "a failure of {} leaves {unreleased}", ignored[n]);
    });
}

/// The same for later calls, of which some come while a graph is captured or replayed.
#[test]
fn later_driver_calls_may_fail() {
    let mut cases = Vec::new();
    for (function, calls) in [
        ("cuCtxSetCurrent", [2, 30, 400]),
        ("cuMemcpyHtoDAsync_v2", [2, 20, 100]),
        ("cuStreamSynchronize", [2, 20, 100]),
        ("cuModuleLoadDataEx", [2, 5, 9]),
        ("cuLaunchKernelEx", [2, 30, 100]),
        ("cuStreamBeginCapture_v2", [2, 3, 4]),
        ("cuStreamEndCapture", [2, 3, 4]),
        ("cuGraphInstantiateWithFlags", [2, 3, 4]),
        ("cuGraphUpload", [2, 3, 4]),
        ("cuGraphLaunch", [2, 3, 4]),
    ] {
        let few = if crate::support::exhaustive() { 3 } else { 1 };
        cases.extend(calls.into_iter().take(few).map(|call| (function, call)));
    }
    let expected = run(&[], PROMPT).done();
    in_parallel(cases.len(), |n| {
        let (function, call) = cases[n];
        let (run, unreleased) = with_failure(function, call);
        if run.code == 0 {
            assert_eq!(run.out, expected, "{function}:{call}");
        } else {
            check(&run, 1, "CUDA");
        }
        // Without its context a thread can release nothing.
        if function != "cuCtxSetCurrent" {
            all_released(function, &unreleased);
        }
    });
}

/// Whichever allocation fails, the program says for what memory is missing, frees the rest and ends.
#[test]
fn every_allocation_may_fail() {
    let outcome = |n: usize| with_failure("cuMemAlloc_v2", n).0;
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
        let (run, unreleased) = with_failure("cuMemAlloc_v2", 1 + n * step);
        check(&run, 5, "not enough GPU memory for ");
        all_released("cuMemAlloc_v2", &unreleased);
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
    let cases: [(Change, i32, &str); 9] = [
        (
            |text| text.replace("griddepcontrol.wait;", "griddepcontrol.hope;"),
            1,
            "CUDA: loading kernel embedding failed: a PTX JIT compilation failed (CUDA_ERROR_INVALID_PTX): ",
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
            "kernel embedding: compiled for 64 threads per block, but launched with 256",
        ),
        (
            |text| text.replace(".maxntid 256", ".maxntid 512"),
            1,
            "kernel embedding: compiled for 512 threads per block, but launched with 256",
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
    in_parallel(cases.len(), |n| {
        let (change, code, words) = cases[n];
        let folder = changed("h200", "embedding", None, change);
        refused(&[("SOFTGPU_PTX", path(&folder))], code, words);
    });
    // Static shared memory that leaves too little for what the kernel asks for.
    let more =
        |text: &str| text.replace("griddepcontrol.wait;", ".shared .b8 more[200000]; griddepcontrol.wait;");
    let folder = changed("h200", "qkv", Some("qkv_8"), more);
    let words = "CUDA: launching kernel qkv_8 failed: invalid argument (CUDA_ERROR_INVALID_VALUE)";
    refused(&[("SOFTGPU_PTX", path(&folder))], 1, words);
}

/// A target that only the CPU runs, and one that needs more shared memory than the card has: `cuda` refuses it by name,
/// `auto` takes the CPU and says why.
#[test]
fn targets_that_the_kernels_do_not_run_take_the_cpu_and_say_so() {
    let folder = tempfile::tempdir().unwrap();
    program::write(folder.path(), "prompts.jsonl", r#"{"prompt_tokens": [7, 300, 21]}"#);
    let prompts = folder.path().join("prompts.jsonl");
    let target = |name| format!("{}/tests/data/targets/{name}", env!("CARGO_MANIFEST_DIR"));
    let [moe, hybrid] = [target("qwen3_moe"), target("qwen3_5")];
    let by_name = format!("{moe}/config.json: the kernels do not run Qwen3-MoE yet");
    let by_size = "kernel attention_256x16 needs 143872 bytes of shared memory per block, software GPU (rtx5090) has 101376";
    for (card, target, sentence) in [("h200", &moe, by_name.as_str()), ("rtx5090", &hybrid, by_size)] {
        let (card, prompts) = (&[("SOFTGPU_CARD", card)], prompts.to_str().unwrap());
        let args = ["--target", target, "--draft", "none", "-n", "3", "--prompts", prompts];
        check(&run(card, args), 4, sentence);
        let run = run_any(card, ["--device", "auto"].into_iter().chain(args));
        assert_eq!(run.code, 0, "{run:?}");
        let line = format!("device: cpu: {sentence}");
        assert_eq!(run.err.lines().filter(|found| *found == line).count(), 1, "{run:?}");
    }
}
