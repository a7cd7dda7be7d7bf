// SPDX-License-Identifier: Apache-2.0
// The helpers can fail: a test that cannot is worse than none.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "support/exact.h"
#include "support/fenced.h"
#include "support/ragged.h"

namespace dynamic_moe::testing {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

Exact three_elements() {
  Exact exact(3, 3);
  exact.set(0, 100.0, 1e-3);
  exact.set(1, 1.0, 1e-6);
  exact.set(2, 0.0, 0.0);
  return exact;
}

TEST(Matches, TakesWhatLiesWithinEachElementsBound) {
  const std::vector<double> got{100.0009, 1.0000009, 0.0};
  EXPECT_TRUE(matches(std::span<const double>(got), three_elements()));
}

TEST(Matches, NoticesAnErrorInASmallElementThatWouldBeFineInALargeOne) {
  const std::vector<double> got{100.0, 1.0001, 0.0};
  const auto result = matches(std::span<const double>(got), three_elements());
  EXPECT_FALSE(result);
  EXPECT_THAT(result.message(),
              ::testing::HasSubstr("1 of 3 elements are out of bounds, the worst at [0, 1]: got 1.0"));
}

TEST(Matches, NoticesNaNInfinityAndWrongSize) {
  for (const double wrong : {kNaN, std::numeric_limits<double>::infinity()}) {
    const std::vector<double> got{wrong, 1.0, 0.0};
    EXPECT_FALSE(matches(std::span<const double>(got), three_elements()));
  }
  const std::vector<double> too_short{100.0, 1.0};
  EXPECT_FALSE(matches(std::span<const double>(too_short), three_elements()));
}

TEST(AllZero, NoticesNegativeZeroAndNaN) {
  EXPECT_TRUE(all_zero(std::span<const double>(std::vector<double>{0.0, 0.0})));
  EXPECT_FALSE(all_zero(std::span<const double>(std::vector<double>{0.0, -0.0})));
  EXPECT_FALSE(all_zero(std::span<const double>(std::vector<double>{kNaN})));
}

TEST(SameBits, TellsNaNsAndZerosApart) {
  const std::vector<double> a{kNaN, 0.0}, b{kNaN, 0.0}, c{kNaN, -0.0}, d{-kNaN, 0.0};
  EXPECT_TRUE(same_bits(std::span(a), std::span(b)));
  EXPECT_FALSE(same_bits(std::span(a), std::span(c)));
  EXPECT_FALSE(same_bits(std::span(a), std::span(d)));
}

// A sum that leaves out one product, or takes a neighbor's in its place, is out of bounds at every length tested.
TEST(Precision, NoticesOneWrongProduct) {
  Random random(1);
  for (const int64_t terms : {1, 7, 33, 1100, 2100, 4200}) {
    Sum sum, wrong;
    for (int64_t k = 0; k < terms; ++k) {
      const double a = random.value(), b = random.value();
      sum.add(a, b);
      if (k != terms / 2) wrong.add(a, b);
    }
    EXPECT_GT(std::fabs(sum.value - wrong.value), 10 * Storage<float>::kPrecision.sum_error(terms, sum.magnitude));
  }
}

// ... and plain float32 summation is within.
TEST(Precision, TakesFloat32Summation) {
  Random random(2);
  for (const int64_t terms : {1, 7, 33, 1100, 2100, 4200}) {
    for (int trial = 0; trial < 100; ++trial) {
      Sum sum;
      float got = 0;
      for (int64_t k = 0; k < terms; ++k) {
        const auto a = static_cast<float>(random.value()), b = static_cast<float>(random.value());
        sum.add(a, b);
        got += a * b;
      }
      ASSERT_LE(std::fabs(got - sum.value), Storage<float>::kPrecision.sum_error(terms, sum.magnitude));
    }
  }
}

template <class T>
class StoredValues : public ::testing::Test {};
TYPED_TEST_SUITE(StoredValues, StorageTypes, StorageNames);

TYPED_TEST(StoredValues, LieWithinTheStoreErrorAndUseItUp) {
  constexpr Precision kPrecision = Storage<TypeParam>::kPrecision;
  Random random(3);
  double largest = 0;
  for (int trial = 0; trial < 10000; ++trial) {
    const double value = random.value();
    const double error = std::fabs(value_of(stored<TypeParam>(value)) - value);
    ASSERT_LE(error, kPrecision.store_error(value));
    largest = std::max(largest, error / kPrecision.store_error(value));
  }
  if (!std::is_same_v<TypeParam, double>) {
    EXPECT_GT(largest, 0.9);
  }
}

TEST(Random, ValuesHaveTheVarianceAskedFor) {
  Random random(4);
  double sum = 0, squares = 0;
  constexpr int kCount = 100000;
  for (int i = 0; i < kCount; ++i) {
    const double value = random.value(3);
    sum += value;
    squares += value * value;
  }
  EXPECT_NEAR(sum / kCount, 0, 0.05);
  EXPECT_NEAR(squares / kCount, 9, 0.1);
}

std::string placement_name(const ::testing::TestParamInfo<Placement>& info) {
  constexpr const char* kNames[] = {"EndAtFence", "StartAtFence", "OneIn"};
  return kNames[static_cast<int>(info.param)];
}

class FencedDeathTest : public ::testing::TestWithParam<Placement> {};

TEST_P(FencedDeathTest, NoticesWritesBesideTheElements) {
  Fenced<float> buffer(100, GetParam());
  for (int64_t i = 0; i < buffer.size(); ++i) buffer[i] = 1;
  EXPECT_TRUE(buffer.surroundings_intact());
  buffer[GetParam() == Placement::kEndAtFence ? -1 : 100] = 1;
  EXPECT_FALSE(buffer.surroundings_intact());
}

TEST_P(FencedDeathTest, FaultsAtTheFenceAndOnWritesToFrozenElements) {
  Fenced<float> buffer(100, GetParam());
  if (GetParam() == Placement::kEndAtFence) {
    EXPECT_DEATH(buffer[100] = 1, "");
  } else if (GetParam() == Placement::kStartAtFence) {
    EXPECT_DEATH(buffer[-1] = 1, "");
  }
  buffer.freeze();
  EXPECT_DEATH(buffer[0] = 1, "");
}

TEST_P(FencedDeathTest, IsAlignedAsItSaysAndStartsAsNaN) {
  Fenced<float> buffer(100, GetParam());
  const auto address = reinterpret_cast<uintptr_t>(buffer.data());
  if (GetParam() == Placement::kOneIn) {
    EXPECT_EQ(address % 64, sizeof(float));
  } else if (GetParam() == Placement::kStartAtFence) {
    EXPECT_EQ(address % 64, 0u);
  }
  for (int64_t i = 0; i < buffer.size(); ++i) EXPECT_TRUE(std::isnan(buffer[i]));
}

INSTANTIATE_TEST_SUITE_P(Placements, FencedDeathTest, ::testing::ValuesIn(kPlacements), placement_name);

TEST(Ragged, KeepsTheDataContract) {
  Random random(5);
  const Ragged ragged({"", {4, 0, 7, 1}, 5}, random);
  EXPECT_EQ(ragged.num_rows, 12);
  EXPECT_EQ(ragged.expert_offsets[4], 12);
  std::set<int32_t> slots;
  ragged.for_each_row([&](int64_t row, int64_t) {
    EXPECT_EQ(ragged.row_slot[row] / ragged.max_experts, ragged.row_token[row]);
    slots.insert(ragged.row_slot[row]);
  });
  EXPECT_EQ(slots.size(), 12u);
  EXPECT_LT(slots.size(), static_cast<size_t>(ragged.num_slots()));
}

}  // namespace
}  // namespace dynamic_moe::testing
