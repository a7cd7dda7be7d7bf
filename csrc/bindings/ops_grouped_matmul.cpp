// SPDX-License-Identifier: Apache-2.0
// grouped_matmul, grouped_matmul_dx and grouped_matmul_dw.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "bindings/backend.h"
#include "grouped_matmul/grouped_matmul.h"

namespace dynamic_moe::bindings {
namespace {

// The ragged groups of a checked call, and the tensors that keep its pointers alive.
struct Groups {
  Tensor expert_offsets;
  OptionalTensor row_token;
  RowGroups kernel;
};

// num_rows rows that read num_tokens rows of x, through row_token or one to one. The kernels on the CPU get the live
// rows alone; those on CUDA find out by themselves how many there are.
template <class Backend>
Groups checked_groups(const Backend& backend, const Tensor& offsets_in, const OptionalTensor& row_token_in,
                      int64_t num_rows, int64_t num_tokens, int64_t num_experts) {
  check_range("the number of experts", num_experts, 1, std::numeric_limits<int32_t>::max() - 1);
  check_fits_int32("the number of rows", num_rows);
  check_fits_int32("the number of tokens", num_tokens);
  const Tensor offsets = backend.checked("expert_offsets", offsets_in, ScalarType::Int, {num_experts + 1});
  const OptionalTensor row_token = backend.checked("row_token", row_token_in, ScalarType::Int, {num_rows});
  int64_t kernel_rows = num_rows;
  if constexpr (Backend::kReadsValues) {
    kernel_rows = check_offsets(offsets, num_rows);
    if (row_token) check_elements("row_token", *row_token, kernel_rows, 0, num_tokens - 1);
  }
  if (!row_token && num_tokens != num_rows) {
    fail("x must have one row for each of the ", num_rows, " rows where row_token is None, got ", num_tokens);
  }
  const RowGroups kernel{.expert_offsets = data<int32_t>(offsets),
                         .row_token = data<int32_t>(row_token),
                         .num_rows = kernel_rows,
                         .num_tokens = row_token ? num_tokens : kernel_rows,
                         .num_experts = static_cast<int32_t>(num_experts)};
  return {offsets, row_token, kernel};
}

template <class Backend>
Tensor grouped_matmul(const Tensor& x_in, const Tensor& weight_in, const Tensor& expert_offsets,
                      const OptionalTensor& row_token, bool allow_tf32) {
  const Backend backend("x", x_in);
  const DType dtype = backend.float_dtype("x", x_in);
  const Tensor weight = backend.checked("weight", weight_in, scalar_type(dtype), {kAnySize, kAnySize, kAnySize});
  const int64_t n = weight.size(1);
  const int64_t k = weight.size(2);
  const Tensor x = backend.checked("x", x_in, scalar_type(dtype), {kAnySize, k});
  const int64_t num_rows = row_token ? row_token->numel() : x.size(0);
  const Groups groups = checked_groups(backend, expert_offsets, row_token, num_rows, x.size(0), weight.size(0));

  const Tensor y = backend.empty({num_rows, n}, scalar_type(dtype));
  const GroupedMatmulParams params{.groups = groups.kernel,
                                   .x = data(x),
                                   .weight = data(weight),
                                   .y = mutable_data(y),
                                   .n = n,
                                   .k = k,
                                   .dtype = dtype,
                                   .allow_tf32 = allow_tf32};
  if constexpr (Backend::kReadsValues) {
    grouped_matmul_cpu(params);
    zero_rows(y, groups.kernel.num_rows);
  } else {
    grouped_matmul_cuda(params, backend.scratch(grouped_matmul_cuda_workspace(params)), backend.stream());
  }
  return y;
}

template <class Backend>
Tensor grouped_matmul_dx(const Tensor& dy_in, const Tensor& weight_in, const Tensor& expert_offsets,
                         const OptionalTensor& row_token, int64_t num_tokens, bool allow_tf32) {
  const Backend backend("dy", dy_in);
  const DType dtype = backend.float_dtype("dy", dy_in);
  const Tensor weight = backend.checked("weight", weight_in, scalar_type(dtype), {kAnySize, kAnySize, kAnySize});
  const int64_t n = weight.size(1);
  const int64_t k = weight.size(2);
  const Tensor dy = backend.checked("dy", dy_in, scalar_type(dtype), {kAnySize, n});
  check_range("num_tokens", num_tokens, 0, std::numeric_limits<int32_t>::max());
  const Groups groups = checked_groups(backend, expert_offsets, row_token, dy.size(0), num_tokens, weight.size(0));

  const Tensor dx = backend.empty({num_tokens, k}, scalar_type(dtype));
  const GroupedMatmulDxParams params{.groups = groups.kernel,
                                     .dy = data(dy),
                                     .weight = data(weight),
                                     .dx = mutable_data(dx),
                                     .n = n,
                                     .k = k,
                                     .dtype = dtype,
                                     .allow_tf32 = allow_tf32};
  if constexpr (Backend::kReadsValues) {
    grouped_matmul_dx_cpu(params);
    if (!row_token) zero_rows(dx, groups.kernel.num_rows);
  } else {
    grouped_matmul_dx_cuda(params, backend.scratch(grouped_matmul_dx_cuda_workspace(params)), backend.stream());
  }
  return dx;
}

template <class Backend>
Tensor grouped_matmul_dw(const Tensor& dy_in, const Tensor& x_in, const Tensor& expert_offsets,
                         const OptionalTensor& row_token, bool allow_tf32) {
  const Backend backend("dy", dy_in);
  const DType dtype = backend.float_dtype("dy", dy_in);
  const Tensor dy = backend.checked("dy", dy_in, scalar_type(dtype), {kAnySize, kAnySize});
  const Tensor x = backend.checked("x", x_in, scalar_type(dtype), {kAnySize, kAnySize});
  const int64_t n = dy.size(1);
  const int64_t k = x.size(1);
  const int64_t num_experts = expert_offsets.numel() - 1;
  const Groups groups = checked_groups(backend, expert_offsets, row_token, dy.size(0), x.size(0), num_experts);

  const Tensor dw = backend.empty({num_experts, n, k}, scalar_type(dtype));
  const GroupedMatmulDwParams params{.groups = groups.kernel,
                                     .dy = data(dy),
                                     .x = data(x),
                                     .dw = mutable_data(dw),
                                     .n = n,
                                     .k = k,
                                     .dtype = dtype,
                                     .allow_tf32 = allow_tf32};
  if constexpr (Backend::kReadsValues) {
    grouped_matmul_dw_cpu(params);
  } else {
    grouped_matmul_dw_cuda(params, {}, backend.stream());
  }
  return dw;
}

template <class Backend>
void bind(torch::stable::detail::StableLibrary& m) {
  m.impl("grouped_matmul", TORCH_BOX(&Operator<&grouped_matmul<Backend>>::call));
  m.impl("grouped_matmul_dx", TORCH_BOX(&Operator<&grouped_matmul_dx<Backend>>::call));
  m.impl("grouped_matmul_dw", TORCH_BOX(&Operator<&grouped_matmul_dw<Backend>>::call));
}

}  // namespace
}  // namespace dynamic_moe::bindings

STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CPU, m) { dynamic_moe::bindings::bind<dynamic_moe::bindings::Cpu>(m); }
#ifdef DYNAMIC_MOE_CUDA_TOOLKIT
STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CUDA, m) { dynamic_moe::bindings::bind<dynamic_moe::bindings::Cuda>(m); }
#endif
