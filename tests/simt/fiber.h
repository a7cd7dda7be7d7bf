// SPDX-License-Identifier: Apache-2.0
// Fibres: stacks that one host thread switches between, with the announcements that the sanitizers need.
#pragma once

#include <ucontext.h>

#include <cstddef>

namespace simt {

class Fiber {
 public:
  Fiber() = default;  // the stack that is running now
  explicit Fiber(void (*entry)());
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Leaves `from`, which is running, and goes on where `to` was left. Does not order memory in ThreadSanitizer's eyes.
  static void switch_to(Fiber& from, Fiber& to);

 private:
  static void begin();

  void (*entry_)() = nullptr;
  char* stack_ = nullptr;                  // null for the host's own
  void* top_ = nullptr;                    // stack pointer while not running
  [[maybe_unused]] ucontext_t context_{};  // in its place where there is no assembly
  [[maybe_unused]] void* asan_fake_stack_ = nullptr;
  const void* asan_bottom_ = nullptr;  // as AddressSanitizer told it
  size_t asan_bytes_ = 0;
  [[maybe_unused]] void* tsan_fiber_ = nullptr;
};

}  // namespace simt
