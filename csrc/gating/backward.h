// SPDX-License-Identifier: Apache-2.0
// Gating's backward pass, a row at a time, 16 experts side by side. With g_e the gradient of P_e from all that uses it,
//   d logit_e = P_e (g_e - sum_j P_j g_j + d_logsumexp - d_entropy (log P_e + entropy)) / temperature.
// Included only by files of one CPU level.
#pragma once

#include "gating/group.h"

namespace dynamic_moe {
namespace {

template <class L, class Logit>
struct Backward {
  using Floats = typename L::Floats;
  static constexpr int kLanes = L::kLanes;
  static constexpr int kParts = 16 / kLanes;

  const GatingBackwardParams& p;
  const int64_t num_experts = p.num_experts;
  const int64_t max_experts = p.max_experts;

  static const float* floats(const void* buffer, int64_t offset) {
    return buffer ? static_cast<const float*>(buffer) + offset : nullptr;
  }

  static Floats load(const float* p, int64_t width) {
    return width >= kLanes ? L::load(p) : L::load_first(p, clamped(width, kLanes));
  }

  bool live(const int32_t* ids, int64_t k) const {
    return k < max_experts && static_cast<uint32_t>(ids[k]) < static_cast<uint32_t>(num_experts);
  }

  // Adds what flows through the weights of token t to g [E], or takes it away again.
  void add_weights(int64_t t, float* g) const {
    const int32_t* ids = p.expert_ids + t * max_experts;
    const float* d_weights = floats(p.d_expert_weights, t * max_experts);
    if (!p.renormalize) {
      for (int64_t k = 0; live(ids, k); ++k) g[ids[k]] = d_weights[k];
      return;
    }
    // w_k = P_k / mass: d P_k = (d w_k - sum_j d w_j w_j) / mass
    const float* probabilities = floats(p.probabilities, t * num_experts);
    float mass = 0.0f, dot = 0.0f;
    for (int64_t k = 0; live(ids, k); ++k) {
      mass += probabilities[ids[k]];
      dot += d_weights[k] * probabilities[ids[k]];
    }
    for (int64_t k = 0; live(ids, k); ++k) g[ids[k]] = (d_weights[k] - dot / mass) / mass;
  }

  void clear_weights(int64_t t, float* g) const {
    const int32_t* ids = p.expert_ids + t * max_experts;
    for (int64_t k = 0; live(ids, k); ++k) g[ids[k]] = 0.0f;
  }

  Floats gradient(const float* g, const float* d_probabilities, int64_t e) const {
    Floats sum = L::load(g + e);  // whole vectors: scratch is padded
    if (d_probabilities) sum = L::add(sum, load(d_probabilities + e, num_experts - e));
    if (p.d_probability_sum) sum = L::add(sum, load(floats(p.d_probability_sum, e), num_experts - e));
    return sum;
  }

  void row(int64_t t, const float* g) const {
    const float* probabilities = floats(p.probabilities, t * num_experts);
    const float* d_probabilities = floats(p.d_probabilities, t * num_experts);
    Logit* d_logits = static_cast<Logit*>(p.d_logits) + t * num_experts;

    Floats partial[kParts];
    for (int part = 0; part < kParts; ++part) partial[part] = L::zero();
    for (int64_t first = 0; first < num_experts; first += 16) {
      for (int part = 0; part < kParts && first + part * kLanes < num_experts; ++part) {
        const int64_t e = first + part * kLanes;
        partial[part] =
            L::fma(load(probabilities + e, num_experts - e), gradient(g, d_probabilities, e), partial[part]);
      }
    }
    const Floats dot = L::broadcast(L::sum_of_pairs(partial));
    const Floats d_logsumexp = L::broadcast(p.d_logsumexp ? floats(p.d_logsumexp, t)[0] : 0.0f);
    const Floats minus_d_entropy = L::broadcast(p.d_entropy ? -floats(p.d_entropy, t)[0] : 0.0f);
    const Floats entropy = L::broadcast(floats(p.entropy, t)[0]);
    for (int64_t e = 0; e < num_experts; e += kLanes) {
      const Floats probability = load(probabilities + e, num_experts - e);
      Floats d = L::add(L::sub(gradient(g, d_probabilities, e), dot), d_logsumexp);
      if (p.d_entropy) {
        // P log P is 0 to float32's last bit where P is not normal.
        const Floats log_p = log_of_positive<L>(L::max(L::broadcast(__FLT_MIN__), probability));
        d = L::fma(minus_d_entropy, L::add(log_p, entropy), d);
      }
      d = L::mul(probability, d);
      if (p.temperature != 1.0) d = L::div(d, L::broadcast(temperature_of(p.temperature)));
      if (num_experts - e >= kLanes) {
        L::store(d_logits + e, d);
      } else {
        L::store_first(d_logits + e, d, static_cast<int>(num_experts - e));
      }
    }
  }

  // The weights' part of some tokens first, then their rows: loading a vector right after its elements were stored one
  // by one stalls.
  void tokens(int64_t begin, int64_t end, float* scratch) const {
    const int64_t stride = padded(num_experts);
    for (int64_t first = begin; first < end; first += kMostLanes) {
      const int64_t last = first + kMostLanes < end ? first + kMostLanes : end;
      if (p.d_expert_weights) {
        for (int64_t t = first; t < last; ++t) add_weights(t, scratch + (t - first) * stride);
      }
      for (int64_t t = first; t < last; ++t) {
        if (p.token_mask == nullptr || p.token_mask[t]) {
          row(t, scratch + (t - first) * stride);
        } else {
          __builtin_memset(static_cast<Logit*>(p.d_logits) + t * num_experts, 0,
                           static_cast<size_t>(num_experts) * sizeof(Logit));
        }
      }
      if (p.d_expert_weights) {
        for (int64_t t = first; t < last; ++t) clear_weights(t, scratch + (t - first) * stride);
      }
    }
  }
};

}  // namespace
}  // namespace dynamic_moe
