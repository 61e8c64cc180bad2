//! The jinja of chat templates: minijinja, made to give what Python's jinja2 gives with the settings, filters
//! and functions of Hugging Face.
//!
//! | module | owns |
//! | --- | --- |
//! | `source` | the source of a template for minijinja, and the variables that it reads |
//! | `python` | `str`, `repr` and `json.dumps` of values |
//! | `methods` | Python's methods of strings and lists |
//! | `strftime` | dates |

mod methods;
mod python;
pub(crate) mod source;
mod strftime;

use methods::is_space;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{
    Kwargs, Object, ObjectRepr, Rest, StringInput, Value, ValueKind, ValueOrKwargs, from_args,
};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, filters, tests};
use python::{Json, check_length, text, wrong};
use std::fmt::Write;
use std::sync::{Arc, Mutex};

type Result<T> = std::result::Result<T, Error>;

/// An environment without templates.
///
/// # Errors
/// This version returns none.
pub(crate) fn environment() -> Result<Environment<'static>> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, state, value| match state.auto_escape() {
        AutoEscape::None => out.write_str(&text(value)?).map_err(Error::from),
        _ => out.write_str(escape(value)?.as_str().unwrap_or_default()).map_err(Error::from),
    });
    // Makes errors name undefined values.
    environment.set_debug(true);

    environment.add_filter("tojson", to_json);
    environment.add_filter("string", as_text);
    environment.add_filter("__capitalize", filters::capitalize);
    environment.add_filter("__lower", filters::lower);
    environment.add_filter("__reject", filters::reject);
    environment.add_filter("__rejectattr", filters::rejectattr);
    environment.add_filter("__safe", filters::safe);
    environment.add_filter("__select", filters::select);
    environment.add_filter("__selectattr", filters::selectattr);
    environment.add_filter("__title", filters::title);
    environment.add_filter("__upper", filters::upper);
    // These take arguments as texts: (filter, first argument, number). minijinja's conversion has no limit.
    for (name, first, count) in [
        ("capitalize", 0, 1),
        ("lower", 0, 1),
        ("reject", 1, 1),
        ("rejectattr", 1, 2),
        ("safe", 0, 1),
        ("select", 1, 1),
        ("selectattr", 1, 2),
        ("title", 0, 1),
        ("upper", 0, 1),
    ] {
        environment.add_filter(name, move |state: &mut State, args: Rest<Value>| {
            let mut args = args.0;
            for arg in args.iter_mut().skip(first).take(count) {
                *arg = as_text(arg)?;
            }
            let result = state.apply_filter(&format!("__{name}"), &args)?;
            if name.starts_with("select") || name.starts_with("reject") {
                generator(&result)
            } else {
                Ok(result)
            }
        });
    }
    // jinja2 does not have these.
    environment.remove_global("debug");
    for name in ["bool", "chain", "lines", "split", "zip"] {
        environment.remove_filter(name);
    }
    environment.remove_test("startingwith");
    environment.remove_test("endingwith");
    environment.add_filter("attr", |state: &State, value: &Value, name: &Value| {
        value.get_item(&charge_comparison(state, name)?)
    });
    environment.add_filter(source::ITEMS, items_of);
    environment.add_filter(source::COMPARED, charge_comparison);
    environment.add_filter(source::SEARCHED, charge_search);
    environment.add_filter("join", join);
    environment.add_filter("map", map);
    environment.add_filter("length", length);
    environment.add_filter("count", length);
    environment.add_filter("format", format);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("replace", replace);
    environment.add_filter("indent", indent);
    environment.add_filter("truncate", truncate);
    environment.add_filter("wordcount", |value: &Value| {
        let text = text(value)?;
        let word = |c: char| c == '_' || c.is_alphanumeric();
        Ok::<_, Error>(text.split(|c| !word(c)).filter(|word| !word.is_empty()).count())
    });
    environment.add_filter("urlencode", url_encode);
    environment.add_filter("striptags", |value: &Value| text(value).map(|text| strip_tags(&text)));
    environment.add_filter("center", |state: &mut State, value: &Value, width: Option<i64>| {
        methods::call(state, &text(value)?.into(), "center", &[width.unwrap_or(80).into()])
    });
    environment.add_filter("forceescape", |value: &Value| escape(&text(value)?.into()));
    environment.add_filter("filesizeformat", minijinja_contrib::filters::filesizeformat);
    // It would have to break lines as Python's pprint does.
    environment.remove_filter("pprint");
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("first", |value: &Value| match value.is_undefined() {
        true => Ok(Value::UNDEFINED),
        false => filters::first(value),
    });
    environment.add_filter("last", |value: &Value| match value.is_undefined() {
        true => Ok(Value::UNDEFINED),
        false => filters::last(value.clone()),
    });
    environment.add_filter("items", |value: &Value| match value.is_undefined() {
        true => generator(&Vec::<Value>::new().into()),
        false => generator(&filters::items(value)?),
    });
    environment.add_filter("batch", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        generator(&filters::batch(state, value, count, fill)?)
    });
    environment.add_filter("slice", |state: &State, value: Value, count: usize, fill: Option<Value>| {
        generator(&filters::slice(state, value, count, fill)?)
    });
    environment.add_filter("sort", |state: &State, value: &Value, given: Rest<ValueOrKwargs>| {
        let value = charge_comparison(state, value)?;
        filters::sort(state, value, named(given, ["reverse", "case_sensitive", "attribute"])?)
    });
    environment.add_filter("dictsort", |state: &State, value: &Value, given: Rest<ValueOrKwargs>| {
        let value = charge_comparison(state, value)?;
        filters::dictsort(&value, named(given, ["case_sensitive", "by", "reverse"])?)
    });
    environment.add_filter("unique", |state: &State, value: &Value, given: Rest<ValueOrKwargs>| {
        let value = charge_comparison(state, value)?;
        generator(&filters::unique(state, value, named(given, ["case_sensitive", "attribute"])?)?)
    });
    environment.add_filter("min", |state: &State, value: &Value, options: Kwargs| {
        filters::min(state, charge_comparison(state, value)?, options)
    });
    environment.add_filter("max", |state: &State, value: &Value, options: Kwargs| {
        filters::max(state, charge_comparison(state, value)?, options)
    });
    environment.add_filter("groupby", group_by);
    environment.add_filter("trim", |state: &mut State, value: &Value, given: Rest<ValueOrKwargs>| {
        let [chars] = arguments(given, ["chars"])?;
        methods::call(state, &text(value)?.into(), "strip", &[chars.into()])
    });

    type Comparison = fn(&Value, &Value) -> bool;
    for (names, compare) in [
        (["eq", "equalto", "=="], tests::is_eq as Comparison),
        (["ne", "ne", "!="], tests::is_ne),
        (["lt", "lessthan", "<"], tests::is_lt),
        (["le", "le", "<="], tests::is_le),
        (["gt", "greaterthan", ">"], tests::is_gt),
        (["ge", "ge", ">="], tests::is_ge),
    ] {
        for name in names {
            environment.add_test(name, move |state: &State, value: &Value, other: &Value| {
                charge_comparison(state, other).map(|other| compare(value, &other))
            });
        }
    }
    environment.add_test("in", |state: &State, value: &Value, other: &Value| {
        tests::is_in(state, &charge_comparison(state, value)?, &charge_search(state, other)?)
    });
    environment.add_test("iterable", |value: &Value| {
        !matches!(
            value.kind(),
            ValueKind::None | ValueKind::Bool | ValueKind::Number | ValueKind::Plain | ValueKind::Invalid
        )
    });
    environment.add_test("sequence", |value: &Value| {
        // Iterators with a length are ranges.
        let is_range = value.kind() == ValueKind::Iterable && value.len().is_some();
        let kinds = [ValueKind::Undefined, ValueKind::String, ValueKind::Seq, ValueKind::Map];
        is_range || kinds.contains(&value.kind())
    });
    environment.add_test("callable", |value: &Value| match value.kind() {
        // A macro has attributes, as a map has.
        ValueKind::Map => value.to_string().starts_with("<macro "),
        kind => matches!(kind, ValueKind::Plain | ValueKind::Undefined),
    });

    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    environment.add_function("joiner", |given: Rest<ValueOrKwargs>| {
        let [separator] = arguments(given, ["sep"])?;
        Ok::<Value, Error>(minijinja_contrib::globals::joiner(separator.or(Some(", ".into()))))
    });
    environment.add_function("cycler", |items: Rest<Value>| match items.is_empty() {
        true => Err(wrong("cycler needs at least one item")),
        false => Ok(Value::from_object(Cycler { items: items.to_vec(), at: Mutex::new(0) })),
    });
    Ok(environment)
}

