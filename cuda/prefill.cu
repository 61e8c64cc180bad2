// Linear layers of a prompt chunk: so many rows that products, not weight bytes, are the cost. The same packed weights and
// epilogues as the skinny kernels, another main loop.
//
// Computes: sum over k of in[m][k] W[n][k], then the layer's epilogue (epilogue.cuh).
// Work:     grid (blocks of 128 tokens, blocks of 128 packed rows), 4 warps of 64 rows x 64 tokens; a ring of three stages of
//           64 k, weights and activations by cp.async.
// Order:    k upwards in products of 16; nothing is split. The bits are not those of a skinny kernel that splits K.
// Bytes:    per block 256 K of weights and 256 K of activations, from the second-level cache all but once.
// Needs:    as the skinny kernel of the same epilogue.
#include "epilogue.cuh"

namespace {

constexpr u32 TOKENS = 128, STAGE_K = 64, STAGES = 3;
constexpr u32 WEIGHT_BYTES = BLOCK_ROWS * STAGE_K * 2, STAGE_BYTES = WEIGHT_BYTES + TOKENS * STAGE_K * 2;
static_assert(TOKENS * TILE_PITCH * 4 <= STAGES * STAGE_BYTES, "the finished tile takes the stages' place");

// Where a stage has the 16-byte chunk of k block t and row g of half a weight tile: the four k blocks of two rows, which a
// phase of eight lanes reads, lie in eight different bank groups.
WRAPPER u32 weight_chunk(u32 t, u32 g) { return (t * 8 + (g ^ 2 * t)) * 16; }

// The same for chunk c (0..8) of a token's 64 k, of which a phase reads four of two tokens.
WRAPPER u32 token_chunk(u32 token, u32 c) { return token * (STAGE_K * 2) + (c ^ token % 2 * 4) * 16; }

// Starts the copies of the stage that begins at column k: zeros beyond K, the packed rows and the tokens.
WRAPPER void fill(unsigned char* stage, const Linear& l, const u32* source, u32 weight_tile, u32 k) {
  const u32 groups = l.k / 32, tiles = (l.n + 15) / 16;
#pragma unroll 4
  for (u32 i = threadIdx.x; i < WEIGHT_BYTES / 16; i += 128) {
    const u32 piece = i % 64, group = i / 64 % 2, tile = i / 128;
    const bool there = weight_tile + tile < tiles && k / 32 + group < groups;
    const size_t from = there ? (size_t(weight_tile + tile) * groups + k / 32 + group) * 512 + piece * 8 : 0;
    unsigned char* to = stage + (tile * 2 + group) * 1024 + piece / 32 * 512 + weight_chunk(piece / 8 % 4, piece % 8);
    cp_async16(to, l.weights + from, there);
  }
#pragma unroll 4
  for (u32 i = threadIdx.x; i < TOKENS * 8; i += 128) {
    const u32 token = i / 8, c = i % 8, from = lds(source + token);
    const bool there = from != NONE && k + c * 8 < l.k;
    cp_async16(stage + WEIGHT_BYTES + token_chunk(token, c), l.in + (there ? size_t(from) * l.k + k + c * 8 : 0), there);
  }
}

// Leaves this block's sums in `tile`; false where there is nothing to do. By the whole block of 128.
template <class Epilogue>
WRAPPER bool multiply(const Linear& l, Tile& tile, const Epilogue& epilogue) {
  DYNAMIC_SHARED(unsigned char, memory);
  SHARED(u32, source, TOKENS);
  SHARED(float, scale, TOKENS);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const u32 first_tile = warp % 2 * 4, first_token = warp / 2 * 64;  // of this warp within the block
  const u32 block = l.first_block + blockIdx.y;
  grid_launch();
  grid_wait();
  if (l.live && ld(l.live) == 0) return false;
  tile.values = reinterpret_cast<const float*>(memory);
  tile.scale = scale;
  tile.token = blockIdx.x * TOKENS;
  tile.tokens = min(l.m - tile.token, TOKENS);
  tile.row = block * BLOCK_ROWS;
  const u32 row = tile.token + threadIdx.x;
  const bool mine = threadIdx.x < tile.tokens;
  u32 from = mine ? row : NONE;
  if (l.gather && mine) from = ld(l.gather + row);
  sts(source + threadIdx.x, !l.gather || from < l.in_rows ? from : NONE);
  sts(scale + threadIdx.x, mine && l.sumsq ? inverse_rms(l, row) : 1.0f);
  if (mine) prepare(epilogue, tile, threadIdx.x);
  __syncthreads();

  float sum[4][8][4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
#pragma unroll
    for (int j = 0; j < 8; j++) sum[i][j][0] = sum[i][j][1] = sum[i][j][2] = sum[i][j][3] = 0;
  }
  const u32 stages = (l.k + STAGE_K - 1) / STAGE_K;
  for (u32 s = 0; s < STAGES - 1; s++) {
    if (s < stages) fill(memory + s * STAGE_BYTES, l, source, block * 8, s * STAGE_K);
    cp_async_commit();
  }
  for (u32 s = 0; s < stages; s++) {
    cp_async_wait<STAGES - 2>();
    __syncthreads();  // this stage is there for all, and all are done with the one to be filled
    const u32 ahead = s + STAGES - 1;
    if (ahead < stages) fill(memory + ahead % STAGES * STAGE_BYTES, l, source, block * 8, ahead * STAGE_K);
    cp_async_commit();
    const unsigned char* stage = memory + s % STAGES * STAGE_BYTES;
#pragma unroll
    for (u32 group = 0; group < 2; group++) {
      uint4 w[4][2];
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        const unsigned char* from_tile = stage + ((first_tile + i) * 2 + group) * 1024 + weight_chunk(t, g);
        w[i][0] = lds128(from_tile), w[i][1] = lds128(from_tile + 512);
      }
#pragma unroll
      for (u32 j = 0; j < 8; j++) {
        const uint4 x = lds128(stage + WEIGHT_BYTES + token_chunk(first_token + j * 8 + g, group * 4 + t));
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

}  // namespace

#define PREFILL(name)                                                            \
  KERNEL(128, 2, prefill_##name, (LINEAR_PARAMETERS, PARAMETERS_##name)) {       \
    SHARED(Place, places, TOKENS);                                               \
    const auto epilogue = EPILOGUE_##name;                                       \
    Tile tile;                                                                   \
    tile.places = places;                                                        \
    if (multiply(LINEAR, tile, epilogue)) finish(LINEAR, epilogue, tile);        \
  }
PREFILL(qkv)
PREFILL(project)
PREFILL(swiglu)
PREFILL(inject)
