// Wrappers for every instruction that CUDA C++ does not expose, each next to its host emulation: tensor core
// products, ldmatrix, cp.async, memory accesses with a cache policy, programmatic dependent launch, bf16. The
// emulation of wgmma is long and lives in emulator/wgmma.h. No other file contains inline PTX. Kernels access
// global and shared memory through these wrappers, so that the emulator can check alignment and count bytes
// and bank conflicts.
//
// A bf16 is stored as u16; a u32 holds two, the one of lower index in the lower half. Fragment layouts use
// g = lane / 4 and t = lane % 4.
#pragma once
#ifdef DFLASH_EMULATOR
#include "emulator/emu.h"
#include "emulator/wgmma.h"
#define HOST(...) __VA_ARGS__
#else
#include <stdint.h>
#define HOST(...)
#define KERNEL(threads, blocks, name, parameters) \
  extern "C" __global__ void __launch_bounds__(threads, blocks) name parameters
#define SHARED(T, name, count) __shared__ __align__(16) T name[count]
extern __shared__ __align__(128) unsigned char dynamic_shared[];
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(dynamic_shared)
#endif

typedef uint8_t u8;
typedef uint16_t u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// Last parameter of a wrapper: the caller's source location, only in the emulator.
#ifdef DFLASH_EMULATOR
#define SITE , EMU_SITE
#define SITE_ONLY EMU_SITE
#else
#define SITE
#define SITE_ONLY
#endif
#define WRAPPER __device__ __forceinline__

// --- bf16 ---

