// The candidate selector of DFlash2 drafters: each draft is chosen among the best tokens of its row by scores that
// depend on the token before it.
//
// Computes:      selector_candidates: per row, the `count` best tokens by (logit descending, id ascending) and their
//                logits; -inf is no candidate. Rows that are invalid or have no sequence have none. Columns of `scores`
//                that belong to the row's old candidates become -inf.
//                selector_walk: for depths first..end of a block, with t the token before (the anchor, the draft
//                before, or in a tree and within a launch the best token of the depth before):
//                score[c] = logit[c] + sum over j of (A[t][j] w[j]) S[c][j]; `scores` gets them at the candidates'
//                columns, best their largest key, drafts the token of that key.
// Work:          512 threads. selector_candidates: grid (block_size - 1, sequences); the candidates are in the blocks
//                of 128 ids with the `count` best keys; the block finds one key after the other. selector_walk: grid
//                (sequences), a warp per candidate, eight columns of the codebooks per lane and step.
// Order:         the product: eight columns ascending per lane and step, lanes by xor 16-8-4-2-1. Keys are compared in
//                a total order.
// Bytes:         selector_candidates: per row best, count x (128 x 4 + 8), and count x 4 in `scores`. selector_walk:
//                per row w, the row of A and count x (the row of S + 8 + 4).
// Preconditions: count 1 to 64; rank a multiple of 32; vocab <= 2^26; block_size 2 to 64; best, w and codebooks 16-byte
//                aligned. `scores` is -inf and `candidates` NONE before the first launch; both are kept between rounds.
#include "common/state.cuh"
#include "spec/sampling_weights.cuh"

