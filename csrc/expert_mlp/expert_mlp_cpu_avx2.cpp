// SPDX-License-Identifier: Apache-2.0
#include "common/simd/avx2.h"
#include "expert_mlp/level.h"

namespace dynamic_moe {

constinit const ExpertMlpKernels kExpertMlpAvx2 = expert_mlp_kernels<Avx2, Isa::kAvx2>();

}  // namespace dynamic_moe
