//! The flags as they are typed, and their translation into a [`Job`].

use crate::job::{Action, Format, Job, Source};
use clap::{ArgAction, Parser, ValueEnum};
use dflash::cli::device::{self, Choice};
use dflash::cli::models;
use dflash::cli::spec_flags::{DrafterFlags, SpecFlags, needs_drafter};
use dflash::cli::stop_flags::StopFlags;
use dflash::cli::terminal::{number, whole};
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::SamplingParams;
use dflash::{Error, Result};
use serde_json::Value;
use std::io::{self, IsTerminal};
use std::path::PathBuf;

/// Maximum sequences that run together.
const MAX_SEQUENCES: usize = 16;

const EXIT_CODES: &str = "\
Exit codes: 0 done (also when stdout is closed early), 1 internal failure, 2 usage,
3 model file missing or malformed, 4 unsupported, 5 out of memory, 6 lossless check failed,
130 interrupted (the text so far is printed; with --chat, Ctrl-C ends the answer, and the
program if it is pressed again or between answers).";

/// Generate text with DFlash speculative decoding.
///
/// Without --target and --draft, the demo pair runs, which is part of this program: a small model
/// of Python source. Answers go to stdout, everything else to stderr.
#[derive(Parser)]
#[command(name = "dflash-gen", disable_version_flag = true, after_help = EXIT_CODES, verbatim_doc_comment)]
pub struct Args {
    /// The prompt; without it, -f or --prompts, stdin is read
    #[arg(value_name = "PROMPT")]
    pub prompt: Option<String>,
    /// Read the prompt from a file; -: from stdin
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    pub file: Option<PathBuf>,
    /// Run many prompts, one JSON object per line: {"prompt": TEXT}, a conversation,
    /// {"messages": [{"role": "user", "content": TEXT}, ...]}, token ids, {"prompt_tokens": [...]},
    /// or what a user says in turn, {"turns": [TEXT, ...]}. A line may set tools, max_tokens,
    /// temperature, top_k, top_p, min_p, seed, stop, id and category. -: from stdin
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["prompt", "file"], verbatim_doc_comment)]
    pub prompts: Option<PathBuf>,
    /// The field of a --prompts line that holds its prompt, for data sets: question, text, ...
    /// A text, token ids, turns, or a conversation, also of ShareGPT
    #[arg(long, value_name = "KEY", verbatim_doc_comment)]
    pub prompt_key: Option<String>,
    /// Hold a conversation: messages from stdin, one a line, until its end. /help lists the commands.
    /// The conversation stays in memory, so that each turn runs only what is new
    #[arg(long, verbatim_doc_comment)]
    #[arg(conflicts_with_all = ["prompt", "file", "prompts", "raw", "plan", "json", "stream_json", "compare"])]
    pub chat: bool,

    /// Hugging Face folder of the target, or its name on the hub if the local cache has it [default: the demo
    /// pair's]
    #[arg(long, value_name = "DIR|NAME", help_heading = "Models")]
    pub target: Option<PathBuf>,
    /// Hugging Face folder or name of its DFlash drafter; "lookup" or "suffix" to draft what followed
    /// the last 5 or 64 tokens, or fewer, earlier in the text; or "none" for autoregressive decoding [default:
    /// the demo pair's; with --target: none]
    #[arg(long, value_name = "DIR|NAME|lookup|suffix|none", help_heading = "Models")]
    pub draft: Option<PathBuf>,
    #[command(flatten)]
    pub drafter: DrafterFlags,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Choice::Auto, help_heading = "Models")]
    pub device: Choice,
    /// Which GPU, as the driver counts them [default: 0]
    #[arg(long, value_name = "N", help_heading = "Models")]
    #[arg(value_parser = whole::<u32>, allow_negative_numbers = true)]
    pub gpu: Option<u32>,
    /// Threads of the CPU [default: RAYON_NUM_THREADS, or one for each core that the process may use]
    #[arg(long, value_name = "N", value_parser = device::threads, allow_negative_numbers = true, help_heading = "Models")]
    pub threads: Option<usize>,
    /// Positions that a sequence may have, prompt and answer together [default: on a device 8192, or what the
    /// longest prompt needs; at most the model's]
    #[arg(long, value_name = "N", help_heading = "Models")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub ctx: Option<usize>,
    /// Prompts of --prompts that run together; each answer is the one it gets alone
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "compare")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true, help_heading = "Models")]
    pub batch: usize,
    /// Print what would be loaded (files, shapes, bytes, KV per token), and load nothing. Flags about text
    /// change nothing here
    #[arg(long, help_heading = "Models")]
    #[arg(conflicts_with_all = ["prompt", "file", "prompts", "compare", "stream_json"])]
    pub plan: bool,
    /// With --plan: print the kernel launches of a round instead, as a GPU runs them
    #[arg(long, help_heading = "Models")]
    pub launches: bool,

    /// Tokens to generate at most
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256, help_heading = "Generation")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub max_tokens: usize,
    /// 0 is greedy: always the best token, whatever --top-k, --top-p, --min-p and --seed are
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
    /// Sample among tokens with at least this fraction of the best one's probability
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "Generation")]
    #[arg(value_parser = number::<f64>, allow_negative_numbers = true)]
    pub min_p: f64,
    /// Same seed, same text; with --verify match for any drafter and block [default: random, and printed]
    #[arg(long, value_name = "N", help_heading = "Generation")]
    #[arg(value_parser = whole::<u64>, allow_negative_numbers = true)]
    pub seed: Option<u64>,
    /// End the answer before this text, or at this special token of the model; repeatable
    #[arg(long, value_name = "STR", action = ArgAction::Append, help_heading = "Generation")]
    #[arg(allow_hyphen_values = true)]
    pub stop: Vec<String>,
    #[command(flatten)]
    pub stops: StopFlags,
    /// Tokens per block: 1 from the target and N - 1 drafts; 1 is autoregressive decoding [default: as the
    /// drafter was trained]
    #[arg(long, value_name = "N", help_heading = "Generation")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub block: Option<usize>,
    #[command(flatten)]
    pub drafts: SpecFlags,

    /// System message, put before every conversation; an empty one is none
    #[arg(long, value_name = "TEXT", conflicts_with = "raw", help_heading = "Chat template")]
    #[arg(allow_hyphen_values = true)]
    pub system: Option<String>,
    /// Take prompts as they are, though the model has a chat template
    #[arg(long, help_heading = "Chat template")]
    pub raw: bool,
    /// Use this chat template instead of the model's
    #[arg(long, value_name = "FILE", conflicts_with = "raw", help_heading = "Chat template")]
    pub chat_template: Option<PathBuf>,
    /// Set a variable of the chat template; V is true, yes, on, false, no, off or none in any
    /// case, JSON, or else text; repeatable. Thinking is off unless asked for by
    /// enable_thinking=true: published drafters were trained on answers without it, and lose
    /// more than half of their acceptance with it
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
    /// Instead of text: every prompt by autoregressive decoding and by DFlash, both rates, and whether the
    /// tokens are identical
    #[arg(long, conflicts_with_all = ["stream_json", "show_accept"], help_heading = "Output")]
    pub compare: bool,
    /// Instead of text: every prompt by autoregressive decoding and by DFlash, and whether the tokens and the
    /// logits that chose them are identical, bit for bit
    #[arg(long, help_heading = "Output", verbatim_doc_comment)]
    #[arg(conflicts_with_all = ["compare", "stream_json", "show_accept", "plan", "chat", "batch"])]
    pub check_lossless: bool,
    /// No statistics on stderr
    #[arg(short, long, help_heading = "Output")]
    pub quiet: bool,
    /// Say on stderr which token ids end an answer, which files and flags name each of them, and how many
    /// threads the CPU uses
    #[arg(short, long, conflicts_with_all = ["quiet", "plan"], help_heading = "Output")]
    pub verbose: bool,
    /// Print the version; with --json what a bug report needs: commit, kernels, device, driver
    #[arg(short = 'V', long, help_heading = "Output")]
    #[arg(conflicts_with_all = ["prompt", "file", "prompts", "chat", "plan", "stream_json", "compare", "check_lossless", "verbose"])]
    pub version: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Color {
    Auto,
    Always,
    Never,
}

