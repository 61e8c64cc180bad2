//! Records as text: a table for people, Markdown, CSV, JSON; and `show`, which reads them again.

use crate::args;
use crate::machine::describe;
use crate::record::{Kind, Record, Row};
use dflash::{Error, Result};
use serde::Serialize;
use serde_json::{Map, Value};

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Table,
    Markdown,
    Csv,
    Json,
}

/// The records of these files, each with a title.
///
/// # Errors
/// [`Error::Usage`] where a file is no record, or where there are several and `format` has room for one.
pub fn run(flags: &args::Show, format: Format) -> Result<Vec<(String, Record)>> {
    if format == Format::Csv && flags.records.len() > 1 {
        let found = flags.records.len();
        return Err(Error::Usage(format!("--csv has one head and {found} records, expected one record")));
    }
    let read = |path: &std::path::PathBuf| {
        let record = Record::read(path)?;
        Ok((plain(&title(&record)), record))
    };
    flags.records.iter().map(read).collect()
}

/// What a record is, from what it says itself.
fn title(record: &Record) -> String {
    let Record { command, machine, model, rows, .. } = record;
    let named = |word: &str, name: &Option<String>| name.as_ref().map(|name| format!("{word}{name}"));
    let kind = match machine.device.as_deref() {
        None if rows.iter().any(|row| row.kind == Kind::Predicted) => Some(": predicted, not measured"),
        Some("emulator") => Some(": counters, no times"),
        _ => None,
    };
    let place = machine.card.as_ref().or(machine.device.as_ref()).cloned();
    let parts = [named(" of ", &model.target), named(" with ", &model.drafter), named(" on ", &place)];
    let parts = parts.into_iter().flatten().chain(kind.map(String::from));
    format!("{command}{}", parts.collect::<String>())
}

/// All of stdout. `title`: what a table of it is, which the records say themselves.
pub fn text(record: &Record, title: &str, format: Format) -> String {
    match format {
        Format::Json => serde_json::json!(record).to_string() + "\n",
        Format::Csv => csv(&record.rows),
        Format::Table | Format::Markdown => {
            let state =
                describe(&record.machine).map_or(String::new(), |state| format!("\n{}", plain(&state)));
            table(&record.rows, &format!("{title}{state}"), format == Format::Markdown)
        }
    }
}

/// Every key that a row has, in the order of their first appearance.
fn keys(rows: &[Row], of: impl Fn(&Row) -> &Map<String, Value>) -> Vec<String> {
    let mut keys: Vec<String> = vec![];
    for key in rows.iter().flat_map(|row| of(row).keys()) {
        if !keys.contains(key) {
            keys.push(key.clone());
        }
    }
    keys
}

/// Of a table.
#[derive(Serialize)]
pub struct Column {
    pub name: String,
    /// One for each row, without control characters.
    pub cells: Vec<String>,
    /// Whether they are numbers.
    pub number: bool,
    /// In characters.
    pub width: usize,
}

