//! Instructions that compute values from values, lane by lane.
#![allow(clippy::useless_conversion, reason = "the macros widen types that may be wide already")]

use super::exec::{approximate, predicate, set_predicate};
use super::lanes::{ALL, Element, LANES, Rows, narrow};
use super::math::{self, canonical, flush, saturate};
use crate::ptx::Kernel;
use crate::ptx::program::{Cmp, Instr, Op, Ty, flag};

/// Runs an expression with `$T` as the integer type of an instruction.
macro_rules! by_int {
    ($i:ident, $T:ident, $body:expr) => {
        match $i.ty {
            Ty::U32 | Ty::B32 => {
                type $T = u32;
                $body
            }
            Ty::S32 => {
                type $T = i32;
                $body
            }
            Ty::U64 | Ty::B64 => {
                type $T = u64;
                $body
            }
            Ty::S64 => {
                type $T = i64;
                $body
            }
            Ty::S16 => {
                type $T = i16;
                $body
            }
            _ => {
                type $T = u16;
                $body
            }
        }
    };
}

/// Runs an expression with `$T` as the unsigned type of an instruction's width.
macro_rules! by_width {
    ($i:ident, $T:ident, $body:expr) => {
        match $i.ty.bytes() {
            4 => {
                type $T = u32;
                $body
            }
            8 => {
                type $T = u64;
                $body
            }
            _ => {
                type $T = u16;
                $body
            }
        }
    };
}

/// Applies `.ftz` and `.sat` to a result.
#[inline(always)]
fn finish(i: &Instr, x: f32) -> f32 {
    let x = if i.has(flag::FTZ) { flush(x) } else { x };
    if i.has(flag::SAT) { saturate(x) } else { x }
}

/// `d = result` of f32 in the lanes of `mask`, with the modifiers that f32 operations have. A macro, because closures are not
/// always inlined, and then have no vectors.
macro_rules! f32s {
    ($rows:ident, $i:ident, $mask:ident, |$($x:ident: $row:ident),*| $result:expr) => {{
        let mut out = [0.0f32; LANES];
        $(let $row = *$rows.get::<f32>($i.$row);)*
        if $i.flags & (flag::FTZ | flag::SAT) == 0 {
            for lane in 0..LANES {
                $(let $x = $row[lane];)*
                out[lane] = canonical($result);
            }
        } else {
            for lane in 0..LANES {
                $(let $x = if $i.has(flag::FTZ) { flush($row[lane]) } else { $row[lane] };)*
                out[lane] = finish($i, canonical($result));
            }
        }
        $rows.put($mask, $i.d, &out);
    }};
}

