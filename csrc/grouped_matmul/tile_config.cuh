// SPDX-License-Identifier: Apache-2.0
// What a tile kernel is made for, as a type: which product, which arithmetic, which regime. Sizes follow from the
// policy of the architecture that is being compiled, so a kernel has one name and the right sizes everywhere.
#pragma once

#include "common/cuda/elements.cuh"
#include "common/cuda/platform.cuh"
#include "grouped_matmul/policy.h"

namespace dynamic_moe {

#if defined(__CUDA_ARCH__)
inline constexpr Arch kThisArch = arch_of(__CUDA_ARCH__ / 10);
#elif defined(DYNAMIC_MOE_SIMT_ARCH)  // 80, 90, 100 or 120: whose tiles the tests run
inline constexpr Arch kThisArch = arch_of(DYNAMIC_MOE_SIMT_ARCH);
#else
inline constexpr Arch kThisArch = Arch::kSm80;
#endif

// result = left right, both named by what they are in the product:
enum class Product {
  kForward,         // rows [R, K] times W^T:   left is K-major, right [N, K] is K-major
  kInputGradient,   // rows [R, N] times W:     left is K-major, right [N, K] is not: its rows are the depth
  kWeightGradient,  // rows^T [N, R] times rows: neither is, the group's rows are the depth
};

template <Math kMath>
struct MathElement;
template <>
struct MathElement<Math::kBFloat16> {
  using Type = __nv_bfloat16;
};
template <>
struct MathElement<Math::kFloat16> {
  using Type = __half;
};
template <>
struct MathElement<Math::kTf32> {
  using Type = float;
};
template <>
struct MathElement<Math::kFloat32> {
  using Type = float;
};

template <Product product, Math math, Regime regime>
struct TileConfig {
  static constexpr Product kProduct = product;
  static constexpr Math kMath = math;
  static constexpr Regime kRegime = regime;
  static constexpr MatmulPolicy kPolicy = matmul_policy(kThisArch, math, regime);
  using T = typename MathElement<math>::Type;

  static constexpr bool kLeftKMajor = product != Product::kWeightGradient;
  static constexpr bool kRightKMajor = product == Product::kForward;
  // Whether everything moves in whole vectors of 16 bytes.
  static constexpr bool kAligned = regime != Regime::kUnaligned;

  static constexpr int kTileM = kPolicy.tile_m, kTileN = kPolicy.tile_n, kTileK = kPolicy.tile_k;
  static constexpr int kStages = kPolicy.stages, kThreads = kPolicy.threads();
  static constexpr int kRegisterBlocks = kPolicy.register_blocks();
  static constexpr int kWarpM = kPolicy.warp_m(), kWarpN = kPolicy.warp_n(), kWarpsN = kPolicy.warps_n;
  static constexpr int kLeftBytes = left_tile_bytes(kPolicy, math), kStageBytes = stage_bytes(kPolicy, math);
  static constexpr int kSlabHeight = kSlabRows, kSlabRowFloats = slab_row_floats(kPolicy);
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
};

}  // namespace dynamic_moe
