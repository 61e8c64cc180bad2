//! The command line of `dflash-bench`.

use crate::format::Format;
pub use crate::lists::{Numbers, WholeNumbers};
use crate::lists::{above_zero, numbers, percent, sample_count, whole_numbers};
use clap::{Args as Flags, Parser, Subcommand};
use dflash::cli::device::{self, Choice};
use dflash::cli::spec_flags::{DrafterFlags, SpecFlags};
use dflash::cli::stop_flags::StopFlags;
use dflash::cli::terminal::{number, whole};
use std::path::PathBuf;

const EXIT_CODES: &str = "\
Exit codes: 0 done (also when stdout is closed early), 1 internal failure, 2 usage,
3 model file missing or malformed, 4 unsupported, 5 out of memory, 6 an answer of DFlash differs
from that of autoregressive (AR) decoding, 7 compare found a row that is SLOWER, 130 interrupted
(what was measured so far is printed).";

const MAIN: &str = "\
Without a subcommand: a short table for the demo pair on this machine. It answers built-in prompts
with AR decoding and with DFlash, and takes less than a minute.

A table fits the terminal. COLUMNS overrides the width, which is 100 in a pipe.

Exit codes: 0 done (also when stdout is closed early), 1 internal failure, 2 usage,
3 model file missing or malformed, 4 unsupported, 5 out of memory, 6 an answer of DFlash differs
from that of autoregressive (AR) decoding, 7 compare found a row that is SLOWER, 130 interrupted
(what was measured so far is printed).";

/// Measure and predict DFlash decoding.
///
/// Results go to stdout as a table or as a record (--json) of the form benches/schema.json.
#[derive(Parser)]
#[command(name = "dflash-bench", disable_version_flag = true, after_help = MAIN, verbatim_doc_comment)]
pub struct Args {
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Print the record as JSON
    #[arg(long, global = true, conflicts_with_all = ["csv", "markdown"], help_heading = "Output")]
    pub json: bool,
    /// Print the rows as CSV
    #[arg(long, global = true, conflicts_with = "markdown", help_heading = "Output")]
    pub csv: bool,
    /// Print the rows as a Markdown table
    #[arg(long, global = true, help_heading = "Output")]
    pub markdown: bool,
    /// Write a page with figures, too. Replaces an older page
    #[arg(long, global = true, value_name = "FILE.html", help_heading = "Output")]
    pub report: Option<PathBuf>,
    /// Print the version; with --json what a bug report needs: commit, kernels, device, driver
    #[arg(short = 'V', long, help_heading = "Output")]
    pub version: bool,
}

#[derive(Subcommand)]
pub enum Command {
    /// Measure answers to prompts with AR decoding and with DFlash; counters instead of times on the software GPU
    #[command(after_help = GENERATE)]
    Generate(Generate),
    /// Measure an AR step, a DFlash round and the round's parts with random weights
    #[command(after_help = ROUND)]
    Round(Round),
    /// Measure every kernel of a round and of a prompt at a model's shapes, against the memory's read ceiling
    #[command(after_help = KERNELS)]
    Kernels(Kernels),
    /// Predict the least time of a step, a draft, a verification and a round from bytes and operations
    #[command(after_help = ROOFLINE, visible_alias = "floor")]
    Roofline(Roofline),
    /// Predict the time of every kernel of a round on a card from counters and shapes, and what decides it
    #[command(after_help = PREDICT)]
    Predict(Predict),
    /// Compare two records row by row; exit code 7 if a row is SLOWER
    #[command(after_help = COMPARE)]
    Compare(Compare),
    /// Print records again; with --report several on one page
    #[command(after_help = EXIT_CODES)]
    Show(Show),
}

const GENERATE: &str = "\
Every prompt is answered by AR decoding and by DFlash in turn, after a warm-up. Times are
wall-clock times. TTFT is the time to the first token, TPOT the time per further token. A speed-up
is the ratio of tokens per second over all prompts, with its 99 % interval (a paired bootstrap
over prompts, from 5 prompts on).

Exit codes: 0 done (also when stdout is closed early), 1 internal failure, 2 usage,
3 model file missing or malformed, 4 unsupported, 5 out of memory, 6 an answer of DFlash differs
from that of autoregressive (AR) decoding, 130 interrupted (what was measured so far is printed).";

