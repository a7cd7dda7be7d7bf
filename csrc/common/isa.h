// SPDX-License-Identifier: Apache-2.0
// Which instruction set the CPU kernels use. Every level is compiled into the binary; the best one that the machine
// and the operating system support is taken, unless DYNAMIC_MOE_CPU_ISA names another. No level is gated on another.
// AMX is taken only when named: its tile has been tested with a stand-in for the tile unit, never on a machine that has
// one.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace dynamic_moe {

enum class Isa : int { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx };

inline constexpr Isa kAllIsas[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};

// "scalar", "avx2", "avx512", "avx512_bf16", "amx".
const char* isa_name(Isa isa);

// Throws std::invalid_argument that names the value and the known names.
Isa parse_isa(std::string_view name);

bool isa_compiled(Isa isa);

// Compiled into this binary and runnable on this machine.
bool isa_supported(Isa isa);
std::vector<Isa> supported_isas();

// The level in use: DYNAMIC_MOE_CPU_ISA where set (read once, at the first call), else the best supported one but AMX.
// Throws std::invalid_argument when the variable names an unknown or an unsupported level.
Isa current_isa();

// For tests: overrides current_isa() in this process. Throws std::invalid_argument when unsupported.
void set_isa(Isa isa);

}  // namespace dynamic_moe
