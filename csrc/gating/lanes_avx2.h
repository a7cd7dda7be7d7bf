// SPDX-License-Identifier: Apache-2.0
// What gating needs of AVX2 beyond common/simd; lanes_avx512.h explains the parts. Internal linkage throughout.
#pragma once

#include "common/simd/avx2.h"

namespace dynamic_moe {
namespace {

struct Avx2Lanes : Avx2 {
  using Mask = __m256;

  static Words broadcast_word(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
  static Floats as_floats(Words v) { return _mm256_castsi256_ps(v); }
  static Words sub_words(Words a, Words b) { return _mm256_sub_epi32(a, b); }
  static Words add_words(Words a, Words b) { return _mm256_add_epi32(a, b); }
  static Words shift_left(Words v, int bits) { return _mm256_slli_epi32(v, bits); }
  static Words shift_right_signed(Words v, int bits) { return _mm256_srai_epi32(v, bits); }
  static Floats to_floats(Words v) { return _mm256_cvtepi32_ps(v); }
  static Words lane_numbers() { return _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7); }
  static Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
  static Floats square_root(Floats v) { return _mm256_sqrt_ps(v); }
  // One factor does where the power is a normal number, which is nearly everywhere.
  template <int kCount>
  [[gnu::always_inline]] static void scale_by_powers_of_two(Floats (&a)[kCount], const Floats (&n)[kCount],
                                                            const Floats (&biased)[kCount]) {
    Floats least = n[0];
    for (int i = 1; i < kCount; ++i) least = min(least, n[i]);
    if (bits(at_least(least, broadcast(-126.0f))) == 0xff) [[likely]] {
      for (int i = 0; i < kCount; ++i) a[i] = mul(a[i], as_floats(shift_left(as_words(biased[i]), 23)));
    } else {
      for (int i = 0; i < kCount; ++i) a[i] = scale_by_power_of_two(a[i], n[i]);
    }
  }

  static Mask first_lanes(int count) { return as_floats(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane_numbers())); }
  static Mask lanes(uint32_t bits) {
    const Words one_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return as_floats(_mm256_cmpeq_epi32(_mm256_and_si256(broadcast_word(bits), one_bit), one_bit));
  }
  static uint32_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  static Mask at_least(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static Mask more(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static Mask negative(Words v) { return as_floats(_mm256_srai_epi32(v, 31)); }
  static Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
  static Mask but_not(Mask a, Mask b) { return _mm256_andnot_ps(b, a); }
  static Floats select(Mask m, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, m); }
  static Words select(Mask m, Words yes, Words no) {
    return _mm256_castps_si256(_mm256_blendv_ps(as_floats(no), as_floats(yes), m));
  }

  template <class T>
  static Floats load_or(const T* p, int count, Floats fill) {
    return _mm256_blendv_ps(fill, load_first(p, count), first_lanes(count));
  }
  static void store_words_first(int32_t* p, Words v, int count) {
    _mm256_maskstore_epi32(p, _mm256_castps_si256(first_lanes(count)), v);
  }

  static void stream_words(int32_t* p, Words v) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), v); }

  static void transpose_floats(Floats (&r)[8]) {
    Words w[8];
    for (int i = 0; i < 8; ++i) w[i] = _mm256_castps_si256(r[i]);
    transpose(w);
    for (int i = 0; i < 8; ++i) r[i] = _mm256_castsi256_ps(w[i]);
  }

  // r[i] is column i of eight rows of four; after it, rows i and i + 4.
  static void transpose_fours(Words (&r)[4]) {
    const Words a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
    const Words c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
    r[0] = _mm256_unpacklo_epi64(a, c);
    r[1] = _mm256_unpackhi_epi64(a, c);
    r[2] = _mm256_unpacklo_epi64(b, d);
    r[3] = _mm256_unpackhi_epi64(b, d);
  }
  // The first or the second four of v, then `rest`.
  static Words four_and_rest(Words v, bool second, Words rest) {
    if (second) v = _mm256_castsi128_si256(_mm256_extracti128_si256(v, 1));
    return _mm256_blend_epi32(v, rest, 0xf0);
  }

  static float sum_of_pairs(const Floats (&v)[2]) {
    const Floats pairs = _mm256_hadd_ps(v[0], v[1]);    // 01 23 89 1011 | 45 67 1213 1415
    const Floats fours = _mm256_hadd_ps(pairs, pairs);  // 0-3 8-11 .. | 4-7 12-15 ..
    const __m128 eights = _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1));
    return _mm_cvtss_f32(_mm_add_ss(eights, _mm_movehdup_ps(eights)));
  }

  static constexpr bool kCompresses = false;  // no instruction moves chosen lanes together

  using Keys = __m256d;
  static constexpr int kKeyParts = 2;
  static constexpr int kKeyLanes = 4;
  static Keys load_keys(const double* p) { return _mm256_load_pd(p); }
  static void store_keys(double* p, Keys v) { _mm256_store_pd(p, v); }
  static Keys larger(Keys a, Keys b) { return _mm256_max_pd(a, b); }
  static Keys smaller(Keys a, Keys b) { return _mm256_min_pd(a, b); }
  static void make_keys(Floats probability, Words expert, Keys (&keys)[2]) {
    const Words high = _mm256_or_si256(_mm256_castps_si256(probability), broadcast_word(0x40000000u));
    const Words low = _mm256_xor_si256(expert, broadcast_word(~0u));
    keys[0] = _mm256_castsi256_pd(_mm256_unpacklo_epi32(low, high));
    keys[1] = _mm256_castsi256_pd(_mm256_unpackhi_epi32(low, high));
  }
  static void split_keys(const Keys (&keys)[2], Floats& probability, Words& expert) {
    const Floats a = _mm256_castpd_ps(keys[0]), b = _mm256_castpd_ps(keys[1]);
    const Words high = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0xdd));
    const Words low = _mm256_castps_si256(_mm256_shuffle_ps(a, b, 0x88));
    probability = as_floats(_mm256_andnot_si256(broadcast_word(0x40000000u), high));
    expert = _mm256_xor_si256(low, broadcast_word(~0u));
  }
};

}  // namespace
}  // namespace dynamic_moe
