// SPDX-License-Identifier: Apache-2.0
#include "common/simd/avx512.h"
#include "grouped_matmul/level.h"

namespace dynamic_moe {

const GroupedMatmulKernels kGroupedMatmulAmx = grouped_matmul_kernels<Avx512Bf16, Isa::kAmx>();

}  // namespace dynamic_moe
