// SPDX-License-Identifier: Apache-2.0
// The oracle is float64; each element has a bound from the terms that were added up for it.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "cuda/support/device_buffer.h"
#include "permutation/permutation.h"
#include "support/exact.h"
#include "support/storage.h"

namespace dynamic_moe::testing {
namespace {

// Rows and slots of a combine, on the host and on the device. There are `spare` rows that no slot names; they are NaN.
template <class T>
struct Problem {
  int64_t num_tokens, max_experts, hidden_size, num_rows, num_live;
  std::vector<int32_t> slot_row;
  std::vector<T> rows, dy;
  std::vector<float> weights;

  Problem(int64_t tokens, int64_t experts, int64_t hidden, double used, unsigned seed, int64_t spare = 2)
      : num_tokens(tokens), max_experts(experts), hidden_size(hidden) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    std::bernoulli_distribution is_used(used);
    const auto num_slots = static_cast<size_t>(tokens * experts);
    slot_row.assign(num_slots, -1);
    weights.assign(num_slots, std::numeric_limits<float>::quiet_NaN());  // of an unused slot: nobody may read it
    std::vector<size_t> live;
    for (size_t slot = 0; slot < num_slots; ++slot) {
      if (!is_used(random)) continue;
      live.push_back(slot);
      weights[slot] = static_cast<float>(normal(random));
    }
    std::vector<int32_t> order(live.size());
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    for (size_t i = 0; i < live.size(); ++i) slot_row[live[i]] = order[i];
    num_live = static_cast<int64_t>(live.size());
    num_rows = num_live + spare;
    for (int64_t i = 0; i < num_live * hidden; ++i) rows.push_back(stored<T>(normal(random)));
    rows.resize(static_cast<size_t>(num_rows * hidden), stored<T>(std::numeric_limits<double>::quiet_NaN()));
    for (int64_t i = 0; i < tokens * hidden; ++i) dy.push_back(stored<T>(normal(random)));
  }

