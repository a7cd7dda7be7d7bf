// SPDX-License-Identifier: Apache-2.0
// The oracle is the three products in float64, with a bound for each element.
#include <gtest/gtest.h>

#include <utility>

#include "common/parallel.h"
#include "float32_linear/float32_linear.h"
#include "support/exact.h"
#include "support/ragged.h"

namespace dynamic_moe::testing {
namespace {

constexpr Precision kFloat32 = Storage<float>::kPrecision;

// One random problem: inputs that cannot be written, outputs beside memory that may not be touched.
template <class T>
struct Linear {
  int64_t tokens, experts, hidden;
  Placement placement;
  Fenced<T> x;                     // [T, H]
  Fenced<float> weight, d_logits;  // [E, H], [T, E]

  Linear(int64_t t, int64_t e, int64_t h, Random random, Placement where = Placement::kEndAtFence)
      : tokens(t),
        experts(e),
        hidden(h),
        placement(where),
        x(random_values<T>(t * h, 1, random, where)),
        weight(random_values<float>(e * h, 1, random, where)),
        d_logits(random_values<float>(t * e, 1, random, where)) {
    x.freeze();
    weight.freeze();
    d_logits.freeze();
  }

  Fenced<float> forward() const {
    Fenced<float> logits(tokens * experts, placement);
    spoil_scratch();
    float32_linear_cpu({x.data(), weight.data(), logits.data(), tokens, experts, hidden, Storage<T>::kDType});
    EXPECT_TRUE(logits.surroundings_intact());
    return logits;
  }
  Fenced<T> dx() const {
    Fenced<T> out(tokens * hidden, placement);
    spoil_scratch();
    float32_linear_dx_cpu({d_logits.data(), weight.data(), out.data(), tokens, experts, hidden, Storage<T>::kDType});
    EXPECT_TRUE(out.surroundings_intact());
    return out;
  }
  Fenced<float> dw() const {
    Fenced<float> out(experts * hidden, placement);
    spoil_scratch();
    float32_linear_dw_cpu({d_logits.data(), x.data(), out.data(), tokens, experts, hidden, Storage<T>::kDType});
    EXPECT_TRUE(out.surroundings_intact());
    return out;
  }
};

// rows x columns sums over `depth` products factor(row, column, step), as they are stored with this precision.
template <class Factors>
Exact exact_sums(int64_t rows, int64_t columns, int64_t depth, const Precision& storage, const Factors& factors) {
  Exact exact(rows * columns, columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      Sum sum;
      for (int64_t step = 0; step < depth; ++step) {
        const auto [a, b] = factors(row, column, step);
        sum.add(a, b);
      }
      exact.set(row * columns + column, sum.value,
                kFloat32.sum_error(depth, sum.magnitude) + storage.store_error(sum.value));
    }
  }
  return exact;
}

template <class T>
void expect_exact(const Linear<T>& p) {
  using Pair = std::pair<double, double>;
  EXPECT_TRUE(matches(p.forward(), exact_sums(p.tokens, p.experts, p.hidden, kFloat32, [&](auto t, auto e, auto h) {
                        return Pair(value_of(p.x[t * p.hidden + h]), p.weight[e * p.hidden + h]);
                      })));
  EXPECT_TRUE(
      matches(p.dx(), exact_sums(p.tokens, p.hidden, p.experts, Storage<T>::kPrecision, [&](auto t, auto h, auto e) {
                return Pair(p.d_logits[t * p.experts + e], p.weight[e * p.hidden + h]);
              })));
  EXPECT_TRUE(matches(p.dw(), exact_sums(p.experts, p.hidden, p.tokens, kFloat32, [&](auto e, auto h, auto t) {
                        return Pair(p.d_logits[t * p.experts + e], value_of(p.x[t * p.hidden + h]));
                      })));
}

template <class T>
class Float32Linear : public ::testing::Test {};
using TokenTypes = ::testing::Types<float, BFloat16, Float16>;
TYPED_TEST_SUITE(Float32Linear, TokenTypes, StorageNames);

TYPED_TEST(Float32Linear, IsExactForAnyShape) {
  for (const int64_t tokens : {0, 1, 3, 33, 70}) {
    for (const int64_t experts : {1, 3, 8, 17, 65}) {
      for (const int64_t hidden : {1, 5, 16, 63, 300}) {
        SCOPED_TRACE(::testing::Message() << "T " << tokens << ", E " << experts << ", H " << hidden);
        expect_exact(Linear<TypeParam>(tokens, experts, hidden, Random(7)));
      }
    }
  }
  for (const Placement where : kPlacements) expect_exact(Linear<TypeParam>(9, 5, 37, Random(8), where));
}

TYPED_TEST(Float32Linear, GivesTheSameBitsWithAnyNumberOfThreadsAndATokenTheSameLogitsInAnyCompany) {
  const Linear<TypeParam> p(70, 17, 300, Random(9));
  const ThreadPool before = thread_pool();
  const auto logits = p.forward(), dw = p.dw();
  const auto dx = p.dx();
  for (const int threads : {2, 5}) {
    use_standard_threads(threads);
    EXPECT_TRUE(same_bits(p.forward(), logits));
    EXPECT_TRUE(same_bits(p.dx(), dx));
    EXPECT_TRUE(same_bits(p.dw(), dw));
  }
  set_thread_pool(before);
  for (int64_t token = 0; token < p.tokens; ++token) {
    Fenced<float> alone(p.experts);
    float32_linear_cpu({p.x.data() + token * p.hidden, p.weight.data(), alone.data(), 1, p.experts, p.hidden,
                        Storage<TypeParam>::kDType});
    EXPECT_TRUE(same_bits(
        alone.span(), logits.span().subspan(static_cast<size_t>(token * p.experts), static_cast<size_t>(p.experts))));
  }
}

}  // namespace
}  // namespace dynamic_moe::testing
