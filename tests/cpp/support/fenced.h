// SPDX-License-Identifier: Apache-2.0
// Buffers that no kernel can leave unnoticed: a page that may not be touched behind them (or before them), and bytes
// that must not change in what is left of their own pages. Everything starts as 0xff, which is NaN in every type.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <span>
#include <utility>
#include <vector>

namespace dynamic_moe::testing {

enum class Placement {
  kEndAtFence,    // the element behind the last one is a fault
  kStartAtFence,  // the element before the first one is a fault
  kOneIn,         // one element behind the start of a page: aligned to nothing but the element
};
inline constexpr Placement kPlacements[] = {Placement::kEndAtFence, Placement::kStartAtFence, Placement::kOneIn};

template <class T>
class Fenced {
 public:
  explicit Fenced(int64_t count, Placement placement = Placement::kEndAtFence) : count_(static_cast<size_t>(count)) {
    const size_t page = page_bytes();
    const size_t lead = placement == Placement::kOneIn ? sizeof(T) : 0;
    payload_ = (bytes() + lead + page - 1) / page * page;
    if (payload_ == 0) payload_ = page;
    void* mapped = mmap(nullptr, payload_ + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    inside_ = static_cast<unsigned char*>(mapped) + page;
    protect(PROT_READ | PROT_WRITE);
    std::memset(inside_, kCanary, payload_);
    offset_ = placement == Placement::kEndAtFence ? payload_ - bytes() : lead;
  }
  Fenced(Fenced&& other) noexcept { swap(other); }
  Fenced& operator=(Fenced&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Fenced() {
    if (inside_ != nullptr) munmap(inside_ - page_bytes(), payload_ + 2 * page_bytes());
  }

  T* data() { return reinterpret_cast<T*>(inside_ + offset_); }
  const T* data() const { return reinterpret_cast<const T*>(inside_ + offset_); }
  int64_t size() const { return static_cast<int64_t>(count_); }
  T& operator[](int64_t index) { return data()[index]; }
  const T& operator[](int64_t index) const { return data()[index]; }
  std::span<const T> span() const { return {data(), count_}; }

  // From here on a write is a fault.
  void freeze() { protect(PROT_READ); }
  void thaw() { protect(PROT_READ | PROT_WRITE); }

  // Whether nothing was written beside the elements.
  bool surroundings_intact() const {
    for (size_t i = 0; i < payload_; ++i) {
      const bool inside = i >= offset_ && i < offset_ + bytes();
      if (!inside && inside_[i] != kCanary) return false;
    }
    return true;
  }

 private:
  static constexpr unsigned char kCanary = 0xff;

  static size_t page_bytes() {
    static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    return bytes;
  }
  size_t bytes() const { return count_ * sizeof(T); }
  void protect(int mode) {
    if (mprotect(inside_, payload_, mode) != 0) throw std::bad_alloc();
  }
  void swap(Fenced& other) {
    std::swap(inside_, other.inside_);
    std::swap(payload_, other.payload_);
    std::swap(offset_, other.offset_);
    std::swap(count_, other.count_);
  }

  unsigned char* inside_ = nullptr;
  size_t payload_ = 0, offset_ = 0, count_ = 0;
};

// A buffer of any size that costs what is touched of it: zeros, until something is written.
template <class T>
class Vast {
 public:
  explicit Vast(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(T)) {
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (data_ == MAP_FAILED) throw std::bad_alloc();
  }
  Vast(const Vast&) = delete;
  Vast& operator=(const Vast&) = delete;
  ~Vast() { munmap(data_, bytes_); }

  T* data() { return static_cast<T*>(data_); }
  void write(int64_t first, std::span<const T> values) {
    std::memcpy(data() + first, values.data(), values.size_bytes());
  }

 private:
  void* data_;
  size_t bytes_;
};

// Whether two buffers hold the same bits: NaN equals itself, and 0 is not -0.
template <class T>
bool same_bits(std::span<const T> a, std::span<const T> b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size_bytes()) == 0);
}
template <class T>
bool same_bits(const Fenced<T>& a, const Fenced<T>& b) {
  return same_bits(a.span(), b.span());
}

}  // namespace dynamic_moe::testing
