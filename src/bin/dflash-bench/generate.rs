//! `generate`: a pair's answers to prompts, by autoregressive decoding and by DFlash in turn, in one process.

use crate::answers::{self, DECODING, Repeat};
use crate::args;
use crate::machine::Instruments;
use crate::record::{Machine, Model, Record};
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::{DEMO_DRAFTER, DEMO_TARGET, Folder};
use dflash::cli::device::{Choice, DeviceHandle};
use dflash::cli::sigbus;
use dflash::cli::spec_flags::name_flag;
use dflash::cli::terminal;
use dflash::cpu::decoder::Cpu;
use dflash::cpu::ops;
use dflash::engine::generate::{
    Backend, Decoder, Flow, Outcome, Request, TokenSink, TokenSinks, generate_all,
};
use dflash::engine::stats::SpecRecord;
use dflash::gpu::decoder::{Batch, Models};
use dflash::gpu::device::Counts;
use dflash::gpu::memory::BatchConfig;
use dflash::spec::config::VerifyMethod;
use dflash::spec::sampling::SamplingParams;
use dflash::text::prompts::{self, Content, Prompt, Tokens};
use dflash::text::tokenizer::Text;
use dflash::{Error, Result};
use indicatif::ProgressBar;
use serde_json::Value;
use std::time::Instant;

/// Repeats where `--repeat` asks for no others. Counters need none.
const REPEATS: usize = 3;

/// The title of a table, the record, and the first answer of DFlash that is not autoregressive decoding's.
pub fn run(flags: &args::Generate) -> Result<((String, Record), Result<()>)> {
    ops::install(|| measured(flags))
}

fn measured(flags: &args::Generate) -> Result<((String, Record), Result<()>)> {
    let sampling = check(flags)?;
    let (prompts, categories) = prompts(flags)?;
    let names: Vec<String> = prompts.iter().map(|prompt| prompt.name.clone()).collect();
    let (target, drafter) = match (&flags.target, &flags.draft) {
        (Some(target), Some(drafter)) => (Folder::Disk(target.clone()), Folder::Disk(drafter.clone())),
        _ => (DEMO_TARGET, DEMO_DRAFTER),
    };
    let pair = Pair::open(target, Some(drafter))?;
    sigbus::guard("dflash-bench", &pair)?;
    let block = pair.block(flags.block)?;
    let requests = requests(flags, &pair, prompts, &sampling, block)?;
    let longest = requests.iter().map(Request::positions).max().unwrap_or(0);
    let room = BatchConfig::of(&pair, flags.batch, block, flags.ctx, longest)?.for_spec(&requests[0].spec);

    let place = DeviceHandle::of_pair(flags.device, flags.gpu.unwrap_or(0), &pair, room, false)?;
    let (machine, repeats, counts) = match &place {
        None => {
            let backend = Cpu::load(&pair, room.sequences, pair.context(flags.ctx)?)?;
            let machine = Machine { device: Some(backend.name().into()), ..Machine::default() };
            let (repeats, counts) =
                Run { flags, requests: &requests, place: None }.all(&mut *backend.decoder()?)?;
            (machine, repeats, counts)
        }
        Some(place) => {
            place.has_memory(&pair, room, true)?;
            let (bar, mut progress) = terminal::weights(false);
            let models = Models::load_with(&*place.device, &pair, room.positions, &mut progress);
            bar.finish_and_clear();
            let models = models?;
            let mut decoder = Batch::new(&*place.device, &models, room)?;
            place.device.tally_conflicts(true);
            let instruments = Instruments::open(place);
            let run = Run { flags, requests: &requests, place: Some((place, &instruments)) };
            let (repeats, counts) = run.all(&mut decoder)?;
            (instruments.machine(place), repeats, counts)
        }
    };

    let model = Model {
        target: Some(pair.target.folder.name()),
        drafter: pair.drafter.as_ref().map(|drafter| drafter.folder.name()),
    };
    let title = title(flags, &machine, &model, &requests, repeats.len());
    let mut record = Record::new("generate", machine, model);
    record.drafts = Some(SpecRecord::new(&requests[0].spec));
    let prompt_tokens = requests.iter().map(|request| request.prompt.len()).sum();
    let (rows, identical) = answers::lossless(&repeats, &names, prompt_tokens, same_tokens(flags));
    record.rows.extend(rows);
    record.rows.extend(match &counts {
        Some(counts) => answers::emulated(&repeats, counts),
        None => answers::timed(&repeats, &categories, flags.batch),
    });
    record.rows.extend(answers::counted(&repeats, &categories, block));
    Ok(((title, record), identical))
}

