// SPDX-License-Identifier: Apache-2.0
// Access patterns whose cost is known, at any schedule.
#include <gtest/gtest.h>

#include "common/cuda/launch.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/shared.cuh"
#include "cuda/support/device_buffer.h"

namespace dynamic_moe::testing {
namespace {

template <class Body>
simt::Counters counted(unsigned threads, const Body& body) {
  return simt::counters_of([&] { simt::launch("counted", 1, threads, 16384, body); });
}

// One warp that reads V at `stride` V apart, `first` V behind an aligned address.
template <class V>
simt::Counters reads(int stride, int first = 0) {
  DeviceBuffer<V> buffer(2048);
  return counted(32, [&] { load_global(buffer.data() + first + static_cast<int>(threadIdx.x) * stride); });
}

TEST(GlobalSectors, OfCoalescedAndStridedReads) {
  EXPECT_EQ(reads<float>(1).global_read_sectors, 4u);
  EXPECT_EQ(reads<float>(1, 1).global_read_sectors, 5u);
  EXPECT_EQ(reads<float>(2).global_read_sectors, 8u);
  EXPECT_EQ(reads<float>(8).global_read_sectors, 32u);
  EXPECT_EQ(reads<float>(0).global_read_sectors, 1u);
  EXPECT_EQ(reads<uint16_t>(1).global_read_sectors, 2u);
  EXPECT_EQ(reads<uint4>(1).global_read_sectors, 16u);
  EXPECT_EQ(reads<uint4>(2).global_read_sectors, 32u);
  EXPECT_EQ(reads<float>(8).global_read_requests, 1u);
  EXPECT_EQ(reads<float>(8).global_write_sectors, 0u);
}

TEST(GlobalSectors, OfWritesAndAsyncCopies) {
  DeviceBuffer<uint4> from(64);
  DeviceBuffer<float> to(64);
  const simt::Counters c = counted(64, [&] {
    DYNAMIC_MOE_SHARED(uint4, rows, 64);
    ptx::cp_async<16>(&rows[threadIdx.x], from.data() + threadIdx.x);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    store_global(to.data() + threadIdx.x, 1.0f);
  });
  EXPECT_EQ(c.cp_async, 2u);
  EXPECT_EQ(c.global_read_sectors, 32u);
  EXPECT_EQ(c.global_write_requests, 2u);
  EXPECT_EQ(c.global_write_sectors, 8u);
  EXPECT_EQ(c.shared_write_wavefronts, 8u);
  EXPECT_EQ(c.bank_conflicts, 0u);
}

// One warp that writes and reads V at `stride` bytes apart.
template <class V>
simt::Counters shared_reads(uint32_t stride) {
  return counted(32, [&] {
    DYNAMIC_MOE_DYNAMIC_SHARED(uint8_t, storage);
    V* place = reinterpret_cast<V*>(storage + threadIdx.x * stride);
    if (stride != 0 || threadIdx.x == 0) store_shared(place, V{});
    __syncwarp();
    load_shared(place);
  });
}

TEST(SharedWavefronts, OfBankConflicts) {
  EXPECT_EQ(shared_reads<float>(4).shared_read_wavefronts, 1u);
  EXPECT_EQ(shared_reads<float>(8).shared_read_wavefronts, 2u);
  EXPECT_EQ(shared_reads<float>(128).shared_read_wavefronts, 32u);
  EXPECT_EQ(shared_reads<float>(132).shared_read_wavefronts, 1u) << "padded rows";
  EXPECT_EQ(shared_reads<float>(0).shared_read_wavefronts, 1u) << "one word for all";
  EXPECT_EQ(shared_reads<uint16_t>(2).shared_read_wavefronts, 1u) << "two lanes in a word";
  EXPECT_EQ(shared_reads<float2>(8).shared_read_wavefronts, 2u);
  EXPECT_EQ(shared_reads<uint4>(16).shared_read_wavefronts, 4u);
  EXPECT_EQ(shared_reads<uint4>(16).shared_write_wavefronts, 4u);
  EXPECT_EQ(shared_reads<uint4>(128).shared_read_wavefronts, 32u);
  EXPECT_EQ(shared_reads<uint4>(144).shared_read_wavefronts, 4u) << "padded rows";
  EXPECT_EQ(shared_reads<uint4>(144).bank_conflicts, 0u);
  EXPECT_EQ(shared_reads<float>(128).bank_conflicts, 62u) << "31 writing, 31 reading";
}

// Rows of 128 bytes: all 8 rows of a matrix begin at one bank, unless the 16-byte columns are swizzled.
simt::Counters matrix_loads(bool swizzled) {
  return counted(32, [&] {
    DYNAMIC_MOE_DYNAMIC_SHARED(uint4, tile);
    for (uint32_t i = threadIdx.x; i < 256; i += 32) store_shared(&tile[i], uint4{});
    __syncthreads();
    uint32_t r[4];
    const uint32_t row = threadIdx.x;
    ptx::ldmatrix_x4(r, &tile[row * 8 + (swizzled ? row % 8 : 0)]);
  });
}

TEST(SharedWavefronts, OfLdmatrixRows) {
  EXPECT_EQ(matrix_loads(false).shared_read_wavefronts, 32u);
  EXPECT_EQ(matrix_loads(true).shared_read_wavefronts, 4u);
  EXPECT_EQ(matrix_loads(true).ldmatrix, 1u);
  EXPECT_EQ(matrix_loads(true).barriers, 1u);
}

TEST(Requests, GroupWhatLanesDoAtOnePlaceForTheSameTime) {
  DeviceBuffer<float> buffer(32 * 32);
  const simt::Counters c = counted(64, [&] {
    for (uint32_t i = 0; i <= threadIdx.x % 4; ++i) load_global(buffer.data() + 32 * i + threadIdx.x % 32);
  });
  EXPECT_EQ(c.global_read_requests, 8u);
  EXPECT_EQ(c.global_read_sectors, 32u);
}

TEST(Requests, StartAnewWhereAWarpComesTogether) {
  DeviceBuffer<float> buffer(64);
  const simt::Counters c = counted(32, [&] {
    for (uint32_t i = 0; i < 2; ++i) {
      // Half the lanes in each turn: without the shuffle they would be taken for one request.
      if (threadIdx.x / 16 == i) load_global(buffer.data() + threadIdx.x);
      __shfl_sync(0xffffffffu, 0, 0);
    }
  });
  EXPECT_EQ(c.global_read_requests, 2u);
  EXPECT_EQ(c.shuffles, 2u);
}

TEST(Counters, OfInstructionsAndBarriers) {
  DeviceBuffer<int> total(std::vector<int>{0});
  const auto kernel = [&] {
    float d[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    for (int i = 0; i < 3; ++i) ptx::mma_m16n8k8_tf32(d, a, b);
    __syncthreads();
    __syncthreads_or(0);
    atomicAdd(total.data(), 1);
  };
  const simt::Counters c = simt::counters_of([&] {
    simt::launch("counted", 5, 64, 0, kernel);
    simt::launch("counted", 1, 64, 0, kernel);
  });
  EXPECT_EQ(c.launches, 2u);
  EXPECT_EQ(c.blocks, 6u);
  EXPECT_EQ(c.mma, 36u);
  EXPECT_EQ(c.barriers, 12u);
  EXPECT_EQ(c.atomics, 384u);
  simt::launch("not counted", 1, 64, 0, kernel);
  EXPECT_EQ(simt::stop_counting().launches, 2u);
}

}  // namespace
}  // namespace dynamic_moe::testing
