//! Splits PTX text into tokens. Comments and white space separate tokens and are dropped.

use super::Error;
use super::program::Loc;

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
    /// `.loc` with all that belongs to it. The outer place is the one that `inlined_at` names.
    Loc(Loc),
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
    let mut out = Vec::with_capacity(text.len() / 8);
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
            _ if WORD[c as usize] => {
                at += 1;
                // `::` belongs to a word (`L1::no_allocate`), a single colon ends a label.
                while at < bytes.len() {
                    if WORD[bytes[at] as usize] {
                        at += 1;
                    } else if bytes[at] == b':' && bytes.get(at + 1) == Some(&b':') {
                        at += 2;
                    } else {
                        break;
                    }
                }
                if &bytes[start..at] == b".loc" {
                    let (loc, length) =
                        location(&bytes[at..]).ok_or_else(|| Error::new(line, "a .loc that is not known"))?;
                    at += length;
                    Token::Loc(loc)
                } else {
                    Token::Word(&text[start..at])
                }
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

/// [byte]: whether it belongs to a word.
const WORD: [bool; 256] = {
    let mut table = [false; 256];
    let mut c = 0;
    while c < 256 {
        table[c] = (c as u8).is_ascii_alphanumeric() || matches!(c as u8, b'_' | b'$' | b'%' | b'.');
        c += 1;
    }
    table
};

/// Reads what follows `.loc`: `file line column[, function_name label[+offset], inlined_at file line column]`, on one line.
/// The second result is the number of bytes.
fn location(bytes: &[u8]) -> Option<(Loc, usize)> {
    let mut at = 0;
    let space = |at: &mut usize| {
        while matches!(bytes.get(*at), Some(b' ' | b'\t')) {
            *at += 1;
        }
    };
    let number = |at: &mut usize| {
        space(at);
        let (start, mut value) = (*at, 0u32);
        while let Some(digit @ b'0'..=b'9') = bytes.get(*at) {
            value = value.checked_mul(10)?.checked_add(u32::from(digit - b'0'))?;
            *at += 1;
        }
        (*at > start).then_some(value)
    };
    let exactly = |at: &mut usize, text: &[u8]| {
        space(at);
        *at += text.len();
        bytes.get(*at - text.len()..*at).filter(|found| *found == text).map(|_| ())
    };
    let (file, line) = (number(&mut at)?, number(&mut at)?);
    number(&mut at)?;
    let mut loc = Loc { file, line, outer_file: 0, outer_line: 0 };
    if bytes.get(at) == Some(&b',') {
        exactly(&mut at, b",")?;
        exactly(&mut at, b"function_name")?;
        while !matches!(bytes.get(at)?, b',' | b'\n') {
            at += 1;
        }
        exactly(&mut at, b",")?;
        exactly(&mut at, b"inlined_at")?;
        (loc.outer_file, loc.outer_line) = (number(&mut at)?, number(&mut at)?);
        number(&mut at)?;
    }
    Some((loc, at))
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
    fn a_location_is_one_token() {
        let of = |text| split(text).ok().map(|t| (t[0].token, t[1].token));
        let loc = |file, line, outer_file, outer_line| Token::Loc(Loc { file, line, outer_file, outer_line });
        assert_eq!(of(".loc 1 20 3 ret"), Some((loc(1, 20, 0, 0), Token::Word("ret"))));
        let inlined = ".loc\t2 5 3, function_name $L__info_string1+8, inlined_at 1 7 9\n;";
        assert_eq!(of(inlined), Some((loc(2, 5, 1, 7), Token::Mark(';'))));
        assert_eq!(of(".loc 1 20"), None);
        assert_eq!(of(".loc 2 5 3, function_name f\n, inlined_at 1 7 9"), None);
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
