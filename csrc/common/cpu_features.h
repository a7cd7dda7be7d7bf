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
  bool amx_bf16;     // AMX-TILE and AMX-BF16
};

CpuFeatures decode_cpu_features(const CpuidRegisters& registers);

// Whether code compiled with the flags of `isa` (isa_flags.txt) may run.
bool can_run(Isa isa, const CpuFeatures& features);

// Of this machine. Asks the operating system for the AMX tile registers, which Linux grants per process.
CpuFeatures detect_cpu_features();

}  // namespace dynamic_moe
