// What a round does besides running the models: it makes the tables of its passes from the sequences' state, hands
// the drafts to verification, and turns the verdict into new state and a record for the host. No argument changes from
// round to round, so that one captured graph is every round:
//
//   round_begin - draft pass - round_tokens - verification pass - verify - round_finish
//
// With trees, choices and tree_build stand where round_tokens does, and compact before round_finish; tree_build's tables
// take the place of round_begin's for the verification pass. Where drafts are drawn by rules, distribution and draw end the draft
// pass and sample_siblings and sample_chains follow tree_build; distribution, judge, verify_tree, chain_classes and verify_chains
// follow verify, whose verdicts they replace.
//
// Computes: round_begin: tokens, rows and spans of both passes, the number of active sequences, the round's number.
//           round_tokens: tokens of the verification pass, anchor and drafts.
//           round_finish: what is emitted (up to a stop id, the budget, the context), the state after it, a record in
//           the ring, and last the record's round number, which the host waits for.
// Work:     grid (sequences); 64 threads, one per row, for tables; one warp for round_finish.
// Order:    counts are of integers.
// Bytes:    sequences x (256 + block x about 60 + wide x about 40).
// Needs:    block and wide 1 to 64, sequences up to 1024. State, choices and verdicts may hold anything.
#include "common/state.cuh"

// A sequence's part of a round's record, block tokens behind it. The number is written last.
struct __align__(16) Record {
  u32 round;   // number of the round, from 1
  u32 kept;    // tokens emitted; 0 where the sequence took no part
  u32 judged;  // tokens the verdict would have emitted: accepted drafts and the next token
  u32 finish;  // a Finish
  u32 drafted; // drafts that were verified
  u32 stood[2];  // bit i: row i of the verification is on the verdict's path
  u32 none;
};

KERNEL(64, 8, round_begin,
       (u32* draft_tokens,    // [sequences][block]: anchor, then masks; NONE: padding, here and below
        Row* draft_rows,      // [2][sequences][block]: first the pending features, then the block
        u32* features,        // [sequences][block]: rows of the last verification pass, whose features are pending
        Span* draft_spans,    // [sequences]: what the block's rows see; no rows where nothing is drafted
        Row* verify_rows,     // [sequences][wide]
        Span* verify_spans,   // [sequences]
        u32* round_header,           // [3]: the round's number, active sequences; rows per sequence of the last verification
        const Sequence* sequences,  // [sequences]
        const u32* path,      // [sequences][round_header[2]], as the last verdict left it; at most `columns`
        u32 block, u32 wide, u32 columns,  // rows of a sequence: of its block; of its verification; of any
        u32 drafts,           // 0: every sequence takes a AR step
        u32 mask)) {
  grid_launch();
  grid_wait();
  const u32 own = blockIdx.x, count = gridDim.x, row = threadIdx.x;
  const Progress s = ld_progress(sequences + own);
  const u32 rows = block_rows(s, drafts ? block : 1), drafting = rows > 1 ? rows : 0;
  const u32 verified = min(min(rows, verified_rows(s)), wide);
  const u32 pending = s.active ? min(min(s.pending, block), s.length) : 0;
  const u32 at = own * block + row, before = min(ld(round_header + 2), columns);
  if (row < block) {
    st(draft_tokens + at, row >= drafting ? NONE : row == 0 ? s.anchor : mask);
    // A feature's slot in the drafter's pages is its position.
    const u32 position = s.length - pending + row;
    const bool feature = row < pending && position < s.draft_end;
    st(draft_rows + at, Row{feature ? own : NONE, feature ? position : 0, feature ? position : NONE, NONE});
    const u32 of_path = feature && row < before ? ld(path + own * before + row) : NONE;
    st(features + at, of_path < before ? own * before + of_path : NONE);
    const bool drafted = row < drafting;
    st(draft_rows + count * block + at, Row{drafted ? own : NONE, drafted ? s.length + row : 0,
                                            drafted ? s.length + row : NONE, drafted ? at : NONE});
  }
  if (row < wide) {
    const bool there = row < verified;
    const u32 to = own * wide + row;
    st(verify_rows + to, Row{there ? own : NONE, there ? s.length + row : 0, there ? s.length + row : NONE,
                             there ? to : NONE});
  }
  if (row == 0) {
    st(draft_spans + own, Span{drafting ? s.length : 0, drafting});
    st(verify_spans + own, Span{verified ? s.length : 0, verified});
  }
  if (own == 0 && row < 32) {
    u32 active = 0;
    for (u32 i = row; i < count; i += 32) active += ld(&sequences[i].now.active) != 0;
    active = __reduce_add_sync(~0u, active);
    if (row == 0) {
      st(round_header, ld(round_header) + 1);
      st(round_header + 1, active);
    }
  }
}

