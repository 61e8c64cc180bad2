// Layout of packed weight matrices: tiles of 16 rows x 32 columns, each [half 2][kblock 4][row 8][8] bf16. A
// half is 8 of the 16 rows, a kblock 8 of the 32 columns.
#pragma once
#include "common/ptx.cuh"

// Element offset of the 8-column chunk `chunk` (columns 8 chunk..8 chunk + 8) of packed row `row` in a matrix
// of k columns.
DEVICE size_t packed_offset(u32 row, u32 chunk, u32 k) {
  const size_t tile = size_t(row / 16) * (k / 32) + chunk / 4;
  return tile * 512 + row / 8 % 2 * 256 + chunk % 4 * 64 + row % 8 * 8;
}
