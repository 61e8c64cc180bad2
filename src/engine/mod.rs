//! The life of a request on any device: prefill, rounds, stopping, statistics, and the lossless check.
//!
//! | module | owns |
//! | --- | --- |
//! | [`request`] | a request and its outcome |
//! | [`decoder`] | the traits that a device implements |
//! | [`sink`] | the traits that receive tokens |
//! | [`generate`] | the functions that run requests to their end |
//! | [`lossless`] | comparison with autoregressive decoding, bit for bit |
//! | [`stats`] | acceptance length, histogram, rates, the JSON record |

mod batch;
pub mod decoder;
pub mod generate;
pub mod lossless;
pub mod request;
pub mod sink;
pub mod stats;
