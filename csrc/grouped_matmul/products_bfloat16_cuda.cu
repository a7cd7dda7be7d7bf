// SPDX-License-Identifier: Apache-2.0
#include "grouped_matmul/product_launchers.cuh"

template struct dynamic_moe::Products<dynamic_moe::Math::kBFloat16>;
