// Heads of gated attention after their projection: RMSNorm of each query and key head, RoPE of its first dims, and
// stores, as the epilogue of qkv.cu does them for heads of 64 and 128. A head of 256 is longer than a tile of that
// epilogue.
//
// Computes: h = in[m] per head; q, k = bf16(RoPE(gain * h / rms(h))); v, gates = bf16(h). Dims from rotary_dims on are
//           not rotated.
// Work:     grid (rows, ceil((2 heads + 2 kv_heads) / 8)), 256 threads; a warp has one head, a lane eight dims.
// Order:    squares: eight dims ascending per lane, then lanes by xor 16-8-4-2-1.
// Bytes:    per row pitch 4 read, half of it written; a RoPE row.
// Preconditions: head_dim a multiple of 8 up to 256, rotary_dims a multiple of 16 up to head_dim; pitch a multiple of
//           4; buffers 16-byte aligned.
#include "common/numbers.cuh"
#include "common/rows.cuh"

extern "C" __global__ void __launch_bounds__(256, 4) split_heads(
    u16* queries,         // [query_rows][heads][head_dim] bf16
    u16* gates,           // [query_rows][heads][head_dim] bf16
    u16* keys,            // [pages][kv_heads][PAGE][head_dim] bf16, chunks permuted (page_offset)
    u16* values,          // as keys
    const float* in,      // [rows][pitch]: query heads, key heads, value heads, gates of the query heads
    const Row* rows,      // [rows]
    const u32* table,     // [sequences][sequence_pages] page numbers
    const float* q_gain,  // [head_dim]
    const float* k_gain,  // [head_dim]
    const float* rope,    // [positions][rotary_dims]: cosines, then sines
    u32 pitch, u32 heads, u32 kv_heads, u32 head_dim, u32 rotary_dims, u32 query_rows, u32 pages, u32 sequences,
    u32 sequence_pages, u32 positions, float eps) {
  grid_launch();
  grid_wait();
  const u32 lane = threadIdx.x % 32, head = blockIdx.y * 8 + threadIdx.x / 32, d = lane * 8;
  if (head >= 2 * (heads + kv_heads)) return;
  const bool inside = d < head_dim;
  const float* h = in + size_t(blockIdx.x) * pitch + head * head_dim;
  float4 v[2] = {make_float4(0, 0, 0, 0), make_float4(0, 0, 0, 0)};
  if (inside) v[0] = as<float4>(h + d), v[1] = as<float4>(h + d + 4);
  const Row row = rows[blockIdx.x];
  const bool valid = row.sequence < sequences;
  const bool query = head < heads, rotated = head < heads + kv_heads;
  const bool gate = head >= heads + 2 * kv_heads;

  float squares = sum_of_squares(v[0]);
  squares = __fmaf_rn(v[1].w, v[1].w,
                      __fmaf_rn(v[1].z, v[1].z, __fmaf_rn(v[1].y, v[1].y, __fmaf_rn(v[1].x, v[1].x, squares))));
  const float mean = __fdiv_rn(lane_sum(squares, 32), float(head_dim));
  if (!inside) return;
  if (rotated) {
    const float* gain = query ? q_gain : k_gain;
    const float rstd = __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)));
    const u32 half = rotary_dims / 2;
    const bool first = d < half;
    const u32 position = min(row.position, positions - 1);
#pragma unroll
    for (u32 i = 0; i < 2; i++) {
      const u32 at = d + i * 4;
      v[i] = mul(mul(v[i], rstd), as<float4>(gain + at));
      if (d >= rotary_dims) continue;
      // Eight dims lie in one half. Those they are rotated with are normed again.
      const u32 other = first ? at + half : at - half;
      const float* angles = rope + size_t(position) * rotary_dims + (first ? at : other);
      const float4 c = as<float4>(angles), s = mul(as<float4>(angles + half), first ? -1.0f : 1.0f);
      const float4 partner = mul(mul(mul(as<float4>(h + other), rstd), as<float4>(gain + other)), s);
      v[i] = make_float4(__fmaf_rn(v[i].x, c.x, partner.x), __fmaf_rn(v[i].y, c.y, partner.y),
                         __fmaf_rn(v[i].z, c.z, partner.z), __fmaf_rn(v[i].w, c.w, partner.w));
    }
  }
  const uint2 low = pack4(v[0]), high = pack4(v[1]);
  const uint4 chunk = make_uint4(low.x, low.y, high.x, high.y);
  if (query || gate) {
    if (!valid || row.query >= query_rows) return;
    const u32 of = query ? head : head - heads - 2 * kv_heads;
    as<uint4>((query ? queries : gates) + (size_t(row.query) * heads + of) * head_dim + d) = chunk;
  } else if (valid && row.slot / PAGE < sequence_pages) {
    const u32 page = table[size_t(row.sequence) * sequence_pages + row.slot / PAGE];
    if (page >= pages) return;
    const u32 of = head - heads - (rotated ? 0 : kv_heads);
    const size_t at = (size_t(page) * kv_heads + of) * (PAGE * head_dim * 2);
    char* to = reinterpret_cast<char*>(rotated ? keys : values) + at;
    as<uint4>(to + page_offset(row.slot, d / 8, head_dim)) = chunk;
  }
}
