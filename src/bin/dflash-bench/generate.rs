//! `generate`: answers prompts with autoregressive (AR) decoding and with DFlash in turn, in one process.

use crate::answers::{self, DECODING, Repeat};
use crate::machine::{Instruments, settle};
use crate::record::{Machine, Model, Record, Row};
use crate::{args, format, model};
use clap::{Args as _, FromArgMatches};
use dflash::checkpoint::pair::Pair;
use dflash::cli::device::{self, Choice};
use dflash::cli::interrupt::{self, is_interrupted};
use dflash::cli::spec_flags::SpecFlags;
use dflash::cli::{models, sigbus, terminal};
use dflash::cpu::decoder::Cpu;
use dflash::cpu::ops;
use dflash::engine::generate::{
    Backend, Decoder, Flow, Outcome, Request, TokenSink, TokenSinks, generate_all,
};
use dflash::engine::stats::{AcceptanceWatch, SpecRecord};
use dflash::gpu::batch_config::BatchConfig;
use dflash::gpu::decoder::{Batch, Models};
use dflash::gpu::device::{Counts, Device};
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::SamplingParams;
use dflash::text::prompt_files;
use dflash::text::prompts::{Content, Prompt, PromptEncoder, Settings};
use dflash::text::tokenizer::Text;
use dflash::{Error, Result};
use indicatif::ProgressBar;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::time::Instant;

/// The default of `--repeat`. Counters need no repeats.
const REPEATS: usize = 3;

/// The prompts without `--prompts`: a text a line, as in a file. They begin Python modules, which the demo
/// pair knows.
const BUILT_IN: &str = include_str!("prompts.jsonl");

/// Flags of a run that takes seconds on any machine.
///
/// # Errors
/// [`Error::Internal`] if the flags are no longer flags of `generate`.
pub fn quick() -> Result<args::Generate> {
    let command = args::Generate::augment_args(clap::Command::new("generate"));
    let matches = command.try_get_matches_from(["generate", "--max-tokens", "64", "--repeat", "2"]);
    matches
        .and_then(|found| args::Generate::from_arg_matches(&found))
        .map_err(|e| Error::Internal(e.to_string()))
}

/// A titled record, and an error for the first answer of DFlash that differs from AR decoding's.
type Found = ((String, Record), Result<()>);

/// Measures every drafter of the flags, one after the other.
///
/// # Errors
/// What is wrong with flags, files, the device or its memory.
pub fn run(flags: &args::Generate) -> Result<Found> {
    let drafts = match flags.draft.len() {
        0 => vec![None],
        _ => flags.draft.iter().map(|draft| Some(draft.as_path())).collect(),
    };
    ops::on_threads(flags.threads, || {
        let plans = drafts.into_iter().map(|draft| Plan::new(flags, draft)).collect::<Result<Vec<_>>>()?;
        sigbus::guard("dflash-bench", plans.iter().map(|plan| &plan.pair))?;
        match &plans[..] {
            [plan] => measured(plan, false),
            _ => compared(&plans),
        }
    })
}