namespace {

constexpr u32 MAX_CANDIDATES = 64;

// The sum over eight columns of (a w) s, added to `sum`; a and s are bf16.
DEVICE float add_products(float sum, uint4 a, uint4 s, const float* w) {  // [8]
  const u32 pairs[4] = {a.x, a.y, a.z, a.w}, others[4] = {s.x, s.y, s.z, s.w};
  const float4 low = as<float4>(w), high = as<float4>(w + 4);
  const float ws[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (u32 i = 0; i < 4; i++) {
    sum = __fmaf_rn(__fmul_rn(low_f32(pairs[i]), ws[2 * i]), low_f32(others[i]), sum);
    sum = __fmaf_rn(__fmul_rn(high_f32(pairs[i]), ws[2 * i + 1]), high_f32(others[i]), sum);
  }
  return sum;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 2) selector_candidates(
    u32* candidates,         // [sequences][block_size][count], best first; NONE beyond the row's last. Row 0 of a block
                             // is not touched
    float* candidate_logits, // as candidates; not written where there is none
    float* scores,           // [sequences][block_size][vocab]
    const u64* best,         // [sequences][block_size][blocks], as in `sample`
    const float* logits,     // [sequences][block_size][vocab]
    const Row* rows,         // [sequences][block_size]
    const u16* predecessor,  // [vocab][rank] bf16: A; sealed
    const u16* successor,    // [vocab][rank] bf16: S; sealed
    u32 blocks, u32 vocab, u32 block_size, u32 count, u32 rank) {
  __shared__ __align__(16) u64 maxima[2][WARPS];
  __shared__ u32 listed[MAX_CANDIDATES];
  grid_launch();
  grid_wait();
  const size_t r = blockIdx.y * block_size + 1 + blockIdx.x;
  const float lowest = __uint_as_float(0xff800000u);
  u32* own = candidates + r * count;
  if (threadIdx.x < count) {
    const u32 old = own[threadIdx.x];
    if (old < vocab) scores[r * vocab + old] = lowest;
    own[threadIdx.x] = NONE;
  }
  if (rows[r].sequence >= gridDim.y) return;
  const u64* keys = best + r * blocks;
  u64 last = best_key(keys, blocks, maxima[0]);
  if (!is_valid_key(last, vocab)) return;

  // A token of another block comes after the best tokens of these blocks.
  const u32 num_listed = min(count, blocks);
  for (u32 n = 0; n < num_listed; n++) {
    if (n > 0) {
      u64 mine = 0;
      for (u32 i = threadIdx.x; i < blocks; i += THREADS) mine = max(mine, keys[i] < last ? keys[i] : 0);
      last = block_max_key(mine, maxima[n % 2]);
    }
    if (threadIdx.x == 0) listed[n] = ~u32(last) / 128;
  }
  __syncthreads();
  u64 mine[MAX_CANDIDATES * 128 / THREADS];
#pragma unroll
  for (u32 j = 0; j < MAX_CANDIDATES * 128 / THREADS; j++) {
    const u32 i = j * THREADS + threadIdx.x;
    const u32 id = i < num_listed * 128 ? listed[i / 128] * 128 + i % 128 : NONE;
    mine[j] = id < vocab ? logit_key(logits[r * vocab + id], id) : 0;
  }
  last = ~0ull;
  for (u32 n = 0; n < count; n++) {
    u64 largest = 0;
#pragma unroll
    for (u32 j = 0; j < MAX_CANDIDATES * 128 / THREADS; j++) largest = max(largest, mine[j] < last ? mine[j] : 0);
    last = block_max_key(largest, maxima[n % 2]);
    if (u32(last >> 32) <= ascending(lowest)) return;
    if (threadIdx.x != n) continue;
    const u32 id = ~u32(last);
    own[n] = id;
    candidate_logits[r * count + n] = logit_from_ascending(u32(last >> 32));
    prefetch_l2(predecessor + size_t(id) * rank, rank * 2);
    prefetch_l2(successor + size_t(id) * rank, rank * 2);
  }
}

extern "C" __global__ void __launch_bounds__(512, 2) selector_walk(
    float* scores,                  // [sequences][block_size][vocab]
    u64* best,                      // [sequences][block_size]: logit_key of the best score; 0 without candidates
    u32* drafts,                    // [sequences][block_size]; NONE: the row is invalid
    const u32* candidates,          // [sequences][block_size][count]
    const float* candidate_logits,  // as candidates
    const float* weights,           // [sequences][block_size][rank]: w, the projection of the row
    const u16* predecessor,         // [vocab][rank] bf16: A; sealed
    const u16* successor,           // [vocab][rank] bf16: S; sealed
    const Sequence* sequences,      // [sequences]
    u32 vocab, u32 block_size, u32 count, u32 rank,
    u32 first, u32 end) {           // depths, from 1 on
  __shared__ __align__(16) u64 keys[2][MAX_CANDIDATES];
  grid_launch();
  grid_wait();
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  size_t row = blockIdx.x * block_size + first;
  const Progress& now = sequences[blockIdx.x].now;
  u32 token = now.anchor;
  if (first > 1 && form_of(now.shape) == CHAIN_OF_DRAFTS) {
    token = drafts[row - 1];
  } else if (first > 1) {
    token = is_valid_key(best[row - 1], vocab) ? ~u32(best[row - 1]) : NONE;
  }
  for (u32 depth = first; depth < end; depth++, row++) {
    u64* of_row = keys[depth % 2];
    for (u32 n = warp; n < count; n += WARPS) {
      const u32 id = candidates[row * count + n];
      u64 key = 0;
      if (id < vocab) {
        float sum = 0;
        for (u32 j = lane * 8; j < rank; j += 256) {
          const uint4 none = make_uint4(0, 0, 0, 0);
          const uint4 a = token < vocab ? ld_stream(predecessor + size_t(token) * rank + j) : none;
          sum = add_products(sum, a, ld_stream(successor + size_t(id) * rank + j), weights + row * rank + j);
        }
        const float score = __fadd_rn(candidate_logits[row * count + n], lane_sum(sum, 32));
        key = logit_key(score, id);
        if (lane == 0) scores[row * vocab + id] = score;
      }
      if (lane == 0) of_row[n] = key;
    }
    __syncthreads();
    const u64 low = lane < count ? of_row[lane] : 0, high = lane + 32 < count ? of_row[lane + 32] : 0;
    const u64 key = warp_max_key(max(low, high));
    token = is_valid_key(key, vocab) ? ~u32(key) : NONE;
    if (threadIdx.x == 0) best[row] = key, drafts[row] = token;
  }
}
