// SPDX-License-Identifier: Apache-2.0
// The oracle is a stable sort of the live slots by expert.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <vector>

#include "cuda/support/device_buffer.h"
#include "permutation/permutation.h"
#include "permutation/permutation_problem.h"
#include "permutation/permute_plan.h"

namespace dynamic_moe::testing {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

std::vector<int32_t> first(const std::vector<int32_t>& values, int64_t count) {
  return {values.begin(), values.begin() + count};
}

constexpr int64_t kExact = -1, kEverySlot = int64_t{1} << 40;

// Both steps into row buffers of R rows, or of a row capacity, at most one for each slot; returns the live rows.
Permuted permute(const std::vector<int32_t>& ids, int32_t max_experts, int32_t num_experts, int64_t row_capacity,
                 int64_t offset = 0) {
  const auto num_slots = static_cast<int64_t>(ids.size());
  const int64_t capacity = row_capacity == kExact ? num_slots : std::min(row_capacity, num_slots);
  const DeviceBuffer<int32_t> expert_ids(ids, offset);
  DeviceBuffer<int32_t> counts(num_experts, offset), offsets(num_experts + 1, offset), slot_row(num_slots, offset);
  DeviceWorkspace workspace(permute_cuda_workspace(num_slots, num_experts));
  count_rows_cuda(expert_ids.data(), num_slots, num_experts, capacity, counts.data(), offsets.data(), workspace.get(),
                  Stream{});
  const int64_t live_rows = offsets.download().back();
  const int64_t num_rows = row_capacity == kExact ? live_rows : capacity;
  DeviceBuffer<int32_t> row_token(num_rows, offset), row_slot(num_rows, offset);
  permute_cuda({.expert_ids = expert_ids.data(),
                .expert_offsets = offsets.data(),
                .row_token = row_token.data(),
                .row_slot = row_slot.data(),
                .slot_row = slot_row.data(),
                .num_tokens = num_slots / max_experts,
                .max_experts = max_experts,
                .num_experts = num_experts},
               num_rows, workspace.get(), Stream{});
  const std::vector<int32_t> tokens = row_token.download(), slots = row_slot.download();
  for (int64_t row = live_rows; row < num_rows; ++row) {
    EXPECT_EQ(tokens[static_cast<size_t>(row)], 0);
    EXPECT_EQ(slots[static_cast<size_t>(row)], 0);
  }
  return {counts.download(), offsets.download(), first(tokens, live_rows), first(slots, live_rows),
          slot_row.download()};
}

TEST(CudaPermute, SortsByExpertThenByToken) {
  //                               token 0  token 1  token 2  token 3
  const std::vector<int32_t> ids = {2, 0, 2, 3, 3, 3, 0, 2};
  const Permuted p = permute(ids, 2, 3, kEverySlot);
  EXPECT_THAT(p.tokens_per_expert, ElementsAre(2, 0, 3));
  EXPECT_THAT(p.expert_offsets, ElementsAre(0, 2, 2, 5));
  EXPECT_THAT(p.row_token, ElementsAre(0, 3, 0, 1, 3));
  EXPECT_THAT(p.row_slot, ElementsAre(1, 6, 0, 2, 7));
  EXPECT_THAT(p.slot_row, ElementsAre(2, 0, 3, -1, -1, -1, 1, 4));
}

TEST(CudaPermute, IsTheStableSortForAnyShape) {
  constexpr int32_t kExperts[] = {1, 2, 3, 8, 16, 31, 33, 64, 100, 128, 256, 1000, 1024};
  constexpr int32_t kMaxExperts[] = {1, 2, 7, 8, 16, 40};
  constexpr double kUsed[] = {0.0, 0.1, 0.7, 1.0};
  for (size_t i = 0; i < std::size(kExperts); ++i) {
    for (size_t j = 0; j < std::size(kMaxExperts); ++j) {
      for (size_t k = 0; k < std::size(kUsed); ++k) {
#ifdef __SANITIZE_THREAD__
        if (k != (i + j) % std::size(kUsed))
          continue;  // every pair of two of the three: all take more than six minutes
#endif
        const int32_t num_experts = kExperts[i], max_experts = kMaxExperts[j];
        const double used = kUsed[k];
        SCOPED_TRACE(::testing::Message() << "E " << num_experts << " K " << max_experts << " used " << used);
        const auto ids = random_ids(53 * max_experts, num_experts, used, 1);
        EXPECT_EQ(permute(ids, max_experts, num_experts, used < 0.5 ? kEverySlot : kExact),
                  stable_permutation(ids, max_experts, num_experts));
      }
    }
  }
}

TEST(CudaPermute, IsTheStableSortForAnyNumberOfTokens) {
  for (int64_t num_tokens = 1; num_tokens <= 300; num_tokens += num_tokens < 40 ? 1 : 37) {
    const auto ids = random_ids(num_tokens * 3, 5, 0.6, static_cast<unsigned>(num_tokens));
    EXPECT_EQ(permute(ids, 3, 5, kEverySlot), stable_permutation(ids, 3, 5)) << num_tokens << " tokens";
  }
}

// Several blocks of slots, and more than one for each warp of the scan.
TEST(CudaPermute, BlocksOfSlotsFollowEachOther) {
  for (const int64_t num_slots : {1024, 1025, 5000, 40000}) {
    for (const int32_t num_experts : {7, 70}) {
      SCOPED_TRACE(::testing::Message() << "slots " << num_slots << " E " << num_experts);
      const auto ids = random_ids(num_slots, num_experts, 0.4, 2);
      EXPECT_TRUE(permute(ids, 1, num_experts, kEverySlot) == stable_permutation(ids, 1, num_experts));
    }
  }
}

TEST(CudaPermute, FewerWarpsShareABlockWhereExpertsAreMany) {
  for (const int32_t num_experts : {1025, 2048, 2049, 4096}) {
    const auto ids = random_ids(9000, num_experts, 0.9, 3);
    EXPECT_TRUE(permute(ids, 2, num_experts, kExact) == stable_permutation(ids, 2, num_experts)) << num_experts;
  }
}

TEST(CudaPermute, OneExpertMayTakeEverything) {
  const std::vector<int32_t> ids(3000, 3);
  EXPECT_TRUE(permute(ids, 1, 5, kExact) == stable_permutation(ids, 1, 5));
}

TEST(CudaPermute, NoTokensGiveNoRows) {
  const Permuted p = permute({}, 4, 3, kEverySlot);
  EXPECT_THAT(p.tokens_per_expert, Each(0));
  EXPECT_THAT(p.expert_offsets, ElementsAre(0, 0, 0, 0));
  EXPECT_TRUE(p.row_token.empty());
}

// Buffers end at guarded memory, so a row that is written beyond the capacity ends the test.
TEST(CudaPermute, RowsBeyondTheCapacityHaveNoPlace) {
  const auto ids = random_ids(2100, 6, 0.5, 5);
  const Permuted exact = stable_permutation(ids, 3, 6);
  const auto rows = static_cast<int64_t>(exact.row_slot.size());
  for (const int64_t capacity : {int64_t{0}, int64_t{1}, rows / 2, rows - 1, rows, rows + 1, int64_t{2100}}) {
    SCOPED_TRACE(::testing::Message() << "capacity " << capacity << " R " << rows);
    Permuted expected = exact;
    const auto limit = static_cast<int32_t>(std::min(capacity, rows));
    for (int32_t& offset : expected.expert_offsets) offset = std::min(offset, limit);
    for (int32_t& row : expected.slot_row) row = row < limit ? row : -1;
    expected.row_token = first(exact.row_token, limit);
    expected.row_slot = first(exact.row_slot, limit);
    EXPECT_EQ(permute(ids, 3, 6, capacity), expected);
  }
}

TEST(CudaPermute, BuffersMayLieAnywhere) {
  const auto ids = random_ids(700, 20, 0.5, 4);
  EXPECT_EQ(permute(ids, 7, 20, kEverySlot, 1), stable_permutation(ids, 7, 20));
}

TEST(CudaPermute, LimitsAreNamed) {
  EXPECT_THAT([] { permute({0}, 1, 4097, kEverySlot); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("num_experts must be at most 4096 on CUDA, got 4097")));
  EXPECT_THAT(
      [] {
        DeviceBuffer<int32_t> out(4);
        count_rows_cuda(nullptr, 0, 3, 0, out.data(), out.data(), {nullptr, 3}, Stream{});
      },
      ThrowsMessage<std::invalid_argument>(HasSubstr("workspace must have 16 bytes, got 3")));
}

TEST(CudaPermutePlan, CoversAnyNumberOfSlotsWithFewBlocks) {
  for (const int64_t num_slots : {int64_t{0}, int64_t{1}, int64_t{100000}, (int64_t{1} << 31) - 1}) {
    for (const int32_t num_experts : {1, 64, 1024, 1025, 4096}) {
      const PermutePlan plan(num_slots, num_experts);
      EXPECT_GE(plan.num_blocks * plan.slots_per_block(), num_slots);
      EXPECT_LE(plan.num_blocks, 1024);
      EXPECT_EQ(plan.slots_per_warp % 32, 0);
      EXPECT_LE(plan.warps * num_experts * 4, 48 << 10);
    }
  }
}

#if defined(DYNAMIC_MOE_SIMT)

// 8192 slots in 8 blocks of 8 warps, 4 a token, half of them used.
TEST(CudaPermuteCost, EverySlotIsReadTwiceAndWrittenOnce) {
  constexpr int64_t kSlots = 8192;
  constexpr int32_t kExperts = 16;
  const auto ids = random_ids(kSlots, kExperts, 0.5, 5);
  const DeviceBuffer<int32_t> expert_ids(ids);
  DeviceBuffer<int32_t> counts(kExperts), offsets(kExperts + 1), slot_row(kSlots), row_token(kSlots), row_slot(kSlots);
  DeviceWorkspace workspace(permute_cuda_workspace(kSlots, kExperts));
  const auto counted = simt::counters_of([&] {
    count_rows_cuda(expert_ids.data(), kSlots, kExperts, kSlots, counts.data(), offsets.data(), workspace.get(),
                    Stream{});
  });
  const auto live = static_cast<uint64_t>(offsets.download().back());
  EXPECT_EQ(counted.launches, 2u);
  EXPECT_EQ(counted.atomics, live + 1);  // one for each row, one for the block of the scan
  const auto placed = simt::counters_of([&] {
    permute_cuda({.expert_ids = expert_ids.data(),
                  .expert_offsets = offsets.data(),
                  .row_token = row_token.data(),
                  .row_slot = row_slot.data(),
                  .slot_row = slot_row.data(),
                  .num_tokens = kSlots / 4,
                  .max_experts = 4,
                  .num_experts = kExperts},
                 kSlots, workspace.get(), Stream{});
  });
  EXPECT_EQ(placed.launches, 1u);
  EXPECT_EQ(placed.blocks, 8u);
  EXPECT_EQ(placed.barriers, 3u * 8);
  EXPECT_EQ(placed.atomics, live);
  // Twice the slots, and for each block 16 offsets, 16 rows before it, and R for each of its 8 warps.
  EXPECT_EQ(placed.global_read_sectors, 2 * kSlots / 8 + 8 * (2 + 2 + 8));
  EXPECT_EQ(placed.bank_conflicts, 0u);
}

#endif

}  // namespace
}  // namespace dynamic_moe::testing
