//! The arithmetic of PTX, one value at a time.

/// The NaN that every f32 operation gives.
const NAN: u32 = 0x7fff_ffff;

/// The result of an f32 operation: NaNs have no payload.
#[inline(always)]
pub(super) fn canonical(x: f32) -> f32 {
    if x.is_nan() { f32::from_bits(NAN) } else { x }
}

/// Subnormal numbers as zero of the same sign.
#[inline(always)]
pub(super) fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { f32::from_bits(x.to_bits() & 0x8000_0000) } else { x }
}

/// Clamps to 0..1; NaN becomes 0.
#[inline(always)]
pub(super) fn saturate(x: f32) -> f32 {
    if x > 0.0 { if x > 1.0 { 1.0 } else { x } } else { 0.0 }
}

/// The smaller value; -0 is smaller than 0, and NaN gives the other operand unless `nan` is set.
#[inline(always)]
pub(super) fn min_f32(a: f32, b: f32, nan: bool) -> f32 {
    if a.is_nan() || b.is_nan() {
        if nan || (a.is_nan() && b.is_nan()) {
            return f32::from_bits(NAN);
        }
        return if a.is_nan() { b } else { a };
    }
    if a == b {
        f32::from_bits(a.to_bits() | b.to_bits())
    } else if a < b {
        a
    } else {
        b
    }
}

/// The larger value, as [`min_f32`].
#[inline(always)]
pub(super) fn max_f32(a: f32, b: f32, nan: bool) -> f32 {
    let x = min_f32(-a, -b, nan);
    if x.is_nan() { x } else { -x }
}

/// As [`min_f32`], for f64.
pub(super) fn min_f64(a: f64, b: f64) -> f64 {
    if a.is_nan() {
        b
    } else if b.is_nan() || a < b || a == b && a.is_sign_negative() {
        a
    } else {
        b
    }
}

/// 2^x, correctly rounded except for about one operand in a million.
#[inline(always)]
pub(super) fn ex2(x: f32) -> f32 {
    // Beyond these the result is 0 or infinite.
    let wide = f64::from(x).clamp(-160.0, 160.0);
    // Adding 1.5 x 2^52 rounds to an integer, which is in the low bits of the sum.
    const SHIFT: f64 = 6_755_399_441_055_744.0;
    let shifted = wide + SHIFT;
    let t = (wide - (shifted - SHIFT)) * std::f64::consts::LN_2;
    // The series of e^t for |t| < 0.35, with an error below 2^-45.
    const FACTORIALS: [f64; 13] = [
        479_001_600.0,
        39_916_800.0,
        3_628_800.0,
        362_880.0,
        40_320.0,
        5040.0,
        720.0,
        120.0,
        24.0,
        6.0,
        2.0,
        1.0,
        1.0,
    ];
    let mut sum = 0.0;
    for n in FACTORIALS {
        sum = sum * t + 1.0 / n;
    }
    let scale = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    canonical(if x.is_nan() { x } else { (sum * scale) as f32 })
}

/// The result of an approximate instruction, moved by up to `most` units in the last place that depend on the operand
/// only. Zeros, infinities, NaNs and exact powers of two stay.
pub(super) fn perturb(operand: u32, result: f32, most: u32) -> f32 {
    let bits = result.to_bits();
    if !result.is_normal() || bits & 0x007f_ffff == 0 {
        return result;
    }
    let hash = (operand ^ 0x9e37_79b9).wrapping_mul(0x85eb_ca6b);
    let step = (hash ^ hash >> 15) % (2 * most + 1);
    f32::from_bits(bits.wrapping_add(step).wrapping_sub(most))
}

/// The bf16 nearest to x, ties to even; NaN is 0x7fff.
#[inline(always)]
pub(super) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16;
    if x.is_nan() { 0x7fff } else { rounded }
}

/// The f32 of a bf16.
#[inline(always)]
pub(super) fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

/// The f16 nearest to x, ties to even; NaN is 0x7fff.
pub(super) fn to_f16(x: f32) -> u16 {
    if x.is_nan() {
        return 0x7fff;
    }
    let sign = (x.to_bits() >> 16 & 0x8000) as u16;
    let magnitude = x.abs();
    if magnitude >= 65520.0 {
        return sign | 0x7c00;
    }
    // Adding a number whose last place is that of the result rounds to it: subnormal halves are multiples of 2^-24.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-14);
    let unit = f32::from_bits(((exponent - 10 + 127) as u32) << 23);
    let count = (magnitude / unit).round_ties_even() as u32;
    sign | (((exponent + 14) as u32) * 1024 + count) as u16
}

/// The f32 of an f16.
pub(super) fn from_f16(x: u16) -> f32 {
    let (exponent, fraction) = (i32::from(x >> 10 & 31), f32::from(x & 1023));
    let magnitude = match exponent {
        31 if x & 1023 != 0 => return f32::from_bits(NAN),
        31 => f32::INFINITY,
        0 => fraction * 2f32.powi(-24),
        _ => (1.0 + fraction / 1024.0) * 2f32.powi(exponent - 15),
    };
    if x & 0x8000 != 0 { -magnitude } else { magnitude }
}

/// Four bytes of the pair (b, a) chosen by the nibbles of c; bit 3 of a nibble asks for the sign of the byte.
pub(super) fn prmt(a: u32, b: u32, c: u32) -> u32 {
    let pair = u64::from(b) << 32 | u64::from(a);
    (0..4).fold(0, |all, at| {
        let choice = c >> (at * 4) & 15;
        let byte = (pair >> ((choice & 7) * 8)) as u8;
        let byte = if choice & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
        all | u32::from(byte) << (at * 8)
    })
}

