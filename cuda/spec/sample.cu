// The token each row chooses: `Sampling::choose` of src/spec/sampling.rs, decision for decision. All sums are of integers and
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
#include "common/state.cuh"
#include "spec/sampling_weights.cuh"

namespace {

constexpr u32 SLICE = 8192;
constexpr u32 RACE = 5;  // the race's place among the purposes of Philox counters

// Where a row's noise comes from.
struct Noise {
  u32 key[2], stream, position;
};

// A runner of the race. Least time / weight wins, then the lower id; the one with weight 0 loses against all others.
struct __align__(16) Runner {
  u32 time, id;
  u64 weight;
};
WRAPPER Runner nobody() { return {1, NONE, 0}; }

WRAPPER bool beats(const Runner& a, const Runner& b) {
  const u64 left = a.time * b.weight, right = b.time * a.weight;
  return left < right || (left == right && a.id < b.id);
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
  const bool sound = known && is_sound(key, vocab);
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
