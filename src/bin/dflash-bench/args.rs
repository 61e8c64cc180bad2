//! Flags, and the lists that some of them take.

use crate::show::Format;
use clap::{Args as Flags, Parser, Subcommand};
use dflash::cli::device::Choice;
use dflash::cli::spec_flags::SpecFlags;
use std::path::PathBuf;

const EXIT_CODES: &str = "\
LIST: numbers and ranges, with commas: 4,8  1-8  1-16+5 (1, 6, 11, 16)  512-4096*2 (512, 1024, 2048, 4096).

Exit codes: 0 done (also when the reader of stdout goes away), 1 internal failure, 2 usage,
3 model file missing or malformed, 4 unsupported, 5 out of memory, 6 answers of DFlash that are not
autoregressive decoding's, 7 a row of compare is SLOWER.";

/// Measure and predict what DFlash decoding takes.
///
/// Results go to stdout as a table, or as one record, whose form is benches/schema.json.
#[derive(Parser)]
#[command(name = "dflash-bench", version, after_help = EXIT_CODES, arg_required_else_help = false)]
#[command(verbatim_doc_comment)]
pub struct Args {
    #[command(subcommand)]
    pub command: Command,
    /// Print the record as JSON
    #[arg(long, global = true, conflicts_with_all = ["csv", "markdown"], help_heading = "Output")]
    pub json: bool,
    /// Print the rows as CSV
    #[arg(long, global = true, conflicts_with = "markdown", help_heading = "Output")]
    pub csv: bool,
    /// Print the table as Markdown
    #[arg(long, global = true, help_heading = "Output")]
    pub markdown: bool,
    /// Also write a page with figures, which replaces an older one: FILE.html
    #[arg(long, global = true, value_name = "FILE", help_heading = "Output")]
    pub report: Option<PathBuf>,
}

#[derive(Subcommand)]
pub enum Command {
    /// Measure: every kernel of a round and of a prompt at a model's shapes, against what reading memory takes
    #[command(after_help = KERNELS)]
    Kernels(Kernels),
    /// Measure a AR step and a DFlash round of drawn weights, and the round's parts
    #[command(after_help = ROUND)]
    Round(Round),
    /// Measure: answers to prompts, by autoregressive decoding and by DFlash in turn; on the emulator counters instead of times
    #[command(after_help = EXIT_CODES)]
    Generate(Generate),
    /// Predict: the least time of a step, a draft, a verification and a round, from bytes and operations alone
    #[command(after_help = EXIT_CODES)]
    Floor(Floor),
    /// Compare two records, row by row; exit code 7 if any row is SLOWER
    #[command(after_help = COMPARE)]
    Compare(Compare),
    /// Show records again; with --report all on one page
    #[command(after_help = EXIT_CODES)]
    Show(Show),
}

const ROUND: &str = "\
Weights are drawn and the context is noise, so nothing is downloaded and no prompt is run; the text means nothing.

On a GPU, in ms of its own clock: \"AR step\" and \"round\" are replays of the captured graphs, each behind a whole
round that keeps the card busy while they are enqueued. Parts of a round: graphs of its first launches are replayed in
turn with it (begin; to inject; to draft; to verify), and a part is, in each round of samples, the difference of two
medians; what a part shares with the one before it counts for the later one, and the start and the end of a graph for
the first. \"gaps\" is how much longer a round among others takes than one alone. \"round with host\" is the engine's own
loop, by the host's clock. A difference that is lost in noise has a value and no samples. Floors are of the card's
nominal bandwidth, where it is known; \"share of floor\" is the floor over the time, 1 at best.

On the emulator one run counts bytes, launches, mma and conflicts instead; --rounds and --samples say nothing there.

Synthetic acceptance is assumed, not measured: tokens per second (on the emulator, bytes per token) if every round
brought so many tokens.

LIST: numbers and ranges, with commas: 4,8  1-8  1-16+5 (1, 6, 11, 16)  512-4096*2 (512, 1024, 2048, 4096).

Exit codes: 0 done (also when the reader of stdout goes away), 1 internal failure, 2 usage,
3 model file missing or malformed, 4 unsupported, 5 out of memory.";

