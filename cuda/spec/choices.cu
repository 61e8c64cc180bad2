// The tokens that a drafter holds best for each row, and what they cost: `choices` of src/spec/tree.rs, decision for decision.
//
// Computes: choices[r] = the `most` best tokens by (logit descending, id ascending) of positive weight at temperature 1,
//           each with -log2 of its probability in units of 2^-16 bits; count[r] = how many there are, NONE for a damaged
//           row (a NaN, +inf, nothing but -inf), 0 for one without a sequence.
// Work:     grid (rows), 512 threads, four ids per thread and step. The last token is found by radix selection, usually in
//           two passes over the row; a third collects what is not worse and adds up the weights.
// Order:    none that matters: a token's place is the number of better ones.
// Bytes:    rows x (blocks x 8 + 3 x vocab x 4 + most x 8), more where weights tie at the cut.
// Needs:    vocab up to 2^26, most 1 to 63; best, logits and tables 16-byte aligned.
#include "common/rows.cuh"
#include "spec/sampling_weights.cuh"

namespace {

constexpr u32 MOST = 64;
// 65536 log2(e): temperature 1, the drafter's own.
constexpr float SCALE = float(65536.0 * 1.4426950408889634074);

// log2(total / 2^32) in units of 2^-16, of a total of at least 2^32: -log2 of its leading 32 bits is a variate's time.
WRAPPER u32 bits(const u32* tables, u64 total) {
  const u32 zeros = u32(__clzll((long long)(total)));
  return ((32 - zeros) << 16) - ((race_time(tables, u32(total << zeros >> 32)) + (1 << 10)) >> 11);
}

}  // namespace

KERNEL(512, 2, choices,
       (uint2* choices,       // [rows][most]: (token, cost), best first; NONE beyond the row's count
        u32* counts,          // [rows]
        const u64* best,      // [rows][blocks]: per block of ids the largest (ascending(logit) << 32 | ~id);
                              // all ones where one is NaN or +inf
        const float* logits,  // [rows][vocab]
        const Row* rows,      // [rows]
        const u32* tables,    // [TABLE_WORDS]
        u32 blocks, u32 vocab, u32 most)) {
  SHARED(u32, table, TABLE_WORDS);
  SHARED(u64, bins, BINS);
  SHARED(u64, words, WARPS);
  SHARED(u64, found, 3);
  SHARED(u64, list, MOST);
  SHARED(u64, sums, WARPS);
  SHARED(u32, kept, 1);
  grid_launch();
  grid_wait();
  const u32 r = blockIdx.x;
  const bool known = ld(&rows[r].sequence) != NONE;
  const u64 key = known ? best_key(best + size_t(r) * blocks, blocks, words) : 0;
  u32 count = !known ? 0 : is_sound(key, vocab) ? most : NONE;
  if (count == most) {
    for (u32 i = threadIdx.x; i < TABLE_WORDS / 4; i += THREADS) sts128(table + i * 4, ld_stream(tables + i * 4));
    if (threadIdx.x == 0) sts(kept, 0u);
    __syncthreads();
    const float* own = logits + size_t(r) * vocab;
    const float max_logit = logit_of(u32(key >> 32));
    const Memory memory = {table, bins, words, found};
    const Rank limit = cut(false, most, own, vocab, max_logit, SCALE, {~0u, ~0u, ~0u}, memory);
    u64 total = 0;
    each_group(own, vocab, 0, (vocab + 3) / 4, [&](u32 group, float4 v) {
      const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        const Rank rank = {exponent(max_logit, four[i], SCALE), ~ascending(four[i]), group * 4 + i};
        const u64 w = weight(table, rank.t);
        total += w;
        if (!w || !within(rank, limit)) continue;
        const u32 at = atomicAdd(kept, 1u);
        if (at < MOST) sts(list + at, u64(rank.inverse) << 32 | rank.id);
      }
    });
    for (int flip = 16; flip; flip /= 2) total += __shfl_xor_sync(~0u, total, flip);
    // Not the selection's words: where it ends early others still read them.
    if (threadIdx.x % 32 == 0) sts(sums + threadIdx.x / 32, total);
    __syncthreads();
    count = min(lds(kept), most);
    if (threadIdx.x < count) {
      total = 0;
      for (u32 w = 0; w < WARPS; w++) total += lds(sums + w);
      const u64 mine = lds(list + threadIdx.x);
      u32 place = 0;
      for (u32 i = 0; i < count; i++) place += lds(list + i) < mine;
      const u32 cost = exponent(max_logit, logit_of(~u32(mine >> 32)), SCALE) + bits(table, total);
      st(choices + size_t(r) * most + place, make_uint2(u32(mine), cost));
    }
  }
  const u32 filled = count == NONE ? 0 : count;
  if (threadIdx.x >= filled && threadIdx.x < most) st(choices + size_t(r) * most + threadIdx.x, make_uint2(NONE, NONE));
  if (threadIdx.x == 0) st(counts + r, count);
}
