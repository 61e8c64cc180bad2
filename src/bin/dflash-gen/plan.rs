//! `--plan`: what would be loaded, what it would take and what a round would launch, from configs and headers
//! alone.

use crate::job::Job;
use crate::output::Output;
use dflash::Result;
use dflash::checkpoint::config::{DrafterConfig, Stack, TargetConfig};
use dflash::checkpoint::drafter::{Dependence, Markov, Selector};
use dflash::checkpoint::folder::Folder;
use dflash::checkpoint::pair::{Lookup, Pair};
use dflash::checkpoint::safetensors::Checkpoint;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::device::Node;
use dflash::gpu::graph_listing::{self, Section};
use dflash::gpu::memory::{MemoryPlan, Overhead, size};
use serde_json::{Value, json};

/// One model of the pair.
struct Part<'a> {
    role: &'static str,
    folder: &'a Folder,
    weights: &'a Checkpoint,
    /// Of the keys and values of one token: f32 on the CPU, bf16 on a device.
    kv_bytes: usize,
    max_positions: usize,
    tensors: Vec<(String, Vec<usize>)>,
    /// The plan of a drafter.
    plan: Option<&'a DrafterConfig>,
    /// A hybrid or MoE target.
    target: Option<&'a TargetConfig>,
}

/// Prints the models, and what they take on a device with this capacity; `None` on the CPU.
pub fn print_models(job: &Job, pair: &Pair, capacity: Option<BatchConfig>) -> Result<u8> {
    let memory = capacity.map(|capacity| MemoryPlan::new(pair, capacity)).transpose()?;
    let target = &pair.target;
    let kv_element = if capacity.is_some() { 2 } else { size_of::<f32>() };
    let kv_bytes = |stack: &Stack| stack.kv_bytes_per_token(kv_element);
    let mut parts = vec![Part {
        role: "target",
        folder: &target.folder,
        weights: &target.weights,
        kv_bytes: kv_bytes(&target.config.stack),
        max_positions: target.config.stack.max_positions,
        tensors: target.config.tensors(),
        plan: None,
        target: Some(&target.config).filter(|c| c.family.is_hybrid() || c.family.is_moe()),
    }];
    parts.extend(pair.drafter().map(|drafter| Part {
        role: "drafter",
        folder: &drafter.folder,
        weights: &drafter.weights,
        kv_bytes: kv_bytes(&drafter.config.stack),
        max_positions: drafter.config.stack.max_positions,
        tensors: drafter.config.tensors(),
        plan: Some(&drafter.config),
        target: None,
    }));
    let mut out = Output::default();
    let mut all = json!({});
    if let Some(lookup) = pair.draft.lookup() {
        all["lookup"] = json!({ "name": lookup.name(), "least": lookup.least, "most": lookup.most });
    }
    let (mut total, mut kv) = (0, 0);
    for part in &parts {
        let groups = groups(part.weights, &part.tensors)?;
        let bytes: usize = groups.iter().map(|g| g.bytes).sum();
        total += bytes;
        kv += part.kv_bytes;
        match job.json() {
            true => {
                all[part.role] = part.json(&groups, bytes);
                if let Some(plan) = part.plan {
                    all[part.role]["plan"] = plan_json(plan);
                }
                if let Some(target) = part.target {
                    all[part.role]["family"] = target.family.to_string().into();
                    all[part.role]["state_bytes"] = target.stack.state_bytes().into();
                    all[part.role]["record_bytes_per_row"] = target.stack.record_bytes().into();
                }
            }
            false => part.lines(&mut out, &groups, bytes)?,
        }
    }
    if job.json() {
        all["weight_bytes"] = total.into();
        all["kv_bytes_per_token"] = kv.into();
        if let Some(plan) = &memory {
            all["memory"] = memory_json(plan);
        }
        out.line(&all.to_string())?;
    } else {
        if let Some(lookup) = pair.draft.lookup() {
            let Lookup { least, most } = lookup;
            out.line(&format!("drafts: {}, matches of {least} to {most} tokens, no weights", lookup.name()))?;
        }
        out.line(&format!(
            "in all: {} of weights, used where the files have them, and {kv} bytes of KV per token",
            size(total)
        ))?;
        if let Some(plan) = &memory {
            out.line(&plan.to_string())?;
        }
    }
    Ok(0)
}

fn memory_json(plan: &MemoryPlan) -> Value {
    json!({
        "room": capacity_json(plan.config),
        "lines": plan.lines.iter().map(|l| json!({"what": l.what, "bytes": l.bytes})).collect::<Vec<_>>(),
        "bytes": plan.total(),
        "loading_bytes": plan.loading(),
        "gpu_bytes": plan.needed(Overhead::GPU),
        "pinned_bytes": plan.pinned,
        "page_bytes": plan.page_bytes,
    })
}

