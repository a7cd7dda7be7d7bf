// SPDX-License-Identifier: Apache-2.0
// The operators' schemas: what torch.ops.dynamic_moe.* is. One file beside this one binds each folder's kernels, those
// of the CPU and, where the build has them, those of CUDA (ops_float32_linear.cpp, ops_gating.cpp, ops_permutation.cpp,
// ops_grouped_matmul.cpp, ops_expert_mlp.cpp); fakes, autograd and the public functions are Python's (dynamic_moe/ops).
// Bound through the LibTorch stable ABI: one binary for every torch >= 2.13.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <exception>

#include "common/parallel.h"

namespace dynamic_moe::bindings {
namespace {

struct Region {
  ThreadPool::Body body;
  void* context;
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // of the first range that failed
};

// An exception must not cross torch's C boundary (it would arrive as text); it is carried around it.
void run_range(int64_t begin, int64_t end, void* context) {
  Region& region = *static_cast<Region*>(context);
  try {
    region.body(begin, end, region.context);
  } catch (...) {
    if (!region.failed.exchange(true)) region.error = std::current_exception();
  }
}

void run_on_torch_threads(int64_t begin, int64_t end, int64_t grain, ThreadPool::Body body, void* context) {
  Region region{.body = body, .context = context, .error = nullptr};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, run_range, &region));
  if (region.error) std::rethrow_exception(region.error);
}

int torch_thread_count() { return static_cast<int>(torch::stable::get_num_threads()); }

}  // namespace
}  // namespace dynamic_moe::bindings

STABLE_TORCH_LIBRARY(dynamic_moe, m) {
  dynamic_moe::set_thread_pool(
      {dynamic_moe::bindings::run_on_torch_threads, dynamic_moe::bindings::torch_thread_count});

  // The kernels read rows one after the other: where the compiler may choose a layout, it should choose that one.
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag, at::Tag::needs_contiguous_strides};
  const std::vector<at::Tag> dynamic_tags{at::Tag::pt2_compliant_tag, at::Tag::needs_contiguous_strides,
                                          at::Tag::dynamic_output_shape};

  m.def(
      "top_p_gating(Tensor logits, float top_p, int max_experts, bool strict, bool renormalize, float temperature, "
      "Tensor? token_mask, bool check_finite, bool straight_through=False) -> (Tensor expert_ids, Tensor "
      "expert_weights, "
      "Tensor tokens_per_expert, Tensor probabilities, Tensor probability_sum, Tensor entropy, Tensor logsumexp)",
      tags);
  // p as a tensor of one element: a threshold that changes must not make torch.compile start anew.
  m.def(
      "top_p_gating.tensor(Tensor logits, Tensor top_p, int max_experts, bool strict, bool renormalize, "
      "float temperature, Tensor? token_mask, bool check_finite, bool straight_through=False) -> (Tensor expert_ids, "
      "Tensor expert_weights, Tensor tokens_per_expert, Tensor probabilities, Tensor probability_sum, Tensor entropy, "
      "Tensor logsumexp)",
      tags);
  m.def(
      "top_k_gating(Tensor logits, int k, bool renormalize, float temperature, Tensor? token_mask, bool check_finite, "
      "bool straight_through=False) -> (Tensor expert_ids, Tensor expert_weights, Tensor tokens_per_expert, Tensor "
      "probabilities, "
      "Tensor probability_sum, Tensor entropy, Tensor logsumexp)",
      tags);
  m.def(
      "gating_backward(Tensor probabilities, Tensor expert_ids, Tensor entropy, Tensor? token_mask, "
      "Tensor? d_expert_weights, Tensor? d_probabilities, Tensor? d_probability_sum, Tensor? d_entropy, "
      "Tensor? d_logsumexp, bool renormalize, float temperature, ScalarType logits_dtype) -> Tensor",
      tags);

  m.def(
      "permute(Tensor expert_ids, int num_experts, int row_capacity=-1) -> (Tensor tokens_per_expert, "
      "Tensor expert_offsets, Tensor row_token, Tensor row_slot, Tensor slot_row)",
      dynamic_tags);
  m.def("float32_linear(Tensor x, Tensor weight) -> Tensor", tags);
  m.def("float32_linear_dx(Tensor d_logits, Tensor weight, ScalarType dtype) -> Tensor", tags);
  m.def("float32_linear_dw(Tensor d_logits, Tensor x, ScalarType dtype) -> Tensor", tags);

  m.def("combine(Tensor rows, Tensor? weights, Tensor slot_row) -> Tensor", tags);
  m.def(
      "combine_backward(Tensor dy, Tensor rows, Tensor? weights, Tensor slot_row, bool need_rows, bool need_weights) "
      "-> (Tensor d_rows, Tensor d_weights)",
      tags);

  m.def(
      "grouped_matmul(Tensor x, Tensor weight, Tensor expert_offsets, Tensor? row_token, bool allow_tf32=False) "
      "-> Tensor",
      tags);
  m.def(
      "grouped_matmul_dx(Tensor dy, Tensor weight, Tensor expert_offsets, Tensor? row_token, SymInt num_tokens, "
      "bool allow_tf32=False) -> Tensor",
      tags);
  m.def(
      "grouped_matmul_dw(Tensor dy, Tensor x, Tensor expert_offsets, Tensor? row_token, bool allow_tf32=False) "
      "-> Tensor",
      tags);

  m.def(
      "expert_mlp(Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor expert_weights, Tensor expert_offsets, "
      "Tensor row_token, Tensor row_slot, bool keep_pre_activation, bool allow_tf32=False) "
      "-> (Tensor y, Tensor pre_activation)",
      tags);
  m.def(
      "expert_mlp_backward(Tensor dy, Tensor x, Tensor gate_up_proj, Tensor down_proj, Tensor expert_weights, "
      "Tensor expert_offsets, Tensor row_token, Tensor row_slot, Tensor pre_activation, bool need_x, "
      "bool need_weights, bool need_expert_weights, bool allow_tf32=False) "
      "-> (Tensor dx, Tensor d_gate_up_proj, Tensor d_down_proj, Tensor d_expert_weights)",
      tags);
  m.def("prepack_experts(Tensor gate_up_proj, Tensor down_proj) -> Tensor", tags);
  m.def(
      "expert_mlp_prepacked(Tensor x, Tensor packed, SymInt intermediate_size, Tensor expert_weights, "
      "Tensor expert_offsets, Tensor row_token, Tensor row_slot) -> Tensor",
      tags);
}