/// The message of a `raise_exception` call. Its type distinguishes it from a fault of the template.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct Raised(pub(crate) String);

fn raise_exception(message: &Value) -> Result<Value> {
    Err(wrong("raised").with_source(Raised(text(message)?)))
}

/// The current date and time, for templates that print it. It is in UTC, because the standard library does
/// not know the local time zone.
fn strftime_now(format: &str) -> Result<String> {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    strftime::format(format, now).map_err(wrong)
}

/// jinja's `cycler`.
#[derive(Debug)]
struct Cycler {
    items: Vec<Value>,
    at: Mutex<usize>,
}

impl Object for Cycler {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let at = *self.at.lock().ok()?;
        (key.as_str() == Some("current")).then(|| self.items[at].clone())
    }

    fn call_method(self: &Arc<Self>, _: &mut State<'_, '_>, method: &str, _: &[Value]) -> Result<Value> {
        let mut at = self.at.lock().map_err(|e| wrong(e.to_string()))?;
        match method {
            "next" => {
                let item = self.items[*at].clone();
                *at = (*at + 1) % self.items.len();
                Ok(item)
            }
            "reset" => {
                *at = 0;
                Ok(().into())
            }
            _ => Err(ErrorKind::UnknownMethod.into()),
        }
    }
}

