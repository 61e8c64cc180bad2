//! Every opcode that computes a value, against Rust arithmetic that was written for this test, on operands that
//! include all edge cases, with each instruction set of the host.

#[path = "../support/mod.rs"]
mod support;

use softgpu::machine::{Options, Sums};
use support::{Arg, Gpu, Random, VECTORS};

/// Runs `body`, which computes %d from %a, %b and %c, for each triple of operands. The registers have the types of `types`: d,
/// a, b, c; memory always holds 64 bits of each.
fn compute(types: [&str; 4], body: &str, operands: &[[u64; 3]]) -> Vec<u64> {
    let load = |name: &str, ty: &str, offset: u32| match ty {
        "pred" => String::new(),
        _ => format!("ld.global.{} %{name}, [%at+{offset}];", ty.replace("b16", "u16")),
    };
    let [d, a, b, c] = types;
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 in, .param .u64 out) {{\n\
         .reg .{d} %d; .reg .{a} %a; .reg .{b} %b; .reg .{c} %c; .reg .pred %p, %q; .reg .b32 %r<9>; .reg .b16 %h<9>;\n\
         .reg .b64 %at, %to, %zero, %rd<9>; .reg .u32 %t, %n, %k; .reg .f32 %f<9>;\n\
         mov.u32 %t, %tid.x; mov.u32 %n, %ctaid.x; mad.lo.u32 %t, %n, 64, %t;\n\
         ld.param.u64 %at, [in]; ld.param.u64 %to, [out]; mad.wide.u32 %at, %t, 24, %at; mad.wide.u32 %to, %t, 8, %to;\n\
         {} {} {}\n{body}\nmov.u64 %zero, 0; st.global.u64 [%to], %zero; st.global.{} [%to], %d; ret; }}",
        load("a", a, 0),
        load("b", b, 8),
        load("c", c, 16),
        d.replace("b16", "u16"),
    );
    let gpu = Gpu::new(&text);
    let mut rows = operands.to_vec();
    rows.resize(operands.len().next_multiple_of(64), [0; 3]);
    let from = gpu.upload("in", &rows);
    let to = gpu.fresh("out", rows.len() * 8);
    let launch = gpu.launch("k", rows.len() as u32 / 64, 64, &[Arg::U64(from), Arg::U64(to)]);
    let run = |perturb| {
        let results = VECTORS.map(|vectors| {
            let options = Options { perturb, vectors, ..Options::default() };
            gpu.run_with(std::slice::from_ref(&launch), &options)
                .unwrap_or_else(|fault| panic!("{body}: {fault}"));
            gpu.download(to, operands.len())
        });
        same(body, results)
    };
    run(true);
    run(false)
}

/// The result with each instruction set, which must be the same bits.
fn same(what: &str, [base, avx2, avx512]: [Vec<u64>; 3]) -> Vec<u64> {
    assert!(base == avx2 && base == avx512, "{what}: the host's instruction set changes the result");
    base
}

/// Triples of edge cases of a type, and of random numbers.
fn operands(kind: &str) -> Vec<[u64; 3]> {
    let edges: Vec<u64> = match kind {
        "f32" => {
            let special = [0, 0x8000_0000, 0x7f80_0000, 0xff80_0000, 0x7fc0_0000, 0xffc0_1234, 0x7f80_0001];
            let edge = [1, 0x8000_0001, 0x007f_ffff, 0x0080_0000, 0x7f7f_ffff, 0xff7f_ffff];
            let plain = [
                1.0f32,
                -1.0,
                0.5,
                1.5,
                2.5,
                -2.5,
                3.0,
                1e-30,
                4.25e9,
                -4.25e9,
                2_147_483_648.0,
                16_777_217.0,
            ];
            special.into_iter().chain(edge).chain(plain.map(f32::to_bits)).map(u64::from).collect()
        }
        "64" => vec![0, 1, 2, u64::MAX, i64::MAX as u64, i64::MIN as u64, 31, 32, 63, 64, 65, 255, 1 << 32],
        _ => vec![
            0,
            1,
            2,
            0xffff_ffff,
            0x7fff_ffff,
            0x8000_0000,
            31,
            32,
            33,
            64,
            255,
            256,
            0xffff,
            0x8000,
            0x7fff,
        ],
    };
    let mut random = Random(7);
    let mut all = Vec::new();
    for a in &edges {
        for b in &edges {
            let c = edges[random.bits() as usize % edges.len()];
            all.push([*a, *b, c]);
        }
    }
    for _ in 0..200 {
        let mask = if kind == "64" { u64::MAX } else { 0xffff_ffff };
        all.push([random.bits() & mask, random.bits() & mask, random.bits() & mask]);
    }
    all
}

