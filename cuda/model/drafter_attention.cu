// Attention of the drafter's block: every row sees the context and all rows of the block.
//
// Computes: out[r][h] = softmax(scale q[r][h] K^T) V over all slots below context + rows. A window keeps only
//           those whose position differs from the row's by less than `window`.
// Work:     drafter_attention_DxR and drafter_attention_merge_D as attention_DxR and attention_merge_D in
//           attention.cu.
// Order:    attention.cuh. A row's bits do not depend on R, batch or capacity.
// Bytes:    as in attention.cu.
// Preconditions: as in attention.cu.
#include "model/attention.cuh"

#define DRAFTER_ATTENTION(D, R)                                                                               \
  extern "C" __global__ void __launch_bounds__(128, 2) drafter_attention_##D##x##R(                           \
      u16* out, float* partials, const u16* q, const u16* k, const u16* v, const u32* page_table,             \
      const Span* spans, u32 block, u32 heads, u32 kv_heads, u32 pages, u32 pages_per_sequence, u32 capacity, \
      u32 window, float factor) {                                                                             \
    attend<D, R / 16, FULL>(AttentionParams{out, q, k, v, page_table, spans, nullptr, nullptr, block, heads,  \
                                            kv_heads, pages, pages_per_sequence, capacity, window, factor},   \
                            partials);                                                                        \
  }
DRAFTER_ATTENTION(64, 16)
DRAFTER_ATTENTION(64, 32)
DRAFTER_ATTENTION(64, 64)
DRAFTER_ATTENTION(128, 16)
DRAFTER_ATTENTION(128, 32)
DRAFTER_ATTENTION(128, 64)

#define MERGE(D)                                                                                         \
  extern "C" __global__ void __launch_bounds__(128) drafter_attention_merge_##D(                         \
      u16* out, const float* partials, const Span* spans, u32 block, u32 heads, u32 kv_heads,            \
      u32 capacity, u32 window, u32 size, u32 splits) {                                                  \
    merge_splits<D, FULL>(                                                                               \
        merge_params(out, spans, nullptr, nullptr, block, heads, kv_heads, capacity, window), partials,  \
        size, splits);                                                                                   \
  }
MERGE(64)
MERGE(128)
