// SPDX-License-Identifier: Apache-2.0
// A group of tokens, one in each lane: what the two ways of computing a softmax share.
// Included only by files of one CPU level; the template argument has internal linkage.
#pragma once

#include "common/simd_math.h"
#include "gating/cpu_levels.h"
#include "gating/sort_network.h"

namespace dynamic_moe {
namespace {

// The first kLanes experts of every token of a group, whose rows in the [T, K] buffers are still to be written.
template <class L>
struct LateRows {
  alignas(64) int32_t ids[L::kLanes][L::kLanes], weights[L::kLanes][L::kLanes];  // [tokens][ranks]
  int64_t first_token = 0;
  int count = 0, written = 0;  // tokens
};

// Views of a chunk's scratch.
template <class L>
struct GroupScratch {
  double* keys;         // [padded E][lanes]
  int32_t* ids;         // [padded E][lanes] by rank
  float* weights;       // [padded E][lanes] by rank
  float* values;        // [lanes][padded E] probabilities of candidates
  int32_t* numbers;     // [lanes][padded E] experts of candidates
  float* exponentials;  // [lanes][padded E]
  float* column_sum;    // [padded E] of up to kTokensPerSum tokens
  int32_t* counts;      // [padded E] tokens of each expert; [E] counts what is unused
  double* first_keys;   // [4][lanes]
  // Whether a token is likely to need no more than four experts: how it was in the last group.
  bool four_are_enough = true;
  LateRows<L> late;

  GroupScratch(char* scratch, int64_t num_experts) {
    const int64_t size = padded(num_experts) * L::kLanes;
    keys = reinterpret_cast<double*>(scratch);
    ids = reinterpret_cast<int32_t*>(keys + size);
    weights = reinterpret_cast<float*>(ids + size);
    values = weights + size;
    numbers = reinterpret_cast<int32_t*>(values + size);
    exponentials = reinterpret_cast<float*>(numbers + size);
    column_sum = exponentials + size;
    counts = reinterpret_cast<int32_t*>(column_sum + padded(num_experts));
    first_keys = reinterpret_cast<double*>(counts + padded(num_experts));
    for (int64_t e = 0; e < padded(num_experts); ++e) {
      column_sum[e] = 0.0f;
      counts[e] = 0;
    }
  }
};

// The tokens of a group, and which of them get experts.
template <class L>
struct Group {
  int64_t first_token;
  int count;                // tokens in range: the first `count` lanes
  typename L::Mask routed;  // neither masked nor non-finite
  uint32_t non_finite;      // one bit per lane
};

// As float32, and so that neither 0 / T nor infinity / T is NaN.
inline float temperature_of(double temperature) {
  return temperature < double{__FLT_MIN__}   ? __FLT_MIN__
         : temperature > double{__FLT_MAX__} ? __FLT_MAX__
                                             : static_cast<float>(temperature);
}

inline int clamped(int64_t count, int most) { return count < 0 ? 0 : count > most ? most : static_cast<int>(count); }

template <class L>
uint32_t unmasked_bits(const GatingParams& p, int64_t first_token, int count) {
  const uint32_t in_range = (1u << count) - 1u;
  if (p.token_mask == nullptr) return in_range;
  uint32_t bits = 0;
  for (int lane = 0; lane < count; ++lane) bits |= static_cast<uint32_t>(p.token_mask[first_token + lane] != 0) << lane;
  return bits;
}

// One value of each token of a group.
template <class L>
void store_by_token(void* buffer, const Group<L>& group, typename L::Floats v) {
  float* p = static_cast<float*>(buffer) + group.first_token;
  group.count == L::kLanes ? L::store(p, v) : L::store_first(p, v, group.count);
}

// From the largest logit m of each token, s = sum exp(-d) and q = sum d exp(-d), d = (m - logit) / temperature:
// writes logsumexp = m / temperature + log s and entropy = log s + q / s, a sum of terms that are not negative.
// Returns 1 / s, and 0 for a token that gets no expert.
template <class L>
typename L::Floats finish_softmax(const GatingParams& p, typename L::Floats m, typename L::Floats s,
                                  typename L::Floats q, Group<L>& group) {
  const auto zero = L::zero();
  const auto one = L::broadcast(1.0f);
  const uint32_t unmasked = unmasked_bits<L>(p, group.first_token, group.count);
  // The largest logit contributes exactly 1. NaN, +infinity and nothing but -infinity make the sum NaN.
  group.routed = L::both(L::at_least(s, one), L::lanes(unmasked));
  group.non_finite = unmasked & ~L::bits(group.routed);
  s = L::select(group.routed, s, one);
  const auto scale = L::div(one, s);
  const auto log_s = log_of_positive<L>(s);
  const auto entropy = L::fma(q, scale, log_s);
  const auto largest = p.temperature == 1.0 ? m : L::div(m, L::broadcast(temperature_of(p.temperature)));
  const auto otherwise = L::select(L::lanes(group.non_finite), L::broadcast(__builtin_nanf("")), zero);
  store_by_token<L>(p.entropy, group, L::select(group.routed, entropy, otherwise));
  store_by_token<L>(p.logsumexp, group, L::select(group.routed, L::add(largest, log_s), otherwise));
  return L::select(group.routed, scale, zero);
}

// What a non-finite token gets.
template <class L>
void mark_non_finite(const GatingParams& p, const GatingChunk& chunk, const Group<L>& group) {
  L::fence();  // over what may have been written around the cache
  for (uint32_t left = group.non_finite; left != 0; left &= left - 1) {
    const int64_t token = group.first_token + __builtin_ctz(left);
    float* probabilities = static_cast<float*>(p.probabilities) + token * p.num_experts;
    for (int32_t e = 0; e < p.num_experts; ++e) probabilities[e] = __builtin_nanf("");
    p.expert_ids[token * p.max_experts] = 0;
    static_cast<float*>(p.expert_weights)[token * p.max_experts] = __builtin_nanf("");
    ++chunk.tokens_per_expert[0];
  }
}

inline void add_column_sums(const GatingChunk& chunk, float* column_sum, int32_t num_experts) {
  for (int32_t e = 0; e < num_experts; ++e) {
    chunk.probability_sum[e] += static_cast<double>(column_sum[e]);
    column_sum[e] = 0.0f;
  }
}

}  // namespace
}  // namespace dynamic_moe
