// SPDX-License-Identifier: Apache-2.0
// The table through which each CPU level offers permutation and combine. The 512-bit levels share one table.
//
// Every level returns the same bits: products and sums are rounded separately, and a dot product over H is a fixed
// number of partial sums (element h goes to sum h % partials), folded in halves.
#pragma once

#include "permutation/permutation.h"

namespace dynamic_moe {

// Tokens [begin, end).
struct CombineTask {
  int64_t begin, end;
  bool stream;     // write around the cache: the result is too large to stay in it, and its rows are aligned
  int64_t* slots;  // [2, K] scratch
};

struct PermutationKernels {
  // counts[e] += live slots of expert e in ids [0, num_slots).
  void (*count)(const int32_t* ids, int64_t num_slots, int32_t num_experts, int32_t* counts);
  // Tokens [begin, end); next[e] is the row that the next slot of expert e gets, and is advanced.
  void (*permute)(const PermuteParams&, int64_t begin, int64_t end, int32_t* next);
  void (*combine)(const CombineParams&, const CombineTask&);
  void (*combine_backward)(const CombineBackwardParams&, const CombineTask&);
};

extern const PermutationKernels kPermutationScalar;
#ifdef __x86_64__
extern const PermutationKernels kPermutationAvx2;
extern const PermutationKernels kPermutationAvx512;
#endif

}  // namespace dynamic_moe
