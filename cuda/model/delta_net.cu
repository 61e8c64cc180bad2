// Gated DeltaNet (arXiv 2412.06464) between its two projections, and the bookkeeping of its recurrent state.
//
// Computes: delta_net: per row and value head j, with key head g = j / (value_heads / key_heads) and the u of the row
//           and of its three predecessors in bf16,
//             q, k, v = silu(sum of convolution[m] u[m]);  q = q / |q| / sqrt(128), k = k / |k|, |x|^2 = 1e-6 + sum x^2
//             S = decay S;  delta = sigmoid(b) (v - S^T k);  S = S + k delta^T;  o = S^T q
//             out = bf16(norm o / rms(o) silu(z)),  decay = exp(-exp(a_log) softplus(a + dt_bias)).
//           S is the state after the rows of the sequence's last pass that were accepted: these are repeated from their
//           records first (S = decay S + k delta^T, the same two roundings), and the result is stored. A round leaves a
//           record of each of its rows, a prompt the state after its last row. Position 0 follows a state of zeros.
//           delta_net_advance: which position the stored state precedes, the set of records, and the accepted rows.
// Work:     delta_net: grid (value_heads, sequences), 512 threads. Rows in tiles of 16: a warp computes q, k, v of one
//           row; then four lanes share a column of S, with 32 of its 128 elements each; then a warp norms one row.
//           delta_net_advance: grid (sequences), 64 threads.
// Order:    taps ascending. Sums over a column: 32 elements ascending per lane, then xor 1-2. Squares: four ascending
//           per lane, then xor 16-8-4-2-1. A row's bits depend on the rows before it only through S and u.
// Bytes:    S read and written once; per row pitch 4 of `in`, value_heads 256 of `out`, and its record, which is read
//           again if the row is accepted.
// Preconditions: heads of 128; value_heads a multiple of key_heads; rounds of at most min(64, records) rows; pitch a
//           multiple of 4; buffers 16-byte aligned. Headers, spans and masks may hold any value.
#include "common/numbers.cuh"
#include "common/rows.cuh"

constexpr u32 DIM = 128, THREADS = 512, TILE = 16, MAX_ROWS = 64, TAPS = 4;
// Marks a tap that is an entry of the window and not a row.
constexpr u32 WINDOW = 0x80000000u;

// What the state of a sequence stands for, the same in all layers.
struct __align__(16) StateHeader {
  u32 length;         // the stored states follow positions 0..length
  u32 set;            // the set of windows and records that belong to them, 0 or 1
  u32 padding[2];
  u8 path[MAX_ROWS];  // the accepted rows of the last pass, whose records may be repeated
};

struct DeltaNet {
  u16* out;                    // [sequences of the pass][block][value_heads][DIM] bf16
  const float* in;             // [sequences of the pass][block][pitch]: u of q [key_heads][DIM], of k [key_heads][DIM],
                               // of v [value_heads][DIM]; z [value_heads][DIM], b [value_heads], a [value_heads]
  float4* state;               // [sequences][value_heads][8][THREADS]: S of key dims 16j + 4t.. and column c at
                               // [j][4c + t]
  u16* windows;                // [2][sequences][3][channels] bf16: u of the rows before the pass, the oldest first
  u16* inputs;                 // [2][sequences][records][channels] bf16: u of the pass's rows
  float* keys;                 // [2][sequences][records][key_heads][DIM]
  float* deltas;               // [2][sequences][records][value_heads][DIM]
  float* decays;               // [2][sequences][records][value_heads]
  const StateHeader* headers;  // [sequences]
  const Span* spans;           // [sequences of the pass]
  const u64* masks;            // [sequences of the pass][block]: ancestors of a tree's row and itself; null: a chain
  const float* convolution;    // [channels][TAPS]
  const float* a_log;          // [value_heads]
  const float* dt_bias;        // [value_heads]
  const float* norm;           // [DIM]
  u32 block, key_heads, value_heads, records, pitch;
  u32 sequences;
  u32 first;                   // sequence of the pass's first
  u32 prompt;                  // 1: the rows are all accepted
  float eps;
};

