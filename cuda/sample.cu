// The token each row chooses: `Sampling::choose` of src/verify.rs, decision for decision. All sums are of integers and
// all orders are total, so nothing depends on how the work is split.
//
// Computes: choice[r] = the best token (greedy), or the winner of an exponential race among the weights that top-k,
//           top-p and min-p leave; NONE for a damaged row (a NaN, +inf, nothing but -inf) and for one without a
//           sequence.
// Work:     grid (slices, rows), 512 threads, four ids per thread and step. A greedy row is its first block's, from
//           `best` alone. A race is run in slices of 8192 ids whose winners the last block compares. A row with top-k
//           or top-p is its first block's too: the cut is found by radix selection, 11 bits a pass over the row,
//           usually two passes.
// Order:    none that matters.
// Bytes:    greedy: rows x blocks x 8. Race: besides, the row's logits once, and best and tables per slice. With cuts
//           the first block reads the row three times for one cut and five times for two, more where weights tie.
// Needs:    vocab up to 2^26; best, partial and tables 16-byte aligned; counters zero, and left so.
#include "numbers.cuh"
#include "state.cuh"

namespace {

constexpr u32 THREADS = 512, WARPS = THREADS / 32, SLICE = 8192, AHEAD = 2;
constexpr u32 TLO = 256, RLOG = 512, TABLE_WORDS = 4612;  // the last 3 are padding
constexpr u32 RACE = 5;                                   // the race's place among the purposes of Philox counters
constexpr u32 BINS = 2048;

// Where a row's noise comes from.
struct Noise {
  u32 key[2], stream, position;
};

// A token's place in the order (logit descending, id ascending): smaller is better. `t`, of which the weight is a
// function, ascends as logits descend; it comes first because its digits spread over the bins where those of a float
// do not.
struct Rank {
  u32 t, inverse, id;
};

// A runner of the race. Least time / weight wins, then the lower id; the one with weight 0 loses against all others.
struct __align__(16) Runner {
  u32 time, id;
  u64 weight;
};
WRAPPER Runner nobody() { return {1, NONE, 0}; }

struct Memory {
  const u32* tables;  // [TABLE_WORDS] thi, tlo, rlog
  u64* bins;          // [BINS]
  u64* words;         // [WARPS]
  u64* found;         // [3]: digit, what of the goal is left for it, what it has
};

WRAPPER bool beats(const Runner& a, const Runner& b) {
  const u64 left = a.time * b.weight, right = b.time * a.weight;
  return left < right || (left == right && a.id < b.id);
}

// `ascending` backwards.
WRAPPER float logit_of(u32 ascending) { return __uint_as_float(ascending >> 31 ? ascending ^ 1u << 31 : ~ascending); }

// The exponent of a weight, in units of 2^-16; the bound also catches infinity and NaN.
WRAPPER u32 exponent(float max, float logit, float c) {
  return __float2uint_rz(fminf(rintf(__fmul_rn(__fsub_rn(max, logit), c)), float(40 << 16)));
}
WRAPPER u64 weight(const u32* tables, u32 t) {
  return u64(lds(tables + (t >> 8 & 255))) * lds(tables + TLO + (t & 255)) >> 30 >> (t >> 16);
}
WRAPPER u32 race_time(const u32* tables, u32 u) {
  u = max(u, 2u);
  const u32 zeros = u32(__clz(int(u))), mantissa = u << zeros & 0x7fffffff;
  const u32 from = lds(tables + RLOG + (mantissa >> 19)), to = lds(tables + RLOG + (mantissa >> 19) + 1);
  return (zeros << 27) + from - u32(u64(from - to) * (mantissa & 0x7ffff) >> 19);
}

WRAPPER uint4 philox(uint4 c, u32 k0, u32 k1) {
#pragma unroll
  for (int round = 0; round < 10; round++) {
    c = make_uint4(__umulhi(0xCD9E8D57u, c.z) ^ c.y ^ k0, 0xCD9E8D57u * c.z, __umulhi(0xD2511F53u, c.x) ^ c.w ^ k1,
                   0xD2511F53u * c.x);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

// The largest key of a row; every thread has it.
WRAPPER u64 best_key(const u64* best, u32 blocks, u64* words) {
  u64 most = 0;
  for (u32 i = threadIdx.x; i < blocks; i += THREADS) most = max(most, ld(best + i));
  for (int flip = 16; flip; flip /= 2) most = max(most, __shfl_xor_sync(~0u, most, flip));
  if (threadIdx.x % 32 == 0) sts(words + threadIdx.x / 32, most);
  __syncthreads();
  for (u32 w = 0; w < WARPS; w++) most = max(most, lds(words + w));
  return most;
}

// The block's best runner, in thread 0.
WRAPPER Runner fastest(Runner mine, Runner* runners) {
  for (int flip = 16; flip; flip /= 2) {
    const Runner other = {__shfl_xor_sync(~0u, mine.time, flip), __shfl_xor_sync(~0u, mine.id, flip),
                          __shfl_xor_sync(~0u, mine.weight, flip)};
    if (beats(other, mine)) mine = other;
  }
  if (threadIdx.x % 32 == 0) sts(runners + threadIdx.x / 32, mine);
  __syncthreads();
  if (threadIdx.x == 0) {
    for (u32 w = 1; w < WARPS; w++) {
      const Runner other = lds(runners + w);
      if (beats(other, mine)) mine = other;
    }
  }
  return mine;
}

// Calls f(group, logits of ids 4 group .. 4 group + 3) for this thread's share of groups first..end. Beyond the
// vocabulary logits are -inf.
template <class F>
WRAPPER void each_group(const float* logits, u32 vocab, u32 first, u32 end, F f) {
  for (u32 group = first + threadIdx.x; group < end; group += THREADS * AHEAD) {
    float4 v[AHEAD];
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
      const float none = __uint_as_float(0xff800000u);
      const u32 id = (group + a * THREADS) * 4;
      v[a] = make_float4(none, none, none, none);
      if (group + a * THREADS >= end) continue;
      if (vocab % 4 == 0) {
        v[a] = ld(reinterpret_cast<const float4*>(logits + id));
      } else {
        v[a].x = ld(logits + id);
        if (id + 1 < vocab) v[a].y = ld(logits + id + 1);
        if (id + 2 < vocab) v[a].z = ld(logits + id + 2);
        if (id + 3 < vocab) v[a].w = ld(logits + id + 3);
      }
    }
#pragma unroll
    for (u32 a = 0; a < AHEAD; a++) {
      if (group + a * THREADS < end) f(group + a * THREADS, v[a]);
    }
  }
}

WRAPPER bool within(const Rank& rank, const Rank& limit) {
  if (rank.t != limit.t) return rank.t < limit.t;
  if (rank.inverse != limit.inverse) return rank.inverse < limit.inverse;
  return rank.id <= limit.id;
}

// The rank of the last token that a cut keeps among those within `limit`: the first whose prefix has `amount` tokens,
// or that share of the mass. Digit by digit: the mass (or number) of tokens per digit, then the digit in which the goal
// is reached. From the third on all tokens still in question weigh the same and are counted.
WRAPPER Rank cut(bool mass, u32 amount, const float* logits, u32 vocab, float max_logit, float c, Rank limit,
                 const Memory& m) {
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Rank prefix = {0, 0, 0}, mask = {0, 0, 0};
  u64 goal = 0;
  for (u32 level = 0; level < 8; level++) {
    const u32 shift = level == 0 ? 11 : level == 2 ? 21 : level == 3 ? 10 : level == 5 ? 15 : level == 6 ? 4 : 0;
    const u32 digits = level == 4 ? 1023 : level == 7 ? 15 : 2047;
    const bool weigh = mass && level < 2;
    for (u32 i = 0; i < 4; i++) sts(m.bins + threadIdx.x * 4 + i, u64(0));
    __syncthreads();
    // Neighbours often share a bin: what goes to the same one in turn is added up before.
    u32 held = 0;
    u64 sum = 0;
    each_group(logits, vocab, 0, (vocab + 3) / 4, [&](u32 group, float4 v) {
      const float four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (u32 i = 0; i < 4; i++) {
        const Rank rank = {exponent(max_logit, four[i], c), ~ascending(four[i]), group * 4 + i};
        const u64 w = weight(m.tables, rank.t);
        const bool counts = w && rank.id < vocab && (rank.t & mask.t) == prefix.t &&
                            (rank.inverse & mask.inverse) == prefix.inverse && (rank.id & mask.id) == prefix.id &&
                            within(rank, limit);
        if (!counts) continue;
        const u32 digit = (level < 2 ? rank.t : level < 5 ? rank.inverse : rank.id) >> shift & digits;
        if (digit != held) {
          if (sum) atomicAdd(m.bins + held, sum);
          held = digit, sum = 0;
        }
        sum += weigh ? w : 1;
      }
    });
    if (sum) atomicAdd(m.bins + held, sum);
    __syncthreads();

    u64 four[4], own = 0;
#pragma unroll
    for (u32 i = 0; i < 4; i++) own += four[i] = lds(m.bins + threadIdx.x * 4 + i);
    u64 through = own;  // of this warp's bins up to this thread's
    for (u32 by = 1; by < 32; by *= 2) {
      const u64 before = __shfl_up_sync(~0u, through, by);
      if (lane >= by) through += before;
    }
    if (lane == 31) sts(m.words + warp, through);
    __syncthreads();
    u64 before = through - own, total = 0;
    for (u32 w = 0; w < WARPS; w++) {
      if (w == warp) before += total;
      total += lds(m.words + w);
    }
    if (level == 0) {
      // Rounded up; the product has up to 90 bits.
      const u64 low = total * amount;
      const u64 need = (__umul64hi(total, amount) << 32) + (low >> 32) + (u32(low) != 0);
      goal = mass ? max(need, u64(1)) : amount;
      if (mass ? total == 0 : total <= goal) return limit;
    }
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      if (before < goal && goal <= before + four[i]) {
        sts(m.found, u64(threadIdx.x * 4 + i));
        sts(m.found + 1, goal - before);
        sts(m.found + 2, four[i]);
      }
      before += four[i];
    }
    __syncthreads();
    const u32 digit = u32(lds(m.found)) & digits;
    goal = lds(m.found + 1);
    u64 size = lds(m.found + 2);
    // Fields have no bits above their first digit's.
    if (level < 2) {
      prefix.t |= digit << shift, mask.t = ~0u << shift;
    } else if (level < 5) {
      prefix.inverse |= digit << shift, mask.inverse = ~0u << shift;
    } else {
      prefix.id |= digit << shift, mask.id = ~0u << shift;
    }
    if (level == 1) {
      const u64 w = max(weight(m.tables, prefix.t), u64(1));
      if (mass) goal = (goal + w - 1) / w, size /= w;
    }
    if ((level > 0 || !mass) && goal == size) break;
  }
  // All of a prefix, but no more than there was before.
  const Rank last = {prefix.t | ~mask.t, prefix.inverse | ~mask.inverse, prefix.id | ~mask.id};
  return within(last, limit) ? last : limit;
}

// The race among the tokens of groups first..end that are within `limit` and weigh enough.
WRAPPER Runner race(const Noise& noise, u32 min_p, const float* logits, u32 vocab, float max_logit, float c, Rank limit,
                    u32 first, u32 end, const u32* tables) {
  Runner best = nobody();
  each_group(logits, vocab, first, end, [&](u32 group, float4 v) {
    const float four[4] = {v.x, v.y, v.z, v.w};
    u64 weights[4];
    bool any = false;
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      const Rank rank = {exponent(max_logit, four[i], c), ~ascending(four[i]), group * 4 + i};
      weights[i] = weight(tables, rank.t);
      if (weights[i] < min_p || rank.id >= vocab || !within(rank, limit)) weights[i] = 0;
      any |= weights[i] != 0;
    }
    if (!any) return;
    const uint4 counter = make_uint4(noise.position, RACE << 24 | group, noise.stream, 0);
    const uint4 drawn = philox(counter, noise.key[0], noise.key[1]);
    const u32 words[4] = {drawn.x, drawn.y, drawn.z, drawn.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      if (!weights[i]) continue;
      const Runner runner = {race_time(tables, words[i]), group * 4 + i, weights[i]};
      if (beats(runner, best)) best = runner;
    }
  });
  return best;
}

}  // namespace

