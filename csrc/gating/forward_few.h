// SPDX-License-Identifier: Apache-2.0
// Gating for few experts: a token in each lane, an expert in each register, so that nothing is summed across lanes.
// Included only by files of one CPU level.
#pragma once

#include "gating/select.h"

namespace dynamic_moe {
namespace {

template <class L, int kExperts, class Logit>
struct ForwardFew {
  using Floats = typename L::Floats;
  static constexpr int kColumns = (kExperts + L::kLanes - 1) / L::kLanes;  // vectors in a row of the [T, E] buffers
  static constexpr int kColumn = kExperts < L::kLanes ? kExperts : L::kLanes;
  // Vectors of a row are not written one after the other: only whole lines are worth writing around the cache.
  static constexpr bool kWholeLines = L::kLanes == 16;

  struct Sums {
    Floats s, q;
  };

  // kWhole: no lane and no expert is missing.
  template <bool kWhole>
  [[gnu::always_inline]] static void load(const GatingParams& p, const Group<L>& group, Floats (&x)[kExperts]) {
    const Floats fill = L::broadcast(-__builtin_inff());
    const int64_t num_experts = kWhole ? kExperts : p.num_experts;
    const Logit* first = static_cast<const Logit*>(p.logits) + group.first_token * num_experts;
#pragma GCC unroll 4
    for (int column = 0; column < kColumns; ++column) {
      const int width = clamped(num_experts - column * L::kLanes, L::kLanes);
      Floats rows[L::kLanes];
#pragma GCC unroll 16
      for (int lane = 0; lane < L::kLanes; ++lane) {
        const Logit* row = first + lane * num_experts + column * L::kLanes;
        if (kWhole) {
          rows[lane] = L::load(row);
        } else {
          rows[lane] = lane >= group.count ? fill : width == L::kLanes ? L::load(row) : L::load_or(row, width, fill);
        }
      }
      L::transpose_floats(rows);
#pragma GCC unroll 16
      for (int e = 0; e < kColumn; ++e) x[column * L::kLanes + e] = rows[e];
    }
  }