// The two bf16 of a pair as f32.
WRAPPER float low_f32(u32 pair) { return __uint_as_float(pair << 16); }
WRAPPER float high_f32(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Rounds to nearest, ties to even; NaN becomes 0x7fff, as the cvt instruction does.
WRAPPER u16 f32_to_bf16(float x) {
#ifdef DFLASH_EMULATOR
  if (x != x) return 0x7fff;
  const u32 bits = __float_as_uint(x);
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#else
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
#endif
}

// Rounds two floats to a pair of bf16, `low` at the lower address.
WRAPPER u32 pack2(float low, float high) {
#ifdef DFLASH_EMULATOR
  return u32(f32_to_bf16(low)) | u32(f32_to_bf16(high)) << 16;
#else
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

// --- special functions ---

// 2^x with relative error 2^-22. -inf gives exactly 0, 0 gives exactly 1, results below 2^-126 are 0.
WRAPPER float ex2(float x) {
#ifdef DFLASH_EMULATOR
  const float y = exp2f(x);
  return y < 1.17549435e-38f ? 0.0f : y;
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// --- tensor cores ---

#ifdef DFLASH_EMULATOR
namespace emu {
struct MmaOperands {
  u32 a[4], b[2];
};
inline void mma_warp(const void** in, void** out) {
  typedef float Four __attribute__((vector_size(16)));
  float a[16][16];
  alignas(16) float b[16][8];
  alignas(16) float d[16][8];
  for (int l = 0; l < 32; l++) {
    const MmaOperands& from = *static_cast<const MmaOperands*>(in[l]);
    const float* c = static_cast<const float*>(out[l]);
    const int g = l / 4, t = l % 4 * 2;
    a[g][t] = low_f32(from.a[0]), a[g][t + 1] = high_f32(from.a[0]);
    a[g + 8][t] = low_f32(from.a[1]), a[g + 8][t + 1] = high_f32(from.a[1]);
    a[g][t + 8] = low_f32(from.a[2]), a[g][t + 9] = high_f32(from.a[2]);
    a[g + 8][t + 8] = low_f32(from.a[3]), a[g + 8][t + 9] = high_f32(from.a[3]);
    b[t][g] = low_f32(from.b[0]), b[t + 1][g] = high_f32(from.b[0]);
    b[t + 8][g] = low_f32(from.b[1]), b[t + 9][g] = high_f32(from.b[1]);
    d[g][t] = c[0], d[g][t + 1] = c[1], d[g + 8][t] = c[2], d[g + 8][t + 1] = c[3];
  }
  // Products of bf16 are exact in f32. The emulator adds them in ascending k; the hardware aligns and
  // truncates instead. Four rows at a time fill the sixteen vector registers of every x86-64 and Arm
  // processor.
  const auto four = [](const float* p) { return *reinterpret_cast<const Four*>(p); };  // p: [4]
  for (int r = 0; r < 16; r += 4) {
    Four sum[4][2];
    for (int i = 0; i < 4; i++) sum[i][0] = four(d[r + i]), sum[i][1] = four(d[r + i] + 4);
    for (int k = 0; k < 16; k++) {
      const Four left = four(b[k]), right = four(b[k] + 4);
      for (int i = 0; i < 4; i++) sum[i][0] += a[r + i][k] * left, sum[i][1] += a[r + i][k] * right;
    }
    for (int i = 0; i < 4; i++) memcpy(d[r + i], sum[i], 32);
  }
  for (int l = 0; l < 32; l++) {
    float* to = static_cast<float*>(out[l]);
    const int g = l / 4, t = l % 4 * 2;
    to[0] = d[g][t], to[1] = d[g][t + 1], to[2] = d[g + 8][t], to[3] = d[g + 8][t + 1];
  }
  block->counts.mma++;
}
}  // namespace emu
#endif

// D[16][8] += A[16][16] B[16][8], bf16 inputs, f32 accumulators, executed by the whole warp.
// a0: A[g][2t..], a1: A[g+8][2t..], a2: A[g][2t+8..], a3: A[g+8][2t+8..]; b0: B[2t..][g], b1: B[2t+8..][g];
// d[0..1]: D[g][2t..], d[2..3]: D[g+8][2t..].
WRAPPER void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1 SITE) {
#ifdef DFLASH_EMULATOR
  emu::MmaOperands operands{{a0, a1, a2, a3}, {b0, b1}};
  emu::warp_collective("mma", EMU_HERE, &operands, d, emu::mma_warp);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// --- wgmma (sm_90a): asynchronous tensor core products of a warpgroup, warps 4i to 4i + 3 ---

#if defined(DFLASH_EMULATOR) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WGMMA 1

// Address in the shared window, as descriptors need it.
WRAPPER u32 shared_address(const void* at) {
#ifdef DFLASH_EMULATOR
  return emu::shared_address(at);
#else
  return u32(__cvta_generic_to_shared(at));
#endif
}

// Descriptor of a K-major operand in shared memory. Addresses and strides are in bytes, multiples of 16.
//   NO_SWIZZLE: 8 rows x 8 k occupy 128 bytes, row by row. The next 8 k start `leading` bytes further, the
//   next 8 rows `stride` bytes further.
//   SWIZZLE_128: 8 rows x 64 k occupy 1024 bytes, aligned to 1024. Chunk c (8 k) of a row is stored at
//   c ^ row % 8. The next 8 rows start `stride` bytes further. Within the 64 k, the next 16 k start 32 bytes
//   further. `leading` is unused.
enum Swizzle : u32 { NO_SWIZZLE = 0, SWIZZLE_128 = 1 };
WRAPPER u64 descriptor(u32 address, u32 leading, u32 stride, Swizzle swizzle) {
  return (address & 0x3ffff) >> 4 | u64(leading >> 4) << 16 | u64(stride >> 4) << 32 | u64(swizzle) << 62;
}
// The descriptor of the same operand `bytes` further.
WRAPPER u64 advance(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }

// Required before the first product, and between a thread's own accesses to the accumulators and the next
// product that adds to them.
WRAPPER void wgmma_fence(SITE_ONLY) {
#ifdef DFLASH_EMULATOR
  emu::wgmma_fence(EMU_HERE);
#else
  asm volatile("wgmma.fence.sync.aligned;" : : : "memory");
#endif
}

// Closes the group of products started since the last commit.
WRAPPER void wgmma_commit(SITE_ONLY) {
#ifdef DFLASH_EMULATOR
  emu::wgmma_commit(EMU_HERE);
#else
  asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory");
#endif
}

// Waits for all groups of products except the newest KEEP. Operands of the finished groups may be
// overwritten, and accumulators may be read if no unfinished product adds to them.
template <int KEEP>
WRAPPER void wgmma_wait(SITE_ONLY) {
#ifdef DFLASH_EMULATOR
  emu::wgmma_wait(KEEP, EMU_HERE);
#else
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(KEEP) : "memory");
#endif
}

// Starts D[64][256] = A[64][16] B[16][256], plus D if `add`: bf16 inputs, f32 accumulators. The whole
// warpgroup passes the same descriptors. Warp w of the four holds rows 16w..16w + 16 of D;
// d[4j + 0, 1]: D[g][8j + 2t..], d[4j + 2, 3]: D[g + 8][8j + 2t..].
WRAPPER void wgmma_bf16(float (&d)[128], u64 a, u64 b, bool add SITE) {
#ifdef DFLASH_EMULATOR
  emu::wgmma(d, 256, {a, b, add}, EMU_HERE);
#else
#define FOUR_OF(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SIXTEEN_OF(i) FOUR_OF(i), FOUR_OF(i + 4), FOUR_OF(i + 8), FOUR_OF(i + 12)
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
      "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
      "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"
      "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,"
      "%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
      "}, %128, %129, add, 1, 1, 0, 0;\n"
      "}"
      : SIXTEEN_OF(0), SIXTEEN_OF(16), SIXTEEN_OF(32), SIXTEEN_OF(48), SIXTEEN_OF(64), SIXTEEN_OF(80), SIXTEEN_OF(96),
        SIXTEEN_OF(112)
      : "l"(a), "l"(b), "r"(u32(add)));
#undef SIXTEEN_OF
#undef FOUR_OF
#endif
}

// Makes this thread's writes to shared memory visible to wgmma, which reads through the async proxy. Belongs
// after the writes (for cp.async: after the wait) and before the barrier that precedes the products.
WRAPPER void fence_proxy_async() {
#ifdef DFLASH_EMULATOR
  emu::lane->fences++;
#else
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
#endif
}
#endif

// --- shared memory ---

#ifdef DFLASH_EMULATOR
namespace emu {
template <bool TRANSPOSED>
inline void ldmatrix(u32 (&r)[4], const void* row, Site site) {
  if (reinterpret_cast<uintptr_t>(row) % 16) fail(site, "ldmatrix of a row at %p, not 16-byte aligned", row);
  warp_collective(TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", site, row, r, [](const void** in, void** out) {
    for (int m = 0; m < 4; m++) {
      uintptr_t addresses[8];
      for (int i = 0; i < 8; i++) addresses[i] = reinterpret_cast<uintptr_t>(in[m * 8 + i]);
      block->counts.conflicts += conflicts(addresses, 8, 16);
      u16 matrix[8][8];
      for (int i = 0; i < 8; i++) memcpy(matrix[i], in[m * 8 + i], 16);
      for (int l = 0; l < 32; l++) {
        const int g = l / 4, t = l % 4 * 2;
        const u16 low = TRANSPOSED ? matrix[t][g] : matrix[g][t];
        const u16 high = TRANSPOSED ? matrix[t + 1][g] : matrix[g][t + 1];
        static_cast<u32*>(out[l])[m] = u32(low) | u32(high) << 16;
      }
    }
    block->counts.shared++;
  });
}
}  // namespace emu
#define LDMATRIX(name, transposed, form) \
  WRAPPER void name(u32 (&r)[4], const void* row SITE) { emu::ldmatrix<transposed>(r, row, EMU_HERE); }
