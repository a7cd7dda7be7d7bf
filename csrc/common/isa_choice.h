// SPDX-License-Identifier: Apache-2.0
// How the level is chosen on a machine: what isa.h says of this one, for any. Tests make machines that are not at hand.
#pragma once

#include <atomic>
#include <optional>
#include <vector>

#include "common/cpu_features.h"
#include "common/isa.h"
#include "common/tile_permission.h"

namespace dynamic_moe {

class IsaChoice {
 public:
  // `forced`: the value of DYNAMIC_MOE_CPU_ISA, or null. Throws as current_isa() does.
  IsaChoice(const CpuFeatures& features, const char* forced, TilePermission::Request request);

  bool supports(Isa isa) const { return isa_compiled(isa) && can_run(isa, features_); }
  std::vector<Isa> supported() const;

  Isa current() const { return choice_.load(std::memory_order_relaxed).isa; }
  Isa for_dtype(DType dtype) {
    const Choice choice = choice_.load(std::memory_order_relaxed);
    if (choice.isa != Isa::kAmx || dtype != DType::kBFloat16) return choice.isa;
    return with_tiles(choice.is_forced);
  }
  void force(Isa isa);
  void reset() { choice_.store(initial_, std::memory_order_relaxed); }

  const CpuFeatures& features() const { return features_; }
  TilePermission& tiles() { return tiles_; }

  // The best level for bfloat16 that needs no tiles.
  Isa without_tiles() const;

 private:
  struct alignas(8) Choice {  // clang asks for libatomic where a type is less aligned than it is large
    Isa isa;
    bool is_forced;  // a level that was forced is used or an error, never replaced
  };

  Choice initial(const char* forced) const;
  Isa with_tiles(bool is_forced);

  const CpuFeatures features_;
  TilePermission tiles_;
  const Choice initial_;
  std::atomic<Choice> choice_;
};

// Of this machine, behind the functions of isa.h.
IsaChoice& isa_choice();

// For tests: puts another choice behind them, null for this machine's again. It must outlive its use.
void use_isa_choice(IsaChoice* choice);

}  // namespace dynamic_moe
