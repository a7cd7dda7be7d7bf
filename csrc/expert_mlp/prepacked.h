// SPDX-License-Identifier: Apache-2.0
// The expert pass of inference, on weights that were packed beforehand, and the packing. The loops are those of
// passes.h; what differs is that tasks are cut where the packed panels begin. Included only by *_cpu_<level>.cpp.
#pragma once

#include "expert_mlp/passes.h"
#include "grouped_matmul/packed_panels.h"

namespace dynamic_moe {
namespace {

// Where an expert's panels lie: gate and up, then down.
template <class C, class Byte>
class PackedExperts {
 public:
  using Word = std::conditional_t<std::is_const_v<Byte>, const typename C::Word, typename C::Word>;

  PackedExperts(Byte* experts, int64_t hidden_size, int64_t intermediate_size)
      : data_(reinterpret_cast<Word*>(experts)),
        h_(hidden_size),
        i_(intermediate_size),
        gate_up_words_(2 * packed_words<C>(i_, h_)),
        expert_words_(gate_up_words_ + packed_words<C>(h_, i_)) {}

  GateUpPanels<C, Word> gate_up(int64_t e) const { return {data_ + e * expert_words_, C::words(h_), i_}; }
  MatrixPanels<C, Word> down(int64_t e) const { return {data_ + e * expert_words_ + gate_up_words_, C::words(i_)}; }

