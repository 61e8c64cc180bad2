//! EAGLE-3 drafters in three published layouts against drafts that their reference implementations recorded
//! (`tests/data/drafters/README.md`), and misreadings, which the comparison must notice.

use crate::drafters::{Differences, Oracle, largest_difference, open};
use crate::support::distribution;
use crate::support::exhaustive;
use crate::support::requests::{AcceptAll, keep_going, request, run, run_together, seeded, spec, with_top_k};

use dflash::checkpoint::config::{DrafterConfig, Slots};
use dflash::checkpoint::drafter::Dependence;
use dflash::checkpoint::eagle3::Chain;
use dflash::checkpoint::pair::Pair;
use dflash::cpu::decoder::Sequences;
use dflash::cpu::model::{Cache, ChainDraft, Drafter, Target};
use dflash::engine::generate::{Request, resume};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::graph_listing::{of_round, outline};
use dflash::gpu::memory::MemoryPlan;
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::argmax;
use serde_json::Value;
use std::collections::BTreeSet;

pub const EAGLE3: [&str; 3] = ["eagle3-deepspec", "eagle3-flat", "eagle3-speculators"];
/// Rows of the recorded rounds.
const ROWS: usize = 6;

fn load(pair: &Pair) -> (Target, Drafter) {
    (Target::load(&pair.target).unwrap(), Drafter::load(pair.drafter().unwrap()).unwrap())
}

/// Repeats all recorded rounds with this pair on the CPU.
fn compare(pair: &Pair, oracle: &Oracle) -> Differences {
    let (target, drafter) = load(pair);
    let plan = &drafter.config;
    let prefix = if oracle.find("p0.taps").is_some() { "" } else { "chain." };
    let mut all = Differences::default();
    for (p, recorded) in oracle.prompts().iter().enumerate() {
        let mut features = Vec::new();
        let mut cache = Cache::new(&target.config.stack, 256).unwrap();
        target.forward(&recorded.committed, &mut cache, &plan.taps, &mut features, 1);
        let taps = largest_difference(&features, &oracle.tensor(&format!("{prefix}p{p}.taps")));
        all.features = all.features.max(taps);
        let width = features.len() / recorded.committed.len();
        // The context stays from round to round, without the pairs of drafts.
        let mut context = Cache::new(&plan.stack, 256).unwrap();
        for (r, round) in recorded.rounds.iter().enumerate() {
            let at = round.anchor_position;
            let mut pending = features[context.len() * width..at * width].to_vec();
            drafter.absorb(&target, &recorded.committed[..at], &mut pending, &mut context);
            assert_eq!(pending.len(), width, "the last feature waits for the token after it");
            let mut chain = drafter.chain(&target, &pending, &mut context).unwrap();
            let (mut logits, mut finite, mut drafts) = (vec![], vec![], vec![recorded.committed[at]]);
            for i in 0..round.drafts.len() {
                chain.step(drafts[i], &mut logits);
                drafts.push(argmax(&logits).unwrap());
                finite.extend(logits.iter().copied().filter(|logit| logit.is_finite()));
                // Go on with the recorded draft, so that one difference is one difference.
                drafts[i + 1] = round.drafts[i];
                all.drafts += usize::from(argmax(&logits) != Some(round.drafts[i]));
            }
            let reference = oracle.tensor(&format!("{prefix}p{p}.r{r}.logits"));
            let same_size = finite.len() == reference.len();
            let apart = if same_size { largest_difference(&finite, &reference) } else { f32::INFINITY };
            all.logits = all.logits.max(apart);
            context.crop(at);
            all.rounds += 1;
        }
    }
    println!("{all:?}");
    all
}

#[test]
fn drafts_and_logits_equal_the_reference_implementations() {
    for name in EAGLE3 {
        let found = compare(&open(name), &Oracle::open(name));
        assert_eq!((found.drafts, found.rounds), (0, 18), "{name}");
        assert!(found.features.max(found.logits) < 1e-4, "{name}: {found:?}");
    }
}