impl Args {
    /// Resolves the flags. Everything that can be wrong without reading a file is found here.
    pub fn resolve(self) -> Result<Job> {
        self.check()?;
        let sampling = SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            seed: self.seed.unwrap_or_else(random_seed),
            stream: 0,
        };
        sampling.check()?;
        let spec = self.drafts.config(&sampling)?;
        let color = match self.color {
            Color::Auto => io::stdout().is_terminal(),
            Color::Always => true,
            Color::Never => false,
        };
        let (target, draft) = models::folders(self.target.as_deref(), self.draft.as_deref())?;
        Ok(Job {
            action: self.action(),
            is_demo: self.target.is_none(),
            draft_was_given: self.draft.is_some(),
            target,
            draft,
            overrides: self.drafter.overrides(),
            device: self.device,
            gpu: self.gpu.unwrap_or(0),
            ctx: self.ctx,
            batch: self.batch,
            block: self.block,
            source: match (self.prompt, self.file, self.prompts) {
                (Some(text), ..) => Source::Text(text),
                (_, Some(path), _) => Source::File(path),
                (.., Some(path)) => Source::Lines(path),
                _ => Source::Stdin,
            },
            prompt_key: self.prompt_key,
            raw: self.raw,
            system: self.system.filter(|text| !text.trim().is_empty()),
            template: self.chat_template,
            variables: self.template_arg.iter().map(|arg| template_variable(arg)).collect::<Result<_>>()?,
            max_tokens: self.max_tokens,
            stop: self.stop,
            stop_flags: self.stops,
            sampling,
            spec,
            draft_temperature: self.drafts.draft_temperature,
            format: match (self.json, self.stream_json) {
                (true, _) => Format::Json,
                (_, true) => Format::Events,
                _ => Format::Text,
            },
            show_accepted: self.show_accept && color,
            dim: self.color != Color::Never,
            quiet: self.quiet,
            verbose: self.verbose,
        })
    }

    fn action(&self) -> Action {
        match self {
            _ if self.plan => Action::Plan { launches: self.launches },
            _ if self.chat => Action::Chat,
            _ if self.compare => Action::Compare,
            _ if self.check_lossless => Action::CheckLossless,
            _ => Action::Generate,
        }
    }

    /// Flags that cannot go together, and capacities out of range.
    fn check(&self) -> Result<()> {
        let wrong = |what: &str| Err(Error::Usage(what.into()));
        let no_drafter = models::no_drafter(self.target.as_deref(), self.draft.as_deref());
        self.drafts.need_drafter(no_drafter, self.block)?;
        self.drafter.need_drafter(models::without_drafter(self.target.as_deref(), self.draft.as_deref()))?;
        // These compare with autoregressive decoding.
        let compares = match (self.compare, self.check_lossless) {
            (true, _) => Some("--compare"),
            (_, true) => Some("--check-lossless"),
            _ => None,
        };
        if let (Some(flag), true) = (compares, self.drafts.verify != VerifyMethod::Match) {
            return Err(Error::Usage(format!(
                "{flag} needs --verify match: what {} emits has the distribution of autoregressive decoding, not its tokens",
                self.drafts.verify.name()
            )));
        }
        if let Some(flag) = compares {
            needs_drafter(flag, no_drafter, self.block)?;
        }
        // clap does not ask for --plan or --prompts where another flag conflicts with them.
        if self.launches && !self.plan {
            return wrong("--launches needs --plan");
        }
        if self.prompt_key.is_some() && self.prompts.is_none() {
            return wrong("--prompt-key needs --prompts");
        }
        match () {
            _ if !(1..=MAX_SEQUENCES).contains(&self.batch) => {
                Err(Error::Usage(format!("--batch is {}, expected 1 to {MAX_SEQUENCES}", self.batch)))
            }
            _ if self.gpu.is_some() && self.device == Choice::Cpu => {
                wrong("--gpu needs --device cuda or auto")
            }
            _ if self.batch > 1 && self.prompts.is_none() && !self.plan => wrong("--batch needs --prompts"),
            _ if self.stop.iter().any(String::is_empty) => {
                wrong("--stop is empty, expected at least one character")
            }
            _ if self.color == Color::Always && !self.show_accept => {
                wrong("--color always needs --show-accept")
            }
            _ if self.drafts.adaptive == Some(None) && self.prompt.as_deref().is_some_and(is_probability) => {
                let prompt = self.prompt.as_deref().unwrap_or_default();
                Err(Error::Usage(format!(
                    "--adaptive takes its value with =, as --adaptive={prompt}; for the prompt {prompt:?}, write it to -f -"
                )))
            }
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
}

/// Whether a prompt reads as the value of `--adaptive`.
fn is_probability(text: &str) -> bool {
    text.parse().is_ok_and(|p: f64| (0.0..=1.0).contains(&p))
}

/// `--template-arg`: the value is a word for a boolean or for none, JSON, or else text.
fn template_variable(arg: &str) -> Result<(String, Value)> {
    let Some((name, text)) = arg.split_once('=').filter(|(name, _)| !name.is_empty()) else {
        return Err(Error::Usage(format!("--template-arg is {arg:?}, expected NAME=VALUE")));
    };
    let value = match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" => true.into(),
        "false" | "no" | "off" => false.into(),
        "none" | "null" => Value::Null,
        _ => match serde_json::from_str(text) {
            Ok(value) => value,
            Err(e) if text.starts_with(['[', '{', '"']) => {
                return Err(Error::Usage(format!("--template-arg {name} is not JSON: {e}")));
            }
            Err(_) => text.into(),
        },
    };
    Ok((name.into(), value))
}

