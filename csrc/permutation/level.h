// SPDX-License-Identifier: Apache-2.0
// One level's table: the storage type chosen at run time, the rest at compile time. Included only by *_cpu_<level>.cpp.
#pragma once

#include "permutation/combine.h"
#include "permutation/permute.h"

namespace dynamic_moe {
namespace {

template <class Lanes, class Run>
void for_dtype(DType dtype, const Run& run) {
  using Float32 = typename Lanes::Float32;
  switch (dtype) {
    case DType::kFloat64:
      return run(Combine<Lanes, typename Lanes::Float64, double, double>{});
    case DType::kBFloat16:
      return run(Combine<Lanes, Float32, float, BFloat16>{});
    case DType::kFloat16:
      return run(Combine<Lanes, Float32, float, Float16>{});
    case DType::kFloat32:
      return run(Combine<Lanes, Float32, float, float>{});
  }
}

template <class Lanes>
constexpr PermutationKernels permutation_kernels() {
  return {
      Permute<Lanes>::count,
      Permute<Lanes>::permute,
      [](const CombineParams& p, const CombineTask& task) {
        for_dtype<Lanes>(p.dtype, [&](auto kernel) { kernel.combine(p, task); });
      },
      [](const CombineBackwardParams& p, const CombineTask& task) {
        for_dtype<Lanes>(p.dtype, [&](auto kernel) { kernel.combine_backward(p, task); });
      },
  };
}

}  // namespace
}  // namespace dynamic_moe