fn expect(types: [&str; 4], body: &str, kind: &str, f: impl Fn(u64, u64, u64) -> u64) {
    let operands = operands(kind);
    for (got, [a, b, c]) in compute(types, body, &operands).into_iter().zip(&operands) {
        let expected = f(*a, *b, *c);
        assert_eq!(got, expected, "{body} of {a:#x}, {b:#x}, {c:#x}: {got:#x} instead of {expected:#x}");
    }
}

fn ints32(body: &str, f: impl Fn(u32, u32, u32) -> u32) {
    expect(["b32"; 4], body, "32", |a, b, c| u64::from(f(a as u32, b as u32, c as u32)));
}

fn ints64(body: &str, f: impl Fn(u64, u64, u64) -> u64) {
    expect(["b64"; 4], body, "64", f);
}

/// Any NaN is the one that PTX gives.
fn nan(x: f32) -> u64 {
    u64::from(if x.is_nan() { 0x7fff_ffff } else { x.to_bits() })
}

fn floats(body: &str, f: impl Fn(f32, f32, f32) -> f32) {
    let bits = |x: u64| f32::from_bits(x as u32);
    expect(["f32"; 4], body, "f32", |a, b, c| nan(f(bits(a), bits(b), bits(c))));
}

#[test]
fn integer_arithmetic() {
    ints32("add.u32 %d, %a, %b;", |a, b, _| a.wrapping_add(b));
    ints32("sub.s32 %d, %a, %b;", |a, b, _| a.wrapping_sub(b));
    ints32("mul.lo.s32 %d, %a, %b;", |a, b, _| a.wrapping_mul(b));
    ints32("mul.hi.u32 %d, %a, %b;", |a, b, _| ((u64::from(a) * u64::from(b)) >> 32) as u32);
    ints32("mul.hi.s32 %d, %a, %b;", |a, b, _| ((i64::from(a as i32) * i64::from(b as i32)) >> 32) as u32);
    ints32("mad.lo.s32 %d, %a, %b, %c;", |a, b, c| a.wrapping_mul(b).wrapping_add(c));
    ints32("min.s32 %d, %a, %b;", |a, b, _| if (a as i32) < b as i32 { a } else { b });
    ints32("max.u32 %d, %a, %b;", |a, b, _| if a > b { a } else { b });
    ints32("neg.s32 %d, %a;", |a, _, _| 0u32.wrapping_sub(a));
    ints32("abs.s32 %d, %a;", |a, _, _| if a >> 31 == 1 { 0u32.wrapping_sub(a) } else { a });
    ints32("div.u32 %d, %a, %b;", |a, b, _| a.checked_div(b).unwrap_or(u32::MAX));
    ints32("rem.u32 %d, %a, %b;", |a, b, _| a.checked_rem(b).unwrap_or(a));
    ints32(
        "div.s32 %d, %a, %b;",
        |a, b, _| if b == 0 { u32::MAX } else { (a as i32).wrapping_div(b as i32) as u32 },
    );
    ints64("add.s64 %d, %a, %b;", |a, b, _| a.wrapping_add(b));
    ints64("sub.s64 %d, %a, %b;", |a, b, _| a.wrapping_sub(b));
    ints64("mul.lo.s64 %d, %a, %b;", |a, b, _| a.wrapping_mul(b));
    ints64("mul.hi.u64 %d, %a, %b;", |a, b, _| ((u128::from(a) * u128::from(b)) >> 64) as u64);
    ints64("min.u64 %d, %a, %b;", |a, b, _| a.min(b));
    ints64("max.s64 %d, %a, %b;", |a, b, _| (a as i64).max(b as i64) as u64);
    ints64("div.u64 %d, %a, %b;", |a, b, _| a.checked_div(b).unwrap_or(u64::MAX));
    ints64("neg.s64 %d, %a;", |a, _, _| a.wrapping_neg());
    let wide = ["b64", "b32", "b32", "b64"];
    expect(wide, "mul.wide.u32 %d, %a, %b;", "32", |a, b, _| a * b);
    expect(wide, "mul.wide.s32 %d, %a, %b;", "32", |a, b, _| (a as i32 as i64 * b as i32 as i64) as u64);
    expect(wide, "mad.wide.u32 %d, %a, %b, %c;", "32", |a, b, c| (a * b).wrapping_add(c));
    let halves = ["b32", "b16", "b16", "b32"];
    expect(halves, "mul.wide.u16 %d, %a, %b;", "32", |a, b, _| (a & 0xffff) * (b & 0xffff));
}

