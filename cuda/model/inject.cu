// What the drafter makes of the target's features: one projection of all tapped layers, ready for its layers' norms.
//
// Computes: v = features[gather[m]] W^T, zeros where there is no such row; y = bf16(gain * v); sumsq[m][p] of v.
// Work:     grid (ceil(n / 128), splits of K, passes of 8 NT tokens), 256 threads; see linear.cuh.
// Order:    linear.cuh; squares: four columns upwards in a lane, then the lanes' tree.
// Bytes:    n k 2 of weights per pass; m k 2 per 128 rows of W; m n 2 written.
// Needs:    n a multiple of 64, k of 32; 16-byte aligned.
#include "model/epilogues.cuh"

LINEAR_KERNELS(inject, true)
