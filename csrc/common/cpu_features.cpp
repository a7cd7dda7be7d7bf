// SPDX-License-Identifier: Apache-2.0
#include "common/cpu_features.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#endif

namespace dynamic_moe {
namespace {

constexpr uint32_t bit(int index) { return uint32_t{1} << index; }

constexpr bool has_all(uint64_t value, uint64_t mask) { return (value & mask) == mask; }

// CPUID bits, Intel SDM volume 2A, instruction CPUID.
constexpr uint32_t kFma = bit(12), kOsxsave = bit(27), kAvx = bit(28), kF16c = bit(29);  // 1, ECX
constexpr uint32_t kAvx2 = bit(5), kAvx512F = bit(16), kAvx512Dq = bit(17), kAvx512Bw = bit(30),
                   kAvx512Vl = bit(31);                     // 7.0, EBX
constexpr uint32_t kAmxBf16 = bit(22), kAmxTile = bit(24);  // 7.0, EDX
constexpr uint32_t kAvx512Bf16 = bit(5);                    // 7.1, EAX

// XCR0 bits: the state that the operating system saves when it switches threads.
constexpr uint64_t kXmmYmmState = 0x6;
constexpr uint64_t kZmmState = 0xe0;
constexpr uint64_t kTileState = 0x60000;

#if defined(__x86_64__) || defined(__i386__)

uint64_t read_xcr0() {
  // The instruction itself and not _xgetbv(), which needs -mxsave on this whole file.
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

CpuidRegisters read_registers() {
  CpuidRegisters registers{};
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(1, 0, &eax, &ebx, &ecx, &edx)) {
    registers.leaf1_ecx = ecx;
    if (has_all(ecx, kOsxsave)) registers.xcr0 = read_xcr0();
  }
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) {
    const uint32_t last_subleaf = eax;
    registers.leaf7_ebx = ebx;
    registers.leaf7_edx = edx;
    if (last_subleaf >= 1 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) registers.leaf7_1_eax = eax;
  }
  return registers;
}

#else

CpuidRegisters read_registers() { return {}; }

#endif

}  // namespace

CpuFeatures decode_cpu_features(const CpuidRegisters& registers) {
  const bool ymm = has_all(registers.leaf1_ecx, kOsxsave) && has_all(registers.xcr0, kXmmYmmState);
  const bool zmm = ymm && has_all(registers.xcr0, kZmmState);
  const bool tiles_saved = has_all(registers.leaf1_ecx, kOsxsave) && has_all(registers.xcr0, kTileState);
  const bool tile_unit = has_all(registers.leaf7_edx, kAmxTile | kAmxBf16);
  return {
      .avx2 = ymm && has_all(registers.leaf1_ecx, kAvx | kFma | kF16c) && has_all(registers.leaf7_ebx, kAvx2),
      .avx512 = zmm && has_all(registers.leaf7_ebx, kAvx512F | kAvx512Bw | kAvx512Dq | kAvx512Vl),
      .avx512_bf16 = zmm && has_all(registers.leaf7_1_eax, kAvx512Bf16),
      .amx_bf16 = tiles_saved && tile_unit,
      .has_tile_unit = tile_unit,
  };
}

bool can_run(Isa isa, const CpuFeatures& features) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
      return features.avx2;
    case Isa::kAvx512:
      return features.avx2 && features.avx512;
    case Isa::kAvx512Bf16:
      return features.avx2 && features.avx512 && features.avx512_bf16;
    case Isa::kAmx:
      return features.avx2 && features.avx512 && features.avx512_bf16 && features.amx_bf16;
  }
  return false;
}

CpuFeatures detect_cpu_features() { return decode_cpu_features(read_registers()); }

}  // namespace dynamic_moe
