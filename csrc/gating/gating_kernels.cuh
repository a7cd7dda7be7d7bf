// SPDX-License-Identifier: Apache-2.0
// Gating on the device. A token belongs to a few lanes of one warp, which keep its whole row in registers from the
// logits to the selection: the logits are read once, and no barrier stands between the loads of two tokens.
//
// Most tokens get few experts, so the best one is searched again and again (a scan of the lane's own experts and a
// reduction over the lanes) until the rule is satisfied. A full sort would cost a warp 15 exchanges across lanes and
// more within them, whether one expert is wanted or all.
//
// Sums over tokens: each lane adds up its experts over the tokens of its warp, the warps of a block follow each other
// in order, and a block takes a chunk of tokens whose size depends on T and E alone. gating_totals_kernel then adds the
// chunks in order. Nothing depends on how blocks are scheduled.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#include "common/cuda/elements.cuh"
#include "common/cuda/launch.cuh"
#include "common/cuda/platform.cuh"
#include "common/cuda/shared.cuh"
#include "gating/gating.h"
#include "gating/gating_policy.h"

namespace dynamic_moe {

// What the chunks leave behind for gating_totals_kernel.
struct GatingPartials {
  float* probability_sum;      // [chunks, E]
  int32_t* tokens_per_expert;  // [chunks, E]
  int32_t* non_finite_tokens;  // [chunks]
};

struct GatingLaunch {
  GatingParams params;
  GatingPartials partials;
  int64_t tokens_per_chunk;
  int staged_slots;  // of a warp
  float temperature, top_p;
  bool stops_at_mass;   // false: K experts, whatever they weigh; true: unless p, where the device holds it, is 1
  bool vector_experts;  // rows of [T, E] may be read and written four elements at a time
  bool vector_slots;    // and the rows of [T, K] that a warp writes, together
};

constexpr uint32_t kWholeWarp = 0xffffffffu;

__device__ inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The lanes of a token.
template <int kLanes, int kExpertsPerLane>
struct TokenLanes {
  static constexpr int kVectors = kExpertsPerLane / 4;
  static constexpr int kTokensPerWarp = 32 / kLanes;
  static constexpr int kCapacity = kLanes * kExpertsPerLane;  // >= E

  int lane;  // within the token's

  __device__ int expert(int i) const { return i / 4 * (4 * kLanes) + 4 * lane + i % 4; }

  __device__ static float sum(float x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kWholeWarp, x, offset);
    return x;
  }
  __device__ static float largest(float x) {
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kWholeWarp, x, offset));
    return x;
  }

  // x[i] = row[expert(i)], `fill` behind the end. `valid`: there is a row.
  template <class T>
  __device__ void load(const T* row, int num_experts, bool valid, bool vectors, float fill,
                       float (&x)[kExpertsPerLane]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = expert(4 * v);
      float four[4] = {fill, fill, fill, fill};
      if (vectors) {
        if (valid && first < num_experts) Packed<T, 4>::load_once(row + first).unpack(four);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (valid && first + i < num_experts) four[i] = widened(load_global(row + first + i));
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) x[4 * v + i] = four[i];
    }
  }

  template <class T>
  __device__ void store(T* row, int num_experts, bool valid, bool vectors, const float (&x)[kExpertsPerLane]) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const int first = expert(4 * v);
      const float four[4] = {x[4 * v], x[4 * v + 1], x[4 * v + 2], x[4 * v + 3]};
      if (vectors) {
        if (valid && first < num_experts) Packed<T, 4>::of(four).store(row + first);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (valid && first + i < num_experts) store_global(row + first + i, narrowed<T>(four[i]));
        }
      }
    }
  }

  // The most probable expert of the token, the lower index among equals; known to all its lanes.
  struct Best {
    float probability;
    int expert;
  };
  __device__ Best best(const float (&probability)[kExpertsPerLane]) const {
    float most = probability[0];
    int at = 0;
#pragma unroll
    for (int i = 1; i < kExpertsPerLane; ++i) {
      if (probability[i] > most) {
        most = probability[i];
        at = i;
      }
    }
    int who = expert(at);
    if constexpr (kLanes == 32) {
      // Numbers that are not negative are ordered as their bits; those taken already (-1) come last here, too.
      const int bits = __float_as_int(most);
      const int most_bits = __reduce_max_sync(kWholeWarp, bits);
      who = __reduce_min_sync(kWholeWarp, bits == most_bits ? who : INT32_MAX);
      most = __int_as_float(most_bits);
    } else {
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) {
        const float other = __shfl_xor_sync(kWholeWarp, most, offset);
        const int other_who = __shfl_xor_sync(kWholeWarp, who, offset);
        if (other > most || (other == most && other_who < who)) {
          most = other;
          who = other_who;
        }
      }
    }
    return {most, who};
  }
};

