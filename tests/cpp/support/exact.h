// SPDX-License-Identifier: Apache-2.0
// What an output should be, element by element, and how far it may be off. The bound belongs to the element: it scales
// with the numbers that were added up for it, so that a fault in a small element cannot hide behind a large one.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "support/fenced.h"
#include "support/storage.h"

namespace dynamic_moe::testing {

// A sum, the sum of the absolute values of its terms, and the sum of the squares of their errors.
struct Sum {
  double value = 0, magnitude = 0, variance = 0;

  void add(double a, double b) {
    value += a * b;
    magnitude += std::fabs(a * b);
  }
  // a is off by up to `error`, independently of the other terms.
  void add(double a, double b, double error) {
    add(a, b);
    variance += error * b * error * b;
  }
  // Roundings of the terms have either sign: eight times the root of their squares is never reached.
  double inherited_error() const { return 8 * std::sqrt(variance); }
};

struct Exact {
  int64_t width;  // elements of a row, for messages
  std::vector<double> value, bound;

  Exact(int64_t count, int64_t row_width)
      : width(row_width), value(static_cast<size_t>(count)), bound(static_cast<size_t>(count)) {}

  void set(int64_t index, double exact, double error) {
    value[static_cast<size_t>(index)] = exact;
    bound[static_cast<size_t>(index)] = error;
  }
};

// Whether every element lies within its bound, or is the infinity that it should be. NaN never does.
template <class T>
::testing::AssertionResult matches(std::span<const T> got, const Exact& exact) {
  if (got.size() != exact.value.size()) {
    return ::testing::AssertionFailure() << got.size() << " elements instead of " << exact.value.size();
  }
  size_t bad = 0, worst = 0;
  double worst_ratio = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(value_of(got[i]) - exact.value[i]);
    if (error <= exact.bound[i] || value_of(got[i]) == exact.value[i]) continue;
    ++bad;
    const double ratio = std::isnan(error) ? std::numeric_limits<double>::infinity() : error / exact.bound[i];
    if (ratio > worst_ratio) {
      worst_ratio = ratio;
      worst = i;
    }
  }
  if (bad == 0) return ::testing::AssertionSuccess();
  const auto width = static_cast<size_t>(exact.width);
  return ::testing::AssertionFailure() << bad << " of " << got.size() << " elements are out of bounds, the worst at ["
                                       << worst / width << ", " << worst % width << "]: got " << value_of(got[worst])
                                       << ", exactly " << exact.value[worst] << " +- " << exact.bound[worst];
}
template <class T>
::testing::AssertionResult matches(const Fenced<T>& got, const Exact& exact) {
  return matches(got.span(), exact);
}

// Whether every element is +0, to the bit.
template <class T>
::testing::AssertionResult all_zero(std::span<const T> got) {
  const T zero{};
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::memcmp(&got[i], &zero, sizeof zero) != 0) {
      return ::testing::AssertionFailure() << "element " << i << " is " << value_of(got[i]);
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace dynamic_moe::testing
