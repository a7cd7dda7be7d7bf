// SPDX-License-Identifier: Apache-2.0
#include "permutation/lanes_avx2.h"
#include "permutation/level.h"

namespace dynamic_moe {

constinit const PermutationKernels kPermutationAvx2 = permutation_kernels<Avx2PermutationLanes>();

}  // namespace dynamic_moe
