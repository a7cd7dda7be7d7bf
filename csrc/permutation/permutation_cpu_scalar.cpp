// SPDX-License-Identifier: Apache-2.0
#include "permutation/lanes_scalar.h"
#include "permutation/level.h"

namespace dynamic_moe {

constinit const PermutationKernels kPermutationScalar = permutation_kernels<ScalarLanes>();

}  // namespace dynamic_moe
