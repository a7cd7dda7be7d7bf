// SPDX-License-Identifier: Apache-2.0
// One random problem of the expert pass, how to run it, and what it should give. The oracle is one loop over rows in
// float64. It carries along the errors that the contract allows: the pre-activation, the activation and their gradients
// may be rounded to the storage type once, sums and elementwise functions are those of the accumulator. What the
// storage of the pre-activation has no room for is not rounded at all.
#pragma once

#include <ostream>
#include <vector>

#include "expert_mlp/expert_mlp.h"
#include "support/exact.h"
#include "support/ragged.h"

namespace dynamic_moe::testing {

struct Sizes {
  Load load;
  int64_t h, i;
};

inline std::ostream& operator<<(std::ostream& out, const Sizes& sizes) {
  return out << sizes.load.name << ", H " << sizes.h << ", I " << sizes.i;
}

// A number and how far the computed one may be off.
struct Number {
  double value, error;
};

// silu(g), silu'(g), how far the kernel's own may be off, and a bound of silu''.
struct Silu {
  double value, slope, error, slope_error, most_curvature;

  Silu(double g, const Precision& precision) {
    const double s = 1 / (1 + std::exp(-g));
    value = g * s;
    slope = s * (1 + g * (1 - s));
    // Relative to the sigmoid, which both have as a factor: near its zero the slope is a difference.
    error = (8 * precision.sum * s + precision.flush) * (1 + std::fabs(g));
    // From 40 on the sigmoid is 1 to the last bit.
    slope_error = g > 40 ? 8 * precision.sum : error;
    most_curvature = std::fabs(g) > 40 ? 0 : 0.5;
  }
};

template <class T>
struct ExpertPass {
  static constexpr Precision kPrecision = Storage<T>::kPrecision;
  using Accumulator = typename Storage<T>::Accumulator;

  int64_t h, i;
  Placement placement;
  Ragged ragged;
  Fenced<T> x, gate_up, down, dy, pre_activation;  // [T, H], [E, 2I, H], [E, H, I], [T, H], [R, 2I]
  Fenced<Accumulator> weights;                     // [T, K]

  ExpertPass(const Sizes& sizes, Random random, Placement where = Placement::kEndAtFence)
      : h(sizes.h),
        i(sizes.i),
        placement(where),
        ragged(sizes.load, random),
        x(random_values<T>(ragged.num_tokens * h, 1, random, where)),
        gate_up(
            random_values<T>(ragged.num_experts() * 2 * i * h, 1 / std::sqrt(static_cast<double>(h)), random, where)),
        down(random_values<T>(ragged.num_experts() * h * i, 2 / std::sqrt(static_cast<double>(i)), random, where)),
        dy(random_values<T>(ragged.num_tokens * h, 1 / std::sqrt(static_cast<double>(h)), random, where)),
        pre_activation(random_values<T>(ragged.num_rows * 2 * i, 1.5, random, where)),
        weights(random_values<Accumulator>(ragged.num_slots(), 1, random, where)) {
    for (Fenced<T>* input : {&x, &gate_up, &down, &dy, &pre_activation}) input->freeze();
    weights.freeze();
  }

  double scale(int64_t row) const { return weights[ragged.row_slot[row]]; }

  // Element j of the row's pre-activation [2I], as a sum.
  Sum projection(int64_t row, int64_t e, int64_t j) const {
    Sum sum;
    const int64_t token = ragged.token(row);
    for (int64_t k = 0; k < h; ++k) sum.add(value_of(gate_up[(e * 2 * i + j) * h + k]), value_of(x[token * h + k]));
    return sum;
  }

  // The same as the backward pass has it.
  Number kept(int64_t row, int64_t e, int64_t j) const {
    const double value = value_of(pre_activation[row * 2 * i + j]);
    return std::isinf(value) ? summed(projection(row, e, j)) : Number{value, 0};
  }

