// SPDX-License-Identifier: Apache-2.0
#include "gating/gating_float64.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace dynamic_moe {
namespace {

// One token's slices of the buffers.
struct Token {
  const double* logits;   // [E]
  int32_t* ids;           // [K]
  double* weights;        // [K]
  double* probabilities;  // [E]
  double& entropy;
  double& logsumexp;

  Token(const GatingParams& p, int64_t t)
      : logits(static_cast<const double*>(p.logits) + t * p.num_experts),
        ids(p.expert_ids + t * p.max_experts),
        weights(static_cast<double*>(p.expert_weights) + t * p.max_experts),
        probabilities(static_cast<double*>(p.probabilities) + t * p.num_experts),
        entropy(static_cast<double*>(p.entropy)[t]),
        logsumexp(static_cast<double*>(p.logsumexp)[t]) {}
};

void clear(const GatingParams& p, const Token& token, double value) {
  std::fill_n(token.ids, p.max_experts, p.num_experts);
  std::fill_n(token.weights, p.max_experts, 0.0);
  std::fill_n(token.probabilities, p.num_experts, value);
  token.entropy = token.logsumexp = value;
}

// Returns whether the token is finite.
bool softmax(const GatingParams& p, const Token& token) {
  const int32_t num_experts = p.num_experts;
  const double largest = *std::max_element(token.logits, token.logits + num_experts);
  long double sum = 0, weighted = 0;
  for (int32_t e = 0; e < num_experts; ++e) {
    const double distance = (largest - token.logits[e]) / p.temperature;
    const double exponential = std::exp(-distance);
    token.probabilities[e] = exponential;
    sum += exponential;
    if (exponential > 0) weighted += exponential * distance;
  }
  if (!(sum >= 1)) return false;  // NaN: the largest logit contributes exactly 1
  for (int32_t e = 0; e < num_experts; ++e) token.probabilities[e] = static_cast<double>(token.probabilities[e] / sum);
  const double log_sum = static_cast<double>(std::log(sum));
  token.entropy = log_sum + static_cast<double>(weighted / sum);
  token.logsumexp = largest / p.temperature + log_sum;
  return true;
}

int32_t num_selected(const GatingParams& p, const double* probabilities, const std::vector<int32_t>& order) {
  if (!p.is_top_p || p.top_p >= 1.0) return p.max_experts;
  double mass = 0;
  for (int32_t k = 0; k < p.max_experts; ++k) {
    mass += probabilities[order[static_cast<size_t>(k)]];
    if (p.rule == ThresholdRule::kPaper ? mass >= p.top_p : mass > p.top_p) return k + 1;
  }
  return p.max_experts;
}

void select(const GatingParams& p, const Token& token, std::vector<int32_t>& order, int32_t* tokens_per_expert) {
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return token.probabilities[a] > token.probabilities[b]; });
  const int32_t selected = num_selected(p, token.probabilities, order);
  double mass = 0;
  for (int32_t k = 0; k < selected; ++k) {
    token.ids[k] = order[static_cast<size_t>(k)];
    token.weights[k] = token.probabilities[token.ids[k]];
    mass += token.weights[k];
    ++tokens_per_expert[token.ids[k]];
  }
  if (!p.renormalize) return;
  for (int32_t k = 0; k < selected; ++k) token.weights[k] /= mass;
}

// g[e] += what flows to P_e through the weights of token t.
void add_weights(const GatingBackwardParams& p, int64_t t, const double* probabilities, std::vector<double>& g) {
  const int32_t* ids = p.expert_ids + t * p.max_experts;
  const double* d_weights = static_cast<const double*>(p.d_expert_weights) + t * p.max_experts;
  const auto live = [&](int32_t k) { return k < p.max_experts && ids[k] >= 0 && ids[k] < p.num_experts; };
  double mass = 0, dot = 0;
  for (int32_t k = 0; live(k); ++k) {
    mass += probabilities[ids[k]];
    dot += d_weights[k] * probabilities[ids[k]];
  }
  for (int32_t k = 0; live(k); ++k) {
    g[static_cast<size_t>(ids[k])] += p.renormalize ? (d_weights[k] - dot / mass) / mass : d_weights[k];
  }
}

}  // namespace

int64_t gating_float64(const GatingParams& p, const GatingChunk& chunk) {
  std::vector<int32_t> order(static_cast<size_t>(p.num_experts));
  int64_t non_finite = 0;
  for (int64_t t = chunk.begin; t < chunk.end; ++t) {
    const Token token(p, t);
    clear(p, token, 0.0);
    if (p.token_mask && !p.token_mask[t]) continue;
    if (softmax(p, token)) {
      for (int32_t e = 0; e < p.num_experts; ++e) chunk.probability_sum[e] += token.probabilities[e];
      select(p, token, order, chunk.tokens_per_expert);
    } else {
      clear(p, token, std::numeric_limits<double>::quiet_NaN());
      token.ids[0] = 0;
      token.weights[0] = std::numeric_limits<double>::quiet_NaN();
      ++chunk.tokens_per_expert[0];
      ++non_finite;
    }
  }
  return non_finite;
}

void gating_backward_float64(const GatingBackwardParams& p, int64_t begin, int64_t end) {
  const auto doubles = [](const void* buffer) { return static_cast<const double*>(buffer); };
  const int32_t num_experts = p.num_experts;
  std::vector<double> g(static_cast<size_t>(num_experts));
  for (int64_t t = begin; t < end; ++t) {
    const double* probabilities = doubles(p.probabilities) + t * num_experts;
    double* d_logits = static_cast<double*>(p.d_logits) + t * num_experts;
    if (p.token_mask && !p.token_mask[t]) {
      std::fill_n(d_logits, num_experts, 0.0);
      continue;
    }
    for (int32_t e = 0; e < num_experts; ++e) {
      g[static_cast<size_t>(e)] = (p.d_probabilities ? doubles(p.d_probabilities)[t * num_experts + e] : 0.0) +
                                  (p.d_probability_sum ? doubles(p.d_probability_sum)[e] : 0.0);
    }
    if (p.d_expert_weights) add_weights(p, t, probabilities, g);
    const double dot = std::inner_product(g.begin(), g.end(), probabilities, 0.0);
    const double d_logsumexp = p.d_logsumexp ? doubles(p.d_logsumexp)[t] : 0.0;
    for (int32_t e = 0; e < num_experts; ++e) {
      double d = g[static_cast<size_t>(e)] - dot + d_logsumexp;
      if (p.d_entropy) {
        const double log_p = std::log(std::max(std::numeric_limits<double>::min(), probabilities[e]));
        d -= doubles(p.d_entropy)[t] * (log_p + doubles(p.entropy)[t]);
      }
      d_logits[e] = probabilities[e] * d / p.temperature;
    }
  }
}

}  // namespace dynamic_moe
