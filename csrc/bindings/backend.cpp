// SPDX-License-Identifier: Apache-2.0
#include "bindings/backend.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <cstring>

namespace dynamic_moe::bindings {
namespace {

int32_t cuda_index(const char* name, const Tensor& tensor) {
  if (!tensor.is_cuda()) fail(name, " must be on a CUDA device like the other arguments");
  return tensor.get_device_index();
}

}  // namespace

DType Device::float_dtype(const char* name, ScalarType dtype) const {
  const DType result = bindings::float_dtype(name, dtype);
  if (type_ != aoti_torch_device_type_cpu() && result == DType::kFloat64) {
    fail(name, " must be float32, bfloat16 or float16 on CUDA, got float64");
  }
  return result;
}

Tensor Device::checked(const char* name, const Tensor& tensor, ScalarType dtype,
                       std::initializer_list<int64_t> shape) const {
  if (type_ == aoti_torch_device_type_cpu()) {
    if (!tensor.is_cpu()) fail(name, " must be on the CPU like the other arguments");
  } else if (!tensor.is_cuda() || tensor.get_device_index() != index_) {
    fail(name, " must be on cuda:", index_, " like the other arguments");
  }
  check_tensor(name, tensor, dtype, shape);
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

OptionalTensor Device::checked(const char* name, const OptionalTensor& tensor, ScalarType dtype,
                               std::initializer_list<int64_t> shape) const {
  if (!tensor) return std::nullopt;
  return checked(name, *tensor, dtype, shape);
}

Tensor Device::empty(std::initializer_list<int64_t> shape, ScalarType dtype) const {
  std::array<int64_t, 4> strides{};
  int64_t stride = 1;
  for (size_t dim = shape.size(); dim-- > 0;) {
    strides[dim] = stride;
    stride *= std::max<int64_t>(shape.begin()[dim], 1);
  }
  // Straight to the allocator's entry: through the dispatcher (torch::stable::empty) it takes several times as long,
  // and a call of one token allocates up to seven outputs.
  AtenTensorHandle handle{};
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.begin(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), type_, index_, &handle));
  return Tensor(handle);
}

Cpu::Cpu(const char* name, const Tensor& tensor) : Device(aoti_torch_device_type_cpu(), 0) {
  if (!tensor.is_cpu()) fail(name, " must be on the CPU like the other arguments");
}

Cuda::Cuda(const char* name, const Tensor& tensor)
    : Device(aoti_torch_device_type_cuda(), cuda_index(name, tensor)),
      guard_(index_),
      stream_(torch::stable::accelerator::getCurrentStream(index_)) {}

int32_t Cuda::read(const Tensor& tensor, int64_t index) const {
  int32_t value = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_item_int32(torch::stable::select(tensor, 0, index).get(), &value));
  return value;
}

void zero_rows(const Tensor& tensor, int64_t first) {
  const int64_t rows = tensor.size(0);
  if (first >= rows) return;
  const int64_t row_bytes = tensor.numel() / rows * static_cast<int64_t>(tensor.element_size());
  std::memset(mutable_data<char>(tensor) + first * row_bytes, 0, static_cast<size_t>((rows - first) * row_bytes));
}

}  // namespace dynamic_moe::bindings
