//! The record of a run: how it is written and read. `benches/schema.json` is its form, which only grows.

use crate::measure::Times;
use dflash::checkpoint::pair::Pair;
use dflash::cli::terminal::counted;
use dflash::engine::stats::SpecRecord;
use dflash::gpu::device::Counts;
use dflash::gpu::ptx;
use dflash::perf::statistics::Summary;
use dflash::text::prompt_files;
use dflash::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;

/// The schema of every record. A field that changes its meaning needs another number.
pub const SCHEMA: &str = "dflash-bench/1";

/// Names of rows in records of earlier versions, and today's names.
const RENAMED: [(&str, &str); 4] = [
    ("plain step", "AR step"),
    ("plain decoding", "autoregressive decoding"),
    ("law", "row_distribution"),
    ("draw", "sample_drafts"),
];

/// Rows without a better direction. Earlier versions wrote a direction for them.
const NEITHER: [&str; 4] = ["rounds", "tokens of prompts", "tokens of answers", "drafts per token"];

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub schema: String,
    /// The subcommand. `floor` is the earlier name of `roofline`.
    pub command: String,
    /// The command line, the subcommand first.
    pub arguments: Vec<String>,
    pub build: Build,
    pub machine: Machine,
    pub model: Model,
    /// Only `generate`: how drafts were made and verified.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drafts: Option<SpecRecord>,
    /// What ran, as far as the parameters of the rows do not say it. Empty in records of earlier versions.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub settings: Map<String, Value>,
    /// The run was interrupted: these are the rows until then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incomplete: bool,
    pub rows: Vec<Row>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Build {
    pub version: String,
    /// The commit of the build, where it is known.
    pub commit: Option<String>,
    /// PTX targets of the kernels.
    pub ptx: Vec<String>,
}

/// The machine of a run. Null is unknown.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Machine {
    /// `cuda`, `softgpu` (counters instead of times) or `cpu`. Null: nothing ran.
    pub device: Option<String>,
    /// Threads of the CPU device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<usize>,
    pub card: Option<String>,
    pub driver: Option<String>,
    /// Nominal bandwidth of the memory.
    pub gigabytes_per_s: Option<f64>,
    /// Nominal rate of dense bf16 products.
    pub tflops: Option<f64>,
    /// From the driver; nominal where nothing ran.
    pub memory_gigabytes: Option<f64>,
    /// Compute capability: `9.0`.
    #[serde(default)]
    pub capability: Option<String>,
    #[serde(default)]
    pub multiprocessors: Option<u32>,
    #[serde(default)]
    pub l2_bytes: Option<u64>,
    /// The PTX target that ran, one of the build's.
    #[serde(default)]
    pub ptx: Option<String>,
    /// The card before and after the run. Null: no instruments.
    #[serde(default)]
    pub before: Option<State>,
    #[serde(default)]
    pub after: Option<State>,
}

impl Machine {
    /// The CPU, called where the measurement runs.
    pub fn cpu() -> Machine {
        Machine {
            device: Some("cpu".into()),
            threads: Some(rayon::current_num_threads()),
            ..Machine::default()
        }
    }

    /// Whether it counts and has no times.
    pub fn counts(&self) -> bool {
        self.device.as_deref() == Some("softgpu")
    }
}

/// Readings of a card's instruments at one moment. Null: the card does not report it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    pub sm_mhz: Option<u32>,
    pub memory_mhz: Option<u32>,
    pub celsius: Option<u32>,
    pub watts: Option<f64>,
    pub limit_watts: Option<f64>,
    /// The reasons for throttling. Idleness and clocks set by the user are not throttling.
    pub throttle: Option<Vec<String>>,
    /// Other processes that compute on the card. In a container this process may be among them, under another
    /// number.
    pub processes: Option<Vec<Process>>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Process {
    pub pid: u32,
    /// Null: the driver does not report it.
    pub bytes: Option<u64>,
}

/// The names of folders or published models.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Model {
    pub target: Option<String>,
    pub drafter: Option<String>,
}

/// The origin of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Exact: bytes, launches, tokens.
    Counted,
    /// Computed from nominal figures. Nothing ran.
    Predicted,
    Measured,
    /// Computed by `compare` from two records.
    Compared,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Better {
    Lower,
    Higher,
    /// The row says what ran, as a histogram does, and not how good it is.
    Neither,
}

/// One value with its samples. Name and parameters together are unique in a record.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    pub name: String,
    /// Numbers and texts: the shape, the batch, the category.
    pub parameters: Map<String, Value>,
    pub kind: Kind,
    pub unit: String,
    pub better: Better,
    /// In the order of measurement, each above 0. Null: nothing was sampled.
    pub samples: Option<Vec<f64>>,
    /// Samples in each round. Null: the samples were not taken in rounds.
    pub rounds: Option<Vec<usize>>,
    /// Indices of the rounds in which the card was throttled; of the samples where there are no rounds. Null:
    /// unknown.
    #[serde(default)]
    pub throttled: Option<Vec<usize>>,
    /// The median of the samples, or the value itself. Null: only one record of `compare` has the row.
    pub median: Option<f64>,
    pub p10: Option<f64>,
    pub p90: Option<f64>,
    /// Further numbers, by name.
    pub numbers: Map<String, Value>,
    /// The result of `compare`.
    pub verdict: Option<String>,
    /// Only `predict`: the term that decides the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bound: Option<String>,
}

