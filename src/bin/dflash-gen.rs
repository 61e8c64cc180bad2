//! Text from a target and its DFlash drafter: flags in, text, records and statistics out. What is generated is the
//! library's business; here it only meets people, files and terminals.

use clap::{ArgAction, Parser, ValueEnum};
use dflash::engine::{Finish, Flow, Listener, Outcome, Request, generate};
use dflash::pair::Pair;
use dflash::reference::{Drafter, Sequence, Target};
use dflash::stats::{self, Record, Seconds};
use dflash::text::{Message, Stream, Text};
use dflash::verify::Sampling;
use dflash::weights::{Checkpoint, DEMO_DRAFTER, DEMO_TARGET, Folder};
use dflash::{Error, Result, cpu};
use serde_json::{Value, json};
use std::io::{self, IsTerminal, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const EXIT_CODES: &str = "\
Exit codes: 0 done (also when the reader of stdout goes away), 1 internal failure, 2 usage, 3 model file missing or \
malformed, 4 unsupported, 5 out of memory, 6 lossless check failed, 130 interrupted (the text so far is flushed).";

/// Generate text with DFlash speculative decoding.
///
/// Without --target the demo pair is used, which is part of this program: a small model of Python source. Text goes to
/// stdout, everything else to stderr.
#[derive(Parser)]
#[command(name = "dflash-gen", version, after_help = EXIT_CODES)]
struct Args {
    /// The prompt; without it, -f or --prompts, stdin is read
    #[arg(value_name = "PROMPT")]
    prompt: Option<String>,
    /// Read the prompt from a file
    #[arg(short, long, value_name = "FILE", conflicts_with = "prompt")]
    file: Option<PathBuf>,
    /// Run many prompts: a JSON object per line with "prompt" (text) or "messages" (a conversation)
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["prompt", "file"])]
    prompts: Option<PathBuf>,

    /// Hugging Face folder of the target [default: the demo pair's]
    #[arg(long, value_name = "DIR", requires = "draft")]
    target: Option<PathBuf>,
    /// Hugging Face folder of its DFlash drafter, or "none" for plain decoding [default: the demo pair's]
    #[arg(long, value_name = "DIR|none")]
    draft: Option<PathBuf>,
    /// Where to run
    #[arg(long, value_enum, default_value_t = Device::Auto)]
    device: Device,

    /// Tokens to generate at most
    #[arg(short = 'n', long, value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// 0 is greedy
    #[arg(long, value_name = "T", default_value_t = 0.0)]
    temperature: f32,
    /// Sample among the K best tokens; 0: all
    #[arg(long, value_name = "K", default_value_t = 0)]
    top_k: usize,
    /// Sample among the smallest set of best tokens that has this probability
    #[arg(long, value_name = "P", default_value_t = 1.0)]
    top_p: f64,
    /// Sample among tokens at least this fraction as likely as the best
    #[arg(long, value_name = "P", default_value_t = 0.0)]
    min_p: f64,
    /// Same seed, same text, whatever the drafter and the block [default: drawn, and printed]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// End the answer before this text; repeatable
    #[arg(long, value_name = "STR", action = ArgAction::Append)]
    stop: Vec<String>,
    /// Rows of a block: the anchor and N - 1 drafts; 1 is plain decoding [default: as the drafter was trained]
    #[arg(long, value_name = "N")]
    block: Option<usize>,
    /// Go on after the model's stop tokens
    #[arg(long)]
    ignore_eos: bool,

    /// System message, for models with a chat template
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,
    /// Take prompts as they are, without the chat template
    #[arg(long)]
    raw: bool,
    /// Use this chat template instead of the model's
    #[arg(long, value_name = "FILE", conflicts_with = "raw")]
    chat_template: Option<PathBuf>,
    /// Set a variable of the chat template; the value is JSON, or else text. Thinking is off (enable_thinking=false)
    /// unless asked for here: published drafters were trained without it, and lose more than half of their acceptance
    /// with it
    #[arg(long, value_name = "K=V", action = ArgAction::Append, conflicts_with = "raw")]
    template_arg: Vec<String>,

    /// Colour drafted and accepted text
    #[arg(long)]
    show_accept: bool,
    /// When to colour
    #[arg(long, value_enum, default_value_t = Color::Auto)]
    color: Color,
    /// No statistics on stderr
    #[arg(short, long)]
    quiet: bool,
    /// Print one JSON object per prompt instead of text
    #[arg(long)]
    json: bool,
    /// Print one JSON object per round, then the one of --json
    #[arg(long, conflicts_with = "json")]
    stream_json: bool,
    /// Run every prompt by plain decoding and by DFlash: both rates, and whether the tokens are identical
    #[arg(long, conflicts_with_all = ["stream_json", "show_accept"])]
    compare: bool,
    /// Print what would be loaded, and stop
    #[arg(long, conflicts_with_all = ["prompt", "file", "prompts", "compare", "stream_json"])]
    plan: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Device {
    Auto,
    Cpu,
    Cuda,
    Emulator,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Color {
    Auto,
    Always,
    Never,
}

/// Set by Ctrl-C, looked at between tokens.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

const INTERRUPTED_EXIT: u8 = 130;

fn main() -> ExitCode {
    let args = Args::parse();
    // A second Ctrl-C does not wait for the running round.
    let handler = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(INTERRUPTED_EXIT.into());
        }
    };
    if let Err(e) = ctrlc::set_handler(handler) {
        eprintln!("dflash-gen: Ctrl-C cannot be handled: {e}");
    }
    match cpu::install(|| run(&args)) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("dflash-gen: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(args: &Args) -> Result<u8> {
    let sampling = sampling(args)?;
    match args.device {
        Device::Auto | Device::Cpu => {}
        Device::Cuda | Device::Emulator => {
            let name = if args.device == Device::Cuda { "cuda" } else { "emulator" };
            return Err(Error::Unsupported(format!(
                "--device {name} is not in this build: expected cpu or auto"
            )));
        }
    }
    let target = args.target.clone().map_or(DEMO_TARGET, Folder::Disk);
    let drafter = match &args.draft {
        None => Some(DEMO_DRAFTER),
        Some(dir) if dir.as_os_str() == "none" => None,
        Some(dir) => Some(Folder::Disk(dir.clone())),
    };
    if drafter.is_none() && args.compare {
        return Err(Error::Usage("--compare needs a drafter, but --draft is none".into()));
    }
    let clock = Instant::now();
    let pair = Pair::open(target, drafter)?;
    let block = block(args, &pair)?;
    if args.plan {
        return plan(args, &pair);
    }
    let template =
        args.chat_template.as_ref().map(|path| Ok::<_, Error>((path.display().to_string(), read(path)?)));
    let template = template.transpose()?;
    let text =
        Text::open(&pair.target.folder, template.as_ref().map(|(name, text)| (name.as_str(), text.clone())))?;
    let requests = requests(args, &pair, &text, &sampling, block)?;
    let target = Target::load(&pair.target)?;
    let drafter = pair.drafter.as_ref().map(Drafter::load).transpose()?;
    let session = Session {
        args,
        pair: &pair,
        text: &text,
        target: &target,
        drafter: drafter.as_ref(),
        load: clock.elapsed(),
    };
    if args.compare { session.compare(&requests) } else { session.generate(&requests) }
}