/// A filter's arguments, given by position or by name. Python's names are `names`. None counts as absent.
fn arguments<const N: usize>(given: Rest<ValueOrKwargs>, names: [&str; N]) -> Result<[Option<Value>; N]> {
    let given: Vec<Value> = given.0.into_iter().map(ValueOrKwargs::into_value).collect();
    let (given, options): (&[Value], Kwargs) = from_args(&given)?;
    if given.len() > N {
        return Err(ErrorKind::TooManyArguments.into());
    }
    let mut values = [const { None }; N];
    for (at, name) in names.into_iter().enumerate() {
        let value = given.get(at).cloned().or(options.get(name)?);
        values[at] = value.filter(|value| !value.is_none());
    }
    options.assert_all_used()?;
    Ok(values)
}

/// Arguments by position or by name, all by name.
fn named<const N: usize>(given: Rest<ValueOrKwargs>, names: [&str; N]) -> Result<Kwargs> {
    let values = arguments(given, names)?;
    Ok(names.into_iter().zip(values).filter_map(|(name, value)| Some((name, value?))).collect())
}

/// A generator, which jinja2's lazy filters return: it counts as true, has no length and gives its items
/// once.
fn generator(items: &Value) -> Result<Value> {
    let items: Vec<Value> = items.try_iter()?.collect();
    Ok(Value::make_one_shot_iterator(items.into_iter()))
}

/// The value itself or, of a [`generator`], a list of its items.
fn listed(value: &Value) -> Result<Value> {
    match value.kind() {
        ValueKind::Iterable if value.len().is_none() => Ok(value.try_iter()?.collect()),
        _ => Ok(value.clone()),
    }
}

/// Charges the fuel of comparing or hashing `value`: 8 for each value in it, and 1 for 64 bytes of a text.
/// minijinja does not, and a value that holds another one twice, and so on, has any number of values in it.
/// Returns the value, with the items of a generator, because charging takes them.
fn charge_comparison(state: &State, value: &Value) -> Result<Value> {
    let whole = listed(value)?;
    let mut rest = vec![whole.clone()];
    while let Some(value) = rest.pop() {
        let is_container = matches!(value.kind(), ValueKind::Map | ValueKind::Seq | ValueKind::Iterable);
        state.consume_fuel(value.as_str().map_or(0, |text| text.len() as u64 / 64))?;
        for item in is_container.then(|| value.try_iter()).transpose()?.into_iter().flatten() {
            state.consume_fuel(8)?;
            if value.kind() == ValueKind::Map {
                rest.push(value.get_item(&item)?);
            }
            rest.push(item);
        }
    }
    Ok(whole)
}

