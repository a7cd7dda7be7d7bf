// SPDX-License-Identifier: Apache-2.0
// Which rows a token has, from the token of each row, and the sum over them. Built on the device with integer atomics
// whose order does not show: where a token's list comes to lie is left to chance, but the list itself is put in
// ascending order, so sums have one order.
#pragma once

#include "common/cuda/elements.cuh"
#include "common/cuda/platform.cuh"
#include "grouped_matmul/epilogue.cuh"

namespace dynamic_moe {

struct TokenRows {
  int32_t* used;    // [1] entries of `rows` that are handed out
  int32_t* count;   // [T]
  int32_t* filled;  // [T] while lists are written
  int32_t* begin;   // [T] where the token's list begins in the two below
  int32_t* found;   // [R] lists in the order in which threads came
  int32_t* rows;    // [R] lists in ascending order
};

__device__ inline int64_t thread_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }

// `used`, `count` and `filled` are 0 before.
static __global__ void count_token_rows_kernel(const int32_t* row_token, const int32_t* num_live_rows,
                                               TokenRows lists) {
  const int64_t row = thread_index();
  if (row < load_global(num_live_rows)) atomicAdd(lists.count + load_global(row_token + row), 1);
}

// A warp takes room for its 32 tokens at once.
static __global__ void place_lists_kernel(int64_t num_tokens, TokenRows lists) {
  constexpr unsigned kAllLanes = 0xffffffffu;
  const int64_t token = thread_index();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int32_t count = token < num_tokens ? load_global(lists.count + token) : 0;
  int32_t through = count;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int32_t other = __shfl_up_sync(kAllLanes, through, distance);
    if (lane >= distance) through += other;
  }
  int32_t first = 0;
  if (lane == 31) first = atomicAdd(lists.used, through);
  first = __shfl_sync(kAllLanes, first, 31);
  if (token < num_tokens) store_global(lists.begin + token, first + through - count);
}

static __global__ void fill_lists_kernel(const int32_t* row_token, const int32_t* num_live_rows, TokenRows lists) {
  const int64_t row = thread_index();
  if (row >= load_global(num_live_rows)) return;
  const int32_t token = load_global(row_token + row);
  const int32_t place = load_global(lists.begin + token) + atomicAdd(lists.filled + token, 1);
  store_global(lists.found + place, static_cast<int32_t>(row));
}

// A row's place in its token's list is the number of smaller ones in it: lists are short.
static __global__ void order_lists_kernel(const int32_t* row_token, const int32_t* num_live_rows, TokenRows lists) {
  const int64_t row = thread_index();
  if (row >= load_global(num_live_rows)) return;
  const int32_t token = load_global(row_token + row);
  const int32_t begin = load_global(lists.begin + token), count = load_global(lists.count + token);
  int32_t smaller = 0;
  for (int32_t i = 0; i < count; ++i) smaller += load_global(lists.found + begin + i) < row ? 1 : 0;
  store_global(lists.rows + begin + smaller, static_cast<int32_t>(row));
}

// out[t] = sum of rows[r] over the rows r of t, ascending, in float32. A thread has one vector of a token.
template <class T, bool kAligned>
__global__ void sum_token_rows_kernel(const T* rows, TokenRows lists, T* out, int64_t num_tokens, int32_t width) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const int32_t vectors = (width + kVector - 1) / kVector;
  const int64_t token = thread_index() / vectors;
  if (token >= num_tokens) return;
  const int32_t column = static_cast<int32_t>(thread_index() % vectors) * kVector;
  const int32_t begin = load_global(lists.begin + token), count = load_global(lists.count + token);
  float sum[kVector] = {};
  for (int32_t i = 0; i < count; ++i) {
    const int64_t row = load_global(lists.rows + begin + i);
    float term[kVector];
    load_elements<kAligned>(term, rows + row * width + column, width - column);
#pragma unroll
    for (int j = 0; j < kVector; ++j) sum[j] += term[j];
  }
  store_elements<kAligned>(out + token * width + column, sum, width - column);
}

// Zeros behind the live rows: of what is not gathered, they have no token that could say so.
template <class T>
__global__ void clear_dead_rows_kernel(T* out, const int32_t* num_live_rows, int64_t num_rows, int32_t width) {
  const int64_t begin = load_global(num_live_rows) * static_cast<int64_t>(width), end = num_rows * width;
  for (int64_t i = begin + thread_index(); i < end; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    store_global(out + i, T{});
  }
}

}  // namespace dynamic_moe
