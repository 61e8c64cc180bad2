// Reads memory and does nothing else: what every other kernel's bytes per second are held against.
//
// Computes: out[b] = sum mod 2^32 of the words that block b reads.
// Work:     grid (blocks), 256 threads, which take turns with runs of 2048 pieces of 16 bytes, 8 of a thread under way.
// Order:    none: sums mod 2^32.
// Bytes:    pieces x 16 read, blocks x 4 written.
// Needs:    from 16-byte aligned.
#include "common/ptx.cuh"

constexpr u32 AHEAD = 8, RUN = 256 * AHEAD;

WRAPPER u32 words(uint4 v) { return v.x + v.y + v.z + v.w; }

KERNEL(256, 4, read_all,
       (u32* out,         // [blocks]
        const u16* from,  // [pieces][8]
        u32 pieces)) {
  SHARED(u32, sums, 8);
  grid_launch();
  grid_wait();
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 sum = 0;
  for (u32 run = blockIdx.x; run < (pieces + RUN - 1) / RUN; run += gridDim.x) {
    const u16* at = from + (size_t(run) * RUN + threadIdx.x) * 8;
    const u32 left = pieces - run * RUN;
    // Two branches, or guards would keep the loads from being on their way at once.
    if (left >= RUN) {
      uint4 v[AHEAD];
#pragma unroll
      for (u32 i = 0; i < AHEAD; i++) v[i] = ld_stream(at + i * 256 * 8);
#pragma unroll
      for (u32 i = 0; i < AHEAD; i++) sum += words(v[i]);
    } else {
#pragma unroll 1
      for (u32 i = threadIdx.x; i < left; i += 256, at += 256 * 8) sum += words(ld_stream(at));
    }
  }
  sum = __reduce_add_sync(~0u, sum);
  if (lane == 0) sts(sums + warp, sum);
  __syncthreads();
  if (threadIdx.x > 0) return;
  sum = 0;
#pragma unroll
  for (u32 i = 0; i < 8; i++) sum += lds(sums + i);
  st(out + blockIdx.x, sum);
}
