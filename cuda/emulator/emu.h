// The CUDA environment of kernels that are compiled as host C++: keywords, indices, barriers, warp
// operations, atomics, arithmetic, and the registration of kernels. Each CUDA thread (here: lane) runs as a
// fiber. emu.cpp implements fibers, schedules and launches; cuda/common/ptx.cuh implements the instructions.
// nvcc never reads this file.
//
// All fibers of a block stay on the OS thread that runs the block. `block` and `lane` are therefore
// thread-local, and several OS threads may run blocks at the same time.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <cwchar>
#include <utility>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

namespace emu {

// A source location in a kernel. Wrappers take it as default arguments, evaluated at the call.
struct Site {
  const char* file;
  int line;
};
#define EMU_SITE const char *emu_file = __builtin_FILE(), int emu_line = __builtin_LINE()
#define EMU_HERE (emu::Site{emu_file, emu_line})

// Fills unwritten memory: a NaN as bf16 and as f32, and as an integer far outside any index range.
constexpr uint32_t POISON = 0xffa5ffa5;
static_assert(sizeof(wchar_t) == 4, "wmemset writes words");
inline void poison(void* to, size_t bytes) {
  wmemset(static_cast<wchar_t*>(to), wchar_t(POISON), bytes / 4);
  memcpy(static_cast<char*>(to) + bytes / 4 * 4, &POISON, bytes % 4);
}

// What a launch did, as counted by the wrappers. Mirrored by src/gpu/emulator.rs.
struct Counts {
  uint64_t blocks;     // blocks executed
  uint64_t streamed;   // bytes read by ld_stream: weights and other constants
  uint64_t read;       // bytes read by all other global loads, including cp.async
  uint64_t written;    // bytes written by global stores and atomics
  uint64_t mma;        // warp-wide mma.m16n8k16; a wgmma counts as n / 8 of them per warp
  uint64_t shared;     // warp-wide shared-memory accesses checked for bank conflicts
  uint64_t conflicts;  // extra passes that their bank conflicts cost
};

// A cp.async in flight. The destination is poison until a wait covers the copy's group.
struct Copy {
  void* to;
  const void* from;  // null: zeros
  uint32_t group;
};

// The last thread that wrote to 16 bytes of dynamic shared memory, and how many proxy fences it had executed.
struct Writer {
  uint32_t lane : 11;  // NO_WRITER: not written yet
  uint32_t fences : 21;
};
constexpr uint32_t NO_WRITER = 2047;

// One shared-memory access through a wrapper, kept until the next barrier, where it is matched with the other
// lanes' accesses.
struct Access {
  int line;
  uint32_t bytes;
  uintptr_t address;
};

enum class LaneState : uint8_t { Running, AtWarpOperation, AtBarrier, Done };

struct Lane {
  void* sp;         // stack pointer, saved while another lane runs
  char* stack;      // lowest address
  void* fake;       // AddressSanitizer's fake stack, saved while another lane runs
  dim3 thread;      // threadIdx
  unsigned index;   // linear; warp = index / 32
  LaneState state;
  bool waited;      // has called grid_wait
  const char* operation;
  Site site;
  uint32_t groups;  // committed cp.async groups
  uint32_t fences;  // fence.proxy.async executed
  bool stored;      // has stored to global memory since its last barrier
  std::vector<Copy> copies;
  std::vector<Access> accesses;
};

// A warp's part of a wgmma in flight. Its operands must not change before the wait for its group.
struct PendingWgmma {
  uint32_t group;
  uint64_t a, b;  // matrix descriptors
  unsigned n;
  Site site;
  std::vector<uint4> operands;
};

// The accumulators of wgmmas in flight. The lanes' own registers are poison until the wait.
struct PendingSums {
  float* to[32];
  unsigned n;
  uint32_t group;             // of the last wgmma that adds to them
  std::vector<float> values;  // [16][n]
};

// A warp's wgmma state (wgmma.h).
struct Wgmma {
  bool fenced;      // a wgmma.fence was executed after the last wait that returned sums to the lanes
  uint32_t groups;  // committed groups
  size_t issued;    // wgmmas since the block began
  std::vector<PendingWgmma> pending;
  std::vector<PendingSums> sums;
};

struct Warp {
  unsigned arrived;
  const char* operation;
  int line;
  const void* in[32];
  void* out[32];
  Wgmma wgmma;
};

struct Kernel {
  const char* name;
  const char* file;
  unsigned threads;
  void (*call)(void** arguments);
  const char* parameters;  // one letter each: p pointer, u u32, i i32, U u64, I i64, f f32
  Kernel* next;
};

// Sealed memory: no kernel writes it, so it may be read before grid_wait.
struct Range {
  uintptr_t begin, end;
};

// One launch, filled in by src/gpu/emulator.rs.
struct Launch {
  const Kernel* kernel;
  void** arguments;
  unsigned grid[3];
  unsigned shared;     // dynamic shared memory, bytes
  unsigned schedule;   // 0 in order, 1 reversed, 2 shuffled, 3 and 4 warp-greedy ascending and descending
  unsigned conflicts;  // nonzero: also count bank conflicts of per-lane accesses
  unsigned overlap;    // nonzero: enforce the rules of programmatic dependent launch
  uint64_t seed;
  const Range* sealed;  // ascending
  size_t sealed_count;
};

struct Block {
  dim3 index, size, grid;
  const Launch* launch;
  unsigned threads, warps, num_active, waiting, current;
  const char* barrier_file;
  int barrier_line;
  uint64_t random, serial;
  unsigned char* shared;
  uint32_t ready[32], any;  // bit masks: runnable lanes of each warp, warps with a runnable lane
  bool failed;
  Counts counts;
  Lane* lanes;
  Warp warp[32];
  std::vector<std::pair<uint64_t, uint64_t>> issued[8];  // per warpgroup: descriptors of its wgmmas
  std::vector<Writer> writers;                           // per 16 bytes of dynamic shared memory
};

inline thread_local Block* block = nullptr;
inline thread_local Lane* lane = nullptr;

// Ends the block with an error at the running lane.
[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(Site site, const char* format, ...);
[[noreturn]] void fail_diverged(const char* operation, Site site);
// Runs the next lane of the schedule. Returns when this lane is ready and the schedule chooses it.
void suspend();
void barrier(Site site);
void finish_copies(Lane& lane, uint32_t keep);
// Memory of a static shared array, of exactly this size, poisoned once per block.
void* shared_array(size_t bytes, void** memory, uint64_t* serial);
// Fails unless the access is `constant` (ld_stream) and its memory is sealed.
void check_early_access(Site site, const char* what, const void* address, size_t bytes, bool constant);
// Extra passes that an access of `count` lanes to shared memory costs.
unsigned conflicts(const uintptr_t* addresses, unsigned count, unsigned bytes);

// A warp-wide operation. Each of the 32 lanes passes its operands and where to store its result. The last
// lane to arrive computes all results.
template <class Compute>
inline void warp_collective(const char* operation, Site site, const void* in, void* out, Compute compute) {
  Lane& me = *lane;
  Block& b = *block;
  Warp& warp = b.warp[me.index / 32];
  const unsigned l = me.index % 32;
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.line = site.line;
  } else if (warp.operation != operation || warp.line != site.line) {
    fail_diverged(operation, site);
  }
  warp.in[l] = in;
  warp.out[l] = out;
  if (++warp.arrived < 32) {
    me.state = LaneState::AtWarpOperation;
    me.operation = operation;
    me.site = site;
    suspend();
    return;
  }
  compute(warp.in, warp.out);
  warp.arrived = 0;
  const unsigned w = me.index / 32;
  for (unsigned i = 0; i < 32; i++) b.lanes[w * 32 + i].state = LaneState::Running;
  b.ready[w] = ~0u;
  b.any |= 1u << w;
  suspend();  // the schedule chooses which lane continues
}

// Checks a global-memory access through a wrapper: its alignment, and the rules of dependent launch if the
// launch asks for them.
inline void touch(Site site, const char* what, const void* address, size_t bytes, bool constant = false) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    fail(site, "%s at address %p, which is not a multiple of %zu", what, address, bytes);
  }
  if (!lane->waited && block->launch->overlap) check_early_access(site, what, address, bytes, constant);
}

