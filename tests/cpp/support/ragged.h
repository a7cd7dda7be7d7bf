// SPDX-License-Identifier: Apache-2.0
// Random ragged problems. Everything follows from a seed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "common/workspace.h"
#include "grouped_matmul/grouped_matmul.h"
#include "support/fenced.h"
#include "support/storage.h"

namespace dynamic_moe::testing {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {  // splitmix64
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t count) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(count)); }
  // Uniform, mean 0, variance scale^2.
  double value(double scale = 1) {
    return scale * std::sqrt(12.0) * (static_cast<double>(bits() >> 11) * 0x1p-53 - 0.5);
  }

 private:
  uint64_t state_;
};

template <class T>
Fenced<T> random_values(int64_t count, double scale, Random& random, Placement placement) {
  Fenced<T> values(count, placement);
  for (int64_t i = 0; i < count; ++i) values[i] = stored<T>(random.value(scale));
  return values;
}

// How many rows each expert has, how many tokens there are, and whether rows are tokens or are gathered from them.
struct Load {
  const char* name;
  std::vector<int32_t> rows;  // [E]
  int32_t num_tokens;         // ignored without gather: R then
  bool gather = true;
};

// A load with its index buffers. Tokens are drawn at random, so that some come twice in one expert, some in several
// experts and some in none; the slots of a token are numbered in the order of its rows, and each token has at least one
// slot that no row uses.
struct Ragged {
  Load load;
  int64_t num_rows, num_tokens, max_experts;
  Fenced<int32_t> expert_offsets, row_token, row_slot;

  Ragged(const Load& wanted, Random& random)
      : load(wanted),
        num_rows(std::accumulate(wanted.rows.begin(), wanted.rows.end(), int64_t{0})),
        num_tokens(wanted.gather ? wanted.num_tokens : num_rows),
        max_experts(1),
        expert_offsets(num_experts() + 1),
        row_token(num_rows),
        row_slot(num_rows) {
    expert_offsets[0] = 0;
    for (int64_t e = 0; e < num_experts(); ++e) {
      expert_offsets[e + 1] = expert_offsets[e] + load.rows[static_cast<size_t>(e)];
    }
    std::vector<int32_t> used(static_cast<size_t>(num_tokens));
    std::vector<int32_t> slot(static_cast<size_t>(num_rows));
    for (int64_t row = 0; row < num_rows; ++row) {
      row_token[row] = static_cast<int32_t>(load.gather ? random.below(num_tokens) : row);
      slot[static_cast<size_t>(row)] = used[static_cast<size_t>(row_token[row])]++;
    }
    for (const int32_t count : used) max_experts = std::max<int64_t>(max_experts, count + 1);
    for (int64_t row = 0; row < num_rows; ++row) {
      row_slot[row] = static_cast<int32_t>(row_token[row] * max_experts + slot[static_cast<size_t>(row)]);
    }
    for (Fenced<int32_t>* buffer : {&expert_offsets, &row_token, &row_slot}) buffer->freeze();
  }

  int64_t num_experts() const { return static_cast<int64_t>(load.rows.size()); }
  int64_t num_slots() const { return num_tokens * max_experts; }
  int64_t token(int64_t row) const { return row_token[row]; }
  RowGroups groups() const {
    return {expert_offsets.data(), load.gather ? row_token.data() : nullptr, num_rows, num_tokens,
            static_cast<int32_t>(num_experts())};
  }
  // Calls body(row, expert) for each row in order.
  template <class Body>
  void for_each_row(const Body& body) const {
    for (int64_t e = 0; e < num_experts(); ++e) {
      for (int64_t row = expert_offsets[e]; row < expert_offsets[e + 1]; ++row) body(row, e);
    }
  }
};

// Fills the calling thread's scratch memory with NaN: no result may depend on what an earlier call left there.
inline void spoil_scratch() {
  constexpr int64_t kBytes = int64_t{1} << 20;
  for (int use = 0; use < static_cast<int>(Scratch::kCount); ++use) {
    std::memset(scratch_bytes(static_cast<Scratch>(use), kBytes), 0xff, kBytes);
  }
}

}  // namespace dynamic_moe::testing
