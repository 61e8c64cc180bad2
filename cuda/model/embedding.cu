// Embedding lookup for the tokens of a pass.
//
// Computes: out[r] = scale * f32(table[tokens[r]]); a token outside the vocabulary gives a row of zeros.
// Work:     grid (rows), one block of 256 threads per row, 8 columns per thread and iteration.
// Order:    no additions.
// Bytes:    rows x hidden x (2 read + 4 written).
// Preconditions: hidden a multiple of 8, of 32 if the table is packed; table and out 16-byte aligned.
#include "common/packed.cuh"

extern "C" __global__ void __launch_bounds__(256, 4) embedding(
    float* out,           // [rows][hidden]
    const u16* table,     // [vocab][hidden] bf16, or packed (common/packed.cuh)
    const u32* tokens,    // [rows]
    u32 hidden, u32 vocab,
    u32 packed,           // 1: the table is the packed weights of the LM head
    float scale) {        // factor of every element
  grid_launch();
  grid_wait();
  const u32 token = tokens[blockIdx.x];
  const bool valid = token < vocab;
  float4* row = reinterpret_cast<float4*>(out + size_t(blockIdx.x) * hidden);
  for (u32 i = threadIdx.x; i < hidden / 8; i += blockDim.x) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (valid) {
      v = ld_stream(table + (packed ? packed_offset(token, i, hidden) : size_t(token) * hidden + i * 8));
    }
    const u32 pairs[4] = {v.x, v.y, v.z, v.w};
    float4* to = row + i * 2;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const u32 a = pairs[j * 2], b = pairs[j * 2 + 1];
      to[j] = make_float4(low_f32(a) * scale, high_f32(a) * scale, low_f32(b) * scale, high_f32(b) * scale);
    }
  }
}
