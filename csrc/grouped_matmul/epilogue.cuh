// SPDX-License-Identifier: Apache-2.0
// The way out of a tile: sums -> shared memory -> vectors of a row -> what the epilogue makes of them -> global memory.
// Tensor cores leave two neighboring sums in a thread; through a slab of shared memory each warp turns its own into 16
// bytes of the result per thread, so that global memory sees whole sectors. No barrier: a slab belongs to one warp.
//
// An epilogue is a small functor. It has
//   kHalves                                   1, or 2 where the right matrix is two matrices of which each tile takes
//   the
//                                             same columns (gate and up); the tile's columns are then split between
//                                             them
//   kVector                                   elements that it takes at a time: 16 bytes of what it stores
//   template <int kLanes> operator()(place, values)   values[half][i] is the sum at place.row, place.column + i; kLanes
//                                             neighboring lanes hold a row of the slab; every lane of the warp calls
#pragma once

#include "common/cuda/elements.cuh"
#include "common/cuda/platform.cuh"
#include "grouped_matmul/tile_scheduler.cuh"

namespace dynamic_moe {

struct Place {
  int64_t row;     // of the result
  int32_t column;  // of the result or of each half of it
  int32_t count;   // elements from there on that exist; 0 where the row does not
  int32_t slice;   // of the depth
  int32_t expert;  // not known where slices are added up
};

// Writes the `count` elements that exist. Aligned vectors are whole or empty.
template <bool kAligned, class T, int kCount>
__device__ __forceinline__ void store_elements(T* to, const float (&values)[kCount], int32_t count) {
  if constexpr (kAligned) {
    if (count > 0) Packed<T, kCount>::of(values).store(to);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (i < count) store_global(to + i, narrowed<T>(values[i]));
    }
  }
}
template <bool kAligned, class T, int kCount>
__device__ __forceinline__ void load_elements(float (&values)[kCount], const T* from, int32_t count) {
  if constexpr (kAligned) {
    (count > 0 ? Packed<T, kCount>::load(from) : Packed<T, kCount>::zero()).unpack(values);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = i < count ? widened(load_global(from + i)) : 0.0f;
  }
}

// The weight of a row in its token's sum; 1 for all rows where there are none.
struct RowScale {
  const float* weights = nullptr;     // [T, K]
  const int32_t* row_slot = nullptr;  // [R]

  __device__ float of(int64_t row) const {
    return weights == nullptr ? 1.0f : load_global(weights + load_global(row_slot + row));
  }
};

// out[row] = scale * sums
template <class T>
struct StoreRowsArguments {
  T* out;  // [rows, width]
  int32_t width;
  RowScale scale;
  const float* expert_factors = nullptr;  // [E] or null; read where the range is narrow
};
template <class T, bool kAligned>
struct StoreRows {
  static constexpr int kHalves = 1;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  StoreRowsArguments<T> to;

  template <int kLanes>
  __device__ __forceinline__ void operator()(const Place& place, float (&values)[1][kVector]) const {
    if (place.count <= 0) return;
    if (to.scale.weights != nullptr) {
      const float factor = to.scale.of(place.row);
#pragma unroll
      for (float& value : values[0]) value *= factor;
    }
    if constexpr (kNarrowRange<T>) {
      if (to.expert_factors != nullptr) {
        const float factor = load_global(to.expert_factors + place.expert);
#pragma unroll
        for (float& value : values[0]) value *= factor;
      }
    }
    store_elements<kAligned>(to.out + place.row * to.width + place.column, values[0], place.count);
  }
};

// out[slice, row] = sums, in float32: what sum_slices_kernel adds up.
struct StoreSlice {
  static constexpr int kHalves = 1, kVector = 4;
  float* out;  // [slices, rows, width]
  int64_t rows;
  int32_t width;

  template <int kLanes>
  __device__ __forceinline__ void operator()(const Place& place, float (&values)[1][kVector]) const {
    if (place.count <= 0) return;
    store_elements<true>(out + (place.slice * rows + place.row) * width + place.column, values[0], place.count);
  }
};

// kVector sums of a slab's row. Lanes that take eight read two pieces of 16 bytes, 32 bytes apart from the neighbor's:
// four of each eight lanes begin with the second piece, so that both accesses touch all banks.
template <int kVector>
__device__ __forceinline__ void read_slab(float (&values)[kVector], const float* from) {
  static_assert(kVector == 4 || kVector == 8, "one or two pieces");
  const auto* piece = reinterpret_cast<const float4*>(from);
  if constexpr (kVector == 4) {
    const float4 x = load_shared(piece);
    values[0] = x.x, values[1] = x.y, values[2] = x.z, values[3] = x.w;
  } else {
    const bool swap = threadIdx.x / 4 % 2 != 0;
    const float4 first = load_shared(piece + (swap ? 1 : 0));
    const float4 second = load_shared(piece + (swap ? 0 : 1));
    const float4 low = swap ? second : first, high = swap ? first : second;
    values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
    values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
  }
}

// Hands a warp's sums to the epilogue. first_row: the result's row for row 0 of the operand that gives the rows.
template <class Config, class Sums, class Epilogue>
__device__ __forceinline__ void finish_tile(const Sums& sums, float* slab, const Tile& tile, int64_t first_row,
                                            int32_t width, const Epilogue& epilogue) {
  constexpr int kVector = Epilogue::kVector, kHalves = Epilogue::kHalves;
  constexpr int kColumns = Config::kWarpN / kHalves;  // of each half
  constexpr int kLanes = kColumns / kVector;          // that hold a row
  constexpr int kRows = 32 / kLanes;                  // of the slab at a time
  constexpr int kRowFloats = Config::kSlabRowFloats;
  static_assert(Config::kSlabHeight % kRows == 0, "whole passes");
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int column = lane % kLanes * kVector;
  Place place;
  place.column = tile.column + sums.warp_column() / kHalves + column;
  place.slice = tile.slice;
  place.expert = tile.expert;
  const int32_t columns_left = width - place.column;
#pragma unroll
  for (int m = 0; m < Config::kWarpM / Config::kSlabHeight; ++m) {
    sums.template write_slab<kRowFloats>(slab, m);
    __syncwarp();
#pragma unroll 1
    for (int first = 0; first < Config::kSlabHeight; first += kRows) {
      const int slab_row = first + lane / kLanes;
      const int32_t row = tile.row + sums.warp_row() + m * Config::kSlabHeight + slab_row;
      place.row = first_row + row;
      place.count = row < tile.row_end ? columns_left : 0;
      float values[kHalves][kVector];
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
        read_slab(values[half], slab + slab_row * kRowFloats + half * kColumns + column);
      }
      epilogue.template operator()<kLanes>(place, values);
    }
    __syncwarp();
  }
}

}  // namespace dynamic_moe
