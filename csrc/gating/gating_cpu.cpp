// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "common/half.h"
#include "common/parallel.h"
#include "gating/gating.h"

namespace dynamic_moe {
namespace {

constexpr int64_t kChunk = 256;

inline double to_float(double value) { return value; }
using dynamic_moe::to_float;

template <class Out, class Real>
Out from_real(Real value) {
  if constexpr (std::is_same_v<Out, double>) {
    return value;
  } else {
    return from_float<Out>(static_cast<float>(value));
  }
}

template <class In, class Real>
struct Gate {
  const GatingParams& p;
  std::vector<int32_t> order = std::vector<int32_t>(static_cast<size_t>(p.num_experts));

  int32_t num_selected(const Real* probability) const {
    if (!p.is_top_p || p.top_p >= 1.0) return p.max_experts;
    const Real top_p = static_cast<Real>(p.top_p);
    Real mass = 0;
    for (int32_t k = 0; k < p.max_experts; ++k) {
      mass += probability[order[k]];
      if (p.rule == ThresholdRule::kPaper ? mass >= top_p : mass > top_p) return k + 1;
    }
    return p.max_experts;
  }

  // Returns whether the token is finite.
  bool token(int64_t t, int32_t* counts, double* sums) {
    const int64_t E = p.num_experts, K = p.max_experts;
    const In* logits = static_cast<const In*>(p.logits) + t * E;
    int32_t* ids = p.expert_ids + t * K;
    Real* weights = static_cast<Real*>(p.expert_weights) + t * K;
    Real* probability = static_cast<Real*>(p.probabilities) + t * E;
    Real& entropy = static_cast<Real*>(p.entropy)[t];
    Real& logsumexp = static_cast<Real*>(p.logsumexp)[t];
    std::fill_n(ids, K, p.num_experts);
    std::fill_n(weights, K, Real(0));
    if (p.token_mask && !p.token_mask[t]) {
      std::fill_n(probability, E, Real(0));
      entropy = logsumexp = 0;
      return true;
    }
    const Real temperature = static_cast<Real>(p.temperature);
    Real largest = -std::numeric_limits<Real>::infinity();
    for (int64_t e = 0; e < E; ++e) largest = std::max<Real>(largest, to_float(logits[e]));
    Real sum = 0, weighted = 0;
    for (int64_t e = 0; e < E; ++e) {
      const Real z = (to_float(logits[e]) - largest) / temperature;
      probability[e] = std::exp(z);
      sum += probability[e];
      if (probability[e] > 0) weighted -= probability[e] * z;
    }
    if (!(sum >= 1)) {
      const Real nan = std::numeric_limits<Real>::quiet_NaN();
      std::fill_n(probability, E, nan);
      entropy = logsumexp = weights[0] = nan;
      ids[0] = 0;
      ++counts[0];
      return false;
    }
    for (int64_t e = 0; e < E; ++e) {
      probability[e] /= sum;
      sums[e] += probability[e];
    }
    entropy = std::log(sum) + weighted / sum;
    logsumexp = largest / temperature + std::log(sum);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return probability[a] > probability[b]; });
    const int32_t selected = num_selected(probability);
    Real mass = 1;
    if (p.renormalize) {
      mass = 0;
      for (int32_t k = 0; k < selected; ++k) mass += probability[order[k]];
    }
    for (int32_t k = 0; k < selected; ++k) {
      ids[k] = order[k];
      weights[k] = probability[order[k]] / mass;
      ++counts[order[k]];
    }
    return true;
  }
};

