// SPDX-License-Identifier: Apache-2.0
// The expert pass, forward and backward, against one float64 loop, at the CPU level in use (ctest runs every level).
#include "expert_mlp/expert_mlp.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "common/isa.h"
#include "common/parallel.h"
#include "expert_pass.h"
#include "support/refused_tiles.h"

namespace dynamic_moe::testing {
namespace {

const Load kMixed{"groups of 5, 0, 1, 17 and 3 rows", {5, 0, 1, 17, 3}, 11};
const Load kOneExpert{"one expert", {23}, 23};
const Load kOneRow{"one row", {1}, 1};
const Load kInPlace{"rows in place", {9, 2}, 0, false};

std::vector<Sizes> sizes() {
  std::vector<Sizes> sizes;
  const std::pair<int64_t, int64_t> h_and_i[] = {{1, 1},   {1, 7},   {7, 1},   {2, 2},   {16, 16}, {17, 31},
                                                 {31, 33}, {33, 17}, {48, 64}, {49, 77}, {77, 49}, {130, 40}};
  for (const auto& [h, i] : h_and_i) {
    for (const Load& load : {kMixed, kOneRow}) sizes.push_back({load, h, i});
  }
  sizes.push_back({kOneExpert, 33, 49});
  sizes.push_back({kInPlace, 49, 33});
  sizes.push_back({kMixed, 31, 1100});
  sizes.push_back({kMixed, 1100, 33});
  sizes.push_back({kMixed, 2101, 17});
  sizes.push_back({kMixed, 9, 2101});
  sizes.push_back({{"200 groups", std::vector<int32_t>(200, 1), 31}, 10, 6});
  sizes.push_back({{"700 and 513 rows", {700, 513}, 300}, 19, 21});
  sizes.push_back({{"1100 rows, two inner blocks everywhere", {1100}, 1000}, 3, 1031});
  sizes.push_back({{"4200 rows", {0, 4200, 0}, 100}, 3, 17});
  return sizes;
}

template <class T>
class ExpertMlp : public ::testing::Test {
 protected:
  void SetUp() override { use_standard_threads(1); }
  void TearDown() override { use_standard_threads(1); }

