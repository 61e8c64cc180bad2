//! Token strings to bytes, as the decoder in `tokenizer.json` describes it, token by token.

use crate::error::one_line;
use crate::{Error, Result};
use serde::Deserialize;

/// A decoder as `tokenizer.json` writes it.
#[derive(Deserialize, Debug)]
#[serde(tag = "type")]
pub(crate) enum DecoderFile {
    ByteLevel,
    ByteFallback,
    Fuse,
    Metaspace { replacement: char, prepend_scheme: Option<String>, add_prefix_space: Option<bool> },
    Replace { pattern: PatternFile, content: String },
    Strip { content: char, start: usize, stop: usize },
    Sequence { decoders: Vec<DecoderFile> },
}

#[derive(Deserialize, Debug)]
pub(crate) enum PatternFile {
    String(String),
    Regex(#[allow(dead_code)] String),
}

/// How token strings become bytes: `tokenizer.json`'s decoder, reduced to what works token by token.
#[derive(Default)]
pub(crate) struct Decoding {
    /// Applied to every token string, in order.
    spellings: Vec<Spelling>,
    /// Whether characters are GPT-2's spelling of bytes.
    byte_level: bool,
    /// Whether tokens like `<0x0A>` are single bytes.
    byte_fallback: bool,
    /// (character, count): up to `count` of the character are dropped from the start of the text.
    pub(crate) strip: Option<(char, usize)>,
}

enum Spelling {
    Replace(String, String),
    /// The character means a space; with the flag it is dropped from the first token.
    Metaspace(char, bool),
}

impl Decoding {
    /// The decoder of the tokenizer at `path`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a decoder whose text cannot be produced token by token.
    pub(crate) fn new(file: Option<DecoderFile>, path: &str) -> Result<Self> {
        let refuse = |what: &dyn std::fmt::Debug| {
            let what = one_line(&format!("{what:?}"));
            Error::Unsupported(format!(
                "{path}: decoder {what} cannot be streamed, expected ByteLevel, Metaspace, or a Sequence of Replace, \
                 ByteFallback, Fuse and Strip as SentencePiece models have it"
            ))
        };
        let steps = match file {
            None => return Err(refuse(&"null")),
            Some(DecoderFile::Sequence { decoders }) => decoders,
            Some(one) => vec![one],
        };
        let mut decoding = Decoding::default();
        // Steps on token strings must come before the step that turns tokens into bytes or joins them to one
        // text.
        let (mut bytes, mut fused) = (false, false);
        for step in steps {
            match step {
                DecoderFile::Replace { pattern: PatternFile::String(from), content }
                    if !bytes && !fused && !from.is_empty() =>
                {
                    decoding.spellings.push(Spelling::Replace(from, content));
                }
                DecoderFile::Metaspace { replacement, prepend_scheme, add_prefix_space }
                    if !bytes && !fused =>
                {
                    let prepends =
                        prepend_scheme.as_deref() != Some("never") && add_prefix_space != Some(false);
                    decoding.spellings.push(Spelling::Metaspace(replacement, prepends));
                }
                DecoderFile::ByteFallback if !bytes && !fused => {
                    (decoding.byte_fallback, bytes) = (true, true);
                }
                DecoderFile::ByteLevel if !bytes && !fused => {
                    (decoding.byte_level, bytes, fused) = (true, true, true);
                }
                DecoderFile::Fuse => fused = true,
                DecoderFile::Strip { content, start, stop: 0 } if fused && decoding.strip.is_none() => {
                    decoding.strip = Some((content, start));
                }
                other => return Err(refuse(&other)),
            }
        }
        Ok(decoding)
    }

    /// Appends the bytes of a token, which may be part of a character. `first`: no token came before it.
    pub(crate) fn append(&self, mut token: String, first: bool, bytes: &mut Vec<u8>) {
        for spelling in &self.spellings {
            token = match spelling {
                Spelling::Replace(from, to) => token.replace(from, to),
                Spelling::Metaspace(mark, true) if first => token.replace(*mark, ""),
                Spelling::Metaspace(mark, _) => token.replace(*mark, " "),
            };
        }
        if self.byte_fallback
            && token.len() == 6
            && let Some(digits) = token.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'))
            && let Ok(byte) = u8::from_str_radix(digits, 16)
        {
            bytes.push(byte);
            return;
        }
        // A token that is not written in GPT-2's spelling, such as an added token, is taken literally.
        let spelled = self.byte_level.then(|| token.chars().map(byte_of).collect::<Option<Vec<u8>>>());
        bytes.extend(spelled.flatten().unwrap_or_else(|| token.into_bytes()));
    }
}

/// GPT-2's spelling of bytes: printable Latin-1 is itself, the other 68 bytes follow in order from U+0100.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}
