// SPDX-License-Identifier: Apache-2.0
// Where an operator runs. Each operator is written once, as a template over Cpu or Cuda: checks, sizes and outputs are
// the same, and `if constexpr (Backend::kReadsValues)` parts what differs. Cpu may look at the values of its arguments
// and does; on Cuda no value is known when the operator returns, so shapes, dtypes and devices are all that is checked.
// A build without CUDA instantiates Cpu alone and needs none of the CUDA launchers that the contracts declare.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <initializer_list>

#include "bindings/checks.h"
#include "common/cuda/stream.h"

namespace dynamic_moe::bindings {

// The device of a call's tensors.
class Device {
 public:
  // The kernels' name of a float tensor's dtype. Fails on every dtype but float32, bfloat16, float16 and, on the CPU,
  // float64.
  DType float_dtype(const char* name, const Tensor& tensor) const { return float_dtype(name, tensor.scalar_type()); }
  DType float_dtype(const char* name, ScalarType dtype) const;

  // Fails unless `tensor` is on this device and has this dtype and shape. Returns it with contiguous rows (a copy if
  // needed).
  Tensor checked(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape) const;
  OptionalTensor checked(const char* name, const OptionalTensor& tensor, ScalarType dtype,
                         std::initializer_list<int64_t> shape) const;

  // An uninitialized contiguous tensor.
  Tensor empty(std::initializer_list<int64_t> shape, ScalarType dtype) const;

 protected:
  Device(int32_t type, int32_t index) : type_(type), index_(index) {}

  int32_t type_;
  int32_t index_;
};

class Cpu : public Device {
 public:
  static constexpr bool kReadsValues = true;

  // The dispatcher comes here where every tensor is on the CPU.
  Cpu(const char* name, const Tensor& tensor);

  // An element of an int32 tensor.
  int32_t read(const Tensor& tensor, int64_t index) const { return data<int32_t>(tensor)[index]; }
};

// Device memory that a launcher works in.
struct Scratch {
  Tensor bytes;

  operator Workspace() const {  // NOLINT(google-explicit-constructor): it is one, and keeps its memory
    return {mutable_data(bytes), static_cast<size_t>(bytes.numel())};
  }
};

// Its device is the current one as long as this lives; work goes to the stream that is current there.
class Cuda : public Device {
 public:
  static constexpr bool kReadsValues = false;

  // Fails unless `tensor`, by which the others will be judged, is on a CUDA device.
  Cuda(const char* name, const Tensor& tensor);

  // An element of an int32 tensor; waits for the device, which torch.cuda.set_sync_debug_mode gets to see.
  int32_t read(const Tensor& tensor, int64_t index) const;

  Stream stream() const { return {stream_.nativeHandle()}; }

  // Memory from torch's allocator for one call of a launcher: it is given back when the call's expression ends, to be
  // used again by what comes later on the stream.
  Scratch scratch(size_t bytes) const { return {empty({static_cast<int64_t>(bytes)}, ScalarType::Byte)}; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  torch::stable::accelerator::Stream stream_;
};

// Sets the rows from `first` on to zero: rows that are not live, in a CPU tensor.
void zero_rows(const Tensor& tensor, int64_t first);

}  // namespace dynamic_moe::bindings
