// Drafts without a drafter model: `drafts` of src/spec/lookup.rs makes the same ones.
//
// Computes:      the tokens after the latest occurrence of the longest suffix, of `least` to `most` tokens, of the
//                sequence's tokens. If these end, the drafts go on with the first of them. kept = 1 without such a
//                suffix, else block_size. distributions: each draft has probability 1.
// Work:          grid (sequences), 512 threads, one earlier position per thread and step.
// Order:         any: the match is the maximum of a total order.
// Bytes:         per sequence its tokens once, and block_size x (4 drafts + 48 distributions). Comparisons of more
//                than one token hit L1.
// Preconditions: block_size 1 to 64, positions up to 2^31, least at least 1; distributions 16-byte aligned.
#include "spec/distribution.cuh"

extern "C" __global__ void __launch_bounds__(512, 2) lookup(
    u32* drafts,                     // [sequences][block_size]: draft i at i; 0 not written
    u32* kept,                       // [sequences]: rows to verify at most, the anchor's included
    RowDistribution* distributions,  // [sequences][block_size], of the drafts; null: not written
    const u32* history,              // [sequences][positions]: the tokens at positions 0 to length
    const Sequence* sequences,       // [sequences]
    u32 block_size, u32 positions, u32 least, u32 most) {
  __shared__ u64 warp_best[WARPS];
  grid_launch();
  grid_wait();
  const u32 sequence = blockIdx.x;
  const Progress s = ld_progress(sequences + sequence);
  const u32* tokens = history + size_t(sequence) * positions;
  const u32 last = s.active ? min(s.length, positions - 1) : 0;  // the anchor's position
  u64 best = 0;                                                  // matched tokens << 32 | last position of the match
  for (u32 end = threadIdx.x; end < last; end += THREADS) {
    u32 matched = 0;
    while (matched < most && matched <= end && tokens[end - matched] == tokens[last - matched]) matched++;
    if (matched >= least) best = max(best, u64(matched) << 32 | end);
  }
  for (int flip = 16; flip; flip /= 2) best = max(best, __shfl_xor_sync(~0u, best, flip));
  if (threadIdx.x % 32 == 0) warp_best[threadIdx.x / 32] = best;
  __syncthreads();
  for (u32 w = 0; w < WARPS; w++) best = max(best, warp_best[w]);
  if (threadIdx.x == 0) kept[sequence] = best ? block_size : 1;
  const u32 i = threadIdx.x, end = u32(best);
  if (!best || i == 0 || i >= block_size) return;
  const u32 token = tokens[end + 1 + (i - 1) % (last - end)];
  drafts[sequence * block_size + i] = token;
  // All of the probability is the remainder, whatever the logits are.
  if (distributions) {
    const RowDistribution certain = {0, 0, 0, 0, {0, 0, 0}, token, 0, ONE};
    st_distribution(distributions + sequence * block_size + i, certain);
  }
}
