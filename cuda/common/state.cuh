// What a round knows of a sequence. It lives in device memory from the sequence's first round to its last; the host
// writes it once, before the first, and reads what a round did from the ring (round.cu). Mirrored by `Sequence` in
// src/gpu/kernels/round.rs.
#pragma once
#include "common/rows.cuh"

// Why a sequence takes no part in rounds any more; the host's words for it are those of `Finish` in src/engine/generate.rs.
enum Finish : u32 {
  RUNNING = 0,
  STOP = 1,             // a stop id was emitted
  LENGTH = 2,           // the budget is spent
  CONTEXT = 3,          // the last position is taken
  DAMAGED_TARGET = 4,   // the logits that were to choose the next token hold a NaN or infinity, or nothing but -inf
  DAMAGED_DRAFTER = 5,  // the same for a draft
};

// Which drafts stand; src/spec/verify.rs says what each means.
enum Rule : u32 { MATCH = 0, REJECTION = 1, BLOCK = 2 };

// What a sequence drafts.
enum Form : u32 {
  CHAIN_OF_DRAFTS = 0,
  BEST_FIRST = 1,  // the tree of the most probable prefixes
  DRAWN = 2,       // a tree of a fixed shape, of tokens that are drawn; under the rule `block` several chains
};

constexpr u32 STOP_IDS = 12;

// How far a sequence is, and its limits.
struct __align__(16) Progress {
  u32 active;     // nonzero: takes part in rounds
  u32 length;     // positions 0..length are in the target's pages
  u32 anchor;     // token at position `length`, emitted and not yet run
  u32 pending;    // positions length - pending..length have features that the drafter has not seen: the rows on the
                  // last verification's path
  u32 budget;     // tokens that may still be emitted
  u32 end;        // the sequence's positions are 0..end; the token of the last one is never run
  u32 draft_end;  // the drafter's positions are 0..draft_end; 0: there is no drafter
  u32 shape;      // bits 0 to 7: rows of a block at most, anchor included, 1: autoregressive decoding; 8 to 15: rows that are
                  // verified at most, of a block or a tree, anchor included; from 16 on: a Form
};

struct __align__(16) Sequence {
  Progress now;
  float c;        // 65536 log2(e) / temperature; 0: greedy
  u32 top_k;      // tokens kept; 0: all
  u32 top_p;      // share of the mass kept, in units of 2^-32; 0: all
  u32 min_p;      // least share of the best token's weight, in units of 2^-32
  u32 seed[2];    // Philox key
  u32 stream;     // of the request, for Philox
  u32 finish;     // a Finish
  u32 stop[STOP_IDS];  // ids that end the answer; NONE where there are fewer
  u32 rounds;     // rounds this sequence took part in
  u32 drafted;    // drafts that were judged
  u32 accepted;   // drafts that stood
  u32 rule;       // a Rule
};
static_assert(sizeof(Sequence) == 128, "src/gpu/kernels/round.rs writes it word by word");

WRAPPER Progress ld_progress(const Sequence* from) {
  const uint4 a = ld(reinterpret_cast<const uint4*>(from)), b = ld(reinterpret_cast<const uint4*>(from) + 1);
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

WRAPPER u32 form_of(u32 shape) { return shape >> 16; }

// Rows of a sequence's next block, anchor included: as many as the request, the drafter's positions and the context
// allow, at least one; 0 where the sequence takes no part. The one rule for all kernels of a round.
WRAPPER u32 block_rows(const Progress& s, u32 block) {
  if (!s.active) return 0;
  const u32 draft = s.draft_end > s.length ? s.draft_end - s.length : 0;
  const u32 room = s.end > s.length ? s.end - s.length - 1 : 0;
  return max(1u, min(min(s.shape & 0xff, block), min(draft, room)));
}

// How many of them are verified, of chains; of a tree it is how deep it may be that they say, and this how many rows it
// may have.
WRAPPER u32 verified_rows(const Progress& s) { return max(1u, s.shape >> 8 & 0xff); }
