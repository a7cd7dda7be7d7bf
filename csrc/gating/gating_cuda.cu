// SPDX-License-Identifier: Apache-2.0
// Picks the instantiation of the gating kernels and says how memory is divided.
#include <cfloat>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/cuda/launch.cuh"
#include "gating/gating.h"
#include "gating/gating_kernels.cuh"

namespace dynamic_moe {
namespace {

GatingPolicy policy_of(int32_t num_experts) {
  if (num_experts > kMaxGatingExperts) {
    throw std::invalid_argument("num_experts must be at most " + std::to_string(kMaxGatingExperts) + " on CUDA, got " +
                                std::to_string(num_experts));
  }
  return kGatingPolicies[gating_policy_of(num_experts)];
}

// run(policy) with the policy's numbers as constants: decltype(policy)::kLanes, kExpertsPerLane.
template <int kIndex>
struct StaticPolicy {
  static constexpr int kLanes = kGatingPolicies[kIndex].lanes;
  static constexpr int kExpertsPerLane = kGatingPolicies[kIndex].experts_per_lane;
};
template <class Run, size_t... kIndices>
void with_policy(int index, const Run& run, std::index_sequence<kIndices...>) {
  ((static_cast<int>(kIndices) == index ? run(StaticPolicy<kIndices>{}) : void()), ...);
}
template <class Run>
void with_policy(int32_t num_experts, const Run& run) {
  with_policy(gating_policy_of(num_experts), run, std::make_index_sequence<std::size(kGatingPolicies)>{});
}

int64_t num_chunks_of(const GatingParams& p, GatingPolicy policy) {
  const int64_t tokens = gating_tokens_per_chunk(p.num_tokens, policy);
  return (p.num_tokens + tokens - 1) / tokens;
}

// As float32, and so that neither 0 / T nor infinity / T is NaN.
float temperature_of(double temperature) {
  return temperature < double{FLT_MIN}   ? FLT_MIN
         : temperature > double{FLT_MAX} ? FLT_MAX
                                         : static_cast<float>(temperature);
}

// Rows of E elements follow each other without a gap, so all of them are aligned or hardly any.
bool has_vector_rows(const void* rows, size_t element_bytes, int32_t num_experts) {
  return num_experts % 4 == 0 && is_aligned(rows, 4 * element_bytes);
}

}  // namespace

size_t gating_cuda_workspace(const GatingParams& p) {
  return static_cast<size_t>(num_chunks_of(p, policy_of(p.num_experts))) *
         (2 * static_cast<size_t>(p.num_experts) + 1) * sizeof(float);
}

void gating_cuda(const GatingParams& p, int32_t* non_finite_tokens, Workspace workspace, Stream stream) {
  const GatingPolicy policy = policy_of(p.num_experts);
  const int64_t num_chunks = num_chunks_of(p, policy);
  if (workspace.bytes < gating_cuda_workspace(p)) {
    throw std::invalid_argument("workspace must have " + std::to_string(gating_cuda_workspace(p)) + " bytes, got " +
                                std::to_string(workspace.bytes));
  }
  GatingLaunch launch{};
  launch.params = p;
  const int64_t partials = num_chunks * p.num_experts;
  launch.partials.probability_sum = static_cast<float*>(workspace.data);
  launch.partials.tokens_per_expert = static_cast<int32_t*>(workspace.data) + partials;
  launch.partials.non_finite_tokens = launch.partials.tokens_per_expert + partials;
  launch.tokens_per_chunk = gating_tokens_per_chunk(p.num_tokens, policy);
  launch.staged_slots = gating_staged_slots(policy, p.max_experts);
  launch.temperature = temperature_of(p.temperature);
  launch.top_p = static_cast<float>(p.top_p);
  launch.stops_at_mass = p.is_top_p && (p.device_top_p != nullptr || p.top_p < 1.0);
  launch.vector_experts = has_vector_rows(p.logits, size_of(p.logits_dtype), p.num_experts) &&
                          has_vector_rows(p.probabilities, sizeof(float), p.num_experts);
  launch.vector_slots = tokens_per_warp(policy) * p.max_experts % 4 == 0 && is_aligned(p.expert_ids, 16) &&
                        is_aligned(p.expert_weights, 16);
  with_storage_type(p.logits_dtype, [&](auto type) {
    with_policy(p.num_experts, [&](auto chosen) {
      using Logit = typename decltype(type)::Type;
      using Policy = decltype(chosen);
      DYNAMIC_MOE_LAUNCH((gating_kernel<Logit, Policy::kLanes, Policy::kExpertsPerLane>),
                         static_cast<unsigned>(num_chunks), kGatingThreads, gating_shared_bytes(policy, p.max_experts),
                         stream, launch);
    });
  });
  DYNAMIC_MOE_LAUNCH(gating_totals_kernel, static_cast<unsigned>((p.num_experts + 31) / 32), 32 * kTotalsWarps, 0,
                     stream, launch.partials, num_chunks, p.num_experts, static_cast<float*>(p.probability_sum),
                     p.tokens_per_expert, non_finite_tokens);
}

void gating_backward_cuda(const GatingBackwardParams& p, Stream stream) {
  const GatingPolicy policy = policy_of(p.num_experts);
  GatingBackwardLaunch launch{};
  launch.params = p;
  launch.temperature = temperature_of(p.temperature);
  launch.vector_experts = has_vector_rows(p.d_logits, size_of(p.logits_dtype), p.num_experts);
  for (const void* rows : {p.probabilities, p.d_probabilities, p.d_probability_sum}) {
    launch.vector_experts = launch.vector_experts && has_vector_rows(rows, sizeof(float), p.num_experts);
  }
  const int64_t tokens = kGatingWarps * tokens_per_warp(policy);
  const auto num_blocks = static_cast<unsigned>((p.num_tokens + tokens - 1) / tokens);
  with_storage_type(p.logits_dtype, [&](auto type) {
    with_policy(p.num_experts, [&](auto chosen) {
      using Logit = typename decltype(type)::Type;
      using Policy = decltype(chosen);
      DYNAMIC_MOE_LAUNCH((gating_backward_kernel<Logit, Policy::kLanes, Policy::kExpertsPerLane>), num_blocks,
                         kGatingThreads, 0, stream, launch);
    });
  });
}

}  // namespace dynamic_moe
