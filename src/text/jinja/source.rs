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
    ///
    /// # Errors
    /// A sentence about a loop or a macro that minijinja would render differently from jinja2, to follow the
    /// template's name.
    pub(crate) fn new(source: &str) -> Result<Source, String> {
        let source = source.replace("\r\n", "\n").replace('\r', "\n");
        let tags = tags(&source);
        let nested = nested_conditions(&source, &tags)?;
        let mut text = String::with_capacity(source.len());
        let mut reads = Reads::default();
        let mut at = 0;
        for (i, tag) in tags.iter().enumerate() {
            text.push_str(&source[at..tag.place.start]);
            at = tag.place.end;
            let part = &source[tag.place.clone()];
            if tag.is_statement {
                reads.statement(&tag.tokens);
            } else {
                reads.expression(&tag.tokens);
            }
            if let Some(what) = reads.unsupported {
                return Err(format!("{what} in line {}, which is not supported", line(&source, tag)));
            }
            match tag.name() {
                Some("raw") => {
                    text.push_str(part);
                    // The line end after this tag stays, but minijinja drops one.
                    text.push_str(if source[at..].starts_with('\n') { "\n" } else { "" });
                }
                Some("generation") if tag.tokens.len() == 1 => {
                    text.push_str(&part.replacen("generation", "with", 1))
                }
                Some("endgeneration") => text.push_str(&part.replacen("endgeneration", "endwith", 1)),
                Some("endfor") if nested.contains(&i) => {
                    text.push_str(&part.replacen("endfor", "endif %}{% endfor", 1))
                }
                _ => push_tag(part, tag, nested.contains(&i), &mut text),
            }
        }
        text.push_str(&source[at..]);
        Ok(Source { text, reads: reads.found })
    }
}

/// A statement or an expression of a template, with its braces.
struct Tag<'a> {
    place: Range<usize>,
    is_statement: bool,
    tokens: Vec<Token<'a>>,
    /// The place of each token in the tag.
    places: Vec<Range<usize>>,
}

impl<'a> Tag<'a> {
    /// The name of a statement.
    fn name(&self) -> Option<&'a str> {
        self.tokens.first().filter(|_| self.is_statement)?.name()
    }
}

/// The number of a tag's line, from 1.
fn line(source: &str, tag: &Tag) -> usize {
    source[..tag.place.start].matches('\n').count() + 1
}

/// The tags of a template, outside of comments and raw text.
fn tags(source: &str) -> Vec<Tag<'_>> {
    let mut tags = Vec::new();
    let mut at = 0;
    while let Some(start) = source[at..].find('{').map(|start| at + start) {
        let rest = &source[start..];
        at = start
            + match rest.as_bytes().get(1) {
                Some(b'#') => rest.find("#}").map_or(rest.len(), |end| end + 2),
                Some(b'%' | b'{') => {
                    let (length, tokens, places) = tokens(rest);
                    let is_statement = rest[1..].starts_with('%');
                    let tag = Tag { place: start..start + length, is_statement, tokens, places };
                    let after = if tag.name() == Some("raw") { raw(&rest[length..]) } else { 0 };
                    tags.push(tag);
                    length + after
                }
                _ => 1,
            };
    }
    tags
}

/// Finds the loops with a condition, `for x in xs if c`, that become `for x in xs` with `if c` around the
/// body. jinja2 tests each item when its turn comes. minijinja tests all items before it renders the body,
/// which gives something else where the body changes what the condition reads. The body can only be in an
/// `if` where it does not count the items that pass: it has no `else` and reads nothing of `loop` that
/// depends on the count. Returns the indices of the `for` and `endfor` tags.
///
/// # Errors
/// As [`Source::new`]: such a body with a condition that may change, or in a recursive loop, where minijinja
/// does not test the items of the inner loops.
fn nested_conditions(source: &str, tags: &[Tag]) -> Result<BTreeSet<usize>, String> {
    let state = State::new(tags);
    let mut nested = BTreeSet::new();
    // The open loops and conditions: the tag, and whether the body counts the items.
    let mut open: Vec<(usize, bool)> = Vec::new();
    for (at, tag) in tags.iter().enumerate() {
        let is_loop = |(of, _): &&mut (usize, bool)| tags[*of].name() == Some("for");
        if counts_items(&tag.tokens)
            && let Some((_, counts)) = open.iter_mut().rev().find(is_loop)
        {
            *counts = true;
        }
        match tag.name() {
            Some("for" | "if") => open.push((at, false)),
            Some("else") => {
                if let Some((_, has_else)) = open.last_mut() {
                    *has_else = true;
                }
            }
            Some("endif") => drop(open.pop()),
            Some("endfor") => {
                let Some((start, counts)) = open.pop() else { continue };
                let of = &tags[start].tokens;
                let Some((_, Some(condition))) = loop_parts(of) else { continue };
                if !counts && !of[condition.clone()].contains(&Token::Name("loop")) {
                    nested.extend([start, at]);
                } else if of.last() == Some(&Token::Name("recursive")) || state.may_change(&of[condition]) {
                    return Err(format!(
                        "has a loop with a condition in line {} that is recursive or reads what the body may \
                         change; this is only supported without an else and without loop.index, loop.last and \
                         other counts of the items that pass",
                        line(source, &tags[start])
                    ));
                }
            }
            _ => {}
        }
    }
    Ok(nested)
}

