// Builds one draft tree per sequence from the drafter's choices, and the row tables of the verification pass:
// `Tree::best_first` of src/spec/tree.rs builds the same trees.
//
// Computes:      best-first trees: the most probable prefixes, until the tree has as many rows as the
//                sequence may verify or max_verify_rows, or no prefix is left. Of equal costs the shallower
//                prefix comes first, then the one with better ranks from the anchor down. Chains: the drafts
//                one after another. Sampled trees: the best-first shape by `typical_costs`, or with
//                verification method BLOCK several chains; their tokens are sampled later.
// Work:          grid (sequences), one warp each; lane l holds rows l and l + 32, and two candidate prefixes.
//                Each step takes the best of the 64 candidates by four 32-bit reductions. The candidate's
//                next sibling replaces it, and its first child becomes the candidate of the new row, so 64
//                candidates suffice and no level is sorted.
// Order:         any: costs are integers, and no two prefixes have the same key.
// Bytes:         sequences x (block_size x max_choices x 8 + max_verify_rows x 48).
// Preconditions: block_size 1 to 64, max_verify_rows 1 to 64, max_choices 1 to 63. Choices and state may hold
//                any value. Costs should ascend along each list of choices; otherwise the tree is well-formed
//                but not the best.
#include "common/state.cuh"

namespace {

typedef unsigned __int128 u128;

constexpr u32 MAX_CHOICES = 63;
// Bits of a key's fields: cost (32), depth, code of the ranks.
constexpr u32 DEPTH_BITS = 6, CODE_BITS = 90;

// A prefix-free code of ranks that sorts like the ranks. Let d be the number of binary digits of r + 1 after
// the leading one; the code of rank r is d ones, a zero, and those d digits. A prefix has at least
// product(r + 1) - 1 better ones, the product over its ranks. In the tree the product is therefore below 64,
// and the code of all its ranks has at most 10 bits more than its depth, 73 in all.
DEVICE u32 code_length(u32 rank) { return 2 * (31 - u32(__clz(int(rank + 1)))) + 1; }
DEVICE u32 code_of(u32 rank) {
  const u32 digits = 31 - u32(__clz(int(rank + 1)));
  return ((1u << digits) - 1) << (digits + 1) | ((rank + 1) ^ 1u << digits);
}

// A candidate for the next row.
struct Prefix {
  u128 key;    // place in the order, smaller is better
  u32 parent;  // row of its parent
  u32 rank;    // of its token among the choices of its depth
  u32 used;    // code bits before those of `rank`
};
DEVICE u128 no_key() { return ~u128(0); }

// Drafts per chain, for several chains of at most `depth` drafts in at most `rows` rows: `chains` of
// src/spec/tree.rs.
DEVICE u32 drafts_per_chain(u32 rows, u32 depth) {
  const u32 drafts = rows - 1;
  u32 count = 2;
  for (; (count + 1) * (count + 1) <= drafts; count++) {}
  return min(depth, max(1u, drafts / count));
}

// The prefix whose last token has this rank. The first `used` bits of `code` code the ranks before it.
DEVICE Prefix prefix(u32 cost, u32 depth, u128 code, u32 used, u32 parent, u32 rank) {
  // A valid tree never uses more bits. The last rank may be 63, one above the maximum; its code has 13 bits.
  used = min(used, CODE_BITS - 13);
  const u128 before = code >> (CODE_BITS - used) << (CODE_BITS - used);
  const u128 last = u128(code_of(rank)) << (CODE_BITS - used - code_length(rank));
  const u128 key = u128(cost) << (DEPTH_BITS + CODE_BITS) | u128(depth & 63) << CODE_BITS | before | last;
  return {cost == NONE ? no_key() : key, parent, rank, used};
}

}  // namespace

