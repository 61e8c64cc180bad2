//! Speculative decoding as mathematics. No code here runs a device or a model.
//!
//! A drafter proposes tokens, and the target verifies them in one pass. The accepted drafts are emitted,
//! followed by one token of the target. [`verify`] defines the methods and says why they are lossless;
//! [`config`] has the combinations that a request can choose.
//!
//! Each module uses only those above it in this table:
//!
//! | module | owns |
//! | --- | --- |
//! | [`rng`] | Philox, tables in place of `exp` and `log`, named random draws |
//! | [`distribution`] | probabilities as integers |
//! | [`sampling`] | sampling parameters, and sampling a token from logits |
//! | [`verify`] | exact, rejection and block verification, and the sampling of drafts |
//! | [`tree`] | draft trees: best-first, and of fixed shapes |
//! | [`lookup`] | drafts looked up in the text so far |
//! | [`draft_length`] | how many drafts a round verifies |
//! | [`config`] | the choice of all these for a request, as one type |

pub mod config;
pub mod distribution;
pub mod draft_length;
pub mod lookup;
pub mod rng;
pub mod sampling;
pub mod tree;
pub mod verify;
