// The emulator's runtime: fibers and their switches, the five schedules, blocks, launches and error reports.
// src/gpu/emulator.rs calls the two functions at the end of this file; kernels include only emu.h.
//
// An OS thread runs one block at a time. A lane that waits switches directly to the next lane of the
// schedule. Control returns to the launching thread when no lane can run: every lane is done, or the kernel
// is stuck.
#include "emulator/emu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// Saves the callee-saved registers on the current stack, stores the stack pointer in `from`, and continues on
// the stack `to`.
extern "C" void dflash_emu_switch(void** from, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.globl dflash_emu_switch
.hidden dflash_emu_switch
.type dflash_emu_switch,@function
dflash_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dflash_emu_switch,.-dflash_emu_switch
)");
#elif defined(__aarch64__)
asm(R"(
.text
.globl dflash_emu_switch
.hidden dflash_emu_switch
.type dflash_emu_switch,@function
dflash_emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size dflash_emu_switch,.-dflash_emu_switch
)");
#else
#error "the emulator switches fibers on x86-64 and aarch64 only: build without the feature `emulator`"
#endif

namespace emu {
namespace {

constexpr unsigned MAX_THREADS = 1024;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 256 << 10;
#else
constexpr size_t STACK = 64 << 10;
#endif
// Each lane's stack starts 1152 bytes further into a page than the one before, so that the hot tops of the 32
// stacks of a warp fall into different cache sets. A stack may overrun into the SLACK bytes below it; this is
// reported at the end of the launch.
constexpr size_t SLACK = 64 << 10;
constexpr size_t STRIDE = SLACK + STACK + 1152;
constexpr uint64_t UNTOUCHED = 0x5afe57acc5afe57a;  // written at the lowest address of every stack
constexpr size_t GUARD = 128;  // guard bytes on both sides of shared memory

// The memory in which an OS thread runs blocks: allocated by its first launch, freed when the thread ends.
struct Arena {
  char* stacks;
  Lane lanes[MAX_THREADS];
  Block block;
  void* main_sp = nullptr;
  void* main_fake = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
  bool from_main = false;
  uint64_t serial = 0;
  char message[1500];
  // Static shared arrays of the kernels this thread has run. Their guard bytes are checked after each block.
  struct Array {
    unsigned char* memory;
    size_t bytes;
    uint64_t serial;
  };
  std::vector<Array> arrays;
  std::vector<Access> accesses[MAX_THREADS];

