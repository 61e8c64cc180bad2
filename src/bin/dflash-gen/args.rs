//! Flags: what there is, what cannot go together, and what follows from them alone.

use clap::{ArgAction, Parser, ValueEnum};
use dflash::checkpoint::pair::Pair;
use dflash::cli::device::Choice;
use dflash::cli::spec_flags::{SpecFlags, needs_drafter};
use dflash::cli::terminal::{number, whole};
use dflash::spec::sampling::SamplingParams;
use dflash::spec::verify::VerifyMethod;
use dflash::{Error, Result};
use std::path::PathBuf;

/// Sequences that can run together.
const MOST_SEQUENCES: usize = 16;

const EXIT_CODES: &str = "\
Exit codes: 0 done (also when the reader of stdout goes away), 1 internal failure, 2 usage,
3 model file missing or malformed, 4 unsupported, 5 out of memory, 6 lossless check failed,
130 interrupted (the text so far is printed; with --chat, Ctrl-C ends the answer, and the
program if it is pressed again or between answers).";

/// Generate text with DFlash speculative decoding.
///
/// Without --target and --draft, the demo pair runs, which is part of this program: a small model
/// of Python source. Answers go to stdout, everything else to stderr.
#[derive(Parser)]
#[command(name = "dflash-gen", version, after_help = EXIT_CODES, verbatim_doc_comment)]
pub struct Args {
    /// The prompt; without it, -f or --prompts, stdin is read
    #[arg(value_name = "PROMPT")]
    pub prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    pub file: Option<PathBuf>,
    /// Run many prompts, one JSON object per line: {"prompt": TEXT}, or a conversation,
    /// {"messages": [{"role": "user", "content": TEXT}, ...]}
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["prompt", "file"], verbatim_doc_comment)]
    pub prompts: Option<PathBuf>,
    /// Hold a conversation: messages from stdin, one a line, until its end. /help lists the commands.
    /// What was said stays in memory, so that each turn runs only what is new
    #[arg(long, verbatim_doc_comment)]
    #[arg(conflicts_with_all = ["prompt", "file", "prompts", "raw", "plan", "json", "stream_json", "compare"])]
    pub chat: bool,

    /// Hugging Face folder of the target [default: the demo pair's]
    #[arg(long, value_name = "DIR", help_heading = "Models")]
    pub target: Option<PathBuf>,
    /// Hugging Face folder of its DFlash drafter, or "none" for autoregressive decoding [default: the demo pair's]
    #[arg(long, value_name = "DIR|none", help_heading = "Models")]
    pub draft: Option<PathBuf>,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Choice::Auto, help_heading = "Models")]
    pub device: Choice,
    /// Which GPU, as the driver counts them [default: 0]
    #[arg(long, value_name = "N", help_heading = "Models")]
    #[arg(value_parser = whole::<u32>, allow_negative_numbers = true)]
    pub gpu: Option<u32>,
    /// Positions that a sequence may have, prompt and answer together [default: on a device 8192, or what the longest
    /// prompt needs; at most the model's]
    #[arg(long, value_name = "N", help_heading = "Models")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub ctx: Option<usize>,
    /// Prompts of --prompts that run together; their answers are what they are alone
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "compare")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true, help_heading = "Models")]
    pub batch: usize,
    /// Print what would be loaded (files, shapes, bytes, KV per token), and load nothing
    #[arg(long, help_heading = "Models")]
    #[arg(conflicts_with_all = ["prompt", "file", "prompts", "compare", "stream_json"])]
    pub plan: bool,
    /// With --plan: print the kernel launches of a round instead, as a GPU runs them
    #[arg(long, requires = "plan", help_heading = "Models")]
    pub launches: bool,

    /// Tokens to generate at most
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256, help_heading = "Generation")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub max_tokens: usize,
    /// 0 is greedy: the best token every time, whatever the next four say
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "Generation")]
    #[arg(value_parser = number::<f32>, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Sample among the K best tokens; 0: all
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Generation")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub top_k: usize,
    /// Sample among the smallest set of best tokens that has this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Generation")]
    #[arg(value_parser = number::<f64>, allow_negative_numbers = true)]
    pub top_p: f64,
    /// Sample among tokens at least this fraction as likely as the best
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "Generation")]
    #[arg(value_parser = number::<f64>, allow_negative_numbers = true)]
    pub min_p: f64,
    /// Same seed, same text, with --verify match whatever the drafter and the block [default: drawn, and printed]
    #[arg(long, value_name = "N", help_heading = "Generation")]
    #[arg(value_parser = whole::<u64>, allow_negative_numbers = true)]
    pub seed: Option<u64>,
    /// End the answer before this text; repeatable
    #[arg(long, value_name = "STR", action = ArgAction::Append, help_heading = "Generation")]
    #[arg(allow_hyphen_values = true)]
    pub stop: Vec<String>,
    /// Go on after the model's stop tokens
    #[arg(long, help_heading = "Generation")]
    pub ignore_eos: bool,
    /// Tokens per block: 1 from the target and N - 1 drafts; 1 is autoregressive decoding [default: as the drafter was trained]
    #[arg(long, value_name = "N", help_heading = "Generation")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub block: Option<usize>,
    #[command(flatten)]
    pub drafts: SpecFlags,

    /// System message, put before every conversation
    #[arg(long, value_name = "TEXT", conflicts_with = "raw", help_heading = "Chat template")]
    #[arg(allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Take prompts as they are, though the model has a chat template
    #[arg(long, help_heading = "Chat template")]
    pub raw: bool,
    /// Use this chat template instead of the model's
    #[arg(long, value_name = "FILE", conflicts_with = "raw", help_heading = "Chat template")]
    pub chat_template: Option<PathBuf>,
    /// Set a variable of the chat template; V is JSON, or else text; repeatable. Thinking is off
    /// unless asked for by enable_thinking=true: published drafters were trained on answers
    /// without it, and lose more than half of their acceptance with it
    #[arg(long, value_name = "K=V", action = ArgAction::Append, conflicts_with = "raw", verbatim_doc_comment)]
    #[arg(help_heading = "Chat template")]
    pub template_arg: Vec<String>,

    /// Colour the text that was drafted and accepted
    #[arg(long, conflicts_with_all = ["json", "stream_json"], help_heading = "Output")]
    pub show_accept: bool,
    /// Whether --show-accept colours; auto: on a terminal
    #[arg(long, value_enum, default_value_t = Color::Auto, help_heading = "Output")]
    pub color: Color,
    /// Print one JSON object per prompt instead of text
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// Print one JSON object per round, and at the end the one of --json
    #[arg(long, conflicts_with = "json", help_heading = "Output")]
    pub stream_json: bool,
    /// Instead of text: every prompt by autoregressive decoding and by DFlash, both rates, and whether the tokens are identical
    #[arg(long, conflicts_with_all = ["stream_json", "show_accept"], help_heading = "Output")]
    pub compare: bool,
    /// Instead of text: every prompt by autoregressive decoding and by DFlash, and whether the tokens and the logits that chose them
    /// are identical, bit for bit
    #[arg(long, help_heading = "Output", verbatim_doc_comment)]
    #[arg(conflicts_with_all = ["compare", "stream_json", "show_accept", "plan", "chat", "batch"])]
    pub check_lossless: bool,
    /// No statistics on stderr
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Color {
    Auto,
    Always,
    Never,
}

