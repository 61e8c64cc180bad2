//! The figures of a report, from the rows of its records. A figure without rows is left out.

use crate::format::{self, distinct, four_digits, short, shown};
use crate::plot::{self, Axis, Bar, Colour, FIRST, INK, KINDS, Mark, REFERENCE, Scale, Series};
use crate::record::{Kind, Record, Row};
use dflash::Result;
use dflash::cli::terminal::counted;
use dflash::perf::roofline::Card;
use serde::Serialize;

/// A drawing and its caption.
#[derive(Debug, Serialize)]
pub struct Figure {
    pub title: String,
    /// SVG. Texts are escaped.
    pub svg: String,
    pub legend: Vec<Key>,
    pub notes: Vec<String>,
}

/// An entry of a legend.
#[derive(Debug, Serialize)]
pub struct Key {
    class: &'static str,
    colour: Colour,
    name: String,
}

/// The parts of a round, in order.
const PARTS: [&str; 6] = ["begin", "inject", "draft", "verify", "accept", "gaps"];

/// The figures of `record`. `all`: all records of the page; its rooflines are drawn beside measured rounds.
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
        "round" | "roofline" => {
            for context in distinct(record.rows.iter().filter_map(|row| parameter(row, "context"))) {
                figures.extend(timeline(record, context)?);
                figures.extend(tokens_by_batch(record, all, context)?);
            }
        }
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

/// `batch 1, context 1024`: all parameters except `but`.
pub fn parameters(row: &Row, but: &[&str]) -> String {
    let others = row.parameters.iter().filter(|(name, _)| !but.contains(&name.as_str()));
    let text = |name: &String| format!("{name} {}", format::parameter(&row.parameters, name));
    let texts: Vec<String> = others.map(|(name, _)| text(name)).collect();
    texts.join(", ")
}

/// The note behind a value with throttled samples.
pub fn throttled(row: &Row) -> &'static str {
    if row.throttled.as_ref().is_some_and(|list| !list.is_empty()) { ", throttled" } else { "" }
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

/// A unit that fits the largest of `all`, and the factor from bytes to it.
fn bytes(all: impl Iterator<Item = f64>) -> (f64, &'static str) {
    match all.fold(0.0, f64::max) {
        largest if largest < 1e6 => (1e-3, "kB"),
        largest if largest < 1e9 => (1e-6, "MB"),
        _ => (1e-9, "GB"),
    }
}

// ---- kernels ----

const CEILING: &str = "read ceiling";

const FAMILIES: [&str; 4] = ["target", "drafter", "attention", "other"];

