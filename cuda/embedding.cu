// Embedding rows of a pass's tokens.
//
// Computes: out[r] = f32(table[tokens[r]]); a token outside the vocabulary gives a row of zeros.
// Work:     grid (rows), one block of 256 threads per row, 8 columns per thread and turn.
// Order:    nothing is added.
// Bytes:    rows x hidden x (2 read + 4 written).
// Needs:    hidden a multiple of 8; table and out 16-byte aligned.
#include "ptx.cuh"

KERNEL(256, 4, embedding,
       (float* out,           // [rows][hidden]
        const u16* table,     // [vocab][hidden] bf16
        const u32* tokens,    // [rows]
        u32 hidden, u32 vocab)) {
  grid_launch();
  grid_wait();
  const u32 token = ld(tokens + blockIdx.x);
  const bool known = token < vocab;
  const u16* from = table + size_t(known ? token : 0) * hidden;
  float4* to = reinterpret_cast<float4*>(out + size_t(blockIdx.x) * hidden);
  for (u32 i = threadIdx.x; i < hidden / 8; i += blockDim.x) {
    const uint4 v = known ? ld_stream(from + i * 8) : make_uint4(0, 0, 0, 0);
    st(to + i * 2, make_float4(low_f32(v.x), high_f32(v.x), low_f32(v.y), high_f32(v.y)));
    st(to + i * 2 + 1, make_float4(low_f32(v.z), high_f32(v.z), low_f32(v.w), high_f32(v.w)));
  }
}
