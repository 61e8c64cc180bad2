// Kernels of the tests: a product of wgmma, and kernels with bugs that the machine must find. `bug` = 0 is right.
#include "common/ptx.cuh"

// out = c + a b^T by one warpgroup. All of a and b is staged in shared memory, either without a swizzle, with
// the given strides, or with the 128-byte swizzle (k up to 64), from multiples of 1024 bytes on.
extern "C" __global__ void __launch_bounds__(128, 1) toy_wgmma(
    float* out,      // [64][256]
    const u16* a,    // [64][k] bf16
    const u16* b,    // [256][k] bf16
    const float* c,  // [64][256]; null: zeros
    u32 k, u32 swizzle, u32 leading, u32 stride) {
  u8* const memory = dynamic_shared;
  grid_wait();
  const u32 thread = threadIdx.x, row = thread / 32 * 16 + thread % 32 / 4, t = thread % 4;
  u8* const first = memory + (0u - shared_address(memory)) % 1024;
  u8* const second = first + (8 * stride + k / 8 * leading + 1023) / 1024 * 1024;
  const auto stage = [&](u8* to, const u16* from, u32 rows) {
    for (u32 i = thread; i < rows * (k / 8); i += 128) {
      const u32 r = i / (k / 8), chunk = i % (k / 8);
      const u32 at = swizzle ? r * 128 + (chunk ^ r % 8) * 16 : r / 8 * stride + chunk * leading + r % 8 * 16;
      as<uint4>(to + at) = as<uint4>(from + r * k + chunk * 8);
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
    sum[i] = c ? c[at] : __uint_as_float(0x7fc00000u);
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
  for (u32 i = 0; i < 128; i++) out[(row + i / 2 % 2 * 8) * 256 + i / 4 * 8 + t * 2 + i % 2] = sum[i];
}

// out[i] = in[i ^ 32], staged in shared memory. Bug 1: no barrier after staging.
extern "C" __global__ void __launch_bounds__(128, 1) broken_staging(
    u32* out,       // [128]
    const u32* in,  // [128]
    u32 bug) {
  __shared__ u32 staged[128];
  grid_wait();
  staged[threadIdx.x] = in[threadIdx.x];
  if (bug != 1) __syncthreads();
  out[threadIdx.x] = staged[threadIdx.x ^ 32];
}

// out[r][i] = in[r][i ^ 32] for four rows through one buffer. Bug 1: no barrier before the buffer is reused.
extern "C" __global__ void __launch_bounds__(128, 1) broken_reuse(
    u32* out,       // [4][128]
    const u32* in,  // [4][128]
    u32 bug) {
  __shared__ u32 staged[128];
  grid_wait();
  for (u32 r = 0; r < 4; r++) {
    staged[threadIdx.x] = in[r * 128 + threadIdx.x];
    __syncthreads();
    out[r * 128 + threadIdx.x] = staged[threadIdx.x ^ 32];
    if (bug != 1) __syncthreads();
  }
}

// out[i] = in[i ^ 1] within a warp, through shared memory. Bug 1: no __syncwarp between store and load.
extern "C" __global__ void __launch_bounds__(32, 1) broken_warp(
    u32* out,       // [32]
    const u32* in,  // [32]
    u32 bug) {
  __shared__ u32 staged[32];
  grid_wait();
  staged[threadIdx.x] = in[threadIdx.x];
  if (bug != 1) __syncwarp();
  out[threadIdx.x] = staged[threadIdx.x ^ 1];
}

// Fills `words` words of dynamic shared memory. Bug 1: writes one word past it; bug 2: one word before it;
// bug 3: one word past a static array.
extern "C" __global__ void __launch_bounds__(32, 1) broken_bounds(
    u32* out,  // [32]
    u32 words, u32 bug) {
  u32* const memory = reinterpret_cast<u32*>(dynamic_shared);
  __shared__ u32 fixed[32];
  grid_wait();
  for (u32 i = threadIdx.x; i < words + (bug == 1); i += 32) memory[i] = i;
  if (bug == 2 && threadIdx.x == 0) *(memory - 1) = 7;
  u32* at = fixed;
  for (u32 i = threadIdx.x; i < 32 + (bug == 3); i += 32) at[i] = i;
  __syncthreads();
  out[threadIdx.x] = memory[threadIdx.x] + fixed[threadIdx.x];
}

// Two mma operations. Bug 1: lane 5 skips the second; bug 2: lane 5 returns before the first.
extern "C" __global__ void __launch_bounds__(32, 1) broken_mma(
    float* out,  // [32]
    u32 bug) {
  grid_wait();
  float d[4] = {0, 0, 0, 0};
  if (bug == 2 && threadIdx.x == 5) return;
  mma_bf16(d, 0, 0, 0, 0, 0, 0);
  if (!(bug == 1 && threadIdx.x == 5)) mma_bf16(d, 0, 0, 0, 0, 0, 0);
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, d[0], 1);
}

// Every thread waits at one barrier. Bug 1: thread 40 executes __syncwarp instead; bug 2: thread 40 waits at a
// different barrier.
extern "C" __global__ void __launch_bounds__(64, 1) broken_barrier(
    u32* out,  // [64]
    u32 bug) {
  grid_wait();
  if (bug == 2 && threadIdx.x == 40) {
    __syncthreads();
  } else if (bug != 1 || threadIdx.x != 40) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = threadIdx.x;
}

// out[i] = in[i], 16 bytes per thread by cp.async; the last 16 are zero. Bug 1: no wait; bug 2: waits only
// for the first of two groups.
extern "C" __global__ void __launch_bounds__(32, 1) broken_copy(
    uint4* out,       // [64]
    const uint4* in,  // [64]
    u32 bug) {
  __shared__ __align__(16) uint4 staged[64];
  grid_wait();
  cp_async16(staged + threadIdx.x, in + threadIdx.x);
  cp_async_commit();
  cp_async16(staged + 32 + threadIdx.x, in + 32 + threadIdx.x, threadIdx.x < 16);
  cp_async_commit();
  if (bug == 0) cp_async_wait<0>();
  if (bug == 2) cp_async_wait<1>();
  __syncthreads();
  out[threadIdx.x] = staged[threadIdx.x];
  out[32 + threadIdx.x] = staged[32 + threadIdx.x];
}

// Bug 1: thread 3 traps.
extern "C" __global__ void __launch_bounds__(32, 1) broken_trap(
    u32* out,  // [32]
    u32 bug) {
  grid_wait();
  if (bug == 1 && threadIdx.x == 3) __trap();
  out[threadIdx.x] = 1;
}

// out = a b^T in two groups of one wgmma. The comments below describe the bugs by number.
extern "C" __global__ void __launch_bounds__(128, 1) broken_wgmma(
    float* out,    // [64][256]
    const u16* a,  // [64][32] bf16
    const u16* b,  // [256][32] bf16
    u32 bug) {
  u8* const memory = dynamic_shared;
  grid_wait();
  const u32 thread = threadIdx.x, warp = thread / 32, row = warp * 16 + thread % 32 / 4, t = thread % 4;
  // A stage holds 16 k of 64 rows of a and 256 rows of b; 8 rows x 8 k take 128 bytes.
  constexpr u32 STAGE = 320 * 32, LEADING = 128, STRIDE = 256;
  for (u32 s = 0; s < 2; s++) {
    for (u32 i = thread; i < 320 * 2; i += 128) {
      const u32 r = i / 2, half = i % 2;
      const u16* from = r < 64 ? a + r * 32 : b + (r - 64) * 32;
      cp_async16(memory + s * STAGE + r / 8 * STRIDE + half * LEADING + r % 8 * 16, from + s * 16 + half * 8);
    }
    cp_async_commit();
  }
  if (bug == 1) fence_proxy_async();  // 1: fence before the copies are complete
  cp_async_wait<0>();
  if (bug != 1 && bug != 2) fence_proxy_async();  // 2: no fence
  if (bug != 3) __syncthreads();  // 3: no barrier
  if (bug == 4 && warp == 3) return;  // 4: warp 3 executes no wgmma
  float sum[128];
  if (bug != 5) wgmma_fence();  // 5: no fence
  for (u32 s = 0; s < 2; s++) {
    // 6: the warps' descriptors differ.
    const u32 at = shared_address(memory + s * STAGE), stride = bug == 6 && warp == 2 ? 512 : STRIDE;
    u64 left = descriptor(at, LEADING, stride, NO_SWIZZLE), right = descriptor(at + 2048, LEADING, STRIDE, NO_SWIZZLE);
    if (bug == 7) left = descriptor(at, 0, 1024, SWIZZLE_128);  // 7: swizzled, but not at a multiple of 1024
    if (bug == 8) right = advance(right, 2 * STAGE);            // 8: beyond shared memory
    wgmma_bf16(sum, left, right, s > 0);
    if (bug != 9) wgmma_commit();  // 9: no commit
  }
  if (bug == 10) as<uint4>(memory + thread * 16) = make_uint4(1, 2, 3, 4);  // 10: operands not waited for
  if (bug == 15 || bug == 16) {
    wgmma_wait<1>();
    __syncthreads();
    // 15: operands of the second group, which is still in flight. 16: operands of the first group, which is
    // no bug.
    as<uint4>(memory + (bug == 15 ? STAGE : 0) + thread * 16) = make_uint4(1, 2, 3, 4);
  }
  if (bug == 11) sum[5] = 1;       // 11: writes a sum before the wait
  if (bug == 12) wgmma_wait<1>();  // 12: waits for one group too few
  else if (bug != 13) wgmma_wait<0>();  // 13: no wait
  if (bug == 14) {
    sum[7] += 1;
    wgmma_bf16(sum, 0, 0, true);  // 14: no fence since the write above
  }
  for (u32 i = 0; i < 128; i++) out[(row + i / 2 % 2 * 8) * 256 + i / 4 * 8 + t * 2 + i % 2] = sum[i];
}
