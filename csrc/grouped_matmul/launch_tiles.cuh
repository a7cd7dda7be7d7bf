// SPDX-License-Identifier: Apache-2.0
// From sizes that the host knows to the launch of a tile kernel.
#pragma once

#include <limits>
#include <stdexcept>
#include <string>

#include "common/cuda/elements.cuh"
#include "common/cuda/launch.cuh"
#include "grouped_matmul/grouped_matmul.h"
#include "grouped_matmul/tile_kernel.cuh"

namespace dynamic_moe {

// Whose code the current device runs: not always its own architecture's, a driver may compile for it from PTX.
Arch compiled_arch();

inline Math math_of(DType dtype, bool allow_tf32) {
  switch (dtype) {
    case DType::kBFloat16:
      return Math::kBFloat16;
    case DType::kFloat16:
      return Math::kFloat16;
    case DType::kFloat32:
      return allow_tf32 ? Math::kTf32 : Math::kFloat32;
    case DType::kFloat64:
      break;
  }
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16 on CUDA, got float64");
}

// Kernels count columns, rows and steps with 32 bits, and step over the end by less than a tile.
inline int32_t size_32(const char* name, int64_t value) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max() - 1024;
  if (value < 0 || value > kMost) {
    throw std::invalid_argument(std::string(name) + " must be in [0, " + std::to_string(kMost) + "] on CUDA, got " +
                                std::to_string(value));
  }
  return static_cast<int32_t>(value);
}

inline bool whole_vectors(Math math, std::initializer_list<int64_t> row_lengths,
                          std::initializer_list<const void*> pointers) {
  for (const int64_t length : row_lengths) {
    if (length * element_bytes(math) % 16 != 0) return false;
  }
  for (const void* pointer : pointers) {
    if (!is_aligned(pointer, 16)) return false;
  }
  return true;
}

// Hands out pieces of a workspace, each 256-byte aligned. Without memory it only counts: the same calls say how much is
// needed and take it.
class WorkspaceCursor {
 public:
  explicit WorkspaceCursor(Workspace workspace = {}) : workspace_(workspace) {}

  template <class T>
  T* take(int64_t count) {
    const size_t begin = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return workspace_.data == nullptr ? nullptr : reinterpret_cast<T*>(static_cast<char*>(workspace_.data) + begin);
  }
  size_t used() const { return used_; }
  // Throws where what was taken is more than there is.
  void check(const char* operation) const {
    if (used_ > workspace_.bytes) {
      throw std::invalid_argument(std::string(operation) + " needs a workspace of " + std::to_string(used_) +
                                  " bytes, got " + std::to_string(workspace_.bytes));
    }
  }

 private:
  Workspace workspace_;
  size_t used_ = 0;
};

// A block for each tile there may be, at most as many as are resident at once: blocks are persistent.
template <class Config, class Epilogue>
void launch_tiles(const Operands<typename Config::T>& operands, const Epilogue& epilogue, const RowGroups& groups,
                  Stream stream) {
  const MatmulPolicy policy = matmul_policy(compiled_arch(), Config::kMath, Config::kRegime);
  const int64_t tiles_m = Config::kProduct == Product::kWeightGradient
                              ? groups.num_experts * ceil_div(operands.height, policy.tile_m)
                              : most_row_tiles(groups.num_rows, groups.num_experts, policy.tile_m) * operands.slices;
  const int64_t tiles = tiles_m * ceil_div(operands.width, policy.tile_n / Epilogue::kHalves);
  const int64_t resident = int64_t{current_device_limits().sm_count} * policy.blocks_per_sm;
  DYNAMIC_MOE_LAUNCH((tile_kernel<Config, Epilogue>), static_cast<unsigned>(std::min(tiles, resident)),
                     static_cast<unsigned>(policy.threads()), static_cast<size_t>(shared_bytes(policy, Config::kMath)),
                     stream, operands, epilogue);
}

// Adds up slices [slices, R, halves * width].
template <class Epilogue>
void sum_slices(const float* partial, int slices, const RowGroups& groups, int32_t width, const Epilogue& epilogue,
                Stream stream) {
  constexpr int kThreads = 256;
  const int64_t threads = groups.num_rows * (width / Epilogue::kVector);
  DYNAMIC_MOE_LAUNCH((sum_slices_kernel<Epilogue>), static_cast<unsigned>(ceil_div(threads, kThreads)), kThreads, 0,
                     stream, partial, groups.expert_offsets + groups.num_experts, static_cast<int32_t>(slices),
                     groups.num_rows, width, epilogue);
}

// The regime of products that have no slices: few rows are some. Exact float32 has one policy for some and for many.
inline Regime row_tile_regime(Math math, int64_t num_rows, int64_t num_experts, bool aligned) {
  const Regime regime = regime_of(num_rows, num_experts, aligned);
  const bool some = regime == Regime::kFewRows || (regime == Regime::kManyRows && math == Math::kFloat32);
  return some ? Regime::kSomeRows : regime;
}

// The kernel of the regime, for products whose result has the groups' rows. Few rows go through slices elsewhere; exact
// float32 has one policy for some and for many rows, and so one kernel.
template <Product product, Math math, template <class, bool> class Epilogue, class Arguments>
void launch_row_tiles(const Operands<typename MathElement<math>::Type>& operands, const Arguments& arguments,
                      const RowGroups& groups, Regime regime, Stream stream) {
  using T = typename MathElement<math>::Type;
  if (regime == Regime::kUnaligned) {
    return launch_tiles<TileConfig<product, math, Regime::kUnaligned>>(operands, Epilogue<T, false>{arguments}, groups,
                                                                       stream);
  }
  const Epilogue<T, true> epilogue{arguments};
  if constexpr (math != Math::kFloat32) {
    if (regime == Regime::kManyRows) {
      return launch_tiles<TileConfig<product, math, Regime::kManyRows>>(operands, epilogue, groups, stream);
    }
  }
  launch_tiles<TileConfig<product, math, Regime::kSomeRows>>(operands, epilogue, groups, stream);
}

}  // namespace dynamic_moe