  Arena() {
    void* memory = mmap(nullptr, STRIDE * MAX_THREADS, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    stacks = memory == MAP_FAILED ? nullptr : static_cast<char*>(memory);
    for (unsigned i = 0; i < MAX_THREADS; i++) {
      lanes[i].stack = stacks + i * STRIDE + SLACK;
      lanes[i].index = i;
    }
    block.lanes = lanes;
  }
  ~Arena() {
    if (stacks) munmap(stacks, STRIDE * MAX_THREADS);
    for (Array& a : arrays) free(a.memory - GUARD);
  }
};
thread_local std::unique_ptr<Arena> arena;

// Switches to a lane, or to the launching thread when `to` is null. `last`: `from` will not run again.
void switch_to(Lane* from, Lane* to, bool last = false) {
  Arena& a = *arena;
  (void)last;
  lane = to;
#if defined(__SANITIZE_ADDRESS__)
  void** fake = last ? nullptr : from ? &from->fake : &a.main_fake;
  a.from_main = !from;
  if (to) {
    __sanitizer_start_switch_fiber(fake, to->stack, STACK);
  } else {
    __sanitizer_start_switch_fiber(fake, a.main_bottom, a.main_size);
  }
#endif
  dflash_emu_switch(from ? &from->sp : &a.main_sp, to ? to->sp : a.main_sp);
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(from ? from->fake : a.main_fake, &bottom, &size);
  if (a.from_main) a.main_bottom = bottom, a.main_size = size;
#endif
}

uint64_t next_random(uint64_t& state) {  // splitmix64
  uint64_t z = state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

unsigned lowest(uint32_t bits) { return unsigned(__builtin_ctz(bits)); }
unsigned highest(uint32_t bits) { return 31u - unsigned(__builtin_clz(bits)); }
// The first set bit from bit `turn` on, cyclically.
unsigned lowest_from(uint32_t bits, unsigned turn) {
  const uint32_t rotated = turn ? (bits >> turn) | (bits << (32 - turn)) : bits;
  return (lowest(rotated) + turn) & 31;
}

// Takes the next lane of the schedule off the ready list; null if no lane can run.
Lane* next_lane(Block& b) {
  if (!b.any) return nullptr;
  unsigned w = b.current / 32, l = b.current % 32;
  switch (b.launch->schedule) {
    case 0: {  // in order: the next higher lane, then from the start again
      uint32_t bits = l < 31 && b.ready[w] ? b.ready[w] & (~0u << (l + 1)) : 0;
      if (!bits) {
        const uint32_t above = w < 31 ? b.any & (~0u << (w + 1)) : 0;
        w = lowest(above ? above : b.any);
        bits = b.ready[w];
      }
      l = lowest(bits);
      break;
    }
    case 1: {  // reversed
      uint32_t bits = b.ready[w] & ((1u << l) - 1);
      if (!bits) {
        const uint32_t below = b.any & ((1u << w) - 1);
        w = highest(below ? below : b.any);
        bits = b.ready[w];
      }
      l = highest(bits);
      break;
    }
    case 2: {  // shuffled: any ready lane
      const uint64_t r = next_random(b.random);
      w = lowest_from(b.any, r & 31);
      l = lowest_from(b.ready[w], (r >> 5) & 31);
      break;
    }
    case 3: {  // greedy: one warp until it waits, then the lowest ready warp
      if (!b.ready[w]) w = lowest(b.any);
      l = lowest(b.ready[w]);
      break;
    }
    default: {  // greedy: one warp until it waits, then the highest ready warp
      if (!b.ready[w]) w = highest(b.any);
      l = highest(b.ready[w]);
      break;
    }
  }
  b.ready[w] &= ~(1u << l);
  if (!b.ready[w]) b.any &= ~(1u << w);
  b.current = w * 32 + l;
  return &b.lanes[b.current];
}

// The stacks of a block's lanes do not fit the first-level cache: fetches the top of the stack of the lane that most
// likely runs soon after `next`.
void prefetch(const Block& b, const Lane* next) {
  if (!next) return;
  const bool descending = b.launch->schedule == 1;
  const Lane& soon = b.lanes[(next->index + (descending ? b.threads - 2 : 2)) % b.threads];
  const char* top = static_cast<const char*>(soon.sp);
  for (size_t line = 0; line < 5; line++) __builtin_prefetch(top + 64 * line);
}

// Restarts the schedule, at the start of a block and after a barrier.
void restart_schedule(Block& b) {
  // Schedule 0 continues after `current`, schedule 1 before it, both cyclically: they start at the first and
  // the last lane. Schedules 3 and 4 start at the first and the last warp.
  b.current = b.launch->schedule == 0 || b.launch->schedule == 4 ? b.threads - 1 : 0;
}

// Matches the lanes' accesses since the last barrier by source line and occurrence; counts extra passes.
void count_accesses(Block& b) {
  struct Entry {
    int line;
    uint32_t bytes, occurrence;
    unsigned lane;
    uintptr_t address;
  };
  std::vector<Entry> entries;
  for (unsigned w = 0; w < b.warps; w++) {
    entries.clear();
    for (unsigned l = 0; l < 32; l++) {
      std::vector<std::pair<int, uint32_t>> seen;
      for (const Access& a : b.lanes[w * 32 + l].accesses) {
        const int key = a.line * 64 + int(a.bytes);
        auto at = std::find_if(seen.begin(), seen.end(), [=](auto& s) { return s.first == key; });
        if (at == seen.end()) at = seen.insert(seen.end(), {key, 0});
        entries.push_back({a.line, a.bytes, at->second++, l, a.address});
      }
      b.lanes[w * 32 + l].accesses.clear();
    }
    std::sort(entries.begin(), entries.end(), [](const Entry& x, const Entry& y) {
      return std::make_tuple(x.line, x.bytes, x.occurrence, x.lane) <
             std::make_tuple(y.line, y.bytes, y.occurrence, y.lane);
    });
    for (size_t i = 0; i < entries.size();) {
      const Entry& first = entries[i];
      // A pass moves 128 bytes: those of a warp, a half warp or a quarter warp, by the width of the access.
      const unsigned lanes_per_pass = first.bytes <= 4 ? 32 : 128 / first.bytes;
      uintptr_t addresses[32];
      unsigned n = 0;
      size_t j = i;
      for (; j < entries.size(); j++) {
        const Entry& e = entries[j];
        if (e.line != first.line || e.bytes != first.bytes || e.occurrence != first.occurrence) break;
        if (e.lane / lanes_per_pass != first.lane / lanes_per_pass) break;
        addresses[n++] = e.address;
      }
      b.counts.conflicts += conflicts(addresses, n, first.bytes);
      b.counts.shared += i == 0 || entries[i - 1].line != first.line || entries[i - 1].occurrence != first.occurrence ||
                         entries[i - 1].bytes != first.bytes;
      i = j;
    }
  }
}

void release_barrier(Block& b) {
  if (b.launch->conflicts) count_accesses(b);
  b.waiting = 0;
  for (unsigned i = 0; i < b.threads; i++) {
    if (b.lanes[i].state != LaneState::AtBarrier) continue;
    b.lanes[i].state = LaneState::Running;
    b.lanes[i].stored = false;
    b.ready[i / 32] |= 1u << i % 32;
    b.any |= 1u << i / 32;
  }
  restart_schedule(b);
}

// The entry point of every fiber.
void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (arena->from_main) arena->main_bottom = bottom, arena->main_size = size;
#endif
  Block& b = *block;
  Lane& me = *lane;
  b.launch->kernel->call(b.launch->arguments);
  if (b.launch->overlap && !me.waited) {
    fail({b.launch->kernel->file, 0},
         "the thread ended without grid_wait(): the next kernel could overlap an earlier one that still runs");
  }
  me.state = LaneState::Done;
  b.num_active--;
  if (b.num_active && b.waiting == b.num_active) release_barrier(b);
  switch_to(&me, next_lane(b), true);
  abort();
}

void init_lane(Lane& lane, const Block& b) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(lane.stack, STACK);
#endif
  const unsigned i = lane.index;
  lane.thread = {i % b.size.x, i / b.size.x % b.size.y, i / (b.size.x * b.size.y)};
  lane.state = LaneState::Running;
  lane.waited = false;
  lane.fake = nullptr;
  lane.operation = nullptr;
  lane.groups = 0;
  lane.fences = 0;
  lane.stored = false;
  lane.copies.clear();
  lane.accesses.clear();
  uintptr_t top = (reinterpret_cast<uintptr_t>(lane.stack) + STACK) & ~uintptr_t(15);
  void** sp = reinterpret_cast<void**>(top);
#if defined(__x86_64__)
  *--sp = nullptr;  // no caller; leaves rsp 8 below a multiple of 16 at entry, as after a call
  *--sp = reinterpret_cast<void*>(&fiber_main);
  for (int r = 0; r < 6; r++) *--sp = nullptr;
#else
  sp -= 20;
  memset(sp, 0, 160);
  sp[11] = reinterpret_cast<void*>(&fiber_main);  // x30
#endif
  lane.sp = sp;
}

const char* base_name(const char* path) {
  const char* slash = path ? strrchr(path, '/') : nullptr;
  return slash ? slash + 1 : path ? path : "?";
}

struct Text {
  char* at;
  size_t left;
  __attribute__((format(printf, 2, 3))) void add(const char* format, ...) {
    va_list list;
    va_start(list, format);
    const int n = vsnprintf(at, left, format, list);
    va_end(list);
    const size_t used = std::min(left ? left - 1 : 0, size_t(std::max(n, 0)));
    at += used;
    left -= used;
  }
};

// Lists the lanes of a warp as "0-3, 7".
void add_lanes(Text& text, uint32_t bits) {
  for (bool first = true; bits; first = false) {
    const unsigned from = lowest(bits);
    unsigned to = from;
    while (to < 31 && bits >> (to + 1) & 1) to++;
    text.add(from == to ? "%s%u" : "%s%u-%u", first ? "" : ", ", from, to);
    bits &= to == 31 ? 0 : ~0u << (to + 1);
  }
}

// No lane can run, but not all are done: reports where each group of lanes waits.
void report_stuck(Block& b, Text text) {
  text.add("stuck:");
  unsigned shown = 0;
  for (unsigned w = 0; w < b.warps; w++) {
    uint32_t left = ~0u;
    while (left) {
      const Lane& first = b.lanes[w * 32 + lowest(left)];
      uint32_t same = 0;
      for (unsigned l = 0; l < 32; l++) {
        const Lane& other = b.lanes[w * 32 + l];
        if (left >> l & 1 && other.state == first.state &&
            (first.state == LaneState::Done ||
             (other.operation == first.operation && other.site.line == first.site.line))) {
          same |= 1u << l;
        }
      }
      left &= ~same;
      if (++shown > 12) continue;
      text.add("%s warp %u ", shown == 1 ? "" : ";", w);
      if (same == ~0u) {
        text.add("all lanes");
      } else {
        text.add("lanes ");
        add_lanes(text, same);
      }
      if (first.state == LaneState::Done) {
        text.add(" ended");
      } else {
        text.add(" at %s (%s:%d)", first.operation, base_name(first.site.file), first.site.line);
      }
    }
  }
  if (shown > 12) text.add("; and %u more groups", shown - 12);
}

Text begin_message(Block& b, const Lane* lane, Site site) {
  Arena& a = *arena;
  Text text{a.message, sizeof a.message};
  text.add("kernel %s, block (%u,%u,%u)", b.launch->kernel->name, b.index.x, b.index.y, b.index.z);
  if (lane) text.add(", thread (%u,%u,%u)", lane->thread.x, lane->thread.y, lane->thread.z);
  if (site.file) {
    text.add(site.line ? ", %s:%d" : ", %s", base_name(site.file), site.line);
  }
  text.add(": ");
  return text;
}

// Allocates exactly `bytes` of shared memory, 128-byte aligned. AddressSanitizer detects any access outside
// it. Without the sanitizer both sides hold a pattern that is checked at the end of the block.
unsigned char* allocate_guarded(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 128, GUARD + bytes + GUARD)) abort();
  unsigned char* at = static_cast<unsigned char*>(memory);
  memset(at, 0xc5, GUARD);
  memset(at + GUARD + bytes, 0xc5, GUARD);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(at, GUARD);
  __asan_poison_memory_region(at + GUARD + bytes, GUARD);
#endif
  return at + GUARD;
}

