// The core of all attention kernels. A packed row is one query head of one row of the pass; packed rows list
// all query heads of one KV head for the first row, then for the next. One block computes attention of up to
// 64 packed rows over an interval of one sequence's keys, 64 keys at a time, with an online softmax: a
// running maximum, sum and output per packed row.
//
// The bits of a row's output depend only on its query, on the keys it sees and on their positions. Rows never
// interact: a tile, split or group in which a row sees no key leaves its bits unchanged. The result is
// therefore the same for every number of rows, for every set of rows that share the block, for every number
// of splits, and whether the keys form a chain or a path of a tree.
//
// Work: four warps. In Q K^T warp w computes keys 16w..16w + 16 of the tile, in P V head dimensions
// w D / 4..(w + 1) D / 4, both for all rows.
//
// Order of additions: products of a tile in ascending k. Row sums: the four keys of a lane ascending, lanes
// by xor 2-1, warps ascending, tiles ascending. Splits are merged in ascending order within groups of eight,
// then the groups in ascending order.
#pragma once
#include "common/last_block.cuh"
#include "common/rows.cuh"

constexpr u32 ATTENTION_THREADS = 128;

// Which rows of its pass a row sees.
enum MaskMode {
  CAUSAL,  // the earlier rows and itself
  TREE,    // the rows in its mask: its ancestors and itself. In slot order, the i-th has position context + i
  FULL,    // all rows
};

// --- splits: fixed intervals of positions for all rows and launches; see src/gpu/kernels/attention.rs ---

constexpr u32 SPLITS_PER_GROUP = 8;

// A split has 128 slots below slot 4096, 512 below 32768, 2048 above. A key's slot is its position, except in
// trees.
DEVICE u32 split_start(u32 split) {
  return split <= 32 ? split * 128 : split <= 88 ? 4096 + (split - 32) * 512 : 32768 + (split - 88) * 2048;
}
DEVICE u32 split_of(u32 slot) {
  return slot < 4096    ? slot / 128
         : slot < 32768 ? 32 + (slot - 4096) / 512
                        : 88 + (slot - 32768) / 2048;
}

// --- masks ---

// Bits 0..count set; all 64 if count is 64 or more.
DEVICE u64 low_bits(u32 count) { return count < 64 ? (1ull << count) - 1 : ~0ull; }

// Parameters common to the attention kernels.
struct AttentionParams {
  u16* out;               // [sequences][block][heads][D] bf16
  const u16* q;           // [sequences][block][heads][D] bf16
  const u16* k;           // [pages][kv_heads][PAGE][D] bf16, chunks permuted (page_offset)
  const u16* v;           // [pages][kv_heads][PAGE][D] bf16, chunks permuted
  const u32* page_table;  // [sequences][pages_per_sequence]
  const Span* spans;      // [sequences]
  const u64* masks;       // [sequences][block], TREE only; any bits are safe
  u32 block;              // rows per sequence in q and out
  u32 heads, kv_heads, pages, pages_per_sequence;
  u32 capacity;           // maximum slots per sequence in this launch, at most pages_per_sequence * PAGE
  u32 window;             // positions that a row sees, its own included; 0: all
  float factor;           // multiplies scores: scale * log2(e)
};

// First of the `window` positions before `end`; 0 if window is 0.
DEVICE u32 window_start(u32 end, u32 window) { return window && end > window ? end - window : 0; }

// --- the core ---

template <int D, int MT, MaskMode MODE>
struct Attention {
  static constexpr u32 ROWS = 16 * MT;
  static constexpr u32 PITCH = D * 2;        // bytes of a query, key or value
  static constexpr u32 CHUNKS = D / 8;       // 16-byte chunks of a query, key or value
  static constexpr u32 TILE = PAGE * PITCH;  // bytes of the keys or values of one page
  static constexpr int NT = D / 32;          // n8 tiles in a warp's head dimensions
  // Floats of one split's partial result: outputs [ROWS][D], maxima [ROWS], sums [ROWS].
  static constexpr u32 PARTIAL = ROWS * (D + 2);

  // Dynamic shared memory, in this order; `shared_bytes` and `tree_bytes` in src/gpu/kernels/attention.rs
  // compute the size.
  unsigned char* queries;  // [ROWS][D] bf16, chunk c of row r at c ^ (r & 7)
  unsigned char* keys;     // [2][PAGE][D] bf16, chunks permuted alike
  unsigned char* values;   // [2][PAGE][D] bf16, chunks permuted alike
  unsigned char* probs;    // [ROWS][PAGE] bf16 unnormalised probabilities, chunks permuted alike
  float* maxima;           // [4 warps][ROWS]
  float* sums;             // [4 warps][ROWS]
  uint4* row_info;         // [ROWS], from `make_row_info`
  u8* nonfinite;           // [PAGE][CHUNKS], TREE [2][PAGE][CHUNKS]: 1 if the chunk held a NaN or infinity
  u8* path_slots;          // TREE only: [ROWS][64], from `build_path_slots`

