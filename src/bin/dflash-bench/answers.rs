//! What answers say: rows from the outcomes of plain decoding and of DFlash for the same prompts. Arithmetic alone.

use crate::record::{Better, Kind, Row};
use dflash::device::Counts;
use dflash::engine::{Outcome, check_lossless};
use dflash::measure::{self, FEWEST, Interval, Summary, Work};
use dflash::{Error, Result, stats};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// What stands at both places of every pair here, as rows say it.
pub const DECODING: [&str; 2] = ["plain", "dflash"];

/// All prompts once, both ways.
#[derive(Debug, Clone, Default)]
pub struct Repeat {
    /// An outcome for each prompt, in their order.
    pub outcomes: [Vec<Outcome>; 2],
    /// By the clock on the wall, with nothing between answers.
    pub wall: [Duration; 2],
    /// Whether the card held its clocks back; None: no instruments.
    pub throttled: Option<bool>,
}

/// Rows of what was decided: tokens and rounds, the same wherever and however fast they come.
///
/// `categories`: of each prompt, none or a name. `block`: rows of a block, at least 2.
pub fn counted(repeats: &[Repeat], categories: &[Option<String>], block: usize) -> Vec<Row> {
    // The other repeats have the same rounds, or `identical` says so.
    let fast: &[Outcome] = repeats.first().map_or(&[], |first| &first.outcomes[1]);
    let mut rows = vec![];
    for (group, prompts) in groups(categories) {
        let accepted: Vec<&[usize]> = prompts.iter().map(|&i| fast[i].accepted.as_slice()).collect();
        rows.extend(lengths(&group, &accepted));
    }
    let rounds: Vec<usize> = fast.iter().flat_map(|outcome| &outcome.accepted).copied().collect();
    rows.extend(histogram(&rounds, block));
    rows.extend(positions(&rounds, block));
    rows
}

/// Rows of times: on a machine whose clock means something.
pub fn timed(repeats: &[Repeat], categories: &[Option<String>], batch: usize) -> Vec<Row> {
    let mut rows = vec![];
    for (group, prompts) in groups(categories) {
        rows.extend(speed_ups(&group, &prompts, repeats));
    }
    for (name, unit, better, of) in REQUEST {
        for (group, prompts) in groups(categories) {
            let each = (0..2).filter_map(|mode| {
                let parameters = with(&group, "decoding", DECODING[mode]);
                request(name, parameters, (unit, better), &samples(repeats, mode, &prompts, of))
            });
            rows.extend(each);
        }
    }
    if batch > 1 {
        rows.extend(throughput(repeats));
    }
    rows
}

/// Rows of what the emulator counted: in all, and for each token.
pub fn emulated(repeats: &[Repeat], counts: &[Counts; 2]) -> Vec<Row> {
    let mut rows = vec![];
    for (mode, counts) in counts.iter().enumerate() {
        let parameters = || json!({ "decoding": DECODING[mode] });
        let all = Row::counts("all answers", parameters(), counts);
        let tokens = repeats.iter().map(|repeat| tokens(&repeat.outcomes[mode])).sum::<usize>() as f64;
        let mut each = |name: &str, count: f64, unit: &str| {
            let value = count / tokens;
            rows.push(Row::value(name, parameters(), Kind::Counted, value, unit, Better::Lower, json!({})));
        };
        each("bytes per token", all.median.unwrap_or(0.0), "bytes");
        each("launches per token", counts.launches as f64, "launches");
        each("mma per token", counts.mma as f64, "mma");
        rows.push(all);
    }
    rows
}

/// What was answered, and whether both ways gave the same: rows, and the first difference.
pub fn lossless(repeats: &[Repeat], names: &[String], prompt_tokens: usize) -> (Vec<Row>, Result<()>) {
    let (mut compared, mut different, mut first) = (0usize, 0usize, Ok(()));
    for (number, Repeat { outcomes: [plain, fast], .. }) in (1..).zip(repeats) {
        for (i, (plain, fast)) in plain.iter().zip(fast).enumerate() {
            let again = repeats[0].outcomes[1][i].accepted == fast.accepted;
            let same = check_lossless(plain, fast).and(match again {
                true => Ok(()),
                false => Err(Error::Lossless("DFlash took other rounds than in repeat 1".into())),
            });
            compared += 1;
            different += usize::from(same.is_err());
            let same = same.map_err(|e| Error::Lossless(format!("{}, repeat {number}: {e}", names[i])));
            first = first.and(same);
        }
    }
    let count = |of: &str, tokens: usize| {
        let parameters = json!({ "of": of });
        Row::value("tokens", parameters, Kind::Counted, tokens as f64, "tok", Better::Higher, json!({}))
    };
    let answers = repeats.first().map_or(0, |repeat| tokens(&repeat.outcomes[1]));
    let share = (compared - different) as f64 / compared.max(1) as f64;
    let numbers = json!({ "compared": compared, "different": different });
    let identical =
        Row::value("identical", json!({}), Kind::Counted, share, "share", Better::Higher, numbers);
    (vec![count("prompts", prompt_tokens), count("answers", answers), identical], first)
}

