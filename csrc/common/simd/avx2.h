// SPDX-License-Identifier: Apache-2.0
// Eight float32 lanes (AVX2, FMA, F16C). Included only by files compiled for that level: internal linkage throughout.
#pragma once

#include <immintrin.h>

#include "common/types.h"

namespace dynamic_moe {
namespace {

struct Avx2 {
  using Floats = __m256;
  using Words = __m256i;
  static constexpr int kLanes = 8;
  static constexpr bool kDotsBFloat16 = false;

  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats broadcast(float value) { return _mm256_set1_ps(value); }

  static Floats load(const float* p) { return _mm256_loadu_ps(p); }
  static Words load_words(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static Floats load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static Floats load(const Float16* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }

  // 16 elements, of bfloat16 those at even places, then those at odd ones: two operations instead of four.
  static void load_two(const BFloat16* p, Floats& even, Floats& odd) {
    const __m256i pairs = load_words(p);
    even = _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
  }
  static void load_two(const Float16* p, Floats& first, Floats& second) {
    first = load(p);
    second = load(p + kLanes);
  }

  static void store(float* p, Floats v) { _mm256_storeu_ps(p, v); }
  static void store_words(void* p, Words v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  static void store(BFloat16* p, Floats v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
  static void store(Float16* p, Floats v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // Around the cache; p is aligned to the vector as it is stored. A fence before others may read it.
  static void stream(float* p, Floats v) { _mm256_stream_ps(p, v); }
  static void stream(BFloat16* p, Floats v) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v)); }
  static void stream(Float16* p, Floats v) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void fence() { _mm_sfence(); }

  static Floats load_first(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
  template <class T>
  static Floats load_first(const T* p, int count) {
    T whole[kLanes] = {};
    __builtin_memcpy(whole, p, static_cast<size_t>(count) * sizeof(T));
    return load(whole);
  }
  static void store_first(float* p, Floats v, int count) { _mm256_maskstore_ps(p, first(count), v); }
  template <class T>
  static void store_first(T* p, Floats v, int count) {
    T whole[kLanes];
    store(whole, v);
    __builtin_memcpy(p, whole, static_cast<size_t>(count) * sizeof(T));
  }

  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats reciprocal(Floats a) { return _mm256_div_ps(_mm256_set1_ps(1.0f), a); }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
  static Floats round(Floats a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // For exponents in [-252, 254]: two factors, so that neither leaves the range of normal numbers.
  static Floats scale_by_power_of_two(Floats a, Floats exponent) {
    const __m256i whole = _mm256_cvtps_epi32(exponent);
    const __m256i half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(a, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
  }
  static float sum(Floats a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  static bool any_infinite(Floats a) {
    const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a);
    return _mm256_movemask_ps(_mm256_cmp_ps(magnitude, _mm256_set1_ps(__builtin_inff()), _CMP_EQ_OQ)) != 0;
  }

  // The four sums side by side.
  static void store_sums(float* p, Floats a, Floats b, Floats c, Floats d) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
  }

  // 8 rows of 8 words, in place.
  static void transpose(Words (&r)[8]) {
    Words t[8];
    for (int i = 0; i < 4; ++i) {
      t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 2; ++i) {
      r[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    // Not permute2x128: where vector units are 128 bits wide it is eight operations.
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm256_inserti128_si256(r[i], _mm256_castsi256_si128(r[i + 4]), 1);
      t[i + 4] = _mm256_blend_epi32(r[i + 4], _mm256_castsi128_si256(_mm256_extracti128_si256(r[i], 1)), 0x0f);
    }
    for (int i = 0; i < 8; ++i) r[i] = t[i];
  }

  static Words as_words(Floats v) { return _mm256_castps_si256(v); }

 private:
  static __m256i first(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m256 power_of_two(__m256i exponent) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23));
  }
  static __m128i narrow_bf16(Floats v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i kept = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
  }
};

}  // namespace
}  // namespace dynamic_moe