// --- small functions ---

DEVICE u64 below(u32 row) { return (1ull << row) - 1; }  // bits of the rows before `row`, which is less than 64
DEVICE float round_bf16(float x) { return low_f32(pack2(x, 0.0f)); }
DEVICE float exp_of(float x) { return ex2(__fmul_rn(x, 1.44269504f)); }
DEVICE float sigmoid(float x) { return __fdiv_rn(1.0f, __fadd_rn(1.0f, exp_of(-x))); }
DEVICE float silu(float x) { return __fdiv_rn(x, __fadd_rn(1.0f, exp_of(-x))); }
DEVICE float4 silu(float4 v) { return make_float4(silu(v.x), silu(v.y), silu(v.z), silu(v.w)); }
DEVICE float decay_of(float a, float a_log) {
  // log(1 + e) with the rounding error of 1 + e taken out.
  const float e = exp_of(a), u = __fadd_rn(1.0f, e);
  const float log1p = u == 1.0f ? e : __fmul_rn(logf(u), __fdiv_rn(e, __fsub_rn(u, 1.0f)));
  const float softplus = a > 20.0f ? a : log1p;
  return exp_of(-__fmul_rn(exp_of(a_log), softplus));
}

// Four elements of a column of S, decayed; and after a row's correction. Replay and recurrence share both.
DEVICE float4 decayed(float4 s, float decay) { return mul(s, decay); }
DEVICE float4 corrected(float4 s, float4 k, float delta) {
  return make_float4(__fmaf_rn(k.x, delta, s.x), __fmaf_rn(k.y, delta, s.y), __fmaf_rn(k.z, delta, s.z),
                     __fmaf_rn(k.w, delta, s.w));
}
// Adds the products of four elements of a column with those of a key or query.
DEVICE float dot(float sum, float4 s, float4 x) {
  return __fmaf_rn(s.w, x.w, __fmaf_rn(s.z, x.z, __fmaf_rn(s.y, x.y, __fmaf_rn(s.x, x.x, sum))));
}
// The sum over the four lanes of a column.
DEVICE float column_sum(float x) {
  x = __fadd_rn(x, __shfl_xor_sync(~0u, x, 1));
  return __fadd_rn(x, __shfl_xor_sync(~0u, x, 2));
}

// --- one value head of one sequence ---

struct Head : DeltaNet {
  // Dynamic shared memory; `SHARED` in src/gpu/kernels/delta_net.rs is its size.
  struct Shared {
    float keys[MAX_ROWS][DIM];  // of row r at r % 64
    float queries[TILE][DIM], values[TILE][DIM], outputs[TILE][DIM];
    float window[3][3][DIM];    // u of the three rows before the pass, the oldest first, of q, k and v
    float decays[MAX_ROWS];     // of row r at r % 64
    float betas[TILE];
  };
  Shared& shared = *reinterpret_cast<Shared*>(dynamic_shared);
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 head = blockIdx.x, sequence = first + blockIdx.y;
  const u32 group = value_heads / key_heads, key_head = head / group;
  const bool leads = head % group == 0;  // this block stores what the value heads of a key head share
  const u32 channels = (2 * key_heads + value_heads) * DIM;
  const size_t first_row = size_t(blockIdx.y) * block;
  u32 set;          // of the windows and records before this pass; it writes the other one
  u32 rows, count;  // rows of this pass; rows of the last pass to repeat
  bool empty;       // nothing precedes the pass
  float4 s[8];      // S of column threadIdx.x / 4, key dims 16j + 4 (lane % 4)..

  DEVICE explicit Head(const DeltaNet& p) : DeltaNet(p) {}