/// All prompts, and those of each category: the parameters of their rows, and which they are.
fn groups(categories: &[Option<String>]) -> Vec<(Map<String, Value>, Vec<usize>)> {
    let mut groups = vec![(Map::new(), (0..categories.len()).collect::<Vec<_>>())];
    for (i, category) in categories.iter().enumerate() {
        let Some(category) = category else { continue };
        match groups.iter_mut().skip(1).find(|group| group.0["category"] == category.as_str()) {
            Some((_, prompts)) => prompts.push(i),
            None => groups.push((Map::from_iter([("category".into(), category.as_str().into())]), vec![i])),
        }
    }
    groups
}

fn with(group: &Map<String, Value>, key: &str, value: impl Into<Value>) -> Value {
    let mut parameters = Map::from_iter([(key.to_string(), value.into())]);
    parameters.extend(group.clone());
    Value::Object(parameters)
}

fn tokens(outcomes: &[Outcome]) -> usize {
    outcomes.iter().map(|outcome| outcome.tokens.len()).sum()
}

// ---- acceptance ----

/// Tokens per round: over all rounds, and the mean of what each prompt has.
fn lengths(group: &Map<String, Value>, accepted: &[&[usize]]) -> Vec<Row> {
    let (rounds, of_prompts) = (accepted.concat(), accepted.iter().filter_map(|rounds| stats::tau(rounds)));
    let of_prompts = Summary::of(&of_prompts.collect::<Vec<_>>());
    let (Some(tau), Some(of_prompts)) = (stats::tau(&rounds), of_prompts) else { return vec![] };
    let row = |mean: &str, value: f64, numbers: Value| {
        let parameters = with(group, "mean", mean);
        Row::value("acceptance length", parameters, Kind::Counted, value, "tok", Better::Higher, numbers)
    };
    let numbers = json!({ "tokens": rounds.iter().sum::<usize>(), "rounds": rounds.len() });
    vec![row("tokens/rounds", tau, numbers), row("of prompts", of_prompts.mean, json!({}))]
}

/// How many rounds brought so many tokens.
fn histogram(rounds: &[usize], block: usize) -> Vec<Row> {
    let row = |tokens: usize| {
        let (parameters, count) = (json!({ "accepted": tokens }), rounds.iter().filter(|n| **n == tokens));
        let count = count.count() as f64;
        Row::value("rounds", parameters, Kind::Counted, count, "rounds", Better::Higher, json!({}))
    };
    (1..=block).map(row).collect()
}

/// The share of rounds in which draft `position`, from 1, was accepted, and with it all before it; and of those alone in
/// which the one before it was.
fn positions(rounds: &[usize], block: usize) -> Vec<Row> {
    // A round's last token is the target's own.
    let with = |drafts: usize| rounds.iter().filter(|tokens| **tokens > drafts).count() as f64;
    let row = |position: usize| {
        let (accepted, before) = (with(position), with(position - 1));
        let numbers = json!({ "conditional": (before > 0.0).then_some(accepted / before) });
        let (parameters, share) = (json!({ "position": position }), accepted / rounds.len() as f64);
        Row::value("accepted at position", parameters, Kind::Counted, share, "share", Better::Higher, numbers)
    };
    if rounds.is_empty() { vec![] } else { (1..block).map(row).collect() }
}

// ---- times ----

/// What a request's row is called, its unit, and what it is of an outcome, if anything.
type Measure = (&'static str, &'static str, Better, fn(&Outcome) -> Option<f64>);

const REQUEST: [Measure; 3] = [
    ("TTFT", "ms", Better::Lower, |outcome| Some(ms(outcome.prefill))),
    ("TPOT", "ms", Better::Lower, |outcome| {
        let further = outcome.tokens.len().checked_sub(1).filter(|n| *n > 0)?;
        Some(ms(outcome.decode) / further as f64)
    }),
    ("tokens per second", "tok/s", Better::Higher, |outcome| Some(stats::rate(outcome))),
];

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Samples of each repeat, and whether it was throttled.
type Samples = Vec<(Vec<f64>, Option<bool>)>;