// ---- flags and inputs ----

fn sampling(args: &Args) -> Result<Sampling> {
    let sampling = Sampling {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        seed: args.seed.unwrap_or_else(draw_seed),
        stream: 0,
    };
    sampling.check()?;
    Ok(sampling)
}

/// A short random number, from the standard library's hash keys.
fn draw_seed() -> u64 {
    use std::hash::{BuildHasher, RandomState};
    RandomState::new().hash_one(0) >> 32
}

/// Rows of a block, 1 without a drafter.
fn block(args: &Args, pair: &Pair) -> Result<usize> {
    let Some(drafter) = &pair.drafter else {
        return match args.block {
            None | Some(1) => Ok(1),
            Some(n) => {
                Err(Error::Usage(format!("--block is {n} without a drafter, expected 1 (plain decoding)")))
            }
        };
    };
    let trained = drafter.config.block;
    match args.block {
        None => Ok(trained),
        Some(1) if args.compare => {
            Err(Error::Usage("--block is 1 with --compare, expected at least 2".into()))
        }
        Some(n) if (1..=trained).contains(&n) => Ok(n),
        Some(n) => Err(Error::Usage(format!(
            "--block is {n}, expected 1 to {trained}, the block that {} was trained with",
            drafter.folder.path("config.json")
        ))),
    }
}

