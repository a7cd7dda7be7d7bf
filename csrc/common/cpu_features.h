// SPDX-License-Identifier: Apache-2.0
// What this processor and this operating system let a program run, decoded from CPUID. Apart from isa.cpp so that the
// decoding can be tested on register values of machines that are not at hand.
#pragma once

#include <cstdint>

#include "common/isa.h"

namespace dynamic_moe {

// The registers that the decoder reads; 0 where the processor has no such leaf.
struct CpuidRegisters {
  uint32_t leaf1_ecx;
  uint32_t leaf7_ebx;
  uint32_t leaf7_edx;
  uint32_t leaf7_1_eax;
  uint64_t xcr0;  // which register files the operating system saves; 0 where it does not use XSAVE
};

struct CpuFeatures {
  bool avx2;         // AVX2, FMA and F16C
  bool avx512;       // F, BW, DQ and VL
  bool avx512_bf16;  // AVX512_BF16 alone
  bool amx_bf16;     // AMX-TILE and AMX-BF16, and tiles are saved; a process needs a permission besides
  // The processor has AMX-BF16, whether or not the system saves tiles. Such a core is faster at bfloat16 in float32
  // than by AVX512_BF16: on Emerald Rapids 165 against 81 GFLOP/s, and the expert pass of 1,024 rows per expert, H = I
  // = 1024, takes 100 ms at avx512 and 172 at avx512_bf16. Zen 4, which has no tiles, is faster by AVX512_BF16.
  bool has_tile_unit;
};

CpuFeatures decode_cpu_features(const CpuidRegisters& registers);

// Whether code compiled with the flags of `isa` (isa_flags.txt) may run; tile instructions need the permission, too.
bool can_run(Isa isa, const CpuFeatures& features);

// Of this machine. Reads registers alone: it does not ask for the permission to use tiles.
CpuFeatures detect_cpu_features();

}  // namespace dynamic_moe
