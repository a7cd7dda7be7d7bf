// SPDX-License-Identifier: Apache-2.0
// The table through which each CPU level offers the expert pass; float64 is plain.h on every level.
#pragma once

#include "expert_mlp/expert_mlp.h"

namespace dynamic_moe {

struct ExpertMlpKernels {
  void (*forward)(const ExpertMlpParams&);
  void (*backward)(const ExpertMlpBackwardParams&);
  // `panels` is what the level makes of the packed buffer for itself: everything behind its header.
  void (*prepack)(const PrepackExpertsParams&, void* panels);
  void (*forward_prepacked)(const ExpertMlpPrepackedParams&, const void* panels);
};

// Defined for the levels that the build compiled (DYNAMIC_MOE_HAS_<level>).
extern const ExpertMlpKernels kExpertMlpScalar;
extern const ExpertMlpKernels kExpertMlpAvx2;
extern const ExpertMlpKernels kExpertMlpAvx512;
extern const ExpertMlpKernels kExpertMlpAvx512Bf16;
extern const ExpertMlpKernels kExpertMlpAmx;

}  // namespace dynamic_moe
