// Permutes weights into the layout of the linear kernels (common/packed.cuh). Runs once, while weights are
// loaded.
//
// Computes: packed row place[r] = row r of `in`; packed rows from n to the end of the last tile = 0.
// Work:     grid (rows + padding rows), one block of 256 threads per row, 16 bytes per thread and iteration.
// Order:    no additions.
// Bytes:    rows x k x (2 read + 2 written).
// Preconditions: k a multiple of 32; in and out 16-byte aligned.
#include "common/packed.cuh"

extern "C" __global__ void __launch_bounds__(256, 4) pack(
    u16* out,            // [ceil(n / 16)][k / 32][half 2][kblock 4][row 8][8] bf16
    const u16* in,       // [rows][k] bf16
    const u32* place,    // [rows] packed row of each row, skipped if not below n; null: first + r
    u32 rows, u32 n, u32 k,
    u32 first) {         // packed row of row 0 if `place` is null
  grid_launch();
  grid_wait();
  const bool padding = blockIdx.x >= rows;
  const u32 row = padding ? n + blockIdx.x - rows : place ? place[blockIdx.x] : first + blockIdx.x;
  if (!padding && row >= n) return;
  for (u32 i = threadIdx.x; i < k / 8; i += blockDim.x) {
    uint4 v = make_uint4(0, 0, 0, 0);
    if (!padding) v = as<uint4>(in + size_t(blockIdx.x) * k + i * 8);
    as<uint4>(out + packed_offset(row, i, k)) = v;
  }
}
