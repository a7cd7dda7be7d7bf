// SPDX-License-Identifier: Apache-2.0
// The plans are data; what every plan must hold whatever its numbers.
#include "grouped_matmul/tile_plan.h"

#include <gtest/gtest.h>

namespace dynamic_moe {
namespace {

int lanes(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return 1;
    case Isa::kAvx2:
      return 8;
    default:
      return 16;
  }
}

int registers(Isa isa) { return isa == Isa::kScalar || isa == Isa::kAvx2 ? 16 : 32; }

template <class Check>
void for_each_plan(const Check& check) {
  for (const Isa isa : kAllIsas) {
    for (const bool pairs : {false, true}) {
      SCOPED_TRACE(::testing::Message() << isa_name(isa) << (pairs ? ", pairs" : ""));
      check(isa, pairs, tile_plan(isa, pairs));
    }
  }
}

TEST(TilePlan, LanesAreThoseOfTheVector) {
  for_each_plan([](Isa isa, bool, const TilePlan& plan) { EXPECT_EQ(plan.lanes, lanes(isa)); });
}

// Sums, one vector of each column and one broadcast word are live at once; a tile that does not fit spills.
TEST(TilePlan, FitsTheRegisters) {
  for_each_plan([](Isa isa, bool pairs, const TilePlan& plan) {
    EXPECT_GE(plan.rows, 1);
    EXPECT_GE(plan.vectors, 1);
    if (isa == Isa::kAmx && pairs) {
      // Eight tile registers of 16 rows: sums and weights of each vector, and the tokens.
      EXPECT_LE(plan.rows, 16);
      EXPECT_LE(2 * plan.vectors + 1, 8);
    } else {
      EXPECT_LE(plan.rows * plan.vectors + plan.vectors + 1, registers(isa));
    }
  });
}

// A packed panel of the longest block stays in a second-level cache of 256 KiB, the smallest of any processor with
// AVX2.
TEST(TilePlan, LongestPanelFitsTheSecondLevelCache) {
  for_each_plan([](Isa, bool, const TilePlan& plan) {
    EXPECT_LE(int64_t{4} * plan.block_words * plan.vectors * plan.lanes, 256 << 10);
  });
}

// Half of the second-level cache: 512 KiB where AVX2 is the best there is, 1 MiB where AVX-512 is. The other half is
// for the panels that are fetched meanwhile.
TEST(TilePlan, PanelsInUseLeaveRoomForTheNextOnes) {
  for_each_plan([](Isa, bool, const TilePlan& plan) {
    EXPECT_GE(plan.panel_bytes, int64_t{4} * plan.block_words * plan.vectors * plan.lanes);
    EXPECT_LE(plan.panel_bytes, plan.lanes == 8 ? 256 << 10 : 512 << 10);
  });
}

TEST(TilePlan, SumsOfAFewRowsFitTheRegisters) {
  for_each_plan([](Isa isa, bool, const TilePlan& plan) {
    EXPECT_GE(plan.spread_dot_rows, 1);
    EXPECT_LE(plan.spread_dot_rows, plan.dot_rows);
    EXPECT_LE(4 * plan.dot_rows + plan.dot_rows + 1, registers(isa));  // and the rows, and a weight
  });
}

TEST(TilePlan, BlocksHoldWholeVectorsOfWords) {
  for_each_plan([](Isa, bool, const TilePlan& plan) {
    EXPECT_GT(plan.block_words, 0);
    EXPECT_EQ(plan.block_words % plan.lanes, 0);
    EXPECT_GT(plan.column_block_words, 0);
    EXPECT_LE(plan.column_block_words, plan.block_words);
    EXPECT_EQ(plan.column_block_words % plan.lanes, 0);
    EXPECT_GE(plan.column_block_words, 64);  // rows of dW that a task computes at least
    EXPECT_GE(plan.few_rows, 1);
    EXPECT_LE(plan.few_rows, 32);  // what products.h keeps pointers for
  });
}

TEST(TilePlan, PairsAreMultipliedWhereTheProcessorCanAndForBFloat16Only) {
  for (const Isa isa : kAllIsas) {
    const bool can = isa == Isa::kAvx512Bf16 || isa == Isa::kAmx;
    EXPECT_EQ(multiplies_pairs(isa, DType::kBFloat16), can);
    for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kFloat16}) {
      EXPECT_FALSE(multiplies_pairs(isa, dtype));
    }
  }
}

}  // namespace
}  // namespace dynamic_moe
