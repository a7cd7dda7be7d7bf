// SPDX-License-Identifier: Apache-2.0
// float32 of which the products may read the 10 upper bits of the mantissa: a storage type of its own in typed tests.
// Its inputs are such numbers, so that they lose nothing; what a kernel computes on the way may be rounded to them
// once.
#pragma once

#include "support/storage.h"

namespace dynamic_moe {

struct Tf32 {
  float value;
};

inline float to_float(Tf32 number) { return number.value; }

template <>
inline Tf32 from_float<Tf32>(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return {std::bit_cast<float>((bits + 0x1000u) & 0xffffe000u)};
}

namespace testing {

template <>
struct Storage<Tf32> {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr const char* kName = "tf32";
  static constexpr Precision kPrecision{0x1p-24, 0x1p-11, 0x1p-150, 0x1p-125};
  using Accumulator = float;
};

template <class T>
inline constexpr bool kAllowTf32 = std::is_same_v<T, Tf32>;

// What the CUDA kernels compute with.
using DeviceTypes = ::testing::Types<float, Tf32, BFloat16, Float16>;

}  // namespace testing
}  // namespace dynamic_moe
