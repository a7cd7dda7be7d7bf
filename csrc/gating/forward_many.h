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

  // One token, in the pass that turns its logits into exponentials.
  struct Exponents {
    const Logit* logits;
    int64_t num_experts;
    float* exponentials;
    Floats largest, temperature;
    bool has_temperature;
    Floats s[kParts], q[kParts], q2[kParts];
  };

  // Experts e to e + 16 kChunks - 1.
  template <int kChunks>
  [[gnu::always_inline]] static void exponentials(Exponents& t, int64_t e) {
    constexpr int kCount = kChunks * kParts;
    Floats d[kCount], result[kCount];
#pragma GCC unroll 4
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      Floats x[kParts];
      load_columns(t.logits + e + chunk * 16, t.num_experts - e - chunk * 16, x);
      for (int part = 0; part < kParts; ++part) d[chunk * kParts + part] = L::sub(t.largest, x[part]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      if (t.has_temperature) d[i] = L::div(d[i], t.temperature);
      d[i] = L::min(L::broadcast(kLargestExponent), d[i]);
    }
    exp_of_negative<L, kCount>(d, result);
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      const int part = i % kParts;
      t.s[part] = L::add(t.s[part], result[i]);
      const Floats product = L::mul(result[i], d[i]);
      t.q[part] = L::add(t.q[part], product);
      t.q2[part] = L::fma(product, d[i], t.q2[part]);
      L::store(t.exponentials + e + i * kLanes, result[i]);  // scratch is padded
    }
  }

  static void exponentials(Exponents& t, int lane, Sums& sums) {
    for (int part = 0; part < kParts; ++part) t.s[part] = t.q[part] = t.q2[part] = L::zero();
    int64_t e = 0;
    if constexpr (kParts <= 2) {
      constexpr int kChunks = 4 / kParts;
      for (; e + (kChunks - 1) * 16 < t.num_experts; e += kChunks * 16) exponentials<kChunks>(t, e);
      if (kChunks > 2 && e + 16 < t.num_experts) {
        exponentials<2>(t, e);
        e += 32;
      }
    }
    for (; e < t.num_experts; e += 16) exponentials<1>(t, e);
    for (int part = 0; part < kParts; ++part) {
      L::store(&sums.s[lane][part * kLanes], t.s[part]);
      L::store(&sums.q[lane][part * kLanes], t.q[part]);
      L::store(&sums.q2[lane][part * kLanes], t.q2[part]);
    }
  }

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

  // Experts whose probability does not reach this are not worth sorting. For the first K it is a bound, for a mass an
  // estimate, which `forward` checks. 0 where there is neither.
  static Floats worth_sorting(const GatingParams& p, const GatingChunk& chunk, Floats (&columns)[16], Floats largest,
                              Floats scale, Floats q, const Partial& q2) {
    const bool has_mass = p.is_top_p && p.top_p < 1.0;
    const bool few_ranks = p.max_experts <= 16;
    if (p.num_experts <= 16 || (!has_mass && !few_ranks)) return L::zero();
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
    return least;
  }

  static void write_zeros(float* row, int64_t num_experts) {
    for (int64_t e = 0; e < num_experts; ++e) row[e] = 0.0f;
  }

  // One token, in the pass that turns its exponentials into probabilities.
  struct Row {
    const float* exponentials;
    int64_t num_experts;
    float scale;
    float* values;     // candidates
    int32_t* numbers;  // their experts
    int64_t found;
    float mass;  // of the candidates
  };

  // Collects the experts that reach `least`; the first time round also writes the probabilities and their sums.
  template <bool kWrites>
  static void collect(Row& row, float least, bool stream, float* probabilities, float* column_sum) {
    int64_t found = 0;
    Floats mass[kParts];
    for (int part = 0; part < kParts; ++part) mass[part] = L::zero();
    for (int64_t e = 0; e < row.num_experts; e += 16) {
      const int64_t left = row.num_experts - e;
      Floats x[kParts];
      for (int part = 0; part < kParts; ++part) {
        const int64_t at = e + part * kLanes;
        x[part] = L::mul(L::load(row.exponentials + at), L::broadcast(row.scale));
        if constexpr (kWrites) L::store(column_sum + at, L::add(L::load(column_sum + at), x[part]));
        found += L::append_if_at_least(x[part], L::broadcast(least), static_cast<uint32_t>(at), row.values + found,
                                       row.numbers + found, mass[part]);
      }
      if constexpr (kWrites) {
        if (stream) {
          for (int part = 0; part < kParts; ++part) L::stream(probabilities + e + part * kLanes, x[part]);
        } else {
          store_columns(probabilities + e, left, x);
        }
      }
    }
    row.found = found;
    row.mass = L::sum_of_pairs(mass);
  }

  // Keys of every token's candidates; fewer are filled up with expert -1. Returns how many keys a token has.
  static int64_t make_keys(const Row (&rows)[kLanes], int count, double* keys) {
    int64_t most = 1;
    for (int lane = 0; lane < count; ++lane) most = rows[lane].found > most ? rows[lane].found : most;
    const int64_t size = (most + 15) / 16 * 16;
    for (int lane = 0; lane < count; ++lane) {
      for (int64_t i = rows[lane].found; i < size; i += kLanes) {
        L::store(rows[lane].values + i, L::zero());
        L::store_words(rows[lane].numbers + i, L::broadcast_word(~0u));
      }
    }
    for (int64_t i = 0; i < size; i += kLanes) {
      Floats value[kLanes];
      Words number[kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < kLanes; ++lane) {
        value[lane] = lane < count ? L::load(rows[lane].values + i) : L::zero();
        number[lane] = lane < count ? L::load_words(rows[lane].numbers + i) : L::broadcast_word(~0u);
      }
      L::transpose_floats(value);
      L::transpose(number);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) {
        typename L::Keys key[L::kKeyParts];
        L::make_keys(value[j], number[j], key);
        for (int part = 0; part < L::kKeyParts; ++part) {
          L::store_keys(keys + (i + j) * kLanes + part * L::kKeyLanes, key[part]);
        }
      }
    }
    return size;
  }

  static Taken<L> select(const GatingParams& p, const Group<L>& group, const Row (&rows)[kLanes],
                         const GroupScratch<L>& scratch) {
    const int64_t size = make_keys(rows, group.count, scratch.keys);
    sort_keys<L>(scratch.keys, size);
    return take_in_order<L>(p, group.routed, size, scratch);
  }

  static Group<L> forward(const GatingParams& p, const GatingChunk& chunk, int64_t token,
                          const GroupScratch<L>& scratch) {
    Group<L> group{token, clamped(chunk.end - token, kLanes), {}, 0};
    const int64_t num_experts = p.num_experts, stride = padded(num_experts);
    const Logit* logits = static_cast<const Logit*>(p.logits) + token * num_experts;
    const float enough = p.is_top_p && p.top_p < 1.0 ? static_cast<float>(p.top_p) : 0.0f;
    const Floats temperature = L::broadcast(static_cast<float>(p.temperature));

    alignas(64) Partial most;
    if (group.count < kLanes) __builtin_memset(most, 0, sizeof most);
    for (int lane = 0; lane < group.count; ++lane) largest_logits(logits + lane * num_experts, num_experts, most[lane]);
    Floats columns[16];
    by_column(most, columns);
    Floats largest = columns[0];
    for (int i = 1; i < 16; ++i) largest = L::max(largest, columns[i]);
    alignas(64) float of_lane[kLanes];
    L::store(of_lane, largest);

    alignas(64) Sums sums;
    if (group.count < kLanes) __builtin_memset(&sums, 0, sizeof sums);
    for (int lane = 0; lane < group.count; ++lane) {
      Exponents t{logits + lane * num_experts,
                  num_experts,
                  scratch.exponentials + lane * stride,
                  L::broadcast(of_lane[lane]),
                  temperature,
                  p.temperature != 1.0,
                  {},
                  {},
                  {}};
      exponentials(t, lane, sums);
    }
    const Floats q = sum_in_pairs(sums.q);
    const Floats scale = finish_softmax<L>(p, largest, sum_in_pairs(sums.s), q, group);
    alignas(64) float least_of_lane[kLanes];
    L::store(least_of_lane, worth_sorting(p, chunk, columns, largest, scale, q, sums.q2));
    L::store(of_lane, scale);

    Row rows[kLanes];
    for (int lane = 0; lane < group.count; ++lane) {
      float* probabilities = static_cast<float*>(p.probabilities) + (token + lane) * num_experts;
      rows[lane] = {scratch.exponentials + lane * stride, num_experts, of_lane[lane], scratch.values + lane * stride,
                    scratch.numbers + lane * stride,      0,           0.0f};
      if ((L::bits(group.routed) >> lane & 1) == 0) {
        write_zeros(probabilities, num_experts);
        continue;
      }
      float least = least_of_lane[lane];
      collect<true>(rows[lane], least, chunk.stream_probabilities, probabilities, scratch.column_sum);
      for (int tries = 0; rows[lane].mass < enough && rows[lane].found < p.max_experts; ++tries) {
        least = tries < 6 ? least * 0.75f : 0.0f;
        collect<false>(rows[lane], least, false, nullptr, nullptr);
      }
    }
    Taken<L> taken = select(p, group, rows, scratch);
    if (!taken.complete) {  // the mass was there, but added up in another order
      for (int lane = 0; lane < group.count; ++lane) collect<false>(rows[lane], 0.0f, false, nullptr, nullptr);
      taken = select(p, group, rows, scratch);
    }
    write_selection<L>(p, chunk, group, taken, scratch);
    return group;
  }
};

}  // namespace
}  // namespace dynamic_moe
