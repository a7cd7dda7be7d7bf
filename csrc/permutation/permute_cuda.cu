// SPDX-License-Identifier: Apache-2.0
#include <stdexcept>
#include <string>

#include "common/cuda/launch.cuh"
#include "permutation/permutation.h"
#include "permutation/permute_kernels.cuh"

namespace dynamic_moe {
namespace {

PermuteWorkspace divided(Workspace workspace, int64_t num_slots, int32_t num_experts) {
  const size_t needed = permute_cuda_workspace(num_slots, num_experts);
  if (workspace.bytes < needed) {
    throw std::invalid_argument("workspace must have " + std::to_string(needed) + " bytes, got " +
                                std::to_string(workspace.bytes));
  }
  auto* rows_of_block = static_cast<int32_t*>(workspace.data);
  return {rows_of_block, reinterpret_cast<uint32_t*>(rows_of_block + needed / sizeof(int32_t) - 1)};
}

}  // namespace

size_t permute_cuda_workspace(int64_t num_slots, int32_t num_experts) {
  if (num_experts > kMaxPermuteExperts) {
    throw std::invalid_argument("num_experts must be at most " + std::to_string(kMaxPermuteExperts) + " on CUDA, got " +
                                std::to_string(num_experts));
  }
  const int64_t counts = PermutePlan(num_slots, num_experts).num_blocks * num_experts;
  return static_cast<size_t>(counts + 1) * sizeof(int32_t);
}

void count_rows_cuda(const int32_t* expert_ids, int64_t num_slots, int32_t num_experts, int64_t row_capacity,
                     int32_t* tokens_per_expert, int32_t* expert_offsets, Workspace workspace, Stream stream) {
  const PermuteWorkspace shared = divided(workspace, num_slots, num_experts);
  const PermutePlan plan(num_slots, num_experts);
  DYNAMIC_MOE_LAUNCH(count_slots_kernel, static_cast<unsigned>(plan.num_blocks), plan.threads(),
                     sizeof(int32_t) * num_experts, stream, expert_ids, num_slots, num_experts, plan.slots_per_block(),
                     shared);
  DYNAMIC_MOE_LAUNCH(scan_blocks_kernel, static_cast<unsigned>((num_experts + kScannedExperts - 1) / kScannedExperts),
                     32 * kScanWarps, 0, stream, shared, plan.num_blocks, num_experts,
                     static_cast<int32_t>(row_capacity), tokens_per_expert, expert_offsets);
}

void permute_cuda(const PermuteParams& params, int64_t num_rows, Workspace workspace, Stream stream) {
  const int64_t num_slots = params.num_tokens * params.max_experts;
  const PermuteWorkspace shared = divided(workspace, num_slots, params.num_experts);
  const PermutePlan plan(num_slots, params.num_experts);
  DYNAMIC_MOE_LAUNCH(place_slots_kernel, static_cast<unsigned>(plan.num_blocks), plan.threads(),
                     sizeof(int32_t) * plan.warps * params.num_experts, stream, params, num_rows, plan.slots_per_warp,
                     shared);
}

}  // namespace dynamic_moe