#[test]
fn bits_and_shifts() {
    ints32("and.b32 %d, %a, %b;", |a, b, _| a & b);
    ints32("or.b32 %d, %a, %b;", |a, b, _| a | b);
    ints32("xor.b32 %d, %a, %b;", |a, b, _| a ^ b);
    ints32("not.b32 %d, %a;", |a, _, _| !a);
    ints32("shl.b32 %d, %a, %b;", |a, b, _| a.checked_shl(b).unwrap_or(0));
    ints32("shr.u32 %d, %a, %b;", |a, b, _| a.checked_shr(b).unwrap_or(0));
    ints32("shr.s32 %d, %a, %b;", |a, b, _| ((a as i32) >> b.min(31)) as u32);
    ints32("shf.l.wrap.b32 %d, %a, %b, %c;", |a, b, c| {
        if c % 32 == 0 { b } else { b << (c % 32) | a >> (32 - c % 32) }
    });
    ints32("shf.r.clamp.b32 %d, %a, %b, %c;", |a, b, c| match c {
        0 => a,
        1..=31 => b << (32 - c) | a >> c,
        _ => b,
    });
    ints32("popc.b32 %d, %a;", |a, _, _| (0..32).map(|n| a >> n & 1).sum());
    ints32("clz.b32 %d, %a;", |a, _, _| (0..32).rev().take_while(|n| a >> n & 1 == 0).count() as u32);
    ints32("brev.b32 %d, %a;", |a, _, _| (0..32).fold(0, |d, n| d | (a >> n & 1) << (31 - n)));
    ints32("bfind.u32 %d, %a;", |a, _, _| (0..32).rev().find(|n| a >> n & 1 == 1).unwrap_or(u32::MAX));
    ints32("bfind.shiftamt.u32 %d, %a;", |a, _, _| {
        (0..32).rev().find(|n| a >> n & 1 == 1).map_or(u32::MAX, |n| 31 - n)
    });
    let field = |a: u64, pos: u64, len: u64, width: u64, signed: bool| -> u64 {
        let (pos, len) = (pos & 255, len & 255);
        let sign = signed && len > 0 && a >> (pos + len - 1).min(width - 1) & 1 == 1;
        (0..width).fold(0, |d, n| {
            let bit = if n < len && pos + n < width { a >> (pos + n) & 1 } else { u64::from(sign) };
            d | bit << n
        })
    };
    ints32("bfe.u32 %d, %a, %b, %c;", |a, b, c| field(a.into(), b.into(), c.into(), 32, false) as u32);
    ints32("bfe.s32 %d, %a, %b, %c;", |a, b, c| field(a.into(), b.into(), c.into(), 32, true) as u32);
    let insert = |a: u64, b: u64, pos: u64, len: u64, width: u64| -> u64 {
        (0..width).fold(0, |d, n| {
            let inside = n >= pos && n < pos + len;
            d | (if inside { a >> (n - pos) & 1 } else { b >> n & 1 }) << n
        })
    };
    for (pos, len) in [(0u32, 0u32), (0, 32), (3, 5), (28, 9), (40, 4), (31, 1)] {
        let (p, l) = (u64::from(pos), u64::from(len));
        ints32(&format!("bfi.b32 %d, %a, %b, {pos}, {len};"), |a, b, _| {
            insert(a.into(), b.into(), p, l, 32) as u32
        });
        ints64(&format!("bfi.b64 %d, %a, %b, {pos}, {len};"), |a, b, _| insert(a, b, p, l, 64));
    }
    ints32("prmt.b32 %d, %a, %b, 0x5410;", |a, b, _| a & 0xffff | b << 16);
    ints32("prmt.b32 %d, %a, %b, 0x0123;", |a, _, _| a.swap_bytes());
    ints32("lop3.b32 %d, %a, %b, %c, 0xe8;", |a, b, c| a & b | a & c | b & c);
    ints32("lop3.b32 %d, %a, %b, %c, 0x1e;", |a, b, c| a ^ (b | c));
    ints64("shl.b64 %d, %a, 7;", |a, _, _| a << 7);
    ints64("popc.b64 %r0, %a; cvt.u64.u32 %d, %r0;", |a, _, _| (0..64).map(|n| a >> n & 1).sum());
    ints64("clz.b64 %r0, %a; cvt.u64.u32 %d, %r0;", |a, _, _| u64::from(a.leading_zeros()));
}

