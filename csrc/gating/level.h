// SPDX-License-Identifier: Apache-2.0
// One level's table: storage type and number of experts chosen at run time, the rest at compile time.
// Included only by *_cpu_<level>.cpp.
#pragma once

#include "gating/backward.h"
#include "gating/forward_few.h"
#include "gating/forward_many.h"

namespace dynamic_moe {
namespace {

template <class L, class Forward>
int64_t forward_chunk(const GatingParams& p, const GatingChunk& chunk) {
  GroupScratch<L> scratch(chunk.scratch, p.num_experts);
  int64_t non_finite = 0;
  for (int64_t first = chunk.begin; first < chunk.end; first += kTokensPerSum) {
    const int64_t last = first + kTokensPerSum < chunk.end ? first + kTokensPerSum : chunk.end;
    for (int64_t token = first; token < last; token += L::kLanes) {
      const Group<L> group = Forward::forward(p, chunk, token, scratch);
      if (group.non_finite == 0) continue;
      write_late_rows<L>(p, scratch.late);
      mark_non_finite(p, chunk, group);
      non_finite += __builtin_popcount(group.non_finite);
    }
    add_column_sums(chunk, scratch.column_sum, p.num_experts);
  }
  write_late_rows<L>(p, scratch.late);
  for (int32_t e = 0; e < p.num_experts; ++e) chunk.tokens_per_expert[e] += scratch.counts[e];
  L::fence();
  return non_finite;
}

template <class L, class Logit>
int64_t forward(const GatingParams& p, const GatingChunk& chunk) {
  if constexpr (L::kLanes > 1) {
    if (p.num_experts <= 8) return forward_chunk<L, ForwardFew<L, 8, Logit>>(p, chunk);
    if (p.num_experts <= 16) return forward_chunk<L, ForwardFew<L, 16, Logit>>(p, chunk);
    if (p.num_experts <= 32) return forward_chunk<L, ForwardFew<L, 32, Logit>>(p, chunk);
  }
  return forward_chunk<L, ForwardMany<L, Logit>>(p, chunk);
}

template <class L>
constexpr GatingKernels gating_kernels() {
  return {
      [](const GatingParams& p, const GatingChunk& chunk) {
        switch (p.logits_dtype) {
          case DType::kBFloat16:
            return forward<L, BFloat16>(p, chunk);
          case DType::kFloat16:
            return forward<L, Float16>(p, chunk);
          default:
            return forward<L, float>(p, chunk);
        }
      },
      [](const GatingBackwardParams& p, int64_t begin, int64_t end, float* scratch) {
        switch (p.logits_dtype) {
          case DType::kBFloat16:
            return Backward<L, BFloat16>{p}.tokens(begin, end, scratch);
          case DType::kFloat16:
            return Backward<L, Float16>{p}.tokens(begin, end, scratch);
          default:
            return Backward<L, float>{p}.tokens(begin, end, scratch);
        }
      },
  };
}

}  // namespace
}  // namespace dynamic_moe
