// The skinny product of every linear layer, y[m][n] = sum over k of x[m][k] W[n][k]: 1 to 128 rows in one read of W.
//
// A block owns 128 packed rows of W, a warp 16 of them, all warps the same slice of K. Weights are the A operand and go
// from global memory to registers, some groups of 32 k ahead, the first of them before grid_wait; activations are the B
// operand, staged in shared memory chunk by chunk. The order of k inside a group is free as long as both sides agree: a
// lane owns eight neighbours, 16 bytes of either side, which are its operands of two products.
//
// Order: k upwards in products of 16, then the slices of K in ascending order. Both are functions of N and K alone, and
// NT, the number of 8-token tiles, never touches what happens inside a column: a row's bits do not depend on others.
#pragma once
#include "common/rows.cuh"

#define BLOCK_ROWS 128  // packed rows of W per block
#define TILE_PITCH 132  // words from token to token in the finished tile: conflict-free to write and to read
#define MAX_SPLITS 8

// What a linear kernel takes, whatever its epilogue.
struct Linear {
  const u16* weights;   // [ceil(n / 16)][k / 32][half 2][kblock 4][row 8][8] bf16, rows beyond n zero; sealed
  const u16* in;        // [m][k] bf16; with GATHER [in_rows][k]
  const u32* gather;    // with GATHER: [m] rows of `in`, zeros where there is no such row
  const float* sumsq;   // [m][ceil(k / 128)] partial sums of squares of what `in` was made from, or null: no norm
  float4* partial;      // [passes][blocks][splits][warp 8][8-token tile][lane 32], unused where grid.y is 1
  u32* counters;        // [passes][blocks], zero, and zero again afterwards
  const u32* num_active;      // 0: there is nothing to do; or null
  u32 m, n, k;          // rows, outputs, inputs
  u32 slice;            // groups of 32 k per slice
  u32 in_rows;          // rows of `in`, with GATHER
  u32 first_block;      // blocks of packed rows left out before the first
  float eps;            // of the norm
};
#define LINEAR_PARAMETERS                                                                                       \
  const u16 *weights, const u16 *in, const u32 *gather, const float *sumsq, float4 *partial, u32 *counters,     \
      const u32 *num_active, u32 m, u32 n, u32 k, u32 slice, u32 in_rows, u32 first_block, float eps
#define LINEAR \
  Linear { weights, in, gather, sumsq, partial, counters, num_active, m, n, k, slice, in_rows, first_block, eps }

// Where a row's query, key and value go; NONE: nowhere.
struct __align__(16) Place {
  u32 position, query, page, slot;
};

// What a block hands to its epilogue: 128 columns, which are packed rows of W, for some tokens.
struct Tile {
  const float* values;  // [tokens][TILE_PITCH] sums, shared memory
  const float* scale;   // [tokens] 1 / rms of the token's input, shared memory
  Place* places;        // [tokens] what `prepare` of the qkv epilogue left, shared memory
  u32 token, tokens;    // first row of the pass, how many
  u32 row;              // packed row of column 0
};

// Columns 4 lane.. of a token.
WRAPPER float4 columns(const Tile& tile, u32 token) {
  return lds(reinterpret_cast<const float4*>(tile.values + token * TILE_PITCH) + threadIdx.x % 32);
}

// How much of K a chunk of staged activations holds, how far ahead weights are loaded, and what that takes of shared
// memory. Two blocks fit an SM up to 4 tiles, one with more. A chunk is short because the first one is waited for.
template <int NT>
struct Staging {
  static constexpr u32 CHUNK = NT <= 8 ? 512 : 256;
  static constexpr u32 GROUPS = CHUNK / 32;
  static constexpr u32 PITCH = CHUNK * 2 + 64;  // bytes; 64 mod 128 keeps 16-byte reads of eight rows free of conflicts
  static constexpr u32 BYTES = NT * 8 * PITCH;
  // Groups: 64 KB in flight per SM, 32 KB with 16 tiles, where 8 groups would spill.
  static constexpr int AHEAD = NT == 8 ? 8 : 4;
};

// Starts the copies of one chunk: `groups` groups of 32 k from column `k` on. Row r is source[r], or, without it, the
// tile's r-th token.
template <int NT>
WRAPPER void stage(unsigned char* to, const Linear& l, const u32* source, const Tile& tile, u32 k, u32 groups) {
  typedef Staging<NT> S;
  constexpr u32 PIECES = S::CHUNK / 8, STEP = 256 / PIECES;
  static_assert(256 % PIECES == 0 && NT * 8 % STEP == 0, "a thread keeps its column and has whole turns");
  const u32 piece = threadIdx.x % PIECES, first = threadIdx.x / PIECES;
  if (piece < groups * 4) {
    const u16* from = l.in + k + piece * 8;
    to += first * S::PITCH + piece * 16;
#pragma unroll 2
    for (u32 i = first; i < NT * 8; i += STEP) {
      const u32 row = source ? lds(source + i) : tile.token + i;
      cp_async16(to, from + size_t(row) * l.k, source ? row != NONE : i < tile.tokens);
      to += STEP * S::PITCH;
    }
  }
  cp_async_commit();
}

