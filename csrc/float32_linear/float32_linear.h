// SPDX-License-Identifier: Apache-2.0
// The linear map of a router, logits = x W^T, and its two derivatives, in float32 whatever the dtype of the tokens is.
//
// A router's decision must not depend on how torch is told to multiply (bfloat16 or TF32 for float32 operands), so
// these products are always exact float32 multiply-adds. The order of each sum depends on the sizes alone: results are
// the same bit for bit whatever the number of threads, and the logits of a token do not depend on the other tokens.
// Tokens are read in their own dtype: no float32 copy of x is made. On CUDA the grouped matmul of one group does the
// same.
#pragma once

#include "common/types.h"

namespace dynamic_moe {

// logits[t, e] = sum_h x[t, h] weight[e, h]
struct Float32LinearParams {
  const void* x;        // [T, H] in dtype
  const float* weight;  // [E, H]
  float* logits;        // [T, E]
  int64_t num_tokens, num_experts, hidden_size;
  DType dtype;  // float32, bfloat16 or float16
};
void float32_linear_cpu(const Float32LinearParams& params);

// dx[t, h] = sum_e d_logits[t, e] weight[e, h]
struct Float32LinearDxParams {
  const float* d_logits;  // [T, E]
  const float* weight;    // [E, H]
  void* dx;               // [T, H] in dtype
  int64_t num_tokens, num_experts, hidden_size;
  DType dtype;
};
void float32_linear_dx_cpu(const Float32LinearDxParams& params);

// dw[e, h] = sum_t d_logits[t, e] x[t, h]
struct Float32LinearDwParams {
  const float* d_logits;  // [T, E]
  const void* x;          // [T, H] in dtype
  float* dw;              // [E, H]
  int64_t num_tokens, num_experts, hidden_size;
  DType dtype;
};
void float32_linear_dw_cpu(const Float32LinearDwParams& params);

}  // namespace dynamic_moe
