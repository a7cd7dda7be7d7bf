// SPDX-License-Identifier: Apache-2.0
// The three products as plain loops: the float64 path (gradcheck), on every CPU level.
#pragma once

#include <vector>

#include "common/parallel.h"
#include "grouped_matmul/grouped_matmul.h"

namespace dynamic_moe::plain {

inline int64_t token_of(const RowGroups& groups, int64_t row) {
  return groups.row_token != nullptr ? groups.row_token[row] : row;
}

// sum over k of a[k] * b[k * b_stride]
template <class T>
T dot(const T* a, const T* b, int64_t count, int64_t b_stride = 1) {
  T sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += a[k] * b[k * b_stride];
  return sum;
}

// The expert of each row, so that rows can be handed to threads one by one.
inline std::vector<int32_t> experts_of_rows(const RowGroups& groups) {
  std::vector<int32_t> expert(static_cast<size_t>(groups.num_rows));
  for (int32_t e = 0; e < groups.num_experts; ++e) {
    for (int32_t row = groups.expert_offsets[e]; row < groups.expert_offsets[e + 1]; ++row) {
      expert[static_cast<size_t>(row)] = e;
    }
  }
  return expert;
}

template <class T>
void grouped_matmul(const GroupedMatmulParams& p) {
  const auto* x = static_cast<const T*>(p.x);
  const auto* weight = static_cast<const T*>(p.weight);
  auto* y = static_cast<T*>(p.y);
  const std::vector<int32_t> expert = experts_of_rows(p.groups);
  parallel_for(0, p.groups.num_rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* input = x + token_of(p.groups, row) * p.k;
      const T* matrix = weight + expert[static_cast<size_t>(row)] * p.n * p.k;
      for (int64_t n = 0; n < p.n; ++n) y[row * p.n + n] = dot(input, matrix + n * p.k, p.k);
    }
  });
}

template <class T>
void grouped_matmul_dx(const GroupedMatmulDxParams& p) {
  const auto* dy = static_cast<const T*>(p.dy);
  const auto* weight = static_cast<const T*>(p.weight);
  auto* dx = static_cast<T*>(p.dx);
  const std::vector<int32_t> expert = experts_of_rows(p.groups);
  // A thread owns columns of dx and walks the rows in order: every token's sum has one order.
  parallel_for(0, p.k, 1, [&](int64_t begin, int64_t end) {
    for (int64_t token = 0; token < p.groups.num_tokens; ++token) {
      for (int64_t k = begin; k < end; ++k) dx[token * p.k + k] = 0;
    }
    for (int64_t row = 0; row < p.groups.num_rows; ++row) {
      const T* matrix = weight + expert[static_cast<size_t>(row)] * p.n * p.k;
      T* output = dx + token_of(p.groups, row) * p.k;
      for (int64_t k = begin; k < end; ++k) output[k] += dot(dy + row * p.n, matrix + k, p.n, p.k);
    }
  });
}

template <class T>
void grouped_matmul_dw(const GroupedMatmulDwParams& p) {
  const auto* dy = static_cast<const T*>(p.dy);
  const auto* x = static_cast<const T*>(p.x);
  auto* dw = static_cast<T*>(p.dw);
  parallel_for(0, p.groups.num_experts * p.n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t e = index / p.n;
      const int64_t n = index % p.n;
      T* output = dw + index * p.k;
      for (int64_t k = 0; k < p.k; ++k) output[k] = 0;
      for (int64_t row = p.groups.expert_offsets[e]; row < p.groups.expert_offsets[e + 1]; ++row) {
        const T* input = x + token_of(p.groups, row) * p.k;
        const T scale = dy[row * p.n + n];
        for (int64_t k = 0; k < p.k; ++k) output[k] += scale * input[k];
      }
    }
  });
}

}  // namespace dynamic_moe::plain
