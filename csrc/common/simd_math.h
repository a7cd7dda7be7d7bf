// SPDX-License-Identifier: Apache-2.0
// exp and log on the lanes of any CPU level. Every step is one correctly rounded operation (fused where it says fma),
// so all levels return the same bits. Included only by files of one level; the template argument has internal linkage.
#pragma once

namespace dynamic_moe {
namespace {

// exp(-d) underflows to 0 from here on.
constexpr float kLargestExponent = 104.0f;

// exp(-x) for 0 <= x <= kLargestExponent, within 1.1 ulp; exact for 0; underflows gradually; NaN stays NaN.
// Several vectors step by step together: one alone waits for itself, and the processor does not look ahead far enough
// to find the next.
template <class Lanes, int kCount>
[[gnu::always_inline]] inline void exp_of_negative(const typename Lanes::Floats (&x)[kCount],
                                                   typename Lanes::Floats (&result)[kCount]) {
  using L = Lanes;
  using Floats = typename L::Floats;
  constexpr float kLog2E = 0x1.715476p0f,
                  kRound = 0x1.8p23f + 127;  // adding it leaves the nearest integer, plus 127, in the last bits
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // kLn2High times an 8-bit integer is exact
  constexpr float kCoefficients[] = {0x1.6a23dp-10f,
                                     -0x1.123a2p-7f,
                                     0x1.5558f2p-5f,
                                     -0x1.555492p-3f,
                                     0x1.fffffcp-2f,
                                     -1.0f,
                                     1.0f};  // minimax: relative error 3.1e-9
  Floats biased[kCount], n[kCount], y[kCount];
  const auto each = [](const auto& step) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) step(i);
  };
  each([&](int i)
           __attribute__((always_inline)) { biased[i] = L::fma(x[i], L::broadcast(-kLog2E), L::broadcast(kRound)); });
  each([&](int i) __attribute__((always_inline)) { n[i] = L::sub(biased[i], L::broadcast(kRound)); });
  // exp(-x) = 2^n exp(-y), |y| <= log(2) / 2
  each([&](int i) __attribute__((always_inline)) { y[i] = L::fma(n[i], L::broadcast(kLn2High), x[i]); });
  each([&](int i) __attribute__((always_inline)) { y[i] = L::fma(n[i], L::broadcast(kLn2Low), y[i]); });
  each([&](int i) __attribute__((always_inline)) { result[i] = L::broadcast(kCoefficients[0]); });
#pragma GCC unroll 6
  for (int k = 1; k < 7; ++k)
    each([&](int i)
             __attribute__((always_inline)) { result[i] = L::fma(result[i], y[i], L::broadcast(kCoefficients[k])); });
  L::scale_by_powers_of_two(result, n, biased);
}

template <class Lanes>
inline typename Lanes::Floats exp_of_negative(typename Lanes::Floats x) {
  const typename Lanes::Floats one[1] = {x};
  typename Lanes::Floats result[1];
  exp_of_negative<Lanes, 1>(one, result);
  return result[0];
}

// log(x) for positive normal x, within 1 ulp (the polynomial is Cephes' logf).
template <class Lanes>
inline typename Lanes::Floats log_of_positive(typename Lanes::Floats x) {
  using L = Lanes;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const auto exponent = L::shift_right_signed(L::sub_words(L::as_words(x), L::broadcast_word(0x3f3504f3u)), 23);
  const auto mantissa = L::as_floats(L::sub_words(L::as_words(x), L::shift_left(exponent, 23)));
  const auto n = L::to_floats(exponent);  // x = 2^n (1 + f), sqrt(1/2) <= 1 + f < sqrt(2)
  const auto f = L::sub(mantissa, L::broadcast(1.0f));
  const auto f2 = L::mul(f, f);
  auto p = L::broadcast(7.0376836292e-2f);
  p = L::fma(p, f, L::broadcast(-1.1514610310e-1f));
  p = L::fma(p, f, L::broadcast(1.1676998740e-1f));
  p = L::fma(p, f, L::broadcast(-1.2420140846e-1f));
  p = L::fma(p, f, L::broadcast(1.4249322787e-1f));
  p = L::fma(p, f, L::broadcast(-1.6668057665e-1f));
  p = L::fma(p, f, L::broadcast(2.0000714765e-1f));
  p = L::fma(p, f, L::broadcast(-2.4999993993e-1f));
  p = L::fma(p, f, L::broadcast(3.3333331174e-1f));
  auto tail = L::mul(n, L::broadcast(kLn2Low));
  tail = L::fma(L::mul(f2, f), p, tail);
  tail = L::fma(f2, L::broadcast(-0.5f), tail);
  return L::fma(n, L::broadcast(kLn2High), L::add(f, tail));
}

}  // namespace
}  // namespace dynamic_moe
