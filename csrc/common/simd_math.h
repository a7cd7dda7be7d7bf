// SPDX-License-Identifier: Apache-2.0
// exp and log on the lanes of any CPU level. Every step is one correctly rounded operation (fused where it says fma),
// so all levels return the same bits. Included only by files of one level; the template argument has internal linkage.
#pragma once

namespace dynamic_moe {
namespace {

// exp(-d) underflows to 0 from here on.
constexpr float kLargestExponent = 104.0f;

// exp(-x) for 0 <= x <= kLargestExponent, within 1.1 ulp; exact for 0; underflows gradually; NaN stays NaN.
template <class Lanes>
inline typename Lanes::Floats exp_of_negative(typename Lanes::Floats x) {
  using L = Lanes;
  constexpr float kLog2E = 0x1.715476p0f,
                  kRound = 0x1.8p23f;  // adding kRound leaves the nearest integer in the last bits
  constexpr float kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;  // kLn2High times an 8-bit integer is exact
  const auto n = L::sub(L::fma(x, L::broadcast(-kLog2E), L::broadcast(kRound)), L::broadcast(kRound));
  auto y = L::fma(n, L::broadcast(kLn2High), x);  // exp(-x) = 2^n exp(-y), |y| <= log(2) / 2
  y = L::fma(n, L::broadcast(kLn2Low), y);
  auto p = L::broadcast(0x1.6a23dp-10f);  // minimax: relative error 3.1e-9
  p = L::fma(p, y, L::broadcast(-0x1.123a2p-7f));
  p = L::fma(p, y, L::broadcast(0x1.5558f2p-5f));
  p = L::fma(p, y, L::broadcast(-0x1.555492p-3f));
  p = L::fma(p, y, L::broadcast(0x1.fffffcp-2f));
  p = L::fma(p, y, L::broadcast(-1.0f));
  p = L::fma(p, y, L::broadcast(1.0f));
  return L::scale_by_power_of_two(p, n);
}

// log(x) for positive normal x, within 1 ulp (the polynomial is Cephes' logf); NaN stays NaN.
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
