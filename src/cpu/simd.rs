//! Vectors of 16 f32 in AVX-512, AVX2 or plain Rust, and the conversion of weights to f32. The operations on
//! them are in [`crate::cpu::ops`], written once and generic over [`Simd`].

use crate::checkpoint::safetensors::Dtype;

/// Elements of a vector, the same for every instruction set.
pub(crate) const LANES: usize = 16;

/// An operation that is compiled once per instruction set.
pub(crate) trait Job {
    /// # Safety
    /// The CPU must have `S`'s instructions.
    unsafe fn go<S: Simd>(self);
}

/// Runs a job with the widest instruction set that this CPU has.
pub(crate) fn run(job: impl Job) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: each is called only if the CPU reports its features.
    if x86::has_avx512() {
        return unsafe { x86::Avx512::call(job) };
    } else if x86::has_avx2() {
        return unsafe { x86::Avx2::call(job) };
    }
    // SAFETY: plain Rust.
    unsafe { Plain::call(job) }
}

// ---- element types of weights ----

/// An element type of weights, little-endian.
pub(crate) trait Element {
    /// Bytes of an element.
    const SIZE: usize;
    /// Converts the first element of `bytes` to f32.
    fn scalar(bytes: &[u8]) -> f32;
    /// Converts the 16 elements at `p` to f32.
    ///
    /// # Safety
    /// 16 elements are readable at `p`, and the CPU has `S`'s instructions.
    unsafe fn load<S: Simd>(p: *const u8) -> S::V;
}

pub(crate) struct Bf16;
pub(crate) struct F16;
pub(crate) struct F32;

impl Element for Bf16 {
    const SIZE: usize = 2;
    fn scalar(b: &[u8]) -> f32 {
        half::bf16::from_le_bytes([b[0], b[1]]).to_f32()
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        unsafe { S::load_bf16(p) }
    }
}

impl Element for F16 {
    const SIZE: usize = 2;
    fn scalar(b: &[u8]) -> f32 {
        half::f16::from_le_bytes([b[0], b[1]]).to_f32()
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        unsafe { S::load_f16(p) }
    }
}

impl Element for F32 {
    const SIZE: usize = 4;
    fn scalar(b: &[u8]) -> f32 {
        f32::from_le_bytes([b[0], b[1], b[2], b[3]])
    }
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const u8) -> S::V {
        unsafe { S::load(p.cast()) }
    }
}

/// Converts the elements in `bytes` to f32.
pub(crate) fn widen(bytes: &[u8], dtype: Dtype, out: &mut [f32]) {
    match dtype {
        Dtype::Bf16 => widen_as::<Bf16>(bytes, out),
        Dtype::F16 => widen_as::<F16>(bytes, out),
        Dtype::F32 => widen_as::<F32>(bytes, out),
    }
}

/// [`widen`] for one element type.
pub(crate) fn widen_as<E: Element>(bytes: &[u8], out: &mut [f32]) {
    for (o, b) in out.iter_mut().zip(bytes.chunks_exact(E::SIZE)) {
        *o = E::scalar(b);
    }
}

// ---- instruction sets ----

/// A vector of 16 f32 and its operations.
///
/// # Safety
/// Every method requires that the CPU has the type's instructions. Loads and stores also require that 16
/// elements are accessible.
pub(crate) trait Simd: Sized {
    type V: Copy;
    /// Number of accumulators in an output tile that fit into registers.
    const TILE: usize;
    /// Runs a job compiled for these instructions. It is a separate function, because inlining everything
    /// into one large function spills registers.
    unsafe fn call(job: impl Job);
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(p: *const f32) -> Self::V;
    unsafe fn load_bf16(p: *const u8) -> Self::V;
    unsafe fn load_f16(p: *const u8) -> Self::V;
    unsafe fn store(p: *mut f32, v: Self::V);
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V;
    /// The smaller of each pair; `b` if either is NaN.
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V;
    /// The larger of each pair; `b` if either is NaN.
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `2^n` for `v = 1.5 * 2^23 + n`, `-126 <= n <= 127`
    unsafe fn pow2(v: Self::V) -> Self::V;

    /// The lanes as an array.
    #[inline(always)]
    unsafe fn lanes(v: Self::V) -> [f32; LANES] {
        let mut out = [0.0; LANES];
        unsafe { Self::store(out.as_mut_ptr(), v) };
        out
    }

    /// The sum of the lanes: lanes 8 apart are added first, then those 4, 2 and 1 apart.
    #[inline(always)]
    unsafe fn sum(v: Self::V) -> f32 {
        let v = unsafe { Self::lanes(v) };
        let eight: [f32; 8] = std::array::from_fn(|i| v[i] + v[i + 8]);
        let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }

