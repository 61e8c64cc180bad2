// Query, key and value projections, RMSNorm of each query and key head, RoPE. Stores queries to their buffer,
// keys and values to their pages. With `first_block` past the query heads it computes keys and values only.
//
// Computes: h = rstd[m] * (in W^T) per head; q, k = bf16(RoPE(gain * h / rms(h))), without gain
//           bf16(RoPE(h)); v = bf16(h).
// Work:     grid (blocks of 128 or 256 rows of W, splits of K, passes of 8 NT tokens), 256 threads; see
//           linear.cuh.
// Order:    linear.cuh; squares of a head: four dims ascending per lane, then the head's lanes by xor
//           16-8-4-2-1 (head_dim 128) or 8-4-2-1 (64).
// Bytes:    n k 2 of weights per pass; m k 2 per block of W; m n 2 written; one RoPE row per row and head.
// Preconditions: n = (heads + 2 kv_heads) head_dim, head_dim 64 or 128; k a multiple of 32; buffers 16-byte
//           aligned.
#include "model/epilogues.cuh"

LINEAR_KERNELS(qkv, false)
