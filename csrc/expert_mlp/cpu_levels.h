// SPDX-License-Identifier: Apache-2.0
// The table through which each CPU level offers the expert pass; float64 is plain.h on every level.
#pragma once

#include "expert_mlp/expert_mlp.h"

namespace dynamic_moe {

struct ExpertMlpKernels {
  void (*forward)(const ExpertMlpParams&);
  void (*backward)(const ExpertMlpBackwardParams&);
};

extern const ExpertMlpKernels kExpertMlpScalar;
#ifdef __x86_64__
extern const ExpertMlpKernels kExpertMlpAvx2;
extern const ExpertMlpKernels kExpertMlpAvx512;
extern const ExpertMlpKernels kExpertMlpAvx512Bf16;
extern const ExpertMlpKernels kExpertMlpAmx;
#endif

}  // namespace dynamic_moe
