// SPDX-License-Identifier: Apache-2.0
// The register tile and the packing around it, for any CPU level and storage type. Included only by *_cpu_<level>.cpp;
// templates over a level's own (internal) type, so nothing here can be picked by the linker for another level.
#pragma once

#include <type_traits>

#include "common/types.h"
#include "grouped_matmul/tile_plan.h"

namespace dynamic_moe {
namespace {

constexpr int64_t kLineBytes = 64;
constexpr int64_t kLineWords = 16;     // words in a cache line
constexpr int64_t kPrefetchLines = 8;  // how far ahead of itself packing asks for a row

// A tile of so few rows reads panels packed beforehand faster than memory gives them: it asks for its panel so many
// steps ahead (with vectors of 64 bytes: 8 kB). Panels packed just now lie in the cache, where asking costs nothing.
constexpr int kStreamingRows = 7;
constexpr int kStreamingSteps = 40;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// How a level computes with a storage type.
template <class SimdType, class StorageType, Isa kIsa>
struct Config {
  using Simd = SimdType;
  using T = StorageType;
  static constexpr bool kPairs = Simd::kDotsBFloat16 && std::is_same_v<T, BFloat16>;
  static constexpr TilePlan kPlan = tile_plan(kIsa, kPairs);
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int kRows = kPlan.rows;
  static constexpr int kVectors = kPlan.vectors;
  static constexpr int kColumns = kVectors * kLanes;
  static constexpr int kPerWord = kPairs ? 2 : 1;                       // elements of the inner dimension in a word
  static constexpr bool kTiles = kPairs && kIsa == Isa::kAmx;           // tile registers do the multiplying
  static constexpr bool kInPlace = kPairs || std::is_same_v<T, float>;  // a row of storage is a row of words
  using Word = std::conditional_t<kPairs, uint32_t, float>;
  using Vector = std::conditional_t<kPairs, typename Simd::Words, typename Simd::Floats>;

  static int64_t words(int64_t elements) { return divide_up(elements, kPerWord); }

  static Vector load_vector(const Word* p) {
    if constexpr (kPairs) {
      return Simd::load_words(p);
    } else {
      return Simd::load(p);
    }
  }
  static void store_vector(Word* p, Vector v) {
    if constexpr (kPairs) {
      Simd::store_words(p, v);
    } else {
      Simd::store(p, v);
    }
  }
  static Vector broadcast(const Word* p) {
    Word word;
    __builtin_memcpy(&word, p, sizeof word);
    if constexpr (kPairs) {
      return Simd::broadcast_word(word);
    } else {
      return Simd::broadcast(word);
    }
  }
  static typename Simd::Floats multiply_add(Vector a, Vector b, typename Simd::Floats sum) {
    if constexpr (kPairs) {
      return Simd::dot_pairs(sum, a, b);
    } else {
      return Simd::fma(a, b, sum);
    }
  }
};

// Whether a tile of so many rows asks for its panel itself. A full tile and tile registers have a Stream to do so.
template <class C>
constexpr bool asks_ahead(int64_t rows) {
  constexpr int kMost = C::kRows > kStreamingRows ? kStreamingRows : C::kRows - 1;
  return !C::kTiles && rows <= kMost;
}

// ---- what comes next ----------------------------------------------------------------------------------------------

// `rows` stretches of row_bytes bytes: row r lies pitch_bytes * index[r] behind the base (null: r).
struct Region {
  const char* base = nullptr;
  int64_t rows = 0, row_bytes = 0, pitch_bytes = 0;
  const int32_t* index = nullptr;

  int64_t lines() const { return rows * divide_up(row_bytes, kLineBytes); }
  const char* row(int64_t r) const { return base + (index != nullptr ? index[r] : r) * pitch_bytes; }
};

// Asks for `count` elements from p on. kLocality: 3 for the first-level cache, 2 for the second.
template <bool kToWrite, int kLocality, class T>
void bring_in(const T* p, int64_t count) {
  const char* const bytes = reinterpret_cast<const char*>(p);
  for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += kLineBytes) {
    __builtin_prefetch(bytes + i, kToWrite, kLocality);
  }
}

// Brings the memory that will be packed next into the second-level cache while the present tiles are multiplied: a few
// lines at each step of the multiplication, so that memory and arithmetic overlap.
class Stream {
 public:
  static constexpr int kMostRegions = 16;

