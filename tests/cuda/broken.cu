// Kernels with deliberate bugs, which the emulator's tests (tests/kernels/emulator.rs, wgmma.rs) must detect.
// `bug` = 0 runs the correct version.
#include "common/last_block.cuh"

// out[i] = in[i ^ 32], staged in shared memory. Bug 1: no barrier after staging.
KERNEL(128, 1, broken_staging,
       (u32* out,       // [128]
        const u32* in,  // [128]
        u32 bug)) {
  SHARED(u32, staged, 128);
  grid_wait();
  staged[threadIdx.x] = in[threadIdx.x];
  if (bug != 1) __syncthreads();
  out[threadIdx.x] = staged[threadIdx.x ^ 32];
}

// out[r][i] = in[r][i ^ 32] for four rows through one buffer. Bug 1: no barrier before the buffer is reused.
KERNEL(128, 1, broken_reuse,
       (u32* out,       // [4][128]
        const u32* in,  // [4][128]
        u32 bug)) {
  SHARED(u32, staged, 128);
  grid_wait();
  for (u32 r = 0; r < 4; r++) {
    staged[threadIdx.x] = in[r * 128 + threadIdx.x];
    __syncthreads();
    out[r * 128 + threadIdx.x] = staged[threadIdx.x ^ 32];
    if (bug != 1) __syncthreads();
  }
}

// out[i] = in[i ^ 1] within a warp, through shared memory. Bug 1: no __syncwarp between store and load.
KERNEL(32, 1, broken_warp,
       (u32* out,       // [32]
        const u32* in,  // [32]
        u32 bug)) {
  SHARED(u32, staged, 32);
  grid_wait();
  staged[threadIdx.x] = in[threadIdx.x];
  if (bug != 1) __syncwarp();
  out[threadIdx.x] = staged[threadIdx.x ^ 1];
}

// Fills `words` words of dynamic shared memory. Bug 1: writes one word past it; bug 2: one word before it;
// bug 3: one word past a static array.
KERNEL(32, 1, broken_bounds,
       (u32* out,  // [32]
        u32 words, u32 bug)) {
  DYNAMIC_SHARED(u32, memory);
  SHARED(u32, fixed, 32);
  grid_wait();
  for (u32 i = threadIdx.x; i < words + (bug == 1); i += 32) memory[i] = i;
  if (bug == 2 && threadIdx.x == 0) *(memory - 1) = 7;
  u32* at = fixed;
  for (u32 i = threadIdx.x; i < 32 + (bug == 3); i += 32) at[i] = i;
  __syncthreads();
  out[threadIdx.x] = memory[threadIdx.x] + fixed[threadIdx.x];
}

// Two mma operations. Bug 1: lane 5 skips the second; bug 2: lane 5 returns before the first.
KERNEL(32, 1, broken_mma,
       (float* out,  // [32]
        u32 bug)) {
  grid_wait();
  float d[4] = {0, 0, 0, 0};
  if (bug == 2 && threadIdx.x == 5) return;
  mma_bf16(d, 0, 0, 0, 0, 0, 0);
  if (!(bug == 1 && threadIdx.x == 5)) mma_bf16(d, 0, 0, 0, 0, 0, 0);
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, d[0], 1);
}