const KERNELS: &str = "\
First the read ceiling: a kernel that only reads. Then every kernel, whose results are held against a plain computation
before it is timed: a kernel that is wrong has no time. Weights, keys and values are drawn; they lie in as many copies,
one after the other, as keep a launch's own out of the cache. What the kernel before would have written just now is in
the cache. Of trees and of drafts drawn at random a verdict is to be as dear as verdicts are: paths that move, drafts
that fall. us: of a launch among others. GB/s: bytes that it must move by that. floor us: these bytes at the ceiling, or
its products at the card's nominal rate, where that is known and slower. On the emulator times say nothing: there
instead is what one launch does, bytes in all as the value. Kernels for which there is too little memory are left out, and make
the exit code 5 when the others are done.

LIST: numbers and ranges, with commas: 4,8  1-8  1-16+5 (1, 6, 11, 16)  512-4096*2 (512, 1024, 2048, 4096).

Exit codes: 0 done (also when the reader of stdout goes away), 1 internal failure, also a wrong kernel,
2 usage, 3 model file missing or malformed, 4 unsupported, 5 out of memory.";

const COMPARE: &str = "\
Rows are matched by name and parameters. The ratio says how many times as good B is as A (time, bytes: A / B; rates:
B / A), from the medians, with its 99 % interval: a bootstrap of the samples, of whole rounds of them where a row has
rounds. FASTER or SLOWER: the ratio is beyond the threshold, and the interval on that side of 1. SAME: all of the
interval is within the threshold. UNCLEAR: neither, or fewer than 5 samples or rounds on a side. What is counted or
predicted is exact: the threshold alone decides. Rows that one record alone has are listed.

Exit codes: 0 no row is SLOWER, 7 one is, 2 wrong flags or records, 1 internal failure.";

#[derive(Flags)]
pub struct Kernels {
    /// qwen3-4b, qwen3-8b, llama-3.1-8b, demo, or a target's folder, of which only config.json is read [default:
    /// qwen3-8b on a GPU, demo on the emulator]
    #[arg(long, value_name = "NAME|DIR")]
    pub model: Option<String>,
    /// Folder of the drafter, of which only config.json is read [default: of a name: its own; of a folder: none]
    #[arg(long, value_name = "DIR")]
    pub draft: Option<PathBuf>,
    /// Rows of a launch, of all sequences together: in blocks, as few as the drafter's allows, as AR steps, and in
    /// trees of up to 64
    #[arg(long, value_name = "LIST", default_value = "1,8,16,32,64,128", value_parser = wholes)]
    #[arg(allow_hyphen_values = true)]
    pub rows: Whole,
    /// Positions that a sequence has before its rows
    #[arg(long, value_name = "LIST", default_value = "1024", value_parser = wholes, allow_hyphen_values = true)]
    pub context: Whole,
    /// Kernels of these names alone, with commas; what names there are is said where one is unknown
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Rounds of samples that count, on a GPU; one goes before them
    #[arg(long, value_name = "N", default_value = "5", value_parser = count, allow_negative_numbers = true)]
    pub rounds: usize,
    /// Samples in a round, on a GPU; each is the time of at least 16 launches
    #[arg(long, value_name = "N", default_value = "10", value_parser = count, allow_negative_numbers = true)]
    pub samples: usize,
    /// cuda, emulator (counters instead of times), or auto: a GPU if there is one, else the emulator
    #[arg(long, value_name = "DEVICE", default_value = "auto", hide_possible_values = true)]
    pub device: Choice,
    /// Number of the GPU, as the driver counts [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub gpu: Option<u32>,
}

