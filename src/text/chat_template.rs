//! Chat templates: jinja with the filters, functions and whitespace rules of Hugging Face.
//!
//! A template comes with a checkpoint and is untrusted. Its length and the number of instructions per
//! rendering are bounded. The memory it allocates is not, as in Hugging Face's sandbox.

use crate::error::one_line;
use crate::text::untrusted::{TEMPLATE_STACKS, guarded};
use crate::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value};
use minijinja::{Environment, ErrorKind};

/// Maximum instructions of one rendering, enough for several thousand messages.
const TEMPLATE_FUEL: u64 = 500_000;
/// Maximum bytes of a chat template. Published ones have less than 32 KiB.
const TEMPLATE_LIMIT: usize = 64 << 10;

/// A parsed chat template.
pub(crate) struct Template {
    /// Holds the template under the name `chat_template`.
    environment: Environment<'static>,
    /// The template's name in errors.
    name: String,
    /// Whether it overrides the model's own template. Its faults are then [`Error::Usage`], not
    /// [`Error::Model`].
    from_user: bool,
}

impl Template {
    /// Parses `source`. `name` is the template's name in errors.
    pub(crate) fn parse(name: String, source: String, from_user: bool) -> Result<Self> {
        if source.len() > TEMPLATE_LIMIT {
            let what = format!("{name} has {} bytes, expected at most {TEMPLATE_LIMIT}", source.len());
            return Err(Self::fault(from_user, what));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Internal(e.to_string()))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_fuel(Some(TEMPLATE_FUEL));
        environment.add_filter("tojson", to_json);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        // Makes errors name undefined values.
        environment.set_debug(true);
        let parse = || {
            let result = environment.add_template_owned("chat_template", source);
            result.map_err(|e| Self::fault(from_user, Self::sentence(&name, "is not a template", &e)))
        };
        let panicked = |what| Self::fault(from_user, format!("{name} is not a template: {what}"));
        guarded(TEMPLATE_STACKS, parse, panicked)??;
        Ok(Template { environment, name, from_user })
    }

    /// Renders the template. `variables` is a JSON object.
    pub(crate) fn render(&self, variables: serde_json::Value) -> Result<String> {
        // An error can hold deeply nested values, so it is also formatted and dropped on the deep stack.
        let render = || {
            let template = self.environment.get_template("chat_template");
            let result = template.and_then(|template| template.render(Value::from(Serde(variables))));
            result.map_err(|error| self.explain(&error))
        };
        let panicked = |what| Self::fault(self.from_user, format!("{} failed: {what}", self.name));
        guarded(TEMPLATE_STACKS, render, panicked)?
    }

    fn explain(&self, error: &minijinja::Error) -> Error {
        let mut cause: Option<&dyn std::error::Error> = Some(error);
        while let Some(one) = cause {
            if let Some(Raised(message)) = one.downcast_ref() {
                let message = one_line(message);
                return Error::Usage(format!("{} refuses this conversation: {message}", self.name));
            }
            cause = one.source();
        }
        Self::fault(self.from_user, Self::sentence(&self.name, "failed", error))
    }

    fn fault(from_user: bool, sentence: String) -> Error {
        if from_user { Error::Usage(sentence) } else { Error::Model(sentence) }
    }

    fn sentence(name: &str, verb: &str, error: &minijinja::Error) -> String {
        let place = error.line().map_or(String::new(), |line| format!(" in line {line}"));
        let detail = match (error.kind(), error.detail()) {
            (ErrorKind::OutOfFuel, _) => format!("takes more than {TEMPLATE_FUEL} instructions"),
            (kind, Some(detail)) => format!("{kind}: {}", one_line(detail)),
            (kind, None) => kind.to_string(),
        };
        format!("{name} {verb}{place}: {detail}")
    }
}

/// The message of a `raise_exception` call. Its type distinguishes it from a fault of the template.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message)))
}

/// `tojson` as Hugging Face defines it: Python's `json.dumps` with `ensure_ascii=False`, not jinja's
/// HTML-safe filter.
fn to_json(
    value: Value,
    indent: Option<usize>,
    options: Kwargs,
) -> std::result::Result<String, minijinja::Error> {
    let indent = options.get::<Option<usize>>("indent")?.or(indent);
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    if options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false) {
        return Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            "tojson does not support ensure_ascii=true",
        ));
    }
    options.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        None if indent.is_some() => (",", ": "),
        None => (", ", ": "),
        Some([item, key]) => (item.as_str(), key.as_str()),
        Some(_) => {
            return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "separators is not a pair"));
        }
    };
    let value = serde_json::to_value(&value)
        .map_err(|e| minijinja::Error::new(ErrorKind::BadSerialization, e.to_string()))?;
    let mut out = String::new();
    write_json(&value, &JsonStyle { item, key, indent, sort_keys }, 0, &mut out);
    Ok(out)
}

struct JsonStyle<'a> {
    item: &'a str,
    key: &'a str,
    indent: Option<usize>,
    sort_keys: bool,
}

