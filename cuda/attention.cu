// Paged attention of the target: single tokens, chains and trees of drafts, chunks of a prompt.
//
// Computes: out[r][h] = softmax(scale q[r][h] K^T) V over the keys row r sees: slots below context, its own and those
//           of earlier rows (masks null) or of the rows its mask names; of these the last `window` positions.
// Work:     attention_DxR: grid (splits, kv_heads, sequences x row tiles of R packed rows); attention_prefill_D: grid
//           (row tiles of 64, kv_heads), one sequence, all its keys in one walk. 128 threads.
// Order:    attention.cuh. Of attention_DxR a row's bits are the same for every R, block, batch and capacity.
// Bytes:    q and out once, keys and values once per row tile; where there are several splits, parts of 4 (D + 2) bytes
//           per row, head and split, written and read.
// Needs:    D = 64 or 128; heads / kv_heads = 1..8; block <= 64 (prefill: any); 16-byte aligned buffers; counters zero.
#include "attention.cuh"

#define ATTENTION(D, R)                                                                                             \
  KERNEL(128, 2, attention_##D##x##R,                                                                               \
         (u16* out, float* partials, u32* counters, const u16* q, const u16* k, const u16* v, const u32* page_table, \
          const Span* spans, const u64* masks, u32 block, u32 heads, u32 kv_heads, u32 pages, u32 pages_per_sequence, \
          u32 capacity, u32 window, float factor)) {                                                                \
    attend<D, R / 16>(Pass{out, q, k, v, page_table, spans, masks, block, heads, kv_heads, pages, pages_per_sequence, \
                           capacity, window, factor},                                                               \
                      masks ? TREE : CHAIN, partials, counters);                                                    \
  }
ATTENTION(64, 16)
ATTENTION(64, 32)
ATTENTION(64, 64)
ATTENTION(128, 16)
ATTENTION(128, 32)
ATTENTION(128, 64)

template <int D>
WRAPPER void prefill(const Pass& pass) {
  grid_launch();
  grid_wait();
  Attention<D, 4> a(pass, CHAIN);
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