fn samples(repeats: &[Repeat], mode: usize, prompts: &[usize], of: fn(&Outcome) -> Option<f64>) -> Samples {
    let one = |repeat: &Repeat| {
        let samples = prompts.iter().filter_map(|&i| of(&repeat.outcomes[mode][i]));
        // A clock too coarse to see it says nothing.
        (samples.filter(|x| *x > 0.0).collect(), repeat.throttled)
    };
    repeats.iter().map(one).filter(|(samples, _): &(Vec<f64>, _)| !samples.is_empty()).collect()
}

/// None without samples.
fn request(name: &str, parameters: Value, (unit, better): (&str, Better), samples: &Samples) -> Option<Row> {
    let all: Vec<f64> = samples.iter().flat_map(|(samples, _)| samples).copied().collect();
    let Summary { mean, p99, .. } = Summary::of(&all)?;
    let numbers = json!({ "mean": mean, "p99": p99 });
    let rounds = samples.iter().map(|(samples, _)| samples.len()).collect();
    let row = Row::samples(name, parameters, all, Some(rounds), unit, better, numbers);
    Some(Row { throttled: throttled(samples.iter().map(|(_, throttled)| *throttled)), ..row })
}

/// Which rounds were; None where nobody knows.
fn throttled(rounds: impl Iterator<Item = Option<bool>>) -> Option<Vec<usize>> {
    let known: Option<Vec<bool>> = rounds.collect();
    known.map(|rounds| (0..rounds.len()).filter(|i| rounds[*i]).collect())
}

/// How many times as many tokens per second DFlash brings, of everything and of what follows the first token; the interval
/// is over prompts.
fn speed_ups(group: &Map<String, Value>, prompts: &[usize], repeats: &[Repeat]) -> Vec<Row> {
    type Part = fn(&Outcome) -> (usize, Duration);
    let parts: [(&str, Part); 2] = [
        ("speed-up", |outcome| (outcome.tokens.len(), outcome.prefill + outcome.decode)),
        ("speed-up of decoding", |outcome| (outcome.tokens.len().saturating_sub(1), outcome.decode)),
    ];
    let row = |(name, part): (&str, Part)| {
        let work = |prompt: usize, mode: usize| {
            let parts = repeats.iter().map(|repeat| part(&repeat.outcomes[mode][prompt]));
            parts.fold(Work { amount: 0.0, time: 0.0 }, |sum, (tokens, time)| Work {
                amount: sum.amount + tokens as f64,
                time: sum.time + time.as_secs_f64(),
            })
        };
        // Who says no second token has no decoding.
        let both = prompts.iter().map(|&prompt| [work(prompt, 0), work(prompt, 1)]);
        let both = both.filter(|both| both.iter().all(|work| work.amount > 0.0));
        speed_up(name, Value::Object(group.clone()), both.collect())
    };
    parts.into_iter().filter_map(row).collect()
}

/// Of tasks done both ways. The interval needs [`FEWEST`] of them.
fn speed_up(name: &str, parameters: Value, tasks: Vec<[Work; 2]>) -> Option<Row> {
    let [before, after] = [0, 1].map(|mode| tasks.iter().map(|both| both[mode]).collect::<Vec<_>>());
    let Interval { ratio, low, high } = measure::rates(&before, &after)?;
    let sure = tasks.len() >= FEWEST;
    let numbers = json!({ "low": sure.then_some(low), "high": sure.then_some(high) });
    Some(Row::value(name, parameters, Kind::Measured, ratio, "x", Better::Higher, numbers))
}

/// Of requests that run together: their tokens by the clock on the wall.
fn throughput(repeats: &[Repeat]) -> Vec<Row> {
    let work = |repeat: &Repeat, mode: usize| Work {
        amount: tokens(&repeat.outcomes[mode]) as f64,
        time: repeat.wall[mode].as_secs_f64(),
    };
    let mut rows: Vec<Row> = (0..2)
        .map(|mode| {
            let rates = repeats.iter().map(|repeat| work(repeat, mode));
            let rates = rates.map(|work| work.amount / work.time).collect();
            let parameters = json!({ "decoding": DECODING[mode] });
            let name = "tokens per second, all";
            let row = Row::samples(name, parameters, rates, None, "tok/s", Better::Higher, json!({}));
            Row { throttled: throttled(repeats.iter().map(|repeat| repeat.throttled)), ..row }
        })
        .collect();
    let tasks = repeats.iter().map(|repeat| [work(repeat, 0), work(repeat, 1)]).collect();
    rows.extend(speed_up("speed-up, all", json!({}), tasks));
    rows
}