  // Index of sequence's entry in the windows or records of a set.
  DEVICE size_t entry(u32 set) const { return size_t(set & 1) * sequences + sequence; }
  DEVICE size_t record(u32 set, u32 row) const { return entry(set) * records + row; }
  // First channel of q (0), k (1) or v (2) of this head.
  DEVICE u32 channel(u32 part) const {
    return part == 2 ? (2 * key_heads + head) * DIM : (part * key_heads + key_head) * DIM;
  }
  // The i-th accepted row of the last pass.
  DEVICE u32 accepted(u32 i) const { return min(u32(headers[sequence].path[i]), records - 1); }
  DEVICE float u(u32 row, u32 channel) const { return round_bf16(in[(first_row + row) * pitch + channel]); }
  DEVICE const float* key(u32 row) const { return shared.keys[row % MAX_ROWS] + lane % 4 * 4; }
  DEVICE float4* stored() const { return state + (size_t(sequence) * value_heads + head) * 8 * THREADS + threadIdx.x; }

  DEVICE void load_state() {
#pragma unroll
    for (u32 j = 0; j < 8; j++) s[j] = empty ? make_float4(0, 0, 0, 0) : stored()[j * THREADS];
  }
  DEVICE void store_state() const {
#pragma unroll
    for (u32 j = 0; j < 8; j++) stored()[j * THREADS] = s[j];
  }

  // Repeats a recorded row.
  DEVICE void replay(const float* k, float delta, float decay) {  // k: [DIM] from the lane's first
#pragma unroll
    for (u32 j = 0; j < 8; j++) s[j] = corrected(decayed(s[j], decay), as<float4>(k + j * 16), delta);
  }

  // S after the accepted rows of the last pass, and the window that precedes this pass.
  DEVICE void commit() {
    load_state();
#pragma unroll 1
    for (u32 t = 0; t < count; t++) {
      const size_t from = record(set, accepted(t));
      replay(keys + (from * key_heads + key_head) * DIM + lane % 4 * 4,
             deltas[(from * value_heads + head) * DIM + threadIdx.x / 4], decays[from * value_heads + head]);
    }
    if (!prompt && (count || empty)) store_state();
    if (threadIdx.x >= 3 * DIM) return;
    const u32 part = threadIdx.x / DIM, d = threadIdx.x % DIM, c = channel(part) + d;
#pragma unroll
    for (u32 m = 0; m < 3; m++) {
      const u32 at = count + m;  // in the old window and the accepted rows after it
      u16 x = 0;
      if (!empty && at < 3) x = windows[(entry(set) * 3 + at) * channels + c];
      if (!empty && at >= 3) {
        x = inputs[record(set, accepted(at - 3)) * channels + c];
      }
      shared.window[m][part][d] = low_f32(x);
      if (!prompt && (part == 2 || leads)) windows[(entry(set + 1) * 3 + m) * channels + c] = x;
    }
  }

  // The row that `row` follows in this pass; NONE for the first.
  DEVICE u32 parent(u32 row, u64 ancestors) const {
    if (!masks) return row - 1;
    const u32 high = u32(ancestors >> 32), low = u32(ancestors);
    return high ? 63 - u32(__clz(int(high))) : low ? 31 - u32(__clz(int(low))) : NONE;
  }
  DEVICE u64 ancestors(u32 row) const { return masks ? masks[first_row + row] & below(row) : 0; }

