// Trees of fixed shape whose siblings are sampled without replacement and verified by recursive rejection
// sampling (Sequoia, arXiv 2402.12374): `sample_tree` and `recursive_rejection` of src/spec/verify.rs make
// the same decisions.
//
// Computes:      sample_siblings: the tokens of each sequence's tree. A row's children are sampled from the
//                drafter's distribution of their depth, each without its earlier siblings' tokens. When no
//                token is left, a child repeats the last sibling's token. verify_tree: from the anchor down,
//                the accepted child of each row, and the next token after the last accepted row, sampled from
//                the residual distribution. Both skip sequences other than those with verification method
//                REJECTION, a sampled tree, and at least two rows.
// Work:          512 threads. sample_siblings: grid (max_verify_rows, sequences), one row's children per CUDA
//                block. verify_tree: grid (sequences). The distributions after each sibling are not stored: a
//                few words per sibling describe the update, and all updates are applied to a probability
//                when it is read.
// Order:         sampling cumulates weights in ascending id order; all other sums are order-independent.
// Bytes:         sample_siblings: one row of logits 2 n times per row with n children. verify_tree: two rows
//                of logits up to 2 n times per row of the accepted path with n children tested.
// Preconditions: vocab <= 2^26; block_size and max_verify_rows 1 to 64; distributions, logits and tables
//                16-byte aligned.
#include "spec/distribution.cuh"

namespace {

// Fields of `Updates`: scales have 64 bits, marks 32 bits.
enum Scale : u32 { Q_INVERSE, Q_REMAINDER, P_INVERSE, P_REMAINDER, SCALES };
enum Mark : u32 { TOKEN, Q_SHIFT, Q_ROUNDING_TOKEN, P_SHIFT, P_ROUNDING_TOKEN, MARKS };

// How p and q change from one sibling to the next when the first is rejected. The drafter's q loses the
// sampled token and is rescaled to 2^48. The target's p becomes max(p - q, 0), rescaled likewise.
struct Updates {
  u64 (*scales)[MAX_ROWS];  // [SCALES][update] shared
  u32 (*marks)[MAX_ROWS];   // [MARKS][update] shared
};
DEVICE u64 scaled(u64 w, u32 shift, u64 inverse) { return __umul64hi(w << (shift & 63), inverse); }

struct Probabilities {
  u64 p, q;
};
DEVICE u64 residual(Probabilities x) { return saturating_sub(x.p, x.q); }

// A token's q after `count` updates.
DEVICE u64 updated(const Updates& updates, u32 count, u64 q, u32 id) {
#pragma unroll 1
  for (u32 s = 0; s < count; s++) {
    if (id == updates.marks[TOKEN][s]) return 0;
    q = scaled(q, updates.marks[Q_SHIFT][s], updates.scales[Q_INVERSE][s]) +
        (id == updates.marks[Q_ROUNDING_TOKEN][s] ? updates.scales[Q_REMAINDER][s] : 0);
  }
  return q;
}

// A token's p and q after `count` updates.
DEVICE Probabilities updated(const Updates& updates, u32 count, Probabilities x, u32 id) {
#pragma unroll 1
  for (u32 s = 0; s < count; s++) {
    x.p = scaled(residual(x), updates.marks[P_SHIFT][s], updates.scales[P_INVERSE][s]) +
          (id == updates.marks[P_ROUNDING_TOKEN][s] ? updates.scales[P_REMAINDER][s] : 0);
    x.q = id == updates.marks[TOKEN][s]
              ? 0
              : scaled(x.q, updates.marks[Q_SHIFT][s], updates.scales[Q_INVERSE][s]) +
                    (id == updates.marks[Q_ROUNDING_TOKEN][s] ? updates.scales[Q_REMAINDER][s] : 0);
  }
  return x;
}

// The token with the largest weight; the lowest id among equals.
struct Heaviest {
  u64 weight;
  u32 id;
};
DEVICE Heaviest heavier(Heaviest a, Heaviest b) {
  return b.weight > a.weight || (b.weight == a.weight && b.id < a.id) ? b : a;
}

// The block's heaviest token, returned to every thread. The buffers may be overwritten after one
// more barrier.
DEVICE u32 block_heaviest(Heaviest own,
                          u64* weights,  // [WARPS] shared
                          u32* ids) {    // [WARPS] shared
  for (int flip = 16; flip; flip /= 2) {
    own = heavier(own, {__shfl_xor_sync(~0u, own.weight, flip), __shfl_xor_sync(~0u, own.id, flip)});
  }
  if (threadIdx.x % 32 == 0) weights[threadIdx.x / 32] = own.weight, ids[threadIdx.x / 32] = own.id;
  __syncthreads();
  for (u32 w = 0; w < WARPS; w++) own = heavier(own, {weights[w], ids[w]});
  return own.id;
}

// The shift and inverse that turn weights with this sum, at least 1, into probabilities.
DEVICE void scale_of(u64 sum, u32& shift, u64& inverse) {
  shift = u32(__clzll((long long)(sum)));
  inverse = reciprocal(sum << shift);
}

// The drafter's row of a depth.
struct DraftRow {
  RowDistribution distribution;
  const float* logits;  // [vocab]
  const u32* table;     // [512] shared
  u32 vocab;
};
// The q of any id after `count` updates; 0 outside the vocabulary.
DEVICE u64 draft_probability(const DraftRow& row, const Updates& updates, u32 count, u32 id) {
  if (id >= row.vocab) return 0;
  return updated(updates, count, probability(row.distribution, row.table, row.logits[id], id), id);
}

// Shared memory of block-wide reductions.
struct ReduceScratch {
  u64 *warp_sums, *weights;  // [WARPS] each
  u32* ids;                  // [WARPS]
};

// Writes q's part of update `count`, which removes `token`, and ends with a barrier. Returns false without
// writing if no other token is left. The caller must have passed a barrier since the last reduction.
DEVICE bool remove_token(const DraftRow& row, const Updates& updates, u32 count, u32 token,
                         const ReduceScratch& scratch) {
  const u64 rest = ONE - draft_probability(row, updates, count, token);
  if (rest == 0) return false;
  u32 shift;
  u64 inverse, sum = 0;
  scale_of(rest, shift, inverse);
  Heaviest heaviest = {0, NONE};
#pragma unroll 1
  for (u32 group = threadIdx.x; group < (row.vocab + 3) / 4; group += THREADS) {
    const float4 v = load4(row.logits, row.vocab, group);
    const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      const u32 id = group * 4 + i;
      if (id >= row.vocab || id == token) continue;
      const u64 w = updated(updates, count, probability(row.distribution, row.table, four[i], id), id);
      sum += scaled(w, shift, inverse);
      heaviest = heavier(heaviest, {w, id});
    }
  }
  sum = block_sum(sum, scratch.warp_sums);
  const u32 rounding_token = block_heaviest(heaviest, scratch.weights, scratch.ids);
  if (threadIdx.x == 0) {
    updates.marks[TOKEN][count] = token, updates.marks[Q_SHIFT][count] = shift;
    updates.marks[Q_ROUNDING_TOKEN][count] = rounding_token;
    updates.scales[Q_INVERSE][count] = inverse, updates.scales[Q_REMAINDER][count] = ONE - sum;
  }
  __syncthreads();
  return true;
}

