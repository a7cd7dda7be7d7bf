// SPDX-License-Identifier: Apache-2.0
// Chooses the level and the storage type.
#include "common/isa.h"
#include "expert_mlp/cpu_levels.h"
#include "expert_mlp/plain.h"

namespace dynamic_moe {
namespace {

const ExpertMlpKernels& kernels() {
  switch (current_isa()) {
    case Isa::kScalar:
      break;
    case Isa::kAvx2:
#ifdef DYNAMIC_MOE_HAS_AVX2
      return kExpertMlpAvx2;
#else
      break;
#endif
    case Isa::kAvx512:
#ifdef DYNAMIC_MOE_HAS_AVX512
      return kExpertMlpAvx512;
#else
      break;
#endif
    case Isa::kAvx512Bf16:
#ifdef DYNAMIC_MOE_HAS_AVX512_BF16
      return kExpertMlpAvx512Bf16;
#else
      break;
#endif
    case Isa::kAmx:
#ifdef DYNAMIC_MOE_HAS_AMX
      return kExpertMlpAmx;
#else
      break;
#endif
  }
  return kExpertMlpScalar;
}

}  // namespace

void expert_mlp_cpu(const ExpertMlpParams& params) {
  if (params.dtype == DType::kFloat64) return plain::expert_mlp<double>(params);
  kernels().forward(params);
}

void expert_mlp_backward_cpu(const ExpertMlpBackwardParams& params) {
  if (params.dtype == DType::kFloat64) return plain::expert_mlp_backward<double>(params);
  kernels().backward(params);
}

}  // namespace dynamic_moe
