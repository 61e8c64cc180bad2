// Linear layers of a prompt chunk. It has enough rows to be bound by arithmetic, not by the bytes of the
// weights. Same packed weights and epilogues as the skinny kernels (linear.cuh), with two other main loops:
// mma by warps, for every GPU, and wgmma by warpgroups (sm_90a).
//
// Computes: sum over k of in[m][k] W[n][k], then the layer's epilogue (epilogues.cuh).
// Work:     grid (blocks of TOKENS tokens, blocks of 128 packed rows); a ring of stages of 64 inputs,
//           weights and activations loaded by cp.async. Warps: 128 tokens, 4 warps of 64 rows x 64 tokens,
//           96 KB of dynamic shared memory. Warpgroups: 256 tokens, 2 warpgroups of 64 rows x 256 tokens,
//           193 KB.
// Order:    ascending k in products of 16; K is not split. The bits differ from those of a skinny kernel that
//           splits K, and between the two loops: within a product wgmma adds in its own order.
// Bytes:    per block 256 K of weights and 2 K TOKENS of activations, all but the first read of each from L2.
// Preconditions: as the skinny kernel with the same epilogue.
#include "model/epilogues.cuh"

namespace {

constexpr u32 STAGE_K = 64, WEIGHT_BYTES = BLOCK_ROWS * STAGE_K * 2;

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

#ifdef WGMMA
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
#endif

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

#ifdef WGMMA
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
#endif

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
PREFILL(qkv, prefill_qkv, Warps, 2)
PREFILL(project, prefill_project, Warps, 2)
PREFILL(swiglu, prefill_swiglu, Warps, 2)
PREFILL(inject, prefill_inject, Warps, 2)
#ifdef WGMMA
PREFILL(qkv, prefill_qkv_wgmma, Warpgroups, 1)
PREFILL(project, prefill_project_wgmma, Warpgroups, 1)
PREFILL(swiglu, prefill_swiglu_wgmma, Warpgroups, 1)
PREFILL(inject, prefill_inject_wgmma, Warpgroups, 1)
#endif
