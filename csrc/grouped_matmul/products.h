// SPDX-License-Identifier: Apache-2.0
// The loops around the register tile. Two shapes of product cover the layer, forward and backward:
//   multiply_block:   rows of one expert x panels of its matrix        (Y, dX, and both projections)
//   outer_products:   dW = sum over the rows of an expert of a b^T
// and accumulate_by_token runs the first over all experts for some columns, adding each row to its token: the columns'
// owner is the only writer, so the sum is deterministic without atomics and no row of output is ever stored.
// Included only by *_cpu_<level>.cpp.
#pragma once

#include "common/parallel.h"
#include "common/workspace.h"
#include "grouped_matmul/grouped_matmul.h"
#include "grouped_matmul/tile.h"

namespace dynamic_moe {
namespace {

constexpr int kMostFewRows = 32;    // no level's few_rows exceeds this
constexpr int64_t kRowBlock = 512;  // rows whose partial sums are kept while the inner dimension is walked

// Words between packed panels. Panels of a power of two of words would meet in the same few sets of the first-level
// cache, into which one row of storage is written at the same place of every panel.
constexpr int64_t kPanelGap = 2 * kLineWords;

// At most `most` panels of the columns [first, end), of equal width up to a vector.
template <class C>
Panels<C> cut_into_panels(int64_t first, int64_t end, int most) {
  Panels<C> panels;
  const int64_t columns = smaller(end - first, static_cast<int64_t>(most) * C::kColumns);
  const int64_t vectors = divide_up(columns, C::kLanes);
  panels.count = static_cast<int>(divide_up(vectors, C::kVectors));
  for (int p = 0; p <= panels.count; ++p) {
    panels.start[p] = static_cast<int>(smaller(vectors * p / panels.count * C::kLanes, columns));
    if (p < panels.count) panels.column[p] = first + panels.start[p];
  }
  return panels;
}

// How many panels of `elements` inner elements fit the cache together, packed in blocks of at most block_words words.
template <class C>
int panels_at_once(int64_t elements, int64_t block_words) {
  const int64_t words = smaller(C::words(elements), block_words);
  const int64_t bytes = words * C::kColumns * static_cast<int64_t>(sizeof(typename C::Word));
  const int64_t fit = bytes > 0 ? C::kPlan.panel_bytes / bytes : kMostPanels;
  return static_cast<int>(fit < 1 ? 1 : smaller(fit, kMostPanels));
}

// Panels that a task packs: as many as fit the cache, but not so many that threads would wait for work.
template <class C>
int column_panels_at_once(int64_t inner, int64_t columns, int64_t experts) {
  const int64_t fair = experts * divide_up(columns, C::kColumns) / (16 * static_cast<int64_t>(num_threads()));
  return static_cast<int>(fair < 1 ? 1 : smaller(fair, panels_at_once<C>(inner, C::kPlan.block_words)));
}

// Splits `elements` into equal blocks of at most block_words words; a block holds whole words.
template <class C>
struct InnerBlocks {
  int64_t elements, count, block;

  InnerBlocks(int64_t total, int64_t block_words) : elements(total) {
    const int64_t words = C::words(total);
    count = words > 0 ? divide_up(words, block_words) : 1;
    block = divide_up(words, count) * C::kPerWord;
  }
  int64_t begin(int64_t b) const { return smaller(b * block, elements); }
  int64_t size(int64_t b) const { return begin(b + 1) - begin(b); }
};

// The matrix of multiply_block, whose pack() gives the addresses of packed panels: in the buffer offered, panel_words
// apart, or elsewhere (packed_panels.h). Its columns are the rows of storage (y = W x) ...
template <class C>
struct MatrixRows {
  static constexpr int64_t kBlockWords = C::kPlan.block_words;
  const typename C::T* data;
  int64_t pitch;