// Every thread waits at one barrier. Bug 1: thread 40 executes __syncwarp instead; bug 2: thread 40 waits at a
// different barrier.
KERNEL(64, 1, broken_barrier,
       (u32* out,  // [64]
        u32 bug)) {
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

// out[i] = i for i < count. Bug 1: does not write the last element; bug 2: writes one element too many.
KERNEL(64, 1, broken_output,
       (u32* out,  // [count]
        u32 count, u32 bug)) {
  grid_wait();
  for (u32 i = threadIdx.x; i < count - (bug == 1) + (bug == 2); i += 64) out[i] = i;
}

// out[i] = in[i], 16 bytes per thread by cp.async; the last 16 are zero. Bug 1: no wait; bug 2: waits only
// for the first of two groups.
KERNEL(32, 1, broken_copy,
       (uint4* out,       // [64]
        const uint4* in,  // [64]
        u32 bug)) {
  SHARED(uint4, staged, 64);
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

// out[m] = sum of in[m], one warp per row. Bug 1: with more than one row, lanes sum neighbouring elements
// instead of strided ones, so that the order of additions depends on the number of rows.
KERNEL(32, 1, broken_order,
       (float* out,       // [rows]
        const float* in,  // [rows][256]
        u32 rows, u32 bug)) {
  grid_wait();
  const u32 m = blockIdx.x, lane = threadIdx.x;
  float sum = 0;
  for (u32 i = 0; i < 8; i++) sum += in[m * 256 + (bug == 1 && rows > 1 ? lane * 8 + i : i * 32 + lane)];
  for (int flip = 16; flip > 0; flip /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, flip);
  if (lane == 0) out[m] = sum;
}

// Loads through wrappers. Bug 1: a misaligned 16-byte load; bug 2: an ordinary load before grid_wait; bug 3:
// a streaming load before grid_wait from memory that is not sealed; bug 4: no grid_wait; bug 5: a shuffle
// with half the mask; bug 6: as bug 3 by a prefetch; bug 7: a prefetch beyond the end of sealed memory.
KERNEL(32, 1, broken_rules,
       (uint4* out,    // [32]
        const u8* in,  // [24]
        u32 bug)) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (bug == 2) v = ld128(in);
  if (bug == 3) v = ld_stream(in);
  if (bug == 6) prefetch_l2(in, 16);
  if (bug == 7) prefetch_l2(in, 128);
  if (bug != 4) grid_wait();
  if (bug == 1) v = ld128(in + 8);
  if (bug == 5) v.x = __shfl_sync(0xffffu, v.x, 0);
  out[threadIdx.x] = v;
}

// The last block to arrive adds the partial sums of all blocks in block order. Bug 1: in order of arrival; bug
// 2: no barrier between the stores and the release.
KERNEL(32, 1, broken_last,
       (float* out,       // [1]
        float* partial,   // [blocks]
        u32* counter,     // [2]: blocks arrived; with bug 1 also partial sums written
        const float* in,  // [blocks][32]
        u32 bug)) {
  grid_wait();
  float mine = in[blockIdx.x * 32 + threadIdx.x];
  for (int flip = 16; flip > 0; flip /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, flip);
  if (threadIdx.x == 1) st_cg(partial + (bug == 1 ? atomicAdd(counter + 1, 1u) : blockIdx.x), mine);
  if (bug == 2) {
    if (threadIdx.x == 0) atomic_add_acq_rel(counter, 1);
    return;
  }
  if (!is_last_block(gridDim.x, counter)) return;
  float sum = 0;
  for (u32 i = 0; i < gridDim.x; i++) sum += ld_cg(partial + i);
  if (threadIdx.x == 0) out[0] = sum;
}

// Bug 1: thread 3 traps.
KERNEL(32, 1, broken_trap,
       (u32* out,  // [32]
        u32 bug)) {
  grid_wait();
  if (bug == 1 && threadIdx.x == 3) __trap();
  out[threadIdx.x] = 1;
}

// Bug 1: thread 40 uses 80,000 bytes of stack.
__device__ u32 use_stack(u32 i) {
  volatile u8 bytes[80000];
  for (u32 k = 0; k < 80000; k += 8) bytes[k] = u8(i);
  return bytes[i];
}
KERNEL(64, 1, broken_stack,
       (u32* out,  // [64]
        u32 bug)) {
  grid_wait();
  out[threadIdx.x] = bug == 1 && threadIdx.x == 40 ? use_stack(0) : 0;
}

// out = a b^T in two groups of one wgmma. The comments below describe the bugs by number.
KERNEL(128, 1, broken_wgmma,
       (float* out,    // [64][256]
        const u16* a,  // [64][32] bf16
        const u16* b,  // [256][32] bf16
        u32 bug)) {
  DYNAMIC_SHARED(u8, memory);
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
  if (bug == 10) sts128(memory + thread * 16, make_uint4(1, 2, 3, 4));  // 10: operands not waited for
  if (bug == 15 || bug == 16) {
    wgmma_wait<1>();
    __syncthreads();
    // 15: operands of the second group, which is still in flight. 16: operands of the first group, which is
    // no bug.
    sts128(memory + (bug == 15 ? STAGE : 0) + thread * 16, make_uint4(1, 2, 3, 4));
  }
  if (bug == 11) sum[5] = 1;       // 11: writes a sum before the wait
  if (bug == 12) wgmma_wait<1>();  // 12: waits for one group too few
  else if (bug != 13) wgmma_wait<0>();  // 13: no wait
  if (bug == 14) {
    sum[7] += 1;
    wgmma_bf16(sum, 0, 0, true);  // 14: no fence since the write above
  }
  for (u32 i = 0; i < 128; i++) st(out + (row + i / 2 % 2 * 8) * 256 + i / 4 * 8 + t * 2 + i % 2, sum[i]);
}
