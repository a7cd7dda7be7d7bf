// SPDX-License-Identifier: Apache-2.0
// CUDA's words mean on the host what they mean on a device: small cases worked by hand from the CUDA programming guide
// and the PTX ISA.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/cuda/launch.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/shared.cuh"
#include "cuda/support/device_buffer.h"

namespace dynamic_moe::testing {
namespace {

// What each thread of one block makes of its index.
template <class T, class Function>
std::vector<T> by_thread(int threads, const Function& function) {
  DeviceBuffer<T> results(threads);
  T* out = results.data();
  simt::launch("by_thread", 1, static_cast<unsigned>(threads), 4096,
               [&] { store_global(out + threadIdx.x, static_cast<T>(function(static_cast<int>(threadIdx.x)))); });
  return results.download();
}

TEST(Launch, GivesEachThreadItsPlace) {
  const dim3 grid(3, 2, 2), block(4, 2, 3);
  DeviceBuffer<int> visits(std::vector<int>(12 * 24, 0));
  int* out = visits.data();
  simt::launch("places", grid, block, 0, [&] {
    const unsigned b = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    const unsigned t = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    __syncthreads();
    atomicAdd(out + b * 24 + t, 1);
  });
  EXPECT_EQ(visits.download(), std::vector<int>(12 * 24, 1));
}

TEST(Launch, FillsAndCopies) {
  DeviceBuffer<int> buffer(3);
  memset_async(buffer.data(), 1, 8, Stream{});
  EXPECT_EQ(buffer.download(), (std::vector<int>{0x01010101, 0x01010101, -1}));
}

TEST(Shuffle, ReadsFromTheNamedLane) {
  const auto got = by_thread<int>(64, [](int t) { return __shfl_sync(0xffffffffu, t, 3); });
  for (int t = 0; t < 64; ++t) EXPECT_EQ(got[t], t / 32 * 32 + 3);
}

TEST(Shuffle, StaysWithinItsSegment) {
  const auto up = by_thread<int>(32, [](int t) { return __shfl_up_sync(0xffffffffu, t, 3, 8); });
  const auto down = by_thread<int>(32, [](int t) { return __shfl_down_sync(0xffffffffu, t, 3, 8); });
  const auto across = by_thread<int>(32, [](int t) { return __shfl_xor_sync(0xffffffffu, t, 5, 8); });
  const auto from = by_thread<int>(32, [](int t) { return __shfl_sync(0xffffffffu, t, 9, 8); });
  for (int t = 0; t < 32; ++t) {
    EXPECT_EQ(up[t], t % 8 < 3 ? t : t - 3);
    EXPECT_EQ(down[t], t % 8 > 4 ? t : t + 3);
    EXPECT_EQ(across[t], t ^ 5);
    EXPECT_EQ(from[t], t / 8 * 8 + 1);
  }
}

TEST(Shuffle, MovesEightBytesAndFloats) {
  const auto wide =
      by_thread<int64_t>(32, [](int t) { return __shfl_xor_sync(0xffffffffu, int64_t{-5000000000} * t, 1); });
  const auto real = by_thread<float>(32, [](int t) { return __shfl_xor_sync(0xffffffffu, -0.5f * t, 31); });
  for (int t = 0; t < 32; ++t) {
    EXPECT_EQ(wide[t], int64_t{-5000000000} * (t ^ 1));
    EXPECT_EQ(real[t], -0.5f * (t ^ 31));
  }
}

TEST(Collectives, WorkInHalvesOfAWarp) {
  const auto got = by_thread<unsigned>(32, [](int t) {
    return t < 16 ? __reduce_add_sync(0x0000ffffu, static_cast<unsigned>(t))
                  : __reduce_add_sync(0xffff0000u, static_cast<unsigned>(t));
  });
  for (int t = 0; t < 32; ++t) EXPECT_EQ(got[t], t < 16 ? 120u : 376u);
}

TEST(Collectives, VoteAndMatch) {
  const auto ballot = by_thread<unsigned>(32, [](int t) { return __ballot_sync(0xffffffffu, t % 3 == 0 ? -4 : 0); });
  const auto any = by_thread<int>(64, [](int t) { return __any_sync(0xffffffffu, t == 40) + 2 * __any_sync(~0u, 0); });
  const auto all = by_thread<int>(64, [](int t) { return __all_sync(0xffffffffu, t < 40) + 2 * __all_sync(~0u, 1); });
  const auto equal =
      by_thread<unsigned>(32, [](int t) { return __match_any_sync(0xffffffffu, t % 2 == 0 ? -1 : t / 16); });
  unsigned thirds = 0;
  for (int t = 0; t < 32; t += 3) thirds |= 1u << t;
  for (int t = 0; t < 64; ++t) {
    EXPECT_EQ(any[t], t / 32);
    EXPECT_EQ(all[t], t < 32 ? 3 : 2);
    if (t >= 32) continue;
    EXPECT_EQ(ballot[t], thirds);
    EXPECT_EQ(equal[t], t % 2 == 0 ? 0x55555555u : t < 16 ? 0x0000aaaau : 0xaaaa0000u);
  }
}

TEST(Collectives, ReduceSignedAndUnsigned) {
  const auto minimum = by_thread<int>(32, [](int t) { return __reduce_min_sync(0xffffffffu, t - 7); });
  const auto maximum = by_thread<int>(32, [](int t) { return __reduce_max_sync(0xffffffffu, -t - 7); });
  const auto sum = by_thread<int>(32, [](int t) { return __reduce_add_sync(0xffffffffu, -t); });
  const auto large = by_thread<unsigned>(32, [](int t) { return __reduce_max_sync(0xffffffffu, 0u - t); });
  const auto small = by_thread<unsigned>(32, [](int t) { return __reduce_min_sync(0xffffffffu, 5u - t); });
  for (int t = 0; t < 32; ++t) {
    EXPECT_EQ(minimum[t], -7);
    EXPECT_EQ(maximum[t], -7);
    EXPECT_EQ(sum[t], -496);
    EXPECT_EQ(large[t], 0xffffffffu);
    EXPECT_EQ(small[t], 0u);
  }
}

TEST(Barriers, CountVotesOfThreadsThatAreStillThere) {
  const auto got = by_thread<int>(100, [](int t) {
    const int some = __syncthreads_or(t == 99), none = __syncthreads_or(0);
    const int every = __syncthreads_and(t >= 0), not_every = __syncthreads_and(t != 50);
    return some * 1000 + none * 2000 + every * 4000 + not_every * 8000 + __syncthreads_count(t % 3 == 0);
  });
  EXPECT_EQ(got, std::vector<int>(100, 5034));

  DeviceBuffer<int> counted(1);
  int* out = counted.data();
  simt::launch("early_exit", 1, 100, 0, [&] {
    if (threadIdx.x >= 60) return;
    const int count = __syncthreads_count(1);
    if (threadIdx.x == 0) store_global(out, count);
  });
  EXPECT_EQ(counted.download()[0], 60);
}

TEST(Shared, ArraysAreSharedByTheBlockAndApartFromEachOther) {
  const auto got = by_thread<int>(64, [](int t) {
    DYNAMIC_MOE_SHARED(int, first, 64);
    DYNAMIC_MOE_SHARED(int, second, 64);
    DYNAMIC_MOE_DYNAMIC_SHARED(int, third);
    static_assert(sizeof first == 256);
    store_shared(&first[t], t);
    store_shared(&second[t], 1000 + t);
    store_shared(&third[t], 2000 + t);
    __syncthreads();
    return load_shared(&first[63 - t]) + load_shared(&second[63 - t]) + load_shared(&third[63 - t]);
  });
  for (int t = 0; t < 64; ++t) EXPECT_EQ(got[t], 3000 + 3 * (63 - t));
}

TEST(Atomics, AddExchangeAndMaximum) {
  DeviceBuffer<unsigned long long> sum(std::vector<unsigned long long>{1ull << 40});
  DeviceBuffer<int> maximum(std::vector<int>{-100}), last(std::vector<int>{-1});
  auto* sums = sum.data();
  int *maxima = maximum.data(), *lasts = last.data();
  simt::launch("atomics", 2, 64, 0, [&] {
    atomicAdd(sums, 1ull);
    atomicMax(maxima, static_cast<int>(threadIdx.x) - 70);
    atomicExch(lasts, 5);
    __threadfence();
  });
  EXPECT_EQ(sum.download()[0], (1ull << 40) + 128);
  EXPECT_EQ(maximum.download()[0], -7);
  EXPECT_EQ(last.download()[0], 5);
}

TEST(AsyncCopies, FillWithZerosWithoutReading) {
  DeviceBuffer<uint4> source(std::vector<uint4>(2, uint4{1, 2, 3, 4}));
  const uint4* from = source.data();
  const auto got = by_thread<unsigned>(4, [&](int t) {
    DYNAMIC_MOE_SHARED(uint4, rows, 4);
    ptx::cp_async_zfill<16>(&rows[t], t < 2 ? from + t : nullptr, t < 2);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    return load_shared(&rows[t]).w + 1;
  });
  EXPECT_EQ(got, (std::vector<unsigned>{5, 5, 1, 1}));
}

TEST(AsyncCopies, LandByGroups) {
  DeviceBuffer<uint2> source(std::vector<uint2>{{1, 2}, {3, 4}, {5, 6}});
  const uint2* from = source.data();
  const auto got = by_thread<unsigned>(1, [&](int) {
    DYNAMIC_MOE_SHARED(uint2, rows, 3);
    for (int group = 0; group < 3; ++group) {
      ptx::cp_async<8>(&rows[group], from + group);
      ptx::cp_async_commit();
    }
    unsigned digits = 0;
    ptx::cp_async_wait<2>();
    digits = load_shared(&rows[0]).y;
    ptx::cp_async_wait<1>();
    digits = digits * 10 + load_shared(&rows[1]).y;
    ptx::cp_async_wait<0>();
    return digits * 10 + load_shared(&rows[2]).y;
  });
  EXPECT_EQ(got[0], 246u);
}

// Element (row, column) of matrix i holds 64 i + 8 row + column.
template <int kMatrices, class Load>
std::vector<uint32_t> loaded(const Load& load) {
  DeviceBuffer<uint32_t> results(32 * kMatrices);
  uint32_t* out = results.data();
  simt::launch("ldmatrix", 1, 32, 0, [&] {
    DYNAMIC_MOE_SHARED(uint16_t, tile, 256);
    for (uint32_t i = threadIdx.x; i < 256; i += 32) store_shared(&tile[i], static_cast<uint16_t>(i));
    __syncthreads();
    uint32_t r[kMatrices];
    load(r, &tile[threadIdx.x * 8]);
    for (int i = 0; i < kMatrices; ++i) store_global(out + threadIdx.x * kMatrices + i, r[i]);
  });
  return results.download();
}

// PTX ISA, ldmatrix: lane 9 holds row 2, elements 2 and 3.
TEST(Ldmatrix, GivesEachLaneTwoElementsOfARow) {
  const auto got = loaded<4>([](uint32_t (&r)[4], const uint16_t* row) { ptx::ldmatrix_x4(r, row); });
  EXPECT_EQ(got[9 * 4 + 0], 18u | 19u << 16);
  EXPECT_EQ(got[9 * 4 + 3], (192u + 18u) | (192u + 19u) << 16);
  const auto two = loaded<2>([](uint32_t (&r)[2], const uint16_t* row) { ptx::ldmatrix_x2(r, row); });
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
      const uint32_t first = 64 * matrix + 8 * (lane / 4) + 2 * (lane % 4);
      EXPECT_EQ(got[lane * 4 + matrix], first | (first + 1) << 16);
      if (matrix < 2) {
        EXPECT_EQ(two[lane * 2 + matrix], first | (first + 1) << 16);
      }
    }
  }
}

