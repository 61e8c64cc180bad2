// Linear layers of a prompt chunk with wgmma by warpgroups: prefill.cuh. A block of 256 tokens has 2
// warpgroups of 64 rows x 256 tokens and 193 KB of dynamic shared memory. For sm_90a only (build.rs).
#include "model/prefill.cuh"

namespace {

// Layout of a stage for wgmma by warpgroups. Weights are matrix A without swizzle. Tokens are matrix B with
// the 128-byte swizzle, which copies of whole rows fill without bank conflicts.
struct Warpgroups {
  static constexpr u32 THREADS = 256, TOKENS = 256, STAGES = 4;
  static constexpr u32 STAGE_BYTES = WEIGHT_BYTES + TOKENS * STAGE_K * 2;

  // 32 inputs of all tiles, then the next 32. 8 rows x 8 inputs occupy 128 bytes; the next 8 inputs are 128
  // bytes further, the next 8 rows 512 bytes.
  static DEVICE u32 weight_chunk(u32 t, u32 g) { return (t * 8 + g) * 16; }
  static DEVICE u32 weights(u32 tile, u32 group) { return (group * 8 + tile) * 1024; }
  static DEVICE u64 weight_matrix(u32 stage, u32 warpgroup) {
    return descriptor(stage + weights(warpgroup * 4, 0), 128, 512, NO_SWIZZLE);
  }

  static DEVICE u32 token_chunk(u32 token, u32 c) { return token * (STAGE_K * 2) + (c ^ token % 8) * 16; }
  static DEVICE u64 token_matrix(u32 stage) {
    return descriptor(stage + WEIGHT_BYTES, 0, 1024, SWIZZLE_128);
  }
};

// Main loop with wgmma, called by the whole block of 256 threads. Products are asynchronous: those of a stage
// start before the wait for those of the previous stage, so that the tensor cores always have work. Step s
// uses the four stages at once: products of s - 1 and s run, s + 1 has arrived or is in flight, and s + 2
// is loaded in place of s - 2, whose products have finished.
template <class Epilogue>
DEVICE bool multiply(Warpgroups, const Linear& l, Tile& tile, const Epilogue& epilogue) {
  typedef Warpgroups Loop;
  __shared__ u32 source_rows[Loop::TOKENS];
  __shared__ float scale[Loop::TOKENS];
  // The swizzle depends on the address, so stages start at multiples of 1024; the launch allocates the
  // padding.
  unsigned char* memory = dynamic_shared + (0u - shared_address(dynamic_shared)) % 1024;
  if (!begin_tile<Loop>(l, tile, epilogue, memory, source_rows, scale)) return false;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

  float sum[128];
  const u32 stages = (l.k + STAGE_K - 1) / STAGE_K;
  for (u32 s = 0; s < 2; s++) {
    if (s < stages) {
      load_stage<Loop>(memory + s * Loop::STAGE_BYTES, l, source_rows, tile.row / 16, s * STAGE_K);
    }
    cp_async_commit();
  }
  for (u32 s = 0; s < stages; s++) {
    cp_async_wait<1>();
    fence_proxy_async();
    __syncthreads();  // this stage is complete, and all warps have finished with stage s - 2
    const u32 stage = shared_address(memory + s % Loop::STAGES * Loop::STAGE_BYTES);
    const u64 weights = Loop::weight_matrix(stage, warp / 4), tokens = Loop::token_matrix(stage);
    wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      // 16 inputs are two of the four k blocks of a group of weights, and 32 bytes of a token.
      wgmma_bf16(sum, advance(weights, i / 2 * 8192 + i % 2 * 256), advance(tokens, i * 32), s > 0 || i > 0);
    }
    wgmma_commit();
    const u32 ahead = s + 2;
    unsigned char* next = memory + ahead % Loop::STAGES * Loop::STAGE_BYTES;
    if (ahead < stages) load_stage<Loop>(next, l, source_rows, tile.row / 16, ahead * STAGE_K);
    cp_async_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();  // no copies are in flight: the loop waited for those of the last stage
  __syncthreads();  // the result tile overwrites the stages
#pragma unroll
  for (u32 j = 0; j < 32; j++) {
    float* to = reinterpret_cast<float*>(memory) + (j * 8 + t * 2) * TILE_PITCH + warp * 16 + g;
    to[0] = sum[j * 4], to[TILE_PITCH] = sum[j * 4 + 1];
    to[8] = sum[j * 4 + 2], to[TILE_PITCH + 8] = sum[j * 4 + 3];
  }
  __syncthreads();
  return true;
}

}  // namespace

PREFILL(qkv, prefill_qkv_wgmma, Warpgroups, 1)
PREFILL(project, prefill_project_wgmma, Warpgroups, 1)
PREFILL(swiglu, prefill_swiglu_wgmma, Warpgroups, 1)
PREFILL(inject, prefill_inject_wgmma, Warpgroups, 1)
PREFILL(plain, prefill_plain_wgmma, Warpgroups, 1)