inline void touch_shared(Site site, const char* what, const void* address, uint32_t bytes) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(address);
  if (at % bytes) fail(site, "%s at address %p, which is not a multiple of %u", what, address, bytes);
  if (block->launch->conflicts) lane->accesses.push_back({site.line, bytes, at});
}

// Records the running lane as the last writer of 16 bytes of dynamic shared memory, by an ordinary store
// or copy.
inline void wrote_shared(const void* to) {
  const uintptr_t at = reinterpret_cast<uintptr_t>(to) - reinterpret_cast<uintptr_t>(block->shared);
  if (at < block->launch->shared) block->writers[at / 16] = {lane->index, lane->fences};
}

// Counts and records a store to global memory.
inline void wrote_global(uint64_t bytes) {
  block->counts.written += bytes;
  lane->stored = true;
}

// Fails if a barrier is missing between the stores of the block's other lanes and the running lane's release.
inline void check_release(Site site) {
  for (unsigned i = 0; i < block->threads; i++) {
    if (i == lane->index || !block->lanes[i].stored) continue;
    fail(site, "release before a barrier: thread %u has stored to global memory since its last one", i);
  }
}

template <class T>
struct TypeLetter;
template <class T>
struct TypeLetter<T*> {
  static constexpr char value = 'p';
};
template <>
struct TypeLetter<unsigned> {
  static constexpr char value = 'u';
};
template <>
struct TypeLetter<int> {
  static constexpr char value = 'i';
};
template <>
struct TypeLetter<unsigned long> {
  static constexpr char value = 'U';
};
template <>
struct TypeLetter<unsigned long long> {
  static constexpr char value = 'U';
};
template <>
struct TypeLetter<long> {
  static constexpr char value = 'I';
};
template <>
struct TypeLetter<long long> {
  static constexpr char value = 'I';
};
template <>
struct TypeLetter<float> {
  static constexpr char value = 'f';
};

