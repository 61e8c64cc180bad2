//! Text from a target and its DFlash drafter: flags in; text, records and statistics out. The library
//! generates; this program connects it to files and terminals.
//!
//! Flags ([`args`]) resolve once into a [`job::Job`], and nothing after that reads flags.

mod args;
mod backend;
mod chat;
mod compare;
mod inputs;
mod job;
mod lossless;
mod output;
mod plan;

use args::Args;
use chat::Chat;
use dflash::Result;
use dflash::checkpoint::pair::Pair;
use dflash::cli::device::Choice;
use dflash::cli::interrupt::{self, INTERRUPTED, INTERRUPTED_EXIT};
use dflash::cli::terminal::{self, counted, note};
use dflash::cli::{models, sigbus, version};
use dflash::cpu::ops;
use dflash::engine::decoder::{Backend, Decoder};
use dflash::engine::generate::{Flow, TokenSink, TokenSinks, generate_all, resume};
use dflash::engine::request::{Finish, Outcome, Request};
use dflash::engine::stats::{self, AcceptanceWatch, Record, Seconds, SpecRecord};
use dflash::text::prompt_files;
use dflash::text::tokenizer::Text;
use dflash::text::untrusted;
use inputs::{Inputs, Task};
use job::{Action, Job};
use output::Writer;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::process::ExitCode;
use std::time::{Duration, Instant};

fn main() -> ExitCode {
    match terminal::parse::<Args>("dflash-gen") {
        Ok(args) if args.version => {
            let print = || version::print("dflash-gen", args.json, args.gpu.unwrap_or(0)).map(|()| 0);
            terminal::run("dflash-gen", print)
        }
        Ok(args) => terminal::run("dflash-gen", || ops::on_threads(args.threads, || run(&args.resolve()?))),
        Err(code) => code,
    }
}

fn run(job: &Job) -> Result<u8> {
    let clock = Instant::now();
    let pair = Pair::open_with(job.target.clone(), job.draft.clone(), &job.overrides)?;
    if !job.quiet {
        terminal::notes(&pair.notes);
    }
    if pair.drafter().is_none() && !job.draft_was_given && !job.quiet {
        models::note_missing_drafter(&pair);
    }
    sigbus::guard("dflash-gen", [&pair])?;
    let block = job.block(&pair)?;
    job.context(&pair)?;
    if let Action::Plan { launches } = job.action {
        let capacity = backend::capacity(job, &pair, block, 0)?;
        let on_cpu = matches!(job.device, Choice::Auto | Choice::Cpu);
        return match launches {
            true => plan::print_launches(job, &pair, capacity),
            false => plan::print_models(job, &pair, (!on_cpu).then_some(capacity)),
        };
    }
    let template = match &job.template {
        Some(path) => Some((prompt_files::name(path), prompt_files::read(path)?)),
        None if job.action == Action::Chat && job.is_demo => Some(chat::demo_template()),
        None => None,
    };
    let template = template.as_ref().map(|(name, text)| (name.as_str(), text.clone()));
    let mut text = Text::find(&pair.target.folder, template)?;
    if let Some(text) = &mut text {
        text.limit(job.context(&pair)?);
        if !job.quiet {
            terminal::notes(&text.notes);
        }
    }
    let inputs = Inputs { job, pair: &pair, text: text.as_ref(), block };
    let mut load = clock.elapsed();
    let (tasks, longest) = match job.action {
        Action::Chat => chat::check(&inputs).map(|_| Default::default())?,
        _ => untrusted::on_one_thread(|| inputs.tasks())?,
    };
    if job.verbose {
        note(&format!("stop ids: {}", inputs.stop_ids(&job.stop)?));
        for Task { prompt, stop, .. } in tasks.iter().filter(|task| task.prompt.settings.stop.is_some()) {
            let ids = inputs.stop_ids(stop)?;
            note(&format!("{}: stop ids: {ids}; stop strings: {stop:?}", prompt.name));
        }
    }
    let clock = Instant::now();
    // A conversation may set its block later.
    let max_block = match job.action {
        Action::Chat => pair.max_block(),
        _ => block,
    };
    let capacity = backend::capacity(job, &pair, max_block, longest)?;
    let backend = backend::load(job, &pair, capacity)?;
    load += clock.elapsed();
    if job.verbose && backend.name() == "cpu" {
        note(&format!("threads: {}", rayon::current_num_threads()));
    }
    let watch = RefCell::default();
    let session = Session { inputs: &inputs, backend: &*backend, load, watch };

    // Until here Ctrl-C ends the program at once. From here a second one does, without waiting for the
    // running round.
    interrupt::catch()?;
    match job.action {
        Action::Chat => Chat::new(&session)?.run(),
        Action::Compare => session.compare(tasks),
        Action::CheckLossless => session.check_lossless(tasks),
        Action::Generate | Action::Plan { .. } => session.generate(tasks),
    }
}

