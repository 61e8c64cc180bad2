//! Which rows of a record make which figure of a report. A figure without rows is left out.

use crate::plot::{self, Axis, Bar, Colour, FIRST, INK, KINDS, Mark, Scale, Series};
use crate::record::{Kind, Record, Row};
use crate::show::{four_digits, shown};
use dflash::Result;
use dflash::floor::Card;
use serde::Serialize;

/// A drawing and what is said under it.
#[derive(Debug, Serialize)]
pub struct Figure {
    pub title: String,
    /// SVG, in which texts are escaped.
    pub svg: String,
    pub legend: Vec<Key>,
    pub notes: Vec<String>,
}

/// Of a legend.
#[derive(Debug, Serialize)]
pub struct Key {
    class: &'static str,
    colour: Colour,
    name: String,
}

/// In the order in which a round runs them.
const PARTS: [&str; 6] = ["begin", "inject", "draft", "verify", "accept", "gaps"];

/// All of `record`'s figures; `all`: the page's records, of which floors predict what rounds measured.
///
/// # Errors
/// [`dflash::Error::Internal`] if a figure cannot be drawn.
pub fn of(record: &Record, all: &[&Record]) -> Result<Vec<Figure>> {
    let mut figures = vec![];
    match record.command.as_str() {
        "kernels" => {
            figures.extend(roofline(record)?);
            figures.extend(kernels(record)?);
        }
        "round" => {
            figures.extend(timeline(record)?);
            figures.extend(tokens_by_batch(record, all)?);
        }
        "floor" => figures.extend(tokens_by_batch(record, all)?),
        "generate" => {
            figures.extend(tokens_by_category(record)?);
            figures.extend(accepted(record)?);
            figures.extend(by_position(record)?);
        }
        _ => (),
    }
    Ok(figures)
}

fn named<'a>(record: &'a Record, name: &str) -> impl Iterator<Item = &'a Row> {
    let name = name.to_string();
    record.rows.iter().filter(move |row| row.name == name)
}

fn parameter(row: &Row, name: &str) -> Option<f64> {
    row.parameters.get(name)?.as_f64()
}

fn number(row: &Row, name: &str) -> Option<f64> {
    row.numbers.get(name)?.as_f64()
}

/// `batch 1, context 1024`: all parameters but these.
pub fn parameters(row: &Row, but: &[&str]) -> String {
    let others = row.parameters.iter().filter(|(name, _)| !but.contains(&name.as_str()));
    let texts: Vec<String> = others.map(|(name, value)| format!("{name} {}", shown(Some(value)))).collect();
    texts.join(", ")
}

/// Distinct, in the order of their first appearance.
fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = vec![];
    for one in all {
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}

fn colour(i: usize) -> Colour {
    FIRST + (i % KINDS as usize) as Colour
}

fn keys(series: &[Series]) -> Vec<Key> {
    let key = |series: &Series| {
        let (class, name) = (series.mark.class(), series.name.clone());
        Key { class, colour: series.colour, name }
    };
    series.iter().map(key).collect()
}

fn boxes(names: &[&str]) -> Vec<Key> {
    let key = |(i, name): (usize, &&str)| Key { class: "box", colour: colour(i), name: name.to_string() };
    names.iter().enumerate().map(key).collect()
}

// ---- kernels ----

const FAMILIES: [&str; 4] = ["target", "drafter", "attention", "other"];

fn family(row: &Row) -> usize {
    match row.name.as_str() {
        name if name.contains("attention") => 2,
        name if name.starts_with("target: ") => 0,
        name if name.starts_with("drafter: ") => 1,
        _ => 3,
    }
}