/// Whether the file has an object for every object of the record that was read from it. serde also makes an
/// object of a list.
fn has_objects_of(file: &Value, read: &Value) -> bool {
    match (file, read) {
        (Value::Object(file), Value::Object(read)) => {
            read.iter().all(|(name, value)| file.get(name).is_none_or(|found| has_objects_of(found, value)))
        }
        (Value::Array(file), Value::Array(read)) => {
            file.iter().zip(read).all(|(found, value)| has_objects_of(found, value))
        }
        (_, read) => !read.is_object(),
    }
}

impl Record {
    /// A record without rows, of this build and this command line.
    pub fn new(command: &str, machine: Machine, model: Model) -> Record {
        Record {
            schema: SCHEMA.into(),
            command: command.into(),
            arguments: std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect(),
            build: Build {
                version: env!("CARGO_PKG_VERSION").into(),
                commit: dflash::cli::version::COMMIT.map(String::from),
                ptx: ptx::targets().iter().map(|target| target.to_string()).collect(),
            },
            machine,
            model,
            drafts: None,
            settings: Map::new(),
            incomplete: false,
            rows: vec![],
        }
    }

    /// Reads and checks a record. Names of earlier versions become today's.
    ///
    /// # Errors
    /// [`Error::Usage`] that names the file and its fault.
    pub fn read(path: &Path) -> Result<Record> {
        let wrong = |what: String| Error::Usage(format!("{} {what}", path.display()));
        let text = prompt_files::read(path)?;
        let value: Value =
            serde_json::from_str(&text).map_err(|e| wrong(format!("is not a record in JSON: {e}")))?;
        match &value["schema"] {
            Value::String(schema) if schema == SCHEMA => (),
            found => return Err(wrong(format!("has the schema {found}, expected {SCHEMA:?}"))),
        }
        let mut record =
            Record::deserialize(&value).map_err(|e| wrong(format!("is not a whole record: {e}")))?;
        if !has_objects_of(&value, &json!(record)) {
            return Err(wrong("is not a whole record: a list stands in the place of an object".into()));
        }
        record.modernise();
        let mut seen = HashMap::new();
        for (i, row) in record.rows.iter().enumerate() {
            row.check().map_err(|what| wrong(format!("is damaged: row {} ({}) {what}", i + 1, row.name)))?;
            let (name, i) = (&row.name, i + 1);
            let first = *seen.entry((name, &row.parameters)).or_insert(i);
            if first < i {
                let what = format!("is damaged: rows {first} and {i} are both {name} with equal parameters");
                return Err(wrong(what));
            }
        }
        Ok(record)
    }

    fn modernise(&mut self) {
        if self.command == "floor" {
            self.command = "roofline".into();
        }
        for row in &mut self.rows {
            if let Some((_, name)) = RENAMED.iter().find(|(old, _)| *old == row.name) {
                row.name = name.to_string();
            }
            if NEITHER.contains(&row.name.as_str()) {
                row.better = Better::Neither;
            }
        }
    }
}

impl Model {
    pub fn of(pair: &Pair) -> Model {
        Model { target: Some(pair.target.folder.name()), drafter: pair.draft_name() }
    }
}

impl Machine {
    /// The state of the card before and after the run, in a line. None without instruments.
    pub fn describe(&self) -> Option<String> {
        let states = [("before", &self.before), ("after", &self.after)];
        let lines = states.into_iter().filter_map(|(when, state)| {
            let State { sm_mhz, memory_mhz, celsius, watts, limit_watts, throttle, processes } =
                state.as_ref()?;
            let parts = [
                sm_mhz.map(|mhz| format!("SM {mhz} MHz")),
                memory_mhz.map(|mhz| format!("memory {mhz} MHz")),
                celsius.map(|degrees| format!("{degrees} °C")),
                watts.map(|watts| match limit_watts {
                    Some(limit) => format!("{watts:.0} of {limit:.0} W"),
                    None => format!("{watts:.0} W"),
                }),
                throttle.as_ref().map(|reasons| match reasons.is_empty() {
                    true => "not throttled".into(),
                    false => format!("throttled by {}", reasons.join(" and ")),
                }),
                processes.as_ref().map(|others| match others.len() {
                    0 => "no other process".into(),
                    1 => "1 other process".into(),
                    many => format!("{many} other processes"),
                }),
            ];
            let parts: Vec<String> = parts.into_iter().flatten().collect();
            (!parts.is_empty()).then(|| format!("{when}: {}", parts.join(", ")))
        });
        let lines: Vec<String> = lines.collect();
        (!lines.is_empty()).then(|| lines.join("; "))
    }
}

