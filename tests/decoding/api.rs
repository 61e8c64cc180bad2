//! The library's iterator of tokens gives the same answer as `engine::generate`, round by round, on the CPU
//! and on a device.

use crate::support;
use crate::support::requests;

use dflash::checkpoint::pair::Lookup;
use dflash::engine::generate::{Flow, Outcome, Request, TokenSink, generate};
use dflash::spec::config::{ExactDrafts, SpecConfig};
use dflash::spec::draft_length::DraftLengthPolicy;
use dflash::spec::sampling::SamplingParams;
use dflash::text::tokenizer::Stream;
use dflash::{Content, DeviceChoice, Engine, EngineOptions, Error, Finish, Models, Params, Result};
use std::sync::LazyLock;

static DEMO: LazyLock<Engine> = LazyLock::new(|| {
    let options = EngineOptions::default().device(DeviceChoice::Cpu);
    Engine::open_with(Models::demo(), options).unwrap()
});

/// A tiny pair with random weights on the software GPU.
fn on_a_gpu() -> (support::Pair, Engine) {
    let (target, drafter) = requests::tiny();
    let pair = support::write_pair(&target, &drafter);
    crate::support::test_gpu::load_software_gpu();
    let options = EngineOptions::default().device(DeviceChoice::Cuda).context(128);
    let engine = Engine::open_with(Models::folders(&pair.target, &pair.drafter), options).unwrap();
    (pair, engine)
}

/// A sink that ends the answer at a stop string.
struct Stops<'a>(Stream<'a>);

impl TokenSink for Stops<'_> {
    fn token(&mut self, id: u32, _: bool) -> Result<Flow> {
        Ok(if self.0.push(id)?.1 { Flow::Stop } else { Flow::Continue })
    }
}

/// The outcome of the engine's own loop for the same request.
fn by_generate(engine: &Engine, prompt: &[u32], params: &Params) -> Outcome {
    let request = Request {
        prompt: prompt.to_vec(),
        max_tokens: params.max_tokens,
        sampling: params.sampling.clone(),
        stop_ids: params.stop_ids.clone().unwrap_or_else(|| engine.stop_ids().ids()),
        block: engine.pair().block(params.block).unwrap(),
        spec: params.spec.clone(),
    };
    let cpu = dflash::cpu::decoder::Cpu::load(engine.pair(), 1, engine.context()).unwrap();
    let mut decoder = dflash::engine::generate::Backend::decoder(&cpu).unwrap();
    let mut stops = Stops(engine.text().unwrap().stream(&params.stop).unwrap());
    generate(&mut *decoder, &request, &mut stops).unwrap()
}

/// Without its drafter, the demo target with looked-up drafts gives the same answer, in fewer rounds than tokens.
#[test]
fn drafts_that_are_looked_up_give_the_same_answer() {
    let options = EngineOptions::default().device(DeviceChoice::Cpu);
    let engine = Engine::open_with(Models::demo().lookup(Lookup::SUFFIX), options).unwrap();
    let params = Params::default().max_tokens(60).block(Lookup::MAX_BLOCK);
    let answer = |engine: &Engine| engine.generate("def f(x):", params.clone()).unwrap().finish().unwrap();
    let (found, expected) = (answer(&engine), answer(&DEMO));
    assert_eq!(found.tokens(), expected.tokens());
    assert!(found.rounds() < 50, "{} rounds", found.rounds());
    let tree =
        SpecConfig::Exact { drafts: ExactDrafts::BestFirstTree { rows: 9 }, length: DraftLengthPolicy::Full };
    let refused = engine.generate("a", Params::default().spec(tree)).err().unwrap();
    assert_eq!(refused, Error::option("tree", "needs a drafter, but drafts are those of suffix"));
}