fn roofline(record: &Record) -> Result<Option<Figure>> {
    let dots = |i: usize| {
        let rows = record.rows.iter().filter(|row| row.unit == "us" && family(row) == i);
        let points = rows.filter_map(|row| {
            let (megabytes, gigaflops) = (number(row, "MB")?, number(row, "GFLOP")?);
            let (x, y) = (gigaflops / megabytes * 1e3, gigaflops / (row.median? * 1e-6));
            let title = format!("{} ({}): {} GFLOP/s", row.name, parameters(row, &[]), four_digits(y));
            Some((x, y, title))
        });
        let points = points.filter(|point| point.0 > 0.0 && point.1 > 0.0).collect();
        Series { name: FAMILIES[i].into(), colour: colour(i), mark: Mark::Dots, points }
    };
    let mut series: Vec<Series> = (0..FAMILIES.len()).map(dots).filter(|s| !s.points.is_empty()).collect();
    let xs = || series.iter().flat_map(|series| &series.points).map(|point| point.0);
    let (low, high) = (xs().fold(f64::INFINITY, f64::min), xs().fold(0.0, f64::max));
    let ceiling = named(record, "read ceiling").find_map(|row| row.median.filter(|_| row.unit == "GB/s"));
    let machine = &record.machine;
    let card = machine.card.as_deref().and_then(|name| Card::named(name.trim_start_matches("NVIDIA ")));
    let peak = machine.tflops.or(card.map(|card| card.tflops)).map(|tflops| tflops * 1e3);
    let mut rule = |name: String, mark, points: Vec<(f64, f64)>| {
        let points = points.into_iter().map(|(x, y)| (x, y, String::new())).collect();
        series.push(Series { name, colour: INK, mark, points });
    };
    // Both lines end where they meet, which is further right than decode kernels go.
    let meet = ceiling.zip(peak).map(|(ceiling, peak)| peak / ceiling);
    let end = meet.unwrap_or(high).max(high);
    if let Some(ceiling) = ceiling {
        let to = meet.unwrap_or(end);
        let name = format!("read ceiling, measured: {} GB/s", four_digits(ceiling));
        rule(name, Mark::Rule, vec![(low, low * ceiling), (to, to * ceiling)]);
    }
    if let Some(peak) = peak {
        let name = format!("tensor cores, nominal: {} TFLOP/s", four_digits(peak / 1e3));
        rule(name, Mark::DashedRule, vec![(meet.unwrap_or(low).min(end), peak), (end * 2.0, peak)]);
    }
    if low > high {
        return Ok(None);
    }
    let x = Axis("operations per byte, FLOP", Scale::Log);
    let svg = plot::lines(&x, &Axis("GFLOP/s", Scale::Log), &series)?;
    let (title, legend) = ("Roofline".into(), keys(&series));
    Ok(svg.map(|svg| Figure { title, svg, legend, notes: vec!["A dot says which kernel it is.".into()] }))
}

/// Shares of the ceiling, or what the emulator counted; one figure for each number of rows.
fn kernels(record: &Record) -> Result<Vec<Figure>> {
    let moved = ["streamed", "read", "written"];
    let share = |row: &Row| number(row, "share of ceiling");
    let counted = |row: &Row| row.kind == Kind::Counted && moved.iter().all(|name| number(row, name).is_some());
    let mut figures = vec![];
    for rows in distinct(record.rows.iter().map(|row| parameter(row, "rows"))) {
        let of = rows.map_or(String::new(), |rows| format!(", rows {}", four_digits(rows)));
        let alike = || record.rows.iter().filter(|row| parameter(row, "rows") == rows);
        let bar = |row: &Row, parts: Vec<(Colour, f64)>, mut value: String| {
            let label = [row.name.clone(), parameters(row, &["rows"])].join(" ").trim_end().to_string();
            if row.throttled.as_ref().is_some_and(|list| !list.is_empty()) {
                value += ", throttled";
            }
            Bar { label, parts, value }
        };
        let shares = alike().filter_map(|row| Some((row, share(row)? * 100.0)));
        let measured: Vec<Bar> = shares
            .map(|(row, percent)| bar(row, vec![(colour(family(row)), percent)], format!("{percent:.0} %")))
            .collect();
        let x = Axis("% of the measured read ceiling", Scale::Linear);
        if let Some(svg) = plot::bars(&x, &measured, Some(100.0))? {
            let title = format!("Share of the read ceiling{of}");
            figures.push(Figure { title, svg, legend: boxes(&FAMILIES), notes: vec![] });
        }
        let counters: Vec<Bar> = alike()
            .filter(|row| counted(row))
            .map(|row| {
                let parts = moved.iter().enumerate();
                let parts = parts.filter_map(|(i, name)| Some((colour(i), number(row, name)? / 1e6)));
                let megabytes = row.median.unwrap_or(0.0) / 1e6;
                bar(row, parts.collect(), format!("{} MB", four_digits(megabytes)))
            })
            .collect();
        let x = Axis("MB that cross the bus, counted", Scale::Linear);
        if let Some(svg) = plot::bars(&x, &counters, None)? {
            let title = format!("Bytes by the emulator's counters{of}");
            figures.push(Figure { title, svg, legend: boxes(&moved), notes: vec![] });
        }
    }
    Ok(figures)
}

// ---- round ----