/// Whether a tag in the body of a loop reads something of `loop` that depends on the items before or after.
fn counts_items(tokens: &[Token]) -> bool {
    variables(tokens).any(|(name, after)| {
        let counts = !matches!(
            after,
            [Token::Sign('('), ..] | [Token::Sign('.'), Token::Name("depth" | "depth0" | "changed"), ..]
        );
        name == "loop" && counts
    })
}

/// The names in a tag that are not attributes or filters, each with the tokens after it.
fn variables<'a, 't>(tokens: &'t [Token<'a>]) -> impl Iterator<Item = (&'a str, &'t [Token<'a>])> {
    (0..tokens.len()).filter_map(|at| {
        let named = at.checked_sub(1).is_some_and(|before| matches!(tokens[before], Token::Sign('.' | '|')));
        Some((tokens[at].name().filter(|_| !named)?, &tokens[at + 1..]))
    })
}

/// The variables of a template whose values change: namespaces, cyclers, joiners and the macros that may use
/// them.
struct State<'a> {
    names: BTreeSet<&'a str>,
    /// Whether other variables may hold such a value.
    is_shared: bool,
}

impl<'a> State<'a> {
    fn new(tags: &[Tag<'a>]) -> State<'a> {
        let name = |tag: &Tag<'a>| tag.tokens.get(1).and_then(Token::name);
        let makes = |tag: &&Tag| {
            variables(&tag.tokens).any(|(name, _)| ["namespace", "cycler", "joiner"].contains(&name))
        };
        let mut names: BTreeSet<&str> = tags.iter().filter(makes).filter_map(name).collect();
        let used_alone = |(name, after): (&str, &[Token])| {
            names.contains(name) && !matches!(after, [Token::Sign('.' | '(' | '[' | '='), ..])
        };
        let is_shared = tags.iter().any(|tag| variables(&tag.tokens).any(used_alone));
        if !names.is_empty() {
            names.extend(tags.iter().filter(|tag| tag.name() == Some("macro")).filter_map(name));
        }
        State { names, is_shared }
    }

    /// Whether a condition may read such a value.
    fn may_change(&self, condition: &[Token]) -> bool {
        self.is_shared || variables(condition).any(|(name, _)| self.names.contains(name))
    }
}

/// The filter that charges the fuel of comparing a value.
pub(crate) const COMPARED: &str = "__compared";
/// The filter that charges the fuel of `x in value`.
pub(crate) const SEARCHED: &str = "__searched";

/// The filter that gives the items of a loop.
pub(crate) const ITEMS: &str = "__items";

/// Appends a tag, changed so that minijinja gives the results of jinja2: a loop runs over what the filter
/// [`ITEMS`] gives, the operands of `~` are texts as Python writes them, and a unary `+` is dropped. Values
/// that are compared go through the filters [`COMPARED`] and [`SEARCHED`]. With `nested`, the condition of a
/// loop becomes a tag of its own.
fn push_tag(tag: &str, Tag { tokens, places, .. }: &Tag, nested: bool, out: &mut String) {
    // Parts of the tag, and the texts that replace them.
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    let mut filter = |part: Range<usize>, name: &str| {
        if let [first, ..] = &places[part.clone()] {
            let end = places[part.end - 1].end;
            edits.push((first.start..first.start, "(".into()));
            edits.push((end..end, format!(")|{name}")));
        }
    };
    let mut others: Vec<(Range<usize>, String)> = Vec::new();
    let first = usize::from(tag.starts_with("{%"));
    let loop_in = loop_parts(tokens).map(|(iterated, _)| iterated.start - 1);
    // For every open bracket, its operands.
    let mut open =
        vec![Operands { text: (first, false), value: (first, None), all_compared: false, is_map: false }];
    for at in first..=tokens.len() {
        let (token, before) = (tokens.get(at), tokens[first.min(at)..at].last());
        let closes = matches!(token, Some(Token::Sign(')' | ']' | '}')));
        let after_operand = match before {
            Some(Token::Name(name)) => !OPERATORS.contains(name),
            before => matches!(before, Some(Token::Text | Token::Number | Token::Sign(')' | ']' | '}'))),
        };
        let is_in = token == Some(&Token::Name("in")) && !follows_is(&tokens[..at]) && loop_in != Some(at);
        let ends_value = match token {
            None | Some(Token::Comparison | Token::Sign(',' | ':' | '=' | '<' | '>')) => true,
            Some(Token::Name(name)) => {
                OPERATORS.contains(name) && *name != "is" && !follows_is(&tokens[..at])
            }
            Some(_) => closes,
        };
        let is_tilde = token == Some(&Token::Sign('~'));
        let is_sum = matches!(token, Some(Token::Sign('+' | '-'))) && after_operand;
        if let Some(operands) = open.last_mut() {
            let is_literal = |start: usize| matches!(tokens[start..at], [Token::Text | Token::Number]);
            if ends_value || is_tilde || is_sum {
                let (start, after_tilde) = operands.text;
                if (is_tilde || after_tilde) && tokens[start..at] != [Token::Text] {
                    filter(start..at, "string");
                }
                operands.text = (at + 1, is_tilde);
            }
            if ends_value {
                let (start, after) = operands.value;
                let before_in = is_in || token == Some(&Token::Name("not")) && start < at;
                let is_key = operands.is_map && token == Some(&Token::Sign(':'));
                let compared = (before_in || is_key || operands.all_compared).then_some(COMPARED);
                if let Some(name) = after.or(compared).filter(|_| !is_literal(start)) {
                    filter(start..at, name);
                }
                let after = match token {
                    Some(Token::Comparison | Token::Sign('<' | '>')) => Some(COMPARED),
                    _ => is_in.then_some(SEARCHED),
                };
                operands.value = (at + 1, after);
            }
        }
        match token {
            Some(Token::Sign(c @ ('(' | '[' | '{'))) => {
                // A subscript is hashed.
                let all_compared = match c {
                    '(' => before == Some(&Token::Name("changed")),
                    _ => *c == '[' && after_operand,
                };
                let (text, value) = ((at + 1, false), (at + 1, None));
                open.push(Operands { text, value, all_compared, is_map: *c == '{' });
            }
            Some(Token::Sign('+')) if !after_operand => others.push((places[at].clone(), " ".into())),
            _ if closes && open.len() > 1 => drop(open.pop()),
            _ => {}
        }
    }
    if let Some((iterated, condition)) = loop_parts(tokens) {
        filter(iterated, ITEMS);
        if let Some(condition) = condition.filter(|_| nested) {
            let recursive = places.get(condition.end).cloned();
            let end = if recursive.is_some() { "recursive %}{% if" } else { "%}{% if" };
            edits.push((places[condition.start - 1].clone(), end.into()));
            edits.extend(recursive.map(|place| (place, String::new())));
        }
    }
    edits.extend(others);
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

/// The current operands within one pair of brackets.
struct Operands {
    /// The first token of the operand of `~`, and whether a `~` is before it.
    text: (usize, bool),
    /// The first token of the operand of a comparison, and the filter for it if the comparison is before it.
    value: (usize, Option<&'static str>),
    /// Whether every operand is compared.
    all_compared: bool,
    /// Whether operands before `:` are keys, which are hashed.
    is_map: bool,
}

/// Whether the next token belongs to a test: `is not`, `is in`, `is not in`.
fn follows_is(tokens: &[Token]) -> bool {
    matches!(tokens, [.., Token::Name("is")] | [.., Token::Name("is"), Token::Name("not")])
}

/// The tokens of what a loop runs over and of its condition, if the statement is a loop.
fn loop_parts(tokens: &[Token]) -> Option<(Range<usize>, Option<Range<usize>>)> {
    if tokens.first() != Some(&Token::Name("for")) {
        return None;
    }
    let mut words = outside_brackets(tokens).filter_map(|(at, token)| Some((at, token.name()?)));
    let (before, _) = words.find(|(_, name)| *name == "in")?;
    let end = tokens.len() - usize::from(tokens.last() == Some(&Token::Name("recursive")));
    Some(match words.find(|(_, name)| *name == "if") {
        Some((at, _)) => (before + 1..at, Some(at + 1..end.max(at + 1))),
        None => (before + 1..end.max(before + 1), None),
    })
}

/// The tokens that are not in brackets, each with its index. A closing bracket counts as outside.
fn outside_brackets<'a, 't>(tokens: &'t [Token<'a>]) -> impl Iterator<Item = (usize, &'t Token<'a>)> {
    let mut depth = 0usize;
    tokens.iter().enumerate().filter(move |(_, token)| {
        match token {
            Token::Sign('(' | '[' | '{') => depth += 1,
            Token::Sign(')' | ']' | '}') => depth = depth.saturating_sub(1),
            _ => {}
        }
        depth == 0
    })
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

/// Arguments of a macro that its parameters do not name. minijinja has none.
const EXTRA: [&str; 2] = ["varargs", "kwargs"];

/// Finds the variables that a template reads.
struct Reads {
    found: BTreeSet<String>,
    /// The variables that are set, scope by scope.
    scopes: Vec<BTreeSet<String>>,
    /// The index of the scope of every open macro.
    macros: Vec<usize>,
    /// What minijinja would render differently.
    unsupported: Option<String>,
}

impl Default for Reads {
    fn default() -> Reads {
        let known =
            ["loop", "self", "super", "caller", "range", "dict", "namespace", "lipsum", "cycler", "joiner"];
        let more = ["raise_exception", "strftime_now"];
        let known = known.into_iter().chain(more).map(String::from).collect();
        Reads {
            found: BTreeSet::new(),
            scopes: vec![known, BTreeSet::new()],
            macros: Vec::new(),
            unsupported: None,
        }
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
            if named || keyword || OPERATORS.contains(&name) || WORDS.contains(&name) {
                continue;
            }
            let is_set = |scopes: &[BTreeSet<String>]| scopes.iter().any(|scope| scope.contains(name));
            match self.macros.last() {
                Some(first) if EXTRA.contains(&name) && !is_set(&self.scopes[*first..]) => {
                    self.unsupported = Some(format!("reads {name} in a macro"));
                }
                _ if !is_set(&self.scopes) => drop(self.found.insert(name.into())),
                _ => {}
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

    fn push_macro(&mut self) {
        self.macros.push(self.scopes.len());
        self.push();
    }

    fn pop(&mut self) {
        if self.scopes.len() > 2 {
            self.scopes.pop();
        }
        self.macros.retain(|scope| *scope < self.scopes.len());
    }

    /// The tokens of one statement, from its name on.
    fn statement(&mut self, tokens: &[Token]) {
        let Some((Token::Name(name), rest)) = tokens.split_first() else { return };
        match *name {
            "set" => {
                let equals = outside_brackets(rest).find(|(_, token)| **token == Token::Sign('='));
                let equals = equals.map(|(at, _)| at);
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
                let Some((iterated, condition)) = loop_parts(tokens) else { return };
                self.expression(&tokens[iterated.clone()]);
                self.push();
                self.set(&tokens[1..iterated.start - 1]);
                self.expression(&tokens[condition.unwrap_or_default()]);
            }
            "macro" => {
                self.set(rest.get(..1).unwrap_or_default());
                self.push_macro();
                self.parameters(rest.get(1..).unwrap_or_default());
            }
            "call" => {
                let parameters = match rest.first() {
                    Some(Token::Sign('(')) => rest.iter().position(|token| *token == Token::Sign(')')),
                    _ => None,
                };
                let (parameters, called) = rest.split_at(parameters.map_or(0, |at| at + 1));
                self.expression(called);
                self.push_macro();
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

    /// Names before `=` or alone are set; values after `=` are read. jinja2 evaluates the values of `with`
    /// before it sets any name, and the default of a macro's parameter after it sets the parameters before.
    fn parameters(&mut self, tokens: &[Token]) {
        let tokens = match tokens {
            [Token::Sign('('), inner @ .., _] => inner,
            all => all,
        };
        let is_comma = |(at, token): (usize, &Token)| (*token == Token::Sign(',')).then_some(at);
        let (mut set, mut start) = (Vec::new(), 0);
        for end in outside_brackets(tokens).filter_map(is_comma).chain([tokens.len()]) {
            let item = &tokens[start..end];
            start = end + 1;
            let Some((name, value)) = item.split_first() else { continue };
            if let Some((other, _)) = variables(value).find(|(other, _)| set.contains(&Token::Name(other))) {
                self.unsupported = Some(format!("reads {other} in the tag that sets it"));
            }
            self.expression(value);
            set.push(*name);
        }
        self.set(&set);
    }
}
