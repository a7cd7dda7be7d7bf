// SPDX-License-Identifier: Apache-2.0
// What the lanes of a warp compute together. Layouts of fragments: PTX ISA, "Matrix Fragments for mma.m16n8k16", "...
// mma.m16n8k8" and "Warp-level matrix load instruction: ldmatrix".
#include <bit>

#include "common/half.h"
#include "simt/runtime.h"

namespace simt {
namespace {

using dynamic_moe::BFloat16;
using dynamic_moe::Float16;

template <class Body>
void for_each_lane(uint32_t mask, const Body& body) {
  for (; mask != 0; mask &= mask - 1) body(std::countr_zero(mask));
}

void synchronize(const Words*, Words*, uint32_t) {}

// in: the value (2 words) and the lane to read from; out: that lane's value.
void shuffle(const Words* in, Words* out, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    const uint32_t source = in[lane].word[2];
    if ((mask >> source & 1) == 0) throw "__shfl_sync reads from a lane that is not in the mask";
    out[lane].word[0] = in[source].word[0];
    out[lane].word[1] = in[source].word[1];
  });
}

void ballot(const Words* in, Words* out, uint32_t mask) {
  uint32_t votes = 0;
  for_each_lane(mask, [&](int lane) { votes |= in[lane].word[0] << lane; });
  for_each_lane(mask, [&](int lane) { out[lane].word[0] = votes; });
}

void match_any(const Words* in, Words* out, uint32_t mask) {
  for_each_lane(mask, [&](int lane) {
    uint32_t equal = 0;
    for_each_lane(mask, [&](int other) {
      const bool same = in[other].word[0] == in[lane].word[0] && in[other].word[1] == in[lane].word[1];
      equal |= uint32_t{same} << other;
    });
    out[lane].word[0] = equal;
  });
}

template <class Operation>
void reduce(const Words* in, Words* out, uint32_t mask, const Operation& operation) {
  uint32_t total = in[std::countr_zero(mask)].word[0];
  for_each_lane(mask & (mask - 1), [&](int lane) { total = operation(total, in[lane].word[0]); });
  for_each_lane(mask, [&](int lane) { out[lane].word[0] = total; });
}

void reduce_add(const Words* in, Words* out, uint32_t mask) {
  reduce(in, out, mask, [](uint32_t a, uint32_t b) { return a + b; });
}
template <class T>
void reduce_min(const Words* in, Words* out, uint32_t mask) {
  reduce(in, out, mask, [](uint32_t a, uint32_t b) { return static_cast<T>(b) < static_cast<T>(a) ? b : a; });
}
template <class T>
void reduce_max(const Words* in, Words* out, uint32_t mask) {
  reduce(in, out, mask, [](uint32_t a, uint32_t b) { return static_cast<T>(a) < static_cast<T>(b) ? b : a; });
}

uint32_t half_word(uint32_t word, uint32_t index) { return word >> (16 * (index % 2)) & 0xffffu; }

// in: the row of 8 elements that the lane's address names; out: one word of each of the 4 matrices.
template <bool kTrans>
void ldmatrix(const Words* in, Words* out, uint32_t) {
  for (uint32_t lane = 0; lane < 32; ++lane) {
    for (uint32_t matrix = 0; matrix < 4; ++matrix) {
      uint32_t word = 0;
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t across = lane / 4, along = 2 * (lane % 4) + half;
        const uint32_t row = kTrans ? along : across, column = kTrans ? across : along;
        word |= half_word(in[8 * matrix + row].word[column / 2], column) << (16 * half);
      }
      out[lane].word[matrix] = word;
    }
  }
}

float bfloat16_value(uint32_t bits) { return dynamic_moe::to_float(BFloat16{static_cast<uint16_t>(bits)}); }
float float16_value(uint32_t bits) { return dynamic_moe::to_float(Float16{static_cast<uint16_t>(bits)}); }

// in: a (4 words), b (2), d (4); out: d. Products are exact; sums are rounded at each step, in order of k.
template <int kK, class ReadA, class ReadB>
void multiply(const Words* in, Words* out, const ReadA& read_a, const ReadB& read_b) {
  float a[16][kK], b[kK][8];
  for (uint32_t k = 0; k < kK; ++k) {
    for (uint32_t row = 0; row < 16; ++row) a[row][k] = read_a(row, k);
    for (uint32_t column = 0; column < 8; ++column) b[k][column] = read_b(k, column);
  }
  for (uint32_t row = 0; row < 16; ++row) {
    float sum[8];
    const auto d = [&](const Words* words, uint32_t column) -> const uint32_t& {
      return words[row % 8 * 4 + column / 2].word[6 + row / 8 * 2 + column % 2];
    };
    for (uint32_t column = 0; column < 8; ++column) sum[column] = std::bit_cast<float>(d(in, column));
    for (uint32_t k = 0; k < kK; ++k) {
      for (uint32_t column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    }
    for (uint32_t column = 0; column < 8; ++column) {
      out[row % 8 * 4 + column / 2].word[row / 8 * 2 + column % 2] = std::bit_cast<uint32_t>(sum[column]);
    }
  }
}

template <float (*kValue)(uint32_t)>
void mma_16(const Words* in, Words* out, uint32_t) {
  multiply<16>(
      in, out,
      [&](uint32_t row, uint32_t k) {
        return kValue(half_word(in[row % 8 * 4 + k % 8 / 2].word[row / 8 + k / 8 * 2], k));
      },
      [&](uint32_t k, uint32_t column) { return kValue(half_word(in[column * 4 + k % 8 / 2].word[4 + k / 8], k)); });
}

// The tensor core does not look at the 13 lowest bits.
float tf32_value(uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); }

void mma_tf32(const Words* in, Words* out, uint32_t) {
  multiply<8>(
      in, out, [&](uint32_t row, uint32_t k) { return tf32_value(in[row % 8 * 4 + k % 4].word[row / 8 + k / 4 * 2]); },
      [&](uint32_t k, uint32_t column) { return tf32_value(in[column * 4 + k % 4].word[4 + k / 4]); });
}

}  // namespace

const Collective kSyncWarp{"__syncwarp", synchronize, nullptr, false, true};
const Collective kShuffle{"__shfl_sync", shuffle, &Counters::shuffles, false, false};
const Collective kBallot{"__ballot_sync", ballot, nullptr, false, false};
const Collective kMatchAny{"__match_any_sync", match_any, nullptr, false, false};
const Collective kReduceAdd{"__reduce_add_sync", reduce_add, nullptr, false, false};
const Collective kReduceMinInt{"__reduce_min_sync", reduce_min<int32_t>, nullptr, false, false};
const Collective kReduceMaxInt{"__reduce_max_sync", reduce_max<int32_t>, nullptr, false, false};
const Collective kReduceMinUnsigned{"__reduce_min_sync", reduce_min<uint32_t>, nullptr, false, false};
const Collective kReduceMaxUnsigned{"__reduce_max_sync", reduce_max<uint32_t>, nullptr, false, false};
const Collective kLdmatrix{"ldmatrix", ldmatrix<false>, &Counters::ldmatrix, true, false};
const Collective kLdmatrixTrans{"ldmatrix.trans", ldmatrix<true>, &Counters::ldmatrix, true, false};
const Collective kMmaBFloat16{"mma.m16n8k16.bf16", mma_16<bfloat16_value>, &Counters::mma, true, false};
const Collective kMmaHalf{"mma.m16n8k16.f16", mma_16<float16_value>, &Counters::mma, true, false};
const Collective kMmaTf32{"mma.m16n8k8.tf32", mma_tf32, &Counters::mma, true, false};

}  // namespace simt
