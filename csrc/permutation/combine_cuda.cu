// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/cuda/elements.cuh"
#include "common/cuda/launch.cuh"
#include "permutation/combine_kernels.cuh"
#include "permutation/permutation.h"

namespace dynamic_moe {
namespace {

constexpr int kVectorBytes = 16;

template <int kValue>
using Number = std::integral_constant<int, kValue>;

bool has_vector_rows(std::initializer_list<const void*> buffers, int64_t hidden_size, DType dtype) {
  if (hidden_size * static_cast<int64_t>(size_of(dtype)) % kVectorBytes != 0) return false;
  return std::all_of(buffers.begin(), buffers.end(),
                     [](const void* buffer) { return is_aligned(buffer, kVectorBytes); });
}

// run(type, count): storage type, and elements of a vector: as many as 16 bytes hold, or 1 where rows are not aligned.
template <class Run>
void with_vectors(DType dtype, bool vectors, const Run& run) {
  with_storage_type(dtype, [&](auto type) {
    constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(typename decltype(type)::Type));
    vectors ? run(type, Number<kCount>{}) : run(type, Number<1>{});
  });
}

unsigned blocks_for(int64_t warps) {
  const int64_t blocks = (warps + kCombineWarps - 1) / kCombineWarps;
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (blocks > kMostBlocks) {
    throw std::invalid_argument("num_tokens * hidden_size needs " + std::to_string(blocks) +
                                " blocks, but a launch has at most " + std::to_string(kMostBlocks));
  }
  return static_cast<unsigned>(blocks);
}

}  // namespace

void combine_cuda(const CombineParams& p, Stream stream) {
  if (p.hidden_size == 0) return;
  with_vectors(p.dtype, has_vector_rows({p.rows, p.y}, p.hidden_size, p.dtype), [&](auto type, auto count) {
    using T = typename decltype(type)::Type;
    constexpr int kCount = decltype(count)::value;
    const auto launch_with = [&](auto vectors) {
      constexpr int kVectors = decltype(vectors)::value;
      constexpr int64_t kTile = kVectors * 32 * kCount;
      const int64_t tiles = (p.hidden_size + kTile - 1) / kTile;
      DYNAMIC_MOE_LAUNCH((combine_kernel<T, kCount, kVectors>), blocks_for(p.num_tokens * tiles), kCombineThreads, 0,
                         stream, p, tiles);
    };
    const int64_t vectors_of_lane = (p.hidden_size + 32 * kCount - 1) / (32 * kCount);
    if (vectors_of_lane >= kMostCombineVectors) return launch_with(Number<kMostCombineVectors>{});
    if (vectors_of_lane >= 2) return launch_with(Number<2>{});
    launch_with(Number<1>{});
  });
}

void combine_backward_cuda(const CombineBackwardParams& p, Stream stream) {
  const bool vectors = has_vector_rows({p.dy, p.rows, p.d_rows}, p.hidden_size, p.dtype);
  with_vectors(p.dtype, vectors, [&](auto type, auto count) {
    using T = typename decltype(type)::Type;
    constexpr int kCount = decltype(count)::value;
    const unsigned blocks = blocks_for(p.num_tokens);
    if (p.d_rows && p.d_weights) {
      DYNAMIC_MOE_LAUNCH((combine_backward_kernel<T, kCount, true, true>), blocks, kCombineThreads, 0, stream, p);
    } else if (p.d_rows) {
      DYNAMIC_MOE_LAUNCH((combine_backward_kernel<T, kCount, true, false>), blocks, kCombineThreads, 0, stream, p);
    } else if (p.d_weights) {
      DYNAMIC_MOE_LAUNCH((combine_backward_kernel<T, kCount, false, true>), blocks, kCombineThreads, 0, stream, p);
    }
  });
}

}  // namespace dynamic_moe
