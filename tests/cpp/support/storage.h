// SPDX-License-Identifier: Apache-2.0
// The four storage types for typed tests: their names, their values as float64, and their rounding errors.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "common/half.h"
#include "common/types.h"

namespace dynamic_moe::testing {

// How far computed numbers may lie from exact ones.
struct Precision {
  double sum;       // unit roundoff of sums
  double store;     // unit roundoff of storage
  double smallest;  // half of the smallest positive number of storage
  double flush;     // below this the sigmoid need not follow exp

  // Of a sum of `terms` products whose absolute values add up to `magnitude`. The errors of the steps have either sign,
  // so they grow like the root of their number; 8 covers short sums. One product of K left out of the sum, or one of a
  // neighbor let in, is a fault of about magnitude / K: far above this for every K here.
  double sum_error(int64_t terms, double magnitude) const {
    return sum * (8 + std::sqrt(static_cast<double>(terms))) * magnitude;
  }
  double store_error(double value) const { return store * std::fabs(value) + smallest; }
};

template <class T>
struct Storage;

template <>
struct Storage<float> {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr const char* kName = "float32";
  static constexpr Precision kPrecision{0x1p-24, 0x1p-24, 0x1p-150, 0x1p-125};
  using Accumulator = float;
};
template <>
struct Storage<double> {
  static constexpr DType kDType = DType::kFloat64;
  static constexpr const char* kName = "float64";
  // The oracle is float64 too: twice the roundoff, its own and the kernel's.
  static constexpr Precision kPrecision{0x1p-52, 0x1p-52, 0x1p-1074, 0x1p-1022};
  using Accumulator = double;
};
template <>
struct Storage<BFloat16> {
  static constexpr DType kDType = DType::kBFloat16;
  static constexpr const char* kName = "bfloat16";
  static constexpr Precision kPrecision{0x1p-24, 0x1p-8, 0x1p-134, 0x1p-125};
  using Accumulator = float;
};
template <>
struct Storage<Float16> {
  static constexpr DType kDType = DType::kFloat16;
  static constexpr const char* kName = "float16";
  static constexpr Precision kPrecision{0x1p-24, 0x1p-11, 0x1p-25, 0x1p-125};
  using Accumulator = float;
};

inline double value_of(double stored) { return stored; }
template <class T>
double value_of(T stored) {
  return static_cast<double>(to_float(stored));
}

template <class T>
T stored(double value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return from_float<T>(static_cast<float>(value));
  }
}

using StorageTypes = ::testing::Types<float, double, BFloat16, Float16>;

struct StorageNames {
  template <class T>
  static std::string GetName(int) {
    return Storage<T>::kName;
  }
};

}  // namespace dynamic_moe::testing
