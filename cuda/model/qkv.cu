// Query, key and value projections: norm of each query and key head, RoPE, queries to their buffer, keys and values to
// their pages. With `first_block` past the queries, keys and values alone.
//
// Computes: h = rstd[m] * (in W^T) per head; q, k: RoPE(gain * h / rms(h)); v: h; rounded to bf16.
// Work:     grid (ceil(n / 128) - first_block, splits of K, passes of 8 NT tokens), 256 threads; see linear.cuh.
// Order:    linear.cuh; squares of a head: four dims upwards in a lane, then the head's lanes' tree.
// Bytes:    n k 2 of weights per pass; m k 2 per 128 rows of W; m n 2 written; a RoPE row per row and head.
// Needs:    n = (heads + 2 kv_heads) head_dim, head_dim 64 or 128; k a multiple of 32; 16-byte aligned.
#include "model/epilogues.cuh"

LINEAR_KERNELS(qkv, false)
