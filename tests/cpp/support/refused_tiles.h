// SPDX-License-Identifier: Apache-2.0
// This machine, as if its processor had tiles and the operating system refused them. Bfloat16 then runs on the
// machine's real AVX-512.
#pragma once

#include <cerrno>

#include "common/isa_choice.h"

namespace dynamic_moe::testing {

class RefusedTiles {
 public:
  static bool can_be_played() { return isa_compiled(Isa::kAmx) && isa_supported(Isa::kAvx512); }

  explicit RefusedTiles(const char* forced = nullptr) : choice_(features(), forced, refuse) {
    requests = 0;
    use_isa_choice(&choice_);
  }
  ~RefusedTiles() { use_isa_choice(nullptr); }
  RefusedTiles(const RefusedTiles&) = delete;
  RefusedTiles& operator=(const RefusedTiles&) = delete;

  static inline int requests = 0;

 private:
  static CpuFeatures features() {
    CpuFeatures features = detect_cpu_features();
    features.avx512_bf16 = features.amx_bf16 = features.has_tile_unit = true;
    return features;
  }
  static int refuse() {
    ++requests;
    return ENOSPC;
  }

  IsaChoice choice_;
};

}  // namespace dynamic_moe::testing
