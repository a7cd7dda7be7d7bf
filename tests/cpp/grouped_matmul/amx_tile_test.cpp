// SPDX-License-Identifier: Apache-2.0
// The AMX tile with the processor's tile unit replaced by a plain one: what runs is the product's own code, all but the
// instructions of AmxTiles, whose order among ordinary stores check_tile_loads.py sees in the compiled kernels.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "common/half.h"
#include "grouped_matmul/tile.h"

namespace dynamic_moe {
namespace {

float low_half(uint32_t word) { return to_float(BFloat16{static_cast<uint16_t>(word)}); }
float high_half(uint32_t word) { return to_float(BFloat16{static_cast<uint16_t>(word >> 16)}); }

// What the tile instructions do, written from their description.
class PlainTiles {
 public:
  explicit PlainTiles(int rows) : rows_(rows) {}
  void release() {}

  template <int kVector>
  void zero_sums() {
    std::memset(sums_[kVector], 0, sizeof sums_[kVector]);
  }
  template <int kVector>
  void load_sums(const float* c, int64_t pitch) {
    for (int r = 0; r < rows_; ++r) std::memcpy(sums_[kVector][r], c + r * pitch, 64);
  }
  template <int kVector>
  void store_sums(float* c, int64_t pitch) const {
    for (int r = 0; r < rows_; ++r) std::memcpy(c + r * pitch, sums_[kVector][r], 64);
  }
  void load_rows(const uint32_t* words) { std::memcpy(row_words_, words, static_cast<size_t>(rows_) * 64); }
  template <int kVector, int kPitch>
  void multiply_add(const uint32_t* panel) {
    for (int r = 0; r < rows_; ++r) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 16; ++n) {
          sums_[kVector][r][n] += low_half(row_words_[r][k]) * low_half(panel[k * kPitch + n]);
          sums_[kVector][r][n] += high_half(row_words_[r][k]) * high_half(panel[k * kPitch + n]);
        }
      }
    }
  }

 private:
  int rows_;
  float sums_[3][16][16];
  uint32_t row_words_[16][16];
};

struct PlainAmx {
  using Tiles = PlainTiles;
  struct Words {
    uint32_t at[16];
  };
  using Floats = Words;  // named by Config; the tile uses none
  static constexpr int kLanes = 16;
  static constexpr bool kDotsBFloat16 = true;

  static Words load_words(const void* p) {
    Words words;
    std::memcpy(&words, p, sizeof words);
    return words;
  }
  static void store_words(void* p, const Words& words) { std::memcpy(p, &words, sizeof words); }
  static void transpose(Words (&block)[16]) {
    for (int r = 0; r < 16; ++r) {
      for (int c = 0; c < r; ++c) std::swap(block[r].at[c], block[c].at[r]);
    }
  }
};

using AmxConfig = Config<PlainAmx, BFloat16, Isa::kAmx>;
static_assert(AmxConfig::kTiles);

uint32_t random_pair(std::mt19937& generator) {
  std::normal_distribution<float> normal;
  const uint32_t low = from_float<BFloat16>(normal(generator)).bits;
  return low | static_cast<uint32_t>(from_float<BFloat16>(normal(generator)).bits) << 16;
}

template <class Rows, int kRows, int kVectors>
void expect_product(int64_t words, bool accumulate) {
  std::mt19937 generator(static_cast<unsigned>(words * 64 + kRows * 4 + kVectors));
  constexpr int kColumns = kVectors * 16, kPitch = kColumns + 5;
  const float nan = std::numeric_limits<float>::quiet_NaN();
  uint32_t nan_pair;
  std::memcpy(&nan_pair, &nan, sizeof nan_pair);

  std::vector<uint32_t> a(static_cast<size_t>(16 * words)),
      panel(static_cast<size_t>((words + 16) * kColumns), nan_pair);
  for (auto& pair : a) pair = random_pair(generator);
  for (int64_t i = 0; i < words * kColumns; ++i) panel[static_cast<size_t>(i)] = random_pair(generator);
  std::vector<float> c(16 * kPitch, 3.0f);

  Stream stream;
  Rows rows{};
  rows.stream = &stream;
  const auto word = [&](int r, int64_t k) { return *rows.at(r, k); };
  if constexpr (std::is_same_v<Rows, RowsInPlace<AmxConfig>>) {
    for (int r = 0; r < 16; ++r) rows.row[r] = a.data() + r * words;
  } else {
    rows.data = a.data();
  }
  tile_function<AmxConfig, Rows>(kRows, kVectors)(words, rows, panel.data(), c.data(), kPitch, accumulate);

  for (int r = 0; r < 16; ++r) {
    for (int n = 0; n < kPitch; ++n) {
      const float got = c[static_cast<size_t>(r * kPitch + n)];
      if (r >= kRows || n >= kColumns) {
        EXPECT_EQ(got, 3.0f) << "written outside the tile at " << r << ", " << n;
        continue;
      }
      double exact = accumulate ? 3.0 : 0.0, scale = exact;
      for (int64_t k = 0; k < words; ++k) {
        const uint32_t x = word(r, k), w = panel[static_cast<size_t>(k * kColumns + n)];
        const double low = double{low_half(x)} * low_half(w), high = double{high_half(x)} * high_half(w);
        exact += low + high;
        scale += std::abs(low) + std::abs(high);
      }
      EXPECT_NEAR(got, exact, 1e-6 * scale) << "row " << r << ", column " << n;
    }
  }
}

template <class Rows>
void expect_products() {
  for (const int64_t words : {1, 15, 16, 17, 32, 50}) {
    for (const bool accumulate : {false, true}) {
      SCOPED_TRACE(testing::Message() << words << " words, accumulate " << accumulate);
      expect_product<Rows, 16, 3>(words, accumulate);
      expect_product<Rows, 16, 1>(words, accumulate);
      expect_product<Rows, 7, 2>(words, accumulate);
      expect_product<Rows, 1, 3>(words, accumulate);
    }
  }
}

TEST(AmxTile, MultipliesRowsInPlace) { expect_products<RowsInPlace<AmxConfig>>(); }

TEST(AmxTile, MultipliesPackedRows) { expect_products<RowsPacked<AmxConfig>>(); }

}  // namespace
}  // namespace dynamic_moe
