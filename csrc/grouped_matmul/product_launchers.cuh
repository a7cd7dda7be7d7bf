// SPDX-License-Identifier: Apache-2.0
// What products_*_cuda.cu instantiate.
#pragma once

#include "grouped_matmul/device_products.cuh"

namespace dynamic_moe {

template <Math math>
void Products<math>::forward_slices(const RowProduct& product, const ForwardPlan& plan, float* partial, Stream stream) {
  const Operands<T> of = operands(product, plan.slices);
  launch_tiles<TileConfig<Product::kForward, math, Regime::kFewRows>>(
      of, StoreSlice{partial, product.groups.num_rows, of.width}, product.groups, stream);
}

template <Math math>
void Products<math>::forward(const RowProduct& product, const ForwardPlan& plan, float* partial, Stream stream) {
  const StoreRowsArguments<T> to{static_cast<T*>(product.out), static_cast<int32_t>(product.width), product.scale};
  if (plan.regime == Regime::kFewRows) {
    forward_slices(product, plan, partial, stream);
    return sum_slices(partial, plan.slices, product.groups, to.width, StoreRows<T, true>{to}, stream);
  }
  launch_row_tiles<Product::kForward, math, StoreRows>(operands(product), to, product.groups, plan.regime, stream);
}

template <Math math>
void Products<math>::input_gradient(const RowProduct& product, Stream stream) {
  const StoreRowsArguments<T> to{static_cast<T*>(product.out), static_cast<int32_t>(product.width), product.scale};
  const bool aligned = whole_vectors(math, {product.width, product.depth}, {product.left, product.right, product.out});
  launch_row_tiles<Product::kInputGradient, math, StoreRows>(
      operands(product), to, product.groups,
      row_tile_regime(math, product.groups.num_rows, product.groups.num_experts, aligned), stream);
}

template <Math math>
void Products<math>::weight_gradient(const WeightGradientProduct& product, Stream stream) {
  size_32("rows", product.groups.num_rows);
  const Operands<T> of{product.groups.expert_offsets,
                       product.groups.num_experts,
                       static_cast<const T*>(product.left),
                       product.left_rows,
                       static_cast<const T*>(product.right),
                       product.right_rows,
                       size_32("rows of a matrix", product.height),
                       size_32("columns of a matrix", product.width),
                       0,
                       1};
  const StoreRowsArguments<T> to{static_cast<T*>(product.out), of.width, {}, product.factors};
  if (whole_vectors(math, {product.height, product.width}, {product.left, product.right, product.out})) {
    launch_tiles<TileConfig<Product::kWeightGradient, math, Regime::kWeightGradient>>(of, StoreRows<T, true>{to},
                                                                                      product.groups, stream);
  } else {
    launch_tiles<TileConfig<Product::kWeightGradient, math, Regime::kUnaligned>>(of, StoreRows<T, false>{to},
                                                                                 product.groups, stream);
  }
}

}  // namespace dynamic_moe
