// SPDX-License-Identifier: Apache-2.0
#include "common/isa.h"

#include <cstdlib>
#include <stdexcept>

#include "common/isa_choice.h"

namespace dynamic_moe {
namespace {

constexpr const char* kVariable = "DYNAMIC_MOE_CPU_ISA";

const CpuFeatures& machine() {
  static const CpuFeatures features = detect_cpu_features();
  return features;
}

std::vector<Isa> levels_of(const CpuFeatures& features) {
  std::vector<Isa> isas;
  for (const Isa isa : kAllIsas) {
    if (isa_compiled(isa) && can_run(isa, features)) isas.push_back(isa);
  }
  return isas;
}

std::string join_names(const std::vector<Isa>& isas) {
  std::string names;
  for (const Isa isa : isas) names += (names.empty() ? "" : ", ") + std::string(isa_name(isa));
  return names;
}

void require_supported(std::string_view argument, Isa isa, const std::vector<Isa>& supported) {
  for (const Isa each : supported) {
    if (each == isa) return;
  }
  throw std::invalid_argument(std::string(argument) + " must be a level that this build and this machine support (" +
                              join_names(supported) + "), got '" + isa_name(isa) + "'");
}

Isa parse_argument(std::string_view argument, std::string_view name) {
  for (const Isa isa : kAllIsas) {
    if (name == isa_name(isa)) return isa;
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " +
                              join_names({std::begin(kAllIsas), std::end(kAllIsas)}) + ", got '" + std::string(name) +
                              "'");
}

std::atomic<IsaChoice*> choice_of_tests{nullptr};

}  // namespace

IsaChoice::IsaChoice(const CpuFeatures& features, const char* forced, TilePermission::Request request)
    : features_(features), tiles_(request), initial_(initial(forced)), choice_(initial_) {}

IsaChoice::Choice IsaChoice::initial(const char* forced) const {
  if (forced == nullptr || *forced == '\0') {
    return {.isa = supports(Isa::kAmx) ? Isa::kAmx : without_tiles(), .is_forced = false};
  }
  const Isa isa = parse_argument(kVariable, forced);
  require_supported(kVariable, isa, supported());
  return {.isa = isa, .is_forced = true};
}

std::vector<Isa> IsaChoice::supported() const { return levels_of(features_); }

Isa IsaChoice::without_tiles() const {
  Isa best = Isa::kScalar;
  for (const Isa isa : supported()) {
    const bool slower = isa == Isa::kAvx512Bf16 && features_.has_tile_unit;
    if (isa != Isa::kAmx && !slower) best = isa;
  }
  return best;
}

void IsaChoice::force(Isa isa) {
  require_supported("isa", isa, supported());
  choice_.store({.isa = isa, .is_forced = true}, std::memory_order_relaxed);
}

Isa IsaChoice::with_tiles(bool is_forced) {
  if (tiles_.ask()) return Isa::kAmx;
  if (!is_forced) return without_tiles();
  throw std::runtime_error("the CPU level amx was forced, but the operating system refuses its tiles: " +
                           tiles_.reason() + ". Without DYNAMIC_MOE_CPU_ISA=amx and set_cpu_isa('amx') bfloat16 is " +
                           "computed at " + isa_name(without_tiles()));
}

IsaChoice& isa_choice() {
  IsaChoice* const choice = choice_of_tests.load(std::memory_order_relaxed);
  if (choice != nullptr) return *choice;
  static IsaChoice of_this_machine(machine(), std::getenv(kVariable), request_tile_data);
  return of_this_machine;
}

void use_isa_choice(IsaChoice* choice) { choice_of_tests.store(choice, std::memory_order_relaxed); }

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

// Of the machine itself, so that a wrong DYNAMIC_MOE_CPU_ISA cannot keep anyone from asking what it may be.
bool isa_supported(Isa isa) { return isa_compiled(isa) && can_run(isa, machine()); }

std::vector<Isa> supported_isas() { return levels_of(machine()); }

Isa current_isa() { return isa_choice().current(); }

Isa isa_for(DType dtype) { return isa_choice().for_dtype(dtype); }

void set_isa(Isa isa) { isa_choice().force(isa); }

void reset_isa() { isa_choice().reset(); }

}  // namespace dynamic_moe
