//! Many requests on one decoder: a listener that says what a test wants, random requests, a pair that the kernels run in
//! no time.

use crate::support;
use dflash::Result;
use dflash::engine::generate::{
    Decoder, Finish, Flow, Outcome, Request, TokenSink, TokenSinks, generate, generate_all,
};
use dflash::spec::config::{BlockDrafts, ExactDrafts, RejectionDrafts, SpecConfig, VerifyMethod};
use dflash::spec::draft_length::DraftLengthPolicy;
use dflash::spec::sampling::SamplingParams;

/// What a listener hears of: `Prompt(done)`, `Token(number)` with numbers from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Prompt(usize),
    Token(usize),
}

/// Hears of all requests, answers as `reply` does, and holds outcomes against what was said.
pub struct BatchRecorder<F> {
    pub outcomes: Vec<Option<Outcome>>,
    heard: Vec<Vec<u32>>,
    index: usize,
    reply: F,
}

impl<F: FnMut(usize, Event) -> Result<Flow>> BatchRecorder<F> {
    pub fn new(requests: usize, reply: F) -> BatchRecorder<F> {
        BatchRecorder { outcomes: vec![None; requests], heard: vec![vec![]; requests], index: 0, reply }
    }

    /// Tokens said so far, of all requests.
    pub fn heard(&self) -> usize {
        self.heard.iter().map(Vec::len).sum()
    }
}

impl<F: FnMut(usize, Event) -> Result<Flow>> TokenSink for BatchRecorder<F> {
    fn prefill(&mut self, done: usize) -> Flow {
        (self.reply)(self.index, Event::Prompt(done)).unwrap()
    }

    fn token(&mut self, id: u32, _drafted: bool) -> Result<Flow> {
        let heard = &mut self.heard[self.index];
        heard.push(id);
        (self.reply)(self.index, Event::Token(heard.len()))
    }
}

impl<F: FnMut(usize, Event) -> Result<Flow>> TokenSinks for BatchRecorder<F> {
    fn sink(&mut self, index: usize) -> Result<&mut dyn TokenSink> {
        self.index = index;
        Ok(self)
    }

    fn done(&mut self, index: usize, outcome: Outcome) -> Result<Flow> {
        assert_eq!(outcome.tokens, self.heard[index], "request {index} heard something else");
        let flow = if outcome.finish == Finish::Interrupted { Flow::Interrupt } else { Flow::Continue };
        assert!(self.outcomes[index].replace(outcome).is_none(), "request {index} ended twice");
        Ok(flow)
    }
}

pub fn go_on(_: usize, _: Event) -> Result<Flow> {
    Ok(Flow::Continue)
}

/// Takes all that is said.
pub struct Silent;

impl TokenSink for Silent {
    fn token(&mut self, _id: u32, _drafted: bool) -> Result<Flow> {
        Ok(Flow::Continue)
    }
}

/// The request alone, to its end.
pub fn run(decoder: &mut dyn Decoder, request: &Request) -> Outcome {
    generate(decoder, request, &mut Silent).unwrap()
}

/// All requests to their ends, or to where `reply` ends them.
pub fn together(
    decoder: &mut dyn Decoder,
    requests: &[Request],
    reply: impl FnMut(usize, Event) -> Result<Flow>,
) -> Vec<Outcome> {
    let mut crowd = BatchRecorder::new(requests.len(), reply);
    generate_all(decoder, requests, &mut crowd).unwrap();
    crowd.outcomes.into_iter().map(Option::unwrap).collect()
}

/// What an answer is, whatever time it took.
pub fn answer(outcome: &Outcome) -> (&[u32], Finish, &[usize]) {
    (&outcome.tokens, outcome.finish, &outcome.accepted)
}

/// Without stop ids.
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

/// Chains, or trees of up to `tree` rows, verified by this method, with drafts sampled at this temperature. Exact trees
/// are best-first, and exact chains at temperature 0 hold the best tokens.
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

/// The same with drafts sampled among the `k` best tokens, where they are sampled.
pub fn with_top_k(spec: &SpecConfig, k: usize) -> SpecConfig {
    let sampling = spec.draft_sampling().cloned().unwrap_or_default();
    spec.clone().with_draft_sampling(SamplingParams { top_k: k, ..sampling })
}

/// The same with this draft length, where there may be one.
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

/// The prompts that the reference answered.
pub fn held() -> Vec<Vec<u32>> {
    let oracle: serde_json::Value = serde_json::from_str(include_str!("../data/oracle.json")).unwrap();
    let ids = |id: &serde_json::Value| id.as_u64().unwrap() as u32;
    let prompt = |held: &serde_json::Value| held["prompt_ids"].as_array().unwrap().iter().map(ids).collect();
    oracle["prompts"].as_array().unwrap().iter().map(prompt).collect()
}

/// As small as the kernels take, with so few tokens that a random drafter is often right.
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

pub fn open(pair: &support::Pair) -> dflash::checkpoint::pair::Pair {
    dflash::checkpoint::pair::Pair::open(support::disk(&pair.target), Some(support::disk(&pair.drafter)))
        .unwrap()
}
