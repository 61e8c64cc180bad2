// The convolution before a sublayer of a DFlash2 drafter, fused with the projection to its coefficients. The one after
// the sublayer is fused with the output projection: project_convolved in project.cu.
//
// Computes: d[m] = rstd[m] * (in W^T), packed as [group][side][tap];
//           out[m][c] = bf16(sum over o of (base[o][c] + d[m][c / group][0][o]) in[m - o][c] rstd[m - o] / rstd[m]),
//           where m - o is a row of the same block; dynamic[m][o][j] = d[m][j][1][o].
// Work:     grid (blocks of 128 or 256 rows of W, splits of K, 1), 256 threads; see linear.cuh. The block with the
//           results of some groups convolves their channels.
// Order:    linear.cuh; taps ascending.
// Bytes:    n k 2 of weights; m k 2 per block of W; taps k 4 of base; per row taps k 2 read, k 2 and
//           k / group taps 4 written.
// Preconditions: n = k / group 2 taps; taps 1, 2, 4 or 8; group a multiple of 4; k a multiple of 32; at most 128
//           rows, of whole blocks; buffers 16-byte aligned.
#include "model/epilogues.cuh"

LINEAR_KERNELS(convolve, false)
