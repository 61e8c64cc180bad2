//! Python's methods of strings and lists, as templates call them.

use super::charge_comparison;
use super::python::{check_length, text, wrong};
use minijinja::value::{Kwargs, Tuple, Value, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State};

type Result<T> = std::result::Result<T, Error>;

/// Calls a method that minijinja's values do not have themselves.
pub(crate) fn call(state: &mut State, value: &Value, method: &str, args: &[Value]) -> Result<Value> {
    if method == "format" {
        // Their texts are checked before they are made part of another.
        args.iter().try_for_each(|arg| text(arg).map(drop))?;
    }
    let compared = match (method, args) {
        ("count" | "index", _) => Some(value),
        ("get", [key, ..]) => Some(key),
        _ => None,
    };
    compared.map(|value| charge_comparison(state, value)).transpose()?;
    let own = match (value.as_str(), value.kind()) {
        (Some(text), _) => string_method(text, method, args),
        (_, ValueKind::Seq) if method == "index" => {
            let (what,): (&Value,) = from_args(args)?;
            let place = value.try_iter()?.position(|item| item == *what);
            place.map(Value::from).ok_or_else(|| wrong("index does not find the item"))
        }
        (_, ValueKind::Seq | ValueKind::Map) if method == "copy" => {
            from_args::<()>(args).map(|()| value.clone())
        }
        _ => Err(ErrorKind::UnknownMethod.into()),
    };
    match own {
        Err(e) if e.kind() == ErrorKind::UnknownMethod => {
            minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
        }
        done => done,
    }
}

fn string_method(text: &str, method: &str, args: &[Value]) -> Result<Value> {
    let whether = |test: fn(char) -> bool| -> Result<Value> {
        let () = from_args(args)?;
        Ok((!text.is_empty() && text.chars().all(test)).into())
    };
    match method {
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&str>,) = from_args(args)?;
            let gone = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
            let text = if method == "rstrip" { text } else { text.trim_start_matches(gone) };
            Ok(if method == "lstrip" { text } else { text.trim_end_matches(gone) }.into())
        }
        "split" | "rsplit" => split(text, method == "rsplit", args),
        "splitlines" => {
            let (keep, options): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep.or(options.get("keepends")?).unwrap_or(false);
            options.assert_all_used()?;
            Ok(lines(text, keep).into())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            if separator.is_empty() {
                return Err(wrong(format!("{method} has an empty separator")));
            }
            let last = method == "rpartition";
            let found = if last { text.rsplit_once(separator) } else { text.split_once(separator) };
            Ok(Value::from(Tuple::from(match found {
                Some((before, after)) => [before, separator, after].map(Value::from),
                None if last => ["", "", text].map(Value::from),
                None => [text, "", ""].map(Value::from),
            })))
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let (from, part) = window(text, start, end);
            if method == "count" {
                return Ok(part.matches(what).count().into());
            }
            let place = if method.starts_with('r') { part.rfind(what) } else { part.find(what) };
            match place {
                Some(place) => Ok((from + part[..place].chars().count()).into()),
                None if method.ends_with("find") => Ok((-1).into()),
                None => Err(wrong(format!("{method} does not find the text"))),
            }
        }
        "startswith" | "endswith" => {
            let (affix, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
            let (_, part) = window(text, start, end);
            let fits = |affix: &Value| match affix.as_str() {
                Some(affix) if method == "startswith" => Ok(part.starts_with(affix)),
                Some(affix) => Ok(part.ends_with(affix)),
                None => {
                    Err(wrong(format!("{method} needs a string or a tuple of strings, not {}", affix.kind())))
                }
            };
            if !affix.is_tuple() {
                return fits(affix).map(Value::from);
            }
            for affix in affix.try_iter()? {
                if fits(&affix)? {
                    return Ok(true.into());
                }
            }
            Ok(false.into())
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "casefold" => {
            let () = from_args(args)?;
            Ok(text.to_lowercase().replace('ß', "ss").replace('ς', "σ").into())
        }
        "swapcase" => {
            let () = from_args(args)?;
            let swap = |c: char| {
                if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() }
            };
            Ok(text.chars().map(swap).collect::<String>().into())
        }
        "title" => {
            let () = from_args(args)?;
            let mut inside = false;
            let mut out = String::new();
            for c in text.chars() {
                if inside {
                    out.extend(c.to_lowercase())
                } else {
                    out.extend(c.to_uppercase())
                }
                inside = c.is_alphabetic();
            }
            Ok(out.into())
        }
        "center" | "ljust" | "rjust" | "zfill" => {
            let (width, fill): (i64, Option<char>) = from_args(args)?;
            let missing = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
            if missing > 1 << 20 {
                return Err(wrong(format!("{method} widens a text by more than a million characters")));
            }
            let left = match method {
                "center" => missing / 2 + (missing & width as usize & 1),
                "ljust" => 0,
                _ => missing,
            };
            let (sign, digits) = match (method, text.chars().next()) {
                ("zfill", Some('+' | '-')) => text.split_at(1),
                _ => ("", text),
            };
            let fill = if method == "zfill" { '0' } else { fill.unwrap_or(' ') }.to_string();
            Ok(format!("{sign}{}{digits}{}", fill.repeat(left), fill.repeat(missing - left)).into())
        }
        "join" => {
            let (items,): (&Value,) = from_args(args)?;
            let mut out = String::new();
            for (i, item) in items.try_iter()?.enumerate() {
                let Some(item) = item.as_str() else {
                    return Err(wrong(format!("join finds a {} among the strings", item.kind())));
                };
                out.push_str(if i == 0 { "" } else { text });
                out.push_str(item);
                check_length(out.len())?;
            }
            Ok(out.into())
        }
        "isspace" => whether(is_space),
        "isdecimal" => whether(|c| c.is_ascii_digit()),
        "isdigit" => whether(|c| c.is_ascii_digit() || "²³¹⁰⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉".contains(c)),
        "istitle" => {
            let titled = string_method(text, "title", args)?;
            Ok((titled.as_str() == Some(text) && text.chars().any(char::is_alphabetic)).into())
        }
        "isprintable" => Ok((!text.chars().any(|c| c.is_control())).into()),
        "isidentifier" => Ok((text.chars().all(|c| c == '_' || c.is_alphanumeric())
            && text.chars().next().is_some_and(|c| !c.is_numeric()))
        .into()),
        _ => Err(ErrorKind::UnknownMethod.into()),
    }
}

