// SPDX-License-Identifier: Apache-2.0
// Gating's operations on a single lane; lanes_avx512.h explains the parts. Internal linkage throughout.
#pragma once

#include <cstring>

#include "common/simd/scalar.h"

namespace dynamic_moe {
namespace {

template <class To, class From>
inline To same_bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  memcpy(&to, &from, sizeof to);
  return to;
}

// One rounding, as the vector levels' instructions do it.
inline float fused_multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  // The product of two floats is exact in double. Rounding the sum to double and then to float is one rounding too many
  // only if the first lands halfway between two floats (bit 28 and no lower one), or where floats are subnormal. There
  // it is rounded to odd first (Boldo and Melquiond 2008).
  const double product = static_cast<double>(a) * b;
  const double sum = product + c;
  uint64_t bits = same_bits<uint64_t>(sum);
  if ((bits & 0x1fffffff) == 0x10000000 || !(__builtin_fabs(sum) >= __FLT_MIN__)) {
    const double back = sum - product;
    const double error = (product - (sum - back)) + (c - back);
    if ((error > 0 || error < 0) && (bits & 1) == 0) bits += (error > 0) == (sum > 0) ? 1 : uint64_t(-1);
  }
  return static_cast<float>(same_bits<double>(bits));
#endif
}

struct SingleLane : ScalarLane {
  using Mask = bool;

  static Words broadcast_word(uint32_t v) { return v; }
  static Words as_words(Floats v) { return same_bits<uint32_t>(v); }
  static Floats as_floats(Words v) { return same_bits<float>(v); }
  static Words sub_words(Words a, Words b) { return a - b; }
  static Words add_words(Words a, Words b) { return a + b; }
  static Words shift_left(Words v, int bits) { return v << bits; }
  static Words shift_right_signed(Words v, int bits) { return static_cast<Words>(static_cast<int32_t>(v) >> bits); }
  static Floats to_floats(Words v) { return static_cast<float>(static_cast<int32_t>(v)); }
  static Words lane_numbers() { return 0; }
  static Floats div(Floats a, Floats b) { return a / b; }
  static Floats square_root(Floats v) { return __builtin_sqrtf(v); }

  static Floats fma(Floats a, Floats b, Floats c) { return fused_multiply_add(a, b, c); }
  // a is finite and positive or NaN, the exponent a whole number in [-252, 254] (anything if a is NaN).
  static Floats scale_by_power_of_two(Floats a, Floats exponent) {
    const int32_t whole = exponent >= -252.0f ? static_cast<int32_t>(exponent) : 0;
    const int32_t half = whole >> 1;
    return a * power_of_two(half) * power_of_two(whole - half);
  }
  template <int kCount>
  static void scale_by_powers_of_two(Floats (&a)[kCount], const Floats (&n)[kCount],
                                     const Floats (& /*biased*/)[kCount]) {
    for (int i = 0; i < kCount; ++i) a[i] = scale_by_power_of_two(a[i], n[i]);
  }

  static Mask first_lanes(int count) { return count > 0; }
  static Mask lanes(uint32_t bits) { return bits & 1; }
  static uint32_t bits(Mask m) { return m; }
  static Mask at_least(Floats a, Floats b) { return a >= b; }
  static Mask more(Floats a, Floats b) { return a > b; }
  static Mask negative(Words v) { return static_cast<int32_t>(v) < 0; }
  static Mask both(Mask a, Mask b) { return a && b; }
  static Mask but_not(Mask a, Mask b) { return a && !b; }
  template <class V>
  static V select(Mask m, V yes, V no) {
    return m ? yes : no;
  }

  template <class T>
  static Floats load_or(const T* p, int count, Floats fill) {
    return count > 0 ? load(p) : fill;
  }
  static void store_words_first(int32_t* p, Words v, int count) {
    if (count > 0) store_words(p, v);
  }
  static void stream_words(int32_t* p, Words v) { store_words(p, v); }
  static void transpose_floats(Floats (&)[1]) {}

  static float sum_of_pairs(const Floats (&v)[16]) {
    float s[8];
    for (int i = 0; i < 8; ++i) s[i] = v[2 * i] + v[2 * i + 1];
    return ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
  }

  static constexpr bool kCompresses = true;
  static int append_if_at_least(Floats v, Floats least, uint32_t first_number, float* values, int32_t* numbers,
                                Floats& sum) {
    *values = v;
    *numbers = static_cast<int32_t>(first_number);
    sum += v >= least ? v : 0.0f;
    return v >= least;
  }

  using Keys = double;
  static constexpr int kKeyParts = 1;
  static constexpr int kKeyLanes = 1;
  static Keys load_keys(const double* p) { return *p; }
  static void store_keys(double* p, Keys v) { *p = v; }
  static Keys larger(Keys a, Keys b) { return a > b ? a : b; }
  static Keys smaller(Keys a, Keys b) { return a > b ? b : a; }
  static void make_keys(Floats probability, Words expert, Keys (&keys)[1]) {
    const uint64_t high = as_words(probability) | 0x40000000u;
    keys[0] = same_bits<double>(high << 32 | static_cast<uint32_t>(~expert));
  }
  static void split_keys(const Keys (&keys)[1], Floats& probability, Words& expert) {
    const uint64_t bits = same_bits<uint64_t>(keys[0]);
    probability = as_floats(static_cast<uint32_t>(bits >> 32) & ~0x40000000u);
    expert = ~static_cast<uint32_t>(bits);
  }

 private:
  static float power_of_two(int32_t exponent) { return as_floats(static_cast<uint32_t>(exponent + 127) << 23); }
};

}  // namespace
}  // namespace dynamic_moe
