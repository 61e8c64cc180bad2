// A draft tree per sequence from the drafter's choices: `Tree::best_first` of src/spec/tree.rs, and the tables of the pass that
// verifies it.
//
// Computes: the most probable prefixes, best first, until the tree has as many rows as the sequence may verify, or `wide`,
//           or there are no more. Between equal costs the less deep, then the better ranks from the anchor on. A sequence
//           that drafts a chain has its drafts one behind another. A tree of drawn tokens has the shape that costs of
//           `typical` give, or under the rule `block` that of several chains; its tokens are not known yet.
// Work:     grid (sequences), one warp each; lane l holds rows l and l + 32, and two places for prefixes that may be next.
//           A turn takes the best of the 64: four reductions of 32 bits. Then its place holds its next sibling, and the
//           new row's place its first child; so 64 places are enough, and no sort of a level is needed.
// Order:    none that matters: no two prefixes have the same key.
// Bytes:    sequences x (block x most x 8 + wide x 48).
// Needs:    block 1 to 64, wide 1 to 64, most 1 to 63. Choices and state may hold anything; costs descend nowhere along
//           most, or the tree is another, of the same form.
#include "common/state.cuh"

namespace {

typedef unsigned __int128 u128;

constexpr u32 MOST = 63;
// Bits of a key: cost, depth, and the code of the ranks.
constexpr u32 DEPTH_BITS = 6, CODE_BITS = 90;

// Rank r as a code of which none begins another and whose order is that of ranks: as many ones as r + 1 has digits behind
// its first, a zero, those digits. Prefixes that can come into a tree have better ones in number of the product of all
// their r + 1, which therefore is below 64: at most 10 bits more than the depth, 73 in all.
WRAPPER u32 code_length(u32 rank) { return 2 * (31 - u32(__clz(int(rank + 1)))) + 1; }
WRAPPER u32 code_of(u32 rank) {
  const u32 digits = 31 - u32(__clz(int(rank + 1)));
  return ((1u << digits) - 1) << (digits + 1) | ((rank + 1) ^ 1u << digits);
}

// A prefix that may be next: where it hangs, and its place in the order, smaller is better.
struct Prefix {
  u128 key;
  u32 parent, rank;
  u32 used;  // bits of the code before its last rank's
};
WRAPPER u128 nothing() { return ~u128(0); }

// Drafts of each of several chains in a tree of up to `rows` rows: `chains` of src/spec/tree.rs.
WRAPPER u32 chain_drafts(u32 rows, u32 depth) {
  const u32 drafts = rows - 1;
  u32 count = 2;
  for (; (count + 1) * (count + 1) <= drafts; count++) {}
  return min(depth, max(1u, drafts / count));
}

// The prefix of `rank` behind one whose code begins with the `used` first bits of `code`.
WRAPPER Prefix prefix(u32 cost, u32 depth, u128 code, u32 used, u32 parent, u32 rank) {
  // A sound tree never has more; a last rank of 63, one too many, takes 13.
  used = min(used, CODE_BITS - 13);
  const u128 before = code >> (CODE_BITS - used) << (CODE_BITS - used);
  const u128 last = u128(code_of(rank)) << (CODE_BITS - used - code_length(rank));
  const u128 key = u128(cost) << (DEPTH_BITS + CODE_BITS) | u128(depth & 63) << CODE_BITS | before | last;
  return {cost == NONE ? nothing() : key, parent, rank, used};
}

}  // namespace

