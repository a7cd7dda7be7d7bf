// SPDX-License-Identifier: Apache-2.0
// expert_mlp, expert_mlp_backward and, on the CPU alone, prepack_experts and expert_mlp_prepacked.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "bindings/backend.h"
#include "common/workspace.h"
#include "expert_mlp/expert_mlp.h"

namespace dynamic_moe::bindings {
namespace {

// What the forward and the backward pass have in common: checked tensors and sizes.
struct Problem {
  DType dtype;
  Tensor x;               // [T, H]
  Tensor gate_up_proj;    // [E, 2I, H]
  Tensor down_proj;       // [E, H, I]
  Tensor expert_weights;  // [T, K]
  Tensor expert_offsets;  // [E + 1]
  Tensor row_token;       // [R]
  Tensor row_slot;        // [R]
  int64_t num_tokens, num_experts, max_experts, hidden_size, intermediate_size;
  int64_t num_rows;     // of the row buffers
  int64_t kernel_rows;  // that the kernels are told of: the live ones on the CPU; CUDA's find out by themselves

  RowGroups groups() const {
    return {.expert_offsets = data<int32_t>(expert_offsets),
            .row_token = data<int32_t>(row_token),
            .num_rows = kernel_rows,
            .num_tokens = num_tokens,
            .num_experts = static_cast<int32_t>(num_experts)};
  }
  int64_t num_slots() const { return num_tokens * max_experts; }
};

void check_counts(int64_t num_experts, int64_t num_tokens, int64_t max_experts) {
  check_range("the number of experts", num_experts, 1, std::numeric_limits<int32_t>::max() - 1);
  check_fits_int32("the number of tokens", num_tokens);
  check_fits_int32("tokens * experts per token", num_tokens * max_experts);
}

template <class Backend>
Problem checked_problem(const Backend& backend, const Tensor& x_in, const Tensor& gate_up_in, const Tensor& down_in,
                        const Tensor& weights_in, const Tensor& offsets_in, const Tensor& row_token_in,
                        const Tensor& row_slot_in) {
  const DType dtype = backend.float_dtype("x", x_in);
  const ScalarType type = scalar_type(dtype);
  const Tensor x = backend.checked("x", x_in, type, {kAnySize, kAnySize});
  const int64_t num_tokens = x.size(0);
  const int64_t hidden_size = x.size(1);
  const Tensor down_proj = backend.checked("down_proj", down_in, type, {kAnySize, hidden_size, kAnySize});
  const int64_t num_experts = down_proj.size(0);
  const int64_t intermediate_size = down_proj.size(2);
  const Tensor gate_up_proj =
      backend.checked("gate_up_proj", gate_up_in, type, {num_experts, 2 * intermediate_size, hidden_size});
  const Tensor expert_weights =
      backend.checked("expert_weights", weights_in, accumulator_type(dtype), {num_tokens, kAnySize});
  const int64_t max_experts = expert_weights.size(1);
  check_counts(num_experts, num_tokens, max_experts);
  const Tensor expert_offsets = backend.checked("expert_offsets", offsets_in, ScalarType::Int, {num_experts + 1});
  const Tensor row_token = backend.checked("row_token", row_token_in, ScalarType::Int, {kAnySize});
  const int64_t num_rows = row_token.size(0);
  const Tensor row_slot = backend.checked("row_slot", row_slot_in, ScalarType::Int, {num_rows});
  int64_t kernel_rows = num_rows;
  if constexpr (Backend::kReadsValues) {
    kernel_rows = check_offsets(expert_offsets, num_rows);
    check_rows(row_token, row_slot, kernel_rows, num_tokens, max_experts);
  }
  return {.dtype = dtype,
          .x = x,
          .gate_up_proj = gate_up_proj,
          .down_proj = down_proj,
          .expert_weights = expert_weights,
          .expert_offsets = expert_offsets,
          .row_token = row_token,
          .row_slot = row_slot,
          .num_tokens = num_tokens,
          .num_experts = num_experts,
          .max_experts = max_experts,
          .hidden_size = hidden_size,
          .intermediate_size = intermediate_size,
          .num_rows = num_rows,
          .kernel_rows = kernel_rows};
}

template <class Backend>
std::tuple<Tensor, Tensor> expert_mlp(const Tensor& x, const Tensor& gate_up_proj, const Tensor& down_proj,
                                      const Tensor& expert_weights, const Tensor& expert_offsets,
                                      const Tensor& row_token, const Tensor& row_slot, bool keep_pre_activation,
                                      bool allow_tf32) {
  const Backend backend("x", x);
  const Problem problem =
      checked_problem(backend, x, gate_up_proj, down_proj, expert_weights, expert_offsets, row_token, row_slot);
  const ScalarType type = scalar_type(problem.dtype);
  const Tensor y = backend.empty({problem.num_tokens, problem.hidden_size}, type);
  const Tensor pre_activation =
      backend.empty({keep_pre_activation ? problem.num_rows : 0, 2 * problem.intermediate_size}, type);
  const ExpertMlpParams params{.groups = problem.groups(),
                               .row_slot = data<int32_t>(problem.row_slot),
                               .expert_weights = data(problem.expert_weights),
                               .x = data(problem.x),
                               .gate_up_proj = data(problem.gate_up_proj),
                               .down_proj = data(problem.down_proj),
                               .pre_activation = keep_pre_activation ? mutable_data(pre_activation) : nullptr,
                               .y = mutable_data(y),
                               .hidden_size = problem.hidden_size,
                               .intermediate_size = problem.intermediate_size,
                               .dtype = problem.dtype,
                               .num_slots = problem.num_slots(),
                               .allow_tf32 = allow_tf32};
  if constexpr (Backend::kReadsValues) {
    expert_mlp_cpu(params);
    zero_rows(pre_activation, problem.kernel_rows);
  } else {
    expert_mlp_cuda(params, backend.scratch(expert_mlp_cuda_workspace(params)), backend.stream());
  }
  return {y, pre_activation};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor> expert_mlp_backward(
    const Tensor& dy_in, const Tensor& x, const Tensor& gate_up_proj, const Tensor& down_proj,
    const Tensor& expert_weights, const Tensor& expert_offsets, const Tensor& row_token, const Tensor& row_slot,
    const Tensor& pre_activation_in, bool need_x, bool need_weights, bool need_expert_weights, bool allow_tf32) {
  const Backend backend("x", x);
  const Problem problem =
      checked_problem(backend, x, gate_up_proj, down_proj, expert_weights, expert_offsets, row_token, row_slot);
  const ScalarType type = scalar_type(problem.dtype);
  const ScalarType acc = accumulator_type(problem.dtype);
  const int64_t hidden = problem.hidden_size;
  const int64_t intermediate = problem.intermediate_size;
  const Tensor dy = backend.checked("dy", dy_in, type, {problem.num_tokens, hidden});
  const Tensor pre_activation =
      backend.checked("pre_activation", pre_activation_in, type, {problem.num_rows, 2 * intermediate});

  const Tensor dx = need_x ? backend.empty({problem.num_tokens, hidden}, type) : backend.empty({0}, type);
  const Tensor d_gate_up =
      need_weights ? backend.empty({problem.num_experts, 2 * intermediate, hidden}, type) : backend.empty({0}, type);
  const Tensor d_down =
      need_weights ? backend.empty({problem.num_experts, hidden, intermediate}, type) : backend.empty({0}, type);
  const Tensor d_weights =
      need_expert_weights ? backend.empty({problem.num_tokens, problem.max_experts}, acc) : backend.empty({0}, acc);
  const ExpertMlpBackwardParams params{.groups = problem.groups(),
                                       .row_slot = data<int32_t>(problem.row_slot),
                                       .expert_weights = data(problem.expert_weights),
                                       .x = data(problem.x),
                                       .gate_up_proj = data(problem.gate_up_proj),
                                       .down_proj = data(problem.down_proj),
                                       .pre_activation = data(pre_activation),
                                       .dy = data(dy),
                                       .dx = need_x ? mutable_data(dx) : nullptr,
                                       .d_gate_up_proj = need_weights ? mutable_data(d_gate_up) : nullptr,
                                       .d_down_proj = need_weights ? mutable_data(d_down) : nullptr,
                                       .d_expert_weights = need_expert_weights ? mutable_data(d_weights) : nullptr,
                                       .num_slots = problem.num_slots(),
                                       .hidden_size = hidden,
                                       .intermediate_size = intermediate,
                                       .dtype = problem.dtype,
                                       .allow_tf32 = allow_tf32};
  if constexpr (Backend::kReadsValues) {
    expert_mlp_backward_cpu(params);
  } else {
    expert_mlp_backward_cuda(params, backend.scratch(expert_mlp_backward_cuda_workspace(params)), backend.stream());
  }
  return {dx, d_gate_up, d_down, d_weights};
}

Tensor prepack_experts(const Tensor& gate_up_in, const Tensor& down_in) {
  const Cpu backend("gate_up_proj", gate_up_in);
  const DType dtype = float_dtype("gate_up_proj", gate_up_in);
  const Tensor down_proj = backend.checked("down_proj", down_in, scalar_type(dtype), {kAnySize, kAnySize, kAnySize});
  const int64_t num_experts = down_proj.size(0), hidden = down_proj.size(1), intermediate = down_proj.size(2);
  const Tensor gate_up_proj =
      backend.checked("gate_up_proj", gate_up_in, scalar_type(dtype), {num_experts, 2 * intermediate, hidden});
  check_range("the number of experts", num_experts, 1, std::numeric_limits<int32_t>::max() - 1);
  const Tensor packed =
      backend.empty({packed_experts_bytes(num_experts, hidden, intermediate, dtype)}, ScalarType::Byte);
  advise_huge_pages(mutable_data(packed), static_cast<size_t>(packed.size(0)));
  prepack_experts_cpu({.gate_up_proj = data(gate_up_proj),
                       .down_proj = data(down_proj),
                       .packed = mutable_data(packed),
                       .num_experts = num_experts,
                       .hidden_size = hidden,
                       .intermediate_size = intermediate,
                       .dtype = dtype});
  return packed;
}

Tensor expert_mlp_prepacked(const Tensor& x_in, const Tensor& packed_in, int64_t intermediate_size,
                            const Tensor& weights_in, const Tensor& offsets_in, const Tensor& row_token_in,
                            const Tensor& row_slot_in) {
  const Cpu backend("x", x_in);
  const DType dtype = float_dtype("x", x_in);
  const Tensor x = backend.checked("x", x_in, scalar_type(dtype), {kAnySize, kAnySize});
  const int64_t num_tokens = x.size(0);
  const Tensor packed = backend.checked("packed", packed_in, ScalarType::Byte, {kAnySize});
  const Tensor expert_weights =
      backend.checked("expert_weights", weights_in, accumulator_type(dtype), {num_tokens, kAnySize});
  const Tensor expert_offsets = backend.checked("expert_offsets", offsets_in, ScalarType::Int, {kAnySize});
  const int64_t num_experts = expert_offsets.size(0) - 1;
  check_counts(num_experts, num_tokens, expert_weights.size(1));
  const Tensor row_token = backend.checked("row_token", row_token_in, ScalarType::Int, {kAnySize});
  const Tensor row_slot = backend.checked("row_slot", row_slot_in, ScalarType::Int, {row_token.size(0)});
  const int64_t live_rows = check_offsets(expert_offsets, row_token.size(0));
  check_rows(row_token, row_slot, live_rows, num_tokens, expert_weights.size(1));
  const Tensor y = backend.empty({num_tokens, x.size(1)}, scalar_type(dtype));
  expert_mlp_prepacked_cpu({.groups = {.expert_offsets = data<int32_t>(expert_offsets),
                                       .row_token = data<int32_t>(row_token),
                                       .num_rows = live_rows,
                                       .num_tokens = num_tokens,
                                       .num_experts = static_cast<int32_t>(num_experts)},
                            .row_slot = data<int32_t>(row_slot),
                            .expert_weights = data(expert_weights),
                            .x = data(x),
                            .packed = data(packed),
                            .packed_bytes = packed.size(0),
                            .y = mutable_data(y),
                            .hidden_size = x.size(1),
                            .intermediate_size = intermediate_size,
                            .dtype = dtype});
  return y;
}

template <class Backend>
void bind(torch::stable::detail::StableLibrary& m) {
  m.impl("expert_mlp", TORCH_BOX(&Operator<&expert_mlp<Backend>>::call));
  m.impl("expert_mlp_backward", TORCH_BOX(&Operator<&expert_mlp_backward<Backend>>::call));
}

}  // namespace
}  // namespace dynamic_moe::bindings

STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CPU, m) {
  using namespace dynamic_moe::bindings;
  bind<Cpu>(m);
  m.impl("prepack_experts", TORCH_BOX(&Operator<&prepack_experts>::call));
  m.impl("expert_mlp_prepacked", TORCH_BOX(&Operator<&expert_mlp_prepacked>::call));
}
#ifdef DYNAMIC_MOE_CUDA_TOOLKIT
STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CUDA, m) { dynamic_moe::bindings::bind<dynamic_moe::bindings::Cuda>(m); }
#endif
