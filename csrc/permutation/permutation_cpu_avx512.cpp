// SPDX-License-Identifier: Apache-2.0
#include "permutation/lanes_avx512.h"
#include "permutation/level.h"

namespace dynamic_moe {

constinit const PermutationKernels kPermutationAvx512 = permutation_kernels<Avx512PermutationLanes>();

}  // namespace dynamic_moe
