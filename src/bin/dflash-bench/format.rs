//! How values look to people: numbers, labels and printable text. Everything that prints uses it, and it uses
//! nothing else.

use serde_json::{Map, Value, json};

/// What `dflash-bench` writes to stdout.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Format {
    Table,
    Markdown,
    Csv,
    Json,
}

/// `text` without control characters: names in a record may hold sequences that move a terminal's cursor.
pub fn printable(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// Four significant digits. Whole numbers are printed in full.
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

/// As [`four_digits`], without zeros at the end of a fraction.
pub fn short(x: f64) -> String {
    let text = four_digits(x);
    match text.contains('.') && !text.contains('e') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

/// As [`four_digits`], but numbers from a million on have a suffix: `36.09M`. For tables on a terminal.
pub fn compact(x: f64) -> String {
    let (scale, suffix) = match x.abs() {
        size if (1e6..1e9).contains(&size) => (1e6, "M"),
        size if (1e9..1e12).contains(&size) => (1e9, "G"),
        size if (1e12..1e15).contains(&size) => (1e12, "T"),
        _ => return four_digits(x),
    };
    let scaled = x / scale;
    let before = scaled.abs().log10().floor() as i32 + 1;
    format!("{scaled:.*}{suffix}", (4 - before).max(0) as usize)
}

/// A value of `parameters` or `numbers` of a row: numbers by `number`, texts as they are, null as nothing.
pub fn shown_by(value: Option<&Value>, number: impl Fn(f64) -> String) -> String {
    match value {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.as_f64().map_or(value.to_string(), number),
    }
}

/// As [`shown_by`], with [`four_digits`].
pub fn shown(value: Option<&Value>) -> String {
    shown_by(value, four_digits)
}

/// The value of a row's parameter as tables and pages show it. Records keep `plain` and `dflash`, which
/// scripts read.
pub fn parameter(parameters: &Map<String, Value>, key: &str) -> String {
    match (key, parameters.get(key).and_then(Value::as_str)) {
        ("decoding", Some("plain")) => "AR".into(),
        ("decoding", Some("dflash")) => "DFlash".into(),
        _ => shown(parameters.get(key)),
    }
}

/// Every key of these maps, in the order of first appearance.
pub fn keys<'a>(maps: impl Iterator<Item = &'a Map<String, Value>>) -> Vec<String> {
    distinct(maps.flat_map(|map| map.keys()).cloned())
}

/// The label of a key in a record. Keys never change; these have older words in them.
pub fn label(key: &str) -> &str {
    match key {
        "floor ms" => "roofline ms",
        "floor us" => "roofline us",
        "share of floor" => "of roofline",
        "share of ceiling" => "of ceiling",
        "share of card" => "of card memory",
        other => other,
    }
}

/// Distinct, in the order of their first appearance.
pub fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut found = vec![];
    for one in all {
        if !found.contains(&one) {
            found.push(one);
        }
    }
    found
}

/// The members of both objects.
pub fn merged(mut all: Value, more: Value) -> Value {
    if let (Value::Object(all), Value::Object(more)) = (&mut all, more) {
        all.extend(more);
    }
    all
}

/// A JSON number, without a decimal point where there is no fraction.
pub fn whole_or_not(x: f64) -> Value {
    if x.fract() == 0.0 { json!(x as u64) } else { json!(x) }
}

/// `text` in lines of at most `width` characters, broken between words. A longer word has its own line.
pub fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![];
    let mut line = String::new();
    for word in text.split(' ') {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(std::mem::take(&mut line));
        } else if !line.is_empty() {
            line.push(' ');
        }
        line += word;
    }
    lines.push(line);
    lines
}

/// A horizontal bar of `share` (0 to 1) of `width` characters, in eighths of a character. Any share above 0
/// shows.
pub fn bar(share: f64, width: usize) -> String {
    const EIGHTHS: [&str; 8] = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"];
    let eighths = (share.clamp(0.0, 1.0) * width as f64 * 8.0).ceil() as usize;
    "█".repeat(eighths / 8) + EIGHTHS[eighths % 8]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_four_significant_digits() {
        let shown = [3.85321, 0.20114, 1244.66, 98765.4, 147456.0, 0.00012346, 1e-7, 16.0, 99.996, 9.9999];
        let expected =
            ["3.853", "0.2011", "1245", "98765", "147456", "0.0001235", "1.000e-7", "16", "100.00", "10.000"];
        assert_eq!(shown.map(four_digits), expected);
        assert_eq!([0.5, 16.0, 1.25e-7, 1200.0].map(short), ["0.5", "16", "1.250e-7", "1200"]);
    }

    #[test]
    fn compact_numbers_have_a_suffix_from_a_million_on() {
        let shown = [999_999.0, 1e6, 36_087_040.0, -2.5e6, 1.2345e9, 7e12, 1e15, f64::INFINITY, 0.5];
        let expected =
            ["999999", "1.000M", "36.09M", "-2.500M", "1.234G", "7.000T", "1.000e15", "inf", "0.5000"];
        assert_eq!(shown.map(compact), expected);
    }

    #[test]
    fn text_wraps_between_words() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("much-too-long a", 4), ["much-too-long", "a"]);
        assert_eq!(wrapped("", 4), [""]);
    }

    #[test]
    fn a_bar_is_as_long_as_its_share_and_never_lost() {
        assert_eq!(bar(1.0, 4), "████");
        assert_eq!(bar(0.5, 4), "██");
        assert_eq!(bar(0.28, 4), "█▏");
        assert_eq!((bar(0.0, 4), bar(1e-9, 4), bar(7.0, 2)), (String::new(), "▏".into(), "██".into()));
    }

    #[test]
    fn labels_use_todays_words_and_keys_stay() {
        let parameters = serde_json::json!({ "decoding": "plain", "batch": 4, "mean": "plain" });
        let parameters = parameters.as_object().unwrap();
        let shown = ["decoding", "batch", "mean", "none"].map(|key| parameter(parameters, key));
        assert_eq!(shown, ["AR", "4", "plain", ""]);
        assert_eq!([label("floor ms"), label("GB")], ["roofline ms", "GB"]);
    }
}
