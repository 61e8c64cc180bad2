//! The exact counters of each kernel on the software GPU: of the demo pair's rounds, in `benches/counters.txt`, and
//! for each block and unit of work, in `src/gpu/prediction/kernel_costs.txt`. Lines that differ from these files
//! are marked. `cargo bench --bench counters -- --write` rewrites them; `tests/bench/` compares the kernels with
//! them.

#[path = "../tests/support/mod.rs"]
mod support;

use dflash::{Error, Result};
use std::path::Path;
use std::process::ExitCode;
use std::{fs, io};

/// Makes the contents of a file.
type Table = fn() -> Result<String>;

const FILES: [(&str, Table); 2] = [
    ("benches/counters.txt", support::counters::table),
    ("src/gpu/prediction/kernel_costs.txt", support::costs::table),
];

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("counters: {e}");
            e.exit_code().into()
        }
    }
}

fn run() -> Result<()> {
    // Cargo adds `--bench`.
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let write = match &args[..] {
        [] => false,
        [flag] if flag == "--write" => true,
        _ => {
            return Err(Error::Usage(format!("{} is no argument: expected --write or none", args.join(" "))));
        }
    };
    for (file, table) in FILES {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let failed = |e: io::Error| Error::Internal(format!("{}: {e}", path.display()));
        let found = table()?;
        if write {
            fs::write(&path, found).map_err(failed)?;
            continue;
        }
        let kept = fs::read_to_string(&path).map_err(failed)?;
        for (i, line) in found.lines().enumerate() {
            let mark = if kept.lines().nth(i) == Some(line) { "" } else { "  not as in the file" };
            println!("{line}{mark}");
        }
        println!();
    }
    Ok(())
}
