// SPDX-License-Identifier: Apache-2.0
#include "common/simd/avx512.h"
#include "expert_mlp/level.h"

namespace dynamic_moe {

constinit const ExpertMlpKernels kExpertMlpAvx512Bf16 = expert_mlp_kernels<Avx512Bf16, Isa::kAvx512Bf16>();

}  // namespace dynamic_moe
