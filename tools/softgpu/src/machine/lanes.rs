//! Rows of 32 values, one for each lane of a warp, and loops over them that the compiler turns into vector code.

use crate::ptx::program::CONSTANT;

/// Lanes of a warp.
pub(super) const LANES: usize = 32;
/// The mask of all lanes.
pub(super) const ALL: u32 = u32::MAX;

/// The instruction sets of the host for which loops over lanes are compiled, the widest last. Results are the same bits with
/// each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Vectors {
    /// That of every CPU of the host's kind.
    Base,
    Avx2,
    #[default]
    Avx512,
}

impl Vectors {
    /// Those that this CPU has, or fewer.
    pub(super) fn of_this_cpu(self) -> Vectors {
        #[cfg(target_arch = "x86_64")]
        {
            use std::is_x86_feature_detected as has;
            let avx2 = has!("avx2") && has!("fma");
            if avx2 && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl") {
                return self;
            }
            if avx2 {
                return self.min(Vectors::Avx2);
            }
        }
        Vectors::Base
    }
}

/// Defines a function that is compiled once for each of [`Vectors`], and calls the one of its first argument, the `Env`. What
/// it calls must be `#[inline(always)]` to be compiled so too.
macro_rules! vectorized {
    ($(#[$attribute:meta])* $vis:vis fn $name:ident($env:ident: $of:ty, $($arg:ident: $ty:ty),* $(,)?) -> $result:ty $body:block) => {
        $(#[$attribute])*
        $vis fn $name($env: $of, $($arg: $ty),*) -> $result {
            #[inline(always)]
            #[allow(clippy::too_many_arguments, reason = "those of the function")]
            fn base($env: $of, $($arg: $ty),*) -> $result $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
                #[allow(clippy::too_many_arguments, reason = "those of the function")]
                fn avx512($env: $of, $($arg: $ty),*) -> $result {
                    base($env, $($arg),*)
                }

                #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
                #[allow(clippy::too_many_arguments, reason = "those of the function")]
                fn avx2($env: $of, $($arg: $ty),*) -> $result {
                    base($env, $($arg),*)
                }

                match $env.vectors {
                    // SAFETY: `Vectors::of_this_cpu` has found the features.
                    $crate::machine::lanes::Vectors::Avx512 => return unsafe { avx512($env, $($arg),*) },
                    // SAFETY: `Vectors::of_this_cpu` has found the features.
                    $crate::machine::lanes::Vectors::Avx2 => return unsafe { avx2($env, $($arg),*) },
                    $crate::machine::lanes::Vectors::Base => {}
                }
            }
            base($env, $($arg),*)
        }
    };
}
pub(super) use vectorized;

/// A value as it is stored in a row: 16-bit values in the low half of a 32-bit one, the other half zero.
pub(super) trait Element: Copy {
    type Raw: Copy + Default;
    fn load(raw: Self::Raw) -> Self;
    fn raw(self) -> Self::Raw;
}

macro_rules! element {
    ($($ty:ty, $raw:ty, $load:expr, $store:expr;)*) => {$(
        impl Element for $ty {
            type Raw = $raw;
            #[inline(always)]
            fn load(raw: $raw) -> $ty {
                let load: fn($raw) -> $ty = $load;
                load(raw)
            }
            #[inline(always)]
            fn raw(self) -> $raw {
                let store: fn($ty) -> $raw = $store;
                store(self)
            }
        }
    )*};
}

element! {
    u16, u32, |x| x as u16, u32::from;
    i16, u32, |x| x as i16, |x| u32::from(x as u16);
    u32, u32, |x| x, |x| x;
    i32, u32, |x| x as i32, |x| x as u32;
    u64, u64, |x| x, |x| x;
    i64, u64, |x| x as i64, |x| x as u64;
    f32, u32, f32::from_bits, f32::to_bits;
    f64, u64, f64::from_bits, f64::to_bits;
}

/// Where an instruction finds its operands: the registers of its warp and the constants of its kernel.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub registers: *mut u32,
    pub constants: *const u32,
}

impl Rows {
    /// The row of an operand.
    ///
    /// # Safety
    /// `row` is an operand of the kernel whose registers and constants these are, of the width of `T`.
    #[inline(always)]
    pub unsafe fn get<T>(&self, row: u32) -> *const [T; LANES] {
        let base = if row & CONSTANT == 0 { self.registers.cast_const() } else { self.constants };
        // SAFETY: the caller vouches for the row.
        unsafe { base.add((row & !CONSTANT) as usize * LANES).cast() }
    }

