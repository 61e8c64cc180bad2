//! The grammar of PTX: directives, declarations and statements. What an instruction means is in [`super::decode`].

use super::Error;
use super::Variable;
use super::allocate::Decoded;
use super::lexer::{Lexeme, Token, split};
use super::operands::{Base, Body, Names, Operand};
use super::program::{ALWAYS, Constant, Kernel, Param, SHARED_GAP, SHARED_START, SharedVariable, Ty};
use crate::card::Card;
use std::collections::HashMap;
use std::sync::Arc;

/// The newest PTX version that the machine's driver knows.
const NEWEST: (u32, u32) = (9, 0);

type Result<T> = std::result::Result<T, Error>;

/// A declared variable: what follows its state space.
struct Declaration<'a> {
    name: &'a str,
    ty: Ty,
    align: u32,
    /// Elements; `None` for `[]`.
    count: Option<u32>,
    data: Vec<u8>,
}

impl Declaration<'_> {
    fn bytes(&self) -> u32 {
        self.count.unwrap_or(0) * self.ty.bytes()
    }
}

/// A name that statements can use, of the module or of a kernel.
#[derive(Clone, Copy)]
pub(super) enum Name {
    /// Index of a register.
    Register(u32),
    /// Index of a predicate.
    Predicate(u32),
    /// Address in shared memory, or offset from the parameters or in local memory.
    Offset(u64),
    DynamicShared,
    /// Index of a variable of the module.
    Variable(u32),
}

struct Parser<'a> {
    tokens: Vec<Lexeme<'a>>,
    at: usize,
    files: HashMap<u32, String>,
    names: Names<&'a str, Name>,
    /// Shared variables of the module: they are in the shared memory of the kernels that name them.
    shared: Vec<Declaration<'a>>,
    variables: Vec<Variable>,
    kernels: Vec<Decoded>,
    /// The operands of the current statement: a field, so that each need not allocate them.
    operands: Vec<Operand<'a>>,
}

