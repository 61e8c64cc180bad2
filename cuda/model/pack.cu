// Weights into the order the linear kernels read, once, while they are loaded.
//
// Computes: packed row place[r] = row r of `in`; rows n.. of the last tile = 0.
// Work:     grid (rows + padding rows), one block of 256 threads per row, 16 bytes per thread and turn.
// Order:    nothing is added.
// Bytes:    rows x k x (2 read + 2 written).
// Needs:    k a multiple of 32; in and out 16-byte aligned.
#include "common/packed.cuh"

KERNEL(256, 4, pack,
       (u16* out,            // [ceil(n / 16)][k / 32][half 2][kblock 4][row 8][8] bf16
        const u16* in,       // [rows][k] bf16
        const u32* place,    // [rows] packed row of each row, others than 0..n are left out; or null: first + r
        u32 rows, u32 n, u32 k,
        u32 first)) {        // packed row of row 0 without `place`
  grid_launch();
  grid_wait();
  const bool padding = blockIdx.x >= rows;
  const u32 row = padding ? n + blockIdx.x - rows : place ? ld(place + blockIdx.x) : first + blockIdx.x;
  if (!padding && row >= n) return;
  for (u32 i = threadIdx.x; i < k / 8; i += blockDim.x) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (!padding) v = ld128(in + size_t(blockIdx.x) * k + i * 8);
    st128(out + packed_offset(row, i, k), v);
  }
}
