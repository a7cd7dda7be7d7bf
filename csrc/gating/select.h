// SPDX-License-Identifier: Apache-2.0
// Selection for a group of tokens: sorts keys (see lanes_avx512.h), takes experts in order until the rule is satisfied,
// and writes the rows of ids and weights. Included only by files of one CPU level.
#pragma once

#include "gating/group.h"

namespace dynamic_moe {
namespace {

// The kFirst largest of kSize keys, largest first: all of them, or four. `sorted` may be `keys`.
template <class L, int kSize, int kFirst = kSize>
void sort_block(const double* keys, double* sorted) {
  static_assert(kFirst == kSize || kFirst == 4);
  for (int part = 0; part < L::kKeyParts; ++part) {
    typename L::Keys v[kSize];
#pragma GCC unroll 32
    for (int i = 0; i < kSize; ++i) v[i] = L::load_keys(keys + i * L::kLanes + part * L::kKeyLanes);
    if constexpr (kFirst == kSize) {
      sort_in_registers<L>(v);
    } else {
      first_four<L>(v);
    }
#pragma GCC unroll 32
    for (int i = 0; i < kFirst; ++i) L::store_keys(sorted + i * L::kLanes + part * L::kKeyLanes, v[i]);
  }
}

// `size` is a multiple of 16.
template <class L>
void sort_keys(double* keys, int64_t size) {
  if (size == 32) return sort_block<L, 32>(keys, keys);
  for (int64_t i = 0; i < size; i += 16) sort_block<L, 16>(keys + i * L::kLanes, keys + i * L::kLanes);
  merge_sorted_runs(16, size, [keys](int64_t i, int64_t j) {
    for (int part = 0; part < L::kKeyParts; ++part) {
      double* first = keys + i * L::kLanes + part * L::kKeyLanes;
      double* second = keys + j * L::kLanes + part * L::kKeyLanes;
      const auto a = L::load_keys(first), b = L::load_keys(second);
      L::store_keys(first, L::larger(a, b));
      L::store_keys(second, L::smaller(a, b));
    }
  });
}

template <class L>
struct Taken {
  bool complete;            // false: some token needs more experts than there are keys
  int64_t most;             // experts of the token that got most
  typename L::Floats mass;  // of each token
};

// Fills scratch.ids and scratch.weights with the experts taken from `sorted` keys [size][lanes]; unused keys hold the
// expert -1.
template <class L>
Taken<L> take_in_order(const GatingParams& p, typename L::Mask routed, const double* sorted, int64_t size,
                       const GroupScratch<L>& scratch) {
  const bool stops = p.is_top_p && p.top_p < 1.0;
  const auto top_p = L::broadcast(static_cast<float>(p.top_p));
  const auto unused = L::broadcast_word(static_cast<uint32_t>(p.num_experts));
  auto active = routed;
  auto mass = L::zero();
  int64_t rank = 0;
  for (; rank < p.max_experts && L::bits(active) != 0; ++rank) {
    if (rank == size) return {false, rank, mass};
    typename L::Keys keys[L::kKeyParts];
    for (int part = 0; part < L::kKeyParts; ++part) {
      keys[part] = L::load_keys(sorted + rank * L::kLanes + part * L::kKeyLanes);
    }
    typename L::Floats probability;
    typename L::Words expert;
    L::split_keys(keys, probability, expert);
    if (L::bits(L::both(active, L::negative(expert))) != 0) return {false, rank, mass};
    probability = L::select(active, probability, L::zero());
    L::store_words(scratch.ids + rank * L::kLanes, L::select(active, expert, unused));
    L::store(scratch.weights + rank * L::kLanes, probability);
    mass = L::add(mass, probability);
    if (stops) {
      active = L::but_not(active, p.rule == ThresholdRule::kPaper ? L::at_least(mass, top_p) : L::more(mass, top_p));
    }
  }
  return {true, rank, mass};
}

template <class L, bool kStream>
[[gnu::always_inline]] inline void write_words(int32_t* p, typename L::Words v) {
  kStream ? L::stream_words(p, v) : L::store_words(p, v);
}

// row[i] = fill for first <= i < k.
template <class L, bool kStream>
[[gnu::always_inline]] inline void fill_row(int64_t first, int64_t k, typename L::Words fill, int32_t* row) {
  int64_t i = first;
  for (; i + L::kLanes <= k; i += L::kLanes) write_words<L, kStream>(row + i, fill);
  if (i < k) L::store_words_first(row + i, fill, static_cast<int>(k - i));
}

// write_rows() for at most four ranks, where k >= kLanes.
template <class L, bool kStream>
void write_rows_of_four(const int32_t* by_rank, int64_t num_ranks, typename L::Words fill, int count, int64_t k,
                        int32_t* rows) {
  typename L::Words block[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) block[i] = i < num_ranks ? L::load_words(by_rank + i * L::kLanes) : fill;
  L::transpose_fours(block);
#pragma GCC unroll 8
  for (int lane = 0; lane < L::kLanes; ++lane) {
    if (lane >= count) break;
    int32_t* const row = rows + lane * k;
    write_words<L, kStream>(row, L::four_and_rest(block[lane % 4], lane >= 4, fill));
    fill_row<L, kStream>(L::kLanes, k, fill, row);
  }
}

// rows[lane][k] = by_rank[k][lane] for k < num_ranks, `fill` for the rest of the K. What is written around the cache is
// written from left to right, so that whole lines go to memory.
template <class L, bool kStream>
void write_rows(const int32_t* by_rank, int64_t num_ranks, typename L::Words fill, int count, int64_t k,
                int32_t* rows) {
  if constexpr (L::kLanes == 8) {
    if (num_ranks <= 4 && k >= L::kLanes) {
      return write_rows_of_four<L, kStream>(by_rank, num_ranks, fill, count, k, rows);
    }
  }
  for (int64_t rank = 0; rank < k;) {
    typename L::Words block[L::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < L::kLanes; ++i) {
      block[i] = rank + i < num_ranks ? L::load_words(by_rank + (rank + i) * L::kLanes) : fill;
    }
    L::transpose(block);
    const int width = clamped(k - rank, L::kLanes);
    const bool last = rank + L::kLanes >= num_ranks;
#pragma GCC unroll 16
    for (int lane = 0; lane < L::kLanes; ++lane) {
      if (lane >= count) break;
      int32_t* const row = rows + lane * k;
      if (kStream || width == L::kLanes) {
        write_words<L, kStream>(row + rank, block[lane]);
      } else {
        L::store_words_first(row + rank, block[lane], width);
      }
      if (last) fill_row<L, kStream>(rank + L::kLanes, k, fill, row);
    }
    rank = last ? k : rank + L::kLanes;
  }
}

template <class L, bool kStream>
void write_ids_and_weights(const GatingParams& p, const Group<L>& group, int64_t num_ranks,
                           const GroupScratch<L>& scratch) {
  const auto unused = L::broadcast_word(static_cast<uint32_t>(p.num_experts));
  const int64_t offset = group.first_token * p.max_experts;
  write_rows<L, kStream>(scratch.ids, num_ranks, unused, group.count, p.max_experts, p.expert_ids + offset);
  write_rows<L, kStream>(reinterpret_cast<const int32_t*>(scratch.weights), num_ranks, L::broadcast_word(0),
                         group.count, p.max_experts, static_cast<int32_t*>(p.expert_weights) + offset);
}

// rows[lane][rank] = by_rank[rank][lane], `fill` from `num_ranks` on.
template <class L>
void keep_rows(const int32_t* by_rank, int64_t num_ranks, typename L::Words fill,
               int32_t (&rows)[L::kLanes][L::kLanes]) {
  typename L::Words block[L::kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < L::kLanes; ++i) block[i] = i < num_ranks ? L::load_words(by_rank + i * L::kLanes) : fill;
  L::transpose(block);
#pragma GCC unroll 16
  for (int lane = 0; lane < L::kLanes; ++lane) L::store_words(rows[lane], block[lane]);
}

// Keeps ids and weights of a group for write_late_row().
template <class L>
void keep_for_later(const GatingParams& p, const Group<L>& group, int64_t num_ranks, GroupScratch<L>& scratch) {
  LateRows<L>& late = scratch.late;
  const auto unused = L::broadcast_word(static_cast<uint32_t>(p.num_experts));
  keep_rows<L>(scratch.ids, num_ranks, unused, late.ids);
  keep_rows<L>(reinterpret_cast<const int32_t*>(scratch.weights), num_ranks, L::broadcast_word(0), late.weights);
  late.first_token = group.first_token;
  late.count = group.count;
  late.written = 0;
}

// Writes the next of the rows that were kept, around the cache; nothing if there is none.
template <class L>
[[gnu::noinline]] void write_late_row(const GatingParams& p, LateRows<L>& late) {
  if (late.written == late.count) return;
  const int lane = late.written++;
  const int64_t k = p.max_experts, offset = (late.first_token + lane) * k;
  int32_t* const ids = p.expert_ids + offset;
  L::stream_words(ids, L::load_words(late.ids[lane]));
  fill_row<L, true>(L::kLanes, k, L::broadcast_word(static_cast<uint32_t>(p.num_experts)), ids);
  int32_t* const weights = static_cast<int32_t*>(p.expert_weights) + offset;
  L::stream_words(weights, L::load_words(late.weights[lane]));
  fill_row<L, true>(L::kLanes, k, L::broadcast_word(0), weights);
}

template <class L>
void write_late_rows(const GatingParams& p, LateRows<L>& late) {
  while (late.written < late.count) write_late_row<L>(p, late);
}

// kMayKeep: rows that go around the cache are kept where they fit, for the next group to write while it computes.
template <class L, bool kMayKeep>
void write_selection(const GatingParams& p, const GatingChunk& chunk, const Group<L>& group, const Taken<L>& taken,
                     GroupScratch<L>& scratch) {
  const auto mass = L::select(group.routed, taken.mass, L::broadcast(1.0f));
  for (int64_t rank = 0; rank < taken.most; ++rank) {
    const int32_t* ids = scratch.ids + rank * L::kLanes;
#pragma GCC unroll 16
    for (int lane = 0; lane < L::kLanes; ++lane) ++scratch.counts[ids[lane]];  // not asking which are used: no branches
    if (p.renormalize) {
      float* weights = scratch.weights + rank * L::kLanes;
      L::store(weights, L::div(L::load(weights), mass));
    }
  }
  if constexpr (kMayKeep) {
    if (chunk.stream_selection && taken.most <= L::kLanes) return keep_for_later(p, group, taken.most, scratch);
  }
  chunk.stream_selection ? write_ids_and_weights<L, true>(p, group, taken.most, scratch)
                         : write_ids_and_weights<L, false>(p, group, taken.most, scratch);
}

}  // namespace
}  // namespace dynamic_moe
