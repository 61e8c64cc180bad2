//! `compare`: whether rows of one record are better than those of another, beyond random variation.

use crate::args;
use crate::format::four_digits;
use crate::record::{Better, Kind, Record, Row};
use dflash::perf::statistics::{self, Interval, MIN_SAMPLES, Pairing, Verdict};
use dflash::{Error, Result};
use serde_json::{Map, Value, json};

const SLOWER_EXIT: u8 = 7;

/// A title and the record.
///
/// # Errors
/// [`Error::Usage`] for files that are no records, or records that cannot be compared.
pub fn run(flags: &args::Compare) -> Result<(String, Record)> {
    let (before, after) = (Record::read(&flags.before)?, Record::read(&flags.after)?);
    if !flags.force {
        alike(flags, &before, &after)?;
    }
    let mut record = Record::new("compare", after.machine, after.model);
    for old in &before.rows {
        record.rows.push(match after.rows.iter().find(|new| new.is(old)) {
            Some(new) => both(flags, old, new)?,
            None => one(old, "ONLY IN A"),
        });
    }
    if record.rows.iter().all(|row| row.verdict.as_deref() == Some("ONLY IN A")) {
        let (a, b) = (flags.before.display(), flags.after.display());
        return Err(Error::Usage(format!(
            "{a} and {b} have no row in common: expected the same measurements"
        )));
    }
    let new = after.rows.iter().filter(|new| before.rows.iter().all(|old| !old.is(new)));
    record.rows.extend(new.map(|new| one(new, "ONLY IN B")));
    let count =
        |verdict: &str| record.rows.iter().filter(|row| row.verdict.as_deref() == Some(verdict)).count();
    let verdicts = ["FASTER", "SLOWER", "SAME", "UNCLEAR", "ONLY IN A", "ONLY IN B"];
    let counts = verdicts.map(|verdict| (count(verdict), verdict));
    let counts = counts.iter().filter(|c| c.0 > 0).map(|(n, verdict)| format!("{n} {verdict}"));
    let title = format!(
        "B {} against A {}, threshold {}%: {}",
        flags.after.display(),
        flags.before.display(),
        four_digits(flags.threshold * 100.0),
        counts.collect::<Vec<_>>().join(", ")
    );
    Ok((title, record))
}

/// 7 if a row is SLOWER, else 0.
pub fn exit_code(record: &Record) -> u8 {
    let slower = |row: &Row| row.verdict.as_deref() == Some(Verdict::Slower.name());
    if record.rows.iter().any(slower) { SLOWER_EXIT } else { 0 }
}

/// Refuses records of different cards or models.
fn alike(flags: &args::Compare, before: &Record, after: &Record) -> Result<()> {
    let [a, b] = [before, after].map(|record| {
        [
            ("card", &record.machine.card),
            ("device", &record.machine.device),
            ("target", &record.model.target),
            ("drafter", &record.model.drafter),
        ]
    });
    let named = |name: &Option<String>| name.as_ref().map_or("unknown".into(), |name| format!("{name:?}"));
    match a.iter().zip(&b).find(|(a, b)| a.1 != b.1) {
        Some(((what, old), (_, new))) => Err(Error::Usage(format!(
            "the {what} of {} is {}, that of {} is {}: expected the same, or --force",
            flags.before.display(),
            named(old),
            flags.after.display(),
            named(new)
        ))),
        None => Ok(()),
    }
}

fn both(flags: &args::Compare, old: &Row, new: &Row) -> Result<Row> {
    if (&old.unit, old.better) != (&new.unit, new.better) {
        let word = |row: &Row| {
            format!(
                "{}, {}",
                row.unit,
                if row.better == Better::Lower { "lower is better" } else { "higher is better" }
            )
        };
        return Err(Error::Usage(format!(
            "row {} is in {} in {} and in {} in {}: expected the same",
            old.name,
            word(old),
            flags.before.display(),
            word(new),
            flags.after.display()
        )));
    }
    let (Some(a), Some(b)) = (old.median, new.median) else {
        return Err(Error::Usage(format!("row {} has no median to compare", old.name)));
    };
    let speed = |ratio: Interval| if old.better == Better::Lower { ratio.inverse() } else { ratio };
    let sampled = old.groups().zip(new.groups());
    let interval = sampled.and_then(|(old, new)| {
        let interval = statistics::ratio(&old, &new, Pairing::Unpaired)?;
        Some((speed(interval), old.len().min(new.len()) >= MIN_SAMPLES))
    });
    // Two zeros are equal; any other value over zero is infinite.
    let ratio = if a == b { 1.0 } else { b / a };
    let exact = speed(Interval { ratio, low: ratio, high: ratio });
    let counted = [old, new].iter().all(|row| matches!(row.kind, Kind::Counted | Kind::Predicted));
    let verdict = match interval {
        Some((interval, true)) => interval.verdict(flags.threshold),
        None if a == b => Verdict::Same,
        None if counted => exact.verdict(flags.threshold),
        _ => Verdict::Unclear,
    };
    let mut numbers = json!({ "A": a, "B": b });
    if let Some((Interval { low, high, .. }, _)) = interval {
        numbers["low"] = low.into();
        numbers["high"] = high.into();
    }
    Ok(Row {
        median: Some(exact.ratio).filter(|ratio| ratio.is_finite()),
        numbers: numbers.as_object().cloned().unwrap_or_default(),
        ..one(old, verdict.name())
    })
}

fn one(row: &Row, verdict: &str) -> Row {
    let parameters = Value::Object(row.parameters.clone());
    Row {
        median: None,
        numbers: Map::new(),
        verdict: Some(verdict.into()),
        ..Row::value(&row.name, parameters, Kind::Compared, 1.0, "x", Better::Higher, json!({}))
    }
}
