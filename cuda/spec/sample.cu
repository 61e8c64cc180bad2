// Samples one token per row: `SamplingParams::choose` of src/spec/sampling.rs makes the same decisions.
// All sums are integer sums and all orders are total, so results do not depend on how the work is split.
//
// Computes:      choice[r] = the best token (greedy), or the winner of an exponential race among the tokens
//                that top-k, top-p and min-p keep; NONE for an invalid row (a NaN, a +inf, or only -inf) and
//                for a row without a sequence.
// Work:          grid (slices, rows), 512 threads, four ids per thread and step. Greedy: CUDA block 0 of the
//                row takes the choice from `best`. Race: one CUDA block per slice of 8192 ids, and the last
//                one to arrive compares the slices' winners. With top-k or top-p: CUDA block 0 processes the
//                row and finds the limit by radix selection, 11 bits per pass over the row, usually in two
//                passes. With top-k up to MAX_LISTED it reads only the blocks of 128 ids with the k best keys.
//                With top-p alone each CUDA block sums the weights of its slice, and the last one to arrive
//                reads the MAX_LISTED best blocks, and the row only if they do not have the share of top-p.
// Order:         any: the winner is the minimum of a total order.
// Bytes:         greedy: rows x blocks x 8. Race: also the row's logits once, and best and tables per slice.
//                Top-k or top-p: CUDA block 0 reads the row three times for one of them and five times for
//                both, more if weights tie; with top-k up to MAX_LISTED k x 128 x 4 bytes of it, and best
//                three times.
// Preconditions: vocab <= 2^26; best, partial and tables 16-byte aligned; counters are zero, and
//                zero again afterwards.
#include "common/last_block.cuh"
#include "common/state.cuh"
#include "spec/sampling_weights.cuh"

