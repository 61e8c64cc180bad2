// Epilogues of the linear layers. Each processes a tile of tokens x 128 packed rows of W with the whole
// block: one warp per token, one lane per four neighbouring columns. The main loops of linear.cuh and
// prefill.cuh share them.
//
// Where the compiler could contract a product and a sum in more than one way, an intrinsic selects one, so
// that every kernel that contains an epilogue rounds alike.
#pragma once
#include "model/linear.cuh"
#include "common/numbers.cuh"

// Residual add: x += sums. Then the input of the next linear layer, bf16(gain x), and this tile's part of the
// sum of squares of x for its norm.
struct Project {
  float* x;           // [m][n] residual stream, updated in place; null: x = sums, not stored
  u16* y;             // [m][n] bf16(gain x)
  float* sumsq;       // [m][ceil(n / 128)] partial sums of squares of x
  const float* gain;  // [n]
  u16* features;      // [m][feature_pitch] bf16(x), or null
  u32 feature_pitch;  // elements from row to row of `features`
};
#define PARAMETERS_project \
  float *x, u16 *y, float *sumsq_out, const float *gain, u16 *features, u32 feature_pitch
#define EPILOGUE_project Project{x, y, sumsq_out, gain, features, feature_pitch}
#define PARAMETERS_inject u16 *y, float *sumsq_out, const float *gain
#define EPILOGUE_inject Project{nullptr, y, sumsq_out, gain, nullptr, 0}
// What is added to x: the results of the lane's columns for token i of the tile.
DEVICE float4 addend(const Linear&, const Project&, const Tile& tile, u32 i) { return columns(tile, i); }
template <class Epilogue>
DEVICE void add_to_residual(const Linear& l, const Project& p, const Epilogue& epilogue, const Tile& tile) {
  const u32 lane = threadIdx.x % 32, warps = blockDim.x / 32, column = tile.row + lane * 4;
  const u32 parts = (l.n + BLOCK_ROWS - 1) / BLOCK_ROWS;
  const bool inside = column < l.n;
  float4 gain = make_float4(0, 0, 0, 0);
  if (inside) gain = as<float4>(p.gain + column);
  // Two tokens at a time, so that the loads of their residuals overlap.
  for (u32 first = threadIdx.x / 32; first < tile.tokens; first += warps * 2) {
    float4 old[2];
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
      const u32 i = first + j * warps;
      old[j] = make_float4(0, 0, 0, 0);
      if (!p.x || !inside || i >= tile.tokens) continue;
      old[j] = as<float4>(p.x + size_t(tile.token + i) * l.n + column);
    }
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
      const u32 i = first + j * warps;
      if (i >= tile.tokens) break;
      const size_t row = tile.token + i;
      float4 v = addend(l, epilogue, tile, i);
      float square = 0;
      if (inside) {
        v = make_float4(old[j].x + v.x, old[j].y + v.y, old[j].z + v.z, old[j].w + v.w);
        square = sum_of_squares(v);
        if (p.x) as<float4>(p.x + row * l.n + column) = v;
        as<uint2>(p.y + row * l.n + column) = pack4(mul(v, gain));
        if (p.features) as<uint2>(p.features + row * p.feature_pitch + column) = pack4(v);
      }
      square = lane_sum(square, 32);
      if (lane == 0) p.sumsq[row * parts + tile.row / BLOCK_ROWS] = square;
    }
  }
}
DEVICE void apply_epilogue(const Linear& l, const Project& p, const Tile& tile) { add_to_residual(l, p, p, tile); }

// The convolutions of a DFlash2 drafter before and after a sublayer, along the rows of each block: row t becomes the
// sum over taps o of (base[o] + dynamic[t][o]) times row t - o. A row before the block's first counts as 0. A tile has
// whole blocks.
struct Taps {
  const float* base;  // [taps][hidden], of one of the two convolutions
  u32 taps;           // 1, 2, 4 or 8
  u32 group;          // channels that share a dynamic coefficient, a multiple of 4
  u32 block;          // rows of a block
};

