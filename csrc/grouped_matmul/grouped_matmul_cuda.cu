// SPDX-License-Identifier: Apache-2.0
// The operators' launches: workspaces, arithmetic, alignment.
#include <map>
#include <mutex>

#include "grouped_matmul/device_products.cuh"
#include "grouped_matmul/token_rows.cuh"

namespace dynamic_moe {
namespace {

constexpr int kThreads = 256;

unsigned blocks_for(int64_t threads) { return static_cast<unsigned>(ceil_div(threads, kThreads)); }

// The workspace of dx where tokens are gathered: the rows' terms and the lists of rows.
struct DxWorkspace {
  void* rows;  // [R, K] in dtype
  TokenRows lists;

  DxWorkspace(const GroupedMatmulDxParams& p, WorkspaceCursor& cursor) {
    const int64_t num_rows = p.groups.num_rows, num_tokens = p.groups.num_tokens;
    rows = cursor.take<char>(num_rows * p.k * static_cast<int64_t>(size_of(p.dtype)));
    lists.used = cursor.take<int32_t>(1 + 2 * num_tokens);  // cleared at once
    lists.count = lists.used + 1;
    lists.filled = lists.count + num_tokens;
    lists.begin = cursor.take<int32_t>(num_tokens);
    lists.found = cursor.take<int32_t>(num_rows);
    lists.rows = cursor.take<int32_t>(num_rows);
  }
};

void list_token_rows(const RowGroups& groups, const TokenRows& lists, Stream stream) {
  const int32_t* live = groups.expert_offsets + groups.num_experts;
  const unsigned row_blocks = blocks_for(groups.num_rows);
  memset_async(lists.used, 0, static_cast<size_t>(1 + 2 * groups.num_tokens) * sizeof(int32_t), stream);
  DYNAMIC_MOE_LAUNCH(count_token_rows_kernel, row_blocks, kThreads, 0, stream, groups.row_token, live, lists);
  DYNAMIC_MOE_LAUNCH(place_lists_kernel, blocks_for(groups.num_tokens), kThreads, 0, stream, groups.num_tokens, lists);
  DYNAMIC_MOE_LAUNCH(fill_lists_kernel, row_blocks, kThreads, 0, stream, groups.row_token, live, lists);
  DYNAMIC_MOE_LAUNCH(order_lists_kernel, row_blocks, kThreads, 0, stream, groups.row_token, live, lists);
}

template <class T>
void sum_token_rows(const GroupedMatmulDxParams& p, const DxWorkspace& workspace, Stream stream) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  const auto width = static_cast<int32_t>(p.k);
  const unsigned blocks = blocks_for(p.groups.num_tokens * ceil_div(p.k, kVector));
  const auto* rows = static_cast<const T*>(workspace.rows);
  auto* dx = static_cast<T*>(p.dx);
  if (p.k % kVector == 0 && is_aligned(dx, 16)) {
    DYNAMIC_MOE_LAUNCH((sum_token_rows_kernel<T, true>), blocks, kThreads, 0, stream, rows, workspace.lists, dx,
                       p.groups.num_tokens, width);
  } else {
    DYNAMIC_MOE_LAUNCH((sum_token_rows_kernel<T, false>), blocks, kThreads, 0, stream, rows, workspace.lists, dx,
                       p.groups.num_tokens, width);
  }
}

template <class T>
void clear_dead_rows(const GroupedMatmulDxParams& p, Stream stream) {
  const int64_t most = int64_t{current_device_limits().sm_count} * 4;
  const unsigned blocks = std::min<unsigned>(static_cast<unsigned>(most), blocks_for(p.groups.num_rows * p.k));
  DYNAMIC_MOE_LAUNCH((clear_dead_rows_kernel<T>), blocks, kThreads, 0, stream, static_cast<T*>(p.dx),
                     p.groups.expert_offsets + p.groups.num_experts, p.groups.num_rows, static_cast<int32_t>(p.k));
}

ForwardPlan plan_of(const GroupedMatmulParams& p) {
  const Math math = math_of(p.dtype, p.allow_tf32);
  return plan_forward(math, p.groups, p.n, p.k, whole_vectors(math, {p.n, p.k}, {p.x, p.weight, p.y}));
}

}  // namespace