  void add(const Region& region) {
    if (count_ < kMostRegions && region.rows > 0) regions_[count_++] = region;
  }
  // `steps`: how often step() will be called before the memory is needed.
  void start(int64_t steps) {
    int64_t lines = 0;
    for (int i = 0; i < count_; ++i) lines += regions_[i].lines();
    lines_per_step_ = steps > 0 ? divide_up(lines, steps) : 0;
  }
  void step() {
    for (int64_t i = 0; i < lines_per_step_; ++i) {
      if (current_ == count_) return;
      const Region& region = regions_[current_];
      __builtin_prefetch(region.row(row_) + byte_, 0, 2);
      byte_ += kLineBytes;
      if (byte_ < region.row_bytes) continue;
      byte_ = 0;
      if (++row_ < region.rows) continue;
      row_ = 0;
      ++current_;
    }
  }

 private:
  Region regions_[kMostRegions];
  int count_ = 0, current_ = 0;
  int64_t lines_per_step_ = 0, row_ = 0, byte_ = 0;
};

// One vector of words of a row, from storage of any type.
template <class C>
typename C::Vector load_elements(const typename C::T* p) {
  if constexpr (C::kPairs) {
    return C::Simd::load_words(p);
  } else {
    return C::Simd::load(p);
  }
}

// The same where only `count` elements, fewer than a vector, exist; the rest are zero.
template <class C>
typename C::Vector load_last_elements(const typename C::T* p, int64_t count) {
  if constexpr (C::kPairs) {
    typename C::T whole[C::kLanes * C::kPerWord] = {};
    __builtin_memcpy(whole, p, static_cast<size_t>(count) * sizeof(whole[0]));
    return C::Simd::load_words(whole);
  } else {
    return C::Simd::load_first(p, static_cast<int>(count));
  }
}

// ---- the broadcast side -------------------------------------------------------------------------------------------

// Row r of the tile lies at row[r], words contiguous. The rows are gathered, so the processor cannot guess where the
// next tile's rows lie: while this one is multiplied, those are brought in from next[r] (null: nothing to bring).
template <class C>
struct RowsInPlace {
  const typename C::Word* row[C::kRows];
  const typename C::Word* next[C::kRows];
  Stream* stream;
  const typename C::Word* at(int r, int64_t k) const { return row[r] + k; }
  void prefetch(int64_t k) const {
    stream->step();
    if (next[0] == nullptr) return;
#pragma GCC unroll 8
    for (int r = 0; r < C::kRows; ++r) __builtin_prefetch(next[r] + k, 0, 2);
  }
};

// The tile's rows are packed word by word: [words][kRows].
template <class C>
struct RowsPacked {
  const typename C::Word* data;
  Stream* stream;
  const typename C::Word* at(int r, int64_t k) const { return data + k * C::kRows + r; }
  void prefetch(int64_t) const { stream->step(); }
};

// ---- the tile -----------------------------------------------------------------------------------------------------

template <class C, class Rows, int kRows, int kVectors>
void multiply_tile_amx(int64_t words, const Rows& rows, const uint32_t* panel, float* c, int64_t c_pitch,
                       bool accumulate);  // amx_tile.h

// c[kRows][kVectors * lanes] (+)= rows x panel over `words` steps, in ascending order.
template <class C, class Rows, int kRows, int kVectors>
void multiply_tile(int64_t words, const Rows& rows, const typename C::Word* panel, float* c, int64_t c_pitch,
                   bool accumulate) {
  using Simd = typename C::Simd;
  typename Simd::Floats sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = accumulate ? Simd::load(c + r * c_pitch + v * C::kLanes) : Simd::zero();
    }
  }
  for (int64_t line = 0; line < words; line += kLineWords) {
    rows.prefetch(line);
    const int64_t end = smaller(line + kLineWords, words);
    for (int64_t k = line; k < end; ++k) {
      const typename C::Word* step = panel + k * (kVectors * C::kLanes);
      typename C::Vector b[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        b[v] = C::load_vector(step + v * C::kLanes);
        if constexpr (C::kLanes == 16) __builtin_prefetch(step + (8 * kVectors + v) * C::kLanes);
        if constexpr (asks_ahead<C>(kRows)) {
          __builtin_prefetch(step + (kStreamingSteps * kVectors + v) * C::kLanes, 0, 2);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const typename C::Vector a = C::broadcast(rows.at(r, k));
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[r][v] = C::multiply_add(a, b[v], sum[r][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) Simd::store(c + r * c_pitch + v * C::kLanes, sum[r][v]);
  }
}

template <class C, class Rows>
using TileFunction = void (*)(int64_t, const Rows&, const typename C::Word*, float*, int64_t, bool);

// The tile for `rows` of at most kRows rows and `vectors` of at most kVectors vectors.
template <class C, class Rows, int kRows = C::kRows, int kVectors = C::kVectors>
TileFunction<C, Rows> tile_function(int rows, int vectors) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) return tile_function<C, Rows, kRows, kVectors - 1>(rows, vectors);
  }
  if constexpr (kRows > 1) {
    if (rows < kRows) return tile_function<C, Rows, kRows - 1, kVectors>(rows, vectors);
  }
  if constexpr (C::kTiles) {
    return multiply_tile_amx<C, Rows, kRows, kVectors>;
  } else {
    return multiply_tile<C, Rows, kRows, kVectors>;
  }
}

