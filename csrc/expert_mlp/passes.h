// SPDX-License-Identifier: Apache-2.0
// The expert pass, forward and backward, on any CPU level. Experts are taken in chunks, so that the activations
// between the two projections stay small whatever the number of tokens. Included only by *_cpu_<level>.cpp.
#pragma once

#include "expert_mlp/activation.h"
#include "expert_mlp/expert_mlp.h"
#include "grouped_matmul/products.h"

namespace dynamic_moe {
namespace {

constexpr int64_t kChunkBytes = int64_t{64} << 20;  // of activations between the projections

// Experts [begin, end) whose rows together hold at most kChunkBytes, at least one expert.
inline int64_t chunk_end(const RowGroups& groups, int64_t begin, int64_t bytes_per_row) {
  int64_t end = begin + 1;
  const int64_t first = groups.expert_offsets[begin];
  while (end < groups.num_experts && (groups.expert_offsets[end + 1] - first) * bytes_per_row <= kChunkBytes) ++end;
  return end;
}

inline float weight_of_row(const int32_t* row_slot, const void* expert_weights, int64_t row) {
  return static_cast<const float*>(expert_weights)[row_slot[row]];
}

// The panels of the gate's columns, then those of up's: the same columns, I further on.
template <class C>
Panels<C> gate_and_up(const Panels<C>& gate, int64_t intermediate_size) {
  Panels<C> both = gate;
  both.count = 2 * gate.count;
  for (int p = 0; p < gate.count; ++p) {
    both.column[gate.count + p] = intermediate_size + gate.column[p];
    both.start[gate.count + p + 1] = gate.width() + gate.start[p + 1];
  }
  return both;
}

// out = silu(g) u for one row of sums of the gate's panels and, behind them, up's. Writes g and u to kept and kept + I
// unless kept is null. Both point to the column at which the first panel begins.
template <class C>
void store_activation(const Panels<C>& gate, const float* sums, typename C::T* out, typename C::T* kept,
                      int64_t intermediate_size, bool stream_kept) {
  using Simd = typename C::Simd;
  const float* up_sums = sums + gate.count * C::kColumns;
  for_each_vector<C>(gate, sums, [&](typename Simd::Floats g, int column, int width, int64_t place) {
    const typename Simd::Floats u = Simd::load(up_sums + place);
    store_some<C>(out + column, swiglu<Simd>(g, u), width);
    if (kept == nullptr) return;
    write_some<C>(kept + column, g, width, stream_kept);
    write_some<C>(kept + intermediate_size + column, u, width, stream_kept);
  });
}

// activation[row - first chunk row] = silu(g) u for the chunk's experts; writes the pre-activation where wanted.
template <class C>
void up_projection(const ExpertMlpParams& p, int64_t e0, int64_t e1, typename C::T* activation) {
  using T = typename C::T;
  const auto* x = static_cast<const T*>(p.x);
  const auto* weight = static_cast<const T*>(p.gate_up_proj);
  auto* pre_activation = static_cast<T*>(p.pre_activation);
  const int64_t h = p.hidden_size, i = p.intermediate_size;
  const int64_t chunk_row = p.groups.expert_offsets[e0];
  const int64_t pairs = divide_up(column_panels_at_once<C>(h, 2 * i, e1 - e0), 2);
  const int64_t step = pairs * C::kColumns;
  const int64_t tasks = divide_up(i, step), all_tasks = (e1 - e0) * tasks, ahead = num_threads();
  const bool stream = pre_activation != nullptr &&
                      is_streamed(pre_activation, p.groups.num_rows * 2 * i * static_cast<int64_t>(sizeof(T)), i);
  parallel_tasks(all_tasks, p.groups.num_rows * h * i, [&](int64_t index) {
    const int64_t e = e0 + index / tasks, n = index % tasks * step;
    const int64_t first_row = p.groups.expert_offsets[e];
    if (rows_of(p.groups, e) == 0) return;
    const Panels<C> gate = cut_into_panels<C>(n, i, static_cast<int>(pairs));
    multiply_block<C>(
        rows_of(p.groups, e), gate_and_up(gate, i), h,
        [&](int64_t r) { return x + token_of_row(p.groups, first_row + r) * h; },
        MatrixRows<C>{weight + e * 2 * i * h, h},
        [&]() -> Upcoming<C, MatrixRows<C>> {
          const int64_t next = index + ahead, expert = e0 + next / tasks;
          if (next >= all_tasks || rows_of(p.groups, expert) == 0) return {{}, {weight, h}};
          return {gate_and_up(cut_into_panels<C>(next % tasks * step, i, static_cast<int>(pairs)), i),
                  {weight + expert * 2 * i * h, h}};
        },
        [&](int64_t r, int count, const float* sums, int64_t pitch) {
          for (int row = 0; row < count; ++row, sums += pitch) {
            T* out = activation + (first_row - chunk_row + r + row) * i + n;
            T* kept = pre_activation == nullptr ? nullptr : pre_activation + (first_row + r + row) * 2 * i + n;
            store_activation<C>(gate, sums, out, kept, i, stream);
          }
        });
    if (stream) C::Simd::fence();
  });
}

template <class C>
void expert_mlp(const ExpertMlpParams& p) {
  using T = typename C::T;
  const auto* down = static_cast<const T*>(p.down_proj);
  const int64_t h = p.hidden_size, i = p.intermediate_size;
  float* const total = accumulator<C>(static_cast<T*>(p.y), p.groups.num_tokens * h);
  const ColumnShares<C> shares(h, panels_at_once<C>(i, MatrixRows<C>::kBlockWords));
  const int64_t experts = p.groups.num_experts;
  for (int64_t e0 = 0, e1 = 0; e0 < experts; e0 = e1) {
    e1 = chunk_end(p.groups, e0, i * static_cast<int64_t>(sizeof(T)));
    const int64_t chunk_row = p.groups.expert_offsets[e0];
    T* const activation = scratch<T>(Scratch::kActivation, (p.groups.expert_offsets[e1] - chunk_row) * i);
    up_projection<C>(p, e0, e1, activation);
    parallel_tasks(shares.count(), p.groups.num_rows * h * i, [&](int64_t share) {
      const int64_t begin = shares.begin(share), end = shares.begin(share + 1);
      if (e0 == 0) zero_columns<C>(total, p.groups.num_tokens, h, begin, end);
      accumulate_by_token<C>(
          p.groups, e0, e1, begin, end, i, [&](int64_t r) { return activation + (r - chunk_row) * i; },
          [&](int64_t e) { return MatrixRows<C>{down + e * h * i, i}; },
          [&](int64_t r) { return weight_of_row(p.row_slot, p.expert_weights, r); }, total, h);
      if constexpr (!std::is_same_v<T, float>) {
        if (e1 == experts) convert_columns<C>(total, static_cast<T*>(p.y), p.groups.num_tokens, h, begin, end);
      }
    });
  }
}

// The pre-activation of a row, columns n to n + width of 2I, where `stored` has infinite ones: those are summed again.
template <class C>
[[gnu::noinline]] typename C::Simd::Floats sum_infinite_again(const ExpertMlpBackwardParams& p, int64_t e, int64_t row,
                                                              int64_t n, typename C::Simd::Floats stored, int width) {
  using Simd = typename C::Simd;
  using T = typename C::T;
  const int64_t h = p.hidden_size;
  const T* x = static_cast<const T*>(p.x) + token_of_row(p.groups, row) * h;
  const T* weight = static_cast<const T*>(p.gate_up_proj) + (e * 2 * p.intermediate_size + n) * h;
  float values[C::kLanes];
  Simd::store(values, stored);
  for (int column = 0; column < width; ++column, weight += h) {
    if (!__builtin_isinf(values[column])) continue;
    typename Simd::Floats sum = Simd::zero();
    for (int64_t k = 0; k < h; k += C::kLanes) {
      const int count = static_cast<int>(smaller(C::kLanes, h - k));
      sum = Simd::fma(load_some<C>(x + k, count), load_some<C>(weight + k, count), sum);
    }
    values[column] = Simd::sum(sum);
  }
  return Simd::load(values);
}

// The pre-activation of a row, columns n to n + width of 2I, in the range that the forward pass had.
template <class C>
typename C::Simd::Floats load_pre_activation(const ExpertMlpBackwardParams& p, int64_t e, int64_t row, int64_t n,
                                             int width) {
  const auto* stored = static_cast<const typename C::T*>(p.pre_activation) + row * 2 * p.intermediate_size + n;
  const typename C::Simd::Floats v = load_some<C>(stored, width);
  if constexpr (kNarrowRange<typename C::T>) {
    if (C::Simd::any_infinite(v)) [[unlikely]]
      return sum_infinite_again<C>(p, e, row, n, v, width);
  }
  return v;
}

// What the backward pass of a chunk of experts keeps between its two steps; rows are relative to the chunk.
template <class C>
struct ChunkGradients {
  typename C::T* d_pre_activation;  // [rows, 2I]
  // [rows, I] s a, the operand of d_down_proj. Where the range is narrow, a / 2, and 2 s multiplies dy, in float32
  // while it is packed: s a may leave the range, and so may, by a rounding, what is a here where the forward pass
  // stored a.
  typename C::T* activation;
  float* weight_partials;  // [blocks, rows] parts of <d(s a), a>
  int64_t rows;
};

// From the sums d_scaled, the gradient of s a in the columns of `panels`, to those of the pre-activation, in one row.
template <class C>
void differentiate_row(const ExpertMlpBackwardParams& p, int64_t e, int64_t row, const Panels<C>& panels,
                       const float* sums, int64_t block, int64_t chunk_row, const ChunkGradients<C>& chunk) {
  using Simd = typename C::Simd;
  using T = typename C::T;
  const int64_t i = p.intermediate_size, n = panels.column[0], local = row - chunk_row;
  const typename Simd::Floats scale = Simd::broadcast(weight_of_row(p.row_slot, p.expert_weights, row));
  const typename Simd::Floats kept_scale = kNarrowRange<typename C::T> ? Simd::broadcast(0.5f) : scale;
  T* d_gate = chunk.d_pre_activation + local * 2 * i + n;
  T* activation = chunk.activation + local * i + n;
  typename Simd::Floats dot = Simd::zero();
  for_each_vector<C>(panels, sums, [&](typename Simd::Floats d_scaled, int column, int width, int64_t) {
    const SwigluGradient<Simd> gradient(load_pre_activation<C>(p, e, row, n + column, width),
                                        load_pre_activation<C>(p, e, row, i + n + column, width),
                                        Simd::mul(d_scaled, scale));
    dot = Simd::fma(d_scaled, gradient.activation, dot);
    store_some<C>(d_gate + column, gradient.d_gate, width);
    store_some<C>(d_gate + i + column, gradient.d_up, width);
    store_some<C>(activation + column, Simd::mul(gradient.activation, kept_scale), width);
  });
  chunk.weight_partials[block * chunk.rows + local] = Simd::sum(dot);
}

// The gradient of the activation, W2^T dy, and through SwiGLU that of the pre-activation.
template <class C>
void activation_gradient(const ExpertMlpBackwardParams& p, int64_t e0, int64_t e1, int64_t step,
                         const ChunkGradients<C>& chunk) {
  using T = typename C::T;
  const auto* dy = static_cast<const T*>(p.dy);
  const auto* down = static_cast<const T*>(p.down_proj);
  const auto* pre_activation = static_cast<const T*>(p.pre_activation);
  const int64_t h = p.hidden_size, i = p.intermediate_size;
  const int64_t chunk_row = p.groups.expert_offsets[e0];
  const int64_t tasks = divide_up(i, step), all_tasks = (e1 - e0) * tasks, ahead = num_threads();
  parallel_tasks(all_tasks, p.groups.num_rows * h * i, [&](int64_t index) {
    const int64_t e = e0 + index / tasks, block = index % tasks, n = block * step;
    const int64_t first_row = p.groups.expert_offsets[e];
    if (rows_of(p.groups, e) == 0) return;
    const int most = static_cast<int>(step / C::kColumns);
    const Panels<C> panels = cut_into_panels<C>(n, i, most);
    multiply_block<C>(
        rows_of(p.groups, e), panels, h, [&](int64_t r) { return dy + token_of_row(p.groups, first_row + r) * h; },
        MatrixColumns<C>{down + e * h * i, i},
        [&]() -> Upcoming<C, MatrixColumns<C>> {
          const int64_t next = index + ahead, expert = e0 + next / tasks;
          if (next >= all_tasks || rows_of(p.groups, expert) == 0) return {{}, {down, i}};
          return {cut_into_panels<C>(next % tasks * step, i, most), {down + expert * h * i, i}};
        },
        [&](int64_t r, int count, const float* sums, int64_t pitch) {
          for (int64_t later = r + count; later < smaller(r + 2 * count, rows_of(p.groups, e)); ++later) {
            const T* gate = pre_activation + (first_row + later) * 2 * i + n;
            bring_in<false, 2>(gate, panels.width());
            bring_in<false, 2>(gate + i, panels.width());
          }
          for (int64_t row = r; row < r + count; ++row, sums += pitch) {
            differentiate_row<C>(p, e, first_row + row, panels, sums, block, chunk_row, chunk);
          }
        });
  });
}

template <class C>
void input_gradient(const ExpertMlpBackwardParams& p, int64_t e0, int64_t e1, const ChunkGradients<C>& chunk,
                    float* total, int64_t begin, int64_t end) {
  using T = typename C::T;
  const auto* weight = static_cast<const T*>(p.gate_up_proj);
  const int64_t h = p.hidden_size, i = p.intermediate_size;
  const int64_t chunk_row = p.groups.expert_offsets[e0];
  if (e0 == 0) zero_columns<C>(total, p.groups.num_tokens, h, begin, end);
  accumulate_by_token<C>(
      p.groups, e0, e1, begin, end, 2 * i, [&](int64_t r) { return chunk.d_pre_activation + (r - chunk_row) * 2 * i; },
      [&](int64_t e) { return MatrixColumns<C>{weight + e * 2 * i * h, h}; }, [](int64_t) { return 1.0f; }, total, h);
  if constexpr (!std::is_same_v<T, float>) {
    if (e1 == p.groups.num_experts) {
      convert_columns<C>(total, static_cast<T*>(p.dx), p.groups.num_tokens, h, begin, end);
    }
  }
}

template <class C>
void expert_mlp_backward(const ExpertMlpBackwardParams& p) {
  using T = typename C::T;
  const int64_t h = p.hidden_size, i = p.intermediate_size, experts = p.groups.num_experts;
  auto* const d_gate_up = static_cast<T*>(p.d_gate_up_proj);
  auto* const d_down = static_cast<T*>(p.d_down_proj);
  auto* const d_weights = static_cast<float*>(p.d_expert_weights);
  const auto* const x = static_cast<const T*>(p.x);
  const auto* const dy = static_cast<const T*>(p.dy);
  float* const total = p.dx == nullptr ? nullptr : accumulator<C>(static_cast<T*>(p.dx), p.groups.num_tokens * h);
  const ColumnShares<C> shares(h, panels_at_once<C>(2 * i, MatrixColumns<C>::kBlockWords));
  const int64_t dx_tasks = p.dx == nullptr ? 0 : shares.count();
  const int64_t step = static_cast<int64_t>(panels_at_once<C>(h, MatrixColumns<C>::kBlockWords)) * C::kColumns;
  const int64_t blocks = divide_up(i, step);
  const bool stream_gate_up =
      d_gate_up != nullptr && is_streamed(d_gate_up, experts * 2 * i * h * static_cast<int64_t>(sizeof(T)), h);
  const bool stream_down =
      d_down != nullptr && is_streamed(d_down, experts * h * i * static_cast<int64_t>(sizeof(T)), i);
  if (d_weights != nullptr) __builtin_memset(d_weights, 0, static_cast<size_t>(p.num_slots) * sizeof(float));

  for (int64_t e0 = 0, e1 = 0; e0 < experts; e0 = e1) {
    e1 = chunk_end(p.groups, e0, 3 * i * static_cast<int64_t>(sizeof(T)));
    const int64_t chunk_row = p.groups.expert_offsets[e0], rows = p.groups.expert_offsets[e1] - chunk_row;
    const ChunkGradients<C> chunk{scratch<T>(Scratch::kGradient, rows * 2 * i),
                                  scratch<T>(Scratch::kActivation, rows * i),
                                  scratch<float>(Scratch::kPartial, rows * blocks), rows};
    activation_gradient<C>(p, e0, e1, step, chunk);
    for (int64_t row = 0; d_weights != nullptr && row < rows; ++row) {
      float sum = 0.0f;
      for (int64_t block = 0; block < blocks; ++block) sum += chunk.weight_partials[block * rows + row];
      d_weights[p.row_slot[chunk_row + row]] = sum;
    }
    const OuterTasks<C> gate_up_tasks(p.groups, e0, e1, d_gate_up == nullptr ? 0 : 2 * i);
    const OuterTasks<C> down_tasks(p.groups, e0, e1, d_down == nullptr ? 0 : h);
    parallel_tasks(dx_tasks + gate_up_tasks.count() + down_tasks.count(), experts * h * i, [&](int64_t index) {
      if (index < dx_tasks) {
        return input_gradient<C>(p, e0, e1, chunk, total, shares.begin(index), shares.begin(index + 1));
      }
      index -= dx_tasks;
      const bool is_down = index >= gate_up_tasks.count();
      const OuterTask task = is_down ? down_tasks.task(index - gate_up_tasks.count()) : gate_up_tasks.task(index);
      const int64_t first_row = p.groups.expert_offsets[task.expert], expert_rows = rows_of(p.groups, task.expert);
      const auto token_rows = [&](const T* base) { return StoredRows<T>{base, h, first_row, p.groups.row_token}; };
      if (is_down) {
        T* out = d_down + (task.expert * h + task.n) * i;
        if (expert_rows == 0) return zero_rows<C>(out, task.count, i);
        const StoredRows<T> activation{chunk.activation, i, first_row - chunk_row};
        if constexpr (kNarrowRange<typename C::T>) {
          const RowFactors weights{2.0f, static_cast<const float*>(p.expert_weights), p.row_slot + first_row};
          outer_products<C>(expert_rows, task.n, task.count, i, token_rows(dy), activation, out, i, stream_down,
                            weights);
        } else {
          outer_products<C>(expert_rows, task.n, task.count, i, token_rows(dy), activation, out, i, stream_down);
        }
      } else {
        T* out = d_gate_up + (task.expert * 2 * i + task.n) * h;
        if (expert_rows == 0) return zero_rows<C>(out, task.count, h);
        outer_products<C>(expert_rows, task.n, task.count, h,
                          StoredRows<T>{chunk.d_pre_activation, 2 * i, first_row - chunk_row}, token_rows(x), out, h,
                          stream_gate_up);
      }
    });
  }
}

}  // namespace
}  // namespace dynamic_moe
