//! Records as tables for people: rows of one unit together, no blank columns, within a width.

use crate::format::{bar, compact, four_digits, label, parameter, plain, shown_by, wrapped};
use crate::record::{Kind, Record, Row};
use crate::show::{describe, keys, throttled};
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
    let digits = |x: Option<f64>| x.map_or(String::new(), compact);
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
    let mut lines = wrapped(&plain(title), width);
    lines.extend(describe(&record.machine).iter().flat_map(|state| wrapped(&plain(state), width)));
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
        let mut columns: Vec<&Column> = self.columns.iter().filter(|column| !column.is_blank()).collect();
        let mut left_out: Vec<&str> = vec![];
        let needed = |columns: &[&Column]| columns.iter().map(|column| column.width() + 2).sum::<usize>();
        while needed(&columns) > width + 2 {
            // `max_by_key` returns the last of equal ranks, the rightmost column.
            let widest = columns.iter().enumerate().max_by_key(|(_, column)| column.rank);
            let Some((i, _)) = widest.filter(|(_, column)| column.rank > 0) else { break };
            let name = columns.remove(i).name.as_str();
            if !left_out.contains(&name) && !name.is_empty() {
                left_out.insert(0, name);
            }
        }
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

/// Rows as one table. Parameters and numbers that most rows have are columns, unless they are the same in all
/// of these: then the heading has them. The others are written beside the name and behind the value.
fn block(rows: &[&Row], with_unit: bool) -> Block {
    let mut heading = vec![];
    let mut columns: Vec<Column> = vec![];
    let compared = rows.iter().all(|row| row.kind == Kind::Compared);
    let kind = distinct(rows.iter().map(|row| kind(row.kind)));
    if let (Some(row), false, false) = (rows.first(), with_unit, compared) {
        heading.push(match kind[..] {
            [kind] => format!("{}, {kind}", plain(&row.unit)),
            _ => plain(&row.unit),
        });
    }
    let parameters = |row: &&Row| row.parameters.clone();
    let numbers = |row: &&Row| row.numbers.clone();
    let (beside, mut own) = sort_out(rows, &parameters, 0, &mut heading);
    let (behind, numbers_own) = sort_out(rows, &numbers, 1, &mut heading);
    let name = |row: &&Row| match listed(&row.parameters, &beside) {
        list if list.is_empty() => plain(&row.name),
        list => format!("{} ({list})", plain(&row.name)),
    };
    let mut push = |name: &str, right: bool, rank: u8, cell: &dyn Fn(&&Row) -> String| {
        columns.push(Column { name: name.into(), cells: rows.iter().map(cell).collect(), right, rank });
    };
    push("", false, 0, &name);
    columns.append(&mut own);
    let mut push = |name: &str, right: bool, rank: u8, cell: &dyn Fn(&&Row) -> String| {
        columns.push(Column { name: name.into(), cells: rows.iter().map(cell).collect(), right, rank });
    };
    let value = match () {
        _ if compared => "ratio",
        _ if rows.iter().any(|row| row.samples.is_some()) => "median",
        _ if with_unit => "",
        _ => "value",
    };
    let digits = |x: Option<f64>| x.map_or(String::new(), compact);
    push(value, true, 0, &|row| digits(row.median));
    push("p10", true, 3, &|row| digits(row.p10));
    push("p90", true, 2, &|row| digits(row.p90));
    if with_unit {
        push("", false, 0, &|row| plain(&row.unit));
    }
    columns.extend(numbers_own);
    let mut push = |name: &str, rank: u8, cell: &dyn Fn(&&Row) -> String| {
        let cells = rows.iter().map(cell).collect();
        columns.push(Column { name: name.into(), cells, right: false, rank });
    };
    push("", 1, &|row| listed(&row.numbers, &behind));
    if kind.len() > 1 && !with_unit {
        push("", 1, &|row| self::kind(row.kind).into());
    }
    push("throttled", 0, &|row| throttled(row));
    push("verdict", 0, &|row| plain(&row.verdict.clone().unwrap_or_default()));
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
/// `rank`, and the others are returned.
fn sort_out(
    rows: &[&Row],
    of: &dyn Fn(&&Row) -> Map<String, Value>,
    rank: u8,
    heading: &mut Vec<String>,
) -> (Vec<String>, Vec<Column>) {
    let (mut others, mut columns, mut constants) = (vec![], vec![], vec![]);
    let all: Vec<Map<String, Value>> = rows.iter().map(of).collect();
    for key in keys(all.iter()) {
        let cells: Vec<String> = all.iter().map(|map| cell(map, &key)).collect();
        let present: Vec<&String> = cells.iter().filter(|cell| !cell.is_empty()).collect();
        let one = present.iter().all(|cell| *cell == present[0]);
        let name = plain(label(&key));
        match () {
            _ if 2 * present.len() < rows.len() => others.push(key),
            // A number that the rows happen to share says something about each of them.
            _ if one && rows.len() > 3 && (rank == 0 || present.len() == rows.len()) => {
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
        _ => plain(&parameter(map, key)),
    }
}

/// `key value, key value`: those of `keys` that `map` has.
fn listed(map: &Map<String, Value>, keys: &[String]) -> String {
    let pairs = keys.iter().filter(|key| map.get(*key).is_some_and(|value| !value.is_null()));
    let texts: Vec<String> = pairs.map(|key| format!("{} {}", plain(label(key)), cell(map, key))).collect();
    texts.join(", ")
}

fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = vec![];
    for one in all {
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}

// ---- generate ----

fn generate(rows: &[&Row]) -> Vec<Block> {
    let decoding = |row: &Row| row.parameters.contains_key("decoding");
    let drawn = |row: &Row| bucket(row).is_some() || position(row).is_some();
    let chosen =
        |is: &dyn Fn(&Row) -> bool| -> Vec<&Row> { rows.iter().copied().filter(|row| is(row)).collect() };
    let values = chosen(&|row| !decoding(row) && !drawn(row) && row.samples.is_none());
    let counters = chosen(&|row| decoding(row) && row.kind == Kind::Counted);
    let timed = chosen(&|row| decoding(row) && row.kind != Kind::Counted);
    let rest = chosen(&|row| !decoding(row) && !drawn(row) && row.samples.is_some());
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

/// AR and DFlash in columns.
fn side_by_side(rows: &[&Row]) -> Block {
    let others = |row: &Row| {
        let mut parameters = row.parameters.clone();
        parameters.remove("decoding");
        (row.name.clone(), row.unit.clone(), parameters)
    };
    let lines = distinct(rows.iter().map(|row| others(row)));
    let at = |line: &(String, String, Map<String, Value>), mode: &str| {
        let is = |row: &&&Row| row.parameters["decoding"] == mode && others(row) == *line;
        rows.iter().find(is).copied()
    };
    let mut columns = vec![];
    let mut push = |name: &str,
                    right: bool,
                    rank: u8,
                    cell: &dyn Fn(&(String, String, Map<String, Value>)) -> String| {
        columns.push(Column { name: name.into(), cells: lines.iter().map(cell).collect(), right, rank });
    };
    push("", false, 0, &|line| match listed(&line.2, &keys([&line.2].into_iter())) {
        list if list.is_empty() => plain(&line.0),
        list => format!("{} ({list})", plain(&line.0)),
    });
    push("", false, 0, &|line| plain(&line.1));
    for (mode, name) in [("plain", "AR"), ("dflash", "DFlash")] {
        let digits = |row: Option<&Row>, of: &dyn Fn(&Row) -> Option<f64>| {
            row.and_then(of).map_or(String::new(), compact)
        };
        push(name, true, 0, &|line| digits(at(line, mode), &|row| row.median));
        push("p10", true, 3, &|line| digits(at(line, mode), &|row| row.p10));
        push("p90", true, 2, &|line| digits(at(line, mode), &|row| row.p90));
        push("mean", true, 4, &|line| digits(at(line, mode), &|row| row.numbers.get("mean")?.as_f64()));
        push("p99", true, 1, &|line| digits(at(line, mode), &|row| row.numbers.get("p99")?.as_f64()));
    }
    push("throttled", false, 0, &|line| {
        let told = ["plain", "dflash"].map(|mode| at(line, mode).map_or(String::new(), throttled));
        if told[0] == told[1] { told[0].clone() } else { told.join(" / ") }
    });
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

/// Rounds by the tokens they brought, as bars, beside the acceptance of each draft.
fn histogram(rows: &[&Row]) -> Option<Block> {
    let keys = distinct(rows.iter().filter_map(|row| bucket(row).or(position(row))));
    if keys.is_empty() {
        return None;
    }
    let counts = || rows.iter().filter(|row| bucket(row).is_some()).filter_map(|row| row.median);
    let (sum, most) = (counts().sum::<f64>(), counts().fold(0.0, f64::max));
    let tau = rows.iter().find(|row| is_overall_tau(row)).and_then(|row| row.median);
    let tau = tau.map_or(String::new(), |tau| format!(", {} tokens per round (tau)", four_digits(tau)));
    let count = |at: &f64| rows.iter().find(|row| bucket(row) == Some(*at))?.median;
    let draft = |at: &f64| rows.iter().find(|row| position(row) == Some(*at)).copied();
    let percent = |share: Option<f64>| share.map_or(String::new(), |share| format!("{:.1} %", share * 100.0));
    let mut columns = vec![];
    let mut push = |name: &str, right: bool, rank: u8, cell: &dyn Fn(&f64) -> String| {
        columns.push(Column { name: name.into(), cells: keys.iter().map(cell).collect(), right, rank });
    };
    push("tokens", true, 0, &|at| count(at).map_or(String::new(), |_| compact(*at)));
    push("rounds", true, 0, &|at| count(at).map_or(String::new(), compact));
    push("share", true, 1, &|at| percent(count(at).map(|count| count / sum)));
    push("", false, 0, &|at| count(at).map_or(String::new(), |count| bar(count / most, BAR)));
    push("draft", true, 1, &|at| draft(at).map_or(String::new(), |_| compact(*at)));
    push("accepted", true, 1, &|at| percent(draft(at).and_then(|row| row.median)));
    push("if the one before was", true, 2, &|at| {
        percent(draft(at).and_then(|row| row.numbers.get("conditional")?.as_f64()))
    });
    Some(Block { heading: format!("{} rounds{tau}", compact(sum)), columns })
}
