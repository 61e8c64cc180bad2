//! `--report`: one page of records, without network and scripts. `report.html` is its template; `report.css`
//! has a light and a dark scheme.

use crate::figures::{self, Figure};
use crate::format::four_digits;
use crate::record::{Kind, Machine, Record, Row, State};
use crate::show::{self, Column};
use dflash::{Error, Result};
use minijinja::value::Serde;
use minijinja::{Environment, context};
use serde::Serialize;
use std::fs::{self, OpenOptions};
use std::path::Path;

/// One record on the page.
#[derive(Serialize)]
struct Section {
    title: String,
    /// Notes on the kind of its values.
    labels: Vec<String>,
    /// The most important rows.
    headlines: Vec<(String, String)>,
    facts: Vec<(&'static str, String)>,
    /// Readings of the card before and after the run.
    states: Vec<(&'static str, [String; 2])>,
    figures: Vec<Figure>,
    columns: Vec<Column>,
    rows: usize,
}

/// Checks that a page can be written to `path`, before anything runs, so that no measurement is lost.
///
/// # Errors
/// [`Error::Usage`] where it cannot, or where the name is not that of a page: it may be a record by mistake.
pub fn check(path: &Path) -> Result<()> {
    let wrong = |what: String| Err(Error::Usage(format!("--report is {}, {what}", path.display())));
    if path.extension().is_none_or(|end| end != "html" && end != "htm") {
        return wrong("expected a name that ends in .html".into());
    }
    if path.is_dir() {
        return wrong("which is a folder, expected a file".into());
    }
    let missing = !path.exists();
    match OpenOptions::new().write(true).create(true).truncate(false).open(path) {
        // A run that fails leaves no empty page.
        Ok(_) if missing => fs::remove_file(path).map_err(|e| failed(path, &e)),
        Ok(_) => Ok(()),
        Err(e) => wrong(format!("which cannot be written: {e}")),
    }
}

fn failed(path: &Path, what: &dyn std::fmt::Display) -> Error {
    Error::Internal(format!("{} cannot be written: {what}", path.display()))
}

/// Writes the page of these records, each with its title.
///
/// # Errors
/// [`Error::Internal`] where the file cannot be written any more.
pub fn write(path: &Path, records: &[(String, Record)]) -> Result<()> {
    fs::write(path, page(records)?).map_err(|e| failed(path, &e))
}

fn page(records: &[(String, Record)]) -> Result<String> {
    let all: Vec<&Record> = records.iter().map(|record| &record.1).collect();
    let sections = records.iter().map(|(title, record)| section(title, record, &all));
    let sections = sections.collect::<Result<Vec<Section>>>()?;
    let mut environment = Environment::new();
    // minijinja escapes all values because the name ends in .html.
    let filled = environment.add_template("report.html", include_str!("report.html")).and_then(|()| {
        let style = include_str!("report.css");
        environment.get_template("report.html")?.render(context! { sections => Serde(&sections), style })
    });
    let html = filled.map_err(|e| Error::Internal(format!("the report cannot be filled in: {e:#}")))?;
    // Names may hold control characters, which a page must not.
    Ok(html.replace(|c: char| c.is_control() && c != '\n', "\u{fffd}"))
}

fn section(title: &str, record: &Record, all: &[&Record]) -> Result<Section> {
    Ok(Section {
        title: title.into(),
        labels: labels(record),
        headlines: record.rows.iter().filter_map(headline).collect(),
        facts: facts(record),
        states: states(&record.machine),
        figures: figures::of(record, all)?,
        columns: show::columns(&record.rows),
        rows: record.rows.len(),
    })
}

fn labels(record: &Record) -> Vec<String> {
    let mut labels: Vec<String> = vec![];
    let any = |is: &dyn Fn(&Row) -> bool| record.rows.iter().any(is);
    if any(&|row| row.kind == Kind::Predicted) {
        labels.push("predicted: from bytes and operations, nothing ran".into());
    }
    if record.machine.counts() {
        labels.push("counted by the software GPU: no times".into());
    }
    if any(&|row| row.name.contains("synthetic")) {
        labels.push("synthetic acceptance: assumed, not measured".into());
    }
    let throttled = record.rows.iter().filter(|row| !figures::throttled(row).is_empty());
    match throttled.count() {
        0 => (),
        n => labels.push(format!("throttled: {n} of {} rows", record.rows.len())),
    }
    labels
}

fn headline(row: &Row) -> Option<(String, String)> {
    let names =
        ["read ceiling", "identical", "speed-up", "acceptance length", "acceptance length to break even"];
    if !names.contains(&row.name.as_str()) || row.parameters.contains_key("category") || row.unit == "bytes" {
        return None;
    }
    let mut value = match row.unit.as_str() {
        "share" => format!("{} %", four_digits(row.median? * 100.0)),
        unit => format!("{} {unit}", four_digits(row.median?)),
    };
    let end = |name: &str| row.numbers.get(name)?.as_f64();
    if let Some((low, high)) = end("low").zip(end("high")) {
        value += &format!(" ({} to {} at 99 %)", four_digits(low), four_digits(high));
    }
    if row.kind == Kind::Predicted {
        value += ", predicted";
    }
    let name = [row.name.clone(), figures::parameters(row, &[])].join(" ");
    Some((name.trim_end().into(), value))
}

fn facts(record: &Record) -> Vec<(&'static str, String)> {
    let Record { machine, build, model, .. } = record;
    let with = |value: Option<f64>, unit: &str| value.map(|x| format!("{} {unit}", four_digits(x)));
    let words = |words: &[String]| Some(words.join(" ")).filter(|text| !text.is_empty());
    let commit = build.commit.clone().unwrap_or("unknown".into());
    let facts = [
        ("Command", Some(format!("dflash-bench {}", record.arguments.join(" ")))),
        ("Target", model.target.clone()),
        ("Drafter", model.drafter.clone()),
        ("Card", machine.card.clone()),
        ("Device", machine.device.clone()),
        ("Threads", machine.threads.map(|n| n.to_string())),
        ("Driver", machine.driver.clone()),
        ("Memory bandwidth, nominal", with(machine.gigabytes_per_s, "GB/s")),
        ("Tensor cores, nominal", with(machine.tflops, "TFLOP/s")),
        ("Memory", with(machine.memory_gigabytes, "GB")),
        ("Compute capability", machine.capability.clone()),
        ("Multiprocessors", machine.multiprocessors.map(|n| n.to_string())),
        ("L2", with(machine.l2_bytes.map(|n| n as f64 / 1e6), "MB")),
        ("PTX target that ran", machine.ptx.clone()),
        ("Build", Some(format!("dflash {}, commit {commit}", build.version))),
        ("PTX targets of the build", words(&build.ptx)),
    ];
    facts.into_iter().filter_map(|(name, value)| Some((name, value?))).collect()
}

/// Readings of the card's instruments before and after the run.
fn states(machine: &Machine) -> Vec<(&'static str, [String; 2])> {
    let both = [&machine.before, &machine.after];
    if both.iter().all(|state| state.is_none()) {
        return vec![];
    }
    let line = |name, say: &dyn Fn(&State) -> Option<String>| {
        let text = |state: &Option<State>| state.as_ref().and_then(say).unwrap_or("unknown".into());
        (name, both.map(text))
    };
    let unit = |value: Option<u32>, unit: &str| value.map(|x| format!("{x} {unit}"));
    let list = |all: Vec<String>| if all.is_empty() { "none".to_string() } else { all.join(", ") };
    vec![
        line("SM clock", &|state| unit(state.sm_mhz, "MHz")),
        line("Memory clock", &|state| unit(state.memory_mhz, "MHz")),
        line("Temperature", &|state| unit(state.celsius, "°C")),
        line("Power", &|state| state.watts.map(|watts| format!("{} W", four_digits(watts)))),
        line("Power limit", &|state| state.limit_watts.map(|watts| format!("{} W", four_digits(watts)))),
        line("Clocks held back by", &|state| state.throttle.clone().map(list)),
        line("Other processes", &|state| {
            let process = |p: &crate::record::Process| match p.bytes {
                Some(bytes) => format!("{} ({} GB)", p.pid, four_digits(bytes as f64 / 1e9)),
                None => p.pid.to_string(),
            };
            state.processes.as_ref().map(|all| list(all.iter().map(process).collect()))
        }),
    ]
}