  void pack(const Panels<C>& panels, int64_t k, int64_t elements, typename C::Word* packed, int64_t panel_words,
            const typename C::Word** panel) const {
    for (int p = 0; p < panels.count; ++p) {
      panel[p] = packed + p * panel_words;
      pack_panel(panels.column[p], panels.columns(p), k, elements, packed + p * panel_words);
    }
  }
  void pack_panel(int64_t column, int columns, int64_t k, int64_t elements, typename C::Word* panel) const {
    pack_rows_as_columns<C>(data + column * pitch + k, pitch, columns, elements, panel);
  }
  Region region(int64_t column, int64_t columns, int64_t k, int64_t elements) const {
    return {reinterpret_cast<const char*>(data + column * pitch + k), columns,
            elements * static_cast<int64_t>(sizeof(typename C::T)),
            pitch * static_cast<int64_t>(sizeof(typename C::T))};
  }
};

// ... or the columns of storage (x = W^T y).
template <class C>
struct MatrixColumns {
  static constexpr int64_t kBlockWords = C::kPlan.column_block_words;
  const typename C::T* data;
  int64_t pitch;

  void pack(const Panels<C>& panels, int64_t k, int64_t elements, typename C::Word* packed, int64_t panel_words,
            const typename C::Word** panel) const {
    typename C::Word* out[kMostPanels];
    for (int p = 0; p < panels.count; ++p) panel[p] = out[p] = packed + p * panel_words;
    pack_columns<C>([&](int64_t i) { return data + (k + i) * pitch; }, panels, elements, out);
  }
  Region region(int64_t column, int64_t columns, int64_t k, int64_t elements) const {
    return {reinterpret_cast<const char*>(data + k * pitch + column), elements,
            columns * static_cast<int64_t>(sizeof(typename C::T)), pitch * static_cast<int64_t>(sizeof(typename C::T))};
  }
};

template <class Matrix>
constexpr bool kReadsAlongRows = false;
template <class C>
constexpr bool kReadsAlongRows<MatrixRows<C>> = true;

// Whether the matrix is made of panels already (packed_panels.h).
template <class Matrix>
constexpr bool kIsPacked = false;

// What a thread will multiply after the present block.
template <class C, class Matrix>
struct Upcoming {
  Panels<C> panels;
  Matrix matrix;
};

// Adds the storage of the panels' columns, inner elements [k, k + elements), to the stream.
template <class C, class Matrix>
void add_regions(Stream& stream, const Matrix& matrix, const Panels<C>& panels, int64_t k, int64_t elements) {
  for (int p = 0, end = 0; p < panels.count; p = end) {
    end = p + 1;
    if constexpr (kIsPacked<Matrix>) {
      stream.add(matrix.region(panels.column[p], panels.columns(p), k, elements));
      continue;
    }
    for (; end < panels.count && panels.column[end] == panels.column[end - 1] + panels.columns(end - 1);) ++end;
    stream.add(matrix.region(panels.column[p], panels.start[end] - panels.start[p], k, elements));
  }
}

// multiply_block for few rows, which are not worth packing the matrix.
template <class C, class Row, class Emit>
void multiply_few_rows(int64_t rows, const Panels<C>& panels, int64_t inner, const Row& row,
                       const MatrixRows<C>& matrix, const typename C::T* after, const Emit& emit) {
  using T = typename C::T;
  const int64_t pitch = static_cast<int64_t>(panels.count) * C::kColumns;
  float* const sums = scratch<float>(Scratch::kTile, rows * pitch + kDotColumns);
  using Operands = DotOperands<C>;
  const typename Operands::RowElement* row_data[kMostFewRows];
  if constexpr (Operands::kSpread) {
    const int64_t spread_pitch = Operands::spread_pitch(inner);
    float* const space = scratch<float>(Scratch::kRows, rows * spread_pitch);
    for (int64_t r = 0; r < rows; ++r) {
      Operands::spread(row(r), inner, space + r * spread_pitch);
      row_data[r] = space + r * spread_pitch;
    }
  } else {
    for (int64_t r = 0; r < rows; ++r) row_data[r] = row(r);
  }
  const int64_t groups = divide_up(rows, Operands::kRows);
  for (int p = 0; p < panels.count; ++p) {
    const T* const first = matrix.data + panels.column[p] * matrix.pitch;
    const T* const next_panel = p + 1 < panels.count ? matrix.data + panels.column[p + 1] * matrix.pitch : after;
    const int columns = panels.columns(p);
    for (int n = 0; n < columns;) {
      // The last columns are read together with some before them, so that all tiles have one width.
      const int start = columns - n >= kDotColumns ? n : (columns >= kDotColumns ? columns - kDotColumns : 0);
      const T* const weights = first + start * matrix.pitch;
      const T* const upcoming = start + 2 * kDotColumns <= columns ? weights + kDotColumns * matrix.pitch
                                : next_panel != nullptr            ? next_panel
                                                                   : weights;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = rows * g / groups;
        const int count = static_cast<int>(rows * (g + 1) / groups - from);
        float* const out = sums + from * pitch + p * C::kColumns + start;
        if (columns >= kDotColumns) {
          // Together the passes over these weights ask for the next ones, so that memory and arithmetic overlap.
          const int64_t first_ahead = kDotColumns * g / groups;
          const int64_t ahead = groups == 1 ? Operands::kAheadAlone : kDotColumns * (g + 1) / groups - first_ahead;
          dot_function<C>(count, static_cast<int>(ahead))(inner, row_data + from, weights, matrix.pitch,
                                                          upcoming + first_ahead * matrix.pitch, out, pitch);
          continue;
        }
        for (int column = 0; column < columns; ++column) {  // narrower than a tile: repeat one column
          float repeated[Operands::kRows * kDotColumns];
          dot_function<C>(count, 0)(inner, row_data + from, weights + column * matrix.pitch, 0, nullptr, repeated,
                                    kDotColumns);
          for (int r = 0; r < count; ++r) out[r * pitch + column] = repeated[r * kDotColumns];
        }
      }
      n = start + kDotColumns;
    }
  }
  emit(0, static_cast<int>(rows), sums, pitch);
}

// rows x panels. row(r) is the storage of row r; after() gives the panels and the matrix that this thread will likely
// multiply next (no panels: unknown). emit(r, count, sums, pitch) receives `count` finished rows: panel p's columns
// start at sums + p * C::kColumns.
template <class C, class Row, class Matrix, class After, class Emit>
void multiply_block(int64_t rows, const Panels<C>& panels, int64_t inner, const Row& row, const Matrix& matrix,
                    const After& after, const Emit& emit) {
  if constexpr (kReadsAlongRows<Matrix>) {
    if (rows <= C::kPlan.few_rows) {
      const Upcoming<C, Matrix> next = after();
      const typename C::T* start =
          next.panels.count > 0 ? next.matrix.data + next.panels.column[0] * next.matrix.pitch : nullptr;
      return multiply_few_rows<C>(rows, panels, inner, row, matrix, start, emit);
    }
  }
  using Word = typename C::Word;
  const InnerBlocks<C> blocks(inner, Matrix::kBlockWords);
  const int64_t pitch = static_cast<int64_t>(panels.count) * C::kColumns;
  const int64_t panel_words =
      kIsPacked<Matrix> ? 0 : divide_up(C::words(blocks.block), C::kLanes) * C::kLanes * C::kColumns + kPanelGap;
  Word* const packed = kIsPacked<Matrix> ? nullptr : scratch<Word>(Scratch::kPanel, panel_words * panels.count);
  const Word* panel[kMostPanels];
  Word* const space =
      C::kInPlace && inner % C::kPerWord == 0 ? nullptr : scratch<Word>(Scratch::kRows, broadcast_space_words<C>());
  const int64_t row_block = blocks.count > 1 ? kRowBlock : rows;
  float* const sums = scratch<float>(Scratch::kTile, (blocks.count > 1 ? kRowBlock + C::kRows : C::kRows) * pitch);

  for (int64_t first_row = 0; first_row < rows; first_row += row_block) {
    const int64_t block_rows = smaller(row_block, rows - first_row);
    const int64_t groups = divide_up(block_rows, C::kRows);
    for (int64_t b = 0; b < blocks.count; ++b) {
      const bool last = b + 1 == blocks.count;
      const int64_t words = C::words(blocks.size(b));
      matrix.pack(panels, blocks.begin(b), blocks.size(b), packed, panel_words, panel);
      Stream stream;
      if (kIsPacked<Matrix> && asks_ahead<C>(rows)) {
        // The tile reads memory, and asks for it itself.
      } else if (!last) {
        add_regions<C>(stream, matrix, panels, blocks.begin(b + 1), blocks.size(b + 1));
      } else if (first_row + row_block < rows) {
        add_regions<C>(stream, matrix, panels, 0, blocks.size(0));
      } else {
        const Upcoming<C, Matrix> next = after();
        add_regions<C>(stream, next.matrix, next.panels, 0, blocks.size(0));
      }
      stream.start(groups * panels.count * divide_up(words, kLineWords));
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t from = block_rows * g / groups;
        const int count = static_cast<int>(block_rows * (g + 1) / groups - from);
        RowsInPlace<C> broadcast = broadcast_rows<C>([&](int r) { return row(first_row + from + r); }, count,
                                                     blocks.begin(b), blocks.size(b), space);
        broadcast.stream = &stream;
        if (space == nullptr && g + 1 < groups) {
          const int64_t upcoming = block_rows * (g + 1) / groups;
          const int64_t most = block_rows * (g + 2) / groups - upcoming;
          for (int r = 0; r < C::kRows; ++r) {
            broadcast.next[r] =
                reinterpret_cast<const Word*>(row(first_row + upcoming + smaller(r, most - 1)) + blocks.begin(b));
          }
        }
        float* const c = blocks.count > 1 ? sums + from * pitch : sums;
        for (int p = 0; p < panels.count; ++p) {
          if (p == 1) broadcast.next[0] = nullptr;
          tile_function<C, RowsInPlace<C>>(count, panels.vectors(p))(words, broadcast, panel[p], c + p * C::kColumns,
                                                                     pitch, b > 0);
        }
        if (last) emit(first_row + from, count, c, pitch);
      }
    }
  }
}

