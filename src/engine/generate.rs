//! Runs one or many requests to their end and delivers the tokens as they are emitted.
//!
//! This code is the same for all devices. A device implements two traits: [`Decoder`] runs sequences, and
//! [`Backend`] is a pair of models on the device and makes decoders. Autoregressive decoding is the same loop
//! with blocks of one row.

pub use crate::engine::decoder::{Backend, Decoder, Emitted, Prefill};
pub use crate::engine::request::{Finish, Outcome, Request};
pub use crate::engine::sink::{Flow, TokenSink, TokenSinks};

use crate::engine::batch;
use crate::{Error, Result};

/// Runs one request to its end.
///
/// Under exact verification the drafts change only how many tokens a round emits, never which, and every
/// stopping rule looks at tokens one by one. So the answer depends only on the prompt, the sampling
/// parameters and the limits.
///
/// # Errors
/// As [`Request::check`]; errors of the decoder and the sink.
pub fn generate(decoder: &mut dyn Decoder, request: &Request, sink: &mut dyn TokenSink) -> Result<Outcome> {
    run_one(decoder, request, false, sink)
}

/// As [`generate`], but reuses the KV cache of the prefix that the prompt shares with the decoder's last
/// request.
///
/// # Errors
/// As [`generate`].
pub fn resume(decoder: &mut dyn Decoder, request: &Request, sink: &mut dyn TokenSink) -> Result<Outcome> {
    run_one(decoder, request, true, sink)
}

fn run_one(
    decoder: &mut dyn Decoder,
    request: &Request,
    keep: bool,
    sink: &mut dyn TokenSink,
) -> Result<Outcome> {
    struct OneSink<'a>(&'a mut dyn TokenSink, Option<Outcome>);
    impl TokenSinks for OneSink<'_> {
        fn sink(&mut self, _: usize) -> Result<&mut dyn TokenSink> {
            Ok(self.0)
        }
        fn done(&mut self, _: usize, outcome: Outcome) -> Result<Flow> {
            self.1 = Some(outcome);
            Ok(Flow::Continue)
        }
    }
    let mut sinks = OneSink(sink, None);
    batch::run(decoder, std::slice::from_ref(request), keep, &mut sinks)?;
    sinks.1.ok_or_else(|| Error::Internal("a request ended without an outcome".into()))
}

/// Runs many requests, as many together as the decoder has slots and memory for. The others wait and are
/// admitted in the order of the list. Each answer is the one that [`generate`] gives.
///
/// # Errors
/// As [`generate`]. All requests are checked before the first one runs. Only whether a request fits into
/// memory is checked later, when it is admitted.
pub fn generate_all(
    decoder: &mut dyn Decoder,
    requests: &[Request],
    sinks: &mut dyn TokenSinks,
) -> Result<()> {
    batch::run(decoder, requests, false, sinks)
}
