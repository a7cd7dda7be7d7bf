// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <mutex>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

namespace dynamic_moe {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::ThrowsMessage;

// Gives every test standard threads and puts the pool back that was there before.
class Parallel : public ::testing::TestWithParam<int> {
 protected:
  void SetUp() override { use_standard_threads(GetParam()); }
  void TearDown() override { set_thread_pool(before_); }

 private:
  ThreadPool before_ = thread_pool();
};
INSTANTIATE_TEST_SUITE_P(Threads, Parallel, ::testing::Values(1, 2, 3, 7), ::testing::PrintToStringParamName());

class SeveralThreads : public Parallel {};
INSTANTIATE_TEST_SUITE_P(Threads, SeveralThreads, ::testing::Values(2, 3, 7), ::testing::PrintToStringParamName());

std::vector<std::pair<int64_t, int64_t>> ranges(int64_t begin, int64_t end, int64_t grain) {
  std::vector<std::pair<int64_t, int64_t>> seen;
  std::mutex mutex;
  parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const std::lock_guard lock(mutex);
    seen.emplace_back(first, last);
  });
  std::sort(seen.begin(), seen.end());
  return seen;
}

TEST_P(Parallel, RangesCoverEveryIndexOnce) {
  for (const int64_t begin : {0, 5}) {
    for (const int64_t count : {1, 2, 3, 10, 1000}) {
      for (const int64_t grain : {0, 1, 4, 5000}) {
        int64_t next = begin;
        for (const auto& [first, last] : ranges(begin, begin + count, grain)) {
          EXPECT_EQ(first, next);
          EXPECT_LT(first, last);
          next = last;
        }
        EXPECT_EQ(next, begin + count);
      }
    }
  }
}

TEST_P(Parallel, EmptyRangeCallsNothing) {
  EXPECT_TRUE(ranges(0, 0, 1).empty());
  EXPECT_TRUE(ranges(3, 3, 1).empty());
  EXPECT_TRUE(ranges(3, 2, 1).empty());
}

TEST_P(Parallel, NoMoreRangesThanThreads) {
  EXPECT_EQ(num_threads(), GetParam());
  EXPECT_EQ(ranges(0, 1000, 1).size(), static_cast<size_t>(GetParam()));
}

TEST_P(Parallel, ARangeThatTheGrainDoesNotLetSplitStaysWhole) {
  EXPECT_THAT(ranges(2, 10, 8), ElementsAre(std::pair<int64_t, int64_t>(2, 10)));
}

TEST_P(Parallel, ExceptionOfAThreadReachesTheCaller) {
  const auto fail_at_7 = [] {
    parallel_for(0, 10, 1, [](int64_t first, int64_t last) {
      if (first <= 7 && 7 < last) throw std::runtime_error("index 7");
    });
  };
  EXPECT_THAT(fail_at_7, ThrowsMessage<std::runtime_error>("index 7"));
}

TEST_P(Parallel, EveryTaskRunsOnce) {
  for (const int64_t count : {1, 2, 100}) {
    std::vector<std::atomic<int>> runs(static_cast<size_t>(count));
    parallel_tasks(count, [&](int64_t index) { runs[static_cast<size_t>(index)].fetch_add(1); });
    EXPECT_THAT(std::vector<int>(runs.begin(), runs.end()), Each(1));
  }
}

TEST_P(Parallel, NoTasksRunNothing) {
  for (const int64_t count : {0, -1}) parallel_tasks(count, [](int64_t) { FAIL(); });
}

// Tasks are handed out one at a time: while one task waits for all others, the other threads must take them all.
TEST_P(SeveralThreads, ASlowTaskHoldsUpNoOther) {
  std::atomic<int> finished{0};
  parallel_tasks(20, [&](int64_t index) {
    if (index == 0) {
      while (finished.load() < 19) std::this_thread::yield();
    } else {
      finished.fetch_add(1);
    }
  });
  EXPECT_EQ(finished.load(), 19);
}

TEST_P(Parallel, AtLeastOneThreadWhateverIsAskedFor) {
  for (const int threads : {0, -3}) {
    use_standard_threads(threads);
    EXPECT_EQ(num_threads(), 1);
  }
}

TEST_P(Parallel, InstalledPoolIsTheOneThatIsUsed) {
  static std::vector<int64_t> calls;
  calls.clear();
  set_thread_pool({[](int64_t begin, int64_t end, int64_t grain, ThreadPool::Body body, void* context) {
                     calls.assign({begin, end, grain});
                     body(begin, end, context);
                   },
                   [] { return 42; }});
  EXPECT_EQ(num_threads(), 42);
  int64_t sum = 0;
  parallel_for(1, 5, 2, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) sum += index;
  });
  EXPECT_EQ(sum, 10);
  EXPECT_THAT(calls, ElementsAre(1, 5, 2));
}

}  // namespace
}  // namespace dynamic_moe