impl Args {
    /// What can be told wrong before any file is looked at.
    pub fn check(&self) -> Result<()> {
        let wrong = |what: &str| Err(Error::Usage(what.into()));
        let twice = match (self.compare, self.check_lossless) {
            (true, _) => Some("--compare"),
            (_, true) => Some("--check-lossless"),
            _ => None,
        };
        self.drafts.check(self.plain(), self.block)?;
        if let (Some(flag), true) = (twice, self.drafts.verify != VerifyMethod::Match) {
            return Err(Error::Usage(format!(
                "{flag} needs --verify match: what {} emits has the distribution of autoregressive decoding, not its tokens",
                self.drafts.verify.name()
            )));
        }
        if let Some(flag) = twice {
            needs_drafter(flag, self.plain(), self.block)?;
        }
        match (&self.target, &self.draft) {
            (Some(_), None) => {
                wrong("--target needs --draft: its drafter's folder, or none for autoregressive decoding")
            }
            _ if !(1..=MOST_SEQUENCES).contains(&self.batch) => {
                Err(Error::Usage(format!("--batch is {}, expected 1 to {MOST_SEQUENCES}", self.batch)))
            }
            _ if self.gpu.is_some() && matches!(self.device, Choice::Cpu | Choice::Emulator) => {
                wrong("--gpu needs --device cuda or auto")
            }
            _ if self.batch > 1 && self.prompts.is_none() && !self.plan => wrong("--batch needs --prompts"),
            _ if self.chat && self.max_tokens == 0 => {
                wrong("--max-tokens is 0, which leaves --chat nothing to say")
            }
            _ if self.compare && self.max_tokens == 0 => {
                wrong("--max-tokens is 0, which leaves --compare nothing to compare")
            }
            _ if self.check_lossless && self.max_tokens < 2 => Err(Error::Usage(format!(
                "--max-tokens is {}, which leaves --check-lossless no round: expected at least 2",
                self.max_tokens
            ))),
            _ => Ok(()),
        }
    }

    /// `--draft none`
    pub fn plain(&self) -> bool {
        self.draft.as_ref().is_some_and(|dir| dir.as_os_str() == "none")
    }

    pub fn sampling(&self) -> Result<SamplingParams> {
        let sampling = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed.unwrap_or_else(draw_seed),
            stream: 0,
        };
        sampling.check()?;
        Ok(sampling)
    }

    /// Positions that a sequence may have at most.
    pub fn context(&self, pair: &Pair) -> Result<usize> {
        pair.context(self.ctx)
    }

    /// Rows of a block, 1 without a drafter.
    pub fn block(&self, pair: &Pair) -> Result<usize> {
        pair.block(self.block)
    }
}

/// A short random number, from the standard library's hash keys.
fn draw_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0) >> 32
}
