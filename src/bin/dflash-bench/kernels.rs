//! `kernels`: every kernel of a round and of a prompt's chunk at a model's shapes. Each is compared with a
//! direct computation on the host, then timed, or counted on the software GPU.

mod attention;
mod linear;
mod rejection;
mod round;
mod sampled_trees;
#[cfg(test)]
pub mod tests;
mod trees;
mod values;

use crate::format::distinct;
use crate::machine::{Instruments, Settled, settle};
use crate::measure::{Cost, Times, cost};
use crate::record::{Better, Model, Record, Row};
use crate::{args, model};
use dflash::checkpoint::pair::Pair;
use dflash::cli::device::DeviceHandle;
use dflash::cli::{interrupt, terminal};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::device::Graph;
use dflash::gpu::kernels::attention::MAX_SLOTS;
use dflash::gpu::kernels::linear::PrefillKernel;
use dflash::gpu::kernels::read::Read;
use dflash::gpu::memory::MemoryPlan;
use dflash::perf::roofline::Card;
use dflash::perf::statistics::quantile;
use dflash::{Error, Result};
use serde_json::{Value, json};
use values::{BenchFixtures, words_of};

/// Rows of a chunk of a prompt, as the engine divides it.
const PROMPT: usize = 512;
/// Largest number of rows; as AR steps they are that many sequences.
const MAX_ROWS: usize = 1024;
/// Largest number of rows per sequence.
const MAX_BLOCK: usize = 64;
/// Smallest number of launches in a sample.
const LAUNCHES: usize = 16;
/// Largest factor on that number to make a sample last [`SAMPLE_MS`].
const MAX_REPEATS: usize = 32;
/// Milliseconds that a sample should last, so that the start of its graph is about a hundredth of it.
const SAMPLE_MS: f64 = 1.0;
/// [`Bench::ceiling`] on a GPU, where the cache keeps about a hundredth of the bytes from launch to launch,
/// and on the software GPU, where it is enough for some blocks.
const CEILING: [usize; 2] = [4 << 30, 1 << 20];
const CEILING_NAME: &str = "read ceiling";

/// A kernel at one shape.
pub struct Case {
    pub name: String,
    pub parameters: Value,
    /// Bytes that a launch must move.
    pub bytes: u64,
    /// Floating-point operations: two per multiply-add.
    pub flops: f64,
    pub make: Make,
}

type Make = Box<dyn for<'d> Fn(&BenchFixtures<'d>) -> Result<Ready<'d>>>;

/// A kernel with its inputs on the device.
pub struct Ready<'d> {
    /// Number of copies of its weights, or of keys and values.
    copies: usize,
    /// Launches the kernel on one of the copies.
    launch: Box<dyn Fn(usize) -> Result<()> + 'd>,
    /// Runs before the launches of a sample.
    prepare: Box<dyn Fn() -> Result<()> + 'd>,
    /// Checks the results of the first launch.
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

/// Divides `rows` rows into blocks, as (sequences, rows of each): as few sequences as the drafter's block
/// allows.
fn blocks(pair: &Pair, rows: usize) -> (usize, usize) {
    let limit = pair.drafter().map_or(1, |drafter| drafter.config.block.min(MAX_BLOCK));
    let batch = (1..=rows).find(|batch| rows.is_multiple_of(*batch) && rows / batch <= limit);
    batch.map_or((rows, 1), |batch| (batch, rows / batch))
}

/// `rows` rows as blocks and, if that differs, as AR steps.
fn groups(pair: &Pair, rows: usize) -> Vec<(usize, usize)> {
    let (blocks, ar_steps) = (blocks(pair, rows), (rows, 1));
    if blocks == ar_steps { vec![ar_steps] } else { vec![blocks, ar_steps] }
}