// Transposed: lane 9 holds column 2, elements of rows 2 and 3.
TEST(Ldmatrix, TransposesEachMatrix) {
  const auto got = loaded<4>([](uint32_t (&r)[4], const uint16_t* row) { ptx::ldmatrix_x4_trans(r, row); });
  EXPECT_EQ(got[9 * 4 + 0], 18u | 26u << 16);
  const auto two = loaded<2>([](uint32_t (&r)[2], const uint16_t* row) { ptx::ldmatrix_x2_trans(r, row); });
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
      const uint32_t first = 64 * matrix + 8 * (2 * (lane % 4)) + lane / 4;
      EXPECT_EQ(got[lane * 4 + matrix], first | (first + 8) << 16);
      if (matrix < 2) {
        EXPECT_EQ(two[lane * 2 + matrix], first | (first + 8) << 16);
      }
    }
  }
}

// The tables of the PTX ISA ("Matrix Fragments for mma.m16n8k16" and "... m16n8k8"), written out as it words them: for
// element i of a lane's fragment, its row and column.
struct Place {
  int row, column;
};
Place place_a16(int lane, int i) {
  const int row = i < 2 || (i >= 4 && i < 6) ? lane >> 2 : (lane >> 2) + 8;
  return {row, (lane % 4) * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}
Place place_b16(int lane, int i) { return {(lane % 4) * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane >> 2}; }
Place place_a_tf32(int lane, int i) {
  return {i == 0 || i == 2 ? lane >> 2 : (lane >> 2) + 8, i < 2 ? lane % 4 : lane % 4 + 4};
}
Place place_b_tf32(int lane, int i) { return {i == 0 ? lane % 4 : lane % 4 + 4, lane >> 2}; }
Place place_d(int lane, int i) { return {i < 2 ? lane >> 2 : (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)}; }

// Small integers, exact in every type: a wrong place shows in the result.
float a_at(Place p) { return static_cast<float>((7 * p.row + 3 * p.column) % 11 - 5); }
float b_at(Place p) { return static_cast<float>((5 * p.row + 2 * p.column) % 7 - 3); }
float c_at(Place p) { return static_cast<float>(p.row - 3 * p.column); }

uint32_t pack(__half low, __half high) { return __half_as_ushort(low) | uint32_t{__half_as_ushort(high)} << 16; }
uint32_t pack(__nv_bfloat16 low, __nv_bfloat16 high) {
  return __bfloat16_as_ushort(low) | uint32_t{__bfloat16_as_ushort(high)} << 16;
}
template <class T>
T rounded(float value) {
  if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

// Runs an mma whose operands are a_at, b_at, c_at and checks d = a b + c.
template <class Multiply>
void expect_product(int k, const Multiply& multiply) {
  DeviceBuffer<float> results(128);
  float* out = results.data();
  simt::launch("mma", 1, 32, 0, [&] {
    const int lane = static_cast<int>(threadIdx.x);
    float d[4];
    for (int i = 0; i < 4; ++i) d[i] = c_at(place_d(lane, i));
    multiply(lane, d);
    for (int i = 0; i < 4; ++i) store_global(out + place_d(lane, i).row * 8 + place_d(lane, i).column, d[i]);
  });
  const auto got = results.download();
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float exact = c_at({row, column});
      for (int i = 0; i < k; ++i) exact += a_at({row, i}) * b_at({i, column});
      EXPECT_EQ(got[row * 8 + column], exact) << row << ", " << column;
    }
  }
}

