// Integer token weights, the total order of tokens, radix selection for top-k and top-p, and Philox random
// numbers, for blocks of 512 threads. src/spec/sampling.rs and rng.rs compute the same values on the CPU, bit
// for bit. All sums are integer sums and all orders are total, so results do not depend on how the work is
// split.
#pragma once
#include "common/numbers.cuh"
#include "common/rows.cuh"

namespace {

constexpr u32 THREADS = 512, WARPS = THREADS / 32;
constexpr u32 LOADS_IN_FLIGHT = 2;  // 16-byte loads per thread
// Offsets into the sampler's tables, `Tables` of src/spec/rng.rs: thi at 0, tlo, rlog. The last 3 words are
// padding.
constexpr u32 TLO = 256, RLOG = 512, TABLE_WORDS = 4612;
constexpr u32 BINS = 2048;
constexpr u32 SLICE = 8192;  // ids per CUDA block where several share a row

// Sort key of a token in the order (logit descending, id ascending); smaller is better. `exponent` grows as
// the logit falls and determines the weight. It comes first because its digits spread over the histogram
// bins, which the digits of a float do not.
struct Rank {
  u32 exponent, inverted_logit, id;  // inverted_logit: ~ascending(logit)
};

// Shared memory of radix_select. Arrays that threads read in order are aligned to 16 bytes here and in the kernels, so
// that the compiler can load several elements at once.
struct SelectScratch {
  const u32* tables;  // [TABLE_WORDS] thi, tlo, rlog
  u64* bins;          // [BINS]
  u64* warp_sums;     // [WARPS]
  u64* selected;      // [3]: the selected digit, the amount still needed within it, the bin's total
};

// The inverse of `ascending`.
DEVICE float logit_from_ascending(u32 ascending) {
  return __uint_as_float(ascending >> 31 ? ascending ^ 1u << 31 : ~ascending);
}

// -log2 of a token's weight relative to the best token's, in units of 2^-16. `c` is 65536 log2(e) /
// temperature. The upper bound, at which the weight is 0, also catches
// infinity and NaN.
DEVICE u32 weight_exponent(float max_logit, float logit, float c) {
  return __float2uint_rz(fminf(rintf(__fmul_rn(__fsub_rn(max_logit, logit), c)), float(40 << 16)));
}

// 2^(32 - exponent / 2^16) as an integer; 2^32 for the best token.
DEVICE u64 weight(const u32* tables, u32 exponent) {
  return u64(tables[exponent >> 8 & 255]) * tables[TLO + (exponent & 255)] >> 30 >> (exponent >> 16);
}

// The exponential variate -log2(u / 2^32) in units of 2^-27, by linear interpolation in rlog.
DEVICE u32 race_time(const u32* tables, u32 u) {
  u = max(u, 2u);
  const u32 zeros = u32(__clz(int(u))), mantissa = u << zeros & 0x7fffffff;
  const u32 from = tables[RLOG + (mantissa >> 19)], to = tables[RLOG + (mantissa >> 19) + 1];
  return (zeros << 27) + from - u32(u64(from - to) * (mantissa & 0x7ffff) >> 19);
}

// Philox4x32-10.
DEVICE uint4 philox(uint4 counter, u32 key0, u32 key1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    counter = make_uint4(__umulhi(0xCD9E8D57u, counter.z) ^ counter.y ^ key0, 0xCD9E8D57u * counter.z,
                         __umulhi(0xD2511F53u, counter.x) ^ counter.w ^ key1, 0xD2511F53u * counter.x);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// The sum over the block, returned to every thread. `warp_sums` may be overwritten after one more barrier.
DEVICE u64 block_sum(u64 own, u64* warp_sums) {  // [WARPS] shared
  for (int flip = 16; flip; flip /= 2) own += __shfl_xor_sync(~0u, own, flip);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = own;
  __syncthreads();
  u64 sum = 0;
  for (u32 w = 0; w < WARPS; w++) sum += warp_sums[w];
  return sum;
}

// The largest of the warp's keys, returned to every lane: two reductions of words instead of ten shuffles.
DEVICE u64 warp_max_key(u64 own) {
  const u32 high = __reduce_max_sync(~0u, u32(own >> 32));
  return u64(high) << 32 | __reduce_max_sync(~0u, u32(own >> 32) == high ? u32(own) : 0u);
}

// The largest of the block's keys, returned to every thread. `warp_maxima` may be overwritten after one more barrier.
DEVICE u64 block_max_key(u64 own, u64* warp_maxima) {  // [WARPS] shared
  own = warp_max_key(own);
  if (threadIdx.x % 32 == 0) warp_maxima[threadIdx.x / 32] = own;
  __syncthreads();
  for (u32 w = 0; w < WARPS; w++) own = max(own, warp_maxima[w]);
  return own;
}

// The largest of a row's keys, returned to every thread. The LM head writes one key per block of ids: logit_key of the
// best token.
DEVICE u64 best_key(const u64* best,  // [blocks]
                    u32 blocks,
                    u64* warp_maxima) {  // [WARPS] shared
  u64 largest = 0;
  for (u32 i = threadIdx.x; i < blocks; i += THREADS) largest = max(largest, best[i]);
  return block_max_key(largest, warp_maxima);
}

// Whether a row's best key names a token of the vocabulary and a finite logit. False for NaN and
// for all ones.
DEVICE bool is_valid_key(u64 key, u32 vocab) {
  const u32 top = u32(key >> 32);
  return ~u32(key) < vocab && top > ascending(__uint_as_float(0xff800000u)) &&
         top < ascending(__uint_as_float(0x7f800000u));
}

// The logits of ids 4 group to 4 group + 3; -inf for ids outside the vocabulary.
DEVICE float4 load4(const float* logits,  // [vocab]
                    u32 vocab, u32 group) {
  const float none = __uint_as_float(0xff800000u);
  const u32 id = group * 4;
  logits += id;
  if (vocab % 4 == 0) return as<float4>(logits);
  float4 v = make_float4(none, none, none, none);
  v.x = logits[0];
  if (id + 1 < vocab) v.y = logits[1];
  if (id + 2 < vocab) v.z = logits[2];
  if (id + 3 < vocab) v.w = logits[3];
  return v;
}

// The groups of four ids that a row's tokens are in: all of them, or those of some blocks of the LM head.
struct Groups {
  u32 count;
  const u32* blocks;  // [count / 32] shared: blocks of 128 ids; null: groups 0 to count - 1
};
DEVICE Groups all_groups(u32 vocab) { return {(vocab + 3) / 4, nullptr}; }

// Calls f(group, the group's logits) for those of the groups with index first..end that this thread
// processes.
template <class F>
DEVICE void for_each_group(const float* logits,  // [vocab]
                           u32 vocab, const Groups& groups, u32 first, u32 end, F f) {
  for (u32 index = first + threadIdx.x; index < end; index += THREADS * LOADS_IN_FLIGHT) {
    float4 v[LOADS_IN_FLIGHT];
    u32 group[LOADS_IN_FLIGHT];
#pragma unroll
    for (u32 a = 0; a < LOADS_IN_FLIGHT; a++) {
      const u32 i = index + a * THREADS;
      group[a] = NONE;
      if (i < end) group[a] = groups.blocks ? groups.blocks[i / 32] * 32 + i % 32 : i;
      if (group[a] < (vocab + 3) / 4) v[a] = load4(logits, vocab, group[a]);
    }
#pragma unroll
    for (u32 a = 0; a < LOADS_IN_FLIGHT; a++) {
      if (group[a] < (vocab + 3) / 4) f(group[a], v[a]);
    }
  }
}

// The sum of the weights of a row's groups first..end, returned to every thread.
DEVICE u64 sum_of_weights(const float* logits,  // [vocab]
                          u32 vocab, u32 first, u32 end, float max_logit, float c,
                          const u32* tables,  // [512] thi and tlo, shared
                          u64* warp_sums) {   // [WARPS] shared
  u64 sum = 0;
  for_each_group(logits, vocab, all_groups(vocab), first, end, [&](u32, float4 v) {
    const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) sum += weight(tables, weight_exponent(max_logit, four[i], c));
  });
  return block_sum(sum, warp_sums);
}

// Whether `rank` is at or before `limit` in the order.
DEVICE bool within(const Rank& rank, const Rank& limit) {
  if (rank.exponent != limit.exponent) return rank.exponent < limit.exponent;
  if (rank.inverted_logit != limit.inverted_logit) return rank.inverted_logit < limit.inverted_logit;
  return rank.id <= limit.id;
}

// No token has this rank.
DEVICE Rank out_of_reach() { return {0, 0, 0}; }

// The rank of the last token that top-k or top-p keeps, among the tokens within `limit`. Top-k keeps the
// first `amount` tokens. Top-p (`by_mass`) keeps the shortest prefix of the order whose weights reach amount
// / 2^32 of the total. Radix selection: each level builds a histogram of one digit of the ranks that share
// the prefix selected so far, of weights or of token counts, and selects the bin in which the running sum
// reaches the needed amount. From the third level on all remaining tokens have the same weight, so that they
// are counted in both cases. each(f) calls f(logit, id) for the tokens that this thread processes. `total`:
// the sum of the weights of the whole row, if `each` has only a part of it; 0: `each` has the whole row. If
// the tokens of `each` do not reach top-p's share of `total`, the result is out_of_reach().
template <class Each>
DEVICE Rank radix_select(bool by_mass, u32 amount, u64 total, u32 vocab, float max_logit, float c, Rank limit,
                         const SelectScratch& scratch, Each each) {
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u64* own_bins = scratch.bins + threadIdx.x * 4;
  Rank prefix = {0, 0, 0}, mask = {0, 0, 0};
  u64 needed = 0;
  for (u32 level = 0; level < 8; level++) {
    const u32 shift = level == 0 ? 11 : level == 2 ? 21 : level == 3 ? 10 : level == 5 ? 15 : level == 6 ? 4 : 0;
    const u32 digits = level == 4 ? 1023 : level == 7 ? 15 : 2047;
    const bool sum_weights = by_mass && level < 2;
    for (u32 i = 0; i < 4; i++) own_bins[i] = 0;
    __syncthreads();
    // Neighbouring tokens often fall into the same bin: consecutive ones are summed before atomicAdd.
    u32 pending_digit = 0;
    u64 pending_sum = 0;
    each([&](float logit, u32 id) {
      const Rank rank = {weight_exponent(max_logit, logit, c), ~ascending(logit), id};
      const u64 w = weight(scratch.tables, rank.exponent);
      const bool candidate = w && rank.id < vocab && (rank.exponent & mask.exponent) == prefix.exponent &&
                             (rank.inverted_logit & mask.inverted_logit) == prefix.inverted_logit &&
                             (rank.id & mask.id) == prefix.id && within(rank, limit);
      if (!candidate) return;
      const u32 digit = (level < 2 ? rank.exponent : level < 5 ? rank.inverted_logit : rank.id) >> shift & digits;
      if (digit != pending_digit) {
        if (pending_sum) atomicAdd(scratch.bins + pending_digit, pending_sum);
        pending_digit = digit, pending_sum = 0;
      }
      pending_sum += sum_weights ? w : 1;
    });
    if (pending_sum) atomicAdd(scratch.bins + pending_digit, pending_sum);
    __syncthreads();

    // Prefix sum over the bins, four per thread.
    u64 four[4], own = 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) own += four[i] = own_bins[i];
    u64 inclusive = own;  // of this warp's bins up to and including this thread's
    for (u32 by = 1; by < 32; by *= 2) {
      const u64 lower = __shfl_up_sync(~0u, inclusive, by);
      if (lane >= by) inclusive += lower;
    }
    if (lane == 31) scratch.warp_sums[warp] = inclusive;
    __syncthreads();
    u64 before = inclusive - own, sum = 0;
    for (u32 w = 0; w < WARPS; w++) {
      if (w == warp) before += sum;
      sum += scratch.warp_sums[w];
    }
    if (level == 0) {
      // ceil(total amount / 2^32); the product has up to 90 bits.
      const u64 all = total ? total : sum, low = all * amount;
      const u64 mass = (__umul64hi(all, amount) << 32) + (low >> 32) + (u32(low) != 0);
      needed = by_mass ? max(mass, u64(1)) : amount;
      if (by_mass ? sum < needed : sum <= needed) return by_mass && total ? out_of_reach() : limit;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      if (before < needed && needed <= before + four[i]) {
        scratch.selected[0] = threadIdx.x * 4 + i;
        scratch.selected[1] = needed - before;
        scratch.selected[2] = four[i];
      }
      before += four[i];
    }
    __syncthreads();
    const u32 digit = u32(scratch.selected[0]) & digits;
    needed = scratch.selected[1];
    u64 in_bin = scratch.selected[2];
    // No field has bits above its first digit.
    if (level < 2) {
      prefix.exponent |= digit << shift, mask.exponent = ~0u << shift;
    } else if (level < 5) {
      prefix.inverted_logit |= digit << shift, mask.inverted_logit = ~0u << shift;
    } else {
      prefix.id |= digit << shift, mask.id = ~0u << shift;
    }
    if (level == 1) {
      // The exponent is known and with it the weight: count tokens from here on.
      const u64 w = max(weight(scratch.tables, prefix.exponent), u64(1));
      if (by_mass) needed = (needed + w - 1) / w, in_bin /= w;
    }
    if ((level > 0 || !by_mass) && needed == in_bin) break;
  }
  // The last rank with the selected prefix, but not beyond `limit`.
  const Rank last = {prefix.exponent | ~mask.exponent, prefix.inverted_logit | ~mask.inverted_logit,
                     prefix.id | ~mask.id};
  return within(last, limit) ? last : limit;
}