bool overrun(unsigned char* memory, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  (void)memory, (void)bytes;
  return false;
#else
  for (size_t i = 0; i < GUARD; i++) {
    if (memory[-ptrdiff_t(i) - 1] != 0xc5 || memory[bytes + i] != 0xc5) return true;
  }
  return false;
#endif
}

void release(unsigned char* memory, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory - GUARD, GUARD + bytes + GUARD);
#else
  (void)bytes;
#endif
  free(memory - GUARD);
}

void run_block(Arena& a, const Launch& launch, uint64_t linear) {
  Block& b = a.block;
  const uint64_t nx = launch.grid[0], ny = launch.grid[1];
  b.index = {unsigned(linear % nx), unsigned(linear / nx % ny), unsigned(linear / nx / ny)};
  b.serial = ++a.serial;
  b.random = launch.seed + linear * 0x2545f4914f6cdd1du;
  b.num_active = b.threads;
  b.waiting = 0;
  b.failed = false;
  b.any = b.warps == 32 ? ~0u : (1u << b.warps) - 1;
  for (unsigned w = 0; w < b.warps; w++) {
    b.ready[w] = ~0u;
    b.warp[w].arrived = 0;
    b.warp[w].wgmma = {};
    b.issued[w / 4].clear();
  }
  b.writers.assign((launch.shared + 15) / 16, {NO_WRITER, 0});
  for (unsigned i = 0; i < b.threads; i++) init_lane(a.lanes[i], b);
  poison(b.shared, launch.shared);
  restart_schedule(b);
  b.counts.blocks++;
  switch_to(nullptr, next_lane(b));
  if (b.failed) return;
  if (b.num_active) {
    b.failed = true;
    report_stuck(b, begin_message(b, nullptr, {nullptr, 0}));
    return;
  }
  for (unsigned w = 0; w < b.warps && !b.failed; w++) {
    const size_t mine = b.warp[w].wgmma.issued, all = b.issued[w / 4].size();
    if (mine == all) continue;
    b.failed = true;
    begin_message(b, nullptr, {launch.kernel->file, 0})
        .add("warp %u executed %zu of its warpgroup's %zu wgmma.mma_async", w, mine, all);
  }
  if (launch.conflicts) count_accesses(b);
  if (overrun(b.shared, launch.shared)) {
    b.failed = true;
    begin_message(b, nullptr, {launch.kernel->file, 0})
        .add("wrote outside its %u bytes of dynamic shared memory", launch.shared);
  }
  for (Arena::Array& array : a.arrays) {
    if (array.serial == b.serial && !b.failed && overrun(array.memory, array.bytes)) {
      b.failed = true;
      begin_message(b, nullptr, {launch.kernel->file, 0})
          .add("wrote outside a static shared array of %zu bytes", array.bytes);
    }
  }
}

}  // namespace

