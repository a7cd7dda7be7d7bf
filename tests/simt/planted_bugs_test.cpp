// SPDX-License-Identifier: Apache-2.0
// Kernels that are wrong on purpose: each must be caught, and the message must lead to the line.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "common/cuda/launch.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/shared.cuh"
#include "cuda/support/device_buffer.h"
#include "simt/sanitizers.h"

namespace dynamic_moe::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// What the harness says of a launch; empty if nothing.
template <class Kernel, class... Arguments>
std::string verdict(const Kernel& kernel, dim3 block, const Arguments&... arguments) {
  try {
    simt::launch("planted_kernel", 2, block, 1024, [&] { kernel(arguments...); });
  } catch (const simt::Error& error) {
    return error.what();
  }
  return "";
}

// Checks a bug at every landing and several schedules.
template <class Check>
void at_every_schedule(const Check& check) {
  const simt::Options before = simt::options();
  for (const simt::Landing landing : {simt::Landing::kLate, simt::Landing::kEarly}) {
    for (const uint64_t seed : {0, 1, 2, 3}) {
      simt::options().landing = landing;
      simt::options().seed = seed;
      SCOPED_TRACE(::testing::Message() << "seed " << seed << ", landing " << static_cast<int>(landing));
      check();
    }
  }
  simt::options() = before;
}

// ---- Who waits for whom ----

TEST(PlantedBugs, DivergentBarriers) {
  const auto kernel = [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  };
  at_every_schedule([&] {
    EXPECT_THAT(verdict(kernel, 64), AllOf(HasSubstr("planted_kernel, block ("), HasSubstr("divergent barrier"),
                                           HasSubstr("planted_bugs_test.cpp:"), HasSubstr("waits at __syncthreads")));
  });
}

TEST(PlantedBugs, DifferentBarriersAtOnePlace) {
  const auto kernel = [] { threadIdx.x < 32 ? __syncthreads() : static_cast<void>(__syncthreads_or(1)); };
  at_every_schedule([&] { EXPECT_THAT(verdict(kernel, 64), HasSubstr("divergent barrier")); });
}

TEST(PlantedBugs, ABarrierWithinABranchOfAWarpThatShuffles) {
  const auto kernel = [] {
    if (threadIdx.x % 32 < 8) __syncthreads();
    __shfl_sync(0xffffffffu, 1, 0);
    __syncthreads();
  };
  at_every_schedule([&] {
    EXPECT_THAT(verdict(kernel, 64),
                AllOf(HasSubstr("deadlock"), HasSubstr("threads 0-7, 32-39 wait at __syncthreads"),
                      HasSubstr("threads 8-31 wait at __shfl_sync"), HasSubstr("for lanes 0-7 of warp 0")));
  });
}

TEST(PlantedBugs, ABarrierThatSomeThreadsNeverReach) {
  const auto kernel = [] {
    if (threadIdx.x == 5) __syncwarp();
    __syncthreads();
  };
  at_every_schedule([&] {
    EXPECT_THAT(verdict(kernel, 32),
                AllOf(HasSubstr("deadlock; threads 0-4, 6-31 wait at __syncthreads"),
                      HasSubstr("thread 5 waits at __syncwarp"), HasSubstr("for lanes 0-4, 6-31 of warp 0")));
  });
}

TEST(PlantedBugs, AnExitedLaneInTheMask) {
  const auto kernel = [] {
    if (threadIdx.x == 7) return;
    __shfl_xor_sync(0xffffffffu, 1, 1);
  };
  at_every_schedule([&] {
    EXPECT_THAT(verdict(kernel, 32), ::testing::AnyOf(HasSubstr("the mask names lane 7, which exited"),
                                                      HasSubstr("exits, but is in the mask of __shfl_sync")));
  });
}

TEST(PlantedBugs, AMaskWithLanesThatABlockDoesNotHave) {
  at_every_schedule([&] {
    EXPECT_THAT(verdict([] { __ballot_sync(0xffffffffu, 1); }, 48),
                HasSubstr("the mask names lanes 16-31, which exited or never was"));
  });
}

TEST(PlantedBugs, AMaskWithoutTheCallingLane) {
  at_every_schedule(
      [&] { EXPECT_THAT(verdict([] { __syncwarp(0xffff); }, 32), HasSubstr("the mask lacks the calling lane")); });
}

