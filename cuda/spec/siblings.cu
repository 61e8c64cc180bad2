// Trees of a fixed shape whose siblings are drawn without replacement, and the verdict on them: `sample_tree` and `recursive`
// of src/spec/verify.rs with distinct siblings, decision for decision.
//
// Computes: sample_siblings: the tokens of each sequence's tree, a row's children from the distribution of their depth, each without
//           those before it; a child for which no token is left repeats the one before. verify_tree: from the anchor down,
//           which child of a row stands, and the token after the last one, of the distribution that is left. Only sequences of the
//           rule `rejection` that draw a tree, of two rows or more, take part.
// Work:     512 threads. sample_siblings: grid (wide, sequences), the children of one row each. verify_tree: grid (sequences).
//           Distributions between siblings are not stored: a few words per sibling say how each follows from the one before, and an
//           element goes through all of them where it is asked for.
// Order:    ids ascend where a token is picked; all sums are of integers.
// Bytes:    sample_siblings: per row with n children, one row of logits 2 n times. verify_tree: per row of the walk with n
//           children looked at, two rows of logits up to 2 n times.
// Needs:    vocab up to 2^26; block and wide 1 to 64; distributions, logits, tables 16-byte aligned.
#include "spec/distribution.cuh"

namespace {

constexpr u32 SCALES = 4, MARKS = 5;

// How the distributions after a sibling follow from those before it. The drafter's q loses the token that was drawn, and what is left
// is scaled up to 2^48; the target's p becomes max(p - q, 0), scaled likewise. Words of step s are at s, MOST_ROWS + s, ...
struct Steps {
  u64* scales;  // [SCALES][MOST_ROWS]: q's inverse and what its rounding_token gets, p's
  u32* marks;   // [MARKS][MOST_ROWS]: the token, q's shift and rounding_token, p's
};
WRAPPER u64 scaled(u64 w, u32 up, u64 inverse) { return __umul64hi(w << (up & 63), inverse); }

struct Both {
  u64 p, q;
};
WRAPPER u64 beyond(Both w) { return beyond(w.p, w.q); }

// A token's q after `count` steps.
WRAPPER u64 after(const Steps& steps, u32 count, u64 q, u32 id) {
#pragma unroll 1
  for (u32 s = 0; s < count; s++) {
    const u32* marks = steps.marks + s;
    if (id == lds(marks)) return 0;
    q = scaled(q, lds(marks + MOST_ROWS), lds(steps.scales + s)) +
        (id == lds(marks + 2 * MOST_ROWS) ? lds(steps.scales + MOST_ROWS + s) : 0);
  }
  return q;
}

// A token's p and q after `count` steps.
WRAPPER Both after(const Steps& steps, u32 count, Both w, u32 id) {
#pragma unroll 1
  for (u32 s = 0; s < count; s++) {
    const u32* marks = steps.marks + s;
    const u64* scales = steps.scales + s;
    w.p = scaled(beyond(w), lds(marks + 3 * MOST_ROWS), lds(scales + 2 * MOST_ROWS)) +
          (id == lds(marks + 4 * MOST_ROWS) ? lds(scales + 3 * MOST_ROWS) : 0);
    w.q = id == lds(marks) ? 0
                           : scaled(w.q, lds(marks + MOST_ROWS), lds(scales)) +
                                 (id == lds(marks + 2 * MOST_ROWS) ? lds(scales + MOST_ROWS) : 0);
  }
  return w;
}

// The heaviest token that a thread or a block has seen, of several the lowest.
struct Heaviest {
  u64 w;
  u32 id;
};
WRAPPER Heaviest heavier(Heaviest a, Heaviest b) { return b.w > a.w || (b.w == a.w && b.id < a.id) ? b : a; }

// Of the block; every thread has it. `words` and `ids` may be written again as `block_sum`'s.
WRAPPER u32 block_rounding_token(Heaviest own, u64* words, u32* ids) {
  for (int flip = 16; flip; flip /= 2) {
    own = heavier(own, {__shfl_xor_sync(~0u, own.w, flip), __shfl_xor_sync(~0u, own.id, flip)});
  }
  if (threadIdx.x % 32 == 0) sts(words + threadIdx.x / 32, own.w), sts(ids + threadIdx.x / 32, own.id);
  __syncthreads();
  for (u32 w = 0; w < WARPS; w++) own = heavier(own, {lds(words + w), lds(ids + w)});
  return own.id;
}

// What turns weights of that sum, at least 1, into probabilities.
WRAPPER void scale_of(u64 sum, u32& up, u64& inverse) {
  up = u32(__clzll((long long)(sum)));
  inverse = inverse_of(sum << up);
}

// What two kernels need of the drafter's distribution of a depth.
struct Depth {
  RowDistribution distribution;
  const float* logits;
  const u32* table;
  u32 vocab;
};
// 0 for what is no token.
WRAPPER u64 drawn_at(const Depth& d, const Steps& steps, u32 count, u32 id) {
  return id < d.vocab ? after(steps, count, probability(d.distribution, d.table, ld(d.logits + id), id), id) : 0;
}

// Where reductions over the block meet.
struct Meeting {
  u64 *words, *rounding_weights;  // [WARPS] each
  u32* ids;            // [WARPS]
};

// q's part of step `count`: the distribution without a token. False where no other is left. All threads have passed a barrier before
// and after.
WRAPPER bool lose(const Depth& d, const Steps& steps, u32 count, u32 token, const Meeting& meeting) {
  const u64 rest = ONE - drawn_at(d, steps, count, token);
  if (rest == 0) return false;
  u32 up;
  u64 inverse, sum = 0;
  scale_of(rest, up, inverse);
  Heaviest heaviest = {0, NONE};
#pragma unroll 1
  for (u32 group = threadIdx.x; group < (d.vocab + 3) / 4; group += THREADS) {
    const float4 v = load4(d.logits, d.vocab, group);
    const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      const u32 id = group * 4 + i;
      if (id >= d.vocab || id == token) continue;
      const u64 w = after(steps, count, probability(d.distribution, d.table, four[i], id), id);
      sum += scaled(w, up, inverse);
      heaviest = heavier(heaviest, {w, id});
    }
  }
  sum = block_sum(sum, meeting.words);
  const u32 rounding_token = block_rounding_token(heaviest, meeting.rounding_weights, meeting.ids);
  if (threadIdx.x == 0) {
    sts(steps.marks + count, token), sts(steps.marks + MOST_ROWS + count, up);
    sts(steps.marks + 2 * MOST_ROWS + count, rounding_token);
    sts(steps.scales + count, inverse), sts(steps.scales + MOST_ROWS + count, ONE - sum);
  }
  __syncthreads();
  return true;
}

