// SPDX-License-Identifier: Apache-2.0
// Groups the accesses of a warp's lanes into requests and counts what those cost. Part of the runtime.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <new>

#include "simt/runtime.h"

namespace simt {

// Of plain data. Grows without new, delete and memcpy, which ThreadSanitizer would take for the kernel's doing.
template <class T>
class Array {
 public:
  ~Array() { release(); }
  Array() = default;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  T& push() {
    if (size_ == capacity_) grow();
    return data_[size_++];
  }
  void clear() { size_ = 0; }
  uint32_t size() const { return size_; }
  T& operator[](uint32_t index) { return data_[index]; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }

 private:
  void grow() {
    const uint32_t capacity = capacity_ == 0 ? 64 : 2 * capacity_;
    void* mapped = mmap(nullptr, capacity * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    T* larger = static_cast<T*>(mapped);
    for (uint32_t i = 0; i < size_; ++i) larger[i] = data_[i];
    release();
    data_ = larger;
    capacity_ = capacity;
  }
  void release() {
    if (data_ != nullptr) munmap(data_, capacity_ * sizeof(T));
  }

  T* data_ = nullptr;
  uint32_t size_ = 0, capacity_ = 0;
};

class WarpAccounting {
 public:
  void add(Access access, uintptr_t address, uint32_t bytes, int lane, Site site);
  // The warp came together: what is open becomes requests.
  void close(Counters& counters);

 private:
  static constexpr uint32_t kNone = ~uint32_t{0};

  struct Request {
    Access access;
    uint32_t bytes, lanes, next;  // next: of the same place
    uintptr_t address[32];
  };
  struct Place {
    Site site;
    Access access;
    uint32_t bytes, first, last;
    uint32_t latest[32];  // by lane, its latest request
  };

  Place& place_of(Access access, uint32_t bytes, Site site);

  Array<Request> requests_;
  Array<Place> places_;
  uint32_t recent_ = 0;
};

}  // namespace simt