/// A short random number, from the hash keys of the standard library.
fn random_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0) >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use dflash::cli::terminal;

    fn resolve(flags: &[&str]) -> Result<Job> {
        Args::try_parse_from(["dflash-gen"].iter().chain(flags)).unwrap().resolve()
    }

    #[test]
    fn flags_resolve_into_a_job_with_every_default() {
        let job = resolve(&["hello", "--seed", "5"]).unwrap();
        assert!(job.action == Action::Generate && job.is_demo && job.draft.drafter().is_some());
        assert!(matches!(job.source, Source::Text(text) if text == "hello"));
        assert_eq!(job.sampling, SamplingParams { seed: 5, ..SamplingParams::default() });
        assert_eq!(job.spec, Default::default());
        let job =
            resolve(&["--target", "a", "--draft", "none", "--chat", "--template-arg", "x=[1]"]).unwrap();
        assert!(job.action == Action::Chat && !job.is_demo && job.draft.drafter().is_none());
        assert_eq!(job.variables, [("x".into(), serde_json::json!([1]))]);
    }

    #[test]
    fn template_arguments_are_words_json_or_text() {
        use serde_json::json;
        for (given, expected) in [
            ("True", json!(true)),
            ("yes", json!(true)),
            ("ON", json!(true)),
            ("False", json!(false)),
            ("false", json!(false)),
            ("no", json!(false)),
            ("Off", json!(false)),
            ("None", json!(null)),
            ("null", json!(null)),
            ("0", json!(0)),
            ("\"no\"", json!("no")),
            ("[1, true]", json!([1, true])),
            ("a=b", json!("a=b")),
            ("", json!("")),
        ] {
            assert_eq!(template_variable(&format!("x={given}")), Ok(("x".into(), expected)), "{given}");
        }
        for malformed in ["x=[True]", "x={'a': 1}", "x=\"a"] {
            let message = template_variable(malformed).unwrap_err().to_string();
            assert!(message.starts_with("--template-arg x is not JSON: "), "{message}");
        }
    }

    #[test]
    fn sampled_drafts_use_the_targets_sampling_by_default() {
        let hot = SamplingParams { temperature: 0.5, top_k: 3, ..SamplingParams::default() };
        for (more, expected) in [(&[][..], 0.5), (&["--draft-temperature", "2"], 2.0)] {
            let flags = [&["x", "--verify", "rejection", "--temperature", "1"], more].concat();
            let spec = resolve(&flags).unwrap().spec(&hot);
            let drafts = spec.draft_sampling().unwrap();
            assert_eq!((drafts.temperature, drafts.top_k), (expected, 3));
        }
    }

    #[test]
    fn numbers_out_of_range_are_refused_by_the_flag() {
        for (flags, sentence) in [
            (&["--top-p", "2"][..], "--top-p is 2, expected more than 0 and at most 1"),
            (&["--tree", "65"], "--tree is 65, expected 2 to 64"),
            (&["--adaptive=2"], "--adaptive is 2, expected more than 0 and at most 1"),
            (&["--template-arg", "x"], "--template-arg is \"x\", expected NAME=VALUE"),
        ] {
            let error = resolve(flags).err().unwrap();
            assert_eq!((error.exit_code(), terminal::message(&error).as_str()), (2, sentence));
        }
    }
}
