// Rejection sampling and block verification on a chain: the distributions of rows, the sampling of drafts,
// and their verification. `rejection` and `block` of src/spec/verify.rs make the same decisions.
// Probabilities are integers that sum to 2^48 in each row, and all sums are integer sums, so results do not
// depend on how the work is split.
//
// Computes:      row_distribution: per row, its RowDistribution; rounding_token = NONE for an invalid row and
//                for a row without a sequence. sample_drafts: per drafted row, a token sampled from its
//                distribution. verify_drafts: per sequence, the number of accepted drafts and the next token,
//                sampled from the residual distribution. sample_drafts and verify_drafts skip sequences with
//                verification method MATCH. verify_drafts also skips trees and sequences without drafts; the
//                latter keep the token of `verify`.
// Work:          512 threads. row_distribution and sample_drafts: grid (rows). verify_drafts: grid
//                (block_size, sequences). Method BLOCK: CUDA block i computes the sum that the test of row i
//                needs, and the last one of a sequence to arrive runs the tests. Method REJECTION: CUDA
//                block 0 does all the work.
// Order:         sampling cumulates weights in ascending id order; all other sums are order-independent.
// Bytes:         row_distribution: best, and the row's logits twice; with top-k or top-p what `sample` reads,
//                and as much as its last pass once more. sample_drafts: the row's logits once. verify_drafts:
//                two rows of logits per sequence; method BLOCK: two more per draft.
// Preconditions: vocab <= 2^26; block_size and max_verify_rows 1 to 64; logits, best, distributions and
//                tables 16-byte aligned; counters are zero, and zero again afterwards.
#include "spec/distribution.cuh"

namespace {

// The largest value of the block, returned to every thread.
DEVICE u32 block_max(u32 own, u64* warp_maxima) {  // [WARPS] shared
  own = __reduce_max_sync(~0u, own);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warp_maxima[threadIdx.x / 32] = own;
  __syncthreads();
  for (u32 w = 0; w < WARPS; w++) own = max(own, u32(warp_maxima[w]));
  return own;
}

// The rank of the last token of `groups` within `limit`. A limit from last_kept may have further bits set, and so
// include tokens of other groups.
DEVICE Rank last_token(const KeyedRow& row, float c, const Groups& groups, Rank limit,
                       const SelectScratch& scratch) {
  Rank last = {0, 0, 0};
  for_each_group(row.logits, row.vocab, groups, 0, groups.count, [&](u32 group, float4 v) {
    const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      const Rank rank = {weight_exponent(row.max_logit, four[i], c), ~ascending(four[i]), group * 4 + i};
      const bool kept = rank.id < row.vocab && weight(scratch.tables, rank.exponent) && within(rank, limit);
      if (kept && within(last, rank)) last = rank;
    }
  });
  const u32 exponent = block_max(last.exponent, scratch.warp_sums);
  const bool first = last.exponent == exponent;
  const u32 inverted_logit = block_max(first ? last.inverted_logit : 0, scratch.warp_sums);
  const bool second = first && last.inverted_logit == inverted_logit;
  return {exponent, inverted_logit, block_max(second ? last.id : 0, scratch.warp_sums)};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 1) row_distribution(
    RowDistribution* distributions,  // [rows]
    const u64* best,                 // [rows][blocks], as in `sample`
    const float* logits,             // [rows][vocab]
    const Row* rows,                 // [rows]
    const Sequence* sequences,       // [count]: sampling parameters
    const u32* tables,               // [TABLE_WORDS]; reads thi and tlo
    u32 count, u32 blocks, u32 vocab,
    u32 reduced,                     // as in `sample`
    u32 first_row, u32 row_step) {   // CUDA block x takes row first_row + x row_step of the arrays
  __shared__ __align__(16) u32 table[512];
  __shared__ __align__(16) u64 bins[BINS];
  __shared__ __align__(16) u64 warp_sums[WARPS];
  __shared__ __align__(16) u64 selected[3];
  __shared__ u32 listed[1 + MAX_LISTED];
  grid_launch();
  load_weight_tables(table, tables);
  grid_wait();
  const u32 r = first_row + blockIdx.x * row_step;
  const Row row = rows[r];
  const bool has_sequence = row.sequence < count;
  const Sequence* state = sequences + (has_sequence ? row.sequence : 0);
  const u64 key = has_sequence ? best_key(best + size_t(r) * blocks, blocks, warp_sums) : 0;
  const u32 top = u32(key >> 32), id = ~u32(key);
  RowDistribution d = {logit_from_ascending(top), has_sequence ? state->c : 0, 0, 0, {~0u, ~0u, ~0u}, NONE, 0, 0};
  if (!has_sequence || !is_valid_key(key, vocab)) {
    if (threadIdx.x == 0) st_distribution(distributions + r, d);
    return;
  }
  const float* row_logits = logits + size_t(r) * vocab;
  const SelectScratch scratch = {table, bins, warp_sums, selected};
  Groups groups = all_groups(vocab);
  if (d.c == 0) {
    // Greedy: the best token has probability 1.
    d.limit = {0, ~top, id};
    if (threadIdx.x == 0) listed[1] = id / 128;
    groups = {32, listed + 1};
    __syncthreads();
  } else {
    d.min_weight = state->min_p;
    const KeyedRow keyed = {row_logits, best + size_t(r) * blocks, vocab, blocks, reduced, d.max_logit};
    d.limit = last_kept(state->top_k, state->top_p, 0, keyed, d.c, groups, scratch, listed);
    if (groups.blocks) d.limit = last_token(keyed, d.c, groups, d.limit, scratch);
  }
  // The first pass sums the weights, the second the probabilities without the remainder.
#pragma unroll 1
  for (u32 scaled = 0; scaled < 2; scaled++) {
    u64 sum = 0;
    for_each_group(row_logits, vocab, groups, 0, groups.count, [&](u32 group, float4 v) {
      const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        if (group * 4 + i >= vocab) continue;
        const u64 w = filtered_weight(d, table, four[i], group * 4 + i);
        sum += scaled ? __umul64hi(w << d.shift, d.inverse) : w;
      }
    });
    __syncthreads();
    sum = block_sum(sum, warp_sums);
    if (scaled) {
      d.remainder = ONE - sum;
    } else {
      sum = max(sum, u64(1));  // inconsistent input may have no weight at all
      d.shift = u32(__clzll((long long)(sum)));
      d.inverse = reciprocal(sum << d.shift);
    }
  }
  d.rounding_token = id;
  if (threadIdx.x == 0) st_distribution(distributions + r, d);
}

