//! `compare`: whether rows of one record are better than those of another, beyond random variation.

use crate::args;
use crate::format::{four_digits, keys, merged};
use crate::record::{Better, Kind, Record, Row};
use dflash::perf::statistics::{self, Interval, MIN_SAMPLES, Pairing, Verdict};
use dflash::{Error, Result};
use serde_json::{Map, Value, json};

const SLOWER_EXIT: u8 = 7;
/// The setting that says how drafts are made, not what is answered.
const BLOCK: &str = "block";

/// A title and the record.
///
/// # Errors
/// [`Error::Usage`] for files that are no records, or records that cannot be compared.
pub fn run(flags: &args::Compare) -> Result<(String, Record)> {
    let (before, after) = (Record::read(&flags.before)?, Record::read(&flags.after)?);
    let mut differences = differences(flags, &before, &after);
    if let (Some(first), false) = (differences.first(), flags.force) {
        return Err(Error::Usage(format!("{first}: expected records of the same work, or --force")));
    }
    differences.extend(different_drafts(&before, &after));
    let mut record = Record::new("compare", after.machine, after.model);
    for old in &before.rows {
        record.rows.push(match after.rows.iter().find(|new| new.matches(old)) {
            Some(new) => compared(flags, old, new)?,
            None => verdict_row(old, Some("ONLY IN A")),
        });
    }
    if record.rows.iter().all(|row| row.verdict.as_deref() == Some("ONLY IN A")) {
        let (a, b) = (flags.before.display(), flags.after.display());
        return Err(Error::Usage(format!(
            "{a} and {b} have no row in common: expected the same measurements"
        )));
    }
    let new = after.rows.iter().filter(|new| before.rows.iter().all(|old| !old.matches(new)));
    record.rows.extend(new.map(|new| verdict_row(new, Some("ONLY IN B"))));
    let verdicts = ["FASTER", "SLOWER", "SAME", "UNCLEAR", "ONLY IN A", "ONLY IN B"];
    let counts = verdicts.map(Some).into_iter().chain([None]).filter_map(|verdict| {
        let count = record.rows.iter().filter(|row| row.verdict.as_deref() == verdict).count();
        (count > 0).then(|| format!("{count} {}", verdict.unwrap_or("without a verdict")))
    });
    let title = format!(
        "B {} against A {}, threshold {}%: {}{}",
        flags.after.display(),
        flags.before.display(),
        four_digits(flags.threshold * 100.0),
        counts.collect::<Vec<_>>().join(", "),
        differences.iter().map(|what| format!("; {what}")).collect::<String>()
    );
    Ok((title, record))
}

/// 7 if a row is SLOWER, else 0.
pub fn exit_code(record: &Record) -> u8 {
    let slower = |row: &Row| row.verdict.as_deref() == Some(Verdict::Slower.name());
    if record.rows.iter().any(slower) { SLOWER_EXIT } else { 0 }
}

/// What makes the records those of different work, as sentences.
fn differences(flags: &args::Compare, before: &Record, after: &Record) -> Vec<String> {
    let files = [(&flags.before, before), (&flags.after, after)];
    let interrupted = files.iter().filter(|(_, record)| record.incomplete);
    let mut found: Vec<String> =
        interrupted.map(|(file, _)| format!("the run of {} was interrupted", file.display())).collect();
    let facts = |record: &Record| {
        let Record { machine, model, .. } = record;
        // A prediction depends on them; a measurement only knows them where the card is known.
        let nominal = machine.device.is_none().then(|| json!([machine.gigabytes_per_s, machine.tflops]));
        let facts = json!({
            "card": machine.card, "device": machine.device, "nominal GB/s and TFLOP/s": nominal,
            "target": model.target, "drafter": model.drafter,
        });
        facts.as_object().cloned().unwrap_or_default()
    };
    let mut differ = |a: &Map<String, Value>, b: &Map<String, Value>| {
        for key in keys([a, b].into_iter()) {
            let values = [a, b].map(|map| map.get(&key).filter(|value| !value.is_null()));
            if values[0] != values[1] {
                let [old, new] = values.map(|value| value.map_or("unknown".into(), Value::to_string));
                let [a, b] = files.map(|(file, _)| file.display());
                found.push(format!("different {key}: {old} in {a}, {new} in {b}"));
            }
        }
    };
    differ(&facts(before), &facts(after));
    let settings = |record: &Record| {
        let kept = record.settings.iter().filter(|(key, _)| *key != BLOCK);
        kept.map(|(key, value)| (key.clone(), value.clone())).collect::<Map<String, Value>>()
    };
    match files.iter().find(|(_, record)| record.settings.is_empty()) {
        None => differ(&settings(before), &settings(after)),
        // A record of an earlier version, in which only the amount of text is known.
        Some(_) => differ(&tokens_of_prompts(before), &tokens_of_prompts(after)),
    }
    found
}

