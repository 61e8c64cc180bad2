//! Splits PTX text into tokens. Comments and white space separate tokens and are dropped.

use super::Error;

/// A token of PTX.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Token<'a> {
    /// A name, register, directive or opcode, with its dots: `ld.global.v4.u32`, `%tid.x`, `.entry`.
    Word(&'a str),
    /// An integer without its sign.
    Int(u64),
    /// The bits of a `0f` literal.
    F32(u32),
    /// The bits of a `0d` literal or a decimal fraction.
    F64(u64),
    /// A string without its quotes.
    Text(&'a str),
    /// One character of punctuation.
    Mark(char),
    End,
}

/// A token and the line it starts on, from 1.
#[derive(Clone, Copy)]
pub(super) struct Lexeme<'a> {
    pub token: Token<'a>,
    pub line: u32,
}

/// Splits the whole text. The last token is [`Token::End`].
pub(super) fn split(text: &str) -> Result<Vec<Lexeme<'_>>, Error> {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(text.len() / 5);
    let (mut at, mut line) = (0, 1);
    while at < bytes.len() {
        let c = bytes[at];
        let start = at;
        let token = match c {
            b'\n' => {
                line += 1;
                at += 1;
                continue;
            }
            b' ' | b'\t' | b'\r' | 0 => {
                at += 1;
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'/') => {
                while at < bytes.len() && bytes[at] != b'\n' {
                    at += 1;
                }
                continue;
            }
            b'/' if bytes.get(at + 1) == Some(&b'*') => {
                let length =
                    text[at..].find("*/").ok_or_else(|| Error::new(line, "a comment without an end"))?;
                line += text[at..at + length].matches('\n').count() as u32;
                at += length + 2;
                continue;
            }
            b'"' => {
                let length =
                    text[at + 1..].find('"').ok_or_else(|| Error::new(line, "a string without an end"))?;
                at += length + 2;
                Token::Text(&text[start + 1..at - 1])
            }
            b'0'..=b'9' => {
                while at < bytes.len() && (bytes[at].is_ascii_alphanumeric() || bytes[at] == b'.') {
                    at += 1;
                }
                number(&text[start..at])
                    .ok_or_else(|| Error::new(line, format!("`{}` is not a number", &text[start..at])))?
            }
            _ if is_word(c) => {
                at += 1;
                // `::` belongs to a word (`L1::no_allocate`), a single colon ends a label.
                while at < bytes.len() {
                    if is_word(bytes[at]) {
                        at += 1;
                    } else if bytes[at] == b':' && bytes.get(at + 1) == Some(&b':') {
                        at += 2;
                    } else {
                        break;
                    }
                }
                Token::Word(&text[start..at])
            }
            _ if c.is_ascii_punctuation() => {
                at += 1;
                Token::Mark(c as char)
            }
            _ => return Err(Error::new(line, format!("the byte {c:#x} is not PTX"))),
        };
        out.push(Lexeme { token, line });
    }
    out.push(Lexeme { token: Token::End, line });
    Ok(out)
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

fn number(word: &str) -> Option<Token<'static>> {
    let digits = word.strip_suffix('U').unwrap_or(word);
    let radix = |prefix: usize, radix| u64::from_str_radix(digits.get(prefix..)?, radix).ok();
    match word.get(..2) {
        Some("0f" | "0F") => {
            return (word.len() == 10).then(|| radix(2, 16).map(|b| Token::F32(b as u32)))?;
        }
        Some("0d" | "0D") => return (word.len() == 18).then(|| radix(2, 16).map(Token::F64))?,
        Some("0x" | "0X") => return radix(2, 16).map(Token::Int),
        Some("0b" | "0B") => return radix(2, 2).map(Token::Int),
        _ => {}
    }
    if word.contains('.') {
        return word.parse::<f64>().ok().map(|x| Token::F64(x.to_bits()));
    }
    if digits.len() > 1 && digits.starts_with('0') {
        return radix(1, 8).map(Token::Int);
    }
    digits.parse().ok().map(Token::Int)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_have_their_bits() {
        let of = |text| split(text).ok().map(|t| t[0].token);
        assert_eq!(of("0f3F800000"), Some(Token::F32(0x3f80_0000)));
        assert_eq!(of("0d3FF0000000000000"), Some(Token::F64(0x3ff0_0000_0000_0000)));
        assert_eq!(of("0xffU"), Some(Token::Int(255)));
        assert_eq!(of("017"), Some(Token::Int(15)));
        assert_eq!(of("0f3F80"), None);
        assert_eq!(of("12z"), None);
    }

    #[test]
    fn words_keep_dots_and_double_colons() {
        let tokens = split("ld.global.L2::256B %r1 ; // x\n$L:").ok().unwrap_or_default();
        let words: Vec<_> = tokens.iter().map(|t| t.token).collect();
        let expected = [
            Token::Word("ld.global.L2::256B"),
            Token::Word("%r1"),
            Token::Mark(';'),
            Token::Word("$L"),
            Token::Mark(':'),
            Token::End,
        ];
        assert_eq!(words, expected);
        assert_eq!(tokens[3].line, 2);
    }
}