// Adds base + dynamic times `row` to `sum`.
DEVICE float4 add_tap(float4 sum, const Taps& t, u32 tap, u32 hidden, u32 channel, float dynamic, float4 row) {
  const float4 base = as<float4>(t.base + size_t(tap) * hidden + channel);
  sum.x = __fmaf_rn(__fadd_rn(base.x, dynamic), row.x, sum.x);
  sum.y = __fmaf_rn(__fadd_rn(base.y, dynamic), row.y, sum.y);
  sum.z = __fmaf_rn(__fadd_rn(base.z, dynamic), row.z, sum.z);
  sum.w = __fmaf_rn(__fadd_rn(base.w, dynamic), row.w, sum.w);
  return sum;
}

// The convolution before a sublayer. The results of the linear layer are the dynamic coefficients of both convolutions,
// packed as [group][side][tap]. `in` and `out` are not yet divided by their rms, so a row before is scaled by the ratio
// of both rows' factors.
struct Convolve {
  u16* out;        // [m][k] bf16
  float* dynamic;  // [m][taps][k / group]: coefficients of the convolution after the sublayer
  Taps taps;
};
#define PARAMETERS_convolve u16 *out, float *dynamic, const float *base, u32 taps, u32 group, u32 block_size
#define EPILOGUE_convolve Convolve{out, dynamic, {base, taps, group, block_size}}
DEVICE void apply_epilogue(const Linear& l, const Convolve& p, const Tile& tile) {
  const Taps& t = p.taps;
  const u32 lane = threadIdx.x % 32, hidden = l.k, groups = hidden / t.group;
  const u32 in_tile = BLOCK_ROWS / (2 * t.taps), first = tile.row / (2 * t.taps), last = min(first + in_tile, groups);
  for (u32 i = threadIdx.x / 32; i < tile.tokens; i += blockDim.x / 32) {
    const size_t row = tile.token + i;
    const float scale = tile.scale[i];
    const float* own = tile.values + i * TILE_PITCH;  // [groups of the tile][2][taps]
    const u32 reach = min(t.taps, i % t.block + 1);
    for (u32 group = first + lane; group < last; group += 32) {
      for (u32 o = 0; o < t.taps; o++) {
        const float after = own[(group - first) * 2 * t.taps + t.taps + o];
        p.dynamic[(row * t.taps + o) * groups + group] = __fmul_rn(after, scale);
      }
    }
    for (u32 channel = first * t.group + lane * 4; channel < last * t.group; channel += 128) {
      const float* coefficients = own + (channel / t.group - first) * 2 * t.taps;
      float4 sum = make_float4(0, 0, 0, 0);
      for (u32 o = 0; o < reach; o++) {
        const uint2 four = as<uint2>(l.in + (row - o) * hidden + channel);
        const float ratio = o ? __fdiv_rn(tile.scale[i - o], scale) : 1.0f;
        const float4 x = make_float4(low_f32(four.x), high_f32(four.x), low_f32(four.y), high_f32(four.y));
        sum = add_tap(sum, t, o, hidden, channel, __fmul_rn(coefficients[o], scale), mul(x, ratio));
      }
      as<uint2>(p.out + row * hidden + channel) = pack4(sum);
    }
  }
}

// Project, with the convolution after the sublayer on the results.
struct ProjectConvolved {
  Project project;
  const float* dynamic;  // [m][taps][n / group], as Convolve wrote it
  Taps taps;
};
#define PARAMETERS_project_convolved \
  PARAMETERS_project, const float *dynamic, const float *base, u32 taps, u32 group, u32 block_size
