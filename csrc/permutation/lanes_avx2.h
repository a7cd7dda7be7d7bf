// SPDX-License-Identifier: Apache-2.0
// What permutation and combine need of AVX2 beyond common/simd. Internal linkage throughout.
#pragma once

#include "common/simd/avx2.h"

namespace dynamic_moe {
namespace {

struct Avx2PermutationLanes {
  static constexpr int kWords = 8;
  static __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static uint32_t live_bits(const int32_t* ids, int count, int32_t num_experts) {
    const __m256i in_row = first(count);
    const __m256i id = _mm256_maskload_epi32(ids, in_row);
    const __m256i last = _mm256_set1_epi32(num_experts - 1);  // unsigned: a negative id is a large one
    const __m256i live = _mm256_and_si256(_mm256_cmpeq_epi32(_mm256_min_epu32(id, last), id), in_row);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(live)));
  }
  static void store_unused(int32_t* rows, int count) {
    _mm256_maskstore_epi32(rows, first(count), _mm256_set1_epi32(-1));
  }
  static void fence() { _mm_sfence(); }

  struct Float32 : Avx2 {
    static float folded(Floats v) {
      const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
      const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
      return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
  };

  struct Float64 {
    using Floats = __m256d;
    static constexpr int kLanes = 4;
    static __m256i first(int count) {
      return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
    }
    static Floats zero() { return _mm256_setzero_pd(); }
    static Floats broadcast(double v) { return _mm256_set1_pd(v); }
    static Floats load(const double* p) { return _mm256_loadu_pd(p); }
    static Floats load_first(const double* p, int count) { return _mm256_maskload_pd(p, first(count)); }
    static void store(double* p, Floats v) { _mm256_storeu_pd(p, v); }
    static void store_first(double* p, Floats v, int count) { _mm256_maskstore_pd(p, first(count), v); }
    static void stream(double* p, Floats v) { _mm256_stream_pd(p, v); }
    static Floats add(Floats a, Floats b) { return _mm256_add_pd(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm256_mul_pd(a, b); }
    static double folded(Floats v) {
      const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
      return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
  };
};

}  // namespace
}  // namespace dynamic_moe
