//! `predict`: the time of every kernel of a round on a card, by `dflash::gpu::prediction`. Nothing runs.

use crate::format::merged;
use crate::record::{Better, Kind, Machine, Model, Record, Row};
use crate::{args, model, roofline};
use dflash::checkpoint::pair::Pair;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::device::Node;
use dflash::gpu::graph_listing::{of_round, outline};
use dflash::gpu::prediction::work::Point;
use dflash::gpu::prediction::{Gpu, TERMS, Time, decides, times};
use dflash::perf::roofline::{Pass, draft_pass, target_pass};
use dflash::spec::config::{ExactDrafts, SpecConfig};
use dflash::spec::draft_length::DraftLengthPolicy;
use dflash::spec::sampling::SamplingParams;
use dflash::{Error, Result};
use serde_json::{Value, json};

/// The most `--top-k` that `sample` selects from the best blocks of ids, which was counted.
const MOST_TOP_K: usize = 256;

/// A title and the record.
///
/// # Errors
/// [`Error::Usage`] for wrong flags; [`Error::Unsupported`] for a kernel without counts; otherwise those of
/// [`model::pair`].
pub fn run(flags: &args::Predict) -> Result<(String, Record)> {
    let gpu = Gpu::new(roofline::named(flags.card.as_deref())?, flags.ceiling)?;
    let args::Predict { temperature, top_k, top_p, .. } = *flags;
    let sampling = SamplingParams { temperature, top_k, top_p, ..SamplingParams::default() };
    sampling.check()?;
    let pair = model::pair(&flags.shapes.model, flags.shapes.draft.clone(), &flags.shapes.drafter)?;
    let block = pair.block(flags.block)?;
    let drafts = flags.tree.map_or(ExactDrafts::Chain, |rows| ExactDrafts::BestFirstTree { rows });
    let spec = SpecConfig::Exact { drafts, length: DraftLengthPolicy::Full };
    spec.check()?;
    check(flags, &pair, block)?;

    let card = gpu.card;
    let machine = Machine {
        card: Some(card.name.to_string()),
        gigabytes_per_s: Some(card.bandwidth),
        tflops: Some(card.tflops),
        memory_gigabytes: Some(card.memory),
        ..Machine::default()
    };
    let mut record = Record::new("predict", machine, Model::of(&pair));
    record.settings = model::drafter_settings(&flags.shapes.drafter);
    record.settings.extend([
        ("temperature".into(), temperature.into()),
        ("top_k".into(), top_k.into()),
        ("top_p".into(), top_p.into()),
    ]);
    let points = flags.context.0.iter().flat_map(|&context| flags.batch.0.iter().map(move |&b| (context, b)));
    let points: Vec<(usize, usize)> = points.collect();
    for &(context, batch) in &points {
        let prediction =
            Prediction { pair: &pair, gpu: &gpu, spec: &spec, sampling: &sampling, context, batch };
        prediction.rows(block, points.len() == 1, &mut record.rows)?;
    }
    let form = flags.tree.map_or(format!("chains of {block}"), |rows| format!("trees of {rows}"));
    let form = if block > 1 { form } else { "AR steps".into() };
    let how = match sampling {
        _ if temperature == 0.0 => "greedy".into(),
        _ => format!("temperature {temperature}, top-k {top_k}, top-p {top_p}"),
    };
    let ceiling = if flags.ceiling.is_some() { "assumed ceiling" } else { "nominal" };
    let title = format!(
        "{} on {} ({} GB/s, {ceiling}; {} TFLOP/s, nominal), {form}, {how}: predicted from counters and shapes, \
         not measured",
        model::title(&pair),
        card.name,
        card.bandwidth,
        card.tflops
    );
    Ok((title, record))
}

fn check(flags: &args::Predict, pair: &Pair, block: usize) -> Result<()> {
    let wrong = |flag: &str, found: usize, expected: String| {
        Err(Error::Usage(format!("--{flag} has {found}, expected {expected}")))
    };
    let rows = flags.tree.unwrap_or(0).max(block);
    let most = pair.target.config.stack.max_positions.saturating_sub(rows);
    if let Some(&found) = flags.context.0.iter().find(|n| **n > most) {
        return wrong(
            "context",
            found,
            format!("at most {most}, the positions of the target before the round"),
        );
    }
    if let Some(&found) = flags.batch.0.iter().find(|n| !(1..=1024).contains(*n)) {
        return wrong("batch", found, "1 to 1024".into());
    }
    if flags.tree.is_some() && block < 2 {
        return Err(Error::Usage("--tree needs a drafter and a block of at least 2 rows".into()));
    }
    if flags.top_p < 1.0 && flags.top_k == 0 && flags.temperature != 0.0 {
        let sentence = "--top-p needs --top-k: what top-p alone reads of a row depends on its logits";
        return Err(Error::Usage(sentence.into()));
    }
    if flags.top_k > MOST_TOP_K {
        return wrong(
            "top-k",
            flags.top_k,
            format!("at most {MOST_TOP_K}: more reads the logits in another way"),
        );
    }
    Ok(())
}

