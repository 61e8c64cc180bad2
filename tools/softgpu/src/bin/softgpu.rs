//! Runs a program on the software GPU: `softgpu run [OPTIONS] -- PROGRAM ARGS`.

use softgpu::settings::{find_card, set_option};
use std::env;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

const HELP: &str = "\
Runs a program on a GPU in software. The program finds it as libcuda.so.1.

Usage: softgpu run [OPTIONS] -- PROGRAM [ARGS]...

Options:
  --card NAME     The GPU: a100, h100, h200, rtx4090, l40s, rtx5090, b200 or t4 [default: h200]
  --schedule N    The order of threads and blocks: 0 in order, 1 reversed, others random [default: 0]
  --sums ORDER    The order in which tensor cores add: ascending, pairwise, aligned [default: ascending]
  --perturb       Change approximate results by up to their documented error
  --report FILE   Write the counters to this file, as JSON, when the program exits
  -h, --help      Print this help

The README has the environment variables that these options set, and those for failures of driver and GPU.
";

fn main() -> ExitCode {
    let sentence = match run(env::args_os().skip(1)) {
        Ok(help) => {
            print!("{help}");
            return ExitCode::SUCCESS;
        }
        Err(sentence) => sentence,
    };
    eprintln!("softgpu: {sentence}");
    ExitCode::from(2)
}

/// Replaces this process by the program. Returns only the help to print.
fn run(mut args: impl Iterator<Item = OsString>) -> Result<&'static str, String> {
    match args.next().as_ref().and_then(|command| command.to_str()) {
        Some("run") => {}
        Some("-h" | "--help") => return Ok(HELP),
        _ => return Err("expected: softgpu run [OPTIONS] -- PROGRAM [ARGS]...".to_string()),
    }
    let mut variables: Vec<(&str, OsString)> = Vec::new();
    let mut program = None;
    while let Some(flag) = args.next() {
        let flag = flag.to_str().ok_or("an option is not UTF-8")?;
        let mut value = || args.next().ok_or_else(|| format!("{flag}: expected a value"));
        match flag {
            "-h" | "--help" => return Ok(HELP),
            "--card" => {
                let name = value()?;
                find_card(&name.to_string_lossy()).map_err(|e| format!("--card {}: {e}", name.display()))?;
                variables.push(("SOFTGPU_CARD", name));
            }
            "--schedule" | "--sums" => {
                let text = value()?;
                set_option(&mut Default::default(), &flag[2..], &text.to_string_lossy())
                    .map_err(|e| format!("--{e}"))?;
                variables.push((if flag == "--sums" { "SOFTGPU_SUMS" } else { "SOFTGPU_SCHEDULE" }, text));
            }
            "--perturb" => variables.push(("SOFTGPU_PERTURB", "1".into())),
            "--report" => {
                // The program may change its working directory.
                let file = std::path::absolute(value()?).map_err(|e| format!("--report: {e}"))?;
                variables.push(("SOFTGPU_REPORT", file.into()));
            }
            "--" => {
                program = args.next();
                break;
            }
            _ => return Err(format!("unknown option {flag}")),
        }
    }
    let program = program.ok_or("expected a program after --")?;
    let folder = softgpu::driver_folder().map_err(|e| format!("cannot set up the driver library: {e}"))?;
    let mut path = OsString::from(folder);
    if let Some(rest) = env::var_os("LD_LIBRARY_PATH").filter(|rest| !rest.is_empty()) {
        path.push(":");
        path.push(rest);
    }
    variables.push(("LD_LIBRARY_PATH", path));
    let error = Command::new(&program).args(args).envs(variables).exec();
    Err(format!("cannot run {}: {error}", program.display()))
}