  struct Forward {
    Fenced<T> y, pre_activation;
  };
  Forward forward(bool keep = true) const {
    Forward out{Fenced<T>(ragged.num_tokens * h, placement), Fenced<T>(keep ? ragged.num_rows * 2 * i : 0, placement)};
    spoil_scratch();
    expert_mlp_cpu({.groups = ragged.groups(),
                    .row_slot = ragged.row_slot.data(),
                    .expert_weights = weights.data(),
                    .x = x.data(),
                    .gate_up_proj = gate_up.data(),
                    .down_proj = down.data(),
                    .pre_activation = keep ? out.pre_activation.data() : nullptr,
                    .y = out.y.data(),
                    .hidden_size = h,
                    .intermediate_size = i,
                    .dtype = Storage<T>::kDType});
    EXPECT_TRUE(out.y.surroundings_intact());
    EXPECT_TRUE(out.pre_activation.surroundings_intact());
    return out;
  }

  struct Needs {
    bool x = true, gate_up = true, down = true, weights = true;
  };
  struct Backward {
    Fenced<T> dx, d_gate_up, d_down;
    Fenced<Accumulator> d_weights;
  };
  Backward backward(const Needs& needs = {true, true, true, true}) const {
    Backward out{Fenced<T>(needs.x ? x.size() : 0, placement), Fenced<T>(needs.gate_up ? gate_up.size() : 0, placement),
                 Fenced<T>(needs.down ? down.size() : 0, placement),
                 Fenced<Accumulator>(needs.weights ? weights.size() : 0, placement)};
    spoil_scratch();
    expert_mlp_backward_cpu({.groups = ragged.groups(),
                             .row_slot = ragged.row_slot.data(),
                             .expert_weights = weights.data(),
                             .x = x.data(),
                             .gate_up_proj = gate_up.data(),
                             .down_proj = down.data(),
                             .pre_activation = pre_activation.data(),
                             .dy = dy.data(),
                             .dx = needs.x ? out.dx.data() : nullptr,
                             .d_gate_up_proj = needs.gate_up ? out.d_gate_up.data() : nullptr,
                             .d_down_proj = needs.down ? out.d_down.data() : nullptr,
                             .d_expert_weights = needs.weights ? out.d_weights.data() : nullptr,
                             .num_slots = ragged.num_slots(),
                             .hidden_size = h,
                             .intermediate_size = i,
                             .dtype = Storage<T>::kDType});
    EXPECT_TRUE(out.dx.surroundings_intact());
    EXPECT_TRUE(out.d_gate_up.surroundings_intact());
    EXPECT_TRUE(out.d_down.surroundings_intact());
    EXPECT_TRUE(out.d_weights.surroundings_intact());
    return out;
  }

  struct ExactForward {
    Exact y, pre_activation;
  };
  ExactForward exact_forward() const {
    ExactForward exact{{ragged.num_tokens * h, h}, {ragged.num_rows * 2 * i, 2 * i}};
    std::vector<Sum> y(static_cast<size_t>(ragged.num_tokens * h));
    std::vector<Number> pre(static_cast<size_t>(2 * i));
    std::vector<int64_t> terms(static_cast<size_t>(ragged.num_tokens));
    ragged.for_each_row([&](int64_t row, int64_t e) {
      const int64_t token = ragged.token(row);
      terms[static_cast<size_t>(token)] += i;
      for (int64_t j = 0; j < 2 * i; ++j) {
        const Sum sum = projection(row, e, j);
        Number& element = pre[static_cast<size_t>(j)] = summed(sum);
        const double in_storage = value_of(stored<T>(sum.value));
        if (!std::isinf(in_storage)) element.error += kPrecision.store_error(sum.value);
        exact.pre_activation.set(row * 2 * i + j, std::isinf(in_storage) ? in_storage : sum.value, element.error);
      }
      for (int64_t j = 0; j < i; ++j) {
        const Number a = swiglu(pre[static_cast<size_t>(j)], pre[static_cast<size_t>(i + j)]);
        for (int64_t n = 0; n < h; ++n) {
          y[static_cast<size_t>(token * h + n)].add(a.value, scale(row) * value_of(down[(e * h + n) * i + j]), a.error);
        }
      }
    });
    for (int64_t index = 0; index < ragged.num_tokens * h; ++index) {
      set(exact.y, index, y[static_cast<size_t>(index)], terms[static_cast<size_t>(index / h)]);
    }
    return exact;
  }

