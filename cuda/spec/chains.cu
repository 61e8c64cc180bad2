// The best of several chains, judged as a block: `sample_chains` and `multi_draft_block_verify` of src/spec/verify.rs, decision for decision.
//
// Computes: sample_chains: the tokens of each sequence's chains, row by row from the distribution of the row's depth. chain_classes: for
//           each row that has a draft behind it, the drafter's mass in each class of tokens and all before it. verify_chains:
//           which chain's drafts are chosen, how many of them stand, and the token after those, of the distribution that is left.
//           Only sequences of the rule `block` that draw a tree, of two rows or more, take part.
// Work:     512 threads. sample_chains and chain_classes: grid (wide, sequences), a row each. verify_chains: grid (block,
//           sequences): each block finds the choice again, from a few words of each draft, and sums what its row's test
//           needs; the last of a sequence judges.
// Order:    ids ascend where a token is picked; all sums are of integers.
// Bytes:    sample_chains: a row of logits per draft. chain_classes: two rows of logits per row with a draft behind it.
//           verify_chains: two rows of logits per sequence, and two more per draft of a chain.
// Needs:    vocab up to 2^26; block and wide 1 to 64; distributions, logits, tables 16-byte aligned; counters zero, and left so. Rows
//           that come after the same drafts have the same logits.
#include "spec/distribution.cuh"

namespace {

constexpr u32 CLASSES = 64;

// How much likelier a token is to the target than to the drafter, in halves of an octave.
WRAPPER u32 halves(u64 x) {
  const u32 zeros = u32(__clzll((long long)(x)));
  return 2 * (64 - zeros) + (u32(x << (zeros & 63) >> 62) & 1);
}
WRAPPER u32 class_of(u64 p, u64 q) {
  const int apart = int(halves(p)) - int(halves(q)) + int(CLASSES / 2);
  return p == 0 ? 0 : u32(max(0, min(apart, int(CLASSES - 1))));
}

// A sequence's chains: `count` of g drafts each, one behind the other after the anchor. None where it takes no part.
struct Chains {
  u32 rows, count, g;
};
WRAPPER Chains chains_of(const Sequence* s, const u32* parents, const Span* span, u32 block, u32 wide) {
  const u32 rows = min(ld(&span->rows), wide);
  if (ld(&s->rule) != BLOCK || form_of(ld(&s->now.shape)) != DRAWN || rows < 2 || block < 2) return {0, 0, 0};
  u32 g = 1;
#pragma unroll 1
  for (; g + 1 < min(rows, block) && ld(parents + g + 1) != 0; g++) {}
  return {rows, (rows - 1) / g, g};
}

// Of a row: how many drafts come before it.
WRAPPER u32 depth_of(u32 row, u32 g) { return row ? (row - 1) % g + 1 : 0; }

// That a chain is out of the running, or else has what has this probability.
WRAPPER u64 out_or(u64 out, u64 likely) { return out + times(ONE - out, likely); }

// What the probability of a token is multiplied with by a choice among chains that are out with these probabilities: `below`
// and `up_to` are the drafter's mass below the token's class and up to it.
WRAPPER u64 share_of(const u64* out, u32 count, u64 below, u64 up_to) {
  u64 sum = 0, power = ONE;
#pragma unroll 1
  for (u32 c = 0; c < count; c++) {
    const u64 here = lds(out + c);
    // Horner's scheme: what earlier chains have, where this one is no better; and this one's, where they are worse.
    sum = times(sum, out_or(here, up_to)) + times(power, ONE - here);
    power = times(power, out_or(here, below));
  }
  return sum;
}

}  // namespace