void fail(Site site, const char* format, ...) {
  Block& b = *block;
  Text text = begin_message(b, lane, site);
  va_list list;
  va_start(list, format);
  vsnprintf(text.at, text.left, format, list);
  va_end(list);
  b.failed = true;
  switch_to(lane, nullptr, true);
  abort();
}

void fail_diverged(const char* operation, Site site) {
  const Warp& warp = block->warp[lane->index / 32];
  fail(site, "the lanes of warp %u execute different operations: this one %s, others %s at line %d", lane->index / 32,
       operation, warp.operation, warp.line);
}

void suspend() {
  Lane* me = lane;
  Lane* next = next_lane(*block);
  if (next == me) return;
  prefetch(*block, next);
  switch_to(me, next);
}

void barrier(Site site) {
  Block& b = *block;
  Lane& me = *lane;
  if (b.waiting == 0) {
    b.barrier_file = site.file;
    b.barrier_line = site.line;
  } else if (b.barrier_line != site.line) {
    fail(site, "__syncthreads() while other threads wait at the one of %s:%d", base_name(b.barrier_file),
         b.barrier_line);
  }
  me.state = LaneState::AtBarrier;
  me.operation = "__syncthreads";
  me.site = site;
  if (++b.waiting == b.num_active) release_barrier(b);
  suspend();
}

