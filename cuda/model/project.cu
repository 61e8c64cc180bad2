// Output projections of attention and MLP: adds into the residual stream and prepares the next norm.
//
// Computes: x += in W^T; y = bf16(gain * x); sumsq[m][p] = sum of x^2 over columns 128p..128p + 128; at tap
//           layers also features = bf16(x).
// Work:     grid (ceil(n / 128), splits of K, passes of 8 NT tokens), 256 threads; see linear.cuh.
// Order:    linear.cuh; squares: four columns ascending per lane, then lanes by xor 16-8-4-2-1.
// Bytes:    n k 2 of weights per pass; m k 2 per 128 rows of W; m n (4 read + 4 + 2 written).
// Preconditions: n and k multiples of 32; buffers 16-byte aligned, feature_pitch a multiple of 4.
#include "model/epilogues.cuh"

LINEAR_KERNELS(project, false)