#define EPILOGUE_project_convolved ProjectConvolved{EPILOGUE_project, dynamic, {base, taps, group, block_size}}
DEVICE float4 addend(const Linear& l, const ProjectConvolved& p, const Tile& tile, u32 i) {
  const Taps& t = p.taps;
  const u32 channel = tile.row + threadIdx.x % 32 * 4, groups = l.n / t.group;
  const u32 reach = channel < l.n ? min(t.taps, i % t.block + 1) : 0;
  const float* dynamic = p.dynamic + size_t(tile.token + i) * t.taps * groups + channel / t.group;
  float4 sum = make_float4(0, 0, 0, 0);
  for (u32 o = 0; o < reach; o++) sum = add_tap(sum, t, o, l.n, channel, dynamic[o * groups], columns(tile, i - o));
  return sum;
}
DEVICE void apply_epilogue(const Linear& l, const ProjectConvolved& p, const Tile& tile) {
  add_to_residual(l, p.project, p, tile);
}

// silu(gate) * up. Of every 16 columns the first 8 are gates, the other 8 the ups of the same neurons.
struct Swiglu {
  u16* out;  // [m][n / 2] bf16
};
#define PARAMETERS_swiglu u16* out
#define EPILOGUE_swiglu Swiglu{out}
DEVICE float swiglu(float gate, float up) {
  const float e = ex2(__fmul_rn(gate, -1.44269504f));  // exp(-gate)
  return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, e)), up);
}
DEVICE void apply_epilogue(const Linear& l, const Swiglu& p, const Tile& tile) {
  const u32 lane = threadIdx.x % 32;
  // A lane with four gates and the lane with their ups, two lanes further, compute two of the four neurons
  // each.
  const bool has_gates = lane % 4 < 2;
  const u32 neuron = tile.row / 2 + lane / 4 * 8 + lane % 2 * 4 + (has_gates ? 0 : 2);
  for (u32 i = threadIdx.x / 32; i < tile.tokens; i += blockDim.x / 32) {
    const float4 v = mul(columns(tile, i), tile.scale[i]);
    const float a = __shfl_xor_sync(0xffffffffu, has_gates ? v.z : v.x, 2);
    const float b = __shfl_xor_sync(0xffffffffu, has_gates ? v.w : v.y, 2);
    const float first = has_gates ? swiglu(v.x, a) : swiglu(a, v.z);
    const float second = has_gates ? swiglu(v.y, b) : swiglu(b, v.w);
    if (neuron < l.n / 2) {
      as<u32>(p.out + size_t(tile.token + i) * (l.n / 2) + neuron) = pack2(first, second);
    }
  }
}

// The results as they are.
struct Plain {
  float* out;  // [m][pitch]
  u32 pitch;
};
#define PARAMETERS_plain float *out, u32 pitch
#define EPILOGUE_plain Plain{out, pitch}
DEVICE void apply_epilogue(const Linear& l, const Plain& p, const Tile& tile) {
  const u32 lane = threadIdx.x % 32, column = tile.row + lane * 4;
  // Columns from n to the pitch hold zeros or anything; packed rows end there.
  if (column >= l.n) return;
  for (u32 i = threadIdx.x / 32; i < tile.tokens; i += blockDim.x / 32) {
    as<float4>(p.out + size_t(tile.token + i) * p.pitch + column) = mul(columns(tile, i), tile.scale[i]);
  }
}

// RMSNorm of each query and key head, RoPE, and stores: queries to their buffer, keys and values to the KV
// cache. The packed rows are the query heads, then the key heads, then the value heads. A head occupies 32 or
// 16 lanes.
struct Qkv {
  const Row* rows;      // [m]
  u16* queries;         // [query_rows][heads][head_dim] bf16
  u16* keys;            // [pages][kv_heads][PAGE][head_dim] bf16, chunks permuted (page_offset)
  u16* values;          // [pages][kv_heads][PAGE][head_dim] bf16, chunks permuted
  const u32* table;     // [sequences][sequence_pages] page numbers
  const float* q_gain;  // [head_dim], or null: no norm
  const float* k_gain;  // [head_dim], or null: no norm
  const float* rope;    // [positions][head_dim]: cosines, then sines
  u32 heads, kv_heads;
  u32 head_dim;         // 64 or 128
  u32 query_rows;       // rows of `queries`
  u32 pages;            // pages of `keys` and `values`
  u32 sequences;        // rows of `table`
  u32 sequence_pages;   // columns of `table`
  u32 positions;        // rows of `rope`, at least 1
};
#define PARAMETERS_qkv                                                                                 \
  const Row *rows, u16 *queries, u16 *keys, u16 *values, const u32 *table, const float *q_gain,        \
      const float *k_gain, const float *rope, u32 heads, u32 kv_heads, u32 head_dim, u32 query_rows,   \
      u32 pages, u32 sequences, u32 sequence_pages, u32 positions