/// One point of the grid.
struct Prediction<'a> {
    pair: &'a Pair,
    gpu: &'a Gpu,
    spec: &'a SpecConfig,
    sampling: &'a SamplingParams,
    context: usize,
    batch: usize,
}

impl Prediction<'_> {
    /// Appends the AR step, the round and its parts in ms, and before them with `kernels` the kernels in us.
    fn rows(&self, block: usize, kernels: bool, rows: &mut Vec<Row>) -> Result<()> {
        let target = &self.pair.target.config;
        let (nodes, times) = self.predict(1, &SpecConfig::default())?;
        let step = self.total("AR step", &times, Some(target_pass(target, self.context, self.batch, 1)));
        if block == 1 {
            if kernels {
                self.kernels(&nodes, &times, rows);
            }
            rows.push(step);
            return Ok(());
        }
        let (nodes, times) = self.predict(block, self.spec)?;
        if kernels {
            self.kernels(&nodes, &times, rows);
        }
        rows.push(step);
        let round = self.pair.drafter().map(|drafter| {
            let draft = draft_pass(target, &drafter.config, self.context, self.batch, block);
            let verified = self.spec.tree_rows().unwrap_or(0).max(block);
            let verify = target_pass(target, self.context, self.batch, verified);
            Pass { bytes: draft.bytes + verify.bytes, flops: draft.flops + verify.flops }
        });
        rows.push(self.total("round", &times, round));
        let mut first = 0;
        for section in outline(&nodes) {
            let end = first + section.nodes.len();
            rows.push(self.total(section.name, &times[first..end], None));
            first = end;
        }
        Ok(())
    }

    /// The launches of a round with blocks of `block` rows, and their times.
    fn predict(&self, block: usize, spec: &SpecConfig) -> Result<(Vec<Node>, Vec<Time>)> {
        let rows = spec.tree_rows().unwrap_or(0).max(block);
        let config = BatchConfig::for_pair(self.pair, self.batch, block, None, self.context + rows)?;
        let nodes = of_round(self.pair, config.for_spec(spec), self.sampling.temperature != 0.0)?;
        let point = Point { context: self.context, rows, depth: block, sampling: self.sampling.clone() };
        let times = times(&nodes, &point, self.gpu)?;
        Ok((nodes, times))
    }

    fn parameters(&self, more: Value) -> Value {
        merged(json!({ "context": self.context, "batch": self.batch }), more)
    }

    fn total(&self, name: &str, times: &[Time], floor: Option<Pass>) -> Row {
        let ms = times.iter().map(|time| time.us).sum::<f64>() / 1e3;
        let mut numbers = json!({ "launches": times.len() });
        if let Some(pass) = floor {
            let floor = pass.ms(&self.gpu.card);
            numbers = merged(
                numbers,
                json!({ "GB": pass.bytes / 1e9, "floor ms": floor, "share of floor": floor / ms }),
            );
        }
        let parameters = self.parameters(json!({}));
        Row::value(name, parameters, Kind::Predicted, ms, "ms", Better::Lower, numbers)
    }

    /// Appends a row for the equal launches of each part of the round.
    fn kernels(&self, nodes: &[Node], times: &[Time], rows: &mut Vec<Row>) {
        let mut groups: Vec<(String, String, Vec<&Time>)> = vec![];
        let mut all = times.iter();
        for section in outline(nodes) {
            for (node, time) in section.nodes.iter().zip(&mut all) {
                let (kernel, shape) = described(node);
                let name = format!("{}: {kernel}", section.name);
                match groups.iter_mut().find(|group| group.0 == name && group.1 == shape) {
                    Some(group) => group.2.push(time),
                    None => groups.push((name, shape, vec![time])),
                }
            }
        }
        for (name, shape, times) in groups {
            let us: f64 = times.iter().map(|time| time.us).sum();
            let terms: [f64; TERMS.len()] =
                std::array::from_fn(|term| times.iter().map(|time| time.terms[term]).sum());
            let numbers = json!({
                "times": times.len(),
                "us each": us / times.len() as f64,
                "blocks": times[0].blocks[0],
                "idle": times[0].blocks[1],
                "waves": times[0].waves,
            });
            let parameters = self.parameters(json!({ "shape": shape }));
            let row = Row::value(&name, parameters, Kind::Predicted, us, "us", Better::Lower, numbers);
            rows.push(Row { bound: Some(decides(&terms).into()), ..row });
        }
    }
}

/// The kernel of a step, and what tells its launches apart: outputs and inputs of a matrix, or the grid.
fn described(node: &Node) -> (&str, String) {
    let Node::Launch(launch) = node else { return ("copy or fill", String::new()) };
    let [x, y, z] = launch.grid;
    let shape = match (launch.kernel.file, &launch.numbers()[..]) {
        ("qkv" | "project" | "swiglu" | "head" | "inject", [_, n, k, ..]) => format!("{n}x{k}"),
        _ => format!("{x}, {y}, {z}"),
    };
    (launch.kernel.name, shape)
}
