// Distributions of rows and the chances of a round: what kernels that draw and judge share. Probabilities are integers that add up
// to 2^48 in each row. `Probabilities` and `PhiloxStream` of src/spec/verify.rs.
#pragma once
#include "spec/sampling_weights.cuh"
#include "common/state.cuh"

namespace {

constexpr u64 ONE = 1ull << 48;
constexpr u32 MOST_ROWS = 64;
// Purposes of Philox counters.
constexpr u32 DRAFT = 2, ACCEPT = 3, RESIDUAL = 4;

// A row's distribution: the weight W of a token that the filters leave is the probability W 2^up inverse / 2^64, rounded down;
// what is left over is the rounding_token's. Mirrored by src/gpu/kernels/rules.rs.
struct __align__(16) RowDistribution {
  float max, c;
  u32 min_p, up;
  Rank limit;   // the last token that the cuts keep
  u32 rounding_token;     // the best token; NONE: there is no distribution
  u64 inverse, left;
};
static_assert(sizeof(RowDistribution) == 48, "src/gpu/kernels/rules.rs counts on it");

// Where a round's chances come from.
struct PhiloxStream {
  u32 key[2], stream, round, anchor;
};
WRAPPER PhiloxStream dice_of(const Sequence* s) {
  return {{ld(s->seed), ld(s->seed + 1)}, ld(&s->stream), ld(&s->rounds) + 1, ld(&s->now.length)};
}
WRAPPER u64 bits(const PhiloxStream& d, u32 purpose, u32 depth, u32 row) {
  const uint4 drawn = philox(make_uint4(d.anchor + depth, purpose << 24 | row, d.stream, d.round), d.key[0], d.key[1]);
  return u64(drawn.x) << 32 | drawn.y;
}
WRAPPER bool accept(const PhiloxStream& d, u32 depth, u32 row, u64 s, u64 n) {
  return s >= n || __umul64hi(bits(d, ACCEPT, depth, row), n) < s;
}

WRAPPER RowDistribution ld_law(const RowDistribution* from) {
  const uint4 a = ld128(from), b = ld128(reinterpret_cast<const uint4*>(from) + 1);
  const uint4 c = ld128(reinterpret_cast<const uint4*>(from) + 2);
  return {__uint_as_float(a.x), __uint_as_float(a.y), a.z, a.w, {b.x, b.y, b.z}, b.w, u64(c.y) << 32 | c.x,
          u64(c.w) << 32 | c.z};
}
WRAPPER void st_law(RowDistribution* to, const RowDistribution& distribution) {
  uint4* words = reinterpret_cast<uint4*>(to);
  st128(words, make_uint4(__float_as_uint(distribution.max), __float_as_uint(distribution.c), distribution.min_p, distribution.up));
  st128(words + 1, make_uint4(distribution.limit.t, distribution.limit.inverse, distribution.limit.id, distribution.rounding_token));
  st128(words + 2, make_uint4(u32(distribution.inverse), u32(distribution.inverse >> 32), u32(distribution.left), u32(distribution.left >> 32)));
}

// The weight of a token, 0 where a filter takes it.
WRAPPER u64 kept_weight(const RowDistribution& distribution, const u32* tables, float logit, u32 id) {
  const Rank rank = {exponent(distribution.max, logit, distribution.c), ~ascending(logit), id};
  const u64 w = weight(tables, rank.t);
  return w >= distribution.min_p && within(rank, distribution.limit) ? w : 0;
}

// The probability of a token below the vocabulary's size. The shift keeps 64 bits where the distribution is garbage.
WRAPPER u64 probability(const RowDistribution& distribution, const u32* tables, float logit, u32 id) {
  const u64 p = __umul64hi(kept_weight(distribution, tables, logit, id) << (distribution.up & 63), distribution.inverse);
  return p + (id == distribution.rounding_token ? distribution.left : 0);
}
WRAPPER u64 probability_at(const RowDistribution& distribution, const u32* tables, const float* logits, u32 vocab, u32 id) {
  return id < vocab ? probability(distribution, tables, ld(logits + id), id) : 0;
}

// floor(a b / 2^48), below 2^64.
WRAPPER u64 times(u64 a, u64 b) { return __umul64hi(a, b) << 16 | a * b >> 48; }

// What of a is beyond b.
WRAPPER u64 beyond(u64 a, u64 b) { return a > b ? a - b : 0; }

// min(2^48, floor(a b / n)) of three up to 2^48; 0 for n = 0. 16 bits of the quotient at a time: no step exceeds 64.
WRAPPER u64 ratio(u64 a, u64 b, u64 n) {
  if (n == 0) return 0;
  u64 rest = times(a, b), quotient = 0;
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

// floor(2^112 / n) for an n from 2^63 on.
WRAPPER u64 inverse_of(u64 n) {
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

// The sum over the block; every thread has it. `words` may be written again once all threads have passed another
// barrier.
WRAPPER u64 block_sum(u64 own, u64* words) {
  for (int flip = 16; flip; flip /= 2) own += __shfl_xor_sync(~0u, own, flip);
  if (threadIdx.x % 32 == 0) sts(words + threadIdx.x / 32, own);
  __syncthreads();
  u64 sum = 0;
  for (u32 w = 0; w < WARPS; w++) sum += lds(words + w);
  return sum;
}

struct Four {
  u64 w[4];
};

// An id, with the probability of its share of the weights f(group) of ids 4 group .. 4 group + 3; NONE where they add
// up to 0. The goal is looked for in the sums of the warps' shares, then within one share, until a warp holds it.
template <class F>
WRAPPER u32 pick(u32 vocab, u64 bits, u64* words, F f) {
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 first = 0, end = (vocab + 3) / 4;
  u64 at = 0;
  for (bool begun = false; !begun || end - first > 32; begun = true) {
    const u32 share = ((end - first + WARPS - 1) / WARPS + 31) / 32 * 32;
    const u32 from = min(first + warp * share, end), to = min(from + share, end);
    u64 sum = 0;
#pragma unroll 2
    for (u32 group = from + lane; group < to; group += 32) {
      const Four four = f(group);
      sum += four.w[0] + four.w[1] + four.w[2] + four.w[3];
    }
    __syncthreads();
    const u64 total = block_sum(sum, words);
    if (!begun) {
      if (total == 0) return NONE;
      at = __umul64hi(bits, total);
    }
    u32 w = 0;
    for (; w < WARPS - 1 && at >= lds(words + w); w++) at -= lds(words + w);
    first = min(first + w * share, end);
    end = min(first + share, end);
  }
  const Four four = first + lane < end ? f(first + lane) : Four{{0, 0, 0, 0}};
  const u64 own = four.w[0] + four.w[1] + four.w[2] + four.w[3];
  u64 through = own;
  for (u32 by = 1; by < 32; by *= 2) {
    const u64 before = __shfl_up_sync(~0u, through, by);
    if (lane >= by) through += before;
  }
  const u32 beyond = __ballot_sync(~0u, at < through);
  u64 rest = at - (through - own);
  u32 i = 0;
#pragma unroll
  for (u32 next = 0; next < 3; next++) {
    if (i == next && rest >= four.w[next]) rest -= four.w[next], i++;
  }
  const u32 id = (first + lane) * 4 + i;
  return beyond ? __shfl_sync(~0u, id, __ffs(int(beyond)) - 1) : NONE;
}

// The target's distribution of a row, and the one that its next draft was drawn from; with both rows of logits.
struct Pair {
  RowDistribution p, q;
  const float *target, *draft;  // [vocab]
};

// Of tokens 4 group .. 4 group + 3, what f makes of p and q; 0 beyond the vocabulary.
template <class F>
WRAPPER Four of_both(const Pair& rows, const u32* table, u32 vocab, u32 group, F f) {
  const float4 a = load4(rows.target, vocab, group), b = load4(rows.draft, vocab, group);
  const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
  Four made;
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    const u32 id = group * 4 + i;
    made.w[i] = 0;
    if (id < vocab) made.w[i] = f(probability(rows.p, table, as[i], id), probability(rows.q, table, bs[i], id));
  }
  return made;
}

// The sum of f(p, q) over all tokens; every thread has it.
template <class F>
WRAPPER u64 sum_of_both(const Pair& rows, const u32* table, u32 vocab, u64* words, F f) {
  u64 sum = 0;
  for (u32 group = threadIdx.x; group < (vocab + 3) / 4; group += THREADS) {
    const Four four = of_both(rows, table, vocab, group, f);
    sum += four.w[0] + four.w[1] + four.w[2] + four.w[3];
  }
  return block_sum(sum, words);
}

// A token of a distribution.
WRAPPER u32 pick_of(const RowDistribution& distribution, const u32* table, const float* logits, u32 vocab, u64 bits, u64* words) {
  return pick(vocab, bits, words, [&](u32 group) {
    const float4 v = load4(logits, vocab, group);
    const float four[4] = {v.x, v.y, v.z, v.w};
    Four p;
#pragma unroll
    for (u32 i = 0; i < 4; i++) p.w[i] = group * 4 + i < vocab ? probability(distribution, table, four[i], group * 4 + i) : 0;
    return p;
  });
}

// How many of a sequence's g drafts stand as a block, told to the last of its blocks 0 .. g to come here, and NONE to the
// others. What row `at` has in common with its draft's distribution is in sums[at], of thread 0; share(at) is what of the first
// `at` drafts is to be emitted, and of more than `most` nothing. `found` has two words.
template <class F>
WRAPPER u32 stands_of(const PhiloxStream& dice, const u64* sums, u32* counter, u32 g, u32 most, u32* found, F share) {
  if (threadIdx.x == 0) {
    __threadfence();
    sts(found, atomicAdd(counter, 1u));
  }
  __syncthreads();
  if (lds(found) != g) return NONE;
  __threadfence();
  if (threadIdx.x == 0) {
    st(counter, 0u);
    u32 at = most;
    for (; at > 0; at--) {
      const u64 here = share(at), both = at < g && here < ONE ? ld_cg(sums + at) : 0;
      if (here == ONE && at < g) break;
      if (accept(dice, at, at, here - both, ONE - both)) break;
    }
    sts(found + 1, at);
  }
  __syncthreads();
  return lds(found + 1);
}

WRAPPER void load_tables(u32* to, const u32* tables) {
  for (u32 i = threadIdx.x; i < 512 / 4; i += THREADS) sts128(to + i * 4, ld_stream(tables + i * 4));
}

}  // namespace
