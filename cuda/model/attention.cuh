// The core of all attention kernels: one block attends with up to 64 packed rows (all query heads of one kv head, query
// by query) to an interval of one sequence's keys, 64 at a time, and keeps a running maximum, sum and output per row.
//
// A row's bits are a function of its query, of the keys it sees and of their positions. Rows never mix: a tile, split
// or group of which a row sees nothing changes none of its bits, so neither the number of rows, nor which others share
// the block, nor how many splits the launch has, nor whether its keys are a chain or a path of a tree can be told from
// a result.
//
// Four warps. For Q K^T warp w has keys 16w..16w+15 of the tile, for P V head dimensions w D/4..(w+1) D/4, both for all
// rows. Products of a tile: k ascending. Row sums: a lane's four keys upwards, lanes 2-1, warps upwards, tiles upwards;
// splits are merged upwards in groups of eight, then the groups upwards.
#pragma once
#include "common/rows.cuh"

constexpr u32 ATTENTION_THREADS = 128;

// How a row sees the other rows of its pass.
enum Sight {
  CHAIN,  // those before it, and itself
  TREE,   // those its mask names, ancestors and itself: these are its positions from `context` on, in order of slots
  BLOCK,  // all
};

// --- splits: intervals of positions, the same for every row and launch; src/gpu/kernels/attention.rs has them too. A key's
// slot is its position, but for those of a tree ---

constexpr u32 SPLITS_PER_GROUP = 8;

// 128 slots each below 4096, 512 below 32768, 2048 beyond.
WRAPPER u32 split_start(u32 split) {
  return split <= 32 ? split * 128 : split <= 88 ? 4096 + (split - 32) * 512 : 32768 + (split - 88) * 2048;
}
WRAPPER u32 split_of(u32 slot) {
  return slot < 4096 ? slot / 128 : slot < 32768 ? 32 + (slot - 4096) / 512 : 88 + (slot - 32768) / 2048;
}

// --- what rows see ---

// Bits 0..count; all 64 where count is more.
WRAPPER u64 low_bits(u32 count) { return count < 64 ? (1ull << count) - 1 : ~0ull; }

// What the core's kernels are given.
struct Pass {
  u16* out;               // [rows][heads][D] bf16
  const u16* q;           // as out
  const u16* k;           // [pages][kv_heads][PAGE][D] bf16, chunks permuted (page_offset)
  const u16* v;           // as k
  const u32* page_table;  // [sequences][pages_per_sequence]
  const Span* spans;      // [sequences]
  const u64* masks;       // [sequences][block], TREE only; any bits
  u32 block, heads, kv_heads, pages, pages_per_sequence;
  u32 capacity;           // slots the launch can reach, at most pages_per_sequence * PAGE
  u32 window;             // positions a row sees, itself included; 0: all
  float factor;           // of scores: scale * log2(e)
};

WRAPPER u32 window_start(u32 end, u32 window) { return window && end > window ? end - window : 0; }

// --- the core ---

template <int D, int MT, Sight RULE>
struct Attention {
  static constexpr u32 ROWS = 16 * MT;
  static constexpr u32 PITCH = D * 2;        // bytes of a query, key or value
  static constexpr u32 CHUNKS = D / 8;       // 16-byte pieces of it
  static constexpr u32 TILE = PAGE * PITCH;  // bytes of 64 keys
  static constexpr int NT = D / 32;          // n8 tiles of a warp's head dimensions
  static constexpr u32 PARTIAL = ROWS * (D + 2);  // floats of one split's result: output, then maxima, then sums

  // Shared memory, in this order; `shared_bytes` of the launcher has the sum.
  unsigned char* queries;  // [ROWS][D] bf16, chunk c of row r at c ^ (r & 7)
  unsigned char* keys;     // [2][PAGE][D]
  unsigned char* values;   // [2][PAGE][D]
  unsigned char* weights;  // [ROWS][PAGE] bf16, chunks as in queries
  float* maxima;           // [4 warps][ROWS]
  float* sums;             // [4 warps][ROWS]
  uint4* views;            // [ROWS]: what `view` says
  u8* spoiled;             // [PAGE][CHUNKS]: this piece of a value held a NaN or an infinity; TREE: [2][PAGE][CHUNKS]
  u8* paths;               // TREE: [ROWS][64]: `trace_paths`

