//! The measurements on a GPU, tested with a software GPU that claims to be a GPU, and the checks of results.

use super::*;
use crate::measure::times_in_turn;
use crate::test_gpu::TestGpu;
use dflash::gpu::device::{Arg, Buffer, Counts, Device, Event, Graph, Kernel, Pinned, Properties};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// The source of a fake GPU's times.
#[derive(Clone, Copy, PartialEq)]
pub enum Clock {
    /// The host's.
    Host,
    /// 1, 2, 3, ... ms.
    Counting,
    /// 1 ms for the read ceiling on 10 blocks, and 1 ms more for each block fewer or more.
    Blocks,
    /// 1 ms per step of a graph, and half a millisecond between consecutive graphs.
    Steps,
}

/// A software GPU that pretends to be a GPU, and optionally corrupts results.
pub struct FakeGpu {
    inner: TestGpu,
    pub clock: Clock,
    /// For the clock: calls of `elapsed`, blocks of the last launch, steps, and at each event the steps or, by the
    /// host's clock, milliseconds.
    counted: Mutex<(f32, u32, f32, Vec<f32>)>,
    start: Instant,
    /// The calls so far: `r`eplays, `c`opies, `e`vents.
    pub asked: Mutex<String>,
    properties: Properties,
    /// First arguments of linear launches: their weights.
    weights: Mutex<BTreeSet<u64>>,
    corrupt: AtomicBool,
}

impl FakeGpu {
    pub fn new(l2: u64, corrupt: bool) -> FakeGpu {
        let inner = TestGpu::new();
        let properties = Properties { l2, multiprocessors: 2, software: false, ..inner.properties().clone() };
        let (clock, weights) = (Clock::Host, Mutex::default());
        let (counted, asked) = (Mutex::default(), Mutex::default());
        let (start, corrupt) = (Instant::now(), corrupt.into());
        FakeGpu { inner, clock, counted, start, asked, properties, weights, corrupt }
    }
}

impl Device for FakeGpu {
    fn properties(&self) -> &Properties {
        &self.properties
    }
    fn allocate(&self, bytes: usize, what: &str) -> Result<Buffer> {
        self.inner.allocate(bytes, what)
    }
    fn pinned(&self, bytes: usize, what: &str) -> Result<Pinned> {
        self.inner.pinned(bytes, what)
    }
    fn memory(&self) -> Result<(u64, u64)> {
        self.inner.memory()
    }
    fn upload(&self, to: &Buffer, bytes: &[u8]) -> Result<()> {
        self.inner.upload(to, bytes)
    }
    /// Corrupts one bit of every other byte, which is in the fraction of a bf16 or f32, or in an integer.
    fn download(&self, from: &Buffer, bytes: &mut [u8]) -> Result<()> {
        self.inner.download(from, bytes)?;
        let corrupt = self.corrupt.load(Ordering::Relaxed);
        bytes.iter_mut().step_by(2).for_each(|byte| *byte ^= if corrupt { 2 } else { 0 });
        Ok(())
    }
    fn copy(&self, to: &Buffer, from: &Buffer) -> Result<()> {
        self.asked.lock().unwrap().push('c');
        self.inner.copy(to, from)
    }
    fn fill(&self, to: &Buffer, byte: u8) -> Result<()> {
        self.inner.fill(to, byte)
    }
    fn seal(&self, constant: &Buffer) {
        self.inner.seal(constant);
    }
    fn launch(&self, kernel: &'static Kernel, grid: [u32; 3], shared: u32, args: &[Arg]) -> Result<()> {
        if let (Arg::Buffer(weights), "project") = (&args[0], kernel.file) {
            self.weights.lock().unwrap().insert(weights.address());
        }
        self.counted.lock().unwrap().1 = grid[0];
        self.inner.launch(kernel, grid, shared, args)
    }
    fn capture(&self, record: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        self.inner.capture(record)
    }
    fn replay(&self, graph: &Graph) -> Result<()> {
        let mut asked = self.asked.lock().unwrap();
        let gap = if asked.ends_with('r') { 0.5 } else { 0.0 };
        asked.push('r');
        self.counted.lock().unwrap().2 += graph.nodes.len() as f32 + gap;
        self.inner.replay(graph)
    }
    fn record(&self) -> Result<Event> {
        self.asked.lock().unwrap().push('e');
        let (_, _, steps, events) = &mut *self.counted.lock().unwrap();
        self.inner.synchronize()?;
        events.push(match self.clock {
            Clock::Host => self.start.elapsed().as_secs_f32() * 1e3,
            _ => *steps,
        });
        self.inner.record()
    }
    fn elapsed(&self, from: &Event, to: &Event) -> Result<f32> {
        let (count, blocks, _, events) = &mut *self.counted.lock().unwrap();
        *count += 1.0;
        match (self.clock, events.as_slice()) {
            (Clock::Counting, _) => Ok(*count),
            (Clock::Blocks, _) => Ok(1.0 + (*blocks as f32 - 10.0).abs()),
            (Clock::Steps | Clock::Host, [.., from, to]) => Ok(to - from),
            _ => self.inner.elapsed(from, to),
        }
    }
    fn synchronize(&self) -> Result<()> {
        self.inner.synchronize()
    }
    fn counters_by_kernel(&self) -> Option<BTreeMap<String, Counts>> {
        None
    }
}

