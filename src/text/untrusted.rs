//! Runs code on untrusted input. Tokenizer and template files contain regular expressions and jinja programs.
//! They are parsed and run on a separate thread with a large stack, and a panic there becomes an error.

use crate::error::one_line;
use crate::{Error, Result};
use std::any::Any;
use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
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

thread_local! {
    /// Whether this thread has a stack of [`DEEP_STACK`] bytes, so that untrusted code can run on it.
    static IS_DEEP: Cell<bool> = const { Cell::new(false) };
}

/// Whether there is address space for a thread. Without free address space besides the stack, an allocation
/// of the work would fail and abort the process.
fn has_space(stack: usize) -> bool {
    Vec::<u8>::new().try_reserve_exact(stack + WORKING_SPACE).is_ok()
}

/// Runs `work`, with one thread for all untrusted code in it. Without this, each text that is tokenised and
/// each template that is rendered has a thread of its own, which takes longer than to tokenise a short text.
///
/// # Errors
/// Those of `work`; [`Error::Internal`] if it panics.
pub fn on_one_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    // A tokenizer also runs on less than the deepest stack.
    if has_space(DEEP_STACK) { guarded(&[DEEP_STACK], work, Error::Internal)? } else { work() }
}

/// Runs `work` on a thread with the first stack size in `stacks` that is available, or on the current thread
/// if its stack is deep. If `work` panics, `panicked` converts the panic's message to an error.
///
/// # Errors
/// As `panicked`; [`Error::Memory`] if there is no address space for any of the stacks.
pub(crate) fn guarded<T: Send>(
    stacks: &[usize],
    work: impl FnOnce() -> T + Send,
    panicked: impl FnOnce(String) -> Error,
) -> Result<T> {
    let message = |panic: Box<dyn Any + Send>| {
        let message = panic.downcast_ref::<String>().map(String::as_str);
        one_line(message.or(panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked"))
    };
    if IS_DEEP.get() {
        return catch_unwind(AssertUnwindSafe(work)).map_err(|panic| panicked(message(panic)));
    }
    // If a thread fails to start, the next attempt takes the work.
    let work = Mutex::new(Some(work));
    let run = |stack| {
        IS_DEEP.set(stack == DEEP_STACK);
        work.lock().ok().and_then(|mut work| work.take()).map(|work| work())
    };
    let run = &run;
    std::thread::scope(|scope| {
        let spawn = |stack: usize| {
            let thread = std::thread::Builder::new().name(THREAD_NAME.into()).stack_size(stack);
            thread.spawn_scoped(scope, move || run(stack)).ok()
        };
        let Some(worker) = stacks.iter().copied().filter(|stack| has_space(*stack)).find_map(spawn) else {
            let needed = stacks.last().map_or(0, |stack| (stack + WORKING_SPACE) >> 20);
            return Err(Error::Memory(format!(
                "not enough memory: a thread for the tokenizer or chat template needs {needed} MiB of address space"
            )));
        };
        match worker.join() {
            Ok(Some(done)) => Ok(done),
            Ok(None) => Err(Error::Internal("the tokenizer's thread found no work".into())),
            Err(panic) => Err(panicked(message(panic))),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::current;

    #[test]
    fn one_thread_runs_all_untrusted_code_and_catches_its_panics() {
        let own = current().id();
        let ids = |stacks| guarded(stacks, || current().id(), Error::Internal).unwrap();
        assert!(ids(TOKENIZER_STACKS) != own);
        on_one_thread(|| {
            assert_eq!([ids(TOKENIZER_STACKS), ids(TEMPLATE_STACKS)], [current().id(); 2]);
            let panics = guarded(TOKENIZER_STACKS, || panic!("it\nfails"), Error::Model);
            assert_eq!(panics, Err::<(), _>(Error::Model("it fails".into())));
            Ok(())
        })
        .unwrap();
        assert_eq!(on_one_thread::<()>(|| panic!("it fails")), Err(Error::Internal("it fails".into())));
        assert_eq!(on_one_thread::<()>(|| Err(Error::Usage("x".into()))), Err(Error::Usage("x".into())));
    }
}
