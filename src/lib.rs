//! dflash: a latency engine for DFlash speculative decoding (arXiv 2602.06036).
//!
//! | room | owns |
//! | --- | --- |
//! | [`config`], `json` | `config.json` of target and drafter, what is refused, the pair's fit |
//! | [`weights`] | checkpoint folders: safetensors shards, mapped and used in place |
//! | [`pair`] | target and drafter opened together and held against each other |
//! | [`floor`] | the least time that a pair's passes can take on a card |
//! | [`measure`] | quantiles, and how much better one set of samples is than another |
//! | [`place`] | where a pair runs: the word in `--device`, found and opened |
//! | [`prompts`] | prompts from JSON lines to token ids |
//! | [`fault`] | what happens when a mapped file loses bytes |
//! | [`terminal`] | what every binary owes a terminal: sentences, exit codes, readers who leave |
//! | [`text`] | tokenizer, streaming detokenising, stop strings |
//! | `template` | chat templates as Hugging Face runs them |
//! | [`verify`] | sampling law, Philox streams, the rule `match` |
//! | [`rules`] | rules for drafts drawn at random: rejection, block verification, trees |
//! | [`tree`] | draft trees: what a round guesses where it may guess more than once |
//! | [`control`] | how much a round drafts, from what is accepted and what passes cost |
//! | [`cpu`], `kv`, `simd` | the reference's arithmetic on all cores; its cache; the instruction sets underneath |
//! | [`mod@reference`] | target and drafter in plain f32, the oracle |
//! | [`sequences`] | sequences on the CPU: the `cpu` device, a round in its plainest form |
//! | [`device`] | memory, launches, graphs, events: what the engine needs of a device |
//! | [`cuda`] | that device on a GPU, through the driver API |
//! | `emulator` | that device on the host build of `cuda/*.cu`, for tests (feature `emulator`) |
//! | [`kernels`] | one launcher per kernel: shapes, checks, bytes |
//! | [`load`] | weights from checkpoints to a device |
//! | [`memory`] | how much of a device a pair takes, counted beforehand |
//! | [`launches`] | the launches of a round as a list to be read |
//! | [`model`] | target and drafter on a device: a pass as an ordered list of launches |
//! | [`rounds`] | sequences on a device: pages, the captured round, the ring |
//! | [`engine`] | a request's life: prefill, rounds, stopping; what it needs of a device |
//! | [`profile`] | what a profiler is told: ranges, and the window to record |
//! | [`drafts`] | the flags that say how drafts are made and which of them stand |
//! | [`lossless`] | DFlash held against plain decoding, bit for bit |
//! | [`stats`] | what a run reports: rates, acceptance, histogram |

pub mod config;
pub mod control;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod drafts;
#[cfg(feature = "emulator")]
pub mod emulator;
pub mod engine;
pub mod fault;
pub mod floor;
mod json;
pub mod kernels;
mod kv;
pub mod launches;
pub mod load;
pub mod lossless;
pub mod measure;
pub mod memory;
pub mod model;
pub mod pair;
pub mod place;
pub mod profile;
pub mod prompts;
pub mod reference;
pub mod rounds;
pub mod rules;
pub mod sequences;
mod simd;
pub mod stats;
mod template;
pub mod terminal;
pub mod text;
pub mod tree;
pub mod verify;
pub mod weights;

/// Everything that can go wrong, as one sentence that names the file, field or flag, what was found and what was
/// expected. The kind decides the exit code of the binaries.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A bug or an I/O failure that no other kind fits. Exit code 1.
    #[error("{0}")]
    Internal(String),
    /// A flag, an argument or an input text is wrong. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// A model file is missing or malformed, or two files contradict each other. Exit code 3.
    #[error("{0}")]
    Model(String),
    /// The file is fine, but this engine does not run such a model, device or option. Exit code 4.
    #[error("{0}")]
    Unsupported(String),
    /// Not enough memory: says how much is needed and for what. Exit code 5.
    #[error("{0}")]
    Memory(String),
    /// Speculative output differed from plain output. Exit code 6.
    #[error("{0}")]
    Lossless(String),
}

impl Error {
    /// The documented exit code of the binaries for this kind.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Internal(_) => 1,
            Error::Usage(_) => 2,
            Error::Model(_) => 3,
            Error::Unsupported(_) => 4,
            Error::Memory(_) => 5,
            Error::Lossless(_) => 6,
        }
    }
}

pub type Result<T> = std::result::Result<T, Error>;