/// The kernels and variables of a PTX text.
pub(super) fn parse(text: &str, card: &Card) -> Result<(Vec<Decoded>, Vec<Variable>)> {
    let mut parser = Parser {
        tokens: split(text)?,
        at: 0,
        files: HashMap::new(),
        names: Names::default(),
        operands: Vec::new(),
        shared: Vec::new(),
        variables: Vec::new(),
        kernels: Vec::new(),
    };
    parser.header(card)?;
    while parser.peek() != Token::End {
        parser.module_item()?;
    }
    let files = Arc::new(parser.files);
    for decoded in &mut parser.kernels {
        decoded.kernel.files = files.clone();
    }
    Ok((parser.kernels, parser.variables))
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Token<'a> {
        self.tokens[self.at].token
    }

    fn line(&self) -> u32 {
        self.tokens[self.at].line
    }

    fn next(&mut self) -> Token<'a> {
        let token = self.peek();
        if token != Token::End {
            self.at += 1;
        }
        token
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(Error::new(self.line(), message))
    }

    fn accept(&mut self, mark: char) -> bool {
        let found = self.peek() == Token::Mark(mark);
        self.at += usize::from(found);
        found
    }

    fn accept_word(&mut self, word: &str) -> bool {
        let found = self.peek() == Token::Word(word);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, mark: char) -> Result<()> {
        if self.accept(mark) {
            Ok(())
        } else {
            self.error(format!("expected `{mark}`, found {}", self.found()))
        }
    }

    fn found(&self) -> String {
        match self.peek() {
            Token::Word(word) => format!("`{word}`"),
            Token::Mark(mark) => format!("`{mark}`"),
            Token::End => "the end of the text".to_string(),
            Token::Text(text) => format!("\"{text}\""),
            Token::Int(_) | Token::F32(_) | Token::F64(_) => "a number".to_string(),
            Token::Loc(_) => "`.loc`".to_string(),
        }
    }

    fn word(&mut self) -> Result<&'a str> {
        match self.peek() {
            Token::Word(word) => {
                self.at += 1;
                Ok(word)
            }
            _ => self.error(format!("expected a name, found {}", self.found())),
        }
    }

    fn int(&mut self) -> Result<u32> {
        match self.peek() {
            Token::Int(value) if value <= u64::from(u32::MAX) => {
                self.at += 1;
                Ok(value as u32)
            }
            _ => self.error(format!("expected an unsigned 32-bit number, found {}", self.found())),
        }
    }

    // ---- module scope ----

    fn header(&mut self, card: &Card) -> Result<()> {
        if !self.accept_word(".version") {
            return self.error(format!("expected `.version`, found {}", self.found()));
        }
        let version = match self.peek() {
            Token::F64(bits) => f64::from_bits(bits),
            _ => return self.error(format!("expected a version such as 8.0, found {}", self.found())),
        };
        let version = (version as u32, (version * 10.0).round() as u32 % 10);
        if version > NEWEST {
            let (major, minor) = NEWEST;
            return self.error(format!(
                "PTX {}.{}, but this driver knows up to {major}.{minor}",
                version.0, version.1
            ));
        }
        self.at += 1;
        if !self.accept_word(".target") {
            return self.error(format!("expected `.target`, found {}", self.found()));
        }
        let target = self.word()?;
        let number = target.trim_start_matches("sm_").trim_end_matches(['a', 'f']);
        let Ok(number) = number.parse::<u32>() else { return self.error(format!("unknown target {target}")) };
        let capability = card.capability.0 * 10 + card.capability.1;
        let same = if target.ends_with('a') {
            number == capability
        } else {
            number <= capability && (!target.ends_with('f') || number / 10 == card.capability.0)
        };
        if !same {
            return self.error(format!("PTX for {target} cannot run on sm_{capability} ({})", card.name));
        }
        while self.accept(',') {
            let option = self.word()?;
            if option != "debug" {
                return self.error(format!("unknown target option {option}"));
            }
        }
        if !self.accept_word(".address_size") || self.int()? != 64 {
            return self.error("expected `.address_size 64`");
        }
        Ok(())
    }

    fn module_item(&mut self) -> Result<()> {
        let line = self.line();
        let mut external = false;
        loop {
            let word = self.word()?;
            match word {
                ".visible" | ".weak" => {}
                ".extern" => external = true,
                ".entry" if !external => return self.entry(),
                ".file" => return self.file(),
                ".section" => return self.section(),
                ".shared" => {
                    let declaration = self.declaration(external)?;
                    self.expect(';')?;
                    if external {
                        self.names.insert(declaration.name, Name::DynamicShared);
                    }
                    self.shared.push(declaration);
                    return Ok(());
                }
                ".global" | ".const" if !external => {
                    let d = self.declaration(false)?;
                    self.expect(';')?;
                    self.names.insert(d.name, Name::Variable(self.variables.len() as u32));
                    let bytes = d.bytes() as usize;
                    self.variables.push(Variable { name: d.name.to_string(), bytes, data: d.data });
                    return Ok(());
                }
                _ => return Err(Error::new(line, format!("`{word}` is not known here"))),
            }
        }
    }

    /// `.file 1 "name"`, perhaps with a time stamp and a size.
    fn file(&mut self) -> Result<()> {
        let number = self.int()?;
        let Token::Text(name) = self.next() else { return self.error("expected a file name") };
        self.files.insert(number, name.to_string());
        while self.accept(',') {
            self.int()?;
        }
        Ok(())
    }

    /// Debugging information. The machine does not need it.
    fn section(&mut self) -> Result<()> {
        self.word()?;
        self.expect('{')?;
        while !self.accept('}') {
            if self.next() == Token::End {
                return self.error("a section without an end");
            }
        }
        Ok(())
    }

    /// `.align 16 .b8 name[4] = {1, 2}`, after the state space.
    fn declaration(&mut self, external: bool) -> Result<Declaration<'a>> {
        let mut align = 0;
        let ty = loop {
            let word = self.word()?;
            match word {
                ".align" => align = self.int()?,
                ".ptr" | ".global" | ".shared" | ".const" => {}
                _ => match word.strip_prefix('.').and_then(Ty::of) {
                    Some(ty) if ty != Ty::Pred => break ty,
                    _ => return self.error(format!("`{word}` is not the type of a variable")),
                },
            }
        };
        while self.accept_word(".ptr") || self.accept_word(".global") {}
        if self.accept_word(".align") {
            align = self.int()?.max(ty.bytes());
        }
        let align = if align == 0 { ty.bytes() } else { align };
        if !align.is_power_of_two() {
            return self.error("an alignment that is no power of two");
        }
        let name = self.word()?;
        let mut count = Some(1u32);
        while self.accept('[') {
            count = if external && self.peek() == Token::Mark(']') {
                None
            } else {
                let length = self.int()?;
                count.and_then(|n| n.checked_mul(length))
            };
            self.expect(']')?;
        }
        if count.is_none() && !external || count.is_some_and(|n| n > 1 << 28) {
            return self.error(format!("{name} is too large"));
        }
        let mut data = Vec::new();
        if self.accept('=') {
            let braces = self.accept('{');
            loop {
                let negative = self.accept('-');
                let bits = match self.next() {
                    Token::Int(x) if negative => x.wrapping_neg(),
                    Token::Int(x) | Token::F64(x) => x,
                    Token::F32(x) => u64::from(x),
                    _ => return self.error("an initial value that is not a number"),
                };
                data.extend_from_slice(&bits.to_le_bytes()[..ty.bytes() as usize]);
                if !braces || !self.accept(',') {
                    break;
                }
            }
            if braces {
                self.expect('}')?;
            }
        }
        let declaration = Declaration { name, ty, align, count, data };
        if declaration.data.len() > declaration.bytes() as usize {
            return self.error(format!("{name} has more initial values than elements"));
        }
        Ok(declaration)
    }

    // ---- kernels ----

    fn entry(&mut self) -> Result<()> {
        let name = self.word()?.to_string();
        let mut body = Body::new(&self.names);
        let mut params = Vec::new();
        let mut end = 0u32;
        if self.accept('(') {
            while !self.accept(')') {
                if !self.accept_word(".param") {
                    return self.error(format!("expected `.param`, found {}", self.found()));
                }
                let d = self.declaration(false)?;
                let offset = end.next_multiple_of(d.align);
                end = offset + d.bytes();
                params.push(Param { offset, size: d.bytes(), align: d.align });
                body.name(d.name, Name::Offset(u64::from(offset)));
                if !self.accept(',') && self.peek() != Token::Mark(')') {
                    return self.error(format!("expected `,` or `)`, found {}", self.found()));
                }
            }
        }
        body.param_bytes = end;
        let (mut max_threads, mut min_blocks) = (1024, 1);
        loop {
            let product = |parser: &mut Self| -> Result<u32> {
                let mut threads = parser.int()?;
                while parser.accept(',') {
                    threads = threads.saturating_mul(parser.int()?);
                }
                Ok(threads)
            };
            match self.peek() {
                Token::Mark('{') => break,
                Token::Word(word @ (".maxntid" | ".reqntid" | ".minnctapersm" | ".maxnreg")) => {
                    self.at += 1;
                    let value = product(self)?;
                    match word {
                        ".maxntid" | ".reqntid" => max_threads = value,
                        ".minnctapersm" => min_blocks = value.max(1),
                        _ => {}
                    }
                }
                _ => return self.error(format!("{} is not known here", self.found())),
            }
        }
        self.expect('{')?;
        let mut layout = Layout { next: SHARED_START, bytes: 0, variables: Vec::new(), dynamic_align: 16 };
        for (declaration, _) in self.shared.iter().zip(self.used_shared()).filter(|(_, used)| *used) {
            layout.place(declaration, &mut body);
        }
        let mut local = 0u32;
        self.block(&mut body, &mut layout, &mut local)?;
        if body.code.is_empty() || !body.ends() {
            return self.error(format!("{name} does not end with a `ret` or a branch"));
        }
        if body.code.len() >= 1 << 20 {
            return self.error(format!("{name} has more than a million instructions"));
        }
        body.resolve_labels()?;
        let align = layout.dynamic_align;
        let mut dynamic_start = layout.next.next_multiple_of(align);
        if (128..1024).contains(&align) && dynamic_start.is_multiple_of(2 * align) {
            // No better aligned than declared, so that code that needs more is found out.
            dynamic_start += align;
        }
        let mut kernel = Kernel {
            name,
            params,
            shared: layout.bytes,
            max_threads,
            registers: 0,
            local,
            code: body.code,
            lists: body.lists,
            locs: body.locs,
            lines: body.lines,
            files: Arc::default(),
            rows: 0,
            predicates: body.predicates,
            constants: body.constants,
            values: Vec::new(),
            specials: body.specials,
            shared_variables: layout.variables.into(),
            dynamic_start,
            shared_unit: body.shared_unit,
            uses_wgmma: body.uses_wgmma,
            tracked: false,
            accesses: Vec::new(),
        };
        kernel.values = kernel
            .constants
            .iter()
            .map(|(constant, _)| match constant {
                Constant::Bits(bits) => *bits,
                Constant::DynamicShared(offset) => u64::from(dynamic_start).wrapping_add(*offset),
                Constant::Variable(..) | Constant::Param(_) => 0,
            })
            .collect();
        let register_limit = (65536 / (max_threads.max(32) * min_blocks)).clamp(16, 255);
        self.kernels.push(Decoded { kernel, registers: body.registers, register_limit });
        Ok(())
    }

    /// Statements up to the closing brace.
    fn block(&mut self, body: &mut Body<'a>, layout: &mut Layout, local: &mut u32) -> Result<()> {
        body.open();
        loop {
            let line = self.line();
            match self.peek() {
                Token::Mark('}') => {
                    self.at += 1;
                    body.close();
                    return Ok(());
                }
                Token::Mark('{') => {
                    self.at += 1;
                    self.block(body, layout, local)?;
                }
                Token::Mark(';') => self.at += 1,
                Token::Loc(mut loc) => {
                    self.at += 1;
                    // The outer place is one level up. If that is where the previous line was inlined, the outermost is known.
                    let before = body.loc;
                    if (before.file, before.line) == (loc.outer_file, loc.outer_line)
                        && before.outer_file != 0
                    {
                        (loc.outer_file, loc.outer_line) = (before.outer_file, before.outer_line);
                    }
                    body.loc = loc;
                }
                Token::Word(".pragma") => {
                    // Pragmas are advice to ptxas.
                    self.at += 1;
                    let Token::Text(_) = self.next() else { return self.error("expected a string") };
                    self.expect(';')?;
                }
                Token::Word(".reg") => {
                    self.at += 1;
                    self.registers(body)?;
                }
                Token::Word(".shared") => {
                    self.at += 1;
                    let declaration = self.declaration(false)?;
                    self.expect(';')?;
                    layout.place(&declaration, body);
                }
                Token::Word(".local") => {
                    self.at += 1;
                    let d = self.declaration(false)?;
                    self.expect(';')?;
                    let offset = local.next_multiple_of(d.align);
                    *local = offset + d.bytes();
                    body.name(d.name, Name::Offset(u64::from(offset)));
                }
                Token::Word(word) if self.tokens[self.at + 1].token == Token::Mark(':') => {
                    self.at += 2;
                    body.label(word).map_err(|message| Error::new(line, message))?;
                }
                Token::Word(_) | Token::Mark('@') => self.statement(body)?,
                _ => return self.error(format!("expected a statement, found {}", self.found())),
            }
        }
    }

    /// Which of the module's shared variables the body names whose opening brace was the last token.
    fn used_shared(&self) -> Vec<bool> {
        let mut used = vec![false; self.shared.len()];
        let mut depth = 1;
        for lexeme in &self.tokens[self.at..] {
            match lexeme.token {
                Token::Word(word) => {
                    for (used, _) in used.iter_mut().zip(&self.shared).filter(|(_, d)| d.name == word) {
                        *used = true;
                    }
                }
                Token::Mark('{') => depth += 1,
                Token::Mark('}') => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
        used
    }

    /// `.reg .b32 %r<10>, x;`
    fn registers(&mut self, body: &mut Body<'a>) -> Result<()> {
        let word = self.word()?;
        let Some(ty) = word.strip_prefix('.').and_then(Ty::of) else {
            return self.error(format!("`{word}` is not the type of a register"));
        };
        loop {
            let name = self.word()?;
            if self.accept('<') {
                let count = self.int()?;
                self.expect('>')?;
                if count > 1 << 20 {
                    return self.error("too many registers");
                }
                body.family(name, ty, count);
            } else {
                body.register(name, ty);
            }
            if !self.accept(',') {
                return self.expect(';');
            }
        }
    }

    fn statement(&mut self, body: &mut Body<'a>) -> Result<()> {
        let line = self.line();
        let mut guard = ALWAYS;
        if self.accept('@') {
            let negated = self.accept('!');
            let name = self.word()?;
            let Some(Name::Predicate(index)) = body.find(name) else {
                return Err(Error::new(line, format!("{name} is not a predicate")));
            };
            guard = u16::try_from(index * 2 + u32::from(negated))
                .ok()
                .filter(|g| *g != ALWAYS)
                .ok_or_else(|| Error::new(line, "too many predicates"))?;
        }
        let opcode = self.word()?;
        let mut operands = std::mem::take(&mut self.operands);
        operands.clear();
        if !self.accept(';') {
            loop {
                operands.push(self.operand(body)?);
                if self.accept('|') {
                    let second = self.operand(body)?;
                    operands.push(second);
                }
                if !self.accept(',') {
                    break;
                }
            }
            self.expect(';')?;
        }
        let at = body.code.len();
        body.instruction(opcode, &operands)
            .map_err(|message| Error::new(line, format!("{opcode}: {message}")))?;
        self.operands = operands;
        for instr in &mut body.code[at..] {
            instr.guard = guard;
        }
        body.lines.resize(body.code.len(), line);
        body.locs.resize(body.code.len(), body.loc);
        Ok(())
    }

    fn operand(&mut self, body: &mut Body<'a>) -> Result<Operand<'a>> {
        let line = self.line();
        let negative = self.accept('-');
        Ok(match self.next() {
            Token::Int(x) => Operand::Int(if negative { x.wrapping_neg() } else { x }),
            Token::F32(x) if !negative => Operand::F32(x),
            Token::F64(x) if !negative => Operand::F64(x),
            Token::Mark('!') => {
                let name = self.word()?;
                match body.find(name) {
                    Some(Name::Predicate(index)) => Operand::Predicate(index * 2 + 1),
                    _ => return Err(Error::new(line, format!("{name} is not a predicate"))),
                }
            }
            Token::Mark('{') => {
                let mut items = Vec::new();
                while !self.accept('}') {
                    items.push(self.operand(body)?);
                    if !self.accept(',') && self.peek() != Token::Mark('}') {
                        return self.error(format!("expected `,` or `}}`, found {}", self.found()));
                    }
                }
                Operand::Vector(items)
            }
            Token::Mark('[') => {
                let base = match self.next() {
                    Token::Int(x) => Base::Constant(Constant::Bits(x)),
                    Token::Word(word) => body.base(word).map_err(|message| Error::new(line, message))?,
                    _ => return Err(Error::new(line, "expected an address")),
                };
                let mut offset = 0i64;
                while self.peek() != Token::Mark(']') {
                    let minus = !self.accept('+') && self.accept('-') || self.accept('-');
                    let Token::Int(x) = self.next() else { return self.error("expected an offset") };
                    offset = offset.wrapping_add(if minus { (x as i64).wrapping_neg() } else { x as i64 });
                }
                self.expect(']')?;
                Operand::Address(base, offset)
            }
            Token::Word(word) => {
                let mut operand = body.named(word);
                if self.accept('+') {
                    let add = u64::from(self.int()?);
                    operand = match operand {
                        Operand::Constant(Constant::Bits(x)) => {
                            Operand::Constant(Constant::Bits(x.wrapping_add(add)))
                        }
                        Operand::Constant(Constant::DynamicShared(x)) => {
                            Operand::Constant(Constant::DynamicShared(x.wrapping_add(add)))
                        }
                        Operand::Constant(Constant::Variable(v, x)) => {
                            Operand::Constant(Constant::Variable(v, x.wrapping_add(add)))
                        }
                        _ => return Err(Error::new(line, format!("{word} is not a variable"))),
                    };
                }
                operand
            }
            _ => return Err(Error::new(line, "expected an operand")),
        })
    }
}

/// The variables of a kernel in shared memory, with gaps between them so that an access past one is found.
struct Layout {
    next: u32,
    /// Bytes without the gaps, as on a card.
    bytes: u32,
    variables: Vec<SharedVariable>,
    dynamic_align: u32,
}

impl Layout {
    fn place<'a>(&mut self, d: &Declaration<'a>, body: &mut Body<'a>) {
        if d.count.is_none() {
            self.dynamic_align = self.dynamic_align.max(d.align);
            return body.name(d.name, Name::DynamicShared);
        }
        let offset = self.next.next_multiple_of(d.align);
        self.next = offset + d.bytes() + SHARED_GAP;
        self.bytes = self.bytes.next_multiple_of(d.align) + d.bytes();
        self.variables.push(SharedVariable { name: d.name.to_string(), offset, bytes: d.bytes() });
        body.name(d.name, Name::Offset(u64::from(offset)));
    }
}