KERNEL(64, 8, round_tokens,
       (u32* tokens,                // [sequences][wide]: anchor, drafts; NONE: padding, or a damaged draft
        const u32* drafts,          // [sequences][block]: row j's token is the draft for place j; row 0 unused
        const Sequence* sequences,  // [sequences]
        const Span* spans,          // [sequences]: of the verification
        u32 block, u32 wide)) {
  grid_launch();
  grid_wait();
  const u32 row = threadIdx.x, own = blockIdx.x;
  const u32 rows = min(ld(&spans[own].rows), wide);
  if (row >= wide) return;
  const bool draft = row > 0 && row < min(rows, block);
  st(tokens + own * wide + row,
     draft ? ld(drafts + own * block + row) : row == 0 && rows ? ld(&sequences[own].now.anchor) : NONE);
}

KERNEL(32, 16, round_finish,
       (Sequence* sequences,   // [sequences]
        u32* ring,             // [places][slots][record]: a Record and its tokens, in pinned memory
        u32* round_header,            // [3], as round_begin left it
        const u32* accepted,   // [sequences]
        const u32* next,       // [sequences]
        const u32* path,       // [sequences][wide]
        const u32* tokens,     // [sequences][wide]
        const Span* spans,     // [sequences]: how many rows were verified
        u32 wide, u32 places, u32 slots, u32 record)) {
  grid_launch();
  grid_wait();
  const u32 own = blockIdx.x, lane = threadIdx.x, round = ld(round_header);
  Sequence* to = sequences + own;
  const Progress s = ld_progress(to);
  u32* const line = ring + (size_t(round % places) * slots + own) * record;
  const u32 rows = s.active ? min(ld(&spans[own].rows), wide) : 0;

  // What the verdict emits, two tokens per lane.
  const u32 stood = rows ? min(ld(accepted + own), rows - 1) : 0, last = ld(next + own);
  u32 token[2];
  bool damaged = false;
  u64 way = 1;  // the anchor's row, always
#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    const u32 i = lane + half * 32;
    const bool draft = i < stood;
    const u32 row = draft ? ld(path + size_t(own) * wide + i + 1) : 0;
    token[half] = !draft ? last : row < rows ? ld(tokens + size_t(own) * wide + row) : NONE;
    if (draft && row < rows) way |= 1ull << row;
    damaged |= i > 0 && i < rows && ld(tokens + size_t(own) * wide + i) == NONE;
  }
  const u32 low_way = __reduce_or_sync(~0u, u32(way)), high_way = __reduce_or_sync(~0u, u32(way >> 32));
  const bool bad_draft = __any_sync(~0u, damaged);
  const bool sound = rows && !bad_draft && last != NONE;

  // The first of them that is the answer's last.
  u32 ends[2] = {0, 0};
  for (u32 i = 0; i < STOP_IDS; i++) {
    const u32 stop = ld(&to->stop[i]);
#pragma unroll
    for (u32 half = 0; half < 2; half++) ends[half] |= token[half] == stop && stop != NONE;
  }
  u64 stops = u64(__ballot_sync(~0u, int(ends[1]))) << 32 | __ballot_sync(~0u, int(ends[0]));
  const u32 judged = stood + 1;
  const u32 room = s.end > s.length ? s.end - s.length - 1 : 0, allowed = min(s.budget, room);
  const u32 first_stop = stops ? u32(__ffsll((long long)(stops))) - 1 : NONE;
  const u32 kept = !sound ? 0 : min(min(judged, allowed), first_stop == NONE ? NONE : first_stop + 1);
  const u32 finish = !rows                   ? u32(ld(&to->finish))
                     : bad_draft             ? u32(DAMAGED_DRAFTER)
                     : !sound                ? u32(DAMAGED_TARGET)
                     : first_stop < kept     ? u32(STOP)
                     : kept < allowed        ? u32(RUNNING)
                     : s.budget <= room      ? u32(LENGTH)
                                             : u32(CONTEXT);

#pragma unroll
  for (u32 half = 0; half < 2; half++) {
    const u32 i = lane + half * 32;
    if (i < kept) st(line + sizeof(Record) / 4 + i, token[half]);
  }
  const u32 at = kept ? kept - 1 : 0;
  const u32 low = __shfl_sync(~0u, token[0], int(at % 32)), high = __shfl_sync(~0u, token[1], int(at % 32));
  if (lane == 0 && rows) {
    st(&to->now.active, u32(finish == RUNNING));
    st(&to->finish, finish);
    st(&to->rounds, ld(&to->rounds) + 1);
    if (sound) {
      st(&to->now.length, s.length + kept);
      if (kept) st(&to->now.anchor, at < 32 ? low : high);
      // Rows 0..kept of the path ran on what is now the sequence.
      st(&to->now.pending, s.draft_end > s.length ? kept : 0);
      st(&to->now.budget, s.budget - kept);
      st(&to->drafted, ld(&to->drafted) + rows - 1);
      st(&to->accepted, ld(&to->accepted) + stood);
    }
  }
  if (lane == 0) {
    st(line + 1, kept);
    st(line + 2, sound ? judged : 0);
    st(line + 3, finish);
    st(line + 4, sound ? rows - 1 : 0);
    st(line + 5, sound ? low_way : 0);
    st(line + 6, sound ? high_way : 0);
    if (own == 0) st(round_header + 2, wide);
  }
  __threadfence_system();
  __syncwarp();
  if (lane == 0) st_release_system(line, round);
}
