//! What a profiler hears: by a library that stands in for one, in a program of its own, since a program asks only once.

use crate::support::library;
use crate::support::program;

use dflash::gpu::cuda::{self, Cuda};
use dflash::gpu::device::Device;
use dflash::gpu::emulator::Emulator;
use dflash::gpu::nvtx::{range, window};
use library::library;
use program::{Run, finish};
use std::path::Path;
use std::process::Command;

/// Stand for a profiler's library and for a driver, and for neither's behaviour.
const CUDA: &str = include_str!("../data/profile/cuda.c");
const NVTX: &str = include_str!("../data/profile/nvtx.c");

/// Runs a program under the library there, and what it heard: None if it was not asked.
fn under(mut command: Command, folder: &Path, library: &Path) -> (Run, Option<String>) {
    let heard = folder.join("heard");
    command.env("NVTX_INJECTION64_PATH", library).env("RANGES", &heard);
    (finish(command), std::fs::read_to_string(heard).ok())
}

fn generation() -> Command {
    program::command(["--device", "emulator", "--raw", "-n", "6", "--seed", "1", "def f(x):"])
}

/// This test again, in a program of its own.
fn again(name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("profile::{name}")]);
    command
}

#[test]
fn ranges_nest_and_end_with_their_scope() {
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
    let (run, heard) = under(again("ranges_nest_and_end_with_their_scope"), folder.path(), &nvtx);
    let layer = |i| format!("  layer {i}\n    attention\n    end\n  end\n");
    let expected = format!("verify\n{}{}  \n  end\nend\naccept\nend\n", layer(0), layer(1));
    assert_eq!(heard.as_deref(), Some(&*expected), "{run:?}");
    assert_eq!(run.code, 0, "{run:?}");
}

#[test]
fn a_generation_is_a_prefill_and_rounds() {
    let folder = tempfile::tempdir().unwrap();
    let nvtx = library(folder.path(), "nvtx.so", NVTX, &[]);
    let alone = finish(generation()).done();
    let (run, heard) = under(generation(), folder.path(), &nvtx);
    let mut command = generation();
    command.arg("--json");
    let rounds = finish(command).json()[0]["rounds"].as_u64().unwrap();
    assert_eq!(run.done(), alone);
    assert!(rounds > 1);
    assert_eq!(heard.unwrap(), format!("prefill\nend\n{}", "round\nend\n".repeat(rounds as usize)));
}

#[test]
fn without_a_profiler_that_listens_nothing_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let alone = finish(generation()).done();
    let refusing = library(folder.path(), "refusing.so", NVTX, &["-DREFUSE"]);
    let empty = library(folder.path(), "empty.so", "int nothing;", &[]);
    for (profiler, asked) in [(refusing, true), (empty, false), (folder.path().join("none.so"), false)] {
        let (run, heard) = under(generation(), folder.path(), &profiler);
        assert_eq!(run.done(), alone);
        assert_eq!(heard.as_deref(), asked.then_some(""), "{profiler:?}");
        let _ = std::fs::remove_file(folder.path().join("heard"));
    }
}

#[test]
fn a_window_is_what_runs_between_two_waits() {
    if std::env::var_os("RANGES").is_some() {
        let device = Cuda::open(0).unwrap();
        assert_eq!(device.properties().pci.as_deref(), Some("0000:65:00.0"));
        assert_eq!(Cuda::open(1).unwrap().properties().pci, None);
        let file = std::path::PathBuf::from(std::env::var_os("RANGES").unwrap());
        // Only the window, and in a thread that has no context yet.
        let _ = std::fs::remove_file(&file);
        let told =
            || device.profile(false).and_then(|()| window(&device).map(drop)).map_err(|e| e.to_string());
        let told = std::thread::scope(|scope| scope.spawn(told).join().unwrap());
        std::fs::rename(&file, file.with_extension("window")).unwrap();
        let refused = "CUDA: telling the profiler failed: it does not want to (CUDA_ERROR_PROFILER_DISABLED)";
        assert_eq!(told.err().as_deref(), std::env::var_os("REFUSES").map(|_| refused));
        return;
    }
    assert_eq!(window(&Emulator::new()).map(drop), Ok(()));
    // Without kernels no card opens.
    if cuda::targets().is_empty() {
        return;
    }
    for (refuses, expected) in [(false, "stop\nwait\nstart\nwait\nstop\n"), (true, "stop\nwait\nstart\n")] {
        let folder = tempfile::tempdir().unwrap();
        library(folder.path(), "libcuda.so", CUDA, &[]);
        let mut command = again("a_window_is_what_runs_between_two_waits");
        command.env("LD_LIBRARY_PATH", folder.path());
        if refuses {
            command.env("REFUSES", "1");
        }
        let (run, _) = under(command, folder.path(), Path::new(""));
        assert_eq!(run.code, 0, "{run:?}");
        let heard = std::fs::read_to_string(folder.path().join("heard.window")).unwrap();
        assert_eq!(heard, expected);
    }
}