  // Replaces logits e, e + 1, e + 2, e + 3 by exponentials. For e < 16 starts four columns of sums, else adds to them.
  template <int e>
  [[gnu::always_inline]] static void exponentials(Floats (&x)[kExperts], Floats largest, Floats temperature,
                                                  bool has_temperature, Floats (&s)[4], Floats (&q)[4]) {
    Floats d[4], result[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) d[i] = L::sub(largest, x[e + i]);
    if (has_temperature) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) d[i] = L::div(d[i], temperature);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) d[i] = L::min(L::broadcast(kLargestExponent), d[i]);
    exp_of_negative<L, 4>(d, result);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[e + i] = result[i];
      s[i] = e < 16 ? result[i] : L::add(s[i], result[i]);
      const Floats product = L::mul(result[i], d[i]);
      q[i] = e < 16 ? product : L::add(q[i], product);
    }
  }

  // The sums over columns kFirst to kFirst + kCount - 1 (modulo 16), in pairs.
  template <int kFirst, int kCount>
  [[gnu::always_inline]] static Sums sum_exponentials(Floats (&x)[kExperts], Floats largest, Floats temperature,
                                                      bool has_temperature) {
    if constexpr (kCount > 4) {
      const Sums a = sum_exponentials<kFirst, kCount / 2>(x, largest, temperature, has_temperature);
      const Sums b = sum_exponentials<kFirst + kCount / 2, kCount / 2>(x, largest, temperature, has_temperature);
      return {L::add(a.s, b.s), L::add(a.q, b.q)};
    } else {
      Floats s[4], q[4];
      exponentials<kFirst>(x, largest, temperature, has_temperature, s, q);
      if constexpr (kFirst + 16 < kExperts) {
        exponentials<kFirst + 16>(x, largest, temperature, has_temperature, s, q);
      }
      return {L::add(L::add(s[0], s[1]), L::add(s[2], s[3])), L::add(L::add(q[0], q[1]), L::add(q[2], q[3]))};
    }
  }

  template <bool kWhole>
  [[gnu::always_inline]] static void write_probabilities(const GatingParams& p, const Group<L>& group,
                                                         const Floats (&x)[kExperts], bool stream, float* column_sum) {
    const int64_t num_experts = kWhole ? kExperts : p.num_experts;
    float* first = static_cast<float*>(p.probabilities) + group.first_token * num_experts;
#pragma GCC unroll 4
    for (int column = 0; column < kColumns; ++column) {
      Floats rows[L::kLanes];
#pragma GCC unroll 16
      for (int e = 0; e < L::kLanes; ++e) rows[e] = e < kColumn ? x[column * L::kLanes + e] : L::zero();
      L::transpose_floats(rows);
      const int width = clamped(num_experts - column * L::kLanes, L::kLanes);
      Floats sum = L::load(column_sum + column * L::kLanes);
#pragma GCC unroll 16
      for (int lane = 0; lane < L::kLanes; ++lane) {
        if (!kWhole && lane >= group.count) break;
        sum = L::add(sum, rows[lane]);
        float* row = first + lane * num_experts + column * L::kLanes;
        if (stream && kWholeLines) {
          L::stream(row, rows[lane]);
        } else if (kWhole || width == L::kLanes) {
          L::store(row, rows[lane]);
        } else {
          L::store_first(row, rows[lane], width);
        }
      }
      L::store(column_sum + column * L::kLanes, sum);
    }
  }

  // Few tokens need more than four experts, and the first four are found in half the comparisons of a sort.
  static Taken<L> select(const GatingParams& p, const Group<L>& group, GroupScratch<L>& scratch) {
    const bool may_stop = p.max_experts <= 4 || (p.is_top_p && p.top_p < 1.0);
    if (may_stop && scratch.four_are_enough) {
      sort_block<L, kExperts, 4>(scratch.keys, scratch.first_keys);
      const Taken<L> taken = take_in_order<L>(p, group.routed, scratch.first_keys, 4, scratch);
      if (taken.complete) return taken;
    }
    sort_block<L, kExperts>(scratch.keys, scratch.keys);
    const Taken<L> taken = take_in_order<L>(p, group.routed, scratch.keys, kExperts, scratch);
    scratch.four_are_enough = taken.most <= 4;
    return taken;
  }

  static Group<L> forward(const GatingParams& p, const GatingChunk& chunk, int64_t token, GroupScratch<L>& scratch) {
    const bool whole = kExperts % L::kLanes == 0 && p.num_experts == kExperts && chunk.end - token >= L::kLanes;
    return whole ? forward<true>(p, chunk, token, scratch) : forward<false>(p, chunk, token, scratch);
  }

 private:
  template <bool kWhole>
  static Group<L> forward(const GatingParams& p, const GatingChunk& chunk, int64_t token, GroupScratch<L>& scratch) {
    Group<L> group{token, kWhole ? L::kLanes : clamped(chunk.end - token, L::kLanes), {}, 0};
    Floats x[kExperts];
    load<kWhole>(p, group, x);
    Floats largest = x[0];
#pragma GCC unroll 32
    for (int e = 1; e < kExperts; ++e) largest = L::max(largest, x[e]);
    const Sums sums = sum_exponentials<0, (kExperts < 16 ? kExperts : 16)>(
        x, largest, L::broadcast(temperature_of(p.temperature)), p.temperature != 1.0);
    const Floats scale = finish_softmax<L>(p, largest, sums.s, sums.q, group);
    if (L::bits(group.routed) != L::bits(L::first_lanes(L::kLanes))) {
#pragma GCC unroll 32
      for (int e = 0; e < kExperts; ++e) x[e] = L::select(group.routed, x[e], L::zero());
    }
#pragma GCC unroll 32
    for (int e = 0; e < kExperts; ++e) {
      x[e] = L::mul(x[e], scale);
      typename L::Keys keys[L::kKeyParts];
      L::make_keys(x[e], L::broadcast_word(static_cast<uint32_t>(e)), keys);
      for (int part = 0; part < L::kKeyParts; ++part) {
        L::store_keys(scratch.keys + e * L::kLanes + part * L::kKeyLanes, keys[part]);
      }
    }
    write_probabilities<kWhole>(p, group, x, chunk.stream_probabilities, scratch.column_sum);
    write_selection<L, false>(p, chunk, group, select(p, group, scratch), scratch);
    return group;
  }
};

}  // namespace
}  // namespace dynamic_moe
