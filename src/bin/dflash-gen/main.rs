//! Text from a target and its DFlash drafter: flags in, text, records and statistics out. What is generated is the
//! library's business; here it only meets people, files and terminals.

mod args;
mod backend;
mod chat;
mod inputs;
mod lossless;
mod output;
mod plan;

use args::Args;
use chat::Chat;
use dflash::checkpoint::pair::Pair;
use dflash::checkpoint::safetensors::{DEMO_DRAFTER, DEMO_TARGET, Folder};
use dflash::cli::device::Choice;
use dflash::cli::sigbus;
use dflash::cli::terminal::{self, note};
use dflash::cpu::ops;
use dflash::engine::generate::{
    Backend, Finish, Flow, Outcome, Request, TokenSink, TokenSinks, check_lossless, generate, generate_all,
};
use dflash::engine::stats::{self, Record, Seconds};
use dflash::text::prompts;
use dflash::text::tokenizer::Text;
use dflash::{Error, Result};
use output::{Output, StopOnly, Writer};
use serde_json::{Value, json};
use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Set by Ctrl-C, looked at between tokens; while it is set, Ctrl-C ends the program. `--chat` sets it too, as long as
/// it waits for a line.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

const INTERRUPTED_EXIT: u8 = 130;

fn main() -> ExitCode {
    match terminal::parse::<Args>("dflash-gen") {
        Ok(args) => terminal::run("dflash-gen", || ops::install(|| run(&args))),
        Err(code) => code,
    }
}

fn run(args: &Args) -> Result<u8> {
    args.check()?;
    let sampling = args.sampling()?;
    args.drafts.drafting(&sampling)?;
    let target = args.target.clone().map_or(DEMO_TARGET, Folder::Disk);
    let drafter = match &args.draft {
        None => Some(DEMO_DRAFTER),
        Some(_) if args.plain() => None,
        Some(dir) => Some(Folder::Disk(dir.clone())),
    };
    let clock = Instant::now();
    let pair = Pair::open(target, drafter)?;
    sigbus::guard("dflash-gen", &pair)?;
    let block = args.block(&pair)?;
    args.context(&pair)?;
    if args.plan {
        let on_cpu = matches!(args.device, Choice::Auto | Choice::Cpu) && !args.launches;
        let room = backend::room(args, &pair, block, 0)?;
        return plan::print(args, &pair, (!on_cpu).then_some(room));
    }
    let template = match &args.chat_template {
        Some(path) => Some((path.display().to_string(), prompts::read(path)?)),
        None if args.chat && args.target.is_none() => Some(chat::demo_template()),
        None => None,
    };
    let template = template.as_ref().map(|(name, text)| (name.as_str(), text.clone()));
    let text = Text::open(&pair.target.folder, template)?;
    let mut load = clock.elapsed();
    let requests = match args.chat {
        true => chat::check(args, &pair, &text).map(|()| Vec::new())?,
        false => inputs::requests(args, &pair, &text, &sampling, block)?,
    };
    let clock = Instant::now();
    let trained = pair.drafter.as_ref().map_or(1, |drafter| drafter.config.block);
    let longest = requests.iter().map(Request::positions).max();
    let room = backend::room(args, &pair, if args.chat { trained } else { block }, longest.unwrap_or(0))?;
    let backend = backend::load(args, &pair, room)?;
    load += clock.elapsed();
    let session = Session { args, pair: &pair, text: &text, backend: &*backend, load };

    // Until here Ctrl-C ends the program as it ends any. A second one does not wait for the running round.
    let handler = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            if std::io::stderr().is_terminal() {
                note("");
            }
            std::process::exit(INTERRUPTED_EXIT.into());
        }
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Internal(format!("Ctrl-C cannot be handled: {e}")))?;
    if args.chat {
        return Chat::new(&session, sampling, block)?.run();
    }
    match (args.compare, args.check_lossless) {
        (true, _) => session.compare(&requests),
        (_, true) => session.check_lossless(&requests),
        _ => session.generate(&requests),
    }
}

fn interrupt() -> Flow {
    if INTERRUPTED.load(Ordering::Relaxed) { Flow::Interrupt } else { Flow::Continue }
}

struct Session<'a> {
    args: &'a Args,
    pair: &'a Pair,
    text: &'a Text,
    backend: &'a dyn Backend,
    load: Duration,
}