// ---- few rows -----------------------------------------------------------------------------------------------------

// A group of few rows uses each weight a few times only: reading the weights is all the work, so they are read once,
// in place, along the inner dimension, and each output is a dot product.

constexpr int kDotColumns = 4;  // weights' rows that are read side by side

// How the two sides of a dot product are read. Storage that is not made of words is spread to float32, two vectors at
// a time and in whichever order is cheapest: the weights as they come, the rows beforehand, once for all weights.
template <class C>
struct DotOperands {
  using T = typename C::T;
  static constexpr bool kSpread = !C::kInPlace;
  using RowElement = std::conditional_t<kSpread, float, T>;
  static constexpr int kVectors = kSpread ? 2 : 1;
  static constexpr int kRows = kSpread ? C::kPlan.spread_dot_rows : C::kPlan.dot_rows;
  static constexpr int kStep = kVectors * C::kLanes * C::kPerWord;                          // elements read at once
  static constexpr int kLine = static_cast<int>(kLineBytes) / static_cast<int>(sizeof(T));  // weights in a line

  // A single pass over the weights asks for all of the next ones, and, as they are used but once, past the second-level
  // cache; where nothing needs to be spread it is so fast that the processor's own prefetching does better alone. Both
  // on AVX2. On AVX-512 either takes 1.06 to 1.27 times as long as to ask for all, into that cache.
  static constexpr bool kAvx2 = C::kLanes == 8;
  static constexpr int kAheadAlone = kAvx2 && !kSpread ? 0 : kDotColumns;
  static constexpr int hint(int ahead) { return kAvx2 && ahead == kDotColumns ? 0 : 2; }

  static void load(const T* p, typename C::Vector (&v)[kVectors]) {
    if constexpr (kSpread) {
      C::Simd::load_two(p, v[0], v[1]);
    } else {
      v[0] = load_elements<C>(p);
    }
  }
  // The same where only `count` elements exist; the rest are zero.
  static void load_last(const T* p, int64_t count, typename C::Vector (&v)[kVectors]) {
    T whole[kStep] = {};
    __builtin_memcpy(whole, p, static_cast<size_t>(count) * sizeof(T));
    load(whole, v);
  }

  static int64_t spread_pitch(int64_t elements) { return divide_up(elements, kStep) * kStep; }