extern "C" __global__ void __launch_bounds__(512, 1) sample_drafts(
    u32* drafts,                           // [sequences][block_size]: draft i at i, from 1; NONE:
                                           // invalid. Not written: entry 0, and method MATCH
    const RowDistribution* distributions,  // [sequences][block_size]
    const float* logits,                   // [sequences][block_size][vocab]
    const Row* rows,                       // [sequences][block_size]
    const Sequence* sequences,             // [sequences]
    const u32* tables,                     // [TABLE_WORDS]; reads thi and tlo
    u32 count, u32 vocab, u32 block_size,
    u32 first_row, u32 row_step) {         // as in row_distribution
  __shared__ __align__(16) u32 table[512];
  __shared__ __align__(16) u64 warp_sums[WARPS];
  grid_launch();
  load_weight_tables(table, tables);
  grid_wait();
  __syncthreads();
  const u32 r = first_row + blockIdx.x * row_step, depth = r % block_size, sequence = rows[r].sequence;
  if (depth == 0 || sequence >= count || sequences[sequence].verify_method == MATCH) return;
  const RowDistribution d = ld_distribution(distributions + r);
  const float* row_logits = logits + size_t(r) * vocab;
  u32 token = NONE;
  if (d.rounding_token != NONE) {
    const u64 bits = random_bits(philox_stream(sequences + sequence), DRAFT, depth, depth);
    token = sample_row(d, table, row_logits, vocab, bits, warp_sums);
  }
  if (threadIdx.x == 0) drafts[r] = token;
}

