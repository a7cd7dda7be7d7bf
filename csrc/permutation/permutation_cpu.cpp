// SPDX-License-Identifier: Apache-2.0
// Divides the work among threads and hands it to the level in use.
#include <algorithm>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "permutation/cpu_levels.h"

namespace dynamic_moe {
namespace {

constexpr int64_t kSlotsPerBlock = 16384;              // fewer are not worth a thread
constexpr int64_t kBytesPerTask = int64_t{256} << 10;  // of rows, in combine
constexpr int64_t kStreamedBytes = int64_t{8} << 20;   // results of this size leave the cache before they are read
constexpr size_t kCacheLine = 64;

const PermutationKernels& kernels() {
  switch (current_isa()) {
    case Isa::kScalar:
      break;
    case Isa::kAvx2:
#ifdef DYNAMIC_MOE_HAS_AVX2
      return kPermutationAvx2;
#else
      break;
#endif
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
    case Isa::kAmx:
#ifdef DYNAMIC_MOE_HAS_AVX512
      return kPermutationAvx512;
#else
      break;
#endif
  }
  return kPermutationScalar;
}

// A few blocks for each thread, so that a slow one can take fewer. The result is the same for any number of blocks.
int64_t num_blocks(int64_t num_slots) {
  const int64_t threads = num_threads();
  return threads == 1 ? 1 : std::clamp<int64_t>(num_slots / kSlotsPerBlock, 1, 4 * threads);
}

int64_t block_begin(int64_t block, int64_t blocks, int64_t count) { return block * count / blocks; }

// Live slots of each expert in each block of slots: [blocks][E].
std::vector<int32_t> count_blocks(const int32_t* expert_ids, int64_t num_rows, int64_t slots_per_row, int64_t blocks,
                                  int32_t num_experts) {
  const PermutationKernels& level = kernels();
  std::vector<int32_t> counts(static_cast<size_t>(blocks * num_experts));
  parallel_tasks(blocks, [&](int64_t block) {
    const int64_t begin = block_begin(block, blocks, num_rows) * slots_per_row;
    const int64_t end = block_begin(block + 1, blocks, num_rows) * slots_per_row;
    level.count(expert_ids + begin, end - begin, num_experts, counts.data() + block * num_experts);
  });
  return counts;
}

// run(task) for ranges of tokens that cover [0, num_tokens).
template <class Run>
void for_tokens(int64_t num_tokens, int32_t max_experts, int64_t bytes_per_token, bool stream, const Run& run) {
  const int64_t tokens = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(1, bytes_per_token));
  parallel_tasks((num_tokens + tokens - 1) / tokens, [&](int64_t index) {
    std::vector<int64_t> slots(2 * static_cast<size_t>(max_experts));
    run(CombineTask{.begin = index * tokens,
                    .end = std::min((index + 1) * tokens, num_tokens),
                    .stream = stream,
                    .slots = slots.data()});
  });
}

bool is_streamed(const void* rows, int64_t total_bytes, int64_t row_bytes) {
  return total_bytes >= kStreamedBytes && row_bytes % kCacheLine == 0 &&
         reinterpret_cast<uintptr_t>(rows) % kCacheLine == 0;
}

}  // namespace

void count_rows_cpu(const int32_t* expert_ids, int64_t num_slots, int32_t num_experts, int32_t* tokens_per_expert,
                    int32_t* expert_offsets) {
  const int64_t blocks = num_blocks(num_slots);
  const std::vector<int32_t> counts = count_blocks(expert_ids, num_slots, 1, blocks, num_experts);
  expert_offsets[0] = 0;
  for (int32_t e = 0; e < num_experts; ++e) {
    tokens_per_expert[e] = 0;
    for (int64_t block = 0; block < blocks; ++block) {
      tokens_per_expert[e] += counts[static_cast<size_t>(block * num_experts + e)];
    }
    expert_offsets[e + 1] = expert_offsets[e] + tokens_per_expert[e];
  }
}

void permute_cpu(const PermuteParams& p) {
  const PermutationKernels& level = kernels();
  const int64_t blocks = std::min(num_blocks(p.num_tokens * p.max_experts), std::max<int64_t>(p.num_tokens, 1));
  // Of the blocks' counts only their running sums matter: where in each expert's rows a block begins.
  std::vector<int32_t> next(static_cast<size_t>(blocks * p.num_experts));
  if (blocks > 1) next = count_blocks(p.expert_ids, p.num_tokens, p.max_experts, blocks, p.num_experts);
  for (int32_t e = 0; e < p.num_experts; ++e) {
    int32_t row = p.expert_offsets[e];
    for (int64_t block = 0; block < blocks; ++block) {
      const size_t i = static_cast<size_t>(block * p.num_experts + e);
      const int32_t count = next[i];
      next[i] = row;
      row += count;
    }
  }
  parallel_tasks(blocks, [&](int64_t block) {
    level.permute(p, block_begin(block, blocks, p.num_tokens), block_begin(block + 1, blocks, p.num_tokens),
                  next.data() + block * p.num_experts);
  });
}

void combine_cpu(const CombineParams& p) {
  const PermutationKernels& level = kernels();
  const int64_t row_bytes = p.hidden_size * static_cast<int64_t>(size_of(p.dtype));
  for_tokens(p.num_tokens, p.max_experts, row_bytes, is_streamed(p.y, p.num_tokens * row_bytes, row_bytes),
             [&](const CombineTask& task) { level.combine(p, task); });
}

void combine_backward_cpu(const CombineBackwardParams& p) {
  const PermutationKernels& level = kernels();
  const int64_t row_bytes = p.hidden_size * static_cast<int64_t>(size_of(p.dtype));
  // There are at least as many rows as tokens with an expert.
  for_tokens(p.num_tokens, p.max_experts, row_bytes, is_streamed(p.d_rows, p.num_tokens * row_bytes, row_bytes),
             [&](const CombineTask& task) { level.combine_backward(p, task); });
}

}  // namespace dynamic_moe
