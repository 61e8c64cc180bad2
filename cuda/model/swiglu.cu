// Gate and up projections of the MLP, fused with SwiGLU.
//
// Computes: out[m][i] = bf16(silu(gate) * up), where gate and up = rstd[m] * (in W^T) of neuron i.
// Work:     grid (blocks of 128 or 256 rows of W, splits of K, passes of 8 NT tokens), 256 threads; see linear.cuh.
// Order:    linear.cuh.
// Bytes:    n k 2 of weights per pass; m k 2 per block of W; m n written.
// Preconditions: packed tiles of 16 rows: 8 gate rows, then the 8 up rows of the same neurons; n a multiple
//           of 64, k of 32; buffers 16-byte aligned.
#include "model/epilogues.cuh"

LINEAR_KERNELS(swiglu, false)
