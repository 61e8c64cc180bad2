//! What each instruction means: opcode, modifiers and operands to [`Instr`], with the checks of an assembler.

use super::operands::{Base, Body, Operand, Result, describe};
use super::program::{Atom, Cmp, Constant, Instr, NONE, Op, SHARED_WINDOW, Space, Ty, flag};
use super::rows::is_register;

/// The parts of an opcode that were not looked at yet.
pub(super) struct Parts<'a> {
    pub root: &'a str,
    pub rest: Vec<&'a str>,
}

impl<'a> Parts<'a> {
    /// Splits an opcode into an empty vector.
    fn of(opcode: &'a str, mut rest: Vec<&'a str>) -> Parts<'a> {
        let mut parts = opcode.split('.');
        let root = parts.next().unwrap_or("");
        rest.extend(parts);
        Parts { root, rest }
    }

    /// Removes a modifier; whether it was there.
    pub fn take(&mut self, name: &str) -> bool {
        let at = self.rest.iter().position(|part| *part == name);
        at.map(|at| self.rest.remove(at)).is_some()
    }

    /// Removes the first modifier of a table and gives what it stands for.
    pub fn one_of<T: Copy>(&mut self, table: &[(&str, T)]) -> Option<T> {
        let hit = |part: &&str| table.iter().find(|(name, _)| name == part).map(|(_, value)| *value);
        let at = self.rest.iter().position(|part| hit(part).is_some())?;
        hit(&self.rest.remove(at))
    }

    /// Removes the first type.
    pub fn ty(&mut self) -> Result<Ty> {
        let at = self.rest.iter().position(|part| Ty::of(part).is_some());
        at.and_then(|at| Ty::of(self.rest.remove(at))).ok_or_else(|| "it has no type".to_string())
    }

    /// Flags of the modifiers that are there.
    pub fn flags(&mut self, table: &[(&str, u16)]) -> u16 {
        table.iter().filter(|(name, _)| self.take(name)).fold(0, |all, (_, flag)| all | flag)
    }

    /// An error if a modifier is left.
    fn done(&self) -> Result<()> {
        match self.rest.first() {
            None => Ok(()),
            Some(part) => Err(format!("the modifier or type .{part} is not known to this machine")),
        }
    }
}

const INTS: &[Ty] = &[Ty::U16, Ty::U32, Ty::U64, Ty::S16, Ty::S32, Ty::S64];
const BITS: &[Ty] = &[Ty::B16, Ty::B32, Ty::B64];
const WORDS: &[Ty] = &[Ty::B32, Ty::B64];
const FLOATS: &[Ty] = &[Ty::F32, Ty::F64];
/// Types of values that are moved, selected, loaded and stored.
const VALUES: &[Ty] =
    &[Ty::B16, Ty::B32, Ty::B64, Ty::U16, Ty::U32, Ty::U64, Ty::S16, Ty::S32, Ty::S64, Ty::F32, Ty::F64];

pub(super) fn only(ty: Ty, allowed: &[&[Ty]]) -> Result<()> {
    if allowed.iter().any(|list| list.contains(&ty)) {
        Ok(())
    } else {
        Err(format!("the type {ty:?} is not known here"))
    }
}

fn double(ty: Ty) -> Ty {
    match ty {
        Ty::U16 => Ty::U32,
        Ty::S16 => Ty::S32,
        Ty::U32 => Ty::U64,
        _ => Ty::S64,
    }
}

fn spaces(parts: &mut Parts) -> Space {
    let table = [
        ("global", Space::Global),
        ("shared", Space::Shared),
        ("shared::cta", Space::Shared),
        ("local", Space::Local),
        ("const", Space::Const),
        ("param", Space::Param),
    ];
    parts.one_of(&table).unwrap_or(Space::Generic)
}

