// SPDX-License-Identifier: Apache-2.0
// The expert pass composed of plain grouped products: the float64 path (gradcheck), on every CPU level.
#pragma once

#include <cmath>
#include <vector>

#include "expert_mlp/expert_mlp.h"
#include "grouped_matmul/plain.h"

namespace dynamic_moe::plain {

template <class T>
T sigmoid(T value) {
  return 1 / (1 + std::exp(-value));
}

// [R, 2I] -> silu(g) * u, [R, I], each row times its scale
template <class T>
std::vector<T> swiglu(const T* pre_activation, const std::vector<T>& row_scale, int64_t intermediate_size) {
  const int64_t width = intermediate_size;
  std::vector<T> activation(row_scale.size() * static_cast<size_t>(width));
  for (size_t row = 0; row < row_scale.size(); ++row) {
    const T* gate = pre_activation + static_cast<int64_t>(row) * 2 * width;
    for (int64_t i = 0; i < width; ++i) {
      activation[row * static_cast<size_t>(width) + static_cast<size_t>(i)] =
          row_scale[row] * gate[i] * sigmoid(gate[i]) * gate[width + i];
    }
  }
  return activation;
}

template <class T>
std::vector<T> row_scales(const RowGroups& groups, const int32_t* row_slot, const void* expert_weights) {
  std::vector<T> scale(static_cast<size_t>(groups.num_rows));
  for (size_t row = 0; row < scale.size(); ++row) scale[row] = static_cast<const T*>(expert_weights)[row_slot[row]];
  return scale;
}

template <class T>
void expert_mlp(const ExpertMlpParams& p) {
  const int64_t h = p.hidden_size, i = p.intermediate_size;
  std::vector<T> own;
  T* pre_activation = static_cast<T*>(p.pre_activation);
  if (pre_activation == nullptr) {
    own.resize(static_cast<size_t>(p.groups.num_rows * 2 * i));
    pre_activation = own.data();
  }
  grouped_matmul<T>({p.groups, p.x, p.gate_up_proj, pre_activation, 2 * i, h, p.dtype});
  const std::vector<T> scale = row_scales<T>(p.groups, p.row_slot, p.expert_weights);
  const std::vector<T> activation = swiglu(pre_activation, scale, i);
  const auto* down = static_cast<const T*>(p.down_proj);
  auto* y = static_cast<T*>(p.y);
  const std::vector<int32_t> expert = experts_of_rows(p.groups);
  parallel_for(0, h, 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = 0; token < p.groups.num_tokens; ++token) {
      for (int64_t n = begin; n < end; ++n) y[token * h + n] = 0;
    }
    for (int64_t row = 0; row < p.groups.num_rows; ++row) {
      const T* matrix = down + expert[static_cast<size_t>(row)] * h * i;
      T* output = y + token_of(p.groups, row) * h;
      for (int64_t n = begin; n < end; ++n) output[n] += dot(activation.data() + row * i, matrix + n * i, i);
    }
  });
}

template <class T>
void expert_mlp_backward(const ExpertMlpBackwardParams& p) {
  const int64_t h = p.hidden_size, i = p.intermediate_size, rows = p.groups.num_rows;
  const auto* down = static_cast<const T*>(p.down_proj);
  const auto* pre_activation = static_cast<const T*>(p.pre_activation);
  const auto* dy = static_cast<const T*>(p.dy);
  const std::vector<T> scale = row_scales<T>(p.groups, p.row_slot, p.expert_weights);
  const std::vector<int32_t> expert = experts_of_rows(p.groups);
  std::vector<T> d_pre_activation(static_cast<size_t>(rows * 2 * i));
  auto* d_weights = static_cast<T*>(p.d_expert_weights);
  if (d_weights != nullptr) {
    for (int64_t slot = 0; slot < p.num_slots; ++slot) d_weights[slot] = 0;
  }
  parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* output_gradient = dy + token_of(p.groups, row) * h;
      const T* matrix = down + expert[static_cast<size_t>(row)] * h * i;
      const T* gate = pre_activation + row * 2 * i;
      T* d_gate = d_pre_activation.data() + row * 2 * i;
      T d_scale = 0;
      for (int64_t column = 0; column < i; ++column) {
        const T d_scaled = dot(output_gradient, matrix + column, h, i);  // d(s a)
        const T s = sigmoid(gate[column]);
        const T up = gate[i + column];
        d_scale += d_scaled * gate[column] * s * up;
        const T d_activation = d_scaled * scale[static_cast<size_t>(row)];
        d_gate[column] = d_activation * up * s * (1 + gate[column] * (1 - s));
        d_gate[i + column] = d_activation * gate[column] * s;
      }
      if (d_weights != nullptr) d_weights[p.row_slot[row]] = d_scale;
    }
  });
  if (p.dx != nullptr) {
    grouped_matmul_dx<T>({p.groups, d_pre_activation.data(), p.gate_up_proj, p.dx, 2 * i, h, p.dtype});
  }
  if (p.d_gate_up_proj != nullptr) {
    grouped_matmul_dw<T>({p.groups, d_pre_activation.data(), p.x, p.d_gate_up_proj, 2 * i, h, p.dtype});
  }
  if (p.d_down_proj != nullptr) {
    const std::vector<T> activation = swiglu(pre_activation, scale, i);
    auto* d_down = static_cast<T*>(p.d_down_proj);
    parallel_for(0, p.groups.num_experts * h, 1, [&](int64_t begin, int64_t end) {
      for (int64_t index = begin; index < end; ++index) {
        const int64_t e = index / h, n = index % h;
        for (int64_t column = 0; column < i; ++column) d_down[index * i + column] = 0;
        for (int64_t row = p.groups.expert_offsets[e]; row < p.groups.expert_offsets[e + 1]; ++row) {
          const T gradient = dy[token_of(p.groups, row) * h + n];
          const T* input = activation.data() + row * i;
          for (int64_t column = 0; column < i; ++column) d_down[index * i + column] += gradient * input[column];
        }
      }
    });
  }
}

}  // namespace dynamic_moe::plain
