// SPDX-License-Identifier: Apache-2.0
// The scheduler of one block's fibres, and the checks. Built without ThreadSanitizer, which is to see the kernel's
// accesses and not these; nor may anything here call memcpy or the like while a kernel runs.
#include "simt/runtime.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <sstream>
#include <string>
#include <vector>

#include "common/cuda/stream.h"
#include "simt/accounting.h"
#include "simt/fiber.h"
#include "simt/sanitizers.h"

uint3 threadIdx{}, blockIdx{};
dim3 blockDim{}, gridDim{};

namespace simt {
namespace {

// An A100's: compute capability 8.0.
constexpr uint32_t kMaxThreads = 1024, kWarpLanes = 32, kMaxWarps = kMaxThreads / kWarpLanes;
constexpr size_t kMaxSharedBytes = 163 * 1024, kMaxStaticSharedBytes = 48 * 1024, kSharedAlignment = 128;
constexpr uint32_t kMaxGridX = 0x7fffffff, kMaxGridYZ = 65535;

struct Thread {
  explicit Thread(void (*entry)()) : fiber(entry) {}

  Fiber fiber;
  uint32_t index = 0;
  const char* waits_at = nullptr;  // null while it need not wait
  Site site{};
  const Collective* collective = nullptr;  // that it waits in
  uint32_t mask = 0;
  bool exited = false;
  Array<AsyncCopy> copies;  // from `landed` on under way
  uint32_t landed = 0, group = 0;
};

struct Warp {
  uint32_t lanes, exited, waiting;  // bit masks; waiting: in a collective
  uint32_t phase[kWarpLanes];       // of rendezvous whose lowest lane is this
  char* sync;                       // what ThreadSanitizer calls two sync variables for each lane
  Words in[kWarpLanes], out[kWarpLanes];
  WarpAccounting accounting;
};

struct SharedArray {
  const void* key;
  size_t begin, bytes;  // within the window
  Site site;
};

struct Block {
  Thread* threads[kMaxThreads];
  uint32_t count, live, arrived, votes, phase;
  Barrier barrier;
  int result[2];
  char* sync;
  Warp warps[kMaxWarps];
  Array<SharedArray> arrays;
  size_t shared_begin, static_bytes;
  void* dynamic_shared;
} block;

// Who may run, in a ring.
struct Ready {
  Thread* thread[kMaxThreads];
  uint32_t head, count;

