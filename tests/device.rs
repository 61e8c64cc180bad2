//! Generations through the kernels under the emulator: the device's rounds against the reference's tokens, and DFlash
//! against plain decoding, token for token.

mod support;

use dflash::device::{Device, Node};
use dflash::emulator::Emulator;
use dflash::engine::{Decoder, Finish, Flow, Listener, Outcome, Request, generate};
use dflash::pair::Pair;
use dflash::reference::{Drafter, Sequence, Target};
use dflash::rounds::{Batch, Limits, Models, Single};
use dflash::verify::Sampling;
use dflash::weights::{DEMO_DRAFTER, DEMO_TARGET};

const POSITIONS: usize = 512;

struct Silent;

impl Listener for Silent {
    fn token(&mut self, _id: u32, _drafted: bool) -> dflash::Result<Flow> {
        Ok(Flow::Continue)
    }
}

fn demo() -> Pair {
    Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap()
}

fn emulator() -> Emulator {
    let device = Emulator::new();
    device.set_threads(2);
    device
}

fn request(prompt: &[u32], max_tokens: usize, block: usize, temperature: f32) -> Request {
    let sampling = Sampling { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 7, stream: 3 };
    Request { prompt: prompt.to_vec(), max_tokens, sampling, stop_ids: vec![0], block }
}

fn run(decoder: &mut dyn Decoder, request: &Request) -> Outcome {
    generate(decoder, request, &mut Silent).unwrap()
}

/// The held-out prompts of the demo pair, as tokens.
fn prompts() -> Vec<Vec<u32>> {
    let oracle: serde_json::Value = serde_json::from_str(include_str!("data/oracle.json")).unwrap();
    let list = oracle["prompts"].as_array().or(oracle.as_array()).expect("a list of prompts");
    let ids = |p: &serde_json::Value| {
        p["prompt_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
    };
    list.iter().map(ids).collect()
}

#[test]
fn greedy_tokens_on_the_device_equal_the_reference() {
    let (pair, device) = (demo(), emulator());
    let models = Models::load(&device, &pair, POSITIONS).unwrap();
    let mut single = Single::new(&device, &models, 16, POSITIONS).unwrap();
    let target = Target::load(&pair.target).unwrap();
    let drafter = Drafter::load(pair.drafter.as_ref().unwrap()).unwrap();
    let (mut same, mut rounds, mut tokens) = (0, [0usize; 2], [0usize; 2]);
    for prompt in prompts().iter().take(8) {
        let request = request(prompt, 32, 16, 0.0);
        let own = run(&mut single, &request);
        let reference = run(&mut Sequence::new(&target, Some(&drafter)), &request);
        same += usize::from(own.tokens == reference.tokens);
        for (i, outcome) in [&own, &reference].iter().enumerate() {
            rounds[i] += outcome.accepted.len();
            tokens[i] += outcome.tokens.len();
        }
    }
    eprintln!("{same} of 8; tokens {tokens:?} in rounds {rounds:?}");
    assert_eq!(same, 8);
}

#[test]
fn dflash_on_the_device_equals_plain_decoding_on_the_device() {
    let (pair, device) = (demo(), emulator());
    let models = Models::load(&device, &pair, POSITIONS).unwrap();
    for temperature in [0.0, 0.8] {
        for prompt in prompts().iter().take(3) {
            let mut plain = Single::new(&device, &models, 1, POSITIONS).unwrap();
            let expected = run(&mut plain, &request(prompt, 24, 1, temperature));
            for block in [2, 7, 16] {
                let mut single = Single::new(&device, &models, block, POSITIONS).unwrap();
                let own = run(&mut single, &request(prompt, 24, block, temperature));
                assert_eq!(own.tokens, expected.tokens, "block {block}, temperature {temperature}");
                assert_eq!(own.finish, expected.finish);
            }
        }
    }
}
