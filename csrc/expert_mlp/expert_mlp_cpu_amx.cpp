// SPDX-License-Identifier: Apache-2.0
#include "common/simd/avx512.h"
#include "expert_mlp/level.h"

namespace dynamic_moe {
namespace {

struct Amx : Avx512Bf16 {
  using Tiles = AmxTiles;
};

}  // namespace

constinit const ExpertMlpKernels kExpertMlpAmx = expert_mlp_kernels<Amx, Isa::kAmx>();

}  // namespace dynamic_moe
