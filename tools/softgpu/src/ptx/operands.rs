//! The body of a kernel while it is read: names, registers, constants and labels, and the checks of operands against types.

use super::Error;
use super::parser::Name;
use super::program::{CONSTANT, Constant, Instr, Loc, NONE, Op, Special, Ty, flag};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

pub(super) type Result<T> = std::result::Result<T, String>;

/// Maps from the names and numbers of one text.
pub(super) type Names<K, V> = HashMap<K, V, BuildHasherDefault<NameHasher>>;

/// A quick hash: names are short, and nobody gains by making them collide.
#[derive(Default)]
pub(super) struct NameHasher(u64);

impl Hasher for NameHasher {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            let mixed = self.0.rotate_left(5) ^ u64::from_le_bytes(word);
            self.0 = mixed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
    }

    fn finish(&self) -> u64 {
        // The low bits of a product depend on few bits of its factors.
        self.0 ^ self.0 >> 32
    }
}

/// The base of an address.
#[derive(Clone, Copy, Debug)]
pub(super) enum Base {
    Register(u32),
    Constant(Constant),
}

/// An operand as written.
#[derive(Clone, Debug)]
pub(super) enum Operand<'a> {
    /// Index of a register.
    Register(u32),
    /// Index of a predicate times 2, plus 1 if it is negated.
    Predicate(u32),
    Special(Special),
    Int(u64),
    F32(u32),
    F64(u64),
    Constant(Constant),
    Address(Base, i64),
    Vector(Vec<Operand<'a>>),
    Sink,
    /// A name that is not declared: a label.
    Label(&'a str),
}

/// Registers `name0`, `name1`, ...
#[derive(Clone, Copy)]
struct Family {
    first: u32,
    count: u32,
    predicate: bool,
}

#[derive(Default)]
struct Scope<'a> {
    names: Names<&'a str, Name>,
    families: Names<&'a str, Family>,
}

/// A kernel's statements so far.
pub(super) struct Body<'a> {
    scopes: Vec<Scope<'a>>,
    /// The type of each register.
    pub registers: Vec<Ty>,
    /// Predicates declared, and one more: predicate 0 is never set.
    pub predicates: u32,
    pub code: Vec<Instr>,
    pub lists: Vec<u32>,
    pub locs: Vec<Loc>,
    pub lines: Vec<u32>,
    pub loc: Loc,
    pub constants: Vec<(Constant, bool)>,
    known: Names<(Constant, bool), u32>,
    labels: Names<&'a str, u32>,
    /// The parts of the current opcode: a field, so that each need not allocate them.
    pub parts: Vec<&'a str>,
    /// Branches by index, and their targets.
    jumps: Vec<(usize, &'a str)>,
    pub specials: Vec<Special>,
    /// Bytes of the kernel's parameters.
    pub param_bytes: u32,
    pub shared_unit: u32,
    pub uses_wgmma: bool,
}

impl<'a> Body<'a> {
    pub fn new(module: &Names<&'a str, Name>) -> Body<'a> {
        Body {
            scopes: vec![Scope { names: module.clone(), families: Names::default() }],
            registers: Vec::new(),
            predicates: 1,
            code: Vec::new(),
            lists: Vec::new(),
            locs: Vec::new(),
            lines: Vec::new(),
            loc: Loc::default(),
            constants: Vec::new(),
            known: Names::default(),
            labels: Names::default(),
            parts: Vec::new(),
            jumps: Vec::new(),
            specials: Vec::new(),
            param_bytes: 0,
            shared_unit: 4,
            uses_wgmma: false,
        }
    }

    // ---- names ----

    pub fn open(&mut self) {
        self.scopes.push(Scope::default());
    }

    pub fn close(&mut self) {
        self.scopes.pop();
    }

    fn scope(&mut self) -> &mut Scope<'a> {
        self.scopes.last_mut().expect("the outermost scope stays")
    }

    pub fn name(&mut self, name: &'a str, value: Name) {
        self.scope().names.insert(name, value);
    }

    pub fn register(&mut self, name: &'a str, ty: Ty) {
        let value = if ty == Ty::Pred {
            self.predicates += 1;
            Name::Predicate(self.predicates - 1)
        } else {
            self.registers.push(ty);
            Name::Register(self.registers.len() as u32 - 1)
        };
        self.name(name, value);
    }

    pub fn family(&mut self, name: &'a str, ty: Ty, count: u32) {
        let predicate = ty == Ty::Pred;
        let first = if predicate { self.predicates } else { self.registers.len() as u32 };
        if predicate {
            self.predicates += count;
        } else {
            self.registers.resize(self.registers.len() + count as usize, ty);
        }
        self.scope().families.insert(name, Family { first, count, predicate });
    }

