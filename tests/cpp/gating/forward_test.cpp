// SPDX-License-Identifier: Apache-2.0
// Probabilities, entropy, logsumexp and sums are compared with a float64 oracle, each element with its own bound; the
// selection is then checked exactly against the rule applied to the probabilities that the kernel returned.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "common/isa.h"
#include "common/parallel.h"
#include "gating_oracle.h"

namespace dynamic_moe::testing {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

const std::vector<int32_t> kNumExperts = {1, 2, 3, 7, 8, 9, 16, 17, 31, 32, 33, 64, 100, 128, 257, 1024};

template <class Logit>
class Gating : public ::testing::Test {};
using LogitTypes = ::testing::Types<float, BFloat16, Float16, double>;
TYPED_TEST_SUITE(Gating, LogitTypes);

TYPED_TEST(Gating, MatchesTheOracleAndTheRuleForAnyNumberOfExperts) {
  for (const int32_t num_experts : kNumExperts) {
    for (const double deviation : {0.3, 1.0, 4.0, 30.0}) {
      SCOPED_TRACE(::testing::Message() << "E " << num_experts << " deviation " << deviation);
      const auto logits = random_logits<TypeParam>(37, num_experts, deviation, 1);
      const Rule rule;
      const auto g = gate(logits, num_experts, rule);
      EXPECT_EQ(g.non_finite, 0);
      expect_numbers_match_the_oracle(logits, g, 1.0);
      expect_selection_follows_the_rule(g, rule);
    }
  }
}

TYPED_TEST(Gating, FollowsTheRuleForAnyThresholdAndCap) {
  for (const int32_t num_experts : kNumExperts) {
    const auto logits = random_logits<TypeParam>(19, num_experts, 1.0, 2);
    for (const double top_p : {1e-6, 0.1, 0.4, 0.7, 0.95, 0.999, 0.9999999, 1.0}) {
      for (const int32_t cap : {0, 1, 2, 5, 16, 17, 40}) {
        for (const bool released : {false, true}) {
          if (cap > num_experts) continue;
          SCOPED_TRACE(::testing::Message() << "E " << num_experts << " p " << top_p << " cap " << cap);
          const Rule rule{.top_p = top_p,
                          .threshold = released ? ThresholdRule::kReleased : ThresholdRule::kPaper,
                          .max_experts = cap,
                          .renormalize = cap % 2 == 1};
          expect_selection_follows_the_rule(gate(logits, num_experts, rule), rule);
        }
      }
    }
  }
}

TYPED_TEST(Gating, TakesTheBestKWhateverK) {
  for (const int32_t num_experts : kNumExperts) {
    const auto logits = random_logits<TypeParam>(21, num_experts, 2.0, 3);
    for (const int32_t k : {1, 2, 3, 8, 15, 16, 17, 60, 128}) {
      if (k > num_experts) continue;
      SCOPED_TRACE(::testing::Message() << "E " << num_experts << " k " << k);
      const Rule rule{.is_top_p = false, .max_experts = k, .renormalize = true, .temperature = 1.5};
      const auto g = gate(logits, num_experts, rule);
      expect_numbers_match_the_oracle(logits, g, 1.5);
      expect_selection_follows_the_rule(g, rule);
    }
  }
}

// Few distinct values: most of the order is decided by the index.
TYPED_TEST(Gating, BreaksTiesByLowerIndex) {
  std::mt19937 random(4);
  for (const int32_t num_experts : kNumExperts) {
    std::vector<TypeParam> logits(static_cast<size_t>(num_experts) * 33);
    for (TypeParam& logit : logits) logit = to_logit<TypeParam>(static_cast<double>(random() % 3));
    for (const double top_p : {0.4, 0.97}) {
      SCOPED_TRACE(::testing::Message() << "E " << num_experts << " p " << top_p);
      const Rule rule{.top_p = top_p};
      expect_selection_follows_the_rule(gate(logits, num_experts, rule), rule);
    }
    const Rule top_k{.is_top_p = false, .max_experts = (num_experts + 1) / 2};
    expect_selection_follows_the_rule(gate(logits, num_experts, top_k), top_k);
  }
}

TYPED_TEST(Gating, UniformTokensGetExpertsInOrderOfIndex) {
  const std::vector<TypeParam> logits(16, to_logit<TypeParam>(0.25));
  const auto count = [&](double p, ThresholdRule threshold) {
    const auto experts = gate(logits, 16, {.top_p = p, .threshold = threshold}).experts_of(0);
    for (size_t k = 0; k < experts.size(); ++k) EXPECT_EQ(experts[k], static_cast<int32_t>(k));
    return experts.size();
  };
  EXPECT_EQ(count(0.4, ThresholdRule::kPaper), 7u);
  EXPECT_EQ(count(0.4, ThresholdRule::kReleased), 7u);
  EXPECT_EQ(count(0.5, ThresholdRule::kPaper), 8u);     // the eighth expert reaches exactly p
  EXPECT_EQ(count(0.5, ThresholdRule::kReleased), 9u);  // which the released code does not accept
}

TYPED_TEST(Gating, ReproducesTheWorkedExample) {
  std::vector<TypeParam> logits;
  for (const double x : {2.0, 0.0, -1.0, 0.5, 0.2, 0.1, 0.0, -0.1, 1.0, 0.8, 0.0, -2.0, -0.5, 0.9, 0.7, 0.3}) {
    logits.push_back(to_logit<TypeParam>(x));
  }
  const double tolerance = sizeof(TypeParam) == 2 ? 2e-3 : 1e-6;
  const auto g = gate(logits, 4, {.top_p = 0.4});
  EXPECT_THAT(g.experts_of(0), ElementsAre(0));
  EXPECT_THAT(g.experts_of(1), ElementsAre(0, 1));
  EXPECT_THAT(g.experts_of(2), ElementsAre(0));
  EXPECT_THAT(g.experts_of(3), ElementsAre(1, 2));
  EXPECT_THAT(g.tokens_per_expert, ElementsAre(3, 2, 1, 0));
  const std::vector<double> probabilities = {0.710100, 0.096102, 0.035354, 0.158445, 0.288651, 0.261183,
                                             0.236328, 0.213838, 0.447148, 0.366094, 0.164496, 0.022262,
                                             0.094332, 0.382535, 0.313193, 0.209940};
  for (size_t i = 0; i < probabilities.size(); ++i) EXPECT_NEAR(g.probabilities[i], probabilities[i], tolerance);
  const std::vector<double> entropies = {0.878281, 1.380071, 1.109368, 1.281602};
  for (size_t t = 0; t < 4; ++t) EXPECT_NEAR(g.entropy[t], entropies[t], 4 * tolerance);
  const std::vector<double> mean = {0.385058, 0.276478, 0.187343, 0.151121};
  for (size_t e = 0; e < 4; ++e) EXPECT_NEAR(g.probability_sum[e] / 4, mean[e], tolerance);

  const auto at_06 = gate(logits, 4, {.top_p = 0.6});
  EXPECT_THAT(at_06.experts_of(1), ElementsAre(0, 1, 2));
  EXPECT_THAT(at_06.experts_of(2), ElementsAre(0, 1));
  const auto at_09 = gate(logits, 4, {.top_p = 0.9});
  EXPECT_THAT(at_09.experts_of(0), ElementsAre(0, 3, 1));
  EXPECT_THAT(at_09.experts_of(1), ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(at_09.experts_of(2), ElementsAre(0, 1, 2));
  EXPECT_THAT(at_09.experts_of(3), ElementsAre(1, 2, 3));
}

TYPED_TEST(Gating, ATokenWithoutOneFiniteLargestLogitIsNaNAndDisturbsNoOther) {
  for (const int32_t num_experts : {2, 8, 16, 32, 33, 257}) {
    SCOPED_TRACE(::testing::Message() << "E " << num_experts);
    const size_t experts = static_cast<size_t>(num_experts);
    const auto clean = random_logits<TypeParam>(40, num_experts, 1.0, 5);
    auto logits = clean;
    logits[3 * experts + 1] = to_logit<TypeParam>(kNaN);
    logits[17 * experts] = to_logit<TypeParam>(kInfinity);
    for (size_t e = 0; e < experts; ++e) logits[18 * experts + e] = to_logit<TypeParam>(-kInfinity);
    for (size_t e = 0; e < experts; ++e) logits[39 * experts + e] = to_logit<TypeParam>(kNaN);
    const std::vector<int64_t> broken = {3, 17, 18, 39};
    const Rule rule{.renormalize = true};
    const auto g = gate(logits, num_experts, rule);
    const auto reference = gate(clean, num_experts, rule);
    EXPECT_EQ(g.non_finite, 4);
    std::vector<double> sum(experts);
    for (int64_t t = 0; t < 40; ++t) {
      const size_t row = static_cast<size_t>(t) * experts;
      const bool is_broken = std::count(broken.begin(), broken.end(), t) > 0;
      EXPECT_EQ(std::isnan(g.entropy[static_cast<size_t>(t)]), is_broken);
      EXPECT_EQ(std::isnan(g.logsumexp[static_cast<size_t>(t)]), is_broken);
      for (size_t e = 0; e < experts; ++e) {
        ASSERT_EQ(std::isnan(g.probabilities[row + e]), is_broken) << t;
        if (!is_broken) {
          ASSERT_EQ(g.probabilities[row + e], reference.probabilities[row + e]) << t;
          ASSERT_EQ(g.expert_ids[row + e], reference.expert_ids[row + e]) << t;
          ASSERT_EQ(g.expert_weights[row + e], reference.expert_weights[row + e]) << t;
          sum[e] += g.probabilities[row + e];
        } else {
          ASSERT_EQ(g.expert_ids[row + e], e == 0 ? 0 : num_experts) << t;
          ASSERT_EQ(std::isnan(g.expert_weights[row + e]), e == 0) << t;
        }
      }
    }
    for (size_t e = 0; e < experts; ++e) EXPECT_NEAR(g.probability_sum[e], sum[e], 1e-5 * (1 + sum[e]));
    const int32_t selected = std::accumulate(g.tokens_per_expert.begin(), g.tokens_per_expert.end(), 0);
    EXPECT_EQ(selected,
              std::count_if(g.expert_ids.begin(), g.expert_ids.end(), [&](int32_t id) { return id < num_experts; }));
  }
}

TYPED_TEST(Gating, MinusInfinityDisablesAnExpert) {
  for (const int32_t num_experts : {2, 8, 16, 17, 64, 257}) {
    SCOPED_TRACE(::testing::Message() << "E " << num_experts);
    auto logits = random_logits<TypeParam>(25, num_experts, 1.0, 6);
    for (size_t i = 0; i < logits.size(); ++i) {
      if (i % static_cast<size_t>(num_experts) % 2 == 1) logits[i] = to_logit<TypeParam>(-kInfinity);
    }
    const Rule rule{.top_p = 0.9};
    const auto g = gate(logits, num_experts, rule);
    EXPECT_EQ(g.non_finite, 0);
    expect_numbers_match_the_oracle(logits, g, 1.0);
    expect_selection_follows_the_rule(g, rule);
    for (size_t e = 1; e < static_cast<size_t>(num_experts); e += 2) {
      EXPECT_EQ(g.tokens_per_expert[e], 0);
      EXPECT_EQ(g.probability_sum[e], 0);
    }
  }
}

TYPED_TEST(Gating, AMaskedTokenGetsNoExpertAndEntersNoSum) {
  for (const int32_t num_experts : {3, 8, 16, 32, 128}) {
    SCOPED_TRACE(::testing::Message() << "E " << num_experts);
    const size_t experts = static_cast<size_t>(num_experts);
    auto logits = random_logits<TypeParam>(45, num_experts, 1.0, 7);
    std::vector<uint8_t> mask(45);
    std::vector<TypeParam> kept;
    for (size_t t = 0; t < 45; ++t) {
      mask[t] = t % 3 == 1 || t > 40;
      const auto row = logits.begin() + static_cast<ptrdiff_t>(t * experts);
      if (mask[t]) kept.insert(kept.end(), row, row + num_experts);
    }
    logits[0] = to_logit<TypeParam>(kNaN);  // of a masked token: nobody's business
    const auto g = gate(logits, num_experts, {}, mask);
    const auto alone = gate(kept, num_experts, {});
    EXPECT_EQ(g.non_finite, 0);
    EXPECT_EQ(g.tokens_per_expert, alone.tokens_per_expert);
    for (size_t e = 0; e < experts; ++e) EXPECT_NEAR(g.probability_sum[e], alone.probability_sum[e], 1e-5);
    size_t position = 0;
    for (size_t t = 0; t < 45; ++t) {
      for (size_t e = 0; e < experts; ++e) {
        const size_t i = t * experts + e, j = position * experts + e;
        ASSERT_EQ(g.probabilities[i], mask[t] ? alone.probabilities[j] : 0);
        ASSERT_EQ(g.expert_ids[i], mask[t] ? alone.expert_ids[j] : num_experts);
        ASSERT_EQ(g.expert_weights[i], mask[t] ? alone.expert_weights[j] : 0);
      }
      ASSERT_EQ(g.entropy[t], mask[t] ? alone.entropy[position] : 0);
      ASSERT_EQ(g.logsumexp[t], mask[t] ? alone.logsumexp[position] : 0);
      position += mask[t];
    }
  }
}

TYPED_TEST(Gating, AOneHotTokenHasEntropyZero) {
  for (const int32_t num_experts : {1, 2, 16, 40, 300}) {
    std::vector<TypeParam> logits(static_cast<size_t>(num_experts) * 17, to_logit<TypeParam>(-30000.0));
    for (size_t t = 0; t < 17; ++t) logits[t * static_cast<size_t>(num_experts)] = to_logit<TypeParam>(30000.0);
    const auto g = gate(logits, num_experts, {});
    EXPECT_THAT(g.entropy, Each(0));
    for (size_t t = 0; t < 17; ++t) EXPECT_THAT(g.experts_of(static_cast<int64_t>(t)), ElementsAre(0));
  }
}

// Beyond float32 on either side.
TYPED_TEST(Gating, ExtremeTemperaturesGiveOneExpertOrAll) {
  for (const int32_t num_experts : {3, 16, 50}) {
    auto logits = random_logits<TypeParam>(20, num_experts, 1.0, 22);
    for (size_t t = 0; t < 20; ++t) {  // no ties for the largest, and one expert disabled
      logits[t * static_cast<size_t>(num_experts)] = to_logit<TypeParam>(9.0);
      logits[t * static_cast<size_t>(num_experts) + 1] = to_logit<TypeParam>(-kInfinity);
    }
    const auto cold = gate(logits, num_experts, {.top_p = 0.9, .temperature = 1e-60});
    const auto hot = gate(logits, num_experts, {.top_p = 0.999, .temperature = 1e60});
    EXPECT_EQ(cold.non_finite, 0);
    EXPECT_EQ(hot.non_finite, 0);
    for (size_t t = 0; t < 20; ++t) {
      EXPECT_THAT(cold.experts_of(static_cast<int64_t>(t)), ElementsAre(0));
      EXPECT_EQ(cold.entropy[t], 0);
      EXPECT_EQ(hot.experts_of(static_cast<int64_t>(t)).size(), static_cast<size_t>(num_experts - 1));
      EXPECT_NEAR(hot.entropy[t], std::log(num_experts - 1.0), 1e-6);
    }
  }
}

TYPED_TEST(Gating, NoTokensGiveZeroSums) {
  const auto g = gate(std::vector<TypeParam>{}, 5, {});
  EXPECT_THAT(g.tokens_per_expert, Each(0));
  EXPECT_THAT(g.probability_sum, Each(0));
  EXPECT_EQ(g.non_finite, 0);
}

TYPED_TEST(Gating, IsTheSameOnAnyNumberOfThreads) {
  for (const int32_t num_experts : {5, 16, 100}) {
    const auto logits = random_logits<TypeParam>(2000, num_experts, 1.0, 8);
    use_standard_threads(1);
    const auto expected = gate(logits, num_experts, {});
    for (const int threads : {2, 3, 7}) {
      use_standard_threads(threads);
      EXPECT_TRUE(same_bits(gate(logits, num_experts, {}), expected)) << "E " << num_experts << " threads " << threads;
    }
    use_standard_threads(1);
  }
}

TYPED_TEST(Gating, IsTheSameOnEveryCpuLevel) {
  for (const int32_t num_experts : kNumExperts) {
    for (const double deviation : {1.0, 8.0, 40.0}) {
      auto logits = random_logits<TypeParam>(77, num_experts, deviation, 9);
      // At 40, exponentials are subnormal; in half of the tokens all of them are just that, and none is 0.
      for (size_t i = 0; deviation == 40.0 && i < logits.size() / 2; ++i) {
        logits[i] = to_logit<TypeParam>(i % static_cast<size_t>(num_experts) == 3 ? 88.0 : to_double(logits[i]) / 1e3);
      }
      logits[0] = to_logit<TypeParam>(kNaN);
      for (const double temperature : {1.0, 0.7}) {
        for (const bool is_top_p : {true, false}) {
          const Rule rule{.is_top_p = is_top_p,
                          .max_experts = is_top_p ? 0 : std::min(num_experts, 4),
                          .renormalize = true,
                          .temperature = temperature};
          set_isa(Isa::kScalar);
          const auto expected = gate(logits, num_experts, rule);
          for (const Isa isa : supported_isas()) {
            set_isa(isa);
            EXPECT_TRUE(same_bits(gate(logits, num_experts, rule), expected))
                << isa_name(isa) << " E " << num_experts << " deviation " << deviation;
          }
        }
      }
    }
  }
  reset_isa();
}

// One spike over a flat bulk: the estimate of how many experts a token needs is far off.
TYPED_TEST(Gating, SelectsEnoughExpertsWhereTheEstimateIsTooLow) {
  for (const int32_t num_experts : {33, 128, 1000}) {
    auto logits = random_logits<TypeParam>(50, num_experts, 0.01, 10);
    for (size_t t = 0; t < 50; ++t) {
      logits[t * static_cast<size_t>(num_experts) + t % 30] = to_logit<TypeParam>(std::log(0.4 * num_experts));
    }
    for (const double top_p : {0.3, 0.4, 0.6, 0.9}) {
      const Rule rule{.top_p = top_p};
      expect_selection_follows_the_rule(gate(logits, num_experts, rule), rule);
    }
  }
}

}  // namespace
}  // namespace dynamic_moe::testing