fn capacity_json(capacity: BatchConfig) -> Value {
    let BatchConfig { sequences, block, pages, positions, tree, .. } = capacity;
    let mut value = json!({ "sequences": sequences, "block": block, "positions": positions, "pages": pages });
    if tree > 0 {
        value["tree"] = tree.into();
    }
    value
}

/// Prints the launches of a round of all slots.
pub fn print_launches(job: &Job, pair: &Pair, capacity: BatchConfig) -> Result<u8> {
    // Rejection and block verification sample drafts at any temperature.
    let sampled = job.sampling.temperature != 0.0 || capacity.draft_probs;
    let nodes = graph_listing::of_round(pair, capacity, sampled)?;
    let sections = graph_listing::outline(&nodes);
    let layers = graph_listing::layers(&sections);
    let mut out = Output::default();
    if job.json() {
        let record = json!({
            "room": capacity_json(capacity),
            "sampled": sampled,
            "launches": nodes.len(),
            "layers": layers.map(|(layers, _)| layers),
            "launches_per_layer": layers.map(|(_, each)| each),
            "sections": sections.iter().map(section_json).collect::<Vec<_>>(),
        });
        out.line(&record.to_string())?;
        return Ok(0);
    }
    let how = if sampled { "sampled" } else { "greedy" };
    out.line(&format!("a round of {capacity}, {how}"))?;
    out.line(&format!("{:30} {:>16} {:>8} {:>13}", "", "grid", "threads", "shared memory"))?;
    for section in &sections {
        out.line(section.name)?;
        for group in &section.groups {
            group_lines(&mut out, section, group)?;
        }
    }
    let rest = match layers {
        Some((layers, each)) => {
            format!(": {each} for each of {layers} layers, and {}", nodes.len() - layers * each)
        }
        None => String::new(),
    };
    out.line(&format!("a round is {} launches{rest}", nodes.len()))?;
    Ok(0)
}

fn group_lines(out: &mut Output, section: &Section, group: &graph_listing::Group) -> Result<()> {
    let graph_listing::Group { nodes, times, layers } = group;
    let indent = match layers.len() {
        0 if *times == 1 => "  ",
        0 => {
            out.line(&format!("  {times} x:"))?;
            "    "
        }
        1 => {
            let times = if *times > 1 { format!(", {times} x") } else { String::new() };
            out.line(&format!("  layer {} of the {}{times}:", layers.start, section.model))?;
            "    "
        }
        _ => {
            let (first, last) = (layers.start, layers.end - 1);
            out.line(&format!("  layers {first}..{last} of the {}, {times} x:", section.model))?;
            "    "
        }
    };
    for node in *nodes {
        out.line(&match node {
            Node::Launch(launch) => {
                let name = format!("{indent}{}", launch.kernel.name);
                let grid = launch.grid.map(|n| n.to_string()).join(" x ");
                format!("{name:30} {grid:>16} {:8} {:>13}", launch.kernel.threads, launch.shared)
            }
            Node::Copy { to, .. } => format!("{indent}a copy of {} bytes", to.bytes()),
            Node::Fill { to, .. } => format!("{indent}a fill of {} bytes", to.bytes()),
        })?;
    }
    Ok(())
}

fn section_json(section: &Section) -> Value {
    let step = |node: &Node| match node {
        Node::Launch(l) => json!({
            "kernel": l.kernel.name, "grid": l.grid, "threads": l.kernel.threads, "shared_bytes": l.shared,
        }),
        Node::Copy { to, .. } => json!({ "copy_bytes": to.bytes() }),
        Node::Fill { to, .. } => json!({ "fill_bytes": to.bytes() }),
    };
    let group = |group: &graph_listing::Group| {
        let layers = (!group.layers.is_empty()).then(
            || json!({ "model": section.model, "first": group.layers.start, "count": group.layers.len() }),
        );
        let launches: Vec<Value> = group.nodes.iter().map(step).collect();
        json!({ "times": group.times, "layers": layers, "launches": launches })
    };
    json!({ "name": section.name, "groups": section.groups.iter().map(group).collect::<Vec<_>>() })
}

