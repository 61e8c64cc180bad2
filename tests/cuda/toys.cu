// Small kernels for tests; each uses one operation of the emulator.
#include "common/ptx.cuh"

// out[warp] = repeats a b, by repeated accumulation in every warp. All matrices are row-major.
KERNEL(64, 1, toy_mma,
       (float* out,    // [2][16][8]
        const u16* a,  // [16][16] bf16
        const u16* b,  // [16][8] bf16
        u32 repeats)) {
  grid_wait();
  const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto pair = [](const u16* p, u32 step) { return u32(p[0]) | u32(p[step]) << 16; };
  const u32 a0 = pair(a + g * 16 + 2 * t, 1), a1 = pair(a + (g + 8) * 16 + 2 * t, 1);
  const u32 a2 = pair(a + g * 16 + 2 * t + 8, 1), a3 = pair(a + (g + 8) * 16 + 2 * t + 8, 1);
  const u32 b0 = pair(b + 2 * t * 8 + g, 8), b1 = pair(b + (2 * t + 8) * 8 + g, 8);
  float d[4] = {0, 0, 0, 0};
  for (u32 i = 0; i < repeats; i++) mma_bf16(d, a0, a1, a2, a3, b0, b1);
  float* to = out + threadIdx.x / 32 * 128;
  to[g * 8 + 2 * t] = d[0], to[g * 8 + 2 * t + 1] = d[1];
  to[(g + 8) * 8 + 2 * t] = d[2], to[(g + 8) * 8 + 2 * t + 1] = d[3];
}

// ldmatrix of `in`, with rows `pitch` bytes apart in shared memory. out: the four registers of each lane.
KERNEL(32, 1, toy_ldmatrix,
       (u32* out,       // [32][4]
        const u16* in,  // [32][8] bf16
        u32 pitch, u32 transposed)) {
  DYNAMIC_SHARED(u8, memory);
  grid_wait();
  u8* row = memory + threadIdx.x * pitch;
  *reinterpret_cast<uint4*>(row) = ld128(in + threadIdx.x * 8);
  __syncthreads();
  u32 r[4];
  if (transposed) ldmatrix4_trans(r, row);
  else ldmatrix4(r, row);
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = r[i];
}

// One row of results per warp operation.
KERNEL(32, 1, toy_warp,
       (u32* out,         // [12][32]
        const u32* in)) {  // [32]
  grid_wait();
  const u32 lane = threadIdx.x, v = in[lane], all = 0xffffffffu;
  const auto put = [&](u32 row, u32 x) { out[row * 32 + lane] = x; };
  put(0, __shfl_sync(all, v, 5));
  put(1, __shfl_sync(all, v, int(lane) + 1, 8));
  put(2, __shfl_xor_sync(all, v, 9));
  put(3, __shfl_up_sync(all, v, 3));
  put(4, __shfl_down_sync(all, v, 3));
  put(5, __shfl_down_sync(all, v, 3, 16));
  put(6, __ballot_sync(all, v % 3 == 0));
  put(7, u32(__any_sync(all, v == in[7])) * 2 + u32(__all_sync(all, v != 0xffffffffu)));
  put(8, u32(__shfl_xor_sync(all, u64(v) << 32 | lane, 1) >> 32));
  put(9, __reduce_add_sync(all, v));
  put(10, u32(__reduce_max_sync(all, int(v))));
  put(11, __reduce_min_sync(all, v));
}

// Each thread reads `width` bytes of shared memory at offset thread x stride, through the counting wrappers.
KERNEL(32, 1, toy_banks,
       (u32* out,  // [32]
        u32 width, u32 stride)) {
  DYNAMIC_SHARED(u8, memory);
  grid_wait();
  for (u32 i = threadIdx.x * 16; i < 8192; i += 512) sts128(memory + i, make_uint4(i, i, i, i));
  __syncthreads();
  const u8* at = memory + threadIdx.x * stride;
  u32 v = 0;
  if (width == 4) v = lds(reinterpret_cast<const u32*>(at));
  if (width == 8) v = lds(reinterpret_cast<const uint2*>(at)).x;
  if (width == 16) v = lds128(at).x;
  out[threadIdx.x] = v;
}