    pub fn find(&self, name: &str) -> Option<Name> {
        let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
        let number: Option<u32> = name[stem.len()..].parse().ok();
        self.scopes.iter().rev().find_map(|scope| {
            let family =
                number.and_then(|n| scope.families.get(stem).filter(|f| n < f.count).map(|f| (f, n)));
            match family {
                Some((f, n)) if f.predicate => Some(Name::Predicate(f.first + n)),
                Some((f, n)) => Some(Name::Register(f.first + n)),
                None => scope.names.get(name).copied(),
            }
        })
    }

    /// What a name stands for as an operand.
    pub fn named(&self, word: &'a str) -> Operand<'a> {
        if word == "_" {
            return Operand::Sink;
        }
        match self.find(word) {
            Some(Name::Register(index)) => Operand::Register(index),
            Some(Name::Predicate(index)) => Operand::Predicate(index * 2),
            Some(name) => Operand::Constant(constant(name)),
            None if word == "WARP_SZ" => Operand::Int(32),
            None => special(word).map_or(Operand::Label(word), Operand::Special),
        }
    }

    /// The base of an address.
    pub fn base(&self, word: &'a str) -> Result<Base> {
        match self.named(word) {
            Operand::Register(index) => Ok(Base::Register(index)),
            Operand::Constant(constant) => Ok(Base::Constant(constant)),
            _ => Err(format!("{word} is not declared")),
        }
    }

    // ---- labels ----

    pub fn label(&mut self, name: &'a str) -> Result<()> {
        match self.labels.insert(name, self.code.len() as u32) {
            None => Ok(()),
            Some(_) => Err(format!("the label {name} is there twice")),
        }
    }

    pub fn jump(&mut self, label: &'a str) {
        self.jumps.push((self.code.len(), label));
    }

    pub fn resolve_labels(&mut self) -> std::result::Result<(), Error> {
        for (at, label) in &self.jumps {
            let target = self.labels.get(label).filter(|target| (**target as usize) < self.code.len());
            let Some(target) = target else {
                return Err(Error::new(self.lines[*at], format!("no statement has the label {label}")));
            };
            self.code[*at].x = *target;
        }
        Ok(())
    }

    /// Whether control cannot pass the last statement.
    pub fn ends(&self) -> bool {
        self.code.last().is_some_and(|i| {
            i.guard == super::program::ALWAYS && matches!(i.op, Op::Ret | Op::Bra | Op::Trap)
        })
    }

    // ---- operands ----

    pub fn constant(&mut self, constant: Constant, wide: bool) -> u32 {
        let next = self.constants.len() as u32;
        let index = *self.known.entry((constant, wide)).or_insert(next);
        if index == next {
            self.constants.push((constant, wide));
        }
        CONSTANT | index
    }

    /// The register's type if it can hold a value of type `ty`.
    pub fn holds(&self, register: u32, ty: Ty) -> Result<Ty> {
        let own = self.registers[register as usize];
        let kinds = own.is_bits() || ty.is_bits() || own.is_float() == ty.is_float() || ty.bytes() == 2;
        // A pair of halves lives in a 32-bit register of any type.
        let pair = matches!(ty, Ty::F16x2 | Ty::BF16x2);
        if own.bytes() == ty.bytes() && (kinds || pair) {
            Ok(own)
        } else {
            Err(format!("a {own:?} register for an operand of type {ty:?}"))
        }
    }

    /// A row to read: a register, a number or an address of a variable.
    pub fn input(&mut self, operand: &Operand, ty: Ty) -> Result<u32> {
        let wide = ty.bytes() == 8;
        let bits = match *operand {
            Operand::Register(index) => return self.holds(index, ty).map(|_| index),
            Operand::Int(x) if !ty.is_float() => match ty.bytes() {
                1 => x & 0xff,
                2 => x & 0xffff,
                4 => x & 0xffff_ffff,
                _ => x,
            },
            Operand::F32(x) if matches!(ty, Ty::F32 | Ty::B32) => u64::from(x),
            Operand::F64(x) if ty == Ty::F64 || ty == Ty::B64 => x,
            Operand::F64(x) if ty == Ty::F32 => u64::from((f64::from_bits(x) as f32).to_bits()),
            Operand::Constant(constant) if ty.bytes() >= 4 && !ty.is_float() => {
                return Ok(self.constant(constant, wide));
            }
            _ => return Err(format!("{} is no operand of type {ty:?}", describe(operand))),
        };
        Ok(self.constant(Constant::Bits(bits), wide))
    }

    /// A register to write, or [`NONE`] for the sink.
    pub fn output(&mut self, operand: &Operand, ty: Ty) -> Result<u32> {
        match *operand {
            Operand::Register(index) => self.holds(index, ty).map(|_| index),
            Operand::Sink => Ok(NONE),
            _ => Err(format!("{} is no register", describe(operand))),
        }
    }

    /// A predicate to read: its index times 2, plus 1 if it is negated.
    pub fn predicate(&self, operand: &Operand) -> Result<u32> {
        match *operand {
            Operand::Predicate(p) => Ok(p),
            // Predicate 0 is never set.
            Operand::Int(x) => Ok(u32::from(x != 0)),
            _ => Err(format!("{} is no predicate", describe(operand))),
        }
    }

    /// The index of a predicate to write, or [`NONE`] for the sink.
    pub fn predicate_output(&self, operand: &Operand) -> Result<u32> {
        match *operand {
            Operand::Predicate(p) if p % 2 == 0 => Ok(p / 2),
            Operand::Sink => Ok(NONE),
            _ => Err(format!("{} is no predicate", describe(operand))),
        }
    }

    /// Rows of a vector operand appended to the lists; the index of the first.
    pub fn list(&mut self, operand: &Operand, count: usize, ty: Ty, write: bool) -> Result<u32> {
        let one = std::slice::from_ref(operand);
        let items = match operand {
            Operand::Vector(items) => items.as_slice(),
            _ => one,
        };
        if items.len() != count {
            return Err(format!("{} registers where {count} belong", items.len()));
        }
        let mut rows = Vec::with_capacity(count);
        for item in items {
            rows.push(if write { self.output(item, ty)? } else { self.input(item, ty)? });
        }
        let first = self.lists.len() as u32;
        self.lists.extend(rows);
        Ok(first)
    }

    /// Sets the row and the offset of an instruction's address.
    pub fn address(&mut self, i: &mut Instr, operand: &Operand) -> Result<()> {
        let Operand::Address(base, offset) = *operand else {
            return Err(format!("{} is no address", describe(operand)));
        };
        match base {
            Base::Register(index) => {
                let ty = self.registers[index as usize];
                if ty.is_float() || ty.bytes() < 4 {
                    return Err(format!("a {ty:?} register is no address"));
                }
                // A 32-bit address is legal in shared, local, const and param space.
                let offset =
                    i32::try_from(offset).map_err(|_| format!("the offset {offset} is too large"))?;
                (i.a, i.x) = (index, offset as u32);
                if ty.bytes() == 4 {
                    i.flags |= flag::NARROW;
                }
            }
            Base::Constant(constant) => {
                let offset = offset as u64;
                let whole = match constant {
                    Constant::Bits(x) => Constant::Bits(x.wrapping_add(offset)),
                    Constant::DynamicShared(x) => Constant::DynamicShared(x.wrapping_add(offset)),
                    Constant::Variable(v, x) => Constant::Variable(v, x.wrapping_add(offset)),
                    Constant::Param(_) => unreachable!("parameters are values, not addresses"),
                };
                (i.a, i.x) = (self.constant(whole, true), 0);
            }
        }
        Ok(())
    }
}

fn constant(name: Name) -> Constant {
    match name {
        Name::Offset(offset) => Constant::Bits(offset),
        Name::DynamicShared => Constant::DynamicShared(0),
        Name::Variable(index) => Constant::Variable(index, 0),
        Name::Register(_) | Name::Predicate(_) => unreachable!("registers are no constants"),
    }
}

pub(super) fn describe(operand: &Operand) -> String {
    match operand {
        Operand::Register(_) => "a register".to_string(),
        Operand::Predicate(_) => "a predicate".to_string(),
        Operand::Special(special) => format!("the special register {special:?}"),
        Operand::Int(x) => format!("the number {}", *x as i64),
        Operand::F32(_) | Operand::F64(_) => "a floating-point number".to_string(),
        Operand::Constant(_) => "the address of a variable".to_string(),
        Operand::Address(..) => "an address".to_string(),
        Operand::Vector(_) => "a vector".to_string(),
        Operand::Sink => "`_`".to_string(),
        Operand::Label(name) => format!("`{name}`, which is not declared,"),
    }
}

fn special(word: &str) -> Option<Special> {
    if let Some((name, axis)) = word.rsplit_once('.')
        && word.starts_with('%')
    {
        let axis = match axis {
            "x" => 0,
            "y" => 1,
            "z" => 2,
            _ => return None,
        };
        return Some(match name {
            "%tid" => Special::Tid(axis),
            "%ntid" => Special::Ntid(axis),
            "%ctaid" => Special::Ctaid(axis),
            "%nctaid" => Special::Nctaid(axis),
            _ => return None,
        });
    }
    Some(match word {
        "%laneid" => Special::LaneId,
        "%warpid" => Special::WarpId,
        "%nwarpid" => Special::NWarpId,
        "%smid" => Special::SmId,
        "%nsmid" => Special::NSmId,
        "%gridid" => Special::GridId,
        "%lanemask_eq" => Special::LanemaskEq,
        "%lanemask_le" => Special::LanemaskLe,
        "%lanemask_lt" => Special::LanemaskLt,
        "%lanemask_ge" => Special::LanemaskGe,
        "%lanemask_gt" => Special::LanemaskGt,
        "%clock" => Special::Clock,
        "%clock64" => Special::Clock64,
        "%globaltimer" => Special::GlobalTimer,
        "%dynamic_smem_size" => Special::DynamicSharedSize,
        "%total_smem_size" => Special::TotalSharedSize,
        _ => return None,
    })
}
