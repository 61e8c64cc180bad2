// Kernels with one bug each, which the tests of the emulator must see reported. `bug` = 0 runs the right version.
#include "common/ptx.cuh"

// out[i] = in[i ^ 32]: staged in shared memory. Bug 1: no barrier after staging.
KERNEL(128, 1, broken_staging, (u32* out, const u32* in, u32 bug)) {
  SHARED(u32, staged, 128);
  grid_wait();
  staged[threadIdx.x] = in[threadIdx.x];
  if (bug != 1) __syncthreads();
  out[threadIdx.x] = staged[threadIdx.x ^ 32];
}

// out[r][i] = in[r][i ^ 32] for four rows through one buffer. Bug 1: no barrier before the buffer is used again.
KERNEL(128, 1, broken_reuse, (u32* out, const u32* in, u32 bug)) {
  SHARED(u32, staged, 128);
  grid_wait();
  for (u32 r = 0; r < 4; r++) {
    staged[threadIdx.x] = in[r * 128 + threadIdx.x];
    __syncthreads();
    out[r * 128 + threadIdx.x] = staged[threadIdx.x ^ 32];
    if (bug != 1) __syncthreads();
  }
}

// out[i] = in[i ^ 1] within the warp, through shared memory. Bug 1: no __syncwarp between.
KERNEL(32, 1, broken_warp, (u32* out, const u32* in, u32 bug)) {
  SHARED(u32, staged, 32);
  grid_wait();
  staged[threadIdx.x] = in[threadIdx.x];
  if (bug != 1) __syncwarp();
  out[threadIdx.x] = staged[threadIdx.x ^ 1];
}

// Fills `words` words of dynamic shared memory. Bug 1: one more; bug 2: one before; bug 3: one past a static array.
KERNEL(32, 1, broken_bounds, (u32* out, u32 words, u32 bug)) {
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

// Two products in a row. Bug 1: lane 5 leaves out the second; bug 2: it ends before both.
KERNEL(32, 1, broken_mma, (float* out, u32 bug)) {
  grid_wait();
  float d[4] = {0, 0, 0, 0};
  if (bug == 2 && threadIdx.x == 5) return;
  mma_bf16(d, 0, 0, 0, 0, 0, 0);
  if (!(bug == 1 && threadIdx.x == 5)) mma_bf16(d, 0, 0, 0, 0, 0, 0);
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, d[0], 1);
}

