// Skinny GEMM of every linear layer: y[m][n] = sum over k of x[m][k] W[n][k], 1 to 128 rows per read of W.
//
// A block owns a slice of K and 128 packed rows of W, or 256 for 64 and 128 tokens: two halves of 128. A warp
// owns 16 rows of each half. Weights are the A operand. They go from global memory straight to registers,
// several groups of 32 inputs ahead; the first groups are loaded before grid_wait. Activations are the B
// operand, staged in shared memory chunk by chunk. Within a group any order of inputs is correct as long as
// both operands use the same order. A lane owns eight neighbouring inputs, 16 bytes of either operand, which
// feed two products for each half.
//
// Every block reads all activations of its slice, so L2 moves tokens / rows of W as many of their bytes as of
// weights. With 64 tokens and 128 rows of W that takes longer than memory needs for the weights, with 256 rows
// it does not. The second half also shares the reads of shared memory.
//
// Additions run over ascending k in products of 16, then over the slices of K in ascending order. The slices
// depend only on N and K. NT, the number of 8-token tiles, and the halves do not change what is computed for
// one token. So the bits of a row do not depend on the other rows.
#pragma once
#include "common/last_block.cuh"
#include "common/rows.cuh"

#define BLOCK_ROWS 128  // packed rows of W per half of a block; the tile of an epilogue
#define TILE_PITCH 132  // floats from token to token in the result tile: no bank conflicts on writes or reads
#define SHORT_SLICE 24  // groups of 32 inputs in a slice of K that is prefetched whole
#define MAX_SPLITS 8    // maximum slices of K; mirrored in src/gpu/kernels/linear.rs

// Parameters of every linear kernel, common to all epilogues.
struct Linear {
  const u16* weights;     // [ceil(n / 16)][k / 32][half 2][kblock 4][row 8][8] bf16, rows from n on are zero;
                          // sealed: no kernel of the round writes it
  const u16* in;          // [m][k] bf16; with GATHER [in_rows][k]
  const u32* gather;      // with GATHER: [m] row of `in` for each token; out of range: a row of zeros
  const float* sumsq;     // [m][ceil(k / 128)] partial sums of squares of the norm's input; null: no norm
  float4* partial;        // [passes][blocks][splits][half][warp 8][8-token tile][lane 32]; unused if grid.y is 1
  u32* counters;          // [passes][blocks], zero before and after
  const u32* num_active;  // [1], 0: the kernel does nothing; or null
  u32 m, n, k;            // rows, outputs, inputs
  u32 slice;              // groups of 32 inputs per slice of K
  u32 in_rows;            // rows of `in`, with GATHER
  u32 first_block;        // 128s of packed rows to skip
  float eps;              // of the norm
};
#define LINEAR_PARAMETERS                                                                              \
  const u16 *weights, const u16 *in, const u32 *gather, const float *sumsq, float4 *partial,           \
      u32 *counters, const u32 *num_active, u32 m, u32 n, u32 k, u32 slice, u32 in_rows,               \
      u32 first_block, float eps
#define LINEAR                                                                                         \
  Linear {                                                                                             \
    weights, in, gather, sumsq, partial, counters, num_active, m, n, k, slice, in_rows, first_block,   \
        eps                                                                                            \
  }

// Where to store a row's query, key and value.
struct __align__(16) KvSlot {
  u32 position;  // for RoPE, below Qkv::positions
  u32 query;     // row of Qkv::queries, or NONE: not stored
  u32 page;      // page of the KV cache, or NONE: key and value are not stored
  u32 slot;      // slot of the sequence; slot % PAGE is the token's place in the page
};

// Result of a half of a block's main loop, the input of its epilogue: 128 columns (packed rows of W) of some
// tokens.
struct Tile {
  const float* values;  // [tokens][TILE_PITCH] sums, shared memory
  const float* scale;   // [tokens] 1 / rms of the token's input, shared memory
  KvSlot* kv_slots;     // [tokens] written by `prepare_token` of the qkv epilogue, shared memory
  u32 token;            // first token (row of the pass)
  u32 tokens;           // number of tokens
  u32 row;              // packed row of column 0
};

// Columns 4 lane..4 lane + 4 of a token.
DEVICE float4 columns(const Tile& tile, u32 token) {
  return reinterpret_cast<const float4*>(tile.values + token * TILE_PITCH)[threadIdx.x % 32];
}

