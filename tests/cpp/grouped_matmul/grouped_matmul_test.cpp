// SPDX-License-Identifier: Apache-2.0
// The three products against plain float64 sums, at the CPU level in use (ctest runs every level).
#include "grouped_matmul/grouped_matmul.h"

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <stdexcept>
#include <utility>

#include "common/isa.h"
#include "common/parallel.h"
#include "grouped_matmul/tile_plan.h"
#include "products.h"
#include "support/refused_tiles.h"

namespace dynamic_moe::testing {
namespace {

const Load kMixed{"groups of 5, 0, 1, 17 and 3 rows", {5, 0, 1, 17, 3}, 11};
const Load kMixedInPlace{"groups of 5, 0, 1, 17 and 3 rows", {5, 0, 1, 17, 3}, 0, false};
const Load kOneRow{"one row", {1}, 1};
const Load kOneRowEach{"one row in each of 4 groups", {1, 1, 1, 1}, 6};

// N and K below, at and around the widths of vectors, tiles and panels; K in one and in several inner blocks, whole and
// with a tail, also where a word holds a pair of elements.
std::vector<Shape> shapes() {
  std::vector<Shape> shapes;
  const std::pair<int64_t, int64_t> sizes[] = {{1, 1},   {1, 7},    {7, 1},    {2, 2},    {16, 16},
                                               {17, 31}, {31, 33},  {33, 17},  {48, 64},  {49, 77},
                                               {77, 49}, {145, 32}, {32, 145}, {200, 96}, {96, 200}};
  for (const auto& [n, k] : sizes) {
    for (const Load& load : {kMixed, kMixedInPlace, kOneRow}) shapes.push_back({load, n, k});
  }
  shapes.push_back({kMixed, 33, 1100});
  shapes.push_back({kMixed, 1100, 33});
  shapes.push_back({kMixed, 17, 2100});
  shapes.push_back({kMixed, 2100, 17});
  shapes.push_back({kMixedInPlace, 9, 2101});
  shapes.push_back({kMixed, 9, 4201});
  shapes.push_back({kOneRowEach, 50, 4096});
  return shapes;
}

// Group sizes around the rows of a tile, of the path for few rows, and of a block of rows.
std::vector<Shape> group_sizes() {
  std::vector<Shape> shapes;
  for (const int32_t rows : {2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 65, 129}) {
    shapes.push_back({{"one group", {rows, rows - 1}, rows / 2 + 1}, 35, 19});
  }
  shapes.push_back({{"700 and 513 rows", {700, 513}, 300}, 19, 21});
  shapes.push_back({{"1100 rows over two inner blocks", {1100, 3}, 1000}, 5, 2051});
  shapes.push_back({{"300 rows: several blocks, tasks and groups of panels", {300, 130}, 200}, 150, 350});
  shapes.push_back({{"2101 rows in place", {2101}, 0, false}, 33, 9});
  shapes.push_back({{"4200 rows", {0, 4200, 0}, 100}, 3, 17});
  shapes.push_back({{"200 groups", std::vector<int32_t>(200, 1), 31}, 6, 10});
  return shapes;
}

template <class T>
class GroupedMatmul : public ::testing::Test {
 protected:
  // The kernels' own scheduling must not depend on what the test before left.
  void SetUp() override { use_standard_threads(1); }
  void TearDown() override { use_standard_threads(1); }