TEST(PlantedBugs, MasksThatDisagree) {
  at_every_schedule([&] {
    EXPECT_THAT(verdict([] { __ballot_sync(threadIdx.x == 3 ? 0xfu : 0xffffffffu, 1); }, 32),
                HasSubstr("waits at __ballot_sync for lanes 0-"));
  });
}

TEST(PlantedBugs, DifferentCollectivesOfOneMask) {
  const auto kernel = [] {
    if (threadIdx.x < 16) {
      __ballot_sync(0xffffffffu, 1);
    } else {
      __shfl_sync(0xffffffffu, 1, 0);
    }
  };
  at_every_schedule([&] { EXPECT_THAT(verdict(kernel, 32), HasSubstr("waits at __")); });
}

TEST(PlantedBugs, AnMmaInADivergentBranch) {
  const auto kernel = [] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x < 16) {
      ptx::mma_m16n8k16<__half>(d, a, b);
    } else {
      ptx::mma_m16n8k16<__half>(d, a, b);
    }
  };
  at_every_schedule([&] { EXPECT_THAT(verdict(kernel, 32), HasSubstr("waits at mma.m16n8k16.f16")); });
}

TEST(PlantedBugs, AShuffleFromALaneOutsideTheMask) {
  const auto kernel = [] {
    if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
  };
  at_every_schedule([&] { EXPECT_THAT(verdict(kernel, 32), HasSubstr("reads from a lane that is not in the mask")); });
}

// ---- Addresses ----

TEST(PlantedBugs, MisalignedVectorAccess) {
  const DeviceBuffer<float> buffer(64);
  const auto kernel = [](const float* data) { load_global(reinterpret_cast<const float4*>(data + 1)); };
  at_every_schedule([&] {
    EXPECT_THAT(verdict(kernel, 32, buffer.data()),
                AllOf(HasSubstr("16-byte read of global memory is misaligned"), HasSubstr("planted_bugs_test.cpp:")));
  });
}

TEST(PlantedBugs, MisalignedLdmatrixRow) {
  const auto kernel = [] {
    DYNAMIC_MOE_SHARED(uint16_t, tile, 512);
    for (uint32_t i = threadIdx.x; i < 512; i += 32) store_shared(&tile[i], uint16_t{1});
    __syncthreads();
    uint32_t r[4];
    ptx::ldmatrix_x4(r, &tile[threadIdx.x * 8 + 4]);
  };
  at_every_schedule(
      [&] { EXPECT_THAT(verdict(kernel, 32), HasSubstr("16-byte read of shared memory is misaligned")); });
}

TEST(PlantedBugs, MisalignedAsyncCopy) {
  DeviceBuffer<float> buffer(64);
  const auto kernel = [](const float* data, int to, int from) {
    DYNAMIC_MOE_SHARED(float, tile, 64);
    ptx::cp_async<8>(tile + to, data + from);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  };
  at_every_schedule([&] {
    EXPECT_THAT(verdict(kernel, 1, buffer.data(), 1, 0), HasSubstr("misaligned asynchronous copy"));
    EXPECT_THAT(verdict(kernel, 1, buffer.data(), 0, 3), HasSubstr("misaligned asynchronous copy"));
    EXPECT_EQ(verdict(kernel, 1, buffer.data(), 2, 4), "");
  });
}

TEST(PlantedBugs, SharedArrayOverrun) {
  const auto kernel = [](bool write) {
    DYNAMIC_MOE_SHARED(float, tile, 30);
    float* mine = &tile[0] + threadIdx.x;
    if (threadIdx.x < 30) store_shared(mine, 1.0f);
    __syncthreads();
    if (write) store_shared(mine, 1.0f);
    load_shared(mine);
  };
  at_every_schedule([&] {
    EXPECT_THAT(verdict(kernel, 32, false), AllOf(HasSubstr("4-byte read of shared memory out of bounds: byte 12"),
                                                  HasSubstr(" of 120, array of planted_bugs_test.cpp:")));
    EXPECT_THAT(verdict(kernel, 32, true), HasSubstr("4-byte write to shared memory out of bounds"));
  });
}

TEST(PlantedBugs, GlobalOverrun) {
  DeviceBuffer<float> buffer(60);
  const auto read = [](float* data) { load_global(data + threadIdx.x); };
  const auto write = [](float* data) { store_global(data + threadIdx.x, 0.0f); };
  const auto copy = [](float* data) {
    DYNAMIC_MOE_SHARED(float, tile, 64);
    ptx::cp_async<4>(tile + threadIdx.x, data + threadIdx.x);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
  };
  at_every_schedule([&] {
    EXPECT_THAT(verdict(read, 61, buffer.data()), HasSubstr("4-byte read of global memory outside of every buffer"));
    EXPECT_THAT(verdict(write, 61, buffer.data()), HasSubstr("4-byte write to global memory outside of every buffer"));
    EXPECT_THAT(verdict(copy, 61, buffer.data()), HasSubstr("asynchronous copy from outside of every buffer"));
    EXPECT_EQ(verdict(copy, 60, buffer.data()), "");
  });
}