/// Measures several drafters. Their rows are in one record, with the parameter `draft`.
fn compared(plans: &[Plan]) -> Result<Found> {
    let names: Vec<String> =
        plans.iter().map(|plan| plan.pair.draft_name().unwrap_or("none".into())).collect();
    if let Some(name) = names.iter().enumerate().find(|(i, name)| names[..*i].contains(name)) {
        return Err(Error::Usage(format!("--draft {} is given twice", name.1)));
    }
    let ((title, mut record), mut identical) = measured(&plans[0], false)?;
    let of_draft = |rows: &mut [Row], name: &str| {
        rows.iter_mut().for_each(|row| drop(row.parameters.insert("draft".into(), name.into())));
    };
    of_draft(&mut record.rows, &names[0]);
    for (plan, name) in plans.iter().zip(&names).skip(1) {
        if is_interrupted() {
            record.incomplete = true;
            break;
        }
        let ((_, mut next), same) = measured(plan, true)?;
        of_draft(&mut next.rows, name);
        record.rows.append(&mut next.rows);
        record.incomplete |= next.incomplete;
        identical = identical.and(same);
    }
    record.model.drafter = Some(names.join(", "));
    let drafting = plans.iter().find(|plan| plan.pair.drafts());
    record.drafts = drafting.map(|plan| SpecRecord::new(&plan.requests[0].spec));
    let blocks: Vec<String> = plans.iter().map(|plan| plan.config.block.to_string()).collect();
    record.settings.insert("block".into(), blocks.join(",").into());
    let others = plans[1..].iter().map(|plan| model::drafter_title(&plan.pair).unwrap_or("none".into()));
    let first = model::title(&plans[0].pair);
    let models = [first.clone()].into_iter().chain(others).collect::<Vec<_>>().join(", ");
    Ok(((title.replacen(&first, &models, 1), record), identical))
}

/// What the flags come to: every default filled in, every conflict refused. Nothing after it reads flags.
struct Plan {
    pair: Pair,
    device: Choice,
    /// Which GPU, in the driver's order.
    gpu: u32,
    /// The batch; its sequences are the requests that run together.
    config: BatchConfig,
    requests: Vec<Request>,
    /// The name of each prompt.
    names: Vec<String>,
    /// The category of each prompt.
    categories: Vec<Option<String>>,
    /// `None`: the device's default.
    repeats: Option<usize>,
    /// Whether DFlash must give the tokens of AR decoding. `rejection` and `block` only keep the target's
    /// distribution, unless temperature 0 leaves one token.
    same_tokens: bool,
    /// The part of the title about prompts and sampling.
    title: String,
    /// What the record says about prompts and sampling.
    settings: Map<String, Value>,
}

impl Plan {
    fn new(flags: &args::Generate, draft: Option<&Path>) -> Result<Plan> {
        let sampling = check(flags, draft)?;
        let (prompts, categories) = prompts(flags)?;
        let names = prompts.iter().map(|prompt| prompt.name.clone()).collect();
        let (target, source) = models::folders(flags.target.as_deref(), draft)?;
        let pair = Pair::open_with(target, source, &flags.drafter.overrides())?;
        terminal::notes(&pair.notes);
        if pair.drafter().is_none() && draft.is_none() {
            models::note_missing_drafter(&pair);
        }
        // Beside drafters, `--draft none` has no use for their `--block`.
        let block = if pair.drafts() || flags.draft.len() < 2 { pair.block(flags.block)? } else { 1 };
        let requests = requests(flags, &pair, prompts, &sampling, block)?;
        let longest = requests.iter().map(Request::positions).max().unwrap_or(0);
        let spec = &requests[0].spec;
        spec.check_drafter(&pair)?;
        Ok(Plan {
            device: flags.device,
            gpu: flags.gpu.unwrap_or(0),
            config: BatchConfig::for_pair(&pair, flags.batch, block, flags.ctx, longest)?.for_spec(spec),
            same_tokens: spec.method() == VerifyMethod::Match || sampling.temperature == 0.0,
            title: title(flags, &pair, &requests),
            settings: settings(flags, &requests),
            repeats: flags.repeat,
            pair,
            requests,
            names,
            categories,
        })
    }
}

