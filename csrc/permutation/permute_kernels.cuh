// SPDX-License-Identifier: Apache-2.0
// Sorting slots by expert without comparing them: count, scan, place. Slots are divided into blocks, a block among its
// warps, both in order. Where the rows of (expert, block, warp) begin follows from the counts before it; within a warp,
// 32 slots at a time, a slot's rank among those of the same expert comes from one match. Stable, and no result depends
// on how blocks are scheduled: atomics only count.
#pragma once

#include <cstdint>

#include "common/cuda/launch.cuh"
#include "common/cuda/platform.cuh"
#include "common/cuda/shared.cuh"
#include "permutation/permutation.h"
#include "permutation/permute_plan.h"

namespace dynamic_moe {

constexpr int kScanWarps = 32;       // of scan_blocks_kernel
constexpr int kScannedExperts = 32;  // by a block of it

// What step 1 leaves for step 2.
struct PermuteWorkspace {
  int32_t* rows_of_block;  // [blocks, E] live slots; after the scan, those of the blocks before
  uint32_t* finished;      // how many blocks of scan_blocks_kernel have
};

__device__ inline bool is_expert(int32_t id, int num_experts) {
  return static_cast<uint32_t>(id) < static_cast<uint32_t>(num_experts);
}

// Counts the slots [begin, end) of each expert into `counts`, in shared memory; by the `threads` that call it.
__device__ inline void count_slots(const int32_t* expert_ids, int64_t begin, int64_t end, int num_experts, int thread,
                                   int threads, int32_t* counts) {
#pragma unroll 4
  for (int64_t slot = begin + thread; slot < end; slot += threads) {
    const int32_t id = load_global(expert_ids + slot);
    if (is_expert(id, num_experts)) atomicAdd(counts + id, 1);
  }
}

__global__ void __launch_bounds__(256) count_slots_kernel(const int32_t* expert_ids, int64_t num_slots, int num_experts,
                                                          int64_t slots_per_block, PermuteWorkspace workspace) {
  DYNAMIC_MOE_DYNAMIC_SHARED(int32_t, counts);  // [E]
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (blockIdx.x == 0 && thread == 0) store_global(workspace.finished, 0u);
  for (int e = thread; e < num_experts; e += threads) store_shared(counts + e, 0);
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * slots_per_block;
  const int64_t end = begin + slots_per_block < num_slots ? begin + slots_per_block : num_slots;
  count_slots(expert_ids, begin, end, num_experts, thread, threads, counts);
  __syncthreads();
  int32_t* row = workspace.rows_of_block + static_cast<int64_t>(blockIdx.x) * num_experts;
  for (int e = thread; e < num_experts; e += threads) store_global(row + e, load_shared(counts + e));
}

// The sum of `value` over the lanes before this one; `total`: over all.
__device__ inline int32_t exclusive_sum(int32_t value, int lane, int32_t& total) {
  int32_t sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t before = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += before;
  }
  total = __shfl_sync(0xffffffffu, sum, 31);
  return sum - value;
}

// expert_offsets from tokens_per_expert, by one block. Barriers: all threads come here.
__device__ inline void scan_experts(const int32_t* tokens_per_expert, int num_experts, int32_t row_capacity,
                                    int32_t* expert_offsets, int32_t* warp_totals) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  int32_t before = 0;  // rows of the experts of earlier rounds
  for (int first = 0; first < num_experts; first += 32 * kScanWarps) {
    const int e = first + static_cast<int>(threadIdx.x);
    const int32_t rows = e < num_experts ? load_global(tokens_per_expert + e) : 0;
    int32_t total;
    const int32_t in_warp = exclusive_sum(rows, lane, total);
    if (lane == 0) store_shared(warp_totals + warp, total);
    __syncthreads();
    int32_t of_round;
    const int32_t of_warps = exclusive_sum(load_shared(warp_totals + lane), lane, of_round);
    const int32_t offset = before + __shfl_sync(0xffffffffu, of_warps, warp) + in_warp;
    if (e < num_experts) store_global(expert_offsets + e, offset < row_capacity ? offset : row_capacity);
    before += of_round;
    __syncthreads();  // warp_totals are written again
  }
  if (threadIdx.x == 0) store_global(expert_offsets + num_experts, before < row_capacity ? before : row_capacity);
}