template <class In, class Real>
int64_t gating(const GatingParams& p) {
  const int64_t chunks = (p.num_tokens + kChunk - 1) / kChunk, E = p.num_experts;
  std::vector<int32_t> counts(chunks * E);
  std::vector<double> sums(chunks * E);
  std::vector<int64_t> bad(chunks);
  parallel_tasks(chunks, [&](int64_t chunk) {
    Gate<In, Real> gate{p};
    for (int64_t t = chunk * kChunk; t < std::min((chunk + 1) * kChunk, p.num_tokens); ++t) {
      bad[chunk] += !gate.token(t, &counts[chunk * E], &sums[chunk * E]);
    }
  });
  for (int64_t e = 0; e < E; ++e) {
    int32_t count = 0;
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      count += counts[chunk * E + e];
      sum += sums[chunk * E + e];
    }
    p.tokens_per_expert[e] = count;
    static_cast<Real*>(p.probability_sum)[e] = static_cast<Real>(sum);
  }
  return std::accumulate(bad.begin(), bad.end(), int64_t{0});
}

template <class Out, class Real>
void gating_backward(const GatingBackwardParams& p) {
  const int64_t E = p.num_experts, K = p.max_experts;
  parallel_for(0, p.num_tokens, kChunk, [&](int64_t first, int64_t last) {
    std::vector<Real> g(E);
    for (int64_t t = first; t < last; ++t) {
      const Real* probability = static_cast<const Real*>(p.probabilities) + t * E;
      const int32_t* ids = p.expert_ids + t * K;
      Out* out = static_cast<Out*>(p.d_logits) + t * E;
      if (p.token_mask && !p.token_mask[t]) {
        std::fill_n(out, E, from_real<Out>(Real(0)));
        continue;
      }
      for (int64_t e = 0; e < E; ++e) {
        g[e] = 0;
        if (p.d_probabilities) g[e] += static_cast<const Real*>(p.d_probabilities)[t * E + e];
        if (p.d_probability_sum) g[e] += static_cast<const Real*>(p.d_probability_sum)[e];
      }
      if (p.d_expert_weights) {
        const Real* dw = static_cast<const Real*>(p.d_expert_weights) + t * K;
        Real mass = 0, dot = 0;
        for (int64_t k = 0; k < K && ids[k] < E; ++k) {
          mass += probability[ids[k]];
          dot += dw[k] * probability[ids[k]];
        }
        for (int64_t k = 0; k < K && ids[k] < E; ++k) {
          g[ids[k]] += p.renormalize ? (dw[k] - dot / mass) / mass : dw[k];
        }
      }
      Real dot = 0;
      for (int64_t e = 0; e < E; ++e) dot += probability[e] * g[e];
      const Real d_lse = p.d_logsumexp ? static_cast<const Real*>(p.d_logsumexp)[t] : Real(0);
      const Real d_entropy = p.d_entropy ? static_cast<const Real*>(p.d_entropy)[t] : Real(0);
      const Real entropy = static_cast<const Real*>(p.entropy)[t];
      for (int64_t e = 0; e < E; ++e) {
        Real d = g[e] - dot + d_lse;
        if (p.d_entropy && probability[e] > 0) d -= d_entropy * (std::log(probability[e]) + entropy);
        out[e] = from_real<Out>(probability[e] * d / static_cast<Real>(p.temperature));
      }
    }
  });
}

}  // namespace

int64_t gating_cpu(const GatingParams& p) {
  switch (p.logits_dtype) {
    case DType::kFloat32:
      return gating<float, float>(p);
    case DType::kFloat64:
      return gating<double, double>(p);
    case DType::kBFloat16:
      return gating<BFloat16, float>(p);
    case DType::kFloat16:
      return gating<Float16, float>(p);
  }
  return 0;
}

void gating_backward_cpu(const GatingBackwardParams& p) {
  switch (p.logits_dtype) {
    case DType::kFloat32:
      return gating_backward<float, float>(p);
    case DType::kFloat64:
      return gating_backward<double, double>(p);
    case DType::kBFloat16:
      return gating_backward<BFloat16, float>(p);
    case DType::kFloat16:
      return gating_backward<Float16, float>(p);
  }
}

}  // namespace dynamic_moe
