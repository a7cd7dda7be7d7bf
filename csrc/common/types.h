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
