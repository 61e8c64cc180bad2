// RMSNorm, split between the producer of the residual stream and the consumer of its rows, and whole.
//
// Computes: residual_norm: x[r] += add[r]; y[r] = bf16(gain x[r]); sumsq[r][p] = sum of x[r][k]^2 over part p.
//           full_norm: y[r] = bf16(gain x[r] / sqrt(mean of x[r]^2 + eps)).
// Work:     residual_norm: grid (eights of parts, rows), a warp per part of 128 columns, four columns per lane.
//           full_norm: grid (rows), 8 warps that take every eighth part.
// Order:    a lane's four columns upwards, lanes by xor 16-8-4-2-1, parts in index order: a function of hidden alone.
// Bytes:    residual_norm: rows x (hidden x 14 + parts x 4), x 6 without add; full_norm: rows x hidden x 6 and gain.
// Needs:    hidden a multiple of 64; buffers 16-byte aligned.
#include "ptx.cuh"

constexpr u32 PART = 128, WARPS = 8;

// Sum of squares of a part whose four columns per lane are `v`; every lane has it.
WRAPPER float part_sum(float4 v) {
  float sum = __fmul_rn(v.x, v.x);
  sum = __fmaf_rn(v.y, v.y, sum);
  sum = __fmaf_rn(v.z, v.z, sum);
  sum = __fmaf_rn(v.w, v.w, sum);
  for (int flip = 16; flip; flip /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(~0u, sum, flip));
  return sum;
}

WRAPPER float4 times(float4 a, float4 b) {
  return make_float4(__fmul_rn(a.x, b.x), __fmul_rn(a.y, b.y), __fmul_rn(a.z, b.z), __fmul_rn(a.w, b.w));
}

WRAPPER void st_bf16(u16* to, float4 v) {
  st(reinterpret_cast<uint2*>(to), make_uint2(pack2(v.x, v.y), pack2(v.z, v.w)));
}

WRAPPER float4 ld_four(const float* from) { return ld(reinterpret_cast<const float4*>(from)); }

KERNEL(256, 4, residual_norm,
       (u16* y,            // [rows][hidden] bf16
        float* sumsq,      // [rows][parts]
        float* x,          // [rows][hidden]
        const float* add,  // [rows][hidden], or null
        const float* gain, // [hidden]
        u32 hidden, u32 parts)) {
  grid_launch();
  grid_wait();
  const u32 lane = threadIdx.x % 32, part = blockIdx.x * WARPS + threadIdx.x / 32, row = blockIdx.y;
  if (part >= parts) return;
  const u32 column = part * PART + lane * 4;
  const bool there = column < hidden;  // the last part may be half a part
  const size_t at = size_t(row) * hidden + column;
  float4 v = make_float4(0, 0, 0, 0);
  if (there) {
    v = ld_four(x + at);
    if (add) {
      const float4 a = ld_four(add + at);
      v = make_float4(__fadd_rn(v.x, a.x), __fadd_rn(v.y, a.y), __fadd_rn(v.z, a.z), __fadd_rn(v.w, a.w));
      st(reinterpret_cast<float4*>(x + at), v);
    }
    st_bf16(y + at, times(ld_four(gain + column), v));
  }
  const float sum = part_sum(v);
  if (lane == 0) st(sumsq + size_t(row) * parts + part, sum);
}

KERNEL(256, 4, full_norm,
       (u16* y,            // [rows][hidden] bf16
        const float* x,    // [rows][hidden]
        const float* gain, // [hidden]
        u32 hidden, u32 parts, float eps)) {
  constexpr u32 MOST = 512;  // parts of the widest row
  SHARED(float, sums, MOST);
  grid_launch();
  grid_wait();
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* from = x + size_t(blockIdx.x) * hidden;
  u16* to = y + size_t(blockIdx.x) * hidden;
  for (u32 part = warp; part < parts; part += WARPS) {
    const u32 column = part * PART + lane * 4;
    const float sum = part_sum(column < hidden ? ld_four(from + column) : make_float4(0, 0, 0, 0));
    if (lane == 0) sts(sums + part, sum);
  }
  __syncthreads();
  float sum = 0;
  for (u32 part = 0; part < parts; part++) sum = __fadd_rn(sum, lds(sums + part));
  const float rstd = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, float(hidden)), eps)));
  const float4 scale = make_float4(rstd, rstd, rstd, rstd);
  for (u32 column = threadIdx.x * 4; column < hidden; column += blockDim.x * 4) {
    st_bf16(to + column, times(ld_four(gain + column), times(ld_four(from + column), scale)));
  }
}
