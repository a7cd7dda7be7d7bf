// SPDX-License-Identifier: Apache-2.0
// Grouped matmul: the rows of expert e (expert_offsets[e] to expert_offsets[e + 1]) times expert e's matrix. Groups are
// ragged and may be empty; nothing is padded. Sums are float32 (float64 for float64); the order of each depends on the
// sizes and on the group's number of rows alone, so results are the same bit for bit whatever the number of threads.
//
// On CUDA (float32, bfloat16, float16) num_rows is what the row buffers hold, an upper bound: the number of live rows
// is read on the device from expert_offsets[E], and rows behind it are neither read nor written. Everything runs on the
// stream, in a workspace of the bytes that *_cuda_workspace names for the current device. Pointers that are not 16-byte
// aligned and rows that are no multiple of 16 bytes take a slower path.
#pragma once

#include "common/cuda/stream.h"
#include "common/types.h"

namespace dynamic_moe {

// The ragged problem that the three products share.
struct RowGroups {
  const int32_t* expert_offsets;  // [E + 1], ascending, the last one is R
  const int32_t* row_token;       // [R] row r reads x[row_token[r]]; null: row r reads x[r]
  int64_t num_rows;               // R
  int64_t num_tokens;             // T: rows of x (R where row_token is null)
  int32_t num_experts;            // E
};

// y[r] = W_e x[row_token[r]]
struct GroupedMatmulParams {
  RowGroups groups;
  const void* x;       // [T, K]
  const void* weight;  // [E, N, K]
  void* y;             // [R, N]
  int64_t n, k;
  DType dtype;              // of x, weight and y
  bool allow_tf32 = false;  // CUDA, float32: inputs may be rounded to TF32, sums stay float32
};
void grouped_matmul_cpu(const GroupedMatmulParams& params);
size_t grouped_matmul_cuda_workspace(const GroupedMatmulParams& params);
void grouped_matmul_cuda(const GroupedMatmulParams& params, Workspace workspace, Stream stream);

// dx[t] = sum over the rows r of token t of W_e^T dy[r], experts in ascending order; on CUDA each row's term is rounded
// to dtype before the terms are added in float32
struct GroupedMatmulDxParams {
  RowGroups groups;
  const void* dy;      // [R, N]
  const void* weight;  // [E, N, K]
  void* dx;            // [T, K]
  int64_t n, k;
  DType dtype;
  bool allow_tf32 = false;
};
void grouped_matmul_dx_cpu(const GroupedMatmulDxParams& params);
size_t grouped_matmul_dx_cuda_workspace(const GroupedMatmulDxParams& params);
void grouped_matmul_dx_cuda(const GroupedMatmulDxParams& params, Workspace workspace, Stream stream);

// dW_e = sum over the rows r of e of dy[r] x[row_token[r]]^T; exactly 0 for an expert without rows
struct GroupedMatmulDwParams {
  RowGroups groups;
  const void* dy;  // [R, N]
  const void* x;   // [T, K]
  void* dw;        // [E, N, K]
  int64_t n, k;
  DType dtype;
  bool allow_tf32 = false;
};
void grouped_matmul_dw_cpu(const GroupedMatmulDwParams& params);
void grouped_matmul_dw_cuda(const GroupedMatmulDwParams& params, Workspace workspace, Stream stream);  // needs none

}  // namespace dynamic_moe