#[derive(Flags)]
pub struct Floor {
    /// qwen3-4b, qwen3-8b, llama-3.1-8b, demo, or a target's folder, of which only config.json is read
    #[arg(long, value_name = "NAME|DIR", default_value = "qwen3-8b")]
    pub model: String,
    /// Folder of the drafter, of which only config.json is read [default: of a name: its own; of a folder: none]
    #[arg(long, value_name = "DIR")]
    pub draft: Option<PathBuf>,
    /// Card, with its vendor's figures: H200, H100-SXM, H100-PCIe, GH200, B200, A100-80GB, A100-40GB, L40S, L4,
    /// RTX-5090, RTX-4090, RTX-3090 [default: H200]
    #[arg(long, value_name = "NAME", conflicts_with_all = ["bandwidth", "flops"])]
    pub card: Option<String>,
    /// Instead of a card: GB/s of its memory
    #[arg(long, value_name = "GB/s", requires = "flops", value_parser = above_zero, allow_negative_numbers = true)]
    pub bandwidth: Option<f64>,
    /// And dense bf16 TFLOP/s of its tensor cores
    #[arg(long, value_name = "TFLOP/s", requires = "bandwidth", value_parser = above_zero)]
    #[arg(allow_negative_numbers = true)]
    pub flops: Option<f64>,
    /// Positions that a sequence has when the pass begins
    #[arg(long, value_name = "LIST", default_value = "1024", value_parser = wholes, allow_hyphen_values = true)]
    pub context: Whole,
    /// Sequences that run together
    #[arg(long, value_name = "LIST", default_value = "1", value_parser = wholes, allow_hyphen_values = true)]
    pub batch: Whole,
    /// Rows that a verification has for a sequence: a block, or the nodes of a tree [default: the drafter's block]
    #[arg(long, value_name = "LIST", value_parser = wholes, allow_hyphen_values = true)]
    pub tree: Option<Whole>,
    /// Acceptance lengths, tokens per round, to tell tokens per second for: assumed, not measured [default: 2,4,6,8, as
    /// far as rows allow]
    #[arg(long, value_name = "LIST", value_parser = numbers, allow_hyphen_values = true)]
    pub acceptance: Option<Numbers>,
    /// How probably the first draft of a chain stands, the second if the first does, and so on: how many drafts cost the
    /// least a token, for one sequence, and tokens per second with them
    #[arg(long, value_name = "P1,P2,...", value_parser = numbers, allow_hyphen_values = true)]
    pub curve: Option<Numbers>,
}

#[derive(Flags)]
pub struct Round {
    /// qwen3-4b, qwen3-8b, llama-3.1-8b, demo, or a target's folder, of which only config.json is read [default: qwen3-8b
    /// on a GPU, demo on the emulator]
    #[arg(long, value_name = "NAME|DIR")]
    pub model: Option<String>,
    /// Folder of the drafter, of which only config.json is read [default: of a name: its own; of a folder: none]
    #[arg(long, value_name = "DIR")]
    pub draft: Option<PathBuf>,
    /// Sequences that run together
    #[arg(long, value_name = "LIST", default_value = "1", value_parser = wholes, allow_hyphen_values = true)]
    pub batch: Whole,
    /// Positions that a sequence has when the round begins
    #[arg(long, value_name = "LIST", default_value = "1024", value_parser = wholes, allow_hyphen_values = true)]
    pub context: Whole,
    /// Rows of a block: 1 from the target and N - 1 drafts [default: as the drafter was trained]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub block: Option<usize>,
    /// Acceptance lengths, tokens per round, to tell tokens per second for: assumed, not measured [default: on a GPU
    /// 2,4,6,8, as far as the block allows]
    #[arg(long, value_name = "LIST", value_parser = numbers, allow_hyphen_values = true, conflicts_with = "curve")]
    pub acceptance: Option<Numbers>,
    /// Or how probably the first draft stands, the second if the first does, and so on: 1 + P1 + P1 P2 + ... tokens per
    /// round, assumed
    #[arg(long, value_name = "P1,P2,...", value_parser = numbers, allow_hyphen_values = true)]
    pub curve: Option<Numbers>,
    /// 0 is greedy; else rounds of the sampler
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,
    /// Rounds of samples, after one that does not count
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = count, allow_negative_numbers = true)]
    pub rounds: usize,
    /// Samples of each row in a round
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = count, allow_negative_numbers = true)]
    pub samples: usize,
    /// After that, N rounds launch by launch in a profiler's window (cuProfilerStart), with NVTX ranges: round, its parts,
    /// their layers
    #[arg(long, value_name = "N", value_parser = count, allow_negative_numbers = true)]
    pub profile: Option<usize>,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    pub device: Choice,
    /// Which GPU, as the driver counts them [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub gpu: Option<u32>,
}

#[derive(Flags)]
pub struct Generate {
    /// The prompts, one JSON object per line: {"prompt": TEXT}, or a conversation, {"messages": [{"role": "user",
    /// "content": TEXT}, ...]}; where it has a "category", a text, that has rows of its own
    #[arg(long, value_name = "FILE.jsonl")]
    pub prompts: PathBuf,
    /// Of these only the first N [default: all]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub count: Option<usize>,
    /// Times that every prompt is run both ways [default: 3; on the emulator 1]
    #[arg(long, value_name = "R", allow_negative_numbers = true)]
    pub repeat: Option<usize>,

