// What the emulator makes of wgmma. The last lane of a warp to come to a product works out the warp's quarter of it, 16 of
// the 64 rows, from shared memory as the matrix descriptors tell. The card may read operands and write sums at any time
// between a product and the wait for its group: so sums are kept aside and their registers are poison until that wait, which
// also holds the operands against what they were. Bank conflicts are not counted: eight rows of 8 k lie in all 32 banks in
// both layouts there are.
#pragma once
#include "emulator/emu.h"

namespace emu {

// A shared-memory address as instructions take it, of the dynamic part: 128-byte aligned, as its declaration has it, but no
// better, so that a kernel which relies on more is found out.
constexpr uint32_t SHARED_BASE = 1024 + 128;
inline uint32_t shared_address(const void* at) {
  return uint32_t(static_cast<const unsigned char*>(at) - block->shared) + SHARED_BASE;
}

// 8 k of one row of an operand: the first or the second half of a product's 16 k.
inline const uint4* operand(uint64_t matrix, unsigned row, unsigned half, Site site) {
  const auto field = [=](unsigned bit) { return uint32_t(matrix >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32), swizzle = uint32_t(matrix >> 62);
  if (matrix & 0x3fffc000c000c000) {
    fail(site, "matrix descriptor %016llx with bits that are not its own, or a base offset", (unsigned long long)matrix);
  }
  uint32_t at;
  if (swizzle == 0) {
    at = start + row / 8 * stride + half * leading + row % 8 * 16;
  } else if (swizzle == 1) {
    // Rows of 128 bytes, whose 16-byte pieces change places as their address has it.
    if (start & 0x380 || stride % 1024) {
      fail(site, "a swizzled matrix at %u with a stride of %u: eight rows start at a multiple of 1024", start, stride);
    }
    at = start + row / 8 * stride + row % 8 * 128 + half * 16;
    at ^= at >> 3 & 0x70;
  } else {
    fail(site, "swizzle mode %u, which has no twin here", swizzle);
  }
  const uint32_t offset = at - SHARED_BASE;
  if (at < SHARED_BASE || offset + 16 > block->launch->shared) {
    fail(site, "wgmma reads at %d of %u bytes of dynamic shared memory", int(offset), block->launch->shared);
  }
  return reinterpret_cast<const uint4*>(block->shared + offset);
}

// What this warp's part of a product reads: 16 rows of A, then all of B, two pieces each.
template <class See>
inline void for_operands(uint64_t a, uint64_t b, unsigned n, Site site, See see) {
  const unsigned first = lane->index / 32 % 4 * 16;
  for (unsigned i = 0; i < 32; i++) see(operand(a, first + i / 2, i % 2, site));
  for (unsigned i = 0; i < n * 2; i++) see(operand(b, i / 2, i % 2, site));
}

struct WgmmaOperands {
  uint64_t a, b;
  bool add;
};

inline Sums& sums_of(Wgmma& state, void** out, unsigned n, Site site) {
  for (Sums& sums : state.sums) {
    if (sums.to[0] != out[0]) continue;
    if (sums.n != n) fail(site, "products of other shapes on the same sums without a wait between them");
    return sums;
  }
  if (!state.fenced) fail(site, "wgmma.mma_async on registers without a wgmma.fence since they were last their threads'");
  state.sums.push_back({{}, n, 0, std::vector<float>(16 * n)});
  Sums& sums = state.sums.back();
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

inline void start_product(const void** in, void** out, unsigned n, Site site) {
  const WgmmaOperands& mine = *static_cast<const WgmmaOperands*>(in[0]);
  const unsigned w = lane->index / 32;
  Wgmma& state = block->warp[w].wgmma;
  if (block->threads % 128) fail(site, "wgmma in a block of %u threads, which is not made of warpgroups", block->threads);
  for (unsigned l = 1; l < 32; l++) {
    const WgmmaOperands& other = *static_cast<const WgmmaOperands*>(in[l]);
    if (other.a != mine.a || other.b != mine.b || other.add != mine.add) fail(site, "lanes with other wgmma operands");
  }
  auto& issued = block->issued[w / 4];
  const std::pair<uint64_t, uint64_t> descriptors{mine.a, mine.b};
  if (state.issued == issued.size()) issued.push_back(descriptors);
  if (issued[state.issued++] != descriptors) fail(site, "other matrix descriptors than the rest of the warpgroup");

  Sums& sums = sums_of(state, out, n, site);
  sums.group = state.groups;
  // What fails leaves its fiber for good: nothing here may own memory meanwhile.
  state.products.push_back({state.groups, mine.a, mine.b, n, site, {}});
  Product& product = state.products.back();
  for_operands(mine.a, mine.b, n, site, [&](const uint4* from) {
    const Writer by = block->writers[size_t(reinterpret_cast<const unsigned char*>(from) - block->shared) / 16];
    if (by.lane != NOBODY && block->lanes[by.lane].fences == by.fences) {
      fail(site, "wgmma reads what thread %u wrote and no fence.proxy.async of that thread made known to it", by.lane);
    }
    product.operands.push_back(*from);
  });
  typedef float Four __attribute__((vector_size(16), aligned(4)));
  std::vector<float> wide(16 * n);  // B as [k][n]
  float a[16][16];
  const auto element = [&](unsigned i, unsigned k) {
    const uint4& piece = product.operands[i * 2 + k / 8];
    uint16_t bits;
    memcpy(&bits, reinterpret_cast<const char*>(&piece) + k % 8 * 2, 2);
    const uint32_t word = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
  };
  for (unsigned r = 0; r < 16; r++) {
    for (unsigned k = 0; k < 16; k++) a[r][k] = element(r, k);
  }
  for (unsigned c = 0; c < n; c++) {
    for (unsigned k = 0; k < 16; k++) wide[k * n + c] = element(16 + c, k);
  }
  // Upwards in k; the hardware adds in an order of its own.
  for (unsigned r = 0; r < 16; r++) {
    for (unsigned c = 0; c < n; c += 8) {
      float* to = &sums.values[r * n + c];
      Four low{}, high{};
      if (mine.add) low = *reinterpret_cast<const Four*>(to), high = *reinterpret_cast<const Four*>(to + 4);
      for (unsigned k = 0; k < 16; k++) {
        const float* from = &wide[k * n + c];
        low += a[r][k] * *reinterpret_cast<const Four*>(from);
        high += a[r][k] * *reinterpret_cast<const Four*>(from + 4);
      }
      memcpy(to, &low, 16), memcpy(to + 4, &high, 16);
    }
  }
  block->counts.mma += n / 8;
}

// The products of all but the newest `keep` committed groups are done: their operands are free and, where no later product
// adds to them, their sums are back in their registers.
inline void finish_products(uint32_t keep, Site site) {
  Wgmma& state = block->warp[lane->index / 32].wgmma;
  const uint32_t done = state.groups > keep ? state.groups - keep : 0;
  size_t left = 0;
  for (Product& product : state.products) {
    if (product.group >= done) {
      if (&state.products[left] != &product) state.products[left] = std::move(product);
      left++;
      continue;
    }
    size_t i = 0;
    for_operands(product.a, product.b, product.n, product.site, [&](const uint4* from) {
      if (memcmp(from, &product.operands[i++], 16) == 0) return;
      fail(site, "an operand of the wgmma of line %d changed before this wait for it", product.site.line);
    });
  }
  state.products.resize(left);
  left = 0;
  for (Sums& sums : state.sums) {
    if (sums.group >= done) {
      if (&state.sums[left] != &sums) state.sums[left] = std::move(sums);
      left++;
      continue;
    }
    for (unsigned l = 0; l < 32; l++) {
      for (unsigned i = 0; i < sums.n / 2; i++) {
        if (memcmp(&sums.to[l][i], &POISON, 4)) fail(site, "sums of a wgmma were written to before this wait for it");
        const unsigned row = l / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
        sums.to[l][i] = sums.values[row * sums.n + column];
      }
    }
    state.fenced = false;
  }
  state.sums.resize(left);
}

inline void wgmma_fence(Site site) {
  together("wgmma.fence", site, nullptr, nullptr,
           [](const void**, void**) { block->warp[lane->index / 32].wgmma.fenced = true; });
}
inline void wgmma_commit(Site site) {
  together("wgmma.commit_group", site, nullptr, nullptr,
           [](const void**, void**) { block->warp[lane->index / 32].wgmma.groups++; });
}
inline void wgmma_wait(uint32_t keep, Site site) {
  together("wgmma.wait_group", site, nullptr, nullptr, [=](const void**, void**) { finish_products(keep, site); });
}
inline void wgmma(float* d, unsigned n, WgmmaOperands operands, Site site) {
  together("wgmma.mma_async", site, &operands, d,
           [=](const void** in, void** out) { start_product(in, out, n, site); });
}

}  // namespace emu