impl Row {
    /// A value without samples.
    pub fn value(
        name: &str,
        parameters: Value,
        kind: Kind,
        value: f64,
        unit: &str,
        better: Better,
        numbers: Value,
    ) -> Row {
        let map = |value| if let Value::Object(map) = value { map } else { Map::new() };
        Row {
            name: name.into(),
            parameters: map(parameters),
            kind,
            unit: unit.into(),
            better,
            samples: None,
            rounds: None,
            throttled: None,
            median: Some(value),
            p10: None,
            p90: None,
            numbers: map(numbers),
            verdict: None,
            bound: None,
        }
    }

    /// A measured row: `times` in `unit`. A millisecond is `scale` of them.
    pub fn times(
        name: &str,
        parameters: Value,
        times: &Times,
        (unit, scale): (&str, f64),
        numbers: Value,
    ) -> Row {
        let samples: Vec<f64> = times.samples.iter().map(|ms| ms * scale).collect();
        let rounds = Some(times.rounds.clone());
        let row = Row::samples(name, parameters, samples, rounds, unit, Better::Lower, numbers);
        Row { throttled: times.throttled.clone(), ..row }
    }

    /// A measured row: at least one sample, each above 0.
    pub fn samples(
        name: &str,
        parameters: Value,
        samples: Vec<f64>,
        rounds: Option<Vec<usize>>,
        unit: &str,
        better: Better,
        numbers: Value,
    ) -> Row {
        let summary = Summary::of(&samples);
        let row = Row::value(name, parameters, Kind::Measured, 0.0, unit, better, numbers);
        Row {
            median: summary.map(|s| s.median),
            p10: summary.map(|s| s.p10),
            p90: summary.map(|s| s.p90),
            samples: Some(samples),
            rounds,
            ..row
        }
    }

    /// A row of counters. Its value is all bytes that crossed the memory bus.
    pub fn counts(name: &str, parameters: Value, counts: &Counts) -> Row {
        let Counts { launches, blocks, streamed, read, written, mma, conflicts, .. } = *counts;
        let numbers = serde_json::json!({
            "launches": launches, "blocks": blocks, "streamed": streamed, "read": read, "written": written,
            "mma": mma, "conflicts": conflicts,
        });
        let bytes = (streamed + read + written) as f64;
        Row::value(name, parameters, Kind::Counted, bytes, "bytes", Better::Lower, numbers)
    }

    /// Whether `other` has the same name and parameters.
    pub fn matches(&self, other: &Row) -> bool {
        self.name == other.name && self.parameters == other.parameters
    }

    /// The samples by round; each sample alone where there are no rounds. None without samples.
    pub fn groups(&self) -> Option<Vec<&[f64]>> {
        let samples = self.samples.as_deref()?;
        let Some(rounds) = &self.rounds else { return Some(samples.chunks(1).collect()) };
        let mut rest = samples;
        let mut next = |count: &usize| {
            let (round, after) = rest.split_at(*count);
            rest = after;
            round
        };
        Some(rounds.iter().map(&mut next).collect())
    }

    /// `2 of 5 rounds`: how many were throttled, if any.
    pub fn throttling(&self) -> String {
        let slow = self.throttled.as_ref().map_or(0, Vec::len);
        let samples = self.samples.as_ref().map_or(0, Vec::len);
        match &self.rounds {
            _ if slow == 0 => String::new(),
            Some(rounds) => format!("{slow} of {}", counted(rounds.len(), "round")),
            None => format!("{slow} of {}", counted(samples, "sample")),
        }
    }

    fn check(&self) -> std::result::Result<(), String> {
        let samples = self.samples.as_deref().unwrap_or_default();
        if let Some(bad) = samples.iter().find(|x| !(x.is_finite() && **x > 0.0)) {
            return Err(format!("has the sample {bad}, expected numbers above 0"));
        }
        if let Some(rounds) = &self.rounds {
            let sum = rounds.iter().try_fold(0usize, |sum, n| sum.checked_add(*n));
            if rounds.contains(&0) || sum != Some(samples.len()) {
                return Err(format!("has rounds of {rounds:?} samples, and {} samples", samples.len()));
            }
        }
        let places = self.rounds.as_ref().map_or(samples.len(), Vec::len);
        if let Some(place) = self.throttled.iter().flatten().find(|place| **place >= places) {
            return Err(format!("has the throttled place {place}, beyond its samples"));
        }
        if let Some((name, value)) = self.parameters.iter().find(|(_, v)| !v.is_number() && !v.is_string()) {
            return Err(format!("has {value} as {name}, expected a number or a text"));
        }
        if let Some((name, value)) = self.numbers.iter().find(|(_, v)| !v.is_number() && !v.is_null()) {
            return Err(format!("has {value} as {name}, expected a number or null"));
        }
        let close = |a: f64, b: f64| (a - b).abs() <= 1e-9 * b.abs();
        match (Summary::of(samples), self.median) {
            (Some(s), Some(median)) if !close(median, s.median) => {
                Err(format!("has the median {median}, and its samples have {}", s.median))
            }
            (Some(_), None) => Err("has samples and no median".into()),
            (None, _) if self.samples.is_some() => Err("has an empty list of samples, expected null".into()),
            _ => Ok(()),
        }
    }
}