TEST(PlantedBugs, HostMemoryInAKernel) {
  const std::vector<float> host(32);
  at_every_schedule([&] {
    EXPECT_THAT(verdict([](const float* data) { load_global(data); }, 32, host.data()),
                HasSubstr("outside of every buffer"));
  });
}

// ---- Shared memory before its time ----

TEST(PlantedBugs, UninitializedSharedMemory) {
  const auto kernel = [] {
    DYNAMIC_MOE_SHARED(float, tile, 64);
    if (threadIdx.x != 9) store_shared(&tile[threadIdx.x], 1.0f);
    __syncthreads();
    load_shared(&tile[threadIdx.x ^ 1]);
  };
  at_every_schedule([&] {
    EXPECT_THAT(verdict(kernel, 64),
                AllOf(HasSubstr("thread (8, 0, 0)"), HasSubstr("that is uninitialized: byte 36 of")));
  });
}

TEST(PlantedBugs, SharedMemoryOfTheBlockBefore) {
  const auto kernel = [] {
    DYNAMIC_MOE_SHARED(int, tile, 1);
    if (blockIdx.x == 0) store_shared(&tile[0], 1);
    load_shared(&tile[0]);
  };
  at_every_schedule([&] { EXPECT_THAT(verdict(kernel, 1), HasSubstr("block (1, 0, 0)")); });
}

TEST(PlantedBugs, AtomicOnUninitializedSharedMemory) {
  const auto kernel = [] {
    DYNAMIC_MOE_SHARED(int, tile, 1);
    atomicAdd(&tile[0], 1);
  };
  at_every_schedule([&] { EXPECT_THAT(verdict(kernel, 1), HasSubstr("uninitialized")); });
}

TEST(PlantedBugs, UninitializedRowOfLdmatrix) {
  const auto kernel = [] {
    DYNAMIC_MOE_DYNAMIC_SHARED(uint4, rows);
    if (threadIdx.x < 31) store_shared(&rows[threadIdx.x], uint4{});
    __syncthreads();
    uint32_t r[4];
    ptx::ldmatrix_x4(r, &rows[threadIdx.x]);
  };
  at_every_schedule([&] { EXPECT_THAT(verdict(kernel, 32), HasSubstr("uninitialized: byte 496 of 1024")); });
}

// A two-stage pipeline over 4 tiles of a warp, each lane copying one float of each and reading its neighbor's.
struct Pipeline {
  bool waits = true, barrier_before_refill = true;

  void operator()(const float* data, float* sums) const {
    DYNAMIC_MOE_SHARED(float, stage, 64);
    const auto load = [&](int tile) {
      if (tile < 4) ptx::cp_async<4>(&stage[tile % 2 * 32 + threadIdx.x], data + tile * 32 + threadIdx.x);
      ptx::cp_async_commit();
    };
    load(0);
    float sum = 0;
    for (int tile = 0; tile < 4; ++tile) {
      if (!barrier_before_refill) load(tile + 1);
      if (waits) ptx::cp_async_wait<0>();
      __syncthreads();
      if (barrier_before_refill) load(tile + 1);
      sum += load_shared(&stage[tile % 2 * 32 + (threadIdx.x ^ 1)]);
    }
    store_global(sums + blockIdx.x * 32 + threadIdx.x, sum);
  }
};

class PipelineBugs : public ::testing::Test {
 protected:
  PipelineBugs() : data(128), sums(64) {
    std::vector<float> values(128);
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i / 32);
    data.upload(values);
  }
  bool right() const { return sums.download() == std::vector<float>(64, 6.0f); }

  DeviceBuffer<float> data, sums;
};

TEST_F(PipelineBugs, NoneInTheRightOne) {
  at_every_schedule([&] {
    EXPECT_EQ(verdict(Pipeline{}, 32, data.data(), sums.data()), "");
    EXPECT_TRUE(right());
  });
}

TEST_F(PipelineBugs, MissingWait) {
  at_every_schedule([&] {
    EXPECT_THAT(verdict(Pipeline{.waits = false}, 32, data.data(), sums.data()),
                HasSubstr("read of shared memory under an asynchronous copy"));
  });
}

