// SPDX-License-Identifier: Apache-2.0
// Which tiles a persistent block computes: block b of B computes tiles b, b + B, ... The sizes of groups are known on
// the device alone.
#pragma once

#include "common/cuda/platform.cuh"
#include "grouped_matmul/operands.cuh"

namespace dynamic_moe {

struct Tile {
  int32_t expert;
  int32_t slice;                   // of the depth
  int32_t row, row_end;            // first row of the tile; end of the group's rows, or of the matrix's
  int32_t column;                  // first column of the result
  int32_t depth_begin, depth_end;  // what is summed over: columns of the operands, or a group's rows
};

// Neighbors in the order of tiles run at the same time. Within a group they go down a band of tiles before they take
// the next column: the band's rows stay in the L2 cache, and a column of weights is read once for each band.
struct Raster {
  static constexpr int64_t kBand = 8;
  int32_t m, n;

  __device__ Raster(int64_t index, int64_t tiles_m, int64_t tiles_n) {
    const int64_t first = index / (kBand * tiles_n) * kBand;
    const int64_t height = tiles_m - first < kBand ? tiles_m - first : kBand;
    const int64_t within = index - first * tiles_n;
    m = static_cast<int32_t>(first + within % height);
    n = static_cast<int32_t>(within / height);
  }
};

__device__ inline int32_t tiles_for(int32_t count, int32_t tile) { return count / tile + (count % tile != 0 ? 1 : 0); }

// Tiles of the rows of ragged groups, for products whose depth is a row's length. Each warp scans the groups by itself,
// 32 at a time, each lane one group: a block's tiles ascend, so every group is looked at once.
template <class Config, int kColumns>  // columns of the result in a tile
class RowTiles {
 public:
  __device__ explicit RowTiles(const Operands<typename Config::T>& operands)
      : operands_(operands), tiles_n_(tiles_for(operands.width, kColumns)), next_(blockIdx.x) {
    look_at_groups();
  }

  // The same in every thread of the block. False behind the last tile.
  __device__ bool next(Tile& tile) {
    while (true) {
      const unsigned behind = __ballot_sync(kAllLanes, next_ < through_);
      if (behind != 0) {
        take(tile, __ffs(static_cast<int>(behind)) - 1);
        next_ += gridDim.x;
        return true;
      }
      before_ = __shfl_sync(kAllLanes, through_, 31);
      first_ += 32;
      if (first_ >= operands_.num_experts) return false;
      look_at_groups();
    }
  }

 private:
  static constexpr unsigned kAllLanes = 0xffffffffu;

  // Of the 32 groups from first_: this lane's rows, and the tiles of all groups up to it and with it.
  __device__ void look_at_groups() {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const int32_t expert = first_ + lane;
    const bool exists = expert < operands_.num_experts;
    begin_ = exists ? load_global(operands_.expert_offsets + expert) : 0;
    end_ = exists ? load_global(operands_.expert_offsets + expert + 1) : 0;
    own_ = static_cast<int64_t>(tiles_for(end_ - begin_, Config::kTileM)) * tiles_n_ * operands_.slices;
    through_ = own_;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int64_t other = __shfl_up_sync(kAllLanes, through_, distance);
      if (lane >= distance) through_ += other;
    }
    through_ += before_;
  }

  __device__ void take(Tile& tile, int lane) const {
    const int32_t begin = __shfl_sync(kAllLanes, begin_, lane);
    const int32_t end = __shfl_sync(kAllLanes, end_, lane);
    const int64_t index = next_ - __shfl_sync(kAllLanes, through_ - own_, lane);
    const Raster raster(index / operands_.slices, tiles_for(end - begin, Config::kTileM), tiles_n_);
    tile.expert = first_ + lane;
    tile.row = begin + raster.m * Config::kTileM;
    tile.row_end = end;
    tile.column = raster.n * kColumns;
    tile.slice = static_cast<int32_t>(index % operands_.slices);
    const int64_t steps = tiles_for(operands_.depth, Config::kTileK);
    const auto border = [&](int32_t slice) {
      const int64_t depth = steps * slice / operands_.slices * Config::kTileK;
      return depth < operands_.depth ? static_cast<int32_t>(depth) : operands_.depth;
    };
    tile.depth_begin = border(tile.slice);
    tile.depth_end = border(tile.slice + 1);
  }

  const Operands<typename Config::T>& operands_;
  int32_t tiles_n_;
  int64_t next_;
  int32_t first_ = 0;            // expert of lane 0
  int64_t before_ = 0;           // tiles of the experts below first_
  int32_t begin_ = 0, end_ = 0;  // this lane's group
  int64_t own_ = 0, through_ = 0;
};

// Tiles of all experts' matrices, for the product whose depth is a group's rows. An expert without rows has them too:
// its sums over nothing are the zeros that are stored.
template <class Config, int kColumns>
class MatrixTiles {
 public:
  __device__ explicit MatrixTiles(const Operands<typename Config::T>& operands)
      : operands_(operands),
        tiles_m_(tiles_for(operands.height, Config::kTileM)),
        tiles_n_(tiles_for(operands.width, kColumns)),
        next_(blockIdx.x) {}

  __device__ bool next(Tile& tile) {
    const int64_t tiles = static_cast<int64_t>(tiles_m_) * tiles_n_;
    if (next_ >= operands_.num_experts * tiles) return false;
    const Raster raster(next_ % tiles, tiles_m_, tiles_n_);
    tile.expert = static_cast<int32_t>(next_ / tiles);
    tile.slice = 0;
    tile.row = raster.m * Config::kTileM;
    tile.row_end = operands_.height;
    tile.column = raster.n * kColumns;
    tile.depth_begin = load_global(operands_.expert_offsets + tile.expert);
    tile.depth_end = load_global(operands_.expert_offsets + tile.expert + 1);
    next_ += gridDim.x;
    return true;
  }

 private:
  const Operands<typename Config::T>& operands_;
  int32_t tiles_m_, tiles_n_;
  int64_t next_;
};

}  // namespace dynamic_moe