    /// Hugging Face folder of the target [default: the demo pair's]
    #[arg(long, value_name = "DIR", requires = "draft", help_heading = "Models")]
    pub target: Option<PathBuf>,
    /// Hugging Face folder of its DFlash drafter [default: the demo pair's]
    #[arg(long, value_name = "DIR", requires = "target", help_heading = "Models")]
    pub draft: Option<PathBuf>,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Choice::Auto, help_heading = "Models")]
    pub device: Choice,
    /// Which GPU, as the driver counts them [default: 0]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Models")]
    pub gpu: Option<u32>,
    /// Positions that a sequence may have, prompt and answer together [default: on a device 8192, or what the longest
    /// prompt needs; at most the model's]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Models")]
    pub ctx: Option<usize>,
    /// Prompts that run together
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1,
        allow_negative_numbers = true,
        help_heading = "Models"
    )]
    pub batch: usize,

    /// Tokens to generate at most
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128, help_heading = "Generation")]
    #[arg(allow_negative_numbers = true)]
    pub max_tokens: usize,
    /// 0 is greedy: the best token every time, whatever the next four say
    #[arg(long, value_name = "T", default_value_t = 0.0, help_heading = "Generation")]
    #[arg(allow_negative_numbers = true)]
    pub temperature: f32,
    /// Sample among the K best tokens; 0: all
    #[arg(long, value_name = "K", default_value_t = 0, help_heading = "Generation")]
    #[arg(allow_negative_numbers = true)]
    pub top_k: usize,
    /// Sample among the smallest set of best tokens that has this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, help_heading = "Generation")]
    #[arg(allow_negative_numbers = true)]
    pub top_p: f64,
    /// Sample among tokens at least this fraction as likely as the best
    #[arg(long, value_name = "P", default_value_t = 0.0, help_heading = "Generation")]
    #[arg(allow_negative_numbers = true)]
    pub min_p: f64,
    /// Same seed, same text, with --verify match whatever the drafter and the block
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Generation")]
    #[arg(allow_negative_numbers = true)]
    pub seed: u64,
    /// Go on after the model's stop tokens
    #[arg(long, help_heading = "Generation")]
    pub ignore_eos: bool,
    /// Tokens per block: 1 from the target and N - 1 drafts [default: as the drafter was trained]
    #[arg(long, value_name = "N", allow_negative_numbers = true, help_heading = "Generation")]
    pub block: Option<usize>,
    #[command(flatten)]
    pub drafts: SpecFlags,
}

#[derive(Flags)]
pub struct Compare {
    /// The record before
    #[arg(value_name = "A.json")]
    pub before: PathBuf,
    /// The record after
    #[arg(value_name = "B.json")]
    pub after: PathBuf,
    /// Ratios this close to 1 do not matter
    #[arg(long, value_name = "P%", default_value = "1%", value_parser = percent, allow_negative_numbers = true)]
    pub threshold: f64,
    /// Compare records of different cards or models too
    #[arg(long)]
    pub force: bool,
}

#[derive(Flags)]
pub struct Show {
    /// Records that a subcommand printed with --json; --json prints each on a line again, --csv takes one
    #[arg(value_name = "RECORD.json", required = true)]
    pub records: Vec<PathBuf>,
}

impl Args {
    pub fn format(&self) -> Format {
        match (self.json, self.csv, self.markdown) {
            (true, ..) => Format::Json,
            (_, true, _) => Format::Csv,
            (.., true) => Format::Markdown,
            _ => Format::Table,
        }
    }
}

/// A LIST of whole numbers. A type of its own, because clap takes a `Vec` for a repeated flag.
#[derive(Clone, Debug, PartialEq)]
pub struct Whole(pub Vec<usize>);

/// A LIST of numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Numbers(pub Vec<f64>);

type Parsed<T> = std::result::Result<T, String>;

/// More than anyone wants to read.
const MOST: usize = 1000;

fn numbers(text: &str) -> Parsed<Numbers> {
    let mut all = vec![];
    for part in text.split(',') {
        range(part, &mut all)?;
    }
    Ok(Numbers(all))
}

fn wholes(text: &str) -> Parsed<Whole> {
    let Numbers(all) = numbers(text)?;
    match all.iter().find(|n| n.fract() != 0.0 || **n > 1e9) {
        Some(n) => Err(format!("{n} is not a whole number up to 1000000000")),
        None => Ok(Whole(all.into_iter().map(|n| n as usize).collect())),
    }
}