impl<'a> Body<'a> {
    /// Appends an instruction, without its guard.
    pub fn instruction(&mut self, opcode: &'a str, operands: &[Operand<'a>]) -> Result<()> {
        let mut parts = Parts::of(opcode, std::mem::take(&mut self.parts));
        let instr = match parts.root {
            "mov" => self.mov(&mut parts, operands)?,
            "cvta" => self.cvta(&mut parts, operands)?,
            "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "min" | "max" => {
                self.arithmetic(&mut parts, operands)?
            }
            "neg" | "abs" | "not" | "popc" | "clz" | "brev" | "bfind" | "sqrt" | "rcp" | "rsqrt" | "ex2"
            | "lg2" => self.unary(&mut parts, operands)?,
            "and" | "or" | "xor" | "shl" | "shr" | "copysign" => self.bitwise(&mut parts, operands)?,
            "shf" | "bfe" | "bfi" | "prmt" | "lop3" => self.fields(&mut parts, operands)?,
            "setp" => self.setp(&mut parts, operands)?,
            "selp" => {
                let ty = parts.ty()?;
                only(ty, &[VALUES])?;
                let [d, a, b, c] = take(operands)?;
                let mut i = self.binary(Op::Selp, ty, [d, a, b])?;
                i.c = self.predicate(c)?;
                i
            }
            "cvt" => self.cvt(&mut parts, operands)?,
            "bra" => {
                parts.take("uni");
                let [Operand::Label(label)] = operands else { return Err("expected a label".to_string()) };
                self.jump(label);
                Instr::new(Op::Bra, Ty::B32)
            }
            "ret" | "exit" => bare(Op::Ret, operands)?,
            "trap" => bare(Op::Trap, operands)?,
            "ld" | "ldu" | "st" => self.access(&mut parts, operands)?,
            "atom" | "red" => self.atomic(&mut parts, operands)?,
            "cp" => self.cp_async(&mut parts, operands)?,
            "membar" => {
                parts.one_of(&[("gl", ()), ("sys", ()), ("cta", ())]).ok_or("it has no scope")?;
                let mut i = bare(Op::Fence, operands)?;
                i.flags = scope_of_fence(opcode);
                i
            }
            "fence" => {
                if parts.take("proxy") {
                    parts.one_of(&[("async", ()), ("async::shared::cta", ())]).ok_or("it has no proxy")?;
                    parts.take("shared::cta");
                    bare(Op::FenceProxy, operands)?
                } else {
                    parts.one_of(&[("sc", ()), ("acq_rel", ())]);
                    parts.one_of(&[("gpu", ()), ("sys", ()), ("cta", ())]).ok_or("it has no scope")?;
                    let mut i = bare(Op::Fence, operands)?;
                    i.flags = scope_of_fence(opcode);
                    i
                }
            }
            "shfl" | "vote" | "redux" | "activemask" => self.lanes(&mut parts, operands)?,
            "bar" | "barrier" => self.barrier(&mut parts, operands)?,
            "griddepcontrol" => match parts.one_of(&[("wait", true), ("launch_dependents", false)]) {
                Some(true) => bare(Op::DependentsWait, operands)?,
                Some(false) => bare(Op::DependentsLaunch, operands)?,
                None => return Err("it does not say what to do".to_string()),
            },
            "mma" => self.mma(&mut parts, operands)?,
            "ldmatrix" => self.ldmatrix(&mut parts, operands)?,
            "wgmma" => self.wgmma(&mut parts, operands)?,
            _ => return Err("this opcode is not known to this machine".to_string()),
        };
        parts.done()?;
        self.parts = parts.rest;
        self.code.push(instr);
        Ok(())
    }

    pub(super) fn unary_of(&mut self, op: Op, d: &Operand, to: Ty, a: &Operand, from: Ty) -> Result<Instr> {
        let mut i = Instr::new(op, from);
        i.d = self.output(d, to)?;
        i.a = self.input(a, from)?;
        Ok(i)
    }

    pub(super) fn binary(&mut self, op: Op, ty: Ty, [d, a, b]: [&Operand; 3]) -> Result<Instr> {
        let mut i = self.unary_of(op, d, ty, a, ty)?;
        i.b = self.input(b, ty)?;
        Ok(i)
    }

    fn mov(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        if parts.take("pred") {
            return self.predicates_only(Op::PMov, operands);
        }
        let ty = parts.ty()?;
        only(ty, &[VALUES])?;
        let [d, a] = take(operands)?;
        let element = |n: usize| match (ty.bytes() as usize * 8).checked_div(n) {
            Some(64) => Ok(Ty::B64),
            Some(32) => Ok(Ty::B32),
            Some(16) => Ok(Ty::B16),
            _ => Err(format!("{n} registers for a {ty:?}")),
        };
        match (d, a) {
            (_, Operand::Vector(items)) => {
                let mut i = Instr::new(Op::Pack, ty);
                i.d = self.output(d, ty)?;
                i.from = element(items.len())?;
                i.n = items.len() as u8;
                i.a = self.list(a, items.len(), i.from, false)?;
                Ok(i)
            }
            (Operand::Vector(items), _) => {
                let mut i = Instr::new(Op::Unpack, ty);
                i.a = self.input(a, ty)?;
                i.from = element(items.len())?;
                i.n = items.len() as u8;
                i.d = self.list(d, items.len(), i.from, true)?;
                Ok(i)
            }
            (_, Operand::Special(special)) => {
                let mut i = Instr::new(Op::Special, ty);
                i.d = self.output(d, ty)?;
                self.specials.push(*special);
                i.x = self.specials.len() as u32 - 1;
                Ok(i)
            }
            _ => self.unary_of(Op::Mov, d, ty, a, ty),
        }
    }

    /// Generic addresses are those of global memory; shared and local memory have windows of their own.
    fn cvta(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        let back = parts.take("to");
        let space = spaces(parts);
        let ty = parts.ty()?;
        if ty != Ty::U64 {
            return Err("an address has type u64".to_string());
        }
        let [d, a] = take(operands)?;
        let window = match space {
            Space::Shared => SHARED_WINDOW,
            Space::Local => super::program::LOCAL_WINDOW,
            Space::Global | Space::Const => 0,
            _ => return Err("it has no state space".to_string()),
        };
        let mut i = self.unary_of(if window == 0 { Op::Mov } else { Op::Add }, d, ty, a, ty)?;
        if window != 0 {
            let distance = if back { window.wrapping_neg() } else { window };
            i.b = self.constant(Constant::Bits(distance), true);
        }
        Ok(i)
    }

    fn arithmetic(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        let ty = parts.ty()?;
        only(ty, &[INTS, FLOATS])?;
        let float = ty.is_float();
        let rounded = parts.take("rn");
        let approximate = parts.take("approx") || parts.take("full");
        let mut flags = parts.flags(&[("ftz", flag::FTZ), ("sat", flag::SAT)]);
        let width = parts.one_of(&[("lo", 0), ("hi", 1), ("wide", 2)]);
        if (rounded || approximate) && !float
            || width.is_some() && float
            || ty != Ty::F32 && flags & flag::FTZ != 0
        {
            return Err(format!("a modifier that {ty:?} does not have"));
        }
        if flags & flag::SAT != 0 && ty != Ty::F32 {
            return Err(".sat of integers is not known to this machine".to_string());
        }
        let op = match (parts.root, width) {
            ("add", None) => Op::Add,
            ("sub", None) => Op::Sub,
            ("mul", None) if float => Op::MulLo,
            ("mul", Some(w)) => [Op::MulLo, Op::MulHi, Op::MulWide][w],
            ("mad", Some(w)) => [Op::MadLo, Op::MadHi, Op::MadWide][w],
            ("fma", None) if float && rounded => Op::Fma,
            ("mad", None) if float && rounded => Op::Fma,
            ("div", None) if !float || rounded || approximate => Op::Div,
            ("rem", None) if !float => Op::Rem,
            ("min", None) => Op::Min,
            ("max", None) => Op::Max,
            _ => return Err("the modifiers do not make an instruction".to_string()),
        };
        if matches!(op, Op::MulWide | Op::MadWide) && ty.bytes() == 8 {
            return Err("a product of 128 bits".to_string());
        }
        if matches!(op, Op::Min | Op::Max) && float && parts.take("NaN") {
            flags |= flag::NAN;
        }
        if approximate {
            flags |= flag::APPROX;
        }
        if float && !rounded && matches!(op, Op::Add | Op::Sub | Op::MulLo) {
            flags |= flag::CONTRACT;
        }
        let result = if matches!(op, Op::MulWide | Op::MadWide) { double(ty) } else { ty };
        let three = matches!(op, Op::MadLo | Op::MadHi | Op::MadWide | Op::Fma);
        let count = if three { 4 } else { 3 };
        if operands.len() != count {
            return Err(format!("{} operands where {count} belong", operands.len()));
        }
        let mut i = self.unary_of(op, &operands[0], result, &operands[1], ty)?;
        i.b = self.input(&operands[2], ty)?;
        if three {
            i.c = self.input(&operands[3], result)?;
        }
        i.flags = flags;
        Ok(i)
    }

    fn unary(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        if parts.root == "not" && parts.take("pred") {
            return self.predicates_only(Op::PNot, operands);
        }
        let ty = parts.ty()?;
        let [d, a] = take(operands)?;
        let rounded = parts.take("rn");
        let approximate = parts.take("approx");
        let flags = parts.flags(&[("ftz", flag::FTZ)]) | if approximate { flag::APPROX } else { 0 };
        let single: &[&[Ty]] = &[&[Ty::F32]];
        let signed: &[&[Ty]] = &[&[Ty::S16, Ty::S32, Ty::S64], FLOATS];
        let (op, allowed, to) = match parts.root {
            "neg" => (Op::Neg, signed, ty),
            "abs" => (Op::Abs, signed, ty),
            "not" => (Op::Not, [BITS].as_slice(), ty),
            "popc" => (Op::Popc, [WORDS].as_slice(), Ty::U32),
            "clz" => (Op::Clz, [WORDS].as_slice(), Ty::U32),
            "brev" => (Op::Brev, [WORDS].as_slice(), ty),
            "bfind" => {
                let op = if parts.take("shiftamt") { Op::BfindShift } else { Op::Bfind };
                (op, [INTS].as_slice(), Ty::U32)
            }
            "sqrt" if rounded || approximate => (Op::Sqrt, [FLOATS].as_slice(), ty),
            "rcp" if rounded || approximate => (Op::Rcp, [FLOATS].as_slice(), ty),
            "rsqrt" if approximate => (Op::Rsqrt, [FLOATS].as_slice(), ty),
            "ex2" if approximate => (Op::Ex2, single, ty),
            "lg2" if approximate => (Op::Lg2, single, ty),
            _ => return Err("it needs a rounding modifier that this machine knows".to_string()),
        };
        only(ty, allowed)?;
        if (flags != 0 || rounded) && !ty.is_float() || ty == Ty::F64 && flags != 0 {
            return Err(format!("a modifier that {ty:?} does not have"));
        }
        let mut i = self.unary_of(op, d, to, a, ty)?;
        i.flags = flags;
        Ok(i)
    }

    fn predicates_only(&mut self, op: Op, operands: &[Operand]) -> Result<Instr> {
        let mut i = Instr::new(op, Ty::Pred);
        let count = if matches!(op, Op::PMov | Op::PNot) { 2 } else { 3 };
        if operands.len() != count {
            return Err(format!("{} operands where {count} belong", operands.len()));
        }
        i.d = self.predicate_output(&operands[0])?;
        i.a = self.predicate(&operands[1])?;
        i.b = self.predicate(&operands[count - 1])?;
        Ok(i)
    }

    fn bitwise(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        let op = match parts.root {
            "and" => Op::And,
            "or" => Op::Or,
            "xor" => Op::Xor,
            "shl" => Op::Shl,
            "shr" => Op::Shr,
            _ => Op::Copysign,
        };
        if parts.take("pred") {
            let op = match op {
                Op::And => Op::PAnd,
                Op::Or => Op::POr,
                Op::Xor => Op::PXor,
                _ => return Err("no operation of predicates".to_string()),
            };
            return self.predicates_only(op, operands);
        }
        let ty = parts.ty()?;
        let [d, a, b] = take(operands)?;
        match op {
            Op::Shl | Op::Shr => {
                only(ty, &[BITS, if op == Op::Shr { INTS } else { &[] }])?;
                let mut i = self.unary_of(op, d, ty, a, ty)?;
                i.b = self.input(b, Ty::U32)?;
                Ok(i)
            }
            Op::Copysign => {
                only(ty, &[&[Ty::F32]])?;
                self.binary(op, ty, [d, a, b])
            }
            _ => {
                only(ty, &[BITS])?;
                self.binary(op, ty, [d, a, b])
            }
        }
    }

    fn fields(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        match parts.root {
            "shf" => {
                let op = parts.one_of(&[("l", Op::ShfL), ("r", Op::ShfR)]).ok_or("it has no direction")?;
                let wrap = parts.one_of(&[("wrap", flag::WRAP), ("clamp", 0)]).ok_or("it has no mode")?;
                only(parts.ty()?, &[&[Ty::B32]])?;
                let [d, a, b, c] = take(operands)?;
                let mut i = self.binary(op, Ty::B32, [d, a, b])?;
                i.c = self.input(c, Ty::U32)?;
                i.flags = wrap;
                Ok(i)
            }
            "bfe" => {
                let ty = parts.ty()?;
                only(ty, &[&[Ty::U32, Ty::U64, Ty::S32, Ty::S64]])?;
                let [d, a, b, c] = take(operands)?;
                let mut i = self.unary_of(Op::Bfe, d, ty, a, ty)?;
                i.b = self.input(b, Ty::U32)?;
                i.c = self.input(c, Ty::U32)?;
                Ok(i)
            }
            "bfi" => {
                let ty = parts.ty()?;
                only(ty, &[WORDS])?;
                let [d, a, b, c, length] = take(operands)?;
                let mut i = self.binary(Op::Bfi, ty, [d, a, b])?;
                i.c = self.input(c, Ty::U32)?;
                i.e = self.input(length, Ty::U32)?;
                Ok(i)
            }
            "prmt" => {
                only(parts.ty()?, &[&[Ty::B32]])?;
                let [d, a, b, c] = take(operands)?;
                let mut i = self.binary(Op::Prmt, Ty::B32, [d, a, b])?;
                i.c = self.input(c, Ty::U32)?;
                Ok(i)
            }
            _ => {
                only(parts.ty()?, &[&[Ty::B32]])?;
                let [d, a, b, c, table] = take(operands)?;
                let mut i = self.binary(Op::Lop3, Ty::B32, [d, a, b])?;
                i.c = self.input(c, Ty::B32)?;
                i.x = match table {
                    Operand::Int(x) if *x < 256 => *x as u32,
                    _ => return Err("a truth table is a number below 256".to_string()),
                };
                Ok(i)
            }
        }
    }

    fn setp(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        let table = [
            ("eq", Cmp::Eq),
            ("ne", Cmp::Ne),
            ("lt", Cmp::Lt),
            ("lo", Cmp::Lt),
            ("le", Cmp::Le),
            ("ls", Cmp::Le),
            ("gt", Cmp::Gt),
            ("hi", Cmp::Gt),
            ("ge", Cmp::Ge),
            ("hs", Cmp::Ge),
            ("equ", Cmp::Equ),
            ("neu", Cmp::Neu),
            ("ltu", Cmp::Ltu),
            ("leu", Cmp::Leu),
            ("gtu", Cmp::Gtu),
            ("geu", Cmp::Geu),
            ("num", Cmp::Num),
            ("nan", Cmp::Nan),
        ];
        let cmp = parts.one_of(&table).ok_or("it has no comparison")?;
        let combine = parts.one_of(&[("and", Op::PAnd), ("or", Op::POr), ("xor", Op::PXor)]);
        let flags = parts.flags(&[("ftz", flag::FTZ)]);
        let ty = parts.ty()?;
        only(ty, &[VALUES])?;
        let unordered = !matches!(cmp, Cmp::Eq | Cmp::Ne | Cmp::Lt | Cmp::Le | Cmp::Gt | Cmp::Ge);
        if unordered && !ty.is_float() || ty.is_bits() && !matches!(cmp, Cmp::Eq | Cmp::Ne) {
            return Err(format!("a comparison that {ty:?} does not have"));
        }
        let second = matches!(operands.get(1), Some(Operand::Predicate(_) | Operand::Sink));
        let values = operands.get(1 + usize::from(second)..).unwrap_or(&[]);
        if values.len() != 2 + usize::from(combine.is_some()) {
            return Err("the wrong number of operands".to_string());
        }
        let mut i = Instr::new(Op::Setp, ty);
        i.cmp = cmp;
        i.flags = flags;
        i.d = self.predicate_output(&operands[0])?;
        if second {
            i.e = self.predicate_output(&operands[1])?;
        }
        i.a = self.input(&values[0], ty)?;
        i.b = self.input(&values[1], ty)?;
        if let Some(op) = combine {
            i.c = self.predicate(&values[2])?;
            i.x = op as u32;
        }
        Ok(i)
    }

    fn cvt(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        let table = [
            ("rni", flag::RNI),
            ("rzi", flag::RZI),
            ("rmi", flag::RMI),
            ("rpi", flag::RPI),
            ("ftz", flag::FTZ),
            ("sat", flag::SAT),
        ];
        let nearest = parts.take("rn");
        let flags = parts.flags(&table);
        let (ty, from) = (parts.ty()?, parts.ty()?);
        if matches!(ty, Ty::BF16x2 | Ty::F16x2) {
            if from != Ty::F32 || !nearest || flags != 0 {
                return Err("only .rn from f32 is known to this machine".to_string());
            }
            let [d, a, b] = take(operands)?;
            let mut i = Instr::new(Op::CvtPack, ty);
            i.d = self.output(d, ty)?;
            i.a = self.input(a, from)?;
            i.b = self.input(b, from)?;
            return Ok(i);
        }
        let integral = flags & (flag::RNI | flag::RZI | flag::RMI | flag::RPI) != 0;
        let known =
            |ty| matches!(ty, Ty::F16 | Ty::BF16 | Ty::F32 | Ty::F64) || !ty.is_float() && !ty.is_bits();
        let half = |ty| matches!(ty, Ty::F16 | Ty::BF16);
        if !known(ty) || !known(from) || half(ty) && from != Ty::F32 || half(from) && ty != Ty::F32 {
            return Err(format!("a conversion from {from:?} to {ty:?}"));
        }
        let narrowing = ty.is_float() && (!from.is_float() || ty.bytes() < from.bytes());
        if from.is_float() && !ty.is_float() && !integral
            || narrowing && !nearest
            || integral && !from.is_float()
        {
            return Err("the rounding modifier does not fit the types".to_string());
        }
        let [d, a] = take(operands)?;
        let mut i = Instr::new(Op::Cvt, ty);
        i.from = from;
        i.flags = flags;
        i.d = self.wider(d, ty, true)?;
        i.a = self.wider(a, from, false)?;
        if self.too_wide(i.d, ty) || self.too_wide(i.a, from) {
            return Err("a 64-bit register for a narrower type is not executed yet".to_string());
        }
        Ok(i)
    }

    /// A register of an integer type or a wider one, as loads, stores and conversions allow.
    fn wider(&mut self, operand: &Operand, ty: Ty, write: bool) -> Result<u32> {
        let Operand::Register(index) = *operand else {
            return if write { self.output(operand, ty) } else { self.input(operand, ty) };
        };
        let own = self.registers[index as usize];
        if own.bytes() > ty.bytes() && !own.is_float() {
            return Ok(index);
        }
        self.holds(index, ty).map(|_| index)
    }

    /// Whether a row has 64 bits and the type has fewer.
    fn too_wide(&self, row: u32, ty: Ty) -> bool {
        is_register(row) && ty.bytes() < 8 && self.registers[row as usize].bytes() == 8
    }

    fn access(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        let load = parts.root != "st";
        let mut flags = 0;
        // Cache hints do not change what is loaded.
        for hint in
            ["L1::no_allocate", "L1::evict_first", "L1::evict_last", "L2::64B", "L2::128B", "L2::256B"]
        {
            parts.take(hint);
        }
        if load && parts.take("nc") {
            flags |= flag::NC;
        }
        for name in ["volatile", "relaxed", "acquire", "release"] {
            if parts.take(name) {
                flags |= flag::STRONG;
                flags |= match name {
                    "acquire" if load => flag::ACQUIRE,
                    "release" if !load => flag::RELEASE,
                    "acquire" | "release" => return Err(format!(".{name} does not belong here")),
                    _ => 0,
                };
            }
        }
        if flags & flag::STRONG != 0 {
            // In one block, barriers are all that orders accesses here.
            let scopes = [
                ("sys", (flag::SYSTEM, !0)),
                ("gpu", (0, !0)),
                ("cta", (0, !(flag::ACQUIRE | flag::RELEASE))),
            ];
            let (set, keep) = parts.one_of(&scopes).unwrap_or((0, !0));
            flags = (flags | set) & keep;
        }
        parts.one_of(&[("ca", ()), ("cg", ()), ("cs", ()), ("lu", ()), ("cv", ()), ("wb", ()), ("wt", ())]);
        let space = spaces(parts);
        if matches!(space, Space::Param | Space::Const) && !load {
            return Err("memory that a kernel cannot write".to_string());
        }
        let n = parts.one_of(&[("v2", 2u8), ("v4", 4), ("v8", 8)]).unwrap_or(1);
        let ty = parts.ty()?;
        only(ty, &[VALUES, &[Ty::B8, Ty::U8, Ty::S8]])?;
        if u32::from(n) * ty.bytes() > 16 {
            return Err("more than 16 bytes".to_string());
        }
        let [first, second] = take(operands)?;
        let (data, address) = if load { (first, second) } else { (second, first) };
        let mut i = Instr::new(if load { Op::Ld } else { Op::St }, ty);
        self.address(&mut i, address)?;
        if matches!(space, Space::Global | Space::Generic) && i.has(flag::NARROW) {
            return Err("a 32-bit address".to_string());
        }
        i.n = n;
        i.space = space;
        i.flags |= flags;
        let one = std::slice::from_ref(data);
        let items = match data {
            Operand::Vector(items) => items.as_slice(),
            _ => one,
        };
        if items.len() != n as usize {
            return Err(format!("{} registers where {n} belong", items.len()));
        }
        let mut rows = Vec::new();
        for item in items {
            rows.push(self.wider(item, ty, load)?);
        }
        let wide = rows.iter().filter(|row| self.too_wide(**row, ty)).count();
        if wide == rows.len() {
            i.flags |= flag::WIDE;
        } else if wide > 0 {
            return Err("registers of different widths".to_string());
        }
        if space == Space::Param
            && let Operand::Address(Base::Constant(Constant::Bits(at)), offset) = *address
            && let offset = at.wrapping_add(offset as u64)
            && n == 1
            && ty.bytes() >= 4
            && wide == 0
            && offset % u64::from(ty.bytes()) == 0
            && offset.checked_add(u64::from(ty.bytes())).is_some_and(|end| end <= u64::from(self.param_bytes))
        {
            // A constant of the launch.
            let mut i = Instr::new(Op::Mov, ty);
            (i.d, i.a) = (rows[0], self.constant(Constant::Param(offset as u32), ty.bytes() == 8));
            return Ok(i);
        }
        i.d = self.lists.len() as u32;
        self.lists.extend(rows);
        if matches!(space, Space::Shared | Space::Generic) {
            self.shared_unit = self.shared_unit.min(ty.bytes());
        }
        Ok(i)
    }

    fn atomic(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        let result = parts.root == "atom";
        let table = [
            ("add", Atom::Add),
            ("min", Atom::Min),
            ("max", Atom::Max),
            ("and", Atom::And),
            ("or", Atom::Or),
            ("xor", Atom::Xor),
            ("inc", Atom::Inc),
            ("dec", Atom::Dec),
            ("exch", Atom::Exch),
            ("cas", Atom::Cas),
        ];
        let orders = [
            ("relaxed", 0),
            ("acquire", flag::ACQUIRE),
            ("release", flag::RELEASE),
            ("acq_rel", flag::ACQUIRE | flag::RELEASE),
        ];
        let flags = parts.one_of(&orders).unwrap_or(0);
        let flags = parts.one_of(&[("gpu", flags), ("sys", flags), ("cta", 0)]).unwrap_or(flags);
        let space = spaces(parts);
        let atom = parts.one_of(&table).ok_or("it has no operation that this machine knows")?;
        let ty = parts.ty()?;
        only(ty, &[&[Ty::U32, Ty::S32, Ty::U64, Ty::S64, Ty::B32, Ty::B64, Ty::F32]])?;
        let fits = match atom {
            Atom::Add => !ty.is_bits(),
            Atom::Min | Atom::Max => !ty.is_bits() && !ty.is_float(),
            Atom::Inc | Atom::Dec => ty == Ty::U32,
            _ => ty.is_bits(),
        };
        if !fits {
            return Err(format!("an operation that {ty:?} does not have"));
        }
        let mut i = Instr::new(Op::Atomic, ty);
        i.space = space;
        i.flags |= flags;
        i.atom = atom;
        let values = if result {
            let (first, rest) = operands.split_first().ok_or("it has no operands")?;
            i.d = self.output(first, ty)?;
            rest
        } else {
            operands
        };
        if values.len() != if atom == Atom::Cas { 3 } else { 2 } {
            return Err("the wrong number of operands".to_string());
        }
        self.address(&mut i, &values[0])?;
        if matches!(space, Space::Global | Space::Generic) && i.has(flag::NARROW) {
            return Err("a 32-bit address".to_string());
        }
        i.b = self.input(&values[1], ty)?;
        i.c = if atom == Atom::Cas { self.input(&values[2], ty)? } else { i.b };
        Ok(i)
    }

    fn cp_async(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        if !parts.take("async") {
            return Err("only cp.async is known to this machine".to_string());
        }
        if parts.take("commit_group") {
            return bare(Op::CpAsyncCommit, operands);
        }
        if parts.take("wait_all") {
            let mut i = bare(Op::CpAsyncWait, operands)?;
            i.x = NONE;
            return Ok(i);
        }
        if parts.take("wait_group") {
            let [n] = take(operands)?;
            let mut i = Instr::new(Op::CpAsyncWait, Ty::B32);
            i.x = number(n)?;
            return Ok(i);
        }
        if parts.take("bulk") {
            return self.prefetch(parts, operands);
        }
        let all = parts.one_of(&[("cg", false), ("ca", true)]).ok_or("it has no cache operator")?;
        for hint in ["L2::64B", "L2::128B", "L2::256B"] {
            parts.take(hint);
        }
        if !(parts.take("shared") || parts.take("shared::cta")) || !parts.take("global") {
            return Err("it has no state spaces".to_string());
        }
        let (to, from, size, ignore) = match operands {
            [to, from, size] => (to, from, size, None),
            [to, from, size, read] => (to, from, size, Some(read)),
            _ => return Err("the wrong number of operands".to_string()),
        };
        let size = number(size)?;
        if !(size == 16 || all && (size == 4 || size == 8)) {
            return Err(format!("a copy of {size} bytes"));
        }
        let mut i = Instr::new(Op::CpAsync, Ty::B32);
        i.n = size as u8;
        self.address(&mut i, to)?;
        let mut source = Instr::new(Op::Ld, Ty::B32);
        self.address(&mut source, from)?;
        (i.c, i.e) = (source.a, source.x);
        if source.has(flag::NARROW) {
            return Err("a 32-bit global address".to_string());
        }
        i.b = match ignore {
            Some(read) => self.input(read, Ty::U32)?,
            None => self.constant(Constant::Bits(u64::from(size)), false),
        };
        Ok(i)
    }

    /// `cp.async.bulk.prefetch.L2.global`, the only bulk copy that this machine knows.
    fn prefetch(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        if !["prefetch", "L2", "global"].iter().all(|part| parts.take(part)) {
            return Err("of the bulk copies only the prefetch into L2 is known to this machine".to_string());
        }
        let [from, size] = take(operands)?;
        let mut i = Instr::new(Op::Prefetch, Ty::B32);
        self.address(&mut i, from)?;
        if i.has(flag::NARROW) {
            return Err("a 32-bit global address".to_string());
        }
        i.b = self.input(size, Ty::U32)?;
        Ok(i)
    }
}

pub(super) fn bare(op: Op, operands: &[Operand]) -> Result<Instr> {
    if operands.is_empty() { Ok(Instr::new(op, Ty::B32)) } else { Err("it has no operands".to_string()) }
}

pub(super) fn number(operand: &Operand) -> Result<u32> {
    match operand {
        Operand::Int(x) => u32::try_from(*x).map_err(|_| format!("{} is out of range", *x as i64)),
        _ => Err(format!("{} is no immediate number", describe(operand))),
    }
}

pub(super) fn take<'o, 'a, const N: usize>(operands: &'o [Operand<'a>]) -> Result<[&'o Operand<'a>; N]> {
    let found = operands.len();
    let all: Vec<&Operand> = operands.iter().collect();
    all.try_into().map_err(|_| format!("{found} operands where {N} belong"))
}

/// The flags of a fence, whose scope is the last part of its opcode.
fn scope_of_fence(opcode: &str) -> u16 {
    match opcode.rsplit('.').next() {
        Some("cta") => 0,
        Some("sys") => flag::DEVICE | flag::SYSTEM,
        _ => flag::DEVICE,
    }
}
