// SPDX-License-Identifier: Apache-2.0
#include "common/tile_permission.h"

#include <cerrno>
#include <mutex>
#include <system_error>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif
#if defined(__linux__) && defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dynamic_moe {
namespace {

// Held while a request is under way, and by fork(): a child that was made in the middle of a request would have neither
// the answer nor the thread that waits for it.
std::mutex& request_mutex() {
  static std::mutex mutex;
#if defined(__unix__) || defined(__APPLE__)
  static const int registered = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); }, [] { mutex.unlock(); });
  (void)registered;
#endif
  return mutex;
}

const char* usual_cause(int error) {
  switch (error) {
    case ENOSPC:
      return "a thread of this process has an alternate signal stack (sigaltstack) with no room for the tile data: it "
             "must have getauxval(AT_MINSIGSTKSZ) bytes, about 12 KiB";
    case EPERM:
    case EACCES:
      return "a sandbox (seccomp) forbids the system call arch_prctl";
    case ENOSYS:
      return "a sandbox or an emulator lacks the system call arch_prctl";
    case EINVAL:
      return "the kernel is older than Linux 5.16, or a sandbox answers in its place";
    case EOPNOTSUPP:
      return "the kernel or the hypervisor does not support tile data";
    default:
      return "no common cause is known";
  }
}

}  // namespace

bool TilePermission::ask() {
  int answer = answer_.load(std::memory_order_acquire);
  if (answer == kNotAsked) {
    const std::lock_guard<std::mutex> lock(request_mutex());
    answer = answer_.load(std::memory_order_relaxed);
    if (answer == kNotAsked) {
      answer = request_();
      answer_.store(answer, std::memory_order_release);
    }
  }
  return answer == 0;
}

TilePermission::State TilePermission::state() const {
  const int answer = answer_.load(std::memory_order_acquire);
  return answer == kNotAsked ? State::kNotAsked : answer == 0 ? State::kGranted : State::kRefused;
}

std::string TilePermission::reason() const {
  if (state() != State::kRefused) return "";
  const int error = answer_.load(std::memory_order_acquire);
  return std::generic_category().message(error) + " (errno " + std::to_string(error) + "): " + usual_cause(error);
}

int request_tile_data() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? 0 : errno;
#else
  return ENOSYS;
#endif
}

}  // namespace dynamic_moe
