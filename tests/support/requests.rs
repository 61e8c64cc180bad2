//! Helpers of decoding tests: requests that run alone or together, token sinks whose replies the test
//! chooses, speculation configs, and a pair so small that the software GPU runs it in milliseconds.

use crate::support;
pub use crate::support::exhaustive;
use dflash::Result;
use dflash::engine::generate::{
    Decoder, Finish, Flow, Outcome, Request, TokenSink, TokenSinks, generate, generate_all,
};
use dflash::spec::config::{BlockDrafts, ExactDrafts, RejectionDrafts, SpecConfig, VerifyMethod};
use dflash::spec::draft_length::DraftLengthPolicy;
use dflash::spec::sampling::SamplingParams;

/// What a sink receives: `Prompt(done)` tokens of the prompt, `Token(number)` of the answer, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Prompt(usize),
    Token(usize),
}

/// Receives the events of all requests, replies as `reply` does, and compares outcomes with the received
/// tokens.
pub struct BatchRecorder<F> {
    pub outcomes: Vec<Option<Outcome>>,
    received: Vec<Vec<u32>>,
    index: usize,
    reply: F,
}

impl<F: FnMut(usize, Event) -> Result<Flow>> BatchRecorder<F> {
    pub fn new(requests: usize, reply: F) -> BatchRecorder<F> {
        BatchRecorder { outcomes: vec![None; requests], received: vec![vec![]; requests], index: 0, reply }
    }

    /// Tokens received so far, of all requests.
    pub fn tokens_received(&self) -> usize {
        self.received.iter().map(Vec::len).sum()
    }
}

impl<F: FnMut(usize, Event) -> Result<Flow>> TokenSink for BatchRecorder<F> {
    fn prefill(&mut self, done: usize) -> Flow {
        (self.reply)(self.index, Event::Prompt(done)).unwrap()
    }

    fn token(&mut self, id: u32, _drafted: bool) -> Result<Flow> {
        let received = &mut self.received[self.index];
        received.push(id);
        (self.reply)(self.index, Event::Token(received.len()))
    }
}

impl<F: FnMut(usize, Event) -> Result<Flow>> TokenSinks for BatchRecorder<F> {
    fn sink(&mut self, index: usize) -> Result<&mut dyn TokenSink> {
        self.index = index;
        Ok(self)
    }

    fn done(&mut self, index: usize, outcome: Outcome) -> Result<Flow> {
        assert_eq!(outcome.tokens, self.received[index], "request {index} received other tokens");
        let flow = if outcome.finish == Finish::Interrupted { Flow::Interrupt } else { Flow::Continue };
        assert!(self.outcomes[index].replace(outcome).is_none(), "request {index} ended twice");
        Ok(flow)
    }
}

pub fn keep_going(_: usize, _: Event) -> Result<Flow> {
    Ok(Flow::Continue)
}

/// Accepts every token.
pub struct AcceptAll;

impl TokenSink for AcceptAll {
    fn token(&mut self, _id: u32, _drafted: bool) -> Result<Flow> {
        Ok(Flow::Continue)
    }
}

/// Runs the request alone, to its end.
pub fn run(decoder: &mut dyn Decoder, request: &Request) -> Outcome {
    generate(decoder, request, &mut AcceptAll).unwrap()
}

/// Runs all requests together, to their ends or to where `reply` ends them.
pub fn run_together(
    decoder: &mut dyn Decoder,
    requests: &[Request],
    reply: impl FnMut(usize, Event) -> Result<Flow>,
) -> Vec<Outcome> {
    let mut recorder = BatchRecorder::new(requests.len(), reply);
    generate_all(decoder, requests, &mut recorder).unwrap();
    recorder.outcomes.into_iter().map(Option::unwrap).collect()
}

/// The parts of an outcome that do not depend on time.
pub fn answer(outcome: &Outcome) -> (&[u32], Finish, &[usize]) {
    (&outcome.tokens, outcome.finish, &outcome.accepted)
}

/// A request without stop ids, with seed 7.
pub fn request(prompt: &[u32], max_tokens: usize, block: usize, temperature: f32) -> Request {
    seeded(prompt, max_tokens, block, temperature, 7)
}

