//! Captured rounds: no argument of a launch changes between rounds, and a replay gives the bits of the same
//! launches one by one.

use crate::support::{kernel, requests};

use dflash::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use dflash::checkpoint::pair::Pair;
use dflash::engine::generate::{Decoder, Emitted, Request};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, DrafterMode, Models, RoundShape};
use dflash::gpu::device::{Arg, Buffer, Device, Node};
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::SamplingParams;
use kernel::*;

const POSITIONS: usize = 256;
const SLOTS: usize = 3;
const BLOCK: usize = 16;

/// Two requests per slot; the second is admitted when the first has ended. Exact verification of chains and
/// AR decoding; if `full`, also trees and sampled drafts.
fn requests(full: bool) -> [[Request; 2]; SLOTS] {
    let oracle: serde_json::Value = serde_json::from_str(include_str!("../data/oracle.json")).unwrap();
    let request = |index: usize, length: usize, max_tokens: usize, block: usize, temperature: f32| {
        let ids = oracle["prompts"][index]["prompt_ids"].as_array().unwrap();
        let sampling = SamplingParams { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 11, stream: 2 };
        let prompt = ids[ids.len() - length..].iter().map(|id| id.as_u64().unwrap() as u32).collect();
        Request { prompt, max_tokens, sampling, stop_ids: vec![0], block, spec: Default::default() }
    };
    let mut requests = [
        [request(4, 70, 12, 16, 0.0), request(36, 20, 8, 7, 0.0)],
        [request(33, 30, 6, 3, 0.0), request(1, 1, 8, 16, 0.9)],
        [request(9, 20, 2, 1, 0.0), request(12, 33, 5, 1, 0.0)],
    ];
    if full {
        requests[0][0].spec = requests::spec(VerifyMethod::Match, 0.0, Some(12));
        requests[0][1].spec = requests::spec(VerifyMethod::Block, 0.8, None);
        requests[1][0].spec = requests::spec(VerifyMethod::Match, 0.0, Some(20));
        requests[1][1].spec = requests::spec(VerifyMethod::Rejection, 0.8, None);
    }
    requests
}

fn samples_drafts(request: &Request) -> bool {
    request.block > 1 && request.spec.samples_drafts()
}

/// The state of a slot.
#[derive(Default)]
struct Slot {
    /// Number of the slot's requests that have begun.
    begun: usize,
    tokens: Vec<u32>,
    running: bool,
}

struct Driver {
    requests: [[Request; 2]; SLOTS],
    slots: [Slot; SLOTS],
}

impl Driver {
    fn new(full: bool) -> Driver {
        Driver { requests: requests(full), slots: Default::default() }
    }

    fn running(&self) -> impl Iterator<Item = (usize, &Request)> {
        let slots = self.slots.iter().enumerate().filter(|(_, state)| state.running);
        slots.map(|(slot, state)| (slot, &self.requests[slot][state.begun - 1]))
    }

    /// Releases requests that have ended and admits the next ones, in all of `batches`. Slots begin three
    /// rounds apart. Returns false when all requests are done.
    fn release_and_admit(&mut self, batches: &mut [Batch], round: usize, keep: bool) -> bool {
        for (slot, state) in self.slots.iter_mut().enumerate() {
            if state.running {
                let request = &self.requests[slot][state.begun - 1];
                let stopped = state.tokens.iter().any(|id| request.stop_ids.contains(id));
                if state.tokens.len() < request.max_tokens && !stopped {
                    continue;
                }
                batches.iter_mut().for_each(|batch| batch.release(slot, state.tokens.len()).unwrap());
                state.running = false;
            }
            if round < 3 * slot || state.begun == 2 {
                continue;
            }
            let request = &self.requests[slot][state.begun];
            let mut first = batches.iter_mut().map(|batch| {
                assert!(batch.admit(slot, request, keep).unwrap().is_some());
                std::iter::repeat_with(|| batch.prefill(slot).unwrap().next).find_map(|next| next).unwrap()
            });
            let token = first.next().unwrap();
            assert!(first.all(|other| other == token));
            *state = Slot { begun: state.begun + 1, tokens: vec![token], running: true };
        }
        round < 3 * SLOTS || self.running().count() > 0
    }