  Pass pass;
  u32 sequence, head, group;  // kv head; query heads of it
  u32 packed;                 // first packed row
  u32 base;                   // row of the pass whose slot is `context`
  u32 context, rows;          // slots below context are old to all rows here; rows of the sequence from `base` on
  u32 from, all, end;         // positions some row sees: from..end; all..context: every row sees them
  u32 filled;                 // one past the slots of those
  u32 tail;                   // first position of the tile of `context`

  float o[MT][NT][4], m[MT][2], l[MT][2];

  WRAPPER explicit Attention(const Pass& given) : pass(given) {
    DYNAMIC_SHARED(unsigned char, memory);
    queries = memory;
    keys = queries + ROWS * PITCH;
    values = keys + 2 * TILE;
    weights = values + 2 * TILE;
    maxima = reinterpret_cast<float*>(weights + ROWS * PAGE * 2);
    sums = maxima + 4 * ROWS;
    views = reinterpret_cast<uint4*>(sums + 4 * ROWS);
    spoiled = reinterpret_cast<u8*>(views + ROWS);
    paths = spoiled + 2 * PAGE * CHUNKS;
  }

  // Row tile `tile` of `sequence` and kv head `head`; false where it has no rows. Any context, any number of rows in
  // the span and any masks give an interval inside the page table.
  WRAPPER bool reach(u32 tile) {
    group = pass.heads / pass.kv_heads;
    packed = tile * ROWS;
    const u32 lane = threadIdx.x % 32;
    u64 masks[2] = {0, 0};  // of rows lane and lane + 32
    if (RULE == TREE) {
      const u64* own = pass.masks + size_t(sequence) * pass.block;
      if (lane < pass.block) masks[0] = ld(own + lane);
      if (lane + 32 < pass.block) masks[1] = ld(own + lane + 32);
    }
    const Span span = ld(pass.spans + sequence);
    const u32 count = min(span.rows, pass.block), first = packed / group;
    if (first >= count) return false;
    const u32 last = min((packed + ROWS - 1) / group, count - 1);
    base = RULE == CHAIN ? first : 0;
    context = min(span.context, pass.capacity) + base;
    rows = count - base;
    tail = context / PAGE * PAGE;
    // One past the positions of the first and the last row; of a tree's rows, the least possible and the greatest.
    u32 low = context + first - base + 1, high = context + last - base + 1;
    end = min(RULE == CHAIN ? high : context + rows, pass.capacity);
    filled = end;
    if (RULE == TREE) {
      u32 deepest = 0;
#pragma unroll
      for (u32 i = 0; i < 2; i++) {
        const u32 row = lane + i * 32;
        if (row >= first && row <= last) deepest = max(deepest, u32(__popcll(masks[i] & low_bits(filled - context))));
      }
      deepest = __reduce_max_sync(~0u, deepest);
      low = context, high = context + deepest;
      end = min(context + max(deepest, 1u), filled);
    }
    from = min(window_start(low, pass.window), end - 1);
    all = window_start(high, pass.window);
    return true;
  }

  // The row packed row r belongs to, counted from `base`.
  WRAPPER u32 row_of(u32 r) const { return (packed + r) / group - base; }

  // TREE: bit i says that row i of the pass is on the way to row `row`, or is this row; only rows that have a slot.
  WRAPPER u64 path(u32 row) const {
    return ld(pass.masks + size_t(sequence) * pass.block + row) & low_bits(filled - context);
  }

