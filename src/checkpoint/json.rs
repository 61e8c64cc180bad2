//! Reads fields of an untrusted JSON file with checked types and ranges. Errors name the file, the field's
//! path and its value.

use crate::checkpoint::folder::Folder;
use crate::error::{excerpt, one_line};
use crate::{Error, Result};
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use serde_json::{Map, Value};

/// One JSON file of a folder, whose top level is an object.
pub(crate) struct Document {
    pub(crate) file: String,
    pub(crate) map: Map<String, Value>,
}

impl Document {
    /// Maximum bytes of a file: more than any real configuration has, and so few that parsing takes little
    /// memory.
    const MAX_BYTES: usize = 4 << 20;

    pub(crate) fn open(folder: &Folder, name: &str) -> Result<Option<Document>> {
        folder.file(name)?.map(|bytes| Document::parse(folder.path(name), &bytes)).transpose()
    }

    pub(crate) fn need(folder: &Folder, name: &str) -> Result<Document> {
        Document::parse(folder.path(name), &folder.need(name)?)
    }

    fn parse(file: String, bytes: &[u8]) -> Result<Document> {
        if bytes.len() > Document::MAX_BYTES {
            return Err(Error::Model(format!(
                "{file} has {} bytes, expected a configuration of at most {}",
                bytes.len(),
                Document::MAX_BYTES
            )));
        }
        Ok(Document { map: parse(&file, bytes)?, file })
    }

    pub(crate) fn fields(&self) -> Fields<'_> {
        Fields { file: &self.file, prefix: "", map: &self.map }
    }
}

/// Parses a file whose top level is a JSON object. serde alone would also make a struct of a list.
pub(crate) fn parse<T: DeserializeOwned>(file: &str, bytes: &[u8]) -> Result<T> {
    let wrong = |what: String| Error::Model(format!("{file} {what}"));
    let bytes = without_mark(bytes);
    if let Some(what) = other_kind(bytes) {
        return Err(wrong(format!("is {what}, expected JSON")));
    }
    let is_object = bytes.trim_ascii_start().starts_with(b"{");
    let e = match serde_json::from_slice(bytes) {
        Ok(value) if is_object => return Ok(value),
        Err(e) if is_object || !e.is_data() => e,
        _ => return Err(wrong("is not a JSON object".into())),
    };
    let what = match e.classify() {
        Category::Eof => "is cut off",
        Category::Data => "is malformed",
        Category::Syntax | Category::Io => "is not valid JSON",
    };
    let hint = if has_python_number(bytes) { " (NaN and Infinity are not valid JSON)" } else { "" };
    Err(wrong(format!("{what}: {}{hint}", one_line(&e.to_string()))))
}

/// The bytes without a byte order mark at their start.
pub(crate) fn without_mark(bytes: &[u8]) -> &[u8] {
    bytes.strip_prefix("\u{feff}".as_bytes()).unwrap_or(bytes)
}

/// How a file begins that Git LFS left in the place of another.
pub(crate) const LFS_POINTER: &[u8] = b"version https://git-lfs";

/// What the bytes of a file are, if they cannot be JSON.
pub(crate) fn other_kind(bytes: &[u8]) -> Option<&'static str> {
    match bytes.trim_ascii_start() {
        b"" => Some("empty"),
        [b'<', ..] => Some("an HTML or XML page"),
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => Some("UTF-16"),
        [b'P', b'K', 3, 4, ..] => Some("a zip archive"),
        [0x1f, 0x8b, ..] => Some("compressed by gzip"),
        start if start.starts_with(LFS_POINTER) => Some("a Git LFS pointer, the file itself was not fetched"),
        _ => None,
    }
}

/// Whether the text has a bare `NaN` or `Infinity` in place of a value.
fn has_python_number(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    ["NaN", "Infinity"].iter().any(|word| {
        text.match_indices(word).any(|(at, _)| {
            let before = text[..at].trim_end_matches('-').trim_end();
            before.ends_with([':', ',', '['])
        })
    })
}

