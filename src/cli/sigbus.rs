//! A checkpoint file that becomes shorter while it is mapped: reading a missing byte raises SIGBUS. The
//! handler here ends the program with one sentence and the exit code of a broken model file.

use crate::checkpoint::pair::Pair;
use crate::{Error, Result};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// The addresses of a mapped file, and the line to print if its bytes are missing.
struct Mapping {
    addresses: Range<usize>,
    sentence: String,
}

/// Written once, before the handler that reads it is installed.
static MAPPINGS: OnceLock<Vec<Mapping>> = OnceLock::new();

/// Set by the first thread that reads a missing byte. Only that thread prints.
static PRINTED: AtomicBool = AtomicBool::new(false);

const EXIT: u8 = 3;

/// Installs the handler: from now on, while `pairs` live, a missing byte of their files ends `program` as
/// [`Error::Model`] does. Call at most once.
///
/// # Errors
/// [`Error::Internal`] if the system refuses the handler or it is already installed.
pub fn guard<'a>(program: &str, pairs: impl IntoIterator<Item = &'a Pair>) -> Result<()> {
    let files = pairs.into_iter().flat_map(|pair| {
        let drafter = pair.drafter().into_iter().flat_map(|drafter| drafter.weights.mapped());
        pair.target.weights.mapped().chain(drafter)
    });
    let mappings = files.map(|(path, addresses)| {
        let what = "has lost bytes: the file became shorter after it was opened, or cannot be read";
        let sentence = format!("{program}: {path} {what}").replace(char::is_control, " ") + "\n";
        Mapping { addresses, sentence }
    });
    if MAPPINGS.set(mappings.collect()).is_err() {
        return Err(Error::Internal("checkpoints are guarded twice".into()));
    }
    // SAFETY: all zeros are a sigaction without flags and with an empty mask. The handler has the signature
    // that SA_SIGINFO requires and lives as long as the program, and the table that it reads is written. It
    // runs on the alternate signal stack that Rust gives every thread.
    let refused = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int, *const libc::siginfo_t, *mut libc::c_void) = missing;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &action, std::ptr::null_mut()) != 0
    };
    match refused {
        true => {
            Err(Error::Internal(format!("SIGBUS cannot be handled: {}", std::io::Error::last_os_error())))
        }
        false => Ok(()),
    }
}

/// The handler. It may interrupt any code, so it takes no lock, allocates nothing and calls only functions
/// that signal-safety(7) lists.
extern "C" fn missing(signal: libc::c_int, info: *const libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the system passes a valid siginfo_t, and BUS_ADRERR says that it holds an
    // address. A signal that a process sent has no address, and another fault's address is not in the table.
    let address = unsafe { ((*info).si_code == libc::BUS_ADRERR).then(|| (*info).si_addr().addr()) };
    let mapping = address.and_then(|at| MAPPINGS.get()?.iter().find(|m| m.addresses.contains(&at)));
    let Some(Mapping { sentence, .. }) = mapping else {
        // SAFETY: both calls take plain numbers. The signal is raised again when this function returns, with
        // its default action.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    };
    if PRINTED.swap(true, Ordering::Relaxed) {
        loop {
            // SAFETY: takes no argument. Waits until the first thread ends the program.
            unsafe { libc::pause() };
        }
    }
    // SAFETY: the sentence is valid for its length, and nothing of the program runs after `_exit`.
    unsafe {
        libc::write(libc::STDERR_FILENO, sentence.as_ptr().cast(), sentence.len());
        libc::_exit(EXIT.into());
    }
}
