// SPDX-License-Identifier: Apache-2.0
// CPU kernels of grouped_matmul, grouped_matmul_dx and grouped_matmul_dw.
#include <torch/csrc/stable/library.h>

#include "bindings/checks.h"
#include "grouped_matmul/grouped_matmul.h"

namespace dynamic_moe::bindings {
namespace {

// The ragged groups of a checked call, and the tensors that keep its pointers alive.
struct Groups {
  Tensor expert_offsets;
  OptionalTensor row_token;
  RowGroups kernel;
};

// num_rows rows that read num_tokens rows of x, through row_token or one to one.
Groups checked_groups(const Tensor& offsets_in, const OptionalTensor& row_token_in, int64_t num_rows,
                      int64_t num_tokens, int64_t num_experts) {
  check_range("the number of experts", num_experts, 1, std::numeric_limits<int32_t>::max() - 1);
  check_fits_int32("the number of rows", num_rows);
  check_fits_int32("the number of tokens", num_tokens);
  const Tensor offsets = checked("expert_offsets", offsets_in, ScalarType::Int, {num_experts + 1});
  check_offsets(offsets, num_rows);
  const OptionalTensor row_token = checked("row_token", row_token_in, ScalarType::Int, {num_rows});
  if (row_token) {
    check_elements("row_token", *row_token, 0, num_tokens - 1);
  } else if (num_tokens != num_rows) {
    fail("x must have one row for each of the ", num_rows, " rows where row_token is None, got ", num_tokens);
  }
  const RowGroups kernel{.expert_offsets = data<int32_t>(offsets),
                         .row_token = data<int32_t>(row_token),
                         .num_rows = num_rows,
                         .num_tokens = num_tokens,
                         .num_experts = static_cast<int32_t>(num_experts)};
  return {offsets, row_token, kernel};
}

Tensor grouped_matmul(const Tensor& x_in, const Tensor& weight_in, const Tensor& expert_offsets,
                      const OptionalTensor& row_token) {
  const DType dtype = float_dtype("x", x_in);
  const Tensor weight = checked("weight", weight_in, scalar_type(dtype), {kAnySize, kAnySize, kAnySize});
  const int64_t n = weight.size(1);
  const int64_t k = weight.size(2);
  const Tensor x = checked("x", x_in, scalar_type(dtype), {kAnySize, k});
  const int64_t num_rows = row_token ? row_token->numel() : x.size(0);
  const Groups groups = checked_groups(expert_offsets, row_token, num_rows, x.size(0), weight.size(0));

  Tensor y = empty({num_rows, n}, scalar_type(dtype));
  grouped_matmul_cpu({.groups = groups.kernel,
                      .x = data(x),
                      .weight = data(weight),
                      .y = mutable_data(y),
                      .n = n,
                      .k = k,
                      .dtype = dtype});
  return y;
}

Tensor grouped_matmul_dx(const Tensor& dy_in, const Tensor& weight_in, const Tensor& expert_offsets,
                         const OptionalTensor& row_token, int64_t num_tokens) {
  const DType dtype = float_dtype("dy", dy_in);
  const Tensor weight = checked("weight", weight_in, scalar_type(dtype), {kAnySize, kAnySize, kAnySize});
  const int64_t n = weight.size(1);
  const int64_t k = weight.size(2);
  const Tensor dy = checked("dy", dy_in, scalar_type(dtype), {kAnySize, n});
  check_range("num_tokens", num_tokens, 0, std::numeric_limits<int32_t>::max());
  const Groups groups = checked_groups(expert_offsets, row_token, dy.size(0), num_tokens, weight.size(0));

  Tensor dx = empty({num_tokens, k}, scalar_type(dtype));
  grouped_matmul_dx_cpu({.groups = groups.kernel,
                         .dy = data(dy),
                         .weight = data(weight),
                         .dx = mutable_data(dx),
                         .n = n,
                         .k = k,
                         .dtype = dtype});
  return dx;
}

Tensor grouped_matmul_dw(const Tensor& dy_in, const Tensor& x_in, const Tensor& expert_offsets,
                         const OptionalTensor& row_token) {
  const DType dtype = float_dtype("dy", dy_in);
  const Tensor dy = checked("dy", dy_in, scalar_type(dtype), {kAnySize, kAnySize});
  const Tensor x = checked("x", x_in, scalar_type(dtype), {kAnySize, kAnySize});
  const int64_t n = dy.size(1);
  const int64_t k = x.size(1);
  const int64_t num_experts = expert_offsets.numel() - 1;
  const Groups groups = checked_groups(expert_offsets, row_token, dy.size(0), x.size(0), num_experts);

  Tensor dw = empty({num_experts, n, k}, scalar_type(dtype));
  grouped_matmul_dw_cpu(
      {.groups = groups.kernel, .dy = data(dy), .x = data(x), .dw = mutable_data(dw), .n = n, .k = k, .dtype = dtype});
  return dw;
}

}  // namespace
}  // namespace dynamic_moe::bindings

STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CPU, m) {
  using namespace dynamic_moe::bindings;
  m.impl("grouped_matmul", TORCH_BOX(&grouped_matmul));
  m.impl("grouped_matmul_dx", TORCH_BOX(&grouped_matmul_dx));
  m.impl("grouped_matmul_dw", TORCH_BOX(&grouped_matmul_dw));
}
