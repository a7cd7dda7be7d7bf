// SPDX-License-Identifier: Apache-2.0
// float32_linear, float32_linear_dx and float32_linear_dw. CUDA has no kernels of its own for them: they are the
// grouped matmul of a single group, without TF32.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "bindings/backend.h"
#include "float32_linear/float32_linear.h"
#include "grouped_matmul/grouped_matmul.h"

namespace dynamic_moe::bindings {
namespace {

// The dtype of the tokens: that of a product which is float32 whatever it is given.
template <class Backend>
DType token_dtype(const Backend& backend, const char* name, ScalarType dtype) {
  const DType result = backend.float_dtype(name, dtype);
  if (result == DType::kFloat64) fail(name, " must be float32, bfloat16 or float16, got float64");
  return result;
}

// CUDA: one group that holds all rows, and tokens as float32.
struct OneGroup {
  Tensor offsets;  // [2]
  RowGroups groups;

  OneGroup(const Cuda& backend, int64_t num_tokens) : offsets(backend.empty({2}, ScalarType::Int)) {
    check_fits_int32("the number of tokens", num_tokens);
    Tensor first = torch::stable::select(offsets, 0, 0), last = torch::stable::select(offsets, 0, 1);
    torch::stable::zero_(first);
    torch::stable::fill_(last, static_cast<double>(num_tokens));
    groups = {.expert_offsets = data<int32_t>(offsets),
              .row_token = nullptr,
              .num_rows = num_tokens,
              .num_tokens = num_tokens,
              .num_experts = 1};
  }
};

Tensor converted(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// The weight [E, H], which is small, as float32. It is kept for the backward pass in its own dtype.
template <class Backend>
Tensor checked_weight(const Backend& backend, const Tensor& weight) {
  const ScalarType dtype = scalar_type(token_dtype(backend, "weight", weight.scalar_type()));
  return converted(backend.checked("weight", weight, dtype, {kAnySize, kAnySize}), ScalarType::Float);
}

template <class Backend>
Tensor float32_linear(const Tensor& x_in, const Tensor& weight_in) {
  const Backend backend("x", x_in);
  const DType dtype = token_dtype(backend, "x", x_in.scalar_type());
  const Tensor weight = checked_weight(backend, weight_in);
  const int64_t experts = weight.size(0), hidden = weight.size(1);
  const Tensor x = backend.checked("x", x_in, scalar_type(dtype), {kAnySize, hidden});
  const int64_t tokens = x.size(0);
  const Tensor logits = backend.empty({tokens, experts}, ScalarType::Float);
  if constexpr (Backend::kReadsValues) {
    float32_linear_cpu({.x = data(x),
                        .weight = data<float>(weight),
                        .logits = mutable_data<float>(logits),
                        .num_tokens = tokens,
                        .num_experts = experts,
                        .hidden_size = hidden,
                        .dtype = dtype});
  } else {
    const OneGroup one(backend, tokens);
    const Tensor rows = converted(x, ScalarType::Float);
    const GroupedMatmulParams params{.groups = one.groups,
                                     .x = data(rows),
                                     .weight = data(weight),
                                     .y = mutable_data(logits),
                                     .n = experts,
                                     .k = hidden,
                                     .dtype = DType::kFloat32};
    grouped_matmul_cuda(params, backend.scratch(grouped_matmul_cuda_workspace(params)), backend.stream());
  }
  return logits;
}

template <class Backend>
Tensor float32_linear_dx(const Tensor& d_logits_in, const Tensor& weight_in, ScalarType dx_dtype) {
  const Backend backend("d_logits", d_logits_in);
  const DType dtype = token_dtype(backend, "dtype", dx_dtype);
  const Tensor weight = checked_weight(backend, weight_in);
  const int64_t experts = weight.size(0), hidden = weight.size(1);
  const Tensor d_logits = backend.checked("d_logits", d_logits_in, ScalarType::Float, {kAnySize, experts});
  const int64_t tokens = d_logits.size(0);
  if constexpr (Backend::kReadsValues) {
    const Tensor dx = backend.empty({tokens, hidden}, dx_dtype);
    float32_linear_dx_cpu({.d_logits = data<float>(d_logits),
                           .weight = data<float>(weight),
                           .dx = mutable_data(dx),
                           .num_tokens = tokens,
                           .num_experts = experts,
                           .hidden_size = hidden,
                           .dtype = dtype});
    return dx;
  } else {
    const Tensor dx = backend.empty({tokens, hidden}, ScalarType::Float);
    const OneGroup one(backend, tokens);
    const GroupedMatmulDxParams params{.groups = one.groups,
                                       .dy = data(d_logits),
                                       .weight = data(weight),
                                       .dx = mutable_data(dx),
                                       .n = experts,
                                       .k = hidden,
                                       .dtype = DType::kFloat32};
    grouped_matmul_dx_cuda(params, backend.scratch(grouped_matmul_dx_cuda_workspace(params)), backend.stream());
    return converted(dx, dx_dtype);
  }
}

template <class Backend>
Tensor float32_linear_dw(const Tensor& d_logits_in, const Tensor& x_in, ScalarType dw_dtype) {
  const Backend backend("d_logits", d_logits_in);
  const DType dtype = token_dtype(backend, "x", x_in.scalar_type());
  token_dtype(backend, "dtype", dw_dtype);
  const Tensor x = backend.checked("x", x_in, scalar_type(dtype), {kAnySize, kAnySize});
  const int64_t tokens = x.size(0), hidden = x.size(1);
  const Tensor d_logits = backend.checked("d_logits", d_logits_in, ScalarType::Float, {tokens, kAnySize});
  const int64_t experts = d_logits.size(1);
  const Tensor dw = backend.empty({experts, hidden}, ScalarType::Float);
  if constexpr (Backend::kReadsValues) {
    float32_linear_dw_cpu({.d_logits = data<float>(d_logits),
                           .x = data(x),
                           .dw = mutable_data<float>(dw),
                           .num_tokens = tokens,
                           .num_experts = experts,
                           .hidden_size = hidden,
                           .dtype = dtype});
  } else {
    const OneGroup one(backend, tokens);
    const Tensor rows = converted(x, ScalarType::Float);
    const GroupedMatmulDwParams params{.groups = one.groups,
                                       .dy = data(d_logits),
                                       .x = data(rows),
                                       .dw = mutable_data(dw),
                                       .n = experts,
                                       .k = hidden,
                                       .dtype = DType::kFloat32};
    grouped_matmul_dw_cuda(params, {}, backend.stream());
  }
  return converted(dw, dw_dtype);
}

template <class Backend>
void bind(torch::stable::detail::StableLibrary& m) {
  m.impl("float32_linear", TORCH_BOX(&Operator<&float32_linear<Backend>>::call));
  m.impl("float32_linear_dx", TORCH_BOX(&Operator<&float32_linear_dx<Backend>>::call));
  m.impl("float32_linear_dw", TORCH_BOX(&Operator<&float32_linear_dw<Backend>>::call));
}

}  // namespace
}  // namespace dynamic_moe::bindings

STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CPU, m) { dynamic_moe::bindings::bind<dynamic_moe::bindings::Cpu>(m); }
#ifdef DYNAMIC_MOE_CUDA_TOOLKIT
STABLE_TORCH_LIBRARY_IMPL(dynamic_moe, CUDA, m) { dynamic_moe::bindings::bind<dynamic_moe::bindings::Cuda>(m); }
#endif
