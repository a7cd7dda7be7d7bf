// SPDX-License-Identifier: Apache-2.0
// dynamic_moe._C: what has no tensor in it. The operators are registered by ops.cpp in the same shared object.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bindings/checks.h"
#include "common/isa.h"
#include "common/isa_choice.h"
#include "grouped_matmul/tile_plan.h"

namespace dynamic_moe {
namespace {

namespace py = pybind11;

std::string compiler_name() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// The architectures come from the build as one string in TORCH_CUDA_ARCH_LIST's form: "8.0;9.0;12.0+PTX".
std::vector<std::string> cuda_architectures() {
  std::vector<std::string> names;
#ifdef DYNAMIC_MOE_CUDA_ARCHITECTURES
  std::string name;
  for (const char letter : std::string(DYNAMIC_MOE_CUDA_ARCHITECTURES) + ";") {
    if (letter != ';' && letter != ' ') {
      name += letter;
    } else if (!name.empty()) {
      names.push_back(std::exchange(name, {}));
    }
  }
#endif
  return names;
}

std::vector<std::string> compiled_cpu_isas() {
  std::vector<std::string> names;
  for (const Isa isa : kAllIsas) {
    if (isa_compiled(isa)) names.emplace_back(isa_name(isa));
  }
  return names;
}

std::vector<std::string> supported_cpu_isas(bool ask) {
  std::vector<std::string> names;
  for (const Isa isa : supported_isas()) {
    if (!ask || isa != Isa::kAmx || isa_choice().tiles().ask()) names.emplace_back(isa_name(isa));
  }
  return names;
}

std::string amx_tiles_state(bool ask) {
  IsaChoice& choice = isa_choice();
  if (!isa_compiled(Isa::kAmx)) return "not in this build";
  if (!choice.features().has_tile_unit) return "not on this processor";
  if (!choice.supports(Isa::kAmx)) return "not saved by this operating system";
  if (ask) choice.tiles().ask();
  switch (choice.tiles().state()) {
    case TilePermission::State::kNotAsked:
      return "not asked for yet";
    case TilePermission::State::kGranted:
      return "granted";
    case TilePermission::State::kRefused:
      break;
  }
  return "refused";
}

py::dict amx_tiles(bool ask) {
  py::dict result;
  result["state"] = amx_tiles_state(ask);
  const std::string reason = isa_choice().tiles().reason();
  result["reason"] = reason.empty() ? py::object(py::none()) : py::str(reason);
  result["bfloat16_isa_when_refused"] = isa_name(isa_choice().without_tiles());
  return result;
}

// float64 has no tile: it is computed in plain C++ on every level.
DType parse_tiled_dtype(const std::string& name) {
  if (name == "float32") return DType::kFloat32;
  if (name == "bfloat16") return DType::kBFloat16;
  if (name == "float16") return DType::kFloat16;
  throw std::invalid_argument("dtype must be one of float32, bfloat16, float16, got '" + name + "'");
}

py::dict tile_plan_of(const std::string& isa_name, const std::string& dtype_name) {
  const Isa isa = parse_isa(isa_name);
  const bool pairs = multiplies_pairs(isa, parse_tiled_dtype(dtype_name));
  const TilePlan plan = tile_plan(isa, pairs);
  py::dict result;
  result["rows"] = plan.rows;
  result["columns"] = plan.vectors * plan.lanes;
  result["lanes"] = plan.lanes;
  result["multiplies_pairs"] = pairs;
  result["block_words"] = plan.block_words;
  result["column_block_words"] = plan.column_block_words;
  result["panel_bytes"] = plan.panel_bytes;
  result["few_rows"] = plan.few_rows;
  result["dot_rows"] = plan.dot_rows;
  result["spread_dot_rows"] = plan.spread_dot_rows;
  return result;
}

py::dict build_info() {
  py::dict info;
  info["version"] = DYNAMIC_MOE_VERSION;
  info["compiler"] = compiler_name();
  info["cxx_standard"] = __cplusplus;
  info["torch_target"] =
      py::str("{}.{}").format((TORCH_TARGET_VERSION >> 56) & 0xff, (TORCH_TARGET_VERSION >> 48) & 0xff);
  info["cpu_isas"] = compiled_cpu_isas();
#ifdef DYNAMIC_MOE_CUDA_TOOLKIT
  info["cuda"] = DYNAMIC_MOE_CUDA_TOOLKIT;
#else
  info["cuda"] = py::none();
#endif
  info["cuda_architectures"] = cuda_architectures();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() =
      "Native part of dynamic_moe: the functions that take no tensor. The operators are in torch.ops.dynamic_moe.";
  current_isa();  // an unknown DYNAMIC_MOE_CPU_ISA stops the import, with a message that says what it may be

  module.def("build_info", &build_info, "What this binary was built with, and for.");
  module.def("cpu_isa", [] { return isa_name(current_isa()); }, "CPU level in use.");
  module.def(
      "cpu_isa_for", [](const std::string& dtype) { return isa_name(isa_for(parse_tiled_dtype(dtype))); },
      py::arg("dtype"),
      "CPU level whose products compute with a data type. For bfloat16 at amx it asks for the tiles, and raises "
      "RuntimeError if they are refused and amx was forced.");
  module.def("supported_cpu_isas", &supported_cpu_isas, py::arg("ask") = false,
             "CPU levels that this build and this machine support, worst first. ask: ask for the tiles of amx, and "
             "leave it out if they are refused.");
  module.def("amx_tiles", &amx_tiles, py::arg("ask") = false,
             "Whether this process may use AMX tiles, why not, and where bfloat16 is computed then. ask: ask for them "
             "if nothing has yet, which cannot be taken back.");
  module.def(
      "set_cpu_isa",
      [](const std::optional<std::string>& name) { name.has_value() ? set_isa(parse_isa(*name)) : reset_isa(); },
      py::arg("name"),
      "Force a CPU level from now on; None: the one that was chosen at the beginning. Raises ValueError if it is "
      "unknown or not supported here.");
  module.def("tile_plan", &tile_plan_of, py::arg("isa"), py::arg("dtype"),
             "Register tile and cache blocks of the grouped matmul at a CPU level, compiled or not, for a data type.");
  module.def("take_argument_error", &bindings::take_argument_error,
             "What the last operator that refused an argument on this thread said, once; None if there was none.");
  module.def("cuda_architectures", &cuda_architectures, "CUDA architectures that this binary holds code for.");
}

}  // namespace dynamic_moe