  AttentionParams params;
  u32 sequence;
  u32 head;                    // KV head
  u32 group_size;              // query heads per KV head
  u32 first_packed;            // first packed row of this row tile, counted from the sequence's first
  u32 base;                    // row of the pass whose slot is `context`
  u32 context;                 // slots 0..context precede every row of the tile
  u32 rows;                    // rows of the sequence from `base` on
  u32 from, full_from, end;    // some row sees positions from..end; every row sees full_from..context
  u32 slots_end;               // one past the last slot of positions from..end
  u32 tail;                    // first position of the key tile that contains position `context`

  float o[MT][NT][4], m[MT][2], l[MT][2];  // outputs, row maxima, row sums, as mma accumulators

  DEVICE explicit Attention(const AttentionParams& p) : params(p) {
    queries = dynamic_shared;
    keys = queries + ROWS * PITCH;
    values = keys + 2 * TILE;
    probs = values + 2 * TILE;
    maxima = reinterpret_cast<float*>(probs + ROWS * PAGE * 2);
    sums = maxima + 4 * ROWS;
    row_info = reinterpret_cast<uint4*>(sums + 4 * ROWS);
    nonfinite = reinterpret_cast<u8*>(row_info + ROWS);
    path_slots = nonfinite + 2 * PAGE * CHUNKS;
  }

  // Sets up row tile `tile` of `sequence` and KV head `head`; returns false if it has no rows. For any
  // context, any number of rows in the span and any masks, the interval stays inside the page table.
  DEVICE bool init_tile(u32 tile) {
    group_size = params.heads / params.kv_heads;
    first_packed = tile * ROWS;
    const u32 lane = threadIdx.x % 32;
    u64 masks[2] = {0, 0};  // masks of rows lane and lane + 32
    if (MODE == TREE) {
      const u64* from_row = params.masks + size_t(sequence) * params.block;
      if (lane < params.block) masks[0] = from_row[lane];
      if (lane + 32 < params.block) masks[1] = from_row[lane + 32];
    }
    const Span span = params.spans[sequence];
    const u32 count = min(span.rows, params.block), first = first_packed / group_size;
    if (first >= count) return false;
    const u32 last = min((first_packed + ROWS - 1) / group_size, count - 1);
    base = MODE == CAUSAL ? first : 0;
    context = min(span.context, params.capacity) + base;
    rows = count - base;
    tail = context / PAGE * PAGE;
    // One past the position of the first row and of the last. For a tree: lower and upper bounds of them.
    u32 low = context + first - base + 1, high = context + last - base + 1;
    end = min(MODE == CAUSAL ? high : context + rows, params.capacity);
    slots_end = end;
    if (MODE == TREE) {
      u32 deepest = 0;
#pragma unroll
      for (u32 i = 0; i < 2; i++) {
        const u32 row = lane + i * 32;
        if (row >= first && row <= last) {
          deepest = max(deepest, u32(__popcll(masks[i] & low_bits(slots_end - context))));
        }
      }
      deepest = __reduce_max_sync(~0u, deepest);
      low = context, high = context + deepest;
      end = min(context + max(deepest, 1u), slots_end);
    }
    from = min(window_start(low, params.window), end - 1);
    full_from = window_start(high, params.window);
    return true;
  }

  // TREE: bit i is set if row i of the pass is an ancestor of row `row` or the row itself, and has a slot.
  DEVICE u64 ancestor_mask(u32 row) const {
    return params.masks[size_t(sequence) * params.block + row] & low_bits(slots_end - context);
  }

  // Mask and location of packed row r. CAUSAL, FULL: bit i of (x low, y high) is set if it sees position
  // context + i; below `context` it sees positions from z on. TREE: it sees positions z..context + x, and y
  // is the index of its row in the row tile (NONE: there is no such row). w: index of its query in q and out,
  // in units of D elements; NONE: there is no such row.
  DEVICE uint4 make_row_info(u32 r) const {
    const u32 row = (first_packed + r) / group_size - base;
    if (row >= rows) return make_uint4(0, MODE == TREE ? NONE : 0, 0, NONE);
    const u32 query = (sequence * params.block + base + row) * params.heads + head * group_size +
                      (first_packed + r) % group_size;
    const u32 length = MODE == TREE ? u32(__popcll(ancestor_mask(row))) : row + 1;  // position + 1 - context
    const u32 start = window_start(context + length, params.window);
    if (MODE == TREE) return make_uint4(length, row - first_packed / group_size, start, query);
    u64 mask = low_bits(MODE == CAUSAL ? length : rows);
    if (params.window) {
      if (start > context) mask &= ~low_bits(start - context);
      if (MODE == FULL) mask &= low_bits(min(row, 64u) + min(params.window, 64u));
    }
    return make_uint4(u32(mask), u32(mask >> 32), start, query);
  }

