//! Records as tables for people: rows of one unit together, no blank columns, within a width.

use crate::format::{
    bar, compact, distinct, four_digits, keys, label, parameter, printable, shown_by, wrapped,
};
use crate::record::{Kind, Record, Row};
use dflash::cli::terminal::counted;
use serde_json::{Map, Value};

/// The record under `title`, in lines of at most `width` characters where its names allow that.
pub fn text(record: &Record, title: &str, width: usize) -> String {
    let rows: Vec<&Row> = record.rows.iter().collect();
    let blocks = match record.command.as_str() {
        "generate" => generate(&rows),
        "compare" => vec![block(&rows, false)],
        _ => by_unit(&rows),
    };
    page(record, title, &blocks, width)
}

/// The short form that `dflash-bench` without arguments prints of a record of `generate`.
pub fn summary(record: &Record, title: &str, width: usize) -> String {
    let find = |name: &str, decoding: Option<&str>| {
        let is = |row: &&Row| {
            let mode = row.parameters.get("decoding").and_then(Value::as_str);
            row.name == name && mode == decoding && !row.parameters.contains_key("category")
        };
        record.rows.iter().find(is)
    };
    let median = |row: Option<&Row>| row.and_then(|row| row.median);
    let both = |label: &str, name: &str, speed_up: Option<&str>| {
        let values = ["plain", "dflash"].map(|mode| digits(median(find(name, Some(mode)))));
        let row = speed_up.and_then(|name| find(name, None));
        let ratio = median(row).map_or(String::new(), |ratio| format!("{}x", four_digits(ratio)));
        let ends = row
            .map(|row| [row.numbers.get("low"), row.numbers.get("high")].map(|x| x.and_then(Value::as_f64)));
        let interval = match ends {
            Some([Some(low), Some(high)]) => format!("{} to {}, 99 %", four_digits(low), four_digits(high)),
            _ => String::new(),
        };
        let [ar, fast] = values;
        [label.to_string(), ar, fast, ratio, interval]
    };
    let tau = median(record.rows.iter().find(|row| is_overall_tau(row)));
    let mut lines = vec![
        both("tokens per second, median", "tokens per second", Some("speed-up")),
        both("ms to the first token", "TTFT", None),
        both("ms per further token", "TPOT", Some("speed-up of decoding")),
        ["tokens per round (tau)".into(), "1".into(), digits(tau), String::new(), String::new()],
    ];
    lines.retain(|line| !line[2].is_empty());
    if let Some(row) = find("identical", None) {
        let compared = row.numbers.get("compared").and_then(Value::as_f64).unwrap_or(0.0);
        let same = row.median.unwrap_or(0.0) * compared;
        let value = format!("{} of {}", four_digits(same.round()), four_digits(compared));
        lines.push(["answers equal to AR's".into(), String::new(), value, String::new(), String::new()]);
    }
    let column = |i: usize, name: &str| {
        let cells = lines.iter().map(|line| line[i].clone()).collect();
        Column { name: name.into(), cells, right: i > 0 && i < 4, rank: if i == 4 { 1 } else { 0 } }
    };
    let names = ["", "AR", "DFlash", "speed-up", ""];
    let columns = (0..5).map(|i| column(i, names[i])).collect();
    let rows: Vec<&Row> = record.rows.iter().collect();
    let mut blocks = vec![Block { heading: String::new(), columns }];
    blocks.extend(histogram(&rows));
    page(record, title, &blocks, width)
}

fn page(record: &Record, title: &str, blocks: &[Block], width: usize) -> String {
    let mut lines = wrapped(&printable(title), width);
    lines.extend(record.machine.describe().iter().flat_map(|state| wrapped(&printable(state), width)));
    for block in blocks {
        lines.push(String::new());
        lines.extend(block.lines(width));
    }
    lines.join("\n") + "\n"
}

// ---- blocks ----

