// Reads memory and does nothing else. Its bandwidth is the read ceiling that other kernels are compared to.
//
// Computes: out[b] = sum mod 2^32 of the 32-bit words that block b reads.
// Work:     grid (blocks), 256 threads. Runs of 2048 chunks of 16 bytes go to the blocks in turn; each thread
//           has 8 loads in flight.
// Order:    irrelevant, sums are mod 2^32.
// Bytes:    reads chunks x 16, writes blocks x 4.
// Preconditions: `from` 16-byte aligned.
#include "common/ptx.cuh"

constexpr u32 AHEAD = 8, RUN = 256 * AHEAD;

DEVICE u32 word_sum(uint4 v) { return v.x + v.y + v.z + v.w; }

extern "C" __global__ void __launch_bounds__(256, 4) read_all(
    u32* out,         // [blocks]
    const u16* from,  // [chunks][8]
    u32 chunks) {
  __shared__ __align__(16) u32 sums[8];  // [warps], aligned so that the compiler loads four at once
  grid_launch();
  grid_wait();
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 sum = 0;
  for (u32 run = blockIdx.x; run < (chunks + RUN - 1) / RUN; run += gridDim.x) {
    const u16* at = from + (size_t(run) * RUN + threadIdx.x) * 8;
    const u32 left = chunks - run * RUN;
    // Two branches: per-load guards would keep the compiler from issuing the loads back to back.
    if (left >= RUN) {
      uint4 v[AHEAD];
#pragma unroll
      for (u32 i = 0; i < AHEAD; i++) v[i] = ld_stream(at + i * 256 * 8);
#pragma unroll
      for (u32 i = 0; i < AHEAD; i++) sum += word_sum(v[i]);
    } else {
#pragma unroll 1
      for (u32 i = threadIdx.x; i < left; i += 256, at += 256 * 8) sum += word_sum(ld_stream(at));
    }
  }
  sum = __reduce_add_sync(~0u, sum);
  if (lane == 0) sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = 0;
#pragma unroll
  for (u32 i = 0; i < 8; i++) sum += sums[i];
  out[blockIdx.x] = sum;
}
