// SPDX-License-Identifier: Apache-2.0
// What a tile kernel reads.
#pragma once

#include <cstdint>

namespace dynamic_moe {

// For Product::kForward and kInputGradient the result has the groups' rows, and each expert its right matrix; for
// kWeightGradient the result is each expert's matrix, and both operands have the groups' rows.
template <class T>
struct Operands {
  const int32_t* expert_offsets;  // [E + 1]
  int32_t num_experts;            // E
  const T* left;                  // rows of `depth` elements; kWeightGradient: of `height`
  const int32_t* left_rows;       // row r of the group is left[left_rows[r]]; null: left[r]
  const T* right;                 // kForward: [E, halves * width, depth]; kInputGradient: [E, depth, width];
                                  // kWeightGradient: rows of `width` elements
  const int32_t* right_rows;      // kWeightGradient: as left_rows
  int32_t height;                 // kWeightGradient: rows of a result matrix
  int32_t width;                  // columns of the result, or of each of its halves
  int32_t depth;                  // what is summed over, but for kWeightGradient
  int32_t slices;                 // into how many pieces the depth is cut, each with a result of its own
};

}  // namespace dynamic_moe