fn read(path: &PathBuf) -> Result<String> {
    let bytes =
        std::fs::read(path).map_err(|e| Error::Usage(format!("{} cannot be read: {e}", path.display())))?;
    utf8(bytes, &path.display().to_string())
}

fn utf8(bytes: Vec<u8>, name: &str) -> Result<String> {
    String::from_utf8(bytes).map_err(|e| {
        Error::Usage(format!(
            "{name} is not UTF-8: byte {} is not part of a character",
            e.utf8_error().valid_up_to()
        ))
    })
}

/// One line of `--prompts`; other fields are other programs' business.
#[derive(serde::Deserialize)]
struct Line {
    prompt: Option<String>,
    messages: Option<Vec<Message>>,
}

enum Prompt {
    Text(String),
    Chat(Vec<Message>),
}

/// Every prompt with the name it goes by in errors.
fn prompts(args: &Args) -> Result<Vec<(String, Prompt)>> {
    let one = |name: &str, text| Ok(vec![(name.to_string(), Prompt::Text(text))]);
    if let Some(prompt) = &args.prompt {
        return one("the prompt", prompt.clone());
    }
    if let Some(path) = &args.file {
        return one(&path.display().to_string(), read(path)?);
    }
    let Some(path) = &args.prompts else {
        if io::stdin().is_terminal() {
            return Err(Error::Usage(
                "no prompt: expected PROMPT, -f FILE, --prompts FILE.jsonl, or text on stdin".into(),
            ));
        }
        let mut bytes = Vec::new();
        io::stdin()
            .read_to_end(&mut bytes)
            .map_err(|e| Error::Usage(format!("stdin cannot be read: {e}")))?;
        return one("stdin", utf8(bytes, "stdin")?);
    };
    let text = read(path)?;
    let mut prompts = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim().is_empty() {
            continue;
        }
        let name = format!("{} line {number}", path.display());
        let wrong = |what: String| Error::Usage(format!("{name}: {what}"));
        let line: Line = serde_json::from_str(line).map_err(|e| wrong(format!("not a prompt: {e}")))?;
        prompts.push(match (line.prompt, line.messages) {
            (Some(prompt), None) => (name, Prompt::Text(prompt)),
            (None, Some(messages)) => (name, Prompt::Chat(messages)),
            _ => return Err(wrong("expected either \"prompt\" or \"messages\"".into())),
        });
    }
    match prompts.is_empty() {
        true => Err(Error::Usage(format!("{} holds no prompt", path.display()))),
        false => Ok(prompts),
    }
}

/// `--template-arg`: the value is JSON if it parses as such, else text.
fn template_args(args: &Args) -> Result<Vec<(String, Value)>> {
    let pair = |arg: &String| match arg.split_once('=') {
        Some((name, value)) if !name.is_empty() => {
            Ok((name.to_string(), serde_json::from_str(value).unwrap_or_else(|_| value.into())))
        }
        _ => Err(Error::Usage(format!("--template-arg is {arg:?}, expected NAME=VALUE"))),
    };
    args.template_arg.iter().map(pair).collect()
}

