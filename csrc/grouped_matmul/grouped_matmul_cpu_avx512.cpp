// SPDX-License-Identifier: Apache-2.0
#include "common/simd/avx512.h"
#include "grouped_matmul/level.h"

namespace dynamic_moe {

constinit const GroupedMatmulKernels kGroupedMatmulAvx512 = grouped_matmul_kernels<Avx512, Isa::kAvx512>();

}  // namespace dynamic_moe