/// As [`charge_comparison`], of comparing each item of `container`. Keys are found by their hash.
fn charge_search(state: &State, container: &Value) -> Result<Value> {
    if container.kind() == ValueKind::Map {
        Ok(container.clone())
    } else {
        charge_comparison(state, container)
    }
}

/// What a loop runs over. Python's None has no items, and a text has its characters.
fn items_of(value: &Value) -> Result<Value> {
    match value.as_str() {
        Some(text) => Ok(text.chars().map(Value::from).collect()),
        None if value.is_none() => Err(wrong("a loop needs items, not none")),
        None => listed(value),
    }
}

/// The value itself if it is a text, or as a text.
fn as_text(value: &Value) -> Result<Value> {
    match value.kind() {
        ValueKind::String => Ok(value.clone()),
        _ => text(value).map(Value::from),
    }
}

fn group_by(state: &State, value: Value, attribute: Option<&str>, options: Kwargs) -> Result<Value> {
    filters::groupby(charge_comparison(state, &value)?, attribute, options)
}

/// `map`, which gives a filter its arguments by name, too.
fn map(state: &mut State, value: &Value, given: Rest<ValueOrKwargs>) -> Result<Value> {
    let args: Vec<Value> = given.0.iter().cloned().map(ValueOrKwargs::into_value).collect();
    match args.split_first() {
        Some((filter, args)) if filter.as_str().is_some() => {
            let filter = filter.as_str().unwrap_or_default();
            let mapped = value.try_iter()?.map(|item| {
                state.consume_fuel(1)?;
                state.apply_filter(filter, &[&[item], args].concat())
            });
            generator(&mapped.collect::<Result<_>>()?)
        }
        _ => generator(&filters::map(state, value.clone(), given)?.into()),
    }
}

/// `format`, after a check of the texts that become part of another.
fn format(state: &mut State, value: &Value, given: Rest<ValueOrKwargs>) -> Result<Value> {
    given.0.iter().try_for_each(|arg| text(&arg.clone().into_value()).map(drop))?;
    filters::format(state, value, given)
}

fn is_true(value: Option<Value>) -> bool {
    value.is_some_and(|value| value.is_true())
}

/// `tojson` as Hugging Face defines it: Python's `json.dumps` with `ensure_ascii=False`, not jinja's
/// HTML-safe filter.
fn to_json(value: &Value, given: Rest<ValueOrKwargs>) -> Result<String> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = arguments(given, names)?;
    let indent = indentation(indent)?;
    let separators = match separators {
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
        Some(pair) => match &pair.try_iter()?.collect::<Vec<_>>()[..] {
            [item, key] => (text(item)?, text(key)?),
            _ => return Err(wrong("separators is not a pair")),
        },
    };
    Json { ensure_ascii: is_true(ensure_ascii), indent, separators, sort_keys: is_true(sort_keys) }
        .dumps(value)
}

/// An argument that is a text or a number of spaces.
fn indentation(value: Option<Value>) -> Result<Option<String>> {
    let Some(value) = value else { return Ok(None) };
    if let Some(text) = value.as_str() {
        return Ok(Some(text.into()));
    }
    match usize::try_from(i64::try_from(value)?).unwrap_or(0) {
        spaces if spaces > 1 << 16 => Err(wrong("an indentation has more than 65536 spaces")),
        spaces => Ok(Some(" ".repeat(spaces))),
    }
}

fn join(state: &mut State, value: &Value, given: Rest<ValueOrKwargs>) -> Result<Value> {
    if value.is_none() {
        return Err(wrong("join needs items, not none"));
    }
    let [separator, attribute] = arguments(given, ["d", "attribute"])?;
    let items = match attribute {
        None => value.clone(),
        Some(attribute) => {
            let attribute = Kwargs::from_iter([("attribute", attribute)]);
            state.apply_filter("map", &[value.clone(), attribute.into()])?
        }
    };
    let separator = as_text(&separator.unwrap_or("".into()))?;
    let mut bytes = 0;
    let mut texts = Vec::new();
    for item in items.try_iter()? {
        texts.push(as_text(&item)?);
        let of = |text: Option<&Value>| text.and_then(Value::as_str).map_or(0, str::len);
        bytes += of(texts.last()) + of(Some(&separator));
        check_length(bytes)?;
    }
    let texts = Value::from(texts);
    let separator = StringInput::new(state, &separator)?;
    filters::join(state, &texts, Some(separator), None, Kwargs::from_iter::<[(&str, Value); 0]>([]))
}