  struct ExactBackward {
    Exact dx, d_gate_up, d_down, d_weights;
  };
  ExactBackward exact_backward() const {
    const auto sums = [](int64_t count) { return std::vector<Sum>(static_cast<size_t>(count)); };
    std::vector<Sum> dx = sums(x.size()), d_gate_up = sums(gate_up.size()), d_down = sums(down.size());
    ExactBackward exact{{x.size(), h}, {gate_up.size(), h}, {down.size(), i}, {weights.size(), ragged.max_experts}};
    std::vector<Number> d_pre(static_cast<size_t>(2 * i));
    std::vector<int64_t> terms(static_cast<size_t>(ragged.num_tokens));
    double largest_scale = 0;
    ragged.for_each_row([&](int64_t row, int64_t) { largest_scale = std::max(largest_scale, std::fabs(scale(row))); });
    ragged.for_each_row([&](int64_t row, int64_t e) {
      const int64_t token = ragged.token(row);
      const double s = scale(row);
      terms[static_cast<size_t>(token)] += 2 * i;
      Sum d_weight;
      for (int64_t j = 0; j < i; ++j) {
        Sum d_scaled;  // of s a
        for (int64_t n = 0; n < h; ++n) {
          d_scaled.add(value_of(dy[token * h + n]), value_of(down[(e * h + n) * i + j]));
        }
        const double error = kPrecision.sum_error(h, d_scaled.magnitude);
        const Number gate = kept(row, e, j), up = kept(row, e, i + j);
        const Silu silu(gate.value, kPrecision);
        const Number a = product(silu_of(gate), up);
        d_weight.add(a.value, d_scaled.value, a.error);
        d_weight.variance += a.value * error * a.value * error;
        const Number d_activation{s * d_scaled.value, std::fabs(s) * error};
        const Number slope{silu.slope, silu.slope_error + silu.most_curvature * gate.error};
        d_pre[static_cast<size_t>(j)] = stored_product(d_activation, product(slope, up));
        d_pre[static_cast<size_t>(i + j)] = stored_product(d_activation, silu_of(gate));
        Number scaled = stored_product({s, 0}, a);
        scaled.error += 4 * largest_scale * kPrecision.smallest;  // float16 stores a part of it, so that it has room
        for (int64_t n = 0; n < h; ++n) {
          d_down[static_cast<size_t>((e * h + n) * i + j)].add(scaled.value, value_of(dy[token * h + n]), scaled.error);
        }
      }
      const double d_weight_error = kPrecision.sum_error(i, d_weight.magnitude) + d_weight.inherited_error() +
                                    kPrecision.sum * 4 * std::fabs(d_weight.value);
      exact.d_weights.set(ragged.row_slot[row], d_weight.value, d_weight_error);
      for (int64_t j = 0; j < 2 * i; ++j) {
        const Number d = d_pre[static_cast<size_t>(j)];
        for (int64_t k = 0; k < h; ++k) {
          const int64_t element = (e * 2 * i + j) * h + k;
          dx[static_cast<size_t>(token * h + k)].add(d.value, value_of(gate_up[element]), d.error);
          d_gate_up[static_cast<size_t>(element)].add(d.value, value_of(x[token * h + k]), d.error);
        }
      }
    });
    for (int64_t index = 0; index < x.size(); ++index) {
      set(exact.dx, index, dx[static_cast<size_t>(index)], terms[static_cast<size_t>(index / h)]);
    }
    for (int64_t index = 0; index < gate_up.size(); ++index) {
      const int64_t rows = ragged.load.rows[static_cast<size_t>(index / (2 * i * h))];
      set(exact.d_gate_up, index, d_gate_up[static_cast<size_t>(index)], rows);
    }
    for (int64_t index = 0; index < down.size(); ++index) {
      const int64_t rows = ragged.load.rows[static_cast<size_t>(index / (h * i))];
      set(exact.d_down, index, d_down[static_cast<size_t>(index)], rows);
    }
    return exact;
  }

