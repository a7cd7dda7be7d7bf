// SPDX-License-Identifier: Apache-2.0
// Gating: from router logits to the experts of each token, in one pass.
//
//   P = softmax(logits / temperature)                                  over the E experts of a token
//   order the experts by P, ties to the lower index
//   top-p: the shortest prefix whose mass reaches p, at most K long    (Huang et al. 2024, eq. 2-5)
//   top-k: the first K
//   weight = P of the selected, or P / (selected mass) if renormalize
//
// On the way it adds up what the auxiliary losses need. Arithmetic and float outputs are float32, float64 for float64
// logits. A logit of -infinity disables an expert. A token whose logits hold NaN or +infinity, or are all -infinity, is
// "non-finite": it gets expert 0 with weight NaN and its own probabilities, entropy and logsumexp are NaN, so that the
// fault shows in that token and in no other; it is left out of probability_sum (but counted in tokens_per_expert).
// An expert of probability exactly 0 is selected only if p or k cannot be met without it.
#pragma once

#include "common/cuda/stream.h"
#include "common/types.h"

namespace dynamic_moe {

enum class ThresholdRule : int32_t {
  kPaper,    // stop when the mass >= p (the paper)
  kReleased  // stop when the mass > p (the released code)
};

struct GatingParams {
  const void* logits;          // [T, E] in logits_dtype, rows contiguous
  const uint8_t* token_mask;   // [T] or null; a token with 0 gets no expert and enters no sum (its floats are 0)
  int32_t* expert_ids;         // [T, K] best first; E where unused
  void* expert_weights;        // [T, K] 0 where unused
  int32_t* tokens_per_expert;  // [E]
  void* probabilities;         // [T, E]
  void* probability_sum;       // [E] sum over the tokens
  void* entropy;               // [T] -sum_e P log P, in nats
  void* logsumexp;             // [T] of logits / temperature
  int64_t num_tokens;          // T >= 0
  int32_t num_experts;         // E >= 1
  int32_t max_experts;         // K, 1 <= K <= E; for top-k: k
  bool is_top_p;
  double top_p;                          // (0, 1]; p >= 1 keeps all K
  const double* device_top_p = nullptr;  // CUDA: null, or [1] in device memory, read there in the place of top_p
  ThresholdRule rule;
  bool renormalize;
  double temperature;  // > 0
  DType logits_dtype;
};

// Returns the number of non-finite tokens. Sums over tokens are added in an order that depends on T alone, so results
// are the same bit for bit whatever the number of threads.
int64_t gating_cpu(const GatingParams& params);

// The same on the current device for float32, bfloat16 and float16 logits and at most 1024 experts; more, float64 or a
// workspace that is too small are a std::invalid_argument. Writes the number of non-finite tokens to the device memory
// at `non_finite_tokens`. Reads no device value on the host. Sums over tokens are added in an order that depends on T
// and E alone.
void gating_cuda(const GatingParams& params, int32_t* non_finite_tokens, Workspace workspace, Stream stream);
size_t gating_cuda_workspace(const GatingParams& params);  // bytes

// d logits from the gradients of the outputs; a null gradient is zero. Selection carries no gradient.
struct GatingBackwardParams {
  const void* probabilities;      // [T, E]
  const int32_t* expert_ids;      // [T, K]
  const void* entropy;            // [T]
  const uint8_t* token_mask;      // [T] or null
  const void* d_expert_weights;   // [T, K] or null
  const void* d_probabilities;    // [T, E] or null
  const void* d_probability_sum;  // [E] or null
  const void* d_entropy;          // [T] or null
  const void* d_logsumexp;        // [T] or null
  void* d_logits;                 // [T, E] in logits_dtype
  int64_t num_tokens;
  int32_t num_experts;
  int32_t max_experts;
  bool renormalize;
  double temperature;
  DType logits_dtype;
};

void gating_backward_cpu(const GatingBackwardParams& params);
// The same on the current device, with the limits of gating_cuda. The experts of a token must differ.
void gating_backward_cuda(const GatingBackwardParams& params, Stream stream);

}  // namespace dynamic_moe
