// The core of all attention kernels. A packed row is one query head of one row of the pass; packed rows list
// all query heads of one KV head for the first row, then for the next. One block computes attention of up to
// 64 packed rows over an interval of one sequence's keys, 64 keys at a time, with an online softmax: a
// running maximum, sum and output per packed row.
//
// The bits of a row's output depend only on its query, on the keys it sees and on their positions. Rows never
// interact: a tile or split in which a row sees no key leaves its bits unchanged. The result is therefore the
// same for every number of rows, for every set of rows that share the block, for every number of splits, and
// whether the keys form a chain or a path of a tree.
//
// Work: four warps, each with 16 packed rows. With 64 packed rows a warp takes all 64 keys of a tile, and its
// scores and probabilities stay in registers. With 32 rows two warps, with 16 rows four share a row: in Q K^T
// each takes a part of the keys, in P V a part of the head dimensions, and they exchange maxima and
// probabilities through shared memory.
//
// Order of additions: products of a tile in ascending k, tiles ascending, splits ascending. A row's sum of
// probabilities is the product with a value of ones, in the same order.
#pragma once
#include "common/rows.cuh"

constexpr u32 ATTENTION_THREADS = 128;

// Which rows of its pass a row sees.
enum MaskMode {
  CAUSAL,  // the earlier rows and itself
  TREE,    // the rows in its mask: its ancestors and itself. In slot order, the i-th has position context + i
  FULL,    // all rows
};

// --- splits: fixed intervals of positions for all rows and launches; see src/gpu/kernels/attention.rs ---

// A split has 128 slots below slot 1024, 256 below 4096, 512 below 32768, 2048 above. A key's slot is its
// position, except in trees.
DEVICE u32 split_start(u32 split) {
  return split <= 8    ? split * 128
         : split <= 20 ? 1024 + (split - 8) * 256
         : split <= 76 ? 4096 + (split - 20) * 512
                       : 32768 + (split - 76) * 2048;
}
DEVICE u32 split_of(u32 slot) {
  return slot < 1024    ? slot / 128
         : slot < 4096  ? 8 + (slot - 1024) / 256
         : slot < 32768 ? 20 + (slot - 4096) / 512
                        : 76 + (slot - 32768) / 2048;
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
  const u16* gates;       // as out: out is multiplied by their sigmoid; null: it is not
  u32 block;              // rows per sequence in q and out
  u32 heads, kv_heads, pages, pages_per_sequence;
  u32 capacity;           // maximum slots per sequence in this launch, at most pages_per_sequence * PAGE
  u32 window;             // positions that a row sees, its own included; 0: all
  float factor;           // multiplies scores: scale * log2(e)
};

// Parameters of a merge, which reads no queries, keys or values.
DEVICE AttentionParams merge_params(u16* out, const Span* spans, const u64* masks, const u16* gates, u32 block,
                                    u32 heads, u32 kv_heads, u32 capacity, u32 window) {
  return {out,   nullptr, nullptr,  nullptr, nullptr, spans,    masks, gates,
          block, heads,   kv_heads, 0,       0,       capacity, window, 0};
}

// Stores outputs d and d + 1 of a query, times the sigmoid of their gates if there are any.
template <int D>
DEVICE void store_pair(const AttentionParams& params, u32 query, u32 d, float x, float y) {
  const size_t at = size_t(query) * D + d;
  if (params.gates) {
    const u32 pair = as<u32>(params.gates + at);
    x = __fdiv_rn(x, __fadd_rn(1.0f, ex2(__fmul_rn(low_f32(pair), -1.44269504f))));
    y = __fdiv_rn(y, __fadd_rn(1.0f, ex2(__fmul_rn(high_f32(pair), -1.44269504f))));
  }
  as<u32>(params.out + at) = pack2(x, y);
}

// First of the `window` positions before `end`; 0 if window is 0.
DEVICE u32 window_start(u32 end, u32 window) { return window && end > window ? end - window : 0; }

// --- row tiles ---

// Up to 64 packed rows of one sequence and KV head, and the positions that they see.
struct RowTile {
  AttentionParams params;
  u32 sequence;
  u32 head;                  // KV head
  u32 group_size;            // query heads per KV head
  u32 first_packed;          // first packed row of this row tile, counted from the sequence's first
  u32 base;                  // row of the pass whose slot is `context`
  u32 context;               // slots 0..context precede every row of the tile
  u32 rows;                  // rows of the sequence from `base` on
  u32 from, full_from, end;  // some row sees positions from..end; every row sees full_from..context
  u32 slots_end;             // one past the last slot of positions from..end
  u32 tail;                  // first position of the key tile that contains position `context`

