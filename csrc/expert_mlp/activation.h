// SPDX-License-Identifier: Apache-2.0
// SwiGLU and its derivative, a vector at a time. Included only by *_cpu_<level>.cpp.
#pragma once

namespace dynamic_moe {
namespace {

// exp(x), 2 units in the last place, for x in [-104, 87] and its ends beyond; NaN stays NaN. The upper end keeps 1 +
// exp(x) and its reciprocal finite.
template <class Simd>
typename Simd::Floats exponential(typename Simd::Floats x) {
  using F = typename Simd::Floats;
  // min(constant, x) and max(constant, x) return x when it is NaN.
  const F bounded = Simd::max(Simd::broadcast(-104.0f), Simd::min(Simd::broadcast(87.0f), x));
  const F n = Simd::round(Simd::mul(bounded, Simd::broadcast(1.44269504f)));
  // x - n ln 2 in two steps: the first constant has few bits, so its product is exact.
  F r = Simd::fma(n, Simd::broadcast(-0.693359375f), bounded);
  r = Simd::fma(n, Simd::broadcast(2.12194440e-4f), r);
  F sum = Simd::broadcast(1.9875691500e-4f);
  sum = Simd::fma(sum, r, Simd::broadcast(1.3981999507e-3f));
  sum = Simd::fma(sum, r, Simd::broadcast(8.3334519073e-3f));
  sum = Simd::fma(sum, r, Simd::broadcast(4.1665795894e-2f));
  sum = Simd::fma(sum, r, Simd::broadcast(1.6666665459e-1f));
  sum = Simd::fma(sum, r, Simd::broadcast(5.0000001201e-1f));
  const F value = Simd::add(Simd::fma(Simd::mul(r, r), sum, r), Simd::broadcast(1.0f));
  return Simd::scale_by_power_of_two(value, n);
}

template <class Simd>
typename Simd::Floats sigmoid(typename Simd::Floats x) {
  return Simd::reciprocal(Simd::add(Simd::broadcast(1.0f), exponential<Simd>(Simd::sub(Simd::zero(), x))));
}

template <class Simd>
typename Simd::Floats swiglu(typename Simd::Floats gate, typename Simd::Floats up) {
  return Simd::mul(Simd::mul(gate, sigmoid<Simd>(gate)), up);
}

template <class Simd>
struct SwigluGradient {
  typename Simd::Floats activation, d_gate, d_up;

  // d: the gradient of silu(gate) * up
  SwigluGradient(typename Simd::Floats gate, typename Simd::Floats up, typename Simd::Floats d) {
    const typename Simd::Floats s = sigmoid<Simd>(gate);
    const typename Simd::Floats silu = Simd::mul(gate, s);
    activation = Simd::mul(silu, up);
    d_up = Simd::mul(d, silu);
    // silu' = s + silu (1 - s)
    const typename Simd::Floats slope = Simd::fma(silu, Simd::sub(Simd::broadcast(1.0f), s), s);
    d_gate = Simd::mul(Simd::mul(d, up), slope);
  }
};

}  // namespace
}  // namespace dynamic_moe
