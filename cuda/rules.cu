// Drafts drawn at random and judged by `rejection` and `block` of src/rules.rs, decision for decision. Probabilities are
// integers that add up to 2^48 in each row; all sums are of integers, so nothing depends on how the work is split.
//
// Computes: law: per row what turns a logit into a probability; heir NONE for a damaged row and for one without a
//           sequence. draw: per drafted row a token of its law. judge: per sequence which drafts stand and the token
//           after them, of the law that is left. Sequences of the rule `match` are none of draw's and judge's; nor, for
//           judge, are blocks without drafts, which all rules decode plainly.
// Work:     512 threads. law and draw: grid (rows). judge: grid (block, sequences): by blocks, each row's block sums
//           what the row's test needs, and the last of a sequence judges; else row 0's judges alone.
// Order:    ids ascend where a token is picked.
// Bytes:    law: best, and the row's logits twice; with cuts as `sample` besides. draw: the row's logits once. judge:
//           two rows of logits per sequence, by blocks two more per draft.
// Needs:    vocab up to 2^26, block 1 to 64; logits, best, laws, tables 16-byte aligned; counters zero, and left so.
#include "weights.cuh"
#include "state.cuh"

namespace {

constexpr u64 ONE = 1ull << 48;
constexpr u32 MOST_ROWS = 64;
// Purposes of Philox counters.
constexpr u32 DRAFT = 2, ACCEPT = 3, RESIDUAL = 4;

// A row's law: the weight W of a token that the filters leave is the probability W 2^up inverse / 2^64, rounded down;
// what is left over is the heir's. Mirrored by src/kernels/rules.rs.
struct __align__(16) Law {
  float max, c;
  u32 min_p, up;
  Rank limit;   // the last token that the cuts keep
  u32 heir;     // the best token; NONE: there is no law
  u64 inverse, left;
};
static_assert(sizeof(Law) == 48, "src/kernels/rules.rs counts on it");

// Where a round's chances come from.
struct Dice {
  u32 key[2], stream, round, anchor;
};
WRAPPER Dice dice_of(const Sequence* s) {
  return {{ld(s->seed), ld(s->seed + 1)}, ld(&s->stream), ld(&s->rounds) + 1, ld(&s->now.length)};
}
WRAPPER u64 bits(const Dice& d, u32 purpose, u32 depth, u32 row) {
  const uint4 drawn = philox(make_uint4(d.anchor + depth, purpose << 24 | row, d.stream, d.round), d.key[0], d.key[1]);
  return u64(drawn.x) << 32 | drawn.y;
}
WRAPPER bool accept(const Dice& d, u32 depth, u32 row, u64 s, u64 n) {
  return s >= n || __umul64hi(bits(d, ACCEPT, depth, row), n) < s;
}

WRAPPER Law ld_law(const Law* from) {
  const uint4 a = ld128(from), b = ld128(reinterpret_cast<const uint4*>(from) + 1);
  const uint4 c = ld128(reinterpret_cast<const uint4*>(from) + 2);
  return {__uint_as_float(a.x), __uint_as_float(a.y), a.z, a.w, {b.x, b.y, b.z}, b.w, u64(c.y) << 32 | c.x,
          u64(c.w) << 32 | c.z};
}
WRAPPER void st_law(Law* to, const Law& law) {
  uint4* words = reinterpret_cast<uint4*>(to);
  st128(words, make_uint4(__float_as_uint(law.max), __float_as_uint(law.c), law.min_p, law.up));
  st128(words + 1, make_uint4(law.limit.t, law.limit.inverse, law.limit.id, law.heir));
  st128(words + 2, make_uint4(u32(law.inverse), u32(law.inverse >> 32), u32(law.left), u32(law.left >> 32)));
}

// The weight of a token, 0 where a filter takes it.
WRAPPER u64 kept_weight(const Law& law, const u32* tables, float logit, u32 id) {
  const Rank rank = {exponent(law.max, logit, law.c), ~ascending(logit), id};
  const u64 w = weight(tables, rank.t);
  return w >= law.min_p && within(rank, law.limit) ? w : 0;
}

// The probability of a token below the vocabulary's size. The shift keeps 64 bits where the law is garbage.
WRAPPER u64 probability(const Law& law, const u32* tables, float logit, u32 id) {
  const u64 p = __umul64hi(kept_weight(law, tables, logit, id) << (law.up & 63), law.inverse);
  return p + (id == law.heir ? law.left : 0);
}
WRAPPER u64 probability_at(const Law& law, const u32* tables, const float* logits, u32 vocab, u32 id) {
  return id < vocab ? probability(law, tables, ld(logits + id), id) : 0;
}

// floor(a b / 2^48) of two up to 2^48.
WRAPPER u64 times(u64 a, u64 b) { return __umul64hi(a, b) << 16 | a * b >> 48; }

// min(2^48, floor(a b / n)) of three up to 2^48; 0 for n = 0. 16 bits of the quotient at a time: no step exceeds 64.
WRAPPER u64 ratio(u64 a, u64 b, u64 n) {
  if (n == 0) return 0;
  u64 rest = times(a, b), quotient = 0;
  const u64 low = a * b & (ONE - 1);
  if (rest >= n) return ONE;
#pragma unroll 1
  for (int shift = 32; shift >= 0; shift -= 16) {
    const u64 part = rest << 16 | (low >> shift & 0xffff), digit = part / n;
    rest = part - digit * n;
    quotient = quotient << 16 | digit;
  }
  return quotient;
}

// floor(2^112 / n) for an n from 2^63 on.
WRAPPER u64 inverse_of(u64 n) {
  u64 rest = 1ull << 63, quotient = 0;
  for (u32 bit = 0; bit < 50; bit++) {
    if (bit) {
      const bool over = rest >> 63;
      rest = rest << 1;
      quotient <<= 1;
      if (over || rest >= n) rest -= n, quotient |= 1;
    } else if (rest >= n) {
      rest -= n, quotient = 1;
    }
  }
  return quotient;
}

// The sum over the block; every thread has it. `words` may be written again once all threads have passed another
// barrier.
WRAPPER u64 block_sum(u64 own, u64* words) {
  for (int flip = 16; flip; flip /= 2) own += __shfl_xor_sync(~0u, own, flip);
  if (threadIdx.x % 32 == 0) sts(words + threadIdx.x / 32, own);
  __syncthreads();
  u64 sum = 0;
  for (u32 w = 0; w < WARPS; w++) sum += lds(words + w);
  return sum;
}

struct Four {
  u64 w[4];
};

// An id, with the probability of its share of the weights f(group) of ids 4 group .. 4 group + 3; NONE where they add
// up to 0. The goal is looked for in the sums of the warps' shares, then within one share, until a warp holds it.
template <class F>
WRAPPER u32 pick(u32 vocab, u64 bits, u64* words, F f) {
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 first = 0, end = (vocab + 3) / 4;
  u64 at = 0;
  for (bool begun = false; !begun || end - first > 32; begun = true) {
    const u32 share = ((end - first + WARPS - 1) / WARPS + 31) / 32 * 32;
    const u32 from = min(first + warp * share, end), to = min(from + share, end);
    u64 sum = 0;
#pragma unroll 2
    for (u32 group = from + lane; group < to; group += 32) {
      const Four four = f(group);
      sum += four.w[0] + four.w[1] + four.w[2] + four.w[3];
    }
    __syncthreads();
    const u64 total = block_sum(sum, words);
    if (!begun) {
      if (total == 0) return NONE;
      at = __umul64hi(bits, total);
    }
    u32 w = 0;
    for (; w < WARPS - 1 && at >= lds(words + w); w++) at -= lds(words + w);
    first = min(first + w * share, end);
    end = min(first + share, end);
  }
  const Four four = first + lane < end ? f(first + lane) : Four{{0, 0, 0, 0}};
  const u64 own = four.w[0] + four.w[1] + four.w[2] + four.w[3];
  u64 through = own;
  for (u32 by = 1; by < 32; by *= 2) {
    const u64 before = __shfl_up_sync(~0u, through, by);
    if (lane >= by) through += before;
  }
  const u32 beyond = __ballot_sync(~0u, at < through);
  u64 rest = at - (through - own);
  u32 i = 0;
#pragma unroll
  for (u32 next = 0; next < 3; next++) {
    if (i == next && rest >= four.w[next]) rest -= four.w[next], i++;
  }
  const u32 id = (first + lane) * 4 + i;
  return beyond ? __shfl_sync(~0u, id, __ffs(int(beyond)) - 1) : NONE;
}

WRAPPER void load_tables(u32* to, const u32* tables) {
  for (u32 i = threadIdx.x; i < 512 / 4; i += THREADS) sts128(to + i * 4, ld_stream(tables + i * 4));
}

}  // namespace

