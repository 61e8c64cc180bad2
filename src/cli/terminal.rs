//! Terminal behaviour of both programs: an error or a panic is one line on stderr and an exit code, and a
//! reader of stdout may close it at any time.

use crate::text::untrusted;
use crate::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::process::ExitCode;

/// Parses the flags of `program`. `Err` is the exit code to end with: after printing the help that was asked
/// for, or a sentence about a wrong flag.
pub fn parse<Args: clap::Parser>(program: &str) -> std::result::Result<Args, ExitCode> {
    Args::try_parse().map_err(|error| match error.use_stderr() {
        true => fail(program, &sentence(&error)),
        // The help.
        false => match print(&error.render().to_string()) {
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => fail(program, &error),
        },
    })
}

/// Parses a flag's whole number; for clap's `value_parser`. The error says what is expected.
pub fn whole<T: std::str::FromStr>(text: &str) -> std::result::Result<T, String> {
    let largest = u128::MAX >> (128 - 8 * size_of::<T>());
    text.parse().map_err(|_| format!("expected a whole number from 0 to {largest}"))
}

/// As [`whole`], for any number.
pub fn number<T: std::str::FromStr>(text: &str) -> std::result::Result<T, String> {
    text.parse().map_err(|_| "expected a number".into())
}

/// Runs `program`. An error or a panic becomes one line on stderr and its exit code.
pub fn run(program: &'static str, run: impl FnOnce() -> Result<u8> + std::panic::UnwindSafe) -> ExitCode {
    // A panic is a bug in this program. It still gives one sentence and exit code 1.
    std::panic::set_hook(Box::new(move |panic| {
        // The library turns panics on these threads into errors, which are printed instead.
        if std::thread::current().name() == Some(untrusted::THREAD_NAME) {
            return;
        }
        let place = panic.location().map_or("unknown".into(), |at| format!("{}:{}", at.file(), at.line()));
        let payload = panic.payload();
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let what = text.or(payload.downcast_ref::<&str>().copied()).unwrap_or("panic");
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

/// The sentence of an error, with the flag instead of the library's name of an option.
pub fn message(error: &Error) -> String {
    match error {
        Error::Option { name, problem } => {
            let flag = match *name {
                "context" => "ctx".into(),
                "sequences" => "batch".into(),
                "threshold" => "adaptive".into(),
                "stop_ids" => "stop-id".into(),
                name => name.replace('_', "-"),
            };
            format!("--{flag} {problem}")
        }
        other => other
            .to_string()
            .replace("`taps`", "--taps")
            .replace("`slots`", "--slots")
            .replace("`prompt_key`", "--prompt-key"),
    }
}

/// Prints an error as one line on stderr. Control characters, such as a newline in a file's name, become
/// spaces.
pub fn complain(program: &str, error: &Error) {
    note(&format!("{program}: {}", message(error)).replace(char::is_control, " "));
}

/// Prints the library's notes about model files, one line each.
pub fn notes(notes: &[String]) {
    notes.iter().for_each(|line| note(&line.replace(char::is_control, " ")));
}

/// Prints a line on stderr. Unlike `eprintln!` it does not panic if stderr is closed.
pub fn note(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// A progress bar on stderr in indicatif's `template`; hidden if `quiet` or if stderr is not a terminal.
pub fn progress(template: &str, quiet: bool) -> ProgressBar {
    let shown = !quiet && io::stderr().is_terminal();
    let bar = if shown { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template(template);
    style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
}

/// A progress bar for loading weights, and the callback that moves it: (bytes done, bytes in all).
pub fn weights(quiet: bool) -> (ProgressBar, impl FnMut(usize, usize)) {
    let bar = progress("weights {bar:40} {bytes} of {total_bytes}, {bytes_per_sec}", quiet);
    let moved = bar.clone();
    (bar, move |done, total| {
        moved.set_length(total as u64);
        moved.set_position(done as u64);
    })
}

/// Writes text to stdout and flushes it. False if the reader has closed stdout.
///
/// # Errors
/// [`Error::Internal`] if writing fails for another reason.
pub fn print(text: &str) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(Error::Internal(format!("stdout cannot be written: {e}"))),
    }
}

/// "1 round", "2 rounds".
pub fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// clap's report as one sentence: what is wrong, and its tip if it has one.
pub fn sentence(error: &clap::Error) -> Error {
    let report = error.render().to_string();
    let paragraph = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut paragraphs = report.split("\n\n").map(paragraph);
    let what = paragraphs.next().unwrap_or_default();
    let tips = paragraphs.filter_map(|text| text.strip_prefix("tip: ").map(|tip| format!("; {tip}")));
    Error::Usage(format!("{}{}", what.trim_start_matches("error: "), tips.collect::<String>()))
}
