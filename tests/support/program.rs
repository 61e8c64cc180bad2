//! Runs `dflash-gen` as a child process.

use crate::support::{Pair, software_gpu};
use serde_json::Value;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

pub const BINARY: &str = env!("CARGO_BIN_EXE_dflash-gen");

/// The exit code, stdout and stderr of a finished run; the code is -1 if a signal ended it.
#[derive(Debug)]
pub struct Run {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Run {
    /// Checks that the exit code is 0 and returns stdout.
    pub fn done(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }

    /// Checks that the exit code is 0 and parses each line of stdout as JSON.
    pub fn json(self) -> Vec<Value> {
        self.done().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

/// Runs the command without stdin until it ends.
pub fn finish(mut command: Command) -> Run {
    let output = command.stdin(Stdio::null()).output().unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).expect("stdout is UTF-8"),
        err: String::from_utf8(output.stderr).expect("stderr is UTF-8"),
    }
}

/// `dflash-gen` with these arguments, and with `--device cpu` unless they name a device, so that a test
/// behaves the same on a machine with a GPU. `--device cuda` is the device of the
/// tests: see `test_gpu.rs`.
pub fn command<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Command {
    // A pack of tools/gpu-pack.sh has the programs in the folder of the tests.
    let packed = std::env::current_exe().unwrap().with_file_name("dflash-gen");
    let mut command = if Path::new(BINARY).exists() { Command::new(BINARY) } else { Command::new(packed) };
    let args: Vec<OsString> = args.into_iter().map(|arg| arg.as_ref().into()).collect();
    if !args.iter().any(|arg| arg == "--device") {
        command.args(["--device", "cpu"]);
    }
    if args.iter().any(|arg| arg == "cuda") {
        software_gpu::install(&mut command);
    }
    command.args(args);
    command
}

/// Runs `dflash-gen` with the arguments of [`command`].
pub fn run<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Run {
    finish(command(args))
}

/// Runs `dflash-gen` with `input` on stdin.
pub fn with_stdin(args: &[&str], input: &[u8]) -> Run {
    let mut child =
        command(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    Run {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Writes a file and returns its path.
pub fn write(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) -> String {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    path.display().to_string()
}

/// `--target DIR --draft DIR` for the pair.
pub fn flags(pair: &Pair) -> [String; 4] {
    let (target, drafter) = (pair.target.display().to_string(), pair.drafter.display().to_string());
    ["--target".into(), target, "--draft".into(), drafter]
}

/// Runs `dflash-gen` with the models of the pair.
pub fn run_pair(pair: &Pair, args: &[&str]) -> Run {
    run(flags(pair).iter().map(String::as_str).chain(args.iter().copied()))
}

/// The value of a field in `/proc/PID/status`, or none after the process has ended.
#[cfg(target_os = "linux")]
pub fn status(child: &Child, field: &str) -> Option<String> {
    let status = fs::read_to_string(format!("/proc/{}/status", child.id())).ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))?;
    Some(value.trim().to_string())
}

/// Waits until the program has installed its handler of SIGINT.
#[cfg(target_os = "linux")]
pub fn wait_for_handler(child: &Child) {
    const SIGINT: u64 = 1 << (2 - 1);
    while status(child, "SigCgt").is_some_and(|mask| u64::from_str_radix(&mask, 16).unwrap() & SIGINT == 0) {
        std::thread::yield_now();
    }
}

/// Sends SIGINT (Ctrl-C) as soon as the program has installed its handler.
#[cfg(target_os = "linux")]
pub fn interrupt(child: &Child) {
    wait_for_handler(child);
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
}

/// A running `dflash-gen` whose stdin, stdout and stderr the test holds.
pub struct Interactive {
    pub child: Child,
    pub input: Option<ChildStdin>,
    pub out: BufReader<ChildStdout>,
    pub err: BufReader<ChildStderr>,
    /// Dropping it stops the watchdog thread.
    pub _watchdog: mpsc::Sender<()>,
}

impl Interactive {
    pub fn new<A: AsRef<OsStr>>(args: impl IntoIterator<Item = A>) -> Interactive {
        let mut command = command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (out, err) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let input = child.stdin.take();
        // The watchdog kills a run that takes more than a minute, so that the test fails instead of hanging.
        let (_watchdog, dropped) = mpsc::channel();
        let id = child.id().to_string();
        std::thread::spawn(move || {
            if dropped.recv_timeout(Duration::from_secs(60)) == Err(mpsc::RecvTimeoutError::Timeout) {
                Command::new("kill").args(["-KILL", &id]).status().unwrap();
            }
        });
        Interactive { child, input, out: BufReader::new(out), err: BufReader::new(err), _watchdog }
    }

    /// Writes a line to stdin.
    pub fn send(&mut self, line: &str) {
        writeln!(self.input.as_mut().unwrap(), "{line}").unwrap();
    }

    /// Reads a line of stderr.
    pub fn stderr_line(&mut self) -> String {
        let mut line = String::new();
        assert_ne!(self.err.read_line(&mut line).unwrap(), 0, "stderr has ended");
        line
    }

    /// Waits for the end and returns the exit code.
    pub fn exit_code(&mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    /// Closes stdin, waits for the end and returns the exit code.
    pub fn close_stdin(&mut self) -> Option<i32> {
        self.input = None;
        self.exit_code()
    }
}
