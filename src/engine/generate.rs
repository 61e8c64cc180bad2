//! Running requests to their end, one or many, with the tokens delivered as they come.
//!
//! Everything here is written once for all devices. What a device does for sequences is the [`Decoder`]
//! trait; a [`Backend`] is a pair of models on a device, which makes decoders. Autoregressive decoding is the
//! same loop with blocks of one row.

pub use crate::engine::decoder::{Backend, Decoder, Emitted, Prefill};
pub use crate::engine::request::{Finish, Outcome, Request};
pub use crate::engine::sink::{Flow, TokenSink, TokenSinks};

use crate::engine::batch;
use crate::{Error, Result};

/// Runs one request to its end.
///
/// Rounds of different block sizes differ only in how many tokens they bring, never in which, and every
/// stopping rule looks at tokens one by one. So, under exact verification, the answer is a function of
/// prompt, sampling and limits.
///
/// # Errors
/// As [`Request::check`]; else the decoder's and the sink's.
pub fn generate(decoder: &mut dyn Decoder, request: &Request, sink: &mut dyn TokenSink) -> Result<Outcome> {
    one(decoder, request, false, sink)
}

/// As [`generate`], but does not run again what the decoder still holds of the prompt's first tokens from the
/// last request.
///
/// # Errors
/// As [`generate`].
pub fn resume(decoder: &mut dyn Decoder, request: &Request, sink: &mut dyn TokenSink) -> Result<Outcome> {
    one(decoder, request, true, sink)
}

fn one(
    decoder: &mut dyn Decoder,
    request: &Request,
    keep: bool,
    sink: &mut dyn TokenSink,
) -> Result<Outcome> {
    struct One<'a>(&'a mut dyn TokenSink, Option<Outcome>);
    impl TokenSinks for One<'_> {
        fn sink(&mut self, _: usize) -> Result<&mut dyn TokenSink> {
            Ok(self.0)
        }
        fn done(&mut self, _: usize, outcome: Outcome) -> Result<Flow> {
            self.1 = Some(outcome);
            Ok(Flow::Continue)
        }
    }
    let mut one = One(sink, None);
    batch::run(decoder, std::slice::from_ref(request), keep, &mut one)?;
    one.1.ok_or_else(|| Error::Internal("a request ended without an outcome".into()))
}

/// Runs many requests, as many together as the decoder has slots and memory for; the others wait and are
/// admitted in the order of the list. Each answer is the one that [`generate`] gives.
///
/// # Errors
/// As [`generate`]. All requests are checked before the first one runs, except whether each fits the memory,
/// which is found when it is admitted.
pub fn generate_all(
    decoder: &mut dyn Decoder,
    requests: &[Request],
    sinks: &mut dyn TokenSinks,
) -> Result<()> {
    batch::run(decoder, requests, false, sinks)
}