  // Whether there is a packed row r.
  DEVICE bool exists(u32 r) const { return first_packed + r < (base + rows) * group_size; }

  // Whether the packed row with `info` sees the key at `position`.
  DEVICE bool visible(const uint4& info, u32 position) const {
    if (MODE == TREE) return position >= info.z && position < context + info.x;
    const u64 mask = info.x | u64(info.y) << 32;
    return position < context ? position >= info.z
                              : position - context < 64 && (mask >> (position - context) & 1);
  }

  // Starts the copy of the keys or values of slots slot..slot + PAGE. Slots that no row sees become zeros.
  DEVICE void copy_page(unsigned char* to,  // [PAGE][D] bf16, shared memory
                        const u16* cache,   // params.k or params.v
                        u32 page, u32 slot) const {
    const bool valid = page < params.pages;
    const u16* source = cache + (size_t(valid ? page : 0) * params.kv_heads + head) * (PAGE * D);
#pragma unroll
    for (u32 n = 0; n < PAGE * CHUNKS; n += ATTENTION_THREADS) {
      const u32 i = n + threadIdx.x, s = slot + i / CHUNKS;
      cp_async16(to + i * 16, source + i * 8, valid && s >= from && s < slots_end);
    }
  }

  // Replaces chunks of values that hold a NaN or infinity by zeros and flags them: 0 x NaN would otherwise
  // reach rows that do not see the value. For rows that see it, the flag turns the probability into NaN. Each
  // thread checks what it copied itself.
  DEVICE void zero_nonfinite(unsigned char* tile,  // [PAGE][D] bf16, shared memory
                             u8* flags) const {    // [PAGE][CHUNKS], shared memory
#pragma unroll
    for (u32 n = 0; n < PAGE * CHUNKS; n += ATTENTION_THREADS) {
      const u32 i = n + threadIdx.x;
      const uint4 v = as<uint4>(tile + i * 16);
      const u32 words[4] = {v.x, v.y, v.z, v.w};
      bool bad = false;
#pragma unroll
      for (u32 word : words) bad |= (word & 0x7f80) == 0x7f80 || (word & 0x7f800000) == 0x7f800000;
      flags[i] = u8(bad);
      if (bad) as<uint4>(tile + i * 16) = make_uint4(0, 0, 0, 0);
    }
  }

  // The maximum of an empty set.
  DEVICE static float negative_infinity() { return __uint_as_float(0xff800000u); }

  // Whether the value of key `key` was flagged by zero_nonfinite.
  DEVICE bool is_nonfinite(u32 key) const {
    if (CHUNKS == 8) return as<u64>(nonfinite + key * CHUNKS);
    const uint4 any = as<uint4>(nonfinite + key * CHUNKS);
    return any.x | any.y | any.z | any.w;
  }

  // Address of chunk c of row r in a matrix with permuted chunks; `rows`: [rows][pitch bytes].
  DEVICE static unsigned char* chunk(unsigned char* rows, u32 r, u32 pitch, u32 c) {
    return rows + r * pitch + ((c ^ (r & 7)) << 4);
  }

  // --- the tail of a tree: the key tile of `context` and the next one ---
  //
  // In the tail the slot of a position differs from row to row; it is never lower than the slot in a chain.
  // Both halves of `keys` and `values` together hold all slots of the tail. The products are the same as for
  // a chain, but computed for one row of the pass at a time, with the keys of its path and only for its
  // heads. ldmatrix takes an address per key, so the keys need not be contiguous, at the price of some bank
  // conflicts.

  // Fills `path_slots`: entry [i][k] is the slot, counted from `tail`, of the k-th key from `context` on of
  // the row tile's i-th row. If the row has no k-th key, it is the slot that a chain would use.
  DEVICE void build_path_slots() const {
    const u32 lane = threadIdx.x % 32, first = first_packed / group_size;
    const u32 count = min((first_packed + ROWS - 1) / group_size + 1, rows) - first;
#pragma unroll 4
    for (u32 i = threadIdx.x / 32; i < count; i += ATTENTION_THREADS / 32) {
      const u64 mask = ancestor_mask(first + i);
      u8* slots = path_slots + i * 64;
#pragma unroll
      for (u32 bit = lane; bit < 64; bit += 32) {
        const bool on_path = mask >> bit & 1;
        const u64 before = low_bits(bit);
        const u32 k = on_path ? __popcll(mask & before) : __popcll(mask) + __popcll(~mask & before);
        slots[k] = u8(context - tail + (on_path ? bit : k));
      }
    }
  }

