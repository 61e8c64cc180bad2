// What the kernels of a pass know of its rows and sequences. All of it lives in device memory, so that one captured graph
// serves every round; round.cu and the host (for prompts) write it.
#pragma once
#include "common/ptx.cuh"

// No such thing: a sequence, slot, query or token that is not there.
#define NONE 0xffffffffu

// Tokens in a page of keys and values, which is also the tile of attention.
#define PAGE 64

// One row of a pass.
struct __align__(16) Row {
  u32 sequence;  // row of the page table; NONE: padding, nothing is written for it
  u32 position;  // of the token, for RoPE
  u32 slot;      // of its key and value in the sequence's pages; NONE: they are not written
  u32 query;     // row of the query buffer; NONE: its query is not written
};

// One sequence's part of an attention pass.
struct __align__(8) Span {
  u32 context;  // slots that were there before the pass: 0..context
  u32 rows;     // rows of this pass, which stand in slots context..context + rows; 0: the sequence takes no part
};

// Where 16-byte chunk `chunk` of a token's key or value lies in its page, in bytes: pages hold [PAGE][head_dim] bf16 per kv
// head with the chunks of each token permuted, so that a tile copied as it is lies in shared memory free of bank conflicts.
WRAPPER u32 page_offset(u32 slot, u32 chunk, u32 head_dim) {
  const u32 token = slot % PAGE;
  return token * head_dim * 2 + ((chunk ^ (token & 7)) << 4);
}
