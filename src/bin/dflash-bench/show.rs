//! Records as text: a table for a terminal, Markdown, CSV, JSON; and `show`, which prints records again.

use crate::args;
use crate::format::{Format, four_digits, keys, label, parameter, printable, shown};
use crate::record::{Kind, Record, Row};
use crate::{table, width};
use dflash::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value};

/// The records of these files, each with a title.
///
/// # Errors
/// [`Error::Usage`] for a file that is no record, and for several records as CSV, which holds one.
pub fn run(flags: &args::Show, format: Format) -> Result<Vec<(String, Record)>> {
    if format == Format::Csv && flags.records.len() > 1 {
        let found = flags.records.len();
        return Err(Error::Usage(format!("--csv has one head and {found} records, expected one record")));
    }
    let read = |path: &std::path::PathBuf| {
        let record = Record::read(path)?;
        Ok((printable(&title(&record)), record))
    };
    flags.records.iter().map(read).collect()
}

/// The end of the title of an interrupted run.
pub const INCOMPLETE: &str = "; interrupted, so incomplete";

/// A title from the record's own fields.
fn title(record: &Record) -> String {
    let Record { command, machine, model, rows, .. } = record;
    let named = |word: &str, name: &Option<String>| name.as_ref().map(|name| format!("{word}{name}"));
    let kind = match machine.device.as_deref() {
        None if rows.iter().any(|row| row.kind == Kind::Predicted) => Some(": predicted, not measured"),
        _ if machine.counts() => Some(": counters, no times"),
        _ => None,
    };
    let on = machine.card.as_ref().or(machine.device.as_ref()).cloned();
    let parts = [named(" of ", &model.target), named(" with ", &model.drafter), named(" on ", &on)];
    let incomplete = record.incomplete.then(|| INCOMPLETE.into());
    let parts = parts.into_iter().flatten().chain(kind.map(String::from)).chain(incomplete);
    format!("{command}{}", parts.collect::<String>())
}

/// The record as `dflash-bench` prints it. Tables begin with `title`.
pub fn text(record: &Record, title: &str, format: Format) -> String {
    match format {
        Format::Json => serde_json::json!(record).to_string() + "\n",
        Format::Csv => csv(&record.rows),
        Format::Table => table::text(record, title, width::columns()),
        Format::Markdown => markdown(record, title),
    }
}

/// A column of a table that has all rows.
#[derive(Serialize)]
pub struct Column {
    pub name: String,
    /// One cell for each row, without control characters.
    pub cells: Vec<String>,
    /// Whether the cells are numbers.
    pub number: bool,
}

/// The columns in which at least one row has a value.
pub fn columns(rows: &[Row]) -> Vec<Column> {
    let mut columns = vec![];
    let any = |of: &dyn Fn(&Row) -> bool| rows.iter().any(of);
    let value = match () {
        _ if any(&|row| row.kind == Kind::Compared) => "ratio",
        _ if any(&|row| row.samples.is_some()) => "median",
        _ => "value",
    };
    let mut push = |name: &str, number: bool, cell: &dyn Fn(&Row) -> String| {
        let (name, cells) =
            (printable(name), rows.iter().map(|row| printable(&cell(row))).collect::<Vec<_>>());
        if cells.iter().any(|cell| !cell.is_empty()) {
            columns.push(Column { name, cells, number });
        }
    };
    push("", false, &|row| row.name.clone());
    for key in keys(rows.iter().map(|row| &row.parameters)) {
        push(&key, true, &|row| parameter(&row.parameters, &key));
    }
    push(value, true, &|row| row.median.map_or(String::new(), four_digits));
    push("p10", true, &|row| row.p10.map_or(String::new(), four_digits));
    push("p90", true, &|row| row.p90.map_or(String::new(), four_digits));
    push("unit", false, &|row| row.unit.clone());
    for key in keys(rows.iter().map(|row| &row.numbers)) {
        push(label(&key), true, &|row| shown(row.numbers.get(&key)));
    }
    push("", false, &|row| match row.kind {
        Kind::Measured | Kind::Compared => String::new(),
        Kind::Counted => "counted".into(),
        Kind::Predicted => "predicted".into(),
    });
    push("bound", false, &|row| row.bound.clone().unwrap_or_default());
    push("throttled", false, &Row::throttling);
    push("verdict", false, &|row| row.verdict.clone().unwrap_or_default());
    columns
}

