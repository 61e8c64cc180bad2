//! The traits that receive tokens while requests run.

use crate::Result;
use crate::engine::request::Outcome;

/// What a sink wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// More tokens.
    Continue,
    /// The answer is complete, for example because a stop string was found.
    Stop,
    /// End all generation: the user interrupted it, or the reader is gone.
    Interrupt,
}

/// Receives a generation while it runs.
pub trait TokenSink {
    /// `done` of the prompt's tokens have been run.
    fn prefill(&mut self, _done: usize) -> Flow {
        Flow::Continue
    }

    /// The next token of the answer. `drafted`: the drafter proposed it and the target accepted it.
    ///
    /// # Errors
    /// Any error ends the generation and is returned from it.
    fn token(&mut self, id: u32, drafted: bool) -> Result<Flow>;

    /// A round is over: it produced `produced` tokens (bonus token included), and `kept` of them are in the
    /// answer.
    ///
    /// # Errors
    /// As [`TokenSink::token`].
    fn round(&mut self, _produced: usize, _kept: usize) -> Result<()> {
        Ok(())
    }
}

/// Receives many generations while they run together. Requests are identified by their index in the list.
pub trait TokenSinks {
    /// The sink of request `index`.
    ///
    /// # Errors
    /// Any error ends all generation and is returned from it.
    fn sink(&mut self, index: usize) -> Result<&mut dyn TokenSink>;

    /// Request `index` is done. Anything but [`Flow::Continue`] interrupts the running requests; those that
    /// have not begun are dropped.
    ///
    /// # Errors
    /// As [`TokenSinks::sink`].
    fn done(&mut self, index: usize, outcome: Outcome) -> Result<Flow>;
}
