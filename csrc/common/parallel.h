// SPDX-License-Identifier: Apache-2.0
// Threads. The kernels never own a pool: the extension installs torch's parallel_for at import, the unit tests and the
// benchmarks install their own, and without either everything runs on the calling thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>

namespace dynamic_moe {

struct ThreadPool {
  // Calls body(begin, end, context) on sub-ranges that cover [begin, end), each at least `grain` long, and waits.
  using Body = void (*)(int64_t begin, int64_t end, void* context);
  void (*parallel_for)(int64_t begin, int64_t end, int64_t grain, Body body, void* context);
  int (*num_threads)();
};

void set_thread_pool(const ThreadPool& pool);
const ThreadPool& thread_pool();

// A pool of `num_threads` std::threads made anew for each region: for tests and stand-alone programs.
void use_standard_threads(int num_threads);

inline int num_threads() { return thread_pool().num_threads(); }

// body(begin, end) on contiguous sub-ranges.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  if (begin >= end) return;
  thread_pool().parallel_for(
      begin, end, grain,
      [](int64_t first, int64_t last, void* context) { (*static_cast<const Body*>(context))(first, last); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// task(index) for every index in [0, count), handed out one at a time: a slow core takes fewer. The result must not
// depend on which thread runs which task; every kernel here gives each output element to exactly one task.
template <class Task>
void parallel_tasks(int64_t count, const Task& task) {
  if (count <= 0) return;
  const int64_t workers = num_threads() < count ? num_threads() : count;
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t first, int64_t last) {
    for (int64_t worker = first; worker < last; ++worker) {
      for (int64_t index = next.fetch_add(1); index < count; index = next.fetch_add(1)) task(index);
    }
  });
}

// The same with an estimate of the whole work, in multiply-adds: little work is done on the calling thread, because
// waking the others would take longer.
inline constexpr int64_t kWorkWorthThreads = int64_t{1} << 16;

template <class Task>
void parallel_tasks(int64_t count, int64_t work, const Task& task) {
  if (work >= kWorkWorthThreads) return parallel_tasks(count, task);
  for (int64_t index = 0; index < count; ++index) task(index);
}

}  // namespace dynamic_moe