KERNEL(512, 1, law,
       (Law* laws,                  // [rows]
        const u64* best,            // [rows][blocks], as `sample` has it
        const float* logits,        // [rows][vocab]
        const Row* rows,            // [rows]
        const Sequence* sequences,  // [count]: settings
        const u32* tables,          // the first 512 words are thi and tlo
        u32 count, u32 blocks, u32 vocab)) {
  SHARED(u32, table, 512);
  SHARED(u64, bins, BINS);
  SHARED(u64, words, WARPS);
  SHARED(u64, found, 3);
  grid_launch();
  load_tables(table, tables);
  grid_wait();
  const u32 r = blockIdx.x;
  const Row row = ld(rows + r);
  const bool known = row.sequence < count;
  const Sequence* s = sequences + (known ? row.sequence : 0);
  const u64 key = best_key(best + size_t(r) * blocks, blocks, words);
  const u32 top = u32(key >> 32), id = ~u32(key);
  const bool sound = known && id < vocab && top > ascending(__uint_as_float(0xff800000u)) &&
                     top < ascending(__uint_as_float(0x7f800000u));
  Law own = {logit_of(top), known ? ld(&s->c) : 0, 0, 0, {~0u, ~0u, ~0u}, NONE, 0, 0};
  if (!sound) {
    if (threadIdx.x == 0) st_law(laws + r, own);
    return;
  }
  const float* from = logits + size_t(r) * vocab;
  if (own.c == 0) {
    // All of it is the best token's.
    own.limit = {0, ~top, id};
  } else {
    own.min_p = ld(&s->min_p);
#pragma unroll 1
    for (u32 mass = 0; mass < 2; mass++) {
      const u32 amount = ld(mass ? &s->top_p : &s->top_k);
      const Memory memory = {table, bins, words, found};
      if (amount) own.limit = cut(mass, amount, from, vocab, own.max, own.c, own.limit, memory);
    }
  }
  const u32 groups = (vocab + 3) / 4;
#pragma unroll 1
  for (u32 scaled = 0; scaled < 2; scaled++) {
    u64 sum = 0;
    each_group(from, vocab, 0, groups, [&](u32 group, float4 v) {
      const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        if (group * 4 + i >= vocab) continue;
        const u64 w = kept_weight(own, table, four[i], group * 4 + i);
        sum += scaled ? __umul64hi(w << own.up, own.inverse) : w;
      }
    });
    __syncthreads();
    sum = block_sum(sum, words);
    if (scaled) {
      own.left = ONE - sum;
    } else {
      // Garbage may weigh nothing.
      sum = max(sum, u64(1));
      own.up = u32(__clzll((long long)(sum)));
      own.inverse = inverse_of(sum << own.up);
    }
  }
  own.heir = id;
  if (threadIdx.x == 0) st_law(laws + r, own);
}

