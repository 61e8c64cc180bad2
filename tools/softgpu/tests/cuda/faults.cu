// Kernels with planted bugs; `bug` chooses one, 0 none. A comment marks the line that must be reported.
typedef unsigned int u32;

extern "C" __global__ void __launch_bounds__(64) memory(u32* out, const u32* in, u32 bug) {
  const u32 i = threadIdx.x;
  u32 v = in[i];
  if (bug == 1) v += in[i + 1];                                    // out of bounds
  if (bug == 2) v += *(const u32*)((const char*)in + 2);           // misaligned
  if (bug == 3) v += out[i];                                       // never written
  if (bug == 4) v += *(const u32*)(unsigned long long)(i * 4);     // null
  out[i] = v;
}

extern "C" __global__ void __launch_bounds__(64) staging(u32* out, const u32* in, u32 bug) {
  __shared__ u32 first[64], second[64];
  const u32 i = threadIdx.x;
  if (bug != 1 || i != 5) first[i] = in[i];
  if (bug != 2) __syncthreads();
  u32 v = first[i ^ 32];                                           // never written, or a race
  if (bug == 3) __syncwarp();
  if (bug == 4) first[i + 32 < 96 ? i + 32 : 0] = v;               // past the end
  second[bug == 5 ? i / 2 : i] = v;                                // two threads write one word
  __syncthreads();
  out[i] = second[i] + (bug == 6 ? first[i + 1] : 0);              // past the end
}

extern "C" __global__ void __launch_bounds__(32) exchange(u32* out, const u32* in, u32 bug) {
  __shared__ u32 words[32];
  const u32 i = threadIdx.x;
  words[i] = in[i];
  if (bug != 1) __syncwarp();
  u32 v = words[i ^ 1];                                            // a race within the warp
  if (bug == 2 && i == 3) return;
  if (bug == 3 && i < 16) v = __shfl_sync(0xffff0000u, v, 0);      // not in its own mask
  out[i] = __shfl_xor_sync(bug == 2 ? 0xfffffff7u : 0xffffffffu, v, 1);  // reads a lane that has returned
}

extern "C" __global__ void __launch_bounds__(64) barrier(u32* out, u32 bug) {
  const u32 i = threadIdx.x;
  if (bug == 1 && i == 40) {
    asm volatile("bar.sync 1;" : : : "memory");                    // one lane elsewhere
  } else {
    asm volatile("bar.sync 0;" : : : "memory");
  }
  if (bug == 2 && i >= 32) asm volatile("bar.sync 2;" : : : "memory");
  if (bug == 2 && i < 32) asm volatile("bar.sync 3;" : : : "memory");
  out[i] = i;
}

extern "C" __global__ void __launch_bounds__(32) copy(uint4* out, const uint4* in, u32 bug) {
  __shared__ uint4 staged[64];
  const u32 i = threadIdx.x;
  const u32 to = u32(__cvta_generic_to_shared(staged + i));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(to), "l"(in + i) : "memory");
  asm volatile("cp.async.commit_group;" : : : "memory");
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(to + 512), "l"(in + 32 + i), "r"(i < 16 ? 16 : 0) : "memory");
  asm volatile("cp.async.commit_group;" : : : "memory");
  if (bug == 0 || bug == 3) asm volatile("cp.async.wait_group 0;" : : : "memory");
  if (bug == 2) asm volatile("cp.async.wait_group 1;" : : : "memory");
  if (bug != 3) __syncthreads();
  out[i] = staged[i ^ 1];                                          // not waited for, or no barrier
  out[32 + i] = staged[32 + i];                                    // not waited for
}

extern "C" __global__ void __launch_bounds__(32) tensor(float* out, u32 bug) {
  float d[4] = {0, 0, 0, 0};
  const u32 one = 0x3f803f80;
  if (bug == 2 && threadIdx.x == 5) return;
  if (!(bug == 1 && threadIdx.x == 5)) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%4,%4}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(one));  // a lane is missing
  }
  __syncwarp();
  if (bug == 3 && threadIdx.x == 3) __trap();                      // trap
  out[threadIdx.x] = d[0] + d[3];
}

// Writes what the block before reads, and the other way round.
extern "C" __global__ void __launch_bounds__(32) neighbours(u32* data, u32* out, u32 bug) {
  const u32 i = blockIdx.x * 32 + threadIdx.x;
  if (bug == 1) out[i] = data[(i + 32) % (gridDim.x * 32)];        // races with the write of another block
  data[i] = i;
  if (bug == 2) data[0] = 1;                                       // all blocks write it
}

// Bug 1: reads its own output through the read-only path.
extern "C" __global__ void __launch_bounds__(32) constant(u32* out, const u32* in, u32 bug) {
  const u32 i = threadIdx.x;
  out[i] = i;
  __syncthreads();
  u32 v;
  asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(bug == 1 ? out + (i ^ 1) : in + i));  // written
  out[32 + i] = v;
}
