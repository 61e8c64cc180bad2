// RMSNorm, split between the producer of the residual stream and the consumer of its rows, and whole.
//
// Computes: residual_norm: x[r] += add[r]; y[r] = bf16(gain x[r]); sumsq[r][p] = sum of x[r][k]^2 over part p.
//           full_norm: y[r] = bf16(gain x[r] / sqrt(mean of x[r]^2 + eps)).
// Work:     residual_norm: grid (eights of parts, rows), a warp per part of 128 columns, four columns per lane.
//           full_norm: grid (rows), 8 warps that take every eighth part.
// Order:    a lane's four columns upwards, lanes by xor 16-8-4-2-1, parts in index order: a function of hidden alone.
// Bytes:    residual_norm: rows x (hidden x 14 + parts x 4), x 6 without add; full_norm: rows x hidden x 6 and gain.
// Needs:    hidden a multiple of 64; buffers 16-byte aligned.
#include "common/numbers.cuh"

constexpr u32 PART = 128, WARPS = 8;

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
    st(reinterpret_cast<uint2*>(y + at), pack4(times(ld_four(gain + column), v)));
  }
  const float sum = lane_sum(squares(v), 32);
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
    const float sum = lane_sum(squares(column < hidden ? ld_four(from + column) : make_float4(0, 0, 0, 0)), 32);
    if (lane == 0) sts(sums + part, sum);
  }
  __syncthreads();
  float sum = 0;
  for (u32 part = 0; part < parts; part++) sum = __fadd_rn(sum, lds(sums + part));
  const float rstd = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, float(hidden)), eps)));
  for (u32 column = threadIdx.x * 4; column < hidden; column += blockDim.x * 4) {
    st(reinterpret_cast<uint2*>(to + column), pack4(times(ld_four(gain + column), times(ld_four(from + column), rstd))));
  }
}