/// Where a round's time goes, or its bytes.
fn timeline(record: &Record) -> Result<Option<Figure>> {
    let (mut bars, mut notes) = (vec![], vec![]);
    let Some(first) = named(record, "round").next() else { return Ok(None) };
    // Bytes by the million, so that axes have few digits.
    let (scale, unit, what) = match first.unit.as_str() {
        "bytes" => (1e-6, "MB", "MB that cross the bus, counted".to_string()),
        unit => (1.0, unit, format!("{unit}, measured")),
    };
    for round in named(record, "round").filter(|round| round.unit == first.unit) {
        let alone = |name: &str| {
            let at = |row: &Row| ["batch", "context"].map(|name| parameter(row, name));
            let mut rows = named(record, name);
            rows.find(|row| row.parameters == round.parameters || (name == "plain step" && at(row) == at(round)))
        };
        let mut parts = vec![];
        for (i, name) in PARTS.into_iter().enumerate() {
            match alone(name).map(|row| (row.median, &row.unit)) {
                Some((Some(value), unit)) if value > 0.0 && *unit == round.unit => {
                    parts.push((colour(i), value * scale))
                }
                Some((value, _)) => {
                    let value = value.map_or("unknown".into(), four_digits);
                    notes.push(format!("Not drawn: {name} at {} is {value}.", parameters(round, &[])));
                }
                None => (),
            }
        }
        bars.push(Bar { label: parameters(round, &[]), ..Bar::default() });
        let mut push = |row: &Row, label: &str, parts: Vec<(Colour, f64)>| {
            let Some(value) = row.median.filter(|_| row.unit == round.unit) else { return };
            let parts = if parts.is_empty() { vec![(INK, value * scale)] } else { parts };
            let mut value = format!("{} {unit}", four_digits(value * scale));
            if row.throttled.as_ref().is_some_and(|list| !list.is_empty()) {
                value += ", throttled";
            }
            bars.push(Bar { label: label.into(), parts, value });
        };
        push(round, "round", parts);
        if let Some(row) = alone("round with host") {
            push(row, "with host", vec![]);
        }
        if let Some(row) = alone("plain step") {
            push(row, "plain step", vec![]);
        }
    }
    let svg = plot::bars(&Axis(&what, Scale::Linear), &bars, None)?;
    let (title, legend) = ("Where a round goes".into(), boxes(&PARTS));
    Ok(svg.map(|svg| Figure { title, svg, legend, notes }))
}

/// A figure for each context. With a round's record come the floors of the same models, if the page has any.
fn tokens_by_batch(record: &Record, all: &[&Record]) -> Result<Vec<Figure>> {
    let names = ["plain decoding", "DFlash, synthetic acceptance"];
    let floors = all.iter().copied().filter(|other| {
        record.command == "round" && other.command == "floor" && other.model.target == record.model.target
    });
    let rows: Vec<&Row> = [record]
        .into_iter()
        .chain(floors)
        .flat_map(|record| &record.rows)
        .filter(|row| names.contains(&row.name.as_str()) && row.unit == "tok/s")
        .collect();
    // A block and a tree are both the rows that a verification has.
    let key = |row: &Row| {
        let width = parameter(row, "block").or(parameter(row, "tree"));
        let length = parameter(row, "acceptance").map(|n| format!(" of {}", four_digits(n)));
        let width = width.filter(|_| row.name != names[0]).map(|n| format!(", {} rows", four_digits(n)));
        [row.name.clone(), length.unwrap_or_default(), width.unwrap_or_default()].concat()
    };
    let kinds = distinct(rows.iter().map(|row| key(row)));
    let mut figures = vec![];
    let measured = |row: &&&Row| record.command != "round" || row.kind != Kind::Predicted;
    for context in distinct(rows.iter().filter(measured).map(|row| parameter(row, "context"))) {
        let mut series = vec![];
        for (i, kind) in kinds.iter().enumerate() {
            for predicted in [false, true] {
                let alike = rows.iter().filter(|row| {
                    let same = parameter(row, "context") == context && key(row) == *kind;
                    same && (row.kind == Kind::Predicted) == predicted
                });
                let (mark, word) =
                    if predicted { (Mark::Dashed, "predicted") } else { (Mark::Line, "measured") };
                let name = format!("{word}: {kind}");
                let mut points: Vec<_> = alike
                    .filter_map(|row| {
                        let (batch, rate) = (parameter(row, "batch")?, row.median?);
                        let title = format!("{name}, batch {}: {} tok/s", four_digits(batch), four_digits(rate));
                        Some((batch, rate, title))
                    })
                    .collect();
                points.sort_by(|a, b| a.0.total_cmp(&b.0));
                if points.is_empty() {
                    continue;
                }
                series.push(Series { name, colour: colour(i), mark, points });
            }
        }
        let (x, y) = (Axis("batch, sequences", Scale::Whole), Axis("tok/s", Scale::Linear));
        if let Some(svg) = plot::lines(&x, &y, &series)? {
            let at = context.map_or(String::new(), |n| format!(" at context {}", four_digits(n)));
            let mut notes = vec![];
            if series.iter().any(|series| series.name.contains("synthetic")) {
                notes.push("Synthetic acceptance: its length is assumed, not measured.".into());
            }
            if series.iter().any(|series| series.mark == Mark::Dashed) {
                notes.push("Predicted: from bytes and operations alone; nothing ran.".into());
            }
            let title = format!("Tokens per second against batch{at}");
            figures.push(Figure { title, svg, legend: keys(&series), notes });
        }
    }
    Ok(figures)
}