#else
#define LDMATRIX(name, transposed, form)                                                                     \
  WRAPPER void name(u32 (&r)[4], const void* row) {                                                          \
    asm volatile("ldmatrix.sync.aligned.m8n8." form ".shared.b16 {%0,%1,%2,%3}, [%4];"                       \
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                            \
                 : "r"(u32(__cvta_generic_to_shared(row)))                                                   \
                 : "memory");                                                                                \
  }
#endif
// ldmatrix: loads four 8x8 matrices of bf16 from shared memory. Lane 8m + i passes the address of row i of
// matrix m (16 bytes, aligned). Register m of lane (g, t) receives elements [g][2t..2t+1] of matrix m; with
// _trans [2t..2t+1][g].
LDMATRIX(ldmatrix4, false, "x4")
LDMATRIX(ldmatrix4_trans, true, "x4.trans")
#undef LDMATRIX

// One shared memory access of 1 to 16 bytes; the emulator counts its bank conflicts.
template <class T>
WRAPPER T lds(const T* from SITE) {
  HOST(emu::touch_shared(EMU_HERE, "shared load", from, sizeof(T));)
  return *from;
}
template <class T>
WRAPPER void sts(T* to, T value SITE) {
  HOST(emu::touch_shared(EMU_HERE, "shared store", to, sizeof(T)); emu::wrote_shared(to);)
  *to = value;
}
WRAPPER uint4 lds128(const void* from SITE) {
  HOST(emu::touch_shared(EMU_HERE, "16-byte shared load", from, 16);)
  return *static_cast<const uint4*>(from);
}
WRAPPER void sts128(void* to, uint4 value SITE) {
  HOST(emu::touch_shared(EMU_HERE, "16-byte shared store", to, 16); emu::wrote_shared(to);)
  *static_cast<uint4*>(to) = value;
}