template <class T>
void multiply_16(int lane, float (&d)[4]) {
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    a[i] = pack(rounded<T>(a_at(place_a16(lane, 2 * i))), rounded<T>(a_at(place_a16(lane, 2 * i + 1))));
  }
  for (int i = 0; i < 2; ++i) {
    b[i] = pack(rounded<T>(b_at(place_b16(lane, 2 * i))), rounded<T>(b_at(place_b16(lane, 2 * i + 1))));
  }
  ptx::mma_m16n8k16<T>(d, a, b);
}

TEST(Mma, FollowsTheFragmentTablesForBFloat16) { expect_product(16, multiply_16<__nv_bfloat16>); }
TEST(Mma, FollowsTheFragmentTablesForFloat16) { expect_product(16, multiply_16<__half>); }
TEST(Mma, FollowsTheFragmentTablesForTf32) {
  expect_product(8, [](int lane, float (&d)[4]) {
    uint32_t a[4], b[2];
    // The bits below TF32 must not matter.
    for (int i = 0; i < 4; ++i) a[i] = ptx::float_to_tf32(a_at(place_a_tf32(lane, i))) | 0x1fffu;
    for (int i = 0; i < 2; ++i) b[i] = ptx::float_to_tf32(b_at(place_b_tf32(lane, i)));
    ptx::mma_m16n8k8_tf32(d, a, b);
  });
}

TEST(Tf32, RoundsTiesAwayFromZero) {
  const auto tf32 = [](float value) { return __uint_as_float(ptx::float_to_tf32(value)); };
  EXPECT_EQ(tf32(1.0f), 1.0f);
  EXPECT_EQ(tf32(1.0f + 0x1p-11f), 1.0f + 0x1p-10f);
  EXPECT_EQ(tf32(-1.0f - 0x1p-11f), -1.0f - 0x1p-10f);
  EXPECT_EQ(tf32(1.0f + 0x1.ffep-12f), 1.0f);
  EXPECT_EQ(tf32(std::numeric_limits<float>::infinity()), std::numeric_limits<float>::infinity());
  EXPECT_EQ(tf32(std::numeric_limits<float>::max()), std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::isnan(tf32(std::numeric_limits<float>::quiet_NaN())));
}

TEST(Words, BitsOfIntegers) {
  EXPECT_EQ(__popc(0xf0u), 4);
  EXPECT_EQ(__ffs(0), 0);
  EXPECT_EQ(__ffs(8), 4);
  EXPECT_EQ(__clz(1), 31);
  EXPECT_EQ(__clz(0), 32);
}

}  // namespace
}  // namespace dynamic_moe::testing
