// SPDX-License-Identifier: Apache-2.0
// The CPU tests' problem of the three products, run on the device.
#pragma once

#include "../../cpp/grouped_matmul/products.h"
#include "cuda/support/dead_rows.h"
#include "cuda/support/device_buffer.h"
#include "cuda/support/tf32.h"

namespace dynamic_moe::testing {

// offset: elements that every buffer lies behind an aligned address. dead: rows that the buffers have and no group,
// which is what num_rows being an upper bound means.
template <class T>
struct DeviceProducts {
  const Products<T>& host;
  int64_t offset, dead;
  DeviceBuffer<int32_t> expert_offsets, row_token;
  DeviceBuffer<T> x, weight, dy;

  explicit DeviceProducts(const Products<T>& products, int64_t elements = 0, int64_t dead_rows = kDeadRows)
      : host(products),
        offset(elements),
        dead(dead_rows),
        expert_offsets(copied(host.ragged.expert_offsets)),
        row_token(copied(host.ragged.row_token, dead)),
        x(copied(host.x, gathers() ? 0 : dead * host.k), elements),
        weight(copied(host.weight), elements),
        dy(copied(host.dy, dead * host.n), elements) {}

  bool gathers() const { return host.ragged.load.gather; }
  RowGroups groups() const {
    const int64_t rows = host.ragged.num_rows + dead;
    return {expert_offsets.data(), gathers() ? row_token.data() : nullptr, rows,
            gathers() ? host.ragged.num_tokens : rows, static_cast<int32_t>(host.ragged.num_experts())};
  }

  // [R, N]; the dead rows must not have been written.
  std::vector<T> forward() const {
    DeviceBuffer<T> y((host.ragged.num_rows + dead) * host.n, offset);
    const GroupedMatmulParams params{groups(), x.data(), weight.data(),      y.data(),
                                     host.n,   host.k,   Storage<T>::kDType, kAllowTf32<T>};
    DeviceWorkspace workspace(grouped_matmul_cuda_workspace(params));
    grouped_matmul_cuda(params, workspace.get(), Stream{});
    std::vector<T> rows = y.download();
    const size_t live = static_cast<size_t>(host.ragged.num_rows * host.n);
    EXPECT_TRUE(untouched(std::span<const T>(rows).subspan(live)));
    rows.resize(live);
    return rows;
  }
  // [T, K]; without gather [R, K], of which the dead rows must be zero.
  std::vector<T> dx() const {
    DeviceBuffer<T> out(groups().num_tokens * host.k, offset);
    const GroupedMatmulDxParams params{groups(), dy.data(), weight.data(),      out.data(),
                                       host.n,   host.k,    Storage<T>::kDType, kAllowTf32<T>};
    DeviceWorkspace workspace(grouped_matmul_dx_cuda_workspace(params));
    grouped_matmul_dx_cuda(params, workspace.get(), Stream{});
    std::vector<T> tokens = out.download();
    const size_t live = static_cast<size_t>(host.ragged.num_tokens * host.k);
    EXPECT_TRUE(all_zero(std::span<const T>(tokens).subspan(live)));
    tokens.resize(live);
    return tokens;
  }
  // [E, N, K]
  std::vector<T> dw() const {
    DeviceBuffer<T> out(host.ragged.num_experts() * host.n * host.k, offset);
    const GroupedMatmulDwParams params{groups(), dy.data(), x.data(),           out.data(),
                                       host.n,   host.k,    Storage<T>::kDType, kAllowTf32<T>};
    grouped_matmul_dw_cuda(params, {}, Stream{});
    return out.download();
  }

  // A token's terms are rounded to storage before they are added.
  Exact exact_dx() const {
    Exact exact = host.exact_dx();
    host.ragged.for_each_row([&](int64_t row, int64_t e) {
      for (int64_t j = 0; j < host.k; ++j) {
        double term = 0;
        for (int64_t i = 0; i < host.n; ++i) {
          term += value_of(host.dy[row * host.n + i]) * value_of(host.weight[(e * host.n + i) * host.k + j]);
        }
        exact.bound[static_cast<size_t>(host.ragged.token(row) * host.k + j)] +=
            Storage<T>::kPrecision.store_error(term);
      }
    });
    return exact;
  }

 private:
  static ::testing::AssertionResult untouched(std::span<const T> values) {
    for (const std::byte byte : std::as_bytes(values)) {
      if (byte != std::byte{0xff}) return ::testing::AssertionFailure() << "a dead row was written";
    }
    return ::testing::AssertionSuccess();
  }
};

}  // namespace dynamic_moe::testing