/// Executes one instruction in the lanes of `mask`.
///
/// # Safety
/// The operands are the kernel's, of the widths that its types say.
#[inline(always)]
pub(super) unsafe fn execute(
    perturb: bool,
    rows: &Rows,
    predicates: &mut [u32],
    kernel: &Kernel,
    i: &Instr,
    mask: u32,
) {
    let two = [i.d, i.a, i.b];
    let three = [i.d, i.a, i.b, i.c];
    // SAFETY: the caller vouches for the operands.
    unsafe {
        match i.op {
            Op::Mov => by_width!(i, T, rows.map1(mask, i.d, i.a, |a: T| a)),
            Op::Pack => pack(rows, kernel, i, mask),
            Op::Unpack => unpack(rows, kernel, i, mask),
            Op::Add => match i.ty {
                Ty::F32 => f32s!(rows, i, mask, |x: a, y: b| x + y),
                Ty::F64 => rows.map2(mask, two, |a: f64, b: f64| a + b),
                _ => by_width!(i, T, rows.map2(mask, two, |a: T, b: T| a.wrapping_add(b))),
            },
            Op::Sub => match i.ty {
                Ty::F32 => f32s!(rows, i, mask, |x: a, y: b| x - y),
                Ty::F64 => rows.map2(mask, two, |a: f64, b: f64| a - b),
                _ => by_width!(i, T, rows.map2(mask, two, |a: T, b: T| a.wrapping_sub(b))),
            },
            Op::MulLo => match i.ty {
                Ty::F32 => f32s!(rows, i, mask, |x: a, y: b| x * y),
                Ty::F64 => rows.map2(mask, two, |a: f64, b: f64| a * b),
                _ => by_width!(i, T, rows.map2(mask, two, |a: T, b: T| a.wrapping_mul(b))),
            },
            Op::MulHi => high_product(rows, i, mask),
            Op::MulWide => match i.ty {
                Ty::U16 => rows.map2(mask, two, |a: u16, b: u16| u32::from(a) * u32::from(b)),
                Ty::S16 => rows.map2(mask, two, |a: i16, b: i16| i32::from(a) * i32::from(b)),
                Ty::U32 => rows.map2(mask, two, |a: u32, b: u32| u64::from(a) * u64::from(b)),
                _ => rows.map2(mask, two, |a: i32, b: i32| i64::from(a) * i64::from(b)),
            },
            Op::MadLo => {
                by_width!(i, T, rows.map3(mask, three, |a: T, b: T, c: T| a.wrapping_mul(b).wrapping_add(c)));
            }
            Op::MadHi => {
                high_product(rows, i, mask);
                by_width!(i, T, rows.map2(mask, [i.d, i.d, i.c], |a: T, c: T| a.wrapping_add(c)));
            }
            Op::MadWide => match i.ty {
                Ty::U16 => rows.map3(mask, three, |a: u16, b: u16, c: u32| {
                    (u32::from(a) * u32::from(b)).wrapping_add(c)
                }),
                Ty::S16 => rows.map3(mask, three, |a: i16, b: i16, c: i32| {
                    (i32::from(a) * i32::from(b)).wrapping_add(c)
                }),
                Ty::U32 => rows.map3(mask, three, |a: u32, b: u32, c: u64| {
                    (u64::from(a) * u64::from(b)).wrapping_add(c)
                }),
                _ => rows.map3(mask, three, |a: i32, b: i32, c: i64| {
                    (i64::from(a) * i64::from(b)).wrapping_add(c)
                }),
            },
            Op::Fma if i.ty == Ty::F64 => rows.map3(mask, three, |a: f64, b: f64, c: f64| a.mul_add(b, c)),
            Op::Fma => f32s!(rows, i, mask, |x: a, y: b, z: c| x.mul_add(y, z)),
            Op::Div => match i.ty {
                Ty::F32 if i.has(flag::APPROX) && perturb => f32s!(rows, i, mask, |x: a, y: b| {
                    math::perturb(x.to_bits() ^ y.to_bits().rotate_left(16), x / y, 2)
                }),
                Ty::F32 => f32s!(rows, i, mask, |x: a, y: b| x / y),
                Ty::F64 => rows.map2(mask, two, |a: f64, b: f64| a / b),
                // A quotient by zero has all bits set, as the code that ptxas generates gives.
                _ => by_int!(
                    i,
                    T,
                    rows.map2(mask, two, |a: T, b: T| if b == 0 { !0 } else { a.wrapping_div(b) })
                ),
            },
            Op::Rem => {
                by_int!(i, T, rows.map2(mask, two, |a: T, b: T| if b == 0 { a } else { a.wrapping_rem(b) }));
            }
            Op::Min => match i.ty {
                Ty::F32 => f32s!(rows, i, mask, |x: a, y: b| math::min_f32(x, y, i.has(flag::NAN))),
                Ty::F64 => rows.map2(mask, two, math::min_f64),
                _ => by_int!(i, T, rows.map2(mask, two, |a: T, b: T| a.min(b))),
            },
            Op::Max => match i.ty {
                Ty::F32 => f32s!(rows, i, mask, |x: a, y: b| math::max_f32(x, y, i.has(flag::NAN))),
                Ty::F64 => rows.map2(mask, two, |a: f64, b: f64| -math::min_f64(-a, -b)),
                _ => by_int!(i, T, rows.map2(mask, two, |a: T, b: T| a.max(b))),
            },
            Op::Neg => match i.ty {
                // The sign bit only: also of NaN.
                Ty::F32 => rows.map1(mask, i.d, i.a, |a: u32| a ^ 1 << 31),
                Ty::F64 => rows.map1(mask, i.d, i.a, |a: u64| a ^ 1 << 63),
                _ => by_width!(i, T, rows.map1(mask, i.d, i.a, |a: T| a.wrapping_neg())),
            },
            Op::Abs => match i.ty {
                Ty::F32 => rows.map1(mask, i.d, i.a, |a: u32| a & !(1 << 31)),
                Ty::F64 => rows.map1(mask, i.d, i.a, |a: u64| a & !(1 << 63)),
                Ty::S64 => rows.map1(mask, i.d, i.a, |a: i64| a.wrapping_abs()),
                Ty::S32 => rows.map1(mask, i.d, i.a, |a: i32| a.wrapping_abs()),
                _ => rows.map1(mask, i.d, i.a, |a: i16| a.wrapping_abs()),
            },
            Op::And => by_width!(i, T, rows.map2(mask, two, |a: T, b: T| a & b)),
            Op::Or => by_width!(i, T, rows.map2(mask, two, |a: T, b: T| a | b)),
            Op::Xor => by_width!(i, T, rows.map2(mask, two, |a: T, b: T| a ^ b)),
            Op::Not => by_width!(i, T, rows.map1(mask, i.d, i.a, |a: T| !a)),
            Op::Shl => {
                by_width!(i, T, rows.map2(mask, two, |a: T, b: u32| if b < T::BITS { a << b } else { 0 }));
            }
            Op::Shr if i.ty.is_signed() => {
                by_int!(i, T, rows.map2(mask, two, |a: T, b: u32| a >> b.min(T::BITS - 1)));
            }
            Op::Shr => {
                by_width!(i, T, rows.map2(mask, two, |a: T, b: u32| if b < T::BITS { a >> b } else { 0 }));
            }
            Op::ShfL | Op::ShfR => rows.map3(mask, three, |a: u32, b: u32, c: u32| {
                let n = if i.has(flag::WRAP) { c & 31 } else { c.min(32) };
                let pair = u64::from(b) << 32 | u64::from(a);
                if i.op == Op::ShfL { ((pair << n) >> 32) as u32 } else { (pair >> n) as u32 }
            }),
            Op::Bfe => by_width!(
                i,
                T,
                rows.map3(mask, three, |a: T, b: u32, c: u32| {
                    math::bfe(u64::from(a), b, c, T::BITS, i.ty.is_signed()) as T
                })
            ),
            Op::Bfi => {
                let length = *rows.get::<u32>(i.e);
                let position = *rows.get::<u32>(i.c);
                let mut fields = [0u64; LANES];
                for lane in 0..LANES {
                    fields[lane] = u64::from(position[lane] & 255) << 32 | u64::from(length[lane] & 255);
                }
                if i.ty.bytes() == 8 {
                    let (a, b) = (*rows.get::<u64>(i.a), *rows.get::<u64>(i.b));
                    let mut out = [0u64; LANES];
                    for lane in 0..LANES {
                        out[lane] = math::bfi(a[lane], b[lane], position[lane], length[lane], 64);
                    }
                    rows.put(mask, i.d, &out);
                } else {
                    let (a, b) = (*rows.get::<u32>(i.a), *rows.get::<u32>(i.b));
                    let mut out = [0u32; LANES];
                    for lane in 0..LANES {
                        let (a, b) = (u64::from(a[lane]), u64::from(b[lane]));
                        out[lane] = math::bfi(a, b, position[lane], length[lane], 32) as u32;
                    }
                    rows.put(mask, i.d, &out);
                }
            }
            Op::Popc => by_width!(i, T, rows.map1(mask, i.d, i.a, |a: T| a.count_ones())),
            Op::Clz => by_width!(i, T, rows.map1(mask, i.d, i.a, |a: T| a.leading_zeros())),
            Op::Brev => by_width!(i, T, rows.map1(mask, i.d, i.a, |a: T| a.reverse_bits())),
            Op::Bfind | Op::BfindShift => by_width!(
                i,
                T,
                rows.map1(mask, i.d, i.a, |a: T| {
                    let at = math::bfind(u64::from(a), T::BITS, i.ty.is_signed());
                    if i.op == Op::Bfind || at == u32::MAX { at } else { T::BITS - 1 - at }
                })
            ),
            Op::Prmt => rows.map3(mask, three, math::prmt),
            Op::Lop3 => rows.map3(mask, three, |a: u32, b: u32, c: u32| {
                (0..8).filter(|row| i.x >> row & 1 == 1).fold(0, |all, row: u32| {
                    let pick = |x: u32, bit: u32| if row >> bit & 1 == 1 { x } else { !x };
                    all | pick(a, 2) & pick(b, 1) & pick(c, 0)
                })
            }),
            Op::Copysign => rows.map2(mask, two, |a: u32, b: u32| a & 1 << 31 | b & !(1 << 31)),
            Op::Sqrt => match i.ty {
                Ty::F64 => rows.map1(mask, i.d, i.a, |a: f64| a.sqrt()),
                _ => {
                    let moved = perturb && i.has(flag::APPROX);
                    f32s!(rows, i, mask, |x: a| approximate(moved, x, x.sqrt(), 1));
                }
            },
            Op::Rcp => match i.ty {
                Ty::F64 => rows.map1(mask, i.d, i.a, |a: f64| 1.0 / a),
                _ => {
                    let moved = perturb && i.has(flag::APPROX);
                    f32s!(rows, i, mask, |x: a| approximate(moved, x, 1.0 / x, 1));
                }
            },
            Op::Rsqrt => {
                f32s!(rows, i, mask, |x: a| approximate(perturb, x, (1.0 / f64::from(x).sqrt()) as f32, 2))
            }
            Op::Ex2 => f32s!(rows, i, mask, |x: a| approximate(perturb, x, math::ex2(x), 2)),
            Op::Lg2 => f32s!(rows, i, mask, |x: a| approximate(perturb, x, f64::from(x).log2() as f32, 1)),
            Op::Setp => compare(rows, predicates, i, mask),
            Op::Selp => {
                let chosen = predicate(predicates, i.c);
                by_width!(i, T, {
                    type Raw = <T as Element>::Raw;
                    let (a, b) = (*rows.get::<Raw>(i.a), *rows.get::<Raw>(i.b));
                    let mut out = [0; LANES];
                    for lane in 0..LANES {
                        out[lane] = if chosen >> lane & 1 == 1 { a[lane] } else { b[lane] };
                    }
                    rows.put(mask, i.d, &out);
                });
            }
            Op::Cvt => convert(rows, i, mask),
            Op::CvtPack => {
                if i.ty == Ty::BF16x2 {
                    rows.map2(mask, two, |a: f32, b: f32| {
                        u32::from(math::to_bf16(a)) << 16 | u32::from(math::to_bf16(b))
                    });
                } else {
                    rows.map2(mask, two, |a: f32, b: f32| {
                        u32::from(math::to_f16(a)) << 16 | u32::from(math::to_f16(b))
                    });
                }
            }
            Op::PMov => set_predicate(predicates, i.d, mask, predicate(predicates, i.a)),
            Op::PNot => set_predicate(predicates, i.d, mask, !predicate(predicates, i.a)),
            Op::PAnd | Op::POr | Op::PXor => {
                let value = combine(i.op as u32, predicate(predicates, i.a), predicate(predicates, i.b));
                set_predicate(predicates, i.d, mask, value);
            }
            _ => unreachable!("the loop over instructions handles the others"),
        }
    }
}

