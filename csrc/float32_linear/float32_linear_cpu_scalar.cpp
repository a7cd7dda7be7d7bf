// SPDX-License-Identifier: Apache-2.0
#include "common/simd/scalar.h"
#include "float32_linear/kernels.h"

namespace dynamic_moe {

constinit const Float32LinearKernels kFloat32LinearScalar = float32_linear_kernels<ScalarLane>();

}  // namespace dynamic_moe