#[test]
fn float_arithmetic() {
    floats("add.rn.f32 %d, %a, %b;", |a, b, _| a + b);
    floats("sub.f32 %d, %a, %b;", |a, b, _| a - b);
    floats("mul.f32 %d, %a, %b;", |a, b, _| a * b);
    floats("div.rn.f32 %d, %a, %b;", |a, b, _| a / b);
    floats("sqrt.rn.f32 %d, %a;", |a, _, _| a.sqrt());
    floats("rcp.rn.f32 %d, %a;", |a, _, _| 1.0 / a);
    // A sum of 80 bits is exact in neither f32 nor f64: the oracle is the host's own fused operation.
    floats("fma.rn.f32 %d, %a, %b, %c;", |a, b, c| a.mul_add(b, c));
    let zero = |x: f32| if x.is_subnormal() { 0.0f32.copysign(x) } else { x };
    floats("add.ftz.f32 %d, %a, %b;", |a, b, _| zero(zero(a) + zero(b)));
    floats("mul.rn.sat.f32 %d, %a, %b;", |a, b, _| {
        let x = a * b;
        if x.is_nan() || x <= 0.0 { 0.0 } else { x.min(1.0) }
    });
    let pick = |a: f32, b: f32, less: bool| {
        if a.is_nan() || b.is_nan() {
            return if a.is_nan() { b } else { a };
        }
        let a_first = a < b || a == b && a.is_sign_negative();
        if a_first == less { a } else { b }
    };
    floats("min.f32 %d, %a, %b;", |a, b, _| pick(a, b, true));
    floats("max.f32 %d, %a, %b;", |a, b, _| pick(a, b, false));
    expect(["f32"; 4], "copysign.f32 %d, %a, %b;", "f32", |a, b, _| b & 0x7fff_ffff | a & 0x8000_0000);
    expect(["f32"; 4], "neg.f32 %d, %a;", "f32", |a, _, _| a ^ 0x8000_0000);
    expect(["f32"; 4], "abs.f32 %d, %a;", "f32", |a, _, _| a & 0x7fff_ffff);
    floats("ex2.approx.ftz.f32 %d, %a;", |a, _, _| {
        let y = (f64::from(zero(a)).exp2()) as f32;
        zero(y)
    });
    floats("rcp.approx.ftz.f32 %d, %a;", |a, _, _| zero(1.0 / zero(a)));
}

#[test]
fn comparisons_and_selections() {
    let pick = |body: &str| format!("{body} selp.b32 %d, 1, 0, %p;");
    type Compare = fn(i64, i64) -> bool;
    let orders: [(&str, Compare); 6] = [
        ("eq", |a, b| a == b),
        ("ne", |a, b| a != b),
        ("lt", |a, b| a < b),
        ("le", |a, b| a <= b),
        ("gt", |a, b| a > b),
        ("ge", |a, b| a >= b),
    ];
    for (name, f) in orders {
        ints32(&pick(&format!("setp.{name}.s32 %p, %a, %b;")), |a, b, _| {
            u32::from(f((a as i32).into(), (b as i32).into()))
        });
        ints32(&pick(&format!("setp.{name}.u32 %p, %a, %b;")), |a, b, _| u32::from(f(a.into(), b.into())));
        let types = ["b32", "b64", "b64", "b64"];
        expect(types, &pick(&format!("setp.{name}.s64 %p, %a, %b;")), "64", |a, b, _| {
            u64::from(f(a as i64, b as i64))
        });
    }
    type Test = fn(f32, f32) -> bool;
    let tests: [(&str, Test); 14] = [
        ("eq", |a, b| a == b),
        ("ne", |a, b| a != b && !a.is_nan() && !b.is_nan()),
        ("lt", |a, b| a < b),
        ("le", |a, b| a <= b),
        ("gt", |a, b| a > b),
        ("ge", |a, b| a >= b),
        ("equ", |a, b| a == b || a.is_nan() || b.is_nan()),
        ("neu", |a, b| a != b),
        ("ltu", |a, b| a < b || a.is_nan() || b.is_nan()),
        ("leu", |a, b| a <= b || a.is_nan() || b.is_nan()),
        ("gtu", |a, b| a > b || a.is_nan() || b.is_nan()),
        ("geu", |a, b| a >= b || a.is_nan() || b.is_nan()),
        ("num", |a, b| !a.is_nan() && !b.is_nan()),
        ("nan", |a, b| a.is_nan() || b.is_nan()),
    ];
    for (name, f) in tests {
        let body = pick(&format!("setp.{name}.f32 %p, %a, %b;"));
        expect(["b32", "f32", "f32", "f32"], &body, "f32", |a, b, _| {
            u64::from(f(f32::from_bits(a as u32), f32::from_bits(b as u32)))
        });
    }
    let body = "setp.lt.u32 %q, %a, %c; setp.ge.and.u32 %p|%q, %a, %b, !%q; selp.b32 %d, 1, 0, %p; selp.b32 %r0, 2, 0, %q; \
                or.b32 %d, %d, %r0;";
    ints32(body, |a, b, c| {
        let other = a >= c;
        u32::from(a >= b && other) | u32::from(a < b && other) << 1
    });
}

