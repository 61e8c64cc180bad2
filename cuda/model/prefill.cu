// Linear layers of a prompt chunk with mma by warps: prefill.cuh. A block of 128 tokens has 4 warps of 64
// rows x 64 tokens and 96 KB of dynamic shared memory.
#include "model/prefill.cuh"

namespace {

// Layout of a stage for mma by warps.
struct Warps {
  static constexpr u32 THREADS = 128, TOKENS = 128, STAGES = 3;
  static constexpr u32 STAGE_BYTES = WEIGHT_BYTES + TOKENS * STAGE_K * 2;

  // Byte offset, within half a weight tile, of the 16-byte chunk of k block t and row g. Eight lanes read the
  // four k blocks of two rows at a time; these lie in eight different bank groups.
  static DEVICE u32 weight_chunk(u32 t, u32 g) { return (t * 8 + (g ^ 2 * t)) * 16; }
  // Byte offset of a weight tile's group of 32 inputs.
  static DEVICE u32 weights(u32 tile, u32 group) { return (tile * 2 + group) * 1024; }

  // Byte offset of chunk c (0..8) of a token's 64 inputs. Eight lanes read four chunks of two tokens at a
  // time.
  static DEVICE u32 token_chunk(u32 token, u32 c) {
    return token * (STAGE_K * 2) + (c ^ token % 2 * 4) * 16;
  }
};

// Main loop with mma, called by the whole block of 128 threads. Computes the block's sums into `tile`;
// returns false if there is nothing to do.
template <class Epilogue>
DEVICE bool multiply(Warps, const Linear& l, Tile& tile, const Epilogue& epilogue) {
  typedef Warps Loop;
  unsigned char* memory = dynamic_shared;
  __shared__ u32 source_rows[Loop::TOKENS];
  __shared__ float scale[Loop::TOKENS];
  if (!begin_tile<Loop>(l, tile, epilogue, memory, source_rows, scale)) return false;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const u32 first_tile = warp % 2 * 4, first_token = warp / 2 * 64;  // this warp's, within the block

  float sum[4][8][4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 8; j++) sum[i][j][0] = sum[i][j][1] = sum[i][j][2] = sum[i][j][3] = 0;
  }
  const u32 stages = (l.k + STAGE_K - 1) / STAGE_K;
  for (u32 s = 0; s < Loop::STAGES - 1; s++) {
    if (s < stages) {
      load_stage<Loop>(memory + s * Loop::STAGE_BYTES, l, source_rows, tile.row / 16, s * STAGE_K);
    }
    cp_async_commit();
  }
  for (u32 s = 0; s < stages; s++) {
    cp_async_wait<Loop::STAGES - 2>();
    __syncthreads();  // this stage is complete, and all warps have finished with the one to load next
    const u32 ahead = s + Loop::STAGES - 1;
    unsigned char* next = memory + ahead % Loop::STAGES * Loop::STAGE_BYTES;
    if (ahead < stages) load_stage<Loop>(next, l, source_rows, tile.row / 16, ahead * STAGE_K);
    cp_async_commit();
    const unsigned char* stage = memory + s % Loop::STAGES * Loop::STAGE_BYTES;
#pragma unroll
    for (u32 group = 0; group < 2; group++) {
      uint4 w[4][2];
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        const unsigned char* from_tile =
            stage + Loop::weights(first_tile + i, group) + Loop::weight_chunk(t, g);
        w[i][0] = as<uint4>(from_tile), w[i][1] = as<uint4>(from_tile + 512);
      }
#pragma unroll
      for (u32 j = 0; j < 8; j++) {
        const u32 token = first_token + j * 8 + g;
        const uint4 x = as<uint4>(stage + WEIGHT_BYTES + Loop::token_chunk(token, group * 4 + t));
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          mma_bf16(sum[i][j], w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y, x.x, x.y);
          mma_bf16(sum[i][j], w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w, x.z, x.w);
        }
      }
    }
  }
  cp_async_wait_all();
  __syncthreads();  // the result tile overwrites the stages
#pragma unroll
  for (u32 j = 0; j < 8; j++) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      const u32 token = first_token + j * 8 + t * 2;
      float* to = reinterpret_cast<float*>(memory) + token * TILE_PITCH + (first_tile + i) * 16 + g;
      to[0] = sum[i][j][0], to[TILE_PITCH] = sum[i][j][1];
      to[8] = sum[i][j][2], to[TILE_PITCH + 8] = sum[i][j][3];
    }
  }
  __syncthreads();
  return true;
}

}  // namespace

PREFILL(qkv, prefill_qkv, Warps, 2)
PREFILL(project, prefill_project, Warps, 2)
PREFILL(swiglu, prefill_swiglu, Warps, 2)
PREFILL(inject, prefill_inject, Warps, 2)
PREFILL(plain, prefill_plain, Warps, 2)