#[inline(always)]
fn combine(op: u32, a: u32, b: u32) -> u32 {
    if op == Op::PAnd as u32 {
        a & b
    } else if op == Op::POr as u32 {
        a | b
    } else {
        a ^ b
    }
}

#[inline(always)]
unsafe fn high_product(rows: &Rows, i: &Instr, mask: u32) {
    let two = [i.d, i.a, i.b];
    // SAFETY: the caller vouches for the operands.
    unsafe {
        match i.ty {
            Ty::U16 => rows.map2(mask, two, |a: u16, b: u16| ((u32::from(a) * u32::from(b)) >> 16) as u16),
            Ty::S16 => rows.map2(mask, two, |a: i16, b: i16| ((i32::from(a) * i32::from(b)) >> 16) as i16),
            Ty::U32 => rows.map2(mask, two, |a: u32, b: u32| ((u64::from(a) * u64::from(b)) >> 32) as u32),
            Ty::S32 => rows.map2(mask, two, |a: i32, b: i32| ((i64::from(a) * i64::from(b)) >> 32) as i32),
            Ty::U64 => rows.map2(mask, two, |a: u64, b: u64| ((u128::from(a) * u128::from(b)) >> 64) as u64),
            _ => rows.map2(mask, two, |a: i64, b: i64| ((i128::from(a) * i128::from(b)) >> 64) as i64),
        }
    }
}

