//! `kernels`: every kernel of a round and of a prompt's chunk at a model's shapes, held against a plain computation,
//! then timed, or on the emulator counted.

mod attention;
mod drawn;
mod linear;
mod round;
mod rules;
#[cfg(test)]
pub mod tests;
mod trees;
mod values;

use crate::machine::Instruments;
use crate::record::{Better, Record, Row};
use crate::sampling::{Cost, Times, cost};
use crate::{args, model, record};
use dflash::checkpoint::pair::Pair;
use dflash::cli::device::{Choice, DeviceHandle};
use dflash::cli::terminal;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::device::{Device, Graph};
use dflash::gpu::kernels::attention::MOST_SLOTS;
use dflash::gpu::kernels::linear::Prompt;
use dflash::gpu::kernels::read::Read;
use dflash::gpu::memory::MemoryPlan;
use dflash::perf::roofline::Card;
use dflash::perf::statistics::quantile;
use dflash::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::io::IsTerminal;
use values::{BenchFixtures, words_of};

/// Rows of a prompt's chunk, as rounds cut it.
const PROMPT: usize = 512;
/// The most rows, which as AR steps are as many sequences.
const MOST_ROWS: usize = 1024;
/// The most rows of a sequence.
const MOST_BLOCK: usize = 64;
/// Launches that a sample has at least, and how many times as many at most for it to last.
const LAUNCHES: usize = 16;
const MOST_TIMES: usize = 32;
/// Milliseconds that a sample lasts, or about: what a graph's start takes of them is about a hundredth.
const SAMPLE_MS: f64 = 1.0;
/// Of [`Bench::ceiling`]: on a GPU so many that what its cache keeps of them from launch to launch is about
/// a hundredth; on the emulator enough for some blocks.
const CEILING: [usize; 2] = [4 << 30, 1 << 20];
const CEILING_NAME: &str = "read ceiling";

/// A kernel at one shape.
pub struct Case {
    pub name: String,
    pub parameters: Value,
    /// What a launch must move.
    pub bytes: u64,
    /// Two for each product that is added.
    pub flops: f64,
    pub make: Make,
}

type Make = Box<dyn for<'d> Fn(&BenchFixtures<'d>) -> Result<Ready<'d>>>;

/// A kernel with all it needs.
pub struct Ready<'d> {
    /// Copies of its weights, or of keys and values.
    copies: usize,
    /// With one of the copies.
    launch: Box<dyn Fn(usize) -> Result<()> + 'd>,
    /// Before the launches of a sample.
    prepare: Box<dyn Fn() -> Result<()> + 'd>,
    /// Whether the results of the first launch are right.
    check: Box<dyn Fn() -> Result<()> + 'd>,
}

impl<'d> Ready<'d> {
    fn new(
        copies: usize,
        launch: impl Fn(usize) -> Result<()> + 'd,
        check: impl Fn() -> Result<()> + 'd,
    ) -> Ready<'d> {
        Ready { copies, launch: Box::new(launch), prepare: Box::new(|| Ok(())), check: Box::new(check) }
    }
}

/// (sequences, rows of each) that `rows` rows are as blocks: as few sequences as the drafter's block allows.
fn blocks(pair: &Pair, rows: usize) -> (usize, usize) {
    let most = pair.drafter.as_ref().map_or(1, |drafter| drafter.config.block.min(MOST_BLOCK));
    let batch = (1..=rows).find(|batch| rows.is_multiple_of(*batch) && rows / batch <= most);
    batch.map_or((rows, 1), |batch| (batch, rows / batch))
}

/// As blocks, and as AR steps, where these are not the same.
fn groups(pair: &Pair, rows: usize) -> Vec<(usize, usize)> {
    let (blocks, plain) = (blocks(pair, rows), (rows, 1));
    if blocks == plain { vec![plain] } else { vec![blocks, plain] }
}