#[test]
fn plans_say_taps_vocabulary_and_rows() {
    let plans = EAGLE3.map(|name| open(name).drafter().unwrap().config.clone());
    let taps = plans.each_ref().map(|plan| &plan.taps[..]);
    assert_eq!(taps, [&[1, 2, 3, 4, 5][..], &[1, 3, 4], &[1, 3, 6]]);
    assert_eq!(plans.each_ref().map(|plan| plan.own_head), [None, Some(256), Some(256)]);
    // DeepSpec's ttt_length and the proposal of speculators name 5 drafts; EAGLE's layout names none.
    assert_eq!(plans.each_ref().map(|plan| plan.block), [6, 8, 6]);
    assert_eq!(plans.each_ref().map(|plan| plan.stack.qk_norm), [true, false, false]);
    assert!(plans.iter().all(|plan| plan.slots == Slots::AnchorFirst && plan.chain().is_some()));
    // A round may have more drafts than the config names.
    let pair = open("eagle3-flat");
    assert_eq!((pair.block(None).unwrap(), pair.block(Some(16)).unwrap()), (8, 16));
    assert!(pair.block(Some(17)).unwrap_err().to_string().ends_with("is 17, expected 1 to 16"));
}

/// Greedy rounds of the decoder emit the recorded tokens and accept the recorded numbers of drafts.
#[test]
fn greedy_rounds_accept_what_the_reference_accepts() {
    for name in EAGLE3 {
        let (target, drafter) = load(&open(name));
        for recorded in Oracle::open(name).prompts() {
            let answer = &recorded.committed[recorded.prompt.len()..];
            let mut decoder = Sequences::new(&target, Some(&drafter), 1, 256);
            let outcome = run(&mut decoder, &request(&recorded.prompt, answer.len(), ROWS, 0.0));
            assert_eq!(outcome.tokens, answer, "{name}");
            let emitted: Vec<usize> = recorded.rounds.iter().map(|round| round.accepted + 1).collect();
            assert_eq!(outcome.accepted, emitted, "{name}");
        }
    }
}

/// The trees have the nodes of the reference's, and rounds accept the same paths.
#[test]
fn trees_equal_the_reference() {
    let oracle = Oracle::open("eagle3-flat");
    let (target, drafter) = load(&open("eagle3-flat"));
    let ids = |value: &Value| -> Vec<i64> {
        value.as_array().unwrap().iter().map(|id| id.as_i64().unwrap()).collect()
    };
    let mut seen = 0;
    for prompt in oracle.json["tree_prompts"].as_array().unwrap() {
        let committed: Vec<u32> = ids(&prompt["committed"]).into_iter().map(|id| id as u32).collect();
        let mut features = Vec::new();
        let mut cache = Cache::new(&target.config.stack, 256).unwrap();
        target.forward(&committed, &mut cache, &drafter.config.taps, &mut features, 1);
        let width = features.len() / committed.len();
        let mut context = Cache::new(&drafter.config.stack, 256 + ChainDraft::TREE_ROOM).unwrap();
        for round in prompt["rounds"].as_array().unwrap() {
            let at = round["anchor_position"].as_u64().unwrap() as usize;
            let mut pending = features[context.len() * width..at * width].to_vec();
            drafter.absorb(&target, &committed[..at], &mut pending, &mut context);
            let chain = drafter.chain(&target, &pending, &mut context).unwrap();
            let tree = chain.tree(committed[at], 12, 4, Some(4)).unwrap();
            context.crop(at);
            let paths = |tokens: &[u32], parents: &[i64]| -> BTreeSet<Vec<u32>> {
                let mut paths: Vec<Vec<u32>> = vec![vec![tokens[0]]];
                for (token, parent) in tokens.iter().zip(parents).skip(1) {
                    paths.push([&paths[*parent as usize][..], &[*token]].concat());
                }
                paths.into_iter().collect()
            };
            let parents: Vec<i64> = tree.parents.iter().map(|parent| i64::from(*parent)).collect();
            let tokens: Vec<u32> = ids(&round["tokens"]).into_iter().map(|id| id as u32).collect();
            assert_eq!(paths(&tree.tokens, &parents), paths(&tokens, &ids(&round["parents"])), "{round}");
            assert!(tree.costs.is_sorted(), "{:?}", tree.costs);
            seen += 1;
        }
        // Rounds of 20 rows accept at least as much as the reference's 12, in no more rounds.
        let first = prompt["prompt"].as_array().unwrap().len();
        let own = Request {
            spec: spec(VerifyMethod::Match, 0.0, Some(20)),
            ..request(&committed[..first], committed.len() - first, 8, 0.0)
        };
        let mut decoder = Sequences::new(&target, Some(&drafter), 1, 256);
        let outcome = run(&mut decoder, &own);
        assert_eq!(outcome.tokens, committed[first..]);
        assert!(
            outcome.accepted.len() <= prompt["rounds"].as_array().unwrap().len(),
            "{:?}",
            outcome.accepted
        );
    }
    assert_eq!(seen, 18);
}

