//! `round`: a AR step and a DFlash round at the shapes of a pair with drawn weights, and where the round's time goes.
//! One load of the weights for all batches and contexts.

use crate::args::{self, Numbers};
use crate::floor::whole_or_not;
use crate::machine::Instruments;
use crate::model;
use crate::record::{self, Better, Kind, Record, Row};
use crate::sampling::{Times, together};
use dflash::checkpoint::pair::Pair;
use dflash::cli::device::{Choice, DeviceHandle};
use dflash::cli::terminal;
use dflash::engine::generate::{Decoder, Emitted, Request};
use dflash::gpu::decoder::{Batch, Models};
use dflash::gpu::device::{Counts, Device, Graph, Node};
use dflash::gpu::graph_listing::{outline, units};
use dflash::gpu::kernels::attention::MOST_SLOTS;
use dflash::gpu::memory::{BatchConfig, MemoryPlan, size};
use dflash::gpu::nvtx::{range, window};
use dflash::perf::roofline::{Card, Pass, draft_pass, fc_bytes, target_pass};
use dflash::perf::statistics::quantile;
use dflash::spec::sampling::SamplingParams;
use dflash::{Error, Result};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value, json};
use std::io::IsTerminal;
use std::time::Instant;

/// Rounds of the engine's loop before those that count, and those, in each round of samples.
const LEAD: usize = 3;
const LOOP: usize = 10;
/// Rounds that any sequence runs at most before it begins again; the engine is up to two ahead of its results.
const MOST_ROUNDS: usize = LEAD + LOOP + 3;
/// Rounds that are enqueued together for the gaps between them.
const TOGETHER: usize = 4;

const PLAIN: &str = "autoregressive decoding";
const SYNTHETIC: &str = "DFlash, synthetic acceptance";

/// One place of the grid, on a device.
struct Point<'a> {
    device: &'a dyn Device,
    pair: &'a Pair,
    card: Option<Card>,
    context: usize,
    batch: usize,
    /// 1 without a drafter.
    block: usize,
    sampling: SamplingParams,
    /// Tokens per round that are assumed.
    acceptance: &'a [f64],
}

