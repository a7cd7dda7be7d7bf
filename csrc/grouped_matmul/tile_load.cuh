// SPDX-License-Identifier: Apache-2.0
// From global memory into the tiles of a stage. Rows are gathered right here: a thread looks up the rows that it
// copies, then copies them piece by piece, and no gathered matrix ever exists. What lies outside the group, the matrix
// or the depth becomes zeros in shared memory and is never read, so data needs no padding.
#pragma once

#include "common/cuda/elements.cuh"
#include "common/cuda/platform.cuh"
#include "common/cuda/ptx.cuh"
#include "grouped_matmul/shared_tile.cuh"
#include "grouped_matmul/tile_scheduler.cuh"

namespace dynamic_moe {

// Copies the first `count` elements of a chunk and zeros the others. Aligned chunks are whole or, for count <= 0,
// empty.
template <class Config>
__device__ __forceinline__ void copy_chunk(void* shared, const typename Config::T* from, int32_t count) {
  if constexpr (Config::kAligned) {
    ptx::cp_async_zfill<16>(shared, from, count > 0);
  } else {
    using T = typename Config::T;
    using Chunk = Packed<T, Config::kVector>;
    T elements[Config::kVector];
#pragma unroll
    for (int i = 0; i < Config::kVector; ++i) elements[i] = i < count ? load_global(from + i) : T{};
    Chunk chunk;
    memcpy(&chunk.word, elements, sizeof chunk.word);
    store_shared(reinterpret_cast<typename Chunk::Word*>(shared), chunk.word);
  }
}

// How a block's threads share the chunks of a tile: neighbors take neighboring chunks of a row, so that a warp reads
// whole sectors, and every thread keeps its chunk and strides over rows.
template <class Config, int kRows, int kRowElements>
struct CopyPlan {
  static constexpr int kChunksPerRow = kRowElements / Config::kVector;
  static constexpr int kRowsPerPass = Config::kThreads / kChunksPerRow;
  static constexpr int kPasses = kRows <= kRowsPerPass ? 1 : kRows / kRowsPerPass;
  static_assert(Config::kThreads % kChunksPerRow == 0 && (kPasses == 1 || kRows % kRowsPerPass == 0), "whole passes");

  __device__ static int chunk() { return static_cast<int>(threadIdx.x) % kChunksPerRow; }
  __device__ static int row(int pass) { return static_cast<int>(threadIdx.x) / kChunksPerRow + pass * kRowsPerPass; }
  // Whether the row of this pass exists: a small tile may have fewer chunks than the block has threads.
  __device__ static bool has(int row) { return kRows >= kRowsPerPass || row < kRows; }
};

// An operand whose rows run along the depth. The rows of a tile stay the same at every step: they are looked up once.
template <class Config, int kRows>
class KMajorLoader {
  using T = typename Config::T;
  using Plan = CopyPlan<Config, kRows, Config::kTileK>;
  using Layout = SharedTile<kRows, Config::kTileK* static_cast<int>(sizeof(T))>;

 public:
  // row_of(i): the row of `base` that is row i of the tile, negative where there is none.
  template <class RowOf>
  __device__ KMajorLoader(const T* base, int32_t row_elements, int32_t depth_end, const RowOf& row_of)
      : base_(base), row_elements_(row_elements), depth_end_(depth_end) {
#pragma unroll
    for (int pass = 0; pass < Plan::kPasses; ++pass) {
      const int row = Plan::row(pass);
      rows_[pass] = Plan::has(row) ? row_of(row) : -1;
    }
  }

  __device__ __forceinline__ void load(uint8_t* tile, int32_t depth) {
    const int32_t column = depth + Plan::chunk() * Config::kVector;
    const T* from = base_ + column;
#pragma unroll
    for (int pass = 0; pass < Plan::kPasses; ++pass) {
      const int row = Plan::row(pass);
      if (!Plan::has(row)) continue;
      const int32_t count = rows_[pass] < 0 ? 0 : depth_end_ - column;
      const int32_t source = rows_[pass] < 0 ? 0 : rows_[pass];
      copy_chunk<Config>(tile + Layout::offset(row, Plan::chunk()), from + static_cast<int64_t>(source) * row_elements_,
                         count);
    }
  }

 private:
  const T* base_;
  int32_t row_elements_, depth_end_;
  int32_t rows_[Plan::kPasses];
};

// An operand whose rows are steps of the depth: every step of the pipeline reads other rows. Where they are gathered,
// their numbers are fetched one step ahead, or each step would wait for two trips to memory in a row.
template <class Config, int kColumns>
class DepthMajorLoader {
  using T = typename Config::T;
  using Plan = CopyPlan<Config, Config::kTileK, kColumns>;
  using Layout = SharedTile<Config::kTileK, kColumns* static_cast<int>(sizeof(T)), Config::kMath == Math::kTf32>;

 public:
  // gather: the row of `base` for each step of the depth, or null.
  __device__ DepthMajorLoader(const T* base, const int32_t* gather, int32_t row_elements, int32_t column,
                              int32_t depth_begin, int32_t depth_end)
      : base_(base + column + Plan::chunk() * Config::kVector),
        gather_(gather),
        row_elements_(row_elements),
        columns_left_(row_elements - column - Plan::chunk() * Config::kVector),
        depth_end_(depth_end) {
    look_up(depth_begin);
  }

  // Steps must be loaded in order.
  __device__ __forceinline__ void load(uint8_t* tile, int32_t depth) {
#pragma unroll
    for (int pass = 0; pass < Plan::kPasses; ++pass) {
      const int row = Plan::row(pass);
      if (!Plan::has(row)) continue;
      const bool exists = depth + row < depth_end_ && columns_left_ > 0;
      const int64_t source = exists ? rows_[pass] : 0;
      copy_chunk<Config>(tile + Layout::offset(row, Plan::chunk()), exists ? base_ + source * row_elements_ : base_,
                         exists ? columns_left_ : 0);
    }
    look_up(depth + Config::kTileK);
  }

 private:
  __device__ __forceinline__ void look_up(int32_t depth) {
#pragma unroll
    for (int pass = 0; pass < Plan::kPasses; ++pass) {
      const int32_t step = depth + Plan::row(pass);
      rows_[pass] = gather_ != nullptr && step < depth_end_ ? load_global(gather_ + step) : step;
    }
  }

  const T* base_;
  const int32_t* gather_;
  int32_t row_elements_, columns_left_, depth_end_;
  int32_t rows_[Plan::kPasses];
};

}  // namespace dynamic_moe