#[test]
fn conversions() {
    let bits = |x: u64| f32::from_bits(x as u32);
    let to_int = ["b32", "f32", "f32", "f32"];
    expect(to_int, "cvt.rzi.u32.f32 %d, %a;", "f32", |a, _, _| u64::from(bits(a) as u32));
    expect(to_int, "cvt.rzi.s32.f32 %d, %a;", "f32", |a, _, _| u64::from(bits(a) as i32 as u32));
    expect(to_int, "cvt.rni.s32.f32 %d, %a;", "f32", |a, _, _| {
        u64::from(f64::from(bits(a)).round_ties_even() as i32 as u32)
    });
    expect(to_int, "cvt.rmi.s32.f32 %d, %a;", "f32", |a, _, _| {
        u64::from(f64::from(bits(a)).floor() as i32 as u32)
    });
    let to_long = ["b64", "f32", "f32", "f32"];
    expect(to_long, "cvt.rzi.s64.f32 %d, %a;", "f32", |a, _, _| {
        if bits(a).is_nan() { 1 << 63 } else { bits(a) as i64 as u64 }
    });
    floats("cvt.rni.f32.f32 %d, %a;", |a, _, _| a.round_ties_even());
    let to_float = ["f32", "b32", "b32", "b32"];
    expect(to_float, "cvt.rn.f32.u32 %d, %a;", "32", |a, _, _| u64::from((a as u32 as f32).to_bits()));
    expect(to_float, "cvt.rn.f32.s32 %d, %a;", "32", |a, _, _| u64::from((a as i32 as f32).to_bits()));
    expect(["f32", "b64", "b64", "b64"], "cvt.rn.f32.u64 %d, %a;", "64", |a, _, _| {
        u64::from((a as f32).to_bits())
    });
    expect(["b64", "b32", "b32", "b32"], "cvt.s64.s32 %d, %a;", "32", |a, _, _| a as i32 as i64 as u64);
    expect(["b64", "b32", "b32", "b32"], "cvt.u64.u32 %d, %a;", "32", |a, _, _| a);
    expect(["b32", "b64", "b64", "b64"], "cvt.u32.u64 %d, %a;", "64", |a, _, _| a & 0xffff_ffff);
    ints32("cvt.s32.s8 %d, %a;", |a, _, _| a as i8 as i32 as u32);
    ints32("cvt.u16.u32 %h0, %a; cvt.u32.u16 %d, %h0;", |a, _, _| a & 0xffff);
    ints32("cvt.sat.u8.s32 %d, %a;", |a, _, _| (a as i32).clamp(0, 255) as u32);
    // bf16: the nearest of the two neighbours, by distance, ties to the even one.
    let bf16 = |x: f32| -> u32 {
        if x.is_nan() {
            return 0x7fff;
        }
        let below = x.to_bits() >> 16;
        let wide = |half: u32| f64::from(f32::from_bits(half << 16));
        let above = below + 1;
        if x.is_infinite() {
            return below;
        }
        // Past the largest number the neighbour is what it would be with one more exponent.
        let next = if above & 0x7fff == 0x7f80 {
            wide(below) + (wide(below) - wide(below - 1))
        } else {
            wide(above)
        };
        let (down, up) = ((f64::from(x) - wide(below)).abs(), (next - f64::from(x)).abs());
        if down < up || down == up && below & 1 == 0 { below } else { above }
    };
    let pair = ["b32", "f32", "f32", "f32"];
    expect(pair, "cvt.rn.bf16x2.f32 %d, %a, %b;", "f32", |a, b, _| {
        u64::from(bf16(bits(a)) << 16 | bf16(bits(b)))
    });
    expect(pair, "cvt.rn.bf16.f32 %h0, %a; cvt.u32.u16 %d, %h0;", "f32", |a, _, _| u64::from(bf16(bits(a))));
    ints32("mov.b32 {%h0, %h1}, %a; mov.b32 %d, {%h1, %h0};", |a, _, _| a.rotate_left(16));
    expect(["b64", "b32", "b32", "b32"], "mov.b64 %d, {%a, %b};", "32", |a, b, _| a | b << 32);
}