  // Packed row r: x and y have a bit for each position from `context` on that it sees, low ones first; of those below
  // context it sees those from z on; w is its row of q and out, counted in heads. NONE: there is no such row. TREE: it
  // sees positions z..context + x, and y is its row's place among those of the row tile.
  WRAPPER uint4 view(u32 r) const {
    const u32 row = row_of(r);
    if (row >= rows) return make_uint4(0, RULE == TREE ? NONE : 0, 0, NONE);
    const u32 query = (sequence * pass.block + base + row) * pass.heads + head * group + (packed + r) % group;
    const u32 length = RULE == TREE ? u32(__popcll(path(row))) : row + 1;  // position + 1 - context
    const u32 start = window_start(context + length, pass.window);
    if (RULE == TREE) return make_uint4(length, row - packed / group, start, query);
    u64 mask = low_bits(RULE == CHAIN ? length : rows);
    if (pass.window) {
      if (start > context) mask &= ~low_bits(start - context);
      if (RULE == BLOCK) mask &= low_bits(min(row, 64u) + min(pass.window, 64u));
    }
    return make_uint4(u32(mask), u32(mask >> 32), start, query);
  }

  WRAPPER bool sees(const uint4& sight, u32 position) const {
    if (RULE == TREE) return position >= sight.z && position < context + sight.x;
    const u64 mask = sight.x | u64(sight.y) << 32;
    return position < context ? position >= sight.z
                              : position - context < 64 && (mask >> (position - context) & 1);
  }

  // Starts the copy of the keys or values of slots slot..slot + PAGE; of those no row sees, zeros are made.
  WRAPPER void stage(unsigned char* to, const u16* cache, u32 page, u32 slot) const {
    const bool known = page < pass.pages;
    const u16* source = cache + (size_t(known ? page : 0) * pass.kv_heads + head) * (PAGE * D);
#pragma unroll
    for (u32 n = 0; n < PAGE * CHUNKS; n += ATTENTION_THREADS) {
      const u32 i = n + threadIdx.x, s = slot + i / CHUNKS;
      cp_async16(to + i * 16, source + i * 8, known && s >= from && s < filled);
    }
  }

  // Values that are no numbers would reach rows that do not see them, as 0 x NaN. Zeros in their place; `spoiled` tells
  // the rows that do see them. Each thread looks at what it copied itself.
  WRAPPER void mend(unsigned char* tile, u8* spoiled) const {
#pragma unroll
    for (u32 n = 0; n < PAGE * CHUNKS; n += ATTENTION_THREADS) {
      const u32 i = n + threadIdx.x;
      const uint4 v = lds128(tile + i * 16);
      const u32 words[4] = {v.x, v.y, v.z, v.w};
      bool bad = false;
#pragma unroll
      for (u32 word : words) bad |= (word & 0x7f80) == 0x7f80 || (word & 0x7f800000) == 0x7f800000;
      sts(spoiled + i, u8(bad));
      if (bad) sts128(tile + i * 16, make_uint4(0, 0, 0, 0));
    }
  }

  // The maximum of nothing.
  WRAPPER static float lowest() { return __uint_as_float(0xff800000u); }

  WRAPPER bool is_spoiled(u32 key) const {
    if (CHUNKS == 8) return lds(reinterpret_cast<const u64*>(spoiled + key * CHUNKS));
    const uint4 any = lds128(spoiled + key * CHUNKS);
    return any.x | any.y | any.z | any.w;
  }

  WRAPPER static unsigned char* chunk(unsigned char* rows, u32 r, u32 pitch, u32 c) {
    return rows + r * pitch + ((c ^ (r & 7)) << 4);
  }

  // --- the tail of a tree: the tile of `context` and the one behind it, where a position has another slot for each
  // row, never a lower one than in a chain. All slots of both lie in the two halves of `keys` and `values`, where their
  // tiles would be. Products are a chain's, made for each row of the pass in turn, with its keys and for its heads
  // alone: ldmatrix takes an address per key, so keys need not be neighbours, though some then share a bank. ---

  // Makes `paths`: for each row of the row tile the slot, counted from `tail`, of its k-th key from `context` on; where
  // it has no such key, the slot of a chain's.
  WRAPPER void trace_paths() const {
    const u32 lane = threadIdx.x % 32, first = packed / group;
    const u32 count = min((packed + ROWS - 1) / group + 1, rows) - first;
#pragma unroll 4
    for (u32 i = threadIdx.x / 32; i < count; i += ATTENTION_THREADS / 32) {
      const u64 mask = path(first + i);
#pragma unroll
      for (u32 bit = lane; bit < 64; bit += 32) {
        const bool on_path = mask >> bit & 1;
        const u64 before = low_bits(bit);
        const u32 k = on_path ? __popcll(mask & before) : __popcll(mask) + __popcll(~mask & before);
        sts(paths + i * 64 + k, u8(context - tail + (on_path ? bit : k)));
      }
    }
  }