  DEVICE RowTile(const AttentionParams& p, u32 sequence, u32 head)
      : params(p), sequence(sequence), head(head), group_size(p.heads / p.kv_heads) {}

  // Sets up row tile `tile` of `size` packed rows; returns false if it has no rows. For any context, any number
  // of rows in the span and any masks, the interval stays inside the page table.
  DEVICE bool init(MaskMode mode, u32 tile, u32 size) {
    first_packed = tile * size;
    const u32 lane = threadIdx.x % 32;
    u64 masks[2] = {0, 0};  // masks of rows lane and lane + 32
    if (mode == TREE) {
      const u64* from_row = params.masks + size_t(sequence) * params.block;
      if (lane < params.block) masks[0] = from_row[lane];
      if (lane + 32 < params.block) masks[1] = from_row[lane + 32];
    }
    const Span span = params.spans[sequence];
    const u32 count = min(span.rows, params.block), first = first_packed / group_size;
    if (first >= count) return false;
    const u32 last = min((first_packed + size - 1) / group_size, count - 1);
    base = mode == CAUSAL ? first : 0;
    context = min(span.context, params.capacity) + base;
    rows = count - base;
    tail = context / PAGE * PAGE;
    // One past the position of the first row and of the last. For a tree: lower and upper bounds of them.
    u32 low = context + first - base + 1, high = context + last - base + 1;
    end = min(mode == CAUSAL ? high : context + rows, params.capacity);
    slots_end = end;
    if (mode == TREE) {
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

  // Index of the query of packed row r in q and out, in units of D elements; NONE: there is no such row.
  DEVICE u32 query(u32 r) const {
    const u32 packed = first_packed + r, row = packed / group_size - base;
    if (row >= rows) return NONE;
    return (sequence * params.block + base + row) * params.heads + head * group_size + packed % group_size;
  }
};

// --- the core ---

// An index that is a constant in the body of `unrolled`, so that it may be part of an instruction's address.
template <int I>
struct Index {
  static constexpr int value = I;
};
// Calls body(Index<0>()) to body(Index<N - 1>()).
template <int N, int I = 0, class Body>
DEVICE void unrolled(Body body) {
  if constexpr (I < N) {
    body(Index<I>());
    unrolled<N, I + 1>(body);
  }
}

// The maximum of an empty set.
DEVICE float negative_infinity() { return __uint_as_float(0xff800000u); }

// 1 / sum; 0 for a row that saw no key, whose output becomes zeros.
DEVICE float reciprocal(float sum) { return sum == 0.0f ? 0.0f : __fdiv_rn(1.0f, sum); }

template <int D, int MT, MaskMode MODE>
struct Attention : RowTile {
  static constexpr u32 ROWS = 16 * MT;
  static constexpr u32 PITCH = D * 2;         // bytes of a query, key or value
  static constexpr u32 CHUNKS = D / 8;        // 16-byte chunks of a query, key or value
  static constexpr u32 TILE = PAGE * PITCH;   // bytes of the keys or values of one page
  static constexpr u32 SHARE = 4 / MT;        // warps that share 16 packed rows
  static constexpr int KEYS = MT;             // groups of 16 keys of a tile whose scores a warp computes
  static constexpr int NT = D / 8 / SHARE;    // n8 tiles in a warp's head dimensions
  // Floats of one split's partial result: outputs [ROWS][D], maxima [ROWS], sums [ROWS].
  static constexpr u32 PARTIAL = ROWS * (D + 2);

  // Offsets in dynamic shared memory; `shared_bytes` and `tree_bytes` in src/gpu/kernels/attention.rs compute
  // the size. Probabilities and maxima exist only if warps share rows.
  static constexpr u32 QUERIES_AT = 0;                            // [ROWS][D] bf16, chunk c of row r at c ^ (r & 7)
  static constexpr u32 KEYS_AT = ROWS * PITCH;                    // [2][PAGE][D] bf16, chunks permuted alike
  static constexpr u32 VALUES_AT = KEYS_AT + 2 * TILE;            // [2][PAGE][D] bf16, chunks permuted alike
  static constexpr u32 PROBS_AT = VALUES_AT + 2 * TILE;           // [ROWS][PAGE] bf16, chunks permuted alike
  static constexpr u32 PROBS = SHARE > 1 ? ROWS * PAGE * 2 : 0;
  static constexpr u32 MAXIMA_AT = PROBS_AT + PROBS;              // [SHARE][ROWS] f32
  static constexpr u32 ROW_INFO_AT = MAXIMA_AT + (SHARE > 1 ? SHARE * ROWS * 4 : 0);  // [ROWS] uint4, `make_row_info`
  static constexpr u32 NONFINITE_AT = ROW_INFO_AT + ROWS * 16;    // u8 [PAGE][CHUNKS], TREE [2][PAGE][CHUNKS]: 1 if
                                                                  // the chunk held a NaN or infinity
  static constexpr u32 PATH_SLOTS_AT = NONFINITE_AT + 2 * PAGE * CHUNKS;  // TREE only: u8 [ROWS][64],
                                                                          // from `build_path_slots`

  u32 shared = shared_address(dynamic_shared);
  unsigned char* values = dynamic_shared + VALUES_AT;
  uint4* row_info = reinterpret_cast<uint4*>(dynamic_shared + ROW_INFO_AT);
  u8* nonfinite = dynamic_shared + NONFINITE_AT;
  u8* path_slots = dynamic_shared + PATH_SLOTS_AT;

  // Lane (g, t) of a warp holds packed rows row + g and row + g + 8.
  const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const u32 row = threadIdx.x / 32 / SHARE * 16, part = threadIdx.x / 32 % SHARE;

  // Outputs and row sums as mma accumulators, row maxima. All columns of the sums are equal.
  float o[NT][4], l[4], m[2];

  using RowTile::RowTile;

  // Mask and location of packed row r. CAUSAL, FULL: bit i of (x low, y high) is set if it sees position
  // context + i; below `context` it sees positions from z on. TREE: it sees positions z..context + x, and y
  // is the index of its row in the row tile (NONE: there is no such row). w: `query`.
  DEVICE uint4 make_row_info(u32 r) const {
    const u32 row = (first_packed + r) / group_size - base;
    if (row >= rows) return make_uint4(0, MODE == TREE ? NONE : 0, 0, NONE);
    const u32 length = MODE == TREE ? u32(__popcll(ancestor_mask(row))) : row + 1;  // position + 1 - context
    const u32 start = window_start(context + length, params.window);
    if (MODE == TREE) return make_uint4(length, row - first_packed / group_size, start, query(r));
    u64 mask = low_bits(MODE == CAUSAL ? length : rows);
    if (params.window) {
      if (start > context) mask &= ~low_bits(start - context);
      if (MODE == FULL) mask &= low_bits(min(row, 64u) + min(params.window, 64u));
    }
    return make_uint4(u32(mask), u32(mask >> 32), start, query(r));
  }

  // Whether the packed row with `info` sees the key at `position`.
  DEVICE bool visible(const uint4& info, u32 position) const {
    if (MODE == TREE) return position >= info.z && position < context + info.x;
    const u64 mask = info.x | u64(info.y) << 32;
    return position < context ? position >= info.z
                              : position - context < 64 && (mask >> (position - context) & 1);
  }

  // Starts the copy of the keys or values of slots slot..slot + PAGE. Slots that no row sees become zeros.
  DEVICE void copy_page(u32 to,            // [PAGE][D] bf16, shared address
                        const u16* cache,  // params.k or params.v
                        u32 page, u32 slot) const {
    constexpr int COPIES = PAGE * CHUNKS / ATTENTION_THREADS, STEP = ATTENTION_THREADS * 16;
    const bool valid = page < params.pages;
    const u16* source = cache + (size_t(valid ? page : 0) * params.kv_heads + head) * (PAGE * D) + threadIdx.x * 8;
    to += threadIdx.x * 16;
    if (valid && slot >= from && slot + PAGE <= slots_end) {
      unrolled<COPIES>([&](auto n) { cp_async16<n.value * STEP>(to, source, 16); });
    } else {
      const u32 first = slot + threadIdx.x / CHUNKS;
      unrolled<COPIES>([&](auto n) {
        const u32 s = first + n.value * (ATTENTION_THREADS / CHUNKS);
        cp_async16<n.value * STEP>(to, source, valid && s >= from && s < slots_end ? 16 : 0);
      });
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

  // Whether the value of key `key` was flagged by zero_nonfinite.
  DEVICE bool is_nonfinite(u32 key) const {
    if (CHUNKS == 8) return as<u64>(nonfinite + key * CHUNKS);
    uint4 any = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (u32 i = 0; i < CHUNKS; i += 16) {
      const uint4 flags = as<uint4>(nonfinite + key * CHUNKS + i);
      any = make_uint4(any.x | flags.x, any.y | flags.y, any.z | flags.z, any.w | flags.w);
    }
    return any.x | any.y | any.z | any.w;
  }

  // Offset of chunk c of row r in a matrix with permuted chunks and rows of `pitch` bytes.
  DEVICE static u32 chunk(u32 r, u32 pitch, u32 c) { return r * pitch + ((c ^ (r & 7)) << 4); }

  // Products of 16 x 16 elements of A, in registers as ldmatrix4 loads them, and two n8 tiles of B.
  DEVICE static void multiply(float (&low)[4], float (&high)[4], const u32 (&a)[4], const u32 (&b)[4]) {
    mma_bf16(low, a[0], a[1], a[2], a[3], b[0], b[1]);
    mma_bf16(high, a[0], a[1], a[2], a[3], b[2], b[3]);
  }

  // The address of a lane's chunk `c`, counted from chunk 2k, of row r = lane mod 8 in a matrix with permuted chunks:
  // chunk(r, pitch, 2k + c), in which only the last term depends on k.
  DEVICE u32 chunk_at(u32 r, u32 pitch, u32 c, u32 k) const { return r * pitch + (((c ^ (lane & 7)) << 4) ^ (k * 32)); }

  // Adds the probabilities of 16 keys to the row sums: those that P V multiplies, rounded to bf16, so that the
  // normalised probabilities of a row add up to 1.
  DEVICE void add_sums(const u32 (&probs)[4]) {
    constexpr u32 ONES = 0x3f803f80;
    mma_bf16(l, probs[0], probs[1], probs[2], probs[3], ONES, ONES);
  }

  // Loads queries row..row + 16, elements 16k..16k + 16, or their probabilities for keys 16k..16k + 16 of the tile.
  DEVICE void load_queries(u32 (&a)[4], u32 k) const {
    ldmatrix4(a, shared + QUERIES_AT + chunk_at(row + lane % 16, PITCH, lane / 16, k));
  }
  DEVICE void load_probs(u32 (&a)[4], u32 k) const {
    ldmatrix4(a, shared + PROBS_AT + chunk_at(row + lane % 16, PAGE * 2, lane / 16, k));
  }

  // --- the tail of a tree: the key tile of `context` and the next one ---
  //
  // In the tail the slot of a position differs from row to row; it is never lower than the slot in a chain.
  // Both halves of the keys and values together hold all slots of the tail. The products are the same as for
  // a chain, but computed for one row of the pass at a time, with the keys of its path and only for its
  // heads. ldmatrix takes an address per key, so the keys need not be contiguous, at the price of some bank
  // conflicts.

  // Fills `path_slots`: entry [i][k] is the slot, counted from `tail`, of the k-th key from `context` on of
  // the row tile's i-th row. If the row has no k-th key, it is the slot that a chain would use.
  DEVICE void build_path_slots() const {
    const u32 first = first_packed / group_size;
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

  // Calls body(i, owned) for each row i of the row tile that has packed rows among the warp's 16 and sees
  // positions from `position` on; owned[h]: this lane's packed row 8h + g belongs to row i. If the 16 keys are
  // the same for all rows (all below `context`), calls body once with owned = true.
  template <class Body>
  DEVICE void for_each_path(u32 position, Body body) const {
    const bool same = position + 16 <= context;
    const u32 first = first_packed / group_size;
    const u32 row_of_lane[2] = {row_info[row + g].y, row_info[row + g + 8].y};
    // NONE, of packed rows that do not exist, is larger than any row.
    const u32 begin = same ? 0 : row_info[row].y;
    const u32 stop = same ? 1 : min(row_info[row + 15].y, rows - first - 1) + 1;
#pragma unroll 1
    for (u32 i = begin; i < stop; i++) {
      const u32 packed_row = max((first + i) * group_size, first_packed + row) - first_packed;
      if (!same && position >= context + row_info[packed_row].x) continue;
      const bool owned[2] = {same || row_of_lane[0] == i, same || row_of_lane[1] == i};
      body(i, owned);
    }
  }

  // Scores of the warp's keys from `position` on. `flip`: 64 if the tail's first page is in the second half of
  // the keys.
  DEVICE void tail_scores(float (&s)[KEYS][2][4], u32 position, u32 flip) const {
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      for_each_path(position + i * 16, [&](u32 path, const bool (&owned)[2]) {
        const u32 key = tail_slot(path, position + i * 16 + lane / 16 * 8 + lane % 8) ^ flip;
        float x[2][4] = {};
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
          u32 a[4], b[4];
          ldmatrix4(b, shared + KEYS_AT + chunk(key, PITCH, k * 2 + lane / 8 % 2));
          load_queries(a, k);
          multiply(x[0], x[1], a, b);
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
  DEVICE void tail_values(const u32 (&probs)[KEYS][4], u32 position, u32 flip) {
#pragma unroll
    for (int k = 0; k < PAGE / 16; k++) {
      u32 a[4] = {probs[k % KEYS][0], probs[k % KEYS][1], probs[k % KEYS][2], probs[k % KEYS][3]};
      if (SHARE > 1) load_probs(a, k);
      for_each_path(position + k * 16, [&](u32 path, const bool (&owned)[2]) {
        const u32 key = tail_slot(path, position + k * 16 + lane % 16) ^ flip;
        const u32 p[4] = {owned[0] ? a[0] : 0, owned[1] ? a[1] : 0, owned[0] ? a[2] : 0, owned[1] ? a[3] : 0};
#pragma unroll
        for (int n = 0; n < NT; n += 2) {
          u32 b[4];
          ldmatrix4_trans(b, shared + VALUES_AT + chunk(key, PITCH, part * NT + n + lane / 16));
          multiply(o[n], o[n + 1], p, b);
        }
        add_sums(p);
      });
    }
  }

  // Bit e: for packed row r, the value at the e-th of this lane's four score positions is flagged. bad_slots:
  // bit mask of the flagged slots, counted from `tail`.
  DEVICE u32 tail_nonfinite(u32 r, u32 position, const u64 (&bad_slots)[2]) const {
    const u32 row = row_info[r].y;
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
    float* maxima = reinterpret_cast<float*>(dynamic_shared + MAXIMA_AT);
    const bool reaches_tail = MODE == TREE && stop > tail;
    const u32* table = params.page_table + size_t(sequence) * params.pages_per_sequence + begin / PAGE;
    const u32 pages = ((reaches_tail ? slots_end : stop) - begin + PAGE - 1) / PAGE;
    const u32 flip = (tail - begin) & PAGE;
    // Whether this range has page i of the tail: a split may begin at its second page, or end with its first.
    const auto has_page = [&](u32 i) { return tail + i * PAGE >= begin && tail + i * PAGE < slots_end; };

    const u32 first_page = table[0];
    u32 next_page = pages > 1 ? table[1] : NONE;
    copy_page(shared + KEYS_AT, params.k, first_page, begin);
    if (threadIdx.x < ROWS) row_info[threadIdx.x] = make_row_info(threadIdx.x);
    __syncthreads();
    // The rows of a thread differ by multiples of 4 or more. Those that differ by a multiple of 8 have their chunks
    // permuted alike; 4 flips a bit of the permutation.
    const u32 r = threadIdx.x / CHUNKS, c = threadIdx.x % CHUNKS;
    const u32 to = shared + QUERIES_AT + chunk(r, PITCH, c);
#pragma unroll
    for (u32 n = 0; n < ROWS; n += ATTENTION_THREADS / CHUNKS) {
      const u32 query = row_info[r + n].w;
      const u16* from_query = params.q + size_t(query == NONE ? 0 : query) * D + c * 8;
      cp_async16<0>((to ^ (n & 4) << 4) + n * PITCH, from_query, query == NONE ? 0 : 16);
    }
    cp_async_commit();
    copy_page(shared + VALUES_AT, params.v, first_page, begin);
    cp_async_commit();
    if (pages > 1) copy_page(shared + KEYS_AT + TILE, params.k, next_page, begin + PAGE);
    cp_async_commit();
    if (pages > 1) copy_page(shared + VALUES_AT + TILE, params.v, next_page, begin + PAGE);
    cp_async_commit();
    next_page = pages > 2 ? table[2] : NONE;
    if (reaches_tail) build_path_slots();

    m[0] = m[1] = negative_infinity();
    l[0] = l[1] = l[2] = l[3] = 0.0f;
#pragma unroll
    for (int n = 0; n < NT; n++) o[n][0] = o[n][1] = o[n][2] = o[n][3] = 0.0f;

    cp_async_wait<3>();
    for (u32 position = begin; position < stop; position += PAGE) {
      // This tile's keys have arrived, and all warps have finished with the previous tile.
      __syncthreads();
      const u32 tile = (position - begin) / PAGE, half = tile % 2 * TILE;
      if (tile) {
        const bool has_next = tile + 1 < pages;
        if (has_next) copy_page(shared + KEYS_AT + (TILE - half), params.k, next_page, position + PAGE);
        cp_async_commit();
        if (has_next) copy_page(shared + VALUES_AT + (TILE - half), params.v, next_page, position + PAGE);
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

      const u32 first_key = part * KEYS * 16;  // the warp's first key, counted from `position`
      float s[KEYS][2][4];                     // scores, later their exponentials
#pragma unroll
      for (int i = 0; i < KEYS; i++) {
#pragma unroll
        for (int j = 0; j < 2; j++) s[i][j][0] = s[i][j][1] = s[i][j][2] = s[i][j][3] = 0.0f;
      }
      if (in_tail) {
        tail_scores(s, position + first_key, flip);
      } else {
        const u32 from_key = shared + KEYS_AT + half;
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
          u32 a[4];
          load_queries(a, k);
          const u32 at = from_key + chunk_at(first_key + lane / 16 * 8 + lane % 8, PITCH, lane / 8 % 2, k);
          unrolled<KEYS>([&](auto i) {
            u32 b[4];
            ldmatrix4<i.value * 16 * PITCH>(b, at);
            multiply(s[i.value][0], s[i.value][1], a, b);
          });
        }
      }

      // False if every row sees every key of the tile.
      const bool needs_mask = position < full_from || position + PAGE > context;
      u32 masked = 0;  // bit 8i + 4h + 2j + x: the row does not see the key of s[i][j][2h + x]
      if (needs_mask) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const uint4 info = row_info[row + h * 8 + g];
#pragma unroll
          for (int e = 0; e < 4 * KEYS; e++) {
            const u32 key = position + first_key + e / 2 * 8 + t * 2 + e % 2;
            if (visible(info, key)) continue;
            masked |= 1u << (e / 4 * 8 + h * 4 + e % 4);
            s[e / 4][e % 4 / 2][h * 2 + e % 2] = negative_infinity();
          }
        }
      }
      float row_max[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        row_max[h] = negative_infinity();
#pragma unroll
        for (int e = 0; e < 4 * KEYS; e++) row_max[h] = fmaxf(row_max[h], s[e / 4][e % 4 / 2][h * 2 + e % 2]);
        row_max[h] = fmaxf(row_max[h], __shfl_xor_sync(~0u, row_max[h], 2));
        row_max[h] = fmaxf(row_max[h], __shfl_xor_sync(~0u, row_max[h], 1));
        if (SHARE > 1 && t == 0) maxima[part * ROWS + row + h * 8 + g] = row_max[h];
      }
      const bool checks_values = needs_mask && !in_tail;
      if (checks_values) {
        cp_async_wait<2>();
        zero_nonfinite(values + half, nonfinite);
      }
      if (SHARE > 1 || checks_values) __syncthreads();

      if (needs_mask) {
        u64 bad_slots[2] = {0, 0};  // TREE: flagged slots of the tail
        u32 flagged = 0;            // bit 4i + 2j + x: the value of the key of s[i][j][2h + x] is flagged
        if (in_tail) {
#pragma unroll
          for (u32 i = 0; i < 2; i++) {
            if (!has_page(i)) continue;
            const u64 low = __ballot_sync(~0u, is_nonfinite(i * 64 + lane));
            bad_slots[i] = low | u64(__ballot_sync(~0u, is_nonfinite(i * 64 + 32 + lane))) << 32;
          }
        } else {
#pragma unroll
          for (int e = 0; e < 4 * KEYS; e++) {
            flagged |= u32(is_nonfinite(first_key + e / 2 * 8 + t * 2 + e % 2)) << e;
          }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
          for (int i = 0; i < KEYS; i++) {
            u32 bits = flagged >> (i * 4);
            if (in_tail) bits = tail_nonfinite(row + h * 8 + g, position + first_key + i * 16, bad_slots);
            bits &= ~(masked >> (i * 8 + h * 4));
#pragma unroll
            for (int e = 0; e < 4; e++) {
              if (bits >> e & 1) s[i][e / 2][h * 2 + e % 2] = __uint_as_float(0x7fffffffu);
            }
          }
        }
      }

      u32 probs[KEYS][4];  // the unnormalised probabilities as A operands
      float rescale[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const u32 r = row + h * 8 + g;
        if (SHARE > 1) {
#pragma unroll
          for (u32 y = 0; y < SHARE; y++) row_max[h] = fmaxf(row_max[h], maxima[y * ROWS + r]);
        }
        const float new_max = fmaxf(m[h], __fmul_rn(row_max[h], params.factor));
        const float shift = new_max == negative_infinity() ? 0.0f : new_max;  // avoids -inf - -inf = NaN
        rescale[h] = ex2(__fsub_rn(m[h], shift));
        m[h] = new_max;
#pragma unroll
        for (int i = 0; i < KEYS; i++) {
#pragma unroll
          for (int j = 0; j < 2; j++) {
            const float low = ex2(__fmaf_rn(s[i][j][h * 2], params.factor, -shift));
            const float high = ex2(__fmaf_rn(s[i][j][h * 2 + 1], params.factor, -shift));
            const u32 pair = probs[i][j * 2 + h] = pack2(low, high);
            if (SHARE > 1) {
              const u32 at = PROBS_AT + chunk(r, PAGE * 2, (part * KEYS + i) * 2 + j);
              as<u32>(dynamic_shared + at + t * 4) = pair;
            }
          }
        }
      }
      cp_async_wait<2>();
      __syncthreads();

      if (tile) {
#pragma unroll
        for (int e = 0; e < 4; e++) l[e] = __fmul_rn(l[e], rescale[e / 2]);
#pragma unroll
        for (int n = 0; n < NT; n++) {
#pragma unroll
          for (int e = 0; e < 4; e++) o[n][e] = __fmul_rn(o[n][e], rescale[e / 2]);
        }
      }
      if (in_tail) {
        tail_values(probs, position, flip);
      } else {
        const u32 from_value = shared + VALUES_AT + half;
        unrolled<PAGE / 16>([&](auto k) {
          u32 a[4] = {probs[k.value % KEYS][0], probs[k.value % KEYS][1], probs[k.value % KEYS][2],
                      probs[k.value % KEYS][3]};
          if (SHARE > 1) load_probs(a, k.value);
#pragma unroll
          for (int n = 0; n < NT; n += 2) {
            u32 b[4];
            const u32 at = from_value + chunk_at(lane % 16, PITCH, part * NT + lane / 16, n / 2);
            ldmatrix4_trans<k.value * 16 * PITCH>(b, at);
            multiply(o[n], o[n + 1], a, b);
          }
          add_sums(a);
        });
      }
      cp_async_wait<1>();
    }
  }

  // Calls store(h, r, query, d, o[r][d], o[r][d + 1]) for each pair of outputs that this thread holds; skips
  // packed rows that do not exist.
  template <class Store>
  DEVICE void for_each_output(Store store) const {
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const u32 r = row + h * 8 + g, query = row_info[r].w;
      if (query == NONE) continue;
#pragma unroll
      for (int n = 0; n < NT; n++) {
        store(h, r, query, part * (D / SHARE) + n * 8 + t * 2, o[n][h * 2], o[n][h * 2 + 1]);
      }
    }
  }

  // Stores the normalised output when one block has attended to all keys. Adding zero turns -0 into +0, as in
  // `merge_splits`, whose sums start from zero.
  DEVICE void store_output() const {
    for_each_output([&](int h, u32, u32 query, u32 d, float x, float y) {
      const float scale = reciprocal(l[h * 2]);
      store_pair<D>(params, query, d, __fmul_rn(__fadd_rn(x, 0.0f), scale), __fmul_rn(__fadd_rn(y, 0.0f), scale));
    });
  }

  // Stores this split's unnormalised result.
  DEVICE void store_partial(float* partial) const {  // [PARTIAL]
    for_each_output([&](int h, u32 r, u32, u32 d, float x, float y) {
      as<float2>(partial + r * D + d) = make_float2(x, y);
      if (d == 0) {
        partial[ROWS * D + r] = m[h];
        partial[ROWS * D + ROWS + r] = l[h * 2];
      }
    });
  }
};

// --- the kernels of a split, and of the merge ---

// Row tiles of `size` packed rows in a sequence.
DEVICE u32 row_tiles(const AttentionParams& params, u32 size) {
  return (params.block * (params.heads / params.kv_heads) + size - 1) / size;
}

// Body of the split kernels: blockIdx.x is the KV head, blockIdx.y the sequence and row tile. Block z of these
// takes the z-th of the splits that its rows see. The grid is sized for the capacity, and z varies slowest, so
// the blocks with work start before all empty ones. If the keys of a row tile span several splits, each block
// stores a partial result.
template <int D, int MT, MaskMode MODE>
DEVICE void attend(const AttentionParams& params,
                   float* partials) {  // [sequences * row tiles][kv_heads][splits][PARTIAL]
  grid_launch();
  grid_wait();
  typedef Attention<D, MT, MODE> A;
  const u32 tiles = row_tiles(params, A::ROWS);
  A a(params, blockIdx.y / tiles, blockIdx.x);
  if (!a.init(MODE, blockIdx.y % tiles, A::ROWS)) return;
  const u32 first = split_of(a.from), last = split_of(a.end - 1), split = first + blockIdx.z;
  if (split > last) return;
  a.attend_range(max(split_start(split), a.from / PAGE * PAGE), min(split_start(split + 1), a.end));
  if (first == last) return a.store_output();
  const size_t of_tile = size_t(blockIdx.y * gridDim.x + blockIdx.x) * gridDim.z;
  a.store_partial(partials + (of_tile + split) * A::PARTIAL);
}

// Body of the merge kernels, which follow a split kernel: merges the partial results of each row in ascending
// order of its splits, and stores the normalised output. Rows of row tiles with a single split have theirs
// already. blockIdx.x and blockIdx.y as in `attend`; warp w of block z has packed row 4z + w of the row tile.
//
// A kernel of its own, because one block would take longer to read the partials than all blocks take to
// compute them: 64 rows in 9 splits are 300 KB for each KV head, 2.6 us at 64 bytes per clock.
//
// A partial in which the row saw no key has factor 0 and zeros; a single partial has factor 1. Both are exact.
template <int D, MaskMode MODE>
DEVICE void merge_splits(const AttentionParams& params,
                         const float* partials,    // as in `attend`
                         u32 size,                 // packed rows of a row tile
                         u32 splits) {             // of a row tile in `partials`
  constexpr u32 VEC = D / 32;  // outputs of a lane: pairs at 2 lane, 64 + 2 lane, ...
  constexpr u32 FLIGHT = 8;    // splits whose loads are in flight
  grid_launch();
  grid_wait();
  const u32 tiles = row_tiles(params, size), lane = threadIdx.x % 32, r = blockIdx.z * 4 + threadIdx.x / 32;
  RowTile tile(params, blockIdx.y / tiles, blockIdx.x);
  if (!tile.init(MODE, blockIdx.y % tiles, size)) return;
  const u32 first_split = split_of(tile.from), count = split_of(tile.end - 1) - first_split + 1;
  const u32 query = tile.query(r);
  if (count == 1 || query == NONE) return;
  const u32 step = size * (D + 2);
  partials += (size_t(blockIdx.y * gridDim.x + blockIdx.x) * splits + first_split) * step;
  const float* maxima = partials + size * D + r;
  const float* values = partials + r * D + lane * 2;

  float x[FLIGHT][VEC];  // outputs of the next splits
  const auto load = [&](u32 first) {
#pragma unroll
    for (u32 i = 0; i < FLIGHT; i++) {
      if (first + i >= count) break;
#pragma unroll
      for (u32 v = 0; v < VEC; v += 2) {
        const float2 pair = as<float2>(values + size_t(first + i) * step + v * 32);
        x[i][v] = pair.x, x[i][v + 1] = pair.y;
      }
    }
  };
  load(0);
  float row_max = negative_infinity();
  for (u32 i = lane; i < count; i += 32) row_max = fmaxf(row_max, maxima[size_t(i) * step]);
#pragma unroll
  for (u32 flip = 16; flip; flip /= 2) row_max = fmaxf(row_max, __shfl_xor_sync(~0u, row_max, flip));
  const float shift = row_max == negative_infinity() ? 0.0f : row_max;
  float sum = 0.0f, out[VEC] = {}, factor = 0.0f, part_sum = 0.0f;
  for (u32 first = 0; first < count; first += FLIGHT) {
    if (first) load(first);
    if (first % 32 == 0 && first + lane < count) {  // of split first + lane
      factor = ex2(__fsub_rn(maxima[size_t(first + lane) * step], shift));
      part_sum = maxima[size_t(first + lane) * step + size];
    }
#pragma unroll
    for (u32 i = 0; i < FLIGHT; i++) {
      if (first + i >= count) break;
      const float of_split = __shfl_sync(~0u, factor, first % 32 + i);
      sum = __fmaf_rn(of_split, __shfl_sync(~0u, part_sum, first % 32 + i), sum);
#pragma unroll
      for (u32 v = 0; v < VEC; v++) out[v] = __fmaf_rn(of_split, x[i][v], out[v]);
    }
  }
  const float scale = reciprocal(sum);
#pragma unroll
  for (u32 v = 0; v < VEC; v += 2) {
    store_pair<D>(params, query, lane * 2 + v * 32, __fmul_rn(out[v], scale), __fmul_rn(out[v + 1], scale));
  }
}
