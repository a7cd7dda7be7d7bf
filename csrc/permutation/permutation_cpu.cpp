// SPDX-License-Identifier: Apache-2.0
#include "permutation/permutation.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "common/half.h"
#include "common/parallel.h"

namespace dynamic_moe {
namespace {

inline double to_float(double value) { return value; }
using dynamic_moe::to_float;

template <class Out, class Real>
Out from_real(Real value) {
  if constexpr (std::is_same_v<Out, double>) {
    return value;
  } else {
    return from_float<Out>(value);
  }
}

bool is_live(int32_t id, int32_t num_experts) { return static_cast<uint32_t>(id) < static_cast<uint32_t>(num_experts); }

template <class T, class Real>
void combine(const CombineParams& p) {
  const int64_t H = p.hidden_size, K = p.max_experts;
  parallel_for(0, p.num_tokens, 16, [&](int64_t first, int64_t last) {
    std::vector<Real> sum(H);
    for (int64_t t = first; t < last; ++t) {
      std::fill(sum.begin(), sum.end(), Real(0));
      for (int64_t slot = t * K; slot < (t + 1) * K; ++slot) {
        if (p.slot_row[slot] < 0) continue;
        const T* row = static_cast<const T*>(p.rows) + p.slot_row[slot] * H;
        const Real weight = p.weights ? static_cast<const Real*>(p.weights)[slot] : Real(1);
        for (int64_t h = 0; h < H; ++h) sum[h] += weight * to_float(row[h]);
      }
      for (int64_t h = 0; h < H; ++h) static_cast<T*>(p.y)[t * H + h] = from_real<T>(sum[h]);
    }
  });
}

template <class T, class Real>
void combine_backward(const CombineBackwardParams& p) {
  const int64_t H = p.hidden_size, K = p.max_experts;
  parallel_for(0, p.num_tokens, 16, [&](int64_t first, int64_t last) {
    for (int64_t slot = first * K; slot < last * K; ++slot) {
      const int64_t r = p.slot_row[slot];
      if (r < 0) {
        if (p.d_weights) static_cast<Real*>(p.d_weights)[slot] = 0;
        continue;
      }
      const T* dy = static_cast<const T*>(p.dy) + slot / K * H;
      if (p.d_rows) {
        const Real weight = p.weights ? static_cast<const Real*>(p.weights)[slot] : Real(1);
        for (int64_t h = 0; h < H; ++h) static_cast<T*>(p.d_rows)[r * H + h] = from_real<T>(weight * to_float(dy[h]));
      }
      if (p.d_weights) {
        Real dot = 0;
        for (int64_t h = 0; h < H; ++h) dot += to_float(dy[h]) * to_float(static_cast<const T*>(p.rows)[r * H + h]);
        static_cast<Real*>(p.d_weights)[slot] = dot;
      }
    }
  });
}

}  // namespace

void count_rows_cpu(const int32_t* expert_ids, int64_t num_slots, int32_t num_experts, int32_t* tokens_per_expert,
                    int32_t* expert_offsets) {
  std::fill_n(tokens_per_expert, num_experts, 0);
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    if (is_live(expert_ids[slot], num_experts)) ++tokens_per_expert[expert_ids[slot]];
  }
  expert_offsets[0] = 0;
  for (int32_t e = 0; e < num_experts; ++e) expert_offsets[e + 1] = expert_offsets[e] + tokens_per_expert[e];
}

void permute_cpu(const PermuteParams& p) {
  std::vector<int32_t> next(p.expert_offsets, p.expert_offsets + p.num_experts);
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int32_t k = 0; k < p.max_experts; ++k) {
      const int64_t slot = t * p.max_experts + k;
      const int32_t id = p.expert_ids[slot];
      p.slot_row[slot] = is_live(id, p.num_experts) ? next[id] : -1;
      if (!is_live(id, p.num_experts)) continue;
      p.row_token[next[id]] = static_cast<int32_t>(t);
      p.row_slot[next[id]] = static_cast<int32_t>(slot);
      ++next[id];
    }
  }
}

void combine_cpu(const CombineParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return combine<float, float>(p);
    case DType::kFloat64:
      return combine<double, double>(p);
    case DType::kBFloat16:
      return combine<BFloat16, float>(p);
    case DType::kFloat16:
      return combine<Float16, float>(p);
  }
}

void combine_backward_cpu(const CombineBackwardParams& p) {
  switch (p.dtype) {
    case DType::kFloat32:
      return combine_backward<float, float>(p);
    case DType::kFloat64:
      return combine_backward<double, double>(p);
    case DType::kBFloat16:
      return combine_backward<BFloat16, float>(p);
    case DType::kFloat16:
      return combine_backward<Float16, float>(p);
  }
}

}  // namespace dynamic_moe
