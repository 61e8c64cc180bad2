// Feature injection of the drafter: projects the concatenated features of all tapped target layers to the
// drafter's width, ready for the norms of its layers (docs/dflash.md).
//
// Computes: v = features[gather[m]] W^T, a row of zeros if gather[m] is out of range; y = bf16(gain * v);
//           sumsq[m][p] = sum of v^2 over columns 128p..128p + 128.
// Work:     grid (blocks of 128 or 256 rows of W, splits of K, passes of 8 NT tokens), 256 threads; see linear.cuh.
// Order:    linear.cuh; squares: four columns ascending per lane, then lanes by xor 16-8-4-2-1.
// Bytes:    n k 2 of weights per pass; m k 2 per block of W; m n 2 written.
// Preconditions: n and k multiples of 32; buffers 16-byte aligned.
#include "model/epilogues.cuh"

LINEAR_KERNELS(inject, true)
