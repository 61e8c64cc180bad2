// Linear layers of a prompt chunk. It has enough rows to be bound by arithmetic, not by the bytes of the
// weights. Same packed weights and epilogues as the skinny kernels (linear.cuh), with two other main loops:
// mma by warps, for every GPU (prefill.cu), and wgmma by warpgroups, for sm_90a (prefill_wgmma.cu). This file
// holds what they share.
//
// Computes: sum over k of in[m][k] W[n][k], then the layer's epilogue (epilogues.cuh).
// Work:     grid (blocks of TOKENS tokens, blocks of 128 packed rows); a ring of stages of 64 inputs,
//           weights and activations loaded by cp.async.
// Order:    ascending k in products of 16; K is not split. The bits differ from those of a skinny kernel that
//           splits K, and between the two loops: within a product wgmma adds in its own order.
// Bytes:    per block 256 K of weights and 2 K TOKENS of activations, all but the first read of each from L2.
// Preconditions: as the skinny kernel with the same epilogue.
#pragma once
#include "model/epilogues.cuh"

namespace {

constexpr u32 STAGE_K = 64, WEIGHT_BYTES = BLOCK_ROWS * STAGE_K * 2;

// Starts the copies of the stage that begins at column k. Everything beyond K, the packed rows or the tokens
// becomes zeros.
template <class Loop>
DEVICE void load_stage(unsigned char* stage,    // [STAGE_BYTES], shared memory
                       const Linear& l,
                       const u32* source_rows,  // [TOKENS] rows of l.in or NONE, shared memory
                       u32 weight_tile, u32 k) {
  const u32 groups = l.k / 32, tiles = (l.n + 15) / 16;
#pragma unroll 4
  for (u32 turn = 0; turn < WEIGHT_BYTES / 16 / Loop::THREADS; turn++) {
    const u32 i = turn * Loop::THREADS + threadIdx.x;
    const u32 chunk = i % 64, group = i / 64 % 2, tile = i / 128;
    const bool valid = weight_tile + tile < tiles && k / 32 + group < groups;
    const size_t from = valid ? (size_t(weight_tile + tile) * groups + k / 32 + group) * 512 + chunk * 8 : 0;
    unsigned char* to = stage + Loop::weights(tile, group) + chunk / 32 * 512 +
                        Loop::weight_chunk(chunk / 8 % 4, chunk % 8);
    cp_async16(to, l.weights + from, valid);
  }
#pragma unroll 4
  for (u32 turn = 0; turn < Loop::TOKENS * 8 / Loop::THREADS; turn++) {
    const u32 i = turn * Loop::THREADS + threadIdx.x;
    const u32 token = i / 8, c = i % 8, from = source_rows[token];
    const bool valid = from != NONE && k + c * 8 < l.k;
    unsigned char* to = stage + WEIGHT_BYTES + Loop::token_chunk(token, c);
    cp_async16(to, l.in + (valid ? size_t(from) * l.k + k + c * 8 : 0), valid);
  }
}

// Sets up the block's work, called by the whole block, one thread per token: fills `tile`, `source_rows` and
// `scale`. Returns false if there is nothing to do.
template <class Loop, class Epilogue>
DEVICE bool begin_tile(const Linear& l, Tile& tile, const Epilogue& epilogue,
                       unsigned char* memory,  // [STAGES][STAGE_BYTES], later the result tile, shared memory
                       u32* source_rows,       // [TOKENS] rows of l.in or NONE, shared memory
                       float* scale) {         // [TOKENS] 1 / rms, shared memory
  static_assert(Loop::TOKENS * TILE_PITCH * 4 <= Loop::STAGES * Loop::STAGE_BYTES,
                "the result tile overwrites the stages");
  static_assert(Loop::TOKENS <= Loop::THREADS, "one thread per token");
  grid_launch();
  grid_wait();
  if (l.num_active && *l.num_active == 0) return false;
  tile.values = reinterpret_cast<const float*>(memory);
  tile.scale = scale;
  tile.token = blockIdx.x * Loop::TOKENS;
  tile.tokens = min(l.m - tile.token, Loop::TOKENS);
  tile.row = (l.first_block + blockIdx.y) * BLOCK_ROWS;
  const u32 row = tile.token + threadIdx.x;
  const bool has_token = threadIdx.x < tile.tokens;
  u32 from = has_token ? row : NONE;
  if (l.gather && has_token) from = l.gather[row];
  source_rows[threadIdx.x] = !l.gather || from < l.in_rows ? from : NONE;
  scale[threadIdx.x] = has_token && l.sumsq ? inverse_rms(l, row) : 1.0f;
  if (has_token) prepare_token(epilogue, tile, threadIdx.x);
  __syncthreads();
  return true;
}

}  // namespace

// `Linear` and the epilogue's struct document the shape of every parameter.
#define PREFILL(name, kernel, Loop, per_sm)                                               \
  extern "C" __global__ void __launch_bounds__(Loop::THREADS, per_sm)                     \
  kernel(LINEAR_PARAMETERS, PARAMETERS_##name) {                                          \
    __shared__ KvSlot kv_slots[Loop::TOKENS];                                             \
    const auto epilogue = EPILOGUE_##name;                                                \
    Tile tile;                                                                            \
    tile.kv_slots = kv_slots;                                                             \
    if (multiply(Loop{}, LINEAR, tile, epilogue)) apply_epilogue(LINEAR, epilogue, tile); \
  }