// Replaces each block's count by the sum of those before it, for 32 experts, one in each lane; the warps share the
// blocks of slots. The block that finishes last knows all totals, and turns them into offsets.
__global__ void __launch_bounds__(32 * kScanWarps)
    scan_blocks_kernel(PermuteWorkspace workspace, int64_t num_blocks, int num_experts, int32_t row_capacity,
                       int32_t* tokens_per_expert, int32_t* expert_offsets) {
  DYNAMIC_MOE_SHARED(int32_t, sums, kScanWarps* kScannedExperts);
  DYNAMIC_MOE_SHARED(int32_t, warp_totals, kScanWarps);
  DYNAMIC_MOE_SHARED(int32_t, is_last, 1);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int expert = kScannedExperts * static_cast<int>(blockIdx.x) + lane;
  const int64_t share = (num_blocks + kScanWarps - 1) / kScanWarps;
  const int64_t begin = warp * share;
  const int64_t end = expert >= num_experts ? begin : begin + share < num_blocks ? begin + share : num_blocks;
  int32_t* column = workspace.rows_of_block + expert;

  int32_t sum = 0;
#pragma unroll 4
  for (int64_t block = begin; block < end; ++block) sum += load_global(column + block * num_experts);
  store_shared(sums + threadIdx.x, sum);
  __syncthreads();
  int32_t before = 0;
  for (int w = 0; w < warp; ++w) before += load_shared(sums + 32 * w + lane);
  if (warp == kScanWarps - 1 && expert < num_experts) store_global(tokens_per_expert + expert, before + sum);
  for (int64_t block = begin; block < end; ++block) {
    const int32_t rows = load_global(column + block * num_experts);
    store_global(column + block * num_experts, before);
    before += rows;
  }

  __threadfence();  // this block's totals, before it counts as finished
  __syncthreads();
  if (threadIdx.x == 0) store_shared(is_last, static_cast<int32_t>(atomicAdd(workspace.finished, 1u) + 1 == gridDim.x));
  __syncthreads();
  if (load_shared(is_last) == 0) return;
  __threadfence();  // everybody's totals, after they were counted as finished
  scan_experts(tokens_per_expert, num_experts, row_capacity, expert_offsets, warp_totals);
}

// The row of each slot of a warp, in order. next[e]: the next row of expert e, the warp's own.
__device__ inline void place_slots(const PermuteParams& p, int32_t num_rows, int64_t begin, int64_t end, int lane,
                                   int32_t* next) {
  for (int64_t first = begin; first < end; first += 32) {
    const int64_t slot = first + lane;
    const int32_t id = slot < end ? load_global(p.expert_ids + slot) : -1;
    const bool live = is_expert(id, p.num_experts);
    int32_t row = -1;
    if (__any_sync(0xffffffffu, live)) {
      // Unused slots match each other, whatever they hold.
      const uint32_t peers = __match_any_sync(0xffffffffu, live ? id : -1);
      const uint32_t before = peers & ((1u << lane) - 1u);
      if (live) row = load_shared(next + id) + __popc(before);
      __syncwarp();
      if (live && before == 0) store_shared(next + id, row + __popc(peers));
      __syncwarp();
    }
    if (row >= num_rows) row = -1;
    if (slot < end) store_global(p.slot_row + slot, row);
    if (row >= 0) {
      store_global(p.row_token + row,
                   static_cast<int32_t>(static_cast<uint32_t>(slot) / static_cast<uint32_t>(p.max_experts)));
      store_global(p.row_slot + row, static_cast<int32_t>(slot));
    }
  }
}

__global__ void __launch_bounds__(256)
    place_slots_kernel(PermuteParams p, int64_t num_rows, int64_t slots_per_warp, PermuteWorkspace workspace) {
  DYNAMIC_MOE_DYNAMIC_SHARED(int32_t, next);  // [warps, E]
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const int64_t num_slots = p.num_tokens * p.max_experts;
  const int64_t block_begin = static_cast<int64_t>(blockIdx.x) * slots_per_warp * warps;
  const int64_t warp_begin = block_begin + warp * slots_per_warp;
  const int64_t begin = warp_begin < num_slots ? warp_begin : num_slots;
  const int64_t end = begin + slots_per_warp < num_slots ? begin + slots_per_warp : num_slots;

  for (int i = thread; i < warps * p.num_experts; i += threads) store_shared(next + i, 0);
  __syncthreads();
  int32_t* own = next + warp * p.num_experts;
  count_slots(p.expert_ids, begin, end, p.num_experts, lane, 32, own);
  __syncthreads();
  const int32_t* before = workspace.rows_of_block + static_cast<int64_t>(blockIdx.x) * p.num_experts;
  for (int e = thread; e < p.num_experts; e += threads) {
    int32_t row = load_global(p.expert_offsets + e) + load_global(before + e);
    for (int w = 0; w < warps; ++w) {
      const int32_t count = load_shared(next + w * p.num_experts + e);
      store_shared(next + w * p.num_experts + e, row);
      row += count;
    }
  }
  __syncthreads();
  place_slots(p, static_cast<int32_t>(num_rows), begin, end, lane, own);

  // Rows that are not there.
  const int64_t live_rows = load_global(p.expert_offsets + p.num_experts);
  const int64_t step = static_cast<int64_t>(gridDim.x) * threads;
  for (int64_t row = live_rows + static_cast<int64_t>(blockIdx.x) * threads + thread; row < num_rows; row += step) {
    store_global(p.row_token + row, 0);
    store_global(p.row_slot + row, 0);
  }
}

}  // namespace dynamic_moe