/// The title of a table, and the record; and, where there was too little memory for some kernels, which and why.
pub fn run(flags: &args::Kernels) -> Result<((String, Record), Result<()>)> {
    if flags.gpu.is_some() && flags.device == Choice::Emulator {
        return Err(Error::Usage("--gpu needs --device cuda or auto".into()));
    }
    // A wrong model is found before a device is opened, which takes its time.
    let named = flags.model.as_ref().map(|name| pair(flags, name)).transpose()?;
    let place = DeviceHandle::of_kernels(flags.device, flags.gpu.unwrap_or(0))?;
    let desk = BenchFixtures::new(&*place.device);
    let pair = match named {
        Some(pair) => pair,
        None => pair(flags, if desk.counts() { "demo" } else { "qwen3-8b" })?,
    };
    let cases = chosen(flags, &pair, &*place.device)?;
    let instruments = Instruments::open(&place);
    place.device.tally_conflicts(true);
    let card = Card::of_driver(&place.device.properties().name);
    let ceiling = CEILING[usize::from(desk.counts())];
    let (rounds, samples) = (flags.rounds, flags.samples);
    let bench = Bench { desk, instruments, card, rounds, samples, ceiling, sample_ms: SAMPLE_MS };
    let (rows, end) = bench.rows(&cases)?;

    let model = record::Model {
        target: Some(pair.target.folder.name()),
        drafter: pair.drafter.as_ref().map(|drafter| drafter.folder.name()),
    };
    let with = model.drafter.as_ref().map_or(String::new(), |name| format!(" with {name}"));
    let what = match bench.desk.counts() {
        true => "on the emulator: counters of one launch each, no times".to_string(),
        false => {
            let card = &place.device.properties().name;
            format!("on {card}: time of a launch, weights, keys and values not in the cache")
        }
    };
    let title = format!("{}{with} {what}", pair.target.folder.name());
    let mut machine = bench.instruments.machine(&place);
    machine.gigabytes_per_s = card.map(|card| card.bandwidth);
    machine.tflops = card.map(|card| card.tflops);
    let mut record = Record::new("kernels", machine, model);
    record.rows = rows;
    Ok(((title, record), end))
}

fn pair(flags: &args::Kernels, name: &str) -> Result<Pair> {
    let pair = model::pair(name, flags.draft.clone())?;
    // Which shapes the kernels have, the plan knows.
    MemoryPlan::new(&pair, BatchConfig::new(1, 1, 1))?;
    let wrong = |flag: &str, found: usize, expected: String| {
        Err(Error::Usage(format!("--{flag} has {found}, expected {expected}")))
    };
    if let Some(&rows) = flags.rows.0.iter().find(|rows| !(1..=MOST_ROWS).contains(*rows)) {
        return wrong("rows", rows, format!("1 to {MOST_ROWS}"));
    }
    let most = pair.target.config.stack.max_positions.min(MOST_SLOTS - PROMPT);
    if let Some(&context) = flags.context.0.iter().find(|context| **context >= most) {
        return wrong("context", context, format!("less than {most}, the positions that there are"));
    }
    Ok(pair)
}

/// What `--only` leaves.
fn chosen(flags: &args::Kernels, pair: &Pair, device: &dyn Device) -> Result<Vec<Case>> {
    let once = |list: &args::Whole| {
        let mut once: Vec<usize> = vec![];
        list.0.iter().for_each(|n| {
            if !once.contains(n) {
                once.push(*n)
            }
        });
        once
    };
    let (rows, contexts) = (once(&flags.rows), once(&flags.context));
    let prompts: Vec<Prompt> = Prompt::ALL.into_iter().filter(|prompt| prompt.runs_on(device)).collect();
    let mut cases = linear::cases(pair, &rows, &prompts);
    cases.extend(attention::cases(pair, &rows, &contexts));
    cases.extend(round::cases(pair, &rows));
    cases.extend(trees::cases(pair, &rows));
    cases.extend(rules::cases(pair, &rows));
    cases.extend(drawn::cases(pair, &rows));
    if flags.only.is_empty() {
        return Ok(cases);
    }
    let mut names: Vec<&str> = vec![];
    cases.iter().for_each(|case| {
        if !names.contains(&case.name.as_str()) {
            names.push(&case.name)
        }
    });
    if let Some(unknown) = flags.only.iter().find(|only| !names.contains(&only.trim())) {
        return Err(Error::Usage(format!("--only has {unknown:?}, expected some of {}", names.join(", "))));
    }
    cases.retain(|case| flags.only.iter().any(|only| only.trim() == case.name));
    Ok(cases)
}

