//! Speculative decoding as mathematics: no device and no model.
//!
//! A drafter proposes tokens, the target verifies them in one pass, and the accepted ones are emitted
//! together with one token of the target's own. [`verify`] has the methods and why they are lossless;
//! [`config`] says which combinations a request can ask for.
//!
//! Each module uses only those above it in this table:
//!
//! | module | has |
//! | --- | --- |
//! | [`rng`] | Philox, tables in place of `exp` and `log`, named random draws |
//! | [`distribution`] | probabilities as integers |
//! | [`sampling`] | sampling parameters, and the token that the target samples |
//! | [`verify`] | exact, rejection and block verification, and the sampling of drafts |
//! | [`tree`] | draft trees: best-first, and of fixed shapes |
//! | [`draft_length`] | how many drafts a round verifies |
//! | [`config`] | all of it as one type for a request |

pub mod config;
pub mod distribution;
pub mod draft_length;
pub mod rng;
pub mod sampling;
pub mod tree;
pub mod verify;
