// SPDX-License-Identifier: Apache-2.0
// A warp's part of a tile in exact float32. Its lanes form 4 rows of 8; each keeps a small matrix of sums and takes
// four steps of the depth at a time, 16 bytes per access.
#pragma once

#include "common/cuda/platform.cuh"
#include "grouped_matmul/shared_tile.cuh"
#include "grouped_matmul/tile_config.cuh"

namespace dynamic_moe {

// The kCount rows of an operand that a lane multiplies, of the kLanes * kCount that the warp has. Lanes are interleaved
// so that neighbors read from different banks: row by row where a chunk is a piece of the depth of one row, in fours
// where it is four rows at one step.
template <int kTileRows, int kTileK, bool kKMajor, int kLanes, int kCount>
struct FmaFactors {
  using Layout = std::conditional_t<kKMajor, SharedTile<kTileRows, kTileK * 4>, SharedTile<kTileK, kTileRows * 4>>;
  static_assert(kCount % 4 == 0, "chunks of four rows");
  float value[4][kCount];  // [step][row]

  __device__ static constexpr int row(int lane, int i) {
    return kKMajor ? lane + i * kLanes : 4 * lane + i % 4 + i / 4 * 4 * kLanes;
  }

  // Steps 4 quad to 4 quad + 3.
  __device__ __forceinline__ void load(const uint8_t* tile, int first, int lane, int quad) {
    if constexpr (kKMajor) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const float4 x = load_shared(at(tile + first * kTileK * 4, row(lane, i), quad));
        value[0][i] = x.x, value[1][i] = x.y, value[2][i] = x.z, value[3][i] = x.w;
      }
    } else {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int i = 0; i < kCount; i += 4) {
          const float4 x = load_shared(at(tile, 4 * quad + step, first / 4 ^ row(lane, i) / 4));
          value[step][i] = x.x, value[step][i + 1] = x.y, value[step][i + 2] = x.z, value[step][i + 3] = x.w;
        }
      }
    }
  }

 private:
  __device__ static const float4* at(const uint8_t* tile, int row, int chunk) {
    return reinterpret_cast<const float4*>(tile + Layout::offset(row, chunk));
  }
};

template <class Config>
class FmaTile {
  static constexpr int kLanesM = 4, kLanesN = 8;
  static constexpr int kCountM = Config::kWarpM / kLanesM, kCountN = Config::kWarpN / kLanesN;
  using Left = FmaFactors<Config::kTileM, Config::kTileK, Config::kLeftKMajor, kLanesM, kCountM>;
  using Right = FmaFactors<Config::kTileN, Config::kTileK, Config::kRightKMajor, kLanesN, kCountN>;

 public:
  __device__ FmaTile() {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    warp_row_ = warp / Config::kWarpsN * Config::kWarpM;
    warp_column_ = warp % Config::kWarpsN * Config::kWarpN;
    lane_m_ = lane / kLanesN;
    lane_n_ = lane % kLanesN;
#pragma unroll
    for (int i = 0; i < kCountM; ++i) {
#pragma unroll
      for (int j = 0; j < kCountN; ++j) sums_[i][j] = 0;
    }
  }

  __device__ int warp_row() const { return warp_row_; }
  __device__ int warp_column() const { return warp_column_; }

  __device__ __forceinline__ void multiply(const uint8_t* left, const uint8_t* right) {
#pragma unroll
    for (int quad = 0; quad < Config::kTileK / 4; ++quad) {
      Left a;
      Right b;
      a.load(left, warp_row_, lane_m_, quad);
      b.load(right, warp_column_, lane_n_, quad);
#pragma unroll
      for (int step = 0; step < 4; ++step) {
#pragma unroll
        for (int i = 0; i < kCountM; ++i) {
#pragma unroll
          for (int j = 0; j < kCountN; ++j) sums_[i][j] = fmaf(a.value[step][i], b.value[step][j], sums_[i][j]);
        }
      }
    }
  }

  // Writes the warp's rows [16 m, 16 m + 16) to its slab: four of the lane's, in either order of rows.
  template <int kRowFloats>
  __device__ __forceinline__ void write_slab(float* slab, int m) const {
#pragma unroll
    for (int i = 4 * m; i < 4 * m + 4; ++i) {
      float* row = slab + (Left::row(lane_m_, i) - 16 * m) * kRowFloats;
      if constexpr (Config::kRightKMajor) {
#pragma unroll
        for (int j = 0; j < kCountN; ++j) store_shared(row + Right::row(lane_n_, j), sums_[i][j]);
      } else {
#pragma unroll
        for (int j = 0; j < kCountN; j += 4) {  // four columns side by side
          store_shared(reinterpret_cast<float4*>(row + Right::row(lane_n_, j)),
                       make_float4(sums_[i][j], sums_[i][j + 1], sums_[i][j + 2], sums_[i][j + 3]));
        }
      }
    }
  }

 private:
  int warp_row_, warp_column_, lane_m_, lane_n_;
  float sums_[kCountM][kCountN];
};

}  // namespace dynamic_moe
