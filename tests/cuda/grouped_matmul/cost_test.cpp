// SPDX-License-Identifier: Apache-2.0
// What the tile kernels may cost, counted by the host harness: a lost coalescing, a bank conflict or a load done twice
// fails here.
#include <gtest/gtest.h>

#include "device_products.h"
#include "grouped_matmul/policy.h"

#if defined(DYNAMIC_MOE_SIMT)

namespace dynamic_moe::testing {
namespace {

// One expert with 256 rows, N = K = 256: whole tiles of every policy, so that nothing is rounded up.
constexpr int64_t kSize = 256;
const Shape kWhole{{"256 rows in place", {kSize}, 0, false}, kSize, kSize};

// Each of them asks where the rows end that no group has, to clear what lies behind.
constexpr uint64_t kClearingWarps = 4 * 4 * 8;

// For sm_80, whose code the harness runs.
template <class T>
MatmulPolicy policy(Regime regime) {
  const Math math = std::is_same_v<T, BFloat16>  ? Math::kBFloat16
                    : std::is_same_v<T, Float16> ? Math::kFloat16
                    : kAllowTf32<T>              ? Math::kTf32
                                                 : Math::kFloat32;
  return matmul_policy(Arch::kSm80, math, regime);
}

template <class T>
uint64_t sectors(int64_t elements) {
  return static_cast<uint64_t>(elements) * sizeof(T) / 32;
}

template <class T>
class CudaGroupedMatmulCost : public ::testing::Test {
 protected:
  // `looked_up`: sectors of offsets that warps may read besides the operands.
  static void expect(const simt::Counters& counted, const MatmulPolicy& tile, uint64_t looked_up) {
    const int64_t tiles_m = kSize / tile.tile_m, tiles_n = kSize / tile.tile_n;
    const auto tiles = static_cast<uint64_t>(tiles_m * tiles_n);
    const uint64_t operands = sectors<T>(tiles_n * kSize * kSize) + sectors<T>(tiles_m * kSize * kSize);
    EXPECT_GE(counted.global_read_sectors, operands);
    EXPECT_LE(counted.global_read_sectors, operands + looked_up);
    EXPECT_EQ(counted.global_write_sectors, sectors<T>(kSize * kSize));
    EXPECT_EQ(counted.global_write_requests, sectors<T>(kSize * kSize) / 16);  // 512 bytes of a warp
    EXPECT_EQ(counted.cp_async, operands / 16);
    EXPECT_EQ(counted.barriers, tiles * static_cast<uint64_t>(kSize / tile.tile_k + 2));
    constexpr uint64_t kProducts = static_cast<uint64_t>(kSize * kSize * kSize);
    const uint64_t of_mma = 16 * 8 * 32 / sizeof(T);
    const bool on_tensor_cores = !std::is_same_v<T, float>;
    EXPECT_EQ(counted.mma, on_tensor_cores ? kProducts / of_mma : 0);
    EXPECT_EQ(counted.bank_conflicts, 0u);
    EXPECT_EQ(counted.atomics, 0u);
  }
};
TYPED_TEST_SUITE(CudaGroupedMatmulCost, DeviceTypes, StorageNames);

TYPED_TEST(CudaGroupedMatmulCost, ForwardReadsEachTileOnceAndWritesWholeSectors) {
  const Products<TypeParam> host(kWhole, Random(1));
  const DeviceProducts<TypeParam> problem(host, 0, 0);
  TestFixture::expect(simt::counters_of([&] { static_cast<void>(problem.forward()); }),
                      policy<TypeParam>(Regime::kManyRows), 2 * 4 * 8);
}

TYPED_TEST(CudaGroupedMatmulCost, InputGradientReadsEachTileOnceAndWritesWholeSectors) {
  const Products<TypeParam> host(kWhole, Random(2));
  const DeviceProducts<TypeParam> problem(host, 0, 0);
  TestFixture::expect(simt::counters_of([&] { static_cast<void>(problem.dx()); }), policy<TypeParam>(Regime::kManyRows),
                      2 * 4 * 8 + kClearingWarps);
}

TYPED_TEST(CudaGroupedMatmulCost, WeightGradientReadsEachTileOnceAndWritesWholeSectors) {
  const Products<TypeParam> host(kWhole, Random(3));
  const DeviceProducts<TypeParam> problem(host, 0, 0);
  TestFixture::expect(simt::counters_of([&] { static_cast<void>(problem.dw()); }),
                      policy<TypeParam>(Regime::kWeightGradient), 2 * 4 * 8);
}

// Decoding is a stream of weights: each must be read once, whatever the slices of the depth.
TYPED_TEST(CudaGroupedMatmulCost, FewRowsReadEachWeightOnce) {
  constexpr int64_t kRows = 16, kWidth = 128, kDepth = 1024;
  const Products<TypeParam> host({{"16 rows in place", {kRows}, 0, false}, kWidth, kDepth}, Random(4));
  const DeviceProducts<TypeParam> problem(host, 0, 0);
  const MatmulPolicy tile = policy<TypeParam>(Regime::kFewRows);
  const int slices = depth_slices(tile, kRows, 1, kWidth, kDepth, simt::options().sm_count);
  ASSERT_GT(slices, 1);
  const simt::Counters counted = simt::counters_of([&] { static_cast<void>(problem.forward()); });
  const uint64_t operands = sectors<TypeParam>((kRows + kWidth) * kDepth);
  const uint64_t partial = sectors<float>(slices * kRows * kWidth);
  EXPECT_EQ(counted.cp_async, operands / 16);
  // A thread reads the sector that it adds up in one piece or, for 16-bit results, in two.
  EXPECT_GE(counted.global_read_sectors, operands + partial * 4 / sizeof(TypeParam));
  EXPECT_LE(counted.global_read_sectors, operands + partial * 4 / sizeof(TypeParam) + 4 * 4 * counted.blocks);
  EXPECT_EQ(counted.global_write_sectors, partial + sectors<TypeParam>(kRows * kWidth));
  EXPECT_EQ(counted.bank_conflicts, 0u);
}

}  // namespace
}  // namespace dynamic_moe::testing

#endif
