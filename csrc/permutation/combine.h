// SPDX-License-Identifier: Apache-2.0
// Combine and its backward pass: token by token, so that nothing is summed across threads. Memory bandwidth is all that
// counts here: a token's rows lie far apart, so the beginnings of the next token's are prefetched while this one's are
// added.
// Included only by files of one CPU level.
#pragma once

#include "permutation/cpu_levels.h"

namespace dynamic_moe {
namespace {

// The used slots of a token.
struct LiveSlots {
  int64_t* slots;
  int64_t count;
};

// Words: lanes of int32. L: lanes of the accumulator type Real. T: storage.
template <class Words, class L, class Real, class T>
struct Combine {
  using Floats = typename L::Floats;
  static constexpr int kLanes = L::kLanes;
  static constexpr int kVectors = 8;  // of a row, kept in registers together
  static constexpr int64_t kBlock = kVectors * kLanes;
  static constexpr int kPartials = sizeof(Real) == 8 ? 32 : 64;  // sums of a dot product
  static constexpr int kSums = kPartials / kLanes;
  static constexpr int kPrefetchedLines = 4;

  static Floats load(const T* p, int64_t left) {
    return left >= kLanes ? L::load(p) : L::load_first(p, left > 0 ? static_cast<int>(left) : 0);
  }

  static void store(T* p, Floats v, int64_t left, bool stream) {
    if (left >= kLanes) {
      stream ? L::stream(p, v) : L::store(p, v);
    } else if (left > 0) {
      L::store_first(p, v, static_cast<int>(left));
    }
  }

  static Floats weight_of(const void* weights, int64_t slot) {
    return L::broadcast(weights ? static_cast<const Real*>(weights)[slot] : Real(1));
  }

  static LiveSlots live_slots(const int32_t* slot_row, int64_t token, int64_t max_experts, int64_t* slots) {
    int64_t count = 0;
    for (int64_t slot = token * max_experts; slot < (token + 1) * max_experts; slot += Words::kWords) {
      const int64_t left = (token + 1) * max_experts - slot;
      const int width = left < Words::kWords ? static_cast<int>(left) : Words::kWords;
      for (uint32_t live = Words::live_bits(slot_row + slot, width, INT32_MAX); live != 0; live &= live - 1) {
        slots[count++] = slot + __builtin_ctz(live);
      }
    }
    return {slots, count};
  }

  // The first lines of every row in `live`: enough for the processor to see a stream and fetch the rest by itself.
  static void prefetch(const void* rows, const int32_t* slot_row, int64_t hidden_size, LiveSlots live) {
    for (int64_t j = 0; j < live.count; ++j) {
      const T* row = static_cast<const T*>(rows) + slot_row[live.slots[j]] * hidden_size;
      for (int line = 0; line < kPrefetchedLines; ++line) {
        __builtin_prefetch(reinterpret_cast<const char*>(row) + line * 64);
      }
    }
  }

  // y[h ..] of one token, a block; kWhole: none of it lies behind the end of the row.
  template <bool kWhole>
  static void add_rows(const CombineParams& p, LiveSlots live, int64_t h, bool stream, T* y) {
    const int64_t left = kWhole ? kBlock : p.hidden_size - h;
    Floats sum[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) sum[i] = L::zero();
    for (int64_t j = 0; j < live.count; ++j) {
      const T* row = static_cast<const T*>(p.rows) + p.slot_row[live.slots[j]] * p.hidden_size + h;
      const Floats weight = weight_of(p.weights, live.slots[j]);
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) {
        sum[i] = L::add(sum[i], L::mul(weight, load(row + i * kLanes, left - i * kLanes)));
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) store(y + h + i * kLanes, sum[i], left - i * kLanes, stream);
  }

  static void combine(const CombineParams& p, const CombineTask& task) {
    const int64_t k = p.max_experts;
    int64_t *current = task.slots, *following = task.slots + k;
    LiveSlots live = live_slots(p.slot_row, task.begin, k, current);
    for (int64_t token = task.begin; token < task.end; ++token) {
      LiveSlots next{following, 0};
      if (token + 1 < task.end) next = live_slots(p.slot_row, token + 1, k, following);
      T* y = static_cast<T*>(p.y) + token * p.hidden_size;
      int64_t h = 0;
      prefetch(p.rows, p.slot_row, p.hidden_size, next);
      for (; h + kBlock <= p.hidden_size; h += kBlock) {
        add_rows<true>(p, live, h, task.stream, y);
      }
      if (h < p.hidden_size) add_rows<false>(p, live, h, task.stream, y);
      live = next;
      following = current;
      current = next.slots;
    }
    if (task.stream) Words::fence();
  }

  static Real folded(Floats (&sums)[kSums]) {
    for (int count = kSums / 2; count >= 1; count /= 2) {
      for (int i = 0; i < count; ++i) sums[i] = L::add(sums[i], sums[i + count]);
    }
    return L::folded(sums[0]);
  }

  // d_row = weight * dy, where wanted; returns <dy, row>, where wanted.
  template <bool kRows, bool kWeights>
  static Real backward_row(const T* dy, const T* row, Floats weight, int64_t hidden_size, bool stream, T* d_row) {
    Floats sums[kSums];
#pragma GCC unroll 16
    for (int i = 0; i < kSums; ++i) sums[i] = L::zero();
    for (int64_t h = 0; h < hidden_size; h += kPartials) {
#pragma GCC unroll 16
      for (int i = 0; i < kSums; ++i) {
        const int64_t at = h + i * kLanes, left = hidden_size - at;
        const Floats d = load(dy + at, left);
        if constexpr (kWeights) sums[i] = L::add(sums[i], L::mul(d, load(row + at, left)));
        if constexpr (kRows) store(d_row + at, L::mul(weight, d), left, stream);
      }
    }
    return kWeights ? folded(sums) : Real(0);
  }

  template <bool kRows, bool kWeights>
  static void backward(const CombineBackwardParams& p, const CombineTask& task) {
    const int64_t k = p.max_experts;
    Real* d_weights = static_cast<Real*>(p.d_weights);
    for (int64_t token = task.begin; token < task.end; ++token) {
      const T* dy = static_cast<const T*>(p.dy) + token * p.hidden_size;
      if constexpr (kWeights) {
        for (int64_t slot = token * k; slot < (token + 1) * k; ++slot) d_weights[slot] = 0;
      }
      const LiveSlots live = live_slots(p.slot_row, token, k, task.slots);
      for (int64_t j = 0; j < live.count; ++j) {
        const int64_t slot = live.slots[j], at = p.slot_row[slot] * p.hidden_size;
        const Real dot = backward_row<kRows, kWeights>(dy, kWeights ? static_cast<const T*>(p.rows) + at : nullptr,
                                                       weight_of(p.weights, slot), p.hidden_size, task.stream,
                                                       kRows ? static_cast<T*>(p.d_rows) + at : nullptr);
        if constexpr (kWeights) d_weights[slot] = dot;
      }
    }
    if (task.stream) Words::fence();
  }

  static void combine_backward(const CombineBackwardParams& p, const CombineTask& task) {
    if (p.d_rows && p.d_weights) {
      backward<true, true>(p, task);
    } else if (p.d_rows) {
      backward<true, false>(p, task);
    } else if (p.d_weights) {
      backward<false, true>(p, task);
    }
  }
};

}  // namespace
}  // namespace dynamic_moe
