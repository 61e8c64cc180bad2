// The LM head: logits, and the argmax of each block of 128 ids.
//
// Computes: logit[m][v] = softcap(multiplier * rstd[m] * (in W^T)), or -inf for v >= ids; optionally stored,
//           with target_ids at column target_ids[v], at row first + m step instead of m, or added to that row;
//           best[m][b] = argmax key of rows 128b..128b + 128 of W.
// Work:     grid (blocks of 128 or 256 rows of W, splits of K, passes of 8 NT tokens), 256 threads; see linear.cuh.
// Order:    linear.cuh; best is a maximum in a total order, so the order of comparisons does not matter.
// Bytes:    n k 2 of weights per pass; m k 2 per block of W; m n / 16 of best written; m n 4 if logits are
//           stored, n 4 with target_ids, twice that if added.
// Preconditions: k a multiple of 32; any n; buffers 16-byte aligned.
#include "model/epilogues.cuh"

#define PARAMETERS_head                                                                                       \
  float *logits, u64 *best, float multiplier, float cap, u32 ids, const u32 *target_ids, u32 vocab, u32 first,  \
      u32 step, u32 add
#define EPILOGUE_head Head{logits, best, multiplier, cap, ids, target_ids, vocab, first, step, add}
LINEAR_KERNELS(head, false)
