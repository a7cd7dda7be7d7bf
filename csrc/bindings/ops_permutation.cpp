// SPDX-License-Identifier: Apache-2.0
// permute, combine and combine_backward.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "bindings/backend.h"
#include "permutation/permutation.h"

namespace dynamic_moe::bindings {
namespace {

// The row buffers have R rows, for which the host must know R, or a given number of them, but no more than there are
// slots; zeros stand in those beyond R.
template <class Backend>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> permute(const Tensor& expert_ids_in, int64_t num_experts,
                                                           int64_t row_capacity) {
  const Backend backend("expert_ids", expert_ids_in);
  const Tensor expert_ids = backend.checked("expert_ids", expert_ids_in, ScalarType::Int, {kAnySize, kAnySize});
  check_range("num_experts", num_experts, 1, std::numeric_limits<int32_t>::max() - 1);
  const int64_t num_tokens = expert_ids.size(0);
  const int64_t max_experts = expert_ids.size(1);
  check_fits_int32("tokens * experts per token", num_tokens * max_experts);
  check_fits_int32("the number of tokens", num_tokens);
  check_fits_int32("the number of experts per token", max_experts);

  const int64_t num_slots = num_tokens * max_experts;
  const int64_t capacity = row_capacity >= 0 ? std::min(row_capacity, num_slots) : num_slots;
  const auto experts = static_cast<int32_t>(num_experts);
  const Tensor tokens_per_expert = backend.empty({num_experts}, ScalarType::Int);
  const Tensor expert_offsets = backend.empty({num_experts + 1}, ScalarType::Int);
  const Tensor slot_row = backend.empty({num_tokens, max_experts}, ScalarType::Int);
  const auto* ids = data<int32_t>(expert_ids);
  auto* offsets = mutable_data<int32_t>(expert_offsets);
  // Step 1 counts, step 2 sorts, and the row buffers are allocated in between.
  const auto allocate = [&] {
    const int64_t num_rows = row_capacity >= 0 ? capacity : backend.read(expert_offsets, num_experts);
    return std::pair(backend.empty({num_rows}, ScalarType::Int), backend.empty({num_rows}, ScalarType::Int));
  };
  const auto params = [&](const Tensor& row_token, const Tensor& row_slot) {
    return PermuteParams{.expert_ids = ids,
                         .expert_offsets = offsets,
                         .row_token = mutable_data<int32_t>(row_token),
                         .row_slot = mutable_data<int32_t>(row_slot),
                         .slot_row = mutable_data<int32_t>(slot_row),
                         .num_tokens = num_tokens,
                         .max_experts = static_cast<int32_t>(max_experts),
                         .num_experts = experts};
  };
  if constexpr (Backend::kReadsValues) {
    count_rows_cpu(ids, num_slots, experts, mutable_data<int32_t>(tokens_per_expert), offsets);
    if (offsets[num_experts] > capacity) {
      fail("row_capacity must be at least the number of used slots, ", offsets[num_experts], ", got ", row_capacity);
    }
    const auto [row_token, row_slot] = allocate();
    permute_cpu(params(row_token, row_slot));
    zero_rows(row_token, offsets[num_experts]);
    zero_rows(row_slot, offsets[num_experts]);
    return {tokens_per_expert, expert_offsets, row_token, row_slot, slot_row};
  } else {
    const auto scratch = backend.scratch(permute_cuda_workspace(num_slots, experts));
    count_rows_cuda(ids, num_slots, experts, capacity, mutable_data<int32_t>(tokens_per_expert), offsets, scratch,
                    backend.stream());
    const auto [row_token, row_slot] = allocate();
    permute_cuda(params(row_token, row_slot), row_token.size(0), scratch, backend.stream());
    return {tokens_per_expert, expert_offsets, row_token, row_slot, slot_row};
  }
}

template <class Backend>
Tensor combine(const Tensor& rows_in, const OptionalTensor& weights_in, const Tensor& slot_row_in) {
  const Backend backend("rows", rows_in);
  const DType dtype = backend.float_dtype("rows", rows_in);
  const Tensor rows = backend.checked("rows", rows_in, scalar_type(dtype), {kAnySize, kAnySize});
  const Tensor slot_row = backend.checked("slot_row", slot_row_in, ScalarType::Int, {kAnySize, kAnySize});
  const int64_t num_tokens = slot_row.size(0);
  const int64_t max_experts = slot_row.size(1);
  const OptionalTensor weights =
      backend.checked("weights", weights_in, accumulator_type(dtype), {num_tokens, max_experts});
  check_fits_int32("the number of tokens", num_tokens);
  check_fits_int32("the number of experts per token", max_experts);
  if constexpr (Backend::kReadsValues) check_elements("slot_row", slot_row, -1, rows.size(0) - 1);

  Tensor y = backend.empty({num_tokens, rows.size(1)}, scalar_type(dtype));
  const CombineParams params{.rows = data(rows),
                             .weights = data(weights),
                             .slot_row = data<int32_t>(slot_row),
                             .y = mutable_data(y),
                             .num_tokens = num_tokens,
                             .max_experts = static_cast<int32_t>(max_experts),
                             .hidden_size = rows.size(1),
                             .dtype = dtype};
  if constexpr (Backend::kReadsValues) {
    combine_cpu(params);
  } else {
    combine_cuda(params, backend.stream());
  }
  return y;
}

template <class Backend>
std::tuple<Tensor, Tensor> combine_backward(const Tensor& dy_in, const Tensor& rows_in,
                                            const OptionalTensor& weights_in, const Tensor& slot_row_in, bool need_rows,
                                            bool need_weights) {
  const Backend backend("rows", rows_in);
  const DType dtype = backend.float_dtype("rows", rows_in);
  const ScalarType acc = accumulator_type(dtype);
  const Tensor rows = backend.checked("rows", rows_in, scalar_type(dtype), {kAnySize, kAnySize});
  const Tensor slot_row = backend.checked("slot_row", slot_row_in, ScalarType::Int, {kAnySize, kAnySize});
  const int64_t num_rows = rows.size(0);
  const int64_t hidden_size = rows.size(1);
  const int64_t num_tokens = slot_row.size(0);
  const int64_t max_experts = slot_row.size(1);
  const Tensor dy = backend.checked("dy", dy_in, scalar_type(dtype), {num_tokens, hidden_size});
  const OptionalTensor weights = backend.checked("weights", weights_in, acc, {num_tokens, max_experts});
  check_fits_int32("the number of tokens", num_tokens);
  check_fits_int32("the number of experts per token", max_experts);
  const Tensor d_rows =
      need_rows ? backend.empty({num_rows, hidden_size}, scalar_type(dtype)) : backend.empty({0}, scalar_type(dtype));
  const Tensor d_weights = need_weights ? backend.empty({num_tokens, max_experts}, acc) : backend.empty({0}, acc);
  const CombineBackwardParams params{.dy = data(dy),
                                     .rows = data(rows),
                                     .weights = data(weights),
                                     .slot_row = data<int32_t>(slot_row),
                                     .d_rows = need_rows ? mutable_data(d_rows) : nullptr,
                                     .d_weights = need_weights ? mutable_data(d_weights) : nullptr,
                                     .num_tokens = num_tokens,
                                     .max_experts = static_cast<int32_t>(max_experts),
                                     .hidden_size = hidden_size,
                                     .dtype = dtype};
  if constexpr (Backend::kReadsValues) {
    // The kernel writes the rows that a slot names.
    if (check_slot_row(slot_row, num_rows) < num_rows && need_rows) zero_rows(d_rows, 0);
    combine_backward_cpu(params);
  } else {
    combine_backward_cuda(params, backend.stream());
  }
  return {d_rows, d_weights};
}

template <class Backend>
void bind(torch::stable::detail::StableLibrary& m) {
  m.impl("permute", TORCH_BOX(&Operator<&permute<Backend>>::call));
  m.impl("combine", TORCH_BOX(&Operator<&combine<Backend>>::call));
  m.impl("combine_backward", TORCH_BOX(&Operator<&combine_backward<Backend>>::call));
}

}  // namespace
}  // namespace dynamic_moe::bindings

STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CPU, m) { dynamic_moe::bindings::bind<dynamic_moe::bindings::Cpu>(m); }
#ifdef DYNAMIC_MOE_CUDA_TOOLKIT
STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CUDA, m) { dynamic_moe::bindings::bind<dynamic_moe::bindings::Cuda>(m); }
#endif
