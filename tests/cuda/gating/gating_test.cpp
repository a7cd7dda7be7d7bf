// SPDX-License-Identifier: Apache-2.0
// Numbers are compared with a float64 oracle, each element with its own bound; the selection is checked exactly against
// the rule applied to the probabilities that the kernel returned.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>

#include "device_gating.h"
#include "gating/gating_policy.h"

namespace dynamic_moe::testing {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

const std::vector<int32_t> kNumExperts = numbers_of_experts();

// Fewer tokens where they are long: the harness runs one thread at a time.
int64_t tokens_for(int32_t num_experts) { return num_experts > 256 ? 5 : 21; }

template <class Logit>
class CudaGating : public ::testing::Test {};
using LogitTypes = ::testing::Types<float, BFloat16, Float16>;
TYPED_TEST_SUITE(CudaGating, LogitTypes);

TYPED_TEST(CudaGating, MatchesTheOracleAndTheRuleForAnyNumberOfExperts) {
  for (const int32_t num_experts : kNumExperts) {
    for (const double deviation : {0.3, 1.0, 4.0, 30.0}) {
      SCOPED_TRACE(::testing::Message() << "E " << num_experts << " deviation " << deviation);
      const auto logits = random_logits<TypeParam>(tokens_for(num_experts), num_experts, deviation, 1);
      const Rule rule;
      const auto g = gate_on_device(logits, num_experts, rule);
      EXPECT_EQ(g.non_finite, 0);
      expect_numbers_match_the_oracle(logits, g, 1.0);
      expect_selection_follows_the_rule(g, rule);
    }
  }
}

TYPED_TEST(CudaGating, FollowsTheRuleForAnyThresholdAndCap) {
  for (const int32_t num_experts : {1, 3, 8, 31, 64, 130}) {
    const auto logits = random_logits<TypeParam>(11, num_experts, 1.0, 2);
    for (const double top_p : {1e-6, 0.4, 0.7, 0.999, 0.9999999, 1.0}) {
      for (const int32_t cap : {0, 1, 2, 5, 17}) {
        for (const bool released : {false, true}) {
          if (cap > num_experts) continue;
          SCOPED_TRACE(::testing::Message() << "E " << num_experts << " p " << top_p << " cap " << cap);
          const Rule rule{.top_p = top_p,
                          .threshold = released ? ThresholdRule::kReleased : ThresholdRule::kPaper,
                          .max_experts = cap,
                          .renormalize = cap % 2 == 1};
          expect_selection_follows_the_rule(gate_on_device(logits, num_experts, rule), rule);
        }
      }
    }
  }
}

TYPED_TEST(CudaGating, ReadsAThresholdInDeviceMemoryThere) {
  for (const int32_t num_experts : {3, 64}) {
    const auto logits = random_logits<TypeParam>(11, num_experts, 1.0, 2);
    for (const double top_p : {1e-6, 0.4, 0.999, 1.0}) {
      for (const ThresholdRule threshold : {ThresholdRule::kPaper, ThresholdRule::kReleased}) {
        SCOPED_TRACE(::testing::Message() << "E " << num_experts << " p " << top_p);
        const auto expected = gate_on_device(logits, num_experts, {.top_p = top_p, .threshold = threshold});
        DeviceBuffer<double> on_device(std::vector<double>{top_p});
        DeviceGating<TypeParam> device(logits, num_experts, {.top_p = 1.0, .threshold = threshold});
        device.params.device_top_p = on_device.data();
        device.run();
        const auto g = device.result();
        EXPECT_EQ(g.expert_ids, expected.expert_ids);
        EXPECT_EQ(g.expert_weights, expected.expert_weights);
      }
    }
  }
}

TYPED_TEST(CudaGating, TakesTheBestKWhateverK) {
  for (const int32_t num_experts : kNumExperts) {
    const auto logits = random_logits<TypeParam>(tokens_for(num_experts), num_experts, 2.0, 3);
    for (const int32_t k : {1, 2, 3, 8, 15, 60, 128}) {
      if (k > num_experts) continue;
      SCOPED_TRACE(::testing::Message() << "E " << num_experts << " k " << k);
      const Rule rule{.is_top_p = false, .max_experts = k, .renormalize = true, .temperature = 1.5};
      const auto g = gate_on_device(logits, num_experts, rule);
      expect_numbers_match_the_oracle(logits, g, 1.5);
      expect_selection_follows_the_rule(g, rule);
    }
  }
}

TYPED_TEST(CudaGating, SelectsAllExpertsOfAWideToken) {
  for (const int32_t num_experts : {1000, 1024}) {
    const Rule rule{.top_p = 1.0};
    const auto g = gate_on_device(random_logits<TypeParam>(2, num_experts, 1.0, 4), num_experts, rule);
    expect_selection_follows_the_rule(g, rule);
  }
}

TYPED_TEST(CudaGating, AnyNumberOfTokensGivesTheSameForEach) {
  for (const int32_t num_experts : {8, 33}) {
    const auto all = random_logits<TypeParam>(300, num_experts, 1.0, 5);
    const auto whole = gate_on_device(all, num_experts, {});
    for (const int64_t num_tokens : {1, 2, 3, 7, 15, 16, 17, 31, 63, 64, 65, 128, 257, 299}) {
      SCOPED_TRACE(::testing::Message() << "E " << num_experts << " T " << num_tokens);
      const std::vector<TypeParam> logits(all.begin(), all.begin() + num_tokens * num_experts);
      const auto g = gate_on_device(logits, num_experts, {});
      expect_numbers_match_the_oracle(logits, g, 1.0);
      EXPECT_TRUE(std::equal(g.expert_ids.begin(), g.expert_ids.end(), whole.expert_ids.begin()));
      EXPECT_TRUE(std::equal(g.expert_weights.begin(), g.expert_weights.end(), whole.expert_weights.begin()));
      EXPECT_TRUE(std::equal(g.entropy.begin(), g.entropy.end(), whole.entropy.begin()));
    }
  }
}

TYPED_TEST(CudaGating, NoTokensGiveZeroSums) {
  const auto g = gate_on_device(std::vector<TypeParam>{}, 5, {});
  EXPECT_THAT(g.tokens_per_expert, Each(0));
  EXPECT_THAT(g.probability_sum, Each(0));
  EXPECT_EQ(g.non_finite, 0);
}

// Few distinct values: most of the order is decided by the index.
TYPED_TEST(CudaGating, BreaksTiesByLowerIndex) {
  std::mt19937 random(6);
  for (const int32_t num_experts : kNumExperts) {
    std::vector<TypeParam> logits(static_cast<size_t>(num_experts * tokens_for(num_experts)));
    for (TypeParam& logit : logits) logit = to_logit<TypeParam>(static_cast<double>(random() % 3));
    SCOPED_TRACE(::testing::Message() << "E " << num_experts);
    for (const double top_p : {0.4, 0.9}) {
      const Rule rule{.top_p = num_experts > 256 ? top_p / 10 : top_p};
      expect_selection_follows_the_rule(gate_on_device(logits, num_experts, rule), rule);
    }
  }
}

TYPED_TEST(CudaGating, TheTwoRulesDifferWhereTheMassIsExactlyReached) {
  const std::vector<TypeParam> logits(16, to_logit<TypeParam>(0.25));
  const auto experts = [&](ThresholdRule threshold) {
    return gate_on_device(logits, 16, {.top_p = 0.5, .threshold = threshold}).experts_of(0);
  };
  EXPECT_THAT(experts(ThresholdRule::kPaper), ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
  EXPECT_THAT(experts(ThresholdRule::kReleased), ElementsAre(0, 1, 2, 3, 4, 5, 6, 7, 8));
}

TYPED_TEST(CudaGating, ATokenWithoutOneFiniteLargestLogitIsNaNAndDisturbsNoOther) {
  for (const int32_t num_experts : {2, 8, 16, 33, 257}) {
    SCOPED_TRACE(::testing::Message() << "E " << num_experts);
    const size_t experts = static_cast<size_t>(num_experts);
    const auto clean = random_logits<TypeParam>(40, num_experts, 1.0, 7);
    auto logits = clean;
    logits[3 * experts + 1] = to_logit<TypeParam>(kNaN);
    logits[17 * experts] = to_logit<TypeParam>(kInfinity);
    for (size_t e = 0; e < experts; ++e) logits[18 * experts + e] = to_logit<TypeParam>(-kInfinity);
    for (size_t e = 0; e < experts; ++e) logits[39 * experts + e] = to_logit<TypeParam>(kNaN);
    const std::vector<size_t> broken = {3, 17, 18, 39};
    const Rule rule{.renormalize = true};
    const auto g = gate_on_device(logits, num_experts, rule);
    const auto reference = gate_on_device(clean, num_experts, rule);
    EXPECT_EQ(g.non_finite, 4);
    std::vector<double> sum(experts);
    std::vector<int32_t> counts(experts);
    for (size_t t = 0; t < 40; ++t) {
      const bool is_broken = std::count(broken.begin(), broken.end(), t) > 0;
      ASSERT_EQ(std::isnan(g.entropy[t]), is_broken) << t;
      ASSERT_EQ(std::isnan(g.logsumexp[t]), is_broken) << t;
      for (size_t e = 0; e < experts; ++e) {
        const size_t i = t * experts + e;
        if (g.expert_ids[i] < num_experts) ++counts[static_cast<size_t>(g.expert_ids[i])];
        ASSERT_EQ(std::isnan(g.probabilities[i]), is_broken) << t;
        if (is_broken) {
          ASSERT_EQ(g.expert_ids[i], e == 0 ? 0 : num_experts) << t;
          ASSERT_EQ(std::isnan(g.expert_weights[i]), e == 0) << t;
          continue;
        }
        ASSERT_EQ(g.probabilities[i], reference.probabilities[i]) << t;
        ASSERT_EQ(g.expert_ids[i], reference.expert_ids[i]) << t;
        ASSERT_EQ(g.expert_weights[i], reference.expert_weights[i]) << t;
        sum[e] += g.probabilities[i];
      }
    }
    for (size_t e = 0; e < experts; ++e) EXPECT_NEAR(g.probability_sum[e], sum[e], 1e-5 * sum[e]);
    EXPECT_EQ(g.tokens_per_expert, counts);
  }
}

TYPED_TEST(CudaGating, MinusInfinityDisablesAnExpert) {
  for (const int32_t num_experts : {2, 8, 17, 64, 257}) {
    SCOPED_TRACE(::testing::Message() << "E " << num_experts);
    auto logits = random_logits<TypeParam>(9, num_experts, 1.0, 8);
    for (size_t i = 0; i < logits.size(); ++i) {
      if (i % static_cast<size_t>(num_experts) % 2 == 1) logits[i] = to_logit<TypeParam>(-kInfinity);
    }
    const Rule rule{.top_p = 0.9};
    const auto g = gate_on_device(logits, num_experts, rule);
    EXPECT_EQ(g.non_finite, 0);
    expect_numbers_match_the_oracle(logits, g, 1.0);
    expect_selection_follows_the_rule(g, rule);
    for (size_t e = 1; e < static_cast<size_t>(num_experts); e += 2) {
      EXPECT_EQ(g.tokens_per_expert[e], 0);
      EXPECT_EQ(g.probability_sum[e], 0);
    }
  }
}

TYPED_TEST(CudaGating, AMaskedTokenGetsNoExpertAndEntersNoSum) {
  for (const int32_t num_experts : {3, 8, 16, 33, 128}) {
    SCOPED_TRACE(::testing::Message() << "E " << num_experts);
    const size_t experts = static_cast<size_t>(num_experts);
    auto logits = random_logits<TypeParam>(45, num_experts, 1.0, 9);
    std::vector<uint8_t> mask(45);
    std::vector<TypeParam> kept;
    for (size_t t = 0; t < 45; ++t) {
      mask[t] = t % 3 == 1 || t > 40;
      const auto row = logits.begin() + static_cast<ptrdiff_t>(t * experts);
      if (mask[t]) kept.insert(kept.end(), row, row + num_experts);
    }
    logits[0] = to_logit<TypeParam>(kNaN);  // of a masked token: nobody's business
    const auto g = gate_on_device(logits, num_experts, {}, mask);
    const auto alone = gate_on_device(kept, num_experts, {});
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

// Beyond float32 on either side.
TYPED_TEST(CudaGating, ExtremeTemperaturesGiveOneExpertOrAll) {
  for (const int32_t num_experts : {3, 16, 50}) {
    auto logits = random_logits<TypeParam>(20, num_experts, 1.0, 10);
    for (size_t t = 0; t < 20; ++t) {  // no ties for the largest, and one expert disabled
      logits[t * static_cast<size_t>(num_experts)] = to_logit<TypeParam>(9.0);
      logits[t * static_cast<size_t>(num_experts) + 1] = to_logit<TypeParam>(-kInfinity);
    }
    const auto cold = gate_on_device(logits, num_experts, {.top_p = 0.9, .temperature = 1e-60});
    const auto hot = gate_on_device(logits, num_experts, {.top_p = 0.999, .temperature = 1e60});
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

TYPED_TEST(CudaGating, BuffersMayLieAnywhere) {
  for (const int32_t num_experts : {1, 8, 16, 31, 128, 256}) {
    for (const int32_t max_experts : {0, 1, 3, 4}) {
      if (max_experts > num_experts) continue;
      const auto logits = random_logits<TypeParam>(19, num_experts, 1.0, 11);
      std::vector<uint8_t> mask(19, 1);
      mask[7] = 0;
      const Rule rule{.max_experts = max_experts};
      const auto aligned = gate_on_device(logits, num_experts, rule, mask);
      const auto shifted = gate_on_device(logits, num_experts, rule, mask, 1);
      EXPECT_TRUE(same_bits(shifted, aligned)) << "E " << num_experts << " K " << max_experts;
    }
  }
}

TYPED_TEST(CudaGating, IsTheSameInEveryRun) {
  for (const int32_t num_experts : {16, 100}) {
    const auto logits = random_logits<TypeParam>(150, num_experts, 1.0, 12);
    const auto first = gate_on_device(logits, num_experts, {});
    for (int run = 1; run < 4; ++run) {
#if defined(DYNAMIC_MOE_SIMT)
      const auto options = simt::options();
      simt::options().seed = static_cast<uint64_t>(run);
#endif
      EXPECT_TRUE(same_bits(gate_on_device(logits, num_experts, {}), first)) << "E " << num_experts << " run " << run;
#if defined(DYNAMIC_MOE_SIMT)
      simt::options() = options;
#endif
    }
  }
}

TEST(CudaGatingLimits, AreNamed) {
  EXPECT_THAT([] { gate_on_device(std::vector<float>(1025), 1025, {.max_experts = 2}); },
              ThrowsMessage<std::invalid_argument>(HasSubstr("num_experts must be at most 1024 on CUDA, got 1025")));
  EXPECT_THAT(
      [] {
        DeviceGating<float> device(std::vector<float>(8), 4, {});
        device.params.logits_dtype = DType::kFloat64;
        device.run();
      },
      ThrowsMessage<std::invalid_argument>(HasSubstr("got float64")));
  EXPECT_THAT(
      [] {
        DeviceGating<float> device(std::vector<float>(8), 4, {});
        gating_cuda(device.params, device.non_finite.data(), {device.workspace.get().data, 8}, Stream{});
      },
      ThrowsMessage<std::invalid_argument>(HasSubstr("workspace must have 36 bytes, got 8")));
}

TEST(CudaGatingPolicy, HoldsEveryExpertAndWastesLessThanHalfOfTheLanes) {
  for (int num_experts = 1; num_experts <= kMaxGatingExperts; ++num_experts) {
    const GatingPolicy policy = kGatingPolicies[gating_policy_of(num_experts)];
    const int capacity = policy.lanes * policy.experts_per_lane;
    ASSERT_GE(capacity, num_experts);
    if (num_experts > 8) {
      ASSERT_LT(capacity, 2 * num_experts);
    }
    ASSERT_EQ(32 % policy.lanes, 0);
    ASSERT_LE(gating_shared_bytes(policy, num_experts), size_t{48} << 10);
  }
}

TEST(CudaGatingPolicy, ChunksAreWholeRoundsOfABlock) {
  for (const GatingPolicy policy : kGatingPolicies) {
    for (const int64_t num_tokens : {int64_t{1}, int64_t{1000}, int64_t{16384}, int64_t{1} << 20, int64_t{1} << 31}) {
      const int64_t tokens = gating_tokens_per_chunk(num_tokens, policy);
      EXPECT_EQ(tokens % (kGatingWarps * tokens_per_warp(policy)), 0);
      EXPECT_GE(tokens, 16);
      EXPECT_LE(tokens, 512);
      EXPECT_LT(num_tokens / tokens, int64_t{1} << 31);
    }
  }
}

#if defined(DYNAMIC_MOE_SIMT)

// What must be moved is moved once, and every request touches whole sectors.
TEST(CudaGatingCost, LogitsAreReadOnceAndResultsWrittenOnce) {
  for (const int32_t num_experts : {16, 64, 256}) {
    SCOPED_TRACE(::testing::Message() << "E " << num_experts);
    constexpr uint64_t kTokens = 64;
    constexpr int32_t kSlots = 8;
    const auto experts = static_cast<uint64_t>(num_experts);
    DeviceGating<float> device(random_logits<float>(kTokens, num_experts, 1.0, 13), num_experts,
                               {.max_experts = kSlots});
    const auto counted = simt::counters_of([&] { device.run(); });
    const GatingPolicy policy = kGatingPolicies[gating_policy_of(num_experts)];
    const uint64_t chunks = kTokens / static_cast<uint64_t>(gating_tokens_per_chunk(kTokens, policy));
    const uint64_t warps = kTokens / static_cast<uint64_t>(tokens_per_warp(policy));  // rounds of all warps
    const uint64_t row_sectors = experts / 8;
    EXPECT_EQ(counted.launches, 2u);
    EXPECT_EQ(counted.blocks, chunks + (experts + 31) / 32);
    EXPECT_EQ(counted.barriers, 5 * chunks + (experts + 31) / 32);
    // 8 tokens of a warp stage their slots 8 apart: two share a bank, in each of two stores for each expert taken.
    EXPECT_LE(counted.bank_conflicts, num_experts == 16 ? 2 * warps * kSlots : 0);
    // Logits; then sums, counts and non-finite tokens of the chunks.
    EXPECT_EQ(counted.global_read_sectors, kTokens * row_sectors + 2 * chunks * row_sectors + 1);
    // Probabilities, ids and weights; entropy and logsumexp, in which tokens of a warp may share a sector; partial sums
    // and their totals, with one non-finite count each.
    const uint64_t token_sectors = std::max<uint64_t>(warps, kTokens / 8);
    EXPECT_EQ(counted.global_write_sectors, kTokens * row_sectors + 2 * kTokens + 2 * token_sectors +
                                                chunks * (2 * row_sectors + 1) + 2 * row_sectors + 1);
    const auto counts = device.counts.download();
    EXPECT_EQ(counted.atomics, std::accumulate(counts.begin(), counts.end(), uint64_t{0}));
  }
}

#endif

}  // namespace
}  // namespace dynamic_moe::testing