// Calls body(v, column, count, place) for each vector of a row of emitted sums: `count` columns from `column` on,
// counted from the first panel's first; `place` is where in the row of sums they lie.
template <class C, class Body>
void for_each_vector(const Panels<C>& panels, const float* sums, const Body& body) {
  for (int p = 0; p < panels.count; ++p) {
    for (int n = 0; n < panels.columns(p); n += C::kLanes) {
      const int count = static_cast<int>(smaller(C::kLanes, panels.columns(p) - n));
      const int64_t place = static_cast<int64_t>(p) * C::kColumns + n;
      body(C::Simd::load(sums + place), panels.start[p] + n, count, place);
    }
  }
}

template <class C, class T>
typename C::Simd::Floats load_some(const T* p, int count) {
  return count == C::kLanes ? C::Simd::load(p) : C::Simd::load_first(p, count);
}

template <class C, class T>
void store_some(T* p, typename C::Simd::Floats v, int count) {
  if (count == C::kLanes) {
    C::Simd::store(p, v);
  } else {
    C::Simd::store_first(p, v, count);
  }
}

// Whether a result of so many bytes is written around the cache: it is too large to stay there, and reading it first,
// as an ordinary store does, would cost as much again. Its rows, from `out` on, must be whole lines.
template <class T>
bool is_streamed(const T* out, int64_t bytes, int64_t row_elements) {
  constexpr int64_t kStreamedBytes = int64_t{32} << 20;
  return bytes >= kStreamedBytes && row_elements * static_cast<int64_t>(sizeof(T)) % kLineBytes == 0 &&
         reinterpret_cast<uintptr_t>(out) % kLineBytes == 0;
}

