// SPDX-License-Identifier: Apache-2.0
// The oracle is a stable sort of the live slots by expert.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "permutation/permutation.h"
#include "permutation_problem.h"
#include "support/fenced.h"

namespace dynamic_moe::testing {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;

std::vector<int32_t> copied(const Fenced<int32_t>& buffer) { return {buffer.span().begin(), buffer.span().end()}; }

// Runs both steps with every buffer against a page that may not be touched.
Permuted permute(const std::vector<int32_t>& ids, int32_t max_experts, int32_t num_experts) {
  const int64_t num_slots = static_cast<int64_t>(ids.size());
  Fenced<int32_t> expert_ids(num_slots), tokens_per_expert(num_experts), expert_offsets(num_experts + 1);
  std::copy(ids.begin(), ids.end(), expert_ids.data());
  expert_ids.freeze();
  count_rows_cpu(expert_ids.data(), num_slots, num_experts, tokens_per_expert.data(), expert_offsets.data());
  const int64_t num_rows = expert_offsets[num_experts];
  Fenced<int32_t> row_token(num_rows), row_slot(num_rows), slot_row(num_slots);
  permute_cpu({.expert_ids = expert_ids.data(),
               .expert_offsets = expert_offsets.data(),
               .row_token = row_token.data(),
               .row_slot = row_slot.data(),
               .slot_row = slot_row.data(),
               .num_tokens = num_slots / max_experts,
               .max_experts = max_experts,
               .num_experts = num_experts});
  for (const Fenced<int32_t>* buffer : {&tokens_per_expert, &expert_offsets, &row_token, &row_slot, &slot_row}) {
    EXPECT_TRUE(buffer->surroundings_intact());
  }
  return {copied(tokens_per_expert), copied(expert_offsets), copied(row_token), copied(row_slot), copied(slot_row)};
}

TEST(Permute, SortsByExpertThenByToken) {
  //                               token 0  token 1  token 2  token 3
  const std::vector<int32_t> ids = {2, 0, 2, 3, 3, 3, 0, 2};
  const Permuted p = permute(ids, 2, 3);
  EXPECT_THAT(p.tokens_per_expert, ElementsAre(2, 0, 3));
  EXPECT_THAT(p.expert_offsets, ElementsAre(0, 2, 2, 5));
  EXPECT_THAT(p.row_token, ElementsAre(0, 3, 0, 1, 3));
  EXPECT_THAT(p.row_slot, ElementsAre(1, 6, 0, 2, 7));
  EXPECT_THAT(p.slot_row, ElementsAre(2, 0, 3, -1, -1, -1, 1, 4));
}

TEST(Permute, IsTheStableSortForAnyShape) {
  for (const int32_t num_experts : {1, 2, 3, 16, 17, 64, 257, 1024}) {
    for (const int32_t max_experts : {1, 2, 3, 7, 8, 9, 16, 17, 40}) {
      for (const double used : {0.0, 0.1, 0.7, 1.0}) {
        SCOPED_TRACE(::testing::Message() << "E " << num_experts << " K " << max_experts << " used " << used);
        const auto ids = random_ids(53 * max_experts, num_experts, used, 1);
        EXPECT_EQ(permute(ids, max_experts, num_experts), stable_permutation(ids, max_experts, num_experts));
      }
    }
  }
}

TEST(Permute, NoTokensGiveNoRows) {
  const Permuted p = permute({}, 4, 3);
  EXPECT_THAT(p.tokens_per_expert, Each(0));
  EXPECT_THAT(p.expert_offsets, ElementsAre(0, 0, 0, 0));
  EXPECT_TRUE(p.row_token.empty());
}

// Enough slots that several blocks are counted and placed side by side.
TEST(Permute, IsTheSameOnAnyNumberOfThreadsAndEveryCpuLevel) {
  for (const int32_t max_experts : {2, 5, 16}) {
    const auto ids = random_ids(20000 * max_experts, 24, 0.4, 2);
    const Permuted expected = stable_permutation(ids, max_experts, 24);
    for (const Isa isa : supported_isas()) {
      set_isa(isa);
      for (const int threads : {1, 2, 3, 7}) {
        use_standard_threads(threads);
        EXPECT_TRUE(permute(ids, max_experts, 24) == expected) << isa_name(isa) << " threads " << threads;
      }
    }
    use_standard_threads(1);
  }
  reset_isa();
}

TEST(Permute, OneExpertMayTakeEverything) {
  const std::vector<int32_t> ids(100000, 3);
  use_standard_threads(3);
  EXPECT_TRUE(permute(ids, 1, 5) == stable_permutation(ids, 1, 5));
  use_standard_threads(1);
}

}  // namespace
}  // namespace dynamic_moe::testing