template <class... A, size_t... I>
inline void call_with(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<A*>(arguments[I])...);
}

// The kernels of one source file, linked into a list by static initialisers. emu.cpp reads the lists.
static Kernel* kernels_of_this_file = nullptr;

template <auto kernel>
struct Call;
template <class... A, void (*kernel)(A...)>
struct Call<kernel> {
  static constexpr char letters[] = {TypeLetter<A>::value..., 0};
  static void run(void** arguments) { call_with(kernel, arguments, std::index_sequence_for<A...>{}); }
};

template <auto kernel>
struct Registration {
  Kernel entry;
  Registration(const char* name, const char* file, unsigned threads)
      : entry{name, file, threads, &Call<kernel>::run, Call<kernel>::letters, kernels_of_this_file} {
    kernels_of_this_file = &entry;
  }
};

template <class T, size_t N>
struct SharedArray {
  void* memory = nullptr;
  uint64_t serial = 0;
  T (&get())[N] { return *static_cast<T(*)[N]>(shared_array(sizeof(T) * N, &memory, &serial)); }
};

}  // namespace emu

// KERNEL(threads per block, blocks per SM to aim for, name, (parameters)) { body }
#define KERNEL(threads, blocks, name, parameters) EMU_KERNEL(threads, name, parameters)
#define EMU_KERNEL(threads, name, parameters)                                                            \
  static void name parameters;                                                                           \
  static_assert((threads) % 32 == 0 && (threads) <= 1024, "a block is made of whole warps, at most 32"); \
  static emu::Registration<&name> name##_registration(#name, __FILE__, threads);                         \
  static void name parameters

// SHARED(type, name, count): an array in static shared memory, 16-byte aligned.
#define SHARED(T, name, count)                              \
  static thread_local emu::SharedArray<T, count> name##_in; \
  T(&name)[count] = name##_in.get()

// DYNAMIC_SHARED(type, name): the launch's dynamic shared memory, 128-byte aligned.
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emu::block->shared)

// Exports the list of this file's kernels under a name that emu.cpp knows.
#define EMU_JOIN_(a, b) a##b
#define EMU_JOIN(a, b) EMU_JOIN_(a, b)
#ifdef DFLASH_FILE
extern "C" emu::Kernel* EMU_JOIN(dflash_kernels_, DFLASH_FILE)() { return emu::kernels_of_this_file; }
#endif

#define threadIdx (emu::lane->thread)
#define blockIdx (emu::block->index)
#define blockDim (emu::block->size)
#define gridDim (emu::block->grid)

