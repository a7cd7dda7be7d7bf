// SPDX-License-Identifier: Apache-2.0
// How the CUDA kernels of the grouped matmul cut their work: sizes of tiles and stages as data, for each architecture,
// kind of arithmetic and number of rows per expert. No CUDA in here: the host prints the table and tests check it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <ostream>

#include "common/types.h"

namespace dynamic_moe {

// What the code was compiled for; a device runs the code of the highest one that it can.
enum class Arch { kSm80, kSm90, kSm100, kSm120 };
inline constexpr Arch kAllArchs[] = {Arch::kSm80, Arch::kSm90, Arch::kSm100, Arch::kSm120};

// version: 10 * major + minor of the virtual architecture.
constexpr Arch arch_of(int version) {
  if (version >= 120) return Arch::kSm120;
  if (version >= 100) return Arch::kSm100;
  return version >= 90 ? Arch::kSm90 : Arch::kSm80;
}

// Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
struct ArchLimits {
  int registers_per_sm;
  int shared_bytes_per_sm;
  int shared_bytes_per_block;
  int shared_bytes_reserved;  // for each resident block
};
constexpr ArchLimits arch_limits(Arch arch) {
  constexpr int kKiB = 1024;
  switch (arch) {
    case Arch::kSm80:
      return {65536, 164 * kKiB, 163 * kKiB, kKiB};
    case Arch::kSm120:
      return {65536, 100 * kKiB, 99 * kKiB, kKiB};
    case Arch::kSm90:
    case Arch::kSm100:
      break;
  }
  return {65536, 228 * kKiB, 227 * kKiB, kKiB};
}

// What multiplies: tensor cores, or, for exact float32, fused multiply-adds.
enum class Math { kBFloat16, kFloat16, kTf32, kFloat32 };
inline constexpr Math kAllMaths[] = {Math::kBFloat16, Math::kFloat16, Math::kTf32, Math::kFloat32};

constexpr bool is_16_bit(Math math) { return math == Math::kBFloat16 || math == Math::kFloat16; }
constexpr int element_bytes(Math math) { return is_16_bit(math) ? 2 : 4; }

// The shapes of work. The first three differ in rows per expert and have rows of the problem as rows of their tiles.
enum class Regime {
  kFewRows,         // decode: the weights stream through tiles of one mma's height, and the depth is split among blocks
  kSomeRows,        // up to half of the largest tile
  kManyRows,        // bound by arithmetic
  kWeightGradient,  // tiles of an expert's matrix, its rows are the depth
  kUnaligned,       // what cannot move in vectors of 16 bytes: correct, not fast
};
inline constexpr Regime kAllRegimes[] = {Regime::kFewRows, Regime::kSomeRows, Regime::kManyRows,
                                         Regime::kWeightGradient, Regime::kUnaligned};

struct MatmulPolicy {
  int tile_m, tile_n;    // of the result, for one block
  int tile_k;            // elements of the depth in one stage
  int stages;            // tiles in shared memory, all but one of them under way
  int warps_m, warps_n;  // how the block's warps divide its tile
  int registers;         // most that a thread may use
  int blocks_per_sm;     // that must be resident at once

