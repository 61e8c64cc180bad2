// The LM head: logits, and the best of every 128 of them.
//
// Computes: logit[m][v] = softcap(multiplier * rstd[m] * (in W^T)), kept or not; best[m][b], larger is better.
// Work:     grid (ceil(n / 128), splits of K, passes of 8 NT tokens), 256 threads; see linear.cuh.
// Order:    linear.cuh; the best is a maximum of a total order.
// Bytes:    n k 2 of weights per pass; m k 2 per 128 rows of W; m n 4 written where logits are kept.
// Needs:    k a multiple of 32; any n; 16-byte aligned.
#include "model/epilogues.cuh"

#define PARAMETERS_head float *logits, u64 *best, float multiplier, float cap
#define EPILOGUE_head Head{logits, best, multiplier, cap}
LINEAR_KERNELS(head, false)