/// Products of tensor cores, in each order of their sums. That of ascending order is also compared with the host's.
#[test]
fn products_of_matrices() {
    let row =
        |name: &str, count: usize| (0..count).map(|n| format!("%{name}{n}")).collect::<Vec<_>>().join(", ");
    let load = |name: &str, count: usize, offset: usize| -> String {
        (0..count).map(|n| format!("ld.global.b32 %{name}{n}, [%at+{}];\n", offset + n * 4)).collect()
    };
    let text = format!(
        ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry k(.param .u64 in, .param .u64 out) {{\n\
         .reg .b32 %a<4>, %b<2>; .reg .f32 %c<4>, %d<4>; .reg .b64 %at, %to; .reg .u32 %t;\n\
         mov.u32 %t, %tid.x; ld.param.u64 %at, [in]; ld.param.u64 %to, [out]; mad.wide.u32 %at, %t, 40, %at;\n\
         mad.wide.u32 %to, %t, 16, %to;\n{}{}{}\
         mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{{}}}, {{{}}}, {{{}}}, {{{}}};\n\
         st.global.v4.f32 [%to], {{{}}}; ret; }}",
        load("a", 4, 0),
        load("b", 2, 16),
        load("c", 4, 24),
        row("d", 4),
        row("a", 4),
        row("b", 2),
        row("c", 4),
        row("d", 4),
    );
    let gpu = Gpu::new(&text);
    let mut random = Random(11);
    let to = gpu.fresh("out", 32 * 16);
    for turn in 0..60 {
        // Numbers of similar size; in every third turn any bits.
        let mut bf16 = || {
            let bits = random.bits() as u32;
            if turn % 3 == 0 { bits & 0xffff } else { bits & 0x81ff | 0x3e00 }
        };
        let a: [[u32; 16]; 16] = std::array::from_fn(|_| std::array::from_fn(|_| bf16()));
        let b: [[u32; 8]; 16] = std::array::from_fn(|_| std::array::from_fn(|_| bf16()));
        let c: [[f32; 8]; 16] =
            std::array::from_fn(|_| std::array::from_fn(|_| f32::from_bits(bf16() << 16) * 1.1));
        let mut fragments = Vec::new();
        for lane in 0..32 {
            let (g, t) = (lane / 4, lane % 4 * 2);
            let pair = |low: u32, high: u32| low | high << 16;
            fragments.extend(
                [(g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8)].map(|(r, k)| pair(a[r][k], a[r][k + 1])),
            );
            fragments.extend([t, t + 8].map(|k| pair(b[k][g], b[k + 1][g])));
            fragments
                .extend([(g, t), (g, t + 1), (g + 8, t), (g + 8, t + 1)].map(|(r, n)| c[r][n].to_bits()));
        }
        let from = gpu.upload("in", &fragments);
        for sums in [Sums::Ascending, Sums::Pairwise, Sums::Aligned] {
            let results = VECTORS.map(|vectors| {
                let launch = gpu.launch("k", 1, 32, &[Arg::U64(from), Arg::U64(to)]);
                gpu.run_with(&[launch], &Options { sums, vectors, ..Options::default() }).expect("it runs");
                gpu.download::<u32>(to, 128).into_iter().map(u64::from).collect()
            });
            let got = same(&format!("{sums:?}, turn {turn}"), results);
            for (at, got) in got.into_iter().enumerate().filter(|_| sums == Sums::Ascending) {
                let (r, n) = (at / 16 + at % 4 / 2 * 8, at / 4 % 4 * 2 + at % 2);
                let wide = |half: u32| f32::from_bits(half << 16);
                let sum = (0..16).fold(c[r][n], |sum, k| sum + wide(a[r][k]) * wide(b[k][n]));
                assert_eq!(got, nan(sum), "turn {turn}, row {r}, column {n}");
            }
        }
    }
}