// store_some(), around the cache where `stream`.
template <class C, class T>
void write_some(T* p, typename C::Simd::Floats v, int count, bool stream) {
  if (stream && count == C::kLanes) {
    C::Simd::stream(p, v);
  } else {
    store_some<C>(p, v, count);
  }
}

// out[n] += factor * sum for one row of emitted sums; out is the column at which the first panel begins.
template <class C>
void add_to_token(const Panels<C>& panels, const float* sums, float factor, float* out) {
  using Simd = typename C::Simd;
  const typename Simd::Floats factors = Simd::broadcast(factor);
  for_each_vector<C>(panels, sums, [&](typename Simd::Floats v, int column, int columns, int64_t) {
    store_some<C>(out + column, Simd::fma(v, factors, load_some<C>(out + column, columns)), columns);
  });
}

// ---- products over the groups -------------------------------------------------------------------------------------

inline int64_t token_of_row(const RowGroups& groups, int64_t row) {
  return groups.row_token != nullptr ? groups.row_token[row] : row;
}

inline int64_t rows_of(const RowGroups& groups, int64_t expert) {
  return groups.expert_offsets[expert + 1] - groups.expert_offsets[expert];
}

// Columns [0, width) cut for the threads into equal shares, up to a vector, of at most `panels` panels; as many shares
// for each thread. The cut changes no sum.
template <class C>
class ColumnShares {
 public:
  ColumnShares(int64_t width, int64_t panels) : width_(width), vectors_(divide_up(width, C::kLanes)) {
    const int64_t threads = num_threads();
    count_ = smaller(divide_up(divide_up(vectors_, panels * C::kVectors), threads) * threads, vectors_);
  }
  int64_t count() const { return count_; }
  int64_t begin(int64_t share) const { return smaller(vectors_ * share / count_ * C::kLanes, width_); }

