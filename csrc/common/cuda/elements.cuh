// SPDX-License-Identifier: Apache-2.0
// Storage types on the device: to and from float32, one element or a whole vector of up to 16 bytes at a time.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#include "common/cuda/platform.cuh"
#include "common/cuda/ptx.cuh"
#include "common/types.h"

namespace dynamic_moe {

template <>
inline constexpr bool kNarrowRange<__half> = true;

__device__ inline float widened(float x) { return x; }
__device__ inline float widened(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widened(__half x) { return __half2float(x); }

// Rounds to nearest, ties to even.
template <class T>
__device__ inline T narrowed(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// The words that move kBytes bytes at once.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

// kCount elements as they lie in memory: one load or store.
template <class T, int kCount>
struct Packed {
  using Word = typename WordOf<static_cast<int>(sizeof(T)) * kCount>::Type;
  Word word;

  __device__ void unpack(float (&x)[kCount]) const {
    T elements[kCount];
    memcpy(elements, &word, sizeof word);
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = widened(elements[i]);
  }
  __device__ static Packed of(const float (&x)[kCount]) {
    T elements[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) elements[i] = narrowed<T>(x[i]);
    Packed packed;
    memcpy(&packed.word, elements, sizeof packed.word);
    return packed;
  }
  __device__ static Packed zero() { return {Word{}}; }

  __device__ static Packed load(const T* from) { return {load_global(reinterpret_cast<const Word*>(from))}; }
  // For what no other thread reads again.
  __device__ static Packed load_once(const T* from) {
    if constexpr (sizeof(Word) >= 4) {
      return {ptx::load_global_once(reinterpret_cast<const Word*>(from))};
    } else {
      return load(from);
    }
  }
  __device__ void store(T* to) const { store_global(reinterpret_cast<Word*>(to), word); }
};

// Whether `pointer` may be read in vectors of `bytes`. Null may: nothing is read.
inline bool is_aligned(const void* pointer, size_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// run(tag) with typename decltype(tag)::Type for the storage type of `dtype`.
template <class T>
struct TypeTag {
  using Type = T;
};
template <class Run>
void with_storage_type(DType dtype, const Run& run) {
  switch (dtype) {
    case DType::kFloat32:
      return run(TypeTag<float>{});
    case DType::kBFloat16:
      return run(TypeTag<__nv_bfloat16>{});
    case DType::kFloat16:
      return run(TypeTag<__half>{});
    case DType::kFloat64:
      break;
  }
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16 on CUDA, got float64");
}

}  // namespace dynamic_moe