  // The slot, counted from `tail`, of the key at `position` on the path of the row tile's i-th row.
  DEVICE u32 tail_slot(u32 i, u32 position) const {
    const u32 k = position - context, slot = path_slots[i * 64 + min(k, 63u)];
    return k < 64 ? slot : position - tail;
  }

  // Calls body(i, owned) for each row i of the row tile that has packed rows in r..r + 16 and sees positions
  // from `position` on; owned[h]: this lane's packed row r + 8h + g belongs to row i. If the 16 keys are the
  // same for all rows (all below `context`), calls body once with owned = true.
  template <class Body>
  DEVICE void for_each_path(u32 r, u32 position, Body body) const {
    const bool shared = position + 16 <= context;
    const u32 first = first_packed / group_size, g = threadIdx.x % 32 / 4;
    const u32 row_of_lane[2] = {row_info[r + g].y, row_info[r + g + 8].y};
    // NONE, of packed rows that do not exist, is larger than any row.
    const u32 begin = shared ? 0 : row_info[r].y;
    const u32 stop = shared ? 1 : min(row_info[r + 15].y, rows - first - 1) + 1;
#pragma unroll 1
    for (u32 i = begin; i < stop; i++) {
      const u32 packed_row = max((first + i) * group_size, first_packed + r) - first_packed;
      if (!shared && position >= context + row_info[packed_row].x) continue;
      const bool owned[2] = {shared || row_of_lane[0] == i, shared || row_of_lane[1] == i};
      body(i, owned);
    }
  }