/// What Python's `str.isspace` says of a character.
pub(crate) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// The part of a text between two places, each counted in characters and from the end if negative; and the
/// number of characters before it.
fn window(text: &str, start: Option<i64>, end: Option<i64>) -> (usize, &str) {
    let count = text.chars().count();
    let place = |at: i64| {
        let back = usize::try_from(at.unsigned_abs()).unwrap_or(usize::MAX);
        if at < 0 { count.saturating_sub(back) } else { back.min(count) }
    };
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(i64::MAX)));
    let byte = |at: usize| text.char_indices().nth(at).map_or(text.len(), |(byte, _)| byte);
    (start, text.get(byte(start)..byte(end)).unwrap_or_default())
}

/// `str.split` and, with `from_end`, `str.rsplit`.
fn split(text: &str, from_end: bool, args: &[Value]) -> Result<Value> {
    let (separator, limit, options): (Option<&str>, Option<i64>, Kwargs) = from_args(args)?;
    let separator = separator.or(options.get("sep")?);
    let limit = limit.or(options.get("maxsplit")?).and_then(|limit| usize::try_from(limit).ok());
    options.assert_all_used()?;
    let limit = limit.map_or(usize::MAX, |limit| limit.saturating_add(1));
    let mut parts: Vec<&str> = match separator {
        Some("") => return Err(wrong("split has an empty separator")),
        Some(separator) if from_end => text.rsplitn(limit, separator).collect(),
        Some(separator) => text.splitn(limit, separator).collect(),
        None => {
            let mut parts = Vec::new();
            let mut rest = text;
            loop {
                rest = if from_end {
                    rest.trim_end_matches(is_space)
                } else {
                    rest.trim_start_matches(is_space)
                };
                let cut = if from_end { rest.rsplit_once(is_space) } else { rest.split_once(is_space) };
                match cut {
                    _ if rest.is_empty() => break parts,
                    Some((before, after)) if parts.len() + 1 < limit => {
                        let (part, other) = if from_end { (after, before) } else { (before, after) };
                        parts.push(part);
                        rest = other;
                    }
                    _ => {
                        parts.push(rest);
                        break parts;
                    }
                }
            }
        }
    };
    if from_end {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

/// `str.splitlines`, which also splits at vertical tabs, form feeds and Unicode's line separators.
fn lines(text: &str, keep: bool) -> Vec<String> {
    let ends = |c: char| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut lines: Vec<String> = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let line = rest.find(ends).unwrap_or(rest.len());
        let end = match rest[line..].chars().next() {
            Some('\r') if rest[line + 1..].starts_with('\n') => 2,
            Some(c) => c.len_utf8(),
            None => 0,
        };
        lines.push(rest[..if keep { line + end } else { line }].into());
        rest = &rest[line + end..];
    }
    lines
}
