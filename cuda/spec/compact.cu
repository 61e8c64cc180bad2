// Moves the keys and values of an accepted tree path to consecutive KV-cache slots, in all layers: `moves` of
// src/spec/tree.rs lists the same moves.
//
// Computes:      slot context + i = slot context + path[i], for i from 0 to accepted; other slots are
//                unchanged.
// Work:          grid (kv heads, sequences, layers), 256 threads; each holds up to four 16-byte chunks of
//                keys and four of values.
// Order:         all reads precede all writes, since a row's source slot may be another's destination.
// Bytes:         layers x kv_heads x moved rows x head_dim x 8. Rows already in place are not read: a chain
//                moves nothing.
// Preconditions: max_verify_rows 1 to 64, head_dim 64, 128 or 256; sequences share no writable page. Paths, counts
//                and pages may hold any value.
#include "common/rows.cuh"

constexpr u32 CHUNKS = 16;                            // of a row at a time; a head of 256 has twice as many
constexpr u32 CHUNKS_PER_THREAD = 64 * CHUNKS / 256;  // 64 rows over 256 threads

extern "C" __global__ void __launch_bounds__(256, 2) compact(
    const u64* caches,      // [layers][2]: addresses of keys and values, each
                            // [pages][kv_heads][PAGE][head_dim] bf16
    const u32* page_table,  // [sequences][pages_per_sequence]
    const u32* accepted,    // [sequences]: accepted drafts
    const u32* path,        // [sequences][max_verify_rows]: accepted rows, row 0 first
    const Span* spans,      // [sequences]
    u32 max_verify_rows, u32 head_dim, u32 pages, u32 pages_per_sequence) {
  grid_launch();
  grid_wait();
  const u32 head = blockIdx.x, sequence = blockIdx.y, chunks = head_dim / 8;
  const Span span = spans[sequence];
  const u32 count = min(span.rows, max_verify_rows);
  if (!count) return;
  const u32 last = min(accepted[sequence], count - 1);
  // Offset of a row's chunk from the start of a cache, in units of 16 bytes; all ones if the row has no slot.
  const auto offset_of = [&](u32 row, u32 chunk) {
    const u32 slot = span.context + row;
    if (slot < row || slot / PAGE >= pages_per_sequence) return ~0ull;
    const u32 page = page_table[size_t(sequence) * pages_per_sequence + slot / PAGE];
    if (page >= pages) return ~0ull;
    return (u64(page) * gridDim.x + head) * (PAGE * chunks) + page_offset(slot, chunk, head_dim) / 16;
  };
  uint4* const keys = reinterpret_cast<uint4*>(caches[blockIdx.z * 2]);
  uint4* const values = reinterpret_cast<uint4*>(caches[blockIdx.z * 2 + 1]);
  uint4 key[CHUNKS_PER_THREAD], value[CHUNKS_PER_THREAD];
  u64 destination[CHUNKS_PER_THREAD];
  const u32 width = min(chunks, CHUNKS);
  for (u32 first = 0; first < chunks; first += CHUNKS) {
#pragma unroll
    for (u32 n = 0; n < CHUNKS_PER_THREAD; n++) {
      const u32 i = n * 256 + threadIdx.x, to = i / width, chunk = first + i % width;
      destination[n] = ~0ull;
      if (to > last) continue;
      const u32 from = path[size_t(sequence) * max_verify_rows + to];
      if (from == to || from >= count) continue;
      const u64 source = offset_of(from, chunk);
      if (source == ~0ull) continue;
      destination[n] = offset_of(to, chunk);
      key[n] = keys[source], value[n] = values[source];
    }
    __syncthreads();
#pragma unroll
    for (u32 n = 0; n < CHUNKS_PER_THREAD; n++) {
      if (destination[n] == ~0ull) continue;
      keys[destination[n]] = key[n];
      values[destination[n]] = value[n];
    }
  }
}
