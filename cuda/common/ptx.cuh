// The PTX instructions that CUDA C++ does not expose, one function each: tensor core products, ldmatrix, cp.async,
// memory accesses with a cache policy, programmatic dependent launch, conversions to bf16. No other file contains
// inline PTX.
//
// A bf16 is stored as u16; a u32 holds two, the one of lower index in the lower half. Fragment layouts use
// g = lane / 4 and t = lane % 4.
#pragma once
#include <stdint.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// The dynamic shared memory of the launch.
extern __shared__ __align__(128) unsigned char dynamic_shared[];

#define DEVICE __device__ __forceinline__

// The memory at `at`, aligned to sizeof(T), as a T, for one access: as<float4>(to) = as<float4>(from).
template <class T>
DEVICE T as(const void* at) {
  return *static_cast<const T*>(at);
}
template <class T>
DEVICE T& as(void* at) {
  return *static_cast<T*>(at);
}

// --- bf16 ---

// The two bf16 of a pair as f32.
DEVICE float low_f32(u32 pair) { return __uint_as_float(pair << 16); }
DEVICE float high_f32(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }

// Rounds two floats to nearest, ties to even, to a pair of bf16, `low` at the lower address. NaN becomes 0x7fff.
DEVICE u32 pack2(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// --- special functions ---

// 2^x with relative error 2^-22. -inf gives exactly 0, 0 gives exactly 1, results below 2^-126 are 0.
DEVICE float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// --- tensor cores ---

// D[16][8] += A[16][16] B[16][8], bf16 inputs, f32 accumulators, executed by the whole warp.
// a0: A[g][2t..], a1: A[g+8][2t..], a2: A[g][2t+8..], a3: A[g+8][2t+8..]; b0: B[2t..][g], b1: B[2t+8..][g];
// d[0..1]: D[g][2t..], d[2..3]: D[g+8][2t..].
DEVICE void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// --- wgmma (sm_90a): asynchronous tensor core products of a warpgroup, warps 4i to 4i + 3 ---

// Address in the shared window, as descriptors need it.
DEVICE u32 shared_address(const void* at) { return u32(__cvta_generic_to_shared(at)); }

// Descriptor of a K-major operand in shared memory. Addresses and strides are in bytes, multiples of 16.
//   NO_SWIZZLE: 8 rows x 8 k occupy 128 bytes, row by row. The next 8 k start `leading` bytes further, the
//   next 8 rows `stride` bytes further.
//   SWIZZLE_128: 8 rows x 64 k occupy 1024 bytes, aligned to 1024. Chunk c (8 k) of a row is stored at
//   c ^ row % 8. The next 8 rows start `stride` bytes further. Within the 64 k, the next 16 k start 32 bytes
//   further. `leading` is unused.
enum Swizzle : u32 { NO_SWIZZLE = 0, SWIZZLE_128 = 1 };
DEVICE u64 descriptor(u32 address, u32 leading, u32 stride, Swizzle swizzle) {
  return (address & 0x3ffff) >> 4 | u64(leading >> 4) << 16 | u64(stride >> 4) << 32 | u64(swizzle) << 62;
}
// The descriptor of the same operand `bytes` further.
DEVICE u64 advance(u64 descriptor, u32 bytes) { return descriptor + (bytes >> 4); }

// Required before the first product, and between a thread's own accesses to the accumulators and the next
// product that adds to them.
DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }

// Closes the group of products started since the last commit.
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

// Waits for all groups of products except the newest KEEP. Operands of the finished groups may be
// overwritten, and accumulators may be read if no unfinished product adds to them.
template <int KEEP>
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(KEEP) : "memory"); }

// Starts D[64][256] = A[64][16] B[16][256], plus D if `add`: bf16 inputs, f32 accumulators. The whole
// warpgroup passes the same descriptors. Warp w of the four holds rows 16w..16w + 16 of D;
// d[4j + 0, 1]: D[g][8j + 2t..], d[4j + 2, 3]: D[g + 8][8j + 2t..].
DEVICE void wgmma_bf16(float (&d)[128], u64 a, u64 b, bool add) {
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
}

// Makes this thread's writes to shared memory visible to wgmma, which reads through the async proxy. Belongs
// after the writes (for cp.async: after the wait) and before the barrier that precedes the products.
DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" : : : "memory"); }

// --- shared memory ---

