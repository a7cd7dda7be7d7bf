// SPDX-License-Identifier: Apache-2.0
// The activation and its gradient, on the way out of the products next to them. Both start from the pre-activation as
// it is stored, so that forward and backward see the same numbers. What float16 can store only as infinite is taken as
// it was summed: by the forward pass from its sums, by the backward pass from a sum of its own.
#pragma once

#include "grouped_matmul/epilogue.cuh"

namespace dynamic_moe {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// An element of the pre-activation as the backward pass will know it.
template <class T>
__device__ __forceinline__ float kept(float sum) {
  const float stored = widened(narrowed<T>(sum));
  if constexpr (kNarrowRange<T>) return fabsf(stored) == INFINITY ? sum : stored;
  return stored;
}

// The product is the pre-activation [g, u]: stores it if asked to, and silu(g) * u.
template <class T>
struct SwigluForwardArguments {
  T* pre_activation;  // [R, 2I] or null
  T* activation;      // [R, I]
  int32_t width;      // I
};
template <class T, bool kAligned>
struct SwigluForward {
  static constexpr int kHalves = 2;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  SwigluForwardArguments<T> to;

  template <int kLanes>
  __device__ __forceinline__ void operator()(const Place& place, float (&values)[2][kVector]) const {
    if (place.count <= 0) return;
    if (to.pre_activation != nullptr) {
      T* row = to.pre_activation + place.row * 2 * to.width + place.column;
      store_elements<kAligned>(row, values[0], place.count);
      store_elements<kAligned>(row + to.width, values[1], place.count);
    }
    float activation[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float gate = kept<T>(values[0][i]), up = kept<T>(values[1][i]);
      activation[i] = gate * sigmoid(gate) * up;
    }
    store_elements<kAligned>(to.activation + place.row * to.width + place.column, activation, place.count);
  }
};

// The product is the gradient of s a, with a = silu(g) * u. Stores the gradients of g and u, the s a that the gradient
// of the down projection multiplies, and a part of <d(s a), a>, the gradient of s: a sum for each warp's columns, which
// sum_weight_gradient_kernel adds up.
template <class T>
struct SwigluBackwardArguments {
  const T* pre_activation;  // [R, 2I]
  T* d_pre_activation;      // [R, 2I]
  T* scaled_activation;     // [R, I] or null
  float* row_sums;          // [ceil(I / columns of a warp), R] or null
  int64_t rows;             // R
  int32_t width;            // I
  RowScale scale;
  // Where the range is narrow:
  const float* units;        // [E] scaled_activation is s a / unit
  const T* x;                // [T, H]
  const T* gate_up_proj;     // [E, 2I, H]
  const int32_t* row_token;  // [R] or null: row r reads x[r]
  int32_t depth;             // H
};
template <class T, bool kAligned>
struct SwigluBackward {
  static constexpr int kHalves = 1;
  static constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  SwigluBackwardArguments<T> to;

  template <int kLanes>
  __device__ __forceinline__ void operator()(const Place& place, float (&values)[1][kVector]) const {
    float row_sum = 0;
    if (place.count > 0) row_sum = differentiate(place, values[0]);
    if (to.row_sums == nullptr) return;
#pragma unroll
    for (int distance = kLanes / 2; distance > 0; distance /= 2) {
      row_sum += __shfl_xor_sync(0xffffffffu, row_sum, distance);
    }
    if (threadIdx.x % kLanes == 0 && place.count > 0) {
      store_global(to.row_sums + place.column / (kLanes * kVector) * to.rows + place.row, row_sum);
    }
  }

 private:
  // Returns the part of <d(s a), a>.
  __device__ __forceinline__ float differentiate(const Place& place, const float (&d_scaled)[kVector]) const {
    const int64_t pre = place.row * 2 * to.width + place.column;
    float gate[kVector], up[kVector], d_gate[kVector], d_up[kVector], scaled[kVector];
    load_elements<kAligned>(gate, to.pre_activation + pre, place.count);
    load_elements<kAligned>(up, to.pre_activation + pre + to.width, place.count);
    const float scale = to.scale.of(place.row);
    float stored_scale = scale;
    if constexpr (kNarrowRange<T>) {
      if (any_infinite(gate, up)) {
        sum_infinite_again(place, 0, gate);
        sum_infinite_again(place, to.width, up);
      }
      if (to.scaled_activation != nullptr) stored_scale /= load_global(to.units + place.expert);
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float s = sigmoid(gate[i]), silu = gate[i] * s, activation = silu * up[i];
      const float d_activation = scale * d_scaled[i];
      d_gate[i] = d_activation * up[i] * s * (1.0f + gate[i] * (1.0f - s));
      d_up[i] = d_activation * silu;
      scaled[i] = stored_scale * activation;
      sum += d_scaled[i] * activation;
    }
    store_elements<kAligned>(to.d_pre_activation + pre, d_gate, place.count);
    store_elements<kAligned>(to.d_pre_activation + pre + to.width, d_up, place.count);
    if (to.scaled_activation != nullptr) {
      store_elements<kAligned>(to.scaled_activation + place.row * to.width + place.column, scaled, place.count);
    }
    return sum;
  }

  __device__ static bool any_infinite(const float (&gate)[kVector], const float (&up)[kVector]) {
    bool any = false;
#pragma unroll
    for (int i = 0; i < kVector; ++i) any |= fabsf(gate[i]) == INFINITY || fabsf(up[i]) == INFINITY;
    return any;
  }

  // Replaces the infinite ones of the pre-activation's elements from `first` + place.column on. A loop for which one is
  // due: elements stay in registers.
  __device__ void sum_infinite_again(const Place& place, int32_t first, float (&values)[kVector]) const {
    const int64_t column = static_cast<int64_t>(first) + place.column;
    const int64_t token = to.row_token != nullptr ? load_global(to.row_token + place.row) : place.row;
    const T* x = to.x + token * to.depth;
    const T* weight = to.gate_up_proj + (place.expert * int64_t{2} * to.width + column) * to.depth;
#pragma unroll 1
    for (int i = 0; i < kVector && i < place.count; ++i, weight += to.depth) {
      bool due = false;
#pragma unroll
      for (int j = 0; j < kVector; ++j) due |= j == i && fabsf(values[j]) == INFINITY;
      if (!due) continue;
      const float sum = dot(x, weight);
#pragma unroll
      for (int j = 0; j < kVector; ++j) values[j] = j == i ? sum : values[j];
    }
  }

  __device__ float dot(const T* a, const T* b) const {
    float sum = 0;
#pragma unroll 1
    for (int32_t k = 0; k < to.depth; k += kVector) {
      float left[kVector], right[kVector];
      load_elements<kAligned>(left, a + k, to.depth - k);
      load_elements<kAligned>(right, b + k, to.depth - k);
#pragma unroll
      for (int i = 0; i < kVector; ++i) sum = fmaf(left[i], right[i], sum);
    }
    return sum;
  }
};

}  // namespace dynamic_moe
