// SPDX-License-Identifier: Apache-2.0
// The register tile on AMX: up to 16 rows by up to 3 * 16 outputs of bfloat16 pairs, sixteen words at a step. The
// panels are the ones that the vector kernels use, so only the tile differs. `C::Simd::Tiles` is the unit: the
// processor's own (AmxTiles) or a plain C++ one that tests use where there is none.
#pragma once

#include "common/types.h"

namespace dynamic_moe {
namespace {

constexpr int kTileWords = 16;  // words in a row of a tile: 64 bytes

#if defined(__AMX_BF16__) || defined(__AMXBF16__)  // the latter: older clang
// What LDTILECFG reads, for sums and rows of tiles of 0 to 16 rows; the panel's tiles are full.
struct TileConfigurations {
  struct alignas(64) Configuration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {};
  } of_rows[kTileWords + 1];

  constexpr TileConfigurations() {
    for (int rows = 0; rows <= kTileWords; ++rows) {
      for (int i = 0; i < 7; ++i) of_rows[rows].rows[i] = static_cast<uint8_t>(i < 4 ? rows : kTileWords);
    }
  }
};
constexpr TileConfigurations kTileConfigurations;

// Tile registers: 0 to 2 the sums, 3 the rows, 4 to 6 the panel.
//
// GCC's intrinsics for LDTILECFG and TILELOADD do not tell the compiler what they read: it may move a store to a
// staging buffer behind the load of it, or drop it. So the two instructions are written here, with the memory that they
// read as an operand. The intrinsic of TILESTORED does say that it writes memory.
class AmxTiles {
 public:
  explicit AmxTiles(int rows) { __asm__ volatile("ldtilecfg %0" : : "m"(kTileConfigurations.of_rows[rows])); }
  // Not a destructor: unwinding would bring in a symbol that levels must not define, and nothing here throws.
  void release() { _tile_release(); }

  // The compiler's intrinsics take the register's number as a literal.
  template <int kVector>
  void zero_sums() {
    if constexpr (kVector == 0) _tile_zero(0);
    if constexpr (kVector == 1) _tile_zero(1);
    if constexpr (kVector == 2) _tile_zero(2);
  }
  template <int kVector>
  void load_sums(const float* c, int64_t pitch) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(c), "r"(pitch * 4), "i"(kVector) : "memory");
  }
  template <int kVector>
  void store_sums(float* c, int64_t pitch) const {
    if constexpr (kVector == 0) _tile_stored(0, c, pitch * 4);
    if constexpr (kVector == 1) _tile_stored(1, c, pitch * 4);
    if constexpr (kVector == 2) _tile_stored(2, c, pitch * 4);
  }
  void load_rows(const uint32_t* words) { load<3, kTileWords>(words); }
  template <int kVector, int kPitch>
  void multiply_add(const uint32_t* panel) {
    load<4 + kVector, kPitch>(panel);
    if constexpr (kVector == 0) _tile_dpbf16ps(0, 3, 4);
    if constexpr (kVector == 1) _tile_dpbf16ps(1, 3, 5);
    if constexpr (kVector == 2) _tile_dpbf16ps(2, 3, 6);
  }

 private:
  // Sixteen rows of words from `words` on, kPitch words apart. A smaller tile reads fewer.
  template <int kTile, int kPitch>
  static void load(const uint32_t* words) {
    struct Extent {
      uint32_t words[15 * kPitch + kTileWords];
    };
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2"
                     :
                     : "r"(words), "r"(int64_t{4} * kPitch), "i"(kTile), "m"(*reinterpret_cast<const Extent*>(words)));
  }
};
#endif

// words[kRows][kTileWords]: words [k, k + count) of the tile's rows, zero beyond.
template <class C, int kRows>
void copy_words(const RowsInPlace<C>& rows, int64_t k, int64_t count, uint32_t* words) {
  for (int r = 0; r < kRows; ++r, words += kTileWords) {
    if (count == kTileWords) {
      __builtin_memcpy(words, rows.at(r, k), kTileWords * sizeof(uint32_t));
    } else {
      __builtin_memset(words, 0, kTileWords * sizeof(uint32_t));
      __builtin_memcpy(words, rows.at(r, k), static_cast<size_t>(count) * sizeof(uint32_t));
    }
  }
}

template <class C, int kRows>
void copy_words(const RowsPacked<C>& rows, int64_t k, int64_t count, uint32_t* words) {
  static_assert(C::kRows == kTileWords && C::kLanes == kTileWords);
  alignas(64) static constexpr uint32_t kZeros[kTileWords] = {};
  typename C::Simd::Words block[kTileWords];
  for (int i = 0; i < kTileWords; ++i) block[i] = C::Simd::load_words(i < count ? rows.at(0, k + i) : kZeros);
  C::Simd::transpose(block);
  for (int r = 0; r < kRows; ++r) C::Simd::store_words(words + r * kTileWords, block[r]);
}

// c[kRows][kVectors * 16] (+)= rows x panel, as multiply_tile in tile.h.
template <class C, class Rows, int kRows, int kVectors>
void multiply_tile_amx(int64_t words, const Rows& rows, const uint32_t* panel, float* c, int64_t c_pitch,
                       bool accumulate) {
  static_assert(kRows <= 16 && kVectors <= 3);
  constexpr int kPitch = kVectors * kTileWords;
  typename C::Simd::Tiles tiles(kRows);
  const auto each_vector = [](const auto& body) {
    body(std::integral_constant<int, 0>{});
    if constexpr (kVectors > 1) body(std::integral_constant<int, 1>{});
    if constexpr (kVectors > 2) body(std::integral_constant<int, 2>{});
  };
  each_vector([&](auto v) {
    if (accumulate) {
      tiles.template load_sums<v>(c + v * kTileWords, c_pitch);
    } else {
      tiles.template zero_sums<v>();
    }
  });
  alignas(64) uint32_t row_words[16 * kTileWords];
  alignas(64) uint32_t last_panel[kTileWords * kPitch];
  for (int64_t k = 0; k < words; k += kTileWords) {
    const int64_t count = smaller(kTileWords, words - k);
    rows.prefetch(k);
    copy_words<C, kRows>(rows, k, count, row_words);
    tiles.load_rows(row_words);
    const uint32_t* step = panel + k * kPitch;
    if (count < kTileWords) {  // what lies behind the panel's end may be NaN
      __builtin_memset(last_panel, 0, sizeof last_panel);
      __builtin_memcpy(last_panel, step, static_cast<size_t>(count * kPitch) * sizeof(uint32_t));
      step = last_panel;
    }
    each_vector([&](auto v) { tiles.template multiply_add<v, kPitch>(step + v * kTileWords); });
  }
  each_vector([&](auto v) { tiles.template store_sums<v>(c + v * kTileWords, c_pitch); });
  tiles.release();
}

}  // namespace
}  // namespace dynamic_moe
