//! Rounds whose sizes a controller chooses, by enumeration of whole generations: where a size is known before the round's
//! drafts are drawn, what is emitted has the target's distribution, whatever came of the rounds before; where it looks at what was
//! drawn, it has not.

use crate::support::enumeration;

use dflash::spec::distribution::{Distribution, ONE};
use dflash::spec::draft_length::{Controller, Costs, DraftLengthPolicy};
use dflash::spec::rng::{DrawKey, Purpose, RandomSource};
use dflash::spec::verify::sample_chain;
use enumeration::*;
use std::collections::{BTreeMap, BTreeSet};

/// A controller whose next rounds hang on what comes of these.
struct Warm {
    name: &'static str,
    goal: DraftLengthPolicy,
    costs: Costs,
    /// (rounds, drafts of each that stood at most).
    before: Vec<(usize, usize)>,
}

fn warm() -> [Warm; 3] {
    // One draft of ten rounds that stands is not enough, one of the round that decides is.
    let costs = Costs { draft: 0.05, verify: vec![1.0; 64] };
    let dear = Costs { draft: 0.2, verify: (0..64).map(|row| 1.0 + 0.3 * f64::from(row)).collect() };
    [
        Warm {
            name: "at least",
            goal: DraftLengthPolicy::Threshold(0.5),
            costs: dear.clone(),
            before: vec![(4, 4), (2, 0)],
        },
        Warm {
            name: "what pays",
            goal: DraftLengthPolicy::CostModel,
            costs: dear,
            before: vec![(2, 2), (3, 0)],
        },
        // One more poor round ends drafting.
        Warm { name: "where it pays", goal: DraftLengthPolicy::CostModel, costs, before: vec![(11, 0)] },
    ]
}

impl Warm {
    fn controller(&self, ahead: bool) -> Box<dyn Controller + Send> {
        let mut controller = self.goal.controller(&self.costs, ahead);
        for &(rounds, stood) in &self.before {
            for _ in 0..rounds {
                let drafts = controller.drafts(4);
                controller.observe(drafts, (2 << stood.min(drafts)) - 1);
            }
        }
        controller
    }
}

impl Models {
    /// A generation of `depth + 1` tokens by rounds as large as the controller says. Where it hears `late` of a round, it
    /// has been asked for the next one before, as on devices. `sizes` takes what it says of rounds that could verify two
    /// drafts and more, by their numbers: 2 is two and more.
    fn generation(
        &self,
        rule: Rule,
        mut controller: Box<dyn Controller + Send>,
        late: bool,
        coin: &mut Enumerator,
        sizes: &mut BTreeMap<usize, BTreeSet<usize>>,
    ) -> Vec<u32> {
        let (mut said, depth) = (Vec::new(), self.depth());
        let mut next = controller.drafts(depth);
        for round in 0.. {
            if said.len() > depth {
                break;
            }
            let (most, allowed) = (depth - said.len(), next);
            if late {
                next = controller.drafts(depth);
            }
            if most > 1 {
                sizes.entry(round).or_default().insert(allowed.min(2));
            }
            let size = allowed.min(most);
            if size == 0 {
                said.push(coin.pick(WORD, self.p(&said).tokens()).unwrap());
            } else {
                let distributions = &self.distributions[..size];
                let mut drafts = sample_chain(distributions, coin).unwrap();
                if controller.needs_draft_probs() {
                    let mut bits = 0.0;
                    let cost = |(id, distribution): (&u32, &Distribution)| {
                        bits -= (distribution.probability(*id) as f64 / ONE as f64).log2();
                        (bits * 65536.0) as u32
                    };
                    let costs: Vec<u32> = drafts.iter().zip(distributions).map(cost).collect();
                    drafts.truncate(controller.truncate(&costs));
                }
                let after = Models {
                    target: (self.target.iter())
                        .filter(|(tokens, _)| tokens.starts_with(&said))
                        .map(|(tokens, distribution)| (tokens[said.len()..].to_vec(), distribution.clone()))
                        .collect(),
                    ..self.clone()
                };
                let emitted = after.judged(rule, &drafts, &distributions[..drafts.len()], coin);
                let stood = emitted.len() - 1;
                said.extend(emitted);
                controller.observe(drafts.len(), (2 << stood) - 1);
            }
            if !late {
                next = controller.drafts(depth);
            }
        }
        said
    }
}

/// What none of these coins reads.
const WORD: DrawKey = DrawKey { purpose: Purpose::Residual, depth: 1, row: 0 };

/// Without zeros, so that every branch is there.
fn of(vocab: usize, depth: usize, seed: u64) -> Models {
    let mut rng = Random::new(seed);
    let distributions: Vec<_> = (0..depth).map(|_| probabilities(&rng.weights(vocab, false))).collect();
    let mut distributions = distributions.into_iter();
    Models::new(vocab, depth, || probabilities(&rng.weights(vocab, false)), || distributions.next().unwrap())
}

#[test]
fn sizes_that_earlier_rounds_choose_emit_the_targets_law() {
    for warm in warm() {
        for late in [false, true] {
            let mut sizes = BTreeMap::new();
            // Only in so long ones can two rounds have different pasts and as much before them.
            let last = if late { (2, 5) } else { (2, 4) };
            let shapes = [(2, 3), (3, 2), (2, 4)].into_iter().cycle().take(9).chain([last]);
            for (i, (vocab, depth)) in shapes.enumerate() {
                let models = of(vocab, depth, 500 + i as u64);
                for rule in [Rule::Rejection, Rule::Block] {
                    let distribution = enumerate(|coin| {
                        models.generation(rule, warm.controller(true), late, coin, &mut sizes)
                    });
                    let distance = float(&models.distance(&distribution));
                    assert!(distance < 1e-13, "{}, {rule:?}, model {i}: {distance}", warm.name);
                }
            }
            // The first that can know of another is the second, or late the third.
            let first = 1 + usize::from(late);
            println!("{}, late: {late}: {sizes:?}", warm.name);
            assert!(sizes[&first].len() > 1, "{}, late: {late}: {sizes:?}", warm.name);
        }
    }
}

#[test]
fn a_size_that_looks_at_what_was_drawn_is_caught() {
    // The third verifies all or nothing.
    for warm in &warm()[..2] {
        for rule in [Rule::Rejection, Rule::Block] {
            let distance = |seed: u64| {
                let models = of(3, 2, 600 + seed);
                let distribution = enumerate(|coin| {
                    models.generation(rule, warm.controller(false), false, coin, &mut BTreeMap::new())
                });
                float(&models.distance(&distribution))
            };
            let worst = (0..30u64).map(distance).fold(0.0, f64::max);
            println!("{}, {rule:?}: {worst:.3}", warm.name);
            assert!((0.05..0.6).contains(&worst), "{}, {rule:?}: {worst}", warm.name);
        }
    }
}
