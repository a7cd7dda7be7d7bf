// SPDX-License-Identifier: Apache-2.0
// The three products on any CPU level. The forward pass takes dot products along H. The derivatives take blocks of
// columns: what all rows of a block read is staged first, tile by tile, because rows of x and W that lie a power of two
// apart share their places in the first-level cache. Included only by *_cpu_<level>.cpp.
#pragma once

#include "common/workspace.h"
#include "float32_linear/cpu_levels.h"

namespace dynamic_moe {
namespace {

constexpr int kTileRows = 4;      // tokens or experts whose sums a tile of dx or dw holds
constexpr int kDotExperts = 4;    // experts that a block of dot products takes: store_sums() stores four
constexpr int kBlockTiles = 4;    // tiles of a block: rows are read and written 1 KiB at a time, not 256 bytes
constexpr int kBlockTokens = 32;  // tokens of a block of dw: 32 x 256 floats are a first-level cache

// What differs between the register files: AVX2 has 16 vector registers, AVX-512 has 32.
template <class Simd>
struct TileShape {
  static constexpr int kDotTokens = Simd::kLanes == 16 ? 4 : 2;
  static constexpr int kVectors = Simd::kLanes == 16 ? 4 : 2;
  static constexpr int kColumns = kVectors * Simd::kLanes;
};

template <class T>
const T* row_of(const void* matrix, int64_t row, int64_t width) {
  return static_cast<const T*>(matrix) + row * width;
}

inline int smaller_count(int64_t a, int64_t b) { return static_cast<int>(a < b ? a : b); }

// Dot products of kTokens rows of x and four rows of the weight. Rows may repeat: then so do the sums.
template <class Simd, class T, int kTokens>
void dot_block(const T* const (&x)[kTokens], const float* const (&weight)[kDotExperts], int64_t hidden_size,
               float (&sums)[kTokens][kDotExperts]) {
  using Floats = typename Simd::Floats;
  Floats acc[kTokens][kDotExperts];
  for (auto& row : acc) {
    for (Floats& sum : row) sum = Simd::zero();
  }
  const auto add = [&](const auto& load) {
    Floats w[kDotExperts];
    for (int e = 0; e < kDotExperts; ++e) w[e] = load(weight[e]);
    for (int t = 0; t < kTokens; ++t) {
      const Floats value = load(x[t]);
      for (int e = 0; e < kDotExperts; ++e) acc[t][e] = Simd::fma(value, w[e], acc[t][e]);
    }
  };
  int64_t h = 0;
  for (; h + Simd::kLanes <= hidden_size; h += Simd::kLanes) add([h](const auto* row) { return Simd::load(row + h); });
  const int rest = static_cast<int>(hidden_size - h);
  if (rest > 0) add([h, rest](const auto* row) { return Simd::load_first(row + h, rest); });
  for (int t = 0; t < kTokens; ++t) Simd::store_sums(sums[t], acc[t][0], acc[t][1], acc[t][2], acc[t][3]);
}

template <class Simd, class T>
void linear_forward(const Float32LinearParams& p, const OutputRange& range) {
  constexpr int kTokens = TileShape<Simd>::kDotTokens;
  const int64_t last_token = range.row_end - 1, last_expert = range.column_end - 1;
  for (int64_t e0 = range.column_begin; e0 < range.column_end; e0 += kDotExperts) {
    const float* weight[kDotExperts];
    for (int e = 0; e < kDotExperts; ++e) {
      weight[e] = p.weight + (e0 + e < last_expert ? e0 + e : last_expert) * p.hidden_size;
    }
    const int experts = smaller_count(kDotExperts, range.column_end - e0);
    for (int64_t t0 = range.row_begin; t0 < range.row_end; t0 += kTokens) {
      const T* x[kTokens];
      for (int t = 0; t < kTokens; ++t) x[t] = row_of<T>(p.x, t0 + t < last_token ? t0 + t : last_token, p.hidden_size);
      float sums[kTokens][kDotExperts];
      dot_block<Simd, T, kTokens>(x, weight, p.hidden_size, sums);
      for (int t = 0; t < smaller_count(kTokens, range.row_end - t0); ++t) {
        for (int e = 0; e < experts; ++e) p.logits[(t0 + t) * p.num_experts + e0 + e] = sums[t][e];
      }
    }
  }
}

// A tile of sums over `depth` rows: acc[i][:] += factor[i][row * factor_stride] * rows[row][:].
template <class Simd>
struct SumTile {
  using Floats = typename Simd::Floats;
  static constexpr int kVectors = TileShape<Simd>::kVectors, kColumns = TileShape<Simd>::kColumns;
  Floats acc[kTileRows][kVectors];

