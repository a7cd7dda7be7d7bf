// SPDX-License-Identifier: Apache-2.0
// What gating needs of AVX-512 beyond common/simd: masks, sort keys, transposes. Internal linkage throughout.
#pragma once

#include "common/simd/avx512.h"

namespace dynamic_moe {
namespace {

struct Avx512Lanes : Avx512 {
  using Mask = __mmask16;

  static Words broadcast_word(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
  static Floats as_floats(Words v) { return _mm512_castsi512_ps(v); }
  static Words sub_words(Words a, Words b) { return _mm512_sub_epi32(a, b); }
  static Words add_words(Words a, Words b) { return _mm512_add_epi32(a, b); }
  static Words shift_left(Words v, int bits) { return _mm512_slli_epi32(v, static_cast<unsigned>(bits)); }
  static Words shift_right_signed(Words v, int bits) { return _mm512_srai_epi32(v, static_cast<unsigned>(bits)); }
  static Floats to_floats(Words v) { return _mm512_cvtepi32_ps(v); }
  static Words lane_numbers() { return _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
  static Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
  static Floats square_root(Floats v) { return _mm512_sqrt_ps(v); }
  // a[i] 2^n[i] for whole n[i] in [-252, 0], or NaN; the last nine bits of biased[i] are n[i] + 127.
  template <int kCount>
  [[gnu::always_inline]] static void scale_by_powers_of_two(Floats (&a)[kCount], const Floats (&n)[kCount],
                                                            const Floats (& /*biased*/)[kCount]) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) a[i] = scale_by_power_of_two(a[i], n[i]);
  }

  static Mask first_lanes(int count) { return first(count); }
  static Mask lanes(uint32_t bits) { return static_cast<Mask>(bits); }
  static uint32_t bits(Mask m) { return m; }
  static Mask at_least(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Mask more(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Mask negative(Words v) { return _mm512_movepi32_mask(v); }
  static Mask both(Mask a, Mask b) { return a & b; }
  static Mask but_not(Mask a, Mask b) { return a & static_cast<Mask>(~b); }
  static Floats select(Mask m, Floats yes, Floats no) { return _mm512_mask_blend_ps(m, no, yes); }
  static Words select(Mask m, Words yes, Words no) { return _mm512_mask_blend_epi32(m, no, yes); }

  // The first `count` values, `fill` behind them.
  static Floats load_or(const float* p, int count, Floats fill) { return _mm512_mask_loadu_ps(fill, first(count), p); }
  template <class T>
  static Floats load_or(const T* p, int count, Floats fill) {
    return _mm512_mask_blend_ps(first(count), fill, load_first(p, count));
  }
  static void store_words_first(int32_t* p, Words v, int count) { _mm512_mask_storeu_epi32(p, first(count), v); }

  // Around the cache, whole lines; p is aligned to a line.
  static void stream_words(int32_t* p, Words v) { _mm512_stream_si512(reinterpret_cast<__m512i*>(p), v); }

  [[gnu::always_inline]] static void transpose_floats(Floats (&r)[16]) {
    Words w[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) w[i] = _mm512_castps_si512(r[i]);
    transpose(w);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) r[i] = _mm512_castsi512_ps(w[i]);
  }

  // Sum in pairs of neighbours, then pairs of pairs: the order that every level keeps.
  static float sum_of_pairs(const Floats (&v)[1]) {
    Floats s = _mm512_add_ps(v[0], _mm512_permute_ps(v[0], 0xb1));
    s = _mm512_add_ps(s, _mm512_permute_ps(s, 0x4e));
    s = _mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0xb1));
    return _mm512_cvtss_f32(_mm512_add_ps(s, _mm512_shuffle_f32x4(s, s, 0x4e)));
  }

  static constexpr bool kCompresses = true;  // has append_if_at_least()
  // Appends the values that reach `least`, with their numbers counted from `first_number`; returns how many, and adds
  // them to `sum`. Writes a whole vector at either pointer.
  static int append_if_at_least(Floats v, Floats least, uint32_t first_number, float* values, int32_t* numbers,
                                Floats& sum) {
    const Mask kept = at_least(v, least);
    sum = _mm512_mask_add_ps(sum, kept, sum, v);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(kept, v));
    const Words number = _mm512_add_epi32(lane_numbers(), broadcast_word(first_number));
    _mm512_storeu_si512(numbers, _mm512_maskz_compress_epi32(kept, number));
    return __builtin_popcount(kept);
  }

  // A sort key is a double: above, the bits of a probability with the exponent's top bit set, so that the double is
  // normal and finite; below, the complement of the expert, so that of equal probabilities the lower index is greater.
  // The doubles order as the integers do, and min and max of doubles are single instructions on every level.
  using Keys = __m512d;
  static constexpr int kKeyParts = 2;  // vectors of keys for one vector of tokens
  static constexpr int kKeyLanes = 8;
  static Keys load_keys(const double* p) { return _mm512_load_pd(p); }
  static void store_keys(double* p, Keys v) { _mm512_store_pd(p, v); }
  static Keys larger(Keys a, Keys b) { return _mm512_max_pd(a, b); }
  static Keys smaller(Keys a, Keys b) { return _mm512_min_pd(a, b); }
  static void make_keys(Floats probability, Words expert, Keys (&keys)[2]) {
    const Words high = _mm512_or_si512(_mm512_castps_si512(probability), broadcast_word(0x40000000u));
    const Words low = _mm512_xor_si512(expert, broadcast_word(~0u));
    keys[0] = _mm512_castsi512_pd(_mm512_unpacklo_epi32(low, high));
    keys[1] = _mm512_castsi512_pd(_mm512_unpackhi_epi32(low, high));
  }
  static void split_keys(const Keys (&keys)[2], Floats& probability, Words& expert) {
    const Floats a = _mm512_castpd_ps(keys[0]), b = _mm512_castpd_ps(keys[1]);
    const Words high = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0xdd));
    const Words low = _mm512_castps_si512(_mm512_shuffle_ps(a, b, 0x88));
    probability = _mm512_castsi512_ps(_mm512_andnot_si512(broadcast_word(0x40000000u), high));
    expert = _mm512_xor_si512(low, broadcast_word(~0u));
  }
};

}  // namespace
}  // namespace dynamic_moe
