//! Rounds on a device: times on a GPU, counters on the software GPU.

use super::point::{AR, Point, SYNTHETIC};
use super::{LEAD, LOOP, MOST_ROUNDS, spare};
use crate::machine::Instruments;
use crate::measure::Times;
use crate::measure::times_in_turn;
use crate::record::{Better, Kind, Row};
use dflash::checkpoint::pair::Pair;
use dflash::cli::interrupt::is_interrupted;
use dflash::cli::terminal;
use dflash::engine::generate::{Decoder, Emitted, Request};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, FrozenBatch, Models};
use dflash::gpu::device::{Counts, Device, Graph, Node};
use dflash::gpu::graph_listing::{Section, outline, units};
use dflash::gpu::nvtx::{range, window};
use dflash::{Error, Result};
use serde_json::{Value, json};
use std::time::Instant;

/// Rounds that are enqueued together, to measure the gaps between them.
const TOGETHER: usize = 4;

/// Loads the random weights of `pair`, for sequences of up to `positions` positions.
///
/// # Errors
/// As [`Models::load_with`].
pub fn load(pair: &Pair, device: &dyn Device, positions: usize) -> Result<Models> {
    let (bar, mut progress) = terminal::weights(false);
    let models = Models::load_with(device, pair, positions, &mut progress);
    bar.finish_and_clear();
    models
}

/// How often a GPU is measured: `rounds` rounds of `samples` samples, after a warm-up round.
pub struct Effort<'a> {
    pub instruments: &'a Instruments,
    pub rounds: usize,
    pub samples: usize,
}

/// One point of the grid on a device.
pub struct Run<'a> {
    pub point: &'a Point<'a>,
    pub device: &'a dyn Device,
    pub models: &'a Models,
}