    /// Runs a round of `batch`.
    fn round(&mut self, batch: &mut Batch) {
        if self.running().count() == 0 {
            return;
        }
        let mut out = vec![Emitted::default(); SLOTS];
        batch.round(&mut out).unwrap();
        for (state, emitted) in self.slots.iter_mut().zip(out) {
            state.tokens.extend(emitted.tokens);
        }
    }

    /// The expected shape of the next round.
    fn shape(&self, batch: &Batch) -> RoundShape {
        let highest = self.running().last().map_or(0, |(slot, _)| slot + 1);
        let drafting = self.running().any(|(_, request)| request.block > 1);
        let sampled_drafts = self.running().any(|(_, request)| samples_drafts(request));
        let sampled =
            sampled_drafts || self.running().any(|(_, request)| request.sampling.temperature != 0.0);
        let drafter = if drafting { DrafterMode::Draft } else { DrafterMode::Idle };
        let kind = |s: &RoundShape| (s.drafter, s.sampled, s.sampled_drafts);
        let fits = |s: &RoundShape| s.sequences >= highest && kind(s) == (drafter, sampled, sampled_drafts);
        batch.graphs().iter().map(|(shape, _)| *shape).find(fits).unwrap()
    }
}

fn batch<'a>(device: &'a dyn Device, models: &'a Models, full: bool) -> Batch<'a> {
    let config = BatchConfig::new(SLOTS, BLOCK, POSITIONS);
    let config = if full { BatchConfig { draft_probs: true, ..config.with_trees(20) } } else { config };
    Batch::new(device, models, config).unwrap()
}

fn models(device: &dyn Device) -> Models {
    let pair = Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap();
    Models::load(device, &pair, POSITIONS).unwrap()
}

/// Runs `test` with a batch for exact chains, and with one for all methods (`full`).
fn every_batch(test: impl Fn(&dyn Device, bool)) {
    [false, true].into_iter().for_each(|full| on_gpu(|device| test(device, full)));
}

/// The batch for exact chains runs only with `DFLASH_EXHAUSTIVE=1`.
#[test]
fn a_round_captured_later_equals_the_first_capture() {
    every_batch(|device, full| {
        if !full && !exhaustive() {
            return;
        }
        let models = models(device);
        let mut batches = [batch(device, &models, full)];
        let mut driver = Driver::new(full);
        let (mut round, mut lengths) = (0, vec![]);
        while driver.release_and_admit(&mut batches, round, true) {
            driver.round(&mut batches[0]);
            round += 1;
            lengths.push(driver.slots.iter().map(|state| state.tokens.len()).collect::<Vec<_>>());
            // Every eighth round; exhaustive: every round.
            if round % 8 != 1 && !exhaustive() {
                continue;
            }
            for (shape, graph) in batches[0].graphs() {
                let again = batches[0].capture(*shape).unwrap();
                assert_eq!(again.nodes.len(), graph.nodes.len());
                for (i, (now, then)) in again.nodes.iter().zip(&graph.nodes).enumerate() {
                    assert_eq!(now, then, "step {i} of {shape:?} after {round} rounds");
                }
            }
        }
        // Rounds emitted different numbers of tokens, and every request began.
        let steps = lengths.windows(2).flat_map(|w| (0..SLOTS).map(|s| w[1][s].wrapping_sub(w[0][s])));
        let mut steps: Vec<usize> = steps.filter(|&step| (1..=BLOCK).contains(&step)).collect();
        steps.sort_unstable();
        steps.dedup();
        assert!(steps.len() >= 4, "{steps:?}");
        assert!(driver.slots.iter().all(|state| state.begun == 2 && !state.running));
    });
}

