// SPDX-License-Identifier: Apache-2.0
// The expert pass on the device, as launches of products and combine on one stream.
#include "expert_mlp/expert_mlp.h"

#include "expert_mlp/expert_mlp_kernels.cuh"
#include "expert_mlp/swiglu_products.cuh"
#include "permutation/permutation.h"

namespace dynamic_moe {

extern template struct SwigluProducts<Math::kBFloat16>;
extern template struct SwigluProducts<Math::kFloat16>;
extern template struct SwigluProducts<Math::kTf32>;
extern template struct SwigluProducts<Math::kFloat32>;

namespace {

constexpr int kThreads = 256;

const int32_t* live_rows(const RowGroups& groups) { return groups.expert_offsets + groups.num_experts; }

unsigned row_blocks(const RowGroups& groups) { return static_cast<unsigned>(ceil_div(groups.num_rows, kThreads)); }

// Memory for `count` elements of `dtype`.
void* take_elements(WorkspaceCursor& cursor, int64_t count, DType dtype) {
  return cursor.take<char>(count * static_cast<int64_t>(size_of(dtype)));
}

int32_t slots_of_token(int64_t num_slots, int64_t num_tokens) {
  if (num_tokens == 0 || num_slots % num_tokens != 0) {
    throw std::invalid_argument("num_slots must be a multiple of num_tokens, got " + std::to_string(num_slots) +
                                " for " + std::to_string(num_tokens) + " tokens");
  }
  return size_32("slots of a token", num_slots / num_tokens);
}

// y[t] = sum of the token's rows, in the order of its slots. slot_row is written first: [num_slots].
void sum_rows_of_tokens(const RowGroups& groups, const int32_t* row_slot, const void* rows, int32_t* slot_row, void* y,
                        int64_t num_slots, int64_t hidden_size, DType dtype, Stream stream) {
  memset_async(slot_row, 0xff, static_cast<size_t>(num_slots) * sizeof(int32_t), stream);
  DYNAMIC_MOE_LAUNCH(invert_slots_kernel, row_blocks(groups), kThreads, 0, stream, row_slot, live_rows(groups),
                     slot_row);
  combine_cuda({.rows = rows,
                .weights = nullptr,
                .slot_row = slot_row,
                .y = y,
                .num_tokens = groups.num_tokens,
                .max_experts = slots_of_token(num_slots, groups.num_tokens),
                .hidden_size = hidden_size,
                .dtype = dtype},
               stream);
}

struct ForwardPass {
  Math math;
  RowProduct up, down;
  ForwardPlan up_plan, down_plan;
  void* activation;  // [R, I]
  int32_t* slot_row;
  float* partial;

  ForwardPass(const ExpertMlpParams& p, WorkspaceCursor& cursor) : math(math_of(p.dtype, p.allow_tf32)) {
    const int64_t h = p.hidden_size, i = p.intermediate_size;
    activation = take_elements(cursor, p.groups.num_rows * i, p.dtype);
    void* rows = take_elements(cursor, p.groups.num_rows * h, p.dtype);
    slot_row = cursor.take<int32_t>(p.num_slots);
    up = {p.groups, p.x, p.gate_up_proj, nullptr, 2 * i, h};
    up_plan =
        plan_forward(math, p.groups, 2 * i, h, whole_vectors(math, {h, i}, {p.x, p.gate_up_proj, p.pre_activation}));
    down = {p.groups, activation, p.down_proj, rows, h, i, {static_cast<const float*>(p.expert_weights), p.row_slot}};
    down.groups.row_token = nullptr;  // the activation has a row for each row
    down_plan = plan_forward(math, p.groups, h, i, whole_vectors(math, {h, i}, {p.down_proj}));
    partial = cursor.take<float>(std::max(up_plan.partial_floats, down_plan.partial_floats));
  }
};

// float16 has no room for every s a: it stores s a / unit for the product that d_down_proj is.
bool scaled_by_units(const ExpertMlpBackwardParams& p) {
  return p.dtype == DType::kFloat16 && p.d_down_proj != nullptr;
}

struct BackwardPass {
  Math math;
  RowProduct d_activation;
  Regime regime;
  int64_t parts;           // of a row's weight gradient
  void* d_pre_activation;  // [R, 2I]
  void* scaled;            // [R, I]
  float* units;            // [E] of the weights, for float16; else null
  float* row_sums;         // [parts, R]
  void* rows;              // [R, H]
  int32_t* slot_row;