/// Everything that can be wrong with any prompt is found before the first one runs.
fn requests(
    args: &Args,
    pair: &Pair,
    text: &Text,
    sampling: &Sampling,
    block: usize,
) -> Result<Vec<Request>> {
    text.stream(&args.stop)?;
    let variables = template_args(args)?;
    let chat = text.has_template() && !args.raw;
    if !text.has_template() && (args.system.is_some() || !variables.is_empty()) {
        let flag = if args.system.is_some() { "--system" } else { "--template-arg" };
        let folder = pair.target.folder.path("tokenizer_config.json");
        return Err(Error::Usage(format!(
            "{flag} needs a chat template, and {folder} has none: --chat-template FILE gives one"
        )));
    }
    let mut requests = Vec::new();
    for (stream, (name, prompt)) in prompts(args)?.into_iter().enumerate() {
        let named = |e: Error| match e {
            Error::Usage(what) => Error::Usage(format!("{name}: {what}")),
            other => other,
        };
        let user = |content| Message { role: "user".into(), content };
        let ids = match prompt {
            Prompt::Text(prompt) if prompt.is_empty() => {
                return Err(Error::Usage(format!("{name} is empty, expected at least one token")));
            }
            Prompt::Text(prompt) if !chat => text.encode(&prompt),
            Prompt::Text(prompt) => text.encode_chat(&with_system(args, vec![user(prompt)]), &variables),
            Prompt::Chat(_) if args.raw => {
                return Err(Error::Usage(format!(
                    "{name}: \"messages\" need the chat template, but --raw is given"
                )));
            }
            Prompt::Chat(messages) => text.encode_chat(&with_system(args, messages), &variables),
        };
        let ids = ids.map_err(named)?;
        let context = pair.target.config.stack.max_positions;
        if ids.len() >= context {
            return Err(Error::Usage(format!(
                "{name} has {} tokens, but the context holds {context}, the answer included",
                ids.len()
            )));
        }
        let stop_ids = if args.ignore_eos { vec![] } else { pair.target.config.eos.clone() };
        let sampling = Sampling { stream: stream as u32, ..sampling.clone() };
        requests.push(Request { prompt: ids, max_tokens: args.max_tokens, sampling, stop_ids, block });
    }
    Ok(requests)
}

fn with_system(args: &Args, messages: Vec<Message>) -> Vec<Message> {
    let system =
        args.system.iter().map(|content| Message { role: "system".into(), content: content.clone() });
    system.chain(messages).collect()
}

// ---- running ----

struct Session<'a> {
    args: &'a Args,
    pair: &'a Pair,
    text: &'a Text,
    target: &'a Target,
    drafter: Option<&'a Drafter>,
    load: Duration,
}