fn interrupt() -> Flow {
    if interrupt::is_interrupted() { Flow::Interrupt } else { Flow::Continue }
}

struct Session<'a> {
    inputs: &'a Inputs<'a>,
    backend: &'a dyn Backend,
    load: Duration,
    watch: RefCell<AcceptanceWatch>,
}

impl Session<'_> {
    /// Says once on stderr that drafts are not accepted, if so.
    fn watch_acceptance(&self, outcome: &Outcome) {
        if self.inputs.pair.drafter().is_none() {
            return;
        }
        let found = self.watch.borrow_mut().add(&outcome.accepted, &outcome.drafted);
        if let (Some(line), false) = (found, self.inputs.job.quiet) {
            note(&line);
        }
    }

    /// Answers all prompts together, or one after another if one of them has turns.
    fn generate(&self, tasks: Vec<Task>) -> Result<u8> {
        let job = self.inputs.job;
        let together = tasks.iter().all(|task| task.turn.is_none());
        let mut runs: VecDeque<Vec<Task>> = match together {
            true => [tasks].into(),
            false => tasks.into_iter().map(|task| vec![task]).collect(),
        };
        let many = !together || runs[0].len() > 1;
        let mut decoder = self.backend.decoder()?;
        let (clock, mut tokens, mut gone, mut interrupted) = (Instant::now(), 0, false, false);
        while let Some(tasks) = runs.pop_front()
            && !gone
            && !interrupted
        {
            let mut answers = Answers {
                session: self,
                tasks: &tasks,
                many,
                writers: tasks.iter().map(|_| None).collect(),
                ended: vec![None; tasks.len()],
                next: 0,
                gone: false,
                interrupted: false,
            };
            let end = match &tasks[..] {
                // A later turn runs only its new tokens.
                [task] if task.turn > Some(1) => answers.resume(&mut *decoder, task),
                _ => {
                    let requests: Vec<Request> = tasks.iter().map(|task| task.request.clone()).collect();
                    generate_all(&mut *decoder, &requests, &mut answers)
                }
            };
            end.inspect_err(|_| answers.writers.iter_mut().flatten().for_each(Writer::fail))?;
            tokens += answers.tokens();
            (gone, interrupted) = (answers.gone, answers.interrupted);
            if let ([task], [Some(outcome)], false) = (&tasks[..], &answers.ended[..], gone || interrupted)
                && let Some(next) = self.inputs.next_turn(task, &outcome.tokens)?
            {
                runs.push_front(vec![next]);
            }
        }
        if many && !job.quiet && !gone {
            let time = clock.elapsed().as_secs_f64();
            let rate = tokens as f64 / time.max(1e-9);
            note(&format!("all: {} in {time:.2} s, {rate:.0} tok/s", counted(tokens, "token")));
        }
        Ok(if interrupted && !gone { INTERRUPTED_EXIT } else { 0 })
    }

    /// The statistics of an answer, as one line.
    fn summary(&self, request: &Request, outcome: &Outcome) -> String {
        let (prefill, decode) = (outcome.prefill.as_secs_f64(), outcome.decode.as_secs_f64());
        let kept = match outcome.kept {
            0 => String::new(),
            kept => format!(", {kept} kept"),
        };
        let mut line = format!(
            "{} in {:.2} s, {:.0} tok/s (prompt: {}{kept}, {:.0} ms), {}",
            counted(outcome.tokens.len(), "token"),
            prefill + decode,
            stats::rate(outcome),
            counted(request.prompt.len(), "token"),
            prefill * 1e3,
            counted(outcome.accepted.len(), "round")
        );
        if let (true, Some(tau)) = (request.block > 1, stats::tau(&outcome.accepted)) {
            let bars = stats::histogram(&outcome.accepted, request.block);
            line += &format!(", acceptance length {tau:.2} [1{bars}{}]", request.block);
        }
        if request.sampling.temperature > 0.0 {
            line += &format!(", seed {}", request.sampling.seed);
        }
        line
    }

    fn record(&self, request: &Request, outcome: &Outcome, text: Option<String>) -> Record {
        let pair = self.inputs.pair;
        let speculative = pair.draft_name().filter(|_| request.block > 1);
        Record {
            prompt_tokens: request.prompt.len(),
            tokens: outcome.tokens.clone(),
            text,
            finish_reason: outcome.finish.name(),
            rounds: outcome.accepted.len(),
            accepted: outcome.accepted.clone(),
            drafted: outcome.drafted.clone(),
            tau: stats::tau(&outcome.accepted),
            seed: request.sampling.seed,
            stream: request.sampling.stream,
            device: self.backend.name(),
            target: pair.target.folder.name(),
            drafts: speculative.as_ref().map(|_| SpecRecord::new(&request.spec)).unwrap_or_default(),
            draft: speculative,
            seconds: Seconds {
                load: self.load.as_secs_f64(),
                prefill: outcome.prefill.as_secs_f64(),
                decode: outcome.decode.as_secs_f64(),
            },
        }
    }

    /// The object of `--compare` and of `--check-lossless`: results of all prompts, of each of them, and what
    /// ran.
    fn of_all(&self, mut all: Value, prompts: Vec<Value>, first: &Request) -> Value {
        all["prompts"] = prompts.into();
        all["seed"] = first.sampling.seed.into();
        all["device"] = self.backend.name().into();
        let pair = self.inputs.pair;
        all["target"] = pair.target.folder.name().into();
        all["draft"] = pair.draft_name().into();
        if let (Value::Object(all), Value::Object(drafts)) = (&mut all, json!(SpecRecord::new(&first.spec))) {
            all.extend(drafts);
        }
        all
    }
}

