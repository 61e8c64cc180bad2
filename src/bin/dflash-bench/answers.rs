//! Rows of a record of `generate`, from the outcomes of AR decoding and of DFlash for the same prompts. Only
//! arithmetic.

use crate::record::{Better, Kind, Row};
use dflash::engine::generate::Outcome;
use dflash::engine::lossless::check_lossless;
use dflash::engine::stats;
use dflash::gpu::device::Counts;
use dflash::perf::statistics::{self, Interval, MIN_SAMPLES, Summary, Work};
use dflash::{Error, Result};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// The values of the parameter `decoding`: AR decoding first, in every pair of this module, and DFlash.
pub const DECODING: [&str; 2] = ["plain", "dflash"];

/// All prompts, answered once with AR decoding and once with DFlash. Without a drafter DFlash has no outcomes; of
/// an interrupted run the last prompts are missing.
#[derive(Debug, Clone, Default)]
pub struct Repeat {
    /// One outcome for each prompt, in the order of the prompts.
    pub outcomes: [Vec<Outcome>; 2],
    /// Wall-clock time of all answers.
    pub wall: [Duration; 2],
    /// Counters, on the software GPU.
    pub counts: [Counts; 2],
    /// Whether the card was throttled. None: no instruments.
    pub throttled: Option<bool>,
}

impl Repeat {
    /// Adds the answers to further prompts.
    pub fn append(&mut self, part: Repeat) {
        for (mode, outcomes) in part.outcomes.into_iter().enumerate() {
            self.outcomes[mode].extend(outcomes);
            self.wall[mode] += part.wall[mode];
            self.counts[mode] += part.counts[mode];
        }
        self.throttled = self.throttled.max(part.throttled);
    }
}

/// Rows of acceptance: tokens and rounds, which do not depend on the machine's speed.
///
/// `categories`: the category of each prompt, if it has one. `block`: rows of a block, at least 2.
pub fn counted(repeats: &[Repeat], categories: &[Option<String>], block: usize) -> Vec<Row> {
    // Other repeats have the same rounds; `lossless` checks that.
    let fast: &[Outcome] = repeats.first().map_or(&[], |first| &first.outcomes[1]);
    let mut rows = vec![];
    for (group, prompts) in groups(categories) {
        let answered = prompts.iter().filter_map(|&i| fast.get(i));
        let accepted: Vec<&[usize]> = answered.map(|outcome| outcome.accepted.as_slice()).collect();
        rows.extend(lengths(&group, &accepted));
    }
    let rounds: Vec<usize> = fast.iter().flat_map(|outcome| &outcome.accepted).copied().collect();
    rows.extend(histogram(&rounds, block));
    rows.extend(positions(&rounds, block));
    let tokens: usize = rounds.iter().sum();
    if tokens > 0 {
        let drafts: usize = fast.iter().flat_map(|outcome| &outcome.drafted).sum();
        let value = drafts as f64 / tokens as f64;
        let (name, unit) = ("drafts per token", "drafts");
        rows.push(Row::value(name, json!({}), Kind::Counted, value, unit, Better::Neither, json!({})));
    }
    rows
}

/// Rows of times, for machines with a clock.
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

