// SPDX-License-Identifier: Apache-2.0
// Gating for any number of experts: a row at a time, 16 experts side by side, in three passes over a row that stays in
// the first-level cache: the largest logit; exponentials and their sums; probabilities, among which the third picks the
// candidates for selection. Included only by files of one CPU level.
#pragma once

#include "gating/candidates.h"
#include "gating/row_softmax.h"

namespace dynamic_moe {
namespace {

template <class L, class Logit>
struct ForwardMany {
  using Floats = typename L::Floats;
  using Softmax = RowSoftmax<L, Logit>;
  using Rows = typename Candidates<L>::Row[L::kLanes];
  static constexpr int kLanes = L::kLanes;
  static constexpr bool kWritesLate = kLanes == 16;  // one store is a whole line; with halves it takes longer

  // What the passes over the logits leave, a token in each lane.
  struct Reduced {
    Floats columns[16];  // largest logit of experts i, i + 16, i + 32, ..
    Floats largest, s, q, q2;
  };

  static Reduced reduce(const GatingParams& p, const Group<L>& group, GroupScratch<L>& scratch) {
    const int64_t num_experts = p.num_experts, stride = padded(num_experts);
    const Logit* logits = static_cast<const Logit*>(p.logits) + group.first_token * num_experts;
    Reduced reduced;
    alignas(64) typename Softmax::Partial most;
    alignas(64) typename Softmax::Sums sums;
    if (group.count < kLanes) {  // the last group
      __builtin_memset(&most, 0, sizeof most);
      __builtin_memset(&sums, 0, sizeof sums);
    }
    for (int lane = 0; lane < group.count; ++lane) {
      Softmax::largest_logits(logits + lane * num_experts, num_experts, most[lane]);
    }
    Softmax::by_column(most, reduced.columns);
    reduced.largest = reduced.columns[0];
    for (int i = 1; i < 16; ++i) reduced.largest = L::max(reduced.largest, reduced.columns[i]);
    alignas(64) float largest[kLanes];
    L::store(largest, reduced.largest);
    const Floats temperature = L::broadcast(temperature_of(p.temperature));
    const bool has_temperature = p.temperature != 1.0;
    for (int lane = 0; lane < group.count; ++lane) {
      Softmax::exponentials(logits + lane * num_experts, num_experts, L::broadcast(largest[lane]), temperature,
                            has_temperature, scratch.exponentials + lane * stride, lane, sums);
      // The longest piece of arithmetic: memory takes meanwhile what would otherwise have to be waited for.
      if constexpr (kWritesLate) write_late_row<L>(p, scratch.late);
    }
    if constexpr (kWritesLate) write_late_rows<L>(p, scratch.late);  // the group before may have had more tokens
    reduced.s = Softmax::sum_in_pairs(sums.s);
    reduced.q = Softmax::sum_in_pairs(sums.q);
    reduced.q2 = Softmax::sum_in_pairs(sums.q2);
    return reduced;
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
  // estimate, which `collect` checks. 0 where there is neither.
  static Floats worth_sorting(const GatingParams& p, const GatingChunk& chunk, Reduced& reduced, Floats scale) {
    const bool has_mass = p.is_top_p && p.top_p < 1.0;
    const bool few_ranks = p.max_experts <= 16;
    if (p.num_experts <= 16 || (!has_mass && !few_ranks)) return L::zero();
    Floats least = L::zero();
    if (few_ranks) {
      const Floats d = Softmax::distance(reduced.largest, kth_largest_of_columns(reduced.columns, p.max_experts),
                                         L::broadcast(temperature_of(p.temperature)), p.temperature != 1.0);
      least = L::mul(exp_of_negative<L>(d), scale);
    }
    if (has_mass) {
      // As if log P, weighted by P, were normal: its mean is that of -d, and `spread` deviations below it lies p.
      const Floats mean = L::mul(reduced.q, scale);
      const Floats variance = L::sub(L::mul(reduced.q2, scale), L::mul(mean, mean));
      const Floats deviation = L::square_root(L::max(variance, L::zero()));
      Floats d = L::fma(deviation, L::broadcast(chunk.spread), L::add(mean, L::broadcast(0.05f)));
      d = L::min(L::broadcast(kLargestExponent), L::max(d, L::zero()));
      least = L::max(least, L::mul(exp_of_negative<L>(d), scale));
    }
    return least;
  }

  // A row of the next group, into the second-level cache, while the memory has little else to do.
  static void prefetch_logits(const GatingParams& p, const GatingChunk& chunk, int64_t token) {
    if (token >= chunk.end) return;
    const int64_t row_bytes = p.num_experts * static_cast<int64_t>(sizeof(Logit));
    const char* row = static_cast<const char*>(p.logits) + token * row_bytes;
    for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
  }

  // Writes probabilities and collects candidates.
  static void collect(const GatingParams& p, const GatingChunk& chunk, const Group<L>& group, Floats scale,
                      Floats least, const GroupScratch<L>& scratch, Rows& rows) {
    const int64_t num_experts = p.num_experts, stride = padded(num_experts);
    const float enough = p.is_top_p && p.top_p < 1.0 ? static_cast<float>(p.top_p) : 0.0f;
    alignas(64) float scales[kLanes], leasts[kLanes];
    L::store(scales, scale);
    L::store(leasts, least);
    for (int lane = 0; lane < group.count; ++lane) {
      float* probabilities = static_cast<float*>(p.probabilities) + (group.first_token + lane) * num_experts;
      rows[lane] = {.exponentials = scratch.exponentials + lane * stride,
                    .num_experts = num_experts,
                    .scale = scales[lane],
                    .values = scratch.values + lane * stride,
                    .numbers = scratch.numbers + lane * stride,
                    .found = 0,
                    .mass = 0.0f};
      if ((L::bits(group.routed) >> lane & 1) == 0) {
        for (int64_t e = 0; e < num_experts; ++e) probabilities[e] = 0.0f;
        continue;
      }
      prefetch_logits(p, chunk, group.first_token + kLanes + lane);
      if (chunk.stream_probabilities) {
        Candidates<L>::template collect<true, true>(rows[lane], leasts[lane], probabilities, scratch.column_sum);
      } else {
        Candidates<L>::template collect<true, false>(rows[lane], leasts[lane], probabilities, scratch.column_sum);
      }
      for (int tries = 0; rows[lane].mass < enough && rows[lane].found < p.max_experts; ++tries) {
        leasts[lane] = tries < 6 ? leasts[lane] * 0.75f : 0.0f;
        Candidates<L>::template collect<false, false>(rows[lane], leasts[lane], nullptr, nullptr);
      }
    }
  }

  static Group<L> forward(const GatingParams& p, const GatingChunk& chunk, int64_t token, GroupScratch<L>& scratch) {
    Group<L> group{token, clamped(chunk.end - token, kLanes), {}, 0};
    Reduced reduced = reduce(p, group, scratch);
    const Floats scale = finish_softmax<L>(p, reduced.largest, reduced.s, reduced.q, group);
    Rows rows;
    collect(p, chunk, group, scale, worth_sorting(p, chunk, reduced, scale), scratch, rows);
    Taken<L> taken = Candidates<L>::select(p, group, rows, scratch);
    if (!taken.complete) {  // the mass was there, but added up in another order
      for (int lane = 0; lane < group.count; ++lane) {
        Candidates<L>::template collect<false, false>(rows[lane], 0.0f, nullptr, nullptr);
      }
      taken = Candidates<L>::select(p, group, rows, scratch);
    }
    write_selection<L, kWritesLate>(p, chunk, group, taken, scratch);
    return group;
  }
};

}  // namespace
}  // namespace dynamic_moe