/// Each misreading moves logits by far more than the tolerance.
#[test]
fn misreadings_of_a_layout_are_noticed() {
    type Change = fn(&mut DrafterConfig);
    let flip_residual: Change = |plan| {
        let chain = plan.chain().unwrap();
        let norm_before_residual = !chain.norm_before_residual;
        plan.dependence = Dependence::Chain(Chain { norm_before_residual, ..chain });
    };
    let flip_output: Change = |plan| {
        let chain = plan.chain().unwrap();
        plan.dependence = Dependence::Chain(Chain { norm_output: !chain.norm_output, ..chain });
    };
    let mut mistakes: Vec<(&str, &str, Change)> = vec![
        ("no norm before fc", "eagle3-speculators", |plan| {
            let chain = plan.chain().unwrap();
            plan.dependence = Dependence::Chain(Chain { norm_before_fc: false, ..chain });
        }),
        ("d2t not applied", "eagle3-flat", |plan| plan.ids = Some((0..256).collect())),
        ("no norm of heads", "eagle3-deepspec", |plan| plan.stack.qk_norm = false),
    ];
    for name in EAGLE3 {
        mistakes.push(("the other residual", name, flip_residual));
        mistakes.push(("the other feature", name, flip_output));
        mistakes.push(("another RoPE base", name, |plan| plan.stack.rope.theta = 500.0));
        mistakes.push(("taps one layer late", name, |plan| plan.taps.iter_mut().for_each(|tap| *tap += 1)));
    }
    for (mistake, name, change) in mistakes {
        let mut pair = open(name);
        let dflash::checkpoint::pair::DraftSource::Drafter(drafter) = &mut pair.draft else { unreachable!() };
        change(&mut drafter.config);
        let found = compare(&pair, &Oracle::open(name));
        assert!(found.logits > 0.01 || found.drafts > 9, "{mistake}, {name}: {found:?}");
    }
}

/// Exact rounds emit the tokens of AR decoding, as a chain, a tree, and in a batch; the other methods keep
/// the target's distribution, with drafts that are sampled from the chain's conditional distributions.
#[test]
fn chains_are_lossless_with_every_method() {
    for name in EAGLE3 {
        let (target, drafter) = load(&open(name));
        let prompts = Oracle::open(name).prompts();
        let mut decoder = Sequences::new(&target, Some(&drafter), 1, 256);
        let mut batch = Sequences::new(&target, Some(&drafter), 3, 256);
        for (temperature, tree) in [(0.0, None), (0.8, None), (0.0, Some(20)), (0.8, Some(20))] {
            let own = spec(VerifyMethod::Match, if tree.is_none() { temperature } else { 0.0 }, tree);
            let all = prompts.iter().map(|recorded| Request {
                spec: own.clone(),
                ..request(&recorded.prompt, 20, 8, temperature)
            });
            let all: Vec<Request> = all.collect();
            for (together, drafted) in run_together(&mut batch, &all, keep_going).iter().zip(&all) {
                let ar =
                    run(&mut decoder, &Request { spec: Default::default(), block: 1, ..drafted.clone() });
                let alone = run(&mut decoder, drafted);
                assert_eq!(
                    (&alone.tokens, &together.tokens),
                    (&ar.tokens, &ar.tokens),
                    "{name} {temperature} {tree:?}"
                );
                assert_eq!(alone.accepted, together.accepted, "{name} {temperature} {tree:?}");
                assert!(alone.accepted.len() < 17, "{name}: {:?}", alone.accepted);
            }
        }
        // The target is sure of most tokens; a high temperature spreads the answers.
        let prompt = &prompts[1].prompt[..4];
        let chains = [(VerifyMethod::Rejection, None), (VerifyMethod::Block, None)];
        let trees = [(VerifyMethod::Rejection, Some(9)), (VerifyMethod::Block, Some(9))];
        for (method, tree) in chains.into_iter().chain(trees.into_iter().filter(|_| name == "eagle3-flat")) {
            let spec = with_top_k(&spec(method, 4.0, tree), 6);
            let own = |seed| {
                let mut request = Request { spec: spec.clone(), ..seeded(prompt, 3, 4, 4.0, seed) };
                request.sampling.top_k = 6;
                request
            };
            let requests: Vec<Request> = (0..if exhaustive() { 1000 } else { 300 }).map(own).collect();
            let expected = distribution::distribution(&target, prompt, &requests[0].sampling, 3);
            let mut decoder = Sequences::new(&target, Some(&drafter), 8, 256);
            let answers = run_together(&mut decoder, &requests, keep_going);
            distribution::check(&spec, &expected, answers.into_iter().map(|outcome| outcome.tokens));
        }
    }
}

