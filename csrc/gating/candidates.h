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
      const int width = clamped(left - part * kLanes, kLanes);
      width == kLanes ? L::store(row + part * kLanes, x[part]) : L::store_first(row + part * kLanes, x[part], width);
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

  // Appends the marked ones of the experts `first`, `first` + 1, ..
  static void append(Row& row, int64_t first, uint64_t marked) {
    for (; marked != 0; marked &= marked - 1) {
      const int64_t e = first + __builtin_ctzll(marked);
      const float value = row.exponentials[e] * row.scale;
      row.values[row.found] = value;
      row.numbers[row.found++] = static_cast<int32_t>(e);
      row.mass += value;
    }
  }

  // Collects the experts that reach `least`; the first time round also writes the probabilities and their sums. What
  // fills the last 16 up has probability 0 and higher numbers than any expert, and comes last in every order.
  template <bool kWrites, bool kStream>
  static void collect(Row& row, float least, float* probabilities, float* column_sum) {
    constexpr int kMarks = 64;
    const Floats scale = L::broadcast(row.scale), bound = L::broadcast(least);
    row.found = 0;
    row.mass = 0.0f;
    Floats mass[kParts];
    for (int part = 0; part < kParts; ++part) mass[part] = L::zero();
    for (int64_t first = 0; first < row.num_experts; first += kMarks) {
      const int width = clamped(row.num_experts - first, kMarks);
      uint64_t marked = 0;
      for (int i = 0; i < width; i += 16) {
        const int64_t e = first + i;
        Floats x[kParts];
        for (int part = 0; part < kParts; ++part) {
          const int64_t at = e + part * kLanes;
          x[part] = L::mul(L::load(row.exponentials + at), scale);
          if constexpr (kWrites) L::store(column_sum + at, L::add(L::load(column_sum + at), x[part]));
          if constexpr (L::kCompresses) {
            row.found += L::append_if_at_least(x[part], bound, static_cast<uint32_t>(at), row.values + row.found,
                                               row.numbers + row.found, mass[part]);
          } else {
            marked |= uint64_t{L::bits(L::at_least(x[part], bound))} << (i + part * kLanes);
          }
        }
        if constexpr (kStream) {
          for (int part = 0; part < kParts; ++part) L::stream(probabilities + e + part * kLanes, x[part]);
        } else if constexpr (kWrites) {
          store_columns(probabilities + e, width - i, x);
        }
      }
      if constexpr (!L::kCompresses) append(row, first, marked);
    }
    if constexpr (L::kCompresses) row.mass = L::sum_of_pairs(mass);
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
    return take_in_order<L>(p, group.routed, scratch.keys, size, scratch);
  }
};

}  // namespace
}  // namespace dynamic_moe
