// SPDX-License-Identifier: Apache-2.0
#include "common/half.h"
#include "expert_mlp/plain.h"

namespace dynamic_moe {
namespace {
std::vector<double> widen(const void* data, int64_t count, DType dtype) {
  std::vector<double> out(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const auto index = static_cast<size_t>(i);
    if (dtype == DType::kFloat32) out[index] = static_cast<const float*>(data)[i];
    if (dtype == DType::kFloat64) out[index] = static_cast<const double*>(data)[i];
    if (dtype == DType::kBFloat16) out[index] = to_float(static_cast<const BFloat16*>(data)[i]);
    if (dtype == DType::kFloat16) out[index] = to_float(static_cast<const Float16*>(data)[i]);
  }
  return out;
}
void narrow(const std::vector<double>& in, void* data, DType dtype) {
  for (size_t i = 0; i < in.size(); ++i) {
    if (dtype == DType::kFloat32) static_cast<float*>(data)[i] = static_cast<float>(in[i]);
    if (dtype == DType::kFloat64) static_cast<double*>(data)[i] = in[i];
    if (dtype == DType::kBFloat16) static_cast<BFloat16*>(data)[i] = from_float<BFloat16>(static_cast<float>(in[i]));
    if (dtype == DType::kFloat16) static_cast<Float16*>(data)[i] = from_float<Float16>(static_cast<float>(in[i]));
  }
}
DType weight_dtype(DType dtype) { return dtype == DType::kFloat64 ? dtype : DType::kFloat32; }
}  // namespace

void expert_mlp_cpu(const ExpertMlpParams& p) {
  const auto& g = p.groups;
  const int64_t h = p.hidden_size, i = p.intermediate_size;
  int64_t slots = 0;
  for (int64_t r = 0; r < g.num_rows; ++r) slots = slots > p.row_slot[r] ? slots : p.row_slot[r] + 1;
  auto x = widen(p.x, g.num_tokens * h, p.dtype), up = widen(p.gate_up_proj, g.num_experts * 2 * i * h, p.dtype),
       down = widen(p.down_proj, g.num_experts * i * h, p.dtype), w = widen(p.expert_weights, slots, weight_dtype(p.dtype));
  std::vector<double> y(static_cast<size_t>(g.num_tokens * h)), pre(static_cast<size_t>(g.num_rows * 2 * i));
  plain::expert_mlp<double>({g, p.row_slot, w.data(), x.data(), up.data(), down.data(), pre.data(), y.data(), h, i, DType::kFloat64});
  narrow(y, p.y, p.dtype);
  if (p.pre_activation != nullptr) narrow(pre, p.pre_activation, p.dtype);
}

void expert_mlp_backward_cpu(const ExpertMlpBackwardParams& p) {
  const auto& g = p.groups;
  const int64_t h = p.hidden_size, i = p.intermediate_size;
  auto x = widen(p.x, g.num_tokens * h, p.dtype), up = widen(p.gate_up_proj, g.num_experts * 2 * i * h, p.dtype),
       down = widen(p.down_proj, g.num_experts * i * h, p.dtype), w = widen(p.expert_weights, p.num_slots, weight_dtype(p.dtype)),
       pre = widen(p.pre_activation, g.num_rows * 2 * i, p.dtype), dy = widen(p.dy, g.num_tokens * h, p.dtype);
  std::vector<double> dx(x.size()), dup(up.size()), ddown(down.size()), dw(w.size());
  plain::expert_mlp_backward<double>({g, p.row_slot, w.data(), x.data(), up.data(), down.data(), pre.data(), dy.data(), dx.data(),
                                      dup.data(), ddown.data(), dw.data(), p.num_slots, h, i, DType::kFloat64});
  if (p.dx != nullptr) narrow(dx, p.dx, p.dtype);
  if (p.d_gate_up_proj != nullptr) narrow(dup, p.d_gate_up_proj, p.dtype);
  if (p.d_down_proj != nullptr) narrow(ddown, p.d_down_proj, p.dtype);
  if (p.d_expert_weights != nullptr) narrow(dw, p.d_expert_weights, weight_dtype(p.dtype));
}
}  // namespace dynamic_moe
