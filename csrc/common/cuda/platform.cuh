// SPDX-License-Identifier: Apache-2.0
// CUDA's own headers, or, where DYNAMIC_MOE_SIMT is defined, the tests' host meaning of CUDA's words. Kernels reach
// memory through the four accesses below: plain dereferences on a device, checked and counted on the host.
#pragma once

#include "common/cuda/stream.h"

#if defined(DYNAMIC_MOE_SIMT)

#include "simt/cuda_words.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace dynamic_moe {

// V has 1, 2, 4, 8 or 16 bytes and the address is a multiple of its size.
template <class V>
__device__ __forceinline__ V load_global(const V* address) {
  return *address;
}
template <class V>
__device__ __forceinline__ void store_global(V* address, V value) {
  *address = value;
}
template <class V>
__device__ __forceinline__ V load_shared(const V* address) {
  return *address;
}
template <class V>
__device__ __forceinline__ void store_shared(V* address, V value) {
  *address = value;
}

}  // namespace dynamic_moe

#endif
