// SPDX-License-Identifier: Apache-2.0
#include "simt/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "simt/sanitizers.h"

// Pushes what a function must preserve, swaps stacks, pops. 20 times as fast as swapcontext, which calls the kernel.
#if defined(__x86_64__) && !defined(SIMT_UCONTEXT)
#define SIMT_ASSEMBLY 1
__asm__(R"(
.text
.type simt_switch_stacks, @function
simt_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stacks, .-simt_switch_stacks
)");
extern "C" void simt_switch_stacks(void** save, void* load);
#else
#define SIMT_ASSEMBLY 0
#endif

#if SIMT_TSAN
// The first race ends the program: what comes after it is of no interest.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_options() { return "halt_on_error=1"; }
#endif

namespace simt {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStackBytes = size_t{256} << 10;

// Who left the stack, and who runs on it now.
Fiber* left = nullptr;
Fiber* running = nullptr;

}  // namespace

Fiber::Fiber(void (*entry)()) : entry_(entry) {
  // The lowest page stays out of bounds: an overflow is a fault and not a mystery.
  void* mapped = mmap(nullptr, kStackBytes + kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  stack_ = static_cast<char*>(mapped) + kPage;
  if (mprotect(stack_, kStackBytes, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  asan_bottom_ = stack_;
  asan_bytes_ = kStackBytes;
#if SIMT_ASSEMBLY
  // As if begin() had been called from address 0: six registers, then where to return to, then that address.
  auto** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&Fiber::begin);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  top_ = top;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack_;
  context_.uc_stack.ss_size = kStackBytes;
  makecontext(&context_, &Fiber::begin, 0);
#endif
#if SIMT_TSAN
  tsan_fiber_ = __tsan_create_fiber(0);
#endif
}

Fiber::~Fiber() {
  if (stack_ == nullptr) return;
#if SIMT_TSAN
  // There and back, so that what an abandoned fibre did lies before everything that follows.
  constexpr unsigned kSync = 0;
  void* here = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(tsan_fiber_, kSync);
  __tsan_switch_to_fiber(here, kSync);
  __tsan_destroy_fiber(tsan_fiber_);
#endif
  unpoison(stack_, kStackBytes);
  munmap(stack_ - kPage, kStackBytes + kPage);
}

void Fiber::begin() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &left->asan_bottom_, &left->asan_bytes_);
#endif
  running->entry_();
  std::abort();  // entry_ never returns: fibres are used again or abandoned
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
  left = &from;
  running = &to;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&from.asan_fake_stack_, to.asan_bottom_, to.asan_bytes_);
#endif
#if SIMT_TSAN
  constexpr unsigned kNoSync = 1;
  if (from.tsan_fiber_ == nullptr) from.tsan_fiber_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(to.tsan_fiber_, kNoSync);
#endif
#if SIMT_ASSEMBLY
  simt_switch_stacks(&from.top_, to.top_);
#else
  swapcontext(&from.context_, &to.context_);
#endif
#if SIMT_ASAN
  // Who came back here tells its stack, so that the host's becomes known.
  __sanitizer_finish_switch_fiber(from.asan_fake_stack_, &left->asan_bottom_, &left->asan_bytes_);
#endif
}

}  // namespace simt
