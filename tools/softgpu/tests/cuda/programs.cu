// Kernels of the kind that other projects have, for the tests. Compile with tests/cuda/make.sh.
typedef unsigned int u32;

// c = a b for n x n matrices, n a multiple of 16, in tiles of 16 x 16 through shared memory.
extern "C" __global__ void __launch_bounds__(256) matrix_product(float* c, const float* a, const float* b, u32 n) {
  __shared__ float left[16][16], right[16][17];
  const u32 x = threadIdx.x % 16, y = threadIdx.x / 16;
  const u32 row = blockIdx.x / (n / 16) * 16 + y, column = blockIdx.x % (n / 16) * 16 + x;
  float sum = 0;
  for (u32 k = 0; k < n; k += 16) {
    left[y][x] = a[row * n + k + x];
    right[y][x] = b[(k + y) * n + column];
    __syncthreads();
    for (u32 i = 0; i < 16; i++) sum = __fmaf_rn(left[y][i], right[i][x], sum);
    __syncthreads();
  }
  c[row * n + column] = sum;
}

// out[i] = in[0] + ... + in[i] for blocks of 256, each by itself.
extern "C" __global__ void __launch_bounds__(256) scan(u32* out, const u32* in, u32 count) {
  __shared__ u32 sums[8];
  const u32 i = blockIdx.x * 256 + threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  u32 v = i < count ? in[i] : 0;
  for (u32 step = 1; step < 32; step *= 2) {
    const u32 other = __shfl_up_sync(0xffffffffu, v, step);
    if (lane >= step) v += other;
  }
  if (lane == 31) sums[warp] = v;
  __syncthreads();
  for (u32 w = 0; w < warp; w++) v += sums[w];
  if (i < count) out[i] = v;
}

// counts[in[i] % 64]++, first in shared memory.
extern "C" __global__ void __launch_bounds__(128) histogram(u32* counts, const u32* in, u32 count) {
  __shared__ u32 own[64];
  if (threadIdx.x < 64) own[threadIdx.x] = 0;
  __syncthreads();
  for (u32 i = blockIdx.x * 128 + threadIdx.x; i < count; i += gridDim.x * 128) atomicAdd(&own[in[i] % 64], 1u);
  __syncthreads();
  if (threadIdx.x < 64 && own[threadIdx.x]) atomicAdd(counts + threadIdx.x, own[threadIdx.x]);
}

// The last block to arrive adds the sums of all blocks. Without `fence` nothing orders the sums before the arrival.
extern "C" __global__ void __launch_bounds__(32) total(u32* out, u32* sums, u32* arrived, const u32* in, u32 fence) {
  const u32 sum = __reduce_add_sync(0xffffffffu, in[blockIdx.x * 32 + threadIdx.x]);
  u32 ticket = 0;
  if (threadIdx.x == 0) {
    sums[blockIdx.x] = sum;
    if (fence) __threadfence();
    ticket = atomicAdd(arrived, 1u);
    __threadfence();
    if (ticket == gridDim.x - 1) {
      u32 all = 0;
      for (u32 i = 0; i < gridDim.x; i++) all += sums[i];
      out[0] = all;
    }
  }
}

// Block 0 waits for a flag that the last block sets.
extern "C" __global__ void __launch_bounds__(32) wait_for_last(u32* out, u32* flag) {
  if (threadIdx.x == 0) {
    if (blockIdx.x == gridDim.x - 1) {
      out[1] = 7;
      __threadfence();
      atomicExch(flag, 1u);
    } else if (blockIdx.x == 0) {
      while (atomicAdd(flag, 0u) == 0) {}
      __threadfence();
      out[0] = out[1];
    }
  }
}

// Lanes of a warp that wait for each other in a loop: lane 31 sets what the others wait for.
extern "C" __global__ void __launch_bounds__(32) wait_in_warp(u32* out, u32* flag) {
  if (threadIdx.x == 31) {
    atomicExch(flag, 1u);
  } else {
    while (atomicAdd(flag, 0u) == 0) {}
  }
  out[threadIdx.x] = threadIdx.x;
}

// out[i] = in[i] + 1; a chain of these with programmatic dependent launch. Bug 1: reads before it waits.
extern "C" __global__ void __launch_bounds__(32) dependent(u32* out, const u32* in, u32 bug) {
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
  u32 v = 0;
  if (bug == 1) v = ((volatile const u32*)in)[blockIdx.x * 32 + threadIdx.x];
  asm volatile("griddepcontrol.wait;" : : : "memory");
  if (bug != 1) v = ((volatile const u32*)in)[blockIdx.x * 32 + threadIdx.x];
  out[blockIdx.x * 32 + threadIdx.x] = v + 1;
}

// As `total`, for four warps: every thread fences, the last block also resets the counter for the next launch.
extern "C" __global__ void __launch_bounds__(128) arrivals(u32* out, u32* parts, u32* arrived, const u32* in) {
  __shared__ u32 ticket;
  const u32 i = threadIdx.x;
  parts[blockIdx.x * 128 + i] = in[blockIdx.x * 128 + i] * 2;
  __threadfence();
  __syncthreads();
  if (i == 0) {
    ticket = atomicAdd(arrived, 1u);
    __threadfence();
  }
  __syncthreads();
  if (ticket != gridDim.x - 1) return;
  if (i == 0) *arrived = 0;
  u32 sum = 0;
  for (u32 b = 0; b < gridDim.x; b++) sum += parts[b * 128 + i];
  out[i] = sum;
}
