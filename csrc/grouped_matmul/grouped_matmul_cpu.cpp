// SPDX-License-Identifier: Apache-2.0
// Chooses the level and the storage type.
#include "grouped_matmul/cpu_levels.h"
#include "grouped_matmul/plain.h"

namespace dynamic_moe {
namespace {

const GroupedMatmulKernels& kernels(DType dtype) {
  switch (isa_for(dtype)) {
    case Isa::kScalar:
      break;
    case Isa::kAvx2:
#ifdef DYNAMIC_MOE_HAS_AVX2
      return kGroupedMatmulAvx2;
#else
      break;
#endif
    case Isa::kAvx512:
#ifdef DYNAMIC_MOE_HAS_AVX512
      return kGroupedMatmulAvx512;
#else
      break;
#endif
    case Isa::kAvx512Bf16:
#ifdef DYNAMIC_MOE_HAS_AVX512_BF16
      return kGroupedMatmulAvx512Bf16;
#else
      break;
#endif
    case Isa::kAmx:
#ifdef DYNAMIC_MOE_HAS_AMX
      return kGroupedMatmulAmx;
#else
      break;
#endif
  }
  return kGroupedMatmulScalar;
}

}  // namespace

void grouped_matmul_cpu(const GroupedMatmulParams& params) {
  if (params.dtype == DType::kFloat64) return plain::grouped_matmul<double>(params);
  kernels(params.dtype).forward(params);
}

void grouped_matmul_dx_cpu(const GroupedMatmulDxParams& params) {
  if (params.dtype == DType::kFloat64) return plain::grouped_matmul_dx<double>(params);
  kernels(params.dtype).dx(params);
}

void grouped_matmul_dw_cpu(const GroupedMatmulDwParams& params) {
  if (params.dtype == DType::kFloat64) return plain::grouped_matmul_dw<double>(params);
  kernels(params.dtype).dw(params);
}

}  // namespace dynamic_moe