// Size of a chunk of staged activations, and how far ahead weights are loaded. Dynamic shared memory holds one
// or two chunks of BYTES each, later the result tile; `shared` in src/gpu/kernels/linear.rs computes the size: at
// most 80 KB, since many cards have 99 KB for a block. Two blocks fit on an SM for NT up to 4; above, registers allow
// one. Chunks are short because the main loop cannot start before the first one has arrived.
template <int NT>
struct Staging {
  static constexpr int HALVES = NT <= 4 ? 1 : 2;
  static constexpr u32 CHUNK = NT <= 4 ? 512 : NT == 8 ? 256 : 128;
  static constexpr u32 GROUPS = CHUNK / 32;
  static constexpr u32 PITCH = CHUNK * 2 + 64;  // bytes; 64 mod 128: 16-byte reads of 8 rows do not conflict
  static constexpr u32 BYTES = NT * 8 * PITCH;
  // Groups of 32 inputs on their way to registers, 8 KB for each half, and behind them to L2. The sums of 128 tokens
  // leave registers for one group.
  static constexpr int AHEAD = NT <= 8 ? 4 : 1;
  static constexpr u32 PREFETCH = NT <= 8 ? 0 : 2 * GROUPS;
};

// Starts the copies of one chunk: `groups` groups of 32 inputs from column `k` on.
template <int NT>
DEVICE void stage_activations(unsigned char* to,       // [NT * 8][PITCH bytes], shared memory
                              const Linear& l,
                              const u32* source_rows,  // [NT * 8] rows of l.in; null: the tile's tokens
                              const Tile& tile, u32 k, u32 groups) {
  typedef Staging<NT> S;
  constexpr u32 COLUMNS = S::CHUNK / 8, STEP = 256 / COLUMNS;  // columns of 16 bytes; rows per iteration
  static_assert(256 % COLUMNS == 0 && NT * 8 % STEP == 0, "every thread copies one column");
  const u32 column = threadIdx.x % COLUMNS, first = threadIdx.x / COLUMNS;
  if (column < groups * 4) {
    const u16* from = l.in + k + column * 8;
    to += first * S::PITCH + column * 16;
#pragma unroll 2
    for (u32 i = first; i < NT * 8; i += STEP) {
      const u32 row = source_rows ? source_rows[i] : tile.token + i;
      cp_async16(to, from + size_t(row) * l.k, source_rows ? row != NONE : i < tile.tokens);
      to += STEP * S::PITCH;
    }
  }
  cp_async_commit();
}

// 1 / rms of a row of k inputs, from its partial sums of squares added in ascending order.
DEVICE float inverse_rms(const float* sumsq,  // [ceil(k / 128)]
                         u32 k, float eps) {
  const u32 parts = (k + 127) / 128;
  float sum = 0;
  for (u32 base = 0; base < parts; base += 32) {
    // 32 loads in flight: dependent loads, one at a time, would delay the first product.
    float part[32];
#pragma unroll
    for (u32 i = 0; i < 32; i++) {
      part[i] = 0;
      if (base + i < parts) part[i] = sumsq[base + i];
    }
#pragma unroll
    for (u32 i = 0; i < 32; i++) {
      if (base + i < parts) sum += part[i];
    }
  }
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, float(k)), eps)));
}
DEVICE float inverse_rms(const Linear& l, u32 row) {
  return inverse_rms(l.sumsq + size_t(row) * ((l.k + 127) / 128), l.k, l.eps);
}

// Default of `prepare_token`: most epilogues need no preparation.
template <class Epilogue>
DEVICE void prepare_token(const Epilogue&, const Tile&, u32) {}

// The sums of all slices of K at one place of a tile, added in ascending order; without slices 0. The loads are in
// flight together: serial latencies would exceed the time of a small matrix.
DEVICE float4 add_slices(const float4* partial,  // [slices][step]
                         u32 step, u32 slices) {
  float4 part[MAX_SPLITS];
#pragma unroll
  for (u32 s = 0; s < MAX_SPLITS; s++) {
    if (s < slices) part[s] = ld_cg(partial + size_t(s) * step);
  }
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
  for (u32 s = 0; s < MAX_SPLITS; s++) {
    if (s >= slices) continue;
    const float4 v = part[s];
    sum = s ? make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w) : v;
  }
  return sum;
}

// Stores the result of a product of 16 packed rows and 8 tokens: two rows, eight apart, of two tokens.
DEVICE void store_columns(float* to,  // in the result tile, the lane's first row and token
                          float4 v) {
  to[0] = v.x;
  to[TILE_PITCH] = v.y;
  to[8] = v.z;
  to[TILE_PITCH + 8] = v.w;
}