// 1 / rms of a row's input from its partial sums of squares, added upwards.
WRAPPER float inverse_rms(const Linear& l, u32 row) {
  const u32 parts = (l.k + 127) / 128;
  const float* from = l.sumsq + size_t(row) * parts;
  float sum = 0;
  for (u32 base = 0; base < parts; base += 32) {
    // 32 loads on their way at once; a load at a time would hold up the first product.
    float part[32];
#pragma unroll
    for (u32 i = 0; i < 32; i++) {
      part[i] = 0;
      if (base + i < parts) part[i] = ld(from + base + i);
    }
#pragma unroll
    for (u32 i = 0; i < 32; i++) {
      if (base + i < parts) sum += part[i];
    }
  }
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, float(l.k)), l.eps)));
}

// Most epilogues need nothing prepared.
template <class Epilogue>
WRAPPER void prepare(const Epilogue&, const Tile&, u32) {}

// Leaves this block's sums in `tile`; false where this block has no epilogue to run. By the whole block of 256. While
// the first activations are on their way, one thread per token calls prepare(epilogue, tile, token of the tile).
template <int NT, bool GATHER, class Epilogue>
WRAPPER bool multiply(const Linear& l, Tile& tile, const Epilogue& epilogue) {
  typedef Staging<NT> S;
  constexpr int U = S::AHEAD;
  DYNAMIC_SHARED(unsigned char, memory);
  SHARED(u32, gathered, NT * 8);
  SHARED(float, scale, NT * 8);
  SHARED(u32, arrived, 1);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const u32 block = l.first_block + blockIdx.x, weight_tile = block * 8 + warp;
  const u32 first = blockIdx.y * l.slice, groups = min(l.slice, l.k / 32 - first);
  const bool active = weight_tile < (l.n + 15) / 16;  // this warp has rows of W
  const u16* w = l.weights + (size_t(weight_tile) * (l.k / 32) + first) * 512 + t * 64 + g * 8;

  grid_launch();
  uint4 ring[U][2];
#pragma unroll
  for (int u = 0; u < U; u++) ring[u][0] = ring[u][1] = make_uint4(0, 0, 0, 0);
  // Two branches, or ptxas would move guarded loads behind the wait.
  if (active && groups >= U) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      ring[u][0] = ld_stream(w + u * 512);
      ring[u][1] = ld_stream(w + u * 512 + 256);
    }
  } else if (active) {
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (u >= int(groups)) break;
      ring[u][0] = ld_stream(w + u * 512);
      ring[u][1] = ld_stream(w + u * 512 + 256);
    }
  }
  grid_wait();

  const u32 num_active = l.num_active ? ld(l.num_active) : 1;  // looked at once the first activations are on their way
  tile.values = reinterpret_cast<const float*>(memory);
  tile.scale = scale;
  tile.token = blockIdx.z * NT * 8;
  tile.tokens = min(l.m - tile.token, u32(NT * 8));
  tile.row = block * BLOCK_ROWS;
  if (GATHER) {
    if (threadIdx.x < NT * 8) {
      const u32 row = threadIdx.x < tile.tokens ? ld(l.gather + tile.token + threadIdx.x) : NONE;
      sts(gathered + threadIdx.x, row < l.in_rows ? row : NONE);
    }
    __syncthreads();
  }
  const u32* source = GATHER ? gathered : nullptr;
  stage<NT>(memory, l, source, tile, first * 32, min(groups, S::GROUPS));
  if (threadIdx.x < NT * 8) {
    const bool normed = l.sumsq && threadIdx.x < tile.tokens;
    sts(scale + threadIdx.x, normed ? inverse_rms(l, tile.token + threadIdx.x) : 1.0f);
  }
  if (threadIdx.x >= 128 && threadIdx.x - 128 < tile.tokens) prepare(epilogue, tile, threadIdx.x - 128);
  if (num_active == 0) {
    cp_async_wait_all();
    return false;
  }

  float sum[NT][4];
