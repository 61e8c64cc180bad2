//! The exact counters of each kernel for the demo pair on the software GPU: bytes, launches, products, bank
//! conflicts. Lines that differ from `benches/counters.txt` are marked. `cargo bench --bench counters --
//! --write` rewrites that file; `tests/bench/counters.rs` compares the kernels with it.

#[path = "../tests/support/mod.rs"]
mod support;

use dflash::{Error, Result};
use std::process::ExitCode;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/counters.txt");

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
    let found = support::counters::table()?;
    if write {
        return std::fs::write(FILE, found).map_err(|e| Error::Internal(format!("{FILE}: {e}")));
    }
    let kept = std::fs::read_to_string(FILE).map_err(|e| Error::Internal(format!("{FILE}: {e}")))?;
    for (i, line) in found.lines().enumerate() {
        let same = kept.lines().nth(i) == Some(line);
        println!("{line}{}", if same { "" } else { "  not as in benches/counters.txt" });
    }
    Ok(())
}