/// How all cases are measured.
struct Bench<'d> {
    desk: BenchFixtures<'d>,
    instruments: Instruments,
    card: Option<Card>,
    rounds: usize,
    samples: usize,
    /// Bytes that the ceiling is read from.
    ceiling: usize,
    sample_ms: f64,
}

impl Bench<'_> {
    /// Cases for which there is too little memory are left out, and the first of them is the second half of the answer:
    /// the others' rows are not to be lost.
    fn rows(&self, cases: &[Case]) -> Result<(Vec<Row>, Result<()>)> {
        let shown = std::io::stderr().is_terminal();
        let bar = if shown { ProgressBar::new(cases.len() as u64) } else { ProgressBar::hidden() };
        let style = ProgressStyle::with_template("{bar:40} {pos} of {len} {msg}");
        let bar = style.map(|style| bar.clone().with_style(style)).unwrap_or(bar);
        let (first, ceiling) = self.ceiling()?;
        let (mut rows, mut end) = (vec![first], Ok(()));
        for case in cases {
            bar.set_message(case.name.clone());
            match self.row(case, ceiling) {
                Ok(row) => rows.push(row),
                Err(Error::Memory(reason)) => {
                    let left_out = format!("{} {}: {reason}", case.name, case.parameters);
                    match end {
                        Ok(()) => end = Err(Error::Memory(left_out)),
                        Err(_) => bar.suspend(|| terminal::note(&format!("left out: {left_out}"))),
                    }
                }
                Err(error) => return Err(error),
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok((rows, end))
    }

    /// The row of the read ceiling, and bytes per microsecond where there are times.
    fn ceiling(&self) -> Result<(Row, Option<f64>)> {
        let (device, desk) = (self.desk.device, &self.desk);
        let bytes = self.ceiling;
        let from = desk.halves(bytes / 2, 1.0, "what the read ceiling is measured with")?;
        let out = desk.output(Read::most_blocks(bytes) * 4)?;
        let launch = |blocks: usize| Read { bytes, blocks }.launch(device, &out, &from.buffer);
        let sum = from.words(bytes / 4);
        let check = |blocks: usize| {
            launch(blocks)?;
            let found = words_of(device, &out.slice(0, blocks * 4)?)?;
            values::equal("the sum", &[found.into_iter().fold(0, u32::wrapping_add)], &[sum])
                .map_err(|e| wrong(CEILING_NAME, &json!({ "blocks": blocks }), e))
        };
        // Blocks that stay, some of them per multiprocessor, or one for each part: cards differ in what they like.
        let multiprocessors = device.properties().multiprocessors as usize;
        let stay = [2, 4, 5, 8].map(|each| (each * multiprocessors).min(Read::most_blocks(bytes)));
        let mut best: Option<(f64, usize)> = None;
        for blocks in stay.into_iter().chain([Read::most_blocks(bytes)]) {
            check(blocks)?;
            let Cost::Times(times) = self.cost(1, self.samples, &mut || Ok(()), &mut || launch(blocks))?
            else {
                break;
            };
            let median = quantile(&times.samples, 0.5).unwrap_or(f64::INFINITY);
            if best.is_none_or(|(least, _)| median < least) {
                best = Some((median, blocks));
            }
        }
        let blocks = best.map_or(stay[0], |best| best.1);
        let read = Read { bytes, blocks };
        let numbers = json!({ "MB": read.bytes() as f64 / 1e6, "blocks": blocks });
        let row = match self.cost(self.rounds, self.samples, &mut || Ok(()), &mut || launch(blocks))? {
            Cost::Counts(counts) => {
                let row = Row::counts(CEILING_NAME, json!({}), &counts);
                return Ok((with(row, numbers), None));
            }
            Cost::Times(Times { samples, rounds, throttled }) => {
                let rates = samples.iter().map(|ms| read.bytes() as f64 / 1e6 / ms).collect();
                let row = Row::samples(
                    CEILING_NAME,
                    json!({}),
                    rates,
                    Some(rounds),
                    "GB/s",
                    Better::Higher,
                    numbers,
                );
                Row { throttled, ..row }
            }
        };
        let ceiling = row.median.map(|rate| rate * 1e3);
        Ok((row, ceiling))
    }

    fn cost(
        &self,
        rounds: usize,
        samples: usize,
        prepare: &mut dyn FnMut() -> Result<()>,
        run: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Cost> {
        cost(self.desk.device, &self.instruments, rounds, samples, prepare, run)
    }

    /// Checks a case and measures it. `ceiling`: bytes per microsecond.
    fn row(&self, case: &Case, ceiling: Option<f64>) -> Result<Row> {
        let device = self.desk.device;
        let Case { name, parameters, bytes, flops, make } = case;
        let ready = make(&self.desk)?;
        (ready.prepare)()?;
        (ready.launch)(0)?;
        (ready.check)().map_err(|e| wrong(name, parameters, e))?;

        let (graph, launches) = self.sample(&ready)?;
        let cost =
            self.cost(self.rounds, self.samples, &mut || (ready.prepare)(), &mut || device.replay(&graph))?;
        let (bytes, gigaflop) = (*bytes as f64, flops / 1e9);
        let numbers = json!({ "MB": bytes / 1e6, "GFLOP": gigaflop });
        Ok(match (cost, ceiling) {
            (Cost::Counts(counts), _) => with(Row::counts(name, parameters.clone(), &counts), numbers),
            (Cost::Times(times), ceiling) => {
                let row =
                    Row::times(name, parameters.clone(), &times, ("us", 1e3 / launches as f64), json!({}));
                // GFLOP in ms at TFLOP/s.
                let products = self.card.map_or(0.0, |card| gigaflop / card.tflops * 1e3);
                let floor = ceiling.map(|ceiling| (bytes / ceiling).max(products));
                let rate = row.median.map(|us| bytes / us);
                // What the cache holds is not held against memory.
                let cold = ceiling.filter(|_| ready.copies > 1);
                let share = rate.zip(cold).map(|(rate, ceiling)| rate / ceiling);
                let row =
                    with(row, json!({ "GB/s": rate.map(|rate| rate / 1e3), "share of ceiling": share }));
                with(with(row, json!({ "floor us": floor })), numbers)
            }
        })
    }

    /// The launches of a sample: each copy as often as the others.
    fn sample(&self, ready: &Ready) -> Result<(Graph, usize)> {
        let device = self.desk.device;
        let capture = |launches: usize| {
            let graph = device.capture(&mut || {
                (0..launches).try_for_each(|launch| (ready.launch)(launch % ready.copies))
            })?;
            Ok::<_, Error>((graph, launches))
        };
        if self.desk.counts() {
            return capture(1);
        }
        let launches = LAUNCHES.next_multiple_of(ready.copies);
        let (graph, _) = capture(launches)?;
        let mut ms = f64::INFINITY;
        // The first time may have to load things.
        for _ in 0..2 {
            let from = device.record()?;
            device.replay(&graph)?;
            ms = f64::from(device.elapsed(&from, &device.record()?)?);
        }
        match ((self.sample_ms / ms).ceil() as usize).clamp(1, MOST_TIMES) {
            1 => Ok((graph, launches)),
            times => capture(launches * times),
        }
    }
}

fn with(mut row: Row, numbers: Value) -> Row {
    if let Value::Object(numbers) = numbers {
        row.numbers.extend(numbers);
    }
    row
}

/// A kernel whose results are not what they should be: no time of it means anything.
fn wrong(name: &str, parameters: &Value, error: Error) -> Error {
    match error {
        Error::Internal(what) => {
            Error::Internal(format!("kernel check: {name} {parameters}: {what}; nothing is timed"))
        }
        other => other,
    }
}
