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

}  // namespace
}  // namespace dynamic_moe::testing