  // Scores of the 16 keys from `position` on. `flip`: 64 if the tail's first page is in the second half of
  // `keys`.
  DEVICE void tail_scores(float (&s)[MT][2][4], u32 position, u32 flip) const {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < MT; i++) {
      for_each_path(i * 16, position, [&](u32 row, const bool (&owned)[2]) {
        const u32 key = tail_slot(row, position + lane / 16 * 8 + lane % 8) ^ flip;
        float x[2][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
          u32 a[4], b[4];
          ldmatrix4(b, chunk(keys, key, PITCH, k * 2 + lane / 8 % 2));
          ldmatrix4(a, chunk(queries, i * 16 + lane % 16, PITCH, k * 2 + lane / 16));
          mma_bf16(x[0], a[0], a[1], a[2], a[3], b[0], b[1]);
          mma_bf16(x[1], a[0], a[1], a[2], a[3], b[2], b[3]);
        }
#pragma unroll
        for (int e = 0; e < 8; e++) {
          if (owned[e % 4 / 2]) s[i][e / 4][e % 4] = x[e / 4][e % 4];
        }
      });
    }
  }

  // Adds the products of probabilities and values of the tile at `position`. For a row that does not own the
  // path the product adds zeros.
  DEVICE void tail_values(u32 position, u32 flip) {
    const u32 lane = threadIdx.x % 32, w = threadIdx.x / 32;
#pragma unroll 1
    for (u32 k = 0; k < PAGE / 16; k++) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
        u32 a[4];
        ldmatrix4(a, chunk(probs, i * 16 + lane % 16, PAGE * 2, k * 2 + lane / 16));
        for_each_path(i * 16, position + k * 16, [&](u32 row, const bool (&owned)[2]) {
          const u32 key = tail_slot(row, position + k * 16 + lane % 16) ^ flip;
          const u32 p[4] = {owned[0] ? a[0] : 0, owned[1] ? a[1] : 0,
                            owned[0] ? a[2] : 0, owned[1] ? a[3] : 0};
#pragma unroll
          for (int n = 0; n < NT; n += 2) {
            u32 b[4];
            ldmatrix4_trans(b, chunk(values, key, PITCH, w * NT + n + lane / 16));
            mma_bf16(o[i][n], p[0], p[1], p[2], p[3], b[0], b[1]);
            mma_bf16(o[i][n + 1], p[0], p[1], p[2], p[3], b[2], b[3]);
          }
        });
      }
    }
  }

  // Bit e: for packed row r, the value at the e-th of this lane's four score positions is flagged. bad_slots:
  // bit mask of the flagged slots, counted from `tail`.
  DEVICE u32 tail_nonfinite(u32 r, u32 position, const u64 (&bad_slots)[2]) const {
    const u32 row = row_info[r].y, t = threadIdx.x % 4;
    if (row == NONE || !(bad_slots[0] | bad_slots[1])) return 0;
    u32 nonfinite_bits = 0;
#pragma unroll
    for (u32 e = 0; e < 4; e++) {
      const u32 slot = tail_slot(row, position + e / 2 * 8 + t * 2 + e % 2);
      nonfinite_bits |= u32((slot < 64 ? bad_slots[0] : bad_slots[1]) >> (slot & 63) & 1) << e;
    }
    return nonfinite_bits;
  }

  // Attends to positions begin..stop; begin is a multiple of PAGE. cp.async groups alternate: the keys of a
  // tile (the first group also has the queries), then its values. Two tiles are in flight at a time; page
  // numbers are read one tile further ahead. In the tail of a tree, processing starts when both pages have
  // arrived.
  DEVICE void attend_range(u32 begin, u32 stop) {
    const u32 lane = threadIdx.x % 32, w = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const bool reaches_tail = MODE == TREE && stop > tail;
    const u32* table = params.page_table + size_t(sequence) * params.pages_per_sequence + begin / PAGE;
    const u32 pages = ((reaches_tail ? slots_end : stop) - begin + PAGE - 1) / PAGE;
    const u32 flip = (tail - begin) & PAGE;
    // Whether this range has page i of the tail: a split may begin at its second page, or end with its first.
    const auto has_page = [&](u32 i) { return tail + i * PAGE >= begin && tail + i * PAGE < slots_end; };

    const u32 first_page = table[0];
    u32 next_page = pages > 1 ? table[1] : NONE;
    copy_page(keys, params.k, first_page, begin);
    if (threadIdx.x < ROWS) row_info[threadIdx.x] = make_row_info(threadIdx.x);
    __syncthreads();
#pragma unroll
    for (u32 n = 0; n < ROWS * CHUNKS; n += ATTENTION_THREADS) {
      const u32 i = n + threadIdx.x, r = i / CHUNKS, c = i % CHUNKS;
      const u32 query = row_info[r].w;
      cp_async16(chunk(queries, r, PITCH, c), params.q + size_t(query == NONE ? 0 : query) * D + c * 8,
                 query != NONE);
    }
    cp_async_commit();
    copy_page(values, params.v, first_page, begin);
    cp_async_commit();
    if (pages > 1) copy_page(keys + TILE, params.k, next_page, begin + PAGE);
    cp_async_commit();
    if (pages > 1) copy_page(values + TILE, params.v, next_page, begin + PAGE);
    cp_async_commit();
    next_page = pages > 2 ? table[2] : NONE;
    if (reaches_tail) build_path_slots();

#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) m[i][h] = negative_infinity(), l[i][h] = 0.0f;
#pragma unroll
      for (int n = 0; n < NT; n++) o[i][n][0] = o[i][n][1] = o[i][n][2] = o[i][n][3] = 0.0f;
    }

    cp_async_wait<3>();
    for (u32 position = begin; position < stop; position += PAGE) {
      // This tile's keys have arrived, and all warps have finished with the previous tile.
      __syncthreads();
      const u32 tile = (position - begin) / PAGE, half = tile % 2 * TILE;
      if (tile) {
        const bool has_next = tile + 1 < pages;
        if (has_next) copy_page(keys + (TILE - half), params.k, next_page, position + PAGE);
        cp_async_commit();
        if (has_next) copy_page(values + (TILE - half), params.v, next_page, position + PAGE);
        cp_async_commit();
        const u32* pages_from_here = table + tile;
        next_page = tile + 2 < pages ? pages_from_here[2] : NONE;
      }
      const bool in_tail = MODE == TREE && position >= tail;
      if (in_tail && (position == tail || position == begin)) {
        cp_async_wait<0>();
        if (has_page(0)) zero_nonfinite(values + flip * PITCH, nonfinite);
        if (has_page(1)) zero_nonfinite(values + (flip ^ PAGE) * PITCH, nonfinite + PAGE * CHUNKS);
        __syncthreads();
      }

      float s[MT][2][4];
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) s[i][j][0] = s[i][j][1] = s[i][j][2] = s[i][j][3] = 0.0f;
      }
      if (in_tail) {
        tail_scores(s, position + w * 16, flip);
      } else {
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
          u32 b[4];
          ldmatrix4(b, chunk(keys + half, w * 16 + lane / 16 * 8 + lane % 8, PITCH, k * 2 + lane / 8 % 2));
#pragma unroll
          for (int i = 0; i < MT; i++) {
            u32 a[4];
            ldmatrix4(a, chunk(queries, i * 16 + lane % 16, PITCH, k * 2 + lane / 16));
            mma_bf16(s[i][0], a[0], a[1], a[2], a[3], b[0], b[1]);
            mma_bf16(s[i][1], a[0], a[1], a[2], a[3], b[2], b[3]);
          }
        }
      }

      // False if every row sees every key of the tile.
      const bool needs_mask = position < full_from || position + PAGE > context;
      u32 masked = 0;  // bit 8i + 4h + 2j + x: the row does not see the key of s[i][j][2h + x]
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 r = i * 16 + h * 8 + g;
          if (needs_mask) {
            const uint4 info = row_info[r];
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const u32 key = position + w * 16 + e / 2 * 8 + t * 2 + e % 2;
              if (!visible(info, key)) masked |= 1u << (i * 8 + h * 4 + e);
            }
          }
          float row_max = negative_infinity();
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float& x = s[i][e / 2][h * 2 + e % 2];
            x = masked >> (i * 8 + h * 4 + e) & 1 ? negative_infinity() : __fmul_rn(x, params.factor);
            row_max = fmaxf(row_max, x);
          }
          row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, 2));
          row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, 1));
          if (t == 0) maxima[w * ROWS + r] = row_max;
        }
      }
      if (needs_mask && !in_tail) {
        cp_async_wait<2>();
        zero_nonfinite(values + half, nonfinite);
      }
      __syncthreads();

      u32 nonfinite_bits = 0;     // bit 2j + x: the value of the key of s[.][j][2h + x] is flagged
      u64 bad_slots[2] = {0, 0};  // TREE: flagged slots of the tail
      if (in_tail) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
          if (!has_page(i)) continue;
          const u64 low = __ballot_sync(~0u, is_nonfinite(i * 64 + lane));
          bad_slots[i] = low | u64(__ballot_sync(~0u, is_nonfinite(i * 64 + 32 + lane))) << 32;
        }
      } else if (needs_mask) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
          nonfinite_bits |= u32(is_nonfinite(w * 16 + e / 2 * 8 + t * 2 + e % 2)) << e;
        }
      }
      float rescale[MT][2];
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 r = i * 16 + h * 8 + g;
          float row_max = m[i][h];
          const float* row_maxima = maxima + r;
