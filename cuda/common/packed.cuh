// Where a packed matrix keeps its elements: tiles of 16 rows x 32 columns, [half 2][kblock 4][row 8][8] bf16 in each.
#pragma once
#include "common/ptx.cuh"

// Element offset of columns 8 piece.. of packed row `row`, for k columns.
WRAPPER size_t packed_offset(u32 row, u32 piece, u32 k) {
  const size_t tile = size_t(row / 16) * (k / 32) + piece / 4;
  return tile * 512 + row / 8 % 2 * 256 + piece % 4 * 64 + row % 8 * 8;
}