  // The slot, counted from `tail`, of the key at `position` of the row tile's i-th row.
  WRAPPER u32 place(u32 i, u32 position) const {
    const u32 k = position - context, slot = lds(paths + i * 64 + min(k, 63u));
    return k < 64 ? slot : position - tail;
  }

  // Calls turn(i, mine) for each row that has packed rows among the 16 from `r` on and reaches the 16 positions from
  // `position` on; mine[h]: this lane's packed row r + 8 h + g belongs to it. One turn for all where keys are the same.
  template <class Turn>
  WRAPPER void each_row(u32 r, u32 position, Turn turn) const {
    const bool shared = position + 16 <= context;
    const u32 first = packed / group, g = threadIdx.x % 32 / 4;
    const u32 own[2] = {lds(&views[r + g].y), lds(&views[r + g + 8].y)};
    const u32 begin = shared ? 0 : (packed + r) / group - first;
    const u32 stop = shared ? 1 : min((packed + r + 15) / group + 1, rows) - first;
#pragma unroll 1
    for (u32 i = begin; i < stop; i++) {
      const u32 some = max((first + i) * group, packed + r) - packed;
      if (!shared && position >= context + lds(&views[some].x)) continue;
      const bool mine[2] = {shared || own[0] == i, shared || own[1] == i};
      turn(i, mine);
    }
  }