namespace {

constexpr u32 RACE = 5;  // purpose: the top byte of the second word of the Philox counter

// Philox key and counter fields of a row. The noise of a token depends on its position, not on the round or
// the batch.
struct Noise {
  u32 key[2], stream, position;
};

// A candidate of the race. The lowest time / weight wins; among equals the lower id. Weight 0 loses to all
// others.
struct __align__(16) Candidate {
  u32 time, id;
  u64 weight;
};
DEVICE Candidate no_candidate() { return {1, NONE, 0}; }

DEVICE bool beats(const Candidate& a, const Candidate& b) {
  const u64 left = a.time * b.weight, right = b.time * a.weight;
  return left < right || (left == right && a.id < b.id);
}

// The block's winner, in thread 0.
DEVICE Candidate block_winner(Candidate mine, Candidate* warp_winners) {  // [WARPS] shared
  for (int flip = 16; flip; flip /= 2) {
    const u64 time_and_id = __shfl_xor_sync(~0u, u64(mine.time) << 32 | mine.id, flip);
    const Candidate other = {u32(time_and_id >> 32), u32(time_and_id), __shfl_xor_sync(~0u, mine.weight, flip)};
    if (beats(other, mine)) mine = other;
  }
  if (threadIdx.x % 32 == 0) warp_winners[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (u32 w = 1; w < WARPS; w++) {
      const Candidate other = warp_winners[w];
      if (beats(other, mine)) mine = other;
    }
  }
  return mine;
}

// This thread's winner among the tokens of groups first..end within `limit` and of weight >= `min_weight`.
DEVICE Candidate race(const Noise& noise, u32 min_weight,
                      const float* logits,  // [vocab]
                      u32 vocab, const Groups& groups, float max_logit, float c, Rank limit, u32 first,
                      u32 end,
                      const u32* tables) {  // [TABLE_WORDS] shared
  Candidate best = no_candidate();
  for_each_group(logits, vocab, groups, first, end, [&](u32 group, float4 v) {
    const float four[4] = {v.x, v.y, v.z, v.w};
    u64 weights[4];
    bool any = false;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      const Rank rank = {weight_exponent(max_logit, four[i], c), ~ascending(four[i]), group * 4 + i};
      weights[i] = weight(tables, rank.exponent);
      if (weights[i] < min_weight || rank.id >= vocab || !within(rank, limit)) weights[i] = 0;
      any |= weights[i] != 0;
    }
    if (!any) return;
    const uint4 counter = make_uint4(noise.position, RACE << 24 | group, noise.stream, 0);
    const uint4 random = philox(counter, noise.key[0], noise.key[1]);
    const u32 words[4] = {random.x, random.y, random.z, random.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      if (!weights[i]) continue;
      const Candidate candidate = {race_time(tables, words[i]), group * 4 + i, weights[i]};
      if (beats(candidate, best)) best = candidate;
    }
  });
  return best;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 2) sample(
    u32* choice,                // [rows]
    const u64* best,            // [rows][blocks]: per block of ids the largest (ascending(logit) << 32 |
                                // ~id); all ones where a logit is NaN or +inf
    const float* logits,        // [rows][vocab]
    const Row* rows,            // [rows]
    const Sequence* sequences,  // [count]; null: every row is greedy, and only best and rows are read
    const u32* tables,          // [TABLE_WORDS]
    uint4* partial,             // [rows][slices]: each a Candidate
    u32* counters,              // [rows]
    u32 count, u32 blocks, u32 vocab,
    u32 reduced,                // 0: blocks of 128 consecutive ids, else of other ids
    u32 first_row, u32 row_step) {  // CUDA block y takes row first_row + y row_step of the arrays
  __shared__ __align__(16) u32 table[TABLE_WORDS];
  __shared__ __align__(16) u64 bins[BINS];
  __shared__ __align__(16) u64 warp_sums[WARPS];
  __shared__ __align__(16) Candidate warp_winners[WARPS];
  __shared__ __align__(16) u64 selected[3];
  __shared__ u32 listed[1 + MAX_LISTED];
  grid_launch();
  grid_wait();
  const SelectScratch scratch = {table, bins, warp_sums, selected};
  const u32 r = first_row + blockIdx.y * row_step, slice = blockIdx.x, slices = gridDim.x;
  const Row row = rows[r];
  if (row.sequence >= count) {
    if (slice == 0 && threadIdx.x == 0) choice[r] = NONE;
    return;
  }
  const Sequence* state = sequences ? sequences + row.sequence : nullptr;
  const float c = state ? state->c : 0;
  const bool greedy = c == 0, limited = !greedy && (state->top_k || state->top_p);
  // Only top-p needs the sum of all weights.
  const bool shared_sum = limited && !state->top_k && !reduced;
  if (slice && (greedy || (limited && !shared_sum))) return;

  const u64 key = best_key(best + size_t(r) * blocks, blocks, warp_sums);
  const u32 top = u32(key >> 32), id = ~u32(key);
  const bool valid = is_valid_key(key, vocab);
  if (greedy || !valid) {
    if (slice == 0 && threadIdx.x == 0) choice[r] = valid ? id : NONE;
    return;
  }
  for (u32 i = threadIdx.x; i < TABLE_WORDS / 4; i += THREADS) as<uint4>(table + i * 4) = ld_stream(tables + i * 4);
  __syncthreads();

  const float* row_logits = logits + size_t(r) * vocab;
  const float max_logit = logit_from_ascending(top);
  Groups groups = all_groups(vocab);
  const u32 first = slice * (SLICE / 4), end = min(first + SLICE / 4, groups.count);
  Rank limit = {~0u, ~0u, ~0u};
  if (limited) {
    u64 total = 0;
    if (shared_sum) {
      u64* sums = reinterpret_cast<u64*>(partial + size_t(r) * slices);
      total = sum_of_weights(row_logits, vocab, first, end, max_logit, c, table, warp_sums);
      if (threadIdx.x == 0) st_cg(sums + slice, total);
      if (!is_last_block(slices, counters + r)) return;
      total = 0;
      for (u32 i = threadIdx.x; i < slices; i += THREADS) total += ld_cg(sums + i);
      total = block_sum(total, warp_sums);
    }
    const KeyedRow keyed = {row_logits, best + size_t(r) * blocks, vocab, blocks, reduced, max_logit};
    limit = last_kept(state->top_k, state->top_p, total, keyed, c, groups, scratch, listed);
  }
  const u32* seed = state->seed;
  const Noise noise = {{seed[0], seed[1]}, state->stream, row.position + 1};
  Candidate winner = block_winner(
      race(noise, state->min_p, row_logits, vocab, groups, max_logit, c, limit, limited ? 0 : first,
           limited ? groups.count : end, table),
      warp_winners);
  if (limited) {
    if (threadIdx.x == 0) choice[r] = winner.id;
    return;
  }
  if (threadIdx.x == 0) {
    st_cg(partial + size_t(r) * slices + slice,
          make_uint4(winner.time, winner.id, u32(winner.weight), u32(winner.weight >> 32)));
  }
  if (!is_last_block(slices, counters + r)) return;
  winner = no_candidate();
  for (u32 i = threadIdx.x; i < slices; i += THREADS) {
    const uint4 v = ld_cg(partial + size_t(r) * slices + i);
    const Candidate other = {v.x, v.y, u64(v.w) << 32 | v.z};
    if (beats(other, winner)) winner = other;
  }
  winner = block_winner(winner, warp_winners);
  if (threadIdx.x == 0) choice[r] = winner.id;
}
