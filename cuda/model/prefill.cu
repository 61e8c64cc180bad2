// Linear layers of a prompt chunk: so many rows that products, not weight bytes, are the cost. The same packed weights and
// epilogues as the skinny kernels, two other main loops: by warps, for every card, and by warpgroups with wgmma (sm_90a).
//
// Computes: sum over k of in[m][k] W[n][k], then the layer's epilogue (epilogue.cuh).
// Work:     grid (blocks of TOKENS tokens, blocks of 128 packed rows), a ring of stages of 64 k, weights and activations by
//           cp.async. By warps: 128 tokens, 4 warps of 64 rows x 64 tokens. By warpgroups: 256 tokens, 2 of 64 rows each.
// Order:    k upwards in products of 16; nothing is split. The bits are not those of a skinny kernel that splits K, and
//           those of the two loops differ: inside a product wgmma adds in an order of its own.
// Bytes:    per block 256 K of weights and 2 K TOKENS of activations, from the second-level cache all but once.
// Needs:    as the skinny kernel of the same epilogue.
#include "model/epilogues.cuh"

namespace {

constexpr u32 STAGE_K = 64, WEIGHT_BYTES = BLOCK_ROWS * STAGE_K * 2;

// By warps, with mma.
struct Warps {
  static constexpr u32 THREADS = 128, TOKENS = 128, STAGES = 3;
  static constexpr u32 STAGE_BYTES = WEIGHT_BYTES + TOKENS * STAGE_K * 2;

  // Where a stage has the 16-byte chunk of k block t and row g of half a weight tile: the four k blocks of two rows, which
  // a phase of eight lanes reads, lie in eight different bank groups.
  static WRAPPER u32 weight_chunk(u32 t, u32 g) { return (t * 8 + (g ^ 2 * t)) * 16; }
  static WRAPPER u32 weights(u32 tile, u32 group) { return (tile * 2 + group) * 1024; }

  // The same for chunk c (0..8) of a token's 64 k, of which a phase reads four of two tokens.
  static WRAPPER u32 token_chunk(u32 token, u32 c) { return token * (STAGE_K * 2) + (c ^ token % 2 * 4) * 16; }
};

#ifdef WGMMA
// By warpgroups, with wgmma: weights are its matrix A without a swizzle, tokens its matrix B with that of 128 bytes, which
// copies of whole rows fill without bank conflicts.
struct Warpgroups {
  static constexpr u32 THREADS = 256, TOKENS = 256, STAGES = 4;
  static constexpr u32 STAGE_BYTES = WEIGHT_BYTES + TOKENS * STAGE_K * 2;

  // 32 k of all tiles, then the next 32: 8 rows x 8 k in 128 bytes, 128 bytes to the next 8 k, 512 to the next 8 rows.
  static WRAPPER u32 weight_chunk(u32 t, u32 g) { return (t * 8 + g) * 16; }
  static WRAPPER u32 weights(u32 tile, u32 group) { return (group * 8 + tile) * 1024; }
  static WRAPPER u64 weight_matrix(u32 stage, u32 warpgroup) {
    return matrix(stage + weights(warpgroup * 4, 0), 128, 512, NO_SWIZZLE);
  }

