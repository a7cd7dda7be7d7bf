// SPDX-License-Identifier: Apache-2.0
// Scratch memory that is reused from call to call. A freshly mapped page costs more to touch than the arithmetic done
// on it, so each thread keeps one grow-only buffer per use; large ones ask the system for huge pages.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dynamic_moe {

enum class Scratch : int { kPanel, kTile, kRows, kActivation, kGradient, kAccumulator, kPartial, kCount };

// At least `bytes` bytes, 64-byte aligned, uninitialized, valid until this thread asks for the same use again.
// Throws std::bad_alloc.
void* scratch_bytes(Scratch use, size_t bytes);

template <class T>
T* scratch(Scratch use, int64_t count) {
  return static_cast<T*>(scratch_bytes(use, static_cast<size_t>(count) * sizeof(T)));
}

// Asks the system for huge pages under memory that was not touched yet. A hint: without it, only speed differs.
void advise_huge_pages(void* data, size_t bytes);

// Gives back what the calling thread holds.
void release_scratch();

}  // namespace dynamic_moe
