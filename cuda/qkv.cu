// Query, key and value projections: norm of each query and key head, RoPE, queries to their buffer, keys and values to
// their pages. With `first_block` past the queries, keys and values alone.
//
// Computes: h = rstd[m] * (in W^T) per head; q, k: RoPE(gain * h / rms(h)); v: h; rounded to bf16.
// Work:     grid (ceil(n / 128) - first_block, splits of K, passes of 8 NT tokens), 256 threads; see linear.cuh.
// Order:    linear.cuh; squares of a head: four dims upwards in a lane, then the head's lanes' tree.
// Bytes:    n k 2 of weights per pass; m k 2 per 128 rows of W; m n 2 written; a RoPE row per row and head.
// Needs:    n = (heads + 2 kv_heads) head_dim, head_dim 64 or 128; k a multiple of 32; 16-byte aligned.
#include "epilogue.cuh"

#define PARAMETERS                                                                                                    \
  const Row *rows, u16 *queries, u16 *keys, u16 *values, const u32 *table, const float *q_gain, const float *k_gain,  \
      const float *rope, u32 heads, u32 kv_heads, u32 head_dim, u32 query_rows, u32 pages, u32 sequences,             \
      u32 sequence_pages, u32 positions
#define BODY(NT)                                                                                                      \
  SHARED(Place, places, NT * 8);                                                                                      \
  const Qkv qkv{rows, queries, keys, values, table, q_gain, k_gain, rope, heads, kv_heads, head_dim, query_rows,      \
                pages, sequences, sequence_pages, positions};                                                         \
  Tile tile;                                                                                                          \
  const auto place = [&](const Tile& t, u32 token) { sts(places + token, place_of(qkv, t.token + token)); };          \
  if (!multiply<NT, false>(LINEAR, tile, place)) return;                                                              \
  finish(LINEAR, qkv, places, tile);
LINEAR_KERNELS(qkv, PARAMETERS, BODY)