KERNEL(512, 1, draw,
       (u32* drafts,                // [sequences][block]: row j's token is the draft for place j; row 0 and rows of the
                                    // rule `match` are left as they are; NONE: damaged
        const Law* laws,            // [sequences][block]
        const float* logits,        // [sequences][block][vocab]
        const Row* rows,            // [sequences][block]
        const Sequence* sequences,  // [sequences]
        const u32* tables, u32 count, u32 vocab, u32 block)) {
  SHARED(u32, table, 512);
  SHARED(u64, words, WARPS);
  grid_launch();
  load_tables(table, tables);
  grid_wait();
  __syncthreads();
  const u32 r = blockIdx.x, depth = r % block, sequence = ld(&rows[r].sequence);
  if (depth == 0 || sequence >= count || ld(&sequences[sequence].rule) == MATCH) return;
  const Law own = ld_law(laws + r);
  const float* from = logits + size_t(r) * vocab;
  u32 token = NONE;
  if (own.heir != NONE) {
    token = pick(vocab, bits(dice_of(sequences + sequence), DRAFT, depth, depth), words, [&](u32 group) {
      const float4 v = load4(from, vocab, group);
      const float four[4] = {v.x, v.y, v.z, v.w};
      Four p;
#pragma unroll
      for (u32 i = 0; i < 4; i++) p.w[i] = group * 4 + i < vocab ? probability(own, table, four[i], group * 4 + i) : 0;
      return p;
    });
  }
  if (threadIdx.x == 0) st(drafts + r, token);
}

