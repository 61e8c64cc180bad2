// The parts of a round that are neither model nor verification: the row tables of its passes, from the state
// of the sequences; the tokens to verify; and the update of the state by the verification result, with a
// record for the host. No kernel argument changes from round to round, so one captured CUDA graph serves
// every round:
//
//   round_begin - draft pass - round_tokens - verification pass - verify - round_finish
//
// Drafts without a drafter: lookup replaces the draft pass and reads the tokens that round_finish keeps.
// Trees: choices and tree_build replace round_tokens, compact precedes round_finish, and tree_build writes
// the tables of the verification pass again. Sampled drafts: row_distribution and sample_drafts end the draft
// pass; sample_siblings and sample_chains follow tree_build; row_distribution, verify_drafts, verify_tree,
// chain_classes and verify_chains follow verify and overwrite its results.
//
// Computes:      round_begin: tokens, rows and spans of both passes, the number of active sequences, the
//                round's number. round_tokens: tokens of the verification pass, anchor and drafts.
//                round_finish: the emitted tokens (up to a stop id, the budget, or the end of the context),
//                the state after them, a record in the ring, and finally the record's round number, which
//                the host waits for.
// Work:          grid (sequences); round_begin and round_tokens: 64 threads, one per row. round_finish:
//                one warp.
// Order:         only counts are summed, in integers.
// Bytes:         sequences x (256 + block_size x about 60 + max_verify_rows x about 40).
// Preconditions: block_size and max_verify_rows 1 to 64, sequences up to 1024, anchor_row 0 or 1. State, choices and
//                verification results may hold any value.
#include "common/state.cuh"

// A sequence's part of a round's record, followed by up to block_size tokens. `round` is written last.
// round_finish writes the fields by their word offsets.
struct __align__(16) Record {
  u32 round;              // number of the round, from 1
  u32 emitted;            // tokens emitted; 0 if the sequence took no part
  u32 acceptance_length;  // accepted drafts plus the next token, before a stop id or a limit cuts them
  u32 finish;             // a Finish
  u32 drafted;            // drafts verified
  u32 path_rows[2];       // bit i: row i of the verification pass is on the accepted path
  u32 padding;
};

extern "C" __global__ void __launch_bounds__(64, 8) round_begin(
    u32* draft_tokens,          // [sequences][block_size]: anchor, then mask tokens; NONE: padding
    Row* draft_rows,            // [2][sequences][block_size]: first the pending features, then the block
    u32* features,              // [sequences][block_size]: rows of the last verification pass whose features
                                // are pending
    Span* draft_spans,          // [sequences]: of the block; no rows if nothing is drafted
    Row* verify_rows,           // [sequences][max_verify_rows]
    Span* verify_spans,         // [sequences]
    u32* round_header,          // [3]: round number, active sequences, and the max_verify_rows of the
                                // last verification
    const Sequence* sequences,  // [sequences]
    const u32* path,            // [sequences][round_header[2]]: the last accepted rows;
                                // round_header[2] <= max_path_rows
    u32 block_size, u32 max_verify_rows, u32 max_path_rows,
    u32 drafts,                 // 0: every sequence takes an AR step
    u32 mask,
    u32 anchor_row) {           // row of the block that holds the anchor: 0, or 1 if the anchor's row predicts
                                // the first draft. Row i is for draft i in both cases.
  grid_launch();
  grid_wait();
  const u32 sequence = blockIdx.x, count = gridDim.x, row = threadIdx.x;
  const Progress s = ld_progress(sequences + sequence);
  const u32 rows = block_rows(s, drafts ? block_size : 1), drafting = rows > 1 ? rows : 0;
  const u32 verified = min(min(rows, verified_rows(s)), max_verify_rows);
  const u32 block_context = max(s.length, anchor_row) - anchor_row;  // position of row 0
  const u32 pending = s.active ? min(min(s.pending, block_size), s.length) : 0;
  const u32 at = sequence * block_size + row, path_rows = min(round_header[2], max_path_rows);
  if (row < block_size) {
    draft_tokens[at] = row >= drafting ? NONE : row == anchor_row ? s.anchor : mask;
    // The drafter's KV slot of a feature is its position.
    const u32 position = s.length - pending + row;
    const bool feature = row < pending && position < s.draft_end;
    draft_rows[at] = Row{feature ? sequence : NONE, feature ? position : 0, feature ? position : NONE, NONE};
    const u32 path_row = feature && row < path_rows ? path[sequence * path_rows + row] : NONE;
    features[at] = path_row < path_rows ? sequence * path_rows + path_row : NONE;
    // A row before the anchor's stands at the last position of the context and writes no key or value, so the
    // other rows do not see it.
    const bool drafted = row < drafting;
    const u32 drafted_position = block_context + row;
    draft_rows[count * block_size + at] =
        Row{drafted ? sequence : NONE, drafted ? drafted_position : 0,
            drafted && row >= anchor_row ? drafted_position : NONE, drafted ? at : NONE};
  }
  if (row < max_verify_rows) {
    const bool exists = row < verified;
    const u32 to = sequence * max_verify_rows + row;
    verify_rows[to] = Row{exists ? sequence : NONE, exists ? s.length + row : 0, exists ? s.length + row : NONE,
                          exists ? to : NONE};
  }
  if (row == 0) {
    draft_spans[sequence] = Span{drafting ? block_context : 0, drafting};
    verify_spans[sequence] = Span{verified ? s.length : 0, verified};
  }
  if (sequence == 0 && row < 32) {
    u32 active = 0;
    for (u32 i = row; i < count; i += 32) active += sequences[i].now.active != 0;
    active = __reduce_add_sync(~0u, active);
    if (row == 0) {
      round_header[0]++;
      round_header[1] = active;
    }
  }
}

