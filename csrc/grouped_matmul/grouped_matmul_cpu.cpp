// SPDX-License-Identifier: Apache-2.0
#include "common/half.h"
#include "grouped_matmul/grouped_matmul.h"
#include "grouped_matmul/plain.h"

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
}  // namespace

void grouped_matmul_cpu(const GroupedMatmulParams& p) {
  auto x = widen(p.x, p.groups.num_tokens * p.k, p.dtype), w = widen(p.weight, p.groups.num_experts * p.n * p.k, p.dtype);
  std::vector<double> y(static_cast<size_t>(p.groups.num_rows * p.n));
  plain::grouped_matmul<double>({p.groups, x.data(), w.data(), y.data(), p.n, p.k, DType::kFloat64});
  narrow(y, p.y, p.dtype);
}
void grouped_matmul_dx_cpu(const GroupedMatmulDxParams& p) {
  auto dy = widen(p.dy, p.groups.num_rows * p.n, p.dtype), w = widen(p.weight, p.groups.num_experts * p.n * p.k, p.dtype);
  std::vector<double> dx(static_cast<size_t>(p.groups.num_tokens * p.k));
  plain::grouped_matmul_dx<double>({p.groups, dy.data(), w.data(), dx.data(), p.n, p.k, DType::kFloat64});
  narrow(dx, p.dx, p.dtype);
}
void grouped_matmul_dw_cpu(const GroupedMatmulDwParams& p) {
  auto dy = widen(p.dy, p.groups.num_rows * p.n, p.dtype), x = widen(p.x, p.groups.num_tokens * p.k, p.dtype);
  std::vector<double> dw(static_cast<size_t>(p.groups.num_experts * p.n * p.k));
  plain::grouped_matmul_dw<double>({p.groups, dy.data(), x.data(), dw.data(), p.n, p.k, DType::kFloat64});
  narrow(dw, p.dw, p.dtype);
}
}  // namespace dynamic_moe
