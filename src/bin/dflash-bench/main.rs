//! What a pair takes and could reach on a card, and whether one measurement is better than another. Every subcommand
//! makes a [`record::Record`]; [`show`] writes it.

mod answers;
mod args;
mod compare;
mod figures;
mod floor;
mod generate;
mod kernels;
mod machine;
mod model;
mod plot;
mod record;
mod report;
mod round;
mod sampling;
mod show;

use args::{Args, Command};
use dflash::Result;
use dflash::cli::terminal;
use record::Record;
use std::process::ExitCode;

const PROGRAM: &str = "dflash-bench";

fn main() -> ExitCode {
    match terminal::parse::<Args>(PROGRAM) {
        Ok(args) => terminal::run(PROGRAM, || run(&args)),
        Err(code) => code,
    }
}

fn run(args: &Args) -> Result<u8> {
    if let Some(path) = &args.report {
        report::check(path)?;
    }
    let mut end = Ok(());
    let (title, record) = match &args.command {
        Command::Kernels(flags) => {
            let (found, whole) = kernels::run(flags)?;
            end = whole;
            found
        }
        Command::Floor(flags) => floor::run(flags)?,
        Command::Round(flags) => round::run(flags)?,
        Command::Generate(flags) => {
            let (found, identical) = generate::run(flags)?;
            end = identical;
            found
        }
        Command::Compare(flags) => compare::run(flags)?,
        Command::Show(flags) => return put(args, &show::run(flags, args.format())?).map(|()| 0),
    };
    let records = [(title, record)];
    put(args, &records)?;
    end.map(|()| compare::exit_code(&records[0].1))
}

/// Prints titled records, and writes their page if one is wanted.
fn put(args: &Args, records: &[(String, Record)]) -> Result<()> {
    let texts: Vec<String> =
        records.iter().map(|(title, record)| show::text(record, title, args.format())).collect();
    let between = if args.json { "" } else { "\n" };
    terminal::print(&texts.join(between))?;
    args.report.as_ref().map_or(Ok(()), |path| report::write(path, records))
}