impl Session<'_> {
    fn generate(&self, requests: &[Request]) -> Result<u8> {
        let mut answers = Answers {
            session: self,
            requests,
            writers: requests.iter().map(|_| None).collect(),
            ended: vec![None; requests.len()],
            next: 0,
            gone: false,
            interrupted: false,
        };
        let mut decoder = self.backend.decoder()?;
        let clock = Instant::now();
        let end = generate_all(&mut *decoder, requests, &mut answers);
        end.inspect_err(|_| answers.writers.iter_mut().flatten().for_each(Writer::fail))?;
        if requests.len() > 1 && !self.args.quiet && !answers.gone {
            let (time, tokens) = (clock.elapsed().as_secs_f64(), answers.tokens());
            let rate = tokens as f64 / time.max(1e-9);
            note(&format!("all: {tokens} tokens in {time:.2} s, {rate:.0} tok/s"));
        }
        Ok(if answers.interrupted && !answers.gone { INTERRUPTED_EXIT } else { 0 })
    }

    /// The line on stderr.
    fn summary(&self, request: &Request, outcome: &Outcome) -> String {
        let (prefill, decode) = (outcome.prefill.as_secs_f64(), outcome.decode.as_secs_f64());
        let kept = match outcome.kept {
            0 => String::new(),
            kept => format!(", {kept} kept"),
        };
        let mut line = format!(
            "{} tokens in {:.2} s, {:.0} tok/s (prompt: {} tokens{kept}, {:.0} ms), {} rounds",
            outcome.tokens.len(),
            prefill + decode,
            stats::rate(outcome),
            request.prompt.len(),
            prefill * 1e3,
            outcome.accepted.len()
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

    fn record(&self, request: &Request, outcome: &Outcome, text: String) -> Record {
        let speculative = self.pair.drafter.as_ref().filter(|_| request.block > 1);
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
            target: self.pair.target.folder.name(),
            draft: speculative.map(|d| d.folder.name()),
            drafts: speculative.map(|_| self.args.drafts.record(&request.drafting)).unwrap_or_default(),
            seconds: Seconds {
                load: self.load.as_secs_f64(),
                prefill: outcome.prefill.as_secs_f64(),
                decode: outcome.decode.as_secs_f64(),
            },
        }
    }

    /// The object of `--compare` and of `--check-lossless`: what is said of all prompts, of each of them, and what ran.
    fn of_all(&self, mut all: Value, prompts: Vec<Value>, first: &Request) -> Value {
        all["prompts"] = prompts.into();
        all["seed"] = first.sampling.seed.into();
        all["device"] = self.backend.name().into();
        all["target"] = self.pair.target.folder.name().into();
        all["draft"] = self.pair.drafter.as_ref().map(|d| d.folder.name()).into();
        if let (Value::Object(all), Value::Object(drafts)) =
            (&mut all, json!(self.args.drafts.record(&first.drafting)))
        {
            all.extend(drafts);
        }
        all
    }

    /// Autoregressive decoding and DFlash in turn, prompt by prompt, after a short warm-up of both.
    fn compare(&self, requests: &[Request]) -> Result<u8> {
        let mut decoder = self.backend.decoder()?;
        let mut one = |request: &Request, block: usize, max_tokens: usize| {
            let request = Request { block, max_tokens, ..request.clone() };
            let mut stop = StopOnly(self.text.stream(&self.args.stop)?);
            generate(&mut *decoder, &request, &mut stop)
        };
        let mut out = Output::default();
        for block in [1, requests[0].block] {
            one(&requests[0], block, self.args.max_tokens.min(16))?;
        }
        if !self.args.json {
            out.line("prompt  tokens  plain tok/s  dflash tok/s  ratio   tau  identical")?;
        }
        let (mut rows, mut accepted) = (Vec::new(), Vec::new());
        let (mut tokens, mut plain_time, mut fast_time, mut all_identical) =
            (0, Duration::ZERO, Duration::ZERO, Ok(()));
        for (i, request) in requests.iter().enumerate() {
            let plain = one(request, 1, request.max_tokens)?;
            let fast = one(request, request.block, request.max_tokens)?;
            if plain.finish == Finish::Interrupted || fast.finish == Finish::Interrupted {
                return Ok(INTERRUPTED_EXIT);
            }
            if out.gone {
                return all_identical.map(|()| 0);
            }
            let identical =
                check_lossless(&plain, &fast).map_err(|e| Error::Lossless(format!("prompt {}: {e}", i + 1)));
            let row = Row {
                tokens: plain.tokens.len(),
                plain: stats::rate(&plain),
                dflash: stats::rate(&fast),
                tau: stats::tau(&fast.accepted),
                identical: identical.is_ok(),
            };
            if self.args.json {
                rows.push(row.json());
            } else {
                out.line(&row.line(&(i + 1).to_string()))?;
            }
            all_identical = all_identical.and(identical);
            tokens += plain.tokens.len();
            plain_time += plain.prefill + plain.decode;
            fast_time += fast.prefill + fast.decode;
            accepted.extend(fast.accepted);
        }
        let rate = |time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        let all = Row {
            tokens,
            plain: rate(plain_time),
            dflash: rate(fast_time),
            tau: stats::tau(&accepted),
            identical: all_identical.is_ok(),
        };
        if self.args.json {
            out.line(&self.of_all(all.json(), rows, &requests[0]).to_string())?;
        } else {
            out.line(&all.line("all"))?;
        }
        if self.args.temperature > 0.0 && !self.args.json && !self.args.quiet {
            note(&format!("seed {}", requests[0].sampling.seed));
        }
        all_identical.map(|()| 0)
    }
}

