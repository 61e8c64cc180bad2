// Integer weights of a row's tokens, their order, the radix selection of its best and the noise, for blocks of 512
// threads: `Tables`, `survivors` and `philox` of src/spec/sampling.rs. Sums are of integers and orders total, so nothing depends on how the work is split.
#pragma once
#include "common/numbers.cuh"

namespace {

constexpr u32 THREADS = 512, WARPS = THREADS / 32, AHEAD = 2;
constexpr u32 TLO = 256, RLOG = 512, TABLE_WORDS = 4612;  // the last 3 are padding
constexpr u32 BINS = 2048;

// A token's place in the order (logit descending, id ascending): smaller is better. `t`, of which the weight is a
// function, ascends as logits descend; it comes first because its digits spread over the bins where those of a float
// do not.
struct Rank {
  u32 t, inverse, id;
};

struct Memory {
  const u32* tables;  // [TABLE_WORDS] thi, tlo, rlog
  u64* bins;          // [BINS]
  u64* words;         // [WARPS]
  u64* found;         // [3]: digit, what of the goal is left for it, what it has
};

// `ascending` backwards.
WRAPPER float logit_of(u32 ascending) { return __uint_as_float(ascending >> 31 ? ascending ^ 1u << 31 : ~ascending); }

// The exponent of a weight, in units of 2^-16; the bound also catches infinity and NaN.
WRAPPER u32 exponent(float max, float logit, float c) {
  return __float2uint_rz(fminf(rintf(__fmul_rn(__fsub_rn(max, logit), c)), float(40 << 16)));
}
WRAPPER u64 weight(const u32* tables, u32 t) {
  return u64(lds(tables + (t >> 8 & 255))) * lds(tables + TLO + (t & 255)) >> 30 >> (t >> 16);
}
WRAPPER u32 race_time(const u32* tables, u32 u) {
  u = max(u, 2u);
  const u32 zeros = u32(__clz(int(u))), mantissa = u << zeros & 0x7fffffff;
  const u32 from = lds(tables + RLOG + (mantissa >> 19)), to = lds(tables + RLOG + (mantissa >> 19) + 1);
  return (zeros << 27) + from - u32(u64(from - to) * (mantissa & 0x7ffff) >> 19);
}

WRAPPER uint4 philox(uint4 c, u32 k0, u32 k1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    c = make_uint4(__umulhi(0xCD9E8D57u, c.z) ^ c.y ^ k0, 0xCD9E8D57u * c.z, __umulhi(0xD2511F53u, c.x) ^ c.w ^ k1,
                   0xD2511F53u * c.x);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The largest key of a row; every thread has it.
WRAPPER u64 best_key(const u64* best, u32 blocks, u64* words) {
  u64 most = 0;
  for (u32 i = threadIdx.x; i < blocks; i += THREADS) most = max(most, ld(best + i));
  for (int flip = 16; flip; flip /= 2) most = max(most, __shfl_xor_sync(~0u, most, flip));
  if (threadIdx.x % 32 == 0) sts(words + threadIdx.x / 32, most);
  __syncthreads();
  for (u32 w = 0; w < WARPS; w++) most = max(most, lds(words + w));
  return most;
}

// Whether a row's best key is of a token of the vocabulary and of a finite logit; a NaN is not, nor are all ones.
WRAPPER bool is_sound(u64 key, u32 vocab) {
  const u32 top = u32(key >> 32);
  return ~u32(key) < vocab && top > ascending(__uint_as_float(0xff800000u)) &&
         top < ascending(__uint_as_float(0x7f800000u));
}

// The logits of ids 4 group .. 4 group + 3; beyond the vocabulary they are -inf.
WRAPPER float4 load4(const float* logits, u32 vocab, u32 group) {
  const float none = __uint_as_float(0xff800000u);
  const u32 id = group * 4;
  if (vocab % 4 == 0) return ld(reinterpret_cast<const float4*>(logits + id));
  float4 v = make_float4(none, none, none, none);
  v.x = ld(logits + id);
  if (id + 1 < vocab) v.y = ld(logits + id + 1);
  if (id + 2 < vocab) v.z = ld(logits + id + 2);
  if (id + 3 < vocab) v.w = ld(logits + id + 3);
  return v;
}

// Calls f(group, its logits) for this thread's share of groups first..end.
template <class F>
WRAPPER void each_group(const float* logits, u32 vocab, u32 first, u32 end, F f) {
  for (u32 group = first + threadIdx.x; group < end; group += THREADS * AHEAD) {
    float4 v[AHEAD];
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
      if (group + a * THREADS < end) v[a] = load4(logits, vocab, group + a * THREADS);
    }
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
      if (group + a * THREADS < end) f(group + a * THREADS, v[a]);
    }
  }
}