// Loads four 8x8 matrices of bf16 from shared memory, from a shared address plus OFFSET bytes. Lane 8m + i passes
// the address of row i of matrix m (16 bytes, aligned). Register m of lane (g, t) receives elements [g][2t..2t+1] of
// matrix m.
template <int OFFSET = 0>
DEVICE void ldmatrix4(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row), "n"(OFFSET)
               : "memory");
}
// The same, but register m receives elements [2t..2t+1][g].
template <int OFFSET = 0>
DEVICE void ldmatrix4_trans(u32 (&r)[4], u32 row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row), "n"(OFFSET)
               : "memory");
}

// --- asynchronous copies, global to shared, 16 bytes ---

// Starts a copy. If `valid` is false, nothing is read and the destination is filled with zeros. This thread
// may read the bytes after a cp_async_wait that covers the copy's group, other threads after a barrier in
// addition.
DEVICE void cp_async16(void* to, const void* from, bool valid = true) {
  const u32 at = u32(__cvta_generic_to_shared(to));
  const u32 bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" : : "r"(at), "l"(from), "r"(bytes) : "memory");
}

// The same from OFFSET bytes after `from` to OFFSET bytes after shared address `to`; reads `bytes` bytes, 16 or 0.
template <int OFFSET>
DEVICE void cp_async16(u32 to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0+%3], [%1+%3], 16, %2;" : : "r"(to), "l"(from), "r"(bytes), "n"(OFFSET)
               : "memory");
}

// Closes the group of copies that this thread started since the last commit.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits for all of this thread's groups except the newest KEEP.
template <int KEEP>
DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" : : "n"(KEEP) : "memory"); }

// Waits for all of this thread's copies, committed or not.
DEVICE void cp_async_wait_all() { asm volatile("cp.async.wait_all;" : : : "memory"); }

// --- global memory ---

// Loads 16 bytes of constants, such as weights, without keeping them in L1. No kernel of the round writes
// them, so the load is allowed before grid_wait.
DEVICE uint4 ld_stream(const void* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(from));
  return v;
}

// Starts fetching constants into the L2 cache, also before grid_wait: `bytes` bytes, a multiple of 16, from a
// multiple of 16. Does nothing on GPUs without dependent launch, where nothing could overlap the copy.
DEVICE void prefetch_l2(const void* from, u32 bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" : : "l"(from), "r"(bytes) : "memory");
#endif
}

// Loads and stores that bypass L1, for data exchanged between blocks of one launch (ordered by is_last_block).
#define ONE(c) c(v)
#define FOUR(c) c(v.x), c(v.y), c(v.z), c(v.w)
#define PAST_L1(T, form, load, store, out, in)                                    \
  DEVICE T ld_cg(const T* from) {                                                 \
    T v;                                                                          \
    asm volatile("ld.global.cg." form " " load ";" : out : "l"(from) : "memory"); \
    return v;                                                                     \
  }                                                                               \
  DEVICE void st_cg(T* to, T v) {                                                 \
    asm volatile("st.global.cg." form " " store ";" : : "l"(to), in : "memory");  \
  }
PAST_L1(u64, "u64", "%0, [%1]", "[%0], %1", ONE("=l"), ONE("l"))
PAST_L1(float, "f32", "%0, [%1]", "[%0], %1", ONE("=f"), ONE("f"))
PAST_L1(float4, "v4.f32", "{%0,%1,%2,%3}, [%4]", "[%0], {%1,%2,%3,%4}", FOUR("=f"), FOUR("f"))
PAST_L1(uint4, "v4.u32", "{%0,%1,%2,%3}, [%4]", "[%0], {%1,%2,%3,%4}", FOUR("=r"), FOUR("r"))
#undef PAST_L1
#undef FOUR
#undef ONE

// Adds to *counter and returns the old value, with acquire and release semantics at GPU scope. The release covers
// the stores of this thread, and those of other threads of the block only after a barrier.
DEVICE u32 atomic_add_acq_rel(u32* counter, u32 value) {
  u32 old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(counter), "r"(value) : "memory");
  return old;
}

// A store with release semantics at system scope: a host that reads this value also sees all earlier writes
// that this thread made or observed. Publishes the sequence number of the ring in pinned memory.
DEVICE void st_release_system(u32* to, u32 value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" : : "l"(to), "r"(value) : "memory");
}

// --- programmatic dependent launch (sm_90 and newer; on older GPUs kernels run one after the other) ---

// Waits until all earlier kernels have finished and their writes are visible. Before this call a kernel may
// read only constants (ld_stream). Every thread of every kernel must call it before it exits: the next kernel
// waits only for this one, so it could otherwise run while an earlier kernel is still running.
DEVICE void grid_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
#endif
}

// Allows the next kernel's blocks to be scheduled while this kernel still runs. It orders no memory accesses.
DEVICE void grid_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}