/// A pair holds the token after its position, so a prompt that shares all but that token with the text so far
/// must not keep it: rounds are those of a new sequence, wherever the prompts part.
#[test]
fn a_kept_prefix_drafts_as_a_new_sequence() {
    for name in EAGLE3 {
        let (target, drafter) = load(&open(name));
        let recorded = &Oracle::open(name).prompts()[1];
        let first = request(&recorded.prompt, 9, ROWS, 0.0);
        for parts_at in recorded.prompt.len() - 2..recorded.prompt.len() + 8 {
            let mut prompt = recorded.committed[..parts_at].to_vec();
            prompt.extend([recorded.prompt[1], recorded.prompt[2], recorded.prompt[0]]);
            let second = request(&prompt, 12, ROWS, 0.0);
            let mut kept = Sequences::new(&target, Some(&drafter), 1, 256);
            run(&mut kept, &first);
            let again = resume(&mut kept, &second, &mut AcceptAll).unwrap();
            let fresh = run(&mut Sequences::new(&target, Some(&drafter), 1, 256), &second);
            assert!(again.kept > 0, "{name}, {parts_at}");
            assert_eq!((again.tokens, again.accepted), (fresh.tokens, fresh.accepted), "{name}, {parts_at}");
        }
    }
}

/// On a device a draft is a launch for its pair, those of a layer and the head; before them come the projection of
/// features and the norms before it, after them the greedy choice. Trees are refused.
#[test]
fn a_draft_is_eight_launches() {
    let config = |positions| BatchConfig::new(2, 8, positions);
    for name in EAGLE3 {
        let pair = open(name);
        let norms = usize::from(name == "eagle3-speculators");
        // With few positions no split of attention needs a merge.
        for (positions, each) in [(128, 7), (1024, 8)] {
            let nodes = of_round(&pair, config(positions), false).unwrap();
            let sections = outline(&nodes);
            let [inject, draft] =
                ["inject", "draft"].map(|name| sections.iter().find(|section| section.name == name).unwrap());
            assert_eq!((inject.nodes.len(), draft.nodes.len()), (1 + norms, 7 * each + 1), "{name}");
            let repeated = draft.groups.iter().find(|group| group.times > 1).unwrap();
            assert_eq!((repeated.nodes.len(), repeated.layers.clone()), (each, 0..1), "{name}");
        }
        let refused = MemoryPlan::new(&pair, config(128).with_trees(12)).unwrap_err();
        assert_eq!(refused.to_string(), "EAGLE-3 trees run on the CPU, the kernels run chains");
        // Two pages of keys and values of the only layer are of the drafter.
        let stack = &pair.drafter().unwrap().config.stack;
        let bytes = |pair| MemoryPlan::new(pair, config(128)).unwrap().page_bytes;
        let target = Pair::open(pair.target.folder.clone(), None).unwrap();
        assert_eq!(bytes(&pair) - bytes(&target), 2 * 64 * stack.kv_heads * stack.head_dim * 2, "{name}");
    }
}
