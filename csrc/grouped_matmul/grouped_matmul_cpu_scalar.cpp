// SPDX-License-Identifier: Apache-2.0
#include "common/simd/scalar.h"
#include "grouped_matmul/level.h"

namespace dynamic_moe {

constinit const GroupedMatmulKernels kGroupedMatmulScalar = grouped_matmul_kernels<ScalarLane, Isa::kScalar>();

}  // namespace dynamic_moe
