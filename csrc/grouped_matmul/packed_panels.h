// SPDX-License-Identifier: Apache-2.0
// Matrices whose panels lie in memory for good, packed beforehand (inference: the weights do not change).
// multiply_block takes them like any other matrix, only that packing is nothing but finding the address. Reading such a
// panel is one linear stream, so few rows take the same tile as many. Included only by *_cpu_<level>.cpp.
#pragma once

#include "grouped_matmul/products.h"

namespace dynamic_moe {
namespace {

// The columns of a matrix, cut once and for all into panels of equal width up to a vector. The panels follow one
// another in memory, each with its whole inner dimension, [words][vectors * lanes]; so the panel of column n begins
// inner_words * n words behind the first.
template <class C>
class PackedColumns {
 public:
  explicit PackedColumns(int64_t columns)
      : columns_(columns), vectors_(divide_up(columns, C::kLanes)), count_(divide_up(vectors_, C::kVectors)) {}

  int64_t count() const { return count_; }
  int64_t column(int64_t panel) const {
    return count_ == 0 ? 0 : smaller(vectors_ * panel / count_ * C::kLanes, columns_);
  }
  // Panels [first, end) of all, at most kMostPanels.
  Panels<C> panels(int64_t first, int64_t end) const {
    Panels<C> panels;
    panels.count = static_cast<int>(end - first);
    for (int p = 0; p <= panels.count; ++p) {
      panels.start[p] = static_cast<int>(column(first + p) - column(first));
      if (p < panels.count) panels.column[p] = column(first + p);
    }
    return panels;
  }

 private:
  int64_t columns_, vectors_, count_;
};

template <class C>
constexpr int64_t padded_columns(int64_t columns) {
  return divide_up(columns, C::kLanes) * C::kLanes;
}

// Words of the packed matrix.
template <class C>
constexpr int64_t packed_words(int64_t columns, int64_t inner) {
  return divide_up(inner, C::kPerWord) * padded_columns<C>(columns);
}

// One panel, from an inner element on, for the stream.
template <class C>
Region packed_region(const typename C::Word* data, int64_t columns, int64_t elements) {
  const int64_t words = C::words(elements) * divide_up(columns, C::kLanes) * C::kLanes;
  const int64_t bytes = words * static_cast<int64_t>(sizeof(typename C::Word));
  return {reinterpret_cast<const char*>(data), 1, bytes, bytes};
}

// Panels of PackedColumns, one after the other. Word is const for reading.
template <class C, class Word = const typename C::Word>
struct MatrixPanels {
  static constexpr int64_t kBlockWords = C::kPlan.block_words;
  Word* data;
  int64_t inner_words;

  // Inner elements from k on of the panel that begins at `column`.
  Word* at(int64_t column, int columns, int64_t k) const {
    return data + inner_words * column + C::words(k) * padded_columns<C>(columns);
  }
  void pack(const Panels<C>& panels, int64_t k, int64_t, typename C::Word*, int64_t, Word** panel) const {
    for (int p = 0; p < panels.count; ++p) panel[p] = at(panels.column[p], panels.columns(p), k);
  }
  Region region(int64_t column, int columns, int64_t k, int64_t elements) const {
    return packed_region<C>(at(column, columns, k), columns, elements);
  }
};

// The panels of the gate and of up in turn, so that what a task multiplies is one stretch of memory. Columns from
// intermediate_size on are those of up.
template <class C, class Word = const typename C::Word>
struct GateUpPanels {
  static constexpr int64_t kBlockWords = C::kPlan.block_words;
  Word* data;
  int64_t inner_words, intermediate_size;

  Word* at(int64_t column, int columns, int64_t k) const {
    const bool is_up = column >= intermediate_size;
    const int64_t padded = padded_columns<C>(columns), gate_column = is_up ? column - intermediate_size : column;
    return data + inner_words * (2 * gate_column + (is_up ? padded : 0)) + C::words(k) * padded;
  }
  void pack(const Panels<C>& panels, int64_t k, int64_t, typename C::Word*, int64_t, Word** panel) const {
    for (int p = 0; p < panels.count; ++p) panel[p] = at(panels.column[p], panels.columns(p), k);
  }
  Region region(int64_t column, int columns, int64_t k, int64_t elements) const {
    return packed_region<C>(at(column, columns, k), columns, elements);
  }
};

template <class C>
constexpr bool kIsPacked<MatrixPanels<C>> = true;
template <class C>
constexpr bool kIsPacked<GateUpPanels<C>> = true;

// Fills one panel, in the same blocks of the inner dimension in which multiply_block reads it.
template <class C, class Target>
void pack_panel(const MatrixRows<C>& matrix, int64_t column, int columns, int64_t inner, const Target& target) {
  const InnerBlocks<C> blocks(inner, MatrixRows<C>::kBlockWords);
  for (int64_t b = 0; b < blocks.count; ++b) {
    matrix.pack_panel(column, columns, blocks.begin(b), blocks.size(b), target.at(column, columns, blocks.begin(b)));
  }
}

}  // namespace
}  // namespace dynamic_moe
