// SPDX-License-Identifier: Apache-2.0
// How the CUDA kernels of gating divide tokens, lanes and shared memory: a function of the sizes alone, on the host.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dynamic_moe {

constexpr int kGatingWarps = 4;  // of a block
constexpr int kGatingThreads = 32 * kGatingWarps;
constexpr int kMaxGatingExperts = 1024;

// How many lanes share a token, and how many experts each of them holds: four in a row (one vector of logits), then
// four that lie 4 * lanes further on, and so on.
struct GatingPolicy {
  int lanes, experts_per_lane;
};
constexpr GatingPolicy kGatingPolicies[] = {{2, 4}, {4, 4}, {8, 4}, {16, 4}, {32, 4}, {32, 8}, {32, 16}, {32, 32}};

constexpr int gating_policy_of(int num_experts) {
  int policy = 0;
  while (kGatingPolicies[policy].lanes * kGatingPolicies[policy].experts_per_lane < num_experts) ++policy;
  return policy;
}

constexpr int tokens_per_warp(GatingPolicy policy) { return 32 / policy.lanes; }

// The tokens that one block takes. Chunks are short where there are few tokens, so that all multiprocessors have work;
// long where there are many, as every chunk leaves a row of sums behind; and never so long that float32 sums over a
// warp's tokens lose digits.
constexpr int64_t gating_tokens_per_chunk(int64_t num_tokens, GatingPolicy policy) {
  constexpr int64_t kChunks = 1024, kFewest = 16, kMost = 512;
  const int64_t at_once = kGatingWarps * tokens_per_warp(policy);
  int64_t tokens = (num_tokens + kChunks - 1) / kChunks;
  if (tokens < kFewest) tokens = kFewest;
  if (tokens > kMost) tokens = kMost;
  return (tokens + at_once - 1) / at_once * at_once;
}

// The slots [K] of a warp's tokens as they are staged in shared memory: a multiple of 4, so that vectors fit.
constexpr int gating_staged_slots(GatingPolicy policy, int max_experts) {
  return (tokens_per_warp(policy) * max_experts + 3) / 4 * 4;
}

// Sums and counts of a block's experts, ids and weights of its warps' slots.
constexpr size_t gating_shared_bytes(GatingPolicy policy, int max_experts) {
  const int sums = 2 * policy.lanes * policy.experts_per_lane;
  return sizeof(float) * static_cast<size_t>(sums + kGatingWarps * 2 * gating_staged_slots(policy, max_experts));
}

}  // namespace dynamic_moe
