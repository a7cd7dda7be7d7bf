// SPDX-License-Identifier: Apache-2.0
// CPU kernels of permute, combine and combine_backward.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <tuple>

#include "bindings/checks.h"
#include "permutation/permutation.h"

namespace dynamic_moe::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> permute(const Tensor& expert_ids_in, int64_t num_experts) {
  const Tensor expert_ids = checked("expert_ids", expert_ids_in, ScalarType::Int, {kAnySize, kAnySize});
  check_range("num_experts", num_experts, 1, std::numeric_limits<int32_t>::max() - 1);
  const int64_t num_tokens = expert_ids.size(0);
  const int64_t max_experts = expert_ids.size(1);
  check_fits_int32("tokens * experts per token", num_tokens * max_experts);
  check_fits_int32("the number of tokens", num_tokens);
  check_fits_int32("the number of experts per token", max_experts);

  const Tensor tokens_per_expert = empty({num_experts}, ScalarType::Int);
  const Tensor expert_offsets = empty({num_experts + 1}, ScalarType::Int);
  int32_t* offsets = mutable_data<int32_t>(expert_offsets);
  count_rows_cpu(data<int32_t>(expert_ids), num_tokens * max_experts, static_cast<int32_t>(num_experts),
                 mutable_data<int32_t>(tokens_per_expert), offsets);

  const int64_t num_rows = offsets[num_experts];
  const Tensor row_token = empty({num_rows}, ScalarType::Int);
  const Tensor row_slot = empty({num_rows}, ScalarType::Int);
  const Tensor slot_row = empty({num_tokens, max_experts}, ScalarType::Int);
  permute_cpu({.expert_ids = data<int32_t>(expert_ids),
               .expert_offsets = offsets,
               .row_token = mutable_data<int32_t>(row_token),
               .row_slot = mutable_data<int32_t>(row_slot),
               .slot_row = mutable_data<int32_t>(slot_row),
               .num_tokens = num_tokens,
               .max_experts = static_cast<int32_t>(max_experts),
               .num_experts = static_cast<int32_t>(num_experts)});
  return {tokens_per_expert, expert_offsets, row_token, row_slot, slot_row};
}

Tensor combine(const Tensor& rows_in, const OptionalTensor& weights_in, const Tensor& slot_row_in) {
  const DType dtype = float_dtype("rows", rows_in);
  const Tensor rows = checked("rows", rows_in, scalar_type(dtype), {kAnySize, kAnySize});
  const Tensor slot_row = checked("slot_row", slot_row_in, ScalarType::Int, {kAnySize, kAnySize});
  const int64_t num_tokens = slot_row.size(0);
  const int64_t max_experts = slot_row.size(1);
  const OptionalTensor weights = checked("weights", weights_in, accumulator_type(dtype), {num_tokens, max_experts});
  check_fits_int32("the number of tokens", num_tokens);
  check_fits_int32("the number of experts per token", max_experts);
  check_elements("slot_row", slot_row, -1, rows.size(0) - 1);

  Tensor y = empty({num_tokens, rows.size(1)}, scalar_type(dtype));
  combine_cpu({.rows = data(rows),
               .weights = data(weights),
               .slot_row = data<int32_t>(slot_row),
               .y = mutable_data(y),
               .num_tokens = num_tokens,
               .max_experts = static_cast<int32_t>(max_experts),
               .hidden_size = rows.size(1),
               .dtype = dtype});
  return y;
}

std::tuple<Tensor, Tensor> combine_backward(const Tensor& dy_in, const Tensor& rows_in,
                                            const OptionalTensor& weights_in, const Tensor& slot_row_in, bool need_rows,
                                            bool need_weights) {
  const DType dtype = float_dtype("rows", rows_in);
  const ScalarType acc = accumulator_type(dtype);
  const Tensor rows = checked("rows", rows_in, scalar_type(dtype), {kAnySize, kAnySize});
  const Tensor slot_row = checked("slot_row", slot_row_in, ScalarType::Int, {kAnySize, kAnySize});
  const int64_t num_rows = rows.size(0);
  const int64_t hidden_size = rows.size(1);
  const int64_t num_tokens = slot_row.size(0);
  const int64_t max_experts = slot_row.size(1);
  const Tensor dy = checked("dy", dy_in, scalar_type(dtype), {num_tokens, hidden_size});
  const OptionalTensor weights = checked("weights", weights_in, acc, {num_tokens, max_experts});
  check_fits_int32("the number of tokens", num_tokens);
  check_fits_int32("the number of experts per token", max_experts);
  check_slot_row(slot_row, num_rows);  // a row that no slot names would get no gradient at all

  const Tensor d_rows = need_rows ? empty({num_rows, hidden_size}, scalar_type(dtype)) : empty({0}, scalar_type(dtype));
  const Tensor d_weights = need_weights ? empty({num_tokens, max_experts}, acc) : empty({0}, acc);
  combine_backward_cpu({.dy = data(dy),
                        .rows = data(rows),
                        .weights = data(weights),
                        .slot_row = data<int32_t>(slot_row),
                        .d_rows = need_rows ? mutable_data(d_rows) : nullptr,
                        .d_weights = need_weights ? mutable_data(d_weights) : nullptr,
                        .num_tokens = num_tokens,
                        .max_experts = static_cast<int32_t>(max_experts),
                        .hidden_size = hidden_size,
                        .dtype = dtype});
  return {d_rows, d_weights};
}

}  // namespace
}  // namespace dynamic_moe::bindings

STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CPU, m) {
  using namespace dynamic_moe::bindings;
  m.impl("permute", TORCH_BOX(&permute));
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_backward", TORCH_BOX(&combine_backward));
}