/// The answers to requests that run together, written in their order.
struct Answers<'a> {
    session: &'a Session<'a>,
    tasks: &'a [Task],
    /// The run has other answers, so each has its number.
    many: bool,
    writers: Vec<Option<Writer<'a>>>,
    /// Answers that are over, written or not.
    ended: Vec<Option<Outcome>>,
    /// The answer that is written next.
    next: usize,
    /// The reader has closed stdout.
    gone: bool,
    interrupted: bool,
}

impl Answers<'_> {
    /// Answers the only task. The decoder reuses what it holds of its prompt.
    fn resume(&mut self, decoder: &mut dyn Decoder, task: &Task) -> Result<()> {
        let outcome = resume(decoder, &task.request, self.sink(0)?)?;
        self.done(0, outcome).map(drop)
    }

    /// Tokens of all answers that are over.
    fn tokens(&self) -> usize {
        self.ended.iter().flatten().map(|outcome| outcome.tokens.len()).sum()
    }
}

impl TokenSinks for Answers<'_> {
    fn sink(&mut self, index: usize) -> Result<&mut dyn TokenSink> {
        let first = index == self.next;
        match &mut self.writers[index] {
            Some(writer) => Ok(writer),
            none => {
                let Task { request, stop, index, .. } = &self.tasks[index];
                Ok(none.insert(Writer::new(self.session, *index, request, stop, first)?))
            }
        }
    }

    fn done(&mut self, index: usize, outcome: Outcome) -> Result<Flow> {
        self.interrupted |= outcome.finish == Finish::Interrupted;
        self.sink(index)?;
        self.ended[index] = Some(outcome);
        while let Some(Some(outcome)) = self.ended.get(self.next)
            && let Some(mut writer) = self.writers[self.next].take()
        {
            let task = &self.tasks[self.next];
            writer.release()?;
            self.gone |= writer.end(self.session, task, outcome)?;
            if !self.session.inputs.job.quiet && !self.gone {
                let which = if self.many { format!("{}: ", task.label()) } else { String::new() };
                note(&format!("{which}{}", self.session.summary(&task.request, outcome)));
                self.session.watch_acceptance(outcome);
            }
            self.next += 1;
        }
        if let Some(Some(writer)) = self.writers.get_mut(self.next) {
            writer.release()?;
        }
        Ok(if self.gone || self.interrupted { Flow::Interrupt } else { Flow::Continue })
    }
}
