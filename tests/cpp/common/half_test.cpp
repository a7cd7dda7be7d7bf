// SPDX-License-Identifier: Apache-2.0
// The oracle decodes and rounds with exact double arithmetic (ldexp, nearbyint), nothing like the bit tricks under
// test.
#include "common/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace dynamic_moe {
namespace {

// An IEEE-like 16-bit format.
struct Format {
  int exponent_bits, mantissa_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  int exponent_of(uint16_t bits) const { return (bits >> mantissa_bits) & ((1 << exponent_bits) - 1); }
  int mantissa_of(uint16_t bits) const { return bits & ((1 << mantissa_bits) - 1); }
  bool is_nan(uint16_t bits) const { return exponent_of(bits) == (1 << exponent_bits) - 1 && mantissa_of(bits) != 0; }
};
constexpr Format kBFloat16{8, 7};
constexpr Format kFloat16{5, 10};

double decode(Format format, uint16_t bits) {
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  const int exponent = format.exponent_of(bits);
  const int mantissa = format.mantissa_of(bits);
  if (exponent == (1 << format.exponent_bits) - 1) {
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  const int hidden = exponent ? 1 << format.mantissa_bits : 0;
  return sign * std::ldexp(mantissa + hidden, std::max(exponent, 1) - format.bias() - format.mantissa_bits);
}

// The nearest value of the format, ties to the even mantissa.
uint16_t encode(Format format, double value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const uint16_t infinity = static_cast<uint16_t>(((1 << format.exponent_bits) - 1) << format.mantissa_bits);
  if (std::isinf(value)) return sign | infinity;
  const double magnitude = std::fabs(value);
  int exponent = magnitude == 0 ? 1 : std::max(std::ilogb(magnitude) + format.bias(), 1);
  // In units of the last place of this binade; nearbyint rounds half to even.
  const double units = std::nearbyint(std::ldexp(magnitude, format.bias() + format.mantissa_bits - exponent));
  // Consecutive bit patterns are consecutive values, so a carry into the exponent needs no special case.
  const double bits = units + static_cast<double>(exponent - 1) * (1 << format.mantissa_bits);
  return sign | static_cast<uint16_t>(std::min<double>(bits, infinity));
}

template <class T>
constexpr Format kFormatOf{};
template <>
constexpr Format kFormatOf<BFloat16> = kBFloat16;
template <>
constexpr Format kFormatOf<Float16> = kFloat16;

template <class T>
class Half : public ::testing::Test {};
using HalfTypes = ::testing::Types<BFloat16, Float16>;
TYPED_TEST_SUITE(Half, HalfTypes);

TYPED_TEST(Half, EveryValueWidensExactly) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const TypeParam half{static_cast<uint16_t>(bits)};
    const double expected = decode(kFormatOf<TypeParam>, half.bits);
    const float got = to_float(half);
    if (std::isnan(expected)) {
      ASSERT_TRUE(std::isnan(got)) << std::hex << bits;
    } else {
      ASSERT_EQ(got, expected) << std::hex << bits;
    }
    ASSERT_EQ(std::signbit(got), (bits & 0x8000) != 0) << std::hex << bits;
  }
}

TYPED_TEST(Half, EveryValueSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const TypeParam half{static_cast<uint16_t>(bits)};
    const TypeParam back = from_float<TypeParam>(to_float(half));
    if (kFormatOf<TypeParam>.is_nan(half.bits)) {
      ASSERT_TRUE(kFormatOf<TypeParam>.is_nan(back.bits)) << std::hex << bits;
    } else {
      ASSERT_EQ(back.bits, half.bits);
    }
  }
}

template <class T>
void expect_rounds_like_the_oracle(uint32_t bits) {
  const float value = std::bit_cast<float>(bits);
  const uint16_t got = from_float<T>(value).bits;
  if (std::isnan(value)) {
    ASSERT_TRUE(kFormatOf<T>.is_nan(got)) << std::hex << bits;
    ASSERT_EQ(got & 0x8000, bits >> 16 & 0x8000) << std::hex << bits;
  } else {
    ASSERT_EQ(got, encode(kFormatOf<T>, value)) << std::hex << bits;
  }
}

// Rounding depends on the bits that stay, the first that goes, and whether any other that goes is set. Every upper half
// with every pattern of lower bits that differ in that: each single bit, its neighbours, all and none.
TYPED_TEST(Half, EveryUpperHalfRoundsToNearestEven) {
  for (uint32_t upper = 0; upper < 0x10000; ++upper) {
    for (uint32_t lower_bit = 0; lower_bit <= 16; ++lower_bit) {
      const uint32_t lower = (1u << lower_bit) & 0xffff;
      for (const uint32_t offset : {0u, 1u, 0xffffu}) {
        expect_rounds_like_the_oracle<TypeParam>(upper << 16 | ((lower + offset) & 0xffff));
        if (this->HasFatalFailure()) return;
      }
    }
  }
}

// And all of the range in which float16 has its subnormals, its smallest normals and its overflow, densely.
TYPED_TEST(Half, BordersOfFloat16RoundToNearestEven) {
  for (const float center : {0x1p-25f, 0x1p-24f, 0x1.8p-24f, 0x1p-14f, 0x1.ffcp-15f, 65504.f, 65520.f, 65536.f}) {
    const uint32_t bits = std::bit_cast<uint32_t>(center);
    for (uint32_t neighbor = bits - 20000; neighbor <= bits + 20000; ++neighbor) {
      expect_rounds_like_the_oracle<TypeParam>(neighbor);
      expect_rounds_like_the_oracle<TypeParam>(neighbor | 0x80000000u);
      if (this->HasFatalFailure()) return;
    }
  }
}

TEST(HalfValues, AreTheKnownOnes) {
  EXPECT_EQ(from_float<Float16>(1.f).bits, 0x3c00);
  EXPECT_EQ(from_float<Float16>(-2.f).bits, 0xc000);
  EXPECT_EQ(from_float<Float16>(65504.f).bits, 0x7bff);
  EXPECT_EQ(from_float<Float16>(65519.996f).bits, 0x7bff);
  EXPECT_EQ(from_float<Float16>(65520.f).bits, 0x7c00);
  EXPECT_EQ(from_float<Float16>(0x1p-24f).bits, 0x0001);
  EXPECT_EQ(from_float<Float16>(0x1p-25f).bits, 0x0000);
  EXPECT_EQ(from_float<BFloat16>(1.f).bits, 0x3f80);
  EXPECT_EQ(from_float<BFloat16>(std::numeric_limits<float>::max()).bits, 0x7f80);
  EXPECT_EQ(from_float<BFloat16>(1.00390625f).bits, 0x3f80);  // halfway, to even: down
  EXPECT_EQ(from_float<BFloat16>(1.01171875f).bits, 0x3f82);  // halfway, to even: up
}

}  // namespace
}  // namespace dynamic_moe
