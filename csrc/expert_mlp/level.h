// SPDX-License-Identifier: Apache-2.0
// One level's table of the expert pass. Included only by *_cpu_<level>.cpp.
#pragma once

#include "expert_mlp/cpu_levels.h"
#include "expert_mlp/passes.h"
#include "expert_mlp/prepacked.h"
#include "grouped_matmul/level.h"

namespace dynamic_moe {
namespace {

template <class Simd, Isa kIsa>
constexpr ExpertMlpKernels expert_mlp_kernels() {
  return {
      [](const ExpertMlpParams& p) {
        for_dtype<Simd, kIsa>(p.dtype, [&](auto config) { expert_mlp<decltype(config)>(p); });
      },
      [](const ExpertMlpBackwardParams& p) {
        for_dtype<Simd, kIsa>(p.dtype, [&](auto config) { expert_mlp_backward<decltype(config)>(p); });
      },
      [](const PrepackExpertsParams& p, void* panels) {
        for_dtype<Simd, kIsa>(p.dtype, [&](auto config) { prepack_experts<decltype(config)>(p, panels); });
      },
      [](const ExpertMlpPrepackedParams& p, const void* panels) {
        for_dtype<Simd, kIsa>(p.dtype, [&](auto config) { expert_mlp_prepacked<decltype(config)>(p, panels); });
      },
  };
}

}  // namespace
}  // namespace dynamic_moe