const ROUND: &str = "\
The weights are random and the context is noise: nothing is downloaded, no prompt runs, and the
text is meaningless.

On a GPU, in ms by its own clock. \"AR step\" and \"round\" are replays of the captured graphs, each
behind a whole round that keeps the card busy while they are enqueued. The parts of a round
(begin, inject, draft, verify, accept) come from graphs of its first launches, replayed in turn
with it: a part is the difference of two medians in each round of samples. Overlap between two
parts counts for the later one. \"gaps\" is the extra time of a round that follows another one.
\"round with host\" is the engine's own loop by the host's clock. A difference within noise has a
value and no samples. Rooflines use the card's nominal bandwidth, where it is known; \"of roofline\"
is the roofline over the time, 1 at best.

On the CPU, in ms by the host's clock: the AR step, the round, and its parts inject, draft and
verify. The weights need as much memory as their files would.

On the software GPU one run counts bytes, launches, mma and conflicts; --rounds and --samples have no
effect.

A synthetic acceptance length is assumed, not measured: tokens per second (bytes per token on the
software GPU) if every round produced so many tokens.

LIST: numbers and ranges, with commas: 4,8  1-8  1-16+5 (1, 6, 11, 16)
512-4096*2 (512, 1024, 2048, 4096).

Exit codes: 0 done (also when stdout is closed early), 1 internal failure, 2 usage,
3 model file missing or malformed, 4 unsupported, 5 out of memory, 130 interrupted (what was
measured so far is printed).";

const KERNELS: &str = "\
The read ceiling comes first: a kernel that only reads. Then every kernel is checked against a
plain computation and timed; a wrong kernel has no time. Weights, keys and values are random and
have as many copies as keep a launch's data out of the cache; results of the preceding kernel are
in the cache. Verification of trees and of sampled drafts gets its expensive case: paths that
move, drafts that are rejected.

us: time of a launch among others. GB/s: the bytes that it must move over that time. roofline us:
these bytes at the ceiling, or its products at the card's nominal rate where that is known and
slower. On the software GPU: the counters of one launch, with all bytes as the value. Kernels that do
not fit the memory are left out, and the exit code is 5.

LIST: numbers and ranges, with commas: 4,8  1-8  1-16+5 (1, 6, 11, 16)
512-4096*2 (512, 1024, 2048, 4096).

Exit codes: 0 done (also when stdout is closed early), 1 internal failure or a wrong
kernel, 2 usage, 3 model file missing or malformed, 4 unsupported, 5 out of memory, 130
interrupted (what was measured so far is printed).";

const ROOFLINE: &str = "\
Nothing runs. A pass takes its bytes at the card's nominal bandwidth or its operations at the
nominal rate, whichever is longer. A round is a draft and a verification. Synthetic acceptance
lengths are assumed, not measured.

LIST: numbers and ranges, with commas: 4,8  1-8  1-16+5 (1, 6, 11, 16)
512-4096*2 (512, 1024, 2048, 4096).

Exit codes: 0 done (also when stdout is closed early), 1 internal failure, 2 usage,
3 model file missing or malformed, 4 unsupported.";

const PREDICT: &str = "\
Nothing runs. The launches are those of the engine's own round; the counters of their kernels come
from the software GPU. A launch takes as long as the slowest of its resources, plus delays that no
throughput shortens. Every time is a prediction: no card has confirmed the constants behind it.

us: all launches of a row, with \"us each\" for one. shape: outputs x inputs of a matrix, or the grid.
idle: blocks that return at once. waves: blocks with work over those that are resident together.
bound: the longest of the launch's terms. memory: bytes over bandwidth; L2: all bytes over that of
L2; issue: instructions; slow units: divisions, conversions, roots, exponentials; shared: shared
memory; tensor: products; latency: start, dependent loads, barriers, fences and hand-overs.

LIST: numbers and ranges, with commas: 4,8  1-8  1-16+5 (1, 6, 11, 16)
512-4096*2 (512, 1024, 2048, 4096). The kernels are listed for one context and one batch.

Exit codes: 0 done (also when stdout is closed early), 1 internal failure, 2 usage,
3 model file missing or malformed, 4 unsupported.";