// Turns logits into probabilities. As on the CPU: d = (largest - x) / temperature >= 0, s = sum exp(-d),
// q = sum d exp(-d), logsumexp = largest / temperature + log s, entropy = log s + q / s.
template <class Lanes, int kExpertsPerLane>
struct Softmax {
  float s, q, largest;

  __device__ Softmax(float temperature, float (&x)[kExpertsPerLane]) {
    constexpr float kLargestExponent = 104.0f;  // exp(-104) is 0 in float32
    largest = x[0];
#pragma unroll
    for (int i = 1; i < kExpertsPerLane; ++i) largest = fmaxf(largest, x[i]);
    largest = Lanes::largest(largest);
    s = q = 0.0f;
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      float d = largest - x[i];
      if (temperature != 1.0f) d /= temperature;
      if (d > kLargestExponent) d = kLargestExponent;  // not fminf: NaN stays NaN
      x[i] = expf(-d);
      s += x[i];
      q = fmaf(x[i], d, q);
    }
    s = Lanes::sum(s);
    q = Lanes::sum(q);
  }

  // The largest logit contributes exactly 1; NaN, +infinity and nothing but -infinity make the sum NaN.
  __device__ bool is_finite() const { return s >= 1.0f; }
};

// The slots [K] of the tokens that a warp holds, in shared memory: experts come one by one, but rows of K leave in
// whole vectors.
struct StagedSlots {
  int32_t* ids;    // [tokens per warp, K]
  float* weights;  // [tokens per warp, K]

  __device__ void clear(int count, int lane, int32_t unused) const {
    for (int i = lane; i < count; i += 32) {
      store_shared(ids + i, unused);
      store_shared(weights + i, 0.0f);
    }
  }

  template <class T>
  __device__ static void copy(const T* staged, T* out, int count, int lane, bool vectors) {
    int rest = 0;
    if (vectors) {
      rest = count & ~3;
      for (int i = 4 * lane; i < rest; i += 128) {
        store_global(reinterpret_cast<uint4*>(out + i), load_shared(reinterpret_cast<const uint4*>(staged + i)));
      }
    }
    for (int i = rest + lane; i < count; i += 32) store_global(out + i, load_shared(staged + i));
  }
};

// The dynamic shared memory of a block.
struct GatingShared {
  float* probability_sum;      // [capacity]
  int32_t* tokens_per_expert;  // [capacity]
  int32_t* staged;             // [warps, 2, slots of a warp]

  __device__ GatingShared(uint8_t* memory, int capacity)
      : probability_sum(reinterpret_cast<float*>(memory)),
        tokens_per_expert(reinterpret_cast<int32_t*>(memory) + capacity),
        staged(reinterpret_cast<int32_t*>(memory) + 2 * capacity) {}

  __device__ StagedSlots slots_of(int warp, int slots) const {
    int32_t* ids = staged + warp * 2 * slots;
    return {ids, reinterpret_cast<float*>(ids + slots)};
  }
};

// Takes experts from `probability` (which it overwrites) until the rule is satisfied; see ThresholdRule. Every lane of
// the warp comes here, with `routed` false where its token gets none. Returns how many the token got, and their mass.
template <class Lanes, int kExpertsPerLane>
__device__ inline int select_experts(const GatingLaunch& launch, const Lanes& lanes, bool routed,
                                     float (&probability)[kExpertsPerLane], int32_t* ids, float* weights,
                                     int32_t* tokens_per_expert, float& mass) {
  const GatingParams& p = launch.params;
  const float top_p = p.device_top_p == nullptr ? launch.top_p : static_cast<float>(load_global(p.device_top_p));
  const bool stops_at_mass = launch.stops_at_mass && top_p < 1.0f;
  mass = 0.0f;
  int selected = 0;
  for (int k = 0; k < p.max_experts && __any_sync(kWholeWarp, routed); ++k) {
    const typename Lanes::Best best = lanes.best(probability);
    if (!routed) continue;
    if (lanes.lane == 0) {
      store_shared(ids + k, best.expert);
      store_shared(weights + k, best.probability);
      atomicAdd(tokens_per_expert + best.expert, 1);
    }
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      if (lanes.expert(i) == best.expert) probability[i] = -1.0f;
    }
    mass += best.probability;
    selected = k + 1;
    if (stops_at_mass) routed = p.rule == ThresholdRule::kPaper ? mass < top_p : mass <= top_p;
  }
  return selected;
}