KERNEL(512, 1, sample_chains,
       (u32* tokens,                // [sequences][wide]: anchor, drafts; NONE: padding, or a damaged draft
        const RowDistribution* distributions,            // [sequences][block]: row d's is that of depth d
        const float* logits,        // [sequences][block][vocab]
        const u32* parents,         // [sequences][wide]: the row a row follows: 0 where a chain begins
        const Span* spans,          // [sequences]: how many rows there are
        const Sequence* sequences,  // [sequences]
        const u32* tables, u32 vocab, u32 block, u32 wide)) {
  SHARED(u32, table, 512);
  SHARED(u64, words, WARPS);
  grid_launch();
  load_tables(table, tables);
  grid_wait();
  __syncthreads();
  const u32 row = blockIdx.x, own = blockIdx.y;
  const size_t first = size_t(own) * wide;
  const Sequence* s = sequences + own;
  const Chains chains = chains_of(s, parents + first, spans + own, block, wide);
  if (chains.count == 0) return;
  u32 token = row ? NONE : ld(&s->now.anchor);
  if (row && row < chains.rows) {
    const u32 depth = depth_of(row, chains.g);
    const size_t at = size_t(own) * block + depth;
    const RowDistribution distribution = ld_law(distributions + at);
    if (distribution.rounding_token != NONE) {
      token = pick_of(distribution, table, logits + at * vocab, vocab, bits(dice_of(s), DRAFT, depth, row), words);
    }
  }
  if (threadIdx.x == 0) st(tokens + first + row, token);
}

KERNEL(512, 1, chain_classes,
       (u64* masses,                // [sequences][wide][CLASSES]: the drafter's mass up to a class, of rows with a draft
                                    // behind them; others, and damaged rows, are left as they are
        const RowDistribution* targets,         // [sequences][wide]: after the drafts on the way to a row
        const float* target_logits, // [sequences][wide][vocab]
        const RowDistribution* drafters,        // [sequences][block]: row d's is what the rows of depth d were drawn from
        const float* draft_logits,  // [sequences][block][vocab]
        const u32* parents,         // [sequences][wide]: the row a row follows: 0 where a chain begins
        const Span* spans,          // [sequences]: how many rows there are
        const Sequence* sequences,  // [sequences]
        const u32* tables, u32 vocab, u32 block, u32 wide)) {
  SHARED(u32, table, 512);
  SHARED(u64, bins, CLASSES * 32);  // of each class a place for each lane: lanes of a warp never wait for each other
  SHARED(u64, sums, CLASSES);
  grid_launch();
  load_tables(table, tables);
  grid_wait();
  const u32 row = blockIdx.x, own = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const size_t first = size_t(own) * wide;
  const Chains chains = chains_of(sequences + own, parents + first, spans + own, block, wide);
  if (chains.count == 0 || row > chains.count * chains.g || depth_of(row, chains.g) == chains.g) return;
  const size_t draft = size_t(own) * block + depth_of(row, chains.g) + 1;
  const Pair rows = {ld_law(targets + first + row), ld_law(drafters + draft), target_logits + (first + row) * vocab,
                     draft_logits + draft * vocab};
  if (rows.p.rounding_token == NONE || rows.q.rounding_token == NONE) return;
  for (u32 i = threadIdx.x; i < CLASSES * 32; i += THREADS) sts(bins + i, u64(0));
  __syncthreads();
  for (u32 group = threadIdx.x; group < (vocab + 3) / 4; group += THREADS) {
    of_both(rows, table, vocab, group, [&](u64 p, u64 q) {
      if (q) atomicAdd(bins + class_of(p, q) * 32 + lane, q);
      return u64(0);
    });
  }
  __syncthreads();
  for (u32 of = warp; of < CLASSES; of += WARPS) {
    u64 sum = lds(bins + of * 32 + lane);
    for (int flip = 16; flip; flip /= 2) sum += __shfl_xor_sync(~0u, sum, flip);
    if (lane == 0) sts(sums + of, sum);
  }
  __syncthreads();
  if (threadIdx.x >= CLASSES) return;
  u64 up_to = 0;
  for (u32 of = 0; of <= threadIdx.x; of++) up_to += lds(sums + of);
  st(masses + (first + row) * CLASSES + threadIdx.x, up_to);
}

