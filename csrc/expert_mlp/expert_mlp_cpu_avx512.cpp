// SPDX-License-Identifier: Apache-2.0
#include "common/simd/avx512.h"
#include "expert_mlp/level.h"

namespace dynamic_moe {

constinit const ExpertMlpKernels kExpertMlpAvx512 = expert_mlp_kernels<Avx512, Isa::kAvx512>();

}  // namespace dynamic_moe