template <class Logit, int kLanes, int kExpertsPerLane>
__global__ void __launch_bounds__(kGatingThreads) gating_kernel(const GatingLaunch launch) {
  using Lanes = TokenLanes<kLanes, kExpertsPerLane>;
  const GatingParams& p = launch.params;
  DYNAMIC_MOE_SHARED(int32_t, non_finite_tokens, 1);
  DYNAMIC_MOE_DYNAMIC_SHARED(uint8_t, memory);
  const GatingShared shared(memory, Lanes::kCapacity);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int place = lane / kLanes;  // of the token in its warp
  const Lanes lanes{lane % kLanes};
  const int slots_of_warp = Lanes::kTokensPerWarp * p.max_experts;
  const StagedSlots slots = shared.slots_of(warp, launch.staged_slots);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * launch.tokens_per_chunk;
  const int64_t end = smaller(begin + launch.tokens_per_chunk, p.num_tokens);

  for (int e = static_cast<int>(threadIdx.x); e < Lanes::kCapacity; e += kGatingThreads) {
    store_shared(shared.tokens_per_expert + e, 0);
  }
  if (threadIdx.x == 0) store_shared(non_finite_tokens, 0);
  __syncthreads();

  float probability_sum[kExpertsPerLane] = {};
  for (int64_t first = begin + warp * Lanes::kTokensPerWarp; first < end;
       first += kGatingWarps * Lanes::kTokensPerWarp) {
    const int64_t token = first + place;
    const bool in_range = token < end;
    const bool wanted = in_range && (p.token_mask == nullptr || load_global(p.token_mask + token) != 0);

    float probability[kExpertsPerLane];
    lanes.load(static_cast<const Logit*>(p.logits) + token * p.num_experts, p.num_experts, wanted,
               launch.vector_experts, -INFINITY, probability);
    const Softmax<Lanes, kExpertsPerLane> softmax(launch.temperature, probability);
    const bool routed = wanted && softmax.is_finite();
    const bool broken = wanted && !routed;
    const float otherwise = broken ? NAN : 0.0f;

    const float scale = 1.0f / softmax.s;
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      probability[i] = routed ? probability[i] * scale : otherwise;
      if (routed) probability_sum[i] += probability[i];
    }
    lanes.store(static_cast<float*>(p.probabilities) + token * p.num_experts, p.num_experts, in_range,
                launch.vector_experts, probability);
    if (in_range && lanes.lane == 0) {
      const float log_s = logf(softmax.s);
      const float largest = launch.temperature != 1.0f ? softmax.largest / launch.temperature : softmax.largest;
      store_global(static_cast<float*>(p.entropy) + token, routed ? fmaf(softmax.q, scale, log_s) : otherwise);
      store_global(static_cast<float*>(p.logsumexp) + token, routed ? largest + log_s : otherwise);
    }

    slots.clear(slots_of_warp, lane, p.num_experts);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) {
      if (lanes.expert(i) >= p.num_experts) probability[i] = -1.0f;
    }
    int32_t* ids = slots.ids + place * p.max_experts;
    float* weights = slots.weights + place * p.max_experts;
    float mass;
    const int selected =
        select_experts(launch, lanes, routed, probability, ids, weights, shared.tokens_per_expert, mass);
    if (broken && lanes.lane == 0) {
      store_shared(ids, 0);
      store_shared(weights, NAN);
      atomicAdd(shared.tokens_per_expert, 1);
      atomicAdd(non_finite_tokens, 1);
    }
    __syncwarp();
    if (p.renormalize) {
      for (int k = lanes.lane; k < selected; k += kLanes) store_shared(weights + k, load_shared(weights + k) / mass);
      __syncwarp();
    }
    const int count = static_cast<int>(smaller(end - first, Lanes::kTokensPerWarp)) * p.max_experts;
    StagedSlots::copy(slots.ids, p.expert_ids + first * p.max_experts, count, lane, launch.vector_slots);
    StagedSlots::copy(slots.weights, static_cast<float*>(p.expert_weights) + first * p.max_experts, count, lane,
                      launch.vector_slots);
    __syncwarp();  // before the next tokens' slots are cleared
  }

  // Tokens of a warp, then warps in order.
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
#pragma unroll
    for (int offset = kLanes; offset < 32; offset *= 2) {
      probability_sum[i] += __shfl_xor_sync(kWholeWarp, probability_sum[i], offset);
    }
  }
  for (int turn = 0; turn < kGatingWarps; ++turn) {
    if (warp == turn && place == 0) {
#pragma unroll
      for (int v = 0; v < Lanes::kVectors; ++v) {
        float4* sums = reinterpret_cast<float4*>(shared.probability_sum + lanes.expert(4 * v));
        float4 sum = turn == 0 ? float4{} : load_shared(sums);
        sum.x += probability_sum[4 * v];
        sum.y += probability_sum[4 * v + 1];
        sum.z += probability_sum[4 * v + 2];
        sum.w += probability_sum[4 * v + 3];
        store_shared(sums, sum);
      }
    }
    __syncthreads();
  }
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.num_experts;
  for (int e = static_cast<int>(threadIdx.x); e < p.num_experts; e += kGatingThreads) {
    store_global(launch.partials.probability_sum + row + e, load_shared(shared.probability_sum + e));
    store_global(launch.partials.tokens_per_expert + row + e, load_shared(shared.tokens_per_expert + e));
  }
  if (threadIdx.x == 0) store_global(launch.partials.non_finite_tokens + blockIdx.x, load_shared(non_finite_tokens));
}

