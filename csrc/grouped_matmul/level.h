// SPDX-License-Identifier: Apache-2.0
// One level's table: the storage type chosen at run time, the rest at compile time. Included only by *_cpu_<level>.cpp.
#pragma once

#include "grouped_matmul/cpu_levels.h"
#include "grouped_matmul/products.h"

namespace dynamic_moe {
namespace {

// Calls run(Config<...>{}) for the storage type.
template <class Simd, Isa kIsa, class Run>
void for_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kBFloat16:
      return run(Config<Simd, BFloat16, kIsa>{});
    case DType::kFloat16:
      return run(Config<Simd, Float16, kIsa>{});
    default:
      return run(Config<Simd, float, kIsa>{});
  }
}

template <class Simd, Isa kIsa>
constexpr GroupedMatmulKernels grouped_matmul_kernels() {
  return {
      [](const GroupedMatmulParams& p) {
        for_dtype<Simd, kIsa>(p.dtype, [&](auto config) { grouped_matmul<decltype(config)>(p); });
      },
      [](const GroupedMatmulDxParams& p) {
        for_dtype<Simd, kIsa>(p.dtype, [&](auto config) { grouped_matmul_dx<decltype(config)>(p); });
      },
      [](const GroupedMatmulDwParams& p) {
        for_dtype<Simd, kIsa>(p.dtype, [&](auto config) { grouped_matmul_dw<decltype(config)>(p); });
      },
  };
}

}  // namespace
}  // namespace dynamic_moe