  BackwardPass(const ExpertMlpBackwardParams& p, WorkspaceCursor& cursor) : math(math_of(p.dtype, p.allow_tf32)) {
    const int64_t h = p.hidden_size, i = p.intermediate_size, num_rows = p.groups.num_rows;
    d_activation = {p.groups, p.dy, p.down_proj, nullptr, i, h};
    regime = row_tile_regime(math, num_rows, p.groups.num_experts,
                             whole_vectors(math, {h, i}, {p.dy, p.down_proj, p.pre_activation}) &&
                                 (math != Math::kFloat16 || whole_vectors(math, {}, {p.x, p.gate_up_proj})));
    parts = ceil_div(i, matmul_policy(compiled_arch(), math, regime).warp_n());
    d_pre_activation = take_elements(cursor, num_rows * 2 * i, p.dtype);
    scaled = p.d_down_proj != nullptr ? take_elements(cursor, num_rows * i, p.dtype) : nullptr;
    units = scaled_by_units(p) ? cursor.take<float>(p.groups.num_experts) : nullptr;
    row_sums = p.d_expert_weights != nullptr ? cursor.take<float>(parts * num_rows) : nullptr;
    rows = p.dx != nullptr ? take_elements(cursor, num_rows * h, p.dtype) : nullptr;
    slot_row = p.dx != nullptr ? cursor.take<int32_t>(p.num_slots) : nullptr;
  }
};

// run(SwigluProducts<math>{})
template <class Run>
void with_swiglu(Math math, const Run& run) {
  switch (math) {
    case Math::kBFloat16:
      return run(SwigluProducts<Math::kBFloat16>{});
    case Math::kFloat16:
      return run(SwigluProducts<Math::kFloat16>{});
    case Math::kTf32:
      return run(SwigluProducts<Math::kTf32>{});
    case Math::kFloat32:
      return run(SwigluProducts<Math::kFloat32>{});
  }
}

void launch_d_activation(const ExpertMlpBackwardParams& p, const BackwardPass& pass, Stream stream) {
  const RowScale scale{static_cast<const float*>(p.expert_weights), p.row_slot};
  with_swiglu(pass.math, [&](auto products) {
    using T = typename decltype(products)::T;
    const SwigluBackwardArguments<T> to{static_cast<const T*>(p.pre_activation),
                                        static_cast<T*>(pass.d_pre_activation),
                                        static_cast<T*>(pass.scaled),
                                        pass.row_sums,
                                        p.groups.num_rows,
                                        static_cast<int32_t>(p.intermediate_size),
                                        scale,
                                        pass.units,
                                        static_cast<const T*>(p.x),
                                        static_cast<const T*>(p.gate_up_proj),
                                        p.groups.row_token,
                                        size_32("columns of x", p.hidden_size)};
    products.backward(pass.d_activation, to, pass.regime, stream);
  });
}

}  // namespace

size_t expert_mlp_cuda_workspace(const ExpertMlpParams& params) {
  WorkspaceCursor cursor;
  const ForwardPass pass(params, cursor);
  return cursor.used();
}

void expert_mlp_cuda(const ExpertMlpParams& params, Workspace workspace, Stream stream) {
  WorkspaceCursor cursor(workspace);
  const ForwardPass pass(params, cursor);
  cursor.check("expert_mlp");
  if (params.groups.num_tokens == 0 || params.hidden_size == 0) return;
  if (params.groups.num_rows != 0) {
    with_swiglu(pass.math, [&](auto products) {
      using T = typename decltype(products)::T;
      const SwigluForwardArguments<T> to{static_cast<T*>(params.pre_activation), static_cast<T*>(pass.activation),
                                         static_cast<int32_t>(params.intermediate_size)};
      products.forward(pass.up, to, pass.up_plan, pass.partial, stream);
    });
    with_products(pass.math, [&](auto products) { products.forward(pass.down, pass.down_plan, pass.partial, stream); });
  }
  sum_rows_of_tokens(params.groups, params.row_slot, pass.down.out, pass.slot_row, params.y, params.num_slots,
                     params.hidden_size, params.dtype, stream);
}

size_t expert_mlp_backward_cuda_workspace(const ExpertMlpBackwardParams& params) {
  WorkspaceCursor cursor;
  const BackwardPass pass(params, cursor);
  return cursor.used();
}

void expert_mlp_backward_cuda(const ExpertMlpBackwardParams& params, Workspace workspace, Stream stream) {
  WorkspaceCursor cursor(workspace);
  const BackwardPass pass(params, cursor);
  cursor.check("expert_mlp_backward");
  const int64_t h = params.hidden_size, i = params.intermediate_size;
  const RowGroups& groups = params.groups;
  if (scaled_by_units(params)) {
    DYNAMIC_MOE_LAUNCH(weight_units_kernel, static_cast<unsigned>(groups.num_experts), 1024, 0, stream,
                       static_cast<const float*>(params.expert_weights), params.row_slot, groups.expert_offsets,
                       pass.units);
  }
  launch_d_activation(params, pass, stream);
  if (params.d_expert_weights != nullptr) {
    memset_async(params.d_expert_weights, 0, static_cast<size_t>(params.num_slots) * sizeof(float), stream);
    DYNAMIC_MOE_LAUNCH(sum_weight_gradient_kernel, row_blocks(groups), kThreads, 0, stream, pass.row_sums,
                       static_cast<int32_t>(pass.parts), groups.num_rows, params.row_slot, live_rows(groups),
                       static_cast<float*>(params.d_expert_weights));
  }
  with_products(pass.math, [&](auto products) {
    if (params.dx != nullptr && groups.num_tokens != 0) {
      RowProduct d_x{groups, pass.d_pre_activation, params.gate_up_proj, pass.rows, h, 2 * i};
      d_x.groups.row_token = nullptr;
      products.input_gradient(d_x, stream);
      sum_rows_of_tokens(groups, params.row_slot, pass.rows, pass.slot_row, params.dx, params.num_slots, h,
                         params.dtype, stream);
    }
    if (params.d_gate_up_proj != nullptr) {
      products.weight_gradient(
          {groups, pass.d_pre_activation, nullptr, params.x, groups.row_token, params.d_gate_up_proj, 2 * i, h},
          stream);
    }
    if (params.d_down_proj != nullptr) {
      products.weight_gradient(
          {groups, params.dy, groups.row_token, pass.scaled, nullptr, params.d_down_proj, h, i, pass.units}, stream);
    }
  });
}

}  // namespace dynamic_moe