impl Session<'_> {
    fn generate(&self, requests: &[Request]) -> Result<u8> {
        for (i, request) in requests.iter().enumerate() {
            if requests.len() > 1 && !self.args.quiet {
                eprintln!("[{}/{}]", i + 1, requests.len());
            }
            let mut writer = Writer::new(self, i, request)?;
            let outcome = generate(&mut Sequence::new(self.target, self.drafter), request, &mut writer)?;
            let gone = writer.end(self, request, &outcome)?;
            if !self.args.quiet {
                eprintln!("{}", self.summary(request, &outcome));
            }
            if gone {
                return Ok(0);
            }
            if outcome.finish == Finish::Interrupted {
                return Ok(INTERRUPTED_EXIT);
            }
        }
        Ok(0)
    }

    /// The line on stderr.
    fn summary(&self, request: &Request, outcome: &Outcome) -> String {
        let (prefill, decode) = (outcome.prefill.as_secs_f64(), outcome.decode.as_secs_f64());
        let mut line = format!(
            "{} tokens in {:.2} s, {:.0} tok/s (prompt: {} tokens, {:.0} ms), {} rounds",
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
            tau: stats::tau(&outcome.accepted),
            seed: request.sampling.seed,
            device: "cpu",
            target: self.pair.target.folder.name(),
            draft: speculative.map(|d| d.folder.name()),
            verify: speculative.map(|_| "match"),
            seconds: Seconds {
                load: self.load.as_secs_f64(),
                prefill: outcome.prefill.as_secs_f64(),
                decode: outcome.decode.as_secs_f64(),
            },
        }
    }

    /// Plain decoding and DFlash in turn, prompt by prompt, after a short warm-up of both.
    fn compare(&self, requests: &[Request]) -> Result<u8> {
        let one = |request: &Request, block: usize, max_tokens: usize| {
            let request = Request { block, max_tokens, ..request.clone() };
            let mut stop = StopOnly(self.text.stream(&self.args.stop)?);
            generate(&mut Sequence::new(self.target, self.drafter), &request, &mut stop)
        };
        let mut out = Output::new();
        for block in [1, requests[0].block] {
            one(&requests[0], block, self.args.max_tokens.min(16))?;
        }
        if !self.args.json {
            out.line("prompt  tokens  plain tok/s  dflash tok/s  ratio   tau  identical")?;
        }
        let (mut rows, mut accepted) = (Vec::new(), Vec::new());
        let (mut tokens, mut plain_time, mut fast_time, mut different) =
            (0, Duration::ZERO, Duration::ZERO, None);
        for (i, request) in requests.iter().enumerate() {
            let plain = one(request, 1, request.max_tokens)?;
            let fast = one(request, request.block, request.max_tokens)?;
            if plain.finish == Finish::Interrupted || fast.finish == Finish::Interrupted {
                return Ok(INTERRUPTED_EXIT);
            }
            let identical = plain.tokens == fast.tokens && plain.finish == fast.finish;
            if !identical && different.is_none() {
                let at = plain.tokens.iter().zip(&fast.tokens).take_while(|(a, b)| a == b).count();
                different = Some((i + 1, at));
            }
            let (a, b) = (stats::rate(&plain), stats::rate(&fast));
            let tau = stats::tau(&fast.accepted);
            if self.args.json {
                rows.push(json!({
                    "tokens": plain.tokens.len(), "plain_tokens_per_s": a, "dflash_tokens_per_s": b, "ratio": b / a,
                    "tau": tau, "identical": identical,
                }));
            } else {
                let tau = tau.map_or("-".into(), |tau| format!("{tau:.2}"));
                let word = if identical { "yes" } else { "NO" };
                out.line(&format!(
                    "{:6}  {:6}  {a:11.0}  {b:12.0}  {:5.2}  {tau:>4}  {word}",
                    i + 1,
                    plain.tokens.len(),
                    b / a
                ))?;
            }
            tokens += plain.tokens.len();
            plain_time += plain.prefill + plain.decode;
            fast_time += fast.prefill + fast.decode;
            accepted.extend(fast.accepted);
        }
        let rate = |time: Duration| tokens as f64 / time.as_secs_f64().max(1e-9);
        let (a, b, tau) = (rate(plain_time), rate(fast_time), stats::tau(&accepted));
        if self.args.json {
            out.line(&json!({
                "prompts": rows, "tokens": tokens, "plain_tokens_per_s": a, "dflash_tokens_per_s": b, "ratio": b / a,
                "tau": tau, "identical": different.is_none(), "seed": requests[0].sampling.seed, "device": "cpu",
                "target": self.pair.target.folder.name(), "draft": self.pair.drafter.as_ref().map(|d| d.folder.name()),
            }).to_string())?;
        } else {
            let word = if different.is_none() { "yes" } else { "NO" };
            let tau = tau.map_or("-".into(), |tau| format!("{tau:.2}"));
            out.line(&format!(
                "{:>6}  {tokens:6}  {a:11.0}  {b:12.0}  {:5.2}  {tau:>4}  {word}",
                "all",
                b / a
            ))?;
        }
        match different {
            None => Ok(0),
            Some((prompt, at)) => Err(Error::Lossless(format!(
                "prompt {prompt}: DFlash's answer leaves plain decoding's at token {at}"
            ))),
        }
    }
}

/// Stops where the text would, and writes nothing.
struct StopOnly<'a>(Stream<'a>);

