// Emulation of wgmma. The last lane of a warp to arrive computes the warp's quarter of the product, 16 of the
// 64 rows, from the shared memory that the matrix descriptors address. The hardware may read operands and
// write sums at any time between a wgmma and the wait for its group. The emulator therefore keeps the sums
// aside, poisons their registers until that wait, and at the wait checks that the operands have not changed.
// Bank conflicts are not counted: in both supported layouts eight rows of 8 k cover all 32 banks.
#pragma once
#include "emulator/emu.h"

namespace emu {

// Address of dynamic shared memory in the shared window. It is aligned to 128 bytes, as declared, but to no
// more, so a kernel that relies on a larger alignment fails.
constexpr uint32_t SHARED_BASE = 1024 + 128;
inline uint32_t shared_address(const void* at) {
  return uint32_t(static_cast<const unsigned char*>(at) - block->shared) + SHARED_BASE;
}

// The address of 8 k of one row of an operand: half 0 or 1 of the wgmma's 16 k.
inline const uint4* operand(uint64_t matrix, unsigned row, unsigned half, Site site) {
  const auto field = [=](unsigned bit) { return uint32_t(matrix >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32), swizzle = uint32_t(matrix >> 62);
  if (matrix & 0x3fffc000c000c000) {
    fail(site, "matrix descriptor %016llx has reserved bits or a base offset set", (unsigned long long)matrix);
  }
  uint32_t at;
  if (swizzle == 0) {
    at = start + row / 8 * stride + half * leading + row % 8 * 16;
  } else if (swizzle == 1) {
    // Rows of 128 bytes. Address bits 7 to 9 permute the 16-byte chunks of a row.
    if (start & 0x380 || stride % 1024) {
      fail(site, "a swizzled matrix at %u with a stride of %u: every 8 rows must start at a multiple of 1024",
           start, stride);
    }
    at = start + row / 8 * stride + row % 8 * 128 + half * 16;
    at ^= at >> 3 & 0x70;
  } else {
    fail(site, "swizzle mode %u is not emulated, expected 0 or 1", swizzle);
  }
  const uint32_t offset = at - SHARED_BASE;
  if (at < SHARED_BASE || offset + 16 > block->launch->shared) {
    fail(site, "wgmma reads at offset %d of %u bytes of dynamic shared memory", int(offset), block->launch->shared);
  }
  return reinterpret_cast<const uint4*>(block->shared + offset);
}

// Calls f for the 16-byte chunks that this warp's part of a wgmma reads: 16 rows of A, then all of B, two
// chunks each.
template <class F>
inline void for_each_operand(uint64_t a, uint64_t b, unsigned n, Site site, F f) {
  const unsigned first = lane->index / 32 % 4 * 16;
  for (unsigned i = 0; i < 32; i++) f(operand(a, first + i / 2, i % 2, site));
  for (unsigned i = 0; i < n * 2; i++) f(operand(b, i / 2, i % 2, site));
}

struct WgmmaOperands {
  uint64_t a, b;
  bool add;
};

inline PendingSums& sums_of(Wgmma& state, void** out, unsigned n, Site site) {
  for (PendingSums& sums : state.sums) {
    if (sums.to[0] != out[0]) continue;
    if (sums.n != n) fail(site, "wgmmas of different shapes add to the same sums without a wait between them");
    return sums;
  }
  if (!state.fenced) {
    fail(site, "wgmma.mma_async without a wgmma.fence since the threads last owned the registers of its sums");
  }
  state.sums.push_back({{}, n, 0, std::vector<float>(16 * n)});
  PendingSums& sums = state.sums.back();
  for (unsigned l = 0; l < 32; l++) {
    sums.to[l] = static_cast<float*>(out[l]);
    for (unsigned i = 0; i < n / 2; i++) {
      const unsigned row = l / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
      sums.values[row * n + column] = sums.to[l][i];
    }
    poison(sums.to[l], n / 2 * sizeof(float));
  }
  return sums;
}

inline void start_wgmma(const void** in, void** out, unsigned n, Site site) {
  const WgmmaOperands& mine = *static_cast<const WgmmaOperands*>(in[0]);
  const unsigned w = lane->index / 32;
  Wgmma& state = block->warp[w].wgmma;
  if (block->threads % 128) {
    fail(site, "wgmma in a block of %u threads, expected whole warpgroups of 128", block->threads);
  }
  for (unsigned l = 1; l < 32; l++) {
    const WgmmaOperands& other = *static_cast<const WgmmaOperands*>(in[l]);
    if (other.a != mine.a || other.b != mine.b || other.add != mine.add) {
      fail(site, "the lanes of a warp pass different wgmma operands");
    }
  }
  auto& issued = block->issued[w / 4];
  const std::pair<uint64_t, uint64_t> descriptors{mine.a, mine.b};
  if (state.issued == issued.size()) issued.push_back(descriptors);
  if (issued[state.issued++] != descriptors) {
    fail(site, "matrix descriptors differ from those of the rest of the warpgroup");
  }

  PendingSums& sums = sums_of(state, out, n, site);
  sums.group = state.groups;
  // fail() leaves the fiber without unwinding, so no local may own memory before the last check.
  state.pending.push_back({state.groups, mine.a, mine.b, n, site, {}});
  PendingWgmma& wgmma = state.pending.back();
  for_each_operand(mine.a, mine.b, n, site, [&](const uint4* from) {
    const Writer by = block->writers[size_t(reinterpret_cast<const unsigned char*>(from) - block->shared) / 16];
    if (by.lane != NO_WRITER && block->lanes[by.lane].fences == by.fences) {
      fail(site, "wgmma reads shared memory that thread %u wrote without a later fence.proxy.async", by.lane);
    }
    wgmma.operands.push_back(*from);
  });
  typedef float Four __attribute__((vector_size(16), aligned(4)));
  std::vector<float> b(16 * n);  // [k][n]
  float a[16][16];
  const auto element = [&](unsigned i, unsigned k) {
    const uint4& chunk = wgmma.operands[i * 2 + k / 8];
    uint16_t bits;
    memcpy(&bits, reinterpret_cast<const char*>(&chunk) + k % 8 * 2, 2);
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
  };
  for (unsigned r = 0; r < 16; r++) {
    for (unsigned k = 0; k < 16; k++) a[r][k] = element(r, k);
  }
  for (unsigned c = 0; c < n; c++) {
    for (unsigned k = 0; k < 16; k++) b[k * n + c] = element(16 + c, k);
  }
  // Adds in ascending k. The order of the hardware is not documented.
  for (unsigned r = 0; r < 16; r++) {
    for (unsigned c = 0; c < n; c += 8) {
      float* to = &sums.values[r * n + c];
      Four low{}, high{};
      if (mine.add) low = *reinterpret_cast<const Four*>(to), high = *reinterpret_cast<const Four*>(to + 4);
      for (unsigned k = 0; k < 16; k++) {
        const float* from = &b[k * n + c];
        low += a[r][k] * *reinterpret_cast<const Four*>(from);
        high += a[r][k] * *reinterpret_cast<const Four*>(from + 4);
      }
      memcpy(to, &low, 16), memcpy(to + 4, &high, 16);
    }
  }
  block->counts.mma += n / 8;
}

// Completes all but the newest `keep` committed groups. Their operands may be overwritten, and their sums
// return to the registers unless a later wgmma adds to them.
inline void finish_wgmmas(uint32_t keep, Site site) {
  Wgmma& state = block->warp[lane->index / 32].wgmma;
  const uint32_t done = state.groups > keep ? state.groups - keep : 0;
  size_t left = 0;
  for (PendingWgmma& wgmma : state.pending) {
    if (wgmma.group >= done) {
      if (&state.pending[left] != &wgmma) state.pending[left] = std::move(wgmma);
      left++;
      continue;
    }
    size_t i = 0;
    for_each_operand(wgmma.a, wgmma.b, wgmma.n, wgmma.site, [&](const uint4* from) {
      if (memcmp(from, &wgmma.operands[i++], 16) == 0) return;
      fail(site, "an operand of the wgmma of line %d changed before this wait", wgmma.site.line);
    });
  }
  state.pending.resize(left);
  left = 0;
  for (PendingSums& sums : state.sums) {
    if (sums.group >= done) {
      if (&state.sums[left] != &sums) state.sums[left] = std::move(sums);
      left++;
      continue;
    }
    for (unsigned l = 0; l < 32; l++) {
      for (unsigned i = 0; i < sums.n / 2; i++) {
        if (memcmp(&sums.to[l][i], &POISON, 4)) fail(site, "sums of a wgmma were written to before this wait");
        const unsigned row = l / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
        sums.to[l][i] = sums.values[row * sums.n + column];
      }
    }
    state.fenced = false;
  }
  state.sums.resize(left);
}

inline void wgmma_fence(Site site) {
  warp_collective("wgmma.fence", site, nullptr, nullptr,
           [](const void**, void**) { block->warp[lane->index / 32].wgmma.fenced = true; });
}
inline void wgmma_commit(Site site) {
  warp_collective("wgmma.commit_group", site, nullptr, nullptr,
           [](const void**, void**) { block->warp[lane->index / 32].wgmma.groups++; });
}
inline void wgmma_wait(uint32_t keep, Site site) {
  warp_collective("wgmma.wait_group", site, nullptr, nullptr, [=](const void**, void**) { finish_wgmmas(keep, site); });
}
inline void wgmma(float* d, unsigned n, WgmmaOperands operands, Site site) {
  warp_collective("wgmma.mma_async", site, &operands, d,
           [=](const void** in, void** out) { start_wgmma(in, out, n, site); });
}

}  // namespace emu