// A barrier per thread, but bug 1: not for thread 40; bug 2: thread 40 waits at another one.
KERNEL(64, 1, broken_barrier, (u32* out, u32 bug)) {
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

// out[i] = i for i < count. Bug 1: the last one is forgotten; bug 2: one too many.
KERNEL(64, 1, broken_output, (u32* out, u32 count, u32 bug)) {
  grid_wait();
  for (u32 i = threadIdx.x; i < count - (bug == 1) + (bug == 2); i += 64) out[i] = i;
}

// out[i] = in[i], 16 bytes a thread by cp.async. Bug 1: no wait; bug 2: waits for the first of two groups only.
KERNEL(32, 1, broken_copy, (uint4* out, const uint4* in, u32 bug)) {
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

// out[m] = sum of in[m][0..256], each row by one warp's lanes. Bug 1: with more than one row, lanes take neighbouring
// elements instead of strided ones, so that the order of addition depends on the number of rows.
KERNEL(32, 1, broken_order, (float* out, const float* in, u32 rows, u32 bug)) {
  grid_wait();
  const u32 m = blockIdx.x, lane = threadIdx.x;
  float sum = 0;
  for (u32 i = 0; i < 8; i++) sum += in[m * 256 + (bug == 1 && rows > 1 ? lane * 8 + i : i * 32 + lane)];
  for (int flip = 16; flip > 0; flip /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, flip);
  if (lane == 0) out[m] = sum;
}

// Reads through wrappers. Bug 1: a misaligned 16-byte load; bug 2: an ordinary load before grid_wait; bug 3: a streaming
// load before it from memory that is not sealed; bug 4: no grid_wait at all; bug 5: a shuffle of half the warp.
KERNEL(32, 1, broken_rules, (uint4* out, const u8* in, u32 bug)) {
  uint4 v = make_uint4(0, 0, 0, 0);
  if (bug == 2) v = ld128(in);
  if (bug == 3) v = ld_stream(in);
  if (bug != 4) grid_wait();
  if (bug == 1) v = ld128(in + 8);
  if (bug == 5) v.x = __shfl_sync(0xffffu, v.x, 0);
  out[threadIdx.x] = v;
}

// The last block to come sums what all blocks left, in block order. Bug 1: it sums in order of arrival.
KERNEL(32, 1, broken_last, (float* out, float* partial, u32* counter, const float* in, u32 bug)) {
  SHARED(u32, ticket, 1);
  grid_wait();
  float mine = in[blockIdx.x * 32 + threadIdx.x];
  for (int flip = 16; flip > 0; flip /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, flip);
  if (threadIdx.x == 0) {
    if (bug == 1) {
      const u32 place = atomicAdd(counter + 1, 1u);
      st_cg(partial + place, mine);
    } else {
      st_cg(partial + blockIdx.x, mine);
    }
    __threadfence();
    ticket[0] = atomicAdd(counter, 1u);
  }
  __syncthreads();
  if (ticket[0] != gridDim.x - 1) return;
  float sum = 0;
  for (u32 i = 0; i < gridDim.x; i++) sum += ld_cg(partial + i);
  if (threadIdx.x == 0) out[0] = sum;
}

// Two threads' waits that never end look like this: bug 1 gives up.
KERNEL(32, 1, broken_trap, (u32* out, u32 bug)) {
  grid_wait();
  if (bug == 1 && threadIdx.x == 3) __trap();
  out[threadIdx.x] = 1;
}

// Bug 1: thread 40 writes 80 KB of its stack.
__device__ u32 deep(u32 i) {
  volatile u8 bytes[80000];
  for (u32 k = 0; k < 80000; k += 8) bytes[k] = u8(i);
  return bytes[i];
}
KERNEL(64, 1, broken_stack, (u32* out, u32 bug)) {
  grid_wait();
  out[threadIdx.x] = bug == 1 && threadIdx.x == 40 ? deep(0) : 0;
}

// out[64][256] = a[64][32] b[256][32] in two groups of products. Bugs, by number: see the lines.
KERNEL(128, 1, broken_wgmma, (float* out, const u16* a, const u16* b, u32 bug)) {
  DYNAMIC_SHARED(u8, memory);
  grid_wait();
  const u32 thread = threadIdx.x, warp = thread / 32, row = warp * 16 + thread % 32 / 4, t = thread % 4;
  // Per 16 k: 64 rows of a, 256 of b; 8 rows x 8 k in 128 bytes.
  constexpr u32 STAGE = 320 * 32, LEADING = 128, STRIDE = 256;
  for (u32 s = 0; s < 2; s++) {
    for (u32 i = thread; i < 320 * 2; i += 128) {
      const u32 r = i / 2, half = i % 2;
      const u16* from = r < 64 ? a + r * 32 : b + (r - 64) * 32;
      cp_async16(memory + s * STAGE + r / 8 * STRIDE + half * LEADING + r % 8 * 16, from + s * 16 + half * 8);
    }
    cp_async_commit();
  }
  if (bug == 1) fence_proxy_async();  // before the copies are there
  cp_async_wait<0>();
  if (bug != 1 && bug != 2) fence_proxy_async();  // 2: none
  if (bug != 3) __syncthreads();
  if (bug == 4 && warp == 3) return;  // before the others' products
  float sum[128];
  if (bug != 5) wgmma_fence();
  for (u32 s = 0; s < 2; s++) {
    const u32 at = shared_address(memory + s * STAGE), stride = bug == 6 && warp == 2 ? 512 : STRIDE;
    u64 left = descriptor(at, LEADING, stride, NO_SWIZZLE), right = descriptor(at + 2048, LEADING, STRIDE, NO_SWIZZLE);
    if (bug == 7) left = descriptor(at, 0, 1024, SWIZZLE_128);  // not at a multiple of 1024
    if (bug == 8) right = advance(right, 2 * STAGE);        // beyond shared memory
    wgmma_bf16(sum, left, right, s > 0);
    if (bug != 9) wgmma_commit();
  }
  if (bug == 10) sts128(memory + thread * 16, make_uint4(1, 2, 3, 4));  // what the products may not have read yet
  if (bug == 15 || bug == 16) {
    wgmma_wait<1>();
    __syncthreads();
    // 15: what the second group may not have read yet. 16: what the first has read, which is no bug.
    sts128(memory + (bug == 15 ? STAGE : 0) + thread * 16, make_uint4(1, 2, 3, 4));
  }
  if (bug == 11) sum[5] = 1;                                            // before the wait
  if (bug == 12) wgmma_wait<1>();                                       // one too few
  else if (bug != 13) wgmma_wait<0>();
  if (bug == 14) {
    sum[7] += 1;
    wgmma_bf16(sum, 0, 0, true);  // without another fence
  }
  for (u32 i = 0; i < 128; i++) st(out + (row + i / 2 % 2 * 8) * 256 + i / 4 * 8 + t * 2 + i % 2, sum[i]);
}
