// SPDX-License-Identifier: Apache-2.0
// top_p_gating, top_k_gating and gating_backward.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "bindings/backend.h"
#include "gating/gating.h"

namespace dynamic_moe::bindings {
namespace {

using GatingOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct GatingRule {
  bool is_top_p;
  double top_p;
  const double* device_top_p;
  ThresholdRule rule;
  const char* max_experts_name;  // what the caller knows K by
  int64_t max_experts;
};

void check_temperature(double temperature) {
  if (!(temperature > 0) || std::isinf(temperature)) fail("temperature must be positive and finite, got ", temperature);
}

template <class Backend>
GatingOutputs gating(const Tensor& logits_in, const GatingRule& rule, bool renormalize, double temperature,
                     const OptionalTensor& mask_in, bool check_finite) {
  const Backend backend("logits", logits_in);
  const DType dtype = backend.float_dtype("logits", logits_in);
  const Tensor logits = backend.checked("logits", logits_in, scalar_type(dtype), {kAnySize, kAnySize});
  const int64_t num_tokens = logits.size(0);
  const int64_t num_experts = logits.size(1);
  const int64_t k = rule.max_experts;
  if (num_experts < 1) fail("logits must have at least one expert, got shape [", num_tokens, ", 0]");
  check_fits_int32("the number of experts", num_experts);
  check_range(rule.max_experts_name, k, 1, num_experts);
  check_fits_int32("tokens * experts per token", num_tokens * k);
  check_temperature(temperature);
  const OptionalTensor mask = backend.checked("token_mask", mask_in, ScalarType::Bool, {num_tokens});

  const ScalarType acc = accumulator_type(dtype);
  const Tensor expert_ids = backend.empty({num_tokens, k}, ScalarType::Int);
  const Tensor expert_weights = backend.empty({num_tokens, k}, acc);
  const Tensor tokens_per_expert = backend.empty({num_experts}, ScalarType::Int);
  const Tensor probabilities = backend.empty({num_tokens, num_experts}, acc);
  const Tensor probability_sum = backend.empty({num_experts}, acc);
  const Tensor entropy = backend.empty({num_tokens}, acc);
  const Tensor logsumexp = backend.empty({num_tokens}, acc);

  const GatingParams params{.logits = data(logits),
                            .token_mask = data<uint8_t>(mask),
                            .expert_ids = mutable_data<int32_t>(expert_ids),
                            .expert_weights = mutable_data(expert_weights),
                            .tokens_per_expert = mutable_data<int32_t>(tokens_per_expert),
                            .probabilities = mutable_data(probabilities),
                            .probability_sum = mutable_data(probability_sum),
                            .entropy = mutable_data(entropy),
                            .logsumexp = mutable_data(logsumexp),
                            .num_tokens = num_tokens,
                            .num_experts = static_cast<int32_t>(num_experts),
                            .max_experts = static_cast<int32_t>(k),
                            .is_top_p = rule.is_top_p,
                            .top_p = rule.top_p,
                            .device_top_p = rule.device_top_p,
                            .rule = rule.rule,
                            .renormalize = renormalize,
                            .temperature = temperature,
                            .logits_dtype = dtype};
  int64_t non_finite = 0;
  if constexpr (Backend::kReadsValues) {
    non_finite = gating_cpu(params);
  } else {
    const Tensor count = backend.empty({1}, ScalarType::Int);
    gating_cuda(params, mutable_data<int32_t>(count), backend.scratch(gating_cuda_workspace(params)), backend.stream());
    if (check_finite) non_finite = backend.read(count, 0);
  }
  if (check_finite && non_finite > 0) {
    fail("logits must be finite, got NaN, +infinity, or -infinity for every expert in ", non_finite, " of ", num_tokens,
         " tokens");
  }
  return {expert_ids, expert_weights, tokens_per_expert, probabilities, probability_sum, entropy, logsumexp};
}

void check_top_p(double top_p) {
  if (!(top_p > 0 && top_p <= 1)) fail("top_p must be in (0, 1], got ", top_p);
}

// straight_through is for autograd: the gradient of renormalized weights is that of the probabilities themselves.
template <class Backend>
GatingOutputs top_p_gating(const Tensor& logits, double top_p, int64_t max_experts, bool strict, bool renormalize,
                           double temperature, const OptionalTensor& token_mask, bool check_finite,
                           bool /*straight_through*/) {
  check_top_p(top_p);
  const GatingRule rule{.is_top_p = true,
                        .top_p = top_p,
                        .device_top_p = nullptr,
                        .rule = strict ? ThresholdRule::kReleased : ThresholdRule::kPaper,
                        .max_experts_name = "max_experts",
                        .max_experts = max_experts};
  return gating<Backend>(logits, rule, renormalize, temperature, token_mask, check_finite);
}

// A p in the host's memory is read here and checked; one on the device is read there, and must be in (0, 1].
template <class Backend>
GatingOutputs top_p_gating_tensor(const Tensor& logits, const Tensor& top_p, int64_t max_experts, bool strict,
                                  bool renormalize, double temperature, const OptionalTensor& token_mask,
                                  bool check_finite, bool straight_through) {
  check_tensor("top_p", top_p, ScalarType::Double, {1});
  if (top_p.is_cpu()) {
    return top_p_gating<Backend>(logits, *data<double>(top_p), max_experts, strict, renormalize, temperature,
                                 token_mask, check_finite, straight_through);
  }
  if constexpr (Backend::kReadsValues) {
    fail("top_p must be on the CPU like the other arguments");
  } else {
    const Tensor value = Backend("logits", logits).checked("top_p", top_p, ScalarType::Double, {1});
    const GatingRule rule{.is_top_p = true,
                          .top_p = 1.0,
                          .device_top_p = data<double>(value),
                          .rule = strict ? ThresholdRule::kReleased : ThresholdRule::kPaper,
                          .max_experts_name = "max_experts",
                          .max_experts = max_experts};
    return gating<Backend>(logits, rule, renormalize, temperature, token_mask, check_finite);
  }
}

template <class Backend>
GatingOutputs top_k_gating(const Tensor& logits, int64_t k, bool renormalize, double temperature,
                           const OptionalTensor& token_mask, bool check_finite, bool /*straight_through*/) {
  const GatingRule rule{.is_top_p = false,
                        .top_p = 1.0,
                        .device_top_p = nullptr,
                        .rule = ThresholdRule::kPaper,
                        .max_experts_name = "k",
                        .max_experts = k};
  return gating<Backend>(logits, rule, renormalize, temperature, token_mask, check_finite);
}

template <class Backend>
Tensor gating_backward(const Tensor& probabilities_in, const Tensor& expert_ids_in, const Tensor& entropy_in,
                       const OptionalTensor& mask_in, const OptionalTensor& d_expert_weights_in,
                       const OptionalTensor& d_probabilities_in, const OptionalTensor& d_probability_sum_in,
                       const OptionalTensor& d_entropy_in, const OptionalTensor& d_logsumexp_in, bool renormalize,
                       double temperature, ScalarType logits_dtype) {
  const Backend backend("probabilities", probabilities_in);
  const DType dtype = backend.float_dtype("logits_dtype", logits_dtype);
  const ScalarType acc = accumulator_type(dtype);
  const Tensor probabilities = backend.checked("probabilities", probabilities_in, acc, {kAnySize, kAnySize});
  const int64_t num_tokens = probabilities.size(0);
  const int64_t num_experts = probabilities.size(1);
  const Tensor expert_ids = backend.checked("expert_ids", expert_ids_in, ScalarType::Int, {num_tokens, kAnySize});
  const int64_t k = expert_ids.size(1);
  check_fits_int32("the number of experts", num_experts);
  check_range("the number of experts per token", k, 1, num_experts);
  check_temperature(temperature);
  if constexpr (Backend::kReadsValues) check_elements("expert_ids", expert_ids, 0, num_experts);
  const Tensor entropy = backend.checked("entropy", entropy_in, acc, {num_tokens});
  const OptionalTensor mask = backend.checked("token_mask", mask_in, ScalarType::Bool, {num_tokens});
  const OptionalTensor d_expert_weights =
      backend.checked("d_expert_weights", d_expert_weights_in, acc, {num_tokens, k});
  const OptionalTensor d_probabilities =
      backend.checked("d_probabilities", d_probabilities_in, acc, {num_tokens, num_experts});
  const OptionalTensor d_probability_sum =
      backend.checked("d_probability_sum", d_probability_sum_in, acc, {num_experts});
  const OptionalTensor d_entropy = backend.checked("d_entropy", d_entropy_in, acc, {num_tokens});
  const OptionalTensor d_logsumexp = backend.checked("d_logsumexp", d_logsumexp_in, acc, {num_tokens});

  Tensor d_logits = backend.empty({num_tokens, num_experts}, logits_dtype);
  const GatingBackwardParams params{.probabilities = data(probabilities),
                                    .expert_ids = data<int32_t>(expert_ids),
                                    .entropy = data(entropy),
                                    .token_mask = data<uint8_t>(mask),
                                    .d_expert_weights = data(d_expert_weights),
                                    .d_probabilities = data(d_probabilities),
                                    .d_probability_sum = data(d_probability_sum),
                                    .d_entropy = data(d_entropy),
                                    .d_logsumexp = data(d_logsumexp),
                                    .d_logits = mutable_data(d_logits),
                                    .num_tokens = num_tokens,
                                    .num_experts = static_cast<int32_t>(num_experts),
                                    .max_experts = static_cast<int32_t>(k),
                                    .renormalize = renormalize,
                                    .temperature = temperature,
                                    .logits_dtype = dtype};
  if constexpr (Backend::kReadsValues) {
    gating_backward_cpu(params);
  } else {
    gating_backward_cuda(params, backend.stream());
  }
  return d_logits;
}

template <class Backend>
void bind(torch::stable::detail::StableLibrary& m) {
  m.impl("top_p_gating", TORCH_BOX(&Operator<&top_p_gating<Backend>>::call));
  m.impl("top_p_gating.tensor", TORCH_BOX(&Operator<&top_p_gating_tensor<Backend>>::call));
  m.impl("top_k_gating", TORCH_BOX(&Operator<&top_k_gating<Backend>>::call));
  m.impl("gating_backward", TORCH_BOX(&Operator<&gating_backward<Backend>>::call));
}

}  // namespace
}  // namespace dynamic_moe::bindings

STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CPU, m) { dynamic_moe::bindings::bind<dynamic_moe::bindings::Cpu>(m); }
#ifdef DYNAMIC_MOE_CUDA_TOOLKIT
STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CUDA, m) { dynamic_moe::bindings::bind<dynamic_moe::bindings::Cuda>(m); }
#endif