fn escape(value: &Value) -> Result<Value> {
    if value.is_safe() {
        return Ok(value.clone());
    }
    let mut out = text(value)?.replace('&', "&amp;");
    for (c, entity) in [('<', "&lt;"), ('>', "&gt;"), ('"', "&#34;"), ('\'', "&#39;")] {
        out = out.replace(c, entity);
    }
    Ok(Value::from_safe_string(out))
}

fn default(value: &Value, given: Rest<ValueOrKwargs>) -> Result<Value> {
    let given: Vec<Value> = given.0.into_iter().map(ValueOrKwargs::into_value).collect();
    let (given, options): (&[Value], Kwargs) = from_args(&given)?;
    // None is a value here: `x | default(none)` is none.
    let argument = |at: usize, name: &str| match given.get(at) {
        None if options.has(name) => options.get(name).map(Some),
        given => Ok(given.cloned()),
    };
    let (other, boolean) = (argument(0, "default_value")?, argument(1, "boolean")?);
    options.assert_all_used()?;
    Ok(match value.is_undefined() || is_true(boolean) && !value.is_true() {
        true => other.unwrap_or("".into()),
        false => value.clone(),
    })
}

fn length(value: &Value) -> Result<usize> {
    match value.kind() {
        ValueKind::Undefined => Ok(0),
        _ => filters::length(value),
    }
}

fn int(value: &Value, given: Rest<ValueOrKwargs>) -> Result<Value> {
    let [default, base] = arguments(given, ["default", "base"])?;
    let base = base.map_or(Ok(10), u32::try_from)?;
    let whole = |float: f64| float.is_finite().then(|| Value::from(float as i128));
    Ok(match value.kind() {
        ValueKind::Bool => Some(u8::from(value.is_true()).into()),
        ValueKind::Number if value.is_integer() => Some(value.clone()),
        ValueKind::Number => f64::try_from(value.clone()).ok().and_then(whole),
        ValueKind::String => {
            let digits = python_digits(value.as_str().unwrap_or_default());
            let prefix = [(2, "0b"), (8, "0o"), (16, "0x")].into_iter().find(|(b, _)| *b == base);
            let (sign, bare) = match digits.strip_prefix(['-', '+']) {
                Some(bare) => (if digits.starts_with('-') { "-" } else { "" }, bare),
                None => ("", &digits[..]),
            };
            let lower = bare.to_lowercase();
            let bare = prefix.and_then(|(_, prefix)| lower.strip_prefix(prefix)).unwrap_or(&lower);
            let valid = (2..=36).contains(&base) && !bare.starts_with(['-', '+']);
            let number = valid.then(|| i128::from_str_radix(&format!("{sign}{bare}"), base).ok()).flatten();
            number.map(Value::from).or_else(|| digits.parse().ok().and_then(whole))
        }
        _ => None,
    }
    .or(default)
    .unwrap_or(0.into()))
}

fn float(value: &Value, given: Rest<ValueOrKwargs>) -> Result<Value> {
    let [default] = arguments(given, ["default"])?;
    Ok(match value.kind() {
        ValueKind::Bool => Some(f64::from(u8::from(value.is_true()))),
        ValueKind::Number => f64::try_from(value.clone()).ok(),
        ValueKind::String => python_digits(value.as_str().unwrap_or_default()).parse().ok(),
        _ => None,
    }
    .map(Value::from)
    .or(default)
    .unwrap_or(0.0.into()))
}

/// A number's text without the space around it and the underscores between digits that Python allows.
fn python_digits(text: &str) -> String {
    let text = text.trim_matches(is_space);
    let chars: Vec<char> = text.chars().collect();
    let between = |at: usize| {
        chars[at] == '_'
            && at > 0
            && chars[at - 1].is_alphanumeric()
            && chars.get(at + 1).is_some_and(|c| c.is_alphanumeric())
    };
    (0..chars.len()).filter(|at| !between(*at)).map(|at| chars[at]).collect()
}