  // Blocks that the registers have room for, at least: what the compiler is told to keep to.
  constexpr int register_blocks() const { return 65536 / (registers * threads()); }
  constexpr int warps() const { return warps_m * warps_n; }
  constexpr int threads() const { return 32 * warps(); }
  constexpr int warp_m() const { return tile_m / warps_m; }
  constexpr int warp_n() const { return tile_n / warps_n; }
};

// The tile's operands in shared memory lie in rows of 64 bytes where shared memory is scarce and of 128 elsewhere. Not
// for TF32, which rounds its fragments: four steps of them, unrolled, do not fit the registers beside the sums, and a
// loop over steps would leave the copies outside. It has twice as many stages of half the size.
constexpr MatmulPolicy matmul_policy(Arch arch, Math math, Regime regime) {
  const int k64 = 64 / element_bytes(math), k128 = 2 * k64;
  const int k_long = math == Math::kTf32 ? k64 : k128, times = k128 / k_long;
  const bool roomy = arch == Arch::kSm90 || arch == Arch::kSm100;
  if (regime == Regime::kUnaligned) return {64, 64, k64, 2, 2, 2, 168, 3};
  if (regime == Regime::kFewRows) {
    if (arch == Arch::kSm120) return {16, 128, k64, 5, 1, 4, 168, 2};
    return {16, 128, k_long, 4 * times, 1, 4, 168, roomy ? 3 : 2};
  }
  // A thread keeps 64 sums here and 128 below: exact float32 needs the registers for its factors.
  if (math == Math::kFloat32) return {64, 128, k64, 4, 2, 2, 255, 2};
  if (regime == Regime::kSomeRows) {
    if (arch == Arch::kSm120) return {64, 128, k64, 4, 2, 2, 255, 2};
    return {64, 128, k_long, (roomy ? 4 : 3) * times, 2, 2, 255, 2};
  }
  if (roomy) return {128, 128, k_long, 3 * times, 2, 2, 255, 2};
  return {128, 128, k64, arch == Arch::kSm120 ? 3 : 4, 2, 2, 255, 2};
}

// Sums pass through shared memory on their way out, 16 rows of a warp at a time: that is as many as one mma has.
inline constexpr int kSlabRows = 16;
// Eight floats behind each row put the 8-byte pieces of four neighboring rows into different banks.
constexpr int slab_row_floats(const MatmulPolicy& policy) { return policy.warp_n() + 8; }
constexpr int slab_bytes(const MatmulPolicy& policy) { return kSlabRows * slab_row_floats(policy) * 4; }

constexpr int left_tile_bytes(const MatmulPolicy& policy, Math math) {
  return policy.tile_m * policy.tile_k * element_bytes(math);
}
constexpr int right_tile_bytes(const MatmulPolicy& policy, Math math) {
  return policy.tile_n * policy.tile_k * element_bytes(math);
}
constexpr int stage_bytes(const MatmulPolicy& policy, Math math) {
  return left_tile_bytes(policy, math) + right_tile_bytes(policy, math);
}
// The slabs come to lie where the stages were.
constexpr int shared_bytes(const MatmulPolicy& policy, Math math) {
  return std::max(policy.stages * stage_bytes(policy, math), policy.warps() * slab_bytes(policy));
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// By the rows that an expert has on average: sizes on the device are not known where this is asked.
constexpr Regime regime_of(int64_t num_rows, int64_t num_experts, bool aligned) {
  if (!aligned) return Regime::kUnaligned;
  const int64_t rows = ceil_div(num_rows, std::max<int64_t>(num_experts, 1));
  if (rows <= 16) return Regime::kFewRows;
  return rows <= 64 ? Regime::kSomeRows : Regime::kManyRows;
}

// Most tiles that ragged groups of together num_rows rows can need: each group with a row wastes less than one.
constexpr int64_t most_row_tiles(int64_t num_rows, int64_t num_experts, int tile_m) {
  return num_rows / tile_m + std::min(num_experts, num_rows);
}

// Into how many slices the depth of few rows is cut, so that every multiprocessor streams weights. A slice has at least
// as many steps as the pipeline is deep, or it would only fill it.
constexpr int depth_slices(const MatmulPolicy& policy, int64_t num_rows, int64_t num_experts, int64_t width,
                           int64_t depth, int sm_count) {
  const int64_t tiles = most_row_tiles(num_rows, num_experts, policy.tile_m) * ceil_div(width, policy.tile_n);
  const int64_t wanted = ceil_div(int64_t{sm_count} * policy.blocks_per_sm, std::max<int64_t>(tiles, 1));
  const int64_t possible = ceil_div(depth, policy.tile_k) / policy.stages;
  return static_cast<int>(std::clamp<int64_t>(std::min(wanted, possible), 1, 16));
}

constexpr const char* name_of(Arch arch) {
  constexpr const char* kNames[] = {"sm_80", "sm_90", "sm_100", "sm_120"};
  return kNames[static_cast<int>(arch)];
}
constexpr const char* name_of(Math math) {
  constexpr const char* kNames[] = {"bfloat16", "float16", "tf32", "float32"};
  return kNames[static_cast<int>(math)];
}
constexpr const char* name_of(Regime regime) {
  constexpr const char* kNames[] = {"few rows", "some rows", "many rows", "weight gradient", "unaligned"};
  return kNames[static_cast<int>(regime)];
}

inline std::ostream& operator<<(std::ostream& out, const MatmulPolicy& policy) {
  return out << policy.tile_m << " x " << policy.tile_n << " x " << policy.tile_k << ", " << policy.stages
             << " stages, " << policy.warps_m << " x " << policy.warps_n << " warps, at most " << policy.registers
             << " registers, " << policy.blocks_per_sm << " blocks per SM";
}

// The whole table, a line for each entry.
inline void print_policies(std::ostream& out) {
  for (const Arch arch : kAllArchs) {
    for (const Math math : kAllMaths) {
      for (const Regime regime : kAllRegimes) {
        const MatmulPolicy policy = matmul_policy(arch, math, regime);
        out << name_of(arch) << ", " << name_of(math) << ", " << name_of(regime) << ": " << policy << ", "
            << shared_bytes(policy, math) << " bytes of shared memory\n";
      }
    }
  }
}

}  // namespace dynamic_moe
