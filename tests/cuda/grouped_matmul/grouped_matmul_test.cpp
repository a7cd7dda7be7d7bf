// SPDX-License-Identifier: Apache-2.0
// The three products on the device against plain float64 sums.
#include <gtest/gtest.h>

#include "device_products.h"

namespace dynamic_moe::testing {
namespace {

// Rows per expert choose the kernel: up to 16 on average, up to 64, more. Each has groups without rows, with one,
// below, at and above the height of its tile.
const Load kFew{"groups of 5, 0, 1, 17, 3, 16 and 0 rows", {5, 0, 1, 17, 3, 16, 0}, 19};
const Load kFewInPlace{"groups of 5, 0, 1, 17 and 3 rows", {5, 0, 1, 17, 3}, 0, false};
const Load kSome{"groups of 64, 0, 1 and 65 rows", {64, 0, 1, 65}, 90};
const Load kSomeInPlace{"groups of 0, 66, 1 and 3 rows", {0, 66, 1, 3}, 0, false};
const Load kMany{"groups of 128, 1 and 131 rows", {128, 1, 131}, 170};
const Load kManyInPlace{"groups of 0 and 135 rows", {0, 135}, 0, false};
const Load kOneRow{"one row", {1}, 1};
const Load k300Rows{"300 rows", {300}, 300};

// Lengths that are whole vectors of 16 bytes in every type.
const std::vector<Shape> kAlignedShapes = {
    {kFew, 8, 8},     {kFew, 136, 72},  {kFewInPlace, 24, 264}, {kOneRow, 128, 64},      {kOneRow, 16, 1544},
    {kFew, 40, 1040}, {kSome, 8, 8},    {kSome, 136, 72},       {kSome, 64, 200},        {kSomeInPlace, 264, 40},
    {kMany, 8, 16},   {kMany, 136, 72}, {kMany, 128, 128},      {kManyInPlace, 72, 136}, {k300Rows, 24, 40},
};
// Others take the slow path, whatever their rows.
const std::vector<Shape> kOddShapes = {
    {kFew, 1, 1},    {kFew, 7, 13},          {kFewInPlace, 8, 67}, {kSome, 67, 8},
    {kSome, 33, 31}, {kManyInPlace, 65, 37}, {k300Rows, 3, 5},     {kOneRow, 9, 515},
};

// Another order of threads while it lives, on the host; a device has orders enough of its own.
struct Schedule {
#if defined(DYNAMIC_MOE_SIMT)
  uint64_t before = simt::options().seed;
  explicit Schedule(uint64_t seed) { simt::options().seed = seed; }
  ~Schedule() { simt::options().seed = before; }
#else
  explicit Schedule(uint64_t) {}
#endif
};

template <class T>
class CudaGroupedMatmul : public ::testing::Test {
 protected:
  // Calls check(problem, shape) for each shape; the odd ones lie out of alignment too, by as much as their number.
  template <class Check>
  static void for_each_problem(const Check& check) {
    uint64_t seed = 0;
    const auto run = [&](const Shape& shape, int64_t offset) {
      SCOPED_TRACE(::testing::Message() << shape << ", " << offset << " elements out of alignment");
      const Products<T> host(shape, Random(++seed));
      check(DeviceProducts<T>(host, offset));
    };
    for (const Shape& shape : kAlignedShapes) run(shape, 0);
    for (const Shape& shape : kOddShapes) run(shape, static_cast<int64_t>(seed % 4));
    run({kSome, 136, 72}, 1);
  }
};
TYPED_TEST_SUITE(CudaGroupedMatmul, DeviceTypes, StorageNames);

TYPED_TEST(CudaGroupedMatmul, YMatchesFloat64) {
  TestFixture::for_each_problem([](const DeviceProducts<TypeParam>& problem) {
    const std::vector<TypeParam> y = problem.forward();
    EXPECT_TRUE(matches(std::span<const TypeParam>(y), problem.host.exact_forward()));
  });
}

TYPED_TEST(CudaGroupedMatmul, DxMatchesFloat64) {
  TestFixture::for_each_problem([](const DeviceProducts<TypeParam>& problem) {
    const std::vector<TypeParam> dx = problem.dx();
    EXPECT_TRUE(matches(std::span<const TypeParam>(dx), problem.exact_dx()));
  });
}

TYPED_TEST(CudaGroupedMatmul, DwMatchesFloat64) {
  TestFixture::for_each_problem([](const DeviceProducts<TypeParam>& problem) {
    const std::vector<TypeParam> dw = problem.dw();
    EXPECT_TRUE(matches(std::span<const TypeParam>(dw), problem.host.exact_dw()));
  });
}

TYPED_TEST(CudaGroupedMatmul, AnExpertWithoutRowsGetsExactlyZero) {
  const Products<TypeParam> host({kSome, 136, 72}, Random(1));
  const std::vector<TypeParam> dw = DeviceProducts<TypeParam>(host).dw();
  constexpr size_t kEmpty = 1, kMatrix = 136 * 72;
  EXPECT_TRUE(all_zero(std::span<const TypeParam>(dw).subspan(kEmpty * kMatrix, kMatrix)));
}

TYPED_TEST(CudaGroupedMatmul, WithoutRowsGradientsAreZero) {
  const Products<TypeParam> host({{"no rows", {0, 0}, 3}, 16, 8}, Random(2));
  const DeviceProducts<TypeParam> problem(host);
  EXPECT_TRUE(problem.forward().empty());
  EXPECT_TRUE(all_zero(std::span<const TypeParam>(problem.dx())));
  EXPECT_TRUE(all_zero(std::span<const TypeParam>(problem.dw())));
}

TYPED_TEST(CudaGroupedMatmul, WithoutTokensAndWithoutExpertsNothingHappens) {
  const Products<TypeParam> host({{"nothing", {0}, 0}, 16, 8}, Random(3));
  const DeviceProducts<TypeParam> problem(host, 0, 0);
  EXPECT_TRUE(problem.forward().empty());
  EXPECT_TRUE(problem.dx().empty());
  EXPECT_TRUE(all_zero(std::span<const TypeParam>(problem.dw())));
}

// Which row meets which list first is up to the schedule; sums must not show it.
TYPED_TEST(CudaGroupedMatmul, ResultsAreTheSameBitForBitWhateverTheSchedule) {
  const Products<TypeParam> host({{"5 tokens in 60 rows", {20, 0, 17, 23}, 5}, 24, 72}, Random(4));
  const DeviceProducts<TypeParam> problem(host);
  const auto y = problem.forward(), dx = problem.dx(), dw = problem.dw();
  const auto same = [](const auto& a, const auto& b) { return same_bits(std::span(a), std::span(b)); };
  for (uint64_t seed = 11; seed < 15; ++seed) {
    const Schedule another(seed);
    EXPECT_TRUE(same(problem.forward(), y));
    EXPECT_TRUE(same(problem.dx(), dx));
    EXPECT_TRUE(same(problem.dw(), dw));
  }
}

// NaN and infinities stay in the rows of their token, and in the matrices of their experts.
TYPED_TEST(CudaGroupedMatmul, ANonFiniteTokenSpoilsNoOther) {
  const Shape shape{{"groups of 20, 5 and 70 rows, token by token", {20, 5, 70}, 0, false}, 40, 24};
  Products<TypeParam> host(shape, Random(5));
  const std::vector<TypeParam> clean = DeviceProducts<TypeParam>(host).forward();
  constexpr int64_t kBad = 22;
  host.x.thaw();
  for (int64_t j = 0; j < 24; ++j) {
    host.x[kBad * 24 + j] = stored<TypeParam>(j % 2 ? std::numeric_limits<double>::infinity() : std::nan(""));
  }
  const std::vector<TypeParam> spoiled = DeviceProducts<TypeParam>(host).forward();
  for (int64_t row = 0; row < 95; ++row) {
    const auto of = [&](const std::vector<TypeParam>& y) {
      return std::span<const TypeParam>(y).subspan(static_cast<size_t>(row * 40), 40);
    };
    EXPECT_EQ(same_bits(of(spoiled), of(clean)), row != kBad) << "row " << row;
  }
}

TEST(CudaGroupedMatmulArguments, AreRefusedWhereTheyCannotBeComputed) {
  const std::vector<int32_t> offsets{0, 0};
  GroupedMatmulParams params{};
  params.groups = {offsets.data(), nullptr, 0, 0, 1};
  params.n = params.k = 8;
  params.dtype = DType::kFloat64;
  EXPECT_THROW(grouped_matmul_cuda(params, {}, Stream{}), std::invalid_argument);
  params.dtype = DType::kFloat32;
  params.groups.num_rows = int64_t{1} << 31;
  EXPECT_THROW(grouped_matmul_cuda(params, {}, Stream{}), std::invalid_argument);
  params.groups.num_rows = 8;  // few rows: partial sums go through the workspace
  EXPECT_GT(grouped_matmul_cuda_workspace(params), 0u);
  EXPECT_THROW(grouped_matmul_cuda(params, {}, Stream{}), std::invalid_argument);
}

}  // namespace
}  // namespace dynamic_moe::testing