  static WRAPPER u32 token_chunk(u32 token, u32 c) { return token * (STAGE_K * 2) + (c ^ token % 8) * 16; }
  static WRAPPER u64 token_matrix(u32 stage) { return matrix(stage + WEIGHT_BYTES, 0, 1024, SWIZZLE_128); }
};
#endif

// Starts the copies of the stage that begins at column k: zeros beyond K, the packed rows and the tokens.
template <class Loop>
WRAPPER void fill(unsigned char* stage, const Linear& l, const u32* source, u32 weight_tile, u32 k) {
  const u32 groups = l.k / 32, tiles = (l.n + 15) / 16;
#pragma unroll 4
  for (u32 turn = 0; turn < WEIGHT_BYTES / 16 / Loop::THREADS; turn++) {
    const u32 i = turn * Loop::THREADS + threadIdx.x;
    const u32 piece = i % 64, group = i / 64 % 2, tile = i / 128;
    const bool there = weight_tile + tile < tiles && k / 32 + group < groups;
    const size_t from = there ? (size_t(weight_tile + tile) * groups + k / 32 + group) * 512 + piece * 8 : 0;
    unsigned char* to = stage + Loop::weights(tile, group) + piece / 32 * 512 + Loop::weight_chunk(piece / 8 % 4, piece % 8);
    cp_async16(to, l.weights + from, there);
  }
#pragma unroll 4
  for (u32 turn = 0; turn < Loop::TOKENS * 8 / Loop::THREADS; turn++) {
    const u32 i = turn * Loop::THREADS + threadIdx.x;
    const u32 token = i / 8, c = i % 8, from = lds(source + token);
    const bool there = from != NONE && k + c * 8 < l.k;
    unsigned char* to = stage + WEIGHT_BYTES + Loop::token_chunk(token, c);
    cp_async16(to, l.in + (there ? size_t(from) * l.k + k + c * 8 : 0), there);
  }
}

// What a block works on: fills in `tile`, the rows of `in` and the tokens' scales; false where there is nothing to do. By
// the whole block, a thread per token.
template <class Loop, class Epilogue>
WRAPPER bool begin(const Linear& l, Tile& tile, const Epilogue& epilogue, unsigned char* memory, u32* source, float* scale) {
  static_assert(Loop::TOKENS * TILE_PITCH * 4 <= Loop::STAGES * Loop::STAGE_BYTES, "the finished tile takes their place");
  static_assert(Loop::TOKENS <= Loop::THREADS, "a thread per token");
  grid_launch();
  grid_wait();
  if (l.num_active && ld(l.num_active) == 0) return false;
  tile.values = reinterpret_cast<const float*>(memory);
  tile.scale = scale;
  tile.token = blockIdx.x * Loop::TOKENS;
  tile.tokens = min(l.m - tile.token, Loop::TOKENS);
  tile.row = (l.first_block + blockIdx.y) * BLOCK_ROWS;
  const u32 row = tile.token + threadIdx.x;
  const bool mine = threadIdx.x < tile.tokens;
  u32 from = mine ? row : NONE;
  if (l.gather && mine) from = ld(l.gather + row);
  sts(source + threadIdx.x, !l.gather || from < l.in_rows ? from : NONE);
  sts(scale + threadIdx.x, mine && l.sumsq ? inverse_rms(l, row) : 1.0f);
  if (mine) prepare(epilogue, tile, threadIdx.x);
  __syncthreads();
  return true;
}

// Leaves this block's sums in `tile`; false where there is nothing to do. By the whole block of 128.
template <class Epilogue>
WRAPPER bool multiply(Warps, const Linear& l, Tile& tile, const Epilogue& epilogue) {
  typedef Warps Loop;
  DYNAMIC_SHARED(unsigned char, memory);
  SHARED(u32, source, Loop::TOKENS);
  SHARED(float, scale, Loop::TOKENS);
  if (!begin<Loop>(l, tile, epilogue, memory, source, scale)) return false;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const u32 first_tile = warp % 2 * 4, first_token = warp / 2 * 64;  // of this warp within the block

  float sum[4][8][4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 8; j++) sum[i][j][0] = sum[i][j][1] = sum[i][j][2] = sum[i][j][3] = 0;
  }
  const u32 stages = (l.k + STAGE_K - 1) / STAGE_K;
  for (u32 s = 0; s < Loop::STAGES - 1; s++) {
    if (s < stages) fill<Loop>(memory + s * Loop::STAGE_BYTES, l, source, tile.row / 16, s * STAGE_K);
    cp_async_commit();
  }
  for (u32 s = 0; s < stages; s++) {
    cp_async_wait<Loop::STAGES - 2>();
    __syncthreads();  // this stage is there for all, and all are done with the one to be filled
    const u32 ahead = s + Loop::STAGES - 1;
    unsigned char* next = memory + ahead % Loop::STAGES * Loop::STAGE_BYTES;
    if (ahead < stages) fill<Loop>(next, l, source, tile.row / 16, ahead * STAGE_K);
    cp_async_commit();
    const unsigned char* stage = memory + s % Loop::STAGES * Loop::STAGE_BYTES;
#pragma unroll
    for (u32 group = 0; group < 2; group++) {
      uint4 w[4][2];
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        const unsigned char* from_tile = stage + Loop::weights(first_tile + i, group) + Loop::weight_chunk(t, g);
        w[i][0] = lds128(from_tile), w[i][1] = lds128(from_tile + 512);
      }
#pragma unroll
      for (u32 j = 0; j < 8; j++) {
        const uint4 x = lds128(stage + WEIGHT_BYTES + Loop::token_chunk(first_token + j * 8 + g, group * 4 + t));
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          mma_bf16(sum[i][j], w[i][0].x, w[i][1].x, w[i][0].y, w[i][1].y, x.x, x.y);
          mma_bf16(sum[i][j], w[i][0].z, w[i][1].z, w[i][0].w, w[i][1].w, x.z, x.w);
        }
      }
    }
  }
  cp_async_wait_all();
  __syncthreads();  // the tile takes the place of the stages
