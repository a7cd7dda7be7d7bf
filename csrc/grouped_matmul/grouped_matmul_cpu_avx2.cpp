// SPDX-License-Identifier: Apache-2.0
#include "common/simd/avx2.h"
#include "grouped_matmul/level.h"

namespace dynamic_moe {

constinit const GroupedMatmulKernels kGroupedMatmulAvx2 = grouped_matmul_kernels<Avx2, Isa::kAvx2>();

}  // namespace dynamic_moe