extern "C" __global__ void __launch_bounds__(64, 8) round_tokens(
    u32* tokens,                // [sequences][max_verify_rows]: anchor, drafts; NONE: padding, or a
                                // invalid draft
    const u32* drafts,          // [sequences][block_size]: draft i at i; 0 unused
    Row* verify_rows,           // [sequences][max_verify_rows]
    Span* spans,                // [sequences]: of the verification pass
    const Sequence* sequences,  // [sequences]
    const u32* kept,            // [sequences]: rows of the block to verify; rows and spans are shortened to it; null:
                                // all
    u32 block_size, u32 max_verify_rows) {
  grid_launch();
  grid_wait();
  const u32 row = threadIdx.x, sequence = blockIdx.x;
  const u32 rows = min(min(spans[sequence].rows, max_verify_rows), kept ? kept[sequence] : NONE);
  __syncthreads();
  if (row >= max_verify_rows) return;
  if (kept && row == 0) spans[sequence].rows = rows;
  if (kept && row >= rows) verify_rows[sequence * max_verify_rows + row] = Row{NONE, 0, NONE, NONE};
  const bool draft = row > 0 && row < min(rows, block_size);
  tokens[sequence * max_verify_rows + row] = draft              ? drafts[sequence * block_size + row]
                                             : row == 0 && rows ? sequences[sequence].now.anchor
                                                                : NONE;
}