 private:
  int64_t width_, vectors_, count_;
};

// total[token][n] += scale(row) * (row(r) x matrix_e)[n] for the columns [begin, end) and the experts [e0, e1).
// source(e): a MatrixRows or MatrixColumns of expert e's matrix.
template <class C, class Row, class Source, class Scale>
void accumulate_by_token(const RowGroups& groups, int64_t e0, int64_t e1, int64_t begin, int64_t end, int64_t inner,
                         const Row& row, const Source& source, const Scale& scale, float* total, int64_t total_pitch) {
  const int most = panels_at_once<C>(inner, decltype(source(e0))::kBlockWords);
  for (int64_t e = e0; e < e1; ++e) {
    const int64_t first_row = groups.expert_offsets[e];
    const auto matrix = source(e);
    if (rows_of(groups, e) == 0) continue;
    for (int64_t n = begin; n < end;) {
      const Panels<C> panels = cut_into_panels<C>(n, end, most);
      multiply_block<C>(
          rows_of(groups, e), panels, inner, [&](int64_t r) { return row(first_row + r); }, matrix,
          [&]() -> Upcoming<C, decltype(source(e))> {
            if (n + panels.width() < end) return {cut_into_panels<C>(n + panels.width(), end, most), matrix};
            if (e + 1 < e1) return {cut_into_panels<C>(begin, end, most), source(e + 1)};
            return {{}, matrix};
          },
          [&](int64_t r, int count, const float* sums, int64_t pitch) {
            // Tokens are scattered, so the processor cannot guess where the next ones' sums lie.
            for (int64_t i = r + count; i < smaller(r + 2 * count, rows_of(groups, e)); ++i) {
              bring_in<true, 2>(total + token_of_row(groups, first_row + i) * total_pitch + n, panels.width());
            }
            for (int i = 0; i < count; ++i) {
              add_to_token<C>(panels, sums + i * pitch, scale(first_row + r + i),
                              total + token_of_row(groups, first_row + r + i) * total_pitch + n);
            }
          });
      n += panels.width();
    }
  }
}

