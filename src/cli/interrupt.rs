//! Ctrl-C: the first one asks the program to end with what it has, a second one ends it at once.

use crate::cli::terminal::note;
use crate::{Error, Result};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};

/// Set by Ctrl-C. While it is set, Ctrl-C ends the program.
pub static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// The exit code of an interrupted program.
pub const INTERRUPTED_EXIT: u8 = 130;

/// Whether Ctrl-C was pressed since [`catch`].
pub fn is_interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Lets Ctrl-C set [`INTERRUPTED`]. Before, it ends the program at once. Further calls change nothing.
///
/// # Errors
/// [`Error::Internal`] if the operating system refuses.
pub fn catch() -> Result<()> {
    static CAUGHT: AtomicBool = AtomicBool::new(false);
    if CAUGHT.swap(true, Ordering::Relaxed) {
        return Ok(());
    }
    let handler = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            if std::io::stderr().is_terminal() {
                note("");
            }
            std::process::exit(INTERRUPTED_EXIT.into());
        }
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Internal(format!("Ctrl-C cannot be handled: {e}")))
}