/// The buffer arguments of a launch, in order.
fn buffers(node: &Node) -> Vec<&Buffer> {
    let Node::Launch(launch) = node else { panic!("a round has only launches: {node:?}") };
    launch
        .args
        .iter()
        .filter_map(|arg| if let Arg::Buffer(buffer) = arg { Some(buffer) } else { None })
        .collect()
}

/// Like [`buffers`], without the table of the caches' addresses.
fn data(node: &Node) -> impl Iterator<Item = &Buffer> {
    let Node::Launch(launch) = node else { panic!("a round has only launches: {node:?}") };
    buffers(node).into_iter().skip(usize::from(launch.kernel.name == "compact"))
}

/// Number of rounds that have begun on the device: the first word of the round header, argument 6 of
/// `round_begin`.
fn rounds(device: &dyn Device, batch: &Batch) -> u32 {
    download::<u32>(device, buffers(&batch.graphs()[0].1.nodes[0])[6])[0]
}

/// The batch for all methods also runs exact chains and AR steps. The batch for exact chains runs only with
/// `DFLASH_EXHAUSTIVE=1`.
#[test]
fn replays_equal_fresh_launches_bit_for_bit() {
    every_batch(|device, full| {
        if !full && !exhaustive() {
            return;
        }
        let models = models(device);
        let mut batches = [batch(device, &models, full), batch(device, &models, full)];
        let mut driver = Driver::new(full);
        let (mut round, mut shapes) = (0, vec![]);
        // The buffers that differ between the two batches, by their position in the graph of the largest
        // round.
        let (all, last) = {
            let [replayed, launched] = &batches;
            let pairs = |first: &[Node], second: &[Node]| {
                let pairs = first.iter().zip(second);
                let pairs = pairs.flat_map(|(a, b)| data(a).zip(data(b)));
                let mut differing: Vec<(Buffer, Buffer)> =
                    pairs.map(|(a, b)| (a.clone(), b.clone())).collect();
                differing.sort_by_key(|(a, _)| (a.address(), a.bytes()));
                differing.dedup();
                differing.retain(|(a, b)| a != b);
                differing
            };
            let [first, second] = [replayed, launched].map(|b| &b.graphs().last().unwrap().1.nodes);
            let end = first.len() - 1;
            (pairs(first, second), pairs(&first[end..], &second[end..]))
        };
        // States, ring, round header, verification output (3), tokens and their spans.
        assert!(last.len() == 8 && all.len() > 60, "{} {}", last.len(), all.len());
        while driver.release_and_admit(&mut batches, round, false) {
            let shape = driver.shape(&batches[1]);
            driver.round(&mut batches[0]);
            round += 1;
            while rounds(device, &batches[1]) < rounds(device, &batches[0]) {
                let nodes = &batches[1].graphs().iter().find(|(other, _)| *other == shape).unwrap().1.nodes;
                for node in nodes {
                    let Node::Launch(l) = node else { panic!("a round has only launches: {node:?}") };
                    device.launch(l.kernel, l.grid, l.shared, &l.args).unwrap();
                }
                shapes.push(shape);
            }
            // Unwritten memory of a GPU is arbitrary, so there only results are compared.
            let everything = device.properties().software && round % 5 == 0;
            for (a, b) in if everything { &all } else { &last } {
                assert!(bytes_of(device, a) == bytes_of(device, b), "{a:?} after {round} rounds");
            }
        }
        let any = |of: fn(&RoundShape) -> bool| shapes.iter().any(of);
        assert!(any(|s| !s.drafts()) && any(|s| s.drafts() && s.sampled), "{shapes:?}");
        assert!(any(|s| s.sequences == 1) && any(|s| s.sequences == 3), "{shapes:?}");
        assert_eq!(any(|s| s.sampled_drafts), full, "{shapes:?}");
    });
}
