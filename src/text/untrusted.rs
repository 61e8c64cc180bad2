//! Runs code on untrusted input. Tokenizer and template files contain regular expressions and jinja programs.
//! They are parsed and run on a separate thread with a large stack, and a panic there becomes an error.

use crate::error::one_line;
use crate::{Error, Result};
use std::sync::Mutex;

/// Stack size for deep nesting, in bytes of address space; only the part in use takes memory. Templates need
/// it: a chain of operators nests as deeply as it is long, and values can nest one level per instruction, at
/// up to about 1 KiB of stack per level.
const DEEP_STACK: usize = 512 << 20;
/// Stack sizes to try for templates.
pub(crate) const TEMPLATE_STACKS: &[usize] = &[DEEP_STACK];
/// Stack sizes to try for tokenizers, which nest far less.
pub(crate) const TOKENIZER_STACKS: &[usize] = &[DEEP_STACK, 64 << 20, 8 << 20];
/// Address space that must be free besides the stack, for allocations of the work and the allocator's own
/// arena.
const WORKING_SPACE: usize = 160 << 20;

/// Name of the threads that run untrusted code. A panic there becomes an error, but Rust calls the process's
/// panic hook first, and the default hook prints. To avoid this output, a program can install a hook that
/// ignores threads of this name.
pub const THREAD_NAME: &str = "dflash-untrusted";

/// Runs `work` on a thread with the first stack size in `stacks` that is available. If `work` panics,
/// `panicked` converts the panic's message to an error.
///
/// # Errors
/// As `panicked`; [`Error::Memory`] if there is no address space for any of the stacks.
pub(crate) fn guarded<T: Send>(
    stacks: &[usize],
    work: impl FnOnce() -> T + Send,
    panicked: impl FnOnce(String) -> Error,
) -> Result<T> {
    // If a thread fails to start, the next attempt takes the work.
    let work = Mutex::new(Some(work));
    let run = || work.lock().ok().and_then(|mut work| work.take()).map(|work| work());
    std::thread::scope(|scope| {
        // Without free address space besides the stack, an allocation of the work would fail and abort the
        // process.
        let has_space = |stack: &&usize| Vec::<u8>::new().try_reserve_exact(**stack + WORKING_SPACE).is_ok();
        let spawn = |stack: &usize| {
            let thread = std::thread::Builder::new().name(THREAD_NAME.into()).stack_size(*stack);
            thread.spawn_scoped(scope, run).ok()
        };
        let Some(worker) = stacks.iter().filter(has_space).find_map(spawn) else {
            let needed = stacks.last().map_or(0, |stack| (stack + WORKING_SPACE) >> 20);
            return Err(Error::Memory(format!(
                "not enough memory: a thread for the tokenizer or chat template needs {needed} MiB of address space"
            )));
        };
        match worker.join() {
            Ok(Some(done)) => Ok(done),
            Ok(None) => Err(Error::Internal("the tokenizer's thread found no work".into())),
            Err(panic) => {
                let message = panic.downcast_ref::<String>().map(String::as_str);
                let message = message.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked");
                Err(panicked(one_line(message)))
            }
        }
    })
}