// The depth of a row, 0 for the anchor's. NONE if the row or one of its ancestors has a parent that is not an
// earlier row.
DEVICE u32 depth_of(const u32* parents,  // [max_verify_rows]
                    u32 row) {
  u32 depth = 0;
#pragma unroll 1
  for (; row; depth++) {
    const u32 parent = parents[row];
    if (parent >= row) return NONE;
    row = parent;
  }
  return depth;
}

// The first row after `child` and below `rows` whose parent is `row`; `rows` if there is none.
DEVICE u32 next_child(const u32* parents,  // [max_verify_rows]
                      u32 row, u32 child, u32 rows) {
#pragma unroll 1
  for (child++; child < rows && parents[child] != row; child++) {}
  return child;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 1) sample_siblings(
    u32* tokens,                           // [sequences][max_verify_rows]: anchor, drafts;
                                           // NONE: padding, or an invalid draft
    const RowDistribution* distributions,  // [sequences][block_size]: row d is for depth d
    const float* logits,                   // [sequences][block_size][vocab]
    const u32* parents,                    // [sequences][max_verify_rows]: parent row, an earlier row;
                                           // 0 unused
    const Span* spans,                     // [sequences]: rows of the tree
    const Sequence* sequences,             // [sequences]
    const u32* tables,                     // [TABLE_WORDS]; reads thi and tlo
    u32 vocab, u32 block_size, u32 max_verify_rows) {
  __shared__ __align__(16) u32 table[512];
  __shared__ __align__(16) u64 warp_sums[WARPS];
  __shared__ u64 weights[WARPS];
  __shared__ u32 ids[WARPS];
  __shared__ u64 scales[2][MAX_ROWS];  // q's fields only
  __shared__ u32 marks[3][MAX_ROWS];
  grid_launch();
  load_weight_tables(table, tables);
  grid_wait();
  __syncthreads();
  const u32 row = blockIdx.x, sequence = blockIdx.y;
  const size_t first = size_t(sequence) * max_verify_rows;
  const Sequence* state = sequences + sequence;
  const u32 rows = min(spans[sequence].rows, max_verify_rows);
  if (state->verify_method != REJECTION || form_of(state->now.shape) != SAMPLED_TREE || rows < 2) return;
  if (threadIdx.x == 0) {
    if (row == 0) tokens[first] = state->now.anchor;
    if (row >= rows) tokens[first + row] = NONE;
  }
  if (row >= rows) return;
  const u32 depth = depth_of(parents + first, row);
  u32 child = next_child(parents + first, row, row, rows);
  if (child == rows) return;

  const bool too_deep = depth >= block_size - 1;
  const size_t at = size_t(sequence) * block_size + (too_deep ? 0 : depth + 1);
  const DraftRow from = {ld_distribution(distributions + at), logits + at * vocab, table, vocab};
  const PhiloxStream stream = philox_stream(state);
  const Updates updates = {scales, marks};
  const ReduceScratch scratch = {warp_sums, weights, ids};
  u32 count = 0, token = NONE;
  bool left = !too_deep && from.distribution.rounding_token != NONE;  // q still has tokens
#pragma unroll 1
  for (bool begun = false; child < rows; child = next_child(parents + first, row, child, rows), begun = true) {
    if (begun && left) {
      __syncthreads();
      left = remove_token(from, updates, count, token, scratch);
      count += left;
    }
    if (left) {
      token = sample_weights(vocab, random_bits(stream, DRAFT, depth + 1, child), warp_sums, [&](u32 group) {
        const float4 v = load4(from.logits, vocab, group);
        const float four[4] = {v.x, v.y, v.z, v.w};
        Weights4 q;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          const u32 id = group * 4 + i;
          q.w[i] = id < vocab ? updated(updates, count, probability(from.distribution, table, four[i], id), id) : 0;
        }
        return q;
      });
    }
    if (threadIdx.x == 0) tokens[first + child] = token;
  }
}

