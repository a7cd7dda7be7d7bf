// SPDX-License-Identifier: Apache-2.0
// Gating of float64 logits: plain loops, the same on every CPU level. gradcheck needs it to be right, nobody to be
// fast.
#pragma once

#include "gating/cpu_levels.h"

namespace dynamic_moe {

// Returns the number of non-finite tokens. Uses neither scratch nor spread.
int64_t gating_float64(const GatingParams& params, const GatingChunk& chunk);

void gating_backward_float64(const GatingBackwardParams& params, int64_t begin, int64_t end);

}  // namespace dynamic_moe