// Adds the chunks' partial results in order. A block has 32 experts, a lane for each; its warps share the chunks, and
// then their results are added in order of the warps.
constexpr int kTotalsWarps = 32;

__global__ void __launch_bounds__(32 * kTotalsWarps)
    gating_totals_kernel(GatingPartials partials, int64_t num_chunks, int num_experts, float* probability_sum,
                         int32_t* tokens_per_expert, int32_t* non_finite_tokens) {
  DYNAMIC_MOE_SHARED(double, sums, 32 * kTotalsWarps);
  DYNAMIC_MOE_SHARED(int32_t, counts, 32 * kTotalsWarps);
  DYNAMIC_MOE_SHARED(int32_t, broken, kTotalsWarps);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int expert = 32 * static_cast<int>(blockIdx.x) + lane;
  double sum = 0;
  int32_t count = 0;
  if (expert < num_experts) {
#pragma unroll 4
    for (int64_t chunk = warp; chunk < num_chunks; chunk += kTotalsWarps) {
      sum += static_cast<double>(load_global(partials.probability_sum + chunk * num_experts + expert));
      count += load_global(partials.tokens_per_expert + chunk * num_experts + expert);
    }
  }
  store_shared(sums + threadIdx.x, sum);
  store_shared(counts + threadIdx.x, count);
  if (blockIdx.x == 0) {
    int32_t found = 0;
    for (int64_t chunk = threadIdx.x; chunk < num_chunks; chunk += 32 * kTotalsWarps) {
      found += load_global(partials.non_finite_tokens + chunk);
    }
    found = __reduce_add_sync(kWholeWarp, found);
    if (lane == 0) store_shared(broken + warp, found);
  }
  __syncthreads();
  if (warp != 0) return;
  if (expert < num_experts) {
    for (int w = 1; w < kTotalsWarps; ++w) {
      sum += load_shared(sums + 32 * w + lane);
      count += load_shared(counts + 32 * w + lane);
    }
    store_global(probability_sum + expert, static_cast<float>(sum));
    store_global(tokens_per_expert + expert, count);
  }
  if (blockIdx.x == 0) {
    const int32_t found = __reduce_add_sync(kWholeWarp, load_shared(broken + lane));
    if (lane == 0) store_global(non_finite_tokens, found);
  }
}

struct GatingBackwardLaunch {
  GatingBackwardParams params;
  float temperature;
  bool vector_experts;
};

// The blocks of gating_backward_kernel that a multiprocessor must hold at once, 0 for no demand. Left alone, ptxas
// keeps 8 experts of a lane to 40 registers and 16 to 64 on some architectures, for a block or two more, and spills; 10
// and 7 blocks allow 48 and 72.
constexpr int gating_backward_blocks(int experts_per_lane) {
  return experts_per_lane == 8 ? 10 : experts_per_lane == 16 ? 7 : 0;
}

