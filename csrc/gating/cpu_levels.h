// SPDX-License-Identifier: Apache-2.0
// The table through which each CPU level offers gating for float32, bfloat16 and float16 logits, some tokens at a time.
// The 512-bit levels share one table; float64 is gating_float64.h on every level.
//
// Every level returns the same bits. Sums over the experts of a token are 16 partial sums (expert e goes to sum e % 16,
// in ascending order), added in pairs, pairs of pairs and so on. Sums over tokens are float32 within kTokensPerSum
// tokens and float64 beyond.
#pragma once

#include "gating/gating.h"

namespace dynamic_moe {

constexpr int64_t kTokensPerSum = 64;
constexpr int64_t kTokensPerChunk = 256;  // what one task takes; a multiple of kTokensPerSum

struct GatingChunk {
  int64_t begin, end;  // tokens; begin is a multiple of kTokensPerChunk
  // Experts worth sorting: log P at most this many standard deviations below its mean, both weighted by P.
  float spread;
  // Write around the cache: the buffer is too large to stay in it, and its rows are whole cache lines.
  bool stream_selection, stream_probabilities;
  int32_t* tokens_per_expert;  // [E] of this chunk, zeroed
  double* probability_sum;     // [E] of this chunk, zeroed
  char* scratch;               // forward_scratch_bytes(), 64-byte aligned
};

struct GatingKernels {
  // Returns the number of non-finite tokens.
  int64_t (*forward)(const GatingParams&, const GatingChunk&);
  // Tokens [begin, end). Scratch: backward_scratch_floats(), all zeros before and after.
  void (*backward)(const GatingBackwardParams&, int64_t begin, int64_t end, float* scratch);
};

namespace {  // internal linkage, as everything that the levels' files compile

constexpr int kMostLanes = 16;

// Whole vectors are written behind the last element.
constexpr int64_t padded(int64_t count) { return (count + kMostLanes - 1) / kMostLanes * kMostLanes + kMostLanes; }

constexpr size_t forward_scratch_bytes(int64_t num_experts) {
  // Keys (8 bytes), candidates and the selection by rank (2 * 4 bytes each), exponentials (4 bytes), for every lane;
  // one row of sums, one of counts; four keys.
  return static_cast<size_t>(padded(num_experts)) * (kMostLanes * (8 + 8 + 8 + 4) + 4 + 4) + 4 * kMostLanes * 8;
}

constexpr int64_t backward_scratch_floats(int64_t num_experts) { return kMostLanes * padded(num_experts); }

}  // namespace

extern const GatingKernels kGatingScalar;
#ifdef __x86_64__
extern const GatingKernels kGatingAvx2;
extern const GatingKernels kGatingAvx512;
#endif

}  // namespace dynamic_moe
