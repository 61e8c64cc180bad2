//! What a captured round may rely on: nothing that changes between rounds is in its arguments, and a replay does what the
//! same launches do when they are asked for one by one.

use crate::support::{kernel, requests};

use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::{DEMO_DRAFTER, DEMO_TARGET};
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

/// Chains that match and autoregressive decoding; in a room for all also trees and drafts that are drawn. The second request of a
/// slot joins when the first has emitted all it may.
fn requests(all: bool) -> [[Request; 2]; SLOTS] {
    let oracle: serde_json::Value = serde_json::from_str(include_str!("../data/oracle.json")).unwrap();
    let request = |held: usize, length: usize, max_tokens: usize, block: usize, temperature: f32| {
        let ids = oracle["prompts"][held]["prompt_ids"].as_array().unwrap();
        let sampling = SamplingParams { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 11, stream: 2 };
        let prompt = ids[ids.len() - length..].iter().map(|id| id.as_u64().unwrap() as u32).collect();
        Request { prompt, max_tokens, sampling, stop_ids: vec![0], block, spec: Default::default() }
    };
    let mut requests = [
        [request(4, 128, 18, 16, 0.0), request(36, 60, 12, 7, 0.0)],
        [request(33, 64, 9, 3, 0.0), request(1, 1, 12, 16, 0.9)],
        [request(9, 128, 2, 1, 0.0), request(12, 33, 16, 1, 0.0)],
    ];
    if all {
        requests[0][0].spec = requests::spec(VerifyMethod::Match, 0.0, Some(20));
        requests[0][1].spec = requests::spec(VerifyMethod::Block, 0.8, None);
        requests[1][0].spec = requests::spec(VerifyMethod::Match, 0.0, Some(32));
        requests[1][1].spec = requests::spec(VerifyMethod::Rejection, 0.8, None);
    }
    requests
}

fn drawn(request: &Request) -> bool {
    request.block > 1 && request.spec.samples_drafts()
}

/// Who is in a slot.
#[derive(Default)]
struct Seat {
    /// The slot's requests that have begun.
    begun: usize,
    tokens: Vec<u32>,
    running: bool,
}

struct Drive {
    requests: [[Request; 2]; SLOTS],
    seats: [Seat; SLOTS],
}

impl Drive {
    fn new(all: bool) -> Drive {
        Drive { requests: requests(all), seats: Default::default() }
    }

    fn running(&self) -> impl Iterator<Item = (usize, &Request)> {
        let seats = self.seats.iter().enumerate().filter(|(_, seat)| seat.running);
        seats.map(|(slot, seat)| (slot, &self.requests[slot][seat.begun - 1]))
    }

    /// Whoever has ended leaves, and who is next joins, in all of `batches` alike; slots begin three rounds apart. False when
    /// all is done.
    fn change(&mut self, batches: &mut [Batch], round: usize, keep: bool) -> bool {
        for (slot, seat) in self.seats.iter_mut().enumerate() {
            if seat.running {
                let request = &self.requests[slot][seat.begun - 1];
                let stopped = seat.tokens.iter().any(|id| request.stop_ids.contains(id));
                if seat.tokens.len() < request.max_tokens && !stopped {
                    continue;
                }
                batches.iter_mut().for_each(|batch| batch.release(slot, seat.tokens.len()).unwrap());
                seat.running = false;
            }
            if round < 3 * slot || seat.begun == 2 {
                continue;
            }
            let request = &self.requests[slot][seat.begun];
            let mut first = batches.iter_mut().map(|batch| {
                assert!(batch.admit(slot, request, keep).unwrap().is_some());
                std::iter::repeat_with(|| batch.prefill(slot).unwrap().next).find_map(|next| next).unwrap()
            });
            let token = first.next().unwrap();
            assert!(first.all(|other| other == token));
            *seat = Seat { begun: seat.begun + 1, tokens: vec![token], running: true };
        }
        round < 3 * SLOTS || self.running().count() > 0
    }

    /// A round of `batch`.
    fn round(&mut self, batch: &mut Batch) {
        if self.running().count() == 0 {
            return;
        }
        let mut out = vec![Emitted::default(); SLOTS];
        batch.round(&mut out).unwrap();
        for (seat, emitted) in self.seats.iter_mut().zip(out) {
            seat.tokens.extend(emitted.tokens);
        }
    }

    /// What the next round must be.
    fn shape(&self, batch: &Batch) -> RoundShape {
        let highest = self.running().last().map_or(0, |(slot, _)| slot + 1);
        let drafting = self.running().any(|(_, request)| request.block > 1);
        let drawn = self.running().any(|(_, request)| drawn(request));
        let sampled = drawn || self.running().any(|(_, request)| request.sampling.temperature != 0.0);
        let drafter = if drafting { DrafterMode::Draft } else { DrafterMode::Idle };
        let kind = |s: &RoundShape| (s.drafter, s.sampled, s.sampled_drafts);
        let fits = |s: &RoundShape| s.sequences >= highest && kind(s) == (drafter, sampled, drawn);
        batch.graphs().iter().map(|(shape, _)| *shape).find(fits).unwrap()
    }
}

fn batch<'a>(device: &'a dyn Device, models: &'a Models, all: bool) -> Batch<'a> {
    let room = BatchConfig::new(SLOTS, BLOCK, POSITIONS);
    let room = if all { BatchConfig { draft_probs: true, ..room.with_trees(32) } } else { room };
    Batch::new(device, models, room).unwrap()
}