fn write_json(value: &serde_json::Value, style: &JsonStyle, depth: usize, out: &mut String) {
    let line = |depth: usize, out: &mut String| {
        if let Some(indent) = style.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent.saturating_mul(depth).min(1 << 16)));
        }
    };
    match value {
        serde_json::Value::Array(items) if !items.is_empty() => {
            for (i, item) in items.iter().enumerate() {
                out.push_str(if i == 0 { "[" } else { style.item });
                line(depth + 1, out);
                write_json(item, style, depth + 1, out);
            }
            line(depth, out);
            out.push(']');
        }
        serde_json::Value::Object(map) if !map.is_empty() => {
            let mut pairs: Vec<_> = map.iter().collect();
            if style.sort_keys {
                pairs.sort_by_key(|(key, _)| key.as_str());
            }
            for (i, (key, item)) in pairs.into_iter().enumerate() {
                out.push_str(if i == 0 { "{" } else { style.item });
                line(depth + 1, out);
                out.push_str(&serde_json::Value::from(key.as_str()).to_string());
                out.push_str(style.key);
                write_json(item, style, depth + 1, out);
            }
            line(depth, out);
            out.push('}');
        }
        leaf => out.push_str(&leaf.to_string()),
    }
}

/// The current date and time, for templates that print it. It is in UTC, because the standard library does
/// not know the local time zone.
fn strftime_now(format: String) -> std::result::Result<String, minijinja::Error> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |t| t.as_secs());
    strftime(&format, now).map_err(|what| minijinja::Error::new(ErrorKind::InvalidOperation, what))
}

/// Python's `strftime` for a UTC time in seconds since 1970. Supports the directives that are common in
/// prompts, and glibc's `-` flag for numbers without padding.
fn strftime(format: &str, seconds: u64) -> std::result::Result<String, String> {
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    const MONTHS: [(&str, u64); 12] = [
        ("January", 31),
        ("February", 28),
        ("March", 31),
        ("April", 30),
        ("May", 31),
        ("June", 30),
        ("July", 31),
        ("August", 31),
        ("September", 30),
        ("October", 31),
        ("November", 30),
        ("December", 31),
    ];
    let leap = |year: u64| year.is_multiple_of(4) && !year.is_multiple_of(100) || year.is_multiple_of(400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let weekday = DAYS[(seconds / 86400 % 7) as usize];
    let (mut year, mut day) = (1970, seconds / 86400);
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = day + 1;
    let mut month = 0;
    while day >= MONTHS[month].1 + u64::from(month == 1 && leap(year)) {
        day -= MONTHS[month].1 + u64::from(month == 1 && leap(year));
        month += 1;
    }
    let (month_name, month, day) = (MONTHS[month].0, month as u64 + 1, day + 1);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let mut number = |value: u64, width: usize, fill: char| {
            let digits = value.to_string();
            let missing = if padded { width.saturating_sub(digits.len()) } else { 0 };
            out.extend(std::iter::repeat_n(fill, missing));
            out.push_str(&digits);
        };
        match directive {
            Some('Y') => number(year, 4, '0'),
            Some('y') => number(year % 100, 2, '0'),
            Some('m') => number(month, 2, '0'),
            Some('d') => number(day, 2, '0'),
            Some('e') => number(day, 2, ' '),
            Some('j') => number(day_of_year, 3, '0'),
            Some('H') => number(hour, 2, '0'),
            Some('I') => number((hour + 11) % 12 + 1, 2, '0'),
            Some('M') => number(minute, 2, '0'),
            Some('S') => number(second, 2, '0'),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('B') => out.push_str(month_name),
            Some('b') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(weekday),
            Some('a') => out.push_str(&weekday[..3]),
            Some('F') => out.push_str(&strftime("%Y-%m-%d", seconds)?),
            Some('T') => out.push_str(&strftime("%H:%M:%S", seconds)?),
            Some('Z') => out.push_str("UTC"),
            Some('z') => out.push_str("+0000"),
            Some('%') => out.push('%'),
            Some(other) => return Err(format!("strftime_now does not know %{other}")),
            None => return Err("strftime_now: the format ends in %".into()),
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // From Python: datetime.fromtimestamp(t, timezone.utc).strftime(...)
        let format = "%Y-%m-%d %H:%M:%S %j %a %b|%A %B %-d %e %I%p %y %F %T %Z%z 100%%";
        for (seconds, expected) in [
            (
                0,
                "1970-01-01 00:00:00 001 Thu Jan|Thursday January 1  1 12AM 70 1970-01-01 00:00:00 UTC+0000 100%",
            ),
            (
                946684799,
                "1999-12-31 23:59:59 365 Fri Dec|Friday December 31 31 11PM 99 1999-12-31 23:59:59 UTC+0000 100%",
            ),
            (
                951825601,
                "2000-02-29 12:00:01 060 Tue Feb|Tuesday February 29 29 12PM 00 2000-02-29 12:00:01 UTC+0000 100%",
            ),
            (
                978224523,
                "2000-12-31 01:02:03 366 Sun Dec|Sunday December 31 31 01AM 00 2000-12-31 01:02:03 UTC+0000 100%",
            ),
            (
                1709211909,
                "2024-02-29 13:05:09 060 Thu Feb|Thursday February 29 29 01PM 24 2024-02-29 13:05:09 UTC+0000 100%",
            ),
            (
                1772323200,
                "2026-03-01 00:00:00 060 Sun Mar|Sunday March 1  1 12AM 26 2026-03-01 00:00:00 UTC+0000 100%",
            ),
            (
                4107585599,
                "2100-03-01 11:59:59 060 Mon Mar|Monday March 1  1 11AM 00 2100-03-01 11:59:59 UTC+0000 100%",
            ),
        ] {
            assert_eq!(strftime(format, seconds).unwrap(), expected);
        }
        assert!(strftime("%Q", 0).unwrap_err().contains("%Q"));
        assert!(strftime("100%", 0).is_err());
    }
}