// Global atomics of 32 and 64 bits.
KERNEL(64, 1, toy_atomics,
       (u32* out,         // [3]: sum, maximum, or
        u64* out64,       // [2]: sum, maximum
        const u32* in)) {  // [blocks][64]
  grid_wait();
  const u32 v = in[blockIdx.x * 64 + threadIdx.x];
  atomicAdd(out, v);
  atomicMax(out + 1, v);
  atomicOr(out + 2, v);
  atomicAdd(out64, u64(v) << 20);
  atomicMax(out64 + 1, u64(v) << 32 | blockIdx.x);
}

// out[z][y][x] = 1 + a sum over warp 0's lanes through shared memory, behind a barrier that the other warp
// skips by returning.
KERNEL(64, 1, toy_grid, (u32* out)) {  // [grid z][grid y][grid x]
  SHARED(u32, staged, 32);
  grid_wait();
  if (threadIdx.x >= 32) return;
  staged[threadIdx.x ^ 5] = threadIdx.x + blockIdx.z;
  __syncthreads();
  if (threadIdx.x != 9) return;
  u32 sum = 1;
  for (u32 i = 0; i < 32; i++) sum += staged[i];
  out[(blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x] = sum + blockIdx.y * 10000;
}

// out = c + a b^T by one warpgroup. All of a and b is staged in shared memory, either without a swizzle, with
// the given strides, or with the 128-byte swizzle (k up to 64), from multiples of 1024 bytes on.
KERNEL(128, 1, toy_wgmma,
       (float* out,      // [64][256]
        const u16* a,    // [64][k] bf16
        const u16* b,    // [256][k] bf16
        const float* c,  // [64][256]; null: zeros
        u32 k, u32 swizzle, u32 leading, u32 stride)) {
  DYNAMIC_SHARED(u8, memory);
  grid_wait();
  const u32 thread = threadIdx.x, row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
  u8* const first = memory + (0u - shared_address(memory)) % 1024;
  u8* const second = first + (8 * stride + k / 8 * leading + 1023) / 1024 * 1024;
  const auto stage = [&](u8* to, const u16* from, u32 rows) {
    for (u32 i = thread; i < rows * (k / 8); i += 128) {
      const u32 r = i / (k / 8), chunk = i % (k / 8);
      const u32 at = swizzle ? r * 128 + (chunk ^ r % 8) * 16 : r / 8 * stride + chunk * leading + r % 8 * 16;
      sts128(to + at, ld128(from + r * k + chunk * 8));
    }
  };
  stage(first, a, 64);
  stage(second, b, 256);
  fence_proxy_async();
  __syncthreads();
  float sum[128];
  for (u32 i = 0; i < 128; i++) {
    // Without c the first wgmma overwrites the registers, whatever they hold.
    const u32 at = (row + i / 2 % 2 * 8) * 256 + i / 4 * 8 + t * 2 + i % 2;
    sum[i] = c ? ld(c + at) : __uint_as_float(0x7fc00000u);
  }
  wgmma_fence();
  for (u32 i = 0; i < k / 16; i++) {
    const Swizzle mode = swizzle ? SWIZZLE_128 : NO_SWIZZLE;
    const u32 offset = i * (swizzle ? 32 : 2 * leading);
    const u64 left = advance(descriptor(shared_address(first), leading, stride, mode), offset);
    const u64 right = advance(descriptor(shared_address(second), leading, stride, mode), offset);
    wgmma_bf16(sum, left, right, c || i);
    // Groups of one wgmma, at most two of them in flight.
    wgmma_commit();
    wgmma_wait<2>();
  }
  wgmma_wait<0>();
  for (u32 i = 0; i < 128; i++) st(out + (row + i / 2 % 2 * 8) * 256 + i / 4 * 8 + t * 2 + i % 2, sum[i]);
}