#pragma unroll
  for (u32 j = 0; j < 8; j++) {
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      float* to = reinterpret_cast<float*>(memory) + (first_token + j * 8 + t * 2) * TILE_PITCH + (first_tile + i) * 16 + g;
      sts(to, sum[i][j][0]), sts(to + TILE_PITCH, sum[i][j][1]);
      sts(to + 8, sum[i][j][2]), sts(to + TILE_PITCH + 8, sum[i][j][3]);
    }
  }
  __syncthreads();
  return true;
}

#ifdef WGMMA
// The same by the whole block of 256. Products are asynchronous: those of a stage are started before the wait for those of
// the stage before, so that the tensor cores always have some. Of four stages, two are being multiplied, one is there or
// arriving, and one, whose products all are known to be done, is filled.
template <class Epilogue>
WRAPPER bool multiply(Warpgroups, const Linear& l, Tile& tile, const Epilogue& epilogue) {
  typedef Warpgroups Loop;
  DYNAMIC_SHARED(unsigned char, unaligned);
  SHARED(u32, source, Loop::TOKENS);
  SHARED(float, scale, Loop::TOKENS);
  // The swizzle goes by addresses: stages begin at multiples of 1024, for which the launch has room.
  unsigned char* memory = unaligned + (0u - shared_address(unaligned)) % 1024;
  if (!begin<Loop>(l, tile, epilogue, memory, source, scale)) return false;
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;

  float sum[128];
  const u32 stages = (l.k + STAGE_K - 1) / STAGE_K;
  for (u32 s = 0; s < 2; s++) {
    if (s < stages) fill<Loop>(memory + s * Loop::STAGE_BYTES, l, source, tile.row / 16, s * STAGE_K);
    cp_async_commit();
  }
  for (u32 s = 0; s < stages; s++) {
    cp_async_wait<1>();
    fence_proxy_async();
    __syncthreads();  // this stage is there for all, and all are done with the one before the last
    const u32 stage = shared_address(memory + s % Loop::STAGES * Loop::STAGE_BYTES);
    const u64 weights = Loop::weight_matrix(stage, warp / 4), tokens = Loop::token_matrix(stage);
    wgmma_fence();
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      // 16 k are two of a group's four blocks of weights, and 32 bytes of a token.
      wgmma_bf16(sum, advance(weights, i / 2 * 8192 + i % 2 * 256), advance(tokens, i * 32), s > 0 || i > 0);
    }
    wgmma_commit();
    const u32 ahead = s + 2;
    unsigned char* next = memory + ahead % Loop::STAGES * Loop::STAGE_BYTES;
    if (ahead < stages) fill<Loop>(next, l, source, tile.row / 16, ahead * STAGE_K);
    cp_async_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();  // no copies are left on their way: the last stage's were waited for
  __syncthreads();  // the tile takes the place of the stages
#pragma unroll
  for (u32 j = 0; j < 32; j++) {
    float* to = reinterpret_cast<float*>(memory) + (j * 8 + t * 2) * TILE_PITCH + warp * 16 + g;
    sts(to, sum[j * 4]), sts(to + TILE_PITCH, sum[j * 4 + 1]);
    sts(to + 8, sum[j * 4 + 2]), sts(to + TILE_PITCH + 8, sum[j * 4 + 3]);
  }
  __syncthreads();
  return true;
}
#endif

}  // namespace

#define PREFILL(name, kernel, Loop, per_sm)                                              \
  KERNEL(Loop::THREADS, per_sm, kernel, (LINEAR_PARAMETERS, PARAMETERS_##name)) {        \
    SHARED(Place, places, Loop::TOKENS);                                                 \
    const auto epilogue = EPILOGUE_##name;                                               \
    Tile tile;                                                                           \
    tile.places = places;                                                                \
    if (multiply(Loop{}, LINEAR, tile, epilogue)) finish(LINEAR, epilogue, tile);        \
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
