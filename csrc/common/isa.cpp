// SPDX-License-Identifier: Apache-2.0
#include "common/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "common/cpu_features.h"

namespace dynamic_moe {
namespace {

constexpr const char* kVariable = "DYNAMIC_MOE_CPU_ISA";

const CpuFeatures& machine() {
  static const CpuFeatures features = detect_cpu_features();
  return features;
}

std::string join_names(const std::vector<Isa>& isas) {
  std::string names;
  for (const Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

[[noreturn]] void throw_unsupported(std::string_view argument, Isa isa) {
  throw std::invalid_argument(std::string(argument) + " must be a level that this build and this machine support (" +
                              join_names(supported_isas()) + "), got '" + isa_name(isa) + "'");
}

Isa parse_argument(std::string_view argument, std::string_view name) {
  for (const Isa isa : kAllIsas) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " +
                              join_names({std::begin(kAllIsas), std::end(kAllIsas)}) + ", got '" + std::string(name) +
                              "'");
}

// The best level that has been tested on a real machine: AMX has not, so it must be asked for by name.
Isa default_isa() {
  Isa best = Isa::kScalar;
  for (const Isa isa : supported_isas()) {
    if (isa != Isa::kAmx) best = isa;
  }
  return best;
}

Isa initial_isa() {
  const char* forced = std::getenv(kVariable);
  if (forced == nullptr || *forced == '\0') return default_isa();
  const Isa isa = parse_argument(kVariable, forced);
  if (!isa_supported(isa)) throw_unsupported(kVariable, isa);
  return isa;
}

std::atomic<Isa>& isa_in_use() {
  static std::atomic<Isa> isa{initial_isa()};
  return isa;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAmx:
      return "amx";
  }
  return "unknown";
}

// The build defines one macro for each level of isa_flags.txt that it compiled.
bool isa_compiled(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return true;
    case Isa::kAvx2:
#ifdef DYNAMIC_MOE_HAS_AVX2
      return true;
#else
      return false;
#endif
    case Isa::kAvx512:
#ifdef DYNAMIC_MOE_HAS_AVX512
      return true;
#else
      return false;
#endif
    case Isa::kAvx512Bf16:
#ifdef DYNAMIC_MOE_HAS_AVX512_BF16
      return true;
#else
      return false;
#endif
    case Isa::kAmx:
#ifdef DYNAMIC_MOE_HAS_AMX
      return true;
#else
      return false;
#endif
  }
  return false;
}

Isa parse_isa(std::string_view name) { return parse_argument("isa", name); }

bool isa_supported(Isa isa) { return isa_compiled(isa) && can_run(isa, machine()); }

std::vector<Isa> supported_isas() {
  std::vector<Isa> isas;
  for (const Isa isa : kAllIsas) {
    if (isa_supported(isa)) isas.push_back(isa);
  }
  return isas;
}

Isa current_isa() { return isa_in_use().load(std::memory_order_relaxed); }

void set_isa(Isa isa) {
  if (!isa_supported(isa)) throw_unsupported("isa", isa);
  isa_in_use().store(isa, std::memory_order_relaxed);
}

}  // namespace dynamic_moe
