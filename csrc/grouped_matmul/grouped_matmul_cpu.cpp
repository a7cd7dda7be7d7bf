// SPDX-License-Identifier: Apache-2.0
// Chooses the level and the storage type.
#include "grouped_matmul/cpu_levels.h"
#include "grouped_matmul/plain.h"

namespace dynamic_moe {
namespace {

const GroupedMatmulKernels& kernels() {
#ifdef __x86_64__
  switch (current_isa()) {
    case Isa::kAvx2:
      return kGroupedMatmulAvx2;
    case Isa::kAvx512:
      return kGroupedMatmulAvx512;
    case Isa::kAvx512Bf16:
      return kGroupedMatmulAvx512Bf16;
    case Isa::kAmx:
      return kGroupedMatmulAmx;
    case Isa::kScalar:
      break;
  }
#endif
  return kGroupedMatmulScalar;
}

}  // namespace

void grouped_matmul_cpu(const GroupedMatmulParams& params) {
  if (params.dtype == DType::kFloat64) return plain::grouped_matmul<double>(params);
  kernels().forward(params);
}

void grouped_matmul_dx_cpu(const GroupedMatmulDxParams& params) {
  if (params.dtype == DType::kFloat64) return plain::grouped_matmul_dx<double>(params);
  kernels().dx(params);
}

void grouped_matmul_dw_cpu(const GroupedMatmulDwParams& params) {
  if (params.dtype == DType::kFloat64) return plain::grouped_matmul_dw<double>(params);
  kernels().dw(params);
}

}  // namespace dynamic_moe