  // Calls check(pass) for each problem, with the buffers placed in turn against either fence and out of alignment.
  template <class Check>
  static void for_each_pass(const std::vector<Sizes>& all, const Check& check) {
    uint64_t seed = 0;
    for (const Sizes& sizes : all) {
      SCOPED_TRACE(::testing::Message() << sizes);
      ++seed;
      check(ExpertPass<T>(sizes, Random(seed), kPlacements[seed % 3]));
      if (::testing::Test::HasFailure()) return;
    }
  }
};
TYPED_TEST_SUITE(ExpertMlp, StorageTypes, StorageNames);

TYPED_TEST(ExpertMlp, ForwardMatchesFloat64) {
  this->for_each_pass(sizes(), [](const auto& pass) {
    const auto exact = pass.exact_forward();
    const auto got = pass.forward();
    EXPECT_TRUE(matches(got.pre_activation, exact.pre_activation));
    EXPECT_TRUE(matches(got.y, exact.y));
  });
}

TYPED_TEST(ExpertMlp, BackwardMatchesFloat64) {
  this->for_each_pass(sizes(), [](const auto& pass) {
    const auto exact = pass.exact_backward();
    const auto got = pass.backward();
    EXPECT_TRUE(matches(got.dx, exact.dx));
    EXPECT_TRUE(matches(got.d_gate_up, exact.d_gate_up));
    EXPECT_TRUE(matches(got.d_down, exact.d_down));
    EXPECT_TRUE(matches(got.d_weights, exact.d_weights));
  });
}

TYPED_TEST(ExpertMlp, YIsTheSameBitsWithAndWithoutKeepingThePreActivation) {
  this->for_each_pass({{kMixed, 77, 49}, {kMixed, 31, 1100}, {kOneRow, 17, 33}},
                      [](const auto& pass) { EXPECT_TRUE(same_bits(pass.forward(true).y, pass.forward(false).y)); });
}

// Which gradients are asked for must not change those that are.
TYPED_TEST(ExpertMlp, EachGradientIsTheSameBitsAloneAndWithTheOthers) {
  this->for_each_pass({{kMixed, 77, 49}, {kMixed, 31, 1100}}, [](const auto& pass) {
    const auto all = pass.backward();
    EXPECT_TRUE(same_bits(pass.backward({true, false, false, false}).dx, all.dx));
    EXPECT_TRUE(same_bits(pass.backward({false, true, false, false}).d_gate_up, all.d_gate_up));
    EXPECT_TRUE(same_bits(pass.backward({false, false, true, false}).d_down, all.d_down));
    EXPECT_TRUE(same_bits(pass.backward({false, false, false, true}).d_weights, all.d_weights));
    pass.backward({false, false, false, false});
  });
}

TYPED_TEST(ExpertMlp, NothingAtAllIsLegal) {
  for (const Load& load : {Load{"no rows", {0, 0, 0}, 4}, Load{"no tokens", {0}, 0}}) {
    SCOPED_TRACE(load.name);
    const ExpertPass<TypeParam> pass({load, 33, 17}, Random(1));
    EXPECT_TRUE(all_zero(pass.forward().y.span()));
    const auto gradients = pass.backward();
    EXPECT_TRUE(all_zero(gradients.dx.span()));
    EXPECT_TRUE(all_zero(gradients.d_gate_up.span()));
    EXPECT_TRUE(all_zero(gradients.d_down.span()));
    EXPECT_TRUE(all_zero(gradients.d_weights.span()));
  }
}

TYPED_TEST(ExpertMlp, WhatHasNoRowIsExactlyZero) {
  constexpr int64_t kH = 33, kI = 49, kTokens = 50;
  const ExpertPass<TypeParam> pass({{"groups of 0, 2 and 1 rows", {0, 2, 1}, kTokens}, kH, kI}, Random(1));
  const auto forward = pass.forward();
  const auto gradients = pass.backward();
  EXPECT_TRUE(all_zero(gradients.d_gate_up.span().first(2 * kI * kH)));
  EXPECT_TRUE(all_zero(gradients.d_down.span().first(kH * kI)));
  std::vector<bool> token_used(kTokens), slot_used(static_cast<size_t>(pass.ragged.num_slots()));
  pass.ragged.for_each_row([&](int64_t row, int64_t) {
    token_used[static_cast<size_t>(pass.ragged.token(row))] = true;
    slot_used[static_cast<size_t>(pass.ragged.row_slot[row])] = true;
  });
  for (size_t token = 0; token < kTokens; ++token) {
    EXPECT_EQ(bool(all_zero(forward.y.span().subspan(token * kH, kH))), !token_used[token]);
    EXPECT_EQ(bool(all_zero(gradients.dx.span().subspan(token * kH, kH))), !token_used[token]);
  }
  for (size_t slot = 0; slot < slot_used.size(); ++slot) {
    EXPECT_EQ(bool(all_zero(gradients.d_weights.span().subspan(slot, 1))), !slot_used[slot]);
  }
}

template <class Pass>
void expect_same(const Pass& pass, const typename Pass::Forward& forward, const typename Pass::Backward& backward) {
  const auto again = pass.forward();
  EXPECT_TRUE(same_bits(again.y, forward.y));
  EXPECT_TRUE(same_bits(again.pre_activation, forward.pre_activation));
  const auto gradients = pass.backward();
  EXPECT_TRUE(same_bits(gradients.dx, backward.dx));
  EXPECT_TRUE(same_bits(gradients.d_gate_up, backward.d_gate_up));
  EXPECT_TRUE(same_bits(gradients.d_down, backward.d_down));
  EXPECT_TRUE(same_bits(gradients.d_weights, backward.d_weights));
}

TYPED_TEST(ExpertMlp, ResultsDoNotDependOnTheNumberOfThreads) {
  this->for_each_pass({{kMixed, 300, 130}, {kMixed, 77, 1100}, {{"skewed", {0, 260, 1, 2}, 90}, 61, 103}},
                      [](const auto& pass) {
                        use_standard_threads(1);
                        const auto forward = pass.forward();
                        const auto backward = pass.backward();
                        for (const int threads : {2, 3, 7}) {
                          SCOPED_TRACE(threads);
                          use_standard_threads(threads);
                          expect_same(pass, forward, backward);
                        }
                      });
}

// Three experts that share no token, and the same experts one by one. They have more activations than the pass keeps
// between the projections at once (64 MiB), so that it takes the experts in chunks, which must not show.
template <class T>
struct ThreeExperts {
  static constexpr int64_t kH = 2, kI = 4001;
  int64_t rows;  // of each
  ExpertPass<T> all;

