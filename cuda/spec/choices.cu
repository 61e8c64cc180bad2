// The drafter's best tokens of each row and their costs, from which tree_build makes best-first trees:
// `choices` of src/spec/tree.rs makes the same decisions.
//
// Computes:      choices[r] = the max_choices best tokens by (logit descending, id ascending) that have
//                positive weight at temperature 1, each with -log2 of its probability in units of 2^-16 bits.
//                counts[r] = the number of choices; NONE for an invalid row (a NaN, a +inf, or only -inf), 0
//                for a row without a sequence.
// Work:          grid (slices, rows), 512 threads, four ids per thread and step. Each CUDA block sums the
//                weights of a slice of 8192 ids. The last one of a row to arrive finds the last choice by radix
//                selection, usually in two passes, and collects the choices, all in the blocks of 128 ids
//                with the max_choices best keys.
// Order:         any: sums are integers, and a choice's place is the number of better choices.
// Bytes:         rows x (vocab x 4 + max_choices x (8 + 3 x 512)), and best and tables per slice; with a
//                reduced vocabulary the row's logits three times more.
// Preconditions: vocab <= 2^26, max_choices 1 to 63; best, logits and tables 16-byte aligned; counters are
//                zero, and zero again afterwards.
#include "common/last_block.cuh"
#include "spec/sampling_weights.cuh"

namespace {

constexpr u32 MAX_CHOICES = 64;
// 65536 log2(e): costs are at temperature 1, whatever temperature the request has.
constexpr float SCALE = float(65536.0 * 1.4426950408889634074);

// log2(total / 2^32) in units of 2^-16, for total >= 2^32. race_time gives -log2 of the leading 32 bits.
DEVICE u32 log2_total(const u32* tables,  // [TABLE_WORDS] shared
                      u64 total) {
  const u32 zeros = u32(__clzll((long long)(total)));
  return ((32 - zeros) << 16) - ((race_time(tables, u32(total << zeros >> 32)) + (1 << 10)) >> 11);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 2) choices(
    uint2* choices,       // [rows][max_choices]: (token, cost), best first; NONE beyond the row's count
    u32* counts,          // [rows]
    const u64* best,      // [rows][blocks]: per block of ids the largest (ascending(logit) << 32 | ~id);
                          // all ones where a logit is NaN or +inf
    const float* logits,  // [rows][vocab]
    const Row* rows,      // [rows]
    const u32* tables,    // [TABLE_WORDS]
    u64* partial,         // [rows][slices]: the sum of a slice's weights
    u32* counters,        // [rows]
    u32 blocks, u32 vocab, u32 max_choices,
    u32 reduced) {        // 0: blocks of 128 consecutive ids, else of other ids
  __shared__ __align__(16) u32 table[TABLE_WORDS];
  __shared__ __align__(16) u64 bins[BINS];
  __shared__ __align__(16) u64 warp_sums[WARPS];
  __shared__ __align__(16) u64 selected[3];
  __shared__ __align__(16) u64 list[MAX_CHOICES];  // inverted logit and id of each choice, in arrival order
  __shared__ __align__(16) u64 slice_sums[WARPS];
  __shared__ u32 listed_blocks[1 + MAX_LISTED];
  __shared__ u32 listed;
  grid_launch();
  grid_wait();
  const u32 r = blockIdx.y, slice = blockIdx.x, slices = gridDim.x;
  const bool has_sequence = rows[r].sequence != NONE;
  const u64* keys = best + size_t(r) * blocks;
  const u64 key = has_sequence ? best_key(keys, blocks, warp_sums) : 0;
  u32 count = !has_sequence ? 0 : is_valid_key(key, vocab) ? max_choices : NONE;
  if (count == max_choices) {
    for (u32 i = threadIdx.x; i < TABLE_WORDS / 4; i += THREADS) as<uint4>(table + i * 4) = ld_stream(tables + i * 4);
    if (threadIdx.x == 0) listed = 0;
    __syncthreads();
    const float* row_logits = logits + size_t(r) * vocab;
    const float max_logit = logit_from_ascending(u32(key >> 32));
    Groups groups = all_groups(vocab);
    const u32 first = slice * (SLICE / 4), end = min(first + SLICE / 4, groups.count);
    const u64 sum = sum_of_weights(row_logits, vocab, first, end, max_logit, SCALE, table, slice_sums);
    if (threadIdx.x == 0) st_cg(partial + size_t(r) * slices + slice, sum);
    if (!is_last_block(slices, counters + r)) return;

    const SelectScratch scratch = {table, bins, warp_sums, selected};
    const KeyedRow keyed = {row_logits, keys, vocab, blocks, reduced, max_logit};
    const Rank limit = last_kept(max_choices, 0, 0, keyed, SCALE, groups, scratch, listed_blocks);
    for_each_group(row_logits, vocab, groups, 0, groups.count, [&](u32 group, float4 v) {
      const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        const Rank rank = {weight_exponent(max_logit, four[i], SCALE), ~ascending(four[i]), group * 4 + i};
        if (!weight(table, rank.exponent) || !within(rank, limit)) continue;
        const u32 at = atomicAdd(&listed, 1u);
        if (at < MAX_CHOICES) list[at] = u64(rank.inverted_logit) << 32 | rank.id;
      }
    });
    __syncthreads();
    count = min(listed, max_choices);
    if (threadIdx.x < count) {
      u64 total = 0;
      for (u32 i = 0; i < slices; i++) total += ld_cg(partial + size_t(r) * slices + i);
      const u64 mine = list[threadIdx.x];
      u32 place = 0;
      for (u32 i = 0; i < count; i++) place += list[i] < mine;
      const u32 cost =
          weight_exponent(max_logit, logit_from_ascending(~u32(mine >> 32)), SCALE) + log2_total(table, total);
      choices[size_t(r) * max_choices + place] = make_uint2(u32(mine), cost);
    }
  } else if (slice) {
    return;
  }
  const u32 filled = count == NONE ? 0 : count;
  if (threadIdx.x >= filled && threadIdx.x < max_choices) {
    choices[size_t(r) * max_choices + threadIdx.x] = make_uint2(NONE, NONE);
  }
  if (threadIdx.x == 0) counts[r] = count;
}
