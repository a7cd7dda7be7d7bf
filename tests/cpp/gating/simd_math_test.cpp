// SPDX-License-Identifier: Apache-2.0
// The steps that every CPU level shares, checked on one lane against long double; that the vector levels return the
// same bits is checked through gating itself.
#include "common/simd_math.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "gating/lanes_scalar.h"

namespace dynamic_moe {
namespace {

// Distance in units of the last place of the exact value.
double ulps(float got, long double exact) {
  const int exponent = std::max(std::ilogb(exact), -126) - 23;
  return static_cast<double>(std::fabs(got - exact) / std::ldexp(1.0L, exponent));
}

TEST(ExpOfNegative, IsWithinElevenTenthsOfAnUlp) {
  double worst = 0;
  for (uint32_t bits = 0x33000000u; bits <= same_bits<uint32_t>(87.0f); bits += 331) {  // from 2^-25 on
    const float x = same_bits<float>(bits);
    worst = std::max(worst, ulps(exp_of_negative<SingleLane>(x), std::exp(-static_cast<long double>(x))));
  }
  EXPECT_LE(worst, 1.1);
}

TEST(ExpOfNegative, UnderflowsGradually) {
  for (float x = 86.0f; x <= kLargestExponent; x += 0.01f) {
    const long double exact = std::exp(-static_cast<long double>(x));
    ASSERT_NEAR(exp_of_negative<SingleLane>(x), static_cast<double>(exact),
                1.1 * 0x1p-149 + 1.1 * 0x1p-23 * static_cast<double>(exact))
        << x;
  }
  EXPECT_EQ(exp_of_negative<SingleLane>(kLargestExponent), 0.0f);
}

TEST(ExpOfNegative, IsExactAtZeroAndKeepsNaN) {
  EXPECT_EQ(exp_of_negative<SingleLane>(0.0f), 1.0f);
  EXPECT_TRUE(std::isnan(exp_of_negative<SingleLane>(std::nanf(""))));
}

TEST(LogOfPositive, IsWithinOneUlp) {
  double worst = 0;
  for (uint32_t bits = 0x00800000u; bits < 0x7f800000u; bits += 1009) {
    const float x = same_bits<float>(bits);
    if (x == 1.0f) continue;
    worst = std::max(worst, ulps(log_of_positive<SingleLane>(x), std::log(static_cast<long double>(x))));
  }
  EXPECT_LE(worst, 1.0);
  EXPECT_EQ(log_of_positive<SingleLane>(1.0f), 0.0f);
}

// The processor's own, or the C library's exact emulation.
TEST(FusedMultiplyAdd, RoundsOnce) {
  std::mt19937 random(1);
  const auto expect_same = [](float a, float b, float c) {
    const float got = fused_multiply_add(a, b, c), expected = std::fma(a, b, c);
    if (std::isnan(expected)) {
      EXPECT_TRUE(std::isnan(got));
    } else {
      ASSERT_EQ(same_bits<uint32_t>(got), same_bits<uint32_t>(expected)) << a << " * " << b << " + " << c;
    }
  };
  for (int i = 0; i < 300000; ++i) {
    const auto any = [&] { return same_bits<float>(static_cast<uint32_t>(random())); };
    expect_same(any(), any(), any());
    // Few bits in the factors, and an addend far below or above: sums that land halfway between two floats.
    const auto short_number = [&](uint32_t mask, uint32_t exponent) {
      return same_bits<float>((static_cast<uint32_t>(random()) & mask) | exponent << 23);
    };
    expect_same(short_number(0x7ff000u, 127), short_number(0x7ff000u, 127),
                short_number(0x80000003u, 90 + static_cast<uint32_t>(random()) % 64));
    // Subnormal results.
    expect_same(short_number(0x7fffffu, 40 + static_cast<uint32_t>(random()) % 30), short_number(0x7fffffu, 50),
                short_number(0x80ffffffu, 0));
  }
}

}  // namespace
}  // namespace dynamic_moe
