// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels on the host: the threads of a block are fibres of one host thread, blocks run one after another. A
// fibre runs until it must wait for others; which one goes on then is drawn from a seed. Whatever a kernel does wrong
// becomes a simt::Error with the kernel, the block, the thread, and the line of the source.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

struct uint3 {
  unsigned int x, y, z;
};
struct dim3 {
  unsigned int x, y, z;
  constexpr dim3(unsigned int x_ = 1, unsigned int y_ = 1, unsigned int z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the fibre that is running.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A place in the source. As a default argument, that of the caller.
struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// ---- What a run chooses ----

enum class Landing {
  kLate,  // asynchronous copies write when they are waited for
  kEarly  // ... and at once
};

struct Options {
  uint64_t seed;    // of the schedule; 0: in the order of threads
  Landing landing;  //
  int sm_count;     // what current_device_limits() says, along with compute capability 8.0
};

// At first from the environment: DYNAMIC_MOE_SIMT_SEED (0), DYNAMIC_MOE_SIMT_LANDING=late|early (late); 4 SMs.
Options& options();

// ---- What a launch costs ----

// Accesses that the lanes of a warp make at one place of the source, each for the same time since the warp last came
// together, are one request, as they are on a device.
struct Counters {
  uint64_t launches = 0, blocks = 0;
  uint64_t global_read_requests = 0, global_read_sectors = 0;    // sectors of 32 bytes, each once per request;
  uint64_t global_write_requests = 0, global_write_sectors = 0;  // cp.async reads count here too
  uint64_t shared_read_requests = 0, shared_read_wavefronts = 0;
  uint64_t shared_write_requests = 0, shared_write_wavefronts = 0;  // cp.async writes count here too
  uint64_t bank_conflicts = 0;                                      // wavefronts beyond the fewest possible
  uint64_t mma = 0, ldmatrix = 0, cp_async = 0, shuffles = 0;       // instructions of a warp
  uint64_t atomics = 0;                                             // operations of single threads
  uint64_t barriers = 0;                                            // __syncthreads of a block
};

void start_counting();
Counters stop_counting();

// counters_of([&] { launcher(params, workspace, stream); }).global_read_sectors
template <class Action>
Counters counters_of(const Action& action) {
  struct Guard {
    Guard() { start_counting(); }
    ~Guard() { stop_counting(); }
  } guard;
  action();
  return stop_counting();
}

// ---- Device memory ----

// Kernels may touch registered memory only.
void register_global(const void* data, size_t bytes);
void unregister_global(const void* data);
void fill(void* data, int value, size_t bytes);
void copy(void* to, const void* from, size_t bytes);

// ---- For launch.cuh and shared.cuh ----

void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
            const void* context);

template <class Body>
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, const Body& body) {
  launch(kernel, grid, block, shared_bytes, [](const void* context) { (*static_cast<const Body*>(context))(); }, &body);
}

void* shared_array(const void* key, size_t bytes, Site site);
void* dynamic_shared();

// ---- For the words: everything below is called by running fibres ----

enum class Access { kGlobalRead, kGlobalWrite, kSharedRead, kSharedWrite, kSharedCopy /* by cp.async */ };

// Ends the launch with an Error.
[[noreturn]] void fail(const char* what, Site site);

// Checks bounds, alignment to `bytes` and, for reads of shared memory, that something was written there; counts.
void check(Access access, const void* address, size_t bytes, Site site);
void check_atomic(const void* address, size_t bytes, Site site);
uint32_t shared_offset(const void* address, Site site);

// One lane's share of what a warp exchanges.
struct Words {
  uint32_t word[12];
};

// What the lanes of a warp do together. The lane that completes the mask runs `combine` for all.
struct Collective {
  const char* name;
  void (*combine)(const Words* in, Words* out, uint32_t mask);  // both [32], by lane; throws a const char* if illegal
  uint64_t Counters::* counter;                                 // or null
  bool aligned;                                                 // needs all 32 lanes at one place of the source
  bool orders_memory;
};
extern const Collective kSyncWarp, kShuffle, kBallot, kMatchAny, kReduceAdd, kReduceMinInt, kReduceMaxInt,
    kReduceMinUnsigned, kReduceMaxUnsigned, kLdmatrix, kLdmatrixTrans, kMmaBFloat16, kMmaHalf, kMmaTf32;

void collective(const Collective& what, uint32_t mask, Words& words, Site site);

enum class Barrier { kPlain, kOr, kAnd, kCount };
int block_barrier(Barrier kind, int predicate, Site site);

void thread_fence();

// Asynchronous copies of the running thread.
struct AsyncCopy {
  void* shared;
  const void* global;  // null: zeros
  uint32_t bytes;
  uint32_t group;
};
bool issue_copy(const AsyncCopy& copy, Site site);  // whether it lands now
void commit_copies();
bool next_landing(uint32_t pending_groups, AsyncCopy& copy);  // false when all that must land have landed

int lane();

}  // namespace simt