// A row of logits, and the keys of its blocks from the LM head.
struct KeyedRow {
  const float* logits;  // [vocab]
  const u64* best;      // [blocks]
  u32 vocab, blocks;
  u32 reduced;  // 0: blocks of 128 consecutive ids, else of other ids
  float max_logit;
};

// The most blocks of 128 ids that last_kept lists.
constexpr u32 MAX_LISTED = 256;

// The rank of the last token that top-k and then top-p keep; an amount of 0 keeps all. `groups` becomes the
// groups that hold these tokens. With top-k up to MAX_LISTED they are those of the first k blocks in the
// order of the blocks' best tokens: a token of another block comes after k tokens, the best of these blocks.
// With top-p alone and the `total` of the row's weights (0: unknown) the first MAX_LISTED blocks are tried,
// then the whole row.
DEVICE Rank last_kept(u32 top_k, u32 top_p, u64 total, const KeyedRow& row, float c, Groups& groups,
                      const SelectScratch& scratch,
                      u32* listed) {  // [1 + MAX_LISTED] shared: the number of blocks, and the blocks
  groups = all_groups(row.vocab);
  Rank limit = {~0u, ~0u, ~0u};
#pragma unroll 1
  for (u32 step = 0; step < 3; step++) {  // the blocks, top-k, top-p
    const u32 amount = step == 2 ? top_p : step == 0 && total ? MAX_LISTED : top_k;
    if (amount == 0 || (step == 0 && (row.reduced || amount > MAX_LISTED))) continue;
    if (step == 0 && threadIdx.x == 0) *listed = 0;
    const auto each = [&](auto f) {
      if (step == 0) {
        for (u32 block = threadIdx.x; block < row.blocks; block += THREADS) {
          f(logit_from_ascending(u32(row.best[block] >> 32)), block);
        }
        return;
      }
      for_each_group(row.logits, row.vocab, groups, 0, groups.count, [&](u32 group, float4 v) {
        const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) f(four[i], group * 4 + i);
      });
    };
    const Rank last = radix_select(step == 2, amount, total, step ? row.vocab : row.blocks, row.max_logit, c,
                                   limit, scratch, each);
    if (step == 1 || (step == 2 && last.inverted_logit)) {
      limit = last;
      continue;
    }
    if (step == 2) {
      // The share of top-p is out of reach of these blocks. Only then it is 0: no token with a weight has a
      // NaN.
      groups = all_groups(row.vocab), limit = {~0u, ~0u, ~0u}, total = 0, step--;
      continue;
    }
    for (u32 block = threadIdx.x; block < row.blocks; block += THREADS) {
      const float logit = logit_from_ascending(u32(row.best[block] >> 32));
      const Rank rank = {weight_exponent(row.max_logit, logit, c), ~ascending(logit), block};
      if (!weight(scratch.tables, rank.exponent) || !within(rank, last)) continue;
      const u32 at = atomicAdd(listed, 1u);
      if (at < MAX_LISTED) listed[1 + at] = block;
    }
    __syncthreads();
    groups = {min(*listed, MAX_LISTED) * 32, listed + 1};
    // All tokens up to this rank are in these blocks.
    if (total) limit = {last.exponent, last.inverted_logit, last.id == NONE ? NONE : last.id * 128 + 127};
  }
  return limit;
}

}  // namespace
