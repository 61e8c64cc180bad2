//! `dflash-gen --device cuda` on the software GPU.

use crate::support::program::{self, Run};
use crate::support::test_gpu;

use dflash::gpu::ptx;
use std::ffi::OsStr;
use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use tempfile::TempDir;

/// Environment variables of the software GPU.
pub type Settings<'a> = &'a [(&'a str, &'a str)];

/// Runs `dflash-gen --device cuda` with these arguments.
pub fn run<A: AsRef<OsStr>>(settings: Settings, args: impl IntoIterator<Item = A>) -> Run {
    let mut command = program::command(["--device", "cuda"]);
    command.args(args);
    finish(settings, command)
}

/// Runs `dflash-gen` with these arguments, which name a device.
pub fn run_any<A: AsRef<OsStr>>(settings: Settings, args: impl IntoIterator<Item = A>) -> Run {
    finish(settings, program::command(args))
}

/// Runs one test of this program.
pub fn run_test(settings: Settings, name: &str) -> Run {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--nocapture"]);
    finish(settings, command)
}

fn finish(settings: Settings, mut command: Command) -> Run {
    install(&mut command);
    // A backtrace of the program says nothing about a kernel.
    command.envs(settings.iter().copied()).env_remove("RUST_BACKTRACE");
    program::finish(command)
}

/// Makes a program find the software GPU as its CUDA driver, except where tests run on the machine's GPU.
pub fn install(command: &mut Command) {
    if test_gpu::is_real() {
        return;
    }
    let driver = softgpu::driver_folder().expect("cargo builds the software GPU with its tests");
    command.env("LD_LIBRARY_PATH", driver);
}

/// A folder for `SOFTGPU_PTX` with changed copies of a source file's kernels, as a card gets them: of all
/// kernels in which `change` finds something, or only of the one that is named.
pub fn changed(card: &str, source: &str, kernel: Option<&str>, change: impl Fn(&str) -> String) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let capability = softgpu::card::Card::find(card).unwrap().capability;
    let mut changes = 0;
    for (file, name, old) in ptx::kernels(capability) {
        if file == source && kernel.is_none_or(|kernel| kernel == name) {
            let new = change(&old);
            changes += usize::from(new != old);
            fs::write(folder.path().join(format!("{name}.ptx")), new).unwrap();
        }
    }
    assert!(changes > 0, "{source} does not have what is changed");
    folder
}

/// The path of a folder, as the value of a variable.
pub fn path(folder: &TempDir) -> &str {
    folder.path().to_str().unwrap()
}

/// Calls `test` with each number below `count`, on as many threads as there are cores.
pub fn in_parallel(count: usize, test: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        for _ in 0..cores.min(count) {
            scope.spawn(|| {
                loop {
                    let n = next.fetch_add(1, Ordering::Relaxed);
                    if n >= count {
                        return;
                    }
                    test(n);
                }
            });
        }
    });
}
