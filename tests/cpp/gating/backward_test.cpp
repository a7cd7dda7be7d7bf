// SPDX-License-Identifier: Apache-2.0
// The float64 gradient is compared with central differences of the forward pass; the others with the formula in
// float64, each element with a bound from the terms that cancel in it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/isa.h"
#include "common/parallel.h"
#include "gating_oracle.h"

namespace dynamic_moe::testing {
namespace {

using ::testing::Each;

template <class Logit>
std::vector<Logit> backward(const Gated<Logit>& g, const OutputGradients<RealOf<Logit>>& d, const Rule& rule,
                            const std::vector<uint8_t>& mask = {}) {
  std::vector<Logit> d_logits(g.probabilities.size(), to_logit<Logit>(-77));
  const auto pointer = [](const auto& values) { return values.empty() ? nullptr : values.data(); };
  gating_backward_cpu({.probabilities = g.probabilities.data(),
                       .expert_ids = g.expert_ids.data(),
                       .entropy = g.entropy.data(),
                       .token_mask = pointer(mask),
                       .d_expert_weights = pointer(d.expert_weights),
                       .d_probabilities = pointer(d.probabilities),
                       .d_probability_sum = pointer(d.probability_sum),
                       .d_entropy = pointer(d.entropy),
                       .d_logsumexp = pointer(d.logsumexp),
                       .d_logits = d_logits.data(),
                       .num_tokens = g.num_tokens,
                       .num_experts = g.num_experts,
                       .max_experts = g.max_experts,
                       .renormalize = rule.renormalize,
                       .temperature = rule.temperature,
                       .logits_dtype = dtype_of<Logit>()});
  return d_logits;
}

double loss(const Gated<double>& g, const OutputGradients<double>& d) {
  const auto dot = [](const std::vector<double>& a, const std::vector<double>& b) {
    double sum = 0;
    for (size_t i = 0; i < b.size(); ++i) sum += a[i] * b[i];
    return sum;
  };
  return dot(g.expert_weights, d.expert_weights) + dot(g.probabilities, d.probabilities) +
         dot(g.probability_sum, d.probability_sum) + dot(g.entropy, d.entropy) + dot(g.logsumexp, d.logsumexp);
}

TEST(GatingBackwardInFloat64, IsTheDerivativeOfTheForwardPass) {
  constexpr double kStep = 1e-6;
  for (const int32_t num_experts : {1, 4, 9}) {
    for (const bool is_top_p : {true, false}) {
      for (const bool renormalize : {false, true}) {
        const Rule rule{.is_top_p = is_top_p,
                        .top_p = 0.6,
                        .max_experts = is_top_p ? 0 : std::min(num_experts, 3),
                        .renormalize = renormalize,
                        .temperature = 0.8};
        auto logits = random_logits<double>(6, num_experts, 1.0, 11);
        const auto g = gate(logits, num_experts, rule);
        for (const unsigned which : {1u, 2u, 4u, 8u, 16u, 31u}) {
          const auto d = random_gradients(g, which, 12);
          const auto d_logits = backward(g, d, rule);
          for (size_t i = 0; i < logits.size(); ++i) {
            const double x = logits[i];
            logits[i] = x + kStep;
            const double above = loss(gate(logits, num_experts, rule), d);
            logits[i] = x - kStep;
            const double below = loss(gate(logits, num_experts, rule), d);
            logits[i] = x;
            ASSERT_NEAR(d_logits[i], (above - below) / (2 * kStep), 2e-8)
                << "E " << num_experts << " outputs " << which << " renormalize " << renormalize << " logit " << i;
          }
        }
      }
    }
  }
}

template <class Logit>
class GatingBackward : public ::testing::Test {};
using LogitTypes = ::testing::Types<float, BFloat16, Float16, double>;
TYPED_TEST_SUITE(GatingBackward, LogitTypes);

TYPED_TEST(GatingBackward, MatchesTheFormulaForAnyNumberOfExperts) {
  for (const int32_t num_experts : {1, 2, 3, 8, 15, 16, 17, 40, 64, 257, 1024}) {
    for (const bool renormalize : {false, true}) {
      for (const double temperature : {1.0, 2.5}) {
        const Rule rule{.top_p = 0.8, .renormalize = renormalize, .temperature = temperature};
        const auto g = gate(random_logits<TypeParam>(39, num_experts, 3.0, 13), num_experts, rule);
        for (const unsigned which : {0u, 1u, 2u, 4u, 8u, 16u, 5u, 29u, 31u}) {
          SCOPED_TRACE(::testing::Message() << "E " << num_experts << " outputs " << which);
          const auto d = random_gradients(g, which, 14);
          const auto d_logits = backward(g, d, rule);
          expect_gradient_matches(g, d, rule, d_logits);
        }
      }
    }
  }
}

TYPED_TEST(GatingBackward, AMaskedTokenGetsZero) {
  for (const int32_t num_experts : {5, 16, 100}) {
    std::vector<uint8_t> mask(20, 1);
    mask[3] = mask[19] = 0;
    const auto g = gate(random_logits<TypeParam>(20, num_experts, 1.0, 15), num_experts, {}, mask);
    const auto d_logits = backward(g, random_gradients(g, 31, 16), {}, mask);
    for (size_t i = 0; i < d_logits.size(); ++i) {
      const bool masked = mask[i / static_cast<size_t>(num_experts)] == 0;
      if (masked) {
        ASSERT_EQ(to_double(d_logits[i]), 0);
      }
    }
    const size_t first = static_cast<size_t>(num_experts) * 4;
    EXPECT_NE(to_double(d_logits[first]), 0);
  }
}

TYPED_TEST(GatingBackward, ANonFiniteTokenIsNaNInItsOwnRowOnly) {
  for (const int32_t num_experts : {2, 16, 100}) {
    auto logits = random_logits<TypeParam>(20, num_experts, 1.0, 17);
    const Rule rule{.renormalize = true};
    const auto clean = gate(logits, num_experts, rule);
    logits[7 * static_cast<size_t>(num_experts)] = to_logit<TypeParam>(std::numeric_limits<double>::quiet_NaN());
    const auto g = gate(logits, num_experts, rule);
    const auto d = random_gradients(g, 31, 18);
    const auto d_logits = backward(g, d, rule);
    const auto expected = backward(clean, d, rule);
    for (size_t i = 0; i < d_logits.size(); ++i) {
      if (i / static_cast<size_t>(num_experts) == 7) {
        ASSERT_TRUE(std::isnan(to_double(d_logits[i])));
      } else {
        ASSERT_EQ(to_double(d_logits[i]), to_double(expected[i]));
      }
    }
  }
}

TYPED_TEST(GatingBackward, IsTheSameOnAnyNumberOfThreadsAndEveryCpuLevel) {
  for (const int32_t num_experts : {1, 9, 16, 33, 130}) {
    const Rule rule{.top_p = 0.7, .renormalize = true, .temperature = 1.25};
    const auto g = gate(random_logits<TypeParam>(700, num_experts, 2.0, 19), num_experts, rule);
    const auto d = random_gradients(g, 31, 20);
    set_isa(Isa::kScalar);
    const auto expected = backward(g, d, rule);
    for (const Isa isa : supported_isas()) {
      set_isa(isa);
      for (const int threads : {1, 2, 3, 7}) {
        use_standard_threads(threads);
        EXPECT_TRUE(same_bytes(backward(g, d, rule), expected)) << isa_name(isa) << " threads " << threads;
      }
    }
    use_standard_threads(1);
  }
  reset_isa();
}

TYPED_TEST(GatingBackward, NoTokensAreNoWork) {
  const auto g = gate(std::vector<TypeParam>{}, 6, {});
  EXPECT_TRUE(backward(g, random_gradients(g, 4, 21), {}).empty());
}

}  // namespace
}  // namespace dynamic_moe::testing