  // A row as the weights are read, filled up with zeros: spread_pitch() floats.
  static void spread(const T* row, int64_t elements, float* out) {
    for (int64_t k = 0; k < elements; k += kStep, out += kStep) {
      typename C::Vector v[kVectors];
      if (k + kStep <= elements) {
        load(row + k, v);
      } else {
        load_last(row + k, elements - k, v);
      }
      for (int i = 0; i < kVectors; ++i) C::Simd::store(out + i * C::kLanes, v[i]);
    }
  }
};

// sums[r * pitch + n] = row[r] . (weights + n * weights_pitch) for n < kDotColumns. Meanwhile the first kAhead rows of
// `upcoming`, weights that will be read next, are brought in.
template <class C, int kRows, int kAhead>
void dot_tile(int64_t elements, const typename DotOperands<C>::RowElement* const* row, const typename C::T* weights,
              int64_t weights_pitch, const typename C::T* upcoming, float* sums, int64_t pitch) {
  using Simd = typename C::Simd;
  using Operands = DotOperands<C>;
  using Vectors = typename C::Vector[Operands::kVectors];
  typename Simd::Floats sum[kRows][kDotColumns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int n = 0; n < kDotColumns; ++n) sum[r][n] = Simd::zero();
  }
  // Whether all of the step's elements exist is known to the compiler: a branch within the loop would cost the sums
  // their registers.
  const auto step = [&](int64_t k, auto whole) __attribute__((always_inline)) {
    Vectors x[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      if constexpr (Operands::kSpread) {
        for (int i = 0; i < Operands::kVectors; ++i) x[r][i] = Simd::load(row[r] + k + i * C::kLanes);
      } else if constexpr (whole) {
        Operands::load(row[r] + k, x[r]);
      } else {
        Operands::load_last(row[r] + k, elements - k, x[r]);
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < kDotColumns; ++n) {
      Vectors w;
      if constexpr (whole) {
        Operands::load(weights + n * weights_pitch + k, w);
      } else {
        Operands::load_last(weights + n * weights_pitch + k, elements - k, w);
      }
#pragma GCC unroll 2
      for (int i = 0; i < Operands::kVectors; ++i) {
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][n] = C::multiply_add(x[r][i], w[i], sum[r][n]);
      }
    }
  };
  int64_t k = 0;
  for (; k + Operands::kLine <= elements;) {
#pragma GCC unroll 4
    for (int n = 0; n < kAhead; ++n) __builtin_prefetch(upcoming + n * weights_pitch + k, 0, Operands::hint(kAhead));
#pragma GCC unroll 4
    for (int i = 0; i < Operands::kLine; i += Operands::kStep, k += Operands::kStep) step(k, std::true_type{});
  }
  for (; k + Operands::kStep <= elements; k += Operands::kStep) step(k, std::true_type{});
  if (k < elements) step(k, std::false_type{});
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) Simd::store_sums(sums + r * pitch, sum[r][0], sum[r][1], sum[r][2], sum[r][3]);
}

template <class C>
using DotFunction = void (*)(int64_t, const typename DotOperands<C>::RowElement* const*, const typename C::T*, int64_t,
                             const typename C::T*, float*, int64_t);

// The tile for `rows` rows that brings in `ahead` rows.
template <class C, int kRows = DotOperands<C>::kRows, int kAhead = kDotColumns>
DotFunction<C> dot_function(int rows, int ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return dot_function<C, kRows - 1, kAhead>(rows, ahead);
  }
  if constexpr (kAhead > 0) {
    if (ahead < kAhead) return dot_function<C, kRows, kAhead / 2>(rows, ahead);
  }
  return dot_tile<C, kRows, kAhead>;
}

// ---- packing ------------------------------------------------------------------------------------------------------

constexpr int kMostPanels = 16;  // panels that a task packs at once

// Some columns of a matrix, cut into panels: panel p holds those from column[p] on.
template <class C>
struct Panels {
  int count = 0;
  int64_t column[kMostPanels];
  int start[kMostPanels + 1] = {};  // columns in the panels before p

  int columns(int p) const { return start[p + 1] - start[p]; }
  int vectors(int p) const { return static_cast<int>(divide_up(columns(p), C::kLanes)); }
  int width() const { return start[count]; }
};

