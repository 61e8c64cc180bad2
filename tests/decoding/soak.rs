//! Hundreds of requests of all kinds on one decoder, in few pages: each answer is the one it has alone.

use crate::support;
use crate::support::crowd;

use crowd::*;
use dflash::cpu::decoder::Sequences;
use dflash::cpu::model::{Drafter, Target};
use dflash::engine::generate::{Decoder, Finish, Flow, Outcome, Request};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use dflash::gpu::emulator::Emulator;
use dflash::spec::sampling::SamplingParams;

const REQUESTS: usize = 200;
const POSITIONS: usize = 201;

/// A request, and after how many tokens its listener has enough.
fn random(random: &mut support::Random) -> (Request, Option<usize>) {
    let length = match random.below(8) {
        0 => 1 + random.below(200),
        1 => 190 + random.below(11),
        _ => 1 + random.below(24),
    };
    let prompt = (0..length).map(|_| random.below(4) as u32).collect();
    let most = [12, 12, 60][random.below(3)];
    let max_tokens = random.below(most + 1);
    let sampling = SamplingParams {
        temperature: [0.0, 0.0, 0.6, 1.0, 2.0][random.below(5)],
        top_k: [0, 0, 2, 3][random.below(4)],
        top_p: [1.0, 1.0, 0.9, 0.5][random.below(4)],
        min_p: [0.0, 0.0, 0.1, 0.4][random.below(4)],
        seed: random.next() % 3,
        stream: random.below(1000) as u32,
    };
    // Ids that the model does not have, so that those it has stand anywhere in the list.
    let stop_ids = (0..random.below(4) * 5).map(|_| random.below(60) as u32).collect();
    let block = [1, 2, 3, 5, 8, 13, 16, 16][random.below(8)];
    let patience = (random.below(4) == 0).then(|| 1 + random.below(12));
    (Request { prompt, max_tokens, sampling, stop_ids, block, spec: Default::default() }, patience)
}

fn requests() -> (Vec<Request>, Vec<Option<usize>>) {
    let mut source = support::Random::new(5);
    (0..REQUESTS).map(|_| random(&mut source)).unzip()
}

/// What every request has alone.
fn alone(patience: &[Option<usize>], index: usize, decoder: &mut dyn Decoder, request: &Request) -> Outcome {
    let reply = |_, event| patient(patience[index], event);
    together(decoder, std::slice::from_ref(request), reply).remove(0)
}

fn patient(patience: Option<usize>, event: Event) -> dflash::Result<Flow> {
    Ok(if patience.map(Event::Token) == Some(event) { Flow::Stop } else { Flow::Continue })
}

/// Whether the requests are of all kinds that this is about.
fn check_kinds(expected: &[Outcome], patience: &[Option<usize>]) {
    let count = |kind: &dyn Fn(&Outcome) -> bool| expected.iter().filter(|o| kind(o)).count();
    let patient = expected.iter().zip(patience).filter(|(o, p)| Some(o.tokens.len()) == **p).count();
    let counts = [
        ("stop", count(&|o| o.finish == Finish::Stop)),
        ("stopped late", count(&|o| o.finish == Finish::Stop && o.tokens.len() > 5)),
        ("length", count(&|o| o.finish == Finish::Length)),
        ("context", count(&|o| o.finish == Finish::Context)),
        ("ended by a listener", patient),
        ("rounds of many tokens", count(&|o| o.accepted.iter().any(|&n| n > 4))),
        ("ends within a round", count(&|o| o.accepted.iter().sum::<usize>() >= o.tokens.len().max(1))),
    ];
    println!("{counts:?}");
    assert!(counts.iter().all(|(_, n)| *n >= 8), "too few of a kind to prove much: {counts:?}");
    assert_eq!(count(&|o| o.finish == Finish::Interrupted), 0);
}

#[test]
fn requests_on_the_emulator_are_answered_as_alone_and_give_all_back() {
    let folder = support::write_pair(&tiny().0, &tiny().1);
    let pair = open(&folder);
    let device = Emulator::new();
    {
        let models = Models::load(&device, &pair, POSITIONS).unwrap();
        let loaded = device.allocated();
        let (requests, patience) = requests();
        let mut single = Batch::new(&device, &models, BatchConfig::new(1, 16, POSITIONS)).unwrap();
        let expected: Vec<Outcome> =
            requests.iter().enumerate().map(|(i, r)| alone(&patience, i, &mut single, r)).collect();
        drop(single);
        check_kinds(&expected, &patience);
        // A sequence takes up to 4 pages.
        for (slots, pages, count) in [(1, 4, 30), (3, 7, 60), (8, 15, REQUESTS)] {
            let room = BatchConfig { pages, ..BatchConfig::new(slots, 16, POSITIONS) };
            let mut batch = Batch::new(&device, &models, room).unwrap();
            let outcomes = together(&mut batch, &requests[..count], |i, event| patient(patience[i], event));
            for (i, (outcome, expected)) in outcomes.iter().zip(&expected).enumerate() {
                assert_eq!(
                    answer(outcome),
                    answer(expected),
                    "request {i} in {slots} slots: {:?}",
                    requests[i]
                );
            }
            assert_eq!(batch.free_pages(), pages, "all pages are back");
            drop(batch);
            let now = device.allocated();
            assert_eq!((now.buffers, now.bytes), (loaded.buffers, loaded.bytes));
        }
    }
    let now = device.allocated();
    assert_eq!((now.buffers, now.bytes), (0, 0));
}

#[test]
fn requests_on_the_cpu_are_answered_as_alone() {
    let folder = support::write_pair(&tiny().0, &tiny().1);
    let pair = open(&folder);
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter.as_ref().unwrap()).unwrap();
    let (requests, patience) = requests();
    let sequences = |slots| Sequences::new(&target, Some(&drafter), slots, POSITIONS);
    let expected: Vec<Outcome> =
        requests.iter().enumerate().map(|(i, r)| alone(&patience, i, &mut sequences(1), r)).collect();
    check_kinds(&expected, &patience);
    for slots in [1, 3, 8] {
        let outcomes = together(&mut sequences(slots), &requests, |i, event| patient(patience[i], event));
        for (i, (outcome, expected)) in outcomes.iter().zip(&expected).enumerate() {
            assert_eq!(answer(outcome), answer(expected), "request {i} in {slots} slots: {:?}", requests[i]);
        }
    }
}