  void push(Thread* which) { thread[(head + count++) % kMaxThreads] = which; }
  Thread* pop(uint32_t nth) {
    std::swap(thread[head], thread[(head + nth) % kMaxThreads]);
    Thread* first = thread[head];
    head = (head + 1) % kMaxThreads;
    --count;
    return first;
  }
} ready;

// Shared memory of the block, and for each byte of it what it is. ThreadSanitizer must not see one byte in two blocks
// of a grid; elsewhere each block starts again.
enum ByteState : uint8_t { kOutside, kUninitialized, kInitialized, kInFlight };
struct Window {
  unsigned char* data = nullptr;
  uint8_t* state = nullptr;
  size_t used = 0;
} window;
constexpr size_t kWindowBytes = kThreadSanitizer ? size_t{4} << 30 : size_t{1} << 20;

struct Launch {
  const char* kernel = nullptr;  // null: none under way
  void (*body)(const void*) = nullptr;
  const void* context = nullptr;
  size_t shared_bytes = 0;
  uint64_t random = 0;
  std::string failure;
} current;

struct Range {
  uintptr_t begin, end;
};

Fiber host;
Thread* self = nullptr;
// Neighboring blocks have other fibres, so that ThreadSanitizer takes them for unordered.
std::vector<std::unique_ptr<Thread>> pools[2];
std::vector<Range> global_ranges;
Range recent_range{};
bool counting = false;
Counters counters;
char launch_sync, end_sync, fence_sync;

uint32_t random_below(uint32_t count) {
  current.random ^= current.random << 13;
  current.random ^= current.random >> 7;
  current.random ^= current.random << 17;
  return static_cast<uint32_t>((current.random >> 32) * count >> 32);
}

// ---- Messages ----

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

std::string at(Site site) {
  const char* name = std::strrchr(site.file, '/');
  return text(name == nullptr ? site.file : name + 1, ":", site.line);
}

std::string position(uint3 index) { return text("(", index.x, ", ", index.y, ", ", index.z, ")"); }

uint3 thread_position(uint32_t index) {
  return {index % blockDim.x, index / blockDim.x % blockDim.y, index / blockDim.x / blockDim.y};
}

// 0-3, 8
std::string ranges(const std::vector<uint32_t>& ascending) {
  std::ostringstream stream;
  for (size_t i = 0; i < ascending.size();) {
    size_t last = i;
    while (last + 1 < ascending.size() && ascending[last + 1] == ascending[last] + 1) ++last;
    stream << (i == 0 ? "" : ", ") << ascending[i];
    if (last > i) stream << "-" << ascending[last];
    i = last + 1;
  }
  return stream.str();
}

std::string lanes_of(uint32_t mask) {
  std::vector<uint32_t> lanes;
  for (; mask != 0; mask &= mask - 1) lanes.push_back(static_cast<uint32_t>(std::countr_zero(mask)));
  return text(lanes.size() == 1 ? "lane " : "lanes ", ranges(lanes));
}

// Unwinds the stack of the fibre that failed; those of the others are abandoned.
struct Failed {};

[[noreturn]] void fail(const std::string& what, Site site) {
  if (current.kernel == nullptr) throw Error(text(at(site), ": outside of a kernel: ", what));
  current.failure = text(current.kernel, ", block ", position(blockIdx), ", thread ", position(threadIdx), ", ",
                         at(site), ": ", what);
  throw Failed{};
}

std::string describe(Access access, size_t bytes) {
  static constexpr const char* kWords[] = {"read of global memory", "write to global memory", "read of shared memory",
                                           "write to shared memory", "asynchronous copy to shared memory"};
  return text(bytes, "-byte ", kWords[static_cast<int>(access)]);
}

std::string where_in_shared(uintptr_t address) {
  const SharedArray* nearest = nullptr;
  const auto base = reinterpret_cast<uintptr_t>(window.data);
  for (const SharedArray& array : block.arrays) {
    if (base + array.begin <= address) nearest = &array;
  }
  if (nearest == nullptr) return "not a shared address of this block";
  return text("byte ", address - base - nearest->begin, " of ", nearest->bytes, ", array of ", at(nearest->site));
}

std::string deadlock() {
  std::ostringstream stream;
  stream << current.kernel << ", block " << position(blockIdx) << ": deadlock";
  std::vector<bool> told(block.count);
  for (uint32_t i = 0; i < block.count; ++i) {
    const Thread& first = *block.threads[i];
    if (first.exited || told[i]) continue;
    std::vector<uint32_t> alike;
    for (uint32_t j = i; j < block.count; ++j) {
      const Thread& other = *block.threads[j];
      const bool same_warp = first.collective == nullptr || j / kWarpLanes == i / kWarpLanes;
      if (other.exited || !same_warp || other.collective != first.collective || other.mask != first.mask ||
          other.site.file != first.site.file || other.site.line != first.site.line) {
        continue;
      }
      told[j] = true;
      alike.push_back(j);
    }
    stream << "; " << (alike.size() == 1 ? "thread " : "threads ") << ranges(alike)
           << (alike.size() == 1 ? " waits" : " wait") << " at " << first.waits_at << ", " << at(first.site);
    if (first.collective != nullptr) {
      stream << ", for " << lanes_of(first.mask & ~block.warps[i / kWarpLanes].waiting) << " of warp "
             << i / kWarpLanes;
    }
  }
  return stream.str();
}

// ---- The scheduler ----

// Leaves the running fibre for one that may run, or for the host if there is none.
void run_others() {
  Thread& me = *self;
  if (ready.count == 0) return Fiber::switch_to(me.fiber, host);
  Thread* next = ready.pop(options().seed == 0 ? 0 : random_below(ready.count));
  self = next;
  threadIdx = thread_position(next->index);
  if (next != &me) Fiber::switch_to(me.fiber, next->fiber);
}

void wait(const char* waits_at, Site site) {
  self->waits_at = waits_at;
  self->site = site;
  run_others();
}

void wake(Thread* thread) {
  thread->waits_at = nullptr;
  thread->collective = nullptr;
  thread->mask = 0;
  ready.push(thread);
}

// Another fibre may come in between, if the seed says so.
void maybe_yield() {
  if (options().seed == 0 || random_below(4) != 0) return;
  ready.push(self);
  run_others();
}

void close_accounting() {
  for (uint32_t w = 0; w * kWarpLanes < block.count; ++w) block.warps[w].accounting.close(counters);
}

void complete_barrier() {
  const uint32_t votes = block.votes;
  int& result = block.result[block.phase++ % 2];
  switch (block.barrier) {
    case Barrier::kPlain:
    case Barrier::kOr:
      result = votes != 0;
      break;
    case Barrier::kAnd:
      result = votes == block.arrived;
      break;
    case Barrier::kCount:
      result = static_cast<int>(votes);
      break;
  }
  block.arrived = block.votes = 0;
  if (counting) {
    ++counters.barriers;
    close_accounting();
  }
  for (uint32_t i = 0; i < block.count; ++i) {
    Thread* thread = block.threads[i];
    if (thread->waits_at != nullptr && thread->collective == nullptr) wake(thread);
  }
}

void leave_block() {
  Thread& me = *self;
  if (const uint32_t under_way = me.copies.size() - me.landed; under_way != 0) {
    fail(text(under_way, " asynchronous copies are outstanding at exit"), me.site);
  }
  Warp& warp = block.warps[me.index / kWarpLanes];
  const uint32_t bit = uint32_t{1} << me.index % kWarpLanes;
  for (uint32_t others = warp.waiting; others != 0; others &= others - 1) {
    const Thread& other = *block.threads[me.index / kWarpLanes * kWarpLanes + std::countr_zero(others)];
    if (other.mask & bit) {
      fail(text("exits, but is in the mask of ", other.waits_at, " in which thread ", other.index, " waits"),
           other.site);
    }
  }
  warp.exited |= bit;
  me.exited = true;
  --block.live;
  if (block.arrived != 0 && block.arrived == block.live) complete_barrier();
}

void run_kernel() {
  try {
    current.body(current.context);
  } catch (const std::exception& error) {
    fail(text("throws ", error.what()), self->site);
  }
  leave_block();
}

// What a fibre does: the kernel, in one block after another, until one fails.
void fiber_main() {
  for (;;) {
    acquire(&launch_sync);
    try {
      run_kernel();
    } catch (const Failed&) {
      ready.count = 0;
    }
    release(&end_sync);
    run_others();
  }
}

// ---- Shared memory ----

void reserve_window() {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* data = mmap(nullptr, kWindowBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  void* state = mmap(nullptr, kWindowBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (data == MAP_FAILED || state == MAP_FAILED) throw std::bad_alloc();
  window.data = static_cast<unsigned char*>(data);
  window.state = static_cast<uint8_t*>(state);
  poison(window.data, kWindowBytes);
}

// By hand: see the head of this file.
template <class T>
void set_bytes(T* begin, size_t bytes, uint8_t value) {
  for (size_t i = 0; i < bytes; ++i) reinterpret_cast<volatile uint8_t*>(begin)[i] = value;
}

// Bytes that no array has, for the names of sync variables.
char* take_sync_variables(size_t bytes) {
  char* taken = reinterpret_cast<char*>(window.data + window.used);
  window.used += (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  return taken;
}

void* take_array(const void* key, size_t bytes, Site site) {
  const size_t begin = window.used;
  const size_t room = (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment + kSharedAlignment;
  if (begin + room > kWindowBytes) throw std::bad_alloc();
  window.used = begin + room;
  SharedArray& array = block.arrays.push();
  array.key = key;
  array.begin = begin;
  array.bytes = bytes;
  array.site = site;
  unpoison(window.data + begin, bytes);
  set_bytes(window.data + begin, bytes, 0xff);  // NaN in every type
  set_bytes(window.state + begin, bytes, kUninitialized);
  return window.data + begin;
}

void clear_window() {
  set_bytes(window.state, window.used, kOutside);
  poison(window.data, window.used);
  window.used = 0;
}

// Null if the bytes are not all within one array.
uint8_t* state_of(uintptr_t address, size_t bytes) {
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(window.data);
  if (offset < block.shared_begin || offset >= window.used || bytes > window.used - offset) return nullptr;
  uint8_t* state = window.state + offset;
  for (size_t i = 0; i < bytes; ++i) {
    if (state[i] == kOutside) return nullptr;
  }
  return state;
}

bool is_global(uintptr_t address, size_t bytes) {
  const auto holds = [&](const Range& range) { return address >= range.begin && address + bytes <= range.end; };
  if (holds(recent_range)) return true;
  for (const Range& range : global_ranges) {
    if (!holds(range)) continue;
    recent_range = range;
    return true;
  }
  return false;
}

void count_access(Access access, uintptr_t address, size_t bytes, Site site) {
  if (!counting) return;
  block.warps[self->index / kWarpLanes].accounting.add(access, address, static_cast<uint32_t>(bytes),
                                                       static_cast<int>(self->index % kWarpLanes), site);
}

void check_shared(Access access, uintptr_t address, size_t bytes, Site site) {
  uint8_t* state = state_of(address, bytes);
  if (state == nullptr) fail(text(describe(access, bytes), " out of bounds: ", where_in_shared(address)), site);
  for (size_t i = 0; i < bytes; ++i) {
    if (state[i] == kInFlight) {
      fail(text(describe(access, bytes), " under an asynchronous copy: ", where_in_shared(address + i)), site);
    }
    if (access == Access::kSharedRead && state[i] == kUninitialized) {
      fail(text(describe(access, bytes), " that is uninitialized: ", where_in_shared(address + i)), site);
    }
  }
  if (access != Access::kSharedRead) {
    set_bytes(state, bytes, access == Access::kSharedWrite ? kInitialized : kInFlight);
  }
}

// ---- Launching ----

void start_thread(std::vector<std::unique_ptr<Thread>>& pool, uint32_t index) {
  if (index == pool.size()) pool.push_back(std::make_unique<Thread>(fiber_main));
  Thread* thread = pool[index].get();
  thread->index = index;
  thread->waits_at = nullptr;
  thread->collective = nullptr;
  thread->mask = 0;
  thread->exited = false;
  thread->site = {current.kernel, 0};
  thread->copies.clear();
  thread->landed = thread->group = 0;
  block.threads[index] = thread;
  ready.push(thread);
}

void start_warp(uint32_t index) {
  Warp& warp = block.warps[index];
  const uint32_t lanes = std::min(kWarpLanes, block.count - index * kWarpLanes);
  warp.lanes = static_cast<uint32_t>((uint64_t{1} << lanes) - 1);
  warp.exited = warp.waiting = 0;
  for (uint32_t& phase : warp.phase) phase = 0;
  warp.sync = kThreadSanitizer ? take_sync_variables(2 * kWarpLanes * 8) : nullptr;
}

void run_block(uint64_t index) {
  blockIdx = {static_cast<uint32_t>(index % gridDim.x), static_cast<uint32_t>(index / gridDim.x % gridDim.y),
              static_cast<uint32_t>(index / gridDim.x / gridDim.y)};
  current.random = (options().seed * 0x9e3779b97f4a7c15u + index) * 0xbf58476d1ce4e5b9u | 1;
  if (!kThreadSanitizer) clear_window();
  block.arrays.clear();
  block.shared_begin = window.used;
  block.static_bytes = 0;
  block.count = block.live = blockDim.x * blockDim.y * blockDim.z;
  block.arrived = block.votes = block.phase = 0;
  block.sync = kThreadSanitizer ? take_sync_variables(2 * 8) : nullptr;
  block.dynamic_shared = take_array(nullptr, current.shared_bytes, {"dynamic shared memory", 0});
  for (uint32_t w = 0; w * kWarpLanes < block.count; ++w) start_warp(w);
  ready.head = ready.count = 0;
  auto& pool = pools[kThreadSanitizer ? index % 2 : 0];
  for (uint32_t i = 0; i < block.count; ++i) start_thread(pool, i);

  self = ready.pop(options().seed == 0 ? 0 : random_below(ready.count));
  threadIdx = thread_position(self->index);
  Fiber::switch_to(host, self->fiber);

  if (current.failure.empty() && block.live != 0) current.failure = deadlock();
  if (counting) {
    close_accounting();
    ++counters.blocks;
  }
}

void run_grid() {
  const uint64_t blocks = uint64_t{gridDim.x} * gridDim.y * gridDim.z;
  // In order, or from somewhere on in either direction: no block may rely on another.
  const uint64_t seed = options().seed;
  const uint64_t first = seed * 0x9e3779b97f4a7c15u % blocks;
  for (uint64_t i = 0; i < blocks && current.failure.empty(); ++i) {
    const uint64_t index = (first + i) % blocks;
    run_block(seed % 2 == 0 ? index : blocks - 1 - index);
  }
}

void check_launch(const char* kernel, dim3 grid, dim3 block_size, size_t shared_bytes) {
  const auto refuse = [&](const auto&... what) { throw Error(text(kernel, ": ", what...)); };
  if (current.kernel != nullptr) refuse("launched by a kernel");
  const uint64_t threads = uint64_t{block_size.x} * block_size.y * block_size.z;
  if (threads == 0 || threads > kMaxThreads || block_size.z > 64) {
    refuse("blocks of ", threads, " threads; 1 to 1024 are possible");
  }
  if (grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) refuse("the grid is too large");
  if (shared_bytes > kMaxSharedBytes) refuse(shared_bytes, " bytes of shared memory; there are ", kMaxSharedBytes);
}

Options options_of_environment() {
  const char* seed = std::getenv("DYNAMIC_MOE_SIMT_SEED");
  const char* landing = std::getenv("DYNAMIC_MOE_SIMT_LANDING");
  Options chosen{seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10), Landing::kLate, 4};
  if (landing != nullptr && std::string(landing) == "early") {
    chosen.landing = Landing::kEarly;
  } else if (landing != nullptr && std::string(landing) != "late") {
    throw Error(text("DYNAMIC_MOE_SIMT_LANDING must be late or early, got ", landing));
  }
  return chosen;
}

}  // namespace

Options& options() {
  static Options chosen = options_of_environment();
  return chosen;
}

void start_counting() {
  counters = {};
  counting = true;
}
Counters stop_counting() {
  counting = false;
  return counters;
}

void register_global(const void* data, size_t bytes) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  global_ranges.push_back({begin, begin + bytes});
}
void unregister_global(const void* data) {
  const auto begin = reinterpret_cast<uintptr_t>(data);
  const auto it = std::find_if(global_ranges.begin(), global_ranges.end(), [&](Range r) { return r.begin == begin; });
  if (it != global_ranges.end()) global_ranges.erase(it);
  recent_range = {};
}
void fill(void* data, int value, size_t bytes) {
  if (bytes == 0) return;
  if (!is_global(reinterpret_cast<uintptr_t>(data), bytes)) throw Error("memset of what is not device memory");
  std::memset(data, value, bytes);
}
void copy(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return;
  if (!is_global(reinterpret_cast<uintptr_t>(from), bytes)) throw Error("copy of what is not device memory");
  std::memcpy(to, from, bytes);
}

void launch(const char* kernel, dim3 grid, dim3 block_size, size_t shared_bytes, void (*body)(const void*),
            const void* context) {
  check_launch(kernel, grid, block_size, shared_bytes);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (window.data == nullptr) reserve_window();
  gridDim = grid;
  blockDim = block_size;
  current.kernel = kernel;
  current.body = body;
  current.context = context;
  current.shared_bytes = shared_bytes;
  current.failure.clear();
  if (counting) ++counters.launches;

  release(&launch_sync);
  run_grid();
  acquire(&end_sync);
  clear_window();

  current.kernel = nullptr;
  if (current.failure.empty()) return;
  for (auto& pool : pools) pool.clear();  // stacks that stopped midway
  throw Error(current.failure);
}

void* shared_array(const void* key, size_t bytes, Site site) {
  for (const SharedArray& array : block.arrays) {
    if (array.key == key) return window.data + array.begin;
  }
  block.static_bytes += bytes;
  if (block.static_bytes > kMaxStaticSharedBytes || block.static_bytes + current.shared_bytes > kMaxSharedBytes) {
    fail(text(block.static_bytes, " bytes of static shared memory are too many"), site);
  }
  return take_array(key, bytes, site);
}
void* dynamic_shared() { return block.dynamic_shared; }

void fail(const char* what, Site site) { fail(std::string(what), site); }

void check(Access access, const void* address, size_t bytes, Site site) {
  const auto place = reinterpret_cast<uintptr_t>(address);
  if (place % bytes != 0) fail(text(describe(access, bytes), " is misaligned"), site);
  if (access == Access::kSharedRead || access == Access::kSharedWrite) {
    check_shared(access, place, bytes, site);
  } else if (!is_global(place, bytes)) {
    fail(text(describe(access, bytes), " outside of every buffer"), site);
  }
  count_access(access, place, bytes, site);
}

void check_atomic(const void* address, size_t bytes, Site site) {
  const auto place = reinterpret_cast<uintptr_t>(address);
  if (place % bytes != 0) fail("misaligned atomic operation", site);
  if (!is_global(place, bytes)) check_shared(Access::kSharedRead, place, bytes, site);
  if (counting) ++counters.atomics;
  maybe_yield();
}

uint32_t shared_offset(const void* address, Site site) {
  const auto place = reinterpret_cast<uintptr_t>(address);
  if (state_of(place, 1) == nullptr) fail("not a shared address of this block", site);
  return static_cast<uint32_t>(place - reinterpret_cast<uintptr_t>(window.data) - block.shared_begin);
}

void collective(const Collective& what, uint32_t mask, Words& words, Site site) {
  Thread& me = *self;
  Warp& warp = block.warps[me.index / kWarpLanes];
  const uint32_t lane = me.index % kWarpLanes, first_thread = me.index - lane;
  if ((mask >> lane & 1) == 0) fail(text(what.name, ": the mask lacks the calling lane"), site);
  if (const uint32_t gone = mask & (warp.exited | ~warp.lanes); gone != 0) {
    fail(text(what.name, ": the mask names ", lanes_of(gone), ", which exited or never was"), site);
  }
  if (const uint32_t others = mask & warp.waiting; others != 0) {
    // One of them speaks for all: each was compared with an earlier one when it came.
    const Thread& other = *block.threads[first_thread + std::countr_zero(others)];
    const bool together = other.site.line == site.line && other.site.file == site.file;
    if (other.collective != &what || other.mask != mask || (what.aligned && !together)) {
      fail(text(what.name, " for ", lanes_of(mask), ", but thread ", other.index, " waits at ", other.waits_at, " for ",
                lanes_of(other.mask), ", ", at(other.site)),
           site);
    }
  }

  const uint32_t lowest = static_cast<uint32_t>(std::countr_zero(mask));
  char* sync = warp.sync + (2 * lowest + warp.phase[lowest] % 2) * 8;
  if (what.orders_memory) release(sync);
  for (int i = 0; i < 12; ++i) warp.in[lane].word[i] = words.word[i];
  me.collective = &what;
  me.mask = mask;
  me.site = site;
  warp.waiting |= uint32_t{1} << lane;
  if ((warp.waiting & mask) == mask) {
    try {
      what.combine(warp.in, warp.out, mask);
    } catch (const char* illegal) {
      fail(illegal, site);
    }
    if (what.counter != nullptr && counting) ++(counters.*what.counter);
    if (counting && mask == (warp.lanes & ~warp.exited)) warp.accounting.close(counters);
    ++warp.phase[lowest];
    warp.waiting &= ~mask;
    for (uint32_t lanes = mask; lanes != 0; lanes &= lanes - 1) {
      wake(block.threads[first_thread + std::countr_zero(lanes)]);
    }
    run_others();
  } else {
    wait(what.name, site);
  }
  if (what.orders_memory) acquire(sync);
  for (int i = 0; i < 12; ++i) words.word[i] = warp.out[lane].word[i];
}

int block_barrier(Barrier kind, int predicate, Site site) {
  static constexpr const char* kNames[] = {"__syncthreads", "__syncthreads_or", "__syncthreads_and",
                                           "__syncthreads_count"};
  const char* name = kNames[static_cast<int>(kind)];
  if (block.arrived != 0) {
    for (uint32_t i = 0; i < block.count; ++i) {
      const Thread& other = *block.threads[i];
      if (other.waits_at == nullptr || other.collective != nullptr) continue;
      if (other.site.line == site.line && other.site.file == site.file && block.barrier == kind) break;
      fail(text("divergent barrier: ", name, ", but thread ", i, " waits at ", other.waits_at, ", ", at(other.site)),
           site);
    }
  }
  const uint32_t phase = block.phase;
  char* sync = block.sync + phase % 2 * 8;
  release(sync);
  block.barrier = kind;
  block.votes += predicate != 0;
  self->waits_at = name;
  self->site = site;
  if (++block.arrived == block.live) complete_barrier();
  run_others();
  acquire(sync);
  return block.result[phase % 2];
}

void thread_fence() {
  acquire(&fence_sync);
  release(&fence_sync);
}

bool issue_copy(const AsyncCopy& copy, Site site) {
  const auto to = reinterpret_cast<uintptr_t>(copy.shared), from = reinterpret_cast<uintptr_t>(copy.global);
  if (to % copy.bytes != 0 || from % copy.bytes != 0) fail("misaligned asynchronous copy", site);
  check_shared(Access::kSharedCopy, to, copy.bytes, site);
  count_access(Access::kSharedCopy, to, copy.bytes, site);
  if (copy.global != nullptr) {
    if (!is_global(from, copy.bytes)) fail("asynchronous copy from outside of every buffer", site);
    count_access(Access::kGlobalRead, from, copy.bytes, site);
  }
  AsyncCopy& queued = self->copies.push();
  queued = copy;
  queued.group = self->group;
  self->site = site;
  return options().landing == Landing::kEarly;
}

void commit_copies() { ++self->group; }

bool next_landing(uint32_t pending_groups, AsyncCopy& copy) {
  Thread& me = *self;
  while (me.landed < me.copies.size()) {
    copy = me.copies[me.landed];
    if (copy.group + pending_groups >= me.group) return false;
    ++me.landed;
    set_bytes(state_of(reinterpret_cast<uintptr_t>(copy.shared), copy.bytes), copy.bytes, kInitialized);
    if (options().landing == Landing::kLate) return true;
  }
  me.copies.clear();
  me.landed = 0;
  return false;
}

int lane() { return static_cast<int>(self->index % kWarpLanes); }

}  // namespace simt

namespace dynamic_moe {

DeviceLimits current_device_limits() { return {simt::options().sm_count, 8, 0, simt::kMaxSharedBytes}; }

}  // namespace dynamic_moe