/// What can be told wrong before any file is looked at.
fn check(flags: &args::Generate) -> Result<SamplingParams> {
    let few = |flag: &str, found: usize, least: usize, why: &str| {
        Err(Error::Usage(format!("--{flag} is {found}, {why}: expected at least {least}")))
    };
    let args::Generate { temperature, top_k, top_p, min_p, seed, .. } = *flags;
    let sampling = SamplingParams { temperature, top_k, top_p, min_p, seed, stream: 0 };
    sampling.check().map_err(name_flag)?;
    flags.drafts.need_drafter(false, flags.block)?;
    flags.drafts.config(&sampling)?;
    match flags {
        _ if flags.gpu.is_some() && matches!(flags.device, Choice::Cpu | Choice::Emulator) => {
            Err(Error::Usage("--gpu needs --device cuda or auto".into()))
        }
        _ if flags.max_tokens < 2 => {
            few("max-tokens", flags.max_tokens, 2, "which leaves no round to measure")
        }
        _ if flags.repeat == Some(0) => few("repeat", 0, 1, "which measures nothing"),
        _ if flags.count == Some(0) => few("count", 0, 1, "which leaves no prompt"),
        _ if flags.block == Some(1) => few("block", 1, 2, "which is autoregressive decoding"),
        _ => Ok(sampling),
    }
}

/// The first `--count` prompts, and the category of each.
fn prompts(flags: &args::Generate) -> Result<(Vec<Prompt>, Vec<Option<String>>)> {
    let mut prompts = prompts::lines(&flags.prompts)?;
    let (file, held) = (flags.prompts.display(), prompts.len());
    let count = flags.count.unwrap_or(held);
    if count > held {
        return Err(Error::Usage(format!("--count is {count}, but {file} holds {held} prompts")));
    }
    prompts.truncate(count);
    if !(1..=count).contains(&flags.batch) {
        let batch = flags.batch;
        return Err(Error::Usage(format!(
            "--batch is {batch}, expected 1 to {count}, the number of prompts"
        )));
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
    let text = Text::open(&pair.target.folder, None)?;
    let context = pair.context(flags.ctx)?;
    let tokens = Tokens { pair, text: &text, raw: false, system: None, variables: &[], context };
    let stop_ids = if flags.ignore_eos { vec![] } else { pair.target.config.eos.clone() };
    let request = |(stream, prompt): (u32, Prompt)| {
        if let (Content::Chat(_), false) = (&prompt.content, text.has_template()) {
            let (name, folder) = (prompt.name, pair.target.folder.name());
            return Err(Error::Usage(format!(
                "{name} has messages, and {folder} has no chat template: expected {{\"prompt\": TEXT}}"
            )));
        }
        let sampling = SamplingParams { stream, ..sampling.clone() };
        let (prompt, stop_ids) = (tokens.of(prompt)?, stop_ids.clone());
        let spec = flags.drafts.config(&sampling)?;
        Ok(Request { prompt, max_tokens: flags.max_tokens, sampling, stop_ids, block, spec })
    };
    (0..).zip(prompts).map(request).collect()
}

/// Whether DFlash is to give autoregressive decoding's tokens: other rules than match share its distribution alone, but where one token
/// has all of it.
fn same_tokens(flags: &args::Generate) -> bool {
    flags.drafts.verify == VerifyMethod::Match || flags.temperature == 0.0
}

/// How drafts are made and judged, where not as it is by default.
fn drafts(flags: &args::Generate, drafts: &SpecRecord) -> String {
    let mut all = vec![];
    if flags.drafts.verify != VerifyMethod::Match {
        all.push(format!("--verify {}", flags.drafts.verify.name()));
    }
    all.extend(drafts.tree.map(|rows| format!("trees of {rows}")));
    let adaptive =
        |least: Option<f64>| least.map_or("adaptive".into(), |least| format!("adaptive at {least}"));
    all.extend(flags.drafts.adaptive.map(adaptive));
    all.extend(flags.drafts.coupled.then(|| "coupled drafts".into()));
    let own = drafts.draft_temperature.filter(|_| flags.drafts.draft_temperature.is_some());
    all.extend(own.map(|temperature| format!("drafts at temperature {temperature}")));
    all.iter().map(|what| format!(", {what}")).collect()
}

fn title(
    flags: &args::Generate,
    machine: &Machine,
    model: &Model,
    requests: &[Request],
    repeats: usize,
) -> String {
    let name = |name: &Option<String>| name.clone().unwrap_or_default();
    let on = machine.card.as_ref().or(machine.device.as_ref()).cloned().unwrap_or_default();
    let together = if flags.batch > 1 { format!(", {} together", flags.batch) } else { String::new() };
    let how = if flags.temperature == 0.0 {
        "greedy".to_string()
    } else {
        format!("temperature {}, seed {}", flags.temperature, flags.seed)
    };
    let what = if machine.device.as_deref() == Some("emulator") {
        "counted by the emulator, which has no times".to_string()
    } else {
        format!("autoregressive decoding and DFlash in turn, {repeats} times")
    };
    let (target, drafter, prompts) = (name(&model.target), name(&model.drafter), requests.len());
    let how = how + &drafts(flags, &SpecRecord::new(&requests[0].spec));
    let distribution = match same_tokens(flags) {
        true => "",
        false => {
            "; the distribution is autoregressive decoding's, the tokens are not, and are not held against it"
        }
    };
    format!(
        "{target} with {drafter} on {on}: {prompts} prompts{together}, up to {} tokens each, {how}; {what}{distribution}",
        flags.max_tokens
    )
}

/// All requests on one device.
struct Run<'a> {
    flags: &'a args::Generate,
    requests: &'a [Request],
    /// None: the CPU.
    place: Option<(&'a DeviceHandle, &'a Instruments)>,
}