/// Columns under a heading.
struct Block {
    /// What all rows have in common.
    heading: String,
    columns: Vec<Column>,
}

struct Column {
    name: String,
    cells: Vec<String>,
    /// Aligned right, as numbers are.
    right: bool,
    /// 0: always shown. Others are left out where the width is too small, the highest rank first.
    rank: u8,
}

fn column<T>(rows: &[T], name: &str, right: bool, rank: u8, cell: impl Fn(&T) -> String) -> Column {
    Column { name: name.into(), cells: rows.iter().map(cell).collect(), right, rank }
}

fn digits(x: Option<f64>) -> String {
    x.map_or(String::new(), compact)
}

/// `name (list)`.
fn named(name: &str, list: &str) -> String {
    let name = printable(name);
    if list.is_empty() { name } else { format!("{name} ({list})") }
}

impl Column {
    fn width(&self) -> usize {
        let cells = self.cells.iter().chain([&self.name]);
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    }

    fn is_blank(&self) -> bool {
        self.cells.iter().all(String::is_empty)
    }
}

impl Block {
    fn lines(&self, width: usize) -> Vec<String> {
        let all: Vec<&Column> = self.columns.iter().filter(|column| !column.is_blank()).collect();
        let mut columns = all.clone();
        let needed = |columns: &[&Column]| columns.iter().map(|column| column.width() + 2).sum::<usize>();
        while needed(&columns) > width + 2 {
            // `max_by_key` returns the last of equal ranks, the rightmost column. Its namesakes go with it.
            let next = columns.iter().copied().max_by_key(|column| column.rank);
            let Some(next) = next.filter(|column| column.rank > 0) else { break };
            columns.retain(|column| match next.name.is_empty() {
                true => !std::ptr::eq(*column, next),
                false => column.name != next.name,
            });
        }
        let shown = |column: &&Column| columns.iter().any(|other| std::ptr::eq(*other, *column));
        let left_out = all.iter().filter(|column| !shown(column) && !column.name.is_empty());
        let left_out = distinct(left_out.map(|column| column.name.as_str()));
        let mut lines = if self.heading.is_empty() { vec![] } else { wrapped(&self.heading, width) };
        if columns.iter().any(|column| !column.name.is_empty()) {
            lines.push(line(&columns, |column| &column.name));
        }
        let rows = columns.iter().map(|column| column.cells.len()).max().unwrap_or(0);
        lines.extend((0..rows).map(|i| line(&columns, |column| &column.cells[i])));
        if !left_out.is_empty() {
            let note = format!("(too wide, see --csv: {})", left_out.join(", "));
            lines.extend(wrapped(&note, width));
        }
        lines
    }
}

fn line<'a>(columns: &[&'a Column], cell: impl Fn(&'a Column) -> &'a String) -> String {
    let padded = columns.iter().map(|column| {
        let (width, cell) = (column.width(), cell(column));
        if column.right { format!("{cell:>width$}") } else { format!("{cell:width$}") }
    });
    padded.collect::<Vec<_>>().join("  ").trim_end().to_string()
}

/// A block for each unit, in the order of first appearance. Rows whose unit no other row has share one block.
fn by_unit(rows: &[&Row]) -> Vec<Block> {
    let count = |unit: &str| rows.iter().filter(|row| row.unit == unit).count();
    let (mut blocks, mut units) = (vec![], vec![]);
    for row in rows {
        let unit = Some(row.unit.as_str()).filter(|unit| count(unit) > 1);
        if units.contains(&unit) {
            continue;
        }
        units.push(unit);
        let alike = rows.iter().filter(|row| match unit {
            Some(unit) => row.unit == unit,
            None => count(&row.unit) == 1,
        });
        blocks.push(block(&alike.copied().collect::<Vec<_>>(), unit.is_none()));
    }
    blocks
}