// Completes the copies of all but the newest `keep` committed groups. Uncommitted copies stay pending.
void finish_copies(Lane& lane, uint32_t keep) {
  const uint32_t done = lane.groups > keep ? lane.groups - keep : 0;
  size_t left = 0;
  for (const Copy& copy : lane.copies) {
    if (copy.group >= done) {
      lane.copies[left++] = copy;
      continue;
    }
    if (copy.from) {
      memcpy(copy.to, copy.from, 16);
    } else {
      memset(copy.to, 0, 16);
    }
    wrote_shared(copy.to);
  }
  lane.copies.resize(left);
}

void* shared_array(size_t bytes, void** memory, uint64_t* serial) {
  Arena& a = *arena;
  if (*serial == a.serial) return *memory;
  auto at = std::find_if(a.arrays.begin(), a.arrays.end(), [=](auto& array) { return array.memory == *memory; });
  if (at == a.arrays.end()) {
    *memory = allocate_guarded(bytes);
    at = a.arrays.insert(a.arrays.end(), {static_cast<unsigned char*>(*memory), bytes, 0});
  }
  *serial = at->serial = a.serial;
  poison(*memory, bytes);
  return *memory;
}

void check_early_access(Site site, const char* what, const void* address, size_t bytes, bool constant) {
  const Launch& launch = *block->launch;
  const uintptr_t from = reinterpret_cast<uintptr_t>(address);
  const Range* end = launch.sealed + launch.sealed_count;
  const auto before = [](uintptr_t a, const Range& r) { return a < r.begin; };
  const Range* after = std::upper_bound(launch.sealed, end, from, before);
  if (constant && after != launch.sealed && from + bytes <= after[-1].end) return;
  fail(site, "%s before grid_wait() from memory that an earlier kernel may still write (seal() marks constants)", what);
}