    /// [`Simd::sum`] of each of 16 vectors.
    #[inline(always)]
    unsafe fn sum16(v: [Self::V; 16]) -> [f32; 16] {
        v.map(|v| unsafe { Self::sum(v) })
    }
}

/// Plain arrays. The compiler vectorizes them with the instructions of the build's target, such as NEON.
pub(crate) struct Plain;

impl Simd for Plain {
    type V = [f32; LANES];
    const TILE: usize = 4;
    #[inline(never)]
    unsafe fn call(job: impl Job) {
        unsafe { job.go::<Self>() }
    }
    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::V {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::V {
        unsafe { p.cast::<Self::V>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_bf16(p: *const u8) -> Self::V {
        unsafe { p.cast::<[u16; LANES]>().read_unaligned() }
            .map(|b| f32::from_bits((u16::from_le(b) as u32) << 16))
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u8) -> Self::V {
        unsafe { p.cast::<[u16; LANES]>().read_unaligned() }
            .map(|b| half::f16::from_bits(u16::from_le(b)).to_f32())
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, v: Self::V) {
        unsafe { p.cast::<Self::V>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] - b[i])
    }
    #[inline(always)]
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Without an FMA instruction `mul_add` is a slow library call, so this rounds twice instead.
        if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
            std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
        } else {
            std::array::from_fn(|i| a[i] * b[i] + c[i])
        }
    }
    #[inline(always)]
    unsafe fn pow2(v: Self::V) -> Self::V {
        v.map(|v| f32::from_bits((v.to_bits() << 23).wrapping_add(127 << 23)))
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    use super::{Job, LANES, Simd};
    use std::arch::x86_64::*;

    /// Whether the CPU has the instructions of [`Avx2`].
    pub fn has_avx2() -> bool {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    }

    /// Whether the CPU has the instructions of [`Avx512`]. VL, BW and DQ are in every CPU with AVX-512 except
    /// Xeon Phi.
    pub fn has_avx512() -> bool {
        has_avx2()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
    }

    pub struct Avx512;

    impl Simd for Avx512 {
        type V = __m512;
        const TILE: usize = 16;
        #[inline(always)]
        unsafe fn call(job: impl Job) {
            #[inline(never)]
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma,f16c")]
            unsafe fn with_features(job: impl Job) {
                unsafe { job.go::<Avx512>() }
            }
            unsafe { with_features(job) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> __m512 {
            unsafe { _mm512_set1_ps(x) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> __m512 {
            unsafe { _mm512_loadu_ps(p) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u8) -> __m512 {
            unsafe {
                let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u8) -> __m512 {
            unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: __m512) {
            unsafe { _mm512_storeu_ps(p, v) }
        }
        #[inline(always)]
        unsafe fn add(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_add_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn sub(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_sub_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn mul(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_mul_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn div(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_div_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn min(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_min_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn max(a: __m512, b: __m512) -> __m512 {
            unsafe { _mm512_max_ps(a, b) }
        }
        #[inline(always)]
        unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
            unsafe { _mm512_fmadd_ps(a, b, c) }
        }
        #[inline(always)]
        unsafe fn pow2(v: __m512) -> __m512 {
            unsafe {
                let n = _mm512_slli_epi32::<23>(_mm512_castps_si512(v));
                _mm512_castsi512_ps(_mm512_add_epi32(n, _mm512_set1_epi32(127 << 23)))
            }
        }
        /// All 16 sums at once. Each step adds the halves of two vectors, so that 15 additions give 16 sums.
        #[inline(always)]
        unsafe fn sum16(v: [__m512; 16]) -> [f32; LANES] {
            unsafe {
                // Adds lanes l and l + 8. a[i] has vector i in its low half, vector i + 8 in its high half.
                const FROM: [usize; 16] = [0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15];
                let v: [__m512; 16] = {
                    let mut ordered = v;
                    for i in 0..16 {
                        ordered[i] = v[FROM[i]];
                    }
                    ordered
                };
                let mut a = [_mm512_setzero_ps(); 8];
                for i in 0..8 {
                    let low = _mm512_shuffle_f32x4::<0b01_00_01_00>(v[i], v[i + 8]);
                    let high = _mm512_shuffle_f32x4::<0b11_10_11_10>(v[i], v[i + 8]);
                    a[i] = _mm512_add_ps(low, high);
                }
                // Adds lanes l and l + 4. The quarters of b[i] hold vectors i, i + 8, i + 4, i + 12.
                let mut b = [_mm512_setzero_ps(); 4];
                for i in 0..4 {
                    let low = _mm512_shuffle_f32x4::<0b10_00_10_00>(a[i], a[i + 4]);
                    let high = _mm512_shuffle_f32x4::<0b11_01_11_01>(a[i], a[i + 4]);
                    b[i] = _mm512_add_ps(low, high);
                }
                // Adds lanes l and l + 2 within quarters. A quarter's pairs of lanes hold vectors i, i + 2.
                let mut c = [_mm512_setzero_ps(); 2];
                for i in 0..2 {
                    let low = _mm512_shuffle_ps::<0b01_00_01_00>(b[i], b[i + 2]);
                    let high = _mm512_shuffle_ps::<0b11_10_11_10>(b[i], b[i + 2]);
                    c[i] = _mm512_add_ps(low, high);
                }
                // Adds lanes l and l + 1. Lane p of quarter q holds the sum of reordered vector
                // {0, 8, 4, 12}[q] + {0, 2, 1, 3}[p], which is the argument's vector 4 q + p because of FROM.
                let low = _mm512_shuffle_ps::<0b10_00_10_00>(c[0], c[1]);
                let high = _mm512_shuffle_ps::<0b11_01_11_01>(c[0], c[1]);
                Self::lanes(_mm512_add_ps(low, high))
            }
        }
    }

    pub struct Avx2;

    impl Avx2 {
        #[inline(always)]
        fn both(
            a: (__m256, __m256),
            b: (__m256, __m256),
            f: impl Fn(__m256, __m256) -> __m256,
        ) -> (__m256, __m256) {
            (f(a.0, b.0), f(a.1, b.1))
        }
    }

    impl Simd for Avx2 {
        type V = (__m256, __m256);
        const TILE: usize = 4;
        #[inline(always)]
        unsafe fn call(job: impl Job) {
            #[inline(never)]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn with_features(job: impl Job) {
                unsafe { job.go::<Avx2>() }
            }
            unsafe { with_features(job) }
        }
        #[inline(always)]
        unsafe fn splat(x: f32) -> Self::V {
            unsafe { (_mm256_set1_ps(x), _mm256_set1_ps(x)) }
        }
        #[inline(always)]
        unsafe fn load(p: *const f32) -> Self::V {
            unsafe { (_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))) }
        }
        #[inline(always)]
        unsafe fn load_bf16(p: *const u8) -> Self::V {
            unsafe {
                let half = |p: *const u8| {
                    let wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast()));
                    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(wide))
                };
                (half(p), half(p.add(16)))
            }
        }
        #[inline(always)]
        unsafe fn load_f16(p: *const u8) -> Self::V {
            unsafe {
                let half = |p: *const u8| _mm256_cvtph_ps(_mm_loadu_si128(p.cast()));
                (half(p), half(p.add(16)))
            }
        }
        #[inline(always)]
        unsafe fn store(p: *mut f32, v: Self::V) {
            unsafe {
                _mm256_storeu_ps(p, v.0);
                _mm256_storeu_ps(p.add(8), v.1);
            }
        }
        #[inline(always)]
        unsafe fn add(a: Self::V, b: Self::V) -> Self::V {
            Self::both(a, b, |a, b| unsafe { _mm256_add_ps(a, b) })
        }
        #[inline(always)]
        unsafe fn sub(a: Self::V, b: Self::V) -> Self::V {
            Self::both(a, b, |a, b| unsafe { _mm256_sub_ps(a, b) })
        }
        #[inline(always)]
        unsafe fn mul(a: Self::V, b: Self::V) -> Self::V {
            Self::both(a, b, |a, b| unsafe { _mm256_mul_ps(a, b) })
        }
        #[inline(always)]
        unsafe fn div(a: Self::V, b: Self::V) -> Self::V {
            Self::both(a, b, |a, b| unsafe { _mm256_div_ps(a, b) })
        }
        #[inline(always)]
        unsafe fn min(a: Self::V, b: Self::V) -> Self::V {
            Self::both(a, b, |a, b| unsafe { _mm256_min_ps(a, b) })
        }
        #[inline(always)]
        unsafe fn max(a: Self::V, b: Self::V) -> Self::V {
            Self::both(a, b, |a, b| unsafe { _mm256_max_ps(a, b) })
        }
        #[inline(always)]
        unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V {
            unsafe { (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1)) }
        }
        #[inline(always)]
        unsafe fn pow2(v: Self::V) -> Self::V {
            unsafe {
                let one = |v: __m256| {
                    let n = _mm256_slli_epi32::<23>(_mm256_castps_si256(v));
                    _mm256_castsi256_ps(_mm256_add_epi32(n, _mm256_set1_epi32(127 << 23)))
                };
                (one(v.0), one(v.1))
            }
        }
    }
}
