// SPDX-License-Identifier: Apache-2.0
// Sizes of tiles and blocks, per CPU level: data, so that they can be printed and tested.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/types.h"

namespace dynamic_moe {

// A register tile is `rows` tokens by `vectors * lanes` outputs. The outputs' side is packed once per group into panels
// of [words][vectors * lanes] that stay in the second-level cache; the tokens' side is broadcast word by word from
// where it lies. A word is 32 bits: one float32, or two bfloat16 where the processor multiplies pairs.
struct TilePlan {
  int rows;
  int vectors;
  int lanes;
  int block_words;         // longest stretch of the inner dimension that is packed at once
  int column_block_words;  // the same where the inner dimension runs down the rows of storage: the shorter it is, the
                           // more panels fit, and the longer the stretch of each row that is read
  int panel_bytes;         // of the second-level cache that the panels packed at once may take
  int few_rows;            // a group of at most this many rows reads its weights in place instead of packing them
  int dot_rows;            // of such a group, that are multiplied side by side: four sums each, all in registers
  int spread_dot_rows;     // the same where storage is not made of words; on AVX2, too, beside the rows themselves
};

constexpr TilePlan tile_plan(Isa isa, bool multiplies_pairs) {
  switch (isa) {
    case Isa::kScalar:
      return {4, 2, 1, 1024, 1024, 400000, 1, 3, 3};
    case Isa::kAvx2:
      return {4, 3, 8, 512, 128, 160000, 16, 3, 2};
    case Isa::kAmx:
      if (multiplies_pairs) return {16, 3, 16, 1024, 1024, 400000, 16, 6, 6};
      break;
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      break;
  }
  return {8, 3, 16, 1024, 1024, 400000, 16, 6, 6};
}

constexpr bool multiplies_pairs(Isa isa, DType dtype) {
  return dtype == DType::kBFloat16 && (isa == Isa::kAvx512Bf16 || isa == Isa::kAmx);
}

}  // namespace dynamic_moe