/// Rows as one table. Parameters and numbers that most rows have are columns, unless they are the same in
/// all of these: then the heading has them. The others are written beside the name and behind the value.
fn block(rows: &[&Row], with_unit: bool) -> Block {
    let mut heading = vec![];
    let compared = rows.iter().all(|row| row.kind == Kind::Compared);
    let kinds = distinct(rows.iter().map(|row| kind(row.kind)));
    if let (Some(row), false, false) = (rows.first(), with_unit, compared) {
        heading.push(match kinds[..] {
            [kind] => format!("{}, {kind}", printable(&row.unit)),
            _ => printable(&row.unit),
        });
    }
    let parameters = |row: &&Row| row.parameters.clone();
    let numbers = |row: &&Row| row.numbers.clone();
    // A table of several units has all parameters beside the name, a comparison all numbers in columns.
    let (beside, mut own) = match with_unit {
        true => (keys(rows.iter().map(|row| &row.parameters)), vec![]),
        false => sort_out(rows, &parameters, 0, false, &mut heading),
    };
    let (behind, numbers_own) = sort_out(rows, &numbers, 1, compared, &mut heading);
    let name = |row: &&Row| named(&row.name, &listed(&row.parameters, &beside));
    let mut columns = vec![column(rows, "", false, 0, name)];
    columns.append(&mut own);
    let value = match () {
        _ if compared => "ratio",
        _ if rows.iter().any(|row| row.samples.is_some()) => "median",
        _ if with_unit => "",
        _ => "value",
    };
    columns.push(column(rows, value, true, 0, |row| digits(row.median)));
    columns.push(column(rows, "p10", true, 3, |row| digits(row.p10)));
    columns.push(column(rows, "p90", true, 2, |row| digits(row.p90)));
    if with_unit {
        columns.push(column(rows, "", false, 0, |row| printable(&row.unit)));
    }
    columns.extend(numbers_own);
    columns.push(column(rows, "", false, 1, |row| listed(&row.numbers, &behind)));
    if kinds.len() > 1 && !with_unit {
        columns.push(column(rows, "", false, 1, |row| kind(row.kind).into()));
    }
    columns.push(column(rows, "bound", false, 0, |row| printable(row.bound.as_deref().unwrap_or_default())));
    columns.push(column(rows, "throttled", false, 0, |row| row.throttling()));
    columns
        .push(column(rows, "verdict", false, 0, |row| printable(row.verdict.as_deref().unwrap_or_default())));
    Block { heading: heading.join("; "), columns }
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Measured => "measured",
        Kind::Counted => "counted",
        Kind::Predicted => "predicted",
        Kind::Compared => "compared",
    }
}

/// Sorts the keys of `of`: constants join the heading, keys of at least half the rows become columns of
/// `rank`, and the others are returned. `every`: all keys become columns.
fn sort_out(
    rows: &[&Row],
    of: &dyn Fn(&&Row) -> Map<String, Value>,
    rank: u8,
    every: bool,
    heading: &mut Vec<String>,
) -> (Vec<String>, Vec<Column>) {
    let (mut others, mut columns, mut constants) = (vec![], vec![], vec![]);
    let all: Vec<Map<String, Value>> = rows.iter().map(of).collect();
    for key in keys(all.iter()) {
        let cells: Vec<String> = all.iter().map(|map| cell(map, &key)).collect();
        let present: Vec<&String> = cells.iter().filter(|cell| !cell.is_empty()).collect();
        let one = present.iter().all(|cell| *cell == present[0]);
        let name = printable(label(&key));
        match () {
            _ if !every && 2 * present.len() < rows.len() => others.push(key),
            // Few rows keep equal values as a column; so do numbers that some rows lack.
            _ if !every && one && rows.len() > 3 && (rank == 0 || present.len() == rows.len()) => {
                constants
                    .push(format!("{name} {}", cells.iter().find(|cell| !cell.is_empty()).unwrap_or(&name)));
            }
            _ => columns.push(Column { name, cells, right: true, rank }),
        }
    }
    if !constants.is_empty() {
        heading.push(constants.join(", "));
    }
    (others, columns)
}

