// SPDX-License-Identifier: Apache-2.0
// The expert pass on the device against one loop over rows in float64.
#include <gtest/gtest.h>

#include "device_pass.h"

namespace dynamic_moe::testing {
namespace {

// Up to 16 rows per expert on average, up to 64, more: each has kernels of its own.
const Load kFew{"groups of 5, 0, 1, 17 and 3 rows", {5, 0, 1, 17, 3}, 11};
const Load kSome{"groups of 64, 0, 1 and 65 rows", {64, 0, 1, 65}, 90};
const Load kMany{"groups of 128, 1 and 131 rows", {128, 1, 131}, 170};
const Load kOneRow{"one row", {1}, 1};
const Load kNoRow{"no row", {0, 0}, 5};
const Load k300Rows{"300 rows", {300}, 300};

// H and I that are whole vectors in every type, then others.
const std::vector<Sizes> kAlignedSizes = {
    {kFew, 8, 8},     {kFew, 72, 136},  {kFew, 520, 40},  {kOneRow, 64, 24}, {kOneRow, 40, 1040}, {kNoRow, 16, 8},
    {kSome, 72, 136}, {kSome, 136, 40}, {kMany, 72, 136}, {kMany, 24, 72},   {k300Rows, 40, 16},
};
const std::vector<Sizes> kOddSizes = {
    {kFew, 1, 1}, {kFew, 13, 7}, {kSome, 33, 67}, {kMany, 40, 37}, {k300Rows, 5, 3}, {kNoRow, 3, 5},
};

template <class T>
class CudaExpertMlp : public ::testing::Test {
 protected:
  // Calls check(problem) for each size; the odd ones lie out of alignment too, by some elements.
  template <class Check>
  static void for_each_problem(const Check& check) {
    uint64_t seed = 0;
    const auto run = [&](const Sizes& sizes, int64_t offset) {
      SCOPED_TRACE(::testing::Message() << sizes << ", " << offset << " elements out of alignment");
      const ExpertPass<T> host(sizes, Random(++seed));
      check(DevicePass<T>(host, offset));
    };
    for (const Sizes& sizes : kAlignedSizes) run(sizes, 0);
    for (const Sizes& sizes : kOddSizes) run(sizes, static_cast<int64_t>(seed % 4));
    run({kSome, 72, 136}, 1);
  }
  template <class U>
  static void expect(const std::vector<U>& got, const Exact& exact, const char* what) {
    EXPECT_TRUE(matches(std::span<const U>(got), exact)) << what;
  }
};
TYPED_TEST_SUITE(CudaExpertMlp, DeviceTypes, StorageNames);

TYPED_TEST(CudaExpertMlp, ForwardMatchesFloat64) {
  TestFixture::for_each_problem([](const DevicePass<TypeParam>& problem) {
    const auto got = problem.forward();
    const auto exact = problem.exact_forward();
    TestFixture::expect(got.y, exact.y, "y");
    TestFixture::expect(got.pre_activation, exact.pre_activation, "pre_activation");
  });
}

TYPED_TEST(CudaExpertMlp, YIsTheSameWhetherThePreActivationIsKept) {
  for (const Sizes& sizes : {Sizes{kFew, 72, 136}, Sizes{kSome, 72, 136}, Sizes{kSome, 9, 7}}) {
    const ExpertPass<TypeParam> host(sizes, Random(3));
    const DevicePass<TypeParam> problem(host);
    const auto kept = problem.forward(), inference = problem.forward(false);
    EXPECT_TRUE(same_bits(std::span<const TypeParam>(kept.y), std::span<const TypeParam>(inference.y)));
  }
}

TYPED_TEST(CudaExpertMlp, GradientsMatchFloat64) {
  TestFixture::for_each_problem([](const DevicePass<TypeParam>& problem) {
    const auto got = problem.backward();
    const auto exact = problem.exact_backward();
    TestFixture::expect(got.dx, exact.dx, "dx");
    TestFixture::expect(got.d_gate_up, exact.d_gate_up, "d_gate_up");
    TestFixture::expect(got.d_down, exact.d_down, "d_down");
    TestFixture::expect(got.d_weights, exact.d_weights, "d_weights");
  });
}

using CudaExpertMlpFloat16 = CudaExpertMlp<Float16>;
TEST_F(CudaExpertMlpFloat16, PassesMatchFloat64WhereThePreActivationLeavesTheRange) {
  uint64_t seed = 0;
  for (const Sizes& sizes :
       {Sizes{kFew, 72, 136}, {kOneRow, 40, 1040}, {kSome, 72, 136}, {kMany, 24, 72}, {kFew, 13, 7}, {kSome, 33, 67}}) {
    SCOPED_TRACE(::testing::Message() << sizes);
    const auto host = beyond_range(sizes, ++seed);
    const DevicePass<Float16> problem(host);
    const auto forward = problem.forward();
    const auto exact_forward = problem.exact_forward();
    expect(forward.y, exact_forward.y, "y");
    expect(forward.pre_activation, exact_forward.pre_activation, "pre_activation");
    const auto got = problem.backward();
    const auto exact = problem.exact_backward();
    expect(got.dx, exact.dx, "dx");
    expect(got.d_gate_up, exact.d_gate_up, "d_gate_up");
    expect(got.d_down, exact.d_down, "d_down");
    expect(got.d_weights, exact.d_weights, "d_weights");
  }
}

TYPED_TEST(CudaExpertMlp, AGradientIsTheSameWhateverElseIsAskedFor) {
  const ExpertPass<TypeParam> host({kSome, 72, 136}, Random(4));
  const DevicePass<TypeParam> problem(host);
  const auto all = problem.backward();
  const auto same = [](const auto& a, const auto& b) { return same_bits(std::span(a), std::span(b)); };
  EXPECT_TRUE(same(problem.backward({.x = true, .gate_up = false, .down = false, .weights = false}).dx, all.dx));
  EXPECT_TRUE(
      same(problem.backward({.x = false, .gate_up = true, .down = false, .weights = false}).d_gate_up, all.d_gate_up));
  EXPECT_TRUE(
      same(problem.backward({.x = false, .gate_up = false, .down = true, .weights = false}).d_down, all.d_down));
  EXPECT_TRUE(
      same(problem.backward({.x = false, .gate_up = false, .down = false, .weights = true}).d_weights, all.d_weights));
}

TYPED_TEST(CudaExpertMlp, AnExpertWithoutRowsGetsExactlyZero) {
  const ExpertPass<TypeParam> host({kSome, 72, 136}, Random(5));
  const auto got = DevicePass<TypeParam>(host).backward();
  constexpr size_t kEmpty = 1;
  const auto of_expert = [](const std::vector<TypeParam>& matrices, size_t elements) {
    return std::span<const TypeParam>(matrices).subspan(kEmpty * elements, elements);
  };
  EXPECT_TRUE(all_zero(of_expert(got.d_gate_up, 2 * 136 * 72)));
  EXPECT_TRUE(all_zero(of_expert(got.d_down, 136 * 72)));
}

TYPED_TEST(CudaExpertMlp, ResultsAreTheSameBitForBit) {
  const ExpertPass<TypeParam> host({kFew, 72, 136}, Random(6));
  const DevicePass<TypeParam> problem(host);
  const auto forward = problem.forward();
  const auto backward = problem.backward();
  const auto same = [](const auto& a, const auto& b) { return same_bits(std::span(a), std::span(b)); };
  for (int run = 0; run < 3; ++run) {
    EXPECT_TRUE(same(problem.forward().y, forward.y));
    const auto again = problem.backward();
    EXPECT_TRUE(same(again.dx, backward.dx));
    EXPECT_TRUE(same(again.d_gate_up, backward.d_gate_up));
    EXPECT_TRUE(same(again.d_down, backward.d_down));
    EXPECT_TRUE(same(again.d_weights, backward.d_weights));
  }
}

TEST(CudaExpertMlpWorkspace, TooSmallAWorkspaceIsRefused) {
  const ExpertPass<float> host({kFew, 8, 8}, Random(7));
  ExpertMlpParams params{};
  params.groups = host.ragged.groups();
  params.hidden_size = params.intermediate_size = 8;
  params.dtype = DType::kFloat32;
  DeviceWorkspace small(expert_mlp_cuda_workspace(params) - 1);
  EXPECT_THROW(expert_mlp_cuda(params, small.get(), Stream{}), std::invalid_argument);
}

}  // namespace
}  // namespace dynamic_moe::testing