KERNEL(32, 8, tree_build,
       (u32* tokens,           // [sequences][wide]: anchor, drafts; NONE: padding, or a damaged draft
        u32* parents,          // [sequences][wide]: the row a row follows; 0 for the anchor and for padding
        u64* masks,            // [sequences][wide]: bit j: row j is on the way to this one, or is this one; 0 for padding
        Row* table,            // [sequences][wide], of the pass that verifies
        Span* spans,           // [sequences]: its context, and how many rows there are
        const uint2* choices,  // [sequences][block][most]: (token, cost); those for place j are row j's, row 0 unused
        const u32* counts,     // [sequences][block]; NONE: damaged
        const u32* drafts,          // [sequences][block], of chains: row j's token is the draft for place j; row 0 unused
        const u32* typical,         // [most], of trees that are drawn: what a draft costs by its place among its siblings
        const Sequence* sequences,  // [sequences]
        u32 block, u32 wide, u32 most)) {
  SHARED(u32, costs, 63 * MOST);
  grid_launch();
  grid_wait();
  const u32 own = blockIdx.x, lane = threadIdx.x;
  const Progress s = ld_progress(sequences + own);
  const u32 places = block_rows(s, block), rows = min(verified_rows(s), wide);
  const bool chain = form_of(s.shape) == CHAIN_OF_DRAFTS, drawn = form_of(s.shape) == DRAWN;
  const bool several = drawn && ld(&sequences[own].rule) == BLOCK;
  const u32 levels = places && !chain ? places - 1 : 0;
  choices += size_t(own) * block * most, counts += size_t(own) * block, drafts += size_t(own) * block;

  // NONE: no such choice, in a list or behind the last level.
  bool bad = false;
  for (u32 i = lane; i < levels; i += 32) bad |= ld(counts + i + 1) == NONE;
  const bool damaged = __any_sync(~0u, bad) && rows > 1 && !drawn;
  for (u32 i = lane; i < levels * most; i += 32) {
    const bool there = i % most < ld(counts + i / most + 1);
    sts(costs + i, drawn ? ld(typical + i % most) : there ? ld(&choices[most + i].y) : NONE);
  }
  __syncwarp();
  const auto cost_of = [&](u32 level, u32 rank) {
    return level < levels && rank < most ? lds(costs + level * most + rank) : NONE;
  };
  const auto sum = [](u32 before, u32 cost) { return cost == NONE ? NONE : before + cost; };

  // The anchor is row 0; its place holds the best first token.
  u32 parent[2] = {0, 0}, rank[2] = {0, 0}, depth[2] = {0, 0}, count = places ? 1 : 0;
  u64 mask[2] = {lane == 0 && places ? 1ull : 0, 0};
  Prefix next[2] = {prefix(NONE, 0, 0, 0, 0, 0), prefix(NONE, 0, 0, 0, 0, 0)};
  if (lane == 0) next[0] = prefix(cost_of(0, 0), 1, 0, 0, 0, 0);
#pragma unroll 1
  while (count && count < rows && levels && !damaged && !several) {
    const u32 better = next[1].key < next[0].key;
    const u128 mine = better ? next[1].key : next[0].key;
    u128 key = 0;
    bool still = true;
#pragma unroll
    for (int shift = 96; shift >= 0; shift -= 32) {
      const u32 word = u32(mine >> shift), least = __reduce_min_sync(~0u, still ? word : NONE);
      still &= word == least;
      key |= u128(least) << shift;
    }
    if (key == nothing()) break;
    const u32 from = u32(__ffs(int(__ballot_sync(~0u, still)))) - 1;
    const u32 half = __shfl_sync(~0u, better, int(from));
    const Prefix winner = better ? next[1] : next[0];
    const u32 of = __shfl_sync(~0u, winner.parent, int(from)), at = __shfl_sync(~0u, winner.rank, int(from));
    const u32 used = __shfl_sync(~0u, winner.used, int(from));
    const u64 low = __shfl_sync(~0u, mask[0], int(of % 32)), high = __shfl_sync(~0u, mask[1], int(of % 32));
    const u32 cost = u32(key >> (DEPTH_BITS + CODE_BITS)), deep = u32(key >> CODE_BITS) & 63;
    const u32 level = deep - 1;
    const u128 code = key & ((u128(1) << CODE_BITS) - 1);
    const Prefix sibling = prefix(sum(cost - cost_of(level, at), cost_of(level, at + 1)), deep, code, used, of, at + 1);
    const Prefix child = prefix(sum(cost, cost_of(deep, 0)), deep + 1, code, used + code_length(at), count, 0);
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
      if (lane == from && half == i) next[i] = sibling;
      if (lane + i * 32 != count) continue;
      next[i] = child;
      parent[i] = of, rank[i] = at, depth[i] = deep;
      mask[i] = (of < 32 ? low : high) | 1ull << count;
    }
    count++;
  }

  // A draft that is NONE tells round_finish.
  if (damaged && count) count = 2;
  if (chain) count = min(places, rows);
  const u32 each = several && levels && rows > 1 ? chain_drafts(rows, levels) : 0;
  if (each) count = 1 + (rows - 1) / each * each;
#pragma unroll
  for (u32 i = 0; i < 2; i++) {
    const u32 row = lane + i * 32;
    if (row >= wide) continue;
    const size_t to = size_t(own) * wide + row;
    const bool there = row < count, draft = there && row && !damaged;
    if (there && damaged && row) depth[i] = 1, mask[i] = 3;
    if (there && chain) parent[i] = row ? row - 1 : 0, depth[i] = row, mask[i] = ~0ull >> (63 - row);
    if (there && each && row) {
      const u32 before = (row - 1) % each;
      parent[i] = before ? row - 1 : 0, depth[i] = before + 1, mask[i] = ((2ull << before) - 1) << (row - before) | 1;
    }
    u32 token = there && !row ? s.anchor : NONE;
    if (draft && !drawn) token = chain ? ld(drafts + row) : ld(&choices[size_t(depth[i]) * most + rank[i]].x);
    st(tokens + to, token);
    st(parents + to, parent[i]);
    st(masks + to, mask[i]);
    st(table + to, Row{there ? own : NONE, there ? s.length + depth[i] : 0, there ? s.length + row : NONE,
                       there ? u32(to) : NONE});
  }
  if (lane == 0) st(spans + own, Span{count ? s.length : 0, count});
}
