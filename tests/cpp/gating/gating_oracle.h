// SPDX-License-Identifier: Apache-2.0
// What gating should return, shared by the tests of all its implementations.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "gating_problem.h"

namespace dynamic_moe::testing {

// What the rule selects from `probabilities`, in their own arithmetic.
template <class Real>
std::vector<int32_t> selection(const Real* probabilities, int32_t num_experts, const Rule& rule) {
  std::vector<int32_t> order(static_cast<size_t>(num_experts));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return probabilities[a] > probabilities[b]; });
  order.resize(static_cast<size_t>(rule.max_experts ? rule.max_experts : num_experts));
  if (!rule.is_top_p || rule.top_p >= 1) return order;
  const Real top_p = static_cast<Real>(rule.top_p);
  Real mass = 0;
  for (size_t k = 0; k < order.size(); ++k) {
    mass += probabilities[order[k]];
    if (rule.threshold == ThresholdRule::kPaper ? mass >= top_p : mass > top_p) {
      order.resize(k + 1);
      break;
    }
  }
  return order;
}

template <class Logit>
void expect_selection_follows_the_rule(const Gated<Logit>& g, const Rule& rule) {
  using Real = RealOf<Logit>;
  std::vector<int32_t> counts(static_cast<size_t>(g.num_experts));
  for (int64_t t = 0; t < g.num_tokens; ++t) {
    const Real* probabilities = g.probabilities.data() + t * g.num_experts;
    const std::vector<int32_t> expected = selection(probabilities, g.num_experts, rule);
    Real mass = 0;
    for (const int32_t e : expected) mass += probabilities[e];
    for (int32_t k = 0; k < g.max_experts; ++k) {
      const size_t slot = static_cast<size_t>(t * g.max_experts + k);
      const bool used = static_cast<size_t>(k) < expected.size();
      ASSERT_EQ(g.expert_ids[slot], used ? expected[static_cast<size_t>(k)] : g.num_experts)
          << "token " << t << " rank " << k;
      const Real probability = used ? probabilities[g.expert_ids[slot]] : 0;
      ASSERT_EQ(g.expert_weights[slot], rule.renormalize ? probability / mass : probability) << "token " << t;
    }
    for (const int32_t e : expected) ++counts[static_cast<size_t>(e)];
  }
  EXPECT_EQ(g.tokens_per_expert, counts);
}

template <class Logit>
void expect_numbers_match_the_oracle(const std::vector<Logit>& logits, const Gated<Logit>& g, double temperature) {
  using Real = RealOf<Logit>;
  const double ulp = std::numeric_limits<Real>::epsilon();
  const double smallest = std::numeric_limits<Real>::denorm_min();
  const size_t experts = static_cast<size_t>(g.num_experts);
  std::vector<double> sum(experts), bound(experts);
  for (size_t t = 0; t < static_cast<size_t>(g.num_tokens); ++t) {
    const Softmax oracle(logits.data() + t * experts, g.num_experts, temperature);
    for (size_t e = 0; e < experts; ++e) {
      const double p = oracle.probability[e];
      // exp(-d) carries the rounding of d; the sum over the experts and the products add theirs.
      const double p_bound =
          p * ulp *
              (4 + std::sqrt(experts) / 4 + (temperature == 1 ? 0.5 : 1.0) * std::min(oracle.distance[e], 105.0)) +
          2 * smallest;
      ASSERT_NEAR(g.probabilities[t * experts + e], p, p_bound) << "token " << t << " expert " << e;
      sum[e] += p;
      bound[e] += p_bound + p * ulp * 16;
    }
    // Absolute near 0: the sum of exponentials is then 1 and a little, of which the last bits are lost.
    ASSERT_NEAR(g.entropy[t], oracle.entropy, ulp * (2 + std::sqrt(experts) / 4 + 8 * oracle.entropy)) << "token " << t;
    ASSERT_GE(g.entropy[t], 0) << "token " << t;
    ASSERT_NEAR(g.logsumexp[t], oracle.logsumexp,
                ulp * (4 + 2 * std::fabs(oracle.logsumexp) + 2 * std::fabs(oracle.logsumexp - oracle.entropy)))
        << "token " << t;
  }
  for (size_t e = 0; e < experts; ++e) ASSERT_NEAR(g.probability_sum[e], sum[e], bound[e]) << "expert " << e;
}

// Gradients of the outputs; an empty one is passed as null.
template <class Real>
struct OutputGradients {
  std::vector<Real> expert_weights, probabilities, probability_sum, entropy, logsumexp;
};