  // q, k, v, decay and beta of a row, by one warp; a round also keeps them as its record.
  DEVICE void prepare(u32 row) {
    u32 taps[TAPS], at = row, outside = 0;  // rows of the pass; from WINDOW on entries of the window
    u64 before = ancestors(row);
    taps[3] = row;
#pragma unroll
    for (int m = 2; m >= 0; m--) {
      if (at != NONE) at = parent(at, before);
      taps[m] = at == NONE ? WINDOW + 2 - outside++ : at;
      if (masks && at != NONE) before &= below(at);
    }
    const size_t to = record(set + 1, min(row, records - 1));
    float4 x[3];
#pragma unroll
    for (u32 part = 0; part < 3; part++) {
      const u32 d = lane * 4, c = channel(part) + d;
      float4 tap[TAPS];
#pragma unroll
      for (u32 m = 0; m < TAPS; m++) {
        if (taps[m] >= WINDOW) {
          tap[m] = as<float4>(&shared.window[taps[m] - WINDOW][part][d]);
        } else {
          const uint2 four = pack4(as<float4>(in + (first_row + taps[m]) * pitch + c));
          tap[m] = make_float4(low_f32(four.x), high_f32(four.x), low_f32(four.y), high_f32(four.y));
        }
      }
      if (!prompt && (part == 2 || leads)) as<uint2>(inputs + to * channels + c) = pack4(tap[3]);
      float4 weights[4];
#pragma unroll
      for (u32 i = 0; i < 4; i++) weights[i] = as<float4>(convolution + size_t(c + i) * TAPS);
      const auto convolve = [](float4 w, float a, float b, float c, float d) {
        return __fmaf_rn(w.w, d, __fmaf_rn(w.z, c, __fmaf_rn(w.y, b, __fmul_rn(w.x, a))));
      };
      x[part] = silu(make_float4(convolve(weights[0], tap[0].x, tap[1].x, tap[2].x, tap[3].x),
                                 convolve(weights[1], tap[0].y, tap[1].y, tap[2].y, tap[3].y),
                                 convolve(weights[2], tap[0].z, tap[1].z, tap[2].z, tap[3].z),
                                 convolve(weights[3], tap[0].w, tap[1].w, tap[2].w, tap[3].w)));
    }
    const auto inverse_length = [](float4 v) {
      return __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(lane_sum(sum_of_squares(v), 32), 1e-6f)));
    };
    const float4 q = mul(mul(x[0], inverse_length(x[0])), 0.08838834764f);  // 1 / sqrt(128)
    const float4 k = mul(x[1], inverse_length(x[1]));
    as<float4>(&shared.queries[row % TILE][lane * 4]) = q;
    as<float4>(&shared.keys[row % MAX_ROWS][lane * 4]) = k;
    as<float4>(&shared.values[row % TILE][lane * 4]) = x[2];
    if (!prompt && leads) as<float4>(keys + (to * key_heads + key_head) * DIM + lane * 4) = k;
    if (lane) return;
    const float* gates = in + (first_row + row) * pitch + channels + value_heads * DIM + head;
    const float decay = decay_of(__fadd_rn(gates[value_heads], dt_bias[head]), a_log[head]);
    shared.betas[row % TILE] = sigmoid(gates[0]);
    shared.decays[row % MAX_ROWS] = decay;
    if (!prompt) decays[to * value_heads + head] = decay;
  }

  // The recurrence over one row. S is that of the row before.
  DEVICE void step(u32 row) {
    const u32 column = threadIdx.x / 4;
    if (masks && row && parent(row, ancestors(row)) != row - 1) {
      // Another parent: its path is repeated from the stored state.
#pragma unroll
      for (u32 j = 0; j < 8; j++) s[j] = stored()[j * THREADS];
#pragma unroll 1
      for (u64 left = ancestors(row); left; left &= left - 1) {
        const u32 ancestor = u32(__popcll(left ^ (left - 1))) - 1;
        const size_t from = record(set + 1, min(ancestor, records - 1));
        replay(key(ancestor), deltas[(from * value_heads + head) * DIM + column], shared.decays[ancestor]);
      }
    }
    const float decay = shared.decays[row % MAX_ROWS];
    float sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
      s[j] = decayed(s[j], decay);
      sum = dot(sum, s[j], as<float4>(key(row) + j * 16));
    }
    const float error = __fsub_rn(shared.values[row % TILE][column], column_sum(sum));
    const float delta = __fmul_rn(shared.betas[row % TILE], error);
    const float* q = shared.queries[row % TILE] + lane % 4 * 4;
    sum = 0.0f;
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
      s[j] = corrected(s[j], as<float4>(key(row) + j * 16), delta);
      sum = dot(sum, s[j], as<float4>(q + j * 16));
    }
    sum = column_sum(sum);
    if (lane % 4) return;
    shared.outputs[row % TILE][column] = sum;
    if (!prompt) deltas[(record(set + 1, min(row, records - 1)) * value_heads + head) * DIM + column] = delta;
  }

  // Norm and gate of a row's output, by one warp.
  DEVICE void finish(u32 row) const {
    const float4 o = as<float4>(&shared.outputs[row % TILE][lane * 4]);
    const float mean = __fdiv_rn(lane_sum(sum_of_squares(o), 32), float(DIM));
    const float4 normed = mul(mul(o, __fdiv_rn(1.0f, __fsqrt_rn(__fadd_rn(mean, eps)))), as<float4>(norm + lane * 4));
    const float4 z = as<float4>(in + (first_row + row) * pitch + channels + head * DIM + lane * 4);
    as<uint2>(out + ((first_row + row) * value_heads + head) * DIM + lane * 4) = pack4(mul(normed, silu(z)));
  }

  DEVICE void run() {
    const Span span = spans[blockIdx.y];
    rows = min(span.rows, prompt ? block : min(block, min(records, MAX_ROWS)));
    if (!rows) return;
    const u32 length = headers[sequence].length;
    set = headers[sequence].set;
    empty = span.context == 0;
    count = !empty && span.context > length ? min(min(span.context - length, records), MAX_ROWS) : 0;
    commit();
    __syncthreads();
    for (u32 base = 0; base < rows; base += TILE) {
      if (base + warp < rows) prepare(base + warp);
      __syncthreads();
      for (u32 row = base; row < min(base + TILE, rows); row++) {
        step(row);
        if (masks) __syncwarp();  // the column's other lanes read its deltas
      }
      __syncthreads();
      if (base + warp < rows) finish(base + warp);
    }
    if (!prompt) return;
    store_state();
    const u32 part = threadIdx.x / DIM, d = threadIdx.x % DIM;
    if (part > 2 || (part < 2 && !leads)) return;
#pragma unroll
    for (u32 m = 0; m < 3; m++) {
      const u32 at = rows + m;  // in the window before the pass and its rows
      const float x = at < 3 ? shared.window[at][part][d] : u(at - 3, channel(part) + d);
      windows[(entry(set + 1) * 3 + m) * channels + channel(part) + d] = u16(pack2(x, 0.0f));
    }
  }
};