const COMPARE: &str = "\
Rows are matched by name and parameters. The ratio is the factor by which B is better (time,
bytes: A / B; rates: B / A), from the medians, with its 99 % interval: a bootstrap over samples,
or over whole rounds of samples where a row has rounds. FASTER or SLOWER: the ratio is beyond the
threshold and the interval is on the same side of 1. SAME: the whole interval is within the
threshold. UNCLEAR: neither, or fewer than 5 samples or rounds on a side. Counted and predicted
values are exact: only the threshold applies. Rows without a better direction, such as a
histogram's, have no verdict. Rows of only one record are listed.

Records of different cards, models, prompts or settings, or of an interrupted run, are refused
without --force. Different ways to draft (--tree, --verify, ...) are compared. The title lists every
difference.

Exit codes: 0 no row is SLOWER, 7 a row is, 2 wrong flags or records, 1 internal failure.";

#[derive(Flags)]
pub struct Kernels {
    /// qwen3-4b, qwen3-8b, llama-3.1-8b, demo, or the folder of a target; only its config.json is read
    /// [default: qwen3-8b on a GPU, demo on the software GPU]
    #[arg(long, value_name = "NAME|DIR")]
    pub model: Option<String>,
    /// Folder of the drafter; only its config.json is read [default: the named model's own; none for a
    /// folder]
    #[arg(long, value_name = "DIR")]
    pub draft: Option<PathBuf>,
    #[command(flatten)]
    pub drafter: DrafterFlags,
    /// Rows of a launch, over all sequences: in as few blocks as the drafter's block length allows, as AR
    /// steps, and in trees of up to 64 rows
    #[arg(long, value_name = "LIST", default_value = "1,8,16,32,64,128", value_parser = whole_numbers)]
    #[arg(allow_hyphen_values = true)]
    pub rows: WholeNumbers,
    /// Positions of a sequence before the launch
    #[arg(long, value_name = "LIST", default_value = "1024", value_parser = whole_numbers, allow_hyphen_values = true)]
    pub context: WholeNumbers,
    /// Only the kernels of these names, with commas. An unknown name gives the list of names
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Rounds of samples on a GPU, after a warm-up round
    #[arg(long, value_name = "N", default_value = "5", value_parser = sample_count, allow_negative_numbers = true)]
    pub rounds: usize,
    /// Samples in a round on a GPU, each of at least 16 launches
    #[arg(long, value_name = "N", default_value = "10", value_parser = sample_count, allow_negative_numbers = true)]
    pub samples: usize,
    /// cuda, or auto, which is the same; on the software GPU counters instead of times
    #[arg(long, value_name = "DEVICE", default_value = "auto", hide_possible_values = true)]
    pub device: Choice,
    /// Number of the GPU in the driver's order [default: 0]
    #[arg(long, value_name = "N", value_parser = whole::<u32>, allow_negative_numbers = true)]
    pub gpu: Option<u32>,
}

// The pair of subcommands that compute with shapes and run nothing.
#[derive(Flags)]
pub struct Shapes {
    /// qwen3-4b, qwen3-8b, llama-3.1-8b, demo, or the folder of a target; only its config.json is read
    #[arg(long, value_name = "NAME|DIR", default_value = "qwen3-8b")]
    pub model: String,
    /// Folder of the drafter; only its config.json is read [default: the named model's own; none for a
    /// folder]
    #[arg(long, value_name = "DIR")]
    pub draft: Option<PathBuf>,
    #[command(flatten)]
    pub drafter: DrafterFlags,
}