#pragma unroll
  for (int n = 0; n < NT; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
  const u16* next_w = w + U * 512;
  u32 unread = groups > U ? groups - U : 0;  // groups not yet asked for
  for (u32 base = 0; base < groups; base += S::GROUPS) {
    cp_async_wait<0>();
    __syncthreads();
    const u32 next = base + S::GROUPS, odd = base / S::GROUPS % 2;
    if (next < groups) {
      unsigned char* to = memory + (odd ? 0 : S::BYTES);
      stage<NT>(to, l, source, tile, (first + next) * 32, min(groups - next, S::GROUPS));
    }
    const unsigned char* x = memory + (odd ? S::BYTES : 0) + g * S::PITCH + t * 16;
    const auto group = [&](int u) {
      // Copied before the load: a product takes its operands from four registers in a row, and ptxas, left to copy them
      // there itself, does so once per product.
      const uint4 low = ring[u][0], high = ring[u][1];
      if (u < int(unread)) {
        ring[u][0] = ld_stream(next_w + u * 512);
        ring[u][1] = ld_stream(next_w + u * 512 + 256);
      }
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const uint4 b = lds128(x + n * 8 * S::PITCH + u * 64);
        mma_bf16(sum[n], low.x, high.x, low.y, high.y, b.x, b.y);
        mma_bf16(sum[n], low.z, high.z, low.w, high.w, b.z, b.w);
      }
    };
    u32 here = active ? min(groups - base, S::GROUPS) : 0;
#pragma unroll 1
    for (; here >= U; here -= U) {
#pragma unroll
      for (int u = 0; u < U; u++) group(u);
      x += U * 64;
      next_w += U * 512;
      unread = unread > U ? unread - U : 0;
    }
    // The last chunk may end inside a round of the ring.
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (u < int(here)) group(u);
    }
  }

  if (gridDim.y > 1) {
    const u32 place = blockIdx.z * gridDim.x + blockIdx.x;
    const u32 step = 8 * NT * 32;  // from slice to slice
    float4* mine = l.partial + size_t(place) * gridDim.y * step + warp * NT * 32 + lane;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const float4 v = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
      if (active) st_cg(mine + size_t(blockIdx.y) * step + n * 32, v);
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      arrived[0] = atomicAdd(l.counters + place, 1u);
      __threadfence();
    }
    __syncthreads();
    if (arrived[0] != gridDim.y - 1) return false;
    if (threadIdx.x == 0) st(l.counters + place, 0u);
    // All slices of a tile on their way at once: one after the other their latency would outlast a small matrix.
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float4 part[MAX_SPLITS];
#pragma unroll
      for (u32 s = 0; s < MAX_SPLITS; s++) {
        if (active && s < gridDim.y) part[s] = ld_cg(mine + size_t(s) * step + n * 32);
      }
#pragma unroll
      for (u32 s = 0; s < MAX_SPLITS; s++) {
        if (!active || s >= gridDim.y) continue;
        sum[n][0] = s ? sum[n][0] + part[s].x : part[s].x;
        sum[n][1] = s ? sum[n][1] + part[s].y : part[s].y;
        sum[n][2] = s ? sum[n][2] + part[s].z : part[s].z;
        sum[n][3] = s ? sum[n][3] + part[s].w : part[s].w;
      }
    }
  } else {
    __syncthreads();  // the tile takes the place of the activations
  }
  float* to = reinterpret_cast<float*>(memory) + warp * 16 + g;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    sts(to + (n * 8 + t * 2) * TILE_PITCH, sum[n][0]);
    sts(to + (n * 8 + t * 2 + 1) * TILE_PITCH, sum[n][1]);
    sts(to + (n * 8 + t * 2) * TILE_PITCH + 8, sum[n][2]);
    sts(to + (n * 8 + t * 2 + 1) * TILE_PITCH + 8, sum[n][3]);
  }
  __syncthreads();
  return true;
}

// One entry point per number of tokens, for the epilogue EPILOGUE_name with the parameters PARAMETERS_name.
#define LINEAR_KERNEL(name, tokens, per_sm, gather)                                   \
  KERNEL(256, per_sm, name##_##tokens, (LINEAR_PARAMETERS, PARAMETERS_##name)) {      \
    SHARED(Place, places, tokens);                                                    \
    const auto epilogue = EPILOGUE_##name;                                            \
    Tile tile;                                                                        \
    tile.places = places;                                                             \
    if (multiply<tokens / 8, gather>(LINEAR, tile, epilogue)) finish(LINEAR, epilogue, tile); \
  }
#define LINEAR_KERNELS(name, gather)  \
  LINEAR_KERNEL(name, 8, 2, gather)   \
  LINEAR_KERNEL(name, 16, 2, gather)  \
  LINEAR_KERNEL(name, 32, 2, gather)  \
  LINEAR_KERNEL(name, 64, 1, gather)  \
  LINEAR_KERNEL(name, 128, 1, gather)
