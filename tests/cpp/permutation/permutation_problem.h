// SPDX-License-Identifier: Apache-2.0
// Random slots, and the permutation that they should give.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

namespace dynamic_moe::testing {

struct Permuted {
  std::vector<int32_t> tokens_per_expert, expert_offsets, row_token, row_slot, slot_row;
  bool operator==(const Permuted&) const = default;
};

inline Permuted stable_permutation(const std::vector<int32_t>& ids, int32_t max_experts, int32_t num_experts) {
  Permuted expected;
  expected.tokens_per_expert.assign(static_cast<size_t>(num_experts), 0);
  expected.expert_offsets.assign(1, 0);
  expected.slot_row.assign(ids.size(), -1);
  for (size_t slot = 0; slot < ids.size(); ++slot) {
    if (ids[slot] < 0 || ids[slot] >= num_experts) continue;
    ++expected.tokens_per_expert[static_cast<size_t>(ids[slot])];
    expected.row_slot.push_back(static_cast<int32_t>(slot));
  }
  std::stable_sort(expected.row_slot.begin(), expected.row_slot.end(),
                   [&](int32_t a, int32_t b) { return ids[static_cast<size_t>(a)] < ids[static_cast<size_t>(b)]; });
  for (const int32_t slot : expected.row_slot) {
    expected.slot_row[static_cast<size_t>(slot)] = static_cast<int32_t>(expected.row_token.size());
    expected.row_token.push_back(slot / max_experts);
  }
  for (const int32_t count : expected.tokens_per_expert) {
    expected.expert_offsets.push_back(expected.expert_offsets.back() + count);
  }
  return expected;
}

// Unused slots anywhere, marked by E, by -1 and by other numbers out of range.
inline std::vector<int32_t> random_ids(int64_t num_slots, int32_t num_experts, double used, unsigned seed) {
  std::mt19937 random(seed);
  std::bernoulli_distribution is_used(used);
  const int32_t unused[] = {num_experts, -1, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()};
  std::vector<int32_t> ids(static_cast<size_t>(num_slots));
  for (int32_t& id : ids) {
    id = is_used(random) ? static_cast<int32_t>(random() % static_cast<unsigned>(num_experts)) : unused[random() % 4];
  }
  return ids;
}

}  // namespace dynamic_moe::testing