  // Calls check(problem) for each shape, with the buffers placed in turn against either fence and out of alignment.
  template <class Check>
  static void for_each_problem(const std::vector<Shape>& shapes, const Check& check) {
    uint64_t seed = 0;
    for (const Shape& shape : shapes) {
      SCOPED_TRACE(::testing::Message() << shape);
      ++seed;
      check(Products<T>(shape, Random(seed), kPlacements[seed % 3]));
      if (::testing::Test::HasFailure()) return;
    }
  }
};
TYPED_TEST_SUITE(GroupedMatmul, StorageTypes, StorageNames);

TYPED_TEST(GroupedMatmul, YMatchesFloat64) {
  this->for_each_problem(shapes(),
                         [](const auto& problem) { EXPECT_TRUE(matches(problem.forward(), problem.exact_forward())); });
}

TYPED_TEST(GroupedMatmul, DxMatchesFloat64) {
  this->for_each_problem(shapes(), [](const auto& problem) { EXPECT_TRUE(matches(problem.dx(), problem.exact_dx())); });
}

TYPED_TEST(GroupedMatmul, DwMatchesFloat64) {
  this->for_each_problem(shapes(), [](const auto& problem) { EXPECT_TRUE(matches(problem.dw(), problem.exact_dw())); });
}

TYPED_TEST(GroupedMatmul, GroupsOfEverySizeMatchFloat64) {
  this->for_each_problem(group_sizes(), [](const auto& problem) {
    EXPECT_TRUE(matches(problem.forward(), problem.exact_forward()));
    EXPECT_TRUE(matches(problem.dx(), problem.exact_dx()));
    EXPECT_TRUE(matches(problem.dw(), problem.exact_dw()));
  });
}

TYPED_TEST(GroupedMatmul, ExpertsWithoutRowsGetAGradientOfExactlyZero) {
  const Products<TypeParam> problem({kMixed, 33, 49}, Random(1));
  const Fenced<TypeParam> dw = problem.dw();
  EXPECT_TRUE(all_zero(dw.span().subspan(33 * 49, 33 * 49)));
}

TYPED_TEST(GroupedMatmul, TokensWithoutRowsGetAGradientOfExactlyZero) {
  const Products<TypeParam> problem({{"3 rows of 50 tokens", {1, 2}, 50}, 33, 49}, Random(1));
  std::vector<bool> has_row(50);
  for (const int32_t token : problem.ragged.row_token.span()) has_row[static_cast<size_t>(token)] = true;
  const Fenced<TypeParam> dx = problem.dx();
  for (int64_t token = 0; token < 50; ++token) {
    EXPECT_EQ(bool(all_zero(dx.span().subspan(static_cast<size_t>(token) * 49, 49))),
              !has_row[static_cast<size_t>(token)]);
  }
}

TYPED_TEST(GroupedMatmul, NoRowsAndNoTokensAreLegal) {
  for (const Load& load :
       {Load{"no rows", {0, 0, 0}, 4}, Load{"no tokens", {0}, 0}, Load{"in place", {0, 0}, 0, false}}) {
    SCOPED_TRACE(load.name);
    const Products<TypeParam> problem({load, 17, 33}, Random(1));
    EXPECT_EQ(problem.forward().size(), 0);
    EXPECT_TRUE(all_zero(problem.dx().span()));
    EXPECT_TRUE(all_zero(problem.dw().span()));
  }
}

TYPED_TEST(GroupedMatmul, DuplicateTokensOfOneExpertAddUp) {
  // Every row is token 0, in one expert.
  const Products<TypeParam> problem({{"9 rows of one token", {9}, 1}, 20, 21}, Random(1));
  EXPECT_TRUE(matches(problem.forward(), problem.exact_forward()));
  EXPECT_TRUE(matches(problem.dx(), problem.exact_dx()));
  EXPECT_TRUE(matches(problem.dw(), problem.exact_dw()));
}

TYPED_TEST(GroupedMatmul, ResultsDoNotDependOnTheNumberOfThreads) {
  const std::vector<Shape> shapes{{kMixed, 77, 1100}, {kMixed, 300, 130}, {{"skewed", {0, 260, 1, 2}, 90}, 61, 103}};
  this->for_each_problem(shapes, [](const auto& problem) {
    use_standard_threads(1);
    const Fenced<TypeParam> y = problem.forward(), dx = problem.dx(), dw = problem.dw();
    for (const int threads : {2, 3, 7}) {
      SCOPED_TRACE(threads);
      use_standard_threads(threads);
      EXPECT_TRUE(same_bits(problem.forward(), y));
      EXPECT_TRUE(same_bits(problem.dx(), dx));
      EXPECT_TRUE(same_bits(problem.dw(), dw));
    }
  });
}

// A gradient of 32 MiB and more whose rows are whole cache lines is written around the cache.
TYPED_TEST(GroupedMatmul, ALargeGradientIsTheSameBitsWhereverItLies) {
  for (const int64_t k : {1056, 1057}) {
    const Shape shape{{"groups of 9, 0 and 4 rows", {9, 0, 4}, 8}, 11264 / static_cast<int64_t>(sizeof(TypeParam)), k};
    const Products<TypeParam> in_lines(shape, Random(1), Placement::kStartAtFence);
    const Products<TypeParam> one_in(shape, Random(1), Placement::kOneIn);
    use_standard_threads(2);
    EXPECT_TRUE(same_bits(in_lines.dw(), one_in.dw()));
  }
}

// Rows of the other groups must not change a group's result: it is the same alone.
TYPED_TEST(GroupedMatmul, AGroupGivesTheSameBitsAloneAndAmongOthers) {
  const int64_t n = 40, k = 1060;
  const Products<TypeParam> all({{"groups of 20, 4 and 9 rows", {20, 4, 9}, 0, false}, n, k}, Random(1));
  const Fenced<TypeParam> y = all.forward(), dx = all.dx(), dw = all.dw();
  for (int64_t e = 0; e < 3; ++e) {
    const int64_t first = all.ragged.expert_offsets[e], rows = all.ragged.expert_offsets[e + 1] - first;
    Products<TypeParam> alone({{"alone", {static_cast<int32_t>(rows)}, 0, false}, n, k}, Random(2));
    const auto copy = [](Fenced<TypeParam>& to, const Fenced<TypeParam>& from, int64_t start) {
      to.thaw();
      std::memcpy(to.data(), from.data() + start, to.span().size_bytes());
    };
    copy(alone.x, all.x, first * k);
    copy(alone.weight, all.weight, e * n * k);
    copy(alone.dy, all.dy, first * n);
    const auto part = [](const Fenced<TypeParam>& whole, int64_t start, int64_t count) {
      return whole.span().subspan(static_cast<size_t>(start), static_cast<size_t>(count));
    };
    EXPECT_TRUE(same_bits(alone.forward().span(), part(y, first * n, rows * n)));
    EXPECT_TRUE(same_bits(alone.dx().span(), part(dx, first * k, rows * k)));
    EXPECT_TRUE(same_bits(alone.dw().span(), part(dw, e * n * k, n * k)));
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

// Rows of `width` elements: those that `is_hit` names differ from the clean run, and all others are the same bits.
template <class T, class IsHit>
void expect_changes_only(const Fenced<T>& got, const Fenced<T>& clean, int64_t width, const IsHit& is_hit) {
  for (int64_t row = 0; row < got.size() / width; ++row) {
    const auto start = static_cast<size_t>(row * width), count = static_cast<size_t>(width);
    EXPECT_EQ(same_bits(got.span().subspan(start, count), clean.span().subspan(start, count)), !is_hit(row))
        << "row " << row;
  }
}

// An odd K and an odd N: the last word of a row in bfloat16 holds half of a pair.
const Shape kOddShape{kMixed, 33, 49};

TYPED_TEST(GroupedMatmul, AFaultyTokenReachesItsOwnRowsOnly) {
  for (const double fault : kFaults) {
    SCOPED_TRACE(fault);
    for (const int64_t token : {0, 5, 10}) {
      Products<TypeParam> problem(kOddShape, Random(1));
      const Fenced<TypeParam> y = problem.forward(), dw = problem.dw();
      fill(problem.x, token * 49, 49, fault);
      expect_changes_only(problem.forward(), y, 33, [&](int64_t row) { return problem.ragged.token(row) == token; });
      std::vector<bool> has_token(5);
      problem.ragged.for_each_row([&](int64_t row, int64_t e) {
        if (problem.ragged.token(row) == token) has_token[static_cast<size_t>(e)] = true;
      });
      expect_changes_only(problem.dw(), dw, 33 * 49,
                          [&](int64_t expert) { return has_token[static_cast<size_t>(expert)]; });
    }
  }
}

TYPED_TEST(GroupedMatmul, AFaultyRowOfDyReachesItsOwnTokenAndExpertOnly) {
  for (const double fault : kFaults) {
    SCOPED_TRACE(fault);
    for (const int64_t row : {0, 5, 22, 25}) {
      Products<TypeParam> problem(kOddShape, Random(1));
      const Fenced<TypeParam> dx = problem.dx(), dw = problem.dw();
      fill(problem.dy, row * 33, 33, fault);
      expect_changes_only(problem.dx(), dx, 49, [&](int64_t token) { return problem.ragged.token(row) == token; });
      expect_changes_only(problem.dw(), dw, 33 * 49, [&](int64_t e) {
        return problem.ragged.expert_offsets[e] <= row && row < problem.ragged.expert_offsets[e + 1];
      });
    }
  }
}

TYPED_TEST(GroupedMatmul, AFaultyRowOfAMatrixReachesItsOwnColumnOnly) {
  for (const double fault : kFaults) {
    SCOPED_TRACE(fault);
    for (const int64_t column : {0, 15, 31, 32}) {
      Products<TypeParam> problem(kOddShape, Random(1));
      const Fenced<TypeParam> y = problem.forward();
      const int64_t expert = 3;
      fill(problem.weight, (expert * 33 + column) * 49, 49, fault);
      expect_changes_only(problem.forward(), y, 1, [&](int64_t element) {
        const int64_t row = element / 33;
        return element % 33 == column && problem.ragged.expert_offsets[expert] <= row &&
               row < problem.ragged.expert_offsets[expert + 1];
      });
    }
  }
}

TYPED_TEST(GroupedMatmul, AFaultyElementOfDyReachesItsOwnRowOfDwOnly) {
  Products<TypeParam> problem(kOddShape, Random(1));
  const Fenced<TypeParam> dw = problem.dw();
  const int64_t row = 10, column = 32;  // in expert 3
  fill(problem.dy, row * 33 + column, 1, kFaults[0]);
  expect_changes_only(problem.dw(), dw, 49, [&](int64_t line) { return line == 3 * 33 + column; });
}

// ---- subnormal numbers --------------------------------------------------------------------------------------------

void only_first(Fenced<BFloat16>& values, double first) {
  values.thaw();
  for (int64_t i = 0; i < values.size(); ++i) values[i] = stored<BFloat16>(i == 0 ? first : 0);
}

void expect_only_first(const Fenced<BFloat16>& values, double first) {
  for (int64_t i = 0; i < values.size(); ++i) EXPECT_EQ(value_of(values[i]), i == 0 ? first : 0) << "element " << i;
}

// Instructions that multiply pairs of bfloat16 take subnormal inputs for zero and give zero for a subnormal sum, where
// few rows read the weights in place (1) and where tiles do the work (40). Float32 arithmetic keeps both.
TEST(GroupedMatmulSubnormals, AreKeptUnlessTheLevelMultipliesPairs) {
  const bool kept = !multiplies_pairs(isa_for(DType::kBFloat16), DType::kBFloat16);
  for (const int32_t rows : {1, 40}) {
    Products<BFloat16> problem({{"rows in place", {rows}, 0, false}, 2, 2}, Random(1));
    for (const auto& [a, b] : {std::pair{0x1p-130, 0x1p10}, {0x1p10, 0x1p-130}, {0x1p-70, 0x1p-60}}) {
      SCOPED_TRACE(::testing::Message() << rows << " rows, " << a << " times " << b);
      const double product = kept ? a * b : 0;
      only_first(problem.x, a);
      only_first(problem.weight, b);
      only_first(problem.dy, a);
      expect_only_first(problem.forward(), product);
      expect_only_first(problem.dx(), product);
      only_first(problem.dy, b);
      expect_only_first(problem.dw(), product);
    }
  }
}

// ---- refused tiles ------------------------------------------------------------------------------------------------

TEST(GroupedMatmulWithoutTiles, RunsBFloat16AtTheNextBestLevel) {
  if (!RefusedTiles::can_be_played()) GTEST_SKIP() << "needs AVX-512 and a build with amx";
  const Products<BFloat16> problem(kOddShape, Random(1));
  set_isa(Isa::kAvx512);
  const auto y = problem.forward(), dx = problem.dx(), dw = problem.dw();
  reset_isa();
  {
    const RefusedTiles refused;
    EXPECT_EQ(refused.requests, 0);
    EXPECT_TRUE(same_bits(problem.forward(), y));
    EXPECT_TRUE(same_bits(problem.dx(), dx));
    EXPECT_TRUE(same_bits(problem.dw(), dw));
    EXPECT_EQ(refused.requests, 1);
  }
  const RefusedTiles forced("amx");
  EXPECT_THROW(problem.forward(), std::runtime_error);
  EXPECT_THROW(problem.dx(), std::runtime_error);
  EXPECT_THROW(problem.dw(), std::runtime_error);
}

// ---- more than 2^31 elements --------------------------------------------------------------------------------------

// A small problem, and the same one with its tokens or its experts far apart.
struct FarApart {
  static constexpr int64_t kN = 64, kK = 64;
  Products<BFloat16> near{{{"2 and 3 rows", {2, 3}, 4}, kN, kK}, Random(1)};
  Fenced<BFloat16> y = near.forward(), dx = near.dx();
};

TEST(GroupedMatmulSizes, TokensBeyond31BitsOfElements) {
  use_standard_threads(1);
  constexpr int64_t kK = FarApart::kK, kStride = int64_t{1} << 24, kTokens = 3 * kStride + 1;
  static_assert(kTokens * kK > (int64_t{1} << 31));
  FarApart problem;
  Vast<BFloat16> x(kTokens * kK);
  std::vector<int32_t> row_token;
  for (int64_t token = 0; token < 4; ++token) {
    x.write(token * kStride * kK, problem.near.x.span().subspan(static_cast<size_t>(token * kK), kK));
  }
  for (const int32_t token : problem.near.ragged.row_token.span()) {
    row_token.push_back(static_cast<int32_t>(token * kStride));
  }
  Fenced<BFloat16> y(problem.y.size());
  const RowGroups groups{problem.near.ragged.expert_offsets.data(), row_token.data(), 5, kTokens, 2};
  grouped_matmul_cpu({groups, x.data(), problem.near.weight.data(), y.data(), FarApart::kN, kK, DType::kBFloat16});
  EXPECT_TRUE(same_bits(y, problem.y));
}

TEST(GroupedMatmulSizes, ExpertsBeyond31BitsOfElements) {
  use_standard_threads(1);
  constexpr int64_t kMatrix = FarApart::kN * FarApart::kK, kLast = int64_t{1} << 19;
  static_assert(kLast * kMatrix >= (int64_t{1} << 31));
  FarApart problem;
  Vast<BFloat16> weight((kLast + 1) * kMatrix);
  weight.write(0, problem.near.weight.span().first(kMatrix));
  weight.write(kLast * kMatrix, problem.near.weight.span().last(kMatrix));
  std::vector<int32_t> offsets(static_cast<size_t>(kLast + 2), 2);
  offsets.front() = 0;
  offsets.back() = 5;
  const RowGroups groups{offsets.data(), problem.near.ragged.row_token.data(), 5, 4, static_cast<int32_t>(kLast + 1)};
  Fenced<BFloat16> y(problem.y.size()), dx(problem.dx.size());
  grouped_matmul_cpu(
      {groups, problem.near.x.data(), weight.data(), y.data(), FarApart::kN, FarApart::kK, DType::kBFloat16});
  grouped_matmul_dx_cpu(
      {groups, problem.near.dy.data(), weight.data(), dx.data(), FarApart::kN, FarApart::kK, DType::kBFloat16});
  EXPECT_TRUE(same_bits(y, problem.y));
  EXPECT_TRUE(same_bits(dx, problem.dx));
}

}  // namespace
}  // namespace dynamic_moe::testing