impl Listener for StopOnly<'_> {
    fn prefill(&mut self, _: usize) -> Flow {
        interrupt()
    }
    fn token(&mut self, id: u32, _: bool) -> Result<Flow> {
        let (_, stopped) = self.0.push(id)?;
        Ok(if stopped { Flow::Stop } else { interrupt() })
    }
}

fn interrupt() -> Flow {
    if INTERRUPTED.load(Ordering::Relaxed) { Flow::Interrupt } else { Flow::Continue }
}

/// Stdout, whose reader may go away at any time.
struct Output {
    gone: bool,
}

impl Output {
    fn new() -> Output {
        Output { gone: false }
    }

    fn text(&mut self, text: &str) -> Result<()> {
        let mut out = io::stdout().lock();
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            Ok(()) => Ok(()),
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                self.gone = true;
                Ok(())
            }
            Err(e) => Err(Error::Internal(format!("stdout cannot be written: {e}"))),
        }
    }

    fn line(&mut self, text: &str) -> Result<()> {
        self.text(&format!("{text}\n"))
    }
}

/// One answer on its way to stdout.
struct Writer<'a> {
    index: usize,
    stream: Stream<'a>,
    /// The whole answer, for records.
    answer: String,
    out: Output,
    plain: bool,
    colored: bool,
    events: bool,
    /// Since the last event of --stream-json.
    fresh: (Vec<u32>, String),
    rounds: usize,
    bar: Option<indicatif::ProgressBar>,
}

/// Prompts shorter than this need no progress bar.
const LONG_PROMPT: usize = 1024;

impl<'a> Writer<'a> {
    fn new(session: &Session<'a>, index: usize, request: &Request) -> Result<Writer<'a>> {
        let args = session.args;
        let terminal = io::stdout().is_terminal();
        let colored = args.color == Color::Always || args.color == Color::Auto && terminal;
        let bar =
            (request.prompt.len() >= LONG_PROMPT && !args.quiet && io::stderr().is_terminal()).then(|| {
                let style =
                    indicatif::ProgressStyle::with_template("prompt {bar:40} {pos}/{len} tokens, {eta} left");
                let bar = indicatif::ProgressBar::new(request.prompt.len() as u64);
                style.map(|style| bar.clone().with_style(style)).unwrap_or(bar)
            });
        Ok(Writer {
            index,
            stream: session.text.stream(&args.stop)?,
            answer: String::new(),
            out: Output::new(),
            plain: !args.json && !args.stream_json,
            colored: args.show_accept && colored,
            events: args.stream_json,
            fresh: (Vec::new(), String::new()),
            rounds: 0,
            bar,
        })
    }

    fn piece(&mut self, text: &str, drafted: bool) -> Result<()> {
        self.answer += text;
        self.fresh.1 += text;
        match (self.plain, self.colored && drafted) {
            _ if text.is_empty() => Ok(()),
            (false, _) => Ok(()),
            (true, false) => self.out.text(text),
            (true, true) => self.out.text(&format!("\x1b[32m{text}\x1b[0m")),
        }
    }

    fn event(&mut self, accepted: Option<usize>) -> Result<()> {
        if !self.events {
            return Ok(());
        }
        let (tokens, text) = std::mem::take(&mut self.fresh);
        self.out.line(
            &json!({
                "event": "round", "index": self.index, "round": self.rounds, "tokens": tokens, "text": text,
                "accepted": accepted,
            })
            .to_string(),
        )
    }

    /// The rest of the text, and the record. True if nobody reads any more.
    fn end(mut self, session: &Session<'a>, request: &Request, outcome: &Outcome) -> Result<bool> {
        let rest = std::mem::replace(&mut self.stream, session.text.stream(&[])?).finish();
        self.piece(&rest, false)?;
        if self.plain {
            if !self.answer.ends_with('\n') {
                self.out.text("\n")?;
            }
        } else {
            let mut record = json!(session.record(request, outcome, std::mem::take(&mut self.answer)));
            if self.events {
                record["event"] = "done".into();
                record["index"] = self.index.into();
            }
            self.out.line(&record.to_string())?;
        }
        Ok(self.out.gone)
    }
}

impl Listener for Writer<'_> {
    fn prefill(&mut self, done: usize) -> Flow {
        if let Some(bar) = &self.bar {
            bar.set_position(done as u64);
            if bar.length() == Some(done as u64) {
                bar.finish_and_clear();
            }
        }
        interrupt()
    }

