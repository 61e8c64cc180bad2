//! The exact distribution of an answer's first tokens, from the target's logits, and a chi-square test of
//! answers against it.

use dflash::cpu::model::{Cache, Target};
use dflash::spec::sampling::SamplingParams;
use std::collections::HashMap;
use std::fmt::Debug;

/// Token sequences with a probability above 0, and their probabilities.
pub type Distribution = HashMap<Vec<u32>, f64>;

/// The distribution of the first `length` tokens after `prompt`.
pub fn distribution(
    target: &Target,
    prompt: &[u32],
    sampling: &SamplingParams,
    length: usize,
) -> Distribution {
    let mut distribution = HashMap::from([(vec![], 1.0)]);
    for _ in 0..length {
        let mut longer = HashMap::new();
        for (tokens, probability) in distribution {
            let mut cache = Cache::new(&target.config.stack, prompt.len() + length).unwrap();
            let all = [prompt, &tokens].concat();
            let normed = target.forward(&all, &mut cache, &[], &mut Vec::new(), 1);
            let mut logits = Vec::new();
            target.logits(&normed, &mut logits);
            let weights = sampling.survivors(&logits).unwrap();
            let total: u64 = weights.iter().map(|&(_, w)| w).sum();
            longer.extend(
                weights
                    .iter()
                    .map(|&(id, w)| ([&tokens[..], &[id]].concat(), probability * w as f64 / total as f64)),
            );
        }
        distribution = longer;
    }
    distribution
}

/// Compares answers with a distribution by chi-square. One run in ten thousand exceeds the bound although the
/// distribution is right (quantile by Wilson and Hilferty).
#[track_caller]
pub fn check(what: &dyn Debug, distribution: &Distribution, answers: impl IntoIterator<Item = Vec<u32>>) {
    let mut counts: HashMap<Vec<u32>, u64> = HashMap::new();
    for answer in answers {
        *counts.entry(answer).or_default() += 1;
    }
    let runs = counts.values().sum::<u64>() as f64;
    // `rare`: expected and found counts of the answers that are expected fewer than 10 times, as one cell.
    let (mut chi, mut cells, mut rare) = (0.0, 0, (0.0, 0.0));
    for (tokens, probability) in distribution {
        let found = counts.remove(tokens).unwrap_or(0) as f64;
        match probability * runs {
            e if e < 5.0 => rare = (rare.0 + e, rare.1 + found),
            e => (chi, cells) = (chi + (found - e).powi(2) / e, cells + 1),
        }
    }
    assert!(counts.is_empty(), "{what:?}: {counts:?} have probability 0 under the target");
    if rare.0 > 5.0 {
        (chi, cells) = (chi + (rare.1 - rare.0).powi(2) / rare.0, cells + 1);
    }
    let dof = f64::from(cells - 1);
    let bound = dof * (1.0 - 2.0 / (9.0 * dof) + 3.72 * (2.0 / (9.0 * dof)).sqrt()).powi(3);
    println!("{what:?}: {chi:.1} of at most {bound:.1}, {cells} cells");
    assert!(cells >= 10, "{what:?}: {cells} cells");
    assert!(chi < bound, "{what:?}: chi-square {chi:.1} of at most {bound:.1}");
}
