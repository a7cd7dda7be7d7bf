// SPDX-License-Identifier: Apache-2.0
// Launching kernels, and the few other things that launchers put on a stream. Every error becomes a std::runtime_error.
//
//   DYNAMIC_MOE_LAUNCH((kernel<A, B>), grid, block, dynamic_shared_bytes, stream, arguments...);
//
// A grid of 0 blocks launches nothing.
#pragma once

#include <stdexcept>
#include <string>

#include "common/cuda/platform.cuh"

#define DYNAMIC_MOE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::dynamic_moe::launch(#kernel, kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

namespace dynamic_moe {

#if defined(DYNAMIC_MOE_SIMT)

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream,
            const Arguments&... arguments) {
  simt::launch(name, grid, block, shared_bytes, [&] { kernel(arguments...); });
}

inline void memset_async(void* data, int value, size_t bytes, Stream) { simt::fill(data, value, bytes); }
inline void copy_to_host(void* host, const void* device, size_t bytes, Stream) { simt::copy(host, device, bytes); }

#else

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  constexpr size_t kWithoutOptIn = 48 * 1024;
  if (shared_bytes > kWithoutOptIn) {
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        name);
  }
  // clang-format off: it would part the brackets
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream.handle)>>>(arguments...);
  // clang-format on
  check_cuda(cudaGetLastError(), name);
}

inline void memset_async(void* data, int value, size_t bytes, Stream stream) {
  check_cuda(cudaMemsetAsync(data, value, bytes, static_cast<cudaStream_t>(stream.handle)), "memset_async");
}

// Returns when the bytes are on the host.
inline void copy_to_host(void* host, const void* device, size_t bytes, Stream stream) {
  const auto handle = static_cast<cudaStream_t>(stream.handle);
  check_cuda(cudaMemcpyAsync(host, device, bytes, cudaMemcpyDeviceToHost, handle), "copy_to_host");
  check_cuda(cudaStreamSynchronize(handle), "copy_to_host");
}

#endif

}  // namespace dynamic_moe
