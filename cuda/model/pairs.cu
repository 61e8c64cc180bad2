// The inputs of an EAGLE-3 drafter's layer (docs/drafters.md): pairs of the feature of a position and the token after
// it.
//
// Computes:      normalize_taps, in place: taps = rms_norm(taps; all_gain) over all taps of a position together, then
//                rms_norm(tap; its gain) over each. extend_pairs: for each pending feature f, and for each row of a
//                prompt: pair = bf16[rms_norm(scale E[token]; token_gain), rms_norm(f; feature_gain)]. The last pair of
//                a sequence that drafts gets the query; its residual x is f, or rms_norm(f) with norm_before_residual.
//                step_pairs: the pair of the draft before, one per sequence: f is x, which the layer left for the pair
//                before, or rms_norm(x; out_gain).
// Work:          grid (rows), of step_pairs (sequences); 512 threads, a warp per part of 128 columns, four a lane.
// Order:         squares: four columns ascending per lane, lanes by xor 16-8-4-2-1, parts ascending.
// Bytes:         per row hidden x (2 of f + 2 of E + 4 written), and both gains; step_pairs also x read, and written
//                unless it stays; normalize_taps: taps x hidden x 4, and the gains.
// Preconditions: hidden a multiple of 32; hidden, and taps x hidden in normalize_taps, at most 65536; block_size 2 to
//                64; depth 2 to block_size - 1; buffers 16-byte aligned. Tables and tokens may hold any value; E of a
//                token outside the vocabulary is 0.
#include "common/packed.cuh"
#include "common/state.cuh"
#include "spec/sampling_weights.cuh"

namespace {

constexpr u32 PART = 128, MAX_PARTS = 512;

// What both halves of a pair are made with.
struct Join {
  const u16* embeddings;      // [vocab][hidden] bf16: E, or packed (common/packed.cuh)
  const float* token_gain;    // [hidden]
  const float* feature_gain;  // [hidden]
  u32 hidden, vocab, packed, norm_before_residual;
  float scale, eps;
};
#define PARAMETERS_join                                                                                           \
  const u16 *embeddings, const float *token_gain, const float *feature_gain, u32 hidden, u32 vocab, u32 packed,  \
      u32 norm_before_residual, float scale, float eps
#define JOIN Join{embeddings, token_gain, feature_gain, hidden, vocab, packed, norm_before_residual, scale, eps}

DEVICE float4 four_bf16(const u16* from) {  // [4]
  const uint2 four = as<uint2>(from);
  return make_float4(low_f32(four.x), high_f32(four.x), low_f32(four.y), high_f32(four.y));
}

// 1 / rms of the n columns that `load` returns, four at a time.
template <class Load>
DEVICE float inverse_rms(u32 n, float eps,
                         float* sums,  // [MAX_PARTS] shared
                         Load load) {
  const u32 lane = threadIdx.x % 32, parts = (n + PART - 1) / PART;
  for (u32 part = threadIdx.x / 32; part < parts; part += WARPS) {
    const u32 column = part * PART + lane * 4;
    const float4 v = column < n ? load(column) : make_float4(0, 0, 0, 0);
    const float sum = lane_sum(sum_of_squares(v), 32);
    if (lane == 0) sums[part] = sum;
  }
  __syncthreads();
  float sum = 0;
  for (u32 part = 0; part < parts; part++) sum = __fadd_rn(sum, sums[part]);
  __syncthreads();
  return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(__fdiv_rn(sum, float(n)), eps)));
}

// Writes a pair and, if x is not null, its residual. A column of x is read by the thread that writes it.
template <class Feature>
DEVICE void write_pair(u16* pair,  // [2 hidden]
                       float* x,   // [hidden], or null
                       const Join& j, u32 token, float* sums, Feature feature) {
  const auto embedding = [&](u32 column) {
    if (token >= j.vocab) return make_float4(0, 0, 0, 0);
    const size_t chunk = j.packed ? packed_offset(token, column / 8, j.hidden) + column % 8
                                  : size_t(token) * j.hidden + column;
    return mul(four_bf16(j.embeddings + chunk), j.scale);
  };
  const float of_token = inverse_rms(j.hidden, j.eps, sums, embedding);
  const float of_feature = inverse_rms(j.hidden, j.eps, sums, feature);
  for (u32 column = threadIdx.x * 4; column < j.hidden; column += THREADS * 4) {
    const float4 f = feature(column), m = mul(mul(f, of_feature), as<float4>(j.feature_gain + column));
    const float4 e = mul(mul(embedding(column), of_token), as<float4>(j.token_gain + column));
    as<uint2>(pair + column) = pack4(e);
    as<uint2>(pair + j.hidden + column) = pack4(m);
    if (x) as<float4>(x + column) = j.norm_before_residual ? m : f;
  }
}