// Shared memory has 32 banks of 4 bytes, and a pass reads one word from each. Returns the extra passes that
// these addresses need.
unsigned conflicts(const uintptr_t* addresses, unsigned count, unsigned bytes) {
  uintptr_t words[32][32];
  unsigned used[32] = {};
  unsigned passes = 1;
  for (unsigned i = 0; i < count; i++) {
    for (unsigned k = 0; k < (bytes + 3) / 4; k++) {
      const uintptr_t word = addresses[i] / 4 + k;
      const unsigned bank = word % 32;
      if (std::find(words[bank], words[bank] + used[bank], word) != words[bank] + used[bank]) continue;
      if (used[bank] < 32) words[bank][used[bank]++] = word;
      passes = std::max(passes, used[bank]);
    }
  }
  return passes - 1;
}

}  // namespace emu

// Each source file has one list of kernels. build.rs defines DFLASH_FILES as EMU_FILE(a) EMU_FILE(b) ...
#define EMU_FILE(name) extern "C" emu::Kernel* EMU_JOIN(dflash_kernels_, name)();
DFLASH_FILES
#undef EMU_FILE

// Calls `visit` for every kernel of every file. The pointers stay valid until the process ends.
extern "C" void dflash_emu_kernels(void (*visit)(void*, const emu::Kernel*), void* context) {
#define EMU_FILE(name) \
  for (const emu::Kernel* k = EMU_JOIN(dflash_kernels_, name)(); k; k = k->next) visit(context, k);
  DFLASH_FILES
#undef EMU_FILE
}

// Runs the `count` blocks of a launch with these linear indices, one after another on this thread. Adds to
// `counts`. Returns 0, or 1 with the error in `message`.
extern "C" int dflash_emu_run(const emu::Launch* launch, const uint64_t* blocks, size_t count, emu::Counts* counts,
                              char* message, size_t message_size) {
  using namespace emu;
  if (!arena) arena = std::make_unique<Arena>();
  Arena& a = *arena;
  Block& b = a.block;
  if (!a.stacks) {
    snprintf(message, message_size, "no memory for the stacks of %u emulated threads", MAX_THREADS);
    return 1;
  }
  b.launch = launch;
  b.threads = launch->kernel->threads;
  b.warps = b.threads / 32;
  b.size = {b.threads, 1, 1};
  b.grid = {launch->grid[0], launch->grid[1], launch->grid[2]};
  b.counts = {};
  b.shared = allocate_guarded(launch->shared);
  block = &b;
  b.failed = false;
  for (unsigned i = 0; i < b.threads; i++) memcpy(a.lanes[i].stack, &UNTOUCHED, sizeof UNTOUCHED);
  for (size_t i = 0; i < count && !b.failed; i++) run_block(a, *launch, blocks[i]);
  for (unsigned i = 0; i < b.threads && !b.failed; i++) {
    if (memcmp(a.lanes[i].stack, &UNTOUCHED, sizeof UNTOUCHED) == 0) continue;
    b.failed = true;
    begin_message(b, &a.lanes[i], {launch->kernel->file, 0}).add("needs more than its %zu bytes of stack", STACK);
  }
  block = nullptr;
  release(b.shared, launch->shared);
  const uint64_t* from = reinterpret_cast<const uint64_t*>(&b.counts);
  uint64_t* to = reinterpret_cast<uint64_t*>(counts);
  for (size_t i = 0; i < sizeof(Counts) / sizeof(uint64_t); i++) to[i] += from[i];
  if (b.failed) snprintf(message, message_size, "%s", a.message);
  return b.failed;
}