// With g_e the gradient of P_e from all that uses it,
//   d logit_e = P_e (g_e - sum_j P_j g_j + d_logsumexp - d_entropy (log P_e + entropy)) / temperature.
// What flows through the weights is scattered into a row of shared memory, from which each lane takes its experts.
template <class Logit, int kLanes, int kExpertsPerLane>
__global__ void __launch_bounds__(kGatingThreads, gating_backward_blocks(kExpertsPerLane))
    gating_backward_kernel(const GatingBackwardLaunch launch) {
  using Lanes = TokenLanes<kLanes, kExpertsPerLane>;
  const GatingBackwardParams& p = launch.params;
  DYNAMIC_MOE_SHARED(float, scattered, kGatingWarps* Lanes::kTokensPerWarp* Lanes::kCapacity);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int place = warp * Lanes::kTokensPerWarp + lane / kLanes;  // of the token in its block
  const Lanes lanes{lane % kLanes};
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (kGatingWarps * Lanes::kTokensPerWarp) + place;
  const bool in_range = token < p.num_tokens;
  const bool wanted = in_range && (p.token_mask == nullptr || load_global(p.token_mask + token) != 0);
  const float* row = static_cast<const float*>(p.probabilities) + token * p.num_experts;

  float probability[kExpertsPerLane];
  lanes.load(row, p.num_experts, wanted, launch.vector_experts, 0.0f, probability);
  float g[kExpertsPerLane] = {};
  if (p.d_expert_weights != nullptr) {
    float* through_weights = scattered + place * Lanes::kCapacity;
#pragma unroll
    for (int v = 0; v < Lanes::kVectors; ++v) {
      store_shared(reinterpret_cast<float4*>(through_weights + lanes.expert(4 * v)), float4{});
    }
    __syncwarp();
    const int32_t* ids = p.expert_ids + token * p.max_experts;
    const float* d_weights = static_cast<const float*>(p.d_expert_weights) + token * p.max_experts;
    const int slots = wanted ? p.max_experts : 0;
    const auto is_expert = [&](int32_t id) { return static_cast<uint32_t>(id) < static_cast<uint32_t>(p.num_experts); };
    float mass = 1.0f, dot = 0.0f;
    if (p.renormalize) {  // w_k = P_k / mass: d P_k = (d w_k - sum_j d w_j w_j) / mass
      mass = 0.0f;
      for (int k = lanes.lane; k < slots; k += kLanes) {
        const int32_t id = load_global(ids + k);
        if (!is_expert(id)) break;
        const float weight = load_global(row + id);
        mass += weight;
        dot = fmaf(load_global(d_weights + k), weight, dot);
      }
      mass = Lanes::sum(mass);
      dot = Lanes::sum(dot) / mass;
    }
    for (int k = lanes.lane; k < slots; k += kLanes) {
      const int32_t id = load_global(ids + k);
      if (!is_expert(id)) break;
      store_shared(through_weights + id, (load_global(d_weights + k) - dot) / mass);
    }
    __syncwarp();
#pragma unroll
    for (int v = 0; v < Lanes::kVectors; ++v) {
      const float4 four = load_shared(reinterpret_cast<const float4*>(through_weights + lanes.expert(4 * v)));
      g[4 * v] = four.x;
      g[4 * v + 1] = four.y;
      g[4 * v + 2] = four.z;
      g[4 * v + 3] = four.w;
    }
  }
  const auto add = [&](const void* gradient, int64_t offset) {
    if (gradient == nullptr) return;
    float more[kExpertsPerLane];
    lanes.load(static_cast<const float*>(gradient) + offset, p.num_experts, wanted, launch.vector_experts, 0.0f, more);
#pragma unroll
    for (int i = 0; i < kExpertsPerLane; ++i) g[i] += more[i];
  };
  add(p.d_probabilities, token * p.num_experts);
  add(p.d_probability_sum, 0);

  float dot = 0.0f;
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) dot = fmaf(probability[i], g[i], dot);
  dot = Lanes::sum(dot);
  const auto of_token = [&](const void* values) {
    return wanted && values != nullptr ? load_global(static_cast<const float*>(values) + token) : 0.0f;
  };
  const float d_logsumexp = of_token(p.d_logsumexp), d_entropy = of_token(p.d_entropy), entropy = of_token(p.entropy);
#pragma unroll
  for (int i = 0; i < kExpertsPerLane; ++i) {
    float d = g[i] - dot + d_logsumexp;
    if (p.d_entropy != nullptr) {
      // P log P is 0 to float32's last bit where P is not normal.
      d = fmaf(-d_entropy, logf(fmaxf(FLT_MIN, probability[i])) + entropy, d);
    }
    d *= probability[i];
    if (launch.temperature != 1.0f) d /= launch.temperature;
    g[i] = wanted ? d : 0.0f;
  }
  lanes.store(static_cast<Logit*>(p.d_logits) + token * p.num_experts, p.num_experts, in_range, launch.vector_experts,
              g);
}

}  // namespace dynamic_moe
