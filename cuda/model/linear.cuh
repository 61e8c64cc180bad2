// Skinny GEMM of every linear layer: y[m][n] = sum over k of x[m][k] W[n][k], 1 to 128 rows per read of W.
//
// A block owns 128 packed rows of W and a slice of K, each warp 16 of the rows. Weights are the A operand.
// They go from global memory straight to registers, several groups of 32 inputs ahead; the first groups are
// loaded before grid_wait. Activations are the B operand, staged in shared memory chunk by chunk. Within a
// group any order of inputs is correct as long as both operands use the same order. A lane owns eight
// neighbouring inputs, 16 bytes of either operand, which feed two products.
//
// Additions run over ascending k in products of 16, then over the slices of K in ascending order. The slices
// depend only on N and K. NT, the number of 8-token tiles, does not change what is computed for one token. So
// the bits of a row do not depend on the other rows.
#pragma once
#include "common/last_block.cuh"
#include "common/rows.cuh"

#define BLOCK_ROWS 128  // packed rows of W per block
#define TILE_PITCH 132  // floats from token to token in the result tile: no bank conflicts on writes or reads
#define SHORT_SLICE 16  // groups of 32 inputs in a slice of K that is prefetched whole
#define MAX_SPLITS 8    // maximum slices of K; mirrored in src/gpu/kernels/linear.rs

// Parameters of every linear kernel, common to all epilogues.
struct Linear {
  const u16* weights;     // [ceil(n / 16)][k / 32][half 2][kblock 4][row 8][8] bf16, rows from n on are zero;
                          // sealed: no kernel of the round writes it
  const u16* in;          // [m][k] bf16; with GATHER [in_rows][k]
  const u32* gather;      // with GATHER: [m] row of `in` for each token; out of range: a row of zeros
  const float* sumsq;     // [m][ceil(k / 128)] partial sums of squares of the norm's input; null: no norm
  float4* partial;        // [passes][blocks][splits][warp 8][8-token tile][lane 32]; unused if grid.y is 1
  u32* counters;          // [passes][blocks], zero before and after
  const u32* num_active;  // [1], 0: the kernel does nothing; or null
  u32 m, n, k;            // rows, outputs, inputs
  u32 slice;              // groups of 32 inputs per slice of K
  u32 in_rows;            // rows of `in`, with GATHER
  u32 first_block;        // blocks of 128 packed rows to skip
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

// Result of a block's main loop, the input of its epilogue: 128 columns (packed rows of W) of some tokens.
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
  static constexpr u32 CHUNK = NT <= 4 ? 512 : NT == 8 ? 256 : 128;
  static constexpr u32 GROUPS = CHUNK / 32;
  static constexpr u32 PITCH = CHUNK * 2 + 64;  // bytes; 64 mod 128: 16-byte reads of 8 rows do not conflict
  static constexpr u32 BYTES = NT * 8 * PITCH;
  // Groups of 32 inputs in flight: 64 KB per SM; 32 KB for NT = 16, where 8 groups would spill registers.
  static constexpr int AHEAD = NT == 8 ? 8 : 4;
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

// Main loop, called by the whole block of 256 threads. Computes the block's sums into `tile`; returns false
// if this block has no epilogue to run. While the first activations are in flight, one thread per token calls
// prepare_token(epilogue, tile, index of the token in the tile).
template <int NT, bool GATHER, class Epilogue>
DEVICE bool multiply(const Linear& l, Tile& tile, const Epilogue& epilogue) {
  typedef Staging<NT> S;
  constexpr int U = S::AHEAD;
  unsigned char* memory = dynamic_shared;
  __shared__ u32 gathered[NT * 8];
  __shared__ float scale[NT * 8];
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const u32 block = l.first_block + blockIdx.x, weight_tile = block * 8 + warp;
  const u32 first = blockIdx.y * l.slice, groups = min(l.slice, l.k / 32 - first);
  const bool active = weight_tile < (l.n + 15) / 16;  // whether this warp has rows of W
  const u16* w = l.weights + (size_t(weight_tile) * (l.k / 32) + first) * 512 + t * 64 + g * 8;

  grid_launch();
  uint4 ring[U][2];
#pragma unroll
  for (int u = 0; u < U; u++) ring[u][0] = ring[u][1] = make_uint4(0, 0, 0, 0);
  // Two branches: ptxas would move guarded loads behind the wait.
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
  // The rest of a short slice, at most 12 KiB per warp, goes to L2 while the previous kernel runs. Of the
  // matrices of a large model only the output projection has short slices. It follows attention, which leaves
  // most of the memory bandwidth idle, and its weights fit in L2.
  if (lane == 0 && active && groups > U && groups <= SHORT_SLICE) prefetch_l2(w + U * 512, (groups - U) * 1024);
  grid_wait();

  const u32 num_active = l.num_active ? *l.num_active : 1;  // checked below, with copies in flight
  tile.values = reinterpret_cast<const float*>(memory);
  tile.scale = scale;
  tile.token = blockIdx.z * NT * 8;
  tile.tokens = min(l.m - tile.token, u32(NT * 8));
  tile.row = block * BLOCK_ROWS;
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
    return false;
  }

