//! What a pair takes and could reach on a card, and whether one measurement is better than another. Every subcommand
//! makes a [`record::Record`]; [`show`] writes it.

mod args;
mod compare;
mod floor;
mod kernels;
mod machine;
mod model;
mod record;
mod sampling;
mod show;

use args::{Args, Command};
use dflash::Result;
use dflash::terminal;
use std::process::ExitCode;

const PROGRAM: &str = "dflash-bench";

fn main() -> ExitCode {
    match terminal::parse::<Args>(PROGRAM) {
        Ok(args) => terminal::run(PROGRAM, || run(&args)),
        Err(code) => code,
    }
}

fn run(args: &Args) -> Result<u8> {
    let (title, record) = match &args.command {
        Command::Kernels(flags) => kernels::run(flags)?,
        Command::Floor(flags) => floor::run(flags)?,
        Command::Compare(flags) => compare::run(flags)?,
    };
    terminal::print(&show::text(&record, &title, args.format()))?;
    Ok(compare::exit_code(&record))
}