fn demo() -> Pair {
    model::pair("demo", None, &Default::default()).unwrap()
}

/// Every kernel, on shapes of all kinds: a single row, rows that do not fill a tile, blocks and AR steps of
/// several sequences.
fn cases(pair: &Pair) -> Vec<Case> {
    let mut all = linear::cases(pair, &[1, 19], &PrefillKernel::ALL);
    all.extend(attention::cases(pair, &[1, 5, 32], &[0, 70]));
    all.extend(round::cases(pair, &[1, 5, 32]));
    all.extend(trees::cases(pair, &[1, 2, 9, 128]));
    all.extend(rejection::cases(pair, &[1, 2, 9, 32]));
    all.extend(sampled_trees::cases(pair, &[1, 2, 9, 128]));
    all
}

#[track_caller]
fn refused(case: &Case, result: Result<()>, why: &str) {
    let internal = matches!(&result, Err(Error::Internal(_)));
    assert!(internal, "{} {}, {why}: {result:?}", case.name, case.parameters);
}

#[test]
fn wrong_results_are_refused_and_right_results_are_not() {
    let device = FakeGpu::new(0, false);
    let pair = demo();
    for case in cases(&pair) {
        let ready = (case.make)(&BenchFixtures::new(&device)).unwrap();
        (ready.prepare)().unwrap();
        refused(&case, (ready.check)(), "not launched");
        (ready.launch)(0).unwrap();
        (ready.check)().unwrap();
        // The host reads the records of `round_finish` without a download.
        if case.name != "round_finish" {
            device.corrupt.store(true, Ordering::Relaxed);
            refused(&case, (ready.check)(), "off by a bit");
            device.corrupt.store(false, Ordering::Relaxed);
        }
        // Preparing a second time must work too.
        (ready.prepare)().unwrap();
    }
}

#[test]
fn a_kernel_with_wrong_results_is_not_timed() {
    let device = FakeGpu::new(0, true);
    let (fixtures, instruments) = (BenchFixtures::new(&device as &dyn Device), crate::machine::tests::none());
    let bench =
        Bench { fixtures, instruments, card: None, rounds: 1, samples: 1, ceiling: 3 << 15, sample_ms: 0.0 };
    let ceiling = bench.ceiling().unwrap_err().to_string();
    assert!(ceiling.starts_with("kernel check: read ceiling {\"blocks\":3}: the sum 0 is "), "{ceiling}");
    let norm = round::cases(&demo(), &[3]).into_iter().find(|case| case.name == "norm").unwrap();
    let norm = bench.row(&norm, None).unwrap_err().to_string();
    assert!(norm.starts_with("kernel check: norm {\"rows\":3}: y: relative error "), "{norm}");
    assert!(norm.ends_with("; nothing is timed"), "{norm}");
}

/// Windows in both directions and a causal drafter, which no published pair has.
#[test]
fn attention_of_every_kind_is_checked() {
    let mut pair = demo();
    let dflash::checkpoint::pair::DraftSource::Drafter(drafter) = &mut pair.draft else { unreachable!() };
    let stack = &mut drafter.config.stack;
    let kinds = [(false, Some(24)), (true, Some(90)), (true, None)];
    stack.attention =
        kinds.map(|(causal, window)| dflash::checkpoint::config::Attention { causal, window }).to_vec();
    pair.target.config.stack.attention[1].window = Some(40);
    let device = TestGpu::new();
    let fixtures = BenchFixtures::new(&device);
    let all = attention::cases(&pair, &[16, 32], &[0, 10, 100]);
    let windowed = |case: &&Case| case.parameters.get("window").is_some();
    assert_eq!(
        (all.len(), all.iter().filter(windowed).count()),
        (3 * (2 + 2 + 3 + 2 + 2 + 2 + 3 + 2 + 2), 3 * (1 + 1 + 2 + 1 + 1 + 1 + 2 + 1 + 1))
    );
    for case in all {
        let ready = (case.make)(&fixtures).unwrap();
        (ready.launch)(0).unwrap();
        (ready.check)().map_err(|e| wrong(&case.name, &case.parameters, e)).unwrap();
        let counted = device.counts();
        assert!(case.bytes > 0 && case.flops > 0.0 && !counted.is_empty());
    }
}

