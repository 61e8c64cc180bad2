// Output projections of attention and MLP: adds into the residual stream and prepares the next norm.
//
// Computes: x += in W^T; y = bf16(gain * x); sumsq[m][p] = sum of x^2 over columns 128p..128p + 128; at tap
//           layers also features = bf16(x). project_convolved: x += conv(in W^T), a convolution along the rows of
//           each block, as in convolve.cu.
// Work:     grid (blocks of 128 or 256 rows of W, splits of K, passes of 8 NT tokens), 256 threads; see linear.cuh.
// Order:    linear.cuh; taps ascending; squares: four columns ascending per lane, then lanes by xor 16-8-4-2-1.
// Bytes:    n k 2 of weights per pass; m k 2 per block of W; m n (4 read + 4 + 2 written). project_convolved: also
//           taps n 4 of base, and m n / group taps 4.
// Preconditions: n and k multiples of 32; buffers 16-byte aligned, feature_pitch a multiple of 4. project_convolved: as
//           convolve.cu; at most 128 rows, of whole blocks.
#include "model/epilogues.cuh"

LINEAR_KERNELS(project, false)
LINEAR_KERNELS(project_convolved, false)
