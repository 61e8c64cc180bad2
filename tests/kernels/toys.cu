// Small kernels that show the emulator's operations, one by one, and what a missing barrier looks like; for tests only.
#include "ptx.cuh"

// out[warp][16][8] = in_a[16][16] in_b[16][8], `repeats` times over, by every warp. Row-major bf16 in, f32 out.
KERNEL(64, 1, toy_mma, (float* out, const u16* a, const u16* b, u32 repeats)) {
  grid_wait();
  const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto pair = [](const u16* p, u32 step) { return u32(p[0]) | u32(p[step]) << 16; };
  const u32 a0 = pair(a + g * 16 + 2 * t, 1), a1 = pair(a + (g + 8) * 16 + 2 * t, 1);
  const u32 a2 = pair(a + g * 16 + 2 * t + 8, 1), a3 = pair(a + (g + 8) * 16 + 2 * t + 8, 1);
  const u32 b0 = pair(b + 2 * t * 8 + g, 8), b1 = pair(b + (2 * t + 8) * 8 + g, 8);
  float d[4] = {0, 0, 0, 0};
  for (u32 i = 0; i < repeats; i++) mma_bf16(d, a0, a1, a2, a3, b0, b1);
  float* to = out + threadIdx.x / 32 * 128;
  to[g * 8 + 2 * t] = d[0], to[g * 8 + 2 * t + 1] = d[1];
  to[(g + 8) * 8 + 2 * t] = d[2], to[(g + 8) * 8 + 2 * t + 1] = d[3];
}