impl Run<'_> {
    /// Every repeat, after a warm-up; on the emulator no warm-up, and what it counted.
    fn all(&self, decoder: &mut dyn Decoder) -> Result<(Vec<Repeat>, Option<[Counts; 2]>)> {
        let emulated = self.tally().is_some();
        let repeats = self.flags.repeat.unwrap_or(if emulated { 1 } else { REPEATS });
        let bar = terminal::progress("answers {bar:40} {pos} of {len}, {eta} left", false);
        let mut counts = [Counts::default(); 2];
        if !emulated {
            self.once(decoder, &self.requests[..self.flags.batch], 0, &mut counts, &ProgressBar::hidden())?;
        }
        bar.set_length((repeats * self.requests.len() * DECODING.len()) as u64);
        let each = |number| self.once(decoder, self.requests, number, &mut counts, &bar);
        let repeats = (0..repeats).map(each).collect::<Result<_>>();
        bar.finish_and_clear();
        Ok((repeats?, emulated.then_some(counts)))
    }

    fn tally(&self) -> Option<Counts> {
        self.place.and_then(|(place, _)| place.device.tally())
    }

    /// Repeat `number` from 0: each prompt both ways, or with `--batch` all of them. Who goes first changes each time,
    /// so that neither always follows the other.
    fn once(
        &self,
        decoder: &mut dyn Decoder,
        requests: &[Request],
        number: usize,
        counts: &mut [Counts; 2],
        bar: &ProgressBar,
    ) -> Result<Repeat> {
        let mut repeat = Repeat::default();
        let together = if self.flags.batch > 1 { requests.len() } else { 1 };
        for (i, group) in requests.chunks(together).enumerate() {
            for turn in 0..DECODING.len() {
                let mode = (number + i + turn) % DECODING.len();
                let block = |request: &Request| if mode == 0 { 1 } else { request.block };
                let group: Vec<Request> =
                    group.iter().map(|r| Request { block: block(r), ..r.clone() }).collect();
                let mut hearing = Hearing { outcomes: vec![None; group.len()], bar };
                // Rounds ahead of the last answer's end are no part of this one.
                if let Some((place, _)) = self.place {
                    place.device.synchronize()?;
                }
                let (before, clock) = (self.tally(), Instant::now());
                generate_all(decoder, &group, &mut hearing)?;
                repeat.wall[mode] += clock.elapsed();
                if let (Some(before), Some(after)) = (before, self.tally()) {
                    counts[mode] += after - before;
                }
                if let Some(now) = self.place.and_then(|(_, instruments)| instruments.is_throttled()) {
                    repeat.throttled = Some(now || repeat.throttled.unwrap_or(false));
                }
                let outcomes: Option<Vec<Outcome>> = hearing.outcomes.into_iter().collect();
                let outcomes =
                    outcomes.ok_or_else(|| Error::Internal("a request without an outcome".into()))?;
                repeat.outcomes[mode].extend(outcomes);
            }
        }
        Ok(repeat)
    }
}