// How many rows are before a row on its path; NONE where a row follows no earlier one.
WRAPPER u32 depth_of(const u32* parents, u32 row) {
  u32 depth = 0;
#pragma unroll 1
  for (; row; depth++) {
    const u32 parent = ld(parents + row);
    if (parent >= row) return NONE;
    row = parent;
  }
  return depth;
}

// The next row after `child`, below `rows`, that follows `row`; `rows` if none does.
WRAPPER u32 next_child(const u32* parents, u32 row, u32 child, u32 rows) {
#pragma unroll 1
  for (child++; child < rows && ld(parents + child) != row; child++) {}
  return child;
}

}  // namespace

KERNEL(512, 1, sample_siblings,
       (u32* tokens,                // [sequences][wide]: anchor, drafts; NONE: padding, or a damaged draft
        const RowDistribution* distributions,            // [sequences][block]: row d's is that of depth d
        const float* logits,        // [sequences][block][vocab]
        const u32* parents,         // [sequences][wide]: the row a row follows, an earlier one; the anchor's is not looked at
        const Span* spans,          // [sequences]: how many rows the tree has
        const Sequence* sequences,  // [sequences]
        const u32* tables, u32 vocab, u32 block, u32 wide)) {
  SHARED(u32, table, 512);
  SHARED(u64, words, WARPS);
  SHARED(u64, rounding_weights, WARPS);
  SHARED(u32, ids, WARPS);
  SHARED(u64, scales, 2 * MOST_ROWS);
  SHARED(u32, marks, 3 * MOST_ROWS);
  grid_launch();
  load_tables(table, tables);
  grid_wait();
  __syncthreads();
  const u32 row = blockIdx.x, own = blockIdx.y;
  const size_t first = size_t(own) * wide;
  const Sequence* s = sequences + own;
  const u32 rows = min(ld(&spans[own].rows), wide);
  if (ld(&s->rule) != REJECTION || form_of(ld(&s->now.shape)) != DRAWN || rows < 2) return;
  if (threadIdx.x == 0) {
    if (row == 0) st(tokens + first, ld(&s->now.anchor));
    if (row >= rows) st(tokens + first + row, NONE);
  }
  if (row >= rows) return;
  const u32 depth = depth_of(parents + first, row);
  u32 child = next_child(parents + first, row, row, rows);
  if (child == rows) return;

  const bool deep = depth >= block - 1;
  const size_t at = size_t(own) * block + (deep ? 0 : depth + 1);
  const Depth from = {ld_law(distributions + at), logits + at * vocab, table, vocab};
  const PhiloxStream dice = dice_of(s);
  const Steps steps = {scales, marks};
  const Meeting meeting = {words, rounding_weights, ids};
  u32 count = 0, token = NONE;
  bool left = !deep && from.distribution.rounding_token != NONE;
#pragma unroll 1
  for (bool begun = false; child < rows; child = next_child(parents + first, row, child, rows), begun = true) {
    if (begun && left) {
      __syncthreads();
      left = lose(from, steps, count, token, meeting);
      count += left;
    }
    if (left) {
      token = pick(vocab, bits(dice, DRAFT, depth + 1, child), words, [&](u32 group) {
        const float4 v = load4(from.logits, vocab, group);
        const float four[4] = {v.x, v.y, v.z, v.w};
        Four p;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          const u32 id = group * 4 + i;
          p.w[i] = id < vocab ? after(steps, count, probability(from.distribution, table, four[i], id), id) : 0;
        }
        return p;
      });
    }
    if (threadIdx.x == 0) st(tokens + first + child, token);
  }
}