DEVICE void write_zeros(u16* pair, float* x, u32 hidden) {
  for (u32 column = threadIdx.x * 4; column < hidden; column += THREADS * 4) {
    as<uint4>(pair + column * 2) = make_uint4(0, 0, 0, 0);
    if (x) as<float4>(x + column) = make_float4(0, 0, 0, 0);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 2) normalize_taps(
    u16* features,           // [feature_rows][taps][hidden] bf16
    const u32* gather,       // [rows]: rows of features, none twice; others are skipped
    const float* all_gain,   // [taps][hidden], or null: no norm over all taps
    const float* tap_gains,  // [taps][hidden], or null: no norm over each
    u32 feature_rows, u32 taps, u32 hidden, float eps) {
  __shared__ __align__(16) float sums[MAX_PARTS];
  grid_launch();
  grid_wait();
  const u32 row = gather[blockIdx.x], all = taps * hidden;
  if (row >= feature_rows) return;
  u16* const own = features + size_t(row) * all;
  const float together = all_gain ? inverse_rms(all, eps, sums, [&](u32 at) { return four_bf16(own + at); }) : 1.0f;
  for (u32 first = 0; first < all; first += hidden) {
    const auto value = [&](u32 column) {
      const float4 v = four_bf16(own + first + column);
      return all_gain ? mul(mul(v, together), as<float4>(all_gain + first + column)) : v;
    };
    const float single = tap_gains ? inverse_rms(hidden, eps, sums, value) : 1.0f;
    for (u32 column = threadIdx.x * 4; column < hidden; column += THREADS * 4) {
      float4 v = value(column);
      if (tap_gains) v = mul(mul(v, single), as<float4>(tap_gains + first + column));
      as<uint2>(own + first + column) = pack4(v);
    }
  }
}

extern "C" __global__ void __launch_bounds__(512, 2) extend_pairs(
    u16* pairs,                 // [rows][2 hidden] bf16; zeros for padding
    Row* table,                 // [rows]: the rows with their queries
    Span* spans,                // [sequences]: of the queries
    float* x,                   // [sequences][hidden]
    const u16* features,        // [rows][hidden] bf16: f
    const u32* tokens,          // [token_rows]: of the last verification; of a prompt: token of each position
    const u32* gather,          // [rows]: row of `tokens` of each position
    const Row* rows,            // [2][sequences][block_size], as round_begin wrote them
    const Sequence* sequences,  // [sequences]; null: a prompt, whose row r has the token r + 1, and only pairs are
                                // written
    u32 token_rows, u32 block_size, PARAMETERS_join) {
  __shared__ __align__(16) float sums[MAX_PARTS];
  grid_launch();
  grid_wait();
  const u32 at = blockIdx.x, sequence = at / block_size, row = at % block_size;
  u32 token = NONE;
  float* residual = nullptr;
  bool exists = true;
  if (!sequences) {
    token = tokens[at + 1];
  } else {
    const Row own = rows[at];
    exists = own.sequence != NONE;
    const bool last = exists && (row + 1 == block_size || rows[at + 1].sequence == NONE);
    // Row 1 of the block is that of the first draft.
    const bool query = last && rows[gridDim.x + sequence * block_size + 1].sequence != NONE;
    const u32 next = exists && !last ? gather[at + 1] : NONE;
    if (next < token_rows) token = tokens[next];
    if (last) token = sequences[sequence].now.anchor;
    if (threadIdx.x == 0) table[at] = Row{own.sequence, own.position, own.slot, query ? sequence : NONE};
    // A sequence without pending features has a row of zeros.
    if (last || (!exists && row == 0)) {
      residual = x + size_t(sequence) * hidden;
      if (threadIdx.x == 0) spans[sequence] = Span{query ? own.position : 0, query};
    }
  }
  u16* const pair = pairs + size_t(at) * hidden * 2;
  if (!exists) {
    write_zeros(pair, residual, hidden);
    return;
  }
  const u16* const from = features + size_t(at) * hidden;
  write_pair(pair, residual, JOIN, token, sums, [&](u32 column) { return four_bf16(from + column); });
}

extern "C" __global__ void __launch_bounds__(512, 2) step_pairs(
    u16* pairs,             // [sequences][2 hidden] bf16; zeros for a sequence without this draft
    Row* table,             // [sequences]
    Span* spans,            // [sequences]
    float* x,               // [sequences][hidden], as the layer left it for the pair before; becomes the residual
    const float* out_gain,  // [hidden] of the norm of x, or null: none
    const u32* drafts,      // [sequences][block_size]; null: the best tokens
    const u64* best,        // [sequences][block_size][blocks], as in `sample`; not read with drafts
    const Row* rows,        // [sequences][block_size]: of the drafts, as round_begin wrote them
    u32 blocks, u32 block_size,
    u32 depth,              // of the draft that the pair predicts
    PARAMETERS_join) {
  __shared__ __align__(16) float sums[MAX_PARTS];
  __shared__ __align__(16) u64 warp_maxima[WARPS];
  grid_launch();
  grid_wait();
  const u32 sequence = blockIdx.x, at = sequence * block_size + depth;
  const Row row = rows[at];
  const bool exists = row.sequence != NONE;
  // A draft's row is at the position before it, its pair at the one before that.
  const u32 position = exists ? max(row.position, 1u) - 1 : 0;
  if (threadIdx.x == 0) {
    table[sequence] = exists ? Row{row.sequence, position, position, sequence} : Row{NONE, 0, NONE, NONE};
    spans[sequence] = Span{position, exists};
  }
  u16* const pair = pairs + size_t(sequence) * hidden * 2;
  float* const own = x + size_t(sequence) * hidden;
  if (!exists) {
    write_zeros(pair, nullptr, hidden);
    return;
  }
  u32 token;
  if (drafts) {
    token = drafts[at - 1];
  } else {
    const u64 key = best_key(best + size_t(at - 1) * blocks, blocks, warp_maxima);
    token = is_valid_key(key, vocab) ? ~u32(key) : NONE;
  }
  const auto output = [&](u32 column) { return as<float4>(own + column); };
  const float scale_out = out_gain ? inverse_rms(hidden, eps, sums, output) : 1.0f;
  // Without a norm x stays as it is.
  float* const residual = out_gain || norm_before_residual ? own : nullptr;
  write_pair(pair, residual, JOIN, token, sums, [&](u32 column) {
    const float4 v = output(column);
    return out_gain ? mul(mul(v, scale_out), as<float4>(out_gain + column)) : v;
  });
}