// One vector of words of the elements p[0], p[1], ... of which only the first `count` exist; the rest are zero.
template <class C>
typename C::Simd::Words load_row_words(const typename C::T* p, int64_t count) {
  const typename C::Vector v =
      count >= C::kLanes * C::kPerWord ? load_elements<C>(p) : load_last_elements<C>(p, count > 0 ? count : 0);
  if constexpr (C::kPairs) {
    return v;
  } else {
    return C::Simd::as_words(v);
  }
}

// Columns of the panel are rows of a matrix: column n is the `elements` elements at matrix + n * pitch.
// panel: [words][vectors * lanes]; columns beyond `columns` repeat the last one (their results are not used).
template <class C>
void pack_rows_as_columns(const typename C::T* matrix, int64_t pitch, int columns, int64_t elements,
                          typename C::Word* panel) {
  using Simd = typename C::Simd;
  constexpr int kLanes = C::kLanes;
  const int vectors = static_cast<int>(divide_up(columns, kLanes));
  const int64_t words = C::words(elements);
  for (int v = 0; v < vectors; ++v) {
    const typename C::T* row[kLanes];
    for (int n = 0; n < kLanes; ++n) row[n] = matrix + smaller(v * kLanes + n, columns - 1) * pitch;
    for (int64_t k = 0; k < words; k += kLanes) {
      const int64_t left = elements - k * C::kPerWord;
      typename Simd::Words block[kLanes];
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) {
        const typename C::T* source = row[n] + k * C::kPerWord;
        __builtin_prefetch(source + kPrefetchLines * kLineWords * C::kPerWord, 0, 2);
        block[n] = load_row_words<C>(source, left);
      }
      Simd::transpose(block);
      typename C::Word* out = panel + (k * vectors + v) * kLanes;
      const int count = static_cast<int>(smaller(kLanes, words - k));
      if (count == kLanes) {
#pragma GCC unroll 16
        for (int n = 0; n < kLanes; ++n) Simd::store_words(out + n * vectors * kLanes, block[n]);
      } else {
        for (int n = 0; n < count; ++n) Simd::store_words(out + n * vectors * kLanes, block[n]);
      }
    }
  }
}

// One vector of a panel whose inner dimension runs down the rows: columns of row `even` (and of the next row, `odd`,
// where a word holds a pair; null past the end).
template <class C>
typename C::Vector load_column_words(const typename C::T* even, const typename C::T* odd, int count) {
  using Simd = typename C::Simd;
  if constexpr (C::kPairs) {
    alignas(64) static constexpr typename C::T kZeros[C::kLanes] = {};
    if (odd == nullptr) odd = kZeros;
    return count >= C::kLanes ? Simd::pair(even, odd) : Simd::pair_first(even, odd, count);
  } else {
    return count >= C::kLanes ? Simd::load(even) : Simd::load_first(even, count);
  }
}

constexpr int64_t kRowsAhead = 4;  // packing along columns asks for the row so far ahead of the present one

// panel[p]: [words][vectors * lanes] from row(k) and the panel's columns, k < elements; columns beyond are zero. Panel
// by panel within a row, so that memory is read in long stretches.
template <class C, class Row>
void pack_columns(const Row& row, const Panels<C>& panels, int64_t elements, typename C::Word* const* panel) {
  constexpr int kLanes = C::kLanes;
  for (int64_t k = 0; k < elements; k += C::kPerWord) {
    const typename C::T* even = row(k);
    const typename C::T* odd = C::kPairs && k + 1 < elements ? row(k + 1) : nullptr;
    if (k + kRowsAhead < elements) bring_in<false, 3>(row(k + kRowsAhead) + panels.column[0], panels.width());
    for (int p = 0; p < panels.count; ++p) {
      const int columns = panels.columns(p), vectors = panels.vectors(p);
      const typename C::T* const even_columns = even + panels.column[p];
      const typename C::T* const odd_columns = odd == nullptr ? nullptr : odd + panels.column[p];
      typename C::Word* const out = panel[p] + k / C::kPerWord * vectors * kLanes;
      const auto pack = [&](int v, int count) __attribute__((always_inline)) {
        const int first = v * kLanes;
        C::store_vector(out + first, load_column_words<C>(even_columns + first,
                                                          odd == nullptr ? nullptr : odd_columns + first, count));
      };
      if (columns == C::kColumns) {
#pragma GCC unroll 4
        for (int v = 0; v < C::kVectors; ++v) pack(v, kLanes);
      } else {
        for (int v = 0; v < vectors; ++v) pack(v, columns - v * kLanes);
      }
    }
  }
}

