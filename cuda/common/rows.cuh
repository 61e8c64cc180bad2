// Metadata of a forward pass: its rows and sequences. All of it lives in device memory, so that one captured
// CUDA graph serves every round. cuda/spec/round.cu writes it for rounds, the host writes it for prompts.
#pragma once
#include "common/ptx.cuh"

// Marks a missing sequence, slot, query or token.
#define NONE 0xffffffffu

// Tokens per KV-cache page. Attention also processes keys in tiles of this size.
#define PAGE 64

// One row of a pass.
struct __align__(16) Row {
  u32 sequence;  // row of the page table; NONE: padding, nothing is written for this row
  u32 position;  // token position, for RoPE
  u32 slot;      // KV slot of the row in the sequence's pages; NONE: key and value are not written
  u32 query;     // row of the query buffer; NONE: its query is not written
};

// One sequence of an attention pass.
struct __align__(8) Span {
  u32 context;  // slots 0..context were filled before this pass
  u32 rows;     // rows of this pass, in slots context..context + rows; 0: the sequence does not take part
};

// Byte offset of 16-byte chunk `chunk` of a token's key or value in its page. Pages hold [PAGE][head_dim]
// bf16 per KV head. The chunks of each token are permuted, so that a page copied to shared memory as is can
// be read without bank conflicts.
DEVICE u32 page_offset(u32 slot, u32 chunk, u32 head_dim) {
  const u32 token = slot % PAGE;
  return token * head_dim * 2 + ((chunk ^ (token & 7)) << 4);
}
