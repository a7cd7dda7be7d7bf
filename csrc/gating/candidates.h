// SPDX-License-Identifier: Apache-2.0
// Of many experts, those worth sorting: so that a sort is about as long as the selection and not as the row.
// Included only by files of one CPU level.
#pragma once

#include "gating/select.h"

namespace dynamic_moe {
namespace {

template <class L>
struct Candidates {
  using Floats = typename L::Floats;
  using Words = typename L::Words;
  static constexpr int kLanes = L::kLanes;
  static constexpr int kParts = 16 / kLanes;  // vectors that hold 16 experts

  static void store_columns(float* row, int64_t left, const Floats (&x)[kParts]) {
    for (int part = 0; part < kParts; ++part) {
      if (left >= 16) {
        L::store(row + part * kLanes, x[part]);
      } else {
        L::store_first(row + part * kLanes, x[part], clamped(left - part * kLanes, kLanes));
      }
    }
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

  // Sorts and takes. Not complete where a token needs more experts than were collected.
  static Taken<L> select(const GatingParams& p, const Group<L>& group, const Row (&rows)[kLanes],
                         const GroupScratch<L>& scratch) {
    const int64_t size = make_keys(rows, group.count, scratch.keys);
    sort_keys<L>(scratch.keys, size);
    return take_in_order<L>(p, group.routed, size, scratch);
  }
};

}  // namespace
}  // namespace dynamic_moe