#[test]
fn samples_time_launches_on_cold_copies() {
    // Twice the size of the output projection's weights, 64 KiB.
    let (l2, rounds, samples) = (128 << 10, 2, 1);
    let device = FakeGpu::new(l2, false);
    let pair = demo();
    let card = Card { name: "a card", bandwidth: 1.0, tflops: 1e-9, memory: 1.0 };
    let chosen =
        |case: &Case| case.name == "norm" || (case.name == "target: o" && case.parameters["rows"] == 19);
    let cases: Vec<Case> = cases(&pair).into_iter().filter(chosen).collect();
    for (card, sample_ms, times) in [(None, 0.0, 1), (Some(card), 1e9, 32)] {
        let (fixtures, ceiling) = (BenchFixtures::new(&device as &dyn Device), 1 << 20);
        device.inner.reset_counts();
        device.weights.lock().unwrap().clear();
        let instruments = crate::machine::tests::none();
        let bench = Bench { fixtures, instruments, card, rounds, samples, ceiling, sample_ms };
        let (rows, end) = bench.rows(&cases).unwrap();
        assert_eq!(end, Ok(()));
        assert_eq!(rows.len(), 1 + cases.len());
        let rate = rows[0].median.unwrap();
        assert_eq!((rows[0].name.as_str(), rows[0].unit.as_str()), ("read ceiling", "GB/s"));
        for (row, case) in rows[1..].iter().zip(&cases) {
            assert_eq!((&row.name, row.unit.as_str()), (&case.name, "us"));
            assert_eq!(row.samples.as_ref().unwrap().len(), rounds * samples);
            assert_eq!(row.rounds, Some(vec![samples; rounds]));
            let number = |name: &str| row.numbers[name].as_f64().unwrap();
            let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-9, "{row:?}: {a}, {b}");
            near(number("MB") * 1e6, case.bytes as f64);
            near(number("GB/s"), case.bytes as f64 / row.median.unwrap() / 1e3);
            match case.name.as_str() {
                // Everything is in the cache.
                "norm" => assert_eq!(row.numbers["share of ceiling"], Value::Null),
                _ => near(number("share of ceiling"), number("GB/s") / rate),
            }
            // At 1000 operations per second, any products dominate.
            let products = if card.is_some() { case.flops * 1e3 } else { 0.0 };
            near(number("floor us"), (case.bytes as f64 / 1e3 / rate).max(products));
        }
        let launches = |kernel: &str| device.inner.counts()[kernel].launches;
        // 7 copies, so that the 6 others are 3 times the cache: 21 launches. Norms have no weights: 16
        // launches. One launch is checked, and two samples determine the length of the others.
        let launched = |of: u64| 1 + 2 * of + (rounds as u64 + 1) * samples as u64 * of * times;
        assert_eq!(launches("project_32"), launched(21));
        assert_eq!(launches("residual_norm"), 3 * launched(16));
        assert_eq!(device.weights.lock().unwrap().len(), 7);
    }
}

#[test]
fn the_first_round_of_samples_is_dropped_and_order_is_kept() {
    let device = FakeGpu { clock: Clock::Counting, ..FakeGpu::new(0, false) };
    let instruments = crate::machine::tests::none();
    let mut order = vec![];
    let mut run = |i: usize| {
        order.push(i);
        Ok(())
    };
    let times = times_in_turn(&device, &instruments, 2, 2, &mut || Ok(()), 2, &mut run).unwrap();
    assert_eq!(order, [0, 1].repeat(6));
    assert_eq!(
        (times[0].samples.as_slice(), times[1].samples.as_slice()),
        (&[5.0, 7.0, 9.0, 11.0][..], &[6.0, 8.0, 10.0, 12.0][..])
    );
    assert!(times.iter().all(|times| times.rounds == [2, 2]));
}

#[test]
fn the_read_ceiling_uses_the_best_number_of_blocks() {
    let device = FakeGpu { clock: Clock::Blocks, ..FakeGpu::new(0, false) };
    let (fixtures, instruments) = (BenchFixtures::new(&device as &dyn Device), crate::machine::tests::none());
    let bench =
        Bench { fixtures, instruments, card: None, rounds: 2, samples: 2, ceiling: 1 << 20, sample_ms: 0.0 };
    let (row, ceiling) = bench.ceiling().unwrap().unwrap();
    // The candidates are 4, 8, 10, 16 and 32; 2^20 bytes and 10 sums take a millisecond.
    assert_eq!(row.numbers["blocks"], 10);
    let rate = (1048576.0 + 40.0) / 1e6;
    assert!((row.median.unwrap() / rate - 1.0).abs() < 1e-9, "{row:?}");
    assert!((ceiling.unwrap() / (rate * 1e3) - 1.0).abs() < 1e-9, "{ceiling:?}");
    assert_eq!(row.samples.unwrap().len(), 4);
}

#[test]
fn cases_that_do_not_fit_are_reported_and_the_rest_is_measured() {
    let device = TestGpu::with_memory(256 << 10);
    let pair = demo();
    let of = |name: &str| cases(&pair).into_iter().find(|case| case.name == name).unwrap();
    let chosen = ["norm", "target: lm_head", "target: o", "target: lm_head with logits"].map(of);
    let (fixtures, instruments) = (BenchFixtures::new(&device as &dyn Device), crate::machine::tests::none());
    let bench =
        Bench { fixtures, instruments, card: None, rounds: 1, samples: 1, ceiling: 64 << 10, sample_ms: 0.0 };
    let (rows, end) = bench.rows(&chosen).unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row.name.as_str()).collect();
    assert_eq!(names, ["read ceiling", "norm", "target: o"]);
    let Err(Error::Memory(reason)) = end else { panic!("{end:?}") };
    assert!(reason.starts_with("target: lm_head {\"rows\":1}: not enough"), "{reason}");
}