    fn token(&mut self, id: u32, drafted: bool) -> Result<Flow> {
        self.fresh.0.push(id);
        let (text, stopped) = self.stream.push(id)?;
        self.piece(&text, drafted)?;
        if self.rounds == 0 && self.fresh.0.len() == 1 && self.events {
            // The prefill's token: an event of its own, before the first round.
            self.event(None)?;
            self.rounds = 1;
        }
        Ok(match stopped {
            true => Flow::Stop,
            false if self.out.gone => Flow::Interrupt,
            false => interrupt(),
        })
    }

    fn round(&mut self, accepted: usize, _kept: usize) -> Result<()> {
        self.event(Some(accepted))?;
        self.rounds += 1;
        Ok(())
    }
}

// ---- --plan ----

/// What would be loaded: files, shapes, bytes.
fn plan(args: &Args, pair: &Pair) -> Result<u8> {
    let mut out = Output::new();
    let (target, drafter) = (&pair.target, pair.drafter.as_ref());
    let models = [
        Some((
            "target",
            target.folder.name(),
            &target.weights,
            &target.config.stack,
            target.config.tensors(),
        )),
        drafter.map(|d| ("drafter", d.folder.name(), &d.weights, &d.config.stack, d.config.tensors())),
    ];
    let mut all = json!({});
    let mut total = 0;
    for (role, folder, weights, stack, tensors) in models.into_iter().flatten() {
        let groups = groups(weights, &tensors)?;
        let bytes: usize = groups.iter().map(|g| g.bytes).sum();
        total += bytes;
        // The CPU's caches are f32.
        let kv = stack.kv_bytes_per_token(4);
        let files = weights.files();
        if args.json {
            all[role] = json!({
                "folder": folder, "weight_bytes": bytes, "kv_bytes_per_token": kv, "max_positions": stack.max_positions,
                "files": files.iter().map(|(name, bytes)| json!({"file": name, "bytes": bytes})).collect::<Vec<_>>(),
                "tensors": groups.iter().map(|g| json!({
                    "name": g.name, "count": g.count, "shape": g.shape, "dtype": g.dtype, "bytes": g.bytes,
                })).collect::<Vec<_>>(),
            });
            continue;
        }
        out.line(&format!(
            "{role} {folder}: {bytes} bytes of weights, {kv} bytes of KV per token, {} positions",
            stack.max_positions
        ))?;
        for (name, bytes) in files {
            out.line(&format!("  file {name}: {bytes} bytes"))?;
        }
        for g in groups {
            let shape = format!("{:?}", g.shape);
            out.line(&format!(
                "  {:3} x {:44} {shape:16} {:4} {:>14} bytes",
                g.count, g.name, g.dtype, g.bytes
            ))?;
        }
    }
    if args.json {
        all["weight_bytes"] = total.into();
        out.line(&all.to_string())?;
    } else {
        out.line(&format!("{total} bytes of weights in all, used in place on the cpu (mapped, not copied)"))?;
    }
    Ok(0)
}

/// Tensors that differ only in their layer.
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
        match groups.iter_mut().find(|g| g.name == name && g.shape == *shape && g.dtype == dtype) {
            Some(group) => {
                group.count += 1;
                group.bytes += tensor.bytes().len();
            }
            None => groups.push(Group {
                name,
                count: 1,
                shape: shape.clone(),
                dtype,
                bytes: tensor.bytes().len(),
            }),
        }
    }
    Ok(groups)
}