/// Returns the title of a table and the record. The second half is an error if some kernels were left out for
/// lack of memory.
pub fn run(flags: &args::Kernels) -> Result<((String, Record), Result<()>)> {
    // Opening a device takes time: wrong flags are reported first.
    let Settled { device, software, no_gpu } = settle(flags.device, flags.gpu)?;
    let usual = if software { "demo" } else { "qwen3-8b" };
    let pair = pair(flags, flags.model.as_deref().unwrap_or(usual))?;
    chosen(flags, &pair, &PrefillKernel::ALL)?;
    let handle = DeviceHandle::for_kernels(device, flags.gpu.unwrap_or(0));
    // The CPU has no kernels: the reason is the missing GPU.
    let handle = handle.map_err(|error| no_gpu.unwrap_or(error))?;
    let fixtures = BenchFixtures::new(&*handle.device);
    let prompts = PrefillKernel::ALL.into_iter().filter(|kernel| kernel.runs_on(&*handle.device));
    let cases = chosen(flags, &pair, &prompts.collect::<Vec<_>>())?;
    interrupt::catch()?;
    let instruments = Instruments::open(&handle);
    let card = Card::of_driver(&handle.device.properties().name);
    let ceiling = CEILING[usize::from(fixtures.counts())];
    let (rounds, samples) = (flags.rounds, flags.samples);
    let bench = Bench { fixtures, instruments, card, rounds, samples, ceiling, sample_ms: SAMPLE_MS };
    let (rows, end) = bench.rows(&cases)?;

    let what = match software {
        true => "counters of one launch each, no times",
        false => "time of a launch, weights, keys and values not in the cache",
    };
    let title = format!("{} on {}: {what}", model::title(&pair), handle.device.properties().name);
    let mut machine = bench.instruments.machine(&handle);
    machine.gigabytes_per_s = card.map(|card| card.bandwidth);
    machine.tflops = card.map(|card| card.tflops);
    let mut record = Record::new("kernels", machine, Model::of(&pair));
    record.settings = model::drafter_settings(&flags.drafter);
    record.incomplete = interrupt::is_interrupted();
    record.rows = rows;
    Ok(((title, record), end))
}

fn pair(flags: &args::Kernels, name: &str) -> Result<Pair> {
    let pair = model::pair(name, flags.draft.clone(), &flags.drafter)?;
    // The plan refuses shapes that the kernels do not support.
    MemoryPlan::new(&pair, BatchConfig::new(1, 1, 1))?;
    let family = pair.target.config.family;
    if family.is_hybrid() {
        let file = pair.target.folder.described_file("config.json");
        return Err(Error::Unsupported(format!(
            "{file}: dflash-bench does not time the kernels of {family} yet"
        )));
    }
    let wrong = |flag: &str, found: usize, expected: String| {
        Err(Error::Usage(format!("--{flag} has {found}, expected {expected}")))
    };
    if let Some(&rows) = flags.rows.0.iter().find(|rows| !(1..=MAX_ROWS).contains(*rows)) {
        return wrong("rows", rows, format!("1 to {MAX_ROWS}"));
    }
    let limit = pair.target.config.stack.max_positions.min(MAX_SLOTS - PROMPT);
    if let Some(&context) = flags.context.0.iter().find(|context| **context >= limit) {
        return wrong("context", context, format!("less than {limit}, the number of positions"));
    }
    Ok(pair)
}

/// The cases that `--only` selects, or all, with these kernels for prompts.
fn chosen(flags: &args::Kernels, pair: &Pair, prompts: &[PrefillKernel]) -> Result<Vec<Case>> {
    let (rows, contexts) =
        (distinct(flags.rows.0.iter().copied()), distinct(flags.context.0.iter().copied()));
    let mut cases = linear::cases(pair, &rows, prompts);
    cases.extend(attention::cases(pair, &rows, &contexts));
    cases.extend(round::cases(pair, &rows));
    cases.extend(trees::cases(pair, &rows));
    cases.extend(rejection::cases(pair, &rows));
    cases.extend(sampled_trees::cases(pair, &rows));
    if flags.only.is_empty() {
        return Ok(cases);
    }
    let names = distinct(cases.iter().map(|case| case.name.as_str()));
    if let Some(unknown) = flags.only.iter().find(|only| !names.contains(&only.trim())) {
        return Err(Error::Usage(format!("--only has {unknown:?}, expected some of {}", names.join(", "))));
    }
    cases.retain(|case| flags.only.iter().any(|only| only.trim() == case.name));
    Ok(cases)
}

