// Probability distributions of rows and the random numbers of a round, for the kernels that sample and verify
// drafts. Probabilities are integers that sum to exactly 2^48 in each row. src/spec/distribution.rs, rng.rs
// and verify.rs compute the same values on the CPU, bit for bit.
#pragma once
#include "common/last_block.cuh"
#include "common/state.cuh"
#include "spec/sampling_weights.cuh"

namespace {

constexpr u64 ONE = 1ull << 48;  // probability 1
constexpr u32 MAX_ROWS = 64;
// Purposes of random numbers: the top byte of the second word of the Philox counter.
constexpr u32 DRAFT = 2, ACCEPT = 3, RESIDUAL = 4;

// A row's distribution, as the parameters that turn its logits into probabilities. A token of weight W that
// passes the filters has probability floor(W 2^shift inverse / 2^64). These sum to at most 2^48; the rounding
// token receives the remainder. src/gpu/kernels/rejection.rs allocates and passes it.
struct __align__(16) RowDistribution {
  float max_logit, c;     // c: 65536 log2(e) / temperature; 0: greedy
  u32 min_weight, shift;  // min_weight: the min-p threshold
  Rank limit;             // the last token that top-k and top-p keep
  u32 rounding_token;     // the best token; NONE: the row is invalid and has no distribution
  u64 inverse, remainder;
};
static_assert(sizeof(RowDistribution) == 48, "src/gpu/kernels/rejection.rs allocates 48 bytes per row");

// The Philox key and counter fields that are constant in one round of a sequence.
struct PhiloxStream {
  u32 key[2], stream, round, anchor;  // anchor: its position
};
DEVICE PhiloxStream philox_stream(const Sequence* state) {
  const u32* key = state->seed;
  return {{key[0], key[1]}, state->stream, state->rounds + 1, state->now.length};
}
// 64 random bits. No two draws of a round share (purpose, depth, row).
DEVICE u64 random_bits(const PhiloxStream& stream, u32 purpose, u32 depth, u32 row) {
  const uint4 words = philox(make_uint4(stream.anchor + depth, purpose << 24 | row, stream.stream, stream.round),
                             stream.key[0], stream.key[1]);
  return u64(words.x) << 32 | words.y;
}
// True with probability min(1, numerator / denominator).
DEVICE bool accept(const PhiloxStream& stream, u32 depth, u32 row, u64 numerator, u64 denominator) {
  return numerator >= denominator || __umul64hi(random_bits(stream, ACCEPT, depth, row), denominator) < numerator;
}

DEVICE RowDistribution ld_distribution(const RowDistribution* from) {
  const uint4* words = reinterpret_cast<const uint4*>(from);
  const uint4 a = words[0], b = words[1], c = words[2];
  return {__uint_as_float(a.x), __uint_as_float(a.y), a.z, a.w, {b.x, b.y, b.z}, b.w, u64(c.y) << 32 | c.x,
          u64(c.w) << 32 | c.z};
}
DEVICE void st_distribution(RowDistribution* to, const RowDistribution& d) {
  uint4* words = reinterpret_cast<uint4*>(to);
  words[0] = make_uint4(__float_as_uint(d.max_logit), __float_as_uint(d.c), d.min_weight, d.shift);
  words[1] = make_uint4(d.limit.exponent, d.limit.inverted_logit, d.limit.id, d.rounding_token);
  words[2] = make_uint4(u32(d.inverse), u32(d.inverse >> 32), u32(d.remainder), u32(d.remainder >> 32));
}

// A token's weight after filtering; 0 if a filter removes the token.
DEVICE u64 filtered_weight(const RowDistribution& d,
                           const u32* tables,  // [512] thi and tlo, shared
                           float logit, u32 id) {
  const Rank rank = {weight_exponent(d.max_logit, logit, d.c), ~ascending(logit), id};
  const u64 w = weight(tables, rank.exponent);
  return w >= d.min_weight && within(rank, d.limit) ? w : 0;
}

// The probability of a token of the vocabulary. The mask keeps the shift below 64 for invalid distributions.
DEVICE u64 probability(const RowDistribution& d,
                       const u32* tables,  // [512] shared
                       float logit, u32 id) {
  const u64 p = __umul64hi(filtered_weight(d, tables, logit, id) << (d.shift & 63), d.inverse);
  return p + (id == d.rounding_token ? d.remainder : 0);
}
// The same for any id; 0 outside the vocabulary.
DEVICE u64 probability_at(const RowDistribution& d,
                          const u32* tables,    // [512] shared
                          const float* logits,  // [vocab]
                          u32 vocab, u32 id) {
  return id < vocab ? probability(d, tables, logits[id], id) : 0;
}

// The product of two probabilities: floor(a b / 2^48), which must be below 2^64.
DEVICE u64 mul_probability(u64 a, u64 b) { return __umul64hi(a, b) << 16 | a * b >> 48; }

// max(a - b, 0)
DEVICE u64 saturating_sub(u64 a, u64 b) { return a > b ? a - b : 0; }

// min(2^48, floor(a b / n)) for a, b and n up to 2^48; 0 for n = 0. Long division, 16 bits of the quotient
// per step, so that no intermediate exceeds 64 bits.
DEVICE u64 mul_div(u64 a, u64 b, u64 n) {
  if (n == 0) return 0;
  u64 rest = mul_probability(a, b), quotient = 0;
  const u64 low = a * b & (ONE - 1);
  if (rest >= n) return ONE;
#pragma unroll 1
  for (int shift = 32; shift >= 0; shift -= 16) {
    const u64 part = rest << 16 | (low >> shift & 0xffff), digit = part / n;
    rest = part - digit * n;
    quotient = quotient << 16 | digit;
  }
  return quotient;
}

// floor(2^112 / n) for n >= 2^63.
DEVICE u64 reciprocal(u64 n) {
  u64 rest = 1ull << 63, quotient = 0;
  for (u32 bit = 0; bit < 50; bit++) {
    if (bit) {
      const bool over = rest >> 63;
      rest = rest << 1;
      quotient <<= 1;
      if (over || rest >= n) rest -= n, quotient |= 1;
    } else if (rest >= n) {
      rest -= n, quotient = 1;
    }
  }
  return quotient;
}

// Weights of four consecutive ids.
struct Weights4 {
  u64 w[4];
};

// Samples an id with probability proportional to its weight, given 64 random bits: the first id in ascending
// order whose cumulative weight exceeds floor(bits total / 2^64). f(group) returns the weights of ids 4 group
// to 4 group + 3. Returns NONE if all weights are 0. Each pass splits the range over the warps and continues
// with the part that holds the result, until one warp covers the range.
template <class F>
DEVICE u32 sample_weights(u32 vocab, u64 bits,
                          u64* warp_sums,  // [WARPS] shared
                          F f) {
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 first = 0, end = (vocab + 3) / 4;
  u64 at = 0;  // cumulative weight to find, relative to `first`
  for (bool begun = false; !begun || end - first > 32; begun = true) {
    const u32 part = ((end - first + WARPS - 1) / WARPS + 31) / 32 * 32;
    const u32 from = min(first + warp * part, end), to = min(from + part, end);
    u64 sum = 0;
#pragma unroll 2
    for (u32 group = from + lane; group < to; group += 32) {
      const Weights4 four = f(group);
      sum += four.w[0] + four.w[1] + four.w[2] + four.w[3];
    }
    __syncthreads();
    const u64 total = block_sum(sum, warp_sums);
    if (!begun) {
      if (total == 0) return NONE;
      at = __umul64hi(bits, total);
    }
    u32 w = 0;
    for (; w < WARPS - 1 && at >= warp_sums[w]; w++) at -= warp_sums[w];
    first = min(first + w * part, end);
    end = min(first + part, end);
  }
  const Weights4 four = first + lane < end ? f(first + lane) : Weights4{{0, 0, 0, 0}};
  const u64 own = four.w[0] + four.w[1] + four.w[2] + four.w[3];
  u64 inclusive = own;
  for (u32 by = 1; by < 32; by *= 2) {
    const u64 lower = __shfl_up_sync(~0u, inclusive, by);
    if (lane >= by) inclusive += lower;
  }
  const u32 beyond = __ballot_sync(~0u, at < inclusive);
  u64 rest = at - (inclusive - own);
  u32 i = 0;
#pragma unroll
  for (u32 next = 0; next < 3; next++) {
    if (i == next && rest >= four.w[next]) rest -= four.w[next], i++;
  }
  const u32 id = (first + lane) * 4 + i;
  return beyond ? __shfl_sync(~0u, id, __ffs(int(beyond)) - 1) : NONE;
}

// The target's distribution p after a row, and the drafter's distribution q for the draft after that row.
struct RowPair {
  RowDistribution p, q;
  const float *target_logits, *draft_logits;  // [vocab]
};

// f(p(x), q(x)) for x from 4 group to 4 group + 3; 0 outside the vocabulary.
template <class F>
DEVICE Weights4 map_pair(const RowPair& rows,
                         const u32* table,  // [512] shared
                         u32 vocab, u32 group, F f) {
  const float4 a = load4(rows.target_logits, vocab, group), b = load4(rows.draft_logits, vocab, group);
  const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
  Weights4 mapped;
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    const u32 id = group * 4 + i;
    mapped.w[i] = 0;
    if (id < vocab) mapped.w[i] = f(probability(rows.p, table, as[i], id), probability(rows.q, table, bs[i], id));
  }
  return mapped;
}

