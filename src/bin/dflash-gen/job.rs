//! What the flags come to: every default filled in, every conflict refused. Nothing after it reads flags.

use dflash::Result;
use dflash::checkpoint::config::Overrides;
use dflash::checkpoint::folder::Folder;
use dflash::checkpoint::pair::{DraftSource, Pair};
use dflash::cli::device::Choice;
use dflash::cli::stop_flags::StopFlags;
use dflash::engine::request::Request;
use dflash::spec::config::SpecConfig;
use dflash::spec::sampling::SamplingParams;
use serde_json::Value;
use std::path::PathBuf;

/// A run of the program.
pub struct Job {
    pub action: Action,

    // ---- models and device ----
    pub target: Folder,
    pub draft: DraftSource<Folder>,
    /// Taps and slots in place of those of the drafter's config.
    pub overrides: Overrides,
    /// `--draft` was given, be it as `none`.
    pub draft_was_given: bool,
    /// The target is the demo pair's.
    pub is_demo: bool,
    pub device: Choice,
    /// Which GPU, as the driver counts them.
    pub gpu: u32,

    // ---- capacities ----
    /// Positions of a sequence, where it was given.
    pub ctx: Option<usize>,
    /// Sequences that run together.
    pub batch: usize,
    /// Rows of a block, where it was given.
    pub block: Option<usize>,

    // ---- prompts ----
    pub source: Source,
    /// The field of a line that holds its prompt, where it was given.
    pub prompt_key: Option<String>,
    /// Prompts are not put through the chat template.
    pub raw: bool,
    pub system: Option<String>,
    /// A chat template in place of the model's.
    pub template: Option<PathBuf>,
    /// Variables of the chat template.
    pub variables: Vec<(String, Value)>,

    // ---- answers ----
    pub max_tokens: usize,
    pub stop: Vec<String>,
    pub stop_flags: StopFlags,
    pub sampling: SamplingParams,
    pub spec: SpecConfig,
    /// Temperature of sampled drafts, where it was given; else they follow `sampling`.
    pub draft_temperature: Option<f32>,

    // ---- output ----
    pub format: Format,
    /// Accepted drafts are coloured.
    pub show_accepted: bool,
    /// Statistics of a conversation are dimmed.
    pub dim: bool,
    pub quiet: bool,
    /// Say which token ids end an answer.
    pub verbose: bool,
}

/// What to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Answers to prompts.
    Generate,
    /// Rates and tokens of both ways to decode.
    Compare,
    /// Tokens and logits of both ways to decode.
    CheckLossless,
    Chat,
    /// What would be loaded, or the launches of a round.
    Plan {
        launches: bool,
    },
}

/// Where prompts come from.
pub enum Source {
    Text(String),
    File(PathBuf),
    /// One JSON object per line.
    Lines(PathBuf),
    Stdin,
}

/// What stdout gets.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Text,
    /// One object per prompt.
    Json,
    /// One object per round.
    Events,
}

impl Job {
    pub fn json(&self) -> bool {
        self.format == Format::Json
    }

    /// Maximum positions of a sequence.
    pub fn context(&self, pair: &Pair) -> Result<usize> {
        pair.context(self.ctx)
    }

    /// Rows of a block, 1 without a drafter. Checks that the drafter has what the flags need.
    pub fn block(&self, pair: &Pair) -> Result<usize> {
        self.spec.check_drafter(pair)?;
        pair.block(self.block)
    }

    /// The spec config of a request that samples with `sampling`.
    pub fn spec(&self, sampling: &SamplingParams) -> SpecConfig {
        let temperature = self.draft_temperature.unwrap_or(sampling.temperature);
        self.spec.clone().with_draft_sampling(SamplingParams { temperature, ..sampling.clone() })
    }

    /// A request with this prompt, sampling, block and stop ids.
    pub fn request(
        &self,
        prompt: Vec<u32>,
        sampling: SamplingParams,
        block: usize,
        stop_ids: Vec<u32>,
    ) -> Request {
        Request { prompt, max_tokens: self.max_tokens, stop_ids, block, spec: self.spec(&sampling), sampling }
    }
}