/// Measures one drafter; `quiet` does not say where.
fn measured(plan: &Plan, quiet: bool) -> Result<Found> {
    let Plan { pair, config, requests, categories, .. } = plan;
    let modes = if pair.drafts() { DECODING.len() } else { 1 };
    let run =
        Run { requests, modes, batch: config.sequences, repeats: plan.repeats, device: None, is_interrupted };
    let handle = device::for_pair(plan.device, plan.gpu, pair, *config, quiet)?;
    let (machine, repeats) = match &handle {
        None => {
            let backend = Cpu::load(pair, config.sequences, config.positions)?;
            interrupt::catch()?;
            let repeats = run.all(&mut *backend.decoder()?)?;
            (Machine::cpu(), repeats)
        }
        Some(handle) => {
            device::check_memory(handle, pair, *config, true)?;
            let (bar, mut progress) = terminal::weights(false);
            let models = Models::load_with(&*handle.device, pair, config.positions, &mut progress);
            bar.finish_and_clear();
            let models = models?;
            let mut decoder = Batch::new(&*handle.device, &models, *config)?;
            let instruments = Instruments::open(handle);
            interrupt::catch()?;
            let run = Run { device: Some((&*handle.device, &instruments)), ..run };
            let repeats = run.all(&mut decoder)?;
            (instruments.machine(handle), repeats)
        }
    };

    if pair.drafter().is_some() {
        let mut watch = AcceptanceWatch::default();
        let outcomes = repeats.iter().flat_map(|repeat| &repeat.outcomes[1]);
        outcomes.filter_map(|o| watch.add(&o.accepted, &o.drafted)).for_each(|line| terminal::note(&line));
    }
    let counted = machine.counts();
    let title = full_title(plan, &machine, repeats.len());
    let mut record = Record::new("generate", machine, Model::of(pair));
    record.drafts = pair.drafts().then(|| SpecRecord::new(&requests[0].spec));
    record.settings = plan.settings.clone();
    record.incomplete = is_interrupted();
    if repeats.is_empty() {
        return Ok(((title, record), Ok(())));
    }
    // An interrupted run may not have come to every prompt.
    let answered = repeats[0].outcomes[0].len();
    let prompt_tokens = requests[..answered].iter().map(|request| request.prompt.len()).sum();
    let (rows, identical) = answers::lossless(&repeats, &plan.names, prompt_tokens, plan.same_tokens);
    record.rows.extend(rows);
    record.rows.extend(match counted {
        true => answers::device_counters(&repeats),
        false => answers::timed(&repeats, categories, config.sequences),
    });
    if pair.drafts() {
        record.rows.extend(answers::counted(&repeats, categories, config.block));
    }
    Ok(((title, record), identical))
}

/// Checks the flags before any file is read; `draft` is the value of `--draft`.
fn check(flags: &args::Generate, draft: Option<&Path>) -> Result<SamplingParams> {
    let few = |flag: &str, found: usize, least: usize, why: &str| {
        Err(Error::Usage(format!("--{flag} is {found}, {why}: expected at least {least}")))
    };
    let args::Generate { temperature, top_k, top_p, min_p, seed, .. } = *flags;
    let sampling = SamplingParams { temperature, top_k, top_p, min_p, seed, stream: 0 };
    sampling.check()?;
    let target = flags.target.as_deref();
    flags.drafts.need_drafter(models::no_drafter(target, draft), flags.block)?;
    flags.drafter.need_drafter(models::without_drafter(target, draft))?;
    flags.drafts.config(&sampling)?;
    settle(flags.device, flags.gpu)?;
    match flags {
        _ if flags.max_tokens < 2 => {
            few("max-tokens", flags.max_tokens, 2, "which leaves no round to measure")
        }
        _ if flags.repeat == Some(0) => few("repeat", 0, 1, "which measures nothing"),
        _ if flags.count == Some(0) => few("count", 0, 1, "which leaves no prompt"),
        _ if flags.block == Some(1) => few("block", 1, 2, "which is AR decoding"),
        _ => Ok(sampling),
    }
}

/// The built-in prompts.
fn built_in() -> Result<Vec<Prompt>> {
    #[derive(serde::Deserialize)]
    struct Line {
        prompt: String,
    }
    let prompt = |(number, line): (usize, &str)| {
        let line: Line = serde_json::from_str(line)
            .map_err(|e| Error::Internal(format!("built-in prompt {number} is damaged: {e}")))?;
        Ok(Prompt::new(format!("built-in prompt {number}"), line.prompt))
    };
    (1..).zip(BUILT_IN.lines()).map(prompt).collect()
}