  // Scores of the 16 keys from `position` on. `flip`: 64 where the first page is in the second half.
  WRAPPER void tail_scores(float (&s)[MT][2][4], u32 position, u32 flip) const {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < MT; i++) {
      each_row(i * 16, position, [&](u32 row, const bool (&mine)[2]) {
        const u32 key = place(row, position + lane / 16 * 8 + lane % 8) ^ flip;
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
          if (mine[e % 4 / 2]) s[i][e / 4][e % 4] = x[e / 4][e % 4];
        }
      });
    }
  }

  // Adds the values of the tile at `position`, weighted. The accumulators of other rows gain zeros.
  WRAPPER void tail_values(u32 position, u32 flip) {
    const u32 lane = threadIdx.x % 32, w = threadIdx.x / 32;
#pragma unroll 1
    for (u32 k = 0; k < PAGE / 16; k++) {
#pragma unroll
      for (int i = 0; i < MT; i++) {
        u32 a[4];
        ldmatrix4(a, chunk(weights, i * 16 + lane % 16, PAGE * 2, k * 2 + lane / 16));
        each_row(i * 16, position + k * 16, [&](u32 row, const bool (&mine)[2]) {
          const u32 key = place(row, position + k * 16 + lane % 16) ^ flip;
          const u32 own[4] = {mine[0] ? a[0] : 0, mine[1] ? a[1] : 0, mine[0] ? a[2] : 0, mine[1] ? a[3] : 0};
#pragma unroll
          for (int n = 0; n < NT; n += 2) {
            u32 b[4];
            ldmatrix4_trans(b, chunk(values, key, PITCH, w * NT + n + lane / 16));
            mma_bf16(o[i][n], own[0], own[1], own[2], own[3], b[0], b[1]);
            mma_bf16(o[i][n + 1], own[0], own[1], own[2], own[3], b[2], b[3]);
          }
        });
      }
    }
  }

  // Bit e: the value at the e-th of this lane's positions (those of the scores) is no number, for packed row r. `bad`:
  // the slots, counted from `tail`, of which that is so.
  WRAPPER u32 tail_lost(u32 r, u32 position, const u64 (&bad)[2]) const {
    const u32 row = lds(&views[r].y), t = threadIdx.x % 4;
    if (row == NONE || !(bad[0] | bad[1])) return 0;
    u32 lost = 0;
#pragma unroll
    for (u32 e = 0; e < 4; e++) {
      const u32 slot = place(row, position + e / 2 * 8 + t * 2 + e % 2);
      lost |= u32((slot < 64 ? bad[0] : bad[1]) >> (slot & 63) & 1) << e;
    }
    return lost;
  }

  // Attends to positions begin..stop; begin is a multiple of PAGE. Copies come in groups, keys of a tile (with the
  // first: the queries) and values of a tile. Two tiles are on their way at a time; page numbers are read one tile
  // ahead of that. The tail of a tree waits until both its pages are there.
  WRAPPER void walk(u32 begin, u32 stop) {
    const u32 lane = threadIdx.x % 32, w = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const bool to_tail = RULE == TREE && stop > tail;
    const u32* table = pass.page_table + size_t(sequence) * pass.pages_per_sequence + begin / PAGE;
    const u32 pages = ((to_tail ? filled : stop) - begin + PAGE - 1) / PAGE;
    const u32 flip = (tail - begin) & PAGE;
    // A split may begin with the second page of the tail; the first may be all there is.
    const auto has_page = [&](u32 i) { return tail + i * PAGE >= begin && tail + i * PAGE < filled; };

    const u32 first_page = ld(table);
    u32 next_page = pages > 1 ? ld(table + 1) : NONE;
    stage(keys, pass.k, first_page, begin);
    if (threadIdx.x < ROWS) sts128(views + threadIdx.x, view(threadIdx.x));
    __syncthreads();
#pragma unroll
    for (u32 n = 0; n < ROWS * CHUNKS; n += ATTENTION_THREADS) {
      const u32 i = n + threadIdx.x, r = i / CHUNKS, c = i % CHUNKS;
      const u32 query = lds(&views[r].w);
      cp_async16(chunk(queries, r, PITCH, c), pass.q + size_t(query == NONE ? 0 : query) * D + c * 8, query != NONE);
    }
    cp_async_commit();
    stage(values, pass.v, first_page, begin);
    cp_async_commit();
    if (pages > 1) stage(keys + TILE, pass.k, next_page, begin + PAGE);
    cp_async_commit();
    if (pages > 1) stage(values + TILE, pass.v, next_page, begin + PAGE);
    cp_async_commit();
    next_page = pages > 2 ? ld(table + 2) : NONE;
    if (to_tail) trace_paths();

#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) m[i][h] = lowest(), l[i][h] = 0.0f;
#pragma unroll
      for (int n = 0; n < NT; n++) o[i][n][0] = o[i][n][1] = o[i][n][2] = o[i][n][3] = 0.0f;
    }

    cp_async_wait<3>();
    for (u32 position = begin; position < stop; position += PAGE) {
      // This tile's keys are there, and nobody reads the one before any more.
      __syncthreads();
      const u32 tile = (position - begin) / PAGE, half = tile % 2 * TILE;
      if (tile) {
        const bool more = tile + 1 < pages;
        if (more) stage(keys + (TILE - half), pass.k, next_page, position + PAGE);
        cp_async_commit();
        if (more) stage(values + (TILE - half), pass.v, next_page, position + PAGE);
        cp_async_commit();
        next_page = tile + 2 < pages ? ld(table + tile + 2) : NONE;
      }
      const bool in_tail = RULE == TREE && position >= tail;
      if (in_tail && (position == tail || position == begin)) {
        cp_async_wait<0>();
        if (has_page(0)) mend(values + flip * PITCH, spoiled);
        if (has_page(1)) mend(values + (flip ^ PAGE) * PITCH, spoiled + PAGE * CHUNKS);
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

      // Where every row sees every key, nothing is to be masked.
      const bool mixed = position < all || position + PAGE > context;
      u32 hidden = 0;  // bit 8i + 4h + 2j + x: this lane's score is of a key its row does not see
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 r = i * 16 + h * 8 + g;
          if (mixed) {
            const uint4 sight = lds128(views + r);
#pragma unroll
            for (int e = 0; e < 4; e++) {
              const u32 key = position + w * 16 + e / 2 * 8 + t * 2 + e % 2;
              if (!sees(sight, key)) hidden |= 1u << (i * 8 + h * 4 + e);
            }
          }
          float most = lowest();
#pragma unroll
          for (int e = 0; e < 4; e++) {
            float& x = s[i][e / 2][h * 2 + e % 2];
            x = hidden >> (i * 8 + h * 4 + e) & 1 ? lowest() : __fmul_rn(x, pass.factor);
            most = fmaxf(most, x);
          }
          most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
          most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
          if (t == 0) sts(maxima + w * ROWS + r, most);
        }
      }
      if (mixed && !in_tail) {
        cp_async_wait<2>();
        mend(values + half, spoiled);
      }
      __syncthreads();

      u32 lost = 0;  // bit 2j + x: the value of this lane's key is no number
      u64 bad[2] = {0, 0};
      if (in_tail) {
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
          if (!has_page(i)) continue;
          const u64 low = __ballot_sync(~0u, is_spoiled(i * 64 + lane));
          bad[i] = low | u64(__ballot_sync(~0u, is_spoiled(i * 64 + 32 + lane))) << 32;
        }
      } else if (mixed) {
#pragma unroll
        for (int e = 0; e < 4; e++) lost |= u32(is_spoiled(w * 16 + e / 2 * 8 + t * 2 + e % 2)) << e;
      }
      float shrink[MT][2];
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const u32 r = i * 16 + h * 8 + g;
          float most = m[i][h];
