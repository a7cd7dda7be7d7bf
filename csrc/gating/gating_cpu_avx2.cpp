// SPDX-License-Identifier: Apache-2.0
#include "gating/lanes_avx2.h"
#include "gating/level.h"

namespace dynamic_moe {

constinit const GatingKernels kGatingAvx2 = gating_kernels<Avx2Lanes>();

}  // namespace dynamic_moe
