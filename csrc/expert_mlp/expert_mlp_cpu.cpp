// SPDX-License-Identifier: Apache-2.0
// Chooses the level and the storage type.
#include <cstring>
#include <stdexcept>
#include <string>

#include "common/isa.h"
#include "expert_mlp/cpu_levels.h"
#include "expert_mlp/plain.h"
#include "grouped_matmul/tile_plan.h"

namespace dynamic_moe {
namespace {

const ExpertMlpKernels& kernels(DType dtype) {
  switch (isa_for(dtype)) {
    case Isa::kScalar:
      break;
    case Isa::kAvx2:
#ifdef DYNAMIC_MOE_HAS_AVX2
      return kExpertMlpAvx2;
#else
      break;
#endif
    case Isa::kAvx512:
#ifdef DYNAMIC_MOE_HAS_AVX512
      return kExpertMlpAvx512;
#else
      break;
#endif
    case Isa::kAvx512Bf16:
#ifdef DYNAMIC_MOE_HAS_AVX512_BF16
      return kExpertMlpAvx512Bf16;
#else
      break;
#endif
    case Isa::kAmx:
#ifdef DYNAMIC_MOE_HAS_AMX
      return kExpertMlpAmx;
#else
      break;
#endif
  }
  return kExpertMlpScalar;
}

// What a packed buffer begins with.
struct alignas(64) PackedHeader {
  char magic[16] = "dmoe packed v1";
  Isa isa;
  DType dtype;
  int64_t num_experts, hidden_size, intermediate_size;
  char reserved[16] = {};

  PackedHeader() = default;
  PackedHeader(int64_t experts, int64_t hidden, int64_t intermediate, DType type)
      : isa(isa_for(type)), dtype(type), num_experts(experts), hidden_size(hidden), intermediate_size(intermediate) {}
};
static_assert(sizeof(PackedHeader) == 64);

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "unknown";
}

void reject_float64(DType dtype) {
  if (dtype != DType::kFloat64) return;
  throw std::invalid_argument(
      "gate_up_proj and down_proj must be float32, bfloat16 or float16 to be packed: the kernels of float64 read "
      "weights as they are");
}

std::string sizes(const PackedHeader& header) {
  return "E=" + std::to_string(header.num_experts) + ", H=" + std::to_string(header.hidden_size) +
         ", I=" + std::to_string(header.intermediate_size) + ", " + dtype_name(header.dtype);
}

void check_packed(const ExpertMlpPrepackedParams& p) {
  const PackedHeader wanted(p.groups.num_experts, p.hidden_size, p.intermediate_size, p.dtype);
  PackedHeader header;
  const bool whole = p.packed_bytes >= static_cast<int64_t>(sizeof header);
  if (whole) std::memcpy(&header, p.packed, sizeof header);
  if (!whole || std::memcmp(header.magic, wanted.magic, sizeof header.magic) != 0) {
    throw std::invalid_argument("packed must be a buffer that prepack_experts made");
  }
  if (header.isa != wanted.isa) {
    throw std::invalid_argument(std::string("packed was made for the CPU level ") + isa_name(header.isa) +
                                ", but the level in use is " + isa_name(wanted.isa) + ": pack the weights again");
  }
  const int64_t bytes = packed_experts_bytes(wanted.num_experts, wanted.hidden_size, wanted.intermediate_size, p.dtype);
  if (std::memcmp(&header, &wanted, sizeof header) != 0 || p.packed_bytes != bytes) {
    throw std::invalid_argument("packed was made for experts of " + sizes(header) + ", but the call is for " +
                                sizes(wanted));
  }
}

}  // namespace

void expert_mlp_cpu(const ExpertMlpParams& params) {
  if (params.dtype == DType::kFloat64) return plain::expert_mlp<double>(params);
  kernels(params.dtype).forward(params);
}

void expert_mlp_backward_cpu(const ExpertMlpBackwardParams& params) {
  if (params.dtype == DType::kFloat64) return plain::expert_mlp_backward<double>(params);
  kernels(params.dtype).backward(params);
}

int64_t packed_experts_bytes(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size, DType dtype) {
  reject_float64(dtype);
  const Isa isa = isa_for(dtype);
  const bool pairs = multiplies_pairs(isa, dtype);
  const int64_t lanes = tile_plan(isa, pairs).lanes, per_word = pairs ? 2 : 1;
  const auto words = [&](int64_t columns, int64_t inner) {
    return (inner + per_word - 1) / per_word * ((columns + lanes - 1) / lanes * lanes);
  };
  const int64_t expert = 2 * words(intermediate_size, hidden_size) + words(hidden_size, intermediate_size);
  return static_cast<int64_t>(sizeof(PackedHeader)) + num_experts * expert * 4;
}

void prepack_experts_cpu(const PrepackExpertsParams& params) {
  reject_float64(params.dtype);
  const PackedHeader header(params.num_experts, params.hidden_size, params.intermediate_size, params.dtype);
  std::memcpy(params.packed, &header, sizeof header);
  kernels(params.dtype).prepack(params, static_cast<char*>(params.packed) + sizeof header);
}

void expert_mlp_prepacked_cpu(const ExpertMlpPrepackedParams& params) {
  reject_float64(params.dtype);
  check_packed(params);
  kernels(params.dtype).forward_prepacked(params, static_cast<const char*>(params.packed) + sizeof(PackedHeader));
}

}  // namespace dynamic_moe