  void multiply(const float* const (&factor)[kTileRows], int64_t factor_stride, const float* rows, int64_t depth) {
    for (int64_t row = 0; row < depth; ++row, rows += kColumns) {
      Floats value[kVectors];
      for (int v = 0; v < kVectors; ++v) value[v] = Simd::load(rows + v * Simd::kLanes);
      for (int i = 0; i < kTileRows; ++i) {
        const Floats scale = Simd::broadcast(factor[i][row * factor_stride]);
        for (int v = 0; v < kVectors; ++v) acc[i][v] = Simd::fma(scale, value[v], acc[i][v]);
      }
    }
  }
  // run(vector, first column, columns) for the vectors of a tile of `width` columns.
  template <class Run>
  static void for_vectors(int width, const Run& run) {
    for (int v = 0; v < kVectors; ++v) {
      const int columns = smaller_count(Simd::kLanes, width - v * Simd::kLanes);
      if (columns > 0) run(v, v * Simd::kLanes, columns);
    }
  }
};

// A block of columns: its tiles are staged one behind the other, [tiles][rows][kColumns], as float32 and zero beyond
// the last column.
template <class Simd>
struct StagedBlock {
  static constexpr int kColumns = TileShape<Simd>::kColumns;
  float* data;
  int64_t rows;
  int tiles, width;