#define EPILOGUE_qkv                                                                                   \
  Qkv {                                                                                                \
    rows, queries, keys, values, table, q_gain, k_gain, rope, heads, kv_heads, head_dim, query_rows,   \
        pages, sequences, sequence_pages, positions                                                    \
  }
// Looks up where to store the token's query, key and value. An index out of range becomes NONE; the position
// is clamped.
DEVICE void prepare_token(const Qkv& p, const Tile& tile, u32 token) {
  const Row row = p.rows[size_t(tile.token) + token];
  const bool valid = row.sequence < p.sequences;
  KvSlot to{min(row.position, p.positions - 1), NONE, NONE, row.slot};
  if (valid && row.query < p.query_rows) to.query = row.query;
  if (valid && row.slot / PAGE < p.sequence_pages) {
    const u32 page = p.table[size_t(row.sequence) * p.sequence_pages + row.slot / PAGE];
    if (page < p.pages) to.page = page;
  }
  tile.kv_slots[token] = to;
}
DEVICE void apply_epilogue(const Linear& l, const Qkv& p, const Tile& tile) {
  const u32 lane = threadIdx.x % 32, warps = blockDim.x / 32, width = p.head_dim / 4, half = p.head_dim / 2;
  const u32 head = (tile.row + lane * 4) / p.head_dim, d = lane * 4 % p.head_dim;
  const bool query = head < p.heads, rotated = head < p.heads + p.kv_heads;
  const bool inside = head < p.heads + 2 * p.kv_heads;
  const float* gains = query ? p.q_gain : rotated ? p.k_gain : nullptr;
  float4 gain = make_float4(1, 1, 1, 1);
  if (gains) gain = as<float4>(gains + d);
  // Two tokens at a time, so that the loads of their RoPE rows overlap.
  for (u32 first = threadIdx.x / 32; first < tile.tokens; first += warps * 2) {
    float4 c[2], s[2];
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
      c[j] = make_float4(1, 1, 1, 1), s[j] = make_float4(0, 0, 0, 0);
      const u32 i = first + j * warps;
      if (i >= tile.tokens || !rotated) continue;
      const float* angles = p.rope + size_t(tile.kv_slots[i].position) * p.head_dim + d % half;
      c[j] = as<float4>(angles);
      s[j] = as<float4>(angles + half);
    }
#pragma unroll
    for (u32 j = 0; j < 2; j++) {
      const u32 i = first + j * warps;
      if (i >= tile.tokens) break;
      float4 v = mul(columns(tile, i), tile.scale[i]);
      const float mean = __fdiv_rn(lane_sum(sum_of_squares(v), width), float(p.head_dim));
      if (gains) v = mul(mul(v, __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, l.eps)))), gain);
      float4 partner;
      partner.x = __shfl_xor_sync(0xffffffffu, v.x, int(width / 2));
      partner.y = __shfl_xor_sync(0xffffffffu, v.y, int(width / 2));
      partner.z = __shfl_xor_sync(0xffffffffu, v.z, int(width / 2));
      partner.w = __shfl_xor_sync(0xffffffffu, v.w, int(width / 2));
      if (rotated) {
        partner = mul(partner, mul(s[j], d < half ? -1.0f : 1.0f));
        v.x = __fmaf_rn(v.x, c[j].x, partner.x);
        v.y = __fmaf_rn(v.y, c[j].y, partner.y);
        v.z = __fmaf_rn(v.z, c[j].z, partner.z);
        v.w = __fmaf_rn(v.w, c[j].w, partner.w);
      }
      const uint2 low = pack4(v);
      const uint2 high =
          make_uint2(__shfl_xor_sync(0xffffffffu, low.x, 1), __shfl_xor_sync(0xffffffffu, low.y, 1));
      const KvSlot to = tile.kv_slots[i];
      if (lane % 2 || !inside) continue;
      const uint4 chunk = make_uint4(low.x, low.y, high.x, high.y);
      if (query) {
        if (to.query != NONE) as<uint4>(p.queries + (size_t(to.query) * p.heads + head) * p.head_dim + d) = chunk;
      } else if (to.page != NONE) {
        const u32 kv_head = head - (rotated ? p.heads : p.heads + p.kv_heads);
        const size_t at = (size_t(to.page) * p.kv_heads + kv_head) * (PAGE * p.head_dim * 2);
        char* page = reinterpret_cast<char*>(rotated ? p.keys : p.values) + at;
        as<uint4>(page + page_offset(to.slot, d / 8, p.head_dim)) = chunk;
      }
    }
  }
}

