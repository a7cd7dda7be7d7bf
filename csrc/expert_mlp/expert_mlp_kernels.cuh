// SPDX-License-Identifier: Apache-2.0
// What the expert pass needs besides products and combine: a thread for each row.
#pragma once

#include "common/cuda/platform.cuh"
#include "common/cuda/shared.cuh"

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

// units[e] = the least power of two, but at least 1, that is above 1.01 |s| of all rows of expert e. s a / unit is
// below a, and by more than roundings of a: where the forward pass could store a, storage has room for it. A block for
// each expert.
static __global__ void weight_units_kernel(const float* weights, const int32_t* row_slot, const int32_t* expert_offsets,
                                           float* units) {
  DYNAMIC_MOE_SHARED(float, warp_largest, 32);
  const int32_t end = load_global(expert_offsets + blockIdx.x + 1);
  float largest = 0;
  for (int32_t row = load_global(expert_offsets + blockIdx.x) + static_cast<int32_t>(threadIdx.x); row < end;
       row += static_cast<int32_t>(blockDim.x)) {
    largest = fmaxf(largest, fabsf(load_global(weights + load_global(row_slot + row))));
  }
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, distance));
  }
  if (threadIdx.x % 32 == 0) store_shared(warp_largest + threadIdx.x / 32, largest);
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (unsigned warp = 0; warp < blockDim.x / 32; ++warp) largest = fmaxf(largest, load_shared(warp_largest + warp));
  float unit = 1;
  while (unit <= 1.01f * largest && unit < 0x1p100f) unit *= 2;
  store_global(units + blockIdx.x, unit);
}

}  // namespace dynamic_moe
