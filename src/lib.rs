//! dflash is a latency engine for speculative decoding with DFlash drafters (arXiv 2602.06036). A DFlash
//! drafter proposes a block of tokens in one parallel pass, and the target verifies them in one pass. With
//! the default settings the output is the token sequence that the target gives without a drafter.
//!
//! The models run as hand-written CUDA kernels on an NVIDIA GPU, or on the CPU in f32. Both give the same
//! tokens, up to the rounding of their arithmetic.
//!
//! # First steps
//!
//! A demo pair is embedded in the binary, so this example runs anywhere, without a download and without a
//! GPU:
//!
//! ```
//! use dflash::{Engine, Models, Params};
//!
//! # fn main() -> dflash::Result<()> {
//! let engine = Engine::open(Models::demo())?;
//! for token in engine.generate("def f(x):", Params::default().max_tokens(24))? {
//!     let token = token?;
//!     print!("{}", token.text);
//! }
//!
//! // Or the whole answer at once, with its acceptance length.
//! let answer = engine.generate("import os\n", Params::default().max_tokens(24))?.finish()?;
//! println!("{}", answer.text);
//! println!("{} tokens in {} rounds, tau {:?}", answer.tokens().len(), answer.rounds(), answer.tau());
//! assert!(answer.rounds() < 24);
//! # Ok(())
//! # }
//! ```
//!
//! To use models of your own, call [`Models::folders`]`("Qwen3-8B", "Qwen3-8B-DFlash-b16")` with the Hugging
//! Face folders of a target and of the drafter that was trained for it.
//!
//! | type | what it is |
//! | --- | --- |
//! | [`Engine`] | a pair of models, loaded on a device; opened with [`EngineOptions`] |
//! | [`Params`] | settings of one request: length, [`SamplingParams`], [`SpecConfig`], stop strings |
//! | [`Generation`] | a running answer: an iterator of [`Token`]s, and in the end a [`Completion`] |
//! | [`Session`] | answers one request after another and reuses the KV cache of shared prefixes |
//! | [`Error`] | everything that can go wrong, as one sentence |
//!
//! # Where to read on
//!
//! The folders, lowest layer first. A folder uses only folders above it in this table.
//!
//! | folder | owns |
//! | --- | --- |
//! | [`checkpoint`] | model folders: `config.json`, safetensors, target and drafter opened together |
//! | [`perf`] | rooflines and statistics of measurements |
//! | [`spec`] | speculative decoding as mathematics: sampling, distributions, verification, trees |
//! | [`text`] | tokenizer, chat templates, prompts, stop strings |
//! | [`engine`] | the life of a request: prefill, rounds, stopping, statistics, the lossless check |
//! | [`cpu`] | both models in f32 on the CPU: the reference that the kernels are tested against |
//! | [`gpu`] | devices, kernels, models on a device, the round as one captured graph |
//! | [`api`] | the types of this page, which connect the folders above |
//! | `cli` | what both command-line programs share (feature `cli`) |
//!
//! A good order: [`spec::verify`] says which drafts are accepted and why verification is lossless;
//! [`cpu::decoder`] has a whole round in plain code; [`gpu::decoder`] has the same round on a GPU. `docs/`
//! has the algorithm (`docs/dflash.md`), the architecture and the glossary.
//!
//! # Features
//!
//! | feature | default | effect |
//! | --- | --- | --- |
//! | `cli` | yes | the programs `dflash-gen` and `dflash-bench`, and what only they need |

#![deny(missing_docs)]

pub mod api;
pub mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
pub mod cpu;
pub mod engine;
mod error;
pub mod gpu;
pub mod perf;
pub mod spec;
pub mod text;

/// Unit tests share a file with the test programs.
#[cfg(test)]
extern crate self as dflash;
#[cfg(test)]
#[path = "../tests/support/test_gpu.rs"]
#[allow(dead_code)]
mod test_gpu;

/// The Rust code in README.md, as a documentation test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use api::{Completion, DeviceChoice, Engine, EngineOptions, Generation, Models, Params, Session, Token};
pub use engine::lossless::check_lossless;
pub use engine::request::Finish;
pub use error::{Error, Result};
pub use spec::config::SpecConfig;
pub use spec::sampling::SamplingParams;
pub use text::message::Message;
pub use text::prompts::Content;
