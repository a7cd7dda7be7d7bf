// SPDX-License-Identifier: Apache-2.0
// Which sanitizer this build has, and the functions of it that the harness calls.
#pragma once

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#if __has_feature(thread_sanitizer)
#define SIMT_TSAN 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#endif
#if defined(__SANITIZE_THREAD__)
#define SIMT_TSAN 1
#endif

#if SIMT_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if SIMT_ASAN
inline constexpr bool kAddressSanitizer = true;
inline void poison(const void* begin, unsigned long bytes) { __asan_poison_memory_region(begin, bytes); }
inline void unpoison(const void* begin, unsigned long bytes) { __asan_unpoison_memory_region(begin, bytes); }
#else
inline constexpr bool kAddressSanitizer = false;
inline void poison(const void*, unsigned long) {}
inline void unpoison(const void*, unsigned long) {}
#endif

}  // namespace simt

// The runtime is compiled without ThreadSanitizer, so it cannot ask the compiler: the build defines SIMT_TSAN_RUNTIME.
#if defined(SIMT_TSAN_RUNTIME)
#define SIMT_TSAN 1
#endif
#if SIMT_TSAN
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

namespace simt {

#if SIMT_TSAN
inline constexpr bool kThreadSanitizer = true;
inline void acquire(void* address) { __tsan_acquire(address); }
inline void release(void* address) { __tsan_release(address); }
#else
inline constexpr bool kThreadSanitizer = false;
inline void acquire(void*) {}
inline void release(void*) {}
#endif

}  // namespace simt