fn replace(value: &Value, given: Rest<ValueOrKwargs>) -> Result<String> {
    let [old, new, count] = arguments(given, ["old", "new", "count"])?;
    let count = count.map_or(Ok(-1), i64::try_from)?;
    let (Some(old), Some(new)) = (old, new) else { return Err(ErrorKind::MissingArgument.into()) };
    let (value, old, new) = (text(value)?, text(&old)?, text(&new)?);
    check_length(value.matches(&old).count().saturating_mul(new.len()))?;
    Ok(value.replacen(&old, &new, usize::try_from(count).unwrap_or(usize::MAX)))
}

fn indent(value: &Value, given: Rest<ValueOrKwargs>) -> Result<String> {
    let [width, first, blank] = arguments(given, ["width", "first", "blank"])?;
    let width = indentation(width)?.unwrap_or("    ".into());
    let (first, blank) = (is_true(first), is_true(blank));
    let mut out = String::new();
    for (i, line) in text(value)?.split('\n').enumerate() {
        out.push_str(if i == 0 { "" } else { "\n" });
        let indented = if i == 0 { first } else { blank || !line.is_empty() };
        out.push_str(if indented { &width } else { "" });
        out.push_str(line);
        check_length(out.len())?;
    }
    Ok(out)
}

fn truncate(value: &Value, given: Rest<ValueOrKwargs>) -> Result<String> {
    let [length, kill_words, end, leeway] = arguments(given, ["length", "killwords", "end", "leeway"])?;
    let length = length.map_or(Ok(255), usize::try_from)?;
    let end = end.map_or(Ok("...".into()), |end| text(&end))?;
    let leeway = leeway.map_or(Ok(5), usize::try_from)?;
    let text = text(value)?;
    let Some(kept) = length.checked_sub(end.chars().count()) else {
        return Err(wrong(format!("truncate has a length of {length}, which is shorter than its end")));
    };
    if text.chars().count() <= length.saturating_add(leeway) {
        return Ok(text);
    }
    let start: String = text.chars().take(kept).collect();
    let word = if is_true(kill_words) {
        &start
    } else {
        start.rsplit_once(' ').map_or(&start[..], |(before, _)| before)
    };
    Ok(format!("{word}{end}"))
}

/// `urlencode`: of a text, or of pairs as a query.
fn url_encode(value: &Value) -> Result<String> {
    let quote = |text: &str, query: bool| {
        let mut out = String::new();
        for byte in text.bytes() {
            match byte {
                b' ' if query => out.push('+'),
                b'/' if query => out.push_str("%2F"),
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' | b'/' => {
                    out.push(byte.into())
                }
                _ => {
                    let _ = write!(out, "%{byte:02X}");
                }
            }
        }
        out
    };
    let pair = |key: &Value, value: &Value| {
        Ok(format!("{}={}", quote(&text(key)?, true), quote(&text(value)?, true)))
    };
    let pairs = match value.kind() {
        ValueKind::Map => {
            value.try_iter()?.map(|key| pair(&key, &value.get_item(&key)?)).collect::<Result<Vec<_>>>()?
        }
        ValueKind::Seq | ValueKind::Iterable => value
            .try_iter()?
            .map(|item| pair(&item.get_item_by_index(0)?, &item.get_item_by_index(1)?))
            .collect::<Result<Vec<_>>>()?,
        _ => return Ok(quote(&text(value)?, false)),
    };
    Ok(pairs.join("&"))
}

/// Removes comments and tags of HTML, joins what is left with single spaces and resolves common entities.
fn strip_tags(text: &str) -> String {
    let mut text = text.to_string();
    for (open, close) in [("<!--", "-->"), ("<", ">")] {
        let mut kept = String::new();
        let mut rest = &text[..];
        while let Some((before, tag)) = rest.split_once(open)
            && let Some((_, after)) = tag.split_once(close)
        {
            kept.push_str(before);
            rest = after;
        }
        kept.push_str(rest);
        text = kept;
    }
    let words: Vec<&str> = text.split(is_space).filter(|word| !word.is_empty()).collect();
    let mut text = words.join(" ");
    for (entity, c) in [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#34;", "\""),
        ("&#39;", "'"),
        ("&nbsp;", "\u{a0}"),
        ("&amp;", "&"),
    ] {
        text = text.replace(entity, c);
    }
    text
}