// Main loop and epilogue, called by the whole block of 256 threads. While the first activations are in flight,
// one thread per token calls prepare_token(epilogue, tile, index of the token in the tile). Then
// apply_epilogue(l, epilogue, tile) runs for each half, in the block that adds the slices.
template <int NT, bool GATHER, class Epilogue>
DEVICE void run_linear(const Linear& l, const Epilogue& epilogue,
                       KvSlot* kv_slots) {  // [NT * 8], shared memory
  typedef Staging<NT> S;
  constexpr int U = S::AHEAD, HALVES = S::HALVES;
  unsigned char* memory = dynamic_shared;
  __shared__ u32 gathered[NT * 8];
  __shared__ float scale[NT * 8];
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const u32 block = l.first_block + blockIdx.x * HALVES, weight_tile = block * 8 + warp, weight_tiles = (l.n + 15) / 16;
  const u32 first = blockIdx.y * l.slice, groups = min(l.slice, l.k / 32 - first);
  bool active[HALVES];  // whether this warp has rows of W
#pragma unroll
  for (int h = 0; h < HALVES; h++) active[h] = weight_tile + h * 8 < weight_tiles;
  const u16* w = l.weights + (size_t(weight_tile) * (l.k / 32) + first) * 512 + t * 64 + g * 8;
  const size_t half = size_t(BLOCK_ROWS) * l.k;  // elements of W from half to half

  grid_launch();
  uint4 ring[U][HALVES][2];
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
    const u16* from = w + h * half;
#pragma unroll
    for (int u = 0; u < U; u++) ring[u][h][0] = ring[u][h][1] = make_uint4(0, 0, 0, 0);
    // Two branches: ptxas would move guarded loads behind the wait.
    if (active[h] && groups >= U) {
#pragma unroll
      for (int u = 0; u < U; u++) {
        ring[u][h][0] = ld_stream(from + u * 512);
        ring[u][h][1] = ld_stream(from + u * 512 + 256);
      }
    } else if (active[h]) {
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (u >= int(groups)) break;
        ring[u][h][0] = ld_stream(from + u * 512);
        ring[u][h][1] = ld_stream(from + u * 512 + 256);
      }
    }
    // The rest of a short slice, at most 23 KiB per warp and half, goes to L2 while the previous kernel runs. Of
    // the matrices of a large model only the output projection has short slices. It follows attention, which
    // leaves most of the memory bandwidth idle, and its weights fit in L2.
    const u32 prefetched = groups <= SHORT_SLICE ? groups : U + S::PREFETCH;
    if (lane == 0 && active[h] && prefetched > U) prefetch_l2(from + U * 512, (prefetched - U) * 1024);
  }
  grid_wait();

  const u32 num_active = l.num_active ? *l.num_active : 1;  // checked below, with copies in flight
  Tile tile;
  tile.kv_slots = kv_slots;
  tile.values = reinterpret_cast<const float*>(memory);
  tile.scale = scale;
  tile.token = blockIdx.z * NT * 8;
  tile.tokens = min(l.m - tile.token, u32(NT * 8));
  if (GATHER) {
    if (threadIdx.x < NT * 8) {
      const u32 row = threadIdx.x < tile.tokens ? l.gather[size_t(tile.token) + threadIdx.x] : NONE;
      gathered[threadIdx.x] = row < l.in_rows ? row : NONE;
    }
    __syncthreads();
  }
  const u32* source_rows = GATHER ? gathered : nullptr;
  stage_activations<NT>(memory, l, source_rows, tile, first * 32, min(groups, S::GROUPS));
  if (threadIdx.x < NT * 8) {
    const bool has_norm = l.sumsq && threadIdx.x < tile.tokens;
    scale[threadIdx.x] = has_norm ? inverse_rms(l, tile.token + threadIdx.x) : 1.0f;
  }
  if (threadIdx.x >= 128 && threadIdx.x - 128 < tile.tokens) prepare_token(epilogue, tile, threadIdx.x - 128);
  if (num_active == 0) {
    cp_async_wait_all();
    return;
  }

  float sum[HALVES][NT][4];
