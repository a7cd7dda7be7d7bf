// SPDX-License-Identifier: Apache-2.0
// What permutation and combine need of a single lane. Internal linkage throughout.
#pragma once

#include "common/simd/scalar.h"

namespace dynamic_moe {
namespace {

struct ScalarLanes {
  static constexpr int kWords = 1;  // int32 in a vector
  static uint32_t live_bits(const int32_t* ids, int count, int32_t num_experts) {
    return count > 0 && static_cast<uint32_t>(*ids) < static_cast<uint32_t>(num_experts);
  }
  static void store_unused(int32_t* rows, int count) {
    if (count > 0) *rows = -1;
  }
  static void fence() {}

  struct Float32 : ScalarLane {
    static Floats folded(Floats v) { return v; }
  };

  struct Float64 {
    using Floats = double;
    static constexpr int kLanes = 1;
    static Floats zero() { return 0; }
    static Floats broadcast(double v) { return v; }
    static Floats load(const double* p) { return *p; }
    static Floats load_first(const double* p, int count) { return count > 0 ? *p : 0; }
    static void store(double* p, Floats v) { *p = v; }
    static void store_first(double* p, Floats v, int count) {
      if (count > 0) *p = v;
    }
    static void stream(double* p, Floats v) { *p = v; }
    static Floats add(Floats a, Floats b) { return a + b; }
    static Floats mul(Floats a, Floats b) { return a * b; }
    static double folded(Floats v) { return v; }
  };
};

}  // namespace
}  // namespace dynamic_moe
