// Attention of the drafter's block: every row sees the context and all rows of the block.
//
// Computes: out[r][h] = softmax(scale q[r][h] K^T) V over all slots below context + rows. A window keeps only
//           those whose position differs from the row's by less than `window`.
// Work:     grid (kv_heads, sequences x row tiles of R packed rows, splits), 128 threads.
// Order:    attention.cuh. A row's bits do not depend on R, batch or capacity.
// Bytes:    as attention_DxR in attention.cu.
// Preconditions: as attention_DxR in attention.cu.
#include "model/attention.cuh"

#define DRAFTER_ATTENTION(D, R)                                                                               \
  extern "C" __global__ void __launch_bounds__(128, 2) drafter_attention_##D##x##R(                           \
      u16* out, float* partials, u32* counters, const u16* q, const u16* k, const u16* v,                     \
      const u32* page_table, const Span* spans, u32 block, u32 heads, u32 kv_heads, u32 pages,                \
      u32 pages_per_sequence, u32 capacity, u32 window, float factor) {                                       \
    attend<D, R / 16, FULL>(AttentionParams{out, q, k, v, page_table, spans, nullptr, block, heads, kv_heads, \
                                            pages, pages_per_sequence, capacity, window, factor},             \
                            partials, counters);                                                              \
  }
DRAFTER_ATTENTION(64, 16)
DRAFTER_ATTENTION(64, 32)
DRAFTER_ATTENTION(64, 64)
DRAFTER_ATTENTION(128, 16)
DRAFTER_ATTENTION(128, 32)
DRAFTER_ATTENTION(128, 64)