#[inline(always)]
unsafe fn compare(rows: &Rows, predicates: &mut [u32], i: &Instr, mask: u32) {
    macro_rules! all {
        ($T:ty, $prepare:expr) => {{
            let test = |f: fn($T, $T) -> bool| {
                let prepare: fn($T) -> $T = $prepare;
                rows.test(i.a, i.b, |a: $T, b: $T| f(prepare(a), prepare(b)))
            };
            match i.cmp {
                Cmp::Eq => test(|a, b| a == b),
                Cmp::Ne => test(|a, b| a != b && !a.is_nan() && !b.is_nan()),
                Cmp::Lt => test(|a, b| a < b),
                Cmp::Le => test(|a, b| a <= b),
                Cmp::Gt => test(|a, b| a > b),
                Cmp::Ge => test(|a, b| a >= b),
                Cmp::Equ => test(|a, b| a == b || a.is_nan() || b.is_nan()),
                Cmp::Neu => !test(|a, b| a == b),
                Cmp::Ltu => !test(|a, b| a >= b),
                Cmp::Leu => !test(|a, b| a > b),
                Cmp::Gtu => !test(|a, b| a <= b),
                Cmp::Geu => !test(|a, b| a < b),
                Cmp::Num => test(|a, b| !a.is_nan() && !b.is_nan()),
                Cmp::Nan => test(|a, b| a.is_nan() || b.is_nan()),
            }
        }};
    }
    macro_rules! ints {
        ($T:ty) => {
            match i.cmp {
                Cmp::Eq => rows.test(i.a, i.b, |a: $T, b: $T| a == b),
                Cmp::Ne => rows.test(i.a, i.b, |a: $T, b: $T| a != b),
                Cmp::Lt => rows.test(i.a, i.b, |a: $T, b: $T| a < b),
                Cmp::Le => rows.test(i.a, i.b, |a: $T, b: $T| a <= b),
                Cmp::Gt => rows.test(i.a, i.b, |a: $T, b: $T| a > b),
                _ => rows.test(i.a, i.b, |a: $T, b: $T| a >= b),
            }
        };
    }
    // SAFETY: the caller vouches for the operands.
    let mut result = unsafe {
        match i.ty {
            Ty::F32 if i.has(flag::FTZ) => all!(f32, flush),
            Ty::F32 => all!(f32, |x| x),
            Ty::F64 => all!(f64, |x| x),
            Ty::U32 | Ty::B32 => ints!(u32),
            Ty::S32 => ints!(i32),
            Ty::U64 | Ty::B64 => ints!(u64),
            Ty::S64 => ints!(i64),
            Ty::S16 => ints!(i16),
            _ => ints!(u16),
        }
    };
    let mut inverse = !result;
    if i.c != u32::MAX {
        let other = predicate(predicates, i.c);
        result = combine(i.x, result, other);
        inverse = combine(i.x, inverse, other);
    }
    set_predicate(predicates, i.d, mask, result);
    set_predicate(predicates, i.e, mask, inverse);
}

