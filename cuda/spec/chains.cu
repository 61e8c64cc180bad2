// Several chains per sequence: the best one is selected and verified as a block. This is multi-draft block
// verification (Thomas and Pal, arXiv 2602.16961). `multi_draft_block_verify` of src/spec/verify.rs makes the
// same decisions.
//
// A token's class is about 32 + 2 log2(p / q). At each depth the selection keeps the chains that contain the
// tokens selected so far, and takes the token of the highest class; among equals the first.
//
// Computes:      sample_chains: the tokens of each sequence's chains, each row from the drafter's
//                distribution of its depth. chain_classes: for each row with a child, the drafter's
//                probability mass up to each class. verify_chains: the selected chain, the number of its
//                accepted drafts, and the next token, sampled from the residual distribution. All three skip
//                sequences other than those with verification method BLOCK, a sampled tree, and at least two
//                rows.
// Work:          512 threads. sample_chains and chain_classes: grid (max_verify_rows, sequences), one row
//                each. verify_chains: grid (block_size, sequences). Each CUDA block repeats the selection,
//                which reads a few words per draft, and computes the sum that its row's test needs. The last
//                CUDA block of a sequence to arrive runs the tests.
// Order:         sampling cumulates weights in ascending id order; all other sums are order-independent.
// Bytes:         sample_chains: one row of logits per draft. chain_classes: two rows of logits per row with a
//                child. verify_chains: two rows of logits per sequence, two more per draft of a chain.
// Preconditions: vocab <= 2^26; block_size and max_verify_rows 1 to 64; distributions, logits and tables
//                16-byte aligned; counters are zero, and zero again afterwards. Rows that follow the same
//                drafts have equal logits.
#include "spec/distribution.cuh"