#[derive(Flags)]
pub struct Roofline {
    #[command(flatten)]
    pub shapes: Shapes,
    /// Card, with its vendor's figures: H200, H100-SXM, H100-PCIe, GH200, B200, A100-80GB, A100-40GB, L40S,
    /// L4, RTX-5090, RTX-4090, RTX-3090 [default: H200]
    #[arg(long, value_name = "NAME", conflicts_with_all = ["bandwidth", "flops"])]
    pub card: Option<String>,
    /// Memory bandwidth in GB/s, instead of a card
    #[arg(long, value_name = "GB/s", requires = "flops", value_parser = above_zero, allow_negative_numbers = true)]
    pub bandwidth: Option<f64>,
    /// Dense bf16 TFLOP/s of the tensor cores, with --bandwidth
    #[arg(long, value_name = "TFLOP/s", requires = "bandwidth", value_parser = above_zero)]
    #[arg(allow_negative_numbers = true)]
    pub flops: Option<f64>,
    /// Positions of a sequence before the pass
    #[arg(long, value_name = "LIST", default_value = "1024", value_parser = whole_numbers, allow_hyphen_values = true)]
    pub context: WholeNumbers,
    /// Sequences in a batch
    #[arg(long, value_name = "LIST", default_value = "1", value_parser = whole_numbers, allow_hyphen_values = true)]
    pub batch: WholeNumbers,
    /// Rows that are verified for a sequence: a block, or the nodes of a tree [default: the drafter's block]
    #[arg(long, value_name = "LIST", value_parser = whole_numbers, allow_hyphen_values = true)]
    pub tree: Option<WholeNumbers>,
    /// Synthetic acceptance lengths (tokens per round) to print tokens per second for [default: those of
    /// 2,4,6,8 that the rows allow]
    #[arg(long, value_name = "LIST", value_parser = numbers, allow_hyphen_values = true)]
    pub acceptance: Option<Numbers>,
    /// Probabilities that the first draft of a chain is accepted, the second if the first is, and so on.
    /// Prints the number of drafts with the least time per token for one sequence, and its tokens per second
    #[arg(long, value_name = "P1,P2,...", value_parser = numbers, allow_hyphen_values = true)]
    pub curve: Option<Numbers>,
}

#[derive(Flags)]
pub struct Predict {
    #[command(flatten)]
    pub shapes: Shapes,
    /// Card, with its vendor's figures: H200, H100-SXM, H100-PCIe, GH200, B200, A100-80GB, A100-40GB, L40S,
    /// L4, RTX-5090, RTX-4090, RTX-3090 [default: H200]
    #[arg(long, value_name = "NAME")]
    pub card: Option<String>,
    /// GB/s that kernels read from the card's memory, such as the read ceiling of `kernels` [default: the
    /// card's nominal bandwidth]
    #[arg(long, value_name = "GB/s", value_parser = above_zero, allow_negative_numbers = true)]
    pub ceiling: Option<f64>,
    /// Positions of a sequence before the round
    #[arg(long, value_name = "LIST", default_value = "1024", value_parser = whole_numbers, allow_hyphen_values = true)]
    pub context: WholeNumbers,
    /// Sequences in a batch
    #[arg(long, value_name = "LIST", default_value = "1", value_parser = whole_numbers, allow_hyphen_values = true)]
    pub batch: WholeNumbers,
    /// Rows of a block: the anchor and N - 1 drafts [default: the drafter's block length]
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub block: Option<usize>,
    /// Verify best-first trees of N rows instead of chains
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub tree: Option<usize>,
    /// 0: greedy rounds. Above: rounds that sample
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    #[arg(value_parser = number::<f32>, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Sample among the K best tokens, at most 256. 0: all tokens
    #[arg(long, value_name = "K", default_value_t = 0, value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub top_k: usize,
    /// Sample among the smallest set of best tokens with at least this probability in all
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = number::<f64>, allow_negative_numbers = true)]
    pub top_p: f64,
}