/// Keeps outcomes, and shows how many there are.
struct Hearing<'a> {
    outcomes: Vec<Option<Outcome>>,
    bar: &'a ProgressBar,
}

impl TokenSink for Hearing<'_> {
    fn token(&mut self, _id: u32, _drafted: bool) -> Result<Flow> {
        Ok(Flow::Continue)
    }
}

impl TokenSinks for Hearing<'_> {
    fn sink(&mut self, _index: usize) -> Result<&mut dyn TokenSink> {
        Ok(self)
    }

    fn done(&mut self, index: usize, outcome: Outcome) -> Result<Flow> {
        self.outcomes[index] = Some(outcome);
        self.bar.inc(1);
        Ok(Flow::Continue)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use dflash::engine::generate::{Emitted, Prefill};

    /// Its answers count up from the prompt, with `strays` drafts by another step; it keeps what it was asked.
    struct Counter {
        slots: Vec<(u32, Request)>,
        asked: Vec<(u32, usize)>,
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
            self.asked.push((request.prompt[0], request.block));
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
        fn watch(&mut self) {}
        fn logits(&mut self, _slot: usize, _row: usize) -> Result<Vec<f32>> {
            Ok(vec![])
        }
    }

    fn all(decoder: &mut Counter, flags: &[&str]) -> Vec<Repeat> {
        let line = ["dflash-bench", "generate", "--prompts", "p.jsonl", "-n", "7"];
        let args = args::Args::parse_from(line.iter().chain(flags));
        let args::Command::Generate(flags) = args.command else { panic!("another command") };
        let sampling = check(&flags).unwrap();
        let request = |id: u32| {
            let sampling = SamplingParams { stream: id, ..sampling.clone() };
            Request {
                prompt: vec![id],
                max_tokens: 7,
                sampling,
                stop_ids: vec![],
                block: 4,
                spec: Default::default(),
            }
        };
        let requests: Vec<Request> = (1..4).map(request).collect();
        let (repeats, counts) = Run { flags: &flags, requests: &requests, place: None }.all(decoder).unwrap();
        assert_eq!(counts, None);
        repeats
    }

    fn counter(slots: usize, strays: bool) -> Counter {
        let sampling =
            SamplingParams { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 0, stream: 0 };
        let nobody = Request {
            prompt: vec![0],
            max_tokens: 0,
            sampling,
            stop_ids: vec![],
            block: 1,
            spec: Default::default(),
        };
        Counter { slots: vec![(0, nobody); slots], asked: vec![], strays }
    }

    #[test]
    fn both_ways_take_turns_in_going_first() {
        let mut decoder = counter(1, false);
        let repeats = all(&mut decoder, &["--repeat", "2"]);
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
        assert_eq!(decoder.asked, expected.concat());
        assert_eq!(repeats.len(), 2);
        for Repeat { outcomes: [plain, fast], wall, .. } in &repeats {
            assert!(wall.iter().all(|time| !time.is_zero()));
            for i in 0..3 {
                let tokens: Vec<u32> = (0..7).map(|n| i as u32 + 1 + n).collect();
                assert_eq!([&plain[i].tokens, &fast[i].tokens], [&tokens; 2]);
                assert_eq!((plain[i].accepted.clone(), fast[i].accepted.clone()), (vec![1; 6], vec![4, 4]));
            }
        }
    }

    #[test]
    fn who_runs_together_takes_turns_by_the_repeat() {
        let mut decoder = counter(2, false);
        let repeats = all(&mut decoder, &["--repeat", "2", "--batch", "2"]);
        let order: Vec<usize> = decoder.asked.iter().map(|asked| asked.1).collect();
        assert_eq!(order, [1, 1, 4, 4, 1, 1, 1, 4, 4, 4, 4, 4, 4, 1, 1, 1]);
        assert!(repeats.iter().flat_map(|repeat| &repeat.outcomes).all(|outcomes| outcomes.len() == 3));
    }

    #[test]
    fn drafts_that_change_an_answer_are_found() {
        let names = ["a", "b", "c"].map(String::from);
        let repeats = all(&mut counter(1, true), &["--repeat", "1"]);
        let (_, same) = answers::lossless(&repeats, &names, 3, true);
        let sentence = "a, repeat 1: after 1 equal tokens autoregressive decoding goes on with 2, and DFlash goes on with 3";
        assert_eq!(same, Err(Error::Lossless(sentence.into())));
        let (_, same) = answers::lossless(&all(&mut counter(1, false), &[]), &names, 3, true);
        assert_eq!(same, Ok(()));
    }
}