impl Part<'_> {
    fn json(&self, groups: &[Group], bytes: usize) -> Value {
        let files = self.weights.files();
        json!({
            "folder": self.folder.name(),
            "weight_bytes": bytes,
            "kv_bytes_per_token": self.kv_bytes,
            "max_positions": self.max_positions,
            "files": files.iter().map(|(name, bytes)| json!({"file": name, "bytes": bytes})).collect::<Vec<_>>(),
            "tensors": groups.iter().map(|g| json!({
                "name": g.name, "count": g.count, "shape": g.shape, "dtype": g.dtype, "bytes": g.bytes,
            })).collect::<Vec<_>>(),
        })
    }

    fn lines(&self, out: &mut Output, groups: &[Group], bytes: usize) -> Result<()> {
        out.line(&format!(
            "{} {}: {} of weights, {} bytes of KV per token, {} positions",
            self.role,
            self.folder.name(),
            size(bytes),
            self.kv_bytes,
            self.max_positions
        ))?;
        if let Some(plan) = self.plan {
            out.line(&format!("  {}", plan_line(plan)))?;
        }
        if let Some(target) = self.target {
            out.line(&format!("  {}", layers_line(target)))?;
            if target.family.is_hybrid() {
                let (states, records) = (target.stack.state_bytes(), target.stack.record_bytes());
                out.line(&format!(
                    "  a sequence has {states} bytes of state, and {records} bytes of records for each row of its last pass"
                ))?;
            }
        }
        for (name, bytes) in self.weights.files() {
            out.line(&format!("  file {name}: {bytes} bytes"))?;
        }
        for g in groups {
            let shape = format!("{:?}", g.shape);
            out.line(&format!(
                "  {:3} x {:48} {shape:16} {:4} {:>12} bytes",
                g.count, g.name, g.dtype, g.bytes
            ))?;
        }
        Ok(())
    }
}

/// The layers of a hybrid or MoE target.
fn layers_line(target: &TargetConfig) -> String {
    let stack = &target.stack;
    let recurrent = stack.delta_net_layers();
    let mut line = format!("{}: {} layers of attention", target.family, stack.attention.len() - recurrent);
    if recurrent > 0 {
        line += &format!(", {recurrent} of Gated DeltaNet");
    }
    if let Some(moe) = &stack.moe {
        let shared = if moe.shared > 0 { " and a shared one" } else { "" };
        line += &format!(", {} of {} experts a row{shared}", moe.chosen, moe.experts);
    }
    line
}

/// What a drafter was taken for: family, layout, slots, drafts of a round, taps, vocabulary.
fn plan_line(plan: &DrafterConfig) -> String {
    let taps = plan.taps.iter().map(usize::to_string).collect::<Vec<_>>().join(" ");
    let vocabulary = match plan.own_head {
        Some(rows) => format!("head of its own for {rows} of {} tokens", plan.vocab),
        None => "the target's head".into(),
    };
    let (identity, slots, drafts) = (plan.identity, plan.slots, plan.block - 1);
    let slots = if plan.chain().is_some() { "a chain".into() } else { slots.to_string() };
    let line =
        format!("{identity}, {slots}: {drafts} drafts a round, outputs of layers {taps}, {vocabulary}");
    match plan.dependence {
        Dependence::Walk(Markov { kind, rank, .. }) => {
            format!("{line}, a {} Markov head of rank {rank}", lower(&kind))
        }
        Dependence::Select(Selector { rank, candidates }) => {
            format!("{line}, a selector of rank {rank} among {candidates} candidates")
        }
        Dependence::Independent | Dependence::Chain(_) => line,
    }
}

fn plan_json(plan: &DrafterConfig) -> Value {
    json!({
        "family": lower(&plan.identity.family), "layout": lower(&plan.identity.layout),
        "slots": plan.chain().is_none().then(|| plan.slots.to_string()), "walk": plan.walk().map(|walk| lower(&walk.kind)),
        "drafts": plan.block - 1, "taps": plan.taps, "own_embedding": plan.own_embedding,
        "own_head": plan.own_head, "vocab": plan.vocab, "reduced": plan.ids.is_some(),
    })
}

/// The name of a variant in lower case.
fn lower(variant: &dyn std::fmt::Debug) -> String {
    format!("{variant:?}").to_lowercase()
}

/// Tensors whose names differ only in the layer.
struct Group {
    name: String,
    count: usize,
    shape: Vec<usize>,
    dtype: String,
    bytes: usize,
}

fn groups(weights: &Checkpoint, tensors: &[(String, Vec<usize>)]) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    for (name, shape) in tensors {
        let tensor = weights.tensor(name, shape)?;
        let parts = name.split('.').map(|part| if part.parse::<usize>().is_ok() { "*" } else { part });
        let name = parts.collect::<Vec<_>>().join(".");
        let dtype = format!("{:?}", tensor.dtype).to_lowercase();
        let bytes = tensor.bytes().len();
        match groups.iter_mut().find(|g| g.name == name && g.shape == *shape && g.dtype == dtype) {
            Some(group) => {
                group.count += 1;
                group.bytes += bytes;
            }
            None => groups.push(Group { name, count: 1, shape: shape.clone(), dtype, bytes }),
        }
    }
    Ok(groups)
}
