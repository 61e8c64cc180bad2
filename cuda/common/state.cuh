// The state of a sequence in device memory, from its first round to its last. The host writes it before the
// first round. Later it changes only the rows to verify (a byte of `shape`) and clears `active` to end the
// sequence. It reads the result of each round from the ring (cuda/spec/round.cu). Mirrored by `Sequence` in
// src/gpu/kernels/round.rs.
#pragma once
#include "common/rows.cuh"

// Whether a sequence still takes part in rounds, and if not, why. Mirrored by `Finish` in
// src/gpu/kernels/round.rs.
enum Finish : u32 {
  RUNNING = 0,
  STOP = 1,             // a stop id was emitted
  LENGTH = 2,           // the token budget is used up
  CONTEXT = 3,          // the last position is taken
  INVALID_TARGET = 4,   // the target logits for the next token hold a NaN or +inf, or nothing but -inf
  INVALID_DRAFTER = 5,  // the same for the drafter's logits of a draft
};

// How drafts are verified; `VerifyMethod` in src/spec/config.rs defines the methods.
enum VerifyMethod : u32 { MATCH = 0, REJECTION = 1, BLOCK = 2 };

// The shape of a sequence's drafts.
enum DraftShape : u32 {
  CHAIN_OF_DRAFTS = 0,
  BEST_FIRST = 1,    // a tree of the most probable prefixes
  SAMPLED_TREE = 2,  // a tree of fixed shape with sampled tokens; several chains with VerifyMethod BLOCK
};

constexpr u32 STOP_IDS = 11;

// Progress of a sequence, and its limits.
struct __align__(16) Progress {
  u32 active;     // nonzero: takes part in rounds
  u32 length;     // positions 0..length are in the target's KV cache
  u32 anchor;     // token at position `length`: emitted, not yet run through the target
  u32 pending;    // positions length - pending..length, the accepted rows of the last verification, whose
                  // features are not yet in the drafter's KV cache
  u32 budget;     // tokens that may still be emitted
  u32 end;        // the sequence's positions are 0..end; the token at the last one is never run
  u32 draft_end;  // the drafter's positions are 0..draft_end; 0: no drafter
  u32 shape;      // bits 0 to 7: maximum rows of a block, anchor included; 1 for autoregressive decoding.
                  // Bits 8 to 15: maximum rows to verify, of a block or a tree, anchor included.
                  // Bits 16 and up: a DraftShape
};

struct __align__(16) Sequence {
  Progress now;
  float c;             // 65536 log2(e) / temperature; 0: greedy
  u32 top_k;           // tokens kept; 0: all
  u32 top_p;           // fraction of the probability mass kept, in units of 2^-32; 0: all
  u32 min_p;           // minimum weight relative to the best token's, in units of 2^-32
  u32 seed[2];         // Philox key
  u32 stream;          // Philox stream of the request
  u32 finish;          // a Finish
  u32 stop[STOP_IDS];  // ids that end the answer; NONE in unused entries
  float min_confidence;  // drafts are verified up to the first of lower confidence, which is dropped; 0: all
  u32 rounds;          // rounds that this sequence took part in
  u32 drafted;         // drafts verified
  u32 accepted;        // drafts accepted
  u32 verify_method;   // a VerifyMethod
};
static_assert(sizeof(Sequence) == 128, "src/gpu/kernels/round.rs writes it word by word");

DEVICE Progress ld_progress(const Sequence* from) {  // [1]
  const uint4* words = reinterpret_cast<const uint4*>(from);
  const uint4 a = words[0], b = words[1];
  return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
}

DEVICE u32 form_of(u32 shape) { return shape >> 16; }

// Rows of the sequence's next block, anchor included: the maximum that the request, the drafter's positions
// and the context allow, at least 1; 0 when the sequence does not take part. `block`: limit of the launch.
DEVICE u32 block_rows(const Progress& s, u32 block) {
  if (!s.active) return 0;
  const u32 draft = s.draft_end > s.length ? s.draft_end - s.length : 0;
  const u32 left = s.end > s.length ? s.end - s.length - 1 : 0;
  return max(1u, min(min(s.shape & 0xff, block), min(draft, left)));
}

// Maximum rows that the sequence verifies per round, anchor included: rows of its block for a chain, rows of
// the tree for a tree. block_rows limits the depth of a tree.
DEVICE u32 verified_rows(const Progress& s) { return max(1u, s.shape >> 8 & 0xff); }