extern "C" __global__ void __launch_bounds__(512, 1) delta_net(
    u16* out, const float* in, float4* state, u16* windows, u16* inputs, float* keys, float* deltas, float* decays,
    const StateHeader* headers, const Span* spans, const u64* masks, const float* convolution, const float* a_log,
    const float* dt_bias, const float* norm, u32 block, u32 key_heads, u32 value_heads, u32 records, u32 pitch,
    u32 sequences, u32 first, u32 prompt, float eps) {
  grid_launch();
  grid_wait();
  Head(DeltaNet{out, in, state, windows, inputs, keys, deltas, decays, headers, spans, masks, convolution, a_log,
                dt_bias, norm, block, key_heads, value_heads, records, pitch, sequences, first, prompt, eps})
      .run();
}

extern "C" __global__ void __launch_bounds__(64, 8) delta_net_advance(
    StateHeader* headers,  // [sequences]
    const Span* spans,     // [sequences of the pass]
    const u32* path,       // [sequences of the pass][max_verify_rows]: the accepted rows; null: a prompt
    u32 max_verify_rows,
    u32 first) {           // sequence of the pass's first
  grid_launch();
  grid_wait();
  const Span span = spans[blockIdx.x];
  if (!span.rows) return;
  StateHeader* header = headers + first + blockIdx.x;
  const u32 i = threadIdx.x;
  header->path[i] = path && i < max_verify_rows ? u8(path[size_t(blockIdx.x) * max_verify_rows + i]) : 0;
  if (i) return;
  header->length = span.context + (path ? 0 : span.rows);
  header->set = ~header->set & 1;
}
