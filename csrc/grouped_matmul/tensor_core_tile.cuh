// SPDX-License-Identifier: Apache-2.0
// A warp's part of a tile on tensor cores. One step of the depth is 32 bytes of a K-major row, whatever the type: 16
// halves for mma.m16n8k16, 8 floats for mma.m16n8k8 of TF32. Fragment layouts: see ptx.cuh.
#pragma once

#include "common/cuda/platform.cuh"
#include "common/cuda/ptx.cuh"
#include "grouped_matmul/shared_tile.cuh"
#include "grouped_matmul/tile_config.cuh"

namespace dynamic_moe {

// Fragments of an operand in shared memory, kRows by kTileK elements: of the rows `first` + `within` and the 15 behind,
// at a step. What is known when compiling (within, step) is kept apart from what belongs to the warp (first) and to the
// lane: multiples of eight rows leave the layout's turn as it is, and chunks whose bits do not overlap are joined by ^,
// so each lane has few addresses and immediate distances from them.
template <class Config, int kRows, bool kKMajor>
struct Fragments {
  static constexpr bool kTf32 = Config::kMath == Math::kTf32;
  static constexpr int kBytes = static_cast<int>(sizeof(typename Config::T));
  static constexpr int kStep = 32 / kBytes;
  static constexpr int kRowBytes = (kKMajor ? Config::kTileK : kRows) * kBytes;
  using Layout = SharedTile<kKMajor ? kRows : Config::kTileK, kRowBytes, kTf32 && !kKMajor>;

  __device__ static int lane() { return static_cast<int>(threadIdx.x) % 32; }

  // 16 rows of the left operand.
  __device__ static void load_left(uint32_t (&a)[4], const uint8_t* tile, int first, int within, int step) {
    if constexpr (kKMajor) {
      tile += (first + within) * kRowBytes;
      ptx::ldmatrix_x4(a, tile + Layout::offset(lane() % 16, 2 * step ^ lane() / 16));
    } else if constexpr (!kTf32) {
      tile += 16 * step * kRowBytes;
      const int chunk = first / 8 ^ lane() / 8 % 2 ^ within / 8;
      ptx::ldmatrix_x4_trans(a, tile + Layout::offset(lane() / 16 * 8 + lane() % 8, chunk));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) a[i] = word(tile, first, within + i % 2 * 8, 8 * step + i / 2 * 4);
    }
    round(a);
  }

  // 16 rows of the right operand: columns of the result, eight for each mma.
  __device__ static void load_right(uint32_t (&low)[2], uint32_t (&high)[2], const uint8_t* tile, int first, int within,
                                    int step) {
    uint32_t b[4];
    if constexpr (kKMajor) {
      tile += (first + within) * kRowBytes;
      ptx::ldmatrix_x4(b, tile + Layout::offset(lane() / 16 * 8 + lane() % 8, 2 * step ^ lane() / 8 % 2));
    } else if constexpr (!kTf32) {
      tile += 16 * step * kRowBytes;
      ptx::ldmatrix_x4_trans(b, tile + Layout::offset(lane() % 16, first / 8 ^ lane() / 16 ^ within / 8));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) b[i] = word(tile, first, within + i / 2 * 8, 8 * step + i % 2 * 4);
    }
    round(b);
    low[0] = b[0], low[1] = b[1];
    high[0] = b[2], high[1] = b[3];
  }

 private:
  // The lane's element of an 8 by 4 matrix of floats that lies with its 4 steps as rows. ldmatrix transposes halves
  // only.
  __device__ static uint32_t word(const uint8_t* tile, int first, int within, int step) {
    const int chunk = first / 4 ^ lane() / 16 ^ within / 4;
    tile += step * kRowBytes + Layout::offset(lane() % 4, chunk);
    return load_shared(reinterpret_cast<const uint32_t*>(tile) + lane() / 4 % 4);
  }
  __device__ static void round(uint32_t (&words)[4]) {
    if constexpr (kTf32) {
#pragma unroll
      for (uint32_t& bits : words) bits = ptx::float_to_tf32(__uint_as_float(bits));
    }
  }
};

template <class Config>
class TensorCoreTile {
  using T = typename Config::T;
  using Left = Fragments<Config, Config::kTileM, Config::kLeftKMajor>;
  using Right = Fragments<Config, Config::kTileN, Config::kRightKMajor>;
  static constexpr int kFragmentsM = Config::kWarpM / 16, kFragmentsN = Config::kWarpN / 8;
  static constexpr int kSteps = Config::kTileK / Left::kStep;

 public:
  __device__ TensorCoreTile() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    warp_row_ = warp / Config::kWarpsN * Config::kWarpM;
    warp_column_ = warp % Config::kWarpsN * Config::kWarpN;
#pragma unroll
    for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
      for (int n = 0; n < kFragmentsN; ++n) {
#pragma unroll
        for (float& sum : sums_[m][n]) sum = 0;
      }
    }
  }

  __device__ int warp_row() const { return warp_row_; }
  __device__ int warp_column() const { return warp_column_; }

  __device__ __forceinline__ void multiply(const uint8_t* left, const uint8_t* right) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint32_t a[kFragmentsM][4], b[kFragmentsN][2];
#pragma unroll
      for (int m = 0; m < kFragmentsM; ++m) Left::load_left(a[m], left, warp_row_, 16 * m, step);
#pragma unroll
      for (int n = 0; n < kFragmentsN; n += 2) {
        Right::load_right(b[n], b[n + 1], right, warp_column_, 8 * n, step);
      }
#pragma unroll
      for (int m = 0; m < kFragmentsM; ++m) {
#pragma unroll
        for (int n = 0; n < kFragmentsN; ++n) multiply_add(sums_[m][n], a[m], b[n]);
      }
    }
  }

  // Writes the warp's rows [16 m, 16 m + 16) to its slab.
  template <int kRowFloats>
  __device__ __forceinline__ void write_slab(float* slab, int m) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    float* to = slab + lane / 4 * kRowFloats + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < kFragmentsN; ++n) {
      const float (&d)[4] = sums_[m][n];
      store_shared(reinterpret_cast<float2*>(to + 8 * n), make_float2(d[0], d[1]));
      store_shared(reinterpret_cast<float2*>(to + 8 * n + 8 * kRowFloats), make_float2(d[2], d[3]));
    }
  }

 private:
  __device__ static void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (Config::kMath == Math::kTf32) {
      ptx::mma_m16n8k8_tf32(d, a, b);
    } else {
      ptx::mma_m16n8k16<T>(d, a, b);
    }
  }

  int warp_row_, warp_column_;  // within the tile
  float sums_[kFragmentsM][kFragmentsN][4];
};

}  // namespace dynamic_moe
