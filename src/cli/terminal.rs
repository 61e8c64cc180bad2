//! What every binary owes a terminal: errors as one line and an exit code, panics too, and readers who may leave.

use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::process::ExitCode;

/// The flags of `program`, or the exit code with which it ends instead: after the help that was asked for, or a sentence.
pub fn parse<Args: clap::Parser>(program: &str) -> std::result::Result<Args, ExitCode> {
    Args::try_parse().map_err(|error| match error.use_stderr() {
        true => fail(program, &sentence(&error)),
        false => {
            // Its reader may be gone, which is no failure.
            let _ = error.print();
            ExitCode::SUCCESS
        }
    })
}

/// A flag's whole number, or what was expected; for clap's `value_parser`.
pub fn whole<T: std::str::FromStr>(text: &str) -> std::result::Result<T, String> {
    let most = u128::MAX >> (128 - 8 * size_of::<T>());
    text.parse().map_err(|_| format!("expected a whole number from 0 to {most}"))
}

/// As [`whole`], of any number.
pub fn number<T: std::str::FromStr>(text: &str) -> std::result::Result<T, String> {
    text.parse().map_err(|_| "expected a number".into())
}

/// Runs what `program` does; its errors and panics become one line on stderr and their exit code.
pub fn run(program: &'static str, run: impl FnOnce() -> Result<u8> + std::panic::UnwindSafe) -> ExitCode {
    // A panic is a bug of ours, and still one sentence and exit code 1.
    std::panic::set_hook(Box::new(move |panic| {
        let place = panic.location().map_or("unknown".into(), |at| format!("{}:{}", at.file(), at.line()));
        let what = panic.payload_as_str().unwrap_or("panic");
        note(&format!("{program}: internal failure at {place}: {what}").replace(char::is_control, " "));
    }));
    match std::panic::catch_unwind(run) {
        Ok(Ok(code)) => ExitCode::from(code),
        Ok(Err(error)) => fail(program, &error),
        Err(_) => ExitCode::FAILURE,
    }
}

fn fail(program: &str, error: &Error) -> ExitCode {
    complain(program, error);
    ExitCode::from(error.exit_code())
}

/// One line on stderr, even where a file's name or a flag's value has several.
pub fn complain(program: &str, error: &Error) {
    note(&format!("{program}: {error}").replace(char::is_control, " "));
}

/// A line on stderr. Not `eprintln!`, which panics when nobody reads.
pub fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// How far something is, on stderr, in indicatif's `template`; nothing where `quiet` or where nobody watches.
pub fn progress(template: &str, quiet: bool) -> ProgressBar {
    let shown = !quiet && io::stderr().is_terminal();
    let bar = if shown { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template(template);
    style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
}

/// Of weights on their way to a device: what it hears is bytes done and bytes in all.
pub fn weights(quiet: bool) -> (ProgressBar, impl FnMut(usize, usize)) {
    let bar = progress("weights {bar:40} {bytes} of {total_bytes}, {bytes_per_sec}", quiet);
    let heard = bar.clone();
    (bar, move |done, total| {
        heard.set_length(total as u64);
        heard.set_position(done as u64);
    })
}

/// Text on stdout, flushed: somebody may be watching. False if nobody reads any more.
///
/// # Errors
/// [`Error::Internal`] where it cannot be written for another reason.
pub fn print(text: &str) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::Internal(format!("stdout cannot be written: {e}"))),
    }
}

/// clap's report as one sentence: what is wrong, and its tip if there is one.
pub fn sentence(error: &clap::Error) -> Error {
    let report = error.render().to_string();
    let paragraph = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut paragraphs = report.split("\n\n").map(paragraph);
    let what = paragraphs.next().unwrap_or_default();
    let tips = paragraphs.filter_map(|text| text.strip_prefix("tip: ").map(|tip| format!("; {tip}")));
    Error::Usage(format!("{}{}", what.trim_start_matches("error: "), tips.collect::<String>()))
}
