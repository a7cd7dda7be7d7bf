// SPDX-License-Identifier: Apache-2.0
// Where the 16-byte chunks of an operand's tile lie in shared memory, so that neither the copies into it nor the reads
// of fragments out of it meet in a bank. Shared memory has 32 banks of 4 bytes: eight chunks side by side, a line, can
// be moved at once.
#pragma once

#include "common/cuda/platform.cuh"

namespace dynamic_moe {

// A tile of kRows rows of kRowBytes bytes: rows of the operand where it is K-major (a chunk is a piece of the depth),
// else steps of the depth (a chunk is a piece of a step). Copies write neighboring chunks of a row: any order within a
// line serves them. What differs is how fragments are read:
//  - ldmatrix, and the fused multiply-adds, take the same chunk of eight rows that follow one another. A row of 128
//  bytes
//    and more is whole lines: row r moves chunk c to c ^ (r % 8). Of rows of 64 bytes two share a line, and r / 2 % 4
//    does.
//  - TF32 fragments of an operand that is not K-major are single words (ldmatrix transposes halves only): four steps of
//    the depth, eight words of each, so two chunks of each of four rows: row r moves them by 2 (r % 4).
template <int kRows, int kRowBytes, bool kSingleWords = false>
struct SharedTile {
  static constexpr int kChunksPerRow = kRowBytes / 16;
  static_assert(kChunksPerRow == 4 || kChunksPerRow % 8 == 0, "rows of 64 bytes or of whole lines");
  static_assert(!kSingleWords || kChunksPerRow % 8 == 0, "single words are read from whole lines");

  // In bytes from the tile's begin.
  __device__ static constexpr int offset(int row, int chunk) {
    const int turn = kSingleWords ? 2 * (row % 4) : kChunksPerRow == 4 ? row / 2 % 4 : row % 8;
    return row * kRowBytes + (chunk ^ turn) * 16;
  }
};

}  // namespace dynamic_moe
