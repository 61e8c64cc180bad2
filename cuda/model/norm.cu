// RMSNorm in two forms. residual_norm computes the sums of squares where the residual stream is written; the
// next linear layer multiplies by 1 / rms. full_norm is the complete norm.
//
// Computes: residual_norm: x[r] += add[r]; y[r] = bf16(gain x[r]); sumsq[r][p] = sum of x[r][k]^2 over
//           the columns of part p.
//           full_norm: y[r] = bf16(gain x[r] / sqrt(mean of x[r]^2 + eps)).
// Work:     residual_norm: grid (ceil(parts / 8), rows), a warp per part of 128 columns, four columns a lane.
//           full_norm: grid (rows), 8 warps, each takes every eighth part.
// Order:    four columns ascending per lane, lanes by xor 16-8-4-2-1, parts ascending. Depends only on
//           hidden.
// Bytes:    residual_norm: rows x (hidden x 14 + parts x 4), hidden x 6 instead of 14 without add.
//           full_norm: rows x hidden x 6. Both also read gain.
// Preconditions: hidden a multiple of 32, for full_norm at most 65536; parts = ceil(hidden / 128); buffers
//           16-byte aligned.
#include "common/numbers.cuh"

constexpr u32 PART = 128, WARPS = 8;

extern "C" __global__ void __launch_bounds__(256, 4) residual_norm(
    u16* y,            // [rows][hidden] bf16
    float* sumsq,      // [rows][parts]
    float* x,          // [rows][hidden]
    const float* add,  // [rows][hidden], or null
    const float* gain, // [hidden]
    u32 hidden, u32 parts) {
  grid_launch();
  grid_wait();
  const u32 lane = threadIdx.x % 32, part = blockIdx.x * WARPS + threadIdx.x / 32, row = blockIdx.y;
  if (part >= parts) return;
  const u32 column = part * PART + lane * 4;
  const bool inside = column < hidden;  // false at the end of a last part of fewer than 128 columns
  const size_t offset = size_t(row) * hidden + column;
  float4 v = make_float4(0, 0, 0, 0);
  if (inside) {
    v = as<float4>(x + offset);
    if (add) {
      const float4 a = as<float4>(add + offset);
      v = make_float4(__fadd_rn(v.x, a.x), __fadd_rn(v.y, a.y), __fadd_rn(v.z, a.z), __fadd_rn(v.w, a.w));
      as<float4>(x + offset) = v;
    }
    as<uint2>(y + offset) = pack4(mul(as<float4>(gain + column), v));
  }
  const float sum = lane_sum(sum_of_squares(v), 32);
  if (lane == 0) sumsq[size_t(row) * parts + part] = sum;
}

extern "C" __global__ void __launch_bounds__(256, 4) full_norm(
    u16* y,            // [rows][hidden] bf16
    const float* x,    // [rows][hidden]
    const float* gain, // [hidden]
    u32 hidden, u32 parts, float eps) {
  constexpr u32 MAX_PARTS = 512;  // of a row of 65536 columns
  __shared__ __align__(16) float sums[MAX_PARTS];  // aligned so that the compiler loads four at once
  grid_launch();
  grid_wait();
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float* from = x + size_t(blockIdx.x) * hidden;
  u16* to = y + size_t(blockIdx.x) * hidden;
  for (u32 part = warp; part < parts; part += WARPS) {
    const u32 column = part * PART + lane * 4;
    const float4 v = column < hidden ? as<float4>(from + column) : make_float4(0, 0, 0, 0);
    const float sum = lane_sum(sum_of_squares(v), 32);
    if (lane == 0) sums[part] = sum;
  }
  __syncthreads();
  float sum = 0;
  for (u32 part = 0; part < parts; part++) sum = __fadd_rn(sum, sums[part]);
  const float rstd = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, float(hidden)), eps)));
  for (u32 column = threadIdx.x * 4; column < hidden; column += blockDim.x * 4) {
    as<uint2>(to + column) = pack4(mul(as<float4>(gain + column), mul(as<float4>(from + column), rstd)));
  }
}
