//! The source text of a chat template, made ready for minijinja, and the variables that it reads.

use std::collections::BTreeSet;

/// A template's source.
pub(crate) struct Source {
    /// The source with `\n` for every line end, as jinja2 reads it, and with `with` for Hugging Face's
    /// `generation` tag. That tag marks what a model learns to write; it renders its body in a scope of its
    /// own.
    pub(crate) text: String,
    /// The variables that the template reads without setting them first.
    pub(crate) reads: BTreeSet<String>,
}

impl Source {
    /// Scans `source`. A source that is not a template gives any result; the parser refuses it.
    pub(crate) fn new(source: &str) -> Source {
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let mut text = String::with_capacity(source.len());
        let mut reads = Reads::default();
        let mut rest = &source[..];
        while let Some(start) = rest.find('{') {
            let (before, tag) = rest.split_at(start);
            text.push_str(before);
            let end = match tag.as_bytes().get(1) {
                Some(b'#') => tag.find("#}").map_or(tag.len(), |at| at + 2),
                Some(b'%' | b'{') => {
                    let (end, tokens) = tokens(tag);
                    if tag[1..].starts_with('%') {
                        let name = tokens.iter().find_map(|token| token.name());
                        match name {
                            Some("raw") => {
                                text.push_str(&tag[..end]);
                                // The line end after this tag stays, but minijinja drops one.
                                text.push_str(if tag[end..].starts_with('\n') { "\n" } else { "" });
                                let length = raw(&tag[end..]);
                                text.push_str(&tag[end..end + length]);
                                rest = &tag[end + length..];
                                continue;
                            }
                            Some(name @ ("generation" | "endgeneration")) if tokens.len() == 1 => {
                                let with = if name == "generation" { "with" } else { "endwith" };
                                text.push_str(&tag[..end].replacen(name, with, 1));
                                reads.statement(&tokens);
                                rest = &tag[end..];
                                continue;
                            }
                            _ => {
                                reads.statement(&tokens);
                                end
                            }
                        }
                    } else {
                        reads.expression(&tokens);
                        end
                    }
                }
                _ => 1,
            };
            match tag.as_bytes().get(1) {
                Some(b'%' | b'{') => push_code(&tag[..end], &mut text),
                _ => text.push_str(&tag[..end]),
            }
            rest = &tag[end..];
        }
        text.push_str(rest);
        Source { text, reads: reads.found }
    }
}

/// Appends a tag, without the escapes of its texts that minijinja does not know: a line end, and `\U` with
/// eight digits.
fn push_code(tag: &str, out: &mut String) {
    let mut rest = tag;
    while let Some(at) = rest.find('\\') {
        let (before, escape) = rest.split_at(at);
        out.push_str(before);
        let code = escape.strip_prefix("\\U").and_then(|digits| digits.get(..8));
        let c = code.and_then(|code| char::from_u32(u32::from_str_radix(code, 16).ok()?));
        let length = match (c, escape[1..].chars().next()) {
            (Some(c), _) => {
                out.push(c);
                10
            }
            (None, Some('\n')) => 2,
            (None, next) => {
                let length = 1 + next.map_or(0, char::len_utf8);
                out.push_str(&escape[..length]);
                length
            }
        };
        rest = &escape[length..];
    }
    out.push_str(rest);
}

/// The length of the text up to `{% endraw %}` and of that tag.
fn raw(text: &str) -> usize {
    let mut at = 0;
    while let Some(start) = text[at..].find("{%") {
        at += start + 2;
        let inner = text[at..].trim_start_matches(['-', '+']).trim_start();
        if let Some(after) = inner.strip_prefix("endraw")
            && let Some(length) = after.find("%}")
        {
            return text.len() - after.len() + length + 2;
        }
    }
    text.len()
}

/// A token of an expression or a statement.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Token<'a> {
    Name(&'a str),
    /// `==` and other operators that end in `=`.
    Comparison,
    /// A text or a number.
    Constant,
    /// Any other character.
    Sign(char),
}

impl<'a> Token<'a> {
    fn name(&self) -> Option<&'a str> {
        match self {
            Token::Name(name) => Some(name),
            _ => None,
        }
    }
}

/// The tokens of the tag at the start of `tag`, and the length of the tag.
fn tokens(tag: &str) -> (usize, Vec<Token<'_>>) {
    let close = if tag[1..].starts_with('%') { "%}" } else { "}}" };
    let mut tokens = Vec::new();
    let mut open = 0usize;
    let mut at = 2;
    if tag[at..].starts_with(['-', '+']) {
        at += 1;
    }
    while let Some(c) = tag[at..].chars().next() {
        let rest = &tag[at..];
        let word = |c: char| c == '_' || c.is_alphanumeric();
        let marked = rest.strip_prefix(['-', '+']).is_some_and(|rest| rest.starts_with(close));
        if open == 0 && (rest.starts_with(close) || marked) {
            return (at + close.len() + usize::from(marked), tokens);
        }
        at += match c {
            '\'' | '"' => {
                tokens.push(Token::Constant);
                let mut escaped = false;
                let end = rest[1..].find(|next| {
                    let ends = next == c && !escaped;
                    escaped = next == '\\' && !escaped;
                    ends
                });
                end.map_or(rest.len(), |end| end + 2)
            }
            _ if c.is_numeric() => {
                tokens.push(Token::Constant);
                rest.find(|c| !word(c)).unwrap_or(rest.len())
            }
            _ if word(c) => {
                let end = rest.find(|c| !word(c)).unwrap_or(rest.len());
                tokens.push(Token::Name(&rest[..end]));
                end
            }
            '=' | '!' | '<' | '>' if rest[1..].starts_with('=') => {
                tokens.push(Token::Comparison);
                2
            }
            _ => {
                match c {
                    '(' | '[' | '{' => open += 1,
                    ')' | ']' | '}' => open = open.saturating_sub(1),
                    _ => {}
                }
                if !c.is_whitespace() {
                    tokens.push(Token::Sign(c));
                }
                c.len_utf8()
            }
        };
    }
    (tag.len(), tokens)
}

