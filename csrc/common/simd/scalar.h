// SPDX-License-Identifier: Apache-2.0
// One float32 lane: the same kernels on any processor.
#pragma once

#include <cmath>

#include "common/half.h"

namespace dynamic_moe {
namespace {

struct ScalarLane {
  using Floats = float;
  using Words = uint32_t;
  static constexpr int kLanes = 1;
  static constexpr bool kDotsBFloat16 = false;

  static Floats zero() { return 0.0f; }
  static Floats broadcast(float value) { return value; }

  // At any address, as on the vector levels: packed weights are bytes and may begin anywhere.
  template <class T>
  static Floats load(const T* p) {
    T value;
    __builtin_memcpy(&value, p, sizeof value);
    return to_float(value);
  }
  template <class T>
  static void load_two(const T* p, Floats& first, Floats& second) {
    first = load(p);
    second = load(p + 1);
  }
  static Words load_words(const void* p) {
    Words word = 0;
    __builtin_memcpy(&word, p, sizeof word);
    return word;
  }
  template <class T>
  static void store(T* p, Floats v) {
    const T value = from_float<T>(v);
    __builtin_memcpy(p, &value, sizeof value);
  }
  static void store_words(void* p, Words v) { __builtin_memcpy(p, &v, sizeof v); }

  template <class T>
  static void stream(T* p, Floats v) {
    store(p, v);
  }
  static void fence() {}

  // A part of one lane is nothing; these exist so that the kernels read the same on every level.
  template <class T>
  static Floats load_first(const T* p, int count) {
    return count > 0 ? load(p) : 0.0f;
  }
  template <class T>
  static void store_first(T* p, Floats v, int count) {
    if (count > 0) store(p, v);
  }

  static Floats add(Floats a, Floats b) { return a + b; }
  static Floats sub(Floats a, Floats b) { return a - b; }
  static Floats mul(Floats a, Floats b) { return a * b; }
  static Floats reciprocal(Floats a) { return 1.0f / a; }
  static Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
  static Floats min(Floats a, Floats b) { return a < b ? a : b; }
  static Floats max(Floats a, Floats b) { return a > b ? a : b; }
  static Floats round(Floats a) { return std::nearbyint(a); }
  static Floats scale_by_power_of_two(Floats a, Floats exponent) { return std::ldexp(a, static_cast<int>(exponent)); }
  static float sum(Floats a) { return a; }
  static bool any_infinite(Floats a) { return __builtin_isinf(a) != 0; }

  static void store_sums(float* p, Floats a, Floats b, Floats c, Floats d) {
    p[0] = a;
    p[1] = b;
    p[2] = c;
    p[3] = d;
  }

  static void transpose(Words (&)[1]) {}
  static Words as_words(Floats v) { return std::bit_cast<uint32_t>(v); }
};

}  // namespace
}  // namespace dynamic_moe