#pragma unroll
          for (int y = 0; y < 4; y++) most = fmaxf(most, lds(maxima + y * ROWS + r));
          const float zero = most == lowest() ? 0.0f : most;  // -inf - -inf would be NaN
          shrink[i][h] = ex2(__fsub_rn(m[i][h], zero));
          m[i][h] = most;
          float sum = 0.0f;
          if (in_tail) lost = tail_lost(r, position + w * 16, bad);
          const u32 nan = lost & ~(hidden >> (i * 8 + h * 4));
#pragma unroll
          for (int j = 0; j < 2; j++) {
            float p[2];
#pragma unroll
            for (int x = 0; x < 2; x++) {
              p[x] = ex2(__fsub_rn(s[i][j][h * 2 + x], zero));
              if (nan >> (j * 2 + x) & 1) p[x] = __uint_as_float(0x7fffffffu);
            }
            // The sum is of what is multiplied, so that weights of a row add up to 1.
            const u32 pair = pack2(p[0], p[1]);
            sum += low_f32(pair);
            sum += high_f32(pair);
            sts(reinterpret_cast<u32*>(chunk(weights, r, PAGE * 2, w * 2 + j)) + t, pair);
          }
          sum += __shfl_xor_sync(~0u, sum, 2);
          sum += __shfl_xor_sync(~0u, sum, 1);
          if (t == 0) sts(sums + w * ROWS + r, sum);
        }
      }
      cp_async_wait<2>();
      __syncthreads();

#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          float sum = 0.0f;
#pragma unroll
          for (int y = 0; y < 4; y++) sum += lds(sums + y * ROWS + i * 16 + h * 8 + g);
          l[i][h] = __fmaf_rn(l[i][h], shrink[i][h], sum);
#pragma unroll
          for (int n = 0; n < NT; n++) {
            o[i][n][h * 2] = __fmul_rn(o[i][n][h * 2], shrink[i][h]);
            o[i][n][h * 2 + 1] = __fmul_rn(o[i][n][h * 2 + 1], shrink[i][h]);
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
            ldmatrix4_trans(b[n], chunk(values + half, k * 16 + lane % 16, PITCH, w * NT + n * 2 + lane / 16));
          }
