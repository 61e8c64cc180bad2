//! Python's text forms of template values: `str`, `repr` and `json.dumps`.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};
use std::fmt::Write;

/// Maximum bytes of one text. A value that holds another one twice, and so on, would have any length.
const TEXT_LIMIT: usize = 16 << 20;

/// Checks the length of a text.
///
/// # Errors
/// If it is more than [`TEXT_LIMIT`].
pub(crate) fn check_length(bytes: usize) -> Result<(), Error> {
    match bytes > TEXT_LIMIT {
        true => Err(wrong(format!("a text has more than {TEXT_LIMIT} bytes"))),
        false => Ok(()),
    }
}

/// `str(value)`; an undefined value is empty, as in jinja.
///
/// # Errors
/// As [`check_length`].
pub(crate) fn text(value: &Value) -> Result<String, Error> {
    let mut out = String::new();
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::String => out.push_str(value.as_str().unwrap_or_default()),
        _ => write_repr(value, &mut out)?,
    }
    Ok(out)
}

/// Appends `repr(value)`.
fn write_repr(value: &Value, out: &mut String) -> Result<(), Error> {
    check_length(out.len())?;
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => string_repr(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let (open, close) = if value.is_tuple() { ('(', ')') } else { ('[', ']') };
            out.push(open);
            let mut count = 0;
            for item in value.try_iter().into_iter().flatten() {
                out.push_str(if count == 0 { "" } else { ", " });
                write_repr(&item, out)?;
                count += 1;
            }
            if value.is_tuple() && count == 1 {
                out.push(',');
            }
            out.push(close);
        }
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if i == 0 { "" } else { ", " });
                write_repr(&key, out)?;
                out.push_str(": ");
                write_repr(&value.get_item(&key).unwrap_or_default(), out)?;
            }
            out.push('}');
        }
        _ => out.push_str(&value.to_string()),
    }
    Ok(())
}

fn string_repr(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        // Rust and Python agree on what is printable. A leading x keeps Rust from escaping combining marks.
        let printable = || c == ' ' || ['x', c].iter().collect::<String>().escape_debug().count() == 2;
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            _ if c == quote => out.extend(['\\', c]),
            '\'' | '"' => out.push(c),
            _ if printable() => out.push(c),
            _ => {
                let code = u32::from(c);
                let _ = match code {
                    0..=0xff => write!(out, "\\x{code:02x}"),
                    0x100..=0xffff => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// A number as `repr` writes it: 1e-07, not 0.0000001.
fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => float_text(float),
        _ => value.to_string(),
    }
}

fn float_text(float: f64) -> String {
    if !float.is_finite() {
        return float.to_string().to_lowercase();
    }
    let scientific = format!("{float:e}");
    match scientific.split_once('e').map(|(digits, exponent)| (digits, exponent.parse::<i32>())) {
        Some((digits, Ok(exponent))) if !(-4..16).contains(&exponent) => {
            format!("{digits}e{}{:02}", if exponent < 0 { '-' } else { '+' }, exponent.abs())
        }
        _ => format!("{float:?}"),
    }
}

/// The arguments of `json.dumps`.
pub(crate) struct Json {
    pub(crate) ensure_ascii: bool,
    /// What one level of nesting is indented by; `None` for everything on one line.
    pub(crate) indent: Option<String>,
    /// Between items, and between key and value.
    pub(crate) separators: (String, String),
    pub(crate) sort_keys: bool,
}

impl Json {
    /// Maximum bytes of one line's indentation.
    const INDENT_LIMIT: usize = 1 << 16;

    /// `json.dumps(value)`.
    ///
    /// # Errors
    /// If JSON has no such value.
    pub(crate) fn dumps(&self, value: &Value) -> Result<String, Error> {
        let mut out = String::new();
        self.write(value, 0, &mut out)?;
        Ok(out)
    }

    fn write(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        check_length(out.len())?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => out.push_str(&match number(value).as_str() {
                "nan" => "NaN".into(),
                "inf" => "Infinity".into(),
                "-inf" => "-Infinity".into(),
                finite => finite.to_string(),
            }),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Iterable if value.len().is_none() => {
                return Err(wrong("tojson cannot write a generator, expected a list"));
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let mut empty = true;
                for item in value.try_iter()? {
                    out.push_str(if empty { "[" } else { &self.separators.0 });
                    self.line(depth + 1, out)?;
                    self.write(&item, depth + 1, out)?;
                    empty = false;
                }
                self.close(empty, "[]", depth, out)?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                for (i, key) in keys.iter().enumerate() {
                    out.push_str(if i == 0 { "{" } else { &self.separators.0 });
                    self.line(depth + 1, out)?;
                    match key.kind() {
                        ValueKind::String => self.string(key.as_str().unwrap_or_default(), out),
                        ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                            out.push('"');
                            self.write(key, depth, out)?;
                            out.push('"');
                        }
                        other => return Err(wrong(format!("tojson finds a key that is a {other}"))),
                    }
                    out.push_str(&self.separators.1);
                    self.write(&value.get_item(key)?, depth + 1, out)?;
                }
                self.close(keys.is_empty(), "{}", depth, out)?;
            }
            other => return Err(wrong(format!("tojson cannot write a value of type {other}"))),
        }
        Ok(())
    }

    /// Ends a list or an object. `brackets` are its two brackets.
    fn close(&self, empty: bool, brackets: &str, depth: usize, out: &mut String) -> Result<(), Error> {
        if empty {
            out.push_str(brackets);
            return Ok(());
        }
        self.line(depth, out)?;
        out.push_str(&brackets[1..]);
        Ok(())
    }

    fn line(&self, depth: usize, out: &mut String) -> Result<(), Error> {
        let Some(indent) = &self.indent else { return Ok(()) };
        if indent.len().saturating_mul(depth) > Self::INDENT_LIMIT {
            return Err(wrong(format!("tojson indents a line by more than {} bytes", Self::INDENT_LIMIT)));
        }
        out.push('\n');
        out.push_str(&indent.repeat(depth));
        Ok(())
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                _ if c < ' ' || self.ensure_ascii && !(' '..='~').contains(&c) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                _ => out.push(c),
            }
        }
        out.push('"');
    }
}

/// An error of a template.
pub(crate) fn wrong(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}
