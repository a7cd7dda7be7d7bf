// SPDX-License-Identifier: Apache-2.0
// What the expert pass needs besides products and combine: a thread for each row.
#pragma once

#include "common/cuda/platform.cuh"

namespace dynamic_moe {

// slot_row[row_slot[r]] = r; the others are -1 before.
static __global__ void invert_slots_kernel(const int32_t* row_slot, const int32_t* num_live_rows, int32_t* slot_row) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row < load_global(num_live_rows)) store_global(slot_row + load_global(row_slot + row), static_cast<int32_t>(row));
}

// d_weights[row_slot[r]] = sum of the row's parts, in order; the others are 0 before.
static __global__ void sum_weight_gradient_kernel(const float* row_sums, int32_t parts, int64_t rows,
                                                  const int32_t* row_slot, const int32_t* num_live_rows,
                                                  float* d_weights) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= load_global(num_live_rows)) return;
  float sum = 0;
  for (int32_t part = 0; part < parts; ++part) sum += load_global(row_sums + part * rows + row);
  store_global(d_weights + load_global(row_slot + row), sum);
}

}  // namespace dynamic_moe