inline void __syncthreads(EMU_SITE) { emu::barrier(EMU_HERE); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
[[noreturn]] inline void __trap(EMU_SITE) { emu::fail(EMU_HERE, "the kernel called __trap()"); }

// --- warp operations: all 32 lanes, full mask ---

namespace emu {

inline void require_full_mask(unsigned mask, Site site) {
  if (mask != 0xffffffffu) fail(site, "warp operation with mask %08x, expected the full mask ffffffff", mask);
}

template <class T>
struct Shuffle {
  T value;
  unsigned source;
};

template <class T>
inline T shuffle(const char* name, Site site, T value, unsigned source) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 or 64 bits");
  Shuffle<T> mine{value, source};
  T result;
  warp_collective(name, site, &mine, &result, [](const void** in, void** out) {
    for (unsigned l = 0; l < 32; l++) {
      const unsigned from = static_cast<const Shuffle<T>*>(in[l])->source;
      *static_cast<T*>(out[l]) = static_cast<const Shuffle<T>*>(in[from])->value;
    }
  });
  return result;
}

inline unsigned lane_id() { return lane->index % 32; }

// Combines the 32 operands in lane order and returns the result to all lanes.
template <class T, class Combine>
inline T reduce(const char* name, Site site, T value, Combine combine) {
  T result;
  warp_collective(name, site, &value, &result, [&](const void** in, void** out) {
    T sum = *static_cast<const T*>(in[0]);
    for (unsigned l = 1; l < 32; l++) sum = combine(sum, *static_cast<const T*>(in[l]));
    for (unsigned l = 0; l < 32; l++) *static_cast<T*>(out[l]) = sum;
  });
  return result;
}

}  // namespace emu

