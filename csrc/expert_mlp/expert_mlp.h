// SPDX-License-Identifier: Apache-2.0
// The SwiGLU expert pass, from tokens to tokens:
//
//   [g, u] = W1_e x[t]          pre-activation, row r of expert e, token t = row_token[r]
//   a      = silu(g) * u
//   y[t]   = sum over the rows of t of s_r * W2_e a,   s_r = expert_weights[row_slot[r]]
//
// Kept for the backward pass: x and the pre-activation. The permuted input, the expert's output and its gradient are
// never stored; the gradient of s_r is <d(s a), a>, so it falls out of the activation's gradient.
//
// In float16 the activation must be within 65504, or y is not finite; the pre-activation need not be: the backward pass
// sums again, from x and gate_up_proj, what is stored as infinite. Nor need s a. Gradients beyond 65504, that of the
// pre-activation among them, are infinite; they shrink with dy, so a smaller scale of the loss brings them back.
//
// On CUDA each row's s_r W2_e a and its gradient with respect to x are rounded to dtype in the workspace before a
// token's rows are added in float32, in the order of its slots. Bounds, workspace and alignment are those of
// grouped_matmul.h.
#pragma once

#include "common/types.h"
#include "grouped_matmul/grouped_matmul.h"

namespace dynamic_moe {

struct ExpertMlpParams {
  RowGroups groups;
  const int32_t* row_slot;     // [R]
  const void* expert_weights;  // [T, K] float32 (float64 for float64), read at row_slot[r]
  const void* x;               // [T, H]
  const void* gate_up_proj;    // [E, 2I, H]: the I gate rows, then the I up rows
  const void* down_proj;       // [E, H, I]
  void* pre_activation;        // [R, 2I] written for the backward pass, or null (inference)
  void* y;                     // [T, H]
  int64_t hidden_size;         // H
  int64_t intermediate_size;   // I
  DType dtype;                 // of x, the projections, pre_activation and y
  int64_t num_slots = 0;       // T * K, read on CUDA alone
  bool allow_tf32 = false;     // CUDA, float32: the products may round their inputs to TF32
};
void expert_mlp_cpu(const ExpertMlpParams& params);
size_t expert_mlp_cuda_workspace(const ExpertMlpParams& params);
void expert_mlp_cuda(const ExpertMlpParams& params, Workspace workspace, Stream stream);

struct ExpertMlpBackwardParams {
  RowGroups groups;
  const int32_t* row_slot;
  const void* expert_weights;
  const void* x;
  const void* gate_up_proj;
  const void* down_proj;
  const void* pre_activation;  // [R, 2I] as the forward pass wrote it
  const void* dy;              // [T, H]
  void* dx;                    // [T, H] or null
  void* d_gate_up_proj;        // [E, 2I, H] or null
  void* d_down_proj;           // [E, H, I] or null
  void* d_expert_weights;      // [num_slots] float32 (float64 for float64) or null; 0 where no row points
  int64_t num_slots;           // T * K
  int64_t hidden_size;
  int64_t intermediate_size;
  DType dtype;
  bool allow_tf32 = false;
};
void expert_mlp_backward_cpu(const ExpertMlpBackwardParams& params);
size_t expert_mlp_backward_cuda_workspace(const ExpertMlpBackwardParams& params);
void expert_mlp_backward_cuda(const ExpertMlpBackwardParams& params, Workspace workspace, Stream stream);

// Inference on weights that are rearranged once, beforehand, into the order in which the kernels read them.
//
// The packed buffer begins with a header that says for which CPU level, dtype and sizes it was made: the order differs
// from level to level, and a buffer works at its own level alone. It holds full panels of words: float32, float16 at
// twice its size, bfloat16 at its own size where the level multiplies pairs and else at twice. Any float dtype but
// float64, whose kernels read the weights as they are.
struct PrepackExpertsParams {
  const void* gate_up_proj;   // [E, 2I, H]
  const void* down_proj;      // [E, H, I]
  void* packed;               // [packed_experts_bytes], best 64-byte aligned
  int64_t num_experts;        // E
  int64_t hidden_size;        // H
  int64_t intermediate_size;  // I
  DType dtype;
};
// At the level that isa_for(dtype) gives. Both throw std::invalid_argument for float64.
int64_t packed_experts_bytes(int64_t num_experts, int64_t hidden_size, int64_t intermediate_size, DType dtype);
void prepack_experts_cpu(const PrepackExpertsParams& params);

// y as expert_mlp_cpu computes it: the same bits for experts with more than TilePlan::few_rows rows; for those with
// fewer, whose sums expert_mlp_cpu takes in another order, within the rounding of the sums.
struct ExpertMlpPrepackedParams {
  RowGroups groups;
  const int32_t* row_slot;     // [R]
  const void* expert_weights;  // [T, K] float32, read at row_slot[r]
  const void* x;               // [T, H]
  const void* packed;          // as prepack_experts_cpu wrote it
  int64_t packed_bytes;
  void* y;  // [T, H]
  int64_t hidden_size;
  int64_t intermediate_size;
  DType dtype;  // of x, the weights that were packed, and y
};
// Throws std::invalid_argument where the buffer was not made for this level, this dtype and these sizes.
void expert_mlp_prepacked_cpu(const ExpertMlpPrepackedParams& params);

}  // namespace dynamic_moe
