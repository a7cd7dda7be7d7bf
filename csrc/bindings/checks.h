// SPDX-License-Identifier: Apache-2.0
// Checks of the operators' arguments. Python (dynamic_moe/ops) checks first and speaks to the user; this is the second
// line, for whoever calls torch.ops.dynamic_moe.* directly: no argument, however wrong, may crash the process.
// Everything here throws std::invalid_argument, which is a ValueError in Python (dynamic_moe/ops/_torch_private.py).
// Which device a tensor must be on is backend.h's to check.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "common/types.h"

namespace dynamic_moe::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// In an expected shape: any size will do.
inline constexpr int64_t kAnySize = -1;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

// What the last std::invalid_argument said that left an operator on this thread, or nothing; it is told once. From
// torch 2.15 on such an exception reaches Python as a RuntimeError, and Python asks here whether it was one.
std::optional<std::string> take_argument_error();
void keep_argument_error(const char* message);

// An operator as it is registered: kFunction, whose std::invalid_argument is kept for take_argument_error().
template <auto kFunction>
struct Operator;
template <class Result, class... Arguments, Result (*kFunction)(Arguments...)>
struct Operator<kFunction> {
  static Result call(Arguments... arguments) {
    try {
      return kFunction(arguments...);
    } catch (const std::invalid_argument& error) {
      keep_argument_error(error.what());
      throw;
    }
  }
};

// The kernels' name of a float tensor's dtype. Fails on every dtype but float32, float64, bfloat16 and float16.
DType float_dtype(const char* name, const Tensor& tensor);
DType float_dtype(const char* name, ScalarType dtype);
ScalarType scalar_type(DType dtype);

// float64 for float64, else float32: the dtype of sums, gate weights and statistics.
ScalarType accumulator_type(DType dtype);

// Fails unless `tensor` has this dtype and shape.
void check_tensor(const char* name, const Tensor& tensor, ScalarType dtype, std::initializer_list<int64_t> shape);

// Fails unless `value` is in [low, high].
void check_range(const char* name, int64_t value, int64_t low, int64_t high);
void check_fits_int32(const char* name, int64_t value);

// The checks from here on read the values: they are for CPU tensors alone.

// Fails unless every element, or the first `count`, is in [low, high]. The tensor is int32 and contiguous.
void check_elements(const char* name, const Tensor& tensor, int64_t count, int64_t low, int64_t high);
void check_elements(const char* name, const Tensor& tensor, int64_t low, int64_t high);

// Fails unless expert_offsets rises from 0 to at most num_rows. Returns R, its last entry: rows beyond are not live.
int64_t check_offsets(const Tensor& expert_offsets, int64_t num_rows);

// Fails unless, for the live rows r < R, row_token[r] is in [0, num_tokens) and row_slot[r] is one of that token's
// max_experts slots.
void check_rows(const Tensor& row_token, const Tensor& row_slot, int64_t live_rows, int64_t num_tokens,
                int64_t max_experts);

// Fails unless slot_row names no row twice and none beyond num_rows; -1 marks unused slots. Returns how many it names.
int64_t check_slot_row(const Tensor& slot_row, int64_t num_rows);

template <class T = void>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T = void>
const T* data(const OptionalTensor& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

template <class T = void>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace dynamic_moe::bindings
