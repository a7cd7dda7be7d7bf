// SPDX-License-Identifier: Apache-2.0
// Sixteen float32 lanes. Included only by files compiled for an AVX-512 level: everything has internal linkage.
#pragma once

#include <immintrin.h>

#include "common/types.h"

namespace dynamic_moe {
namespace {

struct Avx512 {
  using Floats = __m512;
  using Words = __m512i;
  static constexpr int kLanes = 16;
  static constexpr bool kDotsBFloat16 = false;

  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats broadcast(float value) { return _mm512_set1_ps(value); }
  static Words broadcast_word(uint32_t value) { return _mm512_set1_epi32(static_cast<int>(value)); }

  static Floats load(const float* p) { return _mm512_loadu_ps(p); }
  static Words load_words(const void* p) { return _mm512_loadu_si512(p); }
  static Floats load(const BFloat16* p) { return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Floats load(const Float16* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }

  template <class T>
  static void load_two(const T* p, Floats& first, Floats& second) {
    first = load(p);
    second = load(p + kLanes);
  }

  static void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
  static void store_words(void* p, Words v) { _mm512_storeu_si512(p, v); }
  static void store(BFloat16* p, Floats v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
  static void store(Float16* p, Floats v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  // Around the cache; p is aligned to the vector as it is stored. A fence before others may read it.
  static void stream(float* p, Floats v) { _mm512_stream_ps(p, v); }
  static void stream(BFloat16* p, Floats v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(v)); }
  static void stream(Float16* p, Floats v) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  static void fence() { _mm_sfence(); }

  static Floats load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static Floats load_first(const BFloat16* p, int count) {
    return widen_bf16(_mm256_maskz_loadu_epi16(first(count), p));
  }
  static Floats load_first(const Float16* p, int count) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), p));
  }
  static void store_first(float* p, Floats v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
  static void store_first(BFloat16* p, Floats v, int count) {
    _mm256_mask_storeu_epi16(p, first(count), narrow_bf16(v));
  }
  static void store_first(Float16* p, Floats v, int count) {
    _mm256_mask_storeu_epi16(p, first(count), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  // For normal numbers whose reciprocal is normal: 14 bits, doubled by a step of Newton's.
  static Floats reciprocal(Floats a) {
    const Floats guess = _mm512_rcp14_ps(a);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(a, guess, _mm512_set1_ps(2.0f)));
  }
  static Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  static Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
  static Floats round(Floats a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static Floats scale_by_power_of_two(Floats a, Floats exponent) { return _mm512_scalef_ps(a, exponent); }
  static float sum(Floats a) { return _mm512_reduce_add_ps(a); }
  static bool any_infinite(Floats a) {
    constexpr int kInfinity = 0x18;  // of either sign
    return _mm512_fpclass_ps_mask(a, kInfinity) != 0;
  }

  // The four sums side by side.
  static void store_sums(float* p, Floats a, Floats b, Floats c, Floats d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
  }

  // [low[0], high[0]], [low[1], high[1]], ... of 16 bfloat16 each: one 32-bit word per column.
  static Words pair(const BFloat16* low, const BFloat16* high) {
    return pair_words(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)));
  }
  static Words pair_first(const BFloat16* low, const BFloat16* high, int count) {
    return pair_words(_mm256_maskz_loadu_epi16(first(count), low), _mm256_maskz_loadu_epi16(first(count), high));
  }

  // 16 rows of 16 words, in place.
  [[gnu::always_inline]] static void transpose(Words (&r)[16]) {
    Words t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
      t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
      r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
      r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
      t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
      t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
      t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
      r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    }
  }

  static Words as_words(Floats v) { return _mm512_castps_si512(v); }

 protected:
  static __mmask16 first(int count) { return static_cast<__mmask16>((1u << count) - 1u); }
  static Floats widen_bf16(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }
  static Words pair_words(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  // Round to nearest even; a NaN keeps its sign and gets the quiet bit.
  static __m256i narrow_bf16(Floats v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i kept = _mm512_mask_or_epi32(rounded, is_nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
  }
};

#ifdef __AVX512BF16__
// Adds the products of bfloat16 pairs: half the instructions of widening first.
struct Avx512Bf16 : Avx512 {
  static constexpr bool kDotsBFloat16 = true;

  static Floats dot_pairs(Floats sum, Words a, Words b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
};
#endif

}  // namespace
}  // namespace dynamic_moe
