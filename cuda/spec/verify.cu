// Which drafts stand: the rule `match`, for chains and trees, `judge` and `walk` of src/spec/sampling.rs.
//
// Computes: per sequence the walk from row 0 to the lowest child whose token is what the row it hangs from chose, until
//           there is none. The last row's choice is the next token, NONE where that row is damaged.
// Work:     grid (sequences), one warp each; lane l holds rows l and l + 32.
// Order:    rows ascend along a path.
// Bytes:    sequences x block x 16.
// Needs:    block 1 to 64. Rows, tokens, choices and parents may hold anything.
#include "common/rows.cuh"

KERNEL(32, 16, verify,
       (u32* accepted,        // [sequences]: drafts that stand
        u32* next,            // [sequences]: the token after them; NONE: damaged, or the sequence takes no part
        u32* path,            // [sequences][block]: rows of the walk, 0 first; NONE beyond its accepted + 1 rows
        const u32* choices,   // [sequences][block]
        const u32* tokens,    // [sequences][block]: anchor, then drafts
        const u32* parents,   // [sequences][block]: row of the sequence that a draft follows; null: the row before
        const Span* spans,    // [sequences]
        u32 block)) {
  grid_launch();
  grid_wait();
  const u32 lane = threadIdx.x;
  const u32 rows = min(ld(&spans[blockIdx.x].rows), block);
  const size_t first = size_t(blockIdx.x) * block;
  u32 choice[2], token[2], parent[2], way[2] = {NONE, NONE};
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    const u32 row = lane + half * 32;
    const bool there = row < rows;
    choice[half] = there ? ld(choices + first + row) : NONE;
    token[half] = there ? ld(tokens + first + row) : NONE;
    parent[half] = !there ? NONE : parents ? ld(parents + first + row) : row - 1;
  }
  u32 row = 0, depth = 0, own = NONE;
  while (rows) {
    if (lane == depth % 32) {
      if (depth < 32) way[0] = row;
      else way[1] = row;
    }
    const u32 low = __shfl_sync(~0u, choice[0], int(row % 32)), high = __shfl_sync(~0u, choice[1], int(row % 32));
    own = row < 32 ? low : high;
    const bool near = lane > row && parent[0] == row && token[0] == own;
    const bool far = lane + 32 > row && parent[1] == row && token[1] == own;
    const u32 near_ones = __ballot_sync(~0u, near), far_ones = __ballot_sync(~0u, far);
    if (own == NONE || !(near_ones | far_ones)) break;
    row = near_ones ? u32(__ffs(int(near_ones))) - 1 : u32(__ffs(int(far_ones))) + 31;
    depth++;
  }
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    if (lane + half * 32 < block) st(path + first + lane + half * 32, way[half]);
  }
  if (lane == 0) {
    st(accepted + blockIdx.x, depth);
    st(next + blockIdx.x, own);
  }
}
