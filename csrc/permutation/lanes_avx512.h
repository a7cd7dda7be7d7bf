// SPDX-License-Identifier: Apache-2.0
// What permutation and combine need of AVX-512 beyond common/simd. Internal linkage throughout.
#pragma once

#include "common/simd/avx512.h"

namespace dynamic_moe {
namespace {

struct Avx512PermutationLanes {
  static constexpr int kWords = 16;
  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
  static uint32_t live_bits(const int32_t* ids, int count, int32_t num_experts) {
    const __m512i id = _mm512_maskz_loadu_epi32(first(count), ids);  // unsigned: a negative id is a large one
    return _mm512_mask_cmplt_epu32_mask(first(count), id, _mm512_set1_epi32(num_experts));
  }
  static void store_unused(int32_t* rows, int count) {
    _mm512_mask_storeu_epi32(rows, first(count), _mm512_set1_epi32(-1));
  }
  static void fence() { _mm_sfence(); }

  struct Float32 : Avx512 {
    static float folded(Floats v) {
      const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
      const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
      const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
      return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
  };

  struct Float64 {
    using Floats = __m512d;
    static constexpr int kLanes = 8;
    static __mmask8 first(int count) { return static_cast<__mmask8>((1u << count) - 1u); }
    static Floats zero() { return _mm512_setzero_pd(); }
    static Floats broadcast(double v) { return _mm512_set1_pd(v); }
    static Floats load(const double* p) { return _mm512_loadu_pd(p); }
    static Floats load_first(const double* p, int count) { return _mm512_maskz_loadu_pd(first(count), p); }
    static void store(double* p, Floats v) { _mm512_storeu_pd(p, v); }
    static void store_first(double* p, Floats v, int count) { _mm512_mask_storeu_pd(p, first(count), v); }
    static void stream(double* p, Floats v) { _mm512_stream_pd(p, v); }
    static Floats add(Floats a, Floats b) { return _mm512_add_pd(a, b); }
    static Floats mul(Floats a, Floats b) { return _mm512_mul_pd(a, b); }
    static double folded(Floats v) {
      const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(v), _mm512_extractf64x4_pd(v, 1));
      const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
      return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
    }
  };
};

}  // namespace
}  // namespace dynamic_moe
