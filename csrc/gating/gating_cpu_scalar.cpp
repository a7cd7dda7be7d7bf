// SPDX-License-Identifier: Apache-2.0
#include "gating/lanes_scalar.h"
#include "gating/level.h"

namespace dynamic_moe {

constinit const GatingKernels kGatingScalar = gating_kernels<SingleLane>();

}  // namespace dynamic_moe