  float sum[NT][4];
#pragma unroll
  for (int n = 0; n < NT; n++) sum[n][0] = sum[n][1] = sum[n][2] = sum[n][3] = 0;
  const u16* next_w = w + U * 512;
  u32 groups_left = groups > U ? groups - U : 0;  // groups whose loads have not started
  for (u32 base = 0; base < groups; base += S::GROUPS) {
    cp_async_wait<0>();
    __syncthreads();
    const u32 next = base + S::GROUPS, odd = base / S::GROUPS % 2;
    if (next < groups) {
      unsigned char* to = memory + (odd ? 0 : S::BYTES);
      stage_activations<NT>(to, l, source_rows, tile, (first + next) * 32, min(groups - next, S::GROUPS));
    }
    const unsigned char* x = memory + (odd ? S::BYTES : 0) + g * S::PITCH + t * 16;
    const auto group = [&](int u) {
      // Copied before the load: mma reads its A operand from four consecutive registers. Without this copy
      // ptxas inserts one per product.
      const uint4 low = ring[u][0], high = ring[u][1];
      if (u < int(groups_left)) {
        ring[u][0] = ld_stream(next_w + u * 512);
        ring[u][1] = ld_stream(next_w + u * 512 + 256);
      }
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const uint4 b = as<uint4>(x + n * 8 * S::PITCH + u * 64);
        mma_bf16(sum[n], low.x, high.x, low.y, high.y, b.x, b.y);
        mma_bf16(sum[n], low.z, high.z, low.w, high.w, b.z, b.w);
      }
    };
    u32 left = active ? min(groups - base, S::GROUPS) : 0;
#pragma unroll 1
    for (; left >= U; left -= U) {
#pragma unroll
      for (int u = 0; u < U; u++) group(u);
      x += U * 64;
      next_w += U * 512;
      groups_left = groups_left > U ? groups_left - U : 0;
    }
    // The last chunk may end within one turn of the ring.
#pragma unroll
    for (int u = 0; u < U; u++) {
      if (u < int(left)) group(u);
    }
  }

  if (gridDim.y > 1) {
    const u32 tile_index = blockIdx.z * gridDim.x + blockIdx.x;
    const u32 step = 8 * NT * 32;  // float4 from slice to slice
    float4* partial = l.partial + size_t(tile_index) * gridDim.y * step + warp * NT * 32 + lane;
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const float4 v = make_float4(sum[n][0], sum[n][1], sum[n][2], sum[n][3]);
      if (active) st_cg(partial + size_t(blockIdx.y) * step + n * 32, v);
    }
    if (!is_last_block(gridDim.y, l.counters + tile_index)) return false;
    // Loads of all slices of a tile are in flight together: serial latencies would exceed the time of a small
    // matrix.
#pragma unroll
    for (int n = 0; n < NT; n++) {
      float4 part[MAX_SPLITS];
#pragma unroll
      for (u32 s = 0; s < MAX_SPLITS; s++) {
        if (active && s < gridDim.y) part[s] = ld_cg(partial + size_t(s) * step + n * 32);
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
    __syncthreads();  // the result tile overwrites the activations
  }
  float* to = reinterpret_cast<float*>(memory) + warp * 16 + g;
#pragma unroll
  for (int n = 0; n < NT; n++) {
    to[(n * 8 + t * 2) * TILE_PITCH] = sum[n][0];
    to[(n * 8 + t * 2 + 1) * TILE_PITCH] = sum[n][1];
    to[(n * 8 + t * 2) * TILE_PITCH + 8] = sum[n][2];
    to[(n * 8 + t * 2 + 1) * TILE_PITCH + 8] = sum[n][3];
  }
  __syncthreads();
  return true;
}

// One kernel per number of tokens, with the epilogue EPILOGUE_name and its parameters PARAMETERS_name.
// `Linear` and the epilogue's struct document the shape of every parameter.
#define LINEAR_KERNEL(name, tokens, per_sm, gather)                                                   \
  extern "C" __global__ void __launch_bounds__(256, per_sm)                                           \
  name##_##tokens(LINEAR_PARAMETERS, PARAMETERS_##name) {                                             \
    __shared__ KvSlot kv_slots[tokens];                                                               \
    const auto epilogue = EPILOGUE_##name;                                                            \
    Tile tile;                                                                                        \
    tile.kv_slots = kv_slots;                                                                         \
    if (multiply<tokens / 8, gather>(LINEAR, tile, epilogue)) apply_epilogue(LINEAR, epilogue, tile); \
  }
#define LINEAR_KERNELS(name, gather)  \
  LINEAR_KERNEL(name, 8, 2, gather)   \
  LINEAR_KERNEL(name, 16, 2, gather)  \
  LINEAR_KERNEL(name, 32, 2, gather)  \
  LINEAR_KERNEL(name, 64, 1, gather)  \
  LINEAR_KERNEL(name, 128, 1, gather)