KERNEL(512, 1, verify_tree,
       (u32* accepted,              // [sequences]; this and the next two are left as they are where a sequence takes no part
        u32* next,                  // [sequences]; NONE: damaged
        u32* path,                  // [sequences][wide]: 0, then the rows of the walk, then NONE
        const RowDistribution* targets,         // [sequences][wide]: after the drafts on the way to a row
        const float* target_logits, // [sequences][wide][vocab]
        const RowDistribution* drafters,        // [sequences][block]: row d's is what the rows of depth d were drawn from
        const float* draft_logits,  // [sequences][block][vocab]
        const u32* tokens,          // [sequences][wide]: anchor, drafts
        const u32* parents,         // [sequences][wide]: the row a row follows
        const Span* spans,          // [sequences]: how many rows the tree has
        const Sequence* sequences,  // [sequences]
        const u32* tables, u32 vocab, u32 block, u32 wide)) {
  SHARED(u32, table, 512);
  SHARED(u64, words, WARPS);
  SHARED(u64, rounding_weights, WARPS);
  SHARED(u32, ids, WARPS);
  SHARED(u64, scales, SCALES * MOST_ROWS);
  SHARED(u32, marks, MARKS * MOST_ROWS);
  grid_launch();
  load_tables(table, tables);
  grid_wait();
  __syncthreads();
  const u32 own = blockIdx.x;
  const size_t first = size_t(own) * wide;
  const Sequence* s = sequences + own;
  const u32 rows = min(ld(&spans[own].rows), wide);
  if (ld(&s->rule) != REJECTION || form_of(ld(&s->now.shape)) != DRAWN || rows < 2) return;
  const PhiloxStream dice = dice_of(s);
  const Steps steps = {scales, marks};
  const Meeting meeting = {words, rounding_weights, ids};

  u32 row = 0, depth = 0, token = NONE;
  if (threadIdx.x < wide) st(path + first + threadIdx.x, threadIdx.x ? NONE : 0);
  __syncthreads();
#pragma unroll 1
  for (bool stands = true; stands;) {
    stands = false;
    const RowDistribution p = ld_law(targets + first + row);
    u32 child = next_child(parents + first, row, row, rows);
    const bool drafted = child < rows, deep = depth >= block - 1;
    const size_t at = size_t(own) * block + (deep ? 0 : depth + 1);
    const Depth q = {ld_law(drafters + at), draft_logits + at * vocab, table, vocab};
    const float* target_from = target_logits + (first + row) * vocab;
    if (p.rounding_token == NONE || (drafted && (deep || q.distribution.rounding_token == NONE))) break;
    const auto both = [&](u32 count, float target, float draft, u32 id) {
      return after(steps, count, Both{probability(p, table, target, id), probability(q.distribution, table, draft, id)}, id);
    };
    // `fallen` has been judged after `count` steps; once `ahead`, q's part of the next step is there.
    u32 count = 0, fallen = NONE;
    bool ahead = false;
#pragma unroll 1
    for (; child < rows; child = next_child(parents + first, row, child, rows)) {
      if (fallen != NONE && !ahead) {
        __syncthreads();
        ahead = lose(q, steps, count, fallen, meeting);
        // No token is left to draw.
        if (!ahead) break;
      }
      const u32 draft = ld(tokens + first + child);
      // A token that this distribution cannot draw is no draft of it: a repeat, passed over.
      const u64 chance = drawn_at(q, steps, count + ahead, draft);
      if (chance == 0) continue;
      if (ahead) {
        // p's part: what is beyond q, then what it is scaled to.
        u32 up = 0;
        u64 inverse = 0, sum = 0;
#pragma unroll 1
        for (u32 again = 0; again < 2; again++) {
          sum = 0;
          Heaviest heaviest = {0, NONE};
#pragma unroll 1
          for (u32 group = threadIdx.x; group < (vocab + 3) / 4; group += THREADS) {
            const float4 a = load4(target_from, vocab, group), b = load4(q.logits, vocab, group);
            const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
              const u32 id = group * 4 + i;
              if (id >= vocab) continue;
              const u64 w = beyond(both(count, as[i], bs[i], id));
              sum += again ? scaled(w, up, inverse) : w;
              heaviest = heavier(heaviest, {w, id});
            }
          }
          __syncthreads();
          sum = block_sum(sum, words);
          const u32 rounding_token = block_rounding_token(heaviest, rounding_weights, ids);
          // Garbage may weigh nothing.
          if (!again) scale_of(max(sum, u64(1)), up, inverse);
          if (again && threadIdx.x == 0) sts(marks + 4 * MOST_ROWS + count, rounding_token);
        }
        if (threadIdx.x == 0) {
          sts(marks + 3 * MOST_ROWS + count, up);
          sts(scales + 2 * MOST_ROWS + count, inverse), sts(scales + 3 * MOST_ROWS + count, ONE - sum);
        }
        __syncthreads();
        count++;
        ahead = false;
      }
      const Both w = both(count, ld(target_from + draft), ld(q.logits + draft), draft);
      stands = accept(dice, depth + 1, child, w.p, chance);
      if (stands) break;
      fallen = draft;
    }
    if (stands) {
      row = child;
      depth++;
      if (threadIdx.x == 0 && depth < wide) st(path + first + depth, row);
      // The next row's steps are written only once all have gone through these.
      __syncthreads();
      continue;
    }
    const u64 chance = bits(dice, RESIDUAL, depth + 1, row);
    // Where nothing is beyond, both distributions are the same.
#pragma unroll 1
    for (u32 whole = fallen == NONE; whole < 2 && token == NONE; whole++) {
      token = pick(vocab, chance, words, [&](u32 group) {
        const float4 a = load4(target_from, vocab, group);
        const float4 b = whole && count == 0 ? a : load4(q.logits, vocab, group);
        const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
        Four left;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          const u32 id = group * 4 + i;
          const Both w = id < vocab ? both(count, as[i], bs[i], id) : Both{0, 0};
          left.w[i] = whole ? w.p : beyond(w);
        }
        return left;
      });
    }
  }
  if (threadIdx.x == 0) st(accepted + own, depth), st(next + own, token);
}
