// SPDX-License-Identifier: Apache-2.0
// Gating for any number of experts: a row at a time, 16 experts side by side, in three passes over a row that stays in
// the first-level cache: the largest logit; exponentials and their sums; probabilities. The third also picks out the
// experts that are worth sorting, so that the sort is about as long as the selection and not as the row.
// Included only by files of one CPU level.
#pragma once

#include "gating/select.h"

namespace dynamic_moe {
namespace {

template <class L, class Logit>
struct ForwardMany {
  using Floats = typename L::Floats;
  using Words = typename L::Words;
  static constexpr int kLanes = L::kLanes;
  static constexpr int kParts = 16 / kLanes;  // vectors that hold 16 experts

  // Sums or maxima of 16 columns, for each token of a group.
  using Partial = float[kLanes][16];

  static void load_columns(const Logit* row, int64_t left, Floats (&x)[kParts]) {
    const Floats fill = L::broadcast(-__builtin_inff());
    for (int part = 0; part < kParts; ++part) {
      x[part] = left >= 16 ? L::load(row + part * kLanes)
                           : L::load_or(row + part * kLanes, clamped(left - part * kLanes, kLanes), fill);
    }
  }

  static void store_columns(float* row, int64_t left, const Floats (&x)[kParts]) {
    for (int part = 0; part < kParts; ++part) {
      if (left >= 16) {
        L::store(row + part * kLanes, x[part]);
      } else {
        L::store_first(row + part * kLanes, x[part], clamped(left - part * kLanes, kLanes));
      }
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

  static void exponentials(const Logit* row, int64_t num_experts, Floats largest, Floats temperature,
                           bool has_temperature, float* exponential, int lane, Sums& sums) {
    Floats s[kParts], q[kParts], q2[kParts];
    for (int part = 0; part < kParts; ++part) s[part] = q[part] = q2[part] = L::zero();
    for (int64_t e = 0; e < num_experts; e += 16) {
      Floats x[kParts];
      load_columns(row + e, num_experts - e, x);
      for (int part = 0; part < kParts; ++part) {
        const Floats d = distance(largest, x[part], temperature, has_temperature);
        x[part] = exp_of_negative<L>(d);
        s[part] = L::add(s[part], x[part]);
        q[part] = L::fma(x[part], d, q[part]);
        q2[part] = L::fma(L::mul(x[part], d), d, q2[part]);
      }
      store_columns(exponential + e, num_experts - e, x);
    }
    for (int part = 0; part < kParts; ++part) {
      L::store(&sums.s[lane][part * kLanes], s[part]);
      L::store(&sums.q[lane][part * kLanes], q[part]);
      L::store(&sums.q2[lane][part * kLanes], q2[part]);
    }
  }

  // Experts whose probability does not reach `least` are not worth sorting. An estimate: a token that turns out to need
  // more experts than reach it gets its whole row sorted.
  struct Bound {
    bool none;
    Floats least;
  };

  // Of the maxima of 16 disjoint sets of experts, the K-th largest is no larger than the K-th largest probability.
  static Floats kth_largest_of_columns(Floats (&x)[16], int k) {
    struct Order {
      static Floats larger(Floats a, Floats b) { return L::max(a, b); }
      static Floats smaller(Floats a, Floats b) { return L::min(a, b); }
    };
    sort_in_registers<Order>(x);
    alignas(64) float sorted[16][kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) L::store(sorted[i], x[i]);
    return L::load(sorted[k - 1]);
  }

  static Bound bound(const GatingParams& p, const GatingChunk& chunk, Floats (&columns)[16], Floats largest,
                     Floats scale, Floats q, const Partial& q2) {
    const bool has_mass = p.is_top_p && p.top_p < 1.0;
    const bool few_ranks = p.max_experts <= 16;
    if (p.num_experts <= 16 || (!has_mass && !few_ranks)) return {true, L::zero()};
    Floats least = L::zero();
    if (few_ranks) {
      const Floats d = distance(largest, kth_largest_of_columns(columns, p.max_experts),
                                L::broadcast(static_cast<float>(p.temperature)), p.temperature != 1.0);
      least = L::mul(exp_of_negative<L>(d), scale);
    }
    if (has_mass) {
      // As if log P, weighted by P, were normal: its mean is that of -d, and `spread` deviations below it lies p.
      const Floats mean = L::mul(q, scale);
      const Floats variance = L::sub(L::mul(sum_in_pairs(q2), scale), L::mul(mean, mean));
      const Floats deviation = L::square_root(L::max(variance, L::zero()));
      Floats d = L::fma(deviation, L::broadcast(chunk.spread), L::add(mean, L::broadcast(0.05f)));
      d = L::min(L::broadcast(kLargestExponent), L::max(d, L::zero()));
      least = L::max(least, L::mul(exp_of_negative<L>(d), scale));
    }
    return {false, least};
  }

  static void write_zeros(float* row, int64_t num_experts) {
    for (int64_t e = 0; e < num_experts; ++e) row[e] = 0.0f;
  }

  // Scales a row of exponentials to probabilities. Returns the number of candidates appended.
  template <bool kAppends>
  static int64_t probabilities(float* row, int64_t num_experts, float scale, float least, float* column_sum,
                               float* values, int32_t* numbers) {
    int64_t count = 0;
    for (int64_t e = 0; e < num_experts; e += 16) {
      const int64_t left = num_experts - e;
      Floats x[kParts];
      for (int part = 0; part < kParts; ++part) {
        float* at = row + e + part * kLanes;
        const Floats exponential =
            left >= 16 ? L::load(at) : L::load_or(at, clamped(left - part * kLanes, kLanes), L::zero());
        x[part] = L::mul(exponential, L::broadcast(scale));
        float* sum = column_sum + e + part * kLanes;
        L::store(sum, L::add(L::load(sum), x[part]));
        if constexpr (kAppends) {
          count += L::append_if_at_least(x[part], L::broadcast(least), static_cast<uint32_t>(e + part * kLanes),
                                         values + count, numbers + count);
        }
      }
      store_columns(row + e, left, x);
    }
    return count;
  }

  // Keys of the first `size` (a multiple of 16) values of every token, which lie `stride` apart; `numbers` may be null:
  // then value i belongs to expert i.
  static void make_keys(const float* values, const int32_t* numbers, int64_t stride, int64_t limit, int count,
                        int64_t size, double* keys) {
    for (int64_t i = 0; i < size; i += kLanes) {
      Floats value[kLanes];
      Words number[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        const int width = lane < count ? clamped(limit - i, kLanes) : 0;
        value[lane] = width == kLanes ? L::load(values + lane * stride + i)
                                      : L::load_or(values + lane * stride + i, width, L::zero());
        number[lane] = numbers ? L::load_words(numbers + lane * stride + i) : L::broadcast_word(0);
      }
      L::transpose_floats(value);
      if (numbers) L::transpose(number);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        typename L::Keys key[L::kKeyParts];
        L::make_keys(value[j], numbers ? number[j] : L::broadcast_word(static_cast<uint32_t>(i + j)), key);
        for (int part = 0; part < L::kKeyParts; ++part) {
          L::store_keys(keys + (i + j) * kLanes + part * L::kKeyLanes, key[part]);
        }
      }
    }
  }

  static void sort_all(const GatingParams& p, const Group<L>& group, const GroupScratch<L>& scratch) {
    const float* rows = static_cast<const float*>(p.probabilities) + group.first_token * p.num_experts;
    const int64_t size = (p.num_experts + 15) / 16 * 16;
    make_keys(rows, nullptr, p.num_experts, p.num_experts, group.count, size, scratch.keys);
    sort_keys<L>(scratch.keys, size);
  }

  // Returns how many keys there are.
  static int64_t sort_candidates(const GatingParams& p, const Group<L>& group, const int64_t (&found)[kLanes],
                                 const GroupScratch<L>& scratch) {
    const int64_t stride = padded(p.num_experts);
    int64_t size = 1;
    for (int lane = 0; lane < group.count; ++lane) size = found[lane] > size ? found[lane] : size;
    size = (size + 15) / 16 * 16;
    for (int lane = 0; lane < group.count; ++lane) {
      for (int64_t i = found[lane]; i < size; i += kLanes) {
        L::store(scratch.values + lane * stride + i, L::zero());
        L::store_words(scratch.numbers + lane * stride + i, L::broadcast_word(~0u));
      }
    }
    make_keys(scratch.values, scratch.numbers, stride, size, group.count, size, scratch.keys);
    sort_keys<L>(scratch.keys, size);
    return size;
  }

  static Group<L> forward(const GatingParams& p, const GatingChunk& chunk, int64_t token,
                          const GroupScratch<L>& scratch) {
    Group<L> group{token, clamped(chunk.end - token, kLanes), {}, 0};
    const int64_t num_experts = p.num_experts, stride = padded(num_experts);
    const Logit* logits = static_cast<const Logit*>(p.logits) + token * num_experts;
    float* rows = static_cast<float*>(p.probabilities) + token * num_experts;
    const Floats temperature = L::broadcast(static_cast<float>(p.temperature));

    alignas(64) Partial most = {};
    for (int lane = 0; lane < group.count; ++lane) largest_logits(logits + lane * num_experts, num_experts, most[lane]);
    Floats columns[16];
    by_column(most, columns);
    Floats largest = columns[0];
    for (int i = 1; i < 16; ++i) largest = L::max(largest, columns[i]);
    alignas(64) float of_lane[kLanes], least_of_lane[kLanes];
    L::store(of_lane, largest);

    alignas(64) Sums sums = {};
    for (int lane = 0; lane < group.count; ++lane) {
      exponentials(logits + lane * num_experts, num_experts, L::broadcast(of_lane[lane]), temperature,
                   p.temperature != 1.0, rows + lane * num_experts, lane, sums);
    }
    const Floats q = sum_in_pairs(sums.q);
    const Floats scale = finish_softmax<L>(p, largest, sum_in_pairs(sums.s), q, group);
    const Bound worth = bound(p, chunk, columns, largest, scale, q, sums.q2);
    L::store(of_lane, scale);
    L::store(least_of_lane, worth.least);

    int64_t found[kLanes] = {};
    for (int lane = 0; lane < group.count; ++lane) {
      float* row = rows + lane * num_experts;
      float* values = scratch.values + lane * stride;
      int32_t* numbers = scratch.numbers + lane * stride;
      if ((L::bits(group.routed) >> lane & 1) == 0) {
        write_zeros(row, num_experts);
      } else if (worth.none) {
        probabilities<false>(row, num_experts, of_lane[lane], 0, scratch.column_sum, values, numbers);
      } else {
        found[lane] = probabilities<true>(row, num_experts, of_lane[lane], least_of_lane[lane], scratch.column_sum,
                                          values, numbers);
      }
    }

    Taken<L> taken{};
    if (!worth.none) taken = take_in_order<L>(p, group.routed, sort_candidates(p, group, found, scratch), scratch);
    if (!taken.complete) {
      sort_all(p, group, scratch);
      taken = take_in_order<L>(p, group.routed, (num_experts + 15) / 16 * 16, scratch);
    }
    write_selection<L>(p, chunk, group, taken, scratch);
    return group;
  }
};

}  // namespace
}  // namespace dynamic_moe
