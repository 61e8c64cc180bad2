//! The source text of a chat template, made ready for minijinja, and the variables that it reads.

use std::collections::BTreeSet;
use std::ops::Range;

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
                Some(b'#') => {
                    let end = tag.find("#}").map_or(tag.len(), |at| at + 2);
                    text.push_str(&tag[..end]);
                    end
                }
                Some(b'%' | b'{') => {
                    let (end, tokens, places) = tokens(tag);
                    let name = tokens.first().and_then(Token::name).filter(|_| tag[1..].starts_with('%'));
                    match name {
                        Some("raw") => {
                            text.push_str(&tag[..end]);
                            // The line end after this tag stays, but minijinja drops one.
                            text.push_str(if tag[end..].starts_with('\n') { "\n" } else { "" });
                            let length = raw(&tag[end..]);
                            text.push_str(&tag[end..end + length]);
                            end + length
                        }
                        Some(name @ ("generation" | "endgeneration")) if tokens.len() == 1 => {
                            let with = if name == "generation" { "with" } else { "endwith" };
                            text.push_str(&tag[..end].replacen(name, with, 1));
                            reads.statement(&tokens);
                            end
                        }
                        _ => {
                            match tag[1..].starts_with('%') {
                                true => reads.statement(&tokens),
                                false => reads.expression(&tokens),
                            }
                            push_tag(&tag[..end], &tokens, &places, &mut text);
                            end
                        }
                    }
                }
                _ => {
                    text.push('{');
                    1
                }
            };
            rest = &tag[end..];
        }
        text.push_str(rest);
        Source { text, reads: reads.found }
    }
}

/// The filter that gives the items of a loop.
pub(crate) const ITEMS: &str = "__items";

/// Appends a tag, changed so that minijinja gives the results of jinja2: a loop runs over what the filter
/// [`ITEMS`] gives, the operands of `~` are texts as Python writes them, and a unary `+` is dropped.
fn push_tag(tag: &str, tokens: &[Token], places: &[Range<usize>], out: &mut String) {
    // Parts of the tag, and the texts that replace them.
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    let mut filter = |part: Range<usize>, name: &str| {
        if let [first, ..] = &places[part.clone()] {
            let end = places[part.end - 1].end;
            edits.push((first.start..first.start, "(".into()));
            edits.push((end..end, format!(")|{name}")));
        }
    };
    let mut unary = Vec::new();
    // For every open bracket: the first token of the operand, and whether a `~` is before it.
    let mut operands = vec![(usize::from(tag.starts_with("{%")), false)];
    for at in operands[0].0..=tokens.len() {
        let (token, before) = (tokens.get(at), tokens[operands[0].0.min(at)..at].last());
        let closes = matches!(token, Some(Token::Sign(')' | ']' | '}')));
        let is_unary = match before {
            Some(Token::Name(name)) => OPERATORS.contains(name),
            Some(Token::Text | Token::Number | Token::Sign(')' | ']' | '}')) => false,
            _ => true,
        };
        let separates = match token {
            None | Some(Token::Comparison | Token::Sign('~' | ',' | ':' | '=' | '<' | '>')) => true,
            Some(Token::Sign('+' | '-')) => !is_unary,
            Some(Token::Name(name)) => {
                OPERATORS.contains(name) && *name != "is" && !follows_is(&tokens[..at])
            }
            Some(_) => closes,
        };
        if let Some((start, after_tilde)) = operands.last_mut().filter(|_| separates) {
            let is_tilde = token == Some(&Token::Sign('~'));
            if (is_tilde || *after_tilde) && tokens[*start..at] != [Token::Text] {
                filter(*start..at, "string");
            }
            (*start, *after_tilde) = (at + 1, is_tilde);
        }
        match token {
            Some(Token::Sign('(' | '[' | '{')) => operands.push((at + 1, false)),
            Some(Token::Sign('+')) if is_unary => unary.push(places[at].clone()),
            _ if closes && operands.len() > 1 => drop(operands.pop()),
            _ => {}
        }
    }
    if let Some(iterated) = iterated(tokens) {
        filter(iterated, ITEMS);
    }
    edits.extend(unary.into_iter().map(|place| (place, " ".into())));
    // The end of an operand comes first at its place, and a `+` that is dropped comes last.
    edits.sort_by_key(|(place, text)| (place.start, place.end, text == "("));
    let mut edited = String::with_capacity(tag.len());
    let mut at = 0;
    for (place, text) in edits {
        edited.push_str(&tag[at..place.start]);
        edited.push_str(&text);
        at = place.end;
    }
    edited.push_str(&tag[at..]);
    push_code(&edited, out);
}

/// Whether the next token belongs to a test: `is not`, `is in`, `is not in`.
fn follows_is(tokens: &[Token]) -> bool {
    matches!(tokens, [.., Token::Name("is")] | [.., Token::Name("is"), Token::Name("not")])
}

/// The tokens of what a loop runs over, if the statement is a loop.
fn iterated(tokens: &[Token]) -> Option<Range<usize>> {
    if tokens.first() != Some(&Token::Name("for")) {
        return None;
    }
    let (mut depth, mut start) = (0usize, None);
    for (at, token) in tokens.iter().enumerate() {
        match (token, start) {
            (Token::Sign('(' | '[' | '{'), _) => depth += 1,
            (Token::Sign(')' | ']' | '}'), _) => depth = depth.saturating_sub(1),
            (Token::Name("in"), None) if depth == 0 => start = Some(at + 1),
            (Token::Name("if" | "recursive"), Some(start)) if depth == 0 => return Some(start..at),
            _ => {}
        }
    }
    Some(start?..tokens.len())
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
    /// A text in quotes.
    Text,
    /// A number, or a part of one.
    Number,
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

/// The length of the tag at the start of `tag`, its tokens, and the place of each.
fn tokens(tag: &str) -> (usize, Vec<Token<'_>>, Vec<Range<usize>>) {
    let close = if tag[1..].starts_with('%') { "%}" } else { "}}" };
    let (mut tokens, mut places) = (Vec::new(), Vec::new());
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
            return (at + close.len() + usize::from(marked), tokens, places);
        }
        let length = match c {
            '\'' | '"' => {
                tokens.push(Token::Text);
                let mut escaped = false;
                let end = rest[1..].find(|next| {
                    let ends = next == c && !escaped;
                    escaped = next == '\\' && !escaped;
                    ends
                });
                end.map_or(rest.len(), |end| end + 2)
            }
            _ if c.is_numeric() => {
                tokens.push(Token::Number);
                number(rest)
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
        if tokens.len() > places.len() {
            places.push(at..at + length);
        }
        at += length;
    }
    (tag.len(), tokens, places)
}

/// The length of the number, or of the part of a number, at the start of `text`: the sign of an exponent is
/// part of it.
fn number(text: &str) -> usize {
    let word = |text: &str| text.find(|c: char| c != '_' && !c.is_alphanumeric()).unwrap_or(text.len());
    let length = word(text);
    let (digits, rest) = text.split_at(length);
    let has_exponent = digits.ends_with(['e', 'E']) && !digits.starts_with("0x");
    match rest.strip_prefix(['-', '+']) {
        Some(exponent) if has_exponent => length + 1 + word(exponent),
        _ => length,
    }
}

/// Words before and after operands.
const OPERATORS: [&str; 8] = ["and", "or", "not", "in", "is", "if", "else", "recursive"];

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
        const WORDS: [&str; 8] = ["true", "false", "none", "True", "False", "None", "with", "without"];
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
                && !OPERATORS.contains(&name)
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
                        Token::Number
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
