// SPDX-License-Identifier: Apache-2.0
#include "common/parallel.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

namespace dynamic_moe {
namespace {

int standard_thread_count = 1;

void run_on_standard_threads(int64_t begin, int64_t end, int64_t grain, ThreadPool::Body body, void* context) {
  const int64_t most = (end - begin + std::max<int64_t>(grain, 1) - 1) / std::max<int64_t>(grain, 1);
  const int64_t parts = std::min<int64_t>(standard_thread_count, most);
  if (parts <= 1) return body(begin, end, context);
  std::vector<std::thread> threads;
  threads.reserve(static_cast<size_t>(parts));
  std::vector<std::exception_ptr> errors(static_cast<size_t>(parts));
  for (int64_t part = 0; part < parts; ++part) {
    threads.emplace_back([&, part] {
      try {
        body(begin + (end - begin) * part / parts, begin + (end - begin) * (part + 1) / parts, context);
      } catch (...) {  // carried to the calling thread, which throws it
        errors[static_cast<size_t>(part)] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

ThreadPool current_pool{run_on_standard_threads, [] { return standard_thread_count; }};

}  // namespace

void set_thread_pool(const ThreadPool& pool) { current_pool = pool; }

const ThreadPool& thread_pool() { return current_pool; }

void use_standard_threads(int num_threads) {
  standard_thread_count = std::max(num_threads, 1);
  set_thread_pool({run_on_standard_threads, [] { return standard_thread_count; }});
}

}  // namespace dynamic_moe