#pragma unroll
          for (int y = 0; y < 4; y++) row_max = fmaxf(row_max, row_maxima[y * ROWS]);
          const float shift = row_max == negative_infinity() ? 0.0f : row_max;  // avoids -inf - -inf = NaN
          rescale[i][h] = ex2(__fsub_rn(m[i][h], shift));
          m[i][h] = row_max;
          float sum = 0.0f;
          if (in_tail) nonfinite_bits = tail_nonfinite(r, position + w * 16, bad_slots);
          const u32 nan = nonfinite_bits & ~(masked >> (i * 8 + h * 4));
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float p[2];
#pragma unroll
            for (int x = 0; x < 2; x++) {
              p[x] = ex2(__fsub_rn(s[i][j][h * 2 + x], shift));
              if (nan >> (j * 2 + x) & 1) p[x] = __uint_as_float(0x7fffffffu);
            }
            // Sum the rounded values that P V multiplies, so that the normalised probabilities of a row add
            // up to 1.
            const u32 pair = pack2(p[0], p[1]);
            sum += low_f32(pair);
            sum += high_f32(pair);
            reinterpret_cast<u32*>(chunk(probs, r, PAGE * 2, w * 2 + j))[t] = pair;
          }
          sum += __shfl_xor_sync(~0u, sum, 2);
          sum += __shfl_xor_sync(~0u, sum, 1);
          if (t == 0) sums[w * ROWS + r] = sum;
        }
      }
      cp_async_wait<2>();
      __syncthreads();

#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float sum = 0.0f;
          const float* row_sums = sums + i * 16 + h * 8 + g;
#pragma unroll
          for (int y = 0; y < 4; y++) sum += row_sums[y * ROWS];
          l[i][h] = __fmaf_rn(l[i][h], rescale[i][h], sum);