// ---- generate ----

fn tokens_by_category(record: &Record) -> Result<Option<Figure>> {
    let rows = || named(record, "tokens per second").filter(|row| row.unit == "tok/s");
    let category = |row: &Row| row.parameters.get("category").map(|name| shown(Some(name)));
    let decodings = distinct(rows().map(|row| parameters(row, &["category"])));
    let mut bars = vec![];
    for name in distinct(rows().map(category)) {
        bars.push(Bar { label: name.clone().unwrap_or("all prompts".into()), ..Bar::default() });
        for row in rows().filter(|row| category(row) == name) {
            let Some(value) = row.median else { continue };
            let label = parameters(row, &["category"]);
            let place = decodings.iter().position(|decoding| *decoding == label).unwrap_or(0);
            let label = label.trim_start_matches("decoding ").to_string();
            bars.push(Bar { label, parts: vec![(colour(place), value)], value: four_digits(value) });
        }
    }
    let svg = plot::bars(&Axis("tok/s of a request, median", Scale::Linear), &bars, None)?;
    let title = "Tokens per second".into();
    Ok(svg.map(|svg| Figure { title, svg, legend: vec![], notes: vec![] }))
}

/// Rows of all prompts together, by one parameter.
fn overall<'a>(record: &'a Record, name: &str, by: &'a str) -> impl Iterator<Item = (f64, &'a Row)> {
    named(record, name)
        .filter(|row| row.parameters.len() == 1)
        .filter_map(move |row| Some((parameter(row, by)?, row)))
}

fn accepted(record: &Record) -> Result<Option<Figure>> {
    let rows = || overall(record, "rounds", "accepted").filter_map(|(at, row)| Some((at, row.median?)));
    let sum: f64 = rows().map(|row| row.1).sum();
    let points = rows().map(|(at, count)| (at, count / sum * 100.0, String::new())).collect();
    let series = [Series { name: String::new(), colour: FIRST, mark: Mark::Columns, points }];
    let (x, y) = (Axis("accepted in a round", Scale::Whole), Axis("% of rounds", Scale::Linear));
    let svg = plot::lines(&x, &y, &series)?;
    let lengths = named(record, "acceptance length").filter(|row| !row.parameters.contains_key("category"));
    let lengths = lengths.filter_map(|row| {
        let of = row.parameters.get("mean").map(|mean| format!(", {}", shown(Some(mean))));
        Some(format!("Acceptance length{}: {}.", of.unwrap_or_default(), four_digits(row.median?)))
    });
    let notes = [format!("{} rounds.", four_digits(sum))].into_iter().chain(lengths).collect();
    let title = "Acceptance".into();
    Ok(svg.map(|svg| Figure { title, svg, legend: vec![], notes }))
}

fn by_position(record: &Record) -> Result<Option<Figure>> {
    let rows = || overall(record, "accepted at position", "position");
    let series = |name: &str, i: usize, mark, value: &dyn Fn(&Row) -> Option<f64>| {
        let points = rows().filter_map(|(at, row)| {
            let percent = value(row)? * 100.0;
            Some((at, percent, format!("position {}: {} %", four_digits(at), four_digits(percent))))
        });
        let mut points: Vec<_> = points.collect();
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Series { name: name.into(), colour: colour(i), mark, points }
    };
    let series = [
        series("of all rounds", 0, Mark::Line, &|row| row.median),
        series("of the rounds that accepted all before it", 1, Mark::Dashed, &|row| number(row, "conditional")),
    ];
    let (x, y) = (Axis("position in the block", Scale::Whole), Axis("% accepted", Scale::Linear));
    let svg = plot::lines(&x, &y, &series)?;
    let title = "Acceptance by position".into();
    Ok(svg.map(|svg| Figure { title, svg, legend: keys(&series), notes: vec![] }))
}
