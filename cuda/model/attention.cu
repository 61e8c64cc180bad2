// Paged attention of the target: single tokens, chains and trees of drafts, chunks of a prompt.
//
// Computes: out[r][h] = softmax(scale q[r][h] K^T) V over the keys that row r sees, times sigmoid(gates[r][h]) if there
//           are gates. It sees slots below context, plus its own slot and those of earlier rows (trees: of the rows
//           in its mask). A window keeps only the last `window` positions. A tree row has the position and the bits
//           that it would have in the chain of its ancestors.
// Work:     attention_DxR (chains) and attention_tree_DxR: grid (kv_heads, sequences x row tiles of R packed
//           rows, splits). attention_merge_D and attention_tree_merge_D: grid (kv_heads, sequences x row tiles,
//           packed rows of a tile / 4), a warp per packed row. attention_prefill_D: grid (row tiles of 64 packed
//           rows, 32 if D is 256, kv_heads) for one sequence; a block attends to all keys of its row tile. 128 threads.
// Order:    attention.cuh. Except in prefill, a row's bits do not depend on R, block, batch, capacity, or the
//           tree around its path.
// Bytes:    q, gates and out once. Keys and values once per row tile; the second tail page of a tree twice if two
//           splits need it. With several splits also partials of 4 (D + 2) bytes per row, head and split,
//           written by the split kernel and read by the merge.
// Preconditions: D is 64, 128 or 256; heads / kv_heads is 1 to 32; block <= 64 (prefill: any); buffers 16-byte
//           aligned. `AttentionParams`, `attend` and `merge_splits` in attention.cuh document the shape of
//           every parameter.
#include "model/attention.cuh"

#define ATTENTION(D, R)                                                                               \
  extern "C" __global__ void __launch_bounds__(128, 2) attention_##D##x##R(                           \
      u16* out, float* partials, const u16* q, const u16* k, const u16* v, const u32* page_table,     \
      const Span* spans, const u16* gates, u32 block, u32 heads, u32 kv_heads, u32 pages,             \
      u32 pages_per_sequence, u32 capacity, u32 window, float factor) {                               \
    attend<D, R / 16, CAUSAL>(AttentionParams{out, q, k, v, page_table, spans, nullptr, gates, block, \
                                              heads, kv_heads, pages, pages_per_sequence, capacity,   \
                                              window, factor},                                        \
                              partials);                                                              \
  }
ATTENTION(64, 16)
ATTENTION(64, 32)
ATTENTION(64, 64)
ATTENTION(128, 16)
ATTENTION(128, 32)
ATTENTION(128, 64)
ATTENTION(256, 16)
ATTENTION(256, 32)

#define TREE_ATTENTION(D, R)                                                                                \
  extern "C" __global__ void __launch_bounds__(128, 2) attention_tree_##D##x##R(                            \
      u16* out, float* partials, const u16* q, const u16* k, const u16* v, const u32* page_table,           \
      const Span* spans, const u16* gates, const u64* masks, u32 block, u32 heads, u32 kv_heads,            \
      u32 pages, u32 pages_per_sequence, u32 capacity, u32 window, float factor) {                          \
    attend<D, R / 16, TREE>(AttentionParams{out, q, k, v, page_table, spans, masks, gates, block, heads,    \
                                            kv_heads, pages, pages_per_sequence, capacity, window, factor}, \
                            partials);                                                                      \
  }
TREE_ATTENTION(64, 16)
TREE_ATTENTION(64, 32)
TREE_ATTENTION(64, 64)
TREE_ATTENTION(128, 16)
TREE_ATTENTION(128, 32)
TREE_ATTENTION(128, 64)
TREE_ATTENTION(256, 16)
TREE_ATTENTION(256, 32)

#define MERGE(D)                                                                                                \
  extern "C" __global__ void __launch_bounds__(128) attention_merge_##D(                                        \
      u16* out, const float* partials, const Span* spans, const u16* gates, u32 block, u32 heads, u32 kv_heads, \
      u32 capacity, u32 window, u32 size, u32 splits) {                                                         \
    merge_splits<D, CAUSAL>(merge_params(out, spans, nullptr, gates, block, heads, kv_heads, capacity, window), \
                            partials, size, splits);                                                            \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(128) attention_tree_merge_##D(                                   \
      u16* out, const float* partials, const Span* spans, const u16* gates, const u64* masks, u32 block,        \
      u32 heads, u32 kv_heads, u32 capacity, u32 window, u32 size, u32 splits) {                                \
    merge_splits<D, TREE>(merge_params(out, spans, masks, gates, block, heads, kv_heads, capacity, window),     \
                          partials, size, splits);                                                              \
  }
MERGE(64)
MERGE(128)
MERGE(256)

template <int D>
DEVICE void prefill(const AttentionParams& params) {
  grid_launch();
  grid_wait();
  // The queries and two tiles of keys and values must fit in shared memory: 32 packed rows of 256 dims.
  Attention<D, D == 256 ? 2 : 4, CAUSAL> a(params, 0, blockIdx.y);
  // The last rows have the most keys, so the first blocks take them.
  if (!a.init(CAUSAL, gridDim.x - 1 - blockIdx.x, a.ROWS)) return;
  a.attend_range(a.from / PAGE * PAGE, a.end);
  a.store_output();
}

#define PREFILL(D)                                                                                            \
  extern "C" __global__ void __launch_bounds__(128, 2) attention_prefill_##D(                                 \
      u16* out, const u16* q, const u16* k, const u16* v, const u32* page_table, const Span* span,            \
      const u16* gates, u32 block, u32 heads, u32 kv_heads, u32 pages, u32 pages_per_sequence, u32 window,    \
      float factor) {                                                                                         \
    prefill<D>(AttentionParams{out, q, k, v, page_table, span, nullptr, gates, block, heads, kv_heads, pages, \
                               pages_per_sequence, pages_per_sequence * PAGE, window, factor});               \
  }
PREFILL(64)
PREFILL(128)
PREFILL(256)