/// Finds the variables that a template reads.
struct Reads {
    found: BTreeSet<String>,
    /// The variables that are set, scope by scope.
    scopes: Vec<BTreeSet<String>>,
}

impl Default for Reads {
    fn default() -> Reads {
        let known = [
            "loop",
            "self",
            "super",
            "caller",
            "varargs",
            "kwargs",
            "range",
            "dict",
            "namespace",
            "lipsum",
            "cycler",
        ];
        let more = ["joiner", "raise_exception", "strftime_now", "debug"];
        let known = known.into_iter().chain(more).map(String::from).collect();
        Reads { found: BTreeSet::new(), scopes: vec![known, BTreeSet::new()] }
    }
}

impl Reads {
    /// The variables in an expression are read.
    fn expression(&mut self, tokens: &[Token]) {
        const WORDS: [&str; 16] = [
            "and",
            "or",
            "not",
            "in",
            "is",
            "if",
            "else",
            "true",
            "false",
            "none",
            "True",
            "False",
            "None",
            "recursive",
            "with",
            "without",
        ];
        for (at, token) in tokens.iter().enumerate() {
            let Token::Name(name) = *token else { continue };
            let before = |back: usize| at.checked_sub(back).map(|at| tokens[at]);
            let named = match before(1) {
                // An attribute, a filter or a test.
                Some(Token::Sign('.' | '|') | Token::Name("is")) => true,
                Some(Token::Name("not")) => before(2) == Some(Token::Name("is")),
                _ => false,
            };
            let keyword = tokens.get(at + 1) == Some(&Token::Sign('='));
            if !named
                && !keyword
                && !WORDS.contains(&name)
                && !self.scopes.iter().any(|scope| scope.contains(name))
            {
                self.found.insert(name.into());
            }
        }
    }

    fn set(&mut self, targets: &[Token]) {
        let names = targets.iter().filter_map(Token::name).map(String::from);
        if let Some(scope) = self.scopes.last_mut() {
            scope.extend(names);
        }
    }

    fn push(&mut self) {
        self.scopes.push(BTreeSet::new());
    }

    fn pop(&mut self) {
        if self.scopes.len() > 2 {
            self.scopes.pop();
        }
    }

    /// The tokens of one statement, from its name on.
    fn statement(&mut self, tokens: &[Token]) {
        let Some((Token::Name(name), rest)) = tokens.split_first() else { return };
        match *name {
            "set" => {
                let equals = rest.iter().position(|token| *token == Token::Sign('='));
                let (targets, value) = rest.split_at(equals.unwrap_or(rest.len()));
                if equals.is_some() {
                    self.expression(value);
                } else {
                    // The body follows; filters may be part of the tag.
                    self.push();
                    self.expression(targets.get(1..).unwrap_or_default());
                    let inner = self.scopes.pop();
                    self.set(targets.get(..1).unwrap_or_default());
                    self.scopes.extend(inner);
                    return;
                }
                // A field of a namespace is set, not a variable.
                match targets.contains(&Token::Sign('.')) {
                    true => self.expression(targets),
                    false => self.set(targets),
                }
            }
            "for" => {
                let at = rest.iter().position(|token| *token == Token::Name("in")).unwrap_or(rest.len());
                let (targets, iterated) = rest.split_at(at);
                let condition = iterated.iter().position(|token| *token == Token::Name("if"));
                let (iterated, condition) = iterated.split_at(condition.unwrap_or(iterated.len()));
                self.expression(iterated);
                self.push();
                self.set(targets);
                self.expression(condition);
            }
            "macro" => {
                self.set(rest.get(..1).unwrap_or_default());
                self.push();
                self.parameters(rest.get(1..).unwrap_or_default());
            }
            "call" => {
                let parameters = match rest.first() {
                    Some(Token::Sign('(')) => rest.iter().position(|token| *token == Token::Sign(')')),
                    _ => None,
                };
                let (parameters, called) = rest.split_at(parameters.map_or(0, |at| at + 1));
                self.expression(called);
                self.push();
                self.parameters(parameters);
            }
            "with" => {
                self.push();
                self.parameters(rest);
            }
            "if" | "filter" | "block" | "autoescape" | "generation" => {
                let filter = usize::from(matches!(*name, "filter" | "block"));
                self.expression(rest.get(filter..).unwrap_or_default());
                self.push();
            }
            "elif" | "else" => {
                self.pop();
                self.expression(rest);
                self.push();
            }
            end if end.starts_with("end") => self.pop(),
            _ => self.expression(rest),
        }
    }

    /// Names before `=` or alone are set; values after `=` are read.
    fn parameters(&mut self, tokens: &[Token]) {
        self.expression(
            &(0..tokens.len())
                .map(|at| match tokens[at] {
                    Token::Name(_)
                        if matches!(
                            at.checked_sub(1).map(|at| tokens[at]),
                            None | Some(Token::Sign('(' | ','))
                        ) =>
                    {
                        Token::Constant
                    }
                    token => token,
                })
                .collect::<Vec<_>>(),
        );
        let named =
            |at: usize| matches!(at.checked_sub(1).map(|at| tokens[at]), None | Some(Token::Sign('(' | ',')));
        let names: Vec<Token> = (0..tokens.len()).filter(|at| named(*at)).map(|at| tokens[at]).collect();
        self.set(&names);
    }
}