fn family(row: &Row) -> usize {
    match row.name.as_str() {
        name if name.contains("attention") => 2,
        name if name.starts_with("target") => 0,
        name if name.starts_with("drafter") => 1,
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
    let ceiling = named(record, CEILING).find_map(|row| row.median.filter(|_| row.unit == "GB/s"));
    let machine = &record.machine;
    let card = machine.card.as_deref().and_then(|name| Card::named(name.trim_start_matches("NVIDIA ")));
    let peak = machine.tflops.or(card.map(|card| card.tflops)).map(|tflops| tflops * 1e3);
    let mut rule = |name: String, mark, points: Vec<(f64, f64)>| {
        let points = points.into_iter().map(|(x, y)| (x, y, String::new())).collect();
        series.push(Series { name, colour: INK, mark, points });
    };
    // Both lines end where they meet, which is beyond the intensity of decode kernels.
    let meet = ceiling.zip(peak).map(|(ceiling, peak)| peak / ceiling);
    let end = 10f64.powf((meet.unwrap_or(high).max(high) * 2.0).log10().ceil());
    if let Some(ceiling) = ceiling {
        let to = meet.unwrap_or(end).max(low);
        let name = format!("read ceiling, measured: {} GB/s", four_digits(ceiling));
        rule(name, Mark::Rule, vec![(low, low * ceiling), (to, to * ceiling)]);
    }
    if let Some(peak) = peak {
        let name = format!("tensor cores, nominal: {} TFLOP/s", four_digits(peak / 1e3));
        rule(name, Mark::DashedRule, vec![(meet.unwrap_or(low).min(end), peak), (end, peak)]);
    }
    if low > high {
        return Ok(None);
    }
    let x = Axis("operations per byte, FLOP", Scale::Log);
    let svg = plot::lines(&x, &Axis("GFLOP/s", Scale::Log), &series)?;
    let (title, legend) = ("Roofline".into(), keys(&series));
    Ok(svg.map(|svg| Figure { title, svg, legend, notes: vec!["Point at a dot to see its kernel.".into()] }))
}

/// Fractions of the read ceiling, or counters: one figure for each number of rows.
fn kernels(record: &Record) -> Result<Vec<Figure>> {
    let moved = ["streamed", "read", "written"];
    let mut figures = vec![];
    for rows in distinct(record.rows.iter().map(|row| parameter(row, "rows"))) {
        let alike = || record.rows.iter().filter(|row| parameter(row, "rows") == rows && row.name != CEILING);
        let bar = |row: &Row, parts, value: String| {
            let value = format!("{value}{}", throttled(row));
            Bar { label: row.name.clone(), parts, value }
        };
        let shares = alike().filter_map(|row| {
            let percent = number(row, "share of ceiling")? * 100.0;
            Some((row, bar(row, vec![(colour(family(row)), percent)], format!("{percent:.0} %"))))
        });
        let x = Axis("% of the measured read ceiling", Scale::Linear);
        let title = "Share of the read ceiling";
        figures.extend(lanes(title, &x, shares.collect(), Some(100.0), boxes(&FAMILIES))?);

        let counted = alike().filter(|row| row.kind == Kind::Counted);
        let (scale, unit) = bytes(counted.clone().filter_map(|row| row.median));
        let counted = counted.filter_map(|row| {
            let part = |(i, name): (usize, &&str)| Some((colour(i), number(row, name)? * scale));
            let parts = moved.iter().enumerate().map(part).collect::<Option<Vec<_>>>()?;
            Some((row, bar(row, parts, format!("{} {unit}", short(row.median? * scale)))))
        });
        let x = format!("{unit} that cross the bus, counted");
        let title = "Bytes by the software GPU's counters";
        figures.extend(lanes(title, &Axis(&x, Scale::Linear), counted.collect(), None, boxes(&moved))?);
    }
    Ok(figures)
}

/// Bars of rows, labelled with their parameters. Parameters that are the same in all rows are in the title.
fn lanes(
    title: &str,
    x: &Axis,
    rows: Vec<(&Row, Bar)>,
    mark: Option<f64>,
    legend: Vec<Key>,
) -> Result<Option<Figure>> {
    let mut pairs = distinct(rows.iter().flat_map(|(row, _)| &row.parameters));
    let names: Vec<&String> = pairs.iter().map(|pair| pair.0).collect();
    pairs.retain(|pair| names.iter().filter(|name| **name == pair.0).count() == 1);
    let shared: Vec<&str> = pairs.iter().map(|pair| pair.0.as_str()).collect();
    let label = |(row, bar): &(&Row, Bar)| {
        let label = format!("{} {}", bar.label, parameters(row, &shared)).trim_end().to_string();
        Bar { label, ..bar.clone() }
    };
    let bars: Vec<Bar> = rows.iter().map(label).collect();
    let pairs = pairs.iter().map(|(name, value)| format!(", {name} {}", shown(Some(value))));
    let title = format!("{title}{}", pairs.collect::<String>());
    Ok(plot::bars(x, &bars, mark)?.map(|svg| Figure { title, svg, legend, notes: vec![] }))
}

// ---- round ----

/// The parts of rounds, in time or in bytes. Predicted rounds have no such parts.
fn timeline(record: &Record, context: f64) -> Result<Option<Figure>> {
    let here = |row: &&Row| parameter(row, "context") == Some(context) && row.kind != Kind::Predicted;
    let Some(first) = named(record, "round").find(here) else { return Ok(None) };
    let (scale, unit, what) = match first.unit.as_str() {
        "bytes" => {
            let (scale, unit) = bytes(named(record, "round").filter(here).filter_map(|row| row.median));
            (scale, unit, format!("{unit} that cross the bus, counted"))
        }
        unit => (1.0, unit, format!("{unit}, measured")),
    };
    let (mut bars, mut notes) = (vec![], vec![]);
    for round in named(record, "round").filter(here).filter(|round| round.unit == first.unit) {
        let at = parameters(round, &["context"]);
        // An AR step has no block.
        let alike = |row: &&Row| {
            let batch = row.name == "AR step" && parameter(row, "batch") == parameter(round, "batch");
            row.unit == round.unit && here(row) && (row.parameters == round.parameters || batch)
        };
        let mut parts = vec![];
        for (i, name) in PARTS.into_iter().enumerate() {
            match named(record, name).find(alike).and_then(|row| row.median) {
                Some(value) if value > 0.0 => parts.push((colour(i), value * scale)),
                Some(value) => {
                    notes.push(format!("Not drawn: {name} at {at} is {} {}.", four_digits(value), round.unit))
                }
                None => (),
            }
        }
        bars.push(Bar { label: at, ..Bar::default() });
        let mut push = |label: &str, row: &Row, parts: Vec<(Colour, f64)>| {
            let Some(value) = row.median else { return };
            let parts = if parts.is_empty() { vec![(REFERENCE, value * scale)] } else { parts };
            let value = format!("{} {unit}{}", four_digits(value * scale), throttled(row));
            bars.push(Bar { label: label.into(), parts, value });
        };
        push("round", round, parts);
        for (label, name) in [("with host", "round with host"), ("AR step", "AR step")] {
            if let Some(row) = named(record, name).find(alike) {
                push(label, row, vec![]);
            }
        }
    }
    let svg = plot::bars(&Axis(&what, Scale::Linear), &bars, None)?;
    let title = format!("Where a round goes at context {}", four_digits(context));
    Ok(svg.map(|svg| Figure { title, svg, legend: boxes(&PARTS), notes }))
}

/// Rows of tokens per second, or of bytes per token, at any batch, each with a description.
fn rates(record: &Record, context: f64) -> Vec<(String, &Row)> {
    let names = ["autoregressive decoding", "DFlash, synthetic acceptance"];
    let here = |row: &&Row| {
        let known = ["tok/s", "bytes/tok"].contains(&&*row.unit) && names.contains(&&*row.name);
        known && parameter(row, "context") == Some(context)
    };
    let what = |row: &Row| {
        let length = parameter(row, "acceptance").map(|n| format!(" of {}", short(n)));
        // A block and a tree are both the rows of a verification.
        let width = parameter(row, "block").or(parameter(row, "tree")).filter(|_| row.name != names[0]);
        let width = width.map(|n| format!(", {} rows", four_digits(n)));
        [row.name.clone(), length.unwrap_or_default(), width.unwrap_or_default()].concat()
    };
    record.rows.iter().filter(here).map(|row| (what(row), row)).collect()
}

/// Tokens per second by batch. Beside measured rounds: the page's rooflines of the same models.
fn tokens_by_batch(record: &Record, all: &[&Record], context: f64) -> Result<Option<Figure>> {
    let own = rates(record, context);
    let Some(unit) = own.first().map(|row| row.1.unit.as_str()) else { return Ok(None) };
    let mut sources = vec![(record, own.clone())];
    if record.command == "round" {
        let rooflines =
            all.iter().filter(|o| o.command == "roofline" && o.model.target == record.model.target);
        sources.extend(rooflines.map(|one| (*one, rates(one, context))));
    }
    let (scale, shown, what) = match unit {
        "tok/s" => (1.0, "tok/s", "Tokens per second"),
        _ => (1e-6, "MB/tok", "Bytes per token"),
    };
    let mut series = vec![];
    for (i, kind) in distinct(own.iter().map(|row| &row.0)).into_iter().enumerate() {
        for (source, rows) in &sources {
            let alike = |row: &&(String, &Row)| row.0 == *kind && row.1.unit == unit;
            let rows = || rows.iter().filter(alike).map(|row| row.1);
            let Some(first) = rows().next() else { continue };
            let card = source.machine.card.as_deref().unwrap_or("a card");
            let (mark, word) = match first.kind {
                Kind::Predicted => (Mark::Dashed, format!("predicted for {card}")),
                Kind::Counted => (Mark::Line, "counted".into()),
                _ => (Mark::Line, "measured".into()),
            };
            let name = format!("{word}: {kind}");
            let point = |row: &Row| {
                let (batch, rate) = (parameter(row, "batch")?, row.median? * scale);
                let title = format!("{name}, batch {}: {} {shown}", four_digits(batch), four_digits(rate));
                Some((batch, rate, title))
            };
            let mut points: Vec<_> = rows().filter_map(point).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            series.push(Series { name, colour: colour(i), mark, points });
        }
    }
    let (x, y) = (Axis("batch, sequences", Scale::Whole), Axis(shown, Scale::Linear));
    let svg = plot::lines(&x, &y, &series)?;
    let mut notes = vec![];
    if series.iter().any(|series| series.name.contains("synthetic")) {
        notes.push("Synthetic acceptance: its length is assumed, not measured.".into());
    }
    if series.iter().any(|series| series.mark == Mark::Dashed) {
        notes.push("Predicted: from bytes and operations alone; nothing ran.".into());
    }
    let title = format!("{what} against batch at context {}", four_digits(context));
    Ok(svg.map(|svg| Figure { title, svg, legend: keys(&series), notes }))
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

/// Rows over all prompts, by one parameter.
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
    let (x, y) = (Axis("tokens of a round", Scale::Whole), Axis("% of rounds", Scale::Linear));
    let svg = plot::lines(&x, &y, &series)?;
    let lengths = named(record, "acceptance length").filter(|row| !row.parameters.contains_key("category"));
    let lengths = lengths.filter_map(|row| {
        let of = row.parameters.get("mean").map(|mean| format!(", {}", shown(Some(mean))));
        Some(format!("Acceptance length{}: {}.", of.unwrap_or_default(), four_digits(row.median?)))
    });
    let notes = [format!("{}.", counted(sum as usize, "round"))].into_iter().chain(lengths).collect();
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
        series("of the rounds that accepted all before it", 1, Mark::Dashed, &|row| {
            number(row, "conditional")
        }),
    ];
    let (x, y) = (Axis("position in the block", Scale::Whole), Axis("% accepted", Scale::Linear));
    let svg = plot::lines(&x, &y, &series)?;
    let title = "Acceptance by position".into();
    Ok(svg.map(|svg| Figure { title, svg, legend: keys(&series), notes: vec![] }))
}
