// SPDX-License-Identifier: Apache-2.0
#include "common/workspace.h"

#include <array>
#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace dynamic_moe {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

struct Buffer {
  void* data = nullptr;
  size_t bytes = 0;

  ~Buffer() { std::free(data); }

  void grow(size_t wanted) {
    std::free(data);
    data = nullptr;
    bytes = 0;
    const size_t unit = wanted >= kHugePage ? kHugePage : kCacheLine;
    const size_t rounded = (wanted + unit - 1) / unit * unit;
    data = std::aligned_alloc(unit, rounded);
    if (data == nullptr) throw std::bad_alloc();
    bytes = rounded;
#ifdef __linux__
    if (unit == kHugePage) madvise(data, rounded, MADV_HUGEPAGE);  // a hint: its failure changes nothing but speed
#endif
  }
};

thread_local std::array<Buffer, static_cast<size_t>(Scratch::kCount)> buffers;

}  // namespace

void advise_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  const auto address = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  static_cast<void>(data), static_cast<void>(bytes);
#endif
}

void* scratch_bytes(Scratch use, size_t bytes) {
  Buffer& buffer = buffers[static_cast<size_t>(use)];
  if (buffer.bytes < bytes || buffer.data == nullptr) buffer.grow(bytes > 0 ? bytes : kCacheLine);
  return buffer.data;
}

void release_scratch() {
  for (Buffer& buffer : buffers) {
    std::free(buffer.data);
    buffer.data = nullptr;
    buffer.bytes = 0;
  }
}

}  // namespace dynamic_moe