#[inline(never)]
unsafe fn pack(rows: &Rows, kernel: &Kernel, i: &Instr, mask: u32) {
    let bits = i.from.bytes() * 8;
    let mut out = [0u64; LANES];
    for at in 0..u32::from(i.n) {
        let row = kernel.lists[(i.a + at) as usize];
        for (lane, out) in out.iter_mut().enumerate() {
            // SAFETY: the caller vouches for the operands; a single 64-bit item is no pack.
            let item = unsafe { rows.lane(row, lane) };
            let item = if bits == 16 { item & 0xffff } else { item };
            *out |= u64::from(item) << (at * bits);
        }
    }
    // SAFETY: the caller vouches for the operands.
    unsafe {
        if i.ty.bytes() == 8 {
            rows.put(mask, i.d, &out);
        } else {
            rows.put(mask, i.d, &narrow(&out));
        }
    }
}

#[inline(never)]
unsafe fn unpack(rows: &Rows, kernel: &Kernel, i: &Instr, mask: u32) {
    let bits = i.from.bytes() * 8;
    // SAFETY: the caller vouches for the operands.
    unsafe {
        let a =
            if i.ty.bytes() == 8 { *rows.get::<u64>(i.a) } else { (*rows.get::<u32>(i.a)).map(u64::from) };
        for at in 0..u32::from(i.n) {
            let ones = if bits == 16 { 0xffff } else { u64::from(ALL) };
            rows.put(mask, kernel.lists[(i.d + at) as usize], &a.map(|x| (x >> (at * bits) & ones) as u32));
        }
    }
}