 private:
  Number summed(const Sum& sum) const { return {sum.value, kPrecision.sum_error(h, sum.magnitude)}; }
  static Number silu_of(Number gate) {
    const Silu silu(gate.value, kPrecision);
    return {silu.value,
            silu.error + std::fabs(silu.slope) * gate.error + silu.most_curvature * gate.error * gate.error};
  }
  static Number product(Number a, Number b) {
    return {a.value * b.value, std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error};
  }
  // silu(g) u, stored.
  static Number swiglu(Number gate, Number up) { return stored_product(silu_of(gate), up); }
  static Number stored_product(Number a, Number b) {
    const Number whole = product(a, b);
    return {whole.value, whole.error + rounded(whole.value)};
  }
  // Of a few steps in the accumulator, then stored.
  static double rounded(double value) { return 4 * kPrecision.sum * std::fabs(value) + kPrecision.store_error(value); }
  static void set(Exact& exact, int64_t index, const Sum& sum, int64_t terms) {
    exact.set(index, sum.value,
              kPrecision.sum_error(terms, sum.magnitude) + sum.inherited_error() + kPrecision.store_error(sum.value));
  }
};

// buffer[index] = value(index)
template <class T, class Value>
void rewrite(Fenced<T>& buffer, const Value& value) {
  buffer.thaw();
  for (int64_t index = 0; index < buffer.size(); ++index) buffer[index] = value(index);
  buffer.freeze();
}

// A problem in float16 whose pre-activation leaves the range of float16 on every side, by column, while the activation
// stays within it; s a leaves it too. The products of a sum have one sign, so that the sums are where they should be.
inline ExpertPass<Float16> beyond_range(const Sizes& sizes, uint64_t seed, Placement where = Placement::kEndAtFence) {
  struct Column {
    double gate, up;
  };
  static constexpr Column kColumns[] = {{1, 1},       {1e5, 1e-3},  {-1e5, 1},    {-1e5, -1e5}, {1e-3, -1e5},
                                        {-1e-3, 1e5}, {66e3, 1e-2}, {0.1, -66e3}, {300, 100},   {-66e3, 66e3}};
  constexpr double kX = 8;
  ExpertPass<Float16> pass(sizes, Random(seed), where);
  Random random(seed);
  const auto near = [&](double value) { return stored<Float16>(value * (1 + random.value(0.1))); };
  rewrite(pass.x, [&](int64_t) { return near(kX); });
  rewrite(pass.gate_up, [&](int64_t index) {
    const int64_t row = index / pass.h, e = row / (2 * pass.i);
    const Column& wanted = kColumns[static_cast<size_t>(row % pass.i + e) % std::size(kColumns)];
    const bool is_gate = row / pass.i % 2 == 0;
    return near((is_gate ? wanted.gate : wanted.up) / (kX * static_cast<double>(pass.h)));
  });
  rewrite(pass.down, [&](int64_t index) { return stored<Float16>(1e-2 * value_of(pass.down[index])); });
  rewrite(pass.dy, [&](int64_t index) { return stored<Float16>(3e-2 * value_of(pass.dy[index])); });
  rewrite(pass.weights, [&](int64_t index) { return 2 * pass.weights[index]; });
  pass.pre_activation.thaw();
  pass.ragged.for_each_row([&](int64_t row, int64_t e) {
    for (int64_t j = 0; j < 2 * pass.i; ++j) {
      pass.pre_activation[row * 2 * pass.i + j] = stored<Float16>(pass.projection(row, e, j).value);
    }
  });
  pass.pre_activation.freeze();
  return pass;
}

}  // namespace dynamic_moe::testing
