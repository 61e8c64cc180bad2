// Small arithmetic that several kernels share, each with one order of rounding.
#pragma once
#include "common/ptx.cuh"

// Over the lanes of a group of `width`, 16 or 32, in the tree 16-8-4-2-1 or 8-4-2-1.
WRAPPER float lane_sum(float x, u32 width) {
  if (width == 32) x += __shfl_xor_sync(0xffffffffu, x, 16);
  for (int flip = 8; flip > 0; flip /= 2) x += __shfl_xor_sync(0xffffffffu, x, flip);
  return x;
}

// Squares of four neighbours, upwards.
WRAPPER float squares(float4 v) {
  return __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmul_rn(v.x, v.x))));
}

WRAPPER float4 times(float4 v, float s) {
  return make_float4(__fmul_rn(v.x, s), __fmul_rn(v.y, s), __fmul_rn(v.z, s), __fmul_rn(v.w, s));
}
WRAPPER float4 times(float4 v, float4 s) {
  return make_float4(__fmul_rn(v.x, s.x), __fmul_rn(v.y, s.y), __fmul_rn(v.z, s.z), __fmul_rn(v.w, s.w));
}
WRAPPER uint2 pack4(float4 v) { return make_uint2(pack2(v.x, v.y), pack2(v.z, v.w)); }

// The bits of x as an integer of the same order.
WRAPPER u32 ascending(float x) {
  const u32 bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
