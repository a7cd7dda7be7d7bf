// SPDX-License-Identifier: Apache-2.0
#include "common/simd/avx512.h"
#include "float32_linear/kernels.h"

namespace dynamic_moe {

constinit const Float32LinearKernels kFloat32LinearAvx512 = float32_linear_kernels<Avx512>();

}  // namespace dynamic_moe
