// SPDX-License-Identifier: Apache-2.0
// Batcher's odd-even merge sort, largest first: the same comparisons whatever the values, so that the lanes of a vector
// sort as many lists side by side. Small sizes are unrolled in registers, any size runs through memory.
// Source: Knuth, The Art of Computer Programming, volume 3, section 5.3.4.
#pragma once

#include <cstdint>
#include <utility>

namespace dynamic_moe {
namespace {

template <int kSize>
struct SortNetwork {
  struct Comparison {
    int16_t first, second;  // after it, the first holds the larger value
  };
  Comparison comparisons[kSize * 16] = {};
  int count = 0;

  constexpr SortNetwork() {
    for (int p = 1; p < kSize; p *= 2) {
      for (int k = p; k >= 1; k /= 2) {
        for (int j = k % p; j + k < kSize; j += 2 * k) {
          for (int i = j; i < j + k && i + k < kSize; ++i) {
            if (i / (2 * p) == (i + k) / (2 * p)) comparisons[count++] = {int16_t(i), int16_t(i + k)};
          }
        }
      }
    }
  }
};

template <int kSize>
constexpr SortNetwork<kSize> kSortNetwork{};

// Order has larger(a, b) and smaller(a, b).
template <class Order, class Value>
[[gnu::always_inline]] inline void put_larger_first(Value& a, Value& b) {
  const Value larger = Order::larger(a, b);
  b = Order::smaller(a, b);
  a = larger;
}

template <class Order, int kSize, class Value, int... kIndex>
[[gnu::always_inline]] inline void sort_unrolled(Value (&v)[kSize], std::integer_sequence<int, kIndex...>) {
  (put_larger_first<Order>(v[kSortNetwork<kSize>.comparisons[kIndex].first],
                           v[kSortNetwork<kSize>.comparisons[kIndex].second]),
   ...);
}

template <class Order, int kSize, class Value>
[[gnu::always_inline]] inline void sort_in_registers(Value (&v)[kSize]) {
  sort_unrolled<Order>(v, std::make_integer_sequence<int, kSortNetwork<kSize>.count>{});
}

// The four largest of kSize values, largest first, in v[0] to v[3]; the others are lost. kSize is four times a power of
// two. Sorts fours and merges them in pairs: of sorted fours a and b, the larger of a[i] and b[3 - i] are the four
// largest, first falling and then rising or the other way round, which four more comparisons sort (Batcher's bitonic
// merge, in the same place).
template <class Order, int kSize, class Value>
[[gnu::always_inline]] inline void first_four(Value (&v)[kSize]) {
#pragma GCC unroll 8
  for (int i = 0; i < kSize; i += 4) {
    put_larger_first<Order>(v[i], v[i + 1]);
    put_larger_first<Order>(v[i + 2], v[i + 3]);
    put_larger_first<Order>(v[i], v[i + 2]);
    put_larger_first<Order>(v[i + 1], v[i + 3]);
    put_larger_first<Order>(v[i + 1], v[i + 2]);
  }
#pragma GCC unroll 4
  for (int step = 4; step < kSize; step *= 2) {
#pragma GCC unroll 4
    for (int i = 0; i < kSize; i += 2 * step) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) v[i + j] = Order::larger(v[i + j], v[i + step + 3 - j]);
      put_larger_first<Order>(v[i], v[i + 2]);
      put_larger_first<Order>(v[i + 1], v[i + 3]);
      put_larger_first<Order>(v[i], v[i + 1]);
      put_larger_first<Order>(v[i + 2], v[i + 3]);
    }
  }
}

// Merges sorted runs of `run` (a power of two) into one list of `size`; compare(i, j) puts the larger at i.
template <class Compare>
inline void merge_sorted_runs(int64_t run, int64_t size, const Compare& compare) {
  for (int64_t p = run; p < size; p *= 2) {
    for (int64_t k = p; k >= 1; k /= 2) {
      for (int64_t j = k % p; j + k < size; j += 2 * k) {
        if (j / (2 * p) != (j + k) / (2 * p)) continue;  // in different pairs of runs
        const int64_t end = j + k < size - k ? j + k : size - k;
        for (int64_t i = j; i < end; ++i) compare(i, i + k);
      }
    }
  }
}

}  // namespace
}  // namespace dynamic_moe