template <class C>
void zero_columns(float* total, int64_t rows, int64_t pitch, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < rows; ++r) {
    __builtin_memset(total + r * pitch + begin, 0, static_cast<size_t>(end - begin) * sizeof(float));
  }
}

template <class C>
void convert_columns(const float* total, typename C::T* out, int64_t rows, int64_t pitch, int64_t begin, int64_t end) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t n = begin; n < end; n += C::kLanes) {
      const int count = static_cast<int>(smaller(C::kLanes, end - n));
      store_some<C>(out + r * pitch + n, load_some<C>(total + r * pitch + n, count), count);
    }
  }
}

// The float32 sums of an output of type T: the output itself where it is float32, else a buffer of the calling thread.
template <class C>
float* accumulator(typename C::T* out, int64_t count) {
  if constexpr (std::is_same_v<typename C::T, float>) {
    return out;
  } else {
    return scratch<float>(Scratch::kAccumulator, count);
  }
}

// Rows of storage: row r is row first + r, or row index[first + r] where there is an index.
template <class T>
struct StoredRows {
  const T* data;
  int64_t pitch;
  int64_t first;
  const int32_t* index = nullptr;

  const T* operator()(int64_t r) const { return data + (index != nullptr ? index[first + r] : first + r) * pitch; }
  // `count` elements from `column` on of the rows from r on, for the stream.
  Region region(int64_t r, int64_t rows, int64_t column, int64_t count) const {
    const int64_t bytes = pitch * static_cast<int64_t>(sizeof(T));
    const char* const base = reinterpret_cast<const char*>(data + column);
    return {index != nullptr ? base : base + (first + r) * bytes, rows, count * static_cast<int64_t>(sizeof(T)), bytes,
            index != nullptr ? index + first + r : nullptr};
  }
};

// out[n][h] = sum over r < rows of factor_r * a(r)[first_n + n] * b(r)[h], for n < n_count and h < width.
template <class C, class Factors = Unscaled>
void outer_products(int64_t rows, int64_t first_n, int n_count, int64_t width, const StoredRows<typename C::T>& a,
                    const StoredRows<typename C::T>& b, typename C::T* out, int64_t pitch, bool stream_out,
                    const Factors& factors = {}) {
  using Word = typename C::Word;
  constexpr int64_t kBlockWords = C::kPlan.column_block_words;
  const InnerBlocks<C> blocks(rows, kBlockWords);
  const int most = panels_at_once<C>(rows, kBlockWords);
  const int64_t block_words = C::words(blocks.block);
  const int64_t a_words = block_words * divide_up(n_count, C::kRows) * C::kRows;
  const int64_t panel_words = block_words * C::kColumns + kPanelGap;
  const int64_t sums_pitch = static_cast<int64_t>(cut_into_panels<C>(0, width, most).count) * C::kColumns;
  Word* const a_packed = scratch<Word>(Scratch::kRows, a_words * blocks.count);
  Word* const b_packed = scratch<Word>(Scratch::kPanel, panel_words * most);
  Word* panel[kMostPanels];
  for (int p = 0; p < most; ++p) panel[p] = b_packed + p * panel_words;
  const int64_t kept_rows = blocks.count > 1 ? divide_up(n_count, C::kRows) * C::kRows : C::kRows;
  float* const sums = scratch<float>(Scratch::kTile, kept_rows * sums_pitch);
  for (int64_t h = 0; h < width;) {
    const Panels<C> panels = cut_into_panels<C>(h, width, most);
    const int64_t next_h = h + panels.width(), next_width = smaller(width - next_h, most * int64_t{C::kColumns});
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t k = blocks.begin(block), elements = blocks.size(block), words = C::words(elements);
      if (h == 0) {
        pack_broadcast_columns<C>([&](int64_t r) { return a(k + r) + first_n; }, n_count, elements,
                                  a_packed + a_words * block, factors.from(k));
      }
      pack_columns<C>([&](int64_t r) { return b(k + r); }, panels, elements, panel);
      Stream stream;
      if (block + 1 < blocks.count) {
        const int64_t next = blocks.begin(block + 1), size = blocks.size(block + 1);
        if (h == 0) stream.add(a.region(next, size, first_n, n_count));
        stream.add(b.region(next, size, h, panels.width()));
      } else if (next_width > 0) {
        stream.add(b.region(0, blocks.size(0), next_h, next_width));
      }
      stream.start(divide_up(n_count, C::kRows) * panels.count * divide_up(words, kLineWords));
      for (int n = 0; n < n_count; n += C::kRows) {
        const RowsPacked<C> packed{a_packed + a_words * block + n * words, &stream};
        float* const c = blocks.count > 1 ? sums + n * sums_pitch : sums;
        for (int p = 0; p < panels.count; ++p) {
          tile_function<C, RowsPacked<C>>(C::kRows, panels.vectors(p))(words, packed, panel[p], c + p * C::kColumns,
                                                                       sums_pitch, block > 0);
        }
        if (block + 1 < blocks.count) continue;
        for (int i = 0; i < C::kRows && n + i < n_count; ++i) {
          typename C::T* const target = out + (n + i) * pitch + h;
          for_each_vector<C>(panels, c + i * sums_pitch,
                             [&](typename C::Simd::Floats v, int column, int count, int64_t) {
                               write_some<C>(target + column, v, count, stream_out);
                             });
        }
      }
    }
    h = next_h;
  }
  if (stream_out) C::Simd::fence();
}