/// `N`, `FIRST-LAST`, `FIRST-LAST+STEP` or `FIRST-LAST*FACTOR`, as llama-bench reads them.
fn range(part: &str, all: &mut Vec<f64>) -> Parsed<()> {
    let number = |text: &str| {
        let plain = !text.is_empty() && text.chars().all(|c| c.is_ascii_digit() || c == '.');
        let number: Option<f64> = text.parse().ok().filter(|_| plain);
        number
            .ok_or_else(|| format!("{text:?} is not a number: expected for example 4,8 or 1-8 or 512-4096*2"))
    };
    let Some((first, rest)) = part.split_once('-') else {
        all.push(number(part)?);
        return if all.len() > MOST { Err(format!("more than {MOST} numbers")) } else { Ok(()) };
    };
    let (last, step, factor) = match (rest.split_once('+'), rest.split_once('*')) {
        (Some((last, step)), _) => (last, number(step)?, 1.0),
        (_, Some((last, factor))) => (last, 0.0, number(factor)?),
        _ => (rest, 1.0, 1.0),
    };
    let (first, last) = (number(first)?, number(last)?);
    if last < first || (factor == 1.0 && step <= 0.0) || factor < 1.0 || (factor > 1.0 && first == 0.0) {
        return Err(format!("{part:?} has no end: expected FIRST-LAST+STEP or FIRST-LAST*FACTOR, upwards"));
    }
    for i in 0.. {
        let next = if factor > 1.0 { first * factor.powi(i) } else { first + step * f64::from(i) };
        // Ends that are met but for rounding are met.
        if next > last * (1.0 + 1e-12) {
            break;
        }
        all.push(next);
        if all.len() > MOST {
            return Err(format!("more than {MOST} numbers"));
        }
    }
    Ok(())
}

/// 1 to [`MOST`].
fn count(text: &str) -> Parsed<usize> {
    let number = text.parse().ok().filter(|n| (1..=MOST).contains(n));
    number.ok_or_else(|| format!("expected a whole number from 1 to {MOST}"))
}

fn above_zero(text: &str) -> Parsed<f64> {
    let number: Option<f64> = text.parse().ok().filter(|x: &f64| x.is_finite() && *x > 0.0);
    number.ok_or_else(|| "expected a number above 0".into())
}

/// `1%` as 0.01
fn percent(text: &str) -> Parsed<f64> {
    let number: Option<f64> = text.strip_suffix('%').and_then(|text| text.parse().ok());
    let share = number.filter(|x| (0.0..100.0).contains(x)).map(|x| x / 100.0);
    share.ok_or_else(|| "expected a percentage from 0% to below 100%".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_by_llama_bench() {
        let read = |text| wholes(text).map(|list| list.0);
        assert_eq!(read("4"), Ok(vec![4]));
        assert_eq!(read("1-4,16"), Ok(vec![1, 2, 3, 4, 16]));
        assert_eq!(read("1-16+5"), Ok(vec![1, 6, 11, 16]));
        assert_eq!(read("1-15+5"), Ok(vec![1, 6, 11]));
        assert_eq!(read("0-2"), Ok(vec![0, 1, 2]));
        assert_eq!(read("512-32768*2"), Ok(vec![512, 1024, 2048, 4096, 8192, 16384, 32768]));
        assert_eq!(read("5-100*3,7-7"), Ok(vec![5, 15, 45, 7]));
        assert_eq!(numbers("1.5,2-3+0.25"), Ok(Numbers(vec![1.5, 2.0, 2.25, 2.5, 2.75, 3.0])));
        // Steps that are no sums of powers of two still meet their end.
        assert_eq!(numbers("0-0.3+0.1").unwrap().0.len(), 4);
        for wrong in [
            "",
            "1,",
            "x",
            "-4",
            "1-",
            "4-1",
            "1-4+0",
            "1-8*1",
            "1-8*0",
            "0-8*2",
            "1e3",
            "1.5",
            "1-9-2",
            "1-2+3*4",
            "inf",
            "NaN",
            "1-2000",
            "9999999999",
        ] {
            assert!(read(wrong).is_err(), "{wrong:?}: {:?}", read(wrong));
        }
    }

    #[test]
    fn percentages_need_their_sign() {
        assert_eq!(percent("1%"), Ok(0.01));
        assert_eq!(percent("0%"), Ok(0.0));
        assert!(["1", "-1%", "100%", "%", "NaN%"].iter().all(|text| percent(text).is_err()));
    }
}