/// A record's names may be anything, also what moves a terminal's cursor.
fn plain(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// Those in which a row has something to say.
pub fn columns(rows: &[Row]) -> Vec<Column> {
    let mut columns = vec![];
    let any = |of: &dyn Fn(&Row) -> bool| rows.iter().any(of);
    let value = match () {
        _ if any(&|row| row.kind == Kind::Compared) => "ratio",
        _ if any(&|row| row.samples.is_some()) => "median",
        _ => "value",
    };
    let mut push = |name: &str, number: bool, cell: &dyn Fn(&Row) -> String| {
        let (name, cells) = (plain(name), rows.iter().map(|row| plain(&cell(row))).collect::<Vec<_>>());
        if cells.iter().any(|cell| !cell.is_empty()) {
            let width = cells.iter().map(|cell| cell.chars().count()).chain([name.chars().count()]).max();
            columns.push(Column { name, cells, number, width: width.unwrap_or(0) });
        }
    };
    push("", false, &|row| row.name.clone());
    for key in keys(rows, |row| &row.parameters) {
        push(&key, true, &|row| shown(row.parameters.get(&key)));
    }
    push(value, true, &|row| row.median.map_or(String::new(), four_digits));
    push("p10", true, &|row| row.p10.map_or(String::new(), four_digits));
    push("p90", true, &|row| row.p90.map_or(String::new(), four_digits));
    push("unit", false, &|row| row.unit.clone());
    for key in keys(rows, |row| &row.numbers) {
        push(&key, true, &|row| shown(row.numbers.get(&key)));
    }
    push("", false, &|row| match row.kind {
        Kind::Measured | Kind::Compared => String::new(),
        Kind::Counted => "counted".into(),
        Kind::Predicted => "predicted".into(),
    });
    push("throttled", false, &throttled);
    push("verdict", false, &|row| row.verdict.clone().unwrap_or_default());
    columns
}

fn table(rows: &[Row], title: &str, markdown: bool) -> String {
    let columns = columns(rows);
    let mut text = format!("{title}\n");
    if markdown {
        text += "\n";
    }
    let heads: Vec<&str> = columns.iter().map(|column| column.name.as_str()).collect();
    text += &line(&columns, &heads, markdown);
    if markdown {
        let rules: Vec<&str> =
            columns.iter().map(|column| if column.number { "---:" } else { "---" }).collect();
        text += &format!("| {} |\n", rules.join(" | "));
    }
    for i in 0..rows.len() {
        let cells: Vec<&str> = columns.iter().map(|column| column.cells[i].as_str()).collect();
        text += &line(&columns, &cells, markdown);
    }
    text
}

/// `2 of 5 rounds`, where the card was held back in any.
fn throttled(row: &Row) -> String {
    let slow = row.throttled.as_ref().map_or(0, Vec::len);
    let samples = row.samples.as_ref().map_or(0, Vec::len);
    match &row.rounds {
        _ if slow == 0 => String::new(),
        Some(rounds) => format!("{slow} of {} rounds", rounds.len()),
        None => format!("{slow} of {samples} samples"),
    }
}

fn line(columns: &[Column], cells: &[&str], markdown: bool) -> String {
    if markdown {
        let cells: Vec<String> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
        return format!("| {} |\n", cells.join(" | "));
    }
    let padded = columns.iter().zip(cells).map(|(Column { number, width, .. }, cell)| {
        if *number { format!("{cell:>width$}") } else { format!("{cell:width$}") }
    });
    let text = padded.collect::<Vec<_>>().join("  ");
    format!("{}\n", text.trim_end())
}

fn csv(rows: &[Row]) -> String {
    let quoted = |cell: &str| match cell.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", cell.replace('"', "\"\"")),
        false => cell.to_string(),
    };
    let line =
        |cells: Vec<String>| cells.iter().map(|cell| quoted(cell)).collect::<Vec<_>>().join(",") + "\n";
    let (parameters, numbers) = (keys(rows, |row| &row.parameters), keys(rows, |row| &row.numbers));
    let fixed = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
    let ends = ["median", "p10", "p90", "unit", "better", "kind"];
    let mut text = line(
        [
            fixed(&["name"]),
            parameters.clone(),
            fixed(&ends),
            numbers.clone(),
            fixed(&["verdict", "throttled"]),
        ]
        .concat(),
    );
    for row in rows {
        // As in JSON: every digit.
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
        let verdict = row.verdict.clone().unwrap_or_default();
        let throttled = row.throttled.as_ref().map_or(String::new(), |rounds| rounds.len().to_string());
        let (parameters, numbers) = (of(&row.parameters, &parameters), of(&row.numbers, &numbers));
        text += &line([vec![row.name.clone()], parameters, ends, numbers, vec![verdict, throttled]].concat());
    }
    text
}

/// Numbers with four digits; texts as they are.
pub fn shown(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.as_f64().map_or(value.to_string(), four_digits),
    }
}

/// Four digits that count; whole numbers whole.
pub fn four_digits(x: f64) -> String {
    if x == x.trunc() && x.abs() < 1e15 {
        return format!("{x:.0}");
    }
    if x.abs() >= 1e15 || x.abs() < 1e-4 {
        return format!("{x:.3e}");
    }
    let before = x.abs().log10().floor() as i32 + 1;
    format!("{x:.*}", (4 - before).max(0) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_digits_count() {
        let shown = [3.85321, 0.20114, 1244.66, 98765.4, 147456.0, 0.00012346, 1e-7, 16.0, 99.996, 9.9999];
        let expected =
            ["3.853", "0.2011", "1245", "98765", "147456", "0.0001235", "1.000e-7", "16", "100.00", "10.000"];
        assert_eq!(shown.map(four_digits), expected);
    }

    #[test]
    fn throttled_rounds_are_marked() {
        let times = |throttled| {
            let times = crate::sampling::Times { samples: vec![1.0; 6], rounds: vec![3, 3], throttled };
            Row::times("a", serde_json::json!({}), &times, ("ms", 1.0), serde_json::json!({}))
        };
        let shown = |row: Row| [throttled(&row), csv(&[row]).trim_end().rsplit(',').next().unwrap().into()];
        assert_eq!(shown(times(Some(vec![0]))), ["1 of 2 rounds", "1"]);
        assert_eq!(shown(times(Some(vec![]))), ["", "0"]);
        assert_eq!(shown(times(None)), ["", ""]);
        let row = Row { rounds: None, ..times(Some(vec![4, 5])) };
        assert!(table(std::slice::from_ref(&row), "", false).contains("throttled\na"));
        assert_eq!(shown(row), ["2 of 6 samples", "2"]);
    }

    #[test]
    fn names_that_csv_and_markdown_would_cut_stay_whole() {
        use crate::record::Better;
        let none = || serde_json::json!({});
        let row = Row::value("a \"b\", |c|", none(), Kind::Counted, 1.5, "s", Better::Lower, none());
        assert!(
            csv(std::slice::from_ref(&row)).ends_with("\n\"a \"\"b\"\", |c|\",1.5,,,s,lower,counted,,\n")
        );
        assert!(table(&[row], "", true).ends_with("\n| a \"b\", \\|c\\| | 1.500 | s | counted |\n"));
    }
}
