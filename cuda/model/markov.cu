// The Markov head of DSpark drafters, one depth of a block per launch. The matrices are multiplied by head.cu: the
// joint layer between the two kernels, and the bias of the logits after them.
//
// Computes:      markov_input: e = table[t] for the token t before the draft of this depth: the anchor, the draft
//                before it, or in a tree the best token of the depth before. H: the draft's row after the final norm.
//                input = e (vanilla), [H ; e] (gated) or [state ; e ; H] (rnn). confidence = sigmoid(w [H ; e] + b).
//                kept = the rows of the block before the first draft of too low a confidence.
//                markov_latent, from z = joint(input) + bias: gated: latent = sigmoid(z) e. rnn: u, m, o = thirds of
//                z; state = sigmoid(u) state + (1 - sigmoid(u)) tanh(m); latent = tanh(o).
// Work:          grid (sequences); 512 threads, two columns per thread and step in markov_input, one in markov_latent.
// Order:         the product with w: ascending columns per thread, lanes by xor 16-8-4-2-1, warps ascending.
// Bytes:         per sequence the row, its sums of squares, e, w and the input; in markov_latent z, its bias, the state
//                and the latent; in a tree also a row of best.
// Preconditions: hidden and rank multiples of 32; block_size 2 to 64, depth 1 to block_size - 1. Tokens may hold any
//                value; e of one outside the vocabulary is 0.
#include "common/state.cuh"
#include "model/linear.cuh"
#include "spec/sampling_weights.cuh"

namespace {

enum MarkovKind : u32 { VANILLA = 0, GATED = 1, RNN = 2 };

DEVICE float sigmoid(float x) { return __fdiv_rn(1.0f, __fadd_rn(1.0f, ex2(__fmul_rn(x, -1.44269504f)))); }

}  // namespace

extern "C" __global__ void __launch_bounds__(512, 1) markov_input(
    u16* input,                 // [sequences][inputs] bf16: rank, hidden + rank, or 2 rank + hidden by kind
    float* confidence,          // [sequences][block_size]; unused without a confidence head
    u32* kept,                  // [sequences], the anchor's row included; as confidence
    const u16* table,           // [vocab][rank] bf16
    const float* weights,       // [weight_count] of the confidence head: [H], or [H ; e]
    const float* bias,          // [1] of the confidence head
    const u16* y,               // [sequences][block_size][hidden] bf16: rows of the block, not yet divided by their rms
    const float* sumsq,         // [sequences][block_size][ceil(hidden / 128)]
    const float* state,         // [sequences][rank] of an rnn; not read at depth 1, where it is 0
    const Sequence* sequences,  // [sequences]
    const u32* drafts,          // [sequences][block_size]
    const u64* best,            // [sequences][block_size][blocks], as in `sample`
    u32 kind, u32 rank, u32 hidden, u32 vocab, u32 blocks, u32 block_size, u32 depth,
    u32 weight_count,           // 0: no confidence head
    float eps) {
  __shared__ __align__(16) u64 warp_maxima[WARPS];
  __shared__ float warp_sums[WARPS];
  __shared__ float scale;
  grid_launch();
  grid_wait();
  const u32 sequence = blockIdx.x;
  const size_t row = size_t(sequence) * block_size + depth;
  const Progress& now = sequences[sequence].now;
  u32 token = now.anchor;
  if (depth > 1 && form_of(now.shape) == CHAIN_OF_DRAFTS) {
    token = drafts[row - 1];
  } else if (depth > 1) {
    const u64 key = best_key(best + (row - 1) * blocks, blocks, warp_maxima);
    token = is_valid_key(key, vocab) ? ~u32(key) : NONE;
  }
  if (threadIdx.x == 0) scale = inverse_rms(sumsq + row * ((hidden + 127) / 128), hidden, eps);
  __syncthreads();

  const u32 inputs = rank + (kind == VANILLA ? 0 : hidden) + (kind == RNN ? rank : 0);
  u16* to = input + size_t(sequence) * inputs;
  u16* to_hidden = to + (kind == RNN ? 2 * rank : 0);
  u16* to_embedding = to + (kind == GATED ? hidden : kind == RNN ? rank : 0);
  float sum = 0;
  for (u32 i = threadIdx.x * 2; i < hidden; i += THREADS * 2) {
    const u32 pair = as<u32>(y + row * hidden + i);
    const float low = __fmul_rn(low_f32(pair), scale), high = __fmul_rn(high_f32(pair), scale);
    if (kind != VANILLA) as<u32>(to_hidden + i) = pack2(low, high);
    if (weight_count) sum = __fmaf_rn(high, weights[i + 1], __fmaf_rn(low, weights[i], sum));
  }
  for (u32 i = threadIdx.x * 2; i < rank; i += THREADS * 2) {
    const u32 pair = token < vocab ? as<u32>(table + size_t(token) * rank + i) : 0;
    as<u32>(to_embedding + i) = pair;
    if (kind == RNN) {
      const float* from = state + size_t(sequence) * rank + i;
      as<u32>(to + i) = depth > 1 ? pack2(from[0], from[1]) : 0;
    }
    if (weight_count > hidden) {
      const float* w = weights + hidden + i;
      sum = __fmaf_rn(high_f32(pair), w[1], __fmaf_rn(low_f32(pair), w[0], sum));
    }
  }
  if (!weight_count) return;
  sum = lane_sum(sum, 32);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (u32 w = 1; w < WARPS; w++) sum += warp_sums[w];
    sum = sigmoid(sum + bias[0]);
    confidence[row] = sum;
    const u32 before = depth > 1 ? kept[sequence] : block_size;
    kept[sequence] = sum < sequences[sequence].min_confidence ? min(before, depth) : before;
  }
}

extern "C" __global__ void __launch_bounds__(512, 2) markov_latent(
    u16* latent,         // [sequences][rank] bf16
    float* state,        // [sequences][rank] of an rnn; not read at depth 1
    const u16* input,    // [sequences][inputs] bf16, as markov_input wrote it
    const float* joint,  // [sequences][rank or 3 rank]
    const float* bias,   // [rank or 3 rank]
    u32 kind,            // GATED or RNN
    u32 rank, u32 hidden, u32 depth) {
  grid_launch();
  grid_wait();
  const size_t sequence = blockIdx.x;
  for (u32 i = threadIdx.x; i < rank; i += THREADS) {
    const float* z = joint + sequence * (kind == RNN ? 3 * rank : rank) + i;
    float out;
    if (kind == RNN) {
      float* own = state + sequence * rank + i;
      const float keep = sigmoid(z[0] + bias[i]), next = tanhf(z[rank] + bias[rank + i]);
      const float old = depth > 1 ? *own : 0;
      *own = __fmaf_rn(keep, old, __fmul_rn(__fsub_rn(1.0f, keep), next));
      out = tanhf(z[2 * rank] + bias[2 * rank + i]);
    } else {
      const u32 e = input[sequence * (hidden + rank) + hidden + i];
      out = __fmul_rn(sigmoid(z[0] + bias[i]), low_f32(e));
    }
    latent[sequence * rank + i] = u16(pack2(out, 0));
  }
}
