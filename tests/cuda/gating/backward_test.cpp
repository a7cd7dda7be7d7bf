// SPDX-License-Identifier: Apache-2.0
// The gradient is compared with the formula in float64, each element with a bound from the terms that cancel in it.
#include <gtest/gtest.h>

#include "device_gating.h"

namespace dynamic_moe::testing {
namespace {

template <class Logit>
class CudaGatingBackward : public ::testing::Test {};
using LogitTypes = ::testing::Types<float, BFloat16, Float16>;
TYPED_TEST_SUITE(CudaGatingBackward, LogitTypes);

TYPED_TEST(CudaGatingBackward, MatchesTheFormulaForAnyNumberOfExperts) {
  for (const int32_t num_experts : numbers_of_experts()) {
    for (const bool renormalize : {false, true}) {
      const Rule rule{.top_p = 0.6, .renormalize = renormalize, .temperature = renormalize ? 2.5 : 1.0};
      const auto g =
          gate_on_device(random_logits<TypeParam>(num_experts > 256 ? 3 : 19, num_experts, 3.0, 13), num_experts, rule);
      for (const unsigned which : {0u, 1u, 2u, 4u, 8u, 16u, 5u, 29u, 31u}) {
        SCOPED_TRACE(::testing::Message() << "E " << num_experts << " outputs " << which);
        const auto d = random_gradients(g, which, 14);
        expect_gradient_matches(g, d, rule, backward_on_device(g, d, rule));
      }
    }
  }
}

TYPED_TEST(CudaGatingBackward, AnyNumberOfTokensIsCovered) {
  for (const int32_t num_experts : {3, 16, 48}) {
    for (const int64_t num_tokens : {0, 1, 2, 4, 5, 31, 64, 65, 300}) {
      SCOPED_TRACE(::testing::Message() << "E " << num_experts << " T " << num_tokens);
      const Rule rule{.is_top_p = false, .max_experts = 2, .renormalize = true};
      const auto g = gate_on_device(random_logits<TypeParam>(num_tokens, num_experts, 1.0, 15), num_experts, rule);
      const auto d = random_gradients(g, 31, 16);
      expect_gradient_matches(g, d, rule, backward_on_device(g, d, rule));
    }
  }
}

TYPED_TEST(CudaGatingBackward, AMaskedTokenGetsZero) {
  for (const int32_t num_experts : {5, 16, 100}) {
    std::vector<uint8_t> mask(20, 1);
    mask[3] = mask[19] = 0;
    const auto g = gate_on_device(random_logits<TypeParam>(20, num_experts, 1.0, 17), num_experts, {}, mask);
    const auto d_logits = backward_on_device(g, random_gradients(g, 31, 18), {}, mask);
    for (size_t i = 0; i < d_logits.size(); ++i) {
      if (mask[i / static_cast<size_t>(num_experts)] == 0) {
        ASSERT_EQ(to_double(d_logits[i]), 0);
      }
    }
    EXPECT_NE(to_double(d_logits[static_cast<size_t>(num_experts) * 4]), 0);
  }
}

TYPED_TEST(CudaGatingBackward, ANonFiniteTokenIsNaNInItsOwnRowOnly) {
  for (const int32_t num_experts : {2, 16, 100}) {
    auto logits = random_logits<TypeParam>(20, num_experts, 1.0, 19);
    const Rule rule{.renormalize = true};
    const auto clean = gate_on_device(logits, num_experts, rule);
    logits[7 * static_cast<size_t>(num_experts)] = to_logit<TypeParam>(std::numeric_limits<double>::quiet_NaN());
    const auto g = gate_on_device(logits, num_experts, rule);
    const auto d = random_gradients(g, 31, 20);
    const auto d_logits = backward_on_device(g, d, rule);
    const auto expected = backward_on_device(clean, d, rule);
    for (size_t i = 0; i < d_logits.size(); ++i) {
      if (i / static_cast<size_t>(num_experts) == 7) {
        ASSERT_TRUE(std::isnan(to_double(d_logits[i])));
      } else {
        ASSERT_EQ(to_double(d_logits[i]), to_double(expected[i]));
      }
    }
  }
}

TYPED_TEST(CudaGatingBackward, BuffersMayLieAnywhere) {
  for (const int32_t num_experts : {4, 31, 64, 256}) {
    const auto g = gate_on_device(random_logits<TypeParam>(19, num_experts, 1.0, 21), num_experts, {});
    const auto d = random_gradients(g, 31, 22);
    EXPECT_TRUE(same_bytes(backward_on_device(g, d, {}, {}, 1), backward_on_device(g, d, {}))) << num_experts;
  }
}

}  // namespace
}  // namespace dynamic_moe::testing