#[test]
fn the_iterator_gives_the_answer_of_generate() {
    let prompt = DEMO.text().unwrap().encode("def f(x):").unwrap();
    let all = Params::default().max_tokens(40);
    let free = DEMO.generate(prompt.clone(), all.clone()).unwrap().finish().unwrap();
    assert_eq!(free.finish(), Finish::Length);
    let seventh = free.tokens()[6];
    for (params, finish) in [
        (all.clone(), Finish::Length),
        (all.clone().autoregressive(), Finish::Length),
        (all.clone().block(5).temperature(1.0).seed(3), Finish::Length),
        (all.clone().stop("\n"), Finish::Stop),
        (all.clone().stop_ids([seventh]), Finish::Stop),
        (all.clone().max_tokens(1), Finish::Length),
        (all.clone().max_tokens(0), Finish::Length),
    ] {
        let expected = by_generate(&DEMO, &prompt, &params);
        let mut answer = DEMO.generate(prompt.clone(), params.clone()).unwrap();
        let tokens: Vec<_> = answer.by_ref().map(Result::unwrap).collect();
        let found = answer.finish().unwrap();
        let outcome = &found.outcome;
        assert_eq!((found.finish(), outcome.finish), (finish, expected.finish), "{params:?}");
        assert_eq!(outcome.tokens, expected.tokens, "{params:?}");
        assert_eq!((&outcome.accepted, &outcome.drafted), (&expected.accepted, &expected.drafted));
        assert_eq!(tokens.iter().map(|t| t.id).collect::<Vec<_>>(), expected.tokens);
        assert_eq!(tokens.iter().map(|t| t.text.as_str()).collect::<String>(), found.text);
        // All tokens of a round except its last are accepted drafts.
        for (round, emitted) in (1..).zip(&outcome.accepted) {
            let of_round: Vec<_> = tokens.iter().filter(|t| t.round == round).collect();
            assert!(of_round.iter().enumerate().all(|(i, t)| t.accepted == (i + 1 < *emitted)), "{tokens:?}");
        }
    }
}

#[test]
fn the_context_ends_an_answer() {
    let options = EngineOptions::default().device(DeviceChoice::Cpu).context(24);
    let engine = Engine::open_with(Models::demo(), options).unwrap();
    let answer = engine.generate("x = 1\n", Params::default()).unwrap().finish().unwrap();
    let (prompt, tokens) = (answer.prompt_tokens, answer.tokens().len());
    assert_eq!((prompt + tokens, answer.finish()), (24, Finish::Context));
}

#[test]
fn a_round_runs_only_when_a_token_is_asked_for() {
    let mut answer = DEMO.generate("def f(x):", Params::default()).unwrap();
    assert_eq!((answer.so_far().tokens().len(), answer.so_far().finish()), (0, Finish::Interrupted));
    let mut taken = 0;
    while taken < 60 {
        let Some(token) = answer.next() else { break };
        taken += 1;
        // The iterator has run no round beyond that of the last token taken.
        assert_eq!(answer.so_far().rounds(), token.unwrap().round);
    }
    assert!(answer.so_far().rounds() > 3);
}

#[test]
fn a_session_reuses_its_decoder_after_a_dropped_answer() {
    let (_folder, engine) = on_a_gpu();
    for engine in [&*DEMO, &engine] {
        let prompt: Vec<u32> = (0..20).map(|i| i % 3).collect();
        let params = Params::default().max_tokens(12);
        let expected = engine.generate(prompt.clone(), params.clone()).unwrap().finish().unwrap();
        let mut session = engine.session().unwrap();
        for _ in 0..3 {
            // Drop the answer after its first round.
            let mut answer = session.generate(prompt.clone(), params.clone()).unwrap();
            while answer.so_far().rounds() == 0 {
                answer.next().unwrap().unwrap();
            }
        }
        let found = session.generate(prompt.clone(), params.clone()).unwrap().finish().unwrap();
        assert_eq!((found.tokens(), found.finish()), (expected.tokens(), expected.finish()));
        assert!((1..prompt.len()).contains(&found.outcome.kept), "{found:?}");
    }
}

#[test]
fn an_error_is_the_last_item() {
    let pair = support::write_pair(&Default::default(), &Default::default());
    let mut tensors = support::drafter_tensors(&Default::default(), &Default::default());
    tensors.last_mut().unwrap().values[3] = f32::NAN;
    support::write_tensors(&pair.drafter, &tensors, dflash::checkpoint::safetensors::Dtype::Bf16, 1);
    let options = EngineOptions::default().device(DeviceChoice::Cpu);
    let engine = Engine::open_with(Models::folders(&pair.target, &pair.drafter), options).unwrap();
    let items: Vec<_> = engine.generate(vec![1, 2, 3], Params::default()).unwrap().collect();
    assert!(matches!(items[..], [Ok(_), Err(Error::Model(_))]), "{items:?}");
}