/// The answers to all requests, written in their order.
struct Answers<'a> {
    session: &'a Session<'a>,
    requests: &'a [Request],
    writers: Vec<Option<Writer<'a>>>,
    /// Over, and perhaps not written yet.
    ended: Vec<Option<Outcome>>,
    /// Whose turn it is to be written.
    next: usize,
    /// Nobody reads any more.
    gone: bool,
    interrupted: bool,
}

impl Answers<'_> {
    /// Of all answers that are over.
    fn tokens(&self) -> usize {
        self.ended.iter().flatten().map(|outcome| outcome.tokens.len()).sum()
    }
}

impl TokenSinks for Answers<'_> {
    fn of(&mut self, index: usize) -> Result<&mut dyn TokenSink> {
        let first = index == self.next;
        match &mut self.writers[index] {
            Some(writer) => Ok(writer),
            none => Ok(none.insert(Writer::new(self.session, index, &self.requests[index], first)?)),
        }
    }

    fn done(&mut self, index: usize, outcome: Outcome) -> Result<Flow> {
        self.interrupted |= outcome.finish == Finish::Interrupted;
        self.of(index)?;
        self.ended[index] = Some(outcome);
        while let Some(Some(outcome)) = self.ended.get(self.next)
            && let Some(mut writer) = self.writers[self.next].take()
        {
            let request = &self.requests[self.next];
            writer.release()?;
            self.gone |= writer.end(self.session, request, outcome)?;
            if !self.session.args.quiet && !self.gone {
                let many = self.requests.len() > 1;
                let which = if many { format!("{}: ", self.next + 1) } else { String::new() };
                note(&format!("{which}{}", self.session.summary(request, outcome)));
            }
            self.next += 1;
        }
        if let Some(Some(writer)) = self.writers.get_mut(self.next) {
            writer.release()?;
        }
        Ok(if self.gone || self.interrupted { Flow::Interrupt } else { Flow::Continue })
    }
}

/// A line of `--compare`.
struct Row {
    tokens: usize,
    /// tokens per second
    plain: f64,
    dflash: f64,
    tau: Option<f64>,
    identical: bool,
}

impl Row {
    fn line(&self, name: &str) -> String {
        let Row { tokens, plain, dflash, .. } = self;
        let tau = self.tau.map_or("-".into(), |tau| format!("{tau:.2}"));
        let (ratio, word) = (dflash / plain, if self.identical { "yes" } else { "NO" });
        format!("{name:>6}  {tokens:6}  {plain:11.0}  {dflash:12.0}  {ratio:5.2}  {tau:>4}  {word}")
    }

    fn json(&self) -> Value {
        json!({
            "tokens": self.tokens, "plain_tokens_per_s": self.plain, "dflash_tokens_per_s": self.dflash,
            "ratio": self.dflash / self.plain, "tau": self.tau, "identical": self.identical,
        })
    }
}
