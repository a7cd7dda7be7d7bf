// SPDX-License-Identifier: Apache-2.0
// Hands out chunks of tokens to the level in use and adds up what they return, in an order that depends on T alone.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <memory>
#include <new>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "gating/cpu_levels.h"
#include "gating/gating_float64.h"

namespace dynamic_moe {
namespace {

const GatingKernels& kernels() {
  switch (current_isa()) {
    case Isa::kScalar:
      break;
    case Isa::kAvx2:
#ifdef DYNAMIC_MOE_HAS_AVX2
      return kGatingAvx2;
#else
      break;
#endif
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
#ifdef DYNAMIC_MOE_HAS_AVX512
      return kGatingAvx512;
#else
      break;
#endif
  }
  return kGatingScalar;
}

constexpr std::align_val_t kAlignment{64};

struct AlignedDelete {
  void operator()(char* p) const { ::operator delete(p, kAlignment); }
};
using Scratch = std::unique_ptr<char, AlignedDelete>;

Scratch allocate(size_t bytes) { return Scratch(static_cast<char*>(::operator new(bytes, kAlignment))); }

// run(chunk, scratch) for every chunk of tokens, with a scratch of each worker's own.
template <class Run>
void for_chunks(int64_t num_chunks, size_t scratch_bytes, bool zeroed, const Run& run) {
  std::atomic<int64_t> next{0};
  parallel_for(0, std::min<int64_t>(num_threads(), num_chunks), 1, [&](int64_t, int64_t) {
    const Scratch scratch = allocate(scratch_bytes);
    if (zeroed) std::fill_n(scratch.get(), scratch_bytes, '\0');
    for (int64_t chunk = next.fetch_add(1); chunk < num_chunks; chunk = next.fetch_add(1)) run(chunk, scratch.get());
  });
}

// How far below its mean log P lies where the mass p is reached, in standard deviations, if it is normal; and a little
// more, so that few tokens have to be looked at twice.
float spread_of(double p) {
  constexpr double kMargin = 0.1;
  double low = -6, high = 6;
  for (int i = 0; i < 16; ++i) {
    const double middle = (low + high) / 2;
    (std::erfc(-middle / std::sqrt(2.0)) / 2 < p ? low : high) = middle;
  }
  return static_cast<float>(low + kMargin);
}

// Whether [T, columns] of 4-byte elements is written around the cache.
bool is_streamed(const void* buffer, int64_t num_tokens, int64_t columns) {
  constexpr int64_t kStreamedBytes = int64_t{2} << 20, kCacheLine = 64;
  return num_tokens * columns * 4 >= kStreamedBytes && columns * 4 % kCacheLine == 0 &&
         reinterpret_cast<uintptr_t>(buffer) % kCacheLine == 0;
}

template <class Real>
void add_chunks(const GatingParams& p, const std::vector<int32_t>& counts, const std::vector<double>& sums) {
  const size_t num_experts = static_cast<size_t>(p.num_experts);
  std::vector<double> sum(num_experts);
  std::fill_n(p.tokens_per_expert, num_experts, 0);
  for (size_t chunk = 0; chunk < counts.size(); chunk += num_experts) {
    for (size_t e = 0; e < num_experts; ++e) {
      p.tokens_per_expert[e] += counts[chunk + e];
      sum[e] += sums[chunk + e];
    }
  }
  for (size_t e = 0; e < num_experts; ++e) static_cast<Real*>(p.probability_sum)[e] = static_cast<Real>(sum[e]);
}

}  // namespace

int64_t gating_cpu(const GatingParams& p) {
  const bool is_float64 = p.logits_dtype == DType::kFloat64;
  const GatingKernels& level = kernels();
  const int64_t num_chunks = (p.num_tokens + kTokensPerChunk - 1) / kTokensPerChunk;
  std::vector<int32_t> counts(static_cast<size_t>(num_chunks * p.num_experts));
  std::vector<double> sums(counts.size());
  const float spread = p.is_top_p && p.num_experts > 16 ? spread_of(p.top_p) : 0.0f;
  const bool stream_selection = is_streamed(p.expert_ids, p.num_tokens, p.max_experts) &&
                                is_streamed(p.expert_weights, p.num_tokens, p.max_experts);
  const bool stream_probabilities = is_streamed(p.probabilities, p.num_tokens, p.num_experts);
  std::atomic<int64_t> non_finite{0};
  for_chunks(num_chunks, is_float64 ? 0 : forward_scratch_bytes(p.num_experts), false,
             [&](int64_t index, char* scratch) {
               const GatingChunk chunk{.begin = index * kTokensPerChunk,
                                       .end = std::min((index + 1) * kTokensPerChunk, p.num_tokens),
                                       .spread = spread,
                                       .stream_selection = stream_selection,
                                       .stream_probabilities = stream_probabilities,
                                       .tokens_per_expert = counts.data() + index * p.num_experts,
                                       .probability_sum = sums.data() + index * p.num_experts,
                                       .scratch = scratch};
               non_finite += is_float64 ? gating_float64(p, chunk) : level.forward(p, chunk);
             });
  is_float64 ? add_chunks<double>(p, counts, sums) : add_chunks<float>(p, counts, sums);
  return non_finite;
}

void gating_backward_cpu(const GatingBackwardParams& p) {
  const bool is_float64 = p.logits_dtype == DType::kFloat64;
  const GatingKernels& level = kernels();
  const int64_t num_chunks = (p.num_tokens + kTokensPerChunk - 1) / kTokensPerChunk;
  const size_t scratch_bytes = static_cast<size_t>(backward_scratch_floats(p.num_experts)) * sizeof(float);
  for_chunks(num_chunks, is_float64 ? 0 : scratch_bytes, true, [&](int64_t index, char* scratch) {
    const int64_t begin = index * kTokensPerChunk, end = std::min(begin + kTokensPerChunk, p.num_tokens);
    if (is_float64) return gating_backward_float64(p, begin, end);
    level.backward(p, begin, end, reinterpret_cast<float*>(scratch));
  });
}

}  // namespace dynamic_moe