/// The first `--count` prompts, and the category of each.
fn prompts(flags: &args::Generate) -> Result<(Vec<Prompt>, Vec<Option<String>>)> {
    let (mut prompts, source) = match &flags.prompts {
        Some(path) => {
            let file = prompt_files::lines(path, flags.prompt_key.as_deref())?;
            if !file.unused.is_empty() {
                let (name, fields) = (prompt_files::name(path), file.unused.join(", "));
                terminal::note(&format!("{name}: these fields are not used: {fields}"));
            }
            (file.prompts, format!("{} holds", prompt_files::name(path)))
        }
        None => (built_in()?, "the built-in list holds".into()),
    };
    let held = prompts.len();
    let count = flags.count.unwrap_or(held);
    if count > held {
        let held = terminal::counted(held, "prompt");
        return Err(Error::Usage(format!("--count is {count}, but {source} {held}")));
    }
    prompts.truncate(count);
    if !(1..=count).contains(&flags.batch) {
        let batch = flags.batch;
        return Err(Error::Usage(format!(
            "--batch is {batch}, expected 1 to {count}, the number of prompts"
        )));
    }
    let own = |prompt: &&Prompt| !prompt.turns.is_empty() || prompt.settings != Settings::default();
    if let Some(prompt) = prompts.iter().find(own) {
        let what = match prompt.turns.is_empty() {
            true => "settings of its own, but all prompts are measured with the same ones",
            false => "several turns, expected one prompt that runs alone",
        };
        return Err(Error::Usage(format!("{} has {what}", prompt.name)));
    }
    let category = |prompt: &Prompt| match &prompt.category {
        Value::Null => Ok(None),
        Value::String(name) if !name.contains(char::is_control) => Ok(Some(name.clone())),
        other => {
            let name = &prompt.name;
            Err(Error::Usage(format!("{name} has the category {other}, expected a text of one line")))
        }
    };
    let categories = prompts.iter().map(category).collect::<Result<_>>()?;
    Ok((prompts, categories))
}

fn requests(
    flags: &args::Generate,
    pair: &Pair,
    prompts: Vec<Prompt>,
    sampling: &SamplingParams,
    block: usize,
) -> Result<Vec<Request>> {
    let context = pair.context(flags.ctx)?;
    let mut text = Text::find(&pair.target.folder, None)?;
    if let Some(text) = &mut text {
        text.limit(context);
        terminal::notes(&text.notes);
    }
    let has_template = text.as_ref().is_some_and(Text::has_template);
    let tokens =
        PromptEncoder { pair, text: text.as_ref(), raw: false, system: None, variables: &[], context };
    let stops = flags.stops.ids(&pair.target.config, text.as_ref(), &[])?;
    if flags.verbose {
        terminal::note(&format!("stop ids: {stops}"));
    }
    let request = |(stream, prompt): (u32, Prompt)| {
        if let (Content::Chat(_), false) = (&prompt.content, has_template) {
            let (name, folder) = (prompt.name, pair.target.folder.name());
            return Err(Error::Usage(format!(
                "{name} has messages, and {folder} has no chat template: expected {{\"prompt\": TEXT}}"
            )));
        }
        let sampling = SamplingParams { stream, ..sampling.clone() };
        let (prompt, stop_ids) = (tokens.encode(&prompt)?, stops.ids());
        let spec = flags.drafts.config(&sampling)?;
        Ok(Request { prompt, max_tokens: flags.max_tokens, sampling, stop_ids, block, spec })
    };
    (0..).zip(prompts).map(request).collect()
}

/// The part of the title about prompts and sampling.
fn title(flags: &args::Generate, pair: &Pair, requests: &[Request]) -> String {
    let source = if flags.prompts.is_none() { "built-in " } else { "" };
    let together = if flags.batch > 1 { format!(", {} together", flags.batch) } else { String::new() };
    let how = match flags.temperature {
        0.0 => "greedy".into(),
        temperature => format!("temperature {temperature}, seed {}", flags.seed),
    };
    let (prompts, most) = (terminal::counted(requests.len(), &format!("{source}prompt")), flags.max_tokens);
    let drafts = match pair.drafts() {
        true => drafts(&flags.drafts, &SpecRecord::new(&requests[0].spec)),
        false => String::new(),
    };
    format!("{prompts}{together}, up to {most} tokens each, {how}{drafts}")
}

