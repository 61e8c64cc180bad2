//! Decodes the instructions that lanes execute together: shuffles, votes, barriers, and those of tensor cores.

use super::decode::{Parts, bare, number, only, take};
use super::operands::{Body, Operand, Result};
use super::program::{Atom, Instr, Op, Space, Ty, flag};

impl Body<'_> {
    pub(super) fn lanes(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        if parts.root == "activemask" {
            only(parts.ty()?, &[&[Ty::B32]])?;
            let mut i = Instr::new(Op::Activemask, Ty::B32);
            let [d] = take(operands)?;
            i.d = self.output(d, Ty::B32)?;
            return Ok(i);
        }
        if !parts.take("sync") {
            return Err("only the form with .sync is known to this machine".to_string());
        }
        match parts.root {
            "shfl" => {
                let modes = [("up", 0), ("down", 1), ("bfly", 2), ("idx", 3)];
                let mode = parts.one_of(&modes).ok_or("it has no mode")?;
                only(parts.ty()?, &[&[Ty::B32]])?;
                let second = matches!(operands.get(1), Some(Operand::Predicate(_)));
                let values = operands.get(1 + usize::from(second)..).unwrap_or(&[]);
                let [a, b, c, mask] = take(values)?;
                let mut i = self.binary(Op::Shfl, Ty::B32, [&operands[0], a, b])?;
                i.flags = mode;
                i.c = self.input(c, Ty::U32)?;
                i.x = self.input(mask, Ty::U32)?;
                if second {
                    i.e = self.predicate_output(&operands[1])?;
                }
                Ok(i)
            }
            "vote" => {
                let modes = [("all", 0), ("any", 1), ("uni", 2), ("ballot", 3)];
                let mode = parts.one_of(&modes).ok_or("it has no mode")?;
                let ty = parts.ty()?;
                let [d, a, mask] = take(operands)?;
                let mut i = Instr::new(Op::Vote, ty);
                i.flags = mode;
                i.d = match (mode, ty) {
                    (3, Ty::B32) => self.output(d, Ty::B32)?,
                    (0..=2, Ty::Pred) => self.predicate_output(d)?,
                    _ => return Err("a type that this vote does not have".to_string()),
                };
                i.a = self.predicate(a)?;
                i.b = self.input(mask, Ty::U32)?;
                Ok(i)
            }
            _ => {
                let table = [
                    ("add", Atom::Add),
                    ("min", Atom::Min),
                    ("max", Atom::Max),
                    ("and", Atom::And),
                    ("or", Atom::Or),
                    ("xor", Atom::Xor),
                ];
                let atom = parts.one_of(&table).ok_or("it has no operation")?;
                let ty = parts.ty()?;
                only(ty, &[&[Ty::U32, Ty::S32, Ty::B32]])?;
                let [d, a, mask] = take(operands)?;
                let mut i = self.unary_of(Op::Redux, d, ty, a, ty)?;
                i.atom = atom;
                i.b = self.input(mask, Ty::U32)?;
                Ok(i)
            }
        }
    }

    pub(super) fn barrier(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        if parts.take("warp") {
            if !parts.take("sync") {
                return Err("only bar.warp.sync is known to this machine".to_string());
            }
            let [mask] = take(operands)?;
            let mut i = Instr::new(Op::BarWarp, Ty::B32);
            i.a = self.input(mask, Ty::U32)?;
            return Ok(i);
        }
        parts.take("cta");
        if !parts.take("sync") {
            return Err("only the form with .sync is known to this machine".to_string());
        }
        if parts.root == "barrier" && !parts.take("aligned") {
            return Err("only the form with .aligned is known to this machine".to_string());
        }
        let mut i = Instr::new(Op::Bar, Ty::U32);
        let (id, count) = match operands {
            [id] => (id, None),
            [id, count] => (id, Some(count)),
            _ => return Err("the wrong number of operands".to_string()),
        };
        i.a = self.input(id, Ty::U32)?;
        if let Some(count) = count {
            i.b = self.input(count, Ty::U32)?;
        }
        Ok(i)
    }

    pub(super) fn mma(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        if parts.rest != ["sync", "aligned", "m16n8k16", "row", "col", "f32", "bf16", "bf16", "f32"] {
            return Err("this shape, layout or type is not executed yet".to_string());
        }
        parts.rest.clear();
        let [d, a, b, c] = take(operands)?;
        let mut i = Instr::new(Op::Mma, Ty::F32);
        i.d = self.list(d, 4, Ty::F32, true)?;
        self.list(a, 4, Ty::B32, false)?;
        self.list(b, 2, Ty::B32, false)?;
        self.list(c, 4, Ty::F32, false)?;
        Ok(i)
    }

    pub(super) fn ldmatrix(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        let known = parts.take("sync") && parts.take("aligned") && parts.take("m8n8") && parts.take("b16");
        if !known || !(parts.take("shared") || parts.take("shared::cta")) {
            return Err("only .sync.aligned.m8n8 of .shared.b16 is known to this machine".to_string());
        }
        let n = parts.one_of(&[("x1", 1u8), ("x2", 2), ("x4", 4)]).ok_or("it has no number")?;
        let [d, address] = take(operands)?;
        let mut i = Instr::new(Op::Ldmatrix, Ty::B32);
        i.space = Space::Shared;
        i.n = n;
        i.flags = parts.flags(&[("trans", flag::TRANS)]);
        i.d = self.list(d, n as usize, Ty::B32, true)?;
        self.address(&mut i, address)?;
        Ok(i)
    }

    pub(super) fn wgmma(&mut self, parts: &mut Parts, operands: &[Operand]) -> Result<Instr> {
        let action = parts.rest.first().copied().unwrap_or("");
        parts.rest.drain(..1.min(parts.rest.len()));
        if !parts.take("sync") || !parts.take("aligned") {
            return Err("expected .sync.aligned".to_string());
        }
        self.uses_wgmma = true;
        match action {
            "fence" => bare(Op::WgmmaFence, operands),
            "commit_group" => bare(Op::WgmmaCommit, operands),
            "wait_group" => {
                let [n] = take(operands)?;
                let mut i = Instr::new(Op::WgmmaWait, Ty::B32);
                i.x = number(n)?;
                Ok(i)
            }
            "mma_async" => {
                let shape = parts.rest.first().copied().unwrap_or("");
                let columns = shape.strip_prefix("m64n").and_then(|s| s.strip_suffix("k16"));
                let columns = columns.and_then(|n| n.parse::<u32>().ok());
                let columns =
                    columns.filter(|n| n % 8 == 0 && (8..=256).contains(n)).ok_or("an unknown shape")?;
                if parts.rest[1..] != ["f32", "bf16", "bf16"] {
                    return Err("these types are not executed yet".to_string());
                }
                parts.rest.clear();
                let [d, a, b, add, scale_a, scale_b, trans_a, trans_b] = take(operands)?;
                let settings = [number(scale_a)?, number(scale_b)?, number(trans_a)?, number(trans_b)?];
                if settings != [1, 1, 0, 0] {
                    return Err("negated or transposed operands are not executed yet".to_string());
                }
                let mut i = Instr::new(Op::Wgmma, Ty::F32);
                i.x = columns / 2;
                i.d = self.list(d, (columns / 2) as usize, Ty::F32, true)?;
                i.a = self.input(a, Ty::B64)?;
                i.b = self.input(b, Ty::B64)?;
                i.c = self.predicate(add)?;
                Ok(i)
            }
            _ => Err("this form is not known to this machine".to_string()),
        }
    }
}
