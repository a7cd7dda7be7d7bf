// SPDX-License-Identifier: Apache-2.0
// Device memory for tests, on a device or in the host harness: exactly as large as asked for, 256-byte aligned, and
// full of 0xff, which is NaN in every type, until something is uploaded.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <span>
#include <utility>
#include <vector>

#include "common/cuda/launch.cuh"

namespace dynamic_moe::testing {

#if defined(DYNAMIC_MOE_SIMT)

inline void* allocate_device(size_t bytes) {
  constexpr size_t kAlignment = 256;
  void* data = nullptr;
  if (posix_memalign(&data, kAlignment, bytes) != 0) throw std::bad_alloc();
  std::memset(data, 0xff, bytes);
  return data;
}
inline void free_device(void* data) { std::free(data); }
inline void copy_to_device(void* device, const void* host, size_t bytes) {
  if (bytes != 0) std::memcpy(device, host, bytes);
}

#else

inline void* allocate_device(size_t bytes) {
  void* data = nullptr;
  check_cuda(cudaMalloc(&data, bytes == 0 ? 1 : bytes), "cudaMalloc");
  check_cuda(cudaMemset(data, 0xff, bytes), "cudaMemset");
  return data;
}
inline void free_device(void* data) { static_cast<void>(cudaFree(data)); }
inline void copy_to_device(void* device, const void* host, size_t bytes) {
  check_cuda(cudaMemcpy(device, host, bytes, cudaMemcpyHostToDevice), "cudaMemcpy");
}

#endif

template <class T>
class DeviceBuffer {
 public:
  // `offset` elements behind an aligned address: for kernels that must cope with any.
  explicit DeviceBuffer(int64_t count, int64_t offset = 0)
      : count_(static_cast<size_t>(count)), offset_(static_cast<size_t>(offset)) {
    base_ = static_cast<T*>(allocate_device((count_ + offset_) * sizeof(T)));
#if defined(DYNAMIC_MOE_SIMT)
    simt::register_global(data(), bytes());
#endif
  }
  explicit DeviceBuffer(const std::vector<T>& values, int64_t offset = 0)
      : DeviceBuffer(static_cast<int64_t>(values.size()), offset) {
    upload(values);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : base_(std::exchange(other.base_, nullptr)), count_(other.count_), offset_(other.offset_) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(base_, other.base_);
    std::swap(count_, other.count_);
    std::swap(offset_, other.offset_);
    return *this;
  }
  ~DeviceBuffer() {
    if (base_ == nullptr) return;
#if defined(DYNAMIC_MOE_SIMT)
    simt::unregister_global(data());
#endif
    free_device(base_);
  }

  T* data() { return base_ + offset_; }
  const T* data() const { return base_ + offset_; }
  int64_t size() const { return static_cast<int64_t>(count_); }
  size_t bytes() const { return count_ * sizeof(T); }

  void upload(std::span<const T> values) { copy_to_device(data(), values.data(), values.size_bytes()); }
  // After everything that was launched on the default stream.
  std::vector<T> download() const {
    std::vector<T> values(count_);
    copy_to_host(values.data(), data(), bytes(), Stream{});
    return values;
  }

 private:
  T* base_ = nullptr;
  size_t count_, offset_;
};

// What a launcher asked for, as it takes it.
class DeviceWorkspace {
 public:
  explicit DeviceWorkspace(size_t bytes) : buffer_(static_cast<int64_t>(bytes)) {}
  Workspace get() { return {buffer_.data(), buffer_.bytes()}; }

 private:
  DeviceBuffer<unsigned char> buffer_;
};

}  // namespace dynamic_moe::testing