namespace {

constexpr u32 CLASSES = 64;

// 2 log2(x) + 2, rounded down, with a log2 that is linear between powers of two. 0 for x = 0.
DEVICE u32 twice_log2(u64 x) {
  const u32 zeros = u32(__clzll((long long)(x)));
  return 2 * (64 - zeros) + (u32(x << (zeros & 63) >> 62) & 1);
}
// The class of a token: about CLASSES / 2 + 2 log2(p / q), clamped to 0 to CLASSES - 1; 0 for p = 0.
DEVICE u32 class_of(u64 p, u64 q) {
  const int difference = int(twice_log2(p)) - int(twice_log2(q)) + int(CLASSES / 2);
  return p == 0 ? 0 : u32(max(0, min(difference, int(CLASSES - 1))));
}

// A sequence's chains: `count` chains of `length` drafts each, one after another after the anchor's row.
// count = 0: the sequence is skipped.
struct Chains {
  u32 rows, count, length;
};
DEVICE Chains chains_of(const Sequence* state,  // [1]
                        const u32* parents,     // [max_verify_rows]
                        const Span* span,       // [1]
                        u32 block_size, u32 max_verify_rows) {
  const u32 rows = min(span->rows, max_verify_rows);
  if (state->verify_method != BLOCK || form_of(state->now.shape) != SAMPLED_TREE || rows < 2 ||
      block_size < 2) {
    return {0, 0, 0};
  }
  u32 length = 1;
#pragma unroll 1
  for (; length + 1 < min(rows, block_size) && parents[length + 1] != 0; length++) {}
  return {rows, (rows - 1) / length, length};
}

// The depth of a row: the number of drafts up to and including it.
DEVICE u32 depth_of(u32 row, u32 length) { return row ? (row - 1) % length + 1 : 0; }

// P(eliminated or event), where `event` is the event's probability if the chain is not eliminated.
DEVICE u64 eliminated_or(u64 eliminated, u64 event) { return eliminated + mul_probability(ONE - eliminated, event); }

// The factor by which the selection changes a token's draft probability. `eliminated` holds, per chain, the
// probability that the chain no longer contains the selected tokens. mass_below: the drafter's probability
// mass in the classes below the token's class; mass_up_to: the same with the token's class.
DEVICE u64 selection_factor(const u64* eliminated,  // [count] shared
                            u32 count, u64 mass_below, u64 mass_up_to) {
  u64 sum = 0, power = ONE;
#pragma unroll 1
  for (u32 c = 0; c < count; c++) {
    const u64 own = eliminated[c];
    // Horner's scheme. An earlier chain stays selected if this one is eliminated or its token is in no higher
    // class. This chain is selected if each earlier one is eliminated or its token is in a lower class.
    sum = mul_probability(sum, eliminated_or(own, mass_up_to)) + mul_probability(power, ONE - own);
    power = mul_probability(power, eliminated_or(own, mass_below));
  }
  return sum;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 1) sample_chains(
    u32* tokens,                           // [sequences][max_verify_rows]: anchor, drafts;
                                           // NONE: padding, or an invalid draft
    const RowDistribution* distributions,  // [sequences][block_size]: row d is for depth d
    const float* logits,                   // [sequences][block_size][vocab]
    const u32* parents,                    // [sequences][max_verify_rows]: parent row; 0: a chain begins
    const Span* spans,                     // [sequences]: rows
    const Sequence* sequences,             // [sequences]
    const u32* tables,                     // [TABLE_WORDS]; reads thi and tlo
    u32 vocab, u32 block_size, u32 max_verify_rows) {
  __shared__ __align__(16) u32 table[512];
  __shared__ __align__(16) u64 warp_sums[WARPS];
  grid_launch();
  load_weight_tables(table, tables);
  grid_wait();
  __syncthreads();
  const u32 row = blockIdx.x, sequence = blockIdx.y;
  const size_t first = size_t(sequence) * max_verify_rows;
  const Sequence* state = sequences + sequence;
  const Chains chains = chains_of(state, parents + first, spans + sequence, block_size, max_verify_rows);
  if (chains.count == 0) return;
  u32 token = row ? NONE : state->now.anchor;
  if (row && row < chains.rows) {
    const u32 depth = depth_of(row, chains.length);
    const size_t at = size_t(sequence) * block_size + depth;
    const RowDistribution d = ld_distribution(distributions + at);
    if (d.rounding_token != NONE) {
      token = sample_row(d, table, logits + at * vocab, vocab,
                         random_bits(philox_stream(state), DRAFT, depth, row), warp_sums);
    }
  }
  if (threadIdx.x == 0) tokens[first + row] = token;
}

extern "C" __global__ void __launch_bounds__(512, 1) chain_classes(
    u64* masses,                      // [sequences][max_verify_rows][CLASSES]: the drafter's mass up to a
                                      // class; written for valid rows with a child
    const RowDistribution* targets,   // [sequences][max_verify_rows]: after the row's path
    const float* target_logits,       // [sequences][max_verify_rows][vocab]
    const RowDistribution* drafters,  // [sequences][block_size]: row d is for depth d
    const float* draft_logits,        // [sequences][block_size][vocab]
    const u32* parents,               // [sequences][max_verify_rows]: parent row; 0 where a chain begins
    const Span* spans,                // [sequences]: rows
    const Sequence* sequences,        // [sequences]
    const u32* tables,                // [TABLE_WORDS]; reads thi and tlo
    u32 vocab, u32 block_size, u32 max_verify_rows) {
  __shared__ __align__(16) u32 table[512];
  __shared__ u64 bins[CLASSES * 32];  // [CLASSES][lane]: the lanes of a warp never contend for an entry
  __shared__ u64 sums[CLASSES];
  grid_launch();
  load_weight_tables(table, tables);
  grid_wait();
  const u32 row = blockIdx.x, sequence = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t first = size_t(sequence) * max_verify_rows;
  const Chains chains =
      chains_of(sequences + sequence, parents + first, spans + sequence, block_size, max_verify_rows);
  if (chains.count == 0 || row > chains.count * chains.length || depth_of(row, chains.length) == chains.length) return;
  const size_t draft = size_t(sequence) * block_size + depth_of(row, chains.length) + 1;
  const RowPair pair = {ld_distribution(targets + first + row), ld_distribution(drafters + draft),
                        target_logits + (first + row) * vocab, draft_logits + draft * vocab};
  if (pair.p.rounding_token == NONE || pair.q.rounding_token == NONE) return;
  for (u32 i = threadIdx.x; i < CLASSES * 32; i += THREADS) bins[i] = 0;
  __syncthreads();
  for (u32 group = threadIdx.x; group < (vocab + 3) / 4; group += THREADS) {
    map_pair(pair, table, vocab, group, [&](u64 p, u64 q) {
      if (q) atomicAdd(bins + class_of(p, q) * 32 + lane, q);
      return u64(0);
    });
  }
  __syncthreads();
  for (u32 c = warp; c < CLASSES; c += WARPS) {
    u64 sum = bins[c * 32 + lane];
    for (int flip = 16; flip; flip /= 2) sum += __shfl_xor_sync(~0u, sum, flip);
    if (lane == 0) sums[c] = sum;
  }
  __syncthreads();
  if (threadIdx.x >= CLASSES) return;
  u64 up_to = 0;
  for (u32 c = 0; c <= threadIdx.x; c++) up_to += sums[c];
  masses[(first + row) * CLASSES + threadIdx.x] = up_to;
}

extern "C" __global__ void __launch_bounds__(512, 1) verify_chains(
    u32* accepted,                    // [sequences]; skipped sequences keep this output and the next two
    u32* next,                        // [sequences]; NONE: invalid
    u32* path,                        // [sequences][max_verify_rows]: accepted rows from 0 on, then NONE
    const RowDistribution* targets,   // [sequences][max_verify_rows]: after the row's path
    const float* target_logits,       // [sequences][max_verify_rows][vocab]
    const RowDistribution* drafters,  // [sequences][block_size]: row d is for depth d
    const float* draft_logits,        // [sequences][block_size][vocab]
    const u32* tokens,                // [sequences][max_verify_rows]: anchor, drafts
    const u32* parents,               // [sequences][max_verify_rows]: parent row; 0 where a chain begins
    const Span* spans,                // [sequences]: rows
    const Sequence* sequences,        // [sequences]
    const u32* tables,                // [TABLE_WORDS]; reads thi and tlo
    const u64* masses,                // [sequences][max_verify_rows][CLASSES], from chain_classes
    u64* overlaps,                    // [sequences][block_size]: sum of min(w p, selected q) per row
    u32* counters,                    // [sequences]
    u32 vocab, u32 block_size, u32 max_verify_rows) {
  __shared__ __align__(16) u32 table[512];
  __shared__ __align__(16) u64 warp_sums[WARPS];
  // At c length + i, for draft i of chain c: token, class, p, q, the drafter's mass below the class, and the
  // mass up to it.
  __shared__ u32 drafts[MAX_ROWS];
  __shared__ u32 classes[MAX_ROWS];
  __shared__ u64 ps[MAX_ROWS];
  __shared__ u64 qs[MAX_ROWS];
  __shared__ u64 mass_below[MAX_ROWS];
  __shared__ u64 mass_up_to[MAX_ROWS];
  __shared__ u64 eliminated[MAX_ROWS];      // at i count + c: probability that chain c is eliminated before
                                            // draft i
  __shared__ u64 prefix_weights[MAX_ROWS];  // w of the selected chain's prefixes, as in verify_drafts
  __shared__ u64 factors[CLASSES];          // selection_factor of each class after a row
  __shared__ __align__(16) u32 result[4];   // selected chain, longest prefix with w > 0, valid;
                                            // 1 word for accepted_prefix
  grid_launch();
  load_weight_tables(table, tables);
  grid_wait();
  __syncthreads();
  const u32 row = blockIdx.x, sequence = blockIdx.y, lane = threadIdx.x % 32;
  const size_t first = size_t(sequence) * max_verify_rows, draft_first = size_t(sequence) * block_size;
  const Sequence* state = sequences + sequence;
  const Chains chains = chains_of(state, parents + first, spans + sequence, block_size, max_verify_rows);
  const u32 count = chains.count, length = chains.length;
  if (count == 0 || row > length) return;
  const PhiloxStream stream = philox_stream(state);

  if (threadIdx.x < count * length) {
    const u32 i = threadIdx.x, depth = i % length, parent = depth ? i : 0, token = tokens[first + i + 1];
    const RowDistribution p = ld_distribution(targets + first + parent);
    const RowDistribution q = ld_distribution(drafters + draft_first + depth + 1);
    const bool valid = p.rounding_token != NONE && q.rounding_token != NONE;
    const u64 token_p = valid ? probability_at(p, table, target_logits + (first + parent) * vocab, vocab, token) : 0;
    const u64 token_q =
        valid ? probability_at(q, table, draft_logits + (draft_first + depth + 1) * vocab, vocab, token) : 0;
    const u32 c = class_of(token_p, token_q);
    const u64* up_to = masses + (first + parent) * CLASSES;
    drafts[i] = token, classes[i] = c, ps[i] = token_p, qs[i] = token_q;
    mass_below[i] = valid && c ? up_to[c - 1] : 0, mass_up_to[i] = valid ? up_to[c] : 0;
  }
  __syncthreads();

  // The selection, by one warp: lane l holds chains l and l + 32.
  if (threadIdx.x < 32) {
    bool remaining[2] = {lane < count, lane + 32 < count};
    u64 own_eliminated[2] = {0, 0}, w = ONE;
    u32 selected = 0, longest = 0;
    bool valid = targets[first].rounding_token != NONE;
#pragma unroll 1
    for (u32 i = 0; i < length; i++) {
      u32 best = NONE;
#pragma unroll
      for (u32 j = 0; j < 2; j++) {
        const u32 c = lane + 32 * j;
        if (c < count) eliminated[i * count + c] = own_eliminated[j];
        if (remaining[j]) best = min(best, (CLASSES - 1 - classes[c * length + i]) * MAX_ROWS + c);
      }
      selected = __reduce_min_sync(~0u, best) % MAX_ROWS;
      __syncwarp();
      const u32 at = selected * length + i, token = drafts[at];
      const u64 q = qs[at], up_to = mass_up_to[at];
      w = mul_div(w, ps[at],
                  mul_probability(q, selection_factor(eliminated + i * count, count, mass_below[at], up_to)));
      if (lane == 0) prefix_weights[i] = w;
      if (w && longest == i) longest++;
      valid &= targets[first + at + 1].rounding_token != NONE &&
               drafters[draft_first + i + 1].rounding_token != NONE;
#pragma unroll
      for (u32 j = 0; j < 2; j++) {
        const u32 c = lane + 32 * j;
        remaining[j] = remaining[j] && drafts[c * length + i] == token;
        const u64 before = own_eliminated[j];
        own_eliminated[j] = c < selected    ? ONE
                            : c == selected ? 0
                                            : ONE - mul_div(ONE - before, q, eliminated_or(before, up_to));
      }
    }
    if (lane == 0) result[0] = selected, result[1] = longest, result[2] = u32(valid);
  }
  __syncthreads();
  const u32 selected = result[0], longest = result[1];
  const bool valid = result[2] != 0;
  const auto prefix_weight = [&](u32 at) { return at ? prefix_weights[at - 1] : ONE; };
  // The row of the selected chain after `at` drafts.
  const auto row_at = [&](u32 at) { return first + (at ? selected * length + at : 0); };
  const auto pair_at = [&](u32 at) {
    const size_t draft = draft_first + at + 1;
    return RowPair{ld_distribution(targets + row_at(at)), ld_distribution(drafters + draft),
                   target_logits + row_at(at) * vocab, draft_logits + draft * vocab};
  };
  // Fills `factors` for the row after `at` drafts.
  const auto load_factors = [&](u32 at) {
    if (threadIdx.x < CLASSES) {
      const u64* up_to = masses + row_at(at) * CLASSES + threadIdx.x;
      factors[threadIdx.x] = selection_factor(eliminated + at * count, count, threadIdx.x ? up_to[-1] : 0, up_to[0]);
    }
    __syncthreads();
  };
  // The probability that the selected chain drafts the token.
  const auto selected_q = [&](u64 p, u64 q) { return mul_probability(q, factors[class_of(p, q)]); };

  if (valid && row > 0 && row <= longest && row < length && prefix_weight(row) < ONE) {
    load_factors(row);
    const u64 here = prefix_weight(row);
    const u64 sum = sum_pair(pair_at(row), table, vocab, warp_sums,
                             [&](u64 p, u64 q) { return min(mul_probability(here, p), selected_q(p, q)); });
    if (threadIdx.x == 0) st_cg(overlaps + draft_first + row, sum);
  }
  const u32 num_accepted = accepted_prefix(stream, overlaps + draft_first, counters + sequence, length,
                                           valid ? longest : 0, result + 3, prefix_weight);
  if (num_accepted == NONE) return;
  u32 token = NONE;
  if (valid) {
    const u64 bits = random_bits(stream, RESIDUAL, num_accepted + 1, num_accepted), w = prefix_weight(num_accepted);
    if (num_accepted < length) {
      load_factors(num_accepted);
      const RowPair here = pair_at(num_accepted);
      token = sample_weights(vocab, bits, warp_sums, [&](u32 group) {
        return map_pair(here, table, vocab, group,
                        [&](u64 p, u64 q) { return saturating_sub(mul_probability(w, p), selected_q(p, q)); });
      });
    }
    // An empty residual means that p and the selected chain's q are equal.
    const RowDistribution p = ld_distribution(targets + row_at(num_accepted));
    if (token == NONE) {
      token = sample_row(p, table, target_logits + row_at(num_accepted) * vocab, vocab, bits, warp_sums);
    }
  }
  if (threadIdx.x < max_verify_rows) {
    path[first + threadIdx.x] = threadIdx.x <= num_accepted ? u32(row_at(threadIdx.x) - first) : NONE;
  }
  if (threadIdx.x == 0) accepted[sequence] = num_accepted, next[sequence] = token;
}