// --- asynchronous copies, global to shared, 16 bytes ---

// Starts a copy. If `valid` is false, nothing is read and the destination is filled with zeros. This thread
// may read the bytes after a cp_async_wait that covers the copy's group, other threads after a barrier in
// addition.
WRAPPER void cp_async16(void* to, const void* from, bool valid = true SITE) {
#ifdef DFLASH_EMULATOR
  emu::touch_shared(EMU_HERE, "cp.async into shared memory", to, 16);
  if (valid) {
    emu::touch(EMU_HERE, "cp.async", from, 16);
    emu::block->counts.read += 16;
    // Reads the source now, so that a bad address is reported at this line.
    uint4 now;
    memcpy(&now, from, 16);
    asm volatile("" : : "r"(now.x), "r"(now.w));
  }
  emu::poison(to, 16);
  emu::lane->copies.push_back({to, valid ? from : nullptr, emu::lane->groups});
#else
  const u32 at = u32(__cvta_generic_to_shared(to));
  const u32 bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(at), "l"(from), "r"(bytes) : "memory");
#endif
}

// Closes the group of copies that this thread started since the last commit.
WRAPPER void cp_async_commit() {
#ifdef DFLASH_EMULATOR
  emu::lane->groups++;
#else
  asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}

// Waits for all of this thread's groups except the newest KEEP.
template <int KEEP>
WRAPPER void cp_async_wait() {
#ifdef DFLASH_EMULATOR
  emu::finish_copies(*emu::lane, KEEP);
#else
  asm volatile("cp.async.wait_group %0;" : : "n"(KEEP) : "memory");
#endif
}

// Waits for all of this thread's copies, committed or not.
WRAPPER void cp_async_wait_all() {
#ifdef DFLASH_EMULATOR
  emu::lane->groups++;
  emu::finish_copies(*emu::lane, 0);
#else
  asm volatile("cp.async.wait_all;" : : : "memory");
#endif
}

// --- global memory ---

// Loads 16 bytes of constants, such as weights, without keeping them in L1. No kernel of the round writes
// them, so the load is allowed before grid_wait.
WRAPPER uint4 ld_stream(const void* from SITE) {
#ifdef DFLASH_EMULATOR
  emu::touch(EMU_HERE, "16-byte streaming load", from, 16, true);
  emu::block->counts.streamed += 16;
  return *static_cast<const uint4*>(from);
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
#endif
}

// Starts fetching constants into the L2 cache, also before grid_wait: `bytes` bytes, a multiple of 16, from a
// multiple of 16. Does nothing on GPUs without dependent launch, where nothing could overlap the copy.
WRAPPER void prefetch_l2(const void* from, u32 bytes SITE) {
#ifdef DFLASH_EMULATOR
  emu::touch(EMU_HERE, "L2 prefetch", from, 16, true);
  if (bytes % 16) emu::fail(EMU_HERE, "L2 prefetch of %u bytes, which is not a multiple of 16", bytes);
  if (!emu::lane->waited && emu::block->launch->overlap) {
    emu::check_early_access(EMU_HERE, "L2 prefetch", from, bytes, true);
  }
#elif __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(from), "r"(bytes) : "memory");
#endif
}