    /// A row to write.
    ///
    /// # Safety
    /// As for [`Rows::get`], and the row is no constant.
    #[inline(always)]
    pub unsafe fn at<T>(&self, row: u32) -> *mut [T; LANES] {
        // SAFETY: the caller vouches for the row.
        unsafe { self.registers.add(row as usize * LANES).cast() }
    }

    /// The value of one lane.
    ///
    /// # Safety
    /// As for [`Rows::get`].
    #[inline(always)]
    pub unsafe fn lane(&self, row: u32, lane: usize) -> u32 {
        // SAFETY: the caller vouches for the row.
        unsafe { (*self.get::<u32>(row))[lane] }
    }

    /// Stores the lanes of `mask`.
    ///
    /// # Safety
    /// As for [`Rows::at`].
    #[inline(always)]
    pub unsafe fn put<T: Copy>(&self, mask: u32, d: u32, values: &[T; LANES]) {
        // SAFETY: the caller vouches for the row.
        unsafe {
            let to = &mut *self.at::<T>(d);
            if mask == ALL {
                *to = *values;
            } else {
                for lane in 0..LANES {
                    if mask >> lane & 1 == 1 {
                        to[lane] = values[lane];
                    }
                }
            }
        }
    }

    /// `d = f(a)` in the lanes of `mask`.
    ///
    /// # Safety
    /// As for [`Rows::at`].
    #[inline(always)]
    pub unsafe fn map1<A: Element, D: Element>(&self, mask: u32, d: u32, a: u32, f: impl Fn(A) -> D) {
        // SAFETY: the caller vouches for the rows.
        unsafe {
            let a = *self.get::<A::Raw>(a);
            let mut out = [D::Raw::default(); LANES];
            for lane in 0..LANES {
                out[lane] = f(A::load(a[lane])).raw();
            }
            self.put(mask, d, &out);
        }
    }

    /// `d = f(a, b)` in the lanes of `mask`.
    ///
    /// # Safety
    /// As for [`Rows::at`].
    #[inline(always)]
    pub unsafe fn map2<A: Element, B: Element, D: Element>(
        &self,
        mask: u32,
        [d, a, b]: [u32; 3],
        f: impl Fn(A, B) -> D,
    ) {
        // SAFETY: the caller vouches for the rows.
        unsafe {
            let (a, b) = (*self.get::<A::Raw>(a), *self.get::<B::Raw>(b));
            let mut out = [D::Raw::default(); LANES];
            for lane in 0..LANES {
                out[lane] = f(A::load(a[lane]), B::load(b[lane])).raw();
            }
            self.put(mask, d, &out);
        }
    }

    /// `d = f(a, b, c)` in the lanes of `mask`.
    ///
    /// # Safety
    /// As for [`Rows::at`].
    #[inline(always)]
    pub unsafe fn map3<A: Element, B: Element, C: Element, D: Element>(
        &self,
        mask: u32,
        [d, a, b, c]: [u32; 4],
        f: impl Fn(A, B, C) -> D,
    ) {
        // SAFETY: the caller vouches for the rows.
        unsafe {
            let (a, b, c) = (*self.get::<A::Raw>(a), *self.get::<B::Raw>(b), *self.get::<C::Raw>(c));
            let mut out = [D::Raw::default(); LANES];
            for lane in 0..LANES {
                out[lane] = f(A::load(a[lane]), B::load(b[lane]), C::load(c[lane])).raw();
            }
            self.put(mask, d, &out);
        }
    }

    /// The mask of lanes for which `f(a, b)` holds.
    ///
    /// # Safety
    /// As for [`Rows::get`].
    #[inline(always)]
    pub unsafe fn test<A: Element>(&self, a: u32, b: u32, f: impl Fn(A, A) -> bool) -> u32 {
        // SAFETY: the caller vouches for the rows.
        unsafe {
            let (a, b) = (*self.get::<A::Raw>(a), *self.get::<A::Raw>(b));
            let mut bits = [0u32; LANES];
            for lane in 0..LANES {
                bits[lane] = u32::from(f(A::load(a[lane]), A::load(b[lane]))) << lane;
            }
            bits.iter().fold(0, |all, bit| all | bit)
        }
    }
}

/// The low halves of 64-bit values.
#[inline(always)]
pub(super) fn narrow(values: &[u64; LANES]) -> [u32; LANES] {
    let mut out = [0; LANES];
    for lane in 0..LANES {
        out[lane] = values[lane] as u32;
    }
    out
}

/// The lanes of a mask, in ascending order.
#[inline(always)]
pub(super) fn lanes(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let lane = mask.trailing_zeros();
        mask &= mask.wrapping_sub(1);
        (lane < 32).then_some(lane as usize)
    })
}