// Logits, and for each row and block of 128 ids the argmax as one integer: larger is better, the lowest id
// wins ties.
struct Head {
  float* logits;          // [m][vocab], or null: not stored
  u64* best;              // [m][ceil(n / 128)]: ascending(logit) << 32 | ~id; all ones if a logit is NaN or +inf
  float multiplier;       // logits are multiplied by it
  float cap;              // softcap applied after it: cap * tanh(logit / cap); 0: none
  u32 ids;                // logits of columns from this one on are -inf
  const u32* target_ids;  // [n]: id of each column, ascending; null: the column, and vocab = n
  u32 vocab;              // columns of `logits`; with target_ids the others are not written
  u32 first, step;        // step > 0: the result of row m is for row first + m step of `logits` and best; 0: row m
  u32 add;                // 1: it is added to that row of `logits`, which stores the sum
};
DEVICE void apply_epilogue(const Linear& l, const Head& p, const Tile& tile) {
  const u32 lane = threadIdx.x % 32, column = tile.row + lane * 4;
  const u32 blocks = (l.n + BLOCK_ROWS - 1) / BLOCK_ROWS;
  u32 id[4];
#pragma unroll
  for (u32 j = 0; j < 4; j++) id[j] = p.target_ids && column + j < l.n ? p.target_ids[size_t(column) + j] : column + j;
  for (u32 i = threadIdx.x / 32; i < tile.tokens; i += blockDim.x / 32) {
    const size_t row = p.step ? p.first + size_t(tile.token + i) * p.step : tile.token + i;
    const float4 v = mul(mul(columns(tile, i), tile.scale[i]), p.multiplier);
    float logit[4] = {v.x, v.y, v.z, v.w};
    u64 best = 0;
#pragma unroll
    for (u32 j = 0; j < 4; j++) {
      if (p.cap != 0) logit[j] = __fmul_rn(p.cap, tanhf(__fdiv_rn(logit[j], p.cap)));
      if (p.add && column + j < l.n && id[j] < p.vocab) {
        logit[j] = __fadd_rn(p.logits[row * p.vocab + id[j]], logit[j]);
      }
      if (column + j >= p.ids) logit[j] = __uint_as_float(0xff800000u);
      if (column + j < l.n) best = max(best, logit_key(logit[j], id[j]));
    }
    if (p.logits) {
      float* to = p.logits + row * p.vocab;
      if (!p.target_ids && l.n % 4 == 0) {
        const float4 four = make_float4(logit[0], logit[1], logit[2], logit[3]);
        if (column < l.n) as<float4>(to + column) = four;
      } else {
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
          if (column + j < l.n && id[j] < p.vocab) to[id[j]] = logit[j];
        }
      }
    }
    for (int flip = 16; flip > 0; flip /= 2) best = max(best, __shfl_xor_sync(0xffffffffu, best, flip));
    if (lane == 0) p.best[row * blocks + tile.row / BLOCK_ROWS] = best;
  }
}
