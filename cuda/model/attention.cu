// Paged attention of the target: single tokens, chains and trees of drafts, chunks of a prompt.
//
// Computes: out[r][h] = softmax(scale q[r][h] K^T) V over the keys row r sees: slots below context, its own and those
//           of earlier rows, or of the rows its mask names; of these the last `window` positions. A row of a tree
//           stands behind the rows of its mask: it gets the bits of a chain of just these.
// Work:     attention_DxR (chains) and attention_tree_DxR: grid (splits, kv_heads, sequences x row tiles of R packed
//           rows); attention_prefill_D: grid (row tiles of 64, kv_heads), one sequence, all its keys in one walk. 128
//           threads.
// Order:    attention.cuh. But for prefill's, a row's bits are the same for every R, block, batch, capacity and tree
//           around its path.
// Bytes:    q and out once, keys and values once per row tile, of trees those on a second page twice where two splits
//           need them; where there are several splits, parts of 4 (D + 2) bytes per row, head and split, written and
//           read.
// Needs:    D = 64 or 128; heads / kv_heads = 1..8; block <= 64 (prefill: any); 16-byte aligned buffers; counters zero.
#include "model/attention.cuh"

#define ATTENTION(D, R)                                                                                             \
  KERNEL(128, 2, attention_##D##x##R,                                                                               \
         (u16* out, float* partials, u32* counters, const u16* q, const u16* k, const u16* v, const u32* page_table, \
          const Span* spans, u32 block, u32 heads, u32 kv_heads, u32 pages, u32 pages_per_sequence, u32 capacity,   \
          u32 window, float factor)) {                                                                              \
    attend<D, R / 16, CHAIN>(Pass{out, q, k, v, page_table, spans, nullptr, block, heads, kv_heads, pages,          \
                                  pages_per_sequence, capacity, window, factor},                                    \
                             partials, counters);                                                                   \
  }
ATTENTION(64, 16)
ATTENTION(64, 32)
ATTENTION(64, 64)
ATTENTION(128, 16)
ATTENTION(128, 32)
ATTENTION(128, 64)

#define TREE_ATTENTION(D, R)                                                                                        \
  KERNEL(128, 2, attention_tree_##D##x##R,                                                                          \
         (u16* out, float* partials, u32* counters, const u16* q, const u16* k, const u16* v, const u32* page_table, \
          const Span* spans, const u64* masks, u32 block, u32 heads, u32 kv_heads, u32 pages, u32 pages_per_sequence, \
          u32 capacity, u32 window, float factor)) {                                                                \
    attend<D, R / 16, TREE>(Pass{out, q, k, v, page_table, spans, masks, block, heads, kv_heads, pages,             \
                                 pages_per_sequence, capacity, window, factor},                                     \
                            partials, counters);                                                                    \
  }
TREE_ATTENTION(64, 16)
TREE_ATTENTION(64, 32)
TREE_ATTENTION(64, 64)
TREE_ATTENTION(128, 16)
TREE_ATTENTION(128, 32)
TREE_ATTENTION(128, 64)

template <int D>
WRAPPER void prefill(const Pass& pass) {
  grid_launch();
  grid_wait();
  Attention<D, 4, CHAIN> a(pass);
  a.sequence = 0;
  a.head = blockIdx.y;
  // The last rows have the most keys and come first.
  if (!a.reach(gridDim.x - 1 - blockIdx.x)) return;
  a.walk(a.from / PAGE * PAGE, a.end);
  a.finish();
}

#define PREFILL(D)                                                                                                   \
  KERNEL(128, 2, attention_prefill_##D,                                                                              \
         (u16* out, const u16* q, const u16* k, const u16* v, const u32* page_table, const Span* span, u32 block,    \
          u32 heads, u32 kv_heads, u32 pages, u32 pages_per_sequence, u32 window, float factor)) {                   \
    prefill<D>(Pass{out, q, k, v, page_table, span, nullptr, block, heads, kv_heads, pages, pages_per_sequence,      \
                    pages_per_sequence * PAGE, window, factor});                                                     \
  }
PREFILL(64)
PREFILL(128)
