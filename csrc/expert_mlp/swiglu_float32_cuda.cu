// SPDX-License-Identifier: Apache-2.0
#include "expert_mlp/swiglu_products.cuh"

template struct dynamic_moe::SwigluProducts<dynamic_moe::Math::kFloat32>;
