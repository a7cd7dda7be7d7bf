// SPDX-License-Identifier: Apache-2.0
// Gating on buffers whose surroundings may not be touched, compared with the same on ordinary ones. Buffers of 2 MiB
// and more that are aligned to cache lines are written around the cache.
#include <gtest/gtest.h>

#include <algorithm>

#include "common/parallel.h"
#include "gating_problem.h"
#include "support/fenced.h"

namespace dynamic_moe::testing {
namespace {

template <class Logit>
class GatingBuffers : public ::testing::Test {};
using LogitTypes = ::testing::Types<float, BFloat16, Float16, double>;
TYPED_TEST_SUITE(GatingBuffers, LogitTypes);

template <class T>
Fenced<T> frozen(const std::vector<T>& values, Placement placement) {
  Fenced<T> buffer(static_cast<int64_t>(values.size()), placement);
  std::copy(values.begin(), values.end(), buffer.data());
  buffer.freeze();
  return buffer;
}

template <class T>
bool holds(const Fenced<T>& buffer, const std::vector<T>& values) {
  return buffer.surroundings_intact() && same_bits(buffer.span(), std::span<const T>(values));
}

template <class Logit>
void expect_forward_stays_inside(const std::vector<Logit>& logits, const Rule& rule, const std::vector<uint8_t>& mask,
                                 const Gated<Logit>& g, Placement placement) {
  using Real = RealOf<Logit>;
  const auto size = [](const auto& values) { return static_cast<int64_t>(values.size()); };
  const auto logits_in = frozen(logits, placement);
  const auto mask_in = frozen(mask, placement);
  Fenced<int32_t> ids(size(g.expert_ids), placement), counts(size(g.tokens_per_expert), placement);
  Fenced<Real> weights(size(g.expert_weights), placement), probabilities(size(g.probabilities), placement);
  Fenced<Real> sum(size(g.probability_sum), placement), entropy(size(g.entropy), placement);
  Fenced<Real> logsumexp(size(g.logsumexp), placement);
  gating_cpu({.logits = logits_in.data(),
              .token_mask = mask_in.data(),
              .expert_ids = ids.data(),
              .expert_weights = weights.data(),
              .tokens_per_expert = counts.data(),
              .probabilities = probabilities.data(),
              .probability_sum = sum.data(),
              .entropy = entropy.data(),
              .logsumexp = logsumexp.data(),
              .num_tokens = g.num_tokens,
              .num_experts = g.num_experts,
              .max_experts = g.max_experts,
              .is_top_p = rule.is_top_p,
              .top_p = rule.top_p,
              .rule = rule.threshold,
              .renormalize = rule.renormalize,
              .temperature = rule.temperature,
              .logits_dtype = dtype_of<Logit>()});
  EXPECT_TRUE(holds(ids, g.expert_ids));
  EXPECT_TRUE(holds(weights, g.expert_weights));
  EXPECT_TRUE(holds(counts, g.tokens_per_expert));
  EXPECT_TRUE(holds(probabilities, g.probabilities));
  EXPECT_TRUE(holds(sum, g.probability_sum));
  EXPECT_TRUE(holds(entropy, g.entropy));
  EXPECT_TRUE(holds(logsumexp, g.logsumexp));
}

template <class Logit>
void expect_backward_stays_inside(const Gated<Logit>& g, Placement placement) {
  using Real = RealOf<Logit>;
  const auto probabilities = frozen(g.probabilities, placement);
  const auto ids = frozen(g.expert_ids, placement);
  const auto entropy = frozen(g.entropy, placement);
  const auto d_weights = frozen(g.expert_weights, placement);  // any numbers will do
  const auto d_sum = frozen(g.probability_sum, placement);
  Fenced<Logit> d_logits(static_cast<int64_t>(g.probabilities.size()), placement);
  gating_backward_cpu({.probabilities = probabilities.data(),
                       .expert_ids = ids.data(),
                       .entropy = entropy.data(),
                       .token_mask = nullptr,
                       .d_expert_weights = d_weights.data(),
                       .d_probabilities = probabilities.data(),
                       .d_probability_sum = d_sum.data(),
                       .d_entropy = entropy.data(),
                       .d_logsumexp = entropy.data(),
                       .d_logits = d_logits.data(),
                       .num_tokens = g.num_tokens,
                       .num_experts = g.num_experts,
                       .max_experts = g.max_experts,
                       .renormalize = false,
                       .temperature = 1.0,
                       .logits_dtype = dtype_of<Logit>()});
  EXPECT_TRUE(d_logits.surroundings_intact());
  const bool written = std::none_of(d_logits.span().begin(), d_logits.span().end(),
                                    [](Logit value) { return std::isnan(static_cast<Real>(to_double(value))); });
  EXPECT_TRUE(written);  // they start as NaN
}

TYPED_TEST(GatingBuffers, NothingBesideThemIsReadOrWritten) {
  for (const int32_t num_experts : {1, 3, 8, 15, 16, 17, 32, 33, 64, 130}) {
    for (const int32_t max_experts : {0, 2, 9}) {
      if (max_experts > num_experts) continue;
      const Rule rule{.max_experts = max_experts, .renormalize = true};
      const auto logits = random_logits<TypeParam>(21, num_experts, 1.0, 1);
      std::vector<uint8_t> mask(21, 1);
      mask[20] = mask[4] = 0;
      const auto g = gate(logits, num_experts, rule, mask);
      for (const Placement placement : kPlacements) {
        SCOPED_TRACE(::testing::Message() << "E " << num_experts << " K " << max_experts);
        expect_forward_stays_inside(logits, rule, mask, g, placement);
        expect_backward_stays_inside(g, placement);
      }
    }
  }
}

TYPED_TEST(GatingBuffers, LargeOnesHoldTheSame) {
  for (const int32_t num_experts : {16, 32, 64}) {
    const int64_t num_tokens =
        (int64_t{1} << 20) / num_experts - 7;  // 4 MiB of probabilities, no whole number of groups
    auto logits = random_logits<TypeParam>(num_tokens, num_experts, 1.0, 2);
    logits[40 * static_cast<size_t>(num_experts)] = to_logit<TypeParam>(std::numeric_limits<double>::quiet_NaN());
    // A token that needs many experts, among others that need few.
    const auto flat = logits.begin() + 200 * num_experts;
    std::fill(flat, flat + num_experts, to_logit<TypeParam>(0.0));
    std::vector<uint8_t> mask(static_cast<size_t>(num_tokens), 1);
    mask[77] = 0;
    const auto g = gate(logits, num_experts, {}, mask);
    use_standard_threads(2);
    expect_forward_stays_inside(logits, {}, mask, g, Placement::kEndAtFence);
    use_standard_threads(1);
  }
}

}  // namespace
}  // namespace dynamic_moe::testing