#if defined(DYNAMIC_MOE_SIMT)

Arch compiled_arch() { return kThisArch; }

#else

namespace {
__global__ void asked_for_its_architecture_kernel() {}
}  // namespace

// As CUB asks: of any kernel in this binary, once for each device.
Arch compiled_arch() {
  static std::mutex mutex;
  static std::map<int, Arch> known;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "compiled_arch");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes;
  check_cuda(cudaFuncGetAttributes(&attributes, asked_for_its_architecture_kernel), "compiled_arch");
  return known.emplace(device, arch_of(attributes.ptxVersion)).first->second;
}

#endif

ForwardPlan plan_forward(Math math, const RowGroups& groups, int64_t columns, int64_t depth, bool aligned) {
  size_32("rows", groups.num_rows);
  ForwardPlan plan{regime_of(groups.num_rows, groups.num_experts, aligned)};
  if (plan.regime == Regime::kFewRows) {
    const MatmulPolicy policy = matmul_policy(compiled_arch(), math, plan.regime);
    plan.slices =
        depth_slices(policy, groups.num_rows, groups.num_experts, columns, depth, current_device_limits().sm_count);
    plan.partial_floats = plan.slices * groups.num_rows * columns;
  }
  return plan;
}

size_t grouped_matmul_cuda_workspace(const GroupedMatmulParams& params) {
  WorkspaceCursor cursor;
  cursor.take<float>(plan_of(params).partial_floats);
  return cursor.used();
}

void grouped_matmul_cuda(const GroupedMatmulParams& params, Workspace workspace, Stream stream) {
  const ForwardPlan plan = plan_of(params);
  WorkspaceCursor cursor(workspace);
  auto* partial = cursor.take<float>(plan.partial_floats);
  cursor.check("grouped_matmul");
  if (params.groups.num_rows == 0 || params.n == 0) return;
  const RowProduct product{params.groups, params.x, params.weight, params.y, params.n, params.k};
  with_products(math_of(params.dtype, params.allow_tf32),
                [&](auto products) { products.forward(product, plan, partial, stream); });
}

size_t grouped_matmul_dx_cuda_workspace(const GroupedMatmulDxParams& params) {
  if (params.groups.row_token == nullptr) return 0;
  WorkspaceCursor cursor;
  DxWorkspace needed(params, cursor);
  return cursor.used();
}

void grouped_matmul_dx_cuda(const GroupedMatmulDxParams& params, Workspace workspace, Stream stream) {
  const Math math = math_of(params.dtype, params.allow_tf32);
  size_32("rows", params.groups.num_rows);
  RowProduct product{params.groups, params.dy, params.weight, params.dx, params.k, params.n};
  product.groups.row_token = nullptr;  // dy has a row for each row
  if (params.groups.row_token == nullptr) {
    if (params.groups.num_rows == 0 || params.k == 0) return;
    with_products(math, [&](auto products) { products.input_gradient(product, stream); });
    return with_storage_type(params.dtype,
                             [&](auto tag) { clear_dead_rows<typename decltype(tag)::Type>(params, stream); });
  }
  WorkspaceCursor cursor(workspace);
  const DxWorkspace parts(params, cursor);
  cursor.check("grouped_matmul_dx");
  if (params.groups.num_tokens == 0 || params.k == 0) return;
  product.out = parts.rows;
  if (params.groups.num_rows != 0)
    with_products(math, [&](auto products) { products.input_gradient(product, stream); });
  list_token_rows(params.groups, parts.lists, stream);
  with_storage_type(params.dtype,
                    [&](auto tag) { sum_token_rows<typename decltype(tag)::Type>(params, parts, stream); });
}

void grouped_matmul_dw_cuda(const GroupedMatmulDwParams& params, Workspace, Stream stream) {
  if (params.groups.num_experts == 0 || params.n == 0 || params.k == 0) return;
  const WeightGradientProduct product{params.groups,           params.dy, nullptr,  params.x,
                                      params.groups.row_token, params.dw, params.n, params.k};
  with_products(math_of(params.dtype, params.allow_tf32),
                [&](auto products) { products.weight_gradient(product, stream); });
}

}  // namespace dynamic_moe
