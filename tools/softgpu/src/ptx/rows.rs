//! Which rows an instruction reads and writes.

use super::program::{CONSTANT, Instr, NONE, Op, Ty, flag};

/// Calls `f` for each row that an instruction reads or writes, with whether it is a 64-bit row and whether it is written.
pub(super) fn rows(i: &mut Instr, lists: &mut [u32], mut f: impl FnMut(&mut u32, bool, bool)) {
    let wide = i.ty.bytes() == 8;
    let from_wide = i.from.bytes() == 8;
    let narrow = i.has(flag::NARROW);
    let address = |row: &mut u32, f: &mut dyn FnMut(&mut u32, bool, bool)| f(row, !narrow, false);
    let all = |at: u32,
               n: usize,
               wide: bool,
               write: bool,
               lists: &mut [u32],
               f: &mut dyn FnMut(&mut u32, bool, bool)| {
        for row in &mut lists[at as usize..at as usize + n] {
            f(row, wide, write);
        }
    };
    match i.op {
        Op::Mov
        | Op::Neg
        | Op::Abs
        | Op::Not
        | Op::Brev
        | Op::Sqrt
        | Op::Rcp
        | Op::Rsqrt
        | Op::Ex2
        | Op::Lg2 => {
            f(&mut i.a, wide, false);
            f(&mut i.d, wide, true);
        }
        Op::Pack => {
            all(i.a, i.n as usize, from_wide, false, lists, &mut f);
            f(&mut i.d, wide, true);
        }
        Op::Unpack => {
            f(&mut i.a, wide, false);
            all(i.d, i.n as usize, from_wide, true, lists, &mut f);
        }
        Op::Special => f(&mut i.d, wide, true),
        Op::Popc | Op::Clz | Op::Bfind | Op::BfindShift => {
            f(&mut i.a, wide, false);
            f(&mut i.d, false, true);
        }
        Op::Add
        | Op::Sub
        | Op::MulLo
        | Op::MulHi
        | Op::Div
        | Op::Rem
        | Op::Min
        | Op::Max
        | Op::And
        | Op::Or
        | Op::Xor
        | Op::Copysign
        | Op::Selp => {
            f(&mut i.a, wide, false);
            f(&mut i.b, wide, false);
            f(&mut i.d, wide, true);
        }
        Op::MulWide | Op::MadLo | Op::MadHi | Op::MadWide | Op::Fma => {
            let result = if matches!(i.op, Op::MulWide | Op::MadWide) { i.ty.bytes() == 4 } else { wide };
            f(&mut i.a, wide, false);
            f(&mut i.b, wide, false);
            if i.op != Op::MulWide {
                f(&mut i.c, result, false);
            }
            f(&mut i.d, result, true);
        }
        Op::Shl | Op::Shr => {
            f(&mut i.a, wide, false);
            f(&mut i.b, false, false);
            f(&mut i.d, wide, true);
        }
        Op::ShfL | Op::ShfR | Op::Prmt | Op::Lop3 => {
            f(&mut i.a, false, false);
            f(&mut i.b, false, false);
            f(&mut i.c, false, false);
            f(&mut i.d, false, true);
        }
        Op::Bfe | Op::Bfi => {
            f(&mut i.a, wide, false);
            f(&mut i.b, i.op == Op::Bfi && wide, false);
            f(&mut i.c, false, false);
            if i.op == Op::Bfi {
                f(&mut i.e, false, false);
            }
            f(&mut i.d, wide, true);
        }
        Op::Setp => {
            f(&mut i.a, wide, false);
            f(&mut i.b, wide, false);
        }
        Op::Cvt => {
            f(&mut i.a, from_wide, false);
            f(&mut i.d, wide, true);
        }
        Op::CvtPack => {
            f(&mut i.a, false, false);
            f(&mut i.b, false, false);
            f(&mut i.d, false, true);
        }
        Op::Ld | Op::St => {
            address(&mut i.a, &mut f);
            all(i.d, i.n as usize, wide || i.has(flag::WIDE), i.op == Op::Ld, lists, &mut f);
        }
        Op::Atomic => {
            address(&mut i.a, &mut f);
            f(&mut i.b, wide, false);
            f(&mut i.c, wide, false);
            f(&mut i.d, wide, true);
        }
        Op::CpAsync => {
            address(&mut i.a, &mut f);
            f(&mut i.c, true, false);
            f(&mut i.b, false, false);
        }
        Op::Prefetch => {
            address(&mut i.a, &mut f);
            f(&mut i.b, false, false);
        }
        Op::Shfl => {
            for row in [&mut i.a, &mut i.b, &mut i.c, &mut i.x] {
                f(row, false, false);
            }
            f(&mut i.d, false, true);
        }
        Op::Vote => {
            f(&mut i.b, false, false);
            if i.ty == Ty::B32 {
                f(&mut i.d, false, true);
            }
        }
        Op::Redux => {
            f(&mut i.a, false, false);
            f(&mut i.b, false, false);
            f(&mut i.d, false, true);
        }
        Op::Bar => {
            f(&mut i.a, false, false);
            f(&mut i.b, false, false);
        }
        Op::BarWarp => f(&mut i.a, false, false),
        Op::Activemask => f(&mut i.d, false, true),
        Op::Mma => {
            all(i.d + 4, 10, false, false, lists, &mut f);
            all(i.d, 4, false, true, lists, &mut f);
        }
        Op::Ldmatrix => {
            address(&mut i.a, &mut f);
            all(i.d, i.n as usize, false, true, lists, &mut f);
        }
        Op::Wgmma => {
            f(&mut i.a, true, false);
            f(&mut i.b, true, false);
            // Written, and read too.
            all(i.d, i.x as usize, false, true, lists, &mut f);
        }
        Op::PMov
        | Op::PAnd
        | Op::POr
        | Op::PXor
        | Op::PNot
        | Op::Bra
        | Op::Ret
        | Op::Trap
        | Op::CpAsyncCommit
        | Op::CpAsyncWait
        | Op::Fence
        | Op::FenceProxy
        | Op::DependentsLaunch
        | Op::DependentsWait
        | Op::WgmmaFence
        | Op::WgmmaCommit
        | Op::WgmmaWait => {}
    }
}

/// Whether an operand is a register, not a constant and not absent.
pub(super) fn is_register(row: u32) -> bool {
    row != NONE && row & CONSTANT == 0
}
