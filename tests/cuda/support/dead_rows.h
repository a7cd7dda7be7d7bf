// SPDX-License-Identifier: Apache-2.0
// Rows that the buffers have and no group: what num_rows being an upper bound means.
#pragma once

#include <cstring>
#include <vector>

#include "support/fenced.h"

namespace dynamic_moe::testing {

inline constexpr int64_t kDeadRows = 3;

// The values and, behind them, elements that nobody may read: bytes of 0xff, which is NaN in every type and -1 as an
// index.
template <class T>
std::vector<T> copied(const Fenced<T>& values, int64_t dead = 0) {
  T nobodys;
  std::memset(&nobodys, 0xff, sizeof nobodys);
  std::vector<T> copy(values.span().begin(), values.span().end());
  copy.resize(copy.size() + static_cast<size_t>(dead), nobodys);
  return copy;
}

}  // namespace dynamic_moe::testing