extern "C" __global__ void __launch_bounds__(32, 16) round_finish(
    Sequence* sequences,   // [sequences]
    u32* ring,             // [rounds][slots][record_words]: a Record and its tokens, in pinned memory
    u32* round_header,     // [3], as round_begin left it
    const u32* accepted,   // [sequences]
    const u32* next,       // [sequences]
    const u32* path,       // [sequences][max_verify_rows]
    const u32* tokens,     // [sequences][max_verify_rows]
    const Span* spans,     // [sequences]: rows verified
    u32* history,          // [sequences][positions]: gets the emitted tokens at their positions; null: no history
    u32 max_verify_rows, u32 rounds, u32 slots, u32 record_words, u32 positions) {
  grid_launch();
  grid_wait();
  const u32 sequence = blockIdx.x, lane = threadIdx.x, round = round_header[0];
  Sequence* to = sequences + sequence;
  const Progress s = ld_progress(to);
  u32* const record = ring + (size_t(round % rounds) * slots + sequence) * record_words;
  const u32 rows = s.active ? min(spans[sequence].rows, max_verify_rows) : 0;

  // The accepted drafts and the next token, two tokens per lane.
  const u32 num_accepted = rows ? min(accepted[sequence], rows - 1) : 0, last = next[sequence];
  u32 token[2];
  bool invalid = false;
  u64 path_rows = 1;  // the anchor's row is always on the path
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    const u32 i = lane + half * 32;
    const bool draft = i < num_accepted;
    const u32 row = draft ? path[size_t(sequence) * max_verify_rows + i + 1] : 0;
    token[half] = !draft ? last : row < rows ? tokens[size_t(sequence) * max_verify_rows + row] : NONE;
    if (draft && row < rows) path_rows |= 1ull << row;
    invalid |= i > 0 && i < rows && tokens[size_t(sequence) * max_verify_rows + i] == NONE;
  }
  const u32 low_rows = __reduce_or_sync(~0u, u32(path_rows)), high_rows = __reduce_or_sync(~0u, u32(path_rows >> 32));
  const bool bad_draft = __any_sync(~0u, invalid);
  const bool valid = rows && !bad_draft && last != NONE;

  // The first token that ends the answer.
  u32 ends[2] = {0, 0};
  for (u32 i = 0; i < STOP_IDS; i++) {
    const u32 stop = to->stop[i];
#pragma unroll
    for (u32 half = 0; half < 2; half++) ends[half] |= token[half] == stop && stop != NONE;
  }
  u64 stops = u64(__ballot_sync(~0u, int(ends[1]))) << 32 | __ballot_sync(~0u, int(ends[0]));
  const u32 acceptance_length = num_accepted + 1;
  const u32 context_left = s.end > s.length ? s.end - s.length - 1 : 0, allowed = min(s.budget, context_left);
  const u32 first_stop = stops ? u32(__ffsll((long long)(stops))) - 1 : NONE;
  const u32 emitted = !valid ? 0 : min(min(acceptance_length, allowed), first_stop == NONE ? NONE : first_stop + 1);
  const u32 finish = !rows                      ? u32(to->finish)
                     : bad_draft                ? u32(INVALID_DRAFTER)
                     : !valid                   ? u32(INVALID_TARGET)
                     : first_stop < emitted     ? u32(STOP)
                     : emitted < allowed        ? u32(RUNNING)
                     : s.budget <= context_left ? u32(LENGTH)
                                                : u32(CONTEXT);

#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    const u32 i = lane + half * 32;
    if (i < emitted) record[sizeof(Record) / 4 + i] = token[half];
    const u32 position = s.length + 1 + i;
    if (i < emitted && history && position < positions) history[size_t(sequence) * positions + position] = token[half];
  }
  const u32 at = emitted ? emitted - 1 : 0;
  const u32 low = __shfl_sync(~0u, token[0], int(at % 32)), high = __shfl_sync(~0u, token[1], int(at % 32));
  if (lane == 0 && rows) {
    to->now.active = finish == RUNNING;
    to->finish = finish;
    to->rounds++;
    if (valid) {
      to->now.length = s.length + emitted;
      if (emitted) to->now.anchor = at < 32 ? low : high;
      // The path's first `emitted` rows hold the features of the positions just added.
      to->now.pending = s.draft_end > s.length ? emitted : 0;
      to->now.budget = s.budget - emitted;
      to->drafted += rows - 1;
      to->accepted += num_accepted;
    }
  }
  if (lane == 0) {
    record[1] = emitted;
    record[2] = valid ? acceptance_length : 0;
    record[3] = finish;
    record[4] = valid ? rows - 1 : 0;
    record[5] = valid ? low_rows : 0;
    record[6] = valid ? high_rows : 0;
    if (sequence == 0) round_header[2] = max_verify_rows;
  }
  // The barrier orders the stores of all lanes before the release, which therefore covers them without fences, as in
  // last_block.cuh. The memory model lists bar.sync as a synchronizing operation, but not bar.warp.sync.
  __syncthreads();
  if (lane == 0) st_release_system(record, round);
}