/// Rows of counters: in all, and per token.
pub fn device_counters(repeats: &[Repeat]) -> Vec<Row> {
    let mut rows = vec![];
    for (mode, decoding) in DECODING.into_iter().enumerate() {
        let parameters = || json!({ "decoding": decoding });
        let (mut tokens, mut counts) = (0, Counts::default());
        for repeat in repeats {
            tokens += self::tokens(&repeat.outcomes[mode]);
            counts += repeat.counts[mode];
        }
        if tokens == 0 {
            continue;
        }
        let (tokens, all) = (tokens as f64, Row::counts("all answers", parameters(), &counts));
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

/// Rows of the answers' lengths and equality, and an error for the first difference. With `same_tokens`,
/// DFlash must give the tokens of AR decoding; without, every repeat must give the tokens of the first.
pub fn lossless(
    repeats: &[Repeat],
    names: &[String],
    prompt_tokens: usize,
    same_tokens: bool,
) -> (Vec<Row>, Result<()>) {
    let (mut compared, mut different, mut first) = (0usize, 0usize, Ok(()));
    let lossy = |what: &str| Err(Error::Lossless(what.into()));
    for (number, Repeat { outcomes: [ar, fast], .. }) in (1..).zip(repeats) {
        for (i, (ar, fast)) in ar.iter().zip(fast).enumerate() {
            let before = &repeats[0].outcomes[1][i];
            let same = match () {
                _ if same_tokens => check_lossless(ar, fast),
                _ if number == 1 => continue,
                _ if before.tokens != fast.tokens => lossy("DFlash emitted other tokens than in repeat 1"),
                _ => Ok(()),
            };
            let same = same.and(match before.accepted == fast.accepted {
                true => Ok(()),
                false => lossy("DFlash took other rounds than in repeat 1"),
            });
            compared += 1;
            different += usize::from(same.is_err());
            let same = same.map_err(|e| Error::Lossless(format!("{}, repeat {number}: {e}", names[i])));
            first = first.and(same);
        }
    }
    let count = |name: &str, tokens: usize| {
        Row::value(name, json!({}), Kind::Counted, tokens as f64, "tok", Better::Neither, json!({}))
    };
    let answers = repeats.first().and_then(|first| first.outcomes.iter().rfind(|side| !side.is_empty()));
    let answers = answers.map_or(0, |outcomes| tokens(outcomes));
    let mut rows = vec![count("tokens of prompts", prompt_tokens), count("tokens of answers", answers)];
    if compared > 0 {
        let share = (compared - different) as f64 / compared as f64;
        let parameters = if same_tokens { json!({}) } else { json!({ "to": "repeat 1" }) };
        let numbers = json!({ "compared": compared });
        rows.push(Row::value(
            "identical",
            parameters,
            Kind::Counted,
            share,
            "share",
            Better::Higher,
            numbers,
        ));
    }
    (rows, first)
}

/// All prompts together, then those of each category: the parameters of their rows and the indices of the
/// prompts.
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

/// Tokens per round: over all rounds, and as the mean of the prompts' own.
fn lengths(group: &Map<String, Value>, accepted: &[&[usize]]) -> Vec<Row> {
    let (rounds, of_prompts) = (accepted.concat(), accepted.iter().filter_map(|rounds| stats::tau(rounds)));
    let of_prompts = Summary::of(&of_prompts.collect::<Vec<_>>());
    let (Some(tau), Some(of_prompts)) = (stats::tau(&rounds), of_prompts) else { return vec![] };
    let row = |mean: &str, value: f64, numbers: Value| {
        let parameters = with(group, "mean", mean);
        Row::value("acceptance length", parameters, Kind::Counted, value, "tok", Better::Higher, numbers)
    };
    let numbers = json!({ "rounds": rounds.len() });
    vec![row("tokens/rounds", tau, numbers), row("of prompts", of_prompts.mean, json!({}))]
}

/// Rounds by the number of tokens they produced, 1 to `block`.
fn histogram(rounds: &[usize], block: usize) -> Vec<Row> {
    let row = |tokens: usize| {
        let (parameters, count) = (json!({ "accepted": tokens }), rounds.iter().filter(|n| **n == tokens));
        let count = count.count() as f64;
        Row::value("rounds", parameters, Kind::Counted, count, "rounds", Better::Neither, json!({}))
    };
    (1..=block).map(row).collect()
}

/// The fraction of rounds that accepted draft `position`, from 1, and all drafts before it. `conditional`:
/// the fraction among the rounds that accepted the draft before it.
fn positions(rounds: &[usize], block: usize) -> Vec<Row> {
    // The last token of a round is the bonus token.
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

/// A row of requests: its name, its unit, and its value for an outcome, if it has one.
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

/// The samples of each repeat, and whether it was throttled.
type Samples = Vec<(Vec<f64>, Option<bool>)>;

fn samples(repeats: &[Repeat], mode: usize, prompts: &[usize], of: fn(&Outcome) -> Option<f64>) -> Samples {
    let one = |repeat: &Repeat| {
        let samples = prompts.iter().filter_map(|&i| of(repeat.outcomes[mode].get(i)?));
        // A time of 0 is below the clock's resolution.
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

/// The throttled rounds. None: unknown.
fn throttled(rounds: impl Iterator<Item = Option<bool>>) -> Option<Vec<usize>> {
    let known: Option<Vec<bool>> = rounds.collect();
    known.map(|rounds| (0..rounds.len()).filter(|i| rounds[*i]).collect())
}

/// The ratio of DFlash's tokens per second to AR decoding's: with the prompt, and after the first token. The
/// interval is a bootstrap over prompts.
fn speed_ups(group: &Map<String, Value>, prompts: &[usize], repeats: &[Repeat]) -> Vec<Row> {
    type Part = fn(&Outcome) -> (usize, Duration);
    let parts: [(&str, Part); 2] = [
        ("speed-up", |outcome| (outcome.tokens.len(), outcome.prefill + outcome.decode)),
        ("speed-up of decoding", |outcome| (outcome.tokens.len().saturating_sub(1), outcome.decode)),
    ];
    let row = |(name, part): (&str, Part)| {
        let work = |prompt: usize, mode: usize| {
            let parts = repeats.iter().filter_map(|repeat| Some(part(repeat.outcomes[mode].get(prompt)?)));
            parts.fold(Work { amount: 0.0, time: 0.0 }, |sum, (tokens, time)| Work {
                amount: sum.amount + tokens as f64,
                time: sum.time + time.as_secs_f64(),
            })
        };
        // An answer of one token has no time after it.
        let both = prompts.iter().map(|&prompt| [work(prompt, 0), work(prompt, 1)]);
        let both = both.filter(|both| both.iter().all(|work| work.amount > 0.0));
        speed_up(name, Value::Object(group.clone()), both.collect())
    };
    parts.into_iter().filter_map(row).collect()
}

/// The speed-up over `tasks`, each with AR decoding and with DFlash. The interval needs [`MIN_SAMPLES`] of them.
fn speed_up(name: &str, parameters: Value, tasks: Vec<[Work; 2]>) -> Option<Row> {
    let [before, after] = [0, 1].map(|mode| tasks.iter().map(|both| both[mode]).collect::<Vec<_>>());
    let Interval { ratio, low, high } = statistics::rates(&before, &after)?;
    let sure = tasks.len() >= MIN_SAMPLES;
    let numbers = json!({ "low": sure.then_some(low), "high": sure.then_some(high) });
    Some(Row::value(name, parameters, Kind::Measured, ratio, "x", Better::Higher, numbers))
}

/// The throughput of batched requests: all tokens over the wall-clock time.
fn throughput(repeats: &[Repeat]) -> Vec<Row> {
    let work = |repeat: &Repeat, mode: usize| Work {
        amount: tokens(&repeat.outcomes[mode]) as f64,
        time: repeat.wall[mode].as_secs_f64(),
    };
    let modes = (0..2).filter(|mode| repeats.iter().any(|repeat| tokens(&repeat.outcomes[*mode]) > 0));
    let mut rows: Vec<Row> = modes
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

#[cfg(test)]
mod tests {
    use super::*;
    use dflash::engine::generate::Finish;

    fn outcome(tokens: usize, accepted: &[usize], prefill: u64, decode: u64) -> Outcome {
        Outcome {
            tokens: (0..tokens as u32).collect(),
            finish: Finish::Length,
            accepted: accepted.to_vec(),
            drafted: vec![4; accepted.len()],
            kept: 0,
            prefill: Duration::from_millis(prefill),
            decode: Duration::from_millis(decode),
        }
    }

    fn named(names: &[&str]) -> Vec<Option<String>> {
        names.iter().map(|name| (!name.is_empty()).then(|| name.to_string())).collect()
    }

    #[track_caller]
    fn find<'a>(rows: &'a [Row], name: &str, parameters: Value) -> &'a Row {
        let row = rows.iter().find(|row| row.name == name && json!(row.parameters) == parameters);
        row.unwrap_or_else(|| panic!("no row {name} {parameters}: {rows:?}"))
    }

    /// Two prompts twice; the second's first answer is a single token.
    fn repeats() -> Vec<Repeat> {
        let wall = |ar, fast| [ar, fast].map(Duration::from_millis);
        vec![
            Repeat {
                outcomes: [
                    vec![outcome(11, &[1; 10], 20, 100), outcome(1, &[], 10, 0)],
                    vec![outcome(11, &[4, 3, 4], 22, 40), outcome(1, &[], 11, 0)],
                ],
                wall: wall(130, 73),
                throttled: Some(false),
                ..Repeat::default()
            },
            Repeat {
                outcomes: [
                    vec![outcome(11, &[1; 10], 30, 120), outcome(6, &[1; 5], 10, 50)],
                    vec![outcome(11, &[4, 3, 4], 28, 60), outcome(6, &[5], 9, 10)],
                ],
                wall: wall(210, 107),
                throttled: Some(true),
                ..Repeat::default()
            },
        ]
    }

    #[test]
    fn ttft_and_tpot_are_before_and_after_the_first_token() {
        let rows = timed(&repeats(), &named(&["a", ""]), 1);
        let row = |name, mode| find(&rows, name, json!({ "decoding": mode }));
        let ttft = row("TTFT", "plain");
        assert_eq!(ttft.samples, Some(vec![20.0, 10.0, 30.0, 10.0]));
        assert_eq!((ttft.rounds.clone(), ttft.throttled.clone()), (Some(vec![2, 2]), Some(vec![1])));
        assert_eq!((ttft.median, ttft.unit.as_str(), ttft.better), (Some(15.0), "ms", Better::Lower));
        let p99 = ttft.numbers["p99"].as_f64().unwrap();
        assert!(ttft.numbers["mean"] == 17.5 && (p99 - 29.7).abs() < 1e-9, "{ttft:?}");
        assert_eq!(row("TTFT", "dflash").samples, Some(vec![22.0, 11.0, 28.0, 9.0]));
        // Ten tokens follow the first; an answer of one token has no TPOT.
        let tpot = row("TPOT", "plain");
        assert_eq!(
            (tpot.samples.clone(), tpot.rounds.clone()),
            (Some(vec![10.0, 12.0, 10.0]), Some(vec![1, 2]))
        );
        assert_eq!(row("TPOT", "dflash").samples, Some(vec![4.0, 6.0, 2.0]));
        let rate = row("tokens per second", "dflash");
        let expected = [11.0 / 0.062, 1.0 / 0.011, 11.0 / 0.088, 6.0 / 0.019];
        let close = |(a, b): (&f64, f64)| (a / b - 1.0).abs() < 1e-12;
        assert!(rate.samples.as_ref().unwrap().iter().zip(expected).all(close), "{rate:?}");
        assert_eq!((rate.unit.as_str(), rate.better), ("tok/s", Better::Higher));

        let a = find(&rows, "TTFT", json!({ "decoding": "plain", "category": "a" }));
        assert_eq!((a.samples.clone(), a.rounds.clone()), (Some(vec![20.0, 30.0]), Some(vec![1, 1])));
        assert!(rows.iter().all(|row| !row.name.ends_with(", all")));
    }

    #[test]
    fn rounds_without_samples_are_left_out() {
        let mut repeats = repeats();
        repeats
            .iter_mut()
            .for_each(|repeat| repeat.outcomes.iter_mut().for_each(|side| drop(side.remove(0))));
        let rows = timed(&repeats, &named(&[""]), 1);
        let tpot = find(&rows, "TPOT", json!({ "decoding": "plain" }));
        assert_eq!((tpot.rounds.clone(), tpot.throttled.clone()), (Some(vec![1]), Some(vec![0])));
        repeats[0].throttled = None;
        let rows = timed(&repeats, &named(&[""]), 1);
        assert_eq!(find(&rows, "TTFT", json!({ "decoding": "plain" })).throttled, None);
        repeats.pop();
        let rows = timed(&repeats, &named(&[""]), 1);
        assert!(rows.iter().all(|row| row.name != "TPOT" && row.name != "speed-up of decoding"), "{rows:?}");
    }

    #[test]
    fn a_speed_up_is_a_ratio_of_sums() {
        let rows = timed(&repeats(), &named(&["", "b"]), 1);
        let ratio = |name, parameters| find(&rows, name, parameters).median.unwrap();
        let near = |a: f64, b: f64| assert!((a / b - 1.0).abs() < 1e-12, "{a}, expected {b}");
        // 29 tokens on both sides, in 340 ms and in 180.
        near(ratio("speed-up", json!({})), 340.0 / 180.0);
        near(ratio("speed-up", json!({ "category": "b" })), 70.0 / 30.0);
        near(ratio("speed-up of decoding", json!({})), 270.0 / 110.0);
        near(ratio("speed-up of decoding", json!({ "category": "b" })), 50.0 / 10.0);
        // Two prompts are too few for an interval.
        assert_eq!(
            find(&rows, "speed-up", json!({})).numbers,
            *json!({ "low": null, "high": null }).as_object().unwrap()
        );

        let one = |i: u64| [outcome(10, &[], 10, 90 + i), outcome(10, &[], 10, 40 + 2 * i)];
        let [ar, fast] = [0, 1].map(|mode| (0..5).map(|i| one(i)[mode].clone()).collect::<Vec<_>>());
        let repeat = Repeat { outcomes: [ar, fast], ..Repeat::default() };
        let rows = timed(&[repeat], &named(&[""; 5]), 1);
        let row = find(&rows, "speed-up", json!({}));
        let [low, high] = ["low", "high"].map(|key| row.numbers[key].as_f64().unwrap());
        near(row.median.unwrap(), 510.0 / 270.0);
        // The interval is within the ratios of single prompts.
        assert!(
            low >= 104.0 / 58.0 && low < row.median.unwrap() && high > row.median.unwrap() && high <= 2.0
        );
    }

    #[test]
    fn a_batch_has_one_rate() {
        let rows = timed(&repeats(), &named(&["", ""]), 2);
        let row = find(&rows, "tokens per second, all", json!({ "decoding": "dflash" }));
        assert_eq!(row.samples, Some(vec![12.0 / 0.073, 17.0 / 0.107]));
        assert_eq!((row.rounds.clone(), row.throttled.clone()), (None, Some(vec![1])));
        let ratio = find(&rows, "speed-up, all", json!({})).median.unwrap();
        assert!((ratio - 340.0 / 180.0).abs() < 1e-12, "{ratio}");
    }

    #[test]
    fn acceptance_comes_from_the_first_repeat() {
        let fast = vec![outcome(11, &[4, 3, 4], 1, 1), outcome(7, &[1, 4, 1], 1, 1), outcome(1, &[], 1, 1)];
        let again = vec![outcome(11, &[1; 10], 1, 1); 3];
        let repeats = [fast, again].map(|fast| Repeat { outcomes: [vec![], fast], ..Repeat::default() });
        let rows = counted(&repeats, &named(&["x", "y", "x"]), 5);
        let value = |name, parameters| find(&rows, name, parameters).median.unwrap();
        let histogram = [1, 2, 3, 4, 5].map(|k| value("rounds", json!({ "accepted": k })));
        assert_eq!(histogram, [2.0, 0.0, 1.0, 3.0, 0.0]);
        // Drafts are the tokens of a round without the last.
        let shares = [1, 2, 3, 4].map(|i| value("accepted at position", json!({ "position": i })));
        assert_eq!(shares, [4.0 / 6.0, 4.0 / 6.0, 0.5, 0.0]);
        let conditional = |i: usize| {
            find(&rows, "accepted at position", json!({ "position": i })).numbers["conditional"].clone()
        };
        assert_eq!([1, 2, 3, 4].map(conditional), [json!(4.0 / 6.0), json!(1.0), json!(0.75), json!(0.0)]);
        assert_eq!(value("acceptance length", json!({ "mean": "tokens/rounds" })), 17.0 / 6.0);
        let of_prompts = value("acceptance length", json!({ "mean": "of prompts" }));
        assert!((of_prompts - (11.0 / 3.0 + 2.0) / 2.0).abs() < 1e-12);
        assert_eq!(value("acceptance length", json!({ "mean": "of prompts", "category": "y" })), 2.0);
        let numbers = &find(&rows, "acceptance length", json!({ "mean": "tokens/rounds" })).numbers;
        assert_eq!(json!(numbers), json!({ "rounds": 6 }));
        // Four in each of six rounds, for 17 tokens.
        assert_eq!(value("drafts per token", json!({})), 24.0 / 17.0);
        // No round reached the second draft.
        let rows = counted(
            &[Repeat { outcomes: [vec![], vec![outcome(2, &[1], 1, 1)]], ..Repeat::default() }],
            &named(&[""]),
            3,
        );
        assert_eq!(
            find(&rows, "accepted at position", json!({ "position": 2 })).numbers["conditional"],
            Value::Null
        );
        let none = counted(
            &[Repeat { outcomes: [vec![], vec![outcome(1, &[], 1, 0)]], ..Repeat::default() }],
            &named(&[""]),
            3,
        );
        assert!(none.iter().all(|row| row.name == "rounds" && row.median == Some(0.0)));
    }

    #[test]
    fn every_difference_counts_and_the_first_is_reported() {
        let names = ["p line 1", "p line 2"].map(String::from);
        let mut repeats = repeats();
        // The second prompt's answers must be of one length to repeat.
        repeats[0].outcomes = repeats[1].outcomes.clone();
        let (rows, same) = lossless(&repeats, &names, 77, true);
        assert_eq!(same, Ok(()));
        assert_eq!(find(&rows, "tokens of prompts", json!({})).median, Some(77.0));
        assert_eq!(find(&rows, "tokens of answers", json!({})).median, Some(17.0));
        let identical = |rows: &[Row]| {
            let row = find(rows, "identical", json!({}));
            (row.median.unwrap(), json!(row.numbers))
        };
        assert_eq!(identical(&rows), (1.0, json!({ "compared": 4 })));

        repeats[1].outcomes[1][0].tokens[3] = 99;
        repeats[1].outcomes[1][1].accepted = vec![3, 2];
        let (rows, same) = lossless(&repeats, &names, 77, true);
        assert_eq!(identical(&rows), (0.5, json!({ "compared": 4 })));
        let sentence = "p line 1, repeat 2: after 3 equal tokens autoregressive decoding goes on with 3, and DFlash goes on \
            with 99";
        assert_eq!(same, Err(Error::Lossless(sentence.into())));
        repeats[1].outcomes[1][0].tokens[3] = 3;
        let (_, same) = lossless(&repeats, &names, 77, true);
        let sentence = "p line 2, repeat 2: DFlash took other rounds than in repeat 1";
        assert_eq!(same, Err(Error::Lossless(sentence.into())));
    }

    #[test]
    fn sampled_verification_compares_with_the_first_repeat() {
        let names = ["p line 1", "p line 2"].map(String::from);
        let mut repeats = repeats();
        repeats[0].outcomes = repeats[1].outcomes.clone();
        // AR decoding gives other tokens.
        repeats.iter_mut().for_each(|repeat| repeat.outcomes[0][0].tokens[3] = 99);
        let (rows, same) = lossless(&repeats, &names, 77, false);
        assert_eq!(same, Ok(()));
        let identical = |rows: &[Row]| {
            let row = find(rows, "identical", json!({ "to": "repeat 1" }));
            (row.median.unwrap(), json!(row.numbers))
        };
        assert_eq!(identical(&rows), (1.0, json!({ "compared": 2 })));
        let alone = lossless(&repeats[..1], &names, 77, false);
        assert_eq!((alone.0.len(), alone.1), (2, Ok(())), "one repeat has nothing to compare with");

        repeats[1].outcomes[1][0].tokens[3] = 99;
        let (rows, same) = lossless(&repeats, &names, 77, false);
        assert_eq!(identical(&rows), (0.5, json!({ "compared": 2 })));
        let sentence = "p line 1, repeat 2: DFlash emitted other tokens than in repeat 1";
        assert_eq!(same, Err(Error::Lossless(sentence.into())));
        repeats[1].outcomes[1][0].tokens[3] = 3;
        repeats[1].outcomes[1][1].accepted = vec![3, 2];
        let (_, same) = lossless(&repeats, &names, 77, false);
        let sentence = "p line 2, repeat 2: DFlash took other rounds than in repeat 1";
        assert_eq!(same, Err(Error::Lossless(sentence.into())));
    }

    #[test]
    fn counters_per_token_divide_by_all_tokens() {
        let ar =
            Counts { launches: 58, streamed: 1000, read: 300, written: 150, mma: 29, ..Counts::default() };
        let fast = Counts { launches: 29, ..ar };
        let mut repeats = repeats();
        repeats[1].counts = [ar, fast];
        let rows = device_counters(&repeats);
        let value = |name, mode| find(&rows, name, json!({ "decoding": mode })).median.unwrap();
        assert_eq!(value("all answers", "plain"), 1450.0);
        assert_eq!((value("bytes per token", "plain"), value("mma per token", "plain")), (50.0, 1.0));
        assert_eq!(["plain", "dflash"].map(|mode| value("launches per token", mode)), [2.0, 1.0]);
    }
}