// The sum over the vocabulary of f(p(x), q(x)), returned to every thread.
template <class F>
DEVICE u64 sum_pair(const RowPair& rows,
                    const u32* table,  // [512] shared
                    u32 vocab,
                    u64* warp_sums,  // [WARPS] shared
                    F f) {
  u64 sum = 0;
  for (u32 group = threadIdx.x; group < (vocab + 3) / 4; group += THREADS) {
    const Weights4 four = map_pair(rows, table, vocab, group, f);
    sum += four.w[0] + four.w[1] + four.w[2] + four.w[3];
  }
  return block_sum(sum, warp_sums);
}

// Samples a token from a row's distribution.
DEVICE u32 sample_row(const RowDistribution& d,
                      const u32* table,     // [512] shared
                      const float* logits,  // [vocab]
                      u32 vocab, u64 bits,
                      u64* warp_sums) {  // [WARPS] shared
  return sample_weights(vocab, bits, warp_sums, [&](u32 group) {
    const float4 v = load4(logits, vocab, group);
    const float four[4] = {v.x, v.y, v.z, v.w};
    Weights4 p;
#pragma unroll
    for (u32 i = 0; i < 4; i++) p.w[i] = group * 4 + i < vocab ? probability(d, table, four[i], group * 4 + i) : 0;
    return p;
  });
}