#[test]
fn numbers_out_of_range_are_refused_on_every_device() {
    let sampling = SamplingParams { temperature: -1.0, ..SamplingParams::default() };
    let exact = |drafts, length| SpecConfig::Exact { drafts, length };
    let tree = |rows| exact(ExactDrafts::BestFirstTree { rows }, DraftLengthPolicy::Full);
    let (_folder, gpu) = on_a_gpu();
    for (spec, expected) in [
        (tree(0), "tree is 0, expected 2 to 64"),
        (tree(usize::MAX), "tree is 18446744073709551615, expected 2 to 64"),
        (
            exact(ExactDrafts::Chain, DraftLengthPolicy::Threshold(f64::NAN)),
            "threshold is NaN, expected more than 0 and at most 1",
        ),
        (
            exact(ExactDrafts::CoupledChain(sampling), DraftLengthPolicy::Full),
            "draft_temperature is -1, expected 0 (greedy) or 0.0001 to 10000",
        ),
    ] {
        for engine in [&*DEMO, &gpu] {
            let params = Params::default().spec(spec.clone());
            let of_session = engine.session().unwrap().generate(vec![1], params.clone()).err();
            for error in [engine.generate(vec![1], params).err(), of_session] {
                assert_eq!(error.map(|e| e.to_string()).as_deref(), Some(expected), "{}", engine.device());
            }
        }
        for device in [DeviceChoice::Cpu, DeviceChoice::Cuda] {
            let options = EngineOptions::default().device(device).spec(spec.clone());
            let error = Engine::open_with(Models::demo(), options).err();
            assert_eq!(error.map(|e| e.to_string()).as_deref(), Some(expected));
        }
    }
}

#[test]
fn a_target_without_a_tokenizer_runs_with_token_ids() {
    let (target, drafter) = requests::tiny();
    let pair = support::write_pair(&target, &drafter);
    let open = |template: Option<&str>| {
        let options = EngineOptions::default().device(DeviceChoice::Cpu);
        let options = EngineOptions { chat_template: template.map(String::from), ..options };
        Engine::open_with(Models::folders(&pair.target, &pair.drafter), options)
    };
    let answer = |engine: &Engine| {
        let params = Params::default().max_tokens(9).stop_ids(Vec::<u32>::new());
        let session = engine.session().unwrap().generate(vec![1, 2, 3], params.clone()).unwrap().finish();
        let answer = engine.generate(vec![1, 2, 3], params).unwrap().finish().unwrap();
        assert_eq!(answer.tokens(), session.unwrap().tokens());
        answer
    };
    let with = answer(&open(None).unwrap());
    std::fs::remove_file(pair.target.join("tokenizer.json")).unwrap();
    let engine = open(None).unwrap();
    let without = answer(&engine);
    assert_eq!(
        (without.tokens(), without.finish(), without.text.as_str()),
        (with.tokens(), Finish::Length, "")
    );
    assert!(engine.text().is_none() && without.tokens().len() == 9);
    assert_eq!(engine.stop_ids(), engine.pair().target.config.eos);
    let error =
        |content: Content, params: Params| engine.generate(content, params).err().unwrap().to_string();
    let text = error("a".into(), Params::default());
    assert!(text.contains("tokenizer.json is missing") && text.contains("token ids"), "{text}");
    let stop = error(Content::Tokens(vec![1]), Params::default().stop("a"));
    assert!(
        stop.starts_with("stop needs a tokenizer, but ") && stop.ends_with(" has no tokenizer.json"),
        "{stop}"
    );
    let template = open(Some("x")).err().unwrap().to_string();
    assert!(template.starts_with("chat_template needs a tokenizer, but "), "{template}");
}

#[test]
fn errors_name_the_option_found_and_expected() {
    let with = |params: Params| DEMO.generate("x", params).err().unwrap().to_string();
    let options = EngineOptions::default().device(DeviceChoice::Cpu).context(1);
    let found = Engine::open_with(Models::demo(), options).err().unwrap().to_string();
    assert_eq!(
        found,
        "context is 1, expected 2 to 4096, the positions that config.json of the built-in demo target has"
    );
    assert_eq!(
        with(Params::default().block(99)),
        "block is 99, expected 1 to 16, the block that config.json of the built-in demo drafter was trained with"
    );
    assert_eq!(with(Params::default().stop("")), "stop is empty, expected at least one character");
    assert_eq!(
        with(Params::default().system("Be kind.")),
        "chat_template is absent and the built-in demo target has none, but system needs one"
    );
    let empty = DEMO.generate(Content::Tokens(vec![]), Params::default()).err().unwrap();
    assert_eq!(empty, Error::Usage("the prompt gives no tokens, expected at least one".into()));
}
