// SPDX-License-Identifier: Apache-2.0
// CUDA's words on the host, those of them that the kernels use. Another one is a few lines here.
#pragma once

#include <math.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#include "common/half.h"
#include "simt/runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

inline constexpr int warpSize = 32;

// ---- Vectors ----

#define SIMT_VECTORS(type, scalar)                                                                    \
  struct __align__(2 * sizeof(scalar)) type##2 { scalar x, y; };                                      \
  struct __align__(4 * sizeof(scalar) < 16 ? 4 * sizeof(scalar) : 16) type##4 { scalar x, y, z, w; }; \
  inline type##2 make_##type##2(scalar x, scalar y) { return {x, y}; }                                \
  inline type##4 make_##type##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
SIMT_VECTORS(int, int)
SIMT_VECTORS(uint, unsigned int)
SIMT_VECTORS(float, float)
SIMT_VECTORS(short, short)
SIMT_VECTORS(ushort, unsigned short)
SIMT_VECTORS(longlong, long long)
#undef SIMT_VECTORS

struct int3 {
  int x, y, z;
};
struct float3 {
  float x, y, z;
};

// ---- 16-bit floats: as opaque as CUDA's are with conversions turned off ----

struct __nv_bfloat16 {
  unsigned short bits;
};
struct __half {
  unsigned short bits;
};
struct __align__(4) __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __align__(4) __half2 {
  __half x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) { return dynamic_moe::to_float(dynamic_moe::BFloat16{value.bits}); }