KERNEL(512, 2, sample,
       (u32* choice,                // [rows]
        const u64* best,            // [rows][blocks]: per block of ids the largest (ascending(logit) << 32 | ~id);
                                    // all ones where one is NaN or +inf
        const float* logits,        // [rows][vocab]
        const Row* rows,            // [rows]
        const Sequence* sequences,  // [count]; null: every row is greedy, of the pointers only best and rows are read
        const u32* tables,          // [TABLE_WORDS]
        uint4* partial,             // [rows][slices]: a Runner each
        u32* counters,              // [rows]
        u32 count, u32 blocks, u32 vocab)) {
  SHARED(u32, table, TABLE_WORDS);
  SHARED(u64, bins, BINS);
  SHARED(u64, words, WARPS);
  SHARED(Runner, runners, WARPS);
  SHARED(u64, found, 3);
  SHARED(u32, arrived, 1);
  grid_launch();
  grid_wait();
  const Memory memory = {table, bins, words, found};
  const u32 r = blockIdx.y, slice = blockIdx.x, slices = gridDim.x;
  const Row row = ld(rows + r);
  const bool known = row.sequence < count;
  const Sequence* s = known ? sequences : nullptr;
  if (s) s += row.sequence;
  const float c = s ? ld(&s->c) : 0;
  const bool greedy = c == 0, cuts = !greedy && (ld(&s->top_k) || ld(&s->top_p));
  if (slice && (greedy || cuts)) return;

  const u64 key = best_key(best + size_t(r) * blocks, blocks, words);
  const u32 top = u32(key >> 32), id = ~u32(key);
  // Between -inf and +inf; a NaN is outside, and so are all ones.
  const bool sound = known && id < vocab && top > ascending(__uint_as_float(0xff800000u)) &&
                     top < ascending(__uint_as_float(0x7f800000u));
  if (greedy || !sound) {
    if (slice == 0 && threadIdx.x == 0) st(choice + r, sound ? id : NONE);
    return;
  }
  for (u32 i = threadIdx.x; i < TABLE_WORDS / 4; i += THREADS) sts128(table + i * 4, ld_stream(tables + i * 4));
  __syncthreads();

  const float* own = logits + size_t(r) * vocab;
  const float max_logit = logit_of(top);
  const u32 groups = (vocab + 3) / 4;
  Rank limit = {~0u, ~0u, ~0u};
  if (cuts) {
#pragma unroll 1
    for (u32 mass = 0; mass < 2; mass++) {
      const u32 amount = ld(mass ? &s->top_p : &s->top_k);
      if (amount) limit = cut(mass, amount, own, vocab, max_logit, c, limit, memory);
    }
  }
  const Noise noise = {{ld(s->seed), ld(s->seed + 1)}, ld(&s->stream), row.position + 1};
  const u32 first = slice * (SLICE / 4), end = cuts ? groups : min(first + SLICE / 4, groups);
  Runner winner = fastest(race(noise, ld(&s->min_p), own, vocab, max_logit, c, limit, first, end, table), runners);
  if (cuts) {
    if (threadIdx.x == 0) st(choice + r, winner.id);
    return;
  }
  if (threadIdx.x == 0) {
    st_cg(partial + size_t(r) * slices + slice,
          make_uint4(winner.time, winner.id, u32(winner.weight), u32(winner.weight >> 32)));
    __threadfence();
    sts(arrived, atomicAdd(counters + r, 1u));
  }
  __syncthreads();
  if (lds(arrived) != slices - 1) return;
  __threadfence();
  winner = nobody();
  for (u32 i = threadIdx.x; i < slices; i += THREADS) {
    const uint4 v = ld_cg(partial + size_t(r) * slices + i);
    const Runner other = {v.x, v.y, u64(v.w) << 32 | v.z};
    if (beats(other, winner)) winner = other;
  }
  winner = fastest(winner, runners);
  if (threadIdx.x == 0) {
    st(choice + r, winner.id);
    st(counters + r, 0u);
  }
}