/// Widens the integers of a source to 64 bits, converts, and narrows to the width of the result.
#[inline(always)]
unsafe fn convert(rows: &Rows, i: &Instr, mask: u32) {
    // SAFETY: the caller vouches for the operands.
    unsafe {
        // The common conversions first: they become vector code.
        if i.flags & (flag::SAT | flag::FTZ) == 0 {
            match (i.ty, i.from) {
                (Ty::U64, Ty::U32) => return rows.map1(mask, i.d, i.a, |a: u32| u64::from(a)),
                (Ty::S64 | Ty::U64, Ty::S32) => return rows.map1(mask, i.d, i.a, |a: i32| i64::from(a)),
                (Ty::U32 | Ty::S32, Ty::U64 | Ty::S64) => {
                    return rows.map1(mask, i.d, i.a, |a: u64| a as u32);
                }
                (Ty::F32, Ty::U32) => return rows.map1(mask, i.d, i.a, |a: u32| a as f32),
                (Ty::F32, Ty::S32) => return rows.map1(mask, i.d, i.a, |a: i32| a as f32),
                (Ty::F32, Ty::F32) if i.has(flag::RNI) => {
                    return rows.map1(mask, i.d, i.a, |a: f32| canonical(a.round_ties_even()));
                }
                (Ty::U32, Ty::F32) if i.has(flag::RZI) => {
                    return rows.map1(mask, i.d, i.a, |a: f32| a as u32);
                }
                (Ty::S32, Ty::F32) if i.has(flag::RZI) => {
                    return rows.map1(mask, i.d, i.a, |a: f32| a as i32);
                }
                _ => {}
            }
        }
        any_conversion(rows, i, mask);
    }
}

