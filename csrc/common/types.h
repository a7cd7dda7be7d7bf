// SPDX-License-Identifier: Apache-2.0
// The words that every kernel's contract uses. Nothing here knows torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dynamic_moe {

enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Storage of the 16-bit types. Arithmetic is float32; conversions live in half.h.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Whether storage ends before float32 sums do: float16, at 65504. bfloat16 ends where float32 does, but for the last
// rounding.
template <class T>
inline constexpr bool kNarrowRange = false;
template <>
inline constexpr bool kNarrowRange<Float16> = true;

constexpr size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
  }
  return 0;
}

}  // namespace dynamic_moe