KERNEL(512, 1, verify_chains,
       (u32* accepted,              // [sequences]; this and the next two are left as they are where a sequence takes no part
        u32* next,                  // [sequences]; NONE: damaged
        u32* path,                  // [sequences][wide]: 0, then the rows that stand, then NONE
        const RowDistribution* targets,         // [sequences][wide]: after the drafts on the way to a row
        const float* target_logits, // [sequences][wide][vocab]
        const RowDistribution* drafters,        // [sequences][block]: row d's is what the rows of depth d were drawn from
        const float* draft_logits,  // [sequences][block][vocab]
        const u32* tokens,          // [sequences][wide]: anchor, drafts
        const u32* parents,         // [sequences][wide]: the row a row follows: 0 where a chain begins
        const Span* spans,          // [sequences]: how many rows there are
        const Sequence* sequences,  // [sequences]
        const u32* tables,
        const u64* masses,          // [sequences][wide][CLASSES], as chain_classes has them
        u64* shared,                // [sequences][block]: what a row's distribution and the choice's share
        u32* counters,              // [sequences]
        u32 vocab, u32 block, u32 wide)) {
  SHARED(u32, table, 512);
  SHARED(u64, words, WARPS);
  // Of draft i of chain c, at c g + i: its token, its class, and the drafter's mass below that and up to it.
  SHARED(u32, drafts, MOST_ROWS);
  SHARED(u32, classes, MOST_ROWS);
  SHARED(u64, ps, MOST_ROWS);
  SHARED(u64, qs, MOST_ROWS);
  SHARED(u64, below, MOST_ROWS);
  SHARED(u64, up_to, MOST_ROWS);
  SHARED(u64, outs, MOST_ROWS);    // that chain c is out of the running at draft i, at i count + c
  SHARED(u64, shares, MOST_ROWS);  // of the choice's drafts, as `judge` has it
  SHARED(u64, factors, CLASSES);   // of the classes of the tokens after a row
  SHARED(u32, verdict, 5);
  grid_launch();
  load_tables(table, tables);
  grid_wait();
  __syncthreads();
  const u32 row = blockIdx.x, own = blockIdx.y, lane = threadIdx.x % 32;
  const size_t first = size_t(own) * wide, draft_first = size_t(own) * block;
  const Sequence* s = sequences + own;
  const Chains chains = chains_of(s, parents + first, spans + own, block, wide);
  const u32 count = chains.count, g = chains.g;
  if (count == 0 || row > g) return;
  const PhiloxStream dice = dice_of(s);

  if (threadIdx.x < count * g) {
    const u32 i = threadIdx.x, depth = i % g, before = depth ? i : 0, token = ld(tokens + first + i + 1);
    const RowDistribution p = ld_law(targets + first + before), q = ld_law(drafters + draft_first + depth + 1);
    const bool sound = p.rounding_token != NONE && q.rounding_token != NONE;
    const u64 mine = sound ? probability_at(p, table, target_logits + (first + before) * vocab, vocab, token) : 0;
    const u64 drawn =
        sound ? probability_at(q, table, draft_logits + (draft_first + depth + 1) * vocab, vocab, token) : 0;
    const u32 of = class_of(mine, drawn);
    const u64* up = masses + (first + before) * CLASSES;
    sts(drafts + i, token), sts(classes + i, of), sts(ps + i, mine), sts(qs + i, drawn);
    sts(below + i, sound && of ? ld(up + of - 1) : 0), sts(up_to + i, sound ? ld(up + of) : 0);
  }
  __syncthreads();

  // The choice: of the chains that have had its drafts so far the one of the highest class, of several the first.
  if (threadIdx.x < 32) {
    bool runs[2] = {lane < count, lane + 32 < count};
    u64 out[2] = {0, 0}, w = ONE;
    u32 winner = 0, stands = 0;
    bool sound = ld(&targets[first].rounding_token) != NONE;
#pragma unroll 1
    for (u32 i = 0; i < g; i++) {
      u32 best = NONE;
#pragma unroll
      for (u32 j = 0; j < 2; j++) {
        const u32 c = lane + 32 * j;
        if (c < count) sts(outs + i * count + c, out[j]);
        if (runs[j]) best = min(best, (CLASSES - 1 - lds(classes + c * g + i)) * MOST_ROWS + c);
      }
      winner = __reduce_min_sync(~0u, best) % MOST_ROWS;
      __syncwarp();
      const u32 at = winner * g + i, token = lds(drafts + at);
      const u64 q = lds(qs + at), up = lds(up_to + at);
      w = ratio(w, lds(ps + at), times(q, share_of(outs + i * count, count, lds(below + at), up)));
      if (lane == 0) sts(shares + i, w);
      if (w && stands == i) stands++;
      sound &= ld(&targets[first + at + 1].rounding_token) != NONE && ld(&drafters[draft_first + i + 1].rounding_token) != NONE;
#pragma unroll
      for (u32 j = 0; j < 2; j++) {
        const u32 c = lane + 32 * j;
        runs[j] = runs[j] && lds(drafts + c * g + i) == token;
        out[j] = c < winner ? ONE : c == winner ? 0 : ONE - ratio(ONE - out[j], q, out_or(out[j], up));
      }
    }
    if (lane == 0) sts(verdict, winner), sts(verdict + 1, stands), sts(verdict + 2, u32(sound));
  }
  __syncthreads();
  const u32 winner = lds(verdict), most = lds(verdict + 1);
  const bool sound = lds(verdict + 2) != 0;
  const auto share = [&](u32 at) { return at ? lds(shares + at - 1) : ONE; };
  // The row of the chosen chain after `at` drafts.
  const auto row_at = [&](u32 at) { return first + (at ? winner * g + at : 0); };
  const auto both = [&](u32 at) {
    const size_t draft = draft_first + at + 1;
    return Pair{ld_law(targets + row_at(at)), ld_law(drafters + draft), target_logits + row_at(at) * vocab,
                draft_logits + draft * vocab};
  };
  // Fills `factors` for that row.
  const auto weigh = [&](u32 at) {
    if (threadIdx.x < CLASSES) {
      const u64* up = masses + row_at(at) * CLASSES + threadIdx.x;
      sts(factors + threadIdx.x, share_of(outs + at * count, count, threadIdx.x ? ld(up - 1) : 0, ld(up)));
    }
    __syncthreads();
  };
  const auto chosen = [&](u64 p, u64 q) { return times(q, lds(factors + class_of(p, q))); };

  if (sound && row > 0 && row <= most && row < g && share(row) < ONE) {
    weigh(row);
    const u64 here = share(row);
    const u64 sum = sum_of_both(both(row), table, vocab, words,
                                [&](u64 p, u64 q) { return min(times(here, p), chosen(p, q)); });
    if (threadIdx.x == 0) st_cg(shared + draft_first + row, sum);
  }
  const u32 stands = stands_of(dice, shared + draft_first, counters + own, g, sound ? most : 0, verdict + 3, share);
  if (stands == NONE) return;
  u32 token = NONE;
  if (sound) {
    const u64 chance = bits(dice, RESIDUAL, stands + 1, stands), w = share(stands);
    if (stands < g) {
      weigh(stands);
      const Pair here = both(stands);
      token = pick(vocab, chance, words, [&](u32 group) {
        return of_both(here, table, vocab, group, [&](u64 p, u64 q) { return beyond(times(w, p), chosen(p, q)); });
      });
    }
    // Where nothing is left both distributions are the same.
    const RowDistribution p = ld_law(targets + row_at(stands));
    if (token == NONE) token = pick_of(p, table, target_logits + row_at(stands) * vocab, vocab, chance, words);
  }
  if (threadIdx.x < wide) {
    st(path + first + threadIdx.x, threadIdx.x <= stands ? u32(row_at(threadIdx.x) - first) : NONE);
  }
  if (threadIdx.x == 0) st(accepted + own, stands), st(next + own, token);
}
