// SPDX-License-Identifier: Apache-2.0
#include "common/simd/scalar.h"
#include "expert_mlp/level.h"

namespace dynamic_moe {

constinit const ExpertMlpKernels kExpertMlpScalar = expert_mlp_kernels<ScalarLane, Isa::kScalar>();

}  // namespace dynamic_moe