#pragma unroll
          for (int i = 0; i < MT; i++) {
            u32 a[4];
            ldmatrix4(a, chunk(weights, i * 16 + lane % 16, PAGE * 2, k * 2 + lane / 16));
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

  // A row that saw nothing becomes zeros.
  WRAPPER static float inverse(float sum) { return sum == 0.0f ? 0.0f : __fdiv_rn(1.0f, sum); }

  // Calls put(i, h, r, query, d, o[r][d], o[r][d + 1]) for this thread's outputs of rows that exist.
  template <class Put>
  WRAPPER void each_pair(Put put) const {
    const u32 lane = threadIdx.x % 32, w = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 r = i * 16 + h * 8 + lane / 4, query = lds(&views[r].w);
        if (query == NONE) continue;
#pragma unroll
        for (int n = 0; n < NT; n++) {
          put(i, h, r, query, w * (D / 4) + n * 8 + lane % 4 * 2, o[i][n][h * 2], o[i][n][h * 2 + 1]);
        }
      }
    }
  }

  // The output, where one walk has seen all keys. Zero is added because the sums of `merge` begin with it: no -0 here
  // either.
  WRAPPER void finish() const {
    each_pair([&](int i, int h, u32, u32 query, u32 d, float x, float y) {
      const float by = inverse(l[i][h]);
      st(reinterpret_cast<u32*>(pass.out + size_t(query) * D + d),
         pack2(__fmul_rn(__fadd_rn(x, 0.0f), by), __fmul_rn(__fadd_rn(y, 0.0f), by)));
    });
  }

  // This split's part of the result.
  WRAPPER void leave(float* partial) const {
    each_pair([&](int i, int h, u32 r, u32, u32 d, float x, float y) {
      st(reinterpret_cast<float2*>(partial + r * D + d), make_float2(x, y));
      if (d == 0) {
        st(partial + ROWS * D + r, m[i][h]);
        st(partial + ROWS * D + ROWS + r, l[i][h]);
      }
    });
  }

  // True in the last of `count` blocks to come here, which then sees what the others left. The counter is zero again.
  WRAPPER static bool last_of(u32 count, u32* counter) {
    SHARED(u32, last, 1);
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
      const bool mine = atomicAdd(counter, 1u) + 1 == count;
      __threadfence();
      if (mine) st(counter, 0u);
      sts(last, u32(mine));
    }
    __syncthreads();
    return lds(last);
  }

  // Adds partial results upwards: `lead`, then those at origin + stride, origin + 2 stride..., `count` of them; into
  // the output, or into `lead`. A part of which a row saw nothing has factor 0 and zeros, one alone has factor 1: both
  // are exact.
  WRAPPER void merge(float* partials, u32 lead, u32 origin, u32 stride, u32 count, bool output) const {
    float* factors = reinterpret_cast<float*>(keys);      // [count][ROWS], maxima at first
    float* part_sums = reinterpret_cast<float*>(values);  // [count][ROWS]
    float* inverses = reinterpret_cast<float*>(weights);  // [ROWS]
    const auto part = [&](u32 i) { return partials + size_t(i ? origin + i * stride : lead) * PARTIAL; };
#pragma unroll 4
    for (u32 i = threadIdx.x; i < count * ROWS; i += ATTENTION_THREADS) {
      const float* from = part(i / ROWS) + ROWS * D + i % ROWS;
      if (row_of(i % ROWS) >= rows) continue;
      sts(factors + i, ld_cg(from));
      sts(part_sums + i, ld_cg(from + ROWS));
    }
    __syncthreads();
    const u32 r = threadIdx.x;
    if (r < ROWS && row_of(r) < rows) {
      float most = lowest(), sum = 0.0f;
      for (u32 n = 0; n < count; n++) most = fmaxf(most, lds(factors + n * ROWS + r));
      const float zero = most == lowest() ? 0.0f : most;
      for (u32 n = 0; n < count; n++) {
        const float factor = ex2(__fsub_rn(lds(factors + n * ROWS + r), zero));
        sum = __fmaf_rn(factor, lds(part_sums + n * ROWS + r), sum);
        sts(factors + n * ROWS + r, factor);
      }
      if (output) {
        sts(inverses + r, inverse(sum));
      } else {
        st(part(0) + ROWS * D + r, most);
        st(part(0) + ROWS * D + ROWS + r, sum);
      }
    }
    __syncthreads();
    // Sixteen loads in flight per thread: all of a group, for two rows.
    for (u32 i = threadIdx.x; i < ROWS * D / 4; i += 2 * ATTENTION_THREADS) {
      const u32 row[2] = {i / (D / 4), (i + ATTENTION_THREADS) / (D / 4)}, d = i % (D / 4) * 4;
      float4 sum[2] = {make_float4(0.0f, 0.0f, 0.0f, 0.0f), make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
      for (u32 first = 0; first < count; first += SPLITS_PER_GROUP) {
        float4 x[2][SPLITS_PER_GROUP];
#pragma unroll
        for (u32 n = 0; n < SPLITS_PER_GROUP; n++) {
#pragma unroll
          for (int y = 0; y < 2; y++) {
            if (first + n < count && row_of(row[y]) < rows) {
              x[y][n] = ld_cg(reinterpret_cast<const float4*>(part(first + n) + row[y] * D + d));
            }
          }
        }
#pragma unroll
        for (u32 n = 0; n < SPLITS_PER_GROUP; n++) {
#pragma unroll
          for (int y = 0; y < 2; y++) {
            if (first + n >= count || row_of(row[y]) >= rows) continue;
            const float factor = lds(factors + (first + n) * ROWS + row[y]);
            sum[y].x = __fmaf_rn(factor, x[y][n].x, sum[y].x), sum[y].y = __fmaf_rn(factor, x[y][n].y, sum[y].y);
            sum[y].z = __fmaf_rn(factor, x[y][n].z, sum[y].z), sum[y].w = __fmaf_rn(factor, x[y][n].w, sum[y].w);
          }
        }
      }
#pragma unroll
      for (int y = 0; y < 2; y++) {
        const u32 query = lds(&views[row[y]].w);
        if (query == NONE) continue;
        if (output) {
          const float by = lds(inverses + row[y]);
          const u32 low = pack2(__fmul_rn(sum[y].x, by), __fmul_rn(sum[y].y, by));
          const u32 high = pack2(__fmul_rn(sum[y].z, by), __fmul_rn(sum[y].w, by));
          st(reinterpret_cast<uint2*>(pass.out + size_t(query) * D + d), make_uint2(low, high));
        } else {
          st(reinterpret_cast<float4*>(part(0) + row[y] * D + d), sum[y]);
        }
      }
    }
  }
};

