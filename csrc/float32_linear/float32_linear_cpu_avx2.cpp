// SPDX-License-Identifier: Apache-2.0
#include "common/simd/avx2.h"
#include "float32_linear/kernels.h"

namespace dynamic_moe {

constinit const Float32LinearKernels kFloat32LinearAvx2 = float32_linear_kernels<Avx2>();

}  // namespace dynamic_moe
