// SPDX-License-Identifier: Apache-2.0
// The two products that have the activation in their epilogue, over the arithmetic; swiglu_*_cuda.cu instantiate them.
#pragma once

#include "expert_mlp/swiglu_epilogues.cuh"
#include "grouped_matmul/device_products.cuh"

namespace dynamic_moe {

template <Math math>
struct SwigluProducts {
  using T = typename MathElement<math>::Type;

  // product: left = x, right = gate_up_proj, width = 2I; `to` takes the place of its result.
  static void forward(const RowProduct& product, const SwigluForwardArguments<T>& to, const ForwardPlan& plan,
                      float* partial, Stream stream) {
    if (plan.regime == Regime::kFewRows) {
      Products<math>::forward_slices(product, plan, partial, stream);
      return sum_slices(partial, plan.slices, product.groups, to.width, SwigluForward<T, true>{to}, stream);
    }
    Operands<T> operands = Products<math>::operands(product);
    operands.width = to.width;
    launch_row_tiles<Product::kForward, math, SwigluForward>(operands, to, product.groups, plan.regime, stream);
  }

  // product: left = dy, right = down_proj, width = I, depth = H.
  static void backward(const RowProduct& product, const SwigluBackwardArguments<T>& to, Regime regime, Stream stream) {
    launch_row_tiles<Product::kInputGradient, math, SwigluBackward>(Products<math>::operands(product), to,
                                                                    product.groups, regime, stream);
  }
};

}  // namespace dynamic_moe