fn cell(map: &Map<String, Value>, key: &str) -> String {
    match map.get(key) {
        Some(value @ Value::Number(_)) => shown_by(Some(value), compact),
        _ => printable(&parameter(map, key)),
    }
}

/// `key value, key value`: those of `keys` that `map` has.
fn listed(map: &Map<String, Value>, keys: &[String]) -> String {
    let pairs = keys.iter().filter(|key| map.get(*key).is_some_and(|value| !value.is_null()));
    let texts: Vec<String> =
        pairs.map(|key| format!("{} {}", printable(label(key)), cell(map, key))).collect();
    texts.join(", ")
}

// ---- generate ----

fn generate(rows: &[&Row]) -> Vec<Block> {
    let drafters = distinct(rows.iter().filter_map(|row| row.parameters.get("draft")));
    if !drafters.is_empty() {
        return compared(rows, &drafters);
    }
    let decoding = |row: &Row| {
        let mode = row.parameters.get("decoding").and_then(Value::as_str);
        matches!(mode, Some("plain" | "dflash"))
    };
    let charted = |row: &Row| bucket(row).is_some() || position(row).is_some();
    let chosen =
        |is: &dyn Fn(&Row) -> bool| -> Vec<&Row> { rows.iter().copied().filter(|row| is(row)).collect() };
    let values = chosen(&|row| !decoding(row) && !charted(row) && row.samples.is_none());
    let counters = chosen(&|row| decoding(row) && row.kind == Kind::Counted);
    let timed = chosen(&|row| decoding(row) && row.kind != Kind::Counted);
    let rest = chosen(&|row| !decoding(row) && !charted(row) && row.samples.is_some());
    let mut blocks = vec![];
    if !values.is_empty() {
        blocks.push(block(&values, true));
    }
    blocks.extend(by_unit(&counters));
    blocks.extend(by_unit(&rest));
    if !timed.is_empty() {
        blocks.push(side_by_side(&timed));
    }
    blocks.extend(histogram(rows));
    blocks
}

/// Several drafters: a line for each, over all prompts, and the acceptance of their drafts.
fn compared(rows: &[&Row], drafters: &[&Value]) -> Vec<Block> {
    let find = |draft: &Value, name: &str, parameter: Option<(&str, Value)>| {
        let has = |row: &Row, (key, value): &(&str, Value)| row.parameters.get(*key) == Some(value);
        let is = |row: &&&Row| {
            let length = 1 + usize::from(parameter.is_some());
            row.name == name
                && row.parameters.len() == length
                && has(row, &("draft", draft.clone()))
                && parameter.iter().all(|parameter| has(row, parameter))
        };
        rows.iter().find(is).and_then(|row| row.median)
    };
    let first = || column(drafters, "draft", false, 0, |draft| printable(draft.as_str().unwrap_or_default()));
    let value = |title: &str, name: &str, parameter: Option<(&str, &str)>| {
        let parameter = parameter.map(|(key, value)| (key, Value::from(value)));
        column(drafters, title, true, 0, |draft| digits(find(draft, name, parameter.clone())))
    };
    let (ar, fast) = (Some(("decoding", "plain")), Some(("decoding", "dflash")));
    let columns = vec![
        first(),
        value("tau", "acceptance length", Some(("mean", "tokens/rounds"))),
        value("drafts/token", "drafts per token", None),
        value("AR tok/s", "tokens per second", ar),
        value("tok/s", "tokens per second", fast),
        value("ratio", "speed-up", None),
        value("AR bytes/token", "bytes per token", ar),
        value("bytes/token", "bytes per token", fast),
        value("identical", "identical", None),
    ];
    let positions = distinct(rows.iter().filter_map(|row| row.parameters.get("position")?.as_u64()));
    let percent = |draft: &Value, at: u64| {
        let share = find(draft, "accepted at position", Some(("position", at.into())));
        share.map_or(String::new(), |share| format!("{:.1}", share * 100.0))
    };
    let position =
        |(rank, at): (u8, &u64)| column(drafters, &at.to_string(), true, rank, |draft| percent(draft, *at));
    let accepted = [first()].into_iter().chain((1..).zip(&positions).map(position)).collect();
    let heading = "accepted at position, % of rounds".into();
    vec![Block { heading: String::new(), columns }, Block { heading, columns: accepted }]
}