// A block of the split kernels: split blockIdx.x, kv head blockIdx.y, sequence and row tile blockIdx.z. Where a row
// tile's keys lie in several splits, each block leaves a part, the last of a group of splits merges the group's, and
// the last of all the groups'. 64 rows at 4096 slots leave a megabyte of parts per kv head, which one block could not
// read in less time than all together take to attend (64 bytes a clock: 9 us, against 4 for the keys and values).
template <int D, int MT, Sight RULE>
WRAPPER void attend(const Pass& pass,
                    float* partials,  // [sequences * row tiles][kv_heads][splits][PARTIAL]
                    u32* counters) {  // [sequences * row tiles][kv_heads][groups + 1], zeros
  grid_launch();
  grid_wait();
  Attention<D, MT, RULE> a(pass);
  const u32 tiles = (pass.block * (pass.heads / pass.kv_heads) + a.ROWS - 1) / a.ROWS;
  a.sequence = blockIdx.z / tiles;
  a.head = blockIdx.y;
  if (!a.reach(blockIdx.z % tiles)) return;
  const u32 split = blockIdx.x, first = split_of(a.from), last = split_of(a.end - 1);
  if (split < first || split > last) return;
  a.walk(max(split_start(split), a.from / PAGE * PAGE), min(split_start(split + 1), a.end));
  if (first == last) return a.finish();

  const u32 place = blockIdx.z * gridDim.y + blockIdx.y;
  partials += size_t(place) * gridDim.x * a.PARTIAL;
  counters += place * ((gridDim.x + SPLITS_PER_GROUP - 1) / SPLITS_PER_GROUP + 1);
  a.leave(partials + size_t(split) * a.PARTIAL);
  const u32 group = split / SPLITS_PER_GROUP, first_group = first / SPLITS_PER_GROUP;
  const u32 groups = last / SPLITS_PER_GROUP - first_group + 1;
  const u32 lead = max(group * SPLITS_PER_GROUP, first);
  const u32 parts = min(group * SPLITS_PER_GROUP + SPLITS_PER_GROUP - 1, last) - lead + 1;
  if (parts > 1) {
    if (!a.last_of(parts, counters + 1 + group)) return;
    a.merge(partials, lead, lead, 1, parts, groups == 1);
  }
  if (groups == 1 || !a.last_of(groups, counters)) return;
  a.merge(partials, first, first_group * SPLITS_PER_GROUP, SPLITS_PER_GROUP, groups, true);
}