// The stage that is filled anew is one that slower threads may still read: they read the wrong tile.
TEST_F(PipelineBugs, PrefetchIntoALiveStage) {
  if (simt::kThreadSanitizer) GTEST_SKIP() << "the race would end the program";
  at_every_schedule([&] {
    const std::string said = verdict(Pipeline{.barrier_before_refill = false}, 32, data.data(), sums.data());
    EXPECT_TRUE(!said.empty() || !right());
  });
}

// ... and here, where the copies are not waited for before the barrier, while they are under way.
TEST_F(PipelineBugs, PrefetchIntoAStageThatOthersRead) {
  const auto kernel = [](const float* from) {
    DYNAMIC_MOE_SHARED(float, stage, 32);
    store_shared(&stage[threadIdx.x], 1.0f);
    __syncthreads();
    load_shared(&stage[threadIdx.x ^ 1]);
    ptx::cp_async<4>(&stage[threadIdx.x], from + threadIdx.x);
    ptx::cp_async_commit();
    __syncthreads();
    ptx::cp_async_wait<0>();
  };
  at_every_schedule([&] {
    EXPECT_THAT(verdict(kernel, 32, data.data()), HasSubstr("read of shared memory under an asynchronous copy"));
  });
}

TEST_F(PipelineBugs, OutstandingCopies) {
  const auto kernel = [](const float* from, bool commits) {
    DYNAMIC_MOE_SHARED(float, tile, 32);
    ptx::cp_async<4>(&tile[threadIdx.x], from + threadIdx.x);
    if (commits) ptx::cp_async_commit();
    if (!commits) ptx::cp_async_wait<0>();
  };
  at_every_schedule([&] {
    for (const bool commits : {true, false}) {
      EXPECT_THAT(verdict(kernel, 32, data.data(), commits),
                  HasSubstr("1 asynchronous copies are outstanding at exit"));
    }
  });
}

TEST_F(PipelineBugs, CopiesIntoOnePlace) {
  const auto kernel = [](const float* from) {
    DYNAMIC_MOE_SHARED(float, tile, 1);
    ptx::cp_async<4>(&tile[0], from);
    ptx::cp_async<4>(&tile[0], from + 1);
  };
  at_every_schedule([&] {
    EXPECT_THAT(verdict(kernel, 1, data.data()), HasSubstr("asynchronous copy to shared memory under an asynchronous"));
  });
}

// ---- Launches, and what happens after a failure ----

TEST(PlantedBugs, ImpossibleLaunches) {
  const auto refused = [](dim3 grid, dim3 block, size_t shared) {
    try {
      simt::launch("planted_kernel", grid, block, shared, [] {});
    } catch (const simt::Error& error) {
      return std::string(error.what());
    }
    return std::string();
  };
  EXPECT_THAT(refused(1, 1025, 0), HasSubstr("blocks of 1025 threads"));
  EXPECT_THAT(refused(1, 0, 0), HasSubstr("blocks of 0 threads"));
  EXPECT_THAT(refused({1, 65536}, 1, 0), HasSubstr("the grid is too large"));
  EXPECT_THAT(refused(1, 1, 163 * 1024 + 1), HasSubstr("bytes of shared memory"));
  EXPECT_EQ(refused(0, 1, 0), "");
  EXPECT_EQ(refused(1, 1024, 163 * 1024), "");
}

TEST(PlantedBugs, TooMuchStaticSharedMemory) {
  const auto kernel = [] {
    DYNAMIC_MOE_SHARED(char, tile, 48 * 1024 + 1);
    static_cast<void>(tile);
  };
  EXPECT_THAT(verdict(kernel, 1), HasSubstr("bytes of static shared memory are too many"));
}

TEST(PlantedBugs, LeaveTheHarnessUsable) {
  DeviceBuffer<int> count(std::vector<int>{0});
  const auto kernel = [](int* total, bool wrong) {
    if (wrong && threadIdx.x == 100) __syncwarp(0);
    __syncthreads();
    atomicAdd(total, 1);
  };
  at_every_schedule([&] {
    EXPECT_NE(verdict(kernel, 256, count.data(), true), "");
    count.upload(std::vector<int>{0});
    EXPECT_EQ(verdict(kernel, 256, count.data(), false), "");
    EXPECT_EQ(count.download()[0], 512);
  });
}

}  // namespace
}  // namespace dynamic_moe::testing
