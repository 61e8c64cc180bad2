use super::*;
use crate::checkpoint::folder::{DEMO_DRAFTER, DEMO_TARGET};
use crate::checkpoint::pair::Pair;
use crate::engine::generate::{Flow, TokenSink, resume};
use crate::gpu::emulator::Emulator;
use crate::spec::config::ExactDrafts;
use crate::spec::sampling::SamplingParams;

struct Silent;

impl TokenSink for Silent {
    fn token(&mut self, _: u32, _: bool) -> Result<Flow> {
        Ok(Flow::Continue)
    }
}

/// Rewriting the keys and values that AR steps wrote could change later answers.
#[test]
fn a_prefill_for_the_drafter_keeps_the_targets_cached_kv() {
    let (device, pair) = (Emulator::new(), Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let models = Models::load(&device, &pair, 128).unwrap();
    let mut batch = Batch::new(&device, &models, BatchConfig::new(1, 16, 128)).unwrap();
    let request = |prompt: &[u32], block| {
        let sampling =
            SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, stream: 0 };
        Request {
            prompt: prompt.to_vec(),
            max_tokens: 3,
            sampling,
            stop_ids: vec![],
            block,
            spec: Default::default(),
        }
    };
    let mut tokens: Vec<u32> = (0..66).map(|i| 300 + i).collect();
    tokens.extend(resume(&mut batch, &request(&tokens, 1), &mut Silent).unwrap().tokens);
    let held = batch.slots[0].held;
    assert_eq!((held, batch.slots[0].drafted), (68, 0));

    // Flip bits, so that a rewritten position is visible.
    let stack = &pair.target.config.stack;
    let (layers, row) = (stack.attention.len(), stack.head_dim * 2);
    let buffer = |batch: &Batch, layer: usize| batch.ctx.cache.keys[layer].clone();
    let pages = |batch: &Batch, layer| {
        let mut bytes = vec![0; buffer(batch, layer).bytes()];
        device.download(&buffer(batch, layer), &mut bytes).unwrap();
        bytes
    };
    let marked: Vec<Vec<u8>> =
        (0..layers).map(|i| pages(&batch, i).iter().map(|byte| byte ^ 1).collect()).collect();
    (0..layers).for_each(|i| device.upload(&buffer(&batch, i), &marked[i]).unwrap());
    tokens.push(7);
    assert_eq!(batch.admit(0, &request(&tokens, 16), true), Ok(Some(0)));
    assert!(batch.prefill(0).unwrap().next.is_some());
    for (layer, marked) in marked.iter().enumerate() {
        let now = pages(&batch, layer);
        for (at, head) in (0..tokens.len()).flat_map(|at| (0..stack.kv_heads).map(move |head| (at, head))) {
            let page = batch.pages.of(0)[at / PAGE] as usize;
            let begin = ((page * stack.kv_heads + head) * PAGE + at % PAGE) * row;
            let kept = now[begin..begin + row] == marked[begin..begin + row];
            assert_eq!(kept, at < held, "layer {layer}, head {head}, position {at}");
        }
    }
}

struct Script(std::vec::IntoIter<usize>);

impl Controller for Script {
    fn drafts(&mut self, max: usize) -> usize {
        self.0.next().unwrap_or(max)
    }

    fn observe(&mut self, _: usize, _: u64) {}
}

/// A round replays the smallest graph with enough rows for every sequence. If no sequence drafts, it is one
/// without drafts.
#[test]
fn a_round_is_as_large_as_its_largest_sequence_needs() {
    let (device, pair) = (Emulator::new(), Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let models = Models::load(&device, &pair, 128).unwrap();
    let config = BatchConfig { adaptive: true, ..BatchConfig::new(2, 16, 128).with_trees(64) };
    let mut batch = Batch::new(&device, &models, config).unwrap();
    let scripts = [vec![63, 0, 15, 16, 0, 32, 3], vec![0, 0, 3, 31, 15, 0, 4]];
    let next = std::cell::Cell::new(0);
    batch.set_controllers(move || {
        next.set(next.get() + 1);
        Box::new(Script(scripts[next.get() - 1].clone().into_iter()))
    });
    let sampling = SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 1, stream: 0 };
    let drafts = ExactDrafts::BestFirstTree { rows: 64 };
    let spec = SpecConfig::Exact { drafts, length: DraftLengthPolicy::Full };
    let request =
        Request { prompt: vec![300, 301], max_tokens: 100, sampling, stop_ids: vec![], block: 16, spec };
    for slot in 0..2 {
        assert_eq!(batch.admit(slot, &request, false), Ok(Some(0)));
        assert!(batch.prefill(slot).unwrap().next.is_some());
    }
    let mut rows = vec![];
    let mut out = vec![Emitted::default(); 2];
    for round in 0..6 {
        batch.enqueue().unwrap();
        rows.push(batch.rows);
        if round > 0 {
            batch.round(&mut out).unwrap();
        }
    }
    assert_eq!(rows, [64, 1, 16, 32, 16, 64]);
}

/// Rows up to the size of the next captured pass cost nothing extra, and the controllers' cost table has
/// these sizes.
#[test]
fn adaptive_controllers_fill_the_captured_passes() {
    let (device, pair) = (Emulator::new(), Pair::open(DEMO_TARGET, Some(DEMO_DRAFTER)).unwrap());
    let models = Models::load(&device, &pair, 128).unwrap();
    let config = BatchConfig { adaptive: true, ..BatchConfig::new(1, 16, 128).with_trees(64) };
    let batch = Batch::new(&device, &models, config).unwrap();
    let spec = SpecConfig::Exact { drafts: ExactDrafts::Chain, length: DraftLengthPolicy::CostModel };
    let mut controller = batch.controller(&spec, DraftShape::Chain);
    let mut rows = vec![];
    for _ in 0..12 {
        let drafts = controller.drafts(63);
        controller.observe(drafts, 0b11);
        rows.push(drafts + 1);
    }
    // The size falls from the maximum by at most 16 rows per round to the smallest pass. There it verifies
    // more drafts than would pay off if each row had a cost.
    assert_eq!(rows[..7], [64, 64, 64, 64, 48, 32, 16]);
    assert!(rows[7..].iter().all(|rows| (9..17).contains(rows)), "{rows:?}");
}
