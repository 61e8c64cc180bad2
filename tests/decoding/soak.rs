//! Many requests of all kinds on one decoder with few pages: each answer equals the answer of the request
//! alone.

use crate::support;
use crate::support::requests;

use crate::support::test_gpu::TestGpu;
use dflash::cpu::decoder::Sequences;
use dflash::cpu::model::{Drafter, Target};
use dflash::engine::generate::{Decoder, Finish, Flow, Outcome, Request};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use dflash::spec::sampling::SamplingParams;
use requests::*;

const POSITIONS: usize = 201;

/// A request, and the number of tokens after which its sink stops it.
fn random(random: &mut support::Random) -> (Request, Option<usize>) {
    let length = match random.below(8) {
        0 => 1 + random.below(200),
        1 => 190 + random.below(11),
        _ => 1 + random.below(24),
    };
    let prompt = (0..length).map(|_| random.below(4) as u32).collect();
    let max = [12, 12, 40][random.below(3)];
    let max_tokens = random.below(max + 1);
    let sampling = SamplingParams {
        temperature: [0.0, 0.0, 0.6, 1.0, 2.0][random.below(5)],
        top_k: [0, 0, 2, 3][random.below(4)],
        top_p: [1.0, 1.0, 0.9, 0.5][random.below(4)],
        min_p: [0.0, 0.0, 0.1, 0.4][random.below(4)],
        seed: random.next() % 3,
        stream: random.below(1000) as u32,
    };
    // Most ids are not in the vocabulary, so that an id of the vocabulary can be anywhere in the list.
    let stop_ids = (0..random.below(4) * 5).map(|_| random.below(60) as u32).collect();
    let block = [1, 2, 3, 5, 8, 13, 16, 16][random.below(8)];
    let stop_after = (random.below(4) == 0).then(|| 1 + random.below(12));
    (Request { prompt, max_tokens, sampling, stop_ids, block, spec: Default::default() }, stop_after)
}

fn requests(count: usize) -> (Vec<Request>, Vec<Option<usize>>) {
    let mut source = support::Random::new(5);
    (0..count).map(|_| random(&mut source)).unzip()
}

/// The answer to a request alone.
fn alone(
    stop_after: &[Option<usize>],
    index: usize,
    decoder: &mut dyn Decoder,
    request: &Request,
) -> Outcome {
    let reply = |_, event| stops(stop_after[index], event);
    run_together(decoder, std::slice::from_ref(request), reply).remove(0)
}

fn stops(stop_after: Option<usize>, event: Event) -> dflash::Result<Flow> {
    Ok(if stop_after.map(Event::Token) == Some(event) { Flow::Stop } else { Flow::Continue })
}

/// Checks that every kind of request and of ending that this test is about occurs in at least 4 % of the
/// requests.
fn check_kinds(expected: &[Outcome], stop_after: &[Option<usize>]) {
    let number_of = |kind: &dyn Fn(&Outcome) -> bool| expected.iter().filter(|o| kind(o)).count();
    let stopped = expected.iter().zip(stop_after).filter(|(o, p)| Some(o.tokens.len()) == **p).count();
    let counts = [
        ("stop", number_of(&|o| o.finish == Finish::Stop)),
        ("stopped late", number_of(&|o| o.finish == Finish::Stop && o.tokens.len() > 5)),
        ("length", number_of(&|o| o.finish == Finish::Length)),
        ("context", number_of(&|o| o.finish == Finish::Context)),
        ("ended by the sink", stopped),
        ("rounds of many tokens", number_of(&|o| o.accepted.iter().any(|&n| n > 4))),
        ("ends within a round", number_of(&|o| o.accepted.iter().sum::<usize>() >= o.tokens.len().max(1))),
    ];
    println!("{counts:?}");
    let least = expected.len() / 25;
    assert!(counts.iter().all(|(_, n)| *n >= least), "less than {least} of a kind: {counts:?}");
    assert_eq!(number_of(&|o| o.finish == Finish::Interrupted), 0);
}

#[test]
fn requests_on_a_device_answer_as_alone_and_free_all_memory() {
    let folder = support::write_pair(&tiny().0, &tiny().1);
    let pair = open(&folder);
    let device = TestGpu::new();
    {
        let models = Models::load(&device, &pair, POSITIONS).unwrap();
        let loaded = device.allocated();
        let count = if requests::exhaustive() { 200 } else { 25 };
        let (requests, stop_after) = requests(count);
        let mut single = Batch::new(&device, &models, BatchConfig::new(1, 16, POSITIONS)).unwrap();
        let expected: Vec<Outcome> =
            requests.iter().enumerate().map(|(i, r)| alone(&stop_after, i, &mut single, r)).collect();
        drop(single);
        check_kinds(&expected, &stop_after);
        // A sequence takes up to 4 pages.
        for (slots, pages, count) in [(1, 4, 3), (3, 7, 8), (8, 15, count)] {
            let config = BatchConfig { pages, ..BatchConfig::new(slots, 16, POSITIONS) };
            let mut batch = Batch::new(&device, &models, config).unwrap();
            let outcomes =
                run_together(&mut batch, &requests[..count], |i, event| stops(stop_after[i], event));
            for (i, (outcome, expected)) in outcomes.iter().zip(&expected).enumerate() {
                assert_eq!(
                    answer(outcome),
                    answer(expected),
                    "request {i} in {slots} slots: {:?}",
                    requests[i]
                );
            }
            assert_eq!(batch.free_pages(), pages, "all pages are free again");
            drop(batch);
            let now = device.allocated();
            assert_eq!((now.buffers, now.bytes), (loaded.buffers, loaded.bytes));
        }
    }
    let now = device.allocated();
    assert_eq!((now.buffers, now.bytes), (0, 0));
}

#[test]
fn requests_on_the_cpu_answer_as_alone() {
    let folder = support::write_pair(&tiny().0, &tiny().1);
    let pair = open(&folder);
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter().unwrap()).unwrap();
    let (requests, stop_after) = requests(if requests::exhaustive() { 200 } else { 120 });
    let sequences = |slots| Sequences::new(&target, Some(&drafter), slots, POSITIONS);
    let expected: Vec<Outcome> =
        requests.iter().enumerate().map(|(i, r)| alone(&stop_after, i, &mut sequences(1), r)).collect();
    check_kinds(&expected, &stop_after);
    for slots in [1, 3, 8] {
        let outcomes = run_together(&mut sequences(slots), &requests, |i, event| stops(stop_after[i], event));
        for (i, (outcome, expected)) in outcomes.iter().zip(&expected).enumerate() {
            assert_eq!(answer(outcome), answer(expected), "request {i} in {slots} slots: {:?}", requests[i]);
        }
    }
}