/// Name, unit and the parameters other than `decoding`.
type Line = (String, String, Map<String, Value>);

/// AR and DFlash in columns.
fn side_by_side(rows: &[&Row]) -> Block {
    let others = |row: &Row| {
        let mut parameters = row.parameters.clone();
        parameters.remove("decoding");
        (row.name.clone(), row.unit.clone(), parameters)
    };
    let lines = distinct(rows.iter().map(|row| others(row)));
    let at = |line: &Line, mode: &str| {
        let is = |row: &&&Row| row.parameters["decoding"] == mode && others(row) == *line;
        rows.iter().find(is).copied()
    };
    let name = |line: &Line| named(&line.0, &listed(&line.2, &keys([&line.2].into_iter())));
    let mut columns = vec![column(&lines, "", false, 0, name)];
    columns.push(column(&lines, "", false, 0, |line| printable(&line.1)));
    for (mode, name) in [("plain", "AR"), ("dflash", "DFlash")] {
        let mut push = |name: &str, rank: u8, of: fn(&Row) -> Option<f64>| {
            columns.push(column(&lines, name, true, rank, |line| digits(at(line, mode).and_then(of))));
        };
        push(name, 0, |row| row.median);
        push("p10", 3, |row| row.p10);
        push("p90", 2, |row| row.p90);
        push("mean", 4, |row| row.numbers.get("mean")?.as_f64());
        push("p99", 1, |row| row.numbers.get("p99")?.as_f64());
    }
    columns.push(column(&lines, "throttled", false, 0, |line| {
        let marks = ["plain", "dflash"].map(|mode| at(line, mode).map_or(String::new(), Row::throttling));
        if marks[0] == marks[1] { marks[0].clone() } else { marks.join(" / ") }
    }));
    Block { heading: "medians, measured".into(), columns }
}

/// The number of tokens whose rounds `row` counts.
fn bucket(row: &Row) -> Option<f64> {
    let alone = row.name == "rounds" && row.parameters.len() == 1;
    row.parameters.get("accepted").filter(|_| alone)?.as_f64()
}

/// The draft whose acceptance `row` has.
fn position(row: &Row) -> Option<f64> {
    let alone = row.name == "accepted at position" && row.parameters.len() == 1;
    row.parameters.get("position").filter(|_| alone)?.as_f64()
}

fn is_overall_tau(row: &Row) -> bool {
    row.name == "acceptance length"
        && row.parameters.len() == 1
        && row.parameters.get("mean") == Some(&"tokens/rounds".into())
}

/// Characters of the longest bar.
const BAR: usize = 30;

