// SPDX-License-Identifier: Apache-2.0
#include "common/simd/avx512.h"
#include "grouped_matmul/level.h"

namespace dynamic_moe {

constinit const GroupedMatmulKernels kGroupedMatmulAvx512Bf16 = grouped_matmul_kernels<Avx512Bf16, Isa::kAvx512Bf16>();

}  // namespace dynamic_moe