// Rows of dW that a task computes: as many as keep the packed side in the second-level cache, and no more than a block
// of the other side has rows, so that the kept sums stay there too.
template <class C>
int outer_rows(int64_t rows) {
  constexpr int64_t kMost = smaller(C::kPlan.column_block_words, 256);
  const int64_t words = C::words(rows) > 0 ? C::words(rows) : 1;
  const int64_t fit = C::kPlan.panel_bytes / (words * static_cast<int64_t>(sizeof(typename C::Word)));
  const int64_t bounded = fit < 64 ? 64 : smaller(fit, kMost);
  return static_cast<int>(bounded / C::kRows * C::kRows);
}

// The tasks of dW for all experts: task t is rows [n, n + count) of expert e.
struct OuterTask {
  int64_t expert, n;
  int count;
};

template <class C>
class OuterTasks {
 public:
  OuterTasks(const RowGroups& groups, int64_t e0, int64_t e1, int64_t n) : groups_(groups), e0_(e0), e1_(e1), n_(n) {
    for (int64_t e = e0; e < e1; ++e) count_ += divide_up(n, outer_rows<C>(rows_of(groups, e)));
  }
  int64_t count() const { return count_; }
  OuterTask task(int64_t index) const {
    for (int64_t e = e0_; e < e1_; ++e) {
      const int step = outer_rows<C>(rows_of(groups_, e));
      const int64_t tasks = divide_up(n_, step);
      if (index < tasks) return {e, index * step, static_cast<int>(smaller(step, n_ - index * step))};
      index -= tasks;
    }
    return {e0_, 0, 0};
  }

 private:
  const RowGroups& groups_;
  int64_t e0_, e1_, n_;
  int64_t count_ = 0;
};

template <class C>
void zero_rows(typename C::T* out, int64_t rows, int64_t pitch) {
  __builtin_memset(out, 0, static_cast<size_t>(rows * pitch) * sizeof(typename C::T));
}

// ---- the three products of grouped_matmul.h -----------------------------------------------------------------------