  // What `count` rows of the source hold from `source` on.
  template <class T>
  void stage(const T* source, int64_t pitch, int64_t count) {
    rows = count;
    for (int64_t row = 0; row < count; ++row, source += pitch) {
      for (int column = 0; column < tiles * kColumns; column += Simd::kLanes) {
        const int columns = smaller_count(Simd::kLanes, width - column);
        Simd::store(data + (column / kColumns * rows + row) * kColumns + column % kColumns,
                    columns == Simd::kLanes ? Simd::load(source + column)
                    : columns > 0           ? Simd::load_first(source + column, columns)
                                            : Simd::zero());
      }
    }
  }
  const float* tile(int index) const { return data + index * rows * kColumns; }
  int tile_width(int index) const { return smaller_count(kColumns, width - index * kColumns); }
};

// run(block, first column) for the blocks of a range of columns; a block may hold up to `rows` rows.
template <class Simd, class Run>
void for_blocks(const OutputRange& range, int64_t rows, const Run& run) {
  constexpr int kColumns = TileShape<Simd>::kColumns;
  float* const data = scratch<float>(Scratch::kTile, rows * kBlockTiles * kColumns);
  for (int64_t h = range.column_begin; h < range.column_end; h += kBlockTiles * kColumns) {
    const int width = smaller_count(kBlockTiles * kColumns, range.column_end - h);
    run(StagedBlock<Simd>{.data = data, .rows = 0, .tiles = (width + kColumns - 1) / kColumns, .width = width}, h);
  }
}

template <class Simd, class T>
void store_vector(T* p, typename Simd::Floats v, int count) {
  if (count == Simd::kLanes) {
    Simd::store(p, v);
  } else {
    Simd::store_first(p, v, count);
  }
}

template <class Simd, class T>
void linear_dx(const Float32LinearDxParams& p, const OutputRange& range) {
  using Tile = SumTile<Simd>;
  const int64_t last_token = range.row_end - 1;
  for_blocks<Simd>(range, p.num_experts, [&](StagedBlock<Simd> block, int64_t h) {
    block.stage(p.weight + h, p.hidden_size, p.num_experts);
    for (int64_t t0 = range.row_begin; t0 < range.row_end; t0 += kTileRows) {
      const float* factor[kTileRows];
      for (int t = 0; t < kTileRows; ++t) {
        factor[t] = p.d_logits + (t0 + t < last_token ? t0 + t : last_token) * p.num_experts;
      }
      for (int index = 0; index < block.tiles; ++index) {
        Tile tile{};
        tile.multiply(factor, 1, block.tile(index), p.num_experts);
        for (int t = 0; t < smaller_count(kTileRows, range.row_end - t0); ++t) {
          T* out = static_cast<T*>(p.dx) + (t0 + t) * p.hidden_size + h + index * Tile::kColumns;
          Tile::for_vectors(block.tile_width(index), [&](int v, int column, int count) {
            store_vector<Simd>(out + column, tile.acc[t][v], count);
          });
        }
      }
    }
  });
}

// dw of a tile and four experts, or fewer, grows by what a block of tokens adds.
template <class Simd>
void add_to_dw(const Float32LinearDwParams& p, const StagedBlock<Simd>& block, int index, int64_t t0, int64_t e0,
               int64_t e_end, float* out) {
  using Tile = SumTile<Simd>;
  const int experts = smaller_count(kTileRows, e_end - e0);
  const float* factor[kTileRows];
  for (int e = 0; e < kTileRows; ++e) {
    factor[e] = p.d_logits + t0 * p.num_experts + e0 + (e < experts ? e : experts - 1);
  }
  Tile tile{};
  for (int e = 0; t0 > 0 && e < experts; ++e) {
    Tile::for_vectors(block.tile_width(index), [&](int v, int column, int count) {
      tile.acc[e][v] = Simd::load_first(out + e * p.hidden_size + column, count);
    });
  }
  tile.multiply(factor, p.num_experts, block.tile(index), block.rows);
  for (int e = 0; e < experts; ++e) {
    Tile::for_vectors(block.tile_width(index), [&](int v, int column, int count) {
      store_vector<Simd>(out + e * p.hidden_size + column, tile.acc[e][v], count);
    });
  }
}

template <class Simd, class T>
void linear_dw(const Float32LinearDwParams& p, const OutputRange& range) {
  for_blocks<Simd>(range, kBlockTokens, [&](StagedBlock<Simd> block, int64_t h) {
    for (int64_t t0 = 0; t0 == 0 || t0 < p.num_tokens; t0 += kBlockTokens) {
      block.stage(row_of<T>(p.x, t0, p.hidden_size) + h, p.hidden_size, smaller_count(kBlockTokens, p.num_tokens - t0));
      for (int index = 0; index < block.tiles; ++index) {
        for (int64_t e0 = range.row_begin; e0 < range.row_end; e0 += kTileRows) {
          add_to_dw(p, block, index, t0, e0, range.row_end,
                    p.dw + e0 * p.hidden_size + h + index * SumTile<Simd>::kColumns);
        }
      }
    }
  });
}

template <class Run>
void for_token_dtype(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kBFloat16:
      return run(BFloat16{});
    case DType::kFloat16:
      return run(Float16{});
    default:
      return run(float{});
  }
}

template <class Simd>
constexpr Float32LinearKernels float32_linear_kernels() {
  return {
      kBlockTiles * TileShape<Simd>::kColumns,
      [](const Float32LinearParams& p, const OutputRange& range) {
        for_token_dtype(p.dtype, [&](auto type) { linear_forward<Simd, decltype(type)>(p, range); });
      },
      [](const Float32LinearDxParams& p, const OutputRange& range) {
        for_token_dtype(p.dtype, [&](auto type) { linear_dx<Simd, decltype(type)>(p, range); });
      },
      [](const Float32LinearDwParams& p, const OutputRange& range) {
        for_token_dtype(p.dtype, [&](auto type) { linear_dw<Simd, decltype(type)>(p, range); });
      },
  };
}

}  // namespace
}  // namespace dynamic_moe