#pragma unroll
  for (int h = 0; h < HALVES; h++) {
#pragma unroll
    for (int n = 0; n < NT; n++) sum[h][n][0] = sum[h][n][1] = sum[h][n][2] = sum[h][n][3] = 0;
  }
  const u16* next_w = w + U * 512;
  int to_load = int(groups) - U;  // groups whose loads have not started
  for (u32 base = 0; base < groups; base += S::GROUPS) {
    cp_async_wait<0>();
    __syncthreads();
    const u32 next = base + S::GROUPS, odd = base / S::GROUPS % 2;
    if (next < groups) {
      unsigned char* to = memory + (odd ? 0 : S::BYTES);
      stage_activations<NT>(to, l, source_rows, tile, (first + next) * 32, min(groups - next, S::GROUPS));
    }
    const u32 later = base + U + S::PREFETCH;
    if (S::PREFETCH && groups > SHORT_SLICE && later < groups && lane == 0) {
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        if (active[h]) prefetch_l2(next_w + h * half + S::PREFETCH * 512, min(groups - later, S::GROUPS) * 1024);
      }
    }
    const unsigned char* x = memory + (odd ? S::BYTES : 0) + g * S::PITCH + t * 16;
    const auto group = [&](int u) {
      // Copied before the load: mma reads its A operand from four consecutive registers. Without this copy
      // ptxas inserts one per product.
      uint4 low[HALVES], high[HALVES];
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        low[h] = ring[u][h][0], high[h] = ring[u][h][1];
        if (u < to_load && (h == 0 || active[h])) {
          ring[u][h][0] = ld_stream(next_w + h * half + u * 512);
          ring[u][h][1] = ld_stream(next_w + h * half + u * 512 + 256);
        }
      }
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const uint4 b = as<uint4>(x + n * 8 * S::PITCH + u * 64);
#pragma unroll
        for (int h = 0; h < HALVES; h++) {
          mma_bf16(sum[h][n], low[h].x, high[h].x, low[h].y, high[h].y, b.x, b.y);
          mma_bf16(sum[h][n], low[h].z, high[h].z, low[h].w, high[h].w, b.z, b.w);
        }
      }
    };
    u32 left = active[0] ? min(groups - base, S::GROUPS) : 0;
#pragma unroll 1
    for (; left >= U; left -= U) {
#pragma unroll
      for (int u = 0; u < U; u++) group(u);
      x += U * 64;
      next_w += U * 512;
      to_load -= U;
    }
    // The last chunk may end within one turn of the ring.
#pragma unroll
    for (int u = 0; u < U - 1; u++) {
      if (u < int(left)) group(u);
    }
  }

  const u32 step = HALVES * 8 * NT * 32;  // float4 from slice to slice
  const u32 tile_index = blockIdx.z * gridDim.x + blockIdx.x;
  float4* partial = l.partial + size_t(tile_index) * gridDim.y * step + warp * NT * 32 + lane;
  if (gridDim.y > 1) {
#pragma unroll
    for (int h = 0; h < HALVES; h++) {
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const float4 v = make_float4(sum[h][n][0], sum[h][n][1], sum[h][n][2], sum[h][n][3]);
        if (active[h]) st_cg(partial + size_t(blockIdx.y) * step + (h * 8 * NT + n) * 32, v);
      }
    }
    if (!is_last_block(gridDim.y, l.counters + tile_index)) return;
  }
  // One tile in shared memory, which holds the halves one after the other.
  float* to = reinterpret_cast<float*>(memory) + t * 2 * TILE_PITCH + warp * 16 + g;
#pragma unroll 1
  for (int turn = 0; turn < HALVES; turn++) {
    tile.row = (block + turn) * BLOCK_ROWS;
    if (turn > 0 && tile.row >= l.n) break;
    __syncthreads();  // the tile overwrites the activations, or the half before
    if (gridDim.y > 1) {
      const float4* from = partial + turn * 8 * NT * 32;
      const u32 slices = weight_tile + turn * 8 < weight_tiles ? gridDim.y : 0;
#pragma unroll 2
      for (int n = 0; n < NT; n++) store_columns(to + n * 8 * TILE_PITCH, add_slices(from + n * 32, step, slices));
    } else {
#pragma unroll
      for (int h = 0; h < HALVES; h++) {
        if (h != turn) continue;
#pragma unroll
        for (int n = 0; n < NT; n++) {
          const float4 v = make_float4(sum[h][n][0], sum[h][n][1], sum[h][n][2], sum[h][n][3]);
          store_columns(to + n * 8 * TILE_PITCH, v);
        }
      }
    }
    __syncthreads();
    apply_epilogue(l, epilogue, tile);
  }
}

// One kernel per number of tokens, with the epilogue EPILOGUE_name and its parameters PARAMETERS_name.
// `Linear` and the epilogue's struct document the shape of every parameter.
#define LINEAR_KERNEL(name, tokens, per_sm, gather)                                                   \
  extern "C" __global__ void __launch_bounds__(256, per_sm)                                           \
  name##_##tokens(LINEAR_PARAMETERS, PARAMETERS_##name) {                                             \
    __shared__ KvSlot kv_slots[tokens];                                                               \
    run_linear<tokens / 8, gather>(LINEAR, EPILOGUE_##name, kv_slots);                                \
  }
#define LINEAR_KERNELS(name, gather)  \
  LINEAR_KERNEL(name, 8, 2, gather)   \
  LINEAR_KERNEL(name, 16, 2, gather)  \
  LINEAR_KERNEL(name, 32, 2, gather)  \
  LINEAR_KERNEL(name, 64, 1, gather)  \
  LINEAR_KERNEL(name, 128, 1, gather)