fn markdown(record: &Record, title: &str) -> String {
    let state = record.machine.describe().map_or(String::new(), |state| format!("\n{}", printable(&state)));
    let columns = columns(&record.rows);
    let line = |cells: Vec<&str>| {
        let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let mut text = format!("{title}{state}\n\n");
    text += &line(columns.iter().map(|column| column.name.as_str()).collect());
    text += &line(columns.iter().map(|column| if column.number { "---:" } else { "---" }).collect());
    for i in 0..record.rows.len() {
        text += &line(columns.iter().map(|column| column.cells[i].as_str()).collect());
    }
    text
}

fn csv(rows: &[Row]) -> String {
    let quoted = |cell: &str| match cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell.to_string(),
    };
    let line =
        |cells: Vec<String>| cells.iter().map(|cell| quoted(cell)).collect::<Vec<_>>().join(",") + "\n";
    let parameters = keys(rows.iter().map(|row| &row.parameters));
    let numbers = keys(rows.iter().map(|row| &row.numbers));
    let fixed = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
    let ends = ["median", "p10", "p90", "unit", "better", "kind"];
    let mut text = line(
        [
            fixed(&["name"]),
            parameters.clone(),
            fixed(&ends),
            numbers.clone(),
            fixed(&["bound", "verdict", "throttled"]),
        ]
        .concat(),
    );
    for row in rows {
        // All digits, as in JSON.
        let value = |value: Option<&Value>| match value {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text.clone(),
            Some(value) => value.to_string(),
        };
        let record = serde_json::json!(row);
        let of = |map: &Map<String, Value>, keys: &[String]| -> Vec<String> {
            keys.iter().map(|key| value(map.get(key))).collect()
        };
        let ends = ends.iter().map(|key| value(record.get(key))).collect();
        let [verdict, bound] = [&row.verdict, &row.bound].map(|text| text.clone().unwrap_or_default());
        let throttled = row.throttled.as_ref().map_or(String::new(), |rounds| rounds.len().to_string());
        let (parameters, numbers) = (of(&row.parameters, &parameters), of(&row.numbers, &numbers));
        let last = vec![bound, verdict, throttled];
        text += &line([vec![row.name.clone()], parameters, ends, numbers, last].concat());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn throttled_rounds_are_marked() {
        let times = |throttled| {
            let times = crate::measure::Times { samples: vec![1.0; 6], rounds: vec![3, 3], throttled };
            Row::times("a", serde_json::json!({}), &times, ("ms", 1.0), serde_json::json!({}))
        };
        let shown = |row: Row| [row.throttling(), csv(&[row]).trim_end().rsplit(',').next().unwrap().into()];
        assert_eq!(shown(times(Some(vec![0]))), ["1 of 2 rounds", "1"]);
        assert_eq!(shown(times(Some(vec![]))), ["", "0"]);
        assert_eq!(shown(times(None)), ["", ""]);
        let row = Row { rounds: None, ..times(Some(vec![4, 5])) };
        let slow = columns(std::slice::from_ref(&row)).into_iter().find(|column| column.name == "throttled");
        assert_eq!(slow.unwrap().cells, ["2 of 6 samples"]);
        assert_eq!(shown(row), ["2 of 6 samples", "2"]);
    }

    #[test]
    fn csv_and_markdown_escape_their_separators() {
        use crate::record::{Better, Machine, Model};
        let none = || serde_json::json!({});
        let row = Row::value("a \"b\", |c|", none(), Kind::Counted, 1.5, "s", Better::Lower, none());
        assert!(
            csv(std::slice::from_ref(&row)).ends_with("\n\"a \"\"b\"\", |c|\",1.5,,,s,lower,counted,,,\n")
        );
        let mut record = Record::new("round", Machine::default(), Model::default());
        record.rows.push(row);
        assert!(markdown(&record, "").ends_with("\n| a \"b\", \\|c\\| | 1.500 | s | counted |\n"));
    }
}
