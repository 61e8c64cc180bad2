//! The launches of a captured graph as a readable list: the parts of a round, with equal layers listed once.
//! The list is made from the graph. This module only knows which kernels begin a part or a layer.

use crate::Result;
use crate::checkpoint::pair::Pair;
use crate::gpu::batch_config::BatchConfig;
use crate::gpu::decoder::{Batch, Models};
use crate::gpu::device::Node;
use crate::gpu::dry_run::DryRunDevice;
use crate::gpu::loader::Loader;
use std::ops::Range;

/// A part of a round.
#[derive(Debug, Clone, PartialEq)]
pub struct Section<'a> {
    /// `begin`, `inject`, `draft`, `verify` or `accept`.
    pub name: &'static str,
    /// The model whose layers it runs: `target` or `drafter`.
    pub model: &'static str,
    /// All its steps.
    pub nodes: &'a [Node],
    /// The same steps with repetitions folded.
    pub groups: Vec<Group<'a>>,
}

/// Consecutive steps, and how often they repeat.
#[derive(Debug, Clone, PartialEq)]
pub struct Group<'a> {
    /// The steps of the first repetition. The others differ only in their arguments.
    pub nodes: &'a [Node],
    /// Number of repetitions.
    pub times: usize,
    /// The model's layers that all repetitions together run; empty if the steps belong to no layer. A chain of
    /// drafts runs the same layer each time.
    pub layers: Range<usize>,
}

/// The steps of a full-size round of `pair`, `sampled` or greedy. They are the same on every device, so no
/// device is needed.
///
/// # Errors
/// As [`crate::gpu::memory::MemoryPlan::new`].
pub fn of_round(pair: &Pair, config: BatchConfig, sampled: bool) -> Result<Vec<Node>> {
    config.check()?;
    let device = DryRunDevice::new();
    let mut loader = Loader::new(&device, &pair.target.weights);
    let models = Models::list(&mut loader, pair, config.positions, &mut |_| ())?;
    let batch = Batch::new(&device, &models, config)?;
    Ok(batch.largest(sampled)?.nodes.clone())
}

/// Splits the steps of a round into its parts.
pub fn outline(nodes: &[Node]) -> Vec<Section<'_>> {
    let mut starts: Vec<(usize, &'static str)> = vec![];
    for (i, node) in nodes.iter().enumerate() {
        let before = starts.last().map_or("", |start| start.1);
        let name = match kernel(node) {
            ("inject", _) | (_, "normalize_taps") if before != "inject" => "inject",
            ("embedding", _) | (_, "extend_pairs") if before == "inject" => "draft",
            ("lookup", _) => "draft",
            (_, "round_tokens" | "tree_build") => "verify",
            ("verify", _) => "accept",
            _ if i == 0 => "begin",
            _ => continue,
        };
        starts.push((i, name));
    }
    let ends = starts.iter().skip(1).map(|start| start.0).chain([nodes.len()]);
    starts.iter().zip(ends).map(|(&(start, name), end)| section(name, &nodes[start..end])).collect()
}

/// Number of layers that the sections run, and of steps per layer. `None` without layers, if the number of
/// steps differs between layers, or if a layer runs several times.
pub fn layers(sections: &[Section]) -> Option<(usize, usize)> {
    let groups = sections.iter().flat_map(|section| &section.groups).filter(|g| !g.layers.is_empty());
    let (layers, steps) =
        groups.clone().fold((0, 0), |sum, g| (sum.0 + g.layers.len(), sum.1 + g.times * g.nodes.len()));
    let each = steps.checked_div(layers)?;
    groups.clone().all(|g| g.times * g.nodes.len() == g.layers.len() * each).then_some((layers, each))
}

/// Divides the steps of a part into units: `(steps, true)` has all steps of a layer, `(step, false)` has one
/// step that belongs to no layer.
pub fn units(nodes: &[Node]) -> Vec<(&[Node], bool)> {
    // A layer begins at a qkv launch, or at the convolution before it, and ends at the last `project` launch before
    // the next qkv.
    let mut units = vec![];
    let mut rest = nodes;
    while !rest.is_empty() {
        let qkv = |i: usize| rest.get(i).is_some_and(|node| kernel(node).0 == "qkv");
        let convolved = kernel(&rest[0]).0 == "convolve";
        let (layer, own) = (qkv(usize::from(convolved)), usize::from(convolved));
        let next = (own + 1..rest.len()).find(|&i| qkv(i)).unwrap_or(rest.len());
        let last = rest[..next].iter().rposition(|node| kernel(node).0 == "project");
        let (unit, after) = rest.split_at(if layer { last.unwrap_or(0) + 1 } else { 1 });
        units.push((unit, layer));
        rest = after;
    }
    units
}

fn section<'a>(name: &'static str, nodes: &'a [Node]) -> Section<'a> {
    let model = if matches!(name, "inject" | "draft") { "drafter" } else { "target" };
    let units = units(nodes);
    let chain = nodes.iter().any(|node| kernel(node).0 == "pairs");
    let (mut groups, mut layers): (Vec<Group>, usize) = (vec![], 0);
    let (mut unit, mut at) = (0, 0);
    while unit < units.len() {
        let (period, times) = repetition(&units[unit..]);
        let taken = &units[unit..unit + period];
        let length: usize = taken.iter().map(|(nodes, _)| nodes.len()).sum();
        let of_one = taken.iter().filter(|(_, layer)| *layer).count();
        let first = if chain { 0 } else { layers };
        layers = first + if chain { of_one } else { times * of_one };
        let alone = times == 1 && of_one == 0;
        match groups.last_mut() {
            // Consecutive single steps are one group.
            Some(group) if alone && group.times == 1 && group.layers.is_empty() => {
                group.nodes = &nodes[at - group.nodes.len()..at + length];
            }
            _ => groups.push(Group { nodes: &nodes[at..at + length], times, layers: first..layers }),
        }
        unit += period * times;
        at += length * times;
    }
    Section { name, model, nodes, groups }
}

/// Finds the repetition at the start of `units` that covers the most units. Returns its period and its number
/// of repetitions; (1, 1) if nothing repeats.
fn repetition(units: &[(&[Node], bool)]) -> (usize, usize) {
    let mut best = (1, 1);
    for period in 1..=units.len() / 2 {
        let again = units.chunks_exact(period).skip(1);
        let same = |chunk: &&[(&[Node], bool)]| {
            chunk.iter().zip(units).all(|((a, _), (b, _))| {
                a.len() == b.len() && a.iter().zip(*b).all(|(a, b)| equal_except_arguments(a, b))
            })
        };
        let times = 1 + again.take_while(same).count();
        if times > 1 && period * times > best.0 * best.1 {
            best = (period, times);
        }
    }
    best
}

fn equal_except_arguments(a: &Node, b: &Node) -> bool {
    match (a, b) {
        (Node::Launch(a), Node::Launch(b)) => (a.kernel, a.grid, a.shared) == (b.kernel, b.grid, b.shared),
        (Node::Copy { to: a, .. }, Node::Copy { to: b, .. }) => a.bytes() == b.bytes(),
        (Node::Fill { to: a, byte: x }, Node::Fill { to: b, byte: y }) => (a.bytes(), x) == (b.bytes(), y),
        _ => false,
    }
}

/// File and entry point of a launch's kernel; empty for other steps.
fn kernel(node: &Node) -> (&'static str, &'static str) {
    match node {
        Node::Launch(launch) => (launch.kernel.file, launch.kernel.name),
        _ => ("", ""),
    }
}
