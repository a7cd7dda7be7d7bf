// SPDX-License-Identifier: Apache-2.0
// Passes over the logits of one token, 16 experts side by side, and the sums that they leave for each of 16 columns.
// Included only by files of one CPU level.
#pragma once

#include "gating/group.h"

namespace dynamic_moe {
namespace {

template <class L, class Logit>
struct RowSoftmax {
  using Floats = typename L::Floats;
  static constexpr int kLanes = L::kLanes;
  static constexpr int kParts = 16 / kLanes;  // vectors that hold 16 experts

  // Sums or maxima of 16 columns, for each token of a group.
  using Partial = float[kLanes][16];

  static void load_columns(const Logit* row, int64_t left, Floats (&x)[kParts]) {
    const Floats fill = L::broadcast(-__builtin_inff());
    for (int part = 0; part < kParts; ++part) {
      const int width = clamped(left - part * kLanes, kLanes);
      x[part] = width == kLanes ? L::load(row + part * kLanes) : L::load_or(row + part * kLanes, width, fill);
    }
  }

  // x[i]: column i of every token of the group.
  static void by_column(const Partial& partial, Floats (&x)[16]) {
    for (int part = 0; part < kParts; ++part) {
      Floats block[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) block[lane] = L::load(&partial[lane][part * kLanes]);
      L::transpose_floats(block);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) x[part * kLanes + i] = block[i];
    }
  }

  static Floats sum_in_pairs(const Partial& partial) {
    Floats x[16];
    by_column(partial, x);
    for (int count = 8; count >= 1; count /= 2) {
      for (int i = 0; i < count; ++i) x[i] = L::add(x[2 * i], x[2 * i + 1]);
    }
    return x[0];
  }

  static void largest_logits(const Logit* row, int64_t num_experts, float (&partial)[16]) {
    Floats most[kParts];
    load_columns(row, num_experts, most);
    for (int64_t e = 16; e < num_experts; e += 16) {
      Floats x[kParts];
      load_columns(row + e, num_experts - e, x);
      for (int part = 0; part < kParts; ++part) most[part] = L::max(most[part], x[part]);
    }
    for (int part = 0; part < kParts; ++part) L::store(&partial[part * kLanes], most[part]);
  }

  struct Sums {
    Partial s, q, q2;  // sum exp(-d), sum d exp(-d), sum d^2 exp(-d)
  };

  static Floats distance(Floats largest, Floats x, Floats temperature, bool has_temperature) {
    Floats d = L::sub(largest, x);
    if (has_temperature) d = L::div(d, temperature);
    return L::min(L::broadcast(kLargestExponent), d);
  }

  // One token's sums so far, in the pass that turns its logits into exponentials.
  struct Columns {
    Floats s[kParts], q[kParts], q2[kParts];
  };

  // 16 kChunks experts, of which `left` are there.
  template <int kChunks>
  [[gnu::always_inline]] static void exponentials(const Logit* logits, int64_t left, Floats largest, Floats temperature,
                                                  bool has_temperature, float* result, Columns& columns) {
    constexpr int kCount = kChunks * kParts;
    Floats d[kCount], y[kCount];
#pragma GCC unroll 4
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Floats x[kParts];
      load_columns(logits + chunk * 16, left - chunk * 16, x);
      for (int part = 0; part < kParts; ++part) {
        d[chunk * kParts + part] = distance(largest, x[part], temperature, has_temperature);
      }
    }
    exp_of_negative<L, kCount>(d, y);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      const int part = i % kParts;
      const Floats product = L::mul(y[i], d[i]);
      columns.s[part] = L::add(columns.s[part], y[i]);
      columns.q[part] = L::add(columns.q[part], product);
      columns.q2[part] = L::fma(product, d[i], columns.q2[part]);
      L::store(result + i * kLanes, y[i]);  // scratch is padded
    }
  }

  static void exponentials(const Logit* logits, int64_t num_experts, Floats largest, Floats temperature,
                           bool has_temperature, float* result, int lane, Sums& sums) {
    Columns columns;
    for (int part = 0; part < kParts; ++part) columns.s[part] = columns.q[part] = columns.q2[part] = L::zero();
    int64_t e = 0;
    if constexpr (kParts <= 2) {
      for (; e + 48 < num_experts; e += 64) {
        exponentials<4>(logits + e, num_experts - e, largest, temperature, has_temperature, result + e, columns);
      }
      if (e + 16 < num_experts) {
        exponentials<2>(logits + e, num_experts - e, largest, temperature, has_temperature, result + e, columns);
        e += 32;
      }
    }
    for (; e < num_experts; e += 16) {
      exponentials<1>(logits + e, num_experts - e, largest, temperature, has_temperature, result + e, columns);
    }
    for (int part = 0; part < kParts; ++part) {
      L::store(&sums.s[lane][part * kLanes], columns.s[part]);
      L::store(&sums.q[lane][part * kLanes], columns.q[part]);
      L::store(&sums.q2[lane][part * kLanes], columns.q2[part]);
    }
  }
};

}  // namespace
}  // namespace dynamic_moe
