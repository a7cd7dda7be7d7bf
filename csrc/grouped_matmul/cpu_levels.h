// SPDX-License-Identifier: Apache-2.0
// The table through which each CPU level offers the products. A level's kernels take float32, bfloat16 and float16;
// float64 is plain.h on every level.
#pragma once

#include "common/isa.h"
#include "grouped_matmul/grouped_matmul.h"

namespace dynamic_moe {

struct GroupedMatmulKernels {
  void (*forward)(const GroupedMatmulParams&);
  void (*dx)(const GroupedMatmulDxParams&);
  void (*dw)(const GroupedMatmulDwParams&);
};

// Defined for the levels that the build compiled (DYNAMIC_MOE_HAS_<level>).
extern const GroupedMatmulKernels kGroupedMatmulScalar;
extern const GroupedMatmulKernels kGroupedMatmulAvx2;
extern const GroupedMatmulKernels kGroupedMatmulAvx512;
extern const GroupedMatmulKernels kGroupedMatmulAvx512Bf16;
extern const GroupedMatmulKernels kGroupedMatmulAmx;

}  // namespace dynamic_moe