#pragma unroll
          for (int n = 0; n < NT; n++) {
            o[i][n][h * 2] = __fmul_rn(o[i][n][h * 2], rescale[i][h]);
            o[i][n][h * 2 + 1] = __fmul_rn(o[i][n][h * 2 + 1], rescale[i][h]);
          }
        }
      }
      if (in_tail) {
        tail_values(position, flip);
      } else {
#pragma unroll
        for (int k = 0; k < PAGE / 16; k++) {
          u32 b[NT / 2][4];
#pragma unroll
          for (int n = 0; n < NT / 2; n++) {
            const u32 c = w * NT + n * 2 + lane / 16;
            ldmatrix4_trans(b[n], chunk(values + half, k * 16 + lane % 16, PITCH, c));
          }
#pragma unroll
          for (int i = 0; i < MT; i++) {
            u32 a[4];
            ldmatrix4(a, chunk(probs, i * 16 + lane % 16, PAGE * 2, k * 2 + lane / 16));
#pragma unroll
            for (int n = 0; n < NT; n++) {
              mma_bf16(o[i][n], a[0], a[1], a[2], a[3], b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
            }
          }
        }
      }
      cp_async_wait<1>();
    }
  }

  // 1 / sum; 0 for a row that saw no key, whose output becomes zeros.
  DEVICE static float reciprocal(float sum) { return sum == 0.0f ? 0.0f : __fdiv_rn(1.0f, sum); }

  // Calls store(i, h, r, query, d, o[r][d], o[r][d + 1]) for each pair of outputs that this thread holds;
  // skips packed rows that do not exist.
  template <class Store>
  DEVICE void for_each_output(Store store) const {
    const u32 lane = threadIdx.x % 32, w = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 r = i * 16 + h * 8 + lane / 4, query = row_info[r].w;
        if (query == NONE) continue;
#pragma unroll
        for (int n = 0; n < NT; n++) {
          store(i, h, r, query, w * (D / 4) + n * 8 + lane % 4 * 2, o[i][n][h * 2], o[i][n][h * 2 + 1]);
        }
      }
    }
  }

  // Stores the normalised output when one block has attended to all keys. Adding zero turns -0 into +0, as in
  // merge_partials, whose sums start from zero.
  DEVICE void store_output() const {
    for_each_output([&](int i, int h, u32, u32 query, u32 d, float x, float y) {
      const float scale = reciprocal(l[i][h]);
      as<u32>(params.out + size_t(query) * D + d) =
          pack2(__fmul_rn(__fadd_rn(x, 0.0f), scale), __fmul_rn(__fadd_rn(y, 0.0f), scale));
    });
  }

  // Stores this split's unnormalised result.
  DEVICE void store_partial(float* partial) const {  // [PARTIAL]
    for_each_output([&](int i, int h, u32 r, u32, u32 d, float x, float y) {
      as<float2>(partial + r * D + d) = make_float2(x, y);
      if (d == 0) {
        partial[ROWS * D + r] = m[i][h];
        partial[ROWS * D + ROWS + r] = l[i][h];
      }
    });
  }

  // Merges `count` partial results in ascending order: the first is that of split `lead`, the i-th (i > 0)
  // that of split origin + i * stride. Stores the normalised output if `output`, else the merged partial in
  // place of `lead`. A partial in which a row saw no key has factor 0 and zeros; a single partial has factor
  // 1. Both are exact.
  DEVICE void merge_partials(float* partials,  // [splits][PARTIAL]
                             u32 lead, u32 origin, u32 stride, u32 count, bool output) const {
    float* factors = reinterpret_cast<float*>(keys);         // [count][ROWS], first the maxima
    float* partial_sums = reinterpret_cast<float*>(values);  // [count][ROWS]
    float* reciprocals = reinterpret_cast<float*>(probs);    // [ROWS]
    const auto part = [&](u32 i) { return partials + size_t(i ? origin + i * stride : lead) * PARTIAL; };
#pragma unroll 4
    for (u32 i = threadIdx.x; i < count * ROWS; i += ATTENTION_THREADS) {
      const float* from = part(i / ROWS) + ROWS * D + i % ROWS;
      if (!exists(i % ROWS)) continue;
      factors[i] = ld_cg(from);
      partial_sums[i] = ld_cg(from + ROWS);
    }
    __syncthreads();
    const u32 r = threadIdx.x;
    if (r < ROWS && exists(r)) {
      float row_max = negative_infinity(), sum = 0.0f;
      float* row_factors = factors + r;
      const float* row_sums = partial_sums + r;
      for (u32 n = 0; n < count; n++) row_max = fmaxf(row_max, row_factors[n * ROWS]);
      const float shift = row_max == negative_infinity() ? 0.0f : row_max;
      for (u32 n = 0; n < count; n++) {
        const float factor = ex2(__fsub_rn(row_factors[n * ROWS], shift));
        sum = __fmaf_rn(factor, row_sums[n * ROWS], sum);
        row_factors[n * ROWS] = factor;
      }
      if (output) {
        reciprocals[r] = reciprocal(sum);
      } else {
        part(0)[ROWS * D + r] = row_max;
        part(0)[ROWS * D + ROWS + r] = sum;
      }
    }
    __syncthreads();
    // 16 loads in flight per thread: all partials of a group, for two rows.
    for (u32 i = threadIdx.x; i < ROWS * D / 4; i += 2 * ATTENTION_THREADS) {
      const u32 row[2] = {i / (D / 4), (i + ATTENTION_THREADS) / (D / 4)}, d = i % (D / 4) * 4;
      const bool present[2] = {exists(row[0]), exists(row[1])};
      float4 sum[2] = {make_float4(0.0f, 0.0f, 0.0f, 0.0f), make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
      for (u32 first = 0; first < count; first += SPLITS_PER_GROUP) {
        float4 x[2][SPLITS_PER_GROUP];
#pragma unroll
        for (u32 n = 0; n < SPLITS_PER_GROUP; n++) {
#pragma unroll
          for (int y = 0; y < 2; y++) {
            if (first + n < count && present[y]) {
              x[y][n] = ld_cg(reinterpret_cast<const float4*>(part(first + n) + row[y] * D + d));
            }
          }
        }
#pragma unroll
        for (u32 n = 0; n < SPLITS_PER_GROUP; n++) {
#pragma unroll
          for (int y = 0; y < 2; y++) {
            if (first + n >= count || !present[y]) continue;
            const float factor = factors[(first + n) * ROWS + row[y]];
            sum[y].x = __fmaf_rn(factor, x[y][n].x, sum[y].x);
            sum[y].y = __fmaf_rn(factor, x[y][n].y, sum[y].y);
            sum[y].z = __fmaf_rn(factor, x[y][n].z, sum[y].z);
            sum[y].w = __fmaf_rn(factor, x[y][n].w, sum[y].w);
          }
        }
      }
#pragma unroll
      for (int y = 0; y < 2; y++) {
        if (!present[y]) continue;
        const u32 query = row_info[row[y]].w;
        if (output) {
          const float scale = reciprocals[row[y]];
          const u32 low = pack2(__fmul_rn(sum[y].x, scale), __fmul_rn(sum[y].y, scale));
          const u32 high = pack2(__fmul_rn(sum[y].z, scale), __fmul_rn(sum[y].w, scale));
          as<uint2>(params.out + size_t(query) * D + d) = make_uint2(low, high);
        } else {
          as<float4>(part(0) + row[y] * D + d) = sum[y];
        }
      }
    }
  }
};