  double row(int64_t row, int64_t h) const { return value_of(rows[static_cast<size_t>(row * hidden_size + h)]); }
  double gradient(int64_t token, int64_t h) const { return value_of(dy[static_cast<size_t>(token * hidden_size + h)]); }
  // run(slot, row, weight) for the live slots of a token.
  template <class Run>
  void for_slots(int64_t token, bool weighted, const Run& run) const {
    for (int64_t slot = token * max_experts; slot < (token + 1) * max_experts; ++slot) {
      const auto i = static_cast<size_t>(slot);
      if (slot_row[i] >= 0) run(slot, int64_t{slot_row[i]}, weighted ? static_cast<double>(weights[i]) : 1.0);
    }
  }
};

template <class T>
std::vector<T> combine(const Problem<T>& problem, bool weighted, int64_t offset = 0) {
  const DeviceBuffer<T> rows(problem.rows, offset);
  const DeviceBuffer<float> weights(problem.weights, offset);
  const DeviceBuffer<int32_t> slot_row(problem.slot_row, offset);
  DeviceBuffer<T> y(problem.num_tokens * problem.hidden_size, offset);
  combine_cuda({.rows = rows.data(),
                .weights = weighted ? weights.data() : nullptr,
                .slot_row = slot_row.data(),
                .y = y.data(),
                .num_tokens = problem.num_tokens,
                .max_experts = static_cast<int32_t>(problem.max_experts),
                .hidden_size = problem.hidden_size,
                .dtype = Storage<T>::kDType},
               Stream{});
  return y.download();
}

template <class T>
struct Gradients {
  std::vector<T> rows;
  std::vector<float> weights;
};

template <class T>
Gradients<T> backward(const Problem<T>& problem, bool weighted, bool need_rows, bool need_weights, int64_t offset = 0) {
  const DeviceBuffer<T> dy(problem.dy, offset), rows(problem.rows, offset);
  const DeviceBuffer<float> weights(problem.weights, offset);
  const DeviceBuffer<int32_t> slot_row(problem.slot_row, offset);
  DeviceBuffer<T> d_rows(need_rows ? problem.num_rows * problem.hidden_size : 0, offset);
  DeviceBuffer<float> d_weights(need_weights ? problem.num_tokens * problem.max_experts : 0, offset);
  combine_backward_cuda({.dy = dy.data(),
                         .rows = need_weights ? rows.data() : nullptr,
                         .weights = weighted ? weights.data() : nullptr,
                         .slot_row = slot_row.data(),
                         .d_rows = need_rows ? d_rows.data() : nullptr,
                         .d_weights = need_weights ? d_weights.data() : nullptr,
                         .num_tokens = problem.num_tokens,
                         .max_experts = static_cast<int32_t>(problem.max_experts),
                         .hidden_size = problem.hidden_size,
                         .dtype = Storage<T>::kDType},
                        Stream{});
  return {d_rows.download(), d_weights.download()};
}

template <class T>
void expect_combine_matches(const Problem<T>& problem, bool weighted, int64_t offset = 0) {
  const Precision precision = Storage<T>::kPrecision;
  Exact exact(problem.num_tokens * problem.hidden_size, std::max<int64_t>(problem.hidden_size, 1));
  for (int64_t t = 0; t < problem.num_tokens; ++t) {
    for (int64_t h = 0; h < problem.hidden_size; ++h) {
      Sum sum;
      int64_t terms = 0;
      problem.for_slots(t, weighted, [&](int64_t, int64_t row, double weight) {
        sum.add(weight, problem.row(row, h));
        ++terms;
      });
      exact.set(t * problem.hidden_size + h, sum.value,
                precision.sum_error(terms, sum.magnitude) + precision.store_error(sum.value));
    }
  }
  EXPECT_TRUE(matches<T>(combine(problem, weighted, offset), exact));
}

template <class T>
void expect_backward_matches(const Problem<T>& problem, bool weighted, bool need_rows, bool need_weights,
                             int64_t offset = 0) {
  const Precision precision = Storage<T>::kPrecision;
  const Gradients<T> d = backward(problem, weighted, need_rows, need_weights, offset);
  Exact d_rows(problem.num_live * problem.hidden_size, std::max<int64_t>(problem.hidden_size, 1));
  Exact d_weights(problem.num_tokens * problem.max_experts, problem.max_experts);
  for (int64_t t = 0; t < problem.num_tokens; ++t) {
    problem.for_slots(t, weighted, [&](int64_t slot, int64_t row, double weight) {
      Sum dot;
      for (int64_t h = 0; h < problem.hidden_size; ++h) {
        const double d_row = weight * problem.gradient(t, h);
        dot.add(problem.gradient(t, h), problem.row(row, h));
        d_rows.set(row * problem.hidden_size + h, d_row,
                   precision.sum_error(1, std::fabs(d_row)) + precision.store_error(d_row));
      }
      d_weights.set(slot, dot.value, precision.sum_error(problem.hidden_size, dot.magnitude));
    });
  }
  if (need_rows) {
    const std::span<const T> all(d.rows);
    EXPECT_TRUE(matches<T>(all.first(d_rows.value.size()), d_rows));
    for (const T& spare : all.subspan(d_rows.value.size())) ASSERT_TRUE(std::isnan(value_of(spare)));  // left alone
  }
  if (need_weights) {
    EXPECT_TRUE(matches<float>(d.weights, d_weights));  // unused slots: exactly 0
  }
}

template <class T>
class CudaCombine : public ::testing::Test {};
using RowTypes = ::testing::Types<float, BFloat16, Float16>;
TYPED_TEST_SUITE(CudaCombine, RowTypes, StorageNames);

// Around vectors, and the one, two and four of them that a lane takes; 16-byte rows and others.
const std::vector<int64_t> kHiddenSizes = {1, 3, 8, 16, 17, 33, 128, 129, 256, 264, 512, 777, 1024, 1032, 2048, 2056};

TYPED_TEST(CudaCombine, SumsTheWeightedRowsOfEachToken) {
  for (const int64_t hidden_size : kHiddenSizes) {
    for (const int64_t max_experts : {1, 2, 5, 33, 70}) {
      for (const double used : {0.0, 0.3, 1.0}) {
        SCOPED_TRACE(::testing::Message() << "H " << hidden_size << " K " << max_experts << " used " << used);
        const Problem<TypeParam> problem(hidden_size > 300 ? 3 : 7, max_experts, hidden_size, used, 1);
        expect_combine_matches(problem, true);
        expect_combine_matches(problem, false);
      }
    }
  }
}

TYPED_TEST(CudaCombine, GradientsMatchForAnyShape) {
  for (const int64_t hidden_size : kHiddenSizes) {
    for (const int64_t max_experts : {1, 2, 5, 33, 70}) {
      SCOPED_TRACE(::testing::Message() << "H " << hidden_size << " K " << max_experts);
      const Problem<TypeParam> problem(hidden_size > 300 ? 3 : 7, max_experts, hidden_size, 0.4, 2);
      expect_backward_matches(problem, true, true, true);
      expect_backward_matches(problem, true, true, false);
      expect_backward_matches(problem, true, false, true);
      expect_backward_matches(problem, false, true, true);
    }
  }
}

TYPED_TEST(CudaCombine, AnyNumberOfTokensIsCovered) {
  for (const int64_t num_tokens : {1, 2, 3, 4, 5, 31, 64, 300}) {
    SCOPED_TRACE(::testing::Message() << "T " << num_tokens);
    const Problem<TypeParam> problem(num_tokens, 3, 40, 0.5, 3, 0);  // nothing lies behind the last row
    expect_combine_matches(problem, true);
    expect_backward_matches(problem, true, true, true);
  }
}

TYPED_TEST(CudaCombine, BuffersMayLieAnywhere) {
  for (const int64_t hidden_size : {8, 64, 130}) {
    const Problem<TypeParam> problem(9, 4, hidden_size, 0.6, 4);
    expect_combine_matches(problem, true, 1);
    expect_backward_matches(problem, true, true, true, 1);
  }
}

TYPED_TEST(CudaCombine, NoTokensAndNoElementsAreNoWork) {
  EXPECT_TRUE(combine(Problem<TypeParam>(0, 4, 16, 1.0, 5), true).empty());
  EXPECT_TRUE(combine(Problem<TypeParam>(4, 4, 0, 1.0, 5), true).empty());
  EXPECT_TRUE(backward(Problem<TypeParam>(0, 4, 16, 1.0, 5, 0), true, true, true).rows.empty());
  const auto d = backward(Problem<TypeParam>(4, 4, 0, 1.0, 5), true, true, true);
  EXPECT_EQ(d.weights, std::vector<float>(16, 0.0f));
}

TEST(CudaCombineLimits, Float64IsRefused) {
  const CombineParams params{.rows = nullptr,
                             .weights = nullptr,
                             .slot_row = nullptr,
                             .y = nullptr,
                             .num_tokens = 1,
                             .max_experts = 1,
                             .hidden_size = 1,
                             .dtype = DType::kFloat64};
  EXPECT_THROW(combine_cuda(params, Stream{}), std::invalid_argument);
}

#if defined(DYNAMIC_MOE_SIMT)

// 8 tokens, 2 rows each, 1024 bfloat16: 16 bytes of a lane are 512 of a warp, 2 KiB of a row are 64 sectors.
TEST(CudaCombineCost, EveryRowIsReadOnceInWholeSectors) {
  const Problem<BFloat16> problem(8, 2, 1024, 1.0, 6);
  const auto forward = simt::counters_of([&] { combine(problem, true); });
  EXPECT_EQ(forward.launches, 1u);
  EXPECT_EQ(forward.global_write_sectors, 8u * 64);
  EXPECT_EQ(forward.global_write_requests, 8u * 4);
  // A warp for each token; it reads its 2 slots and their weights.
  EXPECT_EQ(forward.global_read_sectors, 16u * 64 + 8 * 2);
  EXPECT_EQ(forward.global_read_requests, 16u * 4 + 8 * 2);
  EXPECT_EQ(forward.shared_read_requests + forward.shared_write_requests + forward.barriers + forward.atomics, 0u);
}

TEST(CudaCombineCost, BackwardReadsAndWritesEveryRowOnce) {
  const Problem<BFloat16> problem(8, 2, 1024, 1.0, 7);
  const auto counted = simt::counters_of([&] { backward(problem, true, true, true); });
  EXPECT_EQ(counted.global_write_sectors, 16u * 64 + 8);
  EXPECT_EQ(counted.global_read_sectors, 2u * 16 * 64 + 8 * 2);  // dy comes from the cache the second time
  EXPECT_EQ(counted.shuffles, 8u * 2 * (2 + 5));
  EXPECT_EQ(counted.shared_read_requests + counted.shared_write_requests + counted.barriers + counted.atomics, 0u);
}

#endif

}  // namespace
}  // namespace dynamic_moe::testing
