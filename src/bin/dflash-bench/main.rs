//! Measures and predicts DFlash decoding, and decides whether one measurement is better than another. Every
//! subcommand makes a [`record::Record`], which [`show`] prints.

mod answers;
mod args;
mod compare;
mod figures;
mod format;
mod generate;
mod kernels;
mod lists;
mod machine;
mod measure;
mod model;
mod plot;
mod predict;
mod record;
mod report;
mod roofline;
mod round;
mod show;
mod table;
#[cfg(test)]
#[path = "../../../tests/support/test_gpu.rs"]
#[allow(dead_code)]
mod test_gpu;
mod width;

use args::{Args, Command};
use dflash::Result;
use dflash::cli::interrupt::INTERRUPTED_EXIT;
use dflash::cli::{terminal, version};
use format::Format;
use record::Record;
use std::process::ExitCode;

const PROGRAM: &str = "dflash-bench";

fn main() -> ExitCode {
    match terminal::parse::<Args>(PROGRAM) {
        Ok(args) if args.version => {
            terminal::run(PROGRAM, || version::print(PROGRAM, args.json, 0).map(|()| 0))
        }
        Ok(args) => terminal::run(PROGRAM, || run(&args)),
        Err(code) => code,
    }
}

fn run(args: &Args) -> Result<u8> {
    if let Some(path) = &args.report {
        report::check(path)?;
    }
    let (found, end) = match &args.command {
        None => return print_summary(args),
        Some(Command::Show(flags)) => {
            return print_records(args, &show::run(flags, args.format())?).map(|()| 0);
        }
        Some(Command::Kernels(flags)) => kernels::run(flags)?,
        Some(Command::Generate(flags)) => generate::run(flags)?,
        Some(Command::Roofline(flags)) => (roofline::run(flags)?, Ok(())),
        Some(Command::Predict(flags)) => (predict::run(flags)?, Ok(())),
        Some(Command::Round(flags)) => (round::run(flags)?, Ok(())),
        Some(Command::Compare(flags)) => (compare::run(flags)?, Ok(())),
    };
    let records = [marked(found)];
    print_records(args, &records)?;
    end.map(|()| exit_code(&records[0].1))
}

/// The title of an interrupted run says so.
fn marked((title, record): (String, Record)) -> (String, Record) {
    let end = if record.incomplete { show::INCOMPLETE } else { "" };
    (title + end, record)
}

fn exit_code(record: &Record) -> u8 {
    if record.incomplete { INTERRUPTED_EXIT } else { compare::exit_code(record) }
}

const ON_CPU: &str = "On a CPU every verified row costs time: the demo pair shows acceptance and equal answers \
                      there, and no speed-up. DFlash is faster where a step mostly reads weights, as on a GPU.";
const NEXT: &str = "\
Next: dflash-bench generate --prompts FILE.jsonl  your prompts, all values
      dflash-bench round                          the parts of a round
      dflash-bench roofline --card H200           predictions for Qwen3-8B
      dflash-bench --help
";

/// The demo pair on the built-in prompts, in short.
fn print_summary(args: &Args) -> Result<u8> {
    let (found, identical) = generate::run(&generate::quick()?)?;
    let records = [marked(found)];
    if args.format() == Format::Table {
        let [(title, record)] = &records;
        let width = width::columns();
        let mut text = table::summary(record, title, width) + "\n";
        if record.machine.device.as_deref() == Some("cpu") {
            text += &(format::wrapped(ON_CPU, width).join("\n") + "\n\n");
        }
        terminal::print(&(text + NEXT))?;
        args.report.as_ref().map_or(Ok(()), |path| report::write(path, &records))?;
    } else {
        print_records(args, &records)?;
    }
    identical.map(|()| exit_code(&records[0].1))
}

/// Prints titled records, and writes their page if `--report` names one.
fn print_records(args: &Args, records: &[(String, Record)]) -> Result<()> {
    let texts: Vec<String> =
        records.iter().map(|(title, record)| show::text(record, title, args.format())).collect();
    let between = if args.json { "" } else { "\n" };
    terminal::print(&texts.join(between))?;
    args.report.as_ref().map_or(Ok(()), |path| report::write(path, records))
}