extern "C" __global__ void __launch_bounds__(512, 1) verify_tree(
    u32* accepted,                    // [sequences]; skipped sequences keep this output and the next two
    u32* next,                        // [sequences]; NONE: invalid
    u32* path,                        // [sequences][max_verify_rows]: accepted rows from 0 on, then NONE
    const RowDistribution* targets,   // [sequences][max_verify_rows]: after the row's path
    const float* target_logits,       // [sequences][max_verify_rows][vocab]
    const RowDistribution* drafters,  // [sequences][block_size]: row d is for depth d
    const float* draft_logits,        // [sequences][block_size][vocab]
    const u32* tokens,                // [sequences][max_verify_rows]: anchor, drafts
    const u32* parents,               // [sequences][max_verify_rows]: parent row
    const Span* spans,                // [sequences]: rows of the tree
    const Sequence* sequences,        // [sequences]
    const u32* tables,                // [TABLE_WORDS]; reads thi and tlo
    u32 vocab, u32 block_size, u32 max_verify_rows) {
  __shared__ __align__(16) u32 table[512];
  __shared__ __align__(16) u64 warp_sums[WARPS];
  __shared__ u64 weights[WARPS];
  __shared__ u32 ids[WARPS];
  __shared__ u64 scales[SCALES][MAX_ROWS];
  __shared__ u32 marks[MARKS][MAX_ROWS];
  grid_launch();
  load_weight_tables(table, tables);
  grid_wait();
  __syncthreads();
  const u32 sequence = blockIdx.x;
  const size_t first = size_t(sequence) * max_verify_rows;
  const Sequence* state = sequences + sequence;
  const u32 rows = min(spans[sequence].rows, max_verify_rows);
  if (state->verify_method != REJECTION || form_of(state->now.shape) != SAMPLED_TREE || rows < 2) return;
  const PhiloxStream stream = philox_stream(state);
  const Updates updates = {scales, marks};
  const ReduceScratch scratch = {warp_sums, weights, ids};

  u32 row = 0, depth = 0, token = NONE;
  if (threadIdx.x < max_verify_rows) path[first + threadIdx.x] = threadIdx.x ? NONE : 0;
  __syncthreads();
#pragma unroll 1
  for (bool accepted_child = true; accepted_child;) {
    accepted_child = false;
    const RowDistribution p = ld_distribution(targets + first + row);
    u32 child = next_child(parents + first, row, row, rows);
    const bool has_child = child < rows, too_deep = depth >= block_size - 1;
    const size_t at = size_t(sequence) * block_size + (too_deep ? 0 : depth + 1);
    const DraftRow q = {ld_distribution(drafters + at), draft_logits + at * vocab, table, vocab};
    const float* target_row = target_logits + (first + row) * vocab;
    if (p.rounding_token == NONE || (has_child && (too_deep || q.distribution.rounding_token == NONE))) break;
    const auto both = [&](u32 count, float target, float draft, u32 id) {
      const Probabilities initial = {probability(p, table, target, id), probability(q.distribution, table, draft, id)};
      return updated(updates, count, initial, id);
    };
    // `rejected` is the last rejected token, tested after `count` updates. `q_ready`: q's part of the next
    // update has been written, p's part has not.
    u32 count = 0, rejected = NONE;
    bool q_ready = false;
#pragma unroll 1
    for (; child < rows; child = next_child(parents + first, row, child, rows)) {
      if (rejected != NONE && !q_ready) {
        __syncthreads();
        q_ready = remove_token(q, updates, count, rejected, scratch);
        // q has no token left: the remaining children are repeats.
        if (!q_ready) break;
      }
      const u32 draft = tokens[first + child];
      // A token with q = 0 was not sampled from q: it repeats an earlier sibling and is skipped.
      const u64 draft_q = draft_probability(q, updates, count + q_ready, draft);
      if (draft_q == 0) continue;
      if (q_ready) {
        // p's part of the update: the sum of max(p - q, 0), then the sum after scaling, for the remainder.
        u32 shift = 0;
        u64 inverse = 0, sum = 0;
#pragma unroll 1
        for (u32 again = 0; again < 2; again++) {
          sum = 0;
          Heaviest heaviest = {0, NONE};
#pragma unroll 1
          for (u32 group = threadIdx.x; group < (vocab + 3) / 4; group += THREADS) {
            const float4 a = load4(target_row, vocab, group), b = load4(q.logits, vocab, group);
            const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
              const u32 id = group * 4 + i;
              if (id >= vocab) continue;
              const u64 w = residual(both(count, as[i], bs[i], id));
              sum += again ? scaled(w, shift, inverse) : w;
              heaviest = heavier(heaviest, {w, id});
            }
          }
          __syncthreads();
          sum = block_sum(sum, warp_sums);
          const u32 rounding_token = block_heaviest(heaviest, weights, ids);
          // Inconsistent input may have no weight at all.
          if (!again) scale_of(max(sum, u64(1)), shift, inverse);
          if (again && threadIdx.x == 0) marks[P_ROUNDING_TOKEN][count] = rounding_token;
        }
        if (threadIdx.x == 0) {
          marks[P_SHIFT][count] = shift;
          scales[P_INVERSE][count] = inverse, scales[P_REMAINDER][count] = ONE - sum;
        }
        __syncthreads();
        count++;
        q_ready = false;
      }
      const Probabilities x = both(count, target_row[draft], q.logits[draft], draft);
      accepted_child = accept(stream, depth + 1, child, x.p, draft_q);
      if (accepted_child) break;
      rejected = draft;
    }
    if (accepted_child) {
      row = child;
      depth++;
      if (threadIdx.x == 0 && depth < max_verify_rows) path[first + depth] = row;
      // All threads have applied this row's updates before the next row's are written.
      __syncthreads();
      continue;
    }
    const u64 bits = random_bits(stream, RESIDUAL, depth + 1, row);
    // Samples from max(p - q, 0) after a rejection, else from p. An empty residual means that p and q are
    // equal; then p is sampled too.
#pragma unroll 1
    for (u32 whole = rejected == NONE; whole < 2 && token == NONE; whole++) {
      token = sample_weights(vocab, bits, warp_sums, [&](u32 group) {
        const float4 a = load4(target_row, vocab, group);
        const float4 b = whole && count == 0 ? a : load4(q.logits, vocab, group);
        const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
        Weights4 weights;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          const u32 id = group * 4 + i;
          const Probabilities x = id < vocab ? both(count, as[i], bs[i], id) : Probabilities{0, 0};
          weights.w[i] = whole ? x.p : residual(x);
        }
        return weights;
      });
    }
  }
  if (threadIdx.x == 0) accepted[sequence] = depth, next[sequence] = token;
}