// The acceptance tests of block verification (Sun et al., arXiv 2403.10444). CUDA blocks 0 to num_drafts of a
// sequence call it; the last one to arrive runs the tests and returns the number of accepted drafts, all
// others return NONE. prefix_weight(i) is w_i = min(1, w_{i-1} p / q). overlaps[i], written by thread 0 of
// CUDA block i, is sum_x min(w_i p_i(x), q_{i+1}(x)). A prefix of i drafts is accepted with probability
// (w_i - overlaps[i]) / (1 - overlaps[i]), with overlap 0 for i = num_drafts; longest first, from `longest`
// down.
template <class F>
DEVICE u32 accepted_prefix(const PhiloxStream& stream,
                           const u64* overlaps,  // [num_drafts]
                           u32* counter,         // [1]: zero; zero again afterwards
                           u32 num_drafts, u32 longest,
                           u32* scratch,  // [1] shared
                           F prefix_weight) {
  if (!is_last_block(num_drafts + 1, counter)) return NONE;
  if (threadIdx.x == 0) {
    u32 length = longest;
    for (; length > 0; length--) {
      const u64 w = prefix_weight(length), overlap = length < num_drafts && w < ONE ? ld_cg(overlaps + length) : 0;
      if (w == ONE && length < num_drafts) break;
      if (accept(stream, length, length, w - overlap, ONE - overlap)) break;
    }
    *scratch = length;
  }
  __syncthreads();
  return *scratch;
}

// Copies the tables thi and tlo to shared memory.
DEVICE void load_weight_tables(u32* to,              // [512] shared
                               const u32* tables) {  // [512]
  for (u32 i = threadIdx.x; i < 512 / 4; i += THREADS) as<uint4>(to + i * 4) = ld_stream(tables + i * 4);
}

}  // namespace
