// SPDX-License-Identifier: Apache-2.0
// Combine and its backward pass on the device. A warp reads 32 slots of its token at a time, one in each lane, and
// visits the live ones in order; rows are read and written in vectors of 16 bytes wherever they are aligned to that.
// Every result belongs to one warp, which adds it up in the order of the slots: nothing else decides its bits.
#pragma once

#include <cstdint>

#include "common/cuda/elements.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/platform.cuh"
#include "permutation/permutation.h"

namespace dynamic_moe {

constexpr int kCombineWarps = 4;  // of a block
constexpr int kCombineThreads = 32 * kCombineWarps;

// The vectors of a row that a lane of combine has under way at once: bytes in flight are what hides the latency of
// rows that lie anywhere. A short row does not need that many.
constexpr int kMostCombineVectors = 4;

// The blocks of combine that a multiprocessor must hold at once, 0 for no demand. Left alone, ptxas keeps two vectors
// of 16-bit elements to 40 registers on some architectures, for two blocks more, and spills; 10 blocks allow 48.
constexpr int combine_blocks(int count, int vectors) { return count == 8 && vectors == 2 ? 10 : 0; }

// 32 slots of one token, of which each lane holds one.
struct SlotGroup {
  int32_t row;    // negative: unused
  float weight;   // 1 without weights, 0 where unused
  uint32_t live;  // the lanes whose slot is used

  __device__ SlotGroup(const int32_t* slot_row, const void* weights, int64_t slot, bool in_range)
      : row(in_range ? load_global(slot_row + slot) : -1), weight(row < 0 ? 0.0f : 1.0f) {
    if (row >= 0 && weights != nullptr) weight = load_global(static_cast<const float*>(weights) + slot);
    live = __ballot_sync(0xffffffffu, row >= 0);
  }
  __device__ int64_t row_of(int lane) const { return __shfl_sync(0xffffffffu, row, lane); }
  __device__ float weight_of(int lane) const { return __shfl_sync(0xffffffffu, weight, lane); }
};

// kCount: elements of a vector. A warp owns kVectors * 32 vectors of one token's row.
template <class T, int kCount, int kVectors>
__global__ void __launch_bounds__(kCombineThreads, combine_blocks(kCount, kVectors))
    combine_kernel(const CombineParams p, const int64_t tiles) {
  using Vector = Packed<T, kCount>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t task = static_cast<int64_t>(blockIdx.x) * kCombineWarps + threadIdx.x / 32;
  const int64_t token = task / tiles;
  if (token >= p.num_tokens) return;
  const int64_t column = (task % tiles) * (kVectors * 32 * kCount) + lane * kCount;
  const T* rows = static_cast<const T*>(p.rows) + column;

  float sum[kVectors][kCount] = {};
  for (int first = 0; first < p.max_experts; first += 32) {
    const SlotGroup slots(p.slot_row, p.weights, token * p.max_experts + first + lane, first + lane < p.max_experts);
    for (uint32_t live = slots.live; live != 0; live &= live - 1) {
      const int source = __ffs(static_cast<int>(live)) - 1;
      const T* row = rows + slots.row_of(source) * p.hidden_size;
      const float weight = slots.weight_of(source);
      Vector vectors[kVectors];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = v * 32 * kCount;
        vectors[v] = column + at < p.hidden_size ? Vector::load_once(row + at) : Vector::zero();
      }
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        float x[kCount];
        vectors[v].unpack(x);
#pragma unroll
        for (int i = 0; i < kCount; ++i) sum[v][i] = fmaf(weight, x[i], sum[v][i]);
      }
    }
  }
  T* y = static_cast<T*>(p.y) + token * p.hidden_size + column;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const int64_t at = v * 32 * kCount;
    if (column + at < p.hidden_size) Vector::of(sum[v]).store(y + at);
  }
}

// d_row = weight * dy where wanted, d_weight = <dy, row> where wanted. A warp owns a token; dy stays in the cache from
// one of its rows to the next.
template <class T, int kCount, bool kRows, bool kWeights>
__global__ void __launch_bounds__(kCombineThreads) combine_backward_kernel(const CombineBackwardParams p) {
  using Vector = Packed<T, kCount>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kCombineWarps + threadIdx.x / 32;
  if (token >= p.num_tokens) return;
  const T* dy = static_cast<const T*>(p.dy) + token * p.hidden_size;

  for (int first = 0; first < p.max_experts; first += 32) {
    const int64_t slot = token * p.max_experts + first + lane;
    const bool in_range = first + lane < p.max_experts;
    const SlotGroup slots(p.slot_row, p.weights, slot, in_range);
    float d_weight = 0.0f;  // of this lane's slot
    for (uint32_t live = slots.live; live != 0; live &= live - 1) {
      const int source = __ffs(static_cast<int>(live)) - 1;
      const int64_t offset = slots.row_of(source) * p.hidden_size;
      const float weight = slots.weight_of(source);
      float dot = 0.0f;
      // Four vectors of 8 elements from both operands leave ptxas no register to spare on compute capability 11.0.
#pragma unroll(kCount == 8 && !kRows ? 2 : 4)
      for (int64_t h = lane * kCount; h < p.hidden_size; h += 32 * kCount) {
        float d[kCount];
        Vector::load(dy + h).unpack(d);
        if constexpr (kWeights) {
          float x[kCount];
          Vector::load_once(static_cast<const T*>(p.rows) + offset + h).unpack(x);
#pragma unroll
          for (int i = 0; i < kCount; ++i) dot = fmaf(d[i], x[i], dot);
        }
        if constexpr (kRows) {
#pragma unroll
          for (int i = 0; i < kCount; ++i) d[i] *= weight;
          Vector::of(d).store(static_cast<T*>(p.d_rows) + offset + h);
        }
      }
      if constexpr (kWeights) {
#pragma unroll
        for (int distance = 16; distance > 0; distance /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, distance);
        if (lane == source) d_weight = dot;
      }
    }
    if (kWeights && in_range) store_global(static_cast<float*>(p.d_weights) + slot, d_weight);
  }
}

}  // namespace dynamic_moe