template <class C>
void grouped_matmul(const GroupedMatmulParams& p) {
  using T = typename C::T;
  const auto* x = static_cast<const T*>(p.x);
  const auto* weight = static_cast<const T*>(p.weight);
  auto* y = static_cast<T*>(p.y);
  const int64_t step = column_panels_at_once<C>(p.k, p.n, p.groups.num_experts) * C::kColumns;
  const int64_t tasks = divide_up(p.n, step), all_tasks = p.groups.num_experts * tasks;
  const int64_t ahead = num_threads();  // tasks are handed out in order: the one that this thread will likely get next
  parallel_tasks(all_tasks, p.groups.num_rows * p.n * p.k, [&](int64_t index) {
    const int64_t e = index / tasks, n = index % tasks * step;
    const int64_t first_row = p.groups.expert_offsets[e];
    if (rows_of(p.groups, e) == 0) return;
    const auto block = [&](int64_t task) -> Upcoming<C, MatrixRows<C>> {
      const int64_t expert = task / tasks;
      if (task >= all_tasks || rows_of(p.groups, expert) == 0) return {{}, {weight, p.k}};
      return {cut_into_panels<C>(task % tasks * step, p.n, static_cast<int>(step / C::kColumns)),
              {weight + expert * p.n * p.k, p.k}};
    };
    const Upcoming<C, MatrixRows<C>> current = block(index);
    multiply_block<C>(
        rows_of(p.groups, e), current.panels, p.k,
        [&](int64_t r) { return x + token_of_row(p.groups, first_row + r) * p.k; }, current.matrix,
        [&] { return block(index + ahead); },
        [&](int64_t r, int count, const float* sums, int64_t pitch) {
          for (int i = 0; i < count; ++i) {
            T* out = y + (first_row + r + i) * p.n + n;
            for_each_vector<C>(current.panels, sums + i * pitch,
                               [&](typename C::Simd::Floats v, int column, int width, int64_t) {
                                 store_some<C>(out + column, v, width);
                               });
          }
        });
  });
}

template <class C>
void grouped_matmul_dx(const GroupedMatmulDxParams& p) {
  using T = typename C::T;
  const auto* dy = static_cast<const T*>(p.dy);
  const auto* weight = static_cast<const T*>(p.weight);
  auto* dx = static_cast<T*>(p.dx);
  float* const total = accumulator<C>(dx, p.groups.num_tokens * p.k);
  const ColumnShares<C> shares(p.k, panels_at_once<C>(p.n, MatrixColumns<C>::kBlockWords));
  parallel_tasks(shares.count(), p.groups.num_rows * p.n * p.k, [&](int64_t share) {
    const int64_t begin = shares.begin(share), end = shares.begin(share + 1);
    zero_columns<C>(total, p.groups.num_tokens, p.k, begin, end);
    accumulate_by_token<C>(
        p.groups, 0, p.groups.num_experts, begin, end, p.n, [&](int64_t r) { return dy + r * p.n; },
        [&](int64_t e) { return MatrixColumns<C>{weight + e * p.n * p.k, p.k}; }, [](int64_t) { return 1.0f; }, total,
        p.k);
    if constexpr (!std::is_same_v<T, float>) convert_columns<C>(total, dx, p.groups.num_tokens, p.k, begin, end);
  });
}

template <class C>
void grouped_matmul_dw(const GroupedMatmulDwParams& p) {
  using T = typename C::T;
  const auto* dy = static_cast<const T*>(p.dy);
  const auto* x = static_cast<const T*>(p.x);
  auto* dw = static_cast<T*>(p.dw);
  const OuterTasks<C> tasks(p.groups, 0, p.groups.num_experts, p.n);
  const bool stream = is_streamed(dw, p.groups.num_experts * p.n * p.k * static_cast<int64_t>(sizeof(T)), p.k);
  parallel_tasks(tasks.count(), p.groups.num_experts * p.n * p.k, [&](int64_t index) {
    const OuterTask task = tasks.task(index);
    T* out = dw + (task.expert * p.n + task.n) * p.k;
    const int64_t rows = rows_of(p.groups, task.expert), first_row = p.groups.expert_offsets[task.expert];
    if (rows == 0) return zero_rows<C>(out, task.count, p.k);
    outer_products<C>(rows, task.n, task.count, p.k, StoredRows<T>{dy, p.n, first_row},
                      StoredRows<T>{x, p.k, first_row, p.groups.row_token}, out, p.k, stream);
  });
}

}  // namespace
}  // namespace dynamic_moe
