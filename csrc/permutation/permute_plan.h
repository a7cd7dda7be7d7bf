// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

namespace dynamic_moe {

constexpr int kMaxPermuteExperts = 4096;  // on CUDA

// How slots are divided. A function of the sizes alone, so that both steps agree.
struct PermutePlan {
  int64_t slots_per_warp;
  int warps;  // of a block
  int64_t num_blocks;

  PermutePlan(int64_t num_slots, int32_t num_experts) {
    // A warp keeps a counter per expert in shared memory: 8 warps with 1024 experts take 32 KiB, 2 with 4096 as well.
    warps = num_experts <= 1024 ? 8 : num_experts <= 2048 ? 4 : 2;
    // Every block costs a row of E counts: at least as many slots pay for it. Beyond 1024 blocks all devices are busy.
    constexpr int64_t kFewestSlots = 1024, kMostBlocks = 1024;
    int64_t slots = (num_slots + kMostBlocks - 1) / kMostBlocks;
    if (slots < kFewestSlots) slots = kFewestSlots;
    if (slots < num_experts) slots = num_experts;
    slots_per_warp = (slots + 32 * warps - 1) / (32 * warps) * 32;
    num_blocks = (num_slots + slots_per_block() - 1) / slots_per_block();
    if (num_blocks == 0) num_blocks = 1;  // no slots: zero counts are written nevertheless
  }

  int threads() const { return 32 * warps; }
  int64_t slots_per_block() const { return slots_per_warp * warps; }
};

}  // namespace dynamic_moe
