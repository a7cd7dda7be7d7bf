// SPDX-License-Identifier: Apache-2.0
// The host's twins of common/cuda/ptx.cuh, which says what each does.
#pragma once

#include "simt/cuda_words.h"

namespace dynamic_moe::ptx {

inline uint32_t shared_address(const void* pointer, simt::Site site = simt::Site::here()) {
  return simt::shared_offset(pointer, site);
}

// A copy is made here and not in the runtime, so that the sanitizers see it.
template <class V>
void land(void* shared, const void* global) {
  *static_cast<V*>(shared) = global == nullptr ? V{} : *static_cast<const V*>(global);
}
inline void land(const simt::AsyncCopy& copy) {
  if (copy.bytes == 4) return land<uint32_t>(copy.shared, copy.global);
  if (copy.bytes == 8) return land<uint2>(copy.shared, copy.global);
  land<uint4>(copy.shared, copy.global);
}

template <int kBytes>
void cp_async_zfill(void* shared, const void* global, bool valid, simt::Site site = simt::Site::here()) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "cp.async copies 4, 8 or 16 bytes");
  const simt::AsyncCopy copy{shared, valid ? global : nullptr, kBytes, 0};
  if (simt::issue_copy(copy, site)) land(copy);
}
template <int kBytes>
void cp_async(void* shared, const void* global, simt::Site site = simt::Site::here()) {
  cp_async_zfill<kBytes>(shared, global, true, site);
}
inline void cp_async_commit() { simt::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  simt::AsyncCopy copy{};
  while (simt::next_landing(kPending, copy)) land(copy);
}

// The lane reads the row whose address it gives; the warp exchanges them. Addresses beyond the count are not used.
template <int kMatrices>
void ldmatrix(const simt::Collective& what, uint32_t (&r)[kMatrices], const void* row, simt::Site site) {
  simt::Words words{};
  if (simt::lane() < 8 * kMatrices) {
    simt::check(simt::Access::kSharedRead, row, 16, site);
    const auto elements = *static_cast<const uint4*>(row);
    words = {{elements.x, elements.y, elements.z, elements.w}};
  }
  simt::collective(what, 0xffffffffu, words, site);
  for (int i = 0; i < kMatrices; ++i) r[i] = words.word[i];
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::here()) {
  ldmatrix(simt::kLdmatrix, r, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, simt::Site site = simt::Site::here()) {
  ldmatrix(simt::kLdmatrixTrans, r, row, site);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, simt::Site site = simt::Site::here()) {
  ldmatrix(simt::kLdmatrix, r, row, site);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, simt::Site site = simt::Site::here()) {
  ldmatrix(simt::kLdmatrixTrans, r, row, site);
}

inline void mma(const simt::Collective& what, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                simt::Site site) {
  simt::Words words{{a[0], a[1], a[2], a[3], b[0], b[1], __float_as_uint(d[0]), __float_as_uint(d[1]),
                     __float_as_uint(d[2]), __float_as_uint(d[3])}};
  simt::collective(what, 0xffffffffu, words, site);
  for (int i = 0; i < 4; ++i) d[i] = __uint_as_float(words.word[i]);
}
template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], simt::Site site = simt::Site::here()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>, "bfloat16 or float16");
  mma(std::is_same_v<T, __half> ? simt::kMmaHalf : simt::kMmaBFloat16, d, a, b, site);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             simt::Site site = simt::Site::here()) {
  mma(simt::kMmaTf32, d, a, b, site);
}

inline uint32_t float_to_tf32(float value) {
  const uint32_t bits = __float_as_uint(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return (bits & 0x7fffffu) != 0 ? 0x7fffffffu : bits;
  return (bits + 0x1000u) & 0xffffe000u;
}

template <class V>
V load_global_once(const V* address, simt::Site site = simt::Site::here()) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "4, 8 or 16 bytes");
  return load_global(address, site);
}
template <class V>
void store_global_streaming(V* address, V value, simt::Site site = simt::Site::here()) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16, "4, 8 or 16 bytes");
  store_global(address, value, site);
}

}  // namespace dynamic_moe::ptx
