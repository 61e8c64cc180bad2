//! A checkpoint that loses bytes while it is mapped: the first look at them is a SIGBUS, which ends the program with one
//! sentence and the exit code of a broken model file.

use crate::checkpoint::pair::Pair;
use crate::{Error, Result};
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// Where a file is mapped, and what is said if its bytes are gone.
struct Mapping {
    addresses: Range<usize>,
    sentence: String,
}

/// Written once, before the handler is there to read it.
static MAPPINGS: OnceLock<Vec<Mapping>> = OnceLock::new();

/// Set by the first thread that meets missing bytes: it alone speaks.
static SPOKEN: AtomicBool = AtomicBool::new(false);

const EXIT: u8 = 3;

/// From here on, while `pair` lives, missing bytes of its files end `program` as [`Error::Model`] does.
///
/// # Errors
/// [`Error::Internal`] where the system refuses the handler.
pub fn guard(program: &str, pair: &Pair) -> Result<()> {
    let files = pair.target.weights.mapped();
    let files = files.chain(pair.drafter.iter().flat_map(|drafter| drafter.weights.mapped()));
    let mappings = files.map(|(path, addresses)| {
        let what = "is no longer all there: the file became shorter after it was opened, or cannot be read";
        let sentence = format!("{program}: {path} {what}").replace(char::is_control, " ") + "\n";
        Mapping { addresses, sentence }
    });
    if MAPPINGS.set(mappings.collect()).is_err() {
        return Err(Error::Internal("checkpoints are guarded twice".into()));
    }
    // SAFETY: all zeros are a sigaction without flags and with an empty mask; it gets the handler that SA_SIGINFO asks
    // for, which lives as long as the program, and the table that it reads is there. Its stack is the one that every
    // thread of Rust's has for faults.
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

/// The handler. It may have interrupted anything, so it takes no lock, allocates nothing and calls only what
/// signal-safety(7) lists.
extern "C" fn missing(signal: libc::c_int, info: *const libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the system passes a valid siginfo_t, and this code says that it holds an address. A signal
    // that a process sent, or another fault, has none or one that is not in the table.
    let address = unsafe { ((*info).si_code == libc::BUS_ADRERR).then(|| (*info).si_addr().addr()) };
    let mapping = address.and_then(|at| MAPPINGS.get()?.iter().find(|m| m.addresses.contains(&at)));
    let Some(Mapping { sentence, .. }) = mapping else {
        // SAFETY: both calls take plain numbers. The signal comes again when this function returns, and then it does
        // what it does without us.
        unsafe {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
        }
        return;
    };
    if SPOKEN.swap(true, Ordering::Relaxed) {
        loop {
            // SAFETY: waits for the thread that came first to end the program.
            unsafe { libc::pause() };
        }
    }
    // SAFETY: the sentence is valid for its length; nothing of the program runs after `_exit`.
    unsafe {
        libc::write(libc::STDERR_FILENO, sentence.as_ptr().cast(), sentence.len());
        libc::_exit(EXIT.into());
    }
}