/// What decides the answers besides the models. Records that differ in it answered other questions.
fn settings(flags: &args::Generate, requests: &[Request]) -> Map<String, Value> {
    // The prompts as a digest (FNV-1a): two lists of prompts with the same tokens are the same.
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    for byte in requests
        .iter()
        .flat_map(|r| [&[r.prompt.len() as u32], &r.prompt[..]].concat())
        .flat_map(u32::to_le_bytes)
    {
        digest = (digest ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let stops: Vec<String> = requests[0].stop_ids.iter().map(u32::to_string).collect();
    let args::Generate { temperature, top_k, top_p, min_p, seed, .. } = *flags;
    let all = json!({
        "prompts": format!("{} of digest {digest:016x}", requests.len()),
        "max_tokens": flags.max_tokens, "batch": flags.batch, "block": requests[0].block,
        "stop_ids": stops.join(","), "temperature": temperature,
    });
    // Greedy decoding does not read them.
    let sampled = match temperature > 0.0 {
        true => json!({ "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed }),
        false => json!({}),
    };
    let mut all = format::merged(all, sampled).as_object().cloned().unwrap_or_default();
    all.extend(model::drafter_settings(&flags.drafter));
    all
}

/// How drafts are made and verified, where that differs from the defaults.
fn drafts(flags: &SpecFlags, drafts: &SpecRecord) -> String {
    let mut all = vec![];
    if flags.verify != VerifyMethod::Match {
        all.push(format!("--verify {}", flags.verify.name()));
    }
    all.extend(drafts.tree.map(|rows| format!("trees of {rows}")));
    let adaptive =
        |least: Option<f64>| least.map_or("adaptive".into(), |least| format!("adaptive at {least}"));
    all.extend(flags.adaptive.map(adaptive));
    all.extend(flags.confidence.map(|least| format!("confidence {least}")));
    all.extend(flags.coupled.then(|| "coupled drafts".into()));
    let own = drafts.draft_temperature.filter(|_| flags.draft_temperature.is_some());
    all.extend(own.map(|temperature| format!("drafts at temperature {temperature}")));
    all.iter().map(|what| format!(", {what}")).collect()
}

fn full_title(plan: &Plan, machine: &Machine, repeats: usize) -> String {
    let on = machine.card.as_ref().or(machine.device.as_ref()).cloned().unwrap_or_default();
    let what = if machine.counts() {
        "counters, no times".to_string()
    } else {
        let how = if plan.pair.drafts() { "AR and DFlash in turn" } else { "AR decoding alone" };
        format!("{how}, {}", terminal::counted(repeats, "time"))
    };
    let (models, prompts) = (model::title(&plan.pair), &plan.title);
    let distribution = match plan.same_tokens || !plan.pair.drafts() {
        true => "",
        false => {
            "; the distribution is the target's, the tokens are not those of AR and are not compared with them"
        }
    };
    format!("{models} on {on}: {prompts}; {what}{distribution}")
}

/// All requests, and the device that runs them.
struct Run<'a> {
    requests: &'a [Request],
    /// How many of [`DECODING`] run: 1 without a drafter.
    modes: usize,
    /// Requests that run together.
    batch: usize,
    /// `None`: the device's default.
    repeats: Option<usize>,
    /// None: the CPU.
    device: Option<(&'a dyn Device, &'a Instruments)>,
    is_interrupted: fn() -> bool,
}

impl Run<'_> {
    /// All repeats after a warm-up, which counters do not need. Interrupted, what is whole until then: of
    /// the last repeat the prompts that were answered in every mode.
    fn all(&self, decoder: &mut dyn Decoder) -> Result<Vec<Repeat>> {
        let counted = self.counters().is_some();
        let repeats = self.repeats.unwrap_or(if counted { 1 } else { REPEATS });
        let bar = terminal::progress("answers {bar:40} {pos} of {len}, {eta} left", false);
        if !counted {
            self.once(decoder, &self.requests[..self.batch], 0, &ProgressBar::hidden())?;
        }
        bar.set_length((repeats * self.requests.len() * self.modes) as u64);
        let each = |number| self.once(decoder, self.requests, number, &bar);
        let numbers = (0..repeats).take_while(|_| !(self.is_interrupted)());
        let repeats: Result<Vec<Repeat>> = numbers.map(each).collect();
        bar.finish_and_clear();
        Ok(repeats?.into_iter().filter(|repeat| !repeat.outcomes[0].is_empty()).collect())
    }

    fn counters(&self) -> Option<Counts> {
        self.device.and_then(|(device, _)| device.counters())
    }

    /// Repeat `number`, from 0: each prompt, or with `--batch` all of them, in every mode. The order
    /// alternates, so that neither profits from its place.
    fn once(
        &self,
        decoder: &mut dyn Decoder,
        requests: &[Request],
        number: usize,
        bar: &ProgressBar,
    ) -> Result<Repeat> {
        let mut repeat = Repeat::default();
        let together = if self.batch > 1 { requests.len() } else { 1 };
        for (i, group) in requests.chunks(together).enumerate() {
            let mut part = Repeat::default();
            for turn in 0..self.modes {
                self.answer(decoder, group, (number + i + turn) % self.modes, &mut part, bar)?;
                if (self.is_interrupted)() {
                    return Ok(repeat);
                }
            }
            repeat.append(part);
        }
        Ok(repeat)
    }

    /// Answers a group of requests in one mode, for its part of a repeat. Interrupted, the part is not whole.
    fn answer(
        &self,
        decoder: &mut dyn Decoder,
        group: &[Request],
        mode: usize,
        part: &mut Repeat,
        bar: &ProgressBar,
    ) -> Result<()> {
        let block = |request: &Request| if mode == 0 { 1 } else { request.block };
        let group: Vec<Request> = group.iter().map(|r| Request { block: block(r), ..r.clone() }).collect();
        let outcomes = vec![None; group.len()];
        let mut sink = Outcomes { outcomes, bar, is_interrupted: self.is_interrupted };
        // A device may still run rounds beyond the end of the last answer.
        if let Some((device, _)) = self.device {
            device.synchronize()?;
        }
        let (before, clock) = (self.counters(), Instant::now());
        generate_all(decoder, &group, &mut sink)?;
        part.wall[mode] = clock.elapsed();
        if (self.is_interrupted)() {
            return Ok(());
        }
        if let (Some(before), Some(after)) = (before, self.counters()) {
            part.counts[mode] = after - before;
        }
        if let Some(now) = self.device.and_then(|(_, instruments)| instruments.is_throttled()) {
            part.throttled = Some(now || part.throttled.unwrap_or(false));
        }
        let outcomes: Option<Vec<Outcome>> = sink.outcomes.into_iter().collect();
        let missing = || Error::Internal("a request without an outcome".into());
        part.outcomes[mode] = outcomes.ok_or_else(missing)?;
        Ok(())
    }
}

/// Collects outcomes and advances the progress bar.
struct Outcomes<'a> {
    outcomes: Vec<Option<Outcome>>,
    bar: &'a ProgressBar,
    is_interrupted: fn() -> bool,
}

impl Outcomes<'_> {
    fn flow(&self) -> Flow {
        if (self.is_interrupted)() { Flow::Interrupt } else { Flow::Continue }
    }
}