/// Any conversion, one lane at a time.
#[inline(never)]
unsafe fn any_conversion(rows: &Rows, i: &Instr, mask: u32) {
    let mut out = [0u64; LANES];
    for (lane, out) in out.iter_mut().enumerate() {
        // SAFETY: the caller vouches for the operands.
        let raw = unsafe {
            if i.from.bytes() == 8 { (*rows.get::<u64>(i.a))[lane] } else { u64::from(rows.lane(i.a, lane)) }
        };
        *out = convert_one(i, raw);
    }
    // SAFETY: the caller vouches for the operands.
    unsafe {
        if i.ty.bytes() == 8 {
            rows.put(mask, i.d, &out);
        } else {
            rows.put(mask, i.d, &narrow(&out));
        }
    }
}

/// One conversion. A result narrower than its register is extended by its sign if it has one.
fn convert_one(i: &Instr, raw: u64) -> u64 {
    let bits = i.ty.bytes() * 8;
    let ftz = i.has(flag::FTZ);
    if !i.from.is_float() {
        let width = i.from.bytes() * 8;
        let value = if i.from.is_signed() {
            i128::from((raw << (64 - width)) as i64 >> (64 - width))
        } else {
            i128::from(raw << (64 - width) >> (64 - width))
        };
        return match i.ty {
            Ty::F32 => u64::from((value as f32).to_bits()),
            Ty::F64 => (value as f64).to_bits(),
            Ty::F16 => u64::from(math::to_f16(value as f32)),
            Ty::BF16 => u64::from(math::to_bf16(value as f32)),
            _ if i.has(flag::SAT) => extend(i.ty, value.clamp(lowest(i.ty), highest(i.ty))),
            _ => extend(i.ty, value),
        };
    }
    let wide = match i.from {
        Ty::F32 => {
            let x = f32::from_bits(raw as u32);
            f64::from(if ftz { flush(x) } else { x })
        }
        Ty::F16 => f64::from(math::from_f16(raw as u16)),
        Ty::BF16 => f64::from(math::from_bf16(raw as u16)),
        _ => f64::from_bits(raw),
    };
    let rounded = if i.has(flag::RNI) {
        wide.round_ties_even()
    } else if i.has(flag::RZI) {
        wide.trunc()
    } else if i.has(flag::RMI) {
        wide.floor()
    } else if i.has(flag::RPI) {
        wide.ceil()
    } else {
        wide
    };
    if !i.ty.is_float() {
        if wide.is_nan() {
            // Zero, but for 64-bit results or sources the highest bit of the result.
            return if bits == 64 || i.from == Ty::F64 { extend(i.ty, 1 << (bits - 1)) } else { 0 };
        }
        return extend(i.ty, (rounded as i128).clamp(lowest(i.ty), highest(i.ty)));
    }
    let rounded = if i.has(flag::SAT) { if rounded > 0.0 { rounded.min(1.0) } else { 0.0 } } else { rounded };
    let single = canonical(rounded as f32);
    match i.ty {
        Ty::F64 => rounded.to_bits(),
        Ty::F16 => u64::from(math::to_f16(single)),
        Ty::BF16 => u64::from(math::to_bf16(single)),
        _ => u64::from(if ftz { flush(single) } else { single }.to_bits()),
    }
}

fn lowest(ty: Ty) -> i128 {
    if ty.is_signed() { -(1 << (ty.bytes() * 8 - 1)) } else { 0 }
}

fn highest(ty: Ty) -> i128 {
    (1 << (ty.bytes() * 8 - u32::from(ty.is_signed()))) - 1
}

/// The bits of an integer in its register: cut to the type, then extended to 32 or 64 bits; 16-bit registers hold no more
/// than their bits.
fn extend(ty: Ty, value: i128) -> u64 {
    match ty {
        Ty::S8 => value as i8 as u32 as u64,
        Ty::U8 => value as u8 as u64,
        Ty::S16 | Ty::U16 => value as u16 as u64,
        Ty::S32 | Ty::U32 => value as u32 as u64,
        _ => value as u64,
    }
}