/// The title of a table, and the record.
pub fn run(flags: &args::Round) -> Result<(String, Record)> {
    let sampling = SamplingParams {
        temperature: flags.temperature,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        seed: 1,
        stream: 0,
    };
    sampling.check().map_err(dflash::cli::spec_flags::name_flag)?;
    if flags.gpu.is_some() && matches!(flags.device, Choice::Cpu | Choice::Emulator) {
        return Err(Error::Usage("--gpu needs --device cuda or auto".into()));
    }
    let place = DeviceHandle::of_kernels(flags.device, flags.gpu.unwrap_or(0))?;
    let device = &*place.device;
    let counting = device.tally().is_some();
    let name = flags.model.as_deref().unwrap_or(if counting { "demo" } else { "qwen3-8b" });
    let pair = model::pair(name, flags.draft.clone())?;
    let block = block(flags, &pair)?;
    check(flags, &pair, block)?;
    let acceptance = acceptance(flags, block, counting)?;
    let positions = largest(&flags.context.0) + spare(block);
    fits(&pair, &place, BatchConfig::new(largest(&flags.batch.0), block, positions))?;

    // As `kernels` counts them.
    device.tally_conflicts(true);
    let instruments = Instruments::open(&place);
    let bar = bar("weights {bar:40} {bytes} of {total_bytes}, {bytes_per_sec}");
    let models = Models::load_with(device, &pair, positions, &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
    });
    bar.finish_and_clear();
    let models = models?;
    let mut rows = vec![];
    let card = Card::of_driver(&device.properties().name).filter(|_| !counting);
    let bar = self::bar("{pos} of {len} measured: {msg}");
    bar.set_length((flags.context.0.len() * flags.batch.0.len()) as u64);
    for &context in &flags.context.0 {
        for &batch in &flags.batch.0 {
            bar.set_message(format!("now context {context}, batch {batch}"));
            let (sampling, acceptance) = (sampling.clone(), acceptance.as_slice());
            let point = Point { device, pair: &pair, card, context, batch, block, sampling, acceptance };
            match counting {
                true => point.count(&models, &mut rows)?,
                false => point.measure(&models, &instruments, flags.rounds, flags.samples, &mut rows)?,
            }
            if let Some(rounds) = flags.profile {
                point.profile(&models, rounds)?;
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();

    let model = record::Model {
        target: Some(pair.target.folder.name()),
        drafter: pair.drafter.as_ref().map(|drafter| drafter.folder.name()),
    };
    let with = model.drafter.as_ref().map_or(String::new(), |name| format!(" with {name}"));
    let (place_name, what) = match counting {
        true => ("the emulator", "counters, not times"),
        false => (device.properties().name.as_str(), "measured"),
    };
    let title = format!(
        "{}{with}, drawn weights, on {place_name}: {what}; synthetic acceptance is assumed, not measured",
        pair.target.folder.name()
    );
    let mut machine = instruments.machine(&place);
    machine.gigabytes_per_s = card.map(|card| card.bandwidth);
    machine.tflops = card.map(|card| card.tflops);
    let mut record = Record::new("round", machine, model);
    record.rows = rows;
    Ok((title, record))
}

fn largest(list: &[usize]) -> usize {
    list.iter().copied().max().unwrap_or(0)
}

/// Positions beyond the context.
fn spare(block: usize) -> usize {
    (MOST_ROUNDS + 1) * block
}

/// On a terminal only.
fn bar(template: &str) -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let style = ProgressStyle::with_template(template);
    style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
}

fn block(flags: &args::Round, pair: &Pair) -> Result<usize> {
    let Some(drafter) = &pair.drafter else {
        let given = flags.block.is_some() || flags.acceptance.is_some() || flags.curve.is_some();
        return match given {
            true => Err(Error::Usage("--block, --acceptance and --curve need a drafter: --draft DIR".into())),
            false => Ok(1),
        };
    };
    let trained = drafter.config.block;
    match flags.block {
        Some(n) if !(2..=trained).contains(&n) => {
            let name = drafter.folder.name();
            Err(Error::Usage(format!(
                "--block is {n}, expected 2 to {trained}, the block that {name} was trained with"
            )))
        }
        block => Ok(block.unwrap_or(trained)),
    }
}

fn check(flags: &args::Round, pair: &Pair, block: usize) -> Result<()> {
    let target = pair.target.config.stack.max_positions.min(MOST_SLOTS);
    let positions = pair.drafter.as_ref().map_or(target, |d| target.min(d.config.stack.max_positions));
    let taken = spare(block);
    let Some(most) = positions.checked_sub(taken) else {
        return Err(Error::Unsupported(format!(
            "the models have {positions} positions, fewer than the {taken} of rounds in blocks of {block}"
        )));
    };
    for (flag, list, range, why) in [
        ("batch", &flags.batch.0, 1..=1024, String::new()),
        ("context", &flags.context.0, 0..=most, format!(": {positions} positions, less {taken} for rounds")),
    ] {
        if let Some(found) = list.iter().find(|n| !range.contains(n)) {
            let (low, high) = range.into_inner();
            return Err(Error::Usage(format!("--{flag} has {found}, expected {low} to {high}{why}")));
        }
        twice(flag, list)?;
    }
    match flags.batch.0.len() * flags.context.0.len() {
        places @ 2.. if flags.profile.is_some() => {
            Err(Error::Usage(format!("--profile needs one batch and one context, found {places} together")))
        }
        _ => Ok(()),
    }
}

/// Rows of a record differ.
fn twice<T: PartialEq + std::fmt::Display>(flag: &str, list: &[T]) -> Result<()> {
    let found = list.iter().enumerate().find(|(i, n)| list[..*i].contains(n));
    found.map_or(Ok(()), |(_, n)| Err(Error::Usage(format!("--{flag} has {n} twice, expected it once"))))
}

/// Tokens per round to tell of, each 1 to a block's.
fn acceptance(flags: &args::Round, block: usize, counting: bool) -> Result<Vec<f64>> {
    if let Some(Numbers(curve)) = &flags.curve {
        if let Some(found) = curve.iter().find(|p| !(0.0..=1.0).contains(*p)) {
            return Err(Error::Usage(format!("--curve has {found}, expected probabilities, 0 to 1")));
        }
        let (found, drafts) = (curve.len(), block - 1);
        if found > drafts {
            return Err(Error::Usage(format!(
                "--curve has {found} probabilities, expected at most {drafts}, the drafts of a block of {block}"
            )));
        }
        return Ok(vec![tokens(curve)]);
    }
    let Some(Numbers(list)) = &flags.acceptance else {
        let usual = [2.0, 4.0, 6.0, 8.0].into_iter().filter(|length| !counting && *length <= block as f64);
        return Ok(usual.collect());
    };
    if let Some(found) = list.iter().find(|n| !(1.0..=block as f64).contains(*n)) {
        return Err(Error::Usage(format!(
            "--acceptance has {found}, expected 1 to {block}, the tokens of a round"
        )));
    }
    twice("acceptance", list)?;
    Ok(list.clone())
}

/// Of a round, if each draft stands with its probability where those before it do.
fn tokens(curve: &[f64]) -> f64 {
    let mut all_stand = 1.0;
    1.0 + curve
        .iter()
        .map(|p| {
            all_stand *= p;
            all_stand
        })
        .sum::<f64>()
}

/// Whether the largest place of the grid fits the device, before anything is loaded.
fn fits(pair: &Pair, place: &DeviceHandle, room: BatchConfig) -> Result<()> {
    let needed = MemoryPlan::new(pair, room)?.needed(place.overhead);
    let free = usize::try_from(place.device.memory()?.0).unwrap_or(usize::MAX);
    if needed <= free {
        return Ok(());
    }
    let BatchConfig { block, .. } = room;
    let most = MemoryPlan::largest_context(pair, room, free, place.overhead)?;
    let advice = match most.checked_sub(spare(block)) {
        Some(most) => format!("the largest --context that fits is {most}"),
        None => "no --context fits".into(),
    };
    Err(Error::Memory(format!(
        "not enough memory on the device for {room}: {} are needed, {} are free; {advice}",
        size(needed),
        size(free)
    )))
}

impl Point<'_> {
    fn parameters(&self, more: Value) -> Value {
        let mut all = json!({ "context": self.context, "batch": self.batch });
        if let (Value::Object(all), Value::Object(more)) = (&mut all, more) {
            all.extend(more);
        }
        all
    }

    fn of_rounds(&self) -> Value {
        self.parameters(json!({ "block": self.block }))
    }

    fn request(&self) -> Request {
        Request {
            prompt: vec![],
            max_tokens: MOST_ROUNDS * self.block,
            sampling: self.sampling.clone(),
            stop_ids: vec![],
            block: self.block,
            spec: Default::default(),
        }
    }

    fn batch<'a>(&'a self, models: &'a Models) -> Result<Batch<'a>> {
        Batch::new(
            self.device,
            models,
            BatchConfig::new(self.batch, self.block, self.context + spare(self.block)),
        )
    }

    fn fill_synthetic_context(&self, batch: &mut Batch) -> Result<()> {
        (0..self.batch).try_for_each(|slot| batch.fill_synthetic_context(slot, self.context, &self.request()))
    }

    fn is_sampled(&self) -> bool {
        self.sampling.temperature != 0.0
    }

    /// What the emulator counts, each part alone and in order.
    fn count(&self, models: &Models, rows: &mut Vec<Row>) -> Result<()> {
        let mut batch = self.batch(models)?;
        self.fill_synthetic_context(&mut batch)?;
        let still = batch.freeze()?;
        let run = |nodes: &[Node]| {
            let before = self.device.tally();
            nodes.iter().try_for_each(|node| node.enqueue(self.device))?;
            match (before, self.device.tally()) {
                (Some(before), Some(after)) => Ok(after - before),
                _ => Err(Error::Internal("a device that does not count was to".into())),
            }
        };
        let mut push = |name: &str, parameters: Value, counts: &Counts| {
            rows.push(Row::counts(name, parameters, counts));
            rows.last().and_then(|row| row.median).unwrap_or(0.0)
        };
        let plain = still.graph(false, self.is_sampled())?;
        let plain = push("AR step", self.parameters(json!({})), &run(&plain.nodes)?);
        let mut round = None;
        if self.block > 1 {
            let graph = still.graph(true, self.is_sampled())?;
            still.reset()?;
            round = Some(push("round", self.of_rounds(), &run(&graph.nodes)?));
            still.reset()?;
            for section in outline(&graph.nodes) {
                push(section.name, self.of_rounds(), &run(section.nodes)?);
            }
        }
        if let Some(round) = round.filter(|_| !self.acceptance.is_empty()) {
            let row = |name: &str, parameters: Value, bytes: f64, tokens: f64| {
                let value = bytes / (tokens * self.batch as f64);
                Row::value(name, parameters, Kind::Counted, value, "bytes/tok", Better::Lower, json!({}))
            };
            rows.push(row(PLAIN, self.parameters(json!({})), plain, 1.0));
            for &length in self.acceptance {
                rows.push(row(SYNTHETIC, self.with_acceptance(length), round, length));
            }
        }
        Ok(())
    }

    fn with_acceptance(&self, length: f64) -> Value {
        self.parameters(json!({ "block": self.block, "acceptance": whole_or_not(length) }))
    }

    /// `rounds` rounds in a profiler's window, launch by launch, in ranges for their parts and layers; AR steps where
    /// there is no drafter.
    fn profile(&self, models: &Models, rounds: usize) -> Result<()> {
        let device = self.device;
        let mut batch = self.batch(models)?;
        self.fill_synthetic_context(&mut batch)?;
        let still = batch.freeze()?;
        let graph = still.graph(self.block > 1, self.is_sampled())?;
        let sections = outline(&graph.nodes);
        device.replay(graph)?;
        let _window = window(device)?;
        for _ in 0..rounds {
            still.reset()?;
            let _round = range("round");
            for section in &sections {
                let _section = range(section.name);
                let mut layer = 0;
                for (nodes, in_layer) in units(section.nodes) {
                    let _layer = in_layer.then(|| range(&format!("layer {layer}")));
                    layer += usize::from(in_layer);
                    nodes.iter().try_for_each(|node| node.enqueue(device))?;
                }
            }
        }
        Ok(())
    }

    /// Times on a GPU.
    fn measure(
        &self,
        models: &Models,
        instruments: &Instruments,
        rounds: usize,
        samples: usize,
        rows: &mut Vec<Row>,
    ) -> Result<()> {
        let device = self.device;
        let mut batch = self.batch(models)?;
        let with_host = match self.block {
            1 => None,
            _ => Some(self.with_host(&mut batch, instruments, rounds)?),
        };
        self.fill_synthetic_context(&mut batch)?;
        let still = batch.freeze()?;
        let plain = still.graph(false, self.is_sampled())?;
        let round = if self.block > 1 { Some(still.graph(true, self.is_sampled())?) } else { None };
        let sections = round.map_or(vec![], |graph| outline(&graph.nodes));
        let mut cuts = vec![];
        let mut end = 0;
        for section in sections.iter().rev().skip(1).rev() {
            end += section.nodes.len();
            let first = round.map_or(&[][..], |graph| &graph.nodes[..end]);
            cuts.push(device.capture(&mut || first.iter().try_for_each(|node| node.enqueue(device)))?);
        }
        // The AR step; all but the last part of the round, more and more of it; the round; rounds together.
        let graphs: Vec<&Graph> = [plain].into_iter().chain(&cuts).chain(round).collect();
        let count = graphs.len() + usize::from(round.is_some());
        let mut prepare = || {
            // Work for the card while the sample is enqueued, and caches as a round finds them.
            device.replay(round.unwrap_or(plain))?;
            still.reset()
        };
        let mut run = |i: usize| match (graphs.get(i), round) {
            (Some(graph), _) => device.replay(graph),
            (None, Some(round)) => (0..TOGETHER).try_for_each(|_| device.replay(round)),
            (None, None) => Ok(()),
        };
        let times = together(device, instruments, rounds, samples, &mut prepare, count, &mut run)?;

        let target = &self.pair.target.config;
        let step = target_pass(target, self.context, self.batch, 1);
        let parameters = || self.parameters(json!({}));
        rows.push(self.timed("AR step", parameters(), &times[0], plain.nodes.len(), Some(step)));
        rows.push(self.rate(PLAIN, parameters(), 1.0, &times[0], json!({})));
        let (Some(round), Some(with_host)) = (round, with_host) else { return Ok(()) };
        let [taken, taken_together] = &times[times.len() - 2..] else { return Ok(()) };
        let launches = round.nodes.len();
        rows.push(self.timed("round", self.of_rounds(), taken, launches, self.pass_of("round")));
        let mut before: Option<Vec<f64>> = None;
        for (section, times) in sections.iter().zip(&times[1..]) {
            let (launches, pass) = (section.nodes.len(), self.pass_of(section.name));
            let medians = times.medians();
            rows.push(match before {
                None => self.timed(section.name, self.of_rounds(), times, launches, pass),
                Some(before) => {
                    let samples = medians.iter().zip(before).map(|(all, before)| all - before).collect();
                    let part = Times { samples, rounds: vec![1; rounds], throttled: times.throttled.clone() };
                    self.timed(section.name, self.of_rounds(), &part, launches, pass)
                }
            });
            before = Some(medians);
        }
        let between = |(one, all): (&f64, f64)| (all - one) / (TOGETHER - 1) as f64 - one;
        let samples = taken.medians().iter().zip(taken_together.medians()).map(between).collect();
        let gaps = Times { samples, rounds: vec![1; rounds], throttled: taken.throttled.clone() };
        rows.push(self.timed("gaps", self.of_rounds(), &gaps, 0, None));
        rows.push(self.timed("round with host", self.of_rounds(), &with_host, launches, None));
        let median = |times: &Times| quantile(&times.samples, 0.5).unwrap_or(f64::NAN);
        let step = median(&times[0]);
        for &length in self.acceptance {
            let numbers = json!({ "speed-up": length * step / median(taken) });
            rows.push(self.rate(SYNTHETIC, self.with_acceptance(length), length, taken, numbers));
        }
        Ok(())
    }

    /// The engine's loop by the host's clock, begun anew for each round of samples.
    fn with_host(&self, batch: &mut Batch, instruments: &Instruments, rounds: usize) -> Result<Times> {
        let mut times = Times::default();
        let mut emitted = vec![Emitted::default(); self.batch];
        for round in 0..=rounds {
            self.fill_synthetic_context(batch)?;
            for i in 0..LEAD + LOOP {
                let clock = Instant::now();
                batch.round(&mut emitted)?;
                // As elsewhere, the first round does not count.
                if round > 0 && i >= LEAD {
                    times.samples.push(clock.elapsed().as_secs_f64() * 1e3);
                }
            }
            if let Some(round) = round.checked_sub(1) {
                // The next round is under way.
                times.end_round(round, LOOP, instruments.is_throttled());
            }
            (0..self.batch).try_for_each(|slot| batch.release(slot, 1))?;
        }
        Ok(times)
    }

    /// The least that a part must move and compute; None where that is next to nothing.
    fn pass_of(&self, part: &str) -> Option<Pass> {
        let (target, drafter) = (&self.pair.target.config, &self.pair.drafter.as_ref()?.config);
        let fc = fc_bytes(drafter);
        // Two operations for each weight of two bytes and row.
        let inject = Pass { bytes: fc, flops: fc * (self.batch * self.block) as f64 };
        let drafting = draft_pass(target, drafter, self.context, self.batch, self.block);
        let verify = target_pass(target, self.context, self.batch, self.block);
        let sum = |a: Pass, b: Pass, sign: f64| Pass {
            bytes: a.bytes + sign * b.bytes,
            flops: a.flops + sign * b.flops,
        };
        match part {
            "inject" => Some(inject),
            "draft" => Some(sum(drafting, inject, -1.0)),
            "verify" => Some(verify),
            "round" => Some(sum(drafting, verify, 1.0)),
            _ => None,
        }
    }

    /// Milliseconds; `launches` of the kernels that this is, 0 for none.
    fn timed(
        &self,
        name: &str,
        parameters: Value,
        times: &Times,
        launches: usize,
        pass: Option<Pass>,
    ) -> Row {
        let mut numbers = Map::new();
        if launches > 0 {
            numbers.insert("launches".into(), json!(launches));
        }
        if let Some(pass) = pass {
            numbers.insert("GB".into(), json!(pass.bytes / 1e9));
        }
        let median = quantile(&times.samples, 0.5).unwrap_or(0.0);
        if let (Some(pass), Some(card)) = (pass, &self.card) {
            let floor = pass.ms(card);
            numbers.insert("floor ms".into(), json!(floor));
            if median > 0.0 {
                numbers.insert("share of floor".into(), json!(floor / median));
            }
        }
        let numbers = Value::Object(numbers);
        if times.samples.iter().all(|ms| *ms > 0.0) {
            return Row::times(name, parameters, times, ("ms", 1.0), numbers);
        }
        terminal::note(&format!(
            "{name} of {parameters} is lost in noise: {median:.6} ms, and not above 0 in every round"
        ));
        Row::value(name, parameters, Kind::Measured, median, "ms", Better::Lower, numbers)
    }

    /// Tokens per second, if each sequence brings `tokens` in each of these times.
    fn rate(&self, name: &str, parameters: Value, tokens: f64, times: &Times, numbers: Value) -> Row {
        let samples = times.samples.iter().map(|ms| self.batch as f64 * tokens / ms * 1e3).collect();
        let rounds = Some(times.rounds.clone());
        let row = Row::samples(name, parameters, samples, rounds, "tok/s", Better::Higher, numbers);
        Row { throttled: times.throttled.clone(), ..row }
    }
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;
    use crate::kernels::tests::{Clock, Disguised};
    use crate::machine;

    #[test]
    fn a_curve_of_probabilities_is_an_acceptance_length() {
        assert_eq!(tokens(&[]), 1.0);
        assert_eq!(tokens(&[0.5]), 1.5);
        // 1 + 0.5 + 0.5 x 0.5 + 0.5 x 0.5 x 0
        assert_eq!(tokens(&[0.5, 0.5, 0.0, 1.0]), 1.75);
        assert_eq!(tokens(&[1.0; 15]), 16.0);
    }

    /// By the emulator's clock, whose times mean nothing: what is looked at is which rows there are, and that they agree.
    #[test]
    fn rows_of_times_follow_from_their_samples() {
        let place = DeviceHandle::emulator().unwrap();
        let instruments = Instruments::open(&place);
        let pair = model::pair("demo", None).unwrap();
        let models = Models::load(&*place.device, &pair, 600).unwrap();
        let (acceptance, rounds, samples) = ([2.0, 3.5], 1, 2);
        let mut point = Point {
            device: &*place.device,
            pair: &pair,
            card: Card::named("H200"),
            context: 16,
            batch: 2,
            block: 4,
            sampling: SamplingParams {
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                seed: 1,
                stream: 0,
            },
            acceptance: &acceptance,
        };
        let mut rows = vec![];
        point.measure(&models, &instruments, rounds, samples, &mut rows).unwrap();
        let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        let parts = ["begin", "inject", "draft", "verify", "accept"];
        let expected =
            [&["AR step", PLAIN, "round"][..], &parts, &["gaps", "round with host", SYNTHETIC, SYNTHETIC]];
        assert_eq!(names, expected.concat());
        let row = |name: &str| rows.iter().find(|row| row.name == name).unwrap();
        let number = |name: &str, key: &str| row(name).numbers[key].as_f64().unwrap();
        let flat = |name: &str| row(name).samples.clone().unwrap();
        for name in ["AR step", "round", "begin", PLAIN] {
            assert_eq!(
                (flat(name).len(), &row(name).rounds),
                (rounds * samples, &Some(vec![samples; rounds]))
            );
        }
        assert_eq!(flat("round with host").len(), rounds * LOOP);
        let sum: f64 = parts.iter().map(|name| row(name).median.unwrap()).sum();
        assert!((sum - row("round").median.unwrap()).abs() < 1e-6, "{sum}");
        let launches: f64 = parts.iter().map(|name| number(name, "launches")).sum();
        assert_eq!((launches, number("round", "launches")), (58.0, 58.0));
        assert_eq!(
            number("draft", "GB") + number("inject", "GB") + number("verify", "GB"),
            number("round", "GB")
        );
        assert!((number("inject", "GB") - 98304e-9).abs() < 1e-12);
        let floor = number("round", "GB") / 4800.0 * 1e3;
        assert!((number("round", "floor ms") / floor - 1.0).abs() < 1e-9);
        let share = floor / row("round").median.unwrap();
        assert!((number("round", "share of floor") / share - 1.0).abs() < 1e-9);
        assert!(!row("accept").numbers.contains_key("GB") && !row("gaps").numbers.contains_key("launches"));
        // Two sequences.
        assert!((flat(PLAIN)[1] / (2.0 / flat("AR step")[1] * 1e3) - 1.0).abs() < 1e-9);
        let synthetic = rows.iter().rfind(|row| row.name == SYNTHETIC).unwrap();
        assert_eq!(synthetic.parameters["acceptance"], 3.5);
        assert!((synthetic.samples.as_ref().unwrap()[1] / (7.0 / flat("round")[1] * 1e3) - 1.0).abs() < 1e-9);
        let ratio = row("AR step").median.unwrap() / row("round").median.unwrap();
        assert!((synthetic.numbers["speed-up"].as_f64().unwrap() / (3.5 * ratio) - 1.0).abs() < 1e-9);

        // A difference that is not above 0 has a value alone.
        let lost = Times { samples: vec![0.5, -0.25, 0.125], rounds: vec![1; 3], throttled: None };
        let row = point.timed("inject", json!({}), &lost, 1, None);
        assert_eq!(
            (row.median, row.samples, row.rounds, row.kind),
            (Some(0.125), None, None, Kind::Measured)
        );

        point.block = 1;
        point.acceptance = &[];
        let mut alone = vec![];
        point.measure(&models, &instruments, 1, 1, &mut alone).unwrap();
        let names: Vec<&str> = alone.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["AR step", PLAIN]);
    }

    /// By a clock of 1 ms for a launch and 0.5 between graphs, on a card that is held back.
    #[test]
    fn parts_are_differences_gaps_lie_between_rounds_and_every_row_says_that_it_was_throttled() {
        let mut device = Disguised::new(0, false);
        device.clock = Clock::Steps;
        let instruments = machine::tests::instruments("0000:ca:00.0");
        let pair = model::pair("demo", None).unwrap();
        let models = Models::load(&device, &pair, 600).unwrap();
        let point = Point {
            device: &device,
            pair: &pair,
            card: None,
            context: 16,
            batch: 1,
            block: 4,
            sampling: SamplingParams {
                temperature: 0.0,
                top_k: 0,
                top_p: 1.0,
                min_p: 0.0,
                seed: 1,
                stream: 0,
            },
            acceptance: &[2.0],
        };
        let mut rows = vec![];
        point.measure(&models, &instruments, 2, 1, &mut rows).unwrap();
        for row in &rows {
            assert_eq!(row.throttled, Some(vec![0, 1]), "{}", row.name);
            if let Some(launches) = row.numbers.get("launches").filter(|_| row.name != "round with host") {
                assert_eq!(row.median, launches.as_f64(), "{}", row.name);
            }
        }
        let median = |name: &str| rows.iter().find(|row| row.name == name).unwrap().median.unwrap();
        assert_eq!(["AR step", "round", "begin", "accept", "gaps"].map(median), [38.0, 58.0, 1.0, 2.0, 0.5]);
        // Before each sample the card has a round to work on, and what it did to the sequences is taken back.
        let asked = device.asked.lock().unwrap();
        let samples: Vec<&str> = asked.split('e').step_by(2).collect();
        assert_eq!(samples.len(), 3 * 7 + 1);
        assert!(samples[..3 * 7].iter().all(|before| before.ends_with("rccc")), "{asked}");
    }
}
