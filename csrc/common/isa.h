// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use. Every level is compiled into the binary; the best one that the processor
// and the operating system support is taken, unless DYNAMIC_MOE_CPU_ISA names another. No level is gated on another.
// The tiles of `amx` need a permission besides (tile_permission.h), which isa_for() asks for when a bfloat16 product
// comes: where it is refused, such products run at another level.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "common/types.h"

namespace dynamic_moe {

enum class Isa : int { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };

inline constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

// "scalar", "avx2", "avx512", "avx512_bf16", "amx".
const char* isa_name(Isa isa);

// Throws std::invalid_argument that names the value and the known names.
Isa parse_isa(std::string_view name);

bool isa_compiled(Isa isa);

// Compiled into this binary and runnable on this machine; whether it lends its tiles to this process is not asked.
bool isa_supported(Isa isa);
std::vector<Isa> supported_isas();

// The level in use: DYNAMIC_MOE_CPU_ISA where set (read once, at the first call), else the default of isa_choice.h.
// Throws std::invalid_argument when the variable names an unknown or an unsupported level.
Isa current_isa();

// The level at which the grouped matmul and the expert pass compute with a storage type, and whose format packed
// weights have: current_isa(), but for bfloat16 at `amx` where the tiles are refused. The first such call asks for
// them. A refusal holds for the whole process: the answer is the same from then on. Throws std::runtime_error that says
// why they are refused where `amx` was forced.
Isa isa_for(DType dtype);

// For tests: forces another level in this process. Throws std::invalid_argument when unsupported.
void set_isa(Isa isa);
// Goes back to the level of the beginning, forced by the variable or not at all.
void reset_isa();

}  // namespace dynamic_moe