#[derive(Flags)]
pub struct Round {
    /// qwen3-4b, qwen3-8b, llama-3.1-8b, demo, or the folder of a target; only its config.json is read
    /// [default: qwen3-8b on a GPU, else demo]
    #[arg(long, value_name = "NAME|DIR")]
    pub model: Option<String>,
    /// Folder of the drafter; only its config.json is read [default: the named model's own; none for a
    /// folder]
    #[arg(long, value_name = "DIR")]
    pub draft: Option<PathBuf>,
    #[command(flatten)]
    pub drafter: DrafterFlags,
    /// Sequences in a batch
    #[arg(long, value_name = "LIST", default_value = "1", value_parser = whole_numbers, allow_hyphen_values = true)]
    pub batch: WholeNumbers,
    /// Positions of a sequence before the round
    #[arg(long, value_name = "LIST", default_value = "1024", value_parser = whole_numbers, allow_hyphen_values = true)]
    pub context: WholeNumbers,
    /// Rows of a block: the anchor and N - 1 drafts [default: the drafter's block length]
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub block: Option<usize>,
    /// Synthetic acceptance lengths (tokens per round) to print tokens per second for [default: those of
    /// 2,4,6,8 that the block allows; none on the software GPU]
    #[arg(long, value_name = "LIST", value_parser = numbers, allow_hyphen_values = true, conflicts_with = "curve")]
    pub acceptance: Option<Numbers>,
    /// Instead, probabilities that the first draft is accepted, the second if the first is, and so on: a
    /// synthetic acceptance length of 1 + P1 + P1 P2 + ... tokens per round
    #[arg(long, value_name = "P1,P2,...", value_parser = numbers, allow_hyphen_values = true)]
    pub curve: Option<Numbers>,
    /// 0: greedy rounds. Above: rounds that sample
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    #[arg(value_parser = number::<f32>, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Rounds of samples, after a warm-up round
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = sample_count, allow_negative_numbers = true)]
    pub rounds: usize,
    /// Samples of each row in a round [default: 20; 5 on the CPU]
    #[arg(long, value_name = "N", value_parser = sample_count, allow_negative_numbers = true)]
    pub samples: Option<usize>,
    /// Then run N rounds launch by launch between cuProfilerStart and cuProfilerStop, with NVTX ranges for
    /// the round, its parts and their layers
    #[arg(long, value_name = "N", value_parser = sample_count, allow_negative_numbers = true)]
    pub profile: Option<usize>,
    /// Device. auto: a GPU if there is one, else the CPU
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    pub device: Choice,
    /// Number of the GPU in the driver's order [default: 0]
    #[arg(long, value_name = "N", value_parser = whole::<u32>, allow_negative_numbers = true)]
    pub gpu: Option<u32>,
    /// Threads of the CPU [default: RAYON_NUM_THREADS, or one for each core that the process may use]
    #[arg(long, value_name = "N", value_parser = device::threads, allow_negative_numbers = true)]
    pub threads: Option<usize>,
}

#[derive(Flags)]
pub struct Generate {
    /// Prompts, one JSON object per line: {"prompt": TEXT}, a conversation, {"messages": [{"role": "user",
    /// "content": TEXT}, ...]}, or token ids, {"prompt_tokens": [...]}. Prompts with a "category" (a text) get
    /// rows for it. -: from stdin [default: 8 built-in prompts]
    #[arg(long, value_name = "FILE.jsonl")]
    pub prompts: Option<PathBuf>,
    /// The field of a --prompts line that holds its prompt, for data sets
    #[arg(long, value_name = "KEY", requires = "prompts")]
    pub prompt_key: Option<String>,
    /// Only the first N prompts [default: all]
    #[arg(long, value_name = "N", value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub count: Option<usize>,
    /// Answers to every prompt with AR decoding and with DFlash [default: 3; 1 on the software GPU]
    #[arg(long, value_name = "R", value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub repeat: Option<usize>,

    /// Hugging Face folder of the target, or its name on the hub if the local cache has it [default: the
    /// built-in demo target]
    #[arg(long, value_name = "DIR|NAME", help_heading = "Models")]
    pub target: Option<PathBuf>,
    /// Hugging Face folder or name of its DFlash drafter; "lookup" or "suffix" to draft what followed the last
    /// tokens earlier in the text; or "none" to measure AR decoding alone. Given several times: each with the
    /// same prompts, one after the other [default: the built-in demo drafter; with --target: none]
    #[arg(long, value_name = "DIR|NAME|lookup|suffix|none", help_heading = "Models")]
    pub draft: Vec<PathBuf>,
    #[command(flatten)]
    pub drafter: DrafterFlags,
    /// Device
    #[arg(long, value_enum, default_value_t = Choice::Auto, help_heading = "Models")]
    pub device: Choice,
    /// Number of the GPU in the driver's order [default: 0]
    #[arg(long, value_name = "N", help_heading = "Models")]
    #[arg(value_parser = whole::<u32>, allow_negative_numbers = true)]
    pub gpu: Option<u32>,
    /// Threads of the CPU [default: RAYON_NUM_THREADS, or one for each core that the process may use]
    #[arg(long, value_name = "N", value_parser = device::threads, allow_negative_numbers = true, help_heading = "Models")]
    pub threads: Option<usize>,
    /// Positions of a sequence, prompt and answer together [default: 8192 or what the longest prompt needs on
    /// a device; at most the model's]
    #[arg(long, value_name = "N", help_heading = "Models")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub ctx: Option<usize>,
    /// Prompts that run in one batch
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Models")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub batch: usize,