/// b with the low `length` bits of a at `position`, in `width` bits.
#[inline(always)]
pub(super) fn bfi(a: u64, b: u64, position: u32, length: u32, width: u32) -> u64 {
    let (position, length) = (position & 255, length & 255);
    if position >= width || length == 0 {
        return b;
    }
    let ones = if length >= 64 { u64::MAX } else { (1 << length) - 1 };
    let mask = ones << position;
    (b & !mask) | (a << position & mask)
}

/// `length` bits of a at `position`, in `width` bits; with `signed` the field's last bit fills the rest.
pub(super) fn bfe(a: u64, position: u32, length: u32, width: u32, signed: bool) -> u64 {
    let (position, length) = (position & 255, length & 255);
    let sign_at = (position + length).saturating_sub(1).min(width - 1);
    let sign = if signed && length > 0 && a >> sign_at & 1 == 1 { u64::MAX } else { 0 };
    if length == 0 {
        return 0;
    }
    let field = if position >= width { sign } else { a >> position };
    let valid = length.min(width.saturating_sub(position));
    if valid >= 64 {
        return field;
    }
    let ones = (1u64 << valid) - 1;
    field & ones | sign & !ones
}

/// The position of the highest bit that is not a copy of the sign, or u32::MAX.
pub(super) fn bfind(a: u64, width: u32, signed: bool) -> u32 {
    let negative = signed && a >> (width - 1) & 1 == 1;
    let ones = if width == 64 { u64::MAX } else { u64::from(u32::MAX) };
    let value = if negative { !a & ones } else { a };
    63u32.wrapping_sub(value.leading_zeros())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ex2_agrees_with_the_host_within_one_unit() {
        for i in -15_000..13_000i32 {
            let x = i as f32 * 0.01;
            let (own, host) = (ex2(x), f64::from(x).exp2() as f32);
            assert!((own.to_bits() as i64 - host.to_bits() as i64).abs() <= 1, "2^{x}: {own} and {host}");
        }
        assert_eq!(ex2(0.0), 1.0);
        assert_eq!(ex2(f32::NEG_INFINITY), 0.0);
        assert_eq!(ex2(f32::INFINITY), f32::INFINITY);
        assert_eq!(ex2(f32::NAN).to_bits(), NAN);
    }

    #[test]
    fn halves_survive_a_round_trip_and_round_to_even() {
        for bits in 0..=u16::MAX {
            let x = from_f16(bits);
            if !x.is_nan() {
                assert_eq!(to_f16(x), bits);
            }
            let y = from_bf16(bits);
            if !y.is_nan() {
                assert_eq!(to_bf16(y), bits);
            }
        }
        // Between two neighbours, and just above the middle.
        assert_eq!(to_f16(1.0 + 1.0 / 2048.0), 0x3c00);
        assert_eq!(to_f16(1.0 + 3.0 / 2048.0), 0x3c02);
        assert_eq!(to_f16(2f32.powi(-25)), 0);
        assert_eq!(to_f16(2f32.powi(-25) * 1.5), 1);
        assert_eq!(to_f16(65519.0), 0x7bff);
        assert_eq!(to_bf16(f32::from_bits(0x3f80_8000)), 0x3f80);
        assert_eq!(to_bf16(f32::from_bits(0x3f81_8000)), 0x3f82);
        assert_eq!(to_bf16(f32::from_bits(0x3f80_8001)), 0x3f81);
        assert_eq!(to_bf16(f32::MAX), 0x7f80);
        assert_eq!((to_f16(f32::NAN), to_bf16(f32::NAN)), (0x7fff, 0x7fff));
    }

    #[test]
    fn minimum_knows_zeros_and_nan() {
        assert!(min_f32(0.0, -0.0, false).is_sign_negative() && min_f32(-0.0, 0.0, false).is_sign_negative());
        assert!(max_f32(0.0, -0.0, false).is_sign_positive() && max_f32(-0.0, 0.0, false).is_sign_positive());
        assert_eq!((min_f32(f32::NAN, 2.0, false), max_f32(2.0, f32::NAN, false)), (2.0, 2.0));
        assert_eq!(min_f32(f32::NAN, 2.0, true).to_bits(), NAN);
        assert_eq!(max_f32(f32::NAN, f32::NAN, false).to_bits(), NAN);
    }

    #[test]
    fn bit_fields_at_the_edges() {
        assert_eq!(bfi(0xff, 0, 28, 8, 32) as u32, 0xf000_0000);
        assert_eq!(bfi(0xff, 7, 32, 8, 32), 7);
        assert_eq!(bfi(0xff, 7, 3, 0, 32), 7);
        assert_eq!(bfi(u64::MAX, 0, 0, 64, 64), u64::MAX);
        assert_eq!(bfe(0xffff_fff0, 4, 8, 32, false), 0xff);
        assert_eq!(bfe(0x80, 4, 4, 32, true) as u32, 0xffff_fff8);
        assert_eq!(bfe(0x8000_0000, 40, 4, 32, true) as u32, u32::MAX);
        assert_eq!(bfind(0, 32, false), u32::MAX);
        assert_eq!(bfind(1 << 31, 32, false), 31);
        assert_eq!(bfind(0xffff_fffe, 32, true), 0);
        assert_eq!(prmt(0x8433_2211, 0x8877_6655, 0x7b04), 0x88ff_1155);
    }
}
