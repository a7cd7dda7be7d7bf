// SPDX-License-Identifier: Apache-2.0
// Permutation: sorts (token, expert) pairs by expert, then by token, by counting; and combine, which sums the rows of
// a token back together. Nothing is padded. Ids outside [0, E) are unused slots.
#pragma once

#include "common/cuda/stream.h"
#include "common/types.h"

namespace dynamic_moe {

// Step 1: how many rows each expert gets. expert_offsets[E] = R is the size that step 2's buffers need.
void count_rows_cpu(const int32_t* expert_ids,   // [T, K]
                    int64_t num_slots,           // T * K
                    int32_t num_experts,         // E
                    int32_t* tokens_per_expert,  // [E]
                    int32_t* expert_offsets);    // [E + 1]
// Both steps on the current device, for E <= 4096 (more: std::invalid_argument). They share a workspace, in which step
// 1 leaves for step 2 how many rows each block of slots has. Between them the host may read R, and need not.
size_t permute_cuda_workspace(int64_t num_slots, int32_t num_experts);  // bytes
void count_rows_cuda(const int32_t* expert_ids,                         // [T, K]
                     int64_t num_slots,                                 // T * K < 2^31
                     int32_t num_experts,                               // E
                     int64_t row_capacity,                              // of step 2's buffers; T * K if exact
                     int32_t* tokens_per_expert,                        // [E]
                     int32_t* expert_offsets,                           // [E + 1] at most row_capacity
                     Workspace workspace, Stream stream);

// Step 2: the stable permutation.
struct PermuteParams {
  const int32_t* expert_ids;      // [T, K]
  const int32_t* expert_offsets;  // [E + 1] from step 1
  int32_t* row_token;             // [R]
  int32_t* row_slot;              // [R] t * K + k
  int32_t* slot_row;              // [T, K] -1 where unused
  int64_t num_tokens;             // T
  int32_t max_experts;            // K
  int32_t num_experts;            // E
};
void permute_cpu(const PermuteParams& params);
// row_token and row_slot have `num_rows` elements: R, or the row capacity where the host does not know R (T * K always
// suffice). Those beyond R become 0, an index that is in range wherever there are rows at all. A slot whose row would
// lie beyond the capacity has none: slot_row is -1. Which these are is no rule of routing: callers leave no such slot.
void permute_cuda(const PermuteParams& params, int64_t num_rows, Workspace workspace, Stream stream);

// y[t] = sum_k w[t, k] * rows[slot_row[t, k]], added in slot order in float32 (float64 for float64): deterministic.
struct CombineParams {
  const void* rows;         // [R, H] in dtype
  const void* weights;      // [T, K] float32 (float64 for float64), or null: 1
  const int32_t* slot_row;  // [T, K]
  void* y;                  // [T, H] in dtype
  int64_t num_tokens;
  int32_t max_experts;  // K
  int64_t hidden_size;  // H
  DType dtype;
};
void combine_cpu(const CombineParams& params);
// On the current device, for float32, bfloat16 and float16; reads no rows but those that slot_row names.
void combine_cuda(const CombineParams& params, Stream stream);

struct CombineBackwardParams {
  const void* dy;           // [T, H] in dtype
  const void* rows;         // [R, H] in dtype; needed for d_weights only
  const void* weights;      // [T, K] or null: 1
  const int32_t* slot_row;  // [T, K]
  void* d_rows;             // [R, H] in dtype, or null
  void* d_weights;          // [T, K] float32 / float64, or null; 0 where unused
  int64_t num_tokens;
  int32_t max_experts;
  int64_t hidden_size;
  DType dtype;
};
void combine_backward_cpu(const CombineBackwardParams& params);
// Writes no rows but those that slot_row names, here as on the CPU.
void combine_backward_cuda(const CombineBackwardParams& params, Stream stream);

}  // namespace dynamic_moe
