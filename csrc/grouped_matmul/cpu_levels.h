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

extern const GroupedMatmulKernels kGroupedMatmulScalar;
#ifdef __x86_64__
extern const GroupedMatmulKernels kGroupedMatmulAvx2;
extern const GroupedMatmulKernels kGroupedMatmulAvx512;
extern const GroupedMatmulKernels kGroupedMatmulAvx512Bf16;
extern const GroupedMatmulKernels kGroupedMatmulAmx;
#endif

}  // namespace dynamic_moe