KERNEL(512, 1, judge,
       (u32* accepted,              // [sequences]; this and the next two are left as they are under the rule `match`, and
                                    // where nothing was drafted
        u32* next,                  // [sequences]; NONE: damaged
        u32* path,                  // [sequences][wide]: 0, 1, .. accepted, then NONE
        const Law* targets,         // [sequences][wide]: after the anchor and the drafts up to a row
        const float* target_logits, // [sequences][wide][vocab]
        const Law* drafters,        // [sequences][block]: what a row's draft was drawn from; row 0 unused
        const float* draft_logits,  // [sequences][block][vocab]
        const u32* tokens,          // [sequences][wide]: anchor, drafts
        const Span* spans,          // [sequences]
        const Sequence* sequences,  // [sequences]
        const u32* tables,
        u64* shared,                // [sequences][block]: what a row's law and its draft's share
        u32* counters,              // [sequences]
        u32 vocab, u32 block, u32 wide)) {
  SHARED(u32, table, 512);
  SHARED(u64, words, WARPS);
  SHARED(u64, chances, MOST_ROWS * 2);  // p and q of each draft; by blocks then the shares w
  SHARED(u32, verdict, 4);
  grid_launch();
  load_tables(table, tables);
  grid_wait();
  const u32 own = blockIdx.y, row = blockIdx.x;
  const size_t first = size_t(own) * wide, draft_first = size_t(own) * block;
  const Sequence* s = sequences + own;
  const u32 rule = ld(&s->rule), rows = min(ld(&spans[own].rows), min(block, wide));
  if ((rule != REJECTION && rule != BLOCK) || form_of(ld(&s->now.shape)) != CHAIN_OF_DRAFTS) return;
  if (rows < 2 || row >= rows || (row > 0 && rule != BLOCK)) return;
  __syncthreads();
  const u32 g = rows - 1;
  const Dice dice = dice_of(s);
  const auto target = [&](u32 at) { return ld_law(targets + first + at); };
  const auto drafter = [&](u32 at) { return ld_law(drafters + draft_first + at + 1); };
  const auto target_row = [&](u32 at) { return target_logits + (first + at) * vocab; };
  const auto draft_row = [&](u32 at) { return draft_logits + (draft_first + at + 1) * vocab; };

  // Draft i + 1 against the laws after i drafts.
  if (threadIdx.x < g) {
    const u32 i = threadIdx.x, token = ld(tokens + first + i + 1);
    const Law p = target(i), q = drafter(i);
    const bool sound = p.heir != NONE && q.heir != NONE;
    sts(chances + i, sound ? probability_at(p, table, target_row(i), vocab, token) : 0);
    sts(chances + MOST_ROWS + i, sound ? probability_at(q, table, draft_row(i), vocab, token) : 0);
  }
  __syncthreads();

  // Stands, the share w of the row after that, whether the draft's law is taken off, and whether there is a token.
  if (threadIdx.x == 0) {
    u32 stands = 0, taken = 0;
    bool sound = ld(&targets[first].heir) != NONE;
    for (; sound && stands < g; stands++) {
      const u64 p = lds(chances + stands), q = lds(chances + MOST_ROWS + stands);
      if (rule == BLOCK) {
        const u64 w = ratio(stands ? lds(chances + stands - 1) : ONE, p, q);
        sts(chances + stands, w);
        if (w == 0) break;
      } else {
        taken = q != 0;
        if (q == 0 || !accept(dice, stands + 1, stands + 1, p, q)) break;
        taken = 0;
      }
      sound = ld(&targets[first + stands + 1].heir) != NONE;
    }
    sts(verdict, stands), sts(verdict + 1, taken), sts(verdict + 2, u32(sound));
  }
  __syncthreads();
  u32 stands = lds(verdict), taken = lds(verdict + 1);
  const bool sound = lds(verdict + 2) != 0;

  u64 w = ONE;
  if (rule == BLOCK) {
    // Share of the drafts up to a row that is to be emitted.
    const auto share = [&](u32 at) { return at ? lds(chances + at - 1) : ONE; };
    if (sound && row > 0 && row <= stands && row < g && share(row) < ONE) {
      const Law p = target(row), q = drafter(row);
      const float *target_from = target_row(row), *draft_from = draft_row(row);
      const u64 here = share(row);
      u64 sum = 0;
      for (u32 group = threadIdx.x; group < (vocab + 3) / 4; group += THREADS) {
        const float4 a = load4(target_from, vocab, group), b = load4(draft_from, vocab, group);
        const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          const u32 id = group * 4 + i;
          if (id < vocab) sum += min(times(here, probability(p, table, as[i], id)), probability(q, table, bs[i], id));
        }
      }
      sum = block_sum(sum, words);
      if (threadIdx.x == 0) st_cg(shared + draft_first + row, sum);
    }
    if (threadIdx.x == 0) {
      __threadfence();
      sts(verdict + 3, atomicAdd(counters + own, 1u));
    }
    __syncthreads();
    if (lds(verdict + 3) != g) return;
    __threadfence();
    if (threadIdx.x == 0) {
      st(counters + own, 0u);
      u32 at = sound ? stands : 0;
      for (; at > 0; at--) {
        const u64 here = share(at);
        const u64 both = at < g && here < ONE ? ld_cg(shared + draft_first + at) : 0;
        if (here == ONE && at < g) break;
        if (accept(dice, at, at, here - both, ONE - both)) break;
      }
      sts(verdict, at);
    }
    __syncthreads();
    stands = lds(verdict);
    taken = stands < g;
    w = share(stands);
  }

  u32 token = NONE;
  if (sound) {
    const Law p = target(stands);
    const float* target_from = target_row(stands);
    const u64 chance = bits(dice, RESIDUAL, stands + 1, stands);
    if (taken) {
      const Law q = drafter(stands);
      const float* draft_from = draft_row(stands);
      token = pick(vocab, chance, words, [&](u32 group) {
        const float4 a = load4(target_from, vocab, group), b = load4(draft_from, vocab, group);
        const float as[4] = {a.x, a.y, a.z, a.w}, bs[4] = {b.x, b.y, b.z, b.w};
        Four left;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          const u32 id = group * 4 + i;
          const u64 mine = id < vocab ? times(w, probability(p, table, as[i], id)) : 0;
          const u64 drawn = id < vocab ? probability(q, table, bs[i], id) : 0;
          left.w[i] = mine > drawn ? mine - drawn : 0;
        }
        return left;
      });
    }
    // Where nothing is left both laws are the same.
    if (token == NONE) {
      token = pick(vocab, chance, words, [&](u32 group) {
        const float4 a = load4(target_from, vocab, group);
        const float as[4] = {a.x, a.y, a.z, a.w};
        Four whole;
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
          const u32 id = group * 4 + i;
          whole.w[i] = id < vocab ? probability(p, table, as[i], id) : 0;
        }
        return whole;
      });
    }
  }
  const u32 stood = sound ? stands : 0;
  if (threadIdx.x < wide) st(path + first + threadIdx.x, threadIdx.x <= stood ? threadIdx.x : NONE);
  if (threadIdx.x == 0) st(accepted + own, stood), st(next + own, token);
}
