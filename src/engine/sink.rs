//! The traits of the callers that receive tokens while requests run.

use crate::Result;
use crate::engine::request::Outcome;

/// How generation goes on after a call of a sink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// Generate more tokens.
    Continue,
    /// End this answer: it is complete, for example because a stop string was found.
    Stop,
    /// End this answer as interrupted: the user interrupted it, or the output is closed. From
    /// [`TokenSinks::done`] it ends all answers.
    Interrupt,
}

/// Receives the tokens of one answer while it is generated.
pub trait TokenSink {
    /// Called after each chunk of the prefill. `done` prompt tokens are in the KV cache.
    fn prefill(&mut self, _done: usize) -> Flow {
        Flow::Continue
    }

    /// Called with the next token of the answer. `drafted`: it is an accepted draft.
    ///
    /// # Errors
    /// Any error ends the generation and is returned from it.
    fn token(&mut self, id: u32, drafted: bool) -> Result<Flow>;

    /// Called after each round. The round produced `produced` tokens, bonus token included, and `kept` of
    /// them are in the answer.
    ///
    /// # Errors
    /// As [`TokenSink::token`].
    fn round(&mut self, _produced: usize, _kept: usize) -> Result<()> {
        Ok(())
    }
}

/// Receives the tokens of many answers that are generated together. A request is identified by its index in
/// the list.
pub trait TokenSinks {
    /// The sink of request `index`.
    ///
    /// # Errors
    /// Any error ends all generation and is returned from it.
    fn sink(&mut self, index: usize) -> Result<&mut dyn TokenSink>;

    /// Called when request `index` has ended. Any result but [`Flow::Continue`] interrupts the running
    /// requests and drops those that have not begun.
    ///
    /// # Errors
    /// As [`TokenSinks::sink`].
    fn done(&mut self, index: usize, outcome: Outcome) -> Result<Flow>;
}
