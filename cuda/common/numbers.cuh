// Arithmetic helpers shared by several kernels. Each fixes its order of additions and roundings.
#pragma once
#include "common/ptx.cuh"

// Sum over each group of `width` lanes: 32, by xor shuffles 16-8-4-2-1, or 16, by 8-4-2-1.
DEVICE float lane_sum(float x, u32 width) {
  if (width == 32) x += __shfl_xor_sync(0xffffffffu, x, 16);
  for (int flip = 8; flip > 0; flip /= 2) x += __shfl_xor_sync(0xffffffffu, x, flip);
  return x;
}

// Sum of the squares of four neighbouring columns, added in order from x to w.
DEVICE float sum_of_squares(float4 v) {
  return __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmul_rn(v.x, v.x))));
}

// Elementwise products, rounded once each (never contracted into an FMA).
DEVICE float4 mul(float4 v, float s) {
  return make_float4(__fmul_rn(v.x, s), __fmul_rn(v.y, s), __fmul_rn(v.z, s), __fmul_rn(v.w, s));
}
DEVICE float4 mul(float4 v, float4 s) {
  return make_float4(__fmul_rn(v.x, s.x), __fmul_rn(v.y, s.y), __fmul_rn(v.z, s.z), __fmul_rn(v.w, s.w));
}

// Four bf16, x at the lowest address.
DEVICE uint2 pack4(float4 v) { return make_uint2(pack2(v.x, v.y), pack2(v.z, v.w)); }

// Maps floats to integers that sort in the same order; -0 and +0 map to the same integer.
DEVICE u32 ascending(float x) {
  const u32 bits = __float_as_uint(x + 0.0f);  // -0 becomes +0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// A token's key: the larger logit is larger, of equal logits the lower id; all ones for a NaN or +inf.
DEVICE u64 logit_key(float logit, u32 id) {
  return logit < __uint_as_float(0x7f800000u) ? u64(ascending(logit)) << 32 | u32(~id) : ~0ull;
}