fn models(device: &dyn Device) -> Models {
    let pair = Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap();
    Models::load(device, &pair, POSITIONS).unwrap()
}

/// `test` of a room for chains that match, and of one for all.
fn every_device_of_both(test: impl Fn(&dyn Device, bool)) {
    [false, true].into_iter().for_each(|all| every_device(|device| test(device, all)));
}

#[test]
fn a_round_captured_in_the_middle_of_generations_is_the_one_captured_at_first() {
    every_device_of_both(|device, all| {
        let models = models(device);
        let mut batches = [batch(device, &models, all)];
        let mut drive = Drive::new(all);
        let (mut round, mut lengths) = (0, vec![]);
        while drive.change(&mut batches, round, true) {
            drive.round(&mut batches[0]);
            round += 1;
            lengths.push(drive.seats.iter().map(|seat| seat.tokens.len()).collect::<Vec<_>>());
            for (shape, graph) in batches[0].graphs() {
                let again = batches[0].capture(*shape).unwrap();
                assert_eq!(again.nodes.len(), graph.nodes.len());
                for (i, (now, then)) in again.nodes.iter().zip(&graph.nodes).enumerate() {
                    assert_eq!(now, then, "step {i} of {shape:?} after {round} rounds");
                }
            }
        }
        // Rounds brought different numbers of tokens, and every request began.
        let steps = lengths.windows(2).flat_map(|w| (0..SLOTS).map(|s| w[1][s].wrapping_sub(w[0][s])));
        let mut steps: Vec<usize> = steps.filter(|&step| (1..=BLOCK).contains(&step)).collect();
        steps.sort_unstable();
        steps.dedup();
        assert!(steps.len() >= 4, "{steps:?}");
        assert!(drive.seats.iter().all(|seat| seat.begun == 2 && !seat.running));
    });
}

/// Pointers of a launch, in order.
fn buffers(node: &Node) -> Vec<&Buffer> {
    let Node::Launch(launch) = node else { panic!("a round copies nothing: {node:?}") };
    launch
        .args
        .iter()
        .filter_map(|arg| if let Arg::Buffer(buffer) = arg { Some(buffer) } else { None })
        .collect()
}

/// As [`buffers`], but for the one that says where the caches are.
fn data(node: &Node) -> impl Iterator<Item = &Buffer> {
    let Node::Launch(launch) = node else { panic!("a round copies nothing: {node:?}") };
    buffers(node).into_iter().skip(usize::from(launch.kernel.name == "compact"))
}

/// Rounds that have begun on the device: the first word of the clock, argument 6 of `round_begin`.
fn rounds(device: &dyn Device, batch: &Batch) -> u32 {
    download::<u32>(device, buffers(&batch.graphs()[0].1.nodes[0])[6])[0]
}

#[test]
fn replays_leave_the_bits_of_fresh_launches() {
    every_device_of_both(|device, every| {
        let models = models(device);
        let mut batches = [batch(device, &models, every), batch(device, &models, every)];
        let mut drive = Drive::new(every);
        let (mut round, mut seen) = (0, vec![]);
        // What two batches have of their own, by its place in the graph of all.
        let (all, last) = {
            let [replayed, launched] = &batches;
            let pairs = |first: &[Node], second: &[Node]| {
                let pairs = first.iter().zip(second);
                let pairs = pairs.flat_map(|(a, b)| data(a).zip(data(b)));
                let mut own: Vec<(Buffer, Buffer)> = pairs.map(|(a, b)| (a.clone(), b.clone())).collect();
                own.sort_by_key(|(a, _)| (a.address(), a.bytes()));
                own.dedup();
                own.retain(|(a, b)| a != b);
                own
            };
            let [first, second] = [replayed, launched].map(|b| &b.graphs().last().unwrap().1.nodes);
            let end = first.len() - 1;
            (pairs(first, second), pairs(&first[end..], &second[end..]))
        };
        // The states, the ring, the clock, the verdict, the tokens and their spans.
        assert!(last.len() == 8 && all.len() > 60, "{} {}", last.len(), all.len());
        while drive.change(&mut batches, round, false) {
            let shape = drive.shape(&batches[1]);
            drive.round(&mut batches[0]);
            round += 1;
            while rounds(device, &batches[1]) < rounds(device, &batches[0]) {
                let nodes = &batches[1].graphs().iter().find(|(other, _)| *other == shape).unwrap().1.nodes;
                for node in nodes {
                    let Node::Launch(l) = node else { panic!("a round copies nothing: {node:?}") };
                    device.launch(l.kernel, l.grid, l.shared, &l.args).unwrap();
                }
                seen.push(shape);
            }
            // A GPU's memory holds anything where nobody wrote, so that only results can be compared.
            let everything = device.properties().name == "emulator" && round % 5 == 0;
            for (a, b) in if everything { &all } else { &last } {
                assert!(bytes_of(device, a) == bytes_of(device, b), "{a:?} after {round} rounds");
            }
        }
        let any = |of: fn(&RoundShape) -> bool| seen.iter().any(of);
        assert!(any(|s| !s.drafts()) && any(|s| s.drafts() && s.sampled), "{seen:?}");
        assert!(any(|s| s.sequences == 1) && any(|s| s.sequences == 3), "{seen:?}");
        assert_eq!(any(|s| s.sampled_drafts), every, "{seen:?}");
    });
}
