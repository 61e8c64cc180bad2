// Keys and values of an accepted path to the slots behind each other, in all layers: `moves` of src/spec/tree.rs.
//
// Computes: slot context + i = slot context + path[i], for i up to the drafts that stand; other slots keep what they hold.
// Work:     grid (kv heads, sequences, layers), 256 threads; each holds up to four 16-byte pieces of keys and of values.
// Order:    all is read before anything is written: one row's slot is another's goal.
// Bytes:    layers x kv_heads x moved rows x head_dim x 8; a chain's rows stand right and are not read.
// Needs:    rows 1 to 64, head_dim 64 or 128; a sequence's pages are its own. Paths, counts and pages may hold anything.
#include "common/rows.cuh"

constexpr u32 AHEAD = 64 * 16 / 256;  // rows, pieces of a key, threads

KERNEL(256, 2, compact,
       (const u64* caches,      // [layers][2]: addresses of keys and values, each [pages][kv_heads][PAGE][head_dim] bf16
        const u32* page_table,  // [sequences][pages_per_sequence]
        const u32* accepted,    // [sequences]: drafts that stand
        const u32* path,        // [sequences][rows]: rows on the way there, 0 first
        const Span* spans,      // [sequences]
        u32 rows, u32 head_dim, u32 pages, u32 pages_per_sequence)) {
  grid_launch();
  grid_wait();
  const u32 head = blockIdx.x, own = blockIdx.y, chunks = head_dim / 8;
  const Span span = ld(spans + own);
  const u32 count = min(span.rows, rows);
  if (!count) return;
  const u32 last = min(ld(accepted + own), count - 1);
  // Where a piece of a slot lies, in 16 bytes from a cache's begin; NONE: nowhere.
  const auto place = [&](u32 row, u32 chunk) {
    const u32 slot = span.context + row;
    if (slot < row || slot / PAGE >= pages_per_sequence) return ~0ull;
    const u32 page = ld(page_table + size_t(own) * pages_per_sequence + slot / PAGE);
    if (page >= pages) return ~0ull;
    return (u64(page) * gridDim.x + head) * (PAGE * chunks) + page_offset(slot, chunk, head_dim) / 16;
  };
  uint4* const keys = reinterpret_cast<uint4*>(ld(caches + blockIdx.z * 2));
  uint4* const values = reinterpret_cast<uint4*>(ld(caches + blockIdx.z * 2 + 1));
  uint4 key[AHEAD], value[AHEAD];
  u64 goal[AHEAD];
#pragma unroll
  for (u32 n = 0; n < AHEAD; n++) {
    const u32 i = n * 256 + threadIdx.x, to = i / chunks, chunk = i % chunks;
    goal[n] = ~0ull;
    if (to > last) continue;
    const u32 from = ld(path + size_t(own) * rows + to);
    if (from == to || from >= count) continue;
    const u64 source = place(from, chunk);
    if (source == ~0ull) continue;
    goal[n] = place(to, chunk);
    key[n] = ld(keys + source), value[n] = ld(values + source);
  }
  __syncthreads();
#pragma unroll
  for (u32 n = 0; n < AHEAD; n++) {
    if (goal[n] == ~0ull) continue;
    st(keys + goal[n], key[n]);
    st(values + goal[n], value[n]);
  }
}