extern "C" __global__ void __launch_bounds__(32, 8) tree_build(
    u32* tokens,                // [sequences][max_verify_rows]: anchor, drafts; NONE: padding, or a
                                // invalid draft
    u32* parents,               // [sequences][max_verify_rows]: parent row; 0: anchor, padding
    u64* masks,                 // [sequences][max_verify_rows]: bit j is set if row j is this row or an
                                // ancestor; 0: padding
    Row* table,                 // [sequences][max_verify_rows]: rows of the verification pass
    Span* spans,                // [sequences]: context and rows of the verification pass
    const uint2* choices,       // [sequences][block_size][max_choices]: (token, cost) at row =
                                // depth; row 0 unused
    const u32* counts,          // [sequences][block_size]; NONE: invalid
    const u32* drafts,          // [sequences][block_size], of chains: draft i at i; 0 unused
    const u32* typical_costs,   // [max_choices], for sampled trees: cost of a draft by its place
                                // among its siblings
    const Sequence* sequences,  // [sequences]
    const u32* kept,            // [sequences]: rows of a block whose drafts are used; null: all
    u32 block_size, u32 max_verify_rows, u32 max_choices) {
  __shared__ u32 costs[63 * MAX_CHOICES];
  grid_launch();
  grid_wait();
  const u32 sequence = blockIdx.x, lane = threadIdx.x;
  const Progress s = ld_progress(sequences + sequence);
  const u32 draft_rows = min(block_rows(s, block_size), kept ? kept[sequence] : NONE);
  const u32 rows = min(verified_rows(s), max_verify_rows);
  const bool chain = form_of(s.shape) == CHAIN_OF_DRAFTS, sampled = form_of(s.shape) == SAMPLED_TREE;
  const bool several_chains = sampled && sequences[sequence].verify_method == BLOCK;
  const u32 levels = draft_rows && !chain ? draft_rows - 1 : 0;
  choices += size_t(sequence) * block_size * max_choices, counts += size_t(sequence) * block_size;
  drafts += size_t(sequence) * block_size;

  // The cost of each choice; NONE where a list is shorter.
  bool bad = false;
  for (u32 i = lane; i < levels; i += 32) bad |= counts[size_t(i) + 1] == NONE;
  const bool invalid = __any_sync(~0u, bad) && rows > 1 && !sampled;
  for (u32 i = lane; i < levels * max_choices; i += 32) {
    const bool exists = i % max_choices < counts[size_t(i / max_choices) + 1];
    costs[i] = sampled ? typical_costs[i % max_choices] : exists ? choices[max_choices + i].y : NONE;
  }
  __syncwarp();
  const auto cost_of = [&](u32 level, u32 rank) {
    return level < levels && rank < max_choices ? costs[level * max_choices + rank] : NONE;
  };
  const auto add_cost = [](u32 before, u32 cost) { return cost == NONE ? NONE : before + cost; };

  // The anchor is row 0; its candidate is the best first token.
  u32 parent[2] = {0, 0}, rank[2] = {0, 0}, depth[2] = {0, 0}, count = draft_rows ? 1 : 0;
  u64 mask[2] = {lane == 0 && draft_rows ? 1ull : 0, 0};
  Prefix candidate[2] = {prefix(NONE, 0, 0, 0, 0, 0), prefix(NONE, 0, 0, 0, 0, 0)};
  if (lane == 0) candidate[0] = prefix(cost_of(0, 0), 1, 0, 0, 0, 0);
#pragma unroll 1
  while (count && count < rows && levels && !invalid && !several_chains) {
    // The minimum of all keys, 32 bits at a time from the top.
    const u32 second = candidate[1].key < candidate[0].key;
    const u128 mine = second ? candidate[1].key : candidate[0].key;
    u128 key = 0;
    bool tied = true;
#pragma unroll
    for (int shift = 96; shift >= 0; shift -= 32) {
      const u32 word = u32(mine >> shift), least = __reduce_min_sync(~0u, tied ? word : NONE);
      tied &= word == least;
      key |= u128(least) << shift;
    }
    if (key == no_key()) break;
    const u32 from = u32(__ffs(int(__ballot_sync(~0u, tied)))) - 1;
    const u32 half = __shfl_sync(~0u, second, int(from));
    const Prefix best = second ? candidate[1] : candidate[0];
    const u32 best_parent = __shfl_sync(~0u, best.parent, int(from));
    const u32 best_rank = __shfl_sync(~0u, best.rank, int(from));
    const u32 used = __shfl_sync(~0u, best.used, int(from));
    const u64 low = __shfl_sync(~0u, mask[0], int(best_parent % 32));
    const u64 high = __shfl_sync(~0u, mask[1], int(best_parent % 32));
    const u32 cost = u32(key >> (DEPTH_BITS + CODE_BITS)), best_depth = u32(key >> CODE_BITS) & 63;
    const u32 level = best_depth - 1;
    const u128 code = key & ((u128(1) << CODE_BITS) - 1);
    const Prefix sibling = prefix(add_cost(cost - cost_of(level, best_rank), cost_of(level, best_rank + 1)), best_depth,
                                  code, used, best_parent, best_rank + 1);
    const Prefix child = prefix(add_cost(cost, cost_of(best_depth, 0)), best_depth + 1, code,
                                used + code_length(best_rank), count, 0);
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
      if (lane == from && half == i) candidate[i] = sibling;
      if (lane + i * 32 != count) continue;
      candidate[i] = child;
      parent[i] = best_parent, rank[i] = best_rank, depth[i] = best_depth;
      mask[i] = (best_parent < 32 ? low : high) | 1ull << count;
    }
    count++;
  }

  // A draft with token NONE reports the damage to round_finish.
  if (invalid && count) count = 2;
  if (chain) count = min(draft_rows, rows);
  const u32 per_chain = several_chains && levels && rows > 1 ? drafts_per_chain(rows, levels) : 0;
  if (per_chain) count = 1 + (rows - 1) / per_chain * per_chain;
#pragma unroll
  for (u32 i = 0; i < 2; i++) {
    const u32 row = lane + i * 32;
    if (row >= max_verify_rows) continue;
    const size_t to = size_t(sequence) * max_verify_rows + row;
    const bool exists = row < count, draft = exists && row && !invalid;
    if (exists && invalid && row) depth[i] = 1, mask[i] = 3;
    if (exists && chain) parent[i] = row ? row - 1 : 0, depth[i] = row, mask[i] = ~0ull >> (63 - row);
    if (exists && per_chain && row) {
      const u32 before = (row - 1) % per_chain;
      parent[i] = before ? row - 1 : 0, depth[i] = before + 1, mask[i] = ((2ull << before) - 1) << (row - before) | 1;
    }
    u32 token = exists && !row ? s.anchor : NONE;
    if (draft && !sampled) {
      token = chain ? drafts[row] : choices[size_t(depth[i]) * max_choices + rank[i]].x;
    }
    tokens[to] = token;
    parents[to] = parent[i];
    masks[to] = mask[i];
    table[to] = Row{exists ? sequence : NONE, exists ? s.length + depth[i] : 0, exists ? s.length + row : NONE,
                    exists ? u32(to) : NONE};
  }
  if (lane == 0) spans[sequence] = Span{count ? s.length : 0, count};
}