// Body of the split kernels: blockIdx.x is the KV head, blockIdx.y the sequence and row tile. Block z of these
// takes the z-th of the splits that its rows see. The grid is sized for the capacity, and z varies slowest, so
// the blocks with work start before all empty ones.
//
// If the keys of a row tile span several splits, each block stores a partial result. The last block of each
// group of splits merges that group's partials, and the last of those blocks merges the groups. Merging in one
// step would be too slow: 64 rows at 4096 slots give 1 MB of partials per KV head, which one block reads in
// 9 us (64 bytes per clock), while all blocks together read the keys and values in 4 us.
template <int D, int MT, MaskMode MODE>
DEVICE void attend(const AttentionParams& params,
                   float* partials,  // [sequences * row tiles][kv_heads][splits][PARTIAL]
                   u32* counters) {  // [sequences * row tiles][kv_heads][groups + 1], zero before and after
  grid_launch();
  grid_wait();
  Attention<D, MT, MODE> a(params);
  const u32 tiles = (params.block * (params.heads / params.kv_heads) + a.ROWS - 1) / a.ROWS;
  a.sequence = blockIdx.y / tiles;
  a.head = blockIdx.x;
  if (!a.init_tile(blockIdx.y % tiles)) return;
  const u32 first = split_of(a.from), last = split_of(a.end - 1), split = first + blockIdx.z;
  if (split > last) return;
  a.attend_range(max(split_start(split), a.from / PAGE * PAGE), min(split_start(split + 1), a.end));
  if (first == last) return a.store_output();

  const u32 index = blockIdx.y * gridDim.x + blockIdx.x;
  partials += size_t(index) * gridDim.z * a.PARTIAL;
  counters += index * ((gridDim.z + SPLITS_PER_GROUP - 1) / SPLITS_PER_GROUP + 1);
  a.store_partial(partials + size_t(split) * a.PARTIAL);
  const u32 group = split / SPLITS_PER_GROUP, first_group = first / SPLITS_PER_GROUP;
  const u32 groups = last / SPLITS_PER_GROUP - first_group + 1;
  const u32 lead = max(group * SPLITS_PER_GROUP, first);
  const u32 parts = min(group * SPLITS_PER_GROUP + SPLITS_PER_GROUP - 1, last) - lead + 1;
  if (parts > 1) {
    if (!is_last_block(parts, counters + 1 + group)) return;
    a.merge_partials(partials, lead, lead, 1, parts, groups == 1);
  }
  if (groups == 1 || !is_last_block(groups, counters)) return;
  a.merge_partials(partials, first, first_group * SPLITS_PER_GROUP, SPLITS_PER_GROUP, groups, true);
}