extern "C" __global__ void __launch_bounds__(512, 1) verify_drafts(
    u32* accepted,                    // [sequences]; skipped sequences keep this output and the next two
    u32* next,                        // [sequences]; NONE: invalid
    u32* path,                        // [sequences][max_verify_rows]: 0, 1, .. accepted, then NONE
    const RowDistribution* targets,   // [sequences][max_verify_rows]: row i: after i drafts
    const float* target_logits,       // [sequences][max_verify_rows][vocab]
    const RowDistribution* drafters,  // [sequences][block_size]: row i: for draft i; 0 unused
    const float* draft_logits,        // [sequences][block_size][vocab]
    const u32* tokens,                // [sequences][max_verify_rows]: anchor, drafts
    const Span* spans,                // [sequences]
    const Sequence* sequences,        // [sequences]
    const u32* tables,                // [TABLE_WORDS]; reads thi and tlo
    u64* overlaps,                    // [sequences][block_size]: sum of min(w p, q) per row
    u32* counters,                    // [sequences]
    u32 vocab, u32 block_size, u32 max_verify_rows) {
  __shared__ __align__(16) u32 table[512];
  __shared__ __align__(16) u64 warp_sums[WARPS];
  __shared__ u64 draft_probs[MAX_ROWS * 2];  // p of each draft, overwritten by w with method BLOCK;
                                             // then q of each draft
  __shared__ __align__(16) u32 result[4];    // accepted drafts, whether one was rejected, valid;
                                             // 1 word for accepted_prefix
  grid_launch();
  load_weight_tables(table, tables);
  grid_wait();
  const u32 sequence = blockIdx.y, row = blockIdx.x;
  const size_t first = size_t(sequence) * max_verify_rows, draft_first = size_t(sequence) * block_size;
  const Sequence* state = sequences + sequence;
  const u32 method = state->verify_method, rows = min(spans[sequence].rows, min(block_size, max_verify_rows));
  if ((method != REJECTION && method != BLOCK) || form_of(state->now.shape) != CHAIN_OF_DRAFTS) return;
  if (rows < 2 || row >= rows || (row > 0 && method != BLOCK)) return;
  __syncthreads();
  const u32 num_drafts = rows - 1;
  const PhiloxStream stream = philox_stream(state);
  const auto target = [&](u32 at) { return ld_distribution(targets + first + at); };
  const auto drafter = [&](u32 at) { return ld_distribution(drafters + draft_first + at + 1); };
  const auto target_row = [&](u32 at) { return target_logits + (first + at) * vocab; };
  const auto draft_row = [&](u32 at) { return draft_logits + (draft_first + at + 1) * vocab; };

  // p and q of draft i + 1, given the i drafts before it.
  if (threadIdx.x < num_drafts) {
    const u32 i = threadIdx.x, token = tokens[first + i + 1];
    const RowDistribution p = target(i), q = drafter(i);
    const bool valid = p.rounding_token != NONE && q.rounding_token != NONE;
    u64* probs = draft_probs + i;
    probs[0] = valid ? probability_at(p, table, target_row(i), vocab, token) : 0;
    probs[MAX_ROWS] = valid ? probability_at(q, table, draft_row(i), vocab, token) : 0;
  }
  __syncthreads();

  // REJECTION: test draft by draft. BLOCK: w of each prefix, up to the longest prefix with w > 0.
  if (threadIdx.x == 0) {
    u32 length = 0, rejected = 0;
    bool valid = targets[first].rounding_token != NONE;
    for (; valid && length < num_drafts; length++) {
      const u64 p = draft_probs[length], q = draft_probs[MAX_ROWS + length];
      if (method == BLOCK) {
        const u64 w = mul_div(length ? draft_probs[length - 1] : ONE, p, q);
        draft_probs[length] = w;
        if (w == 0) break;
      } else {
        rejected = q != 0;
        if (q == 0 || !accept(stream, length + 1, length + 1, p, q)) break;
        rejected = 0;
      }
      valid = targets[first + length + 1].rounding_token != NONE;
    }
    result[0] = length, result[1] = rejected, result[2] = u32(valid);
  }
  __syncthreads();
  u32 num_accepted = result[0], rejected = result[1];
  const bool valid = result[2] != 0;

  u64 w = ONE;
  if (method == BLOCK) {
    const auto prefix_weight = [&](u32 length) { return length ? draft_probs[length - 1] : ONE; };
    if (valid && row > 0 && row <= num_accepted && row < num_drafts && prefix_weight(row) < ONE) {
      const RowPair pair = {target(row), drafter(row), target_row(row), draft_row(row)};
      const u64 here = prefix_weight(row);
      const u64 sum = sum_pair(pair, table, vocab, warp_sums,
                               [&](u64 p, u64 q) { return min(mul_probability(here, p), q); });
      if (threadIdx.x == 0) st_cg(overlaps + draft_first + row, sum);
    }
    num_accepted = accepted_prefix(stream, overlaps + draft_first, counters + sequence, num_drafts,
                                   valid ? num_accepted : 0, result + 3, prefix_weight);
    if (num_accepted == NONE) return;
    rejected = num_accepted < num_drafts;
    w = prefix_weight(num_accepted);
  }

  u32 token = NONE;
  if (valid) {
    const u64 bits = random_bits(stream, RESIDUAL, num_accepted + 1, num_accepted);
    const RowDistribution p = target(num_accepted);
    if (rejected) {
      const RowPair pair = {p, drafter(num_accepted), target_row(num_accepted), draft_row(num_accepted)};
      token = sample_weights(vocab, bits, warp_sums, [&](u32 group) {
        return map_pair(pair, table, vocab, group,
                        [&](u64 p, u64 q) { return saturating_sub(mul_probability(w, p), q); });
      });
    }
    // An empty residual means that p and q are equal.
    if (token == NONE) token = sample_row(p, table, target_row(num_accepted), vocab, bits, warp_sums);
  }
  const u32 length = valid ? num_accepted : 0;
  if (threadIdx.x < max_verify_rows) path[first + threadIdx.x] = threadIdx.x <= length ? threadIdx.x : NONE;
  if (threadIdx.x == 0) accepted[sequence] = length, next[sequence] = token;
}