/// An object in a file. `prefix` is its path within the file: empty, or ending in a dot.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    pub(crate) file: &'a str,
    pub(crate) prefix: &'a str,
    pub(crate) map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The field `name`. Null counts as absent, as in Hugging Face.
    pub(crate) fn get(&self, name: &str) -> Option<Field<'a>> {
        let value = self.map.get(name).filter(|value| !value.is_null())?;
        Some(Field { file: self.file, name: format!("{}{name}", self.prefix), value })
    }

    pub(crate) fn need(&self, name: &str) -> Result<Field<'a>> {
        self.get(name).ok_or_else(|| self.absent(name))
    }

    pub(crate) fn absent(&self, name: &str) -> Error {
        Error::Model(format!("{}: {}{name} is absent", self.file, self.prefix))
    }

    pub(crate) fn unsupported(&self, name: &str, found: &str, expected: &str) -> Error {
        let (file, prefix, found) = (self.file, self.prefix, excerpt(found));
        Error::Unsupported(format!(
            "{file}: {prefix}{name} is {found}, which this engine does not run: expected {expected}"
        ))
    }

    /// Checks that a string field, if it is present, has this value.
    pub(crate) fn only(&self, name: &str, expected: &str) -> Result<()> {
        match self.get(name) {
            Some(field) if field.string()? != expected => {
                Err(self.unsupported(name, field.string()?, expected))
            }
            _ => Ok(()),
        }
    }

    /// The only entry of `architectures`.
    pub(crate) fn architecture(&self) -> Result<&'a str> {
        let field = self.need("architectures")?;
        match field.value.as_array().map(Vec::as_slice) {
            Some([Value::String(name)]) => Ok(name),
            _ => Err(field.wrong("a list of one name")),
        }
    }
}

/// One value, with its file and path for errors.
pub(crate) struct Field<'a> {
    pub(crate) file: &'a str,
    pub(crate) name: String,
    pub(crate) value: &'a Value,
}

impl<'a> Field<'a> {
    pub(crate) fn found(&self) -> String {
        excerpt(&self.value.to_string())
    }

    pub(crate) fn wrong(&self, expected: &str) -> Error {
        Error::Model(format!("{}: {} is {}, expected {expected}", self.file, self.name, self.found()))
    }

    pub(crate) fn integer(&self, min: usize, max: usize) -> Result<usize> {
        let value =
            self.value.as_u64().and_then(|x| usize::try_from(x).ok()).filter(|x| (min..=max).contains(x));
        value.ok_or_else(|| self.wrong(&format!("a whole number from {min} to {max}")))
    }

    /// A finite number that satisfies `ok`. `expected` describes such numbers in the error.
    pub(crate) fn number(&self, expected: &str, ok: impl Fn(f64) -> bool) -> Result<f64> {
        self.value.as_f64().filter(|&x| x.is_finite() && ok(x)).ok_or_else(|| self.wrong(expected))
    }

    /// As [`Field::number`], for a number in the range of f32.
    pub(crate) fn number_f32(&self, expected: &str, ok: impl Fn(f32) -> bool) -> Result<f32> {
        let value = self.number(expected, |_| true)? as f32;
        Some(value).filter(|&x| x.is_finite() && ok(x)).ok_or_else(|| self.wrong(expected))
    }

    pub(crate) fn boolean(&self) -> Result<bool> {
        self.value.as_bool().ok_or_else(|| self.wrong("true or false"))
    }

    pub(crate) fn string(&self) -> Result<&'a str> {
        self.value.as_str().ok_or_else(|| self.wrong("a text"))
    }

    pub(crate) fn array(&self) -> Result<Vec<Field<'a>>> {
        let items = self.value.as_array().ok_or_else(|| self.wrong("a list"))?;
        let field = |(i, value)| Field { file: self.file, name: format!("{}[{i}]", self.name), value };
        Ok(items.iter().enumerate().map(field).collect())
    }

    pub(crate) fn object(&self, prefix: &'a str) -> Result<Fields<'a>> {
        let map = self.value.as_object().ok_or_else(|| self.wrong("an object"))?;
        Ok(Fields { file: self.file, prefix, map })
    }

    /// Whether the value means the same as the field's absence: null, false, 0, empty, or the value
    /// `neutral`.
    pub(crate) fn is_neutral(&self, neutral: &str) -> bool {
        match self.value {
            Value::Null | Value::Bool(false) => true,
            Value::Number(x) => x.as_f64() == Some(0.0) || x.as_f64() == neutral.parse().ok(),
            Value::String(text) => text.is_empty() || text == neutral,
            Value::Array(list) => list.is_empty(),
            Value::Object(map) => map.is_empty(),
            Value::Bool(true) => false,
        }
    }
}
