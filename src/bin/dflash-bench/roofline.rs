//! `roofline`: the least times of a pair on a card by `dflash::perf::roofline`, and the plan of its memory.
//! Nothing runs.

use crate::format::{merged, whole_or_not};
use crate::record::{Better, Kind, Machine, Model, Record, Row};
use crate::{args, model};
use dflash::checkpoint::config::Stack;
use dflash::checkpoint::pair::{self, Pair};
use dflash::cli::terminal;
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::memory::{MemoryPlan, Overhead};
use dflash::perf::roofline::{self, CARDS, Card, Pass};
use dflash::spec::draft_length::Costs;
use dflash::spec::tree::MAX_TREE_ROWS;
use dflash::{Error, Result};
use serde_json::{Map, Value, json};

/// A title and the record.
///
/// # Errors
/// [`Error::Usage`] for wrong flags; otherwise those of [`model::pair`].
pub fn run(flags: &args::Roofline) -> Result<(String, Record)> {
    let card = card(flags)?;
    let pair = model::pair(&flags.shapes.model, flags.shapes.draft.clone(), &flags.shapes.drafter)?;
    let trained = pair.drafter().map(|drafter| drafter.config.block);
    let tree = flags.tree.as_ref().map_or(trained.into_iter().collect(), |list| list.0.clone());
    check(flags, &pair, &tree)?;
    let capacity = if card.memory.is_finite() { format!(", {} GB", card.memory) } else { String::new() };
    let usual = if flags.card.is_none() && flags.bandwidth.is_none() { "the default card " } else { "" };
    let title = format!(
        "{} on {usual}{} ({} GB/s, {} TFLOP/s{capacity}, nominal): predicted from bytes and operations, not measured",
        model::title(&pair),
        card.name,
        card.bandwidth,
        card.tflops
    );
    let machine = Machine {
        card: flags.bandwidth.is_none().then(|| card.name.to_string()),
        gigabytes_per_s: Some(card.bandwidth),
        tflops: Some(card.tflops),
        memory_gigabytes: flags.bandwidth.is_none().then_some(card.memory),
        ..Machine::default()
    };
    let mut record = Record::new("roofline", machine, Model::of(&pair));
    record.settings = model::drafter_settings(&flags.shapes.drafter);
    weights(&pair, &mut record.rows);
    for &context in &flags.context.0 {
        for &batch in &flags.batch.0 {
            passes(flags, &pair, &card, (context, batch), &tree, &mut record.rows);
            record.rows.extend(cheapest(flags, &pair, &card, context));
            memory(&pair, &card, context, batch, &mut record.rows);
        }
    }
    Ok((title, record))
}

fn card(flags: &args::Roofline) -> Result<Card> {
    if let (Some(bandwidth), Some(tflops)) = (flags.bandwidth, flags.flops) {
        return Ok(Card { name: "a card", bandwidth, tflops, memory: f64::INFINITY });
    }
    named(flags.card.as_deref()).map_err(|e| Error::Usage(format!("{e}, or --bandwidth and --flops")))
}

/// The card of `--card`; an H200 without it.
pub fn named(name: Option<&str>) -> Result<Card> {
    let name = name.unwrap_or("H200");
    Card::named(name).ok_or_else(|| {
        let known = CARDS.map(|card| card.name).join(", ");
        Error::Usage(format!("--card is {name:?}, expected {known}"))
    })
}

/// The maximum number of tokens of a round that verifies `rows` rows: a path has at most a block.
fn max_tokens(pair: &Pair, rows: usize) -> f64 {
    pair.drafter().map_or(1, |drafter| rows.min(drafter.config.block)) as f64
}

