//! The life of a request on any device: prefill, rounds, stopping, statistics, and the lossless check.
//!
//! | module | has |
//! | --- | --- |
//! | [`request`] | what to generate, and what came of it |
//! | [`decoder`] | the traits that a device implements |
//! | [`sink`] | the traits that receive tokens |
//! | [`generate`] | running requests to their end |
//! | [`lossless`] | comparison with autoregressive decoding, bit for bit |
//! | [`stats`] | acceptance length, histogram, rates, the JSON record |

mod batch;
pub mod decoder;
pub mod generate;
pub mod lossless;
pub mod request;
pub mod sink;
pub mod stats;
