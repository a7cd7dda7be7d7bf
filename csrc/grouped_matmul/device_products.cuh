// SPDX-License-Identifier: Apache-2.0
// The three products as launches, for the operators here and for the expert pass. Templates over the arithmetic, which
// products_*_cuda.cu instantiate one by one, so that they compile side by side.
#pragma once

#include "grouped_matmul/launch_tiles.cuh"

namespace dynamic_moe {

// out[r] = scale_r * (left[row of r] times the expert's matrix), over the live rows r.
struct RowProduct {
  RowGroups groups;   // row_token gathers left; null: row r reads left[r]
  const void* left;   // rows of `depth`
  const void* right;  // forward: [E, width, depth]; input gradient: [E, depth, width]
  void* out;          // [R, width]
  int64_t width, depth;
  RowScale scale = {};
};

// out_e = factor_e left_e^T right_e, over the rows of e; [E, height, width]
struct WeightGradientProduct {
  RowGroups groups;           // row_token is not read: either operand may be gathered
  const void* left;           // rows of `height`
  const int32_t* left_rows;   // row r reads left[left_rows[r]]; null: left[r]
  const void* right;          // rows of `width`
  const int32_t* right_rows;  // as left_rows
  void* out;
  int64_t height, width;
  const float* factors = nullptr;  // [E], of float16 alone; null: 1
};

// How a product with K-major matrices is computed. Few rows: their depth is cut into slices, whose float32 sums
// [slices, R, columns] lie in the workspace until they are added.
struct ForwardPlan {
  Regime regime;
  int slices = 1;
  int64_t partial_floats = 0;
};
ForwardPlan plan_forward(Math math, const RowGroups& groups, int64_t columns, int64_t depth, bool aligned);

template <Math math>
struct Products {
  using T = typename MathElement<math>::Type;

  static void forward(const RowProduct& product, const ForwardPlan& plan, float* partial, Stream stream);
  // The sums of ForwardPlan's slices.
  static void forward_slices(const RowProduct& product, const ForwardPlan& plan, float* partial, Stream stream);
  static void input_gradient(const RowProduct& product, Stream stream);
  static void weight_gradient(const WeightGradientProduct& product, Stream stream);

  static Operands<T> operands(const RowProduct& product, int slices = 1) {
    return {product.groups.expert_offsets,
            product.groups.num_experts,
            static_cast<const T*>(product.left),
            product.groups.row_token,
            static_cast<const T*>(product.right),
            nullptr,
            0,
            size_32("columns of the product", product.width),
            size_32("columns of an operand", product.depth),
            slices};
  }
};
extern template struct Products<Math::kBFloat16>;
extern template struct Products<Math::kFloat16>;
extern template struct Products<Math::kTf32>;
extern template struct Products<Math::kFloat32>;

// run(Products<math>{})
template <class Run>
void with_products(Math math, const Run& run) {
  switch (math) {
    case Math::kBFloat16:
      return run(Products<Math::kBFloat16>{});
    case Math::kFloat16:
      return run(Products<Math::kFloat16>{});
    case Math::kTf32:
      return run(Products<Math::kTf32>{});
    case Math::kFloat32:
      return run(Products<Math::kFloat32>{});
  }
}

}  // namespace dynamic_moe