    /// Maximum number of tokens to generate
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128, help_heading = "Generation")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub max_tokens: usize,
    /// 0 is greedy: always the best token, whatever --top-k, --top-p, --min-p and --seed are
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "Generation")]
    #[arg(value_parser = number::<f32>, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Sample among the K best tokens. 0: all tokens
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Generation")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub top_k: usize,
    /// Sample among the smallest set of best tokens with at least this probability in all
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Generation")]
    #[arg(value_parser = number::<f64>, allow_negative_numbers = true)]
    pub top_p: f64,
    /// Sample among tokens with at least this fraction of the best token's probability
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "Generation")]
    #[arg(value_parser = number::<f64>, allow_negative_numbers = true)]
    pub min_p: f64,
    /// Seed of the sampling. With --verify match the text depends on it, but not on the drafter or the block
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Generation")]
    #[arg(value_parser = whole::<u64>, allow_negative_numbers = true)]
    pub seed: u64,
    #[command(flatten)]
    pub stops: StopFlags,
    /// Say on stderr which token ids end an answer, and which files and flags name each of them
    #[arg(short, long, help_heading = "Output")]
    pub verbose: bool,
    /// Rows of a block: the anchor and N - 1 drafts [default: the drafter's block length]
    #[arg(long, value_name = "N", help_heading = "Generation")]
    #[arg(value_parser = whole::<usize>, allow_negative_numbers = true)]
    pub block: Option<usize>,
    #[command(flatten)]
    pub drafts: SpecFlags,
}

#[derive(Flags)]
pub struct Compare {
    /// The earlier record
    #[arg(value_name = "A.json")]
    pub before: PathBuf,
    /// The later record
    #[arg(value_name = "B.json")]
    pub after: PathBuf,
    /// Ratios closer to 1 than this are SAME
    #[arg(long, value_name = "P%", default_value = "1%", value_parser = percent, allow_negative_numbers = true)]
    pub threshold: f64,
    /// Compare records of different work, too
    #[arg(long)]
    pub force: bool,
}

#[derive(Flags)]
pub struct Show {
    /// Records that --json printed. --json prints each on a line; --csv takes one record
    #[arg(value_name = "RECORD.json", required = true)]
    pub records: Vec<PathBuf>,
}

impl Args {
    /// The format of stdout.
    pub fn format(&self) -> Format {
        match (self.json, self.csv, self.markdown) {
            (true, ..) => Format::Json,
            (_, true, _) => Format::Csv,
            (.., true) => Format::Markdown,
            _ => Format::Table,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use dflash::cli::terminal;

    /// Every flag that takes a number says what it expects, as do those of dflash-gen.
    #[test]
    fn wrong_numbers_are_named_with_what_is_expected() {
        let texts = [
            "DIR",
            "NAME",
            "DIR|NAME",
            "DIR|NAME|lookup|suffix|none",
            "NAME|DIR",
            "NAME,..",
            "FILE.html",
            "FILE.jsonl",
            "KEY",
        ];
        let mut flags = 0;
        for subcommand in Args::command().get_subcommands() {
            for flag in subcommand.get_arguments().filter(|flag| flag.get_action().takes_values()) {
                let Some(long) = flag.get_long() else { continue };
                let value =
                    flag.get_value_names().unwrap_or_default().first().map_or("", |name| name.as_str());
                if texts.contains(&value) {
                    continue;
                }
                flags += 1;
                let given = format!("--{long}=1.x");
                let error =
                    Args::try_parse_from(["dflash-bench", subcommand.get_name(), &given]).err().unwrap();
                let sentence = terminal::sentence(&error);
                let text = sentence.to_string();
                let at = format!("{} {given}: {text}", subcommand.get_name());
                assert_eq!(sentence.exit_code(), 2, "{at}");
                assert!(text.starts_with("invalid value '1.x' for '--"), "{at}");
                assert!(["expected", "possible values"].iter().any(|word| text.contains(word)), "{at}");
                assert!(!text.contains("invalid digit") && !text.contains("invalid float"), "{at}");
            }
        }
        assert!(flags > 40, "{flags}");
    }
}
