// SPDX-License-Identifier: Apache-2.0
// Selection for a group of tokens: sorts keys (see lanes_avx512.h), takes experts in order until the rule is satisfied,
// and writes the rows of ids and weights. Included only by files of one CPU level.
#pragma once

#include "gating/group.h"

namespace dynamic_moe {
namespace {

template <class L, int kSize>
void sort_block(double* keys) {
  for (int part = 0; part < L::kKeyParts; ++part) {
    typename L::Keys v[kSize];
#pragma GCC unroll 32
    for (int i = 0; i < kSize; ++i) v[i] = L::load_keys(keys + i * L::kLanes + part * L::kKeyLanes);
    sort_in_registers<L>(v);
#pragma GCC unroll 32
    for (int i = 0; i < kSize; ++i) L::store_keys(keys + i * L::kLanes + part * L::kKeyLanes, v[i]);
  }
}

// `size` is a multiple of 16.
template <class L>
void sort_keys(double* keys, int64_t size) {
  if (size == 32) return sort_block<L, 32>(keys);
  for (int64_t i = 0; i < size; i += 16) sort_block<L, 16>(keys + i * L::kLanes);
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

// Fills scratch.ids and scratch.weights with the experts taken from sorted keys [size][lanes]; unused keys hold the
// expert -1.
template <class L>
Taken<L> take_in_order(const GatingParams& p, typename L::Mask routed, int64_t size, const GroupScratch<L>& scratch) {
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
      keys[part] = L::load_keys(scratch.keys + rank * L::kLanes + part * L::kKeyLanes);
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

// row[i] = fill for first <= i < k.
template <class L>
void fill_row(int64_t first, int64_t k, typename L::Words fill, bool stream, int32_t* row) {
  int64_t i = first;
  for (; i + L::kLanes <= k; i += L::kLanes) {
    stream ? L::stream_words(row + i, fill) : L::store_words(row + i, fill);
  }
  if (i < k) L::store_words_first(row + i, fill, static_cast<int>(k - i));
}

// rows[lane][k] = by_rank[k][lane] for k < num_ranks, `fill` for the rest of the K. What is written around the cache is
// written from left to right, so that whole lines go to memory.
template <class L>
void write_rows(const void* by_rank, int64_t num_ranks, typename L::Words fill, int count, int64_t k, bool stream,
                int32_t* rows) {
  for (int64_t rank = 0; rank < k;) {
    typename L::Words block[L::kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < L::kLanes; ++i) {
      block[i] =
          rank + i < num_ranks ? L::load_words(static_cast<const int32_t*>(by_rank) + (rank + i) * L::kLanes) : fill;
    }
    L::transpose(block);
    const int width = clamped(k - rank, L::kLanes);
    const bool last = rank + L::kLanes >= num_ranks;
#pragma GCC unroll 16
    for (int lane = 0; lane < L::kLanes; ++lane) {
      if (lane >= count) break;
      int32_t* const row = rows + lane * k;
      if (stream) {
        L::stream_words(row + rank, block[lane]);
      } else if (width == L::kLanes) {
        L::store_words(row + rank, block[lane]);
      } else {
        L::store_words_first(row + rank, block[lane], width);
      }
      if (last) fill_row<L>(rank + L::kLanes, k, fill, stream, row);
    }
    rank = last ? k : rank + L::kLanes;
  }
}

template <class L>
void write_selection(const GatingParams& p, const GatingChunk& chunk, const Group<L>& group, const Taken<L>& taken,
                     const GroupScratch<L>& scratch) {
  const auto unused = L::broadcast_word(static_cast<uint32_t>(p.num_experts));
  const auto mass = L::select(group.routed, taken.mass, L::broadcast(1.0f));
  for (int64_t rank = 0; rank < taken.most; ++rank) {
    const int32_t* ids = scratch.ids + rank * L::kLanes;
    for (uint32_t left = L::bits(L::negative(L::sub_words(L::load_words(ids), unused))); left != 0; left &= left - 1) {
      ++chunk.tokens_per_expert[ids[__builtin_ctz(left)]];
    }
    if (p.renormalize) {
      float* weights = scratch.weights + rank * L::kLanes;
      L::store(weights, L::div(L::load(weights), mass));
    }
  }
  const int64_t offset = group.first_token * p.max_experts;
  write_rows<L>(scratch.ids, taken.most, unused, group.count, p.max_experts, chunk.stream_selection,
                p.expert_ids + offset);
  write_rows<L>(scratch.weights, taken.most, L::broadcast_word(0), group.count, p.max_experts, chunk.stream_selection,
                static_cast<int32_t*>(p.expert_weights) + offset);
}

}  // namespace
}  // namespace dynamic_moe