/// Rounds by the tokens they produced, as bars, beside the acceptance of each draft.
fn histogram(rows: &[&Row]) -> Option<Block> {
    let keys = distinct(rows.iter().filter_map(|row| bucket(row).or(position(row))));
    if keys.is_empty() {
        return None;
    }
    let counts = || rows.iter().filter(|row| bucket(row).is_some()).filter_map(|row| row.median);
    let (sum, tallest) = (counts().sum::<f64>(), counts().fold(0.0, f64::max));
    let tau = rows.iter().find(|row| is_overall_tau(row)).and_then(|row| row.median);
    let tau = tau.map_or(String::new(), |tau| format!(", {} tokens per round (tau)", four_digits(tau)));
    let rounds = |at: &f64| rows.iter().find(|row| bucket(row) == Some(*at))?.median;
    let draft = |at: &f64| rows.iter().find(|row| position(row) == Some(*at)).copied();
    let percent = |share: Option<f64>| share.map_or(String::new(), |share| format!("{:.1} %", share * 100.0));
    let columns = vec![
        column(&keys, "tokens", true, 0, |at| rounds(at).map_or(String::new(), |_| compact(*at))),
        column(&keys, "rounds", true, 0, |at| digits(rounds(at))),
        column(&keys, "fraction", true, 1, |at| percent(rounds(at).map(|rounds| rounds / sum))),
        column(&keys, "", false, 0, |at| rounds(at).map_or(String::new(), |n| bar(n / tallest, BAR))),
        column(&keys, "draft", true, 1, |at| draft(at).map_or(String::new(), |_| compact(*at))),
        column(&keys, "accepted", true, 1, |at| percent(draft(at).and_then(|row| row.median))),
        column(&keys, "if reached", true, 2, |at| {
            percent(draft(at).and_then(|row| row.numbers.get("conditional")?.as_f64()))
        }),
    ];
    Some(Block { heading: format!("{}{tau}", counted(sum as usize, "round")), columns })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{Better, Machine, Model};
    use serde_json::json;

    fn record(command: &str, rows: Vec<Row>) -> Record {
        Record { rows, ..Record::new(command, Machine::default(), Model::default()) }
    }

    fn row(name: &str, parameters: Value, kind: Kind, unit: &str, value: f64, numbers: Value) -> Row {
        Row::value(name, parameters, kind, value, unit, Better::Lower, numbers)
    }

    fn shown(record: &Record, width: usize) -> Vec<String> {
        text(record, "title", width).lines().map(String::from).collect()
    }

    #[test]
    fn rows_of_a_unit_are_together_and_constants_are_in_the_heading() {
        let ms = |name: &str, more: Value, value: f64| {
            let mut at = json!({ "context": 64, "batch": 1 });
            at.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            row(name, at, Kind::Measured, "ms", value, json!({}))
        };
        let rate = |acceptance: u32| {
            let at = json!({ "context": 64, "batch": 1, "acceptance": acceptance });
            row("DFlash", at, Kind::Measured, "tok/s", 100.0, json!({ "speed-up": 2.5 }))
        };
        let block = || json!({ "block": 16 });
        let rows = vec![
            ms("AR step", json!({}), 1.5),
            rate(2),
            ms("round", block(), 4.0),
            ms("draft", block(), 1.0),
            ms("verify", block(), 3.0),
            rate(4),
            row("memory", json!({}), Kind::Counted, "GB", 7.0, json!({})),
        ];
        let expected = [
            "title",
            "",
            "ms, measured; context 64, batch 1, block 16",
            "         value",
            "AR step  1.500",
            "round        4",
            "draft        1",
            "verify       3",
            "",
            "tok/s, measured",
            "        context  batch  acceptance  value  speed-up",
            "DFlash       64      1           2    100     2.500",
            "DFlash       64      1           4    100     2.500",
            "",
            "memory  7  GB",
        ];
        assert_eq!(shown(&record("round", rows), 100), expected);
    }

    #[test]
    fn columns_are_left_out_by_rank_and_named() {
        let times =
            crate::measure::Times { samples: vec![1.0, 2.0, 4.0], rounds: vec![3], throttled: Some(vec![0]) };
        let numbers = json!({ "GB": 1.5, "floor ms": 0.25 });
        let one = |name: &str| Row::times(name, json!({}), &times, ("ms", 1.0), numbers.clone());
        let found = record("round", vec![one("first"), one("second")]);
        assert_eq!(
            shown(&found, 100)[2..],
            [
                "ms, measured",
                "        median    p10    p90     GB  roofline ms  throttled",
                "first        2  1.200  3.600  1.500       0.2500  1 of 1 round",
                "second       2  1.200  3.600  1.500       0.2500  1 of 1 round",
            ]
        );
        assert_eq!(
            shown(&found, 40)[2..],
            [
                "ms, measured",
                "        median     GB  throttled",
                "first        2  1.500  1 of 1 round",
                "second       2  1.500  1 of 1 round",
                "(too wide, see --csv: p10, p90, roofline",
                "ms)",
            ]
        );
    }

    #[test]
    fn parameters_of_few_rows_stand_beside_the_name() {
        let rows =
            [json!({}), json!({}), json!({ "category": "code" }), json!({ "decoding": "plain" }), json!({})];
        let rows = rows.into_iter().enumerate().map(|(i, at)| {
            let numbers = if i == 0 { json!({ "compared": 8 }) } else { json!({}) };
            row(&format!("row {i}"), at, Kind::Counted, "tok", i as f64, numbers)
        });
        let expected = [
            "row 0                  0  tok  compared 8",
            "row 1                  1  tok",
            "row 2 (category code)  2  tok",
            "row 4                  4  tok",
        ];
        let lines = shown(&record("generate", rows.collect()), 100);
        assert_eq!(lines[2..6], expected, "{lines:?}");
        assert!(lines.iter().any(|line| line.contains("(decoding AR)")), "{lines:?}");
    }

    #[test]
    fn ar_and_dflash_are_columns_beside_each_other() {
        let one = |mode: &str, category: Option<&str>, value: f64| {
            let mut at = json!({ "decoding": mode });
            if let Some(category) = category {
                at["category"] = category.into();
            }
            Row::samples(
                "TTFT",
                at,
                vec![value],
                None,
                "ms",
                Better::Lower,
                json!({ "mean": value, "p99": value }),
            )
        };
        let rows = vec![
            one("plain", None, 4.0),
            one("plain", Some("code"), 3.0),
            one("dflash", None, 2.0),
            one("dflash", Some("code"), 1.0),
        ];
        let lines = shown(&record("generate", rows), 100);
        let expected = [
            "medians, measured",
            "                          AR  p10  p90  mean  p99  DFlash  p10  p90  mean  p99",
            "TTFT                  ms   4    4    4     4    4       2    2    2     2    2",
            "TTFT (category code)  ms   3    3    3     3    3       1    1    1     1    1",
        ];
        assert_eq!(lines[2..], expected);
        let narrow = shown(&record("generate", vec![one("plain", None, 4.0), one("dflash", None, 2.0)]), 45);
        assert_eq!(narrow.last().unwrap(), "(too wide, see --csv: p10, mean)", "{narrow:?}");
    }

    #[test]
    fn no_text_of_a_record_controls_the_terminal() {
        let hostile = "\u{1b}[2J\n";
        let rows = (0..4).map(|i| {
            let at = json!({ hostile: hostile, "row": format!("{hostile}{i}") });
            Row {
                verdict: Some(hostile.into()),
                ..row(hostile, at, Kind::Measured, hostile, 1.0, json!({ hostile: 2 }))
            }
        });
        let rows: Vec<Row> = rows.collect();
        for command in ["generate", "round", "compare", hostile] {
            for width in [40, 200] {
                let table = text(&record(command, rows.clone()), hostile, width);
                assert!(!table.contains(|c: char| c.is_control() && c != '\n'), "{table:?}");
                assert!(table.lines().count() >= 6, "{table:?}");
            }
        }
    }

    #[test]
    fn any_number_makes_a_table() {
        for number in [0.0, -1.0, f64::MAX, f64::MIN, 1e-300, 2e18] {
            let rows = [("rounds", "accepted"), ("accepted at position", "position"), ("x", "y")];
            let rows = rows.map(|(name, key)| {
                row(
                    name,
                    json!({ key: number }),
                    Kind::Counted,
                    "rounds",
                    number,
                    json!({ "conditional": number }),
                )
            });
            for command in ["generate", "round", "compare"] {
                assert!(text(&record(command, rows.to_vec()), "", 80).len() < 4000, "{number}");
            }
        }
    }
}
