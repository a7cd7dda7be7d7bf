// SPDX-License-Identifier: Apache-2.0
#include "common/simd/avx512.h"
#include "grouped_matmul/level.h"

namespace dynamic_moe {
namespace {

struct Amx : Avx512Bf16 {
  using Tiles = AmxTiles;
};

}  // namespace

constinit const GroupedMatmulKernels kGroupedMatmulAmx = grouped_matmul_kernels<Amx, Isa::kAmx>();

}  // namespace dynamic_moe
