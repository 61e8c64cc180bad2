//! Converts token strings to bytes, token by token, as the decoder in `tokenizer.json` specifies.

use crate::error::one_line;
use crate::{Error, Result};
use serde::Deserialize;

/// A decoder as it is written in `tokenizer.json`.
#[derive(Deserialize, Debug)]
#[serde(tag = "type")]
pub(crate) enum DecoderFile {
    ByteLevel,
    ByteFallback,
    Fuse,
    Metaspace {
        replacement: char,
        prepend_scheme: Option<String>,
        add_prefix_space: Option<bool>,
    },
    Replace {
        pattern: PatternFile,
        content: String,
    },
    Strip {
        content: char,
        start: usize,
        stop: usize,
    },
    WordPiece,
    BPEDecoder,
    #[allow(clippy::upper_case_acronyms)]
    CTC,
    Sequence {
        decoders: Vec<DecoderFile>,
    },
}

#[derive(Deserialize, Debug)]
pub(crate) enum PatternFile {
    String(String),
    Regex(#[allow(dead_code)] String),
}

/// What one token adds to the text.
pub(crate) enum Piece {
    /// Bytes, which may end inside a character.
    Bytes(Vec<u8>),
    /// The byte of a token like `<0x0A>`.
    Fallback(u8),
}

/// How token strings become bytes: the decoder of `tokenizer.json`, limited to what works token by token.
#[derive(Default)]
pub(crate) struct Decoding {
    /// Applied to every token string, in order.
    spellings: Vec<Spelling>,
    /// Whether token strings are in GPT-2's byte encoding ([`byte_of`]).
    byte_level: bool,
    /// Whether tokens like `<0x0A>` are single bytes.
    byte_fallback: bool,
    /// (character, count): the start of the text loses up to `count` of this character.
    pub(crate) strip: Option<(char, usize)>,
}

enum Spelling {
    Replace(String, String),
    /// The character stands for a space. With the flag, it is dropped from the first token.
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
        // Steps on token strings must come before the step that converts tokens to bytes or joins them into
        // one text.
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
                    let drop_first =
                        prepend_scheme.as_deref() != Some("never") && add_prefix_space != Some(false);
                    decoding.spellings.push(Spelling::Metaspace(replacement, drop_first));
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

    /// What a token adds to the text. `first`: it is the first token.
    pub(crate) fn piece(&self, mut token: String, first: bool) -> Piece {
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
            return Piece::Fallback(byte);
        }
        // A token that is not in GPT-2's byte encoding, such as an added token, is taken literally.
        let decoded = self.byte_level.then(|| token.chars().map(byte_of).collect::<Option<Vec<u8>>>());
        Piece::Bytes(decoded.flatten().unwrap_or_else(|| token.into_bytes()))
    }
}

/// How many bytes a token has in GPT-2's byte encoding; `None` for other tokens.
pub(crate) fn byte_length(token: &str) -> Option<usize> {
    token.chars().all(|c| byte_of(c).is_some()).then(|| token.chars().count())
}

/// The byte that a character encodes in GPT-2's byte encoding: a printable Latin-1 character is its own byte,
/// and the other 68 bytes are the characters from U+0100 on, in order. `None` for other characters.
fn byte_of(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}
