// SPDX-License-Identifier: Apache-2.0
#include "gating/lanes_avx512.h"
#include "gating/level.h"

namespace dynamic_moe {

constinit const GatingKernels kGatingAvx512 = gating_kernels<Avx512Lanes>();

}  // namespace dynamic_moe