WRAPPER bool within(const Rank& rank, const Rank& limit) {
  if (rank.t != limit.t) return rank.t < limit.t;
  if (rank.inverse != limit.inverse) return rank.inverse < limit.inverse;
  return rank.id <= limit.id;
}

// The rank of the last token that a cut keeps among those within `limit`: the first whose prefix has `amount` tokens,
// or that share of the mass. Digit by digit: the mass (or number) of tokens per digit, then the digit in which the goal
// is reached. From the third on all tokens still in question weigh the same and are counted.
WRAPPER Rank cut(bool mass, u32 amount, const float* logits, u32 vocab, float max_logit, float c, Rank limit,
                 const Memory& m) {
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Rank prefix = {0, 0, 0}, mask = {0, 0, 0};
  u64 goal = 0;
  for (u32 level = 0; level < 8; level++) {
    const u32 shift = level == 0 ? 11 : level == 2 ? 21 : level == 3 ? 10 : level == 5 ? 15 : level == 6 ? 4 : 0;
    const u32 digits = level == 4 ? 1023 : level == 7 ? 15 : 2047;
    const bool weigh = mass && level < 2;
    for (u32 i = 0; i < 4; i++) sts(m.bins + threadIdx.x * 4 + i, u64(0));
    __syncthreads();
    // Neighbours often share a bin: what goes to the same one in turn is added up before.
    u32 held = 0;
    u64 sum = 0;
    each_group(logits, vocab, 0, (vocab + 3) / 4, [&](u32 group, float4 v) {
      const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        const Rank rank = {exponent(max_logit, four[i], c), ~ascending(four[i]), group * 4 + i};
        const u64 w = weight(m.tables, rank.t);
        const bool counts = w && rank.id < vocab && (rank.t & mask.t) == prefix.t &&
                            (rank.inverse & mask.inverse) == prefix.inverse && (rank.id & mask.id) == prefix.id &&
                            within(rank, limit);
        if (!counts) continue;
        const u32 digit = (level < 2 ? rank.t : level < 5 ? rank.inverse : rank.id) >> shift & digits;
        if (digit != held) {
          if (sum) atomicAdd(m.bins + held, sum);
          held = digit, sum = 0;
        }
        sum += weigh ? w : 1;
      }
    });
    if (sum) atomicAdd(m.bins + held, sum);
    __syncthreads();

    u64 four[4], own = 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) own += four[i] = lds(m.bins + threadIdx.x * 4 + i);
    u64 through = own;  // of this warp's bins up to this thread's
    for (u32 by = 1; by < 32; by *= 2) {
      const u64 before = __shfl_up_sync(~0u, through, by);
      if (lane >= by) through += before;
    }
    if (lane == 31) sts(m.words + warp, through);
    __syncthreads();
    u64 before = through - own, total = 0;
    for (u32 w = 0; w < WARPS; w++) {
      if (w == warp) before += total;
      total += lds(m.words + w);
    }
    if (level == 0) {
      // Rounded up; the product has up to 90 bits.
      const u64 low = total * amount;
      const u64 need = (__umul64hi(total, amount) << 32) + (low >> 32) + (u32(low) != 0);
      goal = mass ? max(need, u64(1)) : amount;
      if (mass ? total == 0 : total <= goal) return limit;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      if (before < goal && goal <= before + four[i]) {
        sts(m.found, u64(threadIdx.x * 4 + i));
        sts(m.found + 1, goal - before);
        sts(m.found + 2, four[i]);
      }
      before += four[i];
    }
    __syncthreads();
    const u32 digit = u32(lds(m.found)) & digits;
    goal = lds(m.found + 1);
    u64 size = lds(m.found + 2);
    // Fields have no bits above their first digit's.
    if (level < 2) {
      prefix.t |= digit << shift, mask.t = ~0u << shift;
    } else if (level < 5) {
      prefix.inverse |= digit << shift, mask.inverse = ~0u << shift;
    } else {
      prefix.id |= digit << shift, mask.id = ~0u << shift;
    }
    if (level == 1) {
      const u64 w = max(weight(m.tables, prefix.t), u64(1));
      if (mass) goal = (goal + w - 1) / w, size /= w;
    }
    if ((level > 0 || !mass) && goal == size) break;
  }
  // All of a prefix, but no more than there was before.
  const Rank last = {prefix.t | ~mask.t, prefix.inverse | ~mask.inverse, prefix.id | ~mask.id};
  return within(last, limit) ? last : limit;
}

}  // namespace
