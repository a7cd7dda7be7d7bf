// SPDX-License-Identifier: Apache-2.0
// Inputs, outputs and a float64 oracle for the gating tests.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "common/half.h"
#include "gating/gating.h"

namespace dynamic_moe::testing {

template <class Logit>
using RealOf = std::conditional_t<std::is_same_v<Logit, double>, double, float>;

template <class Logit>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<Logit, double>) return DType::kFloat64;
  if constexpr (std::is_same_v<Logit, BFloat16>) return DType::kBFloat16;
  if constexpr (std::is_same_v<Logit, Float16>) return DType::kFloat16;
  return DType::kFloat32;
}

template <class Logit>
Logit to_logit(double value) {
  if constexpr (std::is_same_v<Logit, double>) {
    return value;
  } else {
    return from_float<Logit>(static_cast<float>(value));
  }
}

template <class Logit>
double to_double(Logit value) {
  if constexpr (std::is_same_v<Logit, double>) {
    return value;
  } else {
    return static_cast<double>(to_float(value));
  }
}

// Bytes, so that NaN compares equal to the same NaN and 0 differs from -0.
template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

struct Rule {
  bool is_top_p = true;
  double top_p = 0.4;
  ThresholdRule threshold = ThresholdRule::kPaper;
  int32_t max_experts = 0;  // 0: all
  bool renormalize = false;
  double temperature = 1.0;
};

template <class Logit>
struct Gated {
  using Real = RealOf<Logit>;
  int64_t num_tokens = 0;
  int32_t num_experts = 0, max_experts = 0;
  std::vector<int32_t> expert_ids, tokens_per_expert;
  std::vector<Real> expert_weights, probabilities, probability_sum, entropy, logsumexp;
  int64_t non_finite = 0;

  // Experts of token t, best first.
  std::vector<int32_t> experts_of(int64_t t) const {
    std::vector<int32_t> experts;
    for (int32_t k = 0; k < max_experts; ++k) {
      const int32_t id = expert_ids[static_cast<size_t>(t * max_experts + k)];
      if (id != num_experts) experts.push_back(id);
    }
    return experts;
  }
};

template <class Logit>
Gated<Logit> gate(const std::vector<Logit>& logits, int32_t num_experts, const Rule& rule,
                  const std::vector<uint8_t>& mask = {}) {
  Gated<Logit> g;
  const size_t experts = static_cast<size_t>(num_experts);
  const size_t tokens = logits.size() / experts;
  g.num_tokens = static_cast<int64_t>(tokens);
  g.num_experts = num_experts;
  g.max_experts = rule.max_experts ? rule.max_experts : num_experts;
  const size_t slots = tokens * static_cast<size_t>(g.max_experts);
  // Filled with what no kernel would write, so that an element left out shows.
  g.expert_ids.assign(slots, -77);
  g.tokens_per_expert.assign(experts, -77);
  g.expert_weights.assign(slots, -77);
  g.probabilities.assign(tokens * experts, -77);
  g.probability_sum.assign(experts, -77);
  g.entropy.assign(tokens, -77);
  g.logsumexp.assign(tokens, -77);
  g.non_finite = gating_cpu({.logits = logits.data(),
                             .token_mask = mask.empty() ? nullptr : mask.data(),
                             .expert_ids = g.expert_ids.data(),
                             .expert_weights = g.expert_weights.data(),
                             .tokens_per_expert = g.tokens_per_expert.data(),
                             .probabilities = g.probabilities.data(),
                             .probability_sum = g.probability_sum.data(),
                             .entropy = g.entropy.data(),
                             .logsumexp = g.logsumexp.data(),
                             .num_tokens = g.num_tokens,
                             .num_experts = num_experts,
                             .max_experts = g.max_experts,
                             .is_top_p = rule.is_top_p,
                             .top_p = rule.top_p,
                             .rule = rule.threshold,
                             .renormalize = rule.renormalize,
                             .temperature = rule.temperature,
                             .logits_dtype = dtype_of<Logit>()});
  return g;
}

template <class Logit>
bool same_bits(const Gated<Logit>& a, const Gated<Logit>& b) {
  return same_bytes(a.expert_ids, b.expert_ids) && same_bytes(a.tokens_per_expert, b.tokens_per_expert) &&
         same_bytes(a.expert_weights, b.expert_weights) && same_bytes(a.probabilities, b.probabilities) &&
         same_bytes(a.probability_sum, b.probability_sum) && same_bytes(a.entropy, b.entropy) &&
         same_bytes(a.logsumexp, b.logsumexp) && a.non_finite == b.non_finite;
}

// Normal logits of the given deviation; every third token has one expert far ahead, as trained routers do.
template <class Logit>
std::vector<Logit> random_logits(int64_t num_tokens, int32_t num_experts, double deviation, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(0, deviation);
  std::vector<Logit> logits(static_cast<size_t>(num_tokens * num_experts));
  for (Logit& logit : logits) logit = to_logit<Logit>(normal(random));
  for (int64_t t = 0; t < num_tokens; t += 3) {
    const size_t e =
        static_cast<size_t>(t * num_experts + static_cast<int64_t>(random() % static_cast<unsigned>(num_experts)));
    logits[e] = to_logit<Logit>(3 + 2 * deviation);
  }
  return logits;
}

// The softmax of one token in long double.
struct Softmax {
  std::vector<double> distance, probability;
  double entropy = 0, logsumexp = 0;

  template <class Logit>
  Softmax(const Logit* logits, int32_t num_experts, double temperature) {
    long double largest = -std::numeric_limits<long double>::infinity();
    for (int32_t e = 0; e < num_experts; ++e) largest = std::max<long double>(largest, to_double(logits[e]));
    long double sum = 0;
    for (int32_t e = 0; e < num_experts; ++e) {
      distance.push_back(static_cast<double>((largest - to_double(logits[e])) / temperature));
      sum += std::exp(-static_cast<long double>(distance.back()));
    }
    logsumexp = static_cast<double>(largest / temperature + std::log(sum));
    long double h = 0;
    for (const double d : distance) {
      const long double p = std::exp(-static_cast<long double>(d)) / sum;
      probability.push_back(static_cast<double>(p));
      if (p > 0) h -= p * std::log(p);
    }
    entropy = static_cast<double>(h);
  }
};

}  // namespace dynamic_moe::testing