fn check(flags: &args::Roofline, pair: &Pair, tree: &[usize]) -> Result<()> {
    let wrong = |flag: &str, found: f64, expected: String| {
        Err(Error::Usage(format!("--{flag} has {found}, expected {expected}")))
    };
    let limit = pair.target.config.stack.max_positions;
    if let Some(&found) = flags.context.0.iter().find(|n| **n >= limit) {
        return wrong("context", found as f64, format!("less than {limit}, the positions of the target"));
    }
    if let Some(&found) = flags.batch.0.iter().find(|n| !(1..=1024).contains(*n)) {
        return wrong("batch", found as f64, "1 to 1024".into());
    }
    if pair.drafter().is_none()
        && (flags.tree.is_some() || flags.acceptance.is_some() || flags.curve.is_some())
    {
        return Err(Error::Usage("--tree, --acceptance and --curve need a drafter: --draft DIR".into()));
    }
    if let Some(&found) = tree.iter().find(|n| !(2..=1024).contains(*n)) {
        return wrong("tree", found as f64, "2 to 1024".into());
    }
    if let Some(args::Numbers(curve)) = &flags.curve {
        let drafts = max_tokens(pair, MAX_TREE_ROWS) - 1.0;
        if curve.len() as f64 > drafts {
            return wrong(
                "curve",
                curve.len() as f64,
                format!("at most {drafts} probabilities, one for each draft"),
            );
        }
        if let Some(&found) = curve.iter().find(|p| !(0.0..=1.0).contains(*p)) {
            return wrong("curve", found, "probabilities, 0 to 1".into());
        }
        if let Some(&found) = flags.batch.0.iter().find(|n| **n != 1) {
            return wrong("batch", found as f64, "1 with --curve, which is of one sequence".into());
        }
    }
    let tokens = max_tokens(pair, tree.iter().copied().max().unwrap_or(1));
    let lengths = flags.acceptance.iter().flat_map(|list| &list.0);
    match lengths.into_iter().find(|n| !(1.0..=tokens).contains(*n)) {
        Some(&found) => wrong("acceptance", found, format!("1 to {tokens}, the tokens of a round")),
        None => Ok(()),
    }
}

/// Bytes of the weights and of a position's keys and values.
fn weights(pair: &Pair, rows: &mut Vec<Row>) {
    let mut count = |name: String, value: f64, unit: &str| {
        rows.push(Row::value(&name, json!({}), Kind::Counted, value, unit, Better::Lower, json!({})));
    };
    let target = &pair.target.config;
    // A chain's q, k and v have twice as many columns.
    let mut stack = |model: &str, stack: &Stack, chain: bool, more: (&str, f64), pass: f64| {
        for (part, bytes) in roofline::layer_bytes(stack) {
            let bytes = if chain && part == "qkv" { 2.0 * bytes } else { bytes };
            count(format!("{model}: {part} of a layer"), bytes / 1e6, "MB");
        }
        count(format!("{model}: {}", more.0), more.1 / 1e6, "MB");
        count(format!("{model}: weights of a pass"), pass / 1e9, "GB");
        count(format!("{model}: keys and values of a position"), stack.kv_bytes_per_token(2) as f64, "bytes");
    };
    stack(
        "target",
        &target.stack,
        false,
        ("lm_head", roofline::head_bytes(target)),
        roofline::target_bytes(target, 1),
    );
    if let Some(pair::Model { config, .. }) = pair.drafter() {
        stack(
            "drafter",
            &config.stack,
            config.chain().is_some(),
            ("fc", roofline::fc_bytes(config)),
            roofline::drafter_bytes(target, config),
        );
    }
}