// Ordinary loads and stores of 1 to 16 bytes; the emulator counts the bytes.
template <class T>
WRAPPER T ld(const T* from SITE) {
  HOST(emu::touch(EMU_HERE, "load", from, sizeof(T)); emu::block->counts.read += sizeof(T);)
  return *from;
}
template <class T>
WRAPPER void st(T* to, T value SITE) {
  HOST(emu::touch(EMU_HERE, "store", to, sizeof(T)); emu::wrote_global(sizeof(T));)
  *to = value;
}
WRAPPER uint4 ld128(const void* from SITE) {
  HOST(emu::touch(EMU_HERE, "16-byte load", from, 16); emu::block->counts.read += 16;)
  return *static_cast<const uint4*>(from);
}
WRAPPER void st128(void* to, uint4 value SITE) {
  HOST(emu::touch(EMU_HERE, "16-byte store", to, 16); emu::wrote_global(16);)
  *static_cast<uint4*>(to) = value;
}

// Loads and stores that bypass L1, for data exchanged between blocks of one launch (ordered by is_last_block).
#ifdef DFLASH_EMULATOR
#define PAST_L1(T, form, load, store, out, in)                                                   \
  WRAPPER T ld_cg(const T* from SITE) {                                                          \
    emu::touch(EMU_HERE, "load past L1", from, sizeof(T)), emu::block->counts.read += sizeof(T); \
    return *from;                                                                                \
  }                                                                                              \
  WRAPPER void st_cg(T* to, T v SITE) {                                                          \
    emu::touch(EMU_HERE, "store past L1", to, sizeof(T)), emu::wrote_global(sizeof(T));          \
    *to = v;                                                                                     \
  }
#else
#define ONE(c) c(v)
#define FOUR(c) c(v.x), c(v.y), c(v.z), c(v.w)
#define PAST_L1(T, form, load, store, out, in)                                       \
  WRAPPER T ld_cg(const T* from) {                                                   \
    T v;                                                                             \
    asm volatile("ld.global.cg." form " " load ";" : out : "l"(from) : "memory");    \
    return v;                                                                        \
  }                                                                                  \
  WRAPPER void st_cg(T* to, T v) {                                                   \
    asm volatile("st.global.cg." form " " store ";" : : "l"(to), in : "memory");     \
  }
#endif
PAST_L1(u64, "u64", "%0, [%1]", "[%0], %1", ONE("=l"), ONE("l"))
PAST_L1(float, "f32", "%0, [%1]", "[%0], %1", ONE("=f"), ONE("f"))
PAST_L1(float4, "v4.f32", "{%0,%1,%2,%3}, [%4]", "[%0], {%1,%2,%3,%4}", FOUR("=f"), FOUR("f"))
PAST_L1(uint4, "v4.u32", "{%0,%1,%2,%3}, [%4]", "[%0], {%1,%2,%3,%4}", FOUR("=r"), FOUR("r"))
#undef PAST_L1

// Adds to *counter and returns the old value, with acquire and release semantics at GPU scope. The emulator
// fails if another thread of the block has stored to global memory since its last barrier, because the release
// would not cover that store.
WRAPPER u32 atomic_add_acq_rel(u32* counter, u32 value SITE) {
#ifdef DFLASH_EMULATOR
  emu::touch_atomic(EMU_HERE, counter);
  emu::check_release(EMU_HERE);
  return __atomic_fetch_add(counter, value, __ATOMIC_ACQ_REL);
#else
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
  return old;
#endif
}

// A store with release semantics at system scope: a host that reads this value also sees all earlier writes
// that this thread made or observed. Publishes the sequence number of the ring in pinned memory.
WRAPPER void st_release_system(u32* to, u32 value SITE) {
#ifdef DFLASH_EMULATOR
  emu::touch(EMU_HERE, "store", to, 4);
  emu::wrote_global(4);
  __atomic_store_n(to, value, __ATOMIC_RELEASE);
#else
  asm volatile("st.release.sys.global.u32 [%0], %1;" : : "l"(to), "r"(value) : "memory");
#endif
}

// --- programmatic dependent launch (sm_90; on older GPUs kernels run one after the other) ---

// Waits until all earlier kernels have finished and their writes are visible. Before this call a kernel may
// read only constants (ld_stream). Every thread of every kernel must call it before it exits: the next kernel
// waits only for this one, so it could otherwise run while an earlier kernel is still running.
WRAPPER void grid_wait() {
#ifdef DFLASH_EMULATOR
  emu::lane->waited = true;
#elif __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// Allows the next kernel's blocks to be scheduled while this kernel still runs. It orders no memory accesses.
WRAPPER void grid_launch() {
#if !defined(DFLASH_EMULATOR) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}
