// SPDX-License-Identifier: Apache-2.0
// Planted bugs that only a sanitizer sees, each in its build: raw accesses that nothing checks, and races.
#include <gtest/gtest.h>

#include <array>

#include "common/cuda/launch.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/shared.cuh"
#include "cuda/support/device_buffer.h"
#include "simt/sanitizers.h"

namespace dynamic_moe::testing {
namespace {

class SanitizerDeathTest : public ::testing::Test {
 protected:
  // A program of its own for each death: fork alone would leave the sanitizer's state half copied.
  void SetUp() override { ::testing::FLAGS_gtest_death_test_style = "threadsafe"; }
};
using AddressDeathTest = SanitizerDeathTest;
using ThreadDeathTest = SanitizerDeathTest;

template <class Body>
void run(unsigned blocks, unsigned threads, const Body& body) {
  simt::launch("planted_kernel", blocks, threads, 64, body);
}

#define NEEDS(sanitizer) \
  if (!simt::sanitizer) GTEST_SKIP() << "only in a build with " #sanitizer

// Whatever stands below is legal without its last line.
TEST_F(AddressDeathTest, SharedOverrun) {
  NEEDS(kAddressSanitizer);
  EXPECT_DEATH(run(1, 1,
                   [] {
                     DYNAMIC_MOE_SHARED(float, tile, 30);
                     tile[29] = 1;
                     (&tile[0])[30 + threadIdx.x] = 1;
                   }),
               "use-after-poison");
}

TEST_F(AddressDeathTest, DynamicSharedOverrun) {
  NEEDS(kAddressSanitizer);
  EXPECT_DEATH(run(1, 1,
                   [] {
                     DYNAMIC_MOE_DYNAMIC_SHARED(volatile float, tile);
                     tile[15] = 1;
                     tile[16 + threadIdx.x] = 1;
                   }),
               "use-after-poison");
}

TEST_F(AddressDeathTest, SharedMemoryOfAnEarlierBlock) {
  NEEDS(kAddressSanitizer);
  EXPECT_DEATH(
      {
        volatile float* leaked = nullptr;
        run(1, 1, [&] {
          DYNAMIC_MOE_SHARED(float, tile, 30);
          leaked = tile;
          leaked[0] = 1;
        });
        run(1, 1, [&] { leaked[0] = 1; });
      },
      "use-after-poison");
}

TEST_F(AddressDeathTest, GlobalOverrun) {
  NEEDS(kAddressSanitizer);
  DeviceBuffer<float> buffer(30);
  volatile float* data = buffer.data();
  EXPECT_DEATH(run(1, 32, [&] { data[threadIdx.x] = 1; }), "heap-buffer-overflow");
}

// The value is thrown away, but the row was read.
TEST_F(AddressDeathTest, RowBeyondTheEndThatIsThenMasked) {
  NEEDS(kAddressSanitizer);
  DeviceBuffer<float> rows(3 * 8), sums(4);
  const volatile float* from = rows.data();
  float* to = sums.data();
  EXPECT_DEATH(run(1, 4,
                   [&] {
                     const float value = from[threadIdx.x * 8];
                     to[threadIdx.x] = threadIdx.x < 3 ? value : 0.0f;
                   }),
               "heap-buffer-overflow");
}

TEST_F(AddressDeathTest, ArrayOfAThreadOverrun) {
  NEEDS(kAddressSanitizer);
  EXPECT_DEATH(run(1, 32,
                   [] {
                     [[maybe_unused]] volatile float registers[4] = {};
                     __syncthreads();
                     registers[threadIdx.x] = 1;
                   }),
               "stack-buffer-overflow|out of bounds");
}

TEST_F(AddressDeathTest, KernelsThatFailedMidwayLeaveNothingBehind) {
  NEEDS(kAddressSanitizer);
  const auto kernel = [](bool wrong) {
    std::array<volatile float, 100> many{};
    many[threadIdx.x] = 1;
    if (wrong && threadIdx.x == 5) __syncwarp(0);
    __syncthreads();
  };
  for (int i = 0; i < 3; ++i) {
    EXPECT_THROW(run(2, 64, [&] { kernel(true); }), simt::Error);
    run(2, 64, [&] { kernel(false); });
  }
}

// ---- Races. Without `right` each of these is one; with it, none may be reported. ----

struct RaceCase {
  const char* name;
  unsigned blocks, threads;
  void (*body)(bool right, int* data);
};

int neighbor() { return static_cast<int>(threadIdx.x ^ 32); }

const RaceCase kRaces[] = {
    {"MissingBarrier", 1, 64,
     [](bool right, int* data) {
       DYNAMIC_MOE_SHARED(int, tile, 64);
       store_shared(&tile[threadIdx.x], 1);
       __syncthreads();
       data[threadIdx.x] = tile[neighbor()];
       if (right) __syncthreads();
       store_shared(&tile[threadIdx.x], 2);
     }},
    {"MissingBarrierInGlobalMemory", 1, 64,
     [](bool right, int* data) {
       store_global(&data[threadIdx.x], 1);
       if (right) __syncthreads();
       load_global(&data[neighbor()]);
     }},
    {"ShuffleInPlaceOfSyncwarp", 1, 32,
     [](bool right, int* data) {
       store_global(&data[threadIdx.x], 1);
       right ? __syncwarp() : static_cast<void>(__shfl_sync(0xffffffffu, 1, 0));
       load_global(&data[threadIdx.x ^ 1]);
     }},
    {"SyncwarpOfHalves", 1, 32,
     [](bool right, int* data) {
       store_global(&data[threadIdx.x], 1);
       __syncwarp(threadIdx.x < 16 ? 0xffffu : 0xffff0000u);
       load_global(&data[threadIdx.x ^ (right ? 1 : 16)]);
     }},
    {"NonAtomicUpdate", 1, 64,
     [](bool right, int* data) {
       if (right) {
         atomicAdd(data, 1);
       } else {
         ++*data;
       }
     }},
    {"NonAtomicUpdateByBlocks", 2, 1,
     [](bool right, int* data) {
       if (right) {
         atomicAdd(data, 1);
       } else {
         ++*data;
       }
     }},
    {"MissingBarrierAfterAsyncWait", 1, 64,
     [](bool right, int* data) {
       DYNAMIC_MOE_SHARED(int, tile, 64);
       ptx::cp_async<4>(&tile[threadIdx.x], &data[threadIdx.x]);
       ptx::cp_async_commit();
       ptx::cp_async_wait<0>();
       if (right) __syncthreads();
       // Read raw: load_shared might see that the copy is under way.
       const int value = tile[neighbor()];
       __syncthreads();
       store_global(&data[threadIdx.x], value);
     }},
    {"MissingBarrierBeforeLdmatrix", 1, 64,
     [](bool right, int*) {
       DYNAMIC_MOE_SHARED(uint4, rows, 64);
       store_shared(&rows[threadIdx.x], uint4{});
       __syncthreads();
       uint32_t r[4];
       ptx::ldmatrix_x4(r, &rows[neighbor()]);
       if (right) __syncthreads();
       store_shared(&rows[threadIdx.x], uint4{});
     }},
    {"LastBlockWithoutFence", 2, 1,
     [](bool right, int* data) {
       store_global(&data[1 + blockIdx.x], 1);
       if (right) __threadfence();
       if (atomicAdd(&data[0], 1) != 0) {
         if (right) __threadfence();
         load_global(&data[1 + (blockIdx.x ^ 1)]);
       }
     }},
};

class Race : public ::testing::TestWithParam<RaceCase> {
 protected:
  void SetUp() override { ::testing::FLAGS_gtest_death_test_style = "threadsafe"; }
};
using RaceDeathTest = Race;

TEST_P(RaceDeathTest, IsReported) {
  NEEDS(kThreadSanitizer);
  DeviceBuffer<int> buffer(std::vector<int>(64, 0));
  int* data = buffer.data();
  EXPECT_DEATH(run(GetParam().blocks, GetParam().threads, [&] { GetParam().body(false, data); }), "data race");
}

TEST_P(RaceDeathTest, IsNoneWithTheBarrier) {
  DeviceBuffer<int> buffer(std::vector<int>(64, 0));
  int* data = buffer.data();
  for (int launch = 0; launch < 3; ++launch) {
    run(GetParam().blocks, GetParam().threads, [&] { GetParam().body(true, data); });
    buffer.upload(std::vector<int>(64, 0));
  }
}

INSTANTIATE_TEST_SUITE_P(Planted, RaceDeathTest, ::testing::ValuesIn(kRaces),
                         [](const ::testing::TestParamInfo<RaceCase>& info) { return info.param.name; });

}  // namespace
}  // namespace dynamic_moe::testing