impl TokenSink for Outcomes<'_> {
    fn token(&mut self, _id: u32, _drafted: bool) -> Result<Flow> {
        Ok(self.flow())
    }
}

impl TokenSinks for Outcomes<'_> {
    fn sink(&mut self, _index: usize) -> Result<&mut dyn TokenSink> {
        Ok(self)
    }

    fn done(&mut self, index: usize, outcome: Outcome) -> Result<Flow> {
        self.outcomes[index] = Some(outcome);
        self.bar.inc(1);
        Ok(self.flow())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use dflash::engine::generate::{Emitted, Prefill};

    /// A decoder whose answers count up from the prompt. With `strays`, drafts count by another step. It logs
    /// the prompt and the block of each request.
    struct Counter {
        slots: Vec<(u32, Request)>,
        log: Vec<(u32, usize)>,
        strays: bool,
    }

    impl Decoder for Counter {
        fn vocab(&self) -> usize {
            1000
        }
        fn context(&self) -> usize {
            1000
        }
        fn slots(&self) -> usize {
            self.slots.len()
        }
        fn admit(&mut self, slot: usize, request: &Request, _keep: bool) -> Result<Option<usize>> {
            self.log.push((request.prompt[0], request.block));
            self.slots[slot] = (request.prompt[0], request.clone());
            Ok(Some(0))
        }
        fn prefill(&mut self, slot: usize) -> Result<Prefill> {
            Ok(Prefill { done: 1, next: Some(self.slots[slot].0) })
        }
        fn round(&mut self, out: &mut [Emitted]) -> Result<()> {
            for ((last, request), out) in self.slots.iter_mut().zip(out) {
                let step = if self.strays && request.block > 1 { 2 } else { 1 };
                let tokens: Vec<u32> = (1..=request.block as u32).map(|i| *last + i * step).collect();
                *last = tokens[tokens.len() - 1];
                *out = Emitted { produced: tokens.len(), drafted: tokens.len() - 1, tokens };
            }
            Ok(())
        }
        fn release(&mut self, _slot: usize, _tokens: usize) -> Result<()> {
            Ok(())
        }
        fn keep_logits(&mut self) {}
        fn logits(&mut self, _slot: usize, _row: usize) -> Result<Vec<f32>> {
            Ok(vec![])
        }
    }

    fn request(id: u32) -> Request {
        Request {
            prompt: vec![id],
            max_tokens: 7,
            sampling: SamplingParams { stream: id, ..SamplingParams::default() },
            stop_ids: vec![],
            block: 4,
            spec: Default::default(),
        }
    }

    /// The repeats of requests 1 to 3, as many together as `decoder` has slots.
    fn all(decoder: &mut Counter, repeats: Option<usize>) -> Vec<Repeat> {
        until(decoder, repeats, || false)
    }

    fn until(decoder: &mut Counter, repeats: Option<usize>, is_interrupted: fn() -> bool) -> Vec<Repeat> {
        let (requests, batch) = ([1, 2, 3].map(request), decoder.slots.len());
        Run { requests: &requests, modes: 2, batch, repeats, device: None, is_interrupted }
            .all(decoder)
            .unwrap()
    }

    fn counter(slots: usize, strays: bool) -> Counter {
        Counter { slots: vec![(0, request(0)); slots], log: vec![], strays }
    }

    #[test]
    fn built_in_prompts_are_distinct_and_quick_flags_are_valid() {
        let prompts = built_in().unwrap();
        assert!(prompts.len() >= dflash::perf::statistics::MIN_SAMPLES, "too few for an interval");
        for (i, one) in prompts.iter().enumerate() {
            assert!(matches!(&one.content, Content::Text(text) if !text.is_empty()), "{}", one.name);
            assert!(prompts[..i].iter().all(|other| other.content != one.content), "{}", one.name);
        }
        let flags = quick().unwrap();
        check(&flags, None).unwrap();
        assert_eq!((flags.prompts, flags.batch, flags.repeat), (None, 1, Some(2)));
    }

    #[test]
    fn ar_and_dflash_take_turns_in_going_first() {
        let mut decoder = counter(1, false);
        let repeats = all(&mut decoder, Some(2));
        // After the warm-up.
        let expected = [
            [(1, 1), (1, 4)],
            [(1, 1), (1, 4)],
            [(2, 4), (2, 1)],
            [(3, 1), (3, 4)],
            [(1, 4), (1, 1)],
            [(2, 1), (2, 4)],
            [(3, 4), (3, 1)],
        ];
        assert_eq!(decoder.log, expected.concat());
        assert_eq!(repeats.len(), 2);
        for Repeat { outcomes: [ar, fast], wall, .. } in &repeats {
            assert!(wall.iter().all(|time| !time.is_zero()));
            for i in 0..3 {
                let tokens: Vec<u32> = (0..7).map(|n| i as u32 + 1 + n).collect();
                assert_eq!([&ar[i].tokens, &fast[i].tokens], [&tokens; 2]);
                assert_eq!((ar[i].accepted.clone(), fast[i].accepted.clone()), (vec![1; 6], vec![4, 4]));
            }
        }
    }

    #[test]
    fn batches_take_turns_by_the_repeat() {
        let mut decoder = counter(2, false);
        let repeats = all(&mut decoder, Some(2));
        let order: Vec<usize> = decoder.log.iter().map(|log| log.1).collect();
        assert_eq!(order, [1, 1, 4, 4, 1, 1, 1, 4, 4, 4, 4, 4, 4, 1, 1, 1]);
        assert!(repeats.iter().flat_map(|repeat| &repeat.outcomes).all(|outcomes| outcomes.len() == 3));
    }

    /// Interrupts at each of the first moments at which a run asks: what it returns is whole.
    #[test]
    fn an_interrupted_run_keeps_prompts_that_both_modes_answered() {
        use std::cell::Cell;
        thread_local!(static LEFT: Cell<usize> = const { Cell::new(0) });
        let is_interrupted = || LEFT.replace(LEFT.get().saturating_sub(1)) == 0;
        let (whole, mut answered) = (all(&mut counter(1, false), Some(2)), vec![]);
        for asked in 0..200 {
            LEFT.set(asked);
            let mut decoder = counter(1, false);
            let repeats = until(&mut decoder, Some(2), is_interrupted);
            assert!(asked > 0 || decoder.log.len() == 1, "nothing begins after the warm-up");
            let lengths = |repeat: &Repeat| repeat.outcomes.each_ref().map(Vec::len);
            for (repeat, whole) in repeats.iter().zip(&whole) {
                let [ar, fast] = lengths(repeat);
                assert!(ar == fast && ar > 0);
                let tokens = |repeat: &Repeat, n| -> Vec<Vec<u32>> {
                    repeat.outcomes.iter().flat_map(|side| &side[..n]).map(|o| o.tokens.clone()).collect()
                };
                assert_eq!(tokens(repeat, ar), tokens(whole, ar));
            }
            answered.push(repeats.iter().map(|repeat| lengths(repeat)[0]).sum::<usize>());
            let names = ["a", "b", "c"].map(String::from);
            assert_eq!(answers::lossless(&repeats, &names, 3, true).1, Ok(()));
            answers::counted(&repeats, &[None, None, None], 4);
            answers::timed(&repeats, &[None, None, None], 1);
        }
        assert!(answered.is_sorted() && answered[0] == 0 && answered[199] == 6, "{answered:?}");
        answered.dedup();
        assert_eq!(answered, [0, 1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn drafts_that_change_an_answer_are_found() {
        let names = ["a", "b", "c"].map(String::from);
        let repeats = all(&mut counter(1, true), Some(1));
        let (_, same) = answers::lossless(&repeats, &names, 3, true);
        let sentence = "a, repeat 1: after 1 equal tokens autoregressive decoding goes on with 2, and DFlash goes on with 3";
        assert_eq!(same, Err(Error::Lossless(sentence.into())));
        let (_, same) = answers::lossless(&all(&mut counter(1, false), None), &names, 3, true);
        assert_eq!(same, Ok(()));
    }
}
