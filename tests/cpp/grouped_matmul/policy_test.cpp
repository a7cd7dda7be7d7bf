// SPDX-License-Identifier: Apache-2.0
// The CUDA policies are data; what every one must hold whatever its numbers, and what follows from them.
#include "grouped_matmul/policy.h"

#include <gtest/gtest.h>

#include <sstream>

namespace dynamic_moe {
namespace {

template <class Check>
void for_each_policy(const Check& check) {
  for (const Arch arch : kAllArchs) {
    for (const Math math : kAllMaths) {
      for (const Regime regime : kAllRegimes) {
        SCOPED_TRACE(::testing::Message() << name_of(arch) << ", " << name_of(math) << ", " << name_of(regime));
        check(arch, math, regime, matmul_policy(arch, math, regime));
      }
    }
  }
}

TEST(MatmulPolicy, BlocksFitAMultiprocessor) {
  for_each_policy([](Arch arch, Math math, Regime, const MatmulPolicy& policy) {
    const ArchLimits limits = arch_limits(arch);
    const int bytes = shared_bytes(policy, math);
    EXPECT_LE(bytes, limits.shared_bytes_per_block);
    EXPECT_LE(policy.blocks_per_sm * (bytes + limits.shared_bytes_reserved), limits.shared_bytes_per_sm);
    EXPECT_LE(policy.blocks_per_sm * policy.threads() * policy.registers, limits.registers_per_sm);
    EXPECT_LE(policy.registers, 255);
    EXPECT_GE(policy.register_blocks(), policy.blocks_per_sm);
  });
}

// Devices of capability 8.6 and 8.9 run the code of 8.0 and have 99 KiB for a block.
TEST(MatmulPolicy, CodeOfSm80RunsOnEveryAmpereAndAda) {
  for (const Math math : kAllMaths) {
    for (const Regime regime : kAllRegimes) {
      EXPECT_LE(shared_bytes(matmul_policy(Arch::kSm80, math, regime), math), 99 * 1024);
    }
  }
}

// Sums, and fragments of one step, are in registers at once.
TEST(MatmulPolicy, SumsFitTheRegisters) {
  for_each_policy([](Arch, Math, Regime, const MatmulPolicy& policy) {
    const int sums = policy.tile_m * policy.tile_n / policy.threads();
    EXPECT_LE(sums, 128);
    EXPECT_LE(sums + 32, policy.registers);
  });
}

TEST(MatmulPolicy, TilesAreWholeFragmentsAndWholeCopies) {
  for_each_policy([](Arch, Math math, Regime, const MatmulPolicy& policy) {
    EXPECT_EQ(policy.warp_m() % kSlabRows, 0);
    EXPECT_EQ(policy.warp_n() % 32, 0);  // two halves of 16: gate and up
    EXPECT_EQ(policy.tile_k * element_bytes(math) % 64, 0);
    EXPECT_GE(policy.stages, 2);
    // Threads share the chunks of a K-major row, and of a row that runs along the tile's columns, evenly.
    EXPECT_EQ(policy.threads() % (policy.tile_k * element_bytes(math) / 16), 0);
    EXPECT_EQ(policy.threads() % (policy.tile_n * element_bytes(math) / 16), 0);
  });
}

TEST(MatmulPolicy, OnlyFewRowsHaveTheHeightOfOneMma) {
  for_each_policy([](Arch, Math, Regime regime, const MatmulPolicy& policy) {
    EXPECT_EQ(policy.tile_m == 16, regime == Regime::kFewRows);
  });
}

TEST(MatmulPolicy, RowsPerExpertChooseTheRegime) {
  EXPECT_EQ(regime_of(16 * 8, 8, true), Regime::kFewRows);
  EXPECT_EQ(regime_of(16 * 8 + 1, 8, true), Regime::kSomeRows);
  EXPECT_EQ(regime_of(64 * 8, 8, true), Regime::kSomeRows);
  EXPECT_EQ(regime_of(64 * 8 + 1, 8, true), Regime::kManyRows);
  EXPECT_EQ(regime_of(0, 0, true), Regime::kFewRows);
  EXPECT_EQ(regime_of(1000, 1, false), Regime::kUnaligned);
}

TEST(MatmulPolicy, NoGroupsNeedMoreTilesThanTheBound) {
  constexpr int kTile = 16;
  for (const int64_t a : {0, 1, 15, 16, 17, 33}) {
    for (const int64_t b : {0, 1, 16, 31}) {
      EXPECT_LE(ceil_div(a, kTile) + ceil_div(b, kTile), most_row_tiles(a + b, 2, kTile)) << a << " and " << b;
    }
  }
  EXPECT_EQ(most_row_tiles(0, 8, kTile), 0);
}

TEST(MatmulPolicy, SlicesFillTheDeviceAndNoMore) {
  const MatmulPolicy policy = matmul_policy(Arch::kSm80, Math::kBFloat16, Regime::kFewRows);  // 16 x 128 x 64, 4 stages
  // One row and 1024 columns are 8 tiles for 216 blocks; a depth of 4096 has 64 steps, 16 times the pipeline.
  EXPECT_EQ(depth_slices(policy, 1, 8, 1024, 4096, 108), 16);
  EXPECT_EQ(depth_slices(policy, 1, 8, 1024, 1024, 108), 4);    // 16 steps
  EXPECT_EQ(depth_slices(policy, 1, 8, 1024, 64, 108), 1);      // 1 step
  EXPECT_EQ(depth_slices(policy, 64, 64, 1408, 4096, 108), 1);  // 748 tiles
  EXPECT_EQ(depth_slices(policy, 8, 8, 1024, 4096, 108), 4);    // 64 tiles
  EXPECT_EQ(depth_slices(policy, 0, 8, 0, 4096, 108), 16);      // nothing to do
}

TEST(MatmulPolicy, ArchitecturesRunTheCodeOfTheHighestBelow) {
  EXPECT_EQ(arch_of(80), Arch::kSm80);
  EXPECT_EQ(arch_of(89), Arch::kSm80);
  EXPECT_EQ(arch_of(90), Arch::kSm90);
  EXPECT_EQ(arch_of(103), Arch::kSm100);
  EXPECT_EQ(arch_of(120), Arch::kSm120);
  EXPECT_EQ(arch_of(130), Arch::kSm120);
}

TEST(MatmulPolicy, PrintsItself) {
  std::ostringstream all;
  print_policies(all);
  EXPECT_NE(all.str().find("sm_80, bfloat16, many rows: 128 x 128 x 32, 4 stages, 2 x 2 warps, at most 255 registers, "
                           "2 blocks per SM, 65536 bytes of shared memory\n"),
            std::string::npos);
}

}  // namespace
}  // namespace dynamic_moe
