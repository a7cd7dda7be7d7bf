// SPDX-License-Identifier: Apache-2.0
// The tile kernel: persistent blocks, each of which takes tile after tile, streams the operands through a ring of
// stages in shared memory while its warps multiply, and hands the sums to the epilogue.
#pragma once

#include "common/cuda/platform.cuh"
#include "common/cuda/ptx.cuh"
#include "common/cuda/shared.cuh"
#include "grouped_matmul/epilogue.cuh"
#include "grouped_matmul/fma_tile.cuh"
#include "grouped_matmul/tensor_core_tile.cuh"
#include "grouped_matmul/tile_load.cuh"
#include "grouped_matmul/tile_scheduler.cuh"

namespace dynamic_moe {

template <class Config, int kColumns>
using TilesOf = std::conditional_t<Config::kProduct == Product::kWeightGradient, MatrixTiles<Config, kColumns>,
                                   RowTiles<Config, kColumns>>;

template <class Config>
using SumsOf = std::conditional_t<Config::kMath == Math::kFloat32, FmaTile<Config>, TensorCoreTile<Config>>;

// The left operand of a tile: rows of the group, gathered or in place.
template <class Config>
__device__ __forceinline__ auto left_loader(const Operands<typename Config::T>& operands, const Tile& tile) {
  if constexpr (Config::kLeftKMajor) {
    return KMajorLoader<Config, Config::kTileM>(operands.left, operands.depth, tile.depth_end, [&](int i) {
      const int32_t row = tile.row + i;
      if (row >= tile.row_end) return int32_t{-1};
      return operands.left_rows != nullptr ? load_global(operands.left_rows + row) : row;
    });
  } else {
    return DepthMajorLoader<Config, Config::kTileM>(operands.left, operands.left_rows, operands.height, tile.row,
                                                    tile.depth_begin, tile.depth_end);
  }
}

// The right operand: the expert's matrix or, for the weight gradient, rows of the group. With two halves each warp's
// columns are half gate, half up: both ends of an activation meet in one slab.
template <class Config, int kHalves>
__device__ __forceinline__ auto right_loader(const Operands<typename Config::T>& operands, const Tile& tile) {
  const int64_t matrix = static_cast<int64_t>(operands.width) * kHalves * operands.depth;
  if constexpr (Config::kRightKMajor) {
    const auto row_of = [&](int i) {
      constexpr int kHalf = Config::kWarpN / kHalves;
      const int half = i % Config::kWarpN / kHalf;
      const int32_t column = tile.column + i / Config::kWarpN * kHalf + i % kHalf;
      return column < operands.width ? half * operands.width + column : -1;
    };
    return KMajorLoader<Config, Config::kTileN>(operands.right + tile.expert * matrix, operands.depth, tile.depth_end,
                                                row_of);
  } else {
    static_assert(kHalves == 1, "two halves are side by side in K-major matrices alone");
    const bool is_weight = Config::kProduct == Product::kInputGradient;
    return DepthMajorLoader<Config, Config::kTileN>(operands.right + (is_weight ? tile.expert * matrix : 0),
                                                    operands.right_rows, operands.width, tile.column, tile.depth_begin,
                                                    tile.depth_end);
  }
}

// Sums a tile over its depth. Of the ring's stages one is multiplied while the others are under way. Behind the barrier
// of a step every warp has finished the step before, whose stage is free again: one barrier for each step.
template <class Config, class Left, class Right, class Sums>
__device__ __forceinline__ void multiply_tile(Sums& sums, Left& left, Right& right, uint8_t* stages, const Tile& tile) {
  const auto load = [&](int stage, int32_t depth) {
    uint8_t* to = stages + stage * Config::kStageBytes;
    left.load(to, depth);
    right.load(to + Config::kLeftBytes, depth);
  };
  int32_t to_load = tile.depth_begin;
#pragma unroll 1
  for (int stage = 0; stage < Config::kStages - 1; ++stage) {
    if (to_load < tile.depth_end) load(stage, to_load);
    ptx::cp_async_commit();  // also where nothing is left: wait counts commits
    to_load += Config::kTileK;
  }
  int stage = 0, free_stage = Config::kStages - 1;
#pragma unroll 1
  for (int32_t depth = tile.depth_begin; depth < tile.depth_end; depth += Config::kTileK) {
    ptx::cp_async_wait<Config::kStages - 2>();
    __syncthreads();
    if (to_load < tile.depth_end) load(free_stage, to_load);
    ptx::cp_async_commit();
    to_load += Config::kTileK;
    const uint8_t* from = stages + stage * Config::kStageBytes;
    sums.multiply(from, from + Config::kLeftBytes);
    free_stage = stage;
    stage = stage + 1 < Config::kStages ? stage + 1 : 0;
  }
  ptx::cp_async_wait<0>();
}

template <class Config, class Epilogue>
__global__ void __launch_bounds__(Config::kThreads, Config::kRegisterBlocks)
    tile_kernel(const Operands<typename Config::T> operands, const Epilogue epilogue) {
  constexpr int kHalves = Epilogue::kHalves;
  constexpr int kSlabFloats = Config::kSlabHeight * Config::kSlabRowFloats;
  DYNAMIC_MOE_DYNAMIC_SHARED(uint8_t, stages);
  float* slab = reinterpret_cast<float*>(stages) + threadIdx.x / 32 * kSlabFloats;

  TilesOf<Config, Config::kTileN / kHalves> tiles(operands);
  Tile tile;
  while (tiles.next(tile)) {
    SumsOf<Config> sums;
    auto left = left_loader<Config>(operands, tile);
    auto right = right_loader<Config, kHalves>(operands, tile);
    multiply_tile<Config>(sums, left, right, stages, tile);

    __syncthreads();  // the slabs lie where other warps may still read the last stage
    const int64_t first_row =
        Config::kProduct == Product::kWeightGradient ? static_cast<int64_t>(tile.expert) * operands.height : 0;
    finish_tile<Config>(sums, slab, tile, first_row, operands.width, epilogue);
    __syncthreads();  // and the next tile's first stages where slabs may still be read
  }
}

// Adds the slices of a depth in order and hands the sums to the epilogue, for rows [0, expert_offsets[E]). A thread has
// one vector of a row.
template <class Epilogue>
__global__ void sum_slices_kernel(const float* partial, const int32_t* num_live_rows, int32_t slices, int64_t rows,
                                  int32_t width, const Epilogue epilogue) {
  constexpr int kVector = Epilogue::kVector, kHalves = Epilogue::kHalves;
  const int32_t vectors = width / kVector;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  Place place;
  place.row = index / vectors;
  place.column = static_cast<int32_t>(index % vectors) * kVector;
  place.count = kVector;
  place.slice = 0;
  place.expert = -1;
  if (place.row >= load_global(num_live_rows)) return;
  float values[kHalves][kVector] = {};
  const int64_t row_floats = static_cast<int64_t>(width) * kHalves;
  for (int32_t slice = 0; slice < slices; ++slice) {
    const float* from = partial + (slice * rows + place.row) * row_floats + place.column;
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
#pragma unroll
      for (int i = 0; i < kVector; i += 4) {
        const float4 x = load_global(reinterpret_cast<const float4*>(from + static_cast<int64_t>(half) * width + i));
        values[half][i] += x.x, values[half][i + 1] += x.y, values[half][i + 2] += x.z, values[half][i + 3] += x.w;
      }
    }
  }
  epilogue.template operator()<1>(place, values);
}

}  // namespace dynamic_moe
