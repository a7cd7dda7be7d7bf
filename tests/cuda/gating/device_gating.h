// SPDX-License-Identifier: Apache-2.0
// The gating launchers, run on device buffers that are exactly as large as the contract says.
#pragma once

#include <vector>

#include "cuda/support/device_buffer.h"
#include "gating/gating_oracle.h"
#include "gating/gating_policy.h"

namespace dynamic_moe::testing {

// The fewest and the most experts of every instantiation, the first where rows are no whole vectors and the second
// where they are, and some between.
inline std::vector<int32_t> numbers_of_experts() {
  std::vector<int32_t> numbers = {2, 3, 31, 100, 1000};
  int32_t fewest = 1;
  for (const GatingPolicy policy : kGatingPolicies) {
    const int32_t most = policy.lanes * policy.experts_per_lane;
    numbers.insert(numbers.end(), {fewest, most});
    fewest = most + 1;
  }
  return numbers;
}

// The buffers of one call of gating_cuda. `offset`: elements that each lies behind an aligned address.
template <class Logit>
struct DeviceGating {
  DeviceBuffer<Logit> logits;
  DeviceBuffer<uint8_t> mask;
  DeviceBuffer<int32_t> ids, counts, non_finite;
  DeviceBuffer<float> weights, probabilities, sum, entropy, logsumexp;
  GatingParams params;
  DeviceWorkspace workspace;

  DeviceGating(const std::vector<Logit>& values, int32_t num_experts, const Rule& rule,
               const std::vector<uint8_t>& token_mask = {}, int64_t offset = 0)
      : DeviceGating(values, num_experts, rule, token_mask, offset, static_cast<int64_t>(values.size()) / num_experts,
                     rule.max_experts ? rule.max_experts : num_experts) {}

  void run() { gating_cuda(params, non_finite.data(), workspace.get(), Stream{}); }

  Gated<Logit> result() const {
    Gated<Logit> g;
    g.num_tokens = params.num_tokens;
    g.num_experts = params.num_experts;
    g.max_experts = params.max_experts;
    g.expert_ids = ids.download();
    g.tokens_per_expert = counts.download();
    g.expert_weights = weights.download();
    g.probabilities = probabilities.download();
    g.probability_sum = sum.download();
    g.entropy = entropy.download();
    g.logsumexp = logsumexp.download();
    g.non_finite = non_finite.download()[0];
    return g;
  }

 private:
  DeviceGating(const std::vector<Logit>& values, int32_t num_experts, const Rule& rule,
               const std::vector<uint8_t>& token_mask, int64_t offset, int64_t num_tokens, int32_t max_experts)
      : logits(values, offset),
        mask(token_mask, offset),
        ids(num_tokens * max_experts, offset),
        counts(num_experts, offset),
        non_finite(1, offset),
        weights(num_tokens * max_experts, offset),
        probabilities(num_tokens * num_experts, offset),
        sum(num_experts, offset),
        entropy(num_tokens, offset),
        logsumexp(num_tokens, offset),
        params{.logits = logits.data(),
               .token_mask = token_mask.empty() ? nullptr : mask.data(),
               .expert_ids = ids.data(),
               .expert_weights = weights.data(),
               .tokens_per_expert = counts.data(),
               .probabilities = probabilities.data(),
               .probability_sum = sum.data(),
               .entropy = entropy.data(),
               .logsumexp = logsumexp.data(),
               .num_tokens = num_tokens,
               .num_experts = num_experts,
               .max_experts = max_experts,
               .is_top_p = rule.is_top_p,
               .top_p = rule.top_p,
               .rule = rule.threshold,
               .renormalize = rule.renormalize,
               .temperature = rule.temperature,
               .logits_dtype = dtype_of<Logit>()},
        workspace(gating_cuda_workspace(params)) {}
};

template <class Logit>
Gated<Logit> gate_on_device(const std::vector<Logit>& logits, int32_t num_experts, const Rule& rule,
                            const std::vector<uint8_t>& mask = {}, int64_t offset = 0) {
  DeviceGating<Logit> device(logits, num_experts, rule, mask, offset);
  device.run();
  return device.result();
}

// The buffers of one call of gating_backward_cuda; an empty gradient is passed as null.
template <class Logit>
struct DeviceGatingBackward {
  DeviceBuffer<float> probabilities, entropy;
  DeviceBuffer<int32_t> ids;
  DeviceBuffer<uint8_t> mask;
  DeviceBuffer<float> d_weights, d_probabilities, d_sum, d_entropy, d_logsumexp;
  DeviceBuffer<Logit> d_logits;
  GatingBackwardParams params;

  DeviceGatingBackward(const Gated<Logit>& g, const OutputGradients<float>& d, const Rule& rule,
                       const std::vector<uint8_t>& token_mask = {}, int64_t offset = 0)
      : probabilities(g.probabilities, offset),
        entropy(g.entropy, offset),
        ids(g.expert_ids, offset),
        mask(token_mask, offset),
        d_weights(d.expert_weights, offset),
        d_probabilities(d.probabilities, offset),
        d_sum(d.probability_sum, offset),
        d_entropy(d.entropy, offset),
        d_logsumexp(d.logsumexp, offset),
        d_logits(g.num_tokens * g.num_experts, offset),
        params{.probabilities = probabilities.data(),
               .expert_ids = ids.data(),
               .entropy = entropy.data(),
               .token_mask = token_mask.empty() ? nullptr : mask.data(),
               .d_expert_weights = d.expert_weights.empty() ? nullptr : d_weights.data(),
               .d_probabilities = d.probabilities.empty() ? nullptr : d_probabilities.data(),
               .d_probability_sum = d.probability_sum.empty() ? nullptr : d_sum.data(),
               .d_entropy = d.entropy.empty() ? nullptr : d_entropy.data(),
               .d_logsumexp = d.logsumexp.empty() ? nullptr : d_logsumexp.data(),
               .d_logits = d_logits.data(),
               .num_tokens = g.num_tokens,
               .num_experts = g.num_experts,
               .max_experts = g.max_experts,
               .renormalize = rule.renormalize,
               .temperature = rule.temperature,
               .logits_dtype = dtype_of<Logit>()} {}

  void run() { gating_backward_cuda(params, Stream{}); }
};

template <class Logit>
std::vector<Logit> backward_on_device(const Gated<Logit>& g, const OutputGradients<float>& d, const Rule& rule,
                                      const std::vector<uint8_t>& mask = {}, int64_t offset = 0) {
  DeviceGatingBackward<Logit> device(g, d, rule, mask, offset);
  device.run();
  return device.d_logits.download();
}

}  // namespace dynamic_moe::testing