 private:
  Word* data_;
  int64_t h_, i_, gate_up_words_, expert_words_;
};

template <class C>
void prepack_experts(const PrepackExpertsParams& p, void* experts) {
  using T = typename C::T;
  const int64_t h = p.hidden_size, i = p.intermediate_size;
  const PackedExperts<C, char> packed(static_cast<char*>(experts), h, i);
  const PackedColumns<C> gate(i), down(h);
  const int64_t tasks = 2 * gate.count() + down.count();
  parallel_tasks(p.num_experts * tasks, [&](int64_t index) {
    const int64_t e = index / tasks;
    int64_t panel = index % tasks;
    if (panel < 2 * gate.count()) {
      const bool is_up = panel >= gate.count();
      if (is_up) panel -= gate.count();
      const int columns = static_cast<int>(gate.column(panel + 1) - gate.column(panel));
      const MatrixRows<C> matrix{static_cast<const T*>(p.gate_up_proj) + e * 2 * i * h, h};
      return pack_panel<C>(matrix, gate.column(panel) + (is_up ? i : 0), columns, h, packed.gate_up(e));
    }
    panel -= 2 * gate.count();
    const int columns = static_cast<int>(down.column(panel + 1) - down.column(panel));
    const MatrixRows<C> matrix{static_cast<const T*>(p.down_proj) + e * h * i, i};
    pack_panel<C>(matrix, down.column(panel), columns, i, packed.down(e));
  });
}

// The first expert in [e, e1) that has a row, or e1.
inline int64_t next_live(const RowGroups& groups, int64_t e, int64_t e1) {
  while (e < e1 && rows_of(groups, e) == 0) ++e;
  return e;
}

// activation[row - first chunk row] = silu(g) u for the chunk's experts.
template <class C>
void up_projection_prepacked(const ExpertMlpPrepackedParams& p, const PackedExperts<C, const char>& packed, int64_t e0,
                             int64_t e1, typename C::T* activation) {
  using T = typename C::T;
  const auto* x = static_cast<const T*>(p.x);
  const int64_t h = p.hidden_size, i = p.intermediate_size;
  const int64_t chunk_row = p.groups.expert_offsets[e0];
  const PackedColumns<C> cut(i);
  const int64_t pairs = divide_up(column_panels_at_once<C>(h, 2 * i, e1 - e0), 2);
  const int64_t tasks = divide_up(cut.count(), pairs), all_tasks = (e1 - e0) * tasks, ahead = num_threads();
  const auto gate_panels = [&](int64_t task) {
    return cut.panels(task * pairs, smaller((task + 1) * pairs, cut.count()));
  };
  parallel_tasks(all_tasks, [&](int64_t index) {
    const int64_t e = e0 + index / tasks;
    const int64_t first_row = p.groups.expert_offsets[e];
    if (rows_of(p.groups, e) == 0) return;
    const Panels<C> gate = gate_panels(index % tasks);
    multiply_block<C>(
        rows_of(p.groups, e), gate_and_up(gate, i), h,
        [&](int64_t r) { return x + token_of_row(p.groups, first_row + r) * h; }, packed.gate_up(e),
        [&]() -> Upcoming<C, GateUpPanels<C>> {
          const int64_t next = index + ahead, expert = e0 + next / tasks;
          if (next >= all_tasks || rows_of(p.groups, expert) == 0) return {{}, packed.gate_up(e)};
          return {gate_and_up(gate_panels(next % tasks), i), packed.gate_up(expert)};
        },
        [&](int64_t r, int count, const float* sums, int64_t pitch) {
          T* out = activation + (first_row - chunk_row + r) * i + gate.column[0];
          for (int row = 0; row < count; ++row, sums += pitch, out += i) {
            store_activation<C>(gate, sums, out, nullptr, i, false);
          }
        });
  });
}

// total[token][n] += weight * (W2_e a)[n] for the chunk's experts and the columns n of one panel.
template <class C>
void down_projection_prepacked(const ExpertMlpPrepackedParams& p, const PackedExperts<C, const char>& packed,
                               int64_t e0, int64_t e1, const Panels<C>& panel, const typename C::T* activation,
                               float* total) {
  const int64_t h = p.hidden_size, i = p.intermediate_size;
  const int64_t chunk_row = p.groups.expert_offsets[e0];
  for (int64_t e = next_live(p.groups, e0, e1), after = e1; e < e1; e = after) {
    after = next_live(p.groups, e + 1, e1);
    const int64_t first_row = p.groups.expert_offsets[e];
    multiply_block<C>(
        rows_of(p.groups, e), panel, i, [&](int64_t r) { return activation + (first_row - chunk_row + r) * i; },
        packed.down(e),
        [&]() -> Upcoming<C, MatrixPanels<C>> {
          if (after == e1) return {{}, packed.down(e)};
          return {panel, packed.down(after)};
        },
        [&](int64_t r, int count, const float* sums, int64_t pitch) {
          for (int64_t row = first_row + r; row < first_row + r + count; ++row, sums += pitch) {
            add_to_token<C>(panel, sums, weight_of_row(p.row_slot, p.expert_weights, row),
                            total + token_of_row(p.groups, row) * h + panel.column[0]);
          }
        });
  }
}

template <class C>
void expert_mlp_prepacked(const ExpertMlpPrepackedParams& p, const void* panels) {
  using T = typename C::T;
  const int64_t h = p.hidden_size, i = p.intermediate_size, experts = p.groups.num_experts;
  const PackedExperts<C, const char> packed(static_cast<const char*>(panels), h, i);
  const PackedColumns<C> cut(h);
  float* const total = accumulator<C>(static_cast<T*>(p.y), p.groups.num_tokens * h);
  for (int64_t e0 = 0, e1 = 0; e0 < experts; e0 = e1) {
    e1 = chunk_end(p.groups, e0, i * static_cast<int64_t>(sizeof(T)));
    T* const activation =
        scratch<T>(Scratch::kActivation, (p.groups.expert_offsets[e1] - p.groups.expert_offsets[e0]) * i);
    up_projection_prepacked<C>(p, packed, e0, e1, activation);
    parallel_tasks(cut.count(), [&](int64_t share) {
      const int64_t begin = cut.column(share), end = cut.column(share + 1);
      if (e0 == 0) zero_columns<C>(total, p.groups.num_tokens, h, begin, end);
      down_projection_prepacked<C>(p, packed, e0, e1, cut.panels(share, share + 1), activation, total);
      if constexpr (!std::is_same_v<T, float>) {
        if (e1 == experts) convert_columns<C>(total, static_cast<T*>(p.y), p.groups.num_tokens, h, begin, end);
      }
    });
  }
}

}  // namespace
}  // namespace dynamic_moe