fn tokens_of_prompts(record: &Record) -> Map<String, Value> {
    let row = record.rows.iter().find(|row| row.name == "tokens of prompts");
    row.map(|row| ("number of prompt tokens".to_string(), json!(row.median))).into_iter().collect()
}

/// What is worth saying about records that are compared all the same: how they drafted, and what a record of
/// an earlier version does not say.
fn different_drafts(before: &Record, after: &Record) -> Vec<String> {
    let records = [("A", before), ("B", after)];
    let silent = records.iter().filter(|(_, record)| {
        record.settings.is_empty() && matches!(record.command.as_str(), "generate" | "round")
    });
    let mut found: Vec<String> =
        silent.map(|(name, _)| format!("{name} does not say its settings")).collect();
    let block = |record: &Record| json!({ BLOCK: record.settings.get(BLOCK) });
    let [a, b] = records.map(|(_, record)| merged(json!(record.drafts), block(record)));
    if let (Value::Object(a), Value::Object(b)) = (a, b) {
        for key in keys([&a, &b].into_iter()).iter().filter(|key| a.get(*key) != b.get(*key)) {
            let shown = |drafts: &Map<String, Value>| drafts.get(key).unwrap_or(&Value::Null).to_string();
            found.push(format!(
                "different drafts: {} {} in A, {} in B",
                key.replace('_', " "),
                shown(&a),
                shown(&b)
            ));
        }
    }
    found
}

fn compared(flags: &args::Compare, old: &Row, new: &Row) -> Result<Row> {
    if (&old.unit, old.better) != (&new.unit, new.better) {
        let word = |row: &Row| {
            let better = match row.better {
                Better::Lower => "lower is better",
                Better::Higher => "higher is better",
                Better::Neither => "neither is better",
            };
            format!("{}, {better}", row.unit)
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
        _ if old.better == Better::Neither => None,
        Some((interval, true)) => Some(interval.verdict(flags.threshold)),
        None if a == b => Some(Verdict::Same),
        None if counted => Some(exact.verdict(flags.threshold)),
        _ => Some(Verdict::Unclear),
    };
    let mut numbers = json!({ "A": a, "B": b });
    if let Some((Interval { low, high, .. }, _)) = interval {
        numbers["low"] = low.into();
        numbers["high"] = high.into();
    }
    Ok(Row {
        median: Some(exact.ratio).filter(|ratio| ratio.is_finite()),
        numbers: numbers.as_object().cloned().unwrap_or_default(),
        ..verdict_row(old, verdict.map(Verdict::name))
    })
}

fn verdict_row(row: &Row, verdict: Option<&str>) -> Row {
    let parameters = Value::Object(row.parameters.clone());
    Row {
        median: None,
        numbers: Map::new(),
        verdict: verdict.map(String::from),
        ..Row::value(&row.name, parameters, Kind::Compared, 1.0, "x", Better::Higher, json!({}))
    }
}