  explicit ThreeExperts(int64_t rows_each)
      : rows(rows_each),
        all({{"3 experts", std::vector<int32_t>(3, static_cast<int32_t>(rows)), 0, false}, kH, kI}, Random(1)) {}

  ExpertPass<T> alone(int64_t e) const {
    ExpertPass<T> one({{"alone", {static_cast<int32_t>(rows)}, 0, false}, kH, kI}, Random(2));
    const auto copy = [&](auto& to, const auto& from) {
      to.thaw();
      std::memcpy(to.data(), part(from, e).data(), part(from, e).size_bytes());
    };
    copy(one.x, all.x);
    copy(one.dy, all.dy);
    copy(one.gate_up, all.gate_up);
    copy(one.down, all.down);
    copy(one.pre_activation, all.pre_activation);
    copy(one.weights, all.weights);
    return one;
  }
  // Expert e's third of a buffer.
  template <class Element>
  static std::span<const Element> part(const Fenced<Element>& whole, int64_t e) {
    const size_t third = whole.span().size() / 3;
    return whole.span().subspan(static_cast<size_t>(e) * third, third);
  }
};

TEST(ExpertMlpForwardChunks, ForwardGivesTheSameBitsAsEachExpertAlone) {
  use_standard_threads(1);
  const ThreeExperts<float> experts(1500);
  const auto y = experts.all.forward(false).y;
  for (int64_t e = 0; e < 3; ++e) {
    EXPECT_TRUE(same_bits(experts.alone(e).forward(false).y.span(), experts.part(y, e)));
  }
}

template <class T>
class ExpertMlpChunks : public ::testing::Test {};
using ChunkedTypes = ::testing::Types<float, BFloat16>;  // float64 keeps everything at once
TYPED_TEST_SUITE(ExpertMlpChunks, ChunkedTypes, StorageNames);

TYPED_TEST(ExpertMlpChunks, BackwardGivesTheSameBitsAsEachExpertAlone) {
  use_standard_threads(1);
  const ThreeExperts<TypeParam> experts(sizeof(TypeParam) == 2 ? 1000 : 500);
  const auto all = experts.all.backward();
  for (int64_t e = 0; e < 3; ++e) {
    const auto alone = experts.alone(e).backward();
    EXPECT_TRUE(same_bits(alone.dx.span(), experts.part(all.dx, e)));
    EXPECT_TRUE(same_bits(alone.d_gate_up.span(), experts.part(all.d_gate_up, e)));
    EXPECT_TRUE(same_bits(alone.d_down.span(), experts.part(all.d_down, e)));
    EXPECT_TRUE(same_bits(alone.d_weights.span(), experts.part(all.d_weights, e)));
  }
}

// Results of 32 MiB and more whose rows are whole cache lines are written around the cache.
TYPED_TEST(ExpertMlpChunks, LargeResultsAreTheSameBitsWhereverTheyLie) {
  const int64_t wide = 192128 / static_cast<int64_t>(sizeof(TypeParam));
  const Load load{"groups of 60, 0, 21 and 20 rows", {60, 0, 21, 20}, 70};
  for (const int64_t intermediate : {wide, wide + 7}) {
    const Sizes sizes{load, 64, intermediate};
    const ExpertPass<TypeParam> in_lines(sizes, Random(1), Placement::kStartAtFence);
    const ExpertPass<TypeParam> one_in(sizes, Random(1), Placement::kOneIn);
    use_standard_threads(2);
    const auto forward = in_lines.forward(), other_forward = one_in.forward();
    EXPECT_TRUE(same_bits(forward.y, other_forward.y));
    EXPECT_TRUE(same_bits(forward.pre_activation, other_forward.pre_activation));
    const auto backward = in_lines.backward(), other_backward = one_in.backward();
    use_standard_threads(1);
    EXPECT_TRUE(same_bits(backward.dx, other_backward.dx));
    EXPECT_TRUE(same_bits(backward.d_gate_up, other_backward.d_gate_up));
    EXPECT_TRUE(same_bits(backward.d_down, other_backward.d_down));
    EXPECT_TRUE(same_bits(backward.d_weights, other_backward.d_weights));
  }
}

// ---- faults stay where they are -----------------------------------------------------------------------------------

constexpr double kFaults[] = {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity(),
                              -std::numeric_limits<double>::infinity(), 3e38};

template <class T>
void fill(Fenced<T>& values, int64_t first, int64_t count, double value) {
  values.thaw();
  for (int64_t i = first; i < first + count; ++i) values[i] = stored<T>(value);
  values.freeze();
}

// Rows of `width` elements: those that `is_hit` does not name are the same bits as in the clean run.
template <class T, class IsHit>
void expect_others_unchanged(const Fenced<T>& got, const Fenced<T>& clean, int64_t width, const IsHit& is_hit) {
  for (int64_t row = 0; row < got.size() / width; ++row) {
    if (is_hit(row)) continue;
    const auto start = static_cast<size_t>(row * width), count = static_cast<size_t>(width);
    EXPECT_TRUE(same_bits(got.span().subspan(start, count), clean.span().subspan(start, count))) << "row " << row;
  }
}

constexpr int64_t kH = 33, kI = 49;  // odd: the last word of a row in bfloat16 holds half of a pair

template <class T>
std::vector<bool> experts_of_token(const ExpertPass<T>& pass, int64_t token) {
  std::vector<bool> hit(static_cast<size_t>(pass.ragged.num_experts()));
  pass.ragged.for_each_row([&](int64_t row, int64_t e) {
    if (pass.ragged.token(row) == token) hit[static_cast<size_t>(e)] = true;
  });
  return hit;
}

TYPED_TEST(ExpertMlp, AFaultyTokenReachesItsOwnOutputOnly) {
  for (const double fault : kFaults) {
    SCOPED_TRACE(fault);
    for (const int64_t token : {0, 5, 10}) {
      ExpertPass<TypeParam> pass({kMixed, kH, kI}, Random(1));
      const auto clean = pass.forward();
      fill(pass.x, token * kH, kH, fault);
      const auto got = pass.forward();
      expect_others_unchanged(got.y, clean.y, kH, [&](int64_t t) { return t == token; });
      expect_others_unchanged(got.pre_activation, clean.pre_activation, 2 * kI,
                              [&](int64_t row) { return pass.ragged.token(row) == token; });
      if (std::isnan(fault)) {
        const bool used = !all_zero(clean.y.span().subspan(static_cast<size_t>(token * kH), kH));
        EXPECT_EQ(std::isnan(value_of(got.y[token * kH])), used);  // the fault shows
      }
    }
  }
}

TYPED_TEST(ExpertMlp, AFaultyGradientReachesItsOwnTokenAndExpertsOnly) {
  for (const double fault : kFaults) {
    SCOPED_TRACE(fault);
    for (const int64_t token : {0, 5, 10}) {
      ExpertPass<TypeParam> pass({kMixed, kH, kI}, Random(1));
      const auto clean = pass.backward();
      fill(pass.dy, token * kH, kH, fault);
      const auto got = pass.backward();
      const std::vector<bool> hit = experts_of_token(pass, token);
      expect_others_unchanged(got.dx, clean.dx, kH, [&](int64_t t) { return t == token; });
      expect_others_unchanged(got.d_weights, clean.d_weights, pass.ragged.max_experts,
                              [&](int64_t t) { return t == token; });
      expect_others_unchanged(got.d_gate_up, clean.d_gate_up, 2 * kI * kH,
                              [&](int64_t e) { return hit[static_cast<size_t>(e)]; });
      expect_others_unchanged(got.d_down, clean.d_down, kH * kI,
                              [&](int64_t e) { return hit[static_cast<size_t>(e)]; });
    }
  }
}

TYPED_TEST(ExpertMlp, AFaultyWeightReachesItsOwnTokenOnly) {
  for (const double fault : kFaults) {
    SCOPED_TRACE(fault);
    ExpertPass<TypeParam> pass({kMixed, kH, kI}, Random(1));
    const auto clean = pass.forward();
    const auto clean_gradients = pass.backward();
    const int64_t row = 12, token = pass.ragged.token(row);
    pass.weights.thaw();
    pass.weights[pass.ragged.row_slot[row]] = static_cast<typename ExpertPass<TypeParam>::Accumulator>(fault);
    const auto got = pass.forward();
    const auto gradients = pass.backward();
    expect_others_unchanged(got.y, clean.y, kH, [&](int64_t t) { return t == token; });
    EXPECT_TRUE(same_bits(got.pre_activation, clean.pre_activation));
    expect_others_unchanged(gradients.dx, clean_gradients.dx, kH, [&](int64_t t) { return t == token; });
    EXPECT_TRUE(same_bits(gradients.d_weights, clean_gradients.d_weights));  // <dy, W2 a> has no weight in it
  }
}

// Weights of slots that no row uses are never read.
TYPED_TEST(ExpertMlp, WeightsOfUnusedSlotsDoNotMatter) {
  ExpertPass<TypeParam> pass({kMixed, kH, kI}, Random(1));
  const auto forward = pass.forward();
  const auto backward = pass.backward();
  std::vector<bool> used(static_cast<size_t>(pass.ragged.num_slots()));
  for (const int32_t slot : pass.ragged.row_slot.span()) used[static_cast<size_t>(slot)] = true;
  pass.weights.thaw();
  for (int64_t slot = 0; slot < pass.ragged.num_slots(); ++slot) {
    if (!used[static_cast<size_t>(slot)]) {
      pass.weights[slot] = std::numeric_limits<typename ExpertPass<TypeParam>::Accumulator>::quiet_NaN();
    }
  }
  expect_same(pass, forward, backward);
}

// Where the sigmoid is 0 or 1 to the last bit, and where exp overflows.
TYPED_TEST(ExpertMlp, LargeGatesMatchFloat64) {
  ExpertPass<TypeParam> pass({kMixed, 17, 31}, Random(1));
  pass.gate_up.thaw();
  pass.pre_activation.thaw();
  for (int64_t index = 0; index < pass.gate_up.size(); ++index) {
    const bool is_gate = index / (31 * 17) % 2 == 0;
    if (is_gate) pass.gate_up[index] = stored<TypeParam>(100 * value_of(pass.gate_up[index]));
  }
  for (int64_t index = 0; index < pass.pre_activation.size(); ++index) {
    const bool is_gate = index / 31 % 2 == 0;
    if (is_gate) pass.pre_activation[index] = stored<TypeParam>(100 * value_of(pass.pre_activation[index]));
  }
  const auto exact = pass.exact_forward();
  const auto got = pass.forward();
  EXPECT_TRUE(matches(got.pre_activation, exact.pre_activation));
  EXPECT_TRUE(matches(got.y, exact.y));
  const auto exact_gradients = pass.exact_backward();
  const auto gradients = pass.backward();
  EXPECT_TRUE(matches(gradients.dx, exact_gradients.dx));
  EXPECT_TRUE(matches(gradients.d_gate_up, exact_gradients.d_gate_up));
  EXPECT_TRUE(matches(gradients.d_down, exact_gradients.d_down));
  EXPECT_TRUE(matches(gradients.d_weights, exact_gradients.d_weights));
}

// ---- the range of float16 -----------------------------------------------------------------------------------------

const std::vector<Sizes> kBeyondRange = {
    {kMixed, 17, 31},
    {kMixed, 33, 49},
    {kOneRow, 1, 7},
    {kOneRow, 77, 160},
    {kInPlace, 49, 33},
    {kMixed, 1100, 33},
    {{"groups of 40, 0 and 33 rows", {40, 0, 33}, 50}, 48, 64},
};

TEST(ExpertMlpFloat16Range, ForwardMatchesFloat64WhereThePreActivationLeavesIt) {
  use_standard_threads(1);
  for (const Sizes& sizes : kBeyondRange) {
    SCOPED_TRACE(::testing::Message() << sizes);
    const auto pass = beyond_range(sizes, 1);
    const auto exact = pass.exact_forward();
    const auto got = pass.forward();
    EXPECT_TRUE(matches(got.pre_activation, exact.pre_activation));
    EXPECT_TRUE(matches(got.y, exact.y));
  }
}

TEST(ExpertMlpFloat16Range, BackwardMatchesFloat64WhereThePreActivationLeavesIt) {
  uint64_t seed = 0;
  for (const Sizes& sizes : kBeyondRange) {
    SCOPED_TRACE(::testing::Message() << sizes);
    use_standard_threads(1);
    ++seed;
    const auto pass = beyond_range(sizes, seed, kPlacements[seed % 3]);
    const auto exact = pass.exact_backward();
    const auto got = pass.backward();
    EXPECT_TRUE(matches(got.dx, exact.dx));
    EXPECT_TRUE(matches(got.d_gate_up, exact.d_gate_up));
    EXPECT_TRUE(matches(got.d_down, exact.d_down));
    EXPECT_TRUE(matches(got.d_weights, exact.d_weights));
    use_standard_threads(3);
    expect_same(pass, pass.forward(), got);
  }
}

// The activation is 65517, which float16 stores as 65504. From g and u as they are stored it is 65536, which is
// infinite.
TEST(ExpertMlpFloat16Range, BackwardHasRoomForEveryActivationThatForwardHadRoomFor) {
  ExpertPass<Float16> pass({kOneRow, 2, 1}, Random(1));
  rewrite(pass.x, [](int64_t) { return stored<Float16>(1); });
  rewrite(pass.gate_up, [](int64_t index) { return stored<Float16>(index % 2 == 0 ? 256 : -0.0375); });
  rewrite(pass.down, [](int64_t) { return stored<Float16>(1e-2); });
  rewrite(pass.dy, [](int64_t) { return stored<Float16>(1e-2); });
  rewrite(pass.pre_activation, [](int64_t) { return stored<Float16>(256); });
  EXPECT_TRUE(matches(pass.forward().y, pass.exact_forward().y));
  EXPECT_TRUE(matches(pass.backward().d_down, pass.exact_backward().d_down));
}

TEST(ExpertMlpFloat16Range, WhatIsInfiniteInTheInputsStaysInfinite) {
  ExpertPass<Float16> pass({kMixed, kH, kI}, Random(1));
  const int64_t token = pass.ragged.token(0);
  fill(pass.x, token * kH, kH, std::numeric_limits<double>::infinity());
  pass.pre_activation = pass.forward().pre_activation;
  const auto got = pass.backward();
  for (int64_t k = 0; k < kH; ++k) EXPECT_FALSE(std::isfinite(value_of(got.dx[token * kH + k])));
}

// The matrices of the last expert lie behind 2^31 elements; the experts between it and the first have no row.
TEST(ExpertMlpSizes, ExpertsBeyond31BitsOfElements) {
  use_standard_threads(1);
  constexpr int64_t kHidden = 64, kInner = 32, kMatrix = kHidden * kInner, kLast = int64_t{1} << 20;
  static_assert(kLast * kMatrix >= (int64_t{1} << 31));
  const ExpertPass<BFloat16> near({{"2 and 3 rows", {2, 3}, 4}, kHidden, kInner}, Random(1));
  const auto expected = near.forward();
  const auto gradients = near.backward({true, false, false, true});

  Vast<BFloat16> gate_up((kLast + 1) * 2 * kMatrix), down((kLast + 1) * kMatrix);
  gate_up.write(0, near.gate_up.span().first(2 * kMatrix));
  gate_up.write(kLast * 2 * kMatrix, near.gate_up.span().last(2 * kMatrix));
  down.write(0, near.down.span().first(kMatrix));
  down.write(kLast * kMatrix, near.down.span().last(kMatrix));
  std::vector<int32_t> offsets(static_cast<size_t>(kLast + 2), 2);
  offsets.front() = 0;
  offsets.back() = 5;
  const RowGroups groups{offsets.data(), near.ragged.row_token.data(), 5, 4, static_cast<int32_t>(kLast + 1)};

  Fenced<BFloat16> y(expected.y.size()), dx(gradients.dx.size());
  Fenced<float> d_weights(gradients.d_weights.size());
  expert_mlp_cpu({.groups = groups,
                  .row_slot = near.ragged.row_slot.data(),
                  .expert_weights = near.weights.data(),
                  .x = near.x.data(),
                  .gate_up_proj = gate_up.data(),
                  .down_proj = down.data(),
                  .pre_activation = nullptr,
                  .y = y.data(),
                  .hidden_size = kHidden,
                  .intermediate_size = kInner,
                  .dtype = DType::kBFloat16});
  EXPECT_TRUE(same_bits(y, expected.y));
  expert_mlp_backward_cpu({.groups = groups,
                           .row_slot = near.ragged.row_slot.data(),
                           .expert_weights = near.weights.data(),
                           .x = near.x.data(),
                           .gate_up_proj = gate_up.data(),
                           .down_proj = down.data(),
                           .pre_activation = near.pre_activation.data(),
                           .dy = near.dy.data(),
                           .dx = dx.data(),
                           .d_gate_up_proj = nullptr,
                           .d_down_proj = nullptr,
                           .d_expert_weights = d_weights.data(),
                           .num_slots = near.ragged.num_slots(),
                           .hidden_size = kHidden,
                           .intermediate_size = kInner,
                           .dtype = DType::kBFloat16});
  EXPECT_TRUE(same_bits(dx, gradients.dx));
  EXPECT_TRUE(same_bits(d_weights, gradients.d_weights));
}

// The same routing by hand: one token, two experts, numbers that a reader can follow.
TEST(ExpertMlpByHand, OneTokenTwoExperts) {
  use_standard_threads(1);
  const int32_t offsets[] = {0, 1, 2}, row_token[] = {0, 0}, row_slot[] = {1, 0};
  const float weights[] = {0.25f, 0.75f};  // slot 0: expert 1, slot 1: expert 0
  const float x[] = {1, 2};
  const float gate_up[] = {1, 0, 0, 1, 0, 1, 1, 1};  // [2, 2, 2]: g = 1, u = 2; g = 2, u = 3
  const float down[] = {1, -1, 2, 0};                // [2, 2, 1]
  float pre_activation[4], y[2];
  expert_mlp_cpu({.groups = {offsets, row_token, 2, 1, 2},
                  .row_slot = row_slot,
                  .expert_weights = weights,
                  .x = x,
                  .gate_up_proj = gate_up,
                  .down_proj = down,
                  .pre_activation = pre_activation,
                  .y = y,
                  .hidden_size = 2,
                  .intermediate_size = 1,
                  .dtype = DType::kFloat32});
  const float a0 = 1.46211716f;  // 1 sigmoid(1) 2
  const float a1 = 5.28478247f;  // 2 sigmoid(2) 3
  EXPECT_THAT(pre_activation, ::testing::ElementsAre(1, 2, 2, 3));
  EXPECT_FLOAT_EQ(y[0], 0.75f * a0 + 0.25f * 2 * a1);
  EXPECT_FLOAT_EQ(y[1], -0.75f * a0);
}

// Only products of bfloat16 flush subnormal numbers, at some levels (grouped_matmul_test.cpp). The weight of an expert
// is a float32 factor at all of them: g = 32, u = 2^-125, a = 2^-120, all exact.
TEST(ExpertMlpSubnormals, AreKeptByElementwiseSteps) {
  use_standard_threads(1);
  for (const int32_t rows : {1, 40}) {
    std::vector<int32_t> index(static_cast<size_t>(rows));
    std::iota(index.begin(), index.end(), 0);
    const int32_t offsets[] = {0, rows};
    const std::vector<float> weights(static_cast<size_t>(rows), 0x1p-10f);
    const std::vector<BFloat16> x(static_cast<size_t>(rows), stored<BFloat16>(1));
    const BFloat16 gate_up[] = {stored<BFloat16>(32), stored<BFloat16>(0x1p-125)}, down[] = {stored<BFloat16>(1)};
    std::vector<BFloat16> y(static_cast<size_t>(rows));
    expert_mlp_cpu({.groups = {offsets, index.data(), rows, rows, 1},
                    .row_slot = index.data(),
                    .expert_weights = weights.data(),
                    .x = x.data(),
                    .gate_up_proj = gate_up,
                    .down_proj = down,
                    .pre_activation = nullptr,
                    .y = y.data(),
                    .hidden_size = 1,
                    .intermediate_size = 1,
                    .dtype = DType::kBFloat16});
    for (const BFloat16 value : y) EXPECT_EQ(value_of(value), 0x1p-130) << rows << " rows";
  }
}

TEST(ExpertMlpWithoutTiles, RunsBFloat16AtTheNextBestLevel) {
  if (!RefusedTiles::can_be_played()) GTEST_SKIP() << "needs AVX-512 and a build with amx";
  use_standard_threads(1);
  const ExpertPass<BFloat16> pass({kMixed, 33, 49}, Random(1));
  set_isa(Isa::kAvx512);
  const auto y = pass.forward().y, dx = pass.backward().dx;
  reset_isa();
  {
    const RefusedTiles refused;
    EXPECT_TRUE(same_bits(pass.forward().y, y));
    EXPECT_TRUE(same_bits(pass.backward().dx, dx));
    EXPECT_EQ(refused.requests, 1);
  }
  const RefusedTiles forced("amx");
  EXPECT_THROW(pass.forward(), std::runtime_error);
  EXPECT_THROW(pass.backward(), std::runtime_error);
}

}  // namespace
}  // namespace dynamic_moe::testing