// A factor for each row that is packed. Unscaled: all are 1.
struct Unscaled {
  Unscaled from(int64_t) const { return {}; }
};
struct RowFactors {
  float common;
  const float* factor;
  const int32_t* index;  // row r has common * factor[index[r]]

  RowFactors from(int64_t row) const { return {common, factor, index + row}; }
  float operator()(int64_t row) const { return common * factor[index[row]]; }
};

// The same for the broadcast side: blocks of kRows columns, each [words][kRows]; row(k) times its factor, in float32.
template <class C, class Row, class Factors>
void pack_broadcast_columns(const Row& row, int columns, int64_t elements, typename C::Word* blocks,
                            const Factors& factors) {
  constexpr int kWidth = C::kLanes > C::kRows ? C::kLanes : C::kRows;  // columns handled at once
  const int64_t words = C::words(elements);
  for (int64_t k = 0; k < elements; k += C::kPerWord) {
    const typename C::T* even = row(k);
    const typename C::T* odd = C::kPairs && k + 1 < elements ? row(k + 1) : nullptr;
    for (int first = 0; first < columns; first += kWidth) {
      alignas(64) typename C::Word step[kWidth];
      for (int n = 0; n < kWidth; n += C::kLanes) {
        const int column = first + n;
        const int count = column < columns ? columns - column : 0;
        const int start = column < columns ? column : 0;
        typename C::Vector v = load_column_words<C>(even + start, odd == nullptr ? nullptr : odd + start, count);
        if constexpr (!std::is_same_v<Factors, Unscaled>) v = C::Simd::mul(v, C::Simd::broadcast(factors(k)));
        C::store_vector(step + n, v);
      }
#pragma GCC unroll 4
      for (int n = 0; n < kWidth; n += C::kRows) {
        if (first + n >= columns) break;
        typename C::Word* out = blocks + (first + n) * words + (k / C::kPerWord) * C::kRows;
        __builtin_memcpy(out, step + n, sizeof(typename C::Word) * C::kRows);
      }
    }
  }
}

// kRows rows of words for the broadcast side: in place where storage is made of words, else converted into `space`
// ([kRows][words]). Rows past `count` repeat the first.
template <class C, class Row>
RowsInPlace<C> broadcast_rows(const Row& row, int count, int64_t first_element, int64_t elements,
                              typename C::Word* space) {
  using Simd = typename C::Simd;
  RowsInPlace<C> rows;
  for (int r = 0; r < C::kRows; ++r) rows.next[r] = nullptr;
  const bool in_place = C::kInPlace && elements % C::kPerWord == 0;
  const int64_t words = C::words(elements);
  for (int r = 0; r < C::kRows; ++r) {
    if (r >= count) {
      rows.row[r] = rows.row[0];
      continue;
    }
    const typename C::T* source = row(r) + first_element;
    if (in_place) {
      rows.row[r] = reinterpret_cast<const typename C::Word*>(source);
      continue;
    }
    typename C::Word* copy = space + r * divide_up(words, C::kLanes) * C::kLanes;
    for (int64_t k = 0; k < words; k += C::kLanes) {
      Simd::store_words(copy + k, load_row_words<C>(source + k * C::kPerWord, elements - k * C::kPerWord));
    }
    rows.row[r] = copy;
  }
  return rows;
}

template <class C>
constexpr int64_t broadcast_space_words() {
  return C::kRows * divide_up(C::kPlan.block_words, C::kLanes) * C::kLanes;
}

}  // namespace
}  // namespace dynamic_moe

#include "grouped_matmul/amx_tile.h"
