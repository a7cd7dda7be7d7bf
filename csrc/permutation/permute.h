// SPDX-License-Identifier: Apache-2.0
// Counting and placing of slots. Most slots of a dynamic rule are unused, so their rows are scanned a vector at a time
// and only live slots are visited one by one. Included only by files of one CPU level.
#pragma once

#include "permutation/cpu_levels.h"

namespace dynamic_moe {
namespace {

template <class L>
struct Permute {
  static int width(int64_t left) { return left < L::kWords ? static_cast<int>(left) : L::kWords; }

  static void count(const int32_t* ids, int64_t num_slots, int32_t num_experts, int32_t* counts) {
    for (int64_t slot = 0; slot < num_slots; slot += L::kWords) {
      for (uint32_t live = L::live_bits(ids + slot, width(num_slots - slot), num_experts); live != 0;
           live &= live - 1) {
        ++counts[ids[slot + __builtin_ctz(live)]];
      }
    }
  }

  static void place(const PermuteParams& p, int64_t token, int64_t slot, int32_t* next) {
    const int32_t row = next[p.expert_ids[slot]]++;
    p.row_token[row] = static_cast<int32_t>(token);
    p.row_slot[row] = static_cast<int32_t>(slot);
    p.slot_row[slot] = row;
  }

  static void permute(const PermuteParams& p, int64_t begin, int64_t end, int32_t* next) {
    const int64_t k = p.max_experts;
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t slot = token * k; slot < (token + 1) * k; slot += L::kWords) {
        const int count = width((token + 1) * k - slot);
        uint32_t live = L::live_bits(p.expert_ids + slot, count, p.num_experts);
        L::store_unused(p.slot_row + slot, count);
        for (; live != 0; live &= live - 1) place(p, token, slot + __builtin_ctz(live), next);
      }
    }
  }
};

}  // namespace
}  // namespace dynamic_moe
