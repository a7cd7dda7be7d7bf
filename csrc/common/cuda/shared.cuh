// SPDX-License-Identifier: Apache-2.0
// Shared memory, 128-byte aligned. Kernels declare it with these two macros only, so that the tests can watch it.
//
//   DYNAMIC_MOE_SHARED(float, tile, 128);          // float tile[128], one for each block
//   DYNAMIC_MOE_DYNAMIC_SHARED(uint8_t, storage);  // uint8_t* storage: the bytes that the launch asked for
#pragma once

#include "common/cuda/platform.cuh"

#if defined(DYNAMIC_MOE_SIMT)

// The key is another object for each declaration and for each instantiation of the template around it.
#define DYNAMIC_MOE_SHARED(type, name, count) \
  static const char name##_key = 0;           \
  type(&name)[count] =                        \
      *static_cast<type(*)[count]>(::simt::shared_array(&name##_key, sizeof(type[count]), ::simt::Site::here()))
#define DYNAMIC_MOE_DYNAMIC_SHARED(type, name) type* const name = static_cast<type*>(::simt::dynamic_shared())

#else

#define DYNAMIC_MOE_SHARED(type, name, count) __shared__ __align__(128) type name[count]
#define DYNAMIC_MOE_DYNAMIC_SHARED(type, name)                               \
  extern __shared__ __align__(128) unsigned char dynamic_moe_shared_bytes[]; \
  type* const name = reinterpret_cast<type*>(dynamic_moe_shared_bytes)

#endif
