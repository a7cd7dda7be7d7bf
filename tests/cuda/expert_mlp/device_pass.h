// SPDX-License-Identifier: Apache-2.0
// The CPU tests' problem of the expert pass, run on the device.
#pragma once

#include "../../cpp/expert_mlp/expert_pass.h"
#include "cuda/support/dead_rows.h"
#include "cuda/support/device_buffer.h"
#include "cuda/support/tf32.h"

namespace dynamic_moe::testing {

// offset: elements that every buffer of T lies behind an aligned address.
template <class T>
struct DevicePass {
  const ExpertPass<T>& host;
  int64_t offset;
  DeviceBuffer<int32_t> expert_offsets, row_token, row_slot;
  DeviceBuffer<float> weights;
  DeviceBuffer<T> x, gate_up, down, dy, pre_activation;

  explicit DevicePass(const ExpertPass<T>& pass, int64_t elements = 0)
      : host(pass),
        offset(elements),
        expert_offsets(copied(host.ragged.expert_offsets)),
        row_token(copied(host.ragged.row_token, kDeadRows)),
        row_slot(copied(host.ragged.row_slot, kDeadRows)),
        weights(copied(host.weights)),
        x(copied(host.x), elements),
        gate_up(copied(host.gate_up), elements),
        down(copied(host.down), elements),
        dy(copied(host.dy), elements),
        pre_activation(copied(host.pre_activation, kDeadRows * 2 * host.i), elements) {}

  RowGroups groups() const {
    return {expert_offsets.data(), row_token.data(), host.ragged.num_rows + kDeadRows, host.ragged.num_tokens,
            static_cast<int32_t>(host.ragged.num_experts())};
  }

  struct Forward {
    std::vector<T> y, pre_activation;
  };
  Forward forward(bool keep = true) const {
    DeviceBuffer<T> y(host.x.size(), offset);
    DeviceBuffer<T> pre((host.ragged.num_rows + kDeadRows) * 2 * host.i, offset);
    const ExpertMlpParams params{.groups = groups(),
                                 .row_slot = row_slot.data(),
                                 .expert_weights = weights.data(),
                                 .x = x.data(),
                                 .gate_up_proj = gate_up.data(),
                                 .down_proj = down.data(),
                                 .pre_activation = keep ? pre.data() : nullptr,
                                 .y = y.data(),
                                 .hidden_size = host.h,
                                 .intermediate_size = host.i,
                                 .dtype = Storage<T>::kDType,
                                 .num_slots = host.ragged.num_slots(),
                                 .allow_tf32 = kAllowTf32<T>};
    DeviceWorkspace workspace(expert_mlp_cuda_workspace(params));
    expert_mlp_cuda(params, workspace.get(), Stream{});
    Forward out{y.download(), pre.download()};
    out.pre_activation.resize(static_cast<size_t>(host.ragged.num_rows * 2 * host.i));
    return out;
  }

  using Needs = typename ExpertPass<T>::Needs;
  struct Backward {
    std::vector<T> dx, d_gate_up, d_down;
    std::vector<float> d_weights;
  };
  Backward backward(const Needs& needs = {true, true, true, true}) const {
    DeviceBuffer<T> dx(needs.x ? host.x.size() : 0, offset), d_gate_up(needs.gate_up ? host.gate_up.size() : 0, offset);
    DeviceBuffer<T> d_down(needs.down ? host.down.size() : 0, offset);
    DeviceBuffer<float> d_weights(needs.weights ? host.weights.size() : 0);
    const ExpertMlpBackwardParams params{.groups = groups(),
                                         .row_slot = row_slot.data(),
                                         .expert_weights = weights.data(),
                                         .x = x.data(),
                                         .gate_up_proj = gate_up.data(),
                                         .down_proj = down.data(),
                                         .pre_activation = pre_activation.data(),
                                         .dy = dy.data(),
                                         .dx = needs.x ? dx.data() : nullptr,
                                         .d_gate_up_proj = needs.gate_up ? d_gate_up.data() : nullptr,
                                         .d_down_proj = needs.down ? d_down.data() : nullptr,
                                         .d_expert_weights = needs.weights ? d_weights.data() : nullptr,
                                         .num_slots = host.ragged.num_slots(),
                                         .hidden_size = host.h,
                                         .intermediate_size = host.i,
                                         .dtype = Storage<T>::kDType,
                                         .allow_tf32 = kAllowTf32<T>};
    DeviceWorkspace workspace(expert_mlp_backward_cuda_workspace(params));
    expert_mlp_backward_cuda(params, workspace.get(), Stream{});
    return {dx.download(), d_gate_up.download(), d_down.download(), d_weights.download()};
  }

  // Each row's part of y, and of dx, is rounded to storage before a token's rows are added.
  typename ExpertPass<T>::ExactForward exact_forward() const {
    auto exact = host.exact_forward();
    host.ragged.for_each_row([&](int64_t row, int64_t e) {
      std::vector<double> activation(static_cast<size_t>(host.i));
      for (int64_t j = 0; j < host.i; ++j) {
        const double gate = host.projection(row, e, j).value, up = host.projection(row, e, host.i + j).value;
        activation[static_cast<size_t>(j)] = gate / (1 + std::exp(-gate)) * up;
      }
      for (int64_t n = 0; n < host.h; ++n) {
        double part = 0;
        for (int64_t j = 0; j < host.i; ++j) {
          part += activation[static_cast<size_t>(j)] * value_of(host.down[(e * host.h + n) * host.i + j]);
        }
        allow(exact.y, host.ragged.token(row) * host.h + n, host.scale(row) * part);
      }
    });
    return exact;
  }
  typename ExpertPass<T>::ExactBackward exact_backward() const {
    auto exact = host.exact_backward();
    host.ragged.for_each_row([&](int64_t row, int64_t e) {
      std::vector<double> part(static_cast<size_t>(host.h));
      for (int64_t j = 0; j < host.i; ++j) {
        double d_scaled = 0;
        for (int64_t n = 0; n < host.h; ++n) {
          d_scaled += value_of(host.dy[host.ragged.token(row) * host.h + n]) *
                      value_of(host.down[(e * host.h + n) * host.i + j]);
        }
        const double gate = host.kept(row, e, j).value, up = host.kept(row, e, host.i + j).value;
        const double s = 1 / (1 + std::exp(-gate)), d_activation = host.scale(row) * d_scaled;
        const double d_gate = d_activation * up * s * (1 + gate * (1 - s)), d_up = d_activation * gate * s;
        for (int64_t n = 0; n < host.h; ++n) {
          const int64_t gate_row = e * 2 * host.i + j;
          part[static_cast<size_t>(n)] += d_gate * value_of(host.gate_up[gate_row * host.h + n]) +
                                          d_up * value_of(host.gate_up[(gate_row + host.i) * host.h + n]);
        }
      }
      for (int64_t n = 0; n < host.h; ++n) {
        allow(exact.dx, host.ragged.token(row) * host.h + n, part[static_cast<size_t>(n)]);
      }
    });
    return exact;
  }

 private:
  static void allow(Exact& exact, int64_t index, double part) {
    exact.bound[static_cast<size_t>(index)] += Storage<T>::kPrecision.store_error(part);
  }
};

}  // namespace dynamic_moe::testing
