// SPDX-License-Identifier: Apache-2.0
// Chooses the level and the storage type.
#include "common/isa.h"
#include "expert_mlp/cpu_levels.h"
#include "expert_mlp/plain.h"

namespace dynamic_moe {
namespace {

const ExpertMlpKernels& kernels() {
#ifdef __x86_64__
  switch (current_isa()) {
    case Isa::kAvx2:
      return kExpertMlpAvx2;
    case Isa::kAvx512:
      return kExpertMlpAvx512;
    case Isa::kAvx512Bf16:
      return kExpertMlpAvx512Bf16;
    case Isa::kAmx:
      return kExpertMlpAmx;
    case Isa::kScalar:
      break;
  }
#endif
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