fn passes(
    flags: &args::Roofline,
    pair: &Pair,
    card: &Card,
    (context, batch): (usize, usize),
    tree: &[usize],
    rows: &mut Vec<Row>,
) {
    let target = &pair.target.config;
    let parameters = |more: Value| merged(json!({ "context": context, "batch": batch }), more);
    let pass = |name: &str, parameters: Value, pass: &Pass, ms: f64| {
        let numbers = json!({ "GB": pass.bytes / 1e9, "GFLOP": pass.flops / 1e9 });
        Row::value(name, parameters, Kind::Predicted, ms, "ms", Better::Lower, numbers)
    };
    let rate = |name: &str, parameters: Value, tokens: f64, ms: f64| {
        let value = batch as f64 * tokens / ms * 1e3;
        Row::value(name, parameters, Kind::Predicted, value, "tok/s", Better::Higher, json!({}))
    };
    let step = roofline::target_pass(target, context, batch, 1);
    let step_ms = step.ms(card);
    rows.push(pass("AR step", parameters(json!({})), &step, step_ms));
    rows.push(rate("autoregressive decoding", parameters(json!({})), 1.0, step_ms));
    let Some(drafter) = pair.drafter() else { return };
    let draft = roofline::draft_pass(target, &drafter.config, context, batch, drafter.config.block);
    let draft_ms = draft.ms(card);
    rows.push(pass("draft", parameters(json!({})), &draft, draft_ms));
    for &nodes in tree {
        let verify = roofline::target_pass(target, context, batch, nodes);
        let ms = draft_ms + verify.ms(card);
        let round = Pass { bytes: draft.bytes + verify.bytes, flops: draft.flops + verify.flops };
        let with = |more: Value| merged(parameters(json!({ "tree": nodes })), more);
        rows.push(pass("verify", with(json!({})), &verify, verify.ms(card)));
        rows.push(pass("round", with(json!({})), &round, ms));
        let even = ms / step_ms;
        let name = "acceptance length to break even";
        rows.push(Row::value(name, with(json!({})), Kind::Predicted, even, "tok", Better::Lower, json!({})));
        let lengths = flags.acceptance.as_ref().map_or(&[2.0, 4.0, 6.0, 8.0][..], |list| &list.0);
        for &length in lengths.iter().filter(|length| **length <= max_tokens(pair, nodes)) {
            let parameters = with(json!({ "acceptance": whole_or_not(length) }));
            let mut row = rate("DFlash, synthetic acceptance", parameters, length, ms);
            row.numbers = Map::from_iter([("speed-up".to_string(), json!(length / even))]);
            rows.push(row);
        }
    }
}

/// The chain length with the least time per token under `--curve`.
fn cheapest(flags: &args::Roofline, pair: &Pair, card: &Card, context: usize) -> Option<Row> {
    let (curve, drafter) = (flags.curve.as_ref()?, &pair.drafter()?.config);
    let costs = Costs::from_roofline(card, &pair.target.config, drafter, context, 1, drafter.block);
    let mut accepted = 1.0;
    let survival: Vec<f64> = curve
        .0
        .iter()
        .map(|p| {
            accepted *= p;
            accepted
        })
        .collect();
    let (drafts, each) = costs.cheapest(&survival);
    let tokens = 1.0 + survival[..drafts].iter().sum::<f64>();
    let (ms, speed) = (costs.round(drafts), costs.ar_step() / each);
    let numbers = json!({ "drafts": drafts, "tokens": tokens, "ms": ms, "speed-up": speed });
    let (name, parameters) =
        ("DFlash, cheapest chain of the curve", json!({ "context": context, "batch": 1 }));
    Some(Row::value(name, parameters, Kind::Predicted, 1e3 / each, "tok/s", Better::Higher, numbers))
}

/// Memory of the pair and its sequences on a GPU, if the kernels support the pair.
fn memory(pair: &Pair, card: &Card, context: usize, batch: usize, rows: &mut Vec<Row>) {
    let block = pair.drafter().map_or(1, |drafter| drafter.config.block);
    let positions = (context + block).min(pair.target.config.stack.max_positions);
    let plan = match MemoryPlan::new(pair, BatchConfig::new(batch, block, positions)) {
        Ok(plan) => plan,
        Err(error) => return terminal::note(&format!("no memory plan: {error}")),
    };
    let needed = plan.needed(Overhead::GPU) as f64 / 1e9;
    let parameters = json!({ "context": context, "batch": batch });
    let numbers =
        if card.memory.is_finite() { json!({ "share of card": needed / card.memory }) } else { json!({}) };
    rows.push(Row::value("memory", parameters, Kind::Counted, needed, "GB", Better::Lower, numbers));
}
