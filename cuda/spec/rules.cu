// Drafts drawn at random and judged by `rejection` and `block` of src/spec/verify.rs, decision for decision. Probabilities are
// integers that add up to 2^48 in each row; all sums are of integers, so nothing depends on how the work is split.
//
// Computes: distribution: per row what turns a logit into a probability; rounding_token NONE for a damaged row and for one without a
//           sequence. draw: per drafted row a token of its distribution. judge: per sequence which drafts stand and the token
//           after them, of the distribution that is left. Sequences of the rule `match` are none of draw's and judge's; nor, for
//           judge, are blocks without drafts, which all rules decode plainly.
// Work:     512 threads. distribution and draw: grid (rows). judge: grid (block, sequences): by blocks, each row's block sums
//           what the row's test needs, and the last of a sequence judges; else row 0's judges alone.
// Order:    ids ascend where a token is picked.
// Bytes:    distribution: best, and the row's logits twice; with cuts as `sample` besides. draw: the row's logits once. judge:
//           two rows of logits per sequence, by blocks two more per draft.
// Needs:    vocab up to 2^26, block 1 to 64; logits, best, distributions, tables 16-byte aligned; counters zero, and left so.
#include "spec/distribution.cuh"

KERNEL(512, 1, distribution,
       (RowDistribution* distributions,                  // [rows]
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
  RowDistribution own = {logit_of(top), known ? ld(&s->c) : 0, 0, 0, {~0u, ~0u, ~0u}, NONE, 0, 0};
  if (!sound) {
    if (threadIdx.x == 0) st_law(distributions + r, own);
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
  own.rounding_token = id;
  if (threadIdx.x == 0) st_law(distributions + r, own);
}

KERNEL(512, 1, draw,
       (u32* drafts,                // [sequences][block]: row j's token is the draft for place j; row 0 and rows of the
                                    // rule `match` are left as they are; NONE: damaged
        const RowDistribution* distributions,            // [sequences][block]
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
  const RowDistribution own = ld_law(distributions + r);
  const float* from = logits + size_t(r) * vocab;
  u32 token = NONE;
  if (own.rounding_token != NONE) {
    token = pick_of(own, table, from, vocab, bits(dice_of(sequences + sequence), DRAFT, depth, depth), words);
  }
  if (threadIdx.x == 0) st(drafts + r, token);
}

KERNEL(512, 1, judge,
       (u32* accepted,              // [sequences]; this and the next two are left as they are under the rule `match`, and
                                    // where nothing was drafted
        u32* next,                  // [sequences]; NONE: damaged
        u32* path,                  // [sequences][wide]: 0, 1, .. accepted, then NONE
        const RowDistribution* targets,         // [sequences][wide]: after the anchor and the drafts up to a row
        const float* target_logits, // [sequences][wide][vocab]
        const RowDistribution* drafters,        // [sequences][block]: what a row's draft was drawn from; row 0 unused
        const float* draft_logits,  // [sequences][block][vocab]
        const u32* tokens,          // [sequences][wide]: anchor, drafts
        const Span* spans,          // [sequences]
        const Sequence* sequences,  // [sequences]
        const u32* tables,
        u64* shared,                // [sequences][block]: what a row's distribution and its draft's share
        u32* counters,              // [sequences]
        u32 vocab, u32 block, u32 wide)) {
  SHARED(u32, table, 512);
  SHARED(u64, words, WARPS);
  SHARED(u64, chances, MOST_ROWS * 2);  // p and q of each draft; by blocks then the shares w
  SHARED(u32, verdict, 5);
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
  const PhiloxStream dice = dice_of(s);
  const auto target = [&](u32 at) { return ld_law(targets + first + at); };
  const auto drafter = [&](u32 at) { return ld_law(drafters + draft_first + at + 1); };
  const auto target_row = [&](u32 at) { return target_logits + (first + at) * vocab; };
  const auto draft_row = [&](u32 at) { return draft_logits + (draft_first + at + 1) * vocab; };

  // Draft i + 1 against the distributions after i drafts.
  if (threadIdx.x < g) {
    const u32 i = threadIdx.x, token = ld(tokens + first + i + 1);
    const RowDistribution p = target(i), q = drafter(i);
    const bool sound = p.rounding_token != NONE && q.rounding_token != NONE;
    sts(chances + i, sound ? probability_at(p, table, target_row(i), vocab, token) : 0);
    sts(chances + MOST_ROWS + i, sound ? probability_at(q, table, draft_row(i), vocab, token) : 0);
  }
  __syncthreads();

  // Stands, the share w of the row after that, whether the draft's distribution is taken off, and whether there is a token.
  if (threadIdx.x == 0) {
    u32 stands = 0, taken = 0;
    bool sound = ld(&targets[first].rounding_token) != NONE;
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
      sound = ld(&targets[first + stands + 1].rounding_token) != NONE;
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
      const Pair rows = {target(row), drafter(row), target_row(row), draft_row(row)};
      const u64 here = share(row);
      const u64 sum =
          sum_of_both(rows, table, vocab, words, [&](u64 p, u64 q) { return min(times(here, p), q); });
      if (threadIdx.x == 0) st_cg(shared + draft_first + row, sum);
    }
    stands = stands_of(dice, shared + draft_first, counters + own, g, sound ? stands : 0, verdict + 3, share);
    if (stands == NONE) return;
    taken = stands < g;
    w = share(stands);
  }

  u32 token = NONE;
  if (sound) {
    const u64 chance = bits(dice, RESIDUAL, stands + 1, stands);
    const RowDistribution p = target(stands);
    if (taken) {
      const Pair rows = {p, drafter(stands), target_row(stands), draft_row(stands)};
      token = pick(vocab, chance, words, [&](u32 group) {
        return of_both(rows, table, vocab, group, [&](u64 p, u64 q) { return beyond(times(w, p), q); });
      });
    }
    // Where nothing is left both distributions are the same.
    if (token == NONE) token = pick_of(p, table, target_row(stands), vocab, chance, words);
  }
  const u32 stood = sound ? stands : 0;
  if (threadIdx.x < wide) st(path + first + threadIdx.x, threadIdx.x <= stood ? threadIdx.x : NONE);
  if (threadIdx.x == 0) st(accepted + own, stood), st(next + own, token);
}