inline void __syncwarp(unsigned mask = 0xffffffffu, EMU_SITE) {
  emu::require_full_mask(mask, EMU_HERE);
  emu::warp_collective("__syncwarp", EMU_HERE, nullptr, nullptr, [](const void**, void**) {});
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int source, int width = 32, EMU_SITE) {
  emu::require_full_mask(mask, EMU_HERE);
  const unsigned l = emu::lane_id(), w = unsigned(width);
  return emu::shuffle("__shfl_sync", EMU_HERE, value, (l & ~(w - 1)) | (unsigned(source) & (w - 1)));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, EMU_SITE) {
  emu::require_full_mask(mask, EMU_HERE);
  const unsigned l = emu::lane_id(), from = l ^ unsigned(flip);
  // As in CUDA, a source lane after this lane's segment is not read; one in an earlier segment is.
  return emu::shuffle("__shfl_xor_sync", EMU_HERE, value, from > (l | unsigned(width - 1)) ? l : from & 31);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, EMU_SITE) {
  emu::require_full_mask(mask, EMU_HERE);
  const unsigned l = emu::lane_id(), place = l & unsigned(width - 1);
  return emu::shuffle("__shfl_up_sync", EMU_HERE, value, place < by ? l : l - by);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, EMU_SITE) {
  emu::require_full_mask(mask, EMU_HERE);
  const unsigned l = emu::lane_id(), place = l & unsigned(width - 1);
  return emu::shuffle("__shfl_down_sync", EMU_HERE, value, by >= unsigned(width) - place ? l : l + by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, EMU_SITE) {
  emu::require_full_mask(mask, EMU_HERE);
  return emu::reduce("__ballot_sync", EMU_HERE, predicate ? 1u << emu::lane_id() : 0u,
                     [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int predicate, EMU_SITE) {
  emu::require_full_mask(mask, EMU_HERE);
  return emu::reduce("__any_sync", EMU_HERE, int(predicate != 0), [](int a, int b) { return a | b; });
}
inline int __all_sync(unsigned mask, int predicate, EMU_SITE) {
  emu::require_full_mask(mask, EMU_HERE);
  return emu::reduce("__all_sync", EMU_HERE, int(predicate != 0), [](int a, int b) { return a & b; });
}
template <class T>
inline T __reduce_add_sync(unsigned mask, T value, EMU_SITE) {
  static_assert(sizeof(T) == 4, "32-bit integers");
  emu::require_full_mask(mask, EMU_HERE);
  return T(emu::reduce("__reduce_add_sync", EMU_HERE, unsigned(value), [](unsigned a, unsigned b) { return a + b; }));
}
template <class T>
inline T __reduce_max_sync(unsigned mask, T value, EMU_SITE) {
  emu::require_full_mask(mask, EMU_HERE);
  return emu::reduce("__reduce_max_sync", EMU_HERE, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
inline T __reduce_min_sync(unsigned mask, T value, EMU_SITE) {
  emu::require_full_mask(mask, EMU_HERE);
  return emu::reduce("__reduce_min_sync", EMU_HERE, value, [](T a, T b) { return a < b ? a : b; });
}
inline unsigned __reduce_or_sync(unsigned mask, unsigned value, EMU_SITE) {
  emu::require_full_mask(mask, EMU_HERE);
  return emu::reduce("__reduce_or_sync", EMU_HERE, value, [](unsigned a, unsigned b) { return a | b; });
}

// --- atomics: integers only, because a float sum would depend on the order of arrival ---

namespace emu {
template <class T>
inline void touch_atomic(Site site, T* address) {
  touch(site, "atomic", address, sizeof(T));
  block->counts.written += sizeof(T);
}
template <class T, class Next>
inline T update(T* address, Next next) {
  T old = __atomic_load_n(address, __ATOMIC_SEQ_CST);
  while (!__atomic_compare_exchange_n(address, &old, next(old), false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return old;
}
}  // namespace emu

#define EMU_ATOMICS(T)                                                             \
  inline T atomicAdd(T* address, T value, EMU_SITE) {                              \
    emu::touch_atomic(EMU_HERE, address);                                          \
    return __atomic_fetch_add(address, value, __ATOMIC_SEQ_CST);                   \
  }                                                                                \
  inline T atomicOr(T* address, T value, EMU_SITE) {                               \
    emu::touch_atomic(EMU_HERE, address);                                          \
    return __atomic_fetch_or(address, value, __ATOMIC_SEQ_CST);                    \
  }                                                                                \
  inline T atomicAnd(T* address, T value, EMU_SITE) {                              \
    emu::touch_atomic(EMU_HERE, address);                                          \
    return __atomic_fetch_and(address, value, __ATOMIC_SEQ_CST);                   \
  }                                                                                \
  inline T atomicExch(T* address, T value, EMU_SITE) {                             \
    emu::touch_atomic(EMU_HERE, address);                                          \
    return __atomic_exchange_n(address, value, __ATOMIC_SEQ_CST);                  \
  }                                                                                \
  inline T atomicMax(T* address, T value, EMU_SITE) {                              \
    emu::touch_atomic(EMU_HERE, address);                                          \
    return emu::update(address, [=](T old) { return old > value ? old : value; }); \
  }                                                                                \
  inline T atomicMin(T* address, T value, EMU_SITE) {                              \
    emu::touch_atomic(EMU_HERE, address);                                          \
    return emu::update(address, [=](T old) { return old < value ? old : value; }); \
  }                                                                                \
  inline T atomicCAS(T* address, T compare, T value, EMU_SITE) {                   \
    emu::touch_atomic(EMU_HERE, address);                                          \
    return emu::update(address, [=](T old) { return old == compare ? value : old; }); \
  }
EMU_ATOMICS(int)
EMU_ATOMICS(unsigned)
EMU_ATOMICS(unsigned long long)
#undef EMU_ATOMICS

// --- CUDA's built-in arithmetic; compiled without contraction, so that * and + round separately ---

inline unsigned __float_as_uint(float x) {
  unsigned u;
  memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline int __float_as_int(float x) { return int(__float_as_uint(x)); }
inline float __int_as_float(int i) { return __uint_as_float(unsigned(i)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return sqrtf(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __float2int_rn(float x) { return int(lrintf(x)); }
// As on hardware: out-of-range values saturate, NaN becomes 0.
inline int __float2int_rz(float x) {
  return x != x ? 0 : x >= 2147483648.0f ? 2147483647 : x <= -2147483648.0f ? -2147483647 - 1 : int(x);
}
inline unsigned __float2uint_rz(float x) { return !(x > 0.0f) ? 0u : x >= 4294967296.0f ? ~0u : unsigned(x); }
inline unsigned long long __float2ull_rz(float x) {
  return !(x > 0.0f) ? 0ull : x >= 18446744073709551616.0f ? ~0ull : (unsigned long long)(x);
}
inline unsigned long long __float2ull_rn(float x) { return __float2ull_rz(rintf(x)); }
inline float __int2float_rn(int x) { return float(x); }
inline float __uint2float_rn(unsigned x) { return float(x); }
inline float __ull2float_rn(unsigned long long x) { return float(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((static_cast<unsigned __int128>(a) * b) >> 64);
}
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)(x)) : 64; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline unsigned long long min(unsigned long long a, unsigned long long b) { return a < b ? a : b; }
inline unsigned long long max(unsigned long long a, unsigned long long b) { return a > b ? a : b; }
