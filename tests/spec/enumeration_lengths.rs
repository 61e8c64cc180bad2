//! Rounds whose draft lengths a controller chooses, by enumeration of whole generations. If the length is
//! known before the drafts are sampled, the output has the target's distribution, whatever earlier rounds
//! accepted. If the length depends on the sampled drafts, the output does not have it.

use crate::support::enumeration;

use dflash::spec::distribution::{Distribution, ONE};
use dflash::spec::draft_length::{Controller, Costs, DraftLengthPolicy};
use dflash::spec::rng::{DrawKey, Purpose, RandomSource};
use dflash::spec::verify::sample_chain;
use enumeration::*;
use std::collections::{BTreeMap, BTreeSet};

/// A controller in a state where the next results change its draft lengths.
struct WarmedUp {
    name: &'static str,
    policy: DraftLengthPolicy,
    costs: Costs,
    /// (rounds, maximum number of accepted drafts in each) before the test.
    before: Vec<(usize, usize)>,
}

fn warmed_up() -> [WarmedUp; 3] {
    // With these costs one accepted draft in ten rounds does not pay; one in the deciding round does.
    let costs = Costs { draft: 0.05, verify: vec![1.0; 64] };
    let expensive = Costs { draft: 0.2, verify: (0..64).map(|row| 1.0 + 0.3 * f64::from(row)).collect() };
    [
        WarmedUp {
            name: "threshold",
            policy: DraftLengthPolicy::Threshold(0.5),
            costs: expensive.clone(),
            before: vec![(4, 4), (2, 0)],
        },
        WarmedUp {
            name: "cost model, expensive rows",
            policy: DraftLengthPolicy::CostModel,
            costs: expensive,
            before: vec![(2, 2), (3, 0)],
        },
        // One more poor round stops drafting.
        WarmedUp {
            name: "cost model, about to stop",
            policy: DraftLengthPolicy::CostModel,
            costs,
            before: vec![(11, 0)],
        },
    ]
}

impl WarmedUp {
    fn controller(&self, ahead: bool) -> Box<dyn Controller + Send> {
        let mut controller = self.policy.controller(&self.costs, ahead);
        for &(rounds, accepted) in &self.before {
            for _ in 0..rounds {
                let drafts = controller.drafts(4);
                controller.observe(drafts, (2 << accepted.min(drafts)) - 1);
            }
        }
        controller
    }
}

impl Models {
    /// A generation of `depth + 1` tokens by rounds of the controller's lengths. With `late`, the controller
    /// observes a round after it has chosen the next length, as on devices. `sizes` collects, by round number,
    /// the lengths chosen for rounds that could verify two or more drafts; 2 means two or more.
    fn generation(
        &self,
        method: Method,
        mut controller: Box<dyn Controller + Send>,
        late: bool,
        source: &mut Enumerator,
        sizes: &mut BTreeMap<usize, BTreeSet<usize>>,
    ) -> Vec<u32> {
        let (mut output, depth) = (Vec::new(), self.depth());
        let mut next = controller.drafts(depth);
        for round in 0.. {
            if output.len() > depth {
                break;
            }
            let (remaining, allowed) = (depth - output.len(), next);
            if late {
                next = controller.drafts(depth);
            }
            if remaining > 1 {
                sizes.entry(round).or_default().insert(allowed.min(2));
            }
            let size = allowed.min(remaining);
            if size == 0 {
                output.push(source.pick(KEY, self.p(&output).tokens()).unwrap());
            } else {
                let distributions = &self.distributions[..size];
                let mut drafts = sample_chain(distributions, source).unwrap();
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
                        .filter(|(tokens, _)| tokens.starts_with(&output))
                        .map(|(tokens, distribution)| (tokens[output.len()..].to_vec(), distribution.clone()))
                        .collect(),
                    ..self.clone()
                };
                let emitted = after.verify_chain(method, &drafts, &distributions[..drafts.len()], source);
                let accepted = emitted.len() - 1;
                output.extend(emitted);
                controller.observe(drafts.len(), (2 << accepted) - 1);
            }
            if !late {
                next = controller.drafts(depth);
            }
        }
        output
    }
}

/// A key; the enumeration does not read it.
const KEY: DrawKey = DrawKey { purpose: Purpose::Residual, depth: 1, row: 0 };

/// Models without zeros, so that every branch exists.
fn models_without_zeros(vocab: usize, depth: usize, seed: u64) -> Models {
    let mut rng = Random::new(seed);
    let distributions: Vec<_> = (0..depth).map(|_| probabilities(&rng.weights(vocab, false))).collect();
    let mut distributions = distributions.into_iter();
    Models::new(vocab, depth, || probabilities(&rng.weights(vocab, false)), || distributions.next().unwrap())
}

#[test]
fn lengths_from_the_last_round_emit_the_targets_distribution() {
    lengths_emit_the_targets_distribution(false);
}

#[test]
fn lengths_from_earlier_rounds_emit_the_targets_distribution() {
    lengths_emit_the_targets_distribution(true);
}

fn lengths_emit_the_targets_distribution(late: bool) {
    for case in warmed_up() {
        let mut sizes = BTreeMap::new();
        // Only in the last, longer generation can two different histories leave the same number of tokens.
        let last = if late { (2, 5) } else { (2, 4) };
        let shapes = [(2, 3), (3, 2), (2, 4)].into_iter().cycle().take(9).chain([last]);
        for (i, (vocab, depth)) in shapes.enumerate() {
            let models = models_without_zeros(vocab, depth, 500 + i as u64);
            for method in [Method::Rejection, Method::Block] {
                let distribution = enumerate(|source| {
                    models.generation(method, case.controller(true), late, source, &mut sizes)
                });
                let distance = float(&models.distance(&distribution));
                assert!(distance < 1e-13, "{}, {method:?}, model {i}: {distance}", case.name);
            }
        }
        // The first round that can depend on a result is the second, or with `late` the third.
        let first = 1 + usize::from(late);
        println!("{}, late: {late}: {sizes:?}", case.name);
        assert!(sizes[&first].len() > 1, "{}, late: {late}: {sizes:?}", case.name);
    }
}

#[test]
fn a_length_that_depends_on_the_sampled_drafts_is_detected() {
    // The third controller verifies all drafts or none, so it does not fit here.
    for case in &warmed_up()[..2] {
        for method in [Method::Rejection, Method::Block] {
            let distance = |seed: u64| {
                let models = models_without_zeros(3, 2, 600 + seed);
                let distribution = enumerate(|source| {
                    models.generation(method, case.controller(false), false, source, &mut BTreeMap::new())
                });
                float(&models.distance(&distribution))
            };
            let worst = (0..30u64).map(distance).fold(0.0, f64::max);
            println!("{}, {method:?}: {worst:.3}", case.name);
            assert!((0.05..0.6).contains(&worst), "{}, {method:?}: {worst}", case.name);
        }
    }
}