impl Run<'_> {
    fn request(&self) -> Request {
        Request {
            prompt: vec![],
            max_tokens: MOST_ROUNDS * self.point.block,
            sampling: self.point.sampling.clone(),
            stop_ids: vec![],
            block: self.point.block,
            spec: Default::default(),
        }
    }

    fn batch(&self) -> Result<Batch<'_>> {
        let Point { batch, block, context, .. } = *self.point;
        Batch::new(self.device, self.models, BatchConfig::new(batch, block, context + spare(block)))
    }

    fn fill(&self, batch: &mut Batch) -> Result<()> {
        let context = self.point.context;
        (0..self.point.batch)
            .try_for_each(|slot| batch.fill_synthetic_context(slot, context, &self.request()))
    }

    fn frozen(&self) -> Result<FrozenBatch<'_>> {
        let mut batch = self.batch()?;
        self.fill(&mut batch)?;
        batch.freeze()
    }

    fn is_sampled(&self) -> bool {
        self.point.sampling.temperature != 0.0
    }

    /// Appends the counters of the AR step, the round and its parts in order.
    pub fn count(&self, rows: &mut Vec<Row>) -> Result<()> {
        let point = self.point;
        let frozen = self.frozen()?;
        let run = |nodes: &[Node]| {
            let before = self.device.counters();
            nodes.iter().try_for_each(|node| node.enqueue(self.device))?;
            match (before, self.device.counters()) {
                (Some(before), Some(after)) => Ok(after - before),
                _ => Err(Error::Internal("the device has no counters".into())),
            }
        };
        let mut push = |name: &str, parameters: Value, counts: &Counts| {
            rows.push(Row::counts(name, parameters, counts));
            rows.last().and_then(|row| row.median).unwrap_or(0.0)
        };
        let step = frozen.graph(false, self.is_sampled())?;
        let step = push("AR step", point.parameters(json!({})), &run(&step.nodes)?);
        let mut round = None;
        if point.block > 1 {
            let graph = frozen.graph(true, self.is_sampled())?;
            frozen.reset()?;
            round = Some(push("round", point.of_rounds(), &run(&graph.nodes)?));
            frozen.reset()?;
            for section in outline(&graph.nodes) {
                push(section.name, point.of_rounds(), &run(section.nodes)?);
            }
        }
        if let Some(round) = round.filter(|_| !point.acceptance.is_empty()) {
            let row = |name: &str, parameters: Value, bytes: f64, tokens: f64| {
                let value = bytes / (tokens * point.batch as f64);
                Row::value(name, parameters, Kind::Counted, value, "bytes/tok", Better::Lower, json!({}))
            };
            rows.push(row(AR, point.parameters(json!({})), step, 1.0));
            for &length in point.acceptance {
                rows.push(row(SYNTHETIC, point.with_acceptance(length), round, length));
            }
        }
        Ok(())
    }

    /// Runs `rounds` rounds launch by launch in a profiler's window, with ranges for their parts and layers;
    /// AR steps without a drafter.
    pub fn profile(&self, rounds: usize) -> Result<()> {
        let device = self.device;
        let frozen = self.frozen()?;
        let graph = frozen.graph(self.point.block > 1, self.is_sampled())?;
        let sections = outline(&graph.nodes);
        device.replay(graph)?;
        let _window = window(device)?;
        for _ in 0..rounds {
            frozen.reset()?;
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

    /// Appends the times of a GPU: nothing if it is interrupted before the first round of replays ends.
    pub fn measure(&self, effort: &Effort, rows: &mut Vec<Row>) -> Result<()> {
        let with_host = match self.point.block {
            1 => None,
            _ => Some(self.with_host(effort)?),
        };
        let frozen = self.frozen()?;
        let step = frozen.graph(false, self.is_sampled())?;
        let Some(with_host) = with_host else {
            let times = self.replays(&frozen, effort, &[step], false)?;
            if times[0].rounds.is_empty() {
                return Ok(());
            }
            rows.extend(self.step_rows(&times[0], step.nodes.len()));
            return Ok(());
        };
        let round = frozen.graph(true, self.is_sampled())?;
        let sections = outline(&round.nodes);
        let prefixes = self.prefixes(round, &sections)?;
        let graphs: Vec<&Graph> = [step].into_iter().chain(&prefixes).chain([round]).collect();
        let times = self.replays(&frozen, effort, &graphs, true)?;
        if times[0].rounds.is_empty() {
            return Ok(());
        }
        let [step_times, prefix_times @ .., alone, several] = &times[..] else { return Ok(()) };
        rows.extend(self.step_rows(step_times, step.nodes.len()));
        let launches = round.nodes.len();
        rows.push(self.row("round", alone, launches));
        let ends: Vec<&Times> = prefix_times.iter().chain([alone]).collect();
        rows.extend(self.part_rows(&sections, &ends));
        rows.push(self.row("gaps", &gaps(alone, several), 0));
        rows.push(self.row("round with host", &with_host, launches));
        rows.extend(self.point.synthetic_rates(step_times, alone));
        Ok(())
    }

    /// Graphs of the round's first launches: up to the end of each part but the last.
    fn prefixes(&self, round: &Graph, sections: &[Section]) -> Result<Vec<Graph>> {
        let device = self.device;
        let mut end = 0;
        let before_last = &sections[..sections.len().saturating_sub(1)];
        let prefix = |section: &Section| {
            end += section.nodes.len();
            let first = &round.nodes[..end];
            device.capture(&mut || first.iter().try_for_each(|node| node.enqueue(device)))
        };
        before_last.iter().map(prefix).collect()
    }

    /// Times of replays in turn: of each graph, and with `several` also of [`TOGETHER`] replays of the last
    /// graph. The last graph precedes every sample.
    fn replays(
        &self,
        frozen: &FrozenBatch,
        effort: &Effort,
        graphs: &[&Graph],
        several: bool,
    ) -> Result<Vec<Times>> {
        let (device, last) = (self.device, graphs[graphs.len() - 1]);
        let mut prepare = || {
            // Keeps the card busy while the sample is enqueued, and leaves the caches as a round finds them.
            device.replay(last)?;
            frozen.reset()
        };
        let mut run = |i: usize| match graphs.get(i) {
            Some(graph) => device.replay(graph),
            None => (0..TOGETHER).try_for_each(|_| device.replay(last)),
        };
        let Effort { instruments, rounds, samples } = *effort;
        let count = graphs.len() + usize::from(several);
        times_in_turn(device, instruments, rounds, samples, &mut prepare, count, &mut run)
    }

    fn row(&self, name: &str, times: &Times, launches: usize) -> Row {
        self.point.timed(name, self.point.of_rounds(), times, launches)
    }

    fn step_rows(&self, times: &Times, launches: usize) -> [Row; 2] {
        let parameters = self.point.parameters(json!({}));
        [self.point.timed("AR step", parameters, times, launches), self.point.ar_rate(times)]
    }

    /// Rows of the parts. `ends`: the times from the start of the round to the end of each part. A part is
    /// the difference of two medians in each round of samples.
    fn part_rows(&self, sections: &[Section], ends: &[&Times]) -> Vec<Row> {
        let mut before: Option<Vec<f64>> = None;
        let mut row = |(section, times): (&Section, &&Times)| {
            let launches = section.nodes.len();
            let medians = times.medians();
            let row = match &before {
                None => self.row(section.name, times, launches),
                Some(before) => {
                    let samples: Vec<f64> =
                        medians.iter().zip(before).map(|(all, before)| all - before).collect();
                    let rounds = vec![1; samples.len()];
                    self.row(
                        section.name,
                        &Times { samples, rounds, throttled: times.throttled.clone() },
                        launches,
                    )
                }
            };
            before = Some(medians);
            row
        };
        sections.iter().zip(ends).map(&mut row).collect()
    }

    /// The engine's loop by the host's clock, restarted for each round of samples.
    fn with_host(&self, effort: &Effort) -> Result<Times> {
        let mut batch = self.batch()?;
        let mut times = Times::default();
        let mut emitted = vec![Emitted::default(); self.point.batch];
        for round in (0..=effort.rounds).take_while(|_| !is_interrupted()) {
            self.fill(&mut batch)?;
            for i in 0..LEAD + LOOP {
                let clock = Instant::now();
                batch.round(&mut emitted)?;
                // The first round of samples is a warm-up.
                if round > 0 && i >= LEAD {
                    times.samples.push(clock.elapsed().as_secs_f64() * 1e3);
                }
            }
            if let Some(round) = round.checked_sub(1) {
                // The card still works on the next round.
                times.end_round(round, LOOP, effort.instruments.is_throttled());
            }
            (0..self.point.batch).try_for_each(|slot| batch.release(slot, 1))?;
        }
        Ok(times)
    }
}

/// The extra time of a round that follows another: from rounds alone and [`TOGETHER`] rounds enqueued
/// together.
fn gaps(alone: &Times, together: &Times) -> Times {
    let between = |(one, all): (&f64, f64)| (all - one) / (TOGETHER - 1) as f64 - one;
    let samples: Vec<f64> = alone.medians().iter().zip(together.medians()).map(between).collect();
    Times { rounds: vec![1; samples.len()], samples, throttled: alone.throttled.clone() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::tests::{Clock, FakeGpu};
    use crate::{machine, model};
    use dflash::perf::roofline::Card;
    use dflash::spec::sampling::SamplingParams;

    const GREEDY: SamplingParams =
        SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, stream: 0 };

    /// By the host's clock, whose times mean nothing: the test checks which rows there are and that they agree.
    #[test]
    fn rows_of_times_follow_from_their_samples() {
        let device = FakeGpu::new(0, false);
        let instruments = machine::tests::none();
        let pair = model::pair("demo", None, &Default::default()).unwrap();
        let models = Models::load(&device, &pair, 600).unwrap();
        let (acceptance, rounds, samples) = ([2.0, 3.5], 1, 2);
        let mut point = Point {
            pair: &pair,
            card: Card::named("H200"),
            context: 16,
            batch: 2,
            block: 4,
            sampling: GREEDY,
            acceptance: &acceptance,
        };
        let mut rows = vec![];
        let run = |point: &Point, rounds, samples, rows: &mut Vec<Row>| {
            let run = Run { point, device: &device, models: &models };
            run.measure(&Effort { instruments: &instruments, rounds, samples }, rows).unwrap();
        };
        run(&point, rounds, samples, &mut rows);
        let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
        let parts = ["begin", "inject", "draft", "verify", "accept"];
        let expected =
            [&["AR step", AR, "round"][..], &parts, &["gaps", "round with host", SYNTHETIC, SYNTHETIC]];
        assert_eq!(names, expected.concat());
        let row = |name: &str| rows.iter().find(|row| row.name == name).unwrap();
        let number = |name: &str, key: &str| row(name).numbers[key].as_f64().unwrap();
        let flat = |name: &str| row(name).samples.clone().unwrap();
        for name in ["AR step", "round", "begin", AR] {
            let expected = (rounds * samples, &Some(vec![samples; rounds]));
            assert_eq!((flat(name).len(), &row(name).rounds), expected);
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
        assert!((flat(AR)[1] / (2.0 / flat("AR step")[1] * 1e3) - 1.0).abs() < 1e-9);
        let synthetic = rows.iter().rfind(|row| row.name == SYNTHETIC).unwrap();
        assert_eq!(synthetic.parameters["acceptance"], 3.5);
        assert!((synthetic.samples.as_ref().unwrap()[1] / (7.0 / flat("round")[1] * 1e3) - 1.0).abs() < 1e-9);
        let ratio = row("AR step").median.unwrap() / row("round").median.unwrap();
        assert!((synthetic.numbers["speed-up"].as_f64().unwrap() / (3.5 * ratio) - 1.0).abs() < 1e-9);

        // A difference that is not above 0 has a value and no samples.
        let lost = Times { samples: vec![0.5, -0.25, 0.125], rounds: vec![1; 3], throttled: None };
        let row = point.timed("inject", json!({}), &lost, 1);
        assert_eq!(
            (row.median, row.samples, row.rounds, row.kind),
            (Some(0.125), None, None, Kind::Measured)
        );

        point.block = 1;
        point.acceptance = &[];
        let mut alone = vec![];
        run(&point, 1, 1, &mut alone);
        let names: Vec<&str> = alone.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["AR step", AR]);
    }

    /// By a clock of 1 ms for a launch and 0.5 between graphs, on a throttled card.
    #[test]
    fn parts_and_gaps_are_differences_and_rows_are_throttled() {
        let mut device = FakeGpu::new(0, false);
        device.clock = Clock::Steps;
        let instruments = machine::tests::instruments("0000:ca:00.0");
        let pair = model::pair("demo", None, &Default::default()).unwrap();
        let models = Models::load(&device, &pair, 600).unwrap();
        let point = Point {
            pair: &pair,
            card: None,
            context: 16,
            batch: 1,
            block: 4,
            sampling: GREEDY,
            acceptance: &[2.0],
        };
        let mut rows = vec![];
        let run = Run { point: &point, device: &device, models: &models };
        run.measure(&Effort { instruments: &instruments, rounds: 2, samples: 1 }, &mut rows).unwrap();
        for row in &rows {
            assert_eq!(row.throttled, Some(vec![0, 1]), "{}", row.name);
            if let Some(launches) = row.numbers.get("launches").filter(|_| row.name != "round with host") {
                assert_eq!(row.median, launches.as_f64(), "{}", row.name);
            }
        }
        let median = |name: &str| rows.iter().find(|row| row.name == name).unwrap().median.unwrap();
        assert_eq!(["AR step", "round", "begin", "accept", "gaps"].map(median), [38.0, 58.0, 1.0, 2.0, 0.5]);
        // Before each sample the card gets a round to work on, and the sequences are reset.
        let asked = device.asked.lock().unwrap();
        let samples: Vec<&str> = asked.split('e').step_by(2).collect();
        assert_eq!(samples.len(), 3 * 7 + 1);
        assert!(samples[..3 * 7].iter().all(|before| before.ends_with("rccc")), "{asked}");
    }
}