/// Measures cases.
struct Bench<'d> {
    fixtures: BenchFixtures<'d>,
    instruments: Instruments,
    card: Option<Card>,
    rounds: usize,
    samples: usize,
    /// Bytes that the read ceiling is measured with.
    ceiling: usize,
    sample_ms: f64,
}

impl Bench<'_> {
    /// Measures all cases. Those that do not fit the memory are left out, so that the rows of the others are
    /// not lost; the first of them is the error in the second half of the result.
    fn rows(&self, cases: &[Case]) -> Result<(Vec<Row>, Result<()>)> {
        let bar = terminal::progress("{bar:40} {pos} of {len} {msg}", false);
        bar.set_length(cases.len() as u64);
        let Some((first, ceiling)) = self.ceiling()? else { return Ok((vec![], Ok(()))) };
        let (mut rows, mut end) = (vec![first], Ok(()));
        for case in cases.iter().take_while(|_| !interrupt::is_interrupted()) {
            bar.set_message(case.name.clone());
            match self.row(case, ceiling) {
                Ok(row) => rows.extend(row),
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

    /// The row of the read ceiling and, if there are times, its bytes per microsecond. None: interrupted.
    fn ceiling(&self) -> Result<Option<(Row, Option<f64>)>> {
        let (device, fixtures) = (self.fixtures.device, &self.fixtures);
        let bytes = self.ceiling;
        let from = fixtures.halves(bytes / 2, 1.0, "what the read ceiling is measured with")?;
        let out = fixtures.output(Read::max_blocks(bytes) * 4)?;
        let launch = |blocks: usize| Read { bytes, blocks }.launch(device, &out, &from.buffer);
        let sum = from.words(bytes / 4);
        let check = |blocks: usize| {
            launch(blocks)?;
            let found = words_of(device, &out.slice(0, blocks * 4)?)?;
            values::equal("the sum", &[found.into_iter().fold(0, u32::wrapping_add)], &[sum])
                .map_err(|e| wrong(CEILING_NAME, &json!({ "blocks": blocks }), e))
        };
        // Some blocks per multiprocessor, each of which reads many parts, or one block per part. GPUs differ
        // in which is fastest.
        let multiprocessors = device.properties().multiprocessors as usize;
        let persistent = [2, 4, 5, 8].map(|each| (each * multiprocessors).min(Read::max_blocks(bytes)));
        let mut best: Option<(f64, usize)> = None;
        for blocks in persistent.into_iter().chain([Read::max_blocks(bytes)]) {
            check(blocks)?;
            let cost = self.cost(1, self.samples, &mut || Ok(()), &mut || launch(blocks))?;
            let Some(Cost::Times(times)) = cost else { break };
            let median = quantile(&times.samples, 0.5).unwrap_or(f64::INFINITY);
            if best.is_none_or(|(least, _)| median < least) {
                best = Some((median, blocks));
            }
        }
        let blocks = best.map_or(persistent[0], |best| best.1);
        let read = Read { bytes, blocks };
        let numbers = json!({ "MB": read.bytes() as f64 / 1e6, "blocks": blocks });
        let row = match self.cost(self.rounds, self.samples, &mut || Ok(()), &mut || launch(blocks))? {
            None => return Ok(None),
            Some(Cost::Counts(counts)) => {
                let row = Row::counts(CEILING_NAME, json!({}), &counts);
                return Ok(Some((with(row, numbers), None)));
            }
            Some(Cost::Times(Times { samples, rounds, throttled })) => {
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
        Ok(Some((row, ceiling)))
    }

    fn cost(
        &self,
        rounds: usize,
        samples: usize,
        prepare: &mut dyn FnMut() -> Result<()>,
        run: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Option<Cost>> {
        cost(self.fixtures.device, &self.instruments, rounds, samples, prepare, run)
    }

    /// Checks a case and measures it. `ceiling`: the read ceiling in bytes per microsecond. None: interrupted.
    fn row(&self, case: &Case, ceiling: Option<f64>) -> Result<Option<Row>> {
        let device = self.fixtures.device;
        let Case { name, parameters, bytes, flops, make } = case;
        let ready = make(&self.fixtures)?;
        (ready.prepare)()?;
        (ready.launch)(0)?;
        (ready.check)().map_err(|e| wrong(name, parameters, e))?;

        let (graph, launches) = self.sample(&ready)?;
        let cost =
            self.cost(self.rounds, self.samples, &mut || (ready.prepare)(), &mut || device.replay(&graph))?;
        let (bytes, gigaflop) = (*bytes as f64, flops / 1e9);
        let numbers = json!({ "MB": bytes / 1e6, "GFLOP": gigaflop });
        Ok(cost.map(|cost| match cost {
            Cost::Counts(counts) => with(Row::counts(name, parameters.clone(), &counts), numbers),
            Cost::Times(times) => {
                let row =
                    Row::times(name, parameters.clone(), &times, ("us", 1e3 / launches as f64), json!({}));
                // GFLOP / (TFLOP/s) is ms.
                let products = self.card.map_or(0.0, |card| gigaflop / card.tflops * 1e3);
                let roofline = ceiling.map(|ceiling| (bytes / ceiling).max(products));
                let rate = row.median.map(|us| bytes / us);
                // Without copies the data is in the cache, so that memory is not the limit.
                let cold = ceiling.filter(|_| ready.copies > 1);
                let share = rate.zip(cold).map(|(rate, ceiling)| rate / ceiling);
                let row =
                    with(row, json!({ "GB/s": rate.map(|rate| rate / 1e3), "share of ceiling": share }));
                with(with(row, json!({ "floor us": roofline })), numbers)
            }
        }))
    }

    /// The graph of a sample and its number of launches. All copies are used equally often.
    fn sample(&self, ready: &Ready) -> Result<(Graph, usize)> {
        let device = self.fixtures.device;
        let capture = |launches: usize| {
            let graph = device.capture(&mut || {
                (0..launches).try_for_each(|launch| (ready.launch)(launch % ready.copies))
            })?;
            Ok::<_, Error>((graph, launches))
        };
        if self.fixtures.counts() {
            return capture(1);
        }
        let launches = LAUNCHES.next_multiple_of(ready.copies);
        let (graph, _) = capture(launches)?;
        let mut ms = f64::INFINITY;
        // The first replay may include one-time costs.
        for _ in 0..2 {
            let from = device.record()?;
            device.replay(&graph)?;
            ms = f64::from(device.elapsed(&from, &device.record()?)?);
        }
        match ((self.sample_ms / ms).ceil() as usize).clamp(1, MAX_REPEATS) {
            1 => Ok((graph, launches)),
            repeats => capture(launches * repeats),
        }
    }
}

fn with(mut row: Row, numbers: Value) -> Row {
    if let Value::Object(numbers) = numbers {
        row.numbers.extend(numbers);
    }
    row
}

/// The error for a kernel with wrong results. It is not timed.
fn wrong(name: &str, parameters: &Value, error: Error) -> Error {
    match error {
        Error::Internal(what) => {
            Error::Internal(format!("kernel check: {name} {parameters}: {what}; nothing is timed"))
        }
        other => other,
    }
}