template <class Logit>
OutputGradients<RealOf<Logit>> random_gradients(const Gated<Logit>& g, unsigned which, unsigned seed) {
  using Real = RealOf<Logit>;
  std::mt19937 random(seed);
  std::normal_distribution<Real> normal;
  const auto fill = [&](std::vector<Real>& values, size_t count) {
    values.resize(count);
    for (Real& value : values) value = normal(random);
  };
  OutputGradients<Real> d;
  if (which & 1) fill(d.expert_weights, g.expert_weights.size());
  if (which & 2) fill(d.probabilities, g.probabilities.size());
  if (which & 4) fill(d.probability_sum, g.probability_sum.size());
  if (which & 8) fill(d.entropy, g.entropy.size());
  if (which & 16) fill(d.logsumexp, g.logsumexp.size());
  return d;
}

// d logits and, for each, the sum of the magnitudes that it was added up from.
template <class Logit>
void gradient_oracle(const Gated<Logit>& g, const OutputGradients<RealOf<Logit>>& d, const Rule& rule,
                     std::vector<double>& d_logits, std::vector<double>& magnitude) {
  const size_t experts = static_cast<size_t>(g.num_experts), slots = static_cast<size_t>(g.max_experts);
  for (size_t t = 0; t < static_cast<size_t>(g.num_tokens); ++t) {
    const auto p = [&](size_t e) { return static_cast<double>(g.probabilities[t * experts + e]); };
    std::vector<double> gradient(experts), size(experts);
    const auto add = [&](size_t e, double value, double value_size) {
      gradient[e] += value;
      size[e] += value_size;
    };
    for (size_t e = 0; e < experts; ++e) {
      if (!d.probabilities.empty())
        add(e, d.probabilities[t * experts + e], std::fabs(d.probabilities[t * experts + e]));
      if (!d.probability_sum.empty()) add(e, d.probability_sum[e], std::fabs(d.probability_sum[e]));
    }
    if (!d.expert_weights.empty()) {
      double mass = 0, dot = 0, dot_size = 0;
      const auto id = [&](size_t k) { return static_cast<size_t>(g.expert_ids[t * slots + k]); };
      for (size_t k = 0; k < slots && id(k) < experts; ++k) {
        mass += p(id(k));
        dot += static_cast<double>(d.expert_weights[t * slots + k]) * p(id(k));
        dot_size += std::fabs(static_cast<double>(d.expert_weights[t * slots + k])) * p(id(k));
      }
      for (size_t k = 0; k < slots && id(k) < experts; ++k) {
        const double dw = static_cast<double>(d.expert_weights[t * slots + k]);
        if (rule.renormalize) {
          add(id(k), (dw - dot / mass) / mass, (std::fabs(dw) + dot_size / mass) / mass);
        } else {
          add(id(k), dw, std::fabs(dw));
        }
      }
    }
    double dot = 0, dot_size = 0;
    for (size_t e = 0; e < experts; ++e) {
      dot += p(e) * gradient[e];
      dot_size += p(e) * size[e];
    }
    const double d_logsumexp = d.logsumexp.empty() ? 0.0 : static_cast<double>(d.logsumexp[t]);
    const double d_entropy = d.entropy.empty() ? 0.0 : static_cast<double>(d.entropy[t]);
    const double entropy = static_cast<double>(g.entropy[t]);
    for (size_t e = 0; e < experts; ++e) {
      const double log_p = p(e) > 0 ? std::log(p(e)) : 0;
      d_logits.push_back(p(e) * (gradient[e] - dot + d_logsumexp - d_entropy * (log_p + entropy)) / rule.temperature);
      magnitude.push_back(
          p(e) / rule.temperature *
          (size[e] + dot_size + std::fabs(d_logsumexp) + std::fabs(d_entropy) * (std::fabs(log_p) + entropy)));
    }
  }
}

template <class Logit>
double storage_rounding() {
  if constexpr (std::is_same_v<Logit, BFloat16>) return 0x1p-8;
  if constexpr (std::is_same_v<Logit, Float16>) return 0x1p-11;
  return 0;
}

template <class Logit>
void expect_gradient_matches(const Gated<Logit>& g, const OutputGradients<RealOf<Logit>>& d, const Rule& rule,
                             const std::vector<Logit>& d_logits) {
  const double ulp = std::numeric_limits<RealOf<Logit>>::epsilon();
  std::vector<double> expected, magnitude;
  gradient_oracle(g, d, rule, expected, magnitude);
  ASSERT_EQ(d_logits.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    // Half a unit of the smallest float16 and bfloat16 subnormals, where the storage type rounds to them.
    const double storage = storage_rounding<Logit>() * std::fabs(expected[i]) + (sizeof(Logit) == 2 ? 0x1p-25 : 1e-42);
    ASSERT_NEAR(to_double(d_logits[i]), expected[i], 12 * ulp * magnitude[i] + storage) << "logit " << i;
  }
}

}  // namespace dynamic_moe::testing
