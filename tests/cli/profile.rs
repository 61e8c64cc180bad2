//! NVTX ranges and profiling windows, recorded by a library that replaces the profiler. The code under test
//! runs in a process of its own, because a process loads the profiler's library only once.

use crate::support::library;
use crate::support::program;

use crate::support::test_gpu::TestGpu;
use dflash::gpu::cuda::Cuda;
use dflash::gpu::device::Device;
use dflash::gpu::nvtx::{range, window};
use dflash::gpu::ptx;
use library::library;
use program::{Run, finish};
use std::path::Path;
use std::process::Command;

/// Replacements for the driver and for the profiler's library. They record calls and do nothing else.
const CUDA: &str = include_str!("../data/profile/cuda.c");
const NVTX: &str = include_str!("../data/profile/nvtx.c");

/// Runs a program with `library` as the profiler. Returns the run and the recorded calls, or None if the
/// library was not called.
fn run_under(mut command: Command, folder: &Path, library: &Path) -> (Run, Option<String>) {
    let recorded = folder.join("recorded");
    command.env("NVTX_INJECTION64_PATH", library).env("RANGES", &recorded);
    (finish(command), std::fs::read_to_string(recorded).ok())
}

/// A short run of `dflash-gen` on the software GPU.
fn generation() -> Command {
    program::command(["--device", "cuda", "--raw", "-n", "6", "--seed", "1", "def f(x):"])
}

/// The test `name` of this module in a process of its own.
fn rerun(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("profile::{name}")]);
    command
}

#[test]
fn nvtx_ranges_nest_and_end_with_their_scope() {
    if std::env::var_os("RANGES").is_some() {
        let outer = range("verify");
        for layer in 0..2 {
            let _layer = range(&format!("layer {layer}"));
            let _inner = range("attention");
        }
        drop(range("a zero\0byte"));
        drop(outer);
        let failing = || -> Result<(), ()> {
            let _range = range("accept");
            Err(())
        };
        assert!(failing().is_err());
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let nvtx = library(folder.path(), "nvtx.so", NVTX, &[]);
    let (run, recorded) = run_under(rerun("nvtx_ranges_nest_and_end_with_their_scope"), folder.path(), &nvtx);
    let layer = |i| format!("  layer {i}\n    attention\n    end\n  end\n");
    let expected = format!("verify\n{}{}  \n  end\nend\naccept\nend\n", layer(0), layer(1));
    assert_eq!(recorded.as_deref(), Some(&*expected), "{run:?}");
    assert_eq!(run.code, 0, "{run:?}");
}

#[test]
fn a_generation_has_a_prefill_range_and_round_ranges() {
    let folder = tempfile::tempdir().unwrap();
    let nvtx = library(folder.path(), "nvtx.so", NVTX, &[]);
    let expected_output = finish(generation()).done();
    let (run, recorded) = run_under(generation(), folder.path(), &nvtx);
    let mut command = generation();
    command.arg("--json");
    let rounds = finish(command).json()[0]["rounds"].as_u64().unwrap();
    assert_eq!(run.done(), expected_output);
    assert!(rounds > 1);
    assert_eq!(recorded.unwrap(), format!("prefill\nend\n{}", "round\nend\n".repeat(rounds as usize)));
}

#[test]
fn output_is_the_same_without_a_working_profiler() {
    let folder = tempfile::tempdir().unwrap();
    let expected_output = finish(generation()).done();
    let refusing = library(folder.path(), "refusing.so", NVTX, &["-DREFUSE"]);
    let empty = library(folder.path(), "empty.so", "int nothing;", &[]);
    for (profiler, called) in [(refusing, true), (empty, false), (folder.path().join("none.so"), false)] {
        let (run, recorded) = run_under(generation(), folder.path(), &profiler);
        assert_eq!(run.done(), expected_output);
        assert_eq!(recorded.as_deref(), called.then_some(""), "{profiler:?}");
        let _ = std::fs::remove_file(folder.path().join("recorded"));
    }
}

#[test]
fn a_profiling_window_starts_and_stops_on_an_idle_device() {
    if std::env::var_os("RANGES").is_some() {
        let device = Cuda::open(0).unwrap();
        assert_eq!(device.properties().pci.as_deref(), Some("0000:65:00.0"));
        assert_eq!(Cuda::open(1).unwrap().properties().pci, None);
        let file = std::path::PathBuf::from(std::env::var_os("RANGES").unwrap());
        // Record only the window, in a thread without a CUDA context.
        let _ = std::fs::remove_file(&file);
        let result =
            || device.profile(false).and_then(|()| window(&device).map(drop)).map_err(|e| e.to_string());
        let result = std::thread::scope(|scope| scope.spawn(result).join().unwrap());
        std::fs::rename(&file, file.with_extension("window")).unwrap();
        let refused =
            "CUDA: controlling the profiler failed: it does not want to (CUDA_ERROR_PROFILER_DISABLED)";
        assert_eq!(result.err().as_deref(), std::env::var_os("REFUSES").map(|_| refused));
        return;
    }
    assert_eq!(window(&TestGpu::new()).map(drop), Ok(()));
    // A build without kernels cannot open a GPU.
    if ptx::targets().is_empty() {
        return;
    }
    for (refuses, expected) in [(false, "stop\nwait\nstart\nwait\nstop\n"), (true, "stop\nwait\nstart\n")] {
        let folder = tempfile::tempdir().unwrap();
        library(folder.path(), "libcuda.so", CUDA, &[]);
        let mut command = rerun("a_profiling_window_starts_and_stops_on_an_idle_device");
        command.env("LD_LIBRARY_PATH", folder.path());
        if refuses {
            command.env("REFUSES", "1");
        }
        let (run, _) = run_under(command, folder.path(), Path::new(""));
        assert_eq!(run.code, 0, "{run:?}");
        let recorded = std::fs::read_to_string(folder.path().join("recorded.window")).unwrap();
        assert_eq!(recorded, expected);
    }
}
