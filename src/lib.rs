//! dflash: a latency engine for DFlash speculative decoding (arXiv 2602.06036).
//!
//! | folder | owns |
//! | --- | --- |
//! | [`checkpoint`] | model folders: `config.json`, safetensors, target and drafter opened together |
//! | [`text`] | tokenizer, chat templates, prompts, streaming text, stop strings |
//! | [`spec`] | speculative decoding as mathematics, without a device: sampling, distributions, verification, trees |
//! | [`engine`] | the life of a request: prefill, rounds, stopping, statistics, the lossless check |
//! | [`cpu`] | the reference: both models in plain f32, and sequences on the CPU |
//! | [`gpu`] | devices, kernels, models on a device, the captured round |
//! | [`perf`] | rooflines and statistics of measurements |
//! | [`cli`] | what both binaries share and a library user does not need |

pub mod checkpoint;
pub mod cli;
pub mod cpu;
pub mod engine;
mod error;
pub mod gpu;
pub mod perf;
pub mod spec;
pub mod text;

pub use error::{Error, Result};