inline float __half2float(__half value) { return dynamic_moe::to_float(dynamic_moe::Float16{value.bits}); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  return {dynamic_moe::from_float<dynamic_moe::BFloat16>(value).bits};
}
inline __half __float2half_rn(float value) { return {dynamic_moe::from_float<dynamic_moe::Float16>(value).bits}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline unsigned short __half_as_ushort(__half value) { return value.bits; }

// ---- Arithmetic; fmaf, expf, isnan and the like are those of math.h ----

using std::max;
using std::min;

inline int __popc(unsigned int value) { return std::popcount(value); }
inline int __popcll(unsigned long long value) { return std::popcount(value); }
inline int __clz(int value) { return std::countl_zero(static_cast<unsigned int>(value)); }
inline int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(static_cast<unsigned int>(value)) + 1; }
inline unsigned int __float_as_uint(float value) { return std::bit_cast<unsigned int>(value); }
inline float __uint_as_float(unsigned int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline float rsqrtf(float value) { return 1.0f / sqrtf(value); }
// Never fused into an fma.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }

// ---- Barriers and fences ----

inline void __syncthreads(simt::Site site = simt::Site::here()) { simt::block_barrier(simt::Barrier::kPlain, 0, site); }
inline int __syncthreads_or(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier(simt::Barrier::kOr, predicate, site);
}
inline int __syncthreads_and(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier(simt::Barrier::kAnd, predicate, site);
}
inline int __syncthreads_count(int predicate, simt::Site site = simt::Site::here()) {
  return simt::block_barrier(simt::Barrier::kCount, predicate, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, simt::Site site = simt::Site::here()) {
  simt::Words words{};
  simt::collective(simt::kSyncWarp, mask, words, site);
}
inline void __threadfence() { simt::thread_fence(); }

// ---- Warp collectives ----

namespace simt {

// The value that `source` holds, or the lane's own where the source is outside of its segment of `width` lanes.
template <class T>
T shuffle(uint32_t mask, T value, int source, int width, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 4 or 8 bytes");
  if (width < 1 || width > 32 || (width & (width - 1)) != 0)
    fail("the width of a shuffle must be a power of two", site);
  const int segment = lane() & ~(width - 1);
  const bool inside = source >= segment && source < segment + width;
  Words words{};
  const auto bits = std::bit_cast<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>(value);
  words.word[0] = static_cast<uint32_t>(bits);
  words.word[1] = static_cast<uint32_t>(uint64_t{bits} >> 32);
  words.word[2] = static_cast<uint32_t>(inside ? source : lane());
  collective(kShuffle, mask, words, site);
  return std::bit_cast<T>(static_cast<decltype(bits + 0)>(words.word[0] | uint64_t{words.word[1]} << 32));
}

inline uint32_t exchange(const Collective& what, uint32_t mask, uint64_t value, Site site) {
  Words words{};
  words.word[0] = static_cast<uint32_t>(value);
  words.word[1] = static_cast<uint32_t>(value >> 32);
  collective(what, mask, words, site);
  return words.word[0];
}

}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, simt::Site site = simt::Site::here()) {
  const int segment = simt::lane() & ~(width - 1);
  return simt::shuffle(mask, value, segment | (source & (width - 1)), width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::here()) {
  return simt::shuffle(mask, value, simt::lane() - static_cast<int>(delta), width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, simt::Site site = simt::Site::here()) {
  return simt::shuffle(mask, value, simt::lane() + static_cast<int>(delta), width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, simt::Site site = simt::Site::here()) {
  return simt::shuffle(mask, value, simt::lane() ^ lanes, width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  return simt::exchange(simt::kBallot, mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, simt::Site site = simt::Site::here()) {
  return __ballot_sync(mask, predicate, site) == mask;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value, simt::Site site = simt::Site::here()) {
  static_assert(std::is_integral_v<T>, "floats are compared by their bits: convert them first");
  return simt::exchange(simt::kMatchAny, mask, static_cast<std::make_unsigned_t<T>>(value), site);
}
inline int __reduce_add_sync(unsigned mask, int value, simt::Site site = simt::Site::here()) {
  return static_cast<int>(simt::exchange(simt::kReduceAdd, mask, static_cast<unsigned>(value), site));
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, simt::Site site = simt::Site::here()) {
  return simt::exchange(simt::kReduceAdd, mask, value, site);
}
inline int __reduce_min_sync(unsigned mask, int value, simt::Site site = simt::Site::here()) {
  return static_cast<int>(simt::exchange(simt::kReduceMinInt, mask, static_cast<unsigned>(value), site));
}
inline unsigned __reduce_min_sync(unsigned mask, unsigned value, simt::Site site = simt::Site::here()) {
  return simt::exchange(simt::kReduceMinUnsigned, mask, value, site);
}
inline int __reduce_max_sync(unsigned mask, int value, simt::Site site = simt::Site::here()) {
  return static_cast<int>(simt::exchange(simt::kReduceMaxInt, mask, static_cast<unsigned>(value), site));
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value, simt::Site site = simt::Site::here()) {
  return simt::exchange(simt::kReduceMaxUnsigned, mask, value, site);
}

// ---- Atomics: relaxed, so that only __threadfence and barriers order other accesses ----

#define SIMT_ATOMICS(type)                                                                                  \
  inline type atomicAdd(type* address, type value, simt::Site site = simt::Site::here()) {                  \
    simt::check_atomic(address, sizeof(type), site);                                                        \
    return __atomic_fetch_add(address, value, __ATOMIC_RELAXED);                                            \
  }                                                                                                         \
  inline type atomicExch(type* address, type value, simt::Site site = simt::Site::here()) {                 \
    simt::check_atomic(address, sizeof(type), site);                                                        \
    return __atomic_exchange_n(address, value, __ATOMIC_RELAXED);                                           \
  }                                                                                                         \
  inline type atomicMax(type* address, type value, simt::Site site = simt::Site::here()) {                  \
    simt::check_atomic(address, sizeof(type), site);                                                        \
    type old = __atomic_load_n(address, __ATOMIC_RELAXED);                                                  \
    while (old < value &&                                                                                   \
           !__atomic_compare_exchange_n(address, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) { \
    }                                                                                                       \
    return old;                                                                                             \
  }
SIMT_ATOMICS(int)
SIMT_ATOMICS(unsigned int)
SIMT_ATOMICS(unsigned long long)
#undef SIMT_ATOMICS

// ---- Memory ----

namespace dynamic_moe {

template <class V>
V load_global(const V* address, simt::Site site = simt::Site::here()) {
  static_assert(sizeof(V) <= 16 && std::has_single_bit(sizeof(V)), "1, 2, 4, 8 or 16 bytes");
  simt::check(simt::Access::kGlobalRead, address, sizeof(V), site);
  return *address;
}
template <class V>
void store_global(V* address, V value, simt::Site site = simt::Site::here()) {
  static_assert(sizeof(V) <= 16 && std::has_single_bit(sizeof(V)), "1, 2, 4, 8 or 16 bytes");
  simt::check(simt::Access::kGlobalWrite, address, sizeof(V), site);
  *address = value;
}
template <class V>
V load_shared(const V* address, simt::Site site = simt::Site::here()) {
  static_assert(sizeof(V) <= 16 && std::has_single_bit(sizeof(V)), "1, 2, 4, 8 or 16 bytes");
  simt::check(simt::Access::kSharedRead, address, sizeof(V), site);
  return *address;
}
template <class V>
void store_shared(V* address, V value, simt::Site site = simt::Site::here()) {
  static_assert(sizeof(V) <= 16 && std::has_single_bit(sizeof(V)), "1, 2, 4, 8 or 16 bytes");
  simt::check(simt::Access::kSharedWrite, address, sizeof(V), site);
  *address = value;
}

}  // namespace dynamic_moe
