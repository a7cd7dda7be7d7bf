// SPDX-License-Identifier: Apache-2.0
// The expert pass on weights that were packed beforehand, at the CPU level in use (ctest runs every level).
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <stdexcept>

#include "common/isa.h"
#include "common/isa_choice.h"
#include "common/parallel.h"
#include "expert_pass.h"
#include "grouped_matmul/tile_plan.h"
#include "support/refused_tiles.h"

namespace dynamic_moe::testing {
namespace {

const Load kMixed{"groups of 5, 0, 1, 17 and 3 rows", {5, 0, 1, 17, 3}, 11};
const Load kOneRow{"one row", {1}, 1};
const Load kInPlace{"rows in place", {9, 2}, 0, false};
const Load kManyRows{"groups of 33, 0 and 47 rows", {33, 0, 47}, 31};  // each more than few_rows, or none

std::vector<Sizes> sizes() {
  std::vector<Sizes> sizes;
  const std::pair<int64_t, int64_t> h_and_i[] = {{1, 1},   {1, 7},    {7, 1},    {2, 2},    {16, 16},
                                                 {17, 31}, {31, 33},  {33, 17},  {48, 64},  {49, 77},
                                                 {77, 49}, {97, 145}, {145, 97}, {130, 40}, {256, 96}};
  for (const auto& [h, i] : h_and_i) {
    for (const Load& load : {kMixed, kOneRow, kManyRows}) sizes.push_back({load, h, i});
  }
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
int64_t packed_bytes(const ExpertPass<T>& pass) {
  return packed_experts_bytes(pass.ragged.num_experts(), pass.h, pass.i, Storage<T>::kDType);
}

template <class T>
Fenced<char> pack(const ExpertPass<T>& pass) {
  Fenced<char> packed(packed_bytes(pass), pass.placement);
  spoil_scratch();
  prepack_experts_cpu({.gate_up_proj = pass.gate_up.data(),
                       .down_proj = pass.down.data(),
                       .packed = packed.data(),
                       .num_experts = pass.ragged.num_experts(),
                       .hidden_size = pass.h,
                       .intermediate_size = pass.i,
                       .dtype = Storage<T>::kDType});
  EXPECT_TRUE(packed.surroundings_intact());
  packed.freeze();
  return packed;
}

template <class T>
ExpertMlpPrepackedParams params(const ExpertPass<T>& pass, const Fenced<char>& packed, Fenced<T>& y) {
  return {.groups = pass.ragged.groups(),
          .row_slot = pass.ragged.row_slot.data(),
          .expert_weights = pass.weights.data(),
          .x = pass.x.data(),
          .packed = packed.data(),
          .packed_bytes = packed.size(),
          .y = y.data(),
          .hidden_size = pass.h,
          .intermediate_size = pass.i,
          .dtype = Storage<T>::kDType};
}

template <class T>
Fenced<T> run(const ExpertPass<T>& pass, const Fenced<char>& packed) {
  Fenced<T> y(pass.ragged.num_tokens * pass.h, pass.placement);
  spoil_scratch();
  expert_mlp_prepacked_cpu(params(pass, packed, y));
  EXPECT_TRUE(y.surroundings_intact());
  return y;
}

template <class T>
class Prepack : public ::testing::Test {
 protected:
  void SetUp() override { use_standard_threads(1); }
  void TearDown() override {
    reset_isa();
    use_standard_threads(1);
  }
};
using PackedTypes = ::testing::Types<float, BFloat16, Float16>;
TYPED_TEST_SUITE(Prepack, PackedTypes, StorageNames);

TYPED_TEST(Prepack, MatchesFloat64) {
  uint64_t seed = 0;
  for (const Sizes& sizes : sizes()) {
    SCOPED_TRACE(::testing::Message() << sizes);
    ++seed;
    const ExpertPass<TypeParam> pass(sizes, Random(seed), kPlacements[seed % 3]);
    EXPECT_TRUE(matches(run(pass, pack(pass)), pass.exact_forward().y));
    if (::testing::Test::HasFailure()) return;
  }
}

// A sum's order is that of the inner dimension in both, unless rows are so few that the weights are read in place.
TYPED_TEST(Prepack, ManyRowsGiveTheSameBitsAsWeightsThatAreNotPacked) {
  const bool pairs = multiplies_pairs(isa_for(Storage<TypeParam>::kDType), Storage<TypeParam>::kDType);
  ASSERT_LT(tile_plan(isa_for(Storage<TypeParam>::kDType), pairs).few_rows, 33);
  for (const auto& [h, i] : {std::pair<int64_t, int64_t>{77, 49}, {31, 1100}, {1100, 33}, {256, 96}}) {
    const ExpertPass<TypeParam> pass({kManyRows, h, i}, Random(1));
    EXPECT_TRUE(same_bits(run(pass, pack(pass)), pass.forward(false).y)) << h << " " << i;
  }
}

TYPED_TEST(Prepack, ResultsDoNotDependOnTheNumberOfThreads) {
  for (const Sizes& sizes : {Sizes{kMixed, 300, 130}, {kMixed, 77, 1100}, {kManyRows, 61, 103}}) {
    SCOPED_TRACE(::testing::Message() << sizes);
    use_standard_threads(1);
    const ExpertPass<TypeParam> pass(sizes, Random(1));
    const Fenced<char> packed = pack(pass);
    const auto y = run(pass, packed);
    for (const int threads : {2, 3, 7}) {
      use_standard_threads(threads);
      const Fenced<char> again = pack(pass);
      EXPECT_TRUE(same_bits(again.span(), packed.span())) << threads;
      EXPECT_TRUE(same_bits(run(pass, packed), y)) << threads;
    }
  }
}

// More activations than are kept between the projections at once: the experts are taken in chunks.
TEST(PrepackChunks, GiveTheSameBitsAsWeightsThatAreNotPacked) {
  use_standard_threads(1);
  const ExpertPass<float> pass({{"3 experts", {1500, 1500, 1500}, 0, false}, 2, 4001}, Random(1));
  EXPECT_TRUE(same_bits(run(pass, pack(pass)), pass.forward(false).y));
}

TYPED_TEST(Prepack, NothingAtAllIsLegal) {
  for (const Load& load : {Load{"no rows", {0, 0, 0}, 4}, Load{"no tokens", {0}, 0}}) {
    SCOPED_TRACE(load.name);
    const ExpertPass<TypeParam> pass({load, 33, 17}, Random(1));
    EXPECT_TRUE(all_zero(run(pass, pack(pass)).span()));
  }
}

TYPED_TEST(Prepack, ATokenWithoutARowIsExactlyZero) {
  constexpr int64_t kTokens = 50;
  const ExpertPass<TypeParam> pass({{"groups of 0, 2 and 1 rows", {0, 2, 1}, kTokens}, 33, 49}, Random(1));
  const auto y = run(pass, pack(pass));
  std::vector<bool> used(kTokens);
  pass.ragged.for_each_row([&](int64_t row, int64_t) { used[static_cast<size_t>(pass.ragged.token(row))] = true; });
  for (size_t token = 0; token < kTokens; ++token) {
    EXPECT_EQ(bool(all_zero(y.span().subspan(token * 33, 33))), !used[token]);
  }
}

// The buffer holds every weight once, padded to whole vectors and words only.
TYPED_TEST(Prepack, TakesTheMemoryThatTheContractSays) {
  constexpr int64_t kHeader = 64, kH = 96, kI = 160, kExperts = 3;  // multiples of every level's vector
  const bool pairs = multiplies_pairs(isa_for(Storage<TypeParam>::kDType), Storage<TypeParam>::kDType);
  EXPECT_EQ(packed_experts_bytes(kExperts, kH, kI, Storage<TypeParam>::kDType),
            kHeader + kExperts * 3 * kH * kI * (pairs ? 2 : 4));
}

template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TYPED_TEST(Prepack, AnotherLevelIsAnError) {
  const Isa level = isa_for(Storage<TypeParam>::kDType);
  const ExpertPass<TypeParam> pass({kMixed, 33, 17}, Random(1));
  const Fenced<char> packed = pack(pass);
  for (const Isa other : supported_isas()) {
    if (other == level || (other == Isa::kAmx && !isa_choice().tiles().ask())) continue;
    set_isa(other);
    EXPECT_THAT(error_of([&] { run(pass, packed); }),
                ::testing::AllOf(::testing::HasSubstr(isa_name(level)), ::testing::HasSubstr(isa_name(other)),
                                 ::testing::HasSubstr("pack the weights again")));
  }
}

// What is packed after a refusal has the format of the level that reads it; what was packed at another level has not.
TEST(PrepackWithoutTiles, PacksAndReadsAtTheNextBestLevel) {
  if (!RefusedTiles::can_be_played()) GTEST_SKIP() << "needs AVX-512 and a build with amx";
  use_standard_threads(1);
  const ExpertPass<BFloat16> pass({kManyRows, 33, 17}, Random(1));
  set_isa(Isa::kAvx512);
  const Fenced<char> packed = pack(pass);
  const auto y = run(pass, packed);
  set_isa(Isa::kAvx2);
  const Fenced<char> other = pack(pass);
  reset_isa();
  {
    const RefusedTiles refused;
    EXPECT_EQ(packed_bytes(pass), packed.size());
    EXPECT_TRUE(same_bits(pack(pass).span(), packed.span()));
    EXPECT_TRUE(same_bits(run(pass, packed), y));
    EXPECT_THAT(error_of([&] { run(pass, other); }), ::testing::HasSubstr("but the level in use is avx512"));
    EXPECT_EQ(refused.requests, 1);
  }
  const RefusedTiles forced("amx");
  EXPECT_THROW(packed_bytes(pass), std::runtime_error);
  EXPECT_THROW(run(pass, packed), std::runtime_error);
}

TYPED_TEST(Prepack, ABufferOfOtherSizesOrNoneIsAnError) {
  const ExpertPass<TypeParam> pass({kMixed, 33, 17}, Random(1));
  const auto error = [&](const Fenced<char>& packed) { return error_of([&] { run(pass, packed); }); };
  EXPECT_THAT(error(pack(ExpertPass<TypeParam>({kMixed, 17, 33}, Random(1)))), ::testing::HasSubstr("H=17, I=33"));
  EXPECT_THAT(error(pack(ExpertPass<TypeParam>({kOneRow, 33, 17}, Random(1)))), ::testing::HasSubstr("E=1,"));
  EXPECT_THAT(error(Fenced<char>(packed_bytes(pass))), ::testing::HasSubstr("prepack_experts"));
  EXPECT_THAT(error(Fenced<char>(0)), ::testing::HasSubstr("prepack_experts"));
  const Fenced<char> whole = pack(pass);
  Fenced<char> cut(whole.size() - 64);
  std::memcpy(cut.data(), whole.data(), static_cast<size_t>(cut.size()));
  EXPECT_THAT(error(cut), ::testing::HasSubstr("packed"));
}

TEST(PrepackErrors, AnotherDtypeIsAnError) {
  use_standard_threads(1);
  const ExpertPass<BFloat16> bfloat16({kMixed, 33, 17}, Random(1));
  const ExpertPass<float> float32({kMixed, 33, 17}, Random(1));
  EXPECT_THAT(error_of([&] { run(float32, pack(bfloat16)); }),
              ::testing::AllOf(::testing::HasSubstr("bfloat16"), ::testing::HasSubstr("float32")));
}

TEST(PrepackErrors, Float64IsAnError) {
  EXPECT_THAT(error_of([] { packed_experts_bytes(1, 2, 3, DType::kFloat64); }), ::testing::HasSubstr("float32"));
}

}  // namespace
}  // namespace dynamic_moe::testing
