// SPDX-License-Identifier: Apache-2.0
// The oracle is float64; each element has a bound from the terms that were added up for it.
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <random>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "permutation/permutation.h"
#include "support/fenced.h"
#include "support/storage.h"

namespace dynamic_moe::testing {
namespace {

template <class T>
struct Problem {
  using Real = typename Storage<T>::Accumulator;
  int64_t num_tokens, max_experts, hidden_size, num_rows = 0;
  Fenced<int32_t> slot_row;
  Fenced<T> rows, dy;
  Fenced<Real> weights;
};

template <class T>
Problem<T> random_problem(int64_t num_tokens, int64_t max_experts, int64_t hidden_size, double used, unsigned seed) {
  using Real = typename Storage<T>::Accumulator;
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  std::bernoulli_distribution is_used(used);
  const int64_t num_slots = num_tokens * max_experts;
  Problem<T> problem{num_tokens,
                     max_experts,
                     hidden_size,
                     0,
                     Fenced<int32_t>(num_slots),
                     Fenced<T>(0),
                     Fenced<T>(0),
                     Fenced<Real>(num_slots)};
  std::vector<int32_t> live;
  for (int64_t slot = 0; slot < num_slots; ++slot) {
    problem.slot_row[slot] = -1;
    problem.weights[slot] = std::numeric_limits<Real>::quiet_NaN();  // of an unused slot: nobody may read it
    if (!is_used(random)) continue;
    live.push_back(static_cast<int32_t>(slot));
    problem.weights[slot] = static_cast<Real>(normal(random));
  }
  std::vector<int32_t> order(live.size());
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (size_t i = 0; i < live.size(); ++i) problem.slot_row[live[i]] = order[i];
  problem.num_rows = static_cast<int64_t>(live.size());
  const auto fill = [&](int64_t count) {
    Fenced<T> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = stored<T>(normal(random));
    values.freeze();
    return values;
  };
  problem.rows = fill(problem.num_rows * hidden_size);
  problem.dy = fill(num_tokens * hidden_size);
  problem.slot_row.freeze();
  problem.weights.freeze();
  return problem;
}

template <class T>
Fenced<T> combine(const Problem<T>& problem, bool weighted) {
  Fenced<T> y(problem.num_tokens * problem.hidden_size);
  combine_cpu({.rows = problem.rows.data(),
               .weights = weighted ? problem.weights.data() : nullptr,
               .slot_row = problem.slot_row.data(),
               .y = y.data(),
               .num_tokens = problem.num_tokens,
               .max_experts = static_cast<int32_t>(problem.max_experts),
               .hidden_size = problem.hidden_size,
               .dtype = Storage<T>::kDType});
  EXPECT_TRUE(y.surroundings_intact());
  return y;
}

template <class T>
struct Gradients {
  Fenced<T> rows;
  Fenced<typename Storage<T>::Accumulator> weights;
};

template <class T>
Gradients<T> backward(const Problem<T>& problem, bool weighted, bool need_rows, bool need_weights) {
  Gradients<T> d{Fenced<T>(need_rows ? problem.num_rows * problem.hidden_size : 0),
                 Fenced<typename Storage<T>::Accumulator>(need_weights ? problem.num_tokens * problem.max_experts : 0)};
  combine_backward_cpu({.dy = problem.dy.data(),
                        .rows = need_weights ? problem.rows.data() : nullptr,
                        .weights = weighted ? problem.weights.data() : nullptr,
                        .slot_row = problem.slot_row.data(),
                        .d_rows = need_rows ? d.rows.data() : nullptr,
                        .d_weights = need_weights ? d.weights.data() : nullptr,
                        .num_tokens = problem.num_tokens,
                        .max_experts = static_cast<int32_t>(problem.max_experts),
                        .hidden_size = problem.hidden_size,
                        .dtype = Storage<T>::kDType});
  EXPECT_TRUE(d.rows.surroundings_intact());
  EXPECT_TRUE(d.weights.surroundings_intact());
  return d;
}

template <class T>
void expect_combine_matches(const Problem<T>& problem, bool weighted) {
  const Precision precision = Storage<T>::kPrecision;
  const Fenced<T> y = combine(problem, weighted);
  for (int64_t t = 0; t < problem.num_tokens; ++t) {
    for (int64_t h = 0; h < problem.hidden_size; ++h) {
      double sum = 0, magnitude = 0;
      int64_t terms = 0;
      for (int64_t slot = t * problem.max_experts; slot < (t + 1) * problem.max_experts; ++slot) {
        if (problem.slot_row[slot] < 0) continue;
        const double term = (weighted ? static_cast<double>(problem.weights[slot]) : 1.0) *
                            value_of(problem.rows[problem.slot_row[slot] * problem.hidden_size + h]);
        sum += term;
        magnitude += std::fabs(term);
        ++terms;
      }
      ASSERT_NEAR(value_of(y[t * problem.hidden_size + h]), sum,
                  precision.sum_error(terms, magnitude) + precision.store_error(sum))
          << "token " << t << " element " << h;
    }
  }
}

template <class T>
void expect_backward_matches(const Problem<T>& problem, bool weighted, bool need_rows, bool need_weights) {
  const Precision precision = Storage<T>::kPrecision;
  const Gradients<T> d = backward(problem, weighted, need_rows, need_weights);
  for (int64_t slot = 0; slot < problem.num_tokens * problem.max_experts; ++slot) {
    const int64_t row = problem.slot_row[slot] * problem.hidden_size;
    const int64_t dy = slot / problem.max_experts * problem.hidden_size;
    if (row < 0) {
      if (need_weights) {
        ASSERT_EQ(d.weights[slot], 0);
      }
      continue;
    }
    double dot = 0, magnitude = 0;
    for (int64_t h = 0; h < problem.hidden_size; ++h) {
      const double gradient = value_of(problem.dy[dy + h]);
      dot += gradient * value_of(problem.rows[row + h]);
      magnitude += std::fabs(gradient * value_of(problem.rows[row + h]));
      if (!need_rows) continue;
      const double d_row = (weighted ? static_cast<double>(problem.weights[slot]) : 1.0) * gradient;
      ASSERT_NEAR(value_of(d.rows[row + h]), d_row,
                  precision.sum_error(1, std::fabs(d_row)) + precision.store_error(d_row));
    }
    if (need_weights) {
      ASSERT_NEAR(d.weights[slot], dot, precision.sum_error(problem.hidden_size, magnitude)) << "slot " << slot;
    }
  }
}

template <class T>
class Combine : public ::testing::Test {};
using StorageTypes = ::testing::Types<float, BFloat16, Float16, double>;
TYPED_TEST_SUITE(Combine, StorageTypes);

TYPED_TEST(Combine, SumsTheWeightedRowsOfEachToken) {
  for (const int64_t hidden_size : {1, 3, 8, 15, 17, 64, 100, 128, 129, 300}) {
    for (const int64_t max_experts : {1, 2, 5, 16, 19}) {
      for (const double used : {0.0, 0.3, 1.0}) {
        SCOPED_TRACE(::testing::Message() << "H " << hidden_size << " K " << max_experts << " used " << used);
        const auto problem = random_problem<TypeParam>(11, max_experts, hidden_size, used, 1);
        expect_combine_matches(problem, true);
        expect_combine_matches(problem, false);
      }
    }
  }
}

TYPED_TEST(Combine, ATokenWithoutRowsIsZero) {
  const auto problem = random_problem<TypeParam>(5, 3, 70, 0.0, 2);
  const auto y = combine(problem, true);
  for (const TypeParam& value : y.span()) ASSERT_EQ(value_of(value), 0);
}

TYPED_TEST(Combine, GradientsMatchForAnyShape) {
  for (const int64_t hidden_size : {1, 3, 8, 15, 17, 64, 100, 128, 129, 300}) {
    for (const int64_t max_experts : {1, 2, 5, 16, 19}) {
      SCOPED_TRACE(::testing::Message() << "H " << hidden_size << " K " << max_experts);
      const auto problem = random_problem<TypeParam>(9, max_experts, hidden_size, 0.4, 3);
      expect_backward_matches(problem, true, true, true);
      expect_backward_matches(problem, true, true, false);
      expect_backward_matches(problem, true, false, true);
      expect_backward_matches(problem, false, true, true);
    }
  }
}

TYPED_TEST(Combine, NoTokensAndNoElementsAreNoWork) {
  EXPECT_EQ(combine(random_problem<TypeParam>(0, 4, 16, 1.0, 4), true).size(), 0);
  EXPECT_EQ(combine(random_problem<TypeParam>(4, 4, 0, 1.0, 4), true).size(), 0);
  EXPECT_EQ(backward(random_problem<TypeParam>(0, 4, 16, 1.0, 4), true, true, true).rows.size(), 0);
  const auto d = backward(random_problem<TypeParam>(4, 4, 0, 1.0, 4), true, true, true);
  ASSERT_EQ(d.weights.size(), 16);
  for (const auto value : d.weights.span()) EXPECT_EQ(value, 0);
}

TYPED_TEST(Combine, IsTheSameOnAnyNumberOfThreadsAndEveryCpuLevel) {
  const auto problem = random_problem<TypeParam>(700, 6, 333, 0.4, 5);
  set_isa(Isa::kScalar);
  const auto y = combine(problem, true);
  const auto d = backward(problem, true, true, true);
  for (const Isa isa : supported_isas()) {
    set_isa(isa);
    for (const int threads : {1, 2, 3, 7}) {
      use_standard_threads(threads);
      EXPECT_TRUE(same_bits(combine(problem, true), y)) << isa_name(isa) << " threads " << threads;
      const auto other = backward(problem, true, true, true);
      EXPECT_TRUE(same_bits(other.rows, d.rows)) << isa_name(isa) << " threads " << threads;
      EXPECT_TRUE(same_bits(other.weights, d.weights)) << isa_name(isa) << " threads " << threads;
    }
  }
  use_standard_threads(1);
  reset_isa();
}

// Results of 8 MiB and more are written around the cache.
TYPED_TEST(Combine, LargeResultsAreTheSameAsSmallOnes) {
  const int64_t hidden_size = 1024;
  const int64_t num_tokens = (int64_t{17} << 20) / (hidden_size * static_cast<int64_t>(sizeof(TypeParam)));
  const auto problem = random_problem<TypeParam>(num_tokens, 1, hidden_size, 0.9, 6);
  use_standard_threads(2);
  const auto y = combine(problem, true);
  const auto d = backward(problem, true, true, true);
  use_standard_threads(1);
  for (int64_t t = 0; t < num_tokens; ++t) {
    const int64_t row = problem.slot_row[t];
    double dot = 0;
    for (int64_t h = 0; h < hidden_size; ++h) {
      const int64_t i = t * hidden_size + h;
      const auto weighted = [&](const TypeParam& value) {
        using Real = typename Storage<TypeParam>::Accumulator;
        return value_of(
            stored<TypeParam>(static_cast<double>(problem.weights[t] * static_cast<Real>(value_of(value)))));
      };
      if (row < 0) {
        ASSERT_EQ(value_of(y[i]), 0);
        continue;
      }
      ASSERT_EQ(value_of(y[i]), weighted(problem.rows[row * hidden_size + h]));
      ASSERT_EQ(value_of(d.rows[row * hidden_size + h]), weighted(problem.dy[i]));
      dot += value_of(problem.dy[i]) * value_of(problem.rows[row * hidden_size + h]);
    }
    if (row >= 0) {
      ASSERT_NEAR(d.weights[t], dot, 1e-2);
    }
  }
}

}  // namespace
}  // namespace dynamic_moe::testing
