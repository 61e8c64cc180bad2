// A linear layer whose results another kernel processes: the projections of Gated DeltaNet and of gated attention.
//
// Computes: out[m][n] = rstd[m] * (in W^T), in f32.
// Work:     grid (ceil(n / 128), splits of K, passes of 8 NT tokens), 256 threads; see linear.cuh.
// Order:    linear.cuh.
// Bytes:    n k 2 of weights per pass; m k 2 per 128 rows of W; m n 4 written.
// Preconditions: k a multiple of 32; pitch a multiple of 4, at least n; buffers 16-byte aligned.
#include "model/epilogues.cuh"

LINEAR_KERNELS(plain, false)
