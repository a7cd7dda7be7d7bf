// SPDX-License-Identifier: Apache-2.0
// One random problem of the three products, how to run it, and what it should give.
#pragma once

#include <ostream>
#include <string>
#include <vector>

#include "grouped_matmul/grouped_matmul.h"
#include "support/exact.h"
#include "support/ragged.h"

namespace dynamic_moe::testing {

struct Shape {
  Load load;
  int64_t n, k;
};

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  return out << shape.load.name << (shape.load.gather ? "" : ", rows in place") << ", N " << shape.n << ", K "
             << shape.k;
}

template <class T>
struct Products {
  int64_t n, k;
  Placement placement;
  Ragged ragged;
  Fenced<T> x, weight, dy;  // [T, K], [E, N, K], [R, N]

  // Scales keep y, dx and dw near 1, so that float16 neither overflows nor falls below its normal numbers.
  Products(const Shape& shape, Random random, Placement where = Placement::kEndAtFence)
      : n(shape.n),
        k(shape.k),
        placement(where),
        ragged(shape.load, random),
        x(random_values<T>(ragged.num_tokens * k, 1, random, where)),
        weight(random_values<T>(ragged.num_experts() * n * k, 1 / std::sqrt(static_cast<double>(k)), random, where)),
        dy(random_values<T>(ragged.num_rows * n, 1, random, where)) {
    for (Fenced<T>* input : {&x, &weight, &dy}) input->freeze();
  }

  Fenced<T> forward() const {
    Fenced<T> y(ragged.num_rows * n, placement);
    spoil_scratch();
    grouped_matmul_cpu({ragged.groups(), x.data(), weight.data(), y.data(), n, k, Storage<T>::kDType});
    EXPECT_TRUE(y.surroundings_intact());
    return y;
  }
  Fenced<T> dx() const {
    Fenced<T> out(ragged.num_tokens * k, placement);
    spoil_scratch();
    grouped_matmul_dx_cpu({ragged.groups(), dy.data(), weight.data(), out.data(), n, k, Storage<T>::kDType});
    EXPECT_TRUE(out.surroundings_intact());
    return out;
  }
  Fenced<T> dw() const {
    Fenced<T> out(ragged.num_experts() * n * k, placement);
    spoil_scratch();
    grouped_matmul_dw_cpu({ragged.groups(), dy.data(), x.data(), out.data(), n, k, Storage<T>::kDType});
    EXPECT_TRUE(out.surroundings_intact());
    return out;
  }

  Exact exact_forward() const {
    Exact exact(ragged.num_rows * n, n);
    ragged.for_each_row([&](int64_t row, int64_t e) {
      for (int64_t i = 0; i < n; ++i) {
        Sum sum;
        for (int64_t j = 0; j < k; ++j) {
          sum.add(value_of(weight[(e * n + i) * k + j]), value_of(x[ragged.token(row) * k + j]));
        }
        set(exact, row * n + i, sum, k);
      }
    });
    return exact;
  }
  Exact exact_dx() const {
    std::vector<Sum> sums(static_cast<size_t>(ragged.num_tokens * k));
    std::vector<int64_t> terms(static_cast<size_t>(ragged.num_tokens));
    ragged.for_each_row([&](int64_t row, int64_t e) {
      const int64_t token = ragged.token(row);
      terms[static_cast<size_t>(token)] += n;
      for (int64_t i = 0; i < n; ++i) {
        const double gradient = value_of(dy[row * n + i]);
        for (int64_t j = 0; j < k; ++j) {
          sums[static_cast<size_t>(token * k + j)].add(gradient, value_of(weight[(e * n + i) * k + j]));
        }
      }
    });
    Exact exact(ragged.num_tokens * k, k);
    for (int64_t i = 0; i < ragged.num_tokens * k; ++i) {
      set(exact, i, sums[static_cast<size_t>(i)], terms[static_cast<size_t>(i / k)]);
    }
    return exact;
  }
  Exact exact_dw() const {
    std::vector<Sum> sums(static_cast<size_t>(ragged.num_experts() * n * k));
    ragged.for_each_row([&](int64_t row, int64_t e) {
      for (int64_t i = 0; i < n; ++i) {
        const double gradient = value_of(dy[row * n + i]);
        for (int64_t j = 0; j < k; ++j) {
          sums[static_cast<size_t>((e * n + i) * k + j)].add(gradient, value_of(x[ragged.token(row) * k + j]));
        }
      }
    });
    Exact exact(ragged.num_experts() * n * k, k);
    for (int64_t i = 0; i < ragged.num_experts() * n * k; ++i) {
      const int64_t rows = ragged.load.rows[static_cast<size_t>(i / (n * k))];
      set(exact, i, sums[static_cast<size_t>(i)], rows);
    }
    return exact;
  }

 private:
  static void set(Exact& exact, int64_t index, const Sum& sum, int64_t terms) {
    constexpr Precision kPrecision = Storage<T>::kPrecision;
    exact.set(index, sum.value, kPrecision.sum_error(terms, sum.magnitude) + kPrecision.store_error(sum.value));
  }
};

}  // namespace dynamic_moe::testing