pub fn seeded(prompt: &[u32], max_tokens: usize, block: usize, temperature: f32, seed: u64) -> Request {
    let sampling = SamplingParams { temperature, top_k: 0, top_p: 1.0, min_p: 0.0, seed, stream: 3 };
    Request {
        prompt: prompt.to_vec(),
        max_tokens,
        sampling,
        stop_ids: vec![],
        block,
        spec: Default::default(),
    }
}

/// Chains, or trees of up to `tree` rows, verified by this method, with drafts sampled at this temperature.
/// Exact trees are best-first, and exact chains at temperature 0 hold the best tokens.
pub fn spec(method: VerifyMethod, temperature: f32, tree: Option<usize>) -> SpecConfig {
    let sampling = SamplingParams { temperature, ..SamplingParams::default() };
    let length = DraftLengthPolicy::Full;
    match (method, tree) {
        (VerifyMethod::Match, Some(rows)) => {
            SpecConfig::Exact { drafts: ExactDrafts::BestFirstTree { rows }, length }
        }
        (VerifyMethod::Match, None) if temperature == 0.0 => SpecConfig::default(),
        (VerifyMethod::Match, None) => {
            SpecConfig::Exact { drafts: ExactDrafts::CoupledChain(sampling), length }
        }
        (VerifyMethod::Rejection, None) => {
            SpecConfig::Rejection { drafts: RejectionDrafts::Chain { length }, sampling }
        }
        (VerifyMethod::Rejection, Some(rows)) => {
            SpecConfig::Rejection { drafts: RejectionDrafts::Tree { rows }, sampling }
        }
        (VerifyMethod::Block, None) => SpecConfig::Block { drafts: BlockDrafts::Chain { length }, sampling },
        (VerifyMethod::Block, Some(rows)) => {
            SpecConfig::Block { drafts: BlockDrafts::Chains { rows }, sampling }
        }
    }
}

/// The same config with drafts sampled from the `k` best tokens, if it samples drafts.
pub fn with_top_k(spec: &SpecConfig, k: usize) -> SpecConfig {
    let sampling = spec.draft_sampling().cloned().unwrap_or_default();
    spec.clone().with_draft_sampling(SamplingParams { top_k: k, ..sampling })
}

/// The same config with this draft-length policy, if its drafts have one.
pub fn with_length(spec: &SpecConfig, policy: DraftLengthPolicy) -> SpecConfig {
    let mut spec = spec.clone();
    match &mut spec {
        SpecConfig::Exact { length, .. }
        | SpecConfig::Rejection { drafts: RejectionDrafts::Chain { length }, .. }
        | SpecConfig::Block { drafts: BlockDrafts::Chain { length }, .. } => *length = policy,
        _ => {}
    }
    spec
}

/// The prompts with recorded answers of the reference implementation.
pub fn reference_prompts() -> Vec<Vec<u32>> {
    let oracle: serde_json::Value = serde_json::from_str(include_str!("../data/oracle.json")).unwrap();
    let ids = |id: &serde_json::Value| id.as_u64().unwrap() as u32;
    let prompt =
        |prompt: &serde_json::Value| prompt["prompt_ids"].as_array().unwrap().iter().map(ids).collect();
    oracle["prompts"].as_array().unwrap().iter().map(prompt).collect()
}

/// The smallest pair that the kernels support. Its vocabulary is so small that drafts of a random drafter are
/// often accepted.
pub fn tiny() -> (support::Target, support::Drafter) {
    let target = support::Target {
        hidden: 64,
        intermediate: 32,
        layers: 2,
        heads: 1,
        kv_heads: 1,
        head_dim: 64,
        vocab: 4,
        tied: false,
        eos: vec![],
        ..Default::default()
    };
    let drafter = support::Drafter {
        intermediate: 32,
        layers: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 64,
        taps: vec![0],
        block: 16,
        ..Default::default()
    };
    (target, drafter)
}

/// Opens a written pair.
pub fn open(pair: &support::Pair) -> dflash::checkpoint::pair::Pair {
    dflash::checkpoint::pair::Pair::open(support::disk(&pair.target), Some(support::disk(&pair.drafter)))
        .unwrap()
}
