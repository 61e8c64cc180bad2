// Verification method MATCH, for chains and trees: `match_chain` and `match_tree` of src/spec/verify.rs make
// the same decisions.
//
// Computes:      per sequence, the accepted path: from row 0 on, the lowest child whose token equals the
//                token that its parent row sampled (`choices`), until no child matches. The choice of the
//                path's last row is the next token; NONE if that row is invalid.
// Work:          grid (sequences), one warp each; lane l holds rows l and l + 32.
// Order:         no additions; rows ascend along a path.
// Bytes:         sequences x max_verify_rows x 16.
// Preconditions: max_verify_rows 1 to 64. Rows, tokens, choices and parents may hold any value.
#include "common/rows.cuh"

extern "C" __global__ void __launch_bounds__(32, 16) verify(
    u32* accepted,        // [sequences]: accepted drafts
    u32* next,            // [sequences]: the token after them; NONE: invalid, or the sequence does not
                          // take part
    u32* path,            // [sequences][max_verify_rows]: accepted rows, row 0 first; NONE from accepted
                          // + 1 on
    const u32* choices,   // [sequences][max_verify_rows]: token that `sample` gave the row; NONE: invalid
    const u32* tokens,    // [sequences][max_verify_rows]: anchor, then drafts
    const u32* parents,   // [sequences][max_verify_rows]: parent row of each draft; null: the row before
    const Span* spans,    // [sequences]
    u32 max_verify_rows) {
  grid_launch();
  grid_wait();
  const u32 lane = threadIdx.x;
  const u32 rows = min(spans[blockIdx.x].rows, max_verify_rows);
  const size_t first = size_t(blockIdx.x) * max_verify_rows;
  u32 choice[2], token[2], parent[2], path_row[2] = {NONE, NONE};
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    const u32 row = lane + half * 32;
    const bool exists = row < rows;
    choice[half] = exists ? choices[first + row] : NONE;
    token[half] = exists ? tokens[first + row] : NONE;
    parent[half] = !exists ? NONE : parents ? parents[first + row] : row - 1;
  }
  u32 row = 0, depth = 0, chosen = NONE;
  while (rows) {
    if (lane == depth % 32) {
      if (depth < 32) path_row[0] = row;
      else path_row[1] = row;
    }
    const u32 low = __shfl_sync(~0u, choice[0], int(row % 32)), high = __shfl_sync(~0u, choice[1], int(row % 32));
    chosen = row < 32 ? low : high;
    const bool low_match = lane > row && parent[0] == row && token[0] == chosen;
    const bool high_match = lane + 32 > row && parent[1] == row && token[1] == chosen;
    const u32 low_matches = __ballot_sync(~0u, low_match), high_matches = __ballot_sync(~0u, high_match);
    if (chosen == NONE || !(low_matches | high_matches)) break;
    row = low_matches ? u32(__ffs(int(low_matches))) - 1 : u32(__ffs(int(high_matches))) + 31;
    depth++;
  }
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    if (lane + half * 32 < max_verify_rows) path[first + lane + half * 32] = path_row[half];
  }
  if (lane == 0) {
    accepted[blockIdx.x] = depth;
    next[blockIdx.x] = chosen;
  }
}
